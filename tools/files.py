"""Reading and writing of files, and the error of a tool that refuses its input."""

import json
from pathlib import Path
from typing import Any


class Refused(ValueError):
    """Input that a tool does not accept, told in one line: where, why, what to do."""


def read_bytes(path: Path) -> bytes:
    """Raises Refused."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """Raises Refused."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Refused(f"{path} is not JSON: {error}") from None


def write_file(path: Path, contents: bytes) -> None:
    """All of it or nothing; makes the folder. Raises Refused."""
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
