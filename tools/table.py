"""Prints a Markdown table of logs of train_gpt.py: one row per variant, mean and standard deviation over its seeds.

    python -m tools.table logs/five/*.txt

Scores are in bits per byte.
"""

import statistics
from pathlib import Path

from tools import command_line, markdown, run_tool
from tools.files import Refused
from tools.record.logs import RunLog, check_byte_counts, read_scored

STAGES = {"raw": "raw", "averaged": "averaged", "int6": "coded", "sliding": "sliding", "TTT": "ttt"}


def read(path: Path) -> RunLog:
    """Reads the log of a finished run. Raises Refused if a stage is missing."""
    run = read_scored(path)
    if "ttt" not in run.scores:
        raise Refused(f"{path} has no stage legal_ttt; the table needs it")
    return run


def table(runs: list[RunLog]) -> str:
    """Variants keep the order of their first log."""
    rows = []
    for variant in dict.fromkeys(run.variant for run in runs):
        group = [run for run in runs if run.variant == variant]
        counts = [statistics.mean(run.parameters for run in group), statistics.mean(run.total_bytes for run in group)]
        rows.append([f"`{variant}`", str(len(group)), *(f"{count:,.0f}" for count in counts)])
        for stage in STAGES.values():
            bpb = [run.scores[stage].bpb for run in group]
            rows[-1].append(f"{statistics.mean(bpb):.4f}" + (f" ± {statistics.stdev(bpb):.4f}" if bpb[1:] else ""))
    return markdown(["variant", "runs", "parameters", "code + model", *STAGES], rows)


def main() -> None:
    cli = command_line("tools.table", __doc__)
    cli.add_argument("logs", nargs="+", type=Path)
    runs = [read(path) for path in cli.parse_args().logs]
    check_byte_counts(run for run in runs if isinstance(run, RunLog))
    print(table(runs), flush=True)


if __name__ == "__main__":
    run_tool("tools.table", main)
