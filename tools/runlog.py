"""The log of a finished run of train_gpt.py -> a RunLog, for record.py, table.py and plot.py.

Every line must be one that the script writes, in its order, and every number must agree with all others of the log to
which it is bound, up to the digits that are printed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

LOSSES = r"val_loss:(?P<loss>\d+\.\d{4}) val_bpb:(?P<bpb>\d+\.\d{4})"
TIMED = LOSSES + r" eval_time:(?P<ms>\d+)ms"
STEP = r"step:(?P<step>\d+)/(?P<iterations>\d+)"
CLOCK = r"train_time:(?P<clock>\d+)ms step_avg:(?P<average>\d+\.\d\d)ms"
DEVICE = r"device:(?P<device>.+) world_size:(?P<world>\d+)"
STAGE = r"(?P<stage>final_int\d_roundtrip|final_int\d_sliding_window|legal_ttt)"
KIND = r"(?P<kind>int\d\+\S+)"
RUNNING = r"scoring:\d+/\d+ running_bpb:\d+\.\d{4}"
MEMORY = r"peak memory allocated: \d+ MiB reserved: \d+ MiB"

# (name, how often: 1, ? or *, pattern); groups follow each other, within a group the order is free. In older logs,
# which logs/ keeps, the line of versions ends in the device, `looped` is missing, and nothing tells what packing took.
GROUPS = (
    (("source", "1", r"source:\S+ sha256:(?P<sha256>[0-9a-f]{64}) bytes:(?P<bytes>\d+)"),),
    (("versions", "1", r"(?P<versions>python:\S+ torch:(?P<torch>\S+)(?: (?:numpy|sentencepiece|tqdm|zstandard):\S+)*)"
      rf"(?: {DEVICE})?"),),
    (("device", "?", DEVICE),),
    (("nvidia-smi", "?", r"nvidia-smi: \[.*\]"),),
    (("variant", "1", r"variant:(?P<variant>\w+) seed:(?P<seed>\d+) overrides: (?P<overrides>.+)"),),
    (("train_loader", "1", r"train_loader:dataset:(?P<dataset>.+) train_shards:(?P<shards>\d+)"),),
    (("val_loader", "1", r"val_loader:tokens:(?P<targets>[1-9]\d*) bytes:(?P<bytes>[1-9]\d*)"),),
    (("model_params", "1", r"model_params:(?P<parameters>\d+) "
      r"(?P<backend>attention:\S+ dtype:\S+ grad_accum_steps:\d+)"),),
    (("warmup_step", "*", r"warmup_step:(?P<step>\d+)/(?P<steps>[1-9]\d*) late_qat:[01](?: looped:[01])?"),),
    (("gptq:reserving", "?", r"gptq:reserving [\d.]+s for \d+ batches"),),
    (("scoring in training", "*", RUNNING), ("train_loss", "*", rf"{STEP} train_loss:\d+\.\d{{4}} {CLOCK}"), ("val_loss", "*", rf"{STEP} {TIMED} {CLOCK}"),
     ("late_qat", "?", r"late_qat:enabled step:\d+ scale:[\d.]+"),
     ("layer_loop", "?", r"layer_loop:enabled step:\d+ frac:[\d.]+ order:\[[\d, ]+\]"),
     ("checkpoint", "*", r"checkpoint:(?P<path>.+) averaging:\w+ updates:\d+"),
     ("stopping_early", "?", rf"stopping_early: wallclock_cap {CLOCK} {STEP}")),
    (("no snapshot", "?", r"averaging: \w+ took no snapshot, so the last weights stand in"),
     ("averaging", "1", r"averaging:\w+ updates:\d+"), ("peak memory of training", "?", MEMORY),
     ("gptq:collected", "?", r"gptq:collected \d+ Hessians (?:in [\d.]+s|from \d+ of \d+ batches)"),
     ("training ended", "1", rf"training ended: {STEP} {CLOCK}")),
    (("fit:factor", "*", r"fit:factor \d+\.\d{4} bytes:(?P<bytes>\d+) of (?P<room>-?\d+)"),),
    (("quantize_and_pack", "?", r"quantize_and_pack:(?P<seconds>\d+\.\d)s, off the training clock"),),
    (("Serialized model", "1", rf"Serialized model {KIND}: (?P<bytes>\d+) bytes \(payload:(?P<payload>[1-9]\d*) "
      r"payload_ratio:(?P<ratio>\d+\.\d\d)x\)"),),
    (("Code size", "1", r"Code size: (?P<bytes>\d+) bytes"),),
    (("Total submission size", "1", rf"Total submission size {KIND}: (?P<bytes>\d+) bytes"),),
    (("scoring after it", "*", RUNNING),),
    (("DIAGNOSTIC raw", "1", rf"DIAGNOSTIC raw {TIMED}"),),
    (("DIAGNOSTIC post", "1", rf"DIAGNOSTIC post_\w+ {TIMED}"),),
    (("artifact", "1", r"artifact:(?P<path>.+) variant:(?P<variant>\w+) seed:(?P<seed>\d+) attention:\S+ dtype:\S+"
      r"(?: looped:[01])? stride:(?P<stride>\d+) eval_seq_len:\d+ ttt_chunk:(?P<chunk>\d+)(?: load_time:\d+ms)?"),),
    (("scoring", "*", RUNNING), ("final", "*", rf"{STAGE} {TIMED}"),
     ("exact", "*", rf"{STAGE}_exact val_loss:(?P<loss>\d+\.\d{{8}}) val_bpb:(?P<bpb>\d+\.\d{{8}})")),
    (("total_eval_time", "1", r"total_eval_time:(?P<ms>\d+)ms"),),
    (("peak memory of evaluation", "?", MEMORY),),
    (("bytes_per_token", "1", r"bytes_per_token:(?P<ratio>\d+\.\d{6}) targets:(?P<targets>\d+) bytes:(?P<bytes>\d+)(?: signature:.+)?"),),
    (("stage table", "1", r"stage +val_loss +val_bpb +bytes +seconds"),),
    (("row", "*", r"(?P<stage>raw|averaged|final_\w+|legal_ttt) +(?P<loss>\d+\.\d{4}) +(?P<bpb>\d+\.\d{4}) +"
      r"(?P<bytes>\d+|-) +(?P<seconds>\d+\.\d)"),),
    (("code + model", "1", r"code (?P<code>\d+) \+ model (?P<model>\d+) = (?P<total>\d+) bytes"),),
    (("log", "1", r"log:(?P<log>.+) artifact:(?P<path>.+)"),),
    (("RESULT", "?", r"RESULT \{.*\}"),),
)
PATTERNS = [(at, name, count, re.compile(p, re.ASCII)) for at, group in enumerate(GROUPS) for name, count, p in group]


class Refused(ValueError):
    """Input that a tool does not accept, told in one line: where, why, what to do."""


def write_file(path: Path, contents: bytes) -> None:
    """All of it or nothing; raises Refused."""
    part = path.with_name(f"{path.name}.part")
    try:
        try:
            part.write_bytes(contents)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror}") from None


class Line(NamedTuple):
    number: int
    fields: dict[str, str]

    def number_of(self, field: str) -> float:
        return float(self.fields[field])

    def count(self, field: str) -> int:
        return int(self.fields[field])


class Score(NamedTuple):
    """Of one stage; with 8 decimals where the log has them, else 4."""

    loss: float  # nats a token
    bpb: float  # bits a byte
    seconds: float


@dataclass(frozen=True)
class RunLog:
    """What a finished run says of itself, after every number was checked against the others."""

    path: Path
    text: str
    at: dict[str, int]  # number of the (last) line of each name in GROUPS
    sha256: str
    versions: str
    torch: str
    device: str
    world_size: int
    variant: str
    seed: int
    overrides: dict[str, str]
    places: tuple[tuple[int, str, str], ...]  # number of a line, what stands before a path in it, the path
    dataset: str
    train_shards: int
    targets: int
    bytes: int
    parameters: int
    backend: str
    iterations: int
    steps: int
    train_seconds: float  # calibration of GPTQ included
    train_lines: tuple[int, ...]  # steps with a train_loss line
    val_lines: tuple[int, ...]
    pack_seconds: float | None  # after the training clock; older logs do not tell
    kind: str  # int6+zstd
    code_bytes: int
    model_bytes: int
    stride: int
    ttt_chunk: int
    scores: dict[str, Score]  # raw, averaged, coded, sliding and, if it ran, ttt
    eval_seconds: float

    @property
    def final(self) -> Score:
        """The score that counts: that of the last stage."""
        return [*self.scores.values()][-1]

    def public(self) -> str:
        """Its text, with /path/to for the folder of each absolute path: that tells of a machine and its user alone."""
        rows = self.text.split("\n")
        for number, name, path in self.places:
            rows[number - 1] = rows[number - 1].replace(name + path, name + public_path(name.strip(" =:"), path), 1)
        return "\n".join(rows)

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Raises Refused for the line of that name."""
        raise Refused(f"{self.path}:{self.at[name]}: {reason}")


class Lines:
    """The lines of a log by name, each one known, in the order of a run and as often as a run writes it."""

    def __init__(self, path: Path):
        self.path, self.found = path, {}
        self.text, group, number = self.read(), 0, 0
        for number, text in enumerate(self.text.split("\n")[:-1], 1):
            at, name, count, match = self.recognize(number, text, group)
            if at < group or count != "*" and name in self.found:
                self.refuse(number, f"a '{name}' line where none can follow; are there two logs in this file?")
            self.require(group, at, number, "is missing before this one")
            group = at
            self.found.setdefault(name, []).append(Line(number, match.groupdict()))
        self.require(group, len(GROUPS), max(number, 1), "is missing after this one; the run did not end or was cut")

    def read(self) -> str:
        try:
            data = self.path.read_bytes()
            text = data.decode("utf-8")
        except OSError as error:
            raise Refused(f"cannot read {self.path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            self.refuse(data[: error.start].count(b"\n") + 1, "not UTF-8 text; is it a log of train_gpt.py?")
        if text and not text.endswith("\n"):
            self.refuse(text.count("\n") + 1, "the last line has no end: the log is cut")
        return text

    def recognize(self, number: int, text: str, group: int) -> tuple[int, str, str, re.Match]:
        """(group, name, count, match) of a line; where its form belongs to two groups, the next one is meant."""
        for at, name, count, pattern in sorted(PATTERNS, key=lambda p: p[0] < group):
            if match := pattern.fullmatch(text):
                return at, name, count, match
        self.refuse(number, f"no line of train_gpt.py, or a field that it does not write: {text[:80]!r}")

    def require(self, first: int, end: int, number: int, where: str) -> None:
        for at, name, count, _ in PATTERNS:
            if first <= at < end and count == "1" and name not in self.found:
                self.refuse(number, f"the '{name}' line {where}")

    def refuse(self, number: int, reason: str) -> NoReturn:
        raise Refused(f"{self.path}:{number}: {reason}")

    def one(self, name: str) -> Line:
        return self.found[name][0]

    def all(self, name: str) -> list[Line]:
        return self.found.get(name, [])

    def equal(self, line: Line, what: str, got: object, want: object) -> None:
        if got != want:
            self.refuse(line.number, f"{what} is {got}, but other lines of this log say {want}")

    def near(self, line: Line, what: str, got: float, want: float, slack: float) -> None:
        """Refuses if two numbers differ by more than their rounding can explain."""
        if not abs(got - want) <= slack * 1.000001:
            self.refuse(line.number, f"{what} is {got:.8g}, but other numbers of this log make it {want:.8g}")


def read_log(path: Path) -> RunLog:
    """Raises Refused, with the file and the line, if the log is not that of one finished training run."""
    lines = Lines(path)
    if "device" not in lines.found and not lines.one("versions").fields["device"]:
        lines.refuse(lines.one("versions").number, "the 'device' line is missing after this one")
    check_header(lines)
    check_clock(lines)
    check_sizes(lines)
    scores = read_scores(lines)
    source, versions, variant, loader, counts, params, ended, artifact = map(lines.one, (
        "source", "versions", "variant", "train_loader", "val_loader", "model_params", "training ended", "artifact"))
    device = lines.one("device" if "device" in lines.found else "versions")
    pack = lines.all("quantize_and_pack")
    return RunLog(
        path=path, text=lines.text, places=tuple(places(lines)),
        at={"device": versions.number} | {name: found[-1].number for name, found in lines.found.items()},
        sha256=source.fields["sha256"], versions=versions.fields["versions"], torch=versions.fields["torch"],
        device=device.fields["device"], world_size=device.count("world"), variant=variant.fields["variant"],
        seed=variant.count("seed"), overrides=overrides(variant), dataset=loader.fields["dataset"],
        train_shards=loader.count("shards"), targets=counts.count("targets"), bytes=counts.count("bytes"),
        parameters=params.count("parameters"), backend=params.fields["backend"], iterations=ended.count("iterations"),
        steps=ended.count("step"), train_seconds=ended.number_of("clock") / 1000,
        train_lines=tuple(line.count("step") for line in lines.all("train_loss")),
        val_lines=tuple(line.count("step") for line in lines.all("val_loss")),
        pack_seconds=pack[0].number_of("seconds") if pack else None, kind=lines.one("Serialized model").fields["kind"],
        code_bytes=lines.one("Code size").count("bytes"), model_bytes=lines.one("Serialized model").count("bytes"),
        stride=artifact.count("stride"), ttt_chunk=artifact.count("chunk"), scores=scores,
        eval_seconds=lines.one("total_eval_time").number_of("ms") / 1000)


def overrides(variant: Line) -> dict[str, str]:
    text = variant.fields["overrides"]
    return {} if text == "none" else dict(part.partition("=")[::2] for part in re.split(r" (?=[A-Z][A-Z0-9_]*=)", text))


def places(lines: Lines) -> Iterator[tuple[int, str, str]]:
    """Where the log names files and folders: (number of the line, what stands before the path, the path)."""
    header, artifact, closing = map(lines.one, ("variant", "artifact", "log"))
    yield from ((header.number, f" {name}=", value) for name, value in overrides(header).items())
    yield from ((line.number, "checkpoint:", line.fields["path"]) for line in lines.all("checkpoint"))
    yield artifact.number, "artifact:", artifact.fields["path"]
    yield closing.number, "log:", closing.fields["log"]
    yield closing.number, " artifact:", closing.fields["path"]


def public_path(name: str, path: str) -> str:
    """A path as it may be published: an absolute one without its folders, and OUTPUT_DIR, a folder, without its name."""
    if not path.startswith("/"):
        return path
    return "/path/to" if name == "OUTPUT_DIR" else f"/path/to/{PurePosixPath(path).name}"


def check_header(lines: Lines) -> None:
    """Variant and seed stand in up to three places, the path of the artifact in two."""
    header, artifact, closing = map(lines.one, ("variant", "artifact", "log"))
    for name in ("variant", "seed"):
        lines.equal(header, name, header.fields[name], overrides(header).get(name.upper(), header.fields[name]))
        lines.equal(artifact, name, artifact.fields[name], header.fields[name])
    lines.equal(closing, "the artifact", closing.fields["path"], artifact.fields["path"])


def check_clock(lines: Lines) -> None:
    """Steps and times: averages, order, and an end before the last iteration only if the clock brought it."""
    ended, trained, warm = lines.one("training ended"), lines.all("train_loss"), lines.all("warmup_step")
    last, iterations = ended.count("step"), ended.count("iterations")
    for line in [*trained, *lines.all("val_loss"), *lines.all("stopping_early"), ended]:
        lines.equal(line, "the number of iterations", line.count("iterations"), iterations)
        if not 1 <= (step := line.count("step")) <= last <= iterations:
            lines.refuse(line.number, f"step {step} of a run that ended with step {last} of {iterations}")
        lines.near(line, "step_avg", line.number_of("average"), line.number_of("clock") / step, 0.005 + 0.5 / step)
    for before, line in [*pairwise(trained), *pairwise(lines.all("val_loss"))]:
        if line.count("step") <= before.count("step") or line.count("clock") < before.count("clock"):
            lines.refuse(line.number, f"its step and its time do not follow those of line {before.number}")
    if trained and ended.count("clock") < trained[-1].count("clock"):
        lines.refuse(ended.number, f"its time is before that of line {trained[-1].number}")
    for i, line in enumerate(warm):
        lines.equal(line, "the warm-up step", line.count("step"), i % warm[0].count("steps") + 1)
    stops = [last] if last < iterations else []
    lines.equal(ended, "the list of early stops", stops, [line.count("step") for line in lines.all("stopping_early")])


def check_sizes(lines: Lines) -> None:
    """Bytes of code and model are counted in five places, and the ratio of the payload in one."""
    model, code, total = map(lines.one, ("Serialized model", "Code size", "Total submission size"))
    closing, params = lines.one("code + model"), lines.one("model_params")
    lines.equal(code, "the size of the code", code.count("bytes"), lines.one("source").count("bytes"))
    lines.equal(total, "the kind of model", total.fields["kind"], model.fields["kind"])
    lines.equal(total, "code + model", total.count("bytes"), code.count("bytes") + model.count("bytes"))
    for field, line in (("code", code), ("model", model), ("total", total)):
        lines.equal(closing, f"the size '{field}'", closing.count(field), line.count("bytes"))
    ratio = 4 * params.count("parameters") / model.count("payload")
    lines.near(model, "payload_ratio", model.number_of("ratio"), ratio, 0.005)
    if (tried := lines.all("fit:factor")) and model.count("bytes") not in [line.count("bytes") for line in tried]:
        lines.refuse(model.number, f"{model.fields['bytes']} bytes are the size of no file that FIT tried")


def stage_lines(lines: Lines) -> tuple[list[Line], list[Line]]:
    """The rounded and the exact line of each stage of the evaluation, which must be complete."""
    rounded, exact, end = lines.all("final"), lines.all("exact"), lines.one("total_eval_time")
    bits = lines.one("Serialized model").fields["kind"].partition("+")[0]
    want = [f"final_{bits}_roundtrip", f"final_{bits}_sliding_window", "legal_ttt"]
    for found in (rounded, exact):
        names = [line.fields["stage"] for line in found]
        if names not in (want, want[:2]) or len(rounded) != len(exact):
            lines.refuse(end.number, f"before this line the stages {', '.join(want[:2])} and perhaps legal_ttt must "
                         "have a line and an exact line each; one is missing")
    for line, below in zip(rounded, exact):
        lines.equal(below, "the place of the exact line", below.number, line.number + 1)
        for field in ("loss", "bpb"):
            lines.near(line, f"val_{field}", line.number_of(field), below.number_of(field), 5e-5)
    return rounded, exact


def read_scores(lines: Lines) -> dict[str, Score]:
    """The scores of all stages, as their lines tell them, the exact ones, the table, and the counts of the text."""
    (rounded, exact), counts = stage_lines(lines), lines.one("val_loader")
    closing, targets, size = lines.one("bytes_per_token"), counts.count("targets"), counts.count("bytes")
    lines.equal(closing, "the number of targets", closing.count("targets"), targets)
    lines.equal(closing, "the number of bytes", closing.count("bytes"), size)
    lines.near(closing, "bytes_per_token", closing.number_of("ratio"), size / targets, 5e-7)
    bpb_of_loss = targets / size / math.log(2)
    weights = [lines.one("DIAGNOSTIC raw"), lines.one("DIAGNOSTIC post")]
    for unit, found in ((1e-4, [*lines.all("val_loss"), *weights, *rounded]), (1e-8, exact)):
        for line in found:
            want, slack = line.number_of("loss") * bpb_of_loss, 0.5 * unit * (1 + bpb_of_loss)
            lines.near(line, "val_bpb", line.number_of("bpb"), want, slack)
    check_table(lines, [*weights, *rounded])
    total, spent = lines.one("total_eval_time"), sum(line.count("ms") for line in rounded)
    if total.count("ms") < spent - len(rounded):
        lines.refuse(total.number, f"the stages of the evaluation took {spent} ms, more than all of it")
    timed = zip(("raw", "averaged", "coded", "sliding", "ttt"), [*weights, *exact], [*weights, *rounded])
    return {name: Score(line.number_of("loss"), line.number_of("bpb"), clock.number_of("ms") / 1000)
            for name, line, clock in timed}


def check_table(lines: Lines, stages: list[Line]) -> None:
    """The closing table has a row for each stage, of the same numbers, and the size beside what the artifact scored."""
    rows, names = lines.all("row"), ["raw", "averaged", *(line.fields["stage"] for line in stages[2:])]
    lines.equal(lines.one("code + model"), "the list of rows above", [row.fields["stage"] for row in rows], names)
    for row, line in zip(rows, stages):
        for field in ("loss", "bpb"):
            lines.equal(row, f"val_{field}", row.fields[field], line.fields[field])
        size = lines.one("Total submission size").fields["bytes"] if "stage" in line.fields else "-"
        lines.equal(row, "the size", row.fields["bytes"], size)
        lines.near(row, "the time in seconds", row.number_of("seconds"), line.number_of("ms") / 1000, 0.0505)
