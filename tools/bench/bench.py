"""Measures training steps on this machine: milliseconds, MFU, and the kinds of kernels that take the time.

    python -m tools.bench [--variant card] [--env MODEL_DIM=256] [--compare OLD.json]

Default rows: `card` and `pr1812` with 98,304 tokens per step on a GPU, `demo` on a CPU. `card-small` is `card` with
1,024 tokens per step. Tokens and weights are random. Options of train_gpt.py in the environment apply to all rows.
A row that is `card` in some size is also timed against plain PyTorch (tools/bench/plain.py).
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import train_gpt as t
from tools import ROOT, command_line, dict_table, positive
from tools.bench import anatomy, plain
from tools.files import Refused, read_json, write_file

WARM_SECONDS = dict(cpu=3.0, cuda=60.0)  # before steps are timed: a GPU that heats up lowers its clock speed
SMALL = {"card-small": dict(VARIANT="card", TRAIN_SEQ_LEN="512", TRAIN_BATCH_TOKENS="1024")}
OPTIMIZER = "bench::optimizer"  # a range that is recorded around the optimizer's step
# Kinds of kernels: the first pattern that a name matches decides. Inductor names a kernel after all that it fused.
RULES = (
    (r"^triton_(poi|red|per|for)_|cpp_fused", "elementwise"),
    (r"nccl|^gloo:|^c10d::|_c10d_functional", "communication"),
    (r"flash|FlashAttn|cudnn_generated.*sdpa|fmha_|flex_attention|scaled_dot_product", "attention"),
    (r"nvjet|gemm|gemv|cutlass|cublas|splitKreduce|^triton_(tem_|mm)|^mkldnn::_linear|^mkl::_mkl_linear", "matmul"),
    (r"^mkldnn_mm|^aten::_?(b?mm|(badd|add)b?mm(_activation)?|matmul|linear|(add)?mv|einsum|dot|addr)_?$", "matmul"),
    (r"^aten::|at::native|at_cuda_detail|^Memcpy|^Memset|cub::|elementwise|reduce_kernel", "elementwise"),
)
STEP = "name tokens:, ms:.2f low:.2f high:.2f tokens_per_second:,.0f MFLOP_per_token:.1f mfu:.1% peak_mib:, "
STEP += "ms_on_8:.1f old_ms:.2f ms/old:.3f"
PROFILE = "name attention:.1% matmul:.1% elementwise:.1% optimizer:.1% other:.1% busy_ms:.2f launches:.0f waits:.1f "
PROFILE += "attention_kernel:.60"
RACE = "name tokens:, ms:.1f plain_ms:.1f ratio:.2f low:.2f high:.2f"


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_times(run: Callable[[], Any], device: torch.device, count: int, warm: int = 0) -> list[float]:
    """Returns the milliseconds of each of `count` calls after `warm` others, on a GPU by events without a wait."""
    on_gpu, marks = device.type == "cuda", []
    for i in range(warm + count + 1):
        if i:
            run()
        if i == warm:
            settle(device)
        if i >= warm:
            marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
            on_gpu and marks[-1].record()
    settle(device)
    return [a.elapsed_time(b) if on_gpu else 1e3 * (b - a) for a, b in pairwise(marks)]


def in_turns(runs: dict[str, Callable], device: torch.device, rounds: int, count: int = 1) -> dict[str, list[float]]:
    """Times functions in turns, so that changes of the clock speed affect all; returns milliseconds by name."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            times[name] += step_times(run, device, count, warm=0 if i else count)
    return times


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16; a CPU does without bf16 units, a GPU does not."""
    return device.type == "cpu" or t.compute_dtype(t.Config(), device) == torch.bfloat16


def ceilings(device: torch.device) -> dict[str, float]:
    """Returns the bytes per second of a copy (read and written) and the operations per second of matmuls by dtype."""
    on_gpu = device.type == "cuda"
    shapes = [(8192, 8192, 8192), (98304, 512, 2048)] if on_gpu else [(1024, 1024, 1024), (2048, 512, 1536)]
    source = torch.ones((1 << 30 if on_gpu else 1 << 27) // 4, device=device)
    target, found = torch.empty_like(source), {}

    def try_rate(name: str, work: float, run: Callable[[], Any]) -> None:
        count = int(min(max((1e3 if on_gpu else 200.0) / step_times(run, device, 1, warm=1)[0], 3), 1000))
        found[name] = max(found.get(name, 0.0), 1e3 * work / min(step_times(run, device, count, warm=1)))

    try_rate("copy", 2 * source.nbytes, lambda: target.copy_(source))
    for dtype in (torch.float32, torch.bfloat16)[: 1 + has_bf16(device)]:
        for m, k, n in shapes:
            a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
            try_rate(str(dtype), 2.0 * m * k * n, partial(torch.matmul, a, b))
    return found


def row_config(name: str, env: Mapping[str, str], folder: Path) -> t.Config:
    """Returns the settings of a row: one micro-batch per step unless TRAIN_BATCH_TOKENS is set, one sequence length."""
    if name not in t.VARIANTS | SMALL:
        raise Refused(f"--variant {name} must be one of {', '.join(t.VARIANTS | SMALL)}")
    row = SMALL.get(name, dict(VARIANT=name))
    env = row | dict(env) | dict(VARIANT=row["VARIANT"])
    cfg = t.Config.from_env(env)
    if "TRAIN_BATCH_TOKENS" not in env:
        cfg = replace(cfg, train_batch_tokens=min(cfg.train_batch_tokens, cfg.micro_batch_tokens))
    return with_tokens(replace(cfg, early_seq_lens=(), early_seq_ends=(), audit=""), folder)


def with_tokens(cfg: t.Config, folder: Path, count: int = 2**21) -> t.Config:
    """Writes a shard of random tokens, rare ones rarer, in documents of about 500, and sets DATA_PATH."""
    path = folder / f"tokens{cfg.vocab_size}" / "fineweb_train_000000.bin"
    if not path.exists():
        generator, weight = np.random.default_rng(0), 1 / (3 + np.arange(cfg.vocab_size - 2))
        tokens = generator.choice(np.arange(2, cfg.vocab_size, dtype="<u2"), count, p=weight / weight.sum())
        tokens[generator.random(count) < 1 / 500] = t.BOS
        header = np.zeros(t.SHARD_HEADER_BYTES // 4, dtype="<i4")
        header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, count
        write_file(path, header.tobytes() + tokens.tobytes())
    return replace(cfg, data_path=str(path.parent))


def make_trainer(cfg: t.Config, ranks: t.Ranks, looped: bool = False) -> t.Trainer:
    model = t.GPT(cfg, t.choose_attention(cfg, ranks).attend, t.compute_dtype(cfg, ranks.device))
    model.init_weights(cfg)
    stream = t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size)
    trainer = t.Trainer(model.to(ranks.device), t.Batches(stream, cfg, ranks), cfg, ranks)
    trainer.looped = looped
    return trainer


def make_scorer(tokens: np.ndarray, cfg: t.Config, ranks: t.Ranks) -> t.Scorer:
    """Returns a scorer that needs no tokenizer: every token counts as one byte."""
    with mock.patch.object(t, "target_bytes", lambda stream, _: torch.ones(len(stream) - 1, dtype=torch.int64)):
        return t.Scorer(tokens.astype(np.uint16), replace(cfg, val_max_tokens=0), ranks, t.Log(cfg, t.Ranks(rank=1)))


def driven(trainer: t.Trainer) -> Callable[[], None]:
    """Returns a function that makes a step as train_gpt.train does, with the average and the previous loss."""
    cfg, average, pending = trainer.cfg, trainer.average, []

    def step() -> None:
        trainer.ranks.maximum(0.0, 0.0)
        pending.append(trainer.step(0.1, cfg.muon_momentum))
        if len(pending) > 1:
            pending.pop(0).value()
        average.update(t.average_weight(1, 1.0, average.count, cfg))

    return step


def kind_of(name: str) -> str:
    """Returns the kind of a GPU kernel or CPU operator by its name."""
    return next((kind for pattern, kind in RULES if re.search(pattern, name)), "other")


def summarize(events: list[Any], on_gpu: bool, steps: int) -> dict[str, Any]:
    """Sums up GPU kernels, or CPU operators by their own time: shares of the busy time by kind, and counts per step."""
    work = [e for e in events if (e.device_type == DeviceType.CUDA) == on_gpu]
    ranges = [e.time_range for e in work if e.name == OPTIMIZER]
    work, kinds, names = [e for e in work if not e.is_user_annotation], Counter(), Counter()
    for e in work:
        kind, busy = kind_of(e.name), e.self_device_time_total if on_gpu else e.self_cpu_time_total
        if kind != "communication" and any(r.start <= e.time_range.start < r.end for r in ranges):
            kind = "optimizer"
        kinds[kind] += busy
        names[kind, e.name] += busy
    total, waits = sum(kinds.values()), sum("Synchronize" in e.name for e in events)
    found = {kind: busy / total for kind, busy in kinds.items()} | dict(busy_ms=total / steps / 1e3)
    found |= dict(launches=len(work) * on_gpu / steps, waits=waits / steps)
    top = [[kind, name, busy / steps / 1e3] for (kind, name), busy in names.most_common()]
    attention = next((name for kind, name, _ in top if kind == "attention"), "none")
    return found | dict(attention_kernel=attention, top=top[:20])


def profiled(trainer: t.Trainer, steps: int = 2) -> dict[str, Any]:
    device, step, optimizers = trainer.ranks.device, driven(trainer), trainer.optimizers
    on_gpu, run = device.type == "cuda", optimizers.step

    def ranged(*args: Any) -> Any:
        with record_function(OPTIMIZER):
            return run(*args)

    with mock.patch.object(optimizers, "step", ranged):
        for count in (1, steps):  # the first profile includes the start of the profiler
            with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
                for _ in range(count):
                    step()
                settle(device)
    return summarize(profiler.events(), on_gpu, steps)


def timed_step(trainer: t.Trainer, ceiling: float, count: int, warm_seconds: float) -> dict[str, Any]:
    """Times, counts and profiles the step; `ceiling` in operations per second."""
    device, cfg, step = trainer.ranks.device, trainer.cfg, driven(trainer)
    first = step_times(step, device, 1)[0] / 1e3  # compiles
    warm = int(1e3 * warm_seconds / min(step_times(step, device, 3)))
    low, ms, high = np.percentile(step_times(step, device, count, warm), (25, 50, 75)).tolist()
    rate, flops = 1e3 * cfg.train_batch_tokens / ms, sum(anatomy.train_flops(cfg, trainer.looped).values())
    found = dict(tokens=cfg.train_batch_tokens, ms=ms, low=low, high=high, tokens_per_second=rate, first_s=first)
    found |= dict(MFLOP_per_token=flops / 1e6, mfu=rate * flops / ceiling)
    found["ms_on_8"] = 1.02 * ms  # predicted, +- 4 %: the mean of eight pairs of public logs and their deviation
    found |= dict(peak_mib=torch.cuda.max_memory_allocated() >> 20) if device.type == "cuda" else {}
    return found | profiled(trainer)


def race(name: str, cfg: t.Config, ranks: t.Ranks, rounds: int) -> dict[str, Any]:
    """Times our step and the plain one in turns; `low` and `high` are quartiles of their ratios."""
    plain.check(cfg)
    share = 3 if ranks.device.type == "cuda" else 1  # an eager step needs more memory
    tokens = max(1, cfg.train_batch_tokens // cfg.train_seq_len // share) * cfg.train_seq_len
    cfg = replace(cfg, train_batch_tokens=tokens)
    trainer = make_trainer(cfg, ranks)
    plain_step = plain.Step(cfg, trainer.model.state_dict(), ranks.device)

    def step() -> None:
        ids, targets = (x.flatten(0, 1) for x in next(trainer.batches))
        plain_step(ids, targets, 0.1, cfg.muon_momentum).item()

    times = in_turns(dict(ours=driven(trainer), plain=step), ranks.device, rounds)
    ours, other = map(statistics.median, times.values())
    low, high = np.percentile(np.divide(times["plain"], times["ours"]), (25, 75)).tolist()
    return dict(name=name, tokens=tokens, ms=ours, plain_ms=other, ratio=other / ours, low=low, high=high)


def machine(device: torch.device) -> dict[str, Any]:
    """Returns the hardware and the versions of torch and of this repository."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "model name : CPU"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else re.search(r"model name\s*: (.*)", info)[1]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return dict(device=name, threads=torch.get_num_threads(), torch=torch.__version__, commit=commit)


def parse(argv: list[str]) -> argparse.Namespace:
    cli, on_gpu = command_line("tools.bench", __doc__), torch.cuda.is_available()
    cli.add_argument("--variant", action="append", help="a row; may be repeated (default: VARIANT, or as above)")
    cli.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="an option of train_gpt.py")
    cli.add_argument("--steps", type=positive, default=100 if on_gpu else 10, help="timed steps (here: %(default)s)")
    cli.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of the CPU")
    cli.add_argument("--compare", type=Path, metavar="OLD.json", help="also print the ratio to an earlier result")
    cli.add_argument("-o", "--output", type=Path, default=Path("bench.json"), help="result (default: %(default)s)")
    args = cli.parse_args(argv)
    args.env = dict(pair.partition("=")[::2] for pair in args.env)
    default = (os.environ | args.env).get("VARIANT", "card pr1812" if on_gpu else "demo")
    args.variant = args.variant or default.split()
    if unknown := [name for name in args.env if name.lower() not in t.Config.__dataclass_fields__]:
        raise Refused(f"--env {unknown[0]} must be NAME=VALUE with an option of train_gpt.py")
    if args.output.is_dir():
        raise Refused(f"cannot write {args.output}: it is a folder")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    found = read_json(args.compare) if args.compare else dict(rows=[])
    try:
        old = {row["name"]: float(row["ms"]) for row in found["rows"]}
    except (LookupError, TypeError, ValueError):
        raise Refused(f"--compare {args.compare} is not a file that this tool wrote") from None
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, t.launch({}) as ranks:
        configs = {name: row_config(name, os.environ | args.env, Path(folder)) for name in args.variant}
        rates, on_gpu, rows, races = ceilings(ranks.device), ranks.device.type == "cuda", [], []
        result = dict(machine=machine(ranks.device), ceilings=rates, rows=rows, plain=races)
        print(*(f"{key}: {value}" for key, value in (result["machine"] | rates).items()), sep="\n", flush=True)
        for name, cfg in configs.items():
            dtype = str(t.compute_dtype(cfg, ranks.device))
            for looped in range(1 + (cfg.num_loops > 0)):
                if on_gpu:
                    torch._dynamo.reset()
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                trainer, row = make_trainer(cfg, ranks, bool(looped)), dict(name=name + " looped" * looped, dtype=dtype)
                rows.append(row | timed_step(trainer, rates[dtype], args.steps, WARM_SECONDS[ranks.device.type]))
                if before := old.get(row["name"]):
                    rows[-1] |= {"old_ms": before, "ms/old": rows[-1]["ms"] / before}
        for name in args.variant:
            try:
                races.append(race(name, configs[name], ranks, max(3, args.steps // 2)))
            except Refused as error:
                print(f"{name}: {error}", file=sys.stderr)
    print("", dict_table(rows, STEP), dict_table(rows, PROFILE), dict_table(races, RACE), sep="\n\n")
    write_file(args.output, json.dumps(result, indent=1).encode())
    print(f"\nwrote {args.output}")
