"""README, submission.json and the logs agree; every command in the README is one that exists."""

import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT
from helpers import forked

import train_gpt as t
from tools import table
from tools.record import __main__ as record
from tools.record.page import as_json

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(ROOT).as_posix() for part in ("", "data", "logs", "logs/rehearsal", "tests", "tools") for path in (ROOT / part).glob("*.md"))
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


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere_in_a_clean_clone(page):
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    paths = [(ROOT / page).parent / target for target in targets if not target.startswith("http")]
    assert all(path.exists() for path in paths), paths
    ignored = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)  # 128: no clone
    assert not ignored.stdout, ignored.stdout


def section(title):
    """The text of a section of the README, without its heading."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def test_the_table_has_every_variant_with_its_number_of_parameters():
    rows = re.findall(r"^\| `(\w+)`.*? \| ([\d,]+) \|", section("Variants"), re.M)
    counts = {}
    for variant in t.VARIANTS:
        with torch.device("meta"):
            counts[variant] = f"{sum(p.numel() for p in t.GPT(t.Config.from_env({'VARIANT': variant})).parameters()):,}"
    assert dict(rows) == counts and len(rows) == len(counts)


def test_the_steps_to_a_new_option_name_what_exists():
    """Names in code style are the script's, an option's, or a file's."""
    names = re.findall(r"`([\w./]+)`", section("Add an option in five steps"))
    missing = [name for name in names if not (hasattr(t, name) or hasattr(t.nn.Module, name) or name in {*t.GROUPS, "cfg"} or (ROOT / name).exists())]
    assert len(names) >= 10 and not missing, missing


def test_the_submission_is_what_its_command_makes_of_the_committed_log(tmp_path, monkeypatch):
    """`make submission` in a folder with only the log: the script comes from the git history. A rewritten history changes the names of commits,
    so the commit is looked up: its train_gpt.py must have the sha256 of the log.
    """
    text, makefile = (ROOT / "submission.json").read_text(), (ROOT / "Makefile").read_text()
    assert any(command.startswith("make submission") for command in COMMANDS)
    it, log = json.loads(text), re.search(r"^LOG \?= (\S+)", makefile, re.M)[1]
    recipe = shlex.split(re.search(r"^submission:.*\n((?:\t.*\n)+)", makefile, re.M)[1].replace("\\\n", " ").replace("$(LOG)", log))
    assert it["logs"] == [log] and recipe[:3] == [".venv/bin/python", "-m", "tools.record"] and "submission.json" in recipe
    if not record.committed(it["source_sha256"])[0]:
        pytest.skip("this checkout has no history that holds the script of the log")
    (tmp_path / "logs").mkdir()
    shutil.copy(ROOT / log, tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "run_script", lambda script, *words, **env: forked.python([script.path, *words], env).stdout)
    record.main(recipe[3:])
    made = json.loads((tmp_path / "submission.json").read_text())
    assert text == as_json(made | dict(commit=it["commit"])).decode()
    assert made["commit"] == it["commit"] or not (found := record.git("show", f"{it['commit']}:train_gpt.py")) or (
        hashlib.sha256(found).hexdigest() == it["source_sha256"])


def test_every_score_in_the_readme_is_in_a_log():
    logs = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "logs").rglob("*.txt"))
    known = {f"{float(x):.4f}" for x in re.findall(r"val_bpb:([\d.]+)", logs)}
    ours = "\n".join(line for line in README.splitlines() if " ± " not in line)  # these: test_pages.py
    scores = re.findall(r"\b[12]\.\d{4}\b", ours)
    assert scores and set(scores) <= known, set(scores) - known


def measured_table():
    return table.table([table.read(path) for path in sorted((ROOT / "logs" / "five").glob("*.txt"))]).splitlines()


def test_the_table_of_the_variants_is_what_the_tool_prints_from_their_logs():
    assert set(measured_table()) <= set((ROOT / "logs" / "README.md").read_text(encoding="utf-8").splitlines())
    runs = [path.stem for path in (ROOT / "logs" / "five").glob("*.txt")]
    assert {run.rpartition("-")[0] for run in runs} == {"card", "pr150", "pr455", "pr490", "pr1127", "pr1812"} and len(runs) == 18
