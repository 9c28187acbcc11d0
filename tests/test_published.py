"""The constants, the order of blocks and the initial weights of the published systems."""

import dataclasses
import math

import pytest
import torch
from helpers.twins import ids_of, small, trainer_of
from test_variants import PUBLISHED

import train_gpt as t


def test_the_passes_of_pr1812_run_in_the_published_order():
    cfg = t.Config.from_env({"VARIANT": "pr1812"})
    assert t.layer_order(cfg, True) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert t.layer_order(cfg, False) == list(range(11))
    assert t.layer_order(dataclasses.replace(cfg, num_loops=0), True) == list(range(11))
    assert t.layer_order(dataclasses.replace(cfg, num_loops=1, loop_start=0, loop_end=10), True) == [*range(11), *range(11)]


def test_the_inputs_of_pr1812_are_scaled_as_published_and_it_has_eight_skips():
    with torch.device("meta"):
        model = t.GPT(t.Config.from_env({"VARIANT": "pr1812"}))
    published = [1, 0.7071, 0.5774, 0.2887, 0.2582, 0.2357, 0.378, 0.3536, 0.3333, 0.3162, 0.3015]
    assert [float(b.input_scale) for b in model.blocks] == pytest.approx(published, abs=5e-5)
    assert [b.parallel for b in model.blocks] == [i >= 7 for i in range(11)]
    assert model.skip_weights.shape == model.skip_gates.shape == (8, 512)


class Marker(torch.nn.Module):
    """A block that records its input and returns a one in the channel with the number of its pass."""

    def __init__(self, layer, seen):
        super().__init__()
        self.layer, self.seen = layer, seen

    def forward(self, x, *_):
        self.seen.append((self.layer, x[0, 0].detach().clone()))
        out = torch.zeros_like(x)
        out[..., len(self.seen) - 1] = 1.0
        return out, x


@pytest.mark.parametrize("looped, first_half", [(True, 8), (False, 5)])
def test_each_pass_of_the_second_half_takes_the_latest_output_that_is_left(dataset, looped, first_half):
    cfg = small("pr1812", dataset, skip_gates=False)
    model, seen = t.GPT(cfg), []
    model.init_weights(cfg)
    model.blocks = torch.nn.ModuleList(Marker(i, seen) for i in range(11))
    with torch.no_grad():
        model.skip_weights.copy_(torch.arange(2.0, 10.0)[:, None].expand(-1, cfg.model_dim))
    model.hidden(ids_of(cfg), looped)
    assert [layer for layer, _ in seen] == ([0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10] if looped else list(range(11)))
    for at, (_, x) in enumerate(seen[1:], 1):
        expected = torch.zeros(cfg.model_dim)
        expected[at - 1] = 1.0
        if first_half <= at < 2 * first_half:
            expected[2 * first_half - 1 - at] += 2.0 + at - first_half
        assert torch.equal(x, expected), at


@pytest.mark.parametrize("scheme, buckets, expected", [
    ("xor", 2048, [1514, 1887, 144, 1150, 523]), ("reserved", 2048, [2047, 1887, 144, 1150, 523]),
    ("reserved", 4096, [4095, 3892, 33, 289, 3919]), ("reserved", 1536, [1535, 892, 218, 1044, 989]),
    ("linear", 8192, [1, 1014, 5054, 1912, 715])])
def test_bigram_buckets_are_the_published_ones_and_a_document_begins_as_a_row_does(scheme, buckets, expected):
    bigram = t.BigramHashEmbedding(t.Config(bigram_hash=scheme, bigram_vocab_size=buckets))
    assert bigram.bucket(torch.tensor([[1, 5, 9, 1023, 700]])).tolist() == [expected]
    inside = bigram.bucket(torch.tensor([[7, 700, t.BOS, 5, 9, 1023, 700]]))[0]
    assert inside[2:].tolist() == expected  # the tokens before a BOS belong to another document
    assert inside[0] == bigram.bucket(torch.tensor([[7]]))[0, 0] and 0 <= int(inside.min()) and int(inside.max()) < buckets


def test_the_variants_hash_as_published_and_rotate_on_the_published_bases():
    rows = {v: t.Config.from_env({"VARIANT": v}) for v in PUBLISHED}
    hashes = {v: (c.bigram_hash, c.bigram_vocab_size) for v, c in rows.items() if c.bigram_vocab_size}
    assert hashes == dict(pr150=("xor", 2048), pr455=("reserved", 2048), pr490=("reserved", 4096), pr1127=("linear", 8192))
    bases = {v: (round(c.rope_base, 1), c.rope_dims or c.head_dim) for v, c in rows.items()}
    assert bases == dict(pr150=(50_000.0, 64), pr455=(22_081.8, 16), pr490=(10_000.0, 16), pr1127=(10_000.0, 16), pr1812=(10_000.0, 16))
    assert rows["pr1127"].head_dim == 60


# ---------------------------------------- initial weights

ZERO = ("attn.proj.weight", "mlp.proj.weight", "smear.gate", "skip_gates", "slope", "mlp.bias")


@pytest.mark.parametrize("variant", PUBLISHED)
def test_gains_and_gates_start_as_published(dataset, variant):
    cfg = small(variant, dataset)
    model = t.GPT(cfg)
    model.init_weights(cfg)
    starts = {"q_gain": 5.25 if variant == "pr1812" else 1.5, "bigram.scale": 0.05, "value_embed.scale": 0.1, "gate.bias": 4.0, "value_mix": 0.5,
              "embed_scale": 1.0, "mlp.scale": 1.0, "attn_scale": 1.0, "mlp_scale": 1.0, "skip_weights": 1.0}
    for name, p in model.named_parameters():
        if name.endswith(ZERO):
            assert not p.any(), name
        elif name.endswith("resid_mix"):
            assert (p[0] == 1).all() and not p[1].any()
        elif t.parameter_roles(model)[name] == "scalar":
            wanted = [value for end, value in starts.items() if name.endswith(end)] or [1.0]
            assert torch.equal(p, torch.full_like(p, wanted[0])), name
    neutral = [torch.zeros(1, 1, cfg.model_dim), torch.randn(1, 1, cfg.model_dim)]
    gates = [block.attn.gate for block in model.blocks if block.attn.gate is not None]
    assert len(gates) == (11 if variant in ("pr490", "pr1812") else 0)
    for gate in gates:
        for x in neutral:
            assert gate(x).flatten().tolist() == pytest.approx([1.0 if variant == "pr1812" else 0.98201] * 2, abs=1e-5)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_matrices_start_orthogonal_or_uniform_as_published(dataset, variant):
    cfg = small(variant, dataset)
    model = t.GPT(cfg)
    model.init_weights(cfg)
    roles = t.parameter_roles(model)
    for name, p in model.named_parameters():
        if name.endswith(ZERO) or roles[name] != "matrix":
            continue
        singular, bound, p = torch.linalg.svdvals(p.detach()), p.size(1) ** -0.5, p.detach()
        if variant != "pr1127":
            scale = 1.0 if name.startswith("blocks.") else 1 / math.sqrt(22)
            torch.testing.assert_close(singular, torch.full_like(singular, scale), atol=1e-5, rtol=0)
        elif name == "bigram.proj.weight":
            assert not p.any()
        else:
            assert 0.99 * bound < p.abs().max() <= bound and float(p.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    tables = {name: float(p.detach().std()) for name, p in model.named_parameters() if roles[name] == "table"}
    hashed = {} if variant == "pr1812" else {"bigram.embed.weight": 0.01 if variant == "pr1127" else 0.0}
    shared = {"value_embed.embed.weight": 0.01} if variant == "pr455" else {}
    assert tables == pytest.approx({"tok_emb.weight": 0.005} | hashed | shared, rel=0.05)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_every_parameter_has_a_gradient_within_three_steps(dataset, variant):
    """The bigram table of the published pr150 never has one: its projection is zero too."""
    trainer, alive, rows = trainer_of(small(variant, dataset)), set(), 0
    inner, trainer.looped = trainer.optimizers.step, trainer.cfg.num_loops > 0

    def spy(scale, momentum):
        nonlocal rows
        alive.update(name for name, p in trainer.model.named_parameters() if p.grad.abs().max() > 0)
        rows = rows + trainer.model.skip_weights.grad.abs().amax(1)
        return inner(scale, momentum)

    trainer.optimizers.step = spy
    for _ in range(3):
        trainer.step(1.0, 0.9)
    assert alive == {name for name, _ in trainer.model.named_parameters()}
    assert (rows > 0).all() and len(rows) == (8 if variant == "pr1812" else 5)
