"""The layout of tools/ and data/: the commands on pages are modules that run from the root without changes to sys.path."""

import ast
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run

from tools.record.__main__ import parse_options

PAGES = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("*/README.md"), *ROOT.glob("logs/*.md"), ROOT / "logs" / "rehearsal" / "README.md"]
NAMED = sorted({name for page in PAGES for name in re.findall(r"-m (tools[\w.]*\w)", page.read_text(encoding="utf-8"))})
SOURCES = {path: path.read_text(encoding="utf-8") for part in ("tools", "data") for path in sorted((ROOT / part).rglob("*.py"))}


@pytest.mark.parametrize("name", NAMED)
def test_a_command_of_the_pages_is_a_tool_that_knows_its_name(name):
    done = run({}, "--help", script=name)
    assert done.stdout.startswith(f"usage: python -m {name} [") and not done.stderr
    examples = re.findall(r"python -m (tools[\w.]*\w)", done.stdout)
    assert set(examples) == {name}, examples


def test_the_pages_name_every_tool():
    assert NAMED == sorted(name for text in SOURCES.values() for name in re.findall(r'command_line\("([\w.]+)"', text))


def test_the_steps_to_a_pull_request_pack_first_and_keep_three_artifacts():
    """The artifact of a run is named by its RUN_ID; the script that is packed is the one that runs and is recorded."""
    text = re.sub(r"\\\n *", "", "\n".join(re.findall(r"^    (.*)", (ROOT / "tools/README.md").read_text(encoding="utf-8"), re.M)))
    pack, *runs, last = map(shlex.split, text.splitlines())
    assert pack[:4] == ["python", "-m", "tools.record.pack", "train_gpt.py"] and len(runs) == 3
    given = [dict(part.split("=") for part in words if re.match("[A-Z_]+=", part)) for words in runs]
    options = parse_options(last[last.index("tools.record") + 1 :])
    assert len({env["SEED"] for env in given}) == 3 and [str(path) for path in options.artifacts] == [f"{env['RUN_ID']}.int6.ptz" for env in given]
    assert [str(path) for path in options.logs] == [f"logs/{env['RUN_ID']}.txt" for env in given]
    assert {words[-1] for words in (pack, *runs)} == {str(options.script)} and options.author and options.github_id and options.notes


@pytest.mark.parametrize("path, words", [("tools/plot.py", "No module named 'tools'"), ("tools/model/generate.py", "as python -m tools.model.NAME")])
def test_a_file_that_is_run_instead_of_its_module_says_what_is_missing(path, words):
    done = subprocess.run([sys.executable, str(ROOT / path)], env={}, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr.splitlines()[-1]


def test_nothing_is_found_by_an_edit_of_the_search_path():
    edited = [path.relative_to(ROOT).as_posix() for path, text in SOURCES.items() if re.search(r"sys\.path|search_path", text)]
    assert edited == ["data/prepare.py"]


def test_functions_are_short():
    for path, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
