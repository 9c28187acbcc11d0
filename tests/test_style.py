"""The file keeps its limits: size, no effects at import, no unread option, old and new Pythons."""

import ast
import dataclasses
import io
import os
import subprocess
import sys
import token
import tokenize

import pytest
from conftest import ROOT

import train_gpt as t

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]


def test_the_file_is_short_enough_to_read():
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE).readline)  # lines can be packed and names may be long, so these are counted
    code = [t for t in tokens if t.type in (token.OP, token.NAME, token.NUMBER, token.STRING) and not t.string.startswith('"""')]
    assert SOURCE.isascii() and len(code) <= 28_800
    assert max(map(len, SOURCE.splitlines())) <= 120
    assert max(f.end_lineno - f.lineno + 1 for f in FUNCTIONS) <= 60


def test_long_functions_say_what_they_return():
    for f in FUNCTIONS:
        if f.end_lineno - f.lineno >= 12 and f.name not in ("__init__", "forward"):
            assert ast.get_docstring(f), f.name
        if doc := ast.get_docstring(f):
            assert len(doc.splitlines()) <= 4, f.name


def test_every_option_is_read():
    read = {n.attr for n in ast.walk(TREE) if isinstance(n, ast.Attribute)}
    assert {f.name for f in dataclasses.fields(t.Config)} <= read


def test_every_function_is_used():
    used = {n.attr for n in ast.walk(TREE) if isinstance(n, ast.Attribute)} | {n.id for n in ast.walk(TREE) if isinstance(n, ast.Name)}
    assert {f.name for f in FUNCTIONS if not f.name.startswith("__")} - used <= {"forward"}


def test_the_model_never_reads_the_configuration_in_its_forward():
    for f in FUNCTIONS:
        if f.name in ("forward", "hidden", "logits"):
            assert "cfg" not in {n.id for n in ast.walk(f) if isinstance(n, ast.Name)}


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_it_parses_on_every_supported_python(minor):
    for path in (ROOT / "train_gpt.py", *ROOT.glob("data/*.py"), *ROOT.glob("tools/**/*.py")):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, minor))


def test_importing_it_does_nothing_and_needs_nothing_optional(tmp_path):
    probe = """
import sys
for name in ("flash_attn", "flash_attn_interface", "zstandard", "sentencepiece", "tqdm"):
    sys.modules[name] = None  # an import of any of them would fail
import torch, random
before = torch.get_num_threads(), torch.get_default_dtype(), random.getstate(), torch.get_rng_state().tolist()
import train_gpt
assert before == (torch.get_num_threads(), torch.get_default_dtype(), random.getstate(), torch.get_rng_state().tolist())
assert not torch.distributed.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    assert not list(tmp_path.iterdir())


def test_validation_tokens_meet_no_backward():
    """Only the Scorer reads the validation split, and nothing in it can train."""
    for node in ast.walk(TREE):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            reads_val = any(isinstance(n, ast.Constant) and n.value == "val" for n in ast.walk(node))
            assert not (reads_val and "backward" in names), node.name
    backward = [f.name for f in FUNCTIONS if any(isinstance(n, ast.Attribute) and n.attr == "backward" for n in ast.walk(f))]
    assert backward == ["gradients", "collect", "step"]  # of Trainer, twice, and of Adaptation


def test_nothing_is_unpickled():
    assert not {"pickle", "torch.load", "joblib"} & {ast.unparse(n) for n in ast.walk(TREE) if isinstance(n, (ast.Attribute, ast.Name))}
