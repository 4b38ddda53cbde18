"""sample.py: captions in, pictures out; the same command gives the same bytes."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from diffusion import GaussianDiffusion
from sample import Pipeline
from support.drawing import sheet_path, slugs
from support.sheets import to_pil
from support.tools import UserError

NEAREST = Image.Resampling.NEAREST


@pytest.fixture(scope="module")
def pipeline(untrained_run):
    return Pipeline(untrained_run, "cpu")


@pytest.fixture
def draw(untrained_run, tmp_path):
    """Runs the command; returns its folder."""
    def run(*arguments, captions=("a red circle",), weights=untrained_run, out="out"):
        command = [*captions, "--weights", weights, "--out", tmp_path / out, *arguments]
        assert sample.main([str(x) for x in command]) == 0
        return tmp_path / out
    return run


# --- the library


def test_all_seeds_of_a_caption_come_first_and_the_command_writes_the_same_pictures(pipeline, draw):
    captions = ["a red circle", "a star, on black"]
    both = pipeline.draw((c for c in captions), seeds=[3, 4], size=16)
    alone = pipeline.draw(captions[0], [3], 16) + pipeline.draw(captions[1], [4], 16)
    assert both[0] == alone[0] and both[3] == alone[1]
    assert len({picture.tobytes() for picture in both}) == len(both) == 4
    out = draw("-n", "2", "--seed", "3", "--size", "16", captions=captions)
    names = [f"{c}_{s}.png" for c in ("a-red-circle", "a-star-on-black") for s in (3, 4)]
    assert all(np.array_equal(p, Image.open(out / name)) for p, name in zip(both, names))


@pytest.mark.parametrize("wrong", [
    {"captions": ["star", 5]}, {"captions": None}, {"captions": ["star", " "]}, {"scale": math.nan},
    {"prior_scale": 1e300}, {"candidates": 10**12}, {"prior_steps": 0},
])
def test_nonsense_is_a_users_mistake_and_what_is_not_finite_is_not_drawn_in_black(wrong, pipeline):
    with pytest.raises(UserError):
        pipeline.draw(**{"captions": "star", "size": 16} | wrong)
    with pytest.raises(UserError, match="not finite"):
        pipeline.upsample(torch.full((1, 3, 16, 16), math.nan), [0], 16)


def test_a_prior_that_is_none_is_refused(untrained_run):
    with pytest.raises(UserError, match="prior 'ar-prior': use prior, ar_prior"):
        sample.Pipeline(untrained_run, prior="ar-prior")


def test_noise_is_that_of_the_seed_stage_and_attempt_in_any_batch():
    for stage, attempt, first in (("prior", 0, 1), ("decoder", 0, 2), ("decoder", 1, 2 + 10**9)):
        wanted = torch.randn(3, generator=torch.Generator().manual_seed(first + 5 * 8))
        assert torch.equal(sample.noise_for([6, 5], stage, attempt)((2, 3))[1], wanted)


def test_of_several_pictures_the_one_closest_to_its_embedding_is_kept(pipeline):
    seeds, N = range(6), 3
    text = pipeline.text(["a red circle"] * 6)
    emb = pipeline.embed(text, seeds)
    for given, wanted in ((emb, emb), (None, text[0])):
        drawn = torch.stack([pipeline.decode(given, text, seeds, attempt=a) for a in range(N)])
        kept, best = pipeline.decode_best(N, given, text, seeds)
        for k in range(6):
            cosines = pipeline.clip.encode_image(drawn[:, k]) @ wanted[k]
            assert best[k] == cosines.argmax() and torch.equal(kept[k], drawn[best[k], k])
        assert len(set(best.tolist())) > 1  # or the test could not tell attempts apart


def test_every_setting_changes_the_picture(pipeline):
    plain = pipeline.draw("a red circle", size=16)
    for name in ("scale", "steps", "prior_scale", "prior_steps", "candidates"):
        assert pipeline.draw("a red circle", size=16, **{name: 1}) != plain, name


@pytest.mark.parametrize("stages, wanted", [
    ({}, lambda p, text: p.embed(text, [0], scale=4.0)),
    ({"prior": "ar_prior"}, lambda p, text: p.embed(text, [0], scale=1.0)),
    ({"prior": "text_emb"}, lambda p, text: text[0]),
    ({"prior": "none"}, lambda p, text: None),
    ({"decoder": "decoder_text_emb"}, lambda p, text: text[0]),
    ({"decoder": "decoder_caption"}, lambda p, text: None),
])
def test_draw_puts_the_stages_together_with_their_usual_settings(stages, wanted, untrained_run):
    p = Pipeline(untrained_run, **stages)
    text = p.text(["a red circle"])
    picture, _ = p.decode_best(2, wanted(p, text), text, [0], scale=2.0)
    assert p.draw("a red circle", size=64)[0] == to_pil(p.upsample(picture, [0], 64)[0])


# --- the command


def test_says_what_it_wrote_and_nothing_else_but_one_warning(draw, capfd):
    out = draw("-n", "2", "--seed", "5", captions=("a red circle", "A zebra"))
    names = [f"{c}_{s}.png" for c in ("a-red-circle", "a-zebra") for s in (5, 6)]
    names.append("grid_a-red-circle_5.png")
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    assert Image.open(out / names[0]).size == (64, 64)
    assert Image.open(out / names[-1]).width == 2 * (128 + 4) + 4
    said = capfd.readouterr()
    assert said.out.splitlines() == [str(out / name) for name in names]
    assert said.err.count("\n") == 1 and "zebra" in said.err


def test_captions_can_come_from_a_file_and_out_can_name_the_grid(
        draw, untrained_run, tmp_path, capsys):
    (tmp_path / "it.txt").write_text("a star\r\n\n a star", encoding="utf-8-sig", newline="")
    out = draw("-n", "1", "--from-file", tmp_path / "it.txt", out="here/it.JPG")
    names = ["a-red-circle_0.png", "a-star-2_0.png", "a-star_0.png", "it.JPG"]
    assert sorted(p.name for p in out.parent.iterdir()) == names
    assert Image.open(out).format == "JPEG"
    taken = str(out.parent / "a-star_0.png")
    assert sample.main(["a star", "--weights", str(untrained_run), "--out", taken]) == 2
    assert "choose another" in capsys.readouterr().err
    assert sample.main(["a", "--weights", str(untrained_run), "--out", taken[:-3] + "gif"]) == 2
    assert "films are .gif" in capsys.readouterr().err


def test_the_same_command_writes_the_same_bytes(draw):
    one, two = (draw("-n", "1", "--film", out=out) for out in ("one", "two"))
    assert all(p.read_bytes() == (two / p.name).read_bytes() for p in one.iterdir())
    # Equal neighbouring frames may be merged by the writer, never added.
    assert 2 <= Image.open(one / "a-red-circle_0.gif").n_frames <= 4


def test_stages_shows_each_picture_at_every_size_it_had(draw, pipeline):
    stages = pipeline.draw("a red circle", stages=True)
    assert [p.width for p in stages] == [16, 32, 64]
    grid = Image.open(draw("-n", "1", "--stages") / "grid_a-red-circle_0.png")
    assert grid.width == 3 * (128 + 4) + 4
    for x, stage in zip((4, 4 + 132, 4 + 2 * 132), stages, strict=True):
        assert grid.crop((x, 4, x + 128, 4 + 128)) == stage.resize((128, 128), NEAREST)


def test_each_film_ends_with_the_picture_that_was_kept(pipeline):
    films = []
    pictures = pipeline.draw("a red circle", range(8), size=16, steps=5, films=films)
    for film, picture in zip(films, pictures, strict=True):
        x_0 = film.frames[-1].crop((4 * 16, 0, 2 * 4 * 16, 4 * 16))  # to the right of x_t
        assert len(film.frames) == 5 and x_0 == picture.resize((4 * 16, 4 * 16), NEAREST)


def test_stops_at_the_largest_trained_size_and_says_so(untrained_run, draw, tmp_path, capsys):
    small = shutil.copytree(untrained_run, tmp_path / "small")
    (small / "upsampler1.pt").unlink()  # without it, upsampler2 has nothing to enlarge
    out = draw("-n", "1", "--size", "1024", weights=small)
    assert Image.open(out / "a-red-circle_0.png").size == (16, 16)
    assert "no upsampler to 1024 pixels is loaded, stopping at 16" in capsys.readouterr().out


def test_file_names_are_different_and_short_enough_in_bytes():
    assert slugs(["Red", "red 2", "red!", "..."]) == ["red", "red-2", "red-3", "caption"]
    assert all(0 < len(name.encode()) <= 60 for name in slugs(["\U0001d49c" * 100]))
    assert len(sheet_path(Path("out"), ["blend", "x" * 170, "y" * 170]).name) == 131


@pytest.mark.parametrize("arguments, says", [
    ("a|   ", "caption is empty"),
    ("a|--weights|/no/such", "/no/such"),
    ("a|--size|8", "--size 8"),
    ("a|--prior-steps|1001", "--prior-steps: 1001: must be 1 to 1000"),
    ("a|--out|file/there", "cannot write into file/there"),
    ("-n|1", "give a caption"),
    ("a|--decoder|decoder_caption|--prior|text_emb", "leave --prior out"),
])
def test_mistakes_end_in_one_line_before_any_work(
    arguments, says, untrained_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(GaussianDiffusion, "sample", lambda *a, **k: pytest.fail("work was done"))
    assert sample.main(["--weights", str(untrained_run), *arguments.split("|")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and says in said and "\n" not in said
    assert not (tmp_path / "samples").exists()


def test_missing_weights_and_those_of_another_clip_are_named(untrained_run, tmp_path, capsys):
    copy = shutil.copytree(untrained_run, tmp_path / "copy")
    command = ["a circle", "--weights", str(copy), "--out", str(tmp_path / "out")]
    (copy / "prior.pt").unlink()
    assert sample.main(command) == 2 and "prior.pt" in capsys.readouterr().err
    saved = torch.load(copy / "clip.pt", weights_only=True)
    saved["ema"]["model.text_projection"] += 1
    torch.save(saved, copy / "clip.pt")
    assert sample.main(command) == 2 and "do not mix" in capsys.readouterr().err
