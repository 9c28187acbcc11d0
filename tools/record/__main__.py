"""`python -m tools.record`: see command.py."""

import sys

from tools import run_tool
from tools.record.command import main

run_tool("tools.record", lambda: print(main(sys.argv[1:]), flush=True))
