"""What each option of the published systems does to the model, the optimizer, the schedules and the data (components.md 2.5, 4, 5)."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import make_model
from test_data import write_shard
from test_variants import PUBLISHED, scaled

import train_gpt as t

LOOPS = dict(num_loops=2, loop_start=1, loop_end=2)
LOOPED = [0, 1, 2, 1, 2, 1, 2, 3]  # the smoke variant's 4 blocks under LOOPS


def ids_of(cfg, seed=0, rows=2, length=24):
    ids = torch.randint(2, cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = ids[0, 9] = t.BOS
    return ids


def losses(cfg, model, **options):
    return model(ids_of(cfg), ids_of(cfg, seed=1), **options)


def twin(cfg, values=None, **changes):
    """A model under changed settings that has, by name, the weights of `make_model(cfg)`; `values` fills others by the end of their name."""
    changed = dataclasses.replace(cfg, **changes)
    model, source = make_model(changed, seed=1), make_model(cfg).state_dict()
    fits = {name: source[name] for name, p in model.named_parameters() if name in source and source[name].shape == p.shape}
    model.load_state_dict(fits, strict=False)
    with torch.no_grad():
        for end, value in (values or {}).items():
            chosen = [p for name, p in model.named_parameters() if name.endswith(end)]
            assert chosen, end
            for p in chosen:
                p.copy_(torch.as_tensor(value))
    return model


def small(variant, dataset, **changes):
    return dataclasses.replace(t.Config.from_env(dataset | scaled(variant)), **changes)


def trainer_of(cfg):
    model = t.GPT(cfg)
    model.init_weights(cfg)
    return t.Trainer(model, t.Batches(t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size), cfg, t.Ranks()), cfg, t.Ranks())


# ---------------------------------------- neutral values

@pytest.mark.parametrize("options, neutral", [
    (dict(mlp_affine=True), {"mlp.scale": 1.0, "mlp.bias": 0.0}),
    (dict(value_residual=True), {"value_mix": [0.0, 1.0]}),
    (dict(gated_attention=True), {"gates.0.slope": 0.0, "gates.0.bias": 1e9}),
    (dict(attn_gate_dims=5), {"gates.0.slope": 0.0}),
    (dict(gated_attention=True, attn_gate_dims=5), {"slope": 0.0, "gates.0.bias": 1e9}),
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
        mlp = twin(cfg, **change).blocks[1].mlp
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
    block = make_model(dataclasses.replace(cfg, parallel_residual_start=1)).blocks[2]
    x, x0, rotary = torch.randn(1, 5, cfg.model_dim), torch.randn(1, 5, cfg.model_dim), t.rotary_tables(5, cfg.rope_dims, 1e4)
    whole = block(x, x0, rotary, None, None)[0]
    attn_scale = block.attn_scale.detach().clone()
    with torch.no_grad():
        block.attn_scale.zero_()
        no_attention = block(x, x0, rotary, None, None)[0]
        block.mlp_scale.zero_()
        nothing = block(x, x0, rotary, None, None)[0]
        block.attn_scale.copy_(attn_scale)
        no_mlp = block(x, x0, rotary, None, None)[0]
    torch.testing.assert_close(whole - nothing, (no_mlp - nothing) + (no_attention - nothing), rtol=1e-5, atol=1e-5)


def test_without_loops_looped_changes_nothing(cfg):
    model = make_model(cfg)
    assert torch.equal(losses(cfg, model, looped=True), losses(cfg, model))


def test_loops_that_are_not_on_yet_only_scale_the_inputs_of_the_blocks_that_will_loop(cfg):
    base, model = make_model(cfg), twin(cfg, **LOOPS)
    with torch.no_grad():
        model.skip_weights[:2] = base.skip_weights
    for layer, (a, b) in enumerate(zip(base.blocks, model.blocks)):
        assert b.input_scale == pytest.approx(a.input_scale / math.sqrt(3 if layer in (1, 2) else 1))
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


# ---------------------------------------- the whole model against float64

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
        gates = []
        if cfg.gated_attention:
            gates.append(sigmoid(x @ w["gates.0.slope"][h] + w["gates.0.bias"][h]))
        if cfg.attn_gate_dims:
            gates.append(2 * sigmoid(x[:, : cfg.attn_gate_dims] @ w[f"gates.{len(gates)}.slope"][h]))
        for gate in gates:
            out = out * gate[:, None]
        heads.append(out)
    return np.hstack(heads) @ w["proj.weight"].T, raw


def reference_bucket(cfg, token, before):
    """`before` is None where a row or a document begins."""
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
    (PR490 | dict(ve_layers=(0, 2), attn_gate_dims=3), [0, 1, 2, 3]),  # layer 0's raw values go on, without its value embedding
    (PR1812 | LOOPS | dict(xsa_last_n=4, parallel_residual_start=2), LOOPED),
    (PR1812 | LOOPS | dict(num_layers=5, xsa_last_n=5, parallel_residual_start=3), [0, 1, 2, 1, 2, 1, 2, 3, 4]),
    (PR1812 | LOOPS | dict(num_layers=5, xsa_last_n=5, parallel_residual_start=3), [0, 1, 2, 3, 4]),
    (PR490 | PR1127 | dict(num_loops=1, loop_start=0, loop_end=1), [0, 1, 0, 1, 2, 3]),  # the first pass alone gives the first values
], ids=["pr150", "pr490", "pr1127", "raw_first_values", "pr1812_even", "pr1812_odd", "pr1812_before_its_loops", "mixture"])
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
    """Late QAT, the loops and the hooks of GPTQ come on in the middle of the budget; every graph is there by then. Backend eager."""
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
    """What CUDA compiles has no graph break and is not compiled again when a run goes back and forth. Backend eager."""
    torch._dynamo.reset()  # the models of other tests share the limit of recompilations
    cfg = dataclasses.replace(cfg, **options)
    model, counter = make_model(cfg), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=counter)
    settings = [False, True, False, True] if cfg.num_loops else [False, False]
    for looped in settings:
        torch.testing.assert_close(losses(cfg, compiled, looped=looped), losses(cfg, model, looped=looped))
    assert counter.frame_count == len(set(settings))
    torch._dynamo.reset()


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


# ---------------------------------------- the published constants

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
    assert [b.input_scale for b in model.blocks] == pytest.approx(published, abs=5e-5)
    assert [b.parallel for b in model.blocks] == [i >= 7 for i in range(11)]
    assert model.skip_weights.shape == model.skip_gates.shape == (8, 512)


class Marker(torch.nn.Module):
    """A block that ignores its input, notes it, and leaves a one in the channel that is the number of its pass."""

    def __init__(self, layer, seen):
        super().__init__()
        self.layer, self.seen = layer, seen

    def forward(self, x, x0, rotary, value_embedding, first_value):
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
    assert inside[2:].tolist() == expected  # what stands before a BOS is another document
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
    starts = {"q_gain": 5.25 if variant == "pr1812" else 1.5, "bigram.scale": 0.05, "value_embed.scale": 0.1, "gates.0.bias": 4.0, "value_mix": 0.5,
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
    for gate in (g for b in model.blocks for g in b.attn.gates):
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


# ---------------------------------------- optimizer

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
            muon.step(muon.turn([share for _, share in muon.reduce()], torch.ones(()), torch.tensor(0.9)))
    for i, p in enumerate(params):
        grads = [g[i].double().numpy() for g in history]
        expected = muon_by_hand(start[i], grads, cfg, 0.05, 0.9, 0.1)
        np.testing.assert_allclose(p.detach().numpy(), expected, atol=1e-4)
        other = muon_by_hand(start[i], grads, dataclasses.replace(cfg, muon_row_normalize=not normalize), 0.05, 0.9, 0.1)
        assert np.abs(other - expected).max() > 1e-2


def test_a_row_without_a_gradient_is_not_stepped_by_row_normalization(cfg):
    p = torch.nn.Parameter(torch.ones(4, 6))
    p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    p.grad[2] = 0.0
    muon = t.Muon([dict(params=[p], lr=0.1, weight_decay=0.0)], t.Ranks(), dataclasses.replace(cfg, muon_row_normalize=True), torch.float32)
    with torch.no_grad():
        muon.step(muon.turn([share for _, share in muon.reduce()], torch.ones(()), torch.tensor(0.9)))
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
    for wait, out in (t.Ranks().scatter(stack, torch.bfloat16), t.Ranks().gather(stack)):
        wait()
        assert out is stack


class Mailbox:
    """torch.distributed for ranks that come one after the other: the first round of calls only collects."""

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


@pytest.mark.parametrize("world, items", [(2, 6), (2, 5), (4, 5), (4, 1), (3, 3)])
def test_several_ranks_add_up_a_stack_and_put_it_together_again(monkeypatch, world, items):
    stacks, ranks = torch.randint(-8, 9, (world, items, 4, 3)).float(), [t.Ranks(r, world) for r in range(world)]
    monkeypatch.setattr(t, "dist", box := Mailbox(world))

    def of_all(call):
        begun, box.sent = [], {}
        for box.rank in range(world):
            begun.append(call(box.rank))
        return [(wait(), out)[1] for wait, out in begun]

    shares = of_all(lambda r: ranks[r].scatter(stacks[r], torch.bfloat16))
    assert {(share.shape, share.dtype) for share in shares} == {((-(-items // world), 4, 3), torch.bfloat16)}
    for whole in of_all(lambda r: ranks[r].gather(shares[r].mT)):
        assert torch.equal(whole[:items].mT.float(), stacks.sum(0)) and not whole[items:].any()


# ---------------------------------------- schedules

PR1812_ROW = dataclasses.replace(t.Config.from_env({"VARIANT": "pr1812"}), gptq_reserve_seconds=0.0)  # so that a second is a 600th of the steps


def pr1812_momentum(elapsed, scale):
    """components.md 5.6 (b)."""
    phi, beta = min(elapsed / (0.22 * 600), 1), max(scale, 0.25)
    return beta * (0.92 + phi * 0.07) + (1 - beta) * 0.92


def test_the_momentum_of_pr1812_is_the_published_one():
    for elapsed in (0.0, 33.0, 66.0, 131.9, 132.0, 168.0, 300.0, 599.0):
        for scale in (1.0, 0.9, 0.5, 0.26, 0.25, 0.1, 0.0):
            assert t.muon_momentum(0, elapsed, scale, PR1812_ROW) == pytest.approx(pr1812_momentum(elapsed, scale), abs=1e-12)
    assert [t.muon_momentum(0, e, s, PR1812_ROW) for e, s in ((0, 1), (66, 1), (132, 1), (590, 0))] == pytest.approx([0.92, 0.955, 0.99, 0.9375])
    assert t.muon_momentum(5500, 0.0, 1.0, PR1812_ROW) == pytest.approx(0.955)  # by steps where they are further than the clock


def test_the_momentum_of_pr1812_rises_stays_and_falls_with_the_rate():
    curve = [(e, t.lr_scale(0, e, 0.1, PR1812_ROW)) for e in range(601)]
    momentum = [t.muon_momentum(0, e, scale, PR1812_ROW) for e, scale in curve]
    assert all(a < b for a, b in zip(momentum[:132], momentum[1:133]))
    assert momentum[132:169] == pytest.approx([0.99] * 37)
    assert all(a > b for a, b in zip(momentum[168:492], momentum[169:493]))  # until the rate is below a quarter, at 492 s
    assert momentum[492:] == pytest.approx([0.9375] * 109)


def test_the_rate_of_pr1812_falls_from_28_percent_of_the_clock_on():
    for elapsed in range(0, 601, 10):
        expected = 1.0 if elapsed / 600 < 0.28 else (1 - elapsed / 600) / 0.72
        assert t.lr_scale(0, elapsed, 0.1, PR1812_ROW) == pytest.approx(expected)


def test_neutral_schedule_values_are_the_plain_warm_up_whatever_the_clock_and_the_rate():
    cfg = t.Config(muon_momentum_warmup_frac=0.0, muon_momentum_cooldown=1.0)
    for step in (0, 1, 750, 1499, 1500, 9000):
        share = min(1.0, step / 1500)
        for elapsed, scale in ((0, 1.0), (300, 0.5), (599, 0.0)):
            assert t.muon_momentum(step, elapsed, scale, cfg) == (1 - share) * 0.92 + share * 0.99
    cooling = dataclasses.replace(cfg, muon_momentum_cooldown=0.5)
    assert [t.muon_momentum(9000, 0, s, cooling) for s in (1.0, 0.75, 0.5, 0.0)] == pytest.approx([0.99, 0.9725, 0.955, 0.955])


@pytest.mark.parametrize("variant", PUBLISHED)
def test_late_qat_and_the_loops_switch_on_once_at_their_time_and_stay(variant):
    cfg, said = t.Config.from_env({"VARIANT": variant}), []
    trainer = SimpleNamespace(cfg=cfg, qat=False, looped=False, model=SimpleNamespace(looped_order=[]))
    shares = [(i + 0.5) / 1000 for i in range(1000)]
    seen = []
    for step, share in enumerate(shares):
        t.Trainer.switch(trainer, step, share, 1 - share, said.append)
        seen.append((trainer.qat, trainer.looped))
    qat_from = dict(pr150=0.0, pr455=0.9, pr490=0.85, pr1127=0.85, pr1812=2.0)[variant]
    loops_from = 0.35 if variant == "pr1812" else 2.0
    assert seen == [(share >= qat_from, share >= loops_from) for share in shares]
    assert len(said) == (qat_from < 2) + (loops_from < 2)


# ---------------------------------------- data

SIZES = (100, 37, 20, 15, 66)  # tokens a shard; the fourth holds no row wherever it is cut


@pytest.fixture
def shuffled(tmp_path):
    """(settings, stream) of shards whose tokens are their positions in the stream."""
    edges = np.cumsum((0, *SIZES))
    paths = [tmp_path / f"fineweb_train_{i:06d}.bin" for i in range(len(SIZES))]
    for path, low, high in zip(paths, edges, edges[1:]):
        write_shard(path, np.arange(low, high))
    cfg = t.Config(loader="shuffled", train_seq_len=8, train_batch_tokens=32, micro_batch_tokens=16, eval_stride=8, seed=3, ttt_epochs=0)
    return cfg, t.TokenStream(paths, 65536)


def rows_of(cfg, stream, steps, ranks=None):
    """The rows (steps * rows, seq_len + 1) that a rank reads in so many steps."""
    batches = t.Batches(stream, cfg, ranks or t.Ranks())
    parts = [next(batches) for _ in range(steps)]
    return torch.cat([torch.cat((x, y[..., -1:]), -1).flatten(0, 1) for x, y in parts]).numpy()


EPOCH = 11 + 3 + 1 + 7  # rows: a shard of N tokens has (N - 1) // 8 - 1, so that any cut leaves room for them


def test_every_row_of_an_epoch_is_used_once_and_lies_inside_one_shard(shuffled):
    cfg, stream = shuffled
    edges = np.cumsum((0, *SIZES))
    rows = rows_of(cfg, stream, 3 * EPOCH)  # 4 rows a step: 12 epochs
    assert (np.diff(rows, axis=1) == 1).all()
    for epoch in range(12):
        starts = rows[epoch * EPOCH : (epoch + 1) * EPOCH, 0]
        assert len(set(starts)) == EPOCH and starts.tolist() != sorted(starts)
        for low, high in zip(edges, edges[1:]):
            inside = np.sort(starts[(starts >= low) & (starts < high)])
            assert len(inside) == max((high - low - 1) // 8 - 1, 0) and (np.diff(inside) == 8).all()
            assert not len(inside) or (inside[0] - low < 8 and inside[-1] + 8 < high)


def test_each_epoch_and_each_seed_has_an_order_and_cuts_of_its_own(shuffled):
    cfg, stream = shuffled
    rows = rows_of(cfg, stream, 2 * EPOCH)
    epochs = rows[:, 0].reshape(8, EPOCH)
    assert len({tuple(e) for e in epochs}) == 8 and len({tuple(sorted(e)) for e in epochs}) > 4
    assert np.array_equal(rows_of(cfg, stream, 2 * EPOCH), rows)
    other = rows_of(dataclasses.replace(cfg, seed=4), stream, 2 * EPOCH)[:, 0].reshape(8, EPOCH)
    assert len({tuple(e) for e in (*epochs, *other)}) == 16
    plain = dataclasses.replace(cfg, loader="stream")
    assert np.array_equal(rows_of(plain, stream, 3), rows_of(dataclasses.replace(plain, seed=4), stream, 3))
    assert rows_of(plain, stream, 3)[:, 0].tolist() == list(range(0, 96, 8))


def test_shards_are_mixed_in_proportion_to_their_rows(shuffled):
    cfg, stream = shuffled
    starts = rows_of(cfg, stream, 50 * EPOCH)[:, 0].reshape(200, EPOCH)
    assert (starts[:, :4] < 100).mean() == pytest.approx(11 / EPOCH, abs=0.06)
    assert len(set((starts[:, 0] % 8).tolist())) == 8


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_read_the_same_shuffled_global_batch(shuffled, world):
    cfg, stream = shuffled
    expected = rows_of(cfg, stream, 12).reshape(12, 4, 9)  # across two ends of an epoch
    shares = [rows_of(cfg, stream, 12, t.Ranks(rank, world)).reshape(12, 4 // world, 9) for rank in range(world)]
    assert np.array_equal(np.concatenate(shares, axis=1), expected)


def test_going_back_gives_the_same_shuffled_batches_again(shuffled):
    cfg, stream = shuffled
    batches = t.Batches(stream, cfg, t.Ranks())
    first = [next(batches) for _ in range(14)]
    for step in (0, 13, 5, 6, 3):  # 5 and 6 lie on both sides of, and across, the end of the first epoch
        batches.seek(step)
        assert batches.step == step
        assert all(torch.equal(a, b) for a, b in zip(next(batches), first[step]))
    assert batches.step == 4 and all(torch.equal(a, b) for a, b in zip(next(batches), first[4]))


def test_shards_too_small_to_shuffle_are_an_error(shuffled, tmp_path):
    cfg, _ = shuffled
    for size, fits in ((16, False), (17, True)):
        path = tmp_path / f"of_{size}.bin"
        write_shard(path, np.arange(size))
        stream = t.TokenStream([path, path], 65536)
        if fits:
            assert (np.diff(rows_of(cfg, stream, 5), axis=1) == 1).all()
        else:
            with pytest.raises(t.InputError, match="LOADER=shuffled needs a shard of 17 tokens"):
                t.Batches(stream, cfg, t.Ranks())
        assert rows_of(dataclasses.replace(cfg, loader="stream"), stream, 1).shape == (4, 9)
