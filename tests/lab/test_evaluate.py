"""evaluate.py and bench.py: what is drawn for which row, and the figures that come out."""

import json
import re
import shutil
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
from clip_model import FrozenClip
from decoder import Decoder
from lab import bench, evaluate, measures
from lab.evaluate import changed_and_kept, print_table, single_edits
from lab.measures import pairs_shown, wrong_captions
from manipulate import psnr
from sample import Pipeline
from support.shapes import Scene, Shapes
from support.sheets import to_pil


def run(tmp_path, *arguments):
    """The table of a command."""
    file = tmp_path / "table.json"
    assert evaluate.main([*map(str, arguments), "--json", str(file)]) == 0
    return json.loads(file.read_text())


FAST = ["--steps", 2, "--prior-steps", 2]


def test_every_row_of_captions_is_drawn_judged_and_kept_as_a_sheet(micro_run, tmp_path):
    table = run(tmp_path, "captions", "--weights", micro_run, "-n", 3, *FAST,
                "--rows", *evaluate.ROWS, "--out", tmp_path / "sheets")
    assert list(table) == list(evaluate.ROWS)
    for name, row in table.items():
        assert row.pop("n") == 3 and (tmp_path / f"sheets/captions_{name}.png").exists()
        assert all(share is None or 0 <= share <= 1 for share in row.values())


def test_a_perfect_pipeline_scores_one_everywhere(micro_run, tmp_path, monkeypatch):
    splits = iter(("val", "val", "held_out"))

    def renderings(pipeline, captions, args, given):
        data = Shapes(args.n, next(splits), args.seed)
        yield slice(0, 20), torch.stack([data.image(i, 64) for i in range(20)])

    monkeypatch.setattr(evaluate, "draw_batches", renderings)
    for row in run(tmp_path, "captions", "--weights", micro_run, "-n", 20).values():
        assert row.pop("n") == 20 and set(row.values()) == {1}


def test_the_options_of_captions_reach_the_pipeline(micro_run, tmp_path):
    def spy(name):
        return patch.object(Pipeline, name, autospec=True, side_effect=getattr(Pipeline, name))

    captions = ["captions", "--weights", micro_run, "-n", 4, *FAST, "--rows", "true_embedding"]
    with spy("embed") as embed, spy("decode_best") as decode_best:
        run(tmp_path, *captions, "text")
        run(tmp_path, *captions, "text", "--prior-scale", 2, "--scale", 1, "--candidates", 3)
    assert [call.args[3] for call in embed.call_args_list] == [None, 2]
    asked = [(call.args[1], call.kwargs["scale"]) for call in decode_best.call_args_list]
    assert asked == [(2, 2), (2, 2), (3, 1), (3, 1)]
    given = [call.args[2] for call in decode_best.call_args_list]
    clip, data = Pipeline(micro_run).clip, Shapes(4, "val")
    true = clip.encode_image(torch.stack([data.image(i, clip.image_size) for i in range(4)]))
    torch.testing.assert_close(given[0], true, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(given[1], true, atol=1e-2)


TWO = [i for i in range(60) if len(Shapes(60, "val").scene(i).things) == 2]


class FakeClip:
    """Knows each scene's true caption; `sees` says what it makes of any other."""

    def __init__(self, sees):
        self.sees = sees
        self.true = {wrong_captions(Shapes(60, "val").scene(i))[0] for i in TWO}

    def encode_text(self, captions):
        true = set(captions) <= self.true and len(captions) == 1
        emb = torch.tensor([[1.0, 0.0] if true else self.sees] * len(captions))
        return F.pad(emb, (30, 0)), None, None


@pytest.mark.parametrize("sees, share", [([0.0, 1.0], 1.0), ([1.0, 0.0], 0.5), ([2.0, 0.0], 0.0)])
def test_clip_is_right_blind_or_misled(sees, share, monkeypatch, tmp_path):
    """Meanwhile the probe's embeddings say what is shown, but for every third of the 60 scenes."""
    def look(clip, data):
        emb = pairs_shown(data)
        mixed_up = (torch.arange(len(data))[:, None] % 3 == 0) & (len(data) == 60)
        emb = torch.where(mixed_up, emb.roll(1, 0), emb)  # 30 pairs, and then what FakeClip sees
        return torch.cat([emb, torch.tensor([[1.0, 0.0]]).expand(len(data), -1)], dim=1)

    monkeypatch.setattr(evaluate, "a_clip", lambda args: FakeClip(sees))
    monkeypatch.setattr(evaluate, "look", look)
    table = run(tmp_path, "clip", "--weights", ".", "-n", 60)
    shown = pairs_shown(Shapes(60, "val"))
    right = [i % 3 > 0 or bool((shown[i] == shown[i - 1]).all()) for i in TWO]
    assert table.pop("linear probe") == {"right": sum(right) / len(right), "n": len(TWO)}
    assert set(table) == {"binding", "shape", "relation"} and table["relation"]["n"] == len(TWO)
    assert all(row["right"] == share and row["n"] > 0 for row in table.values())


def test_priors_compares_variances_steps_and_both_priors(micro_run, tmp_path):
    table = run(tmp_path, "priors", "--weights", micro_run, "-n", 8)
    assert table["fixed_small, 8 steps"]["evaluations"] == 8 and "autoregressive" in table
    assert table["analytic, 16 steps"]["frechet"] != table["fixed_small, 16 steps"]["frechet"]
    assert all(row["n"] == 8 and row["ms"] > 0 for row in table.values())
    for stage in ("clip", "prior"):  # it needs no other stage
        shutil.copy(micro_run / f"{stage}.pt", tmp_path)
    table = run(tmp_path, "priors", "--weights", tmp_path, "-n", 4)
    assert table["fixed_small, 8 steps"]["evaluations"] == 8 and "autoregressive" not in table


def test_upsamplers_are_compared_with_bicubic_and_the_truth(micro_run, tmp_path, capsys):
    table = run(tmp_path, "upsamplers", "--weights", micro_run, "-n", 3, "--size", 64)
    assert list(table) == ["upsamplers 32", "bicubic 32", "upsamplers 64", "bicubic 64"]
    pictures = torch.stack([Shapes(3, "val").image(i, 64) for i in range(3)])
    again = F.interpolate(F.avg_pool2d(pictures, 4), size=64, mode="bicubic").clamp(-1, 1)
    assert table["bicubic 64"]["psnr"] == pytest.approx(psnr(again, pictures).mean().item())
    assert evaluate.main(["upsamplers", "--weights", str(micro_run), "--size", "16"]) == 2
    assert "no upsampler" in capsys.readouterr().err


def test_an_edit_changes_one_word_and_keeps_the_rest_of_the_scene():
    data = Shapes(200, "val")
    edits = single_edits(data, 12)
    assert [part for _, part, *_ in edits] == ["colour", "shape", "background"] * 4
    for i, part, before, after, claim in edits:
        changed = [b for a, b in zip(before.split(), after.split(), strict=True) if a != b]
        assert len([word for word in changed if word not in ("a", "an")]) == 1
        assert changed_and_kept(data.scene(i), claim, part) == (False, True)
        assert changed_and_kept(claim, claim, part) == (True, True)
        assert changed_and_kept(Scene(()), claim, part) == (False, False)


def test_manipulations_reports_latents_and_edits(micro_run, tmp_path, monkeypatch):
    for module, names in (measures, ("invert", "redraw")), (evaluate, ("blend", "edit")):
        for name in names:
            monkeypatch.setattr(module, name, partial(getattr(module, name), steps=5))
    table = run(tmp_path, "manipulations", "--weights", micro_run, "-n", 2, "--edits", 1)
    assert table["reconstruction"]["psnr"] > table["variation"]["psnr"]
    assert table["blends' ends"]["n"] == 2
    assert list(table)[3:] == [f"theta {theta:.3f}" for theta in evaluate.THETAS]


def test_any_data_is_measured_in_clips_space_or_exported(
        micro_run, tmp_path, capsys, monkeypatch):
    table = run(tmp_path, "real", "--weights", micro_run, "-n", 8, *FAST)["shapes, 64 px"]
    assert table["frechet"] > 0 and -1 <= table["clip_score"] <= 1
    assert 0 <= table["precision"] <= 1 and 0 <= table["recall"] <= 1 and table["n"] == 8
    command = ["export", "-n", 3, "--weights", micro_run, *FAST, "--size", 32, "--out", tmp_path]
    assert len(run(tmp_path, *command)["captions"]) == 3
    for kind in ("samples", "references"):
        files = sorted((tmp_path / kind).iterdir())
        assert [f.name for f in files] == ["000000.png", "000001.png", "000002.png"]
        assert all(Image.open(f).size == (32, 32) for f in files)
    assert evaluate.main(list(map(str, command))) == 2  # two exports would mix
    assert "already has pictures" in capsys.readouterr().err

    # As if the true pictures were drawn, but for the first two: exchanged.
    emb = torch.eye(8, 16)
    monkeypatch.setattr(evaluate, "look", lambda clip, data: emb)
    monkeypatch.setattr(FrozenClip, "encode_image", lambda clip, x: emb[[1, 0, *range(2, 8)]])
    table = run(tmp_path, "real", "--weights", micro_run, "-n", 8, *FAST)["shapes, 64 px"]
    assert table["match"] == 0.75 and table["precision"] == 1


def logged(folder):
    """The last validation figures of each stage."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["stage"]: line["val_loss"] for line in lines if "val_loss" in line}


def test_losses_are_what_training_logged_last(micro_run, tmp_path, capsys):
    for stage in ("clip", "prior", "upsampler1"):
        shutil.copy(micro_run / f"{stage}.pt", tmp_path)
    table = run(tmp_path, "losses", "--weights", tmp_path)
    assert set(table) == {"clip", "prior", "upsampler1"}
    for stage, figures in table.items():
        assert figures["val_loss"] == pytest.approx(logged(micro_run)[stage], rel=1e-4), stage
    assert evaluate.main(["losses", "--weights", str(tmp_path.parent)]) == 2
    assert "no trained stage" in capsys.readouterr().err


def test_losses_are_of_the_data_that_the_run_was_trained_on_unless_told_otherwise(tmp_path, capsys):
    root, folder = tmp_path / "mine", tmp_path / "run"
    root.mkdir()
    for i in range(60):
        to_pil(Shapes(60).image(i, 64)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"picture {i}")
    for stage in ("clip", "upsampler1"):
        assert train.main([stage, "--preset", "micro", "--data", "folder", "--root", str(root),
                           "--limit", "2", "--out", str(folder), "--workers", "0",
                           "--sample-every", "3"]) == 0
    capsys.readouterr()
    wanted, table = logged(folder), run(tmp_path, "losses", "--weights", folder)
    assert "note" not in capsys.readouterr().out
    other = run(tmp_path, "losses", "--weights", folder, "--data", "shapes")
    said = capsys.readouterr().out
    assert said.count(f"was trained on folder {root}, these figures are for shapes") == 1
    for stage, loss in wanted.items():
        assert table[stage]["val_loss"] == pytest.approx(loss, rel=1e-4)
        assert other[stage]["val_loss"] != pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("command", [
    ["captions", "-n", "0"], ["judge", "-n", "x"], ["judge", "--json", __file__ + "/no/x.json"],
    ["judge", "--json", __file__], ["captions", "--out", __file__], ["findings", "F11"],
    ["findings", "F6"], ["findings", "-n", "7"], ["losses", "--data", "nothing"],
])
def test_a_mistake_is_one_line_and_exit_code_2(command, capsys):
    assert evaluate.main(command) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""


def test_a_table_has_a_dash_for_nothing_and_a_new_header_where_its_columns_change(capsys):
    print_table({"a": {"psnr": 20.0, "n": 1}, "b": {"psnr": None, "n": 2}, "c": {"all": 0.5}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["psnr", "n"], ["a", "20.00", "1"], ["b", "-", "2"], ["all"], ["c", "50.0%"]]


def test_bench_times_a_step(monkeypatch, capsys):
    monkeypatch.setattr(bench, "matmul_peak", lambda device, kind: 1e12)
    monkeypatch.setattr(bench, "seconds", lambda work, device, repeats=5: work() or 1.0)
    assert bench.main(["--only", "prior", "decoder", "upsampler1", "--preset", "micro"]) == 0
    assert capsys.readouterr().out.count("ms a step") == 3
    assert bench.main(["--only", "widths", "--preset", "micro"]) == 0
    told = capsys.readouterr().out
    assert "width 256 " in told and "channels 64 " in told and told.count("ms a step") == 8


def test_what_most_time_goes_into_has_the_largest_share():
    x, cpu = torch.randn(400, 400), torch.device("cpu")
    for kind, work in (("matrix products", lambda: x @ x), ("the rest", lambda: x.sin()),
                       ("convolutions", lambda: torch.conv2d(x[None, None], x[None, None, :9, :9])),
                       ("copies", lambda: torch.cat([x.T, x]))):
        told = dict(re.findall(r"(\w[a-z ]+) (\d+)%", bench.where_time_goes(work, cpu)))
        assert told.keys() == bench.KINDS.keys() and int(told[kind]) > 60, (kind, told)


def test_bench_says_what_more_pictures_cost(micro_run, capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda device, kind: 1e12)
    monkeypatch.setattr(bench, "load_data", lambda name, root, split, n: Shapes(n // 500, split))
    assert bench.main(["--only", "data", "--preset", "micro", "--weights", str(micro_run)]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["2", "20", "120"]
    assert all("pictures/s" in line for line in lines)


def test_a_race_trains_each_arm_its_time_and_judges_what_it_draws(
        micro_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "judge_of", lambda data, args: lambda x: {"bright": x.mean()})
    assert bench.main(["--race", "", "predict=x_0 variance=fixed_small lr=0.0", "--minutes", "0.01",
                       "-n", "4", "--preset", "micro", "--weights", str(micro_run),
                       "--out", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.strip().splitlines()[-2:]
    assert first.startswith("preset, seed 0: ") and "val_loss" in first
    assert second.startswith("predict=x_0 variance=fixed_small lr=0.0, seed 0: ")
    assert "; bright 0, val" in second  # at a rate of 0 it still draws the 0 that it began with
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert bench.read_arm("a=(1,2) b=v c=None d=2.5") == {"a": (1, 2), "b": "v", "c": None,
                                                          "d": 2.5}
    assert bench.main(["--race", "nonsense"]) == 2
    shut, told, sample = [], [], Decoder.sample
    monkeypatch.setattr(Decoder, "sample", lambda self, emb, *text, **settings: (
        shut.append(self), told.extend(text[:2]), sample(self, emb, *text, **settings))[-1])
    assert bench.main(["--race", "closed=image_to_time drop_caption=1.0 muon=5.0", "--minutes",
                       "0.01", "-n", "4", "--preset", "micro", "--weights", str(micro_run)]) == 0
    assert not any(p.any() for p in shut[0].image_to_time.parameters())
    assert all(p.any() for p in shut[0].image_to_tokens.parameters())
    assert told and set(told) == {None}  # it never saw a caption
    weights = ["--preset", "micro", "--weights", str(micro_run)]
    for arm in ("depth=3", "variance=none", "closed=nothing"):  # one line, no traceback
        assert bench.main(["--race", "", arm, *weights]) == 2
    monkeypatch.undo()  # and there may be fewer validation pictures than -n
    monkeypatch.setattr(bench, "load_data", lambda name, root, split, n: Shapes(12, split))
    assert bench.main(["--race", "copies=1", "--only", "prior", "--minutes", "0.01", "-n", "20",
                       "--preset", "micro", "--weights", str(micro_run)]) == 0
    assert "copies=1, seed 0: " in (said := capsys.readouterr().out) and "frechet" in said
