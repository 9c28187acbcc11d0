import copy
import dataclasses
import inspect
import itertools
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as t


def test_the_environment_beats_the_variant_which_beats_the_default():
    assert t.Config.from_env({}).num_layers == 11
    assert t.Config.from_env({"VARIANT": "demo"}).num_layers == 6
    assert t.Config.from_env({"VARIANT": "demo", "NUM_LAYERS": "7", "VE_LAYERS": "5"}).num_layers == 7


@pytest.mark.parametrize("typo, option", [("EMA_DECY", "EMA_DECAY"), ("MATRX_LR", "MATRIX_LR"), ("NUM_LAYER", "NUM_LAYERS")])
def test_a_near_miss_of_a_name_is_an_error_that_suggests_the_right_one(typo, option):
    with pytest.raises(t.InputError, match=f"{typo}.*did you mean {option}"):
        t.Config.from_env({typo: "1"})


def test_names_of_other_programs_pass():
    others = "OMP_NUM_THREADS PATH HOME RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT NCCL_DEBUG CUDA_VISIBLE_DEVICES".split()
    others += "LOCAL_WORLD_SIZE GROUP_RANK TORCHELASTIC_RUN_ID PYTHONPATH HF_HOME TERM LANG TMPDIR SHELL USER".split()
    others += "TTY TERM_PROGRAM SSH_TTY SLURM_JOB_ID CI_RUN_ID MODEL_NAME RUN_NUMBER DATA_ROOT OUTPUT_FORMAT http_proxy LC_ALL GITHUB_RUN_ID".split()
    assert t.Config.from_env(dict.fromkeys(others, "1")) == t.Config.from_env({})


@pytest.mark.parametrize("name, words", [
    ("TTT_ENABLED", "TTT_EPOCHS=0 turns it off"), ("MUON_WEIGHT_DECAY", "use MUON_WD"), ("EMBED_LR", "use TIED_EMBED_LR"),
    ("MATRX_LR", "did you mean MATRIX_LR"), ("MATRIX_RL", "did you mean MATRIX_LR"), ("SEED_", "did you mean SEED"),
    ("VARAINT", "did you mean VARIANT"), ("variant", "did you mean VARIANT"), ("Matrix_LR", "did you mean MATRIX_LR"),
    ("WARMUPSTEPS", "did you mean WARMUP_STEPS"), ("EVAL_ONLLY", "did you mean EVAL_ONLY")])
def test_a_name_that_can_only_be_meant_for_this_script_is_an_error_with_its_remedy(name, words):
    with pytest.raises(t.InputError, match=rf"{name} is not an option: .*{words}.*env -u {name} ") as caught:
        t.Config.from_env({name: "1"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", """
DATA_DIR TRAIN_DIR TOKENIZER WD ZSTD_CLEVEL ZSTD_NBTHREADS K8S_NS SKIP_INSTALL MATRIX_HOMESERVER COMPILE_COMMANDS ARTIFACT_DIR ARTIFACTS COMPILER
KERNEL MODEL_DIR ITERATION SPEED TYPE SEEDS TARGET_MB MAX_WALLCLOCK HEAD_LR PHASED_TTT_NUM_PHASES MLP_CLIP_SIGMAS CASEOPS_ENABLED""".split())
def test_a_name_that_others_use_or_that_merely_looks_like_an_option_is_a_warning(name):
    assert t.Config.from_env({name: "1"}) == t.Config.from_env({})
    errors, warnings = t.unknown_options({name: "1", "SEED": "1", "HOME": "/"})
    assert errors == [] and len(warnings) == 1 and warnings[0].split()[0] == name


def test_all_such_names_are_reported_at_once_and_answers_name_options():
    with pytest.raises(t.InputError, match="EMA_ENABLED.*; MATRX_LR.*; QAT_ENABLED.*env -u EMA_ENABLED -u MATRX_LR -u QAT_ENABLED"):
        t.Config.from_env(dict.fromkeys(("EMA_ENABLED", "QAT_ENABLED", "MATRX_LR", "DATA_DIR"), "0"))
    options, lines = {f.name.upper() for f in dataclasses.fields(t.Config)}, t.TRANSLATIONS.strip().splitlines()
    assert not {line.split("=")[0] for line in lines} & options
    assert all(options & set(re.findall(r"[A-Z_]+", line.split("=", 1)[1])) for line in lines)


@pytest.mark.parametrize("name, text, words", [
    ("SEED", "one", "SEED='one' is not valid"), ("SEED", "-1", r"SEED=-1 must be in \[0, "),
    ("MATRIX_LR", "nan", "not valid"), ("EVAL_ONLY", "yes", "use 0 or 1"), ("AVERAGING", "emma", "one of ema, swa, last"),
    ("VARIANT", "crad", "one of card"), ("VE_LAYERS", "9,x", "not valid"), ("VE_LAYERS", "9,11", "NUM_LAYERS=11"),
    ("EVAL_SEQ_LEN", str(2**20 + 64), "EVAL_SEQ_LEN"), ("TRAIN_SEQ_LEN", str(2**20), "TRAIN_BATCH_TOKENS|2..24"),
    ("NUM_HEADS", "7", "MODEL_DIM must be a multiple of NUM_HEADS .*MODEL_DIM=512, NUM_HEADS=7"), ("TRAIN_BATCH_TOKENS", "1000", "TRAIN_SEQ_LEN=2048"),
    ("ROPE_DIMS", "15", "ROPE_DIMS=15"), ("EMBED_BITS", "9", "2 to 8, or 16"), ("CLIP_SHARES", "0.5,0", "CLIP_SHARES"),
    ("CLIP_SHARES", "", "CLIP_SHARES"), ("EVAL_STRIDE", "100", "EVAL_STRIDE=100"), ("TTT_CHUNK_TOKENS", "3000", "TTT_CHUNK_TOKENS"),
    ("MATRIX_LR", "inf", "not valid"), ("NUM_KV_HEADS", "3", "NUM_HEADS must be a multiple of NUM_KV_HEADS .*NUM_HEADS=8, NUM_KV_HEADS=3"),
])
def test_a_bad_value_is_one_line_that_names_it(name, text, words):
    with pytest.raises(t.InputError, match=words) as caught:
        t.Config.from_env({name: text})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", t.VARIANTS)
def test_settings_survive_the_trip_through_the_environment(variant):
    cfg = t.Config.from_env({"VARIANT": variant})
    assert t.Config.from_env(t.as_env(vars(cfg))) == cfg


@given(st.floats(0, 1e6, allow_nan=False), st.lists(st.integers(0, 10), max_size=4), st.booleans())
def test_any_number_survives_it_exactly(rate, layers, smear):
    cfg = t.Config(matrix_lr=rate, ve_layers=tuple(layers), smear_gate=smear)
    assert t.Config.from_env(t.as_env(vars(cfg))) == cfg


def test_a_stride_divides_the_window_whatever_the_training_length():
    assert t.Config(eval_seq_len=48, eval_stride=48, ttt_epochs=0).window == 48
    with pytest.raises(t.InputError, match="EVAL_STRIDE must divide the window.*EVAL_STRIDE=64, EVAL_SEQ_LEN=96"):
        t.Config(eval_seq_len=96, eval_stride=64, ttt_epochs=0)


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        t.Config().seed = 2


def test_help_lists_every_option_once_with_its_meaning():
    text, source = t.usage(), inspect.getsource(t.Config)
    for f in dataclasses.fields(t.Config):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{f.name.upper()}=")]
        (written,) = [line for line in source.splitlines() if line.startswith(f"    {f.name}: ")]
        comment = written.partition("  # ")[2]
        assert len(comment) > 5 and comment in line and all(choice in line for choice in f.metadata.get("choices", ()))


def card_parameters_by_hand():
    """components.md 4.18 and 4.10, for the 455 family that `card` belongs to: sizes written out, nothing read from the model."""
    block = 2 * 512 + 2 * 512 + 8 + 512 * 512 + 2 * 256 * 512 + 512 * 512 + 2 * 512 * 1536
    bigram = 2048 * 128 + 512 * 128 + 1
    value_embedding = 1024 * 128 + 256 * 128 + 1 + 2
    return 1024 * 512 + 11 * block + 5 * 512 + 512 + bigram + value_embedding


def test_describe_prints_the_exact_count_at_full_size_without_data(tmp_path):
    done = run({}, "--describe", cwd=tmp_path)
    assert card_parameters_by_hand() == 26_993_756
    assert done.stdout.splitlines()[-1] == "model_params:26993756"
    assert "MATRIX_LR=0.025" in done.stdout and not list(tmp_path.iterdir())


def test_an_unknown_argument_is_refused(tmp_path):
    done = run({}, "--descrbe", check=False, cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "--descrbe" in done.stderr


@pytest.mark.parametrize("given, words", [
    (dict(MIN_LR="0.15"), "MIN_LR must be below LATE_QAT_THRESHOLD.*MIN_LR=0.15, LATE_QAT_THRESHOLD=0.15"),
    (dict(MIN_LR="0.2", AVERAGING="swa", LATE_QAT_THRESHOLD="0"),
     "MIN_LR must be below SWA_START_SCALE with AVERAGING=swa.*MIN_LR=0.2, SWA_START_SCALE=0.2"),
    (dict(AVERAGING="swa", SWA_START_SCALE="0", LATE_QAT_THRESHOLD="0"), "MIN_LR must be below SWA_START_SCALE.*SWA_START_SCALE=0"),
    (dict(WARMDOWN_FRAC="0.3"),
     "WARMDOWN_FRAC and WARMDOWN_ITERS both set the warmdown; set one to 0.*WARMDOWN_FRAC=0.3, WARMDOWN_ITERS=3500"),
    (dict(VARIANT="pr1812", WARMDOWN_ITERS="100"), "both set the warmdown.*WARMDOWN_FRAC=0.72, WARMDOWN_ITERS=100"),
    (dict(MUON_MOMENTUM_WARMUP_FRAC="0.1"),
     "both set the warm-up; .*MUON_MOMENTUM_WARMUP_FRAC=0.1, MUON_MOMENTUM_WARMUP_STEPS=1500")])
def test_two_forms_of_one_schedule_are_refused(given, words):
    with pytest.raises(t.InputError, match=words):
        t.Config.from_env(given)
    assert t.Config.from_env({k: v for k, v in given.items() if "FRAC" in k} | dict(WARMDOWN_ITERS="0", MUON_MOMENTUM_WARMUP_STEPS="0"))


def test_tables_of_gigabytes_are_refused():
    """The header of an artifact can request rotary tables, which are built before any weight is read."""
    with pytest.raises(t.InputError, match="EVAL_SEQ_LEN.* must be at most 2[*][*]24 .*EVAL_SEQ_LEN=262144"):
        t.Config(eval_seq_len=2**18, eval_stride=64, model_dim=4096, num_heads=8, ttt_epochs=0, eval_batch_seqs=1)
    assert t.Config(eval_seq_len=2**18, ttt_epochs=0, eval_batch_seqs=1).window == 2**18


@pytest.mark.parametrize("values, words", [
    (dict(eval_seq_len=2**18, ttt_epochs=0), "must be at most 2..18 tokens .*EVAL_BATCH_SEQS=32, "),
    (dict(ttt_batch_seqs=256), "must be at most 2..18 tokens .*TTT_BATCH_SEQS=256, "),
    (dict(eval_seq_len=2**14, eval_batch_seqs=4, ttt_epochs=0, document_attention=True), "at most 2..29 with DOCUMENT_ATTENTION=1 .*EVAL_BATCH_SEQS=4, "),
    (dict(ttt_lora_rank=10**9), "TTT_LORA_RANK"),
    (dict(ttt_epochs=10**12), "TTT_EPOCHS"), (dict(num_loops=100), "NUM_LOOPS"), (dict(ttt_batch_seqs=10**9), "TTT_BATCH_SEQS"),
    (dict(bigram_vocab_size=10**30), "BIGRAM_VOCAB_SIZE"), (dict(ttt_chunk_tokens=7), "TTT_CHUNK_TOKENS must be from 8 to the window, .*TTT_CHUNK_TOKENS=7, ")])
def test_options_that_would_need_gigabytes_or_hours_are_refused(values, words):
    with pytest.raises(t.InputError, match=words) as caught:
        t.Config(**values)
    assert "\n" not in str(caught.value)


# ---- choices

CONSUMERS = {  # the first user of each choice
    "attention": lambda cfg: t.choose_attention(cfg, t.Ranks(device=torch.device("cuda"))), "dtype": lambda cfg: t.compute_dtype(cfg, torch.device("cpu")),
    "compile": lambda cfg: t.Ranks().compiles(cfg), "activation": t.MLP, "init": lambda cfg: t.GPT(cfg).init_weights(cfg),
    "bigram_hash": lambda cfg: t.BigramHashEmbedding(cfg).bucket(torch.ones(1, 3, dtype=torch.int64)),
    "loader": lambda cfg: t.RowOrder(SimpleNamespace(ends=np.array([10**5]), sizes=np.array([10**5])), cfg),
    "averaging": lambda cfg: t.average_weight(1, 0.5, 0, cfg), "quantizer": lambda cfg: cfg.time_limit,
    "compressor": lambda cfg: t.compressor_module(cfg.compressor),
    "resume": lambda cfg: cfg.resumed,
    "ttt_scope": lambda cfg: cfg.by_document, "ttt_optimizer": lambda cfg: t.Adaptation([torch.nn.Parameter(torch.ones(1))], None, cfg, t.Ranks())}
SMALL = t.Config(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=0, xsa_last_n=0, ve_layers=(), vocab_size=16, bigram_vocab_size=8)


def test_every_choice_has_a_consumer():
    assert CONSUMERS.keys() == {f.name for f in dataclasses.fields(t.Config) if f.metadata.get("choices")}


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_choice_that_nobody_implements_fails(name, monkeypatch):
    """A choice that was added to an option but to no code raises KeyError."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
    (unheard := copy.copy(SMALL)).__dict__[name] = "unheard-of"
    with pytest.raises(KeyError, match="unheard-of"):
        CONSUMERS[name](unheard)
    for choice in next(f for f in dataclasses.fields(t.Config) if f.name == name).metadata["choices"]:
        if name != "attention":
            CONSUMERS[name](dataclasses.replace(SMALL, **{name: choice, "run_id": "a", "ttt_lora_rank": 8, "ttt_chunk_tokens": SMALL.window}))


# ---- warnings about the machine

@pytest.mark.parametrize("queue, threads, policy, busy", [
    (["3/99", "4/99"], 2, "", 2), (["1/99", "5/99"], 2, "", 0), (["9/99"], 1, "", 0), (["9/99"], 2, "passive", 0)])
def test_busy_cores_are_counted_by_the_run_queue(monkeypatch, queue, threads, policy, busy):
    samples = itertools.cycle(queue)
    monkeypatch.setattr(t.Path, "read_text", lambda self: f"0.1 0.2 0.3 {next(samples)} 1234")
    monkeypatch.setattr(t.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert t.busy_cores() == busy


@pytest.mark.parametrize("busy, world, warned", [(0, 1, False), (1, 1, True), (1, 2, False)])
def test_a_warning_of_busy_cores_says_what_to_set(monkeypatch, busy, world, warned):
    monkeypatch.setattr(t, "busy_cores", lambda: busy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: os.cpu_count())
    assert ["OMP_WAIT_POLICY=PASSIVE" in text for text in t.run_warnings({}, t.Ranks(world=world))] == [True] * warned
    (text,) = t.run_warnings({"DATA_DIR": "x", "HOME": "y"}, t.Ranks(world=2))
    assert text == "set, but not options of this script: DATA_DIR (use DATA_PATH and TOKENIZER_PATH)"
