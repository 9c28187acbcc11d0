"""A tiny dataset with a real tokenizer, and runs of the script in a subprocess."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import prepare
import pytest
import torch
from helpers import forked

import train_gpt as t

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Files that take longest come first (a file stays on one worker), so that no worker is left with one at the end."""
    longest = ["test_variants", "test_audit", "test_run", "test_adapt", "test_reference", "test_muon"]
    if hasattr(config, "workerinput"):  # one process alone goes by the command line
        items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


@pytest.fixture(scope="session")
def documents():
    """A few hundred kB of English: Python's own language reference, by topic."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)][:40]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, documents):
    """The environment that points at a tokenizer of 384 pieces and at shards of both splits."""
    root = tmp_path_factory.mktemp("data")
    model = root / "tiny.model"
    prepare.train_tokenizer(documents, 384, model)
    prepare.write_dataset(root / "tiny", model, documents[:1], documents[1:], workers=1)
    return dict(DATA_PATH=str(root / "tiny"), TOKENIZER_PATH=str(model), VOCAB_SIZE="384")


@pytest.fixture
def env(dataset, tmp_path):
    """The smallest run: the smoke variant over the tiny dataset, all output in a folder of its own."""
    return dict(dataset, VARIANT="smoke", OUTPUT_DIR=str(tmp_path), VAL_MAX_TOKENS="700", RUN_ID="test")


@pytest.fixture
def cfg(env):
    return t.Config.from_env(env)


@pytest.fixture
def log(cfg):
    log = t.Log(cfg, t.Ranks())
    log.active = False
    return log


def make_model(cfg, seed=0):
    """A model with every parameter away from its special initial value, so that no term of the maths is hidden by a zero."""
    model = t.GPT(cfg)
    model.init_weights(cfg)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=draw))
    return model


def coded_rows(w, grid, cfg, hessian=None):
    """Codes and steps of w by the row rule: rounded, or by GPTQ with a Hessian."""
    return t.quantize_rows(t.row_plan(w, grid, cfg, hessian))


def coded(weights, grid_of, cfg, hessians=None):
    """The tensors of an artifact by the row rule; GPTQ for the names that have a Hessian."""
    costs = {name: t.Curvature(hessian, torch.zeros(len(weights[name]))) for name, hessian in (hessians or {}).items()}
    return t.quantize(weights, t.coding_plans(weights, grid_of, cfg, costs))


def run(env, *args, processes=1, script=ROOT / "train_gpt.py", check=True, cwd=None, fresh=False):
    """Run the script, or the module of a name, with only `env` set; returns the finished process. `fresh`: by a python, or a torchrun, that
    imports all anew.
    """
    clean = {k: v for k, v in os.environ.items() if k.lower() not in t.Config.__dataclass_fields__}
    what, place = (["-m", script], {"PYTHONPATH": str(ROOT)}) if isinstance(script, str) else ([str(script)], {})
    env = clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | place | env
    if fresh:
        launcher = [sys.executable] + ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
        done = subprocess.run([*launcher, *what, *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=240)
    else:
        done = forked.python([*what, *args], env, cwd, processes)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def tool(module, *args, **how):
    """The finished process of a tool, from any folder."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-m", module, *map(str, args)], env=env, capture_output=True, text=True, **how)


WIRE_TYPES = ("int8", "uint8", "uint16", "uint32", "float16", "float32")


def as_claimed(header, file_bytes):
    """Layouts for t.unpack of tensors that belong to no model: whatever the header claims, up to 64 MB."""
    layouts = {}
    for name, dtype, shape in header["tensors"]:
        if dtype not in WIRE_TYPES or not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) > 2**26:
            raise t.InputError(f"tensor {name}")
        layouts[name] = (dtype,), (0, 2**26) if name == "rans.words" else tuple(shape)
    return layouts


def unpacked(blob):
    return t.unpack(blob, as_claimed)


def finals(text):
    """The exact val_bpb of each final stage of a log."""
    return {line.split("_exact")[0]: float(line.rsplit(":", 1)[1]) for line in text.splitlines() if "_exact val_loss" in line}


def write_json_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
