"""tools.bench.anatomy: bytes, operations and launches by hand, collectives against real ones, rates, the table."""

import json
import math
import sys
import types
from contextlib import contextmanager
from itertools import repeat

import pytest
import sympy
import torch
from conftest import ROOT, make_model, run
from torch._inductor.codegen.common import REMOVED, InplacedBuffer
from torch._inductor.codegen.simd import SIMDKernel
from torch._inductor.dependencies import MemoryDep, StarDep
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import FloorDiv
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t
from tools.bench import anatomy, bench
from tools.bench.anatomy import Event

X, C = sympy.symbols("x c", integer=True)
TINY = t.Config(
    **t.variant_options("card")
    | dict(
        num_layers=3,
        xsa_last_n=2,
        model_dim=64,
        num_heads=4,
        num_kv_heads=2,
        ve_layers=(2,),
        ve_dim=16,
        bigram_dim=16,
        vocab_size=128,
        train_seq_len=32,
        train_batch_tokens=64,
        micro_batch_tokens=64,
        eval_stride=32,
        ttt_chunk_tokens=32,
        muon_backend_steps=2,
        dtype="fp32",
        compile="off",
    )
)


def seen(function):
    """The events of a call on a CPU."""
    with anatomy.Recorder("cpu") as recorder:
        function()
    return recorder.take()


# ---- bytes and operations of one operator

A, B = torch.zeros(6, 4), torch.zeros(4, 8)  # 96 and 128 bytes


@pytest.mark.parametrize(
    "function, name, moved",
    [
        (lambda: A + 1, "add", 96 + 96),
        (lambda: A.add_(A), "add_", 96 + 96 + 96),
        (lambda: A.double(), "_to_copy", 96 + 192),
        (lambda: A.copy_(A.clone()), "copy_", 96 + 96),  # does not read what it overwrites
        (lambda: A.zero_(), "zero_", 96),
        (lambda: torch.add(A, A, out=torch.empty(6, 4)), "add", 3 * 96),
        (lambda: B[:1].expand(1000, 8).sum(), "sum", 128 + 4),  # what is expanded is there once
        (lambda: torch._foreach_add_([A, B], 1.0), "_foreach_add_", 2 * (96 + 128)),  # returns nothing, changes all
        (lambda: torch._foreach_lerp_([A], [A], 0.5), "_foreach_lerp_", 3 * 96),
        (lambda: torch.stack([A, A]), "stack", 4 * 96),
    ],
)
def test_an_operator_moves_what_it_reads_and_writes(function, name, moved):
    event = seen(function)[-1]
    assert (event.kind, event.name, event.bytes, event.flops) == ("eager", name, moved, 0)


def test_views_and_new_memory_are_free():
    assert (
        seen(
            lambda: (A.view(-1), A.mT[0], B.split(2), B.unflatten(1, (2, 4)), torch.empty(9), A.detach(), A.to(A.dtype))
        )
        == []
    )


def test_tensors_of_another_device_do_not_count():
    with anatomy.Recorder("cuda") as recorder:
        A + 1
    assert recorder.events == []


@pytest.mark.parametrize(
    "function, moved, flops",
    [
        (lambda: A @ B, 96 + 128 + 192, 2 * 6 * 4 * 8),
        (lambda: torch.mm(A, B, out=torch.empty(6, 8)), 96 + 128 + 192, 2 * 6 * 4 * 8),  # as compiled code calls it
        (lambda: torch.baddbmm(A.new_zeros(1, 6, 8), A[None], B[None]), 96 + 128 + 192 + 192, 2 * 6 * 4 * 8),
    ],
)
def test_a_product_has_its_operations(function, moved, flops):
    assert [(e.bytes, e.flops) for e in seen(function) if e.kind == "product"] == [(moved, flops)]


@pytest.mark.parametrize(
    "parts, touched",
    [
        ([(64 * X + C, 16)], 16 * 100_000),
        ([(64 * X + C, 8), (64 * X + C + 8, 8)], 16 * 100_000),  # two halves, one beside the other
        ([(64 * X + C, 16), (64 * X + C + 8, 8)], 16 * 100_000),  # one inside the other
        ([(64 * X + C, 8), (64 * X + C + 32, 8), (64 * X + C + 36, 8)], 20 * 100_000),
        ([(64 * FloorDiv(X, 4) + C, 16)], 16 * 25_000),
    ],
)
def test_of_a_buffer_counts_what_a_kernel_touches(parts, touched):
    found = anatomy.touched([MemoryDep("buffer", index, (X, C), (100_000, n)) for index, n in parts], int)
    assert found == pytest.approx(touched, rel=0.01)


def test_what_has_no_index_counts_whole():
    assert anatomy.touched([StarDep("buffer")], int) == math.inf


def test_a_kernel_moves_its_buffers_once_and_of_a_part_the_part():
    """fp32 `whole`, bf16 `wide` (4 times the loops, an eighth of it read twice), fp32 `changed` in place, a `size`."""

    def graph(name):
        return types.SimpleNamespace(
            sizevars=types.SimpleNamespace(**{name: int}),
            get_numel=dict(whole=1600, wide=6400, changed=1600).get,
            get_dtype=dict(whole=torch.float32, wide=torch.bfloat16, changed=torch.float32).get,
        )

    one = InplacedBuffer("in_out_ptr0", ["a", "b"])
    inplace = dict(
        a=one, b=one, inside=REMOVED
    )  # the last is no argument: it is written and read inside of the kernel alone
    part = [MemoryDep("wide", 64 * X + C, (X, C), (100, 8)), MemoryDep("wide", 64 * X + C, (X, C), (100, 8))]
    accesses = dict(whole=[StarDep("whole")], wide=part, changed=[StarDep("changed")])
    kernel = types.SimpleNamespace(
        features=types.SimpleNamespace(buf_accesses=lambda: accesses),
        numels=dict(x=100, r0_=16),
        args=types.SimpleNamespace(
            inplace_buffers=inplace, python_argdefs=lambda: ([], ["changed", "whole", "wide", "size"])
        ),
    )
    for name in ("size_hint", "optimization_hint"):
        with V.set_graph_handler(graph(name)):
            assert anatomy.moved_bytes(kernel) == 2 * 6400 + 6400 + 800 * 2


def test_attention_takes_heads_that_lie_apart():
    heads = torch.randn(2, 8, 8, 16).split((4, 2, 2), dim=2)
    assert [e.kind for e in seen(lambda: anatomy.attend(*heads))] == ["attention"]
    turned = [x.mT.contiguous().mT for x in heads]
    assert [e.name for e in seen(lambda: anatomy.attend(*turned))] == ["clone"] * 3 + ["attention"]


# ---- attention


def attended(rows=2, length=8, heads=4, groups=2):
    q, k = (torch.randn(rows, length, n, 16, requires_grad=True) for n in (heads, groups))
    return seen(lambda: anatomy.attend(q, k, k).sum().backward())


@pytest.mark.parametrize("last", [1, 5, 12])
def test_attention_of_the_last_queries_counts_the_keys_that_each_has(last):
    q, k = torch.randn(2, last, 4, 8), torch.randn(2, 12, 2, 8)
    assert anatomy.attention_flops(q, k, k) == sum(4 * 2 * 4 * 8 * keys for keys in range(12 - last + 1, 13))


def test_attention_has_the_operations_of_train_flops():
    """Forward and backward of 2 x 8 tokens and 64 channels: 7 (T+1) D a token."""
    events = [e for e in attended() if e.kind == "attention"]
    assert [e.name for e in events] == ["attention", "attention_backward"]
    assert sum(e.flops for e in events) == 2 * 8 * 7 * (8 + 1) * 64
    q, k, lse = 4 * 2 * 8 * 64, 4 * 2 * 8 * 32, 4 * 2 * 8 * 4
    assert [e.bytes for e in events] == [2 * q + 2 * k + lse, 4 * q + 4 * k + lse]


def test_a_model_has_the_operations_that_torch_counts():
    model = t.GPT(TINY, anatomy.attend)
    model.init_weights(TINY)
    ids = torch.randint(2, 128, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).mean().backward()
    events, expected = seen(lambda: model(ids, ids).mean().backward()), anatomy.train_flops(TINY, False)
    counted = {kind: sum(e.flops for e in events if e.kind == kind) for kind in expected}
    assert counted["product"] == counter.get_total_flops()
    assert counted == {kind: 64 * flops for kind, flops in expected.items()}


# ---- kernels of Triton


def test_a_kernel_over_a_list_of_tensors_counts_its_arguments(monkeypatch):
    heuristics = pytest.importorskip("torch._inductor.runtime.triton_heuristics")
    monkeypatch.setattr(heuristics.CachingAutotuner, "run", lambda kernel, *args: None)
    with anatomy.recording("cpu") as recorder:
        heuristics.CachingAutotuner.run(triton_kernel("in_ptr0", "in_out_ptr0", "size"), A, B, 7)
    assert recorder.take() == [Event("triton", "triton_k", 96 + 2 * 128)]


def triton_kernel(*names, **meta):
    return types.SimpleNamespace(
        inductor_meta=dict(kernel_name="triton_k") | meta, fn=types.SimpleNamespace(arg_names=names)
    )


def test_kernels_of_triton_count_with_the_bytes_that_inductor_noted(monkeypatch):
    heuristics = pytest.importorskip("torch._inductor.runtime.triton_heuristics")
    monkeypatch.setattr(
        heuristics.CachingAutotuner, "run", lambda kernel, x: x + 1
    )  # what it runs itself is not counted
    count = SIMDKernel.estimate_kernel_num_bytes
    original, kernel = heuristics.CachingAutotuner.run, triton_kernel(kernel_num_gb=0.5)
    with anatomy.recording("cpu") as recorder:
        for _ in range(3):
            heuristics.CachingAutotuner.run(kernel, A)
        A + 1
    found = anatomy.summary(recorder.take())
    assert (found["triton"]["launches"], found["triton"]["gb"], found["eager"]["launches"]) == (3, 1.5, 1)
    assert heuristics.CachingAutotuner.run is original and SIMDKernel.estimate_kernel_num_bytes is count


# ---- collectives and the optimizer


def collectives(cfg, world):
    """The collectives of a step of one of `world` ranks of which no other exists."""
    ids = torch.zeros(1, 2, 8, dtype=torch.int64)
    with anatomy.pretended(world, torch.device("cpu")) as ranks:
        step = bench.driven(t.Trainer(make_model(cfg), repeat((ids, ids)), cfg, ranks))
        step()
        events = seen(step)
    return [e for e in events if e.kind == "collective"]


def test_bytes_between_ranks_are_those_that_two_processes_exchange(dataset, tmp_path):
    options = (
        "num_layers xsa_last_n model_dim num_heads num_kv_heads ve_dim bigram_dim train_seq_len train_batch_tokens"
    )
    options += " micro_batch_tokens eval_stride ttt_chunk_tokens muon_backend_steps dtype compile"
    env = dataset | {name.upper(): str(vars(TINY)[name]) for name in options.split()} | dict(VE_LAYERS="2")
    env |= dict(PYTHONPATH=str(ROOT), OUTPUT_DIR=str(tmp_path))
    lines = run(env, processes=2, script=ROOT / "tests" / "helpers" / "traffic.py").stdout.splitlines()
    exchanged = json.loads(next(line for line in lines if line.startswith("seen:")).removeprefix("seen:"))
    names = dict(all_reduce="allreduce", all_gather_into_tensor="allgather", reduce_scatter_tensor="reduce_scatter")
    events = collectives(t.Config.from_env(env), 2)
    assert sorted((e.name, e.bytes) for e in events) == sorted((names[name], size) for name, size in exchanged)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_every_rank_gets_every_update(world):
    """Updates of all matrices are gathered, at two bytes per number at least, and gradients are summed."""
    roles = t.parameter_roles(make_model(TINY))
    matrices = sum(p.numel() for name, p in make_model(TINY).named_parameters() if roles[name] == "matrix")
    sizes = dict.fromkeys(anatomy.RINGS, 0)
    for event in collectives(TINY, world):
        sizes[event.name] += event.bytes
    assert sizes["allgather"] >= 2 * matrices and sizes["allreduce"] + sizes["reduce_scatter"] >= 2 * matrices
    assert not torch.distributed.is_initialized()


def test_a_sharded_optimizer_sends_and_computes_its_share():
    """Of 4 ranks each orthogonalizes a fourth (3 or 7 matrices fill up to 4 or 8), and gathers the results of all."""
    model = t.GPT(TINY, anatomy.attend)
    model.init_weights(TINY)
    flops = {}
    for world in (1, 4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with anatomy.pretended(world, torch.device("cpu")) as ranks:
            optimizers = t.Optimizers(model, ranks, TINY)
            events = seen(lambda step=optimizers.step: step(1.0, 0.9))
        flops[world] = sum(e.flops for e in events if e.kind == "product")
    assert 2.9 < flops[1] / flops[4] < 3.5
    assert {e.name for e in events if e.kind == "collective"} == {"reduce_scatter", "allgather", "allreduce"}


# ---- the rules


def test_a_kernel_takes_the_longest_of_operations_bytes_and_a_launch():
    assert anatomy.seconds(Event("triton", "k", 2.6e9)) == pytest.approx(1e-3)
    assert anatomy.seconds(Event("eager", "k", 26.0)) == anatomy.LAUNCH
    assert anatomy.seconds(Event("product", "mm", 2.6e9, 620e8)) == pytest.approx(1e-3)
    assert anatomy.seconds(Event("product", "mm", 2.6e6, 620e9)) == pytest.approx(1e-3)
    assert anatomy.seconds(Event("attention", "a", 1e15, 400e9)) == pytest.approx(1e-3)
    ring = anatomy.seconds(Event("collective", "allreduce", 360e6))
    assert ring == pytest.approx(2 * 7 / 8 * 1e-3 + 25e-6)


def test_a_summary_adds_up():
    found = anatomy.summary(
        [Event("triton", "a", 2.6e9), Event("triton", "a", 2.6e9), Event("product", "mm", 0.0, 620e9)]
    )
    triton, product = dict(launches=2, gb=5.2, tflop=0.0, ms=2.0), dict(launches=1, gb=0.0, tflop=0.62, ms=1.0)
    assert found == dict(triton=triton, product=product, ms=3.0)


# ---- a whole count, the file and the table


def test_a_whole_count_adds_its_parts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    cpu = torch.device("cpu")
    with anatomy.Recorder("cpu") as recorder:
        row = anatomy.measure(anatomy.ours(TINY, False, cpu), recorder, cpu)
    phases, tokens = row["phases"], row["tokens"]
    assert (
        tokens == 64
        and row["peak_gib"] == 3
        and list(phases) == ["forward", "backward", "optimizer of 1/1", "optimizer of 1/8", "late QAT"]
    )
    assert row["predicted_ms"]["optimizer of 1/8"] == pytest.approx(
        sum(phases[name]["ms"] for name in ("forward", "backward", "optimizer of 1/8")), abs=0.1
    )
    assert phases["backward"]["attention"]["launches"] == TINY.num_layers and "product" in phases["optimizer of 1/1"]
    assert phases["late QAT"]["eager"]["launches"] > 50 and "product" not in phases["late QAT"]
    assert "collective" not in phases["optimizer of 1/1"] and "collective" in phases["optimizer of 1/8"]


def row(name="card", looped=False, **changes):
    phase = dict(triton=dict(launches=101, gb=2.04, tflop=0.0, ms=1.0), product=dict(tflop=0.25), ms=4.0)
    optimizer = dict(collective=dict(gb=0.25), ms=1.04)
    phases = {"forward": phase, "backward": phase, "optimizer of 1/8": optimizer}
    sizes = dict(torch="2.9.1", tokens=64, compile_s=9.6, peak_gib=1.5, predicted_ms={"optimizer of 1/8": 9.0})
    return dict(name=name, looped=looped, phases=phases) | sizes | changes


def test_the_table_has_a_row_a_count(tmp_path, capsys):
    path = tmp_path / "anatomy.json"
    path.write_text(json.dumps([row(), row("pr1812", True)]))
    anatomy.main(["--table", "--json", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    sizes = "101 + 101 | 2.04 + 2.04 | 0.25 + 0.25 | 0 + 0 | 0.25 | 4.0 | 4.0"
    assert lines[2] == f"| card | False | {sizes} | - | 1.0 | - | 1.5 | 10 | - | 9.0 |"


def test_the_table_shows_the_committed_counts(capsys):
    anatomy.main(["--table", "--json", str(ROOT / "logs" / "anatomy.json")])
    rows = json.loads((ROOT / "logs" / "anatomy.json").read_text())
    for found, line in zip(rows, capsys.readouterr().out.splitlines()[2:], strict=True):
        launches = [found["phases"][name]["triton"]["launches"] for name in ("forward", "backward")]
        assert line.startswith(f"| {found['name']} | {found['looped']} | {' + '.join(map(str, launches))} | ")
        assert line.endswith(f"{found['predicted_ms']['optimizer of 1/8']:.1f} |")


@contextmanager
def no_recorder(device):
    yield None


def test_a_new_count_takes_the_place_of_the_old_one(tmp_path, monkeypatch, capsys):
    path, counts = tmp_path / "anatomy.json", [row(looped=True), row(peak_gib=2.0), row(torch="2.11.0")]
    path.write_text(json.dumps([row(), counts[2]]))
    monkeypatch.setattr(anatomy, "require_gpu", lambda: None)
    monkeypatch.setattr(anatomy, "recording", no_recorder)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    for looped in (0, 1):  # the count of this torch
        monkeypatch.setattr(anatomy, "count", lambda args, _: row(looped=args.looped, peak_gib=2.0 - args.looped / 2))
        anatomy.main(["--json", str(path)] + ["--looped"] * looped)
    assert json.loads(path.read_text()) == [counts[2], counts[1], counts[0]]
    assert path.read_text().count("\n") == 5 and "| 2.0 |" in capsys.readouterr().out


# ---- published scripts

PEER = """
import torch
from torch import nn
from flash_attn_interface import flash_attn_func
class Hyperparameters:
    dim, layers, gate_enabled, train_batch_tokens, train_seq_len = 16, 2, True, 8 * 64, 32
    grad_clip_norm, lr = 1.0, 0.1
class CastedLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype))
class GPT(nn.Module):
    def __init__(self, dim, layers, gate):
        super().__init__()
        self.table, self.head = nn.Embedding(8, dim), CastedLinear(dim, 8, bias=False)
        self.gain = nn.Parameter(torch.ones(()))
        self.bank = nn.Parameter(torch.zeros(layers, dim, dim))
    def forward(self, x, y):
        h = self.table(x)
        for w in self.bank:
            h = self.gain.to(h.dtype) * h + nn.functional.linear(h, w.to(h.dtype))
        h = flash_attn_func(*(3 * [h.unflatten(-1, (1, -1))]), causal=True).flatten(2)
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1).float(), y.flatten())
def restore_low_dim_params_to_fp32(model):
    model.gain.data = model.gain.data.float()
class Optimizers:
    def __init__(self, h, model):
        self.step = torch.optim.SGD(model.parameters(), h.lr).step
"""


def test_a_published_script_is_counted_by_its_own_model_and_settings(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    cpu = torch.device("cpu")
    subject = anatomy.published(tmp_path / "peer.py", False, cpu)
    dtypes = {name: p.dtype for name, p in subject.model.named_parameters()}
    assert dtypes == {
        "table.weight": torch.bfloat16,
        "head.weight": torch.float32,
        "gain": torch.float32,
        "bank": torch.float32,
    }
    with anatomy.Recorder("cpu") as recorder:
        found = anatomy.measure(subject, recorder, cpu)
    products = sum(found["phases"][name]["product"]["launches"] for name in ("forward", "backward"))
    assert (found["tokens"], products) == (64, 3 * (2 + 1))
    assert found["phases"]["forward"]["attention"]["launches"] == 1 and [*found["predicted_ms"]] == ["optimizer of 1/8"]
