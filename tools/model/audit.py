"""Computes a score again from the file that AUDIT=audit.npz wrote, or scores any stream of tokens by any artifact.

    python -m tools.model.audit audit.npz

In Python: `audit("final_model.int6.ptz", tokens, tokenizer_path="...")["nll"]`.
"""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import train_gpt as t
from tools import command_line, run_tool
from tools.record.logs import SPLITS


def audit(artifact: str | Path, tokens: np.ndarray, **overrides: Any) -> dict[str, np.ndarray]:
    """Score tokens (N,) by the last evaluation of an artifact: `nll` in nats, `bytes` and `chunk`, each (N - 1,).
    `overrides` are options in lower case, as in tokenizer_path="..." or ttt_epochs=0.
    """
    if unknown := overrides.keys() - {field.name for field in fields(t.Config)}:
        raise t.InputError(f"{', '.join(sorted(unknown))} is no option; `python train_gpt.py --help` lists them")
    with t.launch({}) as ranks:
        cfg, weights, looped, *_ = t.load_artifact(Path(artifact), {"VAL_MAX_TOKENS": "0"} | t.as_env(overrides))
        scorer = t.Scorer(tokens, cfg, ranks, t.Log(cfg, replace(ranks, rank=1)))
        [*t.evaluations(scorer, t.load_model(cfg, weights, ranks), looped).values()][-1]()
        return {name: column.cpu().numpy() for name, column in scorer.audited.items()}


def report(path: Path) -> str:
    """The score of an audit file, and whether its stream is the contest's."""
    try:
        with np.load(path) as file:
            nll, size, chunks = file["nll"], int(file["bytes"].sum()), int(file["chunk"].max()) + 1
        loss, names = float(nll.mean()), [name for name in SPLITS if SPLITS[name].matches(len(nll), size)]
        bpb = loss * len(nll) / math.log(2) / size
    except Exception as error:  # NumPy and zipfile raise many types on a corrupt file
        raise t.InputError(f"{path} is no file of AUDIT=: {' '.join(str(error).split())}") from None
    stream = f"the whole of {names[0]}" if names else "none of the contest"
    return f"val_loss:{loss:.8f} val_bpb:{bpb:.8f} targets:{len(nll)} bytes:{size} chunks:{chunks} stream:{stream}"


def main() -> None:
    cli = command_line("tools.model.audit", __doc__)
    cli.add_argument("file", type=Path, help="file written by AUDIT=")
    print(report(cli.parse_args().file), flush=True)


if __name__ == "__main__":
    run_tool("tools.model.audit", main)
