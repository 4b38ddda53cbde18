"""Claims about the judge: it sees what is drawn, and it scores what is claimed."""

import json
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw
from torch.testing import assert_close

from lab import evaluate
from lab import judge as judging
from lab.judge import connected, judge, score, smooth
from support.shapes import (
    BACKGROUNDS, COLOURS, SHAPES, Scene, Shapes, Thing, parse_caption, render,
)


def draw(*things, background="black", size=64):
    """things: (colour, shape, radius, x, y, angle in degrees)"""
    made = [
        Thing(colour, shape, None, x, y, radius, math.radians(angle), COLOURS[colour])
        for colour, shape, radius, x, y, angle in things
    ]
    return render(Scene(tuple(made), background, (BACKGROUNDS[background],) * 3), size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_shape_and_size_is_seen_on_every_background_at_every_angle(colour, shape):
    for background in BACKGROUNDS:
        for radius, size in ((0.13, "small"), (0.16, "small"), (0.20, "large"), (0.24, "large")):
            for angle in (0, 41):
                picture = draw((colour, shape, radius, 0.4, 0.55, angle), background=background)
                seen = judge(picture)
                found = [(thing.colour, thing.shape, thing.size) for thing in seen.things]
                assert (found, seen.background) == ([(colour, shape, size)], background)
                assert seen.things[0].radius == pytest.approx(radius, abs=0.01)
                assert seen.things[0].x == pytest.approx(0.4, abs=0.005)
                assert seen.things[0].y == pytest.approx(0.55, abs=0.005)


@pytest.mark.parametrize("shape, colour, r, x", [("circle", "blue", 0.2, 0.36),
                                                 ("square", "red", 0.24, 0.245)])
def test_touching_colours_and_close_objects_of_one_colour_are_told_apart(shape, colour, r, x):
    picture = draw(("red", "square", r, x, 0.5, 0), (colour, shape, r, x + 2 * r, 0.5, 0))
    found = [(thing.colour, thing.shape) for thing in judge(picture).things]
    assert sorted(found) == sorted([("red", "square"), (colour, shape)])


def test_specks_are_not_objects_and_blobs_have_no_shape():
    picture = draw(("green", "star", 0.2, 0.6, 0.7, 0))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((5, 30, 10, 35), fill=COLOURS["red"])  # 6 pixels wide
    pen.rectangle((10, 10, 54, 13), fill=COLOURS["red"])  # a long thin bar
    found = {(thing.colour, thing.shape) for thing in judge(picture).things}
    assert found == {("green", "star"), ("red", None)}


def test_signs_are_seen_and_no_other_picture_has_one():
    shapes = Shapes(120, "val", seed=5)
    for i in range(120):
        scene, seen = shapes.scene(i), judge(shapes.image(i, 64))
        assert ("sign" in [thing.shape for thing in seen.things]) == (scene.word is not None)


def test_a_grey_patch_too_small_or_too_tall_is_no_sign_and_a_red_background_has_no_name():
    for box in ((20, 20, 40, 32), (2, 30, 62, 36), (20, 4, 50, 60)):
        picture = Image.new("RGB", (64, 64))
        ImageDraw.Draw(picture).rectangle(box, fill=(230, 230, 230))
        assert judge(picture).things == ()
    assert judge(Image.new("RGB", (64, 64), COLOURS["red"])) == Scene(())


@pytest.mark.parametrize("size", [48, 100, 256])
def test_the_size_of_the_picture_does_not_matter(size):
    shapes = Shapes(12, "val")
    for i in range(12):
        seen = judge(shapes.image(i, size))
        assert score(seen, shapes.scene(i))["all"]
        assert seen == judge(render(shapes.scene(i), size))  # a PIL picture


def test_smoothing_keeps_a_plane_and_shrinks_noise_to_three_eighths():
    noise = np.random.default_rng(0).standard_normal((64, 64, 300))
    assert smooth(noise)[8:-8, 8:-8].std() == pytest.approx(3 / 8, abs=0.003)
    plane = np.add.outer(np.arange(64.0), 2 * np.arange(64.0))[:, :, None]
    assert_close(smooth(plane)[1:-1, 1:-1], plane[1:-1, 1:-1])


def test_patches_are_joined_along_edges_not_corners_and_never_across_colours(monkeypatch):
    monkeypatch.setattr(judging, "SPECK", 1)
    index = np.full((64, 64), -1)
    index[0, 0:3] = 2  # touches the frame
    index[1, 3] = 2  # only a corner in common
    index[0, 3] = 5  # another colour beside both
    index[63, :] = 1
    found = {(value, int(mask.sum())) for value, mask in connected(index)}
    assert found == {(2, 3), (2, 1), (5, 1), (1, 64)}


def test_the_judge_is_right_in_99_percent_of_fresh_drawings(tmp_path):
    file = tmp_path / "judge.json"
    assert evaluate.main(["judge", "-n", "100", "--seed", "9", "--json", str(file)]) == 0
    table = json.loads(file.read_text())
    assert list(table) == ["clean", "noise", "blur"]
    for condition, shares in table.items():
        assert shares.pop("n") == 100
        assert min(shares.values()) >= 0.99, condition


RED_BALL = Thing("red", "circle", "large", 0.3, 0.2)
BLUE_BOX = Thing("blue", "square", "small", 0.4, 0.7)
SEEN = Scene((BLUE_BOX, RED_BALL), "black")  # the red circle is above the blue square


@pytest.mark.parametrize("caption, wrong, silent", [
    ("a large red circle above a small blue square on black", "", ""),
    ("a blue square below a red circle", "", "sizes background"),
    ("a shape and a shape", "", "colours shapes binding sizes relation background"),
    ("a red shape and a square", "", "binding sizes relation background"),
    # Colours and shapes are there, but on the wrong things.
    ("a red square and a blue circle", "binding", "sizes relation background"),
    ("a red square above a blue circle", "binding relation", "sizes background"),
    ("a red circle below a blue square", "relation", "sizes background"),
    # 0.5 below and 0.1 to the right: nobody would say "left of"
    ("a red circle left of a blue square", "relation", "sizes background"),
    ("a red circle and a blue square on white", "background", "sizes relation"),
    ("a green circle and a blue square", "colours binding", "sizes relation background"),
    ("a red circle and a red circle", "colours shapes binding", "sizes relation background"),
    ("a red circle", "objects", "sizes relation background"),
    ("a large circle and a large square", "sizes", "colours binding relation background"),
    ("a sign that says cat", "objects shapes", "colours binding sizes relation background"),
])
def test_scores_say_what_is_wrong_and_pass_over_what_is_left_open(caption, wrong, silent):
    result = score(SEEN, parse_caption(caption))
    total = result.pop("all")
    assert [column for column in result if result[column] is False] == wrong.split()
    assert [column for column in result if result[column] is None] == silent.split()
    assert total == (not wrong)


def test_sizes_on_the_wrong_objects_fail_only_the_whole():
    small = Thing("red", "circle", "small", 0.3, 0.8)
    for caption, seen in (("a small red circle and a large blue square", SEEN),
                          ("a small circle above a circle", Scene((RED_BALL, small), "black"))):
        result = score(seen, parse_caption(caption))
        assert not result.pop("all") and False not in result.values()


def test_each_claimed_object_needs_its_own_seen_object():
    twins = Scene((RED_BALL, Thing("red", "star", "small", 0.8, 0.8)), "black")
    assert score(twins, parse_caption("a red star and a red circle"))["binding"]
    assert not score(SEEN, parse_caption("a red circle and a red shape"))["binding"]
    crowd = Scene((*SEEN.things, Thing("green", "star", "small", 0.8, 0.2)), "black")
    result = score(crowd, parse_caption("a red circle above a blue square"))
    assert [column for column in result if result[column] is False] == ["objects", "all"]


def test_shares_count_only_captions_that_mention_the_thing():
    captions = ["a red circle above a blue square", "a red circle below a blue square", "a shape"]
    picture = draw(("red", "circle", 0.22, 0.3, 0.2, 0), ("blue", "square", 0.14, 0.4, 0.7, 0))
    table = judging.shares(judging.scores([picture] * 3, captions))
    assert table["relation"] == 1 / 2 and table["objects"] == 2 / 3 and table["n"] == 3
    assert table["background"] is None
