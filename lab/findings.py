"""The paper's findings, one by one, on the toy world: `python -m lab.evaluate findings`.

A finding is a question, a table with 95% intervals, a picture, and a verdict that is computed,
never written by hand (Result.verdict): some differences are claimed to be above zero, and their
intervals decide. A finding's docstring is its text in FINDINGS.md: the question, the setup, the
paper's figure. F1 to F7, on the prior, the decoder and guidance, are here, F8 to F10 in probing.py.

n: number of scenes; D: size of a CLIP embedding.
"""

import os
import tempfile
import time
from datetime import date
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lab.judge import judge
from lab.measures import bootstrap, entropy, mixed_captions, precision_recall, scenes_of
from lab.plots import chart
from lab.probing import f8, f9, f10
from lab.scenes import Lab, Result, farther, frechet_cell, number, right, share, sheet
from prior import DiffusionPrior, PriorConfig, embedding_scale
from sample import noise_for
from support.cache import embed
from support.muon import ADAM
from support.shapes import (
    BACKGROUNDS, COLOURS, SHAPES, SIZES, TRAIN_PAIRS, Shapes, Thing, parse_caption, with_article,
)
from support.sheets import save_picture
from support.tools import UserError, autocast


def draw_ways(lab, ways, **settings):
    """Draw the lab's captions in several ways, {name: settings of Lab.draw}: {name: (binding right
    (n,), CLIP's embeddings (n, D))}, and a sheet of the pictures."""
    drawn = {name: lab.draw(lab.captions, **settings, **way) for name, way in ways.items()}
    found = {name: (right(p, lab.captions), lab.clip_emb(p)) for name, p in drawn.items()}
    return found, sheet(drawn, lab.captions)


def f1(lab):
    """Does the prior matter?

    The same captions through unCLIP, through a decoder trained on text embeddings, and through
    unCLIP's decoder given the text embedding as if it were an image embedding.
    paper: FID 7.99 with the prior, 9.16 trained on text embeddings, 16.55 text embedding put in"""
    ways = {"prior": {}, "text embedding put in": {"given": "text_emb"}}
    result = Result(["system", "guidance", "binding right", "Frechet distance (CLIP) x 1000"],
                    **lab.caveat("decoder_text_emb"))
    if lab.has("decoder_text_emb"):
        ways["trained on text embeddings"] = {"given": "text_emb", "decoder": "decoder_text_emb"}
    true = lab.true_emb(lab.scenes)
    for scale in (1.0, 2.0):
        drawn, result.picture = draw_ways(lab, ways, scale=scale)
        result.table += [[name, f"{scale:g}", share(bound), frechet_cell(emb, true)]
                         for name, (bound, emb) in drawn.items()]
    for name in list(ways)[1:]:
        result.claim(f"Frechet distance x 1000: {name} minus prior", farther,
                     drawn[name][1], drawn["prior"][1], true, biased=True)
    return result


def f2(lab):
    """What does one decoder draw from the caption, from the embedding, from both?

    unCLIP's decoder at guidance 2, given the prior's embedding and the caption, or only one of
    them.
    paper: fig. 8: the caption alone is worst; sec. 2.1: the text pathway "offers little help"
    """
    result = Result(["given", "binding right", "Frechet distance (CLIP) x 1000"])
    result.note = ("In training, 45% of the examples had both, 45% the embedding alone, 5% the "
                   "caption alone.")
    drawn, result.picture = draw_ways(lab, {"both": {}, "embedding alone": {"say": False},
                                            "caption alone": {"given": "caption"}})
    true = lab.true_emb(lab.scenes)
    result.table = [[name, share(bound), frechet_cell(emb, true)]
                    for name, (bound, emb) in drawn.items()]
    both, alone, caption = (bound for bound, _ in drawn.values())
    result.claim("binding, points: embedding alone minus caption alone",
                 lambda e, c: np.nanmean(e - c), alone, caption, unit=100)
    result.claim("binding, points: what dropping the embedding costs, minus twice what dropping "
                 "the caption costs", lambda b, e, c: np.nanmean(b - c) - 2 * np.nanmean(b - e),
                 both, alone, caption, unit=100)
    return result


def f3(lab):
    """Is the diffusion prior better than the autoregressive one?

    Embeddings from both priors for the same captions, against the true ones, and pictures drawn
    from them.
    paper: FID 10.39 (diffusion) against 10.63 (autoregressive), with less training compute"""
    if not lab.has("ar_prior"):
        return Result(["prior"], **lab.caveat("ar_prior"))
    data = Shapes(4 * lab.n, "val", lab.seed + 1)
    captions, true, embs = mixed_captions(data), lab.true_emb(scenes_of(data)), {}
    result = Result(["prior", "parameters", "captions seen", "evaluations", "ms an embedding",
                     "cosine with the true one", "Frechet x 1000", "binding right"])
    drawn, result.picture = draw_ways(lab, {"prior": {}, "ar_prior": {"prior": "ar_prior"}})
    for name, (bound, _) in drawn.items():
        model = lab.pipeline(prior=name).prior
        config, parameters = model.config, sum(p.numel() for p in model.parameters())
        lab.prior_emb(captions[:1], name)  # the first call pays for starting up
        begun = time.perf_counter()
        embs[name] = lab.prior_emb(captions, name)
        ms = 1000 * (time.perf_counter() - begun) / len(data)  # with CLIP's share, in both rows
        steps = 2 * config.sample_steps if name == "prior" else config.components
        result.table.append([
            name, f"{parameters / 1e6:.2f}M", f"{lab.examples(name):,}", str(steps), f"{ms:.1f}",
            number(bootstrap(np.mean, (embs[name] * true).sum(1)), 3),
            frechet_cell(embs[name], true), share(bound)])
    result.claim("Frechet distance x 1000: autoregressive prior minus diffusion prior", farther,
                 embs["ar_prior"], embs["prior"], true, biased=True)
    result.note = (f"In training, the diffusion prior sees {lab.pipeline().prior.config.copies} "
                   "noised copies of each embedding.")
    return result


GUIDANCE = (1.0, 1.25, 2.0, 3.0, 4.0, 6.0)
# Captions that leave colour or shape open, and always size, background, place and shade. There are
# only six, so that each is drawn often enough to see how its pictures differ.
OPEN = [with_article(words) for words in (*SHAPES[:3], *(f"{c} shape" for c in list(COLOURS)[:3]))]


def attributes(pictures):
    """What the judge sees in pictures of one object: (n, 4) names of colour, shape, size and
    background, None where there is not exactly one object or no name fits."""
    rows = []
    for seen in map(judge, pictures):
        thing = seen.things[0] if len(seen.things) == 1 else Thing()
        shape = thing.shape if thing.shape in SHAPES else None  # a sign is none of them
        rows.append([thing.colour, shape, thing.size, seen.background])
    return np.array(rows, object)


@cache
def open_parts(caption):
    """The columns of attributes() that a caption of one object leaves open: {column: number of
    values that the true scenes have there, each as frequent as any other}."""
    thing = parse_caption(caption).things[0]
    fits = [pair for pair in TRAIN_PAIRS if thing.colour in (None, pair[0])
            and thing.shape in (None, pair[1])]
    counts = [*(len(set(part)) for part in zip(*fits)), len(SIZES), len(BACKGROUNDS)]
    return {k: count for k, count in enumerate(counts) if count > 1}


def diversity(rows, captions):
    """Mean entropy of the parts that captions leave open, caption by caption; 1 is the data's.

    rows (n, 4): attributes() of pictures of captions (n,). Within captions, because a model that
    draws every circle red and every square blue has no diversity, and yet two colours."""
    return float(np.mean([entropy(rows[captions == caption, k]) / np.log(count)
                          for caption in sorted(set(captions))
                          for k, count in open_parts(caption).items()]))


def spread(emb, captions):
    """Mean distance (1 minus cosine) of two pictures of one caption in CLIP's space."""
    groups = [emb[captions == caption] for caption in set(captions)]
    return float(np.mean(np.concatenate([(1 - mine @ mine.T)[np.triu_indices(len(mine), 1)]
                                         for mine in groups])))


def open_captions(n):
    return [OPEN[k % len(OPEN)] for k in range(max(12, n // 2))]


def f4(lab):
    """Does guidance cost GLIDE more diversity than unCLIP?

    Captions that leave most open, the decoder's guidance from 1 to 6, the prior's off. Diversity:
    the entropy of what the judge sees of the open parts, within each caption, divided by that of
    the true scenes; 1 is as diverse as the data. Fidelity: the share of pictures that show
    everything the caption says. Distance: 1 minus the cosine of two pictures of one caption. Loss:
    how far a figure falls with each doubling of guidance, fitted to all six.
    paper: figs. 9 to 11: unCLIP's diversity survives guidance, since the embedding holds it"""
    captions, systems = open_captions(lab.n), lab.systems()
    result = Result(["system", "guidance", "fidelity", "diversity", "distance in CLIP's space"],
                    **lab.caveat("decoder_caption"))
    curves, rows, embs = ({name: [] for name in systems} for _ in range(3))
    for name, scale in product(systems, GUIDANCE):
        pictures = lab.draw(captions, scale=scale, **systems[name])
        fit = right(pictures, captions, "all")
        rows[name].append(attributes(pictures))
        embs[name].append(lab.clip_emb(pictures).numpy())
        varied = bootstrap(diversity, rows[name][-1], captions, biased=True)
        apart = bootstrap(spread, embs[name][-1], captions, biased=True)
        result.table.append([name, f"{scale:g}", share(fit), number(varied), number(apart, 3)])
        curves[name].append((varied[0], fit.mean()))
    for what, figure, x in (("diversity", diversity, rows), ("distance", spread, embs)):
        def difference(captions, *both, figure=figure):  # a loss is a negative slope
            ours, theirs = np.reshape([figure(x, captions) for x in both], (2, len(GUIDANCE)))
            return np.polyfit(np.log2(GUIDANCE), ours - theirs, 1)[0]

        result.claim(f"{what}: {lab.rival}'s loss with each doubling of guidance minus unCLIP's",
                     difference, captions, *x["unCLIP"], *x[lab.rival], biased=True)
    result.picture = chart(curves, "guidance 1 to 6: fidelity against diversity", "diversity",
                           "fidelity", points=True, ends=("1", "6"))
    return result


def f5(lab):
    """Is unCLIP more diverse than GLIDE, and about as faithful?

    Both at guidance 2. Diversity as in F4; binding stands for caption similarity ("about as
    faithful" allows 5 points less), precision in CLIP's space for realism.
    paper: preferred over GLIDE in 48.9% (realism), 45.3% (caption), 70.5% (diversity)"""
    true, captions, rival, rows = lab.true_emb(lab.scenes), open_captions(lab.n), lab.rival, {}
    result = Result(["system", "realism (precision)", "binding right", "diversity"],
                    **lab.caveat("decoder_caption"))
    drawn, result.picture = draw_ways(lab, lab.systems())
    for name, (bound, emb) in drawn.items():
        rows[name] = attributes(lab.draw(captions, **lab.systems()[name]))
        varied = number(bootstrap(diversity, rows[name], captions, biased=True))
        result.table.append([name, f"{precision_recall(emb, true)[0]:.1%}", share(bound), varied])
    result.claim(f"diversity: unCLIP minus {rival}",
                 lambda u, g, captions: diversity(u, captions) - diversity(g, captions),
                 rows["unCLIP"], rows[rival], captions, biased=True)
    result.claim(f"binding, points: unCLIP minus {rival}, plus 5",
                 lambda u, g: np.nanmean(u - g) + 0.05,
                 drawn["unCLIP"][0], drawn[rival][0], unit=100)
    return result


def f6(lab):
    """What is the zero-shot FID on COCO?

    Shapes cannot tell: it takes COCO, weights trained on photos, and Inception's features.
    paper: FID about 28 DALL-E, 12.24 GLIDE, 10.39 unCLIP; filtered FID 11.84 Make-A-Scene, 10.87
    unCLIP"""
    return Result(["step", "command"], [
        ["draw", "python -m lab.evaluate export --data coco --root COCO --weights RUN -n 30000 "
                 "--size 256 --candidates 1 --prior-scale 1 --scale 1.25 --out fid"],
        ["measure", "fidelity --gpu 0 --fid --isc --input1 fid/samples --input2 fid/references"],
    ], note="The protocol: 30,000 validation captions, one picture each, not chosen by CLIP, at "
            "256 pixels, with the decoder's guidance at 1.25 as in the paper. The paper does not "
            "state the prior's guidance; here it is off.")


def short_prior(lab, predict, embeddings, steps):
    """A small prior trained from scratch for `steps` batches of 64, with the lab's seed."""
    clip = lab.clip
    torch.manual_seed(lab.seed)
    prior = DiffusionPrior(PriorConfig(
        dim=clip.dim, text_width=clip.text_width, text_len=clip.text_len, width=128, depth=2,
        predict=predict, variance="fixed_small")).to(lab.device)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-3, **ADAM)
    for step in tqdm(range(steps), f"prior that predicts {predict}", disable=None):
        rng = np.random.default_rng([lab.seed, step])
        batch = embeddings.batch(rng.choice(len(embeddings), 64, replace=False), rng)
        with autocast(lab.device):
            loss = prior.loss({k: v.to(lab.device) for k, v in batch.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        optimizer.step()
    return prior.eval()


LEVELS = (250, 500, 750)


@torch.no_grad()
def guesses(prior, image_emb, text, seed):
    """One look at image_emb (n, D), noised to each of LEVELS: {level: cosine of the predicted with
    the true embedding (n,)}. text: as clip.encode_text returns it."""
    diffusion, x_0 = prior.diffusion, image_emb * embedding_scale(image_emb.shape[1])
    caption = prior.encode_caption(*text)
    noise, found = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed)).to(x_0), {}
    for level in LEVELS:
        t = torch.full((len(x_0),), level, device=x_0.device)
        x_t = diffusion.q_sample(x_0, t, noise)
        pred_x_0, _ = diffusion.predictions(prior(x_t, t, **caption), x_t, t)
        found[level] = F.cosine_similarity(pred_x_0, x_0).cpu()
    return found


def f7(lab, scenes=3000, steps=300):
    """Should the prior predict the embedding or its noise?

    Two small priors, trained here and now on the same batches, that differ only in what they
    predict. t = ...: one look at true embeddings with that much noise, and the cosine of the
    predicted embedding with the true one. Drawn: the cosine after sampling, 64 steps from pure
    noise.
    paper: sec. 2.2: predicting the embedding itself was better"""
    data = Shapes(2 * lab.n, "val", lab.seed)
    true, text = lab.true_emb(scenes_of(data)), lab.clip.encode_text(mixed_captions(data))
    last = lab.pipeline().prior.diffusion.alphas_cumprod[-1] ** 0.5
    result = Result(["predicts", *(f"t = {t}" for t in LEVELS), "drawn", "Frechet x 1000"], note=(
        "A likely reason: embeddings lie near few directions, noise fills all D of them, and to "
        "predict it the network must carry the whole of x_t through. The last two columns "
        "exaggerate that and play no part in the verdict: at the noisiest level, x_0 is what the "
        f"predicted noise leaves of x_t, divided by sqrt(alpha_bar) = {last:.0e}. Unlike the "
        "decoder's sampler, the prior's does not clip x_0, so the first step throws such a prior "
        "far away."))
    looks = {}
    with tempfile.TemporaryDirectory() as folder:
        embeddings = embed(lab.clip, Shapes(scenes, "train", lab.seed), folder)
        for predict in ("x_0", "noise"):
            prior = short_prior(lab, predict, embeddings, steps)
            noise = noise_for(range(lab.seed, lab.seed + len(data)), "prior")
            with autocast(lab.device):
                looks[predict] = guesses(prior, true.to(lab.device), text, lab.seed)
                emb = prior.sample(*text, noise=noise, candidates=1).cpu()
            cosines = [*looks[predict].values(), (emb * true).sum(1)]
            result.table.append([predict, *(number(bootstrap(np.mean, c), 3) for c in cosines),
                                 frechet_cell(emb, true)])
    result.claim("cosine after one look, mean of the three levels: predicting x_0 minus predicting "
                 "noise", lambda *c: np.mean(c[:3]) - np.mean(c[3:]),
                 *looks["x_0"].values(), *looks["noise"].values())
    curves = {name: [(t, c.mean().item()) for t, c in x.items()] for name, x in looks.items()}
    result.picture = chart(curves, "one look at a noised embedding", "noise level t",
                           "cosine with the true embedding", points=True)
    return result


FINDINGS = {f"F{k}": f for k, f in enumerate((f1, f2, f3, f4, f5, f6, f7, f8, f9, f10), 1)}
HEAD = """# The paper's findings, measured here

Written by `python -m lab.evaluate findings` on {date}: weights {weights}, n = {n}, seed {seed}.

- **Verdicts.** Each finding claims that some differences are above zero (its list). It is reproduced if all their intervals lie above zero, not reproduced if one lies below zero; otherwise it can't be decided.
- **In brackets**: 95% intervals, Wilson's for shares, the bootstrap's for the rest. They say how a figure would move with other scenes, not with another training.
- **Settings.** The prior is not guided, and every picture is the decoder's first (sample.py guides the prior and keeps the better of two pictures).
- **Few scenes** make an entropy too small and a (squared) Frechet distance too large. Both are corrected for that, but do not compare distances of different n.

"""  # noqa: E501


def explained(finding):
    """A finding's docstring -> (question, setup, the paper's figure)."""
    question, rest = finding.__doc__.split("\n\n", 1)
    return [" ".join(part.split()) for part in (question, *rest.split("paper:"))]


def as_table(*rows):
    lines = rows[0], ["---"] * len(rows[0]), *rows[1:]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_markdown(name, result, seconds):
    """A finding's section of the report."""
    question, setup, paper = explained(FINDINGS[name])
    parts = [f"## {name}: {question}", setup, f"Paper: {paper}.", f"**{result.verdict}**"]
    parts += [f"- {claim}: {number(interval, 1 if max(map(abs, interval)) >= 1 else 3)}"
              for claim, interval in result.claims]
    parts += [as_table(result.header, *result.table), result.note.strip(),
              f"![{name}](pictures/finding_{name}.png)" if result.picture else "",
              f"Took {seconds:.0f} s."]
    return "\n\n".join(filter(None, parts)) + "\n"


def report(args):
    """The paper's findings, one by one; writes FINDINGS.md (of some, for example F4_F5.md)."""
    names = [name.upper() for name in args.names] or list(FINDINGS)
    for name in set(names) - set(FINDINGS):
        raise UserError(f"unknown finding '{name}': use {', '.join(FINDINGS)}")
    if args.n < 8:
        raise UserError(f"-n {args.n}: findings need at least 8 scenes")
    lab, out, sections, found = Lab(args), Path(args.out), [], {}
    for name in tqdm(names, disable=None):
        begun = time.perf_counter()
        found[name] = FINDINGS[name](lab)
        if found[name].picture:
            save_picture(found[name].picture, out / f"pictures/finding_{name}.png")
        sections.append(as_markdown(name, found[name], time.perf_counter() - begun))
        print(sections[-1], flush=True)  # an interrupted run has said what it found
    verdicts = [[name, explained(FINDINGS[name])[0], x.verdict] for name, x in found.items()]
    head = HEAD.format(date=date.today(), weights=os.path.relpath(args.weights), **vars(lab))
    path = out / ("FINDINGS.md" if len(names) == len(FINDINGS) else f"{'_'.join(names)}.md")
    out.mkdir(parents=True, exist_ok=True)
    head += as_table(["finding", "question", "verdict"], *verdicts) + "\n"
    path.write_text("\n".join([head, *sections]))
    print(path)
    return {name: {"verdict": x.verdict, "header": x.header, "table": x.table,
                   "claims": [[claim, *map(float, interval)] for claim, interval in x.claims]}
            for name, x in found.items()}
