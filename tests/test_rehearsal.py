"""From text to a pull request: the rehearsal in logs/rehearsal, and the same way gone again on a small text.

The logs are read here by a parser of their own, in decimals, which shares nothing with tools/runlog.py.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from decimal import Decimal as D
from pathlib import Path

import pytest
from conftest import ROOT, write_json_lines

import train_gpt as t
from tools.record import command as record

REHEARSAL = ROOT / "logs" / "rehearsal"
PAGE = (REHEARSAL / "README.md").read_text(encoding="utf-8")
FOLDERS = {"2026-11-21_Rehearsal": 135_536, "2026-11-21_Rehearsal_packed": 48_269}  # bytes of the train_gpt.py in them
STAGES = ("raw", "averaged", "coded", "sliding", "ttt")


def told(pattern, text):
    """What the one line that matches tells, as it is spelt."""
    (found,) = re.findall(f"^{pattern}$", text, re.M)
    return found


def unrounded(printed, text):
    """The milliseconds of the stages to all their digits if the log has a RESULT (the rehearsal's are older): rounded twice, a tenth can differ."""
    if "\nRESULT " not in text:
        return printed
    exact = [1000 * D(str(score["seconds"])) for score in json.loads(told(r"RESULT (.*)", text))["scores"].values()]
    assert all(abs(D(ms) - it) <= D(".5") for ms, it in zip(printed.values(), exact, strict=True))
    return dict(zip(printed, map(str, exact), strict=True))


def figures(text):
    """The numbers of a log by name, each as the log spells it."""
    pair, time = r"val_loss:(\S+) val_bpb:(\S+)", r"eval_time:(\d+)ms"
    names = dict(zip(STAGES, (r"DIAGNOSTIC raw", r"DIAGNOSTIC post_\w+", r"final_int6_roundtrip", r"final_int6_sliding_window", r"legal_ttt")))
    exact = {key: told(f"{name}{'_exact' if key in STAGES[2:] else ''} {pair}(?: {time})?", text)[:2] for key, name in names.items()}
    printed = {key: told(f"{name} {pair} {time}", text)[2] for key, name in names.items()}
    steps, clock = told(r"training ended: step:(\d+)/\d+ train_time:(\d+)ms step_avg:\S+", text)
    return dict(
        loss={key: loss for key, (loss, _) in exact.items()}, bpb={key: bpb for key, (_, bpb) in exact.items()}, steps=steps,
        seconds=unrounded(printed, text), train_ms=clock,
        packing=told(r"quantize_and_pack:(\S+)s, off the training clock", text), eval_ms=told(r"total_eval_time:(\d+)ms", text),
        code=told(r"Code size: (\d+) bytes", text), model=told(r"Serialized model \S+ (\d+) bytes .*", text),
        targets=told(r"bytes_per_token:\S+ targets:(\d+) bytes:\d+(?: .*)?", text), bytes=told(r"bytes_per_token:\S+ targets:\d+ bytes:(\d+)(?: .*)?", text),
        parameters=told(r"model_params:(\d+) .*", text), sha256=told(r"source:\S+ sha256:(\w+) bytes:\d+", text))


def mean(values):
    return sum(values) / len(values)


def deviation(values):
    return (sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)).sqrt()


def seconds(milliseconds, places):
    return f"{D(milliseconds) / 1000:.{places}f}"


def expected_tables(logs, code):
    """The rows of both tables of the page, by what the logs say; the first cell is the seed."""
    results, times, columns = [], [], []
    for seed, log in logs.items():
        numbers = [D(log["steps"]), D(log["train_ms"]) / D(log["steps"]), *(D(log["bpb"][stage]) for stage in STAGES), D(log["loss"]["ttt"]),
                   D(code) + D(log["model"])]
        columns.append(numbers)
        results.append([seed, log["steps"], f"{numbers[1]:.2f}", *log["bpb"].values(), log["loss"]["ttt"], f"{numbers[-1]:,}"])
        times.append([seed, seconds(log["train_ms"], 3), log["packing"], *(seconds(log["seconds"][stage], 1) for stage in STAGES[2:]),
                      seconds(log["eval_ms"], 3)])
    places = (",.1f", ".2f", ".4f", ".4f", ".8f", ".8f", ".8f", ".8f", ",.1f")
    for name, value in (("mean", mean), ("std", deviation)):
        results.append([name, *(format(value(column), form) for column, form in zip(zip(*columns), places, strict=True))])
    return results, times


def tables_of(page):
    """Every table of a page: its rows of cells without the head."""
    blocks = re.findall(r"(?:^\|.*\n)+", page, re.M)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]] for block in blocks]


def expected_result(log, code):
    """One seed's entry of submission.json."""
    ms = {name: int(log[name]) for name in ("train_ms", "eval_ms")}
    return dict(
        val_loss=log["loss"]["ttt"], val_bpb=log["bpb"]["ttt"], artifact_bytes=code + int(log["model"]), bytes_model=log["model"], steps=log["steps"],
        step_avg_ms=f"{D(log['train_ms']) / D(log['steps']):.2f}", train_time_s=ms["train_ms"] / 1000, train_wallclock_ms=ms["train_ms"],
        eval_time_s=ms["eval_ms"] / 1000, val_tokens=log["targets"], target_tokens=log["targets"], target_bytes=log["bytes"],
        pre_quant_val_loss=log["loss"]["averaged"], pre_quant_val_bpb=log["bpb"]["averaged"], quantized_val_bpb=log["bpb"]["coded"],
        sliding_val_bpb=log["bpb"]["sliding"])


def check_folder(page, it, texts, code):
    """README and submission.json say what the logs of the seeds say, to the last digit."""
    logs = {seed: figures(text) for seed, text in texts.items()}
    assert tables_of(page) == [*expected_tables(logs, code)]
    assert it["seed_results"] == {seed: {k: float(v) for k, v in expected_result(log, code).items()} for seed, log in logs.items()}
    column = {key: [D(str(result[key])) for result in it["seed_results"].values()] for key in it["seed_results"]["1"]}
    for key in ("val_bpb", "val_loss"):
        assert (it[key], it[f"{key}_std"]) == (float(f"{mean(column[key]):.8f}"), float(f"{deviation(column[key]):.8f}"))
    for key in ("pre_quant_val_loss", "pre_quant_val_bpb", "quantized_val_bpb", "sliding_val_bpb"):
        assert it[key] == float(f"{mean(column[key]):.8f}")
    for key, source in (("train_steps_mean", "steps"), ("step_avg_ms_mean", "step_avg_ms"), ("train_time_s_mean", "train_time_s"),
                        ("eval_time_s_mean", "eval_time_s")):
        assert it[key] == float(f"{mean(column[source]):.8f}")
    sizes = [int(v) for v in column["artifact_bytes"]]
    assert (it["bytes_code"], it["bytes_total"], it["artifact_bytes_max"]) == (code, max(sizes), max(sizes))
    assert it["artifact_bytes_mean"] == round(mean(sizes)) and it["seeds"] == [int(seed) for seed in texts]
    assert {log["sha256"] for log in logs.values()} == {it["source_sha256"]} and {int(log["parameters"]) for log in logs.values()} == {it["model_params"]}
    assert page.splitlines()[0].endswith(f"val_bpb {it['val_bpb']:.8f} (std {it['val_bpb_std']:.8f}, {len(texts)} seeds)")
    targets, size = (D(next(iter(logs.values()))[key]) for key in ("targets", "bytes"))
    most = {name: max(D(log[name]) for log in logs.values()) / 1000 for name in ("train_ms", "eval_ms")}
    for words in (f"yes, {max(sizes):,} (code {code:,}), {16_000_000 - max(sizes):,} to spare", f"training: yes, {most['train_ms']:.3f} s",
                  f"evaluation: yes, {most['eval_ms']:.3f} s", f"after that clock: {max(D(log['packing']) for log in logs.values())} s",
                  f"{targets:,} targets, {size:,} bytes, {size / targets:.6f} bytes a token"):
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
    assert it["track"].startswith("non-record: ") and "no entry to the contest" in it["blurb"] and not it["compliance"]["full_validation_split"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_reviewers_run_of_the_rehearsal_gave_the_same_numbers(name):
    page, it, texts = files(REHEARSAL / name)
    review = (REHEARSAL / name / "review.log").read_text(encoding="utf-8")
    size, sha256 = re.search(r"`train_gpt.py`: ([\d,]+) bytes, sha256 (\w+)", page).groups()
    assert told(r"source:train_gpt.py sha256:(\w+ bytes:\d+)", review) == f"{sha256} bytes:{size.replace(',', '')}"
    ours, theirs = figures(review), figures(texts["1"])
    assert all(ours[key] == theirs[key] for key in ("loss", "bpb", "model", "steps", "targets", "bytes"))
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
        t.Config.from_env({k: v.replace("$seed", "1") for k, v in given.items() if k.lower() in t.Config.__dataclass_fields__})
        script = parts[parts.index("-m") + 1] if "-m" in parts else next((part for part in parts if part.endswith(".py") and (ROOT / part).is_file()), None)
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
        done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=240,
                              env=clean | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    write_json_lines(tmp_path / "val.jsonl", documents[:1])
    write_json_lines(tmp_path / "train.jsonl", documents[1:])
    shutil.copy(dataset["TOKENIZER_PATH"], model := tmp_path / "tiny.model")
    sh(ROOT / "data" / "prepare.py", "--root", tmp_path, "tokenize", "train.jsonl", "--val", "val.jsonl", "--tokenizer", model, "--name", "text")
    (tmp_path / "entry").mkdir()
    sh("-m", "tools.record.pack", ROOT / "train_gpt.py", "-o", "entry/train_gpt.py", PYTHONPATH=str(ROOT))
    env = dict(VARIANT="smoke", ITERATIONS="12", VAL_MAX_TOKENS="300", VOCAB_SIZE="384", DATA_PATH=str(tmp_path / "datasets" / "text"),
               TOKENIZER_PATH=str(model))
    for seed in "123":
        sh("entry/train_gpt.py", SEED=seed, RUN_ID=f"seed{seed}", OUTPUT_DIR=f"runs/{seed}", **env)
    out = sh("-m", "tools.record", *(f"runs/{seed}/logs/seed{seed}.txt" for seed in "123"), "--script", "entry/train_gpt.py", "--name", "All of it",
             "--against", "9.1,9.2,9.3", "--artifacts", *(next((tmp_path / "runs" / seed).glob("*.int6.ptz")) for seed in "123"), PYTHONPATH=str(ROOT))
    folder, shipped = tmp_path / out.splitlines()[-1], (tmp_path / "entry" / "train_gpt.py").read_bytes()
    page, it, texts = files(folder)
    for first, end in (("## Significance", "## Command"), ("## Artifacts", "## What ran")):
        assert end == "## Command" or page.count("| as in the log | yes, 3 stages | ") == 3
        page = page.replace(page[page.index(first) : page.index(end)], "")
    check_folder(page, it, texts, len(shipped))
    assert str(tmp_path) not in page + json.dumps(it) + "".join(texts.values()) and (folder / "train_gpt.py").read_bytes() == shipped
    assert all(figures(text)["code"] == str(len(shipped)) and it["source_sha256"] == hashlib.sha256(shipped).hexdigest() for text in texts.values())
    for test in it["significance"]:
        assert f", p {test['p_value']:.4g}\n" in out and f"| {test['p_value']:.4g} |" in page and test["p_value"] < 0.001
    (command,) = re.findall(r"^    (.*) python train_gpt.py$", page, re.M)
    here = {f"/path/to/{Path(place).name}": place for place in (env["DATA_PATH"], env["TOKENIZER_PATH"])}
    given = dict(part.split("=", 1) for part in shlex.split(command))
    review = sh("train_gpt.py", cwd=folder, **{name: here.get(value, value) for name, value in given.items()})
    assert figures(review)["bpb"] == figures(texts["1"])["bpb"] and figures(review)["loss"] == figures(texts["1"])["loss"]
