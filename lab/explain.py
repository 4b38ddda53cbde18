"""One drawing explained, from its caption to its pixels, in a page:

    python -m lab.explain "a red circle above a blue square" --seed 7 --out samples/circle.html
    python -m lab.explain "a red circle" --other "a blue circle"     # two from the same noise

The page is one file that needs nothing else: a browser shows it without a network.

The one idea: watching changes nothing. The pipeline draws as it does in sample.py, while hooks keep
what its networks were asked and what they answered. All other numbers of the page follow from these
by the repository's own arithmetic, so the page cannot drift away from the code.

Letters: B batch, D CLIP embedding, N context tokens of the decoder, H, W picture sides, n captions.
"""

import base64
import io
import json
import os
import shlex
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from decoder import IMAGE_TOKENS
from diffusion import at_least_float32, guided
from lab.judge import S, judge, score
from lab.measures import look
from lab.plots import file_ending, ticks
from networks import Attention
from prior import embedding_scale
from sample import Pipeline, noise_for
from support.captions import captions_of
from support.checkpoint import load_checkpoint
from support.pictures import load_data
from support.shapes import parse_caption
from support.sheets import to_pil, to_tensor
from support.tools import Parser, UserError, choose_device, positive, seed_number, user_errors

FRAMES, STRIP, LISTED = 32, 8, 300  # steps of the slider and on paper; captions to compare with

# --- watching a drawing ----------------------------------------------------------------------


@dataclass
class Step:
    """One step of an ancestral sampler: x at t_prev is c1 * pred_x_0 + c2 * x_t + sigma * noise."""

    t: int
    signal: float  # x_t is signal * x_0 + noise_level * noise
    noise_level: float
    x_t: torch.Tensor  # (B, ...)
    branches: list  # the x_0 predicted with the condition and, if guided, without; not clipped
    pred_x_0: torch.Tensor  # what guidance makes of the two, clipped
    c1: float
    c2: float
    mean: torch.Tensor  # c1 * pred_x_0 + c2 * x_t
    sigma: torch.Tensor  # 0 in the last step
    noise: torch.Tensor | float = 0.0


@contextmanager
def recorded(network):
    """Yields a list to which every call of a network is added: (x_t, t, out)."""
    calls = []
    with network.register_forward_hook(lambda net, args, out: calls.append((*args, out))):
        yield calls


def steps_of(diffusion, calls, scale):
    """The Steps behind the recorded calls of one sampling."""
    steps = []
    for (x, t, out), (_, t_prev, _) in pairwise([*calls, (None, -torch.ones_like(calls[0][1]), 0)]):
        B = len(x) if scale == 1 else len(x) // 2  # both branches are in one batch
        x_t, t, t_prev = x[:B], t[:B], t_prev[:B]
        whole = guided(lambda *_: out, {}, {}, scale)(x_t, t)
        mean, log_variance, pred_x_0 = diffusion.p_mean_variance(whole, x_t, t, t_prev)
        branches = [diffusion.predictions(o, x_t, t, clip=False)[0] for o in out.split(B)]
        signal, level, c1, c2 = (float(x.flatten()[0]) for x in (
            *diffusion.signal_sigma(t, x_t), *diffusion.step(t, t_prev)[:2]))
        sigma = torch.exp(0.5 * log_variance) * (t_prev[0] >= 0)
        steps.append(Step(int(t[0]), signal, level, x_t, branches, pred_x_0, c1, c2, mean, sigma))
    return steps


def attention_weights(module, x, context, context_mask):
    """The softmax inside an Attention, (B, heads, H * W, N + H * W): each row adds up to one."""
    pixels = module.norm(x).flatten(2).transpose(1, 2)
    q, k, _ = module.qkv(pixels).chunk(3, dim=-1)
    k = torch.cat([module.context_kv(context).chunk(2, dim=-1)[0], k], dim=1)
    q, k = (at_least_float32(y.unflatten(2, (module.heads, -1)).transpose(1, 2)) for y in (q, k))
    mask = F.pad(context_mask, (0, pixels.shape[1]), value=True)[:, None, None]
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    return at_least_float32(logits).masked_fill(~mask, -torch.inf).softmax(dim=-1)


@contextmanager
def recorded_attention(unet):
    """Yields {side: [(N + 1, side, side), ...]}: how much each pixel looks at each context token,
    and last at the picture. One entry for every call of every layer of that side."""
    shares, handles = defaultdict(list), []

    def keep(module, args, out):
        side, N = args[0].shape[-1], args[1].shape[1]
        rows = attention_weights(module, *args)[0].mean(0)  # with the condition; mean over heads
        rows = torch.cat([rows[:, :N], rows[:, N:].sum(1, keepdim=True)], dim=1)
        shares[side].append(rows.T.reshape(N + 1, -1, side))

    for module in unet.modules():
        if isinstance(module, Attention):
            handles.append(module.register_forward_hook(keep))
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Drawing:
    """What Watched keeps of one picture."""

    caption: str
    text: tuple = None  # text_emb, text_enc, text_mask
    scale: float = 0.0  # guidance of the decoder
    ways: dict = field(default_factory=dict)  # {guidance of the prior: Steps of its candidates}
    image_emb: torch.Tensor = None  # (1, D), the prior's
    attempts: list = field(default_factory=list)  # of the decoder: (picture, Steps, attention)
    closeness: list = field(default_factory=list)  # to image_emb, of each attempt in CLIP's eyes
    best: int = 0
    enlarged: list = field(default_factory=list)  # (stage, condition, picture), each (1, 3, H, W)
    pictures: list = field(default_factory=list)  # PIL, one a size


class Watched(Pipeline):
    """A Pipeline that keeps what happens while it draws, and draws the same."""

    def explain(self, caption, seed, size):
        """Draw one picture -> Drawing."""
        self.now = Drawing(caption)
        self.now.pictures = self.draw(caption, [seed], size, stages=True)
        self.embed(self.now.text, [seed], 1)  # what the prior does unguided
        return self.now

    def embed(self, text, seeds, scale=1.0, steps=None):
        with recorded(self.prior) as calls:
            emb = super().embed(text, seeds, scale, steps)
        scale = self.prior.usual_scale if scale is None else scale
        self.now.ways[scale] = steps_of(self.prior.diffusion, calls, scale)
        return emb

    def decode(self, image_emb, text, seeds, scale=2.0, attempt=0, **settings):
        with recorded(self.decoder) as calls, recorded_attention(self.decoder.unet) as shares:
            picture = super().decode(image_emb, text, seeds, scale, attempt, **settings)
        steps = steps_of(self.decoder.diffusion, calls, scale)
        shares = {side: torch.stack(x).unflatten(0, (len(steps), -1)).mean(1)  # over layers
                  for side, x in shares.items()}
        noise = noise_for(seeds, "decoder", attempt)
        noise(picture.shape)  # x_T
        for step in steps[:-1]:
            step.noise = noise(picture.shape).to(picture)
        self.now.attempts.append((picture, steps, shares))
        self.now.text, self.now.scale = text, scale
        return picture

    def decode_best(self, candidates, image_emb, *rest, **settings):
        picture, best = super().decode_best(candidates, image_emb, *rest, **settings)
        seen = [self.clip.encode_image(x) for x, *_ in self.now.attempts]
        self.now.closeness = [float((emb * image_emb).sum()) for emb in seen]
        self.now.image_emb, self.now.best = image_emb, int(best)
        return picture, best

    def upsample(self, pictures, seeds, size):
        larger = super().upsample(pictures, seeds, size)
        for stage, model in self.upsamplers.items():
            if pictures.shape[-1] < larger.shape[-1] == model.config.size:
                self.now.enlarged.append((stage, model.condition(pictures), larger))
        return larger


class Known:
    """What drawings are compared with: captions, and pictures of the data, if they are there."""

    def __init__(self, pipeline, asked, root=None, file=None):
        run = load_checkpoint(pipeline.folder / "decoder.pt")["run"]
        self.judged, captions = run.get("data", "shapes") == "shapes", []
        self.image_embs = torch.empty(0, pipeline.clip.dim)
        try:
            data = load_data(run.get("data", "shapes"), root or run.get("root"), "val", LISTED)
            captions = [c[i % len(c)] for i, c in enumerate(map(data.captions, range(len(data))))]
            self.image_embs = look(pipeline.clip, data).cpu()
        except UserError as e:
            if root:
                raise
            print(f"note: nothing to compare with on the map ({e})")
        self.captions = sorted({*(captions_of(file)[:LISTED] if file else captions), *asked})
        self.text_embs = torch.cat([pipeline.text(self.captions[k:k + 64])[0].cpu()
                                    for k in range(0, len(self.captions), 64)])

    def nearest(self, emb, but=None, count=5):
        """[(cosine, caption), ...]: those closest to an embedding (1, D)."""
        cosines = (self.text_embs @ emb.cpu()[0]).tolist()
        found = sorted(zip(cosines, self.captions), reverse=True)
        return [pair for pair in found if pair[1] != but][:count]


# --- pieces of a page ------------------------------------------------------------------------


def uri(picture, **options):
    """A PIL picture, or a tensor (3, H, W) or (H, W) in [-1, 1], as a data URI: PNG, or WebP at a
    given quality."""
    if isinstance(picture, torch.Tensor):
        gray = picture.dim() == 2
        picture = to_pil(picture.expand(3, -1, -1))
        picture = picture.convert("L") if gray else picture
    kind, stream = "webp" if options else "png", io.BytesIO()
    picture.save(stream, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def figure(source, alt, caption="", kind="", frames=""):
    """A picture with a line below. frames: the name of what the slider puts in its place."""
    moving = f' data-frames="{frames}"' if frames else ""
    smooth = ' class="smooth"' if "webp" in source[:20] else ""
    return (f'<figure class="{kind}"><img src="{source}" alt="{escape(alt)}"{smooth}{moving}>'
            f"<figcaption>{caption}</figcaption></figure>")


def row(*figures):
    return f'<div class="row">{"".join(figures)}</div>'


def table(*rows):
    cells = ("".join(f"<td>{x if isinstance(x, str) else f'{x:.3f}'}</td>" for x in r) for r in rows)
    return f"<table>{''.join(f'<tr>{r}</tr>' for r in cells)}</table>"


def vector(emb, alt):
    """An embedding (1, D) as a strip of grays, black and white at four standard deviations."""
    strip = emb[0].float().cpu() * emb.shape[1] ** 0.5 / 4
    return figure(uri(strip[None]), alt, f"{alt}: {emb.shape[1]} numbers", "vector")


def chart(alt, x_label, y_label, lines, dots=()):
    """An SVG chart; the page's style has the colours. lines, dots: (name, classes, points)."""
    points = np.array([p for _, _, ps in (*lines, *dots) for p in ps], float)
    (x0, y0), (x1, y1) = points.min(0), points.max(0) + 1e-9

    def at(x, y):
        return f"{40 + 310 * (x - x0) / (x1 - x0):.1f} {200 - 180 * (y - y0) / (y1 - y0):.1f}"

    parts = [f'<path d="M{at(x, y0)}V20"/><text x="{at(x, y0).split()[0]}" y="213" '
             f'text-anchor="middle">{x:g}</text>' for x in map(float, ticks(x0, x1))]
    parts += [f'<path d="M{at(x0, y)}H350"/><text x="36" y="{float(at(x0, y).split()[1]) + 3:.1f}" '
              f'text-anchor="end">{y:.2g}</text>' for y in map(float, ticks(y0, y1))]
    for _, kind, ps in dots:
        size = 2 if len(ps) > 3 else 5
        centres = (at(*p).split() for p in ps)
        parts += [f'<circle class="{kind}" cx="{x}" cy="{y}" r="{size}"/>' for x, y in centres]
    parts += [f'<path class="line {kind}" d="M{"L".join(at(*p) for p in ps)}"/>'
              for _, kind, ps in lines]
    names = ", ".join(f'<span class="key {kind}">{"- -" if "dash" in kind else "&#9679;"} {name}'
                      "</span>" for name, kind, _ in (*lines, *dots))
    return (f'<figure class="wide"><svg viewBox="0 0 360 234" role="img" aria-label="{escape(alt)}">'
            f'{"".join(parts)}<text x="195" y="230" text-anchor="middle">{x_label}</text>'
            f'<text x="4" y="12">{y_label}</text></svg><figcaption>{names}</figcaption></figure>')


def evenly(count, most):
    """At most `most` of range(count), evenly spread, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


# --- the five parts --------------------------------------------------------------------------


def caption_part(drawing, pipeline, known):
    tokenizer, ids = pipeline.clip.tokenizer, pipeline.clip.tokenizer([drawing.caption])[0]
    words, padding = pieces_of(drawing, tokenizer), len(ids) - int(drawing.text[2].sum())
    tokens = "".join(f'<span class="token">{escape(w)}</span>' for w in words)
    nearest = known.nearest(drawing.text[0], but=drawing.caption)
    return (f'<p>{tokens}<span class="token pad">and {padding} of padding</span></p>'
            + vector(drawing.text[0], "text_emb")
            + (f"<h3>Captions near it</h3>{listed(nearest)}" if nearest else ""))


def listed(found, asked=None):
    return table(*((cosine, f"<b>{escape(c)}</b>" if c == asked else escape(c))
                   for cosine, c in found))


def pieces_of(drawing, tokenizer):
    """The caption's tokens as CLIP reads them: start, pieces of words, end."""
    count = int(drawing.text[2].sum())
    pieces = tokenizer.bpe.encode(drawing.caption)[:count - 2]
    strange = set() if tokenizer.vocab is None else set(pieces) - set(tokenizer.vocab.tolist())
    words = (tokenizer.bpe.decode([p]).strip() + (" (unknown)" if p in strange else "")
             for p in pieces)
    return ["start", *words, "end"]


def prior_part(drawing, pipeline, known):
    text_emb, unit = drawing.text[0].cpu(), embedding_scale(pipeline.clip.dim)
    ways = {scale: torch.stack([s.x_t.cpu() for s in steps] + [steps[-1].pred_x_0.cpu()]) / unit
            for scale, steps in drawing.ways.items()}  # (steps + 1, candidates, D)
    cloud = torch.cat([known.image_embs, known.text_embs])
    _, size, axes = torch.linalg.svd(cloud - cloud.mean(0), full_matrices=False)
    share = (size ** 2 / (size ** 2).sum())[:2].tolist()

    def on_map(emb):
        return ((emb - cloud.mean(0)) @ axes[:2].T).tolist()

    paths, cosines, rows = [], [], []
    for scale, way in ways.items():
        ends = F.normalize(way[-1], dim=-1) @ text_emb[0]
        for k, end in enumerate(ends.tolist()):
            dash = "" if scale == max(ways) else " dash"
            name, kind = f"candidate {k + 1}, guidance {scale:g}", "ab"[k % 2] + dash
            paths.append((name, kind, on_map(way[:, k])))
            cosines.append((name, kind, [
                (i + 1, float(F.cosine_similarity(s.pred_x_0[k].cpu(), text_emb[0], dim=0)))
                for i, s in enumerate(drawing.ways[scale])]))
            rows.append((name, end, "kept" if k == int(ends.argmax()) else ""))
    dots = [("pictures", "d", on_map(known.image_embs)), ("captions", "e", on_map(known.text_embs)),
            ("text_emb", "c", on_map(text_emb))]
    axis = "component {}: {:.0%} of the variance"
    return (chart("The ways of the candidates from noise to an image embedding, among embeddings of "
                  "pictures and captions", axis.format(1, share[0]), axis.format(2, share[1]),
                  paths, [d for d in dots if d[2]])
            + chart("Cosine of each candidate's predicted embedding with text_emb, by step", "step",
                    "cosine of the predicted embedding with text_emb", cosines)
            + "<h3>Dot products with text_emb</h3>" + table(*rows)
            + f"<p><small>This drawing is guided at {next(iter(ways)):g}; 1 is off. The paper found "
            "that guiding its prior hurt results (sec. 5.5).</small></p>"
            + vector(drawing.image_emb, "the embedding that goes to the decoder"))


def decoder_part(drawing, number, tokens, frames):
    """Adds to frames what the slider shows."""
    _, steps, shares = drawing.attempts[drawing.best]
    shown, name = evenly(len(steps), FRAMES), "d{}{}".format
    some, middle = [steps[k] for k in shown], len(shown) // 2
    frames["now"] = [f"{k + 1} of {len(steps)}, t = {s.t}: {s.signal:.0%} signal, {s.noise_level:.0%} "
                     "noise" for k, s in zip(shown, some)]
    changes = [s.branches[0][0] - s.branches[-1][0] for s in some]
    gain = 1 / max(0.02, float(torch.stack(changes).abs().flatten()[::7].quantile(0.995)))
    pictures = {
        "x": ("x<sub>t</sub>", "noisy picture", [s.x_t[0] for s in some]),
        "y": ("predicted x<sub>0</sub>", "predicted picture", [s.pred_x_0[0] for s in some]),
        "c": ("with the condition", "prediction with it", [s.branches[0][0] for s in some]),
        "u": ("without", "prediction without", [s.branches[-1][0] for s in some]),
        "g": (f"difference, {gain:.1f} times", "difference", [x * gain for x in changes])}
    cells = []
    for key, (label, alt, x) in pictures.items():
        frames[name(number, key)] = [uri(p) for p in x]
        cells.append(figure(frames[name(number, key)][middle], f"{alt} at the chosen step", label,
                            frames=name(number, key)))
    frames[name(number, "sum")] = [
        f"{s.c1:.3f} × predicted x₀ + {s.c2:.3f} × this x + "
        f"{float(s.sigma.mean()):.3f} × fresh noise" for s in some]
    parts = [row(*cells), f'<p>The next x is <span data-frames="{name(number, "sum")}">'
             f'{frames[name(number, "sum")][middle]}</span>. The prediction is the one without, plus '
             f"{drawing.scale:g} times the difference.</p>"]
    names = [f"image token {k + 1}" for k in range(IMAGE_TOKENS)] + tokens + ["the picture"]
    for side, all_maps in shares.items():
        maps = torch.cat([all_maps[:, :len(names) - 1], all_maps[:, -1:]], dim=1).cpu()[shown]
        parts.append(attention_part(maps, side, names, number, frames, middle))
    strip = evenly(len(some), STRIP)
    for key, alt in ("x", "noisy picture"), ("y", "predicted picture"):
        parts.append(row(*(figure(frames[name(number, key)][k], f"{alt}, step {shown[k] + 1}",
                                  f"{shown[k] + 1}", "strip") for k in strip)))
    return "".join(parts)


def attention_part(maps, side, names, number, frames, middle):
    """maps (steps, tokens + 1, side, side): the share of each pixel's attention."""
    top, cells = float(maps[:, :-1].max()), []
    for k, name in enumerate(names):
        key, whole = f"d{number}a{side}t{k}", 1.0 if k == len(names) - 1 else top
        frames[key] = [uri(2 * x / whole - 1) for x in maps[:, k]]
        frames[key + "n"] = [f"{x:.1%}" for x in maps[:, k].mean((1, 2)).tolist()]
        label = f'{escape(name)}<br><span data-frames="{key}n">{frames[key + "n"][middle]}</span>'
        cells.append(figure(frames[key][middle], f"attention of each of {side} x {side} places to "
                            f"{name} at the chosen step", label, "map", key))
    sums = {"image tokens": maps[:, :IMAGE_TOKENS], "caption": maps[:, IMAGE_TOKENS:-1],
            "picture": maps[:, -1:]}
    lines = [(f"the {name}", kind, list(enumerate(x.sum(1).mean((1, 2)).tolist(), start=1)))
             for kind, (name, x) in zip("abc", sums.items())]
    return (f"<h3>Where each of {side} &times; {side} places looks</h3>" + row(*cells)
            + f"<p><small>Each place shares out 100% (mean of heads and layers). White is {top:.0%} of "
            "it for a token, 100% for the picture. The four image tokens are made of the embedding."
            "</small></p>"
            + chart(f"Share of attention at {side} x {side} by step", "step shown in the slider",
                    "share", lines))


def upsampler_part(drawing):
    parts = []
    for stage, before, after in drawing.enlarged:
        change, side = (after - before)[0].cpu(), after.shape[-1]
        gain = 1 / max(0.02, float(change.abs().flatten()[::97].quantile(0.999)))
        # The part with the largest correction, at its own pixels.
        cut = side // 4
        energy = F.avg_pool2d(change.square().sum(0)[None], cut, max(1, cut // 4))[0]
        top, left = (int(i) * max(1, cut // 4) for i in divmod(int(energy.argmax()), len(energy)))
        window = (slice(None), slice(top, top + cut), slice(left, left + cut))
        trio = {"before": before[0].cpu(), "after": after[0].cpu(),
                f"correction, {gain:.1f} times": change * gain}
        parts += [f"<h3>{stage}: to {side} pixels</h3>"]
        parts += [row(*(figure(uri(x, quality=85), f"{label}, the whole picture", label)
                        for label, x in trio.items()))]
        parts += [row(*(figure(uri(x[window], quality=90), f"{label}, a part of it",
                               f"{label}, {cut} pixels of it") for label, x in trio.items()))]
    return "".join(parts) or "<p>This folder has no upsampler to this size.</p>"


def result_part(drawing, pipeline, known):
    picture = drawing.pictures[-1]
    emb = pipeline.look(picture)
    tries = [figure(uri(x[0]), f"attempt {k + 1}", f"attempt {k + 1}: {drawing.closeness[k]:.3f}"
                    + (", kept" if k == drawing.best else ""))
             for k, (x, *_) in enumerate(drawing.attempts)]
    parts = ["<h3>Cosine of each attempt with the embedding asked for</h3>", row(*tries),
             f"<h3>The finished picture of {picture.width} pixels: cosines</h3>",
             table(("with the embedding asked for", float((emb * drawing.image_emb).sum())),
                   ("with text_emb", float((emb * drawing.text[0]).sum())))]
    best = known.nearest(emb)
    parts.append("<h3>Captions that CLIP finds closest</h3>" + listed(best, drawing.caption))
    return "".join(parts) + (judged(picture, drawing.caption) if known.judged else "")


def judged(picture, caption):
    """What lab/judge.py sees in a picture of shapes."""
    seen = judge(picture)
    things = [(" ".join(filter(None, (t.size, t.colour, t.shape or "blob"))),
               f"at {t.x:.2f}, {t.y:.2f}") for t in seen.things]
    parts = [f"<h3>What the judge sees, on {seen.background or 'no known background'}</h3>",
             table(*things) if things else "<p>no object</p>"]
    try:
        marks = score(seen, parse_caption(caption)).items()
        parts.append(table(*((k, "right" if x else "wrong") for k, x in marks if x is not None)))
    except UserError:
        parts.append("<p>The caption is outside its grammar, so it does not compare.</p>")
    return "".join(parts)


# --- the page --------------------------------------------------------------------------------


def page(pipeline, drawings, known, command):
    """The HTML text of drawings from the same seed, side by side."""
    frames, columns = {}, defaultdict(str)
    for k, drawing in enumerate(drawings):
        tokens = pieces_of(drawing, pipeline.clip.tokenizer)
        last = drawing.pictures[-1]
        source = uri(last, quality=90) if last.width > 256 else uri(last)
        parts = {"heads": figure(source, f"the drawing of: {drawing.caption}",
                                 f"{escape(drawing.caption)}: {last.width} pixels", "large"),
                 "captions": caption_part(drawing, pipeline, known),
                 "priors": prior_part(drawing, pipeline, known),
                 "decoders": decoder_part(drawing, k, tokens, frames),
                 "upsamplers": upsampler_part(drawing),
                 "results": result_part(drawing, pipeline, known)}
        for name, html in parts.items():
            columns[name] += f"<div>{html}</div>"
    last = len(frames["now"]) - 1
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(
        columns, title=escape(" / ".join(d.caption for d in drawings)), draw=escape(command),
        last=last, middle=(last + 1) // 2, now=frames["now"][(last + 1) // 2],
        frames=json.dumps(frames))


@user_errors
def main(argv=None):
    parser = Parser("python -m lab.explain", description="A page that explains one drawing.")
    add = parser.add_argument
    add("caption", help="what to draw")
    add("--other", metavar="CAPTION", help="a second drawing from the same seed, beside it")
    add("--weights", help="folder of checkpoints (default: as sample.py)")
    add("--seed", type=seed_number, default=0, help="of the picture")
    add("--size", type=positive, default=1024, help="largest side of the picture")
    add("--out", type=file_ending(".html"), default="samples/explain.html", help="file to write")
    add("--root", help="folder of the data, for the map (default: as in the training)")
    add("--captions", metavar="FILE", help="to compare with, one a line (default: the data's)")
    add("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
    add("--clip", help="MODEL:TAG=FILE, to read the CLIP of the training from a file")
    args = parser.parse_args(argv)
    captions = [args.caption] + [args.other] * (args.other is not None)
    pipeline = Watched(args.weights, args.device, args.size, clip=args.clip)
    pipeline.text(captions)  # refuses an empty one before the work
    size = max(side for side in pipeline.sizes if side <= max(args.size, pipeline.sizes[0]))
    known = Known(pipeline, captions, args.root, args.captions)
    drawings = [pipeline.explain(caption, args.seed, size)
                for caption in tqdm(captions, "drawing", disable=None)]
    command = ["python", "sample.py", *captions, "-n", "1", "--seed", str(args.seed)]
    command += ["--size", str(size)] + ["--weights", args.weights] * (args.weights is not None)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    beside = args.out.with_name(f".{os.getpid()}.{args.out.name}")
    beside.write_text(page(pipeline, drawings, known, shlex.join(command)), encoding="utf-8")
    os.replace(beside, args.out)
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
