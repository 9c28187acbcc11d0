"""The README.md of a submission's folder."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from tools.record.checks import configuration
from tools.record.credits import attribution
from tools.record.entry import (
    CAP_BYTES,
    Entry,
    compliance,
    eval_seconds,
    hardware,
    technique,
    train_seconds,
    why_no_record,
)
from tools.record.significance import RECORDS, against, parse_against, spread, tests_of, their_text
from tools.runlog import RunLog, public_path

PAGE = """# {name}: val_bpb {score}

{blurb}

{track}
{news}
## Results

Bits per byte of each stage, from the logs; the last stage is the score. The deviation is that of a sample.

{results}
{significance}
## Command

Once for each seed, inside this folder, after `pip install -r requirements.txt`:

    {command}

{data}.

It writes `final_model.int6.ptz`; with `EVAL_ONLY=1 ARTIFACT=final_model.int6.ptz` before it, it scores that again.

## Architecture

{architecture}

## Timing budget

{timing}

## Compliance

By the logs:

{compliance}

By the source of `train_gpt.py`; no log shows it:

{source_rules}

## Artifacts

{artifacts}

## What ran

{what}

## Credits

{credits}
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---:"] * len(head), *rows))


def stage_name(entry: Entry, stage: str) -> str:
    return dict(coded="reloaded " + entry.first.kind.partition("+")[0], ttt="TTT").get(stage, stage)


def results_table(entry: Entry) -> str:
    """A row a seed, then mean and sample standard deviation; 8 decimals where the logs have them, else 4."""
    columns: dict[str, tuple[Callable[[RunLog], float], str]] = {
        "steps": (lambda run: run.steps, ",.10g"), "ms/step": (lambda run: 1000 * run.train_seconds / run.steps, ".2f")}
    for stage in entry.first.scores:
        columns[stage_name(entry, stage)] = (lambda run, stage=stage: run.scores[stage].bpb,
                                            ".4f" if stage in ("raw", "averaged") else ".8f")
    columns["nats/token"] = (lambda run: run.final.loss, ".8f")
    columns["code + model, bytes"] = (entry.total_bytes, ",.10g")
    rows = [[str(run.seed), *(format(value(run), form) for value, form in columns.values())] for run in entry.runs]
    both = [(*spread(map(value, entry.runs)), form.replace("10g", "1f")) for value, form in columns.values()]
    rows.append(["mean", *(format(mean, form) for mean, _, form in both)])
    rows.append(["std", *("-" if std is None else format(std, form) for _, std, form in both)])
    return table(["seed", *columns], rows)


def timing_table(entry: Entry) -> str:
    """The clock of training, what packing took after it, each stage of the evaluation, and its clock."""
    stages = [name for name in entry.first.scores if name not in ("raw", "averaged")]
    rows = [[str(run.seed), f"{run.train_seconds:.3f}", f"{run.pack_seconds:.1f}",
             *(f"{run.scores[name].seconds:.1f}" for name in stages), f"{run.eval_seconds:.3f}"] for run in entry.runs]
    names = [f"{stage_name(entry, name)}, s" for name in stages]
    return table(["seed", "training, s", "packing, s", *names, "evaluation, s"], rows)


def command(entry: Entry, tokenizer: str) -> str:
    """The command that repeats a run; `tokenizer` is the name of the file in the folder, if it holds one."""
    run = entry.first
    settings = {"SEED": str(run.seed)} | configuration(run)
    if tokenizer:
        settings["TOKENIZER_PATH"] = tokenizer
    launcher = "python" if run.world_size == 1 else f"torchrun --standalone --nproc_per_node={run.world_size}"
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in settings.items()), launcher, "train_gpt.py"])


def data_places(entry: Entry, shipped: str) -> str:
    """Where the command looks for data and tokenizer, and how to send it to where the contest keeps its own."""
    data, tokenizer = (public_path(name, entry.settings[name]) for name in ("DATA_PATH", "TOKENIZER_PATH"))
    far = "../../../data"
    if shipped:
        return (f"It reads the shards of `{data}`, or of DATA_PATH, and the tokenizer `{shipped}` of this folder, which is not one of the "
                "contest's")
    return (f"It reads the shards of `{data}` and the tokenizer `{tokenizer}`; where they lie elsewhere, DATA_PATH and "
            f"TOKENIZER_PATH say so: from a folder of the contest's `records/`, `DATA_PATH={far}/datasets/"
            f"{Path(data).name} TOKENIZER_PATH={far}/tokenizers/{Path(tokenizer).name}`")


def verdict(holds: bool) -> str:
    return "yes" if holds else "NO"


def compliance_list(entry: Entry) -> list[str]:
    """What the rules ask for, and the figures."""
    run, holds, size = entry.first, compliance(entry), entry.most(entry.total_bytes)
    seeds = ", ".join(str(r.seed) for r in entry.runs)
    split = "the figures of the contest" if holds["full_validation_split"] else "which is no score of the contest's"
    lines = [
        f"at most {CAP_BYTES:,} bytes on every seed: {verdict(holds['artifact_under_16mb'])}, {size:,} (code "
        f"{len(entry.shipped):,}), {CAP_BYTES - size:,} to spare",
        f"at most 600 s of training: {verdict(holds['train_under_600s'])}, {entry.most(train_seconds):.3f} s, "
        "with every read of training data; compilation and warm-up steps, which are undone, come before"
        + (f"; a step passed the run's own limit by {over:.3f} s" if (over := entry.most(over_limit)) else ""),
        "rounding and compression, on no data, after that clock: "
        f"{entry.most(lambda run: run.pack_seconds):.1f} s",
        f"at most 600 s of evaluation: {verdict(holds['eval_under_600s'])}, {entry.most(eval_seconds):.3f} s from "
        "loading the artifact to the last score, all stages together",
        f"three seeds of one configuration: {verdict(holds['three_seeds'])}, {seeds}",
        f"whole validation split: {verdict(holds['full_validation_split'])}, `{run.dataset}`, {run.targets:,} targets, "
        f"{run.bytes:,} bytes, {run.bytes / run.targets:.6f} bytes a token, {split}; each target is scored once",
        f"losses on the validation text during training: {len(run.val_lines) or 'no'} line(s) in each log"]
    if run.val_split_targets:
        lines.append(f"targets of the whole validation split: {run.val_split_targets:,}; scored: {run.targets:,}")
    if run.val_sha256:
        lines.append(f"its tokens have the sha256 {run.val_sha256}, in all logs")
    if all(r.val_bytes_sha256 for r in entry.runs):
        lines.append(f"the byte counts of its targets have the sha256 {run.val_bytes_sha256}, in all logs")
    return lines


def source_list(entry: Entry) -> list[str]:
    """What the rules ask for and no log can show: what train_gpt.py does as it stands in this project."""
    if not entry.source.is_ours:
        return ["nothing is claimed: this `train_gpt.py` is of no commit of the project that made this page"]
    lines = ["training reads the training shards; whether a validation document is among them, "
             "`python data/prepare.py verify NAME` of the project says",
             "the evaluation reads the artifact, the tokenizer and the validation shards; no network, n-gram cache or "
             "SLOT"]
    return lines + ([ttt_rule(entry)] if "ttt" in entry.first.scores else [])


def ttt_rule(entry: Entry) -> str:
    """How test-time training keeps the order of score and step, and what its rate depends on."""
    whose = "each document's" if entry.settings.get("TTT_SCOPE") == "document" else "the stream's"
    falls = float(entry.settings.get("TTT_COSINE_FLOOR", 1)) < 1
    rate = "falls along a cosine over the chunks, so it knows how long the text is" if falls else "is constant"
    return (f"test-time training goes through {whose} chunks once, from left to right: the score of a chunk is final "
            f"before a step on it, no step follows the last; its rate {rate}")


def significance_part(entry: Entry) -> str:
    if not (tests := tests_of(entry)):
        return ""
    whose, theirs = against(entry.options).removeprefix("#"), [one.bpb for one in parse_against(entry.options.against)]
    mean, std = spread(theirs)
    rows = [[test.reading, f"{test.margin:.6f}", f"{test.t:.3f}", f"{test.df:.2f}", f"{test.p:.4g}"] for test in tests]
    known = f"those of PR #{whose}" if whose in RECORDS else "these, which were given by hand"
    of = known if re.fullmatch(r"[\d., ]+", whose) else f"those in {whose.replace(',', ', ')}"
    return (f"\n## Significance\n\nWelch's t-test, one-sided, of the scores by seed against {of}, "
            f"{', '.join(map(str, theirs))} (mean {mean:.8f}, std {std:.8f}); 0.005 nats are read in three ways. "
            f"{their_text(entry)}.\n\n"
            + table(["lower by more than", "in bits per byte", "t", "df", "p"], rows) + "\n")


def what_ran(entry: Entry) -> list[str]:
    run, size = entry.first, len(entry.shipped)
    lines = [technique(entry),
             f"{hardware(run)}; {run.software}; {run.backend}; {run.train_shards} training shard(s)",
             f"`train_gpt.py`: {size:,} bytes, sha256 {hashlib.sha256(entry.shipped).hexdigest()}"]
    if entry.shipped != entry.source.contents:
        lines.append(f"it is packed: what wrote the logs, and runs, are the {len(entry.source.contents):,} bytes in it of "
                     f"sha256 {run.source_sha256}")
    lines.append(f"commit {entry.source.commit}, whose `train_gpt.py` this is" if entry.source.commit
                 else "its commit is not known: no commit of the project has a `train_gpt.py` of this sha256")
    local = ", but for local folders, which are `/path/to` here" * any(run.public() != run.text for run in entry.runs)
    return [*lines, f"the logs are as the script wrote them{local}",
            "tools/record computed all numbers here from the logs"]


def artifacts_part(entry: Entry) -> str:
    """For each seed, whether its artifact was compared with its log and scored again, and the result."""
    if not entry.checks:
        return ("No artifact was compared with its log (`--artifacts`): sizes, hashes and scores are those of the logs "
                "alone, and nothing was scored again.")
    rows, machines = [], {check.machine for check in entry.checks.values() if check.scores}
    for run in entry.runs:
        check = entry.checks[run.seed]
        again = ([f"yes, {len(check.scores)} stages", f"{(bpb := [*check.scores.values()][-1]):.8f}", f"{bpb - run.final.bpb:+.1e}"]
                 if check.scores else [f"no: {check.reason}", "-", "-"])
        rows.append([str(run.seed), f"`{run.artifact_sha256}`", "as in the log", *again])
    where = f"\n\nScored again on {'; '.join(sorted(machines))}." if machines else ""
    return table(["seed", "sha256", "size and sha256", "scored again", "val_bpb again", "difference"], rows) + where


def architecture(entry: Entry) -> list[str]:
    """Model, training, coding and evaluation, from the settings of the run."""
    run, s = entry.first, entry.settings
    return [
        f"model: {s['NUM_LAYERS']} layers of width {s['MODEL_DIM']}, {s['NUM_HEADS']} query heads, {s['NUM_KV_HEADS']} key and value heads, "
        f"MLP of {s['MLP_MULT']} times the width with {s['ACTIVATION']}, vocabulary {s['VOCAB_SIZE']}, tied embeddings, "
        f"{run.parameters:,} parameters",
        f"training: batches of {int(s['TRAIN_BATCH_TOKENS']):,} tokens in sequences of {s['TRAIN_SEQ_LEN']}; Muon at {s['MATRIX_LR']} for "
        f"matrices, AdamW for the rest; {s['AVERAGING']} average of the weights",
        f"coding: {run.kind}, embeddings of {s['EMBED_BITS']} bits, quantizer {s['QUANTIZER']}",
        f"evaluation: sliding window of stride {s['EVAL_STRIDE']}; " + (
            f"test-time training of scope {s['TTT_SCOPE']}, {s['TTT_EPOCHS']} epoch(s) a chunk of {s['TTT_CHUNK_TOKENS']} tokens"
            if "ttt" in run.scores else "no test-time training"),
        "every other setting is the default of `train_gpt.py` or of its variant, unless the command sets it"]


def credits_list(entry: Entry) -> list[str]:
    names = [f"{name.replace('_', ' ')}: {whose}" for name, whose in attribution(entry.settings).items()]
    return [*names, "further ideas are credited in the source of `train_gpt.py`, by pull request or arXiv id"]


def over_limit(run: RunLog) -> float:
    return run.train_over_limit_seconds


def bullets(lines: list[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def readme(entry: Entry, notes: str, tokenizer: str = "") -> bytes:
    """The page; `notes` is the text of "What is new", `tokenizer` the name of the file that the folder holds, if any."""
    mean, std = spread(run.final.bpb for run in entry.runs)
    reasons = "; ".join(why_no_record(entry))
    page = PAGE.format(
        name=entry.options.name, blurb=entry.options.blurb or technique(entry),
        score=f"{mean:.8f}" + ("" if std is None else f" (std {std:.8f}, {len(entry.runs)} seeds)"),
        track=f"**Not a record**: {reasons}." if reasons else "Track: 10 minutes on 8xH100, 16,000,000 bytes.",
        news=f"\n## What is new\n\n{notes.strip()}\n" if notes else "",
        results=results_table(entry), significance=significance_part(entry), command=command(entry, tokenizer),
        data=data_places(entry, tokenizer), architecture=bullets(architecture(entry)), timing=timing_table(entry),
        compliance=bullets(compliance_list(entry)), source_rules=bullets(source_list(entry)), artifacts=artifacts_part(entry),
        what=bullets(what_ran(entry)), credits=bullets(credits_list(entry)))
    return page.encode()
