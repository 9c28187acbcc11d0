"""Compares the ways of coding one checkpoint: bytes by coder, bits per weight, entropy, bits per byte when reloaded.

    CHECKPOINT_EVERY=100 OUTPUT_DIR=run python train_gpt.py    # saves run/final_model.average.ptz, the averaged weights
    python -m tools.model.quantization run/final_model.average.ptz --tokens 65536 -o logs/quantization.png

Set DATA_PATH and TOKENIZER_PATH as for the run. The gap is the difference to the bits per byte without quantization on
the first --tokens validation targets. Costs are measured on --batches training batches.
"""

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
from tools.model import inspect

ROW_MAX = dict(clip_shares=(1.0,), min_clip=0.0)
SEARCH = dict(clip_shares=(1.0, 0.95, 0.9, 0.85, 0.8, 0.7), min_clip=0.0)
SIGMAS = dict(matrix_clip_sigmas=12.85, embed_clip_sigmas=20.0)
MEAN = dict(mean_scale=0.1, matrix_bits=8)
METHODS = {  # label: (settings, whether GPTQ, the coder that it was published with)
    **{f"row maximum, int{bits}": (ROW_MAX | dict(matrix_bits=bits), False, "zstd") for bits in (4, 5, 6, 8)},
    "row maximum, floor 1/31 (#455)": (ROW_MAX | dict(min_clip=1.0), False, "zstd"),
    "row maximum, floor 1/31, GPTQ (#490)": (ROW_MAX | dict(min_clip=1.0), True, "zstd"),
    "clip search, int4": (SEARCH | dict(matrix_bits=4), False, "zstd"),
    "clip search": (SEARCH, False, "zstd"),
    "clip search, floor 1/31 (#1233)": (SEARCH | dict(min_clip=1.0), False, "zstd"),
    "clip search, GPTQ": (SEARCH, True, "zstd"),
    "SDClip 12.85": (SIGMAS, False, "brotli"),
    "SDClip 12.85, GPTQ (#1812)": (SIGMAS, True, "brotli"),
    **{f"mean scale, power {p:g}": (dict(MEAN, scale_power=p), True, "rans") for p in (0.0, 0.5, 0.75, 1.0)},
}
RIVALS = ("row maximum, floor 1/31 (#455)", "clip search, floor 1/31 (#1233)", "SDClip 12.85, GPTQ (#1812)",
          "mean scale, power 0", "mean scale, power 0.75")  # fmt: skip
CODERS = ("zstd", "brotli", "rans")
SHARES = (0.5, 0.6, 0.7, 0.8, 1.0)  # of the bytes of the first rival
PARTS = {"all": "", "matrices": "blocks.", "token table": "tok_emb."}  # prefix of the names of the coded weights


class Study:
    """A checkpoint, the costs of errors in its weights, and the text that it is scored on."""

    def __init__(self, path: Path, tokens: int, batches: int):
        env = {k: os.environ[k] for k in ("DATA_PATH", "TOKENIZER_PATH") if k in os.environ}
        self.cfg, self.weights, self.looped, *_ = t.load_artifact(path, env | {"MAX_ARTIFACT_BYTES": str(2**31)})
        self.cfg = replace(self.cfg, val_max_tokens=tokens, quantizer="gptq", **dict(MEAN, embed_bits=8, table_bits=0))
        self.ranks = t.Ranks()
        self.model = t.load_model(self.cfg, {n: w.clone() for n, w in self.weights.items()}, self.ranks)
        self.scorer = t.Scorer(t.read_validation(self.cfg), self.cfg, self.ranks, t.Log(self.cfg, t.Ranks(rank=1)))
        stream = t.TokenStream(t.find_shards(self.cfg, "train"), self.cfg.vocab_size)
        trainer = t.Trainer(self.model, t.Batches(stream, self.cfg, self.ranks), self.cfg, self.ranks)
        trainer.looped = self.looped
        with trainer.fisher_stats() as seen:
            for _ in range(batches):
                trainer.collect()
        self.costs = {name: t.curvature(observer, self.ranks) for name, observer in seen.items()}
        self.base = self.score(self.weights)

    def score(self, weights: dict[str, torch.Tensor]) -> float:
        """Bits per byte of the model with these weights."""
        self.model.load_state_dict(weights)
        with torch.no_grad():
            return self.scorer.evaluate_windows(lambda ids, targets: self.model(ids, targets, self.looped)).bpb

    def plans(self, label: str, part: str = "all") -> dict[str, t.QuantPlan]:
        settings, gptq, _ = METHODS[label]
        cfg = replace(self.cfg, **dict(mean_scale=0.0, matrix_bits=6) | settings)
        plans = t.quant_plans(self.weights, t.quant_specs(self.model, cfg), cfg, self.costs if gptq else {})
        return {name: plan for name, plan in plans.items() if name.startswith(PARTS[part])}

    def size(self, tensors: dict[str, torch.Tensor], coder: str, part: str = "all") -> int:
        """Bytes of a file with the tensors of a part."""
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith(PARTS[part])}
        return len(t.pack(kept, self.looped, replace(self.cfg, compressor=coder)))


def row(study: Study, label: str) -> str:
    """One method at the step size that it was published with."""
    tensors = t.quantize(study.weights, study.plans(label))
    sizes, bpb = [study.size(tensors, coder) for coder in CODERS], study.score(t.dequantize(tensors))
    codes = [tensor for name, tensor in tensors.items() if name.endswith(".codes")]
    bits, count = sum(map(inspect.entropy, codes)), sum(it.numel() for it in codes)
    numbers = f"{8 * min(sizes) / count:.3f} | {bits / count:.3f} | {bpb:.4f} | {1000 * (bpb - study.base):+.2f}"
    return f"| {label} | {' | '.join(f'{size:,}' for size in sizes)} | {numbers} |"


def at_bytes(study: Study, label: str, budgets: list[int], coder: str, part: str = "all") -> list[tuple[int, float]]:
    """(bytes, gap) of a part whose scales meet each budget, by interpolation."""
    plans, octaves = study.plans(label, part), np.arange(-2.5, 3.6, 0.75)
    # scales below a 127th of a row's maximum have no further effect
    sizes = [study.size(t.quantize(study.weights, plans, 2**octave), coder, part) for octave in octaves]
    sizes, first = np.unique(sizes, return_index=True)
    octave_of = PchipInterpolator(np.log(sizes), octaves[first])
    points = []
    for budget in budgets:
        tensors = t.quantize(study.weights, plans, float(2 ** octave_of(np.log(budget))))
        points.append((study.size(tensors, coder, part), study.score(t.dequantize(tensors)) - study.base))
    return points


def frontier(study: Study, out: Path) -> list[str]:
    """Tables of all rivals at equal bytes, one table per part with the other part unquantized; writes the picture."""
    lines: list[str] = []
    for part in PARTS:
        found, first = {}, RIVALS[0]
        whole = study.size(t.quantize(study.weights, study.plans(first, part)), METHODS[first][2], part)
        budgets = [round(whole * share) for share in SHARES]
        lines.append(f"\n| {part}: gap, 1/1000 bpb, at bytes | coder | {' | '.join(f'{b:,}' for b in budgets)} |")
        lines.append("|---|---|" + "---:|" * len(budgets))
        for label in RIVALS:
            for coder in dict.fromkeys((METHODS[label][2], "rans")):
                points = found[label, coder] = at_bytes(study, label, budgets, coder, part)
                lines.append(f"| {label} | {coder} | {' | '.join(f'{1000 * gap:+.2f}' for _, gap in points)} |")
                print(lines[-1], file=sys.stderr, flush=True)
        if part == "all":
            picture(found).savefig(out, dpi=150)
    return lines


def picture(found: dict[tuple[str, str], list[tuple[int, float]]]) -> Figure:
    """Gaps over bytes, one color and mark per method; hollow and dotted unless coded by rANS; gaps are cut at 1e-5."""
    figure = Figure(figsize=(7.5, 5 + 0.1 * len(found)), layout="constrained")
    axis, methods = figure.add_subplot(), [*dict.fromkeys(label for label, _ in found)]
    for (label, coder), points in found.items():
        at, style = methods.index(label), {} if coder == "rans" else dict(linestyle=":", markerfacecolor="white")
        style |= dict(color=f"C{at}", marker="os^Dv<>PX"[at % 9], markersize=5, label=f"{label}, {coder}")
        axis.plot([size / 1e6 for size, _ in points], [max(1000 * gap, 0.01) for _, gap in points], **style)
    axis.set(yscale="log", xlabel="bytes of the model file, millions", ylabel="gap, 1/1000 bpb")
    axis.grid(alpha=0.25, which="both")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, handlelength=3.5)
    return figure


def main() -> None:
    cli = command_line("tools.model.quantization", __doc__)
    cli.add_argument("checkpoint", type=Path)
    cli.add_argument("--tokens", type=positive, default=65_536, help="validation targets (default: 65536)")
    cli.add_argument("--batches", type=positive, default=8, help="training batches that measure the costs (default: 8)")
    cli.add_argument("-o", "--out", type=Path, default=Path("quantization.png"), help="picture, PNG or SVG")
    args = cli.parse_args()
    if args.out.suffix not in (".png", ".svg") or not args.out.parent.is_dir():
        raise t.InputError(f"-o {args.out} must be a .png or .svg file in a folder that exists")
    begin = time.perf_counter()
    study = Study(args.checkpoint, args.tokens, args.batches)
    print(f"unquantized: {study.base:.4f} bpb on {args.tokens} targets; {time.perf_counter() - begin:.0f} s so far\n")
    print(f"| method | {' | '.join(CODERS)} | bits a weight, best coder | zero-order entropy | bpb | gap, 1/1000 bpb |")
    print("|---|" + "---:|" * (len(CODERS) + 4))
    for label in METHODS:
        print(row(study, label), flush=True)
    print("\n".join(frontier(study, args.out)), flush=True)
    print(f"\n{args.out}; {time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    run_tool("tools.model.quantization", main)
