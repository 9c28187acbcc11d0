"""Whether train_gpt.py is right and fast on this GPU, in minutes: `make check-gpu`, or

    python -m tools.bench.check_gpu [--rows card,pr1812] [--output check_gpu.json] [--workers 4]

For each row of the variant table: loss and gradients of a small model against the CPU in fp32, and of the compiled full
batch against the same graph uncompiled; milliseconds, MFU, memory and kernels of a step; its evaluation; GPTQ, packing.
Each row has a process; one has the GPU at a time, and lends it to the others while it compiles. Tokens are random. It
needs torch and numpy; what tells a person of progress is left out, and lzma packs where a row's compressor is missing.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import importlib.util
import json
import lzma
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import train_gpt as t
from tools import ROOT, command_line, positive, run_tool
from tools.bench import bench, kernels, mlp

ROWS = ("card", "frontier", "pr1812", "pr490", "pr1127", "pr455", "pr150")  # those that compile longest, first
# Relative errors: fp32 rounds at 6e-8 and sums in another order, bf16 rounds each activation at 4e-3.
MOST = dict(fp32_loss=1e-4, fp32_gradient=1e-3, fp32_last=1e-4, bf16_loss=5e-3, bf16_gradient=1e-1, bf16_last=2e-2,
            compiled_loss=5e-3, compiled_gradient=1e-1, mlp_off_error=1e-2, mlp_on_error=1e-2)
SPLIT = {1024: 62_021_846, 8192: 40_540_802}  # targets of the contest's validation split, by vocabulary
LONG = ("row", "what", "top", "shares", "ms_quartiles", "steps", "tokens", "flops_per_token", "tokens_per_second",
        "attention_flops_per_token", "tflops")  # what the JSON file has and the terminal has not


# ----------------------------------------
# The GPU, which the processes of a run have in turn

class Turn:
    """The right to use the GPU: taken on entering, lent to the others while this process compiles or packs."""

    def __init__(self, path: Path):
        self.file = path.open("w")

    def take(self, *_: Any) -> None:
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def lend(self, *_: Any) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        fcntl.flock(self.file, fcntl.LOCK_UN)

    @contextmanager
    def lent(self) -> Iterator[None]:
        self.lend()
        yield
        self.take()

    def lend_while_compiling(self) -> None:
        from torch._dynamo.callback import callback_handler

        callback_handler.register_start_callback(self.lend)
        callback_handler.register_end_callback(self.take)


# ----------------------------------------
# Right: the same losses and gradients as somewhere else

def small(cfg: t.Config) -> t.Config:
    """The row with two heads of its own width and short rows: every component, little work."""
    return replace(cfg, model_dim=2 * cfg.head_dim, num_heads=2, num_kv_heads=1, train_seq_len=256, eval_seq_len=256,
                   eval_stride=64, early_seq_lens=(), early_seq_ends=(), train_batch_tokens=1024,
                   micro_batch_tokens=1024)


def small_model(cfg: t.Config, weights: Mapping[str, Tensor] | None, device: torch.device, dtype: str) -> t.GPT:
    """The model of a device and dtype, uncompiled, with the given weights or some that hide no term behind a zero."""
    cfg, ranks = replace(cfg, dtype=dtype), t.Ranks(device=device)
    model = t.GPT(cfg, t.choose_attention(cfg, ranks).attend, t.compute_dtype(cfg, device))
    model.init_weights(cfg)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            p.copy_(weights[name] if weights else p + 0.05 * torch.randn(p.shape, generator=draw))
    return model.to(device)


def gradients(forward: Callable, model: t.GPT, ids: Tensor, targets: Tensor, looped: bool,
              pieces: int = 1) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their mean, float64 on the CPU, in so many pieces of rows; leaves no gradient."""
    losses = []
    for x, y in zip(ids.chunk(pieces), targets.chunk(pieces)):
        found = forward(x, y, looped)
        (found.mean() / pieces).backward()
        losses.append(found.detach().flatten())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return torch.cat(losses).double().cpu(), gradient.double().cpu()


def error(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


@torch.no_grad()
def last_losses(model: t.GPT, ids: Tensor, looped: bool, right: Tensor, last: int) -> float:
    """The error of losses of the last positions alone, as an evaluation asks for them."""
    found = model(ids[:, :-1], ids[:, -last:], looped).double().cpu()
    return error(found, right.view(len(ids), -1)[:, -last:])


def against_the_cpu(cfg: t.Config, device: torch.device) -> dict[str, float]:
    """The row's model of a device and dtype, with the given weights, or some that hide no term behind a 0."""
    cfg, found = small(cfg), {}
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, cfg.vocab_size, (4, cfg.train_seq_len + 1), generator=draw)
    ids[:, ::97] = t.BOS
    reference = small_model(cfg, None, torch.device("cpu"), "fp32")
    weights, looped = reference.state_dict(), cfg.num_loops > 0
    right = gradients(reference, reference, ids[:, :-1], ids[:, 1:], looped)
    torch.set_float32_matmul_precision("highest")
    for dtype in ("fp32", "bf16"):
        model = small_model(cfg, weights, device, dtype)
        here = gradients(model, model, ids[:, :-1].to(device), ids[:, 1:].to(device), looped)
        found |= {f"{dtype}_{kind}": error(a, b) for kind, a, b in zip(("loss", "gradient"), here, right)}
        found[f"{dtype}_last"] = max(last_losses(model, ids.to(device), looped, right[0], n) for n in (64, 1))
    torch.set_float32_matmul_precision("high")
    return found


def against_itself(trainer: t.Trainer) -> dict[str, float]:
    """Relative errors of the compiled step's losses and gradients, full batch, to the same graph run uncompiled."""
    ids, targets = (x.flatten(0, 1) for x in next(trainer.batches))
    compiled = gradients(trainer.compiled, trainer.model, ids, targets, trainer.looped)
    plain = gradients(trainer.model, trainer.model, ids, targets, trainer.looped, pieces=6)
    return {f"compiled_{kind}": error(a, b) for kind, a, b in zip(("loss", "gradient"), compiled, plain)}


# ----------------------------------------
# Fast: a step, an evaluation, coding

def timed_step(trainer: t.Trainer, seconds: float, roof: float, folder: Path) -> dict[str, Any]:
    """Quartiles, MFU, memory and profile of full-batch steps, after some that compile."""
    device, cfg, step = trainer.ranks.device, trainer.cfg, bench.driven(trainer)
    begin = time.perf_counter()
    step()
    bench.settle(device)
    first = time.perf_counter() - begin
    one = min(bench.one_time(step, device) for _ in range(3))
    count = int(min(max(1e3 * seconds / one, 5), 300))
    found = bench.speed(bench.step_times(step, device, count, count // 3), cfg, trainer.ranks, trainer.looped, roof)
    seen = bench.profiled(trainer, folder / "step.trace.json", 2)
    return found | dict(first_step_seconds=first, peak_mib=bench.peak_mib(device), launches=seen.launches,
                        syncs=seen.syncs, busy_ms=seen.busy_ms, shares=seen.shares, eager_share=seen.eager,
                        attention_ran=seen.backends, top=seen.top[:25])


def random_text(cfg: t.Config, count: int) -> np.ndarray:
    """Tokens in documents as long as the contest's: half of them below 0.57 of the mean, a few very long."""
    draw, mean = np.random.default_rng(2), SPLIT.get(cfg.vocab_size, 5e7) / 50_000
    tokens = draw.integers(2, cfg.vocab_size, count).astype(np.uint16)
    firsts = np.cumsum(draw.lognormal(np.log(0.57 * mean), 1.06, count // 100 + 2).astype(int) + 2)
    tokens[[0, *firsts[firsts < count]]] = t.BOS
    return tokens


class Silent:
    """A log and a progress bar of which nobody sees anything."""

    active, disable = False, True

    def __call__(self, *_: Any, **__: Any) -> None: ...

    set_postfix_str = update = close = __call__


def timed_evaluations(trainer: t.Trainer) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each pass of the row's evaluation, after one that compiles: 2 million tokens through the model, or two chunks."""
    cfg, ranks = trainer.cfg, trainer.ranks
    stream = cfg.ttt_chunk_tokens if cfg.ttt_scope == "stream" else 0
    chunk = stream or 2**17
    lengths = dict(roundtrip=2**21, sliding_window=max(2**21 // (cfg.window // cfg.eval_stride), chunk),
                   legal_ttt=2 * stream + cfg.window if stream else 2**19)
    model = copy.deepcopy(trainer.model)  # what adapts stays on it
    for kind, count in lengths.items():
        torch.cuda.reset_peak_memory_stats()
        for targets in (min(count, max(stream, cfg.window * 2) + cfg.window), count):  # the first one compiles
            with mock.patch.object(t, "target_bytes", bench.one_byte_each):
                scorer = t.Scorer(random_text(cfg, targets + 1), replace(cfg, val_max_tokens=0), ranks, Silent())
            passes = t.evaluations(scorer, model, trainer.looped)
            with mock.patch.object(t, "progress_bar", lambda *_: Silent()):
                score = next(run for name, run in passes.items() if name.endswith(kind))()
        rate = targets / score.seconds
        yield kind, dict(targets=targets, seconds=score.seconds, targets_per_second=rate,
                         split_on_8_seconds=SPLIT.get(cfg.vocab_size, 0) / rate / 8,
                         peak_mib=bench.peak_mib(ranks.device))


def timed_coding(trainer: t.Trainer, turn: Turn) -> dict[str, float]:
    """Seconds of a GPTQ batch, of quantizing as the row does, on made-up costs, and of packing."""
    cfg, weights, found = trainer.cfg, trainer.average.values, {}
    grid_of, costs_of = t.grids(trainer.model, cfg), {}
    if cfg.quantizer == "gptq":
        with trainer.observers():
            for _ in range(2):  # the first one loads kernels
                bench.settle(trainer.ranks.device)
                begin = time.perf_counter()
                trainer.observe()
                bench.settle(trainer.ranks.device)
                found["calibration_batch"] = time.perf_counter() - begin
        for name in (n for n, grid in grid_of.items() if grid.bits < 16):
            x = torch.randn(2 * weights[name].size(-1), weights[name].size(-1), device=weights[name].device)
            costs_of[name] = t.Curvature(x.T @ x / len(x), torch.ones(len(weights[name])).to(x.device))
    bench.settle(trainer.ranks.device)
    begin = time.perf_counter()
    tensors = t.quantize(weights, t.coding_plans(weights, grid_of, cfg, costs_of))
    found["quantize"] = time.perf_counter() - begin
    here, compress = importlib.util.find_spec(t.COMPRESSORS[cfg.compressor]), t.compress
    if not here:
        found["compressor"] = f"lzma, not {cfg.compressor}"
    with turn.lent(), mock.patch.object(t, "compress", compress if here else lambda body, *_: lzma.compress(body)):
        begin = time.perf_counter()
        blob = t.pack(tensors, trainer.looped, cfg)
        found["pack"], found["bytes"] = time.perf_counter() - begin, len(blob)
    return found


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention as it is written, one group of heads after the other; queries are the last ones."""
    asked, keys, group = q.size(1), k.size(1), q.size(2) // k.size(2)
    future = torch.ones(asked, keys, device=q.device).triu(1 + keys - asked).bool()
    heads = []
    for h in range(q.size(2)):
        scores = q[:, :, h] @ k[:, :, h // group].mT * q.size(-1) ** -0.5
        heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, :, h // group])
    return torch.stack(heads, dim=2)


def attended(attend: Callable, q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> Tensor:
    """Output and gradients of q, k and v, one after the other, float64 on the CPU."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    y = attend(q, k, v)
    y.backward(dy)
    return torch.cat([x.detach().double().cpu().flatten() for x in (y, q.grad, k.grad, v.grad)])


def attention_kernel(name: str, cfg: t.Config, ranks: t.Ranks, qkv: list[Tensor], dy: Tensor) -> dict[str, Any]:
    """Milliseconds of an attention forward and with backward, at the full batch, and its relative error to float64."""
    attend = t.choose_attention(replace(cfg, attention=name), ranks).attend
    one = [x[:1].to(torch.bfloat16) for x in (*qkv, dy)]
    last = [one[0][:, -64:], *one[1:3], one[3][:, -64:]]  # as the last block of an evaluation has them
    wrong_by = max(error(attended(attend, *some), attended(exact_attention, *(x.double() for x in some)))
                   for some in (one, last))
    q, k, v = (x.to(torch.bfloat16).requires_grad_() for x in qkv)
    dy = dy.to(torch.bfloat16)
    forward = bench.step_times(lambda: attend(q, k, v), ranks.device, 20, 5)
    both = bench.step_times(lambda: attend(q, k, v).backward(dy), ranks.device, 20, 5)
    return dict(forward_ms=float(np.median(forward)), both_ms=float(np.median(both)), error=wrong_by)


def attention_kernels(cfg: t.Config, ranks: t.Ranks) -> Iterator[dict[str, Any]]:
    """What each causal attention that has a name does here, or why it cannot run."""
    draw = torch.Generator(ranks.device).manual_seed(0)
    shape, heads = (cfg.micro_batch_tokens // cfg.train_seq_len, cfg.train_seq_len), (cfg.num_heads, cfg.num_kv_heads)
    *qkv, dy = (torch.randn(*shape, n, cfg.head_dim, generator=draw, device=ranks.device)
                for n in (*heads, heads[1], heads[0]))
    for name in t.FLASH_PACKAGES:
        try:
            yield dict(name=name, **attention_kernel(name, cfg, ranks, qkv, dy))
        except (t.InputError, RuntimeError) as fault:
            yield dict(name=name, missing=" ".join(str(fault).split())[:200])


# ----------------------------------------
# One row, in a process of its own: prints a JSON object a line

def tell(row: str, what: str, **found: Any) -> None:
    print(json.dumps(dict(row=row, what=what) | found), flush=True)


def check_row(row: str, folder: Path, seconds: float, roof: float) -> None:
    """All that is checked of a row, told as it comes."""
    turn, device = Turn(folder / "turn"), torch.device("cuda")
    turn.take()
    turn.lend_while_compiling()
    place = folder / row
    place.mkdir()
    with t.launch({}) as ranks:
        cfg = bench.row_config(row, {}, place, 1)
        bench.write_tokens(place / "tokens", cfg.vocab_size)
        shard = place / "tokens" / "fineweb_train_000000.bin"
        cfg = replace(cfg, data_path=str(shard.parent), tokenizer_path=str(shard))
        if row == "card":
            for found in attention_kernels(cfg, ranks):
                tell(row, "kernel", **found)
        if row in ("card", "frontier"):
            tell(row, "mlp", **mlp.compared(cfg, device))
        tell(row, "small", **against_the_cpu(cfg, device))
        attention, trainer = bench.make_trainer(cfg, ranks)
        tell(row, "attention", attention=attention, warning=t.choose_attention(cfg, ranks).warning)
        for looped in (False, True)[: 1 + (cfg.num_loops > 0)]:
            trainer.looped = looped
            torch.cuda.reset_peak_memory_stats()
            found = timed_step(trainer, seconds, roof, place)
            tell(row, "step" + " looped" * looped, attention=attention, **found)
            tell(row, "compiled" + " looped" * looped, **against_itself(trainer))
        if cfg.late_qat_threshold:
            trainer.qat = True
            step = bench.driven(trainer)
            tell(row, "late_qat", ms=float(np.median(bench.step_times(step, device, 10, 3))))
            trainer.qat = False
        for kind, found in timed_evaluations(trainer):
            tell(row, kind, **found)
        tell(row, "coding", **timed_coding(trainer, turn))


# ----------------------------------------
# All rows, and the table

def predictions(path: Path) -> dict[str, float]:
    """Predicted milliseconds of a step on one GPU by row, from tools.bench.anatomy's file; none without it."""
    rows = json.loads(path.read_text()) if path.exists() else []
    one = "optimizer of 1/1"
    return {r["name"] + " looped" * r["looped"]: r["predicted_ms"][one]
            for r in rows if one in r["predicted_ms"]}


def wrong(found: Mapping[str, Any]) -> list[str]:
    """What one result says against train_gpt.py."""
    faults = [f"{key} {found[key]:.2g} > {most}" for key, most in MOST.items() if not found.get(key, 0) <= most]
    if "attention_ran" in found:
        faults.append(kernels.attention_error(found["attention"], set(found["attention_ran"])))
    return [fault for fault in faults if fault]


def line(found: Mapping[str, Any]) -> str:
    """One result as a person reads it."""
    shown = {k: v for k, v in found.items() if k not in LONG}
    text = " ".join(f"{k}:{v:.4g}" if isinstance(v, float) else f"{k}:{v}" for k, v in shown.items() if v != "")
    return f"{found['row']} {found['what']}: {text}"


def run_row(row: str, args: argparse.Namespace, folder: Path, roof: float, end: float) -> list[dict[str, Any]]:
    """The results of a row's process, printed as they come; that it failed, or was cut at `end`, is one of them."""
    told = dict(row=row, folder=folder, seconds=args.seconds, roof=roof)
    arguments = [part for k, v in told.items() for part in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "tools.bench.check_gpu", *arguments]
    results: list[dict[str, Any]] = []
    with (folder / f"{row}.stderr").open("w+") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
        cut = threading.Timer(max(0.0, end - time.perf_counter()), process.kill)
        cut.start()
        for text in process.stdout:
            if not (text.startswith("{") and text.endswith("}\n")):  # not ours, or cut off
                continue
            found = json.loads(text)
            results.append(found)
            print(line(found), *(f"WRONG: {fault}" for fault in wrong(found)), flush=True)
        status = process.wait()
        cut.cancel()
        if status:
            stderr.seek(0)
            why = "" if status > 0 else f"{signal.strsignal(-status)}\n"  # which leaves no word on stderr
            why = "it was not done in --minutes\n" if status == -signal.SIGKILL else why
            results.append(dict(row=row, what="failed", error=why + stderr.read()[-3000:]))
            print(f"{row} FAILED:\n{results[-1]['error']}", flush=True)
    return results


def table(results: list[dict[str, Any]], predicted: Mapping[str, float]) -> str:
    """Measured steps beside predicted ones."""
    rows = ["| row | attention | ms a step | predicted | MFU | peak MiB | launches | first step, s |",
            "|---|---|---:|---:|---:|---:|---:|---:|"]
    for r in (r for r in results if r["what"].startswith("step")):
        name = r["row"] + r["what"].removeprefix("step")
        guess = f"{predicted[name]:.1f}" if name in predicted else "-"
        rows.append(f"| `{name}` | {'+'.join(r['attention_ran'])} | {r['ms']:.1f} | {guess} | {r['mfu']:.1%} "
                    f"| {r['peak_mib']:,} | {r['launches']:.0f} | {r['first_step_seconds']:.0f} |")
    return "\n".join(rows)


def main(argv: list[str]) -> None:
    cli = command_line("tools.bench.check_gpu", __doc__)
    cli.add_argument("--rows", default=",".join(ROWS), help="default: %(default)s")
    cli.add_argument("--output", type=Path, default=Path("check_gpu.json"), help="default: %(default)s")
    cli.add_argument("--seconds", type=float, default=4.0, help="of timed steps a row (default: %(default)s)")
    cli.add_argument("--minutes", type=float, default=8.0, help="after which it ends (default: %(default)s)")
    workers = max(1, min(2, (os.cpu_count() or 1) // 3))  # one that waits keeps the memory of its step
    cli.add_argument("--workers", type=positive, default=workers, help="rows at a time (here: %(default)s)")
    for name, kind in dict(row=str, folder=Path, roof=float).items():  # of one row's process
        cli.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = cli.parse_args(argv)
    if not torch.cuda.is_available():
        raise t.InputError("torch sees no GPU; this checks one (`make test-cuda` needs none)")
    if args.row:
        return check_row(args.row, args.folder, args.seconds, args.roof)
    rows = args.rows.split(",")
    if stray := set(rows) - set(ROWS):
        raise t.InputError(f"--rows {','.join(stray)} must be among {','.join(ROWS)}")
    device, begin = torch.device("cuda"), time.perf_counter()
    end = begin + 60 * args.minutes
    result = dict(machine=bench.machine(device), ceilings=bench.ceilings(device, torch.bfloat16), results=[])
    roofs = result["ceilings"]
    print(f"{result['machine']['device']}, torch {torch.__version__}: copy {roofs['copy'] / 1e12:.2f} TB/s, "
          f"bf16 {roofs['bfloat16'] / 1e12:.0f} TFLOP/s", flush=True)
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool:
        done = pool.map(lambda row: run_row(row, args, Path(folder), roofs["bfloat16"], end), rows)
        for found in done:
            result["results"] += found
            result["seconds"] = time.perf_counter() - begin
            t.write_file(args.output, json.dumps(result, indent=1).encode())
    print(table(result["results"], predictions(ROOT / "logs" / "anatomy.json")))
    faults = [f"{r['row']} {r['what']}: {fault}" for r in result["results"] for fault in wrong(r)]
    faults += [f"{r['row']} failed" for r in result["results"] if r["what"] == "failed"]
    print(f"{result['seconds']:.0f} s; wrote {args.output}")
    if faults:
        raise t.InputError("; ".join(faults))


if __name__ == "__main__":
    run_tool("tools.bench.check_gpu", main, sys.argv[1:])
