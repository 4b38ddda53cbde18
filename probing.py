"""Findings F8 to F10: what a CLIP embedding binds, what it can spell, and what survives it.

The paper looks at unCLIP's mistakes to see what CLIP knows (sec. 4 and 7): its decoder draws what
the embedding holds, so a picture drawn from an embedding is a look at it.

The one idea: ask CLIP first. Where CLIP itself cannot tell two captions apart, no decoder can.

Letters: n scenes, D CLIP embedding, S = 64, the side at which pictures are judged.
Read next: FINDINGS.md, which `python evaluate.py findings` writes.
"""

from dataclasses import replace
from functools import lru_cache
from itertools import product

import numpy as np
import torch

from data import COLOURS, SHAPES, TRAIN_PAIRS, WORDS
from data import Scene, Shapes, Thing, render, to_tensor, with_article
from judge import S, at_judging_size, judge
from lab import Result, at_side_S, mean_interval, percent, right, sheet
from manipulate import invert, redraw
from measures import bootstrap, in_batches, wrong_captions

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


def prefers(lab, scenes, embeddings, kind):
    """1 where an embedding is closer to its scene's caption than to the wrong one of a kind.

    Equally close to both, it is a guess: half right.
    """
    pairs = [wrong_captions(data.scene(i)) for data, i in scenes]
    good = lab.pipeline().clip.encode_text([true for true, _ in pairs])[0]
    bad = lab.pipeline().clip.encode_text([wrong[kind] for _, wrong in pairs])[0]
    gap = ((good - bad) * embeddings).sum(1).cpu().numpy()
    return np.where(np.abs(gap) < 1e-6, 0.5, gap > 0)


def pair_study(lab):
    """What F8 and F9 share: scenes, captions, embeddings and pictures of both systems."""
    if "pairs" in lab.drawn:
        return lab.drawn["pairs"]
    scenes, captions = pairs_of(lab)
    clip, pipeline = lab.pipeline().clip, lab.pipeline()
    true = torch.cat([clip.encode_image(d.image(i, clip.image_size)[None].to(lab.device))
                      for d, i in scenes])
    prior = torch.cat([pipeline.embed(pipeline.text(captions[part]),
                                      range(lab.seed + part.start, lab.seed + part.stop))
                       for part in in_batches(len(captions), 64)])
    rival, way, note = lab.glide()
    drawn = {"true embedding alone": lab.draw(captions, given=true, say=False),
             "true embedding and caption": lab.draw(captions, given=true),
             "unCLIP": lab.draw(captions), rival: lab.draw(captions, **way)}
    lab.drawn["pairs"] = scenes, captions, true, prior, drawn, note
    return lab.drawn["pairs"]


def f8(lab):
    """Are colours bound to the right shapes?

    Two objects of different colour and shape. CLIP and the prior: is the embedding closer to the
    caption than to the same with the colours exchanged (chance 50%)? Pictures: does the judge see
    both objects as described?
    paper: figs. 14, 15: unCLIP binds worse than GLIDE, since CLIP does not bind
    """
    scenes, captions, true, prior, drawn, note = pair_study(lab)
    result = Result(["who", "binding right", "chance"], note=note)
    for name, emb in (("CLIP, true pictures", true), ("prior's embeddings", prior)):
        share = percent(mean_interval(prefers(lab, scenes, emb, "binding")))
        result.table.append([name, share, "50%"])
    bound = {name: right(pictures, captions) for name, pictures in drawn.items()}
    for name, values in bound.items():
        result.table.append([f"pictures, {name}", percent(mean_interval(values)), "-"])
    rival = lab.glide()[0]
    result.claims = [(f"{rival} binds better than unCLIP",
                      bootstrap(lambda g, u: (g - u).mean(), bound[rival], bound["unCLIP"]))]
    result.note += (" Where CLIP itself binds well (first row), the paper's reason for its finding "
                    "is not there: our world has 26 pairs, the paper's is open.")
    result.picture = sheet(list(drawn.values()), list(drawn))
    return result


def f9(lab):
    """Does it know left from right, and can it write?

    The scenes of F8: CLIP on the caption with the relation reversed (chance 50%), pictures whose
    two objects are as described (chance 25%). Signs: the word that fits best among 24 renderings.
    paper: figs. 16, 17: relations are weak, text is not legible
    """
    scenes, captions, true, prior, drawn, note = pair_study(lab)
    result = Result(["who", "right", "chance"], note=note)
    for name, emb in (("CLIP's relations, true pictures", true), ("prior's embeddings", prior)):
        result.table.append([name, percent(mean_interval(prefers(lab, scenes, emb, "relation"))),
                             "50%"])
    placed = {}
    for name, pictures in drawn.items():
        related = right(pictures, captions, "relation")
        bound = right(pictures, captions) == 1  # of others, the relation is not to be told
        placed[name] = np.where(bound, related, np.nan)
        if bound.any():
            result.table.append([f"relation of {bound.sum()} bound pairs, {name}",
                                 percent(mean_interval(placed[name])), "25%"])
    words = [WORDS[k % len(WORDS)] for k in range(max(len(WORDS), lab.n))]
    signs = {"true pictures": torch.stack([to_tensor(render(sign_scene(word), S))
                                           for word in words]),
             "unCLIP": lab.draw([f"a sign that says {word}" for word in words])}
    legible = {}
    for name, pictures in signs.items():
        legible[name] = read = np.array(
            [float(read_word(p) == w) for p, w in zip(pictures, words, strict=True)])
        for length in (None, 3, 4):
            some = read[[length in (None, len(w)) for w in words]]
            row = f"words of {length or '3 or 4'} letters read, {name}"
            result.table.append([row, percent(mean_interval(some)), f"{1 / len(WORDS):.0%}"])
    clip_relation = prefers(lab, scenes, true, "relation")
    result.claims = [
        ("CLIP itself is right about relations in under 75%",
         bootstrap(lambda v: 0.75 - v.mean(), clip_relation)),
        ("under half of the words are legible",
         bootstrap(lambda v: 0.5 - v.mean(), legible["unCLIP"])),
    ]
    result.picture = sheet([drawn["unCLIP"], signs["unCLIP"]], ["relations", "words"])
    return result


def sign_scene(word, x=0.5, y=0.5, radius=0.37):
    """A sign with a word on gray: what "a sign that says WORD" should look like."""
    sign = Thing(shape="sign", x=x, y=y, radius=radius, rgb=(240, 240, 230))
    return Scene((sign,), "gray", (128, 128, 128), word=word)


@lru_cache
def word_views():
    """Each word on signs of each size, at whole and half pixels: (word, half sides, drawing)."""
    views = []
    for word, radius, dx, dy in product(WORDS, (0.34, 0.37, 0.40), (0, 0.5), (0, 0.5)):
        scene = sign_scene(word, 0.5 + dx / S, 0.5 + dy / S, radius)
        half = round(0.75 * radius * S), round(0.28 * radius * S)
        drawing = np.asarray(render(scene, S).convert("L"), float)
        views.append((word, half, window(drawing, S // 2, S // 2, *half)))
    return views


def read_word(picture):
    """The word of WORDS whose drawing is most like the sign in a picture, or None without a sign.

    The sign's place is known to a pixel or two, so each drawing is tried at several.
    """
    signs = [t for t in judge(picture).things if t.shape == "sign"]
    if not signs:
        return None
    grey, best = at_judging_size(picture).mean(-1), (-1.0, None)
    x, y = int(signs[0].x * S), int(signs[0].y * S)
    for (word, half, wanted), dx, dy in product(word_views(), range(-2, 3), range(-2, 3)):
        there = window(grey, x + dx, y + dy, *half)
        if there.shape == wanted.shape:
            best = max(best, (cosine(there, wanted), word))
    return best[1]


def window(picture, x, y, half_w, half_h):
    """The pixels of (H, W) around (x, y), as many as lie inside."""
    return picture[max(0, y - half_h):y + half_h, max(0, x - half_w):x + half_w]


def cosine(a, b):
    """Correlation of two windows of one shape: no matter how bright, or how strong the contrast."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-6))


# --- F10: what an embedding holds ------------------------------------------------------------


def kept_shares(seen, true):
    """How much of a scene's attributes came through: {name: (n,) of 1, 0 or a pair (a, b)}.

    seen: judge's things (or None), true: the scenes' things. Categories are right or wrong;
    numbers are pairs, whose squared correlation says how much of them is left.
    """
    def category(part):
        return np.array([float(s is not None and getattr(s, part) == getattr(t, part))
                         for s, t in zip(seen, true, strict=True)])

    def numbers(value, fits=lambda t: True):
        rows = [(value(s), value(t)) if s is not None and s.shape == t.shape and fits(t)
                else (np.nan, np.nan) for s, t in zip(seen, true, strict=True)]
        return np.array(rows, float)

    return {
        "colour": category("colour"), "shape": category("shape"), "size": category("size"),
        "place, across": numbers(lambda t: t.x), "place, down": numbers(lambda t: t.y),
        "rotation": numbers(lambda t: t.angle, lambda t: t.shape != "circle"),
        "shade": numbers(lambda t: max(t.rgb) / max(COLOURS[t.colour])),
    }


CHANCE = {"colour": 1 / 6, "shape": 1 / 5, "size": 1 / 2}


def survival(name, values):
    """0: no better than chance; 1: unchanged.

    Of a category the share right, with chance taken out; of a number r^2 over the pictures whose
    shape came out right, as the others have no rotation to compare. The two scales agree at their
    ends only.
    """
    if name in CHANCE:
        return (values.mean() - CHANCE[name]) / (1 - CHANCE[name])
    values = values[~np.isnan(values).any(1)]
    if len(values) < 3 or (values.std(0) < 1e-9).any():
        return 0.0
    return max(0.0, np.corrcoef(values.T)[0, 1]) ** 2


def f10(lab):
    """What survives from a picture through its embedding to a picture, and a written word?

    Scenes of one object, redrawn by DDIM from embedding and inverted noise (eta 0 and 1), and from
    the embedding alone. Survival: 0 is chance, 1 unchanged. Then a sign with a word is pasted on a
    part of the object: CLIP's zero-shot label, and what the decoder draws.
    paper: figs. 3, 15, 6: semantics stay, details change; the decoder still draws the object
    """
    data, pipeline = Shapes(max(200, 6 * lab.n), "val", lab.seed + 3), lab.pipeline()
    scenes = [data.scene(i) for i in range(len(data))]
    scenes = [s for s in scenes if len(s.things) == 1 and not s.word][:max(12, lab.n // 2)]
    low = pipeline.sizes[0]
    pictures = torch.stack([to_tensor(render(s, low)) for s in scenes]).to(lab.device)
    emb = torch.cat([pipeline.look(render(s, pipeline.clip.image_size)) for s in scenes])
    drawn = {"eta 0": [], "eta 1": [], "embedding alone": []}
    for part in in_batches(len(scenes), 20):
        seeds, some = range(lab.seed + part.start, lab.seed + part.stop), emb[part]
        x_T = invert(pipeline, pictures[part], some, 50)
        drawn["eta 0"].append(redraw(pipeline, some, x_T, seeds, 50))
        drawn["eta 1"].append(redraw(pipeline, some, x_T, seeds, 50, eta=1.0))
        drawn["embedding alone"].append(pipeline.decode(some, None, seeds, scale=1.0))
    seeds = range(lab.seed, lab.seed + len(scenes))
    drawn = {name: at_side_S(pipeline.upsample(torch.cat(p), seeds, S).cpu())
             for name, p in drawn.items()}
    true = [s.things[0] for s in scenes]
    kept = {}
    for name, p in drawn.items():
        things = [judge(x).things for x in p]
        kept[name] = kept_shares([t[0] if len(t) == 1 else None for t in things], true)
    result = Result(["attribute", *drawn])
    for part in kept["eta 0"]:
        rows = [kept[name][part] for name in drawn]
        cells = [percent(bootstrap(lambda v, part=part: survival(part, v), v)) for v in rows]
        result.table.append([f"{part}{'' if part in CHANCE else ', never mentioned'}", *cells])

    alone = kept["embedding alone"]

    def gap(*values):
        shares = [survival(name, v) for name, v in zip(alone, values, strict=True)]
        return np.mean(shares[:3]) - np.mean(shares[3:])

    result.claims = [("from the embedding alone, what captions mention survives better",
                      bootstrap(gap, *alone.values()))]
    attacked = typographic_attack(lab, scenes)
    result.table += attacked["table"]
    result.claims.append(("the decoder draws the object's colour more often than CLIP names it",
                          attacked["claim"]))
    sources = torch.stack([to_tensor(render(s, S)) for s in scenes[:6]])
    result.picture = sheet([sources, *drawn.values(), attacked["shown"],
                            attacked["drawn"]],
                           ["source", *drawn, "attacked", "drawn from its embedding"])
    return result


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

    def look_at(some):
        return torch.cat([pipeline.look(render(s, clip.image_size)) for s in some])

    def named(emb):
        best = (emb @ text_emb.T).argmax(1).tolist()
        return np.array([float(b < len(labels) and labels[b].split()[1] == s.things[0].colour)
                         for b, s in zip(best, scenes, strict=True)])

    emb = look_at(attacked)
    drawn = lab.draw([""] * len(scenes), given=emb, scale=1.0, say=False)
    colours = [{t.colour for t in judge(p).things} for p in drawn]
    draws = np.array([float(s.things[0].colour in c) for c, s in zip(colours, scenes, strict=True)])
    before, after = named(look_at(scenes)), named(emb)
    blank = ["-"] * 2
    return {
        "table": [["CLIP names the colour", *blank, percent(mean_interval(before))],
                  ["with a word pasted on", *blank, percent(mean_interval(after))],
                  ["the decoder then draws it", *blank, percent(mean_interval(draws))]],
        "claim": bootstrap(lambda d, a: (d - a).mean(), draws, after),
        "shown": torch.stack([to_tensor(render(s, S)) for s in attacked[:6]]), "drawn": drawn,
    }
