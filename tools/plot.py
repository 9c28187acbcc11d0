"""Pictures of logs and artifacts of train_gpt.py, as PNG or SVG by the suffix of -o; readable without color.

    python -m tools.plot logs/a.txt logs/b.txt -o curve.png               # loss over steps and over time
    python -m tools.plot logs/a.txt logs/a_eval.txt --scores -o race.png  # bits per byte by stage
    python -m tools.plot logs/five/*.txt --stages -o stages.png           # the same by variant, with spread
    python -m tools.plot --artifact final_model.int6.ptz -o size.png      # bytes of the tensors of an artifact

Curves accept unfinished runs. Curves and scores accept logs of the contest's baseline script.
"""

import io
import os
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools import command_line, run_tool
from tools.files import Refused, write_file
from tools.record.logs import STAGES, RunLog, read_run, read_scored

DASHES, MARKERS = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 3))), "os^DvP"
LOOKS = [dict(color=f"C{i}", linestyle=dashes) for i, dashes in enumerate(DASHES)]
TICKS = ("raw\nweights", "averaged\nweights", "reloaded\nfrom the bytes", "sliding\nwindow", "test-time\ntraining")
VALUE = dict(textcoords="offset points", ha="center", fontsize=8, bbox=dict(fc="white", ec="none", pad=0.5))


def short_names(runs: list) -> list[str]:
    """File names of the logs without suffix and without their common first words; whole paths if two are equal."""
    names = [run.path.stem for run in runs]
    if len(set(names)) < len(names):
        return [str(run.path) for run in runs]
    cut = max(os.path.commonprefix(names).rfind(mark) for mark in "_-. ") + 1
    return [name[cut:] for name in names] if len(names) > 1 and all(len(name) > cut for name in names) else names


def legend(figure: Figure, labels: list[str]) -> None:
    """Legend below the panels; the figure grows by its lines."""
    lines = [textwrap.fill(label, int(12 * figure.get_figwidth())) for label in labels]
    figure.set_figheight(figure.get_figheight() + 0.17 * sum(line.count("\n") + 1 for line in lines))
    handles, _ = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, lines, loc="outside lower center", fontsize=8.5, frameon=False, handlelength=4)


def draw_curves(runs: list[RunLog]) -> Figure:
    """Loss over steps and over time. Raises Refused for a log without training steps."""
    if missing := [run.path for run in runs if not run.points["train"]]:
        raise Refused(f"{missing[0]} has no line 'step:... train_loss:...'; give a log of a training run")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    milliseconds = max(run.points["train"][-1][1] for run in runs)
    unit, scale = ("minutes", 60_000) if milliseconds >= 180_000 else ("seconds", 1000)
    finals = [f", final {[*run.scores.values()][-1].bpb:.4f} bpb" if run.scores else "" for run in runs]
    labels = [name + final for name, final in zip(short_names(runs), finals)]
    losses = [[loss for _, _, loss in points] for run in runs for points in run.points.values() if points]
    long = min(len(run.points["train"]) for run in runs) > 50  # its first losses would take most of the height
    low = min(map(min, losses))
    high = max(max(np.percentile(values, 90 if long else 100), values[-1]) for values in losses)
    pad = 0.05 * (high - low) + 0.02
    for column, panel in enumerate(figure.subplots(1, 2, sharey=True)):
        for i, (label, run) in enumerate(zip(labels, runs)):
            look, marker = LOOKS[i % len(LOOKS)], MARKERS[i % len(MARKERS)]
            train, val = (np.array(run.points[kind]).reshape(-1, 3) / (1, scale, 1) for kind in ("train", "val"))
            dots = dict(marker=".", markersize=5) if len(train) <= 20 else {}
            panel.plot(train[:, column], train[:, 2], color=look["color"], linewidth=0.6, alpha=0.45, **dots)
            half = len(train) // 20  # of the values of a running mean
            means = [train[max(j - half, 0) : j + half + 1, 2].mean() for j in range(len(train))]
            panel.plot(train[:, column], means, linewidth=2, label=label, **look)
            every = max(1, -(-len(val) // 15))  # at most 15 marks, one of them on the last loss
            marks = dict(marker=marker, markeredgecolor="black", markevery=((len(val) - 1) % every, every))
            panel.plot(val[:, column], val[:, 2], color=look["color"], linewidth=0.8, **marks)
        panel.set(xlabel="step" if column == 0 else f"training time, {unit}", ylim=(low - pad, high + pad))
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=column == 0, steps=[1, 2, 2.5, 5, 10]))
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    figure.supylabel("loss, nats per token", fontsize=10)
    kinds = "thin: training loss of each logged step; thick: its mean over a tenth of the log; marks: validation loss"
    figure.suptitle(kinds + f"; losses above {high + pad:.2f} are not shown" * long, fontsize=8.5)
    legend(figure, labels)
    return figure


def draw_scores(runs: list[RunLog]) -> Figure:
    """Bits per byte by stage, one line per artifact; an EVAL_ONLY log continues the line of its training run."""
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for name, run in sorted(zip(short_names(runs), runs), key=lambda pair: "raw" not in pair[1].scores):
        if not run.scores:
            raise Refused(f"{run.path} has no score of any stage; give the log of a run that reached its evaluation")
        _, scores = found.setdefault(run.artifact_sha256 or str(run.path), (name, {}))
        scores |= {stage: score.bpb for stage, score in run.scores.items() if stage not in scores}
    lines = sorted(found.values(), key=lambda line: -[*line[1].values()][-1])
    labels = [f"{name}, {[*scores.values()][-1]:.4f}" for name, scores in lines]
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    panel = figure.add_subplot(xlim=(-0.4, len(STAGES) - 0.6), ylabel="bits per byte (lower is better)")
    for i, (label, (_, scores)) in enumerate(zip(labels, lines)):
        look, at = LOOKS[i % len(LOOKS)], [[*STAGES].index(stage) for stage in scores]
        panel.plot(at, [*scores.values()], label=label, marker=MARKERS[i % len(MARKERS)], **look)
    low, high = panel.get_ylim()
    for x, stage in enumerate(STAGES):
        last = np.inf
        for bpb in sorted((scores[stage] for _, scores in lines if stage in scores), reverse=True):
            if last - bpb > (high - low) / 18:  # otherwise the number would cover the one above
                panel.annotate(f"{bpb:.4f}", (x, last := bpb), (0, 7), **VALUE)
    panel.set_ylim(low, high + (high - low) / 12)
    panel.set_xticks(range(len(STAGES)), TICKS)
    panel.grid(axis="y", alpha=0.3)
    legend(figure, labels)
    return figure


def draw_stages(runs: list[RunLog]) -> Figure:
    """Bits per byte by stage, one panel per variant: mean and standard deviation over its runs, and each run."""
    groups = {run.variant: [it for it in runs if it.variant == run.variant] for run in runs}
    columns, rows = min(3, len(groups)), -(-len(groups) // 3)
    figure = Figure(figsize=(max(3 * columns, 4) + 0.5, max(2.9 * rows, 3.5) + 0.5), layout="constrained")
    for at, (variant, group) in enumerate(groups.items(), 1):
        panel = figure.add_subplot(rows, columns, at, xlim=(-0.5, len(STAGES) - 0.5))
        panel.set_title(f"{variant}, {len(group)} seed{'s' * (len(group) > 1)}", fontsize=11)
        stages = [stage for stage in STAGES if all(stage in run.scores for run in group)]
        bpb, names = np.array([[run.scores[it].bpb for it in stages] for run in group]), [STAGES[it] for it in stages]
        mean, std = bpb.mean(0), bpb.std(0, ddof=1) if len(group) > 1 else np.zeros(len(stages))
        panel.plot(names, bpb.T, color="0.7", linewidth=0.8, zorder=1)
        panel.errorbar(names, mean, std, fmt="o", color="black", markersize=5, capsize=4)
        for x, value in enumerate(mean):
            panel.annotate(f"{value:.4f}", (x, max(value + std[x], bpb[:, x].max())), (0, 5), **VALUE)
        panel.yaxis.set_major_formatter("{x:.3f}")
        panel.tick_params(labelsize=7.5)
        panel.grid(axis="y", alpha=0.3)
    height = max(high - low for low, high in (panel.get_ylim() for panel in figure.axes)) + 1e-4
    for panel in figure.axes:  # all of one height, with room for the numbers
        middle = sum(panel.get_ylim()) / 2
        panel.set_ylim(middle - height / 2, middle + 0.6 * height)
    figure.supylabel("bits per byte" + "; panels differ in level, not in scale" * (len(groups) > 1), fontsize=10)
    figure.supxlabel("black: mean and standard deviation;\ngrey: each seed", fontsize=9)
    return figure


def draw_artifact(path: Path) -> Figure:
    """Two bars per group of tensors: bytes before compression, and bytes by entropy."""
    import train_gpt  # here because it imports torch, which takes seconds
    from tools.model import inspect

    try:
        found = inspect.contents(path, Path(train_gpt.__file__))
    except train_gpt.InputError as error:
        raise Refused(error) from None
    rows = sorted(inspect.merged(found["parameters"]), key=lambda row: -row.raw)
    large = [row for row in rows if row.raw >= 0.01 * found["raw"]]
    bars = [(f"{row.name} ({row.count} x {row.dtype})", row.raw, row.estimate) for row in large]
    if small := rows[len(large) :]:
        sums = (sum(getattr(row, size) for row in small) for size in ("raw", "estimate"))
        bars.append((f"{len(small)} groups below 1 %", *sums))
    names, *sizes = zip(*bars)
    figure = Figure(figsize=(10, max(3.2, 1.9 + 0.42 * len(bars))), layout="constrained")
    panel, at = figure.add_subplot(xlim=(0, 1.15 * max(map(max, sizes))), xlabel="bytes"), np.arange(len(bars))
    looks = (("before compression", dict(color="0.8")), ("by entropy", dict(color="C0", hatch="////")))
    for shift, values, (label, look) in zip((-0.2, 0.2), sizes, looks):
        drawn = panel.barh(at + shift, values, 0.4, edgecolor="black", linewidth=0.6, label=label, **look)
        panel.bar_label(drawn, [f"{value:,.0f}" for value in values], padding=3, fontsize=7.5)
    panel.set_yticks(at, names, fontsize=8.5)
    panel.invert_yaxis()
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.legend(loc="lower right")
    title = "{raw:,} bytes before compression, {estimate:,} by entropy, {model_bytes:,} in the file;\n"
    title += "with {code_bytes:,} of code {total_bytes:,} of {cap:,}"
    figure.suptitle(f"{textwrap.fill(path.name, 90)}\n{title.format(**found)}", fontsize=10)
    return figure


def main() -> None:
    cli = command_line("tools.plot", __doc__)
    cli.add_argument("logs", nargs="*", type=Path)
    cli.add_argument("--scores", action="store_true", help="bits per byte by stage, one line per artifact")
    cli.add_argument("--stages", action="store_true", help="bits per byte by stage, one panel per variant")
    cli.add_argument("--artifact", type=Path, help="bytes of an artifact; takes no logs")
    cli.add_argument("-o", "--out", type=Path, default=Path("curve.png"), help="PNG or SVG (default: curve.png)")
    args = cli.parse_args()
    if args.out.suffix.lower() not in (".png", ".svg"):
        raise Refused(f"-o {args.out} must end in .png or .svg")
    if bool(args.logs) == bool(args.artifact) or args.scores + args.stages + bool(args.artifact) > 1:
        raise Refused("give logs, perhaps with --scores or --stages, or give --artifact FILE alone")
    if args.artifact:
        figure = draw_artifact(args.artifact)
    elif args.stages:
        figure = draw_stages([*map(read_scored, args.logs)])
    else:
        figure = (draw_scores if args.scores else draw_curves)([*map(read_run, args.logs)])
    picture = io.BytesIO()
    figure.savefig(picture, dpi=200, format=args.out.suffix[1:].lower())
    write_file(args.out, picture.getvalue())
    print(args.out, flush=True)


if __name__ == "__main__":
    run_tool("tools.plot", main)
