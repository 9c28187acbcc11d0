"""Runs that stop and go on: what the state holds, that the end is the same, and what is refused."""

import json
import os
import pickle
import random
import re
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, finals, run, unpacked
from helpers.smoke import SMOKE
from helpers.twins import trainer_of

import train_gpt as t

BUILT_IN = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
STEP = "        reading = trainer.step(scale,"  # of the loop of `train`
BASE = SMOKE | dict(MAX_WALLCLOCK_SECONDS="0", TRAIN_BATCH_TOKENS="128", WARMUP_STEPS="0", TTT_EPOCHS="0", EVAL_STRIDE="32", VAL_LOSS_EVERY="0",
                    VAL_MAX_TOKENS="100", RUN_ID="test")
# the sequence length changes at step 3, looping starts at step 6, late QAT at step 9; SWA takes a snapshot every second step
WHOLE = BASE | dict(ITERATIONS="12", EARLY_SEQ_LENS="16", EARLY_SEQ_ENDS="0.25", NUM_LOOPS="1", LOOP_START="1", LOOP_END="2", ENABLE_LOOPING_AT="0.5",
                    WARMDOWN_ITERS="6", LATE_QAT_THRESHOLD="0.6", AVERAGING="swa", SWA_EVERY="2", SWA_START_SCALE="2", LOADER="shuffled", QUANTIZER="gptq",
                    GPTQ_CALIBRATION_BATCHES="2")
SHORT = BASE | dict(ITERATIONS="8", LATE_QAT_THRESHOLD="0", CHECKPOINT_EVERY="4")


@pytest.fixture(autouse=True)
def handlers():
    """A run in this process sets handlers of signals."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def live_tensors(trainer):
    """Copies of all tensors that the next step depends on, by the names of the parameters."""
    adam, found = trainer.optimizers.adam.state, dict(trainer.average.values)
    for name, p in trainer.model.named_parameters():
        found |= {f"raw {name}": p.detach()} | {f"{name} {key}": value for key, value in adam.get(p, {}).items()}
    found |= {f"momentum {i}": group["buffer"] for i, group in enumerate(trainer.optimizers.muon.param_groups)}
    return {name: tensor.clone() for name, tensor in found.items()}


def recorded(settings, folder, kind="state"):
    """A whole run in this process. Returns its artifact and, by step, each file of `kind` that it wrote and its live tensors then."""
    files, tensors, trainers = {}, {}, []
    publish, init = t.publish, t.Trainer.__init__

    def keep(path, *rest):
        publish(path, *rest)
        if path == folder / f"test.{kind}.ptz":
            step = trainers[-1].parts[-1][0]
            files[step], tensors[step] = path.read_bytes(), live_tensors(trainers[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Trainer, "__init__", lambda trainer, *args: trainers.append(trainer) or init(trainer, *args))
        patch.setattr(t, "publish", keep)
        t.main([], settings | dict(OUTPUT_DIR=str(folder)))
    return (folder / "test.int6.ptz").read_bytes(), files, tensors


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """(settings, artifact, states by step, live tensors by step) of a run that saves its state before each step."""
    settings = dataset | WHOLE
    return settings, *recorded(settings | dict(CHECKPOINT_EVERY="1"), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def short(dataset, tmp_path_factory):
    """(settings, folder) of a finished run of eight steps that saved its state and average at step 4."""
    settings, folder = dataset | SHORT, tmp_path_factory.mktemp("short")
    t.main([], settings | dict(OUTPUT_DIR=str(folder)))
    return settings, folder


def continued(blob, folder, environment, kind="state"):
    """The environment of a run that continues from the bytes of a checkpoint in a new folder."""
    (folder / f"test.{kind}.ptz").write_bytes(blob)
    paths = {name: environment[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    return paths | dict(OUTPUT_DIR=str(folder), RUN_ID="test", RESUME="1")


def config_of(environment):
    """The options with which a run would go on."""
    return t.resolve(environment)[0]


def result(folder):
    return json.loads((folder / "logs" / "test.txt").read_text().splitlines()[-1].removeprefix("RESULT "))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != "logs"}


# ---- the end is the same

@pytest.mark.parametrize("step", [2, 4, 7, 10])
def test_a_resumed_run_ends_with_the_same_artifact(whole, tmp_path, step):
    """From before and after a change of sequence length, the start of looping and of late QAT. All options come from the file."""
    settings, artifact, files, _ = whole
    t.main([], continued(files[step], tmp_path, settings))
    assert (tmp_path / "test.int6.ptz").read_bytes() == artifact
    facts, text = result(tmp_path), (tmp_path / "logs" / "test.txt").read_text()
    assert facts["resumed"] == "state" and facts["steps"] == 12 and [steps for steps, _ in facts["parts"]] == [step]
    assert re.search(rf"^resumed:state parts:\[\[{step}, ", text, re.M) and f"step:{step}/" not in text and f"step:{step + 1}/12 " in text + "step:11/12 "


@pytest.mark.parametrize("step", [2, 4, 7, 10])
def test_a_state_has_all_that_the_next_step_depends_on(whole, tmp_path, step):
    settings, _, files, tensors = whole
    cfg = config_of(continued(files[step], tmp_path, settings))
    trainer, plain = trainer_of(cfg), trainer_of(cfg)
    t.load_checkpoint(trainer, "state")
    loaded = live_tensors(trainer)
    assert loaded.keys() == tensors[step].keys() and all(torch.equal(loaded[name], x) for name, x in tensors[step].items())
    for kind in ("momentum", "exp_avg", "exp_avg_sq"):
        assert any(kind in name and x.any() for name, x in loaded.items()), kind
    assert trainer.average.count == step // 2 and trainer.looped == (step > 6)
    plain.batches.seek(step, trainer.batches.seq_len)
    assert trainer.batches.step == step and all(torch.equal(x, y) for x, y in zip(next(trainer.batches), next(plain.batches)))


def test_a_resumed_run_may_stop_again_and_warms_up_without_effect(whole, tmp_path):
    """Twice resumed, the first time after two warm-up steps for each graph."""
    settings, artifact, files, tensors = whole
    folders = [tmp_path / name for name in ("second", "third")]
    for folder in folders:
        folder.mkdir()
    again, states, live = recorded(continued(files[4], folders[0], settings) | dict(WARMUP_STEPS="2", CHECKPOINT_EVERY="8"), folders[0])
    assert again == artifact and [*states] == [8] and all(torch.equal(live[8][name], x) for name, x in tensors[8].items())
    t.main([], continued(states[8], folders[1], settings))
    assert (folders[1] / "test.int6.ptz").read_bytes() == artifact
    assert [steps for steps, _ in result(folders[1])["parts"]] == [4, 8]


def test_a_run_of_one_rank_goes_on_with_two_and_then_with_one(short, tmp_path):
    """The losses are those of one rank."""
    settings, folder = short
    environment = continued((folder / "test.state.ptz").read_bytes(), tmp_path, settings)
    run(environment | dict(CHECKPOINT_EVERY="2"), processes=2)
    two = (tmp_path / "logs" / "test.txt").read_text()
    t.main([], environment)  # from step 6
    last = (tmp_path / "logs" / "test.txt").read_text().removeprefix(two)
    expected, *found = ([float(x) for x in re.findall(r"^step:[5-8]/8 train_loss:(\S+)", text, re.M)]
                        for text in ((folder / "logs" / "test.txt").read_text(), two, last))
    assert "world_size:2 " in two and "world_size:1 " in last and len(expected) == 4
    assert found[0] == pytest.approx(expected, abs=1.01e-4) and found[1] == pytest.approx(expected[2:], abs=1.01e-4)  # printed with four digits


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_two_bit_for_bit_and_with_one(env, tmp_path):
    settings, artifacts = env | WHOLE | dict(CHECKPOINT_EVERY="7", OUTPUT_DIR=str(tmp_path)), {}
    run(settings, processes=2)
    state, artifact = ((tmp_path / f"test.{kind}.ptz").read_bytes() for kind in ("state", "int6"))
    for count in (2, 1):
        (folder := tmp_path / str(count)).mkdir()
        run(continued(state, folder, settings), processes=count)
        artifacts[count] = (folder / "test.int6.ptz").read_bytes()
    assert artifacts[2] == artifact
    scores = [json.loads((folder / "logs" / "test.txt").read_text().splitlines()[-1].removeprefix("RESULT "))["scores"]["raw"]["loss"]
              for folder in (tmp_path, tmp_path / "1")]
    assert scores[1] == pytest.approx(scores[0], abs=1e-2)  # late QAT rounds, which magnifies the last bit


def test_a_run_that_is_told_to_end_leaves_its_state_and_average_and_goes_on(whole, tmp_path):
    settings, artifact, _, tensors = whole
    (script := tmp_path / "train_gpt.py").write_text(BUILT_IN.replace(STEP, f"        if step == 7: signal.raise_signal(signal.SIGTERM)\n{STEP}"))
    done = run(settings | dict(OUTPUT_DIR=str(tmp_path)), script=script, check=False)
    assert done.returncode == 130 and done.stderr == "train_gpt.py: stopping after this step; press Ctrl-C again to stop now\n", done.stderr
    assert not [*tmp_path.glob("*.int6.ptz"), *tmp_path.glob("*.part")] and "RESULT" not in done.stdout
    average = unpacked((tmp_path / "test.average.ptz").read_bytes())[1]
    assert all(torch.equal(x, tensors[8][weight]) for weight, x in average.items())
    before = (tmp_path / "logs" / "test.txt").read_text()
    t.main([], continued((tmp_path / "test.state.ptz").read_bytes(), tmp_path, settings))
    assert (tmp_path / "test.int6.ptz").read_bytes() == artifact and (tmp_path / "logs" / "test.txt").read_text().startswith(before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_every_signal_leaves_the_state_of_the_step_that_was_under_way(short, tmp_path, monkeypatch, number):
    settings, folder = short
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    environment, step = continued((folder / "test.state.ptz").read_bytes(), tmp_path, settings), t.Trainer.step
    monkeypatch.setattr(t.Trainer, "step", lambda trainer, *args: (signal.raise_signal(number), step(trainer, *args))[1])
    with pytest.raises(t.Interrupted):
        t.main([], environment)
    header, _ = unpacked((tmp_path / "test.state.ptz").read_bytes())
    assert [steps for steps, _ in header["parts"]] == [4, 5] and (tmp_path / "test.average.ptz").exists()
    monkeypatch.undo()
    t.main([], environment)
    assert (tmp_path / "test.int6.ptz").read_bytes() == (folder / "test.int6.ptz").read_bytes()


# ---- options

def test_options_come_from_the_file_and_the_environment_may_change_them(whole, tmp_path):
    settings, _, files, _ = whole
    environment = continued(files[4], tmp_path, settings)
    first, kept = t.Config.from_env(settings | dict(OUTPUT_DIR=str(tmp_path), CHECKPOINT_EVERY="1")), config_of(environment)
    assert {name: x for name, x in vars(kept).items() if x != vars(first)[name]} == dict(resume="1")
    assert config_of(environment | dict(ITERATIONS="14")).iterations == 14


def test_a_folder_may_be_moved(short, tmp_path, monkeypatch):
    """Its path is that of the environment, not that of the first part."""
    settings, folder = short
    environment = continued((folder / "test.state.ptz").read_bytes(), tmp_path, settings)
    environment.pop("OUTPUT_DIR")
    monkeypatch.chdir(tmp_path)
    assert config_of(environment).checkpoint_path("state").resolve() == tmp_path / "test.state.ptz"


# ---- what is refused

def spoiled(what, folder):
    """Change the state in `folder`."""
    path = folder / "test.state.ptz"
    blob = path.read_bytes()
    if what == "a damaged byte":
        path.write_bytes(blob[:-9] + bytes([blob[-9] ^ 1]) + blob[-8:])
    elif what == "truncated":
        path.write_bytes(blob[: len(blob) // 2])
    elif what == "truncated to its first bytes":
        path.write_bytes(blob[:30])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "an artifact":
        path.write_bytes((folder / "final_model.int6.ptz").read_bytes())
    elif what == "an average":
        path.write_bytes((folder / "final_model.average.ptz").read_bytes())
    elif what == "no file":
        path.unlink()


@pytest.mark.parametrize("what, changes, said", [
    ("another model", dict(MODEL_DIM="40"), r"checkpoint .*test\.state\.ptz: its tensor .* does not belong to its model"),
    ("other groups of gains", dict(DECODER_LR_MULT="0.5"), "does not belong to its model"),
    ("a damaged byte", {}, r"checkpoint .*test\.state\.ptz: it is truncated or damaged"), ("truncated", {}, "truncated or damaged"),
    ("truncated to its first bytes", {}, "truncated or damaged"), ("empty", {}, "it is not an artifact"),
    ("an artifact", {}, r"checkpoint .*test\.state\.ptz: "), ("an average", {}, r"checkpoint .*test\.state\.ptz: "), ("no file", {}, r"test\.state\.ptz"),
    ("no name", dict(RUN_ID=None), "RESUME needs RUN_ID"),
    ("a name of another run", dict(RUN_ID="unheard"), r"unheard\.state\.ptz"), ("an evaluation", dict(EVAL_ONLY="1"), "RESUME needs RUN_ID.*EVAL_ONLY=0"),
    ("a choice", dict(RESUME="2"), "RESUME=2 must be one of 0, 1, average"), ("an invalid option", dict(ITERATIONS="0"), "ITERATIONS"),
    ("ranks that do not divide the batch", dict(TRAIN_BATCH_TOKENS="40"), "TRAIN_BATCH_TOKENS")])
def test_a_run_that_cannot_go_on_says_why_in_a_line_and_changes_nothing(short, tmp_path, capsys, what, changes, said):
    settings, folder = short
    for name in ("final_model.int6.ptz", "final_model.average.ptz", "test.average.ptz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    environment = continued((folder / "test.state.ptz").read_bytes(), tmp_path, settings) | changes
    spoiled(what, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as left:
        t.run([], {name: text for name, text in environment.items() if text is not None})
    text = capsys.readouterr().err
    assert left.value.code == 1 and text.count("\n") == 1 and text.startswith("train_gpt.py: ") and re.search(said, text), text
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["state", "average"])
def test_a_checkpoint_of_another_run_is_refused(short, tmp_path, capsys, kind):
    """A file that was renamed would take the other run's place."""
    settings, folder = short
    (tmp_path / f"other.{kind}.ptz").write_bytes((folder / f"test.{kind}.ptz").read_bytes())
    own = dict(OUTPUT_DIR=str(tmp_path), RUN_ID="other", RESUME={"state": "1"}.get(kind, kind))
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as left:
        t.run([], {name: settings[name] for name in ("DATA_PATH", "TOKENIZER_PATH")} | own)
    assert left.value.code == 1 and re.search("RUN_ID=test|run test", capsys.readouterr().err) and contents(tmp_path) == before


# ---- saving

def test_a_full_disk_at_a_checkpoint_is_told_once_and_training_goes_on(short, tmp_path, monkeypatch, capsys):
    settings, folder = short
    write = t.Path.write_bytes

    def full(path, blob):
        if ".state.ptz." in path.name:
            write(path, blob[: len(blob) // 2])
            raise OSError(28, os.strerror(28))
        return write(path, blob)

    monkeypatch.setattr(t.Path, "write_bytes", full)
    t.main([], settings | dict(OUTPUT_DIR=str(tmp_path), CHECKPOINT_EVERY="1"))
    told = capsys.readouterr().err
    assert told.count("WARNING") == 1 and re.search(r"WARNING: cannot write to .*test\.state\.ptz .*No space left on device.*; the run continues\n", told)
    assert (tmp_path / "test.int6.ptz").read_bytes() == (folder / "test.int6.ptz").read_bytes()
    assert not [*tmp_path.glob("*.state.*")] and result(tmp_path)["steps"] == 8


def test_an_interrupted_save_keeps_the_state_before(short, tmp_path, monkeypatch):
    settings, folder = short
    environment = continued((folder / "test.state.ptz").read_bytes(), tmp_path, settings)
    before = (tmp_path / "test.state.ptz").read_bytes()
    monkeypatch.setattr(t.Path, "replace", lambda path, other: (_ for _ in ()).throw(OSError(5, os.strerror(5))))
    cfg = config_of(environment)
    trainer, log = trainer_of(cfg), t.Log(cfg, t.Ranks())
    t.load_checkpoint(trainer, "state")
    t.save_checkpoint(trainer, "state", log)
    assert (tmp_path / "test.state.ptz").read_bytes() == before and not [*tmp_path.glob("*.part")]


def test_a_state_is_saved_before_the_first_snapshot_of_swa(env, tmp_path):
    settings = env | SHORT | dict(OUTPUT_DIR=str(tmp_path), AVERAGING="swa", SWA_EVERY="5", SWA_START_SCALE="0.6", WARMDOWN_ITERS="8")
    artifact, files, _ = recorded(settings, tmp_path)
    assert [*files] == [4] and "took no snapshot" not in (tmp_path / "logs" / "test.txt").read_text()
    (folder := tmp_path / "again").mkdir()
    t.main([], continued(files[4], folder, settings))
    assert (folder / "test.int6.ptz").read_bytes() == artifact


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_is_not_written(cfg, log, value):
    trainer, log.active = trainer_of(cfg), True
    trainer.average.update(0.5)
    t.save_checkpoint(trainer, "state", log)
    before = cfg.checkpoint_path("state").read_bytes()
    trainer.optimizers.muon.param_groups[0]["buffer"].view(-1)[0] = value
    t.save_checkpoint(trainer, "state", log)
    assert cfg.checkpoint_path("state").read_bytes() == before and "was not written" in log.facts["warnings"][0]


# ---- RESUME=average

def test_the_average_is_packed_and_scored_without_a_step(short, tmp_path):
    settings, folder = short
    blob = (folder / "test.average.ptz").read_bytes()
    t.main([], continued(blob, tmp_path, settings, "average") | dict(RESUME="average"))
    average, cfg = unpacked(blob)[1], t.Config.from_env(settings)
    expected = t.quantize(average, t.quant_plans(average, t.quant_specs(t.GPT(cfg), cfg), cfg, {}))
    artifact = t.unpack((tmp_path / "test.int6.ptz").read_bytes())[1]
    assert artifact.keys() == expected.keys() and all(torch.equal(artifact[weight], x) for weight, x in expected.items())
    facts, text = result(tmp_path), (tmp_path / "logs" / "test.txt").read_text()
    assert (facts["resumed"], facts["steps"], [steps for steps, _ in facts["parts"]]) == ("average", 8, [8]) and "train_loss" not in text
    assert (tmp_path / "test.average.ptz").read_bytes() == blob
    own = {k: settings[k] for k in ("DATA_PATH", "TOKENIZER_PATH")} | dict(EVAL_ONLY="1", OUTPUT_DIR=str(tmp_path), TTT_EPOCHS="0", RUN_ID="scored")
    t.main([], own | dict(ARTIFACT=str(tmp_path / "test.average.ptz"), VAL_MAX_TOKENS="100"))
    scored = finals((tmp_path / "logs" / "scored.txt").read_text())["final_int6_roundtrip"]
    assert facts["scores"]["averaged"]["bpb"] == pytest.approx(scored, abs=1e-6)


def test_the_average_of_a_looped_run_is_packed_as_looped(whole, tmp_path, monkeypatch):
    """GPTQ takes its statistics by rows of its stage, and from the looped model."""
    settings, _, files, _ = whole
    cfg = config_of(continued(files[7], tmp_path, settings))
    trainer, log = trainer_of(cfg), t.Log(cfg, t.Ranks())
    t.load_checkpoint(trainer, "state")
    t.save_checkpoint(trainer, "average", log)
    seen, collect = [], t.Trainer.collect
    monkeypatch.setattr(t.Trainer, "collect", lambda trainer: seen.append((trainer.batches.seq_len, trainer.looped, trainer.batches.step)) or collect(trainer))
    t.main([], continued((tmp_path / "test.average.ptz").read_bytes(), tmp_path, settings, "average") | dict(RESUME="average", WARMUP_STEPS="1"))
    assert seen == [(32, True, 7), (32, True, 8)] and unpacked((tmp_path / "test.int6.ptz").read_bytes())[0]["looped"] is True


def test_an_average_that_was_saved_after_training_has_all_its_steps(short, tmp_path, monkeypatch):
    """Packing failed."""
    settings, _ = short
    monkeypatch.setattr(t, "save_artifact", lambda *args: (_ for _ in ()).throw(OSError(5, os.strerror(5))))
    with pytest.raises(OSError):
        t.main([], settings | dict(OUTPUT_DIR=str(tmp_path), CHECKPOINT_EVERY="0"))
    header, _ = unpacked((tmp_path / "test.average.ptz").read_bytes())
    assert (header["updates"], header["parts"][-1][0]) == (8, 8)


# ---- time

def test_seconds_of_earlier_parts_count_against_the_limit(env, tmp_path, monkeypatch):
    """By a clock that each optimizer step moves on by one second."""
    now, step = [0.0], t.Trainer.step

    def timed(trainer, *args):
        now[0] += 1.0
        return step(trainer, *args)

    monkeypatch.setattr(t, "perf_counter", lambda: now[0])
    monkeypatch.setattr(t.Trainer, "step", timed)
    settings = env | SHORT | dict(ITERATIONS="1000", MAX_WALLCLOCK_SECONDS="10", WARMUP_STEPS="2", CHECKPOINT_EVERY="5", WARMDOWN_ITERS="3")
    settings |= dict(OUTPUT_DIR=str(tmp_path))
    artifact, files, _ = recorded(settings, tmp_path)
    first = result(tmp_path)
    assert (first["steps"], first["train_seconds"]) == (9, 9.0) and [*files] == [5]  # the next step may end after the limit
    (folder := tmp_path / "again").mkdir()
    now[0] += 1e6
    t.main([], continued(files[5], folder, settings))
    again = result(folder)
    assert (again["steps"], again["train_seconds"], again["parts"]) == (9, 9.0, [[5, 5.0]])
    assert (folder / "test.int6.ptz").read_bytes() == artifact
    assert "step:6/1000 train_loss" in (folder / "logs" / "test.txt").read_text()
    (spent := tmp_path / "spent").mkdir()
    t.main([], continued(files[5], spent, settings) | dict(MAX_WALLCLOCK_SECONDS="6"))  # no time is left
    assert result(spent)["steps"] == 5 and "stopping_early" in (spent / "logs" / "test.txt").read_text()


# ---- no random numbers, no pickle

def test_training_draws_no_random_numbers(whole, tmp_path):
    cfg = t.Config.from_env(whole[0] | dict(OUTPUT_DIR=str(tmp_path)))
    trainer, log = trainer_of(cfg), t.Log(cfg, t.Ranks())
    log.active = False

    def generators():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = generators()
    t.train(trainer, lambda: None, log)
    assert trainer.qat and trainer.looped and generators() == before


def test_no_pickle_is_read(short, tmp_path, monkeypatch):
    settings, folder = short
    environment = continued((folder / "test.state.ptz").read_bytes(), tmp_path, settings)

    def fail(*args, **how):
        raise AssertionError("unpickled")

    for place, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch.serialization, "load"), (np, "load")):
        monkeypatch.setattr(place, name, fail)
    t.main([], environment)
    assert (tmp_path / "test.int6.ptz").read_bytes() == (folder / "test.int6.ptz").read_bytes()
