"""Measure trained stages: each command prints a table, and --json keeps it (README.md, here).

    python -m lab.evaluate captions -n 500      # do the pictures show what their captions say?

To find the stage that loses something, replace the stages before it by the truth: the true image
embedding in place of the prior's shows what the decoder loses, true small pictures in place of the
decoder's show what the upsamplers lose.
"""

import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache
from itertools import cycle, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from tqdm import tqdm

from lab.classifier import judge_class_edits, judge_classes
from lab.findings import report
from lab.judge import S, judge, scores, shares, the_thing
from lab.measures import (
    THETAS, draw_batches, frechet, in_batches, judged_pipeline, linear_probe, look, mixed_captions,
    pairs_shown, pictures_of, precision_recall, prefers, redrawn, scenes_of, single_objects,
    wrong_captions,
)
from manipulate import blend, edit, psnr, text_diff
from sample import PRIOR_SCALE_HELP, Pipeline, noise_for
from stages import STAGES, clip_of, load_clip, load_stage, needs_clip
from support.cache import embed
from support.checkpoint import load_checkpoint
from support.drawing import SHIPPED
from support.pictures import DATA, load_data
from support.shapes import BACKGROUNDS, COLOURS, SHAPES, Shapes, render, with_article
from support.sheets import check_folder, draw_grid, file_ending, save_picture, to_pil
from support.tools import (
    Parser, UserError, autocast, choose_device, finite, positive, sampling_steps, seed_number,
    user_errors,
)
from train import Batches, validate

# How columns are printed; all others are shares, in percent.
FORMATS = {"n": "d", "evaluations": "d", "frechet": ".2f", "ms": ".1f", "psnr": ".2f",
           **dict.fromkeys(("cosine", "clip_score", "clip_score_true"), ".3f"),
           **dict.fromkeys(("val_q1", "val_q2", "val_q3", "val_q4", "val_loss"), ".4f")}


def print_table(table):
    """{row: {column: value}} as text: a dash for None, a new header wherever the columns change."""
    wide, columns = max(map(len, table)), None
    for name, row in table.items():
        if columns != list(row):
            columns = list(row)
            print(" " * wide, *(f"{c:>8}" for c in columns), sep="  ")
        cells = ("-" if x is None else format(x, FORMATS.get(c, ".1%")) for c, x in row.items())
        cells = (f"{x:>{max(8, len(c))}}" for c, x in zip(columns, cells))
        print(f"{name:{wide}}", *cells, sep="  ")


def judge_judge(args):
    """Is the judge right about fresh drawings, clean, noisy and blurred?"""
    scenes, rng = scenes_of(Shapes(args.n, "val", args.seed)), np.random.default_rng(args.seed)
    clean = [render(scene, S) for scene in scenes]
    noisy = [np.asarray(picture) + 255 * 0.05 * rng.standard_normal((S, S, 3)) for picture in clean]
    ways = {"clean": clean,
            "noise": [Image.fromarray(x.clip(0, 255).astype(np.uint8)) for x in noisy],
            "blur": [x.filter(ImageFilter.GaussianBlur(0.7)) for x in clean]}  # pixels
    return {name: shares(scores(pictures, scenes)) for name, pictures in ways.items()}


def trained(folder):
    """The stages whose weights are in a folder."""
    found = [stage for stage in STAGES if (folder / f"{stage}.pt").exists()]
    if not found:
        raise UserError(f"{folder} has no trained stage: give --weights the --out of a training")
    return found


def judge_clip(args):
    """Does CLIP prefer a scene's true caption to one with a single thing wrong?

    And does what it knows lie open in the embedding? A linear probe, fitted to 40 n training
    scenes, must name exactly the colour-shape pairs that a scene of two objects shows."""
    clip, right = a_clip(args), {"binding": [], "shape": [], "relation": []}
    data, train = Shapes(args.n, "val", args.seed), Shapes(40 * args.n, "train", args.seed)
    emb, pairs = look(clip, data), [i for i in range(args.n) if len(data.scene(i).things) == 2]
    for i in tqdm(pairs, disable=None):
        true, wrong = wrong_captions(data.scene(i))
        answers = prefers(clip, emb[i:i + 1], [true], list(wrong.values())).tolist()
        for name, answer in zip(wrong, answers, strict=True):
            right[name].append(answer)
    log_odds = linear_probe(look(clip, train), pairs_shown(train).to(args.device))
    named = (log_odds(emb) > 0).cpu() == (pairs_shown(data) > 0)
    right["linear probe"] = named.all(1)[pairs].tolist()
    return {name: {"right": sum(x) / len(x) if x else None, "n": len(x)}
            for name, x in right.items()}


def a_clip(args):
    """The CLIP in --weights, or the pretrained one that a stage there was trained with."""
    stage = next(filter(needs_clip, trained(args.weights)), None)
    if stage is None or (args.weights / "clip.pt").exists():
        return load_clip(args.weights, "small", args.device)
    return clip_of(load_stage(args.weights, stage), args.weights, stage, args.device)


ROWS = {  # of `captions`: (which scenes, what the decoder is given, which decoder)
    "true_embedding": ("val", "truth", "decoder"),
    "text": ("val", "prior", "decoder"),
    "held_out": ("held_out", "prior", "decoder"),
    "ar_prior": ("val", "ar_prior", "decoder"),
    "text_emb": ("val", "text_emb", "decoder"),
    "caption": ("val", "caption", "decoder"),
    "trained_text": ("val", "text_emb", "decoder_text_emb"),
    "glide": ("val", "caption", "decoder_caption"),
}


def judge_captions(args):
    """Do pictures drawn from captions show what the captions say?"""
    table = {}
    for row in args.rows:
        split, given, decoder = ROWS[row]
        pipeline = judged_pipeline(args.weights, args.device, decoder=decoder,
                                   prior=given if given in ("prior", "ar_prior") else None)
        data = Shapes(args.n, split, args.seed)
        captions = mixed_captions(data)
        given = look(pipeline.clip, data) if given == "truth" else given
        pictures = torch.cat([p for _, p in draw_batches(pipeline, captions, args, given)])
        table[row] = shares(scores(pictures, captions))
        if args.out:
            grid = draw_grid(pictures[:64], captions[:64], columns=8)
            save_picture(grid, args.out / f"captions_{row}.png")
    return table


def judge_priors(args):
    """Both priors, and the diffusion prior's variances at few steps, against true embeddings.

    The prior is not guided. All rows but "best of 2" draw one candidate, so that CLIP's choice does
    not hide what the variance does."""
    prior = load_stage(args.weights, "prior", args.device)
    clip = clip_of(prior, args.weights, "prior", args.device)
    data, diffusion, table = Shapes(args.n, "val", args.seed), prior.diffusion, {}
    captions, true = mixed_captions(data), look(clip, data).cpu()
    seeds = range(args.seed, args.seed + args.n)
    parts = [(part, clip.encode_text(captions[part])) for part in in_batches(args.n, 64)]

    def measure(row, prior, evaluations, **settings):
        started = time.perf_counter()
        with autocast(args.device):
            drawn = torch.cat([
                prior.sample(*text, **settings, noise=noise_for(seeds[part], "prior"))
                for part, text in parts])
        drawn = drawn.cpu()  # waits for a GPU before the clock is read
        table[row] = {
            "frechet": frechet(drawn, true), "cosine": (drawn * true).sum(1).mean().item(),
            "evaluations": evaluations, "ms": 1000 * (time.perf_counter() - started) / args.n,
            "n": args.n,
        }

    variance, variances = diffusion.variance, ["fixed_small", "fixed_large"]
    if variance == "analytic" and diffusion.x_0_variance.any():  # it was measured in training
        variances.append("analytic")
    measure("warm-up", prior, 2, steps=2)  # the first batch pays for starting up
    del table["warm-up"]
    for steps, diffusion.variance in product((8, 16, 64), variances):
        measure(f"{diffusion.variance}, {steps} steps", prior, steps, steps=steps, candidates=1)
    diffusion.variance = variance
    measure("best of 2, 64 steps", prior, 2 * 64, steps=64)
    if "ar_prior" in trained(args.weights):
        ar_prior = load_stage(args.weights, "ar_prior", args.device)
        clip_of(ar_prior, args.weights, "ar_prior", args.device)  # raises if its CLIP is another
        measure("autoregressive", ar_prior, ar_prior.config.components)
    return table


def judge_upsamplers(args):
    """True pictures shrunk to the decoder's size and enlarged again, or bicubically."""
    pipeline = Pipeline(args.weights, args.device, args.size, prior=None)
    data, low, table = Shapes(args.n, "val", args.seed), pipeline.sizes[0], {}
    if len(pipeline.sizes) == 1:
        raise UserError(f"{args.weights} has no upsampler from {low} to {args.size} pixels: train "
                        f"upsampler1, or give a --size above {low}")
    for size in pipeline.sizes[1:]:
        errors = []
        for i in tqdm(range(args.n), f"to {size}", disable=None):
            true = data.image(i, size)[None]
            small = F.avg_pool2d(true, size // low)
            drawn = pipeline.upsample(small.to(args.device), [args.seed + i], size).cpu()
            bicubic = F.interpolate(small, size=size, mode="bicubic").clamp(-1, 1)
            errors.append(psnr(torch.cat([drawn, bicubic]), true).tolist())
        for way, error in zip(("upsamplers", "bicubic"), np.mean(errors, axis=0)):
            table[f"{way} {size}"] = {"psnr": error, "n": args.n}
    return table


def data_of(args, *stages):
    """Where validation pictures are, {stage: (data, root, limit)}: as in the stage's training, of
    shapes if its checkpoint doesn't say, unless --data or --root differs."""
    found, notes = {}, set()
    for stage in stages:
        run = {"data": "shapes"} | load_checkpoint(args.weights / f"{stage}.pt", stage)["run"]
        trained_on = run["data"], run.get("root")
        if args.data not in (None, run["data"]):
            run = {"data": args.data}  # the other data's folder and limit mean nothing here
        here = run["data"], args.root or run.get("root")
        found[stage] = *here, run.get("limit")
        if here != trained_on:
            was, now = (" ".join(filter(None, place)) for place in (trained_on, here))
            notes.add(f"note: {args.weights} was trained on {was}, these figures are for {now}")
    print(*notes, sep="\n", end="\n" * bool(notes))
    return found


def measure_losses(args):
    """The validation loss of every trained stage, on the pictures that training looked at."""
    table, load = {}, cache(load_data)  # most stages share their data
    with tempfile.TemporaryDirectory() as folder:
        for stage, (name, root, limit) in data_of(args, *trained(args.weights)).items():
            limit = max(512, args.n) if name == "shapes" else limit
            data = load(name, root, "val", limit, args.seed)
            model, embeddings = load_stage(args.weights, stage, args.device), None
            if needs_clip(stage):
                clip = clip_of(model, args.weights, stage, args.device, args.clip)
                with autocast(args.device):  # as in training
                    embeddings = embed(clip, data, folder)  # computed once for the same data
            batches = Batches(model, data, embeddings, size=1, seed=0)
            table[stage] = validate(model, batches, args.device, args.n)
    return table


def single_edits(data, n):
    """n scenes of one object, colour, shape and background changed in turn: (i, part, captions
    before and after, the changed scene)."""
    edits, values = [], {"colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS}
    for (i, scene), part in zip(single_objects(data)[:n], cycle(values)):
        whole = part == "background"
        old = scene if whole else scene.things[0]
        others = [value for value in values[part] if value != getattr(old, part)]
        new = replace(old, **{part: others[i % len(others)]})
        claim = new if whole else replace(scene, things=(new,))
        captions = [with_article(f"{s.things[0].colour} {s.things[0].shape}")
                    + f" on {s.background}" * whole for s in (scene, claim)]
        edits.append((i, part, *captions, claim))
    return edits


def judge_manipulations(args):
    """Pictures inverted and redrawn, varied, blended, and edited by text."""
    pipeline = Pipeline(args.weights, args.device, S, prior=None)
    data, seeds = Shapes(args.n, "val", args.seed), range(args.seed, args.seed + args.n)
    scenes, embs, ends, table = scenes_of(data), look(pipeline.clip, data), [], {}
    pictures = pictures_of(scenes, pipeline.sizes[0]).to(args.device)
    for name, again in zip(("reconstruction", "variation"),
                           redrawn(pipeline, pictures, embs, seeds), strict=True):
        found = scores(pipeline.upsample(again, seeds, S).cpu(), scenes)
        table[name] = {"psnr": psnr(again, pictures).mean().item(), **shares(found)}
    for k in range(0, min(args.n, 20) - 1, 2):
        frames = blend(pipeline, pictures[k:k + 2], embs[k:k + 2], args.seed, 2)
        ends += psnr(frames, pictures[k:k + 2]).tolist()
    table["blends' ends"] = {"psnr": sum(ends) / len(ends) if ends else None, "n": len(ends)}

    # Text diffs of one attribute, at every theta: is the new one there, are the others kept?
    data, results = Shapes(20 * args.edits, "val", args.seed), []
    for i, part, before, after, claim in tqdm(single_edits(data, args.edits), disable=None):
        picture, for_clip = (data.image(i, size)[None].to(args.device)
                             for size in (pipeline.sizes[0], pipeline.clip.image_size))
        frames = edit(pipeline, picture, pipeline.clip.encode_image(for_clip),
                      text_diff(pipeline, after, before), THETAS, args.seed)
        frames = pipeline.upsample(frames, [args.seed] * len(THETAS), S).cpu()
        results.append([changed_and_kept(judge(frame), claim, part) for frame in frames])
    for theta, (new, kept) in zip(THETAS, np.transpose(results, (1, 2, 0)), strict=True):
        table[f"theta {theta:.3f}"] = {"new": new.mean(), "kept": kept.mean(),
                                       "both": (new & kept).mean(), "n": len(new)}
    return table


def changed_and_kept(seen, claim, part):
    """After an edit of a one-object scene: is the new attribute there, are the others?"""
    there, wanted = the_thing(seen), claim.things[0]
    right = {"colour": there.colour == wanted.colour, "shape": there.shape == wanted.shape,
             "background": seen.background == claim.background}
    return right.pop(part), all(right.values())


def drawn_from(args):
    """Draw a picture for each of n validation captions: (pipeline, data, captions, size, batches).
    The size is --size, or the largest below it that these stages draw."""
    pipeline = Pipeline(args.weights, args.device, args.size, clip=args.clip)
    size = max([pipeline.sizes[0], *(size for size in pipeline.sizes if size <= args.size)])
    args.data, args.root, _ = data_of(args, "decoder")["decoder"]
    data = load_data(args.data, args.root, "val", args.n, args.seed)
    rng = np.random.default_rng(args.seed)
    if len(data) < args.n:
        print(f"note: there are only {len(data)} validation pictures, not {args.n}")
    captions = [str(rng.choice(data.captions(i))) for i in range(len(data))]
    return pipeline, data, captions, size, draw_batches(pipeline, captions, args, size=size)


def judge_real(args):
    """Any data set measured in CLIP's space, without ground truth.

    match: how often a drawn picture is closest to its caption's own true one (chance: 1 / n)."""
    pipeline, data, captions, size, batches = drawn_from(args)
    if len(data) < 4:  # precision and recall look at the third neighbour
        raise UserError(f"{len(data)} validation pictures are too few: at least 4 are needed")
    true = look(pipeline.clip, data)
    drawn = torch.cat([pipeline.clip.encode_image(p.to(args.device)) for _, p in batches])
    text_emb = torch.cat([pipeline.text([caption])[0] for caption in captions])
    precision, recall = precision_recall(drawn, true)
    own = (drawn @ true.T).argmax(1).cpu() == torch.arange(len(data))
    return {f"{args.data}, {size} px": {
        "frechet": frechet(drawn, true), "precision": precision, "recall": recall,
        "clip_score": (drawn * text_emb).sum(1).mean().item(),
        "clip_score_true": (true * text_emb).sum(1).mean().item(),
        "match": own.float().mean().item(), "n": len(data),
    }}


def export_pictures(args):
    """Write samples and references, numbered alike, for the standard FID and IS tools."""
    if any(args.out.glob("*/*.png")):
        raise UserError(f"{args.out} already has pictures, which would mix with the new ones: give "
                        "another --out, or delete it")
    _, data, captions, size, batches = drawn_from(args)
    for part, pictures in batches:  # written at once: 30,000 are too many to keep in memory
        for i, picture in enumerate(pictures, part.start):
            save_picture(to_pil(picture), args.out / "samples" / f"{i:06d}.png")
            save_picture(to_pil(data.image(i, size)), args.out / "references" / f"{i:06d}.png")
    print(f"{args.out}: {len(data)} samples and as many references of {size} x {size} pixels")
    return {"captions": captions}


OPTIONS = {
    "--others": dict(nargs="+", type=Path, default=[], metavar="RUN", help="the same stages from "
                     "other seeds, for findings that compare trainings; their CLIPs measure"),
    "names": dict(nargs="*", metavar="F1 ... F12", help="which findings (default: all)"),
    "-n": dict(type=positive, default=500, help="number of scenes or pictures"),
    "--seed": dict(type=seed_number, default=0, help="seed of scenes and noise"),
    "--json": dict(metavar="FILE", type=file_ending(".json"), help="also write the table to it"),
    "--weights": dict(type=Path, help="folder of checkpoints (default: weights/shapes)"),
    "--device": dict(type=choose_device, default="auto", help="auto, cpu or cuda"),
    "--prior-scale": dict(type=finite, help=PRIOR_SCALE_HELP),
    "--scale": dict(type=finite, default=2.0, help="guidance of the decoder; off at 1"),
    "--candidates": dict(type=positive, default=2, help="pictures drawn, CLIP keeps the best"),
    "--prior-steps": dict(type=sampling_steps, help="steps of the prior (default: the model's)"),
    "--steps": dict(type=sampling_steps, help="steps of the decoder (default: the model's)"),
    "--rows": dict(nargs="+", choices=ROWS, default=list(ROWS)[:3], help="what to draw from"),
    "--out": dict(type=check_folder, help="folder for pictures"),
    "--edits": dict(type=positive, default=20, help="number of text diffs"),
    "--size": dict(type=positive, default=64, help="side of the pictures, pixels"),
    "--data": dict(choices=DATA, help="captioned pictures, if not those of the training"),
    "--root": dict(help="folder of the data"),
    "--clip": dict(help="MODEL:TAG=FILE: read the CLIP of the training from a file"),
    "--train": dict(required=True, help="folder of pictures that were trained on"),
    "--classifier": dict(default="weights/cifar10/classifier.pt", help="what lab.classifier wrote"),
}
WEIGHTS, DATA = ["--weights", "--device"], ["--data", "--root", "--clip"]
DRAWING = [*WEIGHTS, "--prior-scale", "--scale", "--candidates", "--prior-steps", "--steps"]
COMMANDS = {  # name: (function, its options, its own defaults)
    "judge": (judge_judge, [], {}),
    "clip": (judge_clip, WEIGHTS, {}),
    "captions": (judge_captions, [*DRAWING, "--rows", "--out"], {}),
    "priors": (judge_priors, WEIGHTS, {}),
    "upsamplers": (judge_upsamplers, [*WEIGHTS, "--size"], {"size": 1024}),
    "manipulations": (judge_manipulations, [*WEIGHTS, "--edits"], {}),
    "losses": (measure_losses, [*WEIGHTS, *DATA], {"n": 256}),
    "real": (judge_real, [*DRAWING, *DATA, "--size"], {}),
    "classes": (judge_classes, [*WEIGHTS, "--prior-scale", "--candidates", "--prior-steps",
                                "--steps", "--data", "--root", "--train", "--classifier", "--out"],
                {"data": "folder", "n": 1000}),
    "class_edits": (judge_class_edits, [*WEIGHTS, "--edits", "--data", "--root", "--classifier",
                                        "--out"], {"data": "folder", "n": 100}),
    "export": (export_pictures, [*DRAWING, *DATA, "--size", "--out"], {"out": "samples/export"}),
    "findings": (report, [*WEIGHTS, "--others", "names", "--out"],
                 {"n": 200, "out": "samples/findings"}),
}


@user_errors
def main(argv=None):
    parser = Parser("python -m lab.evaluate", description="Measure trained stages.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, options, defaults) in COMMANDS.items():
        text = (run.__doc__ or "").split("\n")[0]  # python -OO drops docstrings
        sub = commands.add_parser(name, help=text, description=text)
        for option in ["-n", "--seed", "--json", *options]:
            sub.add_argument(option, **OPTIONS[option])
        sub.set_defaults(run=run, **defaults)
    args = parser.parse_args(argv)
    if "weights" in args:
        args.weights = args.weights or SHIPPED
    if args.run in (judge_captions, judge_priors, judge_manipulations, report):
        run = load_checkpoint(args.weights / f"{trained(args.weights)[0]}.pt")["run"]
        if run.get("data", "shapes") != "shapes":
            raise UserError(f"{args.weights} was trained on {run['data']}, and {args.command} asks "
                            "about shapes: use real, classes or class_edits")
    table = args.run(args)
    if args.run not in (export_pictures, report):  # these print as they go
        print_table(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
