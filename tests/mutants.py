"""Mutation tests: plants mistakes in train_gpt.py, one by one, and tells which of them the default tests notice.

    python -m tests.mutants [WORD ...]      # all, or those whose name or section has one of the words: `make mutants`

Each mutant runs in a copy of the checkout, the tests of its section first, until the first failure. A mutant whose
effect nobody could see does not belong into mutants.txt.
"""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JOBS = 2
# test files of each section, the fastest first; all others follow
TESTS = {
    "Options": "config settings published variants",
    "Data": "loader data config",
    "Model": "documents reference model neutral published",
    "Optimizer": "muon optimizer schedule reference",
    "Schedules and averaging": "schedule optimizer documents run",
    "Training": "documents training schedule gptq fit optimizer faults facts memory resume run",
    "Evaluation": "mixture evaluate memory data audit adapt ttt",
    "Test-time training": "mixture ttt memory adapt audit",
    "Quantization": "quantize gptq fit reference",
    "Entropy coding": "entropy compress",
    "Artifact": "compress artifact fit entropy faults",
    "Plumbing": "config rules settings loader memory schedule optimizer gptq faults facts resume run",
    "Main": "training adapt eval_only facts resume faults run artifact evaluate",
}
GAP = r"(?:\s|#[^\n]*\n)"  # whitespace or a comment


def mutants() -> Iterator[tuple[str, str, str]]:
    """(name, text, replacement) of every mutant in mutants.txt."""
    for entry in (ROOT / "tests/mutants.txt").read_text().split("\n\n")[1:]:
        name, *lines = entry.rstrip("\n").split("\n")
        right, wrong = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        yield name, right, wrong


def places(text: str, right: str) -> list[re.Match]:
    """Where `right` stands in `text`. Line breaks, indentation, comments and trailing commas may differ."""
    pattern, last = "", ""
    for token in re.findall(r"\w+|[^\w\s]", re.sub(r",\s*([)\]}])", r"\1", right)):
        pattern += (GAP + ("+" if re.match(r"\w\w", last[-1:] + token) else "*")) * bool(last)
        pattern += (f"(?:,{GAP}*)?" if token in ")]}" else "") + re.escape(token)
        last = token
    start, end = (r"(?<!\w)" if re.match(r"\s*\w", right) else ""), (r"(?!\w)" if re.search(r"\w\s*$", right) else "")
    return list(re.finditer(start + pattern + end, text))


def mutated(text: str, right: str, wrong: str) -> str:
    """`text` with the replacement at the first place. Raises SyntaxError if Python cannot read it."""
    place = places(text, right)[0]
    ast.parse(changed := text[: place.start()] + wrong.lstrip() + text[place.end() :])
    return changed


def sections(text: str) -> list[tuple[int, str]]:
    """(start, name) of each section of the script."""
    return [(0, "Head")] + [(m.start(), m[1]) for m in re.finditer(r"^# ---- ([^:.]+)", text, re.MULTILINE)]


def section_of(text: str, right: str) -> str:
    """The section of the first place, or Head."""
    position = places(text, right)[0].start() if places(text, right) else 0
    return [name for start, name in sections(text) if start <= position][-1]


def survives(text: str, right: str, wrong: str) -> tuple[bool, str]:
    """Whether the tests pass with the mutant, and which failed first. A run that does not end counts as a failure."""
    changed = mutated(text, right, wrong)
    first = [f"tests/test_{name}.py" for name in TESTS[section_of(text, right)].split()]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.split()):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        (copy / "train_gpt.py").write_text(changed)
        rest = sorted(str(path.relative_to(copy)) for path in copy.glob("tests/test_*.py"))
        # style and mutants look at the text alone
        skipped = (*first, "tests/test_style.py", "tests/test_mutants.py")
        files = [*first, *(name for name in rest if name not in skipped)]
        command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-q", "-p", "no:cacheprovider", "--tb=no"]
        command += ["--hypothesis-seed=0", *files]
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=1500)
        except subprocess.TimeoutExpired:
            return False, "no end"
    lines = (line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))
    return done.returncode == 0, next(lines, done.stdout[-200:])


def main(words: list[str]) -> None:
    """Run the chosen mutants and print the table of sections."""
    text = (ROOT / "train_gpt.py").read_text()
    chosen = [(section_of(text, right), name, right, wrong) for name, right, wrong in mutants()]
    chosen = [m for m in chosen if not words or any(word in m[0] + " " + m[1] for word in words)]
    if stale := [name for _, name, right, _ in chosen if len(places(text, right)) != 1]:
        sys.exit(f"tests.mutants: the text of {stale[0]!r} in tests/mutants.txt does not stand once in train_gpt.py")
    if not chosen:
        wanted = " or ".join(words)
        sys.exit(f"tests.mutants: no mutant has {wanted} in its name or section; sections are {', '.join(TESTS)}")
    counts: dict[str, tuple[int, int]] = {}
    with ThreadPoolExecutor(JOBS) as pool:
        results = pool.map(lambda m: survives(text, *m[2:]), chosen)
        for (section, name, _, _), (alive, why) in zip(chosen, results):
            killed, count = counts.get(section, (0, 0))
            counts[section] = killed + (not alive), count + 1
            print(f"{'SURVIVES' if alive else 'killed  '} {section}: {name}{'' if alive else f' ({why})'}", flush=True)
    print("| section | noticed | of |\n|---|---:|---:|")
    for section, (killed, count) in [*counts.items(), ("all", tuple(map(sum, zip(*counts.values()))))]:
        print(f"| {section} | {killed} | {count} |")


if __name__ == "__main__":
    main(sys.argv[1:])
