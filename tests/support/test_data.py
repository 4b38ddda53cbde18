"""Claims about data.py. All files that it reads are made here, in the formats found outside."""

import json
import math
import pickle
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from conftest import ROOT
from support import shapes
from support.pictures import load_data
from support.shapes import Claim, HELD_OUT, SIZES, Scene, Shapes, Thing, parse_caption, render
from support.sheets import to_tensor
from support.tools import UserError

# ---------------------------------------------------------------------------------------- shapes


def pairs(scene):
    return [(thing.colour, thing.shape) for thing in scene.things]


def test_tensors_map_0_to_minus_1_and_255_to_1_channels_first():
    pixels = np.array([[[0, 255, 51]]], dtype=np.uint8)  # one pixel: red 0, green 255, blue 51
    assert_close(to_tensor(Image.fromarray(pixels)), torch.tensor([-1, 1, -0.6]).view(3, 1, 1))


def test_a_scene_depends_on_seed_split_and_index_alone():
    scenes = Shapes(50, "train", seed=3)
    again = Shapes(1000, "train", seed=3)
    backwards = [again.scene(i) for i in reversed(range(50))][::-1]
    assert [scenes.scene(i) for i in range(50)] == backwards
    assert [again.captions(i) for i in range(50)] == [scenes.captions(i) for i in range(50)]
    for other in (Shapes(50, "val", seed=3), Shapes(50, "train", seed=4)):
        assert all(scenes.scene(i) != other.scene(i) for i in range(50))


def test_held_out_pairs_are_never_in_train_or_val_and_always_in_held_out():
    for split in ("train", "val"):
        seen = Counter(pair for i in range(1000) for pair in pairs(Shapes(1000, split).scene(i)))
        assert not set(HELD_OUT) & set(seen)
    held_out = Shapes(400, "held_out")
    hits = [set(HELD_OUT) & set(pairs(held_out.scene(i))) for i in range(400)]
    assert all(hits) and set().union(*hits) == set(HELD_OUT)
    # In a sentence it comes first or second, equally often.
    twos = [pairs(held_out.scene(i)) for i in range(400) if held_out.scene(i).relation]
    first = [a in HELD_OUT for a, b in twos if (a in HELD_OUT) != (b in HELD_OUT)]
    assert 0.38 < np.mean(first) < 0.62


def test_scenes_come_in_the_stated_shares():
    scenes = [Shapes(3000).scene(i) for i in range(3000)]
    kinds = Counter("sign" if scene.word else len(scene.things) for scene in scenes)
    for kind, share in ((1, 0.42), (2, 0.50), ("sign", 0.08)):
        three_sigma = 3 * math.sqrt(share * (1 - share) / 3000)
        assert abs(kinds[kind] / 3000 - share) < three_sigma
    assert len({scene.word for scene in scenes}) == 1 + len(shapes.WORDS)  # 1: no word


def test_things_lie_inside_apart_and_clearly_in_their_relation():
    for i in range(2000):
        scene = Shapes(2000).scene(i)
        if scene.word:
            continue
        for thing in scene.things:
            small, large = SIZES[thing.size]
            assert small <= thing.radius <= large
            for place in (thing.x, thing.y):
                assert thing.radius - 1e-9 <= place <= 1 - thing.radius + 1e-9
        if scene.relation:
            a, b = scene.things
            assert (a.colour, a.shape) != (b.colour, b.shape)
            right, down = b.x - a.x, b.y - a.y
            ahead, across = {
                "above": (down, right),
                "below": (-down, right),
                "left of": (right, down),
                "right of": (-right, down),
            }[scene.relation]
            assert ahead >= a.radius + b.radius + 0.03 - 1e-9
            assert abs(across) <= 0.5 * ahead + 1e-9


def one(shape, radius=0.2, angle=0.0):
    thing = Thing("red", shape, "large", 0.5, 0.5, radius, angle, (255, 255, 255))
    return Scene((thing,), "black", (0, 0, 0))


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("size", [64, 256])
def test_a_drawing_covers_the_area_of_its_outline(shape, size):
    drawn = np.asarray(render(one(shape, angle=0.3), size).convert("L")).mean() / 255
    sin = math.sin(math.radians(20))
    area = {  # of the outline in the unit circle
        "circle": math.pi,
        "square": 2.0,
        "triangle": 3 * math.sqrt(3) / 4,
        "star": 5 * 0.45 * math.sin(math.pi / 5),
        "cross": 8 * sin * math.cos(math.radians(20)) - 4 * sin**2,
    }[shape]
    assert drawn == pytest.approx(area * 0.2**2, rel=0.02)


def test_a_rotation_by_a_quarter_turns_the_picture():
    upright = np.asarray(render(one("triangle"), 64), dtype=float)
    turned = np.asarray(render(one("triangle", angle=math.pi / 2), 64), dtype=float)
    assert np.abs(np.rot90(upright, -1) - turned).mean() < 1  # clockwise; edges may differ a little
    assert np.abs(upright - turned).mean() > 5


def test_a_large_drawing_averages_to_the_small_one():
    for i in range(40):
        scene = Shapes(40, "val").scene(i)
        small = to_tensor(render(scene, 64))
        large = torch.nn.functional.avg_pool2d(to_tensor(render(scene, 512)), 8)
        assert (small - large).abs().mean() < 0.02
        # At edges both round to a part of a pixel; a sign's letters are all edge.
        assert (small - large).abs().max() < (0.5 if scene.word else 0.3)


@pytest.mark.parametrize("size, crop", [(64, (13, 21, 32)), (64, (0, 48, 16)), (256, (99, 77, 64))])
def test_a_window_equals_a_cut_out_of_the_whole(size, crop):
    shapes, (top, left, side) = Shapes(60, "val"), crop
    for i in range(60):
        whole = shapes.image(i, size)
        window = shapes.image(i, size, crop)
        assert_close(window, whole[:, top : top + side, left : left + side], rtol=0, atol=0)


def test_a_sign_may_say_the_name_of_a_shape():
    i = next(i for i in range(300) if Shapes(300).scene(i).word)
    sign = Shapes(300).scene(i)
    star, cat = (np.asarray(render(replace(sign, word=w), 128), float) for w in ("star", "cat"))
    assert 0 < (star != cat).mean() < 0.1  # other letters on the same panel


def test_every_caption_is_true_of_its_scene_and_mentions_every_object():
    for split in ("train", "held_out"):
        shapes = Shapes(600, split)
        for i in range(600):
            scene = shapes.scene(i)
            for caption in shapes.captions(i):
                claim = parse_caption(caption)
                assert len(claim.things) == len(scene.things)
                for said, thing in zip(claim.things, scene.things):
                    for part in ("colour", "shape", "size"):
                        assert getattr(said, part) in (None, getattr(thing, part)), caption
                for part in ("relation", "background", "word"):
                    assert getattr(claim, part) in (None, getattr(scene, part)), caption


def test_the_full_caption_says_everything_and_the_sparse_one_little():
    shapes, said = Shapes(600), Counter()
    for i in range(600):
        scene, claims = shapes.scene(i), [parse_caption(c) for c in shapes.captions(i)]
        truth = tuple(Thing(t.colour, t.shape, t.size) for t in scene.things)
        assert claims[2] == Claim(truth, scene.relation, scene.background, scene.word)
        for level in range(3):
            said[level] += sum(t.size is not None for t in claims[level].things)
    assert said[0] < 0.2 * said[2] < said[1] < said[2]


def test_about_8_percent_of_mentions_say_shape():
    shapes = Shapes(1500)
    claims = [parse_caption(c) for i in range(1500) for c in shapes.captions(i)]
    unnamed = [thing.shape is None for claim in claims for thing in claim.things]
    assert 0.065 < np.mean(unnamed) < 0.095


@pytest.mark.parametrize(
    "text, claim",
    [
        ("a circle", Claim((Thing(shape="circle"),))),
        ("  An  ORANGE shape. ", Claim((Thing("orange"),))),
        ("a small star on grey", Claim((Thing(None, "star", "small"),), None, "gray")),
        ("a sign", Claim((Thing(shape="sign"),))),
        (
            "a sign that says cat on a black background",
            Claim((Thing(shape="sign"),), None, "black", "cat"),
        ),
        (
            "a large red cross to the left of a blue square on white",
            Claim((Thing("red", "cross", "large"), Thing("blue", "square")), "left of", "white"),
        ),
        ("a shape and a green star", Claim((Thing(), Thing("green", "star")))),
    ],
)
def test_captions_are_parsed(text, claim):
    assert parse_caption(text) == claim


@pytest.mark.parametrize(
    "text",
    ["", "a dog", "red circle", "a red small circle", "a circle near a star", "a circle on red",
     "a circle above", "a circle and a star and a cross", "a sign above a star", "a circle on a"],
)
def test_sentences_outside_the_grammar_are_user_errors(text):
    with pytest.raises(UserError, match="grammar"):
        parse_caption(text)


def test_shapes_refuses_bad_splits_sizes_and_indices():
    with pytest.raises(UserError, match="split 'test'"):
        Shapes(5, "test")
    with pytest.raises(UserError, match="at least 1"):
        load_data("shapes", limit=0)
    with pytest.raises(IndexError):
        Shapes(5).scene(5)


def test_a_fingerprint_changes_with_everything_that_changes_the_data(tmp_path):
    made = [Shapes(5), Shapes(6), Shapes(5, "val"), Shapes(5, seed=1)]
    assert len({shapes.fingerprint() for shapes in made}) == 4
    assert Shapes(5).fingerprint() == Shapes(5).fingerprint()

    write_folder(tmp_path, {"a.png": ("blue", "one")})
    first = load_data("folder", tmp_path).fingerprint()
    table = tmp_path / "metadata.jsonl"
    table.write_text(table.read_text().replace("one", "two"))
    second = load_data("folder", tmp_path).fingerprint()
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    third = load_data("folder", tmp_path).fingerprint()
    assert len({first, second, third}) == 3  # another caption, another file


# ------------------------------------------------------------------------------- folders of files


def write_folder(root, pictures):
    """pictures: {file name: (colour, caption or list of captions)}"""
    lines = []
    for name, (colour, text) in pictures.items():
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), colour).save(root / name)
        lines.append(json.dumps({"file_name": name, "text": text}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def save_alone(root, picture, name="only.png", **options):
    """A folder with a single captioned picture, loaded -> its data set."""
    picture.save(root / name, **options)
    (root / name).with_suffix(".txt").write_text("a picture\n")
    return load_data("folder", root)


def centre(dataset, size=8):
    """The colour in the middle of picture 0, in 0 to 255."""
    return ((dataset.image(0, size)[:, size // 2, size // 2] + 1) * 127.5).tolist()


def test_metadata_jsonl_gives_one_caption_or_several(tmp_path):
    write_folder(tmp_path, {"in/a.png": ("red", "one"), "b.png": ("blue", ["two", "three", ""])})
    sets = [load_data("folder", tmp_path, split) for split in ("train", "val")]
    assert [len(s) for s in sets] == [1, 1]
    by_caption = {s.captions(0)[0]: s for s in sets}
    assert by_caption["two"].captions(0) == ["two", "three"]
    assert centre(by_caption["one"]) == [255, 0, 0]
    assert centre(by_caption["two"]) == [0, 0, 255]


def test_a_text_file_beside_an_image_gives_a_caption_a_line(tmp_path):
    dataset = save_alone(tmp_path, Image.new("RGB", (4, 4), "lime"), "a.JPEG")
    assert dataset.captions(0) == ["a picture"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\n\r\n second \r\n")
    assert load_data("folder", tmp_path).captions(0) == ["first", "second"]


def test_train_and_val_share_no_file_and_stay_as_they_are_when_files_are_added(tmp_path):
    write_folder(tmp_path, {f"{k}.png": ("red", f"{k}") for k in range(100)})

    def names(split):
        return {path.name for path, _ in load_data("folder", tmp_path, split).items}

    train, val = names("train"), names("val")
    assert len(train | val) == 100 and not train & val and 1 <= len(val) <= 12
    write_folder(tmp_path, {f"{k}.png": ("red", f"{k}") for k in range(140)})
    assert train <= names("train") and val <= names("val")
    assert len(load_data("folder", tmp_path, "train", limit=7)) == 7


PALETTE = Image.new("RGB", (6, 6), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE)
CLEAR = Image.new("RGBA", (6, 6), (255, 0, 0, 51))  # one fifth red over white


@pytest.mark.parametrize(
    "picture, name, colour",
    [
        (Image.new("L", (6, 6), 90), "a.png", (90, 90, 90)),
        (Image.new("1", (6, 6), 1), "a.png", (255, 255, 255)),
        (PALETTE, "a.png", (200, 100, 50)),
        (CLEAR, "a.png", (255, 204, 204)),
        (Image.new("LA", (6, 6), (0, 102)), "a.png", (153, 153, 153)),
        (Image.new("CMYK", (6, 6), (0, 255, 255, 0)), "a.tif", (255, 0, 0)),
        (Image.new("CMYK", (6, 6), (255, 0, 255, 0)), "a.jpg", (0, 255, 0)),
        (Image.fromarray(np.full((6, 6), 32896, dtype=np.uint16)), "a.png", (128, 128, 128)),
        (Image.fromarray(np.full((6, 6), 65535, dtype=np.uint16)), "a.tif", (255, 255, 255)),
    ],
)
def test_every_kind_of_picture_becomes_its_rgb(tmp_path, picture, name, colour):
    assert centre(save_alone(tmp_path, picture, name)) == pytest.approx(colour, abs=3)


def test_a_palette_entry_can_be_transparent(tmp_path):
    dataset = save_alone(tmp_path, PALETTE, "a.png", transparency=PALETTE.getpixel((0, 0)))
    assert centre(dataset) == [255, 255, 255]


def test_a_phone_photo_is_turned_upright(tmp_path):
    left_red = Image.new("RGB", (16, 16), "blue")
    left_red.paste("red", (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise to show it, so left becomes top
    dataset = save_alone(tmp_path, left_red, "a.jpg", exif=exif, quality=95)
    picture = dataset.image(0, 16)
    assert (picture[0, :6] > 0.8).all() and (picture[0, 10:] < -0.8).all()


def test_the_central_square_is_kept(tmp_path):
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("lime", (10, 0, 30, 20))
    picture = save_alone(tmp_path, wide).image(0, 20)
    assert_close(picture[1], torch.ones(20, 20))
    assert_close(picture[0], -torch.ones(20, 20))


def test_shrinking_averages_a_checkerboard_to_grey(tmp_path):
    board = np.indices((128, 128)).sum(0) % 2 * 255
    picture = save_alone(tmp_path, Image.fromarray(board.astype(np.uint8))).image(0, 16)
    assert picture.abs().max() < 0.05


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("size", [48, 300])
def test_a_window_of_a_photo_equals_a_cut_out(tmp_path, name, size):
    texture = np.random.default_rng(0).integers(0, 256, (30, 37, 3)).astype(np.uint8)
    photo = Image.fromarray(texture).resize((370, 300))
    dataset = save_alone(tmp_path, photo, name)
    window = dataset.image(0, size, crop=(5, 11, 32))
    # atol: two of the 255 levels
    assert_close(window, dataset.image(0, size)[:, 5:37, 11:43], rtol=0, atol=2 / 127.5)


def test_a_picture_of_one_pixel_works(tmp_path):
    dataset = save_alone(tmp_path, Image.new("RGB", (1, 1), "yellow"))
    assert_close(dataset.image(0, 64), torch.tensor([1.0, 1, -1]).view(3, 1, 1).expand(3, 64, 64))


def test_unreadable_and_missing_files_are_skipped_counted_and_named(tmp_path, capsys, monkeypatch):
    names = ["good1.png", "good2.png", "empty.png", "cut.png", "bomb.png", "text.png", "gone.png"]
    write_folder(tmp_path, {name: ("red", name) for name in names})
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good1.png").read_bytes()[:20])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "gone.png").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (80, 80)).save(tmp_path / "bomb.png")  # more than twice the limit
    sets = [load_data("folder", tmp_path, split) for split in ("train", "val")]
    assert sorted(s.captions(0)[0] for s in sets) == ["good1.png", "good2.png"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "folder: skipped 1 missing images: gone.png"
    assert lines[1] == "folder: skipped 4 unreadable images: bomb.png, cut.png, empty.png, ..."


def test_a_file_that_is_cut_short_is_named_when_it_is_drawn(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    dataset = save_alone(tmp_path, Image.fromarray(noise), "half.png")
    content = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="half.png"):
        dataset.image(0, 32)


def test_mistakes_with_folders_are_told_in_one_line(tmp_path):
    def told(match, name="folder", root=tmp_path, **options):
        with pytest.raises(UserError, match=match) as caught:
            load_data(name, root, **options)
        assert "\n" not in str(caught.value)

    told("data 'flowers'", name="flowers")
    told("needs its folder", root=None)
    told("not a folder", root=tmp_path / "absent")
    told("empty")
    (tmp_path / "notes.md").write_text("hello")
    told("no captions")
    told("split 'held_out'", split="held_out")
    told("limit 0", limit=0)
    for line in ("{broken", '["a.png"]', '{"file_name": "a.png"}', '{"text": 5, "file_name": ""}',
                 '{"text": {"en": "a"}, "file_name": "a.png"}'):
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line)
        told("metadata.jsonl, line 2")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    told("none of 1 captioned images")


def test_a_picture_whose_orientation_cannot_be_read_is_skipped_at_once(tmp_path, capsys):
    Image.new("RGB", (12, 12), "red").save(tmp_path / "fine.png")
    # A density of its own, so that Pillow does not look into the EXIF when it opens the file.
    Image.new("RGB", (12, 12), "red").save(tmp_path / "bad.jpg", dpi=(72, 72),
                                           exif=b"Exif\0\0not a TIFF file")
    Image.new("RGB", (12, 12), "red").save(tmp_path / "other.png")
    for name in ("fine", "bad", "other"):
        (tmp_path / f"{name}.txt").write_text("a square")
    folder = load_data("folder", tmp_path, "train")
    assert "skipped 1 unreadable images: bad.jpg" in capsys.readouterr().err
    assert len(folder) + len(load_data("folder", tmp_path, "val")) == 2


def test_captions_that_are_not_utf_8_are_named(tmp_path):
    Image.new("RGB", (12, 12), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("a cat".encode("utf-16"))
    with pytest.raises(UserError, match="a.txt.*save it as UTF-8"):
        load_data("folder", tmp_path, "train")


# ------------------------------------------------------------------------------------------ COCO


def write_coco(root, table, images, folder, captions=None):
    """captions: [(file name, caption)]; images: {file name: colour}, written to root/folder."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, colour in images.items():
        Image.new("RGB", (12, 12), colour).save(root / folder / name)
    ids = {name: 1000 + k for k, name in enumerate(dict(captions))}
    content = {
        "info": {"year": 2017},
        "images": [{"id": k, "file_name": name, "height": 12} for name, k in ids.items()],
        "annotations": [
            {"id": k, "image_id": ids[name], "caption": text}
            for k, (name, text) in enumerate(captions)
        ],
    }
    (root / table).parent.mkdir(parents=True, exist_ok=True)
    (root / table).write_text(json.dumps(content))


def test_coco_gives_all_captions_of_an_image_and_skips_missing_ones(tmp_path, capsys):
    captions = [("2.jpg", "a cat"), ("1.jpg", "a dog"), ("2.jpg", " a kitten \n"), ("3.jpg", "no")]
    table = "annotations/captions_val2017.json"
    write_coco(tmp_path, table, {"1.jpg": "red", "2.jpg": "blue"}, "val2017", captions)
    content = json.loads((tmp_path / table).read_text())
    content["annotations"].append({"id": 99, "image_id": 7, "caption": "of no listed image"})
    (tmp_path / table).write_text(json.dumps(content))
    coco = load_data("coco", tmp_path, "val")
    assert [coco.captions(i) for i in range(2)] == [["a dog"], ["a cat", "a kitten"]]
    assert coco.image(1, 16)[2].mean() > 0.9 > coco.image(0, 16)[2].mean()
    assert "skipped 1 missing images: 3.jpg" in capsys.readouterr().err
    with pytest.raises(UserError, match="captions_train2017.json"):  # val must not leak into train
        load_data("coco", tmp_path, "train")


def test_a_single_coco_file_is_divided_into_train_and_val(tmp_path):
    names = [f"{k}.png" for k in range(30)]
    captions = [(name, "a thing") for name in names]
    write_coco(tmp_path, "captions_all.json", dict.fromkeys(names, "red"), "pictures", captions)
    parts = [{p.name for p, _ in load_data("coco", tmp_path, s).items} for s in ("train", "val")]
    assert parts[0] | parts[1] == set(names) and not parts[0] & parts[1] and parts[1]


def test_mistakes_with_coco_files_name_the_file_and_the_line(tmp_path):
    table = tmp_path / "annotations" / "captions_val2017.json"
    table.parent.mkdir()
    for content, match in (
        ('{"images": [],\n oops}', "captions_val2017.json, line 2: not JSON"),
        ('{"images": []}', "annotations"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}', "caption"),
        ("[1, 2]", "captions_val2017.json"),
        ('{"images": [{"id": 1, "file_name": 5}], "annotations": []}', "5 is not a string"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": '
         '[{"image_id": 1, "caption": null}]}', "None is not a string"),
        ('{"images": [], "annotations": []}', "none of 0"),
    ):
        table.write_text(content)
        with pytest.raises(UserError, match=match):
            load_data("coco", tmp_path, "val")


# ----------------------------------------------------------------------------------------- CIFAR


def write_cifar(root, monkeypatch):
    """The six pickles of cifar-10-python.tar.gz with two pictures each; picture k has the shade k.

    torchvision compares md5 sums with those of the real files: that check is switched off.
    """
    datasets = pytest.importorskip("torchvision.datasets")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for k, name in enumerate([*(f"data_batch_{b}" for b in range(1, 6)), "test_batch"]):
        rows = np.array([[2 * k] * 3072, [2 * k + 1] * 3072], dtype=np.uint8)
        rows[:, :1024] += 100  # the red plane comes first
        batch = {"data": rows, "labels": [k, 9], "filenames": ["a", "b"]}
        (folder / name).write_bytes(pickle.dumps(batch))
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *args: True)


def test_cifar_pairs_pictures_with_captions_of_their_class(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    train, val = (load_data("cifar10", tmp_path, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (10, 2)
    assert train.captions(0)[0] == "a photo of an airplane"
    assert val.captions(0)[0] == "a photo of a dog" and val.captions(1)[1] == "a truck"
    colour = (train.image(5, 32).mean((1, 2)) + 1) * 127.5
    assert_close(colour, torch.tensor([105.0, 5, 5]), rtol=0, atol=1e-3)
    assert train.image(5, 64, crop=(0, 32, 16)).shape == (3, 16, 16)
    assert len(load_data("cifar10", tmp_path, "train", limit=3)) == 3
    assert len({train.fingerprint(), val.fingerprint()}) == 2
    before = train.fingerprint()
    train.templates = ("a drawing of {}",)  # other captions: their embeddings are others, too
    assert train.fingerprint() != before


def test_cifar_that_is_absent_or_corrupt_is_a_user_error(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    downloads = []

    def no_network(*args, **kwargs):
        downloads.append(args)
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(UserError, match="no route to host.*fetch https"):
        load_data("cifar10", tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half a download")
    with pytest.raises(UserError, match="md5"):  # and no second download over it
        load_data("cifar10", tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match="missing or corrupt"):
        load_data("cifar10", tmp_path)
    assert len(downloads) == 1


def test_importing_data_does_not_import_torchvision():
    import subprocess
    import sys

    code = "import sys, support.pictures; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_all_randomness_of_shapes_comes_from_its_seed():
    random.seed(1)
    first = Shapes(3).captions(1)
    random.seed(2)
    assert Shapes(3).captions(1) == first
