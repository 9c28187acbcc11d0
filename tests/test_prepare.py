import gzip
import itertools
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import encode
import numpy as np
import pytest
import sentencepiece
import zstandard
from conftest import ROOT, prepare, run, write_json_lines
from helpers import forked
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t


def cli(*args, check=True, before=""):
    """The command line in a process of its own; `before` is a statement that changes it for a test."""
    code = f"import encode, os, prepare; {before}\nprepare.command_line()"
    done = forked.python([*(["-c", code] if before else [ROOT / "data" / "prepare.py"]), *args], os.environ)
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
    (lambda f: (f / "fineweb_val_000000.bin").write_bytes((f / "fineweb_val_000000.bin").read_bytes()[:-2]), "is damaged"),
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


BAD_LINES = [
    (b'{"txt": "a"}', 'has no string "text"'), (b'{"text": 3}', 'has no string "text"'), (b'{"text": null}', 'has no string "text"'),
    (b'{"text": ["a"]}', 'has no string "text"'), (b'{"text": Infinity}', 'has no string "text"'), (b"{", "is not JSON"), (b"a,b", "is not JSON"),
    (b'{"text": "a"} {"text": "b"}', "is not JSON"), (b'{"text": "a\tb"}', "is not JSON"), (b"3", "is not a JSON object"),
    (b'["text"]', "is not a JSON object"), (b'[{"text": "a"}]', "is not a JSON object"), (b'"text"', "is not a JSON object"),
    (b"NaN", "is not a JSON object"), (b"", "is empty"), (b" \r", "is empty"), (b"\xef\xbb\xbf", "is empty"),
    (b'{"text": "\\ud800"}', "has a lone surrogate"), (b'{"text": "\\udc00\\ud800"}', "has a lone surrogate"),
    (b'{"text": "\xed\xa0\x80"}', "is not UTF-8"), (b'{"text": "\xff"}', "is not UTF-8"), (b"[" * 100_000, "is nested too deeply"),
    (b'{"text": ' * 100_000, "is nested too deeply"), (b'{"text": "a", "b": ' + b'{"c": ' * 100_000 + b"1" + b"}" * 100_001, "is nested too deeply"),
]


@pytest.mark.parametrize("line, words", BAD_LINES, ids=[f"{words} {line[:20]}" for line, words in BAD_LINES])
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(t.InputError) as caught:
        [text for block in encode.read_blocks([path]) for text in block.texts()]
    assert str(caught.value).startswith(f"{path}, line 2 {words}") and "must be JSON lines, plain or zstd" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line, text", [
    (b'\xef\xbb\xbf{"text": "a"}', "a"), (b'{"text": "\\ud83d\\ude00"}', "\U0001f600"), (b'{"text": "a", "n": %s}' % (b"9" * 6000), "a"),
    (b'{"n": -Infinity, "text": "a", "m": 1e999}', "a"), (b'{"text": "b", "text": "a"}\r', "a"), (b' {"text": ""} ', ""),
    (b'{"text": "\\u0000\xc2\x85"}', "\0\x85"),
])
def test_an_unusual_line_is_read(tmp_path, line, text):
    path = tmp_path / "x.jsonl"
    path.write_bytes(line + b"\n" + line)
    assert [text for block in encode.read_blocks([path]) for text in block.texts()] == [text, text]


BEGINS = "line 1 does not begin with a JSON object; the input must be JSON lines, plain or zstd"
ZSTD = zstandard.ZstdCompressor().compress(b'{"text": "a"}\n{"text": "b"}\n')


@pytest.mark.parametrize("name, blob, words", [
    ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0), BEGINS), ("x.txt", b"a sentence\nand another\n", BEGINS),
    ("x.json", b'[\n{"text": "a"},', BEGINS),
    ("x.jsonl", bytes(range(256)) * 40, BEGINS), ("x.jsonl", '{"text": "a"}\n'.encode("utf-16"), BEGINS), ("x.jsonl.zst", b"PK\3\4", "not zstd"),
    ("x.jsonl.zst", b'{"text": "a"}\n', "cannot read .*x.jsonl.zst: not zstd, or damaged"), ("x.jsonl.zst", ZSTD[:-2], "it is cut"),
    ("x.jsonl.zst", ZSTD[:4] + b"\xff" * 9 + ZSTD[13:], "x.jsonl.zst: not zstd, or damaged"), ("x.jsonl", b"", "the text has 0 documents"),
    ("x.jsonl.zst", b"", "the text has 0 documents"), ("folder", None, "folder is not a regular file"), ("pipe", None, "pipe is not a regular file"),
    ("none.jsonl", None, "cannot read .*none.jsonl: No such file"), ("link", None, "cannot read .*link: No such file"),
])
def test_a_file_of_another_kind_is_told_in_one_line(tmp_path, dataset, name, blob, words):
    path, root = tmp_path / name, tmp_path / "root"
    if blob is not None:
        path.write_bytes(blob)
    elif name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "link":
        path.symlink_to("nowhere")
    with pytest.raises(t.InputError, match=words) as caught:
        tokenize(root, path, "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "x", "--val-docs", 1, "--workers", 1)
    assert "\n" not in str(caught.value) and not [p for p in root.rglob("*") if p.is_file()]


def test_paths_need_not_be_unicode(made, dataset, tmp_path):
    """A root and an input whose names have a byte that is no UTF-8; output escapes it."""
    root, docs = (tmp_path / f"\udc80{name}" for name in ("root", "docs.jsonl.zst"))
    docs.write_bytes((made[0] / "docs.jsonl.zst").read_bytes())
    done = cli("--root", root, "tokenize", docs, "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "mine", "--val-docs", 3, "--workers", 1)
    assert "\\udc80root/datasets/mine: val 3 documents" in done.stdout
    assert files_of(root)["fineweb_val_000000.bin"] == files_of(made[0])["fineweb_val_000000.bin"]


def test_zstd_is_known_by_its_first_bytes(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(ZSTD)
    assert [text for block in encode.read_blocks([tmp_path / "x.jsonl"]) for text in block.texts()] == ["a", "b"]


def test_a_small_file_that_unpacks_to_an_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "LONGEST_LINE", 1 << 20)
    (tmp_path / "x.zst").write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "a"}\n{"text": "' + b"x" * (1 << 22)))
    with pytest.raises(t.InputError, match="x.zst, line 2 has more than 1,048,576 bytes; split the document"):
        list(encode.read_blocks([tmp_path / "x.zst"]))


@pytest.mark.parametrize("arguments, words", [
    ("tokenize x --name n --workers 0", "argument --workers: must be a whole number from 1 to 1024, not '0'"),
    ("tokenize x --name n --workers 99999999999", "from 1 to 1024"),
    ("tokenize x --name n --val-docs -1", "--val-docs: must be a whole number of at least 1, not '-1'"),
    ("tokenize x --name n --vocab-size 65537", "--vocab-size: must be a whole number from 8 to 65536"), ("tokenize x --name n --vocab-size 1e9", "not '1e9'"),
    (f"tokenize x --name n --tokenizer-mb {'9' * 5000}", "--tokenizer-mb: must be a whole number"),
    ("download sp1024 --train-shards -3", "--train-shards: must be"),
    ("tokenize --name n", "required: inputs"), ("verify", "required: name"), ("nothing", "invalid choice: 'nothing'"), ("", "required"),
    ("demo --val-docs x", "not 'x'"),
])
def test_a_wrong_command_line_is_one_line(arguments, words):
    with pytest.raises(SystemExit) as caught:
        prepare.main(arguments.split())
    told = caught.value.code
    assert isinstance(told, str) and words in told and told.endswith("--help") and "\n" not in told and len(told) < 400


def test_a_name_with_control_characters_is_printed_escaped(tmp_path):
    done = cli("--root", tmp_path, "tokenize", tmp_path / "a\n\x1b[31mb", "--name", "x", check=False)
    assert done.returncode == 1 and done.stderr == f"prepare.py: cannot read {tmp_path}/a\\n\\x1b[31mb: No such file or directory\n"


@pytest.mark.parametrize("error, words", [(PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"), (MemoryError(), "out of memory"),
                                          (OSError(28, "No space left on device"), "No space left on device")])
def test_an_error_of_the_machine_is_one_line(monkeypatch, error, words):
    def fail():
        raise error

    monkeypatch.setattr(prepare, "main", fail)
    with pytest.raises(SystemExit, match=words) as caught:
        prepare.command_line()
    assert caught.value.code.startswith("prepare.py: ") and "\n" not in caught.value.code


@pytest.mark.parametrize("kind", ["folder", "link"])
@pytest.mark.parametrize("name", ["fineweb_val_000000.bin", "fineweb_train_000007.bin"])
@pytest.mark.parametrize("options", [[], ["--no-manifest"]])
def test_verify_names_what_is_no_file_but_has_the_name_of_a_shard(made, dataset, tmp_path, monkeypatch, kind, name, options):
    folder = copied(made[0], tmp_path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir() if kind == "folder" else (folder / name).symlink_to("nowhere")
    monkeypatch.setattr("sys.argv", ["prepare.py", "--root", str(tmp_path), "verify", "mine", "--tokenizer", dataset["TOKENIZER_PATH"], *options])
    with pytest.raises(SystemExit) as caught:
        prepare.command_line()
    told = caught.value.code
    assert told.startswith("prepare.py: ") and "\n" not in told and (name in told or "train shards are not those of the manifest" in told)


def copied(root, to):
    folder = to / "datasets" / "mine"
    folder.mkdir(parents=True)
    for name, blob in files_of(root).items():
        (folder / name).write_bytes(blob)
    return folder


@pytest.mark.parametrize("change, words", [
    *[(change, "not of the form") for change in (
        lambda m: {}, lambda m: m | dict(val=None), lambda m: m | dict(train=[]), lambda m: m | dict(val=m["val"] | dict(files=3)),
        lambda m: m | dict(val=m["val"] | dict(files=[3])), lambda m: m | dict(val=m["val"] | dict(documents="3")), lambda m: m | dict(tokenizer_sha256=[]),
        lambda m: m | dict(val=m["val"] | dict(files=[dict(name="a", tokens=1)])), lambda m: {k: v for k, v in m.items() if k != "train"})],
    (lambda m: [], "not a JSON object"), (lambda m: 3, "not a JSON object"), ("[" * 100_000, "nested too deeply"), ("", "Expecting value"),
    (b"\xff\xfe", "decode"),
])
def test_a_damaged_manifest_is_told_in_one_line(made, dataset, tmp_path, change, words):
    path = copied(made[0], tmp_path) / "manifest.json"
    blob = json.dumps(change(json.loads(path.read_text()))) if callable(change) else change
    path.write_bytes(blob if isinstance(blob, bytes) else blob.encode())
    with pytest.raises(t.InputError, match=f"has no readable manifest.json .*{words}") as caught:
        prepare.main(["--root", str(tmp_path), "verify", "mine", "--tokenizer", dataset["TOKENIZER_PATH"]])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("progress, words", [
    ("[]", "progress.json is damaged"), ("", "progress.json is damaged"), ("[" * 100_000, "progress.json is damaged .nested too deeply"),
    (dict(val=3), "progress.json is damaged"), (dict(val=dict(read=0)), "progress.json is damaged"),
    (dict(val=dict(read=-1, documents=0, skip=0, done=False, files=[])), "progress.json is damaged"),
    (dict(val=dict(read=3, documents=3, skip=0, done=True, files=[dict(name="fineweb_val_000000.bin", tokens=5, sha256="")])),
     "fineweb_val_000000.bin is not a file"),
])
def test_a_damaged_journal_is_told_and_nothing_is_published(made, dataset, tmp_path, progress, words):
    partial, docs = tmp_path / "datasets" / "mine.partial", made[0] / "docs.jsonl"
    partial.mkdir(parents=True)
    plan = dict(inputs=[prepare.identity(docs)], val=3, tokenizer=prepare.file_hash(Path(dataset["TOKENIZER_PATH"])))
    (partial / "progress.json").write_text(progress if isinstance(progress, str) else json.dumps(dict(plan=plan) | progress))
    with pytest.raises(t.InputError, match=words):
        tokenize(tmp_path, docs, "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "mine", "--val-docs", 3, "--workers", 1)
    assert not (tmp_path / "datasets" / "mine").exists()


def test_a_damaged_tokenizer_is_refused_in_one_line(dataset, tmp_path):
    """Each loads and encodes, or is refused with its name; none ends the process, which a forked one shows."""
    good, path, refused = Path(dataset["TOKENIZER_PATH"]).read_bytes(), tmp_path / "bad.model", 0
    name = good.index(b"<0x41>")
    blobs = [b"", good[:1000], good[:-1], good[:name] + b"<0xZZ>" + good[name + 6 :], good[: name + 1] + b"\xff" + good[name + 2 :]]
    blobs += [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in range(0, len(good), len(good) // 40)]
    for blob in blobs:
        path.write_bytes(blob)
        encode.processor.cache_clear()
        try:
            encode.processor(path).decode(encode.processor(path).encode("some text"))
        except t.InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert 5 <= refused < len(blobs)
    with pytest.raises(t.InputError, match="cannot read the tokenizer .*: Is a directory"):
        encode.processor(tmp_path)


def test_an_existing_dataset_is_not_overwritten(made, dataset):
    root, _ = made
    done = cli("--root", root, "tokenize", root / "docs.jsonl", "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "mine", check=False)
    assert done.returncode == 1 and "already holds" in done.stderr


@pytest.mark.parametrize("name", ["", ".", "..", "../b", "a/b", "/tmp/b", "a\nb", "\x1b[31m", "\udc80"])
def test_a_name_is_no_path(dataset, tmp_path, name):
    write_json_lines(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(t.InputError, match="must be the name of a folder in .*datasets, no path"):
        prepare.main(["--root", str(tmp_path / "root"), "tokenize", str(tmp_path / "a.jsonl"), "--name", name, "--val-docs", "1",
                      "--tokenizer", dataset["TOKENIZER_PATH"]])
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.slow
def test_python_carries_enough_text_for_the_demo():
    documents = prepare.python_documents()
    assert sum(map(len, documents)) > 1_000_000 and len(documents) == len(set(documents)) > 300


def test_the_manifest_is_json_with_hashes(made):
    manifest = json.loads((made[0] / "datasets" / "mine" / "manifest.json").read_text())
    assert len(manifest["tokenizer_sha256"]) == len(manifest["train"]["files"][0]["sha256"]) == 64


def tokenize(root, *args):
    prepare.main(["--root", str(root), "tokenize", *map(str, args)])


def files_of(root, name="mine"):
    return {p.name: p.read_bytes() for p in (root / "datasets" / name).iterdir()}


# Long documents, by parts

ODD = "ab1.,)\"_ \n\t\r\u00a0\u3000\u200b\u200d\u2581\u0301\u00e9\u00b4\u5b57\u3002\ufdfa\u037a\uff8a\uff9f\x00\x01\ud7a3\u1161\U0001f600"


def by_parts(model, text, size):
    """The tokens of a text that is cut at every place after so many characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "PART", size)
        return encode.encode_long(model, text).tolist()


@pytest.fixture(scope="module")
def models(dataset, documents, tmp_path_factory):
    """Tokenizers that cut: the contest's options, then other ones; and those that may not."""
    def train(name, **changed):
        path = tmp_path_factory.mktemp("models") / f"{name}.model"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encode, "CONTEST_TRAINER", encode.CONTEST_TRAINER | changed)
            encode.train_tokenizer(documents, 400, path)
        return path

    cut = [Path(dataset["TOKENIZER_PATH"]), train("prefix", add_dummy_prefix=True, remove_extra_whitespaces=False),
           train("symbols", user_defined_symbols=["<x>", "\ue001"], normalization_rule_name="identity")]
    rules = tmp_path_factory.mktemp("rules") / "rules.tsv"
    rules.write_text("61 20 62\t63\n")  # a, space, b -> c
    whole = [train("unigram", model_type="unigram"), train("rules", normalization_rule_tsv=str(rules)),
             train("spaces", split_by_whitespace=False, user_defined_symbols=["if it"]), train("suffix", treat_whitespace_as_suffix=True)]
    return cut, whole


def test_only_tokenizers_whose_pieces_end_at_a_space_are_cut(models):
    cut, whole = models
    assert all(map(encode.can_cut, cut)) and not any(map(encode.can_cut, whole))
    sp = encode.processor(whole[1])
    assert sp.encode("a b") != sp.encode("a") + sp.encode(" b")  # what a cut would have changed


@given(text=st.text(ODD, max_size=40), words=st.lists(st.sampled_from(["the", " of", ", ", "a 1", "1990\n", ODD]), max_size=12), size=st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_the_parts_of_a_text_have_the_tokens_of_the_whole(models, text, words, size):
    text += " ".join(words) + text
    for model in models[0] + models[1]:
        assert by_parts(model, text, size) == [1, *encode.processor(model).encode(text)], model


def test_every_character_before_and_after_a_cut(models):
    """The whole of the basic plane, and some beyond it: no rule of normalization joins what a cut parts."""
    for model in models[0]:
        sp = encode.processor(model)
        for start in [*range(0, 0xD800, 64), *range(0xE000, 0x10000, 64), *range(0x1D400, 0x1D800, 64), *range(0x1F600, 0x1F680, 64)]:
            text = "".join(f"x{chr(c)} {chr(c)}y\n{chr(c)}" for c in range(start, start + 64))
            assert by_parts(model, text, 1) == [1, *sp.encode(text)], hex(start)


def test_long_and_short_documents_of_a_block_come_out_as_they_stand(models, documents, monkeypatch):
    monkeypatch.setattr(encode, "PART", 500)
    model, sp, texts = models[0][0], encode.processor(models[0][0]), ["short", "\n".join(documents[:3]), "", "x" * 499, "x y " * 1000]
    found = encode.encode_block(model, encode.Block(Path("a"), 7, 5, "".join(json.dumps({"text": x}) + "\n" for x in texts).encode()))
    assert found.tokens.tolist() == [i for text in texts for i in (1, *sp.encode(text))] and found.lengths == [1 + len(sp.encode(x)) for x in texts]
    assert found.text_bytes == sum(len(text.encode()) for text in texts)


def test_sentencepiece_never_sees_more_than_a_part(models, monkeypatch):
    """A document of 200 parts, whose longest stretch without a space is 13 characters."""
    monkeypatch.setattr(encode, "PART", 100)
    model, seen, sp = models[0][0], [], encode.processor(models[0][0])
    monkeypatch.setattr(encode, "processor", lambda _: type("Seen", (), dict(encode=lambda _, x: seen.append(len(x)) or sp.encode(x)))())
    text = "a word of it, antidisestabl " * 700
    assert encode.encode_long(model, text).tolist() == [1, *sp.encode(text)]
    assert max(seen) <= 100 + 1 + 13 and sum(seen) < 1.05 * len(text)


def test_a_document_without_a_place_to_cut_is_named_with_its_size(models, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PART", 10)
    monkeypatch.setattr(encode, "LONGEST_PART", 50)
    write_json_lines(tmp_path / "a.jsonl", ["short", "two parts " * 20, "\u5b57" * 51])
    (block,) = encode.read_blocks([tmp_path / "a.jsonl"])
    with pytest.raises(t.InputError, match="a.jsonl, line 3: a document of 153 bytes has 51 characters that no space or line end parts, of at most 50; split"):
        encode.encode_block(models[0][0], block)
    with pytest.raises(t.InputError, match="line 2: a document of 200 bytes has 200 characters that this tokenizer can only take as a whole, of at most 50"):
        encode.encode_block(models[1][0], block)


# Blocks of lines


@given(files=st.lists(st.lists(st.text("ab\u00e9\u2028\r", max_size=8), max_size=12), min_size=1, max_size=3), size=st.integers(1, 60),
       start=st.integers(0, 20), count=st.integers(0, 20), kind=st.sampled_from(["plain", "zstd", "frames"]), last=st.booleans())
@settings(max_examples=60, deadline=None)
def test_blocks_hold_the_lines_of_the_files_whatever_their_size(tmp_path_factory, files, size, start, count, kind, last):
    folder = tmp_path_factory.mktemp("blocks")
    compress = zstandard.ZstdCompressor().compress
    paths = []
    for i, texts in enumerate(files):
        lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts]
        if lines and last:
            lines[-1] = lines[-1][:-1]  # no line end at the end of the file
        frames = lines if kind == "frames" else [b"".join(lines)]
        paths.append(folder / (f"{i}.jsonl" if kind == "plain" else f"{i}.jsonl.zst"))
        paths[-1].write_bytes(b"".join(frames if kind == "plain" else map(compress, frames)))
    expected = [(p, n, text) for p, texts in zip(paths, files) for n, text in enumerate(texts, 1)][start : start + count]
    old, encode.TEXT_BLOCK = encode.TEXT_BLOCK, size
    try:
        blocks = list(encode.lines_between(encode.read_blocks(paths), start, start + count))
    finally:
        encode.TEXT_BLOCK = old
    assert [(b.path, b.first + i, text) for b in blocks for i, text in enumerate(b.texts())] == expected
    assert all(b.lines == b.data.count(b"\n") for b in blocks)


def test_a_cut_zstd_file_is_an_error_even_at_the_end_of_a_line(tmp_path):
    whole = zstandard.ZstdCompressor().compressobj()
    blob = whole.compress(b'{"text": "a"}\n') + whole.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)  # a frame without its end
    (tmp_path / "cut.jsonl.zst").write_bytes(blob)
    with pytest.raises(t.InputError, match="cut.jsonl.zst: it is cut"):
        list(encode.read_blocks([tmp_path / "cut.jsonl.zst"]))


def test_a_bad_line_leaves_no_file(tmp_path, dataset):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n{"text": "better"}\n["text"]\n')
    done = cli("--root", tmp_path, "tokenize", path, "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "mine", "--val-docs", 1, "--workers", 1, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"prepare.py: {path}, line 3 is not a JSON object; the input must be")
    assert len(done.stderr.splitlines()) == 2 and not list((tmp_path / "datasets").iterdir())  # the first line is the note on the validation split


def test_work_is_done_in_order_and_not_far_ahead():
    taken = []
    endless = (taken.append(i) or i for i in itertools.count())
    with ThreadPoolExecutor(3) as pool:
        ordered = prepare.in_order(pool, lambda i: time.sleep(0.01 * (i % 3)) or i, endless, 5)
        assert list(itertools.islice(ordered, 20)) == list(range(20)) and len(taken) <= 25


# Shards, and going on after a kill


class Killed(BaseException):
    pass


DOCUMENTS = st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=25)


@given(documents=DOCUMENTS, size=st.integers(3, 30), parts=st.lists(st.integers(1, 6), min_size=1), others=st.lists(st.integers(1, 6), min_size=1),
       kills=st.lists(st.integers(1, 3), max_size=3), sidecar=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_split_that_is_killed_and_goes_on_has_the_same_shards(tmp_path_factory, documents, size, parts, others, kills, sidecar):
    """Documents of random lengths, some left out, in blocks that are cut otherwise after each kill."""
    folder, old, prepare.SHARD_TOKENS = tmp_path_factory.mktemp("shards"), prepare.SHARD_TOKENS, size
    tokens = [np.arange(n, dtype="<u2") + 100 * i for i, (n, _) in enumerate(documents)]
    kept = np.concatenate([x for x, (_, keep) in zip(tokens, documents) if keep] or [np.empty(0, "<u2")])

    def attempt(parts, patience):
        journal = folder / "progress.json"
        shards = prepare.Shards(folder, "train", json.loads(journal.read_text()) if journal.exists() else {}, sidecar)
        save, saves = shards.save, itertools.count(1)
        shards.save = lambda **now: save(**now) if next(saves) < patience else kill()
        at = shards.counts["read"]
        for part in itertools.cycle(parts):
            block = range(at, min(at + part, len(documents)))
            if not block:
                return shards.finish()
            joined = [tokens[i] for i in block if documents[i][1]]
            row = np.concatenate(joined or [np.empty(0, "<u2")])
            shards.add(np.stack([row, row + 7]) if sidecar else row, len(joined), len(block))
            at += len(block)

    def kill():
        raise Killed

    try:
        for i, patience in enumerate(kills):
            try:
                attempt(parts if i % 2 else others, patience)
            except Killed:
                continue
        summary = attempt(parts, 1 << 30)
    finally:
        prepare.SHARD_TOKENS = old
    read = [t.read_shard(folder / f["name"]) for f in summary["files"]]
    np.testing.assert_array_equal(np.concatenate(read or [np.empty(0, "<u2")]), kept)
    assert [len(r) for r in read] == [f["tokens"] for f in summary["files"]] == [size] * (len(kept) // size) + [len(kept) % size] * (len(kept) % size > 0)
    assert sidecar == ("sidecar" in summary)
    for file, tokens in zip(summary.get("sidecar", []), read, strict=True) if sidecar else ():
        np.testing.assert_array_equal(t.read_shard(folder / file["name"]), tokens + 7)
    assert (summary["documents"], summary["tokens"]) == (sum(keep for _, keep in documents), len(kept))


SMALL = "encode.TEXT_BLOCK = 20_000; prepare.SHARD_TOKENS = 30_000"


@pytest.fixture(scope="module")
def many(made, dataset, tmp_path_factory):
    """The arguments of a run with many blocks and shards, and the files that it makes without an interruption."""
    root = tmp_path_factory.mktemp("many")
    args = ["tokenize", made[0] / "docs.jsonl.zst", "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "mine", "--val-docs", 3]
    cli("--root", root, *args, "--workers", 3, before=SMALL)
    files = files_of(root)
    assert len(files) >= 5
    return args, files


def test_blocks_and_workers_change_no_document(made, many):
    def tokens(files, split):
        return b"".join(files[name][1024:] for name in sorted(files) if split in name)

    for split in ("val", "train"):
        assert tokens(many[1], split) == tokens(files_of(made[0]), split)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_finished_shards(many, tmp_path):
    """Killed without warning after its second note of progress, in the training split; its processes end with it."""
    args, files = many
    kill = """
save, left = prepare.Shards.save, [2]
def killed(self, **now):
    save(self, **now)
    left[0] -= 1
    if not left[0]:
        print(*open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split(), flush=True)
        os.kill(os.getpid(), 9)
prepare.Shards.save = killed"""
    done = cli("--root", tmp_path, *args, "--workers", 2, before=SMALL + kill, check=False)
    assert done.returncode == -signal.SIGKILL and os.listdir(tmp_path / "datasets") == ["mine.partial"]
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}") for pid in done.stdout.split()):
            break
        time.sleep(0.1)
    assert done.stdout.split() and not any(os.path.exists(f"/proc/{pid}") for pid in done.stdout.split())
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "datasets" / "mine.partial").glob("*.bin")}
    other = cli("--root", tmp_path, *args[:-1], 4, before=SMALL, check=False)
    assert other.returncode == 1 and "holds shards of other inputs or options" in other.stderr
    cli("--root", tmp_path, *args, "--workers", 1, before=SMALL)
    assert files_of(tmp_path) == files and os.listdir(tmp_path / "datasets") == ["mine"]
    assert finished and all((tmp_path / "datasets" / "mine" / name).stat().st_mtime_ns == when for name, when in finished.items())


def test_a_process_that_dies_ends_the_run_in_one_line(many, tmp_path):
    dead = "\ndef dead(model, block):\n    os.kill(os.getpid(), 9)\nprepare.encode_block = dead"
    done = cli("--root", tmp_path, *many[0], "--workers", 1, before=SMALL + dead, check=False)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("prepare.py: a process was killed")
    assert "Traceback" not in done.stderr


def test_two_runs_do_not_write_the_same_dataset(many, tmp_path):
    with prepare.alone_in(tmp_path / "datasets" / "mine.partial"), pytest.raises(t.InputError, match="another process is writing"):
        tokenize(tmp_path, *many[0][1:])


def test_a_full_disk_is_told_and_leaves_nothing(many, tmp_path, monkeypatch):
    part = tmp_path / "datasets" / "mine.partial" / f"fineweb_val_000000.bin.{os.getpid()}.part"

    def build(*args, build=prepare.build):
        part.symlink_to("/dev/full")  # every write to it fails for want of space
        return build(*args)

    monkeypatch.setattr(prepare, "build", build)
    with pytest.raises(prepare.InputError, match="cannot write .*: No space left on device"):
        tokenize(tmp_path, *many[0][1:])
    assert not list((tmp_path / "datasets").iterdir())


# Splits and tokenizers


def test_the_contests_split_is_the_default_and_a_text_that_is_too_short_says_so(made, dataset, tmp_path):
    with pytest.raises(t.InputError, match="the text has 41 documents and the first 50000 would be the validation split"):
        tokenize(tmp_path, made[0] / "docs.jsonl", "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "mine")
    assert not list((tmp_path / "datasets").iterdir())
    with pytest.raises(t.InputError, match="the text has 41 documents and the first 41 would be"):
        tokenize(tmp_path, made[0] / "docs.jsonl", "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "mine", "--val-docs", 41)


def test_validation_text_of_its_own_leaves_its_documents_out_of_training(documents, dataset, tmp_path, capsys):
    write_json_lines(tmp_path / "val.jsonl", documents[5:7])
    write_json_lines(tmp_path / "train.jsonl", documents[:10])
    tokenize(tmp_path, tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl", "--tokenizer", dataset["TOKENIZER_PATH"], "--name", "mine", "--workers", 1)
    sp = sentencepiece.SentencePieceProcessor(model_file=dataset["TOKENIZER_PATH"])
    train = t.read_shard(tmp_path / "datasets" / "mine" / "fineweb_train_000000.bin")
    np.testing.assert_array_equal(train, np.concatenate([[1, *sp.encode(d)] for d in documents[:5] + documents[7:10]]))
    assert "2 training documents are also in the validation split" in capsys.readouterr().err


def test_a_tokenizer_learns_from_no_validation_document_and_within_its_bounds(documents, tmp_path, monkeypatch):
    write_json_lines(tmp_path / "docs.jsonl", documents)
    learnt = []
    monkeypatch.setattr(prepare, "train_tokenizer", lambda texts, *how: learnt.extend(texts) or encode.train_tokenizer(learnt, *how))
    tokenize(tmp_path, tmp_path / "docs.jsonl", "--vocab-size", 400, "--name", "mine", "--val-docs", 3, "--tokenizer-docs", 20, "--workers", 1)
    assert learnt == documents[3:23]
    assert (tmp_path / "tokenizers" / "mine.model").is_file() and "mine.model" not in files_of(tmp_path)
    with pytest.raises(t.InputError, match="mine.model is there already"):
        os.rename(tmp_path / "datasets" / "mine", tmp_path / "datasets" / "old")
        tokenize(tmp_path, tmp_path / "docs.jsonl", "--vocab-size", 400, "--name", "mine", "--val-docs", 3)
    size = sum(len(d.encode()) for d in documents[:2])
    texts = list(encode.sample(encode.json_blocks(documents), (size + 1) / 1e6))
    assert texts == documents[:2]


def test_a_tokenizer_of_another_bos_is_refused(documents, tmp_path, monkeypatch):
    monkeypatch.setitem(encode.CONTEST_TRAINER, "bos_id", 2)
    monkeypatch.setitem(encode.CONTEST_TRAINER, "eos_id", 1)
    encode.train_tokenizer(documents, 384, tmp_path / "other.model")
    write_json_lines(tmp_path / "docs.jsonl", documents[:5])
    with pytest.raises(t.InputError, match="other.model has BOS 2 and 384 pieces; shards need BOS 1"):
        tokenize(tmp_path, tmp_path / "docs.jsonl", "--tokenizer", tmp_path / "other.model", "--name", "mine", "--val-docs", 1)


# verify


def by_hand(shards, model):
    """(documents, tokens, bytes; targets and bytes of the whole rows of 2,048) counted piece by piece."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = np.concatenate([t.read_shard(path) for path in shards]).tolist()
    sizes = [0]
    for previous, token in zip(tokens, tokens[1:]):
        piece = sp.id_to_piece(token)
        bare = len(piece.replace("\u2581", "").encode()) if not sp.is_byte(token) else 1
        sizes.append(0 if token == 1 else bare + (piece.startswith("\u2581") and previous != 1))
    rows = (len(tokens) - 1) // 2048 * 2048
    return tokens.count(1), len(tokens), sum(sizes), rows, sum(sizes[: rows + 1])


@pytest.mark.parametrize("block", [700, 5000, 1 << 22])
def test_verify_prints_the_invariants(many, dataset, tmp_path, monkeypatch, capsys, block):
    """Shards that cut documents, read in blocks of several sizes, against a count of each token."""
    folder = tmp_path / "datasets" / "mine"
    folder.mkdir(parents=True)
    for name, blob in many[1].items():
        (folder / name).write_bytes(blob)
    monkeypatch.setattr(prepare, "TOKEN_BLOCK", block)
    prepare.main(["--root", str(tmp_path), "verify", "mine", "--tokenizer", dataset["TOKENIZER_PATH"]])
    out = capsys.readouterr().out
    for split in ("val", "train"):
        documents, tokens, size, rows, row_size = by_hand(sorted(folder.glob(f"fineweb_{split}_*")), dataset["TOKENIZER_PATH"])
        assert f"{split}: {documents} documents (as many BOS), {tokens} tokens, {size} bytes, {size / (tokens - 1):.6f} bytes/token" in out
        assert f"in rows of 2048: {rows} targets, {row_size} bytes, {row_size / max(rows, 1):.6f} bytes/target" in out and rows >= (split == "train")


def write_split(folder, split, tokens):
    shards = prepare.Shards(folder, split, {})
    shards.add(np.asarray(tokens, "<u2"), int((np.asarray(tokens) == 1).sum()), 0)
    return shards.finish()


def own_shards(root, model, val, train, name="mine"):
    folder = root / "datasets" / name
    folder.mkdir(parents=True)
    prepare.write_manifest(folder, Path(model), {split: write_split(folder, split, tokens) for split, tokens in (("val", val), ("train", train))})
    (folder / "progress.json").unlink()
    return ["--root", str(root), "verify", name, "--tokenizer", model]


@pytest.mark.parametrize("val, train, words", [
    ([1, 300, 301], [1, 310, 1, 300, 301, 1, 311], "1 documents are in both splits"),
    ([1, 300, 301], [1, 999], "has token 999, but VOCAB_SIZE=384"),
    ([1, 300, 4 + 255], [1, 310], "their text has"),  # a lone byte 0xFF is no text, and decodes to three bytes
    ([300, 301], [1, 310], "does not begin with a document"),
])
def test_verify_refuses_what_no_tokenizing_can_make(dataset, tmp_path, val, train, words):
    with pytest.raises(t.InputError, match=words):
        prepare.main(own_shards(tmp_path, dataset["TOKENIZER_PATH"], val, train))


def test_shards_of_another_script_need_no_manifest(dataset, tmp_path, capsys):
    args = own_shards(tmp_path, dataset["TOKENIZER_PATH"], [1, 300, 301], [1, 310])
    (tmp_path / "datasets" / "mine" / "manifest.json").unlink()
    with pytest.raises(t.InputError, match="no readable manifest.json .* --no-manifest"):
        prepare.main(args)
    prepare.main([*args, "--no-manifest"])
    assert "train: 1 documents" in capsys.readouterr().out


def test_every_command_of_the_page_is_one_that_parses():
    lines = [line.split("#")[0].split() for line in (ROOT / "data" / "README.md").read_text().splitlines() if line.startswith("    python")]
    assert len(lines) >= 6 and all((ROOT / line[1]).is_file() for line in lines)
    commands = [line[2:] for line in lines if line[1] == "data/prepare.py"]
    assert {prepare.parser().parse_args(args).run.__name__ for args in commands} == {"demo", "download", "tokenize", "verify"}


def test_a_name_of_the_contests_must_hold_its_validation_split(dataset, tmp_path, monkeypatch, capsys):
    val = [1, *[300] * 3000]
    args = own_shards(tmp_path, dataset["TOKENIZER_PATH"], val, [1, 310], name="fineweb10B_sp1024")
    with pytest.raises(t.InputError, match="62021632 targets in rows of 2048 and 2.435930 bytes/target"):
        prepare.main(args)
    sp = sentencepiece.SentencePieceProcessor(model_file=dataset["TOKENIZER_PATH"])
    ratio = len(sp.decode([300] * 2048).encode()) / 2048
    monkeypatch.setattr(prepare, "CONTEST_VAL", dict(fineweb10B_sp1024=(2048, round(ratio, 6))))
    prepare.main(args)
    assert "has the targets and the bytes of the contest's records" in capsys.readouterr().out
    monkeypatch.setattr(prepare, "CONTEST_VAL", dict(fineweb10B_sp1024=(2048, round(ratio, 6) + 1e-6)))
    with pytest.raises(t.InputError, match="compares with no record"):
        prepare.main(args)


def test_the_speed_tool_compares_both_on_the_same_documents(made, dataset):
    args = [made[0] / "docs.jsonl.zst", "--tokenizer", dataset["TOKENIZER_PATH"], "--docs", 30, "--turns", 1]
    done = forked.python([ROOT / "data" / "speed.py", *args], os.environ)
    assert done.returncode == 0 and "30 documents, " in done.stdout and "documents/min" in done.stdout and "turn 1: tokenize" in done.stdout, done.stderr


# verify --text


@given(text=st.text() | st.text(ODD + "\u1100\u1161\u11a8\uac01\ufe0f\u1e9e\u0130\u00df\u3300\u33a5\u00bd\ufb03\uff21\U0001d400\u0f71\u0f72", max_size=40))
@settings(max_examples=300, deadline=None)
def test_normalization_leaves_bytes_between_the_limits(models, text):
    sizes = [prepare.normal_sizes(char) for char in text]
    for model in models[0]:
        sp = encode.processor(model)
        assert sum(least for least, _ in sizes) <= len(sp.decode(sp.encode(text)).encode()) <= sum(most for _, most in sizes)


def test_verify_refuses_a_tokenizer_that_makes_the_text_longer(documents, tmp_path, capsys):
    """Every letter \u00f8 becomes ten x: tokens and decoded text agree on the bytes, the text of the file does not."""
    rules = tmp_path / "rules.tsv"
    rules.write_text("f8\t" + " ".join(["78"] * 10) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "CONTEST_TRAINER", encode.CONTEST_TRAINER | dict(normalization_rule_tsv=str(rules)))
        encode.train_tokenizer(documents[:10], 400, tmp_path / "long.model")
    write_json_lines(tmp_path / "docs.jsonl", ["a \u00f8 b"] * 2 + ["other"])
    tokenize(tmp_path, tmp_path / "docs.jsonl", "--tokenizer", tmp_path / "long.model", "--name", "mine", "--val-docs", 2, "--workers", 1)
    verify = ["--root", str(tmp_path), "verify", "mine", "--tokenizer", str(tmp_path / "long.model")]
    prepare.main(verify)
    with pytest.raises(t.InputError, match=r"the tokens count 28 bytes, but normalization leaves 8 to 12 of the text's 12: .*long.model changes the text"):
        prepare.main([*verify, "--text", str(tmp_path / "docs.jsonl")])


def test_verify_with_the_text_tells_both_sizes(made, documents, dataset, capsys):
    prepare.main(["--root", str(made[0]), "verify", "mine", "--tokenizer", dataset["TOKENIZER_PATH"], "--text", str(made[0] / "docs.jsonl")])
    sp, size = encode.processor(Path(dataset["TOKENIZER_PATH"])), sum(len(d.encode()) for d in documents[:3])
    counted = sum(len(sp.decode(sp.encode(d)).encode()) for d in documents[:3])
    assert f"val: each token is what the text makes; it has {size} bytes, of which the tokens count {counted}\n" in capsys.readouterr().out


# The demo


def test_the_demo_runs_on_the_data_that_its_command_makes(documents, tmp_path, monkeypatch, capsys):
    """From the folder above data/, with no other setting of a path or a size. Another run of the command changes nothing."""
    monkeypatch.setattr(prepare, "python_documents", lambda: documents)
    arguments = ["--root", str(tmp_path / "data"), "demo", "--val-docs", "5", "--workers", "1"]
    prepare.main(arguments)
    assert "VARIANT=demo DATA_PATH=" in capsys.readouterr().out
    done = run(dict(VARIANT="demo", ITERATIONS="2", WARMUP_STEPS="0", VAL_MAX_TOKENS="100", TTT_EPOCHS="0", DTYPE="fp32"), cwd=tmp_path)
    assert "final_int6_roundtrip" in done.stdout
    before = files_of(tmp_path / "data", "demo_sp1024")
    prepare.main(arguments)
    assert "is there already" in capsys.readouterr().out and files_of(tmp_path / "data", "demo_sp1024") == before
    (tmp_path / "data" / "tokenizers" / "demo_1024_bpe.model").unlink()
    with pytest.raises(t.InputError, match="demo_sp1024 is there, but not whole, or .*demo_1024_bpe.model is missing; remove it"):
        prepare.main(arguments)
    assert files_of(tmp_path / "data", "demo_sp1024") == before


def test_the_demo_needs_text_to_train_on(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "python_documents", lambda: documents)
    with pytest.raises(t.InputError, match=f"--val-docs 5000 leaves nothing to train on: there are {len(documents)} documents"):
        prepare.main(["--root", str(tmp_path), "demo", "--val-docs", "5000"])
    assert not list(tmp_path.iterdir())
