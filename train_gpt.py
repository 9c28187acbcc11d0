"""A complete Parameter Golf entry in one file: train, quantize, pack, reload and score an 11-layer U-Net GPT.

    torchrun --standalone --nproc_per_node=8 train_gpt.py          # the contest: 8xH100, 600 s + 600 s
    VARIANT=demo python train_gpt.py                               # no GPU: the same code, every stage, in minutes
    EVAL_ONLY=1 ARTIFACT=final_model.int6.ptz python train_gpt.py  # score a saved artifact again, without training
    python train_gpt.py --help | --describe                        # every option | the resolved run, without data

Data flow: shards -> batches -> GPT -> Muon + AdamW under a wallclock budget -> averaged weights -> integer codes
-> one compressed file. The evaluation reads only that file, the tokenizer and the validation shards: it scores the
stream with a sliding window, then with test-time training (TTT), which trains on a chunk only after scoring it.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import hashlib
import importlib.metadata
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
from itertools import groupby, product
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy import ndarray as Array
from torch import Tensor, nn

# PR numbers refer to github.com/openai/parameter-golf, arXiv numbers to arxiv.org.

BOS = 1  # token id that starts a document
PACKAGES = ("numpy", "sentencepiece", "zstandard")

# Arguments without a type: cfg is a Config, ranks a Ranks, log a Log, env the environment; weights and tensors are
# dict[str, Tensor]; ids, targets, losses, x and y are tensors; all others are numbers. forward(ids (B, T), targets
# (B, S)) returns the losses (B, S) of the last S <= T positions.


class InputError(ValueError):
    """An error with a one-line message: what is wrong, where, and how to fix it. It is printed without a traceback."""


# ---- Options. SEED=42 in the environment sets `seed`. Parsing and checks are in the section "Plumbing".


def option(default: Any, low=0, high=2**63) -> Any:
    """A Config field with an inclusive range [low, high]."""
    return field(default=default, metadata=dict(low=low, high=high))


def positive(default) -> Any:
    """An option that is at least 1."""
    return option(default, low=1)


def fraction(default) -> Any:
    """An option from 0 to 1."""
    return option(default, high=1)


def choice(*choices: str) -> Any:
    """An option that takes one of `choices`, by default the first."""
    return field(default=choices[0], metadata=dict(choices=choices))


# A group of options starts at the field named here. An artifact stores `model`, `evaluation` and seven others (see
# artifact_settings); one that it lacks gets its default. With EVAL_ONLY, `run` and `evaluation` may be set.
GROUPS = {
    "run": "run_id",
    "model": "variant",
    "training": "train_batch_tokens",
    "quantization": "matrix_bits",
    "evaluation": "eval_seq_len",
}


@dataclass(frozen=True)
class Config:
    """All options of a run, frozen; numbers are at least 0 where nothing else is said. The comments are the text of
    --help. Raises InputError that names the option when a value is invalid.
    """

    run_id: str = ""  # name of the log and the artifact; empty: variant, seed and time
    output_dir: str = "."  # folder of the artifact, the checkpoints and logs/
    eval_only: bool = False  # score the artifact ARTIFACT instead of training
    resume: str = choice("0", "1", "average")  # 1: continue RUN_ID's saved state; average: only pack its average
    artifact: str = ""  # file of any code width; empty: RUN_ID.int6.ptz, or final_model.int6.ptz
    audit: str = ""  # write nll, bytes and chunk index of each target of the last evaluation to this npz
    max_artifact_bytes: int = positive(16_000_000)  # limit on code + model bytes
    data_path: str = "./data/datasets/fineweb10B_sp1024"  # folder of fineweb_{train,val}_*.bin
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"  # SentencePiece model of the shards
    attention: str = choice("auto", "fa3", "fa2", "sdpa")  # attention kernel; auto: the first that works
    dtype: str = choice("auto", "bf16", "fp32")  # activations; auto: bf16 on a GPU or CPU with bf16 units, else fp32
    compile: str = choice("auto", "on", "off")  # torch.compile; auto: on CUDA, or in CPU runs above 600 s
    eval_batch_seqs: int = positive(32)  # windows per forward pass of one rank
    val_max_tokens: int = 0  # score only the first N targets; 0: all, required for a record

    variant: str = "card"  # row of VARIANTS that sets the defaults
    seed: int = 1337  # seed of the weights and of the shuffled loader
    vocab_size: int = option(1024, 8, 65536)  # size of the tokenizer's vocabulary
    num_layers: int = option(11, 2, 256)  # blocks; the first half stores U-Net skips for the second half
    model_dim: int = option(512, 8, 65536)  # width of the residual stream
    num_heads: int = positive(8)  # query heads
    num_kv_heads: int = positive(4)  # key/value heads
    mlp_mult: float = option(3.0, 0.01)  # MLP width / MODEL_DIM
    activation: str = choice("leaky_relu", "silu")  # activation of the MLP before the square
    mlp_negative_slope: float = fraction(0.5)  # slope of the leaky ReLU; 0: ReLU squared
    mlp_affine: bool = False  # learn a scale and a bias after the square (StarReLU)
    rope_base: float = option(10_000.0, 1)  # base of the rotary wavelengths
    rope_dims: int = 16  # head dims with rotary embedding; 0: all
    qk_gain_init: float = 1.5  # initial gain of each query head after QK-norm
    qk_gains: int = option(1, 1, 2)  # gains per query head; 2: one for rotary dims, one for the others
    document_attention: bool = False  # mask attention across documents (flash: one boundary per 32 tokens)
    xsa_last_n: int = 4  # exclusive self-attention (XSA) in the last N blocks; 0: none
    value_residual: bool = False  # mix the values of each layer with the first layer's values
    gated_attention: bool = False  # sigmoid gate per head, computed from the whole input
    attn_gate_dims: int = 0  # input channels of a head gate whose output is 0 to 2; 0: no gate
    ln_scale_power: float = 0.5  # block inputs are scaled by (layer + 1)**-power; 0: not scaled
    parallel_residual_start: int = option(-1, -1)  # first block with attention and MLP in parallel; -1: none
    skip_gates: bool = False  # blend skips with a learned gate instead of adding them
    num_loops: int = option(0, high=16)  # additional passes through the looped blocks; 0: no recurrence
    loop_start: int = 3  # first looped block
    loop_end: int = 5  # last looped block
    enable_looping_at: float = fraction(0.35)  # fraction of training at which looping starts
    smear_gate: bool = True  # blend each token's embedding with the previous token's
    bigram_vocab_size: int = 2048  # buckets of the hashed bigram embedding; 0: none
    bigram_dim: int = positive(128)  # width of the bigram embedding
    bigram_hash: str = choice("reserved", "xor", "linear")  # hash; reserved: xor, last bucket for no bigram
    bigram_scale_init: float = 0.05  # initial gain of the bigram embedding; 0: no gain
    ve_dim: int = positive(128)  # width of the shared value embedding
    ve_layers: tuple[int, ...] = (9, 10)  # layers that add the value embedding to their values; empty: none
    embed_scale: bool = False  # learn a gain for each channel of the embedding
    logit_softcap: float = option(30.0, 1)  # logits are capped to +-cap by tanh
    tied_embed_init_std: float = 0.005  # initial standard deviation of the token embedding
    init: str = choice("orthogonal", "default")  # initialization of matrices; default: PyTorch's uniform

    train_batch_tokens: int = positive(786_432)  # tokens per optimizer step, over all ranks
    train_seq_len: int = option(2048, 2, 2**20)  # tokens per training sequence
    early_seq_lens: tuple[int, ...] = option((), 2, 2**20)  # TRAIN_SEQ_LEN of earlier stages, one value per stage
    early_seq_ends: tuple[float, ...] = option((), high=0.999)  # fraction of training at which each stage ends
    loader: str = choice("stream", "shuffled")  # order of training sequences
    micro_batch_tokens: int = positive(98_304)  # maximum tokens per forward pass of one rank (gradient accumulation)
    iterations: int = positive(20_000)  # maximum optimizer steps
    max_wallclock_seconds: float = 600.0  # training ends before this time; 0: no limit
    warmup_steps: int = 20  # throwaway steps per graph, before the clock starts; the state is restored
    warmdown_iters: int = 3500  # last steps, in which the learning rate falls to MIN_LR; 0: none
    warmdown_frac: float = fraction(0.0)  # WARMDOWN_ITERS as a fraction of training; 0: use WARMDOWN_ITERS
    min_lr: float = fraction(0.0)  # lower bound of the learning rate, as a fraction of the peak
    matrix_lr: float = 0.025  # Muon learning rate: spectral norm of an update
    scalar_lr: float = 0.025  # AdamW learning rate of gains, gates and mixes
    tied_embed_lr: float = 0.035  # AdamW learning rate of embeddings
    decoder_lr_mult: float = 1.0  # learning rate factor of the second half of the blocks
    muon_momentum: float = fraction(0.99)  # Muon momentum after its warm-up
    muon_momentum_warmup_start: float = fraction(0.92)  # Muon momentum at step 0
    muon_momentum_warmup_steps: int = 1500  # steps of the momentum warm-up; 0: none
    muon_momentum_warmup_frac: float = fraction(0.0)  # momentum warm-up as a fraction of training; 0: use steps
    muon_momentum_cooldown: float = fraction(1.0)  # fraction of its rise kept as it falls with the rate; 1: all
    muon_backend_steps: int = positive(5)  # Newton-Schulz iterations
    muon_row_normalize: bool = False  # normalize the rows of an update before Newton-Schulz (MuonEq-R)
    muon_wd: float = 0.04  # decoupled weight decay of matrices
    muon_wd_mlp: float = option(-1.0, -1)  # decoupled weight decay of MLP matrices; -1: MUON_WD
    embed_wd: float = 0.04  # decoupled weight decay of embeddings
    adam_wd: float = 0.0  # decoupled weight decay of gains, gates and mixes
    beta1: float = option(0.9, high=0.99999)  # AdamW beta1
    beta2: float = option(0.95, high=0.99999)  # AdamW beta2
    adam_eps: float = 1e-8  # AdamW epsilon
    grad_clip_norm: float = 0.3  # clip of the global gradient norm; 0: none
    averaging: str = choice("ema", "swa", "last")  # which weights are exported
    ema_decay: float = fraction(0.997)  # EMA decay per step
    swa_every: int = positive(50)  # steps between SWA snapshots
    swa_start_scale: float = option(0.2, high=2)  # SWA starts below this fraction of the peak learning rate
    late_qat_threshold: float = option(0.15, high=2)  # late QAT starts below this fraction of the peak rate; 0: never
    checkpoint_every: int = 0  # steps between saves of the state and the average, on the clock; 0: none
    train_log_every: int = positive(500)  # steps between train_loss lines
    val_loss_every: int = 0  # steps between validations, off the clock; 0: only at the end

    matrix_bits: int = option(6, 2, 8)  # code width of matrices
    embed_bits: int = option(8, 2, 16)  # code width of the token embedding; 16: fp16
    table_bits: int = option(0, high=16)  # code width of bigram and value embeddings; 0: EMBED_BITS
    clip_shares: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)  # clips to try, relative to the row max
    min_clip: float = 1.0  # lower bound of a clip from CLIP_SHARES; 0: none
    matrix_clip_sigmas: float = 0.0  # clip of matrices in standard deviations of a row; 0: CLIP_SHARES
    embed_clip_sigmas: float = 0.0  # clip of embeddings in standard deviations of a row; 0: CLIP_SHARES
    quantizer: str = choice("rtn", "gptq")  # round to nearest, or GPTQ
    mean_scale: float = 0.0  # geometric mean of scales chosen by error cost, codes of 8 bits; 0: row clips
    scale_power: float = fraction(0.75)  # exponent of that cost in the scales; 0: equal scales, 1: equal cost per code
    gptq_calibration_batches: int = positive(8)  # maximum training batches for GPTQ statistics, on the clock
    gptq_reserve_seconds: float = 4.0  # part of MAX_WALLCLOCK_SECONDS reserved for those batches
    gptq_damping: float = option(0.01, 1e-6)  # damping of Hessian and row costs, as a fraction of their mean
    prune_share: float = option(0.0, high=0.99)  # fraction of each matrix to set to 0, smallest weights first
    fit: bool = True  # scale all quantization scales so that code + model fill MAX_ARTIFACT_BYTES
    compressor: str = choice("zstd", "brotli", "rans")  # rans: an entropy coder with a table per magnitude, then zstd
    zstd_level: int = option(22, 1, 22)  # zstd level

    eval_seq_len: int = option(0, high=2**20)  # tokens per evaluation window; 0: TRAIN_SEQ_LEN
    eval_stride: int = positive(64)  # targets scored per sliding window after the first
    ttt_epochs: int = option(1, high=100)  # epochs of test-time training on each scored chunk; 0: none
    ttt_scope: str = choice("document", "stream")  # adapt one model to the stream, or a LoRA per document
    ttt_chunk_tokens: int = positive(128)  # targets per chunk, which is scored before it is trained on
    ttt_params: tuple[str, ...] = ("*.c_q.weight", "*.c_v.weight", "tok_emb.weight")  # to adapt: patterns; ! excludes
    ttt_lora_rank: int = option(8, 0, 256)  # adapt the TTT_PARAMS matrices by LoRA of this rank; 0: adapt the weights
    ttt_lora_scale: float = 1.0  # scale of the LoRA terms
    ttt_optimizer: str = choice("adamw", "sgd")  # optimizer of test-time training
    ttt_lr: float = 0.01  # learning rate of test-time training
    ttt_expert_lrs: tuple[float, ...] = ()  # learning rates of further experts per document; 0: frozen model
    ttt_share: float = option(0.05, 1e-6, 1)  # fraction of the weights shared equally after each token; 1: plain mean
    ttt_cosine_floor: float = fraction(1.0)  # cosine decay over the stream to this fraction of TTT_LR; 1: constant
    ttt_cosine_tokens: int = 0  # length of that decay in targets; 0: number of targets in the stream
    ttt_momentum: float = option(0.9, high=0.99999)  # SGD momentum or AdamW beta1
    ttt_nesterov: bool = False  # Nesterov momentum for SGD
    ttt_beta2: float = option(0.95, high=0.99999)  # AdamW beta2
    ttt_weight_decay: float = 0.0  # weight decay of test-time training
    ttt_z_loss: float = 0.0  # weight of the squared log-partition in the loss of test-time training
    ttt_temperature: float = option(1.0, 0.1, 10)  # temperature of the scored logits
    ttt_batch_seqs: int = option(64, 1, 1024)  # TTT batch: sequences over all ranks, or documents per rank
    ttt_grad_clip: float = 0.0  # clip of the gradient norm; 0: none

    def __post_init__(self):
        check_options(self)

    @classmethod
    def from_env(cls, env) -> Config:
        """Options from their defaults, then the variant, then the environment. Raises InputError."""
        return cls(**parse_options(env))

    def group(self, *groups: str) -> dict[str, Any]:
        """The options of these groups with their values."""
        return {name: value for name, value in vars(self).items() if option_group(name) in groups}

    # derived values
    head_dim = property(lambda self: self.model_dim // self.num_heads)
    mlp_dim = property(lambda self: round(self.mlp_mult * self.model_dim))
    window = property(lambda self: self.eval_seq_len or self.train_seq_len)
    by_document = property(lambda self: dict(document=True, stream=False)[self.ttt_scope])
    resumed = property(lambda self: {"0": "", "1": "state", "average": "average"}[self.resume])
    calibrated = property(lambda self: dict(gptq=True, rtn=False)[self.quantizer])

    @property
    def time_limit(self) -> float:
        """Seconds for optimizer steps: MAX_WALLCLOCK_SECONDS minus the GPTQ reserve; infinite without a limit."""
        reserve = self.gptq_reserve_seconds if self.calibrated else 0.0
        return self.max_wallclock_seconds - reserve if self.max_wallclock_seconds else math.inf

    @property
    def artifact_path(self) -> Path:
        """The artifact to write; with EVAL_ONLY the one to read, by default the copy of the newest run."""
        name = "final_model" if self.eval_only else self.run_id
        return Path(self.artifact or Path(self.output_dir) / f"{name}.int6.ptz")

    def checkpoint_path(self, kind: str) -> Path:
        """The `average` of the weights, or the `state` from which RESUME=1 continues."""
        return Path(self.output_dir) / f"{self.run_id}.{kind}.ptz"


# Rows of settings, written as in the environment. The last value of a name wins.
# fmt: off
STREAM_TTT = """
    TTT_EPOCHS=3 TTT_PARAMS=* TTT_SCOPE=stream TTT_CHUNK_TOKENS=32768 TTT_LORA_RANK=0 TTT_OPTIMIZER=sgd
    TTT_LR=0.002 TTT_BETA2=0.999 TTT_BATCH_SEQS=32 TTT_GRAD_CLIP=1
"""  # PR #549
DOCUMENT_TTT = """
    TTT_CHUNK_TOKENS=64 TTT_PARAMS=blocks.*.weight,!*.c_k.weight,tok_emb.weight TTT_LORA_RANK=80 TTT_LORA_SCALE=1.8
    TTT_LR=0.0002 TTT_EXPERT_LRS=0 TTT_MOMENTUM=0 TTT_BETA2=0.99 TTT_WEIGHT_DECAY=0.5
"""  # PR #1855 without keys, mixed with the frozen model; rate and chunks: logs/evaluation.md
SP8192 = """
    DATA_PATH=./data/datasets/fineweb10B_sp8192 TOKENIZER_PATH=./data/tokenizers/fineweb_8192_bpe.model
    VOCAB_SIZE=8192 LOADER=shuffled MLP_MULT=4 XSA_LAST_N=11 ATTN_GATE_DIMS=12 SKIP_GATES=1 NUM_LOOPS=2
    BIGRAM_VOCAB_SIZE=0 VE_LAYERS= WARMDOWN_ITERS=0 SCALAR_LR=0.02 TIED_EMBED_LR=0.03 MUON_ROW_NORMALIZE=1
    MUON_WD=0.095 EMBED_WD=0.085 EMA_DECAY=0.9965 LATE_QAT_THRESHOLD=0 QUANTIZER=gptq
"""  # common to PR #1812 and PR #2135
VARIANTS = {
    "card": DOCUMENT_TTT,  # else the defaults: PR #549 on PR #414
    "pr150": STREAM_TTT + """
    TTT_PARAMS=*,!blocks.0.*,!blocks.1.* ROPE_BASE=50000 ROPE_DIMS=0 XSA_LAST_N=0 LN_SCALE_POWER=0 VE_LAYERS=
    MLP_NEGATIVE_SLOPE=0 BIGRAM_HASH=xor WARMDOWN_ITERS=3000 EMBED_WD=0 AVERAGING=swa SWA_EVERY=200
    SWA_START_SCALE=0.5 LATE_QAT_THRESHOLD=2 EMBED_BITS=16 TABLE_BITS=6 CLIP_SHARES=1
    """,
    "pr455": STREAM_TTT + """
    TTT_PARAMS=*,!blocks.0.*,!blocks.1.* ROPE_BASE=22081.790273476247 MLP_NEGATIVE_SLOPE=0 WARMDOWN_ITERS=3000
    ADAM_WD=0.04 AVERAGING=swa LATE_QAT_THRESHOLD=0.1 CLIP_SHARES=1
    """,  # ROPE_BASE: NTK scaling to twice the context, 10,000 * 2**(16/14)
    "pr490": STREAM_TTT + """
    TTT_PARAMS=blocks.9.*,blocks.10.*,*.attn_scale,*.mlp_scale,bigram.scale,tok_emb.* TTT_CHUNK_TOKENS=131072
    TTT_OPTIMIZER=adamw TTT_LR=0.0001 TTT_BATCH_SEQS=64 TTT_COSINE_FLOOR=0.1 TTT_COSINE_TOKENS=62021632
    TTT_TEMPERATURE=0.98 VALUE_RESIDUAL=1 GATED_ATTENTION=1 BIGRAM_VOCAB_SIZE=4096 VE_LAYERS= ITERATIONS=9000
    WARMDOWN_ITERS=1200 MUON_MOMENTUM=0.95 MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=500
    ADAM_WD=0.04 EMBED_BITS=16 TABLE_BITS=8 QUANTIZER=gptq CLIP_SHARES=1 PRUNE_SHARE=0.02
    """,  # TTT_COSINE_TOKENS: size of the contest's split; the PR: 0
    "pr1127": STREAM_TTT + """
    TTT_EPOCHS=1 TTT_PARAMS=*.c_q.weight,*.c_v.weight,tok_emb.weight TTT_LORA_RANK=8 TTT_OPTIMIZER=adamw
    TTT_LR=0.01 TTT_BETA2=0.95 MODEL_DIM=480 MLP_MULT=3.2 MLP_NEGATIVE_SLOPE=0 MLP_AFFINE=1 SKIP_GATES=1
    BIGRAM_VOCAB_SIZE=8192 BIGRAM_HASH=linear BIGRAM_SCALE_INIT=0 VE_LAYERS= INIT=default
    TRAIN_BATCH_TOKENS=524288 MICRO_BATCH_TOKENS=65536 ADAM_WD=0.04 DECODER_LR_MULT=2 GRAD_CLIP_NORM=0
    EMA_DECAY=0.9985 EMBED_BITS=16 TABLE_BITS=6
    """,
    "pr1812": SP8192 + STREAM_TTT + """
    TTT_EPOCHS=4 TTT_PARAMS=*.weight TTT_CHUNK_TOKENS=65536 TTT_LR=0.005 TTT_NESTEROV=1 TTT_Z_LOSS=1e-05
    TTT_COSINE_FLOOR=0 TTT_COSINE_TOKENS=40540160 ACTIVATION=silu QK_GAIN_INIT=5.25 QK_GAINS=2
    PARALLEL_RESIDUAL_START=7 SMEAR_GATE=0 EMBED_SCALE=1 ITERATIONS=50000 WARMDOWN_FRAC=0.72 MATRIX_LR=0.022
    MUON_MOMENTUM_WARMUP_STEPS=0 MUON_MOMENTUM_WARMUP_FRAC=0.22 MUON_MOMENTUM_COOLDOWN=0.25 MUON_WD_MLP=0.115
    ADAM_WD=0.005 MATRIX_CLIP_SIGMAS=13.3 EMBED_CLIP_SIGMAS=20 GPTQ_CALIBRATION_BATCHES=64
    GPTQ_RESERVE_SECONDS=12 COMPRESSOR=brotli
    """,  # TTT_COSINE_TOKENS: size of the contest's split; the PR: 0
    "frontier": SP8192 + DOCUMENT_TTT + """
    TTT_CHUNK_TOKENS=48 DOCUMENT_ATTENTION=1 QK_GAIN_INIT=5 PARALLEL_RESIDUAL_START=8 TRAIN_SEQ_LEN=3072
    EARLY_SEQ_LENS=1024,2048 EARLY_SEQ_ENDS=0.1,0.7 WARMDOWN_FRAC=0.85 MIN_LR=0.1 MATRIX_LR=0.028
    MUON_MOMENTUM=0.97 ADAM_WD=0.02 BETA2=0.99 MEAN_SCALE=0.1 MATRIX_BITS=8 COMPRESSOR=rans EVAL_STRIDE=1024
    """,  # PR #2135, with the growing sequence length of PR #2014
    "demo": """
    DATA_PATH=./data/datasets/demo_sp1024 TOKENIZER_PATH=./data/tokenizers/demo_1024_bpe.model NUM_LAYERS=6
    MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 VE_LAYERS=4,5 VE_DIM=64 BIGRAM_VOCAB_SIZE=16384 BIGRAM_DIM=64
    TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=2048 MICRO_BATCH_TOKENS=2048 WARMUP_STEPS=1 MAX_WALLCLOCK_SECONDS=120
    WARMDOWN_ITERS=0 WARMDOWN_FRAC=0.8 MATRIX_LR=0.02 SCALAR_LR=0.015 TIED_EMBED_LR=0.03 MUON_MOMENTUM=0.95
    MUON_MOMENTUM_WARMUP_START=0.85 MUON_MOMENTUM_WARMUP_STEPS=100 EMA_DECAY=0.9 TRAIN_LOG_EVERY=20 MIN_CLIP=0
    FIT=0 EVAL_STRIDE=128 TTT_LR=0.02
    """,
}
# fmt: on
# ---- Data: shards -> one endless token stream -> batches that do not depend on the number of ranks.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def shard_length(path: Path) -> int:
    """Number of tokens N of a shard: 256 int32 (magic, version, N, zeros), then N uint16, all little-endian."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; remove it from DATA_PATH")
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=3)
    if len(header) < 3 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise InputError(f"{path} is not a token shard of version {SHARD_VERSION}; make it with data/prepare.py")
    count, stored = int(header[2]), (size - SHARD_HEADER_BYTES) // 2
    if count < 1 or size != SHARD_HEADER_BYTES + 2 * count:
        raise InputError(f"{path} is damaged: its header says {count} tokens, it has {stored}; get it again")
    return count


def read_shard(path: Path, start=0, count: int | None = None) -> Array:
    """Tokens of a shard from `start`, uint16 (count,). Uses np.fromfile, not np.memmap: truncating a memory-mapped file
    would kill this process.
    """
    count = shard_length(path) if count is None else count
    tokens = np.fromfile(path, "<u2", count, offset=SHARD_HEADER_BYTES + 2 * start)
    if len(tokens) < count:
        raise InputError(f"{path} was truncated while it was read; download it again")
    return tokens


def data_command(cfg) -> str:
    """The command that creates the data of a variant."""
    return f"`python data/prepare.py {'demo' if cfg.variant == 'demo' else f'download sp{cfg.vocab_size}'}`"


def find_shards(cfg, split: str) -> list[Path]:
    """Sorted token shards of a split. Files named fineweb_val_bytes_*.bin hold byte counts and are left out."""
    paths = sorted(p for p in Path(cfg.data_path).glob(f"fineweb_{split}_*.bin") if "_bytes_" not in p.name)
    if not paths:
        raise InputError(
            f"no fineweb_{split}_*.bin in DATA_PATH={cfg.data_path}; create it with {data_command(cfg)}, or with "
            "`python data/prepare.py tokenize` from your own text"
        )
    return paths


def check_tokens(tokens: Array, vocab_size, source: object) -> Array:
    """Returns `tokens`. Raises InputError if a token id is outside the vocabulary."""
    if int(tokens.max()) >= vocab_size:
        raise InputError(f"{source} has token {tokens.max()}, but VOCAB_SIZE={vocab_size}; use its tokenizer's shards")
    return tokens


class TokenStream:
    """The shards as one endless stream of tokens; the first shard follows the last."""

    def __init__(self, paths: list[Path], vocab_size):
        self.paths, self.vocab_size = paths, vocab_size
        self.sizes = np.array([shard_length(p) for p in paths])
        self.ends = np.cumsum(self.sizes)

    def read(self, start, count) -> Array:
        """Tokens start .. start + count - 1 of the stream, int64 (count,)."""
        pieces = []
        while count:
            start %= self.ends[-1]
            i = np.searchsorted(self.ends, start, side="right")
            left = self.ends[i] - start
            piece = read_shard(self.paths[i], self.sizes[i] - left, min(count, left))
            pieces.append(check_tokens(piece, self.vocab_size, self.paths[i]))
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces).astype(np.int64)


class RowOrder:
    """Start offsets of training sequences (rows) in the stream: in stream order, or shuffled anew in each epoch.

    Shuffled rows are cut from spans whose length is a common multiple of all row lengths, so the row length can change
    and no token is read twice in an epoch.
    """

    def __init__(self, stream: TokenStream, cfg):
        self.span, self.seed = math.lcm(cfg.train_seq_len, *cfg.early_seq_lens), cfg.seed
        self.shuffled = dict(stream=False, shuffled=True)[cfg.loader]
        self.shard_starts, counts = stream.ends - stream.sizes, (stream.sizes - 1) // self.span - 1
        self.span_counts = counts.clip(0)  # one span of each shard is left for a random offset
        if self.shuffled and not self.span_counts.any():
            raise InputError(f"LOADER=shuffled needs a shard of {2 * self.span + 1} tokens; use LOADER=stream")
        self.epoch, self.starts = -1, None  # of the current epoch, set below

    def __call__(self, tokens_read) -> int:
        """Offset of the row that follows `tokens_read` tokens of all ranks."""
        if not self.shuffled:
            return tokens_read
        span, inside = divmod(tokens_read, self.span)
        epoch, i = divmod(span, self.span_counts.sum())
        if epoch != self.epoch:  # PR #1493 shuffles in the same way
            generator = np.random.default_rng((self.seed, epoch))
            spans = [
                start + generator.integers(self.span) + self.span * np.arange(count)
                for start, count in zip(self.shard_starts, self.span_counts)
            ]
            self.epoch, self.starts = epoch, generator.permutation(np.concatenate(spans))
        return self.starts[i] + inside


class Batches:
    """Iterator over batches. Row i of a batch does not depend on the number of ranks. A thread prefetches one batch."""

    def __init__(self, stream: TokenStream, cfg, ranks):
        self.stream, self.order, self.cfg, self.ranks = stream, RowOrder(stream, cfg), cfg, ranks
        for seq_len in (cfg.train_seq_len, *cfg.early_seq_lens):
            if (rows := cfg.train_batch_tokens // seq_len) % ranks.world:
                unit = self.order.span * ranks.world
                nearest_batch = max(1, round(cfg.train_batch_tokens / unit)) * unit
                raise InputError(
                    f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} is {rows} rows of {seq_len} tokens, which is not a "
                    f"multiple of {ranks.world} ranks; the nearest valid value is TRAIN_BATCH_TOKENS={nearest_batch}"
                )
        self.reader, self.micro_batch_tokens = ThreadPoolExecutor(1), cfg.micro_batch_tokens
        self.seek(0, stage(0.0, cfg).seq_len)

    def seek(self, step, seq_len):
        """Continue with the batch of `step`, in rows of `seq_len` tokens."""
        self.step, self.seq_len = step, seq_len
        rows = self.cfg.train_batch_tokens // seq_len // self.ranks.world
        # the fewest micro steps whose rows fit into a micro batch
        self.micro_steps = next(
            n for n in range(1, rows + 1) if rows % n == 0 and rows // n * seq_len <= self.micro_batch_tokens
        )
        self.pending = self.reader.submit(self.load, step, seq_len, self.micro_steps)

    def load(self, step, seq_len, micro_steps) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank for a step, int64 (micro_steps, B, T) on the device."""
        total = self.cfg.train_batch_tokens // seq_len
        rows = self.ranks.shard(range(step * total, (step + 1) * total))
        sequences = [self.stream.read(self.order(row * seq_len), seq_len + 1) for row in rows]
        tokens = torch.from_numpy(np.stack(sequences)).view(micro_steps, -1, seq_len + 1)
        if self.ranks.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.ranks.device, non_blocking=True)
        return tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()

    def settle(self):
        """Wait for the prefetch, so that no training data is read while the clock is paused or after training."""
        if not self.pending.cancel():
            self.pending.exception()  # waits for the read that has started

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.pending.cancelled():
            self.seek(self.step, self.seq_len)
        batch = self.pending.result()
        self.seek(self.step + 1, self.seq_len)
        return batch


# ---- Model: token ids -> loss of each target.
# B sequences, T tokens, D model width, H query heads, K key/value heads, C head width, V vocabulary. Arguments and
# results of modules and attention functions are tensors. Weights are fp32; activations have the dtype of the input.


class Linear(nn.Module):
    """y = scale * (x W^T), no bias. LoRA and FisherStats set output_hook(x, y), whose result replaces y = x W^T."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))  # set by `init_weights`
        self.output_hook: Callable | None = None

    def forward(self, x, scale=None):
        if self.output_hook is None:  # scaling the weight is cheaper than scaling (B, T, D) outputs
            weight = self.weight if scale is None else scale[:, None] * self.weight
            return F.linear(x, weight.type_as(x))
        y = self.output_hook(x, F.linear(x, self.weight.type_as(x)))
        return y if scale is None else scale.type_as(x) * y


class Embedding(Linear):
    """An embedding table (rows, dim). It is a Linear, so that `project` can apply the same weight as the tied head."""

    def __init__(self, rows, dim):
        super().__init__(dim, rows)

    def forward(self, ids):
        return F.embedding(ids, self.weight)

    def project(self, x):
        return super().forward(x)


def full_param(value, *shape) -> nn.Parameter:
    """A parameter that starts with one value everywhere."""
    return nn.Parameter(torch.full(shape, value))


def norm(x, scale: Tensor | float = 1.0) -> Tensor:
    """RMS norm over the last dim, times `scale`, computed in fp32."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))  # float64 stays float64
    # the epsilon of fp32: bf16's epsilon, 8e-3, would exceed the embedding's initial mean square of 2.5e-5
    inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1.1920929e-07)
    return (x32 * (scale * inverse)).type_as(x)


def rotary_tables(seq_len, dims, base) -> Tensor:
    """cos and sin of position * base**(-2j/dims), (2, T, 1, dims/2) in fp32, since bf16 rounds positions above 256."""
    rates = base ** (-torch.arange(0, dims, 2).double() / dims)
    angles = torch.outer(torch.arange(seq_len).double(), rates)[:, None]
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first dims of x (B, T, H, C); the other dims are unchanged (arXiv:2104.09864)."""
    r = cos.size(-1)
    x1, x2, rest = x.split((r, r, x.size(-1) - 2 * r), dim=-1)
    return torch.cat(((x1 * cos + x2 * sin).type_as(x), (x2 * cos - x1 * sin).type_as(x), rest), dim=-1)


class Documents(NamedTuple):
    """Document boundaries of a batch, for both kinds of attention kernels."""

    mask: Tensor  # (B, 1, T, T) bool: causal, within one document
    cu_seqlens: Tensor  # int32 (N + 1,): cumulative document lengths of the flattened batch (B * T)


def find_documents(ids) -> Documents:
    """Documents of ids (B, T), split at BOS. `cu_seqlens` has a static number of boundaries, one per 32 tokens; surplus
    boundaries are dropped there, not in `mask`.
    """
    starts, document = F.pad(ids[:, 1:] == BOS, (1, 0)), (ids == BOS).cumsum(1)
    inner = torch.nonzero_static(starts.flatten(), size=ids.numel() // 32, fill_value=0).flatten()
    rows = torch.arange(0, ids.numel() + 1, ids.size(1), device=ids.device)
    mask = (document[:, None, :, None] == document[:, None, None]).tril()
    return Documents(mask, torch.cat((rows, inner)).sort().values.int())


def attend_sdpa(q, k, v, documents=None, scale=None):
    """Causal attention by PyTorch. q: (B, T, H, C); k, v: (B, T, K, C), H a multiple of K. Returns (B, T, H, C)."""
    mask = None if documents is None else documents.mask
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.is_cuda and (q.dtype == torch.float32 or mask is not None):
        # only the memory-efficient kernel avoids (T, T) scores here, and it needs equal numbers of heads
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return y.transpose(1, 2)


def attend_flash(kernels, q, k, v, documents=None, scale=None):
    """Causal attention by FlashAttention. `kernels` is (flash_attn_func, flash_attn_varlen_func)."""
    dense, variable_length = kernels
    if documents is None:
        y = dense(q, k, v, softmax_scale=scale, causal=True)
    else:
        lengths = (documents.cu_seqlens, documents.cu_seqlens, q.size(1), q.size(1))
        y = variable_length(*(t.flatten(0, 1) for t in (q, k, v)), *lengths, softmax_scale=scale, causal=True)
    return (y[0] if isinstance(y, tuple) else y).view(q.shape)  # some versions also return the log-sum-exp


def attend_padded(attend, q, k, v, documents=None):
    """`attend` for kernels that need a head width divisible by 8: pads C with zeros and keeps its softmax scale."""
    channels = q.size(-1)
    q, k, v = (F.pad(t, (0, -channels % 8)) for t in (q, k, v))
    return attend(q, k, v, documents, scale=channels**-0.5)[..., :channels]


def exclude_own_value(y, v):
    """Exclusive self-attention (XSA, PR #265): subtract from each head's output y (B, T, H, C) its projection onto the
    token's own value vector v (B, T, K, C).
    """
    y, v = y.unflatten(2, (v.size(2), -1)), v.unsqueeze(3)
    # the clamp keeps a zero vector from dividing by zero; it is far below the square of any real value
    coefficient = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-24)
    return torch.addcmul(y, coefficient, v, value=-1).flatten(2, 3)


def project_heads(x, channels, *linears: Linear) -> list[Tensor]:
    """Outputs of several Linears for x (B, T, D) as heads (B, T, H, C), by one matrix product."""
    heads, counts = (-1, channels), [len(linear.weight) // channels for linear in linears]
    weight = torch.cat([linear.weight for linear in linears]).type_as(x)
    # split into heads before q, k and v are separated: Inductor then needs no kernel to join their gradients
    outputs = F.linear(x, weight).unflatten(-1, heads).split(counts, dim=2)
    return [
        y if linear.output_hook is None else linear.output_hook(x, y.flatten(2)).unflatten(-1, heads)
        for linear, y in zip(linears, outputs)
    ]


class SmearGate(nn.Module):
    """Blends each token with the previous one, per channel (PR #65); the first token of a document is unchanged."""

    def __init__(self, dim):
        super().__init__()
        self.gate = full_param(0.0, dim)

    def forward(self, x, ids):
        prev = F.pad(x[:, :-1], (0, 0, 1, 0))
        same_document = F.pad(ids[:, 1:] != BOS, (1, 0))[..., None]
        return x + same_document * self.gate.sigmoid().type_as(x) * (prev - x)


class BigramHashEmbedding(nn.Module):
    """Embedding of the hashed pair (previous token, token) (PR #65; linear hash: PR #1127)."""

    def __init__(self, cfg):
        super().__init__()
        self.buckets, self.hash = cfg.bigram_vocab_size, cfg.bigram_hash
        self.embed, self.proj = Embedding(self.buckets, cfg.bigram_dim), Linear(cfg.bigram_dim, cfg.model_dim)
        self.scale = full_param(cfg.bigram_scale_init) if cfg.bigram_scale_init else None

    def bucket(self, ids):
        """Bucket of each token (B, T). First tokens of rows and documents: last bucket, or previous token 0."""
        first = F.pad(ids[:, 1:] == BOS, (1, 0), value=True)
        prev = F.pad(ids[:, :-1], (1, 0)).masked_fill(first, 0)
        xor = (36313 * ids ^ 27191 * prev) % (self.buckets - 1)
        return dict(
            linear=(1009 * prev + ids) % self.buckets,
            xor=xor,
            reserved=xor.masked_fill(first, self.buckets - 1),
        )[self.hash]

    def forward(self, ids, dtype):
        y = self.proj(self.embed(self.bucket(ids)).to(dtype))
        return y if self.scale is None else self.scale * y


class ValueEmbedding(nn.Module):
    """A token embedding that several layers add to their values, each with its own scale (PR #374)."""

    def __init__(self, cfg):
        super().__init__()
        self.embed = Embedding(cfg.vocab_size, cfg.ve_dim)
        self.proj = Linear(cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim)
        self.scale = full_param(0.1)
        self.layer_scales = nn.ParameterDict({str(i): full_param(1.0, 1) for i in cfg.ve_layers})

    def forward(self, ids, dtype):
        shared = self.scale * self.proj(self.embed(ids).to(dtype))
        return {int(i): (scale * shared).to(dtype) for i, scale in self.layer_scales.items()}


class HeadGate(nn.Module):
    """A gate per head, computed from x, the first channels of the attention's input (arXiv:2505.06708):
    sigmoid(W x + b), or 2 sigmoid(W x) without a bias. Both start near 1.
    """

    def __init__(self, channels, heads, bias: bool):
        super().__init__()
        self.peak = 1.0 if bias else 2.0
        self.slope = full_param(0.0, heads, channels)
        self.bias = full_param(4.0, heads) if bias else None  # sigmoid(4) = 0.98

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        logits = F.linear(x[..., : self.slope.size(1)], self.slope.type_as(x), bias)
        return self.peak * logits.sigmoid()[..., None]


class CausalSelfAttention(nn.Module):
    """Grouped-query attention: QK-norm, head gains, partial RoPE (PR #315), XSA, head gate, value residual
    (arXiv:2410.17897).
    """

    def __init__(self, cfg, layer, attend: Callable):
        super().__init__()
        self.head_dim, self.attend = cfg.head_dim, attend
        self.exclusive = layer >= cfg.num_layers - cfg.xsa_last_n
        dim, kv_dim = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        self.c_q, self.c_k, self.c_v = Linear(dim, dim), Linear(dim, kv_dim), Linear(dim, kv_dim)
        self.proj = Linear(dim, dim)
        # number of head dims that each gain covers; a single gain broadcasts
        self.gain_spans = (cfg.rope_dims, cfg.head_dim - cfg.rope_dims) if cfg.qk_gains == 2 else (1,)
        self.q_gain = full_param(cfg.qk_gain_init, cfg.num_heads, cfg.qk_gains)
        self.value_mix = full_param(0.5, 2) if cfg.value_residual and layer else None
        gate_dims = dim if cfg.gated_attention else cfg.attn_gate_dims  # PR #490 or PR #1812
        self.gate = HeadGate(gate_dims, cfg.num_heads, bias=cfg.gated_attention) if gate_dims else None

    def forward(self, x, rotary, documents, value_embedding, v_first, scale):
        """Returns the update of the stream (B, T, D) and the values (B, T, K, C) before any mix, for later layers."""
        # QKV projections, split into heads: (B, T, H, C) and (B, T, K, C)
        q, k, v_raw = project_heads(x, self.head_dim, self.c_q, self.c_k, self.c_v)
        # QK-norm, a gain per query head (or two: rotary dims and the others), rotary embedding
        gains = zip(self.q_gain.split(1, dim=1), self.gain_spans)
        q = rotate(norm(q, torch.cat([gain.expand(-1, span) for gain, span in gains], dim=1)), *rotary)
        k, v = rotate(norm(k), *rotary), v_raw
        # values: token embedding and the first layer's values
        if value_embedding is not None:
            v = v + value_embedding.view_as(v)
        if self.value_mix is not None:
            mix_first, mix_own = self.value_mix.type_as(x)
            v = mix_first * v_first + mix_own * v
        # causal attention (B, T, H, C), XSA, head gate
        y = self.attend(q, k, v, documents)
        if self.exclusive:
            y = exclude_own_value(y, v)
        if self.gate is not None:
            y = y * self.gate(x)
        # output projection: (B, T, D)
        return self.proj(y.flatten(2), scale), v_raw


class MLP(nn.Module):
    """Two matrices around a squared activation (arXiv:2109.08668; leaky: PR #549; StarReLU: arXiv:2210.13452)."""

    def __init__(self, cfg):
        super().__init__()
        self.fc, self.proj = Linear(cfg.model_dim, cfg.mlp_dim), Linear(cfg.mlp_dim, cfg.model_dim)
        leaky_relu = partial(F.leaky_relu, negative_slope=cfg.mlp_negative_slope)
        self.activation = dict(leaky_relu=leaky_relu, silu=F.silu)[cfg.activation]
        self.scale = full_param(1.0, cfg.mlp_dim) if cfg.mlp_affine else None
        self.bias = full_param(0.0, cfg.mlp_dim) if cfg.mlp_affine else None

    def forward(self, x, scale):
        h = self.activation(self.fc(x), inplace=True).square()
        if self.scale is not None:
            h = self.scale.type_as(x) * h + self.bias.type_as(x)
        return self.proj(h, scale)


class Block(nn.Module):
    """Mixes the stream with the embedding x0, then adds attention and MLP. Inputs are scaled by depth (PR #315)."""

    def __init__(self, cfg, layer, attend: Callable):
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(cfg, layer, attend), MLP(cfg)
        passes = layer_order(cfg, True).count(layer)
        # a looped block adds to the stream `passes` times; a tensor, so that one compiled kernel serves all layers
        input_scale = torch.tensor((layer + 1) ** -cfg.ln_scale_power * passes**-0.5, device="cpu")
        self.register_buffer("input_scale", input_scale, persistent=False)
        self.parallel = layer >= cfg.parallel_residual_start >= 0
        self.attn_scale = full_param(1.0, cfg.model_dim)
        self.mlp_scale = full_param(1.0, cfg.model_dim)
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, cfg.model_dim))

    def forward(self, x, x0, rotary, documents, value_embedding, v_first):
        """Returns the stream after this block (B, T, D) and the values of its attention."""
        mix_x, mix_x0 = self.resid_mix.type_as(x)
        x = torch.addcmul(mix_x * x, mix_x0, x0)
        h = norm(x, self.input_scale)
        update, v_raw = self.attn(h, rotary, documents, value_embedding, v_first, self.attn_scale)
        after = x + update
        h = norm(x if self.parallel else after, self.input_scale)
        return after + self.mlp(h, self.mlp_scale), v_raw


def layer_order(cfg, looped: bool) -> list[int]:
    """Indices of the blocks in execution order. Looped: LOOP_START..LOOP_END run NUM_LOOPS more times (PR #1493)."""
    layers, stop = list(range(cfg.num_layers)), cfg.loop_end + 1
    again = layers[cfg.loop_start : stop] * cfg.num_loops if looped else []
    return layers[:stop] + again + layers[stop:]


class GPT(nn.Module):
    """U-Net GPT with a tied head. The first half of the passes stores skips; the second half reuses them in reverse."""

    def __init__(self, cfg, attend: Callable = attend_sdpa, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype, self.softcap, self.mask_documents = dtype, cfg.logit_softcap, cfg.document_attention
        self.order, self.looped_order = layer_order(cfg, False), layer_order(cfg, True)
        dim, skips = cfg.model_dim, len(self.looped_order) // 2
        self.tok_emb = Embedding(cfg.vocab_size, dim)
        self.embed_scale = full_param(1.0, dim) if cfg.embed_scale else None
        self.bigram = BigramHashEmbedding(cfg) if cfg.bigram_vocab_size else None
        self.smear = SmearGate(dim) if cfg.smear_gate else None
        self.value_embed = ValueEmbedding(cfg) if cfg.ve_layers else None
        self.blocks = nn.ModuleList(Block(cfg, i, attend) for i in range(cfg.num_layers))
        self.skip_weights = full_param(1.0, skips, dim)
        self.skip_gates = full_param(0.0, skips, dim) if cfg.skip_gates else None
        with torch.device("cpu"):
            tables = rotary_tables(max(cfg.train_seq_len, cfg.window), cfg.rope_dims or cfg.head_dim, cfg.rope_base)
        self.register_buffer("rotary", tables, persistent=False)

    @torch.no_grad()
    def init_weights(self, cfg):
        """Draws all matrices from SEED; gains, gates and mixes keep their first values.
        INIT=orthogonal (PR #65): gain 1 in blocks, 1/sqrt(2L) outside; attn.proj, mlp.proj, bigram.embed 0.
        INIT=default (PR #1127): uniform +-1/sqrt(fan_in); attn.proj, mlp.proj, bigram.proj 0; bigram.embed std 0.01.
        """
        generator = torch.Generator().manual_seed(cfg.seed)
        orthogonal = dict(orthogonal=True, default=False)[cfg.init]
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
                nn.init.normal_(p, std=stds[name], generator=generator)
            elif name.endswith(zeros):
                p.zero_()
            elif orthogonal:
                gain = 1.0 if "blocks" in name else (2 * cfg.num_layers) ** -0.5
                nn.init.orthogonal_(p, gain, generator=generator)
            else:
                bound = p.size(1) ** -0.5
                nn.init.uniform_(p, -bound, bound, generator=generator)

    def embed(self, ids):
        """Input of the first block (B, T, D) for ids (B, T): token and bigram embedding, norm, SmearGate."""
        x = self.tok_emb(ids)
        if self.embed_scale is not None:
            x = self.embed_scale * x
        x = x.to(self.dtype)  # before the norm, which saves its input for the backward pass
        x = norm(x if self.bigram is None else x + self.bigram(ids, self.dtype))
        return x if self.smear is None else self.smear(x, ids)

    def hidden(self, ids, looped=False, single_document=False):
        """Final normalized states (B, T, D) of ids (B, T). `single_document`: no row has a document boundary."""
        # embedding (B, T, D), which every block mixes in again, and value embeddings {layer: (B, T, K * C)}
        x = x0 = self.embed(ids)
        values = self.value_embed(ids, x.dtype) if self.value_embed is not None else {}
        # cos and sin (T, 1, pairs), and document boundaries
        rotary = self.rotary[:, : ids.size(1)].unbind()
        documents = find_documents(ids) if self.mask_documents and not single_document else None
        order = self.looped_order if looped else self.order
        skips, v_first = [], None
        for position, layer in enumerate(order):
            # second half: add or blend in a skip; with an odd number of passes none is left for the last
            skip_index = position - len(order) // 2
            if skip_index >= 0 and skips:
                weight, skip = self.skip_weights[skip_index].type_as(x), skips.pop()
                if self.skip_gates is None:
                    x = torch.addcmul(x, weight, skip)
                else:  # PR #1127
                    x = torch.lerp(weight * skip, x, self.skip_gates[skip_index].sigmoid().type_as(x))
            x, v_raw = self.blocks[layer](x, x0, rotary, documents, values.get(layer), v_first)
            v_first = v_raw if v_first is None else v_first
            if skip_index < 0:  # first half: store a skip
                skips.append(x)
        return norm(x)

    def logits(self, hidden, temperature=1.0):
        """Soft-capped fp32 logits (..., V) of final states (..., D)."""
        return self.softcap / temperature * torch.tanh(self.tok_emb.project(hidden).float() / self.softcap)

    def forward(self, ids, targets, looped=False, temperature=1.0, z_loss=0.0, single_document=False):
        """Cross-entropy in nats, fp32 (B, S), of targets (B, S) at the last S <= T positions of ids (B, T)."""
        hidden = self.hidden(ids, looped, single_document)[:, -targets.size(1) :]  # (B, S, D)
        logits = self.logits(hidden, temperature)  # (B, S, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        # z-loss keeps the log-partition near 0 (arXiv:2204.02311)
        return losses + z_loss * logits.logsumexp(-1).square() if z_loss else losses


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Role of each parameter by name: `matrix` of a Linear, `table` of an Embedding, `scalar` otherwise."""
    kinds = {Linear: "matrix", Embedding: "table"}
    return {
        name: kinds.get(type(model.get_submodule(name.rpartition(".")[0])), "scalar")
        for name, _ in model.named_parameters()
    }


# ---- Optimizer: gradients -> weights. Muon for matrices, sharded over ranks; AdamW for embeddings and scalars.

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # kellerjordan.github.io/posts/muon


def orthogonalize(g: Tensor, iterations) -> Tensor:
    """Newton-Schulz iteration that moves the singular values of each matrix in g (N, R, C) towards 1.

    Five iterations reach about [0.7, 1.2], which trains as well as exactly 1.
    """
    a, b, c = NEWTON_SCHULZ
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum SGD with orthogonalized updates. The matrices of a group form one stack (N, R, C), zero-padded to a
    multiple of the world size; each rank computes the updates of its part of the stack (PR #399).

    `lr` is the spectral norm of an update; tall matrices get sqrt(rows / cols) times more.
    """

    def __init__(self, groups: list[dict[str, Any]], ranks, cfg, dtype: torch.dtype):
        self.stacks = []
        for group in groups:
            first, count = group["params"][0], -(-len(group["params"]) // ranks.world)
            group["buffer"] = first.new_zeros(count, *first.shape)  # momentum, in the group for state_dict()
            comm_dtype = torch.float32 if ranks.world == 1 else dtype
            self.stacks.append(first.new_zeros(count * ranks.world, *first.shape, dtype=comm_dtype))
        super().__init__(groups, {})
        self.ranks = ranks

        def direction(grad, buffer, grad_scale, momentum):
            grad = (grad_scale * grad.float()).nan_to_num(0.0, 0.0, 0.0)
            buffer.mul_(momentum).add_(grad)
            update = grad + momentum * buffer  # Nesterov
            if cfg.muon_row_normalize:  # MuonEq-R, PR #1493
                update = F.normalize(update, dim=-1, eps=1e-7)
            return orthogonalize(update.to(dtype), cfg.muon_backend_steps)

        def apply(params, updates, scale, lr, decay):
            rows, columns = params[0].shape
            rate = scale * (lr * max(1.0, rows / columns) ** 0.5)
            torch._foreach_mul_(params, 1 - scale * (lr * decay))
            torch._foreach_sub_(params, list(rate * updates[: len(params)].float()))

        self.direction, self.apply = ranks.compile(direction, cfg), ranks.compile(apply, cfg)

    def start_reduce_scatter(self) -> list[tuple[Callable, Tensor]]:
        """Start a reduce-scatter of the gradients. Returns (wait, this rank's part of the sum) for each group."""
        pending = []
        for group, stack in zip(self.param_groups, self.stacks):
            torch._foreach_copy_(list(stack[: len(group["params"])]), [p.grad for p in group["params"]])
            pending.append(self.ranks.reduce_scatter(stack))
        return pending

    def start_all_gather(self, grads: list[Tensor], grad_scale, momentum) -> list:
        """Compute this rank's updates and start an all-gather. Returns (wait, updates of all) for each group."""
        return [
            self.ranks.all_gather(self.direction(grad, group["buffer"], grad_scale, momentum))
            for group, grad in zip(self.param_groups, grads)
        ]

    def apply_updates(self, pending: list[tuple[Callable, Tensor]], scale):
        """Apply weight decay and the gathered updates, at `scale` times the peak rates."""
        for group, (wait, updates) in zip(self.param_groups, pending):
            wait()
            self.apply(group["params"], updates, scale, group["lr"], group["weight_decay"])


def peak_rate_and_decay(name: str, role: str, cfg) -> tuple[float, float]:
    """Peak learning rate and weight decay of a parameter. The decoder half has its own rate factor (PR #1127)."""
    rate, decay = dict(
        matrix=(cfg.matrix_lr, cfg.muon_wd),
        table=(cfg.tied_embed_lr, cfg.embed_wd),
        scalar=(cfg.scalar_lr, cfg.adam_wd),
    )[role]
    if role == "matrix" and ".mlp." in name and cfg.muon_wd_mlp >= 0:
        decay = cfg.muon_wd_mlp
    if name.startswith("blocks.") and int(name.split(".")[1]) >= cfg.num_layers // 2:
        rate *= cfg.decoder_lr_mult
    return rate, decay


class Optimizers:
    """Muon and AdamW. A step averages the gradients over ranks, clips their global norm and updates all weights."""

    def __init__(self, model: GPT, ranks, cfg):
        muon, adam = {}, {}
        for name, role in parameter_roles(model).items():
            p, (rate, decay) = model.get_parameter(name), peak_rate_and_decay(name, role, cfg)
            groups, kind = (muon, p.shape) if role == "matrix" else (adam, role)
            # lr is the peak for Muon; AdamW's is set to base_lr * scale in each step
            group = groups.setdefault((kind, rate, decay), dict(params=[], lr=rate, base_lr=rate, weight_decay=decay))
            group["params"].append(p)
        # largest group first: its transfers overlap with the work on the others
        muon_groups = sorted(muon.values(), key=lambda group: -sum(p.numel() for p in group["params"]))
        adam_groups = list(adam.values())
        self.muon = Muon(muon_groups, ranks, cfg, model.dtype)
        self.adam = torch.optim.AdamW(adam_groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        self.adam_params = [p for group in adam_groups for p in group["params"]]
        # made now, not in the first step, so that warm-up sees all memory and a checkpoint can be copied into them
        for p in self.adam_params:
            self.adam.state[p] = dict(
                step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
            )
        self.ranks, self.clip = ranks, cfg.grad_clip_norm or math.inf

    @torch.no_grad()
    def step(self, scale, momentum) -> Tensor:
        """One step at `scale` times the peak rates. Returns the norm of the averaged gradient before clipping.

        A NaN gradient counts as 0: the weights stay finite until the host sees the NaN loss one step later.
        """
        # sum the gradients over ranks
        pending = self.muon.start_reduce_scatter()
        adam_grads = [p.grad for p in self.adam_params]
        flat = self.ranks.sum_(nn.utils.parameters_to_vector(adam_grads))
        for wait, _ in pending:
            wait()
        muon_grads = [part for _, part in pending]
        # norm of the mean gradient (the gradients are sums over ranks), and clip
        squares = torch.stack(torch._foreach_norm(muon_grads, dtype=torch.float32)).square().sum()
        grad_norm = (self.ranks.sum_(squares) + flat.square().sum()).sqrt() / self.ranks.world
        grad_scale = (self.clip / (grad_norm + 1e-6)).clamp(max=1.0) / self.ranks.world
        # AdamW runs while Muon's updates are gathered; its clipped mean gradients are written back first
        pending = self.muon.start_all_gather(muon_grads, grad_scale, grad_scale.new_full((), momentum))
        nn.utils.vector_to_parameters((grad_scale * flat).nan_to_num_(0.0, 0.0, 0.0), adam_grads)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * scale
        self.adam.step()
        self.muon.apply_updates(pending, grad_scale.new_full((), scale))  # a tensor: a number would recompile
        return grad_norm


# ---- Schedules and averaging. Schedules are pure functions of step, seconds and options.


def fraction_done(step, elapsed, cfg) -> float:
    """Fraction of training that is done, by steps or by time, whichever is larger."""
    return max(step / cfg.iterations, elapsed / cfg.time_limit)


def lr_scale(step, elapsed, step_seconds, cfg) -> float:
    """Learning rate as a fraction of the peak: 1, then linear towards 0 at the end of training, at least MIN_LR."""
    steps_left = min(cfg.iterations - step, (cfg.time_limit - elapsed) / max(step_seconds, 1e-9))
    by_steps = steps_left / cfg.warmdown_iters if cfg.warmdown_iters else 1.0
    by_fraction = (1 - fraction_done(step, elapsed, cfg)) / cfg.warmdown_frac if cfg.warmdown_frac else 1.0
    return min(1.0, max(cfg.min_lr, min(by_steps, by_fraction)))


def schedule_warnings(step_seconds, cfg) -> list[str]:
    """Warnings about schedules that do not fit the number of steps expected at this speed."""
    expected = cfg.time_limit / step_seconds - 1 if step_seconds else math.inf  # out_of_time() keeps one in reserve
    steps = max(1, int(min(cfg.iterations, expected)))
    scales = [lr_scale(step, step * step_seconds, step_seconds, cfg) for step in range(steps)]
    texts = []
    if steps < cfg.warmdown_iters:
        texts.append(
            f"about {steps} steps fit, fewer than WARMDOWN_ITERS={cfg.warmdown_iters}: the learning rate starts at "
            f"{100 * scales[0]:.0f} % of its peak; set WARMDOWN_ITERS=0 WARMDOWN_FRAC=0.4, or give one GPU the "
            "time of eight, MAX_WALLCLOCK_SECONDS=4800"
        )
    if cfg.late_qat_threshold and min(scales) >= cfg.late_qat_threshold:
        texts.append(
            f"in about {steps} steps the rate never falls below LATE_QAT_THRESHOLD={cfg.late_qat_threshold}, so late "
            "QAT never starts; set WARMDOWN_FRAC or WARMDOWN_ITERS, or LATE_QAT_THRESHOLD=0"
        )
    if not any(average_weight(step + 1, scale, 0, cfg) for step, scale in enumerate(scales)):
        texts.append(
            f"in about {steps} steps SWA takes no snapshot; lower SWA_EVERY={cfg.swa_every} or raise "
            f"SWA_START_SCALE={cfg.swa_start_scale}"
        )
    return texts


class Stage(NamedTuple):
    """A sequence length, and whether layers loop."""

    seq_len: int
    looped: bool


def stage(done, cfg) -> Stage:
    """The stage at a fraction of training: the sequence length grows (PR #2014), looping is switched on once."""
    lengths = *cfg.early_seq_lens, cfg.train_seq_len
    passed = sum(done >= end for end in cfg.early_seq_ends)
    return Stage(lengths[passed], cfg.num_loops > 0 and done >= cfg.enable_looping_at)


def stages(cfg) -> list[Stage]:
    """All stages of a run, in order."""
    return list(dict.fromkeys(stage(done, cfg) for done in sorted((0.0, *cfg.early_seq_ends, cfg.enable_looping_at))))


def out_of_time(elapsed, step_seconds, cfg) -> bool:
    """Whether the next step could end after the limit: two steps, since the previous one may still be running."""
    return cfg.time_limit < elapsed + 2 * step_seconds


def muon_momentum(step, elapsed, scale, cfg) -> float:
    """Momentum with a linear warm-up by steps or by progress, and a cooldown with the rate (PR #1812)."""
    progress = step / cfg.muon_momentum_warmup_steps if cfg.muon_momentum_warmup_steps else 1.0
    if cfg.muon_momentum_warmup_frac:
        progress = fraction_done(step, elapsed, cfg) / cfg.muon_momentum_warmup_frac
    progress, keep = min(1.0, progress), max(scale, cfg.muon_momentum_cooldown)
    warm = (1 - progress) * cfg.muon_momentum_warmup_start + progress * cfg.muon_momentum
    return keep * warm + (1 - keep) * cfg.muon_momentum_warmup_start


def average_weight(step, scale, updates, cfg) -> float:
    """Weight of the model in the average after `step`: EMA 1 - decay, SWA 1/n at the n-th snapshot, last 1."""
    snapshot = scale < cfg.swa_start_scale and step % cfg.swa_every == 0
    return dict(ema=1 - cfg.ema_decay, swa=1 / (updates + 1) if snapshot else 0.0, last=1.0)[cfg.averaging]


@contextmanager
@torch.no_grad()
def swap_parameters(params: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Inside the context, the parameters hold `values`, also for backward passes; then the old values are restored."""
    saved = [p.clone() for p in params]
    try:
        torch._foreach_copy_(params, values)
        yield
    finally:
        torch._foreach_copy_(params, saved)


class Average:
    """average += weight * (model - average), in fp32: one recurrence for EMA and SWA. `count`: number of updates."""

    def __init__(self, model: nn.Module):
        self.source = list(model.parameters())
        self.values = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        self.count = 0

    @torch.no_grad()
    def update(self, weight):
        if weight:
            torch._foreach_lerp_(list(self.values.values()), [p.float() for p in self.source], weight)
            self.count += 1

    def swapped_in(self) -> AbstractContextManager[None]:
        """Inside the context, the model has the averaged weights."""
        return swap_parameters(self.source, list(self.values.values()))


# ---- Training: batches -> averaged weights and GPTQ statistics, within the wallclock budget.


class TrainingFailed(InputError):
    """A failure during or after training, raised by all ranks together."""


class Diverged(TrainingFailed):
    """A NaN or infinite loss."""


class Interrupted(KeyboardInterrupt):
    """A signal to any rank, raised by all ranks at once."""


class Trainer:
    """The state that an optimizer step reads and writes. Warm-up, training and tests call the same `step`."""

    def __init__(self, model: GPT, batches: Batches, cfg, ranks):
        self.model, self.batches, self.cfg, self.ranks = model, batches, cfg, ranks
        self.optimizers, self.average = Optimizers(model, ranks, cfg), Average(model)
        self.compiled, self.qat, self.looped = ranks.compile(model, cfg), False, False
        # [steps, seconds] at the end of each part of a run that was resumed; the last one counts up
        self.stop, self.parts = False, [[0, 0.0]]

    def on_signal(self, *_):
        """Stop training before the next step, on all ranks; a second signal stops this process at once."""
        self.stop = True
        on_signals(signal.default_int_handler)
        if self.ranks.is_main:
            write_stderr("train_gpt.py: stopping after this step; press Ctrl-C again to stop now\n")

    def forward(self, ids, targets) -> Tensor:
        """Losses (B, T) of the current model, looped or not."""
        return self.compiled(ids, targets, self.looped)

    def gradients(self) -> Tensor:
        """Add up this rank's gradients of the next batch. Returns the mean loss of its rows."""
        ids, targets = next(self.batches)  # (micro steps, B, T)
        loss = torch.zeros((), device=self.ranks.device)
        with on_export_grid(self.model, self.cfg) if self.qat else nullcontext():
            for x, y in zip(ids, targets):  # gradient accumulation
                micro_loss = self.forward(x, y).mean() / len(ids)
                micro_loss.backward()
                loss += micro_loss.detach()
        return loss

    def step(self, scale, momentum) -> AsyncScalar:
        """One optimizer step at `scale` times the peak rates. Returns the loss of the global batch before the step."""
        loss = self.gradients()
        grad_norm = self.optimizers.step(scale, momentum)
        self.model.zero_grad(set_to_none=True)
        loss = self.ranks.sum_(loss) / self.ranks.world
        # a NaN or infinite gradient is reported as the loss
        return AsyncScalar(loss.where(grad_norm.isfinite(), grad_norm))

    @contextmanager
    def fisher_stats(self) -> Iterator[dict[str, FisherStats]]:
        """Inside the context, FisherStats by name collect statistics of each weight that will be quantized."""
        modules = {f"{n}.weight": m for n, m in self.model.named_modules() if isinstance(m, Linear)}
        specs = quant_specs(self.model, self.cfg)
        stats = {name: FisherStats(modules[name]) for name, spec in specs.items() if spec.bits < 16}
        try:
            yield stats
        finally:
            for each in stats.values():
                each.remove()

    def collect(self):
        """Feed one batch to the FisherStats: a forward pass and, if MEAN_SCALE needs gradients, a backward pass."""
        # limits memory: this pass is not compiled
        rows = max(1, min(16_384, self.batches.micro_batch_tokens // 4) // self.cfg.train_seq_len)
        ids, targets = (t.flatten(0, 1).split(rows) for t in next(self.batches))
        with torch.set_grad_enabled(self.cfg.mean_scale > 0):
            for x, y in zip(ids, targets):
                loss = self.model(x, y, self.looped).sum()
                if loss.requires_grad:
                    loss.backward()
        self.model.zero_grad(set_to_none=True)

    def switch(self, step, done, scale, log):
        """Start late QAT, looping and the next sequence length at their times."""
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

    def select(self, graph, step):
        """Continue at `step` with a graph: a Stage, and whether late QAT has started."""
        (seq_len, self.looped), self.qat = graph
        self.batches.seek(step, seq_len)

    def warm_up(self, log) -> float:
        """Find a micro batch that fits, run WARMUP_STEPS of each graph, and restore the state. Returns the seconds of
        the last step, or 0.
        """
        cfg, stateful, seconds = self.cfg, (self.model, self.optimizers.muon, self.optimizers.adam), 0.0
        states, first_batch = copy.deepcopy([each.state_dict() for each in stateful]), self.batches.step
        before = Stage(self.batches.seq_len, self.looped), self.qat
        qat_modes = (True, False) if cfg.late_qat_threshold else (False,)
        graphs = [*product(reversed(stages(cfg)), qat_modes)] * (cfg.warmup_steps > 0)  # last: the first stage

        def attempt(rows):
            self.batches.micro_batch_tokens = rows * cfg.train_seq_len
            for graph in graphs:
                self.model.zero_grad(set_to_none=True)
                self.select(graph, first_batch)
                self.gradients()
            self.model.zero_grad(set_to_none=True)

        self.ranks.fit_batch("MICRO_BATCH_TOKENS", cfg.micro_batch_tokens, attempt, log, cfg.train_seq_len)
        for graph in graphs:
            self.select(graph, first_batch)
            for i in range(cfg.warmup_steps):
                begin = perf_counter()
                self.step(1.0, cfg.muon_momentum).value()
                seconds = perf_counter() - begin if i else 0.0  # the first step compiles
                log(
                    f"warmup_step:{i + 1}/{cfg.warmup_steps} late_qat:{int(self.qat)} looped:{int(self.looped)} "
                    f"train_seq_len:{self.batches.seq_len} compiled:{int(self.ranks.compiles(cfg))}"
                )
        for each, state in zip(stateful, states):
            each.load_state_dict(state)
        self.select(before, first_batch)
        log.fact(grad_accum_steps=self.batches.micro_steps)
        return seconds


def checkpoint_tensors(trainer: Trainer, kind: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: the `average`, or the `state`, all that the next step depends on. Training
    draws no random numbers. All ranks call it, since the state has Muon's momentum of all ranks.
    """
    tensors, optimizers = dict(trainer.average.values), trainer.optimizers
    if kind == "average":
        return tensors
    tensors |= {f"raw {name}": p.detach() for name, p in trainer.model.named_parameters()}
    for i, p in enumerate(optimizers.adam_params):
        tensors |= {f"adam {i} {key}": value for key, value in optimizers.adam.state[p].items()}
    for i, group in enumerate(optimizers.muon.param_groups):
        wait, stack = trainer.ranks.all_gather(group["buffer"])
        wait()
        tensors[f"muon {i}"] = stack[: len(group["params"])]
    return tensors


def save_checkpoint(trainer: Trainer, kind: str, log):
    """Write a checkpoint, whole or not at all, unless it is NaN or infinite. All ranks call it for a `state`."""
    cfg, updates, begin = trainer.cfg, trainer.average.count, perf_counter()
    path, tensors = cfg.checkpoint_path(kind), checkpoint_tensors(trainer, kind)
    if not log.active or kind == "average" and not updates:
        return
    tensors = {name: x.cpu() for name, x in tensors.items()}
    if not all(x.isfinite().all() for x in tensors.values()):
        return log.warn(f"the weights are NaN or infinite, so {path} was not written")
    with log.ignoring_write_errors(path):
        blob = pack(
            tensors,
            trainer.looped,
            replace(cfg, compressor="zstd", zstd_level=1),
            run=as_env(vars(cfg)),
            parts=trainer.parts,
            updates=updates,
        )
        publish(path, "average", blob, cfg)
        log(f"checkpoint:{path} step:{trainer.parts[-1][0]} bytes:{len(blob)} seconds:{perf_counter() - begin:.1f}")


def load_checkpoint(trainer: Trainer, kind: str):
    """Continue from a checkpoint, with any number of ranks. Raises InputError if it does not belong to the model."""
    average, ranks, cfg = trainer.average, trainer.ranks, trainer.cfg
    path = cfg.checkpoint_path(kind)
    own = checkpoint_tensors(trainer, kind)
    try:
        header, tensors = unpack(path.read_bytes(), lambda *_: {n: ("float32", tuple(x.shape)) for n, x in own.items()})
        for name, x in own.items():
            x.copy_(tensors[name])
    except (InputError, LookupError) as error:
        raise InputError(f"checkpoint {path}: {error}") from None
    steps, seconds = header["parts"][-1]
    trainer.parts = [*header["parts"], [steps, seconds]]
    # late QAT and the sequence length follow from the schedules
    average.count, trainer.looped = header["updates"], header["looped"]
    trainer.batches.seek(steps, stage(fraction_done(steps, seconds, cfg), cfg).seq_len)
    if kind == "average":
        trainer.model.load_state_dict(average.values)
        return
    for i, group in enumerate(trainer.optimizers.muon.param_groups):
        mine = tensors[f"muon {i}"][ranks.rank * len(group["buffer"]) :][: len(group["buffer"])]
        group["buffer"][: len(mine)] = mine  # the rest is padding


def due(step, every) -> bool:
    """Whether `step` is a positive multiple of `every`; never if `every` is 0."""
    return step > 0 and every > 0 and step % every == 0


def timing(step, seconds) -> str:
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"


def report_step(step, seconds, reading: AsyncScalar, cfg, log):
    """Log the first ten steps and every TRAIN_LOG_EVERY-th step. Raises Diverged for a NaN or infinite loss."""
    loss = reading.value()
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step}; lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR")
    if step <= 10 or step % cfg.train_log_every == 0:
        log(f"step:{step}/{cfg.iterations} train_loss:{loss:.4f} {timing(step, seconds)}")


def report_end(steps, seconds, cfg, log):
    """Log the end of training, with a warning if it exceeded the limit."""
    over = max(0.0, seconds - (cfg.max_wallclock_seconds or math.inf))
    log(f"training ended: step:{steps}/{cfg.iterations} {timing(steps, seconds)}")
    log.facts |= dict(iterations=cfg.iterations, steps=steps, train_seconds=seconds, train_over_limit_seconds=over)
    if over:
        log.warn(f"training took {over:.3f} s more than MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g}")


def calibrate(trainer: Trainer, clock: Clock, log) -> dict[str, Curvature]:
    """Curvature of each weight of the averaged model, from as many batches as the time limit allows, perhaps none."""
    ranks, count = trainer.ranks, trainer.cfg.gptq_calibration_batches
    limit = trainer.cfg.max_wallclock_seconds or math.inf
    # maximum over ranks, so that all leave the loop together; at first, a training step's time is used
    elapsed, slowest = ranks.maximum(clock.seconds(), clock.step_seconds)
    used = 0
    with trainer.average.swapped_in(), trainer.fisher_stats() as stats:
        while used < count and elapsed + 2 * slowest < limit:  # time for one more batch and the sums over ranks
            before = elapsed
            trainer.collect()
            clock.synchronize()
            (elapsed,) = ranks.maximum(clock.seconds())
            # the first batch loads kernels, so the time of the second batch replaces its time
            slowest = max(slowest, elapsed - before) if used > 1 else elapsed - before
            used += 1
    log(f"gptq:collected {sum(s.count > 0 for s in stats.values())} Hessians from {used} of {count} batches")
    if not used:
        log.warn("no time was left for calibration, so GPTQ rounds to nearest; raise GPTQ_RESERVE_SECONDS")
        return {}
    return {name: curvature(each, ranks) for name, each in stats.items()}


def train(trainer: Trainer, validate: Callable[[], Score], log) -> dict[str, Curvature]:
    """Train until ITERATIONS or the time limit; the result is `trainer.average`. Returns the curvatures for GPTQ."""
    cfg, ranks, average = trainer.cfg, trainer.ranks, trainer.average
    (first_step,) = ranks.maximum(trainer.warm_up(log))
    steps, seconds = trainer.parts[-1]
    on_signals(trainer.on_signal)
    pending = None  # (steps done, seconds, loss) of the last step; reported while the next one runs
    clock = Clock(ranks.device, first_step, seconds)
    for step in range(steps, 0 if cfg.resumed == "average" else cfg.iterations):
        # all ranks agree on the time, and on whether to stop
        elapsed, step_seconds, stop = ranks.maximum(clock.seconds(), clock.step_seconds, trainer.stop)
        trainer.parts[-1] = [step, elapsed]
        if pending and (stop or due(step, cfg.checkpoint_every)):
            save_checkpoint(trainer, "state", log)
        if stop:
            raise Interrupted
        if step and out_of_time(elapsed, step_seconds, cfg):
            log(f"stopping_early: wallclock_cap {timing(step, elapsed)} step:{step}/{cfg.iterations}")
            break
        if step == (0 if first_step else 10):  # warm-up has timed a step, or ten steps have run
            log.warn(*schedule_warnings(step_seconds, cfg))
        # validation, off the clock
        if due(step, cfg.val_loss_every):
            trainer.batches.settle()
            with clock.paused():
                log(f"step:{step}/{cfg.iterations} {validate()} {timing(step, elapsed)}")
        # schedules and one optimizer step
        scale = lr_scale(step, elapsed, step_seconds, cfg)
        trainer.switch(step, fraction_done(step, elapsed, cfg), scale, log)
        reading = trainer.step(scale, muon_momentum(step, elapsed, scale, cfg))
        # report the previous step, which has ended
        if pending:
            report_step(*pending, cfg, log)
        clock.lap()
        pending = step + 1, clock.seconds(), reading
        # this loss is of the newest weights in the average; save before this step's are added
        if due(step, cfg.checkpoint_every) and math.isfinite(reading.value()):
            save_checkpoint(trainer, "average", log)
        average.update(average_weight(step + 1, scale, average.count, cfg))
    if pending:
        report_step(*pending, cfg, log)
        steps = pending[0]
    trainer.parts[-1] = [steps, clock.seconds()]
    if pending and due(steps, cfg.checkpoint_every):
        save_checkpoint(trainer, "average", log)
    if not average.count:
        average.update(1.0)
        log(f"averaging: {cfg.averaging} took no snapshot; the last weights are used")
    log(f"averaging:{cfg.averaging} updates:{average.count}{ranks.memory()}")
    # GPTQ statistics, on the clock
    curvatures = calibrate(trainer, clock, log) if cfg.calibrated else {}
    trainer.batches.settle()
    clock.synchronize()
    seconds, stop = ranks.maximum(clock.seconds(), trainer.stop)
    report_end(steps, seconds, cfg, log)
    if stop:
        raise Interrupted
    return curvatures


# ---- Evaluation: stream and model -> chunks with final scores -> bits per byte. Only the Scorer holds the stream.


class ByteTable(NamedTuple):
    """UTF-8 bytes of each token id: `base`, plus 1 for a `space` piece unless the previous token is a `boundary`."""

    base: Tensor
    space: Tensor
    boundary: Tensor

    def count(self, prev: Tensor, targets) -> Tensor:
        """Bytes of each target given its previous token, int64, by the contest's rule."""
        return self.base[targets] + (self.space[targets] & ~self.boundary[prev])


PROBE = (  # all of ASCII, longer UTF-8 characters and a line end
    "A fox of 1990 jumps\nover the lazy dog's end. ! \" # $ % & ' ( ) * + , - . / 0123456789 : ; < = > ? @ [ \\ ] ^ _ "
    "` { | } ~ ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz \u00e9\u6f22\U0001f600"
)
CASE_MARKS = "\ue001\ue002\ue003\ue004"  # characters that mark capitals in text of a case tokenizer (PR #1729)


def load_tokenizer(cfg) -> Any:
    """The SentencePiece model at TOKENIZER_PATH. Raises InputError if its size is not VOCAB_SIZE."""
    from sentencepiece import SentencePieceProcessor

    path = Path(cfg.tokenizer_path)
    if not path.is_file():
        raise InputError(f"no tokenizer at TOKENIZER_PATH={path}; create it with {data_command(cfg)}")
    try:
        sp = SentencePieceProcessor(model_proto=path.read_bytes())
        "".join(map(sp.id_to_piece, range(sp.vocab_size())))  # raises if a piece is not UTF-8
    except (RuntimeError, OSError, ValueError, IndexError):
        raise InputError(f"TOKENIZER_PATH={path} is not a SentencePiece model or is damaged; get it again") from None
    if sp.vocab_size() != cfg.vocab_size:
        raise InputError(f"TOKENIZER_PATH={path} has {sp.vocab_size()} pieces, but VOCAB_SIZE={cfg.vocab_size}")
    return sp


def check_piece(piece: str, is_byte: bool, cfg):
    """Raises InputError for a piece that the contest's byte rule would miscount."""
    if "\u2581" in piece[1:] or is_byte and not re.fullmatch("<0x[0-9A-F]{2}>", piece):
        raise InputError(
            f"TOKENIZER_PATH={cfg.tokenizer_path} has the piece {piece!r}, which the byte rule would miscount: a "
            "space may only begin a piece; train it with split_by_whitespace and without whitespace suffixes"
        )


def load_byte_table(cfg) -> ByteTable:
    """Byte counts of the tokenizer's pieces. Control, unknown and unused pieces are boundaries with 0 bytes."""
    sp = load_tokenizer(cfg)
    base, space, boundary = (np.full(cfg.vocab_size, start) for start in (0, False, True))
    for i in range(cfg.vocab_size):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        piece, boundary[i] = sp.id_to_piece(i).translate(dict.fromkeys(map(ord, CASE_MARKS))), False
        check_piece(piece, sp.is_byte(i), cfg)
        space[i] = piece.startswith("\u2581") and not sp.is_byte(i)
        base[i] = 1 if sp.is_byte(i) else len(piece[int(space[i]) :].encode())
    table = ByteTable(*map(torch.from_numpy, (base, space, boundary)))
    ids = torch.tensor([BOS, *sp.encode(PROBE)])
    counted, length = int(table.count(ids[:-1], ids[1:]).sum()), len(PROBE.encode())
    if sp.bos_id() != BOS:
        raise InputError(f"TOKENIZER_PATH={cfg.tokenizer_path} has BOS {sp.bos_id()}, not {BOS}; use another tokenizer")
    if counted > length:
        raise InputError(
            f"the pieces of TOKENIZER_PATH={cfg.tokenizer_path} count {counted} bytes for a text of {length}; train it "
            "with `data/prepare.py tokenize`"
        )
    return table


def target_bytes(stream: Array, cfg) -> Tensor:
    """UTF-8 bytes of each target, int64 (N-1,), by the tokenizer's pieces. For a tokenizer with case marks they come
    from fineweb_val_bytes_*.bin: bytes of the original text of each token, 0 for BOS.
    """
    sp, paths = load_tokenizer(cfg), sorted(Path(cfg.data_path).glob("fineweb_val_bytes_*.bin"))
    tokens = torch.from_numpy(stream.astype(np.int64))
    by_piece = load_byte_table(cfg).count(tokens[:-1], tokens[1:])
    total = int(by_piece.sum())
    if total == 0:
        raise InputError(f"the validation split in DATA_PATH={cfg.data_path} has no text: its tokens have no bytes")
    if not set(CASE_MARKS).intersection("".join(map(sp.id_to_piece, range(cfg.vocab_size)))):
        return by_piece
    remedy = "create it with `data/prepare.py tokenize --case`"
    counts = np.concatenate([read_shard(path) for path in paths] or [stream[:0]])  # or an empty array
    if len(counts) != sum(map(shard_length, find_shards(cfg, "val"))):
        raise InputError(
            f"TOKENIZER_PATH has case marks, so DATA_PATH={cfg.data_path} needs fineweb_val_bytes_*.bin with one count "
            f"per validation token; {len(counts)} found; {remedy}"
        )
    sizes = torch.from_numpy(counts[1 : len(stream)].astype(np.int64))
    if sizes[tokens[1:] == BOS].any():
        raise InputError(f"fineweb_val_bytes_*.bin in {cfg.data_path} counts bytes for BOS; {remedy}")
    # pieces and text differ by less than 0.01 % on the contest's split; see data/README.md
    if abs(excess := int(sizes.sum()) - total) > 0.01 * total:
        raise InputError(
            f"fineweb_val_bytes_*.bin in {cfg.data_path} differs by {excess} bytes, more than 1 %, from the {total} "
            f"bytes of the pieces; {remedy}"
        )
    return sizes


class ScoredChunk(NamedTuple):
    """A chunk after its score is final: the only thing that test-time training sees."""

    index: int
    progress: float  # position in the cosine decay, from 0 to 1
    last: bool  # nothing is left to score
    nll: Tensor  # float64, nats (1 + K, ...): the score of each target, then the losses of the mixture's K experts
    inputs: Tensor  # (R, T) rows to train on
    targets: Tensor  # (R, S), of the last S positions
    weight: Tensor  # (R,) weight of each row's loss
    losses: Any = None  # scored losses (R, S) with their graph, to train on without a second pass; a list for K experts


class Score(NamedTuple):
    """Result of one evaluation."""

    loss: float  # nats per token
    bpb: float  # bits per byte
    seconds: float

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.4f} val_bpb:{self.bpb:.4f} eval_time:{1000 * self.seconds:.0f}ms"


def read_validation(cfg) -> Array:
    """All tokens of the validation split (N,)."""
    return np.concatenate([read_shard(path) for path in find_shards(cfg, "val")])


def document_spans(stream: Array) -> list[tuple[int, int]]:
    """(first target, end) of each document in tokens (N,). The last target of a document is the BOS of the next."""
    starts = [0, *(np.flatnonzero(stream[1:-1] == BOS) + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(stream) - 1]))


class Scorer:
    """Scores the validation stream, or each of its documents, from left to right in chunks."""

    def __init__(self, stream: Array, cfg, ranks, log):
        if len(stream) < 2:
            raise InputError(f"the validation stream has {len(stream)} token; scoring needs 2")
        self.split_targets = len(stream) - 1  # before VAL_MAX_TOKENS
        if cfg.val_max_tokens:
            stream = stream[: cfg.val_max_tokens + 1]
        check_tokens(stream, cfg.vocab_size, "the validation stream")
        self.tokens = torch.from_numpy(stream.astype(np.int64)).to(ranks.device)
        self.bytes = target_bytes(stream, cfg)
        self.documents = document_spans(stream)
        self.sha256 = hashlib.sha256(stream.astype("<u2").tobytes()).hexdigest()
        self.bytes_sha256 = hashlib.sha256(self.bytes.numpy().astype("<i4").tobytes()).hexdigest()
        self.cfg, self.ranks, self.log = cfg, ranks, log

    @torch.no_grad()
    def window_losses(self, forward, first_targets: range, rows) -> Tensor:
        """Losses (rows, stride): window i scores `stride` targets from first_targets[i] on; `stride` is the step of
        that range. Surplus rows repeat the last window.
        """
        stride, end = first_targets.step, len(self.tokens) - 1
        starts = first_targets[0] + stride * torch.arange(rows, device=self.tokens.device)
        offsets = torch.arange(stride - self.cfg.window, stride + 1, device=self.tokens.device)
        # beyond the end, the last token is repeated; attention is causal, so no valid score depends on it
        tokens = self.tokens[(starts.clamp(max=first_targets[-1])[:, None] + offsets).clamp(max=end)]
        return forward(tokens[:, :-1], tokens[:, -stride:])

    def stream_chunks(self, forward, stride, chunk_tokens) -> Iterator[tuple[ScoredChunk, Tensor]]:
        """Score the stream in chunks. A window scores `stride` targets; the first window scores all of its targets."""
        total, window, device = len(self.bytes), self.cfg.window, self.tokens.device
        decay_chunks = -(-(self.cfg.ttt_cosine_tokens or total) // chunk_tokens)
        size = min(self.cfg.eval_batch_seqs, -(-chunk_tokens // stride // self.ranks.world))
        # All batches have one shape, for one compiled graph. The first window needs the most memory, since
        # all of its targets are scored.
        score_first = partial(self.window_losses, forward, range(0, 1, window))
        size = self.ranks.fit_batch("EVAL_BATCH_SEQS", size, score_first, self.log)
        for index, low in enumerate(range(0, total, chunk_tokens)):
            high = min(low + chunk_tokens, total)
            nll = torch.zeros(high - low, dtype=torch.float64, device=device)
            if index == 0:  # all ranks run the first window and compile its graph; only the main rank adds its losses
                losses = score_first(size)[0, : high - low]
                nll[: len(losses)] = losses * self.ranks.is_main
            mine = self.ranks.shard(range(low or window, high, stride))
            for i in range(0, len(mine), size):
                batch = mine[i : i + size]
                losses = self.window_losses(forward, batch, size).flatten()
                begin, end = batch[0] - low, min(batch[-1] + stride, high) - low
                nll[begin:end] = losses[: end - begin]
            # the sum over ranks makes the chunk final: no rank trains on a target that another has yet to score
            nll = self.ranks.sum_(nll)
            end = high - (high - low) % window  # an incomplete last row is not trained on
            rows = (self.tokens[low:end].view(-1, window), self.tokens[low + 1 : end + 1].view(-1, window))
            progress, weight = min(index / max(decay_chunks - 1, 1), 1.0), torch.ones(len(rows[0]), device=device)
            chunk = ScoredChunk(index, progress, high == total, nll[None], *rows, weight)
            yield chunk, torch.arange(low, high, device=device)

    def evaluate(self, passes: Iterable[tuple], split_over_ranks=False) -> Score:
        """Score all targets. A pass is (chunks with their target indices, adapt or None): its chunks are scored one by
        one, and `adapt` is called after each score is final. `split_over_ranks`: ranks score different targets.
        """
        begin = perf_counter()
        # chunk index, nll, nll of each expert; index N is a slot for padding, discarded below
        rows = 3 + len(self.cfg.ttt_expert_lrs)
        scored = torch.zeros(rows, len(self.bytes) + 1, dtype=torch.float64, device=self.tokens.device)
        for chunks, adapt in passes:
            for chunk, target_index in chunks:  # scores the chunk, after the previous one was trained on
                # 1. commit the score
                scored[1:, target_index] = chunk.nll
                scored[0, target_index] = torch.full_like(chunk.nll[0], chunk.index)
                # 2. only then train on it
                if adapt and not chunk.last:
                    adapt(chunk)
        if split_over_ranks:
            self.ranks.sum_(scored)
        chunk_index, nll, *experts = scored[:, :-1]
        self.audited = dict(nll=nll, bytes=self.bytes, chunk=chunk_index.long(), experts=torch.stack(experts))
        if self.cfg.audit and self.ranks.is_main:
            self.write_audit(Path(self.cfg.audit))
        loss, size = float(nll.mean()), int(self.bytes.sum())
        if not math.isfinite(loss):
            raise InputError(f"the evaluation loss is {loss}; the weights are damaged, or TTT_LR is too high")
        return Score(loss, loss * len(self.bytes) / math.log(2) / size, perf_counter() - begin)

    def write_audit(self, path: Path):
        """Save nll, bytes and chunk index of each target (N,), and the nll of each expert (K, N)."""
        columns = {name: column.cpu().numpy() for name, column in self.audited.items()}
        with self.log.ignoring_write_errors(path), unfinished(path) as part:
            with part.open("wb") as file:
                np.savez(file, **columns)
            part.replace(path)

    def evaluate_windows(self, forward) -> Score:
        """Score with adjacent windows: fast, for training logs and the round trip."""
        return self.evaluate([(self.stream_chunks(forward, self.cfg.window, self.cfg.window * 1024), None)])

    def evaluate_sliding(self, forward, adapt: Callable | None = None) -> Score:
        """Score with windows EVAL_STRIDE apart, so that almost every target has a full context."""
        chunk_tokens = self.cfg.window * 1024 if self.cfg.by_document else self.cfg.ttt_chunk_tokens
        return self.evaluate([(self.stream_chunks(forward, self.cfg.eval_stride, chunk_tokens), adapt)])

    def document_batches(self, size) -> list[list[tuple[int, int]]]:
        """This rank's batches of at most `size` document spans. Within a batch, the shortest has at least 4/5 as many
        chunks as the longest. The longest go first, to the rank with the least work: chunks * (8 + documents).
        """

        def chunks(document):
            return -((document[0] - document[1]) // self.cfg.ttt_chunk_tokens)

        batches = []
        for document in sorted(self.documents, key=chunks, reverse=True):
            full = not batches or len(batches[-1]) == size
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

    def evaluate_documents(self, make_experts: Callable, reuse_losses=False) -> Score:
        """Score each document on its own, in batches (PR #77). `make_experts(n)` returns (forward, Adaptation or 0)
        of each expert for n documents; with `reuse_losses` they train on the graph of the scored losses.
        """

        def rehearse(count):  # with the longest context, to see whether there is enough memory
            experts, ids = make_experts(count), self.tokens.new_zeros(count, self.cfg.window)
            targets, weight = ids[:, : self.cfg.ttt_chunk_tokens], ids[:, 0] + 1
            for _ in range(2):  # the second time beside the state of the optimizers
                losses = [forward(ids, targets) for forward, _ in experts] if reuse_losses else None
                train_experts(experts, ScoredChunk(0, 0.0, False, weight, ids, targets, weight, losses))

        def passes():  # the experts of a batch are made after the previous batch is done
            size = self.ranks.fit_batch("TTT_BATCH_SEQS", self.cfg.ttt_batch_seqs, rehearse, self.log)
            for batch in self.document_batches(size):
                experts = make_experts(len(batch))
                yield self.document_chunks(experts, batch, reuse_losses), partial(train_experts, experts)
                experts.clear()  # frees their memory, although the caller still holds the list

        return self.evaluate(passes(), split_over_ranks=True)

    def document_chunks(self, experts: list[tuple], spans: list[tuple], reuse_losses=False) -> Iterator[tuple]:
        """Score documents with these spans (B, 2) side by side, chunk by chunk, by a mixture of experts. The target
        indices are (B, n); padding points at index N, a slot that is discarded.
        """
        longest, chunk_tokens = max(end - first for first, end in spans), self.cfg.ttt_chunk_tokens
        first, end = torch.tensor(spans).to(self.tokens.device, non_blocking=True).split(1, dim=1)
        weights = torch.ones_like(first, dtype=torch.float64).expand(-1, len(experts)) / len(experts)
        for index, low in enumerate(range(0, longest, chunk_tokens)):
            high = low + chunk_tokens
            # the chunk and its context, together at most one window, and one more token: (B, T + 1)
            offsets = torch.arange(high - min(high, self.cfg.window), high + 1, device=first.device)
            tokens = self.tokens[(first + offsets).clamp(max=end)]  # a finished document repeats its last token
            rows = tokens[:, :-1], tokens[:, low - high :]
            with torch.set_grad_enabled(reuse_losses and high < longest):  # a frozen expert builds no graph
                losses = [forward(*rows) for forward, _ in experts]
            nll = torch.stack([x.detach().double() for x in losses])  # (K, B, n)
            mixed, weights = mix(-nll.movedim(0, -1), weights, self.cfg.ttt_share)
            target_index = first + torch.arange(low, high, device=first.device)
            finished = target_index >= end
            nll = torch.cat((-mixed[None], nll)).masked_fill(finished, 0.0)
            # weight 0 if the document ends here, else B: Adaptation takes the mean over B rows, which are independent
            weight = (first + high < end).flatten() * float(len(spans))
            chunk = ScoredChunk(index, 0.0, high >= longest, nll, *rows, weight, losses if reuse_losses else None)
            yield chunk, target_index.masked_fill(finished, len(self.bytes))


# ---- Test-time training: scored chunks -> better weights for the next chunks.


class LoRA(nn.Module):
    """Low-rank term added to a Linear's output, zero at first (arXiv:2106.09685); one for all rows or one per row."""

    def __init__(self, down: Tensor, fan_out, rows, scale):
        super().__init__()
        self.down = nn.Parameter(down.repeat(rows, 1, 1))
        self.up = nn.Parameter(down.new_zeros(rows, fan_out, len(down)))
        self.scale = scale

    def forward(self, x, y):
        return torch.add(y, x @ self.down.mT.type_as(x) @ self.up.mT.type_as(x), alpha=self.scale)


def ttt_parameters(model: GPT, cfg) -> list[nn.Parameter]:
    """The parameters that match TTT_PARAMS; all others are frozen. Raises InputError if there are none."""
    params, chosen = dict(model.named_parameters()), set()
    for pattern in cfg.ttt_params:
        matches = set(fnmatch.filter(params, pattern.removeprefix("!")))
        if not matches:
            raise InputError(f"TTT_PARAMS={pattern} matches no parameter; names are like {', '.join([*params][-9:])}")
        chosen = chosen - matches if pattern.startswith("!") else chosen | matches
    for name, p in params.items():
        p.requires_grad_(name in chosen)
    if not chosen:
        raise InputError("TTT_PARAMS selects no parameter; set TTT_EPOCHS=0 to score without training")
    return [params[name] for name in params if name in chosen]


def lora_starts(model: GPT, cfg) -> dict[Linear, Tensor]:
    """Freeze the model. Returns the Linears that LoRA adapts, with the initial value of `down` (rank, fan_in), drawn
    from SEED. Raises InputError if TTT_PARAMS selects none.
    """
    ttt_parameters(model, cfg)  # sets requires_grad
    generator, starts = torch.Generator().manual_seed(cfg.seed), {}
    for linear in [m for m in model.blocks.modules() if isinstance(m, Linear)] + [model.tok_emb]:
        if linear.weight.requires_grad:
            fan_in = linear.weight.size(1)
            down = (2 * torch.rand(cfg.ttt_lora_rank, fan_in, generator=generator) - 1) * fan_in**-0.5
            starts[linear] = down.to(linear.weight.device)
    if not starts:
        raise InputError("TTT_PARAMS selects no matrix of a block and not tok_emb.weight, so there is none for LoRA")
    model.requires_grad_(False)
    return starts


def attach_lora(starts: dict[Linear, Tensor], rows, cfg) -> list[nn.Parameter]:
    """Give each Linear of `starts` a new LoRA for `rows` rows, and return the LoRA parameters."""
    for linear, down in starts.items():
        linear.output_hook = LoRA(down, linear.weight.size(0), rows, cfg.ttt_lora_scale)
    return [p for linear in starts for p in linear.output_hook.parameters()]


# With fewer targets a gradient can be only rounding error (2e-9), which AdamW (epsilon 1e-8) would amplify.
MIN_CHUNK = 8
TTT_PASS_TOKENS = 16_384  # of one forward pass over the stream; changes only memory and speed


class Adaptation:
    """Trains `params` on each scored chunk, TTT_EPOCHS times (PR #549; AdamW: PR #490)."""

    def __init__(self, params: list[nn.Parameter], forward, cfg, ranks):
        self.params, self.forward, self.cfg, self.ranks = params, forward, cfg, ranks
        make = dict(
            adamw=partial(torch.optim.AdamW, betas=(cfg.ttt_momentum, cfg.ttt_beta2)),
            sgd=partial(torch.optim.SGD, momentum=cfg.ttt_momentum, nesterov=cfg.ttt_nesterov),
        )[cfg.ttt_optimizer]
        self.optimizer = make(params, cfg.ttt_lr, weight_decay=cfg.ttt_weight_decay, fused=True)

    def __call__(self, chunk: ScoredChunk):
        cosine = 0.5 + 0.5 * math.cos(math.pi * chunk.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.ttt_lr * max(self.cfg.ttt_cosine_floor, cosine)
        rows = torch.arange(len(chunk.inputs), device=chunk.weight.device)
        for _ in range(self.cfg.ttt_epochs):
            for first in range(0, len(rows), self.cfg.ttt_batch_seqs):
                self.step(chunk, rows[first : first + self.cfg.ttt_batch_seqs])

    def step(self, chunk: ScoredChunk, rows: Tensor):
        """One step on the mean loss of these rows. The step does not depend on the number of ranks."""
        # split the rows over ranks, padded with rows of weight 0
        count, world = len(rows), self.ranks.world
        mine = torch.arange(count + -count % world, device=rows.device).chunk(world)[self.ranks.rank]
        weight, rows = (mine < count) * (world / count), rows[mine.clamp(max=count - 1)]
        weight, reuse = weight * chunk.weight[rows], chunk.losses is not None
        # gradient accumulation limits memory; documents, each with its own LoRA, are one part
        size = len(rows) if self.cfg.by_document else max(1, TTT_PASS_TOKENS // chunk.inputs.size(1))
        for part, w in zip(rows.split(size), weight.split(size)):
            losses = chunk.losses[part] if reuse else self.forward(chunk.inputs[part], chunk.targets[part])
            (losses.mean(1) * w).sum().backward()
        self.ranks.mean_([p.grad for p in self.params])
        if self.cfg.ttt_grad_clip:
            nn.utils.clip_grad_norm_(self.params, self.cfg.ttt_grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def mix(log_p: Tensor, weights: Tensor, share) -> tuple[Tensor, Tensor]:
    """Log-probability (B, S) of each token under a mixture of K experts, whose own are log_p (B, S, K). After a token,
    the weights (B, K) become (1 - share) w p / sum(w p) + share / K (fixed share, Herbster and Warmuth 1998). Also
    returns the weights after the last token.
    """
    p = (log_p - log_p.amax(-1, keepdim=True)).exp()
    # an update is linear up to a factor, w -> M w; M: (B, S, K, K)
    m = torch.diag_embed((1 - share) * p) + share / p.size(-1) * p[..., None, :]
    # parallel scan in log2(S) rounds: m[:, i] becomes the product of the matrices of tokens 0 to i
    for distance in (2**i for i in range((log_p.size(1) - 1).bit_length())):
        later = m[:, distance:] @ m[:, :-distance]
        m = torch.cat((m[:, :distance], later / later.amax((2, 3), keepdim=True)), dim=1)
    after = (m @ weights[:, None, :, None]).squeeze(-1)
    weights = torch.cat((weights[:, None], after / after.sum(-1, keepdim=True)), dim=1)
    return (weights[:, :-1].log() + log_p).logsumexp(-1), weights[:, -1]


def train_experts(experts: list[tuple], chunk: ScoredChunk):
    """Train each expert on its own losses; a frozen one has no Adaptation."""
    for i, (_, adaptation) in enumerate(experts):
        if adaptation:
            adaptation(chunk._replace(losses=chunk.losses and chunk.losses[i]))


def evaluate_adapting(scorer: Scorer, model: GPT, params: list[nn.Parameter], forward) -> Score:
    """Score while `params` or a LoRA learn from the stream, or while a new LoRA learns from each document."""
    cfg, ranks = scorer.cfg, scorer.ranks
    score, learn = partial(forward, temperature=cfg.ttt_temperature), partial(forward, z_loss=cfg.ttt_z_loss)
    starts = lora_starts(model, cfg) if cfg.ttt_lora_rank else {}
    if not cfg.by_document:
        params = params or attach_lora(starts, 1, cfg)
        return scorer.evaluate_sliding(score, Adaptation(params, learn, cfg, ranks))
    single = Ranks(device=ranks.device)  # ranks adapt to different documents, independently

    def expert(rate, rows):
        """(forward, Adaptation) of a new LoRA for `rows` documents, or (forward, 0) of the frozen model at rate 0."""
        params = attach_lora(starts, rows, cfg)
        hooks = [linear.output_hook if rate else None for linear in starts]

        def run(forward, *batch):
            for linear, hook in zip(starts, hooks):
                linear.output_hook = hook
            return forward(*batch)

        return partial(run, score), rate and Adaptation(params, partial(run, learn), replace(cfg, ttt_lr=rate), single)

    # one epoch, temperature 1 and no z-loss: the training loss equals the scored loss, so its graph is reused
    reuse_losses = (cfg.ttt_epochs, cfg.ttt_temperature, cfg.ttt_z_loss) == (1, 1.0, 0.0)
    rates = cfg.ttt_lr, *cfg.ttt_expert_lrs
    return scorer.evaluate_documents(lambda n: [expert(rate, n) for rate in rates], reuse_losses)


# ---- Quantization: weights -> integer codes with a scale per row. Late QAT rounds as the export does before FIT.
# Arguments and results without a type are tensors, except for those that the head of this file names.


class QuantSpec(NamedTuple):
    """How to quantize a weight."""

    bits: int  # code width; 16: fp16
    sigmas: float  # clip in standard deviations of a row; 0: search CLIP_SHARES

    @property
    def max_code(self) -> int:
        return 2 ** (self.bits - 1) - 1


def quant_specs(model: nn.Module, cfg) -> dict[str, QuantSpec]:
    """QuantSpec of each parameter by name. Scalars and the small projections outside of blocks stay fp16."""

    def spec(name, role):
        if role == "matrix" and name.startswith("blocks."):
            return QuantSpec(cfg.matrix_bits, cfg.matrix_clip_sigmas)
        bits = cfg.embed_bits if name.startswith("tok_emb.") else cfg.table_bits or cfg.embed_bits
        return QuantSpec(bits, cfg.embed_clip_sigmas) if role == "table" else QuantSpec(16, 0.0)

    return {name: spec(name, role) for name, role in parameter_roles(model).items()}


def round_codes(x, max_code: Tensor | int):
    """Nearest codes within +-max_code, as floats, of weights divided by their scale."""
    return x.round().clamp(-max_code, max_code)


def row_scales(w, spec: QuantSpec, cfg):
    """Scales (R,) of w (R, C), exact in fp16: a clip in standard deviations (SDClip, PR #1493), or per row the clip of
    CLIP_SHARES with the least squared error (GPTQ-lite; PR #414 chose one clip per tensor).
    """
    if spec.sigmas:
        return (w.std(1) * (spec.sigmas / spec.max_code)).clamp_min(1e-7).half().float()
    peak, lowest = w.abs().amax(1), max(cfg.min_clip / spec.max_code, 1e-7)
    least_error, scales = torch.full_like(peak, math.inf), torch.zeros_like(peak)
    for clip in cfg.clip_shares:
        scale = (peak * (clip / spec.max_code)).clamp_min(lowest).half().float()
        error = (round_codes(w / scale[:, None], spec.max_code) * scale[:, None] - w).square().sum(1)
        scales, least_error = torch.where(error < least_error, scale, scales), torch.minimum(error, least_error)
    return scales


class FisherStats:
    """Forward and backward hooks that accumulate K-FAC statistics of one weight (R, C): x x^T of its inputs, squared
    gradients of its outputs, and mean squared gradients of the rows that were looked up.
    """

    def __init__(self, module: Linear):
        rows, cols = module.weight.shape
        self.inputs, self.outputs, self.lookups, self.count = (
            module.weight.new_zeros(shape) for shape in ((cols, cols), rows, rows, ())
        )
        self.module, self.hook = module, module.register_forward_hook(self.on_lookup)
        module.output_hook = self.on_product

    def remove(self):
        self.module.output_hook = None
        self.hook.remove()

    def on_product(self, x, y):
        """Output hook for y = x W^T, of a Linear or of the tied head."""
        flat = x.detach().flatten(0, -2).float()
        self.inputs += flat.T @ flat
        self.count += len(flat)
        if y.requires_grad:
            y.register_hook(self.add_output_gradient)
        return y

    def add_output_gradient(self, gradient):
        self.outputs += gradient.flatten(0, -2).float().square().sum(0)

    def on_lookup(self, module: nn.Module, args: tuple[Tensor, ...], y):
        """Forward hook for an embedding lookup, whose input is integer ids."""
        if y.requires_grad and not args[0].is_floating_point():
            y.register_hook(partial(self.add_lookup_gradient, args[0].flatten()))

    def add_lookup_gradient(self, ids, gradient):
        self.lookups.index_add_(0, ids, gradient.flatten(0, -2).float().square().mean(-1))


class Curvature(NamedTuple):
    """An error e (R, C) in a weight costs about the sum over rows r of rows[r] * e[r] @ inputs @ e[r]."""

    inputs: Tensor  # (C, C) mean of x x^T; identity for a table that is only looked up
    rows: Tensor  # (R,) sum of squared gradients; 0 without gradients


def curvature(stats: FisherStats, ranks) -> Curvature:
    """Curvature of one weight over all ranks: the Fisher matrix as a Kronecker product (arXiv:1503.05671)."""
    inputs, outputs, lookups, count = map(ranks.sum_, (stats.inputs, stats.outputs, stats.lookups, stats.count))
    mean = inputs / count if count else torch.eye(len(inputs), device=inputs.device)
    # a lookup has no x: divide by mean(diag(inputs)), by which the cost multiplies
    return Curvature(mean, outputs + lookups / mean.diagonal().mean().clamp_min(1e-30))


class Cholesky(NamedTuple):
    """A damped Hessian, factorized for GPTQ."""

    order: Tensor  # (C,) columns by decreasing diagonal
    upper: Tensor  # (C, C) Cholesky factor of the inverse, in that order
    dead: Tensor  # (C,) whether the column's input was always 0


def factorize(hessian, columns, cfg) -> Cholesky:
    """Factorize a Hessian (C, C), damped and then scaled by `columns` (C,) on both sides."""
    h, scale = hessian.to(torch.float64, copy=True), columns.double()
    dead = h.diagonal() == 0
    h.diagonal().add_(cfg.gptq_damping * h.diagonal().mean().clamp_min(1e-30))
    h *= scale * scale[:, None]
    order = h.diagonal().argsort(descending=True)
    h = h[order][:, order]
    try:
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    except torch.linalg.LinAlgError:
        raise TrainingFailed("GPTQ cannot invert a Hessian; raise GPTQ_DAMPING or set QUANTIZER=rtn") from None
    return Cholesky(order, upper, dead)


GPTQ_BLOCK = 128  # columns between two updates of the remaining weights; changes only the speed


def gptq(w, scales, max_code, cholesky: Cholesky):
    """Codes (R, C) of w that keep the outputs w x for inputs x with this Hessian (arXiv:2210.17323)."""
    order, upper = cholesky.order, cholesky.upper
    left, scales = w.double().masked_fill(cholesky.dead, 0.0)[:, order].T.contiguous(), scales.double()  # (C, R)
    codes = torch.zeros_like(left)
    for begin in range(0, len(upper), GPTQ_BLOCK):
        end = min(begin + GPTQ_BLOCK, len(upper))
        errors = torch.zeros_like(left[begin:end])
        for j in range(begin, end):  # the following columns compensate for the error of each column
            codes[j] = round_codes(left[j] / scales, max_code)
            errors[j - begin] = (left[j] - codes[j] * scales) / upper[j, j]
            left[j:end].addr_(upper[j, j:end], errors[j - begin], alpha=-1)
        left[end:] -= upper[begin:end, end:].T @ errors
    return codes[order.argsort()].T


class QuantPlan(NamedTuple):
    """How to quantize one weight as codes * scales[:, None] * columns, by GPTQ if `cholesky` is given."""

    weight: Tensor  # (R, C)
    scales: Tensor  # (R,)
    clip: Tensor  # (R,) largest magnitude of weight / columns that is represented
    columns: Tensor  # (C,), exact in fp16
    cholesky: Cholesky | None


def row_plan(w, spec: QuantSpec, cfg, hessian: Tensor | None = None) -> QuantPlan:
    """A scale per row from its weights; no column scales."""
    scales, columns = row_scales(w, spec, cfg), torch.ones_like(w[0])
    cholesky = None if hessian is None else factorize(hessian, columns, cfg)
    return QuantPlan(w, scales, spec.max_code * scales, columns, cholesky)


def loss_plan(w, cost: Curvature, cfg) -> QuantPlan:
    """Scales, up to a common factor, from the cost of an error in each row and, after GPTQ, in each column. At many
    bits per weight the loss is least for equal scale**2 * cost (power 1, as WaterSIC, arXiv:2603.04956); at few bits,
    where many codes are 0, a smaller SCALE_POWER is better.
    """
    cholesky, exponent = factorize(cost.inputs, torch.ones_like(w[0]), cfg), -cfg.scale_power / 2
    column_cost = cholesky.upper.diagonal()[cholesky.order.argsort()] ** -2
    row_cost = cost.rows.double()
    row_cost = row_cost + cfg.gptq_damping * row_cost.mean().clamp_min(1e-30)
    mean_column_cost = column_cost.log().mean().exp()
    columns = ((column_cost / mean_column_cost) ** exponent).half().float()
    scales, clip = (row_cost * mean_column_cost) ** exponent, (w / columns).abs().amax(1)
    return QuantPlan(w, scales, clip, columns, factorize(cost.inputs, columns, cfg))


def quant_plans(weights, specs: dict[str, QuantSpec], cfg, curvatures: dict[str, Curvature]) -> dict:
    """QuantPlan of each weight whose spec is below 16 bits. MEAN_SCALE needs the curvature of all of them."""
    plans = {}
    for name, spec in specs.items():
        if spec.bits == 16:
            continue
        w, cost = prune(weights[name].float(), cfg.prune_share * name.startswith("blocks.")), curvatures.get(name)
        if not cfg.mean_scale:
            plans[name] = row_plan(w, spec, cfg, cost.inputs if cost else None)
        elif cost and cost.rows.sum() > 0:
            plans[name] = loss_plan(w, cost, cfg)
        else:
            raise TrainingFailed(
                f"MEAN_SCALE needs gradients of {name}, but calibration had none; raise GPTQ_RESERVE_SECONDS"
            )
    if not cfg.mean_scale:
        return plans
    # one factor for all, so that the geometric mean of the scales of all weights is MEAN_SCALE
    count = sum(p.weight.numel() for p in plans.values())
    mean_log = sum(p.scales.log().sum() * p.columns.numel() for p in plans.values()) / count
    return {name: p._replace(scales=p.scales * (cfg.mean_scale / mean_log.exp())) for name, p in plans.items()}


def quantize_rows(p: QuantPlan, factor=1.0) -> tuple[Tensor, Tensor]:
    """Codes int8 (R, C) and scales fp16 (R,): `factor` times the plan's scales, widened where needed so that
    clip / scale <= 127.
    """
    scales = torch.maximum(p.scales * factor, p.clip / 127).half().clamp_min(2**-24)  # fp16's smallest number
    w, scale = p.weight / p.columns, scales.float()
    max_code = (p.clip / scale).round().clamp(max=127)  # the clip stays, so a larger scale has fewer codes
    if p.cholesky is None:
        codes = round_codes(w / scale[:, None], max_code[:, None])
    else:
        codes = gptq(w, scale, max_code, p.cholesky)
    return codes.to(torch.int8), scales


def dequantize_rows(codes, scales, columns):
    """fp32 weights (R, C) of codes int8 (R, C), scales fp16 (R,) and columns fp16 (C,)."""
    return codes.float() * scales.float()[:, None] * columns.float()


@torch.no_grad()
def on_export_grid(model: GPT, cfg) -> AbstractContextManager[None]:
    """Inside the context, the matrices of blocks have their quantized values (straight-through, arXiv:1308.3432)."""
    spec, by_width = QuantSpec(cfg.matrix_bits, cfg.matrix_clip_sigmas), {}
    for module in model.blocks.modules():
        if type(module) is Linear:
            by_width.setdefault(module.weight.size(1), []).append(module.weight)
    matrices, rounded = [], []
    for group in by_width.values():  # rows are independent; joining matrices saves launches
        plan = row_plan(torch.cat(group), spec, cfg)
        matrices += group
        rounded += dequantize_rows(*quantize_rows(plan), plan.columns).split([len(w) for w in group])
    return swap_parameters(matrices, rounded)  # in place, so the training graph stays the same


def prune(w, fraction: float):
    """`w` with this fraction of its entries, the smallest in magnitude, set to 0."""
    count = int(fraction * w.numel())
    return w.masked_fill(w.abs() <= w.abs().flatten().kthvalue(count).values, 0.0) if count else w


def quantize(weights, plans: dict[str, QuantPlan], factor=1.0) -> dict[str, Tensor]:
    """The tensors of an artifact: `name.codes`, `.scales` and `.columns` of planned weights, fp16 of the others."""
    tensors = {name: w.half() for name, w in weights.items() if name not in plans}
    for name, p in plans.items():
        tensors[f"{name}.codes"], tensors[f"{name}.scales"] = quantize_rows(p, factor)
        tensors[f"{name}.columns"] = p.columns.half()
    return {name: t.cpu().contiguous() for name, t in tensors.items()}


def dequantize(tensors) -> dict[str, Tensor]:
    """fp32 weights of an artifact's tensors, whose shapes `check_layout` has checked. Raises KeyError if one lacks."""
    weights = {}
    for name, t in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "codes":
            weights[base] = dequantize_rows(t, tensors[f"{base}.scales"], tensors[f"{base}.columns"])
        elif kind not in ("scales", "columns"):
            weights[name] = t.float()
    return weights


# ---- Entropy coding: codes -> 16-bit words, close to the entropy in each magnitude class. Decoding is integer only.
# Arguments and results without a type are NumPy arrays, except for `tensors`.

LANES, PRECISION, CONTEXTS = 1024, 12, 48  # parallel states, bits of a probability, magnitude classes


def code_classes(codes) -> tuple[Array, Array]:
    """A class per row and per column of codes (R, C), uint8. Their sum is the context of a code: its expected magnitude
    in quarters of an octave.
    """
    energy, columns = codes.astype(np.float64) ** 2 + 1e-3, np.ones(codes.shape[1])
    for _ in range(2):
        rows = (energy / columns).mean(1)
        columns = (energy / rows[:, None]).mean(0)
    rows, columns = (np.round(2 * np.log2(v)) for v in (rows, columns))  # 2 log2(energy) = 4 log2(magnitude)
    lowest = columns.min(initial=0)  # moved from columns to rows, so that no class is negative
    rows, columns = rows + lowest + 20, columns - lowest  # + 20: a row of zeros has -20, from the 1e-3 above
    return tuple(v.clip(0, CONTEXTS - 1).astype(np.uint8) for v in (rows, columns))


def context_of(rows, columns):
    """Context of each code (R * C,) from the classes of its row and column."""
    return np.minimum(rows[:, None] + columns, CONTEXTS - 1).ravel()


def frequencies(symbols, contexts):
    """Frequency table uint16 (CONTEXTS, 256): rows sum to 2**PRECISION, no occurring symbol has 0; unused rows are
    uniform.
    """
    counts = np.bincount(contexts * 256 + symbols, minlength=CONTEXTS * 256).reshape(CONTEXTS, 256)
    unused = counts.sum(1, keepdims=True) == 0
    counts += unused
    seen = counts > 0
    ends = counts.cumsum(1) * (2**PRECISION - seen.sum(1, keepdims=True)) // counts.sum(1, keepdims=True)
    return (np.diff(ends, axis=1, prepend=0) + seen).astype(np.uint16)


def rans_encode(symbols, contexts, table) -> tuple[Array, Array]:
    """States uint32 (LANES,) and words uint16 of `symbols` uint8 (N,), encoded in reverse (rANS, arXiv:1311.2540)."""
    table = table.astype(np.int64)
    starts = table.cumsum(1) - table
    state, words = np.full(LANES, 2**16), []
    for first in range((len(symbols) - 1) // LANES * LANES, -1, -LANES):
        s, k = symbols[first : first + LANES], contexts[first : first + LANES]
        x, f = state[: len(s)], table[k, s]
        full = x >= (f << (32 - PRECISION))
        words.append(x[full].astype(np.uint16))
        x = np.where(full, x >> 16, x)
        state[: len(s)] = ((x // f) << PRECISION) + x % f + starts[k, s]
    return state.astype(np.uint32), np.concatenate(words[::-1])


def rans_decode(contexts, table, state, words):
    """The symbols uint8 (N,). Raises ValueError if the stream or its table is invalid."""
    table = table.astype(np.int64)
    if (table.sum(1) != 2**PRECISION).any():
        raise ValueError("tables of its entropy coder")
    counts = table.ravel()
    symbol_at = np.tile(np.arange(256, dtype=np.uint8), CONTEXTS).repeat(counts)
    frequency_at = counts.repeat(counts).astype(np.uint32)
    offset_at = (np.arange(len(symbol_at)) - (counts.cumsum() - counts).repeat(counts)).astype(np.uint32)
    symbols, position, state = np.empty(len(contexts), np.uint8), 0, state.copy()
    for first in range(0, len(symbols), LANES):
        k = contexts[first : first + LANES]
        x = state[: len(k)]
        slot = (k.astype(np.uint32) << PRECISION) + (x & (2**PRECISION - 1))
        symbols[first : first + LANES] = symbol_at[slot]
        x = frequency_at[slot] * (x >> PRECISION) + offset_at[slot]
        low = np.flatnonzero(x < 2**16)
        x[low] = (x[low] << 16) | words[position : position + len(low)]
        state[: len(k)], position = x, position + len(low)
    if position != len(words) or (state != 2**16).any():
        raise ValueError("words of its entropy coder")
    return symbols


def entropy_encode(tensors) -> dict[str, Tensor]:
    """Replace all codes by one rANS stream and, for each weight, the classes `.codes.rows` and `.codes.columns`."""
    coded = {name: tensors[name].numpy() for name in sorted(tensors) if name.endswith(".codes")}
    streams, contexts = {}, []
    for name, codes in coded.items():
        rows, columns = code_classes(codes)
        streams |= {f"{name}.rows": rows, f"{name}.columns": columns}
        contexts.append(context_of(rows, columns))
    contexts = np.concatenate(contexts)
    symbols = np.concatenate([codes.ravel() for codes in coded.values()]).view(np.uint8)
    table = frequencies(symbols, contexts.astype(np.int64))
    state, words = rans_encode(symbols, contexts, table)
    streams |= {"rans.table": table.T, "rans.state": state, "rans.words": words}
    uncoded = {name: t for name, t in tensors.items() if name not in coded}
    return uncoded | {name: torch.from_numpy(array) for name, array in streams.items()}


def entropy_decode(tensors) -> dict[str, Tensor]:
    """The inverse of `entropy_encode`, in place. May raise anything on corrupt input; `unpack` converts it."""
    table, state, words = (tensors.pop(f"rans.{name}").numpy() for name in ("table", "state", "words"))
    names = [name.removesuffix(".rows") for name in sorted(tensors) if name.endswith(".codes.rows")]
    classes = [[tensors.pop(f"{name}.{kind}").numpy() for kind in ("rows", "columns")] for name in names]
    contexts = [context_of(rows, columns) for rows, columns in classes]
    symbols = rans_decode(np.concatenate(contexts), table.T, state, words).view(np.int8)
    ends = np.cumsum([len(each) for each in contexts])
    for name, (rows, _), codes in zip(names, classes, np.split(symbols, ends[:-1])):
        tensors[name] = torch.from_numpy(codes.reshape(len(rows), -1))
    return tensors


# ---- Artifact: tensors and settings <-> one checked file that contains no code.
# Layout: magic (4 bytes), format (uint32), sha256 of all that follows (32), compressor name (8), then compressed:
# header length (uint32), JSON header, tensors. A file of N bytes may claim FREE_WEIGHTS + 6 N weights.

ARTIFACT_MAGIC, ARTIFACT_FORMAT, MAX_HEADER_BYTES, FREE_WEIGHTS = b"PGLF", 6, 2**20, 2**22
COMPRESSORS = dict(zstd="zstandard", rans="zstandard", brotli="brotli")  # and their packages


def compressor_module(name: str) -> Any:
    """The package of a compressor. Raises InputError if it is not installed."""
    try:
        return importlib.import_module(COMPRESSORS[name])
    except ImportError:
        raise InputError(
            f"COMPRESSOR={name} needs the package {COMPRESSORS[name]}; pip install -r requirements.txt"
        ) from None


def compress(body: bytes, name: str, level) -> bytes:
    """`body` compressed by Brotli at its highest level, or by zstd at `level` (also for rans)."""
    module = compressor_module(name)
    return module.compress(body) if name == "brotli" else module.ZstdCompressor(level=level).compress(body)


def decompress(data: bytes, name: str, limit) -> bytes:
    """The first `limit` bytes of the decompressed data. May raise anything on corrupt input."""
    module = compressor_module(name)
    if name == "brotli":  # its own limit is approximate
        return module.Decompressor().process(data, output_buffer_limit=limit)[:limit]
    source = io.BytesIO(data)
    body = module.ZstdDecompressor().stream_reader(source, read_size=4096).read(limit)
    # padding would raise the number of weights that the file may claim
    if len(body) < limit and source.tell() < len(data):
        raise ValueError("bytes after the end of the compressed data")
    return body


def artifact_settings(cfg) -> dict[str, str]:
    """The options stored with the weights: the model and its evaluation, no paths."""
    # the evaluation uses the first three; check_options also needs the others
    others = "dtype matrix_bits train_seq_len train_batch_tokens micro_batch_tokens early_seq_lens early_seq_ends"
    return as_env(cfg.group("model", "evaluation") | {name: vars(cfg)[name] for name in others.split()})


def pack(tensors, looped: bool, cfg, **facts: Any) -> bytes:
    """An artifact file with `tensors`, the options and the tokenizer's hash; a checkpoint also has `facts`."""
    tensors = entropy_encode(tensors) if cfg.compressor == "rans" else tensors
    order = sorted(tensors, key=lambda name: (tensors[name].element_size(), name))
    arrays = {name: tensors[name].numpy() for name in order}
    header = json.dumps(
        facts
        | {
            "settings": artifact_settings(cfg),
            "looped": looped,
            "tokenizer_sha256": hashlib.sha256(Path(cfg.tokenizer_path).read_bytes()).hexdigest(),
            "tensors": [[name, str(a.dtype), list(a.shape)] for name, a in arrays.items()],
        }
    ).encode()
    # byte planes compress better: all low bytes of a tensor, then all high bytes
    little_endian = (a.astype(a.dtype.newbyteorder("<")) for a in arrays.values())
    planes = [a.reshape(-1, 1).view(np.uint8).T.tobytes() for a in little_endian]
    body = len(header).to_bytes(4, "little") + header + b"".join(planes)
    packed = cfg.compressor.encode().ljust(8) + compress(body, cfg.compressor, cfg.zstd_level)
    return ARTIFACT_MAGIC + ARTIFACT_FORMAT.to_bytes(4, "little") + hashlib.sha256(packed).digest() + packed


def stored_settings(header: Mapping) -> tuple[dict[str, str], list[str]]:
    """(options of a header, names of missing options, which get defaults). Raises InputError for unknown names."""
    given, defaults = header["settings"], artifact_settings(Config())
    if not all(type(text) is str and len(text) < 1000 for text in given.values()):
        raise InputError("its settings are not short strings")
    if unknown := sorted(given.keys() - defaults.keys()):
        raise InputError(f"it has the unknown settings {', '.join(unknown[:9])}; use a newer train_gpt.py")
    return defaults | given, sorted(defaults.keys() - given.keys())


def tensor_layouts(header: Mapping, file_bytes) -> dict[str, tuple]:
    """(dtypes, shape) of every tensor that a file with this header may contain, by name. Raises InputError if the file
    is too small for its model.
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
        if p.ndim == 2:
            rows, columns = shape[:1], shape[1:]
            layouts |= {
                f"{name}.codes": ("int8", shape),
                f"{name}.scales": ("float16", rows),
                f"{name}.columns": ("float16", columns),
                f"{name}.codes.rows": ("uint8", rows),
                f"{name}.codes.columns": ("uint8", columns),
            }
    return layouts


def check_layout(table: list[Any], layouts: Mapping[str, tuple]) -> list[tuple]:
    """(name, dtype, shape) of the tensors in a header. Raises InputError unless each has its layout and occurs once."""
    checked = {}
    for name, dtype, shape in table:
        kinds, wanted = layouts.get(name, ("", ()))
        if name == "rans.words" and len(shape) == 1:
            wanted = (min(shape[0], wanted[0]),)
        fits = shape == list(wanted) and all(type(n) is int and n >= 0 for n in shape)
        if dtype not in kinds.split() or name in checked or not fits:
            raise InputError(f"its tensor {name!r:.99} of {dtype!r:.20} {shape!r:.99} does not belong to its model")
        checked[name] = name, dtype, wanted
    return list(checked.values())


def read_tensors(table: Iterable[tuple], body: bytes) -> dict[str, Tensor]:
    """The tensors of a checked table from the bytes after the header. May raise anything on corrupt input."""
    tensors, start = {}, 0
    for name, dtype, shape in table:
        kind = np.dtype(dtype).newbyteorder("<")
        planes = np.frombuffer(body, np.uint8, math.prod(shape) * kind.itemsize, start).reshape(kind.itemsize, -1)
        array = np.frombuffer(planes.T.tobytes(), kind).reshape(shape)
        tensors[name] = torch.from_numpy(array.astype(dtype))
        start += array.nbytes
    if start != len(body):
        raise ValueError("length")
    return entropy_decode(tensors) if "rans.words" in tensors else tensors


def read_header(blob: bytes) -> tuple[dict[str, Any], int, str]:
    """(header, where the tensors start when decompressed, compressor). May raise anything on corrupt input."""
    version = int.from_bytes(blob[4:8], "little")
    if blob[:4] != ARTIFACT_MAGIC:
        raise InputError("it is not an artifact of train_gpt.py")
    if version != ARTIFACT_FORMAT:
        raise InputError(f"it has format {version}, not {ARTIFACT_FORMAT}; use the train_gpt.py that wrote it")
    if hashlib.sha256(blob[40:]).digest() != blob[8:40]:
        raise InputError("it is truncated or damaged: its checksum does not match")
    compressor = blob[40:48].decode("ascii").rstrip()
    head = decompress(blob[48:], compressor, 4 + MAX_HEADER_BYTES)
    start = 4 + int.from_bytes(head[:4], "little")
    if start > len(head):
        raise InputError(f"its header is truncated or larger than {MAX_HEADER_BYTES} bytes")
    return json.loads(head[4:start]), start, compressor


def unpack(blob: bytes, layouts_of: Callable = tensor_layouts) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors) of an artifact. Raises InputError if it has another format or is damaged. The header is
    checked against layouts_of(header, file size) before any tensor is decompressed.
    """
    try:
        header, start, compressor = read_header(blob)
        table = check_layout(header["tensors"], layouts_of(header, len(blob)))
        size = sum(math.prod(shape) * np.dtype(dtype).itemsize for _, dtype, shape in table)
        body = decompress(blob[48:], compressor, start + size + 1)
        return header, read_tensors(table, body[start:])
    except InputError:
        raise
    except Exception as error:  # the checksum matches, so the file was forged; any step may fail
        raise InputError(f"its contents do not match its header ({' '.join(str(error).split())})") from None


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be renamed to it; deleted at the end if it still exists."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def write_file(path: Path, blob: bytes):
    """Write all of `blob` or nothing: an interrupted write keeps the old file."""
    try:
        with unfinished(path) as part:
            part.write_bytes(blob)
            part.replace(path)
    except OSError as error:  # the error of a full disk names no file
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def publish(path: Path, kind: str, blob: bytes, cfg):
    """Write `blob` to `path`, and a copy final_model.KIND.ptz, so that EVAL_ONLY finds the newest run."""
    write_file(path, blob)
    if path == Path(cfg.output_dir, f"{cfg.run_id}.{kind}.ptz"):
        write_file(path.with_name(f"final_model.{kind}.ptz"), blob)


def fit(pack_at: Callable[[float], tuple], room, coded, log) -> tuple:
    """The result of pack_at(factor) -> (bytes, ...) for a small factor whose bytes fit into `room`: searches
    log2(factor) in [-2, 3] until less than 0.5 % of `room` is free. If none fits, the result of the last trial.
    """
    low, octave, high, best, trials = -2.0, 0.0, 3.0, None, 0
    while high - low > 0.02:
        result = pack_at(2.0**octave)
        size = result[0]
        log(f"fit:factor {2.0**octave:.4f} bytes:{size} of {room}")
        if size <= room:
            best, high = result, octave
            if room - size <= room // 200:
                break
        else:
            low = octave
        # Newton step: doubling the scales saves about a bit of each of the `coded` weights; each fourth step bisects
        guess, trials = octave + 8 * (size - 0.9975 * room) / coded, trials + 1
        octave = guess if trials % 4 and low < guess < high else (low + high) / 2
    return best or result


def save_artifact(plans: dict[str, QuantPlan], weights, looped: bool, cfg, ranks, log) -> str:
    """Quantize, pack and write the weights; with FIT, scales fill the size limit. Raises TrainingFailed if the file is
    too large. Returns its sha256 on the main rank.
    """
    begin, code_bytes = perf_counter(), Path(__file__).stat().st_size

    def pack_at(factor):
        tensors = quantize(weights, plans, factor)
        blob = pack(tensors, looped, cfg) if ranks.is_main else b""
        (size,) = ranks.maximum(len(blob))
        return int(size), blob, sum(t.nbytes for t in tensors.values())

    room, coded = cfg.max_artifact_bytes - code_bytes, sum(p.weight.numel() for p in plans.values())
    size, blob, payload = fit(pack_at, room, coded, log) if cfg.fit else pack_at(1.0)
    count, total = sum(w.numel() for w in weights.values()), size + code_bytes
    if size > room:
        raise TrainingFailed(
            f"code + model = {total} bytes, {size - room} over MAX_ARTIFACT_BYTES={cfg.max_artifact_bytes}, so "
            f"{cfg.artifact_path} was not written; at {8 * size / count:.2f} bits per weight it fits with "
            f"{(size - room) * count // size} fewer weights" + (", or set FIT=1" if not cfg.fit else "")
        )
    if ranks.is_main:
        publish(cfg.artifact_path, "int6", blob, cfg)
    kind = f"int{cfg.matrix_bits}+{cfg.compressor}"
    seconds = perf_counter() - begin
    log.fact(kind=kind, model_bytes=size, payload_bytes=payload, code_bytes=code_bytes, pack_seconds=seconds)
    log(f"Total submission size {kind}: {total} bytes")
    return hashlib.sha256(blob).hexdigest()


class Artifact(NamedTuple):
    """Everything that an evaluation knows about the training."""

    cfg: Config
    weights: dict[str, Tensor]  # fp32
    looped: bool
    sha256: str
    size: int  # bytes
    warnings: list[str]


def read_artifact(path: Path, env) -> bytes:
    """The bytes of an artifact. Raises InputError, before reading, if code + model exceed MAX_ARTIFACT_BYTES."""
    limit = parse(int, "MAX_ARTIFACT_BYTES", env.get("MAX_ARTIFACT_BYTES", str(Config.max_artifact_bytes)))
    if not path.is_file():
        raise InputError(f"there is no artifact {path}; set ARTIFACT, or OUTPUT_DIR of the run that wrote it")
    if (total := path.stat().st_size + Path(__file__).stat().st_size) > limit:
        raise InputError(f"artifact {path}: code + model = {total} bytes, over MAX_ARTIFACT_BYTES={limit}")
    return path.read_bytes()


def check_compatible(stored: Config, cfg, header: Mapping):
    """Raises InputError if the environment changes an option that the artifact fixes, or has another tokenizer."""
    free = stored.group("run", "evaluation")
    for name, value in vars(cfg).items():
        if name not in free and value != vars(stored)[name]:
            raise InputError(f"{name.upper()} cannot change for a packed model; unset it")
    tokenizer = Path(cfg.tokenizer_path)
    if not tokenizer.is_file():
        raise InputError(f"its tokenizer is not at TOKENIZER_PATH={tokenizer}")
    if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != header["tokenizer_sha256"]:
        raise InputError(f"TOKENIZER_PATH={tokenizer} is not the tokenizer it was trained with")


def load_artifact(path: Path, env, blob: bytes | None = None) -> Artifact:
    """Load and check the artifact at `path`, or `blob`. `env` may change its evaluation, not its model."""
    blob = read_artifact(path, env) if blob is None else blob
    try:
        header, tensors = unpack(blob)
        settings, missing = stored_settings(header)
        stored, cfg = Config.from_env(settings), Config.from_env({**settings, **env})
        check_compatible(stored, cfg, header)
        warnings = [f"the artifact has no {', '.join(missing)}; the defaults are used"] if missing else []
        if stored.dtype not in ("auto", cfg.dtype):
            warnings.append(f"DTYPE={cfg.dtype}, but the artifact's run had DTYPE={stored.dtype}")
        weights, looped = dequantize(tensors), header["looped"]
        for name, w in weights.items():
            if not w.isfinite().all():
                raise InputError(f"its weights {name} are NaN or infinite")
        if type(looped) is not bool:
            raise InputError("its header does not say whether the model is looped")
        return Artifact(cfg, weights, looped, hashlib.sha256(blob).hexdigest(), len(blob), warnings)
    except (InputError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"artifact {path}: {error}") from None


def load_model(cfg, weights, ranks) -> GPT:
    """A model with these weights, built on the meta device: memory is used only for tensors that the file has."""
    try:
        with torch.device("meta"):
            model = GPT(cfg, choose_attention(cfg, ranks).attend, compute_dtype(cfg, ranks.device))
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InputError(f"the artifact's tensors do not match its settings: {' '.join(str(error).split())}") from None
    return model.to(ranks.device).requires_grad_()


# ---- Plumbing: option parsing and checks, ranks and devices, clock, log.


def option_group(name: str) -> str:
    """The group of an option."""
    names = [f.name for f in fields(Config)]
    return [group for group, first in GROUPS.items() if names.index(first) <= names.index(name)][-1]


def parse(kind: Any, name: str, text: str) -> Any:
    """`text` as int, float, bool (0 or 1), str, or a comma-separated tuple of one of them. Raises InputError."""
    try:
        if kind is bool:
            return {"0": False, "1": True}[text]
        if element := get_args(kind)[:1]:
            return tuple(parse(element[0], name, item.strip()) for item in text.split(",") if item.strip())
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        wanted = "0 or 1" if kind is bool else kind.__name__
        raise InputError(f"{name}={text!r} is not valid; use {wanted}") from None


def variant_options(variant: str) -> dict[str, Any]:
    """The options that a row of VARIANTS sets."""
    hints, pairs = get_type_hints(Config), (pair.split("=", 1) for pair in VARIANTS[variant].split())
    return {name.lower(): parse(hints[name.lower()], name, text) for name, text in pairs}


def parse_options(env) -> dict[str, Any]:
    """Options from the variant and the environment. Raises InputError for a name that is probably a misspelt option."""
    hints, (errors, _) = get_type_hints(Config), unknown_options(env)
    given = {name.lower(): parse(hints[name.lower()], name, env[name]) for name in map(str.upper, hints) if name in env}
    if errors:
        unset = " ".join(f"-u {text.split()[0]}" for text in errors)
        raise InputError(f"{'; '.join(errors)} (--help lists the options; `env {unset} python ...` unsets it)")
    variant = given.get("variant", Config.variant)
    if variant not in VARIANTS:
        raise InputError(f"VARIANT={variant} must be one of {', '.join(VARIANTS)}")
    return variant_options(variant) | given


def as_env(values: Mapping[str, Any]) -> dict[str, str]:
    """Options as environment variables, which `Config.from_env` reads back exactly."""
    lists = {name.upper(): value if isinstance(value, tuple) else [value] for name, value in values.items()}
    return {name: ",".join(str(int(v) if isinstance(v, bool) else v) for v in items) for name, items in lists.items()}


def usage() -> str:
    """The text of --help."""
    lines = [
        "usage: [NAME=value ...] [torchrun ... | python] train_gpt.py [--help | --describe]",
        f"VARIANT is one of {', '.join(VARIANTS)}. Precedence: default < variant < environment.",
    ]
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", Path(__file__).read_text(), re.M))
    for group, options in groupby(fields(Config), key=lambda f: option_group(f.name)):
        lines += ["", f"{group}:"]
        for f in options:
            (assignment,) = map("=".join, as_env({f.name: f.default}).items())
            choices = " | ".join(f.metadata.get("choices", ()))
            lines.append(f"  {assignment:56s} {comments[f.name]}" + f" ({choices})" * bool(choices))
    return "\n".join(lines)


# Names of options in other contest entries and in older versions of this script, with their counterpart here.
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
STEP_FLOOR=use MIN_CLIP
MEAN_STEP=use MEAN_SCALE
STEP_POWER=use SCALE_POWER
"""
DEFINED_ELSEWHERE = "DATA_DIR DATASETS_DIR MODEL_DIR TARGET_MB ZSTD_CLEVEL"  # by clusters, CI systems and libraries
# A variable gets a warning if its name has one of CONTEST_WORDS, or a word of an option that is not in COMMON_WORDS.
CONTEST_WORDS = """
BINARIZE BITNET BLOCKS BOS CALIB CASEOPS CHURN DETACH EGGROLL ENABLED EXPAND FINEWEB FP FP16 FUSED GDN GROUPS HNET INT4
INT6 INT8 JEPA LAYER0 LAYER LEGENDRE LQER LZMA MAMBA3 MTP NGRAM NS PATTERNS POLAR POP PROJECTOR QUANT RECUR RECURRENCE
REFINER REG REGISTERS SCALING SHAPING SIGMA SIGREG SLIDING TIE TILT TVERSKY UNTIE XNOR STORAGE CONV STATE HEAD KERNEL
"""
COMMON_WORDS = """
AT BASE DATA DIR ENABLE END EVAL EVERY ID INIT LAST LEVEL LOG MAX MIN MODEL NUM ONLY OUTPUT PARALLEL PARAMS PATH POWER
RANK RUN SCALE SHARE SIZE START STD STEP STEPS VALUE
"""


def suggestion(name: str, options: Sequence[str]) -> tuple[str, bool]:
    """(advice or "", certain): `certain` if `name` can only be a misspelled option of this script. A short name, or a
    word of an option with another ending, may belong to another program: SPEED, ARTIFACTS.
    """
    translations = dict(line.split("=", 1) for line in TRANSLATIONS.strip().splitlines())
    if name in translations:
        return translations[name], name not in DEFINED_ELSEWHERE.split()
    for option_name in options:
        if option_name.replace("_", "") == name.upper().replace("_", ""):
            return f"did you mean {option_name}?", True
    close = difflib.get_close_matches(name, options, 1, min(0.9, 1 - 1.1 / max(len(name), 2)))
    word = len(name) < 6 or "_" not in name and os.path.commonprefix([*close, name]) in (name, *close)
    certain = bool(close) and not word and name not in DEFINED_ELSEWHERE.split()
    return f"did you mean {close[0]}?" if close else "", certain


def unknown_options(env) -> tuple[list[str], list[str]]:
    """(errors, warnings) about environment variables that look like options of this script but are not."""
    options = [f.name.upper() for f in fields(Config)]
    words = set("_".join(options).split("_")).difference(COMMON_WORDS.split()).union(CONTEST_WORDS.split())
    errors, warnings = [], []
    for name in sorted(env.keys() - options):
        answer, certain = suggestion(name, options)
        if certain:
            errors.append(f"{name} is not an option: {answer}")
        elif answer or name.isupper() and words.intersection(name.split("_")):
            warnings.append(f"{name} ({answer})" if answer else name)
    return errors, warnings


def check_options(c: Config):
    """Raises InputError for the first option or combination of options that is invalid."""
    for f in fields(c):
        name, value, m = f.name.upper(), vars(c)[f.name], dict(low=0, high=2**63, choices=()) | f.metadata
        if m["choices"] and value not in m["choices"]:
            raise InputError(f"{name}={value} must be one of {', '.join(m['choices'])}")
        for v in value if isinstance(value, tuple) else (value,):
            if not isinstance(v, str) and not m["low"] <= v <= m["high"]:
                raise InputError(f"{name}={v} must be in [{m['low']:g}, {m['high']:g}]")
    rules = model_rules(c) | training_rules(c) | evaluation_rules(c) | memory_rules(c)
    for text in (text for text, holds in rules.items() if not holds):
        names = dict.fromkeys(name.lower() for name in re.findall("[A-Z][A-Z0-9_]+", text))
        values = as_env({name: vars(c)[name] for name in names if name in vars(c)})
        raise InputError(f"{text} ({', '.join(map('='.join, values.items()))})")


def model_rules(c: Config) -> dict[str, bool]:
    """{rule: whether it holds} for combinations of model and quantization options."""
    loops_inside, longest = c.loop_start <= c.loop_end < c.num_layers, max(c.train_seq_len, c.window)
    by_cost = (c.quantizer, c.matrix_bits, c.embed_bits, c.table_bits) == ("gptq", 8, 8, 0)
    return {
        "MODEL_DIM must be a multiple of NUM_HEADS": c.model_dim % c.num_heads == 0,
        "NUM_HEADS must be a multiple of NUM_KV_HEADS": c.num_heads % c.num_kv_heads == 0,
        "MODEL_DIM / NUM_HEADS must be even": c.head_dim % 2 == 0,
        "ROPE_DIMS must be even and at most MODEL_DIM / NUM_HEADS": c.rope_dims in range(0, c.head_dim + 1, 2),
        "QK_GAINS=2 needs 0 < ROPE_DIMS < MODEL_DIM / NUM_HEADS": c.qk_gains == 1 or 0 < c.rope_dims < c.head_dim,
        "ATTN_GATE_DIMS must be at most MODEL_DIM": c.attn_gate_dims <= c.model_dim,
        "ATTN_GATE_DIMS must be 0 with GATED_ATTENTION=1": not (c.gated_attention and c.attn_gate_dims),
        "VE_LAYERS must be below NUM_LAYERS": all(layer < c.num_layers for layer in c.ve_layers),
        "XSA_LAST_N must be at most NUM_LAYERS": c.xsa_last_n <= c.num_layers,
        "NUM_LOOPS needs LOOP_START <= LOOP_END < NUM_LAYERS": not c.num_loops or loops_inside,
        "BIGRAM_VOCAB_SIZE must not be 1": c.bigram_vocab_size != 1,
        "TRAIN_SEQ_LEN or EVAL_SEQ_LEN times MODEL_DIM / NUM_HEADS must be at most 2**24": longest * c.head_dim
        <= 2**24,
        "EMBED_BITS must be 2 to 8, or 16": c.embed_bits in (*range(2, 9), 16),
        "TABLE_BITS must be 0, 2 to 8, or 16": c.table_bits in (0, *range(2, 9), 16),
        "CLIP_SHARES must be values above 0 and at most 1": all(0 < clip <= 1 for clip in c.clip_shares or (0,)),
        "MEAN_SCALE needs QUANTIZER=gptq, MATRIX_BITS=8, EMBED_BITS=8, TABLE_BITS=0": not c.mean_scale or by_cost,
    }


def training_rules(c: Config) -> dict[str, bool]:
    """{rule: whether it holds} for batches, schedules and time."""
    batch, lens, ends = c.train_batch_tokens, c.early_seq_lens, c.early_seq_ends
    fit = all(batch % n == 0 and n <= c.train_seq_len for n in lens)
    increasing = len(ends) == len(lens) and sorted({*ends}) == [*ends]
    qat_starts = c.min_lr < (c.late_qat_threshold or 2)  # 0: no late QAT
    swa_starts = c.averaging != "swa" or c.min_lr < c.swa_start_scale
    two_warmdowns = c.warmdown_frac and c.warmdown_iters
    two_warmups = c.muon_momentum_warmup_frac and c.muon_momentum_warmup_steps
    plain_name = Path(c.run_id).name == c.run_id and c.run_id.isprintable()
    return {
        "TRAIN_BATCH_TOKENS must be a multiple of TRAIN_SEQ_LEN": batch % c.train_seq_len == 0,
        "MICRO_BATCH_TOKENS must be at least TRAIN_SEQ_LEN": c.micro_batch_tokens >= c.train_seq_len,
        "EARLY_SEQ_LENS must divide TRAIN_BATCH_TOKENS and be at most TRAIN_SEQ_LEN": fit,
        "EARLY_SEQ_ENDS must increase, one for each of EARLY_SEQ_LENS": increasing,
        "MIN_LR must be below LATE_QAT_THRESHOLD, or late QAT never starts": qat_starts,
        "MIN_LR must be below SWA_START_SCALE with AVERAGING=swa, or SWA never starts": swa_starts,
        "WARMDOWN_FRAC and WARMDOWN_ITERS both set the warmdown; set one to 0": not two_warmdowns,
        "MUON_MOMENTUM_WARMUP_FRAC and MUON_MOMENTUM_WARMUP_STEPS both set the warm-up; set one to 0": not two_warmups,
        "GPTQ_RESERVE_SECONDS leaves no time of MAX_WALLCLOCK_SECONDS to train; lower it": c.time_limit > 0,
        "RESUME needs RUN_ID, the run to continue, and EVAL_ONLY=0": not c.resumed or c.run_id and not c.eval_only,
        "RUN_ID must be a plain name, because it names files in OUTPUT_DIR": plain_name,
    }


def evaluation_rules(c: Config) -> dict[str, bool]:
    """{rule: whether it holds} for evaluation and test-time training."""
    stream, lora, adapting = not c.by_document, c.ttt_lora_rank > 0, c.by_document and c.ttt_epochs > 0
    return {
        "EVAL_STRIDE must divide the window, EVAL_SEQ_LEN or TRAIN_SEQ_LEN": c.window % c.eval_stride == 0,
        "TTT_CHUNK_TOKENS must be from 8 to the window, EVAL_SEQ_LEN or TRAIN_SEQ_LEN, with TTT_SCOPE=document": (
            not adapting or MIN_CHUNK <= c.ttt_chunk_tokens <= c.window
        ),
        "TTT_CHUNK_TOKENS must be a multiple of the window, EVAL_SEQ_LEN or TRAIN_SEQ_LEN, with TTT_SCOPE=stream": (
            c.by_document or c.ttt_chunk_tokens % c.window == 0
        ),
        "TTT_LORA_RANK must be above 0 with TTT_SCOPE=document": not adapting or lora,
        "TTT_COSINE_FLOOR must be 1 with TTT_SCOPE=document": stream or c.ttt_cosine_floor == 1,
        "TTT_GRAD_CLIP must be 0 with TTT_SCOPE=document; it would couple documents": stream or c.ttt_grad_clip == 0,
        "TTT_EXPERT_LRS must be empty with TTT_SCOPE=stream": c.by_document or not c.ttt_expert_lrs,
        "TTT_LORA_SCALE needs TTT_LORA_RANK above 0": lora or c.ttt_lora_scale == 1,
        "TTT_NESTEROV=1 needs TTT_OPTIMIZER=sgd and TTT_MOMENTUM above 0": (
            not c.ttt_nesterov or c.ttt_optimizer == "sgd" and c.ttt_momentum > 0
        ),
    }


def memory_rules(c: Config) -> dict[str, bool]:
    """{rule: whether it holds} for the memory of an evaluation, also for an untrusted artifact."""
    rows = c.ttt_batch_seqs if c.ttt_epochs else 0
    adapters = rows * c.ttt_lora_rank * c.by_document * (1 + len(c.ttt_expert_lrs))
    masked_rows = max(c.eval_batch_seqs, 0 if c.by_document else rows) * c.document_attention
    widest = max(c.eval_batch_seqs * max(c.vocab_size, c.mlp_dim), rows * c.mlp_dim)
    batch = "EVAL_BATCH_SEQS and TTT_BATCH_SEQS, times the window of EVAL_SEQ_LEN or TRAIN_SEQ_LEN"
    return {
        f"{batch}, must be at most 2**18 tokens": max(c.eval_batch_seqs, rows) * c.window <= 2**18,
        f"{batch}, times the MLP width or VOCAB_SIZE, must be at most 2**30": widest * c.window <= 2**30,
        f"{batch} squared, must be at most 2**29 with DOCUMENT_ATTENTION=1": masked_rows * c.window**2 <= 2**29,
        "TTT_BATCH_SEQS times TTT_LORA_RANK times experts must be at most 2**14 with TTT_SCOPE=document": adapters
        <= 2**14,
    }


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. With one rank every collective is the identity, so callers need no special case."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    given: frozenset[str] = frozenset()  # names of the environment's variables

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensors: list[Tensor]):
        """Mean of each tensor over ranks, in place, in one collective."""
        if self.world > 1:
            flat = self.sum_(nn.utils.parameters_to_vector(tensors)) / self.world
            nn.utils.vector_to_parameters(flat, tensors)

    def reduce_scatter(self, stack) -> tuple[Callable, Tensor]:
        """Start a reduce-scatter of a stack (N, ...), N a multiple of the ranks: (wait, this rank's items)."""
        if self.world == 1:
            return lambda: None, stack
        mine = stack.new_empty(len(stack) // self.world, *stack.shape[1:])
        return dist.reduce_scatter_tensor(mine, stack, async_op=True).wait, mine

    def all_gather(self, mine: Tensor) -> tuple[Callable, Tensor]:
        """Start an all-gather of each rank's items: (wait, the stack of all ranks)."""
        if self.world == 1:
            return lambda: None, mine
        whole = mine.new_empty(self.world * len(mine), *mine.shape[1:])
        return dist.all_gather_into_tensor(whole, mine.contiguous(), async_op=True).wait, whole

    def maximum(self, *values) -> list[float]:
        """Maximum of each value over ranks, on every rank. Uses the host only, so the device does not wait."""
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

    def shard(self, items: Sequence) -> Sequence:
        """This rank's contiguous part of `items`; the parts of all ranks are disjoint and cover them."""
        n = len(items)
        return items[n * self.rank // self.world : n * (self.rank + 1) // self.world]

    def fit_batch(self, option: str, value, attempt: Callable[[int], Any], log, unit=1) -> int:
        """The largest of value // unit, its half, its quarter, ... for which attempt(count) has enough memory on every
        rank. A CPU is not tried. The attempt must not communicate. Raises InputError with the value that fits if the
        environment sets this option.
        """
        count, failed = value // unit, self.device.type == "cuda"
        while failed:
            try:
                attempt(count)
                failed = False
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            (failed,) = self.maximum(failed)
            if failed:
                torch.cuda.empty_cache()
                count //= 2
            if not count:
                raise InputError(f"out of memory with {option}={unit}; use a smaller model or a shorter window")
        if count < value // unit:
            text = f"{option}={value} does not fit into the memory of the GPU; {count * unit}"
            if option in self.given:
                raise InputError(f"{text} fits")
            log(f"{text} is used")
        return count

    def memory(self) -> str:
        """Peak device memory as a log line; empty on a CPU."""
        if self.device.type != "cuda":
            return ""
        return (
            f"\npeak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
            f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB"
        )

    def compiles(self, cfg) -> bool:
        """Whether to use torch.compile; auto on a CPU: in runs long enough to amortize it, with a C++ compiler."""
        on_gpu, compiler = self.device.type == "cuda", shutil.which(os.environ.get("CXX", "g++"))
        auto = on_gpu or cfg.max_wallclock_seconds > 600 and bool(compiler)
        if cfg.compile == "on" and not on_gpu and not compiler:
            raise InputError("COMPILE=on needs a C++ compiler; install g++, set CXX, or set COMPILE=off")
        return dict(on=True, off=False, auto=auto)[cfg.compile]

    def compile(self, fn: Callable, cfg) -> Callable:
        """`fn` compiled to a static graph, or `fn` itself."""
        if not self.compiles(cfg):
            return fn
        torch._dynamo.config.recompile_limit = 64  # one forward serves training, scoring and TTT, in several shapes
        return torch.compile(fn, dynamic=False, fullgraph=True)


@contextmanager
def launch(env) -> Iterator[Ranks]:
    """The ranks that torchrun's variables in `env` describe, on CUDA with nccl or on the CPU with gloo."""
    rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local = int(env.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        # the timeout covers work of one rank alone, such as packing, which is slow on a CPU
        backend, minutes = ("cpu:gloo,cuda:nccl", 10) if device.type == "cuda" else ("gloo", 30)
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    yield Ranks(rank, world, device, frozenset(env))
    if world > 1:  # not after a failure: it would wait for ranks that wait for this one
        dist.destroy_process_group()


def compute_dtype(cfg, device: torch.device) -> torch.dtype:
    """Dtype of activations. DTYPE=auto: bf16 if the device has bf16 matrix units (NVIDIA: from sm_80 on), else fp32."""
    on_gpu, bf16, fp32 = device.type == "cuda", torch.bfloat16, torch.float32
    fast = torch.cuda.is_bf16_supported(False) if on_gpu else torch.cpu._is_avx512_bf16_supported()
    if on_gpu and cfg.dtype == "bf16" and not fast:  # Inductor compiles no bf16 for it
        raise InputError(
            f"DTYPE=bf16 needs bf16 matrix units, which {torch.cuda.get_device_name(device)} lacks; set DTYPE=fp32"
        )
    return dict(bf16=bf16, fp32=fp32, auto=bf16 if fast else fp32)[cfg.dtype]


class Attention(NamedTuple):
    """The attention function of a run, and a warning if a faster one is missing."""

    name: str
    attend: Callable
    warnings: list[str]


FLASH_PACKAGES = dict(fa3=("flash_attn_interface", "flash_attn_3"), fa2=("flash_attn", "flash_attn"))


def load_attention(name: str, cfg, ranks) -> Callable:
    """The attention function of this name. Raises ImportError if it cannot run here."""
    if name == "sdpa":
        return attend_sdpa
    if ranks.device.type != "cuda" or compute_dtype(cfg, ranks.device) != torch.bfloat16:
        raise ImportError("it needs a GPU and bf16")
    if torch.version.hip:
        raise ImportError("it needs an NVIDIA GPU")
    if name == "fa3" and torch.cuda.get_device_capability(ranks.device)[0] != 9:
        raise ImportError("it needs a Hopper GPU")
    module, namespace = FLASH_PACKAGES[name]
    try:
        package = importlib.import_module(module)
        kernels = package.flash_attn_func, package.flash_attn_varlen_func if cfg.document_attention else None
    except (OSError, RuntimeError, AttributeError) as error:  # built for another version of torch or CUDA
        raise ImportError(f"{module} cannot be loaded ({' '.join(str(error).split())})") from None
    if ranks.compiles(cfg) and not hasattr(getattr(torch.ops, namespace), "_flash_attn_forward"):
        raise ImportError(f"this {module} registers no operator that torch.compile can trace; install a newer version")
    attend = partial(attend_flash, kernels)
    return partial(attend_padded, attend) if cfg.head_dim % 8 else attend


def choose_attention(cfg, ranks) -> Attention:
    """ATTENTION, or for auto the first of fa3, fa2 and sdpa that can run. Raises InputError."""
    missing = []
    for name in ("fa3", "fa2", "sdpa") if cfg.attention == "auto" else (cfg.attention,):
        try:
            attend = load_attention(name, cfg, ranks)
        except ImportError as error:
            missing.append(f"{name}: {error}")
            continue
        slow = ranks.device.type == "cuda" and missing
        return Attention(name, attend, [f"attention by {name}, without {'; '.join(missing)}"] if slow else [])
    raise InputError(f"ATTENTION={cfg.attention} cannot run: {missing[0]}; set ATTENTION=auto")


class AsyncScalar:
    """Asynchronous device-to-host copy of a scalar; `value()` waits for this copy only."""

    def __init__(self, scalar: Tensor):
        self.host = torch.empty((), pin_memory=scalar.is_cuda).copy_(scalar, non_blocking=True)
        self.copied = torch.cuda.current_stream().record_event() if scalar.is_cuda else None

    def value(self) -> float:
        if self.copied:
            self.copied.synchronize()
        return float(self.host)


class Clock:
    """Training time in seconds, with `before` and without `paused()`."""

    def __init__(self, device: torch.device, first_step_seconds, before=0.0):
        self.synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.laps = deque([first_step_seconds], maxlen=65)
        self.synchronize()
        self.last = perf_counter()
        self.start = self.last - before

    def seconds(self) -> float:
        return perf_counter() - self.start

    def lap(self):
        before, self.last = self.last, perf_counter()
        self.laps.append(self.last - before)

    @property
    def step_seconds(self) -> float:
        """Median of the last steps, so that a single slow step does not change it."""
        return statistics.median_low(self.laps)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.synchronize()
        begin = perf_counter()
        yield
        self.synchronize()
        self.last = perf_counter()
        self.start += self.last - begin


def on_signals(handler: Any):
    """Set the handler of Ctrl-C, of SIGTERM (torchrun, schedulers) and, unless nohup ignores it, of SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def write_stderr(text: str):
    """Write to stderr; ignores a closed stderr."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, RuntimeError):
        pass


class Log:
    """Writes lines to the terminal and to OUTPUT_DIR/logs/RUN_ID.txt, on the main rank only.

    `facts` collects values for the closing RESULT line. The first line creates the file.
    """

    def __init__(self, cfg, ranks):
        self.facts: dict[str, Any] = {}
        self.path = Path(cfg.output_dir) / "logs" / f"{cfg.run_id}.txt"
        self.active, self.broken = ranks.is_main, set()
        self.mode = "a" if cfg.resumed else "x"  # x: fail if another run creates it meanwhile
        if self.active:
            if self.mode == "x" and self.path.exists():
                raise InputError(f"{self.path} exists; set another RUN_ID or OUTPUT_DIR")
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str):
        if self.active:
            with self.ignoring_write_errors("the terminal"):
                print(text, flush=True)
            with self.ignoring_write_errors(self.path), self.path.open(self.mode, encoding="utf-8") as file:
                self.mode = "a"
                file.write(text + "\n")

    def fact(self, **facts: Any):
        """Log `name:value` pairs in one line and collect them."""

        def text(value):
            if isinstance(value, dict):
                return " ".join(f"{name}={item}" for name, item in value.items())
            return f"{value:.3f}" if isinstance(value, float) else str(value)

        self.facts |= facts
        self(" ".join(f"{name}:{text(value)}" for name, value in facts.items()))

    def warn(self, *texts: str):
        """Log a WARNING line for each text and collect it."""
        for text in texts:
            self(f"WARNING: {text}")
            self.facts.setdefault("warnings", []).append(text)

    @contextmanager
    def ignoring_write_errors(self, output: object) -> Iterator[None]:
        """Inside the context, an output that cannot be written causes one warning and the run continues."""
        try:
            yield
        except FileExistsError:  # another run with this RUN_ID started at the same time
            raise InputError(f"{self.path} exists; set another RUN_ID or OUTPUT_DIR") from None
        except (OSError, ValueError) as error:
            if output not in self.broken:
                self.broken.add(output)
                write_stderr(f"WARNING: cannot write to {output} ({error}); the run continues\n")
            if output == "the terminal":  # its buffer would fail again at exit
                sys.stdout = open(os.devnull, "w")

    def check_writable(self, outputs: Mapping[Path, int]):
        """Raises InputError unless the main rank can write a file of the given number of bytes at each path."""
        for path, size in outputs.items() if self.active else ():
            if path.is_dir():
                raise InputError(f"cannot write {path}: it is a folder; set another name")
            try:
                with unfinished(path) as part:
                    part.touch()
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror}; set another folder") from None
            if (free := shutil.disk_usage(path.parent).free) < size:
                raise InputError(f"cannot write {path}: it may need {size} bytes, and {free} are free; free some space")

    def header(self, cfg, ranks, env):
        """Log source, versions, device and the options that the environment sets."""
        source, on_gpu = Path(__file__).read_bytes(), ranks.device.type == "cuda"
        versions = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
        versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
        overrides = {name: text for name, text in as_env(vars(cfg)).items() if name in env}
        device = torch.cuda.get_device_name(ranks.device) if on_gpu else f"cpu x{torch.get_num_threads()}"
        self.fact(source_sha256=hashlib.sha256(source).hexdigest())
        self.fact(device=device, world_size=ranks.world, versions=versions)
        self.warn(*run_warnings(env, ranks))
        if self.active and on_gpu and shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
            self(f"nvidia-smi: {subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()}")
        self.fact(variant=cfg.variant, seed=cfg.seed, overrides=overrides)


def run_warnings(env, ranks) -> list[str]:
    """Warnings about unknown environment variables, an unused GPU, missing bf16 and busy cores."""
    names, texts = unknown_options(env)[1], []
    if names:
        texts.append(f"set, but not options of this script: {', '.join(names)}")
    on_cpu = ranks.device.type == "cpu"
    if on_cpu and torch.backends.mps.is_available():
        texts.append("Apple's GPU is not used; the run is on the CPU")
    if not (on_cpu or torch.cuda.is_bf16_supported(False)):
        texts.append("the GPU has no bf16: fp32 takes twice the memory for activations, and no tensor core multiplies")
    if on_cpu and ranks.world == 1 and torch.get_num_threads() + busy_cores() > os.cpu_count():
        texts.append(
            "other processes keep cores busy, and OpenMP threads that spin at barriers then make a step up to 8 times "
            "slower; set OMP_WAIT_POLICY=PASSIVE, or OMP_NUM_THREADS to the number of idle cores"
        )
    return texts


def busy_cores() -> int:
    """Number of cores that other processes keep busy, from Linux's run queue; 0 elsewhere, and where OpenMP threads
    do not spin.
    """
    queue, samples = Path("/proc/loadavg"), []
    if not queue.exists() or torch.get_num_threads() == 1 or os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        return 0
    for _ in range(5):
        samples.append(int(queue.read_text().split()[3].partition("/")[0]) - 1)
        time.sleep(0.02)
    return min(samples)


# ---- Main.


def set_aside(path: Path, log):
    """Rename the file of an earlier run, so that it is not taken for this run's file if this run is killed."""
    if log.active and path.exists():
        aside = Path(f"{path}.before")
        path.replace(aside)
        log(f"{path.name} of an earlier run is now {aside.name}")


def run_training(cfg, env, ranks, log) -> tuple[dict[str, Score], str]:
    """Check all inputs and outputs, train, average and write the artifact. Returns the scores of the raw and of the
    averaged weights, and the sha256 of the artifact.
    """
    compressor_module(cfg.compressor)
    scorer, shards = Scorer(read_validation(cfg), cfg, ranks, log), find_shards(cfg, "train")
    attention, dtype = choose_attention(cfg, ranks), compute_dtype(cfg, ranks.device)
    batches = Batches(TokenStream(shards, cfg.vocab_size), cfg, ranks)
    model = GPT(cfg, attention.attend, dtype)
    count = sum(p.numel() for p in model.parameters())
    outputs = {log.path: 2**20, cfg.artifact_path: min(cfg.max_artifact_bytes, 4 * count)}
    outputs |= {cfg.checkpoint_path("average"): 4 * count, cfg.checkpoint_path("state"): 16 * count}
    log.check_writable(outputs | audit_output(cfg, scorer))
    log.header(cfg, ranks, env)
    model.init_weights(cfg)
    trainer = Trainer(model.to(ranks.device), batches, cfg, ranks)
    log.fact(dataset=Path(cfg.data_path).name, train_shards=len(shards), parameters=count)
    log.fact(attention=attention.name, dtype=str(dtype))
    log.warn(*attention.warnings)
    if cfg.resumed:
        load_checkpoint(trainer, cfg.resumed)
        log.fact(resumed=cfg.resumed, parts=trainer.parts[:-1])
    for path in (cfg.artifact_path, *Path(cfg.output_dir).glob("final_model.*.ptz")):
        set_aside(path, log)
    try:
        curvatures = train(trainer, lambda: scorer.evaluate_windows(trainer.forward), log)
        on_signals(signal.default_int_handler)
        weights = trainer.average.values
        plans = quant_plans(weights, quant_specs(model, cfg), cfg, curvatures)
        sha256 = save_artifact(plans, weights, trainer.looped, cfg, ranks, log)
    except (Exception, KeyboardInterrupt) as error:
        rescue_average(trainer, error, log)
        raise
    ranks.maximum(0.0)  # wait for all ranks
    with trainer.average.swapped_in():
        averaged = scorer.evaluate_windows(trainer.forward)
    raw = scorer.evaluate_windows(trainer.forward)
    log(f"DIAGNOSTIC raw {raw}")
    log(f"DIAGNOSTIC post_{cfg.averaging} {averaged}")
    return {"raw": raw, "averaged": averaged}, sha256


def rescue_average(trainer: Trainer, error: BaseException, log):
    """Save the averaged weights after a failure, unless the run diverged and has a checkpoint with finite weights."""
    on_signals(signal.SIG_IGN)
    cfg = trainer.cfg
    try:
        if not (isinstance(error, Diverged) and cfg.checkpoint_path("average").exists()):
            save_checkpoint(trainer, "average", log)
    except Exception as second:
        write_stderr(f"WARNING: the averaged weights could not be saved: {second}\n")
    if isinstance(error, (TrainingFailed, Interrupted)):  # raised by all ranks
        trainer.ranks.maximum(0.0)  # wait for them


def audit_output(cfg, scorer: Scorer) -> dict[Path, int]:
    """The audit file with its maximum size in bytes, if one is requested."""
    return {Path(cfg.audit): (32 + 8 * len(cfg.ttt_expert_lrs)) * len(scorer.bytes)} if cfg.audit else {}


def evaluations(scorer: Scorer, model: GPT, looped: bool) -> dict[str, Callable[[], Score]]:
    """The evaluations of a model by name: adjacent windows, sliding window and, with TTT_EPOCHS, test-time training."""
    cfg = scorer.cfg
    params = ttt_parameters(model, cfg) if cfg.ttt_epochs and not cfg.ttt_lora_rank else []  # freezes before compiling
    forward = partial(scorer.ranks.compile(model, cfg), looped=looped)
    # not compiled: documents have many context lengths, and each length would compile another graph
    adapting = partial(model, looped=looped, single_document=True) if cfg.by_document else forward
    found = {
        f"final_int{cfg.matrix_bits}_roundtrip": lambda: scorer.evaluate_windows(forward),
        f"final_int{cfg.matrix_bits}_sliding_window": lambda: scorer.evaluate_sliding(forward),
    }
    if cfg.ttt_epochs:  # legal by the contest's rules: only scored targets are trained on
        found["legal_ttt"] = lambda: evaluate_adapting(scorer, model, params, adapting)
    return found


def run_evaluation(artifact: Artifact, scorer: Scorer, begin, ranks, log) -> dict[str, Score]:
    """Run and log all evaluations of an artifact. `begin` is when loading it started."""
    cfg, looped = artifact.cfg, artifact.looped
    model, attention = load_model(cfg, artifact.weights, ranks), choose_attention(cfg, ranks)
    log(f"artifact:{cfg.artifact_path} looped:{int(looped)} eval_seq_len:{cfg.window}")
    log.fact(artifact_sha256=artifact.sha256, eval_stride=cfg.eval_stride, ttt_chunk_tokens=cfg.ttt_chunk_tokens)
    log.fact(attention=attention.name, dtype=str(model.dtype))
    log.warn(*artifact.warnings, *attention.warnings)
    if scorer.split_targets > len(scorer.bytes):
        log.warn(f"only {len(scorer.bytes)} of the split's {scorer.split_targets} targets are scored")
    scores = {}
    for name, evaluate in evaluations(scorer, model, looped).items():
        scores[name] = score = evaluate()
        log(f"{name} {score}")
        log(f"{name}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}")
    count, size = len(scorer.bytes), int(scorer.bytes.sum())
    log.fact(eval_seconds=perf_counter() - begin, targets=count, val_split_targets=scorer.split_targets, bytes=size)
    log.fact(val_sha256=scorer.sha256, val_bytes_sha256=scorer.bytes_sha256)
    log(f"bytes_per_token:{size / count:.6f}{ranks.memory()}")
    return scores


def describe(cfg) -> str:
    """The resolved options and the number of parameters; needs no data, no GPU and no memory for weights."""
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT(cfg).parameters())
    return "\n".join([*map("=".join, as_env(vars(cfg)).items()), f"model_params:{count}"])


def report(scores: dict[str, Score], model_bytes) -> str:
    """The closing table: stage, loss in nats per token, bits per byte, bytes of code + model, seconds."""
    code_bytes = Path(__file__).stat().st_size
    lines = [f"{'stage':28s} {'val_loss':>9s} {'val_bpb':>9s} {'bytes':>11s} {'seconds':>9s}"]
    for name, s in scores.items():
        size = "-" if name in ("raw", "averaged") else code_bytes + model_bytes
        lines.append(f"{name:28s} {s.loss:9.4f} {s.bpb:9.4f} {size:>11} {s.seconds:9.1f}")
    return "\n".join([*lines, f"code {code_bytes} + model {model_bytes} = {code_bytes + model_bytes} bytes"])


def resumed_config(located: Config, env) -> Config:
    """The options of the environment and, for all others, those that the checkpoint of the run's first part stores."""
    path = located.checkpoint_path(located.resumed)
    try:
        stored = read_header(path.read_bytes())[0]["run"]
        if stored["RUN_ID"] != located.run_id:
            raise InputError(f"it is of RUN_ID={stored['RUN_ID']}; set that RUN_ID")
        return Config.from_env({**stored, **env, "OUTPUT_DIR": located.output_dir})
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"checkpoint {path}: {error}") from None


def resolve(env) -> tuple[Config, Artifact | None]:
    """The options of a run. With EVAL_ONLY also the artifact, whose evaluation the environment may change. With RESUME
    the options of the run's first part, unless the environment changes them.
    """
    named = {name: env[name] for name in ("RUN_ID", "OUTPUT_DIR", "ARTIFACT", "EVAL_ONLY", "RESUME") if name in env}
    located, artifact = Config.from_env(named), None
    if located.eval_only:
        artifact = load_artifact(located.artifact_path, env)
        cfg = artifact.cfg
    else:
        cfg = resumed_config(located, env) if located.resumed else Config.from_env(env)
    if not cfg.run_id:
        kind = "eval_" if cfg.eval_only else ""
        cfg = replace(cfg, run_id=f"{cfg.variant}_seed{cfg.seed}_{kind}{time.strftime('%Y%m%d-%H%M%S')}")
    if cfg.ttt_epochs:
        with torch.device("meta"):  # check TTT_PARAMS before training
            model = GPT(cfg)
        (lora_starts if cfg.ttt_lora_rank else ttt_parameters)(model, cfg)
    return cfg, artifact


def written_artifact(cfg, sha256: str, ranks) -> Artifact:
    """The artifact that a run has just written, read by the main rank: other nodes may not share its disk."""
    settings = as_env(cfg.group("run", "evaluation"))
    blob = read_artifact(cfg.artifact_path, settings) if ranks.is_main else b""
    if ranks.is_main and hashlib.sha256(blob).hexdigest() != sha256:
        raise InputError(f"{cfg.artifact_path} was overwritten by another run; set another RUN_ID or ARTIFACT")
    return load_artifact(cfg.artifact_path, settings, ranks.broadcast(blob))


def main(argv: list[str], env):
    """Train and write an artifact, or load one; evaluate it from its bytes alone; print the table."""
    if argv in (["-h"], ["--help"]):
        return print(usage(), flush=True)
    begin = perf_counter()
    cfg, artifact = resolve(env)
    if argv == ["--describe"]:
        return print(describe(cfg), flush=True)
    if argv:
        raise InputError(f"unknown argument {argv[0]}; options are environment variables (--help lists them)")
    with launch(env) as ranks:
        cfg = replace(cfg, dtype="bf16" if compute_dtype(cfg, ranks.device) == torch.bfloat16 else "fp32")
        ranks.compiles(cfg)  # raises InputError if COMPILE=on cannot work
        log, scores = Log(cfg, ranks), {}
        if artifact is None:
            scores, sha256 = run_training(cfg, env, ranks, log)
            begin = perf_counter()
            artifact = written_artifact(cfg, sha256, ranks)
        else:
            artifact = artifact._replace(cfg=cfg)
        scorer = Scorer(read_validation(artifact.cfg), artifact.cfg, ranks, log)
        if cfg.eval_only:
            log.check_writable({log.path: 2**20} | audit_output(cfg, scorer))
            log.header(cfg, ranks, env)
        scores |= run_evaluation(artifact, scorer, begin, ranks, log)
        log(report(scores, artifact.size))
        log(f"log:{log.path} artifact:{cfg.artifact_path}")
        log.facts["scores"] = {stage: score._asdict() for stage, score in scores.items()}
        log(f"RESULT {json.dumps(log.facts)}")


def first_failure() -> bool:
    """Whether this rank is the first that failed, by a counter in the process group's store."""
    if not dist.is_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("failures", 1) == 1
    except (RuntimeError, ValueError):  # the rank that hosts the store has ended
        return True


def out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host has no memory left."""
    words = "out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


def explain(error: BaseException) -> str:
    """One line for a user or machine error, a traceback for a bug."""
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, InputError):
        text = str(error)
    elif isinstance(error, ModuleNotFoundError):
        text = f"the package {error.name} is missing; pip install -r requirements.txt"
    elif out_of_memory(error):
        text = f"out of memory ({first_line}); lower MICRO_BATCH_TOKENS, or EVAL_BATCH_SEQS and TTT_BATCH_SEQS"
    elif isinstance(error, OSError):
        text = f"cannot access {error.filename}: {error.strerror}; check the path" if error.filename else first_line
    elif isinstance(error, dist.DistError) or "gloo" in first_line:
        text = f"another rank has ended without a message ({first_line})"
    else:
        return "".join(traceback.format_exception(error))
    return "train_gpt.py: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:2000] + "\n"


def run(argv: list[str], env):
    """Call `main` and exit: 0, 1 with one line after an InputError, 1 with a traceback after a bug, 130 after Ctrl-C.
    Only the rank that failed first prints.
    """
    for name in ("stdout", "stderr"):  # None if the parent process closed it
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
    on_signals(signal.default_int_handler)
    try:
        main(argv, env)
        status, text = 0, ""
    except KeyboardInterrupt:
        status, text = 130, ""
    except Exception as error:
        status, text = 1, explain(error)
    if status and first_failure():
        write_stderr(text)
    # With several ranks a normal exit waits, after a failure, for ranks that wait for this one; with torch 2.13 it can
    # abort: threads of gloo outlive the process group and may still hold tensors.
    if env.get("WORLD_SIZE", "1") != "1":
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run(sys.argv[1:], os.environ)
