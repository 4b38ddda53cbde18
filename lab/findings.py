"""The paper's findings, one by one, on the toy world: `python -m lab.evaluate findings`.

A finding is a question, a table with 95% intervals, a picture, and a verdict that is computed,
never written by hand (measures.Result): some differences are claimed to be above zero, and their
intervals decide. A finding's docstring is its text in FINDINGS.md: the question, the setup, the
paper's figure. F8 to F10, which look into CLIP, are in probing.py; of F6 and F11 README.md tells.
"""

import os
import tempfile
import time
from datetime import date
from functools import cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lab.judge import judge, scores, the_thing
from lab.measures import (
    SPLIT, Lab, Result, bootstrap, entropy, frechet, frechet_cell, mixed_captions, number,
    precision_recall, scenes_of, share,
)
from lab.plots import chart
from lab.probing import f8, f9, f10
from prior import DiffusionPrior, PriorConfig, embedding_scale
from sample import noise_for
from stages import BASELINES
from support.cache import embed
from support.muon import ADAM
from support.shapes import (
    BACKGROUNDS, COLOURS, SHAPES, SIZES, TRAIN_PAIRS, Shapes, parse_caption, with_article,
)
from support.sheets import save_picture
from support.tools import UserError, autocast


def farther(a, b, true):
    """How much farther from the true embeddings a is than b."""
    return frechet(a, true) - frechet(b, true)


def f1(lab):
    """Does the prior matter?

    The same captions through unCLIP, through a decoder trained on text embeddings, and through
    unCLIP's decoder given the text embedding as if it were an image embedding.
    paper: FID 7.99 with the prior, 9.16 trained on text embeddings, 16.55 text embedding put in"""
    ways = {"prior": {}, "text embedding put in": {"given": "text_emb"}}
    if lab.has("decoder_text_emb"):
        ways["trained on text embeddings"] = {"given": "text_emb", "decoder": "decoder_text_emb"}
    result = Result(["system", "guidance", "binding right", "Frechet distance (CLIP) x 1000"],
                    **lab.caveat("decoder_text_emb"))
    for scale in (1.0, 2.0, 4.0):  # the paper compares after sweeps of guidance
        drawn = lab.draw_ways(result, ways, scale=scale)
        for name, (bound, emb) in drawn.items():
            result.row(name, f"{scale:g}", share(bound), frechet_cell(emb, lab.goal))
        if scale == 2:  # sample.py's
            for name in list(ways)[1:]:
                result.claim(f"Frechet distance x 1000 at guidance 2: {name} minus prior", farther,
                             drawn[name][1], drawn["prior"][1], lab.goal, biased=True)
    return result


def f2(lab):
    """What does one decoder draw from the caption, from the embedding, from both?

    unCLIP's decoder at guidance 2, given the prior's embedding and the caption, or only one of
    them. In training, 45% of the examples had both, 45% the embedding alone, 5% the caption alone.
    paper: fig. 8, whose rows all have the caption: the caption alone is worst; sec. 2.1: the text
    pathway "offers little help"
    """
    result = Result(["given", "binding right", "Frechet distance (CLIP) x 1000"])
    drawn = lab.draw_ways(result, {"both": {}, "embedding alone": {"say": False},
                                   "caption alone": {"given": "caption"}})
    for name, (bound, emb) in drawn.items():
        result.row(name, share(bound), frechet_cell(emb, lab.goal))
    both, alone, caption = (bound for bound, _ in drawn.values())
    result.claim("binding, points: embedding alone minus caption alone",
                 lambda e, c: np.nanmean(e - c), alone, caption, unit=100)
    result.claim("binding, points: what dropping the embedding costs, minus twice what dropping "
                 "the caption costs", lambda b, e, c: np.nanmean(b - c) - 2 * np.nanmean(b - e),
                 both, alone, caption, unit=100)
    return result


def f3(lab):
    """Is the diffusion prior better than the autoregressive one?

    Pictures drawn from both priors' embeddings for the same captions, and those embeddings against
    the true ones. The last row is what the autoregressive prior's codes lose before it predicts
    any: true embeddings, coded and decoded. `priors` (README.md, here) compares times.
    paper: FID 10.39 (diffusion) against 10.63 (autoregressive), with less training compute"""
    if not lab.has("ar_prior"):
        return Result(["prior"], **lab.caveat("ar_prior"))
    data = Shapes(4 * lab.n, SPLIT, lab.seed + 1)
    captions, true = mixed_captions(data), lab.true_emb(scenes_of(data))
    result = Result(["embeddings", "parameters", "captions seen", "evaluations", "cosine with the "
                     "true one", "Frechet x 1000", "binding right", "pictures' Frechet x 1000"])
    drawn = lab.draw_ways(result, {"prior": {}, "ar_prior": {"prior": "ar_prior"}})
    goal, coder = lab.goal, lab.pipeline(prior="ar_prior").prior
    for name, (bound, seen) in drawn.items():
        prior = lab.pipeline(prior=name).prior
        parameters, config = sum(p.numel() for p in prior.parameters()), prior.config
        emb = lab.prior_emb(captions, name)
        steps = config.components if prior is coder else 2 * config.sample_steps  # two candidates
        result.row(name, f"{parameters / 1e6:.2f}M", f"{lab.examples(name):,}", f"{steps}",
                   number(bootstrap(np.mean, (emb * true).sum(1)), 3),
                   frechet_cell(emb, true), share(bound), frechet_cell(seen, goal))
    coded = F.normalize(coder.dequantise(coder.quantise(true.to(lab.device))), dim=1).cpu()
    result.row("true ones, coded", "-", "-", "-",
               number(bootstrap(np.mean, (coded * true).sum(1)), 3), frechet_cell(coded, true),
               "-", "-")
    (ours, seen), (theirs, seen_theirs) = drawn.values()
    result.claim("binding in pictures, points: diffusion prior minus autoregressive prior",
                 lambda d, a: np.nanmean(d - a), ours, theirs, unit=100)
    result.claim("pictures' Frechet distance x 1000: autoregressive prior minus diffusion prior",
                 farther, seen_theirs, seen, goal, biased=True)
    return result


GUIDANCE = (1.0, 1.25, 2.0, 3.0, 4.0, 6.0)
# Captions that leave colour or shape open, and always size, background, place and shade. There are
# only six, so that each is drawn often enough to see how its pictures differ.
OPEN = [with_article(words) for words in (*SHAPES[:3], *(f"{c} shape" for c in list(COLOURS)[:3]))]


def attributes(pictures):
    """What the judge sees in pictures of one object: (n, 4) names of colour, shape, size and
    background, None where there is not exactly one object or no name fits."""
    seen = [(the_thing(scene), scene.background) for scene in map(judge, pictures)]
    return np.array([(t.colour, t.shape if t.shape in SHAPES else None, t.size, background)
                     for t, background in seen], object)  # a sign is no shape


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
    """Mean distance (1 minus cosine) of two pictures of one caption in CLIP's space. A picture's
    distance of 0 to itself counts, so that bootstrap(..., biased=True) corrects it rightly."""
    groups = [emb[captions == caption] for caption in sorted(set(captions))]
    return float(np.mean(np.concatenate([(1 - mine @ mine.T).ravel() for mine in groups])))


def f4(lab):
    """Does guidance cost GLIDE more diversity than unCLIP?

    Captions that leave most open, the decoder's guidance from 1 to 6, the prior's off. Diversity:
    the entropy of what the judge sees of the open parts, within each caption, divided by that of
    the true scenes; 1 is as diverse as the data. Fidelity: the share of pictures that show
    everything the caption says. Distance: 1 minus the cosine of two pictures of one caption. Loss:
    how far a figure falls with each doubling of guidance, fitted to all six.
    paper: figs. 9 to 11: unCLIP's diversity survives guidance, since the embedding holds it"""
    captions, systems = np.resize(OPEN, max(12, lab.n // 2)).tolist(), lab.systems()
    ours, rival = systems
    result = Result(["system", "guidance", "fidelity", "diversity", "distance in CLIP's space"],
                    **lab.caveat("decoder_caption"))
    curves, rows, embs = ({name: [] for name in systems} for _ in range(3))
    for name, scale in product(systems, GUIDANCE):
        pictures = lab.draw(captions, scale=scale, **systems[name])
        fit = scores(pictures, captions)["all"]
        rows[name].append(attributes(pictures))
        embs[name].append(lab.seen(pictures).numpy())
        varied = bootstrap(diversity, rows[name][-1], captions, biased=True)
        apart = bootstrap(spread, embs[name][-1], captions, biased=True)
        result.row(name, f"{scale:g}", share(fit), number(varied), number(apart, 3))
        curves[name].append((varied[0], fit.mean()))
    for what, figure, x in (("diversity", diversity, rows), ("distance", spread, embs)):
        def difference(captions, *both, figure=figure):  # a loss is a negative slope
            ours, theirs = np.reshape([figure(x, captions) for x in both], (2, len(GUIDANCE)))
            return np.polyfit(np.log2(GUIDANCE), ours - theirs, 1)[0]

        result.claim(f"{what}: {rival}'s loss with each doubling of guidance minus unCLIP's",
                     difference, captions, *x[ours], *x[rival], biased=True)
    result.picture = chart(curves, "guidance 1 to 6: fidelity against diversity", "diversity",
                           "fidelity")
    return result


def f5(lab):
    """Is unCLIP more diverse than GLIDE, and GLIDE closer to the caption?

    Both at guidance 2. Diversity as in F4; binding stands for caption similarity, in which the
    paper's GLIDE is ahead, and precision in CLIP's space for realism, where neither is clearly.
    paper: preferred over GLIDE in 48.9% (realism), 45.3% (caption), 70.5% (diversity)"""
    captions, systems = np.resize(OPEN, max(12, lab.n // 2)).tolist(), lab.systems()
    rows, (ours, rival) = {}, systems
    result = Result(["system", "realism (precision)", "binding right", "diversity"],
                    **lab.caveat("decoder_caption"))
    drawn = lab.draw_ways(result, systems)
    for name, (bound, emb) in drawn.items():
        rows[name] = attributes(lab.draw(captions, **systems[name]))
        varied = bootstrap(diversity, rows[name], captions, biased=True)
        result.row(name, f"{precision_recall(emb, lab.goal)[0]:.1%}", share(bound), number(varied))
    result.claim(f"diversity: unCLIP minus {rival}",
                 lambda u, g, captions: diversity(u, captions) - diversity(g, captions),
                 rows[ours], rows[rival], captions, biased=True)
    result.claim(f"binding, points: {rival} minus unCLIP", lambda u, g: np.nanmean(g - u),
                 drawn[ours][0], drawn[rival][0], unit=100)
    return result


def short_prior(lab, predict, embeddings, steps, seed):
    """A small prior trained from scratch for `steps` batches of 64."""
    clip = lab.clip
    torch.manual_seed(seed)
    prior = DiffusionPrior(PriorConfig(
        dim=clip.dim, text_width=clip.text_width, text_len=clip.text_len, width=128, depth=2,
        predict=predict, variance="fixed_small")).to(lab.device)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-3, **ADAM)
    for step in tqdm(range(steps), f"prior that predicts {predict}", disable=None):
        rng = np.random.default_rng([seed, step])
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


def f7(lab, scenes=3000, budgets=(100, 300, 1000)):
    """Should the prior predict the embedding or its noise?

    Small priors, trained here and now on the same batches of 64, that differ in what they predict
    and for how many steps they train. t = ...: one look at true embeddings with that much noise,
    and the cosine of the predicted embedding with the true one. Drawn: the cosine after sampling,
    64 steps from pure noise. The verdict is about the longest training, which is repeated with two
    other seeds.
    paper: sec. 2.2: predicting the embedding itself was better"""
    data = Shapes(2 * lab.n, SPLIT, lab.seed)
    true, text = lab.true_emb(scenes_of(data)), lab.clip.encode_text(mixed_captions(data))
    result, looks, curves = Result(["predicts", "steps", *(f"t = {t}" for t in LEVELS), "drawn",
                                    "Frechet x 1000"]), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        embeddings = embed(lab.clip, Shapes(scenes, "train", lab.seed), folder)
        for predict, steps in product(("x_0", "v", "noise"), budgets):
            prior = short_prior(lab, predict, embeddings, steps, lab.seed)
            noise = noise_for(range(lab.seed, lab.seed + len(data)), "prior")
            with autocast(lab.device):
                looks[predict] = guesses(prior, true.to(lab.device), text, lab.seed)
                emb = prior.sample(*text, noise=noise, candidates=1).cpu()
            cosines = [*looks[predict].values(), (emb * true).sum(1)]
            result.row(predict, f"{steps}", *(number(bootstrap(np.mean, c), 3) for c in cosines),
                       frechet_cell(emb, true))
            curves.setdefault(predict, []).append((steps, np.mean(cosines[:-1]).item()))

        def compare(looks):
            found = Result([])
            found.claim(f"cosine after one look, mean of the three levels, after {steps} steps: "
                        "predicting x_0 minus predicting noise",
                        lambda *c: np.mean(c[:3]) - np.mean(c[3:]),
                        *looks["x_0"].values(), *looks["noise"].values())
            return found.claims

        result.claims = compare(looks)
        for seed in (lab.seed + 1, lab.seed + 2):
            trained = {p: short_prior(lab, p, embeddings, steps, seed) for p in ("x_0", "noise")}
            result.others.append(compare({p: guesses(prior, true.to(lab.device), text, lab.seed)
                                          for p, prior in trained.items()}))
    result.picture = chart(curves, "one look at a noised embedding", "training steps",
                           "cosine with the true embedding")
    return result


def f12(lab):
    """What do the best of several embeddings, and of two pictures, buy?

    The prior draws k embeddings and keeps the one with the largest dot product with the caption's.
    sample.py also lets CLIP choose between two pictures of it, which the paper does not.
    paper: sec. 2.2: the better of two embeddings improves the quality; no figure is given"""
    result, bound = Result(["embeddings", "pictures", "binding right", "Frechet distance (CLIP) "
                            "x 1000", "recall", "evaluations of prior and decoder"]), {}
    pipeline = lab.pipeline()
    for k, pictures in ((1, 1), (2, 1), (4, 1), (16, 1), (2, 2)):
        emb = lab.prior_emb(lab.captions, candidates=k)
        drawn = lab.draw(lab.captions, emb, candidates=pictures)
        seen, steps = lab.seen(drawn), k * pipeline.prior.config.sample_steps
        both = 2 * pictures * pipeline.decoder.config.sample_steps  # with the condition and without
        bound[k, pictures] = scores(drawn, lab.captions)["binding"]
        result.row(f"best of {k}", f"best of {pictures}", share(bound[k, pictures]),
                   frechet_cell(seen, lab.goal), f"{precision_recall(seen, lab.goal)[1]:.1%}",
                   f"{steps} and {both}")
    result.claim("binding, points: best of two embeddings minus the first",
                 lambda a, b: np.nanmean(a - b), bound[2, 1], bound[1, 1], unit=100)
    return result


COMPARED = ("F1", "F4", "F5", "F8")  # which compare trainings, and ask --others too
FINDINGS = {f.__name__.upper(): f for f in (f1, f2, f3, f4, f5, f7, f8, f9, f10, f12)}
HEAD = """# The paper's findings, measured here

Written by `python -m lab.evaluate findings` on {date}: weights {weights}, n = {n}, seed {seed}.

- **Verdicts.** Each finding claims that some differences are above zero (its list). It is reproduced if all their intervals lie above zero, not reproduced if one lies below zero; otherwise it can't be decided.
- **In brackets**: 95% intervals, Wilson's for shares, the bootstrap's for the rest. They say how a figure would move with other scenes, not with another training.
- **Other trainings**: {others}. Where a finding compares trainings, the differences that these show follow, and one of another sign leaves it undecided.{witness}
- **Scenes** are a test split, which nothing was chosen by; the other commands of `lab.evaluate` draw validation scenes.
- **Settings.** The prior is not guided, and every picture is the decoder's first (sample.py guides the prior and keeps the better of two pictures).
- **Few scenes** make an entropy too small and a (squared) Frechet distance too large. Both are corrected for that, but do not compare distances of different n.
- **Not here**: F6, the zero-shot FID on COCO, needs photos and weights trained on them, and F11 is a race of decoders: see README.md, here.

"""  # noqa: E501


def explained(finding):
    """A finding's docstring -> (question, setup, the paper's figure)."""
    text = finding.__doc__ or "-\n\n- paper: -"  # python -OO drops docstrings
    question, rest = text.split("\n\n", 1)
    return [" ".join(part.split()) for part in (question, *rest.split("paper:"))]


def as_table(*rows):
    lines = rows[0], ["---"] * len(rows[0]), *rows[1:]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_markdown(name, result, seconds):
    """A finding's section of the report."""
    question, setup, paper = explained(FINDINGS[name])
    claims = []
    for k, (claim, interval) in enumerate(result.claims):
        digits = 1 if max(map(abs, interval)) >= 1 else 3
        again = ", ".join(f"{found[k][1][0]:.{digits}f}" for found in result.others)
        claims.append(f"- {claim}: {number(interval, digits)}"
                      + (f"; after other trainings {again}" if again else ""))
    parts = [f"## {name}: {question}", setup, f"Paper: {paper}.", f"**{result.verdict}**", *claims,
             as_table(result.header, *result.table), result.note,
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
    # A run's witness is the CLIP of the next one.
    runs = [args.weights, *args.others]
    labs = [Lab(args, run, runs[(k + 1) % len(runs)] if args.others else None)
            for k, run in enumerate(runs)]
    for run, other in zip(args.others, labs[1:]):
        if unlike := [s for s in BASELINES if other.has(s) != labs[0].has(s)]:
            raise UserError(f"--others {run}: {unlike[0]} is in one run and not in the other; "
                            "findings compare runs that have the same stages")
    lab, sections, found = labs[0], [], {}
    verdicts = [["finding", "question", "verdict"]]
    for name in tqdm(names, disable=None):
        begun = time.perf_counter()
        found[name] = result = FINDINGS[name](lab)
        if name in COMPARED:
            result.others = [FINDINGS[name](other).claims for other in labs[1:]]
        if result.picture:
            save_picture(result.picture, args.out / f"pictures/finding_{name}.png")
        sections.append(as_markdown(name, result, time.perf_counter() - begun))
        verdicts.append([name, explained(FINDINGS[name])[0], result.verdict])
        print(sections[-1], flush=True)  # an interrupted run has said what it found
    weights, *others = map(os.path.relpath, runs)
    witness = (" Pictures' distances, precision and recall in CLIP's space are measured with the "
               f"CLIP of {others[0]}, which no stage here was trained for." if others else "")
    head = HEAD.format(date=date.today(), weights=weights, others=", ".join(others) or "none",
                       witness=witness, n=lab.n, seed=lab.seed)
    path = args.out / ("FINDINGS.md" if len(names) == len(FINDINGS) else f"{'_'.join(names)}.md")
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f"{head}{as_table(*verdicts)}\n", *sections]))
    print(path)
    return {name: {"verdict": x.verdict, "header": x.header, "table": x.table,
                   "claims": [[claim, *map(float, interval)] for claim, interval in x.claims]}
            for name, x in found.items()}
