"""tools.bench: its counts against independent ones, its reading of traces on real names, a whole run, wrong inputs."""

import json
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, make_model, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t
from tools.bench import bench, costs, kernels, plain, report

TINY = dict(num_layers=5, model_dim=64, num_heads=4, num_kv_heads=2, ve_layers=(3, 4), ve_dim=16, bigram_dim=16, vocab_size=128, train_seq_len=32,
            train_batch_tokens=128, micro_batch_tokens=128, eval_stride=32, dtype="fp32")


def tool(*args):
    """The finished process of tools.bench with these arguments."""
    return run({}, *args, script="tools.bench", fresh=True)


# ---- operations

@pytest.mark.parametrize("variant, looped", [("card", False), ("pr1812", False), ("pr1812", True), ("pr490", False), ("pr1127", False)])
def test_operations_are_those_that_torch_counts(variant, looped):
    sizes = TINY | (dict(ve_layers=()) if variant != "card" else {}) | (dict(attn_gate_dims=8, mlp_mult=4.0) if variant == "pr1812" else {})
    cfg = t.Config(**t.row(variant) | sizes | dict(num_loops=2 * (variant == "pr1812"), loop_start=1, loop_end=2,
                                                        ttt_chunk_tokens=32, xsa_last_n=2, rope_dims=8, parallel_residual_start=-1))
    model, tokens = make_model(cfg), torch.randint(2, 128, (3, 33))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:], looped).mean().backward()
    counted, found = counter.get_total_flops() / tokens[:, 1:].numel(), costs.train_flops(cfg, looped)
    passes = 5 + 4 * looped
    dense = 3 * 4 * 32 * 64 * passes  # torch computes every pair of positions, and two products for each backward
    assert found.attention == 3.5 * 4 * (33 / 2) * 64 * passes
    assert counted - dense == found.matmul and found.total == found.matmul + found.attention


def test_operations_of_the_contest_model_are_the_published_ones():
    """239.6 MFLOP a token for 11 layers without bigram and value tables; they add their two small projections."""
    small = 6 * 128 * (512 + 256)
    assert costs.train_flops(t.Config(), False).total == pytest.approx(239.6e6 + small, rel=2e-4)
    assert costs.train_flops(t.Config(**t.row("pr1812")), True).total == pytest.approx(444.1e6 + 6 * 17 * 12 * 8, rel=2e-4)


# ---- names in a profile

NAMES = {
    "attention": [
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2, cute::tuple<",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<flash::CollectiveMainloopBwdSm90<2, 2, 2,",
        "void cutlass::device_kernel<flash::FlashAttnBwdPreprocess<cute::tuple<cute::C<128>, cute::C<64> >, cutlass::bfloat16_t, float,",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16_t,",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, 128, 128, 8, 4, 4, 4,",
        "void flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<64, 128, 128, 8, 4, 4, 4, false, false,",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t,",
        "triton_tem_fused_flex_attention_0", "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "aten::scaled_dot_product_attention"],
    "matmul": [
        "nvjet_tst_192x192_64x4_1x2_h_bz_coopB_TNN", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x5_tn_align8>(Params)",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "void cublasLt::splitKreduce_kernel<32, 16, int, float,",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, ", "triton_tem_fused_addmm_3", "aten::mm", "aten::bmm", "aten::addmm", "aten::linear"],
    "elementwise": [
        "triton_poi_fused__to_copy_add_mul_7", "triton_red_fused__scaled_dot_product_flash_attention_backward_sum_12", "triton_poi_fused_mm_3",
        "triton_per_fused__fused_rms_norm_mul_0", "triton_for_fused_0",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::TensorListMetadata<3>,",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float, float, float, float>",
        "Memcpy DtoD (Device -> Device)", "Memset (Device)", "aten::mul", "aten::copy_", "aten::_fused_rms_norm", "aten::nll_loss_backward"],
    "communication": ["ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL",
                      "gloo:all_reduce", "c10d::allreduce_"],
    "other": ["autograd::engine::evaluate_function: MulBackward0", "my_own_kernel"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_kernels_and_operators_tell_the_kind_of_work(kind):
    assert {name: kernels.kind(name) for name in NAMES[kind]} == dict.fromkeys(NAMES[kind], kind)
    assert set(NAMES) | {"optimizer"} == set(kernels.KINDS)


def test_names_tell_which_attention_ran():
    found = [kernels.attention_backends([name]) for name in NAMES["attention"]]
    expected = ["fa3", "fa3", "fa3", "flash", "flash", "fa2", "cudnn", "efficient", "flex", "cpu", ""]
    assert found == [{name} if name else set() for name in expected]
    assert not kernels.attention_backends(NAMES["elementwise"] + NAMES["matmul"])


def test_another_attention_than_the_configured_one_is_an_error():
    for configured, ran in (("fa3", {"fa3"}), ("fa2", {"fa2"}), ("sdpa", {"cudnn"}), ("sdpa", {"cpu"}), ("cudnn", {"cudnn"})):
        assert kernels.attention_error(configured, ran) == ""
    for configured, ran in (("fa3", {"flash"}), ("fa3", {"fa3", "flash"}), ("fa2", {"flash"}), ("sdpa", set()), ("cudnn", {"flash"}), ("sdpa", {"fa3"})):
        error = kernels.attention_error(configured, ran)
        assert f"configured as {configured}" in error and all(name in error for name in ran) and "\n" not in error


# ---- traces

def event(cat, name, ts, dur, **args):
    return dict(ph="X", cat=cat, name=name, ts=ts, dur=dur, pid=1, tid=1, args=args)


def gpu_trace():
    """Two steps of 100 us on the host; kernels run later than they are launched, in part side by side."""
    events = [event("user_annotation", kernels.STEP, 0, 100), event("user_annotation", kernels.OPTIMIZER, 60, 40),
              event("user_annotation", kernels.STEP, 200, 100), event("cuda_runtime", "cudaEventSynchronize", 20, 5),
              event("cuda_runtime", "cudaDeviceSynchronize", 150, 5)]  # the second lies between the steps
    work = [("kernel", "nvjet_tst_1", 10, 130, 40), ("kernel", "pytorch_flash::flash_fwd_kernel", 15, 170, 20),
            ("kernel", "nvjet_tst_2", 70, 190, 10), ("kernel", "ncclDevKernel_AllReduce", 80, 195, 20),
            ("gpu_memcpy", "Memcpy HtoD", 210, 230, 10), ("kernel", "void at::native::vectorized_elementwise_kernel<4>", 220, 240, 20),
            ("kernel", "launched before the profile's steps", 150, 400, 50)]
    for i, (cat, name, launched, start, dur) in enumerate(work):
        events += [event("cuda_runtime", "cudaLaunchKernel", launched, 2, correlation=i), event(cat, name, start, dur, correlation=i)]
    return events


def test_kernels_count_in_the_range_that_launched_them():
    found = kernels.summarize(gpu_trace())
    assert found.shares == {k: pytest.approx(v / 120) for k, v in
                            dict(attention=20, matmul=40, elementwise=30, optimizer=10, communication=20, other=0).items()}
    assert found.busy_ms == pytest.approx((40 + 20 + 25 + 10 + 20) / 2e3)  # from 195 to 200 two kernels run
    assert (found.launches, found.syncs, found.backends) == (3, 0.5, ["flash"]) and found.eager == pytest.approx(20 / 120)
    assert found.top[0] == ("matmul", "nvjet_tst_1", 0.02, 0.5)
    with pytest.raises(ValueError, match="bench::step"):
        kernels.summarize(gpu_trace()[3:])


def test_an_operator_has_its_own_time_without_those_that_it_calls():
    events = [event("user_annotation", kernels.STEP, 0, 100), event("cpu_op", "aten::linear", 10, 50), event("cpu_op", "aten::mm", 20, 30),
              event("cpu_op", "aten::t", 12, 4), event("cpu_op", "aten::add", 70, 10), event("cpu_op", "aten::add", 200, 10)]
    found = kernels.summarize(events)
    assert {name: ms for _, name, ms, _ in found.top} == pytest.approx({"aten::mm": 0.03, "aten::linear": 0.016, "aten::t": 0.004, "aten::add": 0.01})
    assert (found.busy_ms, found.wall_ms, found.eager) == (pytest.approx(0.06), pytest.approx(0.1), 0)


# ---- communication

def test_bytes_between_ranks_are_those_that_two_processes_exchange(dataset, tmp_path):
    env = dataset | dict(VARIANT="smoke", OUTPUT_DIR=str(tmp_path))
    lines = run(env | {"PYTHONPATH": str(ROOT)}, processes=2, script=ROOT / "tests" / "helpers" / "traffic.py").stdout.splitlines()
    seen = json.loads(next(line for line in lines if line.startswith("seen:")).removeprefix("seen:"))
    found = costs.communication(t.Config.from_env(env | {"COMPILE": "on"}), 2, torch.float32, bench.driven)
    assert found.calls == len(seen) and sum(found.payload.values()) == sum(size for _, size in seen)
    reduced = sum(size for name, size in seen if name == "all_reduce")
    assert found.payload.get("allreduce", 0) == reduced
    assert found.wire == pytest.approx(sum(size for _, size in seen) / 2 + reduced / 2)


def test_every_rank_gets_every_update(dataset):
    """Whatever the optimizer's plan: updates of all matrices are gathered, at two bytes a number at least, gradients are summed."""
    cfg = t.Config.from_env(dataset | dict(VARIANT="smoke"))
    matrices = sum(p.numel() for n, p in make_model(cfg).named_parameters() if t.parameter_roles(make_model(cfg))[n] == "matrix")
    for world in (2, 3, 8):
        found = costs.communication(cfg, world, torch.float32, bench.driven)
        assert found.payload["allgather"] >= 2 * matrices
        assert found.payload.get("allreduce", 0) + found.payload.get("reduce_scatter", 0) >= 2 * matrices
    assert not torch.distributed.is_initialized()


def test_eight_cards_are_predicted_by_parts_and_by_ratio():
    moved = costs.Communication(8, dict(reduce_scatter=75_000_000, allgather=75_000_000, allreduce=15_000_000), 10)
    assert moved.wire == pytest.approx(7 / 8 * 180e6)
    found = costs.predict(80.0, 2.0, 1.0, moved)
    assert found.by_ratio == pytest.approx(81.6) and found.error == 0.04
    assert found.by_parts == pytest.approx((79 + 0.4375 + 0.25) * 1.0125)


# ---- the plain step

def test_the_plain_step_is_ours():
    """Same losses and weights over three steps in fp32; AdamW's epsilon keeps rounding of tiny gradients from deciding signs."""
    cfg = t.Config(**TINY, adam_eps=1e-4, ttt_chunk_tokens=32)
    model = make_model(cfg)
    twin = plain.Step(cfg, {n: w.clone() for n, w in model.state_dict().items()}, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 20, (1, 4, 33), generator=draw) for _ in range(3)]
    trainer = t.Trainer(model, iter([(r[..., :-1], r[..., 1:]) for r in rows]), cfg, t.Ranks())
    for r in rows:
        ours = trainer.step(0.5, 0.9).value()
        trainer.average.update(1 - cfg.ema_decay)
        assert twin(r[0, :, :-1], r[0, :, 1:], 0.5, 0.9).item() == pytest.approx(ours, rel=1e-5)
    start = make_model(cfg).state_dict()
    for (name, p), average in zip(twin.model.named_parameters(), twin.average):
        mine = dict(model.named_parameters())[name]
        assert (mine - start[name]).norm() > 1e-4, name
        assert (p - mine).norm() <= 1e-4 * (mine - start[name]).norm() + 1e-7, name
        assert torch.allclose(average, trainer.average.values[name], atol=1e-6), name


def test_the_plain_step_refuses_what_it_does_not_know():
    with pytest.raises(t.InputError, match="not [A-Z_]+="):
        plain.check(t.Config(**t.row("pr1812")))
    plain.check(t.Config(**t.row("demo")))


# ---- the tool

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


def test_a_gpu_has_its_own_defaults_and_memory(monkeypatch):
    args = bench.parse([], True)
    assert (args.variant, args.steps, args.warm_seconds) == (["card", "pr1812"], 100, 60.0) and bench.parse([], False).variant == ["demo"]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 << 20)
    assert bench.peak_mib(torch.device("cuda")) == 5


def test_ours_are_timed_on_a_cpu():
    clock = iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))
        assert bench.step_times(lambda: None, torch.device("cpu"), 3, 0) == [1000.0] * 3


def test_a_scaling_study_changes_one_thing_at_a_time():
    cfg = t.Config(**t.row("demo"))
    for _, _, changed in bench.scaled(cfg):
        differ = {n for n, v in vars(changed).items() if v != vars(cfg)[n]}
        assert differ <= {"model_dim", "num_heads", "num_kv_heads"} or differ <= {"num_layers", "ve_layers", "xsa_last_n"} or (
            differ <= {"train_seq_len", "micro_batch_tokens", "eval_seq_len"}) or differ == {"vocab_size"}
        assert changed.head_dim == cfg.head_dim and changed.train_batch_tokens == cfg.train_batch_tokens
    axes = [axis for axis, _, _ in bench.scaled(cfg)]
    assert {axis: axes.count(axis) for axis in axes} == dict(width=3, depth=3, sequence=3, vocabulary=4)


QUICK = ["--variant", "smoke", "--steps", "3", "--warm-seconds", "0"]


def test_a_whole_run(tmp_path):
    out, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text(json.dumps(dict(format=1, machine=dict(device="a", threads=1, torch="2"), rows=[dict(name="smoke", tokens=128, ms=2.0)])))
    done = tool(*QUICK, "-o", str(out), "--gptq", "--predict", "4", "--profile", str(tmp_path / "profile"), "--compare", str(old))
    result = json.loads(out.read_text())
    assert set(result) == {"format", "machine", "arguments", "ceilings", "rows", "plain", "scaling"}
    assert {"device", "torch", "commit", "env", "threads"} <= set(result["machine"])
    assert {"copy", "float32", "bfloat16"} == set(result["ceilings"])
    (row,) = result["rows"]
    assert set(report.METRICS) <= set(row) and row["attention_ran"] == ["cpu"] and row["attention_error"] == ""
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["ms"] * 1e3) and row["tokens"] == 128
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"] / result["ceilings"]["float32"])
    assert sum(row["shares"].values()) == pytest.approx(1) and row["shares"]["optimizer"] > 0.01 and 0 < row["busy"] <= 1
    assert row["communication"]["world"] == row["prediction"]["world"] == 4 and len(row["top"]) == 15
    assert row["prediction"]["by_ratio"] == pytest.approx(1.02 * row["ms"])
    assert {p["threads"] for p in result["plain"]} <= {1, 2} and all(p["ratio"] == p["plain_ms"] / p["ms"] for p in result["plain"])
    assert "ceilings: copy" in done.stdout and f"| smoke | ms a step | 2 | {row['ms']:.4g} | {row['ms'] / 2:.3f} |" in done.stdout
    assert "not alike: device, torch" in done.stdout or "not alike: device, threads, torch" in done.stdout
    assert {p.name for p in (tmp_path / "profile").iterdir()} == {"smoke.trace.json", "smoke.table.txt"}


def test_a_comparison_says_what_is_not_alike():
    old = dict(machine=dict(device="a", threads=1, torch="2"), rows=[dict(name="card", tokens=1, ms=2.0, gptq_seconds=3.0)])
    new = dict(machine=dict(device="b", threads=1, torch="2"), rows=[dict(name="card", tokens=2, ms=1.0), dict(name="demo", tokens=2, ms=1.0)])
    text = report.comparison(old, new)
    assert text.splitlines()[0] == "not alike: device, card tokens"
    assert [line for line in text.splitlines() if line.startswith("| card")] == ["| card | ms a step | 2 | 1 | 0.500 |"] and "demo" not in text
    with pytest.raises(t.InputError, match="no row of card"):
        report.comparison(old, new | dict(rows=new["rows"][1:]))


def test_another_attention_fails_the_run_after_its_results_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: dict(copy=1e9, float32=1e9))
    monkeypatch.setattr(kernels, "ALLOWED", {})
    with pytest.raises(t.InputError, match="smoke: attention is configured as sdpa"):
        bench.main([*QUICK, "--no-plain", "--steps-only", "-o", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["attention_error"] and "ceilings" in capsys.readouterr().out


@pytest.mark.parametrize("args, env, words", [
    (["--variant", "cards"], {}, "--variant cards must be one of card, "),
    (["--env", "MODEL_DIM"], {}, "--env MODEL_DIM must be NAME=VALUE"),
    (["--env", "MODEL_DIMM=5"], {}, "MODEL_DIMM is no option: did you mean MODEL_DIM?"),
    (["--env", "WIDTH=5"], {}, "--env WIDTH is no option of train_gpt.py"),
    (["--scaling", "--env", "VOCAB_SIZE=65536"], {}, "VOCAB_SIZE=262144 must lie in"),
    (["--env", "NUM_HEADS=3"], {}, "MODEL_DIM=32 must be a multiple of NUM_HEADS=3"),
    ([], {"VARIANT": "card"}, "VARIANT=card: choose rows by --variant"),
    ([], {"ATTENTION": "fa3"}, "ATTENTION=fa3 cannot run"),
    (["-o", "no/such/folder/x.json"], {}, "or there is no folder to hold it"),
    (["--compare", "missing.json"], {}, "--compare missing.json: No such file"),
    (["--compare", str(ROOT / "submission.json")], {}, "submission.json is not a file of this tool")])
def test_wrong_input_is_one_line(args, env, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(t.InputError) as error:
        bench.main(["--variant", "smoke", *args] if "--variant" not in args else args)
    assert words in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_error_ends_the_process_with_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--variant", "x"])
    with pytest.raises(SystemExit, match="^tools.bench: --variant x must be one of .*$") as end:
        runpy.run_module("tools.bench", run_name="__main__")
    assert "\n" not in end.value.code


def test_rows_take_one_micro_batch_of_a_card(tmp_path):
    found = {name: bench.row_config(name, {}, tmp_path, 1).train_batch_tokens for name in ("card", "pr1812", "pr1127", "demo", "card-small")}
    assert found == {"card": 98_304, "pr1812": 98_304, "pr1127": 65_536, "demo": 2048, "card-small": 1024}
    assert bench.row_config("card", {}, tmp_path, 8) == replace(t.Config(), output_dir=str(tmp_path), fit=False)
    assert bench.row_config("card", {"TRAIN_BATCH_TOKENS": "196608"}, tmp_path, 1).train_batch_tokens == 196_608
