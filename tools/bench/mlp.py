"""A Triton kernel for the MLP of train_gpt.py on Hopper GPUs: what it compiles to, its errors and its speed.

    python tests/nullgpu/nullgpu.py VENV/bin/python -m tools.bench.mlp  # registers, spills, shared memory without a GPU
    python -m tools.bench.mlp --time                                    # also errors and milliseconds, on a Hopper GPU

The kernel is not part of train_gpt.py until a GPU shows that a training step is faster with it; none has run it yet.
"""

from __future__ import annotations

import copy
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import train_gpt as t
from tools import command_line, dict_table, run_tool
from tools.bench import bench, require_gpu

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor as DESCRIPTOR
except ImportError:  # no triton, or one older than 3.4
    DESCRIPTOR = None

# Tiles M x N of the product, in steps of K, with warps and pipeline stages. The kernel uses the first: of those that
# fit, it has the most operations per byte.
TILES = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 256, 32, 8, 4), (128, 256, 128, 8, 2),
         (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (128, 256, 64, 4, 3), (64, 256, 64, 4, 3))
TILE = TILES[0]
SHARED = 232_448  # bytes of shared memory per block on an H100


def mlp_kernel(a, b, pre, out, SLOPE: tl.constexpr, BACKWARD: tl.constexpr):
    """Forward: pre = a @ b.T, out = act(pre). Backward: out = (a @ b) * act'(pre). act: squared leaky ReLU, or SiLU if
    SLOPE is None. Tensor descriptors: tiles of a (tokens, width) and b, half tiles of pre and out (tokens, hidden).
    """
    M: tl.constexpr = a.block_shape[0]
    K: tl.constexpr = a.block_shape[1]
    HALF: tl.constexpr = out.block_shape[1]  # the epilogue works on half a tile: a whole one spills registers backward
    across = tl.cdiv(out.shape[1], 2 * HALF)
    # row by row, so that `a` stays in L2; flatten: loads of the next tile overlap with the end of this one
    for tile in tl.range(tl.program_id(0), tl.cdiv(a.shape[0], M) * across, tl.num_programs(0), flatten=True):
        m, n = tile // across * M, tile % across * (2 * HALF)
        acc = tl.zeros((M, 2 * HALF), tl.float32)
        for k in range(0, a.shape[1], K):
            acc = tl.dot(a.load([m, k]), b.load([k, n]) if BACKWARD else b.load([n, k]).T, acc)
        halves = acc.reshape(M, 2, HALF).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            at = [m, n + i * HALF]
            if BACKWARD:
                z = pre.load(at)
            else:
                z = halves[i].to(out.dtype)
                pre.store(at, z)
            z = z.to(tl.float32)
            if SLOPE is None:
                gate = tl.sigmoid(z)
                slope = gate + z * gate * (1 - gate)
            else:
                gate = tl.where(z > 0, 1.0, SLOPE)
                slope = gate
            h = z * gate
            out.store(at, (halves[i] * 2 * h * slope if BACKWARD else h * h).to(out.dtype))


@cache
def jitted() -> Any:
    return triton.jit(mlp_kernel)


def prepared(a: Tensor, b: Tensor, pre: Tensor, slope: float | None, backward: bool, tile: tuple[int, ...]) -> tuple:
    """Returns (grid, arguments, options, the tensor that is filled) of a persistent launch, one program per SM."""
    m, n, k, warps, stages = tile
    out, blocks = torch.empty_like(pre), ([m, k], [k, n] if backward else [n, k], [m, n // 2], [m, n // 2])
    tiles = map(DESCRIPTOR.from_tensor, (a.contiguous(), b.contiguous(), pre, out), blocks)
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count
    return (programs,), (*tiles, slope, backward), dict(num_warps=warps, num_stages=stages), out


def launch_mlp(a: Tensor, b: Tensor, pre: Tensor, slope: float | None, backward: bool = True) -> Tensor:
    """Returns the kernel's `out` (tokens, hidden); the forward pass also fills `pre`."""
    grid, args, options, out = prepared(a, b, pre, slope, backward, TILE)
    jitted()[grid](*args, **options)
    return out


def mlp_forward(x: Tensor, fc: Tensor, proj: Tensor, slope: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (h @ proj.T, pre = x @ fc.T, h = act(pre)) for bf16 x (M, D), fc (F, D), proj (D, F)."""
    pre = x.new_empty(len(x), len(fc))
    h = launch_mlp(x, fc, pre, slope, backward=False)
    return h @ proj.T, pre, h


def mlp_backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, fc, proj, pre, *h = ctx.saved_tensors
    dpre = torch.ops.golf.mlp_backward(dy, proj, pre, ctx.slope)
    return dpre @ fc, None if x is None else dpre.T @ x, dy.T @ h[0] if h else None, None


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Saves `x` only if fc needs a gradient, `h` only if proj does."""
    x, fc, proj, ctx.slope = inputs
    kept = output[1:] if proj.requires_grad else output[1:2]
    ctx.save_for_backward(x if fc.requires_grad else None, fc, proj, *kept)
    ctx.set_materialize_grads(False)


@cache
def register_operators() -> None:
    """Registers the kernel as custom operators: AOTAutograd caches their graphs, but none with an autograd.Function."""
    schema = "(Tensor dy, Tensor proj, Tensor pre, float? slope) -> Tensor"
    backward = torch.library.custom_op("golf::mlp_backward", launch_mlp, mutates_args=(), schema=schema)
    backward.register_fake(lambda dy, proj, pre, slope: torch.empty_like(pre))
    schema = "(Tensor x, Tensor fc, Tensor proj, float? slope) -> (Tensor, Tensor, Tensor)"
    forward = torch.library.custom_op("golf::mlp", mlp_forward, mutates_args=(), schema=schema)
    forward.register_fake(lambda x, fc, proj, slope: (x @ fc.T @ proj.T, x @ fc.T, x @ fc.T))
    forward.register_autograd(mlp_backward, setup_context=save)


class KernelMLP(t.MLP):
    """train_gpt.MLP with its forward pass by the kernel."""

    def __init__(self, cfg: t.Config) -> None:
        super().__init__(cfg)
        self.slope = slope_of(cfg)
        register_operators()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """x (B, T, D); scale (D,) of the output."""
        if self.fc.output_hook is not None or self.proj.output_hook is not None:  # a hook needs the input of its Linear
            return super().forward(x, scale)
        plain = (scale[:, None] * self.proj.weight).type_as(x)
        # proj @ (scale * h + bias) = (proj * scale) @ h + proj @ bias
        proj = plain if self.scale is None else plain * self.scale.type_as(x)
        y = torch.ops.golf.mlp(x.flatten(0, -2), self.fc.weight.type_as(x), proj, self.slope)[0].view_as(x)
        return y if self.bias is None else y + plain @ self.bias.type_as(x)


def run_mlp(module: t.MLP, x: Tensor, scale: Tensor) -> Tensor:
    return module(x, scale)


def slope_of(cfg: t.Config) -> float | None:
    return None if cfg.activation == "silu" else cfg.mlp_negative_slope


def check(cfg: t.Config, device: torch.device) -> None:
    """Raises InputError if the kernel cannot run."""
    hopper = device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9
    aligned = cfg.model_dim % 8 == cfg.mlp_dim % 8 == 0
    if not (DESCRIPTOR and hopper and aligned and t.compute_dtype(cfg, device) == torch.bfloat16):
        raise t.InputError("the MLP kernel needs a Hopper GPU, triton 3.4, DTYPE=bf16 and widths divisible by 8")


def built(cfg: t.Config, tile: tuple[int, ...], backward: bool) -> dict[str, Any]:
    """Compiles the kernel for a row's shapes without running it, and returns what ptxas reports."""
    tokens, dim, hidden = cfg.micro_batch_tokens, cfg.model_dim, cfg.mlp_dim
    shapes = (tokens, dim), (dim, hidden) if backward else (hidden, dim), (tokens, hidden)
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    grid, args, options, _ = prepared(*tensors, slope_of(cfg), backward, tile)
    kernel = jitted().warmup(*args, grid=grid, **options)
    ptx, ptxas = kernel.asm["ptx"], Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder) / "kernel.ptx").write_text(ptx)
        command = [ptxas, "-arch=sm_90a", "-v", source, "-o", source.with_suffix(".cubin")]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (int(re.search(rf"(\d+) {what}", output)[1]) for what in ("registers", "bytes spill stores"))
    tma = r"cp.async.bulk.tensor\S*."
    patterns = dict(wgmma="wgmma.mma_async", loads=f"{tma}shared::cluster.global", stores=f"{tma}global.shared")
    found = {name: len(re.findall(rf"^\s*(?:@\S+ )?{pattern}", ptx, re.M)) for name, pattern in patterns.items()}
    fits = not spilled and kernel.metadata.shared <= SHARED and all(found.values())
    found |= dict(tile=", ".join(map(str, tile)), direction="backward" if backward else "forward", fits=fits)
    return found | dict(registers=registers, spilled_bytes=spilled, shared_bytes=kernel.metadata.shared)


def mlps(cfg: t.Config, device: torch.device) -> dict[str, t.MLP]:
    """Returns the MLP by torch and by the kernel, with equal weights, none of them zero."""
    torch.manual_seed(0)
    off, on = (kind(cfg).to(device) for kind in (t.MLP, KernelMLP))
    with torch.no_grad():
        for p in off.parameters():
            p.copy_(torch.randn_like(p) * p.size(-1) ** -0.5)
    on.load_state_dict(off.state_dict())
    return dict(off=off, on=on)


def outcome(module: t.MLP, x: Tensor, dy: Tensor, scale: Tensor) -> list[Tensor]:
    x, scale = (v.detach().clone().requires_grad_() for v in (x, scale))
    y = run_mlp(module, x, scale)
    return [y.detach(), *torch.autograd.grad(y, [x, scale, *module.parameters()], dy)]


def errors(cfg: t.Config, device: torch.device, tokens: int = 1000) -> dict[str, float]:
    """Returns the largest relative error of output and gradients to float64, by torch and by the kernel."""
    generator, both = torch.Generator().manual_seed(0), mlps(cfg, device)
    x, dy = (torch.randn(1, tokens, cfg.model_dim, generator=generator).bfloat16().to(device) for _ in range(2))
    scale = torch.rand(cfg.model_dim, generator=generator).to(device) + 0.5
    exact = outcome(copy.deepcopy(both["off"]).double(), x.double(), dy.double(), scale.double())
    found = {f"mlp_{name}_error": outcome(module, x, dy, scale) for name, module in both.items()}
    return {name: max(float((a - b).norm() / b.norm()) for a, b in zip(vs, exact)) for name, vs in found.items()}


def medians(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    return {f"{name}_ms": statistics.median(ms) for name, ms in bench.in_turns(runs, device, 10, count=5).items()}


def compared(cfg: t.Config, device: torch.device) -> dict[str, Any]:
    """Returns errors and milliseconds of a compiled MLP by torch and by the kernel, or why the kernel cannot run."""
    try:
        check(cfg, device)
    except t.InputError as error:
        return dict(missing=str(error))
    shape = cfg.micro_batch_tokens // cfg.train_seq_len, cfg.train_seq_len, cfg.model_dim
    x, dy = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    scale, run = torch.ones(cfg.model_dim, device=device), torch.compile(run_mlp, dynamic=False, fullgraph=True)
    x.requires_grad_()
    runs = {n: lambda module=module: run(module, x, scale).backward(dy) for n, module in mlps(cfg, device).items()}
    return errors(cfg, device) | medians(runs, device)


def trainers(cfg: t.Config, device: torch.device) -> dict[str, t.Trainer]:
    """Returns a trainer as train_gpt.py makes it, and one whose MLPs use the kernel."""
    made = {}
    for name, kind in (("off", t.MLP), ("on", KernelMLP)):
        with mock.patch.object(t, "MLP", kind):
            made[name] = bench.make_trainer(cfg, t.Ranks(device=device))
    return made


def main(argv: list[str]) -> None:
    cli = command_line("tools.bench.mlp", __doc__)
    cli.add_argument("--time", action="store_true", help="also measure errors and milliseconds")
    args = cli.parse_args(argv)
    require_gpu()
    with tempfile.TemporaryDirectory() as folder:
        cfg, device = bench.row_config("card", {}, Path(folder)), torch.device("cuda")
        check(cfg, device)
        rows = [built(cfg, tile, backward) for tile in TILES for backward in (False, True)]
        print(dict_table(rows, "tile direction registers spilled_bytes:, shared_bytes:, wgmma loads stores fits"))
        if args.time:
            print("MLP, forward and backward:", compared(cfg, device), flush=True)
            steps = {name: bench.driven(trainer) for name, trainer in trainers(cfg, device).items()}
            print("training step:", medians(steps, device))


if __name__ == "__main__":
    run_tool("tools.bench.mlp", main, sys.argv[1:])
