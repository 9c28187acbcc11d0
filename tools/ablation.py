"""Runs of train_gpt.py with parts switched on or off, one at a time -> a Markdown table with standard errors.

    python -m tools.ablation parts.json --out runs --seeds 1 2 3 --jobs 2

parts.json is {"base": {OPTION: value}, "parts": {PART: {OPTION: value}}}. A run is OUT/PART-SEED and is not repeated
once finished. OMP_NUM_THREADS is 1 unless the base sets it. The result of a part is the mean over seeds of its score
minus that of the base, so below 0 is better. All runs have equal steps. With --equal-seconds, a part whose steps take
2 % more or less time also runs for as many steps as the base's time allows, in OUT/PART-SEED-seconds.
"""

import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tools import ROOT, command_line, markdown, positive, run_tool
from tools.files import Refused, read_json
from tools.record.logs import RunLog, read_log

BASE = "base"


@dataclass(frozen=True, eq=False)
class Run:
    """One part with one seed, in its own folder."""

    part: str
    seed: int
    folder: Path
    env: dict[str, str]


def plan(path: Path, out: Path, seeds: list[int]) -> list[Run]:
    """All runs, seed by seed, the base first. Raises Refused for a file of another form."""
    try:
        table = read_json(path)
        parts = {BASE: {}} | table["parts"]
        names = {part: re.sub(r"\W+", "_", part) for part in parts}
        if len({*names.values()}) < len(names):
            raise ValueError("two parts have one name")
        options = {part: {name: str(value) for name, value in (table["base"] | parts[part]).items()} for part in parts}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Refused(f'{path} is not {{"base": {{OPTION: value}}, "parts": {{PART: {{...}}}}}}: {error}') from None
    return [Run(part, seed, out / f"{names[part]}-{seed}", options[part]) for seed in seeds for part in parts]


def finish(run: Run) -> RunLog:
    """The log of a run, which is made unless it is finished. Raises Refused with the last line of a run that fails."""
    log = run.folder / "logs" / "run.txt"
    if not log.exists() or "\nRESULT " not in log.read_text(errors="replace"):
        log.unlink(missing_ok=True)
        run.folder.mkdir(parents=True, exist_ok=True)
        own = dict(SEED=str(run.seed), OUTPUT_DIR=str(run.folder.resolve()), RUN_ID="run")
        env = os.environ | dict(OMP_NUM_THREADS="1") | run.env | own
        done = subprocess.run([sys.executable, ROOT / "train_gpt.py"], env=env, capture_output=True, text=True)
        (run.folder / "output.txt").write_text(done.stdout + done.stderr)
        if done.returncode:
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            raise Refused(f"{run.part}, seed {run.seed}, ended with {done.returncode}: {last}")
        print(f"{run.part}, seed {run.seed}: done", file=sys.stderr, flush=True)
    return read_log(log)


def finish_all(runs: list[Run], jobs: int) -> dict[Run, RunLog]:
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(runs, pool.map(finish, runs)))


def step_ms(logs: dict[Run, RunLog], part: str) -> float:
    """Milliseconds per step of a part, the median over its seeds."""
    return statistics.median(1000 * log.train_seconds / log.steps for run, log in logs.items() if run.part == part)


def at_equal_seconds(logs: dict[Run, RunLog]) -> list[Run]:
    """The runs with as many steps as the base's time allows; a run that has about as many stays as it is."""
    equal = []
    for run, log in logs.items():
        allowed = round(log.steps * step_ms(logs, BASE) / step_ms(logs, run.part))
        if abs(allowed - log.steps) >= 0.02 * log.steps:
            folder = run.folder.with_name(f"{run.folder.name}-seconds")
            run = replace(run, folder=folder, env=run.env | dict(ITERATIONS=str(allowed)))
        equal.append(run)
    return equal


def table(logs: dict[Run, RunLog], equal: dict[Run, RunLog]) -> str:
    """One row per part, with scores in bits per byte of the last stage that all runs have."""
    stage = min((len(log.scores), [*log.scores]) for log in [*logs.values(), *equal.values()])[1][-1]
    base = {run.seed: log.scores[stage].bpb for run, log in logs.items() if run.part == BASE}

    def change(mine: dict[Run, RunLog]) -> str:
        values = [log.scores[stage].bpb - base[run.seed] for run, log in mine.items()]
        error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):+.4f}{error}"

    rows, head = [], ["part", "runs", "parameters", f"{stage}, bits per byte", f"against {BASE}", "ms a step"]
    head += ["steps in equal seconds", f"against {BASE}"] if equal else []
    for part in dict.fromkeys(run.part for run in logs):
        mine, timed = ({run: log for run, log in some.items() if run.part == part} for some in (logs, equal))
        some_log, mean = [*mine.values()][0], statistics.mean(log.scores[stage].bpb for log in mine.values())
        row = [part, str(len(mine)), f"{some_log.parameters:,}", f"{mean:.4f}", "" if part == BASE else change(mine)]
        row.append(f"{step_ms(logs, part):.0f}")
        row += [str([*timed.values()][0].steps), "" if part == BASE else change(timed)] if equal else []
        rows.append(row)
    return markdown(head, rows)


def main() -> None:
    cli = command_line("tools.ablation", __doc__)
    cli.add_argument("parts", type=Path)
    cli.add_argument("--out", type=Path, required=True, help="folder of the runs")
    cli.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    cli.add_argument("--jobs", type=positive, default=1, help="runs at a time")
    cli.add_argument("--equal-seconds", action="store_true", help="also compare at equal training time")
    args = cli.parse_args()
    logs = finish_all(plan(args.parts, args.out, args.seeds), args.jobs)
    equal = finish_all(at_equal_seconds(logs), args.jobs) if args.equal_seconds else {}
    print(table(logs, equal), flush=True)


if __name__ == "__main__":
    run_tool("tools.ablation", main)
