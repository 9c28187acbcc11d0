"""The five published systems: their sizes, and a whole run of each, scaled down, on one process and on two."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
from conftest import finals, run

import train_gpt as t

# Only widths, batch and time differ from the published row. fp32: the comparison of one and two processes is about ranks.
SMALL = dict(
    MODEL_DIM="64", NUM_HEADS="2", NUM_KV_HEADS="1", TRAIN_SEQ_LEN="32", TRAIN_BATCH_TOKENS="256", MICRO_BATCH_TOKENS="256", EVAL_STRIDE="8",
    TTT_CHUNK_TOKENS="256", ITERATIONS="8", WARMUP_STEPS="1", WARMDOWN_ITERS="4", MAX_WALLCLOCK_SECONDS="60", GPTQ_CALIBRATION_BATCHES="2",
    VAL_MAX_TOKENS="520", BIGRAM_DIM="16", VE_DIM="16", EMA_DECAY="0.5", SWA_EVERY="3", DTYPE="fp32")


def scaled(variant):
    """A scaled-down variant. Without WARMDOWN_ITERS if it sets WARMDOWN_FRAC; with shorter EARLY_SEQ_LENS if it has some."""
    row = t.variant_options(variant)
    lengths = dict(EARLY_SEQ_LENS="8,16") if "early_seq_lens" in row else {}
    return {"VARIANT": variant} | lengths | {k: v for k, v in SMALL.items() if "warmdown_frac" not in row or k != "WARMDOWN_ITERS"}


PUBLISHED = dict(pr150=26_829_913, pr455=26_993_756, pr490=27_137_221, pr1127=25_485_176, pr1812=35_946_192)
STAGES = ["final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt"]


def count_by_hand(variant):
    """components.md 4.18: the state dict of each published script, tensor by tensor."""
    block = (512 + 512 + 2 * 512) + 8 + 2 * (512 * 512) + 2 * (256 * 512) + 2 * (1536 * 512)
    pr150 = 1024 * 512 + (1 + 2048 * 128 + 512 * 128) + 512 + 5 * 512 + 11 * block
    narrow = (480 + 480 + 2 * 480) + 8 + 2 * (480 * 480) + 2 * (240 * 480) + 2 * (1536 * 480) + 1536 + 1536
    wide = (512 + 512 + 2 * 512) + 8 * 2 + 8 * 12 + 2 * (512 * 512) + 2 * (256 * 512) + 2 * (2048 * 512)
    return dict(
        pr150=pr150,
        pr455=pr150 + (1 + 1024 * 128 + 256 * 128) + 2,
        pr490=pr150 + (4096 - 2048) * 128 + 11 * (8 * 512 + 8) + 10 * 2,
        pr1127=1024 * 480 + (8192 * 128 + 480 * 128) + 480 + 2 * (5 * 480) + 11 * narrow,
        pr1812=8192 * 512 + 512 + 2 * (8 * 512) + 11 * wide,
    )[variant]


@pytest.mark.parametrize("variant", PUBLISHED)
def test_a_full_size_variant_has_exactly_the_published_number_of_parameters(variant):
    described = t.describe(t.Config.from_env({"VARIANT": variant})).splitlines()
    assert described[-1] == f"model_params:{PUBLISHED[variant]}"
    assert count_by_hand(variant) == PUBLISHED[variant]
    assert f"VARIANT={variant}" in described


@pytest.mark.parametrize("variant", PUBLISHED)
def test_what_describe_prints_gives_the_same_settings_again(variant):
    cfg = t.Config.from_env({"VARIANT": variant})
    printed = dict(line.split("=", 1) for line in t.describe(cfg).splitlines() if "=" in line)
    assert t.Config.from_env(printed) == cfg


def test_every_published_variant_is_another_model_or_another_training():
    rows = [dataclasses.replace(t.Config.from_env({"VARIANT": v}), variant="card") for v in PUBLISHED]
    assert len(set(rows)) == len(rows) and t.Config() not in rows


def train_losses(out):
    return [float(x) for x in re.findall(r"^step:\d+/\d+ train_loss:(\S+) ", out, re.M)]


@pytest.fixture(scope="module", params=PUBLISHED)
def finished(request, dataset, tmp_path_factory):
    """(variant, folder, log of one process, output of two) of complete runs. The first runs in this process, which saves the imports."""
    folders = [str(tmp_path_factory.mktemp(f"{request.param}_{n}")) for n in (1, 2)]
    env = dict(dataset, RUN_ID="test", **scaled(request.param))
    t.main([], env | {"OUTPUT_DIR": folders[0]})
    two = run(env | {"OUTPUT_DIR": folders[1]}, processes=2)
    return request.param, Path(folders[0]), Path(folders[0], "logs", "test.txt").read_text(), two.stdout


def test_a_variant_passes_every_stage_and_says_what_is_its_own(finished):
    variant, folder, out, _ = finished
    losses, scores = train_losses(out), finals(out)
    assert list(scores) == STAGES and all(math.isfinite(x) and 0 < x < 8 for x in scores.values())
    assert len(losses) == 8 and all(map(math.isfinite, losses)) and losses[0] == pytest.approx(math.log(384), abs=0.05)
    assert (folder / "final_model.int6.ptz").stat().st_size > 10_000
    of_its_own = dict(
        pr150=["late_qat:enabled step:0 ", "averaging:swa updates:"], pr455=["averaging:swa updates:"],
        pr490=["gptq:collected 66 Hessians"], pr1127=[],
        pr1812=["layer_loop:enabled step:3 frac:0.375 order:[0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]",
                "gptq:collected 67 Hessians", "kind:int6+brotli model_bytes:", "looped:1 eval_seq_len:"])
    for words in {words for several in of_its_own.values() for words in several}:
        assert (words in out) == (words in of_its_own[variant]), words


def test_two_processes_train_and_score_as_one_does(finished):
    _, _, one, two = finished
    assert "world_size:2" in two and train_losses(two) == pytest.approx(train_losses(one), abs=2e-3)
    assert list(finals(two)) == STAGES and finals(two) == pytest.approx(finals(one), abs=2e-2)


@pytest.mark.parametrize("finished", ["pr1127", "pr1812"], indirect=True)
def test_the_artifact_alone_is_scored_as_the_run_scored_it(finished, dataset, tmp_path):
    """In another process, with a LoRA (pr1127) and with loops (pr1812)."""
    variant, folder, out, _ = finished
    paths = {name: dataset[name] for name in ("DATA_PATH", "TOKENIZER_PATH")} | dict(VAL_MAX_TOKENS="520")
    artifact = str(folder / "final_model.int6.ptz")
    again = run(paths | {"EVAL_ONLY": "1", "ARTIFACT": artifact, "OUTPUT_DIR": str(tmp_path), "DTYPE": "fp32"}, cwd=tmp_path).stdout
    assert finals(again) == finals(out) and f"variant:{variant} " in again
