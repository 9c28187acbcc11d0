"""The runs of one submission, and what the contest's rules say of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from tools.record.artifacts import Check
from tools.record.source import Source
from tools.runlog import RunLog

CAP_BYTES, CAP_SECONDS, FEWEST_SEEDS = 16_000_000, 600.0, 3
SAME_RATIO = 6e-5  # bytes a token of one text: logs of records on one split differ by that, as they drop a tail or not
RECORD_DEVICE, RECORD_WORLD = "NVIDIA H100 80GB HBM3", 8  # how torch names the SXM board


class Split(NamedTuple):
    """A validation split of the contest: how many targets it can have, and its bytes a target, to within `slack`."""

    fewest: int
    most: int
    bytes_per_token: float
    slack: float


# By the name of the data set. Of sp8192 and CaseOps the whole stream is published (PRs #1804 and #2014), of the others
# what rows of 2,048 tokens take of it, as merged records log it; the tail that they drop moves the ratio by less.
SPLITS = {
    "fineweb10B_sp1024": Split(62_021_632, 62_021_632 + 2047, 2.435930, 1e-5),
    "fineweb10B_sp4096": Split(45_508_608, 45_514_752 + 2047, 3.319681, 1e-5),
    "fineweb10B_sp8192": Split(40_540_802, 40_540_802, 151_080_891 / 40_540_802, 1e-9),
    "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved":
        Split(47_853_343, 47_853_343, 151_080_645 / 47_853_343, 1e-9),
}


def is_contests(targets: int, bytes_per_token: float) -> bool:
    """Whether these can be a whole validation split of the contest, of any tokenizer; 0 targets where not known."""
    return any(abs(bytes_per_token - split.bytes_per_token) < SAME_RATIO and
               (not targets or split.fewest <= targets <= split.most) for split in SPLITS.values())


@dataclass(frozen=True)
class Entry:
    """The runs of one submission, which agree, and what is shipped with them."""

    runs: tuple[RunLog, ...]  # by seed
    settings: dict[str, str]  # resolved, as --describe prints them
    source: Source  # train_gpt.py as it ran
    shipped: bytes  # the same, or packed
    options: argparse.Namespace
    checks: dict[int, Check] = field(default_factory=dict)  # by seed; empty without --artifacts

    @property
    def first(self) -> RunLog:
        return self.runs[0]

    @property
    def is_whole(self) -> bool:
        """Whether every target of the validation split was scored, as far as the log tells how many it has."""
        run = self.first
        return int(self.settings["VAL_MAX_TOKENS"]) == 0 and run.val_split_targets in (0, run.targets)

    @property
    def is_contests(self) -> bool:
        """Whether the whole validation split of the contest was scored."""
        split = SPLITS.get(self.first.dataset)
        return self.is_whole and split is not None and split.fewest <= self.first.targets <= split.most

    def total_bytes(self, run: RunLog) -> int:
        return len(self.shipped) + run.model_bytes

    def most(self, value: Callable[[RunLog], float]) -> float:
        return max(map(value, self.runs))


def train_seconds(run: RunLog) -> float:
    return run.train_seconds


def eval_seconds(run: RunLog) -> float:
    return run.eval_seconds


def trained_in_time(entry: Entry, run: RunLog) -> bool:
    """Whether training ended within the contest's limit; one that passed a limit of its own of 600 s or more did not."""
    passed = run.train_over_limit_seconds > 0 and float(entry.settings["MAX_WALLCLOCK_SECONDS"]) >= CAP_SECONDS
    return run.train_seconds <= CAP_SECONDS and not passed


def hardware(run: RunLog) -> str:
    """What the device line says and no more."""
    cpu = run.device.startswith("cpu")
    return f"{run.world_size} process(es) on {run.device}, no GPU" if cpu else f"{run.world_size}x {run.device}"


def why_no_record(entry: Entry) -> list[str]:
    """What keeps these runs out of the contest's track of 10 minutes on 8xH100; empty if nothing does."""
    run, options = entry.first, entry.options
    rules = {
        f"{hardware(run)}, not 8xH100 SXM": (run.device, run.world_size) != (RECORD_DEVICE, RECORD_WORLD),
        f"data set {run.dataset}, not the contest's FineWeb": run.dataset not in SPLITS,
        f"first {run.targets:,} targets of the validation text": not entry.is_whole,
        f"{len(entry.runs)} seed(s)": len(entry.runs) < FEWEST_SEEDS,
        f"training of {entry.most(train_seconds):.3f} s": not all(trained_in_time(entry, run) for run in entry.runs),
        f"evaluation of {entry.most(eval_seconds):.3f} s": entry.most(eval_seconds) > CAP_SECONDS,
    }
    return [reason for reason, holds in rules.items() if holds] or ["by choice"] * options.non_record


def compliance(entry: Entry) -> dict[str, bool]:
    """By the names that records use. The first five are measured. The others hold for each committed train_gpt.py of
    this project; of another source nothing is claimed.
    """
    ours = entry.source.is_ours
    return dict(
        artifact_under_16mb=entry.most(entry.total_bytes) <= CAP_BYTES,
        train_under_600s=all(trained_in_time(entry, run) for run in entry.runs),
        eval_under_600s=entry.most(eval_seconds) <= CAP_SECONDS,
        three_seeds=len(entry.runs) >= FEWEST_SEEDS,
        full_validation_split=entry.is_contests,
        score_first_ttt=ours and "ttt" in entry.first.scores,
        no_slot=ours, no_pre_quant_ttt=ours, no_etlb=ours, no_ngram_cache=ours)


def technique(entry: Entry) -> str:
    """What ran, in one line, from its settings."""
    run, s = entry.first, entry.settings
    ttt = f"score-first test-time training, {s['TTT_EPOCHS']} epoch(s) a chunk"
    return (f"variant {run.variant}: {s['NUM_LAYERS']} layers x {s['MODEL_DIM']}, {run.parameters:,} parameters, "
            f"vocabulary {s['VOCAB_SIZE']}, {s['AVERAGING']} average, {run.kind}, sliding window of stride "
            f"{s['EVAL_STRIDE']}, {ttt if 'ttt' in run.scores else 'no test-time training'}")
