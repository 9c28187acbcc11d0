"""Counts what the evaluation of a row launches on eight GPUs, and predicts its time; needs no real GPU.

    VARIANT=card python tests/nullgpu/nullgpu.py VENV/bin/python -m tools.bench.passes --json logs/passes.json
    python -m tools.bench.passes --table --json logs/passes.json

Counts one batch of each kind as tools/bench/anatomy.py does, times the batches of the slowest of eight ranks. The
lengths of 50,000 documents are lognormal with the mean and the median of the contest's validation split.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import train_gpt as t
from tools import command_line, dict_table, run_tool
from tools.bench import anatomy, bench
from tools.files import Refused

RANKS, DOCUMENTS = 8, 50_000
TOKENS = {1024: 62_021_632, 8192: 40_540_160}  # of the contest's validation split, by vocabulary
MEDIAN = 0.562  # of the documents' lengths, as a fraction of their mean
SIZES = (1, 8, 64)  # documents per batch that are counted; other sizes are interpolated


def split(vocab_size: int) -> list[tuple[int, int]]:
    """Returns (first target, end) of documents that are distributed like the contest's."""
    mean, spread = TOKENS[vocab_size] / DOCUMENTS, math.sqrt(-2 * math.log(MEDIAN))
    lengths = np.random.default_rng(0).lognormal(math.log(MEDIAN * mean), spread, DOCUMENTS)
    ends = np.cumsum(np.maximum(2, lengths * TOKENS[vocab_size] / lengths.sum()).astype(int))
    return [*pairwise([0, *ends.tolist()])]


def batches(cfg: t.Config, stride: int) -> int:
    """Returns how many batches of windows, `stride` targets each, a rank runs for the split."""
    return math.ceil(TOKENS[cfg.vocab_size] / stride / RANKS / cfg.eval_batch_seqs)


class Row:
    """The model of a row on the device. Counts are arrays of seconds, launches and gigabytes."""

    def __init__(self, cfg: t.Config, device: torch.device, recorder: anatomy.Recorder):
        self.cfg, self.ranks, self.recorder = cfg, t.Ranks(device=device), recorder
        self.model = t.GPT(cfg, anatomy.attend, t.compute_dtype(cfg, device)).to(device)
        self.looped = cfg.num_loops > 0
        self.forward = partial(t.Trainer(self.model, None, cfg, self.ranks).compiled, looped=self.looped)

    def taken(self) -> np.ndarray:
        """Returns the count since the last call."""
        events = self.recorder.take()
        return np.array([sum(map(anatomy.seconds, events)), len(events), sum(e.bytes for e in events) / 1e9])

    def second(self, run: Callable[[], Any]) -> np.ndarray:
        """Counts the second of two calls: the first one compiles."""
        run()
        self.recorder.take()
        run()
        return self.taken()

    def scorer(self, tokens: int, documents: list[tuple[int, int]], ranks: t.Ranks | None = None) -> t.Scorer:
        scorer = bench.make_scorer(np.zeros(tokens + 1), self.cfg, self.ranks)
        scorer.documents, scorer.ranks = documents, ranks or self.ranks
        return scorer

    def windows(self, stride: int) -> np.ndarray:
        """Counts the windows of one rank, from one full batch of them."""
        rows, window = self.cfg.eval_batch_seqs, self.cfg.window
        scorer, firsts = self.scorer(window * (rows + 1), []), range(window, window + rows * stride, stride)
        return batches(self.cfg, stride) * self.second(lambda: scorer.window_losses(self.forward, firsts, rows))

    def stream(self) -> np.ndarray:
        """Counts the training on all chunks of the stream, from one step of one rank."""
        cfg, device, window = self.cfg, self.ranks.device, self.cfg.window
        lora = t.attach_lora(t.lora_starts(self.model, cfg), 1, cfg) if cfg.ttt_lora_rank else []
        params = lora or t.ttt_parameters(self.model, cfg)
        adaptation = t.Adaptation(params, partial(self.forward, z_loss=cfg.ttt_z_loss), cfg, self.ranks)
        size = min(cfg.ttt_batch_seqs, cfg.ttt_chunk_tokens // window)  # rows per step of all ranks
        rows = math.ceil(size / RANKS)
        tokens, weight = torch.zeros(rows, window, dtype=torch.int64, device=device), torch.ones(rows, device=device)
        chunk = t.ScoredChunk(0, 0.0, False, weight.double(), tokens, tokens, weight)
        steps = cfg.ttt_epochs * math.ceil(cfg.ttt_chunk_tokens / window / size)  # per chunk
        chunks = math.ceil(TOKENS[cfg.vocab_size] / cfg.ttt_chunk_tokens)
        return chunks * steps * self.second(lambda: adaptation.step(chunk, torch.arange(rows, device=device)))

    def contexts(self, rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Counts (scoring, training) of each chunk of a batch of documents, up to the first with a full window."""
        length, found = self.cfg.window + 2 * self.cfg.ttt_chunk_tokens, []
        scorer = self.scorer(rows * length, [(i * length, (i + 1) * length) for i in range(rows)])
        inner = scorer.document_chunks

        def noted(*args: Any) -> Iterator:
            self.recorder.take()  # leaves out the search for a batch that fits
            for chunk in inner(*args):
                scoring = self.taken()
                yield chunk
                found.append((scoring, self.taken()))

        scorer.document_chunks, evaluation = noted, t.evaluations(scorer, self.model, self.looped)["legal_ttt"]
        with suppress(t.InputError):  # attention computes nothing, so the loss may be NaN, which is an error at the end
            evaluation()
        return found[:-1]

    def documents(self, spans: list[tuple[int, int]]) -> list[np.ndarray]:
        """Counts the adapting pass of each rank over documents of these spans, chunk by chunk."""
        sizes, totals = [rows for rows in SIZES if rows <= self.cfg.ttt_batch_seqs], []
        by_size = [self.contexts(rows) for rows in sizes]
        for rank in range(RANKS):
            totals.append(np.zeros(3))
            for batch in self.scorer(1, spans, t.Ranks(rank, RANKS)).document_batches(self.cfg.ttt_batch_seqs):
                chunks = math.ceil(max(end - first for first, end in batch) / self.cfg.ttt_chunk_tokens)
                for i in range(chunks):  # nothing is learned from the last one
                    seen = [found[min(i, len(found) - 1)] for found in by_size]
                    columns = zip(*(score + learn * (i < chunks - 1) for score, learn in seen))
                    totals[rank] += [np.interp(len(batch), sizes, column) for column in columns]
        return totals


def count(cfg: t.Config, device: torch.device, recorder: anatomy.Recorder) -> dict[str, Any]:
    """Returns seconds, launches and gigabytes of each pass on the slowest of eight ranks."""
    if cfg.vocab_size not in TOKENS:
        raise Refused(f"VOCAB_SIZE={cfg.vocab_size}: the contest's split has {' or '.join(map(str, TOKENS))} pieces")
    row = Row(cfg, device, recorder)
    passes = {"plain": row.windows(cfg.window), "sliding": row.windows(cfg.eval_stride)}
    if cfg.ttt_epochs and cfg.by_document:
        passes["adapting"] = max(row.documents(split(cfg.vocab_size)), key=lambda total: total[0])
    elif cfg.ttt_epochs:
        passes["adapting"] = passes["sliding"] + row.stream()
    found = {n: dict(seconds=round(s, 1), launches=round(k), gb=round(gb)) for n, (s, k, gb) in passes.items()}
    return dict(name=cfg.variant) | found | dict(seconds=round(sum(total[0] for total in passes.values()), 1))


def table(rows: list[dict[str, Any]]) -> str:
    """Launches and terabytes are those of the adapting pass on one rank."""
    cells = []
    for row in rows:
        last = row.get("adapting", dict(seconds=0.0, launches=0, gb=0))
        seconds = dict(plain_s=row["plain"]["seconds"], sliding_s=row["sliding"]["seconds"], all_s=row["seconds"])
        sizes = dict(adapting_s=last["seconds"], launches=last["launches"], TB=last["gb"] / 1e3)
        cells.append(dict(row=f"`{row['name']}`") | seconds | sizes)
    return dict_table(cells, "row plain_s:.1f sliding_s:.1f adapting_s:.1f launches:, TB:.1f all_s:.1f")


def main(argv: list[str]) -> None:
    cli = command_line("tools.bench.passes", __doc__)
    anatomy.run_counter(cli, argv, table, lambda _, it: count(t.Config.from_env(os.environ), torch.device("cuda"), it))


if __name__ == "__main__":
    run_tool("tools.bench.passes", main, sys.argv[1:])
