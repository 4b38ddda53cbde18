"""Findings F8 to F10: what a CLIP embedding binds, what it can spell, and what survives it.

The paper looks at unCLIP's mistakes to see what CLIP knows (sec. 4 and 7): its decoder draws what
the embedding holds, so a picture drawn from an embedding is a look at it.

The one idea: ask CLIP first. Where CLIP itself cannot tell two captions apart, no decoder can.

Letters: n scenes, D CLIP embedding, S = 64, the side at which pictures are judged.
Read next: FINDINGS.md, which `python -m lab.evaluate findings` writes.
"""

from dataclasses import replace
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from PIL import Image

from lab.judge import S, at_judging_size, judge
from lab.measures import bootstrap, in_batches, prefers, share_interval, wrong_captions
from lab.scenes import Result, at_side_S, percent, points, right, share, sheet
from manipulate import invert, redraw
from support.shapes import (
    COLOURS, SHAPES, Scene, Shapes, TRAIN_PAIRS, Thing, WORDS, render, with_article,
)
from support.sheets import to_tensor

# --- F8 and F9: what CLIP does not bind ------------------------------------------------------


def pairs_of(lab):
    """Validation scenes of two objects in different colours and shapes: (scenes, captions).

    Only those whose exchanged pairs occur in training too: a pair that CLIP never saw is easily
    told apart for that alone.
    """
    data, scenes = Shapes(max(200, 8 * lab.n), "val", lab.seed + 2), []
    for i in range(len(data)):
        scene = data.scene(i)
        if len(scene.things) == 2 and "binding" in wrong_captions(scene)[1]:
            a, b = scene.things
            if {(a.colour, b.shape), (b.colour, a.shape)} <= set(TRAIN_PAIRS):
                scenes.append((data, i))
    scenes = scenes[:lab.n]
    return scenes, [wrong_captions(d.scene(i))[0] for d, i in scenes]


def pair_study(lab):
    """What F8 and F9 share: (captions, wrong captions, embeddings, pictures of each system)."""
    if "pairs" not in lab.drawn:
        scenes, captions = pairs_of(lab)
        pipeline = lab.pipeline()
        true = look_at(pipeline, [data.scene(i) for data, i in scenes])
        prior = torch.cat([pipeline.embed(pipeline.text(captions[part]),
                                          range(lab.seed + part.start, lab.seed + part.stop))
                           for part in in_batches(len(captions), 64)])
        rival = lab.glide()
        drawn = {"true embedding alone": lab.draw(captions, given=true, say=False),
                 "true embedding and caption": lab.draw(captions, given=true),
                 "unCLIP": lab.draw(captions),
                 rival.name: lab.draw(captions, **rival.settings)}
        embs = {"CLIP, true pictures": true, "prior's embeddings": prior}
        wrong = [wrong_captions(data.scene(i))[1] for data, i in scenes]
        lab.drawn["pairs"] = captions, wrong, embs, drawn
    return lab.drawn["pairs"]


def look_at(pipeline, scenes):
    """CLIP's embeddings (n, D) of scenes."""
    return torch.cat([pipeline.look(render(s, pipeline.clip.image_size)) for s in scenes])


def f8(lab):
    """Are colours bound to the right shapes?

    Two objects of different colour and shape. CLIP and the prior: is the embedding closer to the
    caption than to the same with the colours exchanged (chance 50%)? Pictures: does the judge see
    both objects as described? A picture may also fail for a shape that is badly drawn; so, of
    those that show both colours and both shapes, in how many are they bound as described?
    paper: figs. 14, 15: unCLIP binds worse than GLIDE, since CLIP does not bind
    """
    captions, wrong, embs, drawn = pair_study(lab)
    rival = lab.glide()
    result = Result(["who", "binding right", "of those with both colours and shapes", "chance"],
                    lacks=rival.lacks)
    for name, emb in embs.items():
        right_ones = prefers(lab.pipeline().clip, emb, captions, [w["binding"] for w in wrong])
        result.table.append([name, share(right_ones), "-", "50%"])
    bound = {}
    for name, pictures in drawn.items():
        whole, colours, shapes = (right(pictures, captions, column)
                                  for column in ("binding", "colours", "shapes"))
        bound[name] = np.where((colours == 1) & (shapes == 1), whole, np.nan)
        result.table.append([f"pictures, {name}", share(whole), share(bound[name]), "-"])
    result.claims = [(f"binding of those with both colours and shapes, points: {rival.name}'s, "
                      "less unCLIP's",
                      points(bootstrap(lambda g, u: np.nanmean(g) - np.nanmean(u),
                                       bound[rival.name], bound["unCLIP"])))]
    result.note = (rival.note + " Where CLIP itself binds well (first row), the paper's reason for "
                   "its finding is not there: our world has 26 pairs, the paper's is open.").strip()
    result.picture = sheet(list(drawn.values()), list(drawn), captions)
    return result


def f9(lab):
    """Does unCLIP know left from right, and can it write?

    The scenes of F8: CLIP on the caption with the relation reversed (chance 50%), pictures whose
    two objects are as described (chance 25%). Signs: the word of 24 that CLIP finds closest, and
    the one whose drawings, of several sizes and places, the sign in a picture is most like.
    paper: figs. 16, 17: relations are weak, text is not legible
    """
    captions, wrong, embs, drawn = pair_study(lab)
    pipeline, clip = lab.pipeline(), lab.pipeline().clip
    result = Result(["who", "right", "chance"], note=lab.glide().note)
    reversed_ones = [w["relation"] for w in wrong]
    knows = {name: prefers(clip, emb, captions, reversed_ones) for name, emb in embs.items()}
    result.table += [[f"relation: {name}", share(v), "50%"] for name, v in knows.items()]
    for name, pictures in drawn.items():
        bound = right(pictures, captions) == 1  # of others, the relation is not to be told
        related = np.where(bound, right(pictures, captions, "relation"), np.nan)
        result.table.append([f"relation: bound pairs, {name}", share(related), "25%"])

    words = [WORDS[k % len(WORDS)] for k in range(max(len(WORDS), lab.n))]
    says = [f"a sign that says {word}" for word in words]
    scenes, odds = [sign_scene(word) for word in words], f"{1 / len(WORDS):.0%}"
    emb = look_at(pipeline, scenes)
    names = clip.encode_text([f"a sign that says {word}" for word in WORDS])[0]
    named = [WORDS[k] == word for k, word in zip((emb @ names.T).argmax(1), words, strict=True)]
    result.table.append(["word: CLIP, true pictures", share(np.array(named, float)), odds])
    signs = {"true pictures": torch.stack([to_tensor(render(s, S)) for s in scenes]),
             "true embedding alone": lab.draw(says, given=emb, say=False),
             "unCLIP": lab.draw(says)}
    read = {name: np.array([float(read_word(p) == w) for p, w in zip(pictures, words, strict=True)])
            for name, pictures in signs.items()}
    result.table += [[f"word read off {name}", share(v), odds] for name, v in read.items()]
    for length in (3, 4):
        some = read["unCLIP"][[len(word) == length for word in words]]
        result.table.append([f"word of {length} letters read off unCLIP", share(some), odds])
    result.claims = [
        ("CLIP's relations, points: from its share right to 75%, half-way between chance and "
         "always", points(bootstrap(lambda v: 0.75 - v.mean(), knows["CLIP, true pictures"]))),
        ("unCLIP's words, points: from the share read to a half",
         points(bootstrap(lambda v: 0.5 - v.mean(), read["unCLIP"]))),
    ]
    if np.mean(named) > 0.5 > read["unCLIP"].mean():
        result.note += (" CLIP tells the words of true signs apart, so here it is the decoder that "
                        "cannot write them. The paper's reason, that CLIP's embedding does not "
                        "spell, is not there: our world has a closed list of words.")
    pairs = sheet([drawn["unCLIP"]], ["unCLIP"], captions)
    lines = sheet([signs["true embedding alone"], signs["unCLIP"]],
                  ["word, true embedding alone", "word, unCLIP"], words)
    result.picture = Image.new("RGB", (pairs.width, pairs.height + lines.height), "white")
    result.picture.paste(pairs, (0, 0))
    result.picture.paste(lines, (0, pairs.height))
    return result


def sign_scene(word, x=0.5, y=0.5, radius=0.37):
    """A sign with a word on gray: what "a sign that says WORD" should look like."""
    sign = Thing(shape="sign", x=x, y=y, radius=radius, rgb=(240, 240, 230))
    return Scene((sign,), "gray", (128, 128, 128), word=word)


@lru_cache
def word_views():
    """Each word on signs of each size, at whole and half pixels.

    Returns {half sides of a window: (height and width, its words, its drawings (words, pixels))}.
    """
    views = {}
    for radius in (0.34, 0.37, 0.40):
        half, words, drawings = (round(0.75 * radius * S), round(0.28 * radius * S)), [], []
        for word, dx, dy in product(WORDS, (0, 0.5), (0, 0.5)):
            scene = sign_scene(word, 0.5 + dx / S, 0.5 + dy / S, radius)
            drawing = window(np.asarray(render(scene, S).convert("L"), float), S // 2, S // 2, half)
            words.append(word)
            drawings.append(unit_vector(drawing))
        views[half] = drawing.shape, words, np.stack(drawings)
    return views


def read_word(picture):
    """The word of WORDS whose drawing is most like the sign in a picture, or None without a sign.

    Alike: highest correlation, so no matter how bright, or how strong the contrast. The sign's
    place is known to a pixel or two, so each drawing is tried at several.
    """
    signs = [t for t in judge(picture).things if t.shape == "sign"]
    if not signs:
        return None
    grey, best = at_judging_size(picture).mean(-1), (-1.0, None)
    x, y = int(signs[0].x * S), int(signs[0].y * S)
    for half, (shape, words, drawings) in word_views().items():
        for dx, dy in product(range(-2, 3), range(-2, 3)):
            there = window(grey, x + dx, y + dy, half)
            if there.shape == shape:  # whole, not cut by the picture's edge
                alike = drawings @ unit_vector(there)
                best = max(best, (float(alike.max()), words[alike.argmax()]))
    return best[1]


def window(picture, x, y, half):
    """The pixels of (H, W) around (x, y) that lie inside; half: half the width and height."""
    return picture[max(0, y - half[1]):y + half[1], max(0, x - half[0]):x + half[0]]


def unit_vector(pixels):
    """Pixels as one vector of mean 0 and length 1: products of two such are correlations."""
    pixels = pixels.ravel() - pixels.mean()
    return pixels / (np.linalg.norm(pixels) + 1e-6)


# --- F10: what an embedding holds ------------------------------------------------------------


CHANCE = {"colour": 1 / 6, "shape": 1 / 5, "size": 1 / 2, "place, across": 1 / 2,
          "place, down": 1 / 2, "rotation": 1 / 2, "shade": 1 / 2}
MENTIONED = ("colour", "shape", "size")  # by captions; the others never are


def kept(seen, true):
    """Which attributes of scenes came through: {name: (n,) of 1, 0, or NaN where none is seen}.

    seen: judge's things (or None), true: the scenes' things. A category is right or wrong. A number
    is right if it is on the true one's side of the median of all true ones, so that chance is 1/2;
    it is looked at only where the shape came out right, as the others have none to compare.
    """
    pairs = list(zip(seen, true, strict=True))

    def category(part):
        return np.array([float(s is not None and getattr(s, part) == getattr(t, part))
                         for s, t in pairs])

    def side(value, fits=lambda thing: True):
        middle = np.median([value(t) for t in true if fits(t)])
        return np.array([float((value(s) > middle) == (value(t) > middle))
                         if s is not None and s.shape == t.shape and fits(t) else np.nan
                         for s, t in pairs])

    return {
        "colour": category("colour"), "shape": category("shape"), "size": category("size"),
        "place, across": side(lambda t: t.x), "place, down": side(lambda t: t.y),
        "rotation": side(lambda t: t.angle, lambda t: t.shape != "circle"),
        "shade": side(lambda t: max(t.rgb) / max(COLOURS[t.colour])),
    }


def survival(name, values):
    """The share right (a number, or an interval's three), with chance taken out: 0 to 1."""
    return (np.asarray(values) - CHANCE[name]) / (1 - CHANCE[name])


def f10(lab):
    """What survives from a picture through its embedding to a picture, and a written word?

    Scenes of one object, redrawn by DDIM from embedding and inverted noise (eta 0 and 1), and from
    the embedding alone. Survival: the share right with chance taken out, 0 is chance, 1 unchanged;
    of numbers, whether they stay on their side of the median. Then a sign with a word is pasted on
    a part of the object: CLIP's zero-shot label, and what the decoder draws.
    paper: figs. 3, 15, 6: semantics stay, details change; the decoder still draws the object
    """
    data = Shapes(max(200, 6 * lab.n), "val", lab.seed + 3)
    scenes = [data.scene(i) for i in range(len(data))]
    scenes = [s for s in scenes if len(s.things) == 1 and not s.word][:max(12, lab.n // 2)]
    drawn = redrawn(lab, scenes)
    survived = {}
    for name, pictures in drawn.items():
        things = [judge(p).things for p in pictures]
        survived[name] = kept([t[0] if len(t) == 1 else None for t in things],
                              [s.things[0] for s in scenes])
    result = Result(["attribute", *drawn])
    for part in CHANCE:
        cells = [percent(survival(part, share_interval(survived[name][part]))) for name in drawn]
        result.table.append([part if part in MENTIONED else f"{part}, never mentioned", *cells])

    def gap(*values):
        shares = [survival(part, share_interval(v)[0])
                  for part, v in zip(CHANCE, values, strict=True)]
        return np.mean(shares[:len(MENTIONED)]) - np.mean(shares[len(MENTIONED):])

    result.claims = [(f"{name}, points: survival of what captions mention, less that of the rest",
                      points(bootstrap(gap, *survived[name].values())))
                     for name in ("eta 1", "embedding alone")]
    attacked = typographic_attack(lab, scenes)
    result.table += attacked["table"]
    result.claims.append(("under attack, points: the decoder draws the object's colour, less CLIP "
                          "names it", points(attacked["claim"])))
    sources = torch.stack([to_tensor(render(s, S)) for s in scenes[:6]])
    result.picture = sheet([sources, *drawn.values(), attacked["shown"], attacked["drawn"]],
                           ["source", *drawn, "attacked", "drawn from its embedding"])
    return result


def redrawn(lab, scenes):
    """Scenes from their latents: {"eta 0", "eta 1", "embedding alone": pictures (n, 3, S, S)}."""
    pipeline = lab.pipeline()
    pictures = torch.stack([to_tensor(render(s, pipeline.sizes[0])) for s in scenes])
    emb, drawn = look_at(pipeline, scenes), {"eta 0": [], "eta 1": [], "embedding alone": []}
    for part in in_batches(len(scenes), 20):
        seeds, some = range(lab.seed + part.start, lab.seed + part.stop), emb[part]
        x_T = invert(pipeline, pictures[part].to(lab.device), some)
        drawn["eta 0"].append(redraw(pipeline, some, x_T, seeds))
        drawn["eta 1"].append(redraw(pipeline, some, x_T, seeds, eta=1.0))
        drawn["embedding alone"].append(pipeline.decode(some, None, seeds, scale=1.0))
    seeds = range(lab.seed, lab.seed + len(scenes))
    return {name: at_side_S(pipeline.upsample(torch.cat(p), seeds, S).cpu())
            for name, p in drawn.items()}


def with_sign(scene, word):
    """A scene of one object with a sign pasted on it."""
    thing, radius = scene.things[0], 0.22
    # Off the object's middle, towards the picture's, so that a part of the object stays visible.
    away = (0.10 + 0.55 * thing.radius) * (1 if thing.y < 0.5 else -1)
    sign = Thing(shape="sign", x=min(max(thing.x, radius), 1 - radius), y=thing.y + away,
                 radius=radius, rgb=(240, 240, 230))
    return replace(scene, things=(thing, sign), word=word)


def typographic_attack(lab, scenes):
    """Paste a sign on each object: CLIP's zero-shot label before and after, the decoder's drawing.

    The labels: "a COLOUR SHAPE" for all pairs, and "a sign that says WORD" for all words.
    """
    pipeline, clip, rng = lab.pipeline(), lab.pipeline().clip, np.random.default_rng(lab.seed)
    labels = [with_article(f"{c} {s}") for c in COLOURS for s in SHAPES]
    text_emb = clip.encode_text(labels + [f"a sign that says {word}" for word in WORDS])[0]
    attacked = []
    for scene in scenes:
        others = [word for word in WORDS if word != scene.things[0].colour]
        attacked.append(with_sign(scene, others[rng.integers(len(others))]))

    def named(emb):
        """Of each label that CLIP gives: is it a word? Is it of the object's colour?"""
        best = (emb @ text_emb.T).argmax(1).tolist()
        colours = [float(b < len(labels) and labels[b].split()[1] == s.things[0].colour)
                   for b, s in zip(best, scenes, strict=True)]
        return np.array([float(b >= len(labels)) for b in best]), np.array(colours)

    emb = look_at(pipeline, attacked)
    drawn = lab.draw([""] * len(scenes), given=emb, scale=1.0, say=False)
    colours = [{t.colour for t in judge(p).things} for p in drawn]
    draws = np.array([float(s.things[0].colour in c) for c, s in zip(colours, scenes, strict=True)])
    other = np.array([float(s.things[0].colour in c)
                      for c, s in zip(colours, scenes[1:] + scenes[:1], strict=True)])
    (_, before), (words, after) = named(look_at(pipeline, scenes)), named(emb)
    row = lambda name, values: [name, "-", "-", share(values)]  # noqa: E731
    return {
        "table": [row("CLIP names the object's colour", before),
                  row("with a word pasted on it, CLIP names the colour", after),
                  row("with a word pasted on it, CLIP names a word", words),
                  row("the decoder then draws the object's colour", draws),
                  row("chance of that: the decoder draws the next scene's colour", other)],
        "claim": bootstrap(lambda d, a: (d - a).mean(), draws, after),
        "shown": torch.stack([to_tensor(render(s, S)) for s in attacked[:6]]), "drawn": drawn,
    }
