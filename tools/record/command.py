"""Logs of finished runs of train_gpt.py, one a seed -> the folder of the contest's pull request.

    python -m tools.record logs/seed1.txt logs/seed2.txt logs/seed3.txt --name card --author NAME --against 2135
    python -m tools.record logs/run.txt --name card --non-record --submission-only submission.json
    python -m tools.record --retract records/2026-04-30_card --reason "scored after it was trained on"

The whole way, from text to a folder that runs, stands in logs/rehearsal/README.md. What is counted is the train_gpt.py
that is shipped. --pack ships a packed one, while the logs tell the bytes of the plain one that wrote them. To have the
same in both, and to let FIT use the bytes that packing frees, pack first, run that file, and name it with --script.

Logs are published as they are, but for the folders of absolute paths, which become /path/to. Nothing is written unless
every log is whole, agrees with itself, with the others, with the script and with the rules.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

from tools import command_line
from tools.files import Refused
from tools.record.folder import retract, write_record
from tools.record.significance import RECORDS


def parse_options(argv: list[str]) -> argparse.Namespace:
    cli = command_line("tools.record", __doc__)
    cli.add_argument("logs", nargs="*", type=Path, help="one log for each seed, as train_gpt.py wrote it")
    cli.add_argument("--name", default="", help="of the submission; names the folder, too")
    cli.add_argument("--out", type=Path, default=Path("records"), help="where the folder is made (default: records)")
    cli.add_argument("--date", default=date.today().isoformat(), help="YYYY-MM-DD (default: today)")
    cli.add_argument("--author", help="who submits (default: null)")
    cli.add_argument("--github-id", help="the same on GitHub (default: null)")
    cli.add_argument("--blurb", default="", help="one paragraph on what is new (default: what ran)")
    cli.add_argument("--script", type=Path, default=Path("train_gpt.py"), help="what ran (default: ./train_gpt.py)")
    cli.add_argument("--pack", action="store_true", help="ship the script packed by tools.record.pack, and count that")
    cli.add_argument("--non-record", action="store_true", help="one seed and any time will do; the track says so")
    cli.add_argument("--against", default="", metavar="SCORES",
                     help=f"an earlier record's scores: 1.0810,1.0812,... or its logs A,B,... or {', '.join(RECORDS)}")
    cli.add_argument("--submission-only", type=Path, metavar="FILE", help="write FILE, a submission.json, no folder")
    cli.add_argument("--retract", type=Path, metavar="FOLDER", help="take back the score of a folder; no logs")
    cli.add_argument("--reason", default="", help="why, for --retract")
    return cli.parse_args(argv)


def main(argv: list[str]) -> Path:
    """Do what the arguments ask for; returns the path of what was written. Raises Refused."""
    options = parse_options(argv)
    if options.retract:
        if options.logs:
            raise Refused("--retract takes a folder alone, no logs")
        retract(options.retract, options.reason)
        return options.retract
    return write_record(options)
