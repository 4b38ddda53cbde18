"""The pipeline put together: a caption goes in, pictures come out (paper fig. 2, bottom).

    python sample.py text "a large red circle above a small blue square" -n 4 --size 256

    python sample.py vary picture.png          # and blend, edit, probe, inpaint: manipulate.py

    caption -> CLIP -> prior -> image_emb -> decoder: 64 px -> upsampler1: 256 -> upsampler2: 1024

The one idea of this file: a picture is a function of the weights, the caption and its own seed.
Each stage draws its noise from a generator made from (seed, stage), one a picture, and pictures
are drawn one at a time; so picture k of four is the picture that its seed gives alone, and the
small one is the start of the large one.

Letters: B pictures, D CLIP embedding, H, W picture sides.
Read next: evaluate.py, which measures what comes out.
"""

import itertools
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import manipulate
from ar_prior import AutoregressivePrior
from prior import DiffusionPrior
from stages import check_clip, clip_of, load_stage
from support.pictures import fit, open_picture
from support.sheets import Film, check_folder, draw_grid, save_picture, to_pil, to_tensor
from support.tools import (
    Parser, UserError, autocast, choose_device, exit_code,
    finite, fraction, positive, seed_number, two_or_more,
)

STAGE_SEEDS = {"prior": 1, "decoder": 2, "upsampler1": 3, "upsampler2": 4}
SIZES = (64, 256, 1024)  # of the paper's three stages
CONDITIONS = ("prior", "text_emb", "caption")  # what a decoder may be given: Pipeline.condition
PRIOR_SCALE_HELP = (f"guidance of the prior, off at 1 (default: {DiffusionPrior.usual_scale:g}, "
                    f"of the autoregressive prior {AutoregressivePrior.usual_scale:g})")

# --- the pipeline ----------------------------------------------------------------------------


def default_weights():
    """weights/shapes if it is there, else the newest folder under runs/ with a decoder in it."""
    here = Path(__file__).parent
    if (here / "weights/shapes/decoder.pt").exists():
        return here / "weights/shapes"
    runs = sorted(Path("runs").glob("*/decoder.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(
            "no weights found: train with 'python train.py all --preset tiny', or give --weights"
        )
    return runs[-1].parent


def generators(seeds, stage, attempt=0):
    """One generator a picture, from its seed, the stage and the attempt: more steps here move no
    noise there, and the first attempt is the same however many follow. (An attempt is added far
    from the seeds that people type, but not too far: PyTorch uses 32 bits of a seed.)"""
    first = STAGE_SEEDS[stage] + attempt * 10**9
    return [torch.Generator().manual_seed(first + seed * 8) for seed in seeds]


class Pipeline:
    """Every trained stage of a folder, and the path from a caption to pictures.

    prior: "prior", "ar_prior" or None. decoder: "decoder", or one of its baselines,
    "decoder_text_emb" (trained on text embeddings) and "decoder_caption" (GLIDE). An upsampler
    that is missing is left out; the others raise UserError. size: how far to enlarge.
    clip: where to load the CLIP from, if not from where the training did (load_open_clip).
    sizes: the sides it can draw, ascending.
    """

    def __init__(self, folder, device="cpu", size=64, prior="prior", decoder="decoder", clip=None):
        self.folder, self.device = Path(folder), torch.device(device)
        if not self.folder.is_dir():
            raise UserError(f"no folder {folder}: give --weights the --out folder of a training")
        self.prior = prior and self.load(prior)
        self.decoder = self.load(decoder)
        # Embeddings of another CLIP would be numbers without meaning to these stages.
        self.clip = clip_of(self.decoder, self.folder, decoder, device, clip)
        if prior:
            check_clip(self.prior, self.clip, self.folder / f"{prior}.pt")
        # The chain of sizes, as far as it is wanted and unbroken; 64, 256, 1024 for base.
        self.sizes, self.upsamplers = [self.decoder.config.size], {}
        for stage in ("upsampler1", "upsampler2"):
            if self.sizes[-1] >= size or not (self.folder / f"{stage}.pt").exists():
                break
            model = self.load(stage)
            if model.config.low_size != self.sizes[-1]:
                raise UserError(f"{self.folder}/{stage}.pt enlarges {model.config.low_size} px, "
                                f"not {self.sizes[-1]}: train it with the decoder's preset")
            self.upsamplers[stage] = model
            self.sizes.append(model.config.size)

    def load(self, stage):
        return load_stage(self.folder, stage, self.device)

    def text(self, captions):
        """Captions -> text_emb (B, D), text_enc (B, L, W), text_mask (B, L)."""
        return self.clip.encode_text(captions)

    def look(self, picture):
        """CLIP's embedding of one PIL picture, its middle square: (1, D), unit norm."""
        square = fit(picture, self.clip.image_size, interpolation=self.clip.interpolation)
        return self.clip.encode_image(to_tensor(square)[None].to(self.device))

    def embed(self, text, seeds, scale=1.0, steps=None, on_step=None):
        """The prior: text() of B captions and B seeds -> image_emb (B, D), unit norm.

        scale: guidance, off at 1 (None: as much as suits this prior, as the commands have it).
        steps: of the T diffusion steps (None: the config's); the autoregressive prior has none.
        """
        scale = self.prior.usual_scale if scale is None else scale
        settings = {"scale": scale, "generators": generators(seeds, "prior")}
        if isinstance(self.prior, DiffusionPrior):
            settings |= {"steps": steps, "on_step": on_step}
        with autocast(self.device):
            return self.prior.sample(*text, **settings)

    def condition(self, name, text, seeds, scale=1.0, steps=None):
        """What the decoder gets as image_emb (paper fig. 8): the prior's embedding, CLIP's text
        embedding as if it were an image's, or None, the caption alone. name: see CONDITIONS."""
        if name == "prior":
            return self.embed(text, seeds, scale, steps)
        return text[0] if name == "text_emb" else None

    def decode(self, image_emb, text, seeds, scale=2.0, steps=None, eta=None, x_T=None,
               on_step=None, attempt=0):
        """The decoder: image_emb (B, D) or None, text() or None -> (B, 3, H, W) in [-1, 1].

        Without an embedding it draws from the caption alone, without text from the embedding
        alone (paper fig. 8). scale: guidance, off at 1. eta: None for ancestral sampling, a
        number for DDIM. x_T: (B, 3, H, W), the noise to start from, else drawn by the seeds.
        attempt: 0, 1, ... draw different pictures of the same seeds.
        """
        _, text_enc, text_mask = text or (None, None, None)
        with autocast(self.device):
            return self.decoder.sample(
                image_emb, text_enc, text_mask, scale=scale, steps=steps, eta=eta, x_T=x_T,
                generators=generators(seeds, "decoder", attempt), on_step=on_step,
            )

    def decode_best(self, candidates, image_emb, text, seeds, films=None, **settings):
        """decode() so many attempts at each picture and keep, of each, the one in which CLIP sees
        most of what was asked for: (B, 3, H, W), and which attempt it was, (B,).

        Asked for is image_emb, or without it the caption's embedding. films: an on_step for each
        attempt. settings: decode()'s scale and steps.

        Paper: keeps the better of two embeddings of the prior (sec. 2.2), and draws each once. We:
        choose among pictures in the same way. Because: a small decoder now and then gives one
        object the other's shape; then its picture is not where its embedding is, and CLIP sees it.
        """
        films = films or [None] * candidates
        drawn = torch.stack([
            self.decode(image_emb, text, seeds, on_step=film, attempt=attempt, **settings)
            for attempt, film in enumerate(films)
        ])  # (candidates, B, 3, H, W)
        best = torch.zeros(len(seeds), dtype=torch.long, device=drawn.device)
        if candidates > 1:  # of one, CLIP need not be asked
            wanted = text[0] if image_emb is None else image_emb
            seen = torch.stack([self.clip.encode_image(pictures) for pictures in drawn])
            best = (seen * wanted).sum(dim=-1).argmax(dim=0)
        return drawn[best, torch.arange(len(best), device=best.device)], best

    def upsample(self, pictures, seeds, size, on_step=None):
        """Pictures -> the same at `size`, through as many upsamplers as that takes."""
        for stage, model in self.upsamplers.items():
            if model.config.low_size == pictures.shape[-1] < size:  # the next link
                with autocast(self.device):
                    pictures = model.sample(
                        pictures, generators=generators(seeds, stage), on_step=on_step
                    )
        return pictures


def reachable_size(pipeline, size):
    """The largest side up to `size` that the trained stages can draw; says so if it is smaller."""
    if size in pipeline.sizes:
        return size
    if size < pipeline.sizes[0] or size not in SIZES:
        choices = sorted({*pipeline.sizes, *SIZES})
        raise UserError(f"--size {size}: choose one of {', '.join(map(str, choices))}")
    largest = max(s for s in pipeline.sizes if s <= size)
    print(f"{pipeline.folder} has no upsampler to {size} pixels: stopping at {largest}")
    return largest


# --- text to image ---------------------------------------------------------------------------


def slugs(captions):
    """Captions as file names: their words, cut at 60 letters, numbered where two are the same."""
    names = []
    for caption in captions:
        words = "".join(c if c.isalnum() else " " for c in caption.lower()).split()
        # Not above 180 bytes either: a file's name may have 255, with what is put around it.
        name = "-".join(words)[:60].encode()[:180].decode(errors="ignore") or "caption"
        number = itertools.count(2)
        unused = name
        while unused in names:
            unused = f"{name}-{next(number)}"
        names.append(unused)
    return names


def load_pipeline(args, **stages):
    """The pipeline of --weights on --device, and the size that --size comes to with it."""
    folder = args.weights or default_weights()
    pipeline = Pipeline(folder, args.device, args.size, clip=args.clip, **stages)
    size = reachable_size(pipeline, args.size)
    if getattr(args, "out", None):  # before the work, so that a mistake is found now
        check_folder(Path(args.out).parent if args.out.endswith(".png") else args.out)
    return pipeline, size


def text_command(args):
    """Captions -> a PNG a picture, a grid of all, and with --film the denoising of each."""
    for caption in args.caption:
        if not caption.strip():
            raise UserError("the caption is empty: write what the picture should show")
    if args.decoder != "image_emb":  # a baseline was trained on just one condition
        if args.condition not in (None, args.decoder):
            raise UserError(f"--decoder {args.decoder} cannot draw from {args.condition}: it was "
                            "trained on another condition; leave --condition out")
        args.condition = args.decoder
    condition = args.condition or "prior"
    stage = "decoder" if args.decoder == "image_emb" else f"decoder_{args.decoder}"
    prior = {"diffusion": "prior", "ar": "ar_prior"}[args.prior] if condition == "prior" else None
    pipeline, size = load_pipeline(args, prior=prior, decoder=stage)
    out = Path(args.out)
    folder, grid_path = (out.parent, out) if out.suffix == ".png" else (out, None)
    texts = [pipeline.text([caption]) for caption in args.caption]  # all mistakes before any work
    names = slugs(args.caption)
    jobs = [(c, args.seed + k) for c in range(len(names)) for k in range(args.n)]
    if out.name in {f"{names[c]}_{seed}.png" for c, seed in jobs}:
        raise UserError(f"--out {out}: one of the pictures has this name; choose another")
    pictures = []
    for c, seed in tqdm(jobs, "pictures", disable=None):
        films = [Film() for _ in range(args.candidates)] if args.film else None
        text, name = texts[c], f"{names[c]}_{seed}"
        # The whole of unCLIP (paper fig. 2): the prior, the decoder, the upsamplers.
        emb = pipeline.condition(condition, text, [seed], args.prior_scale, args.prior_steps)
        picture, best = pipeline.decode_best(
            args.candidates, emb, text, [seed], films, scale=args.scale, steps=args.steps
        )
        stages = [picture.cpu()]
        for side in pipeline.sizes[1:]:
            picture = pipeline.upsample(picture, [seed], side)
            stages.append(picture.cpu())
        pictures += stages if args.stages else stages[-1:]
        save_picture(to_pil(picture[0]), folder / f"{name}.png")
        print(folder / f"{name}.png")
        if films:
            films[best.item()].save(folder / f"{name}.gif")
            print(folder / f"{name}.gif")
    grid_path = grid_path or folder / f"grid_{names[0]}_{args.seed}.png"
    columns = args.n if args.n > 1 else 4
    labels, cell = [args.caption[c] for c, _ in jobs], None
    if args.stages:  # a row is one picture, shown equally large at each of its sizes
        columns, cell = len(pipeline.sizes), min(512, max(128, size))
        labels = [f"{label}, {side} px" for label in labels for side in pipeline.sizes]
    grid = draw_grid([p[0] for p in pictures], labels, columns, cell)
    save_picture(grid, grid_path)
    print(grid_path)


# --- manipulations: one picture or two in, a labelled strip out (manipulate.py) ---------------


def read(pipeline, path):
    """A file -> its middle square at the decoder's size (1, 3, H, W), and its image_emb (1, D)."""
    picture = open_picture(path)
    pixels = to_tensor(fit(picture, pipeline.sizes[0]))[None].to(pipeline.device)
    return pixels, pipeline.look(picture)


def save_strip(pipeline, size, pictures, labels, args, name, animated=None):
    """Enlarge pictures (n, 3, H, W) to `size`, write them side by side as OUT/NAME.png, and those
    in the slice `animated` as a GIF too."""
    enlarged = torch.cat([pipeline.upsample(p[None], [args.seed], size).cpu() for p in pictures])
    path = Path(args.out) / f"{name}.png"
    save_picture(draw_grid(enlarged, labels, columns=len(enlarged)), path)
    print(path)
    if animated:
        frames = [to_pil(p).resize((max(size, 256),) * 2, Image.Resampling.BICUBIC)
                  for p in enlarged[animated]]
        frames += frames[-2:0:-1]  # and back again
        save_picture(frames[0], path.with_suffix(".gif"), save_all=True, append_images=frames[1:],
                     duration=120, loop=0)
        print(path.with_suffix(".gif"))


def vary_command(args):
    """Variations: the same embedding, other noise on the way (paper sec. 3.1, fig. 3)."""
    pipeline, size = load_pipeline(args, prior=None)
    picture, image_emb = read(pipeline, args.image)
    x_T = manipulate.invert(pipeline, picture, image_emb, args.steps)
    again = manipulate.redraw(pipeline, image_emb, x_T, [args.seed], args.steps)
    error = manipulate.psnr(picture, again)[0]
    print(f"reconstruction from image_emb and x_T alone: {error:.1f} dB")
    pictures, labels = [picture, again], ["source", "eta 0"]
    for k in range(args.n if args.eta > 0 else 0):
        seed = [args.seed + k]
        pictures.append(manipulate.redraw(pipeline, image_emb, x_T, seed, args.steps, args.eta))
        labels.append(f"eta {args.eta:g}, seed {seed[0]}")
    save_strip(pipeline, size, torch.cat(pictures), labels, args, f"vary_{Path(args.image).stem}")


def blend_command(args):
    """Interpolation between two pictures (paper sec. 3.2, fig. 4)."""
    pipeline, size = load_pipeline(args, prior=None)
    (a, emb_a), (b, emb_b) = read(pipeline, args.a), read(pipeline, args.b)
    ends, embs = torch.cat([a, b]), torch.cat([emb_a, emb_b])
    settings = {"noise": args.noise, "steps": args.steps}
    frames = manipulate.blend(pipeline, ends, embs, args.seed, args.frames, **settings)
    errors = manipulate.psnr(ends, frames[[0, -1]])
    print(f"the ends against their sources: {errors[0]:.1f} and {errors[1]:.1f} dB")
    labels = ["source"] + [f"{k / max(1, args.frames - 1):.2f}" for k in range(args.frames)]
    name = f"blend_{Path(args.a).stem}_{Path(args.b).stem}"
    strip, between = torch.cat([a, frames, b]), slice(1, -1)  # the GIF is without the sources
    save_strip(pipeline, size, strip, [*labels, "source"], args, name, animated=between)


def edit_command(args):
    """Text diff: turn the embedding from one caption towards another (paper sec. 3.3, fig. 5)."""
    pipeline, size = load_pipeline(args, prior=None)
    picture, image_emb = read(pipeline, args.image)
    direction = manipulate.text_diff(pipeline, args.to, getattr(args, "from"))
    thetas = [args.theta * k / (args.frames - 1) for k in range(args.frames)]
    frames = manipulate.edit(
        pipeline, picture, image_emb, direction, thetas, args.seed, args.steps
    )
    print(f"reconstruction at theta 0: {manipulate.psnr(picture, frames[:1])[0]:.1f} dB")
    labels = ["source"] + [f"theta {theta:.2f}" for theta in thetas]
    name = f"edit_{Path(args.image).stem}_{slugs([args.to])[0]}"
    save_strip(pipeline, size, torch.cat([picture, frames]), labels, args, name)


def probe_command(args):
    """What CLIP knows of a picture, a few principal components at a time (paper sec. 4, fig. 7)."""
    pipeline, size = load_pipeline(args, prior="ar_prior")  # which has measured the components
    picture, image_emb = read(pipeline, args.image)
    counts = manipulate.probe_counts(image_emb.shape[1])
    frames = manipulate.probe(pipeline, image_emb, pipeline.prior, counts, args.seed)
    labels = [f"{count} of {counts[-1]}" for count in counts] + ["source"]
    name = f"probe_{Path(args.image).stem}"
    save_strip(pipeline, size, torch.cat([frames, picture]), labels, args, name)


def inpaint_command(args):
    """Redraw the white part of a mask so that the picture fits a caption."""
    pipeline, size = load_pipeline(args)
    picture, _ = read(pipeline, args.image)
    mask = to_tensor(fit(open_picture(args.mask), pipeline.sizes[0]))[None, :1] > 0
    if mask.all() or not mask.any():
        raise UserError(f"{args.mask}: the mask must be white where to draw, black where to keep, "
                        "and have some of both")
    text = pipeline.text([args.caption])
    image_emb = pipeline.embed(text, [args.seed], args.prior_scale)
    drawn = manipulate.inpaint(
        pipeline, picture, mask.float().to(pipeline.device), image_emb, text, args.seed,
        args.scale, args.steps, args.resamples,
    )
    shown = torch.where(mask.to(pipeline.device), torch.zeros_like(picture), picture)
    labels = ["source", "kept", args.caption]
    name = f"inpaint_{Path(args.image).stem}_{slugs([args.caption])[0]}"
    save_strip(pipeline, size, torch.cat([picture, shown, drawn]), labels, args, name)


@exit_code
def main(argv=None):
    parser = Parser("sample.py", description="Draw pictures with trained stages.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, text):
        """A subcommand with the options that all share; returns its add_argument."""
        sub = commands.add_parser(name, help=text, description=text)
        add = sub.add_argument
        add("--weights", help="folder of checkpoints (default: weights/shapes, else newest run)")
        add("--size", type=positive, default=64, help="side of the pictures: 64, 256 or 1024")
        add("--seed", type=seed_number, default=0, help="of the first picture; the next has one "
            "more")
        add("--out", default="samples", help="folder for the pictures")
        add("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
        add("--clip", help="MODEL:TAG=FILE, the CLIP that the stages were trained with, from a "
            "file (default: as in training)")
        sub.set_defaults(run=run)
        return add

    add = command("text", text_command, "text to image (--out may also be a .png for the grid)")
    add("caption", nargs="+", help="what to draw; several captions in one call work")
    add("-n", type=positive, default=4, help="pictures a caption")
    add("--prior", default="diffusion", choices=("diffusion", "ar"), help="which prior draws")
    add("--condition", choices=CONDITIONS, help="what the decoder is given besides the caption: "
        "the prior's embedding (the default), the text embedding in its place, or nothing")
    add("--decoder", default="image_emb", choices=("image_emb", "text_emb", "caption"),
        help="which trained decoder; text_emb and caption (GLIDE) are the paper's baselines")
    add("--prior-scale", type=finite, help=PRIOR_SCALE_HELP)
    add("--scale", type=finite, default=2.0, help="guidance of the decoder; off at 1")
    add("--prior-steps", type=int, help="sampling steps of the prior, 1 to T (default: 64)")
    add("--steps", type=int, help="sampling steps of the decoder, 1 to T (default: the model's)")
    add("--candidates", type=positive, default=2, help="pictures that the decoder draws for each; "
        "the one in which CLIP sees most of the embedding is kept")
    add("--film", action="store_true", help="also write the denoising as animated GIFs")
    add("--stages", action="store_true", help="the grid shows each picture at every size it had")

    steps = {"type": positive, "default": manipulate.INVERSION_STEPS, "help": "DDIM steps each way"}
    add = command("vary", vary_command, "variations of a picture")
    add("image", help="any picture file; its middle square is used")
    add("-n", type=positive, default=4, help="how many")
    add("--eta", type=fraction, default=1.0, help="0 reconstructs, larger varies more, up to 1")
    add("--steps", **steps)

    add = command("blend", blend_command, "from one picture to another, as a strip and a GIF")
    add("a", help="the first picture")
    add("b", help="the second picture")
    add("--frames", type=two_or_more, default=7, help="how many, both ends counted")
    add("--noise", choices=("slerp", "fixed"), default="slerp",
        help="x_T: from one inverted noise to the other, or one random noise for all")
    add("--steps", **steps)

    add = command("edit", edit_command, "change what a picture shows by a change of words")
    add("image", help="the picture")
    add("--to", required=True, help="caption of the picture as it should become")
    add("--from", help="caption of the picture as it is (default: the empty caption)")
    add("--theta", type=fraction, default=0.5, help="how far to turn, 0 to 1 (paper: 0.25 to 0.5)")
    add("--frames", type=two_or_more, default=6, help="how many, from theta 0 on")
    add("--steps", **steps)

    add = command("probe", probe_command, "a picture from ever more of its embedding's components")
    add("image", help="the picture")

    add = command("inpaint", inpaint_command, "redraw a part of a picture to fit a caption")
    add("image", help="the picture")
    add("mask", help="a picture that is white where to draw and black where to keep")
    add("caption", help="what the whole picture should show")
    add("--prior-scale", type=finite, help=PRIOR_SCALE_HELP)
    add("--scale", type=finite, default=2.0, help="guidance of the decoder; off at 1")
    add("--steps", type=positive, help="sampling steps of the decoder (default: the model's)")
    add("--resamples", type=positive, default=4, help="times that each step is done")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
