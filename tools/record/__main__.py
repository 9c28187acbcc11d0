"""`python -m tools.record`: see command.py."""

import sys

from tools.files import Refused
from tools.record.command import main

try:
    print(main(sys.argv[1:]), flush=True)
except (Refused, OSError) as error:  # OSError: nobody takes what is printed
    sys.exit(f"tools.record: {error}")
