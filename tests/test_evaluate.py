import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t


def windows_met(total, stride, chunk, ranks=None, **changes):
    """Scores of a stream of the tokens 0, 1, 2, ..., where a target's loss is the target, and (first target, count) of each window in order."""
    cfg = t.Config(train_seq_len=32, train_batch_tokens=32, eval_stride=stride, ttt_scope="stream", ttt_chunk_tokens=32, ttt_lora_rank=0, **changes)
    scorer, met = t.Scorer.__new__(t.Scorer), []
    scorer.tokens, scorer.bytes = torch.arange(total + 1), torch.ones(total, dtype=torch.int64)
    scorer.cfg, scorer.ranks, scorer.log = cfg, ranks or t.Ranks(), None

    def forward(ids, targets):
        assert torch.equal(ids[:, -1], targets[:, -1] - (targets[:, -1] > ids[:, -1]).long())
        met.extend((int(row[0]) - 1, len(row)) for row in targets)
        return targets.double()

    nll = torch.cat([chunk.nll[0] for chunk, _ in scorer.stream_chunks(forward, stride, chunk)])
    return nll, [window for i, window in enumerate(met) if i == 0 or window != met[i - 1]]  # a batch repeats its last window until it is full


@settings(max_examples=200, deadline=None)
@given(total=st.integers(1, 400), stride=st.sampled_from([1, 2, 4, 8, 16, 32]), chunk=st.sampled_from([32, 64, 96, 1024]))
def test_every_target_is_scored_exactly_once_wherever_the_stream_ends(total, stride, chunk):
    nll, windows = windows_met(total, stride, chunk)
    assert torch.equal(nll, torch.arange(1, total + 1).double())
    assert sum(count for _, count in windows) < total + 32 and {count for _, count in windows[1:]} <= {stride}
    assert windows_met(2048, stride, chunk)[1][: len(windows)] == windows  # the end of the stream moves no window


def scorer_of(cfg, log, **changes):
    cfg = dataclasses.replace(cfg, **changes)
    return t.Scorer(t.read_validation(cfg), cfg, t.Ranks(), log)


def audited(scorer, forward, tmp_path, adapt=None):
    path = tmp_path / "audit.npz"
    scorer.cfg = dataclasses.replace(scorer.cfg, audit=str(path))
    score = scorer.evaluate_sliding(forward, adapt)
    with np.load(path) as file:
        return score, dict(file)


def test_sliding_scores_are_those_of_one_window_at_a_time(cfg, log, tmp_path):
    model, scorer = make_model(cfg), scorer_of(cfg, log)
    score, audit = audited(scorer, model, tmp_path)
    tokens, expected = scorer.tokens, []
    for position in range(len(tokens) - 1):
        start = 0 if position < 32 else (position // 8 + 1) * 8 - 32
        end = min(start + 32, len(tokens) - 1)
        logits = model.logits(model.hidden(tokens[None, start:end]))[0, position - start]
        expected.append(float(F.cross_entropy(logits.detach().double(), tokens[position + 1])))
    np.testing.assert_allclose(audit["nll"], expected, atol=1e-4)
    assert score.loss == pytest.approx(np.mean(expected), abs=1e-5)
    assert score.bpb == pytest.approx(sum(expected) / math.log(2) / audit["bytes"].sum(), abs=1e-5)
    assert audit["chunk"].tolist() == [i // 256 for i in range(len(tokens) - 1)]


def test_any_stride_agrees_for_a_model_without_context(cfg, log):
    table = torch.randn(cfg.vocab_size, cfg.vocab_size)

    def bigram(ids, targets):
        return F.cross_entropy(table[ids][:, -targets.size(1) :].flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    scorer = scorer_of(cfg, log)
    how = (32, 32), (8, 256), (16, 64), (32, 10_000), (1, 256)
    losses = [scorer.evaluate([(scorer.stream_chunks(bigram, *strides), None)]).loss for strides in how]
    assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-7)


def test_more_context_helps_nobody_if_weights_are_random_but_is_used(cfg, log):
    scorer, model = scorer_of(cfg, log), make_model(cfg)
    assert scorer.evaluate_windows(model).loss != scorer.evaluate_sliding(model).loss


@pytest.mark.parametrize("targets", [1, 5, 31, 32, 33, 255, 257])
def test_streams_of_any_length_work(cfg, log, tmp_path, targets):
    scorer = scorer_of(cfg, log, val_max_tokens=targets)
    score, audit = audited(scorer, make_model(cfg), tmp_path)
    assert len(audit["nll"]) == targets and math.isfinite(score.loss) and (audit["nll"] > 0).all()


def test_the_batch_size_changes_nothing(cfg, log):
    model = make_model(cfg)
    losses = [scorer_of(cfg, log, eval_batch_seqs=n).evaluate_sliding(model).loss for n in (1, 3, 32)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_windows_without_loss_and_a_compiler_sees_two_shapes(world, compile, monkeypatch):
    shapes, total, losses = set(), 0, t.Scorer.window_losses

    def noted(self, forward, firsts, rows):
        shapes.add((rows, firsts.step))
        return losses(self, forward, firsts, rows)

    monkeypatch.setattr(t.Scorer, "window_losses", noted)
    for rank in range(world):
        ranks = t.Ranks(rank, world)
        object.__setattr__(ranks, "sum_", lambda tensor: tensor)
        total = total + windows_met(700, 8, 256, ranks, compile=compile)[0]
    assert torch.equal(total, torch.arange(1, 701).double())
    # each batch is filled up to the same size
    assert shapes == {(32 // world + (32 % world > 0), 32), (32 // world + (32 % world > 0), 8)}


@pytest.mark.parametrize("stride", [8, 32])
def test_all_ranks_meet_the_same_shapes(cfg, log, stride):
    """The first window scores all its targets. If its graph were the main rank's alone, the others would wait for a compiler."""
    met, totals = [], []
    for rank in range(3):
        scorer, ranks = scorer_of(cfg, log), t.Ranks(rank, 3, torch.device("cuda"))
        object.__setattr__(ranks, "sum_", lambda tensor: tensor)
        object.__setattr__(ranks, "maximum", lambda *values: list(values))
        scorer.ranks = ranks
        met.append(set())

        def forward(ids, targets, seen=met[-1]):
            seen.add((tuple(ids.shape), tuple(targets.shape)))
            return targets.float()

        totals.append(torch.cat([chunk.nll[0] for chunk, _ in scorer.stream_chunks(forward, stride, 256)]))
    assert met[0] == met[1] == met[2] and len(met[0]) == 1 + (stride < 32)
    assert torch.equal(sum(totals), scorer.tokens[1:].double())


def test_the_reported_bits_per_byte_follow_the_contests_formula(cfg, log):
    scorer = scorer_of(cfg, log)

    def constant(ids, targets):
        return torch.full(targets.shape, 2.0)

    assert scorer.evaluate_windows(constant).bpb == pytest.approx(2.0 * 700 / math.log(2) / int(scorer.bytes.sum()))


def test_a_plain_pass_has_windows_side_by_side(cfg, log):
    scorer, met = scorer_of(cfg, log), []

    def forward(ids, targets):
        met.append((ids.shape[1], targets.shape[1]))
        return torch.arange(ids.size(1), dtype=torch.float64)[-targets.size(1) :].expand(len(ids), -1)  # a target's place in its window

    score = scorer.evaluate_windows(forward)
    assert torch.equal(scorer.audited["nll"], torch.arange(700).double() % 32) and {*met} == {(32, 32)}
    assert score.loss == pytest.approx(sum(i % 32 for i in range(700)) / 700)
