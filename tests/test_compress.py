"""The artifact's compressors: exact both ways, honest about what is missing, unharmed by files that lie."""

import dataclasses
import hashlib
import json
import math
import sys

import brotli
import numpy as np
import pytest
import torch
import zstandard
from conftest import make_model, run, unpacked
from helpers.smoke import SMOKE, for_evaluation
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt as t

NAMES = ("zstd", "brotli", "rans")
CFG = t.Config.from_env({**SMOKE, "TOKENIZER_PATH": __file__, "ZSTD_LEVEL": "3"})  # pack only hashes that file
PACKERS = dict(zstd=lambda body: zstandard.ZstdCompressor(level=1).compress(body),
               brotli=lambda body: brotli.compress(body, quality=1))
PACKERS["rans"] = PACKERS["zstd"]
ON_WIRE = {torch.int8: "int8", torch.float16: "float16", torch.float32: "float32"}


def sealed(data, name):
    """A file whose checksum is right, around any compressed data."""
    packed = name.encode().ljust(8) + data
    return t.ARTIFACT_MAGIC + t.ARTIFACT_FORMAT.to_bytes(4, "little") + hashlib.sha256(packed).digest() + packed


def body_of(tensors, raw):
    header = json.dumps({"tensors": tensors}).encode()
    return len(header).to_bytes(4, "little") + header + raw


def claimed(header):
    """Name, dtype and shape of each tensor that a file says it holds."""
    found = {name: (dtype, shape) for name, dtype, shape in header["tensors"]}
    if "rans.words" in found:
        found = {name: claim for name, claim in found.items() if not name.startswith("rans.")}
        for name in [name.removesuffix(".rows") for name in found if name.endswith(".codes.rows")]:
            found[name] = ("int8", [math.prod(found.pop(f"{name}.{kind}")[1]) for kind in ("rows", "columns")])
    return found


def unpacked_body(blob):
    return t.decompress(blob[48:], blob[40:48].decode().rstrip(), 2**27)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_tensors_come_back_bit_for_bit(name, data):
    draw = np.random.default_rng(data.draw(st.integers(0, 999), "seed"))
    shapes = st.lists(st.integers(0, 6), max_size=3)
    tensors = {"first.codes": torch.ones(1, 1, dtype=torch.int8)}  # every model has codes
    for i, (dtype, shape) in enumerate(data.draw(st.lists(st.tuples(st.sampled_from(sorted(ON_WIRE.values())), shapes), max_size=6), "tensors")):
        raw = draw.integers(0, 256, math.prod(shape) * np.dtype(dtype).itemsize, dtype=np.uint8)  # NaN, infinities and subnormals too
        name_of = f"t{i}.codes" if dtype == "int8" and len(shape) == 2 and all(shape) else f"t{i}"
        tensors[name_of] = torch.from_numpy(np.frombuffer(raw.tobytes(), dtype).reshape(shape).copy())
    looped = data.draw(st.booleans(), "looped")
    blob = t.pack(tensors, looped, dataclasses.replace(CFG, compressor=name))
    header, back = unpacked(blob)
    assert back.keys() == tensors.keys() and header["looped"] is looped and blob[40:48] == name.encode().ljust(8)
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype and back[key].shape == tensor.shape
        assert back[key].numpy().tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_packing_is_deterministic_and_small(name):
    codes, cfg = (3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).round().to(torch.int8), dataclasses.replace(CFG, compressor=name)
    blob = t.pack({"a.codes": codes}, False, cfg)
    assert blob == t.pack({"a.codes": codes.clone()}, False, cfg) and len(blob) < 4096 + 4 * t.LANES * (name == "rans")


def test_low_bytes_come_before_high_bytes():
    half, full, codes = torch.randn(3, 5).half(), torch.randn(7), torch.arange(-3, 3).to(torch.int8)
    blob = t.pack({"half": half, "full": full, "codes": codes}, True, CFG)
    body = unpacked_body(blob)
    start = 4 + int.from_bytes(body[:4], "little")
    header = json.loads(body[4:start])
    assert header["tensors"] == [["codes", "int8", [6]], ["half", "float16", [3, 5]], ["full", "float32", [7]]]
    wire = half.numpy().tobytes(), full.numpy().tobytes()
    planes = codes.numpy().tobytes() + b"".join(raw[i::width] for raw, width in zip(wire, (2, 4)) for i in range(width))
    assert body[start:] == planes


@pytest.mark.parametrize("name", NAMES)
def test_a_file_written_by_hand_is_read(name):
    array = np.array([[1.5, -2.0], [0.25, 3.0]], "<f2")
    raw = array.tobytes()
    header, tensors = unpacked(sealed(PACKERS[name](body_of([["a", "float16", [2, 2]]], raw[::2] + raw[1::2])), name))
    assert torch.equal(tensors["a"], torch.from_numpy(array)) and header["tensors"][0][0] == "a"


@pytest.mark.parametrize("name", NAMES)
def test_any_cut_is_told_even_if_the_checksum_is_right(name):
    data = t.pack({"a.codes": torch.arange(-60, 60).view(10, 12).to(torch.int8)}, False, dataclasses.replace(CFG, compressor=name))[48:]
    whole = unpacked(sealed(data, name))[1]
    for kept in {0, 1, 5, len(data) // 2, len(data) - 1, *range(0, len(data), 97)}:
        try:
            found = unpacked(sealed(data[:kept], name))[1]
        except t.InputError:
            continue
        assert kept > len(data) - 64 and torch.equal(found["a.codes"], whole["a.codes"]), "only a stream's end mark is missing"


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), sign=st.booleans())
@example(at=39355, bit=0, sign=True)  # makes an uint8 of the int8 of rans
def test_damage_is_an_input_error_or_nothing_but_other_values(name, at, bit, sign):
    """A checksum that was made anew hides the damage; whatever then unpacks has the names and shapes of its own header."""
    blob = bytearray(t.pack({"a.codes": torch.arange(-60, 60).view(10, 12).to(torch.int8)}, False, dataclasses.replace(CFG, compressor=name)))
    blob[48 + at % (len(blob) - 48)] ^= 1 << bit
    try:
        header, tensors = unpacked(sealed(bytes(blob[48:]), name) if sign else bytes(blob))
    except t.InputError:
        return
    assert sign and {n: (str(w.numpy().dtype), list(w.shape)) for n, w in tensors.items()} == claimed(header)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(NAMES), data=st.binary(max_size=200), packed=st.booleans())
def test_noise_is_an_input_error(name, data, packed):
    with pytest.raises(t.InputError):
        unpacked(sealed(PACKERS[name](data) if packed else data, name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("most", [1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 20_000, 2**22, 2**23])
def test_no_more_is_decompressed_than_asked_for(name, most):
    body = np.random.default_rng(0).integers(0, 9, 2**22, dtype=np.uint8).tobytes()
    assert t.decompress(PACKERS[name](body), name, most) == body[:most]
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(body)
    assert name == "brotli" or t.decompress(hidden, name, most) == body[:most]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2**20 + 1, 50_000_000])
def test_a_bomb_is_refused_before_it_is_unpacked(name, size, monkeypatch):
    """More zeros than the header's tensors have, and a header that claims more than headers may have."""
    asked, decompress = [], t.decompress
    monkeypatch.setattr(t, "decompress", lambda data, name, most: asked.append(most) or decompress(data, name, most))
    head = body_of([["a", "int8", [2**20]]], b"")
    for body in (head.ljust(len(head) + size, b"\0"), (2**20 + 1).to_bytes(4, "little").ljust(size, b" ")):
        with pytest.raises(t.InputError):
            unpacked(sealed(PACKERS[name](body), name))
    assert max(asked) <= len(head) + 2**20 + 5
    assert unpacked(sealed(PACKERS[name](head.ljust(len(head) + 2**20, b"\0")), name))[1]["a"].numel() == 2**20  # nothing else is wrong with it


@pytest.mark.parametrize("tensors, raw", [([], b"x"), ([["a", "int8", [3]]], b"1234"), ([["a", "int8", [3]]], b"12"), ([["a", "float16", [3]]], b"12345")])
def test_bytes_too_many_or_too_few_for_the_header_are_refused(tensors, raw):
    with pytest.raises(t.InputError):
        unpacked(sealed(PACKERS["brotli"](body_of(tensors, raw)), "brotli"))


@pytest.mark.parametrize("name", ["zlib", "", "pickle", "ZSTD", "zstd\0", "os", "\u00e9"])
def test_an_unknown_compressor_in_the_file_is_refused(name):
    data = PACKERS["zstd"](body_of([], b""))
    assert unpacked(sealed(data, "zstd"))[1] == {}
    packed = name.encode("latin-1").ljust(8) + data
    with pytest.raises(t.InputError):
        unpacked(t.ARTIFACT_MAGIC + t.ARTIFACT_FORMAT.to_bytes(4, "little") + hashlib.sha256(packed).digest() + packed)


@pytest.mark.parametrize("name, package", [("brotli", "brotli"), ("zstd", "zstandard"), ("rans", "zstandard")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    cfg = dataclasses.replace(CFG, compressor=name)
    blob = t.pack({"a.codes": torch.zeros(3, 3, dtype=torch.int8)}, False, cfg)
    monkeypatch.setitem(sys.modules, package, None)
    for act in (lambda: t.compressor_module(name), lambda: t.pack({"a.codes": torch.zeros(3, 3, dtype=torch.int8)}, False, cfg), lambda: unpacked(blob)):
        with pytest.raises(t.InputError, match=f"COMPRESSOR={name} needs the package {package}"):
            act()


def test_a_run_without_its_compressor_refuses_before_it_trains(env, tmp_path):
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "brotli.py").write_text("raise ImportError\n")
    done = run(env | {"COMPRESSOR": "brotli", "PYTHONPATH": str(tmp_path / "gone")}, check=False, fresh=True)
    assert done.returncode == 1 and done.stderr.strip() == "train_gpt.py: " + "COMPRESSOR=brotli needs the package brotli; pip install -r requirements.txt"
    assert not done.stdout and not list(tmp_path.glob("*.ptz")) and not (tmp_path / "logs" / "test.txt").exists()


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_whether_the_loops_run_travels_with_the_weights(cfg, env, log, name, looped):
    cfg = dataclasses.replace(cfg, compressor=name, zstd_level=3, num_loops=2, loop_start=1, loop_end=2)
    model = make_model(cfg)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    plans = t.quant_plans(weights, t.quant_specs(model, cfg), cfg, {})
    t.save_artifact(plans, weights, looped, cfg, t.Ranks(), log)
    paths = {k: v for k, v in env.items() if k in ("DATA_PATH", "TOKENIZER_PATH")}
    loaded, weights, found, *_ = t.load_artifact(cfg.artifact_path, paths)
    assert found is looped and loaded.num_loops == 2 and loaded.group("model", "evaluation") == cfg.group("model", "evaluation")
    expected = t.dequantize(t.quantize(weights, plans))
    assert weights.keys() == expected.keys() and all(torch.equal(w, expected[n]) for n, w in weights.items())


@pytest.mark.parametrize("word", [1, "yes", None, [True]])
def test_a_header_that_does_not_say_whether_the_model_is_looped_is_refused(env, tmp_path, word):
    cfg = t.Config.from_env(env)
    blob = t.pack({}, True, dataclasses.replace(cfg, zstd_level=3))
    body = unpacked_body(blob)
    start = 4 + int.from_bytes(body[:4], "little")
    header = json.loads(body[4:start])
    path = tmp_path / "x.ptz"
    for looped in (True, False, word):
        text = json.dumps(header | {"looped": looped}).encode()
        path.write_bytes(sealed(PACKERS["zstd"](len(text).to_bytes(4, "little") + text), "zstd"))
        if looped is word:
            with pytest.raises(t.InputError, match="does not say whether the model is looped"):
                t.load_artifact(path, for_evaluation(env))
        else:
            assert t.load_artifact(path, for_evaluation(env)).looped is looped
