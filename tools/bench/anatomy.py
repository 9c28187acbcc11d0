"""What a compiled training step does on one H100, counted without one, and the time that follows by stated rules.

    VARIANT=card python tests/nullgpu/nullgpu.py VENV/bin/python -m tools.bench.anatomy --json logs/anatomy.json [--looped]
    ... -m tools.bench.anatomy --script .peers/pr549.py --name '#549' --json logs/anatomy.json  # a published record's own
    python -m tools.bench.anatomy --table --json logs/anatomy.json                              # what is there, as Markdown

It makes two steps of one micro-batch a rank, the first to compile, and notes what the second launches: Triton kernels
with the bytes of each by Inductor's own analysis, products and attention by their shapes, other kernels of torch with what
they read and write, collectives. On a real GPU the counts are the same: attention is a stand-in that computes nothing.
"""

import argparse
import collections
import importlib.util
import inspect
import json
import math
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sympy  # torch needs it, too
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import train_gpt as t
from tools import command_line, run_tool
from tools.bench import costs, require_gpu
from tools.files import Refused, read_json

# ----------------------------------------
# The rules: a kernel takes the longest of its operations, its bytes and one launch; kernels do not overlap

BYTES = 2.6e12  # a second, of the 3.35e12 that an H100 SXM has
PRODUCTS = 620e12  # operations a second of bf16 products, dense
ATTENTION = 400e12  # of FlashAttention-3, forward and backward together
LAUNCH = 3e-6  # seconds that a kernel takes at least, with the gap to the next
SAMPLE = 1 << 17  # iterations of a kernel's loops in which what it touches of a buffer is counted


class Event(NamedTuple):
    """Something that was launched."""

    kind: str  # triton, product, attention, eager or collective
    name: str
    bytes: float
    flops: float = 0.0


def seconds(event: Event) -> float:
    """What an event takes by the rules. A collective: rings of eight GPUs, all of it exposed (costs.predict)."""
    if event.kind == "collective":
        return 7 / 8 * event.bytes * costs.WIRE.get(event.name, 1.0) / costs.BUS + costs.LAUNCH
    rate = ATTENTION if event.kind == "attention" else PRODUCTS
    moved = 0.0 if event.kind == "attention" else event.bytes  # its rate was measured with its traffic
    return max(event.flops / rate, moved / BYTES, LAUNCH)


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def summary(events: list[Event], heaviest: int = 0) -> dict[str, Any]:
    """Launches, gigabytes, operations and milliseconds by kind, and the Triton kernels that move most."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(e.kind for e in events):
        mine = [e for e in events if e.kind == kind]
        sums = dict(gb=sum(e.bytes for e in mine) / 1e9, tflop=sum(e.flops for e in mine) / 1e12,
                    ms=1e3 * sum(map(seconds, mine)))
        found[kind] = dict(launches=len(mine), kernels=len({e.name for e in mine})) | rounded(sums)
    found["ms"] = round(1e3 * sum(map(seconds, events)), 3)
    if heaviest:
        total, times = collections.Counter(), collections.Counter(e.name for e in events)
        for e in events:
            total[e.name] += e.bytes * (e.kind in ("triton", "eager"))
        found["heaviest"] = [[round(n / 1e9, 2), times[name], name[:90]] for name, n in total.most_common(heaviest)]
    return found


# ----------------------------------------
# Counting: torch's dispatcher tells its kernels, compiled or not, Inductor's launcher tells those of Triton

OVERWRITES = {"copy_", "_foreach_copy_", "zero_", "_foreach_zero_", "fill_"}  # do not read what they change
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "record_stream",
        "_local_scalar_dense"}


def size(x: Any) -> int:
    """Bytes of a tensor; what is expanded counts once."""
    return min(x.nbytes, x.untyped_storage().nbytes()) if isinstance(x, Tensor) else 0


def tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def traffic(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operator reads and writes by its schema: arguments, those it changes again, and new results."""
    names = [a.name for a in func._schema.arguments]
    given, moved, changed = dict(zip(names, args)) | kwargs, 0, set()
    for argument in func._schema.arguments:
        values = tensors(given.get(argument.name))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        reads = not (writes and (argument.is_out or func._opname in OVERWRITES))
        moved += (reads + writes) * sum(map(size, values))
        changed |= {id(x) for x in values if writes}
    return moved + sum(size(x) for x in tensors(out) if id(x) not in changed)


def is_free(func: Any, args: Any, out: Any) -> bool:
    """Whether an operator launches nothing: it allocates, or gives another view of what it got."""
    if func.namespace not in ("aten", "null") or func._opname in FREE:
        return True
    held = {x.untyped_storage()._cdata for x in tensors(args)}
    made = tensors(out)
    return bool(made) and not func._schema.is_mutable and all(x.untyped_storage()._cdata in held for x in made)


class Recorder(TorchDispatchMode):
    """Notes what torch's dispatcher launches inside for tensors of one kind of device, in any thread of autograd."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.events = device, []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or compiled functions would not run compiled inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        event = describe(func, args, kwargs or {}, out)
        if event and any(x.device.type == self.device for x in tensors((args, kwargs, out))):
            self.events.append(event)
        return out

    def take(self) -> list[Event]:
        """The events so far, once."""
        events, self.events = self.events, []
        return events


def describe(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Event | None:
    """The event of one operator; None for what launches nothing."""
    name = func._opname
    if func.namespace == "c10d":
        name = name.replace("all_gather", "allgather")
        kind = next((k for k in costs.WIRE if k in name), name)
        return Event("collective", kind, max(sum(map(size, tensors(a))) for a in args[:2]))
    if is_free(func, args, out):
        return None
    if func.namespace == "null":
        return Event("attention", name, traffic(func, args, kwargs, out), attention_flops(*args))
    moved = traffic(func, args, kwargs, out)
    if func._overloadpacket in flop_registry:
        return Event("product", name, moved, flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
    return Event("eager", name, moved)


def places(accesses: list[Any], hint: Callable[[Any], int]) -> float:
    """Elements of a buffer that a kernel of Inductor touches by all its accesses, from the first part of its loops; inf
    if an access has no index.
    """
    if any(access.is_indirect() or not hasattr(access, "var_names") for access in accesses):
        return math.inf
    functions = dict(FloorDiv=np.floor_divide, ModularIndexing=lambda x, d, n: x // d % n)
    loops = [[hint(n) for n in access.size] or [1] for access in accesses]
    share, found = max(1.0, max(map(math.prod, loops)) / SAMPLE), []
    for access, sizes in zip(accesses, loops):
        at = np.unravel_index(np.arange(int(math.prod(sizes) / share)), sizes)
        value = sympy.lambdify(access.var_names, access.index.expand(identity=True), [functions, "numpy"])
        found.append(np.broadcast_to(value(*at[: len(access.size)]), len(at[0])))
    return len(np.unique(np.concatenate(found))) * share


def moved_bytes(kernel: Any) -> float:
    """Bytes of a kernel of Inductor: each buffer once, or of one that is larger than the kernel's loops what it touches.

    In place of Inductor's own count, in which parts of a buffer that overlap (a rotation's) count one by one.
    """
    from torch._inductor.codegen.common import InplacedBuffer
    from torch._inductor.utils import get_dtype_size
    from torch._inductor.virtualized import V
    sizes, accesses, moved = V.graph.sizevars, kernel.features.buf_accesses(), 0.0
    hint = sizes.size_hint if hasattr(sizes, "size_hint") else sizes.optimization_hint  # its name since torch 2.13
    loops = math.prod(map(hint, kernel.numels.values()))
    # those in place that are left: what lives inside of the kernel alone stands there, too
    changed = len({id(b) for b in kernel.args.inplace_buffers.values() if isinstance(b, InplacedBuffer)})
    for i, name in enumerate(kernel.args.python_argdefs()[1]):
        if name in accesses:
            count = hint(V.graph.get_numel(name))
            count = min(count, places(accesses[name], hint)) if count > loops else count
            moved += count * get_dtype_size(V.graph.get_dtype(name)) * (1 + (i < changed))
    return moved


def argument_bytes(names: list[str], args: tuple) -> int:
    """Bytes of a kernel of which Inductor counts none, as one that serves a list of tensors: each argument once, twice
    what it changes in place.
    """
    return sum(size(x) * (1 + name.startswith("in_out")) for name, x in zip(names, args))


@contextmanager
def recording(device: str) -> Iterator[Recorder]:
    """A Recorder that also hears of Triton's kernels, around code that compiles inside.

    Dynamo's guards fail under a mode that was not there when it compiled: it is put aside until a graph itself runs.
    """
    from torch._inductor import config
    from torch._inductor.codegen.simd import SIMDKernel
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    before, recorder = (CachingAutotuner.run, CompiledFxGraph.__call__, torch.compile), Recorder(device)
    (launch, call, make), count = before, SIMDKernel.estimate_kernel_num_bytes

    def launched(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        meta = kernel.inductor_meta
        moved = 1e9 * meta["kernel_num_gb"] if "kernel_num_gb" in meta else argument_bytes(kernel.fn.arg_names, args)
        recorder.events.append(Event("triton", meta["kernel_name"], moved))
        with _disable_current_modes():  # the first time it may try variants, with copies of its arguments
            return launch(kernel, *args, **kwargs)

    def called(graph: Any, inputs: Any) -> Any:
        with nullcontext() if recorder in _get_current_dispatch_mode_stack() else recorder:
            return call(graph, inputs)

    def compile(fn: Callable, **kwargs: Any) -> Callable:
        compiled = make(fn, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return compiled(*args, **kwargs)

        return run

    CachingAutotuner.run, CompiledFxGraph.__call__, torch.compile = launched, called, compile
    SIMDKernel.estimate_kernel_num_bytes = moved_bytes
    try:
        with config.patch(benchmark_kernel=True), recorder:  # Inductor then notes each kernel's bytes
            yield recorder
    finally:
        CachingAutotuner.run, CompiledFxGraph.__call__, torch.compile = before
        SIMDKernel.estimate_kernel_num_bytes = count


# ----------------------------------------
# Attention with FlashAttention-3's interface, which allocates and computes nothing

@torch.library.custom_op("null::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32)


@torch.library.custom_op("null::attention_backward", mutates_args=())
def attention_backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                       grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


attention.register_fake(attention._init_fn)
attention_backward.register_fake(attention_backward._init_fn)
attention.register_autograd(lambda ctx, grad, _: attention_backward(*ctx.saved_tensors, grad.contiguous()),
                            setup_context=keep)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None, causal: bool = True) -> Tensor:
    """flash_attn_func; q: (B, S, H, C), k and v: (B, T, K, C). Documents are counted as if they were one."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # as FlashAttention does
    return attention(q, k, v)[0]


def attention_flops(q: Tensor, *rest: Tensor) -> float:
    """As costs.train_flops: 4 operations a channel and key, 2.5 times that backward; queries of the last S positions
    have T - (S-1)/2 keys each, (T+1)/2 if they are all."""
    return (2.5 if len(rest) > 2 else 1.0) * 2 * (2 * rest[0].size(1) - q.size(1) + 1) * q.numel()


# ----------------------------------------
# What can be counted: our rows, and published scripts

class Subject(NamedTuple):
    """A model on its device, how to run it compiled, and its optimizer for a number of ranks."""

    model: nn.Module
    forward: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[t.Ranks], Callable[[], Any]]  # step and average
    rows: int
    seq_len: int
    worlds: tuple[int, ...]
    qat: Callable[[], Any] | None = None  # what late QAT adds to a step


def ours(cfg: t.Config, looped: bool, device: torch.device) -> Subject:
    model = t.GPT(cfg, attend, torch.bfloat16).to(device)
    forward = t.compiled(model, cfg, t.Ranks(device=device))

    def optimizer(ranks: t.Ranks) -> Callable[[], Any]:
        optimizers, average = t.Optimizers(model, ranks, cfg), t.Average(model)
        return lambda: (optimizers.step(1.0, 0.9), average.update(0.003))

    def qat() -> None:
        with t.on_export_grid(model, cfg):
            pass

    rows, loss = cfg.micro_batch_tokens // cfg.train_seq_len, lambda x, y: forward(x, y, looped).mean()
    return Subject(model, loss, optimizer, rows, cfg.train_seq_len, (1, 8), qat if cfg.late_qat_threshold else None)


def load(path: Path) -> types.ModuleType:
    """A published train_gpt.py as a module, its FlashAttention replaced."""
    sys.modules["flash_attn_interface"] = types.ModuleType("flash_attn_interface")
    sys.modules["flash_attn_interface"].flash_attn_func = attend
    sys.modules["flash_attn_interface"].flash_attn_varlen_func = lambda q, k, v, *_, **__: attend(q[None], k[None], v[None])[0]
    spec = importlib.util.spec_from_file_location("peer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_peer(module: types.ModuleType, h: Any, device: torch.device) -> nn.Module:
    """The GPT of a script by its own settings: bf16, but matrices, banks of matrices and control tensors fp32."""
    names = [*inspect.signature(module.GPT).parameters]
    settings = {n: getattr(h, n if hasattr(h, n) else f"{n}_enabled") for n in names if n != "h"}
    model = module.GPT(h) if names == ["h"] else module.GPT(**settings)
    model = model.to(device).bfloat16()
    for m in model.modules():
        if isinstance(m, module.CastedLinear):
            m.float()
    for p in model.parameters(recurse=False):
        p.data = p.data.float() if p.ndim == 3 else p.data
    getattr(module, "restore_fp32_params", getattr(module, "restore_low_dim_params_to_fp32", None))(model)
    return model


def peer_step(module: types.ModuleType, h: Any, model: nn.Module) -> Callable[[], Any]:
    """The optimizer step of a script: its own Optimizers (#1493), or a Muon of banks beside AdamW (#549)."""
    if hasattr(module, "Optimizers"):
        return module.Optimizers(h, model).step
    banks, others = ([p for p in model.parameters() if (p.ndim == 3) == on] for on in (True, False))
    muon = module.Muon(banks, h.matrix_lr, h.muon_momentum, h.muon_backend_steps, weight_decay=h.muon_wd)
    adam = torch.optim.AdamW(others, h.scalar_lr, (h.beta1, h.beta2), h.adam_eps, weight_decay=h.adam_wd, fused=True)

    def step() -> None:
        muon.launch_reduce_scatters()
        for p in others:
            if p.grad is not None:
                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        adam.step()
        muon.step()

    return step


def peer(path: Path, looped: bool, device: torch.device) -> Subject:
    module = load(path)
    h = module.Hyperparameters()
    model = build_peer(module, h, device)
    if hasattr(model, "looping_active"):
        model.looping_active = looped
    row = torch.zeros(1, h.train_seq_len, dtype=torch.int64, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        model(row, row)  # fills caches (rotary tables): the graph without them serves one step alone
    compiled = torch.compile(model, dynamic=False, fullgraph=True)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return compiled(x, y)

    def optimizer(ranks: t.Ranks) -> Callable[[], Any]:
        own = peer_step(module, h, model)
        ema = {name: p.detach().float().clone() for name, p in model.state_dict().items()}

        @torch.no_grad()
        def step() -> None:
            nn.utils.clip_grad_norm_(model.parameters(), h.grad_clip_norm)
            own()
            for name, p in model.state_dict().items():
                ema[name].mul_(0.997).add_(p.detach().float(), alpha=0.003)

        return step

    return Subject(model, forward, optimizer, h.train_batch_tokens // 8 // h.train_seq_len, h.train_seq_len, (8,))


def measure(subject: Subject, recorder: Recorder, device: torch.device, rows: int = 0) -> dict[str, Any]:
    """Counts of a whole step, its compile seconds (cold) and its peak of memory, once it is compiled."""
    ids = torch.zeros(rows or subject.rows, subject.seq_len, dtype=torch.int64, device=device)
    result: dict[str, Any] = dict(tokens=ids.numel(), predicted_ms={}, phases={})

    def step(optimize: Callable[[], Any], name: str) -> float:
        begin, phases = time.perf_counter(), result["phases"]
        recorder.take()
        loss = subject.forward(ids, ids)
        phases["forward"] = summary(recorder.take(), 6)
        loss.backward()
        phases["backward"], spent = summary(recorder.take(), 6), time.perf_counter() - begin
        optimize()
        phases[name] = summary(recorder.take(), 6)
        subject.model.zero_grad(set_to_none=True)
        result["predicted_ms"][name] = round(sum(phases[n]["ms"] for n in ("forward", "backward", name)), 1)
        return spent

    for world in subject.worlds:
        name = f"optimizer of 1/{world}"
        with costs.pretended(world, device) if world > 1 else nullcontext(t.Ranks(device=device)) as ranks:
            optimize = subject.optimizer(ranks)
            result.setdefault("compile_s", round(step(optimize, name), 1))
            torch.cuda.reset_peak_memory_stats()
            step(optimize, name)
        result.setdefault("peak_gib", round(torch.cuda.max_memory_allocated() / 2**30, 2))
    if subject.qat:
        subject.qat()
        result["phases"]["late QAT"] = summary(recorder.take())
    return result


# ----------------------------------------
# Report and command line

HEAD = ("row", "loops", "Triton launches", "GB", "products TFLOP", "attention TFLOP", "graphs ms",
        "optimizer ms, 1 / 8 GPUs", "QAT ms", "peak GiB", "compile s", "predicted ms, 1 / 8 GPUs")


def cells(row: dict[str, Any]) -> list[str]:
    phases = row["phases"]
    graphs = phases["forward"], phases["backward"]

    def sizes(kind: str, size: str, form: str) -> list[str]:
        return [format(phase.get(kind, {}).get(size, 0), form) for phase in graphs]

    def tflop(kind: str) -> str:
        return f"{sum(phase.get(kind, {}).get('tflop', 0) for phase in graphs):.2f}"

    def pair(values: list[float | None]) -> str:
        return " / ".join("-" if v is None else f"{v:.1f}" for v in values)

    names = [f"optimizer of 1/{world}" for world in (1, 8)]
    return [row["name"], "on" if row["looped"] else "off", " + ".join(sizes("triton", "launches", "d")),
            " + ".join(sizes("triton", "gb", ".1f")), tflop("product"), tflop("attention"),
            f"{sum(phase['ms'] for phase in graphs):.1f}", pair([phases.get(name, {}).get("ms") for name in names]),
            pair([phases.get("late QAT", {}).get("ms")]), f"{row['peak_gib']:.1f}", f"{row['compile_s']:.0f}",
            pair([row["predicted_ms"].get(name) for name in names])]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; launches and gigabytes: forward + backward."""
    lines = [HEAD, ["---"] * 2 + ["---:"] * (len(HEAD) - 2), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with `row` among them, in place of an older count of the same."""
    def key(r: dict[str, Any]) -> tuple:
        return r["name"], r["looped"], r["torch"], r["tokens"]

    return sorted([r for r in rows if key(r) != key(row)] + [row], key=key)


def read_rows(path: Path | None, needed: bool, table: Callable[[list[dict[str, Any]]], str]) -> list[dict[str, Any]]:
    """The rows of a file of counts; none where there is no file and none is needed. Raises Refused."""
    if path is None and needed:
        raise Refused("--table needs --json FILE, the file of counts")
    rows = read_json(path) if path and (needed or path.exists()) else []
    try:
        table(rows)
    except (LookupError, TypeError, AttributeError, ValueError):
        raise Refused(f"{path} is not a file of counts that this tool wrote") from None
    return rows


def parse(argv: list[str]) -> argparse.Namespace:
    cli = command_line("tools.bench.anatomy", __doc__)
    cli.add_argument("--looped", action="store_true", help="the graph after the loops are switched on")
    cli.add_argument("--script", type=Path, help="a published train_gpt.py, unpacked; it reads its own options")
    cli.add_argument("--name", help="of the row (default: the variant or the script)")
    cli.add_argument("--rows", type=int, default=0, help="sequences (default: one micro-batch)")
    cli.add_argument("--json", type=Path, help="file of counts, to which the row is added")
    cli.add_argument("--table", action="store_true", help="print what the file holds and count nothing")
    return cli.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    rows = read_rows(args.json, args.table, table)
    if args.table:
        return print(table(rows))
    if args.script and not (args.script.is_file() and args.script.suffix == ".py"):
        raise Refused(f"--script {args.script} is no .py file")
    require_gpu()
    device = torch.device("cuda")
    os.environ.pop("PYTORCH_NO_CUDA_MEMORY_CACHING", None)  # nullgpu.py may set it; then torch counts no memory
    torch.set_float32_matmul_precision("high")
    env = {} if args.script else os.environ  # a script reads its own options
    cfg = t.Config.from_env({k: v for k, v in env.items() if k.lower() in t.Config.__dataclass_fields__})
    row: dict[str, Any] = dict(name=args.name or (args.script.stem if args.script else cfg.variant),
                               looped=args.looped, torch=torch.__version__)
    with tempfile.TemporaryDirectory() as cache, recording(device.type) as recorder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        subject = peer(args.script, args.looped, device) if args.script else ours(cfg, args.looped, device)
        row |= measure(subject, recorder, device, args.rows)
    if not args.script:
        flops = costs.train_flops(cfg, args.looped)
        row["model_tflop"] = [round(n * row["tokens"] / 1e12, 3) for n in flops]
    print(json.dumps(row, indent=1), table([row]), sep="\n")
    if args.json:
        lines = ",\n".join(json.dumps(r) for r in merged(rows, row))
        t.write_file(args.json, f"[\n{lines}\n]\n".encode())


if __name__ == "__main__":
    run_tool("tools.bench.anatomy", main, sys.argv[1:])
