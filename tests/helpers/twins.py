"""Models of the smallest run that differ in one option, and their losses."""

import dataclasses

import torch
from conftest import make_model
from test_variants import scaled

import train_gpt as t

LOOPS = dict(num_loops=2, loop_start=1, loop_end=2)
LOOPED = [0, 1, 2, 1, 2, 1, 2, 3]  # order of the 4 blocks of the smallest run under LOOPS


def ids_of(cfg, seed=0, rows=2, length=24):
    ids = torch.randint(2, cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = ids[0, 9] = t.BOS
    return ids


def losses(cfg, model, **options):
    return model(ids_of(cfg), ids_of(cfg, seed=1), **options)


def twin(cfg, values=None, **changes):
    """A model with changed options that shares, by name, the weights of `make_model(cfg)`; `values` sets parameters by the end of their name."""
    changed = dataclasses.replace(cfg, **changes)
    model, source = make_model(changed, seed=1), make_model(cfg).state_dict()
    fits = {name: source[name] for name, p in model.named_parameters() if name in source and source[name].shape == p.shape}
    model.load_state_dict(fits, strict=False)
    with torch.no_grad():
        for end, value in (values or {}).items():
            chosen = [p for name, p in model.named_parameters() if name.endswith(end)]
            assert chosen, end
            for p in chosen:
                p.copy_(torch.as_tensor(value))
    return model


def small(variant, dataset, **changes):
    return dataclasses.replace(t.Config.from_env(dataset | scaled(variant)), **changes)


def trainer_of(cfg):
    model = t.GPT(cfg)
    model.init_weights(cfg)
    return t.Trainer(model, t.Batches(t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size), cfg, t.Ranks()), cfg, t.Ranks())
