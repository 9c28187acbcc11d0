"""The entropy coder of COMPRESSOR=rans: exact, near the entropy, integers alone, and unharmed by streams that lie."""

import ast
import bisect
import dataclasses
import itertools
import json
import random
import tracemalloc
import warnings

import brotli
import numpy as np
import pytest
import torch
import zstandard
from conftest import ROOT, unpacked
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_compress import CFG, ON_WIRE, PACKERS, claimed, sealed, unpacked_body

import train_gpt as t

RANS = dataclasses.replace(CFG, compressor="rans")


def codes_of(kind, rows, cols, seed=0):
    """Codes int8 (rows, cols) of a kind."""
    draw = np.random.default_rng(seed)
    scales = np.exp(draw.normal(0, 1, rows))[:, None] * np.exp(draw.normal(0, 1, cols))
    values = dict(scaled=lambda: draw.normal(0, 3, (rows, cols)) * scales, alike=lambda: draw.normal(0, 2.5, (rows, cols)),
                  uniform=lambda: draw.integers(-127, 128, (rows, cols)), sparse=lambda: draw.random((rows, cols)) < 0.01,
                  ends=lambda: draw.choice((-127, 127), (rows, cols)), one=lambda: np.full((rows, cols), draw.integers(-127, 128)),
                  zero=lambda: np.zeros((rows, cols)), skewed=lambda: -draw.pareto(0.5, (rows, cols)))[kind]()
    return torch.from_numpy(np.rint(values).clip(-127, 127).astype(np.int8))


KINDS = ("scaled", "alike", "uniform", "sparse", "ends", "one", "zero", "skewed")


def entropy(codes):
    """Bytes of the codes at their empirical entropy of order zero."""
    counts = np.unique(codes, return_counts=True)[1]
    return -(counts * np.log2(counts / counts.sum())).sum() / 8


# ---- exact

PARTS = st.tuples(st.sampled_from(KINDS), st.integers(1, 60), st.integers(1, 60), st.integers(0, 999))


@settings(max_examples=60, deadline=None)
@example([("uniform", 1, 1024, 0)]).via("one full row of lanes")
@example([("uniform", 1, 1023, 0), ("one", 1, 1, 1), ("ends", 1, 1, 2)]).via("and a code more")
@example([("scaled", 300, 1, 0), ("scaled", 1, 300, 1), ("zero", 5, 1, 2)])
@given(st.lists(PARTS, min_size=1, max_size=4))
def test_codes_come_back_bit_for_bit(parts):
    tensors = {f"{i}.codes": codes_of(*part) for i, part in enumerate(parts)} | {"x.scales": torch.arange(3).half(), "gain": torch.ones(2, 2)}
    streams = t.entropy_encode(tensors)
    assert not any(w.numel() for name, w in streams.items() if name.endswith("codes"))
    assert all(torch.equal(streams[n], tensors[n]) for n in ("x.scales", "gain"))
    back = t.entropy_decode(dict(streams))
    assert back.keys() == tensors.keys() and all(torch.equal(w, back[n]) and w.dtype == back[n].dtype for n, w in tensors.items())


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 5000), symbols=st.integers(1, 256), contexts=st.integers(1, t.CONTEXTS), skew=st.floats(0, 8), seed=st.integers(0, 999))
def test_any_symbols_in_any_contexts_come_back_and_shares_add_up(count, symbols, contexts, skew, seed):
    draw = np.random.default_rng(seed)
    share = np.arange(1, symbols + 1) ** -skew
    found, where = draw.choice(symbols, count, p=share / share.sum()).astype(np.uint8), draw.integers(0, contexts, count).astype(np.uint8)
    table = t.frequencies(found, where.astype(np.int64))
    assert (table.sum(1, dtype=int) == 2**t.PRECISION).all() and table.dtype == np.uint16
    met = np.unique(where)
    assert {(met[k], s) for k, s in zip(*np.nonzero(table[met]))} == set(zip(where.tolist(), found.tolist()))
    assert (np.delete(table, met, axis=0) == 2**t.PRECISION // 256).all()
    state, words = t.rans_encode(found, where, table)
    assert state.dtype == np.uint32 and words.dtype == np.uint16 and len(state) == t.LANES
    assert np.array_equal(t.rans_decode(where, table, state, words), found)


def test_a_state_that_grows_to_the_brim_gives_up_a_word_before_it_runs_over():
    """Symbols of probability one half double a state of 2**16; the sixteenth of them would bring it to 2**32."""
    symbols, contexts = np.repeat(np.array([1, 0], np.uint8), 15 * t.LANES), np.zeros(30 * t.LANES, np.uint8)
    table = t.frequencies(symbols, contexts.astype(np.int64))
    assert table[0, :2].tolist() == [2048, 2048]
    assert np.array_equal(t.rans_decode(contexts, table, *t.rans_encode(symbols, contexts, table)), symbols)


def test_a_single_flipped_bit_is_told_by_the_end_of_the_stream():
    """Without the file's checksum: what is read is as long as before, nearly always, so that the states alone can tell."""
    draw = np.random.default_rng(0)
    symbols, contexts = draw.choice(4, 5000, p=(0.7, 0.1, 0.1, 0.1)).astype(np.uint8), draw.integers(0, 3, 5000).astype(np.uint8)
    table = t.frequencies(symbols, contexts.astype(np.int64))
    good = t.rans_encode(symbols, contexts, table)
    for part, size in ((0, 32), (1, 16)):
        for at in range(0, len(good[part]), 37):
            bad = [array.copy() for array in good]
            bad[part][at] ^= 1 << int(draw.integers(size))
            with pytest.raises((ValueError, IndexError)):
                t.rans_decode(contexts, table, *bad)


@pytest.mark.parametrize("kind, rows, cols", [("zero", 400, 400), ("one", 300, 300), ("sparse", 700, 900)])
def test_a_file_whose_codes_say_nearly_nothing_is_read(kind, rows, cols):
    codes = codes_of(kind, rows, cols)
    blob = t.pack({"a.codes": codes}, False, RANS)
    assert torch.equal(unpacked(blob)[1]["a.codes"], codes) and len(blob) < 3000 + entropy(codes) + 4 * t.LANES


def test_packing_does_not_change_what_it_packs():
    codes = codes_of("scaled", 40, 30)
    before = codes.clone()
    assert t.pack({"a.codes": codes}, False, RANS) == t.pack({"a.codes": codes}, False, RANS) and torch.equal(codes, before)


# ---- small

@pytest.mark.parametrize("kind", ["alike", "uniform"])
def test_codes_of_one_scale_take_their_entropy(kind):
    codes = codes_of(kind, 1500, 1000)
    streams = t.entropy_encode({"a.codes": codes})
    used = int(streams["rans.table"].numpy().any(0).sum())
    overhead = 4 * t.LANES + sum(codes.shape) + 2 * 256 * used
    size = len(t.pack({"a.codes": codes}, False, RANS)) - len(t.pack({"a.codes": codes[:1, :1]}, False, RANS))
    assert 0.98 * entropy(codes) < size < 1.01 * entropy(codes) + overhead
    assert 2 * streams["rans.words"].numel() < 1.002 * entropy(codes)


def test_codes_of_many_scales_take_less_than_their_entropy_and_than_any_compressor():
    codes = codes_of("scaled", 450, 400)
    size, raw = len(t.pack({"a.codes": codes}, False, RANS)), codes.numpy().tobytes()
    assert size < 0.9 * entropy(codes)
    assert size < 0.97 * min(len(brotli.compress(raw, quality=11)), len(zstandard.ZstdCompressor(level=22).compress(raw)))


def test_classes_follow_the_scales_of_rows_and_columns():
    """A factor of 4 in scale is eight classes, on either side."""
    draw, rows, columns = np.random.default_rng(0), np.repeat((1, 4), 200), np.tile((1, 2, 4), 100)
    found = t.code_classes(np.rint(draw.normal(0, 3, (400, 300)) * rows[:, None] * columns).clip(-127, 127).astype(np.int8))
    for classes, scales in zip(found, (rows, columns)):
        assert classes.dtype == np.uint8 and classes.max() < t.CONTEXTS
        middle = [np.median(classes[scales == scale]) for scale in np.unique(scales)]
        assert middle[-1] - middle[0] == pytest.approx(8, abs=1) and all(np.diff(middle) > 2)


# ---- integers alone, and the format as it is written down

def test_decoding_is_integers_alone():
    """Two machines must decode alike, so nothing between the bytes and the codes may round: no float, no division, no function but of integers."""
    tree = ast.parse((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    for f in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in ("context_of", "rans_decode", "decode_stream")):
        names = {n.attr for n in ast.walk(f) if isinstance(n, ast.Attribute)} | {n.id for n in ast.walk(f) if isinstance(n, ast.Name)}
        assert not any(isinstance(n, ast.Constant) and isinstance(n.value, float) or isinstance(n, ast.Div) for n in ast.walk(f)), f.name
        assert not names & {"float", "float16", "float32", "float64", "half", "double", "mean", "exp", "log", "log2", "exp2", "sqrt", "round", "rint"}, f.name
    streams = t.entropy_encode({"a.codes": codes_of("scaled", 40, 30)})
    assert {n: w.numpy().dtype.name for n, w in streams.items()} == {
        "a.codes.rows": "uint8", "a.codes.columns": "uint8", "rans.table": "uint16", "rans.state": "uint32", "rans.words": "uint16"}
    contexts = t.context_of(streams["a.codes.rows"].numpy(), streams["a.codes.columns"].numpy())
    assert contexts.dtype == np.uint8 and contexts.shape == (1200,)


def read_by_hand(blob):
    """The header and the tensors of a file as lists of Python integers, from the format's description alone; for unsigned integers."""
    body = zstandard.ZstdDecompressor().decompress(blob[48:])
    start = 4 + int.from_bytes(body[:4], "little")
    header, arrays = json.loads(body[4:start]), {}
    for name, dtype, shape in header["tensors"]:
        width, count = int(dtype.removeprefix("uint").removeprefix("float")) // 8, int(np.prod(shape))
        planes = [body[start + i * count : start + (i + 1) * count] for i in range(width)]
        arrays[name], start = [sum(byte << 8 * i for i, byte in enumerate(together)) for together in zip(*planes)], start + width * count
    assert start == len(body)
    return header, arrays


def decode_by_hand(arrays):
    """rANS one symbol after the other: symbol i of the file is in lane i mod 1,024; 12-bit shares, states of 32 bits, words of 16."""
    table, state, words = (list(arrays[f"rans.{k}"]) for k in ("table", "state", "words"))
    starts = [list(itertools.accumulate((table[symbol * 48 + k] for symbol in range(256)), initial=0)) for k in range(48)]
    decoded, lane = {}, 0
    for name in sorted(name.removesuffix(".rows") for name in arrays if name.endswith(".codes.rows")):
        values = []
        for row, column in itertools.product(arrays[f"{name}.rows"], arrays[f"{name}.columns"]):
            k = min(row + column, 47)
            x = state[lane]
            symbol = bisect.bisect_right(starts[k], x % 4096) - 1
            x = (starts[k][symbol + 1] - starts[k][symbol]) * (x // 4096) + x % 4096 - starts[k][symbol]
            state[lane] = x if x >= 65536 else x * 65536 + words.pop(0)
            values.append(symbol if symbol < 128 else symbol - 256)
            lane = (lane + 1) % 1024
        decoded[name] = values
    assert not words and set(state) == {65536}
    return decoded


def test_a_decoder_written_from_the_format_reads_the_same_codes():
    codes = {"a.codes": codes_of("scaled", 60, 70), "b.codes": codes_of("uniform", 33, 41, 1), "c.codes": codes_of("one", 1, 9)}
    tensors = codes | {"a.scales": torch.linspace(-1, 2, 60).half()}
    _, arrays = read_by_hand(t.pack(tensors, False, RANS))
    assert decode_by_hand(arrays) == {n: w.flatten().tolist() for n, w in codes.items()}
    assert arrays["a.scales"] == tensors["a.scales"].numpy().view(np.uint16).tolist()


# ---- streams that lie

def file_of(arrays):
    """A file whose checksum is right, around any arrays."""
    header = json.dumps({"tensors": [[name, a.dtype.name, list(a.shape)] for name, a in arrays.items()]}).encode()
    planes = [np.frombuffer(a.tobytes(), np.uint8).reshape(-1, a.itemsize).T.tobytes() for a in arrays.values()]
    return sealed(PACKERS["rans"](b"".join([len(header).to_bytes(4, "little"), header, *planes])), "rans")


def streams_of(tensors):
    return {name: w.numpy().copy() for name, w in t.entropy_encode(tensors).items()}


def refuse(arrays, most=48e6):
    """The file is refused in one line, and what it claims was not allocated."""
    blob = file_of(arrays)
    tracemalloc.start()
    try:
        with warnings.catch_warnings(), pytest.raises(t.InputError) as caught:
            warnings.simplefilter("error")  # numpy's would be another line on the terminal
            unpacked(blob)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and peak < most, peak


GOOD = streams_of({"a.codes": codes_of("uniform", 90, 70), "b.codes": codes_of("scaled", 20, 30)})


def full(name):
    return f"a.codes.{name}" if name in ("rows", "columns") else f"rans.{name}"


def changed(**arrays):
    return GOOD | {full(name): array for name, array in arrays.items()}


def part(name):
    return GOOD[full(name)].copy()


def edited(name, at, value):
    array = part(name)
    array[at] = value
    return {name: array}


def test_the_good_stream_is_read():
    assert {n: tuple(w.shape) for n, w in unpacked(file_of(GOOD))[1].items()} == {"a.codes": (90, 70), "b.codes": (20, 30)}


USED = int(np.flatnonzero(part("table").any(0))[0])


@pytest.mark.parametrize("change", [
    edited("table", (3, USED), 4095), edited("table", (slice(None), USED), 0), dict(table=part("table") * 0), dict(table=part("table") * 2),
    dict(table=part("table").astype(np.float32) * np.nan), dict(table=part("table").astype(np.int8)),
    dict(table=part("table").ravel()), dict(table=part("table")[:, :47]), dict(table=part("table")[:255]), dict(table=np.ascontiguousarray(part("table").T)),
    dict(state=part("state")[:-1]), dict(state=part("state")[:0]), dict(state=np.append(part("state"), part("state"))),
    dict(state=part("state").astype(np.uint16)), dict(state=part("state").astype(np.float32)), dict(state=part("state").reshape(2, -1)),
    edited("state", 0, 1), edited("state", 1023, 2**32 - 1),
    dict(words=part("words")[:-1]), dict(words=part("words")[1:]), dict(words=part("words")[:1]), dict(words=part("words")[:0]),
    dict(words=np.append(part("words"), part("words")[:1])), dict(words=part("words")[::-1].copy()),
    dict(words=part("words").astype(np.float32)),
    dict(state=part("state").view(np.int8)),
    edited("rows", 0, t.CONTEXTS), edited("rows", 0, 255), edited("columns", 5, 200), dict(rows=part("rows")[:-1]), dict(columns=part("columns")[:0]),
])
def test_streams_that_are_no_streams_are_refused(change):
    refuse(changed(**change))


@pytest.mark.parametrize("name", ["rows", "columns", "table", "state", "words"])
def test_a_stream_that_is_missing_is_refused(name):
    missing = {n: a for n, a in GOOD.items() if n != full(name)}
    if name == "words":  # which says that there is a stream
        assert "a.codes" not in unpacked(file_of(missing))[1]
    else:
        refuse(missing)


# ---- ten thousand mutations

EVIL = (-1, 0, 1, 2**20, 2**31, 2**63, 10**30, 1.5, "", "a.codes", "rans.words", "int8", "uint32", "object", None, True, [], {}, [0, 7],
        [2**40, 2**40], [1] * 70)


def shaken(data, draw):
    """Bytes with a few bits flipped, cut, or with a part repeated, moved, overwritten or replaced by noise."""
    data = bytearray(data)
    low = draw.randrange(len(data))
    high, to = min(len(data), low + draw.choice((1, 2, 7, 60))), draw.randrange(len(data))
    kind = draw.randrange(7)
    if kind < 3:
        for _ in range(draw.choice((1, 1, 4))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 3:
        del data[low : high if draw.random() < 0.5 else len(data)]
    elif kind == 4:
        data[to:to] = data[low:high]
    else:
        data[low:high] = bytes(draw.choice((0, 255)) for _ in range(high - low)) if kind == 5 else draw.randbytes(high - low)
    return bytes(data)


def edited_header(body, draw):
    """The body with one place of its list of tensors changed, removed or repeated."""
    start = 4 + int.from_bytes(body[:4], "little")
    header = json.loads(body[4:start])
    owner, place = header, "tensors"
    while isinstance(owner[place], list) and owner[place] and draw.random() < 0.85:
        owner, place = owner[place], draw.randrange(len(owner[place]))
    if isinstance(owner, list) and draw.random() < 0.3:
        owner[place : place + 1] = [[], owner[place : place + 1] * 2][draw.randrange(2)]
    else:
        owner[place] = draw.choice(EVIL) if draw.random() < 0.7 else header["tensors"]
    try:
        text = json.dumps(header).encode()
    except ValueError:  # a list that holds itself
        return body
    return len(text).to_bytes(4, "little") + text + body[start:]


@pytest.mark.parametrize("name, count", [("zstd", 6000), ("brotli", 2000), ("rans", 1200)])
def test_no_mutation_ends_in_anything_but_a_clean_error(name, count):
    """The checksum is made anew, so that the change reaches the compressor; three of four are made below it and reach the parser."""
    halves = {name: torch.linspace(0.1, 3, size).half() for name, size in (("a.scales", 30), ("a.columns", 40), ("b.scales", 7), ("gain", 4))}
    tensors = halves | {"a.codes": codes_of("scaled", 30, 40), "b.codes": codes_of("one", 7, 5)}
    draw, blob = random.Random(name), t.pack(tensors, False, dataclasses.replace(CFG, compressor=name))
    body, refused = unpacked_body(blob), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(count):
            inner = (shaken, edited_header, shaken)[i % 3](body, draw)
            data = shaken(blob[48:], draw) if i % 4 == 0 else PACKERS[name](inner)
            try:
                header, found = unpacked(sealed(data, name))
                assert {n: (ON_WIRE.get(w.dtype, str(w.dtype)[6:]), list(w.shape)) for n, w in found.items()} == claimed(header)
            except t.InputError as error:
                refused += 1
                assert "\n" not in str(error)
    assert 0.3 * count < refused < count
