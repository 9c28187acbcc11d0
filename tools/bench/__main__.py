"""`python -m tools.bench`: see bench.py."""

import sys

from tools.bench.bench import main
from train_gpt import InputError

try:
    main(sys.argv[1:])
except InputError as error:
    sys.exit(f"tools.bench: {error}")
