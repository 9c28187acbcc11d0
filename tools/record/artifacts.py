"""--artifacts: the size and the hash of each file against its log, and its score made again where the data are there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tools.files import Refused, read_bytes
from tools.record.source import Source, last_line, run_script
from tools.runlog import RESULT, RunLog

ALIKE, OTHERWISE = 2e-6, 1e-3  # relative difference of a score that is accepted on a machine like the log's, and on another


class Check(NamedTuple):
    """What was checked of the artifact of one seed."""

    scores: dict[str, float]  # bits per byte by stage, made again; empty if they were not
    reason: str  # why they were not
    machine: str  # where they were


def places(settings: Mapping[str, str]) -> dict[str, Path]:
    """Where data and tokenizer are: the environment of this command wins over the settings of the run."""
    return {name: Path(os.environ.get(name) or settings[name]) for name in ("DATA_PATH", "TOKENIZER_PATH")}


def check_artifacts(runs: list[RunLog], paths: list[Path], source: Source, settings: Mapping[str, str], rescore: bool) -> dict[int, Check]:
    """A Check for each run, by seed; the paths are in the order of the runs. Raises Refused at what does not agree."""
    if len(paths) != len(runs):
        raise Refused(f"{len(paths)} --artifacts for {len(runs)} logs; give one for each log, in the order of the logs")
    for run, path in zip(runs, paths):
        if not run.artifact_sha256:
            raise Refused(f"{run.path} tells no artifact_sha256, so no --artifacts can be compared with it")
        blob = read_bytes(path)
        digest = hashlib.sha256(blob).hexdigest()
        for what, got, told in (("bytes", len(blob), run.model_bytes), ("sha256", digest, run.artifact_sha256)):
            if got != told:
                raise Refused(f"{path} has {what} {got}, but {run.path} says {told}; is it the artifact of seed {run.seed}?")
    return {run.seed: score_again(run, path, source, settings, rescore) for run, path in zip(runs, paths)}


def score_again(run: RunLog, path: Path, source: Source, settings: Mapping[str, str], rescore: bool) -> Check:
    """Run the whole evaluation of one artifact, and compare every stage with the log. Raises Refused."""
    where = places(settings)
    missing = [f"no {name}={place} here" for name, place, there in (
        ("DATA_PATH", where["DATA_PATH"], any(where["DATA_PATH"].glob("fineweb_val_*.bin"))),
        ("TOKENIZER_PATH", where["TOKENIZER_PATH"], where["TOKENIZER_PATH"].is_file())) if not there]
    if missing or not rescore:
        return Check({}, missing[0] if rescore else "--no-rescore", "")
    print(f"tools.record: scoring {path} again; the evaluation in {run.path} took {run.eval_seconds:.0f} s", file=sys.stderr, flush=True)
    dtype = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}.get(run.dtype, "auto")
    with tempfile.TemporaryDirectory() as folder:
        done = run_script(source, EVAL_ONLY="1", ARTIFACT=str(path), OUTPUT_DIR=folder, RUN_ID="again", DTYPE=dtype,
                          VAL_MAX_TOKENS=settings["VAL_MAX_TOKENS"], **{name: str(place) for name, place in where.items()})
    *_, last = done.stdout.strip().splitlines() or [""]
    if done.returncode or not last.startswith(RESULT):
        raise Refused(f"{path} cannot be scored again: {last_line(done)}")
    return compare(run, path, json.loads(last.removeprefix(RESULT)))


def compare(run: RunLog, path: Path, again: dict) -> Check:
    """The RESULT of an evaluation against the log of the run. Raises Refused."""
    for name in ("artifact_sha256", "targets", "bytes", "val_sha256", "val_bytes_sha256"):
        told, got = getattr(run, name), again.get(name)
        if told and got and told != got:
            raise Refused(f"{path}, scored again, has {name} {got}, but {run.path} says {told}")
    alike = (run.device, run.world_size, run.versions["torch"]) == (again["device"], again["world_size"], again["versions"]["torch"])
    told = {name: score for name, score in run.scores.items() if name not in ("raw", "averaged")}
    scores = dict(zip(told, (score["bpb"] for score in again["scores"].values())))
    if len(again["scores"]) != len(told):
        raise Refused(f"{path}, scored again, has {len(again['scores'])} stages, but {run.path} has {len(told)}")
    for name, bpb in scores.items():
        if not math.isclose(bpb, told[name].bpb, rel_tol=ALIKE if alike else OTHERWISE):
            raise Refused(f"{path}, scored again, has {bpb:.8f} bits per byte in the stage {name}, but {run.path} says {told[name].bpb:.8f}")
    return Check(scores, "", f"{again['world_size']} process(es), {again['device']}, torch {again['versions']['torch']}")
