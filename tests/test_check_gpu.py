"""tools.bench.check_gpu as far as a CPU goes: its references, its verdicts, and how its processes take turns."""

import argparse
import dataclasses
import multiprocessing
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import train_gpt as t
from tools.bench import bench, check_gpu

CPU = torch.device("cpu")
GOOD = dict(row="card", what="step", attention="fa3", attention_ran=["fa3"], ms=75.25, mfu=0.4, peak_mib=18000, launches=500.0, first_step_seconds=60.0)


@pytest.mark.parametrize("row", ["card", "pr1127", "frontier"])
def test_a_row_agrees_with_itself_and_a_wrong_formula_shows(row, tmp_path, monkeypatch):
    cfg = bench.row_config(row, {}, tmp_path, 1)
    same = check_gpu.against_the_cpu(cfg, CPU)
    assert same["fp32_loss"] == same["fp32_gradient"] == 0 and same["fp32_last"] < 1e-5 and not check_gpu.wrong(same)
    assert 1e-5 < same["bf16_loss"] and 1e-3 < same["bf16_gradient"]
    inner, made = check_gpu.small_model, []

    def wrong_later(*args):
        """The first model, the reference, is right; in the others a head's own value stays in."""
        made.append(args)
        if len(made) > 1:
            monkeypatch.setattr(t, "exclude_own_value", lambda y, v: y)
        return inner(*args)

    monkeypatch.setattr(check_gpu, "small_model", wrong_later)
    faults = " ".join(check_gpu.wrong(check_gpu.against_the_cpu(cfg, CPU)))
    assert "fp32_loss" in faults and "fp32_gradient" in faults and "fp32_last" in faults


def test_a_batch_in_pieces_has_the_gradient_of_the_whole(tmp_path):
    cfg = check_gpu.small(bench.row_config("card", {}, tmp_path, 1))
    model = check_gpu.small_model(cfg, None, CPU, "fp32")
    ids = torch.randint(2, cfg.vocab_size, (6, 33), generator=torch.Generator().manual_seed(3))
    whole, pieces = (check_gpu.gradients(model, model, ids[:, :-1], ids[:, 1:], False, n) for n in (1, 3))
    assert max(map(check_gpu.error, pieces, whole)) < 1e-5 and all(p.grad is None for p in model.parameters())
    assert len(whole[1]) == sum(p.numel() for p in model.parameters())


def test_the_exact_attention_is_torchs():
    q, k, v = (torch.randn(2, 12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(check_gpu.exact_attention(q, k, v), expected)
    dy = torch.randn_like(q)
    for asked in (12, 5):
        last = q[:, -asked:], k, v, dy[:, -asked:]
        assert check_gpu.error(check_gpu.attended(t.attend_sdpa, *last), check_gpu.attended(check_gpu.exact_attention, *last)) < 1e-12


@pytest.mark.parametrize("ends, why", [("kill -SEGV $$", "Segmentation fault\n"), ("kill -KILL $$", "it was not done in --minutes\n"),
                                       ("echo no driver >&2; exit 1", "no driver\n")])
def test_a_row_that_failed_says_why(tmp_path, monkeypatch, capsys, ends, why):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{ends}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    results = check_gpu.run_row("card", argparse.Namespace(seconds=1.0), tmp_path, 1.0, time.perf_counter() + 60)
    assert results == [dict(row="card", what="failed", error=why)] and f"card FAILED:\n{why}" in capsys.readouterr().out


@pytest.mark.parametrize("change, words", [
    ({}, []), (dict(fp32_loss=2e-4), ["fp32_loss 0.0002 > 0.0001"]), (dict(compiled_gradient=float("nan")), ["compiled_gradient nan"]),
    (dict(attention_ran=["flash"]), ["configured as fa3"]), (dict(attention_ran=[]), ["no attention kernel"])])
def test_what_is_wrong_is_said(change, words):
    faults = check_gpu.wrong(GOOD | change)
    assert len(faults) == len(words) and all(word in fault for word, fault in zip(words, faults))


def test_the_table_has_what_was_measured_beside_what_was_predicted():
    results = [GOOD, GOOD | dict(row="pr1812", what="step looped"), dict(row="card", what="coding")]
    rows = check_gpu.table(results, {"card": 74.8, "pr1812 looped": 140.0}).splitlines()
    assert rows[2] == "| `card` | fa3 | 75.2 | 74.8 | 40.0% | 18,000 | 500 | 60 |" and len(rows) == 4
    assert "| `pr1812 looped` | fa3 | 75.2 | 140.0 |" in rows[3]
    predicted = check_gpu.predictions(ROOT / "logs" / "anatomy.json")
    assert set(predicted) >= {"card", "pr1812", "pr1812 looped"} and 60 < predicted["card"] < 90 and check_gpu.predictions(ROOT / "none") == {}
    assert check_gpu.line(GOOD).startswith("card step: attention:fa3") and "ms:75.25" in check_gpu.line(GOOD)


def hold(path, taken, told):
    turn = check_gpu.Turn(path)
    told.set()
    turn.take()
    taken.set()


def test_one_process_has_the_gpu_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    context = multiprocessing.get_context("fork")
    turn, taken, told = check_gpu.Turn(tmp_path / "turn"), context.Event(), context.Event()
    turn.take()
    other = context.Process(target=hold, args=(tmp_path / "turn", taken, told))
    other.start()
    assert told.wait(60) and not taken.wait(0.5)
    with turn.lent():
        assert taken.wait(60)
        other.join()


def test_the_texts_documents_are_as_long_as_the_contests():
    cfg = t.Config()
    tokens = check_gpu.random_text(cfg, 2_000_000)
    firsts = (tokens == t.BOS).nonzero()[0]
    lengths = firsts[1:] - firsts[:-1]
    assert firsts[0] == 0 and 1000 < lengths.mean() < 1500 and lengths.max() > 10_000 and tokens.max() < cfg.vocab_size
    assert 0.5 < sorted(lengths)[len(lengths) // 2] / lengths.mean() < 0.65


def test_without_a_gpu_or_with_a_strange_row_it_says_so(monkeypatch):
    with pytest.raises(t.InputError, match="sees no GPU"):
        check_gpu.main([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(t.InputError, match="--rows demo must be among"):
        check_gpu.main(["--rows", "demo"])


def test_a_compressor_that_is_missing_is_replaced_and_named(tmp_path, monkeypatch):
    small = dict(TRAIN_SEQ_LEN="64", TRAIN_BATCH_TOKENS="128", MODEL_DIM="64", NUM_HEADS="2", NUM_KV_HEADS="1", QUANTIZER="rtn")
    cfg = bench.row_config("pr1812", small, tmp_path, 1)
    bench.write_tokens(tmp_path / "tokens", cfg.vocab_size, 2**14)
    shard = tmp_path / "tokens" / "fineweb_train_000000.bin"
    trainer = bench.make_trainer(dataclasses.replace(cfg, data_path=str(shard.parent), tokenizer_path=str(shard)), t.Ranks())[1]
    monkeypatch.setattr(check_gpu.importlib.util, "find_spec", lambda name: None if name == "brotli" else name)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    turn = check_gpu.Turn(tmp_path / "turn")
    found = check_gpu.timed_coding(trainer, turn)
    assert found["compressor"] == "lzma, not brotli" and found["bytes"] > 1000 and found["pack"] > 0
