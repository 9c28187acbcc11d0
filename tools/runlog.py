"""The log of a finished run of train_gpt.py -> a RunLog, whose facts are those of the RESULT line that closes it.

Every other line must be one that this run writes, in its order and no more often, and say the same: what the facts tell
of it is written again from them, and must stand there digit by digit.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

from tools.files import Refused, read_bytes

RESULT = "RESULT "
ANY = "\0"  # in a line, for what no fact tells
CLOCK = r"train_time:(?P<clock>\d+)ms step_avg:(?P<average>\d+\.\d\d)ms"
STEP = r"step:(?P<step>\d+)/(?P<iterations>\d+)"
STEPS = {name: re.compile(pattern, re.ASCII) for name, pattern in dict(  # lines of which the facts tell only the limits
    train=rf"{STEP} train_loss:\d+\.\d{{4}} {CLOCK}", stop=rf"stopping_early: wallclock_cap {CLOCK} {STEP}",
    val=rf"{STEP} val_loss:(?P<loss>\d+\.\d{{4}}) val_bpb:(?P<bpb>\d+\.\d{{4}}) eval_time:\d+ms {CLOCK}").items()}
FREE = re.compile(  # and those of which they tell nothing
    r"(nvidia-smi: |WARNING: |warmup_step:\d|gptq:collected |(late_qat|layer_loop):enabled |train_seq_len:\d+ step:|"
    r"checkpoint:|averaging: |\S+ of an earlier run is now |fit:factor |peak memory allocated: ).*", re.ASCII)
PLACE = re.compile(  # a path in the line of a checkpoint, of the artifact, or of the log itself
    r"(?:^| )(?:checkpoint|artifact|log):(/.+?)(?= averaging:\w+ updates:| artifact_sha256:| variant:\w+ seed:| artifact:|$)")
# Hashes of the tokens that are scored, of the bytes that each counts for, and of the artifact: not in every log
HASHES = ("val_sha256", "val_bytes_sha256", "artifact_sha256")
# Facts of RESULT that older logs lack, with the value that stands for "not told"
OPTIONAL = dict.fromkeys(HASHES, "") | dict(val_split_targets=0, train_over_limit_seconds=0.0)
HASH = re.compile(rf" ?\b({'|'.join(HASHES)}):([0-9a-f]{{64}})\b")


class Score(NamedTuple):
    """Of one stage, with as many digits as its line has: 4 of raw and averaged weights, else 8."""

    loss: float  # nats a token
    bpb: float  # bits a byte
    seconds: float


@dataclass(frozen=True)
class RunLog:
    """What a finished training run says of itself, seconds to the digit of its lines."""

    source_sha256: str
    versions: dict  # {package: version}
    device: str
    world_size: int
    variant: str
    seed: int
    overrides: dict  # {NAME: text}
    dataset: str
    train_shards: int
    parameters: int
    grad_accum_steps: int
    iterations: int
    steps: int
    train_seconds: float  # calibration of GPTQ included
    pack_seconds: float  # after the training clock
    kind: str  # int6+zstd
    model_bytes: int
    payload_bytes: int
    code_bytes: int
    attention: str
    dtype: str
    eval_stride: int
    ttt_chunk_tokens: int
    eval_seconds: float
    targets: int
    bytes: int
    scores: dict  # a Score of raw, averaged, coded, sliding and, if it ran, ttt
    val_sha256: str  # empty where the log does not tell it, as the next two
    val_bytes_sha256: str
    artifact_sha256: str
    val_split_targets: int  # of the whole validation split; 0 where the log does not tell it
    train_over_limit_seconds: float  # by which training passed MAX_WALLCLOCK_SECONDS
    path: Path
    text: str
    unshared: dict  # the losses and clocks of RESULT to all their digits, and the lines of steps: {value: name}
    train_lines: tuple  # steps with a line of their loss
    val_lines: tuple

    @property
    def final(self) -> Score:
        """The score that counts: that of the last stage."""
        return [*self.scores.values()][-1]

    @property
    def total_bytes(self) -> int:
        return self.code_bytes + self.model_bytes

    @property
    def software(self) -> str:
        return joined(self.versions, ":")

    @property
    def backend(self) -> str:
        return f"attention:{self.attention} dtype:{self.dtype} grad_accum_steps:{self.grad_accum_steps}"

    def public(self) -> str:
        """Its text, with /path/to for the folder of each absolute path: that tells of a machine and its user alone."""
        *rows, result, _ = self.text.split("\n")
        facts = json.loads(result.removeprefix(RESULT))
        facts["overrides"] = {name: public_path(name, value) for name, value in self.overrides.items()}
        for i, row in enumerate(rows):
            if row.startswith("variant:"):
                rows[i] = header(facts)
            elif row.startswith(("checkpoint:", "artifact:", "log:")):
                rows[i] = PLACE.sub(lambda place: place[0].removesuffix(place[1]) + public_path("", place[1]), row)
        return "\n".join([*rows, RESULT + json.dumps(facts), ""])

    def refuse(self, start: str, reason: str) -> NoReturn:
        """Raises Refused for the line that starts so."""
        number = next(i for i, row in enumerate(self.text.split("\n"), 1) if row.startswith(start))
        refuse(self.path, number, reason)


TYPES = {field.name: field.type for field in fields(RunLog)[:-5]}  # of the facts of a RESULT line
FACTS = {name: kind for name, kind in TYPES.items() if name not in OPTIONAL}  # those that it must have


def refuse(path: Path, number: int, reason: str) -> NoReturn:
    raise Refused(f"{path}:{number}: {reason}")


def public_path(name: str, path: str) -> str:
    """A path as it may be published: an absolute one without its folders; OUTPUT_DIR, a folder, without its name."""
    if not path.startswith("/"):
        return path
    return "/path/to" if name == "OUTPUT_DIR" else f"/path/to/{PurePosixPath(path).name}"


# ----------------------------------------
# The lines of a run, from its facts

def joined(pairs: dict[str, str], mark: str) -> str:
    return " ".join(f"{name}{mark}{value}" for name, value in pairs.items())


def header(r: dict) -> str:
    return f"variant:{r['variant']} seed:{r['seed']} overrides: {joined(r['overrides'], '=') or 'none'}"


def timed(score: dict) -> str:
    return f"val_loss:{score['loss']:.4f} val_bpb:{score['bpb']:.4f} eval_time:{1000 * score['seconds']:.0f}ms"


def lines_of(r: dict) -> list[str]:
    """What a run of these facts must write, in this order, with ANY for what they do not tell."""
    (raw, averaged, *coded), code, model = r["scores"].items(), r["code_bytes"], r["model_bytes"]
    total, milliseconds, ratio = code + model, 1000 * r["train_seconds"], 4 * r["parameters"] / r["payload_bytes"]
    kernel, size = f"attention:{r['attention']} dtype:{r['dtype']}", f"targets:{r['targets']} bytes:{r['bytes']}"
    stages = [line for name, score in coded for line in (
        f"{name} {timed(score)}", f"{name}_exact val_loss:{score['loss']:.8f} val_bpb:{score['bpb']:.8f}")]
    rows = [f"{name:28s} {score['loss']:9.4f} {score['bpb']:9.4f} {held:>11} {score['seconds']:9.1f}"
            for part, held in (((raw, averaged), "-"), (coded, total)) for name, score in part]
    return [
        f"source:{ANY} sha256:{r['source_sha256']} bytes:{code}",
        joined(r["versions"], ":"),
        f"device:{r['device']} world_size:{r['world_size']}",
        header(r),
        f"train_loader:dataset:{r['dataset']} train_shards:{r['train_shards']}",
        f"val_loader:tokens:{r['targets']} bytes:{r['bytes']}",
        f"model_params:{r['parameters']} {kernel} grad_accum_steps:{r['grad_accum_steps']}",
        f"averaging:{ANY} updates:{ANY}",
        f"training ended: step:{r['steps']}/{r['iterations']} train_time:{milliseconds:.0f}ms "
        f"step_avg:{milliseconds / r['steps']:.2f}ms",
        f"quantize_and_pack:{r['pack_seconds']:.1f}s, off the training clock",
        f"Serialized model {r['kind']}: {model} bytes (payload:{r['payload_bytes']} payload_ratio:{ratio:.2f}x)",
        f"Code size: {code} bytes",
        f"Total submission size {r['kind']}: {total} bytes",
        f"DIAGNOSTIC raw {timed(raw[1])}",
        f"DIAGNOSTIC post_{ANY} {timed(averaged[1])}",
        f"artifact:{ANY} variant:{r['variant']} seed:{r['seed']} {kernel} looped:{ANY} stride:{r['eval_stride']} "
        f"eval_seq_len:{ANY} ttt_chunk:{r['ttt_chunk_tokens']} load_time:{ANY}ms",
        *stages,
        f"total_eval_time:{1000 * r['eval_seconds']:.0f}ms",
        f"bytes_per_token:{r['bytes'] / r['targets']:.6f} {size}",
        f"{'stage':28s} {'val_loss':>9s} {'val_bpb':>9s} {'bytes':>11s} {'seconds':>9s}",
        *rows,
        f"code {code} + model {model} = {total} bytes",
        f"log:{ANY} artifact:{ANY}"]


# ----------------------------------------
# The log, against them

class Step(NamedTuple):
    """A line of a step: its number, its kind (train, val or stop), and what its pattern names in it."""

    number: int
    kind: str
    match: re.Match

    def count(self, field: str) -> int:
        return int(self.match[field])


def read_log(path: Path) -> RunLog:
    """Raises Refused, with the file and the line, if the log is not that of one finished training run."""
    data = read_bytes(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(path, data[: error.start].count(b"\n") + 1, "not UTF-8 text; is it a log of train_gpt.py?")
    *rows, rest = text.split("\n")
    if rest or not rows or not rows[-1].startswith(RESULT):
        refuse(path, len(rows) + bool(rest) or 1, "no whole RESULT line ends this log: the run did not finish, the log "
               "was cut, or an earlier train_gpt.py wrote it")
    try:
        check_facts(facts := OPTIONAL | json.loads(rows[-1].removeprefix(RESULT)))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        refuse(path, len(rows), f"this is not the RESULT of a run that trained and was scored: {error}")
    steps = walk(path, rows, facts)
    check_steps(path, rows, facts, steps)
    lines = {f"{kind}_lines": tuple(s.count("step") for s in steps if s.kind == kind) for kind in ("train", "val")}
    return RunLog(path=path, text=text, unshared=unshared(facts, steps), **as_printed(facts), **lines)


def unshared(facts: dict, steps: list[Step]) -> dict[float | str, str]:
    """What a run has for itself, and its name: losses and clocks to all digits, lines of steps. No seconds of 0."""
    scores = facts["scores"].items()
    numbers = {f"{stage}'s {name}": score[name] for name in ("loss", "seconds") for stage, score in scores}
    numbers |= {name: facts[name] for name in ("train_seconds", "pack_seconds", "eval_seconds")}
    numbers["artifact_sha256"] = facts["artifact_sha256"]
    lines = {step.match[0]: f"the line '{step.match[0]}'" for step in steps}
    return {value: f"{name} {value}" for name, value in numbers.items() if value} | lines


def as_printed(facts: dict) -> dict:
    """The facts of a RunLog, with the digits that the lines of the log have."""
    names, digits, scores = ("raw", "averaged", "coded", "sliding", "ttt"), (4, 4, 8, 8, 8), facts["scores"].values()
    found = {name: Score(round(score["loss"], n), round(score["bpb"], n), to_millisecond(score["seconds"]))
             for name, n, score in zip(names, digits, scores)}
    clocks = {name: to_millisecond(facts[name]) for name in ("train_seconds", "eval_seconds")}
    clocks["pack_seconds"] = round(facts["pack_seconds"], 1)
    return {name: facts[name] for name in TYPES} | clocks | dict(scores=found)


def to_millisecond(seconds: float) -> float:
    return round(1000 * seconds) / 1000


def check_facts(facts: dict) -> None:
    """The facts are all there, of their types, and agree. Raises ValueError or what a wrong type leads to."""
    for name, kind in TYPES.items():
        if not isinstance(facts[name], (int, float) if kind is float else kind) or kind in (int, float) and not 0 <= facts[name] < math.inf:
            raise ValueError(f"it has {facts[name]} as {name}")
    "".join([*facts["versions"].values(), *facts["overrides"].values()])  # a TypeError if one of them is no text
    for name in HASHES:
        if not re.fullmatch("[0-9a-f]{64}|", facts[name]):
            raise ValueError(f"its {name} is {facts[name]!r}, not 64 hexadecimal digits")
    bits, scores = facts["kind"].partition("+")[0], facts["scores"]
    names = ["raw", "averaged", f"final_{bits}_roundtrip", f"final_{bits}_sliding_window", "legal_ttt"]
    if [*scores] not in (names, names[:-1]):
        raise ValueError(f"its stages are {', '.join(scores)}, not {', '.join(names)}")
    for name, score in scores.items():
        bpb = score["loss"] * facts["targets"] / math.log(2) / facts["bytes"]
        if not math.isclose(score["bpb"], bpb, rel_tol=1e-9):
            raise ValueError(f"the bpb of {name} is {score['bpb']}, but loss, targets and bytes make it {bpb}")
    if not (spent := sum(score["seconds"] for score in [*scores.values()][2:])) <= facts["eval_seconds"]:
        raise ValueError(f"the stages of the evaluation took {spent} s, all of it {facts['eval_seconds']} s")
    if not facts["steps"] <= facts["iterations"]:
        raise ValueError(f"it has {facts['steps']} steps of {facts['iterations']}")
    for name in ("variant", "seed"):
        if (given := facts["overrides"].get(name.upper(), str(facts[name]))) != str(facts[name]):
            raise ValueError(f"{name} is {facts[name]}, but {given} among the overrides")
    lines_of(facts)  # a ValueError or a TypeError if one of its numbers is none


def walk(path: Path, rows: list[str], facts: dict) -> list[Step]:
    """The lines of steps. A line is refused if the facts make another one for this place, or if it is unknown."""
    due, steps, at, artifact = [*lines_of(facts), RESULT], [], 0, ""
    patterns = [re.compile("(.+)".join(map(re.escape, line.split(ANY)))) for line in due]
    for number, whole in enumerate(rows, 1):
        training, is_last = due[at].startswith("averaging:"), number == len(rows)
        row = whole if is_last else without_hashes(path, number, whole, facts)
        if whole and not row:
            continue
        if match := patterns[at].fullmatch(row):
            at += 1
            if row.startswith("artifact:"):
                artifact = match[1]
            elif row.startswith("log:") and match[2] != artifact:
                refuse(path, number, f"the artifact is {match[2]}, but {artifact} further up")
        elif found := [Step(number, kind, m) for kind, p in STEPS.items() if training and (m := p.fullmatch(row))]:
            steps += found
        elif any(p.fullmatch(row) for p in patterns[:at]) or row.startswith(RESULT) and not is_last:
            refuse(path, number, f"{row[:60]!r}, and once more; are there two logs in this file?")
        elif not FREE.fullmatch(row) and not (is_last and due[at] == RESULT):
            wanted = due[at][:90].replace(ANY, "...")
            refuse(path, number, f"{row[:90]!r}, but by the RESULT line {wanted!r} must stand here")
    return steps


def without_hashes(path: Path, number: int, row: str, facts: dict) -> str:
    """The line without the hashes that it tells, which `facts` have from then on; refused if they have others."""
    for name, told in HASH.findall(row):
        if facts[name] not in ("", told):
            refuse(path, number, f"{name} is {told}, but another line of this log says {facts[name]}")
        facts[name] = told
    return HASH.sub("", row)


def check_steps(path: Path, rows: list[str], facts: dict, steps: list[Step]) -> None:
    """Steps are in order, their times and bits agree with each other, and only the clock ends a run before its last."""
    last, iterations, before = facts["steps"], facts["iterations"], {}
    bpb_of_loss = facts["targets"] / facts["bytes"] / math.log(2)
    for line in steps:
        number, step, clock = line.number, line.count("step"), line.count("clock")
        if not 1 <= step <= last or line.count("iterations") != iterations:
            refuse(path, number, f"step {step}/{line.match['iterations']} of a run that ended with {last}/{iterations}")
        if step <= before.get(line.kind, (0, 0))[0] or clock < before.get(line.kind, (0, 0))[1]:
            refuse(path, number, "its step and its time do not follow those of the line before it")
        if line.kind == "train" and clock > round(1000 * facts["train_seconds"]):
            refuse(path, number, "its time is after the end of training")
        near(path, number, "step_avg", float(line.match["average"]), clock / step, 0.005 + 0.5 / step)
        if line.kind == "val":
            want, slack = float(line.match["loss"]) * bpb_of_loss, 5e-5 * (1 + bpb_of_loss)
            near(path, number, "val_bpb", float(line.match["bpb"]), want, slack)
        before[line.kind] = step, clock
    stops = [line.count("step") for line in steps if line.kind == "stop"]
    if stops != [last] * (last < iterations):
        end = next(i for i, row in enumerate(rows, 1) if row.startswith("training ended"))
        refuse(path, end, f"{last} of {iterations} steps, but the clock stopped the run at {stops or 'none'}")


def check_byte_counts(runs: Iterable[RunLog]) -> None:
    """Logs of the same validation tokens must count the same bytes for each of them. Raises Refused."""
    counted: dict[str, RunLog] = {}
    for run in runs:
        if run.val_sha256 and run.val_bytes_sha256:
            first = counted.setdefault(run.val_sha256, run)
            if first.val_bytes_sha256 != run.val_bytes_sha256:
                raise Refused(f"{first.path} and {run.path} score the same tokens but count other bytes for them: val_bytes_sha256 is "
                              f"{first.val_bytes_sha256[:12]} and {run.val_bytes_sha256[:12]}; use one tokenizer and one byte sidecar")


def near(path: Path, number: int, what: str, got: float, want: float, slack: float) -> None:
    """Refuses the line if two numbers differ by more than their rounding explains."""
    if abs(got - want) > slack * 1.000001:
        refuse(path, number, f"{what} is {got:.8g}, but other numbers of this log make it {want:.8g}")
