"""What is in a packed model: settings, tensors, the bits that their codes need, and its size against the cap.

    python -m tools.model.inspect final_model.int6.ptz          # settings that are not the defaults; blocks together
    python -m tools.model.inspect final_model.int6.ptz --all    # every setting; every block alone
    python -m tools.model.inspect final_model.int6.ptz --json   # all of it, for programs
    python -m tools.model.inspect final_model.int6.ptz --code packed/train_gpt.py   # counts the code that is shipped

Needs no GPU, no data and no tokenizer. `bits` is the entropy of order 0 of a code (of a stored weight, where there is
none); `estimate` is that of all bytes of a parameter, each byte plane of each tensor alone. A compressor may need more,
or less where it finds more order: COMPRESSOR=rans tells codes apart by their scale.
"""

from __future__ import annotations

if __name__ == "inspect":  # for Python's own, which everybody imports: a file of this folder was run instead of its module
    raise ImportError("run it from the repository's root, as python -m tools.model.NAME")

import json
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

MOST_BYTES = 2**30  # that are read of a file
ROLES = ("matrix", "table", "scalar")
LINE = "  {:30s}{:>7s}{:>13s}{:>9s}{:>6s}{:>7s}{:>13s}{:>13s}   {}"


class Row(NamedTuple):
    """How a parameter, or `count` alike, is stored, and the bytes that this takes with steps and column factors."""

    role: str
    name: str
    count: int
    shape: list[int]
    dtype: str
    top: int | None  # the largest code; None where there are no codes
    bits: float  # entropy of a code or a stored weight
    raw: int  # bytes before they are compressed
    estimate: float  # bytes by entropy
    steps: list[float] | None  # least and largest


def entropy(tensor: Tensor) -> float:
    """Bits of a whole tensor by the entropy of order 0 of each of its byte planes, which the file keeps apart."""
    planes = np.ascontiguousarray(tensor.numpy()).reshape(-1, 1).view(np.uint8).T
    counts = np.stack([np.bincount(plane, minlength=256) for plane in planes])
    return abs(float((counts * np.log2(np.maximum(counts, 1) / tensor.numel())).sum()))


def row(role: str, name: str, tensors: Mapping[str, Tensor]) -> Row:
    """The row of one parameter of an artifact's tensors. Raises InputError for what train_gpt.py never writes."""
    codes, steps, columns = (tensors.get(f"{name}.{kind}") for kind in ("codes", "steps", "columns"))
    stored = tensors[name] if codes is None else codes
    if not stored.numel() or (codes is None) == (stored.dtype == torch.int8):
        raise InputError(f"{name} is empty, or int8 though it has no codes, or has codes that are not int8")
    parts = [t for t in (stored, steps, columns) if t is not None]
    return Row(role, name, 1, list(stored.shape), str(stored.dtype).removeprefix("torch."),
               None if codes is None else int(codes.int().abs().amax()), entropy(stored) / stored.numel(),
               sum(t.nbytes for t in parts), sum(map(entropy, parts)) / 8,
               None if steps is None else [float(steps.min()), float(steps.max())])


def merged(rows: list[Row]) -> list[Row]:
    """The same rows by role and name, with the same parameter of all blocks, if stored alike, as one row `blocks.*`."""
    def key(r: Row) -> tuple[int, str, str]:
        return ROLES.index(r.role), re.sub(r"^blocks\.\d+\.", "blocks.*.", r.name), r.dtype

    found = []
    for (_, name, _), group in groupby(sorted(rows, key=key), key=key):
        alike = list(group)
        raw, estimate, bits = (sum(r[i] for r in alike) for i in map(Row._fields.index, ("raw", "estimate", "bits")))
        first = alike[0]._replace(name=name, count=len(alike), raw=raw, estimate=estimate, bits=bits / len(alike))
        if first.top is not None:
            steps = [min(r.steps[0] for r in alike), max(r.steps[1] for r in alike)]
            first = first._replace(top=max(r.top for r in alike), steps=steps)
        found.append(first)
    return found


def contents(path: Path, code: Path) -> dict[str, Any]:
    """All that is told of an artifact. Raises InputError if it is not a whole model of this train_gpt.py."""
    try:
        code_bytes = code.stat().st_size
        with path.open("rb") as file:
            blob = file.read(MOST_BYTES)
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
    weights, total = sum(math.prod(r.shape) for r in rows), len(blob) + code_bytes
    return {"artifact": str(path), "format": train_gpt.ARTIFACT_FORMAT, "compressor": blob[40:48].decode().rstrip(),
            "looped": header["looped"] is True, "tokenizer_sha256": header["tokenizer_sha256"],
            "settings": train_gpt.artifact_settings(cfg), "parameters": rows,
            "weights": weights, "raw": sum(r.raw for r in rows), "estimate": round(sum(r.estimate for r in rows)),
            "bits_per_weight": 8 * len(blob) / weights, "model_bytes": len(blob), "code_bytes": code_bytes,
            "total_bytes": total, "cap": train_gpt.Config().max_artifact_bytes}


def table(rows: list[Row]) -> list[str]:
    """Lines of the parameters: a sum for each role, then its rows."""
    lines = [LINE.format("role, parameter", "count", "shape", "dtype", "codes", "bits", "bytes", "estimate", "steps")]
    for role in ROLES:
        mine = [r for r in rows if r.role == role]
        count, raw, estimate = (sum(r[i] for r in mine) for i in map(Row._fields.index, ("count", "raw", "estimate")))
        lines.append(LINE.format(role, str(count), "", "", "", "", f"{raw:,}", f"{estimate:,.0f}", "").rstrip())
        for r in mine:
            codes, steps = ("", "") if r.top is None else (f"+-{r.top}", "{:.3g} to {:.3g}".format(*r.steps))
            lines.append(LINE.format("  " + r.name, str(r.count), "x".join(map(str, r.shape)), r.dtype, codes,
                                     f"{r.bits:.3f}", f"{r.raw:,}", f"{r.estimate:,.0f}", steps).rstrip())
    return lines


def report(found: dict[str, Any], everything: bool) -> str:
    """What a person reads; `everything` lists the settings that are the defaults, and blocks one by one."""
    defaults, rows = train_gpt.artifact_settings(train_gpt.Config()), found["parameters"]
    settings = [f"  {name}={value}" + (f" (default {defaults[name]})" if value != defaults[name] else "")
                for name, value in found["settings"].items() if everything or value != defaults[name]]
    left = found["cap"] - found["total_bytes"]
    return "\n".join([
        f"artifact:{found['artifact']} format:{found['format']} compressor:{found['compressor']} "
        f"variant:{found['settings']['VARIANT']} seed:{found['settings']['SEED']} looped:{int(found['looped'])}",
        f"tokenizer sha256:{found['tokenizer_sha256']}",
        "settings:" if everything else "settings other than the defaults:", *(settings or ["  none"]),
        *table(sorted(rows, key=lambda r: ROLES.index(r.role)) if everything else merged(rows)),
        f"{found['weights']:,} weights: {found['raw']:,} bytes, {found['estimate']:,} by entropy, "
        f"{found['model_bytes']:,} in the file, {found['bits_per_weight']:.3f} bits a weight",
        f"code {found['code_bytes']:,} + model {found['model_bytes']:,} = {found['total_bytes']:,} bytes, "
        f"{abs(left):,} {'under' if left >= 0 else 'OVER'} the cap of {found['cap']:,}"])


def main() -> None:
    cli = command_line("tools.model.inspect", __doc__)
    cli.add_argument("artifact", type=Path)
    cli.add_argument("--all", action="store_true", help="every setting, and every block alone")
    cli.add_argument("--json", action="store_true", help="JSON, always with everything")
    cli.add_argument("--code", type=Path, default=Path(train_gpt.__file__), help="what counts (default: train_gpt.py)")
    args = cli.parse_args()
    found = contents(args.artifact, args.code)
    if args.json:
        print(json.dumps(found | {"parameters": [r._asdict() for r in found["parameters"]]}, indent=1), flush=True)
    else:
        print(report(found, args.all), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence
    run_tool("tools.model.inspect", main)
