"""An entry and the contest's rules; its README.md, its submission.json, and the test of its scores against others."""

import argparse
import hashlib
import json
import math
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from tools.files import Refused
from tools.record.logs import SPLITS, RunLog, public_path

CAP_BYTES, CAP_SECONDS, FEWEST_SEEDS = 16_000_000, 600.0, 3
RECORD_MACHINE = ("NVIDIA H100 80GB HBM3", 8)  # torch's name of the SXM board, number of ranks
PER_RUN = "SEED RUN_ID OUTPUT_DIR ARTIFACT AUDIT".split()  # options that may differ between seeds
RECORDS = {  # val_bpb by seed of rows of the leaderboard, by pull request, from the logs in their folders
    "2135": (1.05679341, 1.05662016, 1.05610947),  # seeds 0, 314, 42
    "1493": (1.08079, 1.08103, 1.08118),  # seeds 42, 314, 999
    "549": (1.11923, 1.12002, 1.11889),  # seeds 1337, 42, 2025
    "414": (1.12278, 1.12360, 1.12357),  # seeds 1337, 42, 2024; without test-time training
}
COLUMNS = {  # of the results: (key of seed_result, format)
    "steps": ("steps", ",.10g"), "ms/step": ("step_avg_ms", ".2f"), "raw": ("raw", ".4f"),
    "averaged": ("pre_quant_val_bpb", ".4f"), "reloaded": ("quantized_val_bpb", ".8f"),
    "sliding": ("sliding_val_bpb", ".8f"), "score": ("val_bpb", ".8f"), "nats/token": ("val_loss", ".8f"),
    "code + model, bytes": ("artifact_bytes", ",.10g"), "training, s": ("train_time_s", ".3f"),
    "packing, s": ("pack_time_s", ".1f"), "evaluation, s": ("eval_time_s", ".3f"),
}  # fmt: skip
CREDITS = {  # name: (author, {option: value that switches the idea off})
    "leaky_relu_squared": ("@abaybektursun (PR #549)", dict(ACTIVATION="silu", MLP_NEGATIVE_SLOPE="0.0")),
    "exclusive_self_attention": ("@unnir (PR #265)", dict(XSA_LAST_N="0")),
    "partial_rope": ("@jfprincz (PR #315)", dict(ROPE_DIMS="0")),
    "inputs_scaled_by_depth": ("@jfprincz (PR #315)", dict(LN_SCALE_POWER="0.0")),
    "smear_gate": ("PR #65", dict(SMEAR_GATE="0")),
    "bigram_hash": ("PR #65", dict(BIGRAM_VOCAB_SIZE="0")),
    "shared_value_embedding": ("PR #374", dict(VE_LAYERS="")),
    "gated_attention": ("PR #490", dict(GATED_ATTENTION="0")),
    "attention_gate_of_few_channels": ("PR #1812", dict(ATTN_GATE_DIMS="0")),
    "depth_recurrence": ("@bigbag (PR #1493)", dict(NUM_LOOPS="0")),
    "decoder_learning_rate": ("PR #1127", dict(DECODER_LR_MULT="1.0")),
    "muon_rows_normalized": ("@bigbag (PR #1493)", dict(MUON_ROW_NORMALIZE="0")),
    "sharded_muon": ("PR #399", {}),
    "clip_by_standard_deviations": ("@bigbag (PR #1493)", dict(MATRIX_CLIP_SIGMAS="0.0")),
    "lora_ttt_of_each_document": ("@samacqua (PR #77)", dict(TTT_EPOCHS="0", TTT_SCOPE="stream")),
    "score_first_ttt": ("@abaybektursun (PR #549)", dict(TTT_EPOCHS="0")),
}


class Source(NamedTuple):
    """The train_gpt.py that wrote a log, in a file that can be run."""

    path: Path
    contents: bytes
    commit: str  # first commit with this train_gpt.py, packed or not; empty if there is none
    is_ours: bool  # a committed train_gpt.py of this project, or the one of this checkout


@dataclass(frozen=True)
class Entry:
    """The runs of one submission and what is shipped with them."""

    runs: tuple[RunLog, ...]  # by seed, with the total_bytes of what is shipped
    settings: dict[str, str]
    source: Source
    shipped: bytes  # train_gpt.py as it ran, or packed
    options: argparse.Namespace
    checks: dict[str, dict]  # artifacts_checked of submission.json, by seed; empty without --artifacts

    @property
    def first(self) -> RunLog:
        return self.runs[0]

    def most(self, fact: str) -> float:
        """The highest value of a fact over the seeds."""
        return max(getattr(run, fact) for run in self.runs)

    def in_time(self, run: RunLog) -> bool:
        """Whether training kept to the contest's 600 s, and to a limit of its own that is not below them."""
        own = float(self.settings["MAX_WALLCLOCK_SECONDS"])
        return run.train_seconds <= CAP_SECONDS and not (run.train_over_limit_seconds > 0 and own >= CAP_SECONDS)

    def is_whole(self) -> bool:
        """Whether every target of the validation split was scored."""
        return self.settings["VAL_MAX_TOKENS"] == "0" and self.first.val_split_targets in (0, self.first.targets)

    def hardware(self) -> str:
        count, device = self.first.world_size, self.first.device
        return f"{count} process(es) on {device}, no GPU" if device.startswith("cpu") else f"{count}x {device}"

    def compliance(self) -> dict[str, bool]:
        """The claims of submission.json: five are measured, the others hold for every train_gpt.py of this project."""
        run, ours, split = self.first, self.source.is_ours, SPLITS.get(self.first.dataset)
        return dict(
            artifact_under_16mb=self.most("total_bytes") <= CAP_BYTES,
            train_under_600s=all(map(self.in_time, self.runs)),
            eval_under_600s=self.most("eval_seconds") <= CAP_SECONDS,
            three_seeds=len(self.runs) >= FEWEST_SEEDS,
            full_validation_split=self.is_whole() and split is not None and split.matches(run.targets, run.bytes),
            score_first_ttt=ours and "ttt" in run.scores,
            **dict.fromkeys(("no_slot", "no_pre_quant_ttt", "no_etlb", "no_ngram_cache"), ours),
        )

    def why_no_record(self) -> list[str]:
        """Rules of the 10-minute track that the runs do not meet; empty if they meet all."""
        run, holds = self.first, self.compliance()
        reasons = {
            f"{self.hardware()}, not 8xH100 SXM": (run.device, run.world_size) == RECORD_MACHINE,
            f"data set {run.dataset}, not the contest's FineWeb": run.dataset in SPLITS,
            f"first {run.targets:,} targets of the validation text": self.is_whole(),
            f"{len(self.runs)} seed(s)": holds["three_seeds"],
            f"training of {self.most('train_seconds'):.3f} s": holds["train_under_600s"],
            f"evaluation of {self.most('eval_seconds'):.3f} s": holds["eval_under_600s"],
        }
        return [reason for reason, kept in reasons.items() if not kept] or ["by choice"] * self.options.non_record


def configuration(run: RunLog) -> dict[str, str]:
    """The overrides that all seeds must share, as they are published."""
    return {name: public_path(name, value) for name, value in run.overrides.items() if name not in PER_RUN}


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for a single value."""
    values = [*values]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---:"] * len(head), *rows))


def attribution(settings: dict[str, str]) -> dict[str, str]:
    """Authors of the published ideas that these settings use; an option that the script lacks is off."""
    credits, has = CREDITS.items(), settings.items()
    return {name: author for name, (author, off) in credits if off.keys() <= settings.keys() and not off.items() & has}


def technique(entry: Entry) -> str:
    run, s = entry.first, entry.settings
    ttt = f"score-first test-time training, {s['TTT_EPOCHS']} epoch(s) a chunk"
    model = f"variant {run.variant}: {s['NUM_LAYERS']} layers x {s['MODEL_DIM']}, {run.parameters:,} parameters"
    stages = f"{s['AVERAGING']} average, {run.kind}, sliding window of stride {s['EVAL_STRIDE']}"
    return f"{model}, vocabulary {s['VOCAB_SIZE']}, {stages}, {ttt if 'ttt' in run.scores else 'no test-time training'}"


def welch(ours: list[float], theirs: tuple[float, ...], bytes_per_token: float) -> list[dict]:
    """One-sided tests that our mean is lower: by any amount, then by 0.005 nats in the three readings of the rules."""
    if len(ours) < 2 or len({*ours}) == len({*theirs}) == 1:
        raise Refused("--against needs two or more seeds with different scores; one number has no spread")
    nats, tests = 0.005 / math.log(2), []
    margins = {"nothing": 0.0, "0.005 nats per token": nats / bytes_per_token, "0.005 bits per byte": 0.005}
    for reading, margin in (margins | {"0.005 nats per byte": nats}).items():
        test = stats.ttest_ind([bpb + margin for bpb in ours], theirs, equal_var=False, alternative="less")
        numbers = dict(t_statistic=-float(test.statistic), welch_df=float(test.df), p_value=float(test.pvalue))
        tests.append(dict(lower_by_more_than=reading, margin_bpb=margin) | numbers)
    return tests


def compare_with(entry: Entry) -> dict:
    """Tests against the scores of --against, as in submission.json. Raises Refused if those are of another text."""
    if not (given := entry.options.against):
        return {}
    run = entry.first
    text = f"{run.dataset}, {run.targets} targets, {run.bytes / run.targets:.6f} bytes per token"
    try:
        scores = RECORDS.get(given.removeprefix("#")) or tuple(map(float, given.split(",")))
    except ValueError:
        scores = ()
    if len(scores) < 2 or not all(0 < score < 100 for score in scores):
        raise Refused(f"--against {given}: give two or more scores, or one of {', '.join(RECORDS)}")
    name, note = "scores given by hand", f"it is not known whether they are of the text of these logs ({text})"
    if record := next((record for record, known in RECORDS.items() if {*scores} <= {*known}), ""):
        name, note = f"PR #{record}", "both are scored on the contest's whole validation split"
        if not entry.compliance()["full_validation_split"]:
            raise Refused(f"--against {given}: it is scored on the contest's whole validation split, not on {text}")
    tests = welch([it.final.bpb for it in entry.runs], scores, run.bytes / run.targets)
    return dict(against=name, against_scores=scores, against_text=note, significance=tests)


def significance_part(comparison: dict) -> str:
    (mean, std), forms = spread(comparison["against_scores"]), ("", ".6f", ".3f", ".2f", ".4g")
    scores = f"{', '.join(map(str, comparison['against_scores']))} (mean {mean:.8f}, std {std:.8f})"
    rows = [[format(value, form) for value, form in zip(it.values(), forms)] for it in comparison["significance"]]
    tests = table(["lower by more than", "in bits per byte", "t", "df", "p"], rows)
    what = f"Welch's one-sided t-test against {comparison['against']}"
    return f"{what}: {scores}; {comparison['against_text']}.\n\n{tests}"


def results_table(entry: Entry) -> str:
    """One row per seed, then mean and sample standard deviation."""
    raw = {str(run.seed): dict(raw=run.scores["raw"].bpb, pack_time_s=run.pack_seconds) for run in entry.runs}
    results = {str(run.seed): seed_result(run) | raw[str(run.seed)] for run in entry.runs}
    both = {key: spread(result[key] for result in results.values()) for key, _ in COLUMNS.values()}
    results |= {name: {key: pair[at] for key, pair in both.items()} for at, name in enumerate(("mean", "std"))}
    cells = {name: [(result[key], form) for key, form in COLUMNS.values()] for name, result in results.items()}
    rows = [[name, *("-" if it is None else format(it, form) for it, form in row)] for name, row in cells.items()]
    return table(["seed", *COLUMNS], rows)


def command_part(entry: Entry, tokenizer: str) -> str:
    """How to repeat the first run; `tokenizer` is the file in the folder, or empty."""
    run, artifact = entry.first, f"seed{entry.first.seed}.int6.ptz"
    settings = {"SEED": str(run.seed), "RUN_ID": f"seed{run.seed}"} | configuration(run)
    settings |= {"TOKENIZER_PATH": tokenizer} if tokenizer else {}
    launcher = "python" if run.world_size == 1 else f"torchrun --standalone --nproc_per_node={run.world_size}"
    words = [*(f"{name}={shlex.quote(value)}" for name, value in settings.items()), launcher, "train_gpt.py"]
    data, model = (Path(entry.settings[name]).name for name in ("DATA_PATH", "TOKENIZER_PATH"))
    theirs = f"DATA_PATH=../../../data/datasets/{data} TOKENIZER_PATH=../../../data/tokenizers/{model}"
    where = " is in this folder." if tokenizer else f", of TOKENIZER_PATH. Below the contest's `records/`: `{theirs}`."
    return f"""Run once for each seed, in this folder, after `pip install -r requirements.txt`:

    {" ".join(words)}

It reads the shards of DATA_PATH, `{data}`. The tokenizer is `{tokenizer or model}`{where}

It writes `{artifact}`. `EVAL_ONLY=1 ARTIFACT={artifact}` with DATA_PATH and TOKENIZER_PATH scores it again."""


def compliance_list(entry: Entry) -> list[str]:
    """The rules that the logs show to hold, with the figures, then the claims about the source."""
    run, size, over = entry.first, entry.most("total_bytes"), entry.most("train_over_limit_seconds")
    holds = {name: "yes" if value else "NO" for name, value in entry.compliance().items()}
    text = f"`{run.dataset}`, {run.targets:,} targets, {run.bytes:,} bytes, {run.bytes / run.targets:.6f} bytes a token"
    sizes = f"{size:,} (code {len(entry.shipped):,}), {CAP_BYTES - size:,} to spare"
    claims = [f"{name.replace('_', ' ')}: {holds[name]}" for name in holds if name.startswith(("no_", "score"))]
    if "ttt" in run.scores and float(entry.settings["TTT_COSINE_FLOOR"]) < 1:
        claims.append("the learning rate of test-time training follows a cosine over the length of the text")
    facts = {
        f"at most {CAP_BYTES:,} bytes on every seed": f"{holds['artifact_under_16mb']}, {sizes}",
        "at most 600 s of training": f"{holds['train_under_600s']}, {entry.most('train_seconds'):.3f} s, including all "
        "reads of training data; compilation and warm-up steps, which are undone, come before",
        "training time beyond the run's own limit": f"{over:.3f} s" * (over > 0),
        "quantization and compression, without data, after that clock": f"{entry.most('pack_seconds'):.1f} s",
        "at most 600 s of evaluation": f"{holds['eval_under_600s']}, {entry.most('eval_seconds'):.3f} s in all",
        "three seeds of one configuration": f"{holds['three_seeds']}, {', '.join(str(it.seed) for it in entry.runs)}",
        "whole validation split": f"{holds['full_validation_split']}, {text}; each target is scored once",
        "targets of the whole validation split": f"{run.val_split_targets:,}" * (run.val_split_targets > 0),
        "validation losses during training": f"{len(run.points['val']) or 'no'} line(s) in each log",
        "sha256 of the validation tokens, in all logs": run.val_sha256,
        "sha256 of the byte counts of the targets, in all logs": run.val_bytes_sha256,
        "by the source, which no log shows": "; ".join(claims),
        "validation documents in the training data": "`python data/prepare.py verify NAME` of the project checks",
    }
    return [f"{name}: {value}" for name, value in facts.items() if value]


def artifacts_part(entry: Entry) -> str:
    if not entry.checks:
        return "No artifact was compared with its log (`--artifacts`), and nothing was scored again."
    rows = []
    for run in entry.runs:
        bpb, reason = (check := entry.checks[str(run.seed)])["val_bpb_again"], check["not_scored_because"]
        again = (
            [f"no: {reason}", "-", "-"] if reason else [check["scored_on"], f"{bpb:.8f}", f"{bpb - run.final.bpb:+.1e}"]
        )
        rows.append([str(run.seed), f"`{run.artifact_sha256}`", "as in the log", *again])
    return table(["seed", "sha256", "size and sha256", "scored again", "val_bpb again", "difference"], rows)


def what_ran(entry: Entry) -> list[str]:
    run, commit = entry.first, entry.source.commit
    versions = " ".join(f"{name}:{version}" for name, version in run.versions.items())
    backend = f"attention:{run.attention} dtype:{run.dtype} grad_accum_steps:{run.grad_accum_steps}"
    local = ", except that `/path/to` replaces local folders" * any(it.public() != it.text for it in entry.runs)
    plain = f"; the {len(entry.source.contents):,} bytes of sha256 {run.source_sha256}, packed"
    code = f"{len(entry.shipped):,} bytes, sha256 {hashlib.sha256(entry.shipped).hexdigest()}"
    lines = [f"{entry.hardware()}; {versions}; {backend}; {run.train_shards} training shard(s)"]
    lines.append(f"`train_gpt.py`: {code}{plain * (entry.shipped != entry.source.contents)}")
    lines.append(f"commit {commit}, whose `train_gpt.py` this is" if commit else "no commit has this `train_gpt.py`")
    lines.append(f"the logs are as the script wrote them{local}; all numbers on this page are computed from them")
    return lines + [f"warning in the log of seed {it.seed}: {text}" for it in entry.runs for text in it.warnings]


def readme(entry: Entry, comparison: dict, notes: str, tokenizer: str = "") -> bytes:
    """The page. `notes`: the section "What is new". `tokenizer`: the tokenizer in the folder, or empty."""
    mean, std = spread(run.final.bpb for run in entry.runs)
    score = f"{mean:.8f}" + ("" if std is None else f" (std {std:.8f}, {len(entry.runs)} seeds)")
    reasons, stages = "; ".join(entry.why_no_record()), "Bits per byte after each stage; the last stage is the score."
    track = f"**Not a record**: {reasons}." if reasons else "Track: 10 minutes on 8xH100, 16,000,000 bytes."
    credits = [f"{name.replace('_', ' ')}: {author}" for name, author in attribution(entry.settings).items()]

    def bullets(lines: list[str]) -> str:
        return "\n".join(f"* {line}" for line in lines)

    sections = {
        "What is new": notes.strip(),
        "Results": f"{stages} The deviation is that of a sample.\n\n{results_table(entry)}",
        "Significance": significance_part(comparison) if comparison else "",
        "Command": command_part(entry, tokenizer),
        "Architecture": f"{technique(entry)}. Append `--describe` to the command to print every setting.",
        "Compliance": bullets(compliance_list(entry)),
        "Artifacts": artifacts_part(entry),
        "What ran": bullets(what_ran(entry)),
        "Credits": bullets([*credits, "further ideas: see the source of `train_gpt.py`"]),
    }
    page = f"# {entry.options.name}: val_bpb {score}\n\n{entry.options.blurb or technique(entry)}\n\n{track}\n"
    return (page + "".join(f"\n## {name}\n\n{text}\n" for name, text in sections.items() if text)).encode()


def seed_result(run: RunLog) -> dict[str, float]:
    averaged, coded, sliding = (run.scores[stage] for stage in ("averaged", "coded", "sliding"))
    return dict(
        val_loss=run.final.loss, val_bpb=run.final.bpb, artifact_bytes=run.total_bytes,
        bytes_model=run.model_bytes, steps=run.steps, step_avg_ms=round(1000 * run.train_seconds / run.steps, 2),
        train_time_s=run.train_seconds, train_wallclock_ms=round(1000 * run.train_seconds),
        eval_time_s=run.eval_seconds, val_tokens=run.targets, target_tokens=run.targets, target_bytes=run.bytes,
        pre_quant_val_loss=averaged.loss, pre_quant_val_bpb=averaged.bpb, quantized_val_bpb=coded.bpb,
        sliding_val_bpb=sliding.bpb,
    )  # fmt: skip


def submission(entry: Entry, comparison: dict, logs: list[str]) -> dict:
    """The contents of submission.json; `logs` are the paths of the logs from its folder."""
    run, options, reasons = entry.first, entry.options, "; ".join(entry.why_no_record())
    results = {str(r.seed): seed_result(r) for r in entry.runs}
    both = {key: spread(result[key] for result in results.values()) for key in results[str(run.seed)]}
    mean, std = ({key: pair[at] and round(pair[at], 8) for key, pair in both.items()} for at in (0, 1))
    artifacts = {str(r.seed): r.artifact_sha256 for r in entry.runs if r.artifact_sha256}
    hashes = dict(val_sha256=run.val_sha256, val_bytes_sha256=run.val_bytes_sha256, artifact_sha256=artifacts)
    return dict(
        author=options.author, github_id=options.github_id, name=options.name,
        blurb=options.blurb or technique(entry), date=options.date,
        track=f"non-record: {reasons}" if reasons else "10min_16mb",
        val_bpb=mean["val_bpb"], val_bpb_std=std["val_bpb"], val_loss=mean["val_loss"], val_loss_std=std["val_loss"],
        pre_quant_val_loss=mean["pre_quant_val_loss"], pre_quant_val_bpb=mean["pre_quant_val_bpb"],
        quantized_val_bpb=mean["quantized_val_bpb"], sliding_val_bpb=mean["sliding_val_bpb"],
        seeds=[r.seed for r in entry.runs], seed_results=results, bytes_total=entry.most("total_bytes"),
        bytes_code=len(entry.shipped), artifact_bytes_mean=round(mean["artifact_bytes"]),
        artifact_bytes_max=entry.most("total_bytes"), train_steps_mean=mean["steps"],
        step_avg_ms_mean=mean["step_avg_ms"], train_time_s_mean=mean["train_time_s"],
        eval_time_s_mean=mean["eval_time_s"], hardware=entry.hardware(), pytorch_version=run.versions["torch"],
        dataset=run.dataset, model_params=run.parameters, source_sha256=run.source_sha256,
        commit=entry.source.commit or None, technique_summary=technique(entry), compliance=entry.compliance(),
        attribution=attribution(entry.settings), **{name: value for name, value in hashes.items() if value},
        artifacts_checked=entry.checks or None, **comparison, logs=logs,
    )  # fmt: skip


def as_json(contents: dict) -> bytes:
    return (json.dumps(contents, indent=2, ensure_ascii=False) + "\n").encode()
