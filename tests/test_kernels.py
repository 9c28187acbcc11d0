"""KERNELS: their numbers in Triton's interpreter, where triton is; when they are refused; what never takes them."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run

import train_gpt as t

ON = t.Config(kernels="mlp")
SMALL = dict(model_dim=16, num_heads=2, num_kv_heads=1)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton: the environment of `make test-cuda` has it")
def test_its_numbers_hold_in_an_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/helpers/interpreted.py"]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", ["mlp", "all"])
def test_a_run_that_cannot_have_them_ends_at_once(name, env):
    done = run(env | {"KERNELS": name}, check=False)
    start = f"train_gpt.py: KERNELS={name} needs a Hopper GPU"
    assert done.returncode == 1 and done.stderr.startswith(start) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("kernels", ["mlp", "all"])
@pytest.mark.parametrize("capability, triton, changes", [
    ((9, 0), True, {}), ((8, 0), True, {}), ((10, 0), True, {}), ((9, 0), None, {}), ((9, 0), True, dict(dtype="fp32")),
    ((9, 0), True, dict(mlp_mult=3.2)), ((9, 0), True, dict(model_dim=508, num_heads=2, num_kv_heads=1, mlp_mult=8.0)),
], ids=str)
def test_each_thing_that_they_need(capability, triton, changes, kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(t, "DESCRIPTOR", triton)
    cfg, ranks = replace(ON, kernels=kernels, **changes), t.Ranks(device=torch.device("cuda"))
    t.check_kernels(replace(cfg, kernels="off"), ranks)
    if (capability, triton, changes) == ((9, 0), True, {}):
        return t.check_kernels(cfg, ranks)
    with pytest.raises(t.InputError, match=f"KERNELS={kernels} needs"):
        t.check_kernels(cfg, ranks)


@pytest.mark.parametrize("adapted", ["fc", "proj"])
def test_what_rides_on_a_product_sees_it(adapted, monkeypatch):
    """An adapter, an observer: the plain path is taken, so that they get the input and output of the Linear."""
    t.register_operators()
    monkeypatch.setattr(torch.ops.golf, "mlp", None)
    off, on = (t.MLP(replace(ON, kernels=name, rope_dims=0, **SMALL)) for name in ("off", "mlp"))
    for p in off.parameters():
        torch.nn.init.normal_(p)
    on.load_state_dict(off.state_dict())
    for mlp in (off, on):
        getattr(mlp, adapted).adapter = lambda x, y: y + x.mean()
    x, scale = torch.randn(2, 3, 16), torch.rand(16)
    weights = t.Weights(None, None, off.fc.weight, scale[:, None] * off.proj.weight, None)
    assert torch.equal(on(x, weights, scale), off(x, weights, scale))
    getattr(on, adapted).adapter = None
    with pytest.raises(TypeError):
        on(x, weights, scale)


TINY = t.Config(vocab_size=24, num_layers=2, xsa_last_n=1, ve_layers="", bigram_vocab_size=0, rope_dims=0, train_seq_len=128, logit_softcap=5.0,
                mlp_mult=2.0, **SMALL)


def with_grad(model, ids, **options):
    return model(ids[:, :-1], ids[:, 1:], **options).detach()


def test_which_losses_the_kernel_gives(monkeypatch):
    """Those of training; not those without gradients, of other temperatures, with a penalty, of caps or a head that adapt."""
    taken = []

    def by_torch(x, weight, targets, cap):
        taken.append((x.shape, weight.dtype, targets.shape))
        return F.cross_entropy(cap * torch.tanh((x @ weight.T).float() / cap), targets, reduction="none"), None

    t.register_operators()
    monkeypatch.setattr(torch.ops.golf, "loss", by_torch)
    off, on = (t.GPT(replace(TINY, kernels=name), dtype=torch.bfloat16) for name in ("off", "all"))
    for p in off.parameters():
        torch.nn.init.normal_(p)
    on.load_state_dict(off.state_dict())
    for block in on.blocks:
        block.mlp.fused = False
    ids = torch.randint(24, (3, 17), generator=torch.Generator().manual_seed(0))

    def same(**options):
        """Whether the kernel gave the losses, which are the plain path's."""
        taken.clear()
        assert torch.equal(with_grad(on, ids, **options), with_grad(off, ids, **options))
        assert taken in ([], [((48, 16), torch.bfloat16, (48,))])
        return bool(taken)

    assert same() and not same(temperature=0.9) and not same(z_loss=1e-3)
    with torch.no_grad():
        assert not same()
    for model in (off, on):
        model.cap_steps = torch.nn.Parameter(torch.ones(2, 1, 1, 1))
    assert not same()
    for model in (off, on):
        model.cap_steps, model.tok_emb.adapter = None, lambda x, y: y + x.mean()
    assert not same()
    for model in (off, on):
        model.tok_emb.adapter = None
    on.fused = False
    assert not same()
    with_mlp = t.GPT(replace(TINY, kernels="mlp"))
    assert not with_mlp.fused and with_mlp.blocks[0].mlp.fused and not off.blocks[0].mlp.fused
