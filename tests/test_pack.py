"""tools.record.pack: the packed file does what the source does, in fewer bytes."""

import ast
import base64
import lzma
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, finals, run, tool
from helpers import forked
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t
from tools.record import pack

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence", "ignore:invalid decimal literal")
SOURCE = (ROOT / "train_gpt.py").read_bytes()
ODD = '''"""Its doc."""
from __future__ import annotations

import sys
import typing
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Point:
    x: Later
    y: int = 3


Later = dict[str, int]


def fail(n):
    raise RuntimeError(n)


def main(path):
    print(__name__, __doc__, path.name, path.stat().st_size, sys.modules[Point.__module__].__dict__ is globals())
    print(typing.get_type_hints(Point), [f.type for f in fields(Point)], Point({}), sorted(set(globals()) - {"__warningregistry__"}))


main(Path(__file__))
'''


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    path.write_bytes(pack.pack_source(SOURCE))
    return path


def unpacked(file):
    """The source in a packed file, found without running it."""
    call = next(n for n in ast.walk(ast.parse(file)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "b85decode")
    return lzma.decompress(base64.b85decode(call.args[0].value)).decode()


def names(code, path="odd.py"):
    """What a module binds when it is executed, without what every module has."""
    space = {"__name__": "odd", "__file__": path}
    exec(code, space)
    return {k: v for k, v in space.items() if k != "__builtins__"}


@pytest.mark.slow
def test_it_trains_and_scores_as_the_source_does(packed, env, tmp_path):
    plain = run(env | {"OUTPUT_DIR": str(tmp_path / "plain")}).stdout
    shipped = run(env | {"OUTPUT_DIR": str(tmp_path / "shipped")}, script=packed).stdout
    steps, scores = (re.findall(p, plain) for p in (r"train_loss:[\d.]+", r"val_bpb:[\d.]+"))
    assert len(steps) >= 10 and steps == re.findall(r"train_loss:[\d.]+", shipped) and scores == re.findall(r"val_bpb:[\d.]+", shipped)
    assert list(finals(shipped)) == ["final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt"] and finals(shipped) == finals(plain)
    files = [next((tmp_path / folder).glob("*.int6.ptz")) for folder in ("plain", "shipped")]
    (header, tensors), (same, others) = (t.unpack(file.read_bytes()) for file in files)
    assert header == same and tensors.keys() == others.keys() and all(torch.equal(w, others[name]) for name, w in tensors.items())
    code, model = packed.stat().st_size, files[1].stat().st_size
    assert f"code_bytes:{code} " in shipped and f"code {code} + model {model} = {code + model} bytes" in shipped
    assert code < len(SOURCE) / 2


def test_it_imports_under_its_own_name(packed, tmp_path):
    probe = "import train_gpt as t; print(t.__file__); print(t.describe(t.Config.from_env({'VARIANT': 'pr490', 'SEED': '7'})))"
    done = forked.python(["-c", probe], os.environ | {"PYTHONPATH": str(packed.parent)}, tmp_path)
    assert done.stdout.splitlines() == [str(packed), *t.describe(t.Config.from_env({"VARIANT": "pr490", "SEED": "7"})).splitlines()], done.stderr


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_it_and_what_it_holds_parse_on_every_supported_python(packed, minor):
    ast.parse(packed.read_text(encoding="ascii"), feature_version=(3, minor))
    ast.parse(unpacked(packed.read_text(encoding="ascii")), feature_version=(3, minor))


def test_it_holds_the_source_unchanged_is_short_and_always_the_same(packed):
    file = packed.read_bytes()
    assert unpacked(file) == SOURCE.decode() and file == pack.pack_source(SOURCE)
    assert len(file.splitlines()) == 2 and len(file) < 1.25 * len(lzma.compress(SOURCE, preset=9 | lzma.PRESET_EXTREME)) + 250


@pytest.mark.parametrize("source", [
    b"", b"x = 1", b"x = '\\\\' + \"\\\"'\" + '''\\'''' + r'\\d\\n'\n",
    'x = "é東😀\u2028\x85\x0c", """a\u2029\nb\x1c"""\n'.encode(), b"x = 'a\\\r\nb'\r\ny = '''1\r\n2'''\r\n",
    b"\xef\xbb\xbfx = '\xc3\xa9'\n", b"# -*- coding: latin-1 -*-\nx = '\xe9\xff'\n", b"x = '%s %% {} {0}'\n", b"\x0cx = 1\n\x0cy = 2\n",
    b"if 1:\n\tx = '''\t'''\n",
    b"from __future__ import annotations\nx: nothing = 1\n", b"'its doc'\n",
])
def test_odd_sources_run_as_they_are(source):
    expected = names(compile(source, "odd.py", "exec", dont_inherit=True))
    assert names(pack.pack_source(source)) == expected


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("\\'\"#\n\r\t {}%()=x1rbf;é東😀\u2028\x0c"), max_size=40))
def test_any_text_is_refused_or_runs_as_it_is(text):
    source = b"y = '''" + text.encode() + b"'''\n"
    try:
        code = compile(source, "odd.py", "exec", dont_inherit=True)
    except SyntaxError:
        with pytest.raises(ValueError):
            pack.pack_source(source)
        return
    try:
        expected = names(code)
    except Exception as error:
        with pytest.raises(type(error)):
            names(pack.pack_source(source))
    else:
        assert names(pack.pack_source(source)) == expected


@pytest.mark.parametrize("how", [["odd.py"], ["-m", "odd"], ["-c", "import odd"]])
def test_a_module_finds_its_name_file_hints_and_nothing_else(tmp_path, how):
    out = []
    for folder, content in (("plain", ODD.encode()), ("packed", pack.pack_source(ODD.encode()))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "odd.py").write_bytes(content)
        done = subprocess.run([sys.executable, *how], cwd=tmp_path / folder, capture_output=True, text=True)
        assert done.returncode == 0 and f"odd.py {len(content)} True" in done.stdout, done.stderr
        out.append(done.stdout.replace(f" {len(content)} ", " SIZE "))
    assert out[0] == out[1] and "{'x': dict[str, int], 'y': <class 'int'>}" in out[0]


def test_tracebacks_and_inspect_find_the_lines_of_the_source(tmp_path):
    (tmp_path / "odd.py").write_bytes(pack.pack_source(ODD.encode()))
    probe = "import inspect, traceback, odd\nprint(inspect.getsource(odd.fail))\ntry:\n odd.fail(7)\nexcept RuntimeError:\n print(traceback.format_exc())"
    out = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True).stdout
    line = ODD.splitlines().index("    raise RuntimeError(n)") + 1
    assert "def fail(n):\n    raise RuntimeError(n)\n" in out and f'odd.py", line {line}, in fail\n    raise RuntimeError(n)\n' in out
    (tmp_path / "odd.py").write_bytes(pack.pack_source(ODD.encode() + b"fail(8)\n"))
    err = subprocess.run([sys.executable, "odd.py"], cwd=tmp_path, capture_output=True, text=True).stderr
    assert f"line {line}, in fail\n" in err and len(err) < 1000  # no screen of base 85


def test_the_command_tells_the_bytes_before_and_after(tmp_path):
    source, out = tmp_path / "odd.py", tmp_path / "packed.py"
    source.write_text(ODD.replace("main(Path", "if 0: main(Path") + "# " + "words " * 2000)
    out.write_bytes(b"an earlier one")
    done = tool("tools.record.pack", source, "-o", out)
    before, after = source.stat().st_size, out.stat().st_size
    assert done.returncode == 0 and done.stdout == f"{source}: {before} bytes -> {out}: {after} bytes ({after / before:.1%})\n", done.stderr
    assert out.read_bytes() == pack.pack_source(source.read_bytes()) and sorted(p.name for p in tmp_path.iterdir()) == ["odd.py", "packed.py"]


@pytest.mark.parametrize("content, words", [
    (b"x = 1\nx = = 2\n", "is not a Python source: invalid syntax, line 2"), (b"if 1:\nx\n", "line 2"), (b"x = '\0'\n", "null bytes"),
    (b"# coding: klingon\n", "unknown encoding: klingon"), (b"x = '\xff'\n", "encoding"), (b"x = " + b"-" * 100_000 + b"1\n", "nested too deeply"),
    (b"return 1\n", "'return' outside function, line 1"), (None, "cannot read .*source.py: No such file"),
])
def test_a_source_that_does_not_compile_is_refused_in_one_line(tmp_path, content, words):
    source, out = tmp_path / "source.py", tmp_path / "out.py"
    if content is not None:
        source.write_bytes(content)
    out.write_bytes(b"an earlier one")
    done = tool("tools.record.pack", source, "-o", out)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("tools.record.pack: ") and re.search(words, lines[0]), done.stderr
    assert out.read_bytes() == b"an earlier one" and not done.stdout


@pytest.mark.parametrize("out, words", [("source.py", "is the source; name another file"), ("source.py/out.py", "cannot write .*out.py: "),
                                        (".", "is a folder; name another file")])
def test_a_place_that_cannot_hold_the_file_is_told_in_one_line(tmp_path, out, words):
    source = tmp_path / "source.py"
    source.write_bytes(b"x = 1\n")
    done = tool("tools.record.pack", source, "-o", tmp_path / out)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and re.search(words, done.stderr), done.stderr
    assert source.read_bytes() == b"x = 1\n" and [p.name for p in tmp_path.iterdir()] == ["source.py"]


def test_it_makes_the_folder_of_the_file(tmp_path):
    """`python -m tools.record.pack train_gpt.py -o packed/train_gpt.py` as the pages have it, and unpacking gives the source back."""
    (tmp_path / "train_gpt.py").write_bytes(b"x = 1\n")
    done = tool("tools.record.pack", "train_gpt.py", "-o", "packed/train_gpt.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert pack.unpack_source((tmp_path / "packed" / "train_gpt.py").read_bytes()) == b"x = 1\n"


def test_a_file_that_is_not_packed_is_its_own_source():
    packed = pack.pack_source(b"x = 1\n")
    for file in (b"", b"x = 1\n", packed + b"y = 2\n", packed.replace(b'b85decode("', b'b85decode("0')):
        assert pack.unpack_source(file) == file
