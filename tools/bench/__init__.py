"""Benchmarks of train_gpt.py: measured times, and launches and bytes that are counted without a GPU."""

import os

# torch reads these when it is imported. Idle OpenMP threads that spin slow down a step beside other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch  # noqa: E402

from tools.files import Refused  # noqa: E402


def require_gpu() -> torch.device:
    """Returns the GPU. Raises Refused if torch sees none."""
    if not torch.cuda.is_available():
        raise Refused("torch sees no GPU; run this on a machine with one, or under tests/nullgpu/nullgpu.py")
    return torch.device("cuda")
