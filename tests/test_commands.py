"""Every tool ends in one line and a non-zero status on missing, foreign and damaged files, on wrong arguments and without a GPU."""

import re
import runpy
import signal
import sys

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")

FILES = {"bytes": bytes(range(256)) * 9, "empty": b"", "text.txt": b"no log\n", "list.json": b"[1]", "object.json": b'{"a": 1}', "open.json": b"{",
         "deep.json": b"[" * 100_000, "zip.npz": b"PK\3\4" + bytes(99)}
ONE_FILE = ("tools.table", "tools.plot -o {}/x.png", "tools.record --name x", "tools.record --name x --non-record --submission-only {}/s.json",
            "tools.record --retract", "tools.record.pack -o {}/packed.py", "tools.ablation --out {}/runs", "tools.model.inspect", "tools.model.audit",
            "tools.model.quantization", "tools.model.generate", "tools.bench --compare", "tools.bench.passes --table --json",
            "tools.bench.anatomy --table --json")
ACCEPTED = {("tools.record.pack -o {}/packed.py", name) for name in ("empty", "list.json", "object.json")}  # these are Python
NO_GPU = ("tools.bench.mlp", "tools.bench.mlp --time", "tools.bench.anatomy", "tools.bench.passes", "tools.bench.check_gpu")
WRONG = {"tools.bench.anatomy --script {}/none.py": "is no .py file", "tools.bench.passes --table": "--table needs --json FILE",
         "tools.bench -o {}": "it is a folder", "tools.bench --variant none": "must be one of", "tools.bench --steps 0": "must be 1 or more",
         "tools.model.quantization {}/bytes -o {}/x.xyz": "must be a .png or .svg", "tools.model.quantization {}/bytes -o {}/none/x.png": "folder that exists",
         "tools.ablation {}/list.json --out {}/runs --jobs 0": "must be 1 or more", "tests.mutants NO_MATCH": "no mutant has NO_MATCH in its name"}


@pytest.fixture
def ended(folder, monkeypatch, capsys):
    """Runs a command in this process; returns the line that it ends in. It must write nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pipe = signal.getsignal(signal.SIGPIPE)

    def ended(command, *more):
        before = sorted(folder.rglob("*"))
        module, *rest = command.format(*[folder] * command.count("{}")).split()
        monkeypatch.setattr(sys, "argv", [module, *rest, *more])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        err, status = capsys.readouterr().err, end.value.code
        if status == 2:  # argparse has printed the usage and the line
            *_, status = err.strip().splitlines()
        assert isinstance(status, str) and "\n" not in status and status.startswith((f"{module}: ", f"python -m {module}: error: ")), (command, more, status)
        assert sorted(folder.rglob("*")) == before, (command, more)
        return status

    yield ended
    signal.signal(signal.SIGPIPE, pipe)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    (folder := tmp_path_factory.mktemp("tools") / "files").mkdir()
    for name, contents in FILES.items():
        (folder / name).write_bytes(contents)
    np.savez(folder / "none.npz", nll=np.zeros(0), bytes=np.zeros(0), chunk=np.zeros(0))
    return folder


@pytest.mark.parametrize("command", ONE_FILE)
def test_a_file_that_a_tool_cannot_use_is_refused_in_one_line(command, folder, ended):
    for name in (*FILES, "none.npz", "missing", "."):
        if (command, name) not in ACCEPTED:
            ended(command, str(folder / name))


@pytest.mark.parametrize("command", NO_GPU)
def test_without_a_gpu_a_tool_that_needs_one_says_so(command, ended):
    assert "torch sees no GPU" in ended(command)


@pytest.mark.parametrize("command, words", WRONG.items())
def test_wrong_arguments_are_refused_in_one_line(command, words, ended):
    assert words in ended(command)


def test_a_command_without_its_arguments_names_them(ended):
    for command in ONE_FILE:
        module = command.split()[0]
        if not module.startswith("tools.bench"):
            assert re.search("required|--name is needed|give logs", ended(module))
