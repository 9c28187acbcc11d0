"""Counts what a compiled training step launches, and predicts its time on an H100 from fixed rates; needs no real GPU.

    VARIANT=card python tests/nullgpu/nullgpu.py VENV/bin/python -m tools.bench.anatomy --json logs/anatomy.json
    ... -m tools.bench.anatomy --script .peers/pr549.py --name '#549' --json logs/anatomy.json  # a published script
    python -m tools.bench.anatomy --table --json logs/anatomy.json                              # prints the file

Counts the second step of one micro-batch: Triton kernels by Inductor's bytes, matrix products and attention by their
shapes, other kernels of torch by the bytes they read and write, and collectives. Attention computes nothing.
"""

import importlib.util
import inspect
import json
import math
import os
import sys
import tempfile
import time
import types
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import sympy  # a dependency of torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import train_gpt as t
from tools import command_line, dict_table, run_tool
from tools.bench import require_gpu
from tools.files import Refused, read_json, write_file

# A kernel takes the longest of its operations, its bytes and one launch; kernels do not overlap.
BYTES = 2.6e12  # bytes per second; an H100 SXM has 3.35e12
PRODUCTS = 620e12  # operations per second of dense bf16 products
ATTENTION = 400e12  # operations per second of FlashAttention-3, forward and backward, its memory traffic included
LAUNCH = 3e-6  # seconds of the shortest kernel, with the gap to the next
BUS, LATENCY = 360e9, 25e-6  # bytes per second and seconds per call of NCCL on eight H100s
RINGS = {"allreduce": 2.0, "allgather": 1.0, "reduce_scatter": 1.0}  # how often a collective sends its payload
SAMPLE = 1 << 17  # iterations of a kernel from which its memory accesses are extrapolated
OVERWRITES = {"copy_", "_foreach_copy_", "zero_", "_foreach_zero_", "fill_"}  # operators that do not read their output
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "record_stream"}


class Event(NamedTuple):
    kind: str  # triton, product, attention, eager or collective
    name: str
    bytes: float
    flops: float = 0.0


def seconds(event: Event) -> float:
    """Returns the predicted time of an event; collectives are rings of eight GPUs that overlap with nothing."""
    if event.kind == "collective":
        return 7 / 8 * event.bytes * RINGS.get(event.name, 1.0) / BUS + LATENCY
    if event.kind == "attention":
        return max(event.flops / ATTENTION, LAUNCH)
    return max(event.flops / PRODUCTS, event.bytes / BYTES, LAUNCH)


def summary(events: list[Event]) -> dict[str, Any]:
    """Sums launches, gigabytes, operations and predicted milliseconds by kind."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(e.kind for e in events):
        group = [e for e in events if e.kind == kind]
        gb, tflop = sum(e.bytes for e in group) / 1e9, sum(e.flops for e in group) / 1e12
        ms = 1e3 * sum(map(seconds, group))
        found[kind] = dict(launches=len(group), gb=round(gb, 3), tflop=round(tflop, 3), ms=round(ms, 3))
    return found | dict(ms=round(1e3 * sum(map(seconds, events)), 3))


def size(x: Any) -> int:
    """Returns the bytes of a tensor in memory; expanded dimensions count once."""
    return min(x.nbytes, x.untyped_storage().nbytes()) if isinstance(x, Tensor) else 0


def tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def traffic(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    """Returns the bytes that an operator reads and writes by its schema; an argument changed in place counts twice."""
    given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
    moved, changed = 0, set()
    for argument in func._schema.arguments:
        values = tensors(given.get(argument.name))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        reads = not (writes and (argument.is_out or func._opname in OVERWRITES))
        moved += (reads + writes) * sum(map(size, values))
        changed |= {id(x) for x in values if writes}
    return moved + sum(size(x) for x in tensors(out) if id(x) not in changed)


def describe(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Event | None:
    """Returns the event of one operator, None if it launches nothing: views and new memory."""
    name = func._opname
    if func.namespace == "c10d":
        kind = next((k for k in RINGS if k in name.replace("all_gather", "allgather")), name)
        return Event("collective", kind, max(sum(map(size, tensors(a))) for a in args[:2]))
    if func.namespace not in ("aten", "null") or func.is_view or name in FREE | {"_local_scalar_dense"}:
        return None
    moved = traffic(func, args, kwargs, out)
    if func.namespace == "null":
        return Event("attention", name, moved, attention_flops(*args))
    if func._overloadpacket in flop_registry:
        return Event("product", name, moved, flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
    return Event("eager", name, moved)


class Recorder(TorchDispatchMode):
    """Collects the events of one type of device, in all threads of autograd."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.events = device, []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled functions run compiled under this mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        event = describe(func, args, kwargs or {}, out)
        if event and any(x.device.type == self.device for x in tensors((args, kwargs, out))):
            self.events.append(event)
        return out

    def take(self) -> list[Event]:
        """Returns the events since the last call."""
        events, self.events = self.events, []
        return events


def touched(accesses: list[Any], hint: Callable[[Any], int]) -> float:
    """Returns how many elements of a buffer a kernel touches, extrapolated from its first iterations, or inf."""
    if any(access.is_indirect() or not hasattr(access, "var_names") for access in accesses):
        return math.inf
    functions = dict(FloorDiv=np.floor_divide, ModularIndexing=lambda x, d, n: x // d % n)
    loops = [[hint(n) for n in access.size] or [1] for access in accesses]
    scale, found = max(1.0, max(map(math.prod, loops)) / SAMPLE), []
    for access, sizes in zip(accesses, loops):
        indices = np.unravel_index(np.arange(int(math.prod(sizes) / scale)), sizes)
        value = sympy.lambdify(access.var_names, access.index.expand(identity=True), [functions, "numpy"])
        found.append(np.broadcast_to(value(*indices[: len(access.size)]), len(indices[0])))
    return len(np.unique(np.concatenate(found))) * scale


def moved_bytes(kernel: Any) -> float:
    """Returns the bytes that an Inductor kernel moves. Inductor's own count adds up overlapping parts of a buffer."""
    from torch._inductor.codegen.common import InplacedBuffer
    from torch._inductor.utils import get_dtype_size
    from torch._inductor.virtualized import V

    sizes, accesses, moved = V.graph.sizevars, kernel.features.buf_accesses(), 0.0
    hint = getattr(sizes, "size_hint", None) or sizes.optimization_hint  # renamed in torch 2.13
    loops = math.prod(map(hint, kernel.numels.values()))
    # buffers that live only inside the kernel are listed with another type
    inplace = len({id(b) for b in kernel.args.inplace_buffers.values() if isinstance(b, InplacedBuffer)})
    for i, name in enumerate(kernel.args.python_argdefs()[1]):
        if name in accesses:
            count = hint(V.graph.get_numel(name))  # once; of a buffer larger than the loops, what they touch
            count = min(count, touched(accesses[name], hint)) if count > loops else count
            moved += count * get_dtype_size(V.graph.get_dtype(name)) * (1 + (i < inplace))
    return moved


@contextmanager
def recording(device: str) -> Iterator[Recorder]:
    """Records eager code, code that compiles inside, and its Triton kernels."""
    # Dynamo's guards fail under a mode that was not active at compile time: the recorder is inactive outside graphs
    from torch._inductor import config
    from torch._inductor.codegen.simd import SIMDKernel
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    recorder, launch, call, make = Recorder(device), CachingAutotuner.run, CompiledFxGraph.__call__, torch.compile

    def launched(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        meta = kernel.inductor_meta
        # kernels over lists of tensors have no count
        listed = sum(size(x) * (1 + name.startswith("in_out")) for name, x in zip(kernel.fn.arg_names, args))
        moved = 1e9 * meta["kernel_num_gb"] if "kernel_num_gb" in meta else listed
        recorder.events.append(Event("triton", meta["kernel_name"], moved))
        with _disable_current_modes():  # the first launch may try variants on copies of the arguments
            return launch(kernel, *args, **kwargs)

    def called(graph: Any, inputs: Any) -> Any:
        with nullcontext() if recorder in _get_current_dispatch_mode_stack() else recorder:
            return call(graph, inputs)

    with (
        mock.patch.object(CachingAutotuner, "run", launched),
        mock.patch.object(CompiledFxGraph, "__call__", called),
        mock.patch.object(torch, "compile", lambda fn, **options: _disable_current_modes()(make(fn, **options))),
        mock.patch.object(SIMDKernel, "estimate_kernel_num_bytes", moved_bytes),
        config.patch(benchmark_kernel=True),  # makes Inductor store the bytes of each kernel
        recorder,
    ):
        yield recorder


@contextmanager
def pretended(world: int, device: torch.device) -> Iterator[t.Ranks]:
    """Yields rank 0 of `world` ranks without the others: collectives return at once, with no result."""
    if world > 1:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield t.Ranks(0, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


# Attention with the interface of FlashAttention-3, which allocates its results and computes nothing.
def outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32)


def gradients(*saved: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(torch.empty_like, saved[:3]))


def save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


SCHEMAS = "(Tensor q, Tensor k, Tensor v{}) -> (Tensor, Tensor{})"
operator = partial(torch.library.custom_op, mutates_args=())
attention = operator("null::attention", outputs, schema=SCHEMAS.format("", ""))
saved = ", Tensor out, Tensor lse, Tensor grad"
attention_backward = operator("null::attention_backward", gradients, schema=SCHEMAS.format(saved, ", Tensor"))
attention.register_fake(outputs)
attention_backward.register_fake(gradients)
attention.register_autograd(lambda c, dy, _: attention_backward(*c.saved_tensors, dy.contiguous()), setup_context=save)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Any = None, causal: bool = True) -> Tensor:
    """Stands in for flash_attn_func; q (B, S, H, C), k and v (B, T, K, C). A row counts as one document."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # as FlashAttention does
    return attention(q, k, v)[0]


def attention_flops(q: Tensor, k: Tensor, *rest: Tensor) -> float:
    """Returns the operations of the last S of T positions: 4 per channel and key, 2.5 times that in a backward pass."""
    return (2.5 if len(rest) > 1 else 1.0) * 2 * (2 * k.size(1) - q.size(1) + 1) * q.numel()


def train_flops(cfg: t.Config, looped: bool) -> dict[str, float]:
    """Returns the operations per token of a forward and backward pass by kind. A multiply-add counts as two."""
    model = t.GPT(replace(cfg, document_attention=False), attend).to("meta")
    ids = torch.zeros(1, cfg.train_seq_len, dtype=torch.int64, device="meta")
    with Recorder("meta") as recorder:
        model(ids, ids, looped).mean().backward()
    events = recorder.take()
    kinds = ("product", "attention")
    return {kind: sum(e.flops for e in events if e.kind == kind) / ids.numel() for kind in kinds}


class Subject(NamedTuple):
    """A model, its compiled loss, and a function that makes the step of its optimizer for some ranks."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[t.Ranks], Callable[[], Any]]
    shape: tuple[int, int]  # of a micro-batch
    worlds: tuple[int, ...]
    qat: Callable[[], Any] | None = None  # what late QAT adds to a step


def ours(cfg: t.Config, looped: bool, device: torch.device) -> Subject:
    model = t.GPT(cfg, attend, t.compute_dtype(cfg, device)).to(device)
    forward = t.Trainer(model, None, cfg, t.Ranks(device=device)).compiled

    def optimizer(ranks: t.Ranks) -> Callable[[], Any]:
        optimizers, average = t.Optimizers(model, ranks, cfg), t.Average(model)
        return lambda: (optimizers.step(1.0, 0.9), average.update(0.003))

    def qat() -> None:
        with t.on_export_grid(model, cfg):
            pass

    shape, late = (cfg.micro_batch_tokens // cfg.train_seq_len, cfg.train_seq_len), cfg.late_qat_threshold
    return Subject(model, lambda x, y: forward(x, y, looped).mean(), optimizer, shape, (1, 8), qat if late else None)


def load_script(path: Path, device: torch.device) -> tuple[types.ModuleType, Any, nn.Module]:
    """Returns a published train_gpt.py as a module, its settings, and its GPT: bf16, but matrices and controls fp32."""
    flash = sys.modules["flash_attn_interface"] = types.ModuleType("flash_attn_interface")
    flash.flash_attn_func = attend
    flash.flash_attn_varlen_func = lambda q, k, v, *_, **__: attend(q[None], k[None], v[None])[0]
    spec = importlib.util.spec_from_file_location("peer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    h, names = module.Hyperparameters(), [*inspect.signature(module.GPT).parameters]
    settings = {n: getattr(h, n if hasattr(h, n) else f"{n}_enabled") for n in names if n != "h"}
    model = (module.GPT(h) if names == ["h"] else module.GPT(**settings)).to(device).bfloat16()
    for m in model.modules():
        if isinstance(m, module.CastedLinear):
            m.float()
    for p in model.parameters(recurse=False):
        p.data = p.data.float() if p.ndim == 3 else p.data
    getattr(module, "restore_fp32_params", getattr(module, "restore_low_dim_params_to_fp32", None))(model)
    return module, h, model


def script_step(module: types.ModuleType, h: Any, model: nn.Module) -> Callable[[], Any]:
    """Returns the optimizer step of a script: its own Optimizers (#1493), or Muon on stacks beside AdamW (#549)."""
    if hasattr(module, "Optimizers"):
        return module.Optimizers(h, model).step
    stacks, others = ([p for p in model.parameters() if (p.ndim == 3) == on] for on in (True, False))
    muon = module.Muon(stacks, h.matrix_lr, h.muon_momentum, h.muon_backend_steps, weight_decay=h.muon_wd)
    adam = torch.optim.AdamW(others, h.scalar_lr, (h.beta1, h.beta2), h.adam_eps, weight_decay=h.adam_wd, fused=True)

    def step() -> None:
        muon.launch_reduce_scatters()
        for p in others:
            if p.grad is not None:
                dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        adam.step()
        muon.step()

    return step


def published(path: Path, looped: bool, device: torch.device) -> Subject:
    module, h, model = load_script(path, device)
    if hasattr(model, "looping_active"):
        model.looping_active = looped
    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    row = torch.zeros(1, h.train_seq_len, dtype=torch.int64, device=device)
    with torch.no_grad(), autocast():
        model(row, row)  # fills the caches of rotary tables: a graph traced before serves only one step
    loss = autocast()(torch.compile(model, dynamic=False, fullgraph=True))

    def optimizer(ranks: t.Ranks) -> Callable[[], Any]:
        own = script_step(module, h, model)
        ema = {name: p.detach().float().clone() for name, p in model.state_dict().items()}

        @torch.no_grad()
        def step() -> None:
            nn.utils.clip_grad_norm_(model.parameters(), h.grad_clip_norm)
            own()
            for name, p in model.state_dict().items():
                ema[name].mul_(0.997).add_(p.detach().float(), alpha=0.003)

        return step

    shape = h.train_batch_tokens // 8 // h.train_seq_len, h.train_seq_len
    return Subject(model, loss, optimizer, shape, (8,))


def measure(subject: Subject, recorder: Recorder, device: torch.device) -> dict[str, Any]:
    """Counts one compiled step for each number of ranks; also returns the seconds to compile and the peak of memory."""
    ids = torch.zeros(subject.shape, dtype=torch.int64, device=device)
    result: dict[str, Any] = dict(tokens=ids.numel(), predicted_ms={}, phases={})
    phases = result["phases"]
    for world in subject.worlds:
        name = f"optimizer of 1/{world}"
        with pretended(world, device) as ranks:
            optimize = subject.optimizer(ranks)
            for _ in range(2):  # the first step compiles
                torch.cuda.reset_peak_memory_stats()
                recorder.take()
                begin = time.perf_counter()
                loss = subject.loss(ids, ids)
                phases["forward"] = summary(recorder.take())
                loss.backward()
                phases["backward"] = summary(recorder.take())
                result.setdefault("compile_s", round(time.perf_counter() - begin, 1))
                optimize()
                phases[name] = summary(recorder.take())
                subject.model.zero_grad(set_to_none=True)
        result.setdefault("peak_gib", round(torch.cuda.max_memory_allocated() / 2**30, 2))
        result["predicted_ms"][name] = round(sum(phases[n]["ms"] for n in ("forward", "backward", name)), 1)
    if subject.qat:
        subject.qat()
        phases["late QAT"] = summary(recorder.take())
    return result


def cells(row: dict[str, Any]) -> dict[str, Any]:
    """Flattens a row. Launches, gigabytes and operations are those of forward + backward."""
    phases = row["phases"]
    found = row | {f"{name}_ms".replace(" ", "_"): phase["ms"] for name, phase in phases.items()}
    for kind, key in (("triton", "launches"), ("triton", "gb"), ("product", "tflop"), ("attention", "tflop")):
        pair = [phases[name].get(kind, {}).get(key, 0) for name in ("forward", "backward")]
        found[f"{kind}_{key}"] = " + ".join(f"{value:.4g}" for value in pair)
    found["collective_gb"] = phases.get("optimizer of 1/8", {}).get("collective", {}).get("gb", 0.0)
    return found | {f"predicted_{name[-3:]}": ms for name, ms in row["predicted_ms"].items()}


def table(rows: list[dict[str, Any]]) -> str:
    columns = "name looped triton_launches triton_gb product_tflop attention_tflop collective_gb forward_ms:.1f "
    columns += "backward_ms:.1f optimizer_of_1/1_ms:.1f optimizer_of_1/8_ms:.1f late_QAT_ms:.1f peak_gib:.1f "
    return dict_table(map(cells, rows), columns + "compile_s:.0f predicted_1/1:.1f predicted_1/8:.1f")


def run_counter(cli: ArgumentParser, argv: list[str], table: Callable, count: Callable) -> None:
    """Prints a file of counts, or counts a row, prints it and adds it to the file in place of one with the same key."""
    cli.add_argument("--json", type=Path, help="file of counts, to which the row is added")
    cli.add_argument("--table", action="store_true", help="print the file and count nothing")
    args = cli.parse_args(argv)
    if args.table and not args.json:
        raise Refused("--table needs --json FILE")
    rows = read_json(args.json) if args.json and (args.table or args.json.exists()) else []
    try:
        text = table(rows)
    except (LookupError, TypeError, AttributeError, ValueError):
        raise Refused(f"{args.json} is not a file of counts that this tool wrote") from None
    if args.table:
        return print(text)
    require_gpu()
    os.environ.pop("PYTORCH_NO_CUDA_MEMORY_CACHING", None)  # with it torch does not count memory; nullgpu.py may set it
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as cache, recording("cuda") as recorder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # cached graphs carry the byte counts of the run that wrote them
        row = dict(torch=torch.__version__) | count(args, recorder)
    print(json.dumps(row), table([row]), sep="\n")
    if args.json:
        keyed = {(r["name"], r["torch"], r.get("looped", False), r.get("tokens", 0)): r for r in [*rows, row]}
        lines = [json.dumps(keyed[key]) for key in sorted(keyed)]
        write_file(args.json, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def count(args: Namespace, recorder: Recorder) -> dict[str, Any]:
    device = torch.device("cuda")
    if args.script:
        name, subject = args.script.stem, published(args.script, args.looped, device)
    else:
        cfg = t.Config.from_env(os.environ)
        name, subject = cfg.variant, ours(cfg, args.looped, device)
    return dict(name=args.name or name, looped=args.looped) | measure(subject, recorder, device)


def python_file(text: str) -> Path:
    if not text.endswith(".py") or not Path(text).is_file():
        raise ArgumentTypeError(f"{text} is no .py file")
    return Path(text)


def main(argv: list[str]) -> None:
    cli = command_line("tools.bench.anatomy", __doc__)
    cli.add_argument("--looped", action="store_true", help="count the graph that runs after the loops are switched on")
    cli.add_argument("--script", type=python_file, help="a published train_gpt.py, unpacked; it reads its own options")
    cli.add_argument("--name", help="name of the row (default: the variant or the script)")
    run_counter(cli, argv, table, count)


if __name__ == "__main__":
    run_tool("tools.bench.anatomy", main, sys.argv[1:])
