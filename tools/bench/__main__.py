import sys

from tools import run_tool
from tools.bench.bench import main

run_tool("tools.bench", main, sys.argv[1:])
