"""The script on a GPU that computes nothing: runs of every contest variant, two ranks, attention kernels, mistakes.

Order of the tests: the longest first, and those that reuse compiled code after those that compile it.
"""

import json
import os
import subprocess
import sys

import nullgpu
import pytest
import suite
import torch
from helpers.smoke import SMOKE
from planted import PLANTED


@pytest.fixture(autouse=True, scope="session")
def compiler_cache(tmp_path_factory):
    """One new cache for all workers, so that each graph is compiled once; or the one of TORCHINDUCTOR_CACHE_DIR."""
    base = tmp_path_factory.getbasetemp()
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    )


def settings(row, folder, processes=1, model="h100"):
    """A short run of a variant at full width on a card. Each rank has the batch of one rank of eight."""
    tokens = (65_536 if row == "pr1127" else 98_304) * processes
    large = row in ("pr1812", "frontier")
    data = suite.dataset(folder, 8192 if large else 1024, longest=3400 if row == "frontier" else 2300)
    env = (
        suite.SHORT
        | data
        | dict(VARIANT=row, TRAIN_BATCH_TOKENS=str(tokens))
        | (dict(ATTENTION="fa3") if row == "frontier" and model == "h100" else {})
    )
    return {name: text for name, text in env.items() if not large or name != "WARMDOWN_ITERS"}  # they set WARMDOWN_FRAC


# 4 blocks, except for the table of memory; the other variants run at full depth
SHALLOW = dict(
    pr150=dict(NUM_LAYERS="4"),
    pr455=dict(NUM_LAYERS="4", VE_LAYERS="2,3"),
    frontier=dict(
        NUM_LAYERS="4", LOOP_START="1", LOOP_END="2", NUM_LOOPS="1", XSA_LAST_N="4", PARALLEL_RESIDUAL_START="3"
    ),
)


@pytest.mark.parametrize("row", suite.ROWS)
def test_a_row_runs_whole(tmp_path, row):
    env = settings(row, tmp_path) | ({} if os.environ.get("NULLGPU_TABLE") else SHALLOW.get(row, {}))
    modules = "fa3_2026" if row == "frontier" else ""
    trained = suite.Run(tmp_path / "run", env | dict(NULLGPU_STOP="trained"), modules=modules)
    assert trained.complaints() == [] and trained.seen()["training"] == 10
    assert ("late_qat:enabled" in trained.text) == (row not in ("pr1812", "frontier"))
    assert ("layer_loop:enabled" in trained.text) == (row in ("pr1812", "frontier")) and trained.text.count(
        "\ntrain_seq_len:"
    ) == 2 * (row == "frontier")
    assert ("gptq:collected" in trained.text) == (row in ("pr490", "pr1812", "frontier"))
    given = {name: env[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "ATTENTION")}
    # adjacent windows for four variants, so that one graph serves the round trip and the sliding window
    given |= (
        dict(EVAL_STRIDE="2048")
        if row in ("pr150", "pr455", "pr490", "pr1812")
        else dict(EVAL_STRIDE="3072")
        if row == "frontier"
        else {}
    )
    evaluated = suite.Run(
        tmp_path / "evaluation",
        given | dict(EVAL_ONLY="1", ARTIFACT=str(tmp_path / "run" / "final_model.int6.ptz")),
        modules=modules,
    )
    assert evaluated.complaints() == [] and sum(phase.endswith(suite.PASSES) for phase in evaluated.seen()) == 3
    assert "legal_ttt_exact" in evaluated.text
    peaks = trained.peaks() | evaluated.peaks()
    suite.keep(row, peaks)
    assert trained.halved() | evaluated.halved() == {} and max(peaks.values()) < suite.gib("h100"), peaks


# fewer blocks; the test above runs both at full depth
TWO = dict(
    card=dict(NUM_LAYERS="4", VE_LAYERS="2,3"),
    pr1812=dict(
        NUM_LAYERS="4", LOOP_START="1", LOOP_END="2", NUM_LOOPS="1", XSA_LAST_N="4", PARALLEL_RESIDUAL_START="3"
    ),
)


@pytest.mark.parametrize("row", TWO)
def test_two_ranks_run_whole(tmp_path, row):
    run = suite.Run(tmp_path / "run", settings(row, tmp_path, 2) | TWO[row], processes=2)
    assert run.complaints() == []
    assert run.seen()["training"] == 10 and len(run.seen()) >= 4
    assert len(run.reports) == 2 and "world_size:2" in run.text and "legal_ttt_exact" in run.text
    assert run.halved() == {} and max(run.peaks().values()) < suite.gib("h100"), run.peaks()


# few blocks, uncompiled, for cards and rows whose memory is not the question
LOOPED = dict(NUM_LAYERS="3", LOOP_START="1", LOOP_END="1", NUM_LOOPS="1", XSA_LAST_N="3", PARALLEL_RESIDUAL_START="2")
FEW = dict(
    card=dict(NUM_LAYERS="2", XSA_LAST_N="1", VE_LAYERS="1"),
    pr150=dict(NUM_LAYERS="3"),
    pr455=dict(NUM_LAYERS="3", XSA_LAST_N="2", VE_LAYERS="2"),
    pr490=dict(NUM_LAYERS="2", XSA_LAST_N="1", TTT_PARAMS="blocks.1.*,*.attn_scale,*.mlp_scale,bigram.scale,tok_emb.*"),
    pr1127=dict(NUM_LAYERS="2", XSA_LAST_N="1"),
    pr1812=LOOPED,
    frontier=LOOPED,
)
# card and row at full depth, and the options that must be halved
WHOLE = {("card", "t4"): {"MICRO_BATCH_TOKENS", "TTT_BATCH_SEQS"}}
SHALLOW_ON_CARDS = [(row, model) for model in ("a100", "4090") for row in suite.ROWS]


def run_on_a_card(folder, row, model, env):
    """A checked run that trains, packs and evaluates. Adjacent windows: one graph serves two evaluations."""
    env = settings(row, folder, model=model) | dict(EVAL_STRIDE="3072" if row == "frontier" else "2048") | env
    run = suite.Run(folder / "run", env, model=model)
    assert run.complaints() == [] and run.seen()["training"] == 10
    assert "legal_ttt_exact" in run.text and "\nRESULT {" in run.text
    assert f"dtype:torch.{'float32' if model == 't4' else 'bfloat16'}" in run.text
    assert max(run.peaks().values()) < suite.gib(model), run.peaks()
    return run


@pytest.mark.parametrize("row,model", WHOLE)
def test_a_row_at_full_depth_fits_into_a_smaller_card(tmp_path, row, model):
    run = run_on_a_card(tmp_path, row, model, {})
    assert set(run.halved()) == WHOLE[row, model], run.halved()


@pytest.mark.parametrize("row,model", SHALLOW_ON_CARDS)
def test_a_shallow_row_runs_whole_on_a_smaller_card(tmp_path, row, model):
    run_on_a_card(tmp_path, row, model, FEW[row] | dict(COMPILE="off"))


def test_ranks_with_different_memory_take_the_same_batch(tmp_path):
    """The second rank's card has too little for 98,304 tokens."""
    env = settings("card", tmp_path, 2) | FEW["card"] | dict(COMPILE="off", EVAL_STRIDE="2048")
    run = suite.Run(tmp_path / "run", env | dict(NULLGPU_MIB="81089,4608"), processes=2, model="h100,4090")
    assert run.complaints() == [] and "\nRESULT {" in run.text
    assert run.halved()["MICRO_BATCH_TOKENS"] == 49_152
    assert [report["micro_batch_tokens"] for report in run.reports] == [49_152, 49_152]
    assert max(run.reports[1]["peaks"].values()) < 4096 << 20, run.reports[1]["peaks"]


# variant, ATTENTION, folder of modules/ with a stand-in for its package, kernel in the log, whether the log warns
KERNELS = [
    ("card", "auto", "fa3_2026", "fa3", False),
    ("card", "auto", "fa2", "fa2", True),
    ("documents", "auto", "fa2", "fa2", True),
    ("documents", "auto", "", "sdpa", True),
    ("pr1127", "fa3", "fa3_2026", "fa3", False),
]  # pr1127: heads of 60 channels, padded to 64


@pytest.mark.parametrize("row,name,modules,kernel,missing", KERNELS)
def test_a_kernel_of_attention_trains_and_scores(tmp_path, row, name, modules, kernel, missing):
    shallow = dict(
        ATTENTION=name,
        NUM_LAYERS="2",
        XSA_LAST_N="1",
        VE_LAYERS="1" * (row == "card"),
        ITERATIONS="4",
        QUANTIZER="gptq",
    )
    if row == "documents":
        row, shallow = "card", shallow | dict(DOCUMENT_ATTENTION="1", VE_LAYERS="")
    short = dict(EVAL_STRIDE="2048", VAL_MAX_TOKENS="70000")  # adjacent windows: one graph serves both evaluations
    run = suite.Run(tmp_path / "run", settings(row, tmp_path) | shallow | short, modules=modules)
    assert run.complaints() == []
    assert run.text.count(f"attention:{kernel} ") == 2 and ("WARNING: attention by" in run.text) == missing


def under_the_null_gpu(code, *args):
    """Output of Python code, run by this environment's torch on the null GPU."""
    env = os.environ | nullgpu.environment(sys.executable) | {"PYTHONPATH": str(suite.HERE.parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_mlp_kernel_trains(tmp_path):
    """A compiled step of `tools.bench.mlp --time` launches the kernel once per block and direction, or never."""
    code = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from tools.bench import bench, mlp
folder, device, launches, jitted = Path(sys.argv[1]), torch.device("cuda"), [], mlp.jitted
cfg = bench.row_config("pr1127", {}, folder)  # with a scale and a bias after the square
cfg = replace(cfg, num_layers=2, xsa_last_n=1, ve_layers=())
mlp.check(cfg, device)
mlp.jitted = lambda: launches.append(1) or jitted()
for name, trainer in mlp.trainers(cfg, device).items():
    step = bench.driven(trainer)
    step()
    launches.clear()
    step()
    print(name, len(launches))
"""
    assert under_the_null_gpu(code, tmp_path).split() == ["off", "0", "on", "4"]


def test_the_mlp_kernel_spills_no_register():
    """With the tile of a Hopper GPU, for both activations."""
    under_the_null_gpu("""
from dataclasses import replace
import train_gpt as t
from tools.bench import mlp
for cfg in (t.Config(), t.Config(activation="silu"), replace(t.Config(), mlp_mult=4.0)):
    for backward in (False, True):
        found = mlp.built(cfg, mlp.TILE, backward)
        assert found["fits"], found
""")


COUNTS = """
import json, os, torch, train_gpt as t
from tools.bench import anatomy, passes
os.environ.pop("PYTORCH_NO_CUDA_MEMORY_CACHING", None)
torch.set_float32_matmul_precision("high")
cfg, device = t.Config(num_layers=4, xsa_last_n=2, ve_layers=(2, 3)), torch.device("cuda")
with anatomy.recording("cuda") as recorder:
    phases = anatomy.measure(anatomy.ours(cfg, False, device), recorder, device)["phases"]
    triton = {name: phases[name]["triton"] for name in ("forward", "backward")}
    found = {name: [counts["launches"], counts["gb"]] for name, counts in triton.items()}
    row = passes.Row(cfg, device, recorder)
    batches, batch = passes.batches(cfg, cfg.eval_stride), row.windows(cfg.eval_stride)
print(json.dumps(found | dict(sliding=[batch[1] / batches, batch[2] / batches])))
"""


@pytest.mark.skipif(not torch.__version__.startswith("2.9."), reason="the counts are of the contest's torch")
def test_a_step_and_a_batch_of_windows_launch_and_move_what_they_did(tmp_path):
    """`card` with 4 blocks: launches and bytes of the fused kernels do not grow."""
    env = (
        os.environ
        | nullgpu.environment(sys.executable)
        | {"PYTHONPATH": str(suite.HERE.parent.parent), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    )
    done = subprocess.run([sys.executable, "-c", COUNTS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (launches, gb) in dict(forward=(49, 9.36), backward=(86, 14.8), sliding=(95, 11.4)).items():
        assert found[name] == [launches, pytest.approx(gb, rel=0.01)], found


# os._exit: short processes of torch 2.15 may abort when autograd threads outlive the interpreter
CHOICE = """
import os, torch, train_gpt as t
cfg = t.Config.from_env(dict(ATTENTION={name!r}, COMPILE={compile!r}))
kind = t.choose_attention(cfg, t.Ranks(device=torch.device("cuda")))
q, k = (torch.zeros(2, 16, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 4))
y = kind.attend(q, k, k)
y.sum().backward()
print(kind.name, tuple(y.shape), kind.warnings, flush=True)
os._exit(0)
"""
CHOICES = [
    ("auto", "auto", "", "sdpa (2, 16, 8, 64) .*without fa3"),
    ("auto", "auto", "fa3_2025_08", "sdpa (2, 16, 8, 64) .*without fa3.*flash_attn_interface registers no operator"),
    ("auto", "auto", "fa3_2025_06", "sdpa (2, 16, 8, 64) .*without fa3.*flash_attn_interface registers no operator"),
    ("auto", "auto", "fa3_broken", "sdpa (2, 16, 8, 64) .*without fa3.*undefined symbol"),
    ("fa3", "auto", "fa3_2025_08", "InputError: ATTENTION=fa3 cannot run: .*registers no operator"),
    ("auto", "off", "fa3_2025_08", "fa3 (2, 16, 8, 64) "),
    ("auto", "off", "fa3_2025_06", "fa3 (2, 16, 8, 64) "),
]


@pytest.mark.parametrize("name,compile,modules,words", CHOICES)
def test_old_and_broken_packages_are_skipped_with_a_warning(name, compile, modules, words):
    env = nullgpu.environment(sys.executable) | {
        "PYTHONPATH": f"{suite.HERE.parent.parent}:{suite.HERE / 'modules' / modules}"
    }
    done = subprocess.run(
        [sys.executable, "-c", CHOICE.format(name=name, compile=compile)], env=env, capture_output=True, text=True
    )
    begin, *rest = words.split(".*")
    assert begin in done.stdout + done.stderr and all(part in done.stdout + done.stderr for part in rest), (
        done.stdout + done.stderr
    )


# the smallest model with every part; it adapts to four batches of documents
SMALL = (
    SMOKE
    | suite.SHORT
    | dict(DTYPE="bf16", NUM_LAYERS="2", XSA_LAST_N="1", VE_LAYERS="1", MICRO_BATCH_TOKENS="256", ITERATIONS="6")
    | dict(WARMDOWN_ITERS="7", VAL_LOSS_EVERY="0", VAL_MAX_TOKENS="600", TTT_SCOPE="document", TTT_CHUNK_TOKENS="16")
    | dict(TTT_LORA_RANK="2", TTT_GRAD_CLIP="0", TTT_BATCH_SEQS="4")
)


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_detected(tmp_path, mistake):
    if mistake == "a bool index" and not torch.__version__.startswith("2.9."):
        pytest.skip("later versions index by a bool")
    right, wrong, words = PLANTED[mistake]
    script, text = tmp_path / "train_gpt.py", suite.SCRIPT.read_text()
    script.write_text(text.replace(right, wrong))
    env = SMALL | suite.dataset(tmp_path, 1024, longest=40)
    complaints = suite.Run(tmp_path / "run", env, script=script).complaints()
    assert any(words in complaint for complaint in complaints), complaints


def test_the_script_has_none_of_these_mistakes(tmp_path):
    assert suite.Run(tmp_path / "run", SMALL | suite.dataset(tmp_path, 1024, longest=40)).complaints() == []
