"""The pipeline put together: a caption goes in, pictures come out (paper fig. 2, bottom).

    python sample.py text "a large red circle above a small blue square" -n 4 --size 256

    caption -> CLIP -> prior -> image_emb -> decoder: 64 px -> upsampler1: 256 -> upsampler2: 1024

The one idea of this file: a picture is a function of the weights, the caption and its own seed.
Each stage draws its noise from a generator made from (seed, stage), one a picture, and pictures
are drawn one at a time; so picture k of four is the picture that its seed gives alone, and the
small one is the start of the large one.

Letters: B pictures, D CLIP embedding, H, W picture sides.
Read next: evaluate.py, which measures what comes out.
"""

import argparse
import functools
import math
import re
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import checkpoint as checkpoints
from data import UserError

STAGE_SEEDS = {"prior": 1, "decoder": 2, "upsampler1": 3, "upsampler2": 4}
SIZES = (64, 256, 1024)  # of the paper's three stages

# --- the machine -----------------------------------------------------------------------------


def choose_device(name):
    """ "auto", "cpu", "cuda", "cuda:1", ... -> torch.device. Raises UserError if it isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA "
                        "devices; use --device cpu or auto")
    return device


def autocast(device):
    """Compute in bfloat16 where the hardware multiplies it fast; weights stay in float32."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    fast = torch.cuda.get_device_capability(device) >= (8, 0) if cuda else cpu_has_bf16()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def cpu_has_bf16():
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


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


def generators(seeds, stage):
    """One generator a picture, from its seed and the stage: more steps here move no noise there."""
    return [torch.Generator().manual_seed(seed * 8 + STAGE_SEEDS[stage]) for seed in seeds]


class Pipeline:
    """Every trained stage of a folder, and the path from a caption to pictures.

    stages: which of prior, decoder, upsampler1, upsampler2 to load (a missing upsampler is left
    out; the others raise UserError). sizes: the sides it can draw, ascending.
    """

    def __init__(self, folder, device="cpu", size=64, stages=("prior", "decoder")):
        self.folder, self.device = Path(folder), torch.device(device)
        if not self.folder.is_dir():
            raise UserError(f"no folder {folder}: give --weights the --out folder of a training")
        self.stages = {s: checkpoints.load_stage(folder, s, device) for s in stages}
        # Which CLIP to load is written in the stages themselves: embeddings of another would be
        # numbers without meaning to them.
        spec = next((m.clip["spec"] for m in self.stages.values() if m.clip), "small")
        self.clip = checkpoints.load_clip(folder, spec, device)
        for stage, model in self.stages.items():
            checkpoints.check_clip(model, self.clip, self.folder / f"{stage}.pt")
        # The chain of sizes, as far as it is wanted and unbroken; 64, 256, 1024 for base.
        self.sizes = [self.stages["decoder"].config.size] if "decoder" in stages else []
        for stage in ("upsampler1", "upsampler2"):
            wanted = self.sizes and self.sizes[-1] < size
            if not wanted or not (self.folder / f"{stage}.pt").exists():
                break
            model = checkpoints.load_stage(folder, stage, device)
            if model.config.low_size != self.sizes[-1]:
                raise UserError(f"{self.folder}/{stage}.pt enlarges {model.config.low_size} px, "
                                f"not {self.sizes[-1]}: train it with the decoder's preset")
            self.stages[stage] = model
            self.sizes.append(model.config.size)

    def text(self, captions):
        """Captions -> text_emb (B, D), text_enc (B, L, W), text_mask (B, L)."""
        return self.clip.encode_text(captions)

    def embed(self, text, seeds, scale=1.0, steps=None, on_step=None):
        """The prior: text() of B captions and B seeds -> image_emb (B, D), unit norm.

        scale: guidance, off at 1. steps: of the T diffusion steps (None: the config's).
        """
        with autocast(self.device):
            return self.stages["prior"].sample(
                *text,
                scale=scale,
                steps=steps,
                generators=generators(seeds, "prior"),
                on_step=on_step,
            )

    def decode(self, image_emb, text, seeds, scale=2.0, steps=None, eta=None, on_step=None):
        """The decoder: image_emb (B, D) or None, text() or None -> (B, 3, H, W) in [-1, 1].

        Without an embedding it draws from the caption alone, without text from the embedding
        alone (paper fig. 8). scale: guidance, off at 1. eta: None for ancestral sampling, a
        number for DDIM.
        """
        _, text_enc, text_mask = text or (None, None, None)
        with autocast(self.device):
            return self.stages["decoder"].sample(
                image_emb, text_enc, text_mask, scale=scale, steps=steps, eta=eta,
                generators=generators(seeds, "decoder"), on_step=on_step,
            )

    def upsample(self, pictures, seeds, size, on_step=None):
        """Pictures -> the same at `size`, through as many upsamplers as that takes."""
        for stage in ("upsampler1", "upsampler2"):
            model = self.stages.get(stage)
            if model and model.config.low_size == pictures.shape[-1] < size:  # the next link
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
        raise UserError(f"--size {size}: these weights draw {', '.join(map(str, choices))} pixels")
    largest = max(s for s in pipeline.sizes if s <= size)
    print(f"{pipeline.folder} has no upsampler to {size} pixels: stopping at {largest}")
    return largest


# --- pictures on disk ------------------------------------------------------------------------


def to_pil(picture):
    """(3, H, W) in [-1, 1] -> PIL RGB. Fixed limits, never a picture's own minimum and maximum."""
    picture = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())


def draw_grid(pictures, captions=None, columns=4, cell=None):
    """Pictures (n, 3, H, W) in rows, each with its caption under it -> PIL image.

    cell: side of a picture in the grid, pixels (default: at least 128, so that small ones show).
    """
    H = pictures.shape[-1]
    cell = cell or max(H, 128)
    font = ImageFont.load_default(max(10, cell // 12))
    # Captions are wrapped to the cell's width; the longest decides the height of every row.
    captions = captions or [""] * len(pictures)
    lines = [textwrap.wrap(c, width=max(8, int(cell / font.getlength("e")))) for c in captions]
    line = int(font.size * 1.25)
    under = 6 + line * max(len(x) for x in lines) if any(captions) else 0
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + 4) + 4, rows * (cell + under + 4) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for k, picture in enumerate(pictures):
        x, y = 4 + k % columns * (cell + 4), 4 + k // columns * (cell + under + 4)
        resample = Image.Resampling.NEAREST if cell % H == 0 else Image.Resampling.BICUBIC
        sheet.paste(to_pil(picture).resize((cell, cell), resample), (x, y))
        for i, words in enumerate(lines[k]):
            pen.text((x, y + cell + 2 + i * line), words, fill="black", font=font)
    return sheet


def save_picture(image, path, **options):
    """image.save, with a full disk or a bad path as a UserError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write {path}: {e}") from e


def slugs(captions):
    """Captions as file names: their words, cut at 60 letters, numbered where two are the same."""
    names = []
    for caption in captions:
        words = "".join(c if c.isalnum() else " " for c in caption.lower()).split()
        name = "-".join(words)[:60] or "caption"
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


class Film:
    """Collects (x_t, predicted x_0) at each denoising step, side by side, for an animated GIF."""

    def __init__(self):
        self.frames = []

    def __call__(self, k, t, x_t, pred_x_0):
        both = torch.cat([x_t[0].float(), pred_x_0[0].float()], dim=2).clamp(-1, 1)  # (3, H, 2W)
        image = to_pil(both)
        self.frames.append(
            image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST)
        )

    def save(self, path):
        durations = [80] * (len(self.frames) - 1) + [1500]  # milliseconds
        save_picture(self.frames[0], path, save_all=True, append_images=self.frames[1:],
                     duration=durations, loop=0)


# --- the command line ------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None and False, which the help's own words explain."""

    def _get_help_string(self, action):
        said = action.default in (None, False)
        return action.help if said else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Defaults in the help; a wrong argument becomes one line instead of a page of usage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=Help, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def exit_code(main):
    """Make main(argv=None) return 0, or 2 after a user's mistake: one line on stderr."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
        except UserError as e:
            # One raised in a worker process arrives as a whole traceback, the message last.
            message = str(e).strip().splitlines()[-1].removeprefix("data.UserError: ")
            print(f"error: {message}", file=sys.stderr)
            return 2
        except OSError as e:  # a full disk, a folder that is a file, no permission, ...
            where = f"{e.filename}: " if e.filename else ""
            print(f"error: {where}{e.strerror or e}; check the path and the room", file=sys.stderr)
            return 2
        except KeyboardInterrupt as e:
            print(f"stopped. {e}", file=sys.stderr)
            return 130  # what a shell reports after Ctrl-C
        return 0

    return wrapped


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be 1 or more")
    return value


def natural(text):
    value = int(text)
    if not 0 <= value < 2**48:
        raise argparse.ArgumentTypeError(f"{value}: must be 0 or more, and below 2^48")
    return value


def number(text):
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
    return value


def positive_number(text):
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def text_command(args):
    """Captions -> a PNG a picture, a grid of all, and with --film the denoising of each."""
    for caption in args.caption:
        if not caption.strip():
            raise UserError("the caption is empty: write what the picture should show")
    pipeline = Pipeline(args.weights or default_weights(), choose_device(args.device), args.size)
    size = reachable_size(pipeline, args.size)
    out = Path(args.out)
    folder, grid_path = (out.parent, out) if out.suffix == ".png" else (out, None)
    texts = [pipeline.text([caption]) for caption in args.caption]  # all mistakes before any work
    names = slugs(args.caption)
    jobs = [(c, args.seed + k) for c in range(len(names)) for k in range(args.n)]
    pictures = []
    for c, seed in tqdm(jobs, "pictures", disable=None):
        film = Film() if args.film else None
        text, name = texts[c], f"{names[c]}_{seed}"
        # The whole of unCLIP in three lines (paper fig. 2).
        image_emb = pipeline.embed(text, [seed], args.prior_scale, args.prior_steps)
        picture = pipeline.decode(image_emb, text, [seed], args.scale, args.steps, on_step=film)
        picture = pipeline.upsample(picture, [seed], size)
        pictures.append(picture.cpu())
        save_picture(to_pil(picture[0]), folder / f"{name}.png")
        print(folder / f"{name}.png")
        if film:
            film.save(folder / f"{name}.gif")
            print(folder / f"{name}.gif")
    grid_path = grid_path or folder / f"grid_{names[0]}_{args.seed}.png"
    columns = args.n if args.n > 1 else 4
    grid = draw_grid(torch.cat(pictures), [args.caption[c] for c, _ in jobs], columns)
    save_picture(grid, grid_path)
    print(grid_path)


@exit_code
def main(argv=None):
    parser = Parser("sample.py", description="Draw pictures with trained stages.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("text", help="text to image").add_argument
    add("caption", nargs="+", help="what to draw; several captions in one call work")
    add("-n", type=positive, default=4, help="pictures a caption")
    add("--weights", help="folder of checkpoints (default: weights/shapes, else the newest run)")
    add("--size", type=positive, default=64, help="side of the pictures: 64, 256 or 1024 pixels")
    add("--prior-scale", type=number, default=1.0, help="guidance of the prior; off at 1")
    add("--scale", type=number, default=2.0, help="guidance of the decoder; off at 1")
    add("--prior-steps", type=int, help="sampling steps of the prior, 1 to T (default: 64)")
    add("--steps", type=int, help="sampling steps of the decoder, 1 to T (default: 32)")
    add("--seed", type=natural, default=0, help="of the first picture; the next has seed + 1")
    add("--out", default="samples", help="folder for the pictures, or a .png for the grid")
    add("--film", action="store_true", help="also write the denoising as animated GIFs")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    text_command(args)


if __name__ == "__main__":
    sys.exit(main())
