"""The facts of the RESULT line against what can be counted without the script."""

import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, finals
from helpers.smoke import SMOKE

import train_gpt as t


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """(settings, folder, log, facts) of a run of 12 steps in this process."""
    folder = tmp_path_factory.mktemp("facts")
    given = SMOKE | dict(OUTPUT_DIR=str(folder), RUN_ID="facts", ITERATIONS="12", MAX_WALLCLOCK_SECONDS="0", VAL_MAX_TOKENS="64", EVAL_STRIDE="16",
                 TTT_CHUNK_TOKENS="64", TTT_EPOCHS="0", TRAIN_LOG_EVERY="100", CHECKPOINT_EVERY="5", WARMUP_STEPS="1", VAL_LOSS_EVERY="0")
    t.main([], given | dataset)
    text = (folder / "logs" / "facts.txt").read_text()
    return t.Config.from_env(given | dataset), folder, text, json.loads(text.splitlines()[-1].removeprefix("RESULT "))


def test_sizes_are_those_of_the_files_and_of_what_is_in_them(finished):
    cfg, _, _, facts = finished
    blob, code = cfg.artifact_path.read_bytes(), (ROOT / "train_gpt.py").read_bytes()
    assert (facts["model_bytes"], facts["code_bytes"]) == (len(blob), len(code))
    assert facts["artifact_sha256"] == hashlib.sha256(blob).hexdigest() and facts["source_sha256"] == hashlib.sha256(code).hexdigest()
    payload = sum(tensor.numel() * tensor.element_size() for tensor in t.unpack(blob)[1].values())
    with torch.device("meta"):
        count = sum(p.numel() for p in t.GPT(cfg).parameters())
    assert (facts["payload_bytes"], facts["parameters"]) == (payload, count)


def test_steps_and_seconds_fit_the_curve(finished):
    _, folder, text, facts = finished
    names = ("steps", "iterations", "grad_accum_steps", "world_size", "seed")
    assert [facts[name] for name in names] == [12, 12, 2, 1, 1337]
    lines = re.findall(r"^step:(\d+)/12 train_loss:\S+ train_time:(\d+)ms step_avg:([\d.]+)ms", text, re.M)
    assert [int(step) for step, *_ in lines] == list(range(1, 11))
    for step, total, mean in lines:
        assert float(mean) == pytest.approx(int(total) / int(step), abs=0.5)
    assert int(lines[0][1]) > 0 and int(lines[-1][1]) <= 1000 * facts["train_seconds"] + 1
    seconds = {stage: score["seconds"] for stage, score in facts["scores"].items()}
    assert all(0 < it < 60 for it in seconds.values())
    assert sum(it for stage, it in seconds.items() if stage.startswith("final")) <= facts["eval_seconds"]
    for kind in ("state", "average"):
        saved = re.findall(rf"^checkpoint:{folder}/facts.{kind}.ptz step:(\d+) bytes:(\d+) seconds:\d", text, re.M)
        assert [int(step) for step, _ in saved] == [5, 10] and int(saved[1][1]) == (folder / f"facts.{kind}.ptz").stat().st_size


def test_the_exact_lines_have_the_scores(finished):
    _, _, text, facts = finished
    exact = {stage: round(score["bpb"], 8) for stage, score in facts["scores"].items() if stage.startswith("final")}
    assert finals(text) == exact and len(exact) == 2


def test_targets_and_bytes_are_those_of_the_split(finished):
    cfg, _, _, facts = finished
    stream = t.read_validation(cfg)[:65]
    table = t.load_byte_table(cfg)
    ids = torch.from_numpy(stream.astype(np.int64))
    size = int(table.count(ids[:-1], ids[1:]).sum())
    assert (facts["targets"], facts["bytes"], facts["eval_stride"], facts["ttt_chunk_tokens"]) == (64, size, 16, 64)
    assert facts["val_sha256"] == hashlib.sha256(stream.tobytes()).hexdigest()
    for score in facts["scores"].values():
        assert score["bpb"] == pytest.approx(score["loss"] * 64 / np.log(2) / size, rel=1e-9)


def test_settings_are_the_environments(finished):
    cfg, _, _, facts = finished
    given = t.as_env(dataclasses.asdict(cfg))
    assert facts["overrides"] == {name: given[name] for name in facts["overrides"]}
    assert {"NUM_LAYERS", "ITERATIONS", "DATA_PATH", "VAL_MAX_TOKENS"} <= facts["overrides"].keys() and "SEED" not in facts["overrides"]
