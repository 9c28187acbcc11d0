"""EVAL_ONLY runs, one after the other, in the processes of one torchrun. For torchrun.

Its argument is JSON, a list of [environment, trouble]: "late" holds the last rank up for a second in its first score, "other"
gives it slightly different weights, "" is no trouble. The main rank prints after each what Ranks.unequal found.
"""

import json
import os
import sys
import time
from contextlib import nullcontext

import torch

import train_gpt as t

LAST = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
found, waits, forward, differ, load_model = [], [], t.GPT.forward, t.Ranks.unequal, t.load_model


def late(self, *args, **kwargs):
    if waits and not torch.is_grad_enabled():
        time.sleep(waits.pop())
    return forward(self, *args, **kwargs)


def noted(self, tensors):
    found.append(differ(self, tensors))
    return found[-1]


def perturbed(*args):
    model = load_model(*args)
    with torch.no_grad():
        next(model.parameters()).add_(1e-6)
    return model


t.GPT.forward, t.Ranks.unequal = late, noted
try:
    with t.launch(os.environ) as ranks:
        t.launch = lambda env: nullcontext(ranks)  # one group of processes serves all runs
        for env, trouble in json.loads(sys.argv[1]):
            waits[:], found[:] = [1.0] * (LAST and trouble == "late"), []
            t.load_model = perturbed if LAST and trouble == "other" else load_model
            try:
                t.main([], os.environ | env)
            finally:
                if ranks.is_main:
                    print(f"differ:{any(map(bool, found))} calls:{len(found)}")
except t.InputError as error:
    sys.exit(f"train_gpt.py: {error}")
