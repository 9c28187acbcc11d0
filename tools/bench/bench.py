"""How fast the training step is and what the machine could do: ceilings, then a row a variant; a table and a JSON file.

    python -m tools.bench [--variant card] [--env MODEL_DIM=256] [--compare OLD.json] [--scaling] [--predict 8]

Rows: `card` and `pr1812` with 98,304 tokens a step on a GPU; on a CPU `demo` and, if asked for, `card-small`, which is
`card` in full width with 1,024 tokens. Tokens and weights are random. Options of train_gpt.py in the environment count.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import train_gpt as t
from tools import ROOT, command_line, positive
from tools.bench import costs, kernels, plain
from tools.bench import report as tables

PROC = Path("/proc/self")
SMALL = {"card-small": dict(VARIANT="card", TRAIN_SEQ_LEN="512", TRAIN_BATCH_TOKENS="1024")}


# ----------------------------------------
# Time and memory of a device

def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: torch.device) -> Any:
    """A moment: on a GPU that at which it comes to this point of its queue, so that the host need not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Any, end: Any) -> float:
    """Milliseconds from one moment to the next."""
    return 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)


def one_time(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call on a device that has nothing else to do."""
    settle(device)
    begin = mark(device)
    run()
    end = mark(device)
    settle(device)
    return between(begin, end)


def step_times(run: Callable[[], Any], device: torch.device, count: int, warm: int) -> list[float]:
    """Milliseconds of each of `count` calls in a row, after `warm` others."""
    for _ in range(warm):
        run()
    settle(device)
    marks = [mark(device)]
    for _ in range(count):
        run()
        marks.append(mark(device))
    settle(device)
    return [between(a, b) for a, b in zip(marks, marks[1:])]


def fresh(device: torch.device) -> None:
    """Give back what the row before held and begin to note the peak of memory."""
    gc.collect()
    if device.type == "cuda":
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif PROC.exists():
        (PROC / "clear_refs").write_text("5")


def peak_mib(device: torch.device) -> int:
    """The peak since `fresh`: of what torch allocated on a GPU, of the process on a CPU; 0 where none knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return int((PROC / "status").read_text().split("VmHWM:")[1].split()[0]) >> 10 if PROC.exists() else 0


def best_rate(run: Callable[[], Any], device: torch.device, work: float, seconds: float) -> float:
    """`work` by the shortest time of `run`, a second, of as many as fit in `seconds`, three at least."""
    run()
    count = int(min(max(1e3 * seconds / one_time(run, device), 3), 1000))
    return 1e3 * work / min(step_times(run, device, count, 1))


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Copied bytes a second, read and written, and floating-point operations a second of matmuls by dtype."""
    on_gpu = device.type == "cuda"
    source = torch.ones((1 << 30 if on_gpu else 1 << 27) // 4, device=device)
    target, seconds = torch.empty_like(source), 1.0 if on_gpu else 0.2
    found = {"copy": best_rate(lambda: target.copy_(source), device, 2 * source.nbytes, seconds)}
    shapes = [(1024, 1024, 1024), (2048, 512, 1536)]
    if on_gpu:
        shapes = [(8192, 8192, 8192), (16384, 4096, 4096), (98304, 512, 2048)]
    for kind in dict.fromkeys((dtype, torch.float32, torch.bfloat16)):
        rates = []
        for m, k, n in shapes:
            a, b = (torch.randn(shape, device=device).to(kind) for shape in ((m, k), (k, n)))
            rates.append(best_rate(partial(torch.matmul, a, b), device, 2.0 * m * k * n, seconds))
        found[str(kind).removeprefix("torch.")] = max(rates)
    return found


# ----------------------------------------
# A row: a variant's trainer on random tokens

def row_config(name: str, env: Mapping[str, str], folder: Path, world: int) -> t.Config:
    """The settings of a row, with one micro-batch a rank and step unless TRAIN_BATCH_TOKENS says, in rows of
    TRAIN_SEQ_LEN. Raises InputError.
    """
    if name not in t.VARIANTS | SMALL:
        raise t.InputError(f"--variant {name} must be one of {', '.join(t.VARIANTS | SMALL)}")
    env = {"VARIANT": name} | SMALL.get(name, {}) | dict(env)
    cfg = t.Config.from_env(env)
    if {"EARLY_SEQ_LENS", "EARLY_SEQ_ENDS"} & env.keys():
        raise t.InputError("EARLY_SEQ_LENS, EARLY_SEQ_ENDS: rows are timed at one length; set TRAIN_SEQ_LEN")
    if "TRAIN_BATCH_TOKENS" not in env:
        cfg = replace(cfg, train_batch_tokens=min(cfg.train_batch_tokens, cfg.micro_batch_tokens * world))
    return replace(cfg, output_dir=str(folder), fit=False, audit="", artifact="", early_seq_lens=(), early_seq_ends=())


def write_tokens(folder: Path, vocab_size: int, count: int = 2**21) -> None:
    """A shard of random tokens, rare ones rarer, in documents of about 500: gradients of tables meet often."""
    draw = np.random.default_rng(0)
    weight = 1 / (3 + np.arange(vocab_size - 2))
    tokens = draw.choice(np.arange(2, vocab_size, dtype="<u2"), count, p=weight / weight.sum())
    tokens[draw.random(count) < 1 / 500] = t.BOS
    header = np.zeros(t.SHARD_HEADER_BYTES // 4, dtype="<i4")
    header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, count
    folder.mkdir()
    (folder / "fineweb_train_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())


def driven(trainer: t.Trainer) -> Callable[[], None]:
    """A step as train_gpt.train makes it, with the average and a look at the loss of the step before."""
    cfg, average, before = trainer.cfg, trainer.average, []

    def step() -> None:
        trainer.ranks.maximum(0.0, 0.0)
        reading = trainer.step(0.1, cfg.muon_momentum)
        if before:
            before.pop().value()
        before.append(reading)
        average.update(t.average_weight(1, 1.0, average.count, cfg))

    return step


def batches(cfg: t.Config, ranks: t.Ranks) -> t.Batches:
    return t.Batches(t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size), cfg, ranks)


def make_trainer(cfg: t.Config, ranks: t.Ranks, looped: bool = False) -> tuple[str, t.Trainer]:
    """(name of the attention, trainer), as train_gpt.run_training makes them."""
    name, attend, _ = t.choose_attention(cfg, ranks)
    model = t.GPT(cfg, attend, t.compute_dtype(cfg, ranks.device))
    model.init_weights(cfg)
    trainer = t.Trainer(model.to(ranks.device), batches(cfg, ranks), cfg, ranks)
    trainer.looped = looped
    return name, trainer


def ranged(name: str, fn: Callable) -> Callable:
    def run(*args: Any) -> Any:
        with record_function(name):
            return fn(*args)

    return run


def profiled(trainer: t.Trainer, path: Path, steps: int) -> kernels.Summary:
    """The summary of `steps` profiled steps, whose Chrome trace is written to `path`."""
    device, step = trainer.ranks.device, driven(trainer)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with ExitStack() as stack:
        for owner, name in ((trainer.optimizers, "step"), (trainer.average, "update")):
            wrapped = ranged(kernels.OPTIMIZER, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        prof = stack.enter_context(profile(activities=activities))
        for i in range(1 + steps):
            (ranged(kernels.STEP, step) if i else step)()  # the profiler itself is slow in the first
            settle(device)
    prof.export_chrome_trace(str(path))
    return kernels.summarize(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def one_byte_each(stream: np.ndarray, cfg: t.Config, device: torch.device) -> torch.Tensor:
    """train_gpt.target_bytes without a tokenizer."""
    return torch.ones(len(stream) - 1, dtype=torch.int64, device=device)


def eval_seconds(trainer: t.Trainer) -> float:
    """Seconds of the sliding evaluation of a million tokens, from what some batches of windows take."""
    cfg, ranks = trainer.cfg, trainer.ranks
    windows = cfg.eval_batch_seqs * (8 if ranks.device.type == "cuda" else 1)
    tokens = np.random.default_rng(1).integers(2, cfg.vocab_size, cfg.window + windows * cfg.eval_stride + 1)
    with mock.patch.object(t, "target_bytes", one_byte_each):
        scorer = t.Scorer(tokens.astype(np.uint16), replace(cfg, val_max_tokens=0), ranks, t.Log(cfg, t.Ranks(rank=1)))
    for _ in range(2):  # the first one compiles
        settle(ranks.device)
        score = scorer.sliding(trainer.forward)
    return score.seconds * 1e6 / cfg.eval_stride / (windows + 1)


def coding_seconds(trainer: t.Trainer, with_gptq: bool) -> dict[str, float]:
    """Seconds to quantize by rounding and pack all weights, to unpack them and, if wanted, to quantize by GPTQ."""
    weights, grid_of = trainer.average.values, t.grids(trainer.model, trainer.cfg)
    cfg, found, begin = replace(trainer.cfg, quantizer="rtn", mean_step=0.0), {}, time.perf_counter()
    blob = t.pack(t.quantize(weights, t.coding_plans(weights, grid_of, cfg, {})), trainer.looped, cfg)
    middle = time.perf_counter()
    t.dequantize(t.unpack(blob)[1])
    found |= dict(pack_seconds=middle - begin, unpack_seconds=time.perf_counter() - middle)
    if with_gptq:
        cfg, costs_of = replace(trainer.cfg, quantizer="gptq"), {}
        for name, w in weights.items():
            x = torch.randn(2 * w.size(-1), w.size(-1), device=w.device) if w.ndim == 2 else None
            if x is not None and grid_of[name].bits < 16:
                costs_of[name] = t.Curvature(x.T @ x / len(x), torch.ones(len(w), device=w.device))
        begin = time.perf_counter()
        t.quantize(weights, t.coding_plans(weights, grid_of, cfg, costs_of))
        found["gptq_seconds"] = time.perf_counter() - begin
    return found


def speed(ms: list[float], cfg: t.Config, ranks: t.Ranks, looped: bool, roof: float) -> dict[str, Any]:
    """Quartiles of the steps' milliseconds and what follows from their median, for one rank; `roof` in operations/s."""
    low, middle, high = (float(q) for q in np.percentile(ms, (25, 50, 75)))
    tokens, flops = cfg.train_batch_tokens // ranks.world, costs.train_flops(cfg, looped)
    rate = 1e3 * tokens / middle
    return dict(ms=middle, ms_quartiles=[low, high], steps=len(ms), tokens=tokens, tokens_per_second=rate,
                flops_per_token=flops.total, attention_flops_per_token=flops.attention,
                tflops=rate * flops.total / 1e12, mfu=rate * flops.total / roof)


@dataclass
class Bench:
    """What all rows of a run share."""

    args: argparse.Namespace
    folder: Path
    ranks: t.Ranks
    roofs: dict[str, float]

    def roof(self, cfg: t.Config) -> float:
        return self.roofs[str(t.compute_dtype(cfg, self.ranks.device)).removeprefix("torch.")]

    def times(self, step: Callable[[], None], quick: bool = False) -> list[float]:
        """Milliseconds of steps after a time of warming up, in as many steps on all ranks."""
        count, warm = (max(3, self.args.steps // 4), 2.0) if quick else (self.args.steps, self.args.warm_seconds)
        on_gpu = self.ranks.device.type == "cuda"
        for _ in range(1 + on_gpu):  # the first one compiles
            step()
        one = min(one_time(step, self.ranks.device) for _ in range(1 + 2 * on_gpu))
        steps = 1e3 * min(warm, self.args.warm_seconds) / one
        return step_times(step, self.ranks.device, count, int(*self.ranks.maximum(steps)))

    def row(self, name: str, cfg: t.Config, looped: bool, moved: costs.Communication) -> dict[str, Any]:
        """All that is measured of one variant in one state of its loops."""
        device, place = self.ranks.device, self.args.profile if self.ranks.is_main else None
        fresh(device)
        attention, trainer = make_trainer(cfg, self.ranks, looped)
        step = driven(trainer)
        row = dict(name=name + " looped" * looped, parameters=sum(p.numel() for p in trainer.model.parameters()),
                   dtype=str(trainer.model.dtype), micro_steps=trainer.batches.micro_steps)
        row |= speed(self.times(step), cfg, self.ranks, looped, self.roof(cfg)) | dict(peak_mib=peak_mib(device))
        path = (place or self.folder) / f"{row['name'].replace(' ', '-')}.trace.json"
        seen = profiled(trainer, path, 3 if device.type == "cuda" else 2)
        busy = seen.busy_ms / (row["ms"] if device.type == "cuda" else seen.wall_ms)
        row |= dict(shares=seen.shares, busy=min(busy, 1.0), busy_ms=seen.busy_ms, launches=seen.launches,
                    syncs=seen.syncs, eager_share=seen.eager, top=seen.top[:15],
                    attention=attention, attention_ran=seen.backends,
                    attention_error=kernels.attention_error(attention, set(seen.backends)))
        if place:
            text = tables.table(tables.TOP, seen.top[:60]) + "\n"
            path.with_name(path.name.replace("trace.json", "table.txt")).write_text(text)
        if not self.args.steps_only:
            row["eval_seconds"] = eval_seconds(trainer)
            row |= {} if looped else coding_seconds(trainer, self.args.gptq)
        row["communication"] = dict(world=moved.world, payload=moved.payload, calls=moved.calls, sent=moved.wire)
        if self.args.predict:
            row["prediction"] = self.prediction(trainer, row["ms"], moved)
        return row

    def prediction(self, trainer: t.Trainer, ms: float, moved: costs.Communication) -> dict[str, Any]:
        """The step of many GPUs from this one, for which the optimizer runs whole and then on one rank's share."""
        whole = self.optimizer_ms(trainer.optimizers, trainer.model)
        with costs.pretended(moved.world, self.ranks.device) as ranks:
            shard = self.optimizer_ms(t.Optimizers(trainer.model, ranks, trainer.cfg), trainer.model)
        found = costs.predict(ms, whole, shard, moved)
        return dict(found._asdict(), world=moved.world, optimizer_ms=whole, sharded_optimizer_ms=shard)

    def optimizer_ms(self, optimizers: t.Optimizers, model: t.GPT) -> float:
        for p in model.parameters():
            p.grad = 1e-3 * torch.randn_like(p)
        return statistics.median(self.times(lambda: optimizers.step(1e-3, 0.9), quick=True))

    def race(self, name: str, cfg: t.Config, threads: int) -> dict[str, Any]:
        """Our step and the plain one in turns, on the same weights and batches; `threads` of a CPU."""
        fresh(self.ranks.device)
        if self.ranks.device.type == "cpu":
            torch.set_num_threads(threads)
        trainer = make_trainer(cfg, self.ranks)[1]
        twin, rows = plain.Step(cfg, trainer.model.state_dict(), self.ranks.device), batches(cfg, self.ranks)

        def step() -> None:
            ids, targets = next(rows)
            twin(ids.flatten(0, 1), targets.flatten(0, 1), 0.1, cfg.muon_momentum).item()

        turns, cpu, ours = ([], []), ([], []), driven(trainer)
        for run in (ours, step):
            run()
        for _ in range(max(3, self.args.steps // 2)):
            for found, used, run in zip(turns, cpu, (ours, step)):
                begin = time.process_time()
                found.append(one_time(run, self.ranks.device))
                used.append(time.process_time() - begin)
        (a, b), (c, d) = map(statistics.median, turns), map(statistics.median, cpu)
        pairs = np.percentile([y / x for x, y in zip(*turns)], (25, 75))
        return dict(name=name, threads=threads, dtype=str(trainer.model.dtype), tokens=cfg.train_batch_tokens, ms=a,
                    plain_ms=b, ratio=b / a, ratio_quartiles=pairs.tolist(), cpu_ratio=d / c, turns=len(turns[0]))

    def races(self, configs: Mapping[str, t.Config]) -> list[dict[str, Any]]:
        """The race of each row that the plain step knows, on 1 and on 2 threads of a CPU; on a GPU with a third of the
        batch, since an eager step keeps more.
        """
        found, threads = [], torch.get_num_threads()
        for name, cfg in configs.items():
            try:
                plain.check(cfg)
            except t.InputError as error:
                print(f"{name}: no race, {error}", file=sys.stderr)
                continue
            if self.ranks.device.type == "cuda":
                rows = max(1, cfg.train_batch_tokens // cfg.train_seq_len // 3)
                cfg = replace(cfg, train_batch_tokens=rows * cfg.train_seq_len)
                found.append(self.race(name, cfg, threads))
            else:
                found += [self.race(name, cfg, n) for n in (1, 2)[: os.cpu_count()]]
        torch.set_num_threads(threads)
        return found

    def scaling(self, name: str, cfg: t.Config) -> list[dict[str, Any]]:
        """The step at other widths, depths, lengths and vocabularies of the row, one changed at a time."""
        found = []
        for axis, value, changed in scaled(cfg):
            folder = Path(changed.data_path).with_name(f"tokens{changed.vocab_size}")
            if not folder.exists():
                write_tokens(folder, changed.vocab_size)
            changed = replace(changed, data_path=str(folder))
            fresh(self.ranks.device)
            ms = self.times(driven(make_trainer(changed, self.ranks)[1]), quick=True)
            row = speed(ms, changed, self.ranks, False, self.roof(changed))
            found.append(dict(name=name, axis=axis, value=value) | row)
        return found


def scaled(cfg: t.Config) -> Iterable[tuple[str, int, t.Config]]:
    """(axis, value, settings) of a scaling study around `cfg`, which is among them for each axis."""
    heads = cfg.head_dim
    for factor in (0.5, 1, 2):
        dim = int(cfg.model_dim * factor)
        n, kv = dim // heads, max(1, cfg.num_kv_heads * dim // cfg.model_dim)
        yield "width", dim, replace(cfg, model_dim=dim, num_heads=n, num_kv_heads=kv)
    for factor in (0.5, 1, 2):
        layers = max(2, int(cfg.num_layers * factor))
        last = tuple(range(layers - len(cfg.ve_layers), layers))
        exclusive = min(cfg.xsa_last_n, layers)
        yield "depth", layers, replace(cfg, num_layers=layers, num_loops=0, ve_layers=last, xsa_last_n=exclusive)
    for factor in (0.5, 1, 2):
        length = int(cfg.train_seq_len * factor)
        micro = max(length, cfg.micro_batch_tokens)
        yield "sequence", length, replace(cfg, train_seq_len=length, micro_batch_tokens=micro, eval_seq_len=cfg.window)
    for factor in (0.5, 1, 4, 8):
        size = int(cfg.vocab_size * factor)
        yield "vocabulary", size, replace(cfg, vocab_size=size)


def machine(device: torch.device) -> dict[str, Any]:
    """What ran: hardware, versions, commit, and the variables that change how torch runs."""
    on_gpu = device.type == "cuda"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    cpu, describe = (names or [platform.machine()])[0], ["describe", "--always", "--dirty", "--abbrev=12"]
    git = subprocess.run(["git", "-C", str(ROOT), *describe], capture_output=True, text=True)
    options = {f.name for f in fields(t.Config)}
    told = {k: v for k, v in sorted(os.environ.items()) if k.lower() in options or k.startswith(
        ("OMP_", "MKL_", "KMP_", "TORCH", "PYTORCH", "CUDA_", "NCCL_", "MALLOC_", "DNNL_", "ONEDNN_"))}
    return dict(device=torch.cuda.get_device_name(device) if on_gpu else cpu, kind=device.type, cpu=cpu,
                cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
                cuda=torch.version.cuda, python=platform.python_version(),
                commit=git.stdout.strip() or "unknown", env=told, time=time.strftime("%Y-%m-%d %H:%M:%S"))


# ----------------------------------------
# Command line

def seconds(text: str) -> float:
    if not 0 <= (value := float(text)) < 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return value


def parse(argv: list[str], on_gpu: bool) -> argparse.Namespace:
    """The arguments, with defaults for the device. Raises InputError for files and folders that cannot be used."""
    cli = command_line("tools.bench", __doc__)
    cli.add_argument("--variant", action="append", help="a row; may be repeated (default: see above)")
    cli.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="an option of train_gpt.py")
    cli.add_argument("--steps", type=positive, default=100 if on_gpu else 10, help="that are timed (here: %(default)s)")
    cli.add_argument("--warm-seconds", type=seconds, default=60.0 if on_gpu else 3.0, help="before (here: %(default)s)")
    cli.add_argument("--threads", type=positive, help="of the CPU")
    cli.add_argument("--no-plain", dest="plain", action="store_false", help="no race with the plain step")
    cli.add_argument("--gptq", action="store_true", help="time GPTQ, too: minutes on a CPU")
    cli.add_argument("--steps-only", action="store_true", help="time no evaluation and no packing")
    cli.add_argument("--scaling", action="store_true", help="other sizes of the first row")
    cli.add_argument("--predict", type=positive, metavar="N", help="estimate the step of N H100s from this one's")
    cli.add_argument("--profile", type=Path, metavar="DIR", help="keep each row's Chrome trace and table of operators")
    cli.add_argument("--compare", type=Path, metavar="OLD.json", help="print ratios to an earlier result")
    cli.add_argument("-o", "--output", type=Path, default=Path("bench.json"), help="result (default: %(default)s)")
    args = cli.parse_args(argv)
    args.variant = args.variant or (["card", "pr1812"] if on_gpu else ["demo"])
    if not args.output.parent.is_dir() or args.output.is_dir():
        raise t.InputError(f"cannot write {args.output}: it is a folder, or there is no folder to hold it")
    if args.profile:
        try:
            args.profile.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise t.InputError(f"--profile {args.profile}: {error.strerror}") from None
    return args


def options(given: list[str], env: Mapping[str, str]) -> dict[str, str]:
    """Settings from the environment, then from --env; the variant is chosen by --variant alone."""
    for pair in given:
        if "=" not in pair:
            raise t.InputError(f"--env {pair} must be NAME=VALUE")
    told = dict(pair.split("=", 1) for pair in given)
    found = dict(env) | told
    if "VARIANT" in found:
        raise t.InputError(f"VARIANT={found['VARIANT']}: choose rows by --variant")
    unknown = [name for name in told if name.lower() not in t.Config.__dataclass_fields__]
    if unknown:
        t.Config.from_env(dict.fromkeys(unknown, ""))  # suggests the right name
        raise t.InputError(f"--env {unknown[0]} is no option of train_gpt.py")
    return found


def here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(args: argparse.Namespace, configs: dict[str, t.Config], folder: Path) -> dict[str, Any]:
    """Ceilings, rows, races and the scaling study, as the JSON file holds them."""
    device, (first, *_) = here(), configs.items()
    dtypes = {name: t.compute_dtype(cfg, device) for name, cfg in configs.items()}
    moved = {name: costs.communication(cfg, args.predict or 8, dtypes[name], driven) for name, cfg in configs.items()}
    with t.launch(os.environ) as ranks:
        bench = Bench(args, folder, ranks, ceilings(ranks.device, dtypes[first[0]]))
        result = dict(format=tables.FORMAT, machine=machine(ranks.device),
                      arguments={k: str(v) for k, v in vars(args).items()},
                      ceilings=bench.roofs, rows=[], plain=[], scaling=[])
        for name, cfg in configs.items():
            for looped in (False, True)[: 1 + (cfg.num_loops > 0)]:
                result["rows"].append(bench.row(name, cfg, looped, moved[name]))
                if ranks.is_main:
                    print("{name}: {ms:.2f} ms a step".format(**result["rows"][-1]), file=sys.stderr, flush=True)
        if args.scaling:
            result["scaling"] = bench.scaling(*first)
        if args.plain and ranks.world == 1:
            result["plain"] = bench.races(configs)
    return result


def main(argv: list[str]) -> None:
    args = parse(argv, here().type == "cuda")
    old, world = tables.read_result(args.compare) if args.compare else None, int(os.environ.get("WORLD_SIZE", 1))
    if args.predict and world > 1:
        raise t.InputError("--predict starts from one process; run it without torchrun")
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        env, configs = options(args.env, os.environ), {}
        for name in args.variant:
            cfg = row_config(name, env, Path(folder), world)
            t.choose_attention(cfg, t.Ranks(device=here()))  # better an error now
            if not (data := Path(folder) / f"tokens{cfg.vocab_size}").exists():
                write_tokens(data, cfg.vocab_size)
            configs[name] = replace(cfg, data_path=str(data), tokenizer_path=str(data / "fineweb_train_000000.bin"))
        if args.scaling:
            list(scaled(next(iter(configs.values()))))  # better an error now
        result = measure(args, configs, Path(folder))
    if os.environ.get("RANK", "0") != "0":
        return
    print(tables.report(result))
    if old:
        print("\n" + tables.comparison(old, result))
    t.write_file(args.output, json.dumps(result, indent=1).encode())
    print(f"\nwrote {args.output}")
    wrong = [f"{r['name']}: {r['attention_error']}" for r in result["rows"] if r["attention_error"]]
    if wrong:
        raise t.InputError("; ".join(wrong))
