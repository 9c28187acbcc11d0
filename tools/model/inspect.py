"""Lists the contents of a packed model: settings, tensors, entropy of their codes, and size against the cap.

    python -m tools.model.inspect final_model.int6.ptz          # settings that differ from the defaults, blocks merged
    python -m tools.model.inspect final_model.int6.ptz --all    # all settings, every block
    python -m tools.model.inspect final_model.int6.ptz --code packed/train_gpt.py   # counts the code that is shipped

`bits` is the zero-order entropy of a code, or of a stored weight without codes. `estimate` is the zero-order entropy of
all bytes of a parameter, by byte plane of each tensor; a compressor may need more or less.
"""

if __name__ == "inspect":  # a file of this folder was run as a script, so Python's own `inspect` resolves to this one
    raise ImportError("run it from the repository's root, as python -m tools.model.NAME")

import math
import re
import signal
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import train_gpt
from tools import command_line, run_tool
from train_gpt import InputError

ROLES = ("matrix", "table", "scalar")
LINE = "  {:30s}{:>7s}{:>13s}{:>9s}{:>7s}{:>7s}{:>13s}{:>13s}"


class Row(NamedTuple):
    """Storage of one parameter, or of `count` equal ones, including its scales and column factors."""

    role: str
    name: str
    count: int
    shape: list[int]
    dtype: str
    max_code: int | None  # highest code; None without codes
    bits: float  # entropy of a code or of a stored weight
    raw: int  # bytes before compression
    estimate: float  # bytes by entropy


def entropy(tensor: Tensor) -> float:
    """Bits of a tensor by the zero-order entropy of each byte plane."""
    planes = np.ascontiguousarray(tensor.numpy()).reshape(-1, 1).view(np.uint8).T
    counts = np.stack([np.bincount(plane, minlength=256) for plane in planes])
    return abs(float((counts * np.log2(np.maximum(counts, 1) / tensor.numel())).sum()))


def row(role: str, name: str, tensors: Mapping[str, Tensor]) -> Row:
    """The row of one parameter. Raises InputError for tensors that train_gpt.py never writes."""
    codes, *factors = (tensors.get(f"{name}.{kind}") for kind in ("codes", "scales", "columns"))
    stored = tensors[name] if codes is None else codes
    if not stored.numel() or (codes is None) == (stored.dtype == torch.int8):
        raise InputError(f"{name} is empty, int8 without codes, or has codes that are not int8")
    parts = [tensor for tensor in (stored, *factors) if tensor is not None]
    top, bits = None if codes is None else int(codes.int().abs().amax()), entropy(stored) / stored.numel()
    raw, estimate = sum(tensor.nbytes for tensor in parts), sum(map(entropy, parts)) / 8
    return Row(role, name, 1, [*stored.shape], str(stored.dtype)[6:], top, bits, raw, estimate)


def merged(rows: list[Row]) -> list[Row]:
    """The rows by role and name; a parameter that all blocks store alike is one row `blocks.*`."""

    def key(r: Row) -> tuple[int, str, str]:
        return ROLES.index(r.role), re.sub(r"^blocks\.\d+\.", "blocks.*.", r.name), r.dtype

    found = []
    for (_, name, _), group in groupby(sorted(rows, key=key), key=key):
        alike = list(group)
        max_code = None if alike[0].max_code is None else max(r.max_code for r in alike)
        raw, estimate, bits = (sum(getattr(r, field) for r in alike) for field in ("raw", "estimate", "bits"))
        row = alike[0]._replace(name=name, count=len(alike), max_code=max_code, bits=bits / len(alike))
        found.append(row._replace(raw=raw, estimate=estimate))
    return found


def contents(path: Path, code: Path) -> dict[str, Any]:
    """Everything in an artifact. Raises InputError if it is not a complete model of this train_gpt.py."""
    try:
        code_bytes, blob = len(code.read_bytes()), path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None
    try:
        header, tensors = train_gpt.unpack(blob)
        settings, _ = train_gpt.stored_settings(header)
        if not re.fullmatch("[0-9a-f]{64}", header["tokenizer_sha256"]):
            raise InputError("the hash of its tokenizer is not a sha256")
        cfg = train_gpt.Config.from_env(settings)
        model = train_gpt.load_model(cfg, train_gpt.dequantize(tensors), train_gpt.Ranks())
        rows = [row(role, name, tensors) for name, role in train_gpt.parameter_roles(model).items()]
    except (InputError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"artifact {path}: {error}") from None
    weights = sum(math.prod(r.shape) for r in rows)
    return dict(
        artifact=str(path), format=train_gpt.ARTIFACT_FORMAT, compressor=blob[40:48].decode().rstrip(),
        looped=header["looped"] is True, tokenizer_sha256=header["tokenizer_sha256"],
        settings=train_gpt.artifact_settings(cfg), parameters=rows, weights=weights, raw=sum(r.raw for r in rows),
        estimate=round(sum(r.estimate for r in rows)), bits_per_weight=8 * len(blob) / weights,
        model_bytes=len(blob), code_bytes=code_bytes, total_bytes=len(blob) + code_bytes,
        cap=train_gpt.Config().max_artifact_bytes,
    )  # fmt: skip


def table(rows: list[Row]) -> list[str]:
    """One line per parameter, below a line with the sums of its role."""
    lines = [LINE.format("role, parameter", "count", "shape", "dtype", "codes", "bits", "bytes", "estimate")]
    for role, group in groupby(rows, key=lambda r: r.role):
        mine = list(group)
        count, raw, estimate = (sum(getattr(r, field) for r in mine) for field in ("count", "raw", "estimate"))
        lines.append(LINE.format(role, str(count), "", "", "", "", f"{raw:,}", f"{estimate:,.0f}"))
        for r in mine:
            shape, codes = "x".join(map(str, r.shape)), "" if r.max_code is None else f"+-{r.max_code}"
            sizes = f"{r.bits:.3f}", f"{r.raw:,}", f"{r.estimate:,.0f}"
            lines.append(LINE.format("  " + r.name, str(r.count), shape, r.dtype, codes, *sizes))
    return lines


def report(found: dict[str, Any], everything: bool) -> str:
    """The text that is printed; `everything` also lists default settings, and each block on its own."""
    defaults, rows = train_gpt.artifact_settings(train_gpt.Config()), found["parameters"]
    left, settings = found["cap"] - found["total_bytes"], []
    for name, value in found["settings"].items():
        if everything or value != defaults[name]:
            settings.append(f"  {name}={value}" + f" (default {defaults[name]})" * (value != defaults[name]))
    head = "artifact:{artifact} format:{format} compressor:{compressor} looped:{looped:d} "
    weights = "{weights:,} weights: {raw:,} bytes, {estimate:,} by entropy, {model_bytes:,} in the file, "
    head += "variant:{settings[VARIANT]} seed:{settings[SEED]}\ntokenizer sha256:{tokenizer_sha256}"
    lines = [head.format(**found), "settings:" if everything else "settings other than the defaults:"]
    lines += settings or ["  none"]
    lines += table(sorted(rows, key=lambda r: ROLES.index(r.role)) if everything else merged(rows))
    weights += "{bits_per_weight:.3f} bits a weight\ncode {code_bytes:,} + model {model_bytes:,} = {total_bytes:,} bytes, "
    last = f"{abs(left):,} {'under' if left >= 0 else 'OVER'} the cap of {found['cap']:,}"
    return "\n".join([*lines, weights.format(**found) + last])


def main() -> None:
    cli = command_line("tools.model.inspect", __doc__)
    cli.add_argument("artifact", type=Path)
    cli.add_argument("--all", action="store_true", help="list all settings, and every block on its own")
    cli.add_argument("--code", type=Path, default=Path(train_gpt.__file__), help="counted code (default: train_gpt.py)")
    args = cli.parse_args()
    print(report(contents(args.artifact, args.code), args.all), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback after `| head`
    run_tool("tools.model.inspect", main)
