import dataclasses

import numpy as np
import pytest
import torch
from conftest import coded, coded_rows, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

CARD = t.Config()
FREE = dataclasses.replace(CARD, min_clip=0.0)
FOUR, SIX = t.QuantSpec(4, 0.0), t.QuantSpec(6, 0.0)
ONE = torch.ones(1)  # of all columns


def matrix(rows=40, cols=64, scale=0.1, seed=0):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * scale
    return w * torch.linspace(0.1, 3, rows)[:, None]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), floor=st.sampled_from([0.0, 0.1, 1.0]), scale=st.floats(1e-3, 10), seed=st.integers(0, 99))
def test_each_row_takes_the_best_of_its_clips(bits, floor, scale, seed):
    """Brute force in float64, a row at a time."""
    cfg, w, top = dataclasses.replace(CARD, min_clip=floor), matrix(6, 16, scale, seed), 2 ** (bits - 1) - 1
    codes, steps = coded_rows(w, t.QuantSpec(bits, 0.0), cfg)
    assert codes.dtype == torch.int8 and steps.dtype == torch.float16 and codes.abs().max() <= top
    restored = t.dequantize_rows(codes, steps, ONE).double().numpy()
    for row, got in zip(w.double().numpy(), restored):
        errors = []
        for share in cfg.clip_shares:
            step = float(np.float16(max(np.abs(row).max() * share / top, floor / top, 1e-7)))
            errors.append(((np.clip(np.round(row / step), -top, top) * step - row) ** 2).sum())
        assert ((got - row) ** 2).sum() <= min(errors) * 1.01 + 1e-9


def test_the_search_is_per_row_and_beats_the_row_maximum():
    w = matrix()
    w[::2, 0] *= 8  # outliers in every other row only
    one = dataclasses.replace(FREE, clip_shares=(1.0,))
    searched, plain = (t.dequantize_rows(*coded_rows(w, FOUR, c), ONE) for c in (FREE, one))
    better = (searched - w).square().sum(1) < (plain - w).square().sum(1)
    assert ((searched - w).square().sum(1) <= (plain - w).square().sum(1)).all() and better[1::2].any()
    shares = coded_rows(w, FOUR, FREE)[1] / coded_rows(w, FOUR, one)[1]
    assert len(shares.unique()) > 1


def test_unclipped_weights_are_off_by_at_most_half_a_step():
    w = matrix()
    codes, steps = coded_rows(w, SIX, dataclasses.replace(FREE, clip_shares=(1.0,)))
    error = (t.dequantize_rows(codes, steps, ONE) - w).abs() / steps.float()[:, None]
    assert error.max() < 0.52  # the step itself is rounded to fp16


def test_the_floor_is_the_published_step_of_small_rows():
    _, steps = coded_rows(matrix(scale=0.01), SIX, CARD)
    assert (steps == torch.tensor(1 / 31).half()).all()
    assert coded_rows(matrix(scale=0.01), SIX, FREE)[1].max() < 1 / 310


def test_quantizing_twice_changes_nothing():
    cfg = dataclasses.replace(FREE, clip_shares=(1.0,))
    once = t.dequantize_rows(*coded_rows(matrix(), SIX, cfg), ONE)
    assert torch.equal(t.dequantize_rows(*coded_rows(once, SIX, cfg), ONE), once)
    assert not coded_rows(torch.zeros(2, 3), SIX, FREE)[0].any()


def exported(model, cfg):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return t.dequantize(coded(weights, t.quant_specs(model, cfg), cfg))


def test_what_is_coded_and_how_wide(cfg):
    model = make_model(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tensors = coded(weights, t.quant_specs(model, dataclasses.replace(cfg, embed_bits=16)), cfg)
    assert tensors["tok_emb.weight"].dtype == torch.float16 and tensors["blocks.0.attn.q_gain"].dtype == torch.float16
    assert tensors["blocks.0.mlp.fc.weight.codes"].abs().max() <= 31
    eight = coded(weights, t.quant_specs(model, cfg), cfg)["tok_emb.weight.codes"]
    assert 31 < eight.abs().max() <= 127
    assert {n: w.shape for n, w in exported(model, cfg).items()} == {n: w.shape for n, w in weights.items()}


def matrices_of(weights):
    """The names that late QAT rounds: the blocks' matrices, and nothing else that is coded."""
    return {n for n in weights if n.startswith("blocks.") and n.endswith(".weight")}


def test_late_qat_stands_on_exactly_the_export_grid_and_comes_back(cfg):
    model = make_model(cfg)
    before, export = {n: p.clone() for n, p in model.state_dict().items()}, exported(model, cfg)
    with t.on_export_grid(model, cfg):
        inside = {n: p.clone() for n, p in model.state_dict().items()}
    for name, w in inside.items():
        assert torch.equal(w, export[name] if name in matrices_of(before) else before[name]), name
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert len(matrices_of(before)) == 6 * cfg.num_layers


def test_late_qat_comes_back_after_an_error(cfg):
    model = make_model(cfg)
    before = model.blocks[0].mlp.fc.weight.detach().clone()
    with pytest.raises(KeyError), t.on_export_grid(model, cfg):
        raise KeyError
    assert torch.equal(model.blocks[0].mlp.fc.weight, before)


def test_a_step_with_late_qat_uses_the_gradient_of_the_rounded_weights(cfg, log):
    from test_optimizer import trainer_of

    cfg = dataclasses.replace(cfg, matrix_bits=3, micro_batch_tokens=cfg.train_batch_tokens)
    gradients, losses = [], []
    for qat in (False, True):
        trainer = trainer_of(cfg)
        trainer.model.load_state_dict(make_model(cfg).state_dict())
        trainer.optimizers.step = lambda *_, trainer=trainer: gradients.append([p.grad.clone() for p in trainer.model.parameters()]) or torch.ones(())
        trainer.qat = qat
        losses.append(trainer.step(1.0, 0.9).value())
        assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), make_model(cfg).parameters()))
    trainer = trainer_of(cfg)
    export = exported(make_model(cfg), cfg)
    rounded = t.GPT(cfg)
    rounded.load_state_dict({n: export[n] if n in matrices_of(export) else p for n, p in make_model(cfg).state_dict().items()})
    ids, targets = next(trainer.batches)
    loss = rounded(ids[0], targets[0]).mean()
    loss.backward()
    assert losses[1] == pytest.approx(float(loss.detach()), rel=1e-6) and abs(losses[0] - losses[1]) > 1e-3
    for got, p in zip(gradients[1], rounded.parameters()):
        torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("threshold, on", [(0.0, []), (2.0, [True, True, True]), (0.5, [False, False, True])])
def test_late_qat_is_on_below_its_threshold(cfg, log, threshold, on):
    from test_optimizer import trainer_of

    trainer = trainer_of(dataclasses.replace(cfg, iterations=3, warmdown_iters=3, warmup_steps=0, late_qat_threshold=threshold))
    used, step = [], trainer.step
    trainer.step = lambda scale, momentum: used.append(trainer.qat) or step(scale, momentum)
    t.train(trainer, None, log)
    assert used == (on or [False] * 3)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_late_qat_stands_on_the_export_grid_of_standard_deviations_too(cfg, bits):
    cfg = dataclasses.replace(cfg, matrix_clip_sigmas=2.0, embed_clip_sigmas=3.0, matrix_bits=bits)
    model = make_model(cfg)
    export = exported(model, cfg)
    searched = exported(model, dataclasses.replace(cfg, matrix_clip_sigmas=0.0))
    with t.on_export_grid(model, cfg):
        for name in matrices_of(export):
            assert torch.equal(model.get_parameter(name), export[name]) and not torch.equal(export[name], searched[name]), name
