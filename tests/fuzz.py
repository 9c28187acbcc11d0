"""Damaged and forged files against train_gpt.py: each must be refused in one line, or give finite scores.

    python -m tests.fuzz [--artifacts 3000 --forged 1000 --shards 1500 --tokenizers 400] [--seed N] [--only WORD] [--keep FOLDER]

A trial is a run of the script in a forked process, as a user starts it. The Markdown table has one row per kind of file. `refused` and
`accepted` are good ends. Everything else is a fault: a traceback, a crash (a signal), 1 GB of memory above the peak of a valid run, more than
10 s of CPU before a refusal or no end in 120 s (slow), and a wrong answer: a message that is not one printable line, a score or a RESULT line
with NaN or infinity, or a file that was accepted and must not be. `seconds` is the CPU time of the slowest refusal, `GB` the highest peak
above a valid run. stderr has a line for each fault; its file stays in FOLDER; the exit status is 1. `--only` selects trials by a part of
"kind #number name". The script under test is the first train_gpt.py on PYTHONPATH.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Any, NamedTuple

import torch
import torch._dynamo  # the first optimizer imports it, which takes 2 s

import train_gpt as t

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(t.__file__).resolve().parent / "data")]
import encode  # noqa: E402
import prepare  # noqa: E402
from helpers import damaged  # noqa: E402
from helpers.smoke import SMOKE  # noqa: E402

CPU_SECONDS, WALL_SECONDS, MEMORY, MESSAGE = 10, 120, 2**30, 3000
FAULTS = ("traceback", "crash", "memory", "slow", "wrong")
TARGETS = 64  # that each evaluation scores


class Trial(NamedTuple):
    """`make(folder)` writes the files, `env` points at them. `refuse`: they must not be accepted."""

    kind: str
    name: str
    env: dict
    make: partial
    refuse: bool = False


class End(NamedTuple):
    """How a fork ended: wait status, CPU seconds, highest resident bytes less those at its start, output, whether it ran too long."""

    status: int
    seconds: float
    peak: int
    out: str
    err: str
    late: bool


# ----------------------------------------
# Processes


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forked(function, folder: Path, most: float = math.inf) -> End:
    """Call `function` in a fork of this process. It is killed when it has `most` bytes more than at its start, or after WALL_SECONDS."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not (pid := os.fork()):
        code: Any = 70
        try:
            for number in (1, 2):
                os.dup2(os.open(folder / f"std{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            function()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    end, late = time.monotonic() + WALL_SECONDS, False
    before = peak = resident(pid)  # a fork has fewer pages than its parent, and some kernels do not count the peak of one, so look often
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        late, peak = time.monotonic() > end, max(peak, resident(pid))
        if late or peak - before > most:
            os.kill(pid, signal.SIGKILL)
            ended = os.wait4(pid, 0)
            break
        time.sleep(0.005)
    _, status, usage = ended
    out, err = ((folder / f"std{number}").read_text(errors="backslashreplace") for number in (1, 2))
    return End(status, usage.ru_utime + usage.ru_stime, max(peak, usage.ru_maxrss * 1024) - before, out, err, late)


def unsound(out: str, least: int) -> str:
    """What is wrong with the output of a finished run: unprintable lines, no RESULT of strict JSON, NaN, fewer targets than `least`."""

    def refuse(constant):
        raise ValueError(f"RESULT has {constant}")

    lines = out.rstrip("\n").split("\n")
    try:
        facts = json.loads(next(line for line in lines if line.startswith("RESULT ")).removeprefix("RESULT "), parse_constant=refuse)
    except StopIteration:
        return "no RESULT line"
    except ValueError as error:
        return str(error)
    if found := re.search(r"val_(loss|bpb):\s*-?(nan|inf)", out):
        return found[0]
    if facts["targets"] < least:
        return f"scores {facts['targets']} targets"
    return "" if all(map(str.isprintable, lines)) else "its log has control characters"


def verdict(trial: Trial, end: End, most: float) -> tuple:
    """refused, accepted or one of FAULTS, and the reason for the last."""
    last = (end.err.strip() or end.out.strip()).split("\n")[-1]
    if end.peak > most:
        return "memory", last
    if end.late:
        return "slow", f"no end in {WALL_SECONDS} s; {last}"
    if os.WIFSIGNALED(end.status):
        return "crash", signal.Signals(os.WTERMSIG(end.status)).name
    if "Traceback (most recent call last)" in end.err:
        return "traceback", last
    if end.status == 0:
        wrong = unsound(end.out, TARGETS if trial.kind.startswith("artifacts") else 1) or ("accepted" if trial.refuse else "")
        return ("wrong", wrong) if wrong else ("accepted", "")
    message = end.err.removesuffix("\n")
    if not message.startswith("train_gpt.py: ") or not message.isprintable() or len(message) > MESSAGE:
        return "wrong", f"message of {len(message)} characters, {len(message.splitlines())} lines: {last}"
    return ("refused" if end.seconds <= CPU_SECONDS else "slow"), last


# ----------------------------------------
# Trials


class Place:
    """A folder with valid data sets, tokenizers and artifacts, and the folder `trial` that each trial finds empty but for `data`."""

    def __init__(self, root: Path):
        self.root, self.trial, self.peak = root, root / "trial", 0
        documents = [" ".join(topics[name].split()) for name in sorted(topics)][:40]  # no white space that a tokenizer joins, so exact sidecars
        prepare.train_tokenizer(documents, 384, root / "tiny.model")
        encode.train_tokenizer(documents, 400, root / "case.model", "v1")
        short = [f"{number}." for number in range(300)]  # many documents at once are many LoRAs at once
        for name in ("tiny", "case"):
            with contextlib.redirect_stdout(sys.stderr):
                prepare.write_dataset(root / name, root / f"{name}.model", documents[:3] + short, documents[3:], workers=1)
        common = dict(RUN_ID="fuzz", OUTPUT_DIR=str(self.trial), VAL_MAX_TOKENS=str(TARGETS))
        self.data = {name: dict(common, DATA_PATH=str(root / name), TOKENIZER_PATH=str(root / f"{name}.model")) for name in ("tiny", "case")}
        quick = SMOKE | dict(ITERATIONS="1", WARMUP_STEPS="0", EVAL_STRIDE="32")
        self.train = self.data["tiny"] | quick | dict(VOCAB_SIZE="384", TTT_EPOCHS="0")
        lora = dict(TTT_SCOPE="document", TTT_LORA_RANK="4", TTT_CHUNK_TOKENS="16", TTT_GRAD_CLIP="0", TTT_PARAMS="*.c_q.weight,tok_emb.weight")
        lora |= dict(DOCUMENT_ATTENTION="1")
        looped = dict(QUANTIZER="gptq", MEAN_SCALE="0.05", MATRIX_BITS="8", NUM_LOOPS="1", LOOP_START="1", LOOP_END="2", ENABLE_LOOPING_AT="0")
        self.bases = {}
        for name, changes in dict(zstd={}, brotli=lora, rans=looped, case={}).items():
            data, path = self.data["case" if name == "case" else "tiny"], root / f"{name}.ptz"
            run = data | quick | changes | dict(VOCAB_SIZE="400" if name == "case" else "384", COMPRESSOR="zstd" if name == "case" else name)
            self.valid(run | dict(ARTIFACT=str(path)))
            self.bases[name] = damaged.opened(path.read_bytes(), data | dict(EVAL_ONLY="1", ARTIFACT=str(path)))
            self.valid(self.bases[name].env)
            self.valid({option: value for option, value in self.bases[name].env.items() if option != "VAL_MAX_TOKENS"})
        self.valid(self.train)

    def run(self, env: dict, most: float = math.inf) -> End:
        return forked(lambda: t.run([], env), self.root, most)

    def valid(self, env: dict):
        """A run that must pass; the highest peak of these is what `memory` is measured from."""
        shutil.rmtree(self.trial, ignore_errors=True)
        self.trial.mkdir()
        end = self.run(env)
        if end.status or unsound(end.out, TARGETS):
            sys.exit(f"fuzz: a valid run fails, so nothing can be said: {env}\n{end.out}{end.err}")
        self.peak = max(self.peak, end.peak)

    def try_out(self, trial: Trial) -> tuple:
        """(verdict, reason, end) of a trial."""
        shutil.rmtree(self.trial, ignore_errors=True)
        (self.trial / "data").mkdir(parents=True)
        trial.make(self.trial)
        end = self.run(trial.env, self.peak + 1.25 * MEMORY)
        return *verdict(trial, end, self.peak + MEMORY), end


def write_artifact(forge, folder: Path):
    (folder / "x.ptz").write_bytes(forge())


def with_data(source: Path, change, folder: Path):
    """Links to the files of a data set, of which `change` replaces one."""
    for path in source.iterdir():
        (folder / "data" / path.name).symlink_to(path)
    change(folder / "data")


def artifact_trials(place: Place, count: int, seed: int):
    here = dict(ARTIFACT=str(place.trial / "x.ptz"))
    for i in range(count):
        rng, name = Random(f"artifact {seed} {i}"), ("zstd", "brotli", "rans")[i % 3]
        level = rng.choice("file packed packed body body header header tensors tensors tensors values values values".split())
        make = partial(damaged.mutated_artifact, place.bases[name], level, rng)
        yield Trial(f"artifacts, {name}, {level} mutated", "", place.bases[name].env | here, make)


def forged_trials(place: Place, count: int, seed: int):
    """All kinds in turn, until `count` are made."""
    bases, kinds = {name: place.bases[name] for name in ("zstd", "brotli", "rans")}, defaultdict(list)
    env = {name: value for name, value in place.bases["zstd"].env.items() if name != "VAL_MAX_TOKENS"}
    for kind, name, refuse, forge in damaged.forgeries(bases, Random(f"forged {seed}")):
        kinds[kind].append(Trial(f"artifacts, forged: {kind}", name, place.bases["zstd"].env, partial(write_artifact, forge), refuse))
        if kind in ("sizes", "settings, extremes"):  # the environment must not hide what the file says
            kinds[kind][-1] = kinds[kind][-1]._replace(env=env)
    for trials in kinds.values():
        Random(seed).shuffle(trials)
    for trial in [trial for trial in chain(*zip_longest(*kinds.values())) if trial][:count]:
        yield trial._replace(env=trial.env | dict(ARTIFACT=str(place.trial / "x.ptz")))


def data_trials(place: Place, count: int, seed: int):
    """Forged shards and sidecars, then mutated ones."""
    tiny, case, here = place.root / "tiny", place.root / "case", dict(DATA_PATH=str(place.trial / "data"))
    runs = {"train": (tiny, "fineweb_train_000000.bin", place.train), "val": (tiny, "fineweb_val_000000.bin", place.bases["zstd"].env),
            "sidecar": (case, "fineweb_val_bytes_000000.bin", place.bases["case"].env)}
    trials = []
    for kind, (source, name, env) in runs.items():
        tokens = t.read_shard(source / name)
        forged = damaged.forged_shards(name, tokens)
        for what, refuse, change in chain(forged, damaged.forged_sidecars(name, tokens) if kind == "sidecar" else ()):
            trials.append(Trial(f"{kind} files, forged", what, env | here, partial(with_data, source, change), refuse))
    trials.append(Trial("train files, forged", "no folder", place.train | dict(DATA_PATH=str(place.trial / "none")), lambda folder: None, True))
    Random(seed).shuffle(trials)
    yield from trials[:count]
    for i in range(count - len(trials)):
        rng = Random(f"data {seed} {i}")
        kind = rng.choice([*runs])
        source, name, env = runs[kind]
        yield Trial(f"{kind} files, mutated", "", env | here, partial(with_data, source, partial(damaged.mutated_shard, source / name, rng)))


def tokenizer_trials(place: Place, count: int, seed: int):
    """Forged tokenizers, then mutated ones."""
    model, env = place.root / "tiny.model", place.train | dict(TOKENIZER_PATH=str(place.trial / "x.model"))
    forged = [*damaged.forged_tokenizers(model, place.root / "case.model", place.root / "tiny" / "fineweb_val_000000.bin")][:count]
    for name, refuse, change in forged:
        yield Trial("tokenizers, forged", name, env, change, refuse)
    for i in range(count - len(forged)):
        yield Trial("tokenizers, mutated", "", env, partial(damaged.mutated_tokenizer, model, Random(f"tokenizer {seed} {i}")))


def table(rows: dict, peak: int) -> str:
    """The Markdown table of {kind: [(verdict, end)]}."""
    lines = ["| kind | files | refused | accepted | " + " | ".join(FAULTS) + " | seconds | GB |", "|---|" + "---:|" * (len(FAULTS) + 5)]
    for kind, ends in [*sorted(rows.items()), ("all", [pair for pairs in rows.values() for pair in pairs])]:
        counts = [len(ends), *(sum(verdict == column for verdict, _ in ends) for column in ("refused", "accepted", *FAULTS))]
        seconds = max((end.seconds for _, end in ends if end.status), default=0.0)
        above = max((end.peak - peak for _, end in ends), default=0) / 2**30
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} | {seconds:.1f} | {max(above, 0):.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    makers = dict(artifacts=(3000, artifact_trials), forged=(1000, forged_trials), shards=(1500, data_trials), tokenizers=(400, tokenizer_trials))
    for name, (count, _) in makers.items():
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="WORD", help='trials whose "kind #number name" has this in it')
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the files of faults stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = defaultdict(list)
    with tempfile.TemporaryDirectory() as root:
        place = Place(Path(root))
        trials = chain(*(maker(place, vars(args)[name], args.seed) for name, (_, maker) in makers.items()))
        for number, trial in enumerate(trials):
            title = f"{trial.kind} #{number} {trial.name}"
            if args.only not in title:
                continue
            found, reason, end = place.try_out(trial)
            rows[trial.kind].append((found, end))
            if found in FAULTS:
                figures = f"status {os.waitstatus_to_exitcode(end.status)}, {end.seconds:.1f} s, {max(end.peak - place.peak, 0) / 2**30:.2f} GB"
                print(f"{found}: {title}: {figures}: {ascii(reason[:300])}", file=sys.stderr, flush=True)
                if args.keep:  # of special files the name is enough
                    fifos = [path.name for path in place.trial.rglob("*") if path.is_fifo()]
                    shutil.copytree(place.trial, args.keep / str(number), symlinks=True, ignore=lambda _, names, fifos=fifos: {*names} & {*fifos})
    print(table(rows, place.peak))
    sys.exit(any(found in FAULTS for ends in rows.values() for found, _ in ends))


if __name__ == "__main__":
    main()
