"""Claims about the latent: inversion and back, slerp, blends, text diffs, probes, inpainting."""

import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.testing import assert_close

import manipulate
from diffusion import GaussianDiffusion, SeededNoise
from manipulate import ddim_invert, psnr, resample, slerp
from sample import Pipeline
from support import tools

SHAPE = (4, 3, 5, 7)

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


@pytest.fixture(scope="module")
def pipeline(untrained_run):
    return Pipeline(untrained_run, size=16)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with two pictures, a mask that is white on its right half, and two mistakes."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("a", "red"), ("b", "blue")):
        picture = Image.new("RGB", (40, 32), "gray")
        picture.paste(colour, (8, 8, 24, 24))
        picture.save(f"{name}.png")
    mask = Image.new("L", (40, 32))
    mask.save("black.png")
    mask.paste(255, (20, 0, 40, 32))
    mask.save("mask.png")
    mask.resize((32, 32)).save("square.png")
    (tmp_path / "words.png").write_text("not a picture")
    return tmp_path


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def smooth(n):
    """Pictures that an untrained network does not make any worse."""
    return F.interpolate(torch.rand(n, 3, 2, 2) - 0.5, 16, mode="bilinear")


# --- DDIM inversion, against closed forms in float64: the best noise prediction for data N(0, s^2)
# is linear, noise = slope * x_t, and so is every step


def gaussian(T, s):
    d = GaussianDiffusion(T=T, clip_x_0=False)
    ab = d.alphas_cumprod
    slope = (1 - ab).sqrt() / (ab * s**2 + 1 - ab)
    return d, ab, slope, lambda x, t: slope[t][:, None, None, None] * x


def step(ab, slope, t, to):
    """What a DDIM step from level t to level `to` multiplies x by."""
    pred_x_0 = (1 - (1 - ab[t]).sqrt() * slope[t]) / ab[t].sqrt()
    return ab[to].sqrt() * pred_x_0 + (1 - ab[to]).sqrt() * slope[t]


@pytest.mark.parametrize("steps, start", [(2, 0), (9, 0), (100, 0), (9, 20)])
def test_inversion_on_a_gaussian_is_the_product_of_its_linear_steps(steps, start):
    d, ab, slope, network = gaussian(100, 0.3)
    x_0, seeds = torch.randn(SHAPE).double(), [3, 1, 4, 1]
    levels = [t for t in d.timesteps(steps)[::-1] if t > start]
    if start:  # between two of the levels, and there with fresh noise
        begun = ab[start].sqrt() * x_0 + (1 - ab[start]).sqrt() * SeededNoise(seeds)(SHAPE)
    else:  # from the data to level 0, by the noise predicted at level 0
        begun = (ab[0].sqrt() + (1 - ab[0]).sqrt() * slope[0]) * x_0
    factor = math.prod(step(ab, slope, t, up) for t, up in zip([start, *levels], levels))
    x_T = ddim_invert(d, network, x_0, steps, start, noise=SeededNoise(seeds))
    assert_close(x_T, factor * begun)


# In the second case corrections that go the whole way diverge.
@pytest.mark.parametrize("s, steps", [(0.6, 20), (8.0, 6)])
def test_corrections_lead_to_the_exact_inverse_of_the_steps_down(s, steps):
    d, ab, slope, network = gaussian(100, s)
    levels = [t for t in d.timesteps(steps)[::-1] if t >= 36]
    x_0, noise = torch.randn(SHAPE).double(), SeededNoise(range(4))(SHAPE).double()
    begun = ab[levels[0]].sqrt() * x_0 + (1 - ab[levels[0]]).sqrt() * noise
    down = math.prod(step(ab, slope, t, to) for to, t in zip(levels, levels[1:]))
    errors = []
    for corrections in (0, 1, 60):
        x_T = ddim_invert(d, network, x_0, steps, levels[0], corrections, SeededNoise(range(4)))
        errors.append((down * x_T / begun - 1).abs().max().item())
    assert errors[2] < 1e-9 < errors[1] < errors[0] / 3


@pytest.mark.parametrize("bf16", [False, True])
def test_inverting_and_redrawing_returns_the_picture(bf16, pipeline, monkeypatch):
    monkeypatch.setattr(tools, "cpu_is_fast_in_bf16", lambda: bf16)
    pictures, image_emb = smooth(2), unit(2, 16)
    x_T = manipulate.invert(pipeline, pictures, image_emb, 20)
    again = manipulate.redraw(pipeline, image_emb, x_T, [0, 1], 20)
    assert psnr(again, pictures).min() > 30
    other = manipulate.redraw(pipeline, image_emb, torch.randn_like(x_T), [0, 1], 20)
    assert psnr(other, pictures).max() < 20  # it is the noise that holds the picture


def test_a_picture_that_is_missed_is_inverted_again_and_the_best_is_kept(pipeline, monkeypatch):
    # A stand-in for DDIM: a picture's "noise" is the picture with an error, listed in tries.
    tries = {0: [40.0], 1: [10.0, 25.0, 35.0], 2: [10.0, 22.0, 15.0, 12.0]}  # dB
    pictures = torch.stack([torch.full((3, 16, 16), 0.1 * k) for k in tries])
    asked = []

    def stand_in(diffusion, network, x_0, steps, start, corrections, noise):
        which, attempt = [round(float(x.mean()) * 10) for x in x_0], len(asked)
        asked.append((which, [g.initial_seed() for g in noise.generators]))
        return torch.stack([x + 2 * 10 ** (-tries[k][attempt] / 20) for k, x in zip(which, x_0)])

    monkeypatch.setattr(manipulate, "ddim_invert", stand_in)
    monkeypatch.setattr(manipulate, "redraw", lambda p, emb, x_T, *a: x_T)
    x_T = manipulate.invert(pipeline, pictures, unit(3, 16))
    assert_close(psnr(x_T, pictures), torch.tensor([40.0, 35.0, 22.0]))
    assert asked == [([0, 1, 2], [0] * 3), ([1, 2], [1] * 2), ([1, 2], [2] * 2), ([2], [3])]


# --- slerp, blends, edits, probes


def test_slerp_turns_by_its_share_of_the_angle_and_stays_on_the_sphere():
    a, b = unit(5, 8), unit(5, 8)
    assert_close(slerp(a, b, 0.0), a)
    assert_close(slerp(a, b, 1.0), b)
    assert_close(slerp(a, b, 0.9).norm(dim=1), torch.ones(5))
    x, y, angle = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]]), 0.3 * math.pi / 2
    assert_close(slerp(x, y, 0.3), torch.tensor([[math.cos(angle), math.sin(angle), 0]]))
    assert_close(slerp(a, a, 0.4), a)  # where sin(omega) is 0
    noise = slerp(torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32), 0.5)
    assert abs(noise.std() - 1) < 0.03  # a straight line gives 0.71


@pytest.fixture
def redrawn(monkeypatch):
    """Collects the (image_emb, x_T) of all that is redrawn; inverting doubles the picture."""
    def redraw(pipeline, image_emb, x_T, *settings):
        seen.append((image_emb, x_T))
        return torch.zeros(1, 3, 16, 16)

    seen = []
    monkeypatch.setattr(manipulate, "invert", lambda p, pictures, emb, steps: 2 * pictures)
    monkeypatch.setattr(manipulate, "redraw", redraw)
    return seen


def test_a_blend_goes_from_latent_to_latent_or_keeps_one_noise(redrawn):
    ends, embs = torch.randn(2, 3, 16, 16), unit(2, 16)
    manipulate.blend(None, ends, embs, 3, 3)
    between = [slerp(embs[:1], embs[1:], theta) for theta in (0, 0.5, 1)]
    noises = [slerp(2 * ends[:1], 2 * ends[1:], theta) for theta in (0, 0.5, 1)]
    assert_close(redrawn, list(zip(between, noises)))
    manipulate.blend(None, ends, embs, 3, 3, noise="fixed")
    fixed = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    assert_close(redrawn[3:], [(emb, fixed) for emb in between])


def test_an_edit_starts_at_the_picture_and_turns_towards_the_direction(redrawn):
    picture, image_emb, direction = smooth(1), unit(1, 16), unit(1, 16)
    manipulate.edit(None, picture, image_emb, direction, [0.0, 0.5, 1.0], 0)
    turned = [image_emb, slerp(image_emb, direction, 0.5), direction]
    assert_close(redrawn, [(emb, 2 * picture) for emb in turned])


def test_text_diff_is_the_unit_vector_between_two_captions(pipeline):
    red, blue = pipeline.text(["a red circle", "a blue circle"])[0]
    direction = manipulate.text_diff(pipeline, "a blue circle", "a red circle")
    assert_close(direction, F.normalize(blue - red, dim=0)[None])
    ids = pipeline.clip.tokenizer(["a"])  # start, a, end, ...: without the a, the empty caption
    empty = pipeline.clip.encode_ids(torch.cat([ids[:, :1], ids[:, 2:], 0 * ids[:, :1]], dim=1))[0]
    assert_close(manipulate.text_diff(pipeline, "a blue circle"), F.normalize(blue - empty, dim=1))


def test_a_probe_adds_components_until_it_has_the_embedding_itself(untrained_run, files, redrawn):
    pipeline = Pipeline(untrained_run, size=16, prior="ar_prior")
    args = Namespace(image="a.png", seed=7, steps=None)
    _, labels = manipulate.probe_command(pipeline, args)
    assert labels == [f"{n} of 16" for n in (1, 2, 4, 8, 16)] + ["source"]
    _, image_emb = manipulate.read(pipeline, "a.png")
    closeness = [(emb * image_emb).sum().item() for emb, x_T in redrawn if x_T is None]
    assert closeness == sorted(closeness) and closeness[0] < 0.99
    assert closeness[-1] == pytest.approx(1, abs=1e-5) and len(closeness) == 5


# --- inpainting


def test_inpainting_keeps_the_rest_and_draws_the_oracles_point_under_the_mask():
    d, point, known = GaussianDiffusion(T=100, predict="x_0"), torch.rand(SHAPE), torch.rand(SHAPE)
    mask = torch.zeros(4, 1, 5, 7)
    mask[..., 1:3, 2:6] = 1
    drawn = resample(d, lambda x, t: point, known, mask, steps=10, resamples=3)
    assert_close(drawn, torch.where(mask.bool(), point, known), rtol=0, atol=1e-6)


@pytest.mark.parametrize("resamples", [1, 3])
def test_inpainting_repeats_each_step_but_the_last_and_sees_the_known_part_noised(resamples):
    d, seen, known = GaussianDiffusion(T=100), [], torch.randn(4, 3, 25, 7) + 5

    def network(x, t):
        seen.append((int(t[0]), (x - d.signal_sigma(t, x)[0] * known).std().item()))
        return torch.zeros_like(x)

    resample(d, network, known, torch.zeros(4, 1, 25, 7), 5, resamples)  # nothing to draw
    levels = d.timesteps(5)
    assert [t for t, _ in seen] == [t for t in levels[:-1] for _ in range(resamples)] + levels[-1:]
    for t, noise in seen[resamples:]:  # after the first step, which starts from pure noise
        assert noise == pytest.approx((1 - d.alphas_cumprod[t]).sqrt().item(), rel=0.1)


def test_a_mask_is_white_where_it_is_light_or_transparent(files):
    pipeline, half = Namespace(sizes=[16], device="cpu"), Image.open("mask.png")
    clear = Image.merge("LA", (Image.new("L", half.size), ImageOps.invert(half)))
    blue = ImageOps.colorize(half, "black", "blue")
    for mask in (half, half.resize((80, 64)), half.point(lambda v: v // 255), clear, blue):
        mask.save("other.png")
        white = manipulate.mask_of(pipeline, "other.png", "a.png")
        assert torch.equal(white, (torch.arange(16) >= 8).expand(1, 1, 16, 16))


# --- the commands


@pytest.mark.parametrize("arguments, columns, name, says", [
    ("vary a.png -n 2", 4, "vary_a", "middle square"),
    ("vary a.png --eta 0", 2, "vary_a", "dB"),
    ("blend a.png b.png --frames 3", 5, "blend_a_b", "blend_a_b.gif"),
    ("blend a.png b.png --noise fixed --frames 2", 4, "blend_a_b", "dB"),
    ("edit a.png --to circle --frames 3", 4, "edit_a_circle", "dB"),
    ("edit a.png --to circle --from star", 7, "edit_a_circle", "dB"),
    ("probe a.png", 6, "probe_a", "probe"),
    ("inpaint a.png mask.png circle", 3, "inpaint_a_circle", "50.0% of the square"),
])
def test_each_command_writes_a_labelled_strip(
    arguments, columns, name, says, untrained_run, files, capsys
):
    for out in ("one", "two"):
        command = f"{arguments} --steps 3 --weights {untrained_run} --size 16 --out {out}"
        assert manipulate.main(command.split()) == 0
    assert says in capsys.readouterr().out
    assert Image.open(f"one/{name}.png").width == columns * 132 + 4
    assert (files / f"one/{name}.png").read_bytes() == (files / f"two/{name}.png").read_bytes()


@pytest.mark.parametrize("arguments, says", [
    ("vary nowhere.png", "no picture at nowhere.png"),
    ("vary words.png", "not a picture"),
    ("vary a.png --steps 5000", "--steps: 5000: must be 1 to 1000"),
    ("vary a.png --size 8", "--size 8"),
    ("edit a.png --to ", "empty"),
    ("edit a.png --to circle --from circle", "the same to CLIP"),
    ("inpaint a.png black.png circle", "white where to draw"),
    ("inpaint a.png square.png circle", "its shape"),
])
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, says, untrained_run, files, capsys):
    command = [*arguments.split(" "), "--weights", str(untrained_run), "--out", "out"]
    assert manipulate.main(command) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (files / "out").exists()
