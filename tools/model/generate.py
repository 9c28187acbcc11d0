"""Prints a prompt and its continuation by a packed model, token by token.

    python -m tools.model.generate final_model.int6.ptz "Once upon a time" --tokenizer fineweb_1024_bpe.model
    python -m tools.model.generate final_model.int6.ptz "The capital of France is" --temperature 0 --max-tokens 20
    python -m tools.model.generate final_model.int6.ptz --temperature 0.8 --top-k 50 --top-p 0.95 --seed 7

The context starts with BOS; the model sees its last EVAL_SEQ_LEN (or TRAIN_SEQ_LEN) tokens. Text ends at a BOS. Case
marks (data/case.py) are added to the prompt and not printed. Temperature is applied first, then top-k, then top-p.
"""

import argparse
import codecs
import itertools
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

OPTIONS = {  # name: (default, lowest, highest, meaning)
    "temperature": (1.0, 0.0, 1e9, "divisor of the logits; 0 is greedy"),
    "top-k": (0, 0, 2**31, "sample from the k most likely tokens; 0 is all"),
    "top-p": (1.0, 1e-9, 1.0, "sample from the fewest tokens that have this probability"),
    "seed": (1337, 0, 2**63 - 1, "seed of the sampling"),
    "max-tokens": (200, 0, 2**31, "most tokens after the prompt"),
}


def choose(logits: Tensor, args: argparse.Namespace, generator: torch.Generator) -> int:
    """The next token, drawn on the CPU from logits (V,) by temperature, top-k and top-p."""
    logits = logits.double().cpu()
    if not logits.isfinite().all():
        raise InputError(f"{args.artifact} gives NaN or infinite logits; its weights cannot be used")
    if args.temperature == 0:
        return int(logits.argmax())
    logits, tokens = logits.sort(descending=True, stable=True)
    p = ((logits - logits[0]) / args.temperature).softmax(0)
    if args.top_k:
        p, tokens = p[: args.top_k] / p[: args.top_k].sum(), tokens[: args.top_k]
    if args.top_p < 1:  # the fewest tokens whose probabilities add up to top_p
        p = p * (p.cumsum(0) - p < args.top_p)
    return int(tokens[torch.multinomial(p, 1, generator=generator)])


@torch.inference_mode()
def continuation(next_logits: Callable, ids: list[int], window: int, args: argparse.Namespace) -> Iterator[int]:
    """Up to --max-tokens tokens after `ids`, ending before a BOS. next_logits maps ids (1, T) to logits (V,)."""
    ids, generator = list(ids), torch.Generator().manual_seed(args.seed)
    for _ in range(args.max_tokens):
        token = choose(next_logits(torch.tensor([ids[-window:]])), args, generator)
        if token == BOS:
            return
        yield token
        ids.append(token)


def token_bytes(sp: Any, token: int) -> bytes:
    """UTF-8 bytes of a token, possibly part of a character; empty for control, unknown and unused tokens."""
    if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
        return b""
    piece = sp.id_to_piece(token)
    return bytes([int(piece[3:5], 16)]) if sp.is_byte(token) else piece.replace("\u2581", " ").encode()


def pieces(sp: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Text of tokens, each character once it is complete; invalid UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(token_bytes(sp, token))
    yield decoder.decode(b"", final=True)


def generate(args: argparse.Namespace, env: dict[str, str]) -> Iterator[str]:
    """The prompt, then its continuation. Raises InputError for an artifact or a tokenizer that cannot be used."""
    env = env | {"TOKENIZER_PATH": args.tokenizer} if args.tokenizer else env
    cfg, weights, looped, *_ = train_gpt.load_artifact(args.artifact, env)
    sp = train_gpt.load_tokenizer(cfg)
    with train_gpt.launch({}) as ranks:
        model = train_gpt.load_model(cfg, weights, ranks)

        def next_logits(ids: Tensor) -> Tensor:
            return model.logits(model.hidden(ids.to(ranks.device), looped)[0, -1])

        layout = case.layout_of(sp)
        prompt = case.encode(args.prompt, layout) if layout else args.prompt
        text = pieces(sp, continuation(next_logits, [BOS, *sp.encode(prompt)], cfg.window, args))
        marked = itertools.chain([prompt], text)
        yield from case.decode_stream(marked) if layout else marked


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises InputError for a value out of its range."""
    cli = command_line("tools.model.generate", __doc__)
    cli.add_argument("artifact", type=Path)
    cli.add_argument("prompt", nargs="?", default="", help="start of the text (default: empty)")
    cli.add_argument("--tokenizer", help="SentencePiece model of the artifact (default: TOKENIZER_PATH)")
    for name, (default, low, _, text) in OPTIONS.items():
        cli.add_argument(f"--{name}", type=type(low), default=default, help=f"{text} (default: {default})")
    args = cli.parse_args(argv)
    for name, (_, low, high, _) in OPTIONS.items():
        if not low <= (value := getattr(args, name.replace("-", "_"))) <= high:
            raise InputError(f"--{name} {value} must be in [{low}, {high}]")
    if args.prompt.encode(errors="ignore").decode() != args.prompt:
        raise InputError("the prompt is not UTF-8")
    return args


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")
    for piece in generate(arguments(sys.argv[1:]), dict(os.environ)):
        print(piece, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback after `| head`
    run_tool("tools.model.generate", main)
