"""CPU seconds of our evaluation beside the straightforward one, in turns on one thread, as ratios; random weights.

    python -m tools.bench.evaluation [--tokens 4096] [--repeats 3]

Straightforward sliding evaluation: every window alone, logits for all its rows. Straightforward LoRA: one document at a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

import train_gpt as t
from tools import command_line, positive, run_tool

SMALL = dict(model_dim=128, num_heads=4, num_kv_heads=2, train_seq_len=512, train_batch_tokens=4096, micro_batch_tokens=4096,
             eval_stride=64, bigram_dim=64, ve_dim=64)


def scorer_and_model(tokens: np.ndarray, **settings: object) -> tuple[t.Scorer, t.GPT]:
    """A scorer of `tokens` and a random model, without a tokenizer: every token counts as one byte."""
    cfg = t.Config(**SMALL | settings)
    t.target_bytes = lambda stream, cfg, device: torch.ones(len(stream) - 1, dtype=torch.int64)
    model = t.GPT(cfg)
    model.init_weights(cfg)
    return t.Scorer(tokens, cfg, t.Ranks(), t.Log(cfg, t.Ranks(rank=1))), model


@torch.no_grad()
def every_row_of_every_window(scorer: t.Scorer, model: t.GPT) -> float:
    """Mean loss by the textbook: window after window, all logits, of which the last `stride` count."""
    cfg, total, nll = scorer.cfg, 0.0, scorer.tokens
    for first in range(0, len(nll) - cfg.window, cfg.eval_stride):
        ids, targets = nll[first : first + cfg.window], nll[first + 1 : first + cfg.window + 1]
        losses = model(ids[None], targets[None])[0]
        total += float(losses.sum() if first == 0 else losses[-cfg.eval_stride :].sum())
    return total / (len(nll) - 1)


def in_turns(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> tuple[float, float, float, float]:
    """(our median seconds, theirs, our score, theirs), measured by turns."""
    seconds, scores = ([], []), [0.0, 0.0]
    for _ in range(repeats):
        for i, run in enumerate((ours, theirs)):
            begin = time.process_time()
            scores[i] = run()
            seconds[i].append(time.process_time() - begin)
    return *map(statistics.median, seconds), *scores


def main() -> None:
    cli = command_line("tools.bench.evaluation", __doc__)
    cli.add_argument("--tokens", type=positive, default=4096, help="targets to score, a multiple of 64 (default: 4096)")
    cli.add_argument("--repeats", type=positive, default=3, help="turns (default: 3)")
    args = cli.parse_args()
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    print("| evaluation | vocabulary | ours, s | straightforward, s | ratio | losses |\n|---|---:|---:|---:|---:|---|")
    for vocabulary in (1024, 8192):
        tokens = draw.integers(2, vocabulary, args.tokens + 1).astype(np.uint16)
        scorer, model = scorer_and_model(tokens, vocab_size=vocabulary)
        found = in_turns(lambda s=scorer, m=model: s.sliding(m).loss, lambda s=scorer, m=model: every_row_of_every_window(s, m), args.repeats)
        print("| sliding, stride 64 | {} | {:.2f} | {:.2f} | {:.2f} | {:.5f} {:.5f} |".format(
            vocabulary, *found[:2], found[1] / found[0], *found[2:]), flush=True)
    tokens[:: 160] = t.BOS
    settings = dict(vocab_size=1024, ttt_scope="document", ttt_lora_rank=8, ttt_optimizer="adamw", ttt_lr=0.01, ttt_epochs=1, ttt_grad_clip=0.0,
                    ttt_chunk_tokens=64)
    pairs = [scorer_and_model(np.minimum(tokens, 1023), **settings, ttt_batch_seqs=size) for size in (64, 1)]
    found = in_turns(*[lambda s=s, m=m: t.adaptive_score(s, m, [], m).loss for s, m in pairs], args.repeats)
    print("| LoRA a document, 160 tokens each | 1024 | {:.2f} | {:.2f} | {:.2f} | {:.5f} {:.5f} |".format(
        *found[:2], found[1] / found[0], *found[2:]))


if __name__ == "__main__":
    run_tool("tools.bench.evaluation", main)
