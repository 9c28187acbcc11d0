"""Run a train_gpt.py under the null GPU and record waits of the host, copies from pageable memory and compilations.

    python nullgpu.py VENV/bin/python drive.py REPORT SCRIPT    # with the usual variables; writes REPORT.RANK.json

A span is the time from one training step to the next, or from one call of the model to the next in an evaluation.
The tokenizer is a stand-in with VOCAB_SIZE pieces.
"""

import ctypes
import functools
import importlib.util
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch._dynamo.callback import on_compile_start
from torch.utils._pytree import tree_map_only


class Trained(Exception):
    """Ends a run after its artifact was written, if NULLGPU_STOP=trained."""


class Meter:
    """Spans of each phase with their counts, and the peak of device memory of each phase."""

    def __init__(self):
        self.library, self.compiled = ctypes.CDLL(None), 0
        self.phase, self.chunk, self.open, self.spans, self.peaks = "", 0, None, [], {}
        self.evaluating = False  # an artifact, not a validation during training
        self.micro_batch_tokens = 0  # of the last training step
        on_compile_start(self.count_compile)

    def count_compile(self, _):
        self.compiled += 1

    def read(self) -> dict[str, int]:
        """Counts and peak memory until now."""
        counts = (ctypes.c_long * 3)()
        self.library.nullgpu_counts(counts)
        return dict(waits=counts[0], pageable=counts[1], compiles=self.compiled, peak=counts[2])

    def mark(self, kind=""):
        """End the open span and begin one of this kind, if given."""
        now = self.read()
        if self.open:
            span, before = self.open
            self.spans.append(span | {key: now[key] - before[key] for key in ("waits", "pageable", "compiles")})
        self.open = (dict(phase=self.phase, chunk=self.chunk, kind=kind), now) if kind else None

    def enter(self, phase):
        """End the phase, record its peak memory, and begin another phase."""
        self.mark()
        self.peaks[self.phase] = self.read()["peak"]
        self.phase, self.chunk = phase, 0
        self.library.nullgpu_reset_peak()


def around(owner, name, wrap):
    """Replace owner.name by a function that calls wrap(original, *arguments)."""
    original = getattr(owner, name)
    if isinstance(owner, type):
        setattr(owner, name, functools.partialmethod(wrap_method, original, wrap))
    else:
        setattr(owner, name, functools.partial(wrap, original))


def wrap_method(self, original, wrap, *args, **kwargs):
    return wrap(original, self, *args, **kwargs)


def described(args, kwargs):
    """Whether a call of the model scores or adapts, the shapes of its arguments, and its options."""
    kind = "adapt" if torch.is_grad_enabled() else "score"
    shapes = [list(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
    return f"{kind} {shapes} {kwargs}"


def watch_training(t: ModuleType, meter: Meter) -> None:
    """Make warm-up, training, calibration and packing phases, and each training step a span."""

    def warm_up(original, *args):
        meter.enter("warm-up")
        seconds = original(*args)
        meter.enter("training")
        return seconds

    def step(original, trainer, *args):
        meter.mark("step")
        meter.micro_batch_tokens = trainer.batches.micro_batch_tokens
        return original(trainer, *args)

    def calibrate(original, *args):
        meter.enter("calibration")
        return original(*args)

    def train(original, *args):
        curvatures = original(*args)
        meter.enter("packing")
        return curvatures

    around(t.Trainer, "warm_up", warm_up)
    around(t.Trainer, "step", step)
    around(t, "calibrate", calibrate)
    around(t, "train", train)


def watch_evaluation(t: ModuleType, meter: Meter) -> None:
    """Make each evaluation of an artifact a phase, each of its calls of the model a span, and count its chunks."""

    def marking(forward, *args, **kwargs):
        if meter.evaluating and meter.phase:
            meter.mark(described(args, kwargs))
        return forward(*args, **kwargs)

    def compile(original, *args):
        return functools.partial(marking, original(*args))

    def save_artifact(original, *args):
        sha256 = original(*args)
        if os.environ.get("NULLGPU_STOP") == "trained":
            raise Trained
        return sha256

    def run_evaluation(original, *args):
        meter.enter("")
        meter.evaluating = True
        return original(*args)

    def evaluate(name, original, *args):
        if not meter.evaluating or meter.phase:  # a validation, or the sliding window of test-time training
            return original(*args)
        meter.enter(name)
        score = original(*args)
        meter.enter("")
        return score

    def evaluate_adapting(original, scorer, model, params, forward):
        if forward.func is model:  # documents are not compiled
            forward = functools.partial(marking, forward)
        return evaluate("legal_ttt", original, scorer, model, params, forward)

    def chunks(original, *args):
        for chunk in original(*args):
            yield chunk
            meter.chunk += 1

    around(t.Ranks, "compile", compile)
    around(t, "save_artifact", save_artifact)
    around(t, "run_evaluation", run_evaluation)
    around(t.Scorer, "evaluate_windows", functools.partial(evaluate, "roundtrip"))
    around(t.Scorer, "evaluate_sliding", functools.partial(evaluate, "sliding_window"))
    around(t, "evaluate_adapting", evaluate_adapting)
    around(t.Scorer, "stream_chunks", chunks)
    around(t.Scorer, "document_chunks", chunks)


def stand_in(t: ModuleType) -> None:
    """Replace what needs a tokenizer file or computed values."""

    def load_tokenizer(_, cfg):
        return SimpleNamespace(
            is_control=lambda i: i < 3,
            is_unknown=lambda i: i == 3,
            is_unused=lambda i: False,
            is_byte=lambda i: i < 259,
            id_to_piece=lambda i: f"<0x{i - 3:02X}>" if 3 < i < 259 else f"\u2581{i}" if i % 2 else str(i),
            bos_id=lambda: t.BOS,
            encode=lambda text: [],
        )

    def quant_plans(original, *args):
        with mock.patch.object(torch.Tensor, "__bool__", lambda tensor: True):  # gradients reached all weights
            return original(*args)

    t.FREE_WEIGHTS = 2**31  # weights that nothing computes are zeros, which pack into a kilobyte
    around(t, "load_tokenizer", load_tokenizer)
    around(t, "quant_plans", quant_plans)


def by_shape(operator, *args, **kwargs):
    """Empty results of an operator, with the shapes of its meta kernel."""
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    made = operator(*args, **kwargs)

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda")

    return tree_map_only(torch.Tensor, on_device, made)


def stand_in_for_cudnn():
    """Replace cuDNN's attention, whose planner needs the real library. The replacement lives as long as the result."""
    library = torch.library.Library("aten", "IMPL")
    for name in ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"):
        library.impl(name, functools.partial(by_shape, getattr(torch.ops.aten, name).default), "CUDA")
    return library


def main(report: str, script: str) -> None:
    """Run the script and write REPORT.RANK.json."""
    spec = importlib.util.spec_from_file_location("train_gpt", script)
    t = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(t)
    meter = Meter()
    watch_training(t, meter)
    watch_evaluation(t, meter)
    stand_in(t)
    meter.library_of_cudnn = stand_in_for_cudnn()
    with suppress(Trained):
        t.main([], os.environ)
    meter.enter("")
    found = dict(
        torch=torch.__version__, peaks=meter.peaks, spans=meter.spans, micro_batch_tokens=meter.micro_batch_tokens
    )
    Path(f"{report}.{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
