"""tools.bench.mlp: the kernel in Triton's interpreter, if triton is installed; what it needs; when it is not used."""

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


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton, which `make test-cuda` installs")
def test_its_numbers_hold_in_an_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "tests/helpers/interpreted.py",
    ]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_tool_ends_at_once_in_one_line():
    done = subprocess.run([sys.executable, "-m", "tools.bench.mlp"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("tools.bench.mlp: torch sees no GPU")


@pytest.mark.parametrize(
    "capability, triton, changes",
    [
        ((9, 0), True, {}),
        ((8, 0), True, {}),
        ((10, 0), True, {}),
        ((9, 0), None, {}),
        ((9, 0), True, dict(dtype="fp32")),
        ((9, 0), True, dict(mlp_mult=3.2)),
        ((9, 0), True, dict(model_dim=508, num_heads=2, num_kv_heads=1, mlp_mult=8.0)),
    ],
    ids=str,
)
def test_each_thing_that_it_needs(capability, triton, changes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
    monkeypatch.setattr(mlp, "DESCRIPTOR", triton)
    cfg, device = replace(t.Config(), **changes), torch.device("cuda")
    if (capability, triton, changes) == ((9, 0), True, {}):
        return mlp.check(cfg, device)
    with pytest.raises(t.InputError, match="^the MLP kernel needs"):
        mlp.check(cfg, device)
    assert mlp.compared(cfg, device).keys() == {"missing"}


@pytest.mark.parametrize("adapted", ["fc", "proj"])
def test_an_adapter_gets_the_input_and_output_of_its_linear(adapted, monkeypatch):
    """With an adapter the MLP runs by torch; without one it runs the kernel, which is missing here."""
    both = mlp.mlps(t.Config(**SMALL), torch.device("cpu"))
    monkeypatch.setattr(torch.ops.golf, "mlp", None)
    for module in both.values():
        getattr(module, adapted).output_hook = lambda x, y: y + x.mean()
    x, scale = torch.randn(2, 3, 16), torch.rand(16)
    assert torch.equal(mlp.run_mlp(both["on"], x, scale), mlp.run_mlp(both["off"], x, scale))
    getattr(both["on"], adapted).output_hook = None
    with pytest.raises(TypeError):
        mlp.run_mlp(both["on"], x, scale)


def by_torch(x, fc, proj, slope):
    """The operator of the kernel, computed by torch."""
    pre = x @ fc.T
    h = torch.nn.functional.leaky_relu(pre, slope).square()
    return h @ proj.T, pre, h


@pytest.mark.parametrize("factor, slope", [(1.0, None), (1.05, None), (1.0, 0.4)])
def test_errors_are_relative_to_float64_and_a_wrong_kernel_shows(factor, slope, monkeypatch):
    """Wrong is a factor of all results, or the slope of the leaky ReLU."""
    mlp.register_operators()

    def operator(x, fc, proj, right):
        y, pre, h = by_torch(x, fc, proj, slope or right)
        return factor * y, pre, h

    monkeypatch.setattr(torch.ops.golf, "mlp", operator)
    found = mlp.errors(t.Config(**SMALL), torch.device("cpu"), tokens=64)
    assert 1e-4 < found["mlp_off_error"] < 1e-2
    assert (found["mlp_on_error"] < 1e-2) == ((factor, slope) == (1.0, None))


def test_the_timed_trainers_differ_only_in_their_mlps(tmp_path):
    """They have equal weights, and the script's own MLP is restored afterwards."""
    plain, sizes = t.MLP, dict(num_layers=2, xsa_last_n=1, ve_layers="", bigram_vocab_size=0, mlp_mult=2.0)
    cfg = t.Config(compile="off", dtype="fp32", train_batch_tokens=2048, **sizes, **SMALL)
    made = mlp.trainers(mlp.bench.with_tokens(cfg, tmp_path), torch.device("cpu"))
    kinds = {name: {type(block.mlp) for block in trainer.model.blocks} for name, trainer in made.items()}
    assert kinds == {"off": {plain}, "on": {mlp.KernelMLP}} and t.MLP is plain
    off, on = (trainer.model.state_dict() for trainer in made.values())
    assert off.keys() == on.keys() and all(torch.equal(weight, on[name]) for name, weight in off.items())
