"""tools.record on three real runs: what it writes is what the logs say, and what does not fit together is refused."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
import shlex
import shutil
import statistics

import numpy as np
import pytest
from conftest import ROOT, finals, run, tool
from helpers import forked
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t
from tools import runlog, table
from tools.files import Refused
from tools.record import artifacts, checks, command, credits, entry, pack, page, significance, source

SCRIPT = ROOT / "train_gpt.py"
ARGS = ["--script", str(SCRIPT), "--name", "Three seeds", "--date", "2026-04-30"]
FREE = ("warmup_step", "late_qat")  # lines to which no other number is bound


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The script runs in forks, and is asked once for each set of overrides: to import torch takes seconds. The runs that scored an artifact."""
    resolve, known, scored = checks.resolve, {}, []

    def once(script, log):
        key = (script, *sorted(log.overrides.items()))
        return known[key] if key in known else known.setdefault(key, resolve(script, log))

    def run_script(script, *arguments, **env):
        scored.extend([env] * ("EVAL_ONLY" in env))
        return forked.python([script.path, *arguments], env | dict(CUDA_VISIBLE_DEVICES=""))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "resolve", once)
        for module in (source, artifacts):
            patch.setattr(module, "run_script", run_script)
        yield scored


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
    """The logs, with their hashes in the RESULT line alone, so that `forged` may write the other lines from the facts."""
    return [runlog.HASH.sub("", (folder / seed / "logs" / f"seed{seed}.txt").read_text()) for seed in "123"]


def models(folder):
    """The artifacts of the three seeds."""
    return [next((folder / seed).glob("*.int6.ptz")) for seed in "123"]


def facts_of(text):
    return json.loads(text.splitlines()[-1].removeprefix("RESULT "))


def resulting(text, facts):
    """The log with these facts in its RESULT line, and no other line changed."""
    return "\n".join([*text.splitlines()[:-1], f"RESULT {json.dumps(facts)}", ""])


def forged(text, **changed):
    """The log that a run with other facts would have left: each line that tells of one is written anew."""
    (*rows, _), old = text.splitlines(), facts_of(text)
    for before, after in zip(runlog.lines_of(old), runlog.lines_of(old | changed), strict=True):
        pattern = re.compile("(.+)".join(map(re.escape, before.split(runlog.ANY))))
        at, match = next((i, match) for i, row in enumerate(rows) if (match := pattern.fullmatch(row)))
        rows[at] = "".join(itertools.chain(*itertools.zip_longest(after.split(runlog.ANY), match.groups(), fillvalue="")))
    return resulting("\n".join([*rows, "", ""]), old | changed)


def overridden(text, **overrides):
    """The log of a run with other overrides; None takes one away."""
    return forged(text, overrides={name: value for name, value in (facts_of(text)["overrides"] | overrides).items() if value is not None})


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
    """The line that tools.record refuses these logs with; nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refused) as refused:
        command.main([*map(str, paths), *ARGS, "--out", str(tmp_path / "out"), *args])
    assert sorted(tmp_path.rglob("*")) == before and "\n" not in str(refused.value)
    return str(refused.value)


def line_of(text, start):
    return next(i for i, line in enumerate(text.splitlines(), 1) if line.startswith(start))


# What is written.

@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """The folder of the three logs, given in no order."""
    logs, out = [str(folder / seed / "logs" / f"seed{seed}.txt") for seed in "312"], tmp_path_factory.mktemp("out")
    path = command.main([*logs, *ARGS, "--out", str(out), "--against", "2.9,3.0,3.2"])
    assert path == out / "2026-04-30_Three_seeds"
    return path


def test_the_folder_holds_what_ran(written, folder):
    assert sorted(p.name for p in written.iterdir()) == ["README.md", "requirements.txt", "submission.json", "tiny.model", "train_gpt.py", *(
        f"train_seed{seed}.log" for seed in "123")]
    assert [p.name for p in written.parent.iterdir()] == [written.name]
    assert (written / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()
    for seed in "123":
        original = (folder / seed / "logs" / f"seed{seed}.txt").read_text()
        places = [f"OUTPUT_DIR={folder}/{seed} ", f"artifact:{folder}/{seed}/", f"log:{folder}/{seed}/logs/seed", f"={folder.parent}/"]
        assert sum(map(original.count, places)) >= 4
        assert (written / f"train_seed{seed}.log").read_text() == without_places(original, seed, folder)


def without_places(text, seed, folder):
    """A log of `folder` as tools.record publishes it: its places are all absolute paths below the folder's parent."""
    text = text.replace(f"OUTPUT_DIR={folder}/{seed} ", "OUTPUT_DIR=/path/to ").replace(f":{folder}/{seed}/logs/", ":/path/to/")
    text = text.replace(f'"OUTPUT_DIR": "{folder}/{seed}"', '"OUTPUT_DIR": "/path/to"')
    return re.sub(rf'([=:]|: "){folder.parent}/(?:\w+/)*', r"\1/path/to/", text)


def test_nothing_in_the_folder_tells_of_a_machine_or_its_user(written, folder):
    root = str(folder.parents[1])
    assert root.count("/") > 1
    for path in {*written.iterdir()} - {written / "tiny.model"}:
        assert not re.search(rf"{root}|/home/|/Users/|/root/", path.read_text()), path
    assert "the logs are as the script wrote them, but for local folders, which are `/path/to` here" in (written / "README.md").read_text()


def test_a_published_log_is_read_as_the_same_run(written, folder):
    for seed in "123":
        ours, theirs = (runlog.read_log(path) for path in (written / f"train_seed{seed}.log", folder / seed / "logs" / f"seed{seed}.txt"))
        other = dict(path=None, text=None, overrides=None)
        assert dataclasses.replace(ours, **other) == dataclasses.replace(theirs, **other) and ours.public() == ours.text
        assert {name: value.rpartition("/")[2] for name, value in ours.overrides.items() if name != "OUTPUT_DIR"} == {
            name: value.rpartition("/")[2] for name, value in theirs.overrides.items() if name != "OUTPUT_DIR"}


def test_places_with_spaces_and_checkpoints_are_seen_and_relative_ones_stay(texts, tmp_path):
    text = forged(texts[0], overrides=dict(
        VARIANT="smoke", SEED="1", OUTPUT_DIR="/home/ann", DATA_PATH="/home/ann/my data/it", TOKENIZER_PATH="../it.model"))
    text = re.sub(r"^artifact:\S+", "artifact:/home/ann/x y.ptz", text, flags=re.M)
    text = re.sub(r"^log:.*", "log:logs/a.txt artifact:/home/ann/x y.ptz", text, flags=re.M)
    text = re.sub(r"^averaging:", "checkpoint:/home/ann/c.ptz averaging:ema updates:10\naveraging:", text, flags=re.M)
    (path := tmp_path / "log.txt").write_text(text)
    want = text.replace("=/home/ann ", "=/path/to ").replace("=/home/ann/my data/", "=/path/to/").replace(":/home/ann/", ":/path/to/")
    want = want.replace('"/home/ann"', '"/path/to"').replace('"/home/ann/my data/', '"/path/to/')
    assert text.count("/home/ann") == 7 and runlog.read_log(path).public() == want and "/home" not in want


def test_submission_says_what_the_logs_say_to_the_last_digit(written, folder, texts):
    it = json.loads((written / "submission.json").read_text())
    scores = [finals(text)["legal_ttt"] for text in texts]
    losses = [float(found(r"^legal_ttt_exact val_loss:(\S+)", text)) for text in texts]
    assert it["seeds"] == [1, 2, 3] and [it["seed_results"][seed]["val_bpb"] for seed in "123"] == scores
    assert [it["seed_results"][seed]["val_loss"] for seed in "123"] == losses
    assert it["val_bpb"] == pytest.approx(np.mean(scores), abs=5e-9) and it["val_bpb_std"] == pytest.approx(np.std(scores, ddof=1), abs=5e-9)
    assert it["val_loss"] == pytest.approx(np.mean(losses), abs=5e-9) and it["val_loss_std"] == pytest.approx(np.std(losses, ddof=1), abs=5e-9)
    sizes = [path.stat().st_size for path in models(folder)]
    code = SCRIPT.stat().st_size
    assert [it["seed_results"][seed]["artifact_bytes"] for seed in "123"] == [code + model for model in sizes]
    assert (it["bytes_code"], it["bytes_total"], it["artifact_bytes_mean"]) == (code, code + max(sizes), round(code + np.mean(sizes)))
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
    assert "* warning of the log of seed 1: only 300 of the split's " in page


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
    given = dict(part.split("=", 1) for part in command[:-2])
    assert given["DATA_PATH"] == "/path/to/tiny" and given["TOKENIZER_PATH"] == "tiny.model"
    return given | dict(DATA_PATH=dataset["DATA_PATH"])


def test_a_reviewer_can_run_the_folder_by_its_command(written, tmp_path, texts, dataset):
    copy = shutil.copytree(written, tmp_path / "copy")
    out = run(command_of(copy, dataset), script=copy / "train_gpt.py", cwd=copy).stdout
    assert finals(out) == finals(texts[0])
    artifact = found(r"^It writes `(.*?)`\. `EVAL_ONLY=1", (copy / "README.md").read_text())
    assert (copy / artifact).is_file() and f" artifact:{artifact}\n" in out
    assert re.findall(r"train_loss:\S+", out) == re.findall(r"train_loss:\S+", texts[0])


def test_a_run_as_a_record_must_be(write, texts, tmp_path):
    """The same logs as if 8 H100 had scored the contest's text: the track, the command, and no excuse in the page."""
    path = command.main([*map(str, write([as_contest(text) for text in texts])), *ARGS, "--out", str(tmp_path / "out"), "--author", "A. Nonymous"])
    it, page = json.loads((path / "submission.json").read_text()), (path / "README.md").read_text()
    assert it["track"] == "10min_16mb" and it["hardware"] == "8x NVIDIA H100 80GB HBM3" and all(it["compliance"].values())
    assert it["author"] == "A. Nonymous" and "Not a record" not in page and "torchrun --standalone --nproc_per_node=8 train_gpt.py" in page


def as_contest(text, dataset="fineweb10B_sp1024", targets=62_021_849, size=151_080_891, limit=None):
    """The log of another machine, with its lines on memory, and of another text, every val_bpb computed again."""
    ratio = targets / size / math.log(2)
    scores = {stage: score | dict(bpb=score["loss"] * ratio) for stage, score in facts_of(text)["scores"].items()}
    text = forged(overridden(text, VAL_MAX_TOKENS=limit), scores=scores, dataset=dataset, targets=targets, bytes=size, val_split_targets=targets,
                  device="NVIDIA H100 80GB HBM3", world_size=8, versions=facts_of(text)["versions"] | dict(torch="2.9.1+cu128"))
    text = re.sub(r"^(?:averaging:|total_eval_time:).*", r"\g<0>\npeak memory allocated: 20001 MiB reserved: 21002 MiB", text, flags=re.M)
    return re.sub(r"(^step:\S+ val_loss:)(\S+)( val_bpb:)\S+", lambda m: f"{m[1]}{m[2]}{m[3]}{float(m[2]) * ratio:.4f}", text, flags=re.M)


def test_the_packed_script_is_what_is_shipped_and_counted_and_runs(write, texts, tmp_path, folder, dataset):
    path = command.main([*map(str, write(texts)), *ARGS, "--out", str(tmp_path / "out"), "--pack"])
    it, page, shipped = json.loads((path / "submission.json").read_text()), (path / "README.md").read_text(), (path / "train_gpt.py").read_bytes()
    size, sizes = len(shipped), [path.stat().st_size for path in models(folder)]
    assert size < len(SCRIPT.read_bytes()) / 2 and it["bytes_code"] == size
    assert [r["artifact_bytes"] for r in it["seed_results"].values()] == [size + model for model in sizes] and it["bytes_total"] == size + max(sizes)
    assert f"`train_gpt.py`: {size:,} bytes, sha256 {hashlib.sha256(shipped).hexdigest()}" in page
    assert f"it is packed: what wrote the logs, and runs, are the {SCRIPT.stat().st_size:,} bytes in it of sha256 " in page
    assert f"{size + max(sizes):,} (code {size:,}), {16_000_000 - size - max(sizes):,} to spare" in page
    out = run(command_of(path, dataset), script=path / "train_gpt.py", cwd=path).stdout
    assert finals(out) == finals(texts[0]) and f"sha256:{hashlib.sha256(shipped).hexdigest()} bytes:{size}\n" in out
    assert f"\ncode {size} + model {sizes[0]} = {size + sizes[0]} bytes\n" in out


def test_a_script_that_was_packed_before_it_ran_is_recorded_without_packing(write, texts, tmp_path):
    """Its logs count the bytes that are shipped; its folder need not have a requirements.txt."""
    (script := tmp_path / "train_gpt.py").write_bytes(packed := pack.pack_source(SCRIPT.read_bytes()))
    logs = [forged(text, source_sha256=hashlib.sha256(packed).hexdigest(), code_bytes=len(packed)) for text in texts]
    path = command.main([*map(str, write(logs)), *ARGS, "--script", str(script), "--out", str(tmp_path / "out")])
    assert (path / "train_gpt.py").read_bytes() == packed and "it is packed" not in (path / "README.md").read_text()
    packages = (path / "requirements.txt").read_text().splitlines()
    assert {re.split("[>=]", line)[0] for line in packages} == {"torch", "numpy", "sentencepiece", "zstandard", "brotli", "tqdm"} and len(packages) == 6
    assert json.loads((path / "submission.json").read_text())["bytes_code"] == len(packed)


def test_one_log_and_one_file(write, texts, tmp_path):
    (logs := tmp_path / "logs").mkdir()
    (logs / "a.txt").write_text(texts[0])
    out = tmp_path / "submission.json"
    assert command.main([str(logs / "a.txt"), *ARGS, "--non-record", "--submission-only", str(out)]) == out
    it = json.loads(out.read_text())
    assert it["val_bpb"] == finals(texts[0])["legal_ttt"] and it["val_bpb_std"] is None and it["logs"] == ["logs/a.txt"] and it["seeds"] == [1]
    assert "1 seed(s)" in it["track"] and sorted(p.name for p in tmp_path.iterdir()) == ["logs", "submission.json"]
    (tmp_path / "other").mkdir()
    command.main([str(logs / "a.txt"), *ARGS, "--non-record", "--submission-only", str(tmp_path / "other" / "s.json")])
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


def told(**changed):
    """Other facts, in every line that tells of them."""
    return lambda text: forged(text, **changed)


def set_to(**overrides):
    return lambda text: overridden(text, **overrides)


def scored(**changed):
    """Another score of test-time training, in its lines, in the table and in RESULT."""
    def mutate(text):
        scores = facts_of(text)["scores"]
        return forged(text, scores=scores | dict(legal_ttt=scores["legal_ttt"] | {key: change(scores["legal_ttt"][key]) for key, change in changed.items()}))

    return mutate


def another_seed(text):
    """That of the first log, wherever a seed stands."""
    return forged(overridden(text, SEED="1"), seed=1)


def without_adaptation(text):
    """A whole log of a run that scored twice, of the settings of one that scored three times."""
    facts = facts_of(text)
    return resulting(without("legal_ttt")(text), facts | dict(scores={k: v for k, v in facts["scores"].items() if k != "legal_ttt"}))


def on_gpu(build):
    return lambda text: forged(text, device="NVIDIA H100 80GB HBM3", world_size=8, versions=facts_of(text)["versions"] | dict(torch=build))


def validated(sha256):
    """The log of a script that tells the hash of the validation tokens."""
    def mutate(text):
        return re.sub(r"^val_loader:.*", rf"\g<0> val_sha256:{sha256}", resulting(text, facts_of(text) | dict(val_sha256=sha256)), flags=re.M)

    return mutate


def lowered(text):
    """Another score in the line and in the row of test-time training, not in its exact line."""
    loss, bpb = map(float, re.search(r"^legal_ttt val_loss:(\S+) val_bpb:(\S+)", text, re.M).groups())
    lower, ratio = (loss - 0.01, bpb - 0.01 * bpb / loss), r"^(legal_ttt (?:val_loss:| +))\S+( val_bpb:| +)\S+"
    return re.sub(ratio, rf"\g<1>{lower[0]:.4f}\g<2>{lower[1]:.4f}", text, flags=re.M)


def swapped(text):
    """The exact line of a stage after the line of the next."""
    return re.sub(r"^(final_int6_roundtrip_exact.*\n)(final_int6_sliding_window .*\n)", r"\2\1", text, flags=re.M)


def earlier(text):
    """Step 7 a millisecond after the start, with the average that this makes."""
    return re.sub(r"^(step:7/12 train.*) train_time:\S+ step_avg:\S+", r"\1 train_time:1ms step_avg:0.14ms", text, flags=re.M)


def nearby(text):
    """Another number that rounds to the same four digits, so that the rounded line still follows from it."""
    lower = f"{float(text) - 1e-6:.8f}"
    return lower if f"{float(lower):.4f}" == f"{float(text):.4f}" else f"{float(text) + 1e-6:.8f}"


BY = "but by the RESULT line '{}.* must stand here"
REFUSALS = {
    "another rate": (set_to(MATRIX_LR="0.03"), "variant:", "MATRIX_LR=0.03, but \\(default\\) in .*0.txt"),
    "another rate in the header": (lambda s: s.replace("ITERATIONS=12", "ITERATIONS=12 MATRIX_LR=0.03"), "variant:", BY.format("variant:")),
    "another value": (set_to(VAL_MAX_TOKENS="301"), "variant:", "VAL_MAX_TOKENS=301, but 300 in"),
    "another variant": (lambda s: forged(overridden(s, VARIANT="demo"), variant="demo"), "variant:", "VARIANT=demo, but smoke in"),
    "another machine": (told(device="cpu x2"), "device:", "device cpu x2, but cpu x1 in"),
    "another machine in the header": (lambda s: s.replace("device:cpu x1", "device:cpu x2"), "device:", BY.format("device:cpu x1")),
    "another torch": (lambda s: forged(s, versions=facts_of(s)["versions"] | dict(torch="3.0")), "python:", "software .*torch:3"),
    "another text": (told(dataset="huge"), "train_loader:", "dataset huge, but tiny in"),
    "another seed": (told(seed=4), "RESULT", "seed is 4, but 2 among the overrides"),
    "another seed in the header": (lambda s: s.replace("smoke seed:2 over", "smoke seed:4 over"), "variant:", BY.format("variant:smoke seed:2")),
    "the seed of another": (another_seed, "variant:", "seed 1 is that of .*0.txt"),
    "another script": (told(source_sha256="0" * 64), "source:", "written by source 0000.* but .*train_gpt.py is"),
    "another script in the header": (lambda s: re.sub("sha256:....", "sha256:0000", s), "source:", BY.format("source:")),
    "a header field": (lambda s: s.replace("numpy:", "pandas:1.0 numpy:"), "python:", "pandas:1.0"),
    "a line": (lambda s: s.replace("model_params", "note:tuned on the test\nmodel_params"), "note:", "note:.*" + BY.format("model_params")),
    "a GPU beside a CPU build of torch": (on_gpu("2.9.1+cpu"), "device:", "H100 80GB HBM3, but torch 2.9.1\\+cpu in the line above is no CUDA"),
    "a GPU beside a torch of no build": (on_gpu("2.9.1"), "device:", "but torch 2.9.1 in the line above is no CUDA build"),
    "another validation text": (validated("1" * 64), "val_loader:", "val_sha256 1111.*, but [0-9a-f]{64} in .*0.txt"),
    "a hash against RESULT": (lambda s: validated("1" * 64)(s).replace("sha256:1111", "sha256:2111"), "val_loader:", "val_sha256 is 2111.* line .* 1111"),
    "no hash": (lambda s: resulting(s, facts_of(s) | dict(artifact_sha256="12")), "RESULT", "its artifact_sha256 is '12', not 64 hexa"),
    "another score": (lambda s: s.replace("step:5/", "legal_ttt val_loss:1.0000 val_bpb:1.0000 eval_time:1ms\nstep:5/"), "legal_ttt val_loss:1.0", BY[:3]),
    "no sliding window": (without("final_int6_sliding"), "legal_ttt val", BY.format("final_int6_sliding_window ")),
    "no exact line": (without("final_int6_roundtrip_exact"), "final_int6_sliding_window ", BY.format("final_int6_roundtrip_exact")),
    "no lines of test-time training": (without("legal_ttt"), "total_eval", BY.format("legal_ttt ")),
    "no test-time training": (without_adaptation, "total_eval", "legal_ttt is missing before this line, but TTT_EPOCHS=3"),
    "no training end": (without("training ended"), "quantize_and_pack", BY.format("training ended")),
    "no row": (without("averaged "), "final_int6_roundtrip  ", BY.format("averaged ")),
    "two logs": (lambda s: s + s, "RESULT", "once more; are there two logs"),
    "two ends of a log": (lambda s: s + "\n".join(["log:a artifact:b", s.splitlines()[-1], ""]), "RESULT", "once more; are there two logs"),
    "two beginnings": (lambda s: s.splitlines(True)[0] + s, "source:", "once more; are there two logs"),
    "a RESULT between": (lambda s: s.replace("model_params", s.splitlines()[-1] + "\nmodel_params"), "RESULT", "once more; are there two logs"),
    "no warning": (without("WARNING: only"), "RESULT", "it has the warning .only 300 of .* but no line of this log does"),
    "another warning": (lambda s: s.replace("WARNING: only 300", "WARNING: only 299"), "WARNING: only", BY[:3]),
    "no closing line": (without("log:"), "RESULT", BY.format("log:")),
    "a line after the last": (lambda s: s.replace("\nRESULT", "\nnote:fine\nRESULT"), "note:", "'note:fine', " + BY.format("RESULT ")),
    "a long training": (told(train_seconds=601.0), "training ended", "training took 601.000 s, over 600 s"),
    "a long evaluation": (told(eval_seconds=600.001), "total_eval_time", "evaluation took 600.001 s"),
    "a short evaluation": (told(eval_seconds=0.003), "RESULT", "took \\S+ s, all of it 0.003 s"),
    "a large model": (told(model_bytes=15_999_999), "Total", "bytes, \\d+ over 16000000"),
    "a total": (number(r"^Total .*: (\d+) bytes", lambda n: int(n) - 1), "Total", BY.format("Total")),
    "a score": (scored(bpb=lambda x: x - 1e-8), "RESULT", "the bpb of legal_ttt is .*but loss, targets and bytes make it"),
    "a loss": (scored(loss=lambda x: x - 1e-8), "RESULT", "the bpb of legal_ttt is .*but loss, targets and bytes make it"),
    "a better score": (number(r"^legal_ttt_exact.*val_bpb:(\S+)", nearby), "legal_ttt_exact", BY.format("legal_ttt_exact")),
    "a better loss": (number(r"^legal_ttt_exact.*val_loss:(\S+)", nearby), "legal_ttt_exact", BY.format("legal_ttt_exact")),
    "a better line": (number(r"^legal_ttt val_loss:\S+ val_bpb:(\S+)", lambda x: f"{float(x) - 2e-4:.4f}"), "legal_ttt ", BY.format("legal_ttt ")),
    "a better row": (number(r"^legal_ttt  +\S+ +(\S+)", lambda x: f"{float(x) - 1e-4:.4f}"), "legal_ttt    ", BY.format("legal_ttt ")),
    "more bytes": (number(r"^bytes_per_token.*bytes:(\d+)$", lambda n: int(n) + 1), "bytes_per_token", BY.format("bytes_per_token")),
    "a better validation": (number(r"^step:10/12 val_loss:\S+ val_bpb:(\S+)", lambda x: f"{float(x) - 1e-3:.4f}"), "step:10/12 val", "val_bpb is"),
    "a lost step": (without("step:7/12 train"), "training ended", "step 7 has no train_loss line"),
    "a lost validation": (without("step:10/12 val"), "training ended", "step 10 has no val_loss line"),
    "another stride": (told(eval_stride=16), "artifact:", "EVAL_STRIDE is 16, but the settings of the run make it 8"),
    "another artifact": (lambda s: s.replace("artifact:", "artifact:/a", 1), "log:", "the artifact is .* further up"),
    "a better stage": (lowered, "legal_ttt ", BY.format("legal_ttt ")),
    "stages in no order": (swapped, "final_int6_sliding_window ", BY.format("final_int6_roundtrip_exact")),
    "another size of the source": (number(r"^source.*bytes:(\d+)", lambda n: int(n) + 1), "source:", BY.format("source:")),
    "another compressor": (lambda s: s.replace("size int6+zstd", "size int6+lzma"), "Total", BY.format("Total")),
    "another payload": (number(r"payload_ratio:(\S+)x", lambda x: float(x) + 0.02), "Serialized", BY.format("Serialized")),
    "another count of steps": (lambda s: s.replace("step:5/12 ", "step:5/13 "), "step:5/", "step 5/13 of a run that ended with 12/12"),
    "a step after the end": (told(steps=9), "step:10/", "step 10/12 of a run that ended with 9/12"),
    "a clock that goes back": (earlier, "step:7/", "its step and its time do not follow"),
    "a step off the clock": (number(r"^step:7/12 train.*step_avg:(\d+)", lambda n: int(n) + 1), "step:7/", "step_avg is"),
    "an end before the last step": (told(train_seconds=0.0), "step:1/", "its time is after the end of training"),
    "fewer iterations": (lambda s: s.replace("/12 ", "/13 "), "training ended", BY.format("training ended: step:12/12")),
    "an end for no reason": (lambda s: forged(s, iterations=13).replace("/12 ", "/13 "), "training ended", "12 of 13 steps, but the clock stopped .* at none"),
    "no facts": (lambda s: resulting(s, {}), "RESULT", "not the RESULT of a run that trained and was scored: 'source_sha256'"),
    "no JSON": (lambda s: s.replace("RESULT {", "RESULT "), "RESULT", "not the RESULT of a run"),
    "brackets": (lambda s: "\n".join([*s.splitlines()[:-1], "RESULT " + "[" * 99_999, ""]), "RESULT", "not the RESULT of a run"),
    "text for a number": (lambda s: resulting(s, facts_of(s) | dict(seed="2")), "RESULT", "it has 2 as seed"),
    "no number": (lambda s: resulting(s, facts_of(s) | dict(eval_seconds=math.nan)), "RESULT", "it has nan as eval_seconds"),
    "no bytes": (lambda s: resulting(s, facts_of(s) | dict(bytes=0)), "RESULT", "not the RESULT of a run"),
    "a number for text": (lambda s: resulting(s, facts_of(s) | dict(overrides=dict(SEED=2))), "RESULT", "not the RESULT of a run"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_log_that_does_not_fit_is_refused_at_its_line(write, texts, tmp_path, case):
    mutate, start, words = REFUSALS[case]
    changed = mutate(texts[1])
    message = refusal(write([texts[0], changed, texts[2]]), tmp_path)
    at = [i for i, line in enumerate(changed.splitlines(), 1) if line.startswith(start)]
    assert changed != texts[1] and any(message.startswith(f"{tmp_path / '1.txt'}:{i}: ") for i in at), (message, at)
    assert re.search(words, message), message


def test_what_is_no_log(write, texts, tmp_path):
    paths = write([texts[0], "", "caf\n"])
    assert refusal(paths, tmp_path).startswith(f"{paths[1]}:1: no whole RESULT line ends this log")
    assert refusal([paths[0], paths[2], paths[1]], tmp_path).startswith(f"{paths[2]}:1: no whole RESULT line ends this log")
    paths[1].write_bytes(texts[1].encode().replace(b"device:", b"\xffdevice:"))
    assert refusal(paths, tmp_path).startswith(f"{paths[1]}:3: not UTF-8")
    assert refusal([tmp_path / "none.txt"], tmp_path) == f"cannot read {tmp_path / 'none.txt'}: No such file or directory"
    assert refusal([], tmp_path) == "give the logs, one for each seed"


def test_a_log_of_an_earlier_script_is_refused(tmp_path):
    path = ROOT / "logs" / "five" / "card-1.txt"
    assert refusal([path], tmp_path) == f"{path}:{len(path.read_text().splitlines())}: no whole RESULT line ends this log: the run did not finish, " \
        "the log was cut, or an earlier train_gpt.py wrote it"


def test_a_table_takes_its_numbers_from_the_result_and_checks_them(texts, tmp_path):
    """And from the lines of the stages where there is none: the same."""
    paths = [tmp_path / name for name in ("new.txt", "old.txt")]
    for path, text in zip(paths, (texts[0], without("RESULT")(texts[0]))):
        path.write_text(text)
    new, old = map(table.read, paths)
    assert isinstance(new, runlog.RunLog) and not isinstance(old, runlog.RunLog) and table.table([new]) == table.table([old])
    assert (new.seed, new.overrides, new.total_bytes) == (old.seed, old.overrides, old.total_bytes)
    paths[0].write_text(re.sub(r"^(model_params:)\d+", r"\g<1>1", texts[0], flags=re.M))
    with pytest.raises(Refused, match="must stand here"):
        table.read(paths[0])


def test_an_evaluation_alone_is_no_run(folder, texts, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(t.torch.cuda, "is_available", lambda: False)
    own = dict(EVAL_ONLY="1", ARTIFACT=str(models(folder)[0]), RUN_ID="again", OUTPUT_DIR=str(tmp_path / "again"), VAL_MAX_TOKENS="300")
    t.main([], {name: value for name, value in dataset.items() if name != "VOCAB_SIZE"} | own)
    path = tmp_path / "again" / "logs" / "again.txt"
    assert finals(path.read_text()) == finals(texts[0])
    assert "this is not the RESULT of a run that trained and was scored: 'dataset'" in refusal([path], tmp_path)


def test_a_run_that_the_clock_ended_and_what_else_a_log_may_hold(texts, tmp_path):
    """Lines that the smoke runs do not write, where they stand in other runs."""
    text = without("step:11/", "step:12/")(forged(texts[0], steps=10, train_seconds=9.0))
    text = re.sub("^averaging:", "stopping_early: wallclock_cap train_time:8000ms step_avg:800.00ms step:10/12\naveraging: swa took no snapshot, so the last "
                  "weights stand in\ngptq:collected 9 Hessians from 3 of 4 batches\naveraging:", text, flags=re.M)
    text = text.replace("device:", "nvidia-smi: ['NVIDIA H100, 580.1, 700 W, 1980 MHz']\ndevice:", 1).replace(
        "warmup_step:", "WARNING: attention by sdpa, without fa3 (no module)\nwarmup_step:", 1)
    text = text.replace("quantize_and_pack", "fit:factor 1.0000 bytes:77 of 99\nquantize_and_pack")
    (path := tmp_path / "log.txt").write_text(text)
    run = runlog.read_log(path)
    assert (run.steps, run.iterations, run.train_seconds, run.train_lines[-1]) == (10, 12, 9.0, 10)
    assert len(text.splitlines()) == len(texts[0].splitlines()) + 6


def under_another_seed(text, **changed):
    """A copy of a log with another seed wherever one stands."""
    return forged(overridden(text, SEED="9"), seed=9, **changed)


@pytest.mark.parametrize("change", ["seed", "scores", "clocks", "losses"])
def test_a_copy_of_a_log_under_another_seed_is_refused(write, texts, tmp_path, change):
    """Also where all scores, or all clocks, were changed, or all losses of steps: what is left is more than chance."""
    scores = facts_of(texts[1])["scores"]
    forgeries = dict(
        seed=lambda s: s,
        scores=lambda s: forged(s, scores={stage: {name: value * (1 + 1e-3) for name, value in score.items()} for stage, score in scores.items()}),
        clocks=lambda s: forged(s, train_seconds=99.5, eval_seconds=98.5, pack_seconds=1.5, scores={
            stage: score | dict(seconds=1.25) for stage, score in scores.items()}),
        losses=lambda s: re.sub(r"(train_loss:\d\.)\d+", r"\g<1>1234", s))
    copy = under_another_seed(forgeries[change](texts[1]))
    paths = write([texts[0], texts[1], copy])
    message = refusal(paths, tmp_path)
    assert message.startswith(f"{paths[2]}:{line_of(copy, 'variant:')}: ") and f"are those of {paths[1]} to the last digit (" in message, message
    assert message.endswith("one log is a copy of the other, or SEED changes nothing; each seed needs a run of its own")


def delayed(text, seconds):
    """A log all of whose clocks are later: those of three short runs of one machine may meet by chance."""
    def clock(line):
        now = int(line[3]) + 1000 * seconds
        return f"{line[1]}train_time:{now}ms step_avg:{now / int(line[2]):.2f}ms"

    text = forged(text, train_seconds=facts_of(text)["train_seconds"] + seconds)
    return re.sub(r"^(step:(\d+)/.* )train_time:(\d+)ms step_avg:\S+ms", clock, text, flags=re.M)


def test_one_number_that_two_logs_share_is_chance(write, texts, tmp_path):
    texts = [delayed(text, seconds) for text, seconds in zip(texts, (0, 100, 200))]
    row = next(line for line in texts[0].splitlines() if line.startswith("step:1/12 train"))
    other = re.sub(r"^step:1/12 train.*", row, texts[1], flags=re.M)
    clock = facts_of(other)["train_seconds"]
    assert command.main([*map(str, write([texts[0], other, texts[2]])), *ARGS, "--out", str(tmp_path / "out")]).is_dir()
    assert "2 losses, clocks or lines of steps" in refusal(write([forged(texts[0], train_seconds=clock), other, texts[2]]), tmp_path, "--name", "b")


@pytest.mark.parametrize("place", ["own line", "val_loader", "RESULT"])
def test_hashes_that_the_logs_tell_are_stated(write, texts, tmp_path, place):
    """And nothing of them where they do not."""
    sha256 = hashlib.sha256(b"tokens").hexdigest()
    texts = [resulting(text, {name: fact for name, fact in facts_of(text).items() if name not in runlog.HASHES}) for text in texts]
    told = {"val_loader": validated(sha256), "RESULT": lambda s: resulting(s, facts_of(s) | dict(val_sha256=sha256)),
            "own line": lambda s: s.replace("model_params:", f"val_sha256:{sha256}\nmodel_params:", 1)}[place]
    logs = [told(resulting(text, facts_of(text) | dict(artifact_sha256=str(at) * 64))) for at, text in enumerate(texts)]
    paths = [command.main([*map(str, write(given)), *ARGS, "--out", str(tmp_path / name)]) for name, given in (("with", logs), ("without", texts))]
    for path, has in zip(paths, (True, False)):
        it = json.loads((path / "submission.json").read_text())
        assert (it.get("val_sha256"), it.get("artifact_sha256")) == ((sha256, {"1": "0" * 64, "2": "1" * 64, "3": "2" * 64}) if has else (None, None))
        assert (f"* its tokens have the sha256 {sha256}, in all logs\n" in (path / "README.md").read_text()) == has


def test_no_claim_is_made_of_what_no_log_shows(written, texts):
    """What the logs show and what the source does stand apart; validation text in training is neither."""
    page = (written / "README.md").read_text()
    by_logs, by_source = page[page.index("By the logs:") : page.index("## What ran")].split("By the source of `train_gpt.py`; no log shows it:")
    count = len(re.findall(r"^step:\S+ val_loss:", texts[0], re.M))
    assert f"* losses on the validation text during training: {count} line(s) in each log\n" in by_logs and "validation text in training" not in page
    assert "whether a validation document is among them, `python data/prepare.py verify NAME` of the project says" in by_source
    assert "SLOT" not in by_logs and "SLOT" in by_source and "final before a step on it" in by_source


def test_attribution_is_of_what_the_settings_use(written):
    it = json.loads((written / "submission.json").read_text())
    assert it["attribution"]["score_first_ttt"] == "@abaybektursun (PR #549)" and "depth_recurrence" not in it["attribution"]
    for variant, used, unused in (("pr1812", "depth_recurrence", "smear_gate"), ("card", "lora_ttt_of_each_document", "gated_attention"),
                                  ("pr150", "smear_gate", "shared_value_embedding")):
        settings = t.as_env(vars(t.Config.from_env(dict(VARIANT=variant))))
        assert used in credits.attribution(settings) and unused not in credits.attribution(settings)
    assert credits.attribution(settings | dict(TTT_EPOCHS="0")).keys() == credits.attribution(settings).keys() - {"score_first_ttt"}
    source = SCRIPT.read_text()
    for needs, whose in credits.CREDITS.values():
        assert needs.keys() <= settings.keys() and f"PR {whose[whose.index('#') :].strip('()')}" in source, whose


def test_two_seeds_are_no_record(write, texts, tmp_path):
    paths = write(texts[:2])
    assert refusal(paths, tmp_path).startswith(f"{paths[1]}:{line_of(texts[1], 'variant:')}: with this one 2 seed(s)")
    assert command.main([*map(str, paths), *ARGS, "--out", str(tmp_path / "out"), "--non-record"]).is_dir()


def test_the_settings_must_be_the_scripts(write, texts, tmp_path):
    """What all logs say alike, but their script does not know. It does not run with names in its environment that it has no option of."""
    script = tmp_path / "script.py"

    def refused(printed, *overrides):
        script.write_text("import os, sys\nclass Config:\n    variant: str = ''\n    tund_lr: float = 0\n"
                          f"if 'TUND_LR' in os.environ: sys.exit('script.py: TUND_LR is not an option')\nprint('{printed}')\n")
        told = dict(source_sha256=hashlib.sha256(script.read_bytes()).hexdigest(), overrides=dict.fromkeys(overrides, "1") | {"VARIANT": "smoke"})
        return refusal(write([forged(text, **told) for text in texts]), tmp_path, "--script", str(script))

    for name in ("TUNED_LR", "LD_PRELOAD", "PATH", "VARIAN", "VARIANT.*"):
        assert refused("", name) == f"{tmp_path / '0.txt'}:4: {name} is no option of {script}"
    assert refused("", "TUND_LR").endswith(f"{script} does not take these settings: script.py: TUND_LR is not an option")
    assert "has no option TTT_EPOCHS" in refused("VARIANT=smoke\\njunk")
    assert "has TTT_EPOCHS=few, which is not a number" in refused("VARIANT=smoke\\nTTT_EPOCHS=few")


@pytest.mark.parametrize("changes, words", [
    (dict(size=151_080_891 * 4 // 3), "3.247907 bytes a token, but fineweb10B_sp1024 has 2.435930"),
    (dict(targets=62_021_631, size=151_080_360), "62021631 targets, but the validation split of fineweb10B_sp1024 has 62021632 to"),
    (dict(dataset="fineweb10B_sp8192"), "2.435930 bytes a token, but fineweb10B_sp8192 has 3.726638")])
def test_bytes_that_are_not_those_of_the_contest(write, texts, tmp_path, changes, words):
    paths = write([as_contest(text, **changes) for text in texts])
    message = refusal(paths, tmp_path)
    assert message.startswith(f"{paths[0]}:{line_of(paths[0].read_text(), 'bytes_per_token')}: ") and words in message, message


def test_more_targets_than_the_settings_allow(write, texts, tmp_path):
    paths = write([as_contest(text, limit="300") for text in texts])
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
    with pytest.raises(Refused, match=rf"^{path}:\d+: "):
        runlog.read_log(path)


UNBOUND = ("step:", "averaging:", "log:", "RESULT", *FREE)  # lines whose digits no fact tells, and the facts


def test_every_digit_that_counts_is_bound_to_the_result(texts, tmp_path):
    """A change of the first or the last digit of a number is refused at its line, whichever line it is."""
    path, text, seen = tmp_path / "log.txt", texts[0], 0
    for at, row in enumerate(text.splitlines()):
        told = re.sub(r"^artifact:\S+|(looped|eval_seq_len|load_time):\d+", lambda m: "-" * len(m[0]), row)
        for match in () if row.startswith(UNBOUND) else re.finditer(r"(?<![\w.])\d+(?:\.\d+)?", told):
            for digit in {match.start(), match.end() - 1}:
                lines = text.splitlines()
                lines[at] = row[:digit] + str((int(row[digit]) + 5) % 10) + row[digit + 1 :]
                path.write_text("\n".join([*lines, ""]))
                with pytest.raises(Refused, match=rf"^{path}:{at + 1}: "):
                    runlog.read_log(path)
                seen += 1
    assert seen > 100


def changes(name, value):
    """Each way to change one thing in a fact, seconds by enough to show in a line."""
    if isinstance(value, dict):
        for inner in value:
            yield from (value | {inner: changed} for changed in changes(inner, value[inner]))
    elif isinstance(value, str):
        yield f"{value}1"
    else:
        yield value * (1 + 1e-8) if name in ("loss", "bpb") else value + 1


def test_every_fact_is_bound_to_a_line(texts, tmp_path):
    path, facts = tmp_path / "log.txt", facts_of(texts[0])
    for name in runlog.FACTS:
        for changed in changes(name, facts[name]):
            path.write_text(resulting(texts[0], facts | {name: changed}))
            with pytest.raises(Refused, match=rf"^{path}:\d+: "):
                runlog.read_log(path)


# What is claimed.

@pytest.fixture
def contest(write, texts, tmp_path):
    """Three logs as a record must have them, gathered."""
    paths = write([as_contest(text) for text in texts])
    return checks.gather(command.parse_options([*map(str, paths), *ARGS]), tmp_path)


def each(**changed):
    return lambda it: dataclasses.replace(it, runs=tuple(dataclasses.replace(run, **changed) for run in it.runs))


def last(**changed):
    """A change of the last seed alone."""
    return lambda it: dataclasses.replace(it, runs=(*it.runs[:-1], dataclasses.replace(it.runs[-1], **changed)))


def setting(**changed):
    return lambda it: dataclasses.replace(it, settings=source.Settings(it.settings | changed))


def without_ttt(it):
    return dataclasses.replace(it, runs=tuple(
        dataclasses.replace(run, scores={name: score for name, score in run.scores.items() if name != "ttt"}) for run in it.runs))


def foreign(it):
    return dataclasses.replace(it, source=it.source._replace(is_ours=False))


SOURCE_CLAIMS = {"score_first_ttt", "no_slot", "no_pre_quant_ttt", "no_etlb", "no_ngram_cache"}
FALSE = {  # a change of a record's runs, and the claims that it makes false
    "a large model": (last(model_bytes=16_000_001 - SCRIPT.stat().st_size), {"artifact_under_16mb"}),
    "a long training": (last(train_seconds=600.001), {"train_under_600s"}),
    "a training over its limit by less than a millisecond": (
        lambda it: setting(MAX_WALLCLOCK_SECONDS="600.0")(last(train_over_limit_seconds=4e-4, train_seconds=600.0)(it)), {"train_under_600s"}),
    "a long evaluation": (last(eval_seconds=600.001), {"eval_under_600s"}),
    "two seeds": (lambda it: dataclasses.replace(it, runs=it.runs[:2]), {"three_seeds"}),
    "a limit of targets": (setting(VAL_MAX_TOKENS="62021849"), {"full_validation_split"}),
    "fewer targets than the split has": (each(val_split_targets=62_021_850), {"full_validation_split"}),
    "fewer targets than the contest's split": (each(targets=62_021_631), {"full_validation_split"}),
    "another text": (each(dataset="tiny"), {"full_validation_split"}),
    "no test-time training": (without_ttt, {"score_first_ttt"}),
    "another source": (foreign, SOURCE_CLAIMS),
}


@pytest.mark.parametrize("case", FALSE)
def test_each_claim_is_reported_false_where_it_does_not_hold(contest, case):
    """And the other claims stay; none is true by default."""
    change, false = FALSE[case]
    assert all(entry.compliance(contest).values()) and not entry.why_no_record(contest)
    changed = change(contest)
    assert {name for name, holds in entry.compliance(changed).items() if not holds} == false
    assert {name for _, names in FALSE.values() for name in names} == entry.compliance(contest).keys()
    text, whole = (page.readme(it, "").decode() for it in (changed, contest))
    assert "NO, " not in whole and text.count("NO, ") == (0 if false <= SOURCE_CLAIMS else 1) and ("nothing is claimed" in text) == (case == "another source")


@pytest.mark.parametrize("over, limit, holds", [(0.5, "600.0", False), (0.5, "599.0", True), (0.0, "600.0", True)])
def test_a_run_that_passed_its_limit_is_within_the_contests_only_below_600_s(write, texts, tmp_path, over, limit, holds):
    """The fact of the RESULT line, through the whole tool."""
    logs = [as_contest(text) for text in texts]
    logs[2] = resulting(logs[2], facts_of(logs[2]) | dict(train_over_limit_seconds=over))
    logs = [overridden(text, MAX_WALLCLOCK_SECONDS=limit) for text in logs]
    paths = write(logs)
    if not holds:
        assert "training took" in refusal(paths, tmp_path)
    path = command.main([*map(str, paths), *ARGS, "--out", str(tmp_path / "out"), "--non-record"])
    it, text = json.loads((path / "submission.json").read_text()), (path / "README.md").read_text()
    assert it["compliance"]["train_under_600s"] == holds and (f"passed the run's own limit by {over:.3f} s" in text) == (over > 0)


def test_fewer_targets_than_the_split_has_are_no_full_split(write, texts, tmp_path):
    """By the fact alone: no option of the log says so."""
    logs = [resulting(text, facts_of(text) | dict(val_split_targets=62_021_850)) for text in map(as_contest, texts)]
    path = command.main([*map(str, write(logs)), *ARGS, "--out", str(tmp_path / "out")])
    it = json.loads((path / "submission.json").read_text())
    assert not it["compliance"]["full_validation_split"] and it["track"] == "non-record: first 62,021,849 targets of the validation text"
    assert "targets of the whole validation split: 62,021,850; scored: 62,021,849" in (path / "README.md").read_text()


def test_a_file_that_exactly_fills_the_cap_is_within_it(write, texts, tmp_path):
    room = 16_000_000 - SCRIPT.stat().st_size
    logs = [texts[0], forged(texts[1], model_bytes=room), texts[2]]
    path = command.main([*map(str, write(logs)), *ARGS, "--out", str(tmp_path / "out")])
    it, text = json.loads((path / "submission.json").read_text()), (path / "README.md").read_text()
    assert it["bytes_total"] == 16_000_000 and it["compliance"]["artifact_under_16mb"] and ", 0 to spare" in text
    assert runlog.read_log(path / "train_seed2.log").total_bytes == 16_000_000
    assert "bytes, 1 over 16000000" in refusal(write([texts[0], forged(texts[1], model_bytes=room + 1), texts[2]]), tmp_path, "--name", "b")


# Artifacts.

def test_artifacts_are_compared_and_scored_again(write, texts, folder, tmp_path, scripts):
    """In the order of the logs, whatever their seeds."""
    logs, files = write(texts)[::-1], [*map(str, models(folder)[::-1])]
    path = command.main([*map(str, logs), *ARGS, "--out", str(tmp_path / "out"), "--artifacts", *files])
    it, text = json.loads((path / "submission.json").read_text()), (path / "README.md").read_text()
    assert [env["ARTIFACT"] for env in scripts[-3:]] == files and scripts[-1]["VAL_MAX_TOKENS"] == "300"
    for seed, log in zip("123", texts):
        row = next(line for line in text.splitlines() if line.startswith(f"| {seed} | `"))
        again = float(re.search(r"\| as in the log \| yes, 3 stages \| ([\d.]+) \| ", row)[1])  # in another process, which may round otherwise
        assert again == pytest.approx(finals(log)["legal_ttt"], abs=2e-6)
        assert hashlib.sha256(models(folder)[int(seed) - 1].read_bytes()).hexdigest() in row
        assert it["artifacts_checked"][seed] == dict(size_and_sha256_agree=True, val_bpb_again=pytest.approx(again, abs=1e-8), not_scored_because=None)
    assert "Scored again on 1 process(es), cpu x1, torch " in text


def halved(text):
    scores = {stage: {name: value / (1 if name == "seconds" else 2) for name, value in score.items()} for stage, score in facts_of(text)["scores"].items()}
    return halved_lines(forged(text, scores=scores))


def halved_lines(text):
    """The lines of validation within training by the ratio of the new facts."""
    ratio = facts_of(text)["targets"] / facts_of(text)["bytes"] / math.log(2)
    return re.sub(r"(^step:\S+ val_loss:)(\S+)( val_bpb:)\S+", lambda m: f"{m[1]}{m[2]}{m[3]}{float(m[2]) * ratio:.4f}", text, flags=re.M)


def more_bytes(text):
    """Twice the bytes of text, so that the same losses are half the bits per byte."""
    facts = facts_of(text)
    scores = {stage: score | dict(bpb=score["bpb"] / 2) for stage, score in facts["scores"].items()}
    return halved_lines(forged(text, scores=scores, bytes=2 * facts["bytes"]))


ARTIFACT_FAULTS = {
    "all scores halved": (halved, r"scored again, has \d\.\d{8} bits per byte in the stage coded, but .*1.txt says"),
    "twice the bytes of text": (more_bytes, r"scored again, has bytes \d+, but .*1.txt says \d+"),
    "another size": (lambda s: forged(s, model_bytes=facts_of(s)["model_bytes"] - 1), r"int6.ptz has bytes \d+, but .*1.txt says \d+"),
    "another hash": (lambda s: resulting(s, facts_of(s) | dict(artifact_sha256="1" * 64)), "int6.ptz has sha256 .*, but .*1.txt says 1111"),
    "no hash": (lambda s: resulting(s, {k: v for k, v in facts_of(s).items() if k != "artifact_sha256"}), "1.txt tells no artifact_sha256"),
}


@pytest.mark.parametrize("case", ARTIFACT_FAULTS)
def test_a_log_that_its_artifact_does_not_support_is_refused(write, texts, folder, tmp_path, case):
    """Each log is accepted without --artifacts: it agrees with itself."""
    mutate, words = ARTIFACT_FAULTS[case]
    paths = write([texts[0], mutate(texts[1])])
    assert command.main([str(paths[1]), *ARGS, "--out", str(tmp_path / "out"), "--non-record"]).is_dir()
    message = refusal(paths[1:], tmp_path, "--name", "b", "--non-record", "--artifacts", str(models(folder)[1]))
    assert re.search(words, message), message


@pytest.mark.parametrize("files, words", [(["none"], "cannot read none"), (["a", "b"], "2 --artifacts for 1 logs; give one for each log")])
def test_artifacts_that_are_not_those_of_the_logs(write, texts, tmp_path, files, words):
    assert words in refusal(write(texts[:1]), tmp_path, "--non-record", "--artifacts", *files)
    assert f"says {facts_of(texts[0])['model_bytes']}; is it the artifact of seed 1?" in refusal(
        write(texts[:1]), tmp_path, "--non-record", "--artifacts", str(SCRIPT))


@pytest.mark.parametrize("why", ["no data", "no tokenizer", "--no-rescore"])
def test_the_page_says_why_an_artifact_was_not_scored_again(write, texts, folder, tmp_path, monkeypatch, scripts, why):
    """The environment of the command names the places of data and tokenizer."""
    where, count = {"no data": "DATA_PATH", "no tokenizer": "TOKENIZER_PATH"}.get(why, ""), len(scripts)
    if where:
        monkeypatch.setenv(where, str(tmp_path / "none"))
    path = command.main([str(write(texts)[0]), *ARGS, "--out", str(tmp_path / "out"), "--non-record", "--artifacts", str(models(folder)[0]),
                         *["--no-rescore"] * (not where)])
    reason = f"no {where}=/path/to/none here" if where else why
    assert f"| as in the log | no: {reason} | - | - |" in (path / "README.md").read_text() and len(scripts) == count
    assert json.loads((path / "submission.json").read_text())["artifacts_checked"]["1"]["val_bpb_again"] is None


def test_without_artifacts_the_page_says_that_nothing_was_compared(written):
    assert "No artifact was compared with its log (`--artifacts`)" in (written / "README.md").read_text()
    assert json.loads((written / "submission.json").read_text())["artifacts_checked"] is None


def counting(text, sha256):
    """The log of a script that tells the hash of the bytes that each target counts for."""
    return resulting(text, facts_of(text) | dict(val_bytes_sha256=sha256) | ({} if facts_of(text).get("val_sha256") else dict(val_sha256="3" * 64)))


def test_logs_that_count_other_bytes_for_the_same_tokens_are_not_combined(write, texts, tmp_path):
    """tools.record, its --against, and tools.table; a log that does not tell the hash is accepted."""
    one, other = counting(texts[0], "1" * 64), counting(texts[1], "2" * 64)
    paths = write([one, other, counting(texts[2], "1" * 64)])
    words = f"{paths[0]} and {paths[1]} score the same tokens but count other bytes for them: val_bytes_sha256 is 111111111111 and 222222222222"
    assert refusal(paths, tmp_path).startswith(words)
    assert words in tool("tools.table", *paths).stderr
    given = f"{paths[1]},{paths[1]}"
    assert f"it and {paths[0]} score the same tokens but count other bytes" in refusal([paths[0], paths[2]], tmp_path, "--non-record", "--against", given)
    path = command.main([*map(str, write([one, without_byte_hash(texts[1]), counting(texts[2], "1" * 64)])), *ARGS, "--out", str(tmp_path / "out")])
    assert "the byte counts of its targets have the sha256" not in (path / "README.md").read_text()


def test_a_log_to_compare_with_tells_its_targets_before_its_hashes(folder):
    found = significance.last_score(folder / "1" / "logs" / "seed1.txt")
    assert found.targets == 300 and found.hashes[0] == runlog.read_log(folder / "1" / "logs" / "seed1.txt").val_sha256


def without_byte_hash(text):
    return resulting(text, {name: fact for name, fact in facts_of(text).items() if name != "val_bytes_sha256"})


# What a reader needs.

def test_the_page_has_the_news_the_architecture_the_credits_and_the_source(written, write, texts, tmp_path, capsys):
    (notes := tmp_path / "new.md").write_text("\nRows grow.\n")
    path = command.main([*map(str, write(texts)), *ARGS, "--out", str(tmp_path / "out"), "--notes", str(notes), "--author", "A", "--github-id", "a"])
    text, plain = ((it / "README.md").read_text() for it in (path, written))
    assert "\n## What is new\n\nRows grow.\n\n## Results\n" in text and "What is new" not in plain and capsys.readouterr().err == ""
    assert "* model: 4 layers of width 32, " in plain and "53,748 parameters" in plain and "* score first ttt: @abaybektursun (PR #549)\n" in plain
    commit = json.loads((written / "submission.json").read_text())["commit"]
    assert (f"* commit {commit}, whose `train_gpt.py` this is" if commit else "* its commit is not known") in plain
    assert refusal(write(texts), tmp_path, "--name", "b", "--notes", "none.md") == "cannot read none.md: No such file or directory"


def test_what_is_not_given_is_told_in_one_line(write, texts, tmp_path, capsys):
    args = [str(write(texts)[0]), *ARGS, "--non-record"]
    command.main([*args, "--submission-only", str(tmp_path / "s.json"), "--author", "A"])
    assert capsys.readouterr().err == "tools.record: WARNING: not given, so empty in what was written: --github-id\n"
    command.main([*args, "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err == "tools.record: WARNING: not given, so empty in what was written: --author, --github-id, --notes\n"


@pytest.mark.parametrize("name, ships", [("mine.model", True), ("fineweb_1024_bpe.model", False), ("fineweb_8192_bpe_lossless_caps.model", False)])
def test_only_a_tokenizer_that_is_not_the_contests_is_shipped(write, texts, tmp_path, monkeypatch, name, ships):
    (tmp_path / name).write_bytes(b"pieces")
    monkeypatch.setenv("TOKENIZER_PATH", str(tmp_path / name))
    path = command.main([str(write(texts)[0]), *ARGS, "--out", str(tmp_path / "out"), "--non-record"])
    assert (path / name).is_file() == ships and (f"TOKENIZER_PATH={name} " in (path / "README.md").read_text()) == ships


def test_a_tokenizer_that_is_missing_is_told(write, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOKENIZER_PATH", str(tmp_path / "none.model"))
    command.main([str(write(texts)[0]), *ARGS, "--out", str(tmp_path / "out"), "--non-record"])
    assert f"WARNING: the tokenizer {tmp_path / 'none.model'} is not the contest's and not here, so the folder lacks it" in capsys.readouterr().err


def test_a_log_of_a_committed_script_finds_its_commit(tmp_path, monkeypatch):
    """Its source is the one that is shipped, counted and asked for the settings, whatever train_gpt.py is today."""
    monkeypatch.chdir(tmp_path)
    log = runlog.read_log(ROOT / "logs" / "2026-11-22_demo.txt")
    if not source.committed(log.source_sha256)[0]:
        pytest.skip("this checkout has no history")
    found = source.find_source(None, log, tmp_path / "source")
    assert found.commit.startswith("ac428ac") and found.is_ours and len(found.contents) == log.code_bytes == found.path.stat().st_size
    assert hashlib.sha256(found.contents).hexdigest() == log.source_sha256 and found.path.parent == tmp_path / "source"
    (tmp_path / "train_gpt.py").write_bytes(pack.pack_source(b"x = 1\n"))
    with pytest.raises(Refused, match="no commit here has it"):
        source.find_source(None, dataclasses.replace(log, source_sha256="1" * 64), tmp_path)
    script = hashlib.sha256((tmp_path / "train_gpt.py").read_bytes()).hexdigest()
    assert not source.find_source(None, dataclasses.replace(log, source_sha256=script), tmp_path).is_ours


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
    tests = significance.significance(ours, tuple(theirs), 2.5)
    margins = [0, 0.005 / (2.5 * math.log(2)), 0.005, 0.005 / math.log(2)]
    for test, margin in zip(tests, margins, strict=True):
        assert test.margin == pytest.approx(margin) and (test.t, test.df, test.p) == pytest.approx(welch(ours, theirs, margin), rel=1e-3, abs=1e-5)


def test_the_readings_of_the_rules():
    """rules.md 6.2: 0.005 nats a token are 0.002961 bpb on sp1024 and 0.001936 on sp8192, 0.005 a byte 0.007213."""
    ours = [1.0, 1.001]
    for ratio, want in ((2.435930, 0.002961), (3.726631, 0.001936)):
        assert [round(test.margin, 6) for test in significance.significance(ours, (1.1, 1.2), ratio)] == [0.0, want, 0.005, 0.007213]
    assert statistics.mean(significance.RECORDS["2135"]) == pytest.approx(1.05650768, abs=5e-9)
    assert statistics.stdev(significance.RECORDS["2135"]) == pytest.approx(0.000356, abs=5e-7)


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
    assert "that record is scored on the contest's whole" in refusal(write(texts), tmp_path, "--against", "1.05679341,1.05662016")
    path = command.main([*map(str, write([as_contest(text) for text in texts])), *ARGS, "--out", str(tmp_path / "out"), "--against", "#2135"])
    page = (path / "README.md").read_text()
    assert "against those of PR #2135, 1.05679341, 1.05662016, 1.05610947 (mean 1.05650768" in page
    assert "These and #2135 are scored on the contest's whole validation split, here as fineweb10B_sp1024." in page


def bytes_per_token(text):
    return facts_of(text)["bytes"] / facts_of(text)["targets"]


def test_logs_of_another_validation_text_are_not_compared_with_either_way(write, texts, tmp_path):
    """Ours against the contest's, the contest's against ours, and ours against another text of our own."""
    theirs, ours = [tmp_path / f"{name}.log" for name in "ab"], [as_contest(text) for text in texts]
    for at, path in enumerate(theirs):  # 3.726638 bytes a token: the contest's, as its sp8192 counts them
        path.write_text(f"quantized_ttt val_loss:{(1.08 + at / 1000) * math.log(2) * 3.726638:.8f} val_bpb:{1.08 + at / 1000:.8f} eval_time:9ms\n")
    given = ",".join(map(str, theirs))
    assert refusal(write(texts), tmp_path, "--against", given) == f"--against {theirs[0]}: it is scored on another validation text (3.726638 bytes a " \
        f"token) than these logs (tiny, 300 targets, {bytes_per_token(texts[0]):.6f} bytes a token); give logs of the same text"
    page = command.main([*map(str, write(ours)), *ARGS, "--out", str(tmp_path / "out"), "--against", given]) / "README.md"
    assert "Both are scored on the contest's whole validation split, by the losses and scores in those logs." in page.read_text()
    for path, text in zip(theirs, texts):
        path.write_text(text)
    assert f"a.log: it is scored on another validation text (300 targets, {bytes_per_token(texts[0]):.6f} bytes a token) than these logs (fineweb10B_sp1024" \
        in refusal(write(ours), tmp_path, "--name", "b", "--against", given)
    for path, text in zip(theirs, texts):  # half of the targets, and as many bytes a token
        path.write_text(text.replace("targets:300 ", "targets:150 "))
    assert "another validation text (150 targets, " in refusal(write(texts), tmp_path, "--name", "b", "--against", given)


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
    found = significance.parse_against(given)
    assert [one.bpb for one in found] == [1.08110001, 1.08120001, 1.08130001] and [one.targets for one in found] == [0, 0, 0]
    assert [one.bytes_per_token * math.log(2) for one in found] == pytest.approx([1.9 / 1.08110001, 1.9 / 1.08120001, 2.78 / 1.08130001])
    assert [(one.bpb, one.targets) for one in significance.parse_against(",".join(map(str, write(texts))))] == [
        (finals(text)["legal_ttt"], 300) for text in texts]
    ratio = bytes_per_token(texts[0])
    for path, one in zip(paths, found):  # as if they had been scored on this text
        path.write_text(path.read_text().rpartition("val_loss:")[0] + f"val_loss:{one.bpb * math.log(2) * ratio:.8f} val_bpb:{one.bpb:.8f}\n")
    path = command.main([*map(str, write(texts)), *ARGS, "--out", str(tmp_path / "out"), "--against", given])
    page, it = (path / "README.md").read_text(), json.loads((path / "submission.json").read_text())
    assert "against those in 150.log, 1194.log, 1493.log, 1.08110001, 1.08120001, 1.08130001 (mean" in page and str(tmp_path) not in page
    assert "Both are scored on a text of as many bytes a token, by the losses and scores in those logs." in page
    assert it["against"] == "150.log,1194.log,1493.log"
    paths[0].write_text("step:1/9 val_loss:1.9000 val_bpb:1.0811\n")
    assert refusal(write(texts), tmp_path, "--name", "b", "--against", given).startswith(f"{paths[0]} has no line 'STAGE val_loss:")
    paths[0].unlink()
    assert refusal(write(texts), tmp_path, "--name", "b", "--against", given) == f"cannot read {paths[0]}: No such file or directory"


def test_what_was_written_is_told_at_once(write, texts, tmp_path, capsys):
    path = command.main([*map(str, write(texts)), *ARGS, "--out", str(tmp_path / "out"), "--against", "2.9,3.0,3.2"])
    it, out = json.loads((path / "submission.json").read_text()), capsys.readouterr().out.splitlines()
    assert out[-8] == f"val_bpb {it['val_bpb']:.8f}, std {it['val_bpb_std']:.8f}, 3 seeds"
    assert out[-7] == f"{it['bytes_total']:,} bytes at most (code {it['bytes_code']:,}), {16_000_000 - it['bytes_total']:,} to spare"
    assert out[-6] == it["track"].replace("non-record", "no record")
    assert out[-5] == it["against_text"] == "Numbers do not tell on which text they were scored: the test holds only if it is that of these logs " \
        f"(tiny, 300 targets, {facts_of(texts[0])['bytes']} bytes)" and out[-5] in (path / "README.md").read_text()
    for line, test in zip(out[-4:], it["significance"], strict=True):
        assert line.startswith(f"lower than 2.9,3.0,3.2 by more than {test['lower_by_more_than']}: t {test['t_statistic']:.3f}, ")
        assert line.endswith(f", p {test['p_value']:.4g}")


# Retraction.

def test_a_retracted_score_is_null_and_kept(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "f")
    value = json.loads((folder / "submission.json").read_text())["val_bpb"]
    assert command.main(["--retract", str(folder), "--reason", "The text was seen before."]) == folder
    it = json.loads((folder / "submission.json").read_text())
    assert it["val_bpb"] is None and it["val_bpb_retracted"] == value and it["status"] == "retracted"
    assert it | dict(val_bpb=value) == json.loads((written / "submission.json").read_text()) | dict(
        val_bpb_retracted=value, status="retracted", retraction_reason="The text was seen before.")
    page = (folder / "README.md").read_text()
    assert page.startswith(f"> **Retracted: {value} bits per byte") and page.endswith((written / "README.md").read_text())
    assert "The text was seen before." in page.splitlines()[0]
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(Refused, match="was it retracted before"):
        command.main(["--retract", str(folder)])
    assert before == {p: p.read_bytes() for p in folder.iterdir()}


def test_retraction_takes_no_logs(written):
    with pytest.raises(Refused, match="takes a folder alone"):
        command.main(["--retract", str(written), "a.txt"])


@pytest.mark.parametrize("text, words", [(None, "^cannot read"), ("{", "is not what tools.record writes"), ("[]", "has no number as val_bpb")])
def test_only_a_folder_of_this_tool_can_be_retracted(tmp_path, text, words):
    (tmp_path / "README.md").write_text("page")
    if text is not None:
        (tmp_path / "submission.json").write_text(text)
    with pytest.raises(Refused, match=words):
        command.main(["--retract", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == "page"


def test_the_command_ends_in_one_line_and_an_exit_status(tmp_path):
    done = tool("tools.record", tmp_path / "none", *ARGS)
    assert done.returncode == 1 and done.stdout == "" and done.stderr == f"tools.record: cannot read {tmp_path / 'none'}: No such file or directory\n"
