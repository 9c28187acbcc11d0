import dataclasses

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.mark.parametrize("damage, words", [
    (lambda p: p.write_bytes(b""), "not a token shard"), (lambda p: write_shard(p, [1, 2], magic=7), "not a token shard"),
    (lambda p: write_shard(p, [1, 2], version=2), "not a token shard"), (lambda p: write_shard(p, []), "header says 0 tokens, it has 0"),
    (lambda p: write_shard(p, [1, 2], count=3), "header says 3 tokens, it has 2"),
    (lambda p: write_shard(p, [1, 2], count=1), "header says 1 tokens, it has 2"),
])
def test_a_damaged_shard_is_named(tmp_path, damage, words):
    path = tmp_path / "fineweb_train_000000.bin"
    damage(path)
    with pytest.raises(t.InputError, match=words) as caught:
        t.read_shard(path)
    assert str(path) in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 100), st.integers(1, 60))
def test_the_stream_is_the_shards_repeated_for_ever(tmp_path_factory, sizes, start, count):
    folder, tokens = tmp_path_factory.mktemp("shards"), np.arange(sum(sizes))
    paths = []
    for i, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        paths.append(folder / f"fineweb_train_{i:06d}.bin")
        write_shard(paths[-1], part)
    expected = np.tile(tokens, 200)[start : start + count]
    np.testing.assert_array_equal(t.TokenStream(paths, 100).read(start, count), expected)


def test_a_token_outside_the_vocabulary_is_an_error_that_names_the_shard(tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, [1, 5, 300])
    with pytest.raises(t.InputError, match="token 300, but VOCAB_SIZE=300"):
        t.TokenStream([path], 300).read(0, 3)


def test_a_sidecar_of_byte_counts_is_not_read_as_tokens(tmp_path):
    for name in ("fineweb_val_000001.bin", "fineweb_val_bytes_000000.bin", "fineweb_val_000000.bin"):
        write_shard(tmp_path / name, [1])
    found = t.find_shards(t.Config(data_path=str(tmp_path)), "val")
    assert [p.name for p in found] == ["fineweb_val_000000.bin", "fineweb_val_000001.bin"]


def test_a_missing_folder_names_the_commands_that_make_one():
    with pytest.raises(t.InputError, match="prepare.py download sp1024.*tokenize"):
        t.find_shards(t.Config(data_path="/nowhere"), "train")


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_read_the_batch_of_one_rank(cfg, world):
    stream = t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size)
    one = t.Batches(stream, cfg, t.Ranks())
    many = [t.Batches(stream, cfg, t.Ranks(rank, world)) for rank in range(world)]
    for _ in range(3):
        ids, targets = next(one)
        shares = [next(batches) for batches in many]
        assert torch.equal(ids.flatten(0, 1), torch.cat([x.flatten(0, 1) for x, _ in shares]))
        assert torch.equal(targets.flatten(0, 1), torch.cat([y.flatten(0, 1) for _, y in shares]))
        flat = torch.cat((ids.flatten(), targets.flatten()[-1:]))
        assert torch.equal(flat[1:], targets.flatten())


def test_micro_batches_hold_at_most_the_tokens_asked_for(cfg):
    batches = t.Batches(t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size), cfg, t.Ranks())
    assert next(batches)[0].shape == (cfg.train_batch_tokens // cfg.micro_batch_tokens, 4, 32)


def test_a_batch_that_does_not_divide_among_ranks_is_an_error(cfg):
    stream = t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size)
    words = "TRAIN_BATCH_TOKENS=256 is 8 rows of 32 tokens, which is not a multiple of 3 ranks; .* TRAIN_BATCH_TOKENS=288"
    with pytest.raises(t.InputError, match=words):
        t.Batches(stream, cfg, t.Ranks(0, 3))
    assert next(t.Batches(stream, dataclasses.replace(cfg, train_batch_tokens=288), t.Ranks(0, 3)))[0].numel() == 96


def test_a_tokenizer_of_another_size_is_an_error(cfg):
    with pytest.raises(t.InputError, match="has 384 pieces, but VOCAB_SIZE=385"):
        t.load_tokenizer(t.Config(tokenizer_path=cfg.tokenizer_path, vocab_size=385))


def counted_bytes(cfg, ids):
    ids = torch.tensor([t.BOS, *ids])
    return int(t.load_byte_table(cfg).count(ids[:-1], ids[1:]).sum())


def test_bytes_of_the_validation_split_are_those_of_its_decoded_text(cfg):
    sp = sentencepiece.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    stream = np.concatenate([t.read_shard(p) for p in t.find_shards(cfg, "val")])
    ids = stream.astype(int).tolist()
    text = sp.decode([i for i in ids if i != t.BOS])
    table = t.load_byte_table(cfg)
    assert int(table.count(torch.tensor(ids[:-1]), torch.tensor(ids[1:])).sum()) == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.one_of(st.characters(codec="utf-8", exclude_characters="\u2581"), st.sampled_from(" \t\n\u0301\u200d🦜漢é")), max_size=40))
def test_bytes_of_any_text_are_those_of_its_decoded_text(dataset, text):
    cfg = t.Config.from_env(dataset)
    sp = sentencepiece.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    ids = sp.encode(text)
    assert counted_bytes(cfg, ids) == len(sp.decode(ids).encode())


class Unused:
    """A tokenizer of which one piece is out of use."""

    def __init__(self, inner, unused):
        self.inner, self.unused = inner, unused

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def is_unused(self, i):
        return i == self.unused


def test_an_unused_piece_is_a_boundary_of_no_bytes(cfg, monkeypatch):
    sp = t.load_tokenizer(cfg)
    word, letter = next(i for i in range(384) if sp.id_to_piece(i).startswith("\u2581") and len(sp.id_to_piece(i)) > 1), sp.piece_to_id("e")
    before = counted_bytes(cfg, [letter, word]), counted_bytes(cfg, [word, letter])
    monkeypatch.setattr(t, "load_tokenizer", lambda cfg: Unused(sp, letter))
    assert (counted_bytes(cfg, [letter, word]), counted_bytes(cfg, [word, letter])) == (before[0] - 2, before[1] - 1)


def test_the_byte_rule_on_single_pieces(cfg):
    sp = sentencepiece.SentencePieceProcessor(model_file=cfg.tokenizer_path)
    byte = sp.piece_to_id("<0xE2>")
    space = next(i for i in range(384) if sp.id_to_piece(i).startswith("\u2581") and len(sp.id_to_piece(i)) > 1)
    letters = len(sp.id_to_piece(space)) - 1
    assert counted_bytes(cfg, [byte]) == 1
    assert counted_bytes(cfg, [space]) == letters  # after a boundary its space is not counted
    assert counted_bytes(cfg, [byte, space]) == 1 + letters + 1
    assert counted_bytes(cfg, [0, 2, 3]) == 0  # pad, end and unknown


# ---------------------------------------- a tokenizer with case marks

@pytest.fixture(scope="module")
def marked(tmp_path_factory, dataset):
    """Settings of a validation split of 600 tokens, with a sidecar, for a tokenizer that has a case mark as a piece."""
    folder = tmp_path_factory.mktemp("marked")
    words = iter([f"{mark}some words of \ue001text" for mark in t.CASE_MARKS] * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_prefix=str(folder / "marked"), vocab_size=40, model_type="bpe", pad_id=0, bos_id=1,
                                             eos_id=2, unk_id=3, user_defined_symbols=[*t.CASE_MARKS], minloglevel=2)
    tokens = np.resize(np.arange(4, 40), 600)
    tokens[[0, 12, 300]] = t.BOS
    cfg = t.Config(data_path=str(folder), tokenizer_path=str(folder / "marked.model"), vocab_size=40)
    ids = torch.from_numpy(tokens)
    counts = np.append(0, t.load_byte_table(cfg).count(ids[:-1], ids[1:]).numpy())
    counts[[20, 500]] += 1  # what normalization took away
    for i, part in enumerate((slice(0, 400), slice(400, 600))):
        write_shard(folder / f"fineweb_val_{i:06d}.bin", tokens[part])
        write_shard(folder / f"fineweb_val_bytes_{i:06d}.bin", counts[part])
    return cfg, tokens.astype("<u2"), counts


def test_bytes_of_a_tokenizer_with_case_marks_are_the_sidecars(marked, dataset):
    cfg, tokens, counts = marked
    assert t.target_bytes(tokens, cfg).tolist() == counts[1:].tolist()
    assert t.target_bytes(tokens[:9], cfg).tolist() == counts[1:9].tolist()  # VAL_MAX_TOKENS
    plain = dataclasses.replace(cfg, tokenizer_path=dataset["TOKENIZER_PATH"], vocab_size=384)
    table = t.load_byte_table(plain)
    ids = torch.from_numpy(tokens.astype(np.int64))
    assert torch.equal(t.target_bytes(tokens, plain), table.count(ids[:-1], ids[1:]))  # it has no marks: its own rule


@pytest.mark.parametrize("sizes, words", [
    ((), "; 0 found"), ((400,), "; 400 found"), ((400, 201), "; 601 found"), (("bos", 200), "counts bytes for BOS"),
    (("twice", 200), "differs by [0-9]{3} bytes, more than 1 %")])
def test_a_sidecar_that_is_missing_or_of_another_split_is_an_error(marked, tmp_path, sizes, words):
    cfg, tokens, counts = marked
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    for i, size in enumerate(sizes):
        parts = {"bos": np.where(np.arange(400) == 12, 1, counts[:400]), "twice": 2 * counts[:400], 200: counts[400:]}
        write_shard(tmp_path / f"fineweb_val_bytes_{i:06d}.bin", parts[size] if size in parts else np.zeros(size))
    with pytest.raises(t.InputError, match=words):
        t.target_bytes(tokens, dataclasses.replace(cfg, data_path=str(tmp_path)))


class Renamed:
    """A tokenizer some of whose pieces have other texts."""

    def __init__(self, inner, texts):
        self.inner, self.texts = inner, texts

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def id_to_piece(self, i):
        return self.texts.get(i) or self.inner.id_to_piece(i)


def test_a_character_has_its_bytes_on_both_sides_of_each_length_of_utf_8(cfg, monkeypatch):
    sizes = {0x7F: 1, 0x80: 2, 0x7FF: 2, 0x800: 3, 0xD7FF: 3, 0xFFFF: 3, 0x10000: 4, 0x10FFFF: 4}
    sp = t.load_tokenizer(cfg)
    ids = [i for i in range(384) if not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i))]
    alone, spaced = ids[: len(sizes)], ids[len(sizes) : 2 * len(sizes)]
    texts = dict(zip(alone, map(chr, sizes))) | dict(zip(spaced, (f"\u2581{chr(point)}" for point in sizes)))
    monkeypatch.setattr(t, "load_tokenizer", lambda cfg: Renamed(sp, texts))
    monkeypatch.setattr(t, "PROBE", "")  # the pieces are not those that the text is made of
    table = t.load_byte_table(cfg)
    assert table.base[alone].tolist() == table.base[spaced].tolist() == [*sizes.values()]
    assert not table.space[alone].any() and table.space[spaced].all() and not table.boundary[alone + spaced].any()


@pytest.mark.parametrize("text, refused", [([], True), ([3, 2], True), ([300], False)])
def test_a_split_without_text_is_refused(cfg, text, refused):
    """BOS and unknown pieces have no bytes, so that bits for each byte would be those for nothing."""
    stream = np.array([t.BOS, *[t.BOS] * 9, *text])
    if refused:
        with pytest.raises(t.InputError, match="has no text"):
            t.target_bytes(stream, cfg)
    else:
        assert int(t.target_bytes(stream, cfg).sum()) > 0
