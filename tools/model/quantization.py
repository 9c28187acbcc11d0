"""Every way of coding one checkpoint: bytes by coder, bits a weight, entropy, bits per byte after the round trip.

    CHECKPOINT_EVERY=100 OUTPUT_DIR=run python train_gpt.py    # leaves run/final_model.average.ptz, the averaged weights
    python -m tools.model.quantization run/final_model.average.ptz --tokens 65536 -o logs/quantization.png

DATA_PATH and TOKENIZER_PATH must be set as for the run. The gap is that to the checkpoint's own bits per byte, on the
first --tokens targets of the validation split; costs are measured on --batches training batches, as a run would.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.interpolate import PchipInterpolator

import train_gpt as t
from tools import command_line, positive, run_tool

ROW_MAX = dict(clip_shares=(1.0,), step_floor=0.0)
SEARCH = dict(clip_shares=(1.0, 0.95, 0.9, 0.85, 0.8, 0.7), step_floor=0.0)
SIGMAS = dict(matrix_clip_sigmas=12.85, embed_clip_sigmas=20.0)
METHODS = {  # label: (settings, whether GPTQ, the coder that it was published with)
    "row maximum, int4": (ROW_MAX | dict(matrix_bits=4), False, "zstd"),
    "row maximum, int5": (ROW_MAX | dict(matrix_bits=5), False, "zstd"),
    "row maximum, int6": (ROW_MAX, False, "zstd"),
    "row maximum, int8": (ROW_MAX | dict(matrix_bits=8), False, "zstd"),
    "row maximum, floor 1/31 (#455)": (ROW_MAX | dict(step_floor=1.0), False, "zstd"),
    "row maximum, floor 1/31, GPTQ (#490)": (ROW_MAX | dict(step_floor=1.0), True, "zstd"),
    "clip search, int4": (SEARCH | dict(matrix_bits=4), False, "zstd"),
    "clip search": (SEARCH, False, "zstd"),
    "clip search, floor 1/31 (#1233)": (SEARCH | dict(step_floor=1.0), False, "zstd"),
    "clip search, GPTQ": (SEARCH, True, "zstd"),
    "SDClip 12.85": (SIGMAS, False, "brotli"),
    "SDClip 12.85, GPTQ (#1812)": (SIGMAS, True, "brotli"),
    "mean step, power 0": (dict(mean_step=0.1, step_power=0.0), True, "rans"),
    "mean step, power 0.5": (dict(mean_step=0.1, step_power=0.5), True, "rans"),
    "mean step, power 0.75": (dict(mean_step=0.1, step_power=0.75), True, "rans"),
    "mean step, power 1": (dict(mean_step=0.1, step_power=1.0), True, "rans"),
}
RIVALS = ("row maximum, floor 1/31 (#455)", "clip search, floor 1/31 (#1233)", "SDClip 12.85, GPTQ (#1812)",
          "mean step, power 0", "mean step, power 0.75")
CODERS = ("zstd", "brotli", "rans")
SHARES = (0.5, 0.6, 0.7, 0.8, 1.0)  # of the bytes of the first rival
PARTS = {"all": "", "matrices": "blocks.", "token table": "tok_emb."}  # how the names begin of what is coded


class Study:
    """A checkpoint, what errors in it cost, and the text that it is scored on."""

    def __init__(self, path: Path, tokens: int, batches: int):
        env = {k: os.environ[k] for k in ("DATA_PATH", "TOKENIZER_PATH") if k in os.environ}
        self.cfg, self.weights, self.looped, *_ = t.load_artifact(path, env | {"MAX_ARTIFACT_BYTES": str(2**31)})
        self.cfg = replace(self.cfg, val_max_tokens=tokens, quantizer="gptq", mean_step=1.0, embed_bits=8, table_bits=0)
        self.ranks = t.Ranks()
        self.model = t.load_model(self.cfg, {n: w.clone() for n, w in self.weights.items()}, self.ranks)
        self.scorer = t.Scorer(t.read_validation(self.cfg), self.cfg, self.ranks, t.Log(self.cfg, t.Ranks(rank=1)))
        stream = t.TokenStream(t.find_shards(self.cfg, "train"), self.cfg.vocab_size)
        trainer = t.Trainer(self.model, t.Batches(stream, self.cfg, self.ranks), self.cfg, self.ranks)
        trainer.looped = self.looped
        with trainer.observers() as seen:
            for _ in range(batches):
                trainer.observe()
        self.costs = {name: t.curvature(observer, self.ranks) for name, observer in seen.items()}
        self.base = self.score(self.weights)

    def score(self, weights: dict[str, torch.Tensor]) -> float:
        """Bits per byte of the model with these weights."""
        self.model.load_state_dict(weights)
        with torch.no_grad():
            return self.scorer.plain(lambda ids, targets: self.model(ids, targets, self.looped)).bpb

    def plans(self, label: str, part: str = "all") -> dict[str, t.Plan]:
        """How a method codes what belongs to a part; the rest stays as it is."""
        settings, gptq, _ = METHODS[label]
        cfg = replace(self.cfg, **{"mean_step": 0.0} | settings)
        plans = t.coding_plans(self.weights, t.grids(self.model, cfg), cfg, self.costs if gptq else {})
        return {name: plan for name, plan in plans.items() if name.startswith(PARTS[part])}

    def size(self, tensors: dict[str, torch.Tensor], coder: str) -> int:
        return len(t.pack(tensors, self.looped, replace(self.cfg, compressor=coder)))


def entropy(tensors: dict[str, torch.Tensor]) -> tuple[float, int]:
    """(mean over all codes of the zero-order entropy of their own tensor, in bits; the number of codes)."""
    bits = count = 0
    for codes in (v for name, v in tensors.items() if name.endswith(".codes")):
        share = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
        bits, count = bits - codes.numel() * float((share * np.log2(share)).sum()), count + codes.numel()
    return bits / count, count


def row(study: Study, label: str) -> str:
    """A line of the table of methods, at the step that each was published with."""
    tensors = t.quantize(study.weights, study.plans(label))
    sizes, (bits, count) = [study.size(tensors, coder) for coder in CODERS], entropy(tensors)
    bpb = study.score(t.dequantize(tensors))
    return (f"| {label} | {' | '.join(f'{s:,}' for s in sizes)} | {8 * min(sizes) / count:.3f} | {bits:.3f} | {bpb:.4f} "
            f"| {1000 * (bpb - study.base):+.2f} |")


def at_bytes(study: Study, label: str, budgets: list[int], coder: str, part: str = "all") -> list[tuple[int, float]]:
    """(bytes, gap in bits per byte) of a part coded alone, its steps scaled to come out at each budget, by interpolation."""
    plans = study.plans(label, part)

    def size(tensors: dict[str, torch.Tensor]) -> int:
        return study.size({name: v for name, v in tensors.items() if name.startswith(PARTS[part])}, coder)

    octaves = np.arange(-2.5, 3.6, 0.75)
    # steps below a 127th of a row's maximum change nothing more
    sizes, first = np.unique([size(t.quantize(study.weights, plans, 2**x)) for x in octaves], return_index=True)
    octave_of = PchipInterpolator(np.log(sizes), octaves[first])
    points = []
    for budget in budgets:
        tensors = t.quantize(study.weights, plans, float(2 ** octave_of(np.log(budget))))
        points.append((size(tensors), study.score(t.dequantize(tensors)) - study.base))
    return points


def frontier(study: Study, out: Path) -> list[str]:
    """Every rival at every share of the first one's bytes, by its own coder and by rANS: lines of tables, and a picture.

    A table for each part coded alone, the rest unquantized, its bytes counted alone; the picture shows all together.
    """
    lines: list[str] = []
    for part, prefix in PARTS.items():
        found, tensors = {}, t.quantize(study.weights, study.plans(RIVALS[0], part))
        whole = study.size({n: v for n, v in tensors.items() if n.startswith(prefix)}, METHODS[RIVALS[0]][2])
        budgets = [round(whole * share) for share in SHARES]
        lines += [f"\n| {part}: gap, 1/1000 bpb, at bytes | coder | {' | '.join(f'{b:,}' for b in budgets)} |",
                  "|---|---|" + "---:|" * len(budgets)]
        for label in RIVALS:
            for coder in dict.fromkeys((METHODS[label][2], "rans")):
                points = found[label, coder] = at_bytes(study, label, budgets, coder, part)
                gaps = " | ".join(f"{1000 * gap:+.2f}" for _, gap in points)
                lines.append(f"| {label} | {coder} | {gaps} |")
                print(lines[-1], file=sys.stderr, flush=True)
        if part == "all":
            picture(found).savefig(out, dpi=150)
    return lines


def picture(found: dict[tuple[str, str], list[tuple[int, float]]]) -> Figure:
    """Gaps over bytes: a color and a mark for each method, hollow and dotted but with rANS; gaps below 1e-5 stand there."""
    figure = Figure(figsize=(7.5, 5 + 0.1 * len(found)), layout="constrained")
    axis, methods = figure.add_subplot(), [*dict.fromkeys(label for label, _ in found)]
    for (label, coder), points in found.items():
        at, style = methods.index(label), {} if coder == "rans" else dict(linestyle=":", markerfacecolor="white")
        axis.plot([size / 1e6 for size, _ in points], [max(1000 * gap, 0.01) for _, gap in points], color=f"C{at}",
                  marker="os^Dv<>PX"[at % 9], markersize=5, label=f"{label}, {coder}", **style)
    axis.set_yscale("log")
    axis.set_xlabel("bytes of the model file, millions")
    axis.set_ylabel("gap to the unquantized weights, 1/1000 bit per byte")
    axis.grid(alpha=0.25, which="both")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, handlelength=3.5)
    return figure


def low_rank(study: Study, label: str, rank: int, top: int) -> tuple[int, float]:
    """(bytes more, gap) with the errors of the `top` worst weights corrected by int8 factors of `rank` (LQER)."""
    plans = study.plans(label)
    back = t.dequantize(t.quantize(study.weights, plans))
    errors = {n: study.weights[n] - back[n] for n in plans}
    worst = sorted(plans, key=lambda n: -float(((errors[n] @ study.costs[n].inputs) * errors[n]).sum(1) @ study.costs[n].rows))
    more = 0
    for name in worst[:top]:
        root = torch.linalg.cholesky(study.costs[name].inputs.double() + 1e-6 * torch.eye(errors[name].size(1)))
        u, s, v = torch.linalg.svd(errors[name].double() @ root, full_matrices=False)
        parts = []
        for part in ((u[:, :rank] * s[:rank]).T, torch.linalg.solve(root.T, v[:rank].T).T):
            step = part.abs().amax(1, keepdim=True) / 127
            parts.append((part / step).round() * step)
            more += part.numel() + 2 * rank
        back[name] = back[name] + (parts[0].T @ parts[1]).float()
    return more, study.score(back) - study.base


def layouts(study: Study, label: str) -> list[str]:
    """Bytes of all codes in one zstd-22 or Brotli-11 stream, by the order in which they stand."""
    tensors = {n: v.numpy() for n, v in t.quantize(study.weights, study.plans(label)).items() if n.endswith(".codes")}
    role = sorted(tensors, key=lambda n: (n.split(".", 2)[-1] if n.startswith("blocks.") else n, n))
    orders = {
        "by name, rows": [tensors[n] for n in sorted(tensors)],
        "by role, rows": [tensors[n] for n in role],
        "by role, columns": [tensors[n].T for n in role],
        "by role, rows by scale": [tensors[n][np.argsort(np.abs(tensors[n].astype(int)).sum(1))] for n in role],
        "by role, columns by scale": [tensors[n].T[np.argsort(np.abs(tensors[n].astype(int)).sum(0))] for n in role],
    }
    lines = []
    for name, arrays in orders.items():
        body = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
        sizes = " | ".join(f"{len(t.compress(body, coder, 22)):,}" for coder in CODERS[:2])
        lines.append(f"| {label} | {name} | {sizes} |")
    return lines


def main() -> None:
    cli = command_line("tools.model.quantization", __doc__)
    cli.add_argument("checkpoint", type=Path)
    cli.add_argument("--tokens", type=positive, default=65_536, help="validation targets (default: 65536)")
    cli.add_argument("--batches", type=positive, default=8, help="training batches that the costs are measured on (default: 8)")
    cli.add_argument("-o", "--out", type=Path, default=Path("quantization.png"), help="picture of the frontier")
    args = cli.parse_args()
    begin = time.perf_counter()
    study = Study(args.checkpoint, args.tokens, args.batches)
    print(f"unquantized: {study.base:.4f} bpb on {args.tokens} targets; costs and score in {time.perf_counter() - begin:.0f} s\n")
    print(f"| method | {' | '.join(CODERS)} | bits a weight, best coder | zero-order entropy | bpb | gap, 1/1000 bpb |")
    print("|---|" + "---:|" * (len(CODERS) + 4))
    for label in METHODS:
        print(row(study, label), flush=True)
    print("\n".join(frontier(study, args.out)), flush=True)
    print("\n| LQER on | rank | weights | bytes more | gap, 1/1000 bpb |\n|---|---:|---:|---:|---:|")
    for label, rank, top in ((name, r, k) for name in (RIVALS[2], RIVALS[4]) for r, k in ((0, 0), (4, 3), (8, 10))):
        more, gap = low_rank(study, label, rank, top)
        print(f"| {label} | {rank} | {top} | {more:,} | {1000 * gap:+.2f} |", flush=True)
    print("\n| codes of | order | zstd | brotli |\n|---|---|---:|---:|")
    for label in (RIVALS[2], RIVALS[4]):
        print("\n".join(layouts(study, label)), flush=True)
    print(f"\n{args.out}; {time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    run_tool("tools.model.quantization", main)
