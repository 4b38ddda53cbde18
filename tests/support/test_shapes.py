"""Claims about the drawn world: what scenes hold, how they are drawn, what captions say."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from support.shapes import (
    HELD_OUT, SHAPES, SIZES, WORDS, Scene, Shapes, Thing, parse_caption, render,
)
from support.sheets import to_tensor
from support.tools import UserError

TRAIN = [Shapes(3000).scene(i) for i in range(3000)]


def pairs(scene):
    return [(thing.colour, thing.shape) for thing in scene.things]


def test_a_scene_depends_on_seed_split_and_index_alone():
    few, many = Shapes(20, "train", seed=3), Shapes(1000, "train", seed=3)
    backwards = [(many.scene(i), many.captions(i)) for i in reversed(range(20))][::-1]
    assert [(few.scene(i), few.captions(i)) for i in range(20)] == backwards
    others = Shapes(20, "val", seed=3), Shapes(20, "train", seed=4)
    assert all(few.scene(i) != other.scene(i) for other in others for i in range(20))
    assert len({shapes.fingerprint() for shapes in (few, many, *others)}) == 4


def test_no_change_of_the_code_redraws_the_scenes_of_a_seed():
    # Weights and cached embeddings are made from them: other scenes need another version.
    assert Shapes(5).fingerprint() == "acc8c96dbd4afa6d"
    full = "a large blue star right of a small red star on a gray background"
    assert Shapes(5).captions(2)[::2] == ["a large blue star and a star", full]
    assert Shapes(5).scene(0).things[1].x == pytest.approx(0.443331, abs=1e-6)


def test_held_out_pairs_are_never_in_train_or_val_and_always_in_held_out():
    val, held_out = ([Shapes(500, s).scene(i) for i in range(500)] for s in ("val", "held_out"))
    assert not set(HELD_OUT) & {pair for scene in [*TRAIN, *val] for pair in pairs(scene)}
    hits = [set(HELD_OUT) & set(pairs(scene)) for scene in held_out]
    assert all(hits) and set().union(*hits) == set(HELD_OUT)
    # The first of two things is held out as often as the second.
    two = [pairs(scene) for scene in held_out if scene.relation]
    first = [a in HELD_OUT for a, b in two if (a in HELD_OUT) != (b in HELD_OUT)]
    assert 0.38 < np.mean(first) < 0.62


def test_scenes_come_in_the_stated_shares():
    kinds = Counter("sign" if scene.word else len(scene.things) for scene in TRAIN)
    for kind, share in ((1, 0.42), (2, 0.50), ("sign", 0.08)):
        three_sigma = 3 * math.sqrt(share * (1 - share) / 3000)
        assert abs(kinds[kind] / 3000 - share) < three_sigma
    assert {scene.word for scene in TRAIN} == {None, *WORDS}


def test_things_lie_inside_apart_and_clearly_in_their_relation():
    for scene in (scene for scene in TRAIN if not scene.word):
        for thing in scene.things:
            small, large = SIZES[thing.size]
            assert small <= thing.radius <= large
            for place in (thing.x, thing.y):
                assert thing.radius - 1e-9 <= place <= 1 - thing.radius + 1e-9
        if scene.relation:
            a, b = scene.things
            assert (a.colour, a.shape) != (b.colour, b.shape)
            right, down = b.x - a.x, b.y - a.y
            ways = {"above": down, "below": -down, "left of": right, "right of": -right}
            ahead, across = ways[scene.relation], min(abs(right), abs(down))
            assert ahead >= a.radius + b.radius + 0.03 - 1e-9
            assert across <= 0.5 * ahead + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [64, 256])
def test_a_drawing_covers_the_area_of_its_outline(shape, size):
    thing = Thing("red", shape, "large", 0.5, 0.5, 0.2, 0.3, (255, 255, 255))
    drawn = np.asarray(render(Scene((thing,), "black", (0, 0, 0)), size)).mean() / 255
    sin = math.sin(math.radians(20))
    area = {  # of the outline in the unit circle
        "circle": math.pi, "square": 2.0, "triangle": 3 * math.sqrt(3) / 4,
        "star": 5 * 0.45 * math.sin(math.pi / 5),
        "cross": 8 * sin * math.cos(math.radians(20)) - 4 * sin**2,
    }[shape]
    assert drawn == pytest.approx(area * 0.2**2, rel=0.02)


def test_a_sign_shows_its_word_even_where_it_names_a_shape():
    sign = next(scene for scene in TRAIN if scene.word)
    star, cat = (np.asarray(render(replace(sign, word=word), 128)) for word in ("star", "cat"))
    assert 0 < (star != cat).mean() < 0.1  # other letters on the same panel


def test_a_large_drawing_averages_to_the_small_one():
    for scene in TRAIN[:40]:
        small = to_tensor(render(scene, 64))
        large = torch.nn.functional.avg_pool2d(to_tensor(render(scene, 512)), 8)
        assert (small - large).abs().mean() < 0.02
        # At edges both round to a part of a pixel; a sign's letters are all edge.
        assert (small - large).abs().max() < (0.5 if scene.word else 0.3)


@pytest.mark.parametrize("size, crop", [(64, (13, 21, 32)), (64, (0, 48, 16)), (256, (99, 77, 64))])
def test_a_window_equals_a_cut_out_of_the_whole(size, crop):
    shapes, (top, left, side) = Shapes(60, "val"), crop
    for i in range(60):
        cut = shapes.image(i, size)[:, top : top + side, left : left + side]
        assert_close(shapes.image(i, size, crop), cut, rtol=0, atol=0)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_captions_are_true_and_the_full_one_says_everything_and_the_sparse_one_little(split):
    sizes, shapes, data = Counter(), [], Shapes(1000, split)
    for i in range(1000):
        scene, claims = data.scene(i), [parse_caption(c) for c in data.captions(i)]
        truth = tuple(Thing(t.colour, t.shape, t.size) for t in scene.things)
        assert claims[2] == replace(scene, things=truth, background_rgb=None)
        for level, claim in enumerate(claims):
            for part in ("relation", "background", "word"):
                assert getattr(claim, part) in (None, getattr(scene, part))
            for said, thing in zip(claim.things, truth, strict=True):
                for part in ("colour", "shape", "size"):
                    assert getattr(said, part) in (None, getattr(thing, part))
                sizes[level] += said.size is not None
                shapes.append(said.shape)
    assert sizes[0] < 0.2 * sizes[2] < sizes[1] < sizes[2]
    assert 0.06 < np.mean([shape is None for shape in shapes]) < 0.1  # 12% of 2 in 3 captions


CROSS, SQUARE, SIGN = Thing("red", "cross", "large"), Thing("blue", "square"), Thing(shape="sign")


@pytest.mark.parametrize("text, claim", [
    ("a circle", Scene((Thing(shape="circle"),))),
    ("  An  ORANGE shape. ", Scene((Thing("orange"),))),
    ("a small star on grey", Scene((Thing(None, "star", "small"),), "gray")),
    ("a sign", Scene((SIGN,))),
    ("a sign that says cat on a black background", Scene((SIGN,), "black", word="cat")),
    ("a large red cross to the left of a blue square on white",
     Scene((CROSS, SQUARE), "white", relation="left of")),
    ("a shape and a green star", Scene((Thing(), Thing("green", "star")))),
])
def test_captions_are_parsed(text, claim):
    assert parse_caption(text) == claim


@pytest.mark.parametrize("text", [
    "", "a dog", "red circle", "a red small circle", "a circle near a star", "a circle on red",
    "a circle above", "a circle and a star and a cross", "a sign above a star", "a circle on a",
])
def test_sentences_outside_the_grammar_are_user_errors(text):
    with pytest.raises(UserError, match="grammar"):
        parse_caption(text)
