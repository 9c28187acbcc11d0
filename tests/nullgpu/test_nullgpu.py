"""The script on a GPU that computes nothing: whole runs of every contest row, ranks, kernels of attention, and mistakes that must be told.

Tests stand in the order in which they should begin: those that take longest first, and those that find compiled code behind what compiles it.
"""

import json
import os
import subprocess
import sys

import nullgpu
import pytest
import suite
import torch
from planted import PLANTED


@pytest.fixture(autouse=True, scope="session")
def compiler_cache(tmp_path_factory):
    """One for all workers, so that each graph is compiled once; a new one, unless TORCHINDUCTOR_CACHE_DIR names another."""
    base = tmp_path_factory.getbasetemp()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"))


def settings(row, folder, processes=1):
    """A short run of a row, at full size, in which each rank has the batch of one of eight."""
    tokens = (65_536 if row == "pr1127" else 98_304) * processes
    large = row in ("pr1812", "frontier")
    data = suite.dataset(folder, 8192 if large else 1024, longest=3400 if row == "frontier" else 2300)
    env = suite.SHORT | data | dict(VARIANT=row, TRAIN_BATCH_TOKENS=str(tokens)) | (dict(ATTENTION="fa3") if row == "frontier" else {})
    return {name: text for name, text in env.items() if not large or name != "WARMDOWN_ITERS"}  # there it is a share of the run


# of 4 blocks unless the table of memory is asked for: the other rows have their parts at full depth
SHALLOW = dict(
    pr150=dict(NUM_LAYERS="4"),
    pr455=dict(NUM_LAYERS="4", VE_LAYERS="2,3"),
    frontier=dict(NUM_LAYERS="4", LOOP_START="1", LOOP_END="2", NUM_LOOPS="1", XSA_LAST_N="4", PARALLEL_RESIDUAL_START="3"),
)


@pytest.mark.parametrize("row", suite.ROWS)
def test_a_row_runs_whole(tmp_path, row):
    env = settings(row, tmp_path) | ({} if os.environ.get("NULLGPU_TABLE") else SHALLOW.get(row, {}))
    modules = "fa3_2026" if row == "frontier" else ""
    trained = suite.Run(tmp_path / "run", env | dict(NULLGPU_STOP="trained"), modules=modules)
    assert trained.complaints() == [] and trained.seen()["training"] == 10
    assert ("late_qat:enabled" in trained.text) == (row not in ("pr1812", "frontier"))
    assert ("layer_loop:enabled" in trained.text) == (row in ("pr1812", "frontier")) and trained.text.count("\ntrain_seq_len:") == 2 * (row == "frontier")
    assert ("gptq:collected" in trained.text) == (row in ("pr490", "pr1812", "frontier"))
    given = {name: env[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "ATTENTION")}
    # four rows with windows side by side, so that one graph serves the plain and the sliding pass; the others slide
    given |= dict(EVAL_STRIDE="2048") if row in ("pr150", "pr455", "pr490", "pr1812") else dict(EVAL_STRIDE="3072") if row == "frontier" else {}
    evaluated = suite.Run(tmp_path / "evaluation", given | dict(EVAL_ONLY="1", ARTIFACT=str(tmp_path / "run" / "final_model.int6.ptz")), modules=modules)
    assert evaluated.complaints() == [] and sum(phase.endswith(suite.PASSES) for phase in evaluated.seen()) == 3
    assert "legal_ttt_exact" in evaluated.text
    peaks = trained.peaks() | evaluated.peaks()
    suite.keep(row, peaks)
    assert max(peaks.values()) < suite.MOST_GIB, peaks


# with fewer blocks, of pr1812 two looped: both are whole at full depth in the test above
TWO = dict(
    card=dict(NUM_LAYERS="4", VE_LAYERS="2,3"),
    pr1812=dict(NUM_LAYERS="4", LOOP_START="1", LOOP_END="2", NUM_LOOPS="1", XSA_LAST_N="4", PARALLEL_RESIDUAL_START="3"),
)


@pytest.mark.parametrize("row", TWO)
def test_two_ranks_run_whole(tmp_path, row):
    run = suite.Run(tmp_path / "run", settings(row, tmp_path, 2) | TWO[row], processes=2)
    assert run.complaints() == []
    assert run.seen()["training"] == 10 and len(run.seen()) >= 4
    assert len(run.reports) == 2 and "world_size:2" in run.text and "legal_ttt_exact" in run.text
    assert max(run.peaks().values()) < suite.MOST_GIB, run.peaks()


# the row, ATTENTION, the folder of modules/ that stands in for its package, the kernel of the log, whether the log misses FlashAttention-3
KERNELS = [("card", "auto", "fa3_2026", "fa3", False), ("card", "auto", "fa2", "fa2", True),
           ("documents", "auto", "fa2", "fa2", True), ("documents", "auto", "", "sdpa", True),
           ("pr1127", "fa3", "fa3_2026", "fa3", False)]  # the last has heads of 60 channels, which are padded


@pytest.mark.parametrize("row,name,modules,kernel,missing", KERNELS)
def test_a_kernel_of_attention_trains_and_scores(tmp_path, row, name, modules, kernel, missing):
    shallow = dict(ATTENTION=name, NUM_LAYERS="2", XSA_LAST_N="1", VE_LAYERS="1" * (row == "card"), ITERATIONS="4", QUANTIZER="gptq")
    if row == "documents":
        row, shallow = "card", shallow | dict(DOCUMENT_ATTENTION="1", VE_LAYERS="")
    short = dict(EVAL_STRIDE="2048", VAL_MAX_TOKENS="70000")  # windows side by side in each pass, so that one graph serves both
    run = suite.Run(tmp_path / "run", settings(row, tmp_path) | shallow | short, modules=modules)
    assert run.complaints() == []
    assert run.text.count(f"attention:{kernel} ") == 2 and ("WARNING: attention by" in run.text) == missing


def under_the_null_gpu(code, *args):
    """What Python code prints, run with this environment's torch on the null GPU."""
    env = os.environ | nullgpu.environment(sys.executable) | {"PYTHONPATH": str(suite.HERE.parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_mlp_kernel_trains(tmp_path):
    """The trainers of `tools.bench.mlp --time`: a compiled step launches the kernel once a block and pass, or never."""
    code = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from tools.bench import bench, mlp
folder, device, launches, jitted = Path(sys.argv[1]), torch.device("cuda"), [], mlp.jitted
cfg = bench.row_config("pr1127", {}, folder, 1)  # with a scale and a bias after the square
cfg = replace(cfg, num_layers=2, xsa_last_n=1, ve_layers=(), data_path=str(folder / "tokens"))
bench.write_tokens(folder / "tokens", cfg.vocab_size)
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
    """With the tile that a GPU uses, on Hopper's instructions, for either activation."""
    under_the_null_gpu("""
from dataclasses import replace
import train_gpt as t
from tools.bench import mlp
for cfg in (t.Config(), t.Config(activation="silu"), replace(t.Config(), mlp_mult=4.0)):
    for backward in (False, True):
        found = mlp.built(cfg, mlp.TILE, backward)
        assert found.fits, found
""")


COUNTS = """
import json, os, torch, train_gpt as t
from tools.bench import anatomy, passes
os.environ.pop("PYTORCH_NO_CUDA_MEMORY_CACHING", None)
torch.set_float32_matmul_precision("high")
cfg, device = t.Config(num_layers=4, xsa_last_n=2, ve_layers=(2, 3)), torch.device("cuda")
with anatomy.recording("cuda") as recorder:
    phases = anatomy.measure(anatomy.ours(cfg, False, device), recorder, device)["phases"]
    found = {name: [phases[name]["triton"]["launches"], phases[name]["triton"]["gb"]] for name in ("forward", "backward")}
    row = passes.Row(cfg, device, recorder)
    batches, batch = passes.batches(cfg, cfg.eval_stride), row.windows(cfg.eval_stride)
print(json.dumps(found | dict(sliding=[batch.launches // batches, batch.gb / batches])))
"""


@pytest.mark.skipif(not torch.__version__.startswith("2.9."), reason="the counts are of the contest's torch")
def test_a_step_and_a_batch_of_windows_launch_and_move_what_they_did(tmp_path):
    """`card` of 4 blocks: weights ready by one kernel a stack, norm and rotation by one, nothing computed again for its readers."""
    env = os.environ | nullgpu.environment(sys.executable) | {"PYTHONPATH": str(suite.HERE.parent.parent), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COUNTS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (launches, gb) in dict(forward=(40, 9.4), backward=(75, 14.8), sliding=(68, 8.44)).items():
        assert found[name] == [launches, pytest.approx(gb, rel=0.01)], found


# it leaves at once: short processes of torch 2.15 may abort when threads of autograd meet the interpreter's end
CHOICE = """
import os, torch, train_gpt as t
cfg = t.Config.from_env(dict(ATTENTION={name!r}, COMPILE={compile!r}))
kind = t.choose_attention(cfg, t.Ranks(device=torch.device("cuda")))
q, k = (torch.zeros(2, 16, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 4))
y = kind.attend(q, k, k)
y.sum().backward()
print(kind.name, tuple(y.shape), kind.warning, flush=True)
os._exit(0)
"""
CHOICES = [
    ("auto", "auto", "", "sdpa (2, 16, 8, 64) .*WARNING.*fa3"),
    ("auto", "auto", "fa3_2025_08", "sdpa (2, 16, 8, 64) .*WARNING.*flash_attn_interface registers no operator"),
    ("auto", "auto", "fa3_2025_06", "sdpa (2, 16, 8, 64) .*WARNING.*flash_attn_interface registers no operator"),
    ("auto", "auto", "fa3_broken", "sdpa (2, 16, 8, 64) .*WARNING.*undefined symbol"),
    ("fa3", "auto", "fa3_2025_08", "InputError: ATTENTION=fa3 cannot run: .*registers no operator"),
    ("auto", "off", "fa3_2025_08", "fa3 (2, 16, 8, 64) "),
    ("auto", "off", "fa3_2025_06", "fa3 (2, 16, 8, 64) "),
]


@pytest.mark.parametrize("name,compile,modules,words", CHOICES)
def test_old_and_broken_packages_are_passed_over_aloud(name, compile, modules, words):
    env = nullgpu.environment(sys.executable) | {"PYTHONPATH": f"{suite.HERE.parent.parent}:{suite.HERE / 'modules' / modules}"}
    done = subprocess.run([sys.executable, "-c", CHOICE.format(name=name, compile=compile)], env=env, capture_output=True, text=True)
    begin, *rest = words.split(".*")
    assert begin in done.stdout + done.stderr and all(part in done.stdout + done.stderr for part in rest), done.stdout + done.stderr


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_told(tmp_path, mistake):
    if mistake == "a bool index" and not torch.__version__.startswith("2.9."):
        pytest.skip("later versions index by a bool")
    right, wrong, words = PLANTED[mistake]
    script, text = tmp_path / "train_gpt.py", suite.SCRIPT.read_text()
    script.write_text(text.replace(right, wrong))
    complaints = suite.Run(tmp_path / "run", suite.SMALL | suite.dataset(tmp_path, 1024), script=script).complaints()
    assert any(words in complaint for complaint in complaints), complaints


def test_without_them_there_is_nothing_to_tell(tmp_path):
    assert suite.Run(tmp_path / "run", suite.SMALL | suite.dataset(tmp_path, 1024)).complaints() == []
