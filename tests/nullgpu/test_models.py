"""Cards of NULLGPU_MODEL: what torch reports of them, where their memory ends, and code compiled for each."""

import json
import os
import subprocess
import sys

import nullgpu
import pytest

# compute capability, multiprocessors, GiB in torch's messages, KiB of shared memory that a block can have
CARDS = dict(
    [
        ("h100", ("NVIDIA H100 80GB HBM3", [9, 0], 132, "79.19", 227)),
        ("h200", ("NVIDIA H200", [9, 0], 132, "139.80", 227)),
        ("b200", ("NVIDIA B200", [10, 0], 148, "178.36", 227)),
        ("a100", ("NVIDIA A100-SXM4-40GB", [8, 0], 108, "39.39", 163)),
        ("a100-80", ("NVIDIA A100-SXM4-80GB", [8, 0], 108, "79.15", 163)),
        ("l4", ("NVIDIA L4", [8, 9], 58, "22.04", 99)),
        ("3090", ("NVIDIA GeForce RTX 3090", [8, 6], 82, "23.69", 99)),
        ("4090", ("NVIDIA GeForce RTX 4090", [8, 9], 128, "23.64", 99)),
        ("5090", ("NVIDIA GeForce RTX 5090", [12, 0], 170, "31.36", 99)),
        ("t4", ("Tesla T4", [7, 5], 40, "14.74", 64)),
    ]
)


def on_cards(code, models, **env):
    """The finished process of Python code on one null GPU of each of these models."""
    null = nullgpu.environment(sys.executable) | dict(NULLGPU_MODEL=",".join(models), NULLGPU_DEVICES=str(len(models)))
    whole = {name: text for name, text in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | null | env
    return subprocess.run([sys.executable, "-c", code], env=whole, capture_output=True, text=True, timeout=600)


def answers(code, models, **env):
    """What the code prints for each model, as JSON in a line each."""
    done = on_cards(code, models, **env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


MEMORY = """
import ctypes, json, torch
from triton.runtime import driver

def allocate(mib):
    return torch.empty(mib << 20, dtype=torch.uint8, device=device)

def error_of(mib):
    try:
        allocate(mib)
    except RuntimeError as error:
        return type(error).__name__, str(error).splitlines()[0]

for device in range(torch.cuda.device_count()):
    torch.cuda.set_device(device)
    properties, (free, total) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info()
    free = free >> 21 << 1  # MiB; torch allocates even numbers of them
    found = dict(name=properties.name, capability=torch.cuda.get_device_capability(), total=total >> 20, free=free)
    found |= dict(processors=properties.multi_processor_count, shared=properties.shared_memory_per_block_optin >> 10)
    found |= dict(triton=driver.active.utils.get_device_properties(device), bf16=torch.cuda.is_bf16_supported(False))
    assert properties.total_memory == total
    whole = allocate(free - 4)
    found |= dict(above=error_of(4096), left=torch.cuda.mem_get_info()[0] >> 20)
    del whole
    halves = [allocate(free // 2 - 4) for _ in range(2)]
    found |= dict(again=error_of(4096))
    del halves
    allocate(free - 4)
    print(json.dumps(found))

counts = (ctypes.c_long * 3)()
ctypes.CDLL(None).nullgpu_counts(counts)
resident = [int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps(dict(peak=counts[2] >> 20, resident=resident[0])))
"""


@pytest.fixture(scope="module", params=["", "1"], ids=["cached", "uncached"])
def memory(request):
    """The answers of each card, and those of the process, with torch's caching allocator and without."""
    *cards, process = answers(MEMORY, CARDS, PYTORCH_NO_CUDA_MEMORY_CACHING=request.param)
    return request.param, dict(zip(CARDS, cards)), process


def test_every_model_is_tested():
    assert list(CARDS) == list(nullgpu.MODELS)


@pytest.mark.parametrize("model", CARDS)
def test_torch_and_triton_see_the_card(memory, model):
    name, capability, processors, gib, shared = CARDS[model]
    found = memory[1][model]
    assert found["name"] == name and found["capability"] == capability and found["bf16"] == (capability >= [8, 0])
    assert found["processors"] == processors == found["triton"]["multiprocessor_count"]
    assert found["shared"] == shared == found["triton"]["max_shared_mem"] >> 10
    assert found["total"] == nullgpu.MODELS[model] and f"{found['total'] / 1024:.2f}" == gib


@pytest.mark.parametrize("model", CARDS)
def test_memory_ends_below_the_card_s_and_is_usable_again(memory, model):
    uncached, cards, _ = memory
    found = cards[model]
    assert found["total"] - 512 - found["free"] in (0, 1) and found["left"] in (4, 5)
    kind, text = found["above"]
    if uncached:
        assert (kind, text) == ("AcceleratorError", "CUDA error: out of memory")
    else:
        assert kind == "OutOfMemoryError" and "Tried to allocate 4.00 GiB" in text
        assert f" has a total capacity of {CARDS[model][3]} GiB of which {found['left']}.00 MiB is free" in text
    assert found["again"][0] == kind


def test_untouched_memory_takes_none_of_the_host_s(memory):
    _, cards, process = memory
    assert process["peak"] == max(found["free"] for found in cards.values()) - 4
    assert process["resident"] < 2048


@pytest.mark.parametrize(
    "env,words",
    [
        (dict(NULLGPU_MODEL="h100,k80"), "NULLGPU_MODEL=k80: choose one of h100, h200, b200, "),
        (dict(NULLGPU_MIB="24G"), "NULLGPU_MIB=24G: choose a number of MiB above 512"),
    ],
)
def test_an_unknown_card_is_refused_in_a_line(env, words):
    done = on_cards("import torch; print([torch.cuda.mem_get_info(d) for d in range(2)])", ["h100", "h100"], **env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(words) and done.stderr.count("\n") == 1


def test_each_device_has_its_own_memory():
    code = "import torch; print(*[torch.cuda.mem_get_info(d)[1] >> 20 for d in range(3)], sep='\\n')"
    assert answers(code, ["4090", "h100", "h100"]) == [24207, 81089, 81089]
    assert answers(code, ["4090", "h100", "h100"], NULLGPU_MIB="2048,1024") == [2048, 1024, 1024]


COMPILED = """
import json, torch
from pathlib import Path
from torch._inductor.runtime.cache_dir_utils import cache_dir

@torch.compile
def loss(x, weight, targets):
    y = torch.nn.functional.leaky_relu(torch.rms_norm(x, (x.size(-1),)) @ weight, 0.5).square()
    return torch.nn.functional.cross_entropy(30 * torch.tanh(y.float() / 30), targets)

seen = set()
for device in range(torch.cuda.device_count()):
    torch.cuda.set_device(device)  # Inductor asks the current device for bf16
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    x, weight = (torch.zeros(256, 256, device=device, dtype=dtype) for _ in range(2))
    loss(x, weight, torch.zeros(256, device=device, dtype=torch.int64))
    built = set(Path(cache_dir()).rglob("*.cubin")) - seen
    seen |= built
    targets = {line for path in built for line in path.with_suffix(".ptx").read_text().splitlines() if ".target" in line}
    print(json.dumps([len(built), sorted(targets)]))
"""


def test_code_is_compiled_for_each_compute_capability(tmp_path):
    models = ["t4", "a100", "3090", "l4", "h100", "b200", "5090"]
    found = answers(COMPILED, models, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    architectures = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]
    assert [targets for _, targets in found] == [[f".target {name}"] for name in architectures]
    assert min(kernels for kernels, _ in found) >= 2, found
