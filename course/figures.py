"""The expected pictures, drawn by the shipped weights and whatever exercises are finished."""

from unittest import mock

import torch
from PIL import Image, ImageDraw

import prior
from ar_prior import principal_components
from course.exercises import ROOT
from diffusion import GaussianDiffusion, SeededNoise
from lab.plots import CURVES, chart
from sample import Pipeline
from support.shapes import Shapes
from support.sheets import draw_grid, save_picture, to_tensor
from support.tools import Unfinished

PAIR = "a blue square left of a red circle on white"


def forward():
    """What q_sample leaves of a picture, under both schedules."""
    picture = Image.open(ROOT / "docs/pictures/a.png").convert("RGB").resize((64, 64))
    x_0, drawn, names = to_tensor(picture)[None], [], []
    for schedule in ("cosine", "linear"):
        diffusion = GaussianDiffusion(schedule=schedule)
        for t in (0, 100, 250, 500, 750, 999):
            level = torch.tensor([t])
            drawn += diffusion.q_sample(x_0, level, SeededNoise([0])(x_0.shape))
            names.append(f"{schedule}, t {t}: {diffusion.alpha_bar(level).item():.3f}")
    return draw_grid(drawn, names, columns=6)


def levels():
    """alpha_bar, and the weights of the loss with a cap of 5, by noise level."""
    t, both = torch.arange(0, 1000, 10), Image.new("RGB", (1280, 400))
    alpha_bar = {s: GaussianDiffusion(schedule=s).alpha_bar(t) for s in ("cosine", "linear")}
    weight = {p: GaussianDiffusion(predict=p, weight_cap=5).loss_weight(t)
              for p in ("noise", "x_0", "v")}
    for k, (title, curves) in enumerate({"alpha_bar": alpha_bar, "loss weight": weight}.items()):
        curves = {name: list(zip(t.tolist(), y.tolist())) for name, y in curves.items()}
        both.paste(chart(curves, title, "t", ""), (640 * k, 0))
    return both


def sequence():
    """Who sees whom in the prior: a padded caption, and two noised copies on one prefix."""
    config = prior.PriorConfig(dim=8, text_width=8, text_len=4, width=8, depth=1, heads=1)
    model, text_mask = prior.DiffusionPrior(config), torch.tensor([[True, True, True, False]])
    with mock.patch("prior.run_blocks", wraps=prior.run_blocks) as run:
        cond = model.encode_caption(torch.zeros(1, 8), torch.zeros(1, 4, 8), text_mask)
        model(torch.zeros(2, 8), torch.zeros(2), **cond)
    masks = [row for call in run.call_args_list for row in call.args[2][0].tolist()]
    names = ["a", "red", "circle", "(padding)", "text emb"]
    names += [f"{part} {k}" for k in (1, 2) for part in ("timestep", "noised", "query")]
    pen = ImageDraw.Draw(sheet := Image.new("RGB", (420, 300), "white"))
    for i, row in enumerate(masks):
        pen.text((10, 12 + 26 * i), names[i], "black", font_size=14)
        for j in range(len(masks)):
            x, y, sees = 110 + 26 * j, 8 + 26 * i, row[j:j + 1] == [True]
            colour = CURVES[(i > 4) + (i > 7)] if sees else "#eeeeee"
            pen.rectangle([x, y, x + 24, y + 24], fill=colour)
    return sheet


def denoising():
    """x_t above, the predicted x_0 below, from noise to picture."""
    pipeline, steps = Pipeline(size=64), []
    text = pipeline.text([PAIR])
    pipeline.decode(pipeline.embed(text, [0], None), text, [0], steps=32,
                    on_step=lambda *step: steps.append(step))
    shown = [steps[k] for k in (0, 3, 7, 11, 15, 19, 25, 31)]
    names = [f"after step {k + 1} of 32, t = {t}" for k, t, x, pred_x_0 in shown]
    pictures = [x[0] for k, t, x, pred_x_0 in shown] + [pred_x_0[0] for *_, pred_x_0 in shown]
    return draw_grid(pictures, names * 2, columns=8)


def guidance():
    """Two objects at guidance 0, 1, 2, 4, 8: by unCLIP, by GLIDE."""
    drawn, names, scales = [], [], (0, 1, 2, 4, 8)
    for name, decoder in {"unCLIP": "decoder", "GLIDE": "decoder_caption"}.items():
        pipeline = Pipeline(size=64, decoder=decoder)
        text = pipeline.text([PAIR] * 2)
        emb = pipeline.condition(pipeline.source, text, [0, 1], None)
        rows = [pipeline.decode(emb, text, [0, 1], scale=scale) for scale in scales]
        drawn += torch.stack(rows, dim=1).flatten(0, 1)
        names += [f"{name}, {scale}" for scale in scales] * 2
    return draw_grid(drawn, names, columns=5)


def embeddings():
    """Pictures, captions, and what the prior draws for the captions: their first principal
    component to the right, the way from the captions' mean to the pictures' up."""
    pipeline, data, n = Pipeline(size=64), Shapes(150, "val"), range(150)
    text = pipeline.text([data.captions(i)[2] for i in n])
    seen = pipeline.clip.encode_image(torch.stack([data.image(i, 64) for i in n]))
    clouds = {"pictures": seen, "captions": text[0], "the prior": pipeline.embed(text, n, None)}
    mean, basis, _ = principal_components(torch.cat([seen, text[0]]))
    gap = torch.nn.functional.normalize((seen - text[0]).mean(0), dim=0).double()
    pen = ImageDraw.Draw(sheet := Image.new("RGB", (480, 300), "white"))
    for k, (name, cloud) in enumerate(clouds.items()):
        pen.text((10 + 100 * k, 8), name, CURVES[k], font_size=14)
        for x, y in ((cloud - mean) @ torch.stack([basis[0], gap], dim=1)).tolist():
            x, y = 240 + 250 * x, 165 - 250 * y
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=CURVES[k])
    return sheet


FIGURES = {f.__name__: f for f in (forward, levels, sequence, denoising, guidance, embeddings)}


def figure(name):
    """A figure by its name, a PIL picture; None, and a line that says why, if it has to wait."""
    try:
        return FIGURES[name]()
    except Unfinished as e:
        print(f"{name}: {e}")


def draw(out):
    for name in FIGURES:
        if picture := figure(name):
            print(save_picture(picture.quantize(64), out / f"course_{name}.png"))
