"""What an outsider checks of a score: the file that AUDIT=audit.npz wrote, or any stream of tokens by any artifact.

    python -m tools.model.audit audit.npz                       # the score again, from nll and bytes of every target
    from tools.model.audit import audit; audit("final_model.int6.ptz", tokens, tokenizer_path="...")["nll"]
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import train_gpt as t
from tools import command_line, run_tool

# Bytes a token of the contest's validation split by export; targets and bytes where the whole stream was published
RATIOS = {"fineweb10B_sp1024": 2.435930, "fineweb10B_sp4096": 3.319681, "fineweb10B_sp8192": 3.726631,
          "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved": 3.157152}
WHOLE = {"fineweb10B_sp8192": (40_540_802, 151_080_891)}


def audit(artifact: str | Path, tokens: np.ndarray, **overrides: Any) -> dict[str, np.ndarray]:
    """Score a stream of tokens (N,) by the last evaluation of an artifact, as a run would: for each of its N - 1
    targets `nll` in nats, `bytes` and `chunk`. Overrides are options (tokenizer_path=..., ttt_epochs=0).
    """
    if stray := overrides.keys() - {f.name for f in fields(t.Config)}:
        raise t.InputError(f"{', '.join(sorted(stray))} is no option; train_gpt.py --help lists them")
    with t.launch({}) as ranks:
        cfg, weights, looped, *_ = t.load_artifact(Path(artifact), {"VAL_MAX_TOKENS": "0"} | t.as_env(overrides))
        scorer = t.Scorer(tokens, cfg, ranks, t.Log(cfg, replace(ranks, rank=1)))
        [*t.evaluations(scorer, t.load_model(cfg, weights, ranks), looped).values()][-1]()
        return {name: column.cpu().numpy() for name, column in scorer.audited.items()}


def known_stream(name: str, count: int, size: int) -> bool:
    """Whether so many targets and bytes are the contest's validation split in the export `name`."""
    close = abs(size / count - RATIOS[name]) < 1e-5  # the published ratios lack the tail of the stream
    return close and WHOLE.get(name, (count, size)) == (count, size)


def report(path: Path) -> str:
    """The score of an audit file, and whose stream it is."""
    try:
        with np.load(path) as file:
            nll, size, chunks = file["nll"], int(file["bytes"].sum()), int(file["chunk"].max()) + 1
        loss, names = float(nll.mean()), [name for name in RATIOS if known_stream(name, len(nll), size)]
        bpb = loss * len(nll) / math.log(2) / size
    except Exception as error:  # NumPy and zipfile raise many types on a corrupt file
        raise t.InputError(f"{path} is no file of AUDIT=: {' '.join(str(error).split())}") from None
    return (f"val_loss:{loss:.8f} val_bpb:{bpb:.8f} targets:{len(nll)} bytes:{size} chunks:{chunks} "
            f"stream:{'the whole of ' + names[0] if names else 'none of the contest'}")


def main() -> None:
    cli = command_line("tools.model.audit", __doc__)
    cli.add_argument("file", type=Path, help="what AUDIT= wrote")
    print(report(cli.parse_args().file), flush=True)


if __name__ == "__main__":
    run_tool("tools.model.audit", main)
