"""The folder of a submission, whole or not at all; and the retraction of one."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
from datetime import date
from pathlib import Path

from tools import ROOT
from tools.files import Refused, read_bytes, write_file
from tools.record.checks import gather
from tools.record.entry import CAP_BYTES, Entry, why_no_record
from tools.record.page import readme
from tools.record.significance import against, spread, tests_of, their_text
from tools.record.submission import as_json, submission
from tools.runlog import RunLog


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
    """requirements.txt beside the script; of a script without one, as pack.py writes it, that of this checkout."""
    beside = script.parent / "requirements.txt"
    return read_bytes(beside if beside.exists() else ROOT / "requirements.txt")


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
    folder, entry = options.out / folder_name(options.name, options.date), gather(options)
    if file := options.submission_only:
        logs = [path_from(file.parent, run.path) for run in entry.runs]
        write_file(file, as_json(submission(entry, logs)))
        print(summary(entry))
        return file
    files = {"README.md": readme(entry), "train_gpt.py": entry.shipped,
             "submission.json": as_json(submission(entry, [log_name(run) for run in entry.runs])),
             "requirements.txt": requirements(options.script)}
    write_folder(folder, files | {log_name(run): run.public().encode() for run in entry.runs})
    print(summary(entry))
    return folder
