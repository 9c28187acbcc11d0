"""Two training steps with the settings in the environment, for torchrun.

The main rank prints, as JSON, the bytes that each collective of the second step was given.
"""

import json
import os
import sys

import torch
import torch.distributed as dist

import train_gpt as t

seen = []


def noted(name, whole):
    """torch.distributed's function of that name, which notes the bytes of `whole(its arguments)`."""
    inner = getattr(dist, name)

    def run(*args, **kwargs):
        seen.append((name, sum(x.nbytes for x in whole(*args))))
        return inner(*args, **kwargs)

    return run


WHOLE = {"all_reduce": lambda x, *_: [x], "all_gather_into_tensor": lambda whole, _: [whole], "reduce_scatter_tensor": lambda _, whole, *__: [whole],
         "all_to_all_single": lambda whole, *_: [whole]}
cfg = t.Config.from_env(os.environ)
with t.launch(os.environ) as ranks:
    torch.manual_seed(0)
    model = t.GPT(cfg)
    model.init_weights(cfg)
    trainer = t.Trainer(model, t.Batches(t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size), cfg, ranks), cfg, ranks)
    trainer.step(1.0, 0.9)
    for name, whole in WHOLE.items():
        if hasattr(dist, name):
            setattr(dist, name, noted(name, whole))
    ranks.maximum(0.0, 0.0)
    trainer.step(1.0, 0.9)
    if ranks.is_main:
        print("seen:" + json.dumps(seen))
sys.stdout.flush()
os._exit(0)  # see train_gpt.run
