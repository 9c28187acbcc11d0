"""tools.bench: its counts against independent ones, kinds of kernels by real names, a whole run, and wrong inputs."""

import json
import runpy
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t
from tools.bench import anatomy, bench, plain
from tools.files import Refused

SIZES = dict(num_layers=5, model_dim=64, num_heads=4, num_kv_heads=2, ve_layers=(3, 4), ve_dim=16, bigram_dim=16)
SIZES |= dict(vocab_size=128, train_seq_len=32, train_batch_tokens=128, micro_batch_tokens=128, eval_stride=16)
TINY = SIZES | dict(dtype="fp32", ttt_chunk_tokens=32)


# ---- operations


@pytest.mark.parametrize("variant, looped", [("card", 0), ("pr1812", 0), ("pr1812", 1), ("pr490", 0), ("pr1127", 0)])
def test_operations_are_those_that_torch_counts(variant, looped):
    sizes = TINY | dict(xsa_last_n=2, rope_dims=8, parallel_residual_start=-1, loop_start=1, loop_end=2)
    sizes |= (dict(ve_layers=()) if variant != "card" else {}) | dict(num_loops=2 * (variant == "pr1812"))
    sizes |= dict(attn_gate_dims=8, mlp_mult=4.0) if variant == "pr1812" else {}
    cfg = t.Config(**t.variant_options(variant) | sizes)
    model, tokens = make_model(cfg), torch.randint(2, 128, (3, 33))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:], bool(looped)).mean().backward()
    counted, found = counter.get_total_flops() / tokens[:, 1:].numel(), anatomy.train_flops(cfg, bool(looped))
    passes = 5 + 4 * looped
    dense = 3 * 4 * 32 * 64 * passes  # torch counts every pair of positions, and two products for each backward
    assert found == dict(product=counted - dense, attention=3.5 * 4 * (33 / 2) * 64 * passes)


def test_operations_of_the_contest_model_are_the_published_ones():
    """239.6 MFLOP per token for 11 layers without bigram and value tables; these add two small projections."""
    small = 6 * 128 * (512 + 256)
    card, looped = t.Config(), t.Config(**t.variant_options("pr1812"))
    assert sum(anatomy.train_flops(card, False).values()) == pytest.approx(239.6e6 + small, rel=2e-4)
    assert sum(anatomy.train_flops(looped, True).values()) == pytest.approx(444.1e6 + 6 * 17 * 12 * 8, rel=2e-4)
    with torch.device("meta"):
        names = {name: p.numel() for name, p in t.GPT(card).named_parameters() if p.ndim == 2 and "weight" in name}
    lookups = {"bigram.embed.weight", "value_embed.embed.weight", "skip_weights"}
    weights = sum(count for name, count in names.items() if name not in lookups)
    assert anatomy.train_flops(card, False) == dict(product=6 * weights, attention=7 * 2049 * 512 * 11)


# ---- names in a profile

NAMES = {
    "attention": [
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<flash::CollectiveMainloopBwdSm90<2, 2,",
        "void cutlass::device_kernel<flash::FlashAttnBwdPreprocess<cute::tuple<cute::C<128>, cute::C<64> >, ",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, 128, 128, 8, 4,",
        "void flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<64, 128, 128, 8, 4, 4, 4, false, false,",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t,",
        "triton_tem_fused_flex_attention_0",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "aten::scaled_dot_product_attention",
    ],
    "matmul": [
        "nvjet_tst_192x192_64x4_1x2_h_bz_coopB_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x5_tn_align8>(Params)",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float,",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, ",
        "triton_tem_fused_addmm_3",
        "mkldnn_mm",
        "mkldnn::_linear_pointwise",
        *(f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "_addmm_activation", "linear", "mv", "addmv")),
    ],
    "elementwise": [
        "triton_poi_fused__to_copy_add_mul_7",
        "triton_red_fused__scaled_dot_product_flash_attention_backward_sum_12",
        "triton_poi_fused_mm_3",
        "triton_per_fused__fused_rms_norm_mul_0",
        "triton_for_fused_0",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, ",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float,",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        *(
            f"aten::{name}"
            for name in ("mul", "copy_", "_fused_rms_norm", "nll_loss_backward", "addcmul", "addmm_like")
        ),
    ],
    "communication": [
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL",
        "gloo:all_reduce",
        "c10d::allreduce_",
    ],
    "other": ["autograd::engine::evaluate_function: MulBackward0", "my_own_kernel"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_kernels_and_operators_tell_the_kind_of_work(kind):
    assert {name: bench.kind_of(name) for name in NAMES[kind]} == dict.fromkeys(NAMES[kind], kind)


# ---- profiles


def event(name, start, busy, on_gpu=False, annotation=False, own=None):
    """An event of the profiler, in microseconds."""
    times = dict(self_device_time_total=busy if on_gpu else 0, self_cpu_time_total=busy if own is None else own)
    span = SimpleNamespace(start=start, end=start + busy)
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=span, **times)


def test_kernels_of_a_gpu_are_summed_by_kind_and_those_of_the_optimizer_by_its_range():
    found = bench.summarize(
        [
            event(bench.OPTIMIZER, 10, 500, annotation=True),  # on the host: earlier than its kernels
            event("aten::mm", 0, 900),
            event("cudaDeviceSynchronize", 950, 5),
            event("nvjet_tst_1", 100, 40, True),
            event("pytorch_flash::flash_fwd_kernel", 140, 20, True),
            event("pytorch_flash::flash_bwd_kernel", 160, 25, True),
            event(bench.OPTIMIZER, 200, 100, True, annotation=True),
            event("nvjet_tst_2", 200, 10, True),
            event("ncclDevKernel_AllReduce", 210, 15, True),
            event("void at::native::multi_tensor_apply_kernel", 299, 2, True),
            event("Memcpy HtoD", 300, 8, True),
        ],
        on_gpu=True,
        steps=2,
    )
    busy = dict(matmul=40, attention=45, optimizer=12, communication=15, elementwise=8)
    assert {kind: found[kind] for kind in busy} == {kind: pytest.approx(us / 120) for kind, us in busy.items()}
    assert found["busy_ms"] == pytest.approx(0.06) and (found["launches"], found["waits"]) == (3.5, 0.5)
    assert found["top"][0] == ["matmul", "nvjet_tst_1", 0.02]
    assert found["attention_kernel"] == "pytorch_flash::flash_bwd_kernel"  # the longest


def test_an_operator_of_a_cpu_has_its_own_time_without_those_that_it_calls():
    events = [
        event("aten::linear", 0, 50, own=20),
        event("aten::mm", 10, 30),
        event("bench::optimizer", 100, 60, annotation=True, own=10),
        event("aten::mm", 110, 50),
    ]
    found = bench.summarize(events, on_gpu=False, steps=1)
    assert (found["matmul"], found["optimizer"], found["busy_ms"], found["launches"]) == (0.5, 0.5, 0.1, 0)
    assert found["attention_kernel"] == "none"


# ---- the plain step and evaluation


def test_the_plain_step_is_ours():
    """Equal losses and weights over three fp32 steps; AdamW's epsilon keeps rounding from deciding signs."""
    cfg = t.Config(**TINY, adam_eps=1e-4)
    model = make_model(cfg)
    twin = plain.Step(cfg, model.state_dict(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 20, (1, 4, 33), generator=generator) for _ in range(3)]
    trainer = t.Trainer(model, iter([(r[..., :-1], r[..., 1:]) for r in rows]), cfg, t.Ranks())
    for r in rows:
        ours = trainer.step(0.5, 0.9).value()
        trainer.average.update(1 - cfg.ema_decay)
        assert twin(r[0, :, :-1], r[0, :, 1:], 0.5, 0.9).item() == pytest.approx(ours, rel=1e-5)
    start, mine = make_model(cfg).state_dict(), dict(model.named_parameters())
    assert twin.weights.keys() == mine.keys()
    for name, w in twin.weights.items():
        moved = (mine[name] - start[name]).norm()
        assert moved > 1e-4 and (w - mine[name]).norm() <= 1e-4 * moved + 1e-7, name
        assert torch.allclose(twin.average[name], trainer.average.values[name], atol=1e-6), name


def test_the_plain_step_refuses_what_it_does_not_know():
    with pytest.raises(Refused, match="not [A-Z_]+="):
        plain.check(t.Config(**t.variant_options("pr1812")))
    plain.check(t.Config(**t.variant_options("demo")))


def test_a_scorer_without_a_tokenizer_counts_one_byte_per_token():
    stream = np.random.default_rng(0).integers(1, 128, 145)
    score = bench.make_scorer(stream, t.Config(**TINY), t.Ranks()).evaluate_sliding(make_model(t.Config(**TINY)))
    assert score.bpb == pytest.approx(score.loss / np.log(2))


# ---- time


class Event:
    """torch.cuda.Event on a fake clock: each one that is recorded is 5 ms after the one before."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 5.0
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_steps_of_a_gpu_are_timed_by_events_without_waiting(monkeypatch):
    calls, waits = [], []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(len(calls)))
    assert bench.step_times(lambda: calls.append(0), torch.device("cuda"), 7, 2) == [5.0] * 7
    assert waits == [2, 9]


def test_steps_of_a_cpu_are_timed_one_by_one(monkeypatch):
    clock, calls = iter(range(100)), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))
    assert bench.step_times(lambda: calls.append(0), torch.device("cpu"), 3, 2) == [1000.0] * 3 and len(calls) == 5


def test_functions_are_timed_in_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = bench.in_turns(runs, torch.device("cpu"), rounds=3, count=2)
    assert "".join(calls) == "aaaabbbb" + 2 * "aabb" and {name: len(ms) for name, ms in times.items()} == dict(a=6, b=6)


# ---- the tool


def test_a_gpu_has_its_own_defaults(monkeypatch):
    monkeypatch.delenv("VARIANT", raising=False)
    assert (bench.parse([]).variant, bench.parse([]).steps) == (["demo"], 10)
    monkeypatch.setenv("VARIANT", "pr150")
    assert bench.parse([]).variant == ["pr150"] and bench.parse(["--variant", "demo"]).variant == ["demo"]
    assert bench.parse(["--env", "VARIANT=pr455"]).variant == ["pr455"]
    monkeypatch.delenv("VARIANT")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (bench.parse([]).variant, bench.parse([]).steps) == (["card", "pr1812"], 100)


SMALL = [f"--env={name.upper()}={size}" for name, size in TINY.items() if name != "ve_layers"]
SMALL += ["--env=VE_LAYERS=3,4", "--steps=3"]


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs the tool in this process in a folder of its own, on a tiny row, without a time to warm up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "WARM_SECONDS", dict(cpu=0.0))
    monkeypatch.setattr(bench, "ceilings", lambda device: {"copy": 1e9, "torch.float32": 1e9, "torch.bfloat16": 2e9})
    threads = torch.get_num_threads()
    yield lambda *args: bench.main([*SMALL, *args])
    torch.set_num_threads(threads)


def test_a_whole_run(quick, tmp_path, capsys):
    """A row, its profile and the race, beside a result of an earlier version of the tool."""
    (tmp_path / "old.json").write_text(json.dumps(dict(format=1, rows=[dict(name="demo", tokens=128, ms=2.0)])))
    quick("--compare", "old.json", "--env", "VARIANT=demo")
    result, text = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert result["machine"].keys() == {"device", "threads", "torch", "commit"}
    (row,), (race,) = result["rows"], result["plain"]
    kinds = ("attention", "matmul", "elementwise", "optimizer", "other")
    assert sum(row[kind] for kind in kinds) == pytest.approx(1) and all(row[kind] > 0.005 for kind in kinds)
    assert row["attention_kernel"].startswith("aten::_scaled_dot_product") and len(row["top"]) == 20
    assert row["tokens"] == 128 and row["tokens_per_second"] == pytest.approx(128 / row["ms"] * 1e3)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * row["MFLOP_per_token"] * 1e6 / 1e9)
    assert row["low"] <= row["ms"] <= row["high"] and row["ms_on_8"] == pytest.approx(1.02 * row["ms"])
    assert row["ms/old"] == pytest.approx(row["ms"] / 2) and f"| 2.00 | {row['ms/old']:.3f} |" in text
    assert (race["name"], race["tokens"]) == ("demo", 128) and race["ratio"] == pytest.approx(
        race["plain_ms"] / race["ms"]
    )
    assert race["low"] <= race["high"] and 0.1 < race["ratio"] < 10
    assert text.count("|---|") == 3 and "copy: 1000000000.0" in text and text.endswith("wrote bench.json\n")


def test_a_row_with_loops_is_measured_twice_and_one_without_a_plain_step_is_named(quick, tmp_path, capsys):
    quick("--env", "NUM_LOOPS=1", "--env", "LOOP_START=1", "--env", "LOOP_END=2", "-o", "loops.json")
    result = json.loads((tmp_path / "loops.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["demo", "demo looped"] and result["plain"] == []
    flops = [row["MFLOP_per_token"] for row in result["rows"]]
    assert flops[1] > 1.3 * flops[0] and "demo: the plain step implements" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, env, words",
    [
        (["--variant", "cards"], {}, "--variant cards must be one of card, "),
        (["--env", "MODEL_DIM"], {}, "MODEL_DIM='' is not valid"),
        (["--env", "WIDTH=5"], {}, "--env WIDTH must be NAME=VALUE with an option of train_gpt.py"),
        (["--env", "NUM_HEADS=3"], {}, "MODEL_DIM must be a multiple of NUM_HEADS"),
        ([], {"VARIANT": "cards"}, "--variant cards must be one of card, "),
        ([], {"ATTENTION": "fa3"}, "ATTENTION=fa3 cannot run"),
        (["--compare", "missing.json"], {}, "cannot read missing.json: No such file"),
        (["-o", "."], {}, "cannot write .: it is a folder"),
    ],
)
def test_wrong_input_is_one_line(quick, args, env, words, tmp_path, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((Refused, t.InputError)) as error:
        quick(*args)
    assert words in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_error_ends_the_process_with_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--variant", "x"])
    with pytest.raises(SystemExit, match="^tools.bench: --variant x must be one of .*$") as end:
        runpy.run_module("tools.bench", run_name="__main__")
    assert "\n" not in end.value.code


def test_rows_take_one_micro_batch(tmp_path):
    sizes = {"card": 98_304, "pr1812": 98_304, "pr1127": 65_536, "demo": 2048, "card-small": 1024}
    assert {name: bench.row_config(name, {}, tmp_path).train_batch_tokens for name in sizes} == sizes
    larger = bench.row_config("card", {"TRAIN_BATCH_TOKENS": "196608"}, tmp_path)
    assert larger == replace(t.Config.from_env({}), train_batch_tokens=196_608, data_path=str(tmp_path / "tokens1024"))


def test_ceilings_are_of_a_copy_and_of_products():
    found = bench.ceilings(torch.device("cpu"))
    assert found.keys() == {"copy", "torch.float32", "torch.bfloat16"}
    assert 1e9 < found["copy"] < 1e12 and 1e9 < found["torch.float32"] < 1e14
