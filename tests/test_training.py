"""The training loop against recurrences by hand, and its results: the average, its artifact, its scores."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, finals, make_model, run

import train_gpt as t

BUILT_IN = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def trainer_of(cfg):
    batches = t.Batches(t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size), cfg, t.Ranks())
    return t.Trainer(make_model(cfg), batches, cfg, t.Ranks())


def gradients_of(trainer, monkeypatch):
    """Loss and gradients by name of the next step, which does not change the weights."""
    seen = {}

    def keep(scale, momentum):
        seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        return torch.ones(())

    monkeypatch.setattr(trainer.optimizers, "step", keep)
    return trainer.step(1.0, 0.9).value(), seen


def test_a_batch_in_pieces_has_the_loss_and_the_gradient_of_the_whole(cfg, monkeypatch):
    whole, *pieces = (gradients_of(trainer_of(dataclasses.replace(cfg, micro_batch_tokens=n)), monkeypatch) for n in (256, 128, 64, 32))
    ids, targets = trainer_of(dataclasses.replace(cfg, micro_batch_tokens=256)).batches.load(0, 32, 1)
    assert len(ids) == 1 and whole[0] == pytest.approx(float(make_model(cfg)(ids[0], targets[0]).detach().mean()), abs=1e-5)
    for loss, gradients in pieces:
        assert loss == pytest.approx(whole[0], abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[1][name], rtol=1e-3, atol=1e-5)


def test_no_gradient_outlives_what_it_was_for(cfg, log):
    trainer = trainer_of(dataclasses.replace(cfg, quantizer="gptq", mean_scale=0.02, matrix_bits=8, num_loops=1, loop_start=1, loop_end=2))
    for work in (lambda: trainer.step(1.0, 0.9), lambda: trainer.warm_up(log), trainer.collect):
        work()
        assert all(p.grad is None for p in trainer.model.parameters())


def test_a_broken_gradient_under_a_finite_loss_shows_in_its_place(cfg):
    trainer = trainer_of(cfg)
    assert math.isfinite(trainer.step(1.0, 0.9).value())
    trainer.model.skip_weights.register_hook(lambda gradient: gradient * math.nan)
    assert not math.isfinite(trainer.step(1.0, 0.9).value())
    assert all(p.isfinite().all() for p in trainer.model.parameters())


class Sum(t.Ranks):
    """Two ranks with equal tensors."""
    def sum_(self, tensor):
        return tensor.mul_(2)


def test_the_loss_is_the_mean_over_ranks(cfg):
    one, both = trainer_of(cfg), trainer_of(cfg)
    both.ranks = Sum(0, 2)
    assert both.step(1.0, 0.9).value() == one.step(1.0, 0.9).value()


def trained(cfg, log, monkeypatch):
    """The trainer after `train`, and rate and weights after each of its steps."""
    trainer, history = trainer_of(cfg), []
    inner = trainer.step

    def step(scale, momentum):
        reading = inner(scale, momentum)
        history.append((scale, {name: p.detach().clone().double() for name, p in trainer.model.named_parameters()}))
        return reading

    monkeypatch.setattr(trainer, "step", step)
    t.train(trainer, None, log)
    return trainer, history


@pytest.fixture
def short(cfg):
    return dataclasses.replace(cfg, iterations=11, warmdown_iters=10, warmup_steps=0, max_wallclock_seconds=0, val_loss_every=0)


def test_the_average_is_that_of_the_weights_after_each_step(short, log, monkeypatch):
    trainer, history = trained(short, log, monkeypatch)
    expected = {name: p.detach().double() for name, p in make_model(short).named_parameters()}
    for _, weights in history:
        expected = {name: 0.8 * old + 0.2 * weights[name] for name, old in expected.items()}
    assert len(history) == 11
    for name, value in trainer.average.values.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_snapshots_are_taken_of_every_so_many_steps(short, log, monkeypatch):
    trainer, history = trained(dataclasses.replace(short, averaging="swa", swa_every=3, swa_start_scale=0.65), log, monkeypatch)
    taken = [weights for i, (scale, weights) in enumerate(history, 1) if i % 3 == 0 and scale < 0.65]
    assert trainer.average.count == len(taken) == 2
    for name, value in trainer.average.values.items():
        torch.testing.assert_close(value.double(), sum(weights[name] for weights in taken) / 2, rtol=1e-5, atol=1e-6)


def test_without_a_snapshot_the_last_weights_stand_in(short, log, monkeypatch):
    trainer, history = trained(dataclasses.replace(short, averaging="swa", swa_every=1000), log, monkeypatch)
    for name, value in trainer.average.values.items():
        torch.testing.assert_close(value.double(), history[-1][1][name], rtol=0, atol=0)


def test_the_last_steps_loss_is_looked_at(short, log, monkeypatch):
    trainer = trainer_of(short)
    losses = iter([1.0] * 10 + [math.nan])
    monkeypatch.setattr(trainer, "step", lambda scale, momentum: t.AsyncScalar(torch.tensor(next(losses))))
    with pytest.raises(t.TrainingFailed, match="the loss is nan at step 11;"):
        t.train(trainer, None, log)


def test_one_step_is_taken_however_little_time_there_is(short, log):
    t.train(trainer_of(dataclasses.replace(short, max_wallclock_seconds=1e-6)), None, log)
    assert log.facts["steps"] == 1


def test_the_rate_ends_where_gptq_begins():
    cfg = t.Config(quantizer="gptq", gptq_reserve_seconds=100.0, max_wallclock_seconds=600.0, warmdown_iters=1000)
    # 0.1 s a step: the warmdown takes the last 100 of 500 s
    assert [t.lr_scale(0, elapsed, 0.1, cfg) for elapsed in (399, 400, 450, 500, 550)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert [t.lr_scale(0, elapsed, 0.1, dataclasses.replace(cfg, quantizer="rtn")) for elapsed in (500, 550, 600)] == pytest.approx([1, 0.5, 0])
    assert not t.out_of_time(499.7, 0.1, cfg) and t.out_of_time(499.9, 0.1, cfg)


def test_validation_takes_no_time_of_training(short, monkeypatch, log):
    cfg = dataclasses.replace(short, max_wallclock_seconds=100.0, val_loss_every=2, iterations=6)
    trainer, now = trainer_of(cfg), [0.0]
    monkeypatch.setattr(t, "perf_counter", lambda: now[0])

    def step(scale, momentum):
        now[0] += 1.0
        return t.AsyncScalar(torch.ones(()))

    def validate():
        now[0] += 40.0

    monkeypatch.setattr(trainer, "step", step)
    t.train(trainer, validate, log)
    assert log.facts["steps"] == 6 and log.facts["train_seconds"] == 6.0


# ---- results

def diagnostic(text, kind):
    return float(re.search(rf"^DIAGNOSTIC {kind} .*val_bpb:(\S+)", text, re.M)[1])


def test_the_average_is_what_is_exported_and_reported(env, tmp_path):
    end = "        weights = trainer.average.values\n"
    assert BUILT_IN.count(end) == 1
    (script := tmp_path / "train_gpt.py").write_text(BUILT_IN.replace(end, f"        save_checkpoint(trainer, 'average', log)\n{end}"))
    text = run(env | dict(EMA_DECAY="0.95", TTT_EPOCHS="0"), script=script).stdout
    average, artifact = (t.unpack((tmp_path / f"final_model.{kind}.ptz").read_bytes())[1] for kind in ("average", "int6"))
    cfg = t.Config.from_env(env)
    expected = t.quantize(average, t.quant_plans(average, t.quant_specs(t.GPT(cfg), cfg), cfg, {}))
    assert artifact.keys() == expected.keys() and all(torch.equal(artifact[name], tensor) for name, tensor in expected.items())
    own = {k: env[k] for k in ("DATA_PATH", "TOKENIZER_PATH")} | dict(EVAL_ONLY="1", OUTPUT_DIR=str(tmp_path), VAL_MAX_TOKENS="700", TTT_EPOCHS="0")
    scores = finals(run(own | dict(ARTIFACT=str(tmp_path / "final_model.average.ptz"), RUN_ID="average")).stdout)
    assert diagnostic(text, "post_ema") == pytest.approx(scores["final_int6_roundtrip"], abs=6e-5)
    assert abs(diagnostic(text, "raw") - diagnostic(text, "post_ema")) > 0.02


@pytest.mark.parametrize("scope", ["stream", "document"])
def test_every_evaluation_loops_if_the_model_was_trained_to(cfg, log, scope, monkeypatch):
    changes = dict(stream=dict(ttt_lora_rank=0), document=dict(
        ttt_lora_rank=2, ttt_params=t.Config.ttt_params, ttt_chunk_tokens=16, ttt_grad_clip=0.0, ttt_optimizer="adamw"))[scope]
    cfg = dataclasses.replace(cfg, num_loops=2, loop_start=1, loop_end=2, ttt_scope=scope, ttt_lr=0.0, val_max_tokens=200, **changes)

    def scores(looped, order):
        model = make_model(cfg)
        model.order, model.looped_order = order
        monkeypatch.setattr(t, "load_model", lambda *args: model)
        scored = t.run_evaluation(t.Artifact(cfg, {}, looped, "", 0, []), t.Scorer(t.read_validation(cfg), cfg, t.Ranks(), log), 0.0, t.Ranks(), log)
        return np.array([score.loss for score in scored.values()])

    plain, looped = t.layer_order(cfg, False), t.layer_order(cfg, True)
    as_plain, as_looped = scores(False, (plain, plain)), scores(True, (looped, looped))
    assert (abs(as_plain - as_looped) > 1e-4).all() and len(as_plain) == 3
    assert np.array_equal(scores(False, (plain, looped)), as_plain) and np.array_equal(scores(True, (plain, looped)), as_looped)


def test_the_loss_that_is_added_up_and_shown_keeps_no_graph(cfg, monkeypatch):
    summed, real = [], t.Ranks.sum_
    monkeypatch.setattr(t.Ranks, "sum_", lambda ranks, tensor: real(ranks, summed.append(tensor) or tensor))
    trainer = trainer_of(dataclasses.replace(cfg, micro_batch_tokens=64))
    trainer.step(1.0, 0.9)
    assert any(tensor.ndim == 0 for tensor in summed) and not any(tensor.requires_grad for tensor in summed)


@pytest.mark.parametrize("value", [2.0**24 + 1, 2.0**31 + 1, 2.0**53 - 1, 16_000_001.0, 1e-300])
def test_the_largest_of_all_ranks_is_an_exact_number(value):
    assert t.Ranks().maximum(value, 0.5) == [value, 0.5]
