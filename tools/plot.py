"""Pictures of logs and artifacts of train_gpt.py, PNG or SVG by the suffix of -o, readable without color.

    python -m tools.plot logs/a.txt logs/b.txt -o curve.png               # losses by step and by minutes
    python -m tools.plot logs/five/*.txt --by tokens --group -o five.svg  # seeds of a variant as mean and band
    python -m tools.plot logs/five/*.txt --stages -o stages.png           # bits per byte of each stage, by variant
    python -m tools.plot --artifact final_model.int6.ptz -o size.png      # where its bytes are

Curves may be of a run that has not ended, and of the contest's script; stages need finished runs. Runs are of one
variant if nothing but SEED, RUN_ID and OUTPUT_DIR differs. Tokens that no override tells follow from the variant as
today's train_gpt.py has it.
"""

import io
import sys
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools import command_line, table
from tools.files import Refused, write_file
from tools.loglines import Curve, Scored, read_curve, read_scored
from tools.runlog import RunLog

AXES = {"step": "step", "minutes": "training time, minutes", "tokens": "training tokens, millions"}
MARKERS, DASHES = "os^Dv<>PX", ("-", "--", "-.", ":")  # 9 and 4: all pairs of the first 36 curves differ


def by_variant(runs: list) -> dict[str, list]:
    """Runs by variant. Raises Refused if those of one differ in more than the seed, or not in it."""
    found: dict[str, list] = {}
    for run in runs:
        for other in found.setdefault(run.variant, []):
            differ = {name for name, _ in run.overrides.items() ^ other.overrides.items()} - {"RUN_ID", "OUTPUT_DIR"}
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
    """x of each step that all the runs logged (minutes: their mean), and losses [runs, steps]."""
    logged = [{step: (minutes, loss) for step, minutes, loss in run.points[kind]} for run in runs]
    steps = sorted(set.intersection(*map(set, logged)))
    minutes, losses = np.moveaxis(np.array([[run[s] for s in steps] for run in logged]).reshape(len(runs), -1, 2), 2, 0)
    scale = batch_tokens(runs[0]) / 1e6 if by == "tokens" else 1
    return minutes.mean(0) if by == "minutes" else np.array(steps) * scale, losses


def running_mean(losses: np.ndarray) -> np.ndarray:
    """The mean of the tenth of the values that lies around each; at the ends of those that there are."""
    half, at = len(losses) // 20, np.arange(len(losses))
    total = np.concatenate([[0], np.cumsum(losses)])
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(losses))
    return (total[high] - total[low]) / (high - low)


def legend(figure: Figure, panel: Axes, columns: int) -> None:
    """Below all panels, and as wide as they are: long names are broken."""
    handles, labels = panel.get_legend_handles_labels()
    wide = 13 * figure.get_figwidth()  # characters in a line
    columns = columns if max(map(len, labels)) < wide / columns - 10 else 1
    labels = [textwrap.fill(label, int(wide / columns - 10)) for label in labels]
    lines = sum(label.count("\n") + 1 for label in labels) / columns
    figure.set_figheight(figure.get_figheight() + 0.17 * lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False,
                  handlelength=4)


def draw_curves(groups: dict[str, list[Curve]], axes: list[str]) -> Figure:
    """A panel for each x axis. Of each group training as it was logged, its running mean, and validation.

    Of seeds these are means, with bands. The limits of y are those of the last three quarters of every run.
    """
    if not all(len(curve(runs, "train", "step")[0]) for runs in groups.values()):
        raise Refused("the runs of a variant have no step in common; draw them without --group")
    figure = Figure(figsize=(4 + 2.5 * len(axes), 4.3), layout="constrained")
    panels, ends = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0], []
    for i, (name, runs) in enumerate(groups.items()):
        final = f", final {np.mean([run.bpb for run in runs]):.4f} bpb" if all(run.bpb for run in runs) else ""
        band = f" ({len(runs)} seeds: mean, band min to max)" if len(runs) > 1 else ""
        look = dict(color=f"C{i}", marker=MARKERS[i % 9], linestyle=DASHES[i % 4], markersize=5)
        for panel, by in zip(panels, axes):
            x, losses = curve(runs, "train", by)
            smooth = running_mean(losses.mean(0))
            panel.plot(x, losses.mean(0), color=f"C{i}", linewidth=0.6, alpha=0.45)
            panel.plot(x, smooth, label=f"{name}{final}{band}", linewidth=1.9, markerfacecolor="white",
                       markevery=(0.02 * (i % 5), 0.1), **look)  # of the panel's diagonal
            ends.append(smooth[x >= x[-1] / 4])
            val_x, val = curve(runs, "val", by)
            panel.plot(val_x, val.mean(0), **look | dict(markersize=7, markeredgecolor="black", linewidth=1))
            ends.append(val.mean(0))
            for at, spread in ((x, losses), (val_x, val)) if band else ():
                panel.fill_between(at, spread.min(0), spread.max(0), color=f"C{i}", alpha=0.2, linewidth=0)
    ends = np.concatenate(ends)
    pad = 0.06 * (ends.max() - ends.min()) + 0.02
    panels[0].set(ylim=(ends.min() - pad, ends.max() + pad), ylabel="loss, nats per token")
    for panel, by in zip(panels, axes):
        panel.set_xlabel(AXES[by])
        panel.grid(alpha=0.3)
    caption = "thin: training; thick: its mean over a tenth of the log; filled marks: validation"
    figure.suptitle(textwrap.fill(caption, int(13 * figure.get_figwidth())), fontsize=9)
    legend(figure, panels[0], len(axes))
    return figure


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
    bars = [(f"{r.name} ({r.count} x {r.dtype})", r.raw, r.estimate, f", {r.bits:.2f} bits a weight") for r in large]
    if small := rows[len(large):]:
        bars.append((f"{len(small)} groups below 1 %", sum(r.raw for r in small), sum(r.estimate for r in small), ""))
    panel = Figure(figsize=(10, max(3.2, 1.9 + 0.42 * len(bars))), layout="constrained").add_subplot()
    for at, (_, raw, estimate, bits) in enumerate(bars):
        labels = ("before compression", "by entropy") if at == 0 else (None, None)
        panel.barh(at - 0.2, raw, 0.4, color="0.8", edgecolor="black", linewidth=0.6, label=labels[0])
        panel.barh(at + 0.2, estimate, 0.4, color="C0", edgecolor="black", linewidth=0.6, hatch="////", label=labels[1])
        panel.text(max(raw, estimate), at, f"  {raw:,} / {estimate:,.0f}{bits}", va="center", fontsize=8.5)
    panel.set(xlim=(0, 2.4 * max(max(bar[1:3]) for bar in bars)), ylim=(len(bars), -1), xlabel="bytes",
              yticks=range(len(bars)), yticklabels=[name for name, *_ in bars])
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.legend(loc="lower right", frameon=False)
    title = ("{0}\n{raw:,} bytes before compression, {estimate:,} by entropy, {model_bytes:,} in the file;\n"
             "with {code_bytes:,} of code {total_bytes:,} of {cap:,}")
    panel.figure.suptitle(title.format(textwrap.fill(path.name, 90), **found), fontsize=10)
    return panel.figure


def main() -> None:
    cli = command_line("tools.plot", __doc__)
    cli.add_argument("logs", nargs="*", type=Path)
    cli.add_argument("--by", choices=AXES, help="one panel, over this (default: two, step and minutes)")
    cli.add_argument("--group", action="store_true", help="runs of a variant as their mean and a band, min to max")
    cli.add_argument("--stages", action="store_true", help="bits per byte of each stage, a panel for each variant")
    cli.add_argument("--artifact", type=Path, help="bytes of an artifact by group of tensors; takes no logs")
    cli.add_argument("-o", "--out", type=Path, default=Path("curve.png"), help="PNG or SVG (default: curve.png)")
    args = cli.parse_args()
    if args.out.suffix.lower() not in (".png", ".svg"):
        raise Refused(f"-o {args.out} must end in .png or .svg")
    if bool(args.logs) == bool(args.artifact) or bool(args.by or args.group) + args.stages + bool(args.artifact) > 1:
        raise Refused("give logs, perhaps with --by and --group; or logs with --stages; or --artifact FILE alone")
    runs = [(read_scored if args.stages else read_curve)(path) for path in args.logs]
    if args.artifact:
        figure = draw_artifact(args.artifact)
    elif args.stages:
        figure = draw_stages(by_variant(runs))
    else:
        short = len({run.path.stem for run in runs}) == len(runs)
        alone = {run.path.stem if short else str(run.path): [run] for run in runs}
        figure = draw_curves(by_variant(runs) if args.group else alone, [args.by] if args.by else ["step", "minutes"])
    picture = io.BytesIO()
    figure.savefig(picture, dpi=200, format=args.out.suffix[1:].lower())
    write_file(args.out, picture.getvalue())
    print(args.out, flush=True)


if __name__ == "__main__":
    try:
        main()
    except (Refused, OSError) as error:
        sys.exit(f"tools.plot: {error}")
