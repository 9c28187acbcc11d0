"""Text -> ids: JSON-lines files in blocks, and SentencePiece tokenizers that encode them.

prepare.py reads, many processes encode: a Block goes out, an Encoded comes back. Memory is bounded by the block,
or by a few times the size of a document that is larger.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import case
import numpy as np
import sentencepiece
import zstandard

import train_gpt  # the shard format is the training script's
from train_gpt import InputError

TEXT_BLOCK = 1 << 19  # bytes of JSON lines that one worker encodes at a time
WANTED = 'the input must be JSON lines, plain or zstd: each line an object {"text": "..."}'
LONGEST_LINE = 1 << 28  # bytes of one JSON line: bounds the memory that a small zstd file can ask for
PART = 1 << 18  # characters of a document that SentencePiece, which takes about 45 bytes for each, sees at a time
LONGEST_PART = 1 << 23  # of one that has no place to be cut at
CUT = re.compile(r"""(?<=[\w.,;:!?)"'。、，！？」])[ \n]""")  # after what normalization leaves, and not as a space
MAX_PIECES = 65536  # ids of a shard are uint16
BYTE_PIECES = {f"<0x{i:02X}>" for i in range(256)}
CONTEST_TRAINER = dict(
    model_type="bpe", character_coverage=0.999, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
    normalization_rule_name="nmt_nfkc", pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False)


# ---------------------------------------- text: files -> blocks of JSON lines

class Block(NamedTuple):
    """Whole lines of a JSON-lines file: where they stand, how many, and their bytes."""

    path: Path
    first: int
    lines: int
    data: bytes

    def part(self, low: int, high: int) -> Block:
        data = b"".join(line + b"\n" for line in self.data.split(b"\n")[low:high])
        return Block(self.path, self.first + low, high - low, data)

    def texts(self) -> Iterator[str]:
        """The `text` of each line. Raises InputError that names the line."""
        for number, line in enumerate(self.data.split(b"\n")[:-1], self.first):
            try:
                yield text_of(line.removeprefix(codecs.BOM_UTF8))
            except ValueError as error:
                raise InputError(f"{self.path}, line {number} {error}; {WANTED}") from None


def text_of(line: bytes) -> str:
    """The `text` of one JSON line. Raises ValueError that says what is wrong with the line."""
    if not line.strip():
        raise ValueError("is empty")
    try:
        found = json.loads(str(line, "utf-8"), parse_int=float)  # Python refuses integers of more than 4,300 digits
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError:
        raise ValueError("is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    if not isinstance(text := found.get("text"), str):
        raise ValueError('has no string "text"')
    if re.search("[\ud800-\udfff]", text):
        raise ValueError('has a lone surrogate in its "text"')
    return text


def unpacked(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed if it is zstd. Raises InputError where the last frame is truncated."""
    frame = None
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file (a folder or a pipe); give a file of JSON lines, plain or zstd")
    with open(path, "rb") as file:
        is_zstd = path.suffix == ".zst" or file.read(4) == zstandard.FRAME_HEADER
        file.seek(0)
        while chunk := file.read(1 << 14):  # zstd can pack text 30,000 times: this bounds what comes out at once
            while chunk and is_zstd:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk, frame = frame.unused_data, None if frame.eof else frame
            yield chunk
    if frame:
        raise InputError(f"cannot read {path}: it is cut, its last zstd frame has no end")


def blocks_of(path: Path) -> Iterator[Block]:
    """The lines of one file in blocks; a last line without its end gets one."""
    waiting, size, first = [], 0, 1
    for chunk in unpacked(path):
        if not size and first == 1 and chunk.removeprefix(codecs.BOM_UTF8)[:1] not in b"{ \t\r\n":
            raise InputError(f"{path}, line 1 does not begin with a JSON object; {WANTED}")
        waiting.append(chunk)
        size += len(chunk)
        if size >= TEXT_BLOCK and b"\n" in chunk:
            whole, _, rest = b"".join(waiting).rpartition(b"\n")
            block = Block(path, first, whole.count(b"\n") + 1, whole + b"\n")
            waiting, size, first = [rest], len(rest), first + block.lines
            yield block
        elif size > LONGEST_LINE:
            line = first + b"".join(waiting).count(b"\n")
            raise InputError(f"{path}, line {line} has more than {LONGEST_LINE:,} bytes; split the document")
    if last := b"".join(waiting):
        last = last if last.endswith(b"\n") else last + b"\n"
        yield Block(path, first, last.count(b"\n"), last)


def read_blocks(paths: Iterable[Path]) -> Iterator[Block]:
    """The lines of JSON-lines files in order, in blocks of about TEXT_BLOCK bytes."""
    for path in paths:
        try:
            yield from blocks_of(path)
        except (OSError, zstandard.ZstdError) as error:
            why = error.strerror if isinstance(error, OSError) else f"not zstd, or damaged ({error})"
            raise InputError(f"cannot read {path}: {why}") from None


def json_blocks(texts: Iterable[str]) -> Iterator[Block]:
    """Documents in memory, as if they had been read from a file."""
    for i, text in enumerate(texts, 1):
        yield Block(Path("memory"), i, 1, json.dumps({"text": text}).encode() + b"\n")


def lines_between(blocks: Iterator[Block], start: int, stop: float = float("inf")) -> Iterator[Block]:
    """Lines start .. stop - 1 of all blocks together."""
    at = 0
    for block in blocks:
        low, high = max(start - at, 0), int(min(stop - at, block.lines))
        at += block.lines
        if low < high:
            yield block if high - low == block.lines else block.part(low, high)
        if at >= stop:
            return


# ---------------------------------------- tokenizer: text -> ids

@functools.cache
def processor(model: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer at `model`, loaded once a process. Raises InputError where it is damaged or unfit for shards."""
    sentencepiece.set_min_log_level(3)  # an error is told in one line
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())  # of any path, Unicode or not
        pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        sp.decode(sp.encode("".join(map(chr, range(32, 0x500)))))
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {model}: {error.strerror}") from None
    except (RuntimeError, ValueError):
        raise InputError(f"{model} is not a SentencePiece model, or it is damaged; get it again") from None
    if sp.bos_id() != train_gpt.BOS or len(pieces) > MAX_PIECES:
        raise InputError(f"{model} has BOS {sp.bos_id()} and {len(pieces)} pieces; shards need BOS {train_gpt.BOS} "
                         f"and at most {MAX_PIECES} pieces")
    if wrong := [i for i, piece in enumerate(pieces) if sp.is_byte(i) and piece not in BYTE_PIECES]:
        raise InputError(f"{model}: piece {wrong[0]} has the type of a byte, but not its name; get it again")
    return sp


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path, layout: str | None = None) -> None:
    """Train a SentencePiece BPE model with the contest's options, and a case layout's, and write it to `path`."""
    model, options = io.BytesIO(), CONTEST_TRAINER
    if layout:
        texts, options = (case.encode(text, layout) for text in texts), options | case.LAYOUTS[layout].trainer
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, vocab_size=vocab_size,
                                                 minloglevel=2, **options)
    except RuntimeError as error:
        raise InputError(f"SentencePiece could not train {vocab_size} pieces: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    train_gpt.write_file(path, model.getvalue())


def sample(blocks: Iterator[Block], megabytes: float) -> Iterator[str]:
    """The texts of the blocks up to so many megabytes: training a tokenizer holds them all in memory."""
    left = megabytes * 1e6
    for block in blocks:
        for text in block.texts():
            if (left := left - len(text.encode())) < 0:
                return
            yield text


@functools.cache
def layout_of(model: Path) -> str | None:
    """The case layout of the tokenizer at `model`."""
    return case.layout_of(processor(model))


class Encoded(NamedTuple):
    """Documents of one block: their tokens in a row, the length and the digest of each, and the bytes of their text.

    For a sidecar there are two rows: the second has the bytes of each token.
    """

    tokens: np.ndarray
    lengths: list[int]
    digests: list[bytes]
    text_bytes: int


def digest(document: bytes) -> bytes:
    return hashlib.blake2b(document, digest_size=16).digest()


def message(blob: bytes) -> dict[int, int | bytes]:
    """The last value of each number or string of a protocol buffer, by its field."""
    found, at = {}, 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while shift == 0 or blob[at - 1] > 127:
            value, shift, at = value | (blob[at] & 127) << shift, shift + 7, at + 1
        return value

    while at < len(blob):
        key = number()
        kind, size = key & 7, dict([(1, 8), (5, 4)]).get(key & 7, 0)
        value = number() if kind in (0, 2) else 0
        at += size + (value if kind == 2 else 0)
        found[key >> 3] = blob[at - value : at] if kind == 2 else value
    return found


@functools.cache
def can_cut(model: Path) -> bool:
    """Whether the parts of a text between CUTs have the tokens of the whole.

    So it is where no piece reaches over a space, pieces are merged (BPE: of each pair by itself), and normalization is
    one of SentencePiece's own, whose rules have no space or line end but alone.
    """
    sp = processor(model)
    fields = message(sp.serialized_model_proto())
    is_bpe = message(fields.get(2, b"")).get(3) == 2
    is_known = message(fields.get(3, b"")).get(1) in (b"nmt_nfkc", b"nfkc", b"nmt_nfkc_cf", b"nfkc_cf", b"identity")
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    return is_bpe and is_known and "\u2581" in pieces and not any(re.search(r"\s|(?<!^)\u2581", p) for p in pieces)


def parts(model: Path, text: str) -> Iterator[str]:
    """A document in parts whose pieces are those of the whole, if the "a" that stands before each but the first goes.

    It keeps the space that a later part begins with. Raises InputError where one has more than LONGEST_PART characters.
    """
    at = 0
    while at < len(text):
        cut = CUT.search(text, at + PART) if can_cut(model) else None
        end = cut.start() if cut else len(text)
        if (size := end - at) > LONGEST_PART:
            why = "that no space or line end parts" if can_cut(model) else "that this tokenizer can only take as a whole"
            raise InputError(f"{size:,} characters {why}, of at most {LONGEST_PART:,}; split the document")
        yield "a" + text[at:end] if at else text[:end]
        at = end


def encode_long(model: Path, text: str) -> np.ndarray:
    """BOS and the pieces of one document, by parts."""
    sp, found = processor(model), [np.full(1, train_gpt.BOS, "<u2")]
    letter = sp.encode("a")
    for number, part in enumerate(parts(model, text)):
        ids = sp.encode(part)[len(letter) if number else 0 :]
        found.append(np.fromiter(ids, "<u2", len(ids)))
    return np.concatenate(found)


def encode_texts(model: Path, block: Block, texts: list[str], sidecar: bool = False) -> list[np.ndarray]:
    """BOS and the pieces of each text; long ones by parts. An error names the document's line and size."""
    layout = layout_of(model)
    marked = [case.encode(text, layout) for text in texts] if layout else texts
    short = iter(processor(model).encode([t for t in marked if len(t) <= PART], add_bos=True, num_threads=1))
    documents = []
    for line, text in enumerate(marked, block.first):
        try:
            document = np.array(next(short), "<u2") if len(text) <= PART else encode_long(model, text)
            documents.append(with_bytes(model, document, text) if sidecar else document)
        except InputError as error:
            size = len(texts[line - block.first].encode())
            raise InputError(f"{block.path}, line {line}: a document of {size:,} bytes has {error}") from None
    return documents


def with_bytes(model: Path, document: np.ndarray, marked: str) -> np.ndarray:
    """The tokens of a document and, in a second row, the bytes of its original that each counts."""
    sp = processor(model)
    sizes = [case.normal_bytes(sp, part)[1 if number else 0 :] for number, part in enumerate(parts(model, marked))]
    counts = case.token_bytes(sp, document[1:], np.concatenate([np.empty(0, np.int64), *sizes]))
    if counts.max(initial=0) > 65535:
        raise InputError(f"a token that counts {counts.max():,} of them, of at most 65,535")
    return np.stack([document, np.append(0, counts).astype("<u2")])


def encode_block(model: Path, block: Block, sidecar: bool = False) -> Encoded:
    """Encode each document as BOS and its pieces, with the bytes of each for a sidecar."""
    texts = list(block.texts())
    documents = encode_texts(model, block, texts, sidecar)
    tokens = np.concatenate(documents, -1)
    if np.count_nonzero(token_row(tokens) == train_gpt.BOS) != len(documents):
        raise InputError(f"{block.path}, after line {block.first}: {model} makes a BOS inside of a document")
    digests = [digest(token_row(d).tobytes()) for d in documents]
    return Encoded(tokens, [d.shape[-1] for d in documents], digests, sum(len(text.encode()) for text in texts))


def token_row(tokens: np.ndarray) -> np.ndarray:
    """The tokens without the row of their bytes."""
    return np.atleast_2d(tokens)[0]
