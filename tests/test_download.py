"""`prepare.py download` against a hub of our own on localhost: real HTTP, ranges, broken connections, no network."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import hub
import numpy as np
import pytest
from conftest import ROOT, prepare

import train_gpt as t

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}  # before the library is imported: it asks the net
REPO = "someone/shards"
DATASET = "datasets/datasets/fineweb10B_sp384"


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's interface that a client needs: repository, tree, and files in ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def missing(self, code):
        self.answer(404, b"{}", X_Error_Code=code, X_Error_Message=code)

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append((path, self.headers.get("Range")))
        kind, revision, name = self.parse(path)
        if kind is None:
            return self.missing("RepoNotFound")
        if revision not in hub.commits:
            return self.missing("RevisionNotFound")
        tree = hub.commits[revision]
        if kind == "info":
            return self.answer(200, json.dumps({"id": REPO, "sha": hub.sha[revision], "siblings": []}).encode())
        if kind == "tree":
            files = [self.entry(path, blob) for path, blob in tree.items() if path.startswith(name + "/")]
            return self.answer(200, json.dumps(files).encode()) if files else self.missing("EntryNotFound")
        self.file(name, tree)

    def parse(self, path):
        if match := re.fullmatch(rf"/api/datasets/{REPO}/revision/([^/]+)", path):
            return "info", match[1], ""
        if match := re.fullmatch(rf"/api/datasets/{REPO}/tree/([^/]+)/?(.*)", path):
            return "tree", match[1], match[2]
        if match := re.fullmatch(rf"/datasets/{REPO}/resolve/([^/]+)/(.+)", path):
            return "file", match[1], match[2]
        return None, None, None

    def entry(self, path, blob):
        """A file as the tree lists it; what is not JSON is a large file with its sha256."""
        blob = self.server.promised.get(path, blob)
        listed = {"type": "file", "path": path, "size": len(blob), "oid": hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()}
        if not path.endswith(".json"):
            listed["lfs"] = {"oid": hashlib.sha256(blob).hexdigest(), "size": len(blob), "pointerSize": 130}
        return listed

    def file(self, name, tree):
        hub, blob = self.server, tree[name]
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()) if "Range" in self.headers else (0, len(blob) - 1)
        with hub.lock:
            hub.served += 1
            hang = hub.served > hub.hang_after
        if hang and hub.gone:
            self.close_connection = True
            return
        if hang:
            hub.hanging.set()
            hub.resume.wait(60)
        part = blob[first : last + 1]
        self.answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(blob)}", ETag='"x"', X_Repo_Commit=hub.sha["main"])


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, tree):
        super().__init__(("127.0.0.1", 0), Handler)
        self.sha = {"main": "a" * 40, "a" * 40: "a" * 40}
        self.commits = {revision: tree for revision in self.sha}
        self.tree, self.promised, self.requests = tree, {}, []
        self.lock, self.hanging, self.resume = threading.Lock(), threading.Event(), threading.Event()
        self.served, self.hang_after, self.gone = 0, 1 << 30, False  # from so many ranges on the hub hangs, or hangs up
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def ranges(self):
        """(file name, first byte) of every range that was asked for."""
        return [(path.rsplit("/", 1)[1], int(asked[6:].split("-")[0])) for path, asked in self.requests if asked]


def shard(tokens):
    header = np.zeros(256, "<i4")
    header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, len(tokens)
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


@pytest.fixture
def tree(dataset):
    """An export of one validation and three training shards in the contest's layout, with its manifest."""
    val, train = (t.read_shard(Path(dataset["DATA_PATH"]) / f"fineweb_{split}_000000.bin") for split in ("val", "train"))
    parts = np.split(train, [20_000, 40_000])
    files = {f"{DATASET}/fineweb_val_000000.bin": shard(val), f"{DATASET}/fineweb_val_bytes_000000.bin": shard(np.arange(len(val)) % 7),
             "datasets/tokenizers/fineweb_384_bpe.model": Path(dataset["TOKENIZER_PATH"]).read_bytes()}
    files |= {f"{DATASET}/fineweb_train_{i:06d}.bin": shard(part) for i, part in enumerate(parts)}
    stats = dict(files_val=1, tokens_val=len(val), docs_val=1, files_train=3, tokens_train=len(train), docs_train=int((train == 1).sum()))
    manifest = dict(datasets=[dict(name="fineweb10B_sp384", tokenizer_name="sp_bpe_384", stats=stats)],
                    tokenizers=[dict(name="sp_bpe_384", model_path="tokenizers/fineweb_384_bpe.model")])
    return files | {"datasets/manifest.json": json.dumps(manifest).encode()}


@pytest.fixture
def server(tree):
    server = FakeHub(tree)
    yield server
    server.resume.set()
    server.shutdown()


@pytest.fixture(autouse=True)
def short_ranges(monkeypatch):
    """So short that the small files of these tests take many requests."""
    monkeypatch.setattr(hub, "RANGE", 20_000)


def arguments(server, root, *more):
    return ["--root", str(root), "download", "sp384", "--repo", REPO, "--endpoint", server.endpoint, "--train-shards", "2", *map(str, more)]


def download(server, root, *more):
    prepare.main(arguments(server, root, *more))


def cli(*args, env=None):
    """The command line in a process of its own, with short ranges."""
    code = f"import sys, runpy; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'data')!r}]; import hub; hub.RANGE = 20_000\n"
    code += f"sys.argv = ['prepare.py', *sys.argv[1:]]; runpy.run_path({str(ROOT / 'data' / 'prepare.py')!r}, run_name='__main__')"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=os.environ | (env or {}), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def here(root, but=()):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name not in but}


def wanted(tree, shards=2):
    """The files of `tree` that a download of so many training shards brings, by their path under the root."""
    names = [name for name in tree if not name.endswith("json") and not any(f"train_{i:06d}" in name for i in range(shards, 3))]
    return {name[len("datasets/") :]: tree[name] for name in names}


def test_val_the_first_training_shards_and_the_tokenizer_arrive_bit_for_bit(server, tree, tmp_path, capsys):
    download(server, tmp_path)
    assert here(tmp_path, but=("manifest.json",)) == wanted(tree)
    assert "VOCAB_SIZE=384 python train_gpt.py" in capsys.readouterr().out
    prepare.main(["--root", str(tmp_path), "verify", "fineweb10B_sp384"])
    assert "no document in both splits" in capsys.readouterr().out


def test_more_shards_later_fetch_only_what_is_missing_and_fewer_forget_none(server, tree, tmp_path):
    download(server, tmp_path)
    server.requests.clear()
    download(server, tmp_path, "--train-shards", 3)
    assert {name for name, _ in server.ranges()} == {"fineweb_train_000002.bin"}
    server.requests.clear()
    download(server, tmp_path, "--train-shards", 0)
    assert not server.ranges() and here(tmp_path, but=("manifest.json",)) == wanted(tree, 3)
    manifest = json.loads((tmp_path / "datasets" / "fineweb10B_sp384" / "manifest.json").read_text())
    assert len(manifest["train"]["files"]) == 3


def test_validation_alone(server, tree, tmp_path, capsys):
    download(server, tmp_path, "--train-shards", 0)
    assert here(tmp_path, but=("manifest.json",)) == wanted(tree, 0)
    prepare.main(["--root", str(tmp_path), "verify", "fineweb10B_sp384"])
    assert "val: 1 documents" in capsys.readouterr().out


def test_a_killed_download_goes_on_within_the_file(server, tree, tmp_path):
    server.hang_after = 9
    process = cli(*arguments(server, tmp_path, "--workers", 2))
    assert server.hanging.wait(60)
    time.sleep(0.5)  # the other connection comes to its hang, too
    process.kill()
    process.communicate()
    parts = {path.name.split(".bin")[0].split(".model")[0]: path.stat().st_size for path in tmp_path.rglob("*.part")}
    assert max(parts.values()) >= 20_000 and not list(tmp_path.rglob("manifest.json"))
    server.hang_after = 1 << 30
    server.resume.set()
    server.requests.clear()
    download(server, tmp_path)
    for stem, size in parts.items():
        assert min(first for name, first in server.ranges() if name.startswith(stem)) == size
    assert here(tmp_path, but=("manifest.json",)) == wanted(tree)


def test_the_environment_names_the_hub_and_options_its_place(server, tree, tmp_path):
    moved = {f"old/{name[len('datasets/'):]}": blob for name, blob in tree.items()}
    server.commits["v2"], server.sha["v2"] = moved, "b" * 40
    server.commits["b" * 40], server.sha["b" * 40] = moved, "b" * 40
    args = [a for a in arguments(server, tmp_path, "--revision", "v2", "--folder", "old") if a not in ("--endpoint", server.endpoint)]
    process = cli(*args, env={"HF_ENDPOINT": server.endpoint})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert here(tmp_path, but=("manifest.json",)) == wanted(tree)
    source = json.loads((tmp_path / "datasets" / "fineweb10B_sp384" / "manifest.json").read_text())["source"]
    assert source == dict(repository=REPO, commit="b" * 40, folder="old")


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_without_a_hub_it_says_so_in_one_line(server, tmp_path):
    process = cli(*arguments(server, tmp_path, "--endpoint", closed_port()))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.startswith("prepare.py: cannot get folder 'datasets' from dataset someone/shards@main")
    assert len(err.strip().splitlines()) == 1 and not here(tmp_path)


def test_offline_and_without_the_library_it_says_what_to_do(server, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(t.InputError, match="HF_HUB_OFFLINE"):
        download(server, tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(t.InputError, match="download needs huggingface_hub; pip install"):
        download(server, tmp_path)


@pytest.mark.parametrize("more, words", [
    (["--repo", "someone/else"], "someone/else@main"),
    (["--repo", "not a name"], "not a name"),
    (["--revision", "v9"], "someone/shards@v9"),
    (["--folder", "elsewhere"], "folder 'elsewhere'"),
    (["--train-shards", "4"], "has 3 training shards"),
])
def test_a_place_that_is_not_there_is_named(server, tmp_path, more, words):
    with pytest.raises(t.InputError) as error:
        download(server, tmp_path, *more)
    assert words in str(error.value) and "\n" not in str(error.value) and not here(tmp_path)


def test_a_missing_variant_names_those_that_are_there(server, tmp_path):
    args = [a.replace("sp384", "sp8192") for a in arguments(server, tmp_path)]
    with pytest.raises(t.InputError, match="no fineweb10B_sp8192 .* which has sp384; .*kevclark"):
        prepare.main(args)
    del server.tree["datasets/tokenizers/fineweb_384_bpe.model"]
    with pytest.raises(t.InputError, match="no tokenizers/fineweb_384_bpe.model"):
        download(server, tmp_path)


@pytest.mark.parametrize("change", [lambda blob: blob[:-2], lambda blob: blob[:5000] + b"\0\0" + blob[5002:]], ids=["cut", "changed"])
def test_a_file_that_differs_from_the_hubs_is_neither_taken_nor_overwritten(server, tree, tmp_path, change):
    mine = tmp_path / "datasets" / "fineweb10B_sp384" / "fineweb_train_000001.bin"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(change(tree[f"{DATASET}/fineweb_train_000001.bin"]))
    before = mine.read_bytes()
    with pytest.raises(t.InputError, match="fineweb_train_000001.bin is not the hub's file of that name"):
        download(server, tmp_path)
    assert mine.read_bytes() == before


def test_what_arrives_with_another_hash_is_thrown_away(server, tree, tmp_path):
    name = f"{DATASET}/fineweb_val_000000.bin"
    server.promised[name] = tree[name][:-2] + b"\7\0"
    with pytest.raises(t.InputError, match="another size or hash than the hub lists"):
        download(server, tmp_path)
    assert not list(tmp_path.rglob("fineweb_val_0*"))
    del server.promised[name]
    download(server, tmp_path)
    assert here(tmp_path, but=("manifest.json",)) == wanted(tree)


def test_a_shard_that_is_none_is_refused(server, tree, tmp_path):
    tree[f"{DATASET}/fineweb_train_000000.bin"] = tree[f"{DATASET}/fineweb_train_000000.bin"][:-2]
    with pytest.raises(t.InputError, match="is damaged"):
        download(server, tmp_path)
    assert not list(tmp_path.rglob("fineweb_train_000000*"))


def test_the_manifests_counts_and_hashes_are_checked(server, tree, tmp_path):
    manifest = json.loads(tree["datasets/manifest.json"])
    manifest["datasets"][0]["stats"] |= dict(docs_val=50_000, tokens_train=1)  # of which only the first can be told of two shards
    good, tree["datasets/manifest.json"] = tree["datasets/manifest.json"], json.dumps(manifest).encode()
    with pytest.raises(t.InputError, match="says: docs_val 1 instead of 50000$"):
        download(server, tmp_path)
    tree["datasets/manifest.json"] = good
    ours = dict(val=dict(files=[dict(name="fineweb_val_000000.bin", sha256="0" * 64)]))
    tree[f"{DATASET}/manifest.json"] = json.dumps(ours).encode()
    with pytest.raises(t.InputError, match="says: hash of fineweb_val_000000.bin$"):
        download(server, tmp_path)


@pytest.mark.parametrize("manifest, words", [
    (b"[]", "it is not a JSON object"), (b"3", "it is not a JSON object"), (b"[" * 100_000, "recursion"), (b"\xff", "decode"), (b"", "Expecting value"),
    (b'{"datasets": [{"name": "fineweb10B_sp384", "tokenizer_name": "a"}], "tokenizers": [{"name": "a", "model_path": 3}]}', "no 3 in folder"),
])
def test_a_manifest_of_the_hub_that_is_none_is_told_in_one_line(server, tree, tmp_path, manifest, words):
    tree["datasets/manifest.json"] = manifest
    with pytest.raises(t.InputError, match=words) as caught:
        download(server, tmp_path)
    assert "\n" not in str(caught.value) and not here(tmp_path)


@pytest.mark.parametrize("manifest", [{}, dict(datasets=3, tokenizers=None), dict(datasets=[3, {}], tokenizers=["a"]),
                                      dict(datasets=[dict(name="fineweb10B_sp384", tokenizer_name=[], stats=[1])])])
def test_what_a_manifest_of_the_hub_leaves_open_is_not_checked(server, tree, tmp_path, manifest):
    tree["datasets/manifest.json"] = json.dumps(manifest).encode()
    tree[f"{DATASET}/manifest.json"] = json.dumps(dict(val=3, train=dict(files=[3, {}]))).encode()
    download(server, tmp_path, "--train-shards", 0)
    assert here(tmp_path, but=("manifest.json",)) == wanted(tree, 0)


@pytest.mark.parametrize("endpoint", ["x", "http://[", "http://127.0.0.1:99999", "ftp://127.0.0.1", "http://a\tb"])
def test_an_endpoint_that_is_no_address_is_told_in_one_line(server, tmp_path, endpoint):
    with pytest.raises(t.InputError, match="^cannot get folder 'datasets' from dataset someone/shards@main: ") as caught:
        download(server, tmp_path, "--endpoint", endpoint)
    assert "\n" not in str(caught.value) and not here(tmp_path)


def test_a_full_disk_is_told_and_a_nearly_full_one_before_the_start(server, tree, tmp_path, monkeypatch):
    name = "fineweb_val_000000.bin"
    part = tmp_path / "datasets" / "fineweb10B_sp384" / f"{name}.{hashlib.sha256(tree[f'{DATASET}/{name}']).hexdigest()[:12]}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")  # every write to it fails for want of space
    with pytest.raises(t.InputError, match=f"the disk is full at .*{name}"):
        download(server, tmp_path)
    part.unlink()
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    server.requests.clear()
    with pytest.raises(t.InputError, match="GB are to come, but .* has 0.0 GB free"):
        download(server, tmp_path)
    assert not server.ranges()


def test_a_hub_that_goes_away_leaves_what_has_come(server, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits between its retries
    server.hang_after, server.gone = 5, True
    with pytest.raises(t.InputError, match="what has arrived is kept"):
        download(server, tmp_path, "--workers", 1)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) >= 60_000
    assert not list(tmp_path.rglob("manifest.json"))
