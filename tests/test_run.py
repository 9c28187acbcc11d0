"""Whole runs, as a user starts them."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, finals, run
from helpers.smoke import SMOKE, for_evaluation

import train_gpt as t

STEP = re.compile(r"^step:\d+/\d+ train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d{2}ms$", re.M)
VAL = re.compile(r"^step:\d+/\d+ val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms train_time:\d+ms step_avg:[\d.]+ms$", re.M)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A complete smoke run: its environment, its folder, its output."""
    folder = tmp_path_factory.mktemp("run")
    env = dict(SMOKE, **dataset, OUTPUT_DIR=str(folder), VAL_MAX_TOKENS="700", RUN_ID="test")
    return env, folder, run(env, fresh=True).stdout


def test_a_run_passes_every_stage_and_ends_in_the_table(finished):
    _, folder, out = finished
    assert len(STEP.findall(out)) >= 10 and len(VAL.findall(out)) == 1
    for words in ("source_sha256:", "variant:card seed:1337 overrides:", " NUM_LAYERS=4", " parameters:",
                  "warmup_step:1/1 late_qat:1 looped:0", "late_qat:enabled",
                  "averaging:ema updates:20", "DIAGNOSTIC post_ema val_loss:", "kind:int6+zstd model_bytes:", " code_bytes:",
                  "Total submission size int6+zstd: ", "eval_seconds:", "bytes_per_token:"):
        assert words in out, words
    stages = finals(out)
    assert list(stages) == ["final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt"]
    table = out[out.index("stage   ") :].splitlines()
    assert [row.split()[0] for row in table[1:6]] == ["raw", "averaged", *stages]
    total = sum(path.stat().st_size for path in (ROOT / "train_gpt.py", folder / "final_model.int6.ptz"))
    assert all(row.split()[2:4] == [f"{stages[row.split()[0]]:.4f}", str(total)] for row in table[3:6])
    assert (folder / "logs" / "test.txt").read_text() == out


def test_sizes_in_the_log_are_those_on_disk(finished):
    _, folder, out = finished
    model, code = (folder / "final_model.int6.ptz").stat().st_size, (ROOT / "train_gpt.py").stat().st_size
    assert f"kind:int6+zstd model_bytes:{model} payload_bytes:" in out and f" code_bytes:{code} " in out
    assert f"Total submission size int6+zstd: {model + code} bytes" in out


def test_an_artifact_can_be_scored_again_in_a_fresh_process_without_training_data(finished, tmp_path):
    env, folder, out = finished
    only_val = tmp_path / "val"
    only_val.mkdir()
    for path in t.find_shards(t.Config.from_env(env), "val"):
        (only_val / path.name).symlink_to(path)
    again = run({"EVAL_ONLY": "1", "ARTIFACT": str(folder / "final_model.int6.ptz"), "DATA_PATH": str(only_val),
                 "TOKENIZER_PATH": env["TOKENIZER_PATH"], "OUTPUT_DIR": str(tmp_path), "VAL_MAX_TOKENS": "700"}, cwd=tmp_path).stdout
    assert finals(again) == finals(out) and not list(tmp_path.glob("final_model*"))


def test_the_same_seed_gives_the_same_losses_and_two_processes_agree(finished, tmp_path):
    env, folder, out = finished
    losses = re.findall(r"train_loss:[\d.]+", out)
    again = run(env | {"OUTPUT_DIR": str(tmp_path)})
    assert re.findall(r"train_loss:[\d.]+", again.stdout) == losses and finals(again.stdout) == finals(out)
    assert (tmp_path / "final_model.int6.ptz").read_bytes() == (folder / "final_model.int6.ptz").read_bytes()
    two = run(env | {"OUTPUT_DIR": str(tmp_path), "RUN_ID": "two"}, processes=2, fresh=True)
    assert re.findall(r"train_loss:[\d.]+", two.stdout) == losses
    assert finals(two.stdout) == pytest.approx(finals(out), abs=2e-3)
    assert two.stdout.count(" parameters:") == 1


def cut_shard(env, tmp_path):
    return {"DATA_PATH": str(copied(env, tmp_path, lambda b: b[:-100]))}


def foreign_token(env, tmp_path):
    return {"DATA_PATH": str(copied(env, tmp_path, lambda b: b[:2000] + b"\xff\xff" + b[2002:]))}


def copied(env, tmp_path, change):
    """A copy of the dataset in which the first training shard has been changed."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in (p for split in ("train", "val") for p in t.find_shards(t.Config.from_env(env), split)):
        (folder / path.name).write_bytes(change(path.read_bytes()) if "train_000000" in path.name else path.read_bytes())
    return folder


@pytest.mark.parametrize("wrong, words", [
    (lambda e, p: {"MATRX_LR": "1"}, "did you mean MATRIX_LR"),
    (lambda e, p: {"DATA_PATH": str(p / "none")}, "create it with `python data/prepare.py download sp384`"),
    (cut_shard, "fineweb_train_000000.bin is damaged"), (foreign_token, "has token 65535, but VOCAB_SIZE=384"),
    (lambda e, p: {"VOCAB_SIZE": "385"}, "has 384 pieces"), (lambda e, p: {"TOKENIZER_PATH": __file__}, "not a SentencePiece model"),
    (lambda e, p: {"TRAIN_BATCH_TOKENS": "100"}, "multiple of TRAIN_SEQ_LEN"),
    (lambda e, p: {"OUTPUT_DIR": "/proc/none"}, "cannot access /proc/none: No such file"),
    (lambda e, p: {"EVAL_ONLY": "1", "ARTIFACT": str(p / "none")}, "there is no artifact .*none"),
    (lambda e, p: {"AUDIT": str(p / "no" / "a.npz")}, "cannot write .*/no/a.npz.*: No such file"),
    (lambda e, p: {"ARTIFACT": str(p)}, "cannot write .*: it is a folder"),
    (lambda e, p: {"MAX_ARTIFACT_BYTES": "1000", "ITERATIONS": "1"}, "over MAX_ARTIFACT_BYTES=1000.*, or set FIT=1$"),
    (lambda e, p: {"MATRIX_LR": "1e18", "TIED_EMBED_LR": "1e18", "SCALAR_LR": "1e18", "WARMUP_STEPS": "0"}, "at step [23]; lower MATRIX_LR"),
])
def test_bad_input_ends_in_one_line_and_overwrites_nothing(env, tmp_path, wrong, words):
    kept = tmp_path / "final_model.int6.ptz"
    kept.write_bytes(b"an earlier model")
    done = run(env | wrong(env, tmp_path), check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode != 0 and len(lines) == 1 and re.search(words, lines[0]), done.stderr
    before = tmp_path / "final_model.int6.ptz.before"  # where it goes as soon as training begins, as the log says
    assert (before if before.exists() else kept).read_bytes() == b"an earlier model" and before.exists() == (f"now {before.name}" in done.stdout)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_all_ranks_find_too_late_keeps_the_average(env, tmp_path, processes):
    done = run(env | {"MAX_ARTIFACT_BYTES": "1000"}, processes=processes, check=False)
    assert done.returncode != 0 and "checkpoint:" in done.stdout and "over MAX_ARTIFACT_BYTES=1000" in done.stderr
    average = t.unpack((tmp_path / "final_model.average.ptz").read_bytes())[1]
    assert average["tok_emb.weight"].shape == (384, 32) and all(w.isfinite().all() for w in average.values())


@pytest.mark.parametrize("number, processes", [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_ctrl_c_and_a_schedulers_signal_keep_the_average(env, tmp_path, number, processes):
    settings = env | {"ITERATIONS": "100000", "MAX_WALLCLOCK_SECONDS": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "VAL_LOSS_EVERY": "0"}
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    # a job in the background of a shell, as CI may be, inherits an ignored Ctrl-C
    process = subprocess.Popen([sys.executable, *launcher, str(ROOT / "train_gpt.py")], env=os.environ | settings, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    log = tmp_path / "logs" / "test.txt"
    for _ in range(1800):
        if log.is_file() and "step:10/" in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert "checkpoint:" in log.read_text()
    assert processes > 1 or process.returncode == 130 and re.fullmatch("train_gpt.py: stopping after this step; .*\n", err)
    own = for_evaluation(env) | {"RUN_ID": "again", "EVAL_ONLY": "1"}
    assert "legal_ttt_exact" in run(own | {"ARTIFACT": str(tmp_path / "final_model.average.ptz")}).stdout


def scoring(finished, tmp_path, **settings):
    """An evaluation of the finished run's artifact."""
    env, folder, _ = finished
    own = {"EVAL_ONLY": "1", "ARTIFACT": str(folder / "final_model.int6.ptz"), "OUTPUT_DIR": str(tmp_path)}
    return run({k: env[k] for k in ("DATA_PATH", "TOKENIZER_PATH", "VAL_MAX_TOKENS")} | own | settings, check=False)


@pytest.mark.parametrize("settings", [{"SEED": "2"}, {"VARIANT": "demo"}, {"MATRIX_LR": "0.5"}, {"COMPRESSOR": "brotli"}, {"NUM_LAYERS": "5"}])
def test_what_cannot_act_on_an_artifact_is_refused(finished, tmp_path, settings):
    done = scoring(finished, tmp_path, **settings)
    assert done.returncode == 1 and f"{[*settings][0]} cannot change for a packed model; unset it" in done.stderr
    assert not (tmp_path / "logs").exists()


def test_an_evaluation_names_the_artifact_that_it_scores(finished, tmp_path):
    out = scoring(finished, tmp_path, VARIANT="card", RUN_ID="again").stdout
    digest = hashlib.sha256((finished[1] / "final_model.int6.ptz").read_bytes()).hexdigest()
    assert f"artifact_sha256:{digest} eval_stride:" in out and "\nattention:sdpa dtype:torch.float32\n" in out
    assert "variant:card seed:1337 overrides:RUN_ID=again " in out
    facts = json.loads(out.splitlines()[-1].removeprefix("RESULT "))
    trained = json.loads(finished[2].splitlines()[-1].removeprefix("RESULT "))
    assert facts["artifact_sha256"] == trained["artifact_sha256"] == digest and facts["seed"] == 1337
    assert facts["val_sha256"] == trained["val_sha256"] and len(facts["val_sha256"]) == 64


def test_the_seconds_of_an_evaluation_are_its_own(finished):
    facts = json.loads(finished[2].splitlines()[-1].removeprefix("RESULT "))
    stages = sum(score["seconds"] for stage, score in facts["scores"].items() if stage not in ("raw", "averaged"))
    assert stages <= facts["eval_seconds"] < stages + facts["train_seconds"]


def test_a_run_id_names_one_log_inside_the_folder_of_logs(finished, tmp_path):
    for name, words in (("test", "exists; set another RUN_ID"), ("../../x", "must be a plain name"), ("a/b", "must be a plain name")):
        done = scoring(finished, finished[1], RUN_ID=name)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and words in done.stderr
    assert (finished[1] / "logs" / "test.txt").read_text() == finished[2]


def test_the_audit_file_recomputes_the_score(finished, tmp_path):
    import numpy as np

    env, folder, out = finished
    path = tmp_path / "audit.npz"
    run(for_evaluation(env) | {"EVAL_ONLY": "1", "ARTIFACT": str(folder / "final_model.int6.ptz"), "AUDIT": str(path), "OUTPUT_DIR": str(tmp_path)})
    with np.load(path) as audit:
        assert audit["nll"].dtype == np.float64 and len(audit["nll"]) == 700
        assert audit["nll"].sum() / np.log(2) / audit["bytes"].sum() == pytest.approx(finals(out)["legal_ttt"], abs=1e-8)


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(tmp_path, monkeypatch):
    (file := tmp_path / "model").write_bytes(b"old")

    def full(path, blob):
        with path.open("wb") as part:
            part.write(blob[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(t.Path, "write_bytes", full)
    with pytest.raises(t.InputError, match="cannot write .*model: No space left on device"):
        t.write_file(file, b"new one")
    assert [*tmp_path.iterdir()] == [file] and file.read_bytes() == b"old"


def test_the_log_of_a_gpu_names_card_and_driver(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(t.torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(t.torch.cuda, "is_bf16_supported", lambda emulated: True)
    monkeypatch.setattr(t.shutil, "which", lambda name: f"/bin/{name}")
    (fake := tmp_path / "smi").write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1, 700 W, 1980 MHz'\n")
    fake.chmod(0o755)
    inner = subprocess.run
    monkeypatch.setattr(t.subprocess, "run", lambda command, **how: inner([fake, *command[1:]], **how))
    ranks = dataclasses.replace(t.Ranks(), device=t.torch.device("cuda", 0))
    t.Log(cfg, ranks).header(cfg, ranks, {})
    lines = (tmp_path / "logs" / "test.txt").read_text().splitlines()
    assert lines[1].startswith("device:NVIDIA H100 world_size:1 versions:python=")
    assert lines[2] == "nvidia-smi: ['NVIDIA H100, 580.1, 700 W, 1980 MHz']"


@pytest.mark.parametrize("error, status, words", [
    (t.InputError("no such shard"), 1, ["train_gpt.py: no such shard"]), (KeyboardInterrupt(), 130, []),
    (ZeroDivisionError("planted"), 1, ["Traceback", "planted"]), (MemoryError("CUDA out of memory"), 1, ["out of memory", "MICRO_BATCH_TOKENS"])])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_rank_that_fails_says_why_and_leaves_at_once(monkeypatch, capsys, error, status, words, grouped):
    """In a group without an orderly end: other ranks may be waiting for this one, and that end waits for them."""
    class Left(Exception):
        pass

    def leave(code):
        raise Left(code)

    def fail(argv, env):
        with t.launch({}):
            raise error

    monkeypatch.setattr(t, "main", fail)
    monkeypatch.setattr(t.dist, "is_initialized", lambda: grouped)
    monkeypatch.setattr(t.dist, "destroy_process_group", lambda: pytest.fail("it would wait"))
    monkeypatch.setattr(t.os, "_exit", leave)
    with pytest.raises(Left if grouped else SystemExit) as left:
        t.run([], dict(WORLD_SIZE="2") if grouped else {})
    assert left.value.args == (status,)
    said = capsys.readouterr().err
    assert all(word in said for word in words) and (status == 1) == bool(said) and ("Traceback" in said) == ("Traceback" in words)


def test_one_rank_that_fails_ends_the_run_of_all(env, tmp_path):
    """By torchrun, which kills the others as soon as one has left with a status."""
    source = (ROOT / "train_gpt.py").read_text()
    before, fault = "        reading = trainer.step(scale,", "        assert step < 3 or trainer.ranks.rank == 0, 'planted'\n"
    planted = source.replace(before, fault + before)
    assert planted != source
    (script := tmp_path / "train_gpt.py").write_text(planted)
    done = run(env, processes=2, script=script, check=False, fresh=True)
    assert done.returncode and "AssertionError: planted" in done.stderr and "final_int6" not in done.stdout


@pytest.mark.slow
def test_two_nodes_that_meet_over_a_port_score_as_one_process(env, tmp_path):
    """torchrun's rendezvous of two agents on the loopback device, a folder for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_id=test",
             f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", str(ROOT / "train_gpt.py")]
    clean = {k: v for k, v in os.environ.items() if k.lower() not in t.Config.__dataclass_fields__}
    nodes = clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env | {"OUTPUT_DIR": str(tmp_path / "nodes")}
    agents = [subprocess.Popen(agent, env=nodes, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [agent.communicate(timeout=240) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outs
    both, one = "".join(out for out, _ in outs), run(env).stdout
    assert "world_size:4" in both and finals(both) == pytest.approx(finals(one), abs=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_a_compiled_run_scores_as_an_eager_one(env, tmp_path):
    """COMPILE=on, the way of a GPU: training and evaluation through Inductor."""
    env = env | dict(NUM_LAYERS="2", VE_LAYERS="1", XSA_LAST_N="1", VAL_LOSS_EVERY="0", ITERATIONS="8", VAL_MAX_TOKENS="512", EVAL_STRIDE="32",
                     EVAL_BATCH_SEQS="8", TTT_EPOCHS="0")
    eager = run(env).stdout
    compiled = run(env | {"COMPILE": "on", "OUTPUT_DIR": str(tmp_path / "compiled"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert finals(compiled.stdout) == pytest.approx(finals(eager), abs=2e-3)
    assert eager.count(" compiled:0\n") == compiled.stdout.count(" compiled:1\n") == 2  # graphs with late QAT and without
