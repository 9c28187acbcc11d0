"""tools.plot: the numbers behind the pictures, taken from figures and compared with the logs, and the command itself."""

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
from tools import loglines
from tools.model import inspect, quantization

FIVE = ROOT / "logs" / "five"
LOG = """variant:smoke seed:7 overrides: VARIANT=smoke SEED=7 TRAIN_BATCH_TOKENS=512
step:1/9 train_loss:6.9000 train_time:10ms step_avg:10.00ms
step:2/9 val_loss:6.5000 val_bpb:3.1000 eval_time:5ms train_time:20ms
step:2/9 train_loss:6.4000 train_time:20ms step_avg:10.00ms
legal_ttt_exact val_loss:6.10000000 val_bpb:2.90000000
"""


def plot(*args):
    return tool("tools.plot", *args)


def written(tmp_path, name="a", **changes):
    text = LOG
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path / f"{name}.txt"


def test_logs_are_read_as_written(tmp_path):
    run = loglines.read_curve(written(tmp_path))
    assert run.points == {"train": [(1, 10 / 60_000, 6.9), (2, 20 / 60_000, 6.4)], "val": [(2, 20 / 60_000, 6.5)]}
    assert (run.bpb, run.variant, run.seed, run.overrides["TRAIN_BATCH_TOKENS"]) == (2.9, "smoke", 7, "512")


def test_several_logs_make_one_picture(tmp_path, monkeypatch):
    paths = written(tmp_path, "a"), written(tmp_path, "b")
    done = plot(*paths, "-o", tmp_path / "curve.png")
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, paths), "-o", str(tmp_path / "curve.svg")])
    tools.plot.main()
    for suffix, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (tmp_path / f"curve.{suffix}").read_bytes().startswith(magic) and (tmp_path / f"curve.{suffix}").stat().st_size > 5000


@pytest.mark.parametrize("module, args", [("tools.plot", ["a.txt", "-o"]), ("tools.record.pack", ["a.py", "-o"])])
def test_a_disk_that_is_full_leaves_the_old_file(tmp_path, module, args):
    written(tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n" * 50)
    (out := tmp_path / "curve.png").write_bytes(b"an earlier one")
    before = sorted(tmp_path.iterdir())
    done = tool(module, *args, out.name, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99)))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{module}: cannot write curve.png: File too large\n")
    assert sorted(tmp_path.iterdir()) == before and out.read_bytes() == b"an earlier one"


@pytest.mark.parametrize("content, words", [(None, "No such file or directory"), (b"\xff", "not UTF-8 text"), ("folder", "Is a directory")])
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, content, words):
    path = tmp_path / "a.txt"
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    with pytest.raises(tools.plot.Refused, match=f"^cannot read {path}: {words}$"):
        loglines.read_curve(path)


def test_curves_can_be_told_apart_without_color(tmp_path):
    run = loglines.read_curve(written(tmp_path))
    figure = tools.plot.draw_curves({str(i): [run] for i in range(6)}, ["step", "minutes"])
    assert [panel.get_xlabel() for panel in figure.axes] == ["step", "training time, minutes"]
    for panel in figure.axes:
        named = [line for line in panel.lines if not line.get_label().startswith("_")]
        marked = [line for line in panel.lines if line.get_marker() not in (".", "None")]
        assert len(panel.lines) == 3 * 6 and len({line.get_linestyle() + str(line._dash_pattern) for line in named}) == 6
        assert len({line.get_marker() for line in marked}) == 6 and all(line.get_xdata().tolist() != [] for line in marked)


@pytest.mark.parametrize("count", [7, 12, 36])
def test_more_than_six_curves_get_a_panel_each(tmp_path, count):
    run = loglines.read_curve(written(tmp_path))
    figure = tools.plot.draw_curves({f"run {i}": [run._replace(bpb=i + 1.0)] for i in range(count)}, ["minutes", "step"])
    assert [panel.get_title() for panel in figure.axes] == [f"run {i}, final {i + 1:.4f} bpb" for i in range(count)]
    for panel in figure.axes:
        assert [line.get_color() for line in panel.lines].count("0.8") == count - 1 and panel.get_ylim() == figure.axes[0].get_ylim()
    assert figure.get_supxlabel() == tools.plot.AXES["minutes"] and cut_off(figure, 100, 60) == []


@pytest.mark.parametrize("count", [1, 2, 15, 16, 200])
def test_marks_of_many_validations_do_not_hide_the_curve(tmp_path, count):
    """At most 15, and the last validation has one."""
    run = loglines.read_curve(written(tmp_path))
    run = run._replace(points=run.points | {"val": [(i, i / 60, 6.0 + i / 1000) for i in range(1, count + 1)]})
    panel, = tools.plot.draw_curves({"a": [run]}, ["step"]).axes
    line = panel.lines[2]
    first, every = line.get_markevery()
    marked = line.get_xdata()[first::every]
    assert len(line.get_xdata()) == count and marked[-1] == count and min(count, 8) <= len(marked) <= 15


def test_training_and_validation_are_named_apart(tmp_path):
    """A mark of validation belongs to no line of training, and a run without one says so beside runs that have one."""
    one, none = loglines.read_curve(written(tmp_path, "one")), loglines.read_curve(written(tmp_path, "none", **{"9 val_loss": "9 no"}))
    panel, = (figure := tools.plot.draw_curves({"one": [one], "none": [none]}, ["step"])).axes
    above, below = ([text.get_text() for text in legend.get_texts()] for legend in figure.legends)
    assert below == ["one, final 2.9000 bpb", "none, final 2.9000 bpb, no validation logged"] and above == ["training loss", "validation loss"]
    training, validation = panel.lines[:2], panel.lines[2]
    assert [*validation.get_xdata()] == [2] and [*validation.get_ydata()] == [6.5] and validation.get_markeredgecolor() == "black"
    assert all(6.5 not in line.get_ydata() for line in training)
    alone = tools.plot.draw_curves({"none": [none]}, ["step"])
    assert [[text.get_text() for text in legend.get_texts()] for legend in alone.legends] == [["training loss"], ["none, final 2.9000 bpb"]]


@pytest.mark.parametrize("steps, every", [(1, 1), (10, 1), (10, 3), (50, 1)])
def test_every_point_of_a_short_run_is_in_the_picture(tmp_path, steps, every):
    """However steep its start; and the time is counted from zero, in seconds."""
    losses = [6.9, 5.0, *[4 + i % 2 / 100 for i in range(steps)]][:steps]
    lines = [f"step:{i}/{steps} train_loss:{loss:.4f} train_time:{200 * i}ms step_avg:1ms" for i, loss in enumerate(losses, 1)]
    lines += [f"step:{i}/{steps} val_loss:{7 - i / 10:.4f} val_bpb:3.1 eval_time:5ms train_time:{200 * i}ms" for i in range(every, steps + 1, every)]
    (tmp_path / "a.txt").write_text("\n".join([LOG.splitlines()[0], *lines, ""]))
    figure = tools.plot.draw_curves({"a": [loglines.read_curve(tmp_path / "a.txt")]}, ["step", "seconds"])
    for panel, scale in zip(figure.axes, (1, 0.2)):
        low, high = panel.get_ylim()
        shown = {float(y) for line in panel.lines for y in line.get_ydata()}
        assert set(losses) <= shown and low < min(shown) and max(shown) < high
        left, right = panel.get_xlim()
        assert left < 0 and scale * steps < right < 1.1 * scale * steps
        assert [*panel.lines[0].get_xdata()] == pytest.approx([scale * i for i in range(1, steps + 1)])
    assert not figure.legends[0].get_title().get_text()


def test_a_long_run_says_what_is_cut(tmp_path):
    losses = [9.0] * 10 + [3 + i % 3 / 10 for i in range(90)]
    figure = tools.plot.draw_curves({"a": [text_log(tmp_path, "a", losses)]}, ["step"])
    high = figure.axes[0].get_ylim()[1]
    assert 3.2 < high < 4 and figure.legends[0].get_title().get_text() == f"losses above {high:.2f} are not shown"


def test_seeds_share_a_color_and_their_mean_is_thick(tmp_path):
    logs = {f"v{v}-{seed}": written(tmp_path, f"v{v}-{seed}", **{"=7": f"={seed}", ":7": f":{seed}", "=512": f"={512 * v}", "6.4000": f"6.{seed}000"})
            for v in (1, 2) for seed in (1, 2, 3)}
    groups = tools.plot.by_settings([loglines.read_curve(path) for path in logs.values()])
    assert {name: len(runs) for name, runs in groups.items()} == {"v1": 3, "v2": 3}
    panel, = tools.plot.draw_curves(groups, ["step"]).axes
    thin, thick = panel.lines[:3], panel.lines[3]
    assert [line.get_ydata()[-1] for line in thin] == pytest.approx([6.1, 6.2, 6.3]) and thick.get_ydata()[-1] == pytest.approx(6.2)
    assert {line.get_color() for line in thin} == {thick.get_color()} != {panel.lines[5].get_color()}
    assert all(line.get_linewidth() < 1 < thick.get_linewidth() for line in thin) and thick.get_label() == "v1, 3 seeds, mean 2.9000 bpb"
    numbered = [loglines.read_curve(written(tmp_path, f"run-{seed}", **{"=7": f"={seed}", ":7": f":{seed}"})) for seed in (1, 2)]
    assert {name: len(runs) for name, runs in tools.plot.by_settings(numbered).items()} == {"smoke": 2}
    twice = tools.plot.by_settings([loglines.read_curve(path) for path in [logs["v1-1"], written(tmp_path, "again", **{"=7": "=1", ":7": ":1"})]])
    assert [len(runs) for runs in twice.values()] == [1, 1]  # the same seed again


@pytest.mark.parametrize("names, short", [(["2026_race_a", "2026_race_ab"], ["a", "ab"]), (["run", "run-2"], ["run", "run-2"]), (["x_1"], ["x_1"]),
                                          (["x/a_1", "y/a_1"], ["x/a_1.txt", "y/a_1.txt"])])
def test_names_are_as_short_as_they_differ(names, short):
    assert tools.plot.short_names([SimpleNamespace(path=tools.plot.Path(f"{name}.txt")) for name in names]) == short


RACE = {"baseline": [2.0011, 2.0031], "card": [1.9106, 1.9110, 1.9167, 1.9065, 1.8748], "pr1812": [1.8282, 1.8289, 1.8309, 1.8118],
        "frontier": [1.7858, 1.7823, 1.7833, 1.7709, 1.7511]}


def test_the_race_of_the_readme_is_drawn_from_its_logs():
    """An adapted log joins the line of its artifact, whatever the order; its scores of earlier stages do not replace those of training."""
    names = ["card_adapted", "frontier", "baseline", "card", "frontier_adapted", "pr1812"]
    figure = tools.plot.draw_scores([loglines.read_stages(ROOT / "logs" / f"2026-11-22_race2_{name}.txt") for name in names])
    panel, = figure.axes
    drawn = {text.get_text(): [round(float(y), 4) for y in line.get_ydata()] for text, line in zip(panel.texts[-4:], panel.lines)}
    assert drawn == RACE and cut_off(figure, inside=False) == []
    assert [*panel.lines[0].get_xdata()] == [0, 2] and [*panel.lines[1].get_xdata()] == [0, 1, 2, 3, 4]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"{max(scores[1:]):.4f}" in readme and f"{scores[-1]:.4f}" in readme for scores in RACE.values())


@pytest.mark.parametrize("count", [1, 2, 7, 20])
@pytest.mark.parametrize("prefix", ["run", 2 * "a_name_of_a_run_that_tells_of_all_of_its_settings_and_of_more_"])
def test_nothing_of_a_picture_of_scores_is_cut(count, prefix):
    """Names beside lines that end at equal scores do not lie over each other."""
    runs = [loglines.Stages(tools.plot.Path(f"{prefix}{i}.txt"), str(i), False, dict(raw=2.0 + i / 100, coded=2.1, ttt=1.9)) for i in range(count)]
    figure = tools.plot.draw_scores(runs)
    assert cut_off(figure, inside=False) == []


def text_log(tmp_path, name, losses, minutes=1.0):
    """A log of these training losses, every 10 steps."""
    lines = [f"step:{10 * i}/9999 train_loss:{loss:.4f} train_time:{round(60_000 * minutes * i)}ms step_avg:1ms" for i, loss in enumerate(losses, 1)]
    (tmp_path / f"{name}.txt").write_text("\n".join([LOG.splitlines()[0], *lines, ""]))
    return loglines.read_curve(tmp_path / f"{name}.txt")


def test_the_thick_line_is_the_mean_of_a_tenth_of_the_log_around(tmp_path):
    losses = [3 + (i * 37 % 100) / 100 for i in range(100)]
    panel, = tools.plot.draw_curves({"a": [text_log(tmp_path, "a", losses)]}, ["step"]).axes
    thin, thick = panel.lines[:2]
    assert [*thin.get_ydata()] == pytest.approx(losses) and thin.get_linewidth() < 1 < thick.get_linewidth()
    for at, around in ((50, losses[45:56]), (0, losses[:6]), (3, losses[:9]), (99, losses[94:])):
        assert thick.get_ydata()[at] == pytest.approx(statistics.mean(around))


def test_the_end_of_every_run_can_be_read(tmp_path):
    """Neither a first loss nor a single high or low step widens the picture; the end of the worst run is in it."""
    good, bad = [9.0] * 10 + [4 - i / 100 for i in range(90)], [12.0] * 10 + [5 - i / 100 for i in range(90)]
    good[50], good[60] = 0.0, 20.0
    panel, = tools.plot.draw_curves({"good": [text_log(tmp_path, "a", good)], "bad": [text_log(tmp_path, "b", bad)]}, ["step"]).axes
    low, high = panel.get_ylim()
    assert low < good[-1] and bad[-1] < high and low > 1 and high < 6


def test_a_log_of_the_contests_script_joins_a_race():
    run = loglines.read_curve(ROOT / "logs" / "2026-11-22_race_baseline.txt")
    assert (run.seed, run.bpb, tools.plot.batch_tokens(run)) == (1337, 2.03392503, 2048)
    assert run.points["train"][-1] == (3020, 898070 / 60_000, 3.5061) and run.points["val"] == [(3027, 900138 / 60_000, 3.4702)]
    other = loglines.read_curve(ROOT / "logs" / "2026-11-22_race_same_shape.txt")
    panel, = tools.plot.draw_curves({"demo": [other], "baseline": [run]}, ["tokens"]).axes
    assert panel.lines[4].get_xdata()[-1] == pytest.approx(3020 * 2048 / 1e6) and panel.lines[4].get_label() == "baseline, final 2.0339 bpb"


def cut_off(figure, width=150, height=100, inside=True):
    """By how many pixels what a figure draws lies outside of it, left, below, right, above; and the labels that leave their panels or lie over others."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, page = canvas.get_renderer(), figure.bbox
    box = figure.get_tightbbox(renderer).transformed(figure.dpi_scale_trans)
    beyond = [page.x0 - box.x0, page.y0 - box.y0, box.x1 - page.x1, box.y1 - page.y1]
    for panel in figure.axes:
        assert panel.bbox.width > width and panel.bbox.height > height, "no room is left for the panel"
    boxes = [(text, text.get_window_extent(renderer), panel.bbox) for panel in figure.axes for text in panel.texts if text.get_text()]
    leave = [text.get_text() for text, own, its in boxes if inside and (own.x1 > its.x1 + 8 or own.x0 < its.x0 - 8)]
    over = [f"{text.get_text()} over {other.get_text()}" for i, (text, own, _) in enumerate(boxes) for other, its, _ in boxes[:i]
            if own.padded(-1).overlaps(its.padded(-1))]
    return [round(by) for by in beyond if by > 1] + leave + over


LONG = "a_name_of_a_run_that_tells_of_all_of_its_settings_and_of_more_"


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("axes", [["step"], ["step", "minutes"]])
@pytest.mark.parametrize("prefix", ["run", LONG, 3 * LONG])
def test_nothing_of_a_picture_of_curves_is_cut(tmp_path, count, axes, prefix):
    run = loglines.read_curve(written(tmp_path))
    assert cut_off(tools.plot.draw_curves({f"{prefix}{i}": [run] for i in range(count)}, axes)) == []


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
def test_nothing_of_a_picture_of_stages_is_cut(count):
    runs = [loglines.read_scored(FIVE / f"card-{seed}.txt") for seed in (1, 2)]
    for part in (runs, runs[:1]):
        assert cut_off(tools.plot.draw_stages({f"variant{i}": part for i in range(count)})) == []


@pytest.mark.parametrize("scale, name", [(1, "m.ptz"), (1000, "m.ptz"), (1000, f"{3 * LONG}.ptz")])
def test_nothing_of_a_picture_of_an_artifact_is_cut(monkeypatch, scale, name):
    rows = [SimpleNamespace(name=f"blocks.*.value_embed.{'long.' * (i % 3)}weight", count=11, dtype="float16", raw=15_731 * scale,
                            estimate=15_731 * scale / (i + 1), bits=12.34) for i in range(12)]
    found = dict(parameters=[], raw=sum(row.raw for row in rows), estimate=9_999 * scale, model_bytes=9_999 * scale, code_bytes=137_934,
                 total_bytes=9_999 * scale + 137_934, cap=16_000_000)
    monkeypatch.setattr(inspect, "contents", lambda *_: found)
    for count in (1, 3, 12):
        monkeypatch.setattr(inspect, "merged", lambda _, count=count: rows[:count])
        assert cut_off(tools.plot.draw_artifact(tools.plot.Path(name)), inside=False) == []


def test_the_picture_of_codings_is_whole_and_can_be_read_without_color():
    found = {(label, coder): [(10**6 * (i + 1), 0.1 / (i + 1)) for i in range(5)]
             for label in quantization.RIVALS for coder in dict.fromkeys((quantization.METHODS[label][2], "rans"))}
    figure = quantization.picture(found)
    looks = {(line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == len(found) == 8 and cut_off(figure) == []


@pytest.mark.parametrize("by, x", [("step", [1, 2]), ("minutes", [10 / 60_000, 20 / 60_000]), ("tokens", [512e-6, 1024e-6])])
def test_the_axis_counts_what_it_says(tmp_path, by, x):
    panel, = tools.plot.draw_curves({"a": [loglines.read_curve(written(tmp_path))]}, [by]).axes
    assert [*panel.lines[0].get_xdata()] == pytest.approx(x) and [*panel.lines[0].get_ydata()] == [6.9, 6.4]


def test_tokens_come_from_the_variant_where_nothing_overrides_them(tmp_path):
    run = loglines.read_curve(written(tmp_path, **{" TRAIN_BATCH_TOKENS=512": ""}))
    assert tools.plot.batch_tokens(run) == t.row("smoke")["train_batch_tokens"]
    with pytest.raises(tools.plot.Refused, match="VARIANT=old must be"):
        tools.plot.batch_tokens(loglines.read_curve(written(tmp_path, **{"smoke": "old", " TRAIN_BATCH_TOKENS=512": ""})))
    assert tools.plot.batch_tokens(loglines.read_curve(written(tmp_path, smoke="old"))) == 512  # whatever else has changed since


def test_a_group_is_the_mean_and_the_band_of_the_steps_that_all_its_runs_have(tmp_path):
    runs = [loglines.read_curve(path) for path in (
        written(tmp_path, "a"), written(tmp_path, "b", **{"=7": "=8", ":7": ":8", "6.4000": "5.0000", ":20ms": ":40ms"}),
        written(tmp_path, "c", **{"=7": "=9", ":7": ":9", "step:1/9": "step:0/9", "6.4000": "6.0000"}))]
    panel, = tools.plot.draw_curves(tools.plot.by_variant(runs), ["minutes"], band=True).axes
    train, val = panel.lines
    assert [*train.get_xdata()] == pytest.approx([(20 + 40 + 20) / 3 / 60_000]) and [*train.get_ydata()] == pytest.approx([(6.4 + 5 + 6) / 3])
    band = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (5.0, 6.4)
    assert train.get_label() == "smoke, 3 seeds, mean 2.9000 bpb" and [*val.get_ydata()] == [6.5]


def test_runs_that_are_no_seeds_of_one_variant_are_not_averaged(tmp_path):
    run, other = loglines.read_curve(written(tmp_path)), written(tmp_path, "b", **{"=7": "=8", ":7": ":8", "=512": "=256"})
    with pytest.raises(tools.plot.Refused, match="both smoke, differ in nothing, not even the seed"):
        tools.plot.by_variant([run, loglines.read_curve(written(tmp_path, "c"))])
    done = plot(run.path, other, "--group", "-o", tmp_path / "x.png")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "x.png").exists()
    assert done.stderr.startswith("tools.plot: ") and "differ in SEED, TRAIN_BATCH_TOKENS" in done.stderr


def test_stages_are_the_scores_of_the_logs_with_their_spread():
    paths = [FIVE / f"{name}.txt" for name in ("pr490-1", "pr150-3", "pr490-2")]
    first, second = tools.plot.draw_stages(tools.plot.by_variant([loglines.read_scored(path) for path in paths])).axes
    assert (first.get_title(), second.get_title()) == ("pr490, 2 seeds", "pr150, 1 seed")
    texts = [paths[at].read_text() for at in (0, 2)]
    scores = [[float(bpb) for bpb in re.findall(r"^DIAGNOSTIC.* val_bpb:(\S+)", text, re.M)] + [*finals(text).values()] for text in texts]
    dots, _, (bars,) = first.containers[0]
    assert [label.get_text() for label in first.get_xticklabels()] == ["raw", "averaged", "int6", "sliding", "TTT"]
    assert [*dots.get_ydata()] == pytest.approx([statistics.mean(pair) for pair in zip(*scores)], abs=1e-9)
    for (low, high), pair in zip((segment[:, 1] for segment in bars.get_segments()), zip(*scores)):
        assert (high - low) / 2 == pytest.approx(statistics.stdev(pair), abs=1e-9)
    heights = [high - low for low, high in (first.get_ylim(), second.get_ylim())]
    assert heights[0] == pytest.approx(heights[1])


def test_the_bars_of_an_artifact_add_up_to_it(cfg, tmp_path):
    model = make_model(cfg)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    path = tmp_path / "model.ptz"
    path.write_bytes(t.pack(t.quantize(weights, t.coding_plans(weights, t.grids(model, cfg), cfg, {})), False, cfg))
    found = inspect.contents(path, ROOT / "train_gpt.py")
    panel, = tools.plot.draw_artifact(path).axes
    widths = [bar.get_width() for bar in panel.patches]
    assert sum(widths[::2]) == found["raw"] and sum(widths[1::2]) == pytest.approx(found["estimate"], abs=1)
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert f"blocks.*.mlp.fc.weight ({cfg.num_layers} x int8)" in names and re.fullmatch(r"\d+ groups below 1 %", names[-1])
    assert f"{len(path.read_bytes()):,} in the file" in panel.figure.get_suptitle()


@pytest.mark.parametrize("text, options, words", [
    ("nothing", (), "is it a log"), (LOG + LOG, (), "step 1 comes after step 2; are there two logs"),
    (LOG, ("--stages",), "has one line of the raw score, this one none"),
    (LOG, ("--stages", "--by", "step"), "give logs"), (LOG, ("--artifact", "x.ptz"), "give logs"), (LOG, ("-o", "x.txt"), "must end in .png")])
def test_what_cannot_be_drawn_is_told_in_one_line(tmp_path, monkeypatch, capsys, text, options, words):
    (tmp_path / "x.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", "x.txt", "-o", "x.png", *options])
    with pytest.raises(tools.plot.Refused, match=words) as refused:
        tools.plot.main()
    assert "\n" not in str(refused.value) and [path.name for path in tmp_path.iterdir()] == ["x.txt"] and (tmp_path / "x.txt").read_text() == text


def test_a_bad_artifact_is_told_in_one_line(tmp_path):
    (tmp_path / "x.ptz").write_bytes(b"no artifact")
    with pytest.raises(tools.plot.Refused, match=r"artifact .*x\.ptz: ") as refused:
        tools.plot.draw_artifact(tmp_path / "x.ptz")
    assert "\n" not in str(refused.value)
