"""Logs of finished runs of train_gpt.py, one a seed -> the folder of the contest's pull request.

    python tools/record.py logs/seed1.txt logs/seed2.txt logs/seed3.txt --name card --author NAME --against 2135
    python tools/record.py logs/run.txt --name card --non-record --submission-only submission.json
    python tools/record.py --retract records/2026-04-30_card --reason "scored after it was trained on"

The whole way, from text to a folder that runs, stands in logs/rehearsal/README.md. What is counted is the train_gpt.py
that is shipped. --pack ships a packed one, while the logs tell the bytes of the plain one that wrote them. To have the
same in both, and to let FIT use the bytes that packing frees, pack first, run that file, and name it with --script.

Logs are published as they are, but for the folders of absolute paths, which become /path/to. Nothing is written unless
every log is whole, agrees with itself, with the others, with the script and with the rules.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePath
from typing import NamedTuple

from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from runlog import Refused, RunLog, public_path, read_log, write_file  # noqa: E402

CAP_BYTES, CAP_SECONDS, FEWEST_SEEDS = 16_000_000, 600.0, 3
RECORD_DEVICE, RECORD_WORLD = "NVIDIA H100 80GB HBM3", 8  # how torch names the SXM board
NOT_SETTINGS = ("SEED", "RUN_ID", "OUTPUT_DIR", "ARTIFACT", "AUDIT")  # what may differ among the seeds


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

# val_bpb by seed of rows of the leaderboard, by pull request, from the logs in their folders.
RECORDS = {
    "2135": (1.05679341, 1.05662016, 1.05610947),  # seeds 0, 314, 42; the last row
    "1493": (1.08079, 1.08103, 1.08118),  # seeds 42, 314, 999
    "549": (1.11923, 1.12002, 1.11889),  # seeds 1337, 42, 2025
    "414": (1.12278, 1.12360, 1.12357),  # seeds 1337, 42, 2024; without test-time training
}


@dataclass(frozen=True)
class Entry:
    """The runs of one submission, which agree, and what is shipped with them."""

    runs: tuple[RunLog, ...]  # by seed
    settings: dict[str, str]  # resolved, as --describe prints them
    source: bytes  # train_gpt.py as it ran
    shipped: bytes  # the same, or packed
    options: argparse.Namespace

    @property
    def first(self) -> RunLog:
        return self.runs[0]

    @property
    def is_whole(self) -> bool:
        """Whether no option cut the validation text."""
        return int(self.settings["VAL_MAX_TOKENS"]) == 0

    def total_bytes(self, run: RunLog) -> int:
        return len(self.shipped) + run.model_bytes

    def most(self, value: Callable[[RunLog], float]) -> float:
        return max(map(value, self.runs))


def train_seconds(run: RunLog) -> float:
    return run.train_seconds


def eval_seconds(run: RunLog) -> float:
    return run.eval_seconds


# ----------------------------------------
# What is refused.

def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from None


def check_script(run: RunLog, script: Path, source: bytes) -> None:
    sha256 = hashlib.sha256(source).hexdigest()
    if run.sha256 != sha256:
        run.refuse("source", f"written by source {run.sha256[:12]}, but {script} is {sha256[:12]}; --script names the "
                   "one that ran")


def configuration(run: RunLog) -> dict[str, str]:
    """What the environment set, as it is published: the folders of absolute paths may differ among machines, too."""
    return {name: public_path(name, value) for name, value in run.overrides.items() if name not in NOT_SETTINGS}


def check_same(runs: tuple[RunLog, ...]) -> None:
    """All runs are one configuration on one kind of machine and on one data set, under different seeds."""
    first, seeds = runs[0], {}
    for run in runs:
        if run.seed in seeds:
            run.refuse("variant", f"seed {run.seed} is that of {seeds[run.seed].path}, too")
        seeds[run.seed] = run
        ours, theirs = configuration(run), configuration(first)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                run.refuse("variant", f"{name}={ours.get(name, '(default)')}, but {theirs.get(name, '(default)')} in "
                           f"{first.path}; all seeds need one configuration")
        for line, *names in (("variant", "variant"), ("versions", "versions"), ("device", "device", "world_size"),
                             ("train_loader", "dataset", "train_shards"), ("bytes_per_token", "targets", "bytes"),
                             ("model_params", "parameters", "backend")):
            for name in names:
                if getattr(run, name) != getattr(first, name):
                    run.refuse(line, f"{name} {getattr(run, name)}, but {getattr(first, name)} in {first.path}; all "
                               "seeds need one configuration")


def resolve(script: Path, run: RunLog) -> dict[str, str]:
    """Every setting of a run, and model_params, as the script itself resolves the overrides of the log."""
    kept = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "SYSTEMROOT")
    env = {name: value for name, value in os.environ.items() if name in kept} | run.overrides
    done = subprocess.run([sys.executable, str(script), "--describe"], env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        run.refuse("variant", f"{script} does not take these settings: {last}")
    settings = dict(re.split("[=:]", line, maxsplit=1) for line in done.stdout.splitlines())
    if stray := sorted(run.overrides.keys() - settings.keys()):
        run.refuse("variant", f"{stray[0]} is no option of {script}")
    return settings


def check_settings(run: RunLog, settings: dict[str, str]) -> None:
    """The log has the numbers and the stages that these settings lead to."""
    epochs, most = int(settings["TTT_EPOCHS"]), int(settings["VAL_MAX_TOKENS"])
    for line, name, got in (("training ended", "ITERATIONS", run.iterations), ("artifact", "EVAL_STRIDE", run.stride),
                            ("artifact", "TTT_CHUNK_TOKENS", run.ttt_chunk),
                            ("model_params", "model_params", run.parameters)):
        if got != int(settings[name]):
            run.refuse(line, f"{name} is {got}, but the settings of the run make it {settings[name]}")
    if ("ttt" in run.scores) != (epochs > 0):
        run.refuse("total_eval_time", f"the stage legal_ttt is {'there' if 'ttt' in run.scores else 'missing'} before "
                   f"this line, but TTT_EPOCHS={epochs}")
    if 0 < most < run.targets:
        run.refuse("val_loader", f"{run.targets} targets, but VAL_MAX_TOKENS={most}")


def check_steps(run: RunLog, settings: dict[str, str]) -> None:
    """Every step that these settings let the script log has its line, and no other."""
    every, validate = int(settings["TRAIN_LOG_EVERY"]), int(settings["VAL_LOSS_EVERY"])
    trained = {step for step in range(1, run.steps + 1) if step <= 10 or step % every == 0}
    validated = {*range(validate, run.steps, validate)} if validate else {*()}
    for kind, got, due in (("train_loss", run.train_lines, trained), ("val_loss", run.val_lines, validated)):
        if wrong := sorted({*got} ^ due):
            run.refuse("training ended", f"before this line step {wrong[0]} has {'no' if wrong[0] in due else 'a'} "
                       f"{kind} line, against TRAIN_LOG_EVERY={every} VAL_LOSS_EVERY={validate}; is the log cut?")


def check_signature(run: RunLog, is_whole: bool) -> None:
    """On the contest's data, targets and bytes must be those of its validation split."""
    split, ratio = SPLITS.get(run.dataset), run.bytes / run.targets
    if split and is_whole and abs(ratio - split.bytes_per_token) > split.slack:
        run.refuse("bytes_per_token", f"{ratio:.6f} bytes a token, but {run.dataset} has {split.bytes_per_token:.6f}; "
                   "bytes are miscounted, or it is another text")
    if split and is_whole and not split.fewest <= run.targets <= split.most:
        run.refuse("bytes_per_token", f"{run.targets} targets, but the validation split of {run.dataset} has "
                   f"{split.fewest} to {split.most}")


def check_limits(entry: Entry) -> None:
    """The contest's caps, on every seed; with --non-record that on bytes alone."""
    free = entry.options.non_record
    for run in entry.runs:
        if (excess := entry.total_bytes(run) - CAP_BYTES) > 0:
            run.refuse("Total submission size", f"code + model = {len(entry.shipped)} + {run.model_bytes} bytes, "
                       f"{excess} over {CAP_BYTES}")
        for line, what, seconds in (("training ended", "training", run.train_seconds),
                                    ("total_eval_time", "evaluation", run.eval_seconds)):
            if seconds > CAP_SECONDS and not free:
                run.refuse(line, f"{what} took {seconds:.3f} s, over {CAP_SECONDS:.0f} s (--non-record: no limit)")
    if len(entry.runs) < FEWEST_SEEDS and not free:
        entry.runs[-1].refuse("variant", f"with this one {len(entry.runs)} seed(s), but a record needs {FEWEST_SEEDS} "
                              "(--non-record: one will do)")


# ----------------------------------------
# What the numbers say.

# The contest's scripts end each stage of the evaluation with such a line, the stage that counts last.
SCORE = re.compile(r"^\S+ val_loss:\d+\.\d{8} val_bpb:(\d+\.\d{8})(?: eval_time:\d+ms)?\r?$", re.MULTILINE)


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which a single value does not have."""
    values = [*values]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


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
        f"training of {entry.most(train_seconds):.1f} s": entry.most(train_seconds) > CAP_SECONDS,
        f"evaluation of {entry.most(eval_seconds):.1f} s": entry.most(eval_seconds) > CAP_SECONDS,
    }
    return [reason for reason, holds in rules.items() if holds] or ["by choice"] * options.non_record


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


def compliance(entry: Entry) -> dict[str, bool]:
    """The first five are measured. The last four are what train_gpt.py does as it stands in this project; who
    changes its evaluation answers for them.
    """
    return dict(
        artifact_under_16mb=entry.most(entry.total_bytes) <= CAP_BYTES,
        training_under_600s=entry.most(train_seconds) <= CAP_SECONDS,
        eval_under_600s=entry.most(eval_seconds) <= CAP_SECONDS,
        three_seeds=len(entry.runs) >= FEWEST_SEEDS,
        full_validation_split=entry.is_whole and entry.first.dataset in SPLITS,
        score_first_ttt=True, no_slot=True, no_pre_quant_ttt=True, no_ngram_cache=True)


def technique(entry: Entry) -> str:
    """What ran, in one line, from its settings."""
    run, s = entry.first, entry.settings
    ttt = f"score-first test-time training, {s['TTT_EPOCHS']} epoch(s) a chunk"
    return (f"variant {run.variant}: {s['NUM_LAYERS']} layers x {s['MODEL_DIM']}, {run.parameters:,} parameters, "
            f"vocabulary {s['VOCAB_SIZE']}, {s['AVERAGING']} average, {run.kind}, sliding window of stride "
            f"{s['EVAL_STRIDE']}, {ttt if 'ttt' in run.scores else 'no test-time training'}")


# ----------------------------------------
# submission.json

def seed_result(entry: Entry, run: RunLog) -> dict[str, float]:
    scores = run.scores
    return dict(
        val_loss=run.final.loss, val_bpb=run.final.bpb, artifact_bytes=entry.total_bytes(run),
        bytes_model=run.model_bytes, steps=run.steps, step_avg_ms=round(1000 * run.train_seconds / run.steps, 2),
        train_time_s=run.train_seconds, train_wallclock_ms=round(1000 * run.train_seconds),
        eval_time_s=run.eval_seconds, val_tokens=run.targets, target_tokens=run.targets, target_bytes=run.bytes,
        pre_quant_val_loss=scores["averaged"].loss, pre_quant_val_bpb=scores["averaged"].bpb,
        quantized_val_bpb=scores["coded"].bpb, sliding_val_bpb=scores["sliding"].bpb)


def tests_as_json(entry: Entry) -> dict:
    tests = [dict(lower_by_more_than=test.reading, margin_bpb=test.margin, t_statistic=test.t, welch_df=test.df,
                  p_value=test.p) for test in tests_of(entry)]
    return dict(against=against(entry.options), significance=tests) if tests else {}


def submission(entry: Entry, logs: list[str]) -> dict:
    """The contents of submission.json; `logs` are the logs' paths as a reader of the file sees them."""
    run, options, reasons = entry.first, entry.options, "; ".join(why_no_record(entry))
    results = {str(r.seed): seed_result(entry, r) for r in entry.runs}
    both = {key: spread(result[key] for result in results.values()) for key in results[str(run.seed)]}
    mean = {key: round(value, 8) for key, (value, _) in both.items()}
    std = {key: value and round(value, 8) for key, (_, value) in both.items()}
    between = ("pre_quant_val_loss", "pre_quant_val_bpb", "quantized_val_bpb", "sliding_val_bpb")
    most = entry.most(entry.total_bytes)
    return dict(
        author=options.author, github_id=options.github_id, name=options.name,
        blurb=options.blurb or technique(entry), date=options.date,
        track=f"non-record: {reasons}" if reasons else "10min_16mb",
        val_bpb=mean["val_bpb"], val_bpb_std=std["val_bpb"], val_loss=mean["val_loss"], val_loss_std=std["val_loss"],
        **{key: mean[key] for key in between}, seeds=[r.seed for r in entry.runs], seed_results=results,
        bytes_total=most, bytes_code=len(entry.shipped), artifact_bytes_mean=round(mean["artifact_bytes"]),
        artifact_bytes_max=most, train_steps_mean=mean["steps"], step_avg_ms_mean=mean["step_avg_ms"],
        train_time_s_mean=mean["train_time_s"], eval_time_s_mean=mean["eval_time_s"], hardware=hardware(run),
        pytorch_version=run.torch, dataset=run.dataset, model_params=run.parameters, source_sha256=run.sha256,
        technique_summary=technique(entry), compliance=compliance(entry), **tests_as_json(entry), logs=logs)


def as_json(contents: dict) -> bytes:
    return (json.dumps(contents, indent=2, ensure_ascii=False) + "\n").encode()


# ----------------------------------------
# README.md

PAGE = """# {name}: val_bpb {score}

{blurb}

{track}

## Results

Bits per byte of each stage, from the logs; the last stage is the score. The deviation is that of a sample.

{results}
{significance}
## Command

Once for each seed, inside this folder, after `pip install -r requirements.txt`:

    {command}

{data}.

It writes `final_model.int6.ptz`; with `EVAL_ONLY=1 ARTIFACT=final_model.int6.ptz` before it, it scores that again.

## Timing budget

{timing}

## Compliance

{compliance}

## What ran

{what}
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---:"] * len(head), *rows))


def stage_name(entry: Entry, stage: str) -> str:
    return dict(coded="reloaded " + entry.first.kind.partition("+")[0], ttt="TTT").get(stage, stage)


def results_table(entry: Entry) -> str:
    """A row a seed, then mean and sample standard deviation; 8 decimals where the logs have them, else 4."""
    columns: dict[str, tuple[Callable[[RunLog], float], str]] = {
        "steps": (lambda run: run.steps, ",.10g"), "ms/step": (lambda run: 1000 * run.train_seconds / run.steps, ".2f")}
    for stage in entry.first.scores:
        columns[stage_name(entry, stage)] = (lambda run, stage=stage: run.scores[stage].bpb,
                                            ".4f" if stage in ("raw", "averaged") else ".8f")
    columns["nats/token"] = (lambda run: run.final.loss, ".8f")
    columns["code + model, bytes"] = (entry.total_bytes, ",.10g")
    rows = [[str(run.seed), *(format(value(run), form) for value, form in columns.values())] for run in entry.runs]
    both = [(*spread(map(value, entry.runs)), form.replace("10g", "1f")) for value, form in columns.values()]
    rows.append(["mean", *(format(mean, form) for mean, _, form in both)])
    rows.append(["std", *("-" if std is None else format(std, form) for _, std, form in both)])
    return table(["seed", *columns], rows)


def timing_table(entry: Entry) -> str:
    """The clock of training, what packing took after it, each stage of the evaluation, and its clock."""
    stages = [name for name in entry.first.scores if name not in ("raw", "averaged")]
    rows = [[str(run.seed), f"{run.train_seconds:.3f}", "-" if run.pack_seconds is None else f"{run.pack_seconds:.1f}",
             *(f"{run.scores[name].seconds:.1f}" for name in stages), f"{run.eval_seconds:.3f}"] for run in entry.runs]
    names = [f"{stage_name(entry, name)}, s" for name in stages]
    return table(["seed", "training, s", "packing, s", *names, "evaluation, s"], rows)


def command(entry: Entry) -> str:
    """What one types to repeat a run, as the logs tell it."""
    run = entry.first
    settings = {"SEED": str(run.seed)} | configuration(run)
    launcher = "python" if run.world_size == 1 else f"torchrun --standalone --nproc_per_node={run.world_size}"
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in settings.items()), launcher, "train_gpt.py"])


def data_places(entry: Entry) -> str:
    """Where the command looks for data and tokenizer, and how to send it to where the contest keeps its own."""
    data, tokenizer = (public_path(name, entry.settings[name]) for name in ("DATA_PATH", "TOKENIZER_PATH"))
    far = "../../../data"
    return (f"It reads the shards of `{data}` and the tokenizer `{tokenizer}`; where they lie elsewhere, DATA_PATH and "
            f"TOKENIZER_PATH say so: from a folder of the contest's `records/`, `DATA_PATH={far}/datasets/"
            f"{Path(data).name} TOKENIZER_PATH={far}/tokenizers/{Path(tokenizer).name}`")


def verdict(holds: bool) -> str:
    return "yes" if holds else "NO"


def compliance_list(entry: Entry) -> list[str]:
    """What the rules ask for, and the figures."""
    run, holds, size = entry.first, compliance(entry), entry.most(entry.total_bytes)
    seeds = ", ".join(str(r.seed) for r in entry.runs)
    split = "the figures of the contest" if holds["full_validation_split"] else "which is no score of the contest's"
    packing = max((r.pack_seconds for r in entry.runs if r.pack_seconds is not None), default=None)
    lines = [
        f"at most {CAP_BYTES:,} bytes on every seed: {verdict(holds['artifact_under_16mb'])}, {size:,} (code "
        f"{len(entry.shipped):,}), {CAP_BYTES - size:,} to spare",
        f"at most 600 s of training: {verdict(holds['training_under_600s'])}, {entry.most(train_seconds):.3f} s, "
        "with every read of training data; compilation and warm-up steps, which are undone, come before",
        *([] if packing is None else [f"rounding and compression, on no data, after that clock: {packing:.1f} s"]),
        f"at most 600 s of evaluation: {verdict(holds['eval_under_600s'])}, {entry.most(eval_seconds):.3f} s from "
        "loading the artifact to the last score, all stages together",
        f"three seeds of one configuration: {verdict(holds['three_seeds'])}, {seeds}",
        f"whole validation split: {verdict(holds['full_validation_split'])}, `{run.dataset}`, {run.targets:,} targets, "
        f"{run.bytes:,} bytes, {run.bytes / run.targets:.6f} bytes a token, {split}; each target is scored once",
        f"validation text in training: {'losses to log, no more' if run.val_lines else 'none'}",
        "the evaluation reads the artifact, the tokenizer and the validation shards; no network, n-gram cache or SLOT"]
    return lines + ([ttt_rule(entry)] if "ttt" in run.scores else [])


def ttt_rule(entry: Entry) -> str:
    """How test-time training keeps the order of score and step, and what its rate depends on."""
    whose = "each document's" if entry.settings.get("TTT_SCOPE") == "document" else "the stream's"
    falls = float(entry.settings.get("TTT_COSINE_FLOOR", 1)) < 1
    rate = "falls along a cosine over the chunks, so it knows how long the text is" if falls else "is constant"
    return (f"test-time training goes through {whose} chunks once, from left to right: the score of a chunk is final "
            f"before a step on it, no step follows the last; its rate {rate}")


def significance_part(entry: Entry) -> str:
    if not (tests := tests_of(entry)):
        return ""
    whose, theirs = against(entry.options).removeprefix("#"), parse_against(entry.options.against)
    mean, std = spread(theirs)
    rows = [[test.reading, f"{test.margin:.6f}", f"{test.t:.3f}", f"{test.df:.2f}", f"{test.p:.4g}"] for test in tests]
    known = f"those of PR #{whose}" if whose in RECORDS else "these, which were given by hand"
    of = known if re.fullmatch(r"[\d., ]+", whose) else f"those in {whose.replace(',', ', ')}"
    return (f"\n## Significance\n\nWelch's t-test, one-sided, of the scores by seed against {of}, "
            f"{', '.join(map(str, theirs))} (mean {mean:.8f}, std {std:.8f}); 0.005 nats are read in three ways.\n\n"
            + table(["lower by more than", "in bits per byte", "t", "df", "p"], rows) + "\n")


def what_ran(entry: Entry) -> list[str]:
    run, size = entry.first, len(entry.shipped)
    lines = [technique(entry),
             f"{hardware(run)}; {run.versions}; {run.backend}; {run.train_shards} training shard(s)",
             f"`train_gpt.py`: {size:,} bytes, sha256 {hashlib.sha256(entry.shipped).hexdigest()}"]
    if entry.shipped != entry.source:
        lines.append(f"it is packed: what wrote the logs, and runs, are the {len(entry.source):,} bytes in it of "
                     f"sha256 {run.sha256}")
    local = ", but for local folders, which are `/path/to` here" * any(run.public() != run.text for run in entry.runs)
    return [*lines, f"the logs are as the script wrote them{local}",
            "tools/record.py computed all numbers here from the logs",
            "published ideas are credited in the source, by pull request or arXiv id"]


def readme(entry: Entry) -> bytes:
    mean, std = spread(run.final.bpb for run in entry.runs)
    reasons = "; ".join(why_no_record(entry))
    page = PAGE.format(
        name=entry.options.name, blurb=entry.options.blurb or technique(entry),
        score=f"{mean:.8f}" + ("" if std is None else f" (std {std:.8f}, {len(entry.runs)} seeds)"),
        track=f"**Not a record**: {reasons}." if reasons else "Track: 10 minutes on 8xH100, 16,000,000 bytes.",
        results=results_table(entry), significance=significance_part(entry), command=command(entry),
        data=data_places(entry),
        timing=timing_table(entry), compliance="\n".join(f"* {line}" for line in compliance_list(entry)),
        what="\n".join(f"* {line}" for line in what_ran(entry)))
    return page.encode()


# ----------------------------------------
# Files.

def log_name(run: RunLog) -> str:
    return f"train_seed{run.seed}.log"


def folder_name(name: str, day: str) -> str:
    """YYYY-MM-DD_Name."""
    try:
        if date.fromisoformat(day).isoformat() != day:
            raise ValueError
    except ValueError:
        raise Refused(f"--date {day} is not a day like 2026-04-30") from None
    if not (stem := re.sub(r"[^A-Za-z0-9.+-]+", "_", name).strip("_.")):
        raise Refused("--name is needed, with a letter or a digit in it")
    return f"{day}_{stem}"


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """All of the folder or nothing of it; never over one that exists."""
    if folder.exists():
        raise Refused(f"{folder} exists; choose another --name, --date or --out, or remove it")
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".record-", dir=folder.parent))
        part.chmod(0o755)
        for name, contents in files.items():
            (part / name).write_bytes(contents)
        part.rename(folder)
    except OSError as error:
        if part:
            shutil.rmtree(part, ignore_errors=True)
        raise Refused(f"cannot write {folder}: {error.strerror}") from None


def retract(folder: Path, reason: str) -> None:
    """Take back the score of a folder as PR #1127 did: val_bpb is null, its value stays beside it, README says so."""
    path, page = folder / "submission.json", folder / "README.md"
    data, text = read_bytes(path), read_bytes(page)
    try:
        contents, text = json.loads(data), text.decode("utf-8")
    except ValueError as error:
        raise Refused(f"{path} or {page} is not what record.py writes: {error}") from None
    value = contents.get("val_bpb") if isinstance(contents, dict) else None
    if not isinstance(value, float):
        raise Refused(f"{path} has no number as val_bpb; was it retracted before?")
    status = dict(val_bpb=None, val_bpb_retracted=value, status="retracted", retraction_reason=reason or None)
    notice = f"**Retracted: {value} bits per byte, the score below, does not stand.** {reason}".strip()
    write_file(path, as_json(contents | status))
    write_file(page, f"> {notice}\n\n{text}".encode())


def gather(options: argparse.Namespace) -> Entry:
    """Read and check everything. Raises Refused at the first thing that is wrong."""
    if not options.logs:
        raise Refused("give the logs, one for each seed")
    source = read_bytes(options.script)
    runs = tuple(sorted(map(read_log, options.logs), key=lambda run: run.seed))
    for run in runs:
        check_script(run, options.script, source)
    check_same(runs)
    settings, shipped = resolve(options.script, runs[0]), source
    if options.pack:
        from pack import pack_source

        shipped = pack_source(source)
    entry = Entry(runs, settings, source, shipped, options)
    for run in runs:
        check_settings(run, settings)
        check_steps(run, settings)
        check_signature(run, entry.is_whole)
    check_limits(entry)
    return entry


def requirements(script: Path) -> bytes:
    """requirements.txt beside the script; of a script without one, as pack.py writes it, that of this checkout."""
    beside = script.parent / "requirements.txt"
    return read_bytes(beside if beside.exists() else ROOT / "requirements.txt")


def path_from(folder: Path, path: Path) -> str:
    """The way from a folder to a file below it; of another file the name, since the way tells of local folders."""
    way = Path(os.path.relpath(path, folder))
    return way.name if ".." in way.parts else way.as_posix()


def summary(entry: Entry) -> str:
    """What a person wants to know at once: score, bytes, track, significance."""
    mean, std = spread(run.final.bpb for run in entry.runs)
    most, reasons = entry.most(entry.total_bytes), "; ".join(why_no_record(entry))
    tests = [f"lower than {against(entry.options)} by more than {test.reading}: t {test.t:.3f}, df {test.df:.2f}, "
             f"p {test.p:.4g}" for test in tests_of(entry)]
    return "\n".join([
        f"val_bpb {mean:.8f}" + ("" if std is None else f", std {std:.8f}, {len(entry.runs)} seeds"),
        f"{most:,} bytes at most (code {len(entry.shipped):,}), {CAP_BYTES - most:,} to spare",
        f"no record: {reasons}" if reasons else "track 10min_16mb", *tests])


def write_record(options: argparse.Namespace) -> Path:
    """The folder, or with --submission-only that one file; returns its path and tells what is in it."""
    folder, entry = options.out / folder_name(options.name, options.date), gather(options)
    if file := options.submission_only:
        logs = [path_from(file.parent, run.path) for run in entry.runs]
        write_file(file, as_json(submission(entry, logs)))
        print(summary(entry))
        return file
    files = {"README.md": readme(entry), "train_gpt.py": entry.shipped,
             "submission.json": as_json(submission(entry, [log_name(run) for run in entry.runs])),
             "requirements.txt": requirements(options.script)}
    write_folder(folder, files | {log_name(run): run.public().encode() for run in entry.runs})
    print(summary(entry))
    return folder


def parse_options(argv: list[str]) -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("logs", nargs="*", type=Path, help="one log for each seed, as train_gpt.py wrote it")
    cli.add_argument("--name", default="", help="of the submission; names the folder, too")
    cli.add_argument("--out", type=Path, default=Path("records"), help="where the folder is made (default: records)")
    cli.add_argument("--date", default=date.today().isoformat(), help="YYYY-MM-DD (default: today)")
    cli.add_argument("--author", help="who submits (default: null)")
    cli.add_argument("--github-id", help="the same on GitHub (default: null)")
    cli.add_argument("--blurb", default="", help="one paragraph on what is new (default: what ran)")
    cli.add_argument("--script", type=Path, default=Path("train_gpt.py"), help="what ran (default: ./train_gpt.py)")
    cli.add_argument("--pack", action="store_true", help="ship the script packed by tools/pack.py, and count that")
    cli.add_argument("--non-record", action="store_true", help="one seed and any time will do; the track says so")
    cli.add_argument("--against", default="", metavar="SCORES",
                     help=f"an earlier record's scores: 1.0810,1.0812,... or its logs A,B,... or {', '.join(RECORDS)}")
    cli.add_argument("--submission-only", type=Path, metavar="FILE", help="write FILE, a submission.json, no folder")
    cli.add_argument("--retract", type=Path, metavar="FOLDER", help="take back the score of a folder; no logs")
    cli.add_argument("--reason", default="", help="why, for --retract")
    return cli.parse_args(argv)


def main(argv: list[str]) -> Path:
    """Do what the arguments ask for; returns the path of what was written. Raises Refused."""
    options = parse_options(argv)
    if options.retract:
        if options.logs:
            raise Refused("--retract takes a folder alone, no logs")
        retract(options.retract, options.reason)
        return options.retract
    return write_record(options)


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]), flush=True)
    except (Refused, OSError) as error:  # OSError: nobody takes what is printed
        sys.exit(f"record.py: {error}")
