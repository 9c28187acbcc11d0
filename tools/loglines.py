"""The few lines that pictures and tables need of a log, for runs that have not ended and logs without a RESULT line.

Logs of earlier versions of train_gpt.py, as logs/ keeps them, have none; those that have one are read by runlog.py. Of
the contest's own script the curves are read, too.
"""

import math
import re
from collections import namedtuple
from pathlib import Path

from tools.files import Refused, read_bytes
from tools.runlog import RESULT, RunLog, Score, read_log

HEADER = r"^variant:(?P<variant>\w+) seed:(?P<seed>\d+) overrides: (?P<overrides>.+)$"
CONTEST = "contest's script"  # in place of a variant
CONTEST_HEADER = r"^(?P<options>train_batch_tokens:\d+ .+)\nseed:(?P<seed>\d+)$"
CONTEST_RAW = r"^step:\d+/\d+ val_loss:(?P<loss>[\d.]+) val_bpb:(?P<bpb>[\d.]+) "
STEP = re.compile(r"^step:(\d+)/\d+ (train|val)_loss:([\d.]+) .*train_time:(\d+)ms", re.MULTILINE)
EXACT = r"^{}_exact val_loss:(?P<loss>\d+\.\d+) val_bpb:(?P<bpb>\d+\.\d+)$"
WEIGHTS = r"^DIAGNOSTIC {} val_loss:(?P<loss>\d+\.\d+) val_bpb:(?P<bpb>\d+\.\d+) "
STAGES = dict(raw=WEIGHTS.format("raw"), averaged=WEIGHTS.format(r"post_\w+"),
              coded=EXACT.format(r"final_int\d_roundtrip"), sliding=EXACT.format(r"final_int\d_sliding_window"),
              ttt=EXACT.format("legal_ttt"))
# Ended or not. points: {"train" or "val": [(step, minutes, loss in nats a token)]}; bpb: of the last stage, or None.
Curve = namedtuple("Curve", "path points bpb variant seed overrides")
# Ended. total_bytes: of code and model; scores: a Score by the keys of STAGES.
Scored = namedtuple("Scored", "path variant seed overrides parameters total_bytes scores")
# Ended or not, or of EVAL_ONLY. artifact: its sha256, or None; scores: bits per byte by the keys of STAGES.
Stages = namedtuple("Stages", "path artifact eval_only scores")


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(f"cannot read {path}: not UTF-8 text") from None


def read_header(text: str) -> tuple[str, int, dict[str, str]] | None:
    """(variant, seed, overrides), if there is such a line."""
    if not (match := re.search(HEADER, text, re.MULTILINE)):
        return None
    given = match["overrides"]
    pairs = [] if given == "none" else [part.partition("=")[::2] for part in re.split(r" (?=[A-Z][A-Z0-9_]*=)", given)]
    return match["variant"], int(match["seed"]), dict(pairs)


def contest_header(text: str) -> tuple[str, int, dict[str, str]] | None:
    """The same of a log of the contest's script, with the options that it logs."""
    if not (match := re.search(CONTEST_HEADER, text, re.MULTILINE)):
        return None
    pairs = (option.partition(":")[::2] for option in match["options"].split())
    return CONTEST, int(match["seed"]), {name.upper(): value for name, value in pairs}


def read_curve(path: Path) -> Curve:
    """Raises Refused if the log has no step, no settings, or the steps of two runs."""
    text, points = read_text(path), dict(train=[], val=[])
    for step, kind, loss, milliseconds in STEP.findall(text):
        if points[kind] and int(step) <= (last := points[kind][-1][0]):
            raise Refused(f"{path}: step {step} comes after step {last}; are there two logs in this file?")
        points[kind].append((int(step), int(milliseconds) / 60_000, float(loss)))
    header, exact = read_header(text) or contest_header(text), re.findall(EXACT.format(r"\w+"), text, re.MULTILINE)
    if not points["train"] or not header:
        raise Refused(f"{path} lacks a line 'variant:...' or 'step:... train_loss:...'; is it a log of train_gpt.py?")
    return Curve(path, points, float(exact[-1][1]) if exact else None, *header)


def read_scored(path: Path) -> RunLog | Scored:
    """A run that was scored. Raises Refused if its log lacks a line, has one twice or, with a RESULT, denies it."""
    text = read_text(path)
    if f"\n{RESULT}" in text:
        return read_log(path)

    def only(pattern: str, what: str) -> re.Match:
        found = [*re.finditer(pattern, text, re.MULTILINE)]
        if len(found) != 1:
            raise Refused(f"{path}: the log of a finished run has one line {what}, this one {len(found) or 'none'}")
        return found[0]

    only(HEADER, "variant:...")
    scores = {name: only(pattern, f"of the {name} score") for name, pattern in STAGES.items()
              if name != "ttt" or re.search(pattern, text, re.MULTILINE)}
    return Scored(path, *read_header(text), int(only(r"^model_params:(\d+) ", "model_params:...")[1]),
                  int(only(r"^Total submission size \S+ (\d+) bytes$", "Total submission size ...")[1]),
                  {name: Score(float(match["loss"]), float(match["bpb"]), math.nan) for name, match in scores.items()})


def read_stages(path: Path) -> Stages:
    """Every stage that the log of a run, of EVAL_ONLY or of the contest's script has. Raises Refused if it has none."""
    text = read_text(path)
    _, _, overrides = read_header(text) or contest_header(text) or (None, None, {})
    patterns = STAGES if read_header(text) else dict(raw=CONTEST_RAW, coded=EXACT.format(r"final_\w+_roundtrip"))
    scores = {name: float(found[-1]["bpb"]) for name, pattern in patterns.items() if (found := [*re.finditer(pattern, text, re.MULTILINE)])}
    if not scores:
        raise Refused(f"{path} has no score of any stage; is it the log of a run that reached its evaluation?")
    artifact = re.search(r"artifact_sha256\W+([0-9a-f]{64})\b", text)
    return Stages(path, artifact and artifact[1], overrides.get("EVAL_ONLY") == "1", scores)
