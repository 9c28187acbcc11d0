"""tools.record on three real runs: what it writes is what their RESULT lines say, and what does not fit is refused."""

import dataclasses
import hashlib
import json
import math
import re
import shlex
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, finals, run, tool
from helpers import forked
from helpers.smoke import SMOKE
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t
from tools import table
from tools.files import Refused
from tools.record import __main__ as record_tool
from tools.record import logs, pack, page
from tools.record.__main__ import main, parse_options

SCRIPT = ROOT / "train_gpt.py"
RUN_SCRIPT = record_tool.run_script  # the fixture below replaces it
ARGS = ["--script", str(SCRIPT), "--name", "Three seeds", "--date", "2026-04-30"]


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The script runs in forks and resolves each set of overrides once, because importing torch takes seconds.

    The value is the list of environments in which an artifact was scored.
    """
    resolve, known, scored = record_tool.resolve, {}, []

    def once(script, log):
        key = (script, *sorted(log.overrides.items()))
        return known[key] if key in known else known.setdefault(key, resolve(script, log))

    def run_script(script, *arguments, **env):
        scored.extend([env] * ("EVAL_ONLY" in env))
        done = forked.python([script.path, *arguments], env | dict(CUDA_VISIBLE_DEVICES=""))
        if done.returncode:
            raise Refused(done.stderr.strip().splitlines()[-1])
        return done.stdout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_tool, "resolve", once)
        patch.setattr(record_tool, "run_script", run_script)
        yield scored


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory):
    """Three seeds of one small run, in this process."""
    folder = tmp_path_factory.mktemp("seeds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.torch.cuda, "is_available", lambda: False)
        for seed in "123":
            own = dict(SEED=seed, RUN_ID=f"seed{seed}", OUTPUT_DIR=str(folder / seed))
            t.main([], SMOKE | dataset | own | dict(VAL_MAX_TOKENS="300", ITERATIONS="12"))
    return folder


def log_of(folder, seed):
    return folder / seed / "logs" / f"seed{seed}.txt"


@pytest.fixture(scope="module")
def texts(folder):
    return [log_of(folder, seed).read_text() for seed in "123"]


def models(folder):
    return [next((folder / seed).glob("*.int6.ptz")) for seed in "123"]


def facts_of(text):
    return json.loads(text.splitlines()[-1].removeprefix("RESULT "))


def with_facts(text, **changed):
    """The log with these facts in its RESULT line; None removes a fact."""
    facts = {name: value for name, value in (facts_of(text) | changed).items() if value is not None}
    return "\n".join([*text.splitlines()[:-1], f"RESULT {json.dumps(facts)}", ""])


def with_overrides(text, **changed):
    """The log with other overrides; None removes one."""
    overrides = facts_of(text)["overrides"] | changed
    return with_facts(text, overrides={name: value for name, value in overrides.items() if value is not None})


def with_scores(text, change, *stages):
    """The log with change(score) for the score of each stage, or of the given ones."""
    scores = facts_of(text)["scores"]
    return with_facts(text, scores={k: change(v) if k in (stages or scores) else v for k, v in scores.items()})


def as_contest(text, dataset="fineweb10B_sp1024", targets=62_021_849, size=151_080_891, limit=None):
    """The log as if 8 H100 had scored the contest's validation split."""
    ratio = targets / size / math.log(2)
    text = with_scores(
        with_overrides(text, VAL_MAX_TOKENS=limit), lambda score: score | dict(bpb=score["loss"] * ratio)
    )
    versions = facts_of(text)["versions"] | dict(torch="2.9.1+cu128")
    return with_facts(text, dataset=dataset, targets=targets, bytes=size, val_split_targets=targets, versions=versions,
                      device="NVIDIA H100 80GB HBM3", world_size=8)  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Writes texts as logs and returns their paths."""

    def write(texts):
        paths = [tmp_path / f"{i}.txt" for i in range(len(texts))]
        for path, text in zip(paths, texts):
            path.write_text(text)
        return paths

    return write


@pytest.fixture
def record(write, tmp_path):
    """Writes texts as logs and records them; returns the folder, its submission.json and its page."""

    def record(texts, *args):
        path = main([*map(str, write(texts)), *ARGS, "--out", str(tmp_path / "out"), *args])
        return path, json.loads((path / "submission.json").read_text()), (path / "README.md").read_text()

    return record


def refusal(paths, tmp_path, *args):
    """The line with which tools.record refuses these logs; nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refused) as refused:
        main([*map(str, paths), *ARGS, "--out", str(tmp_path / "out"), *args])
    assert sorted(tmp_path.rglob("*")) == before and "\n" not in str(refused.value)
    return str(refused.value)


# ---- What is written.


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """The folder of the three logs, given in another order than their seeds."""
    out = tmp_path_factory.mktemp("out")
    paths = [str(log_of(folder, seed)) for seed in "312"]
    path = main([*paths, *ARGS, "--out", str(out), "--against", "2.9,3.0,3.2"])
    assert path == out / "2026-04-30_Three_seeds"
    return path


@pytest.fixture(scope="module")
def submission(written):
    return json.loads((written / "submission.json").read_text())


@pytest.fixture(scope="module")
def readme(written):
    return (written / "README.md").read_text()


def test_the_folder_holds_what_ran(written):
    files = ["README.md", "requirements.txt", "submission.json", "tiny.model", "train_gpt.py"]
    assert sorted(path.name for path in written.iterdir()) == files + [f"train_seed{seed}.log" for seed in "123"]
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    assert (written / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()
    packages = [re.split("[>=]", line)[0] for line in (written / "requirements.txt").read_text().splitlines()]
    assert packages == ["torch", "numpy", "sentencepiece", "zstandard", "brotli", "tqdm"]


def test_published_logs_are_those_of_the_runs_without_local_folders(written, folder, readme):
    root = str(folder.parents[1])
    for seed in "123":
        original, published = log_of(folder, seed).read_text(), (written / f"train_seed{seed}.log").read_text()
        assert original.count(f"OUTPUT_DIR={folder}/{seed} ") == 1 and original.count(f"log:{folder}/{seed}/logs/") == 1
        expected = re.sub(rf"{folder}/{seed}(?=[/ \"])", "/path/to", original)
        assert published == re.sub(rf"{folder.parent}/(?:\w+/)*", "/path/to/", expected)
        ours, theirs = (logs.read_log(path) for path in (written / f"train_seed{seed}.log", log_of(folder, seed)))
        assert (
            ours.scores == theirs.scores and ours.fingerprint() == theirs.fingerprint() and ours.public() == ours.text
        )
    for path in {*written.iterdir()} - {written / "tiny.model"}:
        assert root not in path.read_text() and not re.search("/home/|/Users/|/root/", path.read_text()), path
    assert "the logs are as the script wrote them, except that `/path/to` replaces local folders" in readme


def test_paths_with_spaces_are_replaced_and_relative_ones_stay(texts, tmp_path):
    own = dict(
        OUTPUT_DIR="/home/ann", DATA_PATH="/home/ann/my data/it", TOKENIZER_PATH="../it.model", ARTIFACT="/é/x.ptz"
    )
    head = "variant: overrides: OUTPUT_DIR=/home/ann DATA_PATH=/home/ann/my data/it ARTIFACT=/é/x.ptz\n"
    text = head + "checkpoint:/home/ann/c.ptz averaging:ema\nartifact:/é/x.ptz log:/home/ann/logs/a b.txt /home/anna\n"
    (path := tmp_path / "log.txt").write_text(text + with_overrides(texts[0], **own).splitlines()[-1] + "\n")
    public = logs.read_log(path).public()
    assert (
        public.splitlines()[0]
        == "variant: overrides: OUTPUT_DIR=/path/to DATA_PATH=/path/to/it ARTIFACT=/path/to/x.ptz"
    )
    assert public.splitlines()[1] == "checkpoint:/path/to/c.ptz averaging:ema"
    assert public.splitlines()[2] == "artifact:/path/to/x.ptz log:/path/to/logs/a b.txt /home/anna"
    told = dict(OUTPUT_DIR="/path/to", DATA_PATH="/path/to/it", TOKENIZER_PATH="../it.model", ARTIFACT="/path/to/x.ptz")
    assert facts_of(public)["overrides"] == facts_of(texts[0])["overrides"] | told | dict(RUN_ID="seed1")


def test_submission_has_the_facts_of_the_logs(submission, folder, texts):
    it, facts = submission, [facts_of(text) for text in texts]
    last = [log["scores"]["legal_ttt"] for log in facts]
    for key, name in (("val_bpb", "bpb"), ("val_loss", "loss")):
        values = [round(score[name], 8) for score in last]
        assert [it["seed_results"][seed][key] for seed in "123"] == values
        assert it[key] == pytest.approx(np.mean(values), abs=5e-9)
        assert it[f"{key}_std"] == pytest.approx(np.std(values, ddof=1), abs=5e-9)
    assert [it["seed_results"][seed]["val_bpb"] for seed in "123"] == [finals(text)["legal_ttt"] for text in texts]
    sizes, code = [path.stat().st_size for path in models(folder)], SCRIPT.stat().st_size
    assert [it["seed_results"][seed]["artifact_bytes"] for seed in "123"] == [code + size for size in sizes]
    assert (it["bytes_code"], it["bytes_total"], it["artifact_bytes_max"]) == (
        code,
        code + max(sizes),
        code + max(sizes),
    )
    assert it["artifact_bytes_mean"] == round(code + np.mean(sizes))
    for seed, log in zip("123", facts):
        result = it["seed_results"][seed]
        assert result["train_wallclock_ms"] == round(1000 * log["train_seconds"]) == 1000 * result["train_time_s"]
        assert result["eval_time_s"] == round(log["eval_seconds"], 3) and result["steps"] == log["steps"] == 12
        assert (
            (result["target_tokens"], result["target_bytes"]) == (log["targets"], log["bytes"]) == (300, log["bytes"])
        )
        assert result["quantized_val_bpb"] == round(log["scores"]["final_int6_roundtrip"]["bpb"], 8)
        assert result["pre_quant_val_bpb"] == round(log["scores"]["averaged"]["bpb"], 4)
        assert it["artifact_sha256"][seed] == log["artifact_sha256"]
    assert it["val_sha256"] == facts[0]["val_sha256"] and it["val_bytes_sha256"] == facts[0]["val_bytes_sha256"]
    assert it["model_params"] == facts[0]["parameters"] and it["seeds"] == [1, 2, 3]
    assert (it["date"], it["name"], it["author"]) == ("2026-04-30", "Three seeds", None)


def test_the_page_has_the_facts_of_the_logs(readme, texts):
    rows = [line.strip("| ").split(" | ") for line in readme.splitlines() if re.match(r"\| (\d|mean|std) \|", line)]
    for row, text in zip(rows, texts):
        facts = facts_of(text)
        bpb = [score["bpb"] for score in facts["scores"].values()]
        assert row[3:8] == [f"{value:.4f}" for value in bpb[:2]] + [f"{value:.8f}" for value in bpb[2:]]
        assert row[1] == "12" and row[9] == f"{facts['code_bytes'] + facts['model_bytes']:,}"
        clocks = [("train_seconds", ".3f"), ("pack_seconds", ".1f"), ("eval_seconds", ".3f")]
        assert row[10:] == [format(facts[name], form) for name, form in clocks]
        assert f"* warning in the log of seed {row[0]}: only 300 of the split's " in readme
    assert [row[0] for row in rows] == ["1", "2", "3", "mean", "std"]
    columns = [[float(row[at].replace(",", "")) for row in rows] for at in (6, 7, 8)]
    for *values, mean, std in columns:
        assert mean == pytest.approx(np.mean(values), abs=1e-8) and std == pytest.approx(
            np.std(values, ddof=1), abs=1e-8
        )
    scores = [finals(text)["legal_ttt"] for text in texts]
    mean, std = statistics.mean(scores), statistics.stdev(scores)
    assert readme.splitlines()[0] == f"# Three seeds: val_bpb {mean:.8f} (std {std:.8f}, 3 seeds)"
    lines = len(re.findall(r"^step:\S+ val_loss:", texts[0], re.M))
    assert f"* validation losses during training: {lines} line(s) in each log\n" in readme
    assert (
        "* score first ttt: @abaybektursun (PR #549)\n" in readme
        and "variant card: 4 layers x 32, 53,748 parameters" in readme
    )


def test_it_claims_no_more_than_the_logs_show(submission, readme):
    track = (
        "1 process(es) on cpu x1, no GPU, not 8xH100 SXM; data set tiny, not the contest's FineWeb; first 300 targets"
    )
    assert submission["track"].startswith(f"non-record: {track}") and f"**Not a record**: {track}" in readme
    assert submission["hardware"] == "1 process(es) on cpu x1, no GPU"
    assert "H100" not in json.dumps({key: value for key, value in submission.items() if key != "track"})
    false = {key for key, holds in submission["compliance"].items() if not holds}
    assert false == {"full_validation_split"} and "whole validation split: NO" in readme
    assert "No artifact was compared with its log (`--artifacts`)" in readme and submission["artifacts_checked"] is None
    commit = submission["commit"]
    assert (f"* commit {commit}, whose" if commit else "* no commit has this `train_gpt.py`") in readme


def command_of(folder, dataset):
    """The settings of the page's command, with the data of this machine."""
    command = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("    "))
    *words, launcher, script = shlex.split(command)
    given = dict(word.split("=", 1) for word in words)
    assert (launcher, script, given["SEED"], "OUTPUT_DIR" in given) == ("python", "train_gpt.py", "1", False)
    assert given["DATA_PATH"] == "/path/to/tiny" and given["TOKENIZER_PATH"] == "tiny.model"
    return given | dict(DATA_PATH=dataset["DATA_PATH"])


def test_a_reviewer_can_run_the_folder_by_its_command(written, readme, tmp_path, texts, dataset):
    copy = shutil.copytree(written, tmp_path / "copy")
    out = run(command_of(copy, dataset), script=copy / "train_gpt.py", cwd=copy).stdout
    assert finals(out) == finals(texts[0])
    artifact = re.search(r"^It writes `(.*?)`\. `EVAL_ONLY=1", readme, re.M)[1]
    assert (copy / artifact).is_file() and f" artifact:{artifact}\n" in out
    assert re.findall(r"train_loss:\S+", out) == re.findall(r"train_loss:\S+", texts[0])


def test_a_record_has_the_track_and_no_excuse(record, texts):
    _, it, readme = record([as_contest(text) for text in texts], "--author", "A. Nonymous")
    assert (
        it["track"] == "10min_16mb" and it["hardware"] == "8x NVIDIA H100 80GB HBM3" and all(it["compliance"].values())
    )
    assert it["author"] == "A. Nonymous" and "Not a record" not in readme
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in readme


def test_the_packed_script_is_shipped_counted_and_runs(record, texts, folder, dataset):
    path, it, readme = record(texts, "--pack")
    shipped, sizes = (path / "train_gpt.py").read_bytes(), [model.stat().st_size for model in models(folder)]
    size, sha256 = len(shipped), hashlib.sha256(shipped).hexdigest()
    assert size < SCRIPT.stat().st_size / 2 and it["bytes_code"] == size and it["bytes_total"] == size + max(sizes)
    assert [result["artifact_bytes"] for result in it["seed_results"].values()] == [size + model for model in sizes]
    plain = f"the {SCRIPT.stat().st_size:,} bytes of sha256 {facts_of(texts[0])['source_sha256']}, packed"
    assert f"`train_gpt.py`: {size:,} bytes, sha256 {sha256}; {plain}\n" in readme
    out = run(command_of(path, dataset), script=path / "train_gpt.py", cwd=path).stdout
    assert (
        finals(out) == finals(texts[0])
        and facts_of(out)["source_sha256"] == sha256
        and facts_of(out)["code_bytes"] == size
    )


def test_a_script_that_was_packed_before_it_ran_is_not_packed_again(record, texts, tmp_path):
    (script := tmp_path / "train_gpt.py").write_bytes(packed := pack.pack_source(SCRIPT.read_bytes()))
    own = dict(source_sha256=hashlib.sha256(packed).hexdigest(), code_bytes=len(packed))
    path, it, readme = record([with_facts(text, **own) for text in texts], "--script", str(script))
    assert (path / "train_gpt.py").read_bytes() == packed and ", packed" not in readme
    assert it["bytes_code"] == len(packed) and "torch>=" in (path / "requirements.txt").read_text()


def test_one_log_and_one_file(texts, tmp_path):
    (tmp_path / "logs").mkdir()
    (log := tmp_path / "logs" / "a.txt").write_text(texts[0])
    out, args = tmp_path / "submission.json", [*ARGS, "--non-record", "--submission-only"]
    assert main([str(log), *args, str(out)]) == out
    it = json.loads(out.read_text())
    assert it["val_bpb"] == finals(texts[0])["legal_ttt"] and it["val_bpb_std"] is None and it["seeds"] == [1]
    assert it["logs"] == ["logs/a.txt"] and "1 seed(s)" in it["track"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "submission.json"]
    main([str(log), *args, str(tmp_path / "other" / "s.json")])
    assert json.loads((tmp_path / "other" / "s.json").read_text()) == it | dict(logs=["a.txt"])  # no local folders
    kept = out.read_bytes()
    log.write_text(texts[0][:-1])
    refusal([log], tmp_path, "--non-record", "--submission-only", str(out))
    assert out.read_bytes() == kept


def test_the_settings_decide_the_attribution(submission):
    assert submission["attribution"]["score_first_ttt"] == "@abaybektursun (PR #549)"
    assert "depth_recurrence" not in submission["attribution"]
    for variant, used, unused in (
        ("pr1812", "depth_recurrence", "smear_gate"),
        ("card", "lora_ttt_of_each_document", "gated_attention"),
        ("pr150", "smear_gate", "shared_value_embedding"),
    ):
        resolved = t.as_env(vars(t.Config.from_env(dict(VARIANT=variant))))
        found = page.attribution(resolved)
        assert used in found and unused not in found
    assert page.attribution(resolved | dict(TTT_EPOCHS="0")).keys() == found.keys() - {"score_first_ttt"}
    source = SCRIPT.read_text()
    for author, off in page.CREDITS.values():
        assert off.keys() <= resolved.keys() and f"PR {author[author.index('#') :].strip('()')}" in source, author


def test_notes_and_gaps(record, write, texts, tmp_path, capsys):
    (notes := tmp_path / "new.md").write_text("\nRows grow.\n")
    _, _, readme = record(texts, "--notes", str(notes), "--author", "A", "--github-id", "a")
    assert "\n## What is new\n\nRows grow.\n\n## Results\n" in readme and capsys.readouterr().err == ""
    one = [str(write(texts)[0]), *ARGS, "--non-record"]
    main([*one, "--submission-only", str(tmp_path / "s.json"), "--author", "A"])
    words = "tools.record: WARNING: not given, so empty in what was written: "
    assert capsys.readouterr().err == f"{words}--github-id\n"
    main([*one, "--out", str(tmp_path / "other")])
    assert capsys.readouterr().err == f"{words}--author, --github-id, --notes\n"
    assert refusal(write(texts), tmp_path, "--name", "b", "--notes", "none.md").startswith(
        "cannot read none.md: No such file"
    )


@pytest.mark.parametrize(
    "name, ships",
    [("mine.model", True), ("fineweb_1024_bpe.model", False), ("fineweb_8192_bpe_lossless_caps.model", False)],
)
def test_only_a_tokenizer_that_is_not_the_contests_is_shipped(
    record, texts, tmp_path, monkeypatch, capsys, name, ships
):
    monkeypatch.setenv("TOKENIZER_PATH", str(tmp_path / name))
    record(texts[:1], "--non-record", "--name", "missing")
    assert (
        f"the folder lacks the tokenizer, because there is no {tmp_path / name}" in capsys.readouterr().err
    ) == ships
    (tmp_path / name).write_bytes(b"pieces")
    path, _, readme = record(texts[:1], "--non-record")
    assert (path / name).is_file() == ships and (f"TOKENIZER_PATH={name} " in readme) == ships


def test_what_was_written_is_printed(record, texts, capsys):
    _, it, _ = record(texts, "--against", "2.9,3.0,3.2")
    lines = capsys.readouterr().out.splitlines()[-8:]
    assert lines[:4] == [f"{key}: {it[key]}" for key in ("val_bpb", "val_bpb_std", "bytes_total", "track")]
    for line, test in zip(lines[4:], it["significance"], strict=True):
        assert line.startswith(f"lower by more than {test['lower_by_more_than']}: t {test['t_statistic']:.3f}, ")
        assert line.endswith(f", p {test['p_value']:.4g}")


# ---- What is refused: changes of one log of three.


def another_seed(text, seed):
    return with_facts(with_overrides(text, SEED=str(seed)), seed=seed)


def on_gpu(build):
    return lambda s: with_facts(
        s, device="NVIDIA H100 80GB HBM3", world_size=8, versions=facts_of(s)["versions"] | dict(torch=build)
    )


def scaled(**factors):
    return lambda s: with_scores(s, lambda it: {k: v * factors.get(k, 1) for k, v in it.items()}, "legal_ttt")


def without_ttt(text):
    return with_facts(text, scores={k: v for k, v in facts_of(text)["scores"].items() if k != "legal_ttt"})


REFUSALS = {
    "another rate": (lambda s: with_overrides(s, MATRIX_LR="0.03"), "MATRIX_LR is 0.03, but the default in .*0.txt"),
    "another value": (lambda s: with_overrides(s, VAL_MAX_TOKENS="301"), "VAL_MAX_TOKENS is 301, but 300 in"),
    "another variant": (lambda s: with_facts(s, variant="demo"), "variant is demo, but card in"),
    "another machine": (lambda s: with_facts(s, device="cpu x2"), "device is cpu x2, but cpu x1 in"),
    "another torch": (lambda s: with_facts(s, versions=facts_of(s)["versions"] | dict(torch="3")), "versions is .*'3'"),
    "another text": (lambda s: with_facts(s, dataset="huge"), "dataset is huge, but tiny in"),
    "the seed of another": (lambda s: another_seed(s, 1), "its seed 1 is also that of .*0.txt"),
    "another script": (lambda s: with_facts(s, source_sha256="0" * 64), "source_sha256 is 0000.*, but [0-9a-f]{64} in"),
    "an unknown option": (lambda s: s.replace('"ITERATIONS"', '"LD_PRELOAD"'), "ITERATIONS is the default, but 12 in"),
    "a GPU beside a CPU build of torch": (
        on_gpu("2.9.1+cpu"),
        "H100 80GB HBM3, but torch 2.9.1\\+cpu is no CUDA build",
    ),
    "a GPU beside a torch of no build": (on_gpu("2.9.1"), "but torch 2.9.1 is no CUDA build"),
    "another validation text": (
        lambda s: with_facts(s, val_sha256="1" * 64),
        "val_sha256 is 1111.*, but [0-9a-f]{64} in",
    ),
    "other parameters": (lambda s: with_facts(s, parameters=9), "parameters is 9, but 53748 in .*0.txt"),
    "a long training": (lambda s: with_facts(s, train_seconds=601.0), "train_seconds is 601.000, over 600"),
    "a long evaluation": (lambda s: with_facts(s, eval_seconds=600.001), "eval_seconds is 600.001, over 600"),
    "a large model": (lambda s: with_facts(s, model_bytes=15_999_999), "bytes, \\d+ over 16000000"),
    "a better score": (scaled(bpb=1 - 1e-8), "the bpb of legal_ttt is .*, but its loss, targets and bytes give"),
    "a better loss": (scaled(loss=1 - 1e-8), "the bpb of legal_ttt is .*, but its loss, targets and bytes give"),
    "more bytes": (
        lambda s: with_facts(s, bytes=facts_of(s)["bytes"] + 1),
        "the bpb of raw is .*but its loss, targets",
    ),
    "other stages": (
        lambda s: s.replace('"final_int6_sliding', '"final_int8_sliding'),
        "its stages are raw, averaged, ",
    ),
    "two logs": (lambda s: s + s, "it is not the last line and the only one"),
    "a line after the last": (lambda s: s + "note:fine\n", "it is not the last line and the only one"),
    "a cut last line": (lambda s: s[:-1], "it is not the last line and the only one"),
    "two curves": (lambda s: s.replace("step:5/", "step:3/"), "step 3 comes after step 4; give the log of one run"),
    "a missing fact": (lambda s: with_facts(s, dataset=None), "is not that of a training run: 'dataset'"),
    "resumed": (lambda s: with_facts(s, resumed="state", parts=[[4, 1.5]]), "the run was resumed"),
    "no RESULT": (lambda s: s[: s.index("RESULT")], "no RESULT line ends the log"),
    "no facts": (lambda s: s[: s.index("RESULT")] + "RESULT {}\n", "its RESULT line cannot be used \\('scores'\\)"),
    "no JSON": (lambda s: s.replace("RESULT {", "RESULT "), "its RESULT line cannot be used"),
    "brackets": (lambda s: s[: s.index("RESULT")] + f"RESULT {'[' * 99_999}\n", "its RESULT line cannot be used"),
    "text for a number": (lambda s: with_facts(s, seed="2"), "not that of a training run: .*'str'"),
    "NaN": (lambda s: with_facts(s, eval_seconds=math.nan), "eval_seconds is nan, not a finite number of 0 or more"),
    "no bytes": (lambda s: with_facts(s, bytes=0), "not that of a training run: .*division"),
    "a number for text": (lambda s: with_facts(s, overrides=dict(SEED=2)), "not that of a training run: .*str"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_log_that_does_not_fit_is_refused(write, texts, tmp_path, case):
    mutate, words = REFUSALS[case]
    changed = mutate(texts[1])
    message = refusal(write([texts[0], changed, texts[2]]), tmp_path)
    assert changed != texts[1] and message.startswith(f"{tmp_path / '1.txt'}: ") and re.search(words, message), message


def test_what_is_no_log(write, texts, folder, dataset, tmp_path, monkeypatch):
    paths = write([texts[0], ""])
    assert refusal(paths, tmp_path) == f"{paths[1]} has no training step and no score; give a log of train_gpt.py"
    paths[1].write_bytes(b"\xff" + texts[1].encode())
    assert refusal(paths, tmp_path) == f"cannot read {paths[1]}: not UTF-8 text"
    none = tmp_path / "none.txt"
    assert refusal([none], tmp_path) == f"cannot read {none}: No such file or directory"
    assert refusal([], tmp_path) == "give the logs, one for each seed"
    assert "no RESULT line ends the log" in refusal([ROOT / "logs" / "five" / "card-1.txt"], tmp_path)
    monkeypatch.setattr(t.torch.cuda, "is_available", lambda: False)
    own = dict(
        EVAL_ONLY="1", ARTIFACT=str(models(folder)[0]), RUN_ID="again", OUTPUT_DIR=str(tmp_path), VAL_MAX_TOKENS="300"
    )
    t.main([], {name: value for name, value in dataset.items() if name != "VOCAB_SIZE"} | own)
    path = tmp_path / "logs" / "again.txt"
    assert finals(path.read_text()) == finals(texts[0]) and "is not that of a training run: " in refusal(
        [path], tmp_path
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_log_cut_anywhere_is_refused(texts, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_text(texts[0][: data.draw(st.integers(0, len(texts[0]) - 1))])
    with pytest.raises(Refused, match=rf"^{path}(:| has no training step)"):
        logs.read_log(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s,
        lambda s: with_scores(s, lambda it: {k: v * (1 + 1e-3) for k, v in it.items()}),
        lambda s: with_facts(with_scores(s, lambda it: it | dict(seconds=1.25)), train_seconds=99.5, eval_seconds=98.5),
        lambda s: re.sub(r"(train_loss:\d\.)\d+", r"\g<1>1234", s),
    ],
    ids=["seed", "scores", "clocks", "losses"],
)
def test_a_copy_of_a_log_under_another_seed_is_refused(write, texts, tmp_path, change):
    """Also if all scores, all clocks or all losses of steps are changed: what is left is more than chance."""
    paths = write([texts[0], texts[1], another_seed(change(texts[1]), 9)])
    message = refusal(paths, tmp_path)
    assert message.startswith(f"{paths[2]}: ") and f"are exactly those of {paths[1]}; run each seed" in message


def test_one_number_that_two_logs_share_is_chance(record, write, texts, tmp_path):
    shared = facts_of(texts[0])["train_seconds"]
    others = [re.sub(r"train_time:\d+ms", f"train_time:{i}ms", text) for i, text in enumerate(texts)]
    others = [with_facts(text, pack_seconds=i + 0.5) for i, text in enumerate(others)]
    record([others[0], with_facts(others[1], train_seconds=shared), others[2]])
    both = [with_facts(others[0], pack_seconds=9.5), with_facts(others[1], train_seconds=shared, pack_seconds=9.5)]
    assert "2 losses, times or steps are exactly" in refusal(write([*both, others[2]]), tmp_path, "--name", "b")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--date", "30.4.2026"], "must be a day like"),
        (["--date", "20260430"], "must be a day like"),
        (["--date", "2026-13-30"], "must be a day like"),
        (["--name", "//"], "--name is needed"),
        (["--against", "2136"], "give two or more scores"),
        (["--against", "1.08"], "give two or more scores"),
        (["--script", "none.py"], "cannot read none.py"),
    ],
)
def test_arguments_that_make_no_sense(write, texts, tmp_path, args, words):
    assert words in refusal(write(texts), tmp_path, *args)


def test_a_folder_that_exists_is_left_alone(write, texts, tmp_path):
    (tmp_path / "out" / "2026-04-30_Three_seeds").mkdir(parents=True)
    assert "exists; choose another" in refusal(write(texts), tmp_path)


def test_two_seeds_are_no_record(record, write, texts, tmp_path):
    assert refusal(write(texts[:2]), tmp_path).startswith("2 seed(s), but a record needs 3")
    assert record(texts[:2], "--non-record")[1]["seeds"] == [1, 2]


def test_only_options_of_the_script_reach_its_environment(write, texts, tmp_path):
    script = tmp_path / "script.py"

    def refused(printed, *overrides):
        script.write_text(
            "import os, sys\nclass Config:\n    variant: str = ''\n    tund_lr: float = 0\n"
            f"if 'TUND_LR' in os.environ: sys.exit('script.py: TUND_LR is not an option')\nprint('{printed}')\n"
        )
        told = dict.fromkeys(overrides, "1") | {"VARIANT": "card"}
        sha256 = hashlib.sha256(script.read_bytes()).hexdigest()
        paths = write([with_facts(text, source_sha256=sha256, overrides=told) for text in texts])
        return refusal(paths, tmp_path, "--script", str(script))

    for name in ("TUNED_LR", "LD_PRELOAD", "PATH", "VARIAN", "VARIANT.*"):
        assert refused("", name).startswith(f"{tmp_path / '0.txt'}: {name} is no option of {script}")
    assert refused("", "TUND_LR") == "script.py: TUND_LR is not an option"
    assert f"{script} --describe prints no model_params" in refused("VARIANT=card\\njunk")


def test_a_script_runs_with_its_options_only(tmp_path, monkeypatch):
    (path := tmp_path / "script.py").write_text(
        "import os, sys\nprint(sys.argv[1:], {**os.environ})\nsys.exit(os.environ.get('SEED'))"
    )
    monkeypatch.setenv("MATRIX_LR", "9")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    source = page.Source(path, b"", "", False)
    out = RUN_SCRIPT(source, "--describe", VARIANT="card")
    assert out.startswith("['--describe'] {") and "'VARIANT': 'card'" in out and "'OMP_NUM_THREADS': '3'" in out
    assert "MATRIX_LR" not in out
    with pytest.raises(Refused, match=f"^{path} --describe: no such seed$"):
        RUN_SCRIPT(source, "--describe", SEED="no such seed")


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(size=151_080_891 * 4 // 3),
            "3.247907 bytes each, but fineweb10B_sp1024 has 62021632 to 62023679 of 2.435930",
        ),
        (dict(targets=62_021_631, size=151_080_360), "62021631 targets, .*has 62021632 to"),
        (
            dict(dataset="fineweb10B_sp8192"),
            "2.435930 bytes each, but fineweb10B_sp8192 has 40540802 to 40540802 of 3.7266",
        ),
    ],
)
def test_bytes_that_are_not_those_of_the_contest(write, texts, tmp_path, changes, words):
    paths = write([as_contest(text, **changes) for text in texts])
    message = refusal(paths, tmp_path)
    assert message.startswith(f"{paths[0]}: ") and re.search(words, message), message


def counting(text, sha256):
    return with_facts(text, val_bytes_sha256=sha256)


def test_logs_that_count_other_bytes_for_the_same_tokens_are_not_combined(record, write, texts, tmp_path):
    """tools.record and tools.table; a log without the hash is accepted."""
    paths = write([counting(text, digit * 64) for text, digit in zip(texts, "121")])
    words = f"{paths[0]} and {paths[1]} score the same tokens but count different bytes for them (val_bytes_sha256)"
    assert refusal(paths, tmp_path).startswith(words) and words in tool("tools.table", *paths).stderr
    _, it, readme = record([counting(texts[0], "1" * 64), counting(texts[1], None), counting(texts[2], "1" * 64)])
    assert "sha256 of the validation tokens, in all logs: " in readme


def test_older_logs_are_read_without_the_facts_that_they_lack(record, texts):
    texts = [with_facts(text, **dict.fromkeys(logs.OLDER)) for text in texts]
    _, it, readme = record(texts)
    assert not it.keys() & {"val_sha256", "val_bytes_sha256", "artifact_sha256"} and "sha256 of the" not in readme


# ---- What is claimed.


@pytest.fixture
def contest(write, texts, tmp_path):
    """The entry of three logs that make a record."""
    paths = write([as_contest(text) for text in texts])
    return record_tool.gather(parse_options([*map(str, paths), *ARGS]), tmp_path)


def each(**changed):
    return lambda it: dataclasses.replace(it, runs=tuple(logs.RunLog(**vars(run) | changed) for run in it.runs))


def last(**changed):
    """A change of the last seed only."""
    return lambda it: dataclasses.replace(it, runs=(*it.runs[:-1], logs.RunLog(**vars(it.runs[-1]) | changed)))


def setting(**changed):
    return lambda it: dataclasses.replace(it, settings=it.settings | changed)


def no_ttt(it):
    return each(scores={stage: score for stage, score in it.first.scores.items() if stage != "ttt"})(it)


FALSE = {  # a change of a record's runs, and the claims that it makes false
    "a large model": (last(total_bytes=16_000_001), {"artifact_under_16mb"}),
    "a long training": (last(train_seconds=600.001), {"train_under_600s"}),
    "a training over its limit by less than a millisecond": (
        lambda it: setting(MAX_WALLCLOCK_SECONDS="600.0")(last(train_over_limit_seconds=4e-4, train_seconds=600.0)(it)),
        {"train_under_600s"},
    ),
    "a long evaluation": (last(eval_seconds=600.001), {"eval_under_600s"}),
    "two seeds": (lambda it: dataclasses.replace(it, runs=it.runs[:2]), {"three_seeds"}),
    "a limit of targets": (setting(VAL_MAX_TOKENS="62021849"), {"full_validation_split"}),
    "fewer targets than the split has": (each(val_split_targets=62_021_850), {"full_validation_split"}),
    "fewer targets than the contest's split": (each(targets=62_021_631), {"full_validation_split"}),
    "another text": (each(dataset="tiny"), {"full_validation_split"}),
    "no test-time training": (no_ttt, {"score_first_ttt"}),
    "another source": (
        lambda it: dataclasses.replace(it, source=it.source._replace(is_ours=False)),
        {"score_first_ttt", "no_slot", "no_pre_quant_ttt", "no_etlb", "no_ngram_cache"},
    ),
}


@pytest.mark.parametrize("case", FALSE)
def test_each_claim_is_reported_false_where_it_does_not_hold(contest, case):
    """The other claims stay true; none is true by default."""
    change, false = FALSE[case]
    assert all(contest.compliance().values()) and not contest.why_no_record()
    changed = change(contest)
    assert {name for name, holds in changed.compliance().items() if not holds} == false
    assert {name for _, names in FALSE.values() for name in names} == contest.compliance().keys()
    text, whole = (page.readme(it, {}, "").decode() for it in (changed, contest))
    assert not re.search(r"\bNO\b", whole) and len(re.findall(r"\bNO\b", text)) == len(false)


@pytest.mark.parametrize("over, limit, holds", [(0.5, "600.0", False), (0.5, "599.0", True), (0.0, "600.0", True)])
def test_a_limit_of_600_s_or_more_must_be_met(record, write, texts, tmp_path, over, limit, holds):
    logs = [with_overrides(as_contest(text), MAX_WALLCLOCK_SECONDS=limit) for text in texts]
    logs[2] = with_facts(logs[2], train_over_limit_seconds=over)
    if not holds:
        assert "train_seconds is" in refusal(write(logs), tmp_path)
    _, it, readme = record(logs, "--non-record")
    assert it["compliance"]["train_under_600s"] == holds
    assert (f"training time beyond the run's own limit: {over:.3f} s" in readme) == (over > 0)


def test_fewer_targets_than_the_split_has_are_no_full_split(record, texts):
    _, it, readme = record([with_facts(as_contest(text), val_split_targets=62_021_850) for text in texts])
    assert not it["compliance"]["full_validation_split"]
    assert it["track"] == "non-record: first 62,021,849 targets of the validation text"
    assert "targets of the whole validation split: 62,021,850" in readme


def test_a_file_that_exactly_fills_the_cap_is_within_it(record, write, texts, tmp_path):
    room = 16_000_000 - SCRIPT.stat().st_size
    path, it, readme = record([texts[0], with_facts(texts[1], model_bytes=room), texts[2]])
    assert it["bytes_total"] == 16_000_000 and it["compliance"]["artifact_under_16mb"] and ", 0 to spare" in readme
    assert logs.read_log(path / "train_seed2.log").total_bytes == 16_000_000
    paths = write([texts[0], with_facts(texts[1], model_bytes=room + 1), texts[2]])
    assert "bytes, 1 over 16000000" in refusal(paths, tmp_path, "--name", "b")


def test_a_log_of_a_committed_script_finds_its_commit(tmp_path, monkeypatch):
    """The committed source is shipped, counted and asked for the settings, whatever train_gpt.py is today."""
    monkeypatch.chdir(tmp_path)
    log = logs.read_log(ROOT / "logs" / "2026-11-22_demo.txt")
    if not record_tool.committed(log.source_sha256)[0]:
        pytest.skip("this checkout has no history")
    found = record_tool.find_source(None, log, tmp_path / "source")
    assert found.commit.startswith("ac428ac") and found.is_ours and found.path.parent == tmp_path / "source"
    assert hashlib.sha256(found.contents).hexdigest() == log.source_sha256
    assert len(found.contents) == log.code_bytes == found.path.stat().st_size
    (tmp_path / "train_gpt.py").write_bytes(pack.pack_source(b"x = 1\n"))
    with pytest.raises(Refused, match="no commit here has it"):
        record_tool.find_source(None, logs.RunLog(**vars(log) | dict(source_sha256="1" * 64)), tmp_path)
    script = hashlib.sha256((tmp_path / "train_gpt.py").read_bytes()).hexdigest()
    assert not record_tool.find_source(None, logs.RunLog(**vars(log) | dict(source_sha256=script)), tmp_path).is_ours


# ---- Artifacts.


def test_artifacts_are_compared_and_scored_again(record, texts, folder, scripts):
    """In the order of the logs, whatever their seeds."""
    files = [*map(str, models(folder)[::-1])]
    _, it, readme = record(texts[::-1], "--artifacts", *files)
    assert [env["ARTIFACT"] for env in scripts[-3:]] == files and scripts[-1]["VAL_MAX_TOKENS"] == "300"
    for seed, log, model in zip("123", texts, models(folder)):
        row = next(line for line in readme.splitlines() if line.startswith(f"| {seed} | `"))
        again = float(re.search(r"\| as in the log \| 1 x cpu x1, torch \S+ \| ([\d.]+) \| ", row)[1])
        assert again == pytest.approx(finals(log)["legal_ttt"], abs=2e-6)  # another process may round otherwise
        assert hashlib.sha256(model.read_bytes()).hexdigest() in row
        checked = it["artifacts_checked"][seed]
        assert checked["size_and_sha256_agree"] and checked["not_scored_because"] is None
        assert checked["val_bpb_again"] == pytest.approx(again, abs=1e-8)


def half_bpb(text):
    """Twice the bytes, so that the same losses are half the bits per byte."""
    text = with_scores(text, lambda it: it | dict(bpb=it["bpb"] / 2))
    return with_facts(text, bytes=2 * facts_of(text)["bytes"])


ARTIFACT_FAULTS = {
    "all scores halved": (
        lambda s: with_scores(s, lambda it: it | dict(loss=it["loss"] / 2, bpb=it["bpb"] / 2)),
        r"scored again, has \d\.\d{8} bits per byte in coded, but \d\.\d{8} in .*1.txt",
    ),
    "another size": (
        lambda s: with_facts(s, model_bytes=facts_of(s)["model_bytes"] - 1),
        r"int6.ptz: model_bytes is \d+, but \d+ in .*1.txt; give this log's artifact",
    ),
    "twice the bytes of text": (half_bpb, r"scored again, has bytes \d+, but \d+ in .*1.txt"),
    "another hash": (lambda s: with_facts(s, artifact_sha256="1" * 64), "artifact_sha256 is .*, but 1111.* in .*1.txt"),
    "no hash": (lambda s: with_facts(s, artifact_sha256=None), "artifact_sha256 is .*, but missing in .*1.txt"),
    "no test-time training": (without_ttt, r"has \d\.\d{8} bits per byte in ttt, but nan in .*1.txt"),
}


@pytest.mark.parametrize("case", ARTIFACT_FAULTS)
def test_a_log_that_its_artifact_does_not_support_is_refused(record, write, texts, folder, tmp_path, case):
    """Each log agrees with itself and is accepted without --artifacts."""
    mutate, words = ARTIFACT_FAULTS[case]
    record([mutate(texts[1])], "--non-record")
    (tmp_path / "1.txt").write_text(mutate(texts[1]))
    args = ["--name", "b", "--non-record", "--artifacts", str(models(folder)[1])]
    message = refusal([tmp_path / "1.txt"], tmp_path, *args)
    assert re.search(words, message), message


@pytest.mark.parametrize("files, words", [(["none"], "cannot read none"), (["a", "b"], "2 --artifacts for 1 logs")])
def test_artifacts_that_are_not_those_of_the_logs(write, texts, tmp_path, files, words):
    assert words in refusal(write(texts[:1]), tmp_path, "--non-record", "--artifacts", *files)


@pytest.mark.parametrize("why", ["DATA_PATH", "TOKENIZER_PATH", "--no-rescore"])
def test_the_page_says_why_an_artifact_was_not_scored_again(record, texts, folder, tmp_path, monkeypatch, scripts, why):
    """The environment of the command names the data and the tokenizer."""
    count, given = len(scripts), why.startswith("--")
    if not given:
        monkeypatch.setenv(why, str(tmp_path / "none"))
    _, it, readme = record(texts[:1], "--non-record", "--artifacts", str(models(folder)[0]), *[why] * given)
    reason = why if given else f"no {why}=/path/to/none here"
    assert f"| as in the log | no: {reason} | - | - |" in readme and len(scripts) == count
    assert it["artifacts_checked"]["1"]["val_bpb_again"] is None


# ---- Significance.


def tail(t, df):
    """P(T > t) of Student's distribution, by integrating its density over v = tan u from 0 to t."""
    u = np.linspace(0, math.atan(abs(t)), 20_001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + np.tan(u) ** 2 / df) ** (-(df + 1) / 2) / np.cos(u) ** 2
    return 0.5 - math.copysign(float((density[1:] + density[:-1]) @ np.diff(u)) / 2, t)


def welch(new, old, margin):
    """t, degrees of freedom and p by the textbook formulas."""
    a, b = (np.var(v, ddof=1) / len(v) for v in (new, old))
    t = (np.mean(old) - np.mean(new) - margin) / math.sqrt(a + b)
    df = (a + b) ** 2 / (a**2 / (len(new) - 1) + b**2 / (len(old) - 1))
    return t, df, tail(t, df)


def numbers(test):
    return test["t_statistic"], test["welch_df"], test["p_value"]


SCORES = st.lists(st.integers(0, 2000).map(lambda n: 1.05 + n * 1e-5), min_size=2, max_size=5, unique=True)


@settings(deadline=None, max_examples=40)
@given(SCORES, SCORES)
def test_welch_by_an_independent_computation(ours, theirs):
    margins = [0, 0.005 / (2.5 * math.log(2)), 0.005, 0.005 / math.log(2)]
    for test, margin in zip(page.welch(ours, tuple(theirs), 2.5), margins, strict=True):
        assert test["margin_bpb"] == pytest.approx(margin)
        assert numbers(test) == pytest.approx(welch(ours, theirs, margin), rel=1e-3, abs=1e-5)


def test_the_readings_of_the_rules():
    """0.005 nats per token are 0.002961 bpb on sp1024 and 0.001936 on sp8192; per byte they are 0.007213."""
    for ratio, want in ((2.435930, 0.002961), (3.726631, 0.001936)):
        tests = page.welch([1.0, 1.001], (1.1, 1.2), ratio)
        assert [round(test["margin_bpb"], 6) for test in tests] == [0.0, want, 0.005, 0.007213]
    assert statistics.mean(page.RECORDS["2135"]) == pytest.approx(1.05650768, abs=5e-9)
    assert statistics.stdev(page.RECORDS["2135"]) == pytest.approx(0.000356, abs=5e-7)


def test_significance_is_written(submission, readme, texts):
    ours, ratio = [finals(text)["legal_ttt"] for text in texts], submission["seed_results"]["1"]["target_bytes"] / 300
    margins = (0, 0.005 / math.log(2) / ratio, 0.005, 0.005 / math.log(2))
    for test, margin in zip(submission["significance"], margins, strict=True):
        assert numbers(test) == pytest.approx(welch(ours, [2.9, 3.0, 3.2], margin), rel=1e-3, abs=1e-5)
        assert f"| {test['t_statistic']:.3f} | {test['welch_df']:.2f} | {test['p_value']:.4g} |" in readme
    assert "scores given by hand: 2.9, 3.0, 3.2 (mean 3.03333333, std 0.15275252)" in readme
    assert submission["against"] == "scores given by hand" and "it is not known whether" in submission["against_text"]


def test_one_seed_proves_nothing(write, texts, tmp_path):
    words = "one number has no spread"
    assert words in refusal(write(texts[:1]), tmp_path, "--non-record", "--against", "1.08,1.09")


def test_a_record_is_only_compared_with_scores_of_its_text(record, write, texts, tmp_path):
    for scores in ("2135", "1.05679341,1.05662016"):
        words = f"--against {scores}: it is scored on the contest's whole validation split, not on tiny, "
        assert refusal(write(texts), tmp_path, "--against", scores).startswith(words)
    _, it, readme = record([as_contest(text) for text in texts], "--against", "#2135")
    assert "against PR #2135: 1.05679341, 1.05662016, 1.05610947 (mean 1.05650768" in readme
    assert it["against_text"] == "both are scored on the contest's whole validation split"


# ---- Other readers of logs, and retraction.


def test_a_table_has_the_same_numbers_with_and_without_a_result(texts, tmp_path):
    paths = [tmp_path / name for name in ("new.txt", "old.txt")]
    for path, text in zip(paths, (texts[0], texts[0][: texts[0].index("RESULT")])):
        path.write_text(text)
    new, old = map(table.read, paths)
    assert table.table([new]) == table.table([old]) and new.points == old.points
    assert {stage: score[:2] for stage, score in new.scores.items()} == {k: v[:2] for k, v in old.scores.items()}
    paths[0].write_text(with_facts(texts[0], bytes=1))
    with pytest.raises(Refused, match="but its loss, targets and bytes give"):
        table.read(paths[0])


def test_a_retracted_score_is_null_and_kept(written, submission, readme, tmp_path):
    folder = shutil.copytree(written, tmp_path / "f")
    value = submission["val_bpb"]
    assert main(["--retract", str(folder), "--reason", "The text was seen before."]) == folder
    status = dict(
        val_bpb=None, val_bpb_retracted=value, status="retracted", retraction_reason="The text was seen before."
    )
    assert json.loads((folder / "submission.json").read_text()) == submission | status
    text = (folder / "README.md").read_text()
    assert text.startswith(f"> **Retracted: {value} bits per byte") and text.endswith(readme)
    assert "The text was seen before." in text.splitlines()[0]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Refused, match="that is not retracted yet"):
        main(["--retract", str(folder)])
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Refused, match="takes a folder and no logs"):
        main(["--retract", str(written), "a.txt"])


@pytest.mark.parametrize(
    "text, words", [(None, "^cannot read"), ("{", "is not JSON"), ("[]", "has no number as val_bpb")]
)
def test_only_a_folder_of_this_tool_can_be_retracted(tmp_path, text, words):
    (tmp_path / "README.md").write_text("page")
    if text is not None:
        (tmp_path / "submission.json").write_text(text)
    with pytest.raises(Refused, match=words):
        main(["--retract", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == "page"


def test_the_command_ends_in_one_line_and_an_exit_status(tmp_path):
    done = tool("tools.record", Path(tmp_path, "none"), *ARGS)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"tools.record: cannot read {tmp_path / 'none'}: No such file or directory\n"
