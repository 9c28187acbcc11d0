import subprocess
import sys

import pytest
from conftest import ROOT

LOG = """source:train_gpt.py
step:1/9 train_loss:6.9000 train_time:10ms step_avg:10.00ms
step:2/9 val_loss:6.5000 val_bpb:3.1000 eval_time:5ms train_time:20ms
step:2/9 train_loss:6.4000 train_time:20ms step_avg:10.00ms
legal_ttt_exact val_loss:6.10000000 val_bpb:2.90000000
"""


def plot(*args):
    return subprocess.run([sys.executable, str(ROOT / "tools" / "plot.py"), *map(str, args)], capture_output=True, text=True)


def test_logs_are_read_as_written(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import plot as module

    (tmp_path / "a.txt").write_text(LOG)
    points, stages = module.read_log(tmp_path / "a.txt")
    assert points["train"] == [(1, 10 / 60_000, 6.9), (2, 20 / 60_000, 6.4)] and points["val"] == [(2, 20 / 60_000, 6.5)]
    assert stages == {"legal_ttt": 2.9}


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_several_logs_make_one_picture(tmp_path, suffix, magic):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(LOG)
    out = tmp_path / f"curve.{suffix}"
    done = plot(tmp_path / "a.txt", tmp_path / "b.txt", "-o", out)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(magic) and out.stat().st_size > 5000


def test_a_file_that_is_no_log_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("nothing")
    done = plot(tmp_path / "x.txt", "-o", tmp_path / "x.png")
    assert done.returncode == 1 and "is it a log" in done.stderr and not (tmp_path / "x.png").exists()
