"""Findings F8 to F10: what a CLIP embedding binds, what it can spell, and what survives in it.

The paper looks at unCLIP's mistakes to see what CLIP knows (sec. 4 and 7): the decoder draws what
the embedding holds, so a picture drawn from an embedding is a look at it. Ask CLIP first, though:
where CLIP itself cannot tell two captions apart, no decoder can.
"""

from dataclasses import replace
from functools import lru_cache, partial
from itertools import product

import numpy as np

from lab.judge import S, at_judging_size, judge, scores, the_thing
from lab.measures import (
    SPLIT, Result, percent, pictures_of, prefers, redrawn, scenes_of, share, share_interval, sheet,
    single_objects, wrong_captions,
)
from support.shapes import (
    COLOURS, SHAPES, SIZES, TRAIN_PAIRS, WORDS, Scene, Shapes, Thing, render, with_article,
)

SIGN = partial(Thing, shape="sign", rgb=(240, 240, 230))


def pairs_of(lab):
    """n test scenes of two objects that differ in colour and in shape. The pairs with
    exchanged colours occur in training too, or CLIP would recognise them by their novelty."""
    def fits(a, b=None):
        return (b and a.colour != b.colour and a.shape != b.shape
                and {(a.colour, b.shape), (b.colour, a.shape)} <= set(TRAIN_PAIRS))

    scenes = scenes_of(Shapes(max(200, 8 * lab.n), SPLIT, lab.seed + 2))
    return [scene for scene in scenes if fits(*scene.things)][:lab.n]


def pair_study(lab, mistake):
    """What F8 and F9 share: (captions, who prefers them to captions with a mistake, pictures of
    each system, their scores)."""
    scenes = pairs_of(lab)
    captions, wrong = map(list, zip(*map(wrong_captions, scenes), strict=True))
    true = lab.true_emb(scenes)
    embs = {"CLIP, true pictures": true, "prior's embeddings": lab.prior_emb(captions)}
    knows = {name: prefers(lab.clip, emb, captions, [w[mistake] for w in wrong])
             for name, emb in embs.items()}
    drawn = {name: lab.draw(captions, **way) for name, way in {
        "true embedding alone": {"given": true, "say": False},
        "true embedding and caption": {"given": true}, **lab.systems()}.items()}
    return captions, knows, drawn, {name: scores(p, captions) for name, p in drawn.items()}


def f8(lab):
    """Are colours bound to the right shapes?

    Scenes of two objects that differ in colour and shape. CLIP and the prior: is the embedding
    closer to the caption than to the caption with the colours exchanged (chance: 50%)? Pictures:
    does the judge see both objects as described? A badly drawn shape fails too, so the next column
    counts only the pictures that show both colours and both shapes.
    paper: figs. 14, 15: unCLIP binds worse than GLIDE, since CLIP does not bind"""
    captions, knows, drawn, seen = pair_study(lab, "binding")
    result = Result(["who", "binding right", "binding right, if both colours and shapes are shown",
                     "chance"], picture=sheet(drawn, captions), **lab.caveat("decoder_caption"))
    for name, right in knows.items():
        result.row(name, share(right), "-", "50%")
    bound = {}
    for name, found in seen.items():
        shown = (found["colours"] == 1) & (found["shapes"] == 1)
        bound[name] = np.where(shown, found["binding"], np.nan)
        result.row(f"pictures, {name}", share(found["binding"]), share(bound[name]), "-")
    *_, rival = bound
    result.claim(f"binding, if both colours and shapes are shown, points: {rival} minus unCLIP",
                 lambda g, u: np.nanmean(g) - np.nanmean(u), bound[rival], bound["unCLIP"],
                 unit=100)
    return result


def f9(lab):
    """Can unCLIP write, draw what is small, and tell left from right?

    Signs: the word of 24 that CLIP finds closest, and the word whose drawings, in several sizes and
    places, look most like the sign in the picture. Shapes: scenes of one object, small or large.
    Relations, on the scenes of F8: CLIP on the caption with the relation reversed (chance: 50%),
    and pictures whose two objects are as described (chance: 25%). That CLIP hardly encodes them is
    known from later work, so they play no part in the verdict.
    paper: fig. 16: text is not legible; fig. 17: detail is lost at 64 pixels"""
    _, knows, drawn, seen = pair_study(lab, "relation")
    result = Result(["who", "right", "chance"], note=lab.caveat("decoder_caption").get("note", ""))
    for name, right in knows.items():
        result.row(f"relation: {name}", share(right), "50%")
    for name, found in seen.items():  # in unbound pictures there is no relation to judge
        related = np.where(found["binding"] == 1, found["relation"], np.nan)
        result.row(f"relation: bound pairs, {name}", share(related), "25%")

    words = [WORDS[k % len(WORDS)] for k in range(max(len(WORDS), lab.n))]
    says, scenes = [f"a sign that says {word}" for word in words], list(map(sign_scene, words))
    emb = lab.true_emb(scenes)
    signs = {"true pictures": pictures_of(scenes, S),
             "true embedding alone": lab.draw(says, given=emb, say=False),
             "unCLIP": lab.draw(says)}
    closest = (emb @ lab.clip.encode_text(says[:len(WORDS)])[0].cpu().T).argmax(1)
    read = {name: hold([{read_word(p)} for p in drawn], words) for name, drawn in signs.items()}
    ours, letters = read["unCLIP"], np.array([len(word) for word in words])
    named = hold([{WORDS[k]} for k in closest], words)
    shown = [{thing.shape for thing in judge(picture).things} for picture in signs["unCLIP"]]
    signed = hold(shown, ["sign"] * len(words))
    for name, right in {
        "word: CLIP, true pictures": named,
        "a sign is drawn by unCLIP": signed,
        **{f"word read off {name}": right for name, right in read.items()},
        **{f"word of {k} letters read off unCLIP": ours[letters == k] for k in (3, 4)},
    }.items():
        result.row(name, share(right), "-" if right is signed else f"{1 / len(WORDS):.0%}")
    result.claim("words, points: CLIP names them in true pictures, minus they can be read in "
                 "unCLIP's", lambda c, v: (c - v).mean(), named, ours, unit=100)
    result.claim("signs, points: unCLIP draws one minus its word can be read",
                 lambda s, v: (s - v).mean(), signed, ours, unit=100)
    for size in SIZES:
        result.row(f"shape of a {size} object, true embedding alone", share(shape_kept(lab, size)),
                   f"{1 / len(SHAPES):.0%}")
    result.picture = sheet({"unCLIP": drawn["unCLIP"], "word, unCLIP": signs["unCLIP"],
                            "word, true embedding alone": signs["true embedding alone"]})
    return result


def shape_kept(lab, size):
    """1 where a picture drawn from the true embedding of an object of this size has its shape."""
    scenes = [s for _, s in single_objects(Shapes(max(200, 8 * lab.n), SPLIT, lab.seed + 4))
              if s.things[0].size == size][:max(12, lab.n // 2)]
    drawn = lab.draw(["a shape"] * len(scenes), lab.true_emb(scenes), scale=1.0, say=False)
    return hold([{the_thing(judge(p)).shape} for p in drawn], [s.things[0].shape for s in scenes])


def hold(answers, wanted):
    """1 where a set of answers holds what is wanted, else 0."""
    return np.array([float(w in a) for a, w in zip(answers, wanted, strict=True)])


def sign_scene(word, x=0.5, y=0.5, radius=0.37):
    """A sign with a word on gray: what "a sign that says WORD" should look like."""
    return Scene((SIGN(x=x, y=y, radius=radius),), "gray", (128, 128, 128), word=word)


@lru_cache
def word_views():
    """Every word on signs of every size, at whole and half pixels: {half sides of a window: (its
    words, its drawings (words, height * width))}."""
    views = {}
    for radius in (0.34, 0.37, 0.40):
        half = round(0.75 * radius * S), round(0.28 * radius * S)
        words, *places = zip(*product(WORDS, (0.5, 0.5 + 0.5 / S), (0.5, 0.5 + 0.5 / S)))
        drawings = [np.asarray(render(sign_scene(*sign, radius), S).convert("L"), float)
                    for sign in zip(words, *places)]
        views[half] = words, np.stack([window(d, S // 2, S // 2, half) for d in drawings])
    return views


def read_word(picture):
    """The word whose drawings correlate best with the sign in a picture, or None without a sign.
    The judge knows the sign's place to a pixel or two, so each drawing is tried at several."""
    grey, best = at_judging_size(picture).mean(-1), (-1.0, None)
    for sign in [thing for thing in judge(picture).things if thing.shape == "sign"][:1]:
        x, y = int(sign.x * S), int(sign.y * S)
        for half, dx, dy in product(word_views(), range(-2, 3), range(-2, 3)):
            words, drawings = word_views()[half]
            there = window(grey, x + dx, y + dy, half)
            if len(there) == drawings.shape[1]:  # whole, not cut by the picture's edge
                alike = drawings @ there
                best = max(best, (float(alike.max()), words[alike.argmax()]))
    return best[1]


def window(picture, x, y, half):
    """The pixels around (x, y), as one vector of mean 0 and length 1: products of two such vectors
    are correlations. half: half the window's width and height."""
    pixels = picture[max(0, y - half[1]):y + half[1], max(0, x - half[0]):x + half[0]].ravel()
    pixels = pixels - pixels.mean()
    return pixels / (np.linalg.norm(pixels) + 1e-6)


CHANCE = {"colour": 1 / 6, "shape": 1 / 5, "size": 1 / 2,  # captions mention these, never the rest
          **dict.fromkeys(("place, across", "place, down", "rotation", "shade"), 1 / 2)}
MENTIONED = ("colour", "shape", "size")


def kept(seen, true):
    """Which attributes of scenes came through: {name: (n,) of 1, 0, or NaN where none is seen}.

    seen: the judge's things, true: the scenes'. A number is right if it is on the same side of the
    median as the true one. It counts only where the shape came out right."""
    pairs = list(zip(seen, true, strict=True))

    def side(value, without=None):
        middle = np.median([value(t) for t in true if t.shape != without])
        return np.array([float((value(s) > middle) == (value(t) > middle))
                         if s.shape == t.shape != without else np.nan for s, t in pairs])

    return {part: np.array([float(getattr(s, part) == getattr(t, part)) for s, t in pairs])
            for part in MENTIONED} | {
        "place, across": side(lambda t: t.x), "place, down": side(lambda t: t.y),
        "rotation": side(lambda t: t.angle, without="circle"),
        "shade": side(lambda t: max(t.rgb) / max(COLOURS[t.colour])),
    }


def survival(name, values):
    """The share right, or its interval, with chance taken out: 0 to 1."""
    return (np.asarray(values) - CHANCE[name]) / (1 - CHANCE[name])


def f10(lab):
    """What of a picture survives in its embedding, and does a pasted word fool the decoder?

    Scenes of one object, redrawn by DDIM from embedding and inverted noise (eta 0 and 1), and from
    the embedding alone. Survival: the share right with chance taken out; 0 is chance, 1 unchanged.
    A number is right if it stays on its side of the median. Then a sign with a word is pasted over
    part of the object: CLIP's zero-shot label, and what the decoder draws.
    paper: figs. 3, 6: semantics stay, details change; the decoder still draws the object"""
    scenes = [s for _, s in single_objects(Shapes(max(200, 6 * lab.n), SPLIT, lab.seed + 3))]
    scenes, pipeline = scenes[:max(12, lab.n // 2)], lab.pipeline()
    emb, seeds = lab.true_emb(scenes), range(lab.seed, lab.seed + len(scenes))
    drawn = redrawn(pipeline, pictures_of(scenes, pipeline.sizes[0]), emb, seeds)
    drawn = {f"eta {eta}": pipeline.upsample(p, seeds, S).cpu() for eta, p in enumerate(drawn)}
    drawn["embedding alone"] = lab.draw(["a shape"] * len(emb), emb, scale=1.0, say=False)
    things = [s.things[0] for s in scenes]
    survived = {name: kept([the_thing(judge(p)) for p in pictures], things)
                for name, pictures in drawn.items()}
    result = Result(["attribute", *drawn])
    for part in CHANCE:
        result.row(part if part in MENTIONED else f"{part}, never mentioned", *(
            percent(survival(part, share_interval(x[part]))) for x in survived.values()))

    def gap(*values):
        left = [survival(part, np.nanmean(v)) for part, v in zip(CHANCE, values, strict=True)]
        return np.mean(left[:len(MENTIONED)]) - np.mean(left[len(MENTIONED):])

    for name in ("eta 1", "embedding alone"):
        result.claim(f"{name}, points: survival of what captions mention minus that of the rest",
                     gap, *survived[name].values(), unit=100)
    attacked, again = typographic_attack(lab, scenes, result)
    result.picture = sheet({"source": pictures_of(scenes, S), **drawn, "attacked": attacked,
                            "drawn from its embedding": again})
    return result


def with_sign(scene, word):
    """A scene of one object with a sign pasted over it."""
    thing, radius = scene.things[0], 0.22
    # From the object's middle towards the picture's, so that part of the object stays visible.
    away = (0.10 + 0.55 * thing.radius) * (1 if thing.y < 0.5 else -1)
    sign = SIGN(x=min(max(thing.x, radius), 1 - radius), y=thing.y + away, radius=radius)
    return replace(scene, things=(thing, sign), word=word)


def typographic_attack(lab, scenes, result):
    """Paste a sign on each object. Adds to the result how CLIP labels the picture, as "a COLOUR
    SHAPE" or "a sign that says WORD", and what the decoder draws; returns both pictures."""
    labels = [with_article(f"{c} {s}") for c in COLOURS for s in SHAPES]
    labels += [f"a sign that says {word}" for word in WORDS]
    colours, rng = [s.things[0].colour for s in scenes], np.random.default_rng(lab.seed)
    attacked = [with_sign(scene, str(rng.choice([word for word in WORDS if word != colour])))
                for scene, colour in zip(scenes, colours, strict=True)]
    text_emb, emb = lab.clip.encode_text(labels)[0].cpu(), lab.true_emb(attacked)
    drawn = lab.draw(["a shape"] * len(emb), emb, scale=1.0, say=False)
    seen = [{thing.colour for thing in judge(picture).things} for picture in drawn]
    chance = hold(seen, colours[1:] + colours[:1])

    def named(emb):  # the word after the article: a colour, or "sign"
        return [{labels[k].split()[1]} for k in (emb @ text_emb.T).argmax(1).tolist()]

    after, draws = hold(named(emb), colours), hold(seen, colours)
    for row, values in {
        "CLIP names the object's colour": hold(named(lab.true_emb(scenes)), colours),
        "with a word pasted on it, CLIP names the colour": after,
        "with a word pasted on it, CLIP names a word": hold(named(emb), ["sign"] * len(scenes)),
        "the decoder then draws the object's colour": draws,
        "where CLIP names it no more, the decoder draws it": np.where(after == 0, draws, np.nan),
        "by chance: the decoder draws the next scene's colour": chance,
    }.items():
        result.row(row, "-", "-", share(values))
    # The paper's claim is about the pictures that fool CLIP.
    result.claim("where CLIP is fooled, points: the decoder draws the object's colour minus chance",
                 lambda a, d, c: (d - c)[a == 0].mean(), after, draws, chance, unit=100)
    return pictures_of(attacked, S), drawn
