import dataclasses
import hashlib
import json

import pytest
import torch
import zstandard
from conftest import coded, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t


@pytest.fixture
def model(cfg):
    return make_model(cfg)


def saved(model, cfg, log, looped=True):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    t.save_artifact(t.coding_plans(weights, t.grids(model, cfg), cfg, {}), weights, looped, cfg, t.Ranks(), log)


@pytest.fixture
def artifact(model, cfg, log):
    saved(model, cfg, log)
    return cfg.artifact_path


def sealed(header, raw=b"", body=None):
    """A well-formed file around any header and tensor bytes."""
    text = json.dumps(header).encode()
    return sealed_packed(zstandard.ZstdCompressor().compress(len(text).to_bytes(4, "little") + text + raw if body is None else body))


def sealed_packed(packed, compressor=b"zstd    "):
    return t.ARTIFACT_MAGIC + t.ARTIFACT_FORMAT.to_bytes(4, "little") + hashlib.sha256(compressor + packed).digest() + compressor + packed


def test_tensors_come_back_exactly(cfg):
    tensors = {"a": torch.randn(3, 5), "b.codes": torch.randint(-31, 32, (4, 6)).to(torch.int8), "b.steps": torch.rand(4).half(),
               "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    header, back = t.unpack(t.pack(tensors, True, dataclasses.replace(cfg, zstd_level=3)))
    assert back.keys() == tensors.keys() and all(torch.equal(back[n], w) and back[n].dtype == w.dtype for n, w in tensors.items())
    assert header["looped"] is True and header["tokenizer_sha256"] == hashlib.sha256(open(cfg.tokenizer_path, "rb").read()).hexdigest()


def test_the_file_alone_restores_the_model_and_its_settings(model, cfg, artifact, env):
    paths = {k: v for k, v in env.items() if k in ("DATA_PATH", "TOKENIZER_PATH")}
    loaded, weights, looped, *_ = t.load_artifact(artifact, paths)
    assert looped is True
    assert loaded.group("model", "evaluation") == cfg.group("model", "evaluation") and loaded.variant == "smoke"
    assert not list(artifact.parent.glob("final_model.int6.ptz?*"))
    rebuilt = t.load_model(loaded, weights, t.Ranks())
    expected = t.dequantize(coded({n: p.detach() for n, p in model.named_parameters()}, t.grids(model, cfg), cfg))
    assert all(torch.equal(p, expected[n]) and p.requires_grad for n, p in rebuilt.named_parameters())
    torch.testing.assert_close(rebuilt.cos, model.cos, rtol=0, atol=0)


def test_a_model_coded_by_cost_is_restored_from_its_entropy_coded_file(model, cfg, env, log):
    cfg = dataclasses.replace(cfg, quantizer="gptq", mean_step=0.01, compressor="rans", num_loops=1, loop_start=1, loop_end=2)
    model = make_model(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    costs = {name: t.Curvature(torch.eye(w.size(1)), torch.ones(len(w))) for name, w in weights.items() if w.ndim == 2}
    plans = t.coding_plans(weights, t.grids(model, cfg), cfg, costs)
    t.save_artifact(plans, weights, True, cfg, t.Ranks(), log)
    loaded, read, looped, *_ = t.load_artifact(cfg.artifact_path, {k: v for k, v in env.items() if k in ("DATA_PATH", "TOKENIZER_PATH")})
    expected = t.dequantize(t.quantize(weights, plans))
    rebuilt = t.load_model(loaded, read, t.Ranks())
    assert looped and all(torch.equal(p, expected[n]) and (p - weights[n]).abs().max() < 0.02 for n, p in rebuilt.named_parameters())


def test_packing_is_deterministic(model, cfg, artifact, log):
    first = artifact.read_bytes()
    saved(model, cfg, log)
    assert artifact.read_bytes() == first


@pytest.mark.parametrize("damage, words", [
    (lambda b: b[: len(b) // 2], "cut or damaged"), (lambda b: b[:20], "cut or damaged"), (lambda b: b"", "not an artifact"),
    (lambda b: b[:-9] + bytes([b[-9] ^ 4]) + b[-8:], "cut or damaged"), (lambda b: b"PK\x03\x04" + b[4:], "not an artifact"),
    (lambda b: b[:4] + (1).to_bytes(4, "little") + b[8:], "format 1, not 5"),
    (lambda b: b[:40] + b"brotli  " + b[48:], "cut or damaged"),
])
def test_a_damaged_file_is_told_in_one_line(artifact, env, damage, words):
    artifact.write_bytes(damage(artifact.read_bytes()))
    with pytest.raises(t.InputError, match=words) as caught:
        t.load_artifact(artifact, env)
    assert str(artifact) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("header", [
    {}, [], {"tensors": [["a", "int8", [2**50]]]}, {"tensors": [["a", "int8", [-4]]]}, {"tensors": [["a", "object", [1]]]},
    {"tensors": [["a", "int8", [2**70]]]}, {"tensors": [["a", "int8"]]}, {"tensors": [["a", "int8", ["x"]]]}, {"tensors": 7}, {"tensors": [], "settings": 3},
    {"tensors": [[7, "int8", [0]]]}, {"tensors": [["rans.words", "uint16", [0]]]},
    {"tensors": [], "settings": {"NUM_LAYERS": 4}}, {"tensors": [], "settings": {"NUM_LAYERS": "4"}, "tokenizer_sha256": "0"},
])
def test_a_malicious_header_is_refused_without_allocating_what_it_claims(tmp_path, env, header):
    path = tmp_path / "x.ptz"
    path.write_bytes(sealed(header))
    with pytest.raises(t.InputError):
        t.load_artifact(path, env)


@pytest.mark.parametrize("change", [{"NUM_LAYERS": "1000000000"}, {"MODEL_DIM": "1000000000000"}, {"TRAIN_SEQ_LEN": "10000000000"},
                                    {"OUTPUT_DIR": "/tmp"}, {"MODEL_DIM": "65536", "NUM_HEADS": "1", "NUM_KV_HEADS": "1"}])
def test_settings_of_a_malicious_header_build_nothing(cfg, tmp_path, env, change):
    path, env = tmp_path / "x.ptz", {k: v for k, v in env.items() if k != "VARIANT"}
    digest = hashlib.sha256(open(cfg.tokenizer_path, "rb").read()).hexdigest()
    path.write_bytes(sealed({"settings": t.artifact_settings(cfg) | change, "looped": False, "tensors": [], "tokenizer_sha256": digest}))
    with pytest.raises(t.InputError):
        t.load_model(*t.load_artifact(path, env)[:2], t.Ranks())


@pytest.mark.parametrize("name, text", [("MATRIX_LR", "0.5"), ("NUM_LAYERS", None), ("OUTPUT_DIR", "/tmp")])
def test_a_setting_too_many_or_too_few_is_named(cfg, tmp_path, env, name, text):
    digest = hashlib.sha256(open(cfg.tokenizer_path, "rb").read()).hexdigest()
    settings = {k: v for k, v in (t.artifact_settings(cfg) | {name: text}).items() if v is not None}
    (path := tmp_path / "x.ptz").write_bytes(sealed({"settings": settings, "looped": False, "tensors": [], "tokenizer_sha256": digest}))
    with pytest.raises(t.InputError, match=f"its settings lack or add {name}"):
        t.load_artifact(path, {k: env[k] for k in ("DATA_PATH", "TOKENIZER_PATH")})


def test_an_average_that_no_step_went_into_is_not_saved(model, cfg, log):
    average, log.active = t.Average(model), True
    path = t.Path(cfg.output_dir, "final_model.average.ptz")
    t.save_average(average, False, cfg, log)
    assert not path.exists()
    average.update(0.5)
    t.save_average(average, False, cfg, log)
    assert path.exists()


@pytest.mark.parametrize("codes, steps", [((1000,), (1000, 1)), ((4, 4), (3,)), ((4, 4), (4, 4)), ((), ())])
def test_codes_and_steps_that_do_not_match_are_refused(codes, steps):
    with pytest.raises(t.InputError, match="codes"):
        t.dequantize({"a.codes": torch.zeros(codes, dtype=torch.int8), "a.steps": torch.ones(steps).half(), "a.columns": torch.ones(codes[1:]).half()})


@pytest.mark.parametrize("columns", [(3,), (5,), (4, 1), (1, 4), ()])
def test_columns_that_do_not_match_are_refused(columns):
    tensors = {"a.codes": torch.ones(3, 4, dtype=torch.int8), "a.steps": torch.full((3,), 2.0).half(), "a.columns": torch.arange(4).half()}
    assert torch.equal(t.dequantize(tensors)["a"], 2.0 * torch.arange(4).expand(3, 4))
    with pytest.raises(t.InputError, match="columns"):
        t.dequantize(tensors | {"a.columns": torch.ones(columns).half()})


def test_deeply_nested_json_is_refused():
    text = b"[" * 100_000
    with pytest.raises(t.InputError):
        t.unpack(sealed(None, body=len(text).to_bytes(4, "little") + text))


def test_a_declared_size_of_terabytes_is_not_allocated(tmp_path):
    packed = bytes.fromhex("28b52ffde0") + (2**42).to_bytes(8, "little") + b"\x01\x00\x00"
    assert zstandard.get_frame_parameters(packed).content_size == 2**42
    with pytest.raises(t.InputError, match="too much memory"):
        t.unpack(sealed_packed(packed))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_bytes_behind_a_valid_seal_end_in_clean_errors(data):
    body = data.draw(st.binary(max_size=200))
    with pytest.raises(t.InputError):
        t.unpack(sealed(None, body=body))


def test_weights_of_another_shape_do_not_load(cfg, model):
    weights = dict(model.named_parameters())
    with pytest.raises(t.InputError, match="do not fit its settings"):
        t.load_model(dataclasses.replace(cfg, mlp_mult=2.0), weights, t.Ranks())
    weights.pop("skip_weights")
    with pytest.raises(t.InputError, match="skip_weights"):
        t.load_model(cfg, weights, t.Ranks())


def test_settings_that_the_artifact_fixes_cannot_be_overridden(artifact, env):
    assert t.load_artifact(artifact, env | {"EVAL_STRIDE": "16"})[0].eval_stride == 16
    with pytest.raises(t.InputError, match="MODEL_DIM is fixed by it"):
        t.load_artifact(artifact, env | {"MODEL_DIM": "64"})


def test_another_tokenizer_is_refused(artifact, env, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(b"x")
    with pytest.raises(t.InputError, match="not the tokenizer it was trained with"):
        t.load_artifact(artifact, env | {"TOKENIZER_PATH": str(other)})


def test_over_the_cap_is_an_error_that_names_the_bytes_and_keeps_the_old_file(model, cfg, artifact, env, log):
    before = artifact.read_bytes()
    size = len(before) + (code := len(open(t.__file__, "rb").read()))
    with pytest.raises(t.InputError, match=f"code \\+ model = {size} bytes, 1 over"):
        saved(model, dataclasses.replace(cfg, max_artifact_bytes=size - 1), log)
    assert artifact.read_bytes() == before and code > 10_000
    saved(model, dataclasses.replace(cfg, max_artifact_bytes=size), log)
    with pytest.raises(t.InputError, match="over MAX_ARTIFACT_BYTES"):
        t.load_artifact(artifact, env | {"MAX_ARTIFACT_BYTES": str(size - 1)})


def test_nothing_is_written_where_nothing_can_be(tmp_path):
    with pytest.raises(t.InputError, match="cannot write"):
        t.write_file(tmp_path / "no" / "such" / "folder", b"x")
