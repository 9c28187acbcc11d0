"""The train_gpt.py that wrote the logs: a file that is given, or that of a commit of this repository."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tools import ROOT
from tools.files import Refused, read_bytes, write_file
from tools.record.pack import unpack_source
from tools.runlog import RunLog

KEPT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "SYSTEMROOT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


class Source(NamedTuple):
    """A source that ran, in a file that can be run again."""

    path: Path
    contents: bytes
    commit: str  # the first whose train_gpt.py this is, packed or not; empty if no commit here has it
    is_ours: bool  # a committed train_gpt.py of this project, or the one of this checkout


def git(*words: str) -> bytes:
    """What a git command of this checkout prints; empty without git or without a repository."""
    try:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True).stdout
    except OSError:
        return b""


@cache
def committed(sha256: str) -> tuple[str, bytes]:
    """The first commit whose train_gpt.py has this hash, and that file; empty if there is none."""
    for commit in git("rev-list", "--reverse", "HEAD", "--", "train_gpt.py").decode().split():
        if hashlib.sha256(contents := git("show", f"{commit}:train_gpt.py")).hexdigest() == sha256:
            return commit, contents
    return "", b""


def find_source(script: Path | None, run: RunLog, folder: Path) -> Source:
    """The source of a run: `script`, or else ./train_gpt.py, or else that of a commit, written into `folder` with its
    requirements. Refuses the log if none of them has its sha256.
    """
    path = script or Path("train_gpt.py")
    contents = read_bytes(path) if script or path.exists() else b""
    digest = hashlib.sha256(contents).hexdigest()
    if not script and digest != run.source_sha256 and (found := committed(run.source_sha256))[0]:
        path, contents, digest = folder / path.name, found[1], run.source_sha256
        write_file(path, contents)
        write_file(folder / "requirements.txt", git("show", f"{found[0]}:requirements.txt"))
    if digest != run.source_sha256:
        run.refuse("source", f"written by source {run.source_sha256[:12]}, but {path} is {digest[:12]}, and no commit here has it; "
                   "--script names the one that ran")
    plain = unpack_source(contents)
    commit, _ = committed(hashlib.sha256(plain).hexdigest())
    ours = ROOT / "train_gpt.py"
    return Source(path, contents, commit, bool(commit) or ours.exists() and plain == ours.read_bytes())


def run_script(source: Source, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """The finished process of the source with these options alone."""
    kept = {name: value for name, value in os.environ.items() if name in KEPT}
    return subprocess.run([sys.executable, source.path, *arguments], env=kept | env, capture_output=True, text=True)


def last_line(done: subprocess.CompletedProcess) -> str:
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1]


class Settings(dict):
    """{NAME: value} as a script prints them; a missing one is refused."""

    def __missing__(self, name: str) -> str:
        raise Refused(f"the script that ran has no option {name}; tools.record needs a train_gpt.py of this project")


def resolve(source: Source, run: RunLog) -> Settings:
    """Every setting of a run, and model_params, as the script itself resolves the overrides of the log."""
    done = run_script(source, "--describe", **run.overrides)
    if done.returncode:
        run.refuse("variant", f"{source.path} does not take these settings: {last_line(done)}")
    settings = Settings(re.findall("^(\\w+)[=:](.*)$", done.stdout, re.M))
    if unknown := sorted(run.overrides.keys() - settings.keys()):
        run.refuse("variant", f"{unknown[0]} is no option of {source.path}")
    return settings
