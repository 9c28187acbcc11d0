"""The folder of a submission, whole or not at all; and the retraction of one."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from datetime import date
from pathlib import Path

from tools import ROOT
from tools.files import Refused, read_bytes, write_file
from tools.loglines import read_text
from tools.record.artifacts import places
from tools.record.checks import gather
from tools.record.entry import CAP_BYTES, Entry, why_no_record
from tools.record.page import readme
from tools.record.significance import against, spread, tests_of, their_text
from tools.record.submission import as_json, submission
from tools.runlog import RunLog

CONTEST_TOKENIZER = re.compile(r"fineweb_\d+_bpe\w*\.model")


def log_name(run: RunLog) -> str:
    return f"train_seed{run.seed}.log"


def folder_name(name: str, day: str) -> str:
    """YYYY-MM-DD_Name."""
    try:
        if date.fromisoformat(day).isoformat() != day:
            raise ValueError
    except ValueError:
        raise Refused(f"--date {day} is not a day like 2026-04-30") from None
    if not (stem := re.sub(r"[^A-Za-z0-9.+-]+", "_", name).strip("_.")):
        raise Refused("--name is needed, with a letter or a digit in it")
    return f"{day}_{stem}"


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """All of the folder or nothing of it; never over one that exists."""
    if folder.exists():
        raise Refused(f"{folder} exists; choose another --name, --date or --out, or remove it")
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".record-", dir=folder.parent))
        part.chmod(0o755)
        for name, contents in files.items():
            (part / name).write_bytes(contents)
        part.rename(folder)
    except OSError as error:
        if part:
            shutil.rmtree(part, ignore_errors=True)
        raise Refused(f"cannot write {folder}: {error.strerror}") from None


def retract(folder: Path, reason: str) -> None:
    """Take back the score of a folder as PR #1127 did: val_bpb is null, its value stays beside it, README says so."""
    path, page = folder / "submission.json", folder / "README.md"
    data, text = read_bytes(path), read_bytes(page)
    try:
        contents, text = json.loads(data), text.decode("utf-8")
    except ValueError as error:
        raise Refused(f"{path} or {page} is not what tools.record writes: {error}") from None
    value = contents.get("val_bpb") if isinstance(contents, dict) else None
    if not isinstance(value, float):
        raise Refused(f"{path} has no number as val_bpb; was it retracted before?")
    status = dict(val_bpb=None, val_bpb_retracted=value, status="retracted", retraction_reason=reason or None)
    notice = f"**Retracted: {value} bits per byte, the score below, does not stand.** {reason}".strip()
    write_file(path, as_json(contents | status))
    write_file(page, f"> {notice}\n\n{text}".encode())


def requirements(script: Path) -> bytes:
    """The packages of the requirements.txt beside the script, or of this checkout's, without its comments."""
    beside = script.parent / "requirements.txt"
    lines = read_bytes(beside if beside.exists() else ROOT / "requirements.txt").decode("utf-8", errors="replace").splitlines()
    packages = [line.partition("#")[0].strip() for line in lines]
    return "".join(f"{package}\n" for package in packages if package).encode()


def own_tokenizer(entry: Entry) -> dict[str, bytes]:
    """The tokenizer of the run as {name: contents}; empty if it is the contest's. Warns where the file is missing."""
    path = places(entry.settings)["TOKENIZER_PATH"]
    if CONTEST_TOKENIZER.fullmatch(path.name):
        return {}
    if not path.is_file():
        warn(f"the tokenizer {path} is not the contest's and not here, so the folder lacks it; TOKENIZER_PATH names the file")
        return {}
    return {path.name: read_bytes(path)}


def warn(text: str) -> None:
    print(f"tools.record: WARNING: {text}", file=sys.stderr, flush=True)


def warn_of_gaps(options: argparse.Namespace) -> None:
    """One line that names what a reader of the submission will miss, by the options that give it."""
    given = {"--author": options.author, "--github-id": options.github_id}
    if not options.submission_only:
        given["--notes"] = options.notes
    if missing := [name for name, value in given.items() if not value]:
        warn(f"not given, so empty in what was written: {', '.join(missing)}")


def path_from(folder: Path, path: Path) -> str:
    """The way from a folder to a file below it; of another file the name, since the way tells of local folders."""
    way = Path(os.path.relpath(path, folder))
    return way.name if ".." in way.parts else way.as_posix()


def summary(entry: Entry) -> str:
    """What a person wants to know at once: score, bytes, track, significance."""
    mean, std = spread(run.final.bpb for run in entry.runs)
    most, reasons = entry.most(entry.total_bytes), "; ".join(why_no_record(entry))
    tests = [f"lower than {against(entry.options)} by more than {test.reading}: t {test.t:.3f}, df {test.df:.2f}, "
             f"p {test.p:.4g}" for test in tests_of(entry)]
    texts = [their_text(entry)] if tests else []
    return "\n".join([
        f"val_bpb {mean:.8f}" + ("" if std is None else f", std {std:.8f}, {len(entry.runs)} seeds"),
        f"{most:,} bytes at most (code {len(entry.shipped):,}), {CAP_BYTES - most:,} to spare",
        f"no record: {reasons}" if reasons else "track 10min_16mb", *texts, *tests])


def write_record(options: argparse.Namespace) -> Path:
    """The folder, or with --submission-only that one file; returns its path and tells what is in it."""
    name = folder_name(options.name, options.date)
    written = options.submission_only or options.out / name
    notes = read_text(options.notes) if options.notes else ""
    with tempfile.TemporaryDirectory() as folder:
        entry = gather(options, Path(folder))
        packages = requirements(entry.source.path)
    if options.submission_only:
        logs = [path_from(written.parent, run.path) for run in entry.runs]
        write_file(written, as_json(submission(entry, logs)))
    else:
        tokenizer = own_tokenizer(entry)
        write_folder(written, tokenizer | {log_name(run): run.public().encode() for run in entry.runs} | {
            "README.md": readme(entry, notes, *tokenizer), "train_gpt.py": entry.shipped, "requirements.txt": packages,
            "submission.json": as_json(submission(entry, [log_name(run) for run in entry.runs]))})
    warn_of_gaps(options)
    print(summary(entry))
    return written
