import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
import zstandard
from conftest import coded, make_model, run, unpacked
from helpers.smoke import for_evaluation
from helpers.twins import trainer_of
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t


@pytest.fixture
def model(cfg):
    return make_model(cfg)


def saved(model, cfg, log, looped=True):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    t.save_artifact(t.quant_plans(weights, t.quant_specs(model, cfg), cfg, {}), weights, looped, cfg, t.Ranks(), log)


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
    tensors = {"a": torch.randn(3, 5), "b.codes": torch.randint(-31, 32, (4, 6)).to(torch.int8), "b.scales": torch.rand(4).half(),
               "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    header, back = unpacked(t.pack(tensors, True, dataclasses.replace(cfg, zstd_level=3)))
    assert back.keys() == tensors.keys() and all(torch.equal(back[n], w) and back[n].dtype == w.dtype for n, w in tensors.items())
    assert header["looped"] is True and header["tokenizer_sha256"] == hashlib.sha256(open(cfg.tokenizer_path, "rb").read()).hexdigest()


def test_the_file_alone_restores_the_model_and_its_settings(model, cfg, artifact, env):
    paths = {k: v for k, v in env.items() if k in ("DATA_PATH", "TOKENIZER_PATH")}
    loaded, weights, looped, *_ = t.load_artifact(artifact, paths)
    assert looped is True
    assert loaded.group("model", "evaluation") == cfg.group("model", "evaluation") and loaded.variant == "card"
    assert not list(artifact.parent.glob("final_model.int6.ptz?*"))
    rebuilt = t.load_model(loaded, weights, t.Ranks())
    expected = t.dequantize(coded({n: p.detach() for n, p in model.named_parameters()}, t.quant_specs(model, cfg), cfg))
    assert all(torch.equal(p, expected[n]) and p.requires_grad for n, p in rebuilt.named_parameters())
    torch.testing.assert_close(rebuilt.rotary, model.rotary, rtol=0, atol=0)


def test_a_model_coded_by_cost_is_restored_from_its_entropy_coded_file(model, cfg, env, log):
    cfg = dataclasses.replace(cfg, quantizer="gptq", mean_scale=0.01, matrix_bits=8, compressor="rans", num_loops=1, loop_start=1, loop_end=2)
    model = make_model(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    costs = {name: t.Curvature(torch.eye(w.size(1)), torch.ones(len(w))) for name, w in weights.items() if w.ndim == 2}
    plans = t.quant_plans(weights, t.quant_specs(model, cfg), cfg, costs)
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
    (lambda b: b[: len(b) // 2], "truncated or damaged"), (lambda b: b[:20], "truncated or damaged"), (lambda b: b"", "not an artifact"),
    (lambda b: b[:-9] + bytes([b[-9] ^ 4]) + b[-8:], "truncated or damaged"), (lambda b: b"PK\x03\x04" + b[4:], "not an artifact"),
    (lambda b: b[:4] + (1).to_bytes(4, "little") + b[8:], "format 1, not 6"),
    (lambda b: b[:40] + b"brotli  " + b[48:], "truncated or damaged"),
])
def test_a_damaged_file_is_told_in_one_line(artifact, env, damage, words):
    artifact.write_bytes(damage(artifact.read_bytes()))
    with pytest.raises(t.InputError, match=words) as caught:
        t.load_artifact(artifact, for_evaluation(env))
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
        t.load_artifact(path, for_evaluation(env))


@pytest.mark.parametrize("change", [{"NUM_LAYERS": "1000000000"}, {"MODEL_DIM": "1000000000000"}, {"TRAIN_SEQ_LEN": "10000000000"},
                                    {"OUTPUT_DIR": "/tmp"}, {"MODEL_DIM": "65536", "NUM_HEADS": "1", "NUM_KV_HEADS": "1"}])
def test_settings_of_a_malicious_header_build_nothing(cfg, tmp_path, env, change):
    path = tmp_path / "x.ptz"
    digest = hashlib.sha256(open(cfg.tokenizer_path, "rb").read()).hexdigest()
    path.write_bytes(sealed({"settings": t.artifact_settings(cfg) | change, "looped": False, "tensors": [], "tokenizer_sha256": digest}))
    with pytest.raises(t.InputError):
        t.load_model(*t.load_artifact(path, for_evaluation(env))[:2], t.Ranks())


# ---- settings

PATHS = ("DATA_PATH", "TOKENIZER_PATH")


def opened(blob):
    """The header and the bytes behind it of a file that zstd packed."""
    body = zstandard.ZstdDecompressor().decompress(blob[48:])
    start = 4 + int.from_bytes(body[:4], "little")
    return json.loads(body[4:start]), body[start:]


def forged(artifact, change=lambda header: None, raw=lambda raw: raw):
    """The artifact with its header or its tensors changed, under a valid checksum."""
    header, tensors = opened(artifact.read_bytes())
    change(header)
    artifact.write_bytes(sealed(header, raw(tensors)))
    return artifact


@pytest.mark.parametrize("name", ["MATRIX_LR", "OUTPUT_DIR", "VAL_MAX_TOKENS", "NO_SUCH_OPTION", "\x1b[2J\n", "x" * 10**5])
def test_an_unknown_setting_is_refused(artifact, env, name):
    forged(artifact, lambda header: header["settings"].update({name: "1"}))
    with pytest.raises(t.InputError, match="unknown settings"):
        t.load_artifact(artifact, {k: env[k] for k in PATHS})
    done = run({k: env[k] for k in PATHS} | dict(EVAL_ONLY="1", ARTIFACT=str(artifact)), check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr[:-1].isprintable() and len(done.stderr) < 2100


@pytest.mark.parametrize("names", [["TTT_Z_LOSS"], ["TTT_TEMPERATURE", "SEED", "DTYPE"]])
def test_a_setting_that_an_older_file_lacks_gets_its_default_and_is_told(artifact, env, names, cfg):
    whole = t.load_artifact(artifact, {k: env[k] for k in PATHS})
    forged(artifact, lambda header: [header["settings"].pop(name) for name in names])
    loaded = t.load_artifact(artifact, {k: env[k] for k in PATHS})
    assert loaded.cfg == dataclasses.replace(whole.cfg, **{n.lower(): getattr(t.Config(), n.lower()) for n in names}) and whole.warnings == []
    assert len(loaded.warnings) == 1 and all(name in loaded.warnings[0] for name in names)


def test_a_missing_setting_gets_the_scripts_default_and_not_the_rows(artifact, env):
    forged(artifact, lambda header: header["settings"].pop("TTT_GRAD_CLIP"))  # 1 in the row
    assert t.load_artifact(artifact, {k: env[k] for k in PATHS}).cfg.ttt_grad_clip == t.Config().ttt_grad_clip == 0


def test_a_file_does_not_set_how_many_targets_are_scored(artifact, env):
    loaded = t.load_artifact(artifact, {k: env[k] for k in PATHS}).cfg
    assert (loaded.val_max_tokens, loaded.eval_batch_seqs) == (0, 32)  # the run had VAL_MAX_TOKENS=700
    assert not {"VAL_MAX_TOKENS", "EVAL_BATCH_SEQS"} & opened(artifact.read_bytes())[0]["settings"].keys()
    done = run({k: env[k] for k in PATHS} | dict(EVAL_ONLY="1", ARTIFACT=str(artifact), OUTPUT_DIR=env["OUTPUT_DIR"], TTT_EPOCHS="0", VAL_MAX_TOKENS="50"))
    facts = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert facts["targets"] == 50 < facts["val_split_targets"] and f"only 50 of the split's {facts['val_split_targets']} targets" in done.stdout
    assert facts["warnings"] and len(facts["val_bytes_sha256"]) == 64


@pytest.mark.parametrize("trained, given, warned", [
    ("fp32", {}, False), ("bf16", {}, False), ("fp32", {"DTYPE": "bf16"}, True), ("bf16", {"DTYPE": "bf16"}, False)])
def test_the_dtype_of_the_run_holds_unless_the_user_says_which_is_told(artifact, env, trained, given, warned):
    forged(artifact, lambda header: header["settings"].update(DTYPE=trained))
    loaded = t.load_artifact(artifact, {k: env[k] for k in PATHS} | given)
    assert loaded.cfg.dtype == given.get("DTYPE", trained) and bool(loaded.warnings) == warned


@pytest.mark.parametrize("value", ["Infinity", "1e400", "9" * 400, str(10**30), "true", "null", '["1"]', '{"a": 1}', "-0.0", '"' + "9" * 400 + '"', '"1e999"',
                                   '"\\ud800"', '"1\\n2"'])
@pytest.mark.parametrize("name", ["VE_DIM", "TTT_LR", "LOGIT_SOFTCAP"])
def test_a_setting_that_is_no_short_text_of_its_kind_is_one_line(artifact, env, name, value):
    header, raw = opened(artifact.read_bytes())
    header["settings"][name] = "HERE"
    text = json.dumps(header).replace('"HERE"', value).encode()
    artifact.write_bytes(sealed_packed(zstandard.ZstdCompressor().compress(len(text).to_bytes(4, "little") + text + raw)))
    with pytest.raises(t.InputError) as caught:
        t.load_artifact(artifact, {k: env[k] for k in PATHS})
    assert t.explain(caught.value).count("\n") == 1 and t.explain(caught.value)[:-1].isprintable()


# ---- tensors

def first_of(header, suffix):
    return next(entry for entry in header["tensors"] if entry[0].endswith(suffix))


@pytest.mark.parametrize("change", [
    lambda h: first_of(h, ".codes").__setitem__(1, "uint8"), lambda h: first_of(h, ".scales").__setitem__(1, "int16"),
    lambda h: first_of(h, ".codes").__setitem__(2, first_of(h, ".codes")[2][::-1]), lambda h: first_of(h, ".codes").__setitem__(2, ""),
    lambda h: first_of(h, ".scales")[2].append(1), lambda h: first_of(h, ".columns")[2].insert(0, 1),
    lambda h: first_of(h, ".scale").__setitem__(2, ""), lambda h: h["tensors"].append(["none", "int8", [0]]),
    lambda h: h["tensors"].extend([[f"t{i}", "int8", [0]] for i in range(40_000)]), lambda h: h["tensors"].append(h["tensors"][0]),
    lambda h: h["tensors"].pop(), lambda h: h.update(looped=1), lambda h: h.update(looped=None), lambda h: h.pop("looped")])
def test_a_table_that_is_not_the_models_is_refused(artifact, env, change):
    forged(artifact, change)
    with pytest.raises(t.InputError):
        t.load_artifact(artifact, {k: env[k] for k in PATHS})


@pytest.mark.parametrize("kind, dtype", [("table", "int64"), ("table", "uint64"), ("table", "uint32"), ("table", "float32"), ("state", "int64"),
                                         ("words", "uint32"), ("rows", "int8"), ("columns", "uint16")])
def test_another_dtype_of_an_entropy_coded_stream_is_refused(model, cfg, env, log, kind, dtype):
    """An int64 table can sum to 4,096 by an overflow, and what it repeats then is written outside of its buffer."""
    cfg = dataclasses.replace(cfg, compressor="rans")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    streams = t.entropy_encode(t.quantize(weights, t.quant_plans(weights, t.quant_specs(model, cfg), cfg, {})))
    name = next(n for n in sorted(streams) if n.endswith((f"rans.{kind}", f"codes.{kind}")))
    array = streams[name].numpy().astype(dtype)
    if (kind, dtype) == ("table", "int64"):
        array.T[:, :4] = 2**62
        array.T[:, 3] += 4096
        assert (array.T.astype(np.int64)[:, :4].sum(1) == 4096).all()
    streams[name] = torch.from_numpy(array)
    cfg.artifact_path.write_bytes(t.pack(streams, False, dataclasses.replace(cfg, compressor="zstd")))
    with pytest.raises(t.InputError, match="does not belong to its model"):
        t.load_artifact(cfg.artifact_path, {k: env[k] for k in PATHS})


def test_a_small_file_cannot_claim_a_large_model(artifact, env, cfg):
    """By settings that make one: zeros compress to nothing. Nor if it is padded to the size of one."""
    for padding in (b"", bytes(2**22)):
        header, raw = opened(t.pack({"tok_emb.weight": torch.zeros(384, 32)}, False, cfg))
        header["settings"] |= dict(MLP_MULT="20000")
        packed = zstandard.ZstdCompressor().compress(len(text := json.dumps(header).encode()).to_bytes(4, "little") + text + raw)
        artifact.write_bytes(sealed_packed(packed + padding))
        with pytest.raises(t.InputError, match="more than 6 for each|do not match its header|does not belong to its model"):
            t.load_artifact(artifact, {k: env[k] for k in PATHS})


SKIPPED = (0x184D2A50).to_bytes(4, "little") + (70_000).to_bytes(4, "little") + bytes(70_000)  # a frame that every zstd reader passes over


@pytest.mark.parametrize("padding", [b"\0" * 5000, b"x" * 70_000, SKIPPED], ids=["zeros", "letters", "skippable frame"])
@pytest.mark.parametrize("name", ["zstd", "brotli"])
def test_bytes_behind_the_end_are_refused(model, cfg, env, log, name, padding):
    cfg = dataclasses.replace(cfg, compressor=name, zstd_level=3)
    saved(model, cfg, log)
    blob = cfg.artifact_path.read_bytes()
    cfg.artifact_path.write_bytes(sealed_packed(blob[48:] + padding, blob[40:48]))
    with pytest.raises(t.InputError):
        t.load_artifact(cfg.artifact_path, {k: env[k] for k in PATHS})


@pytest.mark.parametrize("name, value", [("skip_weights", torch.nan), ("skip_weights", torch.inf), ("blocks.0.mlp.fc.weight.scales", torch.inf),
                                         ("blocks.0.mlp.fc.weight.columns", torch.nan), ("tok_emb.weight.scales", -torch.inf)])
def test_weights_that_are_nan_or_infinite_are_refused(model, cfg, env, name, value):
    tensors = coded({n: p.detach() for n, p in model.named_parameters()}, t.quant_specs(model, cfg), cfg)
    tensors[name].view(-1)[0] = value
    cfg.artifact_path.write_bytes(t.pack(tensors, False, dataclasses.replace(cfg, zstd_level=3)))
    with pytest.raises(t.InputError, match="NaN or infinite"):
        t.load_artifact(cfg.artifact_path, {k: env[k] for k in PATHS})


def test_a_score_that_is_not_finite_is_no_result(artifact, env):
    own = dict(EVAL_ONLY="1", ARTIFACT=str(artifact), TTT_LR="1e18", VAL_MAX_TOKENS="700", RUN_ID="x")
    done = run({k: env[k] for k in (*PATHS, "OUTPUT_DIR")} | own, check=False)
    assert done.returncode == 1 and "RESULT" not in done.stdout and done.stderr.count("\n") == 1 and "loss is nan" in done.stderr


def test_an_average_that_no_step_went_into_is_not_saved(cfg, log):
    trainer, log.active = trainer_of(cfg), True
    path = t.Path(cfg.output_dir, "final_model.average.ptz")
    t.save_checkpoint(trainer, "average", log)
    assert not path.exists()
    trainer.average.update(0.5)
    t.save_checkpoint(trainer, "average", log)
    assert path.exists()


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
    with pytest.raises(t.InputError, match="do not match its settings"):
        t.load_model(dataclasses.replace(cfg, mlp_mult=2.0), weights, t.Ranks())
    weights.pop("skip_weights")
    with pytest.raises(t.InputError, match="skip_weights"):
        t.load_model(cfg, weights, t.Ranks())


def test_settings_that_the_artifact_fixes_cannot_be_overridden(artifact, env):
    assert t.load_artifact(artifact, for_evaluation(env) | {"EVAL_STRIDE": "16"})[0].eval_stride == 16
    with pytest.raises(t.InputError, match="MODEL_DIM cannot change for a packed model"):
        t.load_artifact(artifact, for_evaluation(env) | {"MODEL_DIM": "64"})


def test_another_tokenizer_is_refused(artifact, env, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(b"x")
    with pytest.raises(t.InputError, match="not the tokenizer it was trained with"):
        t.load_artifact(artifact, for_evaluation(env) | {"TOKENIZER_PATH": str(other)})


def test_over_the_cap_is_an_error_that_names_the_bytes_and_keeps_the_old_file(model, cfg, artifact, env, log):
    before = artifact.read_bytes()
    size = len(before) + (code := len(open(t.__file__, "rb").read()))
    with pytest.raises(t.InputError, match=f"code \\+ model = {size} bytes, 1 over"):
        saved(model, dataclasses.replace(cfg, max_artifact_bytes=size - 1), log)
    assert artifact.read_bytes() == before and code > 10_000
    saved(model, dataclasses.replace(cfg, max_artifact_bytes=size), log)
    with pytest.raises(t.InputError, match="over MAX_ARTIFACT_BYTES"):
        t.load_artifact(artifact, for_evaluation(env) | {"MAX_ARTIFACT_BYTES": str(size - 1)})


def test_nothing_is_written_where_nothing_can_be(tmp_path):
    with pytest.raises(t.InputError, match="cannot write .*/folder: No such file"):
        t.write_file(tmp_path / "no" / "such" / "folder", b"x")
