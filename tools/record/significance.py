"""Our scores by seed against published ones: Welch's test, with the margins that entries read in the rules."""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import NamedTuple

from scipy import stats

from tools.files import Refused, read_bytes
from tools.record.entry import Entry, compliance

# val_bpb by seed of rows of the leaderboard, by pull request, from the logs in their folders.
RECORDS = {
    "2135": (1.05679341, 1.05662016, 1.05610947),  # seeds 0, 314, 42; the last row
    "1493": (1.08079, 1.08103, 1.08118),  # seeds 42, 314, 999
    "549": (1.11923, 1.12002, 1.11889),  # seeds 1337, 42, 2025
    "414": (1.12278, 1.12360, 1.12357),  # seeds 1337, 42, 2024; without test-time training
}

# The contest's scripts end each stage of the evaluation with such a line, the stage that counts last.
SCORE = re.compile(r"^\S+ val_loss:\d+\.\d{8} val_bpb:(\d+\.\d{8})(?: eval_time:\d+ms)?\r?$", re.MULTILINE)


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which a single value does not have."""
    values = [*values]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


class Welch(NamedTuple):
    """Welch's one-sided test that one mean is lower than another by more than a margin."""

    reading: str
    margin: float  # bits a byte
    t: float
    df: float
    p: float


def last_score(path: Path) -> float:
    """The score in a log of any of the contest's scripts, or of ours: that of its last line of 8 decimals."""
    if not (found := SCORE.findall(read_bytes(path).decode("utf-8", errors="replace"))):
        raise Refused(f"{path} has no line 'STAGE val_loss:... val_bpb:...' of 8 decimals; is it a log of a whole run?")
    return float(found[-1])


def parse_against(text: str) -> tuple[float, ...]:
    """Scores by seed: those of a name in RECORDS, a list of numbers, or those of a list of logs."""
    if text.removeprefix("#") in RECORDS:
        return RECORDS[text.removeprefix("#")]
    parts = text.split(",")
    try:
        values = tuple(map(float, parts))
    except ValueError:
        values = tuple(map(last_score, map(Path, parts))) if any(Path(part).is_file() for part in parts) else ()
    if len(values) < 2 or not all(0 < value < 100 for value in values):
        raise Refused(f"--against {text}: give two or more scores in bits per byte, as in 1.0810,1.0812, or as many "
                      f"logs, or one of {', '.join(RECORDS)}")
    return values


def against(options: argparse.Namespace) -> str:
    """What --against names, as it is published: of logs the names without the folders."""
    return ",".join(PurePath(part).name for part in options.against.split(","))


def significance(ours: list[float], theirs: tuple[float, ...], bytes_per_token: float) -> list[Welch]:
    """Without a margin, and with the rules' 0.005 nats in the three ways in which entries read them."""
    if len(ours) < 2 or len({*ours}) == len({*theirs}) == 1:
        raise Refused("--against needs two or more seeds, and scores that differ: one number has no spread")
    margins = {"nothing": 0.0, "0.005 nats per token": 0.005 / math.log(2) / bytes_per_token,
               "0.005 bits per byte": 0.005, "0.005 nats per byte": 0.005 / math.log(2)}
    tests = []
    for reading, margin in margins.items():
        test = stats.ttest_ind([v + margin for v in ours], theirs, equal_var=False, alternative="less")
        tests.append(Welch(reading, margin, -float(test.statistic), float(test.df), float(test.pvalue)))
    return tests


def tests_of(entry: Entry) -> list[Welch]:
    if not entry.options.against:
        return []
    ratio = entry.first.bytes / entry.first.targets
    if entry.options.against.removeprefix("#") in RECORDS and not compliance(entry)["full_validation_split"]:
        raise Refused(f"--against {entry.options.against}: that record is scored on the contest's whole validation "
                      f"split, these logs are not ({entry.first.dataset}, {entry.first.targets} targets)")
    return significance([run.final.bpb for run in entry.runs], parse_against(entry.options.against), ratio)
