"""What the paper found, measured here: each command prints a table, and --json keeps it.

    python -m lab.evaluate captions -n 500      # do the pictures show what their captions say?

judge.py sees what is in a picture; here pictures are drawn, or CLIP is asked, many times over with
known seeds, and the answers are counted.

The one idea: to find which stage loses something, replace the stages before it by the truth. The
true image embedding in place of the prior's shows what the decoder loses; true small pictures in
place of the decoder's show what the upsamplers lose.
Read next: README.md, the section on evaluation.
"""

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from tqdm import tqdm

from lab.findings import report
from lab.judge import COLUMNS, LEAST, S, judge, score, shares
from lab.measures import (
    check_side, draw_batches, frechet_distance, in_batches, linear_probe, look,
    mixed_captions, pairs_shown, precision_recall, prefers, scene_claim, wrong_captions,
)
from manipulate import blend, edit, invert, psnr, redraw, text_diff
from sample import PRIOR_SCALE_HELP, Pipeline, default_weights, generators, load_pipeline
from stages import STAGES, check_clip, clip_of, load_clip, load_stage, needs_clip
from support.cache import embed
from support.pictures import load_data
from support.shapes import (
    BACKGROUNDS, COLOURS, Claim, SHAPES, Shapes, parse_caption, render, with_article,
)
from support.sheets import check_folder, draw_grid, save_picture, to_pil
from support.tools import (
    Parser, UserError, autocast, choose_device, exit_code, finite, positive, seed_number,
)
from train import Batches, validate

def print_table(table):
    """{row: shares} as text."""
    print(f"{'':16}" + "".join(f"{column:>11}" for column in COLUMNS) + f"{'n':>7}")
    for row, share in table.items():
        cells = [f"{'-':>11}" if share[c] is None else f"{share[c]:11.1%}" for c in COLUMNS]
        print(f"{row:16}" + "".join(cells) + f"{share['n']:7}")


def judge_judge(args):
    """Draw fresh scenes, spoil them a little, and compare what the judge sees with the truth."""
    data = Shapes(args.n, "val", args.seed)
    noise = np.random.default_rng(args.seed)

    def noisy(picture):
        pixels = np.asarray(picture) + 255 * 0.05 * noise.standard_normal((S, S, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    conditions = {
        "clean": lambda picture: picture,
        "noise": noisy,  # gaussian, standard deviation 0.05 of [0, 1]
        "blur": lambda picture: picture.filter(ImageFilter.GaussianBlur(0.7)),  # sigma in pixels
    }
    results = {name: [] for name in conditions}
    for i in range(args.n):
        scene = data.scene(i)
        truth, picture = scene_claim(scene), render(scene, S)
        for name, spoil in conditions.items():
            results[name].append(score(judge(spoil(picture)), truth))
    table = {name: shares(scores) for name, scores in results.items()}
    print_table(table)
    return table


def draw(pipeline, captions, args, given="prior", size=S):
    """measures.draw_batches with the settings of the command line."""
    return draw_batches(
        pipeline, captions, args.seed, given, size, scale=args.scale, steps=args.steps,
        prior=(args.prior_scale, args.prior_steps), candidates=args.candidates,
    )


# Each row of `captions`: which scenes, which stages, what the decoder is given.
ROWS = {
    "true_embedding": {"prior": None},
    "text": {},
    "held_out": {"split": "held_out"},
    "ar_prior": {"prior": "ar_prior"},
    "text_emb": {"prior": None, "condition": "text_emb"},
    "caption": {"prior": None, "condition": "caption"},
    "trained_text": {"prior": None, "decoder": "decoder_text_emb", "condition": "text_emb"},
    "glide": {"prior": None, "decoder": "decoder_caption", "condition": "caption"},
}


def judge_captions(args):
    """Draw validation captions and judge the pictures by what the captions say, in rows:

    true_embedding  CLIP's embedding of the scene itself: what the decoder loses
    text            the whole of unCLIP: what the prior loses on top
    held_out        the same for colour-shape pairs that no training picture had
    ar_prior        the autoregressive prior in place of the diffusion prior
    text_emb        the text embedding as if it were an image's; caption: no embedding at all
    trained_text    a decoder trained on text embeddings; glide: one trained on captions alone
    """
    table = {}
    for row in args.rows:
        settings = {"split": "val", "condition": "prior"} | ROWS[row]
        split, given = settings.pop("split"), settings.pop("condition")
        pipeline = Pipeline(args.weights, args.device, S, **settings)
        check_side(pipeline)
        if not table:
            print(f"weights: {args.weights}, drawn at {pipeline.sizes[0]}, judged at {S} px")
        data = Shapes(args.n, split, args.seed)
        captions = mixed_captions(data)
        if row == "true_embedding":
            given = look(pipeline.clip, data)
        pictures = torch.cat([part for _, part in draw(pipeline, captions, args, given)])
        claims = [parse_caption(caption) for caption in captions]
        table[row] = shares([score(judge(p), c) for p, c in zip(pictures, claims, strict=True)])
        if args.out:
            grid = draw_grid(pictures[:64], captions[:64], columns=8)
            save_picture(grid, Path(args.out) / f"captions_{row}.png")
    print_table(table)
    return table


def judge_upsamplers(args):
    """True pictures shrunk to the decoder's size and enlarged again, against bicubic enlargement.

    psnr: against the true picture, dB. The judge's shares: of everything that is in the scene. It
    looks at 64 pixels, so what is left to see there is whether the enlargement spoils anything.
    """
    pipeline = Pipeline(args.weights, args.device, args.size, prior=None)
    data, low, table = Shapes(args.n, "val", args.seed), pipeline.sizes[0], {}
    if len(pipeline.sizes) == 1:
        mend = "train upsampler1" if args.size > low else f"give a --size above {low}"
        raise UserError(f"{pipeline.folder} has no upsampler to {args.size} pixels: {mend}")
    for size in pipeline.sizes[1:]:
        psnrs, scores = {}, {}
        for i in tqdm(range(args.n), f"to {size}", disable=None):
            true, claim = data.image(i, size)[None], scene_claim(data.scene(i))
            small = F.avg_pool2d(true, size // low)
            ways = {
                "upsamplers": pipeline.upsample(small.to(args.device), [args.seed + i], size).cpu(),
                "bicubic": F.interpolate(small, size=size, mode="bicubic").clamp(-1, 1),
                "truth": true,
            }
            for way, picture in ways.items():
                psnrs.setdefault(way, []).append(psnr(picture, true).item())
                if size >= LEAST:
                    scores.setdefault(way, []).append(score(judge(picture[0]), claim))
        for way in psnrs:
            table[f"{way} {size}"] = shares(scores.get(way, [])) | {"n": args.n}
            if way != "truth":
                table[f"{way} {size}"]["psnr"] = sum(psnrs[way]) / args.n
                print(f"{way} to {size}: {table[f'{way} {size}']['psnr']:.2f} dB")
    print_table(table)
    return table


def captioned(args):
    """(pipeline, data, captions, size of the pictures) for --data, a validation caption each."""
    pipeline, size = load_pipeline(args)
    data = load_data(args.data, args.root, "val", args.n, args.seed)
    return pipeline, data, [data.captions(i)[0] for i in range(len(data))], size


def judge_real(args):
    """Any data set, in CLIP's image space: no ground truth is needed, only captioned pictures.

    frechet (times 1000), precision, recall: drawn against true pictures; clip_score: mean cosine of
    picture and caption, with that of the true pictures beside it.
    """
    pipeline, data, captions, size = captioned(args)
    k = 3
    if len(data) <= k:
        raise UserError(f"{len(data)} validation pictures are too few: {k + 1} or more are needed")
    true = look(pipeline.clip, data)
    drawn = torch.cat([pipeline.clip.encode_image(pictures.to(pipeline.device))
                       for _, pictures in draw(pipeline, captions, args, size=size)])
    text_emb = torch.cat([pipeline.text([c])[0] for c in captions])
    precision, recall = precision_recall(drawn, true, k)
    table = {
        "frechet": 1000 * frechet_distance(drawn, true), "precision": precision, "recall": recall,
        "clip_score": (drawn * text_emb).sum(1).mean().item(),
        "clip_score_true": (true * text_emb).sum(1).mean().item(), "n": len(data),
    }
    print("  ".join(f"{k} {v:.4g}" for k, v in table.items()))
    return table


def export_pictures(args):
    """Write OUT/samples and OUT/references, numbered alike, for the standard FID and IS tools."""
    for folder in (Path(args.out) / "samples", Path(args.out) / "references"):
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} has pictures already, of which some would stay among the "
                            "new ones: give another --out, or delete it")
    pipeline, data, captions, size = captioned(args)
    for part, pictures in draw(pipeline, captions, args, size=size):  # 30,000 are too many to keep
        for i, picture in enumerate(pictures, part.start):
            save_picture(to_pil(picture), Path(args.out) / "samples" / f"{i:06d}.png")
            reference = to_pil(data.image(i, size))
            save_picture(reference, Path(args.out) / "references" / f"{i:06d}.png")
    print(f"{args.out}: {len(data)} samples and as many references of {size} x {size} pixels")
    return {"captions": captions}


def judge_priors(args):
    """Both priors, and the diffusion prior's variances at few steps, on validation captions.

    frechet: of the drawn embeddings and the true ones (times 1000); cosine: with the true embedding
    of the same scene; evaluations: of the network for one embedding (guidance makes two of each);
    ms: for one, in batches of 64, without CLIP's share.
    The diffusion rows draw one candidate, so that no choice by CLIP hides what the variance does;
    the last of them draws two and keeps the better, as sample.py does.
    """
    prior = load_stage(args.weights, "prior", args.device)
    clip = clip_of(prior, args.weights, "prior", args.device)
    data, diffusion, table = Shapes(args.n, "val", args.seed), prior.diffusion, {}
    captions, true = mixed_captions(data), look(clip, data).cpu()
    parts = [(part, clip.encode_text(captions[part])) for part in in_batches(args.n, 64)]

    def measure(row, prior, evaluations, **settings):
        drawn, started = [], time.perf_counter()
        for part, text in parts:
            seeds = range(args.seed + part.start, args.seed + part.stop)
            settings["generators"] = generators(seeds, "prior")
            with autocast(args.device):
                drawn.append(prior.sample(*text, scale=args.prior_scale, **settings))
        drawn = torch.cat(drawn).cpu()  # waits for a GPU: before the clock is read
        seconds = time.perf_counter() - started
        table[row] = {
            "frechet": 1000 * frechet_distance(drawn, true),
            "cosine": (drawn * true).sum(1).mean().item(),
            "evaluations": evaluations * (1 if args.prior_scale == 1 else 2),
            "ms": 1000 * seconds / args.n, "n": args.n,
        }

    trained = diffusion.variance
    measured = trained == "analytic" and bool(diffusion.x_0_variance.any())
    measure("warm-up", prior, 2, steps=2)  # the first batch pays for starting
    del table["warm-up"]
    for steps in (8, 16, 64):
        for variance in ("fixed_small", "fixed_large", "analytic"):
            if variance != "analytic" or measured:
                diffusion.variance = variance
                measure(f"{variance}, {steps} steps", prior, steps, steps=steps, candidates=1)
    diffusion.variance = trained
    measure("best of 2, 64 steps", prior, 2 * 64, steps=64)
    if (args.weights / "ar_prior.pt").exists():
        ar = load_stage(args.weights, "ar_prior", args.device)
        check_clip(ar, clip, args.weights / "ar_prior.pt")
        measure("autoregressive", ar, ar.config.components)
    print(f"{'':24}{'frechet':>10}{'cosine':>10}{'evaluations':>13}{'ms':>8}{'n':>7}")
    for row, x in table.items():
        print(f"{row:24}{x['frechet']:10.2f}{x['cosine']:10.3f}{x['evaluations']:13}"
              f"{x['ms']:8.1f}{x['n']:7}")
    return table


THETAS = (0.0, 0.125, 0.25, 0.375, 0.5)


def single_edits(data, n):
    """n scenes of one object with one attribute to change: (i, part, before, after, claim).

    before, after: captions that differ in one word; claim: the scene after the edit. Colour, shape
    and background take turns.
    """
    edits = []
    for i in range(len(data)):
        scene = data.scene(i)
        if len(scene.things) != 1 or scene.word or len(edits) == n:
            continue
        thing, part = scene.things[0], ("colour", "shape", "background")[len(edits) % 3]
        say = lambda t, ground: (with_article(f"{t.colour} {t.shape}")  # noqa: E731
                                 + (f" on {ground}" if part == "background" else ""))
        after, ground = thing, scene.background
        if part == "background":
            ground = next_of(tuple(BACKGROUNDS), ground, i)
        else:
            choices = tuple(COLOURS if part == "colour" else SHAPES)
            after = replace(thing, **{part: next_of(choices, getattr(thing, part), i)})
        claim = Claim((after,), None, ground)
        edits.append((i, part, say(thing, scene.background), say(after, ground), claim))
    return edits


def next_of(choices, now, k):
    """Another of the choices than `now`: the k-th of the rest, counted round and round."""
    others = [choice for choice in choices if choice != now]
    return others[k % len(others)]


def judge_manipulations(args):
    """Reconstruction, variation, blending and text diffs of validation scenes, in numbers."""
    pipeline = Pipeline(args.weights, args.device, S, prior=None)
    data = Shapes(args.n, "val", args.seed)
    pictures = torch.stack([data.image(i, pipeline.sizes[0]) for i in range(args.n)])
    pictures, embs = pictures.to(args.device), look(pipeline.clip, data)
    table, again, varied = {}, [], []
    for part in in_batches(args.n):
        seeds = range(args.seed + part.start, args.seed + part.stop)
        x_T = invert(pipeline, pictures[part], embs[part])
        again.append(redraw(pipeline, embs[part], x_T, seeds))
        varied.append(redraw(pipeline, embs[part], x_T, seeds, eta=1.0))
    again, varied = torch.cat(again), torch.cat(varied)
    table["reconstruction_psnr"] = psnr(again, pictures).mean().item()
    table["variation_psnr"] = psnr(varied, pictures).mean().item()
    claims = [scene_claim(data.scene(i)) for i in range(args.n)]
    for name, drawn in (("reconstruction", again), ("variation", varied)):
        seeds = range(args.seed, args.seed + args.n)
        enlarged = pipeline.upsample(drawn, seeds, S).cpu()
        table[name] = shares([score(judge(p), c) for p, c in zip(enlarged, claims, strict=True)])
    ends = []
    for k in range(0, min(args.n, 20) - 1, 2):
        frames = blend(pipeline, pictures[k:k + 2], embs[k:k + 2], args.seed, 2)
        ends.append(psnr(frames, pictures[k:k + 2]))
    table["blend_ends_psnr"] = torch.cat(ends).mean().item() if ends else None
    print(f"reconstruction (eta 0) {table['reconstruction_psnr']:.1f} dB; variation (eta 1) "
          f"{table['variation_psnr']:.1f} dB from the source; blends' ends "
          f"{table['blend_ends_psnr'] or 0:.1f} dB")
    print_table({name: table[name] for name in ("reconstruction", "variation")})
    table["edits"] = judge_edits(pipeline, args)
    return table


def judge_edits(pipeline, args):
    """Text diffs of one attribute, at every theta: is the new one there, are the others kept?"""
    scenes, low = Shapes(20 * args.edits, "val", args.seed), pipeline.sizes[0]
    edits, results, rows = single_edits(scenes, args.edits), [], []
    for i, part, before, after, claim in tqdm(edits, "edits", disable=None):
        picture = scenes.image(i, low)[None].to(args.device)
        as_clip_wants_it = scenes.image(i, pipeline.clip.image_size)[None].to(args.device)
        emb = pipeline.clip.encode_image(as_clip_wants_it)
        direction = text_diff(pipeline, after, before)
        frames = edit(pipeline, picture, emb, direction, THETAS, args.seed)
        frames = pipeline.upsample(frames, [args.seed] * len(THETAS), S).cpu()
        results.append([changed_and_kept(judge(frame), claim, part) for frame in frames])
    print(f"{len(edits)} text diffs, each of one attribute of a scene with one object:")
    print(f"{'theta':>8}{'new attribute':>16}{'others kept':>14}{'both':>8}")
    for k, theta in enumerate(THETAS):
        new, kept = (sum(r[k][j] for r in results) / max(1, len(results)) for j in (0, 1))
        both = sum(all(r[k]) for r in results) / max(1, len(results))
        rows.append({"theta": theta, "new": new, "kept": kept, "both": both})
        print(f"{theta:8.3f}{new:16.1%}{kept:14.1%}{both:8.1%}")
    return rows


def changed_and_kept(seen, claim, part):
    """Of a scene with one object after an edit: is the new attribute there, are the others?"""
    wanted = claim.things[0]
    thing = seen.things[0] if len(seen.things) == 1 else None
    right = {
        "colour": thing is not None and thing.colour == wanted.colour,
        "shape": thing is not None and thing.shape == wanted.shape,
        "background": seen.background == claim.background,
    }
    return right.pop(part), all(right.values())


def judge_clip(args):
    """Does CLIP itself prefer a scene's true caption to one with a single thing wrong? Chance: 50%.

    What CLIP cannot tell apart, its embedding cannot tell the decoder (paper sec. 7, figs. 14, 15).
    And what it can: does it lie open in the embedding? A linear probe, fitted to 40 n training
    scenes, must name just the pairs of colour and shape that a scene of two objects shows.
    """
    there = [s for s in STAGES if (args.weights / f"{s}.pt").exists()]
    stage = next(filter(needs_clip, there), None)
    if stage and "clip" not in there:  # a pretrained one, whose name the stage says
        clip = clip_of(load_stage(args.weights, stage), args.weights, stage, args.device)
    else:
        clip = load_clip(args.weights, "small", args.device)
    data, right = Shapes(args.n, "val", args.seed), {"binding": [], "shape": [], "relation": []}
    scenes = [i for i in range(args.n) if len(data.scene(i).things) == 2]
    for i in tqdm(scenes, "comparing", disable=None):
        true, wrong = wrong_captions(data.scene(i))
        image_emb = clip.encode_image(data.image(i, clip.image_size)[None].to(clip.mean.device))
        better = prefers(clip, image_emb, [true], list(wrong.values()))
        for name, answer in zip(wrong, better.tolist(), strict=True):
            right[name].append(answer)
    table = {name: {"right": sum(x) / max(1, len(x)), "n": len(x)} for name, x in right.items()}
    for name, row in table.items():
        right_ones = f"{row['right']:8.1%}" if row["n"] else f"{'-':>8}"
        print(f"{name:12}{right_ones} of {row['n']}, chance 50%")
    train = Shapes(40 * args.n, "train", args.seed)
    (emb, labels), (val_emb, val_labels) = ((look(clip, d), pairs_shown(d).to(clip.mean.device))
                                            for d in (train, data))
    named = linear_probe(emb, labels)(val_emb) > 0
    same = (named == (val_labels > 0)).all(1)[scenes].sum().item()
    table["linear probe"] = {"right": same / max(1, len(scenes)), "n": len(scenes)}
    print(f"a linear probe reads both pairs: {same / max(1, len(scenes)):.1%} of {len(scenes)}")
    return table


def measure_losses(args):
    """Validation loss of all trained stages but CLIP, as training logs it at its end: of the same
    pictures with the same noise for the same --data, --seed and -n, so two trainings compare (but
    not two presets, or two that predict different things). Of a diffusion model also by quarter of
    the noise levels, the cleanest first. CLIP's would depend on its training's batch size.
    """
    data = load_data(args.data, args.root, "val", args.n, args.seed)
    settings, embeddings = {"half_size_until": 0.0, "steps": 1}, None  # pictures of the whole size
    stages = [s for s in STAGES if s != "clip" and (args.weights / f"{s}.pt").exists()]
    if not stages:
        raise UserError(f"{args.weights} has no trained stage: give --weights the --out of a "
                        "training")
    table = {}
    with tempfile.TemporaryDirectory() as cache:
        for stage in stages:
            model = load_stage(args.weights, stage, args.device)
            if needs_clip(stage) and embeddings is None:  # once, for all stages
                clip = clip_of(model, args.weights, stage, args.device, args.clip)
                with autocast(args.device):  # as in training
                    embeddings = embed(clip, data, cache)
            elif needs_clip(stage):
                check_clip(model, clip, args.weights / f"{stage}.pt")
            batches = Batches(stage, model.config, data, embeddings, settings)
            table[stage] = validate(stage, model, batches, 1, args.device, args.n)
            row = "".join(f"  {name} {value:.4f}" for name, value in table[stage].items())
            print(f"{stage:16}{row}")
    return table


def add_weights(sub):
    """The options of every command that uses trained weights."""
    sub.add_argument("--weights", help="folder of checkpoints (default: as sample.py)")
    sub.add_argument("--device", type=choose_device, default="auto", help="auto, cpu or cuda")


def add_drawing_options(sub):
    """The options of every command that draws pictures with trained weights."""
    add_weights(sub)
    sub.add_argument("--prior-scale", type=finite, help=PRIOR_SCALE_HELP)
    sub.add_argument("--scale", type=finite, default=2.0, help="guidance of the decoder; off at 1")
    sub.add_argument("--candidates", type=positive, default=2,
                     help="pictures drawn for each, of which CLIP keeps the best")
    sub.add_argument("--prior-steps", type=int, help="sampling steps of the prior (default: 64)")
    sub.add_argument("--steps", type=int, help="sampling steps of the decoder (default: the "
                     "model's)")


def add_data_options(sub):
    """The options of every command that works on any data set."""
    sub.add_argument("--data", default="shapes", help="shapes, cifar10, cifar100, coco or folder")
    sub.add_argument("--root", help="folder of the data (not for shapes)")
    sub.add_argument("--clip", help="MODEL:TAG=FILE, the CLIP that the stages were trained with, "
                     "from a file (default: as in training)")


def build_parser():
    parser = Parser("python -m lab.evaluate", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--seed", type=seed_number, default=0, help="seed of scenes and noise")
        sub.add_argument("--json", metavar="FILE", help="also write the table to this file")
        sub.add_argument("-n", type=positive, default=500, help="number of scenes")
        sub.set_defaults(run=run)
        return sub

    command("judge", judge_judge, "measure the judge on fresh drawings")
    sub = command("clip", judge_clip, "what does CLIP tell apart, what can be read off it?")
    add_weights(sub)
    sub = command("captions", judge_captions, "text to image, judged by its captions")
    add_drawing_options(sub)
    sub.add_argument("--rows", nargs="+", default=["true_embedding", "text", "held_out"],
                     choices=ROWS, help="what to draw from")
    sub.add_argument("--out", help="folder for sheets of the judged pictures")
    for name, run, text in (
        ("real", judge_real, "any data set: distance, precision, recall, score in CLIP's space"),
        ("export", export_pictures, "write samples and references for FID and IS tools"),
    ):
        sub = command(name, run, text)
        add_drawing_options(sub)
        add_data_options(sub)
        sub.add_argument("--size", type=positive, default=64, help="side of the pictures")
    commands.choices["export"].add_argument("--out", required=True, help="folder for the pictures")
    sub = command("upsamplers", judge_upsamplers, "true pictures shrunk and enlarged again")
    add_weights(sub)
    sub.add_argument("--size", type=positive, default=1024, help="how far to enlarge")
    sub = command("priors", judge_priors, "drawn embeddings against true ones")
    add_weights(sub)
    sub.add_argument("--prior-scale", type=finite, default=1.0, help="guidance; off at 1")
    sub = command("losses", measure_losses, "validation loss of each trained stage")
    add_data_options(sub)
    add_weights(sub)
    sub.set_defaults(n=256)
    sub = command("findings", report, "the paper's findings, one by one; writes FINDINGS.md")
    sub.add_argument("names", nargs="*", metavar="F1 ... F10", help="which (default: all)")
    add_weights(sub)
    sub.add_argument("--out", default="samples/findings",
                     help="folder for the report and its pictures")
    sub.set_defaults(n=120)
    sub = command("manipulations", judge_manipulations, "reconstruct, vary, blend and edit scenes")
    add_weights(sub)
    sub.add_argument("--edits", type=positive, default=20, help="number of text diffs")
    return parser


@exit_code
def main(argv=None):
    args = build_parser().parse_args(argv)
    # Now, not after hours of work:
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no such folder")
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json} is a folder: name a file")
    if getattr(args, "out", None):
        check_folder(args.out)
    if "weights" in args:
        args.weights = Path(args.weights or default_weights())
    table = args.run(args)
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(table, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot write ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
