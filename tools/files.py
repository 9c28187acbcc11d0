"""Reads and writes files; defines the error for input that a tool does not accept."""

import json
from pathlib import Path
from typing import Any


class Refused(ValueError):
    """Input that a tool does not accept. The message is one line: which file or option, what is wrong, what to do."""


def read_bytes(path: Path) -> bytes:
    """Raises Refused if the file cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """Raises Refused if the file cannot be read or is not JSON."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Refused(f"{path} is not JSON: {error}") from None


def write_file(path: Path, contents: bytes) -> None:
    """Writes atomically and creates the folder. Raises Refused if that fails."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(contents)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror}") from None
