"""Every kind of test-time training: what it learns, what it may not see, what it leaves alone."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from helpers.smoke import SMOKE
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

SMALL = dict(num_layers=2, ve_layers=(1,), xsa_last_n=1, ttt_chunk_tokens=64, ttt_epochs=2, eval_stride=16)
CFG = dataclasses.replace(t.Config.from_env({**SMOKE, "VOCAB_SIZE": "40"}), **SMALL)
KINDS = {
    "sgd": dict(ttt_lr=0.02),
    "nesterov": dict(ttt_lr=0.02, ttt_nesterov=True, ttt_z_loss=1e-3, ttt_params=("*.weight",)),
    "adamw": dict(ttt_optimizer="adamw", ttt_params=("blocks.1.*", "*.attn_scale", "tok_emb.*"), ttt_cosine_floor=0.1, ttt_temperature=0.9, ttt_lr=0.01),
    "lora": dict(ttt_lora_rank=4, ttt_params=t.Config.ttt_params, ttt_optimizer="adamw", ttt_lr=0.02),
    "document": dict(ttt_scope="document", ttt_lora_rank=4, ttt_params=t.Config.ttt_params, ttt_optimizer="adamw", ttt_lr=0.02, ttt_beta2=0.95,
                     ttt_chunk_tokens=16, ttt_grad_clip=0.0, ttt_temperature=1.1),
    "reuse": dict(ttt_scope="document", ttt_lora_rank=5, ttt_lora_scale=1.8, ttt_params=("blocks.*.weight", "tok_emb.*", "!*.c_k.*"),
                     ttt_optimizer="adamw", ttt_lr=0.02, ttt_momentum=0.0, ttt_beta2=0.99, ttt_weight_decay=0.3,
                     ttt_chunk_tokens=12, ttt_epochs=1, ttt_grad_clip=0.0, document_attention=True),
}
LORA = dataclasses.replace(CFG, ttt_lora_rank=3, ttt_params=t.Config.ttt_params)
STREAMS = [kind for kind in KINDS if KINDS[kind].get("ttt_scope") != "document"]
FIRSTS = (0, 41, 42, 60, 137, 139)  # where the documents of `text` begin


@pytest.fixture(autouse=True, scope="module")
def chunks_of_any_length():
    """How chunks are cut is clearer in short ones, which a run refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "MIN_CHUNK", 1)
        yield


def cfg_of(kind, **changes):
    return dataclasses.replace(CFG, **KINDS[kind] | changes)


def text(length=180, vocab_size=40, firsts=FIRSTS):
    """Random tokens with documents that begin at `firsts`."""
    tokens = torch.randint(2, vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    tokens[[i for i in firsts if i < length]] = t.BOS
    return tokens


def scorer_of(cfg, tokens, ranks=None):
    """A Scorer of any stream of tokens. It needs no data."""
    scorer = t.Scorer.__new__(t.Scorer)
    scorer.tokens, scorer.bytes = tokens, torch.ones(len(tokens) - 1, dtype=torch.int64)
    scorer.documents = t.document_spans(tokens.numpy())
    scorer.cfg, scorer.ranks, scorer.log = cfg, ranks or t.Ranks(), SimpleNamespace(active=False)
    return scorer


def found(scorer):
    """(nll, chunk) of all targets in the latest pass."""
    return scorer.audited["nll"], scorer.audited["chunk"]


def alone_in(rank, world):
    """A rank whose sums stay its own."""
    ranks = t.Ranks(rank, world)
    object.__setattr__(ranks, "sum_", lambda tensor: tensor)
    return ranks


def adapted(cfg, tokens, model=None, ranks=None):
    """Losses and chunks of all targets of a pass with test-time training, from the same weights each time."""
    model, scorer = model or make_model(cfg), scorer_of(cfg, tokens, ranks)
    t.evaluate_adapting(scorer, model, [] if cfg.ttt_lora_rank else t.ttt_parameters(model, cfg), model)
    return found(scorer)


def frozen(cfg, tokens):
    """The same pass over the same windows with a model that never learns."""
    scorer, model = scorer_of(cfg, tokens), make_model(cfg)
    score = partial(model, temperature=cfg.ttt_temperature)
    scorer.evaluate_documents(lambda n: [(score, None)]) if cfg.ttt_scope == "document" else scorer.evaluate_sliding(score)
    return found(scorer)


# ---- it learns

@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_a_text_that_repeats(kind):
    cfg = cfg_of(kind, ttt_lr=0.1 if kind in ("sgd", "nesterov") else 0.02)
    tokens = torch.tensor([t.BOS, *[20, 21, 22, 23, 24, 25, 26] * 30] if cfg.ttt_scope == "document" else [t.BOS, 20, 21, 22, 23, 24, 25, 26] * 80)
    losses = []
    for rate in (0.0, cfg.ttt_lr):
        model = t.GPT(cfg)
        model.init_weights(cfg)
        losses.append(float(adapted(dataclasses.replace(cfg, ttt_lr=rate), tokens, model)[0].mean()))
    assert losses[0] == pytest.approx(math.log(cfg.vocab_size), abs=0.1) and losses[1] < losses[0] - 0.5


def test_a_document_teaches_the_next_one_nothing():
    """Two documents of the same text: the second one is as new as the first."""
    tokens = torch.tensor([t.BOS, *[20, 21, 22, 23, 24, 25, 26] * 20] * 2)
    nll, _ = adapted(cfg_of("document"), tokens)
    half = len(tokens) // 2
    np.testing.assert_allclose(nll[: half - 1], nll[half:], atol=1e-4)


# ---- without a rate or an epoch it is the pass that does not learn

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off", [dict(ttt_lr=0.0), dict(ttt_epochs=0)])
def test_no_rate_and_no_epochs_reproduce_the_frozen_scores_bit_for_bit(kind, off):
    cfg, tokens = cfg_of(kind), text()
    (cold, chunks), (plain, same) = adapted(dataclasses.replace(cfg, **off), tokens), frozen(cfg, tokens)
    if kind == "reuse":  # a Linear with a LoRA scales its output instead of its weight
        torch.testing.assert_close(cold, plain, rtol=1e-5, atol=1e-5)
    assert (kind == "reuse" or torch.equal(cold, plain)) and torch.equal(chunks, same)
    assert not torch.equal(adapted(cfg, tokens)[0], plain)


@pytest.mark.parametrize("size, window", [(16, 32), (32, 32), (10, 32), (1, 8)])
def test_documents_alone_score_as_one_document_and_one_position_at_a_time(size, window):
    cfg, tokens = cfg_of("document", ttt_chunk_tokens=size, eval_seq_len=window, eval_stride=1, ttt_batch_seqs=2), text()
    model, expected, chunks = make_model(cfg), [], []
    for first, end in zip(FIRSTS, [*FIRSTS[1:], len(tokens) - 1]):
        for position in range(first, end):
            chunk = (position - first) // size
            start = first + max(0, (chunk + 1) * size - window)
            with torch.no_grad():
                logits = model.logits(model.hidden(tokens[None, start : position + 1]))[0, -1] / cfg.ttt_temperature
            expected.append(float(F.cross_entropy(logits.double(), tokens[position + 1])))
            chunks.append(chunk)
    nll, index = frozen(cfg, tokens)
    np.testing.assert_allclose(nll, expected, atol=2e-5)
    assert index.tolist() == chunks


@pytest.mark.parametrize("temperature", [0.5, 0.98, 1.0, 2.0])
def test_the_temperature_divides_the_logits_that_are_scored(temperature):
    model, ids = make_model(CFG), text(33)[None]
    with torch.no_grad():
        logits = CFG.logit_softcap * torch.tanh(F.linear(model.hidden(ids[:, :-1]), model.tok_emb.weight) / CFG.logit_softcap)
        expected = F.cross_entropy(logits[0] / temperature, ids[0, 1:], reduction="none")
        torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:], temperature=temperature)[0], expected, rtol=1e-5, atol=1e-5)


# ---- it sees nothing before it is scored

@pytest.mark.parametrize("kind", KINDS)
def test_the_first_chunk_has_the_scores_of_the_frozen_model(kind):
    cfg, tokens = cfg_of(kind), text()
    (warm, index), (plain, _) = adapted(cfg, tokens), frozen(cfg, tokens)
    assert torch.equal(warm[index == 0], plain[index == 0]) or kind == "reuse"  # it rounds in another place
    torch.testing.assert_close(warm[index == 0], plain[index == 0], rtol=1e-5, atol=1e-5)
    later = warm[index > 0] != plain[index > 0]
    assert later.double().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_future_changes_no_earlier_score(kind):
    cfg, tokens = cfg_of(kind), text()
    base = adapted(cfg, tokens)[0]
    for position in (3, 64, 65, 90, 128, 129, 179):
        changed = tokens.clone()
        changed[position] = 2 + (changed[position] + 7) % (cfg.vocab_size - 2)
        after = adapted(cfg, changed)[0]
        assert torch.equal(after[: position - 1], base[: position - 1]) and after[position - 1] != base[position - 1]


@pytest.mark.parametrize("kind, position", [*((k, p) for k in STREAMS for p in (65, 128, 140)),
                                            *(("document", p) for p in (59, 60, 140))])
def test_the_scores_of_all_tokens_at_a_position_are_one_distribution(kind, position):
    """It fails if a target, or anything after it, had a part in its own prediction. The stream goes on behind the position."""
    cfg, total = cfg_of(kind, vocab_size=8, ttt_epochs=1), 0.0
    tokens = text(150, 8, firsts=(0, 41, 42, 60, 115))
    for token in range(8):
        changed = tokens.clone()
        changed[position] = token
        total += float(adapted(cfg, changed)[0][position - 1].neg().exp())
    assert abs(total - 1) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_on_targets_that_were_scored_and_on_nothing_else(kind, monkeypatch):
    """At each step: every trained target lies before the first one that is not scored yet, in its document or in the stream."""
    cfg, events = cfg_of(kind), []
    tokens = torch.arange(2, 182)  # each token tells its position
    tokens[list(FIRSTS)] = t.BOS
    model, ends = make_model(dataclasses.replace(cfg, vocab_size=200)), dict(zip(FIRSTS, [*FIRSTS[1:], 179]))
    monkeypatch.setattr(t.Adaptation, "step", lambda self, chunk, rows: events.append((chunk.index, chunk.targets[rows], chunk.weight[rows])))
    adapted(cfg, tokens, model)
    for index, targets, weight in events:
        for row in targets[weight > 0]:
            inside = row[row != t.BOS] - 2
            first = max(f for f in FIRSTS if f < inside.min()) if cfg.ttt_scope == "document" else 0
            low = first + index * cfg.ttt_chunk_tokens
            assert low < inside.min() and inside.max() <= low + cfg.ttt_chunk_tokens and (not cfg.ttt_scope == "document" or inside.max() < ends[first])
    seen = [index for index, *_ in events]
    expected = [*range(4), *range(2), 0] if kind == "document" else range(2)  # documents of 5, of 3 and of 2 chunks
    if kind == "reuse":  # of 7, of 4 and of 2
        expected = [*range(6), *range(3), 0]
    assert seen == [i for i in expected for _ in range(cfg.ttt_epochs)]


def test_documents_do_not_depend_on_each_other():
    cfg, tokens = cfg_of("document", ttt_batch_seqs=3), text()
    base, ends = adapted(cfg, tokens)[0], [*FIRSTS[1:], 179]
    for first, end in zip(FIRSTS, ends):
        changed = tokens.clone()
        changed[first + 1 : end] = 2 + (changed[first + 1 : end] + 7) % 38
        other = torch.ones(179, dtype=torch.bool)
        other[first:end] = False
        after = adapted(cfg, changed)[0]
        np.testing.assert_allclose(after[other], base[other], atol=1e-4)
        assert end - first == 1 or not torch.allclose(after[first:end], base[first:end], atol=1e-2)


def test_documents_in_another_order_have_the_same_scores():
    cfg, tokens = cfg_of("document", ttt_batch_seqs=3), text()
    ends = [*FIRSTS[1:], 179]
    order = [4, 2, 0, 5, 1, 3]
    moved = torch.cat([tokens[FIRSTS[i] : ends[i]] for i in order] + [tokens[:1]])  # each one's last target is a BOS
    tokens[-1] = t.BOS
    base, after = adapted(cfg, tokens)[0], adapted(cfg, moved)[0]
    np.testing.assert_allclose(after, torch.cat([base[FIRSTS[i] : ends[i]] for i in order]), atol=1e-4)


def test_a_document_scores_alike_in_any_batch():
    cfg, tokens = cfg_of("document"), text()
    one, three, all_ = (adapted(dataclasses.replace(cfg, ttt_batch_seqs=n), tokens)[0] for n in (1, 3, 32))
    np.testing.assert_allclose(one, three, atol=1e-4)
    np.testing.assert_allclose(one, all_, atol=1e-4)


@pytest.mark.parametrize("changes, again", [({}, False), (dict(ttt_epochs=2), True), (dict(ttt_temperature=0.9), True), (dict(ttt_z_loss=0.01), True)])
def test_what_is_learned_from_is_what_was_scored_if_that_is_the_same(changes, again, monkeypatch):
    """One pass then does for both, bit for bit; else the scores are computed alone."""
    cfg, tokens, inner = cfg_of("reuse", **changes), text(), t.Scorer.evaluate_documents

    def run(allowed):
        model, passes = make_model(cfg), []
        model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        with monkeypatch.context() as patch:
            patch.setattr(t.Scorer, "evaluate_documents", lambda scorer, make_experts, reuse_losses: inner(scorer, make_experts, reuse_losses and allowed))
            return adapted(cfg, tokens, model)[0], passes

    (nll, passes), (apart, separate) = run(True), run(False)
    assert torch.equal(nll, apart) and (passes == separate) == again
    assert again or (len(passes), passes.count(True)) == (separate.count(False), separate.count(True))


def plain_linear(weight):
    linear = torch.nn.Linear(*weight.T.shape, bias=False)
    linear.weight.data.copy_(weight)
    return linear


class Added(torch.nn.Sequential):
    """What a Linear's lora is, of any modules: y plus what they make of x."""
    def forward(self, x, y):
        return y + super().forward(x)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_document_learns_as_a_lora_written_by_hand(optimizer):
    """One document, one lora, one step a chunk: against autograd on plain matrices added to q, v and the head."""
    cfg, tokens = cfg_of("document", ttt_optimizer=optimizer, ttt_epochs=1, ttt_lr=0.05, ttt_momentum=0.5), text(70, firsts=(0,))
    nll, _ = adapted(cfg, tokens)
    model = make_model(cfg).requires_grad_(False)
    t.attach_lora(t.lora_starts(model, cfg), 1, cfg)
    owners = {n: m for n, m in model.named_modules() if getattr(m, "output_hook", None) is not None}
    assert sorted(owners) == ["blocks.0.attn.c_q", "blocks.0.attn.c_v", "blocks.1.attn.c_q", "blocks.1.attn.c_v", "tok_emb"]
    for m in owners.values():
        m.output_hook = Added(plain_linear(m.output_hook.down[0]), plain_linear(m.output_hook.up[0]))
    flat = [p for m in owners.values() for p in m.output_hook.parameters()]
    make = partial(torch.optim.AdamW, betas=(0.5, 0.95), weight_decay=0.0) if optimizer == "adamw" else partial(torch.optim.SGD, momentum=0.5)
    steps, expected = make(flat, lr=0.05), []
    for low in range(0, 69, 16):
        start_at, high = max(0, low - 16), min(low + 16, 69)
        losses = model(tokens[None, start_at:high], tokens[None, low + 1 : high + 1], temperature=cfg.ttt_temperature)[0]
        expected += losses.tolist()
        if high < 69:
            model(tokens[None, start_at:high], tokens[None, low + 1 : high + 1]).mean().backward()
            steps.step()
            steps.zero_grad()
    np.testing.assert_allclose(nll, expected, atol=1e-3)


# ---- what moves and what does not

def moved(cfg, tokens=None):
    """Names of the parameters that a pass changed; LoRAs apart."""
    model = make_model(cfg)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapted(cfg, text() if tokens is None else tokens, model)
    return {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}, before


@pytest.mark.parametrize("changes, chosen", [
    ({}, lambda n: True), (dict(ttt_params=("blocks.1.*",)), lambda n: n.startswith("blocks.1.")),
    (dict(ttt_params=("*", "!blocks.0.*")), lambda n: not n.startswith("blocks.0.")),
    (dict(ttt_params=("*.weight", "!*.mlp.*", "blocks.0.mlp.*")), lambda n: n.startswith("blocks.0.mlp.") or n.endswith(".weight") and ".mlp." not in n),
    (dict(ttt_params=("*.attn_scale", "tok_emb.*")), lambda n: "attn_scale" in n or n == "tok_emb.weight"),
    (dict(ttt_params=("*.q_gain", "!blocks.0.*")), lambda n: n == "blocks.1.attn.q_gain"),
])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_patterns_choose_what_moves(changes, chosen, optimizer):
    names, before = moved(dataclasses.replace(CFG, ttt_optimizer=optimizer, ttt_lr=0.01, **changes))
    assert names == {n for n in before if chosen(n)} and names


def test_a_block_is_not_one_whose_number_begins_alike():
    """pr150 freezes blocks 0 and 1 of 11."""
    cfg = t.Config.from_env({"VARIANT": "pr150"})
    with torch.device("meta"):
        model = t.GPT(cfg)
    chosen = set(map(id, t.ttt_parameters(model, cfg)))
    assert {name.split(".")[1] for name, p in model.named_parameters() if name.startswith("blocks.") and id(p) in chosen} == set(map(str, range(2, 11)))
    t.ttt_parameters(model, dataclasses.replace(cfg, ttt_params=("blocks.1.*",)))
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"1"}


def test_a_lora_of_scale_s_adds_s_times_its_term():
    model = make_model(CFG)
    x, y = torch.randn(1, 5, CFG.model_dim), torch.zeros(1, 5, CFG.model_dim)
    terms = []
    for scale in (1.0, 1.8):
        cfg = dataclasses.replace(LORA, ttt_lora_scale=scale)
        t.attach_lora(t.lora_starts(model, cfg), 1, cfg)
        lora = model.blocks[0].attn.c_q.output_hook
        with torch.no_grad():
            lora.up.copy_(torch.ones_like(lora.up))
            terms.append(lora(x, y))
    assert terms[0].any()
    torch.testing.assert_close(terms[1], 1.8 * terms[0])


@pytest.mark.parametrize("patterns, names", [
    (("*.mlp.fc.weight",), {"mlp.fc"}), (("*",), {"attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj", ""}),
    (("*", "!tok_emb.*", "!*.mlp.*", "!*.attn.c_*"), {"attn.proj"}), (("tok_emb.weight", "bigram.proj.weight"), {""}),
])
def test_patterns_choose_the_matrices_that_a_lora_adapts(patterns, names):
    model = make_model(CFG)
    starts = t.lora_starts(model, dataclasses.replace(LORA, ttt_params=patterns))
    of = {module: name for name, module in model.named_modules()}
    assert {of[m].partition("blocks.")[2].partition(".")[2] for m in starts} == names
    assert len(starts) == len(names - {""}) * CFG.num_layers + ("" in names)


def test_a_lora_without_a_matrix_is_an_error_before_training():
    with pytest.raises(t.InputError, match="TTT_PARAMS selects no matrix of a block"):
        t.resolve(dict(VARIANT="card", TTT_PARAMS="*.q_gain,bigram.*"))


def test_weight_decay_pulls_loras_back(monkeypatch):
    sizes = []
    for decay in (0.0, 20.0):
        model, seen = make_model(CFG), []
        real = t.attach_lora
        monkeypatch.setattr(t, "attach_lora", lambda *a, real=real, seen=seen: (seen.append(real(*a)), seen[-1])[1])
        adapted(cfg_of("document", ttt_weight_decay=decay), text(), model)
        monkeypatch.setattr(t, "attach_lora", real)
        sizes.append(sum(float(p.detach().norm()) for p in seen[0]))
    assert sizes[1] < 0.8 * sizes[0]


def test_the_seed_draws_what_a_lora_begins_with():
    cfg = cfg_of("lora")
    starts = [[*t.lora_starts(make_model(CFG), dataclasses.replace(cfg, seed=seed)).values()] for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(*starts))


@pytest.mark.parametrize("kind", ["lora", "document"])
def test_loras_leave_the_weights_bit_for_bit(kind):
    assert moved(cfg_of(kind))[0] == set()


@pytest.mark.parametrize("rows", [1, 4])
def test_loras_begin_as_terms_of_zero(rows):
    model, ids = make_model(CFG), text(132).view(4, 33)
    plain = model(ids[:, :-1], ids[:, 1:])
    params = t.attach_lora(t.lora_starts(model, LORA), rows, LORA)
    assert torch.equal(model(ids[:, :-1], ids[:, 1:]), plain)
    down, up = params[::2], params[1::2]
    assert len(down) == 2 * CFG.num_layers + 1 and not any(p.any() for p in up)
    for a, b in zip(down, up):
        assert a.shape[:2] == (rows, 3) and b.shape[::2] == (rows, 3) and a.abs().max() <= a.size(2) ** -0.5 and a.std() > 0.4 * a.size(2) ** -0.5
    again = t.attach_lora(t.lora_starts(model, LORA), rows, LORA)
    assert all(torch.equal(p, q) and p is not q for p, q in zip(params, again))


def test_each_row_has_a_lora_of_its_own():
    model, ids = make_model(CFG), text(132).view(4, 33)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    plain, params = model(inputs, targets), t.attach_lora(t.lora_starts(model, LORA), 4, LORA)
    with torch.no_grad():
        for p in params:
            p[2] += 0.3
    after = model(inputs, targets)
    assert torch.equal(after[[0, 1, 3]], plain[[0, 1, 3]]) and not torch.allclose(after[2], plain[2])


@pytest.mark.parametrize("z", [1e-5, 0.1])
def test_the_z_loss_is_the_squared_log_partition(z):
    model, ids = make_model(CFG), text(33)[None]
    inputs, targets = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        log_partition = model.logits(model.hidden(inputs)).double().exp().sum(-1).log()
        torch.testing.assert_close(model(inputs, targets, z_loss=z), (model(inputs, targets) + z * log_partition**2).float(), rtol=1e-5, atol=1e-5)


def test_the_z_loss_is_learned_from_but_not_scored():
    tokens = text()
    plain, with_z = (adapted(cfg_of("sgd", ttt_z_loss=z), tokens)[0] for z in (0.0, 0.1))
    assert torch.equal(plain[:64], with_z[:64]) and not torch.allclose(plain[64:], with_z[64:], atol=1e-4)


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.6, 1.0])
def test_the_rate_falls_as_a_cosine_to_its_floor(kind, floor):
    cfg, rates = cfg_of(kind, ttt_cosine_floor=floor), []
    tokens, model = text(6 * 64 + 10), make_model(cfg)
    params = t.attach_lora(t.lora_starts(model, cfg), 1, cfg) if cfg.ttt_lora_rank else t.ttt_parameters(model, cfg)
    adaptation = t.Adaptation(params, model, cfg, t.Ranks())
    adaptation.step = lambda chunk, rows: rates.append(adaptation.optimizer.param_groups[0]["lr"])
    scorer_of(cfg, tokens).evaluate_sliding(model, adaptation)
    expected = [cfg.ttt_lr * max(floor, (1 + math.cos(math.pi * i / 6)) / 2) for i in range(6) for _ in range(cfg.ttt_epochs)]
    assert rates == pytest.approx(expected, abs=1e-9)
    assert floor < 1 or set(rates) == {cfg.ttt_lr}


def test_a_stream_of_one_chunk_is_only_scored():
    for kind in KINDS:
        cfg = cfg_of(kind)
        tokens = text(17, firsts=(0,))
        torch.testing.assert_close(adapted(dataclasses.replace(cfg, ttt_chunk_tokens=32), tokens)[0],
                                   frozen(dataclasses.replace(cfg, ttt_chunk_tokens=32), tokens)[0], rtol=1e-5, atol=1e-5)


def test_nesterov_looks_ahead_and_adamw_has_its_betas():
    kinds = {kind: t.Adaptation(list(make_model(CFG).parameters()), None, cfg_of(kind), t.Ranks()).optimizer for kind in KINDS}
    assert [kinds[k].defaults.get("nesterov") for k in ("sgd", "nesterov")] == [False, True]
    assert kinds["sgd"].defaults["momentum"] == CFG.ttt_momentum and kinds["sgd"].defaults["dampening"] == 0
    assert kinds["adamw"].defaults["betas"] == (0.9, 0.999) and kinds["document"].defaults["betas"] == (0.9, 0.95)
    assert {kind: o.defaults["weight_decay"] for kind, o in kinds.items()} == dict.fromkeys(KINDS, 0.0) | dict(reuse=0.3)


# ---- several ranks

def first_loss(ids, targets):
    """A stand-in for a model: the loss of a target is the token itself."""
    return targets.float()


@settings(max_examples=80, deadline=None)
@given(length=st.integers(2, 90), marks=st.sets(st.integers(0, 89)), size=st.sampled_from([1, 5, 8]), batch=st.integers(1, 5), world=st.integers(1, 3))
def test_ranks_share_the_documents_and_score_each_target_once(length, marks, size, batch, world):
    cfg = cfg_of("document", ttt_chunk_tokens=size, eval_seq_len=8, eval_stride=8, ttt_batch_seqs=batch)
    tokens = torch.arange(2, length + 2)
    tokens[sorted(m for m in marks if m < length)] = t.BOS
    scored, total, chunks = torch.zeros(length), 0, 0
    firsts, work = [i for i in range(length - 1) if i == 0 or tokens[i] == t.BOS], [0] * world
    for rank in range(world):
        scorer = scorer_of(cfg, tokens, alone_in(rank, world))
        assert scorer.documents == list(zip(firsts, [*firsts[1:], length - 1]))
        inner = scorer.document_chunks

        def counted(experts, documents, reuse_losses=False, inner=inner, rank=rank):
            lasts = [-(-(end - first) // size) for first, end in documents]
            assert 0 < len(documents) <= batch and min(lasts) >= 0.8 * max(lasts), "nobody waits for a straggler"
            work[rank] += max(lasts) * (8 + len(lasts))
            for chunk, target_index in inner(experts, documents, reuse_losses):
                assert chunk.nll[0].shape == target_index.shape == (len(documents), size) and chunk.nll.dtype == torch.float64
                assert not chunk.nll[:, target_index == length - 1].any(), "padding behind the end of a document has no score"
                scored.index_add_(0, target_index.flatten(), torch.ones(target_index.numel()))
                yield chunk, target_index

        scorer.document_chunks = counted
        scorer.evaluate_documents(lambda n: [(first_loss, None)])
        nll, index = found(scorer)
        total, chunks = total + nll, chunks + index
    longest = max(-(-(end - first) // size) for first, end in scorer.documents)
    assert max(work) - min(work) <= longest * (8 + batch), "ranks have alike much to do"
    assert (scored[:-1] == 1).all() and torch.equal(total, tokens[1:].double())
    assert chunks.tolist() == [(i - max(f for f in firsts if f <= i)) // size for i in range(length - 1)]


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 90), marks=st.sets(st.integers(0, 89)), size=st.sampled_from([1, 5, 8]))
def test_what_is_learned_was_scored_in_the_same_document(length, marks, size):
    cfg = cfg_of("document", ttt_chunk_tokens=size, eval_seq_len=8, eval_stride=8, ttt_batch_seqs=3)
    tokens = torch.arange(2, length + 2)
    tokens[sorted(m for m in marks if m < length)] = t.BOS
    scorer = scorer_of(cfg, tokens)
    documents = sorted(scorer.documents, key=lambda d: d[1] - d[0])
    for i in range(0, len(documents), 3):
        done = set()
        for chunk, target_index in scorer.document_chunks([(first_loss, None)], documents[i : i + 3]):
            done |= set((target_index[target_index < length - 1] + 1).tolist())
            assert len(documents[i : i + 3]) == len(chunk.weight) == len(chunk.inputs) == len(chunk.targets)
            assert chunk.last == (not chunk.weight.any())
            for (first, end), row, targets, weight in zip(documents[i : i + 3], chunk.inputs, chunk.targets, chunk.weight):
                high = first + (chunk.index + 1) * size
                assert float(weight) == (len(chunk.inputs) if high < end else 0)
                if weight:
                    assert torch.equal(targets, tokens[high - size + 1 : high + 1]) and set(range(high - size + 1, high + 1)) <= done
                    assert torch.equal(row, tokens[max(first, high - 8) : high])


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_that_adapt_to_documents_have_the_scores_of_one(world):
    cfg, tokens = cfg_of("document", ttt_batch_seqs=2), text()
    whole, index = adapted(cfg, tokens)
    parts = [adapted(cfg, tokens, ranks=alone_in(rank, world)) for rank in range(world)]
    np.testing.assert_allclose(sum(nll for nll, _ in parts), whole, atol=1e-4)
    assert torch.equal(sum(chunk for _, chunk in parts), index)


# ---- settings that cannot work

DOCUMENT = dict(TTT_SCOPE="document", TTT_LORA_RANK="4", TTT_GRAD_CLIP="0", TTT_CHUNK_TOKENS="16")


@pytest.mark.parametrize("given, words", [
    (dict(TTT_LORA_SCALE="2"), "TTT_LORA_SCALE needs TTT_LORA_RANK above 0 .TTT_LORA_SCALE=2.0, TTT_LORA_RANK=0"),
    (DOCUMENT | dict(TTT_LORA_RANK="0"), "TTT_LORA_RANK=0"), (DOCUMENT | dict(TTT_GRAD_CLIP="1"), "TTT_GRAD_CLIP=1.0"),
    (DOCUMENT | dict(TTT_CHUNK_TOKENS="33"), "TTT_CHUNK_TOKENS=33"),
    (dict(TTT_SCOPE="page"), "TTT_SCOPE=page"), (dict(TTT_CHUNK_TOKENS="33"), "TTT_CHUNK_TOKENS=33"),
    (dict(TTT_NESTEROV="1", TTT_MOMENTUM="0"), "TTT_MOMENTUM=0"), (dict(TTT_NESTEROV="1", TTT_OPTIMIZER="adamw"), "TTT_OPTIMIZER=adamw"),
    (dict(TTT_OPTIMIZER="adam"), "TTT_OPTIMIZER=adam"), (dict(TTT_TEMPERATURE="0"), "TTT_TEMPERATURE=0"),
    (dict(TTT_OPTIMIZER="adamw", TTT_MOMENTUM="1"), "TTT_MOMENTUM=1"), (dict(TTT_OPTIMIZER="adamw", TTT_BETA2="1"), "TTT_BETA2=1"),
])
def test_bad_settings_are_named(given, words):
    assert t.Config.from_env({**SMOKE, **DOCUMENT}).ttt_scope == "document"
    with pytest.raises(t.InputError, match=words):
        t.Config.from_env({**SMOKE, **given})


@pytest.mark.parametrize("changes, words", [
    (dict(ttt_params=("blocks.1.*", "blocks.7.*")), "TTT_PARAMS=blocks.7.[*] matches no parameter"), (dict(ttt_params=()), "selects no parameter"),
    (dict(ttt_params=("*", "!blocks.7.*")), "TTT_PARAMS=!blocks.7.[*] matches no parameter"), (dict(ttt_params=("!blocks.1.*",)), "selects no parameter"),
    (dict(ttt_params=("blocks.*", "!blocks.0.*", "!blocks.1.*")), "selects no parameter")])
def test_settings_that_leave_nothing_to_adapt_are_named(changes, words):
    with pytest.raises(t.InputError, match=words):
        adapted(dataclasses.replace(CFG, **changes), text())


def test_names_of_an_artifact_are_not_looked_for_in_another_model(tmp_path):
    """An artifact brings its own model: what does not fit the default one gets as far as the file, which is missing here."""
    with pytest.raises(t.InputError, match="there is no artifact .*none"):
        t.main([], {"TTT_PARAMS": "blocks.99.*", "OUTPUT_DIR": str(tmp_path), "EVAL_ONLY": "1", "ARTIFACT": str(tmp_path / "none")})


def test_they_are_named_before_training(tmp_path):
    with pytest.raises(t.InputError, match="TTT_PARAMS=blocks.99.[*] matches no parameter"):
        t.main([], {"VARIANT": "pr490", "TTT_PARAMS": "blocks.99.*", "OUTPUT_DIR": str(tmp_path), "DATA_PATH": "/none"})
    assert not list(tmp_path.iterdir())


def test_the_published_kinds_are_settings_that_work():
    for variant in ("pr150", "pr455", "pr490", "pr1812"):
        cfg = t.Config.from_env({"VARIANT": variant})
        with torch.device("meta"):
            model = t.GPT(cfg)
        chosen = {n for p in t.ttt_parameters(model, cfg) for n, q in model.named_parameters() if p is q}
        assert ("blocks.0.mlp.fc.weight" in chosen) == (variant == "pr1812") and "blocks.9.mlp.fc.weight" in chosen
        if variant == "pr490":
            assert {n.split(".")[1] for n in chosen if n.startswith("blocks.") and "scale" not in n} == {"9", "10"} and "tok_emb.weight" in chosen
        if variant == "pr1812":
            roles = t.parameter_roles(model)
            assert {roles[n] for n in chosen} == {"matrix", "table"} and len(chosen) == 67
