"""Claims about the classifier of real pictures, and what is measured with it."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lab import classifier, evaluate
from lab.classifier import Classifier, labelled, load_classifier, nearest, part_of
from support.pictures import load_data
from support.tools import UserError

COLOURS = {"a red circle": (200, 40, 40), "a blue circle": (40, 40, 200), "a star": (40, 200, 40)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of three colours, 40 pictures a colour, with noise: to train and to test on."""
    rng, made = np.random.default_rng(0), []
    for split in ("train", "test"):
        made.append(tmp_path_factory.mktemp(split))
        with open(made[-1] / "metadata.jsonl", "w") as f:
            for k, (caption, colour) in enumerate(list(COLOURS.items()) * 40):
                pixels = rng.normal(colour, 30, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(made[-1] / f"{k}.png")
                f.write(json.dumps({"file_name": f"{k}.png", "text": [caption, "it"]}) + "\n")
    return made


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "classifier.pt"
    assert classifier.main(["--root", str(folders[0]), "--test", str(folders[1]), "--epochs", "8",
                            "--out", str(path)]) == 0
    return path


def test_it_learns_classes_from_captions_and_is_read_back(folders, trained, capsys):
    model, test = load_classifier(trained), load_data("folder", folders[1], None)
    assert len(test) == 120  # all of them: nothing is kept for validation
    pictures, labels, classes = labelled(test, model.classes)
    assert classes == sorted((caption, "it") for caption in COLOURS)
    named, features = model.look(pictures.float() / 127.5 - 1)
    assert (named == labels).float().mean() > 0.95
    mirrored = model.look(pictures.flip(-1).float() / 127.5 - 1)[1]
    torch.testing.assert_close(features, mirrored, rtol=1e-2, atol=1e-2)  # both are looked at


def test_of_cifars_own_format_one_split_is_taken_and_of_a_folder_all(monkeypatch):
    monkeypatch.setattr(classifier, "load_data", lambda *asked: asked)
    assert classifier.whole("cifar100", "both", "train") == ("cifar100", "both", "train")
    assert classifier.whole("folder", "one", "train") == ("folder", "one", None)


def test_pictures_that_all_have_captions_of_their_own_are_no_classes(folders):
    class Captioned:
        name = "folder"

        def __len__(self):
            return 100

        def captions(self, i):
            return [f"picture {i}"]

    with pytest.raises(UserError, match="100 different captions for 100 pictures"):
        labelled(Captioned())
    some = part_of(load_data("folder", folders[0], None), range(9))  # of known classes any number
    assert len(labelled(some, sorted((caption, "it") for caption in COLOURS))[0]) == 9
    with pytest.raises(UserError, match="knows no class of captions like"):
        labelled(some, [("a cat", "it")])
    for name in ("coco", "shapes"):
        with pytest.raises(UserError, match=f"--data {name}: pictures with classes are"):
            classifier.whole(name, folders[0], "val")


def test_the_nearest_training_picture_of_a_training_picture_is_itself(folders, monkeypatch):
    data, shown = load_data("folder", folders[0], None), []
    monkeypatch.setattr(classifier, "draw_grid", lambda pictures, **layout: shown.append(pictures))
    torch.manual_seed(0)
    model = Classifier(labelled(data)[2]).eval()
    drawn = torch.stack([data.image(i, 32) for i in (5, 60, 99)])
    nearest(model, drawn, data)
    torch.testing.assert_close(shown[0][3:6], drawn, rtol=0, atol=0.01)


def test_some_pictures_of_a_data_set_are_its_own(folders):
    data = load_data("folder", folders[0], None)
    some = part_of(data, [7, 3])
    assert len(some) == 2 and some.captions(1) == data.captions(3)
    torch.testing.assert_close(some.image(0, 16), data.image(7, 16))


def test_classes_are_measured_from_text_and_true_embeddings(micro_run, folders, trained, tmp_path):
    file = tmp_path / "table.json"
    assert evaluate.main(["classes", "--weights", str(micro_run), "--root", str(folders[1]),
                          "--train", str(folders[0]), "--classifier", str(trained), "-n", "60",
                          "--steps", "2", "--prior-steps", "2", "--json", str(file),
                          "--out", str(tmp_path)]) == 0
    table = json.loads(file.read_text())
    real = table.pop("training pictures")
    assert real["right"] > 0.95 and real["n"] == 60  # the true ones are the bar
    seen = table.pop("CLIP")
    assert seen["n"] == 120
    assert list(table) == [f"{given}, guidance {scale}" for given in ("text", "true_embedding")
                           for scale in (1, 2, 4)]
    for row in table.values():  # untrained stages draw noise
        assert row["right"] < 0.7 and row["frechet"] > real["frechet"]
    assert (tmp_path / "classes_text_2.png").exists() and (tmp_path / "nearest.png").exists()

    shutil.copy(micro_run / "clip.pt", tmp_path)  # where there is no decoder yet
    assert evaluate.main(["classes", "--weights", str(tmp_path), "--root", str(folders[1]),
                          "--train", str(folders[0]), "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == {"CLIP": seen}


def test_real_pictures_are_redrawn_and_edited(micro_run, folders, trained, tmp_path, monkeypatch):
    """Where drawing gives back the source, reconstructions are right, and so is theta 0 alone."""
    def turned(pipeline, picture, emb, direction, thetas, seed):
        return torch.cat([picture if theta < 0.3 else -picture for theta in thetas])

    monkeypatch.setattr(classifier, "redrawn", lambda pipeline, x, *_: (x, torch.zeros_like(x)))
    monkeypatch.setattr(classifier, "edit", turned)
    file = tmp_path / "table.json"
    assert evaluate.main(["class_edits", "--weights", str(micro_run), "--root", str(folders[1]),
                          "--classifier", str(trained), "-n", "40", "--edits", "30",
                          "--json", str(file), "--out", str(tmp_path)]) == 0
    table = json.loads(file.read_text())
    assert table["true"]["right"] == table["reconstruction"]["right"] > 0.9
    assert table["variation"]["right"] < 0.8 and table["variation"]["psnr"] < 20
    for theta, row in table.items():
        if "theta" in row:
            assert row["n"] == 30 and (row["old"] > 0.9) == (theta < "theta 0.3")
    assert (tmp_path / "class_edits.png").exists()
