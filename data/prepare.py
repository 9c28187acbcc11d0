"""Token shards for train_gpt.py, in the contest's format.

    python data/prepare.py demo                               # from text that Python itself carries; needs no network
    python data/prepare.py download sp1024 --train-shards 80  # the contest's published export
    python data/prepare.py tokenize docs.jsonl.zst --tokenizer data/tokenizers/fineweb_1024_bpe.model --name mine_sp1024
    python data/prepare.py tokenize docs.jsonl --vocab-size 1024 --name mine_sp1024 --val-docs 500  # trains one
    python data/prepare.py tokenize docs.jsonl --vocab-size 8192 --name mine_case --case ahead       # see case.py
    python data/prepare.py verify mine_sp1024

A dataset is data/datasets/NAME/fineweb_{train,val}_%06d.bin and manifest.json; each document is BOS, then its pieces.
That of a case tokenizer has fineweb_val_bytes_%06d.bin, too: the bytes of the original text that each token counts.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import sysconfig
import threading
import time
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # where train_gpt.py is, which hub.py and encode.py import, too

import case  # noqa: E402
import hub  # noqa: E402
from encode import (  # noqa: E402
    MAX_PIECES,
    Block,
    Encoded,
    digest,
    encode_block,
    json_blocks,
    layout_of,
    lines_between,
    processor,
    read_blocks,
    sample,
    token_row,
    train_tokenizer,
)
from hub import file_hash  # noqa: E402

import train_gpt  # noqa: E402  (the shard format and the byte rule are the training script's)
from train_gpt import InputError  # noqa: E402

SHARD_TOKENS = 100_000_000
TOKEN_BLOCK = 1 << 22  # tokens that `verify` holds at a time
DECODED_DOCUMENTS = 50_000  # of each split, whose text `verify` decodes: all of the contest's validation split
STRANGE = 0.01  # share of a sidecar's counts that may differ from the decoded text's, white space apart; 0.00005 in English
EXCESS = 0.01  # share of the pieces' bytes by which train_gpt.target_bytes lets a sidecar differ
MAX_WORKERS = 1024
CONTEST_VAL_DOCS = 50_000
# The validation split of each export in the logs of the records: targets in whole rows of 2,048, bytes a target.
CONTEST_VAL = dict(fineweb10B_sp1024=(62_021_632, 2.435930), fineweb10B_sp4096=(45_508_608, 3.319681),
                   fineweb10B_sp8192=(40_540_160, 3.726631),
                   fineweb10B_sp8192_lossless_caps_caseops_v1_reserved=(47_851_520, 3.157152))


# ---------------------------------------- manifest.json and progress.json

def read_json(path: Path) -> dict:
    """A JSON object in a file. Raises ValueError with the reason where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def is_split(entry: Any, *numbers: str) -> bool:
    """Whether `entry` describes a split: whole numbers, and files with a name, a number of tokens and a hash."""
    def is_file(file: Any) -> bool:
        return (isinstance(file, dict) and type(file.get("tokens")) is int
                and isinstance(file.get("name"), str) and isinstance(file.get("sha256"), str))

    return (isinstance(entry, dict) and all(type(entry.get(number)) is int and entry[number] >= 0 for number in numbers)
            and isinstance(entry.get("files"), list) and isinstance(entry.get("sidecar", []), list)
            and all(map(is_file, entry["files"] + entry.get("sidecar", []))))


def check_written(folder: Path, files: list[dict]) -> None:
    """The finished shards of an earlier run are there, each of its size."""
    for file in files:
        if train_gpt.shard_length(folder / file["name"]) != file["tokens"]:
            raise InputError(f"{folder / file['name']} has not the {file['tokens']} tokens that progress.json says; remove "
                             f"{folder} and repeat the command")


# ---------------------------------------- dataset: ids -> shards, by many processes, and again after a kill

class Shards:
    """Writes a split as shards of at most SHARD_TOKENS tokens; files appear under their names when they are whole.

    With a sidecar each shard has a second file of the same shape, with the bytes of each token.
    With each finished shard, progress.json tells how many lines were read before the block that filled it, and how many
    tokens from there on are in the shard: a run that goes on reads on from that line and leaves out those tokens.
    """

    def __init__(self, folder: Path, split: str, progress: dict, sidecar: bool = False):
        self.folder, self.split, self.progress = folder, split, progress
        self.kinds = dict(files=split, sidecar=f"{split}_bytes") if sidecar else dict(files=split)
        start = dict(read=0, documents=0, skip=0, done=False, **{kind: [] for kind in self.kinds})
        self.counts = dict(progress.get(split) or start)
        check_written(folder, [file for kind in self.kinds for file in self.counts[kind]])
        self.skip, self.filled = self.counts["skip"], 0
        self.buffer = np.zeros((len(self.kinds), train_gpt.SHARD_HEADER_BYTES // 2 + SHARD_TOKENS), "<u2")
        self.room = self.buffer[:, train_gpt.SHARD_HEADER_BYTES // 2 :]

    def add(self, tokens: np.ndarray, documents: int, read: int) -> None:
        """Append the tokens (and in a second row their bytes) of `documents` documents: `read` lines of the input."""
        size = tokens.shape[-1]
        at = min(self.skip, size)
        self.skip -= at
        while at < size:
            count = min(size - at, SHARD_TOKENS - self.filled)
            self.room[:, self.filled : self.filled + count] = tokens[..., at : at + count]
            self.filled, at = self.filled + count, at + count
            if self.filled == SHARD_TOKENS:
                self.flush()
                self.save(skip=at)
        self.counts["read"] += read
        self.counts["documents"] += documents

    def flush(self) -> None:
        """Write what has been added since the last flush as one shard."""
        for (kind, name), row in zip(self.kinds.items(), self.buffer):
            row[: train_gpt.SHARD_HEADER_BYTES // 2].view("<i4")[:3] = (
                train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, self.filled)
            blob = memoryview(row[: train_gpt.SHARD_HEADER_BYTES // 2 + self.filled]).cast("B")
            path = self.folder / f"fineweb_{name}_{len(self.counts[kind]):06d}.bin"
            train_gpt.write_file(path, blob)
            file = dict(name=path.name, tokens=self.filled, sha256=hashlib.sha256(blob).hexdigest())
            self.counts[kind] = [*self.counts[kind], file]
        self.filled = 0

    def save(self, **now: Any) -> None:
        self.progress[self.split] = {**self.counts, **now}
        train_gpt.write_file(self.folder / "progress.json", json.dumps(self.progress).encode())

    def finish(self) -> dict:
        """Write the last shard; the split's entry of the manifest."""
        if self.filled:
            self.flush()
        self.save(skip=0, done=True)
        tokens = sum(file["tokens"] for file in self.counts["files"])
        files = {kind: self.counts[kind] for kind in self.kinds}
        return dict(documents=self.counts["documents"], tokens=tokens, **files)


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even when it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_order(pool: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """function(item) of each item in order, at most `ahead` of them at work; pool.map would read all at once."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def encode_split(encoded: Iterator[Encoded], shards: Shards, seen: set[bytes]) -> tuple[int, int]:
    """Add all documents to the shards, but those whose digest is `seen`; (documents, bytes of text) that were read."""
    documents = text_bytes = 0
    with tqdm(desc=shards.split, unit=" documents", disable=not sys.stderr.isatty()) as bar:
        for block in encoded:
            keep = [d not in seen for d in block.digests]
            tokens = block.tokens if all(keep) else block.tokens[..., np.repeat(keep, block.lengths)]
            shards.add(tokens, sum(keep), len(keep))
            documents, text_bytes = documents + len(keep), text_bytes + block.text_bytes
            bar.update(len(keep))
    return documents, text_bytes


def build(folder: Path, model: Path, sources: dict[str, Iterator[Block]], workers: int, progress: dict) -> dict:
    """Encode val, then train without val's documents, into shards, on from `progress`; returns the manifest's entries.

    Prints the rate and the memory of this run. The shards depend on the documents and the tokenizer alone.
    """
    started, documents, text_bytes, splits, seen = time.perf_counter(), 0, 0, {}, set()
    layout = layout_of(model)  # a tokenizer that cannot be used is told before any process starts
    byte_table(model)
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        pool.submit(os.getpid).result()  # processes start here, before the progress bar has a thread
        for split in ("val", "train"):
            sidecar = dict(sidecar=True) if layout and split == "val" else {}
            shards = Shards(folder, split, progress, **sidecar)
            if not shards.counts["done"]:
                blocks = lines_between(sources[split], shards.counts["read"])
                encoded = in_order(pool, functools.partial(encode_block, model, **sidecar), blocks, 4 * workers)
                done = encode_split(encoded, shards, seen)
                documents, text_bytes = documents + done[0], text_bytes + done[1]
            splits[split] = shards.finish()
            if not splits[split]["documents"]:
                raise InputError(f"no document is left for the {split} split; choose another --val-docs")
            if split == "val":
                paths = [folder / file["name"] for file in splits["val"]["files"]]
                warn_of_excess(folder, model)
                seen = {digest(d.tobytes()) for block in document_blocks(paths, 65536) for d in documents_of(block)}
    if dropped := shards.counts["read"] - splits["train"]["documents"]:
        print(f"{dropped} training documents are also in the validation split and were left out", file=sys.stderr)
    seconds = time.perf_counter() - started
    print(f"{documents} documents, {text_bytes / 1e6:.1f} MB of text in {seconds:.1f} s: "
          f"{60 * documents / seconds:.0f} documents/min, {text_bytes / 1e6 / seconds:.2f} MB/s; {memory(workers)}")
    return splits


def byte_table(model: Path) -> train_gpt.ByteTable:
    """The contest's byte rule for a tokenizer. Raises InputError where train_gpt.py refuses it."""
    cfg = train_gpt.Config(tokenizer_path=str(model), vocab_size=processor(model).vocab_size())
    return train_gpt.load_byte_table(cfg)


def memory(workers: int) -> str:
    """The peak resident memory of this process and of the largest of its ended children."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    own, child = (resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return f"peak memory {own:.0f} MiB and at most {child:.0f} MiB in each of {workers} processes"


def shard_blocks(path: Path) -> Iterator[np.ndarray]:
    """The tokens of a shard, TOKEN_BLOCK at a time."""
    size = train_gpt.shard_length(path)
    for at in range(0, size, TOKEN_BLOCK):
        yield train_gpt.read_shard(path, at, min(TOKEN_BLOCK, size - at))


def document_blocks(paths: Iterable[Path], vocab_size: int) -> Iterator[np.ndarray]:
    """The tokens of shards in blocks of whole documents; each begins with BOS."""
    rest = np.empty(0, "<u2")
    for path in paths:
        for block in shard_blocks(path):
            rest = np.concatenate([rest, train_gpt.check_tokens(block, vocab_size, path)])
            if rest[0] != train_gpt.BOS:
                raise InputError(f"{path} does not begin with a document")
            if last := int(np.flatnonzero(rest == train_gpt.BOS)[-1]):
                yield rest[:last]
                rest = rest[last:]
    yield rest


def documents_of(block: np.ndarray) -> list[np.ndarray]:
    return np.split(block, np.flatnonzero(block == train_gpt.BOS)[1:])


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that would write into it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"another process is writing {folder}; wait until it has ended") from None
    finally:
        os.close(handle)


@contextlib.contextmanager
def unfinished(folder: Path, plan: dict | None) -> Iterator[tuple[Path, dict]]:
    """The folder NAME.partial in which a dataset is made, and the progress of an earlier run of the same plan.

    A kill leaves it for the next run; an error removes it, unless it holds a finished training shard.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} already holds {min(folder.iterdir()).name}; remove it or choose another --name")
    partial = folder.with_name(f"{folder.name}.partial")
    with alone_in(partial):
        journal = partial / "progress.json"
        try:
            progress = read_json(journal) if journal.exists() else {}
            if not all(is_split(progress[split], "read", "documents", "skip") for split in ("val", "train") if split in progress):
                raise ValueError("a split of another form")
        except ValueError as error:
            raise InputError(f"{journal} is damaged ({error}); remove {partial} and repeat the command") from None
        if not plan or plan != progress.get("plan"):
            if plan and "val" in progress:
                raise InputError(f"{partial} holds shards of other inputs or options; repeat that command or remove it")
            progress = dict(plan=plan)
            stale = partial.iterdir()
        else:
            stale = partial.glob("*.part")  # of a process that was killed while it wrote
        for path in stale:
            path.unlink()
        try:
            yield partial, progress
        except (InputError, OSError):
            if not progress.get("train", {}).get("files"):
                shutil.rmtree(partial)
            raise


def write_manifest(folder: Path, model: Path, splits: dict, **more: Any) -> None:
    """Write manifest.json, which `verify` compares the files with."""
    layout = dict(case=layout_of(model)) if layout_of(model) else {}
    manifest = dict(tokenizer=model.name, tokenizer_sha256=file_hash(model), **layout, **more, **splits)
    train_gpt.write_file(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def print_result(folder: Path, model: Path, splits: dict, variant: str = "") -> None:
    """What is there now, and the command that trains on it."""
    for split, has in splits.items():
        print(f"{folder}: {split} {has['documents']} documents, {has['tokens']} tokens, {len(has['files'])} shards")
    size = processor(model).vocab_size()
    variant = variant and f"VARIANT={variant} "
    print(f"{variant}DATA_PATH={folder} TOKENIZER_PATH={model} VOCAB_SIZE={size} python train_gpt.py")


def publish(partial: Path, folder: Path, model: Path, splits: dict, variant: str = "") -> None:
    """Write the manifest and give the folder its name; from then on the dataset is there, and whole."""
    write_manifest(partial, model, splits)
    (partial / "progress.json").unlink()
    partial.replace(folder)
    print_result(folder, model, splits, variant)


def write_dataset(folder: Path, model: Path, val: Iterable[str], train: Iterable[str], workers: int, variant: str = "") -> None:
    """A dataset of documents in memory, for a VARIANT of train_gpt.py if named. Drops val's documents from train."""
    with unfinished(folder, None) as (partial, progress):
        splits = build(partial, model, dict(val=json_blocks(val), train=json_blocks(train)), workers, progress)
        publish(partial, folder, model, splits, variant)


# ---------------------------------------- verify

def check_files(cfg: train_gpt.Config, split: str, expected: dict) -> None:
    """The shards of a split, and their sidecars, are those of the manifest, bit for bit."""
    found = dict(files=train_gpt.find_shards(cfg, split), sidecar=sidecars(cfg, split))
    for kind, what in (("files", "shards"), ("sidecar", "sidecars")):
        files = expected.get(kind, [])
        if [p.name for p in found[kind]] != [f["name"] for f in files]:
            raise InputError(f"{cfg.data_path}: the {split} {what} are not those of the manifest")
        for path, file in zip(found[kind], files):
            if train_gpt.shard_length(path) != file["tokens"] or file_hash(path) != file["sha256"]:
                raise InputError(f"{path} is not the file of the manifest")


def sidecars(cfg: train_gpt.Config, split: str) -> list[Path]:
    return sorted(Path(cfg.data_path).glob(f"fineweb_{split}_bytes_*.bin"))


def warn_of_excess(folder: Path, model: Path) -> None:
    """Warn where the sidecars of a folder differ from the bytes of the pieces by more than train_gpt.py accepts."""
    paths = sorted(folder.glob("fineweb_val_bytes_*.bin"))
    if not paths or layout_of(model) is None:
        return
    sizes, cfg = case.piece_bytes(processor(model)), train_gpt.Config(data_path=str(folder))
    counted = sum(int(block.sum(dtype=np.int64)) for path in paths for block in shard_blocks(path))
    shards = train_gpt.find_shards(cfg, "val")
    tokens = sum(np.bincount(block, minlength=len(sizes)) for path in shards for block in shard_blocks(path))
    if abs(counted - (pieces := int(tokens @ sizes))) > EXCESS * pieces:
        print(f"WARNING: {folder}: the sidecar counts {counted} bytes, the pieces have {pieces}: train_gpt.py refuses a "
              f"difference of over {EXCESS:.0%}. It comes from runs of white space, which the tokenizer joins; join them "
              "in the text before `tokenize`", file=sys.stderr)


def read_sidecar(cfg: train_gpt.Config) -> np.ndarray:
    """The bytes of each token of val (N,). Raises InputError where a shard has no sidecar of its size."""
    shards, counts = train_gpt.find_shards(cfg, "val"), []
    for shard in shards:
        path = shard.with_name(shard.name.replace("_val_", "_val_bytes_"))
        if not path.is_file():
            raise InputError(f"{path} is missing: {cfg.tokenizer_path} is a case tokenizer, whose validation split is "
                             "scored by the bytes of the original text")
        counts.append(train_gpt.read_shard(path))
        if (size := train_gpt.shard_length(shard)) != len(counts[-1]):
            raise InputError(f"{path} has {len(counts[-1])} counts, but {shard.name} {size} tokens")
    if len(sidecars(cfg, "val")) > len(shards):
        raise InputError(f"{cfg.data_path}: {len(sidecars(cfg, 'val'))} sidecars, but {len(shards)} validation shards")
    return np.concatenate(counts)


class PlainBytes:
    """The bytes of a split's tokens by the contest's rule."""

    changed, strange = None, 0

    def __init__(self, cfg: train_gpt.Config, split: str):
        self.sp, self.table = processor(Path(cfg.tokenizer_path)), byte_table(Path(cfg.tokenizer_path))

    def count(self, block: np.ndarray, start: int) -> np.ndarray:
        """Bytes of each token of whole documents, the first of which begins at token `start` of the split."""
        ids = torch.from_numpy(block.astype(np.int64))
        return np.append(0, self.table.count(ids[:-1], ids[1:]).numpy())

    def check(self, document: np.ndarray, counts: np.ndarray) -> None:
        """Raises InputError where a document counts other bytes than its text has."""
        size = len(self.sp.decode(document[1:].tolist()).encode())
        if counts.sum() != size:
            raise InputError(f"tokens count {counts.sum()} bytes, their text has {size}")


class CaseBytes:
    """The bytes of a split's tokens in the original text: of val by its sidecar, of train by the pieces.

    `changed` counts are not those of the decoded text: normalization has changed characters, and tokens do not say which.
    `strange` are those of them that are not white space that became one space; in most text they are few.
    """

    def __init__(self, cfg: train_gpt.Config, split: str):
        self.sp = processor(Path(cfg.tokenizer_path))
        self.sizes, self.strange = case.piece_bytes(self.sp), 0
        self.has_space = np.array(["\u2581" in self.sp.id_to_piece(i) for i in range(self.sp.vocab_size())])
        self.sidecar, self.changed = (read_sidecar(cfg), 0) if split == "val" else (None, None)

    def count(self, block: np.ndarray, start: int) -> np.ndarray:
        return self.sizes[block] if self.sidecar is None else self.sidecar[start : start + len(block)].astype(np.int64)

    def check(self, document: np.ndarray, counts: np.ndarray) -> None:
        """Raises InputError where counts cannot be those of the document; a mark and a BOS have none."""
        text = self.sp.decode(document[1:].tolist())
        try:
            expected = np.append(0, case.token_bytes(self.sp, document[1:], case.char_bytes(text)))
        except InputError as error:
            raise InputError(f"split has a document of {error}") from None
        if self.sidecar is None:
            if case.ESCAPE not in text and counts.sum() != expected.sum():
                raise InputError(f"tokens count {counts.sum()} bytes, their text has {expected.sum()}")
            return
        if (wrong := np.flatnonzero((expected == 0) & (counts != 0))).size:
            raise InputError(f"sidecar counts {counts[wrong[0]]} bytes for token {document[wrong[0]]}, which has none")
        self.changed += np.count_nonzero(expected != counts)
        self.strange += np.count_nonzero((expected > counts) | (expected < counts) & ~self.has_space[document])


class Totals(NamedTuple):
    """Invariants of a split; row_targets and row_bytes are those in whole rows of 2,048 targets, as most logs score."""

    documents: int
    tokens: int
    bytes: int
    largest: int
    row_targets: int
    row_bytes: int
    digests: set[bytes]
    changed: int | None
    strange: int

    def __str__(self) -> str:
        changed = "" if self.changed is None else (
            f"; sidecar: {self.changed} counts are not the decoded text's, where normalization changed the original")
        return (f"{self.documents} documents (as many BOS), {self.tokens} tokens, {self.bytes} bytes, "
                f"{self.bytes / max(self.tokens - 1, 1):.6f} bytes/token, largest id {self.largest}; in rows of 2048: "
                f"{self.row_targets} targets, {self.row_bytes} bytes, {self.row_ratio:.6f} bytes/target{changed}")

    @property
    def row_ratio(self) -> float:
        """What val_loss / (ln 2 * val_bpb) of a run's log must be."""
        return self.row_bytes / max(self.row_targets, 1)


def measure(cfg: train_gpt.Config, split: str, only: set[bytes] | None = None) -> Totals:
    """Totals of a split, with the digests that are in `only`.

    Raises InputError on an id out of range, or when the first DECODED_DOCUMENTS count other bytes than their text has.
    """
    rule = (CaseBytes if layout_of(Path(cfg.tokenizer_path)) else PlainBytes)(cfg, split)
    documents = tokens = total = largest = 0
    digests, tail = set(), np.empty(0, np.int64)
    blocks = document_blocks(train_gpt.find_shards(cfg, split), cfg.vocab_size)
    for block in tqdm(blocks, desc=split, disable=not sys.stderr.isatty()):
        split_up, counts = documents_of(block), rule.count(block, tokens)
        starts = np.cumsum([len(d) for d in split_up])[:-1]
        try:
            for document, counted in zip(split_up[: max(DECODED_DOCUMENTS - documents, 0)], np.split(counts, starts)):
                rule.check(document, counted)
        except InputError as error:
            raise InputError(f"{cfg.data_path}: the {split} {error}") from None
        marks = (digest(d.tobytes()) for d in split_up)
        digests.update(m for m in marks if only is None or m in only)
        documents, tokens, largest = documents + len(split_up), tokens + len(block), max(largest, int(block.max()))
        total, tail = total + int(counts.sum()), np.concatenate([tail, counts])[-2048:]
    over = (tokens - 1) % 2048
    row_bytes = total - int(tail[len(tail) - over :].sum())
    return Totals(documents, tokens, total, largest, tokens - 1 - over, row_bytes, digests, rule.changed, rule.strange)


def check_text(cfg: train_gpt.Config, inputs: list[Path]) -> None:
    """The validation split is the beginning of a text: its tokens, and the bytes that they count.

    A sidecar must have the bytes of the text exactly. The byte rule of a plain tokenizer counts normalized text, so its
    total must lie between what normalization can take from the text and add to it.
    """
    model, at, size, low, high = Path(cfg.tokenizer_path), 0, 0, 0, 0
    sidecar = layout_of(model) is not None
    stored = np.concatenate([train_gpt.read_shard(path) for path in train_gpt.find_shards(cfg, "val")])
    stored = np.stack([stored, read_sidecar(cfg)]) if sidecar else stored
    for block in lines_between(read_blocks(inputs), 0, np.count_nonzero(token_row(stored) == train_gpt.BOS)):
        found = encode_block(model, block, sidecar)
        there = stored[..., at : at + found.tokens.shape[-1]]
        if not np.array_equal(there, found.tokens):
            lines = f"lines {block.first} to {block.first + block.lines - 1} of {block.path}"
            raise InputError(f"{cfg.data_path}: the validation split is not what {lines} make: "
                             f"{what_differs(there, found.tokens)}")
        at, size = at + there.shape[-1], size + found.text_bytes
        for char, count in Counter("".join(block.texts())).items():
            least, most = normal_sizes(char)
            low, high = low + count * least, high + count * most
    if at < stored.shape[-1]:
        raise InputError(f"{cfg.data_path}: the validation split has {stored.shape[-1]} tokens, the text {at}")
    counted = int(stored[1].sum()) if sidecar else int(PlainBytes(cfg, "val").count(stored, 0).sum())
    if not sidecar and not low <= counted <= high:
        raise InputError(f"{cfg.data_path}: the tokens count {counted} bytes, but normalization leaves {low} to {high} of "
                         f"the text's {size}: {model} changes the text in another way, and its scores compare with none")
    print(f"val: each token{' and its bytes are' if sidecar else ' is'} what the text makes; it has {size} bytes, of which "
          f"the tokens count {counted}")


@functools.cache
def normal_sizes(char: str) -> tuple[int, int]:
    """(least, most) UTF-8 bytes that NFKC, with or without case folding, can leave of a character.

    Controls, white space and marks can vanish, and Hangul jamo join, so their least is 0.
    """
    forms = [char, *(unicodedata.normalize("NFKC", form) for form in (char, char.casefold()))]
    kept = [c for c in forms[1] if unicodedata.category(c)[0] not in "CMZ" and c not in "\u2581\ufffd"
            and not "\u1100" <= c <= "\u11ff"]
    return min(len("".join(kept).encode()), *(len(form.encode()) for form in forms)), max(len(form.encode()) for form in forms)


def what_differs(there: np.ndarray, found: np.ndarray) -> str:
    """The first difference between tokens (and their bytes) and those of a text."""
    if not np.array_equal(token_row(there), token_row(found)):
        return "it has other tokens"
    first = np.flatnonzero(there[1] != found[1])[0]
    return f"token {found[0][first]} counts {there[1][first]} bytes instead of {found[1][first]}"


def check_contest(name: str, val: Totals) -> None:
    """A folder with the name of a contest's export holds that export's validation split."""
    if name in CONTEST_VAL:
        targets, ratio = CONTEST_VAL[name]
        if val.row_targets != targets or round(val.row_ratio, 6) != ratio:
            raise InputError(f"{name} is a name of the contest's, whose validation split has {targets} targets in rows "
                             f"of 2048 and {ratio:.6f} bytes/target: a score on this one compares with no record")
        print(f"{name}: the validation split has the targets and the bytes of the contest's records")


def check_split(cfg: train_gpt.Config, split: str, expected: dict | None, only: set[bytes] | None, has_text: bool) -> Totals:
    """Compare a split with its entry of the manifest, if it has one, and print its totals.

    Strange counts of a sidecar are an error without a manifest that lists its hash, or else a warning. The text proves all.
    """
    if expected:
        check_files(cfg, split, expected)
    found = measure(cfg, split, only)
    print(f"{split}: {found}")
    if expected and found.documents != expected["documents"]:
        raise InputError(f"{cfg.data_path}: {found.documents} {split} documents instead of {expected['documents']}")
    if found.strange > found.tokens * STRANGE and not has_text:
        why = (f"{cfg.data_path}: {found.strange} of {found.tokens} counts of the sidecar are not those of the decoded text, "
               "more than normalization changes in most text; prove them with --text FILE")
        if not expected:
            raise InputError(why)
        print(f"WARNING: {why}", file=sys.stderr)
    return found


def read_manifest(folder: Path, args: argparse.Namespace) -> tuple[dict, Path]:
    """(manifest, {} with --no-manifest; its tokenizer). Raises InputError when one is missing or they do not match."""
    try:
        manifest = {} if args.no_manifest else read_json(folder / "manifest.json")
        tokenizer = args.tokenizer or args.root / "tokenizers" / str(manifest["tokenizer"])
        if not args.no_manifest and not (isinstance(manifest.get("tokenizer_sha256"), str)
                             and all(is_split(manifest.get(split), "documents") for split in ("val", "train"))):
            raise ValueError("not of the form that prepare.py writes")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{folder} has no readable manifest.json ({why}); for shards of another script add "
                         "--no-manifest --tokenizer MODEL") from None
    except KeyError:
        raise InputError(f"{folder}: name the tokenizer with --tokenizer MODEL") from None
    if not tokenizer.is_file():
        raise InputError(f"no tokenizer at {tokenizer}; name it with --tokenizer")
    if manifest and file_hash(tokenizer) != manifest["tokenizer_sha256"]:
        raise InputError(f"{tokenizer} is not the tokenizer of the manifest")
    return manifest, tokenizer


def verify(args: argparse.Namespace) -> None:
    """Headers, counts, token range, hashes, bytes against the decoded text or --text, no document in both splits."""
    folder = args.root / "datasets" / args.name
    manifest, tokenizer = read_manifest(folder, args)
    size = processor(tokenizer).vocab_size()
    cfg = train_gpt.Config(data_path=str(folder), tokenizer_path=str(tokenizer), vocab_size=size)
    val = check_split(cfg, "val", manifest.get("val"), None, bool(args.text))
    check_contest(args.name, val)
    if args.text:
        check_text(cfg, args.text)
    warn_of_excess(folder, tokenizer)
    if not manifest or manifest["train"]["files"]:
        both = check_split(cfg, "train", manifest.get("train"), val.digests, False).digests
        if both:
            raise InputError(f"{folder}: {len(both)} documents are in both splits")
    print(f"{folder}: {'as the manifest says; ' if manifest else ''}no document in both splits")


# ---------------------------------------- commands

def python_documents() -> list[str]:
    """One document a standard-library module: its docstrings, in the order of the source; and pydoc's language topics.

    Sorted by hash, so that any prefix is a fair sample.
    """
    texts = set()
    warnings.simplefilter("ignore", SyntaxWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # the test suite carries files that are broken on purpose
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        texts.add("\n\n".join(doc for doc in docs if doc))
    from pydoc_data.topics import topics

    texts.update(topics.values())
    return sorted((t for t in texts if len(t) > 200), key=lambda t: hashlib.sha256(t.encode()).digest())


def demo(args: argparse.Namespace) -> None:
    """The data of VARIANT=demo, unless it exists: documents that Python carries, and a tokenizer of 1,024 pieces."""
    folder, model = args.root / "datasets" / "demo_sp1024", args.root / "tokenizers" / "demo_1024_bpe.model"
    if (folder / "manifest.json").is_file() and model.is_file():
        print(f"{folder} is there already")
        return
    if folder.exists():
        raise InputError(f"{folder} is there, but not whole, or {model} is missing; remove it and repeat the command")
    documents = python_documents()
    if args.val_docs >= len(documents):
        raise InputError(f"--val-docs {args.val_docs} leaves nothing to train on: there are {len(documents)} documents")
    train_tokenizer(documents[args.val_docs :], 1024, model)
    write_dataset(folder, model, documents[: args.val_docs], documents[args.val_docs :], args.workers, "demo")


def identity(path: Path) -> list:
    """What tells one state of an input from another."""
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not path.is_file():
        raise InputError(f"{path} is not a regular file (a folder or a pipe); give a file of JSON lines, plain or zstd")
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def tokenize(args: argparse.Namespace) -> None:
    """Shards of JSON lines, with a given tokenizer or one trained on the documents that are not validation."""
    if args.name in ("", ".", "..") or Path(args.name).name != args.name or not args.name.isprintable():
        raise InputError(f"--name {args.name!r} must be the name of a folder in {args.root / 'datasets'}, no path")
    folder, val_docs = args.root / "datasets" / args.name, 0 if args.val else args.val_docs
    if args.tokenizer and not args.tokenizer.is_file():
        raise InputError(f"no tokenizer at {args.tokenizer}; without --tokenizer one is trained")
    if args.tokenizer and args.case and layout_of(args.tokenizer) != args.case:
        kind = f"of --case {layout_of(args.tokenizer)}" if layout_of(args.tokenizer) else "without case marks"
        raise InputError(f"{args.tokenizer} is a tokenizer {kind}; --case {args.case} would need another")
    options = [args.vocab_size, args.tokenizer_docs, args.tokenizer_mb, *filter(None, [args.case])]
    recipe = file_hash(args.tokenizer) if args.tokenizer else options
    plan = dict(inputs=[identity(p) for p in args.inputs], val=val_docs or identity(args.val), tokenizer=recipe)
    with unfinished(folder, plan) as (partial, progress):
        if val_docs:
            check_val_docs(args.inputs, val_docs)
        model = tokenizer = args.tokenizer or own_tokenizer(args, partial, val_docs)
        train_gpt.write_file(partial / "progress.json", json.dumps(progress).encode())  # the tokenizer is made
        train = lines_between(read_blocks(args.inputs), val_docs)
        val = read_blocks([args.val]) if args.val else lines_between(read_blocks(args.inputs), 0, val_docs)
        splits = build(partial, model, dict(val=val, train=train), args.workers, progress)
        if model.parent == partial:
            tokenizer = args.root / "tokenizers" / model.name
            tokenizer.parent.mkdir(parents=True, exist_ok=True)
            train_gpt.write_file(tokenizer, model.read_bytes())
        publish(partial, folder, tokenizer, splits)
        (folder / model.name).unlink(missing_ok=True)  # the trained one, which has its place now


def check_val_docs(inputs: list[Path], val_docs: int) -> None:
    """Say loudly what the validation split is. Raises InputError when nothing would be left to train on."""
    found = sum(block.lines for block in lines_between(read_blocks(inputs), 0, val_docs + 1))
    if found <= val_docs:
        raise InputError(f"the text has {found} documents and the first {val_docs} would be the validation split: give "
                         "a smaller --val-docs, or the validation text as a file of its own (--val)")
    print(f"NOTE: the first {val_docs} documents become the validation split and are not trained on. The contest keeps "
          f"its first {CONTEST_VAL_DOCS}: on its text a smaller number would train on documents that it scores.",
          file=sys.stderr)


def own_tokenizer(args: argparse.Namespace, partial: Path, val_docs: int) -> Path:
    """A tokenizer trained on documents after the validation split, or the one that a killed run has trained."""
    model, final = partial / f"{args.name}.model", args.root / "tokenizers" / f"{args.name}.model"
    if final.exists() and not (model.exists() and file_hash(model) == file_hash(final)):
        raise InputError(f"{final} is there already; use it with --tokenizer or choose another --name")
    if not model.exists():
        blocks = lines_between(read_blocks(args.inputs), val_docs, val_docs + args.tokenizer_docs)
        train_tokenizer(sample(blocks, args.tokenizer_mb), args.vocab_size, model, args.case)
    return model


def download(args: argparse.Namespace) -> None:
    """The contest's published shards: the whole validation split, the first --train-shards shards, the tokenizer."""
    place = hub.Hub(args.repo, args.revision, args.folder, args.endpoint)
    published, dataset = place.json("manifest.json"), f"fineweb10B_{args.variant}"
    paths, tokenizer = hub.choose(place, args, published)
    folder = args.root / "datasets" / dataset
    with alone_in(folder):
        place.fetch(paths, args.workers)
        splits = {split: hub.describe(place, paths, split) for split in ("val", "train")}
        hub.check_published(place, published, dataset, splits)
        source = dict(repository=args.repo, commit=place.commit, folder=args.folder)
        write_manifest(folder, paths[tokenizer], splits, source=source)
        print_result(folder, paths[tokenizer], splits)


def whole_number(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of an option that takes a whole number between two limits."""
    def number(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            found = least - 1
        if not least <= found <= most:
            limits = f"of at least {least}" if most == 2**63 - 1 else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, not {text[:40]!r}")
        return found

    return number


positive, workers = whole_number(1), whole_number(1, MAX_WORKERS)


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"{self.prog}: {message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    cli = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--root", type=Path, default=HERE, help="folder of datasets/ and tokenizers/ (default: data/)")
    commands = cli.add_subparsers(required=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    make = commands.add_parser("demo", help=demo.__doc__)
    make.add_argument("--val-docs", type=positive, default=40, help="validation documents (default: %(default)s)")
    make.add_argument("--workers", type=workers, default=cores, help="processes (default: one a core)")
    make.set_defaults(run=demo)
    get = commands.add_parser("download", help=download.__doc__)
    get.add_argument("variant", help="sp1024, sp4096, sp8192, or what else stands after fineweb10B_ on the hub")
    get.add_argument("--train-shards", type=whole_number(0), default=80, help="the first ones, 200 MB each (default: %(default)s)")
    get.add_argument("--repo", default="willdepueoai/parameter-golf", help="dataset repository (default: %(default)s)")
    get.add_argument("--revision", default="main", help="branch, tag or commit of it (default: %(default)s)")
    get.add_argument("--folder", default="datasets", help="of datasets/ and tokenizers/ there (default: %(default)s)")
    get.add_argument("--endpoint", help="address of the hub (default: HF_ENDPOINT, or huggingface.co)")
    get.add_argument("--workers", type=workers, default=8, help="files at a time (default: %(default)s)")
    get.set_defaults(run=download)
    encode = commands.add_parser("tokenize", help=tokenize.__doc__)
    encode.add_argument("inputs", type=Path, nargs="+", help='JSON lines, {"text": ...}, plain or .zst')
    encode.add_argument("--name", required=True, help="name of the dataset")
    encode.add_argument("--tokenizer", type=Path, help="SentencePiece model; without it one is trained")
    encode.add_argument("--vocab-size", type=whole_number(8, MAX_PIECES), default=1024, help="pieces of a trained tokenizer")
    encode.add_argument("--case", choices=case.LAYOUTS, help="lossless marks for capitals: the contest's v1, or ahead "
                        "of the space; with --tokenizer it is the tokenizer's")
    encode.add_argument("--tokenizer-docs", type=positive, default=100_000, help="documents it is trained on, at most")
    encode.add_argument("--tokenizer-mb", type=positive, default=200, help="megabytes of them, held in memory, at most")
    encode.add_argument("--val", type=Path, help="JSON lines of the validation split")
    encode.add_argument("--val-docs", type=positive, default=CONTEST_VAL_DOCS,
                        help="without --val: how many first documents are validation (default: %(default)s)")
    encode.add_argument("--workers", type=workers, default=cores, help="processes (default: one a core)")
    encode.set_defaults(run=tokenize)
    check = commands.add_parser("verify", help=verify.__doc__)
    check.add_argument("name")
    check.add_argument("--tokenizer", type=Path)
    check.add_argument("--no-manifest", action="store_true", help="of shards that another script has written")
    check.add_argument("--text", type=Path, nargs="+", help="JSON lines that begin with the validation documents: "
                       "compare each token, and its bytes in a sidecar, with what they make")
    check.set_defaults(run=verify)
    return cli


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    args.run(args)


def command_line() -> None:
    """`main`, where a mistake, a killed process and Ctrl-C end in one line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be Unicode
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `prepare.py verify NAME | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit("prepare.py: the output was closed before the end")
    except (InputError, OSError) as error:
        sys.exit(f"prepare.py: {one_line(error)}")
    except BrokenProcessPool:
        sys.exit("prepare.py: a process was killed (out of memory?); the same command goes on with what is finished")
    except MemoryError:
        sys.exit("prepare.py: out of memory; the same command goes on with what is finished")
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped; the same command goes on with what is finished")


def one_line(error: Exception) -> str:
    """An error's message, with control characters escaped, which a file's name can hold."""
    if isinstance(error, OSError) and error.filename is not None:
        error = f"{error.filename}: {error.strerror}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))


if __name__ == "__main__":
    command_line()
