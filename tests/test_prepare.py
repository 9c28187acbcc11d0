import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import zstandard
from conftest import ROOT, prepare, write_json_lines

import train_gpt as t


def cli(*args, check=True):
    done = subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, args)], capture_output=True, text=True, timeout=240)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory, documents, dataset):
    """A dataset made by the command line from zstd-compressed JSON lines, with a given tokenizer."""
    root = tmp_path_factory.mktemp("root")
    write_json_lines(root / "docs.jsonl", documents + documents[:1])
    (root / "docs.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress((root / "docs.jsonl").read_bytes()))
    out = cli("--root", root, "tokenize", root / "docs.jsonl.zst", "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "mine", "--val-docs", 3,
              "--workers", 2)
    return root, out


def test_documents_become_bos_and_pieces_in_order(made, documents, dataset):
    root, out = made
    sp = sentencepiece.SentencePieceProcessor(model_file=dataset["TOKENIZER_PATH"])
    for split, texts in (("val", documents[:3]), ("train", documents[3:])):
        expected = np.concatenate([[1, *sp.encode(text)] for text in texts])
        np.testing.assert_array_equal(t.read_shard(root / "datasets" / "mine" / f"fineweb_{split}_000000.bin"), expected)
    assert "first 3 documents become the validation split" in out.stderr and "1 training documents are also" in out.stderr
    assert "VOCAB_SIZE=384 python train_gpt.py" in out.stdout


def test_workers_and_compression_change_nothing(made, dataset, tmp_path):
    root, _ = made
    cli("--root", tmp_path, "tokenize", root / "docs.jsonl", "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "mine", "--val-docs", 3, "--workers", 1)
    first, second = ({p.name: p.read_bytes() for p in (r / "datasets" / "mine").iterdir()} for r in (root, tmp_path))
    assert first == second


def test_verify_accepts_it_and_tells_the_bytes(made, documents, dataset):
    out = cli("--root", made[0], "verify", "mine", "--tokenizer", dataset["TOKENIZER_PATH"]).stdout
    assert "val: 3 documents" in out and "no document in both splits" in out


@pytest.mark.parametrize("change, words", [
    (lambda f: (f / "fineweb_val_000000.bin").write_bytes((f / "fineweb_val_000000.bin").read_bytes()[:-2]), "cut or empty"),
    (lambda f: flip(f / "fineweb_train_000000.bin"), "not the file of the manifest"),
    (lambda f: (f / "manifest.json").unlink(), "no readable manifest"),
    (lambda f: (f / "fineweb_train_000000.bin").rename(f / "fineweb_train_000001.bin"), "not those of the manifest"),
])
def test_verify_refuses_what_was_changed(made, dataset, tmp_path, change, words):
    folder = tmp_path / "datasets" / "mine"
    folder.mkdir(parents=True)
    for path in (made[0] / "datasets" / "mine").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    done = cli("--root", tmp_path, "verify", "mine", "--tokenizer", dataset["TOKENIZER_PATH"], check=False)
    assert done.returncode == 1 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def flip(path):
    blob = bytearray(path.read_bytes())
    blob[1100] ^= 1
    path.write_bytes(blob)


def test_a_tokenizer_is_trained_with_the_contests_options(made, tmp_path):
    root, _ = made
    cli("--root", tmp_path, "tokenize", root / "docs.jsonl", "--vocab-size", 400, "--name", "own", "--val-docs", 3, "--workers", 1)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizers" / "own.model"))
    assert sp.vocab_size() == 400 and (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()) == (0, 1, 2, 3)
    assert [sp.id_to_piece(4 + i) for i in range(256)] == [f"<0x{i:02X}>" for i in range(256)]
    assert sp.encode("a", out_type=str)[0] != "\u2581a" and len(sp.encode("2024")) >= 4
    assert "as the manifest says" in cli("--root", tmp_path, "verify", "own").stdout


@pytest.mark.parametrize("line, words", [('{"txt": "a"}', "line 2"), ("{", "line 2"), ("3", "line 2")])
def test_a_bad_line_is_named(tmp_path, dataset, line, words):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    done = cli("--root", tmp_path, "tokenize", path, "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "x", "--val-docs", 1, check=False)
    assert done.returncode == 1 and str(path) in done.stderr and words in done.stderr


def test_an_existing_dataset_is_not_overwritten(made, dataset):
    root, _ = made
    done = cli("--root", root, "tokenize", root / "docs.jsonl", "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "mine", check=False)
    assert done.returncode == 1 and "already holds" in done.stderr


def test_long_splits_are_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 10)
    shards = prepare.Shards(tmp_path, "train")
    pieces = [np.arange(7, dtype=np.uint16) + 100 * i for i in range(5)]
    for piece in pieces:
        shards.add(piece)
    summary = shards.summary()
    assert [f["tokens"] for f in summary["files"]] == [10, 10, 10, 5] and summary["documents"] == 5
    read = np.concatenate([t.read_shard(tmp_path / f["name"]) for f in summary["files"]])
    np.testing.assert_array_equal(read, np.concatenate(pieces))


def test_python_carries_enough_text_for_the_demo():
    documents = prepare.python_documents()
    assert sum(map(len, documents)) > 1_000_000 and len(documents) == len(set(documents)) > 300


def test_the_manifest_is_json_with_hashes(made):
    manifest = json.loads((made[0] / "datasets" / "mine" / "manifest.json").read_text())
    assert len(manifest["tokenizer_sha256"]) == len(manifest["train"]["files"][0]["sha256"]) == 64
