"""A Python source -> a self-extracting file of about a third of its bytes, which runs in its place.

    python -m tools.record.pack train_gpt.py -o packed/train_gpt.py

The packed file has two lines: the source as LZMA in base 85, then its `exec` in the module itself, so `__name__`,
`__file__`, type hints and `import` work as in the source. `linecache` gets the source for tracebacks and `inspect`.
"""

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
    """The shortest .lzma stream of `text` over the settings that matter for a source."""
    fixed = dict(id=lzma.FILTER_LZMA1, preset=9 | lzma.PRESET_EXTREME, dict_size=1 << max(12, len(text).bit_length()))
    streams = []
    for context, finder, nice in itertools.product(range(5), (lzma.MF_BT2, lzma.MF_BT4), (64, 128)):
        settings = fixed | dict(lc=context, pb=0, mf=finder, nice_len=nice)  # text is not aligned: no position bits
        streams.append(lzma.compress(text, format=lzma.FORMAT_ALONE, filters=[settings]))
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
    cli.add_argument("-o", "--out", type=Path, required=True, help="packed file; its folder is created")
    args = cli.parse_args()
    source = read_bytes(args.source)
    try:
        packed = pack_source(source)
    except ValueError as error:
        raise Refused(f"{args.source} is not a Python source: {error}") from None
    if args.out.is_dir() or (args.out.exists() and args.out.samefile(args.source)):
        raise Refused(f"{args.out} is {'a folder' if args.out.is_dir() else 'the source'}; name another file with -o")
    write_file(args.out, packed)
    before, after = len(source), len(packed)
    print(f"{args.source}: {before} bytes -> {args.out}: {after} bytes ({after / before:.1%})", flush=True)


if __name__ == "__main__":
    run_tool("tools.record.pack", main)
