"""What the passes of a row's evaluation launch, counted on a GPU that computes nothing, and the seconds that follow.

    VARIANT=card python tests/nullgpu/nullgpu.py VENV/bin/python -m tools.bench.passes --json logs/passes.json
    python -m tools.bench.passes --table --json logs/passes.json

A batch of each kind is run and counted by anatomy.py's rules; how many of them each of eight ranks runs is the script's
own plan for the contest's split: 50,000 documents, their lengths drawn from a lognormal law with its mean and median.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import train_gpt as t
from tools import command_line, run_tool
from tools.bench import anatomy, require_gpu

RANKS, DOCUMENTS = 8, 50_000
TOKENS = {1024: 62_021_632, 8192: 40_540_160}  # of the contest's validation split, by vocabulary
MEDIAN = 0.562  # of the lengths, as a share of their mean
SIZES = (1, 8, 64)  # documents side by side that are counted; between these, seconds are interpolated


def split(vocab_size: int) -> list[tuple[int, int]]:
    """(first target, end) of documents as the contest's split might have them."""
    mean = TOKENS[vocab_size] / DOCUMENTS
    spread = math.sqrt(-2 * math.log(MEDIAN))
    lengths = np.random.default_rng(0).lognormal(math.log(MEDIAN * mean), spread, DOCUMENTS)
    ends = np.cumsum(np.maximum(2, lengths * TOKENS[vocab_size] / lengths.sum()).astype(int))
    return [*pairwise([0, *ends.tolist()])]


def planned(cfg: t.Config, documents: list[tuple[int, int]], rank: int = 0) -> t.Scorer:
    """A scorer that has documents to plan and no text."""
    scorer = t.Scorer.__new__(t.Scorer)
    scorer.cfg, scorer.documents, scorer.ranks = cfg, documents, t.Ranks(rank, RANKS)
    return scorer


def batches(cfg: t.Config, stride: int) -> int:
    """Of windows that score `stride` targets each, those of one rank in a pass over the split."""
    return math.ceil(TOKENS[cfg.vocab_size] / stride / RANKS / cfg.eval_batch_seqs)


class Counted(NamedTuple):
    """What one batch launches, summed."""

    seconds: float
    launches: int
    gb: float

    def __add__(self, other: "Counted") -> "Counted":
        return Counted(*(a + b for a, b in zip(self, other)))

    def times(self, factor: float) -> "Counted":
        return Counted(*(factor * x for x in self))


NOTHING = Counted(0.0, 0, 0.0)


def counted(events: list[anatomy.Event]) -> Counted:
    return Counted(sum(map(anatomy.seconds, events)), len(events), sum(e.bytes for e in events) / 1e9)


class Row:
    """A row's model on the device, and its scorer over as many tokens as a batch needs."""

    def __init__(self, cfg: t.Config, device: torch.device, recorder: anatomy.Recorder):
        self.cfg, self.ranks, self.recorder = cfg, t.Ranks(device=device), recorder
        self.model = t.GPT(cfg, anatomy.attend, torch.bfloat16).to(device)
        self.looped = cfg.num_loops > 0
        compiled = t.compiled(self.model, cfg, self.ranks)
        self.forward = partial(compiled, looped=self.looped)

    def second(self, run: Callable[[], Any]) -> Counted:
        """What a batch launches when its graphs are there."""
        for _ in range(2):
            self.recorder.take()
            run()
        return counted(self.recorder.take())

    def scorer(self, tokens: int, documents: list[tuple[int, int]]) -> t.Scorer:
        scorer = planned(self.cfg, documents)
        scorer.ranks, scorer.log = self.ranks, t.Log(self.cfg, t.Ranks(rank=1))
        scorer.tokens = torch.zeros(tokens + 1, dtype=torch.int64, device=self.ranks.device)
        scorer.bytes = torch.ones(tokens, dtype=torch.int64, device=self.ranks.device)
        return scorer

    def windows(self, stride: int) -> Counted:
        """One full batch of windows that score `stride` targets each, counted once; times those of a rank."""
        rows = self.cfg.eval_batch_seqs
        scorer = self.scorer(self.cfg.window * (rows + 1), [])
        firsts = range(self.cfg.window, self.cfg.window + rows * stride, stride)
        batch = self.second(lambda: scorer.losses(self.forward, firsts, rows))
        return batch.times(batches(self.cfg, stride))

    def stream(self) -> Counted:
        """Scoring and training of each chunk of the stream, as TTT_SCOPE=stream does."""
        cfg, device, window = self.cfg, self.ranks.device, self.cfg.window
        params = [] if cfg.ttt_lora_rank else t.adapting_parameters(self.model, cfg)
        if cfg.ttt_lora_rank:
            params = t.attach_lora(self.model, t.lora_starts(self.model, cfg), 1, cfg)
        adaptation = t.Adaptation(params, partial(self.forward, z_loss=cfg.ttt_z_loss), cfg, self.ranks)
        size = min(cfg.ttt_batch_seqs, cfg.ttt_chunk_tokens // window)
        mine = math.ceil(size / RANKS)  # the rows of one rank in each step
        tokens = torch.zeros(mine, window, dtype=torch.int64, device=device)
        weight, nll = torch.ones(mine, device=device), torch.zeros(1, device=device)
        chunk = t.ScoredChunk(0, 0.0, False, nll, tokens, tokens, weight)
        step = self.second(lambda: adaptation.step(chunk, torch.arange(mine, device=device)))
        chunks = math.ceil(TOKENS[cfg.vocab_size] / cfg.ttt_chunk_tokens)
        return step.times(chunks * cfg.ttt_epochs * math.ceil(cfg.ttt_chunk_tokens / window / size))

    def contexts(self, rows: int) -> list[tuple[Counted, Counted]]:
        """(scoring, learning) of each chunk of so many documents side by side, up to one with a full window before it."""
        length, found = self.cfg.window + 2 * self.cfg.ttt_chunk_tokens, []
        scorer = self.scorer(rows * length, [])
        scorer.documents = [(i * length, (i + 1) * length) for i in range(rows)]
        inner = scorer.document_chunks

        def noted(*args: Any) -> Iterator:
            for chunk in inner(*args):
                scoring = counted(self.recorder.take())
                yield chunk
                found.append((scoring, counted(self.recorder.take())))

        scorer.document_chunks, evaluation = noted, t.evaluations(scorer, self.model, self.looped)["legal_ttt"]
        self.recorder.take()
        evaluation()
        return found[:-1]

    def documents(self, spans: list[tuple[int, int]]) -> list[Counted]:
        """Of each of eight ranks: all of its batches, chunk by chunk."""
        by_size = {rows: self.contexts(rows) for rows in SIZES if rows <= self.cfg.ttt_batch_seqs}

        def at(rows: int, chunk: int, learns: bool) -> Counted:
            def seen(size: int) -> Counted:
                scoring, learning = by_size[size][min(chunk, len(by_size[size]) - 1)]
                return scoring + learning if learns else scoring

            sizes = sorted(by_size)
            columns = zip(*(seen(size) for size in sizes))
            return Counted(*(float(np.interp(rows, sizes, column)) for column in columns))

        totals = []
        for rank in range(RANKS):
            scorer, total = planned(self.cfg, spans, rank), NOTHING
            for batch in scorer.document_batches():
                chunks = len(scorer.chunk_bounds(max(end - first for first, end in batch))) - 1
                for chunk in range(chunks):
                    total += at(len(batch), chunk, chunk < chunks - 1)
            totals.append(total)
        return totals


def count(cfg: t.Config, device: torch.device, recorder: anatomy.Recorder) -> dict[str, Any]:
    """Seconds, launches and gigabytes of each pass, of the slowest of eight ranks."""
    row = Row(cfg, device, recorder)
    passes = {"plain": row.windows(cfg.window), "sliding": row.windows(cfg.eval_stride)}
    if cfg.ttt_epochs and cfg.ttt_scope == "stream":
        passes["adapting"] = passes["sliding"] + row.stream()
    elif cfg.ttt_epochs:
        passes["adapting"] = max(row.documents(split(cfg.vocab_size)))
    found = {name: dict(seconds=round(c.seconds, 1), launches=round(c.launches), gb=round(c.gb)) for name, c in passes.items()}
    return found | dict(seconds=round(sum(c.seconds for c in passes.values()), 1))


HEAD = "| row | plain, s | sliding, s | adapting, s | launches | TB | all, s |\n|---|---:|---:|---:|---:|---:|---:|"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; launches and terabytes are those of the adapting pass on one rank."""
    lines = [HEAD]
    for row in rows:
        last = row.get("adapting", dict(seconds=0.0, launches=0, gb=0))
        lines.append(f"| `{row['name']}` | {row['plain']['seconds']:.1f} | {row['sliding']['seconds']:.1f} | {last['seconds']:.1f} "
                     f"| {last['launches']:,} | {last['gb'] / 1e3:.1f} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    cli = command_line("tools.bench.passes", __doc__)
    cli.add_argument("--json", type=Path, help="file of counts, to which the row is added")
    cli.add_argument("--table", action="store_true", help="print what the file holds and count nothing")
    return cli.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    rows = anatomy.read_rows(args.json, args.table, table)
    if args.table:
        return print(table(rows))
    torch.set_float32_matmul_precision("high")
    cfg = t.Config.from_env({k: v for k, v in os.environ.items() if k.lower() in t.Config.__dataclass_fields__})
    if cfg.vocab_size not in TOKENS:
        raise t.InputError(f"VOCAB_SIZE={cfg.vocab_size}: the tokens of the contest's split are known for {' and '.join(map(str, TOKENS))} alone")
    require_gpu()
    with tempfile.TemporaryDirectory() as cache, anatomy.recording("cuda") as recorder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # graphs of an earlier run would bring the bytes that it counted
        row = dict(name=cfg.variant, torch=torch.__version__) | count(cfg, torch.device("cuda"), recorder)
    print(json.dumps(row), table([row]), sep="\n")
    if args.json:
        lines = ",\n".join(json.dumps(r) for r in sorted([r for r in rows if r["name"] != row["name"]] + [row], key=lambda r: r["name"]))
        t.write_file(args.json, f"[\n{lines}\n]\n".encode())


if __name__ == "__main__":
    run_tool("tools.bench.passes", main, sys.argv[1:])
