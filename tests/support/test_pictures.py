"""Claims about pictures from disk, in the formats found outside, and about writing pictures."""

import json
import os
import pickle
import time
from collections import Counter
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import datasets

from support.pictures import load_data
from support.sheets import save_picture, to_pil, to_tensor
from support.tools import UserError, say


def save_alone(root, picture, name="only.png", **options):
    """A folder with a single captioned picture, loaded -> its data set."""
    picture.save(root / name, **options)
    (root / name).with_suffix(".txt").write_text("a picture\n")
    return load_data("folder", root)


def centre(dataset, i=0):
    """The colour in the middle of a picture, in 0 to 255."""
    return ((dataset.image(i, 8)[:, 4, 4] + 1) * 127.5).tolist()


def both(kind, root):
    """The training and the validation pictures."""
    return [load_data(kind, root, split) for split in ("train", "val")]


def fails(words, *args, **options):
    """load_data fails with a UserError of one line that matches the words."""
    with pytest.raises(UserError, match=words) as caught:
        load_data(*args, **options)
    assert "\n" not in str(caught.value)


def test_tensors_map_0_to_minus_1_and_255_to_1_channels_first_and_back():
    picture = Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8))  # one pixel
    assert_close(to_tensor(picture), torch.tensor([-1, 1, -0.6]).view(3, 1, 1))
    assert to_pil(to_tensor(picture)) == picture
    assert to_pil(9 * to_tensor(picture)).getpixel((0, 0)) == (0, 255, 0)  # fixed limits: clipped


PALETTE = Image.new("RGB", (6, 6), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE)
CLEAR = {"transparency": PALETTE.getpixel((0, 0))}  # of a palette's entries


@pytest.mark.parametrize("picture, name, options, colour", [
    (Image.new("L", (6, 6), 90), "a.png", {}, (90, 90, 90)),
    (PALETTE, "a.png", {}, (200, 100, 50)),
    (PALETTE, "a.png", CLEAR, (255, 255, 255)),
    (Image.new("RGBA", (6, 6), (255, 0, 0, 51)), "a.png", {}, (255, 204, 204)),  # a fifth of red
    (Image.new("LA", (6, 6), (0, 102)), "a.png", {}, (153, 153, 153)),
    (Image.new("CMYK", (6, 6), (255, 0, 255, 0)), "a.jpg", {}, (0, 255, 0)),
])
def test_every_kind_of_picture_becomes_its_rgb(tmp_path, picture, name, options, colour):
    assert centre(save_alone(tmp_path, picture, name, **options)) == pytest.approx(colour, abs=3)


def test_a_phone_photo_is_turned_upright_and_its_central_square_kept(tmp_path):
    stored = Image.new("RGB", (20, 40), "red")
    stored.paste("lime", (0, 10, 20, 30))
    stored.paste("blue", (0, 10, 10, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise to show it, so left becomes top
    shown = to_pil(save_alone(tmp_path, stored, exif=exif).image(0, 20))
    assert shown.getcolors() == [(200, (0, 255, 0)), (200, (0, 0, 255))]
    assert shown.crop((0, 0, 20, 10)).getcolors() == [(200, (0, 0, 255))]


@pytest.mark.parametrize("name, size", [("a.png", 48), ("a.png", 300), ("a.jpg", 48)])
def test_a_window_of_a_photo_equals_a_cut_out(tmp_path, name, size):
    texture = np.random.default_rng(0).integers(0, 256, (30, 37, 3)).astype(np.uint8)
    dataset = save_alone(tmp_path, Image.fromarray(texture).resize((370, 300)), name)
    cut_out = dataset.image(0, size)[:, 5:37, 11:43]
    assert_close(dataset.image(0, size, crop=(5, 11, 32)), cut_out, rtol=0, atol=2 / 127.5)


def test_a_picture_that_cannot_be_written_whole_leaves_the_one_before(tmp_path):
    path, picture = tmp_path / "new" / "a.png", Image.new("RGB", (4, 4), "red")
    save_picture(picture, path)
    whole = path.read_bytes()

    def half(file, **options):
        file.write_bytes(b"half a picture")
        raise OSError("no space left on device")

    picture.save = half
    with pytest.raises(UserError, match="cannot write .*a.png: no space left"):
        save_picture(picture, path)
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [("a.png", whole)]


def write_folder(root, pictures):
    """pictures: {file name: (colour, caption or list of captions)}"""
    for name, (colour, _) in pictures.items():
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), colour).save(root / name)
    rows = [{"file_name": name, "text": text} for name, (_, text) in pictures.items()]
    (root / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))


def test_a_folder_gives_each_picture_one_caption_or_several(tmp_path):
    write_folder(tmp_path, {"in/a.png": ("red", "one"), "b.png": ("blue", ["two", " three ", ""])})
    found = sorted((s.captions(0), centre(s)) for s in both("folder", tmp_path))
    assert found == [(["one"], [255, 0, 0]), (["two", "three"], [0, 0, 255])]


CSV = 'file_name,text\r\na.png,"a ""big"", red\ncircle"\r\na.png,two\r\n'
ROW = '{"file_name": "caf%s.png", "text": "hot"}'
ACCENTS = "\u00e9", "e\u0301"  # both forms that Unicode has


@pytest.mark.parametrize("picture, name, content, captions", [
    *((f"caf{x}.png", "metadata.jsonl", (ROW % y).encode(), ["hot"])
      for x, y in (ACCENTS, ACCENTS[::-1])),
    (f"{ACCENTS[0]}.png", f"{ACCENTS[1]}.txt", b"hot", ["hot"]),
    ("a.png", "a.txt", "first\r\n\r\n second \r\n".encode("utf-8-sig"), ["first", "second"]),
    ("a.png", "a.txt", "one\u2028and\x85more\ntwo".encode(), ["one\u2028and\x85more", "two"]),
    ("a.png", "a.txt", "кот".encode("utf-16"), ["кот"]),
    ("cafe.png", "metadata.jsonl", (ROW % "e").replace("hot", "a\u2028b").encode("utf-16"),
     ["a\u2028b"]),
    ("a.png", "metadata.csv", CSV.encode("utf-8-sig"), ['a "big", red\ncircle', "two"]),
])
def test_captions_are_read_as_others_write_them(tmp_path, picture, name, content, captions):
    Image.new("RGB", (9, 9)).save(tmp_path / picture)
    (tmp_path / name).write_bytes(content)
    assert load_data("folder", tmp_path).captions(0) == captions


def test_linked_folders_and_all_suffixes_are_found_and_hidden_files_are_not(tmp_path, capsys):
    root, away = tmp_path / "root", tmp_path / "away"
    for path in (root / "a.png", root / "._b.png", root / ".old/c.png", away / "d.jfif",
                 away / "e.PPM", away / "f.webp", root / "g.tif", tmp_path / "h.png"):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
        path.with_suffix(".txt").write_bytes(b"\xff" if "." in path.stem else path.name.encode())
    (root / "g.txt").unlink()
    (root / "link").symlink_to(away)
    say.cache_clear()
    captions = [s.captions(i)[0] for s in both("folder", root) for i in range(len(s))]
    assert sorted(captions) == ["a.png", "d.jfif", "e.PPM", "f.webp"]
    line = "folder: 5 pictures found; 1 without a caption: g.tif; 3 train; 1 val"
    assert capsys.readouterr().out.splitlines() == [line]  # once for both


def test_a_limit_is_a_draw_from_all_that_is_the_same_for_a_seed(tmp_path, monkeypatch):
    write_folder(tmp_path, {f"{kind}/{k}{kind}.png": ("red", kind)
                            for kind in ("cat", "dog", "ship", "truck") for k in range(50)})
    looked = []
    monkeypatch.setattr("support.pictures.ThreadPool", lambda: ThreadPool(2))
    monkeypatch.setattr("support.pictures.is_whole",
                        lambda path: looked.append(path) or not time.sleep(0.003))
    first, again, other = (load_data("folder", tmp_path, "train", 40, x).items for x in (0, 0, 1))
    assert first == again != other and len(looked) < 3 * 150  # of 185
    counts = Counter(captions[0] for _, captions in first)
    assert len(counts) == 4 and min(counts.values()) >= 4


def test_train_and_val_share_no_file_and_stay_as_they_are_when_files_are_added(tmp_path):
    def parts(count):
        write_folder(tmp_path, {f"{k}.png": ("red", f"{k}") for k in range(count)})
        return [{path.name for path, _ in data.items} for data in both("folder", tmp_path)]

    (train, val), (more_train, more_val) = parts(100), parts(140)
    assert len(train | val) == 100 and not train & val and 1 <= len(val) <= 12
    assert train <= more_train and val <= more_val
    assert len(load_data("folder", tmp_path, limit=7)) == 7


def test_a_fingerprint_changes_with_captions_and_files(tmp_path):
    write_folder(tmp_path, {"a.png": ("blue", "one")})
    seen = [load_data("folder", tmp_path).fingerprint()]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "two"}')
    seen.append(load_data("folder", tmp_path).fingerprint())
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert load_data("folder", tmp_path).fingerprint() not in seen and seen[0] != seen[1]


def test_missing_and_unreadable_files_are_skipped_and_named(tmp_path, capsys, monkeypatch):
    names = "good bad bomb cut end gone grey pipe spoilt strange".split() + ["x" * 300, "\x1b[2J"]
    rows = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-9])
    (tmp_path / "spoilt.png").write_bytes(whole[:50] + b"?" + whole[51:])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8))
    noise.save(tmp_path / "end.png", "JPEG")
    os.truncate(tmp_path / "end.png", os.path.getsize(tmp_path / "end.png") - 99)
    noise.save(tmp_path / "strange.png", "PCX")
    # This JPEG's EXIF is broken, which Pillow meets when it turns the picture upright.
    noise.save(tmp_path / "bad.png", "JPEG", dpi=(72, 72), exif=b"Exif\0\0no")
    Image.fromarray(np.full((6, 6), 1000, dtype=np.uint16)).save(tmp_path / "grey.png")
    monkeypatch.setattr("support.pictures.MOST_PIXELS", 1000)
    Image.new("L", (80, 80)).save(tmp_path / "bomb.png")
    say.cache_clear()
    shown = {s.captions(0)[0]: s.image(0, 8).shape for s in both("folder", tmp_path)}
    assert shown == {"good": (3, 8, 8), "bad": (3, 8, 8)}
    said = capsys.readouterr()
    assert f"; 3 missing: ?[2J.png, gone.png, {'x' * 60}; " in said.out
    assert "folder; 7 skipped, broken or too large: bomb.png, cut.png, end.png, ..." in said.err


GOOD = '{"file_name": "a.png", "text": "a"}\n'
BAD = ("{broken", '["a.png"]', '{"file_name": "a.png"}', '{"text": 5, "file_name": ""}',
       '{"text": {"en": "a"}, "file_name": "a.png"}')


@pytest.mark.parametrize("name, content, options, words", [
    ("a", b"", {"name": "flowers"}, "data 'flowers': use one of"),
    ("a", b"", {"root": None}, "needs its folder"),
    ("a", b"", {"root": "/absent"}, "not a folder"),
    ("a", b"", {}, "no captions"),
    ("a.txt", b"\xff a cat", {}, "a.txt: .* save it as UTF-8"),
    ("metadata.csv", b"file;text\na.png;a", {}, "metadata.csv, line 2: .*file_name,text"),
    ("metadata.csv", b'file_name,text\na.png,"a\n', {}, "quotation marks"),
    ("metadata.csv", b"file_name,text\na.png,a cat, asleep", {}, "line 2: .*,\"a caption, say"),
    ("metadata.jsonl", GOOD.encode(), {}, "none of 1 captioned images"),
    *(("metadata.jsonl", (GOOD + bad).encode(), {}, "metadata.jsonl, line 2: ") for bad in BAD),
])
def test_mistakes_with_folders_are_told_in_one_line(tmp_path, name, content, options, words):
    (tmp_path / "a.png").touch()
    (tmp_path / name).write_bytes(content)
    fails(words, **{"name": "folder", "root": tmp_path, **options})


def write_coco(table, folder, captions, names):
    """captions: [(file name, caption)]; names: the files that exist."""
    folder.mkdir()
    table.parent.mkdir(exist_ok=True)
    for k, name in enumerate(names):
        Image.new("RGB", (12, 12), (50 * k, 0, 0)).save(folder / name)
    images = [{"id": name[0], "file_name": name, "height": 12} for name in dict(captions)]
    notes = [{"image_id": name[0], "caption": text} for name, text in captions]
    notes.append({"image_id": 7, "caption": "of an image that is not listed"})
    table.write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))


def test_coco_gives_all_captions_of_an_image_and_skips_missing_ones(tmp_path, capsys):
    captions = [("2.jpg", "a cat"), ("1.jpg", "a dog"), ("2.jpg", " a kitten \n"), ("3.jpg", "no")]
    table = tmp_path / "annotations/captions_val2017.json"
    write_coco(table, tmp_path / "val2017", captions, ["1.jpg", "2.jpg"])
    coco = load_data("coco", tmp_path, "val")
    assert [coco.captions(i) for i in range(len(coco))] == [["a dog"], ["a cat", "a kitten"]]
    assert [centre(coco, i)[0] for i in range(2)] == pytest.approx([0, 50], abs=3)
    assert "1 missing: 3.jpg" in capsys.readouterr().out
    # val must not leak into train
    fails("captions_train2017.json.* captions_all.json", "coco", tmp_path, "train")
    table.rename(table.with_name("captions_all.json"))  # as advised
    assert [len(data) for data in both("coco", tmp_path)] == [1, 1]


@pytest.mark.parametrize("table, folder", [
    ("annotations/captions_{}2014.json", "{}2014"), ("captions_{}2014.json", "images/{}2014"),
    ("annotations/captions_{}2017.json", "images/{}2017"), ("x/captions_{}2017.json", "{}2017"),
])
def test_each_layout_of_coco_is_known(tmp_path, table, folder):
    for split in ("train", "val"):
        (tmp_path / folder.format(split)).parent.mkdir(exist_ok=True)
        names = [f"{k}{split}.png" for k in range(2)]
        write_coco(tmp_path / table.format(split), tmp_path / folder.format(split),
                   [(name, name) for name in names], names)
        for folder_of_others in ("0", "z"):
            (tmp_path / folder_of_others).mkdir(exist_ok=True)
            Image.new("RGB", (9, 9)).save(tmp_path / folder_of_others / names[0])
        coco = load_data("coco", tmp_path, split)
        assert coco.items == [(tmp_path / folder.format(split) / name, [name]) for name in names]


def test_a_single_coco_file_is_divided_into_train_and_val(tmp_path):
    names = [f"{k}.png" for k in range(5)]
    captions = [(name, name) for name in names]
    write_coco(tmp_path / "captions_all.json", tmp_path / "photos", captions, names)
    (tmp_path / "captions_a.json").write_text("{}")
    train, val = ([d.captions(i)[0] for i in range(len(d))] for d in both("coco", tmp_path))
    assert sorted(train + val) == names and val


@pytest.mark.parametrize("content, words", [
    ('{"images": [],\n oops}', "line 2"), ('{"images": []}', "KeyError.'annotations'"),
    ("[1, 2]", "TypeError"), ('{"images": [], "annotations": []}', "none of 0"),
    ('{"images": [], "annotations": [{"image_id": 1, "caption": null}]}', "AttributeError"),
])
def test_mistakes_with_coco_files_are_told_in_one_line(tmp_path, content, words):
    (tmp_path / "captions_all.json").write_text(content)
    fails(words, "coco", tmp_path, "val")


def test_cifar_pairs_pictures_with_captions_of_their_class(tmp_path, monkeypatch):
    """The six pickles of cifar-10-python.tar.gz, two pictures each; md5 sums are not compared."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for k, name in enumerate([*(f"data_batch_{b}" for b in range(1, 6)), "test_batch"]):
        rows = np.array([[2 * k] * 3072, [2 * k + 1] * 3072], dtype=np.uint8)
        rows[:, :1024] += 100  # the red plane comes first
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [k, 9]}))
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *args: True)
    train, val = both("cifar10", tmp_path)
    assert (len(train), len(val), len(load_data("cifar10", tmp_path, limit=3))) == (10, 2, 3)
    assert train.captions(0)[0] == "a photo of an airplane"
    assert val.captions(0)[0] == "a photo of a dog" and val.captions(1)[1] == "a truck"
    assert centre(train, 5) == pytest.approx([105, 5, 5], abs=1e-3)
    monkeypatch.setattr("support.pictures.TEMPLATES", ("a drawing of {}",))  # other captions
    drawn = load_data("cifar10", tmp_path)
    assert len({data.fingerprint() for data in (train, val, drawn)}) == 3


def test_cifar_that_can_neither_be_found_nor_downloaded_is_a_user_error(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", no_network)
    for name in ("cifar10", "cifar100"):
        fails("no route.*fetch https", name, tmp_path)
