"""Files as the tools read and write them, and how they refuse one."""

from pathlib import Path


class Refused(ValueError):
    """Input that a tool does not accept, told in one line: where, why, what to do."""


def read_bytes(path: Path) -> bytes:
    """Raises Refused."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from None


def write_file(path: Path, contents: bytes) -> None:
    """All of it or nothing; raises Refused."""
    part = path.with_name(f"{path.name}.part")
    try:
        try:
            part.write_bytes(contents)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror}") from None
