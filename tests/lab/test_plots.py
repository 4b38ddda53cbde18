"""Claims about the charts: round ticks, values where they belong, a curve for every run."""

import json
import math

import numpy as np
import pytest
from PIL import Image, ImageColor

from lab import plots
from lab.plots import CURVES, chart, plot_runs, ticks


def pixels_of(image, colour):
    """(x, y) of every pixel of exactly this colour."""
    rows, columns = np.nonzero((np.asarray(image) == ImageColor.getrgb(colour)).all(-1))
    return columns, rows


@pytest.mark.parametrize("low, high, wanted", [
    (0, 10, [0, 2, 4, 6, 8, 10]), (0.93, 1.07, [0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06]),
    (-1, 1, [-1, -0.5, 0, 0.5, 1]), (0, 6000, [0, 1000, 2000, 3000, 4000, 5000, 6000]),
])
def test_ticks_are_round_numbers_inside_the_range(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


def test_a_rising_line_goes_up_to_the_right_and_powers_lie_at_equal_distances_on_a_log_axis():
    image = chart({"": [(0, 1.0), (1, 10.0), (2, 100.0)]}, "", "", "", log_y=True)
    x, y = pixels_of(image, CURVES[0])
    left, right = y[x.argmin()], y[x.argmax()]
    middle = y[abs(x - (x.min() + x.max()) / 2) < 1].mean()
    assert left > right and np.ptp(x) > 400 and np.ptp(y) > 200
    assert middle == pytest.approx((left + right) / 2, abs=2)


def test_values_that_are_not_finite_are_left_out():
    whole = chart({"": [(0, 1), (1, 2)]}, "", "", "")
    broken = chart({"": [(0, 1), (0.5, math.nan), (0.6, math.inf), (1, 2)]}, "", "", "")
    assert whole.tobytes() == broken.tobytes()
    chart({"a": [], "b": [(3, 3)]}, "one point, one empty", "", "", log_y=True)


def make_run(folder, rate, steps=(0, 1, 2, 3), last=""):
    """A training's metrics.jsonl, the losses of two stages."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"stage": stage, "step": s, "loss": math.exp(-rate * s)})
             for stage in ("prior", "decoder") for s in steps]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, last]))
    return folder


def test_plots_draws_a_chart_a_stage_and_a_curve_a_run(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "chart", lambda curves, *rest, **settings:
                        drawn.append(curves) or chart(curves, *rest, **settings))
    one = make_run(tmp_path / "one", 1)
    # Steps 1 and 2 are done twice, and the last line is half written.
    two = make_run(tmp_path / "two", 2, (0, 1, 2, 1, 2, 3), last='{"stage": "p')
    sheet = plot_runs([one, two])
    assert sheet.size == (1280, 400)
    for curves in drawn:
        assert [[step for step, _ in curve] for curve in curves.values()] == [[0, 1, 2, 3]] * 2
    for colour in CURVES[:2]:
        x, _ = pixels_of(sheet, colour)
        assert x.min() < 640 < x.max()  # both curves are in both charts
    for options, path in ([], one / "loss.png"), (["--out", "curves.png"], tmp_path / "curves.png"):
        options = [str(tmp_path / x) if x.endswith("png") else x for x in options]
        assert plots.main([str(one), str(two), *options]) == 0
        assert str(path) in capsys.readouterr().out
        assert Image.open(path).tobytes() == sheet.tobytes()


@pytest.mark.parametrize("text, options, says", [
    (None, [], "no metrics"), ("", [], "no losses"), ("", ["--out", "decoder.pt"], "ends in .png"),
])
def test_no_metrics_or_a_file_of_another_kind_is_a_mistake(text, options, says, tmp_path, capsys):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert plots.main([str(tmp_path), *options]) == 2
    assert says in capsys.readouterr().err
