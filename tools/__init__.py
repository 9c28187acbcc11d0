"""What stands beside train_gpt.py: each tool is run from the repository's root, `python -m tools.NAME`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command_line(module: str, text: str) -> argparse.ArgumentParser:
    """The parser of `python -m module`, whose --help shows the text as it stands."""
    shape = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=text, formatter_class=shape)


def positive(text: str) -> int:
    """A number of 1 or more, as the type of an argument."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return value


def run_tool(module: str, main: Callable[..., object], *arguments: object) -> None:
    """Call main(*arguments). A refusal or a failed file operation ends the process with one line and status 1, Ctrl-C
    with 130.
    """
    from tools.files import Refused

    script = sys.modules.get("train_gpt")  # loaded by the tools that need torch
    try:
        main(*arguments)
    except (Refused, OSError, getattr(script, "InputError", Refused)) as error:
        sys.exit(f"{module}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
