"""Token shards for train_gpt.py, in the contest's format.

    python data/prepare.py demo                                    # from text that Python itself carries; needs no network
    python data/prepare.py tokenize docs.jsonl.zst --tokenizer data/tokenizers/fineweb_1024_bpe.model --name mine_sp1024
    python data/prepare.py tokenize docs.jsonl --vocab-size 1024 --name mine_sp1024 --val-docs 500   # trains the tokenizer
    python data/prepare.py verify mine_sp1024

A dataset is data/datasets/NAME/fineweb_{train,val}_%06d.bin and manifest.json; each document is BOS, then its pieces.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import io
import json
import multiprocessing
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import zstandard
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import train_gpt  # noqa: E402  (the shard format and the byte rule are the training script's)

SHARD_TOKENS = 100_000_000
CONTEST_TRAINER = dict(
    model_type="bpe", character_coverage=0.999, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
    normalization_rule_name="nmt_nfkc", pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False)


class Shards:
    """Writes a split as shards of at most SHARD_TOKENS tokens; files appear under their names when they are whole."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split = folder, split
        self.parts: list[np.ndarray] = []
        self.files: list[dict] = []
        self.documents = self.waiting = 0

    def add(self, document: np.ndarray) -> None:
        self.documents += 1
        while len(document):
            part, document = np.split(document, [SHARD_TOKENS - self.waiting])
            self.parts.append(part)
            self.waiting += len(part)
            if self.waiting == SHARD_TOKENS:
                self.flush()

    def flush(self) -> None:
        """Write what has been added since the last flush as one shard."""
        if not self.waiting:
            return
        header = np.zeros(256, "<i4")
        header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, self.waiting
        blob = header.tobytes() + np.concatenate(self.parts).astype("<u2").tobytes()
        path = self.folder / f"fineweb_{self.split}_{len(self.files):06d}.bin"
        train_gpt.write_file(path, blob)
        self.files.append(dict(name=path.name, tokens=self.waiting, sha256=hashlib.sha256(blob).hexdigest()))
        self.parts, self.waiting = [], 0

    def summary(self) -> dict:
        self.flush()
        return dict(documents=self.documents, tokens=sum(f["tokens"] for f in self.files), files=self.files)


def json_lines(paths: Iterable[Path]) -> Iterator[str]:
    """The `text` of every line of JSON-lines files, plain or .zst, in order."""
    for path in paths:
        try:
            with open(path, "rb") as file:
                raw = zstandard.ZstdDecompressor().stream_reader(file) if path.suffix == ".zst" else file
                for number, line in enumerate(io.TextIOWrapper(raw, encoding="utf-8"), 1):
                    try:
                        yield json.loads(line)["text"]
                    except (ValueError, KeyError, TypeError):
                        raise train_gpt.InputError(f'{path}, line {number}: not a JSON object with a "text"') from None
        except (OSError, zstandard.ZstdError, UnicodeDecodeError) as error:
            raise train_gpt.InputError(f"cannot read {path}: {error}") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a SentencePiece BPE model with the contest's options and write it to `path`."""
    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, vocab_size=vocab_size,
                                                 minloglevel=2, **CONTEST_TRAINER)
    except RuntimeError as error:
        raise train_gpt.InputError(f"SentencePiece could not train {vocab_size} pieces: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    train_gpt.write_file(path, model.getvalue())


@functools.cache
def processor(model: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer at `model`, loaded once a process."""
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def encode(model: Path, texts: list[str]) -> list[np.ndarray]:
    """Each text as BOS and its pieces, uint16."""
    return [np.array([train_gpt.BOS, *ids], np.uint16) for ids in processor(model).encode(texts)]


def batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, size)):
        yield batch


def write_dataset(folder: Path, model: Path, val: Iterable[str], train: Iterable[str], workers: int) -> dict:
    """Encode both splits in order with `workers` processes; write shards and manifest. Drops val's documents from train."""
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(folder.glob("fineweb_*.bin")):
        raise train_gpt.InputError(f"{folder} already holds {old[0].name}; remove the folder or choose another --name")
    manifest = dict(tokenizer=model.name, tokenizer_sha256=hashlib.sha256(model.read_bytes()).hexdigest())
    seen: set[bytes] = set()
    dropped = 0
    with multiprocessing.Pool(workers) as pool:
        for split, texts in (("val", val), ("train", train)):
            shards = Shards(folder, split)
            encoded = chain.from_iterable(pool.imap(functools.partial(encode, model), batched(texts, 256)))
            for document in tqdm(encoded, desc=split, unit=" documents", disable=not sys.stderr.isatty()):
                digest = hashlib.sha256(document.tobytes()).digest()
                if split == "train" and digest in seen:
                    dropped += 1
                    continue
                if split == "val":
                    seen.add(digest)
                shards.add(document)
            manifest[split] = shards.summary()
            if not shards.documents:
                raise train_gpt.InputError(f"no document is left for the {split} split; choose another --val-docs")
    if dropped:
        print(f"{dropped} training documents are also in the validation split and were left out", file=sys.stderr)
    train_gpt.write_file(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


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
    """The data of VARIANT=demo, unless it is there already."""
    folder, model = args.root / "datasets" / "demo_sp1024", args.root / "tokenizers" / "demo_1024_bpe.model"
    if (folder / "manifest.json").is_file() and model.is_file():
        print(f"{folder} is there already")
        return
    documents = python_documents()
    train_tokenizer(documents[args.val_docs :], 1024, model)
    for stale in folder.glob("fineweb_*.bin"):
        stale.unlink()  # of a run that was interrupted before its manifest
    print_manifest(folder, write_dataset(folder, model, documents[: args.val_docs], documents[args.val_docs :], args.workers))


def tokenize(args: argparse.Namespace) -> None:
    """Shards of JSON lines, with a given tokenizer or one trained on the documents that are not validation."""
    if args.val is None:
        print(f"note: the first {args.val_docs} documents become the validation split and are not trained on; the contest "
              "keeps its first 50000, and a smaller number trains on documents that it scores", file=sys.stderr)
    split = 0 if args.val else args.val_docs
    if args.tokenizer is None:
        args.tokenizer = args.root / "tokenizers" / f"{args.name}.model"
        train_tokenizer(islice(json_lines(args.inputs), split, split + args.tokenizer_docs), args.vocab_size, args.tokenizer)
    elif not args.tokenizer.is_file():
        raise train_gpt.InputError(f"no tokenizer at {args.tokenizer}")
    val = json_lines([args.val]) if args.val else islice(json_lines(args.inputs), split)
    train = islice(json_lines(args.inputs), split, None)
    folder = args.root / "datasets" / args.name
    print_manifest(folder, write_dataset(folder, args.tokenizer, val, train, args.workers))
    size = processor(args.tokenizer).vocab_size()
    print(f"DATA_PATH={folder} TOKENIZER_PATH={args.tokenizer} VOCAB_SIZE={size} python train_gpt.py")


def print_manifest(folder: Path, manifest: dict) -> None:
    for split in ("train", "val"):
        counts = manifest[split]
        print(f"{folder}: {split} {counts['documents']} documents, {counts['tokens']} tokens, {len(counts['files'])} shards")


def verify_split(cfg: train_gpt.Config, split: str, expected: dict) -> set[bytes]:
    """Check one split's shards against the manifest and its byte counts against the decoded text; returns its documents."""
    paths = train_gpt.find_shards(cfg, split)
    if [p.name for p in paths] != [f["name"] for f in expected["files"]]:
        raise train_gpt.InputError(f"{cfg.data_path}: the {split} shards are not those of the manifest")
    for path, file in zip(paths, expected["files"]):
        if len(train_gpt.read_shard(path)) != file["tokens"] or hashlib.sha256(path.read_bytes()).hexdigest() != file["sha256"]:
            raise train_gpt.InputError(f"{path} is not the file of the manifest")
    stream = np.concatenate([train_gpt.check_tokens(train_gpt.read_shard(p), cfg.vocab_size, p) for p in paths])
    if stream[0] != train_gpt.BOS:
        raise train_gpt.InputError(f"{paths[0]} does not begin with a document")
    documents = np.split(stream, np.flatnonzero(stream == train_gpt.BOS)[1:])
    text = processor(Path(cfg.tokenizer_path)).decode
    text_bytes = sum(len(text(d[1:].tolist()).encode()) for d in tqdm(documents, desc=split, disable=not sys.stderr.isatty()))
    table = train_gpt.load_byte_table(cfg, torch.device("cpu"))
    tokens = torch.from_numpy(stream.astype(np.int64))
    counted = int(table.count(tokens[:-1], tokens[1:]).sum())
    if counted != text_bytes:
        raise train_gpt.InputError(f"{cfg.data_path}: the {split} tokens count {counted} bytes, their text has {text_bytes}")
    if len(documents) != expected["documents"]:
        raise train_gpt.InputError(f"{cfg.data_path}: {len(documents)} {split} documents, the manifest has {expected['documents']}")
    print(f"{split}: {len(documents)} documents, {len(stream)} tokens, {text_bytes} bytes, {text_bytes / (len(stream) - 1):.6f} bytes/token")
    return {hashlib.sha256(d.tobytes()).digest() for d in documents}


def verify(args: argparse.Namespace) -> None:
    """Headers, counts, token range, hashes, bytes against the decoded text, and no document in both splits."""
    folder = args.root / "datasets" / args.name
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise train_gpt.InputError(f"{folder} has no readable manifest.json ({error})") from None
    tokenizer = args.tokenizer or args.root / "tokenizers" / manifest["tokenizer"]
    if not tokenizer.is_file():
        raise train_gpt.InputError(f"no tokenizer at {tokenizer}; name it with --tokenizer")
    if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest["tokenizer_sha256"]:
        raise train_gpt.InputError(f"{tokenizer} is not the tokenizer of the manifest")
    size = processor(tokenizer).vocab_size()
    cfg = train_gpt.Config(data_path=str(folder), tokenizer_path=str(tokenizer), vocab_size=size)
    both = verify_split(cfg, "val", manifest["val"]) & verify_split(cfg, "train", manifest["train"])
    if both:
        raise train_gpt.InputError(f"{folder}: {len(both)} documents are in both splits")
    print(f"{folder}: as the manifest says; no document in both splits")


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--root", type=Path, default=HERE, help="folder of datasets/ and tokenizers/ (default: data/)")
    commands = cli.add_subparsers(required=True)
    make = commands.add_parser("demo", help=demo.__doc__)
    make.add_argument("--val-docs", type=int, default=40)
    make.add_argument("--workers", type=int, default=os.cpu_count())
    make.set_defaults(run=demo)
    encode = commands.add_parser("tokenize", help=tokenize.__doc__)
    encode.add_argument("inputs", type=Path, nargs="+", help='JSON lines, {"text": ...}, plain or .zst')
    encode.add_argument("--name", required=True, help="name of the dataset")
    encode.add_argument("--tokenizer", type=Path, help="SentencePiece model; without it one is trained")
    encode.add_argument("--vocab-size", type=int, default=1024, help="pieces of a trained tokenizer")
    encode.add_argument("--tokenizer-docs", type=int, default=100_000, help="documents it is trained on")
    encode.add_argument("--val", type=Path, help="JSON lines of the validation split")
    encode.add_argument("--val-docs", type=int, default=50_000, help="without --val: how many first documents are validation")
    encode.add_argument("--workers", type=int, default=os.cpu_count())
    encode.set_defaults(run=tokenize)
    check = commands.add_parser("verify", help=verify.__doc__)
    check.add_argument("name")
    check.add_argument("--tokenizer", type=Path)
    check.set_defaults(run=verify)
    return cli


def main() -> None:
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    try:
        main()
    except train_gpt.InputError as error:
        sys.exit(f"prepare.py: {error}")
