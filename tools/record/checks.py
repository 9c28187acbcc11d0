"""Logs, script and options -> an Entry, or Refused at the first thing that does not fit."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

from tools.files import Refused
from tools.record.artifacts import check_artifacts
from tools.record.entry import CAP_BYTES, CAP_SECONDS, FEWEST_SEEDS, SPLITS, Entry, trained_in_time
from tools.record.pack import pack_source
from tools.record.source import find_source, resolve
from tools.runlog import RunLog, check_byte_counts, public_path, read_log

NOT_SETTINGS = ("SEED", "RUN_ID", "OUTPUT_DIR", "ARTIFACT", "AUDIT")  # what may differ among the seeds


def check_device(run: RunLog) -> None:
    """A GPU of NVIDIA's needs a CUDA build of torch, whose wheels say so: 2.9.1+cu128; a build of one's own may not."""
    build = run.versions.get("torch", "")
    if run.device.startswith("NVIDIA") and re.fullmatch(r"[^+]*(\+(cpu|rocm|xpu).*)?", build):
        run.refuse("device", f"{run.device}, but torch {build} in the line above is no CUDA build, which cannot run on "
                   "it; give the log as the run wrote it")


def configuration(run: RunLog) -> dict[str, str]:
    """What the environment set, as it is published: the folders of absolute paths may differ among machines, too."""
    return {name: public_path(name, value) for name, value in run.overrides.items() if name not in NOT_SETTINGS}


def check_apart(run: RunLog, other: RunLog) -> None:
    """Two logs are of two runs: under two seeds, and without numbers that only a copy can share.

    A line of an early step can be the same by chance; two such numbers cannot.
    """
    if run.seed == other.seed:
        run.refuse("variant", f"seed {run.seed} is that of {other.path}, too")
    shared = [name for value, name in run.unshared.items() if value in other.unshared]
    if len(shared) > 1:
        run.refuse("variant", f"{len(shared)} losses, clocks or lines of steps are those of {other.path} to the last "
                   f"digit ({shared[0]}, {shared[-1]}): one log is a copy of the other, or SEED changes nothing; each "
                   "seed needs a run of its own")


def check_same(runs: tuple[RunLog, ...]) -> None:
    """All runs are one configuration on one kind of machine and on one data set, under different seeds."""
    first = runs[0]
    for at, run in enumerate(runs):
        for other in runs[:at]:
            check_apart(run, other)
        ours, theirs = configuration(run), configuration(first)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                run.refuse("variant", f"{name}={ours.get(name, '(default)')}, but {theirs.get(name, '(default)')} in "
                           f"{first.path}; all seeds need one configuration")
        for line, *names in (("variant", "variant"), ("python:", "software"), ("device", "device", "world_size"),
                             ("train_loader", "dataset", "train_shards"),
                             ("val_loader", "val_sha256"), ("bytes_per_token", "targets", "bytes", "val_split_targets"),
                             ("model_params", "parameters", "backend")):
            for name in names:
                ours, theirs = (getattr(log, name) or "(not told)" for log in (run, first))
                if ours != theirs:
                    run.refuse(line, f"{name} {ours}, but {theirs} in {first.path}; all seeds need one configuration")
    check_byte_counts(runs)


def check_settings(run: RunLog, settings: dict[str, str]) -> None:
    """The log has the numbers and the stages that these settings lead to."""
    epochs, most = int(settings["TTT_EPOCHS"]), int(settings["VAL_MAX_TOKENS"])
    for line, name, got in (("training ended", "ITERATIONS", run.iterations),
                            ("artifact", "EVAL_STRIDE", run.eval_stride),
                            ("artifact", "TTT_CHUNK_TOKENS", run.ttt_chunk_tokens),
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
        for line, what, seconds, holds in (("training ended", "training", run.train_seconds, trained_in_time(entry, run)),
                                           ("total_eval_time", "evaluation", run.eval_seconds, run.eval_seconds <= CAP_SECONDS)):
            if not holds and not free:
                run.refuse(line, f"{what} took {seconds:.3f} s, over {CAP_SECONDS:.0f} s (--non-record: no limit)")
    if len(entry.runs) < FEWEST_SEEDS and not free:
        entry.runs[-1].refuse("variant", f"with this one {len(entry.runs)} seed(s), but a record needs {FEWEST_SEEDS} "
                              "(--non-record: one will do)")


def gather(options: argparse.Namespace, folder: Path) -> Entry:
    """Read and check everything; a source from the history goes into `folder`. Raises Refused at the first thing that
    is wrong.
    """
    if not options.logs:
        raise Refused("give the logs, one for each seed")
    given = [*map(read_log, options.logs)]
    runs = tuple(sorted(given, key=lambda run: run.seed))
    for run in runs:
        check_device(run)
        source = find_source(options.script, run, folder)
    check_same(runs)
    settings = resolve(source, runs[0])
    shipped = pack_source(source.contents) if options.pack else source.contents
    entry = Entry(runs, settings, source, shipped, options)
    for run in runs:
        check_settings(run, settings)
        check_steps(run, settings)
        check_signature(run, entry.is_whole)
    check_limits(entry)
    if options.artifacts is None:
        return entry
    return replace(entry, checks=check_artifacts(given, options.artifacts, source, settings, options.rescore))
