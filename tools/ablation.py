"""Parts of a system switched on or off, one at a time: runs of train_gpt.py -> a Markdown table with standard errors.

    python -m tools.ablation parts.json --out runs --seeds 1 2 3 --jobs 2

parts.json is {"base": {NAME: value}, "parts": {"what": {NAME: value}}}: the variables of all runs, and those that a part
adds. A run is OUT/PART-SEED; one that has ended is not made again. Each job has OMP_NUM_THREADS=1 unless the base says.
The difference of a part is the mean over seeds of its score less the base's of the same seed: below 0 it is better.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tools import ROOT, command_line
from tools.files import Refused, read_bytes
from tools.loglines import read_scored

BASE = "base"


class Run(NamedTuple):
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
        table = json.loads(read_bytes(path))
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
    if run.log.exists() and "\nRESULT " in run.log.read_text():
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


def mean_and_error(values: list[float]) -> str:
    """The mean and its standard error, which one value has not."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.4f}{error}"


def table(runs: list[Run]) -> str:
    """A row for each part; scores are those of the last stage that the runs have, in bits per byte."""
    scored = {(run.part, run.seed): read_scored(run.log) for run in runs}
    stage = min((len(found.scores), list(found.scores)) for found in scored.values())[1][-1]
    bpb = {key: found.scores[stage].bpb for key, found in scored.items()}
    lines = [f"| part | runs | parameters | {stage}, bits per byte | against {BASE} |", "|---|---:|---:|---:|---:|"]
    for part in dict.fromkeys(run.part for run in runs):
        seeds = [run.seed for run in runs if run.part == part]
        change = mean_and_error([bpb[part, seed] - bpb[BASE, seed] for seed in seeds]) if part != BASE else ""
        mean = statistics.mean(bpb[part, seed] for seed in seeds)
        lines.append(f"| {part} | {len(seeds)} | {scored[part, seeds[0]].parameters:,} | {mean:.4f} | {change} |")
    return "\n".join(lines)


def main() -> None:
    cli = command_line("tools.ablation", __doc__)
    cli.add_argument("parts", type=Path)
    cli.add_argument("--out", type=Path, required=True, help="folder of the runs")
    cli.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    cli.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = cli.parse_args()
    runs = plan(args.parts, args.out, args.seeds)
    with ThreadPoolExecutor(args.jobs) as pool:
        for ended in [pool.submit(finish, run) for run in runs]:
            ended.result()
    print(table(runs), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (Refused, OSError) as error:
        sys.exit(f"tools.ablation: {error}")
