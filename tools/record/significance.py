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
from tools.record.entry import SAME_RATIO, Entry, compliance, is_contests

# val_bpb by seed of rows of the leaderboard, by pull request, from the logs in their folders.
RECORDS = {
    "2135": (1.05679341, 1.05662016, 1.05610947),  # seeds 0, 314, 42; the last row
    "1493": (1.08079, 1.08103, 1.08118),  # seeds 42, 314, 999
    "549": (1.11923, 1.12002, 1.11889),  # seeds 1337, 42, 2025
    "414": (1.12278, 1.12360, 1.12357),  # seeds 1337, 42, 2024; without test-time training
}

# The contest's scripts end each stage of the evaluation with such a line, the stage that counts last.
SCORE = re.compile(r"^\S+ val_loss:(\d+\.\d{8}) val_bpb:(\d+\.\d{8})(?: eval_time:\d+ms)?\r?$", re.MULTILINE)
HASHES = re.compile(r'\b(val_sha256|val_bytes_sha256)"?: ?"?([0-9a-f]{64})\b')  # of a line of our logs, or of their RESULT
TARGETS = re.compile(r"^bytes_per_token:\S+ targets:(\d+) bytes:\d+(?: .*)?\r?$", re.MULTILINE)  # of our logs


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


class Published(NamedTuple):
    """A score to compare with, and what tells on which text it was scored; 0 where nothing does."""

    bpb: float
    bytes_per_token: float = 0.0
    targets: int = 0
    hashes: tuple[str, str] = ("", "")  # of the tokens, and of the bytes that each counts for, if the log tells both


def last_score(path: Path) -> Published:
    """The score in a log of any of the contest's scripts, or of ours: that of its last line of 8 decimals.

    Loss over bits per byte gives the bytes a token, to seven digits.
    """
    text = read_bytes(path).decode("utf-8", errors="replace")
    if not (found := SCORE.findall(text)) or not all(loss_bpb := [*map(float, found[-1])]):
        raise Refused(f"{path} has no line 'STAGE val_loss:... val_bpb:...' of 8 decimals; is it a log of a whole run?")
    targets = TARGETS.findall(text)
    hashes = dict(HASHES.findall(text))
    both = tuple(hashes.get(name, "") for name in ("val_sha256", "val_bytes_sha256"))
    return Published(loss_bpb[1], loss_bpb[0] / math.log(2) / loss_bpb[1], int(targets[-1]) if targets else 0, both)


def parse_against(text: str) -> tuple[Published, ...]:
    """Scores by seed: those of a name in RECORDS, a list of numbers, or those of a list of logs."""
    if text.removeprefix("#") in RECORDS:
        return tuple(map(Published, RECORDS[text.removeprefix("#")]))
    parts = text.split(",")
    try:
        found = tuple(Published(float(part)) for part in parts)
    except ValueError:
        found = tuple(map(last_score, map(Path, parts))) if any(Path(part).is_file() for part in parts) else ()
    if len(found) < 2 or not all(0 < one.bpb < 100 for one in found):
        raise Refused(f"--against {text}: give two or more scores in bits per byte, as in 1.0810,1.0812, or as many "
                      f"logs, or one of {', '.join(RECORDS)}")
    return found


def record_of(text: str) -> str:
    """The pull request whose scores --against names, or gives as numbers; empty if it is none of RECORDS."""
    if (name := text.removeprefix("#")) in RECORDS:
        return name
    given = {one.bpb for one in parse_against(text)}
    return next((name for name, values in RECORDS.items() if given <= {*values}), "")


def their_text(entry: Entry) -> str:
    """On which text the other scores stand, in one sentence. Raises Refused if it is known to be another one.

    Bits per byte of one text compare whatever its tokens are. The whole validation split of the contest is one text.
    """
    run, given = entry.first, entry.options.against
    ours, whole = f"{run.dataset}, {run.targets} targets", compliance(entry)["full_validation_split"]
    if name := record_of(given):
        if not whole:
            raise Refused(f"--against {given}: that record is scored on the contest's whole validation split, these "
                          f"logs are not ({ours})")
        return f"These and #{name} are scored on the contest's whole validation split, here as {run.dataset}"
    ratio, theirs = run.bytes / run.targets, parse_against(given)
    if not theirs[0].bytes_per_token:
        return (f"Numbers do not tell on which text they were scored: the test holds only if it is that of these logs "
                f"({ours}, {run.bytes} bytes)")
    for path, one in zip(given.split(","), theirs):
        what = f"{f'{one.targets} targets, ' if one.targets else ''}{one.bytes_per_token:.6f} bytes a token"
        contests = is_contests(one.targets, one.bytes_per_token)
        same = abs(one.bytes_per_token - ratio) < SAME_RATIO and one.targets in (0, run.targets)
        if contests != whole or not (contests or same):
            raise Refused(f"--against {path}: it is scored on another validation text ({what}) than these logs "
                          f"({ours}, {ratio:.6f} bytes a token); give logs of the same text")
        if all(one.hashes) and run.val_sha256 == one.hashes[0] and run.val_bytes_sha256 not in ("", one.hashes[1]):
            raise Refused(f"--against {path}: it and {run.path} score the same tokens but count other bytes for them (val_bytes_sha256)")
    kind = "the contest's whole validation split" if whole else "a text of as many bytes a token"
    return f"Both are scored on {kind}, by the losses and scores in those logs"


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
    their_text(entry)
    theirs = tuple(one.bpb for one in parse_against(entry.options.against))
    return significance([run.final.bpb for run in entry.runs], theirs, entry.first.bytes / entry.first.targets)
