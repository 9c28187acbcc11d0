"""Tests of the kernel of tools/bench/mlp.py in Triton's interpreter, which runs kernels on a CPU.

tests/test_kernels.py starts this file in a process of its own with TRITON_INTERPRET=1, which Triton reads once.
It needs triton, which `make test-cuda` installs.
"""

import dataclasses
import types
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import train_gpt as t
from tools.bench import mlp

SLOPES = [0.0, 0.5, 1.0, None]  # None is SiLU
TILE = (32, 64, 32, 4, 3)  # as in mlp.TILES
BF16, FP32 = torch.bfloat16, torch.float32


def number(self):
    """Replaces a conversion that NumPy 2.4 refuses: of an array with one element to an int."""
    return self.handle.data.item()


def wide(x):
    """Converts bf16 to fp32: Triton 3.5.1 stores bf16 as integers and multiplies these."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def cast(self, x, dtype, before=interpreter.InterpreterBuilder.cast_impl):
    """Rounds to the nearest bf16, as a GPU does; Triton 3.5.1 truncates."""
    if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
    return before(self, wide(x), dtype)


def dot(self, a, b, *rest, before=interpreter.InterpreterBuilder.create_dot):
    return before(self, wide(a), wide(b), *rest)


def patched(tensor, *scope, before=interpreter._patch_lang_tensor):
    before(tensor, *scope)
    tensor.__index__ = number


def multiprocessors(count):
    return types.SimpleNamespace(multi_processor_count=count)


@pytest.fixture(autouse=True, scope="module")
def repaired():
    """An interpreter with correct bf16 arithmetic, and a device with three multiprocessors."""
    with pytest.MonkeyPatch.context() as patch:
        builder = interpreter.InterpreterBuilder
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        patch.setattr(builder, "cast_impl", cast)
        patch.setattr(builder, "create_fp_ext", cast)
        patch.setattr(builder, "create_fp_trunc", cast)
        patch.setattr(builder, "create_dot", dot)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: multiprocessors(3))
        patch.setattr(mlp, "TILE", TILE)
        mlp.register_operators()
        yield patch


def activation(z, slope):
    return (F.silu(z) if slope is None else F.leaky_relu(z, slope)).square()


def exact(x, fc, proj, slope):
    return activation(x @ fc.T, slope) @ proj.T


def drawn(m, d, f, dtype, seed=0):
    """x, fc, proj and the gradient of y; y is of the order of 1."""
    draw = torch.Generator().manual_seed(seed)
    sizes = ((m, d), 1), ((f, d), d**-0.5), ((d, f), f**-0.5), ((m, d), 1)
    return [(torch.randn(shape, generator=draw) * spread).to(dtype) for shape, spread in sizes]


def outcome(forward, x, fc, proj, dy, slope):
    """y and the gradients of x, fc and proj."""
    leaves = [v.detach().clone().requires_grad_() for v in (x, fc, proj)]
    y = forward(*leaves, slope)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def by_kernel(*args):
    return torch.ops.golf.mlp(*args)[0]


def errors(found, right):
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, right)]


def against_float64(m, d, f, slope, dtype, seed=0):
    tensors = drawn(m, d, f, dtype, seed)
    return max(errors(outcome(by_kernel, *tensors, slope), outcome(exact, *(v.double() for v in tensors), slope)))


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("m, d, f", [(1, 16, 16), (32, 32, 64), (33, 48, 80), (97, 80, 176)])
def test_outputs_and_gradients_are_those_of_float64(slope, m, d, f):
    """Whole and partial tiles in each direction; more tiles than programs, and fewer."""
    assert against_float64(m, d, f, slope, FP32) < 3e-6
    assert against_float64(m, d, f, slope, BF16) < 8e-3


@pytest.mark.parametrize("slope", [0.5, None])
def test_the_tile_that_a_gpu_uses(slope, repaired):
    """Widths that do not fill the tile."""
    with repaired.context() as patch:
        patch.setattr(mlp, "TILE", mlp.TILES[0])
        assert against_float64(130, 144, 400, slope, BF16) < 8e-3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 9), st.none() | st.floats(0, 1, width=32))
def test_any_shape_and_slope(m, d, f, slope):
    assert against_float64(m, 16 * d, 16 * f, slope, FP32, seed=m) < 1e-5


@pytest.mark.parametrize("slope", SLOPES)
def test_each_result_is_rounded_once(slope):
    """act and its derivative are computed in fp32 from the rounded pre: only the sum over K may differ."""
    x, fc, proj, dy = drawn(40, 48, 80, BF16)
    y, pre, h = torch.ops.golf.mlp(x, fc, proj, slope)
    assert float((pre != (x.float() @ fc.float().T).to(BF16)).float().mean()) < 0.01
    z = pre.float().requires_grad_()
    right = activation(z, slope)
    assert float((h != right.to(BF16)).float().mean()) <= (0.02 if slope is None else 0)
    assert torch.equal(y, h @ proj.T)
    (right,) = torch.autograd.grad(right, z, dy.float() @ proj.float())
    assert float((torch.ops.golf.mlp_backward(dy, proj, pre, slope) != right.to(BF16)).float().mean()) < 0.02


@pytest.mark.parametrize("programs", [1, 2, 100])
def test_any_number_of_multiprocessors_gives_the_same(programs, repaired):
    x, fc, proj, dy = drawn(97, 48, 176, BF16)
    before = outcome(by_kernel, x, fc, proj, dy, 0.5)
    with repaired.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: multiprocessors(programs))
        assert all(map(torch.equal, before, outcome(by_kernel, x, fc, proj, dy, 0.5)))


def test_tensors_of_any_strides():
    x, fc, proj, dy = drawn(33, 48, 80, FP32)
    turned = [v.T.contiguous().T for v in (x, fc, proj)]
    found = outcome(by_kernel, *turned, torch.ones(()).expand(33, 48), 0.5)
    assert max(errors(found, outcome(exact, *(v.double() for v in (x, fc, proj, torch.ones_like(dy))), 0.5))) < 3e-6


def products(run):
    """The number of matrix products that torch makes, besides the kernel's."""

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts.append(func is torch.ops.aten.mm.default)
            return func(*args, **(kwargs or {}))

    counts = []
    with Counter():
        run()
    return sum(counts)


def test_of_frozen_weights_nothing_is_kept_or_computed():
    """With a LoRA only x needs a gradient: it stays the same, and each frozen weight saves a product."""
    x, fc, proj, dy = drawn(40, 48, 80, BF16)
    found = {}
    for frozen in ("", "fc", "proj", "both"):
        learns = dict(x=True, fc=frozen in ("", "proj"), proj=frozen in ("", "fc"))
        leaves = [v.clone().requires_grad_(on) for v, on in zip((x, fc, proj), learns.values())]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, kept=kept: kept.append(v.shape) or v, lambda v: v):
            y, *_ = torch.ops.golf.mlp(*leaves, 0.5)
        count = products(lambda y=y: y.backward(dy))
        found[frozen] = leaves[0].grad, count, sorted(map(tuple, kept))
    assert [count for _, count, _ in found.values()] == [3, 2, 2, 1]  # beside the kernel's own
    assert all(torch.equal(grad, found[""][0]) for grad, *_ in found.values())
    always, more = [(48, 80), (80, 48), (40, 80)], ([(40, 48), (40, 80)], [(40, 80)], [(40, 48)], [])
    assert [kept for *_, kept in found.values()] == [sorted(always + shapes) for shapes in more]  # weights and pre


@pytest.mark.parametrize("slope", [0.5, None])
def test_the_operators_are_what_they_say(slope):
    """torch's own check of the schema, the fake implementation and the gradients under a compiler."""
    x, fc, proj, dy = drawn(16, 16, 32, FP32)
    for inputs in ((x, fc, proj), [v.T.contiguous().T for v in (x, fc, proj)]):
        torch.library.opcheck(torch.ops.golf.mlp.default, (*(v.requires_grad_() for v in inputs), slope))
    torch.library.opcheck(torch.ops.golf.mlp_backward.default, (dy, proj.detach(), torch.randn(16, 32), slope))


@pytest.mark.parametrize(
    "changes", [{}, dict(mlp_negative_slope=0.0), dict(activation="silu"), dict(mlp_affine=True)], ids=str
)
def test_an_mlp_with_it_is_as_near_to_float64_as_without(changes):
    cfg = dataclasses.replace(t.Config(model_dim=48, num_heads=4, rope_dims=0, mlp_mult=80 / 48), **changes)
    off, on = t.MLP(cfg), mlp.KernelMLP(cfg)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in off.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * p.size(-1) ** -0.5 + (p.ndim == 1))
    on.load_state_dict(off.state_dict())
    x, dy = (torch.randn(2, 25, 48, generator=draw).to(BF16) for _ in range(2))
    scale = 0.5 + torch.rand(48, generator=draw)

    plain, fused = (mlp.outcome(module, x, dy, scale) for module in (off, on))
    assert [(v.shape, v.dtype) for v in fused] == [(v.shape, v.dtype) for v in plain]
    right = mlp.outcome(off.double(), x.double(), dy.double(), scale.double())
    assert not all(map(torch.equal, plain, fused))  # it did run
    for mine, reference in zip(errors(fused, right), errors(plain, right)):
        assert mine < 1.2 * reference + 1e-3 and mine < 1e-2


SIZES = dict(vocab_size=24, model_dim=32, num_heads=2, num_kv_heads=1, num_layers=2, xsa_last_n=1, rope_dims=8)
OTHERS = dict(ve_layers=(), bigram_vocab_size=0, mlp_mult=2.0, train_seq_len=128, eval_stride=64)
TINY = t.Config(**SIZES, **OTHERS, logit_softcap=5.0)


def gpts(dtype=BF16):
    """A small model by torch and one whose MLPs use the kernel, with equal weights, none of them zero."""
    models = []
    for kind in (t.MLP, mlp.KernelMLP):
        with mock.patch.object(t, "MLP", kind):
            models.append(t.GPT(TINY, dtype=dtype))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in models[0].parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * (p.size(-1) ** -0.5 if p.ndim > 1 else 0.1) + (p.ndim == 1))
        models[0].tok_emb.weight.mul_(5)  # so that logits reach their cap
    models[1].load_state_dict(models[0].state_dict())
    return models


def drawn_ids(rows=3):
    ids = torch.randint(TINY.vocab_size, (rows, 17), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1], ids[:, 1:]


def test_a_model_with_the_kernel_is_as_near_to_float64_as_without():
    (off, on), (exact, _) = gpts(), gpts(torch.float64)
    g = torch.rand(3, 16, generator=torch.Generator().manual_seed(4)) / 48

    def found(model):
        losses = model(*drawn_ids())
        assert losses.shape == (3, 16) and losses.dtype == FP32
        return [losses.detach(), *torch.autograd.grad(losses, [*model.parameters()], g)]

    plain, fused, right = found(off), found(on), found(exact.double())
    assert not all(map(torch.equal, plain, fused))  # it did run
    pairs = [*zip(errors(fused, right), errors(plain, right))]
    assert all(
        mine < 1.2 * reference + 1e-2 for mine, reference in pairs
    )  # a gain of two heads has no more than two numbers
    assert np.mean([mine / reference for mine, reference in pairs]) < 1.05
