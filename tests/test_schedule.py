import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_variants import PUBLISHED

import train_gpt as t

CARD = t.Config()


def test_the_rate_falls_linearly_to_zero_at_the_clocks_limit():
    steady = 0.08  # seconds a step: 7,500 steps fit, so the warmdown begins at 4,000
    curve = [t.lr_scale(s, s * steady, steady, CARD) for s in range(7501)]
    assert curve[:4001] == [1.0] * 4001 and curve[-1] == pytest.approx(0, abs=1e-9)
    assert curve[4000 + 1750] == pytest.approx(0.5)
    assert all(a >= b for a, b in zip(curve, curve[1:]))


def test_without_a_limit_it_falls_over_the_last_iterations():
    cfg = dataclasses.replace(CARD, max_wallclock_seconds=0, iterations=5000, warmdown_iters=1000)
    assert [t.lr_scale(s, 1e9, 1.0, cfg) for s in (0, 4000, 4500, 5000)] == [1.0, 1.0, 0.5, 0.0]


def test_a_share_of_the_run_may_be_given_instead():
    cfg = dataclasses.replace(CARD, warmdown_iters=0, warmdown_frac=0.5)
    assert [t.lr_scale(10, e, 1.0, cfg) for e in (0, 300, 450, 600)] == [1.0, 1.0, 0.5, 0.0]


@given(st.integers(0, 10_000), st.floats(0, 700), st.floats(0, 10))
def test_without_a_warmdown_the_rate_stays_and_with_one_it_is_a_share(step, elapsed, pace):
    assert t.lr_scale(step, elapsed, pace, dataclasses.replace(CARD, warmdown_iters=0)) == 1.0
    assert 0 <= t.lr_scale(step, elapsed, pace, CARD) <= 1


class FakeTime:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(t, "perf_counter", lambda: self.now)


def test_a_slow_first_step_does_not_derail_the_rate(monkeypatch):
    """With the mean of all steps, a first step of 31 s (seen in PR #150) would start the rate at 0.006."""
    fake = FakeTime(monkeypatch)
    clock = t.Clock(torch.device("cpu"), first_step_seconds=0.08)
    for step in range(500):
        assert t.lr_scale(step, clock.seconds(), clock.step_seconds, CARD) == 1.0
        fake.now += 31.0 if step == 0 else 0.08
        clock.lap()
    assert clock.step_seconds == pytest.approx(0.08)


@pytest.mark.parametrize("setting, device, seconds, compiler, expected", [
    ("auto", "cuda", 600, None, True), ("auto", "cpu", 600, "g++", False), ("auto", "cpu", 601, "g++", True), ("auto", "cpu", 601, None, False),
    ("auto", "cpu", 0, "g++", False), ("on", "cpu", 1, "g++", True), ("on", "cuda", 1, None, True),
    ("off", "cuda", 600, "g++", False), ("off", "cpu", 900, "g++", False)])
def test_auto_compiles_on_a_gpu_and_in_long_runs_on_a_cpu_that_has_a_compiler(monkeypatch, setting, device, seconds, compiler, expected):
    monkeypatch.setattr(t.shutil, "which", lambda name: compiler)
    cfg = dataclasses.replace(CARD, compile=setting, max_wallclock_seconds=seconds)
    assert t.Ranks(device=torch.device(device)).compiles(cfg) is expected


def test_compile_on_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(t.shutil, "which", lambda name: None)
    with pytest.raises(t.InputError, match="COMPILE=on needs a C[+][+] compiler; .*COMPILE=off"):
        t.Ranks().compiles(dataclasses.replace(CARD, compile="on"))


SHORT = dataclasses.replace(CARD, max_wallclock_seconds=600.0, iterations=20_000, warmdown_iters=3500, averaging="ema")


@pytest.mark.parametrize("changes, step_seconds, words", [
    ({}, 0.09, []), ({}, 0.56, ["about 1070 steps fit, fewer than WARMDOWN_ITERS=3500: the learning rate starts at 31 %.*MAX_WALLCLOCK_SECONDS=4800"]),
    (dict(max_wallclock_seconds=4800.0), 0.56, []), (dict(warmdown_iters=0, warmdown_frac=0.5), 0.56, []),
    (dict(max_wallclock_seconds=0.0, iterations=1000), 0.56, ["about 1000 steps fit"]),
    (dict(warmdown_iters=0), 0.09, ["never falls below LATE_QAT_THRESHOLD=0.15"]), (dict(warmdown_iters=0, late_qat_threshold=0.0), 0.09, []),
    (dict(warmdown_iters=3), 0.09, ["never falls below LATE_QAT_THRESHOLD=0.15"]), (dict(warmdown_iters=0, late_qat_threshold=2.0), 0.09, []),
    (dict(averaging="swa"), 0.09, []), (dict(averaging="swa", swa_every=5000), 0.09, ["SWA takes no snapshot; lower SWA_EVERY=5000"]),
    (dict(averaging="swa", warmdown_iters=0, late_qat_threshold=0.0), 0.09, ["SWA takes no snapshot"])], ids=str)
def test_schedules_that_never_act_in_the_time_are_told(changes, step_seconds, words):
    found = t.schedule_warnings(step_seconds, dataclasses.replace(SHORT, **changes))
    assert len(found) == len(words) and all(re.search(wanted, text) for wanted, text in zip(words, found)), found


@pytest.mark.parametrize("seconds", [0.01, 0.09, 0.56, 3.0])
def test_the_predicted_start_of_the_rate_is_the_one_that_training_takes(seconds):
    """The number of steps until the time limit and the rate of the first step, by the functions of the training loop."""
    cfg, elapsed, steps = dataclasses.replace(SHORT, warmdown_iters=10**6), 0.0, 0
    while steps < cfg.iterations and not (steps and t.out_of_time(elapsed, seconds, cfg)):
        elapsed, steps = elapsed + seconds, steps + 1
    text = t.schedule_warnings(seconds, cfg)[0]
    assert abs(int(re.search(r"about (\d+) steps", text)[1]) - steps) <= 1
    assert f"starts at {100 * t.lr_scale(0, 0.0, seconds, cfg):.0f} %" in text


def test_paused_time_does_not_count(monkeypatch):
    fake = FakeTime(monkeypatch)
    clock = t.Clock(torch.device("cpu"), 1.0)
    fake.now = 5.0
    with clock.paused():
        fake.now = 100.0
    fake.now += 2.0
    clock.lap()
    assert clock.seconds() == 7.0 and list(clock.laps) == [1.0, 2.0]


def test_training_stops_before_the_limit_even_if_one_step_is_still_running():
    assert not t.out_of_time(597.9, 1.0, CARD) and t.out_of_time(598.1, 1.0, CARD)
    assert not t.out_of_time(1e9, 1.0, dataclasses.replace(CARD, max_wallclock_seconds=0))


def test_momentum_warms_up_linearly():
    for elapsed, scale in ((0.0, 1.0), (599.0, 0.1)):  # the defaults depend neither on the clock nor on the rate
        assert [t.muon_momentum(s, elapsed, scale, CARD) for s in (0, 750, 1500, 9000)] == pytest.approx([0.92, 0.955, 0.99, 0.99])
        assert t.muon_momentum(0, elapsed, scale, dataclasses.replace(CARD, muon_momentum_warmup_steps=0)) == 0.99


def averaged(cfg, scales):
    """The average after steps whose weights are 1, 2, 3, ... at these rates, and its number of updates."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    average = t.Average(model)
    for step, scale in enumerate(scales, 1):
        model.weight.data.fill_(step)
        average.update(t.average_weight(step, scale, average.count, cfg))
    return float(average.values["weight"]), average.count


def test_ema_is_the_textbooks():
    expected = 0.0
    for step in range(1, 41):
        expected = 0.9 * expected + 0.1 * step
    assert averaged(dataclasses.replace(CARD, ema_decay=0.9), [1.0] * 40) == (pytest.approx(expected, rel=1e-5), 40)


def test_swa_is_the_mean_of_the_late_snapshots():
    cfg = dataclasses.replace(CARD, averaging="swa", swa_every=5, swa_start_scale=0.5)
    scales = [1 - s / 40 for s in range(1, 41)]
    snapshots = [s for s in range(1, 41) if s % 5 == 0 and 1 - s / 40 < 0.5]
    value, count = averaged(cfg, scales)
    assert value == pytest.approx(sum(snapshots) / len(snapshots)) and count == len(snapshots)


def test_last_and_a_decay_of_zero_follow_the_weights():
    assert averaged(dataclasses.replace(CARD, averaging="last"), [1.0] * 7)[0] == 7
    assert averaged(dataclasses.replace(CARD, ema_decay=0.0), [1.0] * 7)[0] == 7
    assert math.isclose(averaged(dataclasses.replace(CARD, ema_decay=1.0), [1.0] * 7)[0], 0)


# ---------------------------------------- pr1812, and neutral values

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
    assert t.muon_momentum(5500, 0.0, 1.0, PR1812_ROW) == pytest.approx(0.955)  # by steps if they are further than the clock


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


def test_the_rate_falls_to_its_floor_and_stays(cfg):
    cfg = dataclasses.replace(cfg, iterations=100, warmdown_iters=0, warmdown_frac=0.5, max_wallclock_seconds=0.0)
    rates = {floor: [t.lr_scale(step, 0.0, 1.0, dataclasses.replace(cfg, min_lr=floor)) for step in range(101)] for floor in (0.0, 0.1)}
    assert rates[0.1] == [max(rate, 0.1) for rate in rates[0.0]] and rates[0.1][-1] == 0.1 and rates[0.0][-1] == 0.0


@pytest.mark.parametrize("variant", PUBLISHED)
def test_late_qat_and_the_loops_switch_on_once_at_their_time_and_stay(variant):
    cfg, said = t.Config.from_env({"VARIANT": variant}), []
    batches = SimpleNamespace(seq_len=cfg.train_seq_len)
    trainer = SimpleNamespace(cfg=cfg, qat=False, looped=False, batches=batches, model=SimpleNamespace(looped_order=[]))
    shares = [(i + 0.5) / 1000 for i in range(1000)]
    seen = []
    for step, share in enumerate(shares):
        t.Trainer.switch(trainer, step, share, 1 - share**2, said.append)
        seen.append((trainer.qat, trainer.looped))
    qat_from = dict(pr150=0.0, pr455=0.9, pr490=0.85, pr1127=0.85, pr1812=4.0)[variant] ** 0.5  # where the rate is 1 - share**2
    loops_from = 0.35 if variant == "pr1812" else 2.0
    assert seen == [(share >= qat_from, share >= loops_from) for share in shares]
    assert len(said) == (qat_from < 2) + (loops_from < 2)
