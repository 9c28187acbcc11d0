"""The mixture of experts of test-time training: its formula, its bound, and what each expert is."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adapt import adapted, cfg_of, found, scorer_of, text
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as t

RATES = (0.02, 0.0, 0.05)  # the second one is the frozen model


def fixed_share(log_p, weights, share):
    """Herbster and Warmuth's algorithm, token by token, in NumPy: (log-probabilities (S,), weights after them) of log_p (S, K)."""
    found = []
    for p in np.exp(log_p):
        total = weights @ p
        found.append(math.log(total))
        weights = (1 - share) * weights * p / total + share / len(p)
    return np.array(found), weights


def random_experts(seed, documents, tokens, experts):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(experts), documents)
    return -rng.exponential(3.0, (documents, tokens, experts)) * rng.uniform(0.1, 5, (documents, 1, experts)), weights


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 130), experts=st.integers(1, 5), share=st.sampled_from([1e-6, 0.01, 0.05, 0.5, 1.0]))
def test_the_scan_is_the_recurrence(seed, tokens, experts, share):
    log_p, start = random_experts(seed, 3, tokens, experts)
    mixed, after = t.mix(torch.from_numpy(log_p), torch.from_numpy(start), share)
    for row, weights, scores, last in zip(log_p, start, mixed, after):
        expected, end = fixed_share(row, weights, share)
        np.testing.assert_allclose(scores, expected, atol=1e-9)
        np.testing.assert_allclose(last, end, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(1, 39))
def test_chunks_continue_with_the_weights_of_the_last_one(seed, cut):
    log_p, start = map(torch.from_numpy, random_experts(seed, 2, 40, 3))
    whole, after = t.mix(log_p, start, 0.05)
    first, between = t.mix(log_p[:, :cut], start, 0.05)
    second, last = t.mix(log_p[:, cut:], between, 0.05)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(last, after)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 200), experts=st.integers(2, 5), share=st.sampled_from([1e-6, 0.02, 0.05, 0.2]))
def test_the_loss_is_bounded_by_that_of_the_best_expert(seed, tokens, experts, share):
    """Fixed share from equal weights: the path that stays with one expert has probability (1 / K) (1 - a + a / K)^(S - 1)."""
    log_p, _ = random_experts(seed, 4, tokens, experts)
    mixed, _ = t.mix(torch.from_numpy(log_p), torch.full((4, experts), 1 / experts, dtype=torch.float64), share)
    loss, best = -mixed.sum(1).numpy(), -log_p.sum(1).max(1)
    cost = math.log(experts) - (tokens - 1) * math.log(1 - share + share / experts)
    assert (loss <= best + cost + 1e-6).all()


def test_an_expert_that_was_wrong_for_long_comes_back():
    """The share keeps it at a / K, so one switch costs at most log(K / a) and a little."""
    log_p = torch.zeros(1, 2000, 2, dtype=torch.float64)
    log_p[0, :1000, 0] = log_p[0, 1000:, 1] = -20.0
    mixed, after = t.mix(log_p, torch.full((1, 2), 0.5, dtype=torch.float64), 0.05)
    assert float(after[0, 0]) == pytest.approx(0.975) and float(-mixed[0, 1000]) == pytest.approx(math.log(2 / 0.05), abs=0.01)
    assert float(-mixed[0, 1002:].max()) < 0.03


def test_a_single_expert_is_itself_bit_for_bit():
    log_p = -torch.rand(3, 77, 1, generator=torch.Generator().manual_seed(0)).double() * 30
    mixed, after = t.mix(log_p, torch.ones(3, 1, dtype=torch.float64), 0.05)
    assert torch.equal(mixed, log_p[..., 0]) and torch.equal(after, torch.ones_like(after))


def test_a_share_of_one_is_the_mean_of_the_probabilities():
    log_p = torch.from_numpy(random_experts(1, 2, 30, 3)[0])
    mixed, _ = t.mix(log_p, torch.full((2, 3), 1 / 3, dtype=torch.float64), 1.0)
    torch.testing.assert_close(mixed, log_p.exp().mean(-1).log())


def test_a_chunk_takes_few_launches():
    class Counter(TorchDispatchMode):
        launches = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            views = ("view", "unsqueeze", "expand", "slice", "select", "transpose", "alias", "squeeze", "detach", "diagonal")
            self.launches += not any(word in str(function) for word in views)
            return function(*args, **kwargs or {})

    with Counter() as counter:
        t.mix(torch.zeros(64, 48, 2, dtype=torch.float64) - 1, torch.full((64, 2), 0.5, dtype=torch.float64), 0.05)
    assert counter.launches < 64, counter.launches


# ---- in an evaluation

@pytest.fixture(scope="module", params=["document", "reuse"])
def runs(request):
    """(cfg, tokens, nll of the mixture, that of each of its experts, that of each rate alone)."""
    tokens, scorers = text(), []
    cfg = cfg_of(request.param, ttt_epochs=1, ttt_lr=RATES[0], ttt_expert_lrs=RATES[1:], ttt_chunk_tokens=16, ttt_share=0.1)

    def score(cfg):
        scorer, model = scorer_of(cfg, tokens), make_model(cfg)
        t.evaluate_adapting(scorer, model, [], model)
        scorers.append(scorer)
        return found(scorer)[0]

    mixed = score(cfg)
    alone = [score(dataclasses.replace(cfg, ttt_lr=rate, ttt_expert_lrs=())) for rate in RATES]
    return cfg, tokens, mixed, scorers[0].audited["experts"], alone


def test_each_expert_has_the_scores_of_its_rate_alone(runs):
    """Bit for bit: they see the same rows, and an expert learns from its own losses."""
    _, _, _, experts, alone = runs
    assert all(torch.equal(expert, one) for expert, one in zip(experts, alone, strict=True))
    assert not torch.equal(experts[0], experts[1]) and not torch.equal(experts[0], experts[2])


def test_the_score_is_the_mixture_of_the_experts_in_each_document(runs):
    cfg, tokens, mixed, experts, _ = runs
    for first, end in t.document_spans(tokens.numpy()):
        expected, _ = fixed_share(-experts[:, first:end].T.numpy(), np.ones(3) / 3, cfg.ttt_share)
        np.testing.assert_allclose(-mixed[first:end], expected, atol=1e-12)


def test_a_frozen_expert_is_the_frozen_model_and_builds_no_graph():
    cfg, tokens, seen = cfg_of("reuse", ttt_expert_lrs=(0.0,), ttt_chunk_tokens=16), text(70, firsts=(0,)), []
    model, scorer = make_model(cfg), scorer_of(cfg, tokens)
    model.register_forward_hook(lambda module, args, losses: seen.append(losses.requires_grad))
    t.evaluate_adapting(scorer, model, [], model)
    assert seen == [True, False] * 4 + [False, False]
    plain = adapted(dataclasses.replace(cfg, ttt_epochs=0, ttt_expert_lrs=()), tokens)[0]
    np.testing.assert_allclose(scorer.audited["experts"][1], plain, atol=2e-5)


def test_a_step_of_one_expert_leaves_the_others(monkeypatch):
    """An expert at a rate that ruins it changes no bit of another, and the mixture stays within its bound."""
    cfg, tokens = cfg_of("reuse", ttt_lr=0.02, ttt_chunk_tokens=16), text(70, firsts=(0,))
    good = adapted(cfg, tokens)[0]
    wild = dataclasses.replace(cfg, ttt_expert_lrs=(5.0,))
    scorer, model = scorer_of(wild, tokens), make_model(cfg)
    t.evaluate_adapting(scorer, model, [], model)
    mixed, experts = found(scorer)[0], scorer.audited["experts"]
    assert torch.equal(experts[0], good) and experts[1].mean() > good.mean() + 0.5
    assert mixed.sum() <= good.sum() + math.log(2) - len(good) * math.log(1 - wild.ttt_share / 2)


@pytest.mark.parametrize("changes, words", [
    (dict(TTT_EXPERT_LRS="0", VARIANT="pr150"), "TTT_EXPERT_LRS must be empty with TTT_SCOPE=stream"),
    (dict(TTT_SHARE="0"), "TTT_SHARE=0.0 must be in"), (dict(TTT_SHARE="1.5"), "TTT_SHARE=1.5 must be in"),
    (dict(TTT_EXPERT_LRS="0,-1"), "TTT_EXPERT_LRS=-1.0 must be in"), (dict(TTT_EXPERT_LRS="0,x"), "TTT_EXPERT_LRS='x'|x"),
    (dict(TTT_EXPERT_LRS="0," * 600), "TTT_BATCH_SEQS times TTT_LORA_RANK"),
])
def test_options_without_a_meaning_are_refused(changes, words):
    with pytest.raises(t.InputError, match=words):
        t.Config.from_env(changes)
