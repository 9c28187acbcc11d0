"""Scales by the cost of an error (MEAN_SCALE), the statistics of that cost, and the factor that fills the artifact limit (FIT)."""

import dataclasses
import json
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import finals, make_model, run, unpacked
from helpers.smoke import SMOKE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_gptq import batches_of, gaussian, gptq_by_hand, hessian_of, weights_of
from test_variants import STAGES, scaled, train_losses

import train_gpt as t

CFG = t.Config.from_env({**SMOKE, "QUANTIZER": "gptq", "MEAN_SCALE": "0.02", "MATRIX_BITS": "8", "TOKENIZER_PATH": __file__, "ZSTD_LEVEL": "3"})


# ---- a plan by cost

def costs_of(shapes, seed=0):
    """Weights and curvatures that differ by orders of magnitude between weights, rows and columns."""
    draw, weights, costs = torch.Generator().manual_seed(seed), {}, {}
    for i, (name, (rows, cols)) in enumerate(shapes.items()):
        weights[name] = 0.1 * torch.randn(rows, cols, generator=draw)
        costs[name] = t.Curvature(10.0**i * hessian_of(cols, seed=i + 1), torch.randn(rows, generator=draw).mul(2).exp() * 100.0**i)
    return weights, costs


SHAPES = {"blocks.0.a.weight": (12, 30), "blocks.1.b.weight": (40, 16), "table.weight": (25, 20)}
GRIDS = {name: t.QuantSpec(8, 0.0) for name in SHAPES} | {"kept": t.QuantSpec(16, 0.0)}


def column_costs_by_hand(hessian, damping):
    """What is left of each column's own curvature once the columns after it, by falling diagonal, make up for its error; float64."""
    h = hessian.double().numpy()
    h = h + damping * np.diag(h).mean() * np.eye(len(h))
    order, costs = np.argsort(-np.diag(h), kind="stable"), np.zeros(len(h))
    for i, j in enumerate(order):
        rest = order[i + 1 :]
        costs[j] = h[j, j] - h[j, rest] @ np.linalg.solve(h[np.ix_(rest, rest)], h[rest, j])
    return costs


def scales_of(tensors, name):
    """The scale of every weight (R, C), float64."""
    return tensors[f"{name}.scales"].double().numpy()[:, None] * tensors[f"{name}.columns"].double().numpy()


@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0])
def test_scales_follow_the_cost_by_the_power_and_their_geometric_mean_is_the_option(power):
    cfg = dataclasses.replace(CFG, scale_power=power, mean_scale=3.0, gptq_damping=0.02)
    weights, costs = costs_of(SHAPES)
    tensors = t.quantize(weights, t.quant_plans(weights, GRIDS, cfg, costs))
    scales = {name: scales_of(tensors, name) for name in SHAPES}
    together, level = np.concatenate([s.ravel() for s in scales.values()]), []
    plans = t.quant_plans(weights, GRIDS, cfg, costs).values()
    assert not any(p.clip.gt(127 * p.scales).any() for p in plans)  # none at its least
    for name, cost in costs.items():
        rows = cost.rows.double().numpy()
        rows, columns = rows + 0.02 * rows.mean(), column_costs_by_hand(cost.inputs, 0.02)
        level.append(scales[name] ** 2 * (rows[:, None] * columns) ** power)  # at power 1 the cost of an error of one scale, at 0 the scale alone
    level = np.concatenate([part.ravel() for part in level])
    np.testing.assert_allclose(level / np.exp(np.log(level).mean()), 1, rtol=5e-3)
    assert np.exp(np.log(together).mean()) == pytest.approx(3, rel=1e-3) and (together.max() > 2 * together.min()) == (power > 0)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_what_is_read_is_codes_times_scales_times_columns(power):
    weights, costs = costs_of(SHAPES)
    cfg = dataclasses.replace(CFG, scale_power=power)
    plans = t.quant_plans(weights | {"kept": torch.ones(3)}, GRIDS, cfg, costs)
    tensors = t.quantize(weights | {"kept": torch.ones(3)}, plans)
    assert plans.keys() == SHAPES.keys() and tensors["kept"].dtype == torch.float16
    read = t.dequantize(unpacked(t.pack(tensors, False, CFG))[1])
    for name, p in plans.items():
        assert torch.equal(p.columns, p.columns.half().float()) and p.columns.log().mean().abs() < 1e-3
        codes = tensors[f"{name}.codes"].double().numpy()
        np.testing.assert_allclose(read[name].double(), codes * scales_of(tensors, name), rtol=1e-6)
        assert torch.equal(p.clip, (p.weight / p.columns).abs().amax(1))
        assert tensors[f"{name}.columns"].dtype == tensors[f"{name}.scales"].dtype == torch.float16


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_where_all_errors_cost_the_same_there_is_one_step_and_codes_are_rounded(power):
    weights = {"a.weight": 0.3 * gaussian(20, 24), "b.weight": 0.3 * gaussian(10, 24, 1)}
    costs = {name: t.Curvature(3 * torch.eye(24), torch.full((len(w),), 7.0)) for name, w in weights.items()}
    cfg = dataclasses.replace(CFG, scale_power=power, mean_scale=0.0625)  # exact in fp16
    tensors = t.quantize(weights, t.quant_plans(weights, {n: t.QuantSpec(8, 0.0) for n in weights}, cfg, costs))
    for name, w in weights.items():
        assert (scales_of(tensors, name) == 0.0625).all()
        assert torch.equal(tensors[f"{name}.codes"].float(), (w / 0.0625).round())


def test_an_error_costs_less_than_with_equal_scales():
    """At the same geometric mean, hence about the same entropy of the codes."""
    weights, costs = costs_of(SHAPES)
    total = []
    for power in (0.0, 1.0):
        cfg = dataclasses.replace(CFG, scale_power=power, mean_scale=0.05)
        read = t.dequantize(t.quantize(weights, t.quant_plans(weights, GRIDS, cfg, costs)))
        total.append(0.0)
        for name, (inputs, rows) in costs.items():
            off = (read[name] - weights[name]).double()
            total[-1] += float(((off @ inputs.double() * off).sum(1) * rows.double()).sum())
    assert total[1] < 0.1 * total[0]


def test_gptq_keeps_outputs_with_a_scale_per_column():
    weights, costs = {"a.weight": gaussian(64, 96)}, {"a.weight": t.Curvature(hessian_of(96, 0.95), torch.ones(64))}
    cfg = dataclasses.replace(CFG, mean_scale=0.3)
    (p,) = t.quant_plans(weights, {"a.weight": t.QuantSpec(8, 0.0)}, cfg, costs).values()
    off = [(t.dequantize_rows(*t.quantize_rows(q), p.columns.half()) - p.weight).double() for q in (p, p._replace(cholesky=None))]
    gptq, rounded = ((o @ costs["a.weight"].inputs.double() * o).sum() for o in off)
    assert rounded > 3 * gptq and p.columns.max() > 2 * p.columns.min()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_codes_of_a_plan_by_cost_are_those_of_gptq_on_scaled_columns(power):
    """In units of its columns a weight has inputs that are larger by them; the damping is that of the inputs as they were."""
    cfg, hessian = dataclasses.replace(CFG, mean_scale=0.3, scale_power=power, gptq_damping=0.05), hessian_of(48)
    (p,) = t.quant_plans({"a.weight": gaussian(40, 48)}, {"a.weight": t.QuantSpec(8, 0.0)}, cfg, {"a.weight": t.Curvature(hessian, torch.ones(40))}).values()
    codes, scales = t.quantize_rows(p)
    damped = hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(48)
    scaled = p.columns[:, None].double() * damped * p.columns.double()
    expected = gptq_by_hand(p.weight / p.columns, scales.double().numpy(), (p.clip / scales.float()).round().numpy(), scaled, 0.0)
    assert (codes.numpy() != expected).mean() < 1e-3 and (codes.float() != (p.weight / p.columns / scales.float()[:, None]).round()).float().mean() > 0.05


def test_a_weight_that_no_gradient_reached_is_told():
    weights, costs = costs_of(SHAPES)
    costs["table.weight"] = costs["table.weight"]._replace(rows=torch.zeros(25))
    with pytest.raises(t.TrainingFailed, match="MEAN_SCALE needs gradients of table.weight"):
        t.quant_plans(weights, GRIDS, CFG, costs)
    assert t.quant_plans(weights, GRIDS, dataclasses.replace(CFG, mean_scale=0.0), costs).keys() == SHAPES.keys()


@pytest.mark.parametrize("change", [dict(quantizer="rtn"), dict(matrix_bits=6), dict(embed_bits=7), dict(table_bits=4)], ids=str)
def test_a_mean_scale_refuses_options_that_it_would_ignore(change):
    dataclasses.replace(CFG, mean_scale=0.0, **change)
    ((name, value),) = change.items()
    with pytest.raises(t.InputError, match=f"MEAN_SCALE needs QUANTIZER=gptq, MATRIX_BITS=8, .*{name.upper()}={value}[,)]"):
        dataclasses.replace(CFG, **change)


# ---- a factor on all scales

@pytest.mark.parametrize("mean_scale", [0.0003, 0.02, 1.0])
@pytest.mark.parametrize("factor", [0.3, 0.9, 1.0, 1.7, 6.0])
def test_a_factor_multiplies_the_scales_of_a_plan_by_cost_and_no_weight_is_clipped(factor, mean_scale):
    """The least step of a row is what brings its largest weight to code 127."""
    weights, costs = costs_of(SHAPES)
    cfg = dataclasses.replace(CFG, mean_scale=mean_scale)
    plans = t.quant_plans(weights, GRIDS, cfg, costs)
    plain, scaled = t.quantize(weights, plans), t.quantize(weights, plans, factor)
    for name, w in weights.items():
        least = (w / plans[name].columns).abs().amax(1) / 127
        np.testing.assert_allclose(scaled[f"{name}.scales"].double(), torch.maximum(factor * plans[name].scales, least), rtol=6e-4)
        assert torch.equal(scaled[f"{name}.columns"], plain[f"{name}.columns"])
        assert factor != 1 or torch.equal(scaled[f"{name}.codes"], plain[f"{name}.codes"])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_scales_too_small_for_an_int8_lose_no_more_than_eight_bits_do(power):
    """A MEAN_SCALE, or a factor, that would need codes above 127 must not clip the weights."""
    cfg = dataclasses.replace(CFG, scale_power=power, mean_scale=1e-5)
    weights, costs = costs_of(SHAPES)
    eight = dataclasses.replace(cfg, mean_scale=0.0, clip_shares=(1.0,), min_clip=0.0)
    ours, theirs = (t.dequantize(t.quantize(weights, t.quant_plans(weights, GRIDS, c, costs))) for c in (cfg, eight))
    for name, cost in costs.items():
        ours_off, theirs_off = ((read[name] - weights[name]).double() for read in (ours, theirs))
        assert (ours_off @ cost.inputs.double() * ours_off).sum() < 2 * (theirs_off @ cost.inputs.double() * theirs_off).sum(), name


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), sigmas=st.sampled_from([0.0, 1.0, 2.5]), factor=st.floats(0.25, 8), hessian=st.booleans())
def test_a_plan_by_rows_keeps_its_clip_as_the_factor_moves(bits, sigmas, factor, hessian):
    """Weights that are clipped stay clipped at the same height, but for half a step; an int8 sets the least step."""
    w, grid = 0.2 * gaussian(6, 300), t.QuantSpec(bits, sigmas)
    w[:, 0] = 50.0
    cfg = dataclasses.replace(CFG, mean_scale=0.0, clip_shares=(0.01,), min_clip=0.0)
    plan = t.row_plan(w, grid, cfg, torch.eye(300) if hessian else None)
    codes, scales = t.quantize_rows(plan, factor)
    moved = max(factor, grid.max_code / 127)
    np.testing.assert_allclose(scales.double(), moved * plan.scales.double(), rtol=6e-4)
    top = (plan.clip.double() / scales.double()).round().clamp(max=127)[:, None]
    assert torch.equal(codes[:, :1].double(), top) and ((top * scales.double()[:, None] - plan.clip[:, None]).abs() <= 0.5001 * scales.double()[:, None]).all()
    assert torch.equal(codes.double(), (w / scales.float()[:, None]).double().round().clamp(-top, top))


def test_factor_one_is_the_plan_itself():
    model = make_model(CFG)
    weights, cfg = weights_of(model), dataclasses.replace(CFG, mean_scale=0.0)
    grid_of = t.quant_specs(model, cfg)
    plans = t.quant_plans(weights, grid_of, cfg, {})
    tensors = t.quantize(weights, plans)
    for name, p in plans.items():
        assert torch.equal(tensors[f"{name}.scales"].float(), p.scales)
        assert torch.equal(tensors[f"{name}.codes"].float(), t.round_codes(weights[name] / p.scales[:, None], grid_of[name].max_code))
    assert all(torch.equal(w, tensors[n]) for n, w in t.quantize(weights, plans, 1.0).items())


def test_no_scale_is_zero():
    """The least step of a row of zeros, 1e-7, has no quarter in fp16; a weight by it would be no number."""
    w = torch.zeros(2, 8)
    w[1, 0] = 1e-9
    for hessian in (None, torch.eye(8)):
        codes, scales = t.quantize_rows(t.row_plan(w, t.QuantSpec(6, 0.0), dataclasses.replace(CFG, mean_scale=0.0, min_clip=0.0), hessian), 0.25)
        assert (scales > 0).all() and not codes.any()


# ---- FisherStats

def costs_by_hand(model, batches, first, count, looped=False):
    """By name, in float64: x x^T, the squared gradients of outputs, those of looked-up rows; by hooks and autograd of our own."""
    modules, calls, project = {n: m for n, m in model.named_modules() if isinstance(m, t.Linear)}, [], model.tok_emb.project

    def note(name, x, y, scale=None):
        calls.append((name, x, 1.0 if scale is None else scale, y))
        return y.clone()  # an activation works in place

    hooks = [m.register_forward_hook(lambda m, args, y, n=n: note(n, args[0], y, *args[1:])) for n, m in modules.items()]

    def head(x):
        return note("tok_emb", x, project(x))

    model.tok_emb.project, sums = head, {n: [0.0, 0.0, np.zeros(len(m.weight)), 0] for n, m in modules.items()}
    for step in range(first, first + count):
        for ids, targets in zip(*batches.load(step, batches.seq_len, batches.micro_steps)):
            calls.clear()
            with mock.patch.object(t, "project_heads", lambda x, width, *each: [m(x).unflatten(-1, (-1, width)) for m in each]):
                loss = model(ids, targets, looped).sum()
            for (name, x, scale, _), g in zip(calls, torch.autograd.grad(loss, [y for *_, y in calls])):
                g, seen = (g * scale).detach().flatten(0, -2).double().numpy(), sums[name]  # of what comes before the scale
                if x.is_floating_point():
                    flat = x.detach().flatten(0, -2).double().numpy()
                    seen[0], seen[1], seen[3] = seen[0] + flat.T @ flat, seen[1] + (g**2).sum(0), seen[3] + len(flat)
                else:
                    for row, squares in zip(x.flatten().tolist(), (g**2).mean(1)):
                        seen[2][row] += squares
    del model.tok_emb.project
    for hook in hooks:
        hook.remove()
    return {f"{n}.weight": seen for n, seen in sums.items()}


@pytest.fixture
def step_cfg(cfg):
    return dataclasses.replace(cfg, quantizer="gptq", mean_scale=0.02, matrix_bits=8, warmup_steps=0, gptq_calibration_batches=2, val_loss_every=0)


def observed(cfg, looped=False, ranks=None, batches=2):
    """The FisherStats of a few batches, and the trainer."""
    ranks = ranks or t.Ranks()
    trainer = t.Trainer(make_model(cfg), t.Batches(batches_of(cfg).stream, cfg, ranks), cfg, ranks)
    trainer.looped = looped
    with trainer.fisher_stats() as seen:
        for _ in range(batches):
            trainer.collect()
    return seen, trainer


def test_a_curvature_is_that_of_all_ranks(step_cfg):
    """Two ranks have the parts of one rank's batch."""
    (whole, _), *parts = observed(step_cfg), *(observed(step_cfg, ranks=t.Ranks(rank, 2)) for rank in range(2))
    for name, one in whole.items():
        mine, others = (seen[name] for seen, _ in parts)
        queue = [others.inputs, others.outputs, others.lookups, others.count]
        ranks = t.Ranks()
        object.__setattr__(ranks, "sum_", lambda tensor, queue=queue: tensor + queue.pop(0))
        for got, want in zip(t.curvature(mine, ranks), t.curvature(one, t.Ranks())):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
        assert not queue


@pytest.mark.parametrize("loops", [0, 2])
def test_fisher_stats_sum_what_autograd_gives(step_cfg, loops):
    cfg = dataclasses.replace(step_cfg, num_loops=loops, loop_start=1, loop_end=2)
    seen, trainer = observed(cfg, loops > 0)
    expected = costs_by_hand(make_model(cfg), batches_of(cfg), 0, 2, loops > 0)
    assert seen.keys() == {n for n, grid in t.quant_specs(trainer.model, cfg).items() if grid.bits < 16} and trainer.batches.step == 2
    for name, o in seen.items():
        inputs, outputs, lookups, count = expected[name]
        assert int(o.count) == count
        for got, want in ((o.inputs, inputs), (o.outputs, outputs), (o.lookups, lookups)):
            np.testing.assert_allclose(got.double(), np.broadcast_to(want, got.shape), rtol=1e-3, atol=1e-4 * np.max(want))
    both, tokens = seen["tok_emb.weight"], 2 * cfg.train_batch_tokens
    assert both.outputs.all() and both.lookups.any() and int(both.count) == tokens  # a head, and a table
    table, twice = seen["value_embed.embed.weight"], seen["blocks.1.mlp.fc.weight"]
    assert table.count == 0 and table.lookups.any() and not table.outputs.any() and not table.inputs.any()
    assert int(twice.count) == tokens * (1 + loops) and not twice.lookups.any()


def test_two_ranks_see_together_what_one_sees(step_cfg):
    whole = observed(step_cfg)[0]
    first, second = (observed(step_cfg, ranks=t.Ranks(rank, 2))[0] for rank in (0, 1))
    for name, o in whole.items():
        for part in ("inputs", "outputs", "lookups", "count"):
            total = getattr(o, part)
            torch.testing.assert_close(getattr(first[name], part) + getattr(second[name], part), total, rtol=1e-3, atol=1e-4 * float(total.max()))


def test_a_curvature_is_the_mean_of_inputs_and_the_sum_of_squared_gradients(step_cfg):
    seen, _ = observed(step_cfg)
    o = seen["blocks.0.attn.c_q.weight"]
    c = t.curvature(o, t.Ranks())
    assert torch.equal(c.inputs, o.inputs / o.count) and torch.equal(c.rows, o.outputs)
    o = seen["bigram.embed.weight"]
    c = t.curvature(o, t.Ranks())
    assert torch.equal(c.inputs, torch.eye(step_cfg.bigram_dim)) and torch.equal(c.rows, o.lookups)
    o = seen["tok_emb.weight"]
    o.inputs, o.outputs = 9 * torch.eye(step_cfg.model_dim) * o.count, o.outputs / 1000
    c = t.curvature(o, t.Ranks())  # a random error e of a looked-up row costs the mean squared gradient times |e|^2, however large other inputs are
    torch.testing.assert_close(9 * c.rows, 9 * o.outputs + o.lookups)
    assert (o.lookups > 9 * o.outputs).sum() > 30


def test_the_cost_of_a_small_error_is_foreseen(step_cfg):
    """Random errors in one weight change the loss of each token by a gradient whose mean square the curvature tells."""
    cfg = dataclasses.replace(step_cfg, train_batch_tokens=512, micro_batch_tokens=512)
    seen, trainer = observed(cfg, batches=1)
    ids, targets = next(batches_of(cfg))
    model = trainer.model
    for name in ("blocks.1.mlp.fc.weight", "blocks.2.attn.c_v.weight", "value_embed.embed.weight"):
        w, cost = model.get_parameter(name), t.curvature(seen[name], t.Ranks())
        foreseen = float(cost.rows.sum() * cost.inputs.trace())  # of errors of variance 1
        grads = [torch.autograd.grad(model(x[None], y[None]).sum(), w)[0] for x, y in zip(ids[0], targets[0])]
        found = sum(float(g.square().sum()) for g in grads)  # gradients of a row of tokens, which do not quite add up as independent
        assert 0.5 < found / foreseen < 2, name


def test_fisher_stats_leave_the_model_as_it_was(step_cfg):
    cfg = step_cfg
    before = {n: p.clone() for n, p in make_model(cfg).state_dict().items()}
    _, trainer = observed(cfg)
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in trainer.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or getattr(m, "output_hook", None) for m in trainer.model.modules())
    with pytest.raises(KeyError), trainer.fisher_stats():
        raise KeyError
    assert not any(m._forward_hooks or getattr(m, "output_hook", None) for m in trainer.model.modules())


def test_collecting_does_not_change_the_loss(step_cfg):
    trainer = observed(step_cfg, batches=0)[1]
    ids, targets = next(trainer.batches)
    plain = trainer.forward(ids[0], targets[0])
    with trainer.fisher_stats():  # scales of outputs are then multiplied after, not folded into the weights
        torch.testing.assert_close(trainer.forward(ids[0], targets[0]), plain, rtol=1e-6, atol=1e-6)


def test_without_a_mean_scale_no_gradient_flows(step_cfg, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", None)
    seen, trainer = observed(dataclasses.replace(step_cfg, mean_scale=0.0))
    assert not any(o.outputs.any() or o.lookups.any() for o in seen.values()) and seen["tok_emb.weight"].count
    assert all(p.grad is None for p in trainer.model.parameters())
    cost = t.curvature(seen["tok_emb.weight"], t.Ranks())
    assert not cost.rows.any() and cost.inputs.any()


def test_training_returns_the_costs_of_the_averaged_weights(step_cfg, log):
    cfg = dataclasses.replace(step_cfg, iterations=3)
    trainer = observed(cfg, batches=0)[1]
    costs, averaged = t.train(trainer, None, log), t.GPT(cfg)
    averaged.load_state_dict(trainer.average.values)
    for name, (inputs, outputs, lookups, count) in costs_by_hand(averaged, batches_of(cfg), 3, 2).items():
        if name in costs:
            mean = inputs / count if count else np.eye(costs[name].inputs.size(1))
            np.testing.assert_allclose(costs[name].inputs.double(), mean, rtol=1e-3, atol=1e-4 * mean.max())
            rows = outputs + lookups / np.diag(mean).mean()
            np.testing.assert_allclose(costs[name].rows.double(), rows, rtol=1e-2, atol=1e-3 * rows.max())
    assert trainer.batches.step == 5 and len(costs) == 6 * cfg.num_layers + 3


# ---- the search for the factor

def search(size_at, room, coded=10**7):
    """The result of fit, as (log2 of the factor, bytes), and all its trials."""
    trials, lines = [], []

    def pack_at(factor):
        trials.append((math.log2(factor), size_at(math.log2(factor))))
        return trials[-1][1], trials[-1]

    _, got = t.fit(pack_at, room, coded, lines.append)
    assert len(lines) == len(trials) and all(f"bytes:{size} of {room}" in line for line, (_, size) in zip(lines, trials))
    return got, trials


def model_of(coded, bits, slope, noise, stairs, seed):
    """Bytes at a factor of 2**at: `bits` a weight at 1, `slope` less an octave, with a ripple and in small stairs."""
    def size_at(at):
        at = math.floor(at * stairs) / stairs
        ripple = noise * math.sin(1e4 * at + seed)
        return int(200_000 + coded / 8 * max(bits - slope * at, 0.1) + ripple)

    return size_at


@settings(max_examples=300, deadline=None)
@given(coded=st.integers(10**6, 4 * 10**7), bits=st.floats(4, 7), slope=st.floats(0.1, 1.3), share=st.floats(0, 1),
       noise=st.integers(0, 8000), stairs=st.sampled_from([1000, 10**6]), seed=st.integers(0, 99))
def test_the_factor_fills_the_room_within_a_few_trials(coded, bits, slope, share, noise, stairs, seed):
    """Up to 0.5 % of the room, or to what 0.02 octaves save."""
    size_at = model_of(coded, bits, slope, noise, stairs, seed)
    most, least = size_at(-2.0), size_at(2.98) + 2 * noise
    room = round(least + share * (most - least))
    (at, size), trials = search(size_at, room, coded)
    assert len(trials) <= (10 if slope > 0.6 and abs(at) < 0.8 else 32) and -2 < min(trials)[0] and max(trials)[0] < 3 and trials[0][0] == 0
    octaves = 0.02 + 1 / stairs
    assert room - max(room // 200, octaves * slope * coded / 8 + 2 * noise + 2) <= size <= room, (at, size - room)
    assert search(size_at, room, coded) == ((at, size), trials)


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(0, 30_000_000), min_size=40, max_size=40), room=st.integers(-(10**6), 30_000_000))
def test_a_factor_that_fits_is_never_given_up_for_one_that_does_not(sizes, room):
    """Whatever the sizes are, even ones that grow with the factor."""
    left = iter(sizes)
    (at, size), trials = search(lambda at: next(left), room)
    fitting = [(a, s) for a, s in trials if s <= room]
    assert (at, size) == (min(fitting) if fitting else trials[-1]) and all(-2 < a < 3 for a, _ in trials)


@example(cliff=2.890625, high=1, low=50_001)
@settings(max_examples=100, deadline=None)
@given(cliff=st.floats(-1.9, 2.9), high=st.integers(1, 10**7), low=st.integers(50_001, 10**7))
def test_a_cliff_is_found_from_the_side_that_fits(cliff, high, low):
    """No size is within 0.5 % of the room, so the interval shrinks to 0.02 octaves; the smallest factor that fits is returned."""
    (at, size), trials = search(lambda at: 10**7 + high if at < cliff else 10**7 - low, 10**7)
    assert size == 10**7 - low and at == min(a for a, s in trials if s == size) and len(trials) <= 32
    assert 0 < at - max(a for a, s in trials if s > 10**7) <= 0.0201 and 0 <= at - cliff <= 0.0201


def test_the_ends_are_approached():
    size_at = model_of(10**7, 6, 1.0, 0, 10**6, 0)
    (at, size), trials = search(size_at, size_at(-2.0) + 10**6)
    assert -2 < at <= -1.98 and len(trials) <= 16  # everything fits: the smallest scales
    (at, size), trials = search(size_at, size_at(3.0) - 10**6)
    assert 2.98 <= at < 3 and len(trials) <= 16 and size > size_at(3.0) - 10**6  # nothing fits: save_artifact reports it
    (at, size), trials = search(size_at, round(1.004 * size_at(0.0)))
    assert len(trials) == 1 and at == 0


# ---- FIT in an artifact

class Lines(list):
    """A log that keeps its lines."""

    __call__ = list.append

    def fact(self, **facts):
        self.append(" ".join(f"{name}:{value}" for name, value in facts.items()))


def saved(tmp_path, room, **changes):
    """(bytes of the artifact, its tensors, log) of a million random weights, under a cap with `room` for the model."""
    code, lines = Path(t.__file__).stat().st_size, Lines()
    cfg = dataclasses.replace(CFG, mean_scale=0.0, quantizer="rtn", matrix_bits=6,
                              output_dir=str(tmp_path), max_artifact_bytes=code + room, min_clip=0.0, **changes)
    weights = {"blocks.0.a.weight": gaussian(800, 1000), "gain": torch.ones(5)}
    plans = t.quant_plans(weights, {"blocks.0.a.weight": t.QuantSpec(6, 6.0)}, cfg, {})
    t.save_artifact(plans, weights, False, cfg, t.Ranks(), lines)
    blob = cfg.artifact_path.read_bytes()
    return blob, unpacked(blob)[1], "\n".join(lines), plans["blocks.0.a.weight"].scales


@pytest.mark.parametrize("compressor", ["rans", "zstd"])
@pytest.mark.parametrize("room", [620_000, 250_000])
def test_the_artifact_fills_its_room(tmp_path, compressor, room):
    blob, tensors, log, scales = saved(tmp_path, room, fit=True, compressor=compressor)
    trials = [(float(f), int(size)) for f, size in re.findall(r"fit:factor ([\d.]+) bytes:(\d+) of \d+", log)]
    factor, size = min(trial for trial in trials if trial[1] <= room)
    assert room - max(room // 200, 2500) <= len(blob) == size <= room and len(trials) <= 9 and trials[0][0] == 1  # 2500: 0.02 octaves at 1.2 bits an octave
    torch.testing.assert_close(tensors["blocks.0.a.weight.scales"].float(), factor * scales, rtol=1e-3, atol=0)
    assert (factor > 1) == (room < trials[0][1]) and f"kind:int6+{compressor} model_bytes:{len(blob)} " in log
    assert saved(tmp_path, room, fit=True, compressor=compressor)[0] == blob


def test_without_fit_the_factor_is_one(tmp_path):
    blob, tensors, log, scales = saved(tmp_path, 620_000, fit=False)
    assert "fit:" not in log and torch.equal(tensors["blocks.0.a.weight.scales"].float(), scales)
    with pytest.raises(t.TrainingFailed, match=r"over MAX_ARTIFACT_BYTES=\d+.*, or set FIT=1$"):
        saved(tmp_path, 250_000, fit=False)
    with pytest.raises(t.TrainingFailed, match=r"over MAX_ARTIFACT_BYTES=\d+.* fewer weights$"):
        saved(tmp_path, 1000, fit=True)
    assert t.Path(tmp_path, "final_model.int6.ptz").read_bytes() == blob


# ---- whole runs

def test_a_run_with_fit_stays_under_its_cap_and_shows_its_trials(dataset, tmp_path):
    code = Path(t.__file__).stat().st_size

    def trained(name, **options):
        env = dict(SMOKE, **dataset, OUTPUT_DIR=str(tmp_path / name), VAL_MAX_TOKENS="300", RUN_ID="test", TTT_EPOCHS="0", ITERATIONS="6")
        (tmp_path / name).mkdir()
        t.main([], env | options)
        return (tmp_path / name / "final_model.int6.ptz").read_bytes(), (tmp_path / name / "logs" / "test.txt").read_text()

    plain, log = trained("plain")
    assert "fit:" not in log
    cap = code + len(plain) * 9 // 10
    blob, log = trained("fit", FIT="1", MAX_ARTIFACT_BYTES=str(cap))
    trials = re.findall(r"fit:factor ([\d.]+) bytes:(\d+) of (\d+)", log)
    assert trials[0] == ("1.0000", str(len(plain)), str(cap - code)) and 2 <= len(trials) <= 9
    assert str(len(blob)) in [size for _, size, _ in trials] and len(blob) + code <= cap and f"Total submission size int6+zstd: {len(blob) + code} bytes" in log
    assert trained("again", FIT="1", MAX_ARTIFACT_BYTES=str(cap))[0] == blob
    assert list(finals(log)) == STAGES[:2]


@pytest.fixture(scope="module")
def card(dataset, tmp_path_factory):
    """(folder, log of one process, log of two) of a small `frontier`, the row with every option of this file."""
    folders = [tmp_path_factory.mktemp(f"card_{n}") for n in (1, 2)]
    env = dataset | scaled("frontier") | dict(RUN_ID="test", MEAN_SCALE="0.02", TTT_CHUNK_TOKENS="16", VAL_MAX_TOKENS="400")
    t.main([], env | {"OUTPUT_DIR": str(folders[0])})
    two = run(env | {"OUTPUT_DIR": str(folders[1])}, processes=2).stdout
    return folders[0], (folders[0] / "logs" / "test.txt").read_text(), two


def test_a_run_with_a_mean_scale_and_the_entropy_coder_passes_every_stage(card):
    folder, out, two = card
    scores, losses = finals(out), train_losses(out)
    assert list(scores) == [name.replace("int6", "int8") for name in STAGES] and all(0 < x < 8 for x in scores.values())
    assert "train_seq_len:16 step:1 " in out and "train_seq_len:32 step:6 " in out and json.loads(out.splitlines()[-1].removeprefix("RESULT "))["steps"] == 8
    assert "gptq:collected 67 Hessians from 2 of 2 batches" in out and "kind:int8+rans model_bytes:" in out and "fit:factor 1.0000 bytes:" in out
    averaged = float(re.search(r"DIAGNOSTIC post_ema .*val_bpb:([\d.]+)", out)[1])
    assert scores["final_int8_roundtrip"] == pytest.approx(averaged, abs=0.02)
    assert (folder / "final_model.int6.ptz").read_bytes()[40:48] == b"rans    "
    assert "world_size:2" in two and train_losses(two) == pytest.approx(losses, abs=2e-3) and finals(two) == pytest.approx(scores, abs=2e-2)


def test_its_artifact_alone_is_scored_as_the_run_scored_it(card, dataset, tmp_path):
    folder, out, _ = card
    paths = {name: dataset[name] for name in ("DATA_PATH", "TOKENIZER_PATH")} | dict(VAL_MAX_TOKENS="400")
    t.main([], paths | {"EVAL_ONLY": "1", "ARTIFACT": str(folder / "final_model.int6.ptz"), "OUTPUT_DIR": str(tmp_path), "RUN_ID": "again", "DTYPE": "fp32"})
    assert finals((tmp_path / "logs" / "again.txt").read_text()) == finals(out)
