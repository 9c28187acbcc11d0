"""tools.ablation: whole runs of two parts, the table against numbers read from their logs in another way, and mistakes."""

import json
import re
import shutil
import statistics

import pytest
from conftest import tool
from helpers.smoke import SMOKE

PARTS = {"no smear gate": dict(SMEAR_GATE=0)}


@pytest.fixture(scope="module")
def done(dataset, tmp_path_factory):
    """(file of parts, folder of runs, table)."""
    folder = tmp_path_factory.mktemp("ablation")
    base = SMOKE | dataset | dict(ITERATIONS=2, VAL_MAX_TOKENS=70, VAL_LOSS_EVERY=0, TTT_EPOCHS=0, MAX_WALLCLOCK_SECONDS=0)
    (folder / "parts.json").write_text(json.dumps(dict(base=base, parts=PARTS)))
    made = tool("tools.ablation", folder / "parts.json", "--out", folder / "runs", "--seeds", 1, 2, "--jobs", 2)
    assert made.returncode == 0, made.stderr
    return folder / "parts.json", folder / "runs", made.stdout


def scores(table):
    """Its lines without the last cell, milliseconds."""
    return [line.rsplit("|", 2)[0] for line in table.splitlines()]


def score(text):
    return float(re.search(r"^final_int6_sliding_window_exact .*val_bpb:(\S+)$", text, re.M)[1])


def test_a_difference_is_the_mean_over_seeds_of_part_less_base(done):
    _, folder, text = done
    bpb = {path.parent.parent.name: score(path.read_text()) for path in folder.glob("*/logs/run.txt")}
    assert set(bpb) == {"base-1", "base-2", "no_smear_gate-1", "no_smear_gate-2"}
    changes = [bpb[f"no_smear_gate-{seed}"] - bpb[f"base-{seed}"] for seed in (1, 2)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    assert rows[0] == ["part", "runs", "parameters", "sliding, bits per byte", "against base", "ms a step"] and len(rows) == 4
    assert rows[2][:2] == ["base", "2"] and rows[2][3:5] == [f"{(bpb['base-1'] + bpb['base-2']) / 2:.4f}", ""]
    assert rows[3][4] == f"{statistics.mean(changes):+.4f} ± {abs(changes[0] - changes[1]) / 2:.4f}"  # of two: half their distance
    assert int(rows[2][2].replace(",", "")) - int(rows[3][2].replace(",", "")) == 32


def test_runs_that_have_ended_are_not_made_again_and_others_are(done, tmp_path):
    parts, folder, text = done
    log = folder / "base-2" / "logs" / "run.txt"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/logs/run.txt")}
    log.write_text(log.read_text().split("RESULT ")[0])  # as a run that was killed leaves it
    again = tool("tools.ablation", parts, "--out", folder, "--seeds", 1, 2)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert scores(again.stdout) == scores(text) and [path for path in before if before[path] != after[path]] == [log]


def slowed(log, factor):
    """The same log of a run whose steps took `factor` times 100 s."""
    text, result = log.read_text().split("RESULT ")
    values = json.loads(result)
    wanted = 100.0 * factor * values["steps"]  # more than any machine took
    line = re.search(r"training ended: .* train_time:\d+ms step_avg:.*", text)[0]
    new = re.sub(r"train_time:\d+ms step_avg:.*", f"train_time:{1000 * wanted:.0f}ms step_avg:{1000 * wanted / values['steps']:.2f}ms", line)
    log.write_text(text.replace(line, new) + "RESULT " + json.dumps(values | dict(train_seconds=wanted)) + "\n")


def test_a_part_that_is_slower_has_fewer_steps_in_equal_seconds(done, tmp_path):
    parts, folder, _ = done
    shutil.copytree(folder, tmp_path / "runs")
    for seed in (1, 2):
        slowed(tmp_path / "runs" / f"base-{seed}" / "logs" / "run.txt", 1)
        slowed(tmp_path / "runs" / f"no_smear_gate-{seed}" / "logs" / "run.txt", 2)
    made = tool("tools.ablation", parts, "--out", tmp_path / "runs", "--seeds", 1, 2, "--equal-seconds")
    assert made.returncode == 0, made.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.stdout.strip().splitlines()]
    assert rows[0][5:] == ["ms a step", "steps in equal seconds", "against base"]
    assert rows[2][5:] == ["100000", "2", ""] and rows[3][5:7] == ["200000", "1"]
    bpb = [[score((tmp_path / "runs" / f"{part}-{seed}{end}" / "logs" / "run.txt").read_text()) for seed in (1, 2)]
           for part, end in (("no_smear_gate", "-seconds"), ("base", ""))]
    changes = [part - base for part, base in zip(*bpb)]
    assert rows[3][7] == f"{statistics.mean(changes):+.4f} ± {abs(changes[0] - changes[1]) / 2:.4f}"


@pytest.mark.parametrize("contents, words", [
    ("[]", "is not "), ('{"base": {}}', "is not "), ('{"base": {}, "parts": {"a b": {}, "a-b": {}}}', "two parts have one name"),
    ('{"base": {"DATA_PATH": "none"}, "parts": {}}', "base, seed 1, ended with 1: train_gpt.py: no fineweb_val_"), (None, "cannot read")])
def test_mistakes_end_in_one_line(tmp_path, contents, words):
    if contents:
        (tmp_path / "parts.json").write_text(contents)
    failed = tool("tools.ablation", tmp_path / "parts.json", "--out", tmp_path / "runs", "--seeds", 1)
    assert failed.returncode == 1 and failed.stdout == "" and len(failed.stderr.strip().splitlines()) == 1
    assert failed.stderr.startswith("tools.ablation: ") and words in failed.stderr
