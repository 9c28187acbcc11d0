"""Logs of train_gpt.py -> a Markdown table, one row a variant: mean and spread over its seeds, in bits per byte.

    python -m tools.table logs/five/*.txt
"""

import statistics
from pathlib import Path

from tools import command_line, run_tool
from tools.files import Refused
from tools.loglines import Scored, read_scored
from tools.runlog import RunLog, check_byte_counts

COUNTS = {"parameters": lambda run: run.parameters, "code + model": lambda run: run.total_bytes}
STAGES = {"raw": "raw", "averaged": "averaged", "int6": "coded", "sliding": "sliding", "TTT": "ttt"}


def read(path: Path) -> RunLog | Scored:
    """A finished run with all stages. Raises Refused if it is not one."""
    run = read_scored(path)
    if "ttt" not in run.scores:
        raise Refused(f"{path} has no stage legal_ttt; the table needs it")
    return run


def mean_and_spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def table(runs: list[RunLog | Scored]) -> str:
    """Rows in the order in which the variants first come; the spread is the standard deviation over the runs."""
    head = ["variant", "runs", *COUNTS, *STAGES]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for variant in dict.fromkeys(run.variant for run in runs):
        mine = [run for run in runs if run.variant == variant]
        counts = [f"{statistics.mean(map(count, mine)):,.0f}" for count in COUNTS.values()]
        scores = [mean_and_spread([run.scores[stage].bpb for run in mine]) for stage in STAGES.values()]
        lines.append(f"| `{variant}` | {len(mine)} | " + " | ".join(counts + scores) + " |")
    return "\n".join(lines)


def main() -> None:
    cli = command_line("tools.table", __doc__)
    cli.add_argument("logs", nargs="+", type=Path)
    runs = [read(path) for path in cli.parse_args().logs]
    check_byte_counts(run for run in runs if isinstance(run, RunLog))
    print(table(runs), flush=True)


if __name__ == "__main__":
    run_tool("tools.table", main)
