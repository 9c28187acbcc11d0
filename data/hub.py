"""Files of a dataset repository on the Hugging Face hub, and which of them make one of the contest's exports."""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

import train_gpt  # the shard format is the training script's
from train_gpt import InputError

RANGE = 1 << 24  # bytes that one request asks for: each is a redirect, and the hub rations redirects


def file_hash(path: Path, start: bytes = b"", algorithm: str = "sha256") -> str:
    """Hash of `start` and the file's bytes, in hex."""
    value = hashlib.new(algorithm, start)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest()


class Hub:
    """One commit of a dataset repository: `files` lists its folder by relative name, `fetch` brings some of them.

    Reads ranges through huggingface_hub's file system, because hf_hub_download begins a half-finished file anew from
    version 1.18 on. Raises InputError when the library is not there.
    """

    def __init__(self, repo: str, revision: str, folder: str, endpoint: str | None):
        try:
            import huggingface_hub as library
        except ImportError:
            raise InputError("download needs huggingface_hub; pip install 'huggingface_hub>=1.0,<3'") from None
        http = [importlib.import_module(name) for name in ("httpx", "httpx2") if importlib.util.find_spec(name)]
        self.failures = (OSError, ValueError, RecursionError, *(m.TransportError for m in http), *(m.InvalidURL for m in http))
        self.name, self.folder, self.stop = f"{repo}@{revision}", folder.strip("/"), threading.Event()
        with self.told(f"folder {self.folder!r}"):
            api = library.HfApi(endpoint=endpoint)
            self.commit = api.repo_info(repo, repo_type="dataset", revision=revision).sha
            where = dict(repo_id=repo, repo_type="dataset", revision=self.commit)
            listed = list(api.list_repo_tree(path_in_repo=self.folder or None, recursive=True, **where))
            self.source = library.HfFileSystem(endpoint=endpoint, skip_instance_cache=True)
        files = [f for f in listed if isinstance(f, library.hf_api.RepoFile)]
        self.files = {f.path[len(self.folder) :].lstrip("/"): f for f in files}
        self.prefix = f"datasets/{repo}@{self.commit}"

    @contextlib.contextmanager
    def told(self, what: object) -> Iterator[None]:
        """Tell any failure of the hub, of the way to it or of the disk in one line."""
        try:
            yield
        except InputError:
            raise
        except self.failures as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(f"the disk is full at {what}; make room and repeat the command, it goes on") from None
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(f"cannot get {what} from dataset {self.name}: {why}; what has arrived is kept, the same "
                             "command goes on (--repo, --revision, --folder, --endpoint name another place)") from None

    def json(self, name: str) -> dict:
        """The JSON object in a file of the folder; {} if there is no such file."""
        if name not in self.files:
            return {}
        with self.told(name):
            found = json.loads(self.source.cat_file(f"{self.prefix}/{self.files[name].path}"))
            if not isinstance(found, dict):
                raise ValueError("it is not a JSON object")
            return found

    def is_at(self, name: str, path: Path) -> bool:
        """Whether `path` has the size and the hash that the hub lists: sha256 of a large file, git's of a small one."""
        file = self.files[name]
        start, algorithm = (b"", "sha256") if file.lfs else (b"blob %d\0" % file.size, "sha1")
        return path.stat().st_size == file.size and file_hash(path, start, algorithm) == self.listed_hash(name)

    def listed_hash(self, name: str) -> str:
        file = self.files[name]
        return file.lfs.sha256 if file.lfs else file.blob_id

    def part(self, name: str, path: Path) -> Path:
        """Where a file grows until it is whole: another content on the hub has another .part."""
        return path.with_name(f"{path.name}.{self.listed_hash(name)[:12]}.part")

    def fetch(self, paths: dict[str, Path], workers: int) -> None:
        """Bring files, `workers` at a time, each whole or not at all. A failure stops the others after their range."""
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        here = [p for name, path in paths.items() for p in (path, self.part(name, path)) if p.exists()]
        total = sum(self.files[name].size for name in paths)
        missing, free = total - sum(p.stat().st_size for p in here), shutil.disk_usage(path.parent).free
        if missing > free:
            raise InputError(f"{missing / 1e9:.1f} GB are to come, but {path.parent} has {free / 1e9:.1f} GB free")
        with (tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
              ThreadPoolExecutor(workers) as pool):
            jobs = [pool.submit(self.fetch_one, name, path, bar) for name, path in paths.items()]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def fetch_one(self, name: str, path: Path, bar: tqdm) -> None:
        """Bring a file to `path`, or go on with its .part; checks size, hash and the header of a shard."""
        with self.told(path):
            if path.exists():
                if not self.is_at(name, path):
                    raise InputError(f"{path} is not the hub's file of that name (cut, or another's); remove it")
                bar.update(self.files[name].size)
                return
            part = self.part(name, path)
            self.fill(name, part, bar)
            if self.stop.is_set():
                return
            try:
                if not self.is_at(name, part):
                    raise InputError(f"{name} came with another size or hash than the hub lists; repeat the command")
                if path.suffix == ".bin":
                    train_gpt.shard_length(part)
            except InputError:
                part.unlink()
                raise
            part.replace(path)

    def fill(self, name: str, part: Path, bar: tqdm) -> None:
        """Append what a .part lacks, a range at a time, until `stop` is set."""
        size, where = self.files[name].size, f"{self.prefix}/{self.files[name].path}"
        with self.source.open(where, "rb", cache_type="none", size=size) as source, open(part, "ab") as sink:
            source.seek(min(sink.tell(), size))
            bar.update(sink.tell())
            while (asked := min(RANGE, size - sink.tell())) > 0 and not self.stop.is_set():
                block = source.read(asked)
                if len(block) != asked:
                    raise OSError(f"{len(block)} bytes came where {asked} were asked for")
                sink.write(block)
                sink.flush()
                bar.update(asked)


def entries(published: dict, kind: str) -> list[dict]:
    """The objects in a list of the contest's manifest.json; what has another form is left out."""
    found = published.get(kind)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def entry_of(published: dict, dataset: str) -> dict:
    """The dataset's entry in the contest's manifest.json: `tokenizer_name` and `stats`, with counts."""
    return next((entry for entry in entries(published, "datasets") if entry.get("name") == dataset), {})


def tokenizer_of(hub: Hub, variant: str, published: dict) -> str:
    """The tokenizer's name on the hub: the one that the contest's manifest names, else by the contest's rule."""
    name = entry_of(published, f"fineweb10B_{variant}").get("tokenizer_name")
    named = next((t.get("model_path") for t in entries(published, "tokenizers") if name and t.get("name") == name), None)
    number, kind = re.match(r"(?:sp(\d+))?(.*)", variant).groups()
    tokenizer = named or f"tokenizers/fineweb_{number}_bpe{kind}.model"
    if not isinstance(tokenizer, str) or tokenizer not in hub.files:
        raise InputError(f"no {tokenizer} in folder {hub.folder!r} of dataset {hub.name}")
    return tokenizer


def choose(hub: Hub, args: argparse.Namespace, published: dict) -> tuple[dict[str, Path], str]:
    """(path here of each file of the variant that is wanted, by its name on the hub; the tokenizer's name there)."""
    dataset = f"fineweb10B_{args.variant}"
    shard = rf"datasets/{re.escape(dataset)}/fineweb_%s_\d+\.bin"
    val, train, sidecars = (
        sorted(n for n in hub.files if re.fullmatch(shard % kind, n)) for kind in ("val", "train", "val_bytes")
    )
    if not val:
        there = {m[1] for n in hub.files if (m := re.match(r"datasets/fineweb10B_(\w+)/fineweb_val_\d+\.bin", n))}
        there = ", ".join(sorted(there)) or "no export"
        raise InputError(f"no {dataset} in folder {hub.folder!r} of dataset {hub.name}, which has {there}; "
                         "the records took sp4096 and sp8192 from --repo kevclark/parameter-golf")
    if len(train) < args.train_shards:
        raise InputError(f"{dataset} has {len(train)} training shards; --train-shards {len(train)} brings them all")
    tokenizer = tokenizer_of(hub, args.variant, published)
    wanted = [n for i, n in enumerate(val + train) if i < len(val) + args.train_shards or (args.root / n).exists()]
    paths = {n: args.root / n for n in sidecars + wanted}
    return {tokenizer: args.root / "tokenizers" / Path(tokenizer).name, **paths}, tokenizer


def describe(hub: Hub, paths: dict[str, Path], split: str) -> dict:
    """A split's entry of our manifest: documents, tokens, and name, tokens and sha256 of each shard and sidecar."""
    files: dict[str, list[dict]] = dict(files=[], sidecar=[])
    documents = 0
    for name, path in paths.items():
        if f"_{split}_" in path.name:
            shard, large, is_sidecar = train_gpt.read_shard(path), hub.files[name].lfs, "_bytes_" in path.name
            documents += 0 if is_sidecar else int(np.count_nonzero(shard == train_gpt.BOS))
            file = dict(name=path.name, tokens=len(shard), sha256=large.sha256 if large else file_hash(path))
            files["sidecar" if is_sidecar else "files"].append(file)
    kinds = {kind: there for kind, there in files.items() if there or kind == "files"}
    return dict(documents=documents, tokens=sum(f["tokens"] for f in files["files"]), **kinds)


def check_published(hub: Hub, published: dict, dataset: str, splits: dict[str, dict]) -> None:
    """Counts as in the contest's manifest, hashes as in a manifest that prepare.py has written, where there is one."""
    stats, wrong = entry_of(published, dataset).get("stats"), []
    stats = stats if isinstance(stats, dict) else {}
    for split, found in splits.items():
        files = stats.get(f"files_{split}")
        counts = dict(tokens=found["tokens"], docs=found["documents"], files=len(found["files"]))
        if split == "val" or files == len(found["files"]):
            wrong += [f"{kind}_{split} {n} instead of {stats[f'{kind}_{split}']}" for kind, n in counts.items()
                      if stats.get(f"{kind}_{split}", n) != n]
        ours = hub.json(f"datasets/{dataset}/manifest.json").get(split)
        ours = ours if isinstance(ours, dict) else {}
        hashes, there = (
            {str(f.get("name")): f.get("sha256") for kind in ("files", "sidecar") for f in entries(has, kind)} for has in (ours, found)
        )
        wrong += [f"hash of {name}" for name, value in there.items() if hashes.get(name, value) != value]
    if wrong:
        raise InputError(f"{dataset} is not what its manifest.json on the hub says: {', '.join(wrong)}")
