"""Logs of train_gpt.py -> a Markdown table, one row a variant: mean and spread over its seeds, in bits per byte.

    python tools/table.py logs/five/*.txt
"""

import argparse
import re
import statistics
from pathlib import Path

STAGES = {"raw": r"^DIAGNOSTIC raw .*val_bpb:([\d.]+)", "averaged": r"^DIAGNOSTIC post_\w+ .*val_bpb:([\d.]+)",
          "int6": r"^final_int\d_roundtrip_exact .*val_bpb:([\d.]+)", "sliding": r"^final_int\d_sliding_window_exact .*val_bpb:([\d.]+)",
          "TTT": r"^legal_ttt_exact .*val_bpb:([\d.]+)"}
COUNTS = {"parameters": r"^model_params:(\d+)", "code + model": r"^Total submission size \S+ (\d+) bytes"}


def read(path: Path) -> dict[str, str]:
    """The variant of a finished run, its counts and the score of each stage. Raises SystemExit if a line is missing."""
    try:
        text, found = path.read_text(encoding="utf-8"), {}
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"table.py: cannot read {path}: {error}") from None
    for name, pattern in {"variant": r"^variant:(\w+)", **COUNTS, **STAGES}.items():
        match = re.search(pattern, text, re.M)
        if not match:
            raise SystemExit(f"table.py: {path} has no {name}; it is not the log of a finished run")
        found[name] = match[1]
    return found


def mean_and_spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def table(runs: list[dict[str, str]]) -> str:
    """Rows in the order in which the variants first come; the spread is the standard deviation over the runs."""
    lines = ["| variant | runs | " + " | ".join([*COUNTS, *STAGES]) + " |", "|---|" + "---:|" * (1 + len(COUNTS) + len(STAGES))]
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == variant]
        counts = [f"{statistics.mean(int(run[name]) for run in mine):,.0f}" for name in COUNTS]
        scores = [mean_and_spread([float(run[name]) for run in mine]) for name in STAGES]
        lines.append(f"| `{variant}` | {len(mine)} | " + " | ".join(counts + scores) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    print(table([read(path) for path in parser.parse_args().logs]))
