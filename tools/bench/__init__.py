"""What a training step costs and how fast it is, counted and measured."""

import os

from tools.files import Refused

# Read when torch is loaded. Idle threads that spin make a step many times slower as soon as another process runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def require_gpu() -> None:
    """Raises Refused where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise Refused("torch sees no GPU; run it on one, or on the null GPU: see --help")
