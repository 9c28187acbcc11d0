"""Tools for train_gpt.py. Run each one from the repository's root: `python -m tools.NAME`."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def command_line(module: str, text: str) -> argparse.ArgumentParser:
    """Returns the parser of `python -m module`; --help prints `text` without rewrapping it."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=text, formatter_class=formatter)


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return value


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a Markdown table. All columns except the first are right-aligned."""
    columns = list(head)
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|---" + "|---:" * (len(columns) - 1) + "|", *lines[1:]])


def dict_table(rows: Iterable[dict[str, Any]], columns: str) -> str:
    """Returns a Markdown table of dicts. `columns`: keys, some with :FORMAT; a key that a row lacks is a dash."""
    keys = [column.partition(":")[::2] for column in columns.split()]
    cells = [[format(row[key], form) if key in row else "-" for key, form in keys] for row in rows]
    return markdown([key.replace("_", " ") for key, _ in keys], cells)


def run_tool(module: str, main: Callable[..., object], *arguments: object) -> None:
    """Calls main(*arguments). Bad input and failed files exit with status 1 and one line, Ctrl-C with status 130."""
    from tools.files import Refused

    script = sys.modules.get("train_gpt")  # imported only by the tools that need torch
    try:
        main(*arguments)
    except (Refused, OSError, getattr(script, "InputError", Refused)) as error:
        sys.exit(f"{module}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
