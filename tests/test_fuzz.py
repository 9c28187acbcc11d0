"""tests/fuzz.py tells faults from good ends, and its forged files are what they claim to be."""

import dataclasses
import json
import signal
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from conftest import make_model
from helpers import damaged

import train_gpt as t
from tests import fuzz

RESULT = 'final val_loss:1.0 val_bpb:2.0\nRESULT {"targets": 64, "eval_seconds": 1.0}\n'
LINE = "train_gpt.py: artifact x.ptz: it is cut\n"
TRIAL = fuzz.Trial("artifacts", "name", dict(ARTIFACT="x"), partial(print))
EXIT_1 = 256


@pytest.mark.parametrize("found, end, refuse", [
    ("accepted", dict(out=RESULT), False), ("refused", dict(status=EXIT_1, err=LINE), True), ("wrong", dict(out=RESULT), True),
    ("wrong", dict(out=RESULT.replace("2.0", "nan")), False), ("wrong", dict(out=RESULT.replace("2.0", "-inf")), False),
    ("wrong", dict(out=RESULT.replace("1.0}", "NaN}")), False), ("wrong", dict(out=RESULT.replace("64", "5")), False), ("wrong", dict(out=""), False),
    ("wrong", dict(out="name:\x1b[2J\n" + RESULT), False), ("wrong", dict(status=EXIT_1), True), ("wrong", dict(status=EXIT_1, err=LINE + LINE), True),
    ("wrong", dict(status=EXIT_1, err=LINE.replace("x", "\u202e")), True), ("wrong", dict(status=EXIT_1, err="warning\n" + LINE), True),
    ("traceback", dict(status=EXIT_1, err="Traceback (most recent call last):\n  x\nKeyError: 1\n"), True), ("crash", dict(status=signal.SIGSEGV), True),
    ("memory", dict(status=EXIT_1, err=LINE, peak=2**31), True), ("slow", dict(status=EXIT_1, err=LINE, seconds=11.0), True),
    ("slow", dict(status=signal.SIGKILL, late=True), True), ("accepted", dict(out=RESULT, seconds=11.0), False),
])
def test_each_end_has_its_verdict(found, end, refuse):
    end = fuzz.End(**dict(status=0, seconds=0.1, peak=0, out="", err="", late=False) | end)
    assert fuzz.verdict(TRIAL._replace(refuse=refuse), end, 2**30)[0] == found


def test_a_fork_tells_its_output_its_memory_and_its_signal(tmp_path, capfd):
    def noisy():
        print("line", len(bytearray(b"x") * 2**27))
        raise SystemExit(3)

    def held():
        data = bytearray(b"x") * 2**27
        signal.pause()
        print(len(data))

    with capfd.disabled():
        end = fuzz.forked(noisy, tmp_path)
        assert (end.status, end.out, end.err, end.late) == (3 << 8, f"line {2**27}\n", "", False)
        assert 0 <= end.peak < 2**29
        assert fuzz.forked(lambda: signal.raise_signal(signal.SIGUSR1), tmp_path).status == signal.SIGUSR1
        killed = fuzz.forked(held, tmp_path, 2**26)
        assert (killed.status, killed.late) == (signal.SIGKILL, False) and 2**26 < killed.peak < 2**29
        assert "ZeroDivisionError" in fuzz.forked(lambda: 1 / 0, tmp_path).err


@pytest.fixture(params=["zstd", "brotli", "rans"])
def base(request, cfg):
    cfg = dataclasses.replace(cfg, compressor=request.param, zstd_level=3)
    weights = {name: p.detach() for name, p in make_model(cfg).named_parameters()}
    return damaged.opened(t.pack(t.quantize(weights, t.quant_plans(weights, t.quant_specs(t.GPT(cfg), cfg), cfg, {})), False, cfg), {})


def test_a_forged_file_differs_in_what_was_forged_alone(base):
    header, tensors = t.unpack(base.blob)
    same = [damaged.with_arrays(base, {}), damaged.artifact(base, damaged.text_of(base, {})), damaged.sealed(base, base.blob[48:])]
    for blob in same:
        again, found = t.unpack(blob)
        assert again == header and found.keys() == tensors.keys() and all(map(torch.equal, found.values(), tensors.values()))
    changed = t.unpack(damaged.artifact(base, damaged.text_of(base, {("settings", "SEED"): '"7"'})))[0]
    assert changed == header | dict(settings=header["settings"] | dict(SEED="7"))


def test_a_grown_model_is_kilobytes_of_tensors_that_fit_its_settings(base):
    blob = damaged.grown(base, MODEL_DIM="128")
    header, tensors = t.unpack(blob)
    shapes = {name: p.shape for name, p in t.GPT(t.Config.from_env(header["settings"])).named_parameters()}
    assert {name: w.shape for name, w in t.dequantize(tensors).items()} == shapes and len(blob) < 20_000


def test_mutations_repeat_by_their_seed_and_change_the_data():
    data = bytes(range(256))
    many = [damaged.mutated(data, Random(seed)) for seed in range(100)]
    assert many == [damaged.mutated(data, Random(seed)) for seed in range(100)] and sum(blob != data for blob in many) > 90
    assert damaged.mutated(b"", Random(0)) != b"" and len({len(blob) for blob in many}) > 20
    places = {damaged.some_place(json.loads('{"settings": {"A": "1"}, "tensors": [["x", "int8", [3, 4]]]}'), Random(seed)) for seed in range(300)}
    assert {("settings", "A"), ("tensors",), ("tensors", 0, 2, 1)} <= places


def test_every_forged_shard_is_another_file(tmp_path):
    tokens = np.arange(2, 200, dtype=np.uint16)
    for number, (_name, _, change) in enumerate(damaged.forged_shards("fineweb_val_000000.bin", tokens)):
        (folder := tmp_path / str(number)).mkdir()
        (folder / "fineweb_val_000000.bin").write_bytes(damaged.shard(tokens))
        change(folder)
        path = folder / "fineweb_val_000000.bin"
        assert len([*folder.iterdir()]) == 2 or not path.is_file() or path.read_bytes() != damaged.shard(tokens)
