"""The pipeline: a caption goes in, pictures come out (paper fig. 2, bottom).

    python sample.py "a large red circle above a small blue square" -n 4 --size 256
    >>> Pipeline().draw("a red circle", size=256)[0].save("circle.png")

    caption -> CLIP -> prior -> image_emb -> decoder: 64 px -> upsampler1: 256 -> upsampler2: 1024

The one idea: a picture depends on the weights, its caption and its own seed, and on nothing else.
Every stage draws each picture's noise from a generator made from that picture's seed. So the third
of four pictures is the one that its seed gives alone, and a large picture starts as the small one.

Letters: B pictures, D CLIP embedding, L caption tokens, W text width, H, W picture sides.
"""

import itertools
import sys
from pathlib import Path

import torch

from diffusion import SeededNoise
from prior import DiffusionPrior
from stages import check_clip, clip_of, load_stage
from support.captions import captions_of
from support.drawing import SHIPPED, drawing_options, reachable_size, write_drawings
from support.pictures import fit
from support.sheets import Film, to_pil, to_tensor
from support.tools import (
    Parser, UserError, autocast, choose_device, finite, sampling_steps, some, user_errors,
)

STAGE_SEEDS = {"prior": 1, "decoder": 2, "upsampler1": 3, "upsampler2": 4}
BASELINES = {"decoder_text_emb": "text_emb", "decoder_caption": "none"}  # and their --prior
PRIOR_SCALE_HELP = f"prior's guidance, off at 1 (default: {DiffusionPrior.usual_scale}, ar_prior 1)"


def noise_for(seeds, stage, attempt=0):
    """One stage's noise for the pictures of these seeds: a function shape -> (B, ...). Attempts at
    a picture are 1.25 * 10^8 seeds apart, further than people count."""
    return SeededNoise([STAGE_SEEDS[stage] + attempt * 10**9 + int(seed) * 8 for seed in seeds])


class Pipeline:
    """The trained stages of a folder, and the path from a caption to pictures.

    size:  the side to enlarge to; an upsampler that is missing is left out
    prior: where the decoder's image embedding comes from: a stage, "prior" or "ar_prior"; else
           "text_emb", CLIP's text embedding in its place, or "none", the caption alone
    clip:  where to load CLIP from, if not from where the training did (clip_model.load_open_clip)
    """

    def __init__(self, folder=None, device="auto", size=1024, prior="prior", decoder="decoder",
                 clip=None):
        self.folder, self.device = Path(folder or SHIPPED), choose_device(str(device))
        self.decoder = load_stage(self.folder, decoder, self.device)
        self.clip = clip_of(self.decoder, self.folder, decoder, self.device, clip)
        self.source = BASELINES.get(decoder, prior)  # a baseline draws from what it learned from
        if self.source not in ("prior", "ar_prior", "text_emb", "none", None):
            raise UserError(f"prior {self.source!r}: use prior, ar_prior, text_emb or none")
        self.prior = None
        if self.source in ("prior", "ar_prior"):
            self.prior = load_stage(self.folder, self.source, self.device)
            check_clip(self.prior.clip, self.clip, self.folder / f"{self.source}.pt")
        self.upsamplers, self.sizes = {}, [self.decoder.config.size]  # the sides it can draw
        for stage in ("upsampler1", "upsampler2"):
            if self.sizes[-1] < size and (self.folder / f"{stage}.pt").exists():
                model = load_stage(self.folder, stage, self.device)
                if model.config.low_size == self.sizes[-1]:  # the next link of the chain
                    self.upsamplers[stage] = model
                    self.sizes.append(model.config.size)

    def draw(self, captions, seeds=(0,), size=64, scale=2.0, steps=None, prior_scale=None,
             prior_steps=None, candidates=2, stages=False, films=None):
        """The whole of unCLIP: one caption or several -> PIL pictures, all seeds of each caption.

        size: one of `sizes`. scale, prior_scale: guidance, off at 1 (None: the prior's usual one).
        steps, prior_steps: sampling steps (None: as in the configs). candidates: how many pictures
        the decoder draws for CLIP to choose from. stages: return each picture at every size it had,
        smallest first. films: a list to which a Film of each picture is added.
        """
        scale, prior_scale, candidates = finite(scale), finite(prior_scale), some(candidates)
        steps, prior_steps = sampling_steps(steps), sampling_steps(prior_steps)
        size, pictures = reachable_size(self, size), []
        sides = [side for side in self.sizes if side <= size] if stages else [size]
        several = hasattr(captions, "__iter__") and not isinstance(captions, str)
        texts = [self.text([caption]) for caption in (captions if several else [captions])]
        for text, seed in itertools.product(texts, seeds):
            takes = None if films is None else [Film() for _ in range(candidates)]
            emb = self.condition(self.source, text, [seed], prior_scale, prior_steps)
            picture, best = self.decode_best(candidates, emb, text, [seed], takes, scale=scale,
                                             steps=steps)
            if takes:
                films.append(takes[best])
            for side in sides:
                picture = self.upsample(picture, [seed], side)
                pictures.append(to_pil(picture[0]))
        return pictures

    def text(self, captions):
        """Captions -> text_emb (B, D), text_enc (B, L, W), text_mask (B, L). For GLIDE, text_enc is
        the words' ids (B, L)."""
        ids = self.clip.tokenizer(captions).to(self.device)
        text_emb, text_enc, text_mask = self.clip.encode_ids(ids)
        return text_emb, ids if self.decoder.config.vocab_size else text_enc, text_mask

    def look(self, picture):
        """CLIP's embedding of the middle square of a PIL picture: (1, D), unit norm."""
        square = fit(picture, self.clip.image_size, interpolation=self.clip.interpolation)
        return self.clip.encode_image(to_tensor(square)[None].to(self.device))

    def condition(self, source, text, seeds, scale=1.0, steps=None):
        """The decoder's image_emb (paper fig. 8): the prior's, or CLIP's "text_emb" as if it were a
        picture's, or None, which leaves the caption alone."""
        if source in ("prior", "ar_prior"):
            return self.embed(text, seeds, scale, steps)
        return text[0] if source == "text_emb" else None

    def embed(self, text, seeds, scale=1.0, steps=None):
        """The prior: text() of B captions -> image_emb (B, D), unit norm. scale: off at 1, None for
        the prior's usual one. The autoregressive prior has no sampling steps."""
        scale = self.prior.usual_scale if scale is None else scale
        settings = {"steps": steps} if isinstance(self.prior, DiffusionPrior) else {}
        with autocast(self.device):
            return self.prior.sample(*text, scale, noise=noise_for(seeds, "prior"), **settings)

    def decode(self, image_emb, text, seeds, scale=2.0, attempt=0, **settings):
        """The decoder: image_emb (B, D), or None for the caption alone; text(), or None for the
        embedding alone -> (B, 3, H, W) in [-1, 1]. settings: Decoder.sample's."""
        given, noise = [image_emb, *(text or ())[1:]], noise_for(seeds, "decoder", attempt)
        with autocast(self.device):
            return self.decoder.sample(*given, scale=scale, noise=noise, **settings)

    def decode_best(self, candidates, image_emb, text, seeds, films=None, **settings):
        """Decode each picture `candidates` times and keep the attempt in which CLIP sees most of
        image_emb, or without it of the caption: (B, 3, H, W), and the attempt's number (B,).

        The paper chooses only between embeddings of the prior (sec. 2.2). We also choose between
        pictures: a small decoder sometimes gives an object the wrong shape, and CLIP notices.
        """
        drawn = torch.stack([
            self.decode(image_emb, text, seeds, attempt=attempt, on_step=film, **settings)
            for attempt, film in enumerate(films or [None] * candidates)
        ])  # (candidates, B, 3, H, W)
        wanted = text[0] if image_emb is None else image_emb
        seen = torch.stack([self.clip.encode_image(pictures) for pictures in drawn])
        best = (seen * wanted).sum(dim=-1).argmax(dim=0)
        return drawn[best, torch.arange(len(best))], best

    def upsample(self, pictures, seeds, size):
        """Pictures (B, 3, H, W) -> the same at `size`, through as many upsamplers as that takes."""
        for stage, model in self.upsamplers.items():
            if model.config.low_size == pictures.shape[-1] < size:
                with autocast(self.device):
                    pictures = model.sample(pictures, noise=noise_for(seeds, stage))
        if not pictures.isfinite().all():  # it would look black
            raise UserError(f"{self.folder}: what its stages draw is not finite; train them again")
        return pictures


@user_errors
def main(argv=None):
    parser = Parser("sample.py", description="Draw pictures of captions.")
    add = drawing_options(parser)
    add("caption", nargs="*", help="what to draw; several captions in one call work")
    add("--from-file", type=captions_of, metavar="FILE", help="of further captions, one a line")
    add("-n", type=some, default=4, help="pictures a caption")
    add("--prior", choices=("prior", "ar_prior", "text_emb", "none"), help="where the decoder's "
        "image embedding comes from (default: prior, or what a baseline was trained with)")
    add("--decoder", default="decoder", choices=("decoder", *BASELINES), help="or a baseline")
    add("--prior-scale", type=finite, help=PRIOR_SCALE_HELP)
    add("--scale", type=finite, default=2.0, help="guidance of the decoder, off at 1")
    add("--prior-steps", type=sampling_steps, help="of the prior, 1 to 1000 (default: 64)")
    add("--steps", type=sampling_steps, help="of the decoder, 1 to 1000 (default: the model's)")
    add("--candidates", type=some, default=2, help="pictures drawn; CLIP keeps the best")
    add("--film", action="store_true", help="also write the denoising as animated GIFs")
    add("--stages", action="store_true", help="the grid shows each picture at every size it had")
    args = parser.parse_args(argv)
    args.caption += args.from_file or []
    if not args.caption:
        parser.error("nothing to draw: give a caption, or --from-file")
    prior = BASELINES.get(args.decoder, args.prior or "prior")
    if args.prior not in (None, prior):
        parser.error(f"--prior {args.prior}: {args.decoder} needs {prior}; leave --prior out")
    pipeline = Pipeline(args.weights, args.device, args.size, prior, args.decoder, args.clip)
    write_drawings(pipeline, args)


if __name__ == "__main__":
    sys.exit(main())
