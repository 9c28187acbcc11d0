"""GPTQ, the clip by standard deviations, pruning, and the Hessians that training leaves behind."""

import dataclasses
import itertools
import math
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import coded, coded_rows, make_model, run
from helpers.smoke import SMOKE
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

CFG = t.Config.from_env(SMOKE)
EVEN = t.QuantSpec(4, 8.0)  # a step so coarse that the rounding matters, wide enough to clip nothing


def gaussian(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def hessian_of(cols, correlation=0.8, seed=1):
    """Second moment of inputs whose neighbours are correlated and whose scales differ."""
    at = torch.arange(cols)
    covariance = correlation ** (at[:, None] - at).abs().float()
    x = gaussian(4 * cols, cols, seed) @ torch.linalg.cholesky(covariance).T * torch.linspace(0.5, 2, cols)
    return x.T @ x


def gptq_by_hand(w, steps, top, hessian, damping):
    """arXiv:2210.17323 without any of its speed-ups: OBQ's inverse, from which each quantized column is eliminated, in float64."""
    w, h = w.double().numpy().copy(), hessian.double().numpy().copy()
    h[np.diag_indices_from(h)] += damping * np.diag(h).mean()
    inverse, codes, left = np.linalg.inv(h), np.zeros_like(w), list(range(len(h)))
    for j in sorted(left, key=lambda i: -h[i, i]):
        codes[:, j] = np.clip(np.round(w[:, j] / steps), -top, top)
        error = (w[:, j] - codes[:, j] * steps) / inverse[j, j]
        w -= np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def output_error(w, codes, steps, hessian):
    off = (t.dequantize_rows(codes, steps, torch.ones(1)) - w).double()
    return float((off @ hessian.double() * off).sum())


@pytest.mark.parametrize("block", [1, 5, 16, 48, 1000])
@pytest.mark.parametrize("grid", [EVEN, t.QuantSpec(6, 12.85), t.QuantSpec(3, 2.0), t.QuantSpec(6, 0.0)])
def test_the_codes_are_those_of_the_elimination_of_one_column_at_a_time(block, grid, monkeypatch):
    w, hessian, cfg = gaussian(40, 48), hessian_of(48), dataclasses.replace(CFG, gptq_damping=0.02)
    monkeypatch.setattr(t, "GPTQ_BLOCK", block)
    codes, steps = coded_rows(w, grid, cfg, hessian)
    expected = gptq_by_hand(w, steps.double().numpy(), grid.max_code, hessian, 0.02)
    assert codes.dtype == torch.int8 and steps.dtype == torch.float16
    assert (codes.numpy() != expected).mean() < 1e-3
    assert (codes != coded_rows(w, grid, cfg)[0]).float().mean() > 0.05


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 9), cols=st.integers(2, 40), block=st.integers(1, 50), bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_the_size_of_a_block_changes_nothing(rows, cols, block, bits, seed):
    w, hessian = gaussian(rows, cols, seed), hessian_of(cols, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "GPTQ_BLOCK", block)
        codes, steps = coded_rows(w, t.QuantSpec(bits, 4.0), CFG, hessian)
        patch.setattr(t, "GPTQ_BLOCK", cols)
        whole, same = coded_rows(w, t.QuantSpec(bits, 4.0), CFG, hessian)
    assert torch.equal(steps, same) and (codes != whole).float().mean() < 0.01


@pytest.mark.parametrize("correlation, times", [(0.85, 2), (0.95, 3), (0.99, 10)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_beats_rounding_by_far_where_inputs_are_correlated(correlation, times, seed):
    w, hessian = gaussian(64, 96, seed), hessian_of(96, correlation, seed + 1)
    rounded, gptq = (coded_rows(w, EVEN, CFG, h) for h in (None, hessian))
    assert torch.equal(rounded[1], gptq[1])
    assert output_error(w, *rounded, hessian) > times * output_error(w, *gptq, hessian)


def test_it_rounds_to_the_nearest_where_inputs_are_independent():
    w = gaussian(64, 96)
    for scale in (1.0, 1e-6, 1e6):
        assert torch.equal(coded_rows(w, EVEN, CFG, scale * torch.eye(96))[0], coded_rows(w, EVEN, CFG)[0])


@pytest.mark.parametrize("dead", [[3], [0, 47], [*range(1, 48)], [*range(48)]])
def test_a_column_that_no_input_reaches_is_coded_as_zero(dead):
    w, hessian = gaussian(8, 48), hessian_of(48)
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    codes, steps = coded_rows(w, EVEN, CFG, hessian)
    alive = [j for j in range(48) if j not in dead]
    assert not codes[:, dead].any() and steps.isfinite().all() and (not alive or codes[:, alive].any())
    assert torch.equal(steps, coded_rows(w, EVEN, CFG)[1])
    if 1 < len(alive):  # the others are coded as if the dead ones were not there; the damping is a share of the mean of all
        cfg = dataclasses.replace(CFG, gptq_damping=CFG.gptq_damping * len(alive) / 48)
        alone = t.gptq(w[:, alive], steps.float(), EVEN.max_code, t.factorize(hessian[alive][:, alive], torch.ones(1), cfg))
        assert (codes[:, alive] != alone).float().mean() < 1e-2


def test_a_singular_hessian_is_damped():
    x = gaussian(3, 48)
    codes, _ = coded_rows(gaussian(8, 48), EVEN, CFG, x.T @ x)
    assert codes.abs().max() <= EVEN.max_code and codes.any()


def test_inputs_stay_as_they_were():
    w, hessian = gaussian(8, 48), hessian_of(48)
    before = w.clone(), hessian.clone()
    coded_rows(w, EVEN, CFG, hessian)
    assert torch.equal(w, before[0]) and torch.equal(hessian, before[1])


def test_it_says_nothing_on_the_terminal():
    """torch warns once in a process about some deprecated calls; a run must not show that, nor break when they go."""
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            coded_rows(gaussian(8, 48), EVEN, CFG, hessian_of(48))
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("bits, sigmas", [(6, 12.85), (8, 20.0), (4, 3.0)])
def test_steps_are_a_number_of_standard_deviations(bits, sigmas):
    w = gaussian(12, 30) * torch.linspace(0.01, 3, 12)[:, None] + 0.2
    _, steps = coded_rows(w, t.QuantSpec(bits, sigmas), dataclasses.replace(CFG, min_clip=1.0, clip_shares=(0.1,)))
    expected = sigmas * w.double().numpy().std(1, ddof=1) / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(steps.double(), expected, rtol=6e-4)
    assert torch.equal(steps, coded_rows(w, t.QuantSpec(bits, sigmas), CFG, hessian_of(30))[1])


def test_a_row_of_one_value_has_finite_codes():
    codes, steps = coded_rows(torch.stack([torch.zeros(16), torch.full((16,), 0.5)]), t.QuantSpec(6, 12.85), CFG)
    assert (steps > 0).all() and not codes[0].any() and (codes[1] == 31).all()


@pytest.mark.parametrize("grid, bits", [(t.QuantSpec(6, 12.85), 3.38), (t.QuantSpec(8, 20.0), 4.74)])
@pytest.mark.parametrize("compressor, slack", [("brotli", 1.02), ("zstd", 1.02)])
def test_sigmas_set_the_size_of_the_file(grid, bits, compressor, slack):
    codes, _ = coded_rows(gaussian(256, 512), grid, CFG)
    packed = 8 * len(t.compress(codes.numpy().tobytes(), compressor, 22)) / codes.numel()
    counts = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    entropy = -(counts * np.log2(counts)).sum()
    assert packed == pytest.approx(bits, rel=0.05) and entropy < packed < slack * entropy + 0.02


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 8), floor=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 99))
def test_without_sigmas_the_clips_are_searched(bits, floor, seed):
    cfg, w, top = dataclasses.replace(CFG, min_clip=floor), gaussian(6, 24, seed), 2 ** (bits - 1) - 1
    tried = torch.stack([(w.abs().amax(1) * (s / top)).clamp_min(max(floor / top, 1e-7)).half().float() for s in cfg.clip_shares])
    errors = torch.stack([((w / s[:, None]).round().clamp(-top, top) * s[:, None] - w).square().sum(1) for s in tried])
    steps = t.row_scales(w, t.QuantSpec(bits, 0.0), cfg)
    assert torch.equal(steps, tried.gather(0, errors.argmin(0)[None])[0])
    codes, same = coded_rows(w, t.QuantSpec(bits, 0.0), cfg)
    assert torch.equal(same.float(), steps) and torch.equal(codes.float(), (w / steps[:, None]).round().clamp(-top, top))


@pytest.mark.parametrize("share", [0.01, 0.02, 0.25, 0.5, 0.99])
def test_pruning_zeroes_exactly_the_smallest_share(share):
    w = gaussian(30, 40)
    pruned, count = t.prune(w, share), int(share * 1200)
    smallest = set(w.abs().flatten().argsort()[:count].tolist())
    assert set((pruned.flatten() == 0).nonzero().flatten().tolist()) == smallest
    assert torch.equal(pruned[pruned != 0], w[pruned != 0]) and w.all()


@pytest.mark.parametrize("share", [0.0, 0.0001])
def test_pruning_less_than_one_entry_leaves_all(share):
    w = torch.cat([gaussian(30, 40), torch.tensor([[-0.0] * 40])])
    assert t.prune(w, share).numpy().tobytes() == w.numpy().tobytes()


@pytest.fixture
def gptq_cfg(cfg):
    return dataclasses.replace(cfg, quantizer="gptq", gptq_calibration_batches=3, warmup_steps=0, val_loss_every=0)


def batches_of(cfg):
    return t.Batches(t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size), cfg, t.Ranks())


def trainer_of(cfg):
    return t.Trainer(make_model(cfg), batches_of(cfg), cfg, t.Ranks())


def hessians_by_hand(model, batches, first, count, looped=False):
    """x x^T of one Linear's inputs, caught by a hook, and of the states that the head reads; row by row in float64."""
    linear, seen, heads, reached = model.blocks[1].mlp.proj, [], [], model.tok_emb.project
    hook = linear.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    model.tok_emb.project = lambda x: heads.append(x.detach()) or reached(x)
    for step in range(first, first + count):
        for ids, targets in zip(*batches.load(step, batches.seq_len, batches.micro_steps)):
            model(ids, targets, looped)
    hook.remove()
    del model.tok_emb.project
    return [sum(np.einsum("ri,rj->ij", x, x) for x in torch.cat(xs).flatten(0, 1).double().numpy()[:, None]) for xs in (seen, heads)]


def hessians_of(trainer, batches):
    """Sums of x x^T by name, of what saw inputs at all."""
    with trainer.fisher_stats() as seen:
        for _ in range(batches):
            trainer.collect()
    return {name: o.inputs for name, o in seen.items() if o.count}


@pytest.mark.parametrize("loops", [0, 2])
def test_hessians_sum_over_the_batches_that_follow(gptq_cfg, loops):
    cfg = dataclasses.replace(gptq_cfg, num_loops=loops, loop_start=1, loop_end=2)
    trainer = trainer_of(cfg)
    trainer.looped = loops > 0
    next(trainer.batches)
    sums = hessians_of(trainer, 3)
    assert trainer.batches.step == 4 and not any(m._forward_hooks or getattr(m, "output_hook", None) for m in trainer.model.modules())
    matrices = {n for n, role in t.parameter_roles(trainer.model).items() if role == "matrix" and n.startswith("blocks.")}
    assert sums.keys() == matrices | {"tok_emb.weight"}
    assert all(sums[n].shape == (trainer.model.get_parameter(n).size(1),) * 2 for n in sums)
    linear, head = hessians_by_hand(trainer.model, batches_of(cfg), 1, 3, trainer.looped)
    np.testing.assert_allclose(sums["blocks.1.mlp.proj.weight"], linear, rtol=1e-4, atol=1e-4 * linear.max())
    np.testing.assert_allclose(sums["tok_emb.weight"], head, rtol=1e-4, atol=1e-4 * head.max())
    assert head.trace() == pytest.approx(3 * cfg.train_batch_tokens * cfg.model_dim, rel=1e-3)  # each state has a mean square of 1


def test_the_share_of_each_rank_adds_up_to_the_hessians_of_one(gptq_cfg):
    whole, parts = hessians_of(trainer_of(gptq_cfg), 2), []
    for rank in range(2):
        trainer = trainer_of(gptq_cfg)
        trainer.batches = t.Batches(trainer.batches.stream, gptq_cfg, t.Ranks(rank, 2))
        parts.append(hessians_of(trainer, 2))
    for name, total in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], total, rtol=1e-3, atol=1e-4 * float(total.max()))


def test_training_leaves_the_hessians_of_the_averaged_weights(gptq_cfg, log):
    cfg = dataclasses.replace(gptq_cfg, iterations=4)
    trainer = trainer_of(cfg)
    trainer.batches.seek(0, cfg.train_seq_len)
    costs, tokens = t.train(trainer, None, log), 3 * cfg.train_batch_tokens
    raw = {n: p.clone() for n, p in trainer.model.state_dict().items()}
    averaged = t.GPT(cfg)
    averaged.load_state_dict(trainer.average.values)
    head = hessians_by_hand(averaged, batches_of(cfg), 4, 3)[1]
    np.testing.assert_allclose(tokens * costs["tok_emb.weight"].inputs, head, rtol=1e-4, atol=1e-4 * head.max())
    assert not torch.equal(raw["tok_emb.weight"], trainer.average.values["tok_emb.weight"]) and trainer.batches.step == 7
    assert t.train(trainer_of(dataclasses.replace(cfg, quantizer="rtn")), None, log) == {}


@pytest.mark.slow
def test_calibration_happens_inside_the_budget(env):
    limits = dict(QUANTIZER="gptq", MAX_WALLCLOCK_SECONDS="8", GPTQ_RESERVE_SECONDS="3", ITERATIONS="100000", GPTQ_CALIBRATION_BATCHES="16",
                  VAL_LOSS_EVERY="0", TTT_EPOCHS="0")
    done = run(env | limits)
    lines = done.stdout.splitlines()
    order = [next(i for i, line in enumerate(lines) if line.startswith(key)) for key in ("stopping_early", "gptq:coll", "training ended")]
    assert order == sorted(order) and "Hessians" in lines[order[1]]
    stopped, ended = (int(re.search(r"train_time:(\d+)ms", lines[i])[1]) for i in (order[0], order[2]))
    assert stopped < 5000 and stopped < ended < 8000


class Lines(list):
    """A log that keeps its lines."""
    active = False

    def __init__(self):
        self.facts = {}

    __call__ = list.append

    def warn(self, *texts):
        self.extend(texts)

    def fact(self, **facts):
        self.facts |= facts


class SlowRanks(t.Ranks):
    """Ranks of a made-up clock, which each step, batch and sum of one of them moves on; others are `late` by then."""
    late = 0.0

    def maximum(self, *values):
        return [value if isinstance(value, bool) else value + self.late for value in values]

    def sum_(self, tensor):
        self.clock.now += self.clock.sum_seconds
        return tensor


@pytest.mark.parametrize("late", [0.0, 0.4])
@pytest.mark.parametrize("slower", [1.0, 3.0])
@pytest.mark.parametrize("sum_seconds", [0.0, 0.004])
def test_training_and_calibration_end_before_the_limit(gptq_cfg, monkeypatch, sum_seconds, slower, late):
    """On a clock that the work itself moves: steps of 0.1 s, batches of 0.25 s or slower, about 100 sums of all ranks."""
    limit, reserve = 8.0, 3.0
    cfg = dataclasses.replace(gptq_cfg, iterations=10**6, max_wallclock_seconds=limit, gptq_reserve_seconds=reserve, gptq_calibration_batches=8,
                              warmup_steps=2)
    trainer, clock, lines = trainer_of(cfg), SimpleNamespace(now=0.0, sum_seconds=sum_seconds), Lines()
    ranks = SlowRanks()
    object.__setattr__(ranks, "clock", clock)
    monkeypatch.setattr(t, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(SlowRanks, "late", late)
    inner, starts = trainer.collect, []

    def step(*how):
        clock.now += 0.1
        return t.AsyncScalar(torch.ones(()))

    def collect():
        starts.append(clock.now)
        clock.now += 0.25 * slower
        inner()

    monkeypatch.setattr(trainer, "step", step)
    monkeypatch.setattr(trainer, "collect", collect)
    trainer.ranks = ranks
    t.train(trainer, None, lines)
    ended = next(float(re.search(r"train_time:(\d+)ms", line)[1]) for line in lines if line.startswith("training ended"))
    used = int(re.search(r"from (\d+) of 8 batches", "".join(lines))[1])
    assert used == len(starts) and limit - reserve < ended / 1000 + late < limit
    assert used == 8 if slower == 1.0 else 0 < used < 8


def calibrated(cfg, log, monkeypatch, seconds):
    """(costs, batches taken) of a calibration whose batches take these seconds of a made-up clock, which stands at 3."""
    trainer, now = trainer_of(cfg), [0.0]
    monkeypatch.setattr(t, "perf_counter", lambda: now[0])
    clock, inner, taken = t.Clock(torch.device("cpu"), 0.1), trainer.collect, []
    now[0] = 3.0

    def collect():
        now[0] += seconds[len(taken)]
        taken.append(inner())

    monkeypatch.setattr(trainer, "collect", collect)
    return t.calibrate(trainer, clock, log), len(taken)


def test_a_first_batch_that_loads_kernels_does_not_set_the_pace(gptq_cfg, log, monkeypatch):
    cfg = dataclasses.replace(gptq_cfg, max_wallclock_seconds=10.0, gptq_calibration_batches=30)
    assert calibrated(cfg, log, monkeypatch, [2.0] + [0.1] * 29)[1] == 30
    assert calibrated(cfg, log, monkeypatch, [2.0] + [0.1] * 4 + [1.0] * 25)[1] == 8  # until 8.4 s: two more might not end in time
    assert calibrated(cfg, log, monkeypatch, [4.0] + [0.1] * 29)[1] == 1


def test_no_batch_is_begun_that_might_end_after_the_limit(gptq_cfg, log, monkeypatch):
    """Until one is timed, a batch is taken to last as long as a step, 0.1 s here."""
    near, late = (dataclasses.replace(gptq_cfg, max_wallclock_seconds=s, gptq_reserve_seconds=1.0) for s in (3.25, 3.15))
    costs, count = calibrated(near, log, monkeypatch, [0.1])
    assert count == 1 and all(cost.inputs.isfinite().all() for cost in costs.values()) and "warnings" not in log.facts
    assert calibrated(late, log, monkeypatch, []) == ({}, 0) and "GPTQ_RESERVE_SECONDS" in log.facts["warnings"][0]


def test_coding_by_cost_without_calibration_names_the_remedy(gptq_cfg):
    model = make_model(gptq_cfg)
    weights, cfg = {name: p.detach() for name, p in model.named_parameters()}, dataclasses.replace(gptq_cfg, mean_scale=0.1, matrix_bits=8)
    with pytest.raises(t.TrainingFailed, match="raise GPTQ_RESERVE_SECONDS"):
        t.quant_plans(weights, t.quant_specs(model, cfg), cfg, {})


def test_ranks_leave_the_calibration_together(tmp_path, env):
    """Three ranks of which one comes late to each look at the clock: without one clock for all they would wait for ever in the sums."""
    script = f"""
import os, sys, time
sys.path.insert(0, {str(t.Path(t.__file__).parent)!r})
import train_gpt as t
cfg = t.replace(t.Config.from_env(os.environ), quantizer="gptq", max_wallclock_seconds=6.0, gptq_calibration_batches=10**6)
with t.launch(os.environ) as ranks:
    log = t.Log(cfg, ranks)
    model = t.GPT(cfg)
    model.init_weights(cfg)
    trainer = t.Trainer(model, t.Batches(t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size), cfg, ranks), cfg, ranks)
    clock = t.Clock(ranks.device, 0.0)
    clock.start -= 4.0 + 0.7 * (ranks.rank == 1)  # and its clock is ahead
    inner = trainer.collect
    trainer.collect = lambda: (inner(), time.sleep(0.05 * ranks.rank))
    costs = t.calibrate(trainer, clock, log)
    if ranks.is_main:
        print("seconds", clock.seconds(), len(costs), flush=True)
os._exit(0)  # see train_gpt.run
"""
    (tmp_path / "late.py").write_text(script)
    done = run(env | dict(TRAIN_BATCH_TOKENS="288"), script=tmp_path / "late.py", processes=3)
    assert 4 < float(done.stdout.split("seconds ")[1].split()[0]) < 9  # a busy machine is late; without one clock it never ends


def test_a_reserve_that_leaves_no_time_to_train_is_refused():
    cfg = dataclasses.replace(CFG, quantizer="gptq", max_wallclock_seconds=6.0, gptq_reserve_seconds=2.5)
    assert cfg.time_limit == 3.5 and dataclasses.replace(cfg, quantizer="rtn").time_limit == 6.0
    assert dataclasses.replace(cfg, max_wallclock_seconds=0.0).time_limit == math.inf
    with pytest.raises(t.InputError, match="GPTQ_RESERVE_SECONDS leaves no time of MAX_WALLCLOCK_SECONDS to train"):
        dataclasses.replace(cfg, gptq_reserve_seconds=6.0)


def weights_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_names_with_a_hessian_get_gptq_and_no_others():
    model, cfg = make_model(CFG), CFG
    weights, grid_of = weights_of(model), t.quant_specs(model, cfg)
    chosen = ["blocks.0.mlp.fc.weight", "blocks.3.attn.c_v.weight", "tok_emb.weight"]
    hessians = {n: hessian_of(weights[n].size(1)) for n in chosen}
    plain, gptq = coded(weights, grid_of, cfg), coded(weights, grid_of, cfg, hessians)
    assert plain.keys() == gptq.keys()
    assert {n for n in plain if not torch.equal(plain[n], gptq[n])} == {f"{n}.codes" for n in chosen}
    for name in chosen:
        codes = t.gptq(weights[name], plain[f"{name}.scales"].float(), grid_of[name].max_code, t.factorize(hessians[name], torch.ones(1), cfg))
        assert torch.equal(gptq[f"{name}.codes"], codes.to(torch.int8))


def test_only_matrices_of_the_blocks_are_pruned():
    model = make_model(CFG)
    weights, cfg = weights_of(model), dataclasses.replace(CFG, prune_share=0.3)
    pruned, whole = (coded(weights, t.quant_specs(model, c), c) for c in (cfg, CFG))
    matrices = {n for n in weights if n.startswith("blocks.") and f"{n}.codes" in whole}
    for name in matrices:
        assert not pruned[f"{name}.codes"][t.prune(weights[name], 0.3) == 0].any()
        assert not torch.equal(pruned[f"{name}.codes"], whole[f"{name}.codes"])
    assert all(torch.equal(pruned[n], w) for n, w in whole.items() if n.rpartition(".")[0] not in matrices) and len(matrices) == 6 * CFG.num_layers


def widths(model, cfg):
    """bits of each tensor of the artifact, by its codes: the highest that occurs bounds it from below, the top from above."""
    tensors, result = coded(weights_of(model), t.quant_specs(model, cfg), cfg), {}
    for name, tensor in tensors.items():
        if name.endswith(".codes"):
            result[name.removesuffix(".codes")] = 1 + math.ceil(math.log2(int(tensor.abs().max()) + 1))
        elif not name.endswith((".scales", ".columns")):
            assert tensor.dtype == torch.float16
            result[name] = 16
    return result


@pytest.mark.parametrize("embed, table, tokens, others", [(8, 0, 8, 8), (16, 0, 16, 16), (16, 6, 16, 6), (8, 16, 8, 16), (6, 8, 6, 8)])
def test_which_tensors_are_wide(embed, table, tokens, others):
    cfg = dataclasses.replace(CFG, embed_bits=embed, table_bits=table, matrix_bits=6, min_clip=0.0)
    model = make_model(cfg)
    bits, kinds = widths(model, cfg), {name: role for name, role in t.parameter_roles(model).items()}
    assert bits.keys() == kinds.keys() and bits.pop("tok_emb.weight") == tokens
    assert [bits.pop(f"{n}.embed.weight") for n in ("bigram", "value_embed")] == [others] * 2
    assert {b for n, b in bits.items() if kinds[n] == "matrix" and n.startswith("blocks.")} == {6}
    assert {b for n, b in bits.items() if kinds[n] != "matrix" or not n.startswith("blocks.")} == {16}


def test_sigmas_of_matrices_and_of_tables_are_separate():
    model = make_model(CFG)
    for matrix, table in itertools.product((0.0, 12.85), (0.0, 20.0)):
        grid_of = t.quant_specs(model, dataclasses.replace(CFG, matrix_clip_sigmas=matrix, embed_clip_sigmas=table))
        assert {g.sigmas for n, g in grid_of.items() if n.startswith("blocks.") and g.bits < 16} == {matrix}
        assert {grid_of[f"{n}.weight"].sigmas for n in ("tok_emb", "bigram.embed", "value_embed.embed")} == {table}


def test_a_model_coded_by_gptq_predicts_the_training_set_better_than_one_rounded(gptq_cfg):
    cfg = dataclasses.replace(gptq_cfg, matrix_bits=3, embed_bits=4, gptq_calibration_batches=8)
    trainer = trainer_of(cfg)
    weights, grid_of, hessians = weights_of(trainer.model), t.quant_specs(trainer.model, cfg), hessians_of(trainer, 8)
    ids = next(batches_of(cfg))[0].flatten(0, 1)
    with torch.no_grad():
        exact, off = trainer.model.hidden(ids), []
        for found in ({}, hessians):
            model = t.GPT(cfg)
            model.load_state_dict(t.dequantize(coded(weights, grid_of, cfg, found)))
            off.append(float(F.mse_loss(model.hidden(ids), exact)))
    assert off[1] < off[0]
