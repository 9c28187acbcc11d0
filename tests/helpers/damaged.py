"""Damaged and forged artifacts, shards, sidecars and tokenizers, made of valid ones. The artifact's format is written here from its description."""

import hashlib
import json
import math
import os
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import brotli
import numpy as np
import torch
import zstandard

import train_gpt as t

TABLE, STATE, WORDS = "rans.table", "rans.state", "rans.words"
ZEROS = np.where(np.arange(256)[:, None] == 0, 4096, np.zeros((256, 48))).astype("<u2")
FREE = {TABLE: ZEROS, STATE: np.full(1024, 2**16, np.uint32), WORDS: np.zeros(0, np.uint16)}  # an entropy coder that spends no bit on zeros


# ----------------------------------------
# Valid files


class Base(NamedTuple):
    """A valid artifact, in parts, and the environment that evaluates it."""

    blob: bytes
    compressor: str
    header: dict
    raw: bytes
    arrays: dict
    env: dict


def opened(blob: bytes, env: dict) -> Base:
    compressor = blob[40:48].decode().strip()
    body = brotli.decompress(blob[48:]) if compressor == "brotli" else zstandard.ZstdDecompressor().decompressobj().decompress(blob[48:])
    start = 4 + int.from_bytes(body[:4], "little")
    header, raw, arrays, at = json.loads(body[4:start]), body[start:], {}, 0
    for name, dtype, shape in header["tensors"]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(np.frombuffer(raw, np.uint8, size, at).reshape(np.dtype(dtype).itemsize, -1).T.tobytes(), dtype).reshape(shape)
        at += size
    assert at == len(raw)
    return Base(blob, compressor, header, raw, arrays, env)


def squeeze(compressor: str, pieces) -> bytes:
    if compressor == "brotli":
        packer = brotli.Compressor(quality=2)
        return b"".join([*map(packer.process, pieces), packer.finish()])
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    return b"".join([*map(packer.compress, pieces), packer.flush()])


def sealed(base: Base, packed: bytes, compressor: bytes = b"") -> bytes:
    """An artifact with the right checksum around any compressed bytes."""
    rest = (compressor or base.compressor.encode().ljust(8)) + packed
    return base.blob[:8] + hashlib.sha256(rest).digest() + rest


def artifact(base: Base, text: bytes, pieces=None, length: int = -1) -> bytes:
    """An artifact with any text as its header, any bytes as its tensors, any length of the header."""
    size = (len(text) if length < 0 else length).to_bytes(4, "little")
    return sealed(base, squeeze(base.compressor, [size, text, *([base.raw] if pieces is None else pieces)]))


def planes(array) -> bytes:
    return np.frombuffer(array.tobytes(), np.uint8).reshape(-1, array.itemsize).T.tobytes()


def text_of(base: Base, changes: dict, settings: dict | None = None) -> bytes:
    """The header's JSON with other JSON texts at some places: {("settings", "SEED"): "1e999"}. A place that ends in None names a new key."""
    header = json.loads(json.dumps(base.header))
    header["settings"] |= settings or {}
    for number, (*parents, last) in enumerate(changes):
        place = header
        for key in parents:
            place = place[key]
        place[f"@{number}@" if last is None else last] = "1" if last is None else f"@{number}@"
    text = json.dumps(header)
    for number, raw in enumerate(changes.values()):
        text = text.replace(f'"@{number}@"', raw)
    return text.encode("utf-8", "surrogatepass")


def with_arrays(base: Base, arrays: dict, entries: dict | None = None, settings: dict | None = None) -> bytes:
    """An artifact with other arrays, or None for none; `entries` has what the header says of them, if not the truth."""
    arrays = {name: array for name, array in (base.arrays | arrays).items() if array is not None}
    listed = [(entries or {}).get(name, [name, str(array.dtype), list(array.shape)]) for name, array in arrays.items()]
    return artifact(base, text_of(base, {("tensors",): json.dumps(listed)}, settings), map(planes, arrays.values()))


def grown(base: Base, **settings) -> bytes:
    """A model of other settings whose weights are all zero, in an artifact whose tensors fit them: kilobytes for any size."""
    try:
        cfg = t.Config.from_env(base.header["settings"] | settings)
    except t.InputError:  # no model has these settings
        return artifact(base, text_of(base, {}, settings))
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in t.GPT(cfg).named_parameters()}
    listed = [[name, str(array.dtype), list(array.shape)] for name, array in FREE.items()] if base.compressor == "rans" else []
    raw = [planes(array) for array in FREE.values()] if listed else []
    for name, shape in shapes.items():
        if len(shape) != 2:
            new = [[name, "float32", shape]]
        elif base.compressor == "rans":
            new = [[f"{name}.codes.rows", "uint8", shape[:1]], [f"{name}.codes.columns", "uint8", shape[1:]]]
        else:
            new = [[f"{name}.codes", "int8", shape]]
        if len(shape) == 2:
            new += [[f"{name}.scales", "float16", shape[:1]], [f"{name}.columns", "float16", shape[1:]]]
        listed += new
        raw += [bytes(math.prod(shape) * np.dtype(dtype).itemsize) for _, dtype, shape in new]
    return artifact(base, text_of(base, {("tensors",): json.dumps(listed)}, settings), raw)


# ----------------------------------------
# Mutated files


def mutated(data: bytes, rng: Random) -> bytes:
    """`data` with one to four flips, cuts, insertions, splices or filled ranges."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        i, j, n = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1), 2 ** rng.randrange(12)
        match rng.choice("fffcdisr") if data else "i":
            case "f":
                for _ in range(rng.choice((1, 1, 8))):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case "c":
                del data[i:]
            case "d":
                del data[i : i + n]
            case "i":
                data[i:i] = rng.randbytes(n)
            case "s":
                data[i:i] = data[j : j + n]
            case "r":
                data[i : i + n] = bytes([rng.choice((0, 1, 127, 255))]) * len(data[i : i + n])
    return bytes(data)


# JSON texts that are no setting, shape or name
ODD = """NaN Infinity -Infinity -0 1e999 1.5 true null [] {} [[1]] "" "0" "-1" "nan" "1e999" "1.5" "\\u0661" "1_0" "a\\nb" "\\u001b[2J" "\\u202e"
"\\u0000" "\\ud800" 0 -1 1 "1000000000000" """.split()
ODD += [str(10**30), f'"{10**30}"', "9" * 400, "9" * 5000, f'"{"9" * 400}"', f'"{"9" * 5000}"', '" 1 "', f'"{"x" * 10**5}"']
ODD += ["[" * 2000 + "]" * 2000, "[" * 10**5, '{"a":' * 10**5]


def some_place(header, rng: Random) -> tuple:
    """A random place of the header, each level as likely as the others."""
    place = ()
    while isinstance(header, (dict, list)) and header and (not place or rng.random() < 0.8):
        key = rng.choice([*header] if isinstance(header, dict) else range(len(header)))
        place, header = (*place, key), header[key]
    return place


def mutated_artifact(base: Base, level: str, rng: Random, folder: Path):
    """Bytes changed in the file (and in the others behind a right checksum) | its compressed part | header and tensors | header | tensors | one value
    of the header.
    """
    text = json.dumps(base.header).encode()
    match level:
        case "file":
            blob = mutated(base.blob, rng)
        case "packed":
            blob = sealed(base, mutated(base.blob[48:], rng))
        case "body":
            blob = sealed(base, squeeze(base.compressor, [mutated(len(text).to_bytes(4, "little") + text + base.raw, rng)]))
        case "header":
            blob = artifact(base, mutated(text, rng))
        case "tensors":
            blob = artifact(base, text, [mutated(base.raw, rng).ljust(len(base.raw))[: len(base.raw)]])
        case "values":
            blob = artifact(base, text_of(base, {some_place(base.header, rng): rng.choice(ODD)}))
    (folder / "x.ptz").write_bytes(blob)


def mutated_shard(source: Path, rng: Random, folder: Path):
    """Bytes changed in the header, or anywhere; in half of the latter the header's count is right."""
    data = source.read_bytes()
    if rng.random() < 0.3:
        data = mutated(data[:12], rng).ljust(12)[:12] + data[12:]
    else:
        data = mutated(data, rng)
        if rng.random() < 0.7:
            data = shard(data[1024 : len(data) // 2 * 2])
    put(folder, source.name, data)


def shard(tokens, magic=20240520, version=1, count=None) -> bytes:
    tokens = tokens if isinstance(tokens, bytes) else np.asarray(tokens, "<u2").tobytes()
    return np.array([magic, version, len(tokens) // 2 if count is None else count] + [0] * 253, "<i4").tobytes() + tokens


def put(folder: Path, name: str, data: bytes):
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(data)


def linked(source: Path, folder: Path):
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)


# ----------------------------------------
# Forged artifacts: (kind, name, whether it must be refused, function without arguments that returns the file)

DTYPES = "int8 uint8 int16 uint16 uint32 int64 uint64 float16 float32 float64 bool complex64 object <U4 S3 V3 datetime64[s] i,i (9,)u1 >u2 S0".split()
SHAPES = "[] [0] [-4] [1125899906842624] [1180591620717411303424] [4611686018427387904,4] [1.0] [true] [null] [[1]] [\"2\"] {} null 7 \"12\"".split()
BOUNDS = ["0", "1", "-1", "1000000000", "1000000000000", str(10**30), "1e30", "1e308", "5e-324", str(2**63), str(2**20), "131072"]
EXTREMES = [
    dict(TTT_LORA_RANK=10**9, TTT_EPOCHS=1), dict(TTT_LORA_RANK=10**5, TTT_EPOCHS=1, TTT_SCOPE="document"),
    dict(TTT_LORA_RANK=10**5, TTT_SCOPE="stream", TTT_EPOCHS=1), dict(EVAL_SEQ_LEN=131072, DOCUMENT_ATTENTION=1), dict(EVAL_SEQ_LEN=131072),
    dict(EVAL_SEQ_LEN=2**20), dict(EVAL_SEQ_LEN=2**20, DOCUMENT_ATTENTION=1),
    dict(TRAIN_SEQ_LEN=2**20, TRAIN_BATCH_TOKENS=2**20, MICRO_BATCH_TOKENS=2**20), dict(TTT_EPOCHS=10**12), dict(TTT_EPOCHS=10**5), dict(TTT_EPOCHS=10**30),
    dict(NUM_LAYERS=1000), dict(MODEL_DIM=65536), dict(MODEL_DIM=65536, NUM_HEADS=1, NUM_KV_HEADS=1, ROPE_DIMS=0), dict(MLP_MULT=1e30), dict(MLP_MULT=1e308),
    dict(NUM_LOOPS=100, LOOP_START=0, LOOP_END=3), dict(NUM_LAYERS=1000, NUM_LOOPS=100, LOOP_START=0, LOOP_END=999), dict(EVAL_STRIDE=1, TTT_CHUNK_TOKENS=1),
    dict(TTT_CHUNK_TOKENS=1, TTT_SCOPE="document"), dict(EVAL_BATCH_SEQS=1), dict(TTT_BATCH_SEQS=10**9), dict(VE_LAYERS="2," * 10**6),
    dict(VE_LAYERS="2," * 10**5), dict(TTT_PARAMS="*," * 10**6), dict(TTT_PARAMS="*a" * 10**4), dict(TTT_PARAMS="*" * 10**5),
    dict(TTT_PARAMS="[" * 10**5), dict(TTT_PARAMS="!*"),
    dict(CLIP_SHARES="1," * 10**6), dict(EARLY_SEQ_LENS="2," * 10**6), dict(TTT_LR=1e308), dict(TTT_LR=1e30, TTT_EPOCHS=3), dict(LOGIT_SOFTCAP=1e308),
    dict(ROPE_BASE=1e308), dict(LN_SCALE_POWER=1e308), dict(TTT_LORA_RANK=1, TTT_LORA_SCALE=1e308, TTT_EPOCHS=3), dict(TTT_WEIGHT_DECAY=1e308, TTT_EPOCHS=3),
    dict(TTT_Z_LOSS=1e308, TTT_EPOCHS=3), dict(TTT_GRAD_CLIP=5e-324, TTT_EPOCHS=3), dict(TTT_COSINE_TOKENS=10**30), dict(TTT_TEMPERATURE=0.1), dict(SEED=2**63),
    dict(DTYPE="bf16"), dict(VARIANT="frontier"), dict(OUTPUT_DIR="/tmp"), dict(AUDIT="x.npz"), dict(EVAL_ONLY="0"), dict(VAL_MAX_TOKENS=5)]


# Models of few weights that are large in what they compute, and one of many weights
GROWN = [
    dict(MODEL_DIM=1024), dict(MODEL_DIM=1792), dict(MODEL_DIM=8192), dict(MODEL_DIM=32, MLP_MULT=3000.0), dict(MODEL_DIM=32, BIGRAM_VOCAB_SIZE=4_000_000),
    dict(MODEL_DIM=32, BIGRAM_DIM=500_000), dict(MODEL_DIM=32, VE_DIM=100_000),
    dict(MODEL_DIM=32, EVAL_SEQ_LEN=2048, TTT_CHUNK_TOKENS=65536, DOCUMENT_ATTENTION=1),
    dict(MODEL_DIM=32, NUM_LAYERS=200, NUM_LOOPS=16, LOOP_START=0, LOOP_END=199), dict(MODEL_DIM=32, EVAL_SEQ_LEN=16384, EVAL_STRIDE=1),
    dict(MODEL_DIM=288, TTT_LORA_RANK=256, TTT_SCOPE="document", TTT_BATCH_SEQS=1024, TTT_CHUNK_TOKENS=16, TTT_PARAMS="*", TTT_GRAD_CLIP=0, TTT_EPOCHS=1),
    dict(MODEL_DIM=32, MLP_MULT=400.0, EVAL_SEQ_LEN=2048, TTT_CHUNK_TOKENS=65536),
    dict(MODEL_DIM=32, MLP_MULT=400.0, TTT_BATCH_SEQS=1024, TTT_CHUNK_TOKENS=65536),
    dict(MODEL_DIM=32, EVAL_SEQ_LEN=8192, TTT_CHUNK_TOKENS=65536), dict(MODEL_DIM=288, NUM_HEADS=144, NUM_KV_HEADS=144, ROPE_DIMS=0)]


def padded(blob: bytes, count: int) -> bytes:
    """The file with bytes behind its compressed part, and the right checksum."""
    return blob[:8] + hashlib.sha256(blob[40:] + bytes(count)).digest() + blob[40:] + bytes(count)


def forgeries(bases: dict, rng: Random) -> list:
    """All of them. Some settings, names and values are drawn by `rng`."""
    rans, plain = bases["rans"], bases["zstd"]
    return [*forged_coders(rans), *forged_lists(rans), *forged_lists(plain), *forged_sizes(rans, plain, bases["brotli"]), *forged_texts(bases, rng),
            *forged_weights(bases)]


def forged_coders(rans: Base):
    """Tensors of the entropy coder in other dtypes, and tables that do not add up."""
    rows, columns = (next(name for name in rans.arrays if name.endswith(f".codes.{kind}")) for kind in ("rows", "columns"))
    for name in (TABLE, STATE, WORDS, rows, columns):
        array = rans.arrays[name]
        for dtype in DTYPES:
            kind = np.dtype(dtype)
            if kind != array.dtype:
                known = kind.kind in "iufbc"
                with np.errstate(all="ignore"):
                    stored = array.astype(kind) if known else np.zeros((array.size, max(kind.itemsize, 1)), np.uint8)
                entry = json.dumps([name, dtype, list(array.shape)])
                yield "coder dtypes", f"{name} {dtype}", True, partial(with_arrays, rans, {name: stored}, {name: entry})
    table = rans.arrays[TABLE]
    for dtype in ("int64", "uint64"):
        for tail in (0, 4096, 2**40):
            wrapped = np.zeros(table.shape, dtype)
            wrapped[:4] = 2**62
            wrapped[3] += tail
            yield "coder values", f"{dtype} table whose sum wraps to {tail}", True, partial(with_arrays, rans, {TABLE: wrapped})
    negative = np.zeros(table.shape, np.int64)
    negative[:2] = [[-(2**20)], [2**20 + 4096]]
    state, words, rows_of, columns_of = (rans.arrays[name] for name in (STATE, WORDS, rows, columns))
    changed = {TABLE: [0 * table, table.T.copy(), table + 1, negative, ZEROS],
               STATE: [0 * state, state + 1, state[:-1], np.full_like(state, 2**32 - 1)],
               WORDS: [words[:-1], words[:0], np.append(words, words), ~words],
               rows: [rows_of[:-1], np.append(rows_of, rows_of), np.full_like(rows_of, 255), rows_of[:0], None],
               columns: [columns_of[:-1], columns_of + 40, columns_of[:0], np.zeros(2**20, np.uint8), None]}
    for name, values in changed.items():
        for number, value in enumerate(values):
            yield "coder values", f"{name} {number}", number != 0 or name in (rows, columns, WORDS), partial(with_arrays, rans, {name: value})


def forged_lists(base: Base):
    """Shapes, dtypes and names that the list of tensors claims."""
    firsts = {name.rsplit(".", 1)[-1]: number for number, (name, *_) in reversed([*enumerate(base.header["tensors"])])}
    strings = ("\ud800.codes", WORDS, "tok_emb.weight", ".codes", "codes", "../x", "__class__", "O", ">u2", "V1000000000", "U1000000000",
               "(1000000,)i8", "i,i", "S0")
    odd = [raw for raw in ODD if len(raw) < 200] + [json.dumps(string) for string in strings]
    for end, number in firsts.items():
        array = base.arrays[base.header["tensors"][number][0]]
        for raw in [*SHAPES, json.dumps([1, *array.shape]), json.dumps([*array.shape, 1]), json.dumps([array.size]), json.dumps([array.size + 1])]:
            if raw != json.dumps(list(array.shape)):
                yield "shapes", f"{end} {raw}", True, partial(artifact, base, text_of(base, {("tensors", number, 2): raw}))
    number = next(iter(firsts.values()))
    for place in (("tensors",), ("tensors", number), ("tensors", number, 0), ("tensors", number, 1), ("tensors", number, 2)):
        for raw in odd:
            if raw not in map(json.dumps, base.header["tensors"][number]):
                yield "list of tensors", f"{place} {raw[:40]}", True, partial(artifact, base, text_of(base, {place: raw}))
    names = [*base.arrays]
    for name in names[:: max(len(names) // 8, 1)]:
        yield "list of tensors", f"lacks {name}", True, partial(with_arrays, base, {name: None})
        for more in (f"{name}.codes", f"{name}.scales", f"{name}.columns", f"{name}x", f"x.{name}"):
            yield "list of tensors", f"adds {more}", True, partial(with_arrays, base, {more: np.zeros(3, np.float16)})
        again = json.dumps([*base.header["tensors"], [name, str(base.arrays[name].dtype), [0]]])
        yield "list of tensors", f"{name} twice", True, partial(artifact, base, text_of(base, {("tensors",): again}))
        other = base.arrays[name].astype(np.float64 if base.arrays[name].dtype != np.float64 else np.float32)
        yield "list of tensors", f"{name} {other.dtype}", True, partial(with_arrays, base, {name: other})


def forged_sizes(rans: Base, plain: Base, squeezed: Base):
    """Kilobytes that claim or unpack to gigabytes."""
    owner = next(name for name in rans.arrays if name.endswith(".codes.rows")).removesuffix(".rows")
    for rows, columns in ((11585, 11585), (2**13, 2**14), (2**27, 1), (1, 2**27), (2**16, 2**16), (2**20, 2**20), (0, 2**27)):
        classes = {f"{owner}.rows": np.zeros(rows, np.uint8), f"{owner}.columns": np.zeros(columns, np.uint8)}
        yield "sizes", f"entropy-coded zeros {rows} x {columns}", True, partial(with_arrays, rans, FREE | classes)
    for settings in GROWN:
        for name, base in (("rans", rans), ("zstd", plain), ("brotli", squeezed)):
            changes = {option: str(value) for option, value in settings.items()}
            yield "sizes", f"{name}, weights of zero, {changes}", False, partial(grown, base, **changes)
            behind = partial(lambda base, changes: padded(grown(base, **changes), 12_000_000), base, changes)
            yield "sizes", f"{name}, 12 MB behind weights of zero, {changes}", True, behind
    empty = "".join(f', ["e{i}", "int8", [0]]' for i in range(2_000_000))
    gigabyte = [bytes(2**20)] * 2**10
    for name, base in (("rans", rans), ("zstd", plain), ("brotli", squeezed)):
        text = text_of(base, {})
        many = {("tensors",): json.dumps(base.header["tensors"])[:-1] + empty + "]"}
        yield "sizes", f"{name}, two million empty tensors", True, lambda base=base, many=many: artifact(base, text_of(base, many))
        zeros = json.dumps([*base.header["tensors"], ["x.codes", "int8", [768, 2**20]]])
        yield "sizes", f"{name}, 768 MiB of codes", True, partial(artifact, base, text_of(base, {("tensors",): zeros}), [base.raw, *gigabyte[:768]])
        yield "sizes", f"{name}, 1 GiB behind the tensors", True, partial(artifact, base, text, [base.raw, *gigabyte])
        yield "sizes", f"{name}, 4 GiB behind the tensors", True, partial(artifact, base, text, [base.raw, *gigabyte * 4])
        yield "sizes", f"{name}, 4 GiB of zeros and no header", True, partial(artifact, base, b"", gigabyte * 4)
        for length in (0, 1, len(text) - 1, len(text) + 1, len(text) + len(base.raw) + 1, 2**31, 2**32 - 1):
            yield "sizes", f"{name}, header of {length} bytes", True, partial(artifact, base, text, None, length)
        for what, filler in dict(spaces=b" ", zeros=b"\0", brackets=b"[", quotes=b'"', numbers=b"0,", letters=b"a").items():
            for megabytes in (8, 960):
                start = b"" if what in ("spaces", "zeros", "brackets") else {"quotes": b"[", "numbers": b"[", "letters": b'"'}[what]
                pieces = [start, *[filler * (2**20 // len(filler))] * megabytes]
                yield "sizes", f"{name}, header of {megabytes} MiB of {what}", True, partial(artifact, base, b"", pieces, len(start) + megabytes * 2**20)
        for compressor in (b"lzma    ", b"\xff" * 8, b"rans\n   ", b"zstd\0\0\0\0", bytes(8), b"\x1b[2Jzstd", b"__main__", b"brotli  ", b"zstd    "):
            if compressor.decode("latin1").split() != [base.compressor] and {compressor.strip().decode("latin1"), base.compressor} != {"zstd", "rans"}:
                yield "sizes", f"{name} as {compressor}", True, partial(sealed, base, base.blob[48:], compressor)
    yield "sizes", "zstd that claims 4 TiB", True, partial(sealed, plain, bytes.fromhex("28b52ffde0") + (2**42).to_bytes(8, "little") + b"\x01\x00\x00")


def forged_texts(bases: dict, rng: Random):
    """Values and names of settings, other fields of the header, extreme values in their range."""
    for label, base in bases.items():
        names = [*base.header["settings"]]
        for name in names:
            for raw in rng.sample(ODD, 2):
                yield "settings, odd values", f"{label} {name}={raw[:40]}", False, partial(artifact, base, text_of(base, {("settings", name): raw}))
            for raw in rng.sample(BOUNDS, 2):
                yield "settings, extremes", f"{label} {name}={raw[:40]}", False, partial(artifact, base, text_of(base, {("settings", name): f'"{raw}"'}))
        for extreme in EXTREMES:
            changes = {name: str(value) for name, value in extreme.items()}
            yield "settings, extremes", f"{label} {str(changes)[:80]}", False, partial(artifact, base, text_of(base, {}, changes))
        for raw in ['"X"', '"a\\nb"', '"\\u001b[2J"', '"\\u202e"', '"\\u0000"', '"\\ud800"', '""', '"MATRIX_LR"', '"seed"', '"SEED "', f'"{"X" * 10**6}"']:
            yield "settings, names", f"{label} adds {raw[:40]}", True, partial(artifact, base, text_of(base, {("settings", None): raw + ': "1", "Y"'}))
            yield "settings, names", f"{label} adds only {raw[:40]}", True, partial(artifact, base, text_of(base, {("settings", None): raw}))
        for name in rng.sample(names, 4):
            kept = json.dumps({other: value for other, value in base.header["settings"].items() if other != name})
            yield "settings, names", f"{label} lacks {name}", False, partial(artifact, base, text_of(base, {("settings",): kept}))
            yield "settings, names", f"{label} {name} twice", False, partial(artifact, base, text_of(base, {("settings", None): f'"{name}"'}))
        for field in ("settings", "looped", "tokenizer_sha256", "tensors"):
            for raw in ODD:
                yield "fields", f"{label} {field} {raw[:40]}", True, partial(artifact, base, text_of(base, {(field,): raw}))
        for raw in [*ODD, "", "\ufeff{}", '{"tensors": []}', '{"settings": {}, "tensors": []}']:
            yield "fields", f"{label} header {raw[:40]}", True, partial(artifact, base, raw.encode("utf-8", "surrogatepass"))
        for tail in (b"\xff", b"\xed\xa0\x80", b"{}", b"\0", b" " * 1000):
            yield "fields", f"{label} {tail[:4]} behind the header", tail[:1] != b" ", partial(artifact, base, text_of(base, {}) + tail)


def forged_weights(bases: dict):
    """Codes, scales, columns and weights that are NaN, infinite, huge or tiny: one of them, or all."""
    for label, base in bases.items():
        last = {(name.rsplit(".", 1)[-1], str(array.dtype)): name for name, array in base.arrays.items() if array.size and array.dtype.kind == "f"}
        for name in sorted({*last.values(), *list(base.arrays)[-2:]}):
            array = base.arrays[name]
            if array.dtype.kind == "f":
                for value in (np.nan, np.inf, -np.inf, np.finfo(array.dtype).max, -np.finfo(array.dtype).max, np.finfo(array.dtype).tiny / 2, -0.0):
                    for count in (1, array.size):
                        changed = array.copy()
                        changed.reshape(-1)[:count] = value
                        yield "weights", f"{label} {name}[:{count}] = {value}", not np.isfinite(value), partial(with_arrays, base, {name: changed})
        for name in [name for name in base.arrays if name.endswith(".codes")][:2]:
            for value in (-128, 127, 0):
                yield "weights", f"{label} {name} = {value}", False, partial(with_arrays, base, {name: np.full_like(base.arrays[name], value)})


# ----------------------------------------
# Forged shards, sidecars and tokenizers: (name, whether it must be refused, function of the folder)

PLACES = {  # what may stand in the place of a file
    "a folder": lambda path: path.mkdir(), "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name), "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"), "a FIFO": os.mkfifo,
    "a link to a folder": lambda path: path.symlink_to("."), "empty": lambda path: path.write_bytes(b""), "nothing": lambda path: None,
    "text": lambda path: path.write_text("text\n" * 999), "gzip": lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(3000)),
    "noise": lambda path: path.write_bytes(Random(0).randbytes(300_000))}


def replaced(name: str, put, folder: Path):
    (folder / name).unlink(missing_ok=True)
    put(folder / name)


def forged_shards(name: str, tokens: np.ndarray):
    """In the place of the shard `name`, which holds `tokens`."""
    val = name.startswith("fineweb_val_0")
    blobs = {"one token": (False, shard(tokens[:1])), "two tokens": (False, shard(tokens[:2])), "no token": (True, shard([])),
             "only BOS": (val, shard(0 * tokens + 1)), "no BOS": (False, shard(0 * tokens + 5)),
             "one token too high": (True, shard(np.append(tokens[:40], [60000, *tokens[40:]]))),
             "all tokens too high": (True, shard(0 * tokens + 65535)), "magic": (True, shard(tokens, magic=7)), "version": (True, shard(tokens, version=2)),
             "big-endian": (True, np.frombuffer(shard(tokens), "<i4", 256).astype(">i4").tobytes() + shard(tokens)[1024:]),
             "odd": (True, shard(tokens) + b"\0")}
    blobs |= {f"count {count}": (True, shard(tokens, count=count)) for count in (0, 1, -1, -(2**31), 2**31 - 1, len(tokens) - 1, len(tokens) + 1)}
    blobs |= {f"cut at {size}": (True, shard(tokens)[:size]) for size in (1, 3, 11, 12, 1023, 1024, 1025, 1026)}
    for what, (refuse, blob) in blobs.items():
        yield f"{name}: {what}", refuse, partial(put, name=name, data=blob)
    for what, place in PLACES.items():
        yield f"{name}: {what}", True, partial(replaced, name, place)
        if what != "nothing":
            yield f"one more, {name[:-10]}9.bin: {what}", True, partial(replaced, f"{name[:-10]}9.bin", place)
    for odd in ("\x1b[2J", "\n", "\u202e", " "):
        yield f"one more, damaged, of the name {odd!r}", True, partial(put, name=f"{name[:-10]}{odd}.bin", data=b"")


def forged_sidecars(name: str, counts: np.ndarray):
    """In the place of the sidecar `name`, which holds `counts`."""
    for factor in (0.0, 0.5, 0.9, 1.1, 1.199, 2.0, 100.0):
        scaled = np.floor(np.cumsum(np.append(0.0, counts * factor)))  # to the byte
        yield f"{name}: times {factor}", True, partial(put, name=name, data=shard(np.diff(scaled)))
    blobs = dict(highest=0 * counts + 65535, BOS=counts + (counts == 0), rolled=np.roll(counts, 1), short=counts[:-1],
                 long=np.append(counts, 1), moved=np.append(counts[1:], 0))
    for what, array in blobs.items():
        yield f"{name}: {what}", what in ("highest", "short", "long"), partial(put, name=name, data=shard(array))


def forged_tokenizers(model: Path, other: Path, dataset: Path):
    """In the place of a tokenizer: `other` has another number of pieces, `dataset` is a shard."""
    data, space = model.read_bytes(), "\u2581".encode()
    blobs = {"another size": other.read_bytes(), "a shard": dataset.read_bytes(), "twice": data * 2, "noise behind": data + b"\xff" * 9,
             "noise before": b"\xff" + data, "spaces in pieces": data.replace(space, b"   "), "letters for spaces": data.replace(space, b"abc"),
             "no UTF-8 in pieces": data.replace(space, b"\xff\xfe\xfd"), "NUL in pieces": data.replace(space, b"\0\0\0"),
             "line ends in pieces": data.replace(space, b"\n\x1b["), "header only": data[:9]}
    for what, blob in blobs.items():
        yield what, what in ("another size", "a shard", "spaces in pieces", "no UTF-8 in pieces", "header only"), partial(put, name="x.model", data=blob)
    for what, place in PLACES.items():
        yield what, True, partial(replaced, "x.model", place)


def mutated_tokenizer(model: Path, rng: Random, folder: Path):
    (folder / "x.model").write_bytes(mutated(model.read_bytes(), rng))
