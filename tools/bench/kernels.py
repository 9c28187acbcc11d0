"""What a torch.profiler trace says of a training step: which kind of work takes the time, and which attention ran.

Pure functions of the events of a Chrome trace (`prof.export_chrome_trace`), so that a CPU can test what a GPU wrote.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

STEP, OPTIMIZER = "bench::step", "bench::optimizer"  # ranges that the bench records around its steps
KINDS = ("attention", "matmul", "elementwise", "optimizer", "communication", "other")

# The first rule that a name matches decides. Inductor names a kernel after all that it fused, so its mark comes first.
RULES = tuple((kind, re.compile(pattern)) for kind, pattern in (
    ("elementwise", r"^triton_(poi|red|per|for)_|cpp_fused"),
    ("communication", r"nccl|^gloo:|^c10d::|_c10d_functional"),
    ("attention", r"flash|FlashAttn|cudnn_generated.*sdpa|fmha_|flex_attention|scaled_dot_product"),
    ("matmul", r"nvjet|gemm|gemv|cutlass|cublas|splitKreduce|^triton_tem_|^triton_mm"
               r"|^aten::(mm|bmm|addmm|baddbmm|matmul|linear|mv|addmv|_addmm_activation|einsum|dot|addr)_?$"
               r"|^mkldnn::_linear|^mkl::_mkl_linear|^mkldnn_mm"),
    ("elementwise", r"^aten::|at::native|at_cuda_detail|^Memcpy|^Memset|cub::|elementwise|reduce_kernel"),
))

# Kernels and aten operators that each attention ends up in. FlashAttention-2 of the package and of torch differ in
# their namespace alone.
BACKENDS = {
    "fa3": r"FlashAttn(Fwd|Bwd)", "fa4": r"flash_attn_cute|FlashAttentionForwardSm|FlashAttentionBackwardSm",
    "flash": r"pytorch_flash::", "fa2": r"(?<!pytorch_)flash::flash_(fwd|bwd)|(?<![a-z_:])flash_(fwd|bwd)_",
    "cudnn": r"cudnn_generated.*sdpa", "efficient": r"fmha_cutlass|PyTorchMemEff", "flex": r"flex_attention",
    "cpu": r"^aten::_scaled_dot_product_flash_attention_for_cpu", "math": r"^aten::_scaled_dot_product_attention_math",
}
# What train_gpt.choose_attention says, and what may then run; `sdpa` leaves the choice to torch.
ALLOWED = {"sdpa": {"flash", "cudnn", "efficient", "cpu", "math"}, "flash": {"flash"}}


@cache
def kind(name: str) -> str:
    """The kind of work of a GPU kernel or a CPU operator, by its name."""
    return next((kind for kind, pattern in RULES if pattern.search(name)), "other")


def attention_backends(names: Iterable[str]) -> set[str]:
    """The attention implementations among the names of kernels and operators."""
    names = {n for n in names if not n.startswith(("triton_poi_", "triton_red_", "triton_per_"))}
    return {b for b, pattern in BACKENDS.items() if any(re.search(pattern, n) for n in names)}


def attention_error(configured: str, ran: set[str]) -> str:
    """What is wrong when the backends `ran` under a name of train_gpt.choose_attention; empty when nothing is."""
    allowed = ALLOWED.get(configured, {configured})
    if ran and ran <= allowed:
        return ""
    return (f"attention is configured as {configured}, which runs as {' or '.join(sorted(allowed))}, but the profile "
            f"shows {' and '.join(sorted(ran)) or 'no attention kernel'}; set ATTENTION to what is meant")


class Work(NamedTuple):
    """One kernel, or one operator without those that it called. Times in microseconds."""

    name: str
    start: float
    busy: float
    launch: float  # when the host asked for it


class Summary(NamedTuple):
    """A step by its profile, averaged over those in it."""

    shares: dict[str, float]  # of the busy time, by KINDS
    busy_ms: float  # some kernel or operator ran
    wall_ms: float  # under the profiler, which slows the host
    launches: float  # of kernels; operators on a CPU
    syncs: float  # times that the host waited for the device
    eager: float  # share of kernels that no compiler saw, outside the optimizer; 0 on a CPU
    backends: list[str]
    top: list[tuple[str, str, float, float]]  # (kind, name, ms, calls), most time first


def ranges(events: list[dict], name: str) -> list[tuple[float, float]]:
    """(begin, end) of the host's ranges of that name, in order."""
    mine = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == name]
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in mine)


def inside(moment: float, spans: list[tuple[float, float]]) -> bool:
    return any(begin <= moment < end for begin, end in spans)


def own_times(ops: list[dict]) -> list[Work]:
    """CPU operators with their time less that of the operators which they called, thread by thread."""
    found = []
    threads = defaultdict(list)
    for op in ops:
        threads[op["pid"], op["tid"]].append(op)
    for thread in threads.values():
        stack: list[list] = []  # [end, operator, time of its callees]
        for op in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while stack and op["ts"] >= stack[-1][0]:
                found.append(stack.pop())
            if stack:
                stack[-1][2] += op["dur"]
            stack.append([op["ts"] + op["dur"], op, 0.0])
        found += stack
    return [Work(op["name"], op["ts"], max(op["dur"] - called, 0.0), op["ts"]) for _, op, called in found]


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Total length of what the spans cover."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def summarize(events: list[dict]) -> Summary:
    """The steps of a trace, each of which lies in a range STEP; from GPU kernels if there are any, else from operators.

    Raises ValueError when the trace has no such range. A kernel belongs to the range in which it was launched.
    """
    steps, optimizer = ranges(events, STEP), ranges(events, OPTIMIZER)
    if not steps:
        raise ValueError(f"the trace has no range {STEP}")
    calls = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = {e["args"]["correlation"]: e["ts"] for e in calls if "correlation" in e.get("args", {})}
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    ops = [e for e in events if e.get("cat") == "cpu_op"]
    on_gpu = bool(kernels)
    work = [Work(e["name"], e["ts"], e["dur"], launches.get(e["args"].get("correlation"), e["ts"])) for e in kernels]
    work = [w for w in work or own_times(ops) if inside(w.launch, steps)]
    spans = [(w.start, w.start + w.busy) for w in work] if on_gpu else [
        (e["ts"], e["ts"] + e["dur"]) for e in ops if inside(e["ts"], steps)]
    kinds = Counter()
    names: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for w in work:
        k = kind(w.name)
        k = "optimizer" if inside(w.launch, optimizer) and k != "communication" else k
        kinds[k] += w.busy
        names[k, w.name][0] += w.busy
        names[k, w.name][1] += 1
    total, count = sum(kinds.values()) or 1.0, len(steps)
    eager = sum(w.busy for w in work if on_gpu and "at::native" in w.name and not inside(w.launch, optimizer))
    wall = union(spans + steps) if not on_gpu else max(e for _, e in spans) - min(b for b, _ in spans)
    return Summary(
        shares={k: kinds[k] / total for k in KINDS}, busy_ms=union(spans) / count / 1e3, wall_ms=wall / count / 1e3,
        launches=len(work) / count, eager=eager / total, backends=sorted(attention_backends(w.name for w in work)),
        syncs=sum("Synchronize" in e["name"] and inside(e["ts"], steps) for e in calls) / count,
        top=[(k, name, busy / count / 1e3, calls / count) for (k, name), (busy, calls)
             in sorted(names.items(), key=lambda item: -item[1][0])])
