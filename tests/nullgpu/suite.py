"""Runs of the script under the null GPU, what they must not do, and the tables of what they used."""

import json
import os
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
MOST_GIB = 70
# ten steps in which the rate falls below every threshold of late QAT, one of warm-up a graph, no clock; the batch of one rank as it is
SHORT = dict(ITERATIONS="10", WARMDOWN_ITERS="14", WARMUP_STEPS="1", MAX_WALLCLOCK_SECONDS="0", GPTQ_CALIBRATION_BATCHES="2", SWA_EVERY="1", ATTENTION="sdpa")
# the smallest model that has every part, adapting to documents
SMALL = dict(SHORT, VARIANT="smoke", DTYPE="bf16", NUM_LAYERS="2", XSA_LAST_N="1", VE_LAYERS="1", MICRO_BATCH_TOKENS="256", ITERATIONS="6",
             WARMDOWN_ITERS="7", VAL_LOSS_EVERY="0", VAL_MAX_TOKENS="500", TTT_SCOPE="document", TTT_CHUNK_TOKENS="16", TTT_LORA_RANK="2",
             TTT_GRAD_CLIP="0", TTT_BATCH_SEQS="4")


def write_shard(path, sizes, vocab_size):
    """Documents of these sizes, random after their first token."""
    tokens = np.random.default_rng(0).integers(260, vocab_size, sum(sizes)).astype("<u2")
    tokens[np.cumsum([0, *sizes[:-1]])] = 1
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def dataset(root, vocab_size, longest=2300):
    """The variables of a dataset in `root`: enough documents that are longer than a window for one full batch of them."""
    folder = root / f"data{vocab_size}"
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "fineweb_train_000000.bin", [500] * 5000, vocab_size)
    write_shard(folder / "fineweb_val_000000.bin", [longest] * 64 + [400] * 66, vocab_size)
    (folder / "tokenizer").write_text("hashed, never read: see drive.py")
    return dict(DATA_PATH=str(folder), TOKENIZER_PATH=str(folder / "tokenizer"), VOCAB_SIZE=str(vocab_size))


class Run:
    """A finished run: its exit status, all that it printed, and what each rank's driver wrote down."""

    def __init__(self, folder, env, processes=1, script=SCRIPT, modules=""):
        folder.mkdir(parents=True, exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        whole = {"OUTPUT_DIR": str(folder), "RUN_ID": "run", "NULLGPU_DEVICES": str(processes), "OMP_NUM_THREADS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
                 "PYTHONPATH": str(HERE / "modules" / modules) if modules else ""}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR") if name in os.environ}
        command = [sys.executable, *launcher, str(HERE / "drive.py"), str(folder / "report"), str(script)]
        done = subprocess.run(command, env=kept | nullgpu.environment(sys.executable) | whole | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, timeout=2400)
        self.status, self.text = done.returncode, done.stdout
        self.reports = [json.loads(path.read_text()) for path in sorted(folder.glob("report.*.json"))]

    def complaints(self):
        """Why it should not have ended so: what failed, and what a steady step or batch did."""
        if self.status:
            return [f"ended with {self.status}:\n{self.text[-6000:]}"]
        return [f"rank {rank}: {text}" for rank, report in enumerate(self.reports) for text in bad_steps(report) + bad_batches(report)]

    def seen(self):
        """How many spans were counted of each phase, at least, over the ranks."""
        counts = [Counter(span["phase"] for span in report["spans"]) for report in self.reports]
        return {phase: min(count[phase] for count in counts) for phase in counts[0]}

    def peaks(self):
        """The most GiB of device memory of any rank, by phase."""
        return {phase: max(report["peaks"].get(phase, 0) for report in self.reports) / 2**30 for phase in self.reports[0]["peaks"] if phase}


def bad_steps(report):
    """What steps of training did besides one wait for the loss of the step before. The last one ends with the run's report."""
    steps = [span for span in report["spans"] if span["phase"] == "training"][:-1]
    most = dict(waits=1, pageable=0, compiles=0)
    return [f"step {i}: {span[kind]} {kind}" for i, span in enumerate(steps) for kind in most if span[kind] > most[kind]]


def bad_batches(report):
    """What batches of an evaluation did: they may compile, and then wait, when the first chunk meets a shape; the last one ends with the score."""
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
    """Write down a row's peaks for `table`, if NULLGPU_TABLE names a folder."""
    if folder := os.environ.get("NULLGPU_TABLE"):
        Path(folder, f"{row}.json").write_text(json.dumps(peaks))


def table(folder):
    """The Markdown table of peaks, in GiB, that the rows left in a folder."""
    columns = dict(training="training", calibration="GPTQ's batches", packing="packing", roundtrip="plain", sliding_window="sliding", legal_ttt="adapting")
    lines = ["| GiB | " + " | ".join(columns.values()) + " |", "|---|" + "---:|" * len(columns)]
    for row in ROWS:
        peaks = json.loads(Path(folder, f"{row}.json").read_text())
        cells = [next((f"{gib:.1f}" for phase, gib in peaks.items() if phase.endswith(end)), "-") for end in columns]
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
