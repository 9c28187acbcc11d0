import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import train_gpt as t


def trainer_of(cfg):
    model = t.GPT(cfg)
    model.init_weights(cfg)
    return t.Trainer(model, t.Batches(t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size), cfg, t.Ranks()), cfg, t.Ranks())


@pytest.mark.parametrize("shape", [(1, 512, 256), (3, 512, 256), (1, 256, 512)])
def test_singular_values_of_an_orthogonalized_matrix_are_near_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(t.orthogonalize(g, 5))
    assert 0.6 < values.min() and values.max() < 1.25
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    cosine = (t.orthogonalize(g, 5) * (u @ vh)).sum((-2, -1)) / (u @ vh).norm(dim=(-2, -1)) / t.orthogonalize(g, 5).norm(dim=(-2, -1))
    assert cosine.min() > 0.97


def test_newton_schulz_is_its_polynomial_of_the_singular_values():
    """For diagonal matrices, whose singular values are their entries."""
    values = np.geomspace(3e-3, 1, 200)
    x = values / (np.sqrt((values**2).sum()) + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    np.testing.assert_allclose(t.orthogonalize(torch.diag(torch.from_numpy(values))[None], 5)[0], np.diag(x), atol=1e-9)
    assert np.abs(np.log(x[values > 0.05])).max() < 0.45


def test_a_stack_is_orthogonalized_matrix_by_matrix():
    g = torch.randn(4, 24, 16)
    torch.testing.assert_close(t.orthogonalize(g, 5), torch.cat([t.orthogonalize(m[None], 5) for m in g]))


def muon_by_hand(w, grads, lr, momentum, decay):
    """components.md 5.1 and 5.2 in float64."""
    buffer = np.zeros_like(w)
    for g in grads:
        buffer = momentum * buffer + g
        u = g + momentum * buffer
        x = u.T if u.shape[0] > u.shape[1] else u
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            s = x @ x.T
            x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
        x = x.T if u.shape[0] > u.shape[1] else x
        w = w * (1 - lr * decay) - lr * max(1, u.shape[0] / u.shape[1]) ** 0.5 * x
    return w


def test_muon_steps_as_the_formula_says(cfg):
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((24, 8), (8, 24), (24, 8))]
    start = [p.detach().double().numpy().copy() for p in params]
    groups = [dict(params=params[i::2], lr=0.05, base_lr=0.05, weight_decay=0.1) for i in (0, 1)]  # of one shape each
    muon = t.Muon(groups, t.Ranks(), cfg, torch.float32)
    history = [[torch.randn(p.shape, generator=draw) for p in params] for _ in range(3)]
    for grads in history:
        for p, g in zip(params, grads):
            p.grad = g.clone()
        with torch.no_grad():
            muon.apply_updates(muon.start_all_gather([share for _, share in muon.start_reduce_scatter()], torch.ones(()), torch.tensor(0.9)), torch.ones(()))
    for i, p in enumerate(params):
        expected = muon_by_hand(start[i], [grads[i].double().numpy() for grads in history], 0.05, 0.9, 0.1)
        np.testing.assert_allclose(p.detach().numpy(), expected, atol=1e-4)


def test_every_parameter_is_stepped_by_exactly_one_group(cfg):
    optimizers = trainer_of(cfg).optimizers
    owned = [id(p) for o in (optimizers.muon, optimizers.adam) for g in o.param_groups for p in g["params"]]
    model = trainer_of(cfg).model
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))


def test_gains_do_not_decay_unless_asked_to(cfg):
    for decay in (0.0, 0.5):
        trainer = trainer_of(dataclasses.replace(cfg, adam_wd=decay, scalar_lr=0.1))
        for p in trainer.model.parameters():
            p.grad = torch.zeros_like(p)
        trainer.optimizers.step(1.0, 0.9)
        assert float(trainer.model.skip_weights.detach()[0, 0]) == (1.0 if decay == 0 else pytest.approx(0.95))


def test_the_joint_norm_is_clipped_and_reported(cfg):
    trainer = trainer_of(dataclasses.replace(cfg, grad_clip_norm=0.5))
    draw = torch.Generator().manual_seed(0)
    for p in trainer.model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)
    raw = {p: p.grad.clone() for p in trainer.model.parameters()}
    before = math.sqrt(sum(float(p.grad.double().square().sum()) for p in trainer.model.parameters()))
    assert float(trainer.optimizers.step(1.0, 0.9)) == pytest.approx(before, rel=1e-4)
    optimizers = trainer.optimizers
    exp_avgs = {p: optimizers.adam.state[p]["exp_avg"] for g in optimizers.adam.param_groups for p in g["params"]}
    for p, exp_avg in exp_avgs.items():
        torch.testing.assert_close(exp_avg, 0.1 * raw[p] * 0.5 / before)
    buffers = [g["buffer"] for g in optimizers.muon.param_groups]
    after = math.sqrt(sum(float(g.double().square().sum()) for g in [10 * e for e in exp_avgs.values()] + buffers))
    assert after == pytest.approx(0.5, rel=1e-3)


def test_no_clip_leaves_gradients_bit_identical(cfg):
    trainer = trainer_of(dataclasses.replace(cfg, grad_clip_norm=0.0))
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, 3.0)
    trainer.optimizers.step(0.0, 0.0)
    for group in trainer.optimizers.muon.param_groups:
        for slot, p in zip(group["buffer"], group["params"]):
            inside = slot[: p.size(0), : p.size(1)]
            assert (inside == 3).all() and slot.sum() == inside.sum()  # beside a smaller one nothing


def test_a_broken_gradient_does_not_break_the_weights(cfg):
    trainer = trainer_of(cfg)
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    assert not math.isfinite(trainer.optimizers.step(1.0, 0.9))
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_every_parameter_has_a_gradient_within_three_steps(cfg):
    trainer = trainer_of(dataclasses.replace(cfg, grad_clip_norm=0.0))
    alive = set()
    inner = trainer.optimizers.step

    def spy(scale, momentum):
        alive.update(name for name, p in trainer.model.named_parameters() if p.grad.abs().max() > 0)
        return inner(scale, momentum)

    trainer.optimizers.step = spy
    for _ in range(3):
        trainer.step(1.0, 0.9)
    assert alive == {name for name, _ in trainer.model.named_parameters()}


def state_of(trainer):
    weights, position = trainer.model.state_dict(), trainer.batches.step
    muon, adam = trainer.optimizers.muon.state_dict(), trainer.optimizers.adam.state_dict()
    tensors = list(weights.values()) + [v for entry in adam["state"].values() for v in entry.values()] + [g["buffer"] for g in muon["param_groups"]]
    groups = [{k: v for k, v in g.items() if k not in ("params", "buffer")} for s in (muon, adam) for g in s["param_groups"]]
    return tensors, position, groups, next(trainer.batches)


@pytest.mark.parametrize("trained", [0, 2])
def test_warm_up_leaves_weights_optimizers_and_data_bit_identical(cfg, log, trained):
    one, other = trainer_of(cfg), trainer_of(cfg)
    for trainer in (one, other):
        for _ in range(trained):
            trainer.step(0.7, 0.9)
    one.warm_up(log)
    assert not one.qat and not one.looped
    for (a, position, groups, batch), (b, position_b, groups_b, batch_b) in [(state_of(one), state_of(other))]:
        assert position == position_b and groups == groups_b and len(a) == len(b)
        assert all(torch.equal(x, y) for x, y in zip(a, b)) and all(torch.equal(x, y) for x, y in zip(batch, batch_b))
    assert torch.equal(torch.cat([v.flatten() for v in one.average.values.values()]), torch.cat([v.flatten() for v in other.average.values.values()]))


def steps_in_processes(env, out, processes):
    """Losses and weights after 20 steps, as tests/helpers/steps.py leaves them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*launcher, str(ROOT / "tests" / "helpers" / "steps.py"), str(out)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    with np.load(out) as file:
        return dict(file)


@pytest.mark.slow
def test_one_and_several_processes_take_the_same_steps_and_repeat_them_exactly(env, tmp_path):
    import os

    env = os.environ | env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    runs = [steps_in_processes(env, tmp_path / f"{i}.npz", n) for i, n in enumerate((1, 1, 2))]
    again, other = runs[1], runs[2]
    for name, value in runs[0].items():
        assert np.array_equal(value, again[name]), name
        # Adam divides a gradient by its own size and late QAT rounds: both magnify the last bit, which the losses hardly feel
        tolerance = dict(losses=1e-5, late=1e-3).get(name, 1e-4)
        np.testing.assert_allclose(other[name], value, rtol=0, atol=tolerance, err_msg=name)
    assert runs[0]["losses"][-1] < runs[0]["losses"][0] - 0.2
