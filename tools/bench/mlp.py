"""The kernels of KERNELS=mlp and =all: what they compile to for sm_90 and, on a GPU, whether they are right and fast.

    python tests/nullgpu/nullgpu.py VENV/bin/python -m tools.bench.mlp           # registers, spills, shared memory: no GPU
    python -m tools.bench.mlp --time                                             # those that fit, timed; off and on in turns

A tile of the MLP's is M x N of the product, in steps of K; it fits with no spill and at most 227 KiB of shared memory.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as t
from tools import command_line, run_tool
from tools.bench import bench, require_gpu

# M, N, K, warps, stages
TILES = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 256, 32, 8, 4), (128, 256, 128, 8, 2),
         (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (128, 256, 64, 4, 3), (64, 256, 64, 4, 3))
SHARED = 232_448  # bytes of shared memory that a block of an H100 may have
VOCABULARIES = (1000, 1024, 8192, 16_384, 65_536)
ROWS = ("card", "frontier", "pr1812", "pr1127")


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


def tile_of(values: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(t.MLP_TILE, values))


def inspected(compiled: Any) -> Compiled:
    """Of a compiled kernel of Triton, by the ptxas that comes with it."""
    import triton

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


@contextmanager
def not_run() -> Iterator[list[Any]]:
    """What is compiled of the script's kernels where they would be launched."""
    made, jitted = [], t.jitted

    class Warmed:
        def __init__(self, kernel: Callable) -> None:
            self.kernel = jitted(kernel)

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *args, **options: made.append(self.kernel.warmup(*args, grid=grid, **options))

    with mock.patch.object(t, "jitted", Warmed):
        yield made


def built(cfg: t.Config, tile: tuple[int, ...], backward: bool) -> Compiled:
    """The MLP's kernel for a row's shapes and a tile, compiled and not run."""
    tokens, dim, hidden = cfg.micro_batch_tokens, cfg.model_dim, cfg.mlp_dim
    a, b, pre = (torch.empty(shape, dtype=torch.bfloat16, device="cuda")
                 for shape in ((tokens, dim), (dim, hidden) if backward else (hidden, dim), (tokens, hidden)))
    with not_run() as made, mock.patch.object(t, "MLP_TILE", tile_of(tile)):
        t.launch_mlp(a, b, pre, slope_of(cfg), backward)
    return inspected(made[0])


def built_loss(vocabulary: int) -> Compiled:
    """The loss's kernel for rows of so many logits, compiled and not run."""
    x, weight = (torch.empty(n, 64, dtype=torch.bfloat16, device="cuda") for n in (128, vocabulary))
    with not_run() as made:
        t.loss_by_kernel(x, weight, torch.zeros(128, dtype=torch.int64, device="cuda"), 30.0)
    return inspected(made[0])


def slope_of(cfg: t.Config) -> float | None:
    return None if cfg.activation == "silu" else cfg.mlp_negative_slope


# ----------------------------------------
# On a GPU

def mlps(cfg: t.Config, device: torch.device) -> dict[str, t.MLP]:
    """The row's MLP by the plain path and by the kernel, of the same weights, none of them zero."""
    torch.manual_seed(0)
    off, on = (t.MLP(replace(cfg, kernels=name)).to(device) for name in ("off", "mlp"))
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
    """Relative errors of output and gradients, each normalized, to float64, by the plain path and by the kernel."""
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
    """Milliseconds of a compiled MLP with the gradients of a full batch, off and on."""
    shape = cfg.micro_batch_tokens // cfg.train_seq_len, cfg.train_seq_len, cfg.model_dim
    x, dy = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    scale = torch.ones(cfg.model_dim, device=device)
    x.requires_grad_()
    compiled = torch.compile(forward, dynamic=False, fullgraph=True)
    return in_turns({n: lambda mlp=mlp: compiled(mlp, x, scale).backward(dy) for n, mlp in mlps(cfg, device).items()}, device)


def losses(fused: bool, cap: float, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As GPT.forward has them of its final states, by the plain path or by the kernel."""
    if fused:
        return torch.ops.golf.loss(x, weight.type_as(x), targets, cap)[0]
    raw = (x @ weight.type_as(x).T).float() if x.dtype == torch.bfloat16 else x @ weight.type_as(x).T
    return F.cross_entropy(cap * torch.tanh(raw / cap), targets, reduction="none")


def loss_inputs(cfg: t.Config, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Final states, an embedding with which logits come near their cap, targets."""
    t.register_operators()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, cfg.model_dim, generator=draw).bfloat16().to(device).requires_grad_()
    weight = (torch.randn(cfg.vocab_size, cfg.model_dim, generator=draw) * 10 * cfg.model_dim**-0.5).to(device).requires_grad_()
    return x, weight, torch.randint(cfg.vocab_size, (tokens,), generator=draw).to(device)


def loss_errors(cfg: t.Config, device: torch.device, tokens: int = 1000) -> dict[str, float]:
    """The largest relative error to float64 of the losses and of both gradients, by the plain path and by the kernel."""
    x, weight, targets = loss_inputs(cfg, tokens, device)
    g = torch.rand(tokens, generator=torch.Generator().manual_seed(1)).to(device)

    def outcome(fused: bool, *leaves: Tensor) -> list[Tensor]:
        y = losses(fused, cfg.logit_softcap, *leaves, targets)
        return [v.detach().double().cpu() for v in (y, *torch.autograd.grad(y, leaves, g.to(y.dtype)))]

    exact = outcome(False, *(v.detach().double().requires_grad_() for v in (x, weight)))
    return {f"loss_{name}_error": max(float((a - b).norm() / b.norm()) for a, b in zip(outcome(fused, x, weight), exact))
            for name, fused in (("off", False), ("on", True))}


def loss_times(cfg: t.Config, device: torch.device) -> dict[str, float]:
    """Milliseconds of a compiled mean loss of a full batch with its gradients, off and on."""
    inputs = loss_inputs(cfg, cfg.micro_batch_tokens, device)
    compiled = torch.compile(losses, dynamic=False, fullgraph=True)
    return in_turns({name: lambda fused=fused: compiled(fused, cfg.logit_softcap, *inputs).mean().backward()
                     for name, fused in (("off", False), ("on", True))}, device)


def compared(cfg: t.Config, device: torch.device) -> dict[str, dict[str, Any]]:
    """Errors and milliseconds of the row's MLP and of its loss, off and on; or why they cannot be on."""
    try:
        t.check_kernels(replace(cfg, kernels="all"), t.Ranks(device=device))
    except t.InputError as fault:
        return dict(mlp=dict(missing=str(fault)))
    return dict(mlp=errors(cfg, device) | mlp_times(cfg, device), loss=loss_errors(cfg, device) | loss_times(cfg, device))


def step_times(cfg: t.Config, device: torch.device, folder: Path) -> dict[str, float]:
    """Milliseconds of a whole training step on random tokens with each choice of KERNELS."""
    bench.write_tokens(folder, cfg.vocab_size)
    cfg, names = replace(cfg, data_path=str(folder)), ("off", "mlp", "all")
    trainers = [bench.make_trainer(replace(cfg, kernels=name), t.Ranks(device=device))[1] for name in names]
    return in_turns(dict(zip(names, map(bench.driven, trainers))), device)


def kernel_times(cfg: t.Config, tiles: list[tuple[int, ...]], device: torch.device) -> Iterator[tuple[tuple[int, ...], dict[str, float]]]:
    """Milliseconds of the kernel forward and backward with each tile."""
    tokens, dim, hidden = cfg.micro_batch_tokens, cfg.model_dim, cfg.mlp_dim
    x, fc, proj, pre = (torch.randn(shape, device=device, dtype=torch.bfloat16)
                        for shape in ((tokens, dim), (hidden, dim), (dim, hidden), (tokens, hidden)))
    for tile in tiles:
        with mock.patch.object(t, "MLP_TILE", tile_of(tile)):
            yield tile, in_turns(dict(forward=lambda: t.launch_mlp(x, fc, pre, slope_of(cfg), False),
                                      backward=lambda: t.launch_mlp(x, proj, pre, slope_of(cfg))), device)


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
        t.check_kernels(replace(cfg, kernels="all"), t.Ranks(device=device))
        fitting = []
        print("| M, N, K, warps, stages | pass | registers | bytes spilled | shared memory | wgmma, TMA loads, stores | fits |")
        print("|---|---|---:|---:|---:|---|---|")
        for tile in TILES:
            both = [built(cfg, tile, backward) for backward in (False, True)]
            for name, c in zip(("forward", "backward"), both):
                print(f"| {', '.join(map(str, tile))} | {name} | {c.registers} | {c.spilled} | {c.shared:,} "
                      f"| {c.wgmma}, {c.loads}, {c.stores} | {'yes' if c.fits else 'no'} |", flush=True)
            fitting += [tile] * all(c.fits for c in both)
        for vocabulary in VOCABULARIES:
            c = built_loss(vocabulary)
            print(f"loss of {vocabulary} logits: {c.registers} registers, {c.spilled} bytes spilled, {c.shared} of shared memory", flush=True)
        if args.time:
            print(errors(cfg, device), loss_errors(cfg, device))
            for tile, ms in kernel_times(cfg, fitting, device):
                print(tile, ms, flush=True)
            print("MLP, forward and backward:", mlp_times(cfg, device), flush=True)
            print("loss, forward and backward:", loss_times(cfg, device), flush=True)
            print("step:", step_times(cfg, device, Path(folder) / "tokens"))


if __name__ == "__main__":
    run_tool("tools.bench.mlp", main, sys.argv[1:])
