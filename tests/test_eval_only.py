"""EVAL_ONLY as a user types it: which settings hold, what the clock counts, several shards, Ctrl-C."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, finals, make_model, run
from helpers import forked
from helpers.smoke import SMOKE

import train_gpt as t


@pytest.fixture(scope="module")
def packed(dataset, tmp_path_factory):
    """(folder, settings) of the artifact of a model that nobody trained. Seed, stride and epochs are neither defaults nor those of SMOKE."""
    folder = tmp_path_factory.mktemp("packed")
    given = SMOKE | dict(SEED="7", EVAL_STRIDE="16", TTT_EPOCHS="2", OUTPUT_DIR=str(folder), RUN_ID="packed")
    cfg = t.Config.from_env(dataset | given)
    log = t.Log(cfg, t.Ranks())
    log.active = False
    weights = {name: p.detach() for name, p in make_model(cfg).named_parameters()}
    t.save_artifact(t.quant_plans(weights, t.quant_specs(t.GPT(cfg), cfg), cfg, {}), weights, False, cfg, t.Ranks(), log)
    return folder, cfg


def write_shard(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture
def typed(packed, dataset, tmp_path):
    """The environment of a user who names the folder of the artifact, the tokenizer and 330 tokens of the split in two shards."""
    val, out = tmp_path / "val", tmp_path / "out"
    val.mkdir()
    out.mkdir()
    artifact = t.Config(output_dir=str(out), eval_only=True).artifact_path
    artifact.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(packed[1].artifact_path, artifact)
    tokens = t.read_validation(t.Config.from_env(dataset))[:330]
    write_shard(val / "fineweb_val_000001.bin", tokens[200:])
    write_shard(val / "fineweb_val_000000.bin", tokens[:200])
    return dict(EVAL_ONLY="1", OUTPUT_DIR=str(out), DATA_PATH=str(val), TOKENIZER_PATH=dataset["TOKENIZER_PATH"])


def result(text):
    return json.loads(text.splitlines()[-1].removeprefix("RESULT "))


def log_of(env):
    (path,) = (t.Path(env["OUTPUT_DIR"]) / "logs").glob("*.txt")
    return path


def scored(env):
    """The log of an evaluation in this process."""
    t.main([], env)
    return log_of(env).read_text()


def test_a_folder_alone_names_the_artifact_whose_settings_hold(typed, packed):
    text, (_, cfg) = scored(typed), packed
    facts = result(text)
    assert (facts["variant"], facts["seed"], facts["eval_stride"], facts["ttt_chunk_tokens"]) == ("card", 7, 16, 256)
    assert re.fullmatch(r"card_seed7_eval_.+\.txt", log_of(typed).name)
    weights = t.load_artifact(cfg.artifact_path, {"TOKENIZER_PATH": typed["TOKENIZER_PATH"]}).weights
    model = t.load_model(cfg, weights, t.Ranks())
    here = dataclasses.replace(cfg, data_path=typed["DATA_PATH"])
    log = t.Log(dataclasses.replace(here, output_dir=typed["OUTPUT_DIR"], run_id="here"), t.Ranks())
    log.active = False
    score = t.Scorer(t.read_validation(here), here, t.Ranks(), log).evaluate_windows(model)
    assert finals(text)["final_int6_roundtrip"] == pytest.approx(score.bpb, abs=1e-6)


def test_two_shards_score_as_one_that_holds_both(typed, tmp_path):
    """The two in a process of their own."""
    done = run(typed)
    one = tmp_path / "one"
    one.mkdir()
    write_shard(one / "fineweb_val_000000.bin", t.read_validation(t.Config(data_path=typed["DATA_PATH"])))
    shutil.rmtree(t.Path(typed["OUTPUT_DIR"]) / "logs")
    text = scored(typed | {"DATA_PATH": str(one)})
    assert finals(done.stdout) == finals(text) and len(finals(text)) == 3
    for name in ("targets", "bytes", "val_sha256"):
        assert result(done.stdout)[name] == result(text)[name]
    assert result(text)["targets"] == 329


def test_each_shard_counts_and_they_come_in_the_order_of_their_names(tmp_path):
    parts = [[5, 6, 7], [8], [9, 10]]
    for i in (2, 0, 1):
        write_shard(tmp_path / f"fineweb_val_{i:06d}.bin", parts[i])
    assert t.read_validation(t.Config(data_path=str(tmp_path))).tolist() == sum(parts, [])


@pytest.mark.parametrize("given", [{"EVAL_STRIDE": "32"}, {"NUM_LAYERS": "4", "VARIANT": "card", "SEED": "7"}])
def test_options_of_scoring_come_from_the_environment_and_others_may_repeat_what_holds(typed, given):
    assert result(scored(typed | given | {"TTT_EPOCHS": "0"}))["eval_stride"] == int(given.get("EVAL_STRIDE", 16))


@pytest.mark.parametrize("name, text", [("NUM_LAYERS", "5"), ("LOGIT_SOFTCAP", "20"), ("SEED", "1337"), ("VARIANT", "demo"), ("XSA_LAST_N", "1"),
                                        ("MATRIX_LR", "0.1"), ("ITERATIONS", "3"), ("MATRIX_BITS", "4"), ("FIT", "0"), ("TRAIN_SEQ_LEN", "64")])
def test_what_acts_on_the_model_or_on_training_is_refused_by_name(typed, name, text):
    with pytest.raises(t.InputError, match=name):
        t.main([], typed | {name: text})
    assert not (t.Path(typed["OUTPUT_DIR"]) / "logs").exists()


def slow(monkeypatch, name, seconds):
    """Make a function of the script take so many seconds by its own clock."""
    real, now, passed = getattr(t, name), t.perf_counter, [0.0]

    def late(*args, **options):
        passed[0] += seconds
        return real(*args, **options)

    monkeypatch.setattr(t, "perf_counter", lambda: now() + passed[0])
    monkeypatch.setattr(t, name, late)


@pytest.mark.parametrize("name", ["load_artifact", "load_model", "read_validation", "choose_attention"])
def test_the_seconds_of_an_evaluation_begin_before_the_artifact_is_read(typed, monkeypatch, name):
    slow(monkeypatch, name, 5000.0)
    assert result(scored(typed | {"TTT_EPOCHS": "0"}))["eval_seconds"] >= 5000


def test_after_training_they_hold_the_reading_and_nothing_before(env, monkeypatch):
    settings = env | dict(ITERATIONS="1", WARMUP_STEPS="0", TTT_EPOCHS="0", VAL_MAX_TOKENS="40", MAX_WALLCLOCK_SECONDS="0")
    slow(monkeypatch, "load_artifact", 5000.0)
    slow(monkeypatch, "run_training", 20_000.0)
    t.main([], settings)
    assert 5000 <= result((t.Path(env["OUTPUT_DIR"]) / "logs" / "test.txt").read_text())["eval_seconds"] < 20_000


@pytest.mark.parametrize("call", [1, 4])
def test_ctrl_c_while_it_scores_ends_in_130_without_a_traceback(typed, call):
    code = f"""
import os, signal, sys
import train_gpt as t
real, calls = t.Scorer.window_losses, []
def losses(*args):
    calls.append(0)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*args)
t.Scorer.window_losses = losses
t.run([], os.environ)
"""
    clean = {k: v for k, v in os.environ.items() if k.lower() not in t.Config.__dataclass_fields__}
    done = forked.python(["-c", code], clean | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | typed)
    assert done.returncode == 130 and "Traceback" not in done.stderr + done.stdout, done.stderr
    assert "RESULT" not in log_of(typed).read_text() and "artifact_sha256" in done.stdout


def test_an_artifact_that_fills_the_cap_exactly_is_scored_and_one_byte_more_is_refused(typed, packed):
    size = packed[1].artifact_path.stat().st_size + t.Path(t.__file__).stat().st_size
    with pytest.raises(t.InputError, match=str(size)):
        t.main([], typed | {"MAX_ARTIFACT_BYTES": str(size - 1)})
    assert len(finals(scored(typed | {"MAX_ARTIFACT_BYTES": str(size), "TTT_EPOCHS": "0"}))) == 2


def test_a_file_that_fills_the_cap_exactly_is_written_and_read(dataset, tmp_path):
    cfg = t.Config.from_env(SMOKE | dataset | dict(OUTPUT_DIR=str(tmp_path), RUN_ID="full"))
    log = t.Log(cfg, t.Ranks())
    log.active = False
    weights = {name: p.detach() for name, p in make_model(cfg).named_parameters()}
    size = len(t.pack(t.quantize(weights, t.quant_plans(weights, t.quant_specs(t.GPT(cfg), cfg), cfg, {})), True, cfg)) + t.Path(t.__file__).stat().st_size
    for cap, fits in ((size - 1, False), (size, True)):
        full = dataclasses.replace(cfg, max_artifact_bytes=cap)
        plans = t.quant_plans(weights, t.quant_specs(t.GPT(cfg), cfg), full, {})
        if not fits:
            with pytest.raises(t.InputError, match=str(size)):
                t.save_artifact(plans, weights, True, full, t.Ranks(), log)
            assert not full.artifact_path.exists()
        else:
            t.save_artifact(plans, weights, True, full, t.Ranks(), log)
            read = t.load_artifact(full.artifact_path, {"TOKENIZER_PATH": cfg.tokenizer_path, "MAX_ARTIFACT_BYTES": str(cap)})
            assert read.weights.keys() == weights.keys() and read.looped
