"""EVAL_ONLY runs, one after the other, in the processes of one torchrun. For torchrun.

Its argument is JSON, a list of [environment, trouble]: "late" delays the last rank by a second in its first score, "other"
gives it slightly different weights, "" is no trouble. After each chunk that was trained on, the parameters of all ranks
are compared bit by bit; after each run the main rank prints whether they differed, and the number of comparisons.
"""

import json
import os
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist

import train_gpt as t

LAST = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
found, waits, forward, learn, load_model = [], [], t.GPT.forward, t.Adaptation.__call__, t.load_model


def late(self, *args, **kwargs):
    if waits and not torch.is_grad_enabled():
        time.sleep(waits.pop())
    return forward(self, *args, **kwargs)


def compared(self, chunk):
    learn(self, chunk)
    if self.ranks.world > 1:
        mine = torch.cat([p.detach().flatten() for p in self.params])
        everyone = [torch.empty_like(mine) for _ in range(self.ranks.world)]
        dist.all_gather(everyone, mine)
        found.append(any(not torch.equal(mine, other) for other in everyone))


def perturbed(*args):
    model = load_model(*args)
    with torch.no_grad():
        next(model.parameters()).add_(1e-6)
    return model


t.GPT.forward, t.Adaptation.__call__ = late, compared
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
                    print(f"differ:{any(found)} calls:{len(found)}")
except t.InputError as error:
    sys.exit(f"train_gpt.py: {error}")
sys.stdout.flush()
os._exit(0)  # see train_gpt.run
