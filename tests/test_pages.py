"""The pages are short, begin with a summary, and their tables hold the numbers of the files that they name."""

import json
import re
import statistics

import pytest
from conftest import ROOT

from tools.record.logs import read_run

PAGES = [path for part in ("", "data", "logs", "tests", "tools") for path in sorted((ROOT / part).glob("*.md"))]
REPORTS = [path.name for path in PAGES if path.parent.name == "logs"]
TTT = {
    "sliding window (validation: stride 64)": "sgd",
    "SGD, all weights, 3 epochs": "sgd",
    "AdamW, last 2 blocks, 3 epochs (`pr490`)": "adamw2",
    "LoRA over the stream (`pr1127`)": "lora",
    "LoRA per document, chunks of 128": "doc",
    "LoRA per document, chunks of 64": "doc64",
}  # the names in logs/ttt


def table(page: str, head: str) -> list[list[str]]:
    """The cells of the table of a page of logs/ whose first cell is `head`, without its first two lines."""
    text = (ROOT / "logs" / page).read_text(encoding="utf-8")
    block = re.search(rf"^\| {re.escape(head)} \|.*\n(?:\|.*\n)+", text, re.M)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]


def test_all_pages_together_are_short():
    assert len(PAGES) == 12
    assert sum(len(path.read_text(encoding="utf-8").split()) for path in PAGES) <= 7_350


@pytest.mark.parametrize("page", REPORTS)
def test_a_report_begins_with_a_short_summary(page):
    summary = (ROOT / "logs" / page).read_text(encoding="utf-8").split("\n## ")[0]
    _title, *lines = [line for line in summary.splitlines() if line]
    assert len(lines) <= 15
    assert summary.startswith("# ") and 0 < summary.index("**Question:**") < summary.index("**Answer:**")


def test_the_predicted_times_are_those_of_the_counts():
    steps = {(row["name"], row["looped"]): row for row in json.loads((ROOT / "logs" / "anatomy.json").read_text())}
    passes = {row["name"]: row for row in json.loads((ROOT / "logs" / "passes.json").read_text())}
    rows = table("speed.md", "variant")
    assert {row[0].strip("`") for row in rows} == passes.keys()
    for variant, launches, gb, tflop, peak, ms, *seconds in rows:
        name = variant.strip("`")
        step = steps[name, (name, True) in steps]
        kernels = [step["phases"][phase] for phase in ("forward", "backward")]
        assert launches == " + ".join(str(phase["triton"]["launches"]) for phase in kernels), name
        assert gb == " + ".join(f"{phase['triton']['gb']:.1f}" for phase in kernels), name
        sums = [sum(phase[kind]["tflop"] for phase in kernels) for kind in ("product", "attention")]
        assert [float(part) for part in tflop.split(" + ")] == pytest.approx(sums, abs=0.0101), name
        assert (peak, ms) == (f"{step['peak_gib']:.1f}", str(step["predicted_ms"]["optimizer of 1/1"])), name
        assert seconds == [str(passes[name][kind]["seconds"]) for kind in ("plain", "sliding", "adapting")], name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{steps['card', False]['predicted_ms']['optimizer of 1/1']} ms" in " ".join(readme.split())


def logged(split: str, kind: str, rate: str) -> str:
    """The final score of a log of logs/ttt, to five digits; without a rate, the score of its sliding window."""
    path = ROOT / "logs" / "ttt" / f"{split}_{TTT[kind]}_{'0.002' if rate == '-' else rate}.txt"
    stage = "final_int6_sliding_window" if rate == "-" else "legal_ttt"
    found = re.search(rf"^{stage}_exact .*val_bpb:(\S+)", path.read_text(encoding="utf-8"), re.M)
    return f"{float(found[1]):.5f}"


def test_the_scores_of_test_time_training_are_in_their_logs():
    kind, checked = "", 0
    for name, rate, *scores in table("evaluation.md", "kind"):
        kind = name or kind
        for split, score in zip("hv", scores, strict=True):
            if score != "-":
                assert score == logged(split, kind, rate), (kind, rate, split)
                checked += 1
    assert checked == 14


def test_the_race_of_the_readme_is_that_of_its_logs():
    """Mean and standard deviation over seeds; no model file has more bytes than one of the baseline's."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^\| bits per byte \|.*\n(?:\|.*\n)+", readme, re.M)[0]
    rows = {label: cells for label, *cells in (re.split(r" *\| *", line.strip("| ")) for line in block.splitlines())}
    sizes = {}
    for column, name in enumerate(("baseline", "card", "pr1812", "frontier")):
        runs = [read_run(ROOT / "logs" / "race" / f"{name}-{seed}.txt") for seed in (1, 2, 3)]
        first = "raw" if name == "baseline" else "averaged"
        for label, stage in {
            "averaged": first,
            "round trip": "coded",
            "sliding window": "sliding",
            "TTT": "ttt",
        }.items():
            bpb = [run.scores[stage].bpb for run in runs if stage in run.scores]
            expected = f"{statistics.mean(bpb):.4f} ± {statistics.stdev(bpb):.4f}" if len(bpb) == 3 else "-"
            assert rows[label][column] == expected, (name, label)
        text = r"^Serialized model int8\+zlib: (\d+)" if name == "baseline" else r'"model_bytes": (\d+)'
        sizes[name] = [int(re.search(text, run.text, re.M)[1]) for run in runs]
        assert rows["largest model file, bytes"][column] == f"{max(sizes[name]):,}"
    assert max(map(max, list(sizes.values())[1:])) <= min(sizes["baseline"])
