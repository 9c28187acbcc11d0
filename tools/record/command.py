"""Logs of finished runs of train_gpt.py, one a seed -> the folder of the contest's pull request.

    python -m tools.record logs/seed?.txt --artifacts seed?.int6.ptz --name card --author NAME --github-id ID --notes new.md
    python -m tools.record logs/run.txt --name card --non-record --submission-only submission.json
    python -m tools.record --retract records/2026-04-30_card --reason "scored after it was trained on"

logs/rehearsal/README.md shows every step from text to a folder that runs. The code size is that of the train_gpt.py in
the folder. --pack packs it for the folder, while the logs count the plain file that wrote them. For equal counts, and
for FIT to use the bytes that packing frees, pack first, run the packed file, and name it with --script.

--artifacts compares size and sha256 of each artifact with its log and, where the data of DATA_PATH and TOKENIZER_PATH
exist (of the environment, else of the log), runs the evaluation again and compares every score. The page says which.

Logs are published as written, except that folders of absolute paths become /path/to. Nothing is written unless every
log is complete and agrees with itself, with the other logs, with the script and with the rules.
"""

from __future__ import annotations

import argparse
import re
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
    cli.add_argument("--artifacts", nargs="+", type=Path, metavar="FILE", help="the artifact of each log, in the order of the logs")
    cli.add_argument("--no-rescore", dest="rescore", action="store_false", help="compare artifacts by size and sha256 alone")
    cli.add_argument("--date", default="", help="YYYY-MM-DD (default: the one that the first log's name begins with, else today)")
    cli.add_argument("--author", help="name of the author (default: null)")
    cli.add_argument("--github-id", help="GitHub account of the author (default: null)")
    cli.add_argument("--blurb", default="", help="one paragraph on the submission (default: what ran)")
    cli.add_argument("--notes", type=Path, metavar="FILE", help="Markdown of the section 'What is new' of the page")
    cli.add_argument("--script", type=Path, help="the script that ran (default: ./train_gpt.py, or the commit that the logs tell)")
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
    if not options.date:
        first = re.match(r"\d{4}-\d\d-\d\d(?=_)", options.logs[0].name) if options.logs else None
        options.date = first[0] if first else date.today().isoformat()
    if options.retract:
        if options.logs:
            raise Refused("--retract takes a folder alone, no logs")
        retract(options.retract, options.reason)
        return options.retract
    return write_record(options)
