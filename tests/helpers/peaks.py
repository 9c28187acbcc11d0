"""Measures a peak that tools.bench.cards reads from logs/cards.json: of torch's allocator, on the null GPU.

    VARIANT=card MICRO_BATCH_TOKENS=49152 python tests/nullgpu/nullgpu.py VENV/bin/python -m tests.helpers.peaks

Prints the GiB of a warm-up of the longest graph. Attention is the stand-in of tools.bench.anatomy, with the memory of
FlashAttention, and Triton kernels are not compiled: the null GPU would not run them.
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch._inductor.async_compile import AsyncCompile

import train_gpt as t
from tools.bench import anatomy, bench, require_gpu

IDLE = SimpleNamespace(run=lambda *_, **__: None)  # a kernel


def main():
    require_gpu()
    os.environ.pop("PYTORCH_NO_CUDA_MEMORY_CACHING", None)  # with it torch does not count memory
    with tempfile.TemporaryDirectory() as folder, t.launch({}) as ranks:
        cfg = bench.row_config(os.environ["VARIANT"], os.environ, Path(folder))
        # two micro steps, so that gradients of the first are there in the second
        cfg = replace(cfg, train_batch_tokens=2 * cfg.micro_batch_tokens, warmup_steps=2, enable_looping_at=0.0)
        attention = t.Attention("null", anatomy.attend, [])
        with (
            mock.patch.object(t, "choose_attention", lambda *_: attention),
            mock.patch.object(AsyncCompile, "triton", lambda *_, **__: IDLE),
        ):
            bench.make_trainer(cfg, ranks).warm_up(mock.Mock())
        print(f"{cfg.variant} {cfg.micro_batch_tokens}: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
