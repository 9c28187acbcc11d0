"""Runs of the script under the null GPU, checks of their steps and batches, and the table of their peak memory."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nullgpu
import numpy as np

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent.parent / "train_gpt.py"
ROWS = "frontier", "pr1812", "card", "pr490", "pr150", "pr455", "pr1127"  # the longest first
PASSES = "roundtrip", "sliding_window", "legal_ttt"
# ten steps, in which the rate falls below every threshold of late QAT; one warm-up step per graph; no time limit
SHORT = dict(
    ITERATIONS="10",
    WARMDOWN_ITERS="14",
    WARMUP_STEPS="1",
    MAX_WALLCLOCK_SECONDS="0",
    GPTQ_CALIBRATION_BATCHES="2",
    SWA_EVERY="1",
    ATTENTION="sdpa",
)


def write_shard(path, sizes, vocab_size):
    """Write a shard of documents of these sizes, random after BOS."""
    tokens = np.random.default_rng(0).integers(260, vocab_size, sum(sizes)).astype("<u2")
    tokens[np.cumsum([0, *sizes[:-1]])] = 1
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def dataset(root, vocab_size, longest=2300):
    """Write a dataset in `root` and return its environment. 64 documents, one full batch, are longer than a window."""
    folder = root / f"data{vocab_size}"
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "fineweb_train_000000.bin", [500] * 5000, vocab_size)
    write_shard(folder / "fineweb_val_000000.bin", [longest] * 64 + [400] * 66, vocab_size)
    (folder / "tokenizer").write_text("hashed, never read: see drive.py")
    return dict(DATA_PATH=str(folder), TOKENIZER_PATH=str(folder / "tokenizer"), VOCAB_SIZE=str(vocab_size))


def gib(model):
    """What a card has for tensors: its memory without that of the CUDA context (CONTEXT in models.h)."""
    return nullgpu.MODELS[model] / 1024 - 0.5


class Run:
    """A finished run: its exit status, its output, and the report of each rank's driver. `model` is a key of models.h,
    or one per rank with commas between them.
    """

    def __init__(self, folder, env, processes=1, script=SCRIPT, modules="", model="h100"):
        folder.mkdir(parents=True, exist_ok=True)
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        )
        whole = {
            "OUTPUT_DIR": str(folder),
            "RUN_ID": "run",
            "NULLGPU_DEVICES": str(processes),
            "NULLGPU_MODEL": model,
            "OMP_NUM_THREADS": "1",
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "PYTHONPATH": str(HERE / "modules" / modules) if modules else "",
        }
        kept = {
            name: os.environ[name]
            for name in ("PATH", "HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR")
            if name in os.environ
        }
        command = [sys.executable, *launcher, str(HERE / "drive.py"), str(folder / "report"), str(script)]
        done = subprocess.run(
            command,
            env=kept | nullgpu.environment(sys.executable) | whole | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2400,
        )
        self.status, self.text = done.returncode, done.stdout
        self.reports = [json.loads(path.read_text()) for path in sorted(folder.glob("report.*.json"))]

    def complaints(self):
        """What went wrong: a failure, or waits, pageable copies and compilations of a step or batch."""
        if self.status:
            return [f"ended with {self.status}:\n{self.text[-6000:]}"]
        return [
            f"rank {rank}: {text}"
            for rank, report in enumerate(self.reports)
            for text in bad_steps(report) + bad_batches(report)
        ]

    def halved(self):
        """Values of the options that did not fit into memory: {option: value that is used}."""
        found = re.findall(r"(\w+)=\d+ does not fit into the memory of the GPU; (\d+) is used", self.text)
        return {option: int(value) for option, value in found}

    def seen(self):
        """Number of spans of each phase, the minimum over ranks."""
        counts = [Counter(span["phase"] for span in report["spans"]) for report in self.reports]
        return {phase: min(count[phase] for count in counts) for phase in counts[0]}

    def peaks(self):
        """Peak device memory of each phase in GiB, the maximum over ranks."""
        return {
            phase: max(report["peaks"].get(phase, 0) for report in self.reports) / 2**30
            for phase in self.reports[0]["peaks"]
            if phase
        }


def bad_steps(report):
    """Training steps that do more than wait once, for the previous loss. The last step is left out."""
    steps = [span for span in report["spans"] if span["phase"] == "training"][:-1]
    most = dict(waits=1, pageable=0, compiles=0)
    return [
        f"step {i}: {span[kind]} {kind}" for i, span in enumerate(steps) for kind in most if span[kind] > most[kind]
    ]


def bad_batches(report):
    """Evaluation batches that compile or wait. A new shape in the first chunk may compile, and then wait; the last
    batch may wait for the score.
    """
    bad, seen = [], set()
    for phase in dict.fromkeys(span["phase"] for span in report["spans"] if span["phase"].endswith(PASSES)):
        spans = [span for span in report["spans"] if span["phase"] == phase]
        for i, span in enumerate(spans):
            where = f"{phase} chunk {span['chunk']} batch {i} {span['kind']}"
            if span["compiles"] and (span["chunk"] or span["kind"] in seen):
                bad.append(f"{where}: {span['compiles']} compiles")
            if span["waits"] and not span["compiles"] and i < len(spans) - 1:
                bad.append(f"{where}: {span['waits']} waits")
            seen.add(span["kind"])
    return bad


def keep(row, peaks):
    """Save a variant's peaks for `table`, if NULLGPU_TABLE names a folder."""
    if folder := os.environ.get("NULLGPU_TABLE"):
        Path(folder, f"{row}.json").write_text(json.dumps(peaks))


def table(folder):
    """Markdown table of the peaks in a folder."""
    columns = dict(
        training="training",
        calibration="calibration",
        packing="packing",
        roundtrip="round trip",
        sliding_window="sliding",
        legal_ttt="TTT",
    )
    lines = ["| GiB | " + " | ".join(columns.values()) + " |", "|---|" + "---:|" * len(columns)]
    for row in ROWS:
        peaks = json.loads(Path(folder, f"{row}.json").read_text())
        cells = [next((f"{gib:.1f}" for phase, gib in peaks.items() if phase.endswith(end)), "-") for end in columns]
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
