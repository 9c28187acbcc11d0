"""Checks every row of train_gpt.py on this GPU and measures its speed: `make check-gpu`, or

    python -m tools.bench.check_gpu [--rows card,pr1812] [--output check_gpu.json]

For each row: losses and gradients of a small model against fp32 on the CPU; those of a compiled micro batch against
the uncompiled model; milliseconds, MFU, memory and kernels of a step beside the prediction of tools.bench.cards; the
passes of the evaluation; calibration and quantization; for `card` and `frontier` the MLP kernel. Each row runs in its
own process on random tokens, in batches that fit. Needs only torch and numpy. Options in the environment apply.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import train_gpt as t
from tools import ROOT, command_line, dict_table, run_tool
from tools.bench import bench, cards, mlp, passes, require_gpu
from tools.files import Refused, write_file

ROWS = ("card", "frontier", "pr1812", "pr490", "pr1127", "pr455", "pr150")
# Largest relative errors. fp32 rounds at 6e-8 and sums in another order, bf16 rounds each activation at 4e-3.
LIMITS = dict(fp32_loss=1e-4, fp32_gradient=1e-3, fp32_last=1e-4, bf16_loss=5e-3, bf16_gradient=1e-1, bf16_last=2e-2)
LIMITS |= dict(compiled_loss=5e-3, compiled_gradient=1e-1, mlp_off_error=1e-2, mlp_on_error=1e-2)
EAGER_TOKENS = 16_384  # of an uncompiled pass; limits memory
STEP = "row attention attention_kernel:.40 micro_batch:, ms:.1f predicted_ms:.1f mfu:.1% peak_mib:, launches:.0f"


def small(cfg: t.Config) -> t.Config:
    """Shrinks a row to two heads of its own width and short sequences; all components stay."""
    tokens = dict(train_seq_len=256, eval_seq_len=256, eval_stride=64, train_batch_tokens=1024, micro_batch_tokens=1024)
    return replace(cfg, model_dim=2 * cfg.head_dim, num_heads=2, num_kv_heads=1, **tokens)


def small_model(cfg: t.Config, device: torch.device, dtype: str) -> t.GPT:
    """Returns an uncompiled model with weights of which none is zero, equal for all devices and dtypes."""
    cfg, ranks, generator = replace(cfg, dtype=dtype), t.Ranks(device=device), torch.Generator().manual_seed(1)
    model = t.GPT(cfg, t.choose_attention(cfg, ranks).attend, t.compute_dtype(cfg, device))
    model.init_weights(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.to(device)


def gradients(forward: Callable, model: t.GPT, ids: Tensor, targets: Tensor, pieces: int = 1) -> tuple[Tensor, Tensor]:
    """Returns the losses and the gradient of their mean, in float64 on the CPU, computed in pieces of the batch."""
    losses = []
    for x, y in zip(ids.chunk(pieces), targets.chunk(pieces)):
        losses.append(forward(x, y))
        (losses[-1].mean() / pieces).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return torch.cat(losses).detach().double().cpu(), gradient.double().cpu()


def error(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def against_the_cpu(cfg: t.Config, device: torch.device) -> dict[str, float]:
    """Returns relative errors of losses, gradients and losses of the last positions, in fp32 and, if it can, bf16."""
    cfg, looped, found = small(cfg), cfg.num_loops > 0, {}
    ids = torch.randint(2, cfg.vocab_size, (4, cfg.train_seq_len + 1), generator=torch.Generator().manual_seed(0))
    ids[:, ::97] = t.BOS
    reference = small_model(cfg, torch.device("cpu"), "fp32")
    losses, gradient = gradients(partial(reference, looped=looped), reference, ids[:, :-1], ids[:, 1:])
    ids = ids.to(device)
    torch.set_float32_matmul_precision("highest")
    for dtype in ("fp32", "bf16")[: 1 + bench.has_bf16(device)]:
        model = small_model(cfg, device, dtype)
        forward = partial(model, looped=looped)
        a, b = gradients(forward, model, ids[:, :-1], ids[:, 1:])
        with torch.no_grad():
            last = max(error(forward(ids[:, :-1], ids[:, -n:]).double().cpu(), losses[:, -n:]) for n in (64, 1))
        found |= {f"{dtype}_loss": error(a, losses), f"{dtype}_gradient": error(b, gradient), f"{dtype}_last": last}
    torch.set_float32_matmul_precision("high")
    return found


def against_uncompiled(trainer: t.Trainer) -> dict[str, float]:
    """Returns relative errors of the losses and gradients of a compiled micro batch."""
    ids, targets = (x[0] for x in next(trainer.batches))
    compiled, pieces = gradients(trainer.forward, trainer.model, ids, targets), -(-ids.numel() // EAGER_TOKENS)
    plain = gradients(partial(trainer.model, looped=trainer.looped), trainer.model, ids, targets, pieces)
    return {f"compiled_{kind}": error(a, b) for kind, a, b in zip(("loss", "gradient"), compiled, plain)}


def random_text(cfg: t.Config, count: int) -> np.ndarray:
    """Returns tokens in documents that are as long as the contest's."""
    tokens = np.random.default_rng(2).integers(2, cfg.vocab_size, count)
    starts = np.array([first for first, _ in passes.split(cfg.vocab_size)])
    tokens[starts[starts < count]] = t.BOS
    return tokens


def timed_evaluations(trainer: t.Trainer) -> Iterator[dict[str, Any]]:
    """Times each pass of the evaluation, on 2 million tokens or two chunks, after a shorter one that compiles."""
    cfg, split = trainer.cfg, passes.TOKENS[trainer.cfg.vocab_size]
    stream = 0 if cfg.by_document else cfg.ttt_chunk_tokens
    sliding = max(2**21 // (cfg.window // cfg.eval_stride), stream or 2**17)
    counts = dict(roundtrip=2**21, sliding_window=sliding, legal_ttt=2 * stream + cfg.window if stream else 2**19)
    model = copy.deepcopy(trainer.model)  # test-time training changes it
    for kind, count in counts.items():
        torch.cuda.reset_peak_memory_stats()
        for targets in (min(count, max(stream, cfg.window * 2) + cfg.window), count):
            scorer = bench.make_scorer(random_text(cfg, targets + 1), cfg, trainer.ranks)
            runs = t.evaluations(scorer, model, trainer.looped)
            score = next(run for name, run in runs.items() if name.endswith(kind))()
        found = dict(what=kind, seconds=score.seconds, split_on_8_seconds=split * score.seconds / targets / 8)
        yield found | dict(targets=targets, peak_mib=torch.cuda.max_memory_allocated() >> 20)


def timed_quantization(trainer: t.Trainer) -> dict[str, float]:
    """Returns the seconds of the row's calibration, if it has one, and of quantizing all weights."""
    cfg, weights, begin = trainer.cfg, trainer.average.values, time.perf_counter()
    costs = t.calibrate(trainer, t.Clock(trainer.ranks.device, 0.0), mock.Mock()) if cfg.calibrated else {}
    middle = time.perf_counter()
    t.quantize(weights, t.quant_plans(weights, t.quant_specs(trainer.model, cfg), cfg, costs))
    return dict(calibrate_seconds=middle - begin, quantize_seconds=time.perf_counter() - middle)


def check_row(row: str, folder: Path, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    with t.launch({}) as ranks:
        cfg = replace(bench.row_config(row, os.environ, folder), warmup_steps=2)
        card, ceiling = cards.find(bench.machine(ranks.device)["device"]), ceilings[str(t.compute_dtype(cfg, ranks.device))]
        if row in ("card", "frontier"):
            yield dict(what="mlp") | mlp.compared(cfg, ranks.device)
        yield dict(what="small") | against_the_cpu(cfg, ranks.device)
        attention, trainer = t.choose_attention(cfg, ranks), bench.make_trainer(cfg, ranks)
        trainer.warm_up(mock.Mock(side_effect=print))  # also halves the micro batch until it fits
        for looped in range(1 + (cfg.num_loops > 0)):
            trainer.looped, name = bool(looped), row + " looped" * looped
            torch.cuda.reset_peak_memory_stats()
            found = dict(row=name, what="step", attention=attention.name, warnings=attention.warnings)
            found |= dict(micro_batch=cfg.train_batch_tokens // trainer.batches.micro_steps)
            found |= bench.timed_step(trainer, ceiling, count=50, warm_seconds=3.0)
            yield found | (dict(predicted_ms=cards.step_ms(card, row, trainer.looped, found["tokens"])) if card else {})
            yield dict(row=name, what="compiled") | against_uncompiled(trainer)
        if cfg.late_qat_threshold:
            trainer.qat, step = True, bench.driven(trainer)
            yield dict(what="late_qat", ms=float(np.median(bench.step_times(step, ranks.device, 10, warm=3))))
            trainer.qat = False
        yield from timed_evaluations(trainer)
        yield dict(what="quantization") | timed_quantization(trainer)


def wrong(found: Mapping[str, Any]) -> list[str]:
    faults = [f"{key} {found[key]:.2g} > {limit}" for key, limit in LIMITS.items() if not found.get(key, 0) <= limit]
    if found.get("attention_kernel") == "none":
        faults.append("the profile shows no attention kernel")
    return faults + [found["error"]] if "error" in found else faults


def line(found: Mapping[str, Any]) -> str:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items() if k not in ("row", "what", "top")}
    return f"{found['row']} {found['what']}: " + " ".join(f"{k}:{v}" for k, v in shown.items())


def main(argv: list[str]) -> None:
    cli = command_line("tools.bench.check_gpu", __doc__)
    cli.add_argument("--rows", default=",".join(ROWS), help="default: %(default)s")
    cli.add_argument("--output", type=Path, default=Path("check_gpu.json"), help="default: %(default)s")
    cli.add_argument("--row", help=argparse.SUPPRESS)  # in the process of one row
    args = cli.parse_args(argv)
    device, begin, results = require_gpu(), time.perf_counter(), []
    if unknown := set(args.rows.split(",")) - set(ROWS):
        raise Refused(f"--rows {','.join(unknown)} must be among {','.join(ROWS)}")
    ceilings = bench.ceilings(device)
    with tempfile.TemporaryDirectory() as folder:
        if args.row:
            for found in check_row(args.row, Path(folder), ceilings):
                found = dict(row=args.row) | found
                print(line(found), *(f"\nWRONG: {fault}" for fault in wrong(found)), flush=True)
                with args.output.open("a") as file:
                    file.write(json.dumps(found) + "\n")
            return
        result = dict(machine=bench.machine(device), ceilings=ceilings, results=results)
        name, card = result["machine"]["device"], cards.find(result["machine"]["device"])
        print(*(f"{key}: {value}" for key, value in (result["machine"] | ceilings).items()), sep="\n")
        plan = dict_table([cards.predict(card, row) for row in cards.ROWS], cards.COLUMNS) if card else ""
        print(plan or f"logs/cards.json has no {name}, so there is no prediction", flush=True)
        torch.cuda.empty_cache()
        for row in args.rows.split(","):
            path = Path(folder) / f"{row}.jsonl"  # one result per line
            command = [sys.executable, "-m", "tools.bench.check_gpu", "--row", row, "--output", str(path)]
            if status := subprocess.run(command, cwd=ROOT).returncode:
                results.append(dict(row=row, what="process", error=f"it ended with status {status}"))
            results += map(json.loads, path.read_text().splitlines() if path.exists() else [])
            write_file(args.output, json.dumps(result, indent=1).encode())
    print(dict_table([found for found in results if found["what"] == "step"], STEP))
    print(f"{time.perf_counter() - begin:.0f} s; attach {args.output} to an issue")
    if faults := [f"{found['row']} {found['what']}: {fault}" for found in results for fault in wrong(found)]:
        raise Refused("; ".join(faults))


if __name__ == "__main__":
    run_tool("tools.bench.check_gpu", main, sys.argv[1:])
