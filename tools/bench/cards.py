"""Predicts runs of `card` and `frontier` on one GPU of each kind; needs no GPU.

    python -m tools.bench.cards     # the tables of logs/cards.md

Reads published rates and measured memory from logs/cards.json, counted kernels from logs/anatomy.json and
logs/passes.json. logs/cards.md states the rules.
"""

import math
import re
import sys
from typing import Any

import train_gpt as t
from tools import ROOT, command_line, dict_table, run_tool
from tools.files import read_json

ROWS = "card", "frontier"
DATA, COUNTS, PASSES = (read_json(ROOT / "logs" / f"{name}.json") for name in ("cards", "anatomy", "passes"))
CARDS, PEAKS = DATA["cards"], DATA["peaks"]
H100 = next(card for card in CARDS if card["name"] == "H100 SXM")
RESERVED = 1.0  # GiB for the CUDA context and fragmentation; an estimate
SHORT = "card micro_batch:, GiB:.1f ms_per_step:,.0f hours:.1f"
COLUMNS = f"{SHORT} evaluation_hours:.1f command"


def find(device: str) -> dict[str, Any] | None:
    """Returns the card with this name in torch, None if it is not in the table."""
    return next((card for card in CARDS if re.fullmatch(card["device"], device)), None)


def step_ms(card: dict[str, Any], row: str, looped: bool, tokens: int) -> float:
    """Returns the predicted milliseconds of a step of so many tokens; in fp32 kernels move twice the bytes."""
    count = next(it for it in COUNTS if (it["name"], it["looped"]) == (row, looped))
    moved, matrix = H100["gb_per_s"] / card["gb_per_s"] * card["bytes"] / 2, H100["tflop_per_s"] / card["tflop_per_s"]
    factors, times = dict(triton=moved, eager=moved, product=matrix, attention=matrix), {}
    for name, phase in count["phases"].items():
        times[name] = sum(phase[kind]["ms"] * factor for kind, factor in factors.items() if kind in phase)
    return tokens / count["tokens"] * (times["forward"] + times["backward"]) + times["optimizer of 1/1"]


def mean_step(cfg: t.Config, ms: list[float]) -> float:
    """Returns the mean time of the steps before and after loops start, for ENABLE_LOOPING_AT of the training time."""
    share = cfg.enable_looping_at if cfg.num_loops else 1.0
    return 1 / (share / ms[0] + (1 - share) / ms[-1])


def memory(card: dict[str, Any], row: str, tokens: int) -> float:
    """Returns the predicted GiB for a micro batch, on the line through the peaks of the two largest measured ones."""
    (small, less), (large, more) = sorted((int(size), gib) for size, gib in PEAKS[row].items())[-2:]
    return more + (more - less) / (large - small) * (card["bytes"] / 2 * tokens - large)


def predict(card: dict[str, Any], row: str) -> dict[str, Any]:
    """Returns a row of the table; `command` trains as many steps as eight H100s make in the contest's time."""
    cfg = t.Config.from_env(dict(VARIANT=row))
    sequences, loops = cfg.micro_batch_tokens // cfg.train_seq_len, (False, True)[: 1 + (cfg.num_loops > 0)]
    while sequences and memory(card, row, sequences * cfg.train_seq_len) > card["gib"] - RESERVED:
        sequences //= 2
    tokens, two = sequences * cfg.train_seq_len, (card, H100)
    ours, h100 = (mean_step(cfg, [step_ms(it, row, on, cfg.train_batch_tokens) for on in loops]) for it in two)
    eight = [it["predicted_ms"]["optimizer of 1/8"] for it in COUNTS if it["name"] == row]  # without loops first
    slower = ours / mean_step(cfg, eight)
    env = {} if row == ROWS[0] else dict(VARIANT=row)
    env |= dict(MAX_WALLCLOCK_SECONDS=100 * math.ceil(cfg.max_wallclock_seconds * slower / 100))
    env |= dict(GPTQ_RESERVE_SECONDS=math.ceil(cfg.gptq_reserve_seconds * slower)) if cfg.calibrated else {}
    command = " ".join([*(f"{name}={value}" for name, value in env.items()), "python train_gpt.py"])
    evaluation = next(it["seconds"] for it in PASSES if it["name"] == row) * 8 * ours / h100
    found = dict(card=card["name"], micro_batch=tokens, GiB=memory(card, row, tokens), ms_per_step=ours)
    found |= dict(steps=1e3 * cfg.time_limit * slower / ours, hours=cfg.max_wallclock_seconds * slower / 3600)
    return found | dict(evaluation_hours=evaluation / 3600, command=f"`{command}`")


def main(argv: list[str]) -> None:
    command_line("tools.bench.cards", __doc__).parse_args(argv)
    print("\n\n".join(dict_table([predict(card, row) for card in CARDS], COLUMNS) for row in ROWS))


if __name__ == "__main__":
    run_tool("tools.bench.cards", main, sys.argv[1:])
