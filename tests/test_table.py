"""tools.table on logs in logs/five, against numbers that are read from them in another way."""

import re
import statistics

import pytest
from conftest import ROOT, finals, tool

FIVE = ROOT / "logs" / "five"


def table(*logs):
    return tool("tools.table", *logs)


def test_a_row_is_the_mean_and_the_standard_deviation_of_its_runs():
    done = table(FIVE / "pr490-2.txt", FIVE / "pr150-1.txt", FIVE / "pr490-1.txt")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.strip().splitlines()]
    assert rows[0] == ["variant", "runs", "parameters", "code + model", "raw", "averaged", "int6", "sliding", "TTT"] and len(rows) == 4
    texts = [(FIVE / f"pr490-{seed}.txt").read_text() for seed in (1, 2)]
    sizes = [int(re.search(r"^Total submission size \S+ (\d+)", text, re.M)[1]) for text in texts]
    assert rows[2][:4] == ["`pr490`", "2", "1,900,397", f"{sum(sizes) / 2:,.0f}"]
    for column, stage in ((6, "final_int6_roundtrip"), (7, "final_int6_sliding_window"), (8, "legal_ttt")):
        scores = [finals(text)[stage] for text in texts]
        assert rows[2][column] == f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}"
    raw = [float(re.search(r"DIAGNOSTIC raw .*val_bpb:(\S+)", text)[1]) for text in texts]
    assert rows[2][4] == f"{statistics.mean(raw):.4f} ± {statistics.stdev(raw):.4f}"
    assert rows[3][:2] == ["`pr150`", "1"] and rows[3][-1] == f"{finals((FIVE / 'pr150-1.txt').read_text())['legal_ttt']:.4f}"


@pytest.mark.parametrize("change, words", [
    (lambda text: text[: text.index("artifact:")], " has no score of the stage coded; give the log of a finished run"),
    (lambda text: "".join(line for line in text.splitlines(True) if not line.startswith("legal_ttt")), " has no stage legal_ttt"),
    (None, "cannot read")])
def test_a_log_that_is_not_finished_is_named(tmp_path, change, words):
    path = tmp_path / "x.txt"
    if change:
        path.write_text(change((FIVE / "card-1.txt").read_text()))
    done = table(FIVE / "card-2.txt", path)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("tools.table: ") and words in done.stderr and str(path) in done.stderr
