"""A Triton kernel for the MLP of train_gpt.py, on a Hopper GPU: registers, spills, errors and milliseconds.

    python tests/nullgpu/nullgpu.py VENV/bin/python -m tools.bench.mlp   # what each tile compiles to; needs no GPU
    python -m tools.bench.mlp --time                                     # and, on a GPU, errors and milliseconds, by turns with torch

No GPU has run the kernel yet. It moves into train_gpt.py when a GPU shows that a training step is faster with it.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import train_gpt as t
from tools import command_line, run_tool
from tools.bench import bench, require_gpu

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor as DESCRIPTOR
except ImportError:  # triton is missing, or older than 3.4
    DESCRIPTOR = None

# Tiles of M x N of the product, in steps of K, with warps and stages. The kernel uses the first one: of those that fit,
# it has the most operations per byte.
TILES = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 256, 32, 8, 4), (128, 256, 128, 8, 2),
         (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (128, 256, 64, 4, 3), (64, 256, 64, 4, 3))
TILE = TILES[0]
SHARED = 232_448  # bytes of shared memory that a block of an H100 may have
ROWS = ("card", "frontier", "pr1812", "pr1127")


# ----------------------------------------
# The kernel and its operators

def mlp_kernel(a, b, pre, out, SLOPE: tl.constexpr, BACKWARD: tl.constexpr):
    """Forward: pre = a @ b.T, out = act(pre). Backward: out = (a @ b) * act'(pre). act is the square of leaky ReLU, or of
    SiLU if SLOPE is None. All are descriptors: of tiles of `a` (tokens, width) and of b, of halves of tiles of pre and out
    (tokens, hidden).
    """
    M: tl.constexpr = a.block_shape[0]
    K: tl.constexpr = a.block_shape[1]
    HALF: tl.constexpr = out.block_shape[1]  # of a tile's columns: in one piece the backward pass would spill registers
    across = tl.cdiv(out.shape[1], 2 * HALF)
    # a row of tiles at a time: the rows of `a` stay in L2; flattened: the next tile's loads begin under this one's end
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


class Launch(NamedTuple):
    """The arguments with which a kernel is launched, and the tensor that it fills."""

    grid: tuple[int]
    args: tuple[Any, ...]
    options: dict[str, int]
    out: Tensor


def prepared(a: Tensor, b: Tensor, pre: Tensor, slope: float | None, backward: bool, tile: tuple[int, ...]) -> Launch:
    """A launch with one program on each multiprocessor."""
    m, n, k, warps, stages = tile
    out, blocks = torch.empty_like(pre), ([m, k], [k, n] if backward else [n, k], [m, n // 2], [m, n // 2])
    tiles = map(DESCRIPTOR.from_tensor, (a.contiguous(), b.contiguous(), pre, out), blocks)
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count
    return Launch((programs,), (*tiles, slope, backward), dict(num_warps=warps, num_stages=stages), out)


def launch_mlp(a: Tensor, b: Tensor, pre: Tensor, slope: float | None, backward: bool = True, tile: tuple[int, ...] = ()) -> Tensor:
    """The kernel's `out` (tokens, hidden); forward it also fills `pre`."""
    launch = prepared(a, b, pre, slope, backward, tile or TILE)
    jitted()[launch.grid](*launch.args, **launch.options)
    return launch.out


def mlp_by_kernel(x: Tensor, fc: Tensor, proj: Tensor, slope: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(h @ proj.T, pre = x @ fc.T, h = act(pre)) of bf16 x (M, D), fc (F, D), proj (D, F)."""
    pre = x.new_empty(len(x), len(fc))
    h = launch_mlp(x, fc, pre, slope, backward=False)
    return h @ proj.T, pre, h


def mlp_gradients(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, fc, proj, pre, *h = ctx.saved_tensors
    dpre = torch.ops.golf.mlp_backward(dy, proj, pre, ctx.slope)
    return dpre @ fc, None if x is None else dpre.T @ x, dy.T @ h[0] if h else None, None


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what a gradient needs: `x` only where fc learns, `h` only where proj learns."""
    x, fc, proj, ctx.slope = inputs
    kept = output[1:] if proj.requires_grad else output[1:2]
    ctx.save_for_backward(x if fc.requires_grad else None, fc, proj, *kept)
    ctx.set_materialize_grads(False)


@cache
def register_operators() -> None:
    """Register the kernel with torch, with the shapes that a compiler needs. AOTAutograd caches a graph with these
    operators; it does not cache one with an autograd.Function.
    """
    schema = "(Tensor dy, Tensor proj, Tensor pre, float? slope) -> Tensor"
    backward = torch.library.custom_op("golf::mlp_backward", launch_mlp, mutates_args=(), schema=schema)
    backward.register_fake(lambda dy, proj, pre, slope: torch.empty_like(pre))
    schema = "(Tensor x, Tensor fc, Tensor proj, float? slope) -> (Tensor, Tensor, Tensor)"
    forward = torch.library.custom_op("golf::mlp", mlp_by_kernel, mutates_args=(), schema=schema)
    forward.register_fake(lambda x, fc, proj, slope: (x @ fc.T @ proj.T, x @ fc.T, x @ fc.T))
    forward.register_autograd(mlp_gradients, setup_context=save)


class KernelMLP(t.MLP):
    """train_gpt.MLP with a forward pass by the kernel, with the same parameters."""

    def __init__(self, cfg: t.Config) -> None:
        super().__init__(cfg)
        self.slope = slope_of(cfg)
        register_operators()

    def forward(self, x: Tensor, weights: t.Weights, scale: Tensor) -> Tensor:
        if self.fc.adapter is not None or self.proj.adapter is not None:  # an adapter needs each Linear's input and output
            return super().forward(x, weights, scale)
        # by algebra: proj @ (scale * h + bias) = (proj * scale) @ h + proj @ bias
        proj = weights.proj if self.scale is None else weights.proj * self.scale.type_as(x)
        y = torch.ops.golf.mlp(x.flatten(0, -2), weights.fc, proj, self.slope)[0].view_as(x)
        return y if self.bias is None else y + weights.proj @ self.bias.type_as(x)


def slope_of(cfg: t.Config) -> float | None:
    return None if cfg.activation == "silu" else cfg.mlp_negative_slope


def check(cfg: t.Config, device: torch.device) -> None:
    """Raises InputError if the kernel cannot run here."""
    hopper = device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9
    aligned = cfg.model_dim % 8 == cfg.mlp_dim % 8 == 0
    if not (DESCRIPTOR and hopper and aligned and t.compute_dtype(cfg, device) == torch.bfloat16):
        raise t.InputError("the MLP kernel needs a Hopper GPU, triton 3.4 or newer, DTYPE=bf16, and widths of the model and its "
                           "MLP that are multiples of 8")


# ----------------------------------------
# What the kernel compiles to

class Compiled(NamedTuple):
    """What ptxas says of a kernel, and how many of Hopper's instructions it has."""

    registers: int
    spilled: int  # bytes stored
    shared: int
    wgmma: int
    loads: int  # TMA
    stores: int

    @property
    def fits(self) -> bool:
        return not self.spilled and self.shared <= SHARED and self.wgmma * self.loads * self.stores > 0


def inspected(compiled: Any) -> Compiled:
    """Of a compiled kernel of Triton, by the ptxas that comes with it."""
    ptx, ptxas = compiled.asm["ptx"], Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-arch=sm_90a", "-v", source, "-o", source.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (int(re.search(rf"(\d+) {what}", said)[1]) for what in ("registers", "bytes spill stores"))
    counts = [len(re.findall(rf"^\s*(?:@\S+ )?{name}", ptx, re.M)) for name in
              ("wgmma.mma_async", r"cp.async.bulk.tensor\S*.shared::cluster.global", r"cp.async.bulk.tensor\S*.global.shared")]
    return Compiled(registers, spilled, compiled.metadata.shared, *counts)


def built(cfg: t.Config, tile: tuple[int, ...], backward: bool) -> Compiled:
    """The kernel for a row's shapes and a tile, compiled and not run."""
    tokens, dim, hidden = cfg.micro_batch_tokens, cfg.model_dim, cfg.mlp_dim
    a, b, pre = (torch.empty(shape, dtype=torch.bfloat16, device="cuda")
                 for shape in ((tokens, dim), (dim, hidden) if backward else (hidden, dim), (tokens, hidden)))
    launch = prepared(a, b, pre, slope_of(cfg), backward, tile)
    return inspected(jitted().warmup(*launch.args, grid=launch.grid, **launch.options))


# ----------------------------------------
# On a GPU

def mlps(cfg: t.Config, device: torch.device) -> dict[str, t.MLP]:
    """The row's MLP as it is and by the kernel, of the same weights, none of them zero."""
    torch.manual_seed(0)
    off, on = (kind(cfg).to(device) for kind in (t.MLP, KernelMLP))
    with torch.no_grad():
        for p in off.parameters():
            p.copy_(torch.randn_like(p) * p.size(-1) ** -0.5)
    on.load_state_dict(off.state_dict())
    return dict(off=off, on=on)


def forward(mlp: t.MLP, x: Tensor, scale: Tensor) -> Tensor:
    """Its output by weights that are made ready as the model does."""
    proj = (scale[:, None] * mlp.proj.weight).type_as(x)
    return mlp(x, t.Weights(None, None, mlp.fc.weight.type_as(x), proj, None), scale)


def outcome(mlp: t.MLP, x: Tensor, dy: Tensor, scale: Tensor) -> Tensor:
    """Output and gradients, one after the other, float64 on the CPU; leaves no gradient."""
    x, scale = (v.detach().clone().requires_grad_() for v in (x, scale))
    y = forward(mlp, x, scale)
    y.backward(dy)
    found = [v.detach().double().cpu() for v in (y, x.grad, scale.grad, *(p.grad for p in mlp.parameters()))]
    mlp.zero_grad(set_to_none=True)
    return torch.cat([v.flatten() / v.norm() for v in found])


def errors(cfg: t.Config, device: torch.device, tokens: int = 1000) -> dict[str, float]:
    """Relative errors of output and gradients, each normalized, to float64, by torch and by the kernel."""
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(1, tokens, cfg.model_dim, generator=draw).bfloat16().to(device) for _ in range(2))
    scale, both = torch.rand(cfg.model_dim, generator=draw).to(device) + 0.5, mlps(cfg, device)
    exact = outcome(mlps(cfg, device)["off"].double(), x.double(), dy.double(), scale.double())
    return {f"mlp_{name}_error": float((outcome(mlp, x, dy, scale) - exact).norm() / exact.norm()) for name, mlp in both.items()}


def in_turns(runs: dict[str, Callable[[], Any]], device: torch.device, rounds: int = 10, count: int = 5) -> dict[str, float]:
    """Median milliseconds of each, in turns, so that a GPU that slows down slows all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            times[name] += bench.step_times(run, device, count, 0 if i else 5)
    return {f"{name}_ms": statistics.median(ms) for name, ms in times.items()}


def mlp_times(cfg: t.Config, device: torch.device) -> dict[str, float]:
    """Milliseconds of a compiled MLP on a full batch, forward and backward, by torch and by the kernel."""
    shape = cfg.micro_batch_tokens // cfg.train_seq_len, cfg.train_seq_len, cfg.model_dim
    x, dy = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    scale = torch.ones(cfg.model_dim, device=device)
    x.requires_grad_()
    compiled = torch.compile(forward, dynamic=False, fullgraph=True)
    return in_turns({n: lambda mlp=mlp: compiled(mlp, x, scale).backward(dy) for n, mlp in mlps(cfg, device).items()}, device)


def compared(cfg: t.Config, device: torch.device) -> dict[str, Any]:
    """Errors and milliseconds of the row's MLP by torch and by the kernel, or the reason why the kernel cannot run."""
    try:
        check(cfg, device)
    except t.InputError as fault:
        return dict(missing=str(fault))
    return errors(cfg, device) | mlp_times(cfg, device)


def trainers(cfg: t.Config, device: torch.device) -> dict[str, t.Trainer]:
    """A trainer of the row as it is and one whose MLPs use the kernel."""
    made = {}
    for name, kind in (("off", t.MLP), ("on", KernelMLP)):
        with mock.patch.object(t, "MLP", kind):
            made[name] = bench.make_trainer(cfg, t.Ranks(device=device))[1]
    return made


def step_times(cfg: t.Config, device: torch.device, folder: Path) -> dict[str, float]:
    """Milliseconds of a whole training step on random tokens, by torch and by the kernel."""
    bench.write_tokens(folder, cfg.vocab_size)
    both = trainers(replace(cfg, data_path=str(folder)), device)
    return in_turns({name: bench.driven(trainer) for name, trainer in both.items()}, device)


def kernel_times(cfg: t.Config, tiles: list[tuple[int, ...]], device: torch.device) -> Iterator[tuple[tuple[int, ...], dict[str, float]]]:
    """Milliseconds of the kernel forward and backward with each tile."""
    tokens, dim, hidden = cfg.micro_batch_tokens, cfg.model_dim, cfg.mlp_dim
    x, fc, proj, pre = (torch.randn(shape, device=device, dtype=torch.bfloat16)
                        for shape in ((tokens, dim), (hidden, dim), (dim, hidden), (tokens, hidden)))
    for tile in tiles:
        yield tile, in_turns(dict(forward=lambda tile=tile: launch_mlp(x, fc, pre, slope_of(cfg), False, tile),
                                  backward=lambda tile=tile: launch_mlp(x, proj, pre, slope_of(cfg), True, tile)), device)


# ----------------------------------------
# Report and command line

def main(argv: list[str]) -> None:
    cli = command_line("tools.bench.mlp", __doc__)
    cli.add_argument("--row", default="card", choices=ROWS, help="default: %(default)s")
    cli.add_argument("--time", action="store_true", help="on a GPU: errors and milliseconds, too")
    args: argparse.Namespace = cli.parse_args(argv)
    require_gpu()
    with tempfile.TemporaryDirectory() as folder:
        cfg, device = bench.row_config(args.row, {}, Path(folder), 1), torch.device("cuda")
        check(cfg, device)
        fitting = []
        print("| M, N, K, warps, stages | pass | registers | bytes spilled | shared memory | wgmma, TMA loads, stores | fits |")
        print("|---|---|---:|---:|---:|---|---|")
        for tile in TILES:
            both = [built(cfg, tile, backward) for backward in (False, True)]
            for name, c in zip(("forward", "backward"), both):
                print(f"| {', '.join(map(str, tile))} | {name} | {c.registers} | {c.spilled} | {c.shared:,} "
                      f"| {c.wgmma}, {c.loads}, {c.stores} | {'yes' if c.fits else 'no'} |", flush=True)
            fitting += [tile] * all(c.fits for c in both)
        if args.time:
            print("relative errors:", errors(cfg, device))
            for tile, ms in kernel_times(cfg, fitting, device):
                print(tile, ms, flush=True)
            print("MLP, forward and backward:", mlp_times(cfg, device), flush=True)
            print("step:", step_times(cfg, device, Path(folder) / "tokens"))


if __name__ == "__main__":
    run_tool("tools.bench.mlp", main, sys.argv[1:])
