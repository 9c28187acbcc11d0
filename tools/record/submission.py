"""The contents of submission.json."""

from __future__ import annotations

import json

from tools.record.credits import attribution
from tools.record.entry import Entry, compliance, hardware, technique, why_no_record
from tools.record.significance import against, spread, tests_of, their_text
from tools.runlog import RunLog


def seed_result(entry: Entry, run: RunLog) -> dict[str, float]:
    scores = run.scores
    return dict(
        val_loss=run.final.loss, val_bpb=run.final.bpb, artifact_bytes=entry.total_bytes(run),
        bytes_model=run.model_bytes, steps=run.steps, step_avg_ms=round(1000 * run.train_seconds / run.steps, 2),
        train_time_s=run.train_seconds, train_wallclock_ms=round(1000 * run.train_seconds),
        eval_time_s=run.eval_seconds, val_tokens=run.targets, target_tokens=run.targets, target_bytes=run.bytes,
        pre_quant_val_loss=scores["averaged"].loss, pre_quant_val_bpb=scores["averaged"].bpb,
        quantized_val_bpb=scores["coded"].bpb, sliding_val_bpb=scores["sliding"].bpb)


def tests_as_json(entry: Entry) -> dict:
    tests = [dict(lower_by_more_than=test.reading, margin_bpb=test.margin, t_statistic=test.t, welch_df=test.df,
                  p_value=test.p) for test in tests_of(entry)]
    return dict(against=against(entry.options), against_text=their_text(entry), significance=tests) if tests else {}


def artifacts_as_json(entry: Entry) -> dict:
    """What --artifacts found, by seed: size and sha256 agree, and val_bpb made again, null where it was not."""
    found = {str(seed): dict(size_and_sha256_agree=True, val_bpb_again=([None, *check.scores.values()])[-1], not_scored_because=check.reason or None)
             for seed, check in entry.checks.items()}
    return dict(artifacts_checked=found or None)


def hashes(entry: Entry) -> dict:
    """Those that the logs tell: of the tokens that are scored, of their byte counts, and of each seed's artifact."""
    found = dict(val_sha256=entry.first.val_sha256, val_bytes_sha256=entry.first.val_bytes_sha256,
                 artifact_sha256={str(run.seed): run.artifact_sha256 for run in entry.runs if run.artifact_sha256})
    return {name: value for name, value in found.items() if value}


def submission(entry: Entry, logs: list[str]) -> dict:
    """The contents of submission.json; `logs` are the logs' paths as a reader of the file sees them."""
    run, options, reasons = entry.first, entry.options, "; ".join(why_no_record(entry))
    results = {str(r.seed): seed_result(entry, r) for r in entry.runs}
    both = {key: spread(result[key] for result in results.values()) for key in results[str(run.seed)]}
    mean = {key: round(value, 8) for key, (value, _) in both.items()}
    std = {key: value and round(value, 8) for key, (_, value) in both.items()}
    between = ("pre_quant_val_loss", "pre_quant_val_bpb", "quantized_val_bpb", "sliding_val_bpb")
    most = entry.most(entry.total_bytes)
    return dict(
        author=options.author, github_id=options.github_id, name=options.name,
        blurb=options.blurb or technique(entry), date=options.date,
        track=f"non-record: {reasons}" if reasons else "10min_16mb",
        val_bpb=mean["val_bpb"], val_bpb_std=std["val_bpb"], val_loss=mean["val_loss"], val_loss_std=std["val_loss"],
        **{key: mean[key] for key in between}, seeds=[r.seed for r in entry.runs], seed_results=results,
        bytes_total=most, bytes_code=len(entry.shipped), artifact_bytes_mean=round(mean["artifact_bytes"]),
        artifact_bytes_max=most, train_steps_mean=mean["steps"], step_avg_ms_mean=mean["step_avg_ms"],
        train_time_s_mean=mean["train_time_s"], eval_time_s_mean=mean["eval_time_s"], hardware=hardware(run),
        pytorch_version=run.versions["torch"], dataset=run.dataset, model_params=run.parameters,
        source_sha256=run.source_sha256, commit=entry.source.commit or None, technique_summary=technique(entry), compliance=compliance(entry),
        attribution=attribution(entry.settings), **hashes(entry), **artifacts_as_json(entry),
        **tests_as_json(entry), logs=logs)


def as_json(contents: dict) -> bytes:
    return (json.dumps(contents, indent=2, ensure_ascii=False) + "\n").encode()
