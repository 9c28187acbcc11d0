"""Muon and AdamW of the published systems: rates, decays, row normalization, and stacks sharded over ranks."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.twins import small, trainer_of
from test_variants import PUBLISHED

import train_gpt as t


def muon_by_hand(w, grads, cfg, lr, momentum, decay):
    """components.md 5.1, 5.2 in float64, with or without MuonEq-R."""
    buffer = np.zeros_like(w)
    for g in grads:
        buffer = momentum * buffer + g
        u = g + momentum * buffer
        if cfg.muon_row_normalize:
            u = np.stack([row / max(np.sqrt((row**2).sum()), 1e-7) for row in u])
        x = u.T if u.shape[0] > u.shape[1] else u
        x = x / (np.sqrt((x**2).sum()) + 1e-7)
        for _ in range(cfg.muon_backend_steps):
            s = x @ x.T
            x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
        x = x.T if u.shape[0] > u.shape[1] else x
        w = w * (1 - lr * decay) - lr * max(1, u.shape[0] / u.shape[1]) ** 0.5 * x
    return w


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_steps_as_the_formula_says_with_and_without_rows_of_length_one(cfg, normalize, shape):
    cfg = dataclasses.replace(cfg, muon_row_normalize=normalize)
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for _ in range(3)]
    start = [p.detach().double().numpy().copy() for p in params]
    muon = t.Muon([dict(params=params, lr=0.05, weight_decay=0.1)], t.Ranks(), cfg, torch.float32)
    sizes = torch.logspace(-2, 2, shape[0])[:, None]  # rows of very different lengths: what the normalization is for
    history = [[sizes * torch.randn(shape, generator=draw) for _ in params] for _ in range(3)]
    for grads in history:
        for p, g in zip(params, grads):
            p.grad = g.clone()
        with torch.no_grad():
            muon.apply_updates(muon.start_all_gather([share for _, share in muon.start_reduce_scatter()], torch.ones(()), torch.tensor(0.9)), torch.ones(()))
    for i, p in enumerate(params):
        grads = [g[i].double().numpy() for g in history]
        expected = muon_by_hand(start[i], grads, cfg, 0.05, 0.9, 0.1)
        np.testing.assert_allclose(p.detach().numpy(), expected, atol=1e-4)
        other = muon_by_hand(start[i], grads, dataclasses.replace(cfg, muon_row_normalize=not normalize), 0.05, 0.9, 0.1)
        assert np.abs(other - expected).max() > 1e-2


@pytest.mark.parametrize("shape", [(16, 12), (5, 12)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_stack_that_is_sharded_over_ranks_steps_as_the_formula_says(cfg, monkeypatch, normalize, world, shape):
    """Five matrices: their number is not a multiple of 2 or 4 ranks, so the stack is zero-padded."""
    cfg, draw = dataclasses.replace(cfg, muon_row_normalize=normalize), torch.Generator().manual_seed(0)
    ranks = [t.Ranks(r, world) for r in range(world)]
    starts = [torch.randn(shape, generator=draw) for _ in range(5)]
    grads = [[[torch.randn(shape, generator=draw) for _ in range(5)] for _ in ranks] for _ in range(3)]  # of each step and rank
    monkeypatch.setattr(t, "dist", box := Mailbox(world))
    params = [[torch.nn.Parameter(w.clone()) for w in starts] for _ in ranks]
    muons = [t.Muon([dict(params=p, lr=0.05, weight_decay=0.1)], r, cfg, torch.float32) for p, r in zip(params, ranks)]

    def of_all(call):
        pending, box.sent = [], {}
        for box.rank in range(world):
            pending.append(call(box.rank))
        return pending

    for step in grads:
        with torch.no_grad():
            for own, own_grads in zip(params, step):
                for p, g in zip(own, own_grads):
                    p.grad = g.clone()
            sums = of_all(lambda r: muons[r].start_reduce_scatter())
            for wait, _ in [each for own in sums for each in own]:
                wait()
            scale = torch.tensor(1.0 / world)
            updates = of_all(lambda r, sums=sums, scale=scale: muons[r].start_all_gather([s for _, s in sums[r]], scale, torch.tensor(0.9)))
            for muon, pending in zip(muons, updates):
                muon.apply_updates(pending, torch.ones(()))
    for i, start in enumerate(starts):
        mean_grads = [sum(own[i] for own in step).double().numpy() / world for step in grads]
        expected = muon_by_hand(start.double().numpy(), mean_grads, cfg, 0.05, 0.9, 0.1)
        for own in params:
            np.testing.assert_allclose(own[i].detach().numpy(), expected, atol=1e-4)


def test_matrices_of_one_shape_and_rate_form_one_group_and_the_largest_group_comes_first(cfg):
    cfg = dataclasses.replace(t.Config(), vocab_size=64, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, ve_layers=(1,), ve_dim=8, bigram_dim=8,
                              rope_dims=4, xsa_last_n=0)
    model = t.GPT(cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [g["params"] for g in t.Optimizers(model, t.Ranks(), cfg).muon.param_groups]
    assert all(len({p.shape for p in group}) == 1 for group in groups)
    kinds = [{names[id(p)].split(".", 2)[2] if names[id(p)].startswith("blocks") else names[id(p)] for p in group} for group in groups]
    assert sorted(map(sorted, kinds)) == sorted(map(sorted, [
        {"mlp.fc.weight"}, {"mlp.proj.weight"}, {"attn.c_q.weight", "attn.proj.weight"}, {"attn.c_k.weight", "attn.c_v.weight"},
        {"bigram.proj.weight"}, {"value_embed.proj.weight"}]))
    sizes = [sum(p.numel() for p in group) for group in groups]
    assert sizes == sorted(sizes, reverse=True)


def test_a_row_without_a_gradient_is_not_stepped_by_row_normalization(cfg):
    p = torch.nn.Parameter(torch.ones(4, 6))
    p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    p.grad[2] = 0.0
    muon = t.Muon([dict(params=[p], lr=0.1, weight_decay=0.0)], t.Ranks(), dataclasses.replace(cfg, muon_row_normalize=True), torch.float32)
    with torch.no_grad():
        muon.apply_updates(muon.start_all_gather([share for _, share in muon.start_reduce_scatter()], torch.ones(()), torch.tensor(0.9)), torch.ones(()))
    assert p.isfinite().all() and torch.equal(p[2], torch.ones(6)) and (p[[0, 1, 3]] != 1).all()


def peaks_of(trainer):
    """Peak rate, decay and optimizer of each parameter by name, as the optimizers hold them."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    optimizers = dict(muon=trainer.optimizers.muon, adam=trainer.optimizers.adam)
    return {names[id(p)]: (kind, g["base_lr"], g["weight_decay"]) for kind, o in optimizers.items() for g in o.param_groups for p in g["params"]}


def published_peak(variant, name):
    """components.md 5.2 and 5.4 by the name of a parameter, but for what this file treats alike in all variants.

    The published pr150 and pr1127 step the bigram table at 0.025, not 0.035; the published pr490 steps the gates' slopes by Muon.
    """
    block = int(name.split(".")[1]) if name.startswith("blocks.") else None
    matrix = name.endswith(("c_q.weight", "c_k.weight", "c_v.weight", "attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight")) or (
        name in ("bigram.proj.weight", "value_embed.proj.weight"))
    if variant == "pr1812":
        table = ("adam", 0.03, 0.085)
        return ("muon", 0.022, 0.115 if ".mlp." in name else 0.095) if matrix else table if name == "tok_emb.weight" else ("adam", 0.02, 0.005)
    factor = 2.0 if variant == "pr1127" and block is not None and block >= 5 else 1.0
    if matrix:
        return "muon", 0.025 * factor, 0.04
    if name in ("tok_emb.weight", "bigram.embed.weight", "value_embed.embed.weight"):
        return "adam", 0.035, 0.0 if variant == "pr150" else 0.04
    return "adam", 0.025 * factor, 0.0 if variant == "pr150" else 0.04


@pytest.mark.parametrize("variant", PUBLISHED)
def test_each_parameter_has_the_optimizer_the_rate_and_the_decay_of_its_name(dataset, variant):
    peaks = peaks_of(trainer_of(small(variant, dataset)))
    assert peaks == {name: published_peak(variant, name) for name in peaks}
    assert set(peaks) == {name for name, _ in t.GPT(small(variant, dataset)).named_parameters()}


@pytest.mark.parametrize("variant", ["pr1127", "pr1812"])
def test_a_step_without_gradients_shrinks_each_weight_by_its_own_decay(dataset, variant):
    trainer = trainer_of(small(variant, dataset))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimizers.step(0.5, 0.9)
    for name, p in trainer.model.named_parameters():
        _, rate, decay = published_peak(variant, name)
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * rate * decay), rtol=1e-6, atol=0)


def weights_after_steps(cfg):
    trainer = trainer_of(cfg)
    for _ in range(3):
        trainer.step(0.7, 0.9)
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("neutral, live", [
    (dict(muon_wd_mlp=0.04), dict(muon_wd_mlp=0.0)), (dict(decoder_lr_mult=1.0), dict(decoder_lr_mult=2.0)),
    (dict(muon_row_normalize=False), dict(muon_row_normalize=True))])
def test_neutral_values_of_the_optimizer_train_the_same_weights_bit_by_bit(cfg, neutral, live):
    base = weights_after_steps(cfg)
    assert cfg.muon_wd == 0.04 and cfg.muon_wd_mlp == -1
    assert torch.equal(weights_after_steps(dataclasses.replace(cfg, **neutral)), base)
    assert not torch.equal(weights_after_steps(dataclasses.replace(cfg, **live)), base)


def test_one_rank_reduces_and_gathers_by_doing_nothing():
    stack = torch.randn(5, 3)
    for wait, out in (t.Ranks().reduce_scatter(stack), t.Ranks().all_gather(stack)):
        wait()
        assert out is stack


class Mailbox:
    """A stand-in for torch.distributed, for ranks that run one after the other: calls record what is sent, `wait` delivers it."""

    def __init__(self, world):
        self.world, self.sent = world, {}

    def reduce_scatter_tensor(self, out, stack, async_op):
        assert async_op and len(stack) == len(out) * self.world
        parts = stack.chunk(self.world)
        self.sent.setdefault(self.rank, parts)
        return SimpleNamespace(wait=lambda rank=self.rank: out.copy_(sum(self.sent[r][rank] for r in range(self.world))))

    def all_gather_into_tensor(self, whole, mine, async_op):
        assert async_op and mine.is_contiguous() and len(whole) == len(mine) * self.world
        self.sent.setdefault(self.rank, mine)
        return SimpleNamespace(wait=lambda: [part.copy_(self.sent[r]) for r, part in enumerate(whole.chunk(self.world))])


@pytest.mark.parametrize("world, items", [(2, 6), (4, 8), (4, 4), (3, 3)])
def test_several_ranks_add_up_a_stack_and_put_it_together_again(monkeypatch, world, items):
    stacks, ranks = torch.randint(-8, 9, (world, items, 4, 3)).bfloat16(), [t.Ranks(r, world) for r in range(world)]
    monkeypatch.setattr(t, "dist", box := Mailbox(world))

    def of_all(call):
        pending, box.sent = [], {}
        for box.rank in range(world):
            pending.append(call(box.rank))
        return [(wait(), out)[1] for wait, out in pending]

    shares = of_all(lambda r: ranks[r].reduce_scatter(stacks[r]))
    assert {(share.shape, share.dtype) for share in shares} == {((items // world, 4, 3), torch.bfloat16)}
    for whole in of_all(lambda r: ranks[r].all_gather(shares[r].mT)):
        assert torch.equal(whole.mT, stacks.sum(0))
