"""Runs that meet a fault: what is kept, what is said, and by which rank."""

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, finals, make_model, run, unpacked
from helpers.twins import trainer_of

import train_gpt as t

BUILT_IN = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
STEP = "        reading = trainer.step(scale,"  # of the loop of `train`
SHORT = dict(TTT_EPOCHS="0", EVAL_STRIDE="32", VAL_LOSS_EVERY="0", ITERATIONS="6")


def planted(tmp_path, fault, before=STEP):
    """A script in which `fault` runs before a line."""
    indent = re.match(" *", before)[0]
    changed = BUILT_IN.replace(before, f"{indent}{fault}\n{before}")
    assert changed.count(fault) == 1
    (path := tmp_path / "train_gpt.py").write_text(changed)
    return path


def average_of(folder, name="test"):
    return unpacked((folder / f"{name}.average.ptz").read_bytes())[1]


def updates_of(folder, name="test"):
    return unpacked((folder / f"{name}.average.ptz").read_bytes())[0]["updates"]


def shell(command, env, **how):
    """A shell command with the script as $RUN."""
    clean = {k: v for k, v in os.environ.items() if k.lower() not in t.Config.__dataclass_fields__}
    env = clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RUN": f"{sys.executable} {ROOT / 'train_gpt.py'}"} | env
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=240, **how)


# ---- any error leaves the average

@pytest.mark.parametrize("fault, status, said", [
    ("assert step < 3, 'planted'", 1, "AssertionError: planted"), ("if step == 3: raise OSError(28, 'No space left on device', 'x.bin')", 1, "x.bin: No space"),
    ("if step == 3: raise MemoryError('much')", 1, "out of memory .much.; lower MICRO_BATCH_TOKENS"),
    ("if step == 3: raise t_error", 1, "NameError"), ("if step == 3: raise KeyboardInterrupt", 130, "^$"),
    ("if step == 3: raise BrokenPipeError(32, 'Broken pipe')", 1, "Broken pipe")])
def test_an_error_of_any_type_leaves_the_average_saved(env, tmp_path, fault, status, said):
    done = run(env | SHORT, script=planted(tmp_path, fault), check=False)
    assert done.returncode == status and re.search(said, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1 or "Traceback" in done.stderr or status == 130
    assert average_of(tmp_path).keys() == average_of(tmp_path, "final_model").keys()
    assert all(w.isfinite().all() for w in average_of(tmp_path).values()) and updates_of(tmp_path) == 3
    assert not [*tmp_path.glob("*.int6.ptz"), *tmp_path.glob("*.part")]


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_ranks_the_first_that_fails_speaks_and_the_average_is_kept(env, tmp_path, rank):
    fault = f"if step == 3 and ranks.rank == {rank}: raise InputError('planted')"
    script = planted(tmp_path, fault)
    done = run(env | SHORT, script=script, processes=2, check=False, fresh=True)
    ours = [line for line in done.stderr.splitlines() if line.startswith("train_gpt.py:")]
    assert done.returncode and ours == ["train_gpt.py: planted"] and "Connection closed" not in done.stderr, done.stderr
    assert "tok_emb.weight" in average_of(tmp_path)


def test_ranks_that_do_not_divide_the_batch_are_told_once_with_the_nearest_that_does(env, tmp_path):
    done = run(env, processes=3, check=False, fresh=True)
    ours = [line for line in done.stderr.splitlines() if line.startswith("train_gpt.py:")]
    assert done.returncode and len(ours) == 1 and "the nearest valid value is TRAIN_BATCH_TOKENS=288" in ours[0], done.stderr
    assert not (tmp_path / "logs" / "test.txt").exists()


def test_a_nan_never_replaces_a_good_average(env, tmp_path):
    """The fourth step makes weights of 1e30, which its own loss does not show yet; the average takes them in."""
    fault = "if step == 3: [p.data.fill_(1e30) for p in trainer.model.parameters()]"
    settings = env | SHORT | dict(CHECKPOINT_EVERY="1", RUN_ID="seed")
    done = run(settings, script=planted(tmp_path, fault, before="        clock.lap()"), check=False)
    assert done.returncode == 1 and re.fullmatch("train_gpt.py: the loss is (nan|inf) at step 5; .*\n", done.stderr), done.stderr
    kept = average_of(tmp_path, "seed")
    assert all(w.isfinite().all() for w in kept.values()) and done.stdout.count("average.ptz step:") == updates_of(tmp_path, "seed") == 3
    own = {k: env[k] for k in ("DATA_PATH", "TOKENIZER_PATH", "OUTPUT_DIR", "VAL_MAX_TOKENS")} | dict(EVAL_ONLY="1", RUN_ID="again", TTT_EPOCHS="0")
    scored = run(own | dict(ARTIFACT=str(tmp_path / "seed.average.ptz"))).stdout
    assert 0 < finals(scored)["final_int6_roundtrip"] < 20


def test_an_average_that_is_not_finite_is_not_written(cfg, log):
    trainer, log.active = trainer_of(cfg), True
    trainer.average.update(0.5)
    t.save_checkpoint(trainer, "average", log)
    before = cfg.checkpoint_path("average").read_bytes()
    trainer.average.values["skip_weights"][0, 0] = torch.nan
    t.save_checkpoint(trainer, "average", log)
    assert cfg.checkpoint_path("average").read_bytes() == before and "was not written" in log.facts["warnings"][0]


# ---- signals

@pytest.mark.parametrize("handled", [True, False])
def test_sighup_is_a_signal_to_stop_unless_it_is_ignored(monkeypatch, handled):
    before, seen = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}, []
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if handled else signal.SIG_IGN)
        t.on_signals(lambda *args: seen.append(args[0]))
        os.kill(os.getpid(), signal.SIGHUP)
        assert seen == [signal.SIGHUP] * handled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_in_warm_up_ends_at_once(env, tmp_path):
    script = planted(tmp_path, "signal.raise_signal(signal.SIGINT)", "                self.step(1.0, cfg.muon_momentum).value()")
    done = run(env | dict(WARMUP_STEPS="1000000"), script=script, check=False)
    assert done.returncode == 130 and "warmup_step:" not in done.stdout and done.stderr == "" and not [*tmp_path.glob("*.ptz")]


def test_a_signal_in_training_is_acknowledged_and_a_second_one_ends_it(env, tmp_path):
    """The first ends the run after the step, so the second must come within it."""
    twice = "if step == 3: signal.raise_signal(signal.SIGHUP); signal.raise_signal(signal.SIGINT)"
    done = run(env | SHORT, script=planted(tmp_path, twice), check=False)
    assert done.returncode == 130 and done.stderr == "train_gpt.py: stopping after this step; press Ctrl-C again to stop now\n"
    assert updates_of(tmp_path) == 3 and "step:4/" not in done.stdout


# ---- outputs that cannot be written

@pytest.mark.parametrize("command", ["$RUN | head -n 5", "$RUN > /dev/full", "$RUN >&-", "$RUN 2>&1 | head -n 1", "$RUN >&- 2>&-"])
def test_a_terminal_that_goes_away_ends_no_run(env, tmp_path, command):
    done = shell(f"set -o pipefail; {command}", env | SHORT)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("WARNING: cannot write to the terminal") == (command in ("$RUN | head -n 5", "$RUN > /dev/full"))
    text = (tmp_path / "logs" / "test.txt").read_text()
    assert json.loads(text.splitlines()[-1].removeprefix("RESULT "))["steps"] == 6


def test_a_log_on_a_full_disk_ends_no_run_and_is_told_once(cfg, capsys):
    log = t.Log(cfg, t.Ranks())
    log("first")
    log.path = t.Path("/dev/full")
    log.fact(second=1)
    log("third")
    said = capsys.readouterr()
    assert said.out.split() == ["first", "second:1", "third"] and log.facts == {"second": 1}
    assert said.err.count("WARNING: cannot write to /dev/full (") == 1 and said.err.count("\n") == 1


def test_every_warning_stands_in_the_result(cfg):
    log = t.Log(cfg, t.Ranks())
    log.warn("first", "second")
    log.warn("third")
    assert log.facts["warnings"] == ["first", "second", "third"] and log.path.read_text().count("WARNING: ") == 3


def test_an_audit_that_cannot_be_written_does_not_end_an_evaluation(cfg, log, tmp_path, capsys):
    (folder := tmp_path / "gone").mkdir()
    cfg = dataclasses.replace(cfg, audit=str(folder / "audit.npz"), val_max_tokens=100)
    scorer, model = t.Scorer(t.read_validation(cfg), cfg, t.Ranks(), log), make_model(cfg)
    assert scorer.evaluate_windows(model).loss > 0 and np.load(cfg.audit)["nll"].shape == (100,)
    (folder / "audit.npz").unlink()
    folder.rmdir()
    assert scorer.evaluate_windows(model).loss > 0 and capsys.readouterr().err.count("WARNING: cannot write to ") == 1


def test_outputs_are_checked_before_the_work(cfg, monkeypatch, tmp_path):
    log, path = t.Log(cfg, t.Ranks()), tmp_path / "out.npz"
    log.check_writable({path: 10})
    assert not path.exists() and not [*tmp_path.glob("*.part")]
    for wrong, size, words in ((tmp_path, 1, "it is a folder"), (tmp_path / "no" / "x", 1, "No such file"), (path, 10**18, "it may need 10{18} bytes")):
        with pytest.raises(t.InputError, match=f"cannot write {wrong}: .*{words}"):
            log.check_writable({wrong: size})
    monkeypatch.setattr(t.Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(t.InputError, match="out.npz: Permission denied; set another folder"):
        log.check_writable({path: 10})


# ---- several runs in one folder

def test_three_seeds_in_one_folder_keep_three_artifacts(env, tmp_path):
    texts = [run(env | SHORT | dict(SEED=seed, RUN_ID=f"seed{seed}")).stdout for seed in "123"]
    digests = {hashlib.sha256((tmp_path / f"seed{seed}.int6.ptz").read_bytes()).hexdigest() for seed in "123"}
    assert len(digests) == 3 and {re.search("artifact_sha256:(.{64})", text)[1] for text in texts} == digests
    assert (tmp_path / "final_model.int6.ptz").read_bytes() == (tmp_path / "seed3.int6.ptz").read_bytes()


def test_a_run_scores_what_it_wrote_or_says_that_it_cannot(cfg, env):
    model = make_model(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    log = t.Log(cfg, t.Ranks())
    digest = t.save_artifact(t.quant_plans(weights, t.quant_specs(model, cfg), cfg, {}), weights, False, cfg, t.Ranks(), log)
    assert t.written_artifact(cfg, digest, t.Ranks()).sha256 == digest
    other = {name: 2 * w for name, w in weights.items()}
    t.save_artifact(t.quant_plans(other, t.quant_specs(model, cfg), cfg, {}), other, False, cfg, t.Ranks(), log)
    with pytest.raises(t.InputError, match="was overwritten by another run"):
        t.written_artifact(cfg, digest, t.Ranks())


@pytest.mark.parametrize("wrong", [dict(DATA_PATH="/nowhere"), dict(TTT_PARAMS="nothing", TTT_EPOCHS="1"), dict(MODEL_DIM="36", NUM_HEADS="4", ROPE_DIMS="9"),
                                   dict(TRAIN_BATCH_TOKENS="64", MICRO_BATCH_TOKENS="4")], ids=str)
def test_a_run_that_fails_at_its_start_leaves_its_run_id(env, tmp_path, wrong):
    assert run(env | SHORT | wrong, check=False).returncode == 1
    assert not (tmp_path / "logs" / "test.txt").exists() and not [*tmp_path.glob("*.ptz*")]


def test_a_name_that_is_in_use_is_refused_also_by_the_later_of_two_that_begin_together(cfg):
    first, second = t.Log(cfg, t.Ranks()), t.Log(cfg, t.Ranks())
    first("begins")
    for act in (lambda: second("begins"), lambda: t.Log(cfg, t.Ranks())):
        with pytest.raises(t.InputError, match="exists; set another RUN_ID"):
            act()
    assert first.path.read_text() == "begins\n"


def test_ranks_without_a_shared_disk_score_the_bytes_of_the_first(env, tmp_path):
    script = tmp_path / "nodes.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
os.environ["OUTPUT_DIR"] += os.environ["RANK"]
import train_gpt as t
t.run([], os.environ)
""")
    done = run(env | SHORT | dict(OUTPUT_DIR=str(tmp_path / "node")), script=script, processes=2)
    assert "RESULT" in done.stdout and (tmp_path / "node0" / "test.int6.ptz").exists() and not [*(tmp_path / "node1").glob("*.ptz")]


# ---- time

def test_no_training_data_are_read_while_the_clock_stands(cfg, monkeypatch):
    """A read that is under way when validation or the end comes is waited for, one that has not begun does not begin."""
    batches = t.Batches(t.TokenStream(t.find_shards(cfg, "train"), cfg.vocab_size), cfg, t.Ranks())
    order = [batch[0].sum() for batch in (next(batches), next(batches))]
    batches.seek(0, cfg.train_seq_len)
    inner, reading, ended = batches.load, [], []

    def slow(*args):
        reading.append(args)
        time.sleep(0.2)
        ended.append(args)
        return inner(*args)

    monkeypatch.setattr(batches, "load", slow)
    found = []
    for _ in range(2):
        found.append(next(batches)[0].sum())
        batches.settle()
        assert len(ended) == len(reading)
        count = len(reading)
        time.sleep(0.05)
        assert len(reading) == count
    assert found == order  # and no batch is lost


@pytest.mark.parametrize("seconds, over", [(9.5, 0.0), (10.0, 0.0), (10.5, 0.5)])
def test_the_time_over_the_limit_counts_from_the_whole_limit(cfg, log, seconds, over):
    """Of which GPTQ's reserve is a part."""
    t.report_end(3, seconds, dataclasses.replace(cfg, quantizer="gptq", max_wallclock_seconds=10.0, gptq_reserve_seconds=4.0), log)
    assert log.facts["train_over_limit_seconds"] == over and ("warnings" in log.facts) == (over > 0)
    t.report_end(3, 1e6, dataclasses.replace(cfg, max_wallclock_seconds=0.0), log)
    assert log.facts["train_over_limit_seconds"] == 0


def test_a_step_that_passes_the_limit_is_told(env):
    """It was estimated at no time, since there is one warm-up step alone."""
    text = run(env | SHORT | dict(MAX_WALLCLOCK_SECONDS="0.05", GPTQ_RESERVE_SECONDS="0", ITERATIONS="2", TRAIN_BATCH_TOKENS="16384")).stdout
    facts = json.loads(text.splitlines()[-1].removeprefix("RESULT "))
    assert facts["train_over_limit_seconds"] == pytest.approx(facts["train_seconds"] - 0.05) and facts["train_over_limit_seconds"] > 0
    assert re.search(r"WARNING: training took [\d.]+ s more than MAX_WALLCLOCK_SECONDS=0.05", text)
