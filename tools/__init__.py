"""What stands beside train_gpt.py: each tool is run from the repository's root, `python -m tools.NAME`."""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command_line(module: str, text: str) -> argparse.ArgumentParser:
    """The parser of `python -m module`, whose --help shows the text as it stands."""
    shape = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=text, formatter_class=shape)
