"""The model of every variant against a float64 reference that shares no code, its compiled graphs and its causality."""

import dataclasses

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import make_model
from helpers.twins import LOOPED, LOOPS, ids_of, losses, small, trainer_of
from test_variants import PUBLISHED

import train_gpt as t


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1.1920929e-07)


def reference_attention(p, cfg, i, x, extra, first):
    """(update, raw values) of one row's attention: x (T, D); head by head, position by position."""
    w = {name.removeprefix(f"blocks.{i}.attn."): value for name, value in p.items() if name.startswith(f"blocks.{i}.attn.")}
    width, shared = cfg.model_dim // cfg.num_heads, cfg.num_heads // cfg.num_kv_heads
    turning = cfg.rope_dims or width
    half = turning // 2
    angles = np.outer(np.arange(len(x)), [cfg.rope_base ** (-2 * j / turning) for j in range(half)])

    def turned(h):
        a, b = h[:, :half], h[:, half:turning]
        return np.hstack([a * np.cos(angles) + b * np.sin(angles), b * np.cos(angles) - a * np.sin(angles), h[:, turning:]])

    q, k, raw = x @ w["c_q.weight"].T, x @ w["c_k.weight"].T, x @ w["c_v.weight"].T
    v = raw + extra
    if cfg.value_residual and i:
        v = w["value_mix"][0] * first + w["value_mix"][1] * v
    heads = []
    for h in range(cfg.num_heads):
        own, kv = slice(h * width, (h + 1) * width), slice(h // shared * width, (h // shared + 1) * width)
        gain = np.full(width, w["q_gain"][h, 0])
        if cfg.qk_gains == 2:
            gain[turning:] = w["q_gain"][h, 1]
        qh, kh, vh = turned(rms(q[:, own])) * gain, turned(rms(k[:, kv])), v[:, kv]
        out = np.zeros_like(vh)
        for at in range(len(x)):
            share = np.exp(kh[: at + 1] @ qh[at] / np.sqrt(width))
            out[at] = share @ vh[: at + 1] / share.sum()
            if i >= cfg.num_layers - cfg.xsa_last_n:
                out[at] -= (out[at] @ vh[at]) / (vh[at] @ vh[at]) * vh[at]
        if cfg.gated_attention:
            out = out * sigmoid(x @ w["gate.slope"][h] + w["gate.bias"][h])[:, None]
        elif cfg.attn_gate_dims:
            out = out * 2 * sigmoid(x[:, : cfg.attn_gate_dims] @ w["gate.slope"][h])[:, None]
        heads.append(out)
    return np.hstack(heads) @ w["proj.weight"].T, raw


def reference_bucket(cfg, token, before):
    """`before` is None at the start of a row or a document."""
    if cfg.bigram_hash == "linear":
        return (1009 * (before or 0) + token) % cfg.bigram_vocab_size
    if cfg.bigram_hash == "reserved" and before is None:
        return cfg.bigram_vocab_size - 1
    return (36313 * token ^ 27191 * (before or 0)) % (cfg.bigram_vocab_size - 1)


def reference_losses(model, cfg, ids, targets, order):
    """components.md section 4 in float64 for a model whose blocks run in `order`."""
    p = {name: w.detach().double().numpy() for name, w in model.named_parameters()}
    rows = []
    for row, wanted in zip(ids.tolist(), targets.tolist()):
        begins = [at == 0 or token == t.BOS for at, token in enumerate(row)]
        x = p["tok_emb.weight"][row] * (p["embed_scale"] if cfg.embed_scale else 1)
        if cfg.bigram_vocab_size:
            buckets = [reference_bucket(cfg, token, None if begins[at] else row[at - 1]) for at, token in enumerate(row)]
            x = x + (p["bigram.scale"] if cfg.bigram_scale_init else 1) * (p["bigram.embed.weight"][buckets] @ p["bigram.proj.weight"].T)
        x = rms(x)
        if cfg.smear_gate:
            g = sigmoid(p["smear.gate"])
            x = np.stack([x[at] if begins[at] else (1 - g) * x[at] + g * x[at - 1] for at in range(len(row))])
        shared = p["value_embed.scale"] * (p["value_embed.embed.weight"][row] @ p["value_embed.proj.weight"].T) if cfg.ve_layers else 0
        x0, outputs, first, half = x, [], None, len(order) // 2
        for at, i in enumerate(order):
            source = 2 * half - 1 - at  # of the skip: the last pass of the first half, then the one before, ...
            if half <= at and source >= 0:
                skip, row_of_skip = p["skip_weights"][at - half] * outputs[source], at - half
                gate = sigmoid(p["skip_gates"][row_of_skip]) if cfg.skip_gates else None
                x = x + skip if gate is None else gate * x + (1 - gate) * skip
            x = p[f"blocks.{i}.resid_mix"][0] * x + p[f"blocks.{i}.resid_mix"][1] * x0
            scale = (i + 1.0) ** -cfg.ln_scale_power
            if cfg.num_loops and cfg.loop_start <= i <= cfg.loop_end:
                scale /= np.sqrt(cfg.num_loops + 1)
            extra = p[f"value_embed.layer_scales.{i}"] * shared if i in cfg.ve_layers else 0
            update, raw = reference_attention(p, cfg, i, rms(x) * scale, extra, first)
            first = raw if at == 0 else first
            before, x = x, x + p[f"blocks.{i}.attn_scale"] * update
            seen = before if 0 <= cfg.parallel_residual_start <= i else x
            u = rms(seen) * scale @ p[f"blocks.{i}.mlp.fc.weight"].T
            u = (u * sigmoid(u) if cfg.activation == "silu" else np.where(u > 0, u, cfg.mlp_negative_slope * u)) ** 2
            u = u * p[f"blocks.{i}.mlp.scale"] + p[f"blocks.{i}.mlp.bias"] if cfg.mlp_affine else u
            x = x + p[f"blocks.{i}.mlp_scale"] * (u @ p[f"blocks.{i}.mlp.proj.weight"].T)
            outputs.append(x)
        logits = cfg.logit_softcap * np.tanh(rms(x) @ p["tok_emb.weight"].T / cfg.logit_softcap)
        rows.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(row)), wanted])
    return np.array(rows)


PR150 = dict(rope_dims=0, rope_base=50_000.0, xsa_last_n=0, ln_scale_power=0.0, ve_layers=(), mlp_negative_slope=0.0, bigram_hash="xor")
PR490 = dict(value_residual=True, gated_attention=True, bigram_hash="reserved", ve_layers=())
PR1127 = dict(mlp_negative_slope=0.0, mlp_affine=True, skip_gates=True, bigram_hash="linear", bigram_scale_init=0.0, ve_layers=())
PR1812 = dict(activation="silu", mlp_mult=4.0, qk_gains=2, rope_dims=2, attn_gate_dims=12, skip_gates=True, embed_scale=True, smear_gate=False,
              bigram_vocab_size=0, ve_layers=())


@pytest.mark.parametrize("options, order", [
    (PR150, [0, 1, 2, 3]), (PR490, [0, 1, 2, 3]), (PR1127, [0, 1, 2, 3]),
    (PR490 | dict(ve_layers=(0, 2)), [0, 1, 2, 3]),  # later layers mix in layer 0's values without its value embedding
    (PR490 | dict(ve_layers=(0, 2), gated_attention=False, attn_gate_dims=3), [0, 1, 2, 3]),
    (PR1812 | LOOPS | dict(xsa_last_n=4, parallel_residual_start=2), LOOPED),
    (PR1812 | LOOPS | dict(num_layers=5, xsa_last_n=5, parallel_residual_start=3), [0, 1, 2, 1, 2, 1, 2, 3, 4]),
    (PR1812 | LOOPS | dict(num_layers=5, xsa_last_n=5, parallel_residual_start=3), [0, 1, 2, 3, 4]),
    (PR490 | PR1127 | dict(num_loops=1, loop_start=0, loop_end=1), [0, 1, 0, 1, 2, 3]),  # only the first pass provides the first values
], ids=["pr150", "pr490", "pr1127", "raw_first_values", "gate_of_a_few_channels", "pr1812_even", "pr1812_odd", "pr1812_before_its_loops", "mixture"])
def test_the_loss_is_that_of_a_float64_reference(cfg, options, order):
    cfg = dataclasses.replace(cfg, **options)
    model, ids, targets = make_model(cfg), ids_of(cfg), ids_of(cfg, seed=1)
    expected = reference_losses(model, cfg, ids, targets, order)
    actual = model(ids, targets, looped=len(order) > cfg.num_layers).detach().numpy()
    assert np.abs(actual - expected).max() < 2e-4


@pytest.mark.parametrize("variant", PUBLISHED)
def test_bf16_activations_stay_close_to_fp32(dataset, variant):
    cfg = small(variant, dataset)
    model, half, looped = t.GPT(cfg), t.GPT(cfg, dtype=torch.bfloat16), cfg.num_loops > 0
    model.init_weights(cfg)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=draw))
    half.load_state_dict(model.state_dict())
    exact, rounded = losses(cfg, model, looped=looped).mean(), losses(cfg, half, looped=looped).mean()
    assert (exact - rounded).abs() < 0.05
    rounded.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())
    assert half.hidden(ids_of(cfg), looped).dtype == torch.bfloat16


def test_a_run_compiles_nothing_after_its_warm_up(cfg, log, monkeypatch):
    """Late QAT, loops and the hooks of GPTQ start on the clock, after the warm-up has compiled every graph. Backend `eager`."""
    torch._dynamo.reset()
    counter, after_warm_up = torch._dynamo.testing.CompileCounter(), []
    monkeypatch.setattr(t.Ranks, "compile", lambda _, fn, cfg: torch.compile(fn, dynamic=False, fullgraph=True, backend=counter))
    trainer = trainer_of(dataclasses.replace(cfg, **PR1812 | LOOPS, quantizer="gptq", gptq_calibration_batches=2, iterations=6, warmdown_iters=3,
                                             late_qat_threshold=0.5, enable_looping_at=0.4))
    warm_up = trainer.warm_up
    monkeypatch.setattr(trainer, "warm_up", lambda log: (warm_up(log), after_warm_up.append(counter.frame_count))[0])
    t.train(trainer, None, log)
    assert trainer.looped and trainer.qat and after_warm_up == [counter.frame_count] and counter.frame_count >= 2


@pytest.mark.parametrize("options", [PR150, PR490, PR1127, PR1812 | LOOPS], ids=["pr150", "pr490", "pr1127", "pr1812"])
def test_there_is_one_graph_before_the_loops_and_one_with_them(cfg, options):
    """The graphs have no breaks and are compiled once, although `looped` changes back and forth. Backend `eager`."""
    torch._dynamo.reset()  # the models of other tests share the limit of recompilations
    cfg = dataclasses.replace(cfg, **options)
    model, counter = make_model(cfg), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=counter)
    settings = [False, True, False, True] if cfg.num_loops else [False, False]
    for looped in settings:
        torch.testing.assert_close(losses(cfg, compiled, looped=looped), losses(cfg, model, looped=looped))
    assert counter.frame_count == len(set(settings))
    torch._dynamo.reset()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_last_positions_alone_have_their_losses_and_gradients(dataset, variant, masked):
    cfg = small(variant, dataset, document_attention=masked)
    model, ids, targets, looped = make_model(cfg).double(), ids_of(cfg), ids_of(cfg, seed=1), cfg.num_loops > 0

    def found(positions, count):
        model.zero_grad()
        losses = model(ids, targets[:, -count:], looped)[:, -positions:]
        losses.sum().backward()
        return losses.detach(), [p.grad.clone() for p in model.parameters()]

    for last in (1, 5, 20):
        torch.testing.assert_close(found(last, last), found(last, ids.size(1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_a_changed_token_changes_no_earlier_loss(dataset, variant):
    cfg = small(variant, dataset)
    model, ids, looped = make_model(cfg), ids_of(cfg, rows=1), cfg.num_loops > 0
    base = model.logits(model.hidden(ids, looped))
    for position in (1, 9, 23):
        changed = ids.clone()
        changed[0, position] = 2 + (ids[0, position] + 5) % (cfg.vocab_size - 2)
        logits = model.logits(model.hidden(changed, looped))
        assert torch.equal(logits[0, :position], base[0, :position]) and not torch.equal(logits[0, position], base[0, position])
