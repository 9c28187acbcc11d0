"""The facts of the RESULT line, and the lines that they come from, against what can be counted without the script."""

import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

import train_gpt as t


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """(settings, folder, log, facts) of a run of 12 steps in this process."""
    folder = tmp_path_factory.mktemp("facts")
    given = dict(VARIANT="smoke", OUTPUT_DIR=str(folder), RUN_ID="facts", ITERATIONS="12", MAX_WALLCLOCK_SECONDS="0", VAL_MAX_TOKENS="64", EVAL_STRIDE="16",
                 TTT_CHUNK_TOKENS="64", TTT_EPOCHS="0", TRAIN_LOG_EVERY="100", CHECKPOINT_EVERY="5", WARMUP_STEPS="1", VAL_LOSS_EVERY="0")
    t.main([], dataset | given)
    text = (folder / "logs" / "facts.txt").read_text()
    return t.Config.from_env(dataset | given), folder, text, json.loads(text.splitlines()[-1].removeprefix("RESULT "))


def test_sizes_are_those_of_the_files_and_of_what_is_in_them(finished):
    cfg, _, text, facts = finished
    blob, code = cfg.artifact_path.read_bytes(), (ROOT / "train_gpt.py").read_bytes()
    assert (facts["model_bytes"], facts["code_bytes"]) == (len(blob), len(code))
    assert facts["artifact_sha256"] == hashlib.sha256(blob).hexdigest() and facts["source_sha256"] == hashlib.sha256(code).hexdigest()
    tensors = t.unpack(blob)[1]
    payload = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with torch.device("meta"):
        count = sum(p.numel() for p in t.GPT(cfg).parameters())
    assert (facts["payload_bytes"], facts["parameters"]) == (payload, count)
    assert f"payload_ratio:{4 * count / payload:.2f}x" in text


def test_steps_and_seconds_are_those_of_the_lines_above(finished):
    _, _, text, facts = finished
    assert (facts["steps"], facts["iterations"], facts["grad_accum_steps"], facts["world_size"], facts["seed"]) == (12, 12, 2, 1, 1337)
    lines = re.findall(r"^step:(\d+)/12 train_loss:\S+ train_time:(\d+)ms step_avg:([\d.]+)ms", text, re.M)
    assert [int(step) for step, *_ in lines] == list(range(1, 11))
    for step, total, mean in lines:
        assert float(mean) == pytest.approx(int(total) / int(step), abs=0.5)
    ended = re.search(r"training ended: step:12/12 train_time:(\d+)ms", text)
    assert facts["train_seconds"] == pytest.approx(int(ended[1]) / 1000, abs=1e-3) and int(lines[-1][1]) <= int(ended[1])
    assert facts["eval_seconds"] == pytest.approx(int(re.search(r"total_eval_time:(\d+)ms", text)[1]) / 1000, abs=1e-3)
    assert re.findall(r"^checkpoint:\S+ averaging:ema updates:(\d+)", text, re.M) == ["5", "10"]
    for stage, score in facts["scores"].items():
        shown = re.search(rf"{stage} val_loss:\S+ val_bpb:\S+ eval_time:(\d+)ms", text.replace("DIAGNOSTIC post_ema", "DIAGNOSTIC averaged"))
        assert score["seconds"] == pytest.approx(int(shown[1]) / 1000, abs=1e-3), stage
        assert score["seconds"] <= (facts["eval_seconds"] if stage.startswith("final") else 60), stage


def test_targets_and_bytes_are_those_of_the_split(finished):
    cfg, _, text, facts = finished
    stream = t.read_validation(cfg)[:65]
    table = t.load_byte_table(cfg, torch.device("cpu"))
    ids = torch.from_numpy(stream.astype(np.int64))
    size = int(table.count(ids[:-1], ids[1:]).sum())
    assert (facts["targets"], facts["bytes"], facts["eval_stride"], facts["ttt_chunk_tokens"]) == (64, size, 16, 64)
    assert facts["val_sha256"] == hashlib.sha256(stream.tobytes()).hexdigest() and f"bytes_per_token:{size / 64:.6f} " in text
    for score in facts["scores"].values():
        assert score["bpb"] == pytest.approx(score["loss"] * 64 / np.log(2) / size, rel=1e-9)


def test_settings_are_the_environments(finished):
    cfg, _, _, facts = finished
    given = t.as_env(dataclasses.asdict(cfg))
    assert facts["overrides"] == {name: given[name] for name in facts["overrides"]}
    assert {"VARIANT", "ITERATIONS", "DATA_PATH", "VAL_MAX_TOKENS"} <= facts["overrides"].keys() and "SEED" not in facts["overrides"]
