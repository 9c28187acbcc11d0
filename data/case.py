"""Lossless case: text in lower case, with marks that say where its ASCII capitals stood, and the bytes of the original.

A layout is a place for the marks, which are private-use characters. Before "The NASA iPhone", with T, A, N for marks:

    v1     Tthe Anasa iNphone     the contest's CaseOps (lossless_caps_caseops_v1): a mark stands next to its letter
    ahead  TtheA nasa iTphone     before the space of the word, which so keeps its piece (" nasa"); "I" stays as it is

TITLE is a capital letter, ALLCAPS a word of two or more, NEXT v1's capital within a word; a mark in the text itself
comes after an ESCAPE. A word is a run of ASCII letters; all other characters stay.

Bytes are those of the published sidecars, fineweb_val_bytes_*.bin. SentencePiece normalizes the marked text (NFKC). A
character that comes out has the UTF-8 bytes of what it was made of: of several, the last; a space those of the white
space that became it. Marks and BOS have none, a character in byte pieces has all in the last of them, and what
normalization takes from either end of a document is no token's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from train_gpt import InputError

MARKS = TITLE, ALLCAPS, NEXT, ESCAPE = "\ue001\ue002\ue003\ue004"
GAP = r"[\t\n\f\r \xa0\u1680\u2000-\u200c\u200e\u200f\u2028\u2029\u202f\u205f\u2581\u3000\ufeff\ufffd]"  # to be a space
WORD = r"(?<![A-Za-z])([a-z]*[A-Z][A-Za-z]*)"  # that has a capital
MARKED = re.compile(f"{ESCAPE}(.?)|{ALLCAPS}{GAP}*[A-Za-z]*|[{TITLE}{NEXT}]{GAP}*\\w?", re.DOTALL)


class Layout(NamedTuple):
    """What encode rewrites, as (mark of the text, white space before the word, word); and the mark within a word."""

    pattern: re.Pattern[str]
    inner: str
    trainer: dict[str, Any]  # SentencePiece's options for the marks


LAYOUTS = dict(
    v1=Layout(re.compile(f"([{MARKS}])|(){WORD}"), NEXT, dict(user_defined_symbols=list(MARKS))),
    ahead=Layout(re.compile(f"([{MARKS}])|((?:(?<!{GAP})(?<!^){GAP}+)?)(?!I(?![A-Za-z])){WORD}"), TITLE,
                 dict(required_chars=TITLE + ALLCAPS)),
)


# ---------------------------------------- text <-> marked text

def encode(text: str, layout: str) -> str:
    """The text in lower case, with marks. No text is an error, and decode gives it back."""
    pattern, inner, _ = LAYOUTS[layout]

    def marked(found: re.Match[str]) -> str:
        mark, gap, word = found.groups()
        if mark:
            return ESCAPE + mark
        if len(word) > 1 and word.isupper():
            return ALLCAPS + gap + word.lower()
        first = TITLE + gap if word[0].isupper() else gap
        return first + word[0].lower() + re.sub("[A-Z]", lambda capital: inner + capital[0].lower(), word[1:])

    return pattern.sub(marked, text)


def decode(marked: str) -> str:
    """The original of marked text in any layout; of text that no encode has made, a mark without its letter goes."""
    return MARKED.sub(lambda found: found[1] if found[0][0] == ESCAPE else found[0][1:].upper(), marked)


def decode_stream(pieces: Iterable[str]) -> Iterator[str]:
    """decode of the pieces together, each part as soon as nothing can change it."""
    held = ""
    for piece in pieces:
        held += piece
        end = next((found.start() for found in MARKED.finditer(held) if found.end() == len(held)), len(held))
        yield decode(held[:end])
        held = held[end:]
    yield decode(held)


# ---------------------------------------- bytes of the original

def char_bytes(marked: str) -> np.ndarray:
    """UTF-8 bytes of the original in each character of marked text (N,): none in a mark."""
    codes = np.frombuffer(marked.encode("utf-32-le"), "<u4")
    is_mark = (codes >= ord(TITLE)) & (codes <= ord(ESCAPE))
    is_mark[[found.start() + 1 for found in re.finditer(f"{ESCAPE}[{MARKS}]", marked)]] = False
    return np.where(is_mark, 0, 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF).astype(np.int64))


def normal_bytes(sp: Any, marked: str) -> np.ndarray:
    """The same for each character of the text that `sp` normalizes marked text to."""
    _, starts = sp.normalize(marked, with_offsets=True)
    return np.diff(np.concatenate([[0], np.cumsum(char_bytes(marked))])[starts])


@functools.cache
def piece_table(sp: Any) -> tuple[np.ndarray, np.ndarray]:
    """(characters of each piece, whether it is a byte that goes on with a character)."""
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    is_byte = [sp.is_byte(i) for i in range(sp.vocab_size())]
    lengths = [1 if byte else len(piece) for piece, byte in zip(pieces, is_byte)]
    return np.array(lengths), np.array([byte and 0x80 <= int(p[3:5], 16) < 0xC0 for p, byte in zip(pieces, is_byte)])


def token_bytes(sp: Any, tokens: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The bytes of each token of a document without its BOS, whose characters have these. Raises InputError."""
    lengths, goes_on = piece_table(sp)
    ends = np.cumsum(np.where(np.append(goes_on[tokens[1:]], False), 0, lengths[tokens]))
    if ends[-1:].sum() != len(sizes):
        raise InputError(f"{len(tokens)} tokens that are not those of its {len(sizes)} characters; has the tokenizer "
                         "all byte pieces?")
    return np.diff(np.concatenate([[0], np.cumsum(sizes)])[ends], prepend=0)


def piece_bytes(sp: Any) -> np.ndarray:
    """Bytes of each piece of a vocabulary in text without escaped marks; 0 of control pieces."""
    pieces = [sp.id_to_piece(i).replace("\u2581", " ") for i in range(sp.vocab_size())]
    text = [not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)) for i in range(len(pieces))]
    return np.array([1 if sp.is_byte(i) else text[i] * char_bytes(piece).sum() for i, piece in enumerate(pieces)])


# ---------------------------------------- tokenizer

def layout_of(sp: Any) -> str | None:
    """The layout of the text that a tokenizer was made for, by the marks in its pieces; only v1 has a NEXT."""
    there = set().union(*map(sp.id_to_piece, range(sp.vocab_size()))) & set(MARKS)
    return None if not {TITLE, ALLCAPS} <= there else "v1" if NEXT in there else "ahead"
