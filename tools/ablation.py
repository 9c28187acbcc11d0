"""Parts of a system switched on or off, one at a time: runs of train_gpt.py -> a Markdown table with standard errors.

    python -m tools.ablation parts.json --out runs --seeds 1 2 3 --jobs 2

parts.json is {"base": {NAME: value}, "parts": {"what": {NAME: value}}}: the variables of all runs, and those that a part
adds. A run is OUT/PART-SEED; one that has ended is not made again. Each job has OMP_NUM_THREADS=1 unless the base says.
The difference of a part is the mean over seeds of its score less the base's of the same seed: below 0 it is better.
Runs have equal steps, ITERATIONS of the base. Equal seconds: parts whose step takes at least 2 % more or less than the
base's, by medians over seeds, run again with so many steps as the base's seconds allow, in OUT/PART-SEED-seconds.
"""

import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tools import ROOT, command_line, positive, run_tool
from tools.files import Refused, read_json
from tools.runlog import read_log

BASE, NEARLY = "base", 0.02


@dataclass(frozen=True, eq=False)
class Run:
    """One part with one seed, in a folder of its own."""

    part: str
    seed: int
    folder: Path
    env: dict[str, str]

    @property
    def log(self) -> Path:
        return self.folder / "logs" / "run.txt"


def plan(path: Path, out: Path, seeds: list[int]) -> list[Run]:
    """All runs, seed by seed, the base first. Raises Refused if the file has another shape."""
    try:
        table = read_json(path)
        parts = {BASE: {}} | table["parts"]
        shared = {name: str(value) for name, value in table["base"].items()}
        names = {part: re.sub(r"\W+", "_", part) for part in parts}
        if len(set(names.values())) < len(names):
            raise ValueError("two parts have one name")
        return [Run(part, seed, out / f"{names[part]}-{seed}", shared | {name: str(value) for name, value in env.items()})
                for seed in seeds for part, env in parts.items()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Refused(f'{path} is not {{"base": {{NAME: value}}, "parts": {{PART: {{NAME: value}}}}}}: {error}') from None


def finish(run: Run) -> None:
    """Make the run, unless it has ended already; says where one that fails has left its words."""
    if run.log.exists() and "\nRESULT " in run.log.read_text(errors="replace"):
        return
    run.log.unlink(missing_ok=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    own = dict(SEED=str(run.seed), OUTPUT_DIR=str(run.folder.resolve()), RUN_ID="run")
    env = dict(os.environ) | dict(OMP_NUM_THREADS="1") | run.env | own
    done = subprocess.run([sys.executable, ROOT / "train_gpt.py"], env=env, capture_output=True, text=True)
    (run.folder / "output.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        last = (done.stderr.strip() or "no words").splitlines()[-1]
        raise Refused(f"{run.part}, seed {run.seed}, ended with {done.returncode}: {last}")
    print(f"{run.part}, seed {run.seed}: done", file=sys.stderr, flush=True)


def milliseconds(runs: list[Run], part: str) -> float:
    """Of a step of that part, the median over its seeds."""
    logs = [read_log(run.log) for run in runs if run.part == part]
    return statistics.median(1e3 * log.train_seconds / log.steps for log in logs)


def at_equal_seconds(runs: list[Run]) -> list[Run]:
    """The same runs with so many steps as the base's seconds allow; where those are nearly as many, the run itself."""
    base, again = milliseconds(runs, BASE), []
    for run in runs:
        steps = read_log(run.log).steps
        allowed = round(steps * base / milliseconds(runs, run.part))
        if abs(allowed - steps) >= NEARLY * steps:
            run = replace(run, folder=run.folder.with_name(f"{run.folder.name}-seconds"), env=run.env | dict(ITERATIONS=str(allowed)))
        again.append(run)
    return again


def make(runs: list[Run], jobs: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        for ended in [pool.submit(finish, run) for run in runs]:
            ended.result()


def mean_and_error(values: list[float]) -> str:
    """The mean and its standard error, which one value has not."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.4f}{error}"


def table(runs: list[Run], again: list[Run]) -> str:
    """A row for each part; scores are those of the last stage that the runs have, in bits per byte."""
    logs = {run: read_log(run.log) for run in runs + again}
    stage = min((len(log.scores), list(log.scores)) for log in logs.values())[1][-1]
    bpb = {run: log.scores[stage].bpb for run, log in logs.items()}
    base = {run.seed: bpb[run] for run in runs if run.part == BASE}
    lines = [["part", "runs", "parameters", f"{stage}, bits per byte", f"against {BASE}", "ms a step"]]
    lines[0] += ["steps in equal seconds", f"against {BASE}"] if again else []
    for part in dict.fromkeys(run.part for run in runs):
        mine, equal = ([run for run in some if run.part == part] for some in (runs, again))
        changes = [mean_and_error([bpb[run] - base[run.seed] for run in some]) if part != BASE else "" for some in (mine, equal) if some]
        cells = [part, str(len(mine)), f"{logs[mine[0]].parameters:,}", f"{statistics.mean(map(bpb.get, mine)):.4f}", changes[0]]
        cells.append(f"{milliseconds(runs, part):.0f}")
        lines.append(cells + ([str(logs[equal[0]].steps), changes[1]] if again else []))
    lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    cli = command_line("tools.ablation", __doc__)
    cli.add_argument("parts", type=Path)
    cli.add_argument("--out", type=Path, required=True, help="folder of the runs")
    cli.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    cli.add_argument("--jobs", type=positive, default=1, help="runs at a time")
    cli.add_argument("--equal-seconds", action="store_true", help="make those runs, too")
    args = cli.parse_args()
    runs = plan(args.parts, args.out, args.seeds)
    make(runs, args.jobs)
    again = at_equal_seconds(runs) if args.equal_seconds else []
    make([run for run in again if run not in runs], args.jobs)
    print(table(runs, again), flush=True)


if __name__ == "__main__":
    run_tool("tools.ablation", main)
