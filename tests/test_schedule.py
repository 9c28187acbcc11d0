import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    """In PR #150 a first step of 31 s made the rate start at 0.006: the mean of all steps was the pace."""
    fake = FakeTime(monkeypatch)
    clock = t.Clock(torch.device("cpu"), first_step_seconds=0.08)
    for step in range(500):
        assert t.lr_scale(step, clock.seconds(), clock.step_seconds, CARD) == 1.0
        fake.now += 31.0 if step == 0 else 0.08
        clock.lap()
    assert clock.step_seconds == pytest.approx(0.08)


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
    for elapsed, scale in ((0.0, 1.0), (599.0, 0.1)):  # unless asked to, it heeds neither the clock nor the rate
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
