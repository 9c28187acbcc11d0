"""Every option of the model at its neutral value changes no bit."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from helpers.twins import LOOPS, ids_of, losses, twin

import train_gpt as t


@pytest.mark.parametrize("options, neutral", [
    (dict(mlp_affine=True), {"mlp.scale": 1.0, "mlp.bias": 0.0}),
    (dict(value_residual=True), {"value_mix": [0.0, 1.0]}),
    (dict(gated_attention=True), {"gate.slope": 0.0, "gate.bias": 1e9}),
    (dict(attn_gate_dims=5), {"gate.slope": 0.0}),
    (dict(embed_scale=True), {"embed_scale": 1.0}),
])
@pytest.mark.parametrize("base", [{}, dict(bigram_hash="linear", bigram_scale_init=0.0, num_loops=1, loop_start=0, loop_end=1)])
def test_a_new_part_at_its_neutral_value_equals_no_such_part_and_elsewhere_it_does_not(cfg, base, options, neutral):
    cfg = dataclasses.replace(cfg, **base)
    looped = cfg.num_loops > 0
    without = losses(cfg, make_model(cfg), looped=looped)
    assert torch.equal(losses(cfg, twin(cfg, neutral, **options), looped=looped), without)
    assert not torch.equal(losses(cfg, twin(cfg, **options), looped=looped), without)


def test_a_bigram_gain_of_one_equals_no_gain(cfg):
    plain = dataclasses.replace(cfg, bigram_scale_init=0.0)
    assert not [name for name, _ in t.GPT(plain).named_parameters() if name == "bigram.scale"]
    without = losses(cfg, make_model(plain))
    assert torch.equal(losses(cfg, twin(plain, {"bigram.scale": 1.0}, bigram_scale_init=0.05)), without)
    assert not torch.equal(losses(cfg, twin(plain, {"bigram.scale": 0.5}, bigram_scale_init=0.05)), without)


def test_slope_zero_is_relu_squared_and_the_activations_differ(cfg):
    x, scale = torch.randn(64, cfg.model_dim), torch.randn(cfg.model_dim)
    out = {}
    for name, change in dict(relu=dict(mlp_negative_slope=0.0), leaky={}, silu=dict(activation="silu")).items():
        model = twin(cfg, **change)
        mlp = model.blocks[1].mlp
        pre, out[name] = mlp.fc(x), mlp(x, scale)
        expected = dict(relu=F.relu(pre), leaky=torch.where(pre > 0, pre, 0.5 * pre), silu=pre / (1 + (-pre).exp()))[name].square()
        torch.testing.assert_close(out[name], scale * mlp.proj(expected))
    assert torch.equal(out["relu"], mlp.proj(F.relu(mlp.fc(x)).square(), scale))
    assert not torch.allclose(out["relu"], out["leaky"]) and not torch.allclose(out["relu"], out["silu"])


def test_two_equal_gains_a_head_are_one_gain(cfg):
    one, two = make_model(cfg), twin(cfg, qk_gains=2)
    assert two.blocks[0].attn.q_gain.shape == (cfg.num_heads, 2)
    with torch.no_grad():
        for a, b in zip(one.blocks, two.blocks):
            b.attn.q_gain.copy_(a.attn.q_gain.expand(-1, 2))
    assert torch.equal(losses(cfg, two), losses(cfg, one))
    for column in (0, 1):
        with torch.no_grad():
            two.blocks[1].attn.q_gain[:, column] *= 2
        assert not torch.equal(losses(cfg, two), losses(cfg, one))
        with torch.no_grad():
            two.blocks[1].attn.q_gain[:, column] /= 2


def test_a_skip_gate_saturated_at_one_equals_no_skip_and_at_zero_nothing_else(cfg):
    without = losses(cfg, twin(cfg, {"skip_weights": 0.0}))
    assert torch.equal(losses(cfg, twin(cfg, {"skip_gates": 1e9}, skip_gates=True)), without)
    assert not torch.equal(losses(cfg, twin(cfg, {"skip_gates": 0.0}, skip_gates=True)), without)
    closed = twin(cfg, {"skip_gates": -1e9, "skip_weights": 0.0}, skip_gates=True)  # the stream into block 2 and 3 is zero but for x0
    other = twin(cfg, {"blocks.0.resid_mix": 0.0, "skip_gates": -1e9, "skip_weights": 0.0}, skip_gates=True)
    assert torch.equal(losses(cfg, closed), losses(cfg, other))


def test_the_stream_is_half_itself_and_half_the_skip_at_first(cfg):
    cfg = dataclasses.replace(cfg, skip_gates=True)
    model = t.GPT(cfg)
    model.init_weights(cfg)
    seen = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda block, args, out, i=i: seen.update({i: (args[0], out[0])}))
    model.hidden(torch.randint(2, cfg.vocab_size, (2, 9)))
    for later, earlier in ((2, 1), (3, 0)):
        torch.testing.assert_close(seen[later][0], (seen[later - 1][1] + seen[earlier][1]) / 2)


def test_parallel_blocks_begin_where_they_are_said_to(cfg):
    without = losses(cfg, make_model(cfg))
    assert torch.equal(losses(cfg, twin(cfg, parallel_residual_start=-1)), without)
    assert torch.equal(losses(cfg, twin(cfg, parallel_residual_start=cfg.num_layers)), without)
    several = [losses(cfg, twin(cfg, parallel_residual_start=start)) for start in range(cfg.num_layers)]
    assert not any(torch.equal(a, b) for i, a in enumerate(several) for b in [without, *several[:i]])


def test_the_mlp_of_a_parallel_block_does_not_see_its_attention(cfg):
    model = make_model(dataclasses.replace(cfg, parallel_residual_start=1))
    x, x0, block = torch.randn(1, 5, cfg.model_dim), torch.randn(1, 5, cfg.model_dim), model.blocks[2]
    rotary, scales = t.rotary_tables(5, cfg.rope_dims, 1e4), (block.attn_scale.detach().clone(), block.mlp_scale.detach().clone())

    def stream_after(attn_share, mlp_share):
        with torch.no_grad():
            block.attn_scale.copy_(attn_share * scales[0])
            block.mlp_scale.copy_(mlp_share * scales[1])
            return block(x, x0, rotary, None, None, None)[0]

    whole, nothing = stream_after(1, 1), stream_after(0, 0)
    torch.testing.assert_close(whole - nothing, (stream_after(1, 0) - nothing) + (stream_after(0, 1) - nothing), rtol=1e-5, atol=1e-5)


def test_without_loops_looped_changes_nothing(cfg):
    model = make_model(cfg)
    assert torch.equal(losses(cfg, model, looped=True), losses(cfg, model))


def test_loops_that_are_not_on_yet_only_scale_the_inputs_of_the_blocks_that_will_loop(cfg):
    base, model = make_model(cfg), twin(cfg, **LOOPS)
    with torch.no_grad():
        model.skip_weights[:2] = base.skip_weights
    for layer, (a, b) in enumerate(zip(base.blocks, model.blocks)):
        assert float(b.input_scale) == pytest.approx(float(a.input_scale) / math.sqrt(3 if layer in (1, 2) else 1))
    assert not torch.equal(losses(cfg, model), losses(cfg, base))
    for a, b in zip(base.blocks, model.blocks):
        b.input_scale = a.input_scale
    assert torch.equal(losses(cfg, model), losses(cfg, base))
    assert not torch.equal(losses(cfg, model, looped=True), losses(cfg, base))


def test_temperature_divides_the_logits_and_z_loss_adds_the_squared_log_partition(cfg):
    model = make_model(cfg)
    plain = losses(cfg, model)
    assert torch.equal(losses(cfg, model, temperature=1.0, z_loss=0.0), plain)
    hidden, targets = model.hidden(ids_of(cfg)).detach().double(), ids_of(cfg, seed=1).flatten()
    raw = hidden.flatten(0, 1) @ model.tok_emb.weight.detach().double().T
    for temperature, weight in ((1.0, 0.0), (0.5, 0.0), (1.0, 0.1), (2.0, 0.01)):
        logits = cfg.logit_softcap * torch.tanh(raw / cfg.logit_softcap) / temperature
        log_z = logits.exp().sum(-1).log()
        expected = log_z - logits.gather(1, targets[:, None])[:, 0] + weight * log_z**2
        actual = losses(cfg, model, temperature=temperature, z_loss=weight)
        torch.testing.assert_close(actual.flatten().double(), expected, rtol=1e-5, atol=1e-5)
