"""A complete Parameter Golf entry: train, quantize, pack, reload and score an 11-layer U-Net GPT in one readable file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py          # the contest: 8xH100, 600 s + 600 s
    VARIANT=demo python train_gpt.py                               # no GPU: the same code, every stage, in minutes
    EVAL_ONLY=1 ARTIFACT=final_model.int6.ptz python train_gpt.py  # score an artifact again, from its bytes alone
    python train_gpt.py --help | --describe                        # every option | the resolved run, without data

shards -> batches -> GPT -> Muon + AdamW under a wallclock budget -> average -> int6 codes -> JSON header + tensors
-> zstd: one file -> [from here only that file, the tokenizer and the validation shards] -> score -> score-first TTT
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

BOS = 1  # the contest's id for "a document begins"
PACKAGES = ("numpy", "sentencepiece", "tqdm", "zstandard")

# ----------------------------------------
# Configuration: every option, its default, its meaning. SEED=42 in the environment sets `seed`.

class InputError(ValueError):
    """A mistake of the user's, told in one line: what, where, what to do."""

class Unusable(InputError):
    """What all ranks find together after work that is worth keeping: a loss that is no number, a file over the cap."""

def knob(default: Any, help: str, low: float = 0, high: float = math.inf, choices: tuple = (), group: str = "") -> Any:
    """A Config field: its help, the closed range or the choices of each value; `group` opens a section of --help."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, group=group))

@dataclass(frozen=True)
class Config:
    """Every setting of a run, frozen. Raises InputError that names the variable when a value is out of its range."""

    variant: str = knob("card", "row of settings to start from; see VARIANTS", group="run")
    seed: int = knob(1337, "seeds the weights; the order of the data is fixed", high=2**63)
    run_id: str = knob("", "names the log; empty: variant, seed and time")
    output_dir: str = knob(".", "folder of the artifact, the checkpoint and logs/")
    eval_only: bool = knob(False, "score the file ARTIFACT and do nothing else")
    artifact: str = knob("", "packed model; empty: OUTPUT_DIR/final_model.int6.ptz")
    audit: str = knob("", "file.npz for each target's nll, bytes and chunk in the last evaluation")
    max_artifact_bytes: int = knob(16_000_000, "cap on code + model bytes; more is an error", low=1)
    checkpoint_every: int = knob(0, "steps between saves of the averaged weights; 0 saves none")
    attention: str = knob("auto", "kernel; auto: fa3, else fa2, else sdpa", choices=("auto", "fa3", "fa2", "sdpa"))
    dtype: str = knob("auto", "activations; auto: bf16 on CUDA or AMX", choices=("auto", "bf16", "fp32"))

    data_path: str = knob("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin", group="data")
    tokenizer_path: str = knob("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of the shards")
    vocab_size: int = knob(1024, "pieces of the tokenizer", low=8, high=65536)
    train_batch_tokens: int = knob(786_432, "tokens a step over all ranks", low=1)
    train_seq_len: int = knob(2048, "tokens a training sequence", low=2, high=2**20)
    micro_batch_tokens: int = knob(98_304, "most tokens a forward pass of one rank; the rest accumulates", low=1)

    num_layers: int = knob(11, "blocks; the first half feeds skips to the second", low=2, high=1000, group="model")
    model_dim: int = knob(512, "width of the residual stream", low=8, high=65536)
    num_heads: int = knob(8, "query heads", low=1)
    num_kv_heads: int = knob(4, "key/value heads", low=1)
    mlp_mult: float = knob(3.0, "MLP width / MODEL_DIM", low=0.01)
    mlp_negative_slope: float = knob(0.5, "slope of the squared leaky ReLU; 0 is ReLU squared", high=1)
    rope_base: float = knob(10_000.0, "base of the rotary wavelengths", low=1)
    rope_dims: int = knob(16, "head dims that rotate; 0 rotates all")
    qk_gain_init: float = knob(1.5, "initial gain of each query head after QK-norm")
    xsa_last_n: int = knob(4, "last blocks whose heads exclude their own value; 0 is none")
    ln_scale_power: float = knob(0.5, "block inputs are scaled by (layer+1)**-power; 0 leaves them")
    smear_gate: bool = knob(True, "blend each token's embedding with the one before")
    bigram_vocab_size: int = knob(2048, "buckets of the hashed bigram table; 0 is no table")
    bigram_dim: int = knob(128, "width of the bigram table", low=1)
    ve_dim: int = knob(128, "width of the shared value embedding", low=1)
    ve_layers: tuple[int, ...] = knob((9, 10), "layers whose values get a token embedding; none is off")
    logit_softcap: float = knob(30.0, "logits are squashed into +-cap", low=1)
    tied_embed_init_std: float = knob(0.005, "initial spread of the token embedding")

    iterations: int = knob(20_000, "most optimizer steps", low=1, group="training")
    max_wallclock_seconds: float = knob(600.0, "training ends before this time; 0 is no limit")
    warmup_steps: int = knob(20, "steps a graph that compile and are then undone")
    warmdown_iters: int = knob(3500, "last steps over which the rate falls to 0; 0 is none")
    warmdown_frac: float = knob(0.0, "last share of the run over which it falls; 0 is none", high=1)
    matrix_lr: float = knob(0.025, "Muon: spectral norm of a step on a matrix")
    scalar_lr: float = knob(0.025, "AdamW: gains, gates and mixes")
    tied_embed_lr: float = knob(0.035, "AdamW: embedding tables")
    muon_momentum: float = knob(0.99, "Muon momentum after its warm-up", high=1)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at step 0", high=1)
    muon_momentum_warmup_steps: int = knob(1500, "steps of that warm-up")
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", low=1)
    muon_wd: float = knob(0.04, "decoupled weight decay of matrices")
    embed_wd: float = knob(0.04, "decoupled weight decay of tables")
    adam_wd: float = knob(0.0, "decoupled weight decay of gains, gates and mixes")
    beta1: float = knob(0.9, "AdamW", high=1)
    beta2: float = knob(0.95, "AdamW", high=1)
    adam_eps: float = knob(1e-8, "AdamW")
    grad_clip_norm: float = knob(0.3, "cap on the norm of the averaged gradient; 0 is none")
    averaging: str = knob("ema", "weights that are exported", choices=("ema", "swa", "last"))
    ema_decay: float = knob(0.997, "share of the average that a step keeps", high=1)
    swa_every: int = knob(50, "steps between SWA snapshots", low=1)
    swa_start_scale: float = knob(0.2, "SWA starts when the rate falls below this share", high=2)
    late_qat_threshold: float = knob(0.15, "fake-quantize below this share of the rate; 2 always", high=2)
    train_log_every: int = knob(500, "steps between train_loss lines", low=1)
    val_loss_every: int = knob(0, "steps between validations, off the clock; 0 is none before the end")

    matrix_bits: int = knob(6, "code width of matrices", low=2, high=8, group="quantization")
    embed_bits: int = knob(8, "code width of tables; 16 keeps fp16", low=2, high=16)
    clip_shares: tuple[float, ...] = knob((1.0, 0.95, 0.9, 0.85, 0.8, 0.7), "clips tried, as shares of a row's maximum")
    step_floor: float = knob(1.0, "least step, as a share of 1/(highest code); 0 is none")
    zstd_level: int = knob(22, "zstd effort", low=1, high=22)

    eval_seq_len: int = knob(0, "tokens a scoring window; 0 is TRAIN_SEQ_LEN", high=2**20, group="evaluation")
    eval_stride: int = knob(64, "targets that a window scores after the first", low=1)
    eval_batch_seqs: int = knob(32, "windows a forward pass of one rank", low=1)
    val_max_tokens: int = knob(0, "score only the first N targets; 0 is all, as a record must")
    ttt_epochs: int = knob(3, "passes of test-time training over each scored chunk; 0 is none")
    ttt_chunk_tokens: int = knob(32_768, "targets a chunk: scored first, trained on after", low=1)
    ttt_lr: float = knob(0.002, "SGD rate, the same for every chunk")
    ttt_momentum: float = knob(0.9, "SGD momentum", high=1)
    ttt_batch_seqs: int = knob(32, "sequences a step over all ranks", low=1)
    ttt_grad_clip: float = knob(1.0, "cap on the gradient norm; 0 is none")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, (low, high, choices) = vars(self)[f.name], (f.metadata[k] for k in ("low", "high", "choices"))
            for v in value if isinstance(value, tuple) else (value,):
                if choices and v not in choices:
                    raise InputError(f"{f.name.upper()}={v} must be one of {', '.join(choices)}")
                if not isinstance(v, str) and not low <= v <= high:
                    raise InputError(f"{f.name.upper()}={v} must lie in [{low:g}, {high:g}]: {f.metadata['help']}")
        self.check_together()

    def check_together(self) -> None:
        """Rules that bind several options. Each names its variables, whose values the error adds."""
        rules = {
            "MODEL_DIM must be a multiple of NUM_HEADS": self.model_dim % self.num_heads == 0,
            "NUM_HEADS must be a multiple of NUM_KV_HEADS": self.num_heads % self.num_kv_heads == 0,
            "MODEL_DIM / NUM_HEADS must be even": self.head_dim % 2 == 0,
            "ROPE_DIMS must be even, at most MODEL_DIM / NUM_HEADS": self.rope_dims in range(0, self.head_dim + 1, 2),
            "VE_LAYERS must lie below NUM_LAYERS": all(i < self.num_layers for i in self.ve_layers),
            "XSA_LAST_N must be at most NUM_LAYERS": self.xsa_last_n <= self.num_layers,
            "BIGRAM_VOCAB_SIZE must not be 1": self.bigram_vocab_size != 1,
            "EMBED_BITS must be 2 to 8, or 16": self.embed_bits <= 8 or self.embed_bits == 16,
            "CLIP_SHARES must lie in (0, 1], one or more": all(0 < c <= 1 for c in self.clip_shares or (0,)),
            "TRAIN_BATCH_TOKENS must be a multiple of TRAIN_SEQ_LEN": self.train_batch_tokens % self.train_seq_len == 0,
            "MICRO_BATCH_TOKENS must be at least TRAIN_SEQ_LEN": self.micro_batch_tokens >= self.train_seq_len,
            "EVAL_STRIDE must divide EVAL_SEQ_LEN or else TRAIN_SEQ_LEN": self.window % self.eval_stride == 0,
            "TTT_CHUNK_TOKENS must be a multiple of EVAL_SEQ_LEN or else TRAIN_SEQ_LEN":
                self.ttt_chunk_tokens % self.window == 0,
        }
        for text, holds in rules.items():
            if not holds:
                given = {n: vars(self)[n.lower()] for n in text.replace(",", "").split() if n.lower() in vars(self)}
                raise InputError(f"{text}; got {' '.join(f'{n}={v}' for n, v in given.items())}")

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """Default < variant < environment. A near-miss of a name is an error; other programs' variables are not."""
        hints, given = get_type_hints(cls), {}
        for name, text in env.items():
            if name.isupper() and name.lower() in hints:
                given[name.lower()] = parse(hints[name.lower()], name, text)
            elif close := difflib.get_close_matches(name, [k.upper() for k in hints], n=1, cutoff=0.88):
                raise InputError(f"{name} is not an option; did you mean {close[0]}? (--help lists all)")
        variant = given.get("variant", cls.variant)
        if variant not in VARIANTS:
            raise InputError(f"VARIANT={variant} must be one of {', '.join(VARIANTS)}")
        return cls(**VARIANTS[variant] | given)

    def group(self, *groups: str) -> dict[str, Any]:
        """The values of the options of these groups, by name; of all groups without an argument."""
        chosen = [members for name, members in option_groups() if not groups or name in groups]
        return {f.name: vars(self)[f.name] for members in chosen for f in members}

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def window(self) -> int:
        return self.eval_seq_len or self.train_seq_len

    @property
    def artifact_path(self) -> Path:
        return Path(self.artifact) if self.artifact else Path(self.output_dir) / "final_model.int6.ptz"

def option_groups() -> list[tuple[str, list[Field]]]:
    groups: list[tuple[str, list[Field]]] = []
    for f in fields(Config):
        if f.metadata["group"]:
            groups.append((f.metadata["group"], []))
        groups[-1][1].append(f)
    return groups

VARIANTS: dict[str, dict[str, Any]] = {
    "card": {},
    "demo": dict(
        data_path="./data/datasets/demo_sp1024", tokenizer_path="./data/tokenizers/demo_1024_bpe.model",
        num_layers=6, model_dim=128, num_heads=4, num_kv_heads=2, ve_layers=(4, 5), ve_dim=64, bigram_dim=64,
        train_seq_len=256, train_batch_tokens=2048, micro_batch_tokens=2048, warmup_steps=1, max_wallclock_seconds=120,
        warmdown_iters=0, warmdown_frac=0.5, matrix_lr=0.03, scalar_lr=0.02, tied_embed_lr=0.03, muon_momentum=0.95,
        muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=100, ema_decay=0.97, train_log_every=20,
        step_floor=0.0, eval_stride=128, ttt_epochs=1, ttt_chunk_tokens=4096, ttt_lr=0.01),
    "smoke": dict(
        data_path="./data/datasets/smoke", tokenizer_path="./data/tokenizers/smoke.model", dtype="fp32",
        num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, rope_dims=4, xsa_last_n=2, ve_layers=(2, 3),
        bigram_vocab_size=64, bigram_dim=8, ve_dim=8, train_seq_len=32, train_batch_tokens=256, micro_batch_tokens=128,
        iterations=20, max_wallclock_seconds=60, warmup_steps=1, warmdown_iters=10, muon_momentum_warmup_steps=10,
        ema_decay=0.8, train_log_every=5, val_loss_every=10, step_floor=0.0, eval_stride=8, ttt_chunk_tokens=256,
        ttt_lr=0.02),
}

def parse(kind: Any, name: str, text: str) -> Any:
    """`text` as `kind`: int, float, bool (0 or 1), str, or a comma-separated tuple of one of them."""
    try:
        if kind is bool:
            return {"0": False, "1": True}[text]
        if element := get_args(kind)[:1]:
            return tuple(parse(element[0], name, part.strip()) for part in text.split(",") if part.strip())
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        wanted = "0 or 1" if kind is bool else getattr(kind, "__name__", str(kind))
        raise InputError(f"{name}={text!r} is not valid; it takes {wanted}") from None

def usage() -> str:
    """What --help prints."""
    lines = ["usage: [NAME=value ...] [torchrun ... | python] train_gpt.py [--help | --describe]", "",
             f"VARIANT is one of {', '.join(VARIANTS)}. Precedence: default < variant < environment."]
    for group, members in option_groups():
        defaults = as_env({f.name: f.default for f in members})
        lines += ["", f"{group}:"]
        lines += [f"  {f'{f.name.upper()}={defaults[f.name.upper()]}':56s} {f.metadata['help']}" for f in members]
    return "\n".join(lines)

def as_env(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings as the environment would give them; `Config.from_env` reads them back exactly."""
    def text(value: Any) -> str:
        if isinstance(value, tuple):
            return ",".join(map(text, value))
        return str(int(value)) if isinstance(value, bool) else str(value)

    return {name.upper(): text(value) for name, value in values.items()}

# ----------------------------------------
# Ranks, clock, log: the only places that know of processes, devices and time.

@dataclass(frozen=True)
class Ranks:
    """The processes of a run. Every collective is the identity on one rank, so callers never ask how many there are."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensors: list[Tensor]) -> None:
        """Average each tensor over all ranks, in place, in one collective."""
        if self.world > 1:
            flat = self.sum_(torch.cat([t.flatten() for t in tensors])).div_(self.world)
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def scatter_mean(self, stack: Tensor) -> Callable[[], Tensor]:
        """Start averaging `stack` (N, ...) over ranks; call the result for this rank's share (ceil(N / world), ...)."""
        if self.world == 1:
            return lambda: stack
        padded = torch.cat((stack, stack.new_zeros(-len(stack) % self.world, *stack.shape[1:])))
        share = torch.empty_like(padded[: len(padded) // self.world])
        work = dist.reduce_scatter_tensor(share, padded, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return share.div_(self.world)

        return wait

    def gather(self, share: Tensor) -> Tensor:
        """All ranks' shares, concatenated along dim 0 (padding of `scatter_mean` included)."""
        if self.world == 1:
            return share
        out = share.new_empty(len(share) * self.world, *share.shape[1:])
        dist.all_gather_into_tensor(out, share.contiguous())
        return out

    def agree(self, *values: float) -> list[float]:
        """The main rank's values, on every rank. They stay on the host: no device waits for it."""
        if self.world == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(told, src=0)
        return told.tolist()

    def wait_for_main(self) -> None:
        """Return once the main rank has come here: what it wrote before is whole."""
        self.agree(0.0)

    def share(self, items: list) -> list:
        """This rank's contiguous share of `items`; the shares of all ranks are disjoint and cover it."""
        n = len(items)
        return items[n * self.rank // self.world : n * (self.rank + 1) // self.world]

    def memory(self) -> str:
        """The peak of device memory so far, as a log line; empty on a CPU."""
        if self.device.type != "cuda":
            return ""
        used, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return f"\npeak memory allocated: {used >> 20} MiB reserved: {held >> 20} MiB"

    def compile(self, fn: Callable) -> Callable:
        """`fn` as one static graph on CUDA; `fn` itself on a CPU, where compiling costs more than it returns."""
        return torch.compile(fn, dynamic=False, fullgraph=True) if self.device.type == "cuda" else fn

@contextmanager
def launch(env: Mapping[str, str]) -> Iterator[Ranks]:
    """The ranks that torchrun's variables in `env` describe (one without them): nccl and CUDA, or gloo and CPU."""
    rank, world, local = (int(env.get(k, v)) for k, v in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items())
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64  # training, scoring and adapting share one forward, in several shapes
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()

class Clock:
    """Training time in seconds: runs from creation, stands still inside `paused()`, which waits for the device."""

    def __init__(self, device: torch.device, first_step_seconds: float):
        self.synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.laps = deque([first_step_seconds], maxlen=65)
        self.skipped = 0.0
        self.synchronize()
        self.start = self.last = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.start - self.skipped

    def lap(self) -> None:
        now = time.perf_counter()
        self.laps.append(now - self.last)
        self.last = now

    @property
    def step_seconds(self) -> float:
        """The low median of the latest steps: one slow step, the first one above all, leaves it as it was."""
        return statistics.median_low(self.laps)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.synchronize()
        begin = time.perf_counter()
        yield
        self.synchronize()
        self.skipped += time.perf_counter() - begin
        self.last = time.perf_counter()

class Reading:
    """A scalar on its way to the host: `value` waits for it alone, not for what the device was given to do after it."""

    def __init__(self, scalar: Tensor):
        self.host = torch.empty((), pin_memory=scalar.is_cuda).copy_(scalar, non_blocking=True)
        self.arrived = torch.cuda.Event() if scalar.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def value(self) -> float:
        if self.arrived is not None:
            self.arrived.synchronize()
        return float(self.host)

class Log:
    """One `key:value` line an event, to the terminal and to OUTPUT_DIR/logs/RUN_ID.txt; silent beside the main rank."""

    def __init__(self, cfg: Config, ranks: Ranks):
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = cfg.run_id or f"{cfg.variant}_seed{cfg.seed}_{'eval_' if cfg.eval_only else ''}{stamp}"
        self.path = Path(cfg.output_dir) / "logs" / f"{name}.txt"
        self.active = ranks.is_main
        for package in PACKAGES:
            if importlib.util.find_spec(package) is None:
                raise InputError(f"the package {package} is missing; pip install -r requirements.txt")
        for file in (cfg.artifact_path, Path(cfg.audit)):
            if self.active and not file.parent.is_dir() and file.parent != Path(cfg.output_dir):
                raise InputError(f"there is no folder {file.parent} to hold {file.name}")
        if self.active:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch()
            except OSError as error:
                raise InputError(f"cannot write {self.path}: {error.strerror}; set OUTPUT_DIR elsewhere") from None

    def __call__(self, text: str) -> None:
        if self.active:
            from tqdm import tqdm

            tqdm.write(text)  # above a progress bar, where there is one
            sys.stdout.flush()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def header(self, cfg: Config, ranks: Ranks, overrides: list[str]) -> None:
        """What ran where: source, versions, device, and the settings that the environment gave."""
        source = Path(__file__).read_bytes()
        on_gpu = ranks.device.type == "cuda"
        device = torch.cuda.get_device_name(ranks.device) if on_gpu else f"cpu x{torch.get_num_threads()}"
        self(f"source:{Path(__file__).name} sha256:{hashlib.sha256(source).hexdigest()} bytes:{len(source)}")
        self(f"python:{sys.version.split()[0]} torch:{torch.__version__} "
             + " ".join(f"{package}:{importlib.metadata.version(package)}" for package in PACKAGES))
        self(f"device:{device} world_size:{ranks.world}")
        self(f"variant:{cfg.variant} seed:{cfg.seed} overrides: {' '.join(overrides) or 'none'}")

def progress_bar(label: str, total: float, log: Log) -> Any:
    """A progress bar with the time left when a person watches; silent otherwise."""
    from tqdm import tqdm

    shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    hidden = not (log.active and sys.stderr.isatty())
    return tqdm(desc=label, total=total, bar_format=shape, leave=False, disable=hidden)

# ----------------------------------------
# Data: shards -> one endless stream -> batches that do not depend on the number of ranks; bytes of each token.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024

def read_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, mapped uint16 (N,). Little-endian: 256 int32 (magic, version, N, 0...), N tokens."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise InputError(f"{path} is not a token shard of version {SHARD_VERSION}; make it with data/prepare.py")
    count = int(header[2])
    if count < 1 or size != SHARD_HEADER_BYTES + 2 * count:
        raise InputError(f"{path} is cut or empty: its header names {count} tokens, its {size} bytes hold "
                         f"{max(size - SHARD_HEADER_BYTES, 0) // 2}; get it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))

def find_shards(cfg: Config, split: str) -> list[Path]:
    """The shards of a split in order. A `fineweb_val_bytes_*.bin` sidecar holds byte counts, not tokens."""
    paths = sorted(p for p in Path(cfg.data_path).glob(f"fineweb_{split}_*.bin") if "_bytes_" not in p.name)
    if not paths:
        raise InputError(f"no fineweb_{split}_*.bin in DATA_PATH={cfg.data_path}; `python data/prepare.py demo` "
                         "makes a small set, `python data/prepare.py tokenize` one of your text")
    return paths

def check_tokens(tokens: np.ndarray, vocab_size: int, where: object) -> np.ndarray:
    """`tokens` as they are, or InputError if one of them is no id of the vocabulary."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise InputError(f"{where} holds token {tokens.max()}, but VOCAB_SIZE={vocab_size}: it is another tokenizer's")
    return tokens

class TokenStream:
    """Shards as one endless stream of tokens: after the last shard comes the first."""

    def __init__(self, paths: list[Path], vocab_size: int):
        self.paths, self.vocab_size = paths, vocab_size
        self.shards = [read_shard(p) for p in paths]
        self.ends = np.cumsum([len(s) for s in self.shards])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 of the stream, int64 (count,)."""
        parts = []
        while count:
            start %= int(self.ends[-1])
            i = int(np.searchsorted(self.ends, start, side="right"))
            shard, offset = self.shards[i], start - int(self.ends[i]) + len(self.shards[i])
            part = shard[offset : offset + count]
            parts.append(check_tokens(part, self.vocab_size, self.paths[i]))
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts).astype(np.int64)

class Batches:
    """Contiguous batches of a stream. Row i of a step's global batch is the same for any number of ranks.

    The next batch is read and sent to the device by a thread while the current one is computed.
    """

    def __init__(self, stream: TokenStream, cfg: Config, ranks: Ranks):
        rows, self.seq_len = cfg.train_batch_tokens // cfg.train_seq_len, cfg.train_seq_len
        if rows % ranks.world:
            raise InputError(f"TRAIN_BATCH_TOKENS / TRAIN_SEQ_LEN = {rows} rows do not divide by {ranks.world} ranks")
        self.stream, self.ranks, self.batch_tokens = stream, ranks, cfg.train_batch_tokens
        self.rows = rows // ranks.world
        self.micro_steps = next(n for n in range(1, self.rows + 1)
                                if self.rows % n == 0 and self.rows // n * self.seq_len <= cfg.micro_batch_tokens)
        self.reader = ThreadPoolExecutor(1)
        self.seek(0)

    def seek(self, step: int) -> None:
        self.step = step
        self.pending = self.reader.submit(self.load, step)

    def load(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of a step, (micro_steps, rows, seq_len) int64 on the device."""
        share = self.rows * self.seq_len
        tokens = torch.from_numpy(self.stream.read(step * self.batch_tokens + self.ranks.rank * share, share + 1))
        if self.ranks.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.ranks.device, non_blocking=True)
        shape = (self.micro_steps, -1, self.seq_len)
        return tokens[:-1].view(shape), tokens[1:].view(shape)

    def __next__(self) -> tuple[Tensor, Tensor]:
        batch = self.pending.result()
        self.seek(self.step + 1)
        return batch

class ByteTable(NamedTuple):
    """UTF-8 bytes of each token: `base`, one more for `space` pieces unless the token before is a `boundary`."""

    base: Tensor
    space: Tensor
    boundary: Tensor

    def count(self, previous: Tensor, targets: Tensor) -> Tensor:
        """Bytes of each target after its previous token, int64, by the contest's rule."""
        return self.base[targets] + (self.space[targets] & ~self.boundary[previous])

def load_byte_table(cfg: Config, device: torch.device) -> ByteTable:
    """The contest's byte rule, read off the tokenizer: control, unknown and unused pieces are boundaries of 0 bytes."""
    sp = load_tokenizer(cfg)
    base, space, boundary = (np.full(cfg.vocab_size, start) for start in (0, False, True))
    for i in range(cfg.vocab_size):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        piece, boundary[i] = sp.id_to_piece(i), False
        space[i] = piece.startswith("\u2581") and not sp.is_byte(i)
        base[i] = 1 if sp.is_byte(i) else len(piece[int(space[i]) :].encode())
    return ByteTable(*(torch.from_numpy(a).to(device) for a in (base, space, boundary)))

def load_tokenizer(cfg: Config) -> Any:
    """The SentencePiece model at TOKENIZER_PATH, checked against VOCAB_SIZE."""
    from sentencepiece import SentencePieceProcessor

    path = Path(cfg.tokenizer_path)
    if not path.is_file():
        raise InputError(f"no tokenizer at TOKENIZER_PATH={path}; `python data/prepare.py demo` makes one")
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise InputError(f"TOKENIZER_PATH={path} is not a SentencePiece model") from None
    if sp.vocab_size() != cfg.vocab_size:
        raise InputError(f"TOKENIZER_PATH={path} has {sp.vocab_size()} pieces, but VOCAB_SIZE={cfg.vocab_size}")
    return sp

# ----------------------------------------
# Model: token ids -> loss of each target.
# B sequences, T tokens, D model width, H query heads, K key/value heads, C head width, V vocabulary.

def norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dim. The epsilon is fp32's, pinned: embeddings start with a mean square of 2.5e-5."""
    return F.rms_norm(x, (x.size(-1),), eps=1.1920929e-07)

def rotary_tables(seq_len: int, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base**(-2j/dims), fp32 (T, 1, dims/2). In bf16 positions above 256 would coincide."""
    angles = torch.outer(torch.arange(seq_len).double(), base ** (-torch.arange(0, dims, 2).double() / dims))[:, None]
    return angles.cos().float(), angles.sin().float()

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the leading dims of x (B, T, H, C); the rest passes through (arXiv:2104.09864)."""
    r = cos.size(-1)
    x1, x2, rest = x.split((r, r, x.size(-1) - 2 * r), dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1).type_as(x)

def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch. q: (B, T, H, C); k, v: (B, T, K, C), H a multiple of K; returns (B, T, H, C)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """The dtype of activations: bf16 where matrix units are made for it, fp32 elsewhere, unless DTYPE says."""
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if cfg.dtype == "bf16" or (cfg.dtype == "auto" and fast) else torch.float32

def choose_attention(cfg: Config, device: torch.device) -> tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """(name, causal attention). A kernel that is asked for by name must be there; `auto` takes the best that is."""
    flash = device.type == "cuda" and compute_dtype(cfg, device) == torch.bfloat16
    hopper = flash and torch.cuda.get_device_capability(device)[0] == 9
    kernels = dict(fa3=("flash_attn_interface", hopper), fa2=("flash_attn", flash))
    for name in (n for n in kernels if cfg.attention in ("auto", n)):
        module, runs_here = kernels[name]
        try:
            kernel = importlib.import_module(module).flash_attn_func if runs_here else None
        except ImportError:
            kernel = None
        if kernel is not None:
            return name, partial(kernel, causal=True)
        if cfg.attention == name:
            raise InputError(f"ATTENTION={name} needs the module {module} and a GPU for it; auto takes what is there")
    return "sdpa", attend_sdpa

def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Remove from each head's output y (B, T, H, C) what lies along the token's own value v (B, T, K, C) (PR #265)."""
    grouped, direction = y.unflatten(2, (v.size(2), -1)), F.normalize(v, dim=-1).unsqueeze(3)
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).flatten(2, 3)

class Linear(nn.Module):
    """y = x W^T without bias; the weight is fp32 and cast to the dtype of x."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

class Table(nn.Module):
    """An embedding table, fp32 (rows, dim)."""

    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

class SmearGate(nn.Module):
    """Blends each token with the one before, by a learned share a channel (PR #65); a document's first stays pure."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = F.pad(ids[:, 1:] != BOS, (1, 0))[..., None]
        return x + inside * self.gate.sigmoid().to(x.dtype) * (before - x)

class BigramHashEmbedding(nn.Module):
    """A hashed embedding of (previous token, token) to add to the token's own (PR #65); the last bucket is 'none'."""

    def __init__(self, buckets: int, dim: int, model_dim: int):
        super().__init__()
        self.buckets = buckets
        self.embed, self.proj = Table(buckets, dim), Linear(dim, model_dim)
        self.scale = nn.Parameter(torch.empty(()))

    def bucket(self, ids: Tensor) -> Tensor:
        """Bucket of each token (B, T); first tokens of a row or of a document have no bigram."""
        before = F.pad(ids[:, :-1], (1, 0))
        hashed = torch.bitwise_xor(36313 * ids, 27191 * before) % (self.buckets - 1)
        return torch.where(F.pad(ids[:, 1:] != BOS, (1, 0)), hashed, self.buckets - 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * self.proj(self.embed(self.bucket(ids)))

class ValueEmbedding(nn.Module):
    """A token embedding that several layers share and add to their values, each with a weight of its own (PR #374)."""

    def __init__(self, vocab_size: int, dim: int, value_dim: int, layers: tuple[int, ...]):
        super().__init__()
        self.embed, self.proj = Table(vocab_size, dim), Linear(dim, value_dim)
        self.scale = nn.Parameter(torch.empty(()))
        self.layer_scales = nn.ParameterDict({str(i): nn.Parameter(torch.empty(1)) for i in layers})

    def forward(self, ids: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        shared = self.scale * self.proj(self.embed(ids))
        return {int(i): (weight * shared).to(dtype) for i, weight in self.layer_scales.items()}

class CausalSelfAttention(nn.Module):
    """Grouped-query attention: QK-norm, a gain a head, partial RoPE (PR #315); `exclusive` drops a head's own value."""

    def __init__(self, cfg: Config, exclusive: bool, attend: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.head_dim, self.exclusive, self.attend = cfg.head_dim, exclusive, attend
        dim, kv_dim = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        self.c_q, self.c_k, self.c_v = Linear(dim, dim), Linear(dim, kv_dim), Linear(dim, kv_dim)
        self.proj = Linear(dim, dim)
        self.q_gain = nn.Parameter(torch.empty(cfg.num_heads))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], value_embedding: Tensor | None) -> Tensor:
        heads = (-1, self.head_dim)
        q, k = (rotate(norm(c(x).unflatten(-1, heads)), *rotary) for c in (self.c_q, self.c_k))
        v = self.c_v(x)
        v = (v if value_embedding is None else v + value_embedding).unflatten(-1, heads)
        y = self.attend(q * self.q_gain[:, None].to(x.dtype), k, v)
        return self.proj((exclude_own_value(y, v) if self.exclusive else y).flatten(2))

class MLP(nn.Module):
    """Two matrices around a squared leaky ReLU (arXiv:2109.08668; leaky: PR #549)."""

    def __init__(self, dim: int, hidden: int, negative_slope: float):
        super().__init__()
        self.fc, self.proj = Linear(dim, hidden), Linear(hidden, dim)
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.negative_slope).square())

class Block(nn.Module):
    """Mixes the stream with the embedding x0, then adds attention and MLP; inputs scaled by depth (PR #315)."""

    def __init__(self, cfg: Config, layer: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.attn = CausalSelfAttention(cfg, layer >= cfg.num_layers - cfg.xsa_last_n, attend)
        self.mlp = MLP(cfg.model_dim, round(cfg.mlp_mult * cfg.model_dim), cfg.mlp_negative_slope)
        self.input_scale = (layer + 1) ** -cfg.ln_scale_power
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.empty(cfg.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.empty(2, cfg.model_dim))

    def forward(self, x: Tensor, x0: Tensor, rotary: tuple[Tensor, Tensor], value_embedding: Tensor | None) -> Tensor:
        keep, add = self.resid_mix.to(x.dtype)
        x = keep * x + add * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(norm(x) * self.input_scale, rotary, value_embedding)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x) * self.input_scale)

class GPT(nn.Module):
    """U-Net GPT with a tied head. Parameters are fp32 and empty until `init_weights` or `load_state_dict`.

    The first half of the blocks pushes its outputs; the second half adds them back, the latest first.
    """

    def __init__(self, cfg: Config, attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend_sdpa,
                 dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype, self.softcap, self.encoder_layers = dtype, cfg.logit_softcap, cfg.num_layers // 2
        vocab, dim, buckets = cfg.vocab_size, cfg.model_dim, cfg.bigram_vocab_size
        self.tok_emb = Table(vocab, dim)
        self.bigram = BigramHashEmbedding(buckets, cfg.bigram_dim, dim) if buckets else None
        self.smear = SmearGate(dim) if cfg.smear_gate else None
        kv_dim, layers = cfg.num_kv_heads * cfg.head_dim, cfg.ve_layers
        self.value_embed = ValueEmbedding(vocab, cfg.ve_dim, kv_dim, layers) if layers else None
        self.blocks = nn.ModuleList(Block(cfg, i, attend) for i in range(cfg.num_layers))
        self.skip_weights = nn.Parameter(torch.empty(self.encoder_layers, cfg.model_dim))
        with torch.device("cpu"):
            cos, sin = rotary_tables(max(cfg.train_seq_len, cfg.window), cfg.rope_dims or cfg.head_dim, cfg.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, cfg: Config) -> None:
        """Orthogonal matrices, hash and value projections at 1/sqrt(2L); zero output projections; gains 1 (PR #65)."""
        draw, small = torch.Generator().manual_seed(cfg.seed), (2 * cfg.num_layers) ** -0.5
        fills = {"q_gain": cfg.qk_gain_init, "bigram.scale": 0.05, "value_embed.scale": 0.1, "gate": 0.0}
        tables = {"tok_emb": cfg.tied_embed_init_std, "value_embed.embed": 0.01, "bigram.embed": 0.0}
        for name, p in self.named_parameters():
            if (owner := name.removesuffix(".weight")) in tables:
                nn.init.normal_(p, std=tables[owner], generator=draw)
            elif name.endswith(("attn.proj.weight", "mlp.proj.weight")):
                p.zero_()
            elif name.endswith(".weight"):
                nn.init.orthogonal_(p, gain=1.0 if "blocks" in name else small, generator=draw)
            else:
                p.fill_(fills.get(name, fills.get(name.rpartition(".")[2], 1.0)))
        for block in self.blocks:
            block.resid_mix[1].zero_()

    def hidden(self, ids: Tensor) -> Tensor:
        """Final normalized states (B, T, D) of token ids (B, T): the one path for training, scoring and adapting."""
        x = self.tok_emb(ids)
        x = norm(x if self.bigram is None else x + self.bigram(ids)).to(self.dtype)
        x = x0 = x if self.smear is None else self.smear(x, ids)
        values = self.value_embed(ids, x.dtype) if self.value_embed is not None else {}
        rotary, skips = (self.cos[: ids.size(1)], self.sin[: ids.size(1)]), []
        for i, block in enumerate(self.blocks):
            if i >= self.encoder_layers and skips:  # with an odd number of blocks the last one finds none
                x = x + self.skip_weights[i - self.encoder_layers].to(x.dtype) * skips.pop()
            x = block(x, x0, rotary, values.get(i))
            if i < self.encoder_layers:
                skips.append(x)
        return norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped fp32 logits (..., V) of final states (..., D), by the tied embedding."""
        raw = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype)).float()
        return self.softcap * torch.tanh(raw / self.softcap)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of the targets (B, S) of the last S <= T positions of ids (B, T); fp32 (B, S)."""
        logits = self.logits(self.hidden(ids)[:, -targets.size(1) :])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of every parameter by name: `matrix` of a Linear, `table` of embeddings, `scalar` for the rest."""
    kinds = {Linear: "matrix", Table: "table"}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_parameters()}
    return {name: kinds.get(type(owner), "scalar") for name, owner in owners.items()}

# ----------------------------------------
# Optimizer: gradients -> weights. Muon for matrices, sharded over ranks; AdamW for tables and scalars.

def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix in g (..., R, C) towards 1 by a quintic Newton-Schulz iteration.

    Five steps land them in about [0.7, 1.2], which trains as well as exactly 1 (kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x

class Muon(torch.optim.Optimizer):
    """Momentum SGD with orthogonalized steps, for matrices. A group holds matrices of one shape, stepped as one stack.

    `lr` is the spectral norm of a step, times sqrt(rows / cols) for tall matrices.
    """

    def __init__(self, params: list[Tensor], ranks: Ranks, cfg: Config, dtype: torch.dtype):
        shapes = sorted({p.shape for p in params}, key=lambda s: -s.numel())
        super().__init__([dict(params=[p for p in params if p.shape == s]) for s in shapes],
                         dict(lr=cfg.matrix_lr, base_lr=cfg.matrix_lr, momentum=0.0, weight_decay=cfg.muon_wd))
        self.ranks = ranks
        self.orthogonalize = ranks.compile(lambda g: orthogonalize(g.to(dtype), cfg.muon_backend_steps))

    def reduced_gradients(self) -> list[Tensor]:
        """This rank's share of each group's stack of gradients, averaged. All reductions start before a wait."""
        waits = [self.ranks.scatter_mean(torch.stack([p.grad for p in g["params"]])) for g in self.param_groups]
        return [wait() for wait in waits]

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        for group, grad in zip(self.param_groups, gradients):
            lr, momentum, state = group["lr"], group["momentum"], self.state[group["params"][0]]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            buffer = state["momentum_buffer"].mul_(momentum).add_(grad)
            update = self.ranks.gather(self.orthogonalize(grad + momentum * buffer))
            scale = max(1.0, grad.size(-2) / grad.size(-1)) ** 0.5
            torch._foreach_mul_(group["params"], 1 - lr * group["weight_decay"])
            torch._foreach_add_(group["params"], list(update[: len(group["params"])].float()), alpha=-lr * scale)

class Optimizers:
    """Muon and AdamW as one: averages the gradients over ranks, clips their joint norm, steps both."""

    def __init__(self, model: GPT, ranks: Ranks, cfg: Config):
        roles: dict[str, list[Tensor]] = dict(matrix=[], table=[], scalar=[])
        for (_, p), role in zip(model.named_parameters(), parameter_roles(model).values(), strict=True):
            roles[role].append(p)
        self.muon = Muon(roles["matrix"], ranks, cfg, model.dtype)
        rates = dict(table=(cfg.tied_embed_lr, cfg.embed_wd), scalar=(cfg.scalar_lr, cfg.adam_wd))
        groups = [dict(params=roles[k], lr=lr, base_lr=lr, weight_decay=wd) for k, (lr, wd) in rates.items()]
        fused, betas = ranks.device.type == "cuda", (cfg.beta1, cfg.beta2)
        self.adam = torch.optim.AdamW(groups, betas=betas, eps=cfg.adam_eps, fused=fused)
        self.ranks, self.clip = ranks, cfg.grad_clip_norm or math.inf

    @torch.no_grad()
    def step(self, scale: float, momentum: float) -> Tensor:
        """One step at `scale` times the peak rates; returns the norm of the averaged gradient, before the clip."""
        shares = self.muon.reduced_gradients()
        replicated = [p.grad for group in self.adam.param_groups for p in group["params"]]
        self.ranks.mean_(replicated)
        squares = self.ranks.sum_(sum(s.square().sum() for s in shares)) + sum(g.square().sum() for g in replicated)
        norm_before = squares.sqrt()
        torch._foreach_mul_(shares + replicated, (self.clip / (norm_before + 1e-6)).clamp(max=1.0))
        for gradient in shares + replicated:
            gradient.nan_to_num_(0.0, 0.0, 0.0)  # the host sees a broken loss a step later: spare the weights till then
        for group in self.muon.param_groups + self.adam.param_groups:
            group["lr"] = group["base_lr"] * scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        self.muon.step(shares)
        self.adam.step()
        return norm_before

    def state_dict(self) -> list[dict]:
        return [copy.deepcopy(optimizer.state_dict()) for optimizer in (self.muon, self.adam)]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip((self.muon, self.adam), states, strict=True):
            optimizer.state.clear()
            optimizer.load_state_dict(state)

# ----------------------------------------
# Schedules: pure functions of progress.

def share_done(step: int, elapsed: float, cfg: Config) -> float:
    """How much of the run is behind, by steps or by the clock, whichever is further."""
    return max(step / cfg.iterations, elapsed / (cfg.max_wallclock_seconds or math.inf))

def lr_scale(step: int, elapsed: float, step_seconds: float, cfg: Config) -> float:
    """Share of the peak learning rate at `step` after `elapsed` seconds: 1, then linear to 0 over the warmdown.

    The run ends at ITERATIONS or at the clock's limit, whichever comes first at `step_seconds` a step.
    """
    seconds_left = (cfg.max_wallclock_seconds or math.inf) - elapsed
    steps_left = min(cfg.iterations - step, seconds_left / max(step_seconds, 1e-9))
    by_steps = steps_left / cfg.warmdown_iters if cfg.warmdown_iters else 1.0
    by_share = (1 - share_done(step, elapsed, cfg)) / cfg.warmdown_frac if cfg.warmdown_frac else 1.0
    return min(1.0, max(0.0, min(by_steps, by_share)))

def out_of_time(elapsed: float, step_seconds: float, cfg: Config) -> bool:
    """Whether another step might end after the limit. The device may still be busy with the one before."""
    return 0 < cfg.max_wallclock_seconds < elapsed + 2 * step_seconds

def muon_momentum(step: int, cfg: Config) -> float:
    share = min(1.0, step / cfg.muon_momentum_warmup_steps) if cfg.muon_momentum_warmup_steps else 1.0
    return (1 - share) * cfg.muon_momentum_warmup_start + share * cfg.muon_momentum

def average_weight(step: int, scale: float, averaged: int, cfg: Config) -> float:
    """How far the average moves to the weights after `step`: EMA 1 - decay, SWA 1/n at its n-th snapshot, last 1."""
    if cfg.averaging == "swa":
        return 1 / (averaged + 1) if scale < cfg.swa_start_scale and step % cfg.swa_every == 0 else 0.0
    return 1 - cfg.ema_decay if cfg.averaging == "ema" else 1.0

# ----------------------------------------
# Averaging: EMA and SWA are one recurrence, in fp32.

class Average:
    """average += weight * (model - average); `count` says how many times the weights went in."""

    def __init__(self, model: nn.Module):
        self.source = dict(model.named_parameters())
        self.values = {name: p.detach().float().clone() for name, p in self.source.items()}
        self.count = 0

    @torch.no_grad()
    def update(self, weight: float) -> None:
        if weight:
            torch._foreach_lerp_(list(self.values.values()), [p.float() for p in self.source.values()], weight)
            self.count += 1

# ----------------------------------------
# Quantization: weights -> integer codes and a step a row. Late QAT and the export share one function, hence one grid.

def quantize_rows(w: Tensor, bits: int, cfg: Config) -> tuple[Tensor, Tensor]:
    """Codes int8 (R, C) and steps fp16 (R,), such that codes * steps[:, None] is close to w (R, C).

    Each row keeps the clip with the least squared error (GPTQ-lite; PR #414 chose one a tensor).
    """
    top = 2 ** (bits - 1) - 1
    peak, floor = w.abs().amax(1), max(cfg.step_floor / top, 1e-7)
    least = torch.full_like(peak, math.inf)
    codes, steps = torch.zeros_like(w), torch.zeros_like(peak)
    for share in cfg.clip_shares:
        step = (peak * (share / top)).clamp_min(floor).half().float()
        code = (w / step[:, None]).round().clamp(-top, top)
        error = (code * step[:, None] - w).square().sum(1)
        better = error < least
        codes, steps = torch.where(better[:, None], code, codes), torch.where(better, step, steps)
        least = torch.minimum(error, least)
    return codes.to(torch.int8), steps.half()

def dequantize_rows(codes: Tensor, steps: Tensor) -> Tensor:
    """fp32 weights (R, C) of codes int8 (R, C) and steps fp16 (R,)."""
    return codes.float() * steps.float()[:, None]

def code_bits(model: nn.Module, cfg: Config) -> dict[str, int]:
    """Code width of every parameter by name; 16 is fp16: gains, and the small projections of hash and value tables."""
    widths = dict(matrix=cfg.matrix_bits, table=cfg.embed_bits)
    return {name: widths[role] if role == "table" or role == "matrix" and name.startswith("blocks.") else 16
            for name, role in parameter_roles(model).items()}

@contextmanager
def on_export_grid(model: GPT, cfg: Config) -> Iterator[None]:
    """Inside, the blocks' matrices stand on their export grid; gradients pass straight through (arXiv:1308.3432).

    The graph is the one of plain training: switching this on compiles nothing, and no compiler can fold it away.
    """
    bits = code_bits(model, cfg)
    matrices = [p for name, p in model.blocks.named_parameters(prefix="blocks") if bits[name] < 16]
    exact = [p.detach().clone() for p in matrices]
    try:
        with torch.no_grad():
            for cols in {p.size(1) for p in matrices}:  # rows are rounded one by one: all of one length go together
                alike = [p for p in matrices if p.size(1) == cols]
                rounded = dequantize_rows(*quantize_rows(torch.cat(alike), cfg.matrix_bits, cfg))
                torch._foreach_copy_(alike, rounded.split([len(p) for p in alike]))
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(matrices, exact)

def quantize(weights: Mapping[str, Tensor], bits: Mapping[str, int], cfg: Config) -> dict[str, Tensor]:
    """The tensors of an artifact: `name.codes` and `name.steps` of coded weights, `name` in fp16 of the rest."""
    tensors = {}
    for name, w in weights.items():
        if bits[name] == 16:
            tensors[name] = w.half()
        else:
            tensors[f"{name}.codes"], tensors[f"{name}.steps"] = quantize_rows(w.float(), bits[name], cfg)
    return {name: t.cpu().contiguous() for name, t in tensors.items()}

def dequantize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for name, t in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "codes":
            steps = tensors[f"{base}.steps"]
            if t.ndim != 2 or steps.shape != t.shape[:1]:
                raise InputError(f"{base} has codes {list(t.shape)} but steps {list(steps.shape)}")
            weights[base] = dequantize_rows(t, steps)
        elif kind != "steps":
            weights[name] = t.float()
    return weights

# ----------------------------------------
# Artifact: tensors and settings <-> one checked file that cannot run code.
# magic, format (uint32), sha256 of the rest | zstd of: length (uint32), JSON header, raw little-endian tensors

ARTIFACT_MAGIC, ARTIFACT_FORMAT, ARTIFACT_MOST_UNPACKED = b"PGLF", 1, 2**30
DTYPES = {"int8": "<i1", "float16": "<f2", "float32": "<f4"}

def artifact_settings(cfg: Config) -> dict[str, str]:
    """The settings that travel with the weights: what the model is and how it is scored, no path and nothing else."""
    others = ("variant", "seed", "vocab_size", "train_seq_len", "matrix_bits")
    return as_env(cfg.group("model", "evaluation") | {k: vars(cfg)[k] for k in others})

def pack(tensors: Mapping[str, Tensor], cfg: Config, level: int) -> bytes:
    """The file that holds `tensors`, and the settings and the tokenizer's hash that an evaluator needs."""
    import zstandard

    arrays = {name: tensors[name].numpy() for name in sorted(tensors, key=lambda n: (tensors[n].element_size(), n))}
    header = json.dumps({
        "settings": artifact_settings(cfg),
        "tokenizer_sha256": hashlib.sha256(Path(cfg.tokenizer_path).read_bytes()).hexdigest(),
        "tensors": [[name, str(a.dtype), list(a.shape)] for name, a in arrays.items()],
    }, separators=(",", ":")).encode()
    raw = [a.astype(DTYPES[str(a.dtype)]).tobytes() for a in arrays.values()]
    body = b"".join([len(header).to_bytes(4, "little"), header, *raw])
    packed = zstandard.ZstdCompressor(level=level).compress(body)
    return b"".join([ARTIFACT_MAGIC, ARTIFACT_FORMAT.to_bytes(4, "little"), hashlib.sha256(packed).digest(), packed])

def unpack(blob: bytes) -> tuple[dict, dict[str, Tensor]]:
    """(header, tensors) of a packed file. Raises InputError when it is foreign, newer, cut or damaged."""
    import zstandard

    version = int.from_bytes(blob[4:8], "little")
    if blob[:4] != ARTIFACT_MAGIC:
        raise InputError("it is not an artifact of train_gpt.py")
    if version != ARTIFACT_FORMAT:
        raise InputError(f"it has format {version}, not {ARTIFACT_FORMAT}; use the train_gpt.py that wrote it")
    if hashlib.sha256(blob[40:]).digest() != blob[8:40]:
        raise InputError("it is cut or damaged: its checksum does not match")
    try:
        if zstandard.get_frame_parameters(blob[40:]).content_size > ARTIFACT_MOST_UNPACKED:
            raise ValueError("too large unpacked")
        body = zstandard.ZstdDecompressor().decompress(blob[40:])
        start = 4 + int.from_bytes(body[:4], "little")
        header, tensors = json.loads(body[4:start]), {}
        for name, dtype, shape in header["tensors"]:
            array = np.frombuffer(body, DTYPES[dtype], math.prod(shape), start).reshape(shape)
            tensors[name], start = torch.from_numpy(array.astype(dtype)), start + array.nbytes
        if start != len(body):
            raise ValueError("length")
    except (zstandard.ZstdError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"its contents do not fit its header ({error})") from None
    return header, tensors

def write_file(path: Path, blob: bytes) -> None:
    """Write all of `blob` or nothing: an interrupted write leaves the old file."""
    try:
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(blob)
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None

def save_average(average: Average, cfg: Config, log: Log) -> None:
    """Write the averaged weights, fp32, beside the artifact; EVAL_ONLY=1 and a higher MAX_ARTIFACT_BYTES score them."""
    path = Path(cfg.output_dir) / "final_model.average.ptz"
    if log.active and average.count:
        write_file(path, pack({name: v.cpu() for name, v in average.values.items()}, cfg, level=3))
        log(f"checkpoint:{path} averaging:{cfg.averaging} updates:{average.count}")

def save_artifact(model: GPT, cfg: Config, ranks: Ranks, log: Log) -> None:
    """Quantize and pack the model's weights and write them; refuses a file that is over the cap with the code."""
    tensors = quantize({name: p.detach() for name, p in model.named_parameters()}, code_bits(model, cfg), cfg)
    blob, code = pack(tensors, cfg, cfg.zstd_level), Path(__file__).stat().st_size
    payload, count = sum(t.nbytes for t in tensors.values()), sum(p.numel() for p in model.parameters())
    kind, total = f"int{cfg.matrix_bits}+zstd-{cfg.zstd_level}", len(blob) + code
    log(f"Serialized model {kind}: {len(blob)} bytes (payload:{payload} payload_ratio:{4 * count / payload:.2f}x)")
    log(f"Code size: {code} bytes")
    log(f"Total submission size {kind}: {total} bytes")
    if (excess := total - cfg.max_artifact_bytes) > 0:
        raise Unusable(f"code + model = {total} bytes, {excess} over MAX_ARTIFACT_BYTES={cfg.max_artifact_bytes}, so "
                       f"{cfg.artifact_path} was not written; at {8 * len(blob) / count:.2f} bits a weight it fits "
                       f"with {excess * count // len(blob)} weights less, a larger MUON_WD or fewer MATRIX_BITS")
    if ranks.is_main:
        write_file(cfg.artifact_path, blob)

def load_artifact(path: Path, env: Mapping[str, str]) -> tuple[Config, dict[str, Tensor]]:
    """(settings, fp32 weights) of the artifact at `path`. `env` may change how it is scored, not what it is."""
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the artifact {path}: {error.strerror}") from None
    try:
        header, tensors = unpack(blob)
        if stray := header["settings"].keys() ^ artifact_settings(Config()).keys():
            raise InputError(f"its settings lack or add {', '.join(sorted(stray))}")
        cfg, built = Config.from_env({**header["settings"], **env}), Config.from_env(header["settings"])
        changed = [k.upper() for k, v in built.group("model").items() if v != vars(cfg)[k]]
        if changed or cfg.vocab_size != built.vocab_size:
            raise InputError(f"{', '.join(changed or ['VOCAB_SIZE'])} is fixed by the artifact; unset it")
        if (total := len(blob) + Path(__file__).stat().st_size) > cfg.max_artifact_bytes:
            raise InputError(f"code + model = {total} bytes, over MAX_ARTIFACT_BYTES={cfg.max_artifact_bytes}")
        if hashlib.sha256(Path(cfg.tokenizer_path).read_bytes()).hexdigest() != header["tokenizer_sha256"]:
            raise InputError(f"TOKENIZER_PATH={cfg.tokenizer_path} is not the tokenizer it was trained with")
        return cfg, dequantize(tensors)
    except (InputError, OSError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"artifact {path}: {error}") from None

def load_model(cfg: Config, weights: Mapping[str, Tensor], ranks: Ranks) -> GPT:
    """A model with these weights, on the device; built without memory, so that no header can make it allocate."""
    try:
        with torch.device("meta"):
            model = GPT(cfg, choose_attention(cfg, ranks.device)[1], compute_dtype(cfg, ranks.device))
        model.load_state_dict(dict(weights), assign=True)
    except RuntimeError as error:
        raise InputError(f"the artifact's tensors do not fit its settings: {' '.join(str(error).split())}") from None
    return model.to(ranks.device).requires_grad_()

# ----------------------------------------
# Training: batches -> averaged weights, inside the wallclock budget.

class Trainer:
    """What an optimizer step reads and writes. Warm-up, training and tests call the same `step`."""

    def __init__(self, model: GPT, batches: Batches, cfg: Config, ranks: Ranks):
        self.model, self.batches, self.cfg, self.ranks = model, batches, cfg, ranks
        self.optimizers, self.average = Optimizers(model, ranks, cfg), Average(model)
        self.forward = ranks.compile(model)

    def step(self, scale: float, momentum: float, qat: bool) -> Reading:
        """One optimizer step at `scale` times the peak rates; reads the loss of the global batch, before the step."""
        ids, targets = next(self.batches)
        loss = torch.zeros((), device=self.ranks.device)
        with on_export_grid(self.model, self.cfg) if qat else nullcontext():
            for x, y in zip(ids, targets):
                part = self.forward(x, y).mean() / len(ids)
                part.backward()
                loss += part.detach()
        norm_before = self.optimizers.step(scale, momentum)
        self.model.zero_grad(set_to_none=True)
        return Reading(self.ranks.sum_(loss) / self.ranks.world + 0 * norm_before)  # a broken gradient shows too

    def state(self) -> tuple:
        """A copy of all that a step changes: weights, optimizers, position in the data."""
        return copy.deepcopy(self.model.state_dict()), self.optimizers.state_dict(), self.batches.step

    def restore(self, state: tuple) -> None:
        weights, optimizers, position = state
        self.model.load_state_dict(weights)
        self.optimizers.load_state_dict(optimizers)
        self.batches.seek(position)

    def warm_up(self, log: Log) -> float:
        """Run the steps that training will run, then undo them; returns the seconds of one, 0 if unknown."""
        before, seconds = self.state(), 0.0
        for qat in (True, False) if self.cfg.late_qat_threshold else (False,):
            for i in range(self.cfg.warmup_steps):
                begin = time.perf_counter()
                self.step(1.0, self.cfg.muon_momentum, qat).value()
                seconds = time.perf_counter() - begin if i else 0.0  # the first one compiles
                log(f"warmup_step:{i + 1}/{self.cfg.warmup_steps} late_qat:{int(qat)}")
        self.restore(before)
        return seconds

def timing(step: int, seconds: float) -> str:
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / step:.2f}ms"

def report_step(done: tuple[int, float, Reading] | None, cfg: Config, log: Log) -> None:
    """Log the first steps and every TRAIN_LOG_EVERY-th; raise Unusable when the loss is no number."""
    if done is None:
        return
    step, seconds, loss = done[0], done[1], done[2].value()
    if not math.isfinite(loss):
        raise Unusable(f"the loss is {loss} at step {step}; lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR")
    if step <= 10 or step % cfg.train_log_every == 0:
        log(f"step:{step}/{cfg.iterations} train_loss:{loss:.4f} {timing(step, seconds)}")

def train(trainer: Trainer, validate: Callable[[], Score], log: Log) -> None:
    """Train until ITERATIONS or just before the clock's limit; the average is in `trainer.average`.

    A step is reported while the next one runs, so that the device is never idle.
    """
    cfg, average, qat, done = trainer.cfg, trainer.average, False, None
    clock = Clock(trainer.ranks.device, trainer.warm_up(log))
    bar = progress_bar("training", 1.0, log)
    for step in range(cfg.iterations):
        elapsed, step_seconds = trainer.ranks.agree(clock.seconds(), clock.step_seconds)
        bar.update(share_done(step, elapsed, cfg) - bar.n)
        if step and out_of_time(elapsed, step_seconds, cfg):
            log(f"stopping_early: wallclock_cap {timing(step, elapsed)} step:{step}/{cfg.iterations}")
            break
        if step and cfg.val_loss_every and step % cfg.val_loss_every == 0:
            with clock.paused():
                log(f"step:{step}/{cfg.iterations} {validate()} {timing(step, elapsed)}")
        scale = lr_scale(step, elapsed, step_seconds, cfg)
        if not qat and scale < cfg.late_qat_threshold:
            qat = True
            log(f"late_qat:enabled step:{step} scale:{scale:.4f}")
        reading = trainer.step(scale, muon_momentum(step, cfg), qat)
        report_step(done, cfg, log)
        clock.lap()
        done = step + 1, clock.seconds(), reading
        average.update(average_weight(step + 1, scale, average.count, cfg))
        if cfg.checkpoint_every and (step + 1) % cfg.checkpoint_every == 0:
            save_average(trainer.average, cfg, log)
    report_step(done, cfg, log)
    clock.synchronize()
    bar.close()
    log(f"training ended: step:{done[0]}/{cfg.iterations} {timing(done[0], clock.seconds())}")
    if not average.count:
        average.update(1.0)
        log(f"averaging: {cfg.averaging} took no snapshot, so the last weights stand in")
    log(f"averaging:{cfg.averaging} updates:{average.count}{trainer.ranks.memory()}")

# ----------------------------------------
# Evaluation: stream and model -> chunks whose scores are final -> bits per byte. Only the Scorer holds the stream.

def score_windows(low: int, high: int, seq_len: int, stride: int) -> list[tuple[int, int]]:
    """(first target, how many) of windows that score [low, high) once; they score the last targets of their seq_len.

    The stream's first window scores all its targets, later ones `stride`; where the stream ends moves no window.
    """
    return [(0, seq_len)] * (low == 0) + [(first, stride) for first in range(low or seq_len, high, stride)]

class ScoredChunk(NamedTuple):
    """A stretch of the stream after its score was committed on every rank: all that an adapter ever sees."""

    index: int
    inputs: Tensor  # (n,)
    targets: Tensor  # (n,)
    nll: Tensor  # (n,) float64, nats; final
    last: bool  # nothing follows, so nothing may be learnt from it

class Score(NamedTuple):
    """The result of one pass over the stream."""

    loss: float  # nats a token
    bpb: float  # bits a byte
    seconds: float

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.4f} val_bpb:{self.bpb:.4f} eval_time:{1000 * self.seconds:.0f}ms"

class Scorer:
    """Scores the validation stream from left to right in chunks; each chunk is final before it leaves."""

    def __init__(self, cfg: Config, ranks: Ranks, log: Log):
        stream = np.concatenate([check_tokens(read_shard(p), cfg.vocab_size, p) for p in find_shards(cfg, "val")])
        if len(stream) < 2:
            raise InputError(f"the validation split in {cfg.data_path} has {len(stream)} token; scoring needs 2")
        stream = stream[: cfg.val_max_tokens + 1] if cfg.val_max_tokens else stream
        self.tokens = torch.from_numpy(stream.astype(np.int64)).to(ranks.device)
        self.bytes = load_byte_table(cfg, ranks.device).count(self.tokens[:-1], self.tokens[1:])
        self.cfg, self.ranks, self.log = cfg, ranks, log

    @torch.no_grad()
    def losses(self, forward: Callable, firsts: list[int], count: int) -> Tensor:
        """Losses (len(firsts), count) of the `count` targets from each of `firsts` on, at the end of a full window.

        Where the stream ends earlier, its last token repeats: causality keeps that out of every score that counts.
        """
        device, last = self.tokens.device, len(self.tokens) - 1
        span = torch.arange(count - self.cfg.window, count + 1, device=device)
        tokens = self.tokens[(torch.tensor(firsts, device=device)[:, None] + span).clamp(max=last)]
        return forward(tokens[:, :-1], tokens[:, -count:])

    def batches(self, windows: list[tuple[int, int]], per_chunk: int) -> Iterator[list[tuple[int, int]]]:
        """This rank's windows in batches. On CUDA a short one is filled up with its last, so that one graph serves."""
        mine = self.ranks.share(windows)
        if mine and mine[0][0] == 0:
            yield [mine.pop(0)]
        size = min(self.cfg.eval_batch_seqs, -(-per_chunk // self.ranks.world))
        for i in range(0, len(mine), size):
            batch = mine[i : i + size]
            yield batch + batch[-1:] * (size - len(batch)) * (self.ranks.device.type == "cuda")

    def chunks(self, forward: Callable, stride: int, chunk_tokens: int) -> Iterator[ScoredChunk]:
        """Score the stream chunk by chunk. The sum that commits a chunk is the barrier before anyone trains on it."""
        total, bar = len(self.tokens) - 1, progress_bar("scoring", len(self.tokens) - 1, self.log)
        for index, low in enumerate(range(0, total, chunk_tokens)):
            high = min(low + chunk_tokens, total)
            nll = torch.zeros(high - low, dtype=torch.float64, device=self.tokens.device)
            for batch in self.batches(score_windows(low, high, self.cfg.window, stride), chunk_tokens // stride):
                first, last = batch[0][0], min(sum(batch[-1]), high)
                rows = self.losses(forward, [w[0] for w in batch], batch[0][1])
                nll[first - low : last - low] = rows.flatten()[: last - first]
            inputs, targets = self.tokens[low:high], self.tokens[low + 1 : high + 1]
            yield ScoredChunk(index, inputs, targets, self.ranks.sum_(nll), last=high == total)
            bar.update(high - low)
        bar.close()

    def evaluate(self, forward: Callable, stride: int, chunk_tokens: int, adapt: Callable | None = None) -> Score:
        """One pass over the stream. `adapt`, if any, gets each chunk but the last after its score is final."""
        begin, chunks = time.perf_counter(), []
        for chunk in self.chunks(forward, stride, chunk_tokens):
            chunks.append(chunk)
            if adapt is not None and not chunk.last:
                adapt(chunk)
        nll = torch.cat([c.nll for c in chunks])
        if self.cfg.audit and self.ranks.is_main:
            index = np.repeat([c.index for c in chunks], [len(c.nll) for c in chunks])
            np.savez(self.cfg.audit, nll=nll.cpu().numpy(), bytes=self.bytes.cpu().numpy(), chunk=index)
        loss, size = float(nll.mean()), int(self.bytes.sum())
        return Score(loss, loss * len(nll) / math.log(2) / max(size, 1), time.perf_counter() - begin)

    def plain(self, forward: Callable) -> Score:
        """Windows side by side: the quick score of training logs and of the int6 round trip."""
        return self.evaluate(forward, self.cfg.window, self.cfg.window * 1024)

    def sliding(self, forward: Callable, adapt: Callable | None = None) -> Score:
        """Windows EVAL_STRIDE apart, so that almost every target sees a full context; the score that counts."""
        return self.evaluate(forward, self.cfg.eval_stride, self.cfg.ttt_chunk_tokens, adapt)

# ----------------------------------------
# Test-time training: scored chunks -> better weights for the next ones.

class Adaptation:
    """SGD on all weights over each chunk that has been scored, TTT_EPOCHS times, at a constant rate (PR #549).

    Ranks split each batch; a short one is filled up with sequences of weight zero, so that all take the same steps.
    """

    def __init__(self, model: GPT, forward: Callable, cfg: Config, ranks: Ranks):
        self.params, self.forward, self.cfg, self.ranks = list(model.parameters()), forward, cfg, ranks
        self.optimizer = torch.optim.SGD(self.params, lr=cfg.ttt_lr, momentum=cfg.ttt_momentum)

    def __call__(self, chunk: ScoredChunk) -> None:
        for _ in range(self.cfg.ttt_epochs):
            for rows in torch.arange(len(chunk.inputs) // self.cfg.window).split(self.cfg.ttt_batch_seqs):
                self.step(chunk, rows)

    def step(self, chunk: ScoredChunk, rows: Tensor) -> None:
        """One SGD step on the mean loss of these sequences of a scored chunk, the same for any number of ranks."""
        count, world = len(rows), self.ranks.world
        mine = torch.arange(count + -count % world).chunk(world)[self.ranks.rank]
        weight = ((mine < count) * (world / count)).to(chunk.inputs.device)
        rows = rows[mine.clamp(max=count - 1)]
        ids, targets = (t.view(-1, self.cfg.window)[rows] for t in (chunk.inputs, chunk.targets))
        (self.forward(ids, targets).mean(1) * weight).sum().backward()
        self.ranks.mean_([p.grad for p in self.params])
        nn.utils.clip_grad_norm_(self.params, self.cfg.ttt_grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()

# ----------------------------------------
# Report and main.

def run_training(cfg: Config, ranks: Ranks, log: Log) -> dict[str, Score]:
    """Train, average and write the artifact; returns the scores of the raw and of the averaged weights."""
    scorer, shards = Scorer(cfg, ranks, log), find_shards(cfg, "train")
    (name, attend), dtype = choose_attention(cfg, ranks.device), compute_dtype(cfg, ranks.device)
    model = GPT(cfg, attend, dtype)
    model.init_weights(cfg)
    trainer = Trainer(model.to(ranks.device), Batches(TokenStream(shards, cfg.vocab_size), cfg, ranks), cfg, ranks)
    log(f"train_loader:dataset:{Path(cfg.data_path).name} train_shards:{len(shards)}")
    log(f"val_loader:tokens:{len(scorer.bytes)} bytes:{int(scorer.bytes.sum())}")
    log(f"model_params:{sum(p.numel() for p in model.parameters())} attention:{name} dtype:{dtype} "
        f"grad_accum_steps:{trainer.batches.micro_steps}")
    try:
        train(trainer, lambda: scorer.plain(trainer.forward), log)
        raw = copy.deepcopy(model.state_dict())
        model.load_state_dict(trainer.average.values)
        save_artifact(model, cfg, ranks, log)
    except (InputError, KeyboardInterrupt) as error:
        save_average(trainer.average, cfg, log)
        if isinstance(error, Unusable):
            ranks.wait_for_main()
        raise
    ranks.wait_for_main()
    averaged = scorer.plain(trainer.forward)
    model.load_state_dict(raw)
    before = scorer.plain(trainer.forward)
    log(f"DIAGNOSTIC raw {before}")
    log(f"DIAGNOSTIC post_{cfg.averaging} {averaged}")
    return {"raw": before, "averaged": averaged}

def run_evaluation(env: Mapping[str, str], path: Path, ranks: Ranks, log: Log) -> dict[str, Score]:
    """Score the artifact at `path`, which is all that it knows of the training: plain, sliding, then adapting."""
    begin = time.perf_counter()
    cfg, weights = load_artifact(path, env)
    model = load_model(cfg, weights, ranks)
    scorer, forward, scores = Scorer(cfg, ranks, log), ranks.compile(model), {}
    log(f"artifact:{path} variant:{cfg.variant} seed:{cfg.seed} attention:{choose_attention(cfg, ranks.device)[0]} "
        f"dtype:{model.dtype} stride:{cfg.eval_stride} eval_seq_len:{cfg.window} ttt_chunk:{cfg.ttt_chunk_tokens}")
    adapt = Adaptation(model, forward, cfg, ranks)
    stages = {f"final_int{cfg.matrix_bits}_roundtrip": lambda: scorer.plain(forward),
              f"final_int{cfg.matrix_bits}_sliding_window": lambda: scorer.sliding(forward)}
    if cfg.ttt_epochs:
        stages["legal_ttt"] = lambda: scorer.sliding(forward, adapt)
    for name, stage in stages.items():
        scores[name] = score = stage()
        log(f"{name} {score}")
        log(f"{name}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    log(f"total_eval_time:{1000 * (time.perf_counter() - begin):.0f}ms{ranks.memory()}")
    count, size = len(scorer.bytes), int(scorer.bytes.sum())
    log(f"bytes_per_token:{size / count:.6f} targets:{count} bytes:{size}")
    return scores

def describe(cfg: Config) -> str:
    """The resolved settings and the number of parameters; needs no data, no GPU and no memory for weights."""
    with torch.device("meta"):
        model = GPT(cfg)
    return "\n".join([*(f"{k}={v}" for k, v in as_env(cfg.group()).items()),
                      f"model_params:{sum(p.numel() for p in model.parameters())}"])

def report(scores: Mapping[str, Score], path: Path) -> str:
    """The closing table: stage, loss in nats a token, bits a byte, bytes of code + model, seconds."""
    code, model = Path(__file__).stat().st_size, path.stat().st_size
    size = {name: str(code + model) for name in scores if name not in ("raw", "averaged")}
    rows = [(n, f"{s.loss:.4f}", f"{s.bpb:.4f}", size.get(n, "-"), f"{s.seconds:.1f}") for n, s in scores.items()]
    lines = [f"{n:28s} {loss:>9s} {bpb:>9s} {size:>11s} {seconds:>9s}" for n, loss, bpb, size, seconds
             in [("stage", "val_loss", "val_bpb", "bytes", "seconds"), *rows]]
    return "\n".join([*lines, f"code {code} + model {model} = {code + model} bytes"])

def main(argv: list[str], env: Mapping[str, str]) -> None:
    """Configuration, then training, then an evaluation that reads only what was written, then the table."""
    if argv == ["--help"]:
        return print(usage())
    cfg = Config.from_env(env)
    if argv == ["--describe"]:
        return print(describe(cfg))
    if argv:
        raise InputError(f"unknown argument {argv[0]}; options are environment variables (--help lists them)")
    with launch(env) as ranks:
        log = Log(cfg, ranks)
        log.header(cfg, ranks, [f"{k}={v}" for k, v in as_env(cfg.group()).items() if k in env])
        scores = {} if cfg.eval_only else run_training(cfg, ranks, log)
        scores |= run_evaluation(env, cfg.artifact_path, ranks, log)
        log(report(scores, cfg.artifact_path))
        log(f"log:{log.path} artifact:{cfg.artifact_path}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:], os.environ)
    except InputError as error:
        sys.exit(f"train_gpt.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
