"""Run a train_gpt.py under the null GPU and write down when its host waited, copied from pageable memory or compiled.

    python nullgpu.py VENV/bin/python drive.py REPORT SCRIPT    # with the usual variables; writes REPORT.RANK.json

A span is what lies between two calls of the step, or of the model in an evaluation. The tokenizer is a stand-in of VOCAB_SIZE pieces.
"""

import ctypes
import functools
import importlib.util
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch._dynamo.callback import on_compile_start
from torch.utils._pytree import tree_map_only


class Trained(Exception):
    """Ends a run when its artifact is there, if NULLGPU_STOP=trained."""


class Meter:
    """Spans of the phase that runs, with what was counted in each, and the peak of device memory of every phase."""

    def __init__(self):
        self.library, self.compiled = ctypes.CDLL(None), 0
        self.phase, self.chunk, self.open, self.spans, self.peaks = "", 0, None, [], {}
        on_compile_start(self.count_compile)

    def count_compile(self, _):
        self.compiled += 1

    def read(self):
        counts = (ctypes.c_long * 3)()
        self.library.nullgpu_counts(counts)
        return dict(waits=counts[0], pageable=counts[1], compiles=self.compiled, peak=counts[2])

    def mark(self, kind=""):
        """End the span that is open; begin one of this kind, if any."""
        now = self.read()
        if self.open:
            span, before = self.open
            self.spans.append(span | {key: now[key] - before[key] for key in ("waits", "pageable", "compiles")})
        self.open = (dict(phase=self.phase, chunk=self.chunk, kind=kind), now) if kind else None

    def enter(self, phase):
        """End the phase that runs, note its peak, and begin another one."""
        self.mark()
        self.peaks[self.phase] = self.read()["peak"]
        self.phase, self.chunk = phase, 0
        self.library.nullgpu_reset_peak()


def around(owner, name, wrap):
    """Replace owner.name by a function that calls wrap(original, *arguments)."""
    setattr(owner, name, functools.partialmethod(wrap_method, getattr(owner, name), wrap) if isinstance(owner, type)
            else functools.partial(wrap, getattr(owner, name)))


def wrap_method(self, original, wrap, *args, **kwargs):
    return wrap(original, self, *args, **kwargs)


def described(args, kwargs):
    """What a call of the model scores or learns: the shapes of what it gets, and its settings."""
    kind = "adapt" if torch.is_grad_enabled() else "score"
    shapes = [list(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
    return f"{kind} {shapes} {kwargs}"


def watch_training(t, meter):
    def warm_up(original, *args):
        meter.enter("warm-up")
        seconds = original(*args)
        meter.enter("training")
        return seconds

    def step(original, *args):
        meter.mark("step")
        return original(*args)

    def calibrate(original, *args):
        meter.enter("calibration")
        return original(*args)

    def train(original, *args):
        costs = original(*args)
        meter.enter("packing")
        return costs

    around(t.Trainer, "warm_up", warm_up)
    around(t.Trainer, "step", step)
    around(t, "calibrate", calibrate)
    around(t, "train", train)


def watch_evaluation(t, meter):
    def marking(forward, *args, **kwargs):
        if meter.phase in meter.passes:
            meter.mark(described(args, kwargs))
        return forward(*args, **kwargs)

    def compiled(original, *args):
        return functools.partial(marking, original(*args))

    def save_artifact(original, *args):
        digest = original(*args)
        if os.environ.get("NULLGPU_STOP") == "trained":
            raise Trained
        return digest

    def one_pass(name, run):
        meter.enter(name)
        score = run()
        meter.enter("")
        return score

    def evaluations(original, scorer, model, looped):
        passes = original(scorer, model, looped)
        meter.passes = set(passes)
        return {name: functools.partial(one_pass, name, run) for name, run in passes.items()}

    def adaptive_score(original, scorer, model, params, forward):
        if forward.func is model:  # documents are not compiled
            forward = functools.partial(marking, forward)
        return original(scorer, model, params, forward)

    def chunks(original, *args):
        for chunk in original(*args):
            yield chunk
            meter.chunk += 1

    meter.passes = set()
    around(t, "compiled", compiled)
    around(t, "save_artifact", save_artifact)
    around(t, "evaluations", evaluations)
    around(t, "adaptive_score", adaptive_score)
    around(t.Scorer, "chunks", chunks)
    around(t.Scorer, "document_chunks", chunks)


def stand_in(t):
    """What no file and no kernel gives here: the pieces of a tokenizer, and that gradients reached all weights."""

    def load_tokenizer(_, cfg):
        return SimpleNamespace(is_control=lambda i: i < 3, is_unknown=lambda i: i == 3, is_unused=lambda i: False, is_byte=lambda i: i < 259,
                               id_to_piece=lambda i: f"<0x{i - 3:02X}>" if 3 < i < 259 else f"\u2581{i}" if i % 2 else str(i),
                               bos_id=lambda: t.BOS, encode=lambda text: [])

    def coding_plans(original, *args):
        with mock.patch.object(torch.Tensor, "__bool__", lambda tensor: True):
            return original(*args)

    t.FREE_WEIGHTS = 2**31  # weights that nothing computes are zeros, which pack into a kilobyte
    around(t, "load_tokenizer", load_tokenizer)
    around(t, "coding_plans", coding_plans)


def by_shape(operator, *args, **kwargs):
    """What an operator returns, empty: its shapes as its meta kernel has them."""
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    made = operator(*args, **kwargs)
    return tree_map_only(torch.Tensor, lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cuda"), made)


def stand_in_for_cudnn():
    """cuDNN's front end plans by what its library knows of a graph, which runtime.c does not: its attention is empty. Returns what keeps it so."""
    library = torch.library.Library("aten", "IMPL")
    for name in ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"):
        library.impl(name, functools.partial(by_shape, getattr(torch.ops.aten, name).default), "CUDA")
    return library


def main(report, script):
    spec = importlib.util.spec_from_file_location("train_gpt", script)
    t = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(t)
    meter = Meter()
    watch_training(t, meter)
    watch_evaluation(t, meter)
    stand_in(t)
    meter.kept = stand_in_for_cudnn()  # gone, it would undo itself
    with suppress(Trained):
        t.main([], os.environ)
    meter.enter("")
    found = dict(torch=torch.__version__, peaks=meter.peaks, spans=meter.spans)
    Path(f"{report}.{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
