"""What a training step costs and how fast it is, counted and measured."""

import os

# Read when torch is loaded. Idle threads that spin make a step many times slower as soon as another process runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
