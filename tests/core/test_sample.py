"""sample.py: captions in, pictures out; the same command gives the same bytes."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from decoder import Decoder
from sample import Pipeline
from support.sheets import draw_grid, to_pil


def draw(micro_run, out, *arguments, captions=("a red circle",)):
    code = sample.main(
        ["text", *captions, "--weights", str(micro_run), "--out", str(out), *arguments]
    )
    assert code == 0
    return sorted(p.name for p in out.glob("*"))


def test_text_writes_a_picture_each_and_a_grid_and_says_where(micro_run, tmp_path, capsys):
    names = draw(
        micro_run, tmp_path, "-n", "2", "--seed", "5", captions=("a red circle", "A star, on black")
    )
    pictures = [f"{c}_{s}.png" for c in ("a-red-circle", "a-star-on-black") for s in (5, 6)]
    assert names == sorted([*pictures, "grid_a-red-circle_5.png"])
    said = capsys.readouterr().out
    assert all(str(tmp_path / name) in said for name in names)
    assert Image.open(tmp_path / pictures[0]).size == (64, 64)
    assert Image.open(tmp_path / "grid_a-red-circle_5.png").width == 2 * (128 + 4) + 4


def test_no_two_captions_share_a_file():
    assert sample.slugs(["Red", "red 2", "red!", "..."]) == ["red", "red-2", "red-3", "caption"]


def test_out_can_name_the_grid(micro_run, tmp_path):
    draw(micro_run, tmp_path / "here" / "sheet.png", "-n", "1")
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == [
        "a-red-circle_0.png",
        "sheet.png",
    ]


def test_the_same_command_writes_the_same_bytes(micro_run, tmp_path):
    for folder in ("one", "two"):
        draw(micro_run, tmp_path / folder, "-n", "2", "--film")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_picture_k_of_a_batch_is_the_picture_its_seed_gives_alone(micro_run, tmp_path):
    draw(micro_run, tmp_path / "batch", "-n", "3", "--seed", "4")
    draw(micro_run, tmp_path / "alone", "-n", "1", "--seed", "6")
    name = "a-red-circle_6.png"
    assert (tmp_path / "batch" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert (tmp_path / "batch" / name).read_bytes() != (
        tmp_path / "batch" / "a-red-circle_5.png"
    ).read_bytes()


def test_a_larger_picture_starts_from_the_smaller_one(micro_run):
    pipeline = Pipeline(micro_run, size=64)
    text = pipeline.text(["a circle"])
    decoded = pipeline.decode(pipeline.embed(text, [1]), text, [1])
    middle = pipeline.upsample(decoded, [1], 32)
    assert decoded.shape[-1] == 16 and middle.shape[-1] == 32
    again = pipeline.upsample(middle, [1], 64)
    assert torch.equal(again, pipeline.upsample(decoded, [1], 64))


def test_stages_shows_each_picture_at_every_size_it_had(micro_run, tmp_path):
    draw(micro_run, tmp_path / "plain", "-n", "1")
    draw(micro_run, tmp_path / "stages", "-n", "1", "--stages")
    name, cell = "a-red-circle_0.png", 128
    plain, stages = tmp_path / "plain", tmp_path / "stages"
    assert (plain / name).read_bytes() == (stages / name).read_bytes()
    grid = Image.open(stages / "grid_a-red-circle_0.png")
    assert grid.width == 3 * (cell + 4) + 4
    pipeline = Pipeline(micro_run, size=64)
    text = pipeline.text(["a red circle"])
    small, _ = pipeline.decode_best(2, pipeline.embed(text, [0], None), text, [0])
    middle = pipeline.upsample(small, [0], 32)
    for k, stage in enumerate((small, middle, pipeline.upsample(middle, [0], 64))):
        x = 4 + k * (cell + 4)
        expected = to_pil(stage[0]).resize((cell, cell), Image.Resampling.NEAREST)
        assert grid.crop((x, 4, x + cell, 4 + cell)).tobytes() == expected.tobytes()


def test_of_several_pictures_the_one_closest_to_its_embedding_is_kept(micro_run):
    pipeline, seeds, N = Pipeline(micro_run), range(6), 3
    text = pipeline.text(["a red circle"] * 6)
    emb = pipeline.embed(text, seeds)
    drawn = [pipeline.decode(emb, text, seeds, attempt=a) for a in range(N)]
    assert torch.equal(drawn[0], pipeline.decode(emb, text, seeds))  # as if no other followed
    for given, wanted in ((emb, emb), (None, text[0])):
        drawn = [pipeline.decode(given, text, seeds, attempt=a) for a in range(N)]
        kept, best = pipeline.decode_best(N, given, text, seeds)
        for k in range(6):  # each picture on its own
            seen = [pipeline.clip.encode_image(d[k : k + 1])[0] for d in drawn]
            cosines = [float(x @ wanted[k]) for x in seen]
            assert best[k] == cosines.index(max(cosines))
            assert torch.equal(kept[k], drawn[best[k]][k])
        assert len(set(best.tolist())) > 1  # or the test could not tell attempts apart
    alone, _ = pipeline.decode_best(1, emb, text, seeds)
    assert torch.equal(alone, pipeline.decode(emb, text, seeds))


def test_the_film_is_that_of_the_picture_that_was_kept(micro_run, tmp_path):
    pipeline = Pipeline(micro_run)
    text = pipeline.text(["a red circle"])
    chosen = {s: int(pipeline.decode_best(
        2, pipeline.embed(text, [s], None), text, [s])[1]) for s in range(8)}
    for wanted in (0, 1):
        seed = next(s for s, best in chosen.items() if best == wanted)
        draw(micro_run, tmp_path, "-n", "1", "--film", "--seed", str(seed))
        film = Image.open(tmp_path / f"a-red-circle_{seed}.gif")
        film.seek(film.n_frames - 1)
        shown = np.asarray(film.convert("RGB").crop((64, 0, 128, 64)), float)[2::4, 2::4]
        tries = [np.asarray(to_pil(pipeline.decode(
            pipeline.embed(text, [seed], None), text, [seed], attempt=a)[0]), float)
            for a in (0, 1)]
        errors = [np.abs(shown - x).mean() for x in tries]
        assert errors[wanted] < 0.5 * errors[1 - wanted]


def test_film_has_a_frame_for_each_denoising_step(micro_run, tmp_path):
    draw(micro_run, tmp_path, "-n", "1", "--film", "--steps", "5")
    film = Image.open(tmp_path / "a-red-circle_0.gif")
    # Equal neighbouring frames may be merged by the writer, never added.
    assert 2 <= film.n_frames <= 5 and film.size == (2 * 16 * 4, 16 * 4)


def test_stops_at_the_largest_trained_size_and_says_so(micro_run, tmp_path, capsys):
    draw(micro_run, tmp_path / "a", "-n", "1", "--size", "1024")
    assert Image.open(tmp_path / "a" / "a-red-circle_0.png").size == (64, 64)
    assert "stopping at 64" in capsys.readouterr().out

    small = tmp_path / "small"
    shutil.copytree(micro_run, small)
    (small / "upsampler2.pt").unlink()
    draw(small, tmp_path / "b", "-n", "1", "--size", "64")
    assert Image.open(tmp_path / "b" / "a-red-circle_0.png").size == (32, 32)
    assert "stopping at 32" in capsys.readouterr().out


def test_guidance_and_steps_change_the_picture(micro_run):
    pipeline = Pipeline(micro_run)
    text = pipeline.text(["a red circle"])
    emb = pipeline.embed(text, [0])
    torch.testing.assert_close(emb.norm(dim=1), torch.ones(1))
    assert not torch.equal(emb, pipeline.embed(text, [0], scale=3.0))
    assert not torch.equal(emb, pipeline.embed(text, [0], steps=7))
    assert torch.equal(pipeline.embed(text, [0], None), pipeline.embed(text, [0], scale=4.0))
    embed = Pipeline(micro_run, prior="ar_prior").embed
    assert torch.equal(embed(text, [0], None), embed(text, [0], scale=1.0))
    # Three steps of training leave a decoder whose branches hardly differ, so look at the wiring.
    scales = []
    pipeline.decoder.sample = lambda *a, scale, steps, **k: scales.append((scale, steps))
    pipeline.decode(emb, text, [0], scale=3.0, steps=9)
    assert scales == [(3.0, 9)]


def test_both_stages_are_guided_unless_told_otherwise(micro_run, tmp_path, monkeypatch):
    seen, picture = [], str(tmp_path / "mask.png")
    Image.fromarray(np.uint8([[0, 255]])).save(picture)
    embed, network = Pipeline.embed, Decoder.network
    monkeypatch.setattr(Pipeline, "embed", lambda self, text, seeds, scale=1.0, *a, **k: (
        seen.append(("prior", scale)) or embed(self, text, seeds, scale, *a, **k)))
    monkeypatch.setattr(Decoder, "network", lambda self, emb, enc, mask, scale=1.0: (
        seen.append(("decoder", scale)) or network(self, emb, enc, mask, scale)))
    for command in (["text"], ["inpaint", picture, picture]):  # None: the prior's usual_scale
        common = ["a red circle", "--weights", str(micro_run), "--out", str(tmp_path / "out")]
        for given, wanted in (([], (None, 2)), (["--prior-scale", "1", "--scale", "3"], (1, 3))):
            seen.clear()
            assert sample.main([*command, *common, *given]) == 0
            assert set(seen) == {("prior", wanted[0]), ("decoder", wanted[1])}


def test_pixels_have_fixed_limits():
    flat = torch.full((3, 4, 4), -0.5)
    assert to_pil(flat).getpixel((0, 0)) == (64, 64, 64)  # (-0.5 + 1) * 127.5, rounded
    assert to_pil(flat * 10).getpixel((0, 0)) == (0, 0, 0)


def test_grid_shows_each_picture_with_its_caption_under_it():
    pictures = torch.stack([torch.full((3, 128, 128), v) for v in (-1.0, 0.0, 1.0)])
    plain, named = (
        draw_grid(pictures),
        draw_grid(pictures, ["black", "gray", "a very long caption " * 5]),
    )
    assert named.height > plain.height and named.width == plain.width == 3 * 132 + 4
    for k, level in enumerate((0, 128, 255)):
        assert abs(named.getpixel((4 + k * 132 + 64, 68))[0] - level) <= 1
    under = named.crop((4, 132, 136, named.height)).convert("L")
    assert (
        min(under.get_flattened_data() if hasattr(under, "get_flattened_data") else under.getdata())
        < 100
    )


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["text", ""], "caption is empty"),
        (["text", "a circle", "   "], "caption is empty"),
        (["text"], "caption"),
        (["paint", "a circle"], "paint"),
        (["text", "a circle", "--weights", "/no/such"], "/no/such"),
        (["text", "a circle", "-n", "0"], "must be 1 or more"),
        (["text", "a circle", "--size", "100"], "--size 100"),
        (["text", "a circle", "--steps", "0"], "steps"),
        (["text", "a circle", "--steps", "1001"], "1000"),
        (["text", "a circle", "--prior-steps", "1001"], "1000"),
        (["text", "a circle", "--device", "abacus"], "abacus"),
        (["text", "a circle", "--out", "/proc/no/such"], "cannot write"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, says, micro_run, capsys):
    if len(arguments) > 1 and "--weights" not in arguments:
        arguments = [*arguments, "--weights", str(micro_run)]
    assert sample.main(arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()[-1]
    assert errors.startswith("error: ") and says in errors


def test_missing_truncated_and_foreign_weights_are_named(micro_run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(micro_run, copy)
    run = ["text", "a circle", "-n", "1", "--weights", str(copy), "--out", str(tmp_path)]

    whole = (copy / "prior.pt").read_bytes()
    (copy / "prior.pt").write_bytes(whole[: len(whole) // 2])
    assert sample.main(run) == 2 and "prior.pt is damaged" in capsys.readouterr().err
    (copy / "prior.pt").unlink()
    assert sample.main(run) == 2 and "prior.pt" in capsys.readouterr().err
    shutil.copy(micro_run / "decoder.pt", copy / "prior.pt")
    assert sample.main(run) == 2 and "'decoder', not 'prior'" in capsys.readouterr().err
    shutil.copy(micro_run / "prior.pt", copy / "prior.pt")

    saved = torch.load(copy / "clip.pt", weights_only=True)
    saved["ema"]["model.text_projection"] += 1  # another CLIP than the stages were trained for
    torch.save(saved, copy / "clip.pt")
    assert sample.main(run) == 2 and "do not mix" in capsys.readouterr().err


def test_a_grid_does_not_take_the_place_of_a_picture(micro_run, tmp_path, capsys):
    out = tmp_path / "a-red-circle_0.png"
    run = ["text", "a red circle", "-n", "1", "--weights", str(micro_run), "--out", str(out)]
    assert sample.main(run) == 2 and "choose another" in capsys.readouterr().err


def test_names_of_files_are_short_enough_in_bytes():
    assert all(len(name.encode()) <= 180 for name in sample.slugs(["\U0001d49c" * 100]))
