"""The kernel of tools/bench/mlp.py: its numbers in Triton's interpreter, where triton is; what it needs; when it is not used."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

import train_gpt as t
from tools.bench import mlp

SMALL = dict(model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=0)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton: the environment of `make test-cuda` has it")
def test_its_numbers_hold_in_an_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/helpers/interpreted.py"]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_tool_ends_at_once_in_one_line():
    done = subprocess.run([sys.executable, "-m", "tools.bench.mlp"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("tools.bench.mlp: torch sees no GPU")


@pytest.mark.parametrize("capability, triton, changes", [
    ((9, 0), True, {}), ((8, 0), True, {}), ((10, 0), True, {}), ((9, 0), None, {}), ((9, 0), True, dict(dtype="fp32")),
    ((9, 0), True, dict(mlp_mult=3.2)), ((9, 0), True, dict(model_dim=508, num_heads=2, num_kv_heads=1, mlp_mult=8.0)),
], ids=str)
def test_each_thing_that_it_needs(capability, triton, changes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(mlp, "DESCRIPTOR", triton)
    cfg, device = replace(t.Config(), **changes), torch.device("cuda")
    if (capability, triton, changes) == ((9, 0), True, {}):
        return mlp.check(cfg, device)
    with pytest.raises(t.InputError, match="^the MLP kernel needs"):
        mlp.check(cfg, device)
    assert mlp.compared(cfg, device).keys() == {"missing"}


@pytest.mark.parametrize("adapted", ["fc", "proj"])
def test_what_rides_on_a_product_sees_it(adapted, monkeypatch):
    """With an adapter or an observer the MLP runs by torch, so that they get the input and output of the Linear."""
    cfg = t.Config(**SMALL)
    off, on = t.MLP(cfg), mlp.KernelMLP(cfg)
    monkeypatch.setattr(torch.ops.golf, "mlp", None)
    for p in off.parameters():
        torch.nn.init.normal_(p)
    on.load_state_dict(off.state_dict())
    for module in (off, on):
        getattr(module, adapted).adapter = lambda x, y: y + x.mean()
    x, scale = torch.randn(2, 3, 16), torch.rand(16)
    weights = t.Weights(None, None, off.fc.weight, scale[:, None] * off.proj.weight, None)
    assert torch.equal(on(x, weights, scale), off(x, weights, scale))
    getattr(on, adapted).adapter = None
    with pytest.raises(TypeError):
        on(x, weights, scale)


def test_the_timed_trainers_differ_in_their_mlps_alone(tmp_path):
    """Of the same weights, one by torch and one by the kernel; the script's own MLP is back afterwards."""
    plain = t.MLP
    mlp.bench.write_tokens(tmp_path / "tokens", 1024)
    cfg = t.Config(data_path=str(tmp_path / "tokens"), num_layers=2, xsa_last_n=1, ve_layers="", bigram_vocab_size=0, compile="off", dtype="fp32",
                   train_batch_tokens=2048, mlp_mult=2.0, **SMALL)
    models = {name: trainer.model for name, trainer in mlp.trainers(cfg, torch.device("cpu")).items()}
    assert {name: {type(block.mlp) for block in model.blocks} for name, model in models.items()} == {"off": {plain}, "on": {mlp.KernelMLP}}
    weights = [dict(model.state_dict()) for model in models.values()]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(v, weights[1][name]) for name, v in weights[0].items())
    assert t.MLP is plain
