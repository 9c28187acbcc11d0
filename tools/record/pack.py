"""A Python source -> a self-extracting one of about a third of its bytes, which runs in its place.

    python -m tools.record.pack train_gpt.py -o packed/train_gpt.py

The packed file has two lines: the source, LZMA in base 85, then its `exec`. They run in the module itself and leave no
name in it, so `__name__`, `__file__` (the packed file's own path), type hints and `import` are a plain source's.
`linecache` gets the unpacked lines: tracebacks name their numbers, `inspect` finds their text. It needs no package.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
import lzma
import re
from pathlib import Path

from tools import command_line, run_tool
from tools.files import Refused, read_bytes, write_file

SHIM = """\
__import__("linecache").cache[__file__]=0,None,[*map(bytes.decode,__import__("lzma").decompress(\
__import__("base64").b85decode("%s")).splitlines(1))],__file__
exec(compile("".join(__import__("linecache").cache[__file__][2]),__file__,"exec"))
"""


def compress(text: bytes) -> bytes:
    """The shortest .lzma stream of `text` over the settings that matter for a source; any liblzma unpacks it.

    Its 13-byte header costs less than the filters that the shim of a raw stream would have to spell out.
    """
    sizes = dict(dict_size=1 << max(12, len(text).bit_length()), pb=0)  # text is not aligned: no position bits
    streams = []
    for context, finder, nice in itertools.product(range(5), (lzma.MF_BT2, lzma.MF_BT4), (64, 128)):
        settings = dict(id=lzma.FILTER_LZMA1, preset=9 | lzma.PRESET_EXTREME, lc=context, mf=finder, nice_len=nice)
        streams.append(lzma.compress(text, format=lzma.FORMAT_ALONE, filters=[settings | sizes]))
    return min(streams, key=len)


def pack_source(source: bytes) -> bytes:
    """The self-extracting file of a Python source. Raises ValueError, in one line, if the source does not compile."""
    try:
        text = importlib.util.decode_source(source)
        compile(text, "source", "exec", dont_inherit=True)
    except SyntaxError as error:
        raise ValueError(error.msg + (f", line {error.lineno}" if error.lineno else "")) from None
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deeply") from None
    return (SHIM % base64.b85encode(compress(text.encode())).decode()).encode()


def unpack_source(packed: bytes) -> bytes:
    """The source in a file that `pack_source` made; any other file itself."""
    found = re.fullmatch(re.escape(SHIM).replace("%s", '([^"]*)').encode(), packed)
    try:
        return lzma.decompress(base64.b85decode(found[1])) if found else packed
    except (ValueError, lzma.LZMAError):
        return packed


def main() -> None:
    cli = command_line("tools.record.pack", __doc__)
    cli.add_argument("source", type=Path)
    cli.add_argument("-o", "--out", type=Path, required=True, help="the packed file; its folder is made if it is missing")
    args = cli.parse_args()
    source = read_bytes(args.source)
    try:
        packed = pack_source(source)
    except ValueError as error:
        raise Refused(f"{args.source} is not a Python source: {error}") from None
    if args.out.is_dir() or (args.out.exists() and args.out.samefile(args.source)):
        raise Refused(f"{args.out} is {'a folder' if args.out.is_dir() else 'the source'}; name another file with -o")
    write_file(args.out, packed)
    print(f"{args.source}: {len(source)} bytes -> {args.out}: {len(packed)} bytes ({len(packed) / len(source):.1%})", flush=True)


if __name__ == "__main__":
    run_tool("tools.record.pack", main)
