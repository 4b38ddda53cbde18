"""Claims about the latent: slerp, inversion and back, blends, text diffs, probes, inpainting."""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import manipulate
import sample
from sample import Pipeline
from support.tools import UserError


@pytest.fixture(scope="module")
def pipeline(micro_run):
    return Pipeline(micro_run, size=16)


@pytest.fixture
def files(tmp_path):
    """Two pictures and a mask, white on its right half."""
    for name, colour in (("a", "red"), ("b", "blue")):
        picture = Image.new("RGB", (40, 32), "gray")
        picture.paste(colour, (8, 8, 24, 24))
        picture.save(tmp_path / f"{name}.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    (tmp_path / "words.png").write_text("not a picture")
    return tmp_path


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


# --- slerp


def test_slerp_starts_at_a_ends_at_b_and_stays_on_the_sphere():
    a, b = unit(5, 8), unit(5, 8)
    assert_close(manipulate.slerp(a, b, 0.0), a)
    assert_close(manipulate.slerp(a, b, 1.0), b)
    for theta in (0.2, 0.5, 0.9):
        assert_close(manipulate.slerp(a, b, theta).norm(dim=1), torch.ones(5))


def test_slerp_turns_by_its_share_of_the_angle():
    a, b = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]])
    angle = 0.3 * math.pi / 2
    wanted = torch.tensor([[math.cos(angle), math.sin(angle), 0]])
    assert_close(manipulate.slerp(a, b, 0.3), wanted)


def test_slerp_of_one_direction_is_that_direction():
    a = unit(2, 8)
    assert_close(manipulate.slerp(a, a, 0.4), a)


def test_slerp_of_noise_stays_as_long_as_noise():
    a, b = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    assert abs(manipulate.slerp(a, b, 0.5).std() - 1) < 0.03  # a straight line gives 0.71


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 4, 4)
    error = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert_close(manipulate.psnr(a, a + error), torch.tensor([20.0, 40.0]))


# --- the bipartite latent


def smooth(n):
    """Pictures that a network of three training steps does not make any worse."""
    return F.interpolate(torch.rand(n, 3, 2, 2) - 0.5, 16, mode="bilinear")


def test_inverting_and_redrawing_returns_the_picture(pipeline):
    torch.manual_seed(0)
    pictures, image_emb = smooth(3), unit(3, 16)
    x_T = manipulate.invert(pipeline, pictures, image_emb, 200)
    again = manipulate.redraw(pipeline, image_emb, x_T, [0, 1, 2], 200)
    assert manipulate.psnr(again, pictures).min() > 30
    other = manipulate.redraw(pipeline, image_emb, torch.randn_like(x_T), [0, 1, 2], 200)
    assert manipulate.psnr(other, pictures).max() < 20  # it is the noise that holds the picture


def test_a_picture_that_does_not_come_back_is_inverted_again_and_the_best_is_kept(
    pipeline, monkeypatch
):
    # A stand-in for DDIM: a picture's "noise" is the picture with an error that its tries know.
    tries = {0: [40.0], 1: [10.0, 25.0, 35.0], 2: [10.0, 22.0, 15.0, 12.0]}  # dB
    pictures = torch.stack([torch.full((3, 16, 16), 0.1 * k) for k in tries])
    count, asked = dict.fromkeys(tries, 0), []

    def ddim_invert(network, x_0, steps, generators, **settings):
        which = [round(float(x.mean()) * 10) for x in x_0]
        asked.append((which, [g.initial_seed() for g in generators]))
        found = []
        for k, x in zip(which, x_0):
            found.append(x + 2 * 10 ** (-tries[k][count[k]] / 20))
            count[k] += 1
        return torch.stack(found)

    monkeypatch.setattr(pipeline.decoder.diffusion, "ddim_invert", ddim_invert)
    monkeypatch.setattr(manipulate, "redraw", lambda p, emb, x_T, *a: x_T)
    x_T = manipulate.invert(pipeline, pictures, unit(3, 16))
    assert_close(manipulate.psnr(x_T, pictures), torch.tensor([40.0, 35.0, 22.0]))
    assert asked == [([0, 1, 2], [0] * 3), ([1, 2], [1] * 2), ([1, 2], [2] * 2), ([2], [3])]


def test_eta_above_0_varies_with_the_seed_and_0_does_not(pipeline):
    image_emb, x_T = unit(1, 16), torch.randn(1, 3, 16, 16)
    one, two = (manipulate.redraw(pipeline, image_emb, x_T, [s], 10, eta=1.0) for s in (1, 2))
    assert not torch.allclose(one, two, atol=0.05)
    one, two = (manipulate.redraw(pipeline, image_emb, x_T, [s], 10) for s in (1, 2))
    assert torch.equal(one, two)


def recorded(monkeypatch):
    """The (image_emb, x_T) of every call of redraw, which then draws nothing."""
    seen = []
    monkeypatch.setattr(
        manipulate, "redraw", lambda p, emb, x_T, *a: seen.append((emb, x_T)) or x_T
    )
    return seen


def test_a_blend_with_slerped_noise_reproduces_both_ends(pipeline):
    torch.manual_seed(0)
    ends, embs = smooth(2), unit(2, 16)
    frames = manipulate.blend(pipeline, ends, embs, 0, 3, steps=200)
    assert frames.shape == (3, 3, 16, 16)
    assert manipulate.psnr(frames[[0, 2]], ends).min() > 30


def test_a_blend_with_fixed_noise_changes_the_embedding_alone(pipeline, monkeypatch):
    seen = recorded(monkeypatch)
    manipulate.blend(pipeline, smooth(2), unit(2, 16), 3, 4, noise="fixed")
    assert all(torch.equal(x_T, seen[0][1]) for _, x_T in seen)
    assert not any(torch.allclose(emb, seen[0][0]) for emb, _ in seen[1:])


def test_text_diff_is_the_unit_vector_between_two_captions(pipeline):
    text_emb = pipeline.text(["a red circle", "a blue circle"])[0]
    direction = manipulate.text_diff(pipeline, "a blue circle", "a red circle")
    assert_close(direction, F.normalize(text_emb[1:] - text_emb[:1], dim=1))
    empty = manipulate.text_diff(pipeline, "a blue circle")
    assert_close(empty.norm(dim=1), torch.ones(1))
    assert not torch.allclose(empty, direction, atol=1e-3)


def test_two_captions_of_one_meaning_have_no_direction(pipeline):
    with pytest.raises(UserError, match="the same to CLIP"):
        manipulate.text_diff(pipeline, "a red circle", "a red circle")


def test_an_edit_starts_at_the_picture_and_turns_towards_the_direction(pipeline, monkeypatch):
    seen = recorded(monkeypatch)
    monkeypatch.setattr(manipulate, "invert", lambda p, picture, emb, steps: 2 * picture)
    picture, image_emb, direction = smooth(1), unit(1, 16), unit(1, 16)
    manipulate.edit(pipeline, picture, image_emb, direction, [0.0, 0.5, 1.0], 0, steps=5)
    assert_close(seen[0][0], image_emb)
    assert_close(seen[2][0], direction)
    assert len(seen) == 3 and all(torch.equal(x_T, 2 * picture) for _, x_T in seen)


def test_a_probe_adds_components_until_it_has_the_embedding_itself(micro_run, monkeypatch):
    pipeline, seen = Pipeline(micro_run, size=16, prior="ar_prior"), []
    monkeypatch.setattr(pipeline, "decode", lambda emb, *a, **kw: seen.append((emb, a, kw)) or emb)
    image_emb = unit(1, 16)
    counts = manipulate.probe_counts(16)
    assert counts == [1, 2, 4, 8, 16]
    manipulate.probe(pipeline, image_emb, pipeline.prior, counts, 7)
    closeness = [(emb * image_emb).sum().item() for emb, _, _ in seen]
    assert closeness == sorted(closeness) and closeness[0] < 0.99
    assert closeness[-1] == pytest.approx(1, abs=1e-5)
    assert all(rest == (None, [7]) and kw == {"scale": 1.0, "eta": 0.0} for _, rest, kw in seen)


def test_inpainting_leaves_the_rest_as_it_was_to_the_bit(pipeline):
    picture, mask = smooth(1), torch.zeros(1, 1, 16, 16)
    mask[..., 4:9, 5:12] = 1
    text = pipeline.text(["a red circle"])
    drawn = manipulate.inpaint(pipeline, picture, mask, unit(1, 16), text, 0, steps=4)
    outside = (mask == 0).expand_as(picture)
    assert torch.equal(drawn[outside], picture[outside])
    assert not torch.allclose(drawn[~outside], picture[~outside], atol=0.05)


# --- the commands


@pytest.mark.parametrize("arguments, columns, says", [
    (["vary", "a.png", "-n", "2", "--steps", "4"], 4, "dB"),
    (["vary", "a.png", "--eta", "0", "--steps", "4"], 2, "dB"),
    (["blend", "a.png", "b.png", "--frames", "3", "--steps", "4"], 5, "dB"),
    (["blend", "a.png", "b.png", "--noise", "fixed", "--frames", "3", "--steps", "4"], 5, ".gif"),
    (["edit", "a.png", "--to", "a blue circle", "--frames", "3", "--steps", "4"], 4, "dB"),
    (["edit", "a.png", "--to", "a blue circle", "--from", "a red circle", "--steps", "4"], 7, ""),
    (["probe", "a.png"], 6, "probe_a.png"),
    (["inpaint", "a.png", "mask.png", "a red circle", "--steps", "3"], 3, "inpaint_a"),
])
def test_each_command_writes_a_labelled_strip_and_the_same_one_again(
    arguments, columns, says, micro_run, files, monkeypatch, capsys
):
    monkeypatch.chdir(files)
    for out in ("one", "two"):
        common = ["--weights", str(micro_run), "--out", out, "--size", "64"]
        assert sample.main([*arguments, *common]) == 0
    assert says in capsys.readouterr().out
    strips = sorted((files / "one").glob("*"))
    assert Image.open(next(p for p in strips if p.suffix == ".png")).width == columns * 132 + 4
    for path in strips:
        assert path.read_bytes() == (files / "two" / path.name).read_bytes()


@pytest.mark.parametrize("arguments, says", [
    (["vary", "nowhere.png"], "no picture at nowhere.png"),
    (["vary", "words.png"], "not a picture"),
    (["vary", "a.png", "--eta", "1.5"], "between 0 and 1"),
    (["vary", "a.png", "--steps", "5000"], "steps is 5000"),
    (["blend", "a.png", "b.png", "--frames", "1"], "2 or more"),
    (["edit", "a.png"], "--to"),
    (["edit", "a.png", "--to", " "], "empty"),
    (["inpaint", "a.png", "black.png", "a red circle"], "white where to draw"),
    (["text", "a star", "--decoder", "caption", "--condition", "prior"], "trained on another"),
])
def test_mistakes_end_in_one_line_and_exit_code_2(
    arguments, says, micro_run, files, monkeypatch, capsys
):
    monkeypatch.chdir(files)
    assert sample.main([*arguments, "--weights", str(micro_run), "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not (files / "out").exists()


@pytest.mark.parametrize("arguments", [
    ["--prior", "ar"], ["--condition", "text_emb"], ["--condition", "caption"],
    ["--decoder", "text_emb"], ["--decoder", "caption"],
])
def test_text_draws_with_the_other_prior_conditions_and_decoders(arguments, micro_run, tmp_path):
    pictures = []
    for extra in (arguments, []):
        out = tmp_path / str(len(extra))
        command = ["text", "a red circle", "-n", "1", "--size", "16", "--weights", str(micro_run)]
        assert sample.main([*command, "--out", str(out), *extra]) == 0
        pictures.append((out / "a-red-circle_0.png").read_bytes())
    assert pictures[0] != pictures[1]
