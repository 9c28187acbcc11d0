"""tools.bench.cards: times and memory against sums by hand, a wrong estimate that shows, the tables of logs/cards.md."""

import json
import math
import re

import pytest
from conftest import ROOT

import train_gpt as t
from tools.bench import cards

PEAKS = json.loads((ROOT / "logs" / "cards.json").read_text())["peaks"]
PAGE = (ROOT / "logs" / "cards.md").read_text(encoding="utf-8")
COUNTS = {(row["name"], row["looped"]): row for row in json.loads((ROOT / "logs" / "anatomy.json").read_text())}
BY_NAME = {card["name"]: card for card in cards.CARDS}


def by_hand(card, row, looped):
    """Milliseconds of a global batch: 8 micro batches of 98,304 tokens, and the optimizer once."""
    phases, total = COUNTS[row, looped]["phases"], 0.0
    for name, times in (("forward", 8), ("backward", 8), ("optimizer of 1/1", 1)):
        for kind, found in phases[name].items():
            if kind in ("triton", "eager"):
                total += times * found["ms"] * 3350 / card["gb_per_s"] * {2: 1, 4: 2}[card["bytes"]]
            if kind in ("product", "attention"):
                total += times * found["ms"] * 989 / card["tflop_per_s"]
    return total


@pytest.mark.parametrize("name", BY_NAME)
def test_a_step_is_eight_micro_batches_by_bandwidth_and_rate(name):
    card = BY_NAME[name]
    for row, looped in (("card", False), ("frontier", False), ("frontier", True)):
        assert cards.step_ms(card, row, looped, 786_432) == pytest.approx(by_hand(card, row, looped), rel=1e-6)
    plain, looped = by_hand(card, "frontier", False), by_hand(card, "frontier", True)
    frontier = cards.predict(card, "frontier")["ms_per_step"]  # loops start after 35 % of the time
    assert 1 / frontier == pytest.approx(0.35 / plain + 0.65 / looped)
    assert cards.predict(card, "card")["ms_per_step"] == pytest.approx(by_hand(card, "card", False))


def test_an_h100_takes_the_times_that_were_predicted_for_it():
    for key in (("card", False), ("frontier", True)):
        ms = cards.step_ms(cards.H100, *key, 98_304)
        assert ms == pytest.approx(COUNTS[key]["predicted_ms"]["optimizer of 1/1"], abs=0.1)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_run_makes_the_steps_of_eight_h100s(name):
    eight = {key: COUNTS[key]["predicted_ms"]["optimizer of 1/8"] for key in COUNTS if key[0] in cards.ROWS}
    steps = dict(card=600e3 / eight["card", False])
    # 4 s are for the calibration of GPTQ
    steps["frontier"] = 596e3 * (0.35 / eight["frontier", False] + 0.65 / eight["frontier", True])
    for row in cards.ROWS:
        found = cards.predict(BY_NAME[name], row)
        assert found["steps"] == pytest.approx(steps[row])
        reserve = {"card": 0, "frontier": 4}[row] / 600
        assert found["hours"] * 3600 * (1 - reserve) == pytest.approx(steps[row] * found["ms_per_step"] / 1000)
        limit, *calibration = map(int, re.findall(r"SECONDS=(\d+)", found["command"]))
        assert 0 <= limit - 3600 * found["hours"] < 100 and limit % 100 == 0
        assert [math.ceil(found["hours"] * 24)] * (row == "frontier") == calibration
        options = dict(pair.split("=") for pair in found["command"].strip("`").split()[:-2])
        assert t.Config.from_env(options).variant == row


def worst(row):
    """The largest relative error of the predicted memory at the sizes that were measured, in bf16."""
    return max(abs(cards.memory(cards.H100, row, int(size)) / gib - 1) for size, gib in PEAKS[row].items())


@pytest.mark.parametrize("row", cards.ROWS)
def test_memory_is_the_measured_one(row):
    assert len(PEAKS[row]) >= 2 and worst(row) < 0.03


@pytest.mark.parametrize("row", cards.ROWS)
def test_half_the_memory_per_token_shows(row, monkeypatch):
    right = cards.memory
    monkeypatch.setattr(cards, "memory", lambda *it: (right(*it[:2], 0) + right(*it)) / 2)
    assert worst(row) > 0.2


def test_fp32_has_twice_the_memory_per_token():
    for row in cards.ROWS:
        bf16, fp32 = ([cards.memory(BY_NAME[name], row, tokens) for tokens in (0, 98_304)] for name in ("L4", "T4"))
        assert fp32[0] == bf16[0] > 0 and fp32[1] - fp32[0] == pytest.approx(2 * (bf16[1] - bf16[0]))


@pytest.mark.parametrize("row", cards.ROWS)
@pytest.mark.parametrize("name", BY_NAME)
def test_the_micro_batch_is_the_largest_that_fits(name, row):
    card, cfg = BY_NAME[name], t.Config.from_env({"VARIANT": row})
    found, sequences = cards.predict(card, row), cfg.micro_batch_tokens // cfg.train_seq_len
    while cards.memory(card, row, sequences * cfg.train_seq_len) + 1.0 > card["gib"]:
        sequences //= 2
    assert found["micro_batch"] == sequences * cfg.train_seq_len > 0
    assert found["GiB"] == cards.memory(card, row, found["micro_batch"]) <= card["gib"] - 1.0


def test_a_card_that_is_too_small_has_no_micro_batch():
    assert cards.predict(BY_NAME["RTX 4090"] | dict(gib=1.5), "frontier")["micro_batch"] == 0


@pytest.mark.parametrize(
    "device, name",
    [
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40S", None),
    ],
)
def test_a_card_is_found_by_its_whole_name(device, name):
    assert (cards.find(device) or dict(name=None))["name"] == name


def test_the_rates_are_of_dense_products_with_their_sources():
    assert len(cards.CARDS) == 10 and all(card["source"].startswith("NVIDIA ") for card in cards.CARDS)
    assert [card["name"] for card in cards.CARDS if card["bytes"] != 2] == ["T4"]


def test_the_page_has_what_the_tool_prints(capsys):
    cards.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 * (1 + len(cards.CARDS))
    for line in lines:  # the page leaves out the last two columns of `frontier`
        short = "| ".join(line.split("| ")[:6])
        assert (f"\n{short}|\n" if "VARIANT" in line else f"\n{line}\n") in PAGE
