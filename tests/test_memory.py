"""Batches that memory chooses, on a CPU with a simulated memory; dtype and attention of devices that are not here."""

import dataclasses
import functools
import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, run
from helpers.twins import LOOPS, trainer_of
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

CUDA = torch.device("cuda")


class Simulated(t.Ranks):
    """A rank on the CPU that looks for the batch that fits as on a GPU."""

    def fit_batch(self, *args):
        return t.Ranks(self.rank, self.world, CUDA, self.given).fit_batch(*args)


def with_memory(limit, forward, size=torch.Tensor.numel):
    """`forward` that has memory for ids of at most `limit` tokens, and the list of the sizes that it saw."""
    seen = []

    def limited(ids, *args, **how):
        seen.append(size(ids))
        if seen[-1] > limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {seen[-1]} bytes.")
        return forward(ids, *args, **how)

    return limited, seen


def fitted(value, limit, unit=1, given=frozenset()):
    """The result of fit_batch where `limit` items fit, the attempts, and what was logged."""
    tried, said = [], []

    def attempt(count):
        tried.append(count)
        if count > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return t.Ranks(device=CUDA, given=given).fit_batch("SOME_BATCH", value, attempt, said.append, unit), tried, said


# ---- the search

@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 5000), limit=st.integers(1, 5000), unit=st.integers(1, 100), rest=st.integers(0, 99))
def test_the_largest_of_the_halves_that_fit_is_found(count, limit, unit, rest):
    value = count * unit + rest % unit
    found, tried, said = fitted(value, limit, unit)
    halves = [count >> i for i in range(20) if count >> i]
    assert found == next(n for n in halves if n <= limit) and tried == halves[: halves.index(found) + 1]
    assert said == [f"SOME_BATCH={value} does not fit into the memory of the GPU; {found * unit} is used"] * (found < count)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), RuntimeError("CUDA error: out of memory"), MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_every_error_of_a_lack_of_memory_halves(error):
    errors = [error]
    assert t.Ranks(device=CUDA).fit_batch("X", 8, lambda count: (_ for _ in ()).throw(errors.pop()) if errors else None, lambda text: None) == 4


@pytest.mark.parametrize("error", [
    RuntimeError("shapes do not match"), t.InputError("the GPU is out of memory"), KeyboardInterrupt(), ValueError("out of memory")])
def test_any_other_error_passes(error):
    tried = []
    with pytest.raises(type(error)) as caught:
        t.Ranks(device=CUDA).fit_batch("X", 8, lambda count: (_ for _ in ()).throw(tried.append(count) or error), lambda text: None)
    assert caught.value is error and tried == [8]


def test_a_value_of_the_environment_is_kept_or_refused_with_the_one_that_fits():
    given = frozenset(["SOME_BATCH", "HOME"])
    assert fitted(96, 3, 32, given)[0] == 3
    with pytest.raises(t.InputError) as caught:
        fitted(256, 3, 32, given)
    assert str(caught.value) == "SOME_BATCH=256 does not fit into the memory of the GPU; 64 fits"


@pytest.mark.parametrize("given", [(), ("SOME_BATCH",)])
def test_where_nothing_fits_a_line_says_so(given):
    with pytest.raises(t.InputError) as caught:
        fitted(256, 0, 32, frozenset(given))
    assert str(caught.value) == "out of memory with SOME_BATCH=32; use a smaller model or a shorter window"
    assert t.explain(caught.value).count("\n") == 1


def test_a_cpu_tries_nothing():
    assert t.Ranks(given=frozenset(["X"])).fit_batch("X", 100, lambda count: pytest.fail("tried"), None, 30) == 3


def test_what_a_failed_attempt_held_is_free_before_the_next():
    held = []

    def attempt(count):
        assert all(reference() is None for reference in held)
        tensor = torch.zeros(count)
        held.append(weakref.ref(tensor))
        if count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert t.Ranks(device=CUDA).fit_batch("X", 16, attempt, lambda text: None) == 2 and len(held) == 4


def test_the_environment_of_a_run_is_what_is_kept():
    with t.launch({"EVAL_BATCH_SEQS": "4"}) as ranks:
        assert ranks.given == {"EVAL_BATCH_SEQS"}


def test_ranks_with_other_limits_agree(env, tmp_path):
    (script := tmp_path / "fit.py").write_text(f"""
import dataclasses, json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import train_gpt as t
limits, found = {{"free": (7, 3), "one": (1, 16), "none": (16, 0), "given": (3, 16)}}, {{}}
with t.launch(os.environ) as ranks:
    for name, limit in limits.items():
        ranks = dataclasses.replace(ranks, device=torch.device("cuda"), given=frozenset(["X"] if name == "given" else []))
        tried = []
        def attempt(count):
            tried.append(count)
            if count > limit[ranks.rank]:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        try:
            result = ranks.fit_batch("X", 16, attempt, lambda text: None)
        except t.InputError as error:
            result = str(error)
        found[name] = result, tried
    open(os.path.join(sys.argv[1], f"{{ranks.rank}}.json"), "w").write(json.dumps(found))
os._exit(0)  # see train_gpt.run
""")
    run(env, tmp_path, script=script, processes=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1] == {
        "free": [2, [16, 8, 4, 2]], "one": [1, [16, 8, 4, 2, 1]], "none": ["out of memory with X=1; use a smaller model or a shorter window", [16, 8, 4, 2, 1]],
        "given": ["X=16 does not fit into the memory of the GPU; 2 fits", [16, 8, 4, 2]]}


# ---- training

@pytest.fixture
def step_cfg(cfg):
    return dataclasses.replace(cfg, micro_batch_tokens=256, early_seq_lens=(16,), early_seq_ends=(0.5,), warmup_steps=1, **LOOPS | dict(num_loops=1))


def warmed(cfg, log, limit=None, given=()):
    """A trainer after its warm-up with memory for `limit` tokens, and the sizes of the passes."""
    trainer, seen = trainer_of(cfg), []
    trainer.ranks = Simulated(given=frozenset(given))
    if limit:
        trainer.compiled, seen = with_memory(limit, trainer.compiled)
    trainer.warm_up(log)
    return trainer, seen


def state_of(trainer):
    tensors = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    tensors |= {f"{i} {key}": x.clone() for i, state in enumerate(trainer.optimizers.adam.state.values()) for key, x in state.items()}
    return tensors | {f"muon {i}": group["buffer"].clone() for i, group in enumerate(trainer.optimizers.muon.param_groups)}


def steps_of(trainer):
    """Losses of three steps, the second with late QAT, the third looped."""
    losses = []
    for qat, looped in ((False, False), (True, False), (False, True)):
        trainer.qat, trainer.looped = qat, looped
        losses.append(trainer.step(0.5, 0.9).value())
    return losses


def test_warm_up_halves_the_micro_batch_until_it_fits_and_leaves_the_state_as_it_was(step_cfg, log):
    fresh = trainer_of(step_cfg)
    trainer, seen = warmed(step_cfg, log, limit=100)
    assert seen[0] == 256 and seen[1] == 128 and set(seen[2:]) == {64} and trainer.batches.micro_steps == 4 and trainer.batches.micro_batch_tokens == 64
    assert log.facts["grad_accum_steps"] == 4
    assert (trainer.qat, trainer.looped, trainer.batches.step, trainer.batches.seq_len) == (False, False, 0, 16)
    assert all(p.grad is None for p in trainer.model.parameters())
    before, after = state_of(fresh), state_of(trainer)
    assert before.keys() == after.keys() and all(torch.equal(after[name], x) for name, x in before.items())
    assert all(torch.equal(x.flatten(), y.flatten()) for x, y in zip(next(fresh.batches), next(trainer.batches)))


def test_every_graph_of_the_run_is_tried(step_cfg, log):
    """Each length with and without late QAT, looped and not: before any step."""
    trainer, tried = trainer_of(step_cfg), []
    trainer.ranks = Simulated()
    inner, step = trainer.compiled, trainer.step

    def noted(ids, targets, looped):
        tried.append((ids.size(1), trainer.qat, looped))
        return inner(ids, targets, looped)

    def first(*args):
        tried.append("step")
        return step(*args)

    trainer.compiled, trainer.step = noted, first
    trainer.warm_up(log)
    attempts = {(length, qat, looped) for length, looped in t.stages(step_cfg) for qat in (False, True)}
    assert {*tried[: tried.index("step")]} == attempts and len(attempts) >= 4


def test_steps_with_a_halved_micro_batch_are_the_same_to_rounding(step_cfg, log):
    halved, seen = warmed(step_cfg, log, limit=100)
    whole, by_hand = (warmed(dataclasses.replace(step_cfg, micro_batch_tokens=n, warmup_steps=0), log)[0] for n in (256, 64))
    losses = [steps_of(trainer) for trainer in (whole, halved, by_hand)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[1] == losses[2] and max(seen[-9:]) == 64
    weights = [state_of(trainer) for trainer in (whole, halved, by_hand)]
    for name, x in weights[0].items():
        # AdamW and Newton-Schulz divide by the size of a gradient, which magnifies the last bit of a small one
        assert torch.equal(weights[1][name], weights[2][name]) and (weights[1][name] - x).abs().max() < 2e-3, name


def test_a_micro_batch_of_the_environment_is_kept(step_cfg, log):
    step_cfg = dataclasses.replace(step_cfg, num_loops=0, early_seq_lens=(), early_seq_ends=())
    assert warmed(step_cfg, log, limit=256, given=["MICRO_BATCH_TOKENS"])[0].batches.micro_batch_tokens == 256
    with pytest.raises(t.InputError, match="^MICRO_BATCH_TOKENS=256 does not fit into the memory of the GPU; 64 fits$"):
        warmed(step_cfg, log, limit=100, given=["MICRO_BATCH_TOKENS"])
    with pytest.raises(t.InputError, match="^out of memory with MICRO_BATCH_TOKENS=32; "):
        warmed(step_cfg, log, limit=31)


@settings(max_examples=300, deadline=None)
@given(rows=st.integers(1, 60), world=st.integers(1, 4), lengths=st.lists(st.integers(2, 40), min_size=1, max_size=3), micro=st.integers(1, 10**5),
       halvings=st.integers(0, 20))
def test_a_batch_is_divided_whatever_micro_batch_fits(rows, world, lengths, micro, halvings):
    longest = max(lengths)
    cfg = SimpleNamespace(train_batch_tokens=int(np.lcm.reduce(lengths)) * rows * world)
    batches = t.Batches.__new__(t.Batches)
    batches.cfg, batches.ranks, batches.load = cfg, t.Ranks(0, world), None
    batches.reader = SimpleNamespace(submit=lambda load, step, seq_len, micro_steps: (step, seq_len, micro_steps))
    batches.micro_batch_tokens = max(1, max(longest, micro) // longest >> halvings) * longest  # a multiple of the longest row, as fit_batch leaves it
    for length in lengths:
        batches.seek(3, length)
        mine, count = cfg.train_batch_tokens // length // world, batches.micro_steps
        assert mine % count == 0 and mine // count * length <= batches.micro_batch_tokens
        fewer = [n for n in range(1, count) if mine % n == 0 and mine // n * length <= batches.micro_batch_tokens]
        assert not fewer and batches.pending == (3, length, count)


# ---- evaluation and test-time training

def scorer_of(cfg, log, given=()):
    return t.Scorer(t.read_validation(cfg), cfg, Simulated(given=frozenset(given)), log)


def test_windows_of_a_halved_batch_have_the_same_scores(cfg, log):
    model, losses = make_model(cfg), []
    for limit in (10**9, 100):
        forward, seen = with_memory(limit, model)
        scorer = scorer_of(cfg, log)
        scorer.evaluate_sliding(forward)
        losses.append(scorer.audited["nll"])
    assert seen[:4] == [1024, 512, 256, 128] and max(seen[4:]) <= 64
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    with pytest.raises(t.InputError, match="^EVAL_BATCH_SEQS=32 does not fit into the memory of the GPU; 2 fits$"):
        scorer_of(cfg, log, ["EVAL_BATCH_SEQS"]).evaluate_sliding(forward)


@pytest.mark.parametrize("epochs, experts", [(1, ()), (2, ()), (1, (0.0, 0.02))])
def test_documents_of_a_halved_batch_have_the_same_scores(cfg, log, epochs, experts):
    cfg = dataclasses.replace(cfg, ttt_scope="document", ttt_lora_rank=4, ttt_params=t.Config.ttt_params, ttt_optimizer="adamw", ttt_chunk_tokens=8,
                              ttt_epochs=epochs, ttt_batch_seqs=8, ttt_grad_clip=0.0, ttt_expert_lrs=experts)
    model, found, passes = make_model(cfg), [], 2 * (epochs + len(experts))  # for a rehearsal, with the optimizers' state
    params = t.ttt_parameters(model, cfg)
    for limit in (10**9, 3 * cfg.window):
        scorer = scorer_of(cfg, log)
        scorer.documents = [(i, min(i + 100, 700)) for i in range(0, 700, 100)]  # seven of 100 targets
        forward, seen = with_memory(limit, lambda ids, targets, **how: model(ids, targets, single_document=True, **how))
        t.evaluate_adapting(scorer, model, params, forward)
        found.append(scorer.audited["nll"])
        assert seen[0] == 8 * cfg.window  # the longest context
    assert seen[1 : 2 + passes] == [4 * cfg.window, *[2 * cfg.window] * passes] and max(seen[3:]) == 2 * cfg.window
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)
    with pytest.raises(t.InputError, match="^TTT_BATCH_SEQS=8 does not fit into the memory of the GPU; 2 fits$"):
        t.evaluate_adapting(scorer_of(cfg, log, ["TTT_BATCH_SEQS"]), model, params, forward)


def test_the_experts_of_a_batch_are_freed_before_the_next_are_made(cfg, log, monkeypatch):
    cfg = dataclasses.replace(cfg, ttt_scope="document", ttt_lora_rank=4, ttt_params=t.Config.ttt_params, ttt_optimizer="adamw", ttt_chunk_tokens=8,
                              ttt_epochs=1, ttt_batch_seqs=2, ttt_grad_clip=0.0, ttt_expert_lrs=(0.02,))
    model, made, alive, inner = make_model(cfg), [], [], t.attach_lora

    def attach(starts, rows, cfg):
        alive.append(sum(ref() is not None for ref in made))
        params = inner(starts, rows, cfg)
        made.append(weakref.ref(params[0]))
        return params

    monkeypatch.setattr(t, "attach_lora", attach)
    scorer = scorer_of(cfg, log)
    scorer.documents = [(i, i + 100) for i in range(0, 600, 100)]
    t.evaluate_adapting(scorer, model, t.ttt_parameters(model, cfg), functools.partial(model, single_document=True))
    assert len(alive) >= 6 and max(alive) == 1, alive


@pytest.mark.parametrize("tokens, passes", [(10**6, 1), (128, 2), (96, 3), (1, 8)])
def test_passes_of_test_time_training_change_a_step_by_rounding_alone(cfg, log, monkeypatch, tokens, passes):
    cfg = dataclasses.replace(cfg, ttt_batch_seqs=8, ttt_epochs=1, ttt_lr=0.1, ttt_grad_clip=0.0, ttt_momentum=0.0)
    chunk = next(scorer_of(cfg, log).stream_chunks(make_model(cfg), 32, 256))[0]
    weights = []
    for size in (10**6, tokens):
        model = make_model(cfg)
        forward, seen = with_memory(10**9, model, len)
        monkeypatch.setattr(t, "TTT_PASS_TOKENS", size)
        t.Adaptation(t.ttt_parameters(model, cfg), forward, cfg, t.Ranks())(chunk)
        weights.append({name: p.detach() for name, p in model.named_parameters()})
    assert len(seen) == passes and sum(seen) == 8
    start = dict(make_model(cfg).named_parameters())
    for name, x in weights[0].items():
        torch.testing.assert_close(weights[1][name], x, rtol=1e-4, atol=1e-6)
    assert any((x - start[name]).abs().max() > 1e-3 for name, x in weights[0].items())


# ---- devices

@pytest.fixture
def device(monkeypatch):
    """Pretends a GPU: device(bf16, hip=None, capability=(8, 0))."""

    def pretend(bf16, hip=None, capability=(8, 0)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: bf16 or emulated)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    return pretend


@pytest.mark.parametrize("bf16, asked, got", [
    (True, "auto", torch.bfloat16), (True, "bf16", torch.bfloat16), (True, "fp32", torch.float32), (False, "auto", torch.float32),
    (False, "fp32", torch.float32)])
def test_the_dtype_of_a_gpu_is_bf16_where_it_multiplies_bf16(cfg, device, bf16, asked, got):
    """Emulated bf16 does not count."""
    device(bf16)
    assert t.compute_dtype(dataclasses.replace(cfg, dtype=asked), CUDA) == got


def test_bf16_on_a_gpu_without_it_is_refused_in_a_line(cfg, device):
    device(False, capability=(7, 5))
    with pytest.raises(t.InputError, match="DTYPE=bf16 needs bf16 matrix units, which Tesla T4 lacks; ") as caught:
        t.compute_dtype(dataclasses.replace(cfg, dtype="bf16"), CUDA)
    assert "\n" not in str(caught.value)
    attention = t.choose_attention(dataclasses.replace(cfg, dtype="auto"), t.Ranks(device=CUDA))
    assert attention.name == "sdpa" and "needs a GPU and bf16" in attention.warnings[0]


def test_a_gpu_of_amd_takes_the_attention_of_torch(cfg, device, monkeypatch):
    device(True, hip="6.4", capability=(9, 4))
    monkeypatch.setattr(t.importlib, "import_module", lambda name: pytest.fail(f"{name} was loaded"))
    for asked in ("auto", "sdpa"):
        attention = t.choose_attention(dataclasses.replace(cfg, dtype="auto", attention=asked), t.Ranks(device=CUDA))
        assert attention.name == "sdpa" and attention.attend is t.attend_sdpa
    for asked in ("fa2", "fa3"):
        with pytest.raises(t.InputError, match=f"ATTENTION={asked} cannot run: {asked}: it needs an NVIDIA GPU; set ATTENTION=auto"):
            t.choose_attention(dataclasses.replace(cfg, dtype="auto", attention=asked), t.Ranks(device=CUDA))


@pytest.mark.parametrize("mps, kind, warned", [(True, "cpu", True), (False, "cpu", False), (True, "cuda", False)])
def test_a_run_says_that_the_gpu_of_apple_is_not_used(device, monkeypatch, mps, kind, warned):
    device(True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert t.run_warnings({}, t.Ranks(world=2, device=torch.device(kind))) == ["Apple's GPU is not used; the run is on the CPU"] * warned


@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_says_that_a_gpu_has_no_bf16(device, bf16):
    device(bf16)
    assert ["has no bf16" in text for text in t.run_warnings({}, t.Ranks(device=CUDA))] == [True] * (not bf16)
