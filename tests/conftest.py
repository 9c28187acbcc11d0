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
from helpers.smoke import SMOKE

import train_gpt as t

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Put the slowest files first: a file stays on one worker, so none of them starts at the end."""
    longest = ["test_variants", "test_audit", "test_run", "test_adapt", "test_reference", "test_muon"]
    if hasattr(config, "workerinput"):  # one process keeps the order of the command line
        items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


@pytest.fixture(scope="session")
def documents():
    """A few hundred kB of English: Python's own language reference, by topic."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)][:40]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, documents):
    """Environment variables of a tokenizer of 384 pieces and of shards of both splits."""
    root = tmp_path_factory.mktemp("data")
    model = root / "tiny.model"
    prepare.train_tokenizer(documents, 384, model)
    prepare.write_dataset(root / "tiny", model, documents[:1], documents[1:], workers=1)
    return dict(DATA_PATH=str(root / "tiny"), TOKENIZER_PATH=str(model), VOCAB_SIZE="384")


@pytest.fixture
def env(dataset, tmp_path):
    """The smallest run over the tiny dataset, all output in a folder of its own."""
    return dict(SMOKE, **dataset, OUTPUT_DIR=str(tmp_path), VAL_MAX_TOKENS="700", RUN_ID="test")


@pytest.fixture
def cfg(env):
    return t.Config.from_env(env)


@pytest.fixture
def log(cfg):
    log = t.Log(cfg, t.Ranks())
    log.active = False
    return log


def make_model(cfg, seed=0):
    """A model with noise on every parameter, so that no initial zero hides a term."""
    model = t.GPT(cfg)
    model.init_weights(cfg)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=draw))
    return model


def coded_rows(w, spec, cfg, hessian=None):
    """Codes and scales of w with scales per row: rounded, or by GPTQ with a Hessian."""
    return t.quantize_rows(t.row_plan(w, spec, cfg, hessian))


def coded(weights, specs, cfg, hessians=None):
    """The tensors of an artifact with scales per row; GPTQ for the names that have a Hessian."""
    costs = {name: t.Curvature(hessian, torch.zeros(len(weights[name]))) for name, hessian in (hessians or {}).items()}
    return t.quantize(weights, t.quant_plans(weights, specs, cfg, costs))


def run(env, *args, processes=1, script=ROOT / "train_gpt.py", check=True, cwd=None, fresh=False):
    """Run the script, or a module by its name, with only the options of `env` set. Returns the finished process. `fresh`: in a new
    python or torchrun instead of a fork.
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
    """Run a tool from any folder. Returns the finished process."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-m", module, *map(str, args)], env=env, capture_output=True, text=True, **how)


WIRE_TYPES = ("int8", "uint8", "uint16", "uint32", "float16", "float32")


def as_claimed(header, file_bytes):
    """Layouts for t.unpack of tensors without a model: those of the header, up to 64 MB."""
    layouts = {}
    for name, dtype, shape in header["tensors"]:
        if dtype not in WIRE_TYPES or not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) > 2**26:
            raise t.InputError(f"tensor {name}")
        layouts[name] = dtype, (2**26,) if name == "rans.words" else tuple(shape)
    return layouts


def unpacked(blob):
    return t.unpack(blob, as_claimed)


def finals(text):
    """The exact val_bpb of each final stage of a log."""
    return {line.split("_exact")[0]: float(line.rsplit(":", 1)[1]) for line in text.splitlines() if "_exact val_loss" in line}


def write_json_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
