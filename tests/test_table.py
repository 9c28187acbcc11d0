"""tools/table.py on small logs of known content."""

import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import table  # noqa: E402


def write_log(path, variant, raw, ttt, size):
    path.write_text(f"variant:{variant} seed:1 overrides: none\nmodel_params:1234567 attention:sdpa\nTotal submission size int6+zstd: {size} bytes\n"
                    f"DIAGNOSTIC raw val_loss:9.0 val_bpb:{raw} eval_time:1ms\nDIAGNOSTIC post_ema val_loss:9.0 val_bpb:2.5 eval_time:1ms\n"
                    "final_int6_roundtrip val_loss:9 val_bpb:8 eval_time:1ms\nfinal_int6_roundtrip_exact val_loss:9.0 val_bpb:2.60000000\n"
                    f"final_int6_sliding_window_exact val_loss:9.0 val_bpb:2.40000000\nlegal_ttt_exact val_loss:9.0 val_bpb:{ttt}\n")
    return path


def test_a_row_is_the_mean_and_the_standard_deviation_of_its_runs(tmp_path):
    logs = [write_log(tmp_path / "a.txt", "card", 2.1, 2.0, 1000), write_log(tmp_path / "b.txt", "card", 2.3, 2.0, 3000),
            write_log(tmp_path / "c.txt", "pr150", 2.0, 1.5, 5)]
    out = subprocess.run([sys.executable, str(ROOT / "tools" / "table.py"), *map(str, logs)], capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.strip().splitlines()]
    assert rows[0][:4] == ["variant", "runs", "parameters", "code + model"]
    assert rows[2] == ["`card`", "2", "1,234,567", "2,000", "2.2000 ± 0.1414", "2.5000 ± 0.0000", "2.6000 ± 0.0000", "2.4000 ± 0.0000", "2.0000 ± 0.0000"]
    assert rows[3][:4] == ["`pr150`", "1", "1,234,567", "5"] and rows[3][-1] == "1.5000"


def test_a_log_that_is_not_finished_is_named(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("variant:card seed:1\n")
    with pytest.raises(SystemExit, match="x.txt has no parameters"):
        table.read(path)
    with pytest.raises(SystemExit, match="cannot read"):
        table.read(tmp_path / "none")
