"""Logs of finished runs of train_gpt.py, one per seed -> the folder of a pull request to the contest.

    python -m tools.record logs/seed?.txt --artifacts seed?.int6.ptz --name card --author NAME --notes new.md
    python -m tools.record logs/run.txt --name card --non-record --submission-only submission.json
    python -m tools.record --retract records/2026-04-30_card --reason "scored after it was trained on"

Nothing is written unless the logs are complete and fit each other, the script and the rules. --artifacts compares size
and sha256 of each artifact with its log and, where the data exist, scores it again. In published logs /path/to replaces
the folders of absolute paths. --script names a file of tools.record.pack that ran; --pack only packs it for the folder.
"""

import argparse
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from functools import cache
from pathlib import Path
from typing import NoReturn

from tools import ROOT, command_line, run_tool
from tools.files import Refused, read_bytes, read_json, write_file
from tools.record import page
from tools.record.logs import SPLITS, RunLog, by_stage, check_byte_counts, public_path, read_log, read_text, result_of
from tools.record.pack import pack_source, unpack_source
from tools.record.page import CAP_BYTES, CAP_SECONDS, FEWEST_SEEDS, Entry, Source, as_json

SAME_MACHINE, OTHER_MACHINE = 2e-6, 1e-3  # accepted relative difference of a score that is computed again
SHARED = (  # facts that may not differ between seeds
    "source_sha256 variant versions device world_size dataset train_shards val_sha256 targets bytes val_split_targets "
    "parameters attention dtype grad_accum_steps"
).split()
KEPT = "PATH HOME TMPDIR LD_LIBRARY_PATH PYTHONPATH SYSTEMROOT CUDA_VISIBLE_DEVICES OMP_NUM_THREADS".split()
CONTEST_TOKENIZER = re.compile(r"fineweb_\d+_bpe\w*\.model")


def parse_options(argv: list[str]) -> argparse.Namespace:
    cli = command_line("tools.record", __doc__)
    cli.add_argument("logs", nargs="*", type=Path, help="one log per seed, as train_gpt.py wrote it")
    cli.add_argument("--name", default="", help="name of the submission and of its folder")
    cli.add_argument("--out", type=Path, default=Path("records"), help="parent of the folder (default: records)")
    cli.add_argument("--artifacts", nargs="+", type=Path, metavar="FILE", help="one per log, in the same order")
    cli.add_argument("--no-rescore", dest="rescore", action="store_false", help="do not score the artifacts again")
    cli.add_argument("--date", default="", help="YYYY-MM-DD (default: from the first log's name, else today)")
    cli.add_argument("--author", help="name of the author (default: null)")
    cli.add_argument("--github-id", help="GitHub account of the author (default: null)")
    cli.add_argument("--blurb", default="", help="one paragraph on the submission (default: its settings)")
    cli.add_argument("--notes", type=Path, metavar="FILE", help="Markdown of the section 'What is new'")
    cli.add_argument("--script", type=Path, help="script that ran (default: ./train_gpt.py, else the commit that ran)")
    cli.add_argument("--pack", action="store_true", help="ship the script packed, and count the packed bytes")
    cli.add_argument("--non-record", action="store_true", help="accept one seed and any time; the track says so")
    cli.add_argument("--against", default="", help=f"earlier scores: 1.0810,1.0812,... or {', '.join(page.RECORDS)}")
    cli.add_argument("--submission-only", type=Path, metavar="FILE", help="write only FILE, a submission.json")
    cli.add_argument("--retract", type=Path, metavar="FOLDER", help="retract the score of a folder; takes no logs")
    cli.add_argument("--reason", default="", help="reason for --retract")
    return cli.parse_args(argv)


def warn(text: str) -> None:
    print(f"tools.record: WARNING: {text}", file=sys.stderr, flush=True)


def refuse(run: RunLog, reason: str) -> NoReturn:
    raise Refused(f"{run.path}: {reason}")


def git(*words: str) -> bytes:
    """Output of a git command in this checkout; empty without git or without a repository."""
    try:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True).stdout
    except OSError:
        return b""


@cache
def committed(sha256: str) -> tuple[str, bytes]:
    """The first commit whose train_gpt.py has this hash, and the file; empty if there is none."""
    for commit in git("rev-list", "--reverse", "HEAD", "--", "train_gpt.py").decode().split():
        if hashlib.sha256(contents := git("show", f"{commit}:train_gpt.py")).hexdigest() == sha256:
            return commit, contents
    return "", b""


def find_source(script: Path | None, run: RunLog, folder: Path) -> Source:
    """The source of a run: `script`, else ./train_gpt.py, else a committed one, written into `folder`, or Refused."""
    path, wanted = script or Path("train_gpt.py"), run.source_sha256
    contents = read_bytes(path) if script or path.exists() else b""
    if not script and hashlib.sha256(contents).hexdigest() != wanted and (found := committed(wanted))[0]:
        path, contents = folder / path.name, found[1]
        write_file(path, contents)
        write_file(folder / "requirements.txt", git("show", f"{found[0]}:requirements.txt"))
    if (digest := hashlib.sha256(contents).hexdigest()) != wanted:
        refuse(run, f"its source is {wanted[:12]}, {path} is {digest[:12]}, no commit here has it; use --script FILE")
    plain, ours = unpack_source(contents), ROOT / "train_gpt.py"
    commit, _ = committed(hashlib.sha256(plain).hexdigest())
    return Source(path, contents, commit, bool(commit) or ours.exists() and plain == ours.read_bytes())


def run_script(source: Source, *arguments: str, **env: str) -> str:
    """The output of the source with only these options set. Raises Refused with its last line if it fails."""
    kept = {name: value for name, value in os.environ.items() if name in KEPT}
    done = subprocess.run([sys.executable, source.path, *arguments], env=kept | env, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"{source.path} {' '.join(arguments)}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return done.stdout


def resolve(source: Source, run: RunLog) -> dict[str, str]:
    """All settings of a run, and model_params, as its script resolves the overrides of the log."""
    plain = unpack_source(source.contents).decode(errors="replace")
    for name in run.overrides:  # a log could name LD_PRELOAD: only options of the script get into its environment
        if not re.search(f"^    {re.escape(name.lower())}: ", plain, re.MULTILINE):
            refuse(run, f"{name} is no option of {source.path}; name the script that ran with --script")
    settings = dict(re.findall(r"^(\w+)[=:](.*)$", run_script(source, "--describe", **run.overrides), re.MULTILINE))
    if "model_params" not in settings:
        refuse(run, f"{source.path} --describe prints no model_params; give a train_gpt.py of this project")
    return settings


def places(settings: dict[str, str]) -> dict[str, Path]:
    """DATA_PATH and TOKENIZER_PATH: of the environment of this command, else of the run."""
    return {name: Path(os.environ.get(name) or settings[name]) for name in ("DATA_PATH", "TOKENIZER_PATH")}


def check_artifact(run: RunLog, path: Path, source: Source, settings: dict[str, str], rescore: bool) -> dict:
    """Compare size and sha256 with the log, and scores if the data exist. Returns an entry of artifacts_checked."""
    blob = read_bytes(path)
    for name, got in (("model_bytes", len(blob)), ("artifact_sha256", hashlib.sha256(blob).hexdigest())):
        if got != (told := getattr(run, name)):
            raise Refused(f"{path}: {name} is {got}, but {told or 'missing'} in {run.path}; give this log's artifact")
    data, tokenizer = (where := places(settings)).values()
    found = any(data.glob("fineweb_val_*.bin")), tokenizer.is_file()
    missing = [f"no {name}={public_path('', str(where[name]))} here" for name, it in zip(where, found) if not it]
    check = dict(size_and_sha256_agree=True, val_bpb_again=None, not_scored_because=None)
    if missing or not rescore:
        return check | dict(not_scored_because=[*missing, "--no-rescore"][0])
    print(f"tools.record: scoring {path} again; it took {run.eval_seconds:.0f} s in {run.path}", file=sys.stderr)
    env = {name: str(place) for name, place in where.items()} | {"VAL_MAX_TOKENS": settings["VAL_MAX_TOKENS"]}
    env |= {"DTYPE": {"torch.bfloat16": "bf16", "torch.float32": "fp32"}.get(run.dtype, "auto"), "EVAL_ONLY": "1"}
    with tempfile.TemporaryDirectory() as out:
        again = result_of(path, run_script(source, ARTIFACT=str(path), OUTPUT_DIR=out, RUN_ID="again", **env))
    for name in ("targets", "bytes", "val_sha256", "val_bytes_sha256"):
        if (told := getattr(run, name)) and told != (got := again.get(name, told)):
            raise Refused(f"{path}, scored again, has {name} {got}, but {told} in {run.path}")
    told = {stage: score.bpb for stage, score in run.scores.items() if stage not in ("raw", "averaged")}
    scores = {stage: score.bpb for stage, score in by_stage(again).items()}
    here, there = ((log["device"], log["world_size"], log["versions"]["torch"]) for log in (again, vars(run)))
    for stage in told | scores:
        got, want = scores.get(stage, math.nan), told.get(stage, math.nan)
        if not math.isclose(got, want, rel_tol=SAME_MACHINE if here == there else OTHER_MACHINE):
            raise Refused(f"{path}, scored again, has {got:.8f} bits per byte in {stage}, but {want:.8f} in {run.path}")
    return check | dict(val_bpb_again=[*scores.values()][-1], scored_on="{1} x {0}, torch {2}".format(*here))


def check_same(runs: tuple[RunLog, ...]) -> None:
    """Raises Refused unless the logs are independent runs of one configuration, machine and data set."""
    facts = [page.configuration(run) | {name: getattr(run, name) for name in SHARED} for run in runs]
    exact = [run.fingerprint() for run in runs]
    for at, run in enumerate(runs):
        build = run.versions.get("torch", "")
        if run.device.startswith("NVIDIA") and re.fullmatch(r"[^+]*(\+(cpu|rocm|xpu).*)?", build):
            refuse(run, f"device is {run.device}, but torch {build} is no CUDA build; give the log as the run wrote it")
        for other, theirs in zip(runs[:at], exact):
            if run.seed == other.seed:
                refuse(run, f"its seed {run.seed} is also that of {other.path}; give one log for each seed")
            if len(shared := exact[at] & theirs) > 1:  # one number can be equal by chance
                refuse(run, f"{len(shared)} losses, times or steps are exactly those of {other.path}; run each seed")
        for name in facts[0] | facts[at]:
            if (got := facts[at].get(name, "the default")) != (want := facts[0].get(name, "the default")):
                refuse(run, f"{name} is {got}, but {want} in {runs[0].path}; all seeds need one configuration")
    check_byte_counts(runs)


def check_rules(entry: Entry) -> None:
    """Raises Refused if a run breaks a limit; --non-record keeps the limit on bytes only."""
    free, split = entry.options.non_record, SPLITS.get(entry.first.dataset)
    for run in entry.runs:
        if split and entry.is_whole() and not split.matches(run.targets, run.bytes):
            got, want = f"{run.bytes / run.targets:.6f} bytes each", f"of {split.bytes_per_token:.6f} bytes"
            refuse(run, f"{run.targets} targets, {got}, but {run.dataset} has {split.fewest} to {split.most} {want}")
        if (excess := run.total_bytes - CAP_BYTES) > 0:
            refuse(run, f"code + model = {len(entry.shipped)} + {run.model_bytes} bytes, {excess} over {CAP_BYTES}")
        in_time = dict(train_seconds=entry.in_time(run), eval_seconds=run.eval_seconds <= CAP_SECONDS)
        for fact in () if free else [name for name, holds in in_time.items() if not holds]:
            refuse(run, f"{fact} is {getattr(run, fact):.3f}, over {CAP_SECONDS:.0f}; use --non-record")
    if len(entry.runs) < FEWEST_SEEDS and not free:
        raise Refused(f"{len(entry.runs)} seed(s), but a record needs {FEWEST_SEEDS}; give more, or use --non-record")


def gather(options: argparse.Namespace, folder: Path) -> Entry:
    """Read and check logs, script and artifacts; a script from the history is written into `folder`. Raises Refused."""
    if not options.logs:
        raise Refused("give the logs, one for each seed")
    given, paths = [*map(read_log, options.logs)], options.artifacts or []
    if paths and len(paths) != len(given):
        raise Refused(f"{len(paths)} --artifacts for {len(given)} logs; give one for each log, in the same order")
    runs = tuple(sorted(given, key=lambda run: run.seed))
    check_same(runs)
    source = find_source(options.script, runs[0], folder)
    settings = resolve(source, runs[0])
    shipped = pack_source(source.contents) if options.pack else source.contents
    for run in runs:
        run.total_bytes = len(shipped) + run.model_bytes
    entry = Entry(runs, settings, source, shipped, options, {})
    check_rules(entry)
    for run, path in zip(given, paths):
        entry.checks[str(run.seed)] = check_artifact(run, path, source, settings, options.rescore)
    return entry


def folder_name(options: argparse.Namespace) -> str:
    """YYYY-MM-DD_Name."""
    stem = re.sub(r"[^A-Za-z0-9.+-]+", "_", options.name).strip("_.")
    if not stem or not re.fullmatch(r"\d{4}-(0\d|1[0-2])-([0-2]\d|3[01])", options.date):
        raise Refused("--name is needed, with a letter or a digit in it, and --date must be a day like 2026-04-30")
    return f"{options.date}_{stem}"


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a new folder, whole or not at all. Raises Refused if it exists or cannot be written."""
    if folder.exists():
        raise Refused(f"{folder} exists; choose another --name, --date or --out, or remove it")
    part = folder.with_name(f".{folder.name}.part")
    try:
        for name, contents in files.items():
            write_file(part / name, contents)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def retract(folder: Path, reason: str) -> Path:
    """Retract the score of a folder as PR #1127 did: val_bpb becomes null, and README.md says so."""
    path, page = folder / "submission.json", folder / "README.md"
    contents, text = read_json(path), read_text(page)
    value = contents.get("val_bpb") if isinstance(contents, dict) else None
    if not isinstance(value, float):
        raise Refused(f"{path} has no number as val_bpb; give a folder of tools.record that is not retracted yet")
    status = dict(val_bpb=None, val_bpb_retracted=value, status="retracted", retraction_reason=reason or None)
    write_file(path, as_json(contents | status))
    notice = f"**Retracted: {value} bits per byte, the score below, is withdrawn.** {reason}".strip()
    write_file(page, f"> {notice}\n\n{text}".encode())
    return folder


def own_tokenizer(entry: Entry) -> dict[str, bytes]:
    """{file name: contents} of a tokenizer that is not the contest's; else empty."""
    path = places(entry.settings)["TOKENIZER_PATH"]
    if CONTEST_TOKENIZER.fullmatch(path.name):
        return {}
    if not path.is_file():
        warn(f"the folder lacks the tokenizer, because there is no {path}; set TOKENIZER_PATH")
        return {}
    return {path.name: read_bytes(path)}


def write_record(options: argparse.Namespace) -> Path:
    """Write the folder, or with --submission-only one file; returns its path."""
    dated = re.match(r"\d{4}-\d\d-\d\d(?=_)", options.logs[0].name) if options.logs else None
    options.date = options.date or (dated[0] if dated else date.today().isoformat())
    folder = options.out / folder_name(options)
    written = options.submission_only or folder
    notes = read_text(options.notes) if options.notes else ""
    with tempfile.TemporaryDirectory() as scratch:
        entry = gather(options, Path(scratch))
        beside = entry.source.path.with_name("requirements.txt")
        lines = read_text(beside if beside.exists() else ROOT / "requirements.txt")
        packages = "".join(f"{package}\n" for package in re.findall(r"^\w[^\s#]*", lines, re.MULTILINE)).encode()
    comparison = page.compare_with(entry)
    if options.submission_only:
        paths = [Path(os.path.relpath(run.path, written.parent)) for run in entry.runs]
        # a file that is not below the folder is named without its path, so that no local folders are published
        logs = [path.name if ".." in path.parts else path.as_posix() for path in paths]
        contents = page.submission(entry, comparison, logs)
        write_file(written, as_json(contents))
    else:
        files, logs = own_tokenizer(entry), {f"train_seed{run.seed}.log": run.public().encode() for run in entry.runs}
        contents, text = page.submission(entry, comparison, [*logs]), page.readme(entry, comparison, notes, *files)
        files |= {"README.md": text, "train_gpt.py": entry.shipped, "requirements.txt": packages}
        write_folder(folder, files | logs | {"submission.json": as_json(contents)})
    names = ("author", "github_id", "notes")[: 2 if options.submission_only else 3]
    if missing := [f"--{name.replace('_', '-')}" for name in names if not getattr(options, name)]:
        warn(f"not given, so empty in what was written: {', '.join(missing)}")
    for key in ("val_bpb", "val_bpb_std", "bytes_total", "track"):
        print(f"{key}: {contents[key]}")
    for test in comparison.get("significance", ()):
        print("lower by more than {lower_by_more_than}: t {t_statistic:.3f}, p {p_value:.4g}".format(**test))
    return written


def main(argv: list[str]) -> Path:
    """Do what the arguments ask for; returns the path of what was written. Raises Refused."""
    options = parse_options(argv)
    if options.retract and options.logs:
        raise Refused("--retract takes a folder and no logs")
    return retract(options.retract, options.reason) if options.retract else write_record(options)


if __name__ == "__main__":
    run_tool("tools.record", lambda: print(main(sys.argv[1:]), flush=True))
