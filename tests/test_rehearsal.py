"""From text to a pull request: the committed rehearsal in logs/rehearsal, and the same steps again on a small text.

Pages and submission.json are compared with the logs, which are read here without the code of tools/.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_json_lines

import train_gpt as t
from tools.record import __main__ as record

REHEARSAL = ROOT / "logs" / "rehearsal"
PAGE = (REHEARSAL / "README.md").read_text(encoding="utf-8")
FOLDERS = {"2026-11-21_Rehearsal": 135_536, "2026-11-21_Rehearsal_packed": 48_269}  # bytes of the train_gpt.py in them
STAGES = ("raw", "averaged", "coded", "sliding", "ttt")
SMALL = "VARIANT=demo NUM_LAYERS=4 MODEL_DIM=32 VE_LAYERS=2,3 VE_DIM=8 BIGRAM_VOCAB_SIZE=64 BIGRAM_DIM=8 ROPE_DIMS=4 "
SMALL += (
    "TRAIN_SEQ_LEN=32 TRAIN_BATCH_TOKENS=256 MICRO_BATCH_TOKENS=128 ITERATIONS=12 EVAL_STRIDE=8 TTT_CHUNK_TOKENS=32 "
)
SMALL += "VAL_MAX_TOKENS=300 VOCAB_SIZE=384 DTYPE=fp32"


def told(pattern, text):
    """What the one line that matches says."""
    (found,) = re.findall(f"^{pattern}$", text, re.M)
    return found


def figures(text):
    """The numbers of a log, rounded as its lines print them; stages are (loss, bpb, seconds)."""
    if "\nRESULT " in text:
        it = json.loads(told(r"RESULT (.*)", text))
        names = "steps train_seconds eval_seconds pack_seconds code_bytes model_bytes targets bytes parameters "
        stages, scores = dict(zip(STAGES, it["scores"].values(), strict=True)), {}
        for key, score in stages.items():
            digits = 4 if key in STAGES[:2] else 8
            scores[key] = round(score["loss"], digits), round(score["bpb"], digits), score["seconds"]
        found = {name: it[name] for name in (*names.split(), "source_sha256")} | scores
        rounded = dict(train_seconds=3, eval_seconds=3, pack_seconds=1)
        return found | {name: round(found[name], digits) for name, digits in rounded.items()}
    starts, scores = r"DIAGNOSTIC raw|DIAGNOSTIC post_\w+|final_int6_roundtrip|final_int6_sliding_window|legal_ttt", {}
    for key, start in zip(STAGES, starts.split("|")):
        loss, bpb, ms = told(rf"{start} val_loss:(\S+) val_bpb:(\S+) eval_time:(\d+)ms", text)
        if key not in STAGES[:2]:
            loss, bpb = told(rf"{start}_exact val_loss:(\S+) val_bpb:(\S+)", text)
        scores[key] = float(loss), float(bpb), int(ms) / 1000
    steps, ms = told(r"training ended: step:(\d+)/\d+ train_time:(\d+)ms step_avg:\S+", text)
    targets, size = told(r"bytes_per_token:\S+ targets:(\d+) bytes:(\d+)", text)
    return scores | dict(
        steps=int(steps),
        train_seconds=int(ms) / 1000,
        eval_seconds=int(told(r"total_eval_time:(\d+)ms", text)) / 1000,
        pack_seconds=float(told(r"quantize_and_pack:(\S+)s, off the training clock", text)),
        code_bytes=int(told(r"Code size: (\d+) bytes", text)),
        model_bytes=int(told(r"Serialized model \S+ (\d+) bytes .*", text)),
        targets=int(targets),
        bytes=int(size),
        parameters=int(told(r"model_params:(\d+) .*", text)),
        source_sha256=told(r"source:\S+ sha256:(\w+) bytes:\d+", text),
    )


def expected_tables(logs, code):
    """The rows of both tables of the page; the first cell is the seed."""
    results, times, columns = [], [], []
    for seed, log in logs.items():
        bpb, loss, ms = [log[stage][1] for stage in STAGES], log["ttt"][0], 1000 * log["train_seconds"] / log["steps"]
        columns.append([log["steps"], ms, *bpb, loss, code + log["model_bytes"]])
        places = ("d", ".2f", ".4f", ".4f", ".8f", ".8f", ".8f", ".8f", ",d")
        results.append([seed, *map(format, columns[-1], places)])
        seconds = [f"{log[stage][2]:.1f}" for stage in STAGES[2:]]
        ends = [f"{log[name]:.3f}" for name in ("train_seconds", "eval_seconds")]
        times.append([seed, ends[0], f"{log['pack_seconds']:.1f}", *seconds, ends[1]])
    places = (",.1f", ".2f", ".4f", ".4f", ".8f", ".8f", ".8f", ".8f", ",.1f")
    for name, value in (("mean", statistics.mean), ("std", statistics.stdev)):
        results.append([name, *map(format, map(value, zip(*columns)), places)])
    return results, times


def tables_of(page):
    """The rows of every table of a page, without the head."""
    blocks = re.findall(r"(?:^\|.*\n)+", page, re.M)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]] for block in blocks
    ]


def expected_result(log, code):
    """The entry of a seed in submission.json."""
    train, (loss, bpb, _) = log["train_seconds"], log["ttt"]
    found = dict(val_loss=loss, val_bpb=bpb, artifact_bytes=code + log["model_bytes"], bytes_model=log["model_bytes"])
    found |= dict(
        steps=log["steps"], step_avg_ms=round(1000 * train / log["steps"], 2), eval_time_s=log["eval_seconds"]
    )
    found |= dict(train_time_s=train, train_wallclock_ms=round(1000 * train), val_tokens=log["targets"])
    found |= dict(target_tokens=log["targets"], target_bytes=log["bytes"], pre_quant_val_loss=log["averaged"][0])
    found |= dict(pre_quant_val_bpb=log["averaged"][1], quantized_val_bpb=log["coded"][1])
    return found | dict(sliding_val_bpb=log["sliding"][1])


def check_folder(page, it, texts, code):
    """README and submission.json say what the logs of the seeds say, to the last digit; its tables apart."""
    logs = {seed: figures(text) for seed, text in texts.items()}
    assert it["seed_results"] == {seed: expected_result(log, code) for seed, log in logs.items()}
    column = {key: [result[key] for result in it["seed_results"].values()] for key in it["seed_results"]["1"]}
    mean = {key: round(statistics.mean(values), 8) for key, values in column.items()}
    for key in ("val_bpb", "val_loss"):
        assert (it[key], it[f"{key}_std"]) == (mean[key], round(statistics.stdev(column[key]), 8))
    for key in ("pre_quant_val_loss", "pre_quant_val_bpb", "quantized_val_bpb", "sliding_val_bpb"):
        assert it[key] == mean[key]
    for key, source in (("train_steps_mean", "steps"), ("step_avg_ms_mean", "step_avg_ms")):
        assert it[key] == mean[source]
    assert (it["train_time_s_mean"], it["eval_time_s_mean"]) == (mean["train_time_s"], mean["eval_time_s"])
    sizes = column["artifact_bytes"]
    assert (it["bytes_code"], it["bytes_total"], it["artifact_bytes_max"]) == (code, max(sizes), max(sizes))
    assert it["artifact_bytes_mean"] == round(statistics.mean(sizes)) and it["seeds"] == [int(seed) for seed in texts]
    assert {log["source_sha256"] for log in logs.values()} == {it["source_sha256"]}
    assert {log["parameters"] for log in logs.values()} == {it["model_params"]}
    title = f"val_bpb {it['val_bpb']:.8f} (std {it['val_bpb_std']:.8f}, {len(texts)} seeds)"
    assert page.splitlines()[0].endswith(title)
    first, most = (
        next(iter(logs.values())),
        {key: max(log[f"{key}_seconds"] for log in logs.values()) for key in ("train", "eval", "pack")},
    )
    for words in (
        f"yes, {max(sizes):,} (code {code:,}), {16_000_000 - max(sizes):,} to spare",
        f"training: yes, {most['train']:.3f} s",
        f"evaluation: yes, {most['eval']:.3f} s",
        f"after that clock: {most['pack']} s",
        f"{first['targets']:,} targets, {first['bytes']:,} bytes, {first['bytes'] / first['targets']:.6f} bytes a ",
    ):
        assert words in page, words


def files(folder):
    """(page, submission.json, logs by seed); the packed rehearsal has the logs of the other one."""
    logs = REHEARSAL / "2026-11-21_Rehearsal" if folder == REHEARSAL / "2026-11-21_Rehearsal_packed" else folder
    it = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    texts = {str(seed): (logs / f"train_seed{seed}.log").read_text(encoding="utf-8") for seed in it["seeds"]}
    return (folder / "README.md").read_text(encoding="utf-8"), it, texts


@pytest.mark.parametrize("name", FOLDERS)
def test_the_rehearsals_page_and_json_are_what_its_logs_say(name):
    page, it, texts = files(REHEARSAL / name)
    check_folder(page, it, texts, FOLDERS[name])
    assert tables_of(page) == [*expected_tables({seed: figures(text) for seed, text in texts.items()}, FOLDERS[name])]
    assert (
        it["track"].startswith("non-record: ")
        and "no entry to the contest" in it["blurb"]
        and not it["compliance"]["full_validation_split"]
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_a_reviewers_run_of_the_rehearsal_gave_the_same_numbers(name):
    page, it, texts = files(REHEARSAL / name)
    review = (REHEARSAL / name / "review.log").read_text(encoding="utf-8")
    size, sha256 = re.search(r"`train_gpt.py`: ([\d,]+) bytes, sha256 (\w+)", page).groups()
    assert told(r"source:train_gpt.py sha256:(\w+ bytes:\d+)", review) == f"{sha256} bytes:{size.replace(',', '')}"
    ours, theirs = figures(review), figures(texts["1"])
    assert all(ours[stage][:2] == theirs[stage][:2] for stage in STAGES)
    assert all(ours[key] == theirs[key] for key in ("model_bytes", "steps", "targets", "bytes"))
    losses = [re.findall(r"^step:(\d+)/\d+ train_loss:(\S+)", text, re.M) for text in (review, texts["1"])]
    assert losses[0] == losses[1] and len(losses[0]) >= 10


def commands(page):
    """The lines of a page's indented blocks, each command once, its continuations joined."""
    text = "\n".join(line[4:] for line in page.splitlines() if line.startswith("    ")).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines()]


def test_every_command_of_the_rehearsal_is_one_that_parses():
    from conftest import prepare

    seen = set()
    for command in commands(PAGE):
        parts = shlex.split(command.removesuffix("; done").rpartition("; do ")[2])
        given = dict(part.split("=", 1) for part in parts if re.match(r"[A-Z_]+=", part))
        t.Config.from_env(
            {k: v.replace("$seed", "1") for k, v in given.items() if k.lower() in t.Config.__dataclass_fields__}
        )
        script = (
            parts[parts.index("-m") + 1]
            if "-m" in parts
            else next((part for part in parts if part.endswith(".py") and (ROOT / part).is_file()), None)
        )
        rest = parts[parts.index(script) + 1 :] if script else []
        if script == "tools.record":
            record.parse_options(rest)
        elif script == "data/prepare.py":
            prepare.parser().parse_args(rest)
        seen.add(script)
    assert seen >= {"tools.record", "data/prepare.py", "tools.record.pack", "train_gpt.py"}


@pytest.mark.slow
def test_the_whole_way_from_text_to_a_folder_that_runs(documents, dataset, tmp_path):
    """Tokenize, pack, three seeds of the packed file, record, and the run of a reviewer, each by its command."""

    def sh(*command, cwd=tmp_path, **env):
        clean = {k: v for k, v in os.environ.items() if k.lower() not in t.Config.__dataclass_fields__}
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=240,
            env=clean | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | env,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    write_json_lines(tmp_path / "val.jsonl", documents[:1])
    write_json_lines(tmp_path / "train.jsonl", documents[1:])
    shutil.copy(dataset["TOKENIZER_PATH"], model := tmp_path / "tiny.model")
    sh(
        ROOT / "data" / "prepare.py",
        "--root",
        tmp_path,
        "tokenize",
        "train.jsonl",
        "--val",
        "val.jsonl",
        "--tokenizer",
        model,
        "--name",
        "text",
    )
    (tmp_path / "entry").mkdir()
    sh("-m", "tools.record.pack", ROOT / "train_gpt.py", "-o", "entry/train_gpt.py", PYTHONPATH=str(ROOT))
    place = dict(DATA_PATH=str(tmp_path / "datasets" / "text"), TOKENIZER_PATH=str(model))
    env = dict(pair.split("=") for pair in SMALL.split()) | place
    for seed in "123":
        sh("entry/train_gpt.py", SEED=seed, RUN_ID=f"seed{seed}", OUTPUT_DIR=f"runs/{seed}", **env)
    out = sh(
        "-m",
        "tools.record",
        *(f"runs/{seed}/logs/seed{seed}.txt" for seed in "123"),
        "--script",
        "entry/train_gpt.py",
        "--name",
        "All of it",
        "--against",
        "9.1,9.2,9.3",
        "--artifacts",
        *(next((tmp_path / "runs" / seed).glob("*.int6.ptz")) for seed in "123"),
        PYTHONPATH=str(ROOT),
    )
    folder, shipped = tmp_path / out.splitlines()[-1], (tmp_path / "entry" / "train_gpt.py").read_bytes()
    page, it, texts = files(folder)
    assert page.count("| as in the log | 1 x cpu x1, torch ") == 3
    check_folder(page, it, texts, len(shipped))
    results, times = expected_tables({seed: figures(text) for seed, text in texts.items()}, len(shipped))
    tables = tables_of(page)
    for row, result, (seed, train, pack, *_, evaluation) in zip(tables[0], results, times):
        cells = {cell for table in tables for line in table if line[0] == seed for cell in line}
        assert row[: len(result)] == result and {train, pack, evaluation} <= cells
    assert str(tmp_path) not in page + json.dumps(it) + "".join(texts.values())
    assert (folder / "train_gpt.py").read_bytes() == shipped
    assert {figures(text)["code_bytes"] for text in texts.values()} == {len(shipped)}
    assert it["source_sha256"] == hashlib.sha256(shipped).hexdigest()
    for test in it["significance"]:
        assert (
            f", p {test['p_value']:.4g}\n" in out and f"| {test['p_value']:.4g} |" in page and test["p_value"] < 0.001
        )
    (command,) = re.findall(r"^    (.*) python train_gpt.py$", page, re.M)
    here = {f"/path/to/{Path(place).name}": place for place in (env["DATA_PATH"], env["TOKENIZER_PATH"])}
    given = dict(part.split("=", 1) for part in shlex.split(command))
    review = sh("train_gpt.py", cwd=folder, **{name: here.get(value, value) for name, value in given.items()})
    ours, theirs = figures(review), figures(texts["1"])
    assert all(ours[stage][:2] == theirs[stage][:2] for stage in STAGES)
