"""Changing a picture through its latent: variations, blends, edits, inpainting (paper sec. 3, 4).

    python manipulate.py vary picture.png          # and blend, edit, probe, inpaint

A picture x has a *bipartite latent* (image_emb, x_T):

    image_emb   from CLIP: what the picture shows, as far as CLIP sees it (its semantics)
    x_T         from DDIM inversion: everything else, such as places, angles and shades

The one idea: the decoder turns that pair back into x, and manipulations change the pair. The same
pair with noise added on the way is a variation, another embedding with the same x_T an edit, and
points between two pairs make a blend. (Inpainting is different: it keeps pixels.)

Why can x_T be found? With eta = 0, DDIM adds no noise: it follows an ODE from x_T down to x, and
such a path can be followed in both directions, by the same network. Here that is the decoder given
the embedding alone, unguided: guidance multiplies the network's errors, and following a guided
network upwards ends in an x_T that is no noise and does not lead back.

Letters: B pictures, D CLIP embedding, H, W sides of the decoder's pictures, T noise levels.
"""

import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusion import SeededNoise, at_least_float32, expand
from sample import PRIOR_SCALE_HELP, Pipeline
from support.drawing import drawing_options, mask_of, read, reachable_size, sheet_path, write_strip
from support.tools import (
    Parser, UserError, autocast, finite, fraction, sampling_steps, some, two_or_more, user_errors,
)

INVERSION_STEPS = 50  # each way; a step up runs the network four times
INVERSIONS, GOOD_ENOUGH = 4, 30.0  # attempts at a picture until one reproduces it, PSNR in dB

# --- the latent: there and back --------------------------------------------------------------


@torch.no_grad()
def ddim_invert(diffusion, network, x_0, steps, start=0, corrections=0, noise=torch.randn):
    """Run DDIM backwards (2010.02502 sec. 4.3, ADM app. F): the x_T (B, ...) from which ddim_sample
    with the same network and steps returns x_0.

    start: 0 begins at the data, as the paper does. But there the predicted noise is the error of
        the network's x_0 divided by a sigma near 0: outlines of the picture, many times too
        large, which stay in x_T and show in every edit. Above 0, fresh `noise` carries x_0 to the
        level `start`, where there is real noise to predict, and inversion begins there.
    corrections: a step up assumes that the noise predicted at its lower end holds at its upper end.
        Each correction asks the network at the upper end, as the step down will, and repeats the
        step; all but the first go only halfway, as the whole way overshoots.
    """
    x = at_least_float32(x_0)
    first = start if start > 0 else -1  # -1: the data
    levels = [first] + [t for t in reversed(diffusion.timesteps(steps)) if t > first]
    levels = torch.tensor(levels, device=x.device)[:, None].expand(-1, len(x))
    if start > 0:
        x = diffusion.q_sample(x, levels[0], noise(x.shape).to(x))
    for t_prev, t in itertools.pairwise(levels):
        level = t_prev.clamp(min=0)  # no network was trained at -1; 0 is next to it
        pred_x_0, pred_noise = diffusion.predictions(network(x, level), x, level)
        pred_x_0 = torch.where(expand(t_prev, x) < 0, x, pred_x_0)  # at -1, x *is* x_0
        higher = diffusion.q_sample(pred_x_0, t, pred_noise)
        for n in range(corrections if t_prev[0] >= 0 else 0):  # from -1 every noise leads back
            pred_x_0, _ = diffusion.predictions(network(higher, t), higher, t)
            signal, sigma = diffusion.signal_sigma(t_prev, x)
            again = diffusion.q_sample(pred_x_0, t, (x - signal * pred_x_0) / sigma)
            higher = again if n == 0 else (higher + again) / 2
        x = higher
    return x


def psnr(a, b):
    """Peak signal-to-noise ratio of pictures (B, 3, H, W) in [-1, 1], dB: (B,)."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp(min=1e-10))


def invert(pipeline, pictures, image_emb, steps=INVERSION_STEPS):
    """The noise x_T (B, 3, H, W) from which redraw() returns `pictures`, given image_emb (B, D).

    The paper inverts by plain DDIM. Here inversion starts from a little fresh noise, corrects each
    step, and keeps the best of up to INVERSIONS attempts: at the noisiest levels, which decide what
    goes where, a small error is sometimes enough to lose the picture. The fresh noise is the same
    in every run, so a picture has one x_T, up to rounding.
    """
    decoder, diffusion = pipeline.decoder, pipeline.decoder.diffusion
    x_T, best = torch.zeros_like(pictures), pictures.new_full((len(pictures),), -math.inf)
    for attempt in range(INVERSIONS):
        left = (best < GOOD_ENOUGH).nonzero().flatten()
        if len(left) == 0:
            break
        x_0, emb, seeds = pictures[left], image_emb[left], [attempt] * len(left)
        with autocast(pipeline.device):  # as in redraw: the same network both ways
            found = ddim_invert(diffusion, decoder.network(emb, None, None), x_0, steps,
                                diffusion.T // 50, corrections=3, noise=SeededNoise(seeds))
        ratio = psnr(x_0, redraw(pipeline, emb, found, seeds, steps))
        better = ratio > best[left]
        x_T[left[better]], best[left[better]] = found[better], ratio[better]
    return x_T


def redraw(pipeline, image_emb, x_T, seeds, steps=INVERSION_STEPS, eta=0.0):
    """The picture (B, 3, H, W) of a latent. eta > 0 adds noise on the way, drawn by the seeds."""
    return pipeline.decode(image_emb, None, seeds, scale=1.0, steps=steps, eta=eta, x_T=x_T)


# --- manipulations ---------------------------------------------------------------------------


def slerp(a, b, theta):
    """The point at a share theta of the way from a (0) to b (1) along the great circle (B, ...).

        (sin((1 - theta) omega) a + sin(theta omega) b) / sin(omega),  omega the angle between them

    Embeddings lie on a sphere, and noise very nearly does: |x_T| is close to the square root of its
    number of dimensions. A straight line would leave the sphere: halfway between two noises it has
    a standard deviation of 0.71, which the decoder was never trained to start from. Between
    exactly opposite points there is no one great circle: the way leads through 0.
    """
    flat_a, flat_b = a.flatten(1).cpu().double(), b.flatten(1).cpu().double()
    cosine = F.cosine_similarity(flat_a, flat_b, dim=1)[:, None]
    omega = torch.acos(cosine.clamp(-1 + 5e-9, 1 - 5e-9))  # keeps sin(omega) above 0
    left, right = ((share * omega).sin() / omega.sin() for share in (1 - theta, theta))
    return (left * flat_a + right * flat_b).to(a).view_as(a)


def blend(pipeline, ends, embs, seed, frames, noise="slerp", steps=INVERSION_STEPS):
    """Pictures (frames, 3, H, W) from one to another (paper sec. 3.2).

    ends: two pictures (2, 3, H, W); embs: their embeddings (2, D). noise: "slerp" goes from one
    inverted x_T to the other, so both ends are reproduced. "fixed" keeps one random x_T (fig. 4):
    the ends are then variations, and only the semantics change from frame to frame.
    """
    if noise == "slerp":
        x_T = invert(pipeline, ends, embs, steps)
    else:
        x_T = SeededNoise([seed])(ends[:1].shape).to(ends).repeat(2, 1, 1, 1)
    thetas = [k / (frames - 1) for k in range(frames)]
    latents = [(slerp(*embs.split(1), theta), slerp(*x_T.split(1), theta)) for theta in thetas]
    return torch.cat([redraw(pipeline, *latent, [seed], steps) for latent in latents])


def text_diff(pipeline, caption, baseline=None):
    """The direction from a caption of the picture as it is, `baseline`, to another:
    norm(z_t - z_t0), (1, D) (paper sec. 3.3). None: the empty caption, where the paper has
    "a photo", which a small CLIP may not know."""
    ids = pipeline.clip.tokenizer([caption, baseline or caption])
    if not baseline:  # start and end of text with nothing between
        ids[1, 1:], ids[1, 1] = 0, ids.max()
    after, before = (pipeline.clip.encode_ids(x.to(pipeline.device))[0] for x in ids.split(1))
    difference = after - before
    if difference.norm() < 1e-6:
        raise UserError("--from and --to say the same to CLIP: there is no direction to turn to")
    return F.normalize(difference, dim=-1)


def edit(pipeline, picture, image_emb, direction, thetas, seed, steps=INVERSION_STEPS):
    """Turn a picture's embedding towards a text diff and keep x_T: (len(thetas), 3, H, W).

    picture (1, 3, H, W), image_emb and direction (1, D). thetas: shares of the way from the
    embedding to the direction; 0 reconstructs (paper: up to 0.25 .. 0.5).
    """
    x_T = invert(pipeline, picture, image_emb, steps)
    turned = [slerp(image_emb, direction, theta) for theta in thetas]
    return torch.cat([redraw(pipeline, emb, x_T, [seed], steps) for emb in turned])


# --- inpainting ------------------------------------------------------------------------------


@torch.no_grad()
def resample(diffusion, network, x_0, mask, steps, resamples=1, noise=torch.randn):
    """Ancestral sampling of x_0 (B, ...) where mask is 1, given the rest (RePaint, 2201.09865).

    GLIDE (sec. 4.3) trains a network for this; here any trained decoder does it. After each step
    down, the known part of x is replaced by x_0 noised to the level reached. What was drawn in that
    step could not fit it yet. So each step is done `resamples` times, with a step back up by
    q(x_t | x_prev) between, until both parts agree (their alg. 1).
    mask: broadcasts to x_0. Where it is 0, x_0 is returned exactly.
    """
    x = noise(x_0.shape).to(x_0)
    for t, t_prev in diffusion.pairs(steps, len(x_0), x_0.device):
        last = bool(t_prev[0] < 0)
        for again in range(1 if last else resamples):
            if again:
                alpha = expand(diffusion.alpha_bar(t) / diffusion.alpha_bar(t_prev), x)
                x = alpha.sqrt() * x + (1 - alpha).sqrt() * noise(x.shape).to(x)
            x, log_variance, _ = diffusion.p_mean_variance(network(x, t), x, t, t_prev)
            known = x_0
            if not last:
                x = x + torch.exp(0.5 * log_variance) * noise(x.shape).to(x)
                known = diffusion.q_sample(x_0, t_prev, noise(x.shape).to(x))
            x = torch.where(mask.bool(), x, known)
    return x


# --- the commands: (pipeline, args) -> pictures (n, 3, H, W) and a label for each ----------------


def vary_command(pipeline, args):
    """Variations: the latent of a picture, redrawn with noise added on the way (sec. 3.1)."""
    picture, image_emb = read(pipeline, args.image)
    x_T = invert(pipeline, picture, image_emb, args.steps)
    again = redraw(pipeline, image_emb, x_T, [args.seed], args.steps)
    print(f"reconstruction from image_emb and x_T alone: {psnr(picture, again)[0]:.1f} dB")
    seeds = range(args.seed, args.seed + args.n) if args.eta > 0 else []
    varied = [redraw(pipeline, image_emb, x_T, [k], args.steps, args.eta) for k in seeds]
    labels = ["source", "eta 0"] + [f"eta {args.eta:g}, seed {k}" for k in seeds]
    return torch.cat([picture, again, *varied]), labels


def blend_command(pipeline, args):
    """From one picture to another, as a strip and a GIF (sec. 3.2)."""
    (a, emb_a), (b, emb_b) = read(pipeline, args.a), read(pipeline, args.b)
    ends, embs = torch.cat([a, b]), torch.cat([emb_a, emb_b])
    frames = blend(pipeline, ends, embs, args.seed, args.frames, args.noise, args.steps)
    errors = psnr(ends, frames[[0, -1]])
    print(f"the ends against their sources: {errors[0]:.1f} and {errors[1]:.1f} dB")
    labels = [f"{k / (args.frames - 1):.2f}" for k in range(args.frames)]
    return torch.cat([a, frames, b]), ["source", *labels, "source"]


def edit_command(pipeline, args):
    """Change what a picture shows by a change of words (sec. 3.3)."""
    picture, image_emb = read(pipeline, args.image)
    direction = text_diff(pipeline, args.caption, args.baseline)
    thetas = [args.theta * k / (args.frames - 1) for k in range(args.frames)]
    frames = edit(pipeline, picture, image_emb, direction, thetas, args.seed, args.steps)
    print(f"reconstruction at theta 0: {psnr(picture, frames[:1])[0]:.1f} dB")
    return torch.cat([picture, frames]), ["source"] + [f"theta {theta:.2f}" for theta in thetas]


def probe_command(pipeline, args):
    """A picture from ever more principal components of its embedding (sec. 4, fig. 7)."""
    picture, image_emb = read(pipeline, args.image)
    prior, D = pipeline.prior, image_emb.shape[1]  # the prior was fitted to these components
    counts = [2**k for k in range(math.ceil(math.log2(D)))] + [D]  # 1, 2, 4, ... and all
    components = (image_emb - prior.mean) @ prior.basis.T
    rebuilt = [F.normalize(prior.reconstruct(components[:, :n]), dim=-1) for n in counts]
    frames = [redraw(pipeline, emb, None, [args.seed], args.steps) for emb in rebuilt]  # same noise
    return torch.cat([*frames, picture]), [f"{n} of {D}" for n in counts] + ["source"]


def inpaint_command(pipeline, args):
    """Redraw a picture where the mask is white, and keep it where it is black."""
    picture, _ = read(pipeline, args.image)
    mask = mask_of(pipeline, args.mask, args.image)
    text, decoder = pipeline.text([args.caption]), pipeline.decoder
    image_emb = pipeline.embed(text, [args.seed], args.prior_scale)
    steps, noise = args.steps or decoder.config.sample_steps, SeededNoise([args.seed])
    with autocast(pipeline.device):
        network = decoder.network(image_emb, *text[1:], scale=args.scale)
        drawn = resample(decoder.diffusion, network, picture, mask, steps, args.resamples, noise)
    kept = picture.masked_fill(mask, 0)
    return torch.cat([picture, kept, drawn]), ["source", "kept", args.caption]


@user_errors
def main(argv=None):
    parser = Parser("manipulate.py", description="Change pictures with trained stages.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, function, pictures=("image",), prior="none", steps=INVERSION_STEPS):
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function, pictures=pictures, prior=prior, caption=None)
        add = drawing_options(sub)
        for picture in pictures:
            add(picture, help="any picture file; its middle square is used")
        add("--steps", type=sampling_steps, default=steps,
            help="of DDIM, each way" if steps else "of the decoder (default: the model's)")
        return add

    add = command("vary", vary_command)
    add("-n", type=some, default=4, help="how many")
    add("--eta", type=fraction, default=1.0, help="0 reconstructs, larger varies more, up to 1")
    add = command("blend", blend_command, ("a", "b"))
    add("--frames", type=two_or_more, default=7, help="how many, both ends counted")
    add("--noise", choices=("slerp", "fixed"), default="slerp", help="x_T: from one inverted noise "
        "to the other, or one random noise for all")
    add = command("edit", edit_command)
    add("--to", dest="caption", required=True, help="of the picture as it should become")
    add("--from", dest="baseline", help="of the picture as it is (default: the empty caption)")
    add("--theta", type=fraction, default=0.5, help="how far to turn, 0 to 1 (paper: 0.25 to 0.5)")
    add("--frames", type=two_or_more, default=6, help="how many, from theta 0 on")
    command("probe", probe_command, prior="ar_prior", steps=None)
    add = command("inpaint", inpaint_command, prior="prior", steps=None)
    add("mask", help="a picture file: white where to draw, black where to keep")
    add("caption", help="what the whole picture should show")
    add("--prior-scale", type=finite, help=PRIOR_SCALE_HELP)
    add("--scale", type=finite, default=2.0, help="guidance of the decoder, off at 1")
    add("--resamples", type=some, default=4, help="times that each step is done")
    args = parser.parse_args(argv)
    inputs = [getattr(args, picture) for picture in args.pictures]
    words = [args.command, *(Path(x).stem for x in inputs), *filter(None, [args.caption])]
    path = sheet_path(args.out, words, inputs + [getattr(args, "mask", "")])
    pipeline = Pipeline(args.weights, args.device, args.size, args.prior, clip=args.clip)
    size = reachable_size(pipeline, args.size)
    pictures, labels = args.function(pipeline, args)
    write_strip(pipeline, size, pictures, labels, args.seed, path, film=args.command == "blend")


if __name__ == "__main__":
    sys.exit(main())
