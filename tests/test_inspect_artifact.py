"""tools.model.inspect against artifacts whose tensors are known."""

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter

import pytest
import torch
import zstandard
from conftest import ROOT, make_model, run
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as t
from tools.model import inspect as tool

CODE = ROOT / "train_gpt.py"


@pytest.fixture
def tensors(cfg):
    """What is stored of a model of four blocks; one has no codes."""
    model = make_model(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    stored = t.quantize(weights, t.quant_plans(weights, t.quant_specs(model, cfg), cfg, {}))
    for kind in ("codes", "scales", "columns"):
        del stored[f"blocks.2.attn.c_q.weight.{kind}"]
    plain = {"blocks.2.attn.c_q.weight": weights["blocks.2.attn.c_q.weight"].half()}
    return stored | plain | {"blocks.1.mlp.fc.weight.columns": torch.linspace(0.5, 2, 32).half()}


@pytest.fixture
def artifact(tensors, cfg, tmp_path):
    path = tmp_path / "model.ptz"
    path.write_bytes(t.pack(tensors, True, cfg))
    return path


def resealed(blob, change):
    """The artifact with change(header) for a header."""
    body = zstandard.decompress(blob[48:])
    start = 4 + int.from_bytes(body[:4], "little")
    header = json.loads(body[4:start])
    change(header)
    text = json.dumps(header).encode()
    packed = blob[40:48] + zstandard.compress(len(text).to_bytes(4, "little") + text + body[start:])
    return blob[:8] + hashlib.sha256(packed).digest() + packed


def bits_of(values):
    """Shannon's entropy, in bits, of all of a list."""
    return -sum(n * math.log2(n / len(values)) for n in Counter(values).values())


def test_a_row_tells_how_its_parameter_is_stored(artifact, tensors, cfg):
    rows = {r.name: r for r in tool.contents(artifact, CODE)["parameters"]}
    assert {name: r.role for name, r in rows.items()} == t.parameter_roles(t.GPT(cfg))
    for name, r in rows.items():
        parts = [w for key, w in tensors.items() if key == name or key.rpartition(".")[0] == name and key.endswith((".codes", ".scales", ".columns"))]
        assert r.raw == sum(w.numel() * w.element_size() for w in parts), name
        planes = [bytes(w.numpy().tobytes())[i :: w.element_size()] for w in parts for i in range(w.element_size())]
        assert r.estimate == pytest.approx(sum(map(bits_of, planes)) / 8), name
        if f"{name}.codes" in tensors:
            codes = tensors[f"{name}.codes"]
            assert r.bits == pytest.approx(bits_of(codes.flatten().tolist()) / codes.numel()) and r.shape == list(codes.shape)
            assert r.max_code == max(map(abs, codes.flatten().tolist())) and r.dtype == "int8" and len(parts) == 3
        else:
            assert (r.max_code, r.dtype, r.shape) == (None, "float16", list(tensors[name].shape))


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=50))
def test_entropy_is_shannons(values):
    assert tool.entropy(torch.tensor(values, dtype=torch.int8)) == pytest.approx(bits_of(values), abs=1e-9)


def test_entropy_of_known_tensors():
    assert tool.entropy(torch.zeros(9, 7, dtype=torch.int8)) == 0 == tool.entropy(torch.tensor(1.5))
    assert tool.entropy(torch.arange(-2, 2).to(torch.int8).repeat(5)) == 40
    assert tool.entropy(torch.arange(256).to(torch.int16).view(torch.float16)) == 256 * 8  # all low bytes, one high byte


def test_blocks_go_together_and_nothing_is_lost(artifact, cfg):
    rows = tool.contents(artifact, CODE)["parameters"]
    merged = tool.merged(rows)
    for column in ("count", "raw", "estimate"):
        assert sum(getattr(r, column) for r in merged) == pytest.approx(sum(getattr(r, column) for r in rows))
    assert sum(r.count * math.prod(r.shape) for r in merged) == sum(p.numel() for p in t.GPT(cfg).parameters())
    assert sorted((r.count, r.dtype) for r in merged if r.name == "blocks.*.attn.c_q.weight") == [(1, "float16"), (3, "int8")]
    found = {r.name: r for r in merged}
    assert len(found) + 1 == len(merged) < len(rows) and [r.role for r in merged] == sorted((r.role for r in merged), key=tool.ROLES.index)
    fc, alone = found["blocks.*.mlp.fc.weight"], [r for r in rows if r.name.endswith("mlp.fc.weight")]
    assert fc.count == cfg.num_layers == len(alone) and fc.bits == pytest.approx(sum(r.bits for r in alone) / len(alone))
    assert fc.max_code == max(r.max_code for r in alone)


def test_totals_are_those_of_the_file(artifact, tensors, cfg, tmp_path):
    code = tmp_path / "code.py"
    code.write_bytes(b"#" * 1234)
    found = tool.contents(artifact, code)
    size, weights = artifact.stat().st_size, sum(p.numel() for p in t.GPT(cfg).parameters())
    assert (found["weights"], found["model_bytes"], found["code_bytes"], found["total_bytes"]) == (weights, size, 1234, size + 1234)
    assert found["raw"] == sum(w.nbytes for w in tensors.values()) and found["bits_per_weight"] == 8 * size / weights
    assert found["looped"] is True and found["tokenizer_sha256"] == hashlib.sha256(open(cfg.tokenizer_path, "rb").read()).hexdigest()
    text = tool.report(found, False)
    assert f"code 1,234 + model {size:,} = {size + 1234:,} bytes, {16_000_000 - size - 1234:,} under the cap of 16,000,000" in text
    code.open("r+b").truncate(16_000_000)
    assert f"bytes, {size:,} OVER the cap" in tool.report(tool.contents(artifact, code), False)


@pytest.mark.parametrize("compressor", ["rans", "brotli"])
def test_every_compressor_stores_the_same(artifact, tensors, cfg, compressor):
    plain = tool.contents(artifact, CODE)
    artifact.write_bytes(t.pack(tensors, True, dataclasses.replace(cfg, compressor=compressor)))
    found = tool.contents(artifact, CODE)
    assert found["compressor"] == compressor and plain["compressor"] == "zstd" and found["parameters"] == plain["parameters"]


def test_weights_that_are_not_quantized_are_told_too(cfg, tmp_path):
    weights = {name: p.detach() for name, p in make_model(cfg).named_parameters()}
    (tmp_path / "average.ptz").write_bytes(t.pack(weights, False, cfg))
    found = tool.contents(tmp_path / "average.ptz", CODE)
    assert {r.dtype for r in found["parameters"]} == {"float32"} and found["raw"] == 4 * found["weights"] and found["looped"] is False


def test_the_settings_that_are_not_the_defaults(artifact, cfg):
    found = tool.contents(artifact, CODE)
    given, defaults = t.artifact_settings(cfg), t.artifact_settings(t.Config())
    assert found["settings"] == given
    few, everything = (re.findall(r"^  ([A-Z_0-9]+)=(\S*)(?: \(default (.*)\))?$", tool.report(found, all_), re.M) for all_ in (False, True))
    assert {name: (value, default) for name, value, default in few} == {k: (v, defaults[k]) for k, v in given.items() if v != defaults[k]}
    assert {name: value for name, value, _ in everything} == given and len(everything) > len(few)


def test_the_command_needs_neither_tokenizer_nor_data(artifact, cfg, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    everything = run({}, str(artifact), "--all", script="tools.model.inspect", cwd=empty).stdout
    found, text = tool.contents(artifact, CODE), tool.report(tool.contents(artifact, CODE), False)
    assert not list(empty.iterdir()) and f"artifact:{artifact} format:{t.ARTIFACT_FORMAT} compressor:zstd looped:1 variant:card seed:1337\n" in text
    assert found["code_bytes"] == CODE.stat().st_size
    for r in (row._asdict() for row in found["parameters"]):
        line = next(line for line in everything.splitlines() if line.split()[:1] == [r["name"]])
        assert f"{r['raw']:,}" in line and f" {r['bits']:.3f} " in line and "x".join(map(str, r["shape"])) in line and f" {r['dtype']} " in line
    assert "blocks.*" in text and "blocks.*" not in everything and all(f"\n  {role} " in out for role in tool.ROLES for out in (text, everything))


def drop(name):
    return lambda header: header["settings"].pop(name)


@pytest.mark.parametrize("damage, words", [
    (lambda b: b"", "not an artifact"), (lambda b: b"PK\x03\x04" + b[4:], "not an artifact"), (lambda b: b[:-9], "truncated or damaged"),
    (lambda b: b[:4] + (99).to_bytes(4, "little") + b[8:], "format 99"),
    (lambda b: resealed(b, drop("MODEL_DIM")), "its settings make [0-9]+ weights"),
    (lambda b: resealed(b, lambda h: h["settings"].update(OUTPUT_DIR="/")), "unknown settings OUTPUT_DIR"),
    (lambda b: resealed(b, lambda h: h.pop("settings")), "settings"), (lambda b: resealed(b, lambda h: h.update(settings=[])), "do not match its header"),
    (lambda b: resealed(b, lambda h: h["settings"].update(MODEL_DIM="33")), "multiple of NUM_HEADS"),
    (lambda b: resealed(b, lambda h: h["settings"].update(MODEL_DIM="64")), "does not belong to its model"),
    (lambda b: resealed(b, lambda h: h["settings"].update(MODEL_DIM=64)), "model.ptz"),
    (lambda b: resealed(b, lambda h: h.update(tokenizer_sha256="\x1b[2J")), "not a sha256"),
    (lambda b: resealed(b, lambda h: h.update(tokenizer_sha256=7)), "expected"),
    (lambda b: resealed(b, lambda h: h["tensors"][0].__setitem__(0, "x.codes")), "does not belong to its model"),
])
def test_a_bad_file_is_told_in_one_line(artifact, damage, words):
    artifact.write_bytes(damage(artifact.read_bytes()))
    with pytest.raises(t.InputError, match=words) as caught:
        tool.contents(artifact, CODE)
    assert str(artifact) in str(caught.value) and "\n" not in str(caught.value)


def test_codes_that_train_gpt_never_writes_are_refused(tensors, cfg, tmp_path):
    name = "blocks.0.mlp.fc.weight.codes"
    (tmp_path / "x.ptz").write_bytes(t.pack(tensors | {name: tensors[name].float() * float("nan")}, False, cfg))
    with pytest.raises(t.InputError, match="'blocks.0.mlp.fc.weight.codes' of 'float32'"):
        tool.contents(tmp_path / "x.ptz", CODE)


def test_a_file_that_is_not_there_is_told_in_one_line(tmp_path):
    done = run({}, str(tmp_path / "none.ptz"), script="tools.model.inspect", check=False)
    assert done.returncode == 1 and not done.stdout and done.stderr == f"tools.model.inspect: cannot read {tmp_path / 'none.ptz'}: No such file or directory\n"
    with pytest.raises(t.InputError, match=f"cannot read {tmp_path}: Is a directory"):
        tool.contents(tmp_path, CODE)
    with pytest.raises(t.InputError, match="cannot read no/code.py: No such file"):
        tool.contents(tmp_path, tool.Path("no/code.py"))
