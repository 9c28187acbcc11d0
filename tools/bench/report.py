"""The tables that tools.bench prints of a result, and of one result beside an older one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.bench.kernels import KINDS
from train_gpt import InputError

FORMAT = 1  # of the JSON file
METRICS = {"ms": "ms a step", "tokens_per_second": "tokens/s", "mfu": "MFU", "peak_mib": "peak MiB", "busy": "busy",
           "launches": "launches a step", "eval_seconds": "s/M tokens, sliding", "pack_seconds": "quantize + pack, s",
           "unpack_seconds": "unpack, s", "gptq_seconds": "GPTQ, s"}


def number(key: str, shape: str) -> Callable[[Mapping[str, Any]], str]:
    """r[key] as `shape` formats it, a dash where there is none."""
    return lambda r: format(r[key], shape) if key in r else "-"


def share(kind: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda r: f"{r['shares'][kind]:.1%}"


def span(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda r: "{:.2f}..{:.2f}".format(*r[key])


def sent(r: Mapping[str, Any]) -> str:
    c = r["communication"]
    kinds = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in c["payload"].items())
    return f"{c['sent'] / 1e6:.1f} of {c['world']} ranks in {c['calls']} calls ({kinds})"


def megaflops(r: Mapping[str, Any]) -> str:
    return f"{r['flops_per_token'] / 1e6:.1f}"


Columns = dict[str, Callable[[Mapping[str, Any]], str]]
ROW = number("name", "")
STEP: Columns = {"row": ROW, "tokens": number("tokens", ","), "ms a step": number("ms", ".2f"),
                 "quartiles": span("ms_quartiles"), "tokens/s": number("tokens_per_second", ",.0f"),
                 "MFLOP/token": megaflops, "TFLOP/s": number("tflops", ".4g"), "MFU": number("mfu", ".1%"),
                 "peak MiB": number("peak_mib", ",")}
PROFILE: Columns = {"row": ROW, **{kind: share(kind) for kind in KINDS}, "busy": number("busy", ".0%"),
                    "launches": number("launches", ",.0f"), "syncs": number("syncs", ".1f"),
                    "eager": number("eager_share", ".1%"), "attention asked": number("attention", ""),
                    "ran": lambda r: " ".join(r["attention_ran"])}
AROUND: Columns = {"row": ROW, "sliding, s/M tokens (scaled)": number("eval_seconds", ".1f"),
                   "quantize + pack, s": number("pack_seconds", ".2f"), "unpack, s": number("unpack_seconds", ".2f"),
                   "GPTQ, s": number("gptq_seconds", ".1f"), "MB a rank sends in a step": sent}
RACE: Columns = {"row": ROW, "threads": number("threads", ""), "dtype": number("dtype", ""),
                 "tokens": number("tokens", ","), "ours, ms": number("ms", ".1f"),
                 "plain, ms": number("plain_ms", ".1f"), "ratio": number("ratio", ".2f"),
                 "quartiles of pairs": span("ratio_quartiles"), "ratio of CPU time": number("cpu_ratio", ".2f")}
SCALING: Columns = {"row": ROW, "axis": number("axis", ""), "value": number("value", ""),
                    "ms a step": number("ms", ".2f"), "tokens/s": number("tokens_per_second", ",.0f"),
                    "MFLOP/token": megaflops, "MFU": number("mfu", ".1%")}
TOP: Columns = {"kind": lambda w: w[0], "ms a step": lambda w: f"{w[2]:.3f}", "calls": lambda w: f"{w[3]:.1f}",
                "name": lambda w: w[1][:100].replace("|", "/")}


def table(columns: Columns, rows: Iterable[Any]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *[[cell(r) for cell in columns.values()] for r in rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def exponents(rows: list[dict[str, Any]]) -> str:
    """For each axis the p of ms ~ value**p, by its first and last value."""
    found = []
    for axis in dict.fromkeys(r["axis"] for r in rows):
        first, *_, last = (r for r in rows if r["axis"] == axis)
        power = math.log(last["ms"] / first["ms"]) / math.log(last["value"] / first["value"])
        found.append(f"{axis} {power:.2f}")
    return "exponent of the milliseconds from the first to the last value: " + ", ".join(found)


def prediction(r: Mapping[str, Any], kind: str) -> str:
    p, note = r["prediction"], "" if kind == "cuda" else "not from a GPU's step, so arithmetic alone: "
    return (f"{note}{r['name']} on {p['world']} H100s: {p['by_parts']:.1f} ms by parts (optimizer "
            f"{p['optimizer_ms']:.2f} -> {p['sharded_optimizer_ms']:.2f} ms), {p['by_ratio']:.1f} ms by ratio, each +-{p['error']:.0%}")


def report(result: Mapping[str, Any]) -> str:
    """All tables of a result."""
    m, roofs, rows = result["machine"], result["ceilings"], result["rows"]
    rates = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in roofs.items() if k != "copy")
    parts = [f"{m['device']}, {m['threads']} threads, torch {m['torch']}, commit {m['commit']}",
             f"ceilings: copy {roofs['copy'] / 1e9:.1f} GB/s (read + written); matmul {rates}",
             *[table(columns, rows) for columns in (STEP, PROFILE, AROUND)],
             *[prediction(r, m["kind"]) for r in rows if "prediction" in r]]
    if result["plain"]:
        parts.append(table(RACE, result["plain"]))
    if result["scaling"]:
        parts += [table(SCALING, result["scaling"]), exponents(result["scaling"])]
    return "\n\n".join(parts)


def comparison(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """New by old, for each metric of the rows that both have. Raises InputError when they share none."""
    before = {r["name"]: r for r in old["rows"]}
    pairs = [(before[r["name"]], r) for r in new["rows"] if r["name"] in before]
    if not pairs:
        raise InputError(f"--compare: no row of {', '.join(before)} was measured now")
    both = [(r["name"], label, b[key], r[key]) for b, r in pairs for key, label in METRICS.items()
            if b.get(key) and r.get(key)]
    differ = [k for k in ("device", "threads", "torch") if old["machine"][k] != new["machine"][k]]
    differ += [f"{r['name']} tokens" for b, r in pairs if b["tokens"] != r["tokens"]]
    columns: Columns = {"row": lambda x: x[0], "metric": lambda x: x[1], "old": lambda x: f"{x[2]:.4g}",
                        "new": lambda x: f"{x[3]:.4g}", "new / old": lambda x: f"{x[3] / x[2]:.3f}"}
    return "\n\n".join([*[f"not alike: {', '.join(differ)}"] * bool(differ), table(columns, both)])


def read_result(path: Path) -> dict[str, Any]:
    """A JSON file of tools.bench. Raises InputError for any other."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        version, row = result["format"], result["rows"][0]
        if not {"name", "ms", "tokens"} <= row.keys() or not {"device", "threads", "torch"} <= result["machine"].keys():
            raise ValueError
    except OSError as error:
        raise InputError(f"--compare {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"--compare {path} is not a file of this tool") from None
    if version != FORMAT:
        raise InputError(f"--compare {path} has format {version}, not {FORMAT}; measure it again")
    return result
