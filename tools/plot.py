"""Pictures of logs and artifacts of train_gpt.py, PNG or SVG by the suffix of -o, readable without color.

    python -m tools.plot logs/a.txt logs/b.txt -o curve.png               # losses by step and by time
    python -m tools.plot logs/five/*.txt --by tokens --group -o five.svg  # seeds of a variant as mean and band
    python -m tools.plot logs/a.txt logs/a_eval.txt --scores -o race.png  # bits per byte of each stage, a line for each artifact
    python -m tools.plot logs/five/*.txt --stages -o stages.png           # the same with the spread over seeds, by variant
    python -m tools.plot --artifact final_model.int6.ptz -o size.png      # where its bytes are

Runs that differ in nothing but SEED, RUN_ID and OUTPUT_DIR share a color. More than 6 groups of runs get a panel each.
Curves and scores accept a run that has not ended and the contest's script; stages need finished runs. Tokens that no
override names follow from the variant in today's train_gpt.py.
"""

import io
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tools import command_line, table
from tools.files import Refused, write_file
from tools.loglines import Curve, Scored, Stages, read_curve, read_scored, read_stages
from tools.runlog import RunLog

AXES = {"step": "step", "seconds": "training time, seconds", "minutes": "training time, minutes", "tokens": "training tokens, millions"}
TOGETHER = 6  # groups of runs in one panel
MARKERS, DASHES = "os^DvP", ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 3)))
NOT_SETTINGS = {"SEED", "RUN_ID", "OUTPUT_DIR"}
SCORES = {"raw": "raw\nweights", "averaged": "averaged\nweights", "coded": "reloaded\nfrom the bytes", "sliding": "sliding\nwindow",
          "ttt": "test-time\ntraining"}


def short_names(runs: list) -> list[str]:
    """The logs' file names without suffix and without the words that all begin with; whole paths if two are equal."""
    names = [run.path.stem for run in runs]
    if len(set(names)) < len(names):
        return [str(run.path) for run in runs]
    start = os.path.commonprefix(names)
    cut = max(start.rfind(mark) for mark in "_-. ") + 1
    return [name[cut:] for name in names] if len(names) > 1 and all(len(name) > cut for name in names) else names


def by_settings(runs: list[Curve]) -> dict[str, list[Curve]]:
    """Runs of one variant and the same settings, of several seeds and with steps in common; else each run alone."""
    found: dict[tuple, list[tuple[str, Curve]]] = {}
    for name, run in zip(short_names(runs), runs):
        settings = frozenset((key, value) for key, value in run.overrides.items() if key not in NOT_SETTINGS)
        found.setdefault((run.variant, settings), []).append((name, run))
    groups = {}
    for pairs in found.values():
        names, seeds = [name for name, _ in pairs], {run.seed for _, run in pairs}
        start = os.path.commonprefix(names).rstrip("_-. ") or pairs[0][1].variant
        if 1 < len(pairs) == len(seeds) and start not in groups and curve([run for _, run in pairs], "train", "step")[0].size:
            groups[start] = [run for _, run in pairs]
        else:
            groups |= {name: [run] for name, run in pairs}
    return groups


def by_variant(runs: list) -> dict[str, list]:
    """Runs by variant. Raises Refused if those of one differ in more than the seed, or not in it."""
    found: dict[str, list] = {}
    for run in runs:
        for other in found.setdefault(run.variant, []):
            differ = {name for name, _ in run.overrides.items() ^ other.overrides.items()} - (NOT_SETTINGS - {"SEED"})
            if differ - {"SEED"} or run.seed == other.seed:
                what = ", ".join(sorted(differ)) or "nothing, not even the seed"
                raise Refused(f"{other.path} and {run.path}, both {run.variant}, differ in {what}; draw them apart")
        found[run.variant].append(run)
    return found


def batch_tokens(run: Curve) -> int:
    """Tokens a step. Raises Refused if neither the log nor today's train_gpt.py tells them."""
    if (given := run.overrides.get("TRAIN_BATCH_TOKENS", "")).isdecimal():
        return int(given)
    import train_gpt  # here, as in draw_artifact, because it imports torch, which takes seconds

    try:
        return train_gpt.Config.from_env(run.overrides | {"VARIANT": run.variant}).train_batch_tokens
    except train_gpt.InputError as error:
        raise Refused(f"{run.path}: this train_gpt.py does not take its settings: {error}") from None


def curve(runs: list[Curve], kind: str, by: str) -> tuple[np.ndarray, np.ndarray]:
    """x of each step that all the runs logged (of times the mean), and losses (runs, steps)."""
    logged = [{step: (minutes, loss) for step, minutes, loss in run.points[kind]} for run in runs]
    steps = sorted(set.intersection(*map(set, logged)))
    minutes, losses = np.moveaxis(np.array([[run[s] for s in steps] for run in logged]).reshape(len(runs), -1, 2), 2, 0)
    scale = batch_tokens(runs[0]) / 1e6 if by == "tokens" else 1
    times = {"minutes": minutes.mean(0), "seconds": 60 * minutes.mean(0)}
    return times[by] if by in times else np.array(steps) * scale, losses


def running_mean(losses: np.ndarray) -> np.ndarray:
    """The mean of the tenth of the values that lies around each; at the ends of those that there are."""
    half, at = len(losses) // 20, np.arange(len(losses))
    total = np.concatenate([[0], np.cumsum(losses)])
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(losses))
    return (total[high] - total[low]) / (high - low)


def legend(figure: Figure, panel: Axes) -> None:
    """Below all panels, and as wide as they are: long names are broken."""
    handles, labels = panel.get_legend_handles_labels()
    wide = 13 * figure.get_figwidth()  # characters in a line
    columns = max(1, min(3, len(labels), int(wide / (max(map(len, labels)) + 10))))
    labels = [textwrap.fill(label, int(wide / columns - 10)) for label in labels]
    figure.set_figheight(figure.get_figheight() + 0.17 * sum(label.count("\n") + 1 for label in labels) / columns)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False, handlelength=4)


def key(figure: Figure, groups: dict[str, list[Curve]], band: bool, above: float | None) -> None:
    """What each kind of line and mark is, above all panels."""
    runs = [run for several in groups.values() for run in several]
    smoothed = any(len(run.points["train"]) >= 20 for run in runs)
    kinds = {"training loss" + ", mean over a tenth of the log" * smoothed: dict(linewidth=2)}
    if smoothed and min(map(len, groups.values())) == 1:
        kinds["training loss of each logged step"] = dict(linewidth=0.8, alpha=0.6)
    if max(map(len, groups.values())) > 1:
        kinds["least to greatest of the seeds" if band else "each seed; thick: mean of the seeds"] = (
            dict(linewidth=7, alpha=0.25) if band else dict(linewidth=0.9, alpha=0.8))
    if any(run.points["val"] for run in runs):
        kinds["validation loss"] = dict(marker="o", markersize=7, markeredgecolor="black", linewidth=0.8)
    wide = sum(len(kind) + 8 for kind in kinds) > 14 * figure.get_figwidth()
    figure.legend([Line2D([], [], color="0.35", **look) for look in kinds.values()], [*kinds], loc="outside upper center",
                  ncols=max(1, int(figure.get_figwidth() / 3.4)) if wide else len(kinds), fontsize=8.5, frameon=False,
                  title=f"losses above {above:.2f} are not shown" if above else None, title_fontsize=8.5)


def draw_group(panel: Axes, by: str, runs: list[Curve], band: bool, label: str, style: int) -> None:
    """Training thin as it was logged and thick as its running mean, validation as filled marks.

    Of several seeds the thick line is the mean; thin lines are each seed's running mean, or a band is the range.
    """
    color, dashes = f"C{style}", DASHES[style]
    x, losses = curve(runs, "train", by)
    dots = dict(marker=".", markersize=5) if len(x) <= 20 else {}
    if len(runs) == 1:
        panel.plot(x, losses[0], color=color, linewidth=0.6, alpha=0.45, **dots)
    for run in () if band or len(runs) == 1 else runs:
        own_x, own = curve([run], "train", by)
        panel.plot(own_x, running_mean(own[0]), color=color, linewidth=0.8, alpha=0.6)
    panel.plot(x, running_mean(losses.mean(0)), color=color, linewidth=2, linestyle=dashes, label=label, **dots)
    val_x, val = curve(runs, "val", by)
    marks = dict(color=color, marker=MARKERS[style], markersize=6, markeredgecolor="black", linewidth=0.8, zorder=3)
    for at, loss in [(val_x, val.mean(0))] if val.size else [(own_x, own[0]) for own_x, own in (curve([run], "val", by) for run in runs)]:
        every = max(1, -(-len(at) // 15))  # at most 15 marks, one of them on the last loss
        panel.plot(at, loss, markevery=((len(at) - 1) % every, every), **marks)
    for at, spread in ((x, losses), (val_x, val)) if band and len(runs) > 1 else ():
        panel.fill_between(at, spread.min(0), spread.max(0), color=color, alpha=0.2, linewidth=0)


def loss_limits(groups: dict[str, list[Curve]]) -> tuple[float, float, bool]:
    """The least and the greatest loss to show, and whether greater ones are cut.

    Runs of more than 50 logged steps lose their start if it would take more than half of the height.
    """
    whole, late, long = [], [], True
    for run in (run for runs in groups.values() for run in runs):
        x, (losses,) = curve([run], "train", "step")
        smooth, few = running_mean(losses), len(x) // 50  # single high and low steps do not count
        val_x, (val,) = curve([run], "val", "step")
        for kept, since in ((whole, 0), (late, x[-1] / 4)):
            raw = np.sort(losses[x >= since])
            kept += [smooth[x >= since], val[val_x >= since], raw[few:len(raw) - few]]
        long &= len(x) > 50
    (low, high), (late_low, late_high) = ((values.min(), values.max()) for values in map(np.concatenate, (whole, late)))
    cut = long and high - low > 2 * (late_high - late_low)
    return (late_low, late_high, True) if cut else (low, high, False)


def draw_curves(groups: dict[str, list[Curve]], axes: list[str], band: bool = False) -> Figure:
    """A panel for each x axis; of more than TOGETHER groups a panel each, over the first axis, the others in grey."""
    if not all(len(curve(runs, "train", "step")[0]) for runs in groups.values()):
        raise Refused("the runs of a variant have no step in common; draw them without --group")
    apart = len(groups) > TOGETHER
    columns = min(4, len(groups)) if apart else len(axes)
    rows = -(-len(groups) // columns) if apart else 1
    validated = [any(run.points["val"] for run in runs) for runs in groups.values()]
    labels = []
    for (name, runs), has in zip(groups.items(), validated):
        mean = f", {len(runs)} seeds, mean" if len(runs) > 1 else ", final"
        final = f"{mean} {np.mean([run.bpb for run in runs]):.4f} bpb" if all(run.bpb for run in runs) else ""
        labels.append(name + final + ", no validation logged" * (any(validated) and not has))
    titles = [textwrap.fill(label, 34) for label in labels]
    lines = max(title.count("\n") for title in titles)
    figure = Figure(figsize=(1 + 2.4 * columns, 1 + (2 + 0.13 * lines) * rows) if apart else (5 + 2 * columns, 4.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=apart, sharey=True, squeeze=False).ravel()
    low, high, cut = loss_limits(groups)
    pad = 0.05 * (high - low) + 0.02
    panels[0].set_ylim(low - pad, high + pad)
    for at, (panel, by) in enumerate(zip(panels, axes[:1] * len(groups) if apart else axes)):
        for i, runs in enumerate(groups.values()):
            if not apart:
                draw_group(panel, by, runs, band, labels[i], i)
            elif i != at:
                x, losses = curve(runs, "train", by)
                panel.plot(x, running_mean(losses.mean(0)), color="0.8", linewidth=0.8, zorder=1)
        if apart:
            draw_group(panel, by, [*groups.values()][at], band, labels[at], 0)
            panel.set_title(titles[at], fontsize=8)
        right = max(line.get_xdata()[-1] for line in panel.lines if len(line.get_xdata()))
        panel.set_xlim(-0.03 * right, 1.03 * right)
        panel.xaxis.set_major_locator(MaxNLocator(5 if apart else 8, integer=by == "step", steps=[1, 2, 2.5, 5, 10]))
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8 if apart else 9.5)
        if not apart:
            panel.set_xlabel(AXES[by])
        elif at >= len(groups) - columns:
            panel.tick_params(labelbottom=True)
    if apart:
        figure.supxlabel(AXES[axes[0]], fontsize=10)
        for panel in panels[len(groups):]:
            panel.remove()
    figure.supylabel("loss, nats per token", fontsize=10)
    key(figure, groups, band, high + pad if cut else None)
    if not apart:
        legend(figure, panels[0])
    return figure


def draw_scores(runs: list[Stages]) -> Figure:
    """Bits per byte by stage, a line for each artifact; the logs of one artifact are joined, its training first."""
    found: dict[str, tuple[str, dict]] = {}
    for name, run in sorted(zip(short_names(runs), runs), key=lambda pair: pair[1].eval_only):
        label, scores = found.setdefault(run.artifact or str(run.path), (name, {}))
        for stage, bpb in run.scores.items():
            scores.setdefault(stage, bpb)
    lines = [(name, {stage: scores[stage] for stage in SCORES if stage in scores}) for name, scores in found.values()]
    lines.sort(key=lambda line: -[*line[1].values()][-1])
    stages = [stage for stage in SCORES if any(stage in scores for _, scores in lines)]
    panel = Figure(figsize=(8.4, 3 + 0.4 * min(len(lines), 20)), layout="constrained").add_subplot()
    values = [bpb for _, scores in lines for bpb in scores.values()]
    pad = 0.08 * (max(values) - min(values)) + 1e-3
    low, high = min(values) - pad, max(values) + 1.5 * pad
    gap = (high - low) / (5 * panel.figure.get_figheight())  # the height of a line of text
    for stage in stages if len(lines) <= TOGETHER else ():
        last = np.inf
        for bpb in sorted((scores[stage] for _, scores in lines if stage in scores), reverse=True):
            if bpb <= last - gap:  # else the number would lie over the one above it
                panel.annotate(f"{bpb:.4f}", (stages.index(stage), last := bpb), (0, 7), textcoords="offset points", ha="center", fontsize=8,
                               bbox=dict(facecolor="white", edgecolor="none", pad=0.5))
    taken = dict.fromkeys(range(len(stages)), np.inf)
    for i, (name, scores) in enumerate(lines):
        at, own = [stages.index(stage) for stage in scores], [*scores.values()]
        look = dict(color=f"C{i % 10}", linestyle=DASHES[i % 6], marker=MARKERS[i % 6], markersize=6)
        panel.plot(at, own, **look)
        # The name stands beside the end of its line, or below the name above it.
        text = textwrap.fill(name if len(lines) <= TOGETHER else f"{name}, {own[-1]:.4f}", 34)
        top = min(own[-1] + gap / 2, taken[at[-1]])
        panel.annotate(text, (at[-1], top), (9, 0), textcoords="offset points", va="top", fontsize=9, color=look["color"], annotation_clip=False)
        taken[at[-1]] = top - gap * (text.count("\n") + 1)
    panel.set(ylim=(min(low, *taken.values()), high), xlim=(-0.4, len(stages) - 0.7), ylabel="bits per byte (lower is better)",
              xticks=range(len(stages)), xticklabels=[SCORES[stage] for stage in stages])
    panel.grid(axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    return panel.figure


def draw_stages(groups: dict[str, list[RunLog | Scored]]) -> Figure:
    """A panel for each variant, all of one height in bits per byte: mean and deviation over seeds, and each seed."""
    columns, rows, limits = min(3, len(groups)), -(-len(groups) // 3), []
    figure = Figure(figsize=(max(3 * columns, 4) + 0.5, max(2.9 * rows, 3.5) + 0.5), layout="constrained")
    panels = [figure.add_subplot(rows, columns, at + 1) for at in range(len(groups))]
    for panel, (variant, runs) in zip(panels, groups.items()):
        stages = {name: key for name, key in table.STAGES.items() if all(key in run.scores for run in runs)}
        bpb = np.array([[run.scores[key].bpb for key in stages.values()] for run in runs])
        mean, spread = bpb.mean(0), bpb.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(stages))
        panel.plot([*stages], bpb.T, color="0.7", linewidth=0.8, zorder=1)
        panel.errorbar([*stages], mean, spread, fmt="o", color="black", markersize=5, capsize=4 * (len(runs) > 1))
        low, high = np.minimum(bpb.min(0), mean - spread), np.maximum(bpb.max(0), mean + spread)
        for at, value in enumerate(mean):
            panel.annotate(f"{value:.4f}", (at, high[at]), (0, 5), textcoords="offset points", ha="center", fontsize=8,
                           bbox=dict(facecolor="white", edgecolor="none", pad=0.5))
        panel.set_title(f"{variant}, {len(runs)} seed{'s' * (len(runs) > 1)}", fontsize=11)
        limits.append((low.min(), high.max()))
    half = 0.6 * max(high - low for low, high in limits) + 1e-4
    for panel, (low, high) in zip(panels, limits):
        middle = (low + high) / 2 + half / 12  # the numbers on top need room
        panel.set(xlim=(-0.5, len(table.STAGES) - 0.5), ylim=(middle - half, middle + half))
        panel.yaxis.set_major_formatter("{x:.3f}")
        panel.tick_params(labelsize=8.5)
        panel.grid(axis="y", alpha=0.3)
    figure.supylabel("bits per byte" + " (panels differ in level,\nnot in scale)" * (len(groups) > 1), fontsize=10)
    several = any(len(runs) > 1 for runs in groups.values())
    caption = "dots and bars: mean and standard deviation over seeds; grey: each seed" if several else "one seed"
    figure.supxlabel(textwrap.fill(caption, int(12 * figure.get_figwidth())), fontsize=9)
    return figure


def draw_artifact(path: Path) -> Figure:
    """Two bars for each group of tensors: bytes before compression, and by entropy. Raises Refused for a bad file."""
    import train_gpt
    from tools.model import inspect

    try:
        found = inspect.contents(path, Path(train_gpt.__file__))
    except train_gpt.InputError as error:
        raise Refused(error) from None
    rows = sorted(inspect.merged(found["parameters"]), key=lambda row: -row.raw)
    large = [row for row in rows if row.raw >= 0.01 * found["raw"]]
    bars = [(f"{r.name} ({r.count} x {r.dtype})", r.raw, r.estimate, f"{r.bits:.2f}") for r in large]
    if small := rows[len(large):]:
        bars.append((f"{len(small)} groups below 1 %", sum(r.raw for r in small), sum(r.estimate for r in small), ""))
    panel = Figure(figsize=(10, max(3.2, 1.9 + 0.42 * len(bars))), layout="constrained").add_subplot()
    for at, (_, raw, estimate, _) in enumerate(bars):
        labels = ("before compression", "by entropy") if at == 0 else (None, None)
        panel.barh(at - 0.2, raw, 0.4, color="0.8", edgecolor="black", linewidth=0.6, label=labels[0])
        panel.barh(at + 0.2, estimate, 0.4, color="C0", edgecolor="black", linewidth=0.6, hatch="////", label=labels[1])
    texts = [("before", "by entropy", "bits a weight"), *((f"{raw:,}", f"{estimate:,.0f}", bits) for _, raw, estimate, bits in bars)]
    start = 0
    for column in zip(*texts):  # a table at the right of the bars
        start += 5.3 * max(map(len, column)) + 9
        for at, text in enumerate(column, -1):
            panel.annotate(text, (1, at), (start, 0), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="center",
                           fontsize=8.5, annotation_clip=False)
    panel.set(xlim=(0, 1.03 * max(max(bar[1:3]) for bar in bars)), ylim=(len(bars) - 0.4, -1.5), xlabel="bytes",
              yticks=range(len(bars)), yticklabels=[name for name, *_ in bars])
    panel.xaxis.set_major_locator(MaxNLocator(5))
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.tick_params(labelsize=8.5)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.legend(loc="lower right", frameon=False)
    title = ("{0}\n{raw:,} bytes before compression, {estimate:,} by entropy, {model_bytes:,} in the file;\n"
             "with {code_bytes:,} of code {total_bytes:,} of {cap:,}")
    panel.figure.suptitle(title.format(textwrap.fill(path.name, 90), **found), fontsize=10)
    return panel.figure


def main() -> None:
    cli = command_line("tools.plot", __doc__)
    cli.add_argument("logs", nargs="*", type=Path)
    cli.add_argument("--by", choices=AXES, help="one panel, over this (default: two, step and time)")
    cli.add_argument("--group", action="store_true", help="runs of a variant as their mean and a band, min to max")
    cli.add_argument("--scores", action="store_true", help="bits per byte of each stage, a line for each artifact")
    cli.add_argument("--stages", action="store_true", help="bits per byte of each stage, a panel for each variant")
    cli.add_argument("--artifact", type=Path, help="bytes of an artifact by group of tensors; takes no logs")
    cli.add_argument("-o", "--out", type=Path, default=Path("curve.png"), help="PNG or SVG (default: curve.png)")
    args = cli.parse_args()
    if args.out.suffix.lower() not in (".png", ".svg"):
        raise Refused(f"-o {args.out} must end in .png or .svg")
    if bool(args.logs) == bool(args.artifact) or bool(args.by or args.group) + args.stages + args.scores + bool(args.artifact) > 1:
        raise Refused("give logs, perhaps with --by and --group; or logs with --scores or --stages; or --artifact FILE alone")
    runs = [(read_scored if args.stages else read_stages if args.scores else read_curve)(path) for path in args.logs]
    if args.artifact:
        figure = draw_artifact(args.artifact)
    elif args.stages:
        figure = draw_stages(by_variant(runs))
    elif args.scores:
        figure = draw_scores(runs)
    else:
        groups = by_variant(runs) if args.group else by_settings(runs)
        time = "minutes" if max(run.points["train"][-1][1] for run in runs) >= 3 else "seconds"
        figure = draw_curves(groups, [args.by] if args.by else ["step", time], args.group)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=200, format=args.out.suffix[1:].lower())
    write_file(args.out, picture.getvalue())
    print(args.out, flush=True)


if __name__ == "__main__":
    try:
        main()
    except (Refused, OSError) as error:
        sys.exit(f"tools.plot: {error}")
