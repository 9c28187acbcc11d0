"""Case marks: lossless over all of Unicode, bytes of the original in each token, datasets with a sidecar from end to end."""

import contextlib
import functools
import io
import json
import os
import re
import signal
import tempfile
from pathlib import Path

import case
import encode
import numpy as np
import pytest
from conftest import make_model, prepare, run, write_json_lines
from helpers.smoke import SMOKE, for_evaluation
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_prepare import by_parts, cli, files_of

import train_gpt as t
from tools.model import generate

PUBLISHED = Path("/work/shared/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model")
LAYOUTS = sorted(case.LAYOUTS)
ODD = [*case.MARKS, *"aAbBIi_1 \n\t.'",
       *"\u00df\u0130\u0149\u01c5\u00c9\u03a3\u03c2\u0345\u212a\ufb01\uff21\uff41\u00bd\u1e96", *"\u0301\u0331\u200b\u00a0\u3000\u2581\ufeff\ufffd\x00\x1c\x85"]
TEXTS = st.text() | st.text(st.sampled_from(ODD), max_size=30) \
    | st.lists(st.sampled_from(["The", "NASA", "I", "i", "iPhone", " ", "McX", *ODD])).map("".join)


# The transform


def named(text):
    """A text with marks for their names."""
    return functools.reduce(lambda text, mark: text.replace(f"<{mark[0]}>", mark[1]), zip("TANE", case.MARKS), text)


@pytest.mark.parametrize("text, v1, ahead", [
    ("The NASA iPhone", "<T>the <A>nasa i<N>phone", "<T>the<A> nasa i<T>phone"),
    ("I am A, OpenAI", "<T>i am <T>a, <T>open<N>a<N>i", "I am<T> a,<T> open<T>a<T>i"),
    ("end.\n\n Next I'M IN", "end.\n\n <T>next <T>i'<T>m <A>in", "end.<T>\n\n next I'<T>m<A> in"),
    (" One\u00c9Cole \u00c9A", " <T>one\u00c9<T>cole \u00c9<T>a", " <T>one\u00c9<T>cole \u00c9<T>a"),
    ("<T> <E>x<N>A", "<E><T> <E><E>x<E><N><T>a", "<E><T> <E><E>x<E><N><T>a"),
])
def test_marks_stand_where_the_layout_says(text, v1, ahead):
    assert (case.encode(named(text), "v1"), case.encode(named(text), "ahead")) == (named(v1), named(ahead))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(text=TEXTS)
@settings(max_examples=400, deadline=None)
def test_any_text_comes_back(layout, text):
    marked = case.encode(text, layout)
    assert case.decode(marked) == text
    assert case.decode(case.encode(marked, layout)) == marked  # marked text is text
    assert case.char_bytes(marked).sum() == len(text.encode()) and len(case.char_bytes(marked)) == len(marked)
    assert not any("A" <= c <= "Z" for c in marked.replace("I", "" if layout == "ahead" else "I"))
    if not set(text) & {*map(chr, range(65, 91)), *case.MARKS}:
        assert marked == text


@given(text=TEXTS | st.text(st.sampled_from([*case.MARKS, *"aB \u0301"])), cuts=st.lists(st.integers(0, 40)), layout=st.sampled_from([None, *LAYOUTS]))
@settings(max_examples=300, deadline=None)
def test_pieces_come_out_as_the_whole(text, cuts, layout):
    """Of marked text, and of what no encode has made."""
    marked = case.encode(text, layout) if layout else text
    edges = [0, *sorted(cuts), len(marked)]
    assert "".join(case.decode_stream(marked[a:b] for a, b in zip(edges, edges[1:]))) == case.decode(marked)


def test_a_long_word_takes_linear_time():
    for text in ("a" * 10**6, "aB" * 10**5, " " * 10**6 + "x", ("\n" * 999 + "B") * 200):
        assert all(case.decode(case.encode(text, layout)) == text for layout in LAYOUTS)


# Bytes of tokens


@pytest.fixture(scope="session")
def models(documents, tmp_path_factory):
    """A tokenizer of each layout."""
    folder = tmp_path_factory.mktemp("case")
    for layout in LAYOUTS:
        encode.train_tokenizer(documents, 400, folder / f"{layout}.model", layout)
    return {layout: folder / f"{layout}.model" for layout in LAYOUTS}


def encoded(model, *texts):
    """Documents (2, N): their tokens, and the bytes of these."""
    block = encode.Block(Path("x"), 1, len(texts), "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    return encode.encode_block(model, block, sidecar=True).tokens


def test_a_tokenizer_tells_its_layout(models, dataset):
    assert {layout: encode.layout_of(path) for layout, path in models.items()} == {layout: layout for layout in LAYOUTS}
    assert encode.layout_of(Path(dataset["TOKENIZER_PATH"])) is None
    pieces = {layout: [encode.processor(path).id_to_piece(i) for i in range(400)] for layout, path in models.items()}
    marked = {layout: {p for p in there if set(p) & set(case.MARKS)} for layout, there in pieces.items()}
    assert marked["v1"] == set(case.MARKS) and f".{case.TITLE}" in marked["ahead"]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
@example(texts=["\x1fA", "\x01 B\x0b C", "\u200d D"])
@settings(max_examples=150, deadline=None)
def test_tokens_have_the_bytes_of_the_original(models, layout, texts):
    """All of them, where normalization takes nothing from the ends."""
    tokens, counts = encoded(models[layout], *(f"x{text}x" for text in texts))
    starts = np.flatnonzero(tokens == t.BOS)
    assert np.add.reduceat(counts, starts).tolist() == [len(f"x{text}x".encode()) for text in texts]
    marks = [encode.processor(models[layout]).piece_to_id(mark) for mark in (case.TITLE, case.ALLCAPS)]
    free = [i for i, token in enumerate(tokens) if token in (t.BOS, *marks) and case.ESCAPE not in case.encode("".join(texts), layout)]
    assert not counts[free].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@given(text=st.text(st.sampled_from("aAbBIi.,' \n\u3000\u00e9\u00df\u4e1c"), max_size=40))
@settings(max_examples=150, deadline=None)
def test_tokens_decode_to_the_original_as_plain_ones_do(models, dataset, layout, text):
    """Up to normalization, which is the tokenizer's; each token then counts the bytes that it decodes to."""
    sp, plain = encode.processor(models[layout]), encode.processor(Path(dataset["TOKENIZER_PATH"]))
    normal = plain.decode(plain.encode(text))
    tokens, counts = encoded(models[layout], normal)
    decoded = sp.decode(tokens[1:].tolist())
    assert case.decode(decoded) == normal == case.decode(sp.decode(sp.encode(case.encode(text, layout))))
    np.testing.assert_array_equal(counts[1:], case.token_bytes(sp, tokens[1:], case.char_bytes(decoded)))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(text=TEXTS, size=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_long_documents_are_counted_by_parts(models, layout, text, size):
    text = f"Some words, NASA's. {text} A few " * 2
    whole, marked = encoded(models[layout], text), case.encode(text, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "PART", size)
        np.testing.assert_array_equal(encoded(models[layout], text), whole)
    assert by_parts(models[layout], marked, size) == whole[0].tolist()


def test_a_gap_is_what_becomes_a_space(dataset):
    """Were it dropped, a mark before it would count its bytes. (A newer SentencePiece has more of them.)"""
    sp, gaps = encode.processor(Path(dataset["TOKENIZER_PATH"])), [c for c in map(chr, range(0x10000)) if re.fullmatch(case.GAP, c)]
    assert len(gaps) == 30 and {sp.normalize(f"a{c}b") for c in gaps} == {"a\u2581b"}


def test_a_token_of_too_many_bytes_is_an_error(models):
    with pytest.raises(t.InputError, match="x, line 2: a document of 70,002 bytes has a token that counts 70,00[01] of them, of at most 65,535"):
        encoded(models["v1"], "a", "x" + " " * 70_000 + "y")


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the contest's tokenizer is not here")
@pytest.mark.parametrize("text, tokens, counts", [
    ("The NASA iPhone, McDonald's", [4, 320, 8133, 5, 5566, 8136, 1103, 6, 2087, 8156, 8133, 4, 1798, 6, 5906, 8165, 8140],
     [0, 3, 1, 0, 3, 1, 2, 0, 5, 1, 1, 0, 2, 0, 6, 1, 1]),
    ("  I \u2603 \ufb01ne\n\n\u00bd Ea \ue002B ",
     [4, 8138, 8133, 234, 160, 139, 3072, 8133, 8160, 234, 137, 140, 8162, 8133, 4, 8134, 8136, 8133, 7, 5, 4, 8153],
     [0, 1, 1, 0, 0, 3, 6, 2, 0, 0, 0, 0, 2, 1, 0, 1, 1, 1, 0, 3, 0, 1])])
def test_the_published_tokenizer_gives_the_tokens_and_bytes_of_the_published_code(text, tokens, counts):
    assert encode.layout_of(PUBLISHED) == "v1" and encoded(PUBLISHED, text).tolist() == [[1, *tokens], [0, *counts]]


# Datasets


@pytest.fixture(scope="module")
def made(documents, tmp_path_factory):
    """A dataset of each layout with a tokenizer of its own, shards of 9,000 tokens and documents with odd ends."""
    root = tmp_path_factory.mktemp("root")
    write_json_lines(root / "docs.jsonl", ["  \ufb01 NASA \u00bd\n" + text for text in documents[:12]])
    for layout in LAYOUTS:
        arguments = ["tokenize", root / "docs.jsonl", "--vocab-size", 400, "--case", layout, "--name", layout, "--val-docs", 3, "--workers", 1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "SHARD_TOKENS", 9000)
            prepare.main(["--root", str(root), *map(str, arguments)])
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dataset_has_the_bytes_of_its_text(made, layout, documents, capsys):
    folder, model = made / "datasets" / layout, made / "tokenizers" / f"{layout}.model"
    shards, sidecars = (sorted(folder.glob(f"fineweb_val_{kind}*.bin")) for kind in ("0", "bytes_"))
    assert len(shards) == len(sidecars) > 1 and not list(folder.glob("fineweb_train_bytes*"))
    stored = [np.concatenate([t.read_shard(path) for path in paths]) for paths in (shards, sidecars)]
    np.testing.assert_array_equal(stored, encoded(model, *("  \ufb01 NASA \u00bd\n" + text for text in documents[:3])))
    kept = sum(len(f"\ufb01 NASA \u00bd\n{text}".rstrip().encode()) for text in documents[:3])
    assert stored[1].sum() == kept
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["case"] == layout and [f["name"] for f in manifest["val"]["sidecar"]] == [p.name for p in sidecars]
    assert [f["tokens"] for f in manifest["val"]["sidecar"]] == [f["tokens"] for f in manifest["val"]["files"]] and "sidecar" not in manifest["train"]
    prepare.main(["--root", str(made), "verify", layout, "--text", str(made / "docs.jsonl")])
    out = capsys.readouterr().out
    assert f"{len(stored[0])} tokens, {kept} bytes" in out and "each token and its bytes are what the text makes" in out


def change(path, index, value):
    with open(path, "r+b") as file:
        file.seek(t.SHARD_HEADER_BYTES + 2 * index)
        file.write(np.array(value, "<u2").tobytes())


def shift(path):
    """One byte more for each token that has some."""
    counts = np.array(t.read_shard(path))
    change(path, 0, counts + (counts > 0))


SIDECAR = "fineweb_val_bytes_000000.bin"


@pytest.mark.parametrize("damage, options, words", [
    (lambda f: change(f / SIDECAR, 40, 9), [], f"{SIDECAR} is not the file of the manifest"),
    (lambda f: change(f / SIDECAR, 0, 1), ["--no-manifest"], "the val sidecar counts 1 bytes for token 1, which has none"),
    (lambda f: change(f / SIDECAR, 40, 9), ["--no-manifest", "--text"], "counts 9 bytes instead of"),
    (lambda f: shift(f / SIDECAR), ["--no-manifest"], "counts of the sidecar are not those of the decoded text"),
    (lambda f: change(f / "fineweb_val_000000.bin", 40, 300), ["--no-manifest", "--text"], "it has other tokens"),
    (lambda f: (f / SIDECAR).unlink(), [], "the val sidecars are not those of the manifest"),
    (lambda f: (f / SIDECAR).unlink(), ["--no-manifest"], f"{SIDECAR} is missing: "),
    (lambda f: (f / SIDECAR).write_bytes((f / "fineweb_val_bytes_000001.bin").read_bytes()), ["--no-manifest"], "counts, but fineweb_val_000000.bin 9000"),
    (lambda f: (f / "fineweb_val_bytes_000009.bin").write_bytes((f / SIDECAR).read_bytes()), ["--no-manifest"], "sidecars, but"),
])
def test_verify_refuses_a_sidecar_of_something_else(made, tmp_path, damage, options, words):
    folder, options = tmp_path / "datasets" / "v1", [*options, *([made / "docs.jsonl"] if "--text" in options else [])]
    folder.mkdir(parents=True)
    for name, blob in files_of(made, "v1").items():
        (folder / name).write_bytes(blob)
    damage(folder)
    with pytest.raises(t.InputError) as caught:
        prepare.main(["--root", str(tmp_path), "verify", "v1", "--tokenizer", str(made / "tokenizers" / "v1.model"), *map(str, options)])
    assert words in str(caught.value) and "\n" not in str(caught.value)


RARE = ["e\u0301", "\u0327\u0301", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u0130", "\u1e9e", "\ufb03", "\ufdfa",
        "\u3300", "\u33a5", "\uff76\uff9e", "\uff21", "\uff01", "\u00bd", "\u2126", "\u1100\u1161\u11a8", "\u0e33", "\u0f71\u0f72", "\U0001d400", "\ufe0f",
        "\u200d", "\u200b", "\u00ad", "\r", "\r\n", "\t", "\u00a0", "   ", "\n\n", "\x01", "\x85", "\u2028", "\ufeff", "\ufffd", "\u2581", *case.MARKS,
        "A", "NASA", "The", "iPhone", " ", "."]


def split_of(root, model, texts, val=None):
    """The arguments of `verify` for a validation split of texts, as `tokenize` writes it, and the file of its text."""
    folder, docs = root / "datasets" / "mine", root / "docs.jsonl"
    folder.mkdir(parents=True)
    write_json_lines(docs, texts)
    shards = prepare.Shards(folder, "val", {}, sidecar=encode.layout_of(model) is not None)
    for tokens in [encoded(model, *texts)] if val is None else [val]:
        shards.add(tokens, len(texts), len(texts))
    prepare.write_manifest(folder, model, dict(val=shards.finish(), train=dict(documents=0, tokens=0, files=[])))
    return ["--root", str(root), "verify", "mine", "--tokenizer", str(model)], docs


@pytest.mark.parametrize("layout", LAYOUTS)
@given(texts=st.lists(st.lists(st.sampled_from(RARE), max_size=30).map("".join) | st.text(max_size=30), min_size=1, max_size=4))
@example(texts=["\ufdfa" * 40])
@example(texts=["\uff76\uff9e" * 40, "\u00bd \u3300"])
@settings(max_examples=30, deadline=None)
def test_verify_accepts_the_sidecar_of_any_text(models, layout, texts):
    """With the text, and without it, as the manifest has its hash, then with a warning where it differs much."""
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stderr(io.StringIO()) as told:
        verify, docs = split_of(Path(root), models[layout], texts)
        prepare.main([*verify, "--text", str(docs)])
        assert "counts of the sidecar" not in told.getvalue()
        prepare.main(verify)
        assert all(re.match("WARNING: .*(decoded text.* --text FILE|train_gpt.py refuses)", line) for line in told.getvalue().splitlines())


def test_strange_counts_are_a_warning_with_a_manifest_and_an_error_without(models, tmp_path, capsys):
    verify, docs = split_of(tmp_path, models["v1"], ["\ufb01 \u00bd" * 20])
    prepare.main(verify)  # f, i; 1, the slash, 2
    assert capsys.readouterr().err.startswith(f"WARNING: {tmp_path}/datasets/mine: 100 of ")  # and of the total
    with pytest.raises(t.InputError, match="100 of [0-9]+ counts of the sidecar .* prove them with --text FILE"):
        prepare.main([*verify, "--no-manifest"])
    (tmp_path / "datasets" / "mine" / "fineweb_train_000000.bin").write_bytes((tmp_path / "datasets" / "mine" / "fineweb_val_000000.bin").read_bytes())
    with pytest.raises(t.InputError, match="1 documents are in both splits"):
        prepare.main([*verify, "--no-manifest", "--text", str(docs)])  # its counts are proved: the next check speaks


@pytest.mark.parametrize("share", [0.005, 0.05, 0.199])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_with_the_text_refuses_a_sidecar_that_is_inflated(models, documents, layout, share, tmp_path):
    """Its manifest lists the forged file, and only its space tokens count more, as if white space had been there."""
    tokens, counts = encoded(models[layout], documents[0])
    spaces = np.flatnonzero(["\u2581" in encode.processor(models[layout]).id_to_piece(int(token)) for token in tokens])
    forged = counts.copy()
    forged[spaces[: int(share * counts.sum())]] += 1
    verify, docs = split_of(tmp_path, models[layout], documents[:1], np.stack([tokens, forged]))
    with pytest.raises(t.InputError, match=f"token [0-9]+ counts {counts[spaces[0]] + 1} bytes instead of {counts[spaces[0]]}$"):
        prepare.main([*verify, "--text", str(docs)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sidecar_of_prose_is_accepted_and_one_inflated_by_over_1_percent_refused(models, documents, layout, tmp_path, capsys):
    """Text without runs of white space. A forged sidecar counts more at its space tokens alone; prepare.py warns of what train_gpt.py refuses."""
    texts, sp = [" ".join(text.split()) for text in documents[:4]], encode.processor(models[layout])
    tokens, counts = encoded(models[layout], *texts)
    spaces = np.flatnonzero(["\u2581" in sp.id_to_piece(int(token)) for token in tokens])
    for share in (0, 0.009, 0.011, 0.05, 0.199):
        forged, root, model = counts.copy(), tmp_path / str(share), models[layout]
        extra = int(share * counts.sum())
        np.add.at(forged, np.resize(spaces, extra), 1)
        split_of(root, model, texts, np.stack([tokens, forged]))
        cfg = t.Config(data_path=str(root / "datasets" / "mine"), tokenizer_path=str(model), vocab_size=400)
        prepare.warn_of_excess(Path(cfg.data_path), model)
        warned = capsys.readouterr().err
        if share < 0.01:
            assert int(t.target_bytes(tokens, cfg).sum()) == sum(len(text.encode()) for text in texts) + extra and not warned
        else:
            with pytest.raises(t.InputError, match=f"differs by {extra} bytes, more than 1 %"):
                t.target_bytes(tokens, cfg)
            assert warned.startswith(f"WARNING: {cfg.data_path}: the sidecar counts {forged.sum()} bytes, the pieces have ") and warned.count("\n") == 1


def test_tokenize_warns_of_text_whose_sidecar_is_refused(models, documents, tmp_path, capsys):
    write_json_lines(tmp_path / "docs.jsonl", documents[:6])  # a tenth of it is indentation
    arguments = ["tokenize", tmp_path / "docs.jsonl", "--tokenizer", models["v1"], "--name", "mine", "--val-docs", 3, "--workers", 1]
    prepare.main(["--root", str(tmp_path), *map(str, arguments)])
    assert "train_gpt.py refuses a difference of over 1%" in capsys.readouterr().err


def test_the_command_line_tells_a_changed_count_in_one_line(made, tmp_path):
    """Whole runs in processes of their own: with the tokenizer there is, whose layout needs no option."""
    model = made / "tokenizers" / "ahead.model"
    cli("--root", tmp_path, "tokenize", made / "docs.jsonl", "--tokenizer", model, "--name", "mine", "--val-docs", 3, "--workers", 1)
    assert "no document in both splits" in cli("--root", tmp_path, "verify", "mine", "--no-manifest", "--tokenizer", model).stdout
    change(tmp_path / "datasets" / "mine" / SIDECAR, 77, 8)
    done = cli("--root", tmp_path, "verify", "mine", "--no-manifest", "--tokenizer", model, "--text", made / "docs.jsonl", check=False)
    assert done.returncode == 1 and "counts 8 bytes instead of" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_killed_run_goes_on_with_its_sidecar(made, tmp_path):
    """Killed after the first shard of validation has been noted, and before its second."""
    arguments = ["--root", tmp_path, "tokenize", made / "docs.jsonl", "--vocab-size", 400, "--case", "v1", "--name", "v1", "--val-docs", 3, "--workers", 1]
    small = "prepare.SHARD_TOKENS = 9000"
    kill = "\nsave = prepare.Shards.save\ndef killed(self, **now):\n    save(self, **now)\n    os.kill(os.getpid(), 9)\nprepare.Shards.save = killed"
    done = cli(*arguments, before=small + kill, check=False)
    there = {path.name for path in (tmp_path / "datasets" / "v1.partial").glob("*.bin")}
    assert done.returncode == -signal.SIGKILL and there == {"fineweb_val_000000.bin", SIDECAR}
    other = cli(*(arg if arg != "v1" or arguments[i - 1] != "--case" else "ahead" for i, arg in enumerate(arguments)), before=small, check=False)
    assert other.returncode == 1 and "holds shards of other inputs or options" in other.stderr
    (tmp_path / "datasets" / "v1.partial" / "fineweb_val_000001.bin.77.part").write_bytes(b"of the killed process")
    cli(*arguments, before=small)
    assert files_of(tmp_path, "v1") == files_of(made, "v1") and os.listdir(tmp_path / "datasets") == ["v1"]


def test_a_byte_that_goes_on_with_no_character_is_told(models, tmp_path):
    letter, byte = map(encode.processor(models["v1"]).piece_to_id, ("a", "<0x82>"))
    verify, _ = split_of(tmp_path, models["v1"], ["x"], np.array([[t.BOS, letter, byte], [0, 1, 1]], "<u2"))
    with pytest.raises(t.InputError, match="mine: the val split has a document of 2 tokens that are not those of its 2 characters"):
        prepare.main(verify)


def test_the_case_must_be_the_tokenizers(made, dataset, tmp_path):
    for model, words in ((made / "tokenizers" / "v1.model", "is a tokenizer of --case v1"), (dataset["TOKENIZER_PATH"], "is a tokenizer without case marks")):
        with pytest.raises(t.InputError, match=words):
            prepare.main(["--root", str(tmp_path), "tokenize", str(made / "docs.jsonl"), "--tokenizer", str(model), "--case", "ahead", "--name", "x"])


# Text of a model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_writes_text_without_marks(models, layout, tmp_path):
    """The prompt as it is, then what the tokens decode to; the model sees the tokens of the marked prompt."""
    env = SMOKE | dict(VOCAB_SIZE="400", TOKENIZER_PATH=str(models[layout]))
    cfg, sp, prompt = t.Config.from_env(env), encode.processor(models[layout]), "The NASA, \ue001 I am "
    model = make_model(cfg)
    weights = {name: 3 * p.detach() if name == "tok_emb.weight" else p.detach() for name, p in model.named_parameters()}
    (tmp_path / "model.ptz").write_bytes(t.pack(t.quantize(weights, t.quant_plans(weights, t.quant_specs(model, cfg), cfg, {})), False, cfg))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "continuation", lambda ask, ids, *rest: seen.append(ids) or sp.encode(case.encode("End. The NASA's", layout)))
        args = generate.arguments([str(tmp_path / "model.ptz"), prompt])
        assert "".join(generate.generate(args, for_evaluation(env))) == prompt + "End. The NASA's"
    assert seen == [[t.BOS, *sp.encode(case.encode(prompt, layout))]]
    done = run(for_evaluation(env), str(tmp_path / "model.ptz"), prompt, "--max-tokens", "40", "--seed", "3", script="tools.model.generate")
    written = done.stdout.removeprefix(prompt)
    assert done.stdout.startswith(prompt) and not done.stderr and not set(written) & set(case.MARKS)
