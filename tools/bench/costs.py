"""What a training step must cost: floating-point operations a token, bytes between ranks, and eight GPUs from one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt as t


class Flops(NamedTuple):
    """Model operations for one trained token; a multiply-add is two. Nothing is counted for what is computed again."""

    matmul: float
    attention: float

    @property
    def total(self) -> float:
        return self.matmul + self.attention


def train_flops(cfg: t.Config, looped: bool) -> Flops:
    """6 x each weight that multiplies, as often as it runs, head included; lookups are free. Attention: dense causal,
    (T+1)/2 keys a query, 4 D operations a key forward and 2.5 times that backward, as FlashAttention counts: 7 (T+1) D.
    """
    with torch.device("meta"):
        model = t.GPT(cfg)
    roles, order, weights = t.parameter_roles(model), t.layer_order(cfg, looped), 0
    for name, p in model.named_parameters():
        times = order.count(int(name.split(".")[1])) if name.startswith("blocks.") else 1
        multiplies = roles[name] == "matrix" or name.endswith(".slope") or name == "tok_emb.weight"
        weights += p.numel() * times * multiplies
    return Flops(6.0 * weights, 7.0 * (cfg.train_seq_len + 1) * cfg.model_dim * len(order))


# ----------------------------------------
# Communication: what the real step asks of torch.distributed when it believes to be one of many ranks.

WIRE = {"allreduce": 2.0, "allgather": 1.0, "reduce_scatter": 1.0, "alltoall": 1.0, "broadcast": 1.0}


class Traffic(TorchDispatchMode):
    """Notes the collectives that run inside: bytes of the whole tensor that each one reduces, gathers or scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname.replace("all_gather", "allgather")
            size = max(sum(x.nbytes for x in tree_leaves(a) if isinstance(x, Tensor)) for a in args[:2])
            self.calls.append((next((k for k in WIRE if k in name), name), size))
        return func(*args, **(kwargs or {}))


class Communication(NamedTuple):
    """Collectives of a step for `world` ranks."""

    world: int
    payload: dict[str, int]  # bytes by kind of collective
    calls: int

    @property
    def wire(self) -> float:
        """Bytes that a rank sends, by rings: (W-1)/W of what is gathered or scattered, twice that of a reduction."""
        return (self.world - 1) / self.world * sum(WIRE.get(k, 1.0) * n for k, n in self.payload.items())


@contextmanager
def pretended(world: int, device: torch.device) -> Iterator[t.Ranks]:
    """Rank 0 of `world` ranks of which no other exists: collectives return at once, without a result."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield t.Ranks(0, world, device)
    finally:
        dist.destroy_process_group()


def communication(cfg: t.Config, world: int, dtype: torch.dtype, drive: Callable) -> Communication:
    """The collectives of one step that `drive(trainer)()` makes with a real Trainer that computes in `dtype`; on a CPU,
    with rows of 8 tokens, since they do not depend on tokens. Call it while no process group exists.
    """
    batch, cpu = 8 * world, torch.device("cpu")
    tiny = replace(cfg, train_seq_len=8, eval_seq_len=8, eval_stride=8, ttt_chunk_tokens=8, muon_backend_steps=1,
                   train_batch_tokens=batch, micro_batch_tokens=batch, compile="off", early_seq_lens=(), early_seq_ends=())
    model = t.GPT(tiny, dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    with pretended(world, cpu) as ranks:
        stream = t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size)
        step = drive(t.Trainer(model, t.Batches(stream, tiny, ranks), tiny, ranks))
        step()
        with Traffic() as traffic:
            step()
    payload: dict[str, int] = defaultdict(int)
    for kind, size in traffic.calls:
        payload[kind] += size
    return Communication(world, dict(payload), len(traffic.calls))


class Prediction(NamedTuple):
    """Milliseconds of a step on `world` H100s of one node, at the same batch a GPU."""

    by_parts: float
    by_ratio: float
    error: float  # +- as a share, of one card and one run


BUS = 360e9  # bytes a second of NCCL on eight H100s
LAUNCH = 25e-6  # seconds a collective


def predict(step_ms: float, optimizer_ms: float, sharded_ms: float, moved: Communication) -> Prediction:
    """The step of `moved.world` GPUs from that of one; speed.md, section 5.

    By parts: with the optimizer's time on one rank's shard, all communication exposed, 1.25 % for the slowest card. By
    ratio: 1.02, the mean over 8 pairs of public logs with a deviation of 0.03; hence 4 % with that of a single run.
    """
    network_ms = 1e3 * (moved.wire / BUS + LAUNCH * moved.calls)
    return Prediction((step_ms - optimizer_ms + sharded_ms + network_ms) * 1.0125, 1.02 * step_ms, 0.04)
