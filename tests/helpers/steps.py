"""Twenty training steps, then five with late QAT; the main rank saves losses and weights. For torchrun."""

import os
import sys

import numpy as np

import train_gpt as t

cfg = t.Config.from_env(os.environ)
with t.launch(os.environ) as ranks:
    model = t.GPT(cfg)
    model.init_weights(cfg)
    trainer = t.Trainer(model, t.Batches(t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size), cfg, ranks), cfg, ranks)
    losses = [trainer.step(1.0, 0.9).value() for _ in range(20)]
    weights = {name: p.detach().clone().numpy() for name, p in model.named_parameters()}
    trainer.qat = True
    late = [trainer.step(1.0, 0.9).value() for _ in range(5)]
    if ranks.is_main:
        np.savez(sys.argv[1], losses=losses, late=late, **weights)
sys.stdout.flush()
os._exit(0)  # see train_gpt.run
