"""What the latent makes possible: variations, blends, text diffs, inpainting (paper sec. 3, 4).

    python sample.py vary picture.png          # this file's functions are sample.py's subcommands

A picture x has a *bipartite latent* (image_emb, x_T):

    image_emb   from CLIP: what the picture shows, as far as CLIP sees it (its semantics)
    x_T         from DDIM inversion: everything else, the place and the angle and the shade

The one idea of this file: DDIM with eta = 0 turns that pair back into x, and manipulations change
the pair. Other noise and the same embedding: a variation. Another embedding and the same noise: an
edit. Points between two pairs: a blend. An embedding that has lost some of its components: a look
at what CLIP knows. (Inpainting is none of these: it keeps pixels.)

But for inpainting, the decoder draws from the embedding alone here, without a caption and without
guidance: inversion follows the decoder's own path backwards, and guidance would bend it.

Letters: B pictures, D CLIP embedding, H, W sides of the decoder's pictures.
Read next: evaluate.py, which measures what these do.
"""

import math

import torch
import torch.nn.functional as F

from support.tools import UserError, autocast

INVERSION_STEPS = 50  # there and back; each step up looks at the network four times
INVERSIONS, REPRODUCED = 4, 30.0  # tries at a picture, until it comes back with so many dB


def slerp(a, b, theta):
    """The point at a share theta of the way from a (0) to b (1) along the great circle (B, ...).

        (sin((1 - theta) omega) a + sin(theta omega) b) / sin(omega),  omega the angle between them

    Embeddings lie on a sphere and noise very nearly does (|x_T| = sqrt(dimensions)); a straight
    line between two points would leave it: the middle of two noises is not noise, it is too small.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    omega = torch.acos(F.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1))[:, None]
    near = omega.sin() < 1e-4  # one direction: the line is the arc, and sin(omega) divides by 0
    safe = torch.where(near, torch.ones_like(omega), omega)
    left = torch.where(near, 1 - theta, ((1 - theta) * safe).sin() / safe.sin())
    right = torch.where(near, theta, (theta * safe).sin() / safe.sin())
    return (left * flat_a + right * flat_b).to(a.dtype).view_as(a)


def psnr(a, b):
    """Peak signal-to-noise ratio of pictures (B, 3, H, W) in [-1, 1], dB: (B,)."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp(min=1e-10))


def invert(pipeline, pictures, image_emb, steps=INVERSION_STEPS):
    """The noise x_T (B, 3, H, W) from which redraw() returns `pictures`, given image_emb (B, D).

    Paper: DDIM inversion. We: from a little fresh noise on, each step corrected, and again from
    other fresh noise where redraw() misses the picture: of INVERSIONS, the best. Because: begun at
    the clean picture it leaves the picture's outlines in x_T, which an edit keeps; without
    corrections many a picture comes back with its objects elsewhere; even with them one does now
    and then: at the noisiest levels, where it is decided what goes where, rounding can change it.
    The fresh noises are always the same ones, so that a picture has one x_T, up to rounding.
    """
    decoder = pipeline.decoder
    # A picture of which no try is a number keeps its NaNs, for all to see.
    x_T = torch.full_like(pictures, math.nan)
    errors = pictures.new_full((len(pictures),), -math.inf)
    for attempt in range(INVERSIONS):
        left = (errors < REPRODUCED).nonzero().flatten()
        if len(left) == 0:
            break
        fresh = [torch.Generator().manual_seed(attempt) for _ in left]
        with autocast(pipeline.device):  # as in drawing: there and back by the same network
            found = decoder.diffusion.ddim_invert(
                decoder.network(image_emb[left], None, None), pictures[left], steps,
                start=decoder.diffusion.T // 50, corrections=3, generators=fresh,
            )
        again = redraw(pipeline, image_emb[left], found, [0] * len(left), steps)  # draws no noise
        error = psnr(pictures[left], again)
        better = error > errors[left]
        x_T[left[better]], errors[left[better]] = found[better], error[better]
    return x_T


def redraw(pipeline, image_emb, x_T, seeds, steps=INVERSION_STEPS, eta=0.0):
    """The picture (B, 3, H, W) of a latent. eta > 0 adds noise on the way: a variation."""
    settings = {"scale": 1.0, "steps": steps, "eta": eta, "x_T": x_T}
    return pipeline.decode(image_emb, None, seeds, **settings)


def blend(pipeline, ends, embs, seed, frames, noise="slerp", steps=INVERSION_STEPS):
    """Pictures (frames, 3, H, W) from one to the other (paper sec. 3.2, fig. 4).

    ends: two pictures (2, 3, H, W), embs: their embeddings (2, D). noise: "slerp" goes from one
    inverted x_T to the other, so both ends are reproduced; "fixed" keeps one random x_T: the ends
    are variations, but only the semantics changes from frame to frame.
    """
    if noise == "slerp":
        x_T = invert(pipeline, ends, embs, steps)
    else:
        x_T = torch.randn(ends[:1].shape, generator=torch.Generator().manual_seed(seed))
        x_T = x_T.to(ends).repeat(2, 1, 1, 1)
    pictures = []
    for k in range(frames):
        theta = k / max(1, frames - 1)
        image_emb = slerp(embs[:1], embs[1:], theta)
        noise_k = slerp(x_T[:1], x_T[1:], theta)
        pictures.append(redraw(pipeline, image_emb, noise_k, [seed], steps))
    return torch.cat(pictures)


def text_diff(pipeline, caption, baseline=None):
    """The direction from one caption to another, z_d = norm(z_t - z_t0): (1, D) (paper sec. 3.3).

    baseline: a caption of the picture as it is; None for the empty caption.
    """
    text_emb = pipeline.text([caption])[0]
    if baseline is None:  # start and end of text with nothing between
        ids = pipeline.clip.tokenizer([caption])
        empty = torch.zeros_like(ids)
        empty[:, 0], empty[:, 1] = ids[:, 0], ids.max()
        start = pipeline.clip.encode_ids(empty.to(text_emb.device))[0]
    else:
        start = pipeline.text([baseline])[0]
    difference = text_emb - start
    if difference.norm() < 1e-6:
        raise UserError("--from and --to say the same to CLIP: there is no direction to turn to")
    return F.normalize(difference, dim=-1)


def edit(pipeline, picture, image_emb, direction, thetas, seed, steps=INVERSION_STEPS):
    """Turn a picture's embedding towards a text diff, x_T kept: (len(thetas), 3, H, W).

    picture (1, 3, H, W), image_emb and direction (1, D). thetas: shares of the way from the
    embedding to the direction; 0 reconstructs (paper: up to 0.25 .. 0.5).
    """
    x_T = invert(pipeline, picture, image_emb, steps)
    return torch.cat([
        redraw(pipeline, slerp(image_emb, direction, theta), x_T, [seed], steps) for theta in thetas
    ])


def probe(pipeline, image_emb, pca, counts, seed):
    """Pictures of an embedding rebuilt from its first principal components (paper sec. 4, fig. 7).

    pca: an AutoregressivePrior, which has measured them. counts: how many components, a list.
    The noise is the same for all. Returns (len(counts), 3, H, W).
    """
    centred = image_emb - pca.mean
    rebuilt = [
        F.normalize(pca.reconstruct(centred @ pca.basis[:count].T), dim=-1) for count in counts
    ]
    settings = {"scale": 1.0, "eta": 0.0}
    return torch.cat([pipeline.decode(emb, None, [seed], **settings) for emb in rebuilt])


def inpaint(pipeline, picture, mask, image_emb, text, seed, scale=2.0, steps=None, resamples=4):
    """Redraw the masked part of a picture so that the whole fits a caption (GLIDE sec. 4.3).

    picture (1, 3, H, W); mask (1, 1, H, W), 1 where to draw anew; image_emb (1, D) or None and
    text: what the whole picture should show. Outside the mask the picture comes back unchanged.
    Paper: GLIDE trains a network for this. We: any trained decoder. Because: the known part can be
    noised to each level and put in place of what was drawn there (RePaint, 2201.09865).
    """
    decoder, generator = pipeline.decoder, [torch.Generator().manual_seed(seed)]
    steps = steps or decoder.config.sample_steps
    with autocast(pipeline.device):
        network = decoder.network(image_emb, *text[1:], scale=scale)
        return decoder.diffusion.inpaint(network, picture, mask, steps, resamples, generator)


def probe_counts(dim):
    """Numbers of components to probe with: 1, 2, 4, ... and all of them."""
    return [2**k for k in range(int(math.log2(dim - 1)) + 1)] + [dim]
