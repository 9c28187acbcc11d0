"""Text from a packed model: the prompt, and what the model makes of it, as it comes.

    python -m tools.model.generate final_model.int6.ptz "Once upon a time" --tokenizer data/tokenizers/fineweb_1024_bpe.model
    python -m tools.model.generate final_model.int6.ptz "The capital of France is" --temperature 0 --max-tokens 20
    python -m tools.model.generate final_model.int6.ptz --temperature 0.8 --top-k 50 --top-p 0.95 --seed 7

Runs on the GPU if there is one; CUDA_VISIBLE_DEVICES= keeps it off. The tokenizer is TOKENIZER_PATH's unless it is
named. The context is a document's start (BOS), the prompt and the text so far, of which the model sees its last window
(EVAL_SEQ_LEN, or else TRAIN_SEQ_LEN). It ends after --max-tokens, or where the model begins a new document. Temperature
0 takes the likeliest token; else the temperature comes first, then top-k, then top-p of what is left. A case tokenizer
(data/case.py) has marks for the prompt's capitals, and what the model writes is printed without them.
"""

from __future__ import annotations

import argparse
import codecs
import itertools
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_gpt
from data import case
from tools import command_line, run_tool
from train_gpt import BOS, InputError


def choose(logits: Tensor, args: argparse.Namespace, draw: torch.Generator) -> int:
    """The next token of logits (V,), drawn on the CPU from those that temperature, top-k and top-p leave."""
    logits = logits.double().cpu()
    if not logits.isfinite().all():
        raise InputError(f"{args.artifact} gives logits that are no numbers; its weights are not usable")
    if args.temperature == 0:
        return int(logits.argmax())
    logits, tokens = logits.sort(descending=True, stable=True)
    p = ((logits - logits[0]) / args.temperature).softmax(0)
    if args.top_k:
        p, tokens = p[: args.top_k] / p[: args.top_k].sum(), tokens[: args.top_k]
    if args.top_p < 1:  # the fewest tokens that together have this probability
        p = p * (p.cumsum(0) - p < args.top_p)
    return int(tokens[torch.multinomial(p, 1, generator=draw)])


@torch.inference_mode()
def continuation(next_logits: Callable[[Tensor], Tensor], ids: list[int], window: int,
                 args: argparse.Namespace) -> Iterator[int]:
    """At most --max-tokens tokens after `ids`, up to a BOS. next_logits: the ids (1, T) of the last window -> (V,)."""
    ids, draw = list(ids), torch.Generator().manual_seed(args.seed)
    for _ in range(args.max_tokens):
        token = choose(next_logits(torch.tensor([ids[-window:]])), args, draw)
        if token == BOS:
            return
        yield token
        ids.append(token)


def token_bytes(sp: Any, token: int) -> bytes:
    """The UTF-8 of one token, which may be a part of a character; control, unknown and unused tokens have none."""
    if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
        return b""
    piece = sp.id_to_piece(token)
    return bytes([int(piece[3:5], 16)]) if sp.is_byte(token) else piece.replace("\u2581", " ").encode()


def pieces(sp: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, as soon as its characters are whole; bytes that are no UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(token_bytes(sp, token))
    yield decoder.decode(b"", final=True)


def generate(args: argparse.Namespace, env: dict[str, str]) -> Iterator[str]:
    """The prompt, then its continuation in pieces. Raises InputError for a file that is not what it should be."""
    if args.tokenizer:
        env = env | {"TOKENIZER_PATH": args.tokenizer}
    cfg, weights, looped, *_ = train_gpt.load_artifact(args.artifact, env)
    sp = train_gpt.load_tokenizer(cfg)
    with train_gpt.launch({}) as ranks:
        model = train_gpt.load_model(cfg, weights, ranks)

        def next_logits(ids: Tensor) -> Tensor:
            return model.logits(model.hidden(ids.to(ranks.device), looped, last=1)[0, -1])

        layout = case.layout_of(sp)
        prompt = case.encode(args.prompt, layout) if layout else args.prompt
        text = pieces(sp, continuation(next_logits, [BOS, *sp.encode(prompt)], cfg.window, args))
        marked = itertools.chain([prompt], text)
        yield from case.decode_stream(marked) if layout else marked


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises InputError for a value out of its range."""
    cli = command_line("tools.model.generate", __doc__)
    cli.add_argument("artifact", type=Path)
    cli.add_argument("prompt", nargs="?", default="", help="what the text begins with (default: nothing)")
    cli.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 is greedy (default: 1)")
    cli.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0 is all (default)")
    cli.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest of this share (default: 1)")
    cli.add_argument("--seed", type=int, default=1337, help="of the draws (default: 1337)")
    cli.add_argument("--max-tokens", type=int, default=200, help="most tokens after the prompt (default: 200)")
    cli.add_argument("--tokenizer", help="SentencePiece model of the artifact (default: TOKENIZER_PATH)")
    args = cli.parse_args(argv)
    for holds, rule in ((0 <= args.temperature < math.inf, f"--temperature {args.temperature} must be 0 or more"),
                        (args.top_k >= 0, f"--top-k {args.top_k} must be 0 or more"),
                        (0 < args.top_p <= 1, f"--top-p {args.top_p} must lie above 0, at most at 1"),
                        (0 <= args.seed < 2**63, f"--seed {args.seed} must lie in [0, 2**63)"),
                        (args.max_tokens >= 0, f"--max-tokens {args.max_tokens} must be 0 or more"),
                        (args.prompt.encode(errors="ignore").decode() == args.prompt, "the prompt is not UTF-8")):
        if not holds:
            raise InputError(rule)
    return args


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")
    for piece in generate(arguments(sys.argv[1:]), dict(os.environ)):
        print(piece, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence
    run_tool("tools.model.generate", main)
