"""A complete Parameter Golf entry: train, quantize, pack, reload and score an 11-layer U-Net GPT in one readable file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py          # the contest: 8xH100, 600 s + 600 s
    VARIANT=demo python train_gpt.py                               # no GPU: the same code, every stage, in minutes
    EVAL_ONLY=1 ARTIFACT=final_model.int6.ptz python train_gpt.py  # score an artifact again, from its bytes alone
    python train_gpt.py --help | --describe                        # every option | the resolved run, without data

shards -> batches -> GPT -> Muon + AdamW under a wallclock budget -> average -> integer codes -> JSON header + tensors
-> one compressed file -> [from here only that, the tokenizer and the validation shards] -> score -> score-first TTT
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import groupby, islice, product
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy import ndarray as Array
from torch import Tensor, nn

BOS = 1  # the contest's id for "a document begins"
PACKAGES = ("numpy", "sentencepiece", "tqdm", "zstandard")

# In signatures `cfg` is a Config, `ranks` a Ranks, `log` a Log, `step`, `scale` and seconds are numbers; a function
# without an arrow returns nothing.

# ---- Configuration: every option, its default, its meaning. SEED=42 in the environment sets `seed`.


class InputError(ValueError):
    """A mistake of the user's, told in one line: what, where, what to do."""


class Unusable(InputError):
    """Raised by all ranks at once, after work worth keeping: a loss that is no number, a file over the cap."""


class Diverged(Unusable):
    """A NaN or infinite loss."""


class Stopped(KeyboardInterrupt):
    """A signal to any rank, raised by all ranks at once."""


def knob(default: Any, help: str, low: float = 0, high: float = 2**63, choices: tuple = (), group: str = "") -> Any:
    """A Config field: its help, the closed range or the choices of each value; `group` opens a section of --help."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, group=group))


def positive(default, help, group=""):
    """A knob of 1 or more."""
    return knob(default, help, low=1, group=group)


def choice(default, help, *choices):
    """A knob that takes one of the choices."""
    return knob(default, f"{help} ({' | '.join(choices)})", choices=choices)


def fraction(default, help):
    """A knob of 0 to 1."""
    return knob(default, help, high=1)


# Options of the groups `model` and `evaluation` travel with an artifact; a file that lacks one gets its default. Beside
# an artifact those of `run` and `evaluation` may be set.
@dataclass(frozen=True)
class Config:
    """Every setting of a run, frozen. Raises InputError that names the variable when a value is out of its range."""

    run_id: str = knob("", "names the log; empty: variant, seed and time", group="run")
    output_dir: str = knob(".", "folder of the artifact, the checkpoint and logs/")
    eval_only: bool = knob(False, "score the file ARTIFACT and do nothing else")
    artifact: str = knob("", "packed model; empty: OUTPUT_DIR/RUN_ID.int6.ptz, and its copy final_model.int6.ptz")
    audit: str = knob("", "file.npz for each target's nll, bytes and chunk (of its document) in the last evaluation")
    max_artifact_bytes: int = positive(16_000_000, "cap on code + model bytes; more is an error")
    data_path: str = knob("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin")
    tokenizer_path: str = knob("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of the shards")
    attention: str = choice(
        "auto",
        "kernel; auto: fa3, else fa2, else sdpa, which leaves the choice to torch",
        "auto",
        "fa3",
        "fa2",
        "sdpa",
    )
    dtype: str = choice("auto", "activations; auto: bf16 on CUDA or AVX-512 BF16", "auto", "bf16", "fp32")
    compile: str = choice(
        "auto",
        "torch.compile, which takes minutes; auto: on CUDA, and on a CPU with g++ to train for more than 600 s",
        "auto",
        "on",
        "off",
    )
    eval_batch_seqs: int = positive(32, "windows per forward pass of one rank")
    val_max_tokens: int = knob(0, "score only the first N targets; 0 is all, as a record must")

    variant: str = knob("card", "row of settings to start from; see VARIANTS", group="model")
    seed: int = knob(1337, "seeds the weights and the order of a shuffled loader", high=2**63)
    vocab_size: int = knob(1024, "pieces of the tokenizer", 8, 65536)
    num_layers: int = knob(11, "blocks; the first half feeds skips to the second", 2, 256)
    model_dim: int = knob(512, "width of the residual stream", 8, 65536)
    num_heads: int = positive(8, "query heads")
    num_kv_heads: int = positive(4, "key/value heads")
    mlp_mult: float = knob(3.0, "MLP width / MODEL_DIM", 0.01)
    activation: str = choice("leaky_relu", "of the MLP, then squared", "leaky_relu", "silu")
    mlp_negative_slope: float = fraction(0.5, "slope of the leaky ReLU; 0 is ReLU squared")
    mlp_affine: bool = knob(False, "learn a scale and a bias after the square (Star-ReLU)")
    rope_base: float = knob(10_000.0, "base of the rotary wavelengths", 1)
    rope_dims: int = knob(16, "head dims that rotate; 0 rotates all")
    qk_gain_init: float = knob(1.5, "initial gain of each query head after QK-norm")
    qk_gains: int = knob(1, "gains per query head; 2: one for the dims that rotate, one for the rest", 1, 2)
    document_attention: bool = knob(
        False, "none attends to another document (GPUs: if those have 32 tokens on average)"
    )
    xsa_last_n: int = knob(4, "last blocks whose heads exclude their own value; 0 is none")
    value_residual: bool = knob(False, "mix each layer's values with the first layer's")
    gated_attention: bool = knob(False, "gate each head by a sigmoid of its layer's whole input")
    attn_gate_dims: int = knob(0, "input channels that gate each head from 0 to 2; 0 is no gate")
    ln_scale_power: float = knob(0.5, "block inputs are scaled by (layer+1)**-power; 0 leaves them")
    parallel_residual_start: int = knob(-1, "first block whose MLP reads what its attention reads; -1: none", -1)
    skip_gates: bool = knob(False, "blend skips by a learned gate instead of adding them")
    num_loops: int = knob(0, "more passes over the looped blocks; 0 is no recurrence", high=16)
    loop_start: int = knob(3, "first looped block")
    loop_end: int = knob(5, "last looped block")
    enable_looping_at: float = fraction(0.35, "fraction of the run after which they loop")
    smear_gate: bool = knob(True, "blend each token's embedding with the one before")
    bigram_vocab_size: int = knob(2048, "buckets of the hashed bigram table; 0 is no table")
    bigram_dim: int = positive(128, "width of the bigram table")
    bigram_hash: str = choice(
        "reserved", "xor hash with or without a bucket for 'no bigram', or linear", "reserved", "xor", "linear"
    )
    bigram_scale_init: float = knob(0.05, "initial gain of the bigram embedding; 0 is no gain")
    ve_dim: int = positive(128, "width of the shared value embedding")
    ve_layers: tuple[int, ...] = knob((9, 10), "layers whose values get a token embedding; none is off")
    embed_scale: bool = knob(False, "learn a gain for each channel of the embedding")
    logit_softcap: float = knob(30.0, "logits are squashed into +-cap", 1)
    tied_embed_init_std: float = knob(0.005, "initial spread of the token embedding")
    init: str = choice("orthogonal", "matrices; default: torch's uniform", "orthogonal", "default")

    train_batch_tokens: int = positive(786_432, "tokens per step, over all ranks", group="training")
    train_seq_len: int = knob(2048, "tokens per training sequence", 2, 2**20)
    early_seq_lens: tuple[int, ...] = knob((), "the same earlier in the run, one value a stage", 2, 2**20)
    early_seq_ends: tuple[float, ...] = knob((), "fraction of the run at which each of those stages ends", high=0.999)
    loader: str = choice("stream", "training rows: one after the other, or shuffled", "stream", "shuffled")
    micro_batch_tokens: int = positive(98_304, "most tokens per forward pass of one rank; the rest accumulates")
    iterations: int = positive(20_000, "most optimizer steps")
    max_wallclock_seconds: float = knob(600.0, "training ends before this time; 0 is no limit")
    warmup_steps: int = knob(20, "steps per graph that compile and are then undone")
    warmdown_iters: int = knob(3500, "last steps over which the rate falls to 0; 0 is none")
    warmdown_frac: float = fraction(0.0, "last fraction of the run over which it falls; 0 is none")
    min_lr: float = fraction(0.0, "fraction of the peak below which it does not fall")
    matrix_lr: float = knob(0.025, "Muon: spectral norm of a step on a matrix")
    scalar_lr: float = knob(0.025, "AdamW: gains, gates and mixes")
    tied_embed_lr: float = knob(0.035, "AdamW: embedding tables")
    decoder_lr_mult: float = knob(1.0, "factor of the rates of the second half of the blocks")
    muon_momentum: float = fraction(0.99, "Muon momentum after its warm-up")
    muon_momentum_warmup_start: float = fraction(0.92, "Muon momentum at step 0")
    muon_momentum_warmup_steps: int = knob(1500, "steps of that warm-up")
    muon_momentum_warmup_frac: float = fraction(0.0, "fraction of the run that it takes instead; 0: steps")
    muon_momentum_cooldown: float = fraction(1.0, "it falls back with the rate, down to this fraction; 1: stays")
    muon_backend_steps: int = positive(5, "Newton-Schulz iterations")
    muon_row_normalize: bool = knob(False, "scale each row of a step to length 1 before (MuonEq-R)")
    muon_wd: float = knob(0.04, "decoupled weight decay of matrices")
    muon_wd_mlp: float = knob(-1.0, "the same for the MLP's; -1 is MUON_WD", -1)
    embed_wd: float = knob(0.04, "decoupled weight decay of tables")
    adam_wd: float = knob(0.0, "decoupled weight decay of gains, gates and mixes")
    beta1: float = knob(0.9, "AdamW", high=0.99999)
    beta2: float = knob(0.95, "AdamW", high=0.99999)
    adam_eps: float = knob(1e-8, "AdamW")
    grad_clip_norm: float = knob(0.3, "cap on the norm of the averaged gradient; 0 is none")
    averaging: str = choice("ema", "weights that are exported", "ema", "swa", "last")
    ema_decay: float = fraction(0.997, "fraction of the average that a step keeps")
    swa_every: int = positive(50, "steps between SWA snapshots")
    swa_start_scale: float = knob(0.2, "SWA starts when the rate falls below this fraction", high=2)
    late_qat_threshold: float = knob(0.15, "fake-quantize below this fraction of the rate; 2 always", high=2)
    checkpoint_every: int = knob(0, "steps between saves of the averaged weights, on the clock; 0 saves none")
    train_log_every: int = positive(500, "steps between train_loss lines")
    val_loss_every: int = knob(0, "steps between validations, off the clock; 0 is none before the end")

    matrix_bits: int = knob(6, "code width of matrices, before FIT scales their steps", 2, 8, group="quantization")
    embed_bits: int = knob(8, "code width of the token table; 16 keeps fp16", 2, 16)
    table_bits: int = knob(0, "code width of hash and value tables; 0 is EMBED_BITS", high=16)
    clip_shares: tuple[float, ...] = knob(
        (1.0, 0.95, 0.9, 0.85, 0.8, 0.7), "clips tried, as fractions of a row's maximum"
    )
    step_floor: float = knob(1.0, "least step, as a fraction of 1/(highest code); 0 is none")
    matrix_clip_sigmas: float = knob(0.0, "clip of matrices in standard deviations of a row; 0: CLIP_SHARES")
    embed_clip_sigmas: float = knob(0.0, "the same for tables")
    quantizer: str = choice("rtn", "round to nearest, or GPTQ", "rtn", "gptq")
    mean_step: float = knob(0.0, "geometric mean of steps chosen by what an error costs; 0: each row's own, as above")
    step_power: float = fraction(0.75, "how far those follow the cost: 0 all alike, 1 to equal costs")
    gptq_calibration_batches: int = positive(8, "most training batches whose inputs GPTQ measures, on the clock")
    gptq_reserve_seconds: float = knob(4.0, "of MAX_WALLCLOCK_SECONDS, kept back for those batches")
    gptq_damping: float = knob(0.01, "of their mean, added to the Hessian's diagonal and to row costs", 1e-6)
    prune_share: float = knob(0.0, "fraction of each matrix, the smallest weights, set to 0", high=0.99)
    fit: bool = knob(True, "scale all steps by one factor, so that code + model fill MAX_ARTIFACT_BYTES")
    compressor: str = choice("zstd", "of the artifact; rans codes by scale", "zstd", "brotli", "rans")
    zstd_level: int = knob(22, "zstd effort", 1, 22)

    eval_seq_len: int = knob(0, "tokens per scoring window; 0 is TRAIN_SEQ_LEN", high=2**20, group="evaluation")
    eval_stride: int = positive(64, "targets that a window scores after the first")
    ttt_epochs: int = knob(1, "passes of test-time training over each scored chunk; 0 is none", high=100)
    ttt_scope: str = choice(
        "document", "what adapts: the model, to all before, or to each document a LoRA of its own", "stream", "document"
    )
    ttt_chunk_tokens: int = positive(128, "targets per chunk: scored first, trained on after")
    ttt_first_chunk_tokens: int = knob(0, "a document's first chunk; each is then as long as all before; 0: all alike")
    ttt_params: tuple[str, ...] = knob(
        ("*.c_q.weight", "*.c_v.weight", "tok_emb.weight"), "what adapts, by shell patterns; !pattern takes some out"
    )
    ttt_lora_rank: int = knob(
        8, "adapt blocks' matrices and tok_emb of those, by terms of this rank; 0: the weights", 0, 256
    )
    ttt_lora_scale: float = knob(1.0, "factor of those terms")
    ttt_softcap: bool = knob(False, "adapt two caps of the logits with them, above 0 and below")
    ttt_optimizer: str = choice("adamw", "of test-time training", "sgd", "adamw")
    ttt_lr: float = knob(0.01, "rate of the first chunk")
    ttt_cosine_floor: float = fraction(1.0, "the rate falls over the stream to this fraction; 1: constant")
    ttt_cosine_tokens: int = knob(0, "targets over which it falls; 0: the stream's own, which no causal scorer knows")
    ttt_momentum: float = knob(0.9, "SGD's momentum, AdamW's first beta", high=0.99999)
    ttt_nesterov: bool = knob(False, "SGD looks ahead")
    ttt_beta2: float = knob(0.95, "AdamW's second beta", high=0.99999)
    ttt_weight_decay: float = knob(0.0, "weight decay of test-time training")
    ttt_z_loss: float = knob(0.0, "weight of the squared log-partition in its loss")
    ttt_temperature: float = knob(1.0, "divides the logits that are scored", 0.1, 10)
    ttt_batch_seqs: int = knob(64, "sequences per step over all ranks, or documents per step of one", 1, 1024)
    ttt_grad_clip: float = knob(0.0, "cap on the gradient norm; 0 is none")

    def __post_init__(self):
        for f in fields(self):
            name, value, m = f.name.upper(), vars(self)[f.name], f.metadata
            if m["choices"] and value not in m["choices"]:
                raise InputError(f"{name}={value} must be one of {', '.join(m['choices'])}")
            for v in value if isinstance(value, tuple) else (value,):
                if not isinstance(v, str) and not m["low"] <= v <= m["high"]:
                    raise InputError(f"{name}={v} must lie in [{m['low']:g}, {m['high']:g}]: {m['help']}")
        for holds, text in (*model_rules(self), *run_rules(self), *evaluation_rules(self), *memory_rules(self)):
            if not holds:
                raise InputError(text.format(**vars(self), window=self.window))

    @classmethod
    def from_env(cls, env: Mapping) -> Config:
        """Default < variant < environment. A name that is meant for this script and no option is an error."""
        hints, (unknown, _) = get_type_hints(cls), unknown_options(env)
        given = {
            name.lower(): parse(hints[name.lower()], name, text)
            for name, text in env.items()
            if name.isupper() and name.lower() in hints
        }
        if unknown:
            unset = " ".join(f"-u {text.split()[0]}" for text in unknown)
            raise InputError(f"{'; '.join(unknown)} (--help lists the options; `env {unset} python ...` runs without)")
        variant = given.get("variant", cls.variant)
        if variant not in VARIANTS:
            raise InputError(f"VARIANT={variant} must be one of {', '.join(VARIANTS)}")
        return cls(**row(variant) | given)

    def group(self, *groups: str) -> dict:
        """The values of the options of these groups, by name."""
        members = option_groups()
        return {f.name: vars(self)[f.name] for name in groups for f in members[name]}

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return round(self.mlp_mult * self.model_dim)

    @property
    def by_document(self) -> bool:
        return dict(document=True, stream=False)[self.ttt_scope]

    @property
    def calibrated(self) -> bool:
        return dict(gptq=True, rtn=False)[self.quantizer]

    @property
    def window(self) -> int:
        return self.eval_seq_len or self.train_seq_len

    @property
    def time_limit(self) -> float:
        """Seconds for the steps: MAX_WALLCLOCK_SECONDS but for what is kept back for GPTQ; infinite without a limit."""
        reserve = self.gptq_reserve_seconds if self.calibrated else 0.0
        return self.max_wallclock_seconds - reserve if self.max_wallclock_seconds else math.inf

    @property
    def artifact_path(self) -> Path:
        """The file that a run writes and scores: its own, or with EVAL_ONLY the newest in OUTPUT_DIR."""
        return Path(
            self.artifact or Path(self.output_dir) / f"{'final_model' if self.eval_only else self.run_id}.int6.ptz"
        )

    @property
    def average_path(self) -> Path:
        return Path(self.output_dir) / f"{self.run_id}.average.ptz"


# Words of the names of options in published entries; what does here what their most used names do there; and, of those
# names and of near misses of an option's, the ones that other programs define.
CONTEST_WORDS = """
BINARIZE BITNET BLOCKS BOS CALIB CASEOPS CHURN DETACH EGGROLL ENABLED EXPAND FINEWEB FP FP16 FUSED GDN GROUPS HNET INT4
INT6 INT8 JEPA LAYER0 LAYER LEGENDRE LQER LZMA MAMBA3 MTP NGRAM NS PATTERNS POLAR POP PROJECTOR QUANT RECUR RECURRENCE
REFINER REG REGISTERS SCALING SHAPING SIGMA SIGREG SLIDING TIE TILT TVERSKY UNTIE XNOR STORAGE CONV STATE HEAD KERNEL
"""
TRANSLATIONS = """
TTT_ENABLED=TTT_EPOCHS=0 turns it off
SWA_ENABLED=use AVERAGING
EMA_ENABLED=use AVERAGING
QAT_ENABLED=LATE_QAT_THRESHOLD=0 turns it off
LATE_QAT=LATE_QAT_THRESHOLD=0 turns it off
SLIDING_WINDOW_ENABLED=use EVAL_STRIDE
PARALLEL_START_LAYER=use PARALLEL_RESIDUAL_START
LN_SCALE=LN_SCALE_POWER=0 turns it off
EMBED_LR=use TIED_EMBED_LR
MUON_WEIGHT_DECAY=use MUON_WD
TARGET_MB=use MAX_ARTIFACT_BYTES
DATA_DIR=use DATA_PATH and TOKENIZER_PATH
DATASETS_DIR=use DATA_PATH
"""
COMMON_WORDS = """
AT BASE DATA DIR ENABLE END EVAL EVERY ID INIT LAST LEVEL LOG MAX MODEL NUM ONLY OUTPUT PARALLEL PARAMS PATH POWER RANK
RUN SCALE SHARE SIZE START STD STEP STEPS VALUE
"""
DEFINED_ELSEWHERE = "DATA_DIR DATASETS_DIR MODEL_DIR TARGET_MB ZSTD_CLEVEL"


def likely_meaning(name: str, options: Sequence) -> tuple:
    """(what to use in place of a name, if it resembles an option or is another entry's, whether no other program can be
    meant). A short name, or a word with another ending, may be others' as well: SPEED, ARTIFACTS.
    """
    answers = dict(line.split("=", 1) for line in TRANSLATIONS.strip().splitlines())
    if name in answers:
        return answers[name], name not in DEFINED_ELSEWHERE.split()
    for option in options:
        if option.replace("_", "") == name.upper().replace("_", ""):
            return f"did you mean {option}?", True
    close = difflib.get_close_matches(name, options, 1, min(0.9, 1 - 1.1 / max(len(name), 2)))
    word = len(name) < 6 or "_" not in name and os.path.commonprefix([*close, name]) in (name, *close)
    certain = bool(close) and not word and name not in DEFINED_ELSEWHERE.split()
    return f"did you mean {close[0]}?" if close else "", certain


def unknown_options(env: Mapping) -> tuple:
    """(what to say of names that can only be meant for this script, names that look like an option), none of them one:
    a near miss and another entry's name are errors, a name that shares a word with an option is worth a warning.
    """
    options = [f.name.upper() for f in fields(Config)]
    words = set("_".join(options).split("_")).difference(COMMON_WORDS.split()).union(CONTEST_WORDS.split())
    errors, warnings = [], []
    for name in sorted(env.keys() - options):
        answer, certain = likely_meaning(name, options)
        if certain:
            errors.append(f"{name} is no option: {answer}")
        elif answer or name.isupper() and words.intersection(name.split("_")):
            warnings.append(f"{name} ({answer})" if answer else name)
    return errors, warnings


def model_rules(c: Config) -> list:
    """Rules that bind several options of the model, its schedules and its coding: (whether one holds, what to say)."""
    two_gains = 0 < c.rope_dims < c.head_dim
    looped = c.loop_start <= c.loop_end < c.num_layers
    return [
        (c.model_dim % c.num_heads == 0, "MODEL_DIM={model_dim} must be a multiple of NUM_HEADS={num_heads}"),
        (c.num_heads % c.num_kv_heads == 0, "NUM_HEADS={num_heads} must be a multiple of NUM_KV_HEADS={num_kv_heads}"),
        (c.head_dim % 2 == 0, "MODEL_DIM={model_dim} / NUM_HEADS={num_heads} must be even"),
        (
            c.rope_dims in range(0, c.head_dim + 1, 2),
            "ROPE_DIMS={rope_dims} must be even, at most MODEL_DIM={model_dim} / NUM_HEADS={num_heads}",
        ),
        (
            c.qk_gains == 1 or two_gains,
            "QK_GAINS={qk_gains} needs ROPE_DIMS={rope_dims} above 0, below MODEL_DIM / NUM_HEADS",
        ),
        (c.attn_gate_dims <= c.model_dim, "ATTN_GATE_DIMS={attn_gate_dims} must be at most MODEL_DIM={model_dim}"),
        (all(i < c.num_layers for i in c.ve_layers), "VE_LAYERS={ve_layers} must lie below NUM_LAYERS={num_layers}"),
        (c.xsa_last_n <= c.num_layers, "XSA_LAST_N={xsa_last_n} must be at most NUM_LAYERS={num_layers}"),
        (
            c.num_loops == 0 or looped,
            "NUM_LOOPS={num_loops} needs LOOP_START={loop_start} <= LOOP_END={loop_end} < NUM_LAYERS={num_layers}",
        ),
        (c.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE={bigram_vocab_size} must not be 1"),
        (
            max(c.train_seq_len, c.window) * c.head_dim <= 2**24,
            "TRAIN_SEQ_LEN={train_seq_len} or EVAL_SEQ_LEN={eval_seq_len}, times MODEL_DIM / NUM_HEADS, is above 2**24",
        ),
        (c.embed_bits in (*range(2, 9), 16), "EMBED_BITS={embed_bits} must be 2 to 8, or 16"),
        (c.table_bits in (0, *range(2, 9), 16), "TABLE_BITS={table_bits} must be 0, 2 to 8, or 16"),
        (
            all(0 < clip <= 1 for clip in c.clip_shares or (0,)),
            "CLIP_SHARES={clip_shares} must lie in (0, 1], one or more",
        ),
        (not c.mean_step or c.calibrated, "MEAN_STEP={mean_step} needs QUANTIZER=gptq, not {quantizer}"),
        (
            not c.warmdown_frac or not c.warmdown_iters,
            "WARMDOWN_FRAC={warmdown_frac} and WARMDOWN_ITERS={warmdown_iters} both set the warmdown; set one to 0",
        ),
        (
            not c.muon_momentum_warmup_frac or not c.muon_momentum_warmup_steps,
            "MUON_MOMENTUM_WARMUP_FRAC={muon_momentum_warmup_frac} and MUON_MOMENTUM_WARMUP_STEPS="
            "{muon_momentum_warmup_steps} both say how long momentum warms up; set one to 0",
        ),
    ]


def run_rules(c: Config) -> list:
    """The same for batches and time."""
    return [
        (
            c.train_batch_tokens % c.train_seq_len == 0,
            "TRAIN_BATCH_TOKENS={train_batch_tokens} must be a multiple of TRAIN_SEQ_LEN={train_seq_len}",
        ),
        (
            c.micro_batch_tokens >= c.train_seq_len,
            "MICRO_BATCH_TOKENS={micro_batch_tokens} must be at least TRAIN_SEQ_LEN={train_seq_len}",
        ),
        (
            all(c.train_batch_tokens % n == 0 and n <= c.train_seq_len for n in c.early_seq_lens),
            "EARLY_SEQ_LENS={early_seq_lens} must divide TRAIN_BATCH_TOKENS={train_batch_tokens}, "
            "none above TRAIN_SEQ_LEN={train_seq_len}",
        ),
        (
            c.min_lr < (c.late_qat_threshold or 2) and (c.averaging != "swa" or c.min_lr < (c.swa_start_scale or 2)),
            "MIN_LR={min_lr} must be below LATE_QAT_THRESHOLD={late_qat_threshold}, and below SWA_START_SCALE="
            "{swa_start_scale} for AVERAGING=swa: what those start would never come",
        ),
        (
            len(c.early_seq_ends) == len(c.early_seq_lens) and sorted({*c.early_seq_ends}) == [*c.early_seq_ends],
            "EARLY_SEQ_ENDS={early_seq_ends} must rise, one for each of EARLY_SEQ_LENS={early_seq_lens}",
        ),
        (
            c.time_limit > 0,
            "GPTQ_RESERVE_SECONDS={gptq_reserve_seconds} leaves no time to train of "
            "MAX_WALLCLOCK_SECONDS={max_wallclock_seconds}; lower it",
        ),
        (
            Path(c.run_id).name == c.run_id and c.run_id.isprintable(),
            "RUN_ID={run_id} must be a plain name: it names files in OUTPUT_DIR",
        ),
    ]


LEAST_CHUNK = 8  # of a document: see Adaptation


def evaluation_rules(c: Config) -> list:
    """The same for scoring and test-time training."""
    document, least = c.by_document, min(c.ttt_chunk_tokens, c.ttt_first_chunk_tokens or c.ttt_chunk_tokens)
    alone = document and c.ttt_epochs > 0
    return [
        (
            not alone or least >= LEAST_CHUNK,
            "TTT_CHUNK_TOKENS={ttt_chunk_tokens} and TTT_FIRST_CHUNK_TOKENS={ttt_first_chunk_tokens} must be 8 or more "
            "with TTT_SCOPE=document: in a shorter chunk a gradient can be a rounding error, which AdamW divides by "
            "its own size",
        ),
        (c.window % c.eval_stride == 0, "EVAL_STRIDE={eval_stride} must divide the window of {window}"),
        (
            document or c.ttt_chunk_tokens % c.window == 0,
            "TTT_CHUNK_TOKENS={ttt_chunk_tokens} must be a multiple of the window of {window}, or TTT_SCOPE=document",
        ),
        (
            not alone or c.ttt_chunk_tokens <= c.window,
            "TTT_SCOPE=document needs TTT_CHUNK_TOKENS={ttt_chunk_tokens} to be at most the window of {window}",
        ),
        (
            not alone or c.ttt_lora_rank > 0,
            "TTT_SCOPE=document needs TTT_LORA_RANK={ttt_lora_rank} above 0",
        ),
        (
            not document or c.ttt_cosine_floor == 1,
            "TTT_SCOPE=document learns at a constant rate, so leave TTT_COSINE_FLOOR={ttt_cosine_floor} at 1",
        ),
        (
            c.ttt_lora_rank > 0 or (c.ttt_softcap, c.ttt_lora_scale) == (False, 1.0),
            "TTT_SOFTCAP and TTT_LORA_SCALE={ttt_lora_scale} act on a LoRA: set TTT_LORA_RANK={ttt_lora_rank} above 0",
        ),
        (
            c.ttt_first_chunk_tokens <= c.ttt_chunk_tokens * document,
            "TTT_FIRST_CHUNK_TOKENS={ttt_first_chunk_tokens} needs TTT_SCOPE=document, and TTT_CHUNK_TOKENS="
            "{ttt_chunk_tokens} to be no less",
        ),
        (
            not document or c.ttt_grad_clip == 0,
            "TTT_SCOPE=document needs TTT_GRAD_CLIP={ttt_grad_clip} to be 0: it would bind documents",
        ),
        (
            not c.ttt_nesterov or c.ttt_optimizer == "sgd" and c.ttt_momentum > 0,
            "TTT_NESTEROV=1 needs TTT_OPTIMIZER={ttt_optimizer} to be sgd and TTT_MOMENTUM={ttt_momentum} above 0",
        ),
    ]


def memory_rules(c: Config) -> list:
    """The same for the memory that an evaluation takes, which a forged artifact could ask for, too."""
    learning = c.ttt_batch_seqs if c.ttt_epochs else 0
    tokens = max(c.eval_batch_seqs, learning) * c.window
    wide = max(c.eval_batch_seqs * max(c.vocab_size, c.mlp_dim), learning * c.mlp_dim) * c.window
    masked = max(c.eval_batch_seqs, 0 if c.by_document else learning) * c.window**2 * c.document_attention
    batch = "EVAL_BATCH_SEQS={eval_batch_seqs} or TTT_BATCH_SEQS={ttt_batch_seqs}, times the window of {window}"
    return [
        (tokens <= 2**18, batch + ", is above 2**18 tokens in one forward pass; lower them"),
        (wide <= 2**30, batch + " and the width of the MLP or VOCAB_SIZE, is above 2**30; lower them"),
        (masked <= 2**29, batch + " squared, is above 2**29 bytes, which DOCUMENT_ATTENTION masks; lower them"),
        (c.ttt_lora_rank <= c.model_dim, "TTT_LORA_RANK={ttt_lora_rank} must be at most MODEL_DIM={model_dim}"),
        (
            learning * c.ttt_lora_rank * c.by_document <= 2**13,
            "TTT_BATCH_SEQS={ttt_batch_seqs} times TTT_LORA_RANK={ttt_lora_rank} must be at most 2**13 for documents",
        ),
    ]


def option_groups() -> dict:
    name, groups = "", {}
    for f in fields(Config):
        name = f.metadata["group"] or name
        groups.setdefault(name, []).append(f)
    return groups


# A row of settings as the environment would give them; of a name that comes twice the later value counts.
STREAM_TTT = """
    TTT_EPOCHS=3 TTT_PARAMS=* TTT_SCOPE=stream TTT_CHUNK_TOKENS=32768 TTT_LORA_RANK=0 TTT_OPTIMIZER=sgd
    TTT_LR=0.002 TTT_BETA2=0.999 TTT_BATCH_SEQS=32 TTT_GRAD_CLIP=1
"""  # PR #549
SP8192 = """
    DATA_PATH=./data/datasets/fineweb10B_sp8192 TOKENIZER_PATH=./data/tokenizers/fineweb_8192_bpe.model
    VOCAB_SIZE=8192 LOADER=shuffled MLP_MULT=4 XSA_LAST_N=11 ATTN_GATE_DIMS=12 SKIP_GATES=1 NUM_LOOPS=2
    BIGRAM_VOCAB_SIZE=0 VE_LAYERS= WARMDOWN_ITERS=0 SCALAR_LR=0.02 TIED_EMBED_LR=0.03 MUON_ROW_NORMALIZE=1
    MUON_WD=0.095 EMBED_WD=0.085 EMA_DECAY=0.9965 LATE_QAT_THRESHOLD=0 QUANTIZER=gptq
"""  # what PR #1812 and PR #2135 share
VARIANTS = {
    "card": "",
    "pr150": STREAM_TTT
    + """
    TTT_PARAMS=*,!blocks.0.*,!blocks.1.* ROPE_BASE=50000 ROPE_DIMS=0 XSA_LAST_N=0 LN_SCALE_POWER=0 VE_LAYERS=
    MLP_NEGATIVE_SLOPE=0 BIGRAM_HASH=xor WARMDOWN_ITERS=3000 EMBED_WD=0 AVERAGING=swa SWA_EVERY=200
    SWA_START_SCALE=0.5 LATE_QAT_THRESHOLD=2 EMBED_BITS=16 TABLE_BITS=6 CLIP_SHARES=1
    """,
    "pr455": STREAM_TTT
    + """
    TTT_PARAMS=*,!blocks.0.*,!blocks.1.* ROPE_BASE=22081.790273476247 MLP_NEGATIVE_SLOPE=0 WARMDOWN_ITERS=3000
    ADAM_WD=0.04 AVERAGING=swa LATE_QAT_THRESHOLD=0.1 CLIP_SHARES=1
    """,  # ROPE_BASE: 10,000 * 2**(16/14)
    "pr490": STREAM_TTT
    + """
    TTT_PARAMS=blocks.9.*,blocks.10.*,*.attn_scale,*.mlp_scale,bigram.scale,tok_emb.* TTT_CHUNK_TOKENS=131072
    TTT_OPTIMIZER=adamw TTT_LR=0.0001 TTT_BATCH_SEQS=64 VALUE_RESIDUAL=1 GATED_ATTENTION=1
    BIGRAM_VOCAB_SIZE=4096 VE_LAYERS= ITERATIONS=9000 WARMDOWN_ITERS=1200 MUON_MOMENTUM=0.95
    MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=500 ADAM_WD=0.04 EMBED_BITS=16 TABLE_BITS=8
    QUANTIZER=gptq CLIP_SHARES=1 PRUNE_SHARE=0.02 TTT_COSINE_FLOOR=0.1 TTT_COSINE_TOKENS=62021632
    TTT_TEMPERATURE=0.98
    """,  # TTT_COSINE_TOKENS: of the contest's split; published: 0
    "pr1127": STREAM_TTT
    + """
    TTT_EPOCHS=1 TTT_PARAMS=*.c_q.weight,*.c_v.weight,tok_emb.weight TTT_LORA_RANK=8 TTT_OPTIMIZER=adamw
    TTT_LR=0.01 TTT_BETA2=0.95 MODEL_DIM=480 MLP_MULT=3.2 MLP_NEGATIVE_SLOPE=0 MLP_AFFINE=1 SKIP_GATES=1
    BIGRAM_VOCAB_SIZE=8192 BIGRAM_HASH=linear BIGRAM_SCALE_INIT=0 VE_LAYERS= INIT=default
    TRAIN_BATCH_TOKENS=524288 MICRO_BATCH_TOKENS=65536 ADAM_WD=0.04 DECODER_LR_MULT=2 GRAD_CLIP_NORM=0
    EMA_DECAY=0.9985 EMBED_BITS=16 TABLE_BITS=6
    """,
    "pr1812": SP8192
    + STREAM_TTT
    + """
    TTT_EPOCHS=4 TTT_PARAMS=*.weight TTT_CHUNK_TOKENS=65536 TTT_LR=0.005 ACTIVATION=silu QK_GAIN_INIT=5.25
    QK_GAINS=2 PARALLEL_RESIDUAL_START=7 SMEAR_GATE=0 EMBED_SCALE=1 ITERATIONS=50000 WARMDOWN_FRAC=0.72
    MATRIX_LR=0.022 MUON_MOMENTUM_WARMUP_STEPS=0 MUON_MOMENTUM_WARMUP_FRAC=0.22 MUON_MOMENTUM_COOLDOWN=0.25
    MUON_WD_MLP=0.115 ADAM_WD=0.005 MATRIX_CLIP_SIGMAS=13.3 EMBED_CLIP_SIGMAS=20 GPTQ_CALIBRATION_BATCHES=64
    GPTQ_RESERVE_SECONDS=12 COMPRESSOR=brotli TTT_NESTEROV=1 TTT_Z_LOSS=1e-05 TTT_COSINE_FLOOR=0
    TTT_COSINE_TOKENS=40540160
    """,  # TTT_COSINE_TOKENS: of the contest's split; published: 0
    "frontier": SP8192
    + """
    DOCUMENT_ATTENTION=1 QK_GAIN_INIT=5 PARALLEL_RESIDUAL_START=8 TRAIN_SEQ_LEN=3072 EARLY_SEQ_LENS=1024,2048
    EARLY_SEQ_ENDS=0.1,0.7 WARMDOWN_FRAC=0.85 MIN_LR=0.1 MATRIX_LR=0.028 MUON_MOMENTUM=0.97 ADAM_WD=0.02
    BETA2=0.99 MEAN_STEP=0.1 MATRIX_BITS=8 COMPRESSOR=rans EVAL_STRIDE=1024
    """,  # rows that grow: PR #2014
    "demo": """
    DATA_PATH=./data/datasets/demo_sp1024 TOKENIZER_PATH=./data/tokenizers/demo_1024_bpe.model NUM_LAYERS=6
    MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 VE_LAYERS=4,5 VE_DIM=64 BIGRAM_VOCAB_SIZE=16384 BIGRAM_DIM=64
    TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=2048 MICRO_BATCH_TOKENS=2048 WARMUP_STEPS=1 MAX_WALLCLOCK_SECONDS=120
    WARMDOWN_ITERS=0 WARMDOWN_FRAC=0.8 MATRIX_LR=0.02 SCALAR_LR=0.015 TIED_EMBED_LR=0.03 MUON_MOMENTUM=0.95
    MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=100 EMA_DECAY=0.9 TRAIN_LOG_EVERY=20 STEP_FLOOR=0
    FIT=0 EVAL_STRIDE=128 TTT_LR=0.02
    """,
    "smoke": STREAM_TTT
    + """
    TTT_CHUNK_TOKENS=256 TTT_LR=0.02 DATA_PATH=./data/datasets/smoke
    TOKENIZER_PATH=./data/tokenizers/smoke.model DTYPE=fp32 NUM_LAYERS=4 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2
    ROPE_DIMS=4 XSA_LAST_N=2 VE_LAYERS=2,3 BIGRAM_VOCAB_SIZE=64 BIGRAM_DIM=8 VE_DIM=8 TRAIN_SEQ_LEN=32
    TRAIN_BATCH_TOKENS=256 MICRO_BATCH_TOKENS=128 ITERATIONS=20 MAX_WALLCLOCK_SECONDS=60 WARMUP_STEPS=1
    WARMDOWN_ITERS=10 MUON_MOMENTUM_WARMUP_STEPS=10 EMA_DECAY=0.8 TRAIN_LOG_EVERY=5 VAL_LOSS_EVERY=10
    STEP_FLOOR=0 FIT=0 EVAL_STRIDE=8
    """,
}


def row(variant: str) -> dict:
    """The settings of a variant, as values by the names of options."""
    hints, pairs = get_type_hints(Config), (pair.split("=", 1) for pair in VARIANTS[variant].split())
    return {name.lower(): parse(hints[name.lower()], name, text) for name, text in pairs}


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
        wanted = "0 or 1" if kind is bool else kind.__name__
        raise InputError(f"{name}={text!r} is not valid; it takes {wanted}") from None


def usage() -> str:
    """What --help prints."""
    lines = [
        "usage: [NAME=value ...] [torchrun ... | python] train_gpt.py [--help | --describe]",
        "",
        f"VARIANT is one of {', '.join(VARIANTS)}. Precedence: default < variant < environment.",
    ]
    for group, members in option_groups().items():
        defaults = as_env({f.name: f.default for f in members})
        lines += ["", f"{group}:"]
        for f in members:
            lines.append(f"  {f.name.upper() + '=' + defaults[f.name.upper()]:56s} {f.metadata['help']}")
    return "\n".join(lines)


def as_env(values: dict) -> dict:
    """Settings as the environment would give them; `Config.from_env` reads them back exactly."""

    def text(value):
        if isinstance(value, tuple):
            return ",".join(map(str, value))
        return str(int(value) if isinstance(value, bool) else value)

    return {name.upper(): text(value) for name, value in values.items()}


# ---- Ranks, clock, log: the only places that know of processes, devices and time.


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

    def mean_(self, tensors: list):
        """Average each tensor over all ranks, in place, in one collective."""
        if self.world > 1:
            flat = self.sum_(nn.utils.parameters_to_vector(tensors)) / self.world
            nn.utils.vector_to_parameters(flat, tensors)

    def reduce_scatter(self, stack: Tensor) -> tuple:
        """Begin to add up a stack (N, ...) over ranks, N a multiple of them: (wait for it, this rank's items)."""
        if self.world == 1:
            return lambda: None, stack
        mine = stack.new_empty(len(stack) // self.world, *stack.shape[1:])
        return dist.reduce_scatter_tensor(mine, stack, async_op=True).wait, mine

    def all_gather(self, mine: Tensor) -> tuple:
        """Begin to put the items of all ranks together: (wait for it, the stack)."""
        if self.world == 1:
            return lambda: None, mine
        whole = mine.new_empty(self.world * len(mine), *mine.shape[1:])
        return dist.all_gather_into_tensor(whole, mine.contiguous(), async_op=True).wait, whole

    def maximum(self, *values: float) -> list:
        """The largest of all ranks' values, on every rank, once all have come; on the host: no device waits."""
        largest = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def broadcast(self, blob: bytes) -> bytes:
        """The main rank's bytes, on every rank."""
        if self.world == 1:
            return blob
        data = torch.zeros(int(self.maximum(len(blob))[0]), dtype=torch.uint8)
        if self.is_main:
            data.copy_(torch.frombuffer(bytearray(blob), dtype=torch.uint8))
        dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def barrier(self):
        """Return once all ranks have come here: what the main one wrote before is whole."""
        self.maximum(0.0)

    def part(self, items: Sequence) -> Sequence:
        """This rank's contiguous part of `items`; those of all ranks are disjoint and cover it."""
        n = len(items)
        return items[n * self.rank // self.world : n * (self.rank + 1) // self.world]

    def memory(self) -> str:
        """The peak of device memory so far, as a log line; empty on a CPU."""
        if self.device.type != "cuda":
            return ""
        return (
            f"\npeak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
            f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB"
        )

    def compiles(self, cfg) -> bool:
        """Whether to compile; `auto` on a CPU: in runs long enough to amortize it, where there is a C++ compiler."""
        on_gpu, compiler = self.device.type == "cuda", shutil.which(os.environ.get("CXX", "g++"))
        auto = on_gpu or cfg.max_wallclock_seconds > 600 and bool(compiler)
        if cfg.compile == "on" and not on_gpu and not compiler:
            raise InputError("COMPILE=on needs a C++ compiler: install g++, name yours in CXX, or set COMPILE=off")
        return dict(on=True, off=False, auto=auto)[cfg.compile]

    def compile(self, fn, cfg) -> Callable:
        """`fn` as one static graph, or `fn` itself."""
        if not self.compiles(cfg):
            return fn
        torch._dynamo.config.recompile_limit = 64  # training, scoring and adapting share one forward, in several shapes
        # matrices of all blocks are joined by one kernel, not by one for each
        return torch.compile(fn, dynamic=False, fullgraph=True, options=dict(max_pointwise_cat_inputs=64))


@contextmanager
def launch(env: Mapping) -> Iterator:
    """The ranks that torchrun's variables in `env` describe (one without them): nccl and CUDA, or gloo and CPU."""
    rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local = int(env.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        # how long a rank may wait for others; what one does alone, packing and its documents, is slow on a CPU
        backend, minutes = ("cpu:gloo,cuda:nccl", 10) if device.type == "cuda" else ("gloo", 30)
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    yield Ranks(rank, world, device)
    if world > 1:  # after a failure `run` ends the process instead: this would wait for ranks that wait for this one
        dist.destroy_process_group()


class Clock:
    """Training time in seconds: runs from creation, stands still inside `paused()`, which waits for the device."""

    def __init__(self, device: torch.device, first_step_seconds: float):
        self.synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.laps = deque([first_step_seconds], maxlen=65)
        self.synchronize()
        self.start = self.last = perf_counter()

    def seconds(self) -> float:
        return perf_counter() - self.start

    def lap(self):
        before, self.last = self.last, perf_counter()
        self.laps.append(self.last - before)

    @property
    def step_seconds(self) -> float:
        """The low median of the latest steps: one slow step, the first one above all, leaves it as it was."""
        return statistics.median_low(self.laps)

    @contextmanager
    def paused(self) -> Iterator:
        self.synchronize()
        begin = perf_counter()
        yield
        self.synchronize()
        self.last = perf_counter()
        self.start += self.last - begin


def on_signals(handler):
    """Install a handler for Ctrl-C, for SIGTERM, which torchrun and schedulers send, and for SIGHUP, which a closed
    connection sends, unless it is ignored, as under nohup.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def complain(text: str):
    """Write to stderr, if it can be written."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, RuntimeError):
        pass


class Reading:
    """A scalar on its way to the host: `value` waits for it alone, not for what the device was given to do after it."""

    def __init__(self, scalar: Tensor):
        self.host = torch.empty((), pin_memory=scalar.is_cuda).copy_(scalar, non_blocking=True)
        self.arrived = torch.cuda.current_stream().record_event() if scalar.is_cuda else None

    def value(self) -> float:
        if self.arrived:
            self.arrived.synchronize()
        return float(self.host)


class Log:
    """One line per event, to the terminal and to OUTPUT_DIR/logs/RUN_ID.txt; silent on all ranks but the main one.

    Keyword arguments are also collected in `facts`, for the closing RESULT line. The first line creates the file.
    """

    def __init__(self, cfg, ranks):
        self.facts: dict[str, Any] = {}
        self.path = Path(cfg.output_dir) / "logs" / f"{cfg.run_id}.txt"
        self.active, self.broken, self.mode = ranks.is_main, set(), "x"
        compressor_module(cfg.compressor)  # better an error now than after training
        try:
            if self.active and self.path.exists():
                raise InputError(f"{self.path} exists; set another RUN_ID or OUTPUT_DIR")
            if self.active:
                self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; set another OUTPUT_DIR") from None

    def __call__(self, text: str, **facts: Any):
        self.facts |= facts
        if self.active:
            from tqdm import tqdm

            with self.surviving("the terminal"):
                tqdm.write(text)  # above a progress bar, where there is one
                sys.stdout.flush()
            with self.surviving(self.path), self.path.open(self.mode, encoding="utf-8") as file:
                self.mode = "a"
                file.write(text + "\n")

    def warn(self, *texts: str):
        """A line for each text, which `facts` collects, too."""
        for text in texts:
            self(f"WARNING: {text}", warnings=[*self.facts.get("warnings", []), text])

    @contextmanager
    def surviving(self, place: object) -> Iterator:
        """Inside, an output that cannot be written is told once, and the run goes on."""
        try:
            yield
        except FileExistsError:  # a run with the same RUN_ID began at the same time
            raise InputError(f"{self.path} exists; set another RUN_ID or OUTPUT_DIR") from None
        except (OSError, ValueError) as error:
            if place not in self.broken:
                self.broken.add(place)
                complain(f"WARNING: cannot write to {place} ({error}); the run goes on\n")
            if isinstance(place, str):  # what the stream holds would fail again at exit
                sys.stdout = open(os.devnull, "w")

    def check(self, outputs: Mapping[Path, int]):
        """Raises InputError unless a file of so many bytes can be written at each path. Only the main rank looks."""
        for path, size in outputs.items() if self.active else ():
            try:
                if path.is_dir():
                    raise InputError(f"cannot write {path}: it is a folder; set another name")
                with unfinished(path) as part:
                    part.touch()
                free = shutil.disk_usage(path.parent).free
            except OSError as error:
                raise InputError(
                    f"cannot write {path}: {error.strerror}; set another folder or free this one"
                ) from None
            if free < size:
                raise InputError(f"cannot write {path}: it may take {size} bytes, and {free} are free; make room")

    def header(self, cfg, ranks, env: Mapping):
        """What ran where: source, versions, device, and the settings that the environment gave."""
        source = Path(__file__).read_bytes()
        sha256 = hashlib.sha256(source).hexdigest()
        versions = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
        versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
        on_gpu = ranks.device.type == "cuda"
        device = torch.cuda.get_device_name(ranks.device) if on_gpu else f"cpu x{torch.get_num_threads()}"
        self(f"source:{Path(__file__).name} sha256:{sha256} bytes:{len(source)}", source_sha256=sha256)
        self(" ".join(f"{name}:{version}" for name, version in versions.items()), versions=versions)
        self(f"device:{device} world_size:{ranks.world}", device=device, world_size=ranks.world)
        self.warn(*run_warnings(env, ranks))
        if self.active and on_gpu and shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
            self(f"nvidia-smi: {subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()}")
        overrides = {name: text for name, text in as_env(vars(cfg)).items() if name in env}
        given = " ".join(f"{name}={value}" for name, value in overrides.items())
        self(
            f"variant:{cfg.variant} seed:{cfg.seed} overrides: {given or 'none'}",
            variant=cfg.variant,
            seed=cfg.seed,
            overrides=overrides,
        )


def run_warnings(env: Mapping, ranks) -> list:
    """What a user should know of the environment and of the machine before a run."""
    names, texts = unknown_options(env)[1], []
    if names:
        texts.append(f"set, but no option of this script: {', '.join(names)}")
    alone_on_cpu = ranks.world == 1 and ranks.device.type == "cpu"
    if alone_on_cpu and torch.get_num_threads() + busy_cores() > os.cpu_count():
        texts.append(
            "other processes keep cores busy, and OpenMP threads that spin at barriers then make a step up to 8 times "
            "slower; set OMP_WAIT_POLICY=PASSIVE, or OMP_NUM_THREADS to the number of idle cores"
        )
    return texts


def busy_cores() -> int:
    """Cores that other processes keep busy: the least of a few samples of Linux's run queue. 0 elsewhere, and where
    OpenMP's threads do not spin.
    """
    queue, samples = Path("/proc/loadavg"), []
    if not queue.exists() or torch.get_num_threads() == 1 or os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        return 0
    for _ in range(5):
        samples.append(int(queue.read_text().split()[3].partition("/")[0]) - 1)
        time.sleep(0.02)
    return min(samples)


def progress_bar(label: str, total: float, log) -> Any:
    """A progress bar with the time left when a person watches; silent otherwise."""
    from tqdm import tqdm

    shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    hidden = not (log.active and sys.stderr.isatty())
    return tqdm(desc=label, total=total, bar_format=shape, leave=False, disable=hidden)


# ---- Data: shards -> one endless stream -> batches that do not depend on the number of ranks; bytes of each token.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def shard_length(path: Path) -> int:
    """The number of tokens N in a shard: 256 int32 (magic, version, N, 0...), then N uint16, all little-endian."""
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file; remove it from DATA_PATH")
        size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=3)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if len(header) < 3 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise InputError(f"{path} is not a token shard of version {SHARD_VERSION}; make it with data/prepare.py")
    count = int(header[2])
    if count < 1 or size != SHARD_HEADER_BYTES + 2 * count:
        raise InputError(
            f"{path} is cut or empty: its header names {count} tokens, its {size} bytes hold "
            f"{max(size - SHARD_HEADER_BYTES, 0) // 2}; get it again"
        )
    return count


def read_shard(path: Path, start: int = 0, count: int | None = None) -> Array:
    """`count` tokens of a shard from `start` on, or all, uint16. Read, not mapped: a file that is cut meanwhile would
    end the process.
    """
    count = shard_length(path) if count is None else count
    try:
        tokens = np.fromfile(path, "<u2", count, offset=SHARD_HEADER_BYTES + 2 * start)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if len(tokens) < count:
        raise InputError(f"{path} was cut while it was read; get it again")
    return tokens


def data_command(cfg) -> str:
    """The command that makes the data of a vocabulary."""
    own = cfg.variant if cfg.variant in ("demo", "smoke") else f"download sp{cfg.vocab_size}"
    return f"`python data/prepare.py {own}`"


def find_shards(cfg, split: str) -> list:
    """The shards of a split in order. A `fineweb_val_bytes_*.bin` sidecar holds byte counts, not tokens."""
    paths = sorted(p for p in Path(cfg.data_path).glob(f"fineweb_{split}_*.bin") if "_bytes_" not in p.name)
    if not paths:
        raise InputError(
            f"no fineweb_{split}_*.bin in DATA_PATH={cfg.data_path}; make it: {data_command(cfg)}, or "
            "`python data/prepare.py tokenize` for your own text"
        )
    return paths


def check_tokens(tokens: Array, vocab_size: int, where: object) -> Array:
    """`tokens` as they are, or InputError if one of them is no id of the vocabulary."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise InputError(f"{where} holds token {tokens.max()}, but VOCAB_SIZE={vocab_size}: it is another tokenizer's")
    return tokens


class TokenStream:
    """Shards as one endless stream of tokens: after the last shard comes the first."""

    def __init__(self, paths: list, vocab_size: int):
        self.paths, self.vocab_size = paths, vocab_size
        self.sizes = np.array([shard_length(p) for p in paths])
        self.ends = np.cumsum(self.sizes)

    def read(self, start: int, count: int) -> Array:
        """Tokens start .. start + count - 1 of the stream, int64 (count,)."""
        parts = []
        while count:
            start %= int(self.ends[-1])
            i = int(np.searchsorted(self.ends, start, side="right"))
            left = int(self.ends[i]) - start
            part = read_shard(self.paths[i], int(self.sizes[i]) - left, min(count, left))
            parts.append(check_tokens(part, self.vocab_size, self.paths[i]))
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts).astype(np.int64)


class RowOrder:
    """Where training rows start in the stream: one after the other, or all in a new random order every epoch. Rows that
    grow are cut from spans of a common multiple of their lengths, so that none is read twice.
    """

    def __init__(self, stream: TokenStream, cfg):
        self.span, self.seed = math.lcm(cfg.train_seq_len, *cfg.early_seq_lens), cfg.seed
        self.shuffled = dict(stream=False, shuffled=True)[cfg.loader]
        self.firsts, self.counts = stream.ends - stream.sizes, (stream.sizes - 1) // self.span - 1
        if self.shuffled and self.counts.max() < 1:
            raise InputError(f"LOADER=shuffled needs a shard of {2 * self.span + 1} tokens; DATA_PATH has none")
        self.epoch, self.starts = -1, self.firsts

    def __call__(self, read: int) -> int:
        """First token of the row before which so many tokens were read, by all ranks together."""
        if not self.shuffled:
            return read
        span, inside = divmod(read, self.span)
        epoch, i = divmod(span, int(self.counts.clip(0).sum()))
        if epoch != self.epoch:
            # each shard is cut from a random offset on; PR #1493 so permutes the rows that a process owns
            draw = np.random.default_rng((self.seed, epoch))
            spans = [
                first + draw.integers(self.span) + self.span * np.arange(count)
                for first, count in zip(self.firsts, self.counts.clip(0))
            ]
            self.epoch, self.starts = epoch, draw.permutation(np.concatenate(spans))
        return int(self.starts[i]) + inside


class Batches:
    """Batches whose row i is the same for any number of ranks. A thread fetches the next while one is computed."""

    def __init__(self, stream: TokenStream, cfg, ranks):
        self.stream, self.order, self.cfg, self.ranks = stream, RowOrder(stream, cfg), cfg, ranks
        for seq_len in (cfg.train_seq_len, *cfg.early_seq_lens):
            if (rows := cfg.train_batch_tokens // seq_len) % ranks.world:
                unit = math.lcm(cfg.train_seq_len, *cfg.early_seq_lens) * ranks.world
                near = max(1, round(cfg.train_batch_tokens / unit)) * unit
                raise InputError(
                    f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} is {rows} rows of {seq_len} tokens, which do not "
                    f"divide by {ranks.world} ranks; the nearest value that does is TRAIN_BATCH_TOKENS={near}"
                )
        self.reader = ThreadPoolExecutor(1)
        self.seek(0, stage(0.0, cfg).seq_len)

    def seek(self, step: int, seq_len: int):
        """Go on with the batch of this step, in rows of this length."""
        rows = self.cfg.train_batch_tokens // seq_len // self.ranks.world
        fits = (n for n in range(1, rows + 1) if rows % n == 0 and rows // n * seq_len <= self.cfg.micro_batch_tokens)
        self.step, self.seq_len, self.micro_steps = step, seq_len, next(fits)
        self.pending = self.reader.submit(self.load, step, seq_len, self.micro_steps)

    def load(self, step: int, seq_len: int, micro_steps: int) -> tuple:
        """This rank's inputs and targets of a step, (micro_steps, rows, seq_len) int64 on the device."""
        total = self.cfg.train_batch_tokens // seq_len
        rows = self.ranks.part(range(step * total, (step + 1) * total))
        tokens = [self.stream.read(self.order(row * seq_len), seq_len + 1) for row in rows]
        tokens = torch.from_numpy(np.stack(tokens)).view(micro_steps, -1, seq_len + 1)
        if self.ranks.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.ranks.device, non_blocking=True)
        return tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()

    def settle(self):
        """Wait for the read that is under way, so that no training data are read while the clock stands still."""
        self.pending.cancel() or self.pending.exception()

    def __next__(self) -> tuple:
        if self.pending.cancelled():
            self.seek(self.step, self.seq_len)
        batch = self.pending.result()
        self.seek(self.step + 1, self.seq_len)
        return batch


class ByteTable(NamedTuple):
    """UTF-8 bytes of each token: `base`, one more for `space` pieces unless the token before is a `boundary`."""

    base: Tensor
    space: Tensor
    boundary: Tensor

    def count(self, previous: Tensor, targets: Tensor) -> Tensor:
        """Bytes of each target after its previous token, int64, by the contest's rule."""
        return self.base[targets] + (self.space[targets] & ~self.boundary[previous])


def check_piece(piece: str, is_byte: bool, cfg):
    """Raises InputError for a piece that the contest's byte rule counts wrong: a space may only be its beginning."""
    if "\u2581" in piece[1:] or is_byte and not re.fullmatch("<0x[0-9A-F]{2}>", piece):
        raise InputError(
            f"TOKENIZER_PATH={cfg.tokenizer_path} has the piece {piece!r}: a space may only begin a piece, else the "
            "byte rule counts it wrong; train it with split_by_whitespace and without whitespace suffixes"
        )


def load_byte_table(cfg, device: torch.device) -> ByteTable:
    """The contest's byte rule, read off the tokenizer: control, unknown and unused pieces are boundaries of 0 bytes."""
    sp = load_tokenizer(cfg)
    base, space, boundary = (np.full(cfg.vocab_size, start) for start in (0, False, True))
    for i in range(cfg.vocab_size):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        piece, boundary[i] = sp.id_to_piece(i).translate(dict.fromkeys(map(ord, CASE_MARKS))), False
        check_piece(piece, sp.is_byte(i), cfg)
        space[i] = piece.startswith("\u2581") and not sp.is_byte(i)
        base[i] = 1 if sp.is_byte(i) else len(piece[int(space[i]) :].encode())
    table = ByteTable(*(torch.from_numpy(a) for a in (base, space, boundary)))
    ids = torch.tensor([BOS, *sp.encode(PROBE)])
    counted, longest = int(table.count(ids[:-1], ids[1:]).sum()), len(PROBE.encode())
    if sp.bos_id() != BOS or counted > longest:
        raise InputError(
            f"TOKENIZER_PATH={cfg.tokenizer_path} has BOS {sp.bos_id()}, not {BOS}, or its byte rule counts {counted} "
            f"bytes of a text of {longest}; train it by `data/prepare.py tokenize`"
        )
    return ByteTable(*(t.to(device) for t in table))


PROBE = (  # every character of ASCII, a few of UTF-8 that are longer, and a line end
    "A fox of 1990 jumps\nover the lazy dog's end. ! \" # $ % & ' ( ) * + , - . / 0123456789 : ; < = > ? @ [ \\ ] ^ _ "
    "` { | } ~ ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz \u00e9\u6f22\U0001f600"
)
CASE_MARKS = "\ue001\ue002\ue003\ue004"  # in the pieces of a tokenizer for text whose capitals are marked (PR #1729)


def target_bytes(stream: Array, cfg, device: torch.device) -> Tensor:
    """UTF-8 bytes of the text of each target, int64 (N-1,), by the tokenizer's rule; if its text has case marks, of the
    original, by the sidecar fineweb_val_bytes_*.bin: one count a token of the split, 0 for BOS.
    """
    sp, paths = load_tokenizer(cfg), sorted(Path(cfg.data_path).glob("fineweb_val_bytes_*.bin"))
    tokens = torch.from_numpy(stream.astype(np.int64)).to(device)
    table, met = load_byte_table(cfg, torch.device("cpu")), np.bincount(stream[1:], minlength=cfg.vocab_size) > 0
    by_rule = ByteTable(*(part.to(device) for part in table)).count(tokens[:-1], tokens[1:])
    if not (table.base + table.space)[met].any():
        raise InputError(f"the validation split in DATA_PATH={cfg.data_path} has no text: its tokens have no bytes")
    if not set(CASE_MARKS).intersection("".join(map(sp.id_to_piece, range(cfg.vocab_size)))):
        return by_rule
    counts = np.concatenate([read_shard(path) for path in paths] or [stream[:0]])
    if len(counts) != sum(len(read_shard(path)) for path in find_shards(cfg, "val")):
        raise InputError(
            f"TOKENIZER_PATH has case marks, so DATA_PATH={cfg.data_path} needs fineweb_val_bytes_*.bin with a count "
            f"for each token of its validation split, not {len(counts)}; `data/prepare.py tokenize --case` makes it"
        )
    sizes = torch.from_numpy(counts[1 : len(stream)].astype(np.int64)).to(device)
    # the contest's split differs by less than 0.01 %, 500 kB of FineWeb by 0.02 % at most: see data/README.md
    excess, total = int((sizes - by_rule).sum()), int(by_rule.sum())
    if sizes[tokens[1:] == BOS].any() or abs(excess) > 0.01 * total:
        raise InputError(
            f"fineweb_val_bytes_*.bin in {cfg.data_path} counts bytes of BOS, or {excess} bytes more than the {total} "
            "of its pieces, over 1 %: it is forged, another split's, or of text whose runs of white space the "
            "tokenizer joins; join them before `data/prepare.py tokenize --case`"
        )
    return sizes


def load_tokenizer(cfg) -> Any:
    """The SentencePiece model at TOKENIZER_PATH, checked against VOCAB_SIZE."""
    from sentencepiece import SentencePieceProcessor

    path = Path(cfg.tokenizer_path)
    if not path.is_file():
        raise InputError(f"no tokenizer at TOKENIZER_PATH={path}; make it: {data_command(cfg)}")
    try:
        sp = SentencePieceProcessor(model_proto=path.read_bytes())
        [sp.id_to_piece(i) for i in range(sp.vocab_size())]  # decodes all pieces: a damaged one may be no UTF-8
    except (RuntimeError, OSError, ValueError, IndexError):
        raise InputError(f"TOKENIZER_PATH={path} is not a SentencePiece model, or is damaged; get it again") from None
    if sp.vocab_size() != cfg.vocab_size:
        raise InputError(f"TOKENIZER_PATH={path} has {sp.vocab_size()} pieces, but VOCAB_SIZE={cfg.vocab_size}")
    return sp


# ---- Model: token ids -> loss of each target.
# B sequences, T tokens, D model width, H query heads, K key/value heads, C head width, V vocabulary. What
# modules, their hooks and attentions take and return are tensors.


def written(x: Tensor) -> Tensor:
    """x, which is no view. Without gradients Inductor would compute it again in each kernel that reads it; through this
    view it writes x once.
    """
    assert x._base is None  # compiled, the view would begin where the base does
    return x if torch.is_grad_enabled() else x.as_strided(x.shape, x.stride())


def norm(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """scale * x / rms(x) over the last dim, in fp32; a scale per row is folded into 1 / rms(x)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # the epsilon is fp32's, pinned: embeddings start with a mean square of 2.5e-5
    inverse = written(torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1.1920929e-07))
    return (wide * (scale * inverse)).type_as(x)


def rotary_tables(seq_len, dims, base) -> tuple:
    """cos and sin of position * base**(-2j/dims), fp32 (T, 1, dims/2). In bf16 positions above 256 would coincide."""
    rates = base ** (-torch.arange(0, dims, 2).double() / dims)
    angles = torch.outer(torch.arange(seq_len).double(), rates)[:, None]
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the leading dims of x (B, T, H, C); the rest passes through (arXiv:2104.09864)."""
    r = cos.size(-1)
    x1, x2, rest = x.split((r, r, x.size(-1) - 2 * r), dim=-1)
    return torch.cat(((x1 * cos + x2 * sin).type_as(x), (x2 * cos - x1 * sin).type_as(x), rest), dim=-1)


class Documents(NamedTuple):
    """What keeps documents apart, for either kind of kernel; a compiler drops the one that is not used."""

    mask: Tensor  # (B, 1, T, T), whether a token may attend to one
    bounds: Tensor  # int32, of rows and of the documents in them, rising, all rows one after the other


def documents_of(ids: Tensor) -> Documents:
    """Those of ids (B, T). There are as many bounds for any batch: of more than a document per 32 tokens the last ones
    see those before them.
    """
    first, number = F.pad(ids[:, 1:] == BOS, (1, 0)), (ids == BOS).cumsum(1)
    inside = torch.nonzero_static(first.flatten(), size=ids.numel() // 32, fill_value=0).flatten()
    rows = torch.arange(0, ids.numel() + 1, ids.size(1), device=ids.device)
    mask = (number[:, None, :, None] == number[:, None, None]).tril()
    return Documents(mask, torch.cat((rows, inside)).sort().values.int())


def attend_sdpa(q, k, v, documents=None, scale=None):
    """Causal attention by torch's own kernels.

    q: (B, S, H, C), of the last S of T positions; k, v: (B, T, K, C), H a multiple of K; returns (B, S, H, C). Inside
    of Documents, if given.
    """
    queries, before = q.size(1), k.size(1) - q.size(1)
    mask = None if documents is None else documents.mask[:, :, before:]
    if before and mask is None:  # its causal masks begin at the first key
        q = F.pad(q, (0, 0, 0, 0, before, 0))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.is_cuda and (q.dtype == torch.float32 or mask is not None):
        # for these there is one kernel that keeps no (T, T) scores, and it knows no groups
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return last_of(y.transpose(1, 2), queries)


def attend_flash(kernels, q, k, v, documents=None, scale=None):
    """The same by the two functions of a FlashAttention package, of which one takes bounds; old ones return more than
    the output.
    """
    whole, varlen = kernels
    if documents is None:
        y = whole(q, k, v, softmax_scale=scale, causal=True)
    else:
        flat, bounds, queries, keys = (t.flatten(0, 1) for t in (q, k, v)), documents.bounds, q.size(1), k.size(1)
        asked = bounds
        if queries < keys:  # each document's among the queries: one that ends before them has none
            asked = bounds // keys * queries + (bounds % keys - keys + queries).clamp(0)
        # FlashAttention-2 takes a longest of 1 for one query in each document
        y = varlen(*flat, asked, bounds, max(queries, 2), keys, softmax_scale=scale, causal=True)
    return (y[0] if isinstance(y, tuple) else y).view(q.shape)


class Positions(NamedTuple):
    """What blocks are told of those of a batch (B, T)."""

    rotary: tuple  # cosines and sines (T, pairs)
    documents: Documents | None
    last: int  # how many of the last ones to compute: all T, but in the last block


def last_of(x: Tensor, count: int) -> Tensor:
    """The last positions of x (B, T, ...). All of them are x itself: a compiler would scatter a slice's gradient."""
    return x if count == x.size(1) else x[:, -count:]


def attend_padded(attend, q, k, v, documents=None):
    """The same by a kernel that takes heads of a multiple of 8 channels: 60 (PR #1127) run as 64, at their scale."""
    channels = q.size(-1)
    q, k, v = (F.pad(t, (0, -channels % 8)) for t in (q, k, v))
    return attend(q, k, v, documents, scale=channels**-0.5)[..., :channels]


def compute_dtype(cfg, device: torch.device) -> torch.dtype:
    """The dtype of activations: bf16 where the processor multiplies it, fp32 elsewhere, unless DTYPE says."""
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    bf16, fp32 = torch.bfloat16, torch.float32
    return dict(bf16=bf16, fp32=fp32, auto=bf16 if fast else fp32)[cfg.dtype]


class Attention(NamedTuple):
    """The causal attention of a run, and a line of the log if a faster one is missing."""

    name: str
    attend: Callable
    warning: str = ""


FLASH_PACKAGES = dict(fa3=("flash_attn_interface", "flash_attn_3"), fa2=("flash_attn", "flash_attn"))


def load_attention(name: str, cfg, ranks) -> Callable:
    """The attention of that name. ImportError if it is not for this device, or its package missing or broken."""
    if name == "sdpa":
        return attend_sdpa
    if ranks.device.type != "cuda" or compute_dtype(cfg, ranks.device) != torch.bfloat16:
        raise ImportError("it runs on a GPU, in bf16")
    if name == "fa3" and torch.cuda.get_device_capability(ranks.device)[0] != 9:
        raise ImportError("it runs on a Hopper GPU")
    return partial(attend_flash, flash_kernels(name, cfg.document_attention, ranks.compiles(cfg)))


def flash_kernels(name: str, apart: bool, traced: bool) -> tuple:
    """flash_attn_func and, if asked for, flash_attn_varlen_func of a package. ImportError if missing or untraceable."""
    module, namespace = FLASH_PACKAGES[name]
    try:
        package = importlib.import_module(module)
        kernels = package.flash_attn_func, package.flash_attn_varlen_func if apart else None
    except (OSError, RuntimeError, AttributeError) as error:  # a wheel that was built for another torch or CUDA
        raise ImportError(f"{module} cannot be loaded ({' '.join(str(error).split())})") from None
    if traced and not hasattr(getattr(torch.ops, namespace), "_flash_attn_forward"):
        raise ImportError(f"this {module} registers no operator that torch.compile could trace; take a newer one")
    return kernels


def choose_attention(cfg, ranks) -> Attention:
    """A kernel that is asked for by name must be there; `auto` takes the best that is."""
    missing = []
    for name in ("fa3", "fa2", "sdpa") if cfg.attention == "auto" else (cfg.attention,):
        try:
            attend = load_attention(name, cfg, ranks)
        except ImportError as error:
            missing.append(f"{name}: {error}")
            continue
        if name != "sdpa" and cfg.head_dim % 8:
            attend = partial(attend_padded, attend)
        slow = ranks.device.type == "cuda" and cfg.attention == "auto" and missing
        return Attention(name, attend, f"\nWARNING: attention by {name}, without {'; '.join(missing)}" if slow else "")
    raise InputError(f"ATTENTION={cfg.attention} cannot run: {missing[0]}; auto takes what is there")


def exclude_own_value(y, v):
    """Remove from each head's output y (B, T, H, C) what lies along the token's own value v (B, T, K, C) (PR #265)."""
    grouped, own = y.unflatten(2, (v.size(2), -1)), v.unsqueeze(3)
    # a value of zero has no direction and removes nothing; 1e-24 is no square of a value that matters
    along = (grouped * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp_min(1e-24)
    return torch.addcmul(grouped, along, own, value=-1).flatten(2, 3)


def filled(start: float, *shape: int) -> nn.Parameter:
    """A parameter, fp32, of the value from which it is learnt."""
    return nn.Parameter(torch.full(shape, start))


class Linear(nn.Module):
    """y = x W^T without bias; the fp32 weight is cast to the dtype of x, unless it is `ready`, the outputs' `scale` in
    it (see Weights). An `adapter` makes adapter(x, y) of it, before the scale.
    """

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))  # until `init_weights`
        self.adapter: Callable | None = None

    def forward(self, x, ready=None, scale=None):
        if self.adapter is not None:
            y = self.adapter(x, F.linear(x, self.weight.type_as(x)))
            return y if scale is None else scale.type_as(x) * y
        return F.linear(x, self.weight.type_as(x) if ready is None else ready)


class Weights(NamedTuple):
    """What the products of blocks take, in the dtype of activations, rows of each block below those before."""

    qkv: Tensor  # of c_q, c_k, c_v
    out: Tensor  # of attention's proj, times its outputs' scale
    fc: Tensor
    proj: Tensor  # of the MLP's, times its outputs' scale
    mix: Tensor  # two rows a block, of x and of x0


def by_block(weights: Weights, blocks: int) -> list:
    return [Weights(*parts) for parts in zip(*(whole.chunk(blocks) for whole in weights))]


def heads_of(x: Tensor, ready: Tensor, channels: int, *linears: Linear) -> list:
    """What each of several Linears makes of x (B, T, D), as heads (B, T, H, C) of so many channels, by one product."""
    counts, shape = [len(linear.weight) // channels for linear in linears], (-1, channels)
    # split as heads, not as channels: else Inductor joins the gradients by a kernel of its own
    outputs = F.linear(x, ready).unflatten(-1, shape).split(counts, dim=2)
    return [
        y if linear.adapter is None else linear.adapter(x, y.flatten(2)).unflatten(-1, shape)
        for linear, y in zip(linears, outputs)
    ]


class Table(Linear):
    """An embedding table, fp32 (rows, dim); `project` is the tied head, a Linear of the same weight."""

    def __init__(self, rows: int, dim: int):
        super().__init__(dim, rows)

    def forward(self, ids):
        return F.embedding(ids, self.weight)

    def project(self, x):
        return super().forward(x)


class SmearGate(nn.Module):
    """Blends each token with the one before, learned per channel (PR #65); a document's first stays pure."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = filled(0.0, dim)

    def forward(self, x, ids):
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        inside = F.pad(ids[:, 1:] != BOS, (1, 0))[..., None]
        return x + inside * self.gate.sigmoid().type_as(x) * (before - x)


class BigramHashEmbedding(nn.Module):
    """A hashed embedding of (previous token, token) to add to the token's own (PR #65; linear hash: PR #1127)."""

    def __init__(self, cfg):
        super().__init__()
        self.buckets, self.hash = cfg.bigram_vocab_size, cfg.bigram_hash
        self.embed, self.proj = Table(self.buckets, cfg.bigram_dim), Linear(cfg.bigram_dim, cfg.model_dim)
        self.scale = filled(cfg.bigram_scale_init) if cfg.bigram_scale_init else None

    def bucket(self, ids):
        """Bucket of each token (B, T). First tokens of a row or of a document have no bigram: the last bucket, or 0."""
        first = F.pad(ids[:, 1:] == BOS, (1, 0), value=True)
        before = F.pad(ids[:, :-1], (1, 0)).masked_fill(first, 0)
        xor = torch.bitwise_xor(36313 * ids, 27191 * before) % (self.buckets - 1)
        linear, reserved = (1009 * before + ids) % self.buckets, xor.masked_fill(first, self.buckets - 1)
        return dict(linear=linear, xor=xor, reserved=reserved)[self.hash]

    def forward(self, ids, dtype):
        y = self.proj(self.embed(self.bucket(ids)).to(dtype))
        return y if self.scale is None else self.scale * y


class ValueEmbedding(nn.Module):
    """A token embedding that several layers share and add to their values, each with a weight of its own (PR #374)."""

    def __init__(self, cfg):
        super().__init__()
        self.embed = Table(cfg.vocab_size, cfg.ve_dim)
        self.proj = Linear(cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim)
        self.scale = filled(0.1)
        self.layer_scales = nn.ParameterDict({str(i): filled(1.0, 1) for i in cfg.ve_layers})

    def forward(self, ids, dtype):
        shared = self.scale * self.proj(self.embed(ids).to(dtype))
        return {int(i): (weight * shared).to(dtype) for i, weight in self.layer_scales.items()}


class HeadGate(nn.Module):
    """A sigmoid gate per head, from 0 to `peak`, of the first channels of the attention's input (arXiv:2505.06708)."""

    def __init__(self, channels: int, heads: int, peak: float, bias: bool):
        super().__init__()
        self.peak = peak
        self.slope = filled(0.0, heads, channels)
        self.bias = filled(4.0, heads) if bias else None

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        raw = F.linear(x[..., : self.slope.size(1)], self.slope.type_as(x), bias)
        return self.peak * raw.sigmoid()[..., None]


class CausalSelfAttention(nn.Module):
    """Grouped queries: QK-norm, head gains, partial RoPE (PR #315), XSA, gates, value residual (arXiv:2410.17897)."""

    def __init__(self, cfg, layer: int, attend):
        super().__init__()
        self.head_dim, self.attend = cfg.head_dim, attend
        self.exclusive = layer >= cfg.num_layers - cfg.xsa_last_n
        dim, kv_dim = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        self.c_q, self.c_k, self.c_v = Linear(dim, dim), Linear(dim, kv_dim), Linear(dim, kv_dim)
        self.proj = Linear(dim, dim)
        self.gain_spans = (cfg.rope_dims, cfg.head_dim - cfg.rope_dims) if cfg.qk_gains == 2 else ()
        self.q_gain = filled(cfg.qk_gain_init, cfg.num_heads, cfg.qk_gains)
        self.value_mix = filled(0.5, 2) if cfg.value_residual and layer else None
        self.gates = nn.ModuleList()
        if cfg.gated_attention:  # of the whole input (PR #490)
            self.gates.append(HeadGate(dim, cfg.num_heads, 1.0, bias=True))
        if cfg.attn_gate_dims:  # of a few channels (PR #1812)
            self.gates.append(HeadGate(cfg.attn_gate_dims, cfg.num_heads, 2.0, bias=False))

    def forward(self, x, weights, where, value_embedding, first_value, scale):
        """(what to add to the stream where it is asked for, this layer's values), for normalized inputs (B, T, D)."""
        rotary, documents, last = where
        gain = self.q_gain
        if self.gain_spans:  # one for what is rotated, one for the rest
            gain = written(torch.cat([g.expand(-1, n) for g, n in zip(gain.split(1, 1), self.gain_spans)], 1))
        q, k, own = heads_of(x, weights.qkv, self.head_dim, self.c_q, self.c_k, self.c_v)
        q = rotate(norm(last_of(q, last), gain), *(table[-last:] for table in rotary))
        k, v = rotate(norm(k), *rotary), own
        if value_embedding is not None:
            v = v + value_embedding.view_as(v)
        if self.value_mix is not None:
            first, rest = self.value_mix.type_as(x)
            v = first * first_value + rest * v
        y = self.attend(q, k, v, documents)
        y = exclude_own_value(y, last_of(v, last)) if self.exclusive else y
        for gate in self.gates:
            y = y * gate(last_of(x, last))
        return self.proj(y.flatten(2), weights.out, scale), own


class MLP(nn.Module):
    """Two matrices around a squared activation (arXiv:2109.08668; leaky: PR #549; Star-ReLU: arXiv:2210.13452)."""

    def __init__(self, cfg):
        super().__init__()
        hidden = cfg.mlp_dim
        self.fc, self.proj = Linear(cfg.model_dim, hidden), Linear(hidden, cfg.model_dim)
        leaky = partial(F.leaky_relu, negative_slope=cfg.mlp_negative_slope)
        self.activation = dict(leaky_relu=leaky, silu=F.silu)[cfg.activation]
        self.scale = filled(1.0, hidden) if cfg.mlp_affine else None
        self.bias = filled(0.0, hidden) if cfg.mlp_affine else None

    def forward(self, x, weights, scale):
        h = self.activation(self.fc(x, weights.fc), inplace=True).square()
        h = h if self.scale is None else self.scale.type_as(x) * h + self.bias.type_as(x)
        return self.proj(h, weights.proj, scale)


class Block(nn.Module):
    """Mixes the stream with the embedding x0, then adds attention and MLP; inputs scaled by depth (PR #315)."""

    def __init__(self, cfg, layer: int, attend):
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(cfg, layer, attend), MLP(cfg)
        passes = cfg.num_loops + 1 if cfg.loop_start <= layer <= cfg.loop_end else 1
        depth = torch.tensor((layer + 1) ** -cfg.ln_scale_power * passes**-0.5, device="cpu")
        self.register_buffer("input_scale", depth, persistent=False)  # no constant: one kernel then serves all layers
        self.parallel = layer >= cfg.parallel_residual_start >= 0
        self.attn_scale = filled(1.0, cfg.model_dim)
        self.mlp_scale = filled(1.0, cfg.model_dim)
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, cfg.model_dim))

    def forward(self, x, x0, weights, where, value_embedding, first_value):
        """(the stream after it where it is asked for, its attention's own values)."""
        keep, add = weights.mix
        x = written(torch.addcmul(keep * x, add, x0))
        read = norm(x, self.input_scale)
        update, own = self.attn(read, weights, where, value_embedding, first_value, self.attn_scale)
        x = last_of(x, where.last)
        after = x + update
        return after + self.mlp(norm(x if self.parallel else after, self.input_scale), weights, self.mlp_scale), own


def layer_order(cfg, looped: bool) -> list:
    """The blocks in the order in which they run. Looped, LOOP_START..LOOP_END run NUM_LOOPS times more (PR #1493)."""
    layers, stop = list(range(cfg.num_layers)), cfg.loop_end + 1
    again = layers[cfg.loop_start : stop] * cfg.num_loops if looped else []
    return layers[:stop] + again + layers[stop:]


class GPT(nn.Module):
    """U-Net GPT, tied head: what the first half of passes through blocks pushes the second takes, the latest first."""

    def __init__(self, cfg, attend: Callable = attend_sdpa, dtype: torch.dtype = torch.float32):
        super().__init__()
        dim, skips = cfg.model_dim, len(layer_order(cfg, True)) // 2
        self.dtype, self.softcap, self.apart = dtype, cfg.logit_softcap, cfg.document_attention
        self.order, self.looped_order = layer_order(cfg, False), layer_order(cfg, True)
        self.cap_steps: nn.Parameter | None = None  # test-time training's: logs of what multiplies the cap, by sign
        self.tok_emb = Table(cfg.vocab_size, dim)
        self.embed_scale = filled(1.0, dim) if cfg.embed_scale else None
        self.bigram = BigramHashEmbedding(cfg) if cfg.bigram_vocab_size else None
        self.smear = SmearGate(dim) if cfg.smear_gate else None
        self.value_embed = ValueEmbedding(cfg) if cfg.ve_layers else None
        self.blocks = nn.ModuleList(Block(cfg, i, attend) for i in range(cfg.num_layers))
        self.skip_weights = filled(1.0, skips, dim)
        self.skip_gates = filled(0.0, skips, dim) if cfg.skip_gates else None
        with torch.device("cpu"):
            cos, sin = rotary_tables(max(cfg.train_seq_len, cfg.window), cfg.rope_dims or cfg.head_dim, cfg.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, cfg):
        """SEED draws the matrices: orthogonal, hash and value projections at 1/sqrt(2L), outputs 0 (PR #65); or
        uniform, and no bigram at first (PR #1127). Gains, gates and mixes start as they were made.
        """
        draw, orthogonal = torch.Generator().manual_seed(cfg.seed), dict(orthogonal=True, default=False)[cfg.init]
        stds = {
            "tok_emb": cfg.tied_embed_init_std,
            "value_embed.embed": 0.01,
            "bigram.embed": 0.0 if orthogonal else 0.01,
        }
        zeros = ("attn.proj", "mlp.proj") if orthogonal else ("attn.proj", "mlp.proj", "bigram.proj")
        for name, module in self.named_modules():
            if not isinstance(module, Linear):
                continue
            p = module.weight
            if name in stds:
                nn.init.normal_(p, std=stds[name], generator=draw)
            elif name.endswith(zeros):
                p.zero_()
            elif orthogonal:
                nn.init.orthogonal_(p, 1.0 if "blocks" in name else (2 * cfg.num_layers) ** -0.5, generator=draw)
            else:
                bound = p.size(1) ** -0.5
                nn.init.uniform_(p, -bound, bound, generator=draw)

    def weights(self) -> Weights:
        """Those of all blocks. Outputs' scales go into matrices: products of (D, D) instead of (B, T, D)."""

        def ready(parts, scales=()):
            whole = torch.cat(parts)
            return (torch.cat(scales)[:, None] * whole if scales else whole).to(self.dtype)

        blocks = self.blocks
        return Weights(
            ready([m.weight for b in blocks for m in (b.attn.c_q, b.attn.c_k, b.attn.c_v)]),
            ready([b.attn.proj.weight for b in blocks], [b.attn_scale for b in blocks]),
            ready([b.mlp.fc.weight for b in blocks]),
            ready([b.mlp.proj.weight for b in blocks], [b.mlp_scale for b in blocks]),
            ready([b.resid_mix for b in blocks]),
        )

    def embed(self, ids):
        """The stream (B, T, D) that the first block reads."""
        x = self.tok_emb(ids) if self.embed_scale is None else self.tok_emb(ids) * self.embed_scale
        x = x.to(self.dtype)  # before the norm, which keeps its input for the backward pass
        x = norm(x if self.bigram is None else x + self.bigram(ids, self.dtype))
        return x if self.smear is None else self.smear(x, ids)

    def hidden(self, ids, looped=False, alone=False, weights=None, last=math.inf):
        """Final normalized states (B, T, D) of token ids (B, T): the one path for training, scoring and adapting.
        `alone`: each row is of one document. `weights`: what `weights` returns, if that was called before.
        `last`: of so many positions alone; of others the last block makes queries, keys and values, no more.
        """
        x = x0 = written(self.embed(ids))
        values = self.value_embed(ids, x.dtype) if self.value_embed is not None else {}
        length, documents = ids.size(1), documents_of(ids) if self.apart and not alone else None
        where = Positions((self.cos[:length], self.sin[:length]), documents, length)
        weights_of = by_block(weights or self.weights(), len(self.blocks))
        order = self.looped_order if looped else self.order
        asked = [where] * (len(order) - 1) + [where._replace(last=min(last, length))]
        skips, first_value = [], None
        for position, layer in enumerate(order):
            row = position - len(order) // 2
            if row >= 0 and skips:  # with an odd number of passes the last one finds none
                weight, skip = self.skip_weights[row].type_as(x), skips.pop()
                if self.skip_gates is None:
                    x = torch.addcmul(x, weight, skip)
                else:  # PR #1127
                    x = torch.lerp(weight * skip, x, self.skip_gates[row].sigmoid().type_as(x))
            x, value = self.blocks[layer](x, x0, weights_of[layer], asked[position], values.get(layer), first_value)
            first_value = value if first_value is None else first_value
            if row < 0:
                skips.append(x := written(x))
        return norm(x)

    def logits(self, hidden, temperature=1.0):
        """Soft-capped fp32 logits (..., V) of final states (..., D), by the tied embedding."""
        raw, cap = self.tok_emb.project(hidden).float(), self.softcap
        if self.cap_steps is not None:  # PR #1923
            cap = cap * torch.where(raw > 0, *self.cap_steps).exp()
        return cap / temperature * torch.tanh(raw / cap)

    def forward(self, ids, targets, looped=False, temperature=1.0, z_loss=0.0, alone=False, weights=None):
        """Cross-entropy in nats, fp32 (B, S), of the targets (B, S) of the last S <= T positions of ids (B, T)."""
        hidden = self.hidden(ids, looped, alone, weights, targets.size(1))
        logits = self.logits(hidden, temperature)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return losses + z_loss * logits.logsumexp(-1).square() if z_loss else losses  # arXiv:2204.02311


def compiled(model: GPT, cfg, ranks) -> Callable:
    """The forward pass as two graphs. In one, Inductor would make each block's weights ready by kernels of its own,
    forward and backward; between two, they are tensors that hold all blocks'.
    """
    weights, forward = ranks.compile(model.weights, cfg), ranks.compile(model, cfg)
    return lambda *args, **options: forward(*args, weights=weights(), **options)


def parameter_roles(model: nn.Module) -> dict:
    """The role of every parameter by name: `matrix` of a Linear, `table` of embeddings, `scalar` for the rest."""
    kinds = {Linear: "matrix", Table: "table"}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_parameters()}
    return {name: kinds.get(type(owner), "scalar") for name, owner in owners.items()}


# ---- Optimizer: gradients -> weights. Muon for matrices, sharded over ranks; AdamW for tables and scalars.

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # kellerjordan.github.io/posts/muon


def orthogonalize(g: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix in g (N, R, C) towards 1 by a quintic Newton-Schulz iteration.

    Five steps land them in about [0.7, 1.2], which trains as well as exactly 1.
    """
    a, b, c = NEWTON_SCHULZ
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum SGD with orthogonalized steps. A group is a stack; a smaller matrix in it has zeros beside and below.

    `lr` is the spectral norm of a step, times sqrt(rows / cols) for tall matrices. Rows first: MuonEq-R (PR #1493).
    Each rank has the momentum of its part of a stack, and all have the steps (PR #399).
    """

    def __init__(self, groups: list, ranks, cfg, dtype: torch.dtype):
        self.stacks, self.places = [], []
        for group in groups:
            params, sent = group["params"], torch.float32 if ranks.world == 1 else dtype
            count, shape = -(-len(params) // ranks.world), [max(sizes) for sizes in zip(*(p.shape for p in params))]
            group["buffer"] = params[0].new_zeros(count, *shape)
            stack = params[0].new_zeros(count * ranks.world, *shape, dtype=sent)
            self.stacks.append(stack)
            self.places.append([slot[: p.size(0), : p.size(1)] for slot, p in zip(stack, params)])
        super().__init__(groups, {})
        self.ranks = ranks

        def direction(grad, buffer, grad_scale, momentum):
            grad = (grad_scale * grad.float()).nan_to_num(0.0, 0.0, 0.0)
            update = grad + momentum * buffer.mul_(momentum).add_(grad)
            if cfg.muon_row_normalize:
                update = F.normalize(update, dim=-1, eps=1e-7)
            return orthogonalize(update.to(dtype), cfg.muon_backend_steps)

        def move(params, updates, scale, rate, decay):
            steps = [u[: p.size(0), : p.size(1)].float() for u, p in zip(updates, params)]
            rates = [scale * (-rate * max(1.0, p.size(0) / p.size(1)) ** 0.5) for p in params]
            torch._foreach_mul_(params, 1 - scale * (rate * decay))
            torch._foreach_add_(params, torch._foreach_mul(steps, rates))

        self.direction, self.move = ranks.compile(direction, cfg), ranks.compile(move, cfg)

    def begin_sums(self) -> list:
        """Begin to sum each group's gradients over ranks, of which each one gets a part of the stack."""
        begun = []
        for group, stack, places in zip(self.param_groups, self.stacks, self.places):
            torch._foreach_copy_(places, [p.grad for p in group["params"]])
            begun.append(self.ranks.reduce_scatter(stack))
        return begun

    def begin_steps(self, sums: list, grad_scale: Tensor, momentum: Tensor) -> list:
        """Nesterov momentum of `grad_scale` times the gradient, then rows of length 1 if asked for, then orthogonal:
        each group's steps, on their way to all ranks.
        """
        begun = []
        for group, grad in zip(self.param_groups, sums):
            step = self.direction(grad, group["buffer"], grad_scale, momentum)
            begun.append(self.ranks.all_gather(step))
        return begun

    def step(self, begun: list, scale: Tensor):
        """Decay, then the steps that `begin_steps` began, at `scale` times the peak rates."""
        for group, (wait, updates) in zip(self.param_groups, begun):
            wait()
            self.move(group["params"], updates, scale, group["lr"], group["weight_decay"])


def peak_rate_and_decay(name: str, role: str, cfg) -> tuple:
    """Peak learning rate and weight decay of a parameter; the decoder's rate has a factor of its own (PR #1127)."""
    rates = dict(
        matrix=(cfg.matrix_lr, cfg.muon_wd),
        table=(cfg.tied_embed_lr, cfg.embed_wd),
        scalar=(cfg.scalar_lr, cfg.adam_wd),
    )
    rate, decay = rates[role]
    if role == "matrix" and ".mlp." in name and cfg.muon_wd_mlp >= 0:
        decay = cfg.muon_wd_mlp
    if name.startswith("blocks.") and int(name.split(".")[1]) >= cfg.num_layers // 2:
        rate *= cfg.decoder_lr_mult
    return rate, decay


def stack_shape(p: Tensor, shapes: Iterable) -> tuple:
    """The smallest shape, of those of blocks' matrices, that holds p: the few small projections need no other stack."""
    larger = [s for s in shapes if s[0] >= p.size(0) and s[1] >= p.size(1)]
    return min(larger, key=math.prod, default=p.shape)


class Optimizers:
    """Muon and AdamW as one: averages the gradients over ranks, clips their joint norm, steps both."""

    def __init__(self, model: GPT, ranks, cfg):
        groups: dict[tuple, dict] = {}
        shapes = {m.weight.shape for m in model.blocks.modules() if isinstance(m, Linear)}
        for (name, p), role in zip(model.named_parameters(), parameter_roles(model).values(), strict=True):
            rate, decay = peak_rate_and_decay(name, role, cfg)
            key = (role == "matrix", stack_shape(p, shapes) if role == "matrix" else role, rate, decay)
            group = groups.setdefault(key, dict(params=[], lr=rate, base_lr=rate, weight_decay=decay))
            group["params"].append(p)
        muon = [group for key, group in groups.items() if key[0]]
        rest = [group for key, group in groups.items() if not key[0]]
        muon.sort(key=lambda g: -sum(p.numel() for p in g["params"]))  # the largest first: transfers overlap with work
        self.muon = Muon(muon, ranks, cfg, model.dtype)
        self.adam = torch.optim.AdamW(rest, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        self.others = [p for g in rest for p in g["params"]]
        self.ranks, self.clip = ranks, cfg.grad_clip_norm or math.inf

    @torch.no_grad()
    def step(self, scale, momentum) -> Tensor:
        """One step at `scale` times the peak rates; returns the norm of the averaged gradient, before the clip.

        A gradient that is no number counts as 0: the host sees a broken loss a step later, and weights stay numbers.
        """
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * scale
        begun = self.muon.begin_sums()
        others = [p.grad for p in self.others]
        flat = self.ranks.sum_(nn.utils.parameters_to_vector(others))
        for wait, _ in begun:
            wait()
        sums = [part for _, part in begun]
        squares = torch.stack(torch._foreach_norm(sums, dtype=torch.float32)).square().sum()
        norm_before = (self.ranks.sum_(squares) + flat.square().sum()).sqrt() / self.ranks.world
        grad_scale = (self.clip / (norm_before + 1e-6)).clamp(max=1.0) / self.ranks.world
        steps = self.muon.begin_steps(sums, grad_scale, grad_scale.new_full((), momentum))
        nn.utils.vector_to_parameters((grad_scale * flat).nan_to_num_(0.0, 0.0, 0.0), others)
        self.adam.step()
        self.muon.step(steps, grad_scale.new_full((), scale))
        return norm_before


# ---- Schedules: pure functions of progress.


def fraction_done(step, elapsed, cfg) -> float:
    """How much of the run is behind, by steps or by the clock, whichever is further."""
    return max(step / cfg.iterations, elapsed / cfg.time_limit)


def lr_scale(step, elapsed, step_seconds, cfg) -> float:
    """Share of the peak rate: 1, then linear to 0 at ITERATIONS or the time limit, whichever is first at this speed,
    but not below MIN_LR.
    """
    steps_left = min(cfg.iterations - step, (cfg.time_limit - elapsed) / max(step_seconds, 1e-9))
    by_steps = steps_left / cfg.warmdown_iters if cfg.warmdown_iters else 1.0
    by_fraction = (1 - fraction_done(step, elapsed, cfg)) / cfg.warmdown_frac if cfg.warmdown_frac else 1.0
    return min(1.0, max(cfg.min_lr, min(by_steps, by_fraction)))


def schedule_warnings(step_seconds: float, cfg) -> list:
    """What the schedules will not do in as many steps of this length as fit, and what to set instead."""
    fitting = cfg.time_limit / step_seconds - 1 if step_seconds else math.inf
    steps = max(1, int(min(cfg.iterations, fitting)))
    scales = [lr_scale(step, step * step_seconds, step_seconds, cfg) for step in range(steps)]
    texts = []
    if steps < cfg.warmdown_iters:
        texts.append(
            f"about {steps} steps fit, fewer than WARMDOWN_ITERS={cfg.warmdown_iters}: the learning rate starts at "
            f"{100 * scales[0]:.0f} % of its peak; set WARMDOWN_ITERS=0 WARMDOWN_FRAC=0.4, or on one GPU the time that "
            "eight have, MAX_WALLCLOCK_SECONDS=4800"
        )
    if cfg.late_qat_threshold and min(scales) >= cfg.late_qat_threshold:
        texts.append(
            f"in about {steps} steps the rate never falls below LATE_QAT_THRESHOLD={cfg.late_qat_threshold}, so late "
            "QAT never starts; set WARMDOWN_FRAC or WARMDOWN_ITERS, or LATE_QAT_THRESHOLD=0 if that is meant"
        )
    if not any(average_weight(step + 1, scale, 0, cfg) for step, scale in enumerate(scales)):
        texts.append(
            f"in about {steps} steps SWA takes no snapshot; lower SWA_EVERY={cfg.swa_every} or raise "
            f"SWA_START_SCALE={cfg.swa_start_scale}"
        )
    return texts


class Stage(NamedTuple):
    """What stays the same while one graph trains."""

    seq_len: int
    looped: bool


def stage(done, cfg) -> Stage:
    """The stage at a fraction of the run: rows grow (PR #2014), and the loops are switched on once."""
    lengths = *cfg.early_seq_lens, cfg.train_seq_len
    passed = sum(done >= end for end in cfg.early_seq_ends)
    return Stage(lengths[passed], cfg.num_loops > 0 and done >= cfg.enable_looping_at)


def stages(cfg) -> list:
    """Those that a run meets, in their order."""
    return list(dict.fromkeys(stage(done, cfg) for done in sorted((0.0, *cfg.early_seq_ends, cfg.enable_looping_at))))


def out_of_time(elapsed, step_seconds, cfg) -> bool:
    """Whether another step might end after the limit. The device may still be busy with the one before."""
    return cfg.time_limit < elapsed + 2 * step_seconds


def muon_momentum(step, elapsed, scale, cfg) -> float:
    """Momentum that warms up linearly, by steps or by the run's progress, and cools down with the rate (PR #1812)."""
    warmth = step / cfg.muon_momentum_warmup_steps if cfg.muon_momentum_warmup_steps else 1.0
    if cfg.muon_momentum_warmup_frac:
        warmth = fraction_done(step, elapsed, cfg) / cfg.muon_momentum_warmup_frac
    warmth, keep = min(1.0, warmth), max(scale, cfg.muon_momentum_cooldown)
    warm = (1 - warmth) * cfg.muon_momentum_warmup_start + warmth * cfg.muon_momentum
    return keep * warm + (1 - keep) * cfg.muon_momentum_warmup_start


def average_weight(step, scale, averaged, cfg) -> float:
    """How far the average moves to the weights after `step`: EMA 1 - decay, SWA 1/n at its n-th snapshot, last 1."""
    snapshot = scale < cfg.swa_start_scale and step % cfg.swa_every == 0
    return dict(ema=1 - cfg.ema_decay, swa=1 / (averaged + 1) if snapshot else 0.0, last=1.0)[cfg.averaging]


# ---- Averaging: EMA and SWA are one recurrence, in fp32. Its weights are tried on and taken off.


@contextmanager
@torch.no_grad()
def swapped(params: list, values: list) -> Iterator:
    """Inside, the parameters hold `values`, and gradients may flow; afterwards what they held before."""
    before = [p.clone() for p in params]
    try:
        torch._foreach_copy_(params, values)
        yield
    finally:
        torch._foreach_copy_(params, before)


class Average:
    """average += weight * (model - average); `count` says how many times the weights went in."""

    def __init__(self, model: nn.Module):
        self.source = list(model.parameters())
        self.values = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        self.count = 0

    @torch.no_grad()
    def update(self, weight: float):
        if weight:
            torch._foreach_lerp_(list(self.values.values()), [p.float() for p in self.source], weight)
            self.count += 1

    def applied(self) -> AbstractContextManager[None]:
        """Inside, the model has the averaged weights."""
        return swapped(self.source, list(self.values.values()))


# ---- Quantization: weights -> integer codes and a step per row. Late QAT rounds by the function that exports.


class Grid(NamedTuple):
    """The codes that a weight may have: of `bits` bits, 16 for fp16; clipped at `sigmas` deviations, 0 for a search."""

    bits: int
    sigmas: float

    @property
    def top(self) -> int:
        return 2 ** (self.bits - 1) - 1


def nearest(multiples: Tensor, top: Tensor | int) -> Tensor:
    """The closest codes within +-top, as floats, of weights in units of their step."""
    return multiples.round().clamp(-top, top)


def row_steps(w: Tensor, grid: Grid, cfg) -> Tensor:
    """Steps (R,), exact in fp16, for rows of w (R, C): a number of standard deviations (SDClip, PR #1493), or else
    of the clips CLIP_SHARES the one with the least squared error in its row (GPTQ-lite; PR #414 chose one per tensor).
    """
    if grid.sigmas:
        return (w.std(1) * (grid.sigmas / grid.top)).clamp_min(1e-7).half().float()
    peak, floor = w.abs().amax(1), max(cfg.step_floor / grid.top, 1e-7)
    least, steps = torch.full_like(peak, math.inf), torch.zeros_like(peak)
    for clip in cfg.clip_shares:
        step = (peak * (clip / grid.top)).clamp_min(floor).half().float()
        error = (nearest(w / step[:, None], grid.top) * step[:, None] - w).square().sum(1)
        steps, least = torch.where(error < least, step, steps), torch.minimum(error, least)
    return steps


class Observer:
    """Rides on a Linear or a Table and sums over tokens what tells the cost of an error in its weight (R, C): x x^T of
    its inputs, the squares of its outputs' gradients, and their mean square for each row that an id looked up.
    """

    def __init__(self, module: Linear):
        rows, cols = module.weight.shape
        self.inputs, self.outputs, self.lookups, self.count = (
            module.weight.new_zeros(shape) for shape in ((cols, cols), rows, rows, ())
        )
        self.module, self.hook, module.adapter = module, module.register_forward_hook(self.look_up), self

    def leave(self):
        self.module.adapter = None
        self.hook.remove()

    def __call__(self, x, y):
        flat = x.detach().flatten(0, -2).float()
        self.inputs += flat.T @ flat
        self.count += len(flat)
        if y.requires_grad:
            y.register_hook(self.add_gradient)
        return y

    def add_gradient(self, gradient):
        self.outputs += gradient.flatten(0, -2).float().square().sum(0)

    def look_up(self, module, args, y):
        """A forward hook: counts an id's row, if it was ids that came in."""
        if y.requires_grad and not args[0].is_floating_point():
            y.register_hook(partial(self.add_lookup, args[0].flatten()))

    def add_lookup(self, ids, gradient):
        self.lookups.index_add_(0, ids, gradient.flatten(0, -2).float().square().mean(-1))


class Curvature(NamedTuple):
    """An error e (R, C) in a weight costs about the sum over rows r of rows[r] * e[r] @ inputs @ e[r]."""

    inputs: Tensor  # (C, C), mean of x x^T; the identity for a table that is only looked up
    rows: Tensor  # (R,), sum of squared gradients; 0 where none flowed


def curvature(seen: Observer, ranks) -> Curvature:
    """What the observers of all ranks saw of one weight: Fisher's matrix as a Kronecker product (arXiv:1503.05671)."""
    inputs, outputs, lookups, count = map(ranks.sum_, (seen.inputs, seen.outputs, seen.lookups, seen.count))
    mean = inputs / count if count else torch.eye(len(inputs), device=inputs.device)
    return Curvature(mean, outputs + lookups / mean.diagonal().mean().clamp_min(1e-30))


class Cholesky(NamedTuple):
    """A damped Hessian, ready for GPTQ."""

    order: Tensor  # (C,) columns by falling diagonal
    upper: Tensor  # (C, C) Cholesky factor of the inverse, in that order
    dead: Tensor  # (C,) whether no input ever reached the column


def factorize(hessian: Tensor, columns: Tensor, cfg) -> Cholesky:
    """The factor of a Hessian (C, C) whose columns and rows are scaled by `columns` after it was damped."""
    h, scale = hessian.to(torch.float64, copy=True), columns.double()
    dead = h.diagonal() == 0
    h.diagonal().add_(cfg.gptq_damping * h.diagonal().mean().clamp_min(1e-30))
    h *= scale * scale[:, None]
    order = h.diagonal().argsort(descending=True)
    h = h[order][:, order]
    try:
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    except torch.linalg.LinAlgError:
        raise Unusable("GPTQ met a Hessian that cannot be inverted; raise GPTQ_DAMPING, or QUANTIZER=rtn") from None
    return Cholesky(order, upper, dead)


GPTQ_BLOCK = 128  # columns rounded between two updates of the rest, which changes nothing but the time


def gptq(w: Tensor, steps: Tensor, top: Tensor, cholesky: Cholesky) -> Tensor:
    """Codes (R, C) that keep the outputs w x for inputs x of that second moment (arXiv:2210.17323)."""
    order, upper = cholesky.order, cholesky.upper
    left, steps = w.double().masked_fill(cholesky.dead, 0.0)[:, order].T.contiguous(), steps.double()  # (C, R)
    codes = torch.zeros_like(left)
    for begin in range(0, len(upper), GPTQ_BLOCK):
        end = min(begin + GPTQ_BLOCK, len(upper))
        errors = torch.zeros_like(left[begin:end])
        for j in range(begin, end):  # the error of each column is made up for by those that follow
            codes[j] = nearest(left[j] / steps, top)
            errors[j - begin] = (left[j] - codes[j] * steps) / upper[j, j]
            left[j:end].addr_(upper[j, j:end], errors[j - begin], alpha=-1)
        left[end:] -= upper[begin:end, end:].T @ errors
    return codes[order.argsort()].T


class Plan(NamedTuple):
    """How one weight is coded: codes * steps[:, None] * columns, nothing beyond the clip; by GPTQ with a Hessian."""

    weight: Tensor  # (R, C)
    steps: Tensor  # (R,)
    clip: Tensor  # (R,), of weight / columns
    columns: Tensor  # (C,), exact in fp16
    cholesky: Cholesky | None


def row_plan(w: Tensor, grid: Grid, cfg, hessian: Tensor | None = None) -> Plan:
    """Steps from each row's own weights."""
    steps, columns = row_steps(w, grid, cfg), torch.ones_like(w[0])
    cholesky = None if hessian is None else factorize(hessian, columns, cfg)
    return Plan(w, steps, grid.top * steps, columns, cholesky)


def loss_plan(w: Tensor, cost: Curvature, cfg) -> Plan:
    """Steps, up to one factor for all weights, by what an error costs in each row and, after GPTQ, in each column. For
    a given total of entropy the cost is least if step**2 * cost is the same everywhere (power 1, as WaterSIC,
    arXiv:2603.04956); where many codes are 0 that is too much of a good thing, hence STEP_POWER.
    """
    cholesky, half = factorize(cost.inputs, torch.ones_like(w[0]), cfg), cfg.step_power / 2
    column_cost = cholesky.upper.diagonal()[cholesky.order.argsort()] ** -2
    rows = cost.rows.double()
    rows = rows + cfg.gptq_damping * rows.mean().clamp_min(1e-30)
    typical = column_cost.log().mean().exp()
    columns = ((column_cost / typical) ** -half).half().float()
    steps, clip = (rows * typical) ** -half, (w / columns).abs().amax(1)
    return Plan(w, steps, clip, columns, factorize(cost.inputs, columns, cfg))


def coding_plans(weights: dict, grid_of: dict, cfg, costs: dict) -> dict:
    """How each weight that its Grid does not keep in fp16 is coded. With MEAN_STEP `costs` must name them all."""
    plans = {}
    for name, grid in grid_of.items():
        if grid.bits == 16:
            continue
        w = prune(weights[name].float(), cfg.prune_share if name.startswith("blocks.") else 0.0)
        if not cfg.mean_step:
            plans[name] = row_plan(w, grid, cfg, costs[name].inputs if name in costs else None)
        elif name in costs and costs[name].rows.sum() > 0:
            plans[name] = loss_plan(w, costs[name], cfg)
        else:
            raise Unusable(
                f"MEAN_STEP cannot weigh errors in {name}, which no gradient reached; raise GPTQ_RESERVE_SECONDS if "
                "there was no time for calibration, or use MEAN_STEP=0"
            )
    if not cfg.mean_step:
        return plans
    count = sum(p.weight.numel() for p in plans.values())
    mean_log = sum(p.steps.log().sum() * p.columns.numel() for p in plans.values()) / count
    scale = cfg.mean_step / mean_log.exp()  # which makes it the geometric mean of the steps of all weights
    return {name: p._replace(steps=p.steps * scale) for name, p in plans.items()}


def quantize_rows(p: Plan, factor: float = 1.0) -> tuple:
    """Codes int8 (R, C) and steps fp16 (R,), `factor` times the plan's, but so wide that 127 of them reach the clip."""
    steps = torch.maximum(p.steps * factor, p.clip / 127).half().clamp_min(2**-24)  # fp16's smallest
    w, step = p.weight / p.columns, steps.float()
    top = (p.clip / step).round().clamp(max=127)
    codes = nearest(w / step[:, None], top[:, None]) if p.cholesky is None else gptq(w, step, top, p.cholesky)
    return codes.to(torch.int8), steps


def dequantize_rows(codes: Tensor, steps: Tensor, columns: Tensor) -> Tensor:
    """fp32 weights (R, C) of codes int8 (R, C), steps fp16 (R,) and columns fp16 (C,)."""
    return codes.float() * steps.float()[:, None] * columns.float()


def grids(model: nn.Module, cfg) -> dict:
    """The grid of every parameter by name; gains and the small projections of hash and value tables stay fp16."""

    def grid(name, role):
        if role == "matrix" and name.startswith("blocks."):
            return Grid(cfg.matrix_bits, cfg.matrix_clip_sigmas)
        bits = cfg.embed_bits if name.startswith("tok_emb.") else cfg.table_bits or cfg.embed_bits
        return Grid(bits, cfg.embed_clip_sigmas) if role == "table" else Grid(16, 0.0)

    return {name: grid(name, role) for name, role in parameter_roles(model).items()}


@torch.no_grad()
def on_export_grid(model: GPT, cfg) -> AbstractContextManager[None]:
    """Inside, the blocks' matrices stand on their export grid; gradients pass straight through (arXiv:1308.3432)."""
    grid, rounded = Grid(cfg.matrix_bits, cfg.matrix_clip_sigmas), []
    matrices = [m.weight for m in model.blocks.modules() if type(m) is Linear]
    matrices.sort(key=lambda w: w.size(1))
    for _, alike in groupby(matrices, key=lambda w: w.size(1)):  # rows are rounded one by one, so many go together
        together = list(alike)
        plan = row_plan(torch.cat(together), grid, cfg)
        values = dequantize_rows(*quantize_rows(plan), plan.columns)
        rounded += values.split([len(w) for w in together])
    return swapped(matrices, rounded)  # the graph stays: this compiles nothing, and no compiler can fold it away


def prune(w: Tensor, fraction: float) -> Tensor:
    """`w` with the `fraction` of its entries that are smallest in magnitude set to 0."""
    count = int(fraction * w.numel())
    return w.masked_fill(w.abs() <= w.abs().flatten().kthvalue(count).values, 0.0) if count else w


def quantize(weights: dict, plans: dict, factor: float = 1.0) -> dict:
    """The tensors of an artifact: `name.codes`, `.steps` and `.columns` of what is coded, fp16 of the rest."""
    tensors = {name: w.half() for name, w in weights.items() if name not in plans}
    for name, p in plans.items():
        tensors[f"{name}.codes"], tensors[f"{name}.steps"] = quantize_rows(p, factor)
        tensors[f"{name}.columns"] = p.columns.half()
    return {name: t.cpu().contiguous() for name, t in tensors.items()}


def dequantize(tensors: dict) -> dict:
    """fp32 weights of an artifact's tensors. Raises InputError if codes, steps and columns do not match."""
    weights = {}
    for name, t in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "codes":
            steps, columns = tensors[f"{base}.steps"], tensors[f"{base}.columns"]
            if t.ndim != 2 or (steps.shape, columns.shape) != (t.shape[:1], t.shape[1:]):
                raise InputError(
                    f"{base} has codes {list(t.shape)}, steps {list(steps.shape)} and columns {list(columns.shape)}"
                )
            weights[base] = dequantize_rows(t, steps, columns)
        elif kind not in ("steps", "columns"):
            weights[name] = t.float()
    return weights


# ---- Entropy coding: codes -> words of 16 bits, near the entropy of each code's own scale. Decoding is integers alone.

LANES, PRECISION, CONTEXTS = 1024, 12, 48  # states side by side, bits of a probability, scales in quarters of an octave


def scale_classes(codes: Array) -> tuple:
    """A class per row and a class per column of codes (R, C), uint8; their sum stands for the scale of a code."""
    energy, columns = codes.astype(np.float64) ** 2 + 1e-3, np.ones(codes.shape[1])
    for _ in range(2):
        rows = (energy / columns).mean(1)
        columns = (energy / rows[:, None]).mean(0)
    rows, columns = (np.round(2 * np.log2(v)) for v in (rows, columns))  # quarters of an octave of the square root
    lowest = columns.min(initial=0)  # moved from the columns to the rows: no class is below 0, and the sum stays
    rows, columns = rows + lowest + 20, columns - lowest  # 20: the 1e-3 above makes -20 of a row of zeros
    return tuple(v.clip(0, CONTEXTS - 1).astype(np.uint8) for v in (rows, columns))


def context_of(rows: Array, columns: Array) -> Array:
    """The context of every code (R, C), flat: the sum of its two classes."""
    return np.minimum(rows[:, None] + columns, CONTEXTS - 1).astype(np.uint8).ravel()


def frequencies(symbols: Array, contexts: Array) -> Array:
    """How often each symbol comes in each context, uint16 (CONTEXTS, 256), of 2**PRECISION; not 0 if it does. Where no
    code looks all come alike.
    """
    counts = np.bincount(contexts * 256 + symbols, minlength=CONTEXTS * 256).reshape(CONTEXTS, 256)
    unused = counts.sum(1, keepdims=True) == 0
    counts += unused
    seen = counts > 0
    ends = counts.cumsum(1) * (2**PRECISION - seen.sum(1, keepdims=True)) // counts.sum(1, keepdims=True)
    return (np.diff(ends, axis=1, prepend=0) + seen).astype(np.uint16)


def rans_encode(symbols: Array, contexts: Array, table: Array) -> tuple:
    """States uint32 (LANES,) and words uint16 of `symbols` (N,) uint8, the last first (rANS, arXiv:1311.2540)."""
    table = table.astype(np.int64)
    starts = table.cumsum(1) - table
    state, words = np.full(LANES, 2**16), []
    for first in range((len(symbols) - 1) // LANES * LANES, -1, -LANES):
        s, k = symbols[first : first + LANES], contexts[first : first + LANES]
        x, f = state[: len(s)], table[k, s]
        full = x >= f << (32 - PRECISION)
        words.append(x[full].astype(np.uint16))
        x = np.where(full, x >> 16, x)
        state[: len(s)] = (x // f << PRECISION) + x % f + starts[k, s]
    return state.astype(np.uint32), np.concatenate(words[::-1])


def rans_decode(contexts: Array, table: Array, state: Array, words: Array) -> Array:
    """The symbols (N,) uint8. Raises ValueError if the stream does not end where and how it began."""
    kinds = [(a.dtype.name, a.shape) for a in (table, state)]
    if kinds != [("uint16", (CONTEXTS, 256)), ("uint32", (LANES,))] or words.dtype != np.uint16:
        raise ValueError("dtypes or shapes of its entropy coder")
    table = table.astype(np.int64)
    if (table.sum(1) != 2**PRECISION).any():
        raise ValueError("tables of its entropy coder")
    counts = table.ravel()
    symbol_at = np.tile(np.arange(256, dtype=np.uint8), CONTEXTS).repeat(counts)
    often = counts.repeat(counts).astype(np.uint32)
    offset = (np.arange(len(symbol_at)) - (counts.cumsum() - counts).repeat(counts)).astype(np.uint32)
    symbols, position, state = np.empty(len(contexts), np.uint8), 0, state.copy()
    for first in range(0, len(symbols), LANES):
        k = contexts[first : first + LANES]
        x = state[: len(k)]
        slot = (k.astype(np.uint32) << PRECISION) + (x & (2**PRECISION - 1))
        symbols[first : first + LANES] = symbol_at[slot]
        x = often[slot] * (x >> PRECISION) + offset[slot]
        low = np.flatnonzero(x < 2**16)
        x[low] = (x[low] << 16) | words[position : position + len(low)]
        state[: len(k)], position = x, position + len(low)
    if position != len(words) or (state != 2**16).any():
        raise ValueError("words of its entropy coder")
    return symbols


def code_stream(tensors: dict) -> dict:
    """`tensors` with all codes as one rANS stream; `name.codes.rows` and `.columns` have the classes of each weight."""
    names = [name for name in sorted(tensors) if name.endswith(".codes") and tensors[name].numel()]
    coded = {name: tensors[name].numpy() for name in names}
    streams = {name: t for name, t in tensors.items() if name not in coded}
    if not coded:
        return streams
    contexts = []
    for name, codes in coded.items():
        rows, columns = scale_classes(codes)
        contexts.append(context_of(rows, columns))
        streams |= {f"{name}.rows": torch.from_numpy(rows), f"{name}.columns": torch.from_numpy(columns)}
    contexts = np.concatenate(contexts)
    symbols = np.concatenate([codes.ravel() for codes in coded.values()]).view(np.uint8)
    table = frequencies(symbols, contexts.astype(np.int64))
    state, words = rans_encode(symbols, contexts, table)
    coder = {"rans.table": table.T, "rans.state": state, "rans.words": words}
    return streams | {name: torch.from_numpy(array) for name, array in coder.items()}


def decode_stream(tensors: dict) -> dict:
    """The inverse of `code_stream`. May raise anything on corrupt input; `unpack` converts it to InputError."""
    table, state, words = (tensors.pop(f"rans.{name}").numpy() for name in ("table", "state", "words"))
    names = [name.removesuffix(".rows") for name in sorted(tensors) if name.endswith(".codes.rows")]
    classes = [[tensors.pop(f"{name}.{kind}").numpy() for kind in ("rows", "columns")] for name in names]
    shapes = [(len(rows), len(columns)) for rows, columns in classes]
    sizes = [math.prod(shape) for shape in shapes]
    contexts = np.concatenate([context_of(rows, columns) for rows, columns in classes])
    symbols = rans_decode(contexts, table.T, state, words).view(np.int8)
    for name, shape, codes in zip(names, shapes, np.split(symbols, np.cumsum(sizes)[:-1])):
        tensors[name] = torch.from_numpy(codes.reshape(shape))
    return tensors


# ---- Artifact: tensors and settings <-> one checked file that cannot run code.
# magic, format (uint32), sha256 of the rest | compressor (8 bytes), compressed: length (uint32), JSON header, tensors

ARTIFACT_MAGIC, ARTIFACT_FORMAT, HEADER_MOST_BYTES, FREE_WEIGHTS = b"PGLF", 5, 2**20, 2**22
COMPRESSORS = dict(zstd="zstandard", rans="zstandard", brotli="brotli")  # and their packages


def compressor_module(name: str) -> Any:
    """The module behind a compressor. Raises InputError if it cannot be imported: nothing stands in for it."""
    try:
        return importlib.import_module(COMPRESSORS[name])
    except ImportError:
        raise InputError(
            f"COMPRESSOR={name} needs the package {COMPRESSORS[name]}; pip install -r requirements.txt"
        ) from None


def compress(body: bytes, name: str, level: int) -> bytes:
    """`body` by Brotli at its highest effort, or by zstd at this level, which packs rANS streams, too."""
    module = compressor_module(name)
    return module.compress(body) if name == "brotli" else module.ZstdCompressor(level=level).compress(body)


def decompress(data: bytes, name: str, most: int) -> bytes:
    """The first `most` bytes of what was compressed. May raise anything on corrupt input."""
    module = compressor_module(name)
    if name == "brotli":  # its own limit is a rough one
        return module.Decompressor().process(data, output_buffer_limit=most)[:most]
    source = io.BytesIO(data)
    reader = module.ZstdDecompressor().stream_reader(source, read_size=4096)
    pieces = iter(partial(reader.read, 2**20), b"")  # since it allocates what it is asked for
    body = b"".join(islice(pieces, -(-most // 2**20)))
    if len(body) < most and source.tell() < len(data):  # else a file could be padded to the size of a large model's
        raise ValueError("bytes behind the end of the compressed data")
    return body[:most]


def artifact_settings(cfg) -> dict:
    """The settings that travel with the weights: what the model is and how it is scored, no path and nothing else."""
    others = (
        "dtype",
        "matrix_bits",
        "train_seq_len",
        "train_batch_tokens",
        "micro_batch_tokens",
        "early_seq_lens",
        "early_seq_ends",
    )
    return as_env(cfg.group("model", "evaluation") | {k: vars(cfg)[k] for k in others})


def pack(tensors: dict, looped: bool, cfg) -> bytes:
    """The file that holds `tensors`, and the settings and the tokenizer's hash that an evaluator needs."""
    tensors = code_stream(tensors) if cfg.compressor == "rans" else tensors
    order = sorted(tensors, key=lambda name: (tensors[name].element_size(), name))
    arrays = {name: tensors[name].numpy() for name in order}
    header = json.dumps(
        {
            "settings": artifact_settings(cfg),
            "looped": looped,
            "tokenizer_sha256": hashlib.sha256(Path(cfg.tokenizer_path).read_bytes()).hexdigest(),
            "tensors": [[name, str(a.dtype), list(a.shape)] for name, a in arrays.items()],
        }
    ).encode()
    # bytes of equal weight stand together: first all low bytes of a tensor, then all high ones
    planes = []
    for a in arrays.values():
        raw = a.astype(a.dtype.newbyteorder("<")).tobytes()
        planes.append(np.frombuffer(raw, np.uint8).reshape(-1, a.itemsize).T.tobytes())
    body = b"".join([len(header).to_bytes(4, "little"), header, *planes])
    packed = cfg.compressor.encode().ljust(8) + compress(body, cfg.compressor, cfg.zstd_level)
    return b"".join([ARTIFACT_MAGIC, ARTIFACT_FORMAT.to_bytes(4, "little"), hashlib.sha256(packed).digest(), packed])


def stored_settings(header: Mapping) -> tuple:
    """(the settings in a header, as the environment would give them, the names of those that it lacks and that get
    their defaults). Raises InputError on a name that is no setting of an artifact.
    """
    given, defaults = header["settings"], artifact_settings(Config())
    if not all(type(text) is str and len(text) < 1000 for text in given.values()):
        raise InputError("its settings are not short strings")
    moved = {"EVAL_BATCH_SEQS", "VAL_MAX_TOKENS"}  # older files have them; the environment alone sets them now
    if unknown := given.keys() - defaults.keys() - moved:
        raise InputError(f"it has the unknown settings {', '.join(sorted(unknown)[:9])}; it needs a newer train_gpt.py")
    known = {name: text for name, text in given.items() if name not in moved}
    return defaults | known, sorted(defaults.keys() - known.keys())


# What a matrix is stored as: codes, or their classes beside an entropy-coded stream, with the axes of their shape
STORED = (
    (".codes", "int8", 0, 2),
    (".steps", "float16", 0, 1),
    (".columns", "float16", 1, 2),
    (".codes.rows", "uint8", 0, 1),
    (".codes.columns", "uint8", 1, 2),
)


def tensor_layouts(header: Mapping, file_bytes: int) -> dict:
    """(dtypes, shape) of every tensor that a file with this header may hold, by name: each parameter of its model in
    floating point, or as codes, plain or entropy-coded. Raises InputError if the file is too small for that model.
    """
    with torch.device("meta"):
        params = dict(GPT(Config.from_env(stored_settings(header)[0])).named_parameters())
    if (count := sum(p.numel() for p in params.values())) > FREE_WEIGHTS + 6 * file_bytes:
        raise InputError(f"its settings make {count} weights, more than 6 for each of its {file_bytes} bytes")
    layouts = {"rans.table": ("uint16", (256, CONTEXTS)), "rans.state": ("uint32", (LANES,))}
    layouts["rans.words"] = "uint16", (count,)  # or fewer
    for name, p in params.items():
        shape = tuple(p.shape)
        layouts[name] = "float16 float32", shape
        for suffix, dtype, first, end in STORED if p.ndim == 2 else ():
            layouts[name + suffix] = dtype, shape[first:end]
    return layouts


def check_layout(table: list, layouts: Mapping) -> list:
    """(name, dtype, shape) of the tensors that a header lists, each of which must be one of `layouts` and come once.
    There may be fewer words of the entropy coder. Raises InputError.
    """
    checked: dict[str, tuple] = {}
    for name, dtype, shape in table:
        kinds, wanted = layouts.get(name, ("", ()))
        if name == "rans.words" and len(shape) == 1:
            wanted = (min(shape[0], wanted[0]),)
        fits = shape == list(wanted) and all(type(n) is int and n >= 0 for n in shape)
        if dtype not in kinds.split() or name in checked or not fits:
            raise InputError(f"its tensor {name!r:.99} of {dtype!r:.20} {shape!r:.99} is not one of its model's")
        checked[name] = name, dtype, wanted
    return list(checked.values())


def read_tensors(table: list, body: bytes) -> dict:
    """The tensors of a checked table, from the bytes behind the header. May raise anything on corrupt input."""
    tensors, start = {}, 0
    for name, dtype, shape in table:
        kind = np.dtype(dtype).newbyteorder("<")
        planes = np.frombuffer(body, np.uint8, math.prod(shape) * kind.itemsize, start).reshape(kind.itemsize, -1)
        array = np.frombuffer(planes.T.tobytes(), kind).reshape(shape)
        tensors[name] = torch.from_numpy(array.astype(dtype))
        start += array.nbytes
    if start != len(body):
        raise ValueError("length")
    return decode_stream(tensors) if "rans.words" in tensors else tensors


def unpack(blob: bytes, layouts_of: Callable = tensor_layouts) -> tuple:
    """(header, tensors) of a packed file. Raises InputError when it is foreign, newer, cut or damaged, or when a tensor
    is not as layouts_of(header, bytes of the file) says; nothing is read before that is known, and no more than that.
    """
    version = int.from_bytes(blob[4:8], "little")
    if blob[:4] != ARTIFACT_MAGIC:
        raise InputError("it is not an artifact of train_gpt.py")
    if version != ARTIFACT_FORMAT:
        raise InputError(f"it has format {version}, not {ARTIFACT_FORMAT}; use the train_gpt.py that wrote it")
    if hashlib.sha256(blob[40:]).digest() != blob[8:40]:
        raise InputError("it is cut or damaged: its checksum does not match")
    try:
        compressor = blob[40:48].decode("ascii").rstrip()
        head = decompress(blob[48:], compressor, 4 + HEADER_MOST_BYTES)
        start = 4 + int.from_bytes(head[:4], "little")
        if start > len(head):
            raise InputError(f"its header is cut, or above {HEADER_MOST_BYTES} bytes")
        header = json.loads(head[4:start])
        table = check_layout(header["tensors"], layouts_of(header, len(blob)))
        size = sum(math.prod(shape) * np.dtype(dtype).itemsize for _, dtype, shape in table)
        body = decompress(blob[48:], compressor, start + size + 1)
        return header, read_tensors(table, body[start:])
    except InputError:
        raise
    except Exception as error:  # its checksum is right, so it was forged, and may fail anywhere
        raise InputError(f"its contents do not fit its header ({' '.join(str(error).split())})") from None


@contextmanager
def unfinished(path: Path) -> Iterator:
    """A path beside this one, of this process alone, to write to and to put in its place; removed at the end."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def write_file(path: Path, blob: bytes):
    """Write all of `blob` or nothing: an interrupted write leaves the old file."""
    try:
        with unfinished(path) as part:
            part.write_bytes(blob)
            part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def publish(path: Path, kind: str, blob: bytes, cfg):
    """Write a file of this run, and a copy as OUTPUT_DIR/final_model.KIND.ptz: the newest of all runs there."""
    write_file(path, blob)
    if path.parent == Path(cfg.output_dir) and path.name == f"{cfg.run_id}.{kind}.ptz":
        write_file(path.with_name(f"final_model.{kind}.ptz"), blob)


def save_average(average: Average, looped: bool, cfg, log):
    """Write the averaged weights, fp32, beside the artifact; EVAL_ONLY=1 and a higher MAX_ARTIFACT_BYTES score them."""
    if not (log.active and average.count):
        return
    values = {name: v.cpu() for name, v in average.values.items()}
    if not all(v.isfinite().all() for v in values.values()):
        return log.warn("the averaged weights are NaN or infinite, and were not saved")
    publish(cfg.average_path, "average", pack(values, looped, replace(cfg, compressor="zstd", zstd_level=3)), cfg)
    log(f"checkpoint:{cfg.average_path} averaging:{cfg.averaging} updates:{average.count}")


def fit(pack_at, room: int, coded: int, log) -> tuple:
    """What pack_at(factor) -> (bytes, ...) makes of a factor that leaves at most 0.5 % of `room` bytes unused, by a
    secant in octaves of [1/4, 8]; at first one is taken to save a bit of each of the `coded` weights. If none fits, the
    result of the first is returned.
    """
    low, high, at, best = -2.0, 3.0, 0.0, None
    rate, before, tried = coded / 8, None, set()  # bytes that an octave saves; (octaves, bytes) of the latest trial
    for left in range(11, -1, -1):
        result = pack_at(2.0**at)
        size = result[0]
        log(f"fit:factor {2.0**at:.4f} bytes:{size} of {room}")
        fits = size <= room
        if fits or best is None:
            best = result
        if 0 <= room - size <= room // 200 or at == (-2.0 if fits else 3.0):
            break
        low, high = (low, at) if fits else (at, high)
        if before:
            rate = min(max((before[1] - size) / (at - before[0]), coded / 80), coded / 2)
        before = at, size
        tried.add(at)
        at = min(max(at + (size - room + room // 400) / rate, low), high)
        if at in tried:
            at = (low + high) / 2
        if left == 1 and high not in tried:
            at = high  # nothing below it has fitted
    return best


def save_artifact(plans: dict, weights: dict, looped: bool, cfg, ranks, log) -> str:
    """Code and pack the weights, by FIT as large as the cap allows, and write them; refuses a file that is over it.
    Returns its sha256 on the main rank.
    """
    begin, code = perf_counter(), Path(__file__).stat().st_size

    def pack_at(factor):
        tensors = quantize(weights, plans, factor)
        blob = pack(tensors, looped, cfg) if ranks.is_main else b""
        (size,) = ranks.maximum(len(blob))
        return int(size), blob, tensors

    room = cfg.max_artifact_bytes - code
    coded = sum(p.weight.numel() for p in plans.values())
    size, blob, tensors = fit(pack_at, room, coded, log) if cfg.fit else pack_at(1.0)
    payload = sum(t.nbytes for t in tensors.values())
    count = sum(w.numel() for w in weights.values())
    kind, total = f"int{cfg.matrix_bits}+{cfg.compressor}", size + code
    if (excess := total - cfg.max_artifact_bytes) > 0:
        raise Unusable(
            f"code + model = {total} bytes, {excess} over MAX_ARTIFACT_BYTES={cfg.max_artifact_bytes}, so "
            f"{cfg.artifact_path} was not written; at {8 * size / count:.2f} bits per weight it fits with "
            f"{excess * count // size} weights less" + (", or set FIT=1" if not cfg.fit else "")
        )
    if ranks.is_main:
        publish(cfg.artifact_path, "int6", blob, cfg)
    seconds = perf_counter() - begin
    log(f"quantize_and_pack:{seconds:.1f}s, off the training clock", pack_seconds=seconds)
    log(
        f"Serialized model {kind}: {size} bytes (payload:{payload} payload_ratio:{4 * count / payload:.2f}x)",
        kind=kind,
        model_bytes=size,
        payload_bytes=payload,
    )
    log(f"Code size: {code} bytes", code_bytes=code)
    log(f"Total submission size {kind}: {total} bytes")
    return hashlib.sha256(blob).hexdigest()


class Artifact(NamedTuple):
    """All that an evaluation knows of a training."""

    cfg: Config
    weights: dict  # fp32
    looped: bool
    sha256: str
    size: int  # bytes
    warnings: list


def read_artifact(path: Path, env: Mapping) -> bytes:
    """The bytes of an artifact, of which nothing is read if it is larger than the cap."""
    cap = parse(int, "MAX_ARTIFACT_BYTES", env.get("MAX_ARTIFACT_BYTES", str(Config.max_artifact_bytes)))
    try:
        if not path.is_file():
            raise InputError(f"there is no artifact {path}; set ARTIFACT, or OUTPUT_DIR of the run that wrote it")
        if (total := path.stat().st_size + Path(__file__).stat().st_size) > cap:
            raise InputError(f"artifact {path}: code + model = {total} bytes, over MAX_ARTIFACT_BYTES={cap}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"artifact {path} cannot be read: {error.strerror}") from None


def check_fit(built: Config, cfg, header: Mapping):
    """Raises InputError if the settings of an evaluation or its tokenizer are not those of the artifact."""
    acting = built.group("run", "evaluation")
    for name, value in vars(cfg).items():
        if name not in acting and value != vars(built)[name]:
            raise InputError(f"{name.upper()} is fixed by it, or has no part in its scoring; unset it")
    tokenizer = Path(cfg.tokenizer_path)
    if not tokenizer.is_file():
        raise InputError(f"its tokenizer is not at TOKENIZER_PATH={tokenizer}")
    if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != header["tokenizer_sha256"]:
        raise InputError(f"TOKENIZER_PATH={tokenizer} is not the tokenizer it was trained with")


def load_artifact(path: Path, env: Mapping, blob: bytes | None = None) -> Artifact:
    """What the file at `path` holds, whose bytes may be given. `env` may change how it is scored, not what it is."""
    blob = read_artifact(path, env) if blob is None else blob
    try:
        header, tensors = unpack(blob)
        settings, lacking = stored_settings(header)
        built, cfg = Config.from_env(settings), Config.from_env({**settings, **env})
        check_fit(built, cfg, header)
        warnings = [f"the artifact lacks {', '.join(lacking)}, so the defaults stand"] if lacking else []
        if built.dtype not in ("auto", cfg.dtype):
            warnings.append(f"DTYPE={cfg.dtype}, but the artifact's run had DTYPE={built.dtype}")
        weights, digest = dequantize(tensors), hashlib.sha256(blob).hexdigest()
        if bad := [name for name, w in weights.items() if not w.isfinite().all()]:
            raise InputError(f"its weights {bad[0]} are NaN or infinite")
        if type(header["looped"]) is not bool:
            raise InputError("its header does not say whether the model is looped")
        return Artifact(cfg, weights, header["looped"], digest, len(blob), warnings)
    except OSError as error:
        raise InputError(f"artifact {path} cannot be read: {error.strerror}") from None
    except (InputError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"artifact {path}: {error}") from None


def load_model(cfg, weights: dict, ranks) -> GPT:
    """A model with these weights, on the device; built without memory, so that no header can make it allocate."""
    try:
        with torch.device("meta"):
            model = GPT(cfg, choose_attention(cfg, ranks).attend, compute_dtype(cfg, ranks.device))
        model.load_state_dict(dict(weights), assign=True)
    except RuntimeError as error:
        raise InputError(f"the artifact's tensors do not fit its settings: {' '.join(str(error).split())}") from None
    return model.to(ranks.device).requires_grad_()


# ---- Training: batches -> averaged weights and what GPTQ must know of the data, inside the wallclock budget.


class Trainer:
    """What an optimizer step reads and writes. Warm-up, training and tests call the same `step`."""

    def __init__(self, model: GPT, batches: Batches, cfg, ranks):
        self.model, self.batches, self.cfg, self.ranks = model, batches, cfg, ranks
        self.optimizers, self.average = Optimizers(model, ranks, cfg), Average(model)
        self.compiled, self.qat, self.looped = compiled(model, cfg, ranks), False, False
        self.stop = False

    def note_signal(self, *_):
        """End training before the next step, on all ranks at once; a second signal ends it here."""
        self.stop = True
        on_signals(signal.default_int_handler)
        if self.ranks.is_main:
            complain("train_gpt.py: stopping after this step; press Ctrl-C again to stop now\n")

    def forward(self, ids, targets):
        """Losses (B, T) by the graph that is in use: before or after the loops are switched on."""
        return self.compiled(ids, targets, self.looped)

    def step(self, scale, momentum) -> Reading:
        """One optimizer step at `scale` times the peak rates; reads the loss of the global batch, before the step."""
        ids, targets = next(self.batches)
        loss = torch.zeros((), device=self.ranks.device)
        with on_export_grid(self.model, self.cfg) if self.qat else nullcontext():
            for x, y in zip(ids, targets):
                micro_loss = self.forward(x, y).mean() / len(ids)
                micro_loss.backward()
                loss += micro_loss.detach()
        norm_before = self.optimizers.step(scale, momentum)
        self.model.zero_grad(set_to_none=True)
        loss = self.ranks.sum_(loss) / self.ranks.world
        return Reading(loss.where(norm_before.isfinite(), norm_before))  # a broken gradient shows in its place

    @contextmanager
    def observers(self) -> Iterator:
        """Inside, an Observer by name rides on each module whose weight will be coded."""
        modules = {f"{n}.weight": m for n, m in self.model.named_modules() if isinstance(m, Linear)}
        grid_of = grids(self.model, self.cfg)
        seen = {name: Observer(modules[name]) for name, grid in grid_of.items() if grid.bits < 16}
        try:
            yield seen
        finally:
            for observer in seen.values():
                observer.leave()

    def observe(self):
        """Run this rank's part of a new batch, in pieces, for the observers; backward only if MEAN_STEP needs it."""
        rows = max(1, 16_384 // self.cfg.train_seq_len)
        ids, targets = (t.flatten(0, 1).split(rows) for t in next(self.batches))
        with torch.set_grad_enabled(self.cfg.mean_step > 0):
            for x, y in zip(ids, targets):
                loss = self.model(x, y, self.looped).sum()
                if loss.requires_grad:
                    loss.backward()
        self.model.zero_grad(set_to_none=True)

    def switch(self, step: int, done: float, scale: float, log):
        """Turn late QAT on, and begin the next stage, when their time has come."""
        if not self.qat and scale < self.cfg.late_qat_threshold:
            self.qat = True
            log(f"late_qat:enabled step:{step} scale:{scale:.4f}")
        seq_len, looped = stage(done, self.cfg)
        if looped and not self.looped:
            self.looped = True
            log(f"layer_loop:enabled step:{step} frac:{done:.3f} order:{self.model.looped_order}")
        if seq_len != self.batches.seq_len:
            self.batches.seek(step, seq_len)
            log(f"train_seq_len:{seq_len} step:{step} frac:{done:.3f} grad_accum_steps:{self.batches.micro_steps}")

    def warm_up(self, log) -> float:
        """Run the steps that training will run, then undo them. Returns the seconds of the last, 0 if unknown."""
        cfg, parts, seconds = self.cfg, (self.model, self.optimizers.muon, self.optimizers.adam), 0.0
        states, position = copy.deepcopy([part.state_dict() for part in parts]), self.batches.step
        qat = (True, False) if cfg.late_qat_threshold else (False,)
        for (seq_len, self.looped), self.qat in product(reversed(stages(cfg)), qat):
            self.batches.seek(position, seq_len)
            for i in range(cfg.warmup_steps):
                begin = perf_counter()
                self.step(1.0, cfg.muon_momentum).value()
                seconds = perf_counter() - begin if i else 0.0  # the first one compiles
                log(
                    f"warmup_step:{i + 1}/{cfg.warmup_steps} late_qat:{int(self.qat)} looped:{int(self.looped)} "
                    f"train_seq_len:{seq_len} compiled:{int(self.ranks.compiles(cfg))}"
                )
        self.qat = self.looped = False
        for part, state in zip(parts, states):
            part.load_state_dict(state)
        self.batches.seek(position, stage(0.0, cfg).seq_len)
        return seconds


def due(steps, every) -> bool:
    """Whether it is time, after so many steps, for what happens every so many, or never if that is 0."""
    return steps > 0 and every > 0 and steps % every == 0


def timing(step, seconds) -> str:
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / step:.2f}ms"


def report_step(step: int, seconds: float, reading: Reading, cfg, log):
    """Log the first steps and every TRAIN_LOG_EVERY-th; raise Unusable when the loss is no number."""
    loss = reading.value()
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step}; lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR")
    if step <= 10 or step % cfg.train_log_every == 0:
        log(f"step:{step}/{cfg.iterations} train_loss:{loss:.4f} {timing(step, seconds)}")


def save_checkpoint(trainer: Trainer, step: int, reading: Reading, log):
    """Every CHECKPOINT_EVERY steps save the average, unless the latest loss is NaN or infinite."""
    if due(step, trainer.cfg.checkpoint_every) and math.isfinite(reading.value()):
        save_average(trainer.average, trainer.looped, trainer.cfg, log)


def report_end(steps: int, seconds: float, cfg, log):
    over = max(0.0, seconds - (cfg.max_wallclock_seconds or math.inf))
    log(
        f"training ended: step:{steps}/{cfg.iterations} {timing(steps, seconds)}",
        iterations=cfg.iterations,
        steps=steps,
        train_seconds=seconds,
        train_over_limit_seconds=over,
    )
    if over:
        log.warn(f"training took {over:.3f} s more than MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g}")


def calibrate(trainer: Trainer, clock: Clock, log) -> dict:
    """What errors in the averaged weights cost, seen on the clock: in as many batches as end before the time limit, so
    perhaps in none.
    """
    ranks, count = trainer.ranks, trainer.cfg.gptq_calibration_batches
    limit = trainer.cfg.max_wallclock_seconds or math.inf
    used, (slowest,) = 0, ranks.maximum(clock.step_seconds)  # until a batch is timed: a step does more
    (elapsed,) = ranks.maximum(clock.seconds())  # of all ranks, or they would leave the loop one by one
    with trainer.average.applied(), trainer.observers() as seen:
        while used < count and elapsed + 2 * slowest < limit:  # time for one more and the sums over ranks
            before = elapsed
            trainer.observe()
            clock.synchronize()
            (elapsed,) = ranks.maximum(clock.seconds())
            # the first one loads kernels, so it counts only until there is another
            slowest = max(slowest, elapsed - before) if used > 1 else elapsed - before
            used += 1
    log(f"gptq:collected {sum(o.count > 0 for o in seen.values())} Hessians from {used} of {count} batches")
    if not used:
        log.warn("no time was left for calibration, so GPTQ rounds to nearest; raise GPTQ_RESERVE_SECONDS")
        return {}
    return {name: curvature(observer, ranks) for name, observer in seen.items()}


def train(trainer: Trainer, validate, log) -> dict:
    """Train until ITERATIONS or just before the clock's limit; the average is in `trainer.average`. Returns what GPTQ
    must know of the data, met on further batches, on the clock. A step is reported while the next one runs.
    """
    cfg, ranks, average = trainer.cfg, trainer.ranks, trainer.average
    (first_step,) = ranks.maximum(trainer.warm_up(log))
    on_signals(trainer.note_signal)
    pending = None  # the latest step: how many there were, when it was given to the device, its loss
    clock = Clock(ranks.device, first_step)
    bar = progress_bar("training", 1.0, log)
    for step in range(cfg.iterations):
        elapsed, step_seconds, stop = ranks.maximum(clock.seconds(), clock.step_seconds, trainer.stop)
        if stop:
            raise Stopped
        bar.update(fraction_done(step, elapsed, cfg) - bar.n)
        if step and out_of_time(elapsed, step_seconds, cfg):
            log(f"stopping_early: wallclock_cap {timing(step, elapsed)} step:{step}/{cfg.iterations}")
            break
        if step == (0 if first_step else 10):  # when the time of a step is known
            log.warn(*schedule_warnings(step_seconds, cfg))
        if due(step, cfg.val_loss_every):
            trainer.batches.settle()
            with clock.paused():
                log(f"step:{step}/{cfg.iterations} {validate()} {timing(step, elapsed)}")
        scale = lr_scale(step, elapsed, step_seconds, cfg)
        trainer.switch(step, fraction_done(step, elapsed, cfg), scale, log)
        reading = trainer.step(scale, muon_momentum(step, elapsed, scale, cfg))
        if pending:
            report_step(*pending, cfg, log)
        clock.lap()
        pending = step + 1, clock.seconds(), reading
        save_checkpoint(trainer, step, reading, log)  # before the weights that no loss has tested yet enter the average
        average.update(average_weight(step + 1, scale, average.count, cfg))
    report_step(*pending, cfg, log)
    save_checkpoint(trainer, pending[0], reading, log)
    bar.close()
    if not average.count:
        average.update(1.0)
        log(f"averaging: {cfg.averaging} took no snapshot, so the last weights stand in")
    log(f"averaging:{cfg.averaging} updates:{average.count}{ranks.memory()}")
    costs = calibrate(trainer, clock, log) if cfg.calibrated else {}
    trainer.batches.settle()
    clock.synchronize()
    seconds, stop = ranks.maximum(clock.seconds(), trainer.stop)
    report_end(pending[0], seconds, cfg, log)
    if stop:
        raise Stopped
    return costs


# ---- Evaluation: stream and model -> chunks whose scores are final -> bits per byte. Only the Scorer holds the stream.


class ScoredChunk(NamedTuple):
    """What was scored, after its score was committed: all that an adapter ever sees."""

    index: int
    progress: float  # 0 for the first chunk of the stream, 1 for the last of TTT_COSINE_TOKENS
    last: bool  # nothing is left to score after it, so nothing is learnt from it
    nll: Tensor  # float64, nats, of each target; final
    inputs: Tensor  # (R, T) rows to learn from
    targets: Tensor  # (R, S), of the last S positions
    weight: Tensor  # (R,) of each row's loss
    losses: Tensor | None = None  # (R, S), as scored, with their graph: to learn from them that once


class Score(NamedTuple):
    """The result of one pass over the stream."""

    loss: float  # nats per token
    bpb: float  # bits per byte
    seconds: float

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.4f} val_bpb:{self.bpb:.4f} eval_time:{1000 * self.seconds:.0f}ms"


def read_validation(cfg) -> Array:
    """The tokens of the validation split, one shard after the other (N,)."""
    return np.concatenate([read_shard(path) for path in find_shards(cfg, "val")])


def document_spans(stream: Array) -> list:
    """(first target, end) of each document of a stream of tokens (N,): its last target is the BOS of the next."""
    firsts = [0, *(np.flatnonzero(stream[1:-1] == BOS) + 1).tolist()]
    return list(zip(firsts, [*firsts[1:], len(stream) - 1]))


class Scorer:
    """Scores a stream of tokens, or each of its documents, from left to right; a chunk is final before it leaves."""

    def __init__(self, stream: Array, cfg, ranks, log):
        if len(stream) < 2:
            raise InputError(f"the validation stream has {len(stream)} token; scoring needs 2")
        self.split_targets = len(stream) - 1
        if cfg.val_max_tokens:
            stream = stream[: cfg.val_max_tokens + 1]
        check_tokens(stream, cfg.vocab_size, "the validation stream")
        self.tokens = torch.from_numpy(stream.astype(np.int64)).to(ranks.device)
        self.bytes = target_bytes(stream, cfg, ranks.device)
        self.documents = document_spans(stream)
        self.sha256 = hashlib.sha256(stream.astype("<u2").tobytes()).hexdigest()
        self.bytes_sha256 = hashlib.sha256(self.bytes.cpu().numpy().astype("<i4").tobytes()).hexdigest()
        self.cfg, self.ranks, self.log = cfg, ranks, log

    @torch.no_grad()
    def losses(self, forward, firsts: range, rows: int) -> Tensor:
        """Losses (rows, step) of windows that end in the `step` targets from each of `firsts` on; the last repeats."""
        device, end = self.tokens.device, len(self.tokens) - 1
        starts = (firsts[0] + firsts.step * torch.arange(rows, device=device)).clamp(max=firsts[-1])
        span = torch.arange(firsts.step - self.cfg.window, firsts.step + 1, device=device)
        # where the stream ends earlier, its last token repeats: causality keeps that out of every score that counts
        tokens = self.tokens[(starts[:, None] + span).clamp(max=end)]
        return forward(tokens[:, :-1], tokens[:, -firsts.step :])

    def chunks(self, forward, stride: int, chunk_tokens: int) -> Iterator:
        """Score the stream chunk by chunk: each one, and the places of its targets. A window scores `stride` targets,
        but the first one all. The sum over ranks commits the chunk's nll: no rank trains on what another has to score.
        """
        total, window, device = len(self.bytes), self.cfg.window, self.tokens.device
        count = -(-(self.cfg.ttt_cosine_tokens or total) // chunk_tokens)
        one_graph = self.ranks.compiles(self.cfg)
        size = min(self.cfg.eval_batch_seqs, -(-chunk_tokens // stride // self.ranks.world))
        for index, low in enumerate(range(0, total, chunk_tokens)):
            high = min(low + chunk_tokens, total)
            nll = torch.zeros(high - low, dtype=torch.float64, device=device)
            if index == 0:  # every rank runs the first window, to have its graph
                first = self.losses(forward, range(0, 1, window), size if one_graph else 1)[0, : high - low]
                nll[: len(first)] = first * self.ranks.is_main
            mine = self.ranks.part(range(low or window, high, stride))  # first targets; the first window is done
            for i in range(0, len(mine), size):
                batch = mine[i : i + size]
                losses = self.losses(forward, batch, size if one_graph else len(batch)).flatten()
                begin, end = batch[0] - low, min(batch[-1] + stride, high) - low
                nll[begin:end] = losses[: end - begin]
            end = high - (high - low) % window
            inputs, targets = self.tokens[low:end], self.tokens[low + 1 : end + 1]
            yield (
                ScoredChunk(
                    index,
                    min(index / max(count - 1, 1), 1.0),
                    high == total,
                    self.ranks.sum_(nll),
                    inputs.view(-1, window),
                    targets.view(-1, window),
                    torch.ones(len(inputs) // window, device=device),
                ),
                torch.arange(low, high, device=device),
            )

    def evaluate(self, parts: Iterable, apart: bool = False) -> Score:
        """One pass over all targets. Each part is an iterable of (ScoredChunk, places) and the adapter, if any, that
        gets the chunks, one after the other, after their score is final. `apart`: each rank has parts of its own.
        """
        begin, bar = perf_counter(), progress_bar("scoring", len(self.bytes), self.log)
        # one place more, for what batches of documents compute beyond the end of one
        scored = torch.zeros(2, len(self.bytes) + 1, dtype=torch.float64, device=self.tokens.device)
        nll, index = scored
        for chunks, adapt in parts:
            for chunk, places in chunks:
                # the score is final; the next chunk is scored when the loop asks for it, so after what is learnt here
                nll[places] = chunk.nll
                index[places] = torch.full_like(chunk.nll, chunk.index)
                if not bar.disable:  # else no host waits for the device
                    done = nll[:-1] > 0
                    bpb = float(nll[:-1].sum() / self.bytes[done].sum() / math.log(2))
                    bar.set_postfix_str(f"{bpb:.4f} bpb", refresh=False)
                    bar.update(int(done.sum()) - bar.n)
                if adapt and not chunk.last:
                    adapt(chunk)
        bar.close()
        if apart:
            self.ranks.sum_(scored)
        self.audited = dict(nll=nll[:-1], bytes=self.bytes, chunk=index[:-1].long())
        if self.cfg.audit and self.ranks.is_main:
            columns = {name: column.cpu().numpy() for name, column in self.audited.items()}
            with self.log.surviving(Path(self.cfg.audit)), unfinished(Path(self.cfg.audit)) as part:
                with part.open("wb") as file:
                    np.savez(file, **columns)
                part.replace(self.cfg.audit)
        loss, size = float(nll[:-1].mean()), int(self.bytes.sum())
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} in the scoring of the model: its weights or TTT_LR are no use")
        return Score(loss, loss * len(self.bytes) / math.log(2) / max(size, 1), perf_counter() - begin)

    def plain(self, forward: Callable) -> Score:
        """Windows side by side: the quick score of training logs and of the int6 round trip."""
        return self.evaluate([(self.chunks(forward, self.cfg.window, self.cfg.window * 1024), None)])

    def sliding(self, forward, adapt: Callable | None = None) -> Score:
        """Windows EVAL_STRIDE apart, so that almost every target sees a full context; the score that counts."""
        chunk_tokens = self.cfg.window * 1024 if self.cfg.by_document else self.cfg.ttt_chunk_tokens
        return self.evaluate([(self.chunks(forward, self.cfg.eval_stride, chunk_tokens), adapt)])

    def chunk_bounds(self, targets: int) -> list:
        """Where the chunks of a document of so many targets, or of more, begin, and where the last of them ends."""
        bounds, size = [0], self.cfg.ttt_chunk_tokens
        while bounds[-1] < targets:
            bounds.append(bounds[-1] + min(size, bounds[-1] or self.cfg.ttt_first_chunk_tokens or size))
        return bounds

    def document_batches(self) -> list:
        """This rank's batches of documents, in each of which the shortest lasts 4/5 of the longest or more.

        Long ones are dealt out first, to the rank that has least to do; a pass is taken to cost as much as 8 documents.
        """

        def chunks(document):
            return len(self.chunk_bounds(document[1] - document[0])) - 1

        batches: list[list] = []
        for document in sorted(self.documents, key=chunks, reverse=True):
            full = not batches or len(batches[-1]) == self.cfg.ttt_batch_seqs
            if full or 5 * chunks(document) < 4 * chunks(batches[-1][0]):
                batches.append([])
            batches[-1].append(document)
        mine, work = [], [0] * self.ranks.world
        for batch in batches:
            rank = work.index(min(work))
            work[rank] += chunks(batch[0]) * (8 + len(batch))
            if rank == self.ranks.rank:
                mine.append(batch)
        return mine

    def by_document(self, forward, adapter, keep=False) -> Score:
        """Score each document alone, side by side (PR #77), each with one of the n adapters that adapter(n) makes; they
        learn from the very losses that were scored, if those are to be kept.
        """
        batches = self.document_batches()
        spans = torch.tensor([span for batch in batches for span in batch], device=self.tokens.device)
        split = spans.view(-1, 2).split([len(batch) for batch in batches])
        parts = (
            (self.document_chunks(forward, span, max(end - first for first, end in batch), keep), adapter(len(batch)))
            for batch, span in zip(batches, split)
        )
        return self.evaluate(parts, apart=True)

    def document_chunks(self, forward, spans: Tensor, longest: int, keep=False) -> Iterator:
        """Chunk by chunk: the n-th one of all documents of these spans (B, 2), of which the longest is given, and the
        places (B, n) of its targets in the stream, or the one behind its end where a document has none left.
        """
        device, bounds = self.tokens.device, self.chunk_bounds(longest)
        first, end = spans.split(1, dim=1)
        for index, (low, high) in enumerate(zip(bounds, bounds[1:])):
            offsets = torch.arange(high - min(high, self.cfg.window), high + 1, device=device)
            tokens = self.tokens[(first + offsets).clamp(max=end)]  # one that has ended repeats its last, and weighs 0
            inputs, targets = tokens[:, :-1], tokens[:, low - high :]
            with torch.set_grad_enabled(keep and high < longest):
                losses = forward(inputs, targets)
            places = first + torch.arange(low, high, device=device)
            ended = places >= end
            # a document that ends here teaches nothing; times B, since `Adaptation` takes the mean over all B at once
            weight = (first + high < end).flatten() * float(len(spans))
            yield (
                ScoredChunk(
                    index,
                    0.0,
                    high >= longest,
                    losses.detach().double().masked_fill(ended, 0.0),
                    inputs,
                    targets,
                    weight,
                    losses if keep else None,
                ),
                places.masked_fill(ended, len(self.bytes)),
            )


# ---- Test-time training: scored chunks -> better weights for the next ones.


class LoRA(nn.Module):
    """A term of low rank that a Linear adds, zero at first (arXiv:2106.09685): one for all rows, or one for each."""

    def __init__(self, down: Tensor, fan_out: int, rows: int, scale: float):
        super().__init__()
        self.down = nn.Parameter(down.repeat(rows, 1, 1))
        self.up = nn.Parameter(down.new_zeros(rows, fan_out, len(down)))
        self.scale = scale

    def forward(self, x, y):
        return torch.add(y, x @ self.down.mT.type_as(x) @ self.up.mT.type_as(x), alpha=self.scale)


def lora_targets(model: GPT, cfg) -> list:
    """The Linears, of those in blocks and the head, that TTT_PARAMS chooses. Raises InputError if there is none."""
    chosen = {id(p) for p in adapting_parameters(model, cfg)}
    linears = [m for m in model.blocks.modules() if isinstance(m, Linear)] + [model.tok_emb]
    if targets := [linear for linear in linears if id(linear.weight) in chosen]:
        return targets
    raise InputError("TTT_PARAMS chooses no matrix of a block and not tok_emb.weight, which a LoRA could adapt")


def lora_starts(model: GPT, cfg) -> dict:
    """The Linears that LoRA adapts, each with the `down` (rank, fan_in) that it starts from; SEED draws them."""
    draw, starts = torch.Generator().manual_seed(cfg.seed), {}
    for linear in lora_targets(model, cfg):
        fan_in = linear.weight.size(1)
        down = (2 * torch.rand(cfg.ttt_lora_rank, fan_in, generator=draw) - 1) * fan_in**-0.5
        starts[linear] = down.to(linear.weight.device)
    return starts


def attach_lora(model: GPT, starts: dict, rows: int, cfg) -> list:
    """Freeze the model and give each Linear of `starts` a fresh adapter for so many rows; returns their parameters."""
    model.requires_grad_(False)
    for linear, down in starts.items():
        linear.adapter = LoRA(down, linear.weight.size(0), rows, cfg.ttt_lora_scale)
    params = [p for linear in starts for p in linear.adapter.parameters()]
    if cfg.ttt_softcap:
        model.cap_steps = nn.Parameter(model.cos.new_zeros(2, rows, 1, 1))
        params.append(model.cap_steps)
    return params


def adapting_parameters(model: GPT, cfg) -> list:
    """What TTT_PARAMS chooses to adapt; all else is frozen. Raises InputError if that is nothing."""
    every, chosen = dict(model.named_parameters()), set()
    for pattern in cfg.ttt_params:
        fits = set(fnmatch.filter(every, pattern.removeprefix("!")))
        if not fits:
            some = ", ".join([*every][-9:])
            raise InputError(f"TTT_PARAMS={pattern} fits no parameter; names are like {some}")
        chosen = chosen - fits if pattern.startswith("!") else chosen | fits
    for name, p in every.items():
        p.requires_grad_(name in chosen)
    if not chosen:
        raise InputError("TTT_PARAMS leaves nothing to adapt; TTT_EPOCHS=0 if that is meant")
    return [every[name] for name in every if name in chosen]


class Adaptation:
    """Trains `params` on each chunk that has been scored, TTT_EPOCHS times (PR #549; AdamW: PR #490)."""

    def __init__(self, params: list, forward: Callable, cfg, ranks):
        self.params, self.forward, self.cfg, self.ranks = params, forward, cfg, ranks
        # an epsilon of 1e-8, torch's, lets AdamW scale up gradients that are rounding errors, of about 2e-9: hence the
        # least length of a document's chunk
        kinds: dict[str, Callable] = dict(
            adamw=partial(torch.optim.AdamW, betas=(cfg.ttt_momentum, cfg.ttt_beta2)),
            sgd=partial(torch.optim.SGD, momentum=cfg.ttt_momentum, nesterov=cfg.ttt_nesterov),
        )
        make = kinds[cfg.ttt_optimizer]
        self.optimizer = make(params, cfg.ttt_lr, weight_decay=cfg.ttt_weight_decay, fused=True)

    def __call__(self, chunk: ScoredChunk):
        wave = 0.5 + 0.5 * math.cos(math.pi * chunk.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.ttt_lr * max(self.cfg.ttt_cosine_floor, wave)
        rows = torch.arange(len(chunk.inputs), device=chunk.weight.device)
        for _ in range(self.cfg.ttt_epochs):
            for first in range(0, len(rows), self.cfg.ttt_batch_seqs):
                self.step(chunk, rows[first : first + self.cfg.ttt_batch_seqs])

    def step(self, chunk: ScoredChunk, rows: Tensor):
        """One step on the mean loss of these rows of a scored chunk, the same for any number of ranks."""
        count, world = len(rows), self.ranks.world  # ranks split the rows, filled up with some of weight 0
        mine = torch.arange(count + -count % world, device=rows.device).chunk(world)[self.ranks.rank]
        weight, rows = (mine < count) * (world / count), rows[mine.clamp(max=count - 1)]
        kept = chunk.losses is not None
        losses = (chunk.losses[rows] if kept else self.forward(chunk.inputs[rows], chunk.targets[rows])).mean(1)
        (losses * weight * chunk.weight[rows]).sum().backward()
        self.ranks.mean_([p.grad for p in self.params])
        if self.cfg.ttt_grad_clip:
            nn.utils.clip_grad_norm_(self.params, self.cfg.ttt_grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def adaptive_score(scorer: Scorer, model: GPT, params: list, forward: Callable) -> Score:
    """The score while `params`, or else a LoRA, learn from the stream, or each document's own LoRA from it alone."""
    cfg, ranks = scorer.cfg, scorer.ranks
    score, learn = partial(forward, temperature=cfg.ttt_temperature), partial(forward, z_loss=cfg.ttt_z_loss)
    starts = lora_starts(model, cfg) if cfg.ttt_lora_rank else {}
    if cfg.by_document:
        alone = Ranks(device=ranks.device)  # ranks do not meet
        same = (cfg.ttt_epochs, cfg.ttt_temperature, cfg.ttt_z_loss) == (1, 1.0, 0.0)  # as what is scored
        return scorer.by_document(
            score, lambda n: Adaptation(attach_lora(model, starts, n, cfg), learn, cfg, alone), keep=same
        )
    return scorer.sliding(score, Adaptation(params or attach_lora(model, starts, 1, cfg), learn, cfg, ranks))


# ---- Report and main.


def set_aside(path: Path, log):
    """Rename the file of an earlier run: one that is killed must not leave it under its own name."""
    if log.active and path.exists():
        aside = Path(f"{path}.before")
        path.replace(aside)
        log(f"{path.name} of an earlier run is now {aside.name}")


def run_training(cfg, env: Mapping, ranks, log) -> tuple:
    """Train, average and write the artifact; returns the scores of the raw and of the averaged weights, and the sha256
    of what was written. All inputs and outputs are checked before the log is begun.
    """
    scorer, shards = Scorer(read_validation(cfg), cfg, ranks, log), find_shards(cfg, "train")
    attention, dtype = choose_attention(cfg, ranks), compute_dtype(cfg, ranks.device)
    batches = Batches(TokenStream(shards, cfg.vocab_size), cfg, ranks)
    model = GPT(cfg, attention.attend, dtype)
    count, newest = sum(p.numel() for p in model.parameters()), Path(cfg.output_dir, "final_model.int6.ptz")
    sizes = {log.path: 2**20, cfg.artifact_path: min(cfg.max_artifact_bytes, 4 * count), cfg.average_path: 4 * count}
    log.check(sizes | ({Path(cfg.audit): 24 * len(scorer.bytes)} if cfg.audit else {}))
    log.header(cfg, ranks, env)
    model.init_weights(cfg)
    trainer = Trainer(model.to(ranks.device), batches, cfg, ranks)
    dataset = Path(cfg.data_path).name
    log(f"train_loader:dataset:{dataset} train_shards:{len(shards)}", dataset=dataset, train_shards=len(shards))
    log(f"val_loader:tokens:{len(scorer.bytes)} bytes:{int(scorer.bytes.sum())}")
    log(
        f"model_params:{count} attention:{attention.name} dtype:{dtype} grad_accum_steps:{batches.micro_steps}"
        f"{attention.warning}",
        parameters=count,
        grad_accum_steps=batches.micro_steps,
    )
    for path in (cfg.artifact_path, newest, newest.with_name("final_model.average.ptz")):
        set_aside(path, log)
    try:
        costs = train(trainer, lambda: scorer.plain(trainer.forward), log)
        on_signals(signal.default_int_handler)
        weights = trainer.average.values
        plans = coding_plans(weights, grids(model, cfg), cfg, costs)
        digest = save_artifact(plans, weights, trainer.looped, cfg, ranks, log)
    except (Exception, KeyboardInterrupt) as error:
        on_signals(signal.SIG_IGN)
        diverged = isinstance(error, Diverged) and cfg.average_path.exists()
        try:
            if not diverged:  # a good average of this run stays as it is
                save_average(trainer.average, trainer.looped, cfg, log)
        except Exception as second:
            complain(f"WARNING: the averaged weights could not be saved: {second}\n")
        if isinstance(error, (Unusable, Stopped)):  # all ranks have met it
            ranks.barrier()
        raise
    ranks.barrier()
    with trainer.average.applied():
        averaged = scorer.plain(trainer.forward)
    raw = scorer.plain(trainer.forward)
    log(f"DIAGNOSTIC raw {raw}")
    log(f"DIAGNOSTIC post_{cfg.averaging} {averaged}")
    return {"raw": raw, "averaged": averaged}, digest


def evaluations(scorer: Scorer, model: GPT, looped: bool) -> dict:
    """The passes over the stream, by their names in the log: plain, sliding and, with test-time training, adapting."""
    cfg = scorer.cfg
    forward = partial(compiled(model, cfg, scorer.ranks), looped=looped)
    params = adapting_parameters(model, cfg) if cfg.ttt_epochs and not cfg.ttt_lora_rank else []
    passes = {
        f"final_int{cfg.matrix_bits}_roundtrip": lambda: scorer.plain(forward),
        f"final_int{cfg.matrix_bits}_sliding_window": lambda: scorer.sliding(forward),
    }
    run = forward
    if cfg.ttt_epochs and cfg.by_document:  # not compiled: each length of context would be another graph
        with torch.no_grad():
            run = partial(model, looped=looped, alone=True, weights=model.weights())  # they stay: adapters alone learn
    if cfg.ttt_epochs:
        passes["legal_ttt"] = lambda: adaptive_score(scorer, model, params, run)
    return passes


def run_evaluation(artifact: Artifact, begin: float, ranks, log) -> dict:
    """Score an artifact, all that it knows of the training: plain, sliding, then adapting. It began at `begin`."""
    cfg, weights, looped, sha256, _, warnings = artifact
    model, scores = load_model(cfg, weights, ranks), {}
    scorer = Scorer(read_validation(cfg), cfg, ranks, log)
    passes, attention = evaluations(scorer, model, looped), choose_attention(cfg, ranks)
    log(
        f"artifact:{cfg.artifact_path} artifact_sha256:{sha256} variant:{cfg.variant} seed:{cfg.seed} "
        f"attention:{attention.name} dtype:{model.dtype} looped:{int(looped)} "
        f"stride:{cfg.eval_stride} eval_seq_len:{cfg.window} ttt_chunk:{cfg.ttt_chunk_tokens} "
        f"load_time:{1000 * (perf_counter() - begin):.0f}ms{attention.warning}",
        artifact_sha256=sha256,
        attention=attention.name,
        dtype=str(model.dtype),
        eval_stride=cfg.eval_stride,
        ttt_chunk_tokens=cfg.ttt_chunk_tokens,
    )
    if scorer.split_targets > len(scorer.bytes):
        warnings = [*warnings, f"only {len(scorer.bytes)} of the split's {scorer.split_targets} targets are scored"]
    log.warn(*warnings)
    for name, evaluation in passes.items():
        scores[name] = score = evaluation()
        log(f"{name} {score}")
        log(f"{name}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    seconds, count, size = perf_counter() - begin, len(scorer.bytes), int(scorer.bytes.sum())
    log(f"total_eval_time:{1000 * seconds:.0f}ms{ranks.memory()}", eval_seconds=seconds)
    log(
        f"bytes_per_token:{size / count:.6f} targets:{count} bytes:{size} val_sha256:{scorer.sha256} "
        f"val_bytes_sha256:{scorer.bytes_sha256}",
        targets=count,
        val_split_targets=scorer.split_targets,
        bytes=size,
        val_sha256=scorer.sha256,
        val_bytes_sha256=scorer.bytes_sha256,
    )
    return scores


def describe(cfg) -> str:
    """The resolved settings and the number of parameters; needs no data, no GPU and no memory for weights."""
    with torch.device("meta"):
        model = GPT(cfg)
    return "\n".join(
        [
            *(f"{k}={v}" for k, v in as_env(vars(cfg)).items()),
            f"model_params:{sum(p.numel() for p in model.parameters())}",
        ]
    )


def report(scores: dict, model: int) -> str:
    """The closing table: stage, loss in nats per token, bits per byte, bytes of code + model, seconds."""
    code = Path(__file__).stat().st_size
    head = f"{'stage':28s} {'val_loss':>9s} {'val_bpb':>9s} {'bytes':>11s} {'seconds':>9s}"
    rows = [
        f"{n:28s} {s.loss:9.4f} {s.bpb:9.4f} {'-' if n in ('raw', 'averaged') else code + model:>11} {s.seconds:9.1f}"
        for n, s in scores.items()
    ]
    return "\n".join([head, *rows, f"code {code} + model {model} = {code + model} bytes"])


def resolve(env: Mapping) -> tuple:
    """The settings of a run and, for EVAL_ONLY, the artifact: it comes first, since what `env` says must fit it."""
    place = Config(artifact=env.get("ARTIFACT", ""), output_dir=env.get("OUTPUT_DIR", "."), eval_only=True)
    artifact = load_artifact(place.artifact_path, env) if env.get("EVAL_ONLY") == "1" else None
    cfg = artifact.cfg if artifact else Config.from_env(env)
    if not cfg.run_id:
        kind = "eval_" if cfg.eval_only else ""
        cfg = replace(cfg, run_id=f"{cfg.variant}_seed{cfg.seed}_{kind}{time.strftime('%Y%m%d-%H%M%S')}")
    if cfg.ttt_epochs:
        with torch.device("meta"):  # better an error now than after training
            (lora_targets if cfg.ttt_lora_rank else adapting_parameters)(GPT(cfg), cfg)
    return cfg, artifact


def written_artifact(cfg, digest: str, ranks) -> Artifact:
    """What a run has just written, read from the disk of the main rank: other nodes may not see it."""
    settings = as_env(cfg.group("run", "evaluation"))
    blob = read_artifact(cfg.artifact_path, settings) if ranks.is_main else b""
    if ranks.is_main and hashlib.sha256(blob).hexdigest() != digest:
        raise InputError(
            f"{cfg.artifact_path} is not what this run wrote; another run may use the same RUN_ID or ARTIFACT"
        )
    return load_artifact(cfg.artifact_path, settings, ranks.broadcast(blob))


def main(argv: list, env: Mapping):
    """Configuration, then training, then an evaluation that reads only what was written, then the table."""
    if argv in (["-h"], ["--help"]):
        return print(usage())
    begin = perf_counter()
    cfg, artifact = resolve(env)
    if argv == ["--describe"]:
        return print(describe(cfg))
    if argv:
        raise InputError(f"unknown argument {argv[0]}; options are environment variables (--help lists them)")
    with launch(env) as ranks:
        cfg = replace(cfg, dtype="bf16" if compute_dtype(cfg, ranks.device) == torch.bfloat16 else "fp32")
        log, scores, _ = Log(cfg, ranks), {}, ranks.compiles(cfg)
        if artifact is None:
            scores, digest = run_training(cfg, env, ranks, log)
            begin = perf_counter()
            artifact = written_artifact(cfg, digest, ranks)
        else:
            artifact = artifact._replace(cfg=cfg)
            scorer = Scorer(read_validation(cfg), cfg, ranks, log)
            log.check({log.path: 2**20} | ({Path(cfg.audit): 24 * len(scorer.bytes)} if cfg.audit else {}))
            log.header(cfg, ranks, env)
        scores |= run_evaluation(artifact, begin, ranks, log)
        log(report(scores, artifact.size), scores={stage: score._asdict() for stage, score in scores.items()})
        log(f"log:{log.path} artifact:{cfg.artifact_path}")
        log(f"RESULT {json.dumps(log.facts)}")


def first_failure() -> bool:
    """Whether no other rank has failed before: the process group's store counts them."""
    if not dist.is_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    except (RuntimeError, ValueError):  # the store went with the rank that kept it
        return True


def explain(error: BaseException) -> str:
    """What a user is told of an error: one line, or the traceback of what must be a bug."""
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, InputError):
        text = str(error)
    elif isinstance(error, ModuleNotFoundError):
        text = f"the package {error.name} is missing; pip install -r requirements.txt"
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in first_line:
        text = f"out of memory ({first_line}); lower MICRO_BATCH_TOKENS, or EVAL_BATCH_SEQS and TTT_BATCH_SEQS"
    elif isinstance(error, OSError):
        text = f"{error.filename or 'input or output'}: {error.strerror or first_line}"
    elif isinstance(error, dist.DistError) or "gloo" in first_line:
        text = f"another rank has ended without a word ({first_line})"
    else:
        return "".join(traceback.format_exception(error))
    return "train_gpt.py: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:2000] + "\n"


def run(argv: list, env: Mapping):
    """`main`; after a mistake of the user's status 1 and one line, after Ctrl-C 130, after a bug 1 and a traceback. Of
    several ranks the one that failed first speaks.
    """
    if sys.version_info < (3, 10):
        sys.exit("train_gpt.py needs Python 3.10 or newer")
    for name in ("stdout", "stderr"):  # None where the parent closed it
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
    on_signals(signal.default_int_handler)
    try:
        return main(argv, env)
    except KeyboardInterrupt:
        status, text = 130, ""
    except Exception as error:
        status, text = 1, explain(error)
    if first_failure():
        complain(text)
    if dist.is_initialized():
        os._exit(status)  # an orderly end would wait for ranks that wait for this one, and torchrun would never know
    sys.exit(status)


if __name__ == "__main__":
    run(sys.argv[1:], os.environ)
