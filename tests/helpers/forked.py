"""Python processes that start with torch imported: forks of multiprocessing's server, which imports it once.

The import takes 2 s of CPU time, and the first optimizer 2 s more.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch.distributed import TCPStore

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "sentencepiece", "zstandard", "brotli", "tqdm"])  # no module of this repository


def become(argv, env, cwd, folder):
    """Run `python *argv` in this process; stdout and stderr are appended to two files of the folder."""
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # Python's own again
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.path[:0] = ["" if argv[0] in ("-c", "-m") else str(Path(argv[0]).parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(argv[1], vars(sys.modules["__main__"]))
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def ended(children, seconds):
    """The first nonzero exit status, or 0. As with torchrun, a failure of one process ends the others."""
    waiting = {child.sentinel: child for child in children}
    while waiting:
        done = wait(waiting, seconds)
        if not done or any(waiting[sentinel].exitcode for sentinel in done):
            for child in waiting.values():
                child.kill()
            assert done, f"not finished after {seconds} s"
            return next(filter(None, (waiting[sentinel].exitcode for sentinel in done)))
        for sentinel in done:
            waiting.pop(sentinel).join()
    return 0


def python(argv, env, cwd=None, processes=1):
    """Run `python *argv` in `processes` processes, with the variables of torchrun if there are several. Returns the finished process."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [{}]
        if processes > 1:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # alive until the end of this function
            group = dict(WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
            ranks = [{k: str(v) for k, v in (group | dict(RANK=i, LOCAL_RANK=i)).items()} for i in range(processes)]
        argv, cwd = [*map(str, argv)], cwd or os.getcwd()
        children = [FORKS.Process(target=become, args=(argv, {"OMP_NUM_THREADS": "1"} | env | rank, cwd, folder)) for rank in ranks]
        for child in children:
            child.start()
        status = ended(children, 240)
        return subprocess.CompletedProcess(argv, status, *(Path(folder, name).read_text() for name in ("stdout", "stderr")))
