"""The Makefile: which Python, which torch, and when .venv is made again. Recipes are printed by `make -n`, not run, except in the slow test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

VERSION = "{}.{}".format(*sys.version_info)
CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"


def python_of(path, version):
    """A stand-in for a Python that reports another version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = {version}\n$2"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder, *args, env=(), **given):
    settings = {"PYTHON": sys.executable} | given
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "TORCH", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *args, *(f"{name}={value}" for name, value in settings.items())], cwd=folder, env=clean | dict(env),
                          capture_output=True, text=True)


def made(folder, version=sys.version_info[:3], stamp="", venv=".venv", name="ready"):
    """An environment that is newer than the requirements."""
    python_of(folder / venv / "bin" / "python", tuple(version))
    (folder / venv / name).write_text(stamp)
    for path in folder.glob("*.txt"):
        os.utime(path, (1, 1))


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 1)])
@pytest.mark.parametrize("target", ["demo", "test", "check-gpu"])
def test_an_old_python_is_refused_in_one_line(folder, version, target):
    done = make(folder, target, PYTHON=python_of(folder / "old", version))
    reason, status = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and "Error 1" in status and not (folder / ".venv").exists()
    assert reason.startswith("Python 3.10 or later is needed") and "is {}.{}: give another".format(*version) in reason


def test_an_environment_is_kept_as_long_as_its_python_and_torch_are_those_asked_for(folder):
    made(folder)
    for given in ({}, {"PYTHON": python_of(folder / "python", (*sys.version_info[:2], 99))}):
        assert "-m venv" not in make(folder, "-n", "lint", **given).stdout
    made(folder, stamp="cpu")
    assert "-m venv" not in make(folder, "-n", "lint").stdout and "-m venv" not in make(folder, "-n", "lint", TORCH="cpu").stdout


@pytest.mark.parametrize("stamp, install", [
    ("cpu", f"torch==2.13.0 {CPU_INDEX}"), ("torch", "torch -c requirements.txt"), ("", "torch==2.13.0"), ("torch==2.14.1", "torch==2.13.0"),
    (f"torch {CPU_INDEX}", "torch==2.13.0")])
def test_new_requirements_do_not_change_the_kind_of_torch(folder, stamp, install):
    """A .venv with the CPU build or with an installed torch keeps it when TORCH is not given again."""
    made(folder, stamp=stamp)
    os.utime(folder / "requirements.txt")
    os.utime(folder / ".venv" / "ready", (1, 1))
    lines = make(folder, "-n", "lint").stdout.splitlines()
    assert f".venv/bin/python -m pip install {install}" in lines and not any("--clear" in line for line in lines)
    assert (stamp == "torch") == any("venv  --system-site-packages" in line for line in lines)


@pytest.mark.parametrize("version, stamp, given", [((3, 9, 1), "", {}), ((3, 99, 0), "", {}), (sys.version_info[:3], "", {"TORCH": "cpu"}),
                                                   (sys.version_info[:3], "cpu", {"TORCH": "torch"})])
def test_an_environment_of_another_python_or_torch_is_made_again(folder, version, stamp, given):
    made(folder, version, stamp)
    assert f"{sys.executable} -m venv --clear" in make(folder, "-n", "lint", **given).stdout


def test_the_environment_of_test_cuda_is_made_again_for_another_python(folder):
    made(folder, venv=".venv-cuda", name="torch==2.9.1")
    assert "-m venv" not in make(folder, "-n", "test-cuda").stdout
    made(folder, (3, 99, 0), venv=".venv-cuda", name="torch==2.9.1")
    assert "-m venv --clear .venv-cuda" in make(folder, "-n", "test-cuda").stdout


@pytest.mark.parametrize("given, install, words", [
    ({}, "install torch==2.13.0", "`make demo TORCH=cpu`"), ({"TORCH": "torch==2.14.1"}, "install torch==2.14.1", "fetches torch==2.14.1"),
    ({"TORCH": "cpu"}, f"install torch==2.13.0 {CPU_INDEX}", "0.2 GB"), ({"TORCH": f"torch {CPU_INDEX}"}, f"install torch {CPU_INDEX}", "fetches torch")])
def test_what_pip_fetches_is_said_before_and_not_in_silence(folder, given, install, words):
    lines = make(folder, "-n", "demo", **given).stdout.splitlines()
    note, command = next(lines[i - 1:i + 1] for i, line in enumerate(lines) if "install torch" in line and "echo" not in line)
    assert note.startswith("echo '") and words in note and command == f".venv/bin/python -m pip {install}"
    assert not any("--system-site-packages" in line for line in lines)


def test_the_readme_says_how_to_get_each_torch():
    for page in ("README.md", "requirements.txt"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert CPU_INDEX in text, page
    assert "TORCH=cpu" in text + (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["user", "environment"])
def test_an_installed_torch_is_reused(folder, where):
    """A stand-in for torch beside PYTHON, once in the user's site-packages, once in the virtual environment whose Python PYTHON is."""
    parent = folder / "parent"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", parent], check=True)
    user = folder / "user" / "lib" / f"python{VERSION}" / "site-packages"
    site = user if where == "user" else next(parent.glob("lib/python*/site-packages"))
    (info := site / "torch-2.12.0.dist-info").mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    (site / "torch.py").write_text("__version__ = '2.12.0'\n")
    (folder / "requirements.txt").write_text("torch>=2.9,<2.16\n")
    (folder / "requirements-dev.txt").write_text("")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PYTHONUSERBASE": str(folder / "user")}
    python = Path(os.path.realpath(sys.executable)) if where == "user" else parent / "bin" / "python"
    done = make(folder, ".venv/ready", PYTHON=python, TORCH="torch", env=offline)
    assert done.returncode == 0 and "Requirement already satisfied: torch" in done.stdout, done.stderr
    found = subprocess.run([folder / ".venv/bin/python", "-c", "import torch; print(torch.__version__, torch.__file__)"], capture_output=True, text=True,
                           env=os.environ | offline)
    assert found.stdout == f"2.12.0 {site}/torch.py\n"
    assert "-m venv" not in make(folder, "-n", "lint", PYTHON=python, TORCH="torch").stdout
