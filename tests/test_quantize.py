import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import ids_of

import train_gpt as t

CARD = t.Config()
FREE = dataclasses.replace(CARD, step_floor=0.0)


def matrix(rows=40, cols=64, scale=0.1, seed=0):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * scale
    return w * torch.linspace(0.1, 3, rows)[:, None]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), floor=st.sampled_from([0.0, 0.1, 1.0]), scale=st.floats(1e-3, 10), seed=st.integers(0, 99))
def test_each_row_takes_the_best_of_its_clips(bits, floor, scale, seed):
    """Brute force in float64, a row at a time."""
    cfg, w, top = dataclasses.replace(CARD, step_floor=floor), matrix(6, 16, scale, seed), 2 ** (bits - 1) - 1
    codes, steps = t.quantize_rows(w, bits, cfg)
    assert codes.dtype == torch.int8 and steps.dtype == torch.float16 and codes.abs().max() <= top
    restored = t.dequantize_rows(codes, steps).double().numpy()
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
    searched, plain = (t.dequantize_rows(*t.quantize_rows(w, 4, c)) for c in (FREE, one))
    better = (searched - w).square().sum(1) < (plain - w).square().sum(1)
    assert ((searched - w).square().sum(1) <= (plain - w).square().sum(1)).all() and better[1::2].any()
    shares = t.quantize_rows(w, 4, FREE)[1] / t.quantize_rows(w, 4, one)[1]
    assert len(shares.unique()) > 1


def test_unclipped_weights_are_off_by_at_most_half_a_step():
    w = matrix()
    codes, steps = t.quantize_rows(w, 6, dataclasses.replace(FREE, clip_shares=(1.0,)))
    error = (t.dequantize_rows(codes, steps) - w).abs() / steps.float()[:, None]
    assert error.max() < 0.52  # the step itself is rounded to fp16


def test_the_floor_is_the_published_step_of_small_rows():
    _, steps = t.quantize_rows(matrix(scale=0.01), 6, CARD)
    assert (steps == torch.tensor(1 / 31).half()).all()
    assert t.quantize_rows(matrix(scale=0.01), 6, FREE)[1].max() < 1 / 310


def test_quantizing_twice_changes_nothing():
    cfg = dataclasses.replace(FREE, clip_shares=(1.0,))
    once = t.dequantize_rows(*t.quantize_rows(matrix(), 6, cfg))
    assert torch.equal(t.dequantize_rows(*t.quantize_rows(once, 6, cfg)), once)
    assert not t.quantize_rows(torch.zeros(2, 3), 6, FREE)[0].any()


def exported(model, cfg):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return t.dequantize(t.quantize(weights, t.code_bits(model, cfg), cfg))


def test_what_is_coded_and_how_wide(cfg):
    model = make_model(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tensors = t.quantize(weights, t.code_bits(model, dataclasses.replace(cfg, embed_bits=16)), cfg)
    assert tensors["tok_emb.weight"].dtype == torch.float16 and tensors["blocks.0.attn.q_gain"].dtype == torch.float16
    assert tensors["blocks.0.mlp.fc.weight.codes"].abs().max() <= 31
    eight = t.quantize(weights, t.code_bits(model, cfg), cfg)["tok_emb.weight.codes"]
    assert 31 < eight.abs().max() <= 127
    assert {n: w.shape for n, w in exported(model, cfg).items()} == {n: w.shape for n, w in weights.items()}


def test_late_qat_trains_on_exactly_the_export_grid(cfg):
    model = make_model(cfg)
    ids, targets = ids_of(cfg), ids_of(cfg, seed=1)
    matrices = {n: w for n, w in exported(model, cfg).items() if t.parameter_roles(model)[n] == "matrix"}
    rounded = t.GPT(cfg)
    rounded.load_state_dict({**model.state_dict(), **matrices})
    torch.testing.assert_close(t.fake_quantized(model, cfg)(ids, targets), rounded(ids, targets), rtol=1e-5, atol=1e-5)


def test_late_qat_changes_the_loss_and_lets_gradients_through(cfg):
    cfg = dataclasses.replace(cfg, matrix_bits=4)
    model = make_model(cfg)
    ids, targets = ids_of(cfg), ids_of(cfg, seed=1)
    plain, rounded = model(ids, targets).mean(), t.fake_quantized(model, cfg)(ids, targets).mean()
    assert abs(plain - rounded) > 1e-3
    rounded.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert model(ids, targets).mean() == plain  # the weights themselves were not touched


def test_a_straight_through_gradient_is_that_of_the_rounded_weights(cfg):
    model = make_model(cfg)
    ids, targets = ids_of(cfg), ids_of(cfg, seed=1)
    t.fake_quantized(model, cfg)(ids, targets).mean().backward()
    roles, export = t.parameter_roles(model), exported(model, cfg)
    rounded = t.GPT(cfg)
    rounded.load_state_dict({n: export[n] if roles[n] == "matrix" else p for n, p in model.state_dict().items()})
    rounded(ids, targets).mean().backward()
    for (name, p), q in zip(model.named_parameters(), rounded.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("threshold, changes", [(0.0, False), (2.0, True)])
def test_a_threshold_of_zero_never_quantizes_and_of_two_always_does(cfg, log, threshold, changes):
    from test_optimizer import trainer_of

    def loss_of(late_qat_threshold):
        trainer = trainer_of(dataclasses.replace(cfg, iterations=3, warmup_steps=0, matrix_bits=3, late_qat_threshold=late_qat_threshold))
        calls = []
        trainer.forward = {q: lambda x, y, q=q, f=f: calls.append(q) or f(x, y) for q, f in trainer.forward.items()}
        t.train(trainer, None, log)
        return set(calls)

    assert loss_of(threshold) == {changes}
