"""Reads logs of train_gpt.py.

A log ends in a RESULT line, which holds the facts of a finished run as JSON; only the loss curve is read from other
lines. Logs of older versions and of the contest's baseline script have no RESULT line; `read_run` reads their scores.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple

from tools.files import Refused, read_bytes

RESULT = "RESULT "
NUMBERS = (
    "world_size seed train_shards parameters grad_accum_steps steps train_seconds pack_seconds model_bytes code_bytes "
    "eval_seconds targets bytes val_split_targets train_over_limit_seconds"
).split()
TEXTS = "source_sha256 device variant dataset kind attention dtype val_sha256 val_bytes_sha256 artifact_sha256".split()
OLDER = dict.fromkeys(("val_sha256", "val_bytes_sha256", "artifact_sha256"), "")  # facts that older logs lack
OLDER |= dict(val_split_targets=0, train_over_limit_seconds=0.0, warnings=[])
STAGES = dict(raw="raw", averaged="averaged", coded="reloaded", sliding="sliding", ttt="TTT")  # {key: name}
STEP = re.compile(r"^step:(\d+)/\d+ (train|val)_loss:([\d.]+) .*train_time:(\d+)ms", re.MULTILINE)
# Lines of logs without RESULT. The baseline script scores its raw weights in its last validation step.
OLD_STAGES = {
    "raw": r"(?:DIAGNOSTIC raw|step:\d+/\d+)", "averaged": r"DIAGNOSTIC post_\w+",
    "coded": r"final_\w+_roundtrip_exact", "sliding": r"final_\w+_sliding_window_exact", "ttt": r"legal_ttt_exact",
}  # fmt: skip
OLD_FACTS = {
    "variant": r"^variant:(\w+)", "parameters": r"^(?:model_params:|.* parameters:)(\d+)",
    "total_bytes": r"^Total submission size int\d\+\w+:? (\d+)",
}  # fmt: skip
Points = dict[str, list[tuple[int, int, float]]]  # {"train" or "val": [(step, milliseconds, loss)]}


class Score(NamedTuple):
    loss: float  # nats per token
    bpb: float  # bits per byte
    seconds: float  # NaN in logs without a RESULT line


class Split(NamedTuple):
    """A validation split of the contest: its number of targets and its bytes per target."""

    fewest: int
    most: int
    bytes_per_token: float
    slack: float

    def matches(self, targets: int, size: int) -> bool:
        """Whether this many targets and bytes are the whole split."""
        return self.fewest <= targets <= self.most and abs(size / targets - self.bytes_per_token) <= self.slack


# The counts of sp8192 and CaseOps (PRs #1804, #2014) are those of the whole stream; the others are published for whole
# rows of 2,048 tokens, without a tail of unknown length.
SPLITS = {
    "fineweb10B_sp1024": Split(62_021_632, 62_021_632 + 2047, 2.435930, 1e-5),
    "fineweb10B_sp4096": Split(45_508_608, 45_514_752 + 2047, 3.319681, 1e-5),
    "fineweb10B_sp8192": Split(40_540_802, 40_540_802, 151_080_891 / 40_540_802, 1e-9),
    "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved": Split(*[47_853_343] * 2, 151_080_645 / 47_853_343, 1e-9),
}


class RunLog(SimpleNamespace):
    """The facts of a log by their names in RESULT, and `path`, `text`, `points` and `total_bytes` (code + model);
    `scores` has the names in STAGES. A log without RESULT has only variant, parameters, points and scores.
    """

    @property
    def final(self) -> Score:
        """Score of the last stage, which is the score of the run."""
        return [*self.scores.values()][-1]

    def fingerprint(self) -> set[tuple]:
        """Exact numbers that two independent runs share only by chance: losses, times, steps."""
        facts = result_of(self.path, self.text)
        exact = {(stage, value) for stage, score in facts["scores"].items() for value in (score.loss, score.seconds)}
        exact |= {(it, facts.get(it)) for it in ("train_seconds", "pack_seconds", "eval_seconds", "artifact_sha256")}
        return {it for it in exact if it[1]} | {(kind, *point) for kind, line in self.points.items() for point in line}

    def public(self) -> str:
        """The log, with the folders of absolute paths in its overrides replaced by /path/to."""
        text = self.text
        for name, path in sorted(self.overrides.items(), key=lambda item: -len(item[1])):
            for old in {path, os.path.normpath(path)} - {"/"} if path.startswith("/") else ():
                forms = "|".join(re.escape(form) for form in (old, json.dumps(old)[1:-1]))
                new = public_path(name, path).replace("\\", r"\\")
                text = re.sub(rf"(?<![\w/.])(?:{forms})(?![\w.-])", new, text)
        return text


def public_path(name: str, path: str) -> str:
    """An absolute path as it is published: without its folders; OUTPUT_DIR also loses its last folder."""
    if not path.startswith("/"):
        return path
    return "/path/to" if name == "OUTPUT_DIR" else f"/path/to/{PurePosixPath(path).name}"


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(f"cannot read {path}: not UTF-8 text") from None


def result_of(path: Path, text: str) -> dict[str, Any] | None:
    """The facts of the RESULT line, or None without one. Raises Refused unless it ends the log and has scores."""
    if not (found := re.findall(rf"^{RESULT}(.*)", text, re.MULTILINE)):
        return None
    try:
        if len(found) > 1 or not text.endswith(f"{RESULT}{found[0]}\n"):
            raise ValueError("it is not the last line and the only one")
        facts = json.loads(found[0])
        scores = {stage: Score(*(float(it[key]) for key in Score._fields)) for stage, it in facts["scores"].items()}
        return facts | dict(scores=scores)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{path}: its RESULT line cannot be used ({error}); give the log as the run wrote it") from None


def by_stage(facts: dict[str, Any]) -> dict[str, Score]:
    """The scores of a RESULT line by the names in STAGES, rounded as the log prints them."""
    stages = [*STAGES] if "raw" in facts["scores"] else [*STAGES][2:]  # an EVAL_ONLY run has only the artifact
    digits = [4 if stage in ("raw", "averaged") else 8 for stage in stages]
    scores = zip(stages, digits, facts["scores"].values())
    return {stage: Score(round(loss, n), round(bpb, n), seconds) for stage, n, (loss, bpb, seconds) in scores}


def read_points(path: Path, text: str) -> Points:
    """The training and the validation curve. Raises Refused if steps or times go back."""
    points: Points = dict(train=[], val=[])
    for step, kind, loss, milliseconds in STEP.findall(text):
        point, last = (int(step), int(milliseconds), float(loss)), (points[kind] or [(-1, -1, 0.0)])[-1]
        if point[0] <= last[0] or point[1] < last[1]:
            raise Refused(f"{path}: step {step} comes after step {last[0]}; give the log of one run")
        points[kind].append(point)
    return points


def read_run(path: Path) -> RunLog:
    """A log of any version and kind. Raises Refused if it has neither a training step nor a score."""
    text = read_text(path)
    facts = result_of(path, text)
    run = RunLog(path=path, text=text, points=read_points(path, text), variant="", parameters=0, total_bytes=0, **OLDER)
    if facts:
        vars(run).update(facts | dict(scores=by_stage(facts)))
        run.total_bytes = facts.get("code_bytes", 0) + facts.get("model_bytes", 0)
        return run
    for name, pattern in OLD_FACTS.items():
        if found := re.search(pattern, text, re.MULTILINE):
            setattr(run, name, found[1] if name == "variant" else int(found[1]))
    run.scores = {}
    for stage, start in OLD_STAGES.items():
        if found := re.findall(rf"^{start} val_loss:([\d.]+) val_bpb:([\d.]+)", text, re.MULTILINE):
            run.scores[stage] = Score(*map(float, found[-1]), math.nan)
    if [*run.scores] == ["raw"]:  # an unfinished run
        run.scores = {}
    if not run.points["train"] and not run.scores:
        raise Refused(f"{path} has no training step and no score; give a log of train_gpt.py")
    return run


def read_log(path: Path) -> RunLog:
    """A finished training run. Raises Refused if its RESULT line lacks a fact or contradicts itself."""
    run = read_run(path)
    if not (facts := result_of(path, run.text)):
        raise Refused(f"{path}: no RESULT line ends the log; give the log of a finished run of a recent train_gpt.py")
    if "resumed" in facts:
        raise Refused(f"{path}: the run was resumed, and its overrides lack those of the first part; give the log of an uninterrupted run")
    try:
        facts, scores, bits = OLDER | facts, facts["scores"], facts["kind"].partition("+")[0]
        if wrong := [name for name in NUMBERS if not 0 <= facts[name] < math.inf]:
            raise ValueError(f"{wrong[0]} is {facts[wrong[0]]}, not a finite number of 0 or more")
        texts = [facts[name] for name in TEXTS] + facts["warnings"]
        "".join([*texts, *facts["versions"].values(), *facts["overrides"].values()])  # TypeError unless all are text
        names = ["raw", "averaged", f"final_{bits}_roundtrip", f"final_{bits}_sliding_window", "legal_ttt"]
        if [*scores] not in (names, names[:-1]):
            raise ValueError(f"its stages are {', '.join(scores)}, not {', '.join(names)}")
        for stage, score in scores.items():
            bpb = score.loss * facts["targets"] / math.log(2) / facts["bytes"]
            if not math.isclose(score.bpb, bpb, rel_tol=1e-9):
                raise ValueError(f"the bpb of {stage} is {score.bpb}, but its loss, targets and bytes give {bpb}")
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise Refused(f"{path}: its RESULT line is not that of a training run: {error}") from None
    for name, digits in (("train_seconds", 3), ("eval_seconds", 3), ("pack_seconds", 1)):  # as the log prints them
        setattr(run, name, round(facts[name], digits))
    return run


def read_scored(path: Path) -> RunLog:
    """A finished training run of any version. Raises Refused if a stage before TTT is missing."""
    run = read_run(path)
    if missing := [stage for stage in [*STAGES][:-1] if stage not in run.scores]:
        raise Refused(f"{path} has no score of the stage {missing[0]}; give the log of a finished run")
    return read_log(path) if result_of(path, run.text) else run


def check_byte_counts(runs: Iterable[RunLog]) -> None:
    """Raises Refused if two logs of the same validation tokens count different bytes for them."""
    counted: dict[str, RunLog] = {}
    for run in runs:
        if run.val_sha256 and run.val_bytes_sha256:
            first = counted.setdefault(run.val_sha256, run)
            if first.val_bytes_sha256 != run.val_bytes_sha256:
                both = f"{first.path} and {run.path} score the same tokens but count different bytes for them"
                raise Refused(f"{both} (val_bytes_sha256); use one tokenizer and one byte sidecar")
