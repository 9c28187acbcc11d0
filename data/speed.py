"""Time `prepare.py tokenize` against SentencePiece's own batch encoder on the same documents, in turn.

    python data/speed.py docs.jsonl.zst --tokenizer data/tokenizers/fineweb_1024_bpe.model --docs 20000 --workers 2

Ours reads, unpacks, parses, encodes, hashes and writes shards; SentencePiece encodes texts that are in memory already.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import prepare


def blocks(args: argparse.Namespace, start: int, stop: float) -> Iterator[prepare.Block]:
    return prepare.lines_between(prepare.read_blocks([args.file]), start, stop)


def clock() -> np.ndarray:
    """(seconds on the wall, seconds of CPU of this process and of its ended children)."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return np.array([time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)])


def ours(args: argparse.Namespace) -> np.ndarray:
    """Seconds that a dataset of the documents takes, from the file to the shards; prints its rate and its memory."""
    started = clock()
    with tempfile.TemporaryDirectory() as folder:
        sources = dict(val=blocks(args, 0, 1), train=blocks(args, 1, args.docs))
        prepare.build(Path(folder), args.tokenizer, sources, args.workers, {})
    return clock() - started


def theirs(args: argparse.Namespace) -> np.ndarray:
    """Seconds that SentencePiece takes for the ids of the texts, 1,024 a batch, a thread for each of our processes."""
    sp, texts = prepare.processor(args.tokenizer), [t for block in blocks(args, 0, args.docs) for t in block.texts()]
    started = clock()
    for at in range(0, len(texts), 1024):
        sp.encode(texts[at : at + 1024], num_threads=args.workers)
    return clock() - started


def main() -> None:
    cli = prepare.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("file", type=Path, help="JSON lines, plain or .zst")
    cli.add_argument("--tokenizer", type=Path, required=True)
    cli.add_argument("--docs", type=prepare.positive, default=20_000, help="how many (default: %(default)s)")
    cli.add_argument("--workers", type=prepare.workers, default=2, help="processes or threads (default: %(default)s)")
    cli.add_argument("--turns", type=prepare.positive, default=3, help="default: %(default)s")
    args = cli.parse_args()
    for turn in range(1, args.turns + 1):
        a, b = ours(args), theirs(args)
        print(f"turn {turn}: tokenize {a[0]:.1f} s ({a[1]:.1f} s of CPU), SentencePiece {b[0]:.1f} s ({b[1]:.1f} s); "
              f"tokenize is {b[0] / a[0]:.2f} times as fast, for {a[1] / b[1]:.2f} times the CPU", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (prepare.InputError, OSError) as error:
        sys.exit(f"speed.py: {prepare.one_line(error)}")
