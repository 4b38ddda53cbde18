"""Claims about the charts: round ticks, values where they belong, broken files told apart."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import ImageColor, ImageDraw

import train
from lab.plots import CURVES, chart, log_ticks, plot_runs, read_metrics, ticks
from support.sheets import check_folder
from support.tools import UserError, choose_device, exit_code, usable_cores
from conftest import ROOT


@pytest.mark.parametrize("name", ["cuda:01", "cuda:300", "cuda:99999999999999", "gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_a_users_mistake(name):
    with pytest.raises(UserError, match=f"--device {name}"):
        choose_device(name)


@pytest.mark.parametrize("where", ["", "Caught RuntimeError in DataLoader worker process 0.\n"])
def test_any_other_failure_keeps_its_traceback(where):
    @exit_code
    def main(argv):
        raise RuntimeError(f"{where}mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        main([])


def test_cores_that_taskset_takes_away_are_not_counted(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3}, raising=False)
    assert usable_cores() == 1


def test_metrics_that_are_none_are_left_out(tmp_path):
    good = {"stage": "prior", "step": 1, "loss": 0.5}
    bad = [good | change for change in (
        {"step": None}, {"step": "2"}, {"stage": 3}, {"loss": None}, {"loss": 1e308},
        {"loss": 10**400}, {"loss": "low"})]
    lines = [json.dumps(x).encode() for x in (good, *bad)] + [b"\xff", b"[" * 100_000, b"[]", b"{"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_metrics(tmp_path) == [good]


def pixels_of(image, colour):
    """(x, y) of every pixel of just this colour."""
    rows, columns = np.nonzero((np.asarray(image) == ImageColor.getrgb(colour)).all(-1))
    return columns, rows


@pytest.mark.parametrize("low, high, wanted", [
    (0, 10, [0, 2, 4, 6, 8, 10]), (0.93, 1.07, [0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06]),
    (-1, 1, [-1, -0.5, 0, 0.5, 1]), (0, 6000, [0, 1000, 2000, 3000, 4000, 5000, 6000]),
])
def test_ticks_are_round_numbers_inside_the_range(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


def test_logarithmic_ticks_are_one_two_and_five_times_powers_of_ten():
    numbers = [10**y for y in log_ticks(math.log10(0.15), math.log10(30))]
    assert numbers == pytest.approx([0.2, 0.5, 1, 2, 5, 10, 20])


def test_a_rising_line_goes_up_to_the_right_and_a_falling_one_down():
    image = chart({"": [(0, 0), (10, 5)]}, "", "", "")
    x, y = pixels_of(image, CURVES[0])
    assert y[x.argmin()] > y[x.argmax()] and np.ptp(x) > 400 and np.ptp(y) > 200


def test_on_a_logarithmic_axis_powers_lie_at_equal_distances():
    image = chart({"": [(0, 1.0), (1, 10.0), (2, 100.0)]}, "", "", "", log_y=True, points=True)
    x, y = pixels_of(image, CURVES[0])
    ends, middle = [y[x.argmin()], y[x.argmax()]], y[abs(x - (x.min() + x.max()) / 2) < 1].mean()
    assert middle == pytest.approx(sum(ends) / 2, abs=2)


def test_values_that_are_not_finite_are_left_out():
    whole = chart({"": [(0, 1), (1, 2)]}, "", "", "")
    broken = chart({"": [(0, 1), (0.5, math.nan), (0.6, math.inf), (1, 2)]}, "", "", "")
    assert whole.tobytes() == broken.tobytes()
    chart({"a": [], "b": [(3, 3)]}, "one point, one empty", "", "", log_y=True)


def write(folder, *lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_plot_draws_a_chart_a_stage_and_a_curve_a_run(tmp_path, capsys):
    def lines(rate):
        return [json.dumps({"stage": stage, "step": s, "loss": math.exp(-rate * s)})
                for stage in ("prior", "decoder") for s in range(5)]

    one = write(tmp_path / "one", *lines(1))
    two = write(tmp_path / "two", *lines(2), '{"stage": "p')  # its last line half written
    sheet = plot_runs([one, two])
    assert sheet.size == (1280, 400)
    for colour in CURVES[:2]:
        x, _ = pixels_of(sheet, colour)
        assert x.min() < 640 < x.max()  # both curves in both charts
    out = tmp_path / "curves.png"
    assert train.main(["plot", str(one), str(two), "--to", str(out)]) == 0
    assert out.exists() and str(out) in capsys.readouterr().out


@pytest.mark.parametrize("make, says", [
    (lambda path: path, "no metrics"),
    (lambda path: write(path, ""), "is empty"),
])
def test_a_run_without_metrics_is_a_mistake(make, says, tmp_path, capsys):
    assert train.main(["plot", str(make(tmp_path / "run"))]) == 2
    assert says in capsys.readouterr().err


def test_plot_needs_a_run_and_training_takes_none(tmp_path, capsys):
    assert train.main(["plot"]) == 2 and "folder" in capsys.readouterr().err
    assert train.main(["clip", "runs/other"]) == 2 and "runs/other" in capsys.readouterr().err


def test_steps_done_twice_are_drawn_once_and_equal_names_are_told_apart(tmp_path):
    def line(step, loss):
        return json.dumps({"stage": "prior", "step": step, "loss": loss})

    again = [line(1, 1.0), line(2, 0.5), line(1, 1.0), line(2, 0.5), line(3, 0.3)]
    plain = [line(1, 1.0), line(2, 0.5), line(3, 0.3)]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one, other = write(tmp_path / "a" / "run", *again), write(tmp_path / "b" / "run", *plain)
    assert plot_runs([one]).tobytes() == plot_runs([other]).tobytes()
    x, _ = pixels_of(plot_runs([one, other]), CURVES[1])  # a second curve, not the same name twice
    assert len(x) > 0


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
])
def test_out_of_memory_is_one_line(error, capsys):
    @exit_code
    def main(argv):
        raise error

    assert main([]) == 2
    said = capsys.readouterr().err
    assert "--batch-size" in said and said.count("\n") == 1


def test_a_curve_that_ends_where_it_begins_gets_both_marks_in_one(monkeypatch):
    written = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, words, *a, **k:
                        written.append(words) or text(self, place, words, *a, **k))
    there_and_back = [(0, 0), (1, 1), (0, 0.001)]
    chart({"a": there_and_back, "b": [(0, 1), (1, 0)]}, "t", "x", "y", ends=("from", "to"))
    assert "from, to" in written and written.count("from") == written.count("to") == 1


def test_where_nothing_can_be_written_is_said_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    check_folder(tmp_path / "new" / "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match="cannot write into"):
            check_folder(path)
