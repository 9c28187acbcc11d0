"""README, submission.json and the logs agree; every command in the README is one that exists."""

import dataclasses
import json
import re
import statistics

import pytest
from conftest import ROOT, finals

import train_gpt as t
from tools import table

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    ")]


def test_it_is_short_and_starts_with_commands():
    lines = README.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("    make demo")) <= 25


def test_every_setting_in_a_command_is_an_option_with_a_valid_value():
    options = {f.name.upper() for f in dataclasses.fields(t.Config)}
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        given = dict(re.findall(r"\b([A-Z][A-Z0-9_]+)=(\S+)", command))
        assert set(given) <= options | {"TORCH", "PYTHON"}, command
        t.Config.from_env({k: v for k, v in given.items() if k in options})


def test_every_file_and_target_of_a_command_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"test-cuda", "check-gpu"} <= set(targets)
    for command in COMMANDS:
        for script in re.findall(r"[\w/]+\.py\b", command):
            assert (ROOT / script).is_file(), script
        if made := re.match(r"make ([\w-]+)", command):
            assert made[1] in targets


@pytest.mark.parametrize("page", ["README.md", "data/README.md", "logs/README.md", "logs/systems.md", "tests/README.md", "tools/README.md"])
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target


def test_every_variant_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)`", README, re.M)) >= set(t.VARIANTS)


def test_the_submission_is_what_its_logs_say():
    submission = json.loads((ROOT / "submission.json").read_text())
    logs = [(ROOT / name).read_text() for name in submission["logs"]]
    assert submission["val_bpb"] == round(statistics.mean(finals(log)["legal_ttt"] for log in logs), 8)
    assert submission["bytes_total"] == max(int(re.search(r"Total submission size \S+ (\d+) bytes", log)[1]) for log in logs)
    assert all(f"sha256:{submission['source_sha256']}" in log for log in logs)


def test_every_score_in_the_readme_is_in_a_log():
    logs = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "logs").rglob("*.txt"))
    known = {f"{float(x):.4f}" for x in re.findall(r"val_bpb:([\d.]+)", logs)}
    ours = "\n".join(line for line in README.splitlines() if not line.startswith("| `pr"))
    scores = re.findall(r"\b[12]\.\d{4}\b", ours)
    assert scores and set(scores) <= known, set(scores) - known


def measured_table():
    return table.table([table.read(path) for path in sorted((ROOT / "logs" / "five").glob("*.txt"))]).splitlines()


def test_the_table_of_the_variants_is_what_the_tool_prints_from_their_logs():
    assert set(measured_table()) <= set((ROOT / "logs" / "README.md").read_text(encoding="utf-8").splitlines())
    runs = [path.stem for path in (ROOT / "logs" / "five").glob("*.txt")]
    assert {run.rpartition("-")[0] for run in runs} == {"card", "pr150", "pr455", "pr490", "pr1127", "pr1812"} and len(runs) == 18
