"""The paper's findings, one by one, on the toy world: `python -m lab.evaluate findings`.

For each: the question, what is compared, a table with 95% intervals, a picture, the paper's own
figure, and a verdict. The one idea: the verdict is computed, never written by hand. A finding is a
list of differences that should be above zero, and

    reproduced                       every interval lies above zero
    not reproduced                   one lies below zero
    can't be decided at this scale   else: more scenes (-n) or better weights would tell
    not measured here                nothing was compared: its note says what is missing

A finding's docstring is its text in FINDINGS.md: the question, the setup, the paper's figure.
Here are F1 to F7, on the prior, the decoder and guidance; F8 to F10 are in probing.py.

Letters: n scenes, D CLIP embedding.
Read next: probing.py.
"""

import os
import tempfile
import time
from datetime import date
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lab.judge import judge
from lab.measures import bootstrap, entropy, in_batches, mixed_captions, precision_recall
from lab.plots import chart
from lab.probing import f10, f8, f9
from lab.scenes import Lab, Result, farther, frechet_interval, number, points, right, share, sheet
from prior import DiffusionPrior, PriorConfig, embedding_scale
from sample import generators
from support.cache import embed
from support.muon import ADAM
from support.shapes import (
    BACKGROUNDS, COLOURS, SHAPES, SIZES, Shapes, TRAIN_PAIRS, Thing, parse_caption, with_article,
)
from support.sheets import save_picture
from support.tools import UserError, autocast

# --- F1 to F3: what the prior is good for ----------------------------------------------------


def f1(lab):
    """Does the prior matter?

    The same captions through unCLIP, through a decoder that was trained on text embeddings, and
    through unCLIP's decoder with the text embedding put in as if it were an image embedding.
    paper: FID 7.99 with the prior, 9.16 trained on text embeddings, 16.55 text embedding put in
    """
    ways = {"prior": {}, "text embedding put in": {"given": "text_emb"}}
    if lab.has("decoder_text_emb"):
        ways["trained on text embeddings"] = {"given": "text_emb", "decoder": "decoder_text_emb"}
    result = Result(["system", "guidance", "binding right", "Frechet distance (CLIP) x 1000"])
    true, kept = lab.true_emb(lab.data).cpu(), {}
    for scale in (1.0, 2.0):
        for name, way in ways.items():
            pictures = lab.draw(lab.captions, scale=scale, **way)
            kept[name, scale] = lab.clip_emb(pictures), right(pictures, lab.captions), pictures
            emb, bound, _ = kept[name, scale]
            result.table.append([name, f"{scale:g}", share(bound),
                                 number(frechet_interval(emb, true), 1)])
    for name in list(ways)[1:]:
        result.claims.append((f"Frechet distance x 1000: {name}, less that of the prior",
                              farther(kept[name, 2.0][0], kept["prior", 2.0][0], true)))
    if lab.has("decoder_text_emb"):
        result.note, result.lacks = lab.unequal("decoder_text_emb")
    else:
        result.note = "The decoder trained on text embeddings is not here (train.py decoder " \
                      "--condition text_emb): its row is missing."
        result.lacks = "without the decoder trained on text embeddings"
    result.picture = sheet([kept[name, 2.0][2] for name in ways], list(ways), lab.captions)
    return result


def f2(lab):
    """What does one decoder draw from the caption, from the embedding, from both?

    unCLIP's decoder with the prior's embedding and the caption, with either alone, guidance 2.
    paper: fig. 8: the caption alone is worst; dropping the caption costs little
    """
    ways = {"both": {}, "embedding alone": {"say": False}, "caption alone": {"given": "caption"}}
    drawn = {name: lab.draw(lab.captions, **way) for name, way in ways.items()}
    bound = {name: right(p, lab.captions) for name, p in drawn.items()}
    emb, true = {name: lab.clip_emb(p) for name, p in drawn.items()}, lab.true_emb(lab.data).cpu()
    result = Result(["given", "binding right", "Frechet distance (CLIP) x 1000"])
    for name in ways:
        result.table.append([name, share(bound[name]),
                             number(frechet_interval(emb[name], true), 1)])
    alone, caption = bound["embedding alone"], bound["caption alone"]

    def cost(both, alone, caption):
        return np.nanmean(both - caption) - 2 * np.nanmean(both - alone)

    result.claims = [
        ("binding, points: the embedding alone, less the caption alone",
         points(bootstrap(lambda e, c: np.nanmean(e - c), alone, caption))),
        ("binding, points: what dropping the embedding costs, less twice what the caption's costs",
         points(bootstrap(cost, bound["both"], alone, caption))),
    ]
    result.note = "In training 45% of the examples had both, 45% the embedding, 5% the caption."
    result.picture = sheet(list(drawn.values()), list(ways), lab.captions)
    return result


def f3(lab):
    """Is the diffusion prior better than the autoregressive one?

    Both priors' embeddings for the same captions against the true ones, and pictures from both.
    paper: FID 10.39 (diffusion) against 10.63 (autoregressive), with less training compute
    """
    if not lab.has("ar_prior"):
        return Result(["prior"], note="There is no autoregressive prior: python train.py ar_prior")
    data = Shapes(4 * lab.n, "val", lab.seed + 1)
    captions, true = mixed_captions(data), lab.true_emb(data).cpu()
    result = Result(["prior", "parameters", "captions seen", "evaluations", "ms an embedding",
                     "cosine with the true one", "Frechet x 1000", "binding right"])
    kept = {}
    for name in ("prior", "ar_prior"):
        pipeline, drawn = lab.pipeline(prior=name), []
        pipeline.embed(pipeline.text(captions[:1]), [0])  # the first call pays for starting
        begun = time.perf_counter()
        for part in in_batches(len(data), 64):  # from the caption on: CLIP's share is in both
            seeds = range(lab.seed + part.start, lab.seed + part.stop)
            drawn.append(pipeline.embed(pipeline.text(captions[part]), seeds))
        emb = torch.cat(drawn).cpu()
        ms = 1000 * (time.perf_counter() - begun) / len(data)
        bound = right(lab.draw(lab.captions, prior=name), lab.captions)
        model = pipeline.prior
        steps = 2 * model.config.sample_steps if name == "prior" else model.config.components
        seen = lab.examples(name)
        kept[name] = emb, bound
        result.table.append([
            name, f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M", f"{seen:,}",
            str(steps), f"{ms:.1f}", number(bootstrap(np.mean, (emb * true).sum(1)), 3),
            number(frechet_interval(emb, true), 1), share(bound)])
    result.claims = [("Frechet distance x 1000: the autoregressive prior, less the diffusion prior",
                      farther(kept["ar_prior"][0], kept["prior"][0], true))]
    copies = lab.pipeline().prior.config.copies
    result.note = f"In training the diffusion prior sees {copies} noised copies of each embedding."
    names = ["diffusion prior", "autoregressive prior"]
    drawn = [lab.draw(lab.captions, prior=name) for name in kept]
    result.picture = sheet(drawn, names, lab.captions)
    return result


# --- F4 and F5: guidance, fidelity and diversity ---------------------------------------------

GUIDANCE = (1.0, 1.25, 2.0, 3.0, 4.0, 6.0)
# Captions that leave colour, or shape, and always size, background, place and shade open. Few, so
# that each is drawn often enough to see how different its pictures are.
OPEN = [with_article(words) for words in (*SHAPES[:3], *(f"{c} shape" for c in list(COLOURS)[:3]))]
PARTS = (tuple(COLOURS), SHAPES, tuple(SIZES), tuple(BACKGROUNDS))


def attributes(pictures):
    """What the judge sees in pictures of one object: (n, 4) numbers of colour, shape, size and
    background in PARTS; -1 where there is not just one object, or no name fits."""
    rows = []
    for seen in map(judge, pictures):
        thing = seen.things[0] if len(seen.things) == 1 else Thing()
        values = thing.colour, thing.shape, thing.size, seen.background  # as in PARTS
        rows.append([part.index(v) if v in part else -1
                     for part, v in zip(PARTS, values, strict=True)])
    return np.array(rows)


@lru_cache
def open_parts(caption):
    """Which columns of attributes() a caption of one object leaves open."""
    thing = parse_caption(caption).things[0]
    said = thing.colour, thing.shape, thing.size, None  # OPEN captions have no background
    return [k for k, value in enumerate(said) if not value]


def open_entropies(rows, captions):
    """Entropy of each part that captions leave open, caption by caption: a list of numbers.

    rows (n, 4): attributes() of pictures of captions (n,). Within each caption, as a model that
    draws every circle red and every square blue has no diversity, and yet two colours.
    """
    return [entropy(rows[captions == caption, k])
            for caption in sorted(set(captions)) for k in open_parts(caption)]


@lru_cache
def data_entropies(names):
    """The same of the true scenes that fit the captions `names`, a sorted tuple: each open value
    is as often as another."""
    rows = []
    for thing in (parse_caption(name).things[0] for name in names):
        fits = [(PARTS[0].index(colour), PARTS[1].index(shape)) for colour, shape in TRAIN_PAIRS
                if thing.colour in (None, colour) and thing.shape in (None, shape)]
        # 60 is divisible by as many pairs as fit (4, 5 or 6), and by 2 sizes and 3 backgrounds.
        rows += [(*fits[k % len(fits)], k % 2, k % 3) for k in range(60)]
    return open_entropies(np.array(rows), np.repeat(names, 60))


def diversity(rows, captions):
    """Mean entropy of the open parts, 1 being that of the data."""
    full = data_entropies(tuple(sorted(set(captions))))
    return float(np.mean(np.divide(open_entropies(rows, captions), full)))


def spread(emb, captions):
    """Mean distance of two pictures of one caption in CLIP's space: 1 less their cosine."""
    found = []
    for caption in set(captions):
        mine = emb[captions == caption]
        found += (1 - mine @ mine.T)[np.triu_indices(len(mine), 1)].tolist()
    return float(np.mean(found))


def slope(values):
    """Change of a figure with each doubling of guidance, over GUIDANCE: least squares."""
    return float(np.polyfit(np.log2(GUIDANCE), values, 1)[0])


def sweep(lab, scales):
    """{system: {scale: pictures}} for OPEN captions, and the captions (n // 2,)."""
    captions = np.array([OPEN[k % len(OPEN)] for k in range(max(2 * len(OPEN), lab.n // 2))])
    rival = lab.glide()
    drawn = {name: {scale: lab.draw(list(captions), scale=scale, **settings) for scale in scales}
             for name, settings in (("unCLIP", {}), (rival.name, rival.settings))}
    return drawn, captions


def f4(lab):
    """Does guidance cost GLIDE more diversity than unCLIP?

    Captions that leave most open, decoder guidance 1 to 6, the prior's guidance off. Diversity is
    the entropy of what the judge sees of the open parts, within each caption, over that of the true
    scenes: 1 is as diverse as the data. Fidelity: the share of pictures that show all that the
    caption says. Distance: between two pictures of one caption, 1 less their cosine. Loss: how
    much of the figure goes with each doubling of guidance, over all six.
    paper: figs. 9 to 11: unCLIP's diversity survives guidance, since the embedding holds it
    """
    drawn, captions = sweep(lab, GUIDANCE)
    rival = lab.glide()
    result = Result(["system", "guidance", "fidelity", "diversity", "distance in CLIP's space"],
                    note=rival.note, lacks=rival.lacks)
    curves = {name: [] for name in drawn}
    rows, embs = {name: [] for name in drawn}, {name: [] for name in drawn}
    for name, by_scale in drawn.items():
        for scale, pictures in by_scale.items():
            fit = right(pictures, list(captions), "all")
            rows[name].append(attributes(pictures))
            embs[name].append(lab.clip_emb(pictures).numpy())
            varied = bootstrap(diversity, rows[name][-1], captions, biased=True)
            apart = bootstrap(spread, embs[name][-1], captions, biased=True)
            result.table.append([name, f"{scale:g}", share(fit), number(varied), number(apart, 3)])
            curves[name].append((varied[0], fit.mean()))

    def loss_difference(figure):
        def difference(captions, *six_and_six):
            values = [figure(x, captions) for x in six_and_six]
            return slope(values[:6]) - slope(values[6:])  # a loss is a negative slope
        return difference

    result.claims = [
        (f"{what}: what {rival.name} loses with each doubling of guidance, less unCLIP's loss",
         bootstrap(loss_difference(figure), captions, *x["unCLIP"], *x[rival.name], biased=True))
        for what, figure, x in (("diversity", diversity, rows), ("distance", spread, embs))]
    result.picture = chart(curves, "guidance 1 to 6: fidelity against diversity", "diversity",
                           "fidelity", points=True, ends=("1", "6"))
    return result


def f5(lab):
    """Is unCLIP more diverse than GLIDE, and about as faithful?

    Both at guidance 2: entropy of what captions leave open for diversity, binding for caption
    similarity (about as good: at most 5 points worse), precision in CLIP's space for realism.
    paper: preferred over GLIDE in 48.9% (realism), 45.3% (caption), 70.5% (diversity)
    """
    drawn, open_captions = sweep(lab, (2.0,))
    rival, true = lab.glide(), lab.true_emb(lab.data).cpu()
    result = Result(["system", "realism (precision)", "binding right", "diversity"],
                    note=rival.note, lacks=rival.lacks)
    kept = {}
    for name, settings in (("unCLIP", {}), (rival.name, rival.settings)):
        pictures = lab.draw(lab.captions, **settings)
        bound, rows = right(pictures, lab.captions), attributes(drawn[name][2.0])
        precision = precision_recall(lab.clip_emb(pictures), true)[0]
        kept[name] = bound, rows, pictures
        varied = number(bootstrap(diversity, rows, open_captions, biased=True))
        result.table.append([name, f"{precision:.1%}", share(bound), varied])

    def more(u, g, captions):
        return diversity(u, captions) - diversity(g, captions)

    (bound, rows, _), (rival_bound, rival_rows, _) = kept.values()
    result.claims = [
        (f"diversity: unCLIP's, less {rival.name}'s",
         bootstrap(more, rows, rival_rows, open_captions, biased=True)),
        (f"binding, points: unCLIP's, less {rival.name}'s, and 5 more",
         points(bootstrap(lambda u, g: np.nanmean(u - g) + 0.05, bound, rival_bound))),
    ]
    result.picture = sheet([pictures for _, _, pictures in kept.values()], list(kept), lab.captions)
    return result


def f6(lab):
    """What is the zero-shot FID on COCO?

    Not measurable on shapes: it takes COCO, weights trained on photos and Inception's features.
    paper: FID 27.5 DALL-E, 12.24 GLIDE, 11.84 Make-A-Scene, 10.39 unCLIP
    """
    return Result(["step", "command"], [
        ["draw", "python -m lab.evaluate export --data coco --root COCO --weights RUN -n 30000 "
                 "--size 256 --candidates 1 --prior-scale 1 --scale 1.25 --out fid"],
        ["measure", "fidelity --gpu 0 --fid --isc --input1 fid/samples --input2 fid/references"],
    ], note="The protocol: 30,000 validation captions, one picture each, not chosen by CLIP, at "
            "256 pixels; guidance 1.25 as in the paper (of the prior, not stated there: none).")


# --- F7: what the prior predicts -------------------------------------------------------------


def short_prior(lab, predict, embeddings, steps):
    """A small prior trained for `steps` batches of 64, from scratch, with the lab's seed."""
    clip = lab.pipeline().clip
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
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        optimizer.step()
    return prior.eval()


LEVELS = (250, 500, 750)


@torch.no_grad()
def guesses(prior, image_emb, text, seed):
    """One look at noised embeddings at each of LEVELS: cosine of the predicted one with the true
    image_emb (n, D), of text as clip.encode_text returns it -> {level: (n,)}."""
    diffusion, x_0 = prior.diffusion, image_emb * embedding_scale(image_emb.shape[1])
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed)).to(x_0)
    found = {}
    for level in LEVELS:
        t = torch.full((len(x_0),), level, device=x_0.device)
        x_t = diffusion.q_sample(x_0, t, noise)
        pred_x_0, _ = diffusion.predictions(prior(x_t, t, *text), x_t, t)
        found[level] = F.cosine_similarity(pred_x_0, x_0).cpu()
    return found


def f7(lab, scenes=3000, steps=300):
    """Should the prior predict the embedding or its noise?

    Two small priors trained here and now on the same batches, the same but for what they predict.
    t = ...: one look at true embeddings with that much noise, and the cosine of the predicted
    embedding with the true one. Drawn: the same of whole samplings, 64 steps from pure noise.
    paper: sec. 2.2: predicting the embedding itself was better
    """
    clip = lab.pipeline().clip
    data = Shapes(2 * lab.n, "val", lab.seed)
    true, text = lab.true_emb(data), clip.encode_text(mixed_captions(data))
    result = Result(["predicts", *(f"t = {t}" for t in LEVELS), "drawn", "Frechet x 1000"], note=(
        "A likely reason: embeddings lie near few directions, noise fills all D of them, and to "
        "predict it the network must carry the whole of x_t through. The last two columns "
        "exaggerate that, and are no part of the verdict: at the noisiest level x_0 is what the "
        "predicted noise leaves of x_t, divided by sqrt(alpha_bar) = "
        f"{lab.pipeline().prior.diffusion.alphas_cumprod[-1] ** 0.5:.0e}, and the prior's sampler, "
        "unlike that of pictures, clips nothing: the first step throws such a prior far away."))
    looks = {}
    with tempfile.TemporaryDirectory() as folder:
        embeddings = embed(clip, Shapes(scenes, "train", lab.seed), folder)
        for predict in ("x_0", "noise"):
            prior = short_prior(lab, predict, embeddings, steps)
            seeds = generators(range(lab.seed, lab.seed + len(data)), "prior")
            with autocast(lab.device):
                looks[predict] = guesses(prior, true, text, lab.seed)
                emb = prior.sample(*text, generators=seeds, candidates=1)
            cosines = [*looks[predict].values(), (emb * true).sum(1).cpu()]
            result.table.append([predict, *(number(bootstrap(np.mean, c), 3) for c in cosines),
                                 number(frechet_interval(emb, true), 1)])
    result.claims = [
        ("cosine after one look, mean of the three levels: predicting x_0, less predicting noise",
         bootstrap(lambda *c: np.mean(c[:3]) - np.mean(c[3:]), *looks["x_0"].values(),
                   *looks["noise"].values()))]
    curves = {name: [(t, float(c.mean())) for t, c in found.items()]
              for name, found in looks.items()}
    result.picture = chart(curves, "one look at a noised embedding", "noise level t",
                           "cosine with the true embedding", points=True)
    return result


# --- the report ------------------------------------------------------------------------------

FINDINGS = {f"F{k}": f for k, f in enumerate((f1, f2, f3, f4, f5, f6, f7, f8, f9, f10), 1)}


def explained(finding):
    """A finding's docstring -> (question, setup, the paper's figure)."""
    question, rest = finding.__doc__.strip().split("\n", 1)
    setup, paper = rest.split("paper:")
    return question, " ".join(setup.split()), " ".join(paper.split())


def said(result):
    """The verdict, and what it had to do without."""
    return ", ".join(filter(None, (result.verdict, result.lacks)))


def as_markdown(name, result, picture):
    """A finding's section of the report; picture: its path from there, or None."""
    question, setup, paper = explained(FINDINGS[name])
    line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    parts = [f"## {name}: {question}", setup, f"Paper: {paper}.", f"**{said(result)}**"]
    parts += [f"- {claim}: {number(interval, 1 if max(map(abs, interval)) >= 1 else 3)}"
              for claim, interval in result.claims]
    parts.append("\n".join([line(result.header), line(["---"] * len(result.header)),
                            *map(line, result.table)]))
    parts += [result.note.strip()] if result.note.strip() else []
    parts += [f"![{name}]({picture})"] if picture else []
    return "\n\n".join(parts) + "\n"


def report(args):
    """evaluate.py findings: each finding asked for, printed as it is found, and a report in OUT:
    FINDINGS.md of all ten, of some a file with their names, such as F4_F5.md."""
    unknown = [name for name in args.names if name.upper() not in FINDINGS]
    if unknown:
        raise UserError(f"unknown finding '{unknown[0]}': use {', '.join(FINDINGS)}")
    if args.n < 8:
        raise UserError(f"-n {args.n}: findings need at least 8 scenes")
    names = [name.upper() for name in args.names] or list(FINDINGS)
    lab, out, sections, table = Lab(args), Path(args.out), [], {}
    for name in tqdm(names, "findings", disable=None):
        begun = time.perf_counter()
        result = FINDINGS[name](lab)
        picture = None
        if result.picture is not None:
            picture = f"pictures/finding_{name}.png"
            save_picture(result.picture, out / picture)
        section = as_markdown(name, result, picture)
        section += f"\nTook {time.perf_counter() - begun:.0f} s.\n"
        print(section, flush=True)
        sections.append(section)
        table[name] = {"verdict": said(result), "header": result.header, "table": result.table,
                       "claims": [[c, *map(float, i)] for c, i in result.claims]}
        # At once, so that an interrupted run keeps what it has; under another name until it is
        # whole, so that it does not take the place of an earlier report.
        write_report(out / "FINDINGS.part.md", lab, sections, table)
    path = out / ("FINDINGS.md" if len(names) == len(FINDINGS) else f"{'_'.join(names)}.md")
    os.replace(out / "FINDINGS.part.md", path)
    print(path)
    return table


def write_report(path, lab, sections, table):
    """How it was made, all verdicts, then a section a finding, to `path`."""
    here = Path(__file__).parent.parent
    inside = lab.folder.resolve().is_relative_to(here)
    weights = lab.folder.resolve().relative_to(here) if inside else lab.folder.name
    head = ("# The paper's findings, measured here\n\nWritten by `python -m lab.evaluate findings` on "
            f"{date.today()}: weights {weights}, n = {lab.n}, seed {lab.seed}.\n\n"
            "- **Verdicts.** Each finding claims that some differences are above zero (its list). "
            "It is reproduced if all their intervals lie above zero, not reproduced if one lies "
            "below, else it can't be decided.\n"
            "- **In brackets**: 95% intervals, Wilson's for shares, else the bootstrap's. They "
            "say how a figure would move with other scenes, not with another training.\n"
            "- **Settings.** The prior is not guided and every picture is the decoder's first "
            "(sample.py guides the prior, and keeps the better of two pictures).\n"
            "- **Few scenes** make an entropy too small and a (squared) Frechet distance too "
            "large. Both are corrected for that, but compare no distances of different n.\n\n"
            "| finding | question | verdict |\n| --- | --- | --- |\n")
    head += "".join(f"| {name} | {explained(FINDINGS[name])[0]} | {table[name]['verdict']} |\n"
                    for name in table)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + "\n" + "\n".join(sections))
