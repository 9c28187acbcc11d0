"""Document masks of each attention kernel, against each document alone, and training rows that grow."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from helpers.smoke import SMOKE
from helpers.twins import ids_of, losses, trainer_of, twin
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data import write_shard

import train_gpt as t


def alone(ids, q, k, v):
    """Each document of each row (B, T) by itself, in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for row, tokens in enumerate(ids.tolist()):
        begins = [0, *(i for i, token in enumerate(tokens) if i and token == t.BOS), len(tokens)]
        for low, high in zip(begins, begins[1:]):
            out[row, low:high] = t.attend_sdpa(*(x[row : row + 1, low:high].double() for x in (q, k, v)))[0]
    return out


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    """flash_attn_varlen_func: tokens outside of all segments stay NaN, because no kernel writes them."""
    assert causal and cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32 and max_seqlen_q == max_seqlen_k
    offsets, out = cu_seqlens_q.tolist(), torch.full_like(q, torch.nan)
    assert offsets == sorted(offsets) and max(b - a for a, b in zip(offsets, offsets[1:])) <= max_seqlen_q
    for low, high in zip(offsets, offsets[1:]):
        if low < high:
            segment = (x[None, low:high].transpose(1, 2) for x in (q, k, v))
            out[low:high] = F.scaled_dot_product_attention(*segment, is_causal=True, scale=softmax_scale, enable_gqa=True).transpose(1, 2)[0]
    return out


@pytest.mark.parametrize("attend", [t.attend_sdpa, partial(t.attend_flash, (None, varlen))])
@settings(max_examples=15, deadline=None)
@example(rows=2, firsts=[150], seed=0)
@given(rows=st.integers(1, 3), firsts=st.lists(st.integers(0, 599), max_size=4), seed=st.integers(0, 99))
def test_a_document_has_the_attention_that_it_has_alone(attend, rows, firsts, seed):
    draw, ids = torch.Generator().manual_seed(seed), torch.full((rows, 200), 5)
    ids.view(-1)[[at for at in firsts if at < rows * 200]] = t.BOS
    q, k, v = (torch.randn(*ids.shape, heads, 8, generator=draw) for heads in (4, 2, 2))
    torch.testing.assert_close(attend(q, k, v, t.find_documents(ids)).double(), alone(ids, q, k, v), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 300), st.data())
def test_cu_seqlens_are_rows_and_documents_of_a_static_count_and_none_is_longer_than_a_row(rows, length, data):
    ids = torch.full((rows, length), 5)
    for at in data.draw(st.lists(st.integers(0, rows * length - 1), max_size=40)):
        ids.view(-1)[at] = t.BOS
    offsets = t.find_documents(ids).cu_seqlens.tolist()
    begins = [i for i in range(rows * length) if i % length and ids.view(-1)[i] == t.BOS]
    assert offsets == sorted(offsets) and len(offsets) == rows + 1 + rows * length // 32
    assert set(offsets) == {*range(0, rows * length + 1, length), *begins[: rows * length // 32]}


def test_a_model_scores_each_document_as_it_does_alone(cfg):
    cfg = dataclasses.replace(cfg, document_attention=True, bigram_vocab_size=0)
    model, ids, targets = make_model(cfg), ids_of(cfg), ids_of(cfg, seed=1)
    whole = model(ids, targets)
    torch.testing.assert_close(whole[:1, 9:], model(ids[:1, 9:], targets[:1, 9:]), rtol=1e-4, atol=1e-5)  # its own positions: rotary is relative
    torch.testing.assert_close(whole[:, :9], model(ids[:, :9], targets[:, :9]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(losses(cfg, twin(cfg, document_attention=False))[:1, 9:], whole[:1, 9:], atol=1e-3)


def test_a_row_of_one_document_is_scored_the_same_without_a_mask(cfg):
    model = make_model(dataclasses.replace(cfg, document_attention=True))
    ids = ids_of(cfg)[1:]
    torch.testing.assert_close(model(ids, ids, single_document=True), model(ids, ids), rtol=1e-4, atol=1e-5)
    crossing = ids_of(cfg)[:1]
    assert not torch.allclose(model(crossing, crossing, single_document=True), model(crossing, crossing), atol=1e-3)


# ---------------------------------------- rows that grow

@pytest.fixture
def growing(cfg):
    return dataclasses.replace(cfg, early_seq_lens=(8, 16), early_seq_ends=(0.25, 0.5), num_loops=1, loop_start=1, loop_end=2, enable_looping_at=0.4)


def test_stages_come_in_the_order_of_their_times(growing):
    assert t.stages(growing) == [(8, False), (16, False), (16, True), (32, True)]
    for done, expected in [(0.0, (8, False)), (0.2499, (8, False)), (0.25, (16, False)), (0.4, (16, True)), (0.5, (32, True)), (1.7, (32, True))]:
        assert t.stage(done, growing) == expected
    assert t.stages(dataclasses.replace(growing, num_loops=0)) == [(8, False), (16, False), (32, False)]
    assert t.stages(dataclasses.replace(growing, early_seq_lens=(), early_seq_ends=(), enable_looping_at=0.0)) == [(32, True)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_has_the_same_tokens_whatever_the_length_of_its_rows(cfg, tmp_path, world):
    write_shard(tmp_path / "fineweb_train_000000.bin", range(2000))
    cfg = dataclasses.replace(cfg, early_seq_lens=(8, 16), early_seq_ends=(0.25, 0.5), micro_batch_tokens=64)
    stream = t.TokenStream([tmp_path / "fineweb_train_000000.bin"], 65536)
    ranks = [t.Batches(stream, cfg, t.Ranks(rank, world)) for rank in range(world)]
    for step, length in [(0, 8), (1, 8), (2, 16), (3, 32), (1, 16)]:
        parts = []
        for batches in ranks:
            batches.seek(step, length)
            inputs, targets = next(batches)
            assert inputs.shape[0] == batches.micro_steps and inputs[0].numel() <= 64 and inputs.size(2) == length
            assert torch.equal(targets, inputs + 1) and batches.step == step + 1 and batches.seq_len == length
            parts.append(inputs.flatten())
        assert torch.cat(parts).tolist() == [*range(256 * step, 256 * step + 256)]


def test_shuffled_rows_that_grow_read_no_token_twice(cfg, tmp_path):
    """Through an epoch of 3 spans of 96 tokens, the least common multiple of their lengths, and into the next."""
    write_shard(tmp_path / "fineweb_train_000000.bin", range(96 * 4 + 1))
    cfg = dataclasses.replace(cfg, loader="shuffled", train_seq_len=48, eval_seq_len=32, early_seq_lens=(16, 32), early_seq_ends=(0.25, 0.5),
                              train_batch_tokens=96, micro_batch_tokens=48)
    batches, read = t.Batches(t.TokenStream([tmp_path / "fineweb_train_000000.bin"], 65536), cfg, t.Ranks()), []
    for step, length in enumerate((16, 32, 48, 48)):
        batches.seek(step, length)
        inputs, targets = next(batches)
        assert torch.equal(targets, inputs + 1) and (inputs.diff(dim=2) == 1).all() and inputs.size(2) == length
        read += inputs.flatten().tolist()
    assert len(set(read[:288])) == 288 and len(set(read)) < len(read)


def test_training_goes_through_its_stages_and_warms_each_of_them_up(growing, log, monkeypatch):
    said = []
    monkeypatch.setattr(t.Log, "__call__", lambda self, text: said.append(text))
    trainer, met = trainer_of(dataclasses.replace(growing, iterations=8, val_loss_every=0)), []
    step = trainer.step
    trainer.step = lambda *how: (met.append((trainer.batches.seq_len, trainer.looped, trainer.batches.step)), step(*how))[1]
    t.train(trainer, None, log)
    warm, trained = met[:-8], met[-8:]
    assert [m[:2] for m in warm[::2]] == [(32, True), (16, True), (16, False), (8, False)] and {m[2] for m in warm} == {0}  # late QAT on and off
    assert trained == [(8, False, 0), (8, False, 1), (16, False, 2), (16, False, 3), (32, True, 4), (32, True, 5), (32, True, 6), (32, True, 7)]
    lines = [line for line in said if line.startswith("train_seq_len:")]
    assert [line.split()[:2] for line in lines] == [["train_seq_len:16", "step:2"], ["train_seq_len:32", "step:4"]]


@pytest.mark.parametrize("given, words", [
    (dict(EARLY_SEQ_LENS="24", EARLY_SEQ_ENDS="0.5"), "EARLY_SEQ_LENS must divide TRAIN_BATCH_TOKENS .*EARLY_SEQ_LENS=24, TRAIN_BATCH_TOKENS=256"),
    (dict(EARLY_SEQ_LENS="64", EARLY_SEQ_ENDS="0.5"), "and be at most TRAIN_SEQ_LEN .*EARLY_SEQ_LENS=64, .*TRAIN_SEQ_LEN=32"),
    (dict(EARLY_SEQ_LENS="8,16", EARLY_SEQ_ENDS="0.5"), "EARLY_SEQ_ENDS must increase, one for each .*EARLY_SEQ_ENDS=0.5, EARLY_SEQ_LENS=8,16"),
    (dict(EARLY_SEQ_LENS="8,16", EARLY_SEQ_ENDS="0.5,0.5"), "EARLY_SEQ_ENDS must increase.*EARLY_SEQ_ENDS=0.5,0.5"),
    (dict(EARLY_SEQ_LENS="1", EARLY_SEQ_ENDS="0.5"), "EARLY_SEQ_LENS=1 must be in"),
])
def test_stages_that_cannot_be_are_named(given, words):
    with pytest.raises(t.InputError, match=words):
        t.Config.from_env(SMOKE | given)


def test_rows_of_every_length_must_divide_among_the_ranks(growing):
    stream = trainer_of(growing).batches.stream
    cfg = dataclasses.replace(growing, train_batch_tokens=320, micro_batch_tokens=64, early_seq_lens=(16, 20), eval_stride=4)
    t.Batches(stream, cfg, t.Ranks(0, 2))  # 10 rows, at first 20, then 16
    for world, words in ((4, "10 rows of 32 tokens, which is not a multiple of 4 ranks"), (5, "16 rows of 20 tokens, .* of 5 ranks")):
        with pytest.raises(t.InputError, match=f"TRAIN_BATCH_TOKENS=320 is {words}"):
            t.Batches(stream, cfg, t.Ranks(0, world))
