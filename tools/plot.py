"""Draw training and validation loss of one or several logs of train_gpt.py, by step and by time.

    python tools/plot.py logs/a.txt logs/b.txt -o curve.png
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LINE = re.compile(r"^step:(\d+)/\d+ (train|val)_loss:([\d.]+) .*train_time:(\d+)ms", re.MULTILINE)
STAGE = re.compile(r"^(\w+)_exact val_loss:[\d.]+ val_bpb:([\d.]+)$", re.MULTILINE)


def read_log(path: Path) -> tuple[dict[str, list[tuple[int, float, float]]], dict[str, float]]:
    """(points (step, minutes, loss) of `train` and `val`, bpb of each final stage) of a log; exits if it has no step."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"plot.py: cannot read {path}: {error}")
    points: dict[str, list[tuple[int, float, float]]] = dict(train=[], val=[])
    for step, kind, loss, milliseconds in LINE.findall(text):
        points[kind].append((int(step), int(milliseconds) / 60_000, float(loss)))
    if not points["train"]:
        sys.exit(f"plot.py: {path} has no line 'step:... train_loss:...'; is it a log of train_gpt.py?")
    return points, {name: float(bpb) for name, bpb in STAGE.findall(text)}


def draw(paths: list[Path], out: Path) -> None:
    """Two panels, the same losses over steps and over minutes; the legend carries each run's final bits per byte."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for i, path in enumerate(paths):
        points, stages = read_log(path)
        final = f", {list(stages.values())[-1]:.4f} bpb" if stages else ""
        for kind, style in (("train", dict(alpha=0.45, linewidth=1)), ("val", dict(marker="o", markersize=3.5, linewidth=1.5))):
            label = f"{path.stem} ({kind}{final if kind == 'val' else ''})"
            for axis, column in zip(axes, (0, 1)):
                if points[kind]:
                    axis.plot([p[column] for p in points[kind]], [p[2] for p in points[kind]], color=f"C{i}", label=label, **style)
    lowest = min(line.get_ydata().min() for line in axes[0].lines)
    axes[0].set_ylim(lowest - 0.1, lowest + 2.5)
    axes[0].set_ylabel("loss, nats per token")
    for axis, name in zip(axes, ("step", "training time, minutes")):
        axis.set_xlabel(name)
        axis.grid(alpha=0.25)
    axes[1].legend(fontsize=8, frameon=False)
    figure.savefig(out, dpi=150)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("logs", nargs="+", type=Path)
    cli.add_argument("-o", "--out", type=Path, default=Path("curve.png"), help="PNG or SVG (default: curve.png)")
    args = cli.parse_args()
    draw(args.logs, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
