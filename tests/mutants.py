"""Mistakes that a careless programmer could make in train_gpt.py, and which of them the default tests notice.

    python -m tests.mutants [WORD ...]      # all, or those whose name or section has one of the words: `make mutants`

Each mutant runs in a copy of the checkout, the tests of its section first, until the first failure. A mutant that
changes nothing that anybody could see is none, and stands in no table.
"""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JOBS = 2
# files that look at a section, those that end soonest first; all others follow
TESTS = {
    "Configuration": "config rules settings neutral loader ttt",
    "Ranks, clock, log": "schedule optimizer gptq faults facts run",
    "Data": "loader data documents config",
    "Model": "documents reference model neutral published",
    "Optimizer": "muon optimizer schedule reference",
    "Schedules": "schedule documents",
    "Averaging": "schedule optimizer run",
    "Quantization": "quantize gptq fit reference",
    "Entropy coding": "entropy compress",
    "Artifact": "compress artifact fit entropy faults",
    "Training": "documents training schedule gptq fit optimizer faults facts run",
    "Evaluation": "evaluate audit adapt ttt",
    "Test-time training": "ttt adapt audit",
    "Report and main": "training adapt eval_only facts faults run artifact evaluate",
}


def mutants():
    """(name, text, what to put there) of every mutant in mutants.txt."""
    for entry in (ROOT / "tests/mutants.txt").read_text().split("\n\n")[1:]:
        name, *lines = entry.rstrip("\n").split("\n")
        yield name, *("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")


def sections(text):
    """(where it begins, its name) of each part of the script."""
    return [(0, "Head")] + [(m.start(), m[1]) for m in re.finditer(r"^# ---- ([^:.]+)", text, re.MULTILINE)]


def section_of(text, position):
    return [name for start, name in sections(text) if start <= position][-1]


def survives(text, right, wrong):
    """Whether the tests pass with one text in the place of another. A run that does not end is noticed, too."""
    ast.parse(changed := text.replace(right, wrong))  # what no Python reads is no mutant
    first = [f"tests/test_{name}.py" for name in TESTS.get(section_of(text, text.index(right)), "").split()]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in listed.stdout.split():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        (copy / "train_gpt.py").write_text(changed)
        rest = sorted(str(path.relative_to(copy)) for path in copy.glob("tests/test_*.py"))
        files = [*first, *(name for name in rest if name not in (*first, "tests/test_style.py", "tests/test_mutants.py"))]  # these two look at any text
        command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-q", "-p", "no:cacheprovider", "--tb=no", "--hypothesis-seed=0", *files]
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=1500)
        except subprocess.TimeoutExpired:
            return False, "no end"
    return done.returncode == 0, next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), done.stdout[-200:])


def main(words):
    text = (ROOT / "train_gpt.py").read_text()
    chosen = [(section_of(text, max(0, text.find(right))), name, right, wrong) for name, right, wrong in mutants()]
    chosen = [m for m in chosen if not words or any(word in m[0] + " " + m[1] for word in words)]
    if stale := [name for _, name, right, _ in chosen if right not in text]:
        sys.exit(f"tests.mutants: {stale[0]!r} of tests/mutants.txt changes a text that train_gpt.py does not have")
    if not chosen:
        sys.exit(f"tests.mutants: no mutant has {' or '.join(words)} in its name or section; the sections are {', '.join(TESTS)}")
    counts = {}
    with ThreadPoolExecutor(JOBS) as pool:
        for (section, name, _, _), (alive, why) in zip(chosen, pool.map(lambda m: survives(text, *m[2:]), chosen)):
            killed, count = counts.get(section, (0, 0))
            counts[section] = killed + (not alive), count + 1
            print(f"{'SURVIVES' if alive else 'killed  '} {section}: {name}{'' if alive else f' ({why})'}", flush=True)
    print("| section | noticed | of |\n|---|---:|---:|")
    for section, (killed, count) in [*counts.items(), ("all", tuple(map(sum, zip(*counts.values()))))]:
        print(f"| {section} | {killed} | {count} |")


if __name__ == "__main__":
    main(sys.argv[1:])
