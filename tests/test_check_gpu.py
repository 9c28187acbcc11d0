"""tools.bench.check_gpu as far as a CPU goes: its references, its verdicts, and the processes of its rows."""

import dataclasses
import json
import re
import sys

import pytest
import torch

import train_gpt as t
from tools.bench import bench, cards, check_gpu
from tools.files import Refused

CPU = torch.device("cpu")
GOOD = dict(row="card", what="step", attention="fa3", attention_kernel="FlashAttnFwd", ms=75.25, predicted_ms=69.8)
GOOD |= dict(mfu=0.4, peak_mib=18000, launches=500.0, micro_batch=98304)


@pytest.mark.parametrize("row", ["card", "pr1127", "frontier"])
def test_a_row_agrees_with_itself_and_a_wrong_formula_shows(row, tmp_path, monkeypatch):
    cfg = bench.row_config(row, {}, tmp_path)
    same = check_gpu.against_the_cpu(cfg, CPU)
    assert same["fp32_loss"] == same["fp32_gradient"] == 0 and same["fp32_last"] < 1e-5 and not check_gpu.wrong(same)
    assert 1e-5 < same["bf16_loss"] and 1e-3 < same["bf16_gradient"]
    inner, made = check_gpu.small_model, []

    def wrong_later(*args):
        """The first model, the reference, is right; in the others a head's own value stays in."""
        made.append(args)
        if len(made) > 1:
            monkeypatch.setattr(t, "exclude_own_value", lambda y, v: y)
        return inner(*args)

    monkeypatch.setattr(check_gpu, "small_model", wrong_later)
    faults = " ".join(check_gpu.wrong(check_gpu.against_the_cpu(cfg, CPU)))
    assert "fp32_loss" in faults and "fp32_gradient" in faults and "fp32_last" in faults


def test_a_card_without_bf16_is_compared_in_fp32_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "has_bf16", lambda device: False)
    found = check_gpu.against_the_cpu(bench.row_config("card", {}, tmp_path), CPU)
    assert found.keys() == {"fp32_loss", "fp32_gradient", "fp32_last"} and not check_gpu.wrong(found)


@pytest.mark.parametrize("device, units", [("cpu", True), ("cuda", False)])
def test_only_a_gpu_needs_bf16_units(device, units, monkeypatch):
    monkeypatch.setattr(t, "compute_dtype", lambda cfg, device: torch.float32)
    assert bench.has_bf16(torch.device(device)) == units


def test_a_small_model_has_equal_weights_in_every_dtype_and_no_zero(tmp_path):
    cfg = check_gpu.small(bench.row_config("card", {}, tmp_path))
    models = [check_gpu.small_model(cfg, CPU, dtype) for dtype in ("fp32", "bf16")]
    assert [model.dtype for model in models] == [torch.float32, torch.bfloat16]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b) and a.count_nonzero() > 0.99 * a.numel()


def test_a_batch_in_pieces_has_the_gradient_of_the_whole(tmp_path):
    cfg = check_gpu.small(bench.row_config("card", {}, tmp_path))
    model = check_gpu.small_model(cfg, CPU, "fp32")
    ids = torch.randint(2, cfg.vocab_size, (6, 33), generator=torch.Generator().manual_seed(3))
    whole, pieces = (check_gpu.gradients(model, model, ids[:, :-1], ids[:, 1:], n) for n in (1, 3))
    assert max(map(check_gpu.error, pieces, whole)) < 1e-5 and all(p.grad is None for p in model.parameters())
    assert len(whole[1]) == sum(p.numel() for p in model.parameters()) and whole[0].shape == (6, 32)


@pytest.fixture
def trainer(tmp_path):
    sizes = dict(TRAIN_SEQ_LEN="64", TRAIN_BATCH_TOKENS="384", MODEL_DIM="64", NUM_HEADS="2", NUM_KV_HEADS="1")
    sizes |= dict(NUM_LAYERS="4", VE_LAYERS="2,3", MICRO_BATCH_TOKENS="384", DTYPE="fp32", EVAL_STRIDE="32")
    sizes |= dict(TTT_CHUNK_TOKENS="32", QUANTIZER="gptq", GPTQ_CALIBRATION_BATCHES="2")
    return bench.make_trainer(bench.row_config("card", sizes, tmp_path), t.Ranks())


def test_a_step_that_computes_something_else_shows(trainer, monkeypatch):
    assert max(check_gpu.against_uncompiled(trainer).values()) < 1e-5
    monkeypatch.setattr(check_gpu, "EAGER_TOKENS", 128)  # three pieces
    assert max(check_gpu.against_uncompiled(trainer).values()) < 1e-5
    forward = trainer.forward
    monkeypatch.setattr(trainer, "forward", lambda x, y: 1.01 * forward(x, y))
    assert check_gpu.against_uncompiled(trainer) == pytest.approx(
        dict(compiled_loss=0.01, compiled_gradient=0.01), rel=0.01
    )


def test_every_pass_of_the_evaluation_is_timed(trainer, monkeypatch):
    """Each twice, the second time over so many targets; the trainer's own model stays as it is."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 << 20)
    monkeypatch.setattr(
        check_gpu, "random_text", lambda cfg, count, inner=check_gpu.random_text: inner(cfg, min(count, 200))
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    found = list(check_gpu.timed_evaluations(trainer))
    assert [result["what"] for result in found] == ["roundtrip", "sliding_window", "legal_ttt"]
    assert [result["targets"] for result in found] == [2**21, 2**20, 2**19]
    for result in found:
        share = 62_021_632 / result["targets"] / 8
        assert result["peak_mib"] == 5 and result["split_on_8_seconds"] == pytest.approx(share * result["seconds"])
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_calibration_and_quantization_are_timed(trainer):
    for _ in range(2):  # the first step moves the zeros that keep gradients from some weights
        trainer.step(1.0, 0.9)
    found = check_gpu.timed_quantization(trainer)
    assert found.keys() == {"calibrate_seconds", "quantize_seconds"} and min(found.values()) > 0.001


def test_the_texts_documents_are_as_long_as_the_contests():
    cfg = t.Config()
    tokens = check_gpu.random_text(cfg, 2_000_000)
    firsts = (tokens == t.BOS).nonzero()[0]
    lengths = firsts[1:] - firsts[:-1]
    assert len(tokens) == 2_000_000 and firsts[0] == 0 and 1000 < lengths.mean() < 1500 and lengths.max() > 10_000
    assert 0.5 < sorted(lengths)[len(lengths) // 2] / lengths.mean() < 0.65 and tokens.max() < cfg.vocab_size


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, []),
        (dict(fp32_loss=2e-4), ["fp32_loss 0.0002 > 0.0001"]),
        (dict(compiled_gradient=float("nan")), ["compiled_gradient nan"]),
        (dict(attention_kernel="none"), ["no attention kernel"]),
        (dict(error="it ended with status -9", fp32_loss=1.0), ["fp32_loss 1 > 0.0001", "it ended with status -9"]),
    ],
)
def test_what_is_wrong_is_said(change, words):
    faults = check_gpu.wrong(GOOD | change)
    assert len(faults) == len(words) and all(word in fault for word, fault in zip(words, faults))


PYTHON = """#!{python}
import json, sys
row, path = sys.argv[sys.argv.index("--row") + 1], sys.argv[-1]
with open(path, "w") as file:
    for result in {results}:
        file.write(json.dumps(dict(row=row) | result) + "\\n")
sys.exit(3 * (row == "frontier"))
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs the tool with rows whose processes give these results; the one of `frontier` fails."""
    monkeypatch.setattr(check_gpu, "require_gpu", lambda: CPU)
    monkeypatch.setattr(bench, "ceilings", lambda device: {"torch.bfloat16": 1e12})
    python = tmp_path / "python"

    def check(rows, *results):
        python.write_text(PYTHON.format(python=sys.executable, results=results))
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        check_gpu.main(["--rows", rows, "--output", str(tmp_path / "out.json")])

    return check


def test_the_table_has_measured_beside_predicted_times(check, tmp_path, capsys):
    good = {key: value for key, value in GOOD.items() if key != "row"}
    check("card,pr150", good, dict(what="quantization", quantize_seconds=1.0))
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert rows[1:] == [
        f"| {row} | fa3 | FlashAttnFwd | 98,304 | 75.2 | 69.8 | 40.0% | 18,000 | 500 |" for row in ("card", "pr150")
    ]
    assert lines[-1].endswith(f" s; attach {tmp_path / 'out.json'} to an issue")
    assert any(re.fullmatch(r"logs/cards.json has no .+, so there is no prediction", line) for line in lines)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["row"] for result in results] == 2 * ["card"] + 2 * ["pr150"]


def test_a_wrong_number_and_a_failed_process_end_the_tool_after_the_last_row(check, tmp_path):
    with pytest.raises(Refused) as error:
        check("frontier,card", dict(what="small", fp32_loss=1.0))
    parts = [
        "frontier process: it ended with status 3",
        "frontier small: fp32_loss 1 > 0.0001",
        "card small: fp32_loss 1 > 0.0001",
    ]
    assert str(error.value).split("; ") == parts
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 3


def test_the_process_of_a_row_prints_and_writes_its_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check_gpu, "require_gpu", lambda: CPU)
    monkeypatch.setattr(bench, "ceilings", lambda device: {"torch.bfloat16": 7.0})

    def results(row, folder, ceilings):
        yield dict(what="small", fp32_loss=ceilings["torch.bfloat16"])
        yield dict(row=f"{row} looped", what="step", ms=1.23456, top=[], attention_kernel="k")

    monkeypatch.setattr(check_gpu, "check_row", results)
    check_gpu.main(["--row", "pr1812", "--output", str(tmp_path / "out.jsonl")])
    small, fault, step = capsys.readouterr().out.splitlines()
    assert small.strip() == "pr1812 small: fp32_loss:7" and fault == "WRONG: fp32_loss 7 > 0.0001"
    assert step == "pr1812 looped step: ms:1.235 attention_kernel:k"
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [found["row"] for found in written] == ["pr1812", "pr1812 looped"] and written[1]["ms"] == 1.23456


def test_without_a_gpu_or_with_an_unknown_row_it_says_so(monkeypatch):
    with pytest.raises(Refused, match="sees no GPU"):
        check_gpu.main([])
    monkeypatch.setattr(check_gpu, "require_gpu", lambda: CPU)
    with pytest.raises(Refused, match="--rows demo must be among"):
        check_gpu.main(["--rows", "demo"])


def test_a_known_card_has_its_recipe(check, monkeypatch, capsys):
    monkeypatch.setattr(bench, "machine", lambda device: dict(device="NVIDIA GeForce RTX 4090"))
    check("card", dict(what="small"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| RTX 4090 ")]
    for line, row in zip(lines, cards.ROWS, strict=True):
        found = cards.predict(cards.find("NVIDIA GeForce RTX 4090"), row)
        assert f"| {found['ms_per_step']:,.0f} |" in line and line.endswith(f"| {found['command']} |")


@pytest.mark.parametrize("device", ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3060"])
def test_a_step_in_micro_batches_is_set_beside_the_prediction_of_its_card(device, trainer, tmp_path, monkeypatch):
    """On a GPU the search for a batch that fits halves it; here MICRO_BATCH_TOKENS is half the batch."""
    cfg = dataclasses.replace(trainer.cfg, micro_batch_tokens=192, quantizer="rtn")
    monkeypatch.setattr(bench, "row_config", lambda *_: cfg)
    monkeypatch.setattr(bench, "machine", lambda _: dict(device=device))
    monkeypatch.setattr(check_gpu, "against_the_cpu", lambda *_: {})
    monkeypatch.setattr(check_gpu.mlp, "compared", lambda *_: {})
    monkeypatch.setattr(check_gpu, "timed_evaluations", lambda _: [])
    monkeypatch.setattr(bench, "timed_step", lambda trainer, *_, **__: dict(tokens=trainer.cfg.train_batch_tokens))
    monkeypatch.setattr(bench, "step_times", lambda *_, **__: [1.0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    found = {it["what"]: it for it in check_gpu.check_row("card", tmp_path, {"torch.float32": 1e12})}
    assert found["step"]["micro_batch"] == 192 and found["compiled"]["compiled_loss"] < 1e-5
    card = cards.find(device)
    assert found["step"].get("predicted_ms") == (card and cards.step_ms(card, "card", False, 384))


def test_there_is_a_prediction_for_every_row():
    for row in check_gpu.ROWS:
        assert 40 < cards.step_ms(cards.H100, row, False, 98_304) < 100
