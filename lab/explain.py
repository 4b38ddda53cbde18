"""One drawing explained, from its caption to its pixels, in a page that needs nothing else:

    python -m lab.explain "a red circle above a blue square" --seed 7 --out samples/circle.html
    python -m lab.explain "a red circle" --other "a blue circle"     # two from the same noise

This file gathers numbers and pictures as lists of blocks; explain.html shows them. The one idea:
watching changes nothing. The pipeline draws as in sample.py, while hooks keep what its networks
were asked and what they answered; all else follows from that by the repository's own arithmetic.

Letters: B batch, D CLIP embedding, N context tokens of the decoder, H, W picture sides.
"""

import base64
import io
import json
import shlex
import sys
from argparse import Namespace
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F

from decoder import IMAGE_TOKENS
from diffusion import at_least_float32, guided
from lab.judge import judge, score
from lab.measures import look
from networks import Attention
from prior import embedding_scale
from sample import Pipeline, noise_for
from support.checkpoint import load_checkpoint
from support.drawing import drawing_options, reachable_size
from support.pictures import load_data
from support.shapes import parse_caption
from support.sheets import file_ending, to_pil
from support.tools import Parser, UserError, user_errors

FRAMES, LISTED = 32, 300  # steps on the slider; pictures and captions to compare with

# --- watching a drawing ----------------------------------------------------------------------


@contextmanager
def recorded(network):
    """Yields a list to which every call of a network is added: (x_t, t, out)."""
    calls = []
    with network.register_forward_hook(lambda net, args, out: calls.append((*args, out))):
        yield calls


def steps_of(diffusion, calls, scale, noise=None):
    """The steps of the ancestral sampler behind the recorded calls of its network, each with

        x at t_prev  =  c1 * pred_x_0 + c2 * x_t + sigma * noise

    branches: the x_0 predicted with the condition and, if guided, without; not clipped. pred_x_0:
    what guidance makes of them. noise: a function shape -> the noise that this sampling drew."""
    steps, levels = [], [t for _, t, _ in calls]
    for (x, t, out), t_prev in zip(calls, [*levels[1:], torch.full_like(levels[0], -1)]):
        B = len(x) if scale == 1 else len(x) // 2  # both branches are in one batch
        x_t, t, t_prev, last = x[:B], t[:B], t_prev[:B], int(t_prev[0]) == -1
        whole = guided(lambda *_: out, {}, {}, scale)(x_t, t)
        mean, log_variance, pred_x_0 = diffusion.p_mean_variance(whole, x_t, t, t_prev)
        c1, c2, _, _ = diffusion.step(t, t_prev)
        steps.append(Namespace(
            t=int(t[0]), signal=diffusion.alpha_bar(t)[0].sqrt().item(), x_t=x_t, mean=mean,
            branches=[diffusion.predictions(o, x_t, t, clip=False)[0] for o in out.split(B)],
            pred_x_0=pred_x_0, c1=c1[0].item(), c2=c2[0].item(),
            sigma=torch.exp(0.5 * log_variance) * (not last),
            noise=0.0 if last or noise is None else noise(x_t.shape).to(x_t)))
    return steps


def attention_weights(module, x, context, context_mask):
    """The softmax inside an Attention, (B, heads, H * W, N + H * W): each row adds up to one."""
    pixels = module.norm(x).flatten(2).transpose(1, 2)
    q, k, _ = module.qkv(pixels).chunk(3, dim=-1)
    k = torch.cat([module.context_kv(context).chunk(2, dim=-1)[0], k], dim=1)
    q, k = (y.unflatten(2, (module.heads, -1)).transpose(1, 2) for y in (q, k))
    mask = F.pad(context_mask, (0, pixels.shape[1]), value=True)[:, None, None]
    logits = at_least_float32(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2))
    return logits.masked_fill(~mask, -torch.inf).softmax(dim=-1)


@contextmanager
def recorded_attention(unet):
    """Yields {side: [(N + 1, side, side), ...]}: how much each place looks at each context token,
    and last at the picture, with the condition. An entry for each call of each layer."""
    shares = {}

    def keep(module, args, out):
        side, N = args[0].shape[-1], args[1].shape[1]
        rows = attention_weights(module, *args)[0].mean(dim=0)  # (H * W, N + H * W)
        rows = torch.cat([rows[:, :N], rows[:, N:].sum(dim=1, keepdim=True)], dim=1)
        shares.setdefault(side, []).append(rows.T.reshape(N + 1, -1, side).cpu())

    hooks = [m.register_forward_hook(keep) for m in unet.modules() if isinstance(m, Attention)]
    yield shares
    for hook in hooks:
        hook.remove()


class Watched(Pipeline):
    """A Pipeline that keeps what happens while it draws, and draws the same."""

    def explain(self, caption, seed, size):
        """Draw a picture -> its caption, words (as CLIP reads them), text (their encoding), ways
        {the prior's guidance: steps}, image_emb (1, D), attempts [(picture, steps, attention,
        guidance)], best (which one), enlarged [(stage, condition, picture)], pictures."""
        self.now = now = Namespace(caption=caption, ways={}, attempts=[], enlarged=[])
        now.pictures = self.draw(caption, [seed], size, stages=True)
        self.embed(now.text, [seed], scale=1)  # for comparison: the prior without guidance
        bpe, vocab = self.clip.tokenizer.bpe, self.clip.tokenizer.vocab
        pieces = bpe.encode(caption)[:int(now.text[2].sum()) - 2]  # without start and end
        now.words = ["start", *(bpe.decode([p]).strip() + " (unknown)" * (
            vocab is not None and p not in vocab) for p in pieces), "end"]
        return now

    def embed(self, text, seeds, scale=1.0, steps=None):
        scale = self.prior.usual_scale if scale is None else scale
        with recorded(self.prior) as calls:
            emb = super().embed(text, seeds, scale, steps)
        self.now.ways[scale] = steps_of(self.prior.diffusion, calls, scale)
        return emb

    def decode(self, image_emb, text, seeds, scale=2.0, attempt=0, **settings):
        with recorded(self.decoder) as calls, recorded_attention(self.decoder.unet) as shares:
            picture = super().decode(image_emb, text, seeds, scale, attempt, **settings)
        noise = noise_for(seeds, "decoder", attempt)
        noise(picture.shape)  # x_T comes first
        steps = steps_of(self.decoder.diffusion, calls, scale, noise)
        shares = {side: torch.stack(x).unflatten(0, (len(steps), -1)).mean(dim=1)  # over layers
                  for side, x in shares.items()}
        self.now.attempts.append((picture, steps, shares, scale))
        return picture

    def decode_best(self, candidates, image_emb, text, *rest, **settings):
        picture, best = super().decode_best(candidates, image_emb, text, *rest, **settings)
        self.now.text, self.now.image_emb, self.now.best = text, image_emb, int(best)
        return picture, best

    def upsample(self, pictures, seeds, size):
        larger = super().upsample(pictures, seeds, size)
        for stage, model in self.upsamplers.items():
            if pictures.shape[-1] < larger.shape[-1] == model.config.size:
                self.now.enlarged.append((stage, model.condition(pictures), larger))
        return larger


class Known:
    """What drawings are compared with: captions, and pictures of the data where they are there."""

    def __init__(self, pipeline, asked, root=None):
        run = {"data": "shapes"} | load_checkpoint(pipeline.folder / "decoder.pt")["run"]
        self.shapes, root = run["data"] == "shapes", root or run.get("root")
        data = load_data(run["data"], root, "val", LISTED) if root or self.shapes else ()
        captions = (data.captions(i) for i in range(len(data)))
        self.captions = sorted({*(c[i % len(c)] for i, c in enumerate(captions)), *asked})
        self.text_embs = pipeline.text(self.captions)[0].cpu()
        self.image_embs = look(pipeline.clip, data).cpu() if data else self.text_embs[:0]

    def nearest(self, emb, but=None):
        """Rows (cosine, caption) of the five that are closest to an embedding (1, D)."""
        found = sorted(zip((self.text_embs @ emb.cpu()[0]).tolist(), self.captions), reverse=True)
        return [row for row in found if row[1] != but][:5]


# --- the page's parts: lists of blocks, which explain.html shows -------------------------------


def uri(picture, quality=None):
    """A PIL picture, or a tensor, (3, H, W) in [-1, 1] or gray, (H, W) in [0, 1], as a data URI: to
    the bit, or with a quality as WebP."""
    if isinstance(picture, torch.Tensor):
        picture = to_pil(picture if picture.dim() == 3 else (2 * picture - 1).expand(3, -1, -1))
    file, kind = io.BytesIO(), "webp" if quality else "png"
    picture.save(file, kind, quality=quality or 0)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def full_scale(change):
    """The factor that shows a difference best: it brings nearly all of it to [-1, 1]."""
    return 1 / max(0.02, change.abs().flatten()[::97].quantile(0.998).item())


def prior_part(now, known):
    text_emb, cloud = now.text[0].cpu(), torch.cat([known.image_embs, known.text_embs])
    unit = embedding_scale(text_emb.shape[1])
    if len(cloud) < 3:  # without the data this is a map of the drawing alone
        cloud = torch.cat([s.x_t.cpu() / unit for way in now.ways.values() for s in way])
    _, sizes, axes = torch.linalg.svd(cloud - cloud.mean(0), full_matrices=False)
    labels = [f"component {k + 1}: {share:.0%} of the variance" for k, share in
              enumerate((sizes ** 2 / (sizes ** 2).sum())[:2].tolist())]

    def on_map(emb):
        return ((emb - cloud.mean(0)) @ axes[:2].T).tolist()

    paths, cosines, rows = [], [], []
    for dash, (scale, steps) in zip(("", " dash"), now.ways.items()):
        x = torch.stack([s.x_t for s in steps] + [steps[-1].pred_x_0]).cpu()  # (.., candidates, D)
        predicted = torch.stack([s.pred_x_0 for s in steps]).cpu()
        cosine = F.cosine_similarity(predicted, text_emb, dim=-1)  # (steps, candidates)
        for k, end in enumerate(cosine[-1].tolist()):
            name = f"candidate {k + 1}, guidance {scale:g}", "ab"[k % 2] + dash
            paths.append((*name, on_map(x[:, k] / unit)))
            cosines.append((*name, list(enumerate(cosine[:, k].tolist(), start=1))))
            rows.append((end, name[0] + ", kept" * (k == int(cosine[-1].argmax()))))
    dots = [("pictures", "d", on_map(known.image_embs)), ("captions", "e", on_map(known.text_embs))]
    paths.append(("text_emb", "c", on_map(text_emb)))
    return [{"charts": [
        {"x": labels[0], "y": labels[1], "lines": paths, "dots": dots},
        {"x": "step", "y": "predicted embedding's cosine with text_emb", "lines": cosines}]},
        {"heading": "Dot products with text_emb", "table": rows}]


def decoder_part(now):
    """Its blocks, and what the slider says at each of its places."""
    _, steps, shares, scale = now.attempts[now.best]
    shown = sorted({round(k * (len(steps) - 1) / (FRAMES - 1)) for k in range(FRAMES)})
    some = [steps[k] for k in shown]
    pairs = [(s.branches[0][0], s.branches[-1][0]) for s in some]  # with the condition, without
    gain = full_scale(torch.stack([cond - uncond for cond, uncond in pairs]))
    rows = {"xₜ": [s.x_t[0] for s in some], "predicted x₀": [s.pred_x_0[0] for s in some],
            "x₀ with the condition": [cond for cond, _ in pairs],
            "x₀ without it": [uncond for _, uncond in pairs],
            f"difference × {gain:.1f}": [gain * (cond - uncond) for cond, uncond in pairs]}
    blocks = [{"heading": f"Predicted x₀ = x₀ without + {scale:g} × difference", "images": [
        {"src": [uri(x) for x in xs], "label": name} for name, xs in rows.items()]},
        {"text": [f"The next x is {s.c1:.3f} × predicted x₀ + {s.c2:.3f} × xₜ + "
                  f"{s.sigma.mean():.3f} × fresh noise." for s in some]}]
    names = [f"image token {k + 1}" for k in range(IMAGE_TOKENS)] + now.words + ["the picture"]
    for side, maps in shares.items():  # (steps, N + 1, side, side), of which padding's are 0
        maps = torch.cat([maps[:, :len(names) - 1], maps[:, -1:]], dim=1)[shown]
        top, sums = maps[:, :-1].max().item(), maps.mean(dim=(2, 3))
        parts = sums.split([IMAGE_TOKENS, len(now.words), 1], dim=1)
        blocks += [
            {"heading": f"Where each of {side} × {side} places looks. White: {top:.0%} to a token, "
             "100% to the picture", "kind": "map", "images": [
                 {"src": [uri(x / (1 if name == names[-1] else top)) for x in maps[:, k]],
                  "label": [f"{name} {x:.1%}" for x in sums[:, k].tolist()]}
                 for k, name in enumerate(names)]},
            {"charts": [{"x": "position of the slider", "y": "share of attention", "lines": [
                (f"to the {name}", kind, list(enumerate(x.sum(dim=1).tolist(), start=1)))
                for name, kind, x in zip(("image tokens", "caption", "picture"), "abc", parts)]}]}]
    return blocks, [
        f"{k + 1} of {len(steps)}, t = {s.t}: xₜ = {s.signal:.2f} × x₀ + "
        f"{(1 - s.signal ** 2) ** 0.5:.2f} × noise" for k, s in zip(shown, some)]


def upsampler_part(now):
    blocks = []
    for stage, before, after in now.enlarged:
        side, cut, change = after.shape[-1], after.shape[-1] // 4, (after - before)[0]
        most = F.avg_pool2d(change.square().sum(0)[None], cut, cut // 4)[0]
        top, left = (k * (cut // 4) for k in divmod(int(most.argmax()), len(most)))
        trio = {"before": before[0], "after": after[0],
                f"correction × {full_scale(change):.1f}": full_scale(change) * change}
        blocks.append({"heading": f"{stage}, to {side} pixels: {cut} of them", "images": [
            {"src": uri(x[:, top:top + cut, left:left + cut], 90), "label": name}
            for name, x in trio.items()]})
    return blocks or [{"text": "This picture is not enlarged."}]


def result_part(now, known, pipeline):
    emb, tries = pipeline.look(now.pictures[-1]), []
    for k, (x, *_) in enumerate(now.attempts):
        close = (pipeline.clip.encode_image(x) * now.image_emb).sum()
        tries.append({"src": uri(x[0]), "label": f"{close:.3f}" + ", kept" * (k == now.best)})
    blocks = [{"heading": "Cosine of each attempt with image_emb", "images": tries},
              {"heading": "Cosines of the finished picture, with text_emb and captions",
               "table": [((emb * now.image_emb).sum().item(), "image_emb, what was asked for"),
                         ((emb * now.text[0]).sum().item(), "text_emb"), *known.nearest(emb)]}]
    if known.shapes:
        seen, marks = judge(now.pictures[-1]), {"its grammar has no such caption": None}
        with suppress(UserError):
            marks = score(seen, parse_caption(now.caption))
        there = [" ".join(filter(None, (t.size, t.colour, t.shape))) for t in seen.things]
        blocks.append({"heading": f"What the judge sees: {', '.join(there)} on {seen.background}",
                       "table": [({True: "right", False: "wrong"}.get(x, "not said"), name)
                                 for name, x in marks.items()]})
    return blocks


def page(pipeline, drawings, known, command):
    """The HTML text of drawings from the same seed, side by side."""
    columns = []
    for now in drawings:
        last, (blocks, steps) = now.pictures[-1], decoder_part(now)
        source, padding = uri(last, 90 if last.width > 256 else None), int((~now.text[2]).sum())
        columns.append({
            "head": [{"images": [{"src": source, "label": now.caption}], "kind": "large"}],
            "caption": [{"tokens": [*now.words, f"and {padding} of padding"]},
                        {"charts": [{"x": "the numbers of text_emb", "y": "", "lines": [
                            ("text_emb", "a", list(enumerate(now.text[0][0].tolist())))]}]},
                        {"heading": "The captions nearest to it, with their cosines",
                         "table": known.nearest(now.text[0], but=now.caption)}],
            "prior": prior_part(now, known), "decoder": blocks, "upsampler": upsampler_part(now),
            "result": result_part(now, known, pipeline)})
    data = {"title": " / ".join(now.caption for now in drawings), "command": command,
            "columns": columns, "steps": steps}
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("{}", json.dumps(data).replace("<", "\\u003c"), 1)


@user_errors
def main(argv=None):
    parser = Parser("python -m lab.explain", description="A page that explains one drawing.",
                    conflict_handler="resolve")
    add = drawing_options(parser)
    add("caption", help="what to draw")
    add("--other", metavar="CAPTION", help="a second drawing from the same seed, beside it")
    add("--root", help="folder of the data, for the map (default: as in the training)")
    add("--out", type=file_ending(".html"), default="samples/explain.html", help="file to write")
    parser.set_defaults(size=1024)
    args = parser.parse_args(argv)
    captions = [args.caption] + [args.other] * (args.other is not None)
    pipeline = Watched(args.weights, args.device, args.size, clip=args.clip)
    size, known = reachable_size(pipeline, args.size), Known(pipeline, captions, args.root)
    drawings = [pipeline.explain(caption, args.seed, size) for caption in captions]
    command = f"python sample.py {shlex.join(captions)} -n 1 --seed {args.seed} --size {size}"
    command += f" --weights {shlex.quote(args.weights)}" if args.weights else ""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(pipeline, drawings, known, command), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
