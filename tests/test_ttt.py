import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_model
from test_evaluate import audited, scorer_of

import train_gpt as t


def adaptation(model, cfg):
    """Test-time training as a run sets it up."""
    return t.Adaptation(t.ttt_parameters(model, cfg), model, cfg, t.Ranks())


def adapted(cfg, log, tmp_path, tokens=None, vocab_size=384, **changes):
    """(score, audit) of a run with test-time training from fixed weights over the validation stream or `tokens`."""
    cfg = dataclasses.replace(cfg, ttt_lr=0.05, **changes)
    model, scorer = make_model(dataclasses.replace(cfg, vocab_size=vocab_size)), scorer_of(cfg, log)
    if tokens is not None:
        scorer.tokens = tokens
        scorer.bytes = torch.ones(len(tokens) - 1, dtype=torch.int64)
    adapt = adaptation(model, cfg) if cfg.ttt_epochs else None
    return *audited(scorer, model, tmp_path, adapt=adapt), model


def stream_of(cfg, log):
    return scorer_of(cfg, log).tokens


def test_a_rate_of_zero_and_no_epochs_reproduce_the_sliding_score_bit_for_bit(cfg, log, tmp_path):
    plain = adapted(cfg, log, tmp_path, ttt_epochs=0)[1]["nll"]
    cold = dataclasses.replace(cfg, ttt_lr=0.0)
    model, scorer = make_model(cold), scorer_of(cold, log)
    frozen = audited(scorer, model, tmp_path, adapt=adaptation(model, cold))[1]["nll"]
    assert np.array_equal(frozen, plain)
    warm = adapted(cfg, log, tmp_path)[1]["nll"]
    assert np.array_equal(warm[:256], plain[:256]) and not np.array_equal(warm[256:512], plain[256:512])


def test_a_changed_future_changes_no_earlier_score(cfg, log, tmp_path):
    tokens = stream_of(cfg, log)
    base = adapted(cfg, log, tmp_path)[1]["nll"]
    draw = np.random.default_rng(0)
    for position in [*draw.integers(2, 700, 6), 256, 512]:
        changed = tokens.clone()
        changed[position] = 2 + (changed[position] + 7) % (cfg.vocab_size - 2)
        after = adapted(cfg, log, tmp_path, tokens=changed)[1]["nll"]
        assert np.array_equal(after[: position - 1], base[: position - 1])
        assert after[position - 1] != base[position - 1]


def test_a_shorter_stream_has_the_same_scores(cfg, log, tmp_path):
    base = adapted(cfg, log, tmp_path)[1]["nll"]
    for targets in (31, 256, 401, 512, 515):
        short = adapted(cfg, log, tmp_path, val_max_tokens=targets)[1]["nll"]
        np.testing.assert_allclose(short, base[:targets], rtol=0, atol=1e-6)


@pytest.mark.parametrize("position", [40, 256, 257, 511, 512, 600])
def test_the_scores_of_all_tokens_at_a_position_are_one_distribution(cfg, log, tmp_path, position):
    """The strongest test of legality: it fails if a target, or anything after it, had a part in its own prediction."""
    tokens, total = stream_of(cfg, log)[: position + 1] % 24, 0.0
    for token in range(24):
        changed = tokens.clone()
        changed[-1] = token
        total += np.exp(-adapted(cfg, log, tmp_path, tokens=changed, vocab_size=24, ttt_epochs=1)[1]["nll"][-1])
    assert abs(total - 1) < 1e-5


def test_only_scored_targets_are_trained_on_and_never_the_last_chunk(cfg, log, monkeypatch):
    cfg = dataclasses.replace(cfg, val_max_tokens=700)
    model, scorer = make_model(cfg), scorer_of(cfg, log)
    adapt, trained = adaptation(model, cfg), []
    inner = adapt.step
    monkeypatch.setattr(adapt, "step", lambda chunk, rows: (trained.append((chunk.inputs[rows], chunk.targets[rows])), inner(chunk, rows)))
    indices = []

    def checked(chunk):
        trained.clear()
        adapt(chunk)
        indices.append(chunk.index)
        low, epochs = 256 * chunk.index, cfg.ttt_epochs
        for shift, rows in enumerate(zip(*trained)):  # inputs, targets
            assert torch.equal(torch.cat(rows).flatten(), scorer.tokens[low + shift : low + shift + chunk.nll.numel()].repeat(epochs))
        assert trained and (chunk.weight == 1).all()

    scorer.evaluate_sliding(model, checked)
    assert indices == [0, 1] and scorer.audited["chunk"].max() == 2
    state = [p.detach().clone() for p in model.parameters()]
    scorer.evaluate_sliding(model)
    assert all(torch.equal(a, b) for a, b in zip(state, model.parameters()))


def test_the_state_after_the_last_chunk_is_the_state_before_it(cfg, log, tmp_path):
    two_chunks = adapted(cfg, log, tmp_path, val_max_tokens=512)[2]
    with_a_tail = adapted(cfg, log, tmp_path, val_max_tokens=300)[2]
    assert all(torch.equal(a, b) for a, b in zip(two_chunks.parameters(), with_a_tail.parameters()))


def test_it_learns_a_stream_that_repeats(cfg, log, tmp_path):
    cfg = dataclasses.replace(cfg, val_max_tokens=0)
    tokens = torch.tensor([t.BOS, 20, 21, 22, 23, 24, 25, 26] * 320)
    model_losses = []
    for epochs in (0, 3):
        model = t.GPT(cfg)
        model.init_weights(cfg)
        run = dataclasses.replace(cfg, ttt_epochs=epochs, ttt_lr=0.1)
        scorer = scorer_of(run, log)
        scorer.tokens, scorer.bytes = tokens, torch.ones(len(tokens) - 1, dtype=torch.int64)
        model_losses.append(scorer.evaluate_sliding(model, adaptation(model, run) if epochs else None).loss)
    assert model_losses[1] < model_losses[0] - 0.5


@pytest.mark.parametrize("rows, world", [(8, 2), (8, 3), (1, 4), (5, 2)])
def test_ranks_together_take_the_gradient_of_one(cfg, rows, world):
    """Each rank's gradient times 1/world, summed, is the gradient of the whole batch: padding has weight zero."""
    ids = torch.randint(2, cfg.vocab_size, (rows, 32), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    gradients = []
    for size in (1, world):
        total = 0
        for rank in range(size):
            model = make_model(cfg)
            ranks = t.Ranks(rank, size)
            adapt = adaptation(model, dataclasses.replace(cfg, ttt_grad_clip=0.0))
            object.__setattr__(ranks, "mean_", lambda tensors: None)
            adapt.ranks = ranks
            adapt.optimizer.step = lambda: None
            adapt.optimizer.zero_grad = lambda: None
            adapt.step(t.ScoredChunk(0, 0.0, False, None, ids, targets, torch.ones(rows)), torch.arange(rows))
            total = total + torch.cat([p.grad.flatten() for p in model.parameters()]) / size
        gradients.append(total)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_step_moves_the_weights_by_at_most_the_clip(cfg):
    ids = torch.randint(2, cfg.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    moved = []
    for clip in (0.0, 1e-3, 1e6):
        model = make_model(cfg)
        adapt = adaptation(model, dataclasses.replace(cfg, ttt_grad_clip=clip, ttt_lr=0.5))
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()
        adapt.step(t.ScoredChunk(0, 0.0, False, None, ids[:, :-1], ids[:, 1:], torch.ones(4)), torch.arange(4))
        moved.append(float((torch.nn.utils.parameters_to_vector(model.parameters()).detach().double() - before).norm()))
    assert moved[1] == pytest.approx(0.5e-3, rel=0.02) and moved[0] == pytest.approx(moved[2], rel=1e-5) and moved[0] > 0.01


@pytest.mark.parametrize("epochs, size", [(3, 2), (2, 3), (1, 8)])
def test_an_epoch_is_a_pass_over_all_batches_of_a_chunk(cfg, monkeypatch, epochs, size):
    cfg = dataclasses.replace(cfg, ttt_epochs=epochs, ttt_batch_seqs=size)
    adapt, seen = adaptation(make_model(cfg), cfg), []
    monkeypatch.setattr(adapt, "step", lambda chunk, rows: seen.append(rows.tolist()))
    inputs = torch.zeros(8, 32, dtype=torch.int64)
    adapt(t.ScoredChunk(0, 0.0, False, torch.zeros(256), inputs, inputs, torch.ones(8)))
    assert seen == [list(range(first, min(first + size, 8))) for first in range(0, 8, size)] * epochs


def test_the_score_of_a_chunk_keeps_no_graph_even_where_its_losses_do(cfg, log):
    own = dict(ttt_scope="document", ttt_lora_rank=2, ttt_chunk_tokens=32, ttt_optimizer="adamw", ttt_grad_clip=0.0)
    scorer, model = scorer_of(cfg, log, **own), make_model(cfg)
    kept = []
    for chunk, _ in scorer.document_chunks([(model, None)], [(0, 100)], True):
        kept.append(chunk.losses[0].requires_grad)
        assert not chunk.nll.requires_grad and chunk.nll.dtype == torch.float64
    assert kept == [True, True, True, False]  # nothing is learnt after the last one
