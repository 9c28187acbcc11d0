"""tools.plot: the numbers in the figures are those of the logs, nothing is cut off, and the command itself."""

import re
import resource
import statistics
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, finals, make_model, tool
from matplotlib.backends.backend_agg import FigureCanvasAgg

import tools.plot
import train_gpt as t
from tools.model import inspect, quantization
from tools.record import logs

FIVE = ROOT / "logs" / "five"
LONG = "a_name_of_a_run_that_tells_of_all_of_its_settings_and_of_more_"
LOG = """variant:smoke seed:7 overrides: VARIANT=smoke SEED=7 TRAIN_BATCH_TOKENS=512
step:1/9 train_loss:6.9000 train_time:1000ms step_avg:10.00ms
step:2/9 val_loss:6.5000 val_bpb:3.1000 eval_time:5ms train_time:2000ms
step:2/9 train_loss:6.4000 train_time:2000ms step_avg:10.00ms
final_int6_roundtrip_exact val_loss:6.20000000 val_bpb:2.95000000
legal_ttt_exact val_loss:6.10000000 val_bpb:2.90000000
"""


def written(tmp_path, name="a", text=LOG):
    (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path / f"{name}.txt"


def curve_of(tmp_path, name, losses, ms=200, every=0):
    """The log of an unfinished run with a validation every so many steps."""
    steps = range(1, len(losses) + 1)
    lines = [f"step:{i}/999 train_loss:{loss:.4f} train_time:{ms * i}ms" for i, loss in zip(steps, losses)]
    lines += [
        f"step:{i}/999 val_loss:{7 - i / 100:.4f} val_bpb:3 train_time:{ms * i}ms"
        for i in steps
        if every and i % every == 0
    ]
    return logs.read_run(written(tmp_path, name, "\n".join([LOG.splitlines()[0], *lines, ""])))


def changed(run, **facts):
    return logs.RunLog(**vars(run) | facts)


def cut_off(figure, inside=True):
    """Pixels outside of the figure on each side, labels outside of their panels, and labels that cover each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, page = canvas.get_renderer(), figure.bbox
    box = figure.get_tightbbox(renderer).transformed(figure.dpi_scale_trans)
    beyond = [page.x0 - box.x0, page.y0 - box.y0, box.x1 - page.x1, box.y1 - page.y1]
    for panel in figure.axes:
        assert panel.bbox.width > 150 and panel.bbox.height > 100, "no room is left for the panel"
    boxes = [
        (it, it.get_window_extent(renderer), panel.bbox) for panel in figure.axes for it in panel.texts if it.get_text()
    ]
    leave = [it.get_text() for it, own, its in boxes if inside and (own.x1 > its.x1 + 8 or own.x0 < its.x0 - 8)]
    cover = [
        f"{it.get_text()} over {other.get_text()}"
        for i, (it, own, _) in enumerate(boxes)
        for other, its, _ in boxes[:i]
        if own.padded(-1).overlaps(its.padded(-1))
    ]
    return [round(by) for by in beyond if by > 1] + leave + cover


# ---- Curves.


def test_logs_are_read_as_written(tmp_path):
    run = logs.read_run(written(tmp_path))
    assert run.points == {"train": [(1, 1000, 6.9), (2, 2000, 6.4)], "val": [(2, 2000, 6.5)]}
    assert run.variant == "smoke" and {stage: score.bpb for stage, score in run.scores.items() if stage != "raw"} == {
        "coded": 2.95, "ttt": 2.9}  # fmt: skip
    unfinished = logs.read_run(written(tmp_path, text="".join(LOG.splitlines(True)[:-2])))
    assert unfinished.points == run.points and not unfinished.scores


def test_both_panels_have_the_points_of_the_log(tmp_path):
    steps, time = (figure := tools.plot.draw_curves([logs.read_run(written(tmp_path))])).axes
    for panel, x in ((steps, [1, 2]), (time, [1, 2])):
        thin, thick, marks = panel.lines
        assert [*thin.get_xdata()] == x and [*thin.get_ydata()] == [*thick.get_ydata()] == [6.9, 6.4]
        assert [*marks.get_xdata()] == [2] and [*marks.get_ydata()] == [6.5]
        assert thin.get_linewidth() < 1 < thick.get_linewidth() and marks.get_markeredgecolor() == "black"
    assert (steps.get_xlabel(), time.get_xlabel()) == ("step", "training time, seconds")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a, final 2.9000 bpb"]
    long = tools.plot.draw_curves([curve_of(tmp_path, "b", [3, 2], ms=90_000)]).axes[1]
    assert [*long.lines[0].get_xdata()] == [1.5, 3] and long.get_xlabel() == "training time, minutes"


def test_the_baseline_joins_a_race():
    names = ["race_baseline", "race_same_shape"]
    runs = [logs.read_run(ROOT / "logs" / f"2026-11-22_{name}.txt") for name in names]
    assert runs[0].points["train"][-1] == (3020, 898070, 3.5061) and runs[0].points["val"] == [(3027, 900138, 3.4702)]
    figure = tools.plot.draw_curves(runs)
    finals_ = [text.get_text() for text in figure.legends[0].get_texts()]
    assert finals_[0] == "baseline, final 2.0339 bpb" and [*figure.axes[0].lines[0].get_xdata()][-1] == 3020


def test_curves_can_be_told_apart_without_color(tmp_path):
    run = logs.read_run(written(tmp_path))
    for panel in tools.plot.draw_curves([run] * 6).axes:
        thick, marks = panel.lines[1::3], panel.lines[2::3]
        assert len({line.get_linestyle() + str(line._dash_pattern) for line in thick}) == 6
        assert len({line.get_marker() for line in marks}) == 6


@pytest.mark.parametrize("count", [1, 2, 15, 16, 200])
def test_marks_of_many_validations_do_not_hide_the_curve(tmp_path, count):
    """At most 15, and the last validation has one."""
    line = tools.plot.draw_curves([curve_of(tmp_path, "a", [5.0] * count, every=1)]).axes[0].lines[2]
    first, every = line.get_markevery()
    marked = line.get_xdata()[first::every]
    assert len(line.get_xdata()) == count and marked[-1] == count and min(count, 8) <= len(marked) <= 15


@pytest.mark.parametrize("steps, every", [(1, 1), (10, 1), (10, 3), (50, 1)])
def test_every_point_of_a_short_run_is_in_the_picture(tmp_path, steps, every):
    losses = [6.9, 5.0, *[4 + i % 2 / 100 for i in range(steps)]][:steps]
    figure = tools.plot.draw_curves([curve_of(tmp_path, "a", losses, every=every)])
    for panel, scale in zip(figure.axes, (1, 0.2)):
        low, high = panel.get_ylim()
        shown = {float(y) for line in panel.lines for y in line.get_ydata()}
        assert set(losses) <= shown and low < min(shown) and max(shown) < high
        assert panel.get_xlim()[0] == 0 and scale * steps < panel.get_xlim()[1] < 1.1 * scale * steps
    assert "not shown" not in figure.get_suptitle()


def test_a_long_run_says_what_is_cut_and_its_end_can_be_read(tmp_path):
    """Neither the first losses nor one high step widen the picture; the end of the worst run is in it."""
    good, bad = ([start] * 4 + [end - i / 100 for i in range(96)] for start, end in ((9.0, 4), (12.0, 5)))
    good[60] = 20.0
    figure = tools.plot.draw_curves([curve_of(tmp_path, "a", good), curve_of(tmp_path, "b", bad)])
    low, high = figure.axes[0].get_ylim()
    assert low < good[-1] and bad[-1] < high < 6 and f"losses above {high:.2f} are not shown" in figure.get_suptitle()


def test_the_thick_line_is_the_mean_of_a_tenth_of_the_log_around(tmp_path):
    losses = [3 + (i * 37 % 100) / 100 for i in range(100)]
    thin, thick, _ = tools.plot.draw_curves([curve_of(tmp_path, "a", losses)]).axes[0].lines
    assert [*thin.get_ydata()] == pytest.approx(losses)
    for at, around in ((50, losses[45:56]), (0, losses[:6]), (3, losses[:9]), (99, losses[94:])):
        assert thick.get_ydata()[at] == pytest.approx(statistics.mean(around))


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("prefix", ["run", LONG, 3 * LONG])
def test_nothing_of_a_picture_of_curves_is_cut(tmp_path, count, prefix):
    run = logs.read_run(written(tmp_path))
    runs = [changed(run, path=tools.plot.Path(f"{prefix}{i}.txt")) for i in range(count)]
    assert cut_off(tools.plot.draw_curves(runs)) == []


@pytest.mark.parametrize(
    "names, short",
    [
        (["2026_race_a", "2026_race_ab"], ["a", "ab"]),
        (["run", "run-2"], ["run", "run-2"]),
        (["x_1"], ["x_1"]),
        (["x/a_1", "y/a_1"], ["x/a_1.txt", "y/a_1.txt"]),
    ],
)
def test_names_are_as_short_as_they_differ(names, short):
    assert tools.plot.short_names([SimpleNamespace(path=tools.plot.Path(f"{name}.txt")) for name in names]) == short


# ---- Scores.

RACE = {
    "baseline": [2.0011, 2.0031],
    "card": [1.9106, 1.9110, 1.9167, 1.9065, 1.8748],
    "pr1812": [1.8282, 1.8289, 1.8309, 1.8118],
    "frontier": [1.7858, 1.7823, 1.7833, 1.7709, 1.7511],
}


def test_the_race_of_the_readme_is_drawn_from_its_logs():
    """An EVAL_ONLY log joins the line of its artifact in any order; its scores do not replace those of training."""
    names = ["card_adapted", "frontier", "baseline", "card", "frontier_adapted", "pr1812"]
    runs = [logs.read_run(ROOT / "logs" / f"2026-11-22_race2_{name}.txt") for name in names]
    (panel,) = (figure := tools.plot.draw_scores(runs)).axes
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    drawn = [[round(float(y), 4) for y in line.get_ydata()] for line in panel.lines]
    assert drawn == [*RACE.values()] and labels == [f"{name}, {values[-1]:.4f}" for name, values in RACE.items()]
    assert [[*line.get_xdata()] for line in panel.lines] == [[0, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert {text.get_text() for text in panel.texts} == {f"{value:.4f}" for line in drawn for value in line}
    assert cut_off(figure) == []


@pytest.mark.parametrize("count", [1, 2, 7, 20])
@pytest.mark.parametrize("prefix", ["run", 2 * LONG])
def test_nothing_of_a_picture_of_scores_is_cut(tmp_path, count, prefix):
    """Numbers do not cover each other, however close the scores are."""
    run, runs = logs.read_run(written(tmp_path)), []
    for i in range(count):
        scores = {stage: logs.Score(0, bpb, 0) for stage, bpb in (("raw", 2 + i / 100), ("coded", 2.1), ("ttt", 1.9))}
        runs.append(changed(run, path=tools.plot.Path(f"{prefix}{i}.txt"), artifact_sha256=str(i), scores=scores))
    assert cut_off(tools.plot.draw_scores(runs)) == []


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
def test_nothing_of_a_picture_of_stages_is_cut(count):
    runs = [logs.read_scored(FIVE / f"card-{seed}.txt") for seed in (1, 2)]
    for part in (runs, runs[:1]):
        many = [changed(run, variant=f"variant{i}") for i in range(count) for run in part]
        assert cut_off(tools.plot.draw_stages(many)) == []


def test_stages_are_the_scores_of_the_logs_with_their_spread():
    paths = [FIVE / f"{name}.txt" for name in ("pr490-1", "pr150-3", "pr490-2")]
    first, second = tools.plot.draw_stages([logs.read_scored(path) for path in paths]).axes
    assert (first.get_title(), second.get_title()) == ("pr490, 2 seeds", "pr150, 1 seed")
    texts, weights = [paths[at].read_text() for at in (0, 2)], r"^DIAGNOSTIC.* val_bpb:(\S+)"
    scores = [[*map(float, re.findall(weights, text, re.M)), *finals(text).values()] for text in texts]
    dots, _, (bars,) = first.containers[0]
    assert [label.get_text() for label in first.get_xticklabels()] == ["raw", "averaged", "reloaded", "sliding", "TTT"]
    assert [*dots.get_ydata()] == pytest.approx([statistics.mean(pair) for pair in zip(*scores)], abs=1e-9)
    for (low, high), pair in zip((segment[:, 1] for segment in bars.get_segments()), zip(*scores)):
        assert (high - low) / 2 == pytest.approx(statistics.stdev(pair), abs=1e-9)
    heights = [high - low for low, high in (first.get_ylim(), second.get_ylim())]
    assert heights[0] == pytest.approx(heights[1])


# ---- Artifacts.


def test_the_bars_of_an_artifact_add_up_to_it(cfg, tmp_path):
    model = make_model(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    path = tmp_path / "model.ptz"
    path.write_bytes(t.pack(t.quantize(weights, t.quant_plans(weights, t.quant_specs(model, cfg), cfg, {})), False, cfg))
    found = inspect.contents(path, ROOT / "train_gpt.py")
    (panel,) = tools.plot.draw_artifact(path).axes
    before, by_entropy = ([bar.get_width() for bar in bars] for bars in panel.containers)
    assert sum(before) == found["raw"] and sum(by_entropy) == pytest.approx(found["estimate"], abs=1)
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert f"blocks.*.mlp.fc.weight ({cfg.num_layers} x int8)" in names and re.fullmatch(
        r"\d+ groups below 1 %", names[-1]
    )
    assert f"{len(path.read_bytes()):,} in the file" in panel.figure.get_suptitle()


@pytest.mark.parametrize("scale, name", [(1, "m.ptz"), (1000, "m.ptz"), (1000, f"{3 * LONG}.ptz")])
def test_nothing_of_a_picture_of_an_artifact_is_cut(monkeypatch, scale, name):
    rows = [
        SimpleNamespace(
            name=f"blocks.*.value_embed.{'long.' * (i % 3)}weight", count=11, dtype="float16", raw=15_731 * scale,
            estimate=15_731 * scale / (i + 1),
        )
        for i in range(12)
    ]  # fmt: skip
    size = 9_999 * scale
    found = dict(parameters=[], raw=sum(row.raw for row in rows), estimate=size, model_bytes=size, code_bytes=137_934)
    found |= dict(total_bytes=size + 137_934, cap=16_000_000)
    monkeypatch.setattr(inspect, "contents", lambda *_: found)
    for count in (1, 3, 12):
        monkeypatch.setattr(inspect, "merged", lambda _, count=count: rows[:count])
        assert cut_off(tools.plot.draw_artifact(tools.plot.Path(name))) == []


def test_the_picture_of_codings_is_whole_and_can_be_read_without_color():
    found = {
        (label, coder): [(10**6 * (i + 1), 0.1 / (i + 1)) for i in range(5)]
        for label in quantization.RIVALS
        for coder in dict.fromkeys((quantization.METHODS[label][2], "rans"))
    }
    figure = quantization.picture(found)
    looks = {(line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == len(found) == 8 and cut_off(figure) == []


# ---- The command.


def test_several_logs_make_one_picture(tmp_path, monkeypatch):
    paths = written(tmp_path, "a"), written(tmp_path, "b")
    done = tool("tools.plot", *paths, "-o", tmp_path / "curve.png")
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, paths), "-o", str(tmp_path / "curve.svg")])
    tools.plot.main()
    for suffix, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        picture = (tmp_path / f"curve.{suffix}").read_bytes()
        assert picture.startswith(magic) and len(picture) > 5000


@pytest.mark.parametrize("module, args", [("tools.plot", ["a.txt", "-o"]), ("tools.record.pack", ["a.py", "-o"])])
def test_a_full_disk_leaves_the_old_file(tmp_path, module, args):
    written(tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n" * 50)
    (out := tmp_path / "curve.png").write_bytes(b"an earlier one")
    before, limit = sorted(tmp_path.iterdir()), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99))
    done = tool(module, *args, out.name, cwd=tmp_path, preexec_fn=limit)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{module}: cannot write curve.png: File too large\n")
    assert sorted(tmp_path.iterdir()) == before and out.read_bytes() == b"an earlier one"


@pytest.mark.parametrize(
    "content, words", [(None, "No such file"), (b"\xff", "not UTF-8 text"), ("folder", "Is a directory")]
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, content, words):
    path = tmp_path / "a.txt"
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    with pytest.raises(tools.plot.Refused, match=f"^cannot read {path}: {words}.*$"):
        logs.read_run(path)


SCORES_ONLY = "".join(LOG.splitlines(True)[-2:])


@pytest.mark.parametrize(
    "text, options, words",
    [
        ("nothing", (), "has no training step and no score"),
        (SCORES_ONLY, (), "has no line 'step:... train_loss:...'"),
        (LOG + LOG, (), "step 1 comes after step 2; give the log of one run"),
        ("".join(LOG.splitlines(True)[:-2]), ("--scores",), "has no score of any stage"),
        (LOG, ("--stages",), "has no score of the stage averaged"),
        (LOG, ("--stages", "--scores"), "give logs"),
        (LOG, ("--artifact", "x.ptz"), "give logs"),
        (LOG, ("-o", "x.txt"), "must end in .png"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_one_line(tmp_path, monkeypatch, text, options, words):
    (tmp_path / "x.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", "x.txt", "-o", "x.png", *options])
    with pytest.raises(tools.plot.Refused, match=words) as refused:
        tools.plot.main()
    assert "\n" not in str(refused.value) and [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    assert (tmp_path / "x.txt").read_text() == text


def test_a_bad_artifact_is_told_in_one_line(tmp_path):
    (tmp_path / "x.ptz").write_bytes(b"no artifact")
    with pytest.raises(tools.plot.Refused, match=r"artifact .*x\.ptz: ") as refused:
        tools.plot.draw_artifact(tmp_path / "x.ptz")
    assert "\n" not in str(refused.value)
