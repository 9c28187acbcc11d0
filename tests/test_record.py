"""tools/record.py on three real runs: what it writes is what the logs say, and what does not fit together is refused."""

import dataclasses
import hashlib
import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, finals, run
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

sys.path.insert(0, str(ROOT / "tools"))
import record  # noqa: E402
import runlog  # noqa: E402

SCRIPT = ROOT / "train_gpt.py"
ARGS = ["--script", str(SCRIPT), "--name", "Three seeds", "--date", "2026-04-30"]
FREE = ("warmup_step", "late_qat", "quantize_and_pack")  # lines to which no other number is bound


@pytest.fixture(scope="module", autouse=True)
def resolve_once():
    """The script is asked once for each set of overrides: to import torch takes seconds."""
    resolve, known = record.resolve, {}

    def once(script, log):
        key = (script, *sorted(log.overrides.items()))
        return known[key] if key in known else known.setdefault(key, resolve(script, log))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "resolve", once)
        yield


def found(pattern, text):
    return re.search(pattern, text, re.M)[1]


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory):
    """Three seeds of one small run, in this process; a test repeats one of them as a reviewer would."""
    folder = tmp_path_factory.mktemp("seeds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.torch.cuda, "is_available", lambda: False)
        for seed in "123":
            own = dict(SEED=seed, RUN_ID=f"seed{seed}", OUTPUT_DIR=str(folder / seed))
            t.main([], dataset | own | dict(VARIANT="smoke", VAL_MAX_TOKENS="300", ITERATIONS="12"))
    return folder


@pytest.fixture(scope="module")
def texts(folder):
    return [(folder / seed / "logs" / f"seed{seed}.txt").read_text() for seed in "123"]


@pytest.fixture
def write(tmp_path):
    """Writes texts as logs and returns their paths."""
    def write(texts):
        paths = [tmp_path / f"{i}.txt" for i in range(len(texts))]
        for path, text in zip(paths, texts):
            path.write_text(text)
        return paths

    return write


def refusal(paths, tmp_path, *args):
    """The line that record.py refuses these logs with; nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(record.Refused) as refused:
        record.main([*map(str, paths), *ARGS, "--out", str(tmp_path / "out"), *args])
    assert sorted(tmp_path.rglob("*")) == before and "\n" not in str(refused.value)
    return str(refused.value)


def line_of(text, start):
    return next(i for i, line in enumerate(text.splitlines(), 1) if line.startswith(start))


# What is written.

@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """The folder of the three logs, given in no order."""
    logs, out = [str(folder / seed / "logs" / f"seed{seed}.txt") for seed in "312"], tmp_path_factory.mktemp("out")
    path = record.main([*logs, *ARGS, "--out", str(out), "--against", "2.9,3.0,3.2"])
    assert path == out / "2026-04-30_Three_seeds"
    return path


def test_the_folder_holds_what_ran(written, folder):
    assert sorted(p.name for p in written.iterdir()) == ["README.md", "requirements.txt", "submission.json", "train_gpt.py", *(
        f"train_seed{seed}.log" for seed in "123")]
    assert [p.name for p in written.parent.iterdir()] == [written.name]
    assert (written / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()
    for seed in "123":
        original = (folder / seed / "logs" / f"seed{seed}.txt").read_text()
        places = [f"OUTPUT_DIR={folder}/{seed} ", f"artifact:{folder}/{seed}/final", f"log:{folder}/{seed}/logs/seed", f"={folder.parent}/"]
        assert sum(map(original.count, places)) >= 4
        assert (written / f"train_seed{seed}.log").read_text() == without_places(original, seed, folder)


def without_places(text, seed, folder):
    """A log of `folder` as record.py publishes it: its places are all absolute paths below the folder's parent."""
    text = text.replace(f"OUTPUT_DIR={folder}/{seed} ", "OUTPUT_DIR=/path/to ").replace(f":{folder}/{seed}/logs/", ":/path/to/")
    return re.sub(rf"([=:]){folder.parent}/(?:\w+/)*", r"\1/path/to/", text)


def test_nothing_in_the_folder_tells_of_a_machine_or_its_user(written, folder):
    root = str(folder.parents[1])
    assert root.count("/") > 1
    for path in written.iterdir():
        assert not re.search(rf"{root}|/home/|/Users/|/root/", path.read_text()), path
    assert "the logs are as the script wrote them, but for local folders, which are `/path/to` here" in (written / "README.md").read_text()


def test_a_published_log_is_read_as_the_same_run(written, folder):
    for seed in "123":
        ours, theirs = (runlog.read_log(path) for path in (written / f"train_seed{seed}.log", folder / seed / "logs" / f"seed{seed}.txt"))
        other = dict(path=None, text=None, places=None, overrides=None)
        assert dataclasses.replace(ours, **other) == dataclasses.replace(theirs, **other) and ours.public() == ours.text
        assert {name: value.rpartition("/")[2] for name, value in ours.overrides.items() if name != "OUTPUT_DIR"} == {
            name: value.rpartition("/")[2] for name, value in theirs.overrides.items() if name != "OUTPUT_DIR"}


def test_places_with_spaces_and_checkpoints_are_seen_and_relative_ones_stay(texts, tmp_path):
    text = re.sub("(?<=overrides: ).*", "VARIANT=smoke SEED=1 OUTPUT_DIR=/home/ann DATA_PATH=/home/ann/my data/it TOKENIZER_PATH=../it.model", texts[0])
    text = re.sub(r"^artifact:\S+", "artifact:/home/ann/x y.ptz", text, flags=re.M)
    text = re.sub(r"^log:.*", "log:logs/a.txt artifact:/home/ann/x y.ptz", text, flags=re.M)
    text = re.sub(r"^averaging:", "checkpoint:/home/ann/c.ptz averaging:ema updates:10\naveraging:", text, flags=re.M)
    (path := tmp_path / "log.txt").write_text(text)
    want = text.replace("=/home/ann ", "=/path/to ").replace("=/home/ann/my data/", "=/path/to/").replace(":/home/ann/", ":/path/to/")
    assert text.count("/home/ann") == 5 and runlog.read_log(path).public() == want and "/home" not in want


def test_submission_says_what_the_logs_say_to_the_last_digit(written, folder, texts):
    it = json.loads((written / "submission.json").read_text())
    scores = [finals(text)["legal_ttt"] for text in texts]
    losses = [float(found(r"^legal_ttt_exact val_loss:(\S+)", text)) for text in texts]
    assert it["seeds"] == [1, 2, 3] and [it["seed_results"][seed]["val_bpb"] for seed in "123"] == scores
    assert [it["seed_results"][seed]["val_loss"] for seed in "123"] == losses
    assert it["val_bpb"] == pytest.approx(np.mean(scores), abs=5e-9) and it["val_bpb_std"] == pytest.approx(np.std(scores, ddof=1), abs=5e-9)
    assert it["val_loss"] == pytest.approx(np.mean(losses), abs=5e-9) and it["val_loss_std"] == pytest.approx(np.std(losses, ddof=1), abs=5e-9)
    models = [(folder / seed / "final_model.int6.ptz").stat().st_size for seed in "123"]
    code = SCRIPT.stat().st_size
    assert [it["seed_results"][seed]["artifact_bytes"] for seed in "123"] == [code + model for model in models]
    assert (it["bytes_code"], it["bytes_total"], it["artifact_bytes_mean"]) == (code, code + max(models), round(code + np.mean(models)))
    for seed, text in zip("123", texts):
        result = it["seed_results"][seed]
        assert result["train_wallclock_ms"] == 1000 * result["train_time_s"] == int(found(r"^training ended.*train_time:(\d+)ms", text))
        assert 1000 * result["eval_time_s"] == int(found(r"^total_eval_time:(\d+)ms", text))
        assert result["target_tokens"] == 300 and f"targets:300 bytes:{result['target_bytes']}\n" in text and result["steps"] == 12
        assert result["quantized_val_bpb"] == finals(text)["final_int6_roundtrip"]
    assert it["model_params"] == 53748 and it["date"] == "2026-04-30" and it["name"] == "Three seeds" and it["author"] is None


def test_it_claims_no_more_than_the_logs_show(written):
    it, page = json.loads((written / "submission.json").read_text()), (written / "README.md").read_text()
    assert it["track"] == "non-record: 1 process(es) on cpu x1, no GPU, not 8xH100 SXM; data set tiny, not the contest's FineWeb; " \
        "first 300 targets of the validation text" and f"**Not a record**: {it['track'].removeprefix('non-record: ')}." in page
    assert it["hardware"] == "1 process(es) on cpu x1, no GPU" and "H100" not in json.dumps({k: v for k, v in it.items() if k != "track"})
    false = {key for key, holds in it["compliance"].items() if not holds}
    assert false == {"full_validation_split"} and "whole validation split: NO" in page


def test_the_page_has_every_figure_of_the_logs(written, texts):
    page = (written / "README.md").read_text()
    for seed, text in zip("123", texts):
        row = next(line for line in page.splitlines() if line.startswith(f"| {seed} | 12 |"))
        assert all(f"| {bpb:.8f} |" in row for bpb in finals(text).values())
        size = int(found(r"^Total submission size .* (\d+) bytes", text))
        assert f"| {size:,} |" in row
        times = next(line for line in page.splitlines() if line.startswith(f"| {seed} | ") and line not in row).split(" | ")
        assert times[1] == "%.3f" % (int(found(r"^training ended.*train_time:(\d+)ms", text)) / 1000)
        assert times[2] == found(r"^quantize_and_pack:([\d.]+)s", text)
        assert times[-1].strip(" |") == "%.3f" % (int(found(r"^total_eval_time:(\d+)ms", text)) / 1000)
    scores = [finals(text)["legal_ttt"] for text in texts]
    assert f"(std {statistics.stdev(scores):.8f}, 3 seeds)" in page.splitlines()[0] and f"val_bpb {statistics.mean(scores):.8f}" in page.splitlines()[0]


def command_of(folder, dataset):
    """The settings of the page's command, with the data where it lies here."""
    command = shlex.split(next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("    ")))
    assert command[-2:] == ["python", "train_gpt.py"] and "SEED=1" in command and not any("OUTPUT_DIR" in part for part in command)
    here = {f"/path/to/{Path(place).name}": place for place in (dataset["DATA_PATH"], dataset["TOKENIZER_PATH"])}
    given = dict(part.split("=", 1) for part in command[:-2])
    assert {*here} <= {*given.values()}
    return {name: here.get(value, value) for name, value in given.items()}


def test_a_reviewer_can_run_the_folder_by_its_command(written, tmp_path, texts, dataset):
    copy = shutil.copytree(written, tmp_path / "copy")
    out = run(command_of(copy, dataset), script=copy / "train_gpt.py", cwd=copy).stdout
    assert finals(out) == finals(texts[0])
    assert re.findall(r"train_loss:\S+", out) == re.findall(r"train_loss:\S+", texts[0])


def test_a_run_as_a_record_must_be(write, texts, tmp_path):
    """The same logs as if 8 H100 had scored the contest's text: the track, the command, and no excuse in the page."""
    path = record.main([*map(str, write([as_contest(text) for text in texts])), *ARGS, "--out", str(tmp_path / "out"), "--author", "A. Nonymous"])
    it, page = json.loads((path / "submission.json").read_text()), (path / "README.md").read_text()
    assert it["track"] == "10min_16mb" and it["hardware"] == "8x NVIDIA H100 80GB HBM3" and all(it["compliance"].values())
    assert it["author"] == "A. Nonymous" and "Not a record" not in page and "torchrun --standalone --nproc_per_node=8 train_gpt.py" in page


def as_contest(text, dataset="fineweb10B_sp1024", targets=62_021_849, size=151_080_891):
    """The log of another machine, with its lines on memory, and of another text, every val_bpb computed again."""
    exact = {f"{float(loss):.4f}": float(loss) for loss in re.findall(r"_exact val_loss:(\S+)", text)}

    def bpb(match):
        value = exact.get(match[2], float(match[2])) * targets / size / math.log(2)
        return f"{match[1]}{match[2]}{match[3]}{value:.{len(match[4].split('.')[1])}f}"

    text = text.replace("device:cpu x1 world_size:1", "device:NVIDIA H100 80GB HBM3 world_size:8").replace("dataset:tiny", f"dataset:{dataset}")
    text = text.replace(" VAL_MAX_TOKENS=300", "")
    text = re.sub(r"^(?:averaging:|total_eval_time:).*", r"\g<0>\npeak memory allocated: 20001 MiB reserved: 21002 MiB", text, flags=re.M)
    text = re.sub(r"val_loader:\S+ \S+", f"val_loader:tokens:{targets} bytes:{size}", text)
    text = re.sub(r"bytes_per_token:.*", f"bytes_per_token:{size / targets:.6f} targets:{targets} bytes:{size}", text)
    return re.sub(r"(val_loss:|^(?:raw|averaged|final_\w+|legal_ttt) +)([\d.]+)( val_bpb:| +)([\d.]+)", bpb, text, flags=re.M)


def test_the_packed_script_is_what_is_shipped_and_counted_and_runs(write, texts, tmp_path, folder, dataset):
    path = record.main([*map(str, write(texts)), *ARGS, "--out", str(tmp_path / "out"), "--pack"])
    it, page, shipped = json.loads((path / "submission.json").read_text()), (path / "README.md").read_text(), (path / "train_gpt.py").read_bytes()
    size, models = len(shipped), [(folder / seed / "final_model.int6.ptz").stat().st_size for seed in "123"]
    assert size < len(SCRIPT.read_bytes()) / 2 and it["bytes_code"] == size
    assert [r["artifact_bytes"] for r in it["seed_results"].values()] == [size + model for model in models] and it["bytes_total"] == size + max(models)
    assert f"`train_gpt.py`: {size:,} bytes, sha256 {hashlib.sha256(shipped).hexdigest()}" in page
    assert f"it is packed: what wrote the logs, and runs, are the {SCRIPT.stat().st_size:,} bytes in it of sha256 " in page
    assert f"{size + max(models):,} (code {size:,}), {16_000_000 - size - max(models):,} to spare" in page
    out = run(command_of(path, dataset), script=path / "train_gpt.py", cwd=path).stdout
    assert finals(out) == finals(texts[0]) and f"sha256:{hashlib.sha256(shipped).hexdigest()} bytes:{size}\n" in out
    assert f"\ncode {size} + model {models[0]} = {size + models[0]} bytes\n" in out


def test_a_script_that_was_packed_before_it_ran_is_recorded_without_packing(write, texts, tmp_path):
    """Its logs count the bytes that are shipped; its folder need not have a requirements.txt."""
    import pack

    (script := tmp_path / "train_gpt.py").write_bytes(packed := pack.pack_source(SCRIPT.read_bytes()))
    code, sha256 = SCRIPT.stat().st_size, hashlib.sha256(packed).hexdigest()
    logs = []
    for text in texts:
        model = int(found(r"^code \d+ \+ model (\d+)", text))
        text = re.sub("sha256:[0-9a-f]+", f"sha256:{sha256}", text)
        logs.append(re.sub(rf"\b{code}\b", str(len(packed)), re.sub(rf"\b{code + model}\b", str(len(packed) + model), text)))
    path = record.main([*map(str, write(logs)), *ARGS, "--script", str(script), "--out", str(tmp_path / "out")])
    assert (path / "train_gpt.py").read_bytes() == packed and "it is packed" not in (path / "README.md").read_text()
    assert (path / "requirements.txt").read_bytes() == (ROOT / "requirements.txt").read_bytes()
    assert json.loads((path / "submission.json").read_text())["bytes_code"] == len(packed)


def test_one_log_and_one_file(write, texts, tmp_path):
    (logs := tmp_path / "logs").mkdir()
    (logs / "a.txt").write_text(texts[0])
    out = tmp_path / "submission.json"
    assert record.main([str(logs / "a.txt"), *ARGS, "--non-record", "--submission-only", str(out)]) == out
    it = json.loads(out.read_text())
    assert it["val_bpb"] == finals(texts[0])["legal_ttt"] and it["val_bpb_std"] is None and it["logs"] == ["logs/a.txt"] and it["seeds"] == [1]
    assert "1 seed(s)" in it["track"] and sorted(p.name for p in tmp_path.iterdir()) == ["logs", "submission.json"]
    (tmp_path / "other").mkdir()
    record.main([str(logs / "a.txt"), *ARGS, "--non-record", "--submission-only", str(tmp_path / "other" / "s.json")])
    assert json.loads((tmp_path / "other" / "s.json").read_text()) == it | dict(logs=["a.txt"])  # no way through local folders
    kept = out.read_bytes()
    (logs / "a.txt").write_text(texts[0][:-1])
    assert "0.txt" not in refusal([logs / "a.txt"], tmp_path, "--non-record", "--submission-only", str(out)) and out.read_bytes() == kept


def test_a_folder_that_exists_is_left_alone(write, texts, tmp_path):
    there = tmp_path / "out" / "2026-04-30_Three_seeds"
    there.mkdir(parents=True)
    assert "exists; choose another" in refusal(write(texts), tmp_path)


@pytest.mark.parametrize("args, words", [(["--date", "30.4.2026"], "is not a day like"), (["--date", "20260430"], "is not a day like"),
                                         (["--name", "//"], "--name is needed"), (["--against", "2136"], "give two or more scores"),
                                         (["--against", "1.08"], "give two or more scores"), (["--script", "none.py"], "cannot read none.py")])
def test_arguments_that_make_no_sense(write, texts, tmp_path, args, words):
    assert words in refusal(write(texts), tmp_path, *args)


# What is refused: changes of one log of three, and where the refusal points.

def number(pattern, change):
    """A change of the number that `pattern` finds in one place."""
    def mutate(text):
        assert len(re.findall(pattern, text, re.M)) == 1, pattern
        return re.sub(pattern, lambda m: m[0].replace(m[1], str(change(m[1]))), text, flags=re.M)

    return mutate


def without(*starts):
    return lambda text: "".join(line for line in text.splitlines(True) if not line.startswith(starts))


def took(seconds, steps=12):
    """A run whose training took so long and so many steps, with all numbers that follow from it."""
    ended = f"training ended: step:{steps}/12 train_time:{1000 * seconds}ms step_avg:{1000 * seconds / steps:.2f}ms"
    return lambda text: re.sub(r"^training ended.*", ended, text, flags=re.M)


def model_of(size):
    """A run whose model has so many bytes, wherever they are counted."""
    def mutate(text):
        code, model = map(int, re.search(r"^code (\d+) \+ model (\d+)", text, re.M).groups())
        return re.sub(rf"\b{model}\b", str(size), re.sub(rf"\b{code + model}\b", str(code + size), text))

    return mutate


def again(text):
    return text + text


def lowered(text):
    """Another score in the line and in the row of test-time training, not in its exact line."""
    loss, bpb = map(float, re.search(r"^legal_ttt val_loss:(\S+) val_bpb:(\S+)", text, re.M).groups())
    lower, ratio = (loss - 0.01, bpb - 0.01 * bpb / loss), r"^(legal_ttt (?:val_loss:| +))\S+( val_bpb:| +)\S+"
    return re.sub(ratio, rf"\g<1>{lower[0]:.4f}\g<2>{lower[1]:.4f}", text, flags=re.M)


def swapped(text):
    """The exact line of a stage after the line of the next."""
    return re.sub(r"^(final_int6_roundtrip_exact.*\n)(final_int6_sliding_window .*\n)", r"\2\1", text, flags=re.M)


def nearby(text):
    """Another number that rounds to the same four digits, so that the rounded line still follows from it."""
    lower = f"{float(text) - 1e-6:.8f}"
    return lower if f"{float(lower):.4f}" == f"{float(text):.4f}" else f"{float(text) + 1e-6:.8f}"



REFUSALS = {
    "another rate": (lambda s: s.replace("ITERATIONS=12", "ITERATIONS=12 MATRIX_LR=0.03"), "variant:", "MATRIX_LR=0.03, but \\(default\\) in .*0.txt"),
    "another value": (lambda s: s.replace("VAL_MAX_TOKENS=300", "VAL_MAX_TOKENS=301"), "variant:", "VAL_MAX_TOKENS=301, but 300 in"),
    "another variant": (lambda s: s.replace("smoke", "demo"), "variant:", "VARIANT=demo, but smoke in"),
    "another machine": (lambda s: s.replace("device:cpu x1", "device:cpu x2"), "device:", "device cpu x2, but cpu x1 in"),
    "another torch": (lambda s: s.replace("torch:2", "torch:3"), "python:", "versions .*torch:3"),
    "another text": (lambda s: s.replace("dataset:tiny", "dataset:huge"), "train_loader:", "dataset huge, but tiny in"),
    "another seed in the header": (lambda s: s.replace("smoke seed:2 over", "smoke seed:4 over"), "variant:", "seed is 4, but .* say 2"),
    "the seed of another": (lambda s: s.replace("seed:2", "seed:1").replace("SEED=2", "SEED=1"), "variant:", "seed 1 is that of .*0.txt"),
    "another script": (lambda s: re.sub("sha256:....", "sha256:0000", s), "source:", "written by source 0000.* but .*train_gpt.py is"),
    "a header field": (lambda s: s.replace("device:cpu x1", "device:cpu x1 temperature:40", 1).replace("numpy:", "pandas:1.0 numpy:"), "python:", "pandas:1.0"),
    "a line": (lambda s: s.replace("model_params", "note:tuned on the test\nmodel_params"), "model_params", "no line of train_gpt.py.*note:"),
    "no sliding window": (without("final_int6_sliding"), "total_eval", "final_int6_sliding_window .*one is missing"),
    "no exact line": (without("final_int6_roundtrip_exact"), "total_eval", "one is missing"),
    "no test-time training": (without("legal_ttt"), "total_eval", "legal_ttt is missing before this line, but TTT_EPOCHS=3"),
    "no training end": (without("training ended"), "quantize_and_pack", "'training ended' line is missing before this one"),
    "no row": (without("averaged "), "code 1", "the list of rows above is .*but other lines"),
    "two logs": (again, "source:", "a 'source' line where none can follow; are there two logs"),
    "a long training": (took(601), "training ended", "training took 601.000 s, over 600 s"),
    "a long evaluation": (number(r"total_eval_time:(\d+)ms", lambda ms: 600_001), "total_eval_time", "evaluation took 600.001 s"),
    "a short evaluation": (number(r"total_eval_time:(\d+)ms", lambda ms: 3), "total_eval_time", "took \\d+ ms, more than all of it"),
    "a large model": (model_of(15_999_999), "Total", "bytes, \\d+ over 16000000"),
    "a total": (number(r"^Total .*: (\d+) bytes", lambda n: int(n) - 1), "Total", "code \\+ model is"),
    "a better score": (number(r"^legal_ttt_exact.*val_bpb:(\S+)", nearby), "legal_ttt_exact", "val_bpb is .*but other numbers"),
    "a better loss": (number(r"^legal_ttt_exact.*val_loss:(\S+)", nearby), "legal_ttt_exact", "val_bpb is .*but other numbers"),
    "a better line": (number(r"^legal_ttt val_loss:\S+ val_bpb:(\S+)", lambda x: f"{float(x) - 2e-4:.4f}"), "legal_ttt ", "val_bpb is"),
    "a better row": (number(r"^legal_ttt  +\S+ +(\S+)", lambda x: f"{float(x) - 1e-4:.4f}"), "legal_ttt    ", "val_bpb is"),
    "more bytes": (number(r"^bytes_per_token.*bytes:(\d+)$", lambda n: int(n) + 1), "bytes_per_token", "number of bytes is"),
    "a lost step": (without("step:7/12 train"), "training ended", "step 7 has no train_loss line"),
    "a lost validation": (without("step:10/12 val"), "training ended", "step 10 has no val_loss line"),
    "another stride": (lambda s: s.replace("stride:8", "stride:16"), "artifact:", "EVAL_STRIDE is 16, but the settings of the run make it 8"),
    "a better stage": (lowered, "legal_ttt ", "val_loss is .*but other numbers"),
    "stages in no order": (swapped, "final_int6_roundtrip_exact", "the place of the exact line"),
    "another size of the source": (number(r"^source.*bytes:(\d+)", lambda n: int(n) + 1), "Code size", "the size of the code"),
    "another compressor": (lambda s: s.replace("size int6+zstd", "size int6+lzma"), "Total", "the kind of model is int6\\+lzma"),
    "another payload": (number(r"payload_ratio:(\S+)x", lambda x: float(x) + 0.02), "Serialized", "payload_ratio is"),
    "another count of steps": (lambda s: s.replace("step:5/12 ", "step:5/13 "), "step:5/", "number of iterations is 13"),
    "a step after the end": (took(9, steps=9), "step:10/", "step 10 of a run that ended with step 9 of 12"),
    "a clock that goes back": (took(0), "training ended", "its time is before that of line"),
    "a lost warm-up": (lambda s: s.replace("warmup_step:1/1", "warmup_step:2/2", 1), "warmup_step:2/2", "the warm-up step is 2"),
    "a file that FIT never made": (lambda s: s.replace("quantize_and_pack", "fit:factor 1.0000 bytes:77 of 99\nquantize_and_pack"), "Serialized", "FIT tried"),
    "fewer iterations": (lambda s: s.replace("/12 ", "/13 "), "training ended", "the list of early stops"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_log_that_does_not_fit_is_refused_at_its_line(write, texts, tmp_path, case):
    mutate, start, words = REFUSALS[case]
    changed = mutate(texts[1])
    message = refusal(write([texts[0], changed, texts[2]]), tmp_path)
    at = [i for i, line in enumerate(changed.splitlines(), 1) if line.startswith(start)]
    if case == "a line":
        at = [at[0] - 1]
    assert changed != texts[1] and any(message.startswith(f"{tmp_path / '1.txt'}:{i}: ") for i in at), (message, at)
    assert re.search(words, message), message


def test_what_is_no_log(write, texts, tmp_path):
    paths = write([texts[0], "", "caf\n"])
    assert refusal(paths, tmp_path).startswith(f"{paths[1]}:1: the 'source' line is missing")
    paths[1].write_bytes(texts[1].encode().replace(b"device:", b"\xffdevice:"))
    assert refusal(paths, tmp_path).startswith(f"{paths[1]}:3: not UTF-8")
    assert refusal([tmp_path / "none.txt"], tmp_path) == f"cannot read {tmp_path / 'none.txt'}: No such file or directory"
    assert refusal([], tmp_path) == "give the logs, one for each seed"


def test_two_seeds_are_no_record(write, texts, tmp_path):
    paths = write(texts[:2])
    assert refusal(paths, tmp_path).startswith(f"{paths[1]}:{line_of(texts[1], 'variant:')}: with this one 2 seed(s)")
    assert record.main([*map(str, paths), *ARGS, "--out", str(tmp_path / "out"), "--non-record"]).is_dir()


def test_the_settings_must_be_the_scripts(write, texts, tmp_path):
    """What all logs say alike, but their script does not know."""
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nif 'TUND_LR' in os.environ: sys.exit('script.py: TUND_LR is not an option')\nprint('VARIANT=smoke')\n")
    texts = [re.sub("sha256:[0-9a-f]+", f"sha256:{hashlib.sha256(script.read_bytes()).hexdigest()}", text) for text in texts]
    for override, words in (("TUNED_LR", f"TUNED_LR is no option of {script}"), ("TUND_LR", f"{script} does not take these settings: script.py: TUND_LR is")):
        paths = write([re.sub("overrides: .*", f"overrides: VARIANT=smoke {override}=1", text) for text in texts])
        assert refusal(paths, tmp_path, "--script", str(script)).startswith(f"{paths[0]}:4: {words}")


@pytest.mark.parametrize("changes, words", [
    (dict(size=151_080_891 * 4 // 3), "3.247907 bytes a token, but fineweb10B_sp1024 has 2.435930"),
    (dict(targets=62_021_631, size=151_080_360), "62021631 targets, but the validation split of fineweb10B_sp1024 has 62021632 to"),
    (dict(dataset="fineweb10B_sp8192"), "2.435930 bytes a token, but fineweb10B_sp8192 has 3.726638")])
def test_bytes_that_are_not_those_of_the_contest(write, texts, tmp_path, changes, words):
    paths = write([as_contest(text, **changes) for text in texts])
    message = refusal(paths, tmp_path)
    assert message.startswith(f"{paths[0]}:{line_of(paths[0].read_text(), 'bytes_per_token')}: ") and words in message, message


def test_more_targets_than_the_settings_allow(write, texts, tmp_path):
    paths = write([as_contest(text).replace("overrides: ", "overrides: VAL_MAX_TOKENS=300 ") for text in texts])
    assert refusal(paths, tmp_path).startswith(f"{paths[0]}:6: 62021849 targets, but VAL_MAX_TOKENS=300")


def test_every_line_is_needed_once(write, texts, tmp_path):
    """A line taken away, or written twice, is seen, wherever it stands."""
    lines = texts[1].splitlines(True)
    for i, line in enumerate(lines):
        if not line.startswith(FREE):
            for changed in (lines[:i] + lines[i + 1 :], lines[: i + 1] + lines[i:]):
                assert str(tmp_path / "1.txt") in refusal(write([texts[0], "".join(changed), texts[2]]), tmp_path), line


def test_halves_of_two_logs_make_no_log(write, texts, tmp_path):
    first, second = (text.splitlines(True) for text in texts[1:])
    assert len(first) == len(second)
    for i in range(1, len(first)):
        assert ".txt:" in refusal(write([texts[0], "".join(first[:i] + second[i:]), texts[2]]), tmp_path), i


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_log_cut_anywhere_is_refused(texts, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_text(texts[0][: data.draw(st.integers(0, len(texts[0]) - 1))])
    with pytest.raises(runlog.Refused, match=rf"^{path}:\d+: "):
        runlog.read_log(path)


BOUND = ("val_loader", "training ended", "Code size", "Total submission", "DIAGNOSTIC", "final_", "legal_ttt", "bytes_per_token", "raw ", "averaged ",
         "code ", "stopping_early", "variant:")


def test_every_digit_that_counts_is_bound_to_others(tmp_path):
    """In a real log, a change of the first or the last digit of a number of the result is seen; of milliseconds the first."""
    path, text = tmp_path / "log.txt", (ROOT / "logs" / "five" / "card-1.txt").read_text()
    runlog.read_log(ROOT / "logs" / "five" / "card-1.txt")
    seen = 0
    for row in re.finditer(rf"^(?:{'|'.join(map(re.escape, BOUND))})[^:\n]*:?.*$", text, re.M):
        for match in re.finditer(r"(?<![\w.])\d+(?:\.\d+)?", row[0].split(" overrides")[0]):
            digits = [match.start()] + [match.end() - 1] * (not row[0][: match.start()].endswith("_time:"))
            for at in {row.start() + digit for digit in digits}:
                path.write_text(text[:at] + str((int(text[at]) + 5) % 10) + text[at + 1 :])
                with pytest.raises(runlog.Refused, match=rf"^{path}:\d+: "):
                    runlog.read_log(path)
                seen += 1
    assert seen > 100


# Significance.

def tail(t, df):
    """P(T > t) of Student's distribution, by integrating its density over v = tan u from 0 to t."""
    u = np.linspace(0, math.atan(abs(t)), 20_001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + np.tan(u) ** 2 / df) ** (-(df + 1) / 2) / np.cos(u) ** 2
    return 0.5 - math.copysign(float((density[1:] + density[:-1]) @ np.diff(u)) / 2, t)


def welch(new, old, margin):
    """t, degrees of freedom and p by the formulas of rules.md 6.3."""
    a, b = (np.var(v, ddof=1) / len(v) for v in (new, old))
    t = (np.mean(old) - np.mean(new) - margin) / math.sqrt(a + b)
    df = (a + b) ** 2 / (a**2 / (len(new) - 1) + b**2 / (len(old) - 1))
    return t, df, tail(t, df)


scores = st.lists(st.integers(0, 2000).map(lambda n: 1.05 + n * 1e-5), min_size=2, max_size=5, unique=True)


@settings(deadline=None, max_examples=40)
@given(scores, scores)
def test_welch_by_an_independent_computation(ours, theirs):
    tests = record.significance(ours, tuple(theirs), 2.5)
    margins = [0, 0.005 / (2.5 * math.log(2)), 0.005, 0.005 / math.log(2)]
    for test, margin in zip(tests, margins, strict=True):
        assert test.margin == pytest.approx(margin) and (test.t, test.df, test.p) == pytest.approx(welch(ours, theirs, margin), rel=1e-3, abs=1e-5)


def test_the_readings_of_the_rules():
    """rules.md 6.2: 0.005 nats a token are 0.002961 bpb on sp1024 and 0.001936 on sp8192, 0.005 a byte 0.007213."""
    ours = [1.0, 1.001]
    for ratio, want in ((2.435930, 0.002961), (3.726631, 0.001936)):
        assert [round(test.margin, 6) for test in record.significance(ours, (1.1, 1.2), ratio)] == [0.0, want, 0.005, 0.007213]
    assert statistics.mean(record.RECORDS["2135"]) == pytest.approx(1.05650768, abs=5e-9)
    assert statistics.stdev(record.RECORDS["2135"]) == pytest.approx(0.000356, abs=5e-7)


def test_significance_is_written(written, texts):
    it, page = json.loads((written / "submission.json").read_text()), (written / "README.md").read_text()
    ours, ratio = [finals(text)["legal_ttt"] for text in texts], it["seed_results"]["1"]["target_bytes"] / 300
    for test, margin in zip(it["significance"], (0, 0.005 / math.log(2) / ratio, 0.005, 0.005 / math.log(2)), strict=True):
        t, df, p = welch(ours, [2.9, 3.0, 3.2], margin)
        assert (test["t_statistic"], test["welch_df"], test["p_value"]) == pytest.approx((t, df, p), rel=1e-3, abs=1e-5)
        assert f"| {test['t_statistic']:.3f} | {test['welch_df']:.2f} | {test['p_value']:.4g} |" in page
    assert "2.9, 3.0, 3.2 (mean 3.03333333, std 0.15275252)" in page and it["against"] == "2.9,3.0,3.2"


def test_one_seed_proves_nothing(write, texts, tmp_path):
    assert "one number has no spread" in refusal(write(texts[:1]), tmp_path, "--non-record", "--against", "1.08,1.09")


def test_a_record_is_compared_with_scores_of_its_own_text_alone(write, texts, tmp_path):
    assert refusal(write(texts), tmp_path, "--against", "2135") == "--against 2135: that record is scored on the contest's whole validation " \
        "split, these logs are not (tiny, 300 targets)"
    path = record.main([*map(str, write([as_contest(text) for text in texts])), *ARGS, "--out", str(tmp_path / "out"), "--against", "#2135"])
    assert "against those of PR #2135, 1.05679341, 1.05662016, 1.05610947 (mean 1.05650768" in (path / "README.md").read_text()


FORMATS = {  # the last lines of logs of the contest's scripts, components.md section 13; each ends in the score 1.08...
    "150": "final_int8_zlib_roundtrip val_loss:2.1000 val_bpb:1.1712 eval_time:9ms\nfinal_int8_zlib_roundtrip_exact val_loss:2.10000000 val_bpb:1.17125000\n"
           "final_sliding_window val_loss:1.9000 val_bpb:1.0811 stride:64 eval_seq_len:2048 eval_time:9ms\n"
           "final_sliding_window_exact val_loss:1.90000000 val_bpb:1.08110001\n",
    "1194": "final_int6_sliding_window_exact val_loss:1.91000000 val_bpb:1.12165000\n"
            "final_int8_zlib_roundtrip_exact val_loss:1.91000000 val_bpb:1.12165000\nttt_sliding:start chunks=1893\n"
            "legal_ttt val_loss:1.9000 val_bpb:1.0812 eval_time:9ms\nlegal_ttt_exact val_loss:1.90000000 val_bpb:1.08120001\n",
    "1493": "pre-quantization post-ema val_loss:2.80000000 val_bpb:1.08735000 eval_time:9ms\nquantized_sliding_window val_loss:2.79000000 val_bpb:1.08286000 "
            "eval_time:9ms\nttt:start chunks=1238 ttt_lr=0.005\nquantized_ttt val_loss:2.78000000 val_bpb:1.08130001 eval_time:9ms\n"}


def test_scores_to_compare_with_are_read_from_logs_of_the_contests_scripts(write, texts, tmp_path):
    paths = []
    for name, text in FORMATS.items():
        paths.append(tmp_path / f"{name}.log")
        paths[-1].write_text(f"import os\n{'=' * 100}\nstep:1/9 train_loss:6.9000 train_time:1ms step_avg:1.00ms\n" + text)
    given = ",".join(map(str, paths))
    assert record.parse_against(given) == (1.08110001, 1.08120001, 1.08130001)
    assert record.parse_against(",".join(map(str, write(texts)))) == tuple(finals(text)["legal_ttt"] for text in texts)
    path = record.main([*map(str, write(texts)), *ARGS, "--out", str(tmp_path / "out"), "--against", given])
    page, it = (path / "README.md").read_text(), json.loads((path / "submission.json").read_text())
    assert "against those in 150.log, 1194.log, 1493.log, 1.08110001, 1.08120001, 1.08130001 (mean" in page and str(tmp_path) not in page
    assert it["against"] == "150.log,1194.log,1493.log"
    paths[0].write_text("step:1/9 val_loss:1.9000 val_bpb:1.0811\n")
    assert refusal(write(texts), tmp_path, "--name", "b", "--against", given).startswith(f"{paths[0]} has no line 'STAGE val_loss:")
    paths[0].unlink()
    assert refusal(write(texts), tmp_path, "--name", "b", "--against", given) == f"cannot read {paths[0]}: No such file or directory"


def test_what_was_written_is_told_at_once(write, texts, tmp_path, capsys):
    path = record.main([*map(str, write(texts)), *ARGS, "--out", str(tmp_path / "out"), "--against", "2.9,3.0,3.2"])
    it, out = json.loads((path / "submission.json").read_text()), capsys.readouterr().out.splitlines()
    assert out[-7] == f"val_bpb {it['val_bpb']:.8f}, std {it['val_bpb_std']:.8f}, 3 seeds"
    assert out[-6] == f"{it['bytes_total']:,} bytes at most (code {it['bytes_code']:,}), {16_000_000 - it['bytes_total']:,} to spare"
    assert out[-5] == it["track"].replace("non-record", "no record")
    for line, test in zip(out[-4:], it["significance"], strict=True):
        assert line.startswith(f"lower than 2.9,3.0,3.2 by more than {test['lower_by_more_than']}: t {test['t_statistic']:.3f}, ")
        assert line.endswith(f", p {test['p_value']:.4g}")


# Retraction.

def test_a_retracted_score_is_null_and_kept(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "f")
    value = json.loads((folder / "submission.json").read_text())["val_bpb"]
    assert record.main(["--retract", str(folder), "--reason", "The text was seen before."]) == folder
    it = json.loads((folder / "submission.json").read_text())
    assert it["val_bpb"] is None and it["val_bpb_retracted"] == value and it["status"] == "retracted"
    assert it | dict(val_bpb=value) == json.loads((written / "submission.json").read_text()) | dict(
        val_bpb_retracted=value, status="retracted", retraction_reason="The text was seen before.")
    page = (folder / "README.md").read_text()
    assert page.startswith(f"> **Retracted: {value} bits per byte") and page.endswith((written / "README.md").read_text())
    assert "The text was seen before." in page.splitlines()[0]
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(record.Refused, match="was it retracted before"):
        record.main(["--retract", str(folder)])
    assert before == {p: p.read_bytes() for p in folder.iterdir()}


def test_retraction_takes_no_logs(written):
    with pytest.raises(record.Refused, match="takes a folder alone"):
        record.main(["--retract", str(written), "a.txt"])


@pytest.mark.parametrize("text, words", [(None, "^cannot read"), ("{", "is not what record.py writes"), ("[]", "has no number as val_bpb")])
def test_only_a_folder_of_record_py_can_be_retracted(tmp_path, text, words):
    (tmp_path / "README.md").write_text("page")
    if text is not None:
        (tmp_path / "submission.json").write_text(text)
    with pytest.raises(record.Refused, match=words):
        record.main(["--retract", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == "page"


def test_the_command_ends_in_one_line_and_an_exit_status(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "record.py"), str(tmp_path / "none"), *ARGS], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr == f"record.py: cannot read {tmp_path / 'none'}: No such file or directory\n"
