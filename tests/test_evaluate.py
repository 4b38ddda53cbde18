"""evaluate.py captions: what is drawn for which row, and the figures that come out."""

import json

import pytest
import torch

import evaluate
from data import HELD_OUT, Shapes, parse_caption
from evaluate import wrong_captions

COLUMNS = {"objects", "colours", "shapes", "binding", "relation", "background", "all", "n"}


def run(micro_run, tmp_path, *arguments):
    file = tmp_path / "table.json"
    code = evaluate.main(
        ["captions", "--weights", str(micro_run), "-n", "6", "--steps", "2", "--prior-steps", "2",
         "--json", str(file), *arguments]
    )
    assert code == 0
    return json.loads(file.read_text())


def test_captions_reports_three_rows_of_shares(micro_run, tmp_path, capsys):
    table = run(micro_run, tmp_path, "--out", str(tmp_path))
    assert list(table) == ["true_embedding", "text", "held_out"]
    for row in table.values():
        assert COLUMNS <= set(row) and row["n"] == 6
        assert all(v is None or 0 <= v <= 1 for k, v in row.items() if k != "n")
    assert (tmp_path / "captions_text.png").exists() and "held_out" in capsys.readouterr().out


def test_a_perfect_pipeline_scores_one_everywhere(micro_run, tmp_path, monkeypatch):
    """With the true renderings in place of the drawn pictures, every share is 1."""
    rows = iter(("val", "val", "held_out"))

    def renderings(pipeline, captions, args, image_emb=None):
        data = Shapes(args.n, next(rows), args.seed)
        return torch.stack([data.image(i, 64) for i in range(len(captions))])

    monkeypatch.setattr(evaluate, "draw", renderings)
    table = run(micro_run, tmp_path, "-n", "60")
    for row in table.values():
        assert all(v == 1 for k, v in row.items() if k != "n"), row


def test_the_true_embedding_takes_the_priors_place(micro_run, tmp_path, monkeypatch):
    from sample import Pipeline

    given = []
    decode = Pipeline.decode
    monkeypatch.setattr(
        Pipeline,
        "decode",
        lambda self, emb, *a, **k: given.append(emb) or decode(self, emb, *a, **k),
    )
    run(micro_run, tmp_path)
    clip, data = Pipeline(micro_run).clip, Shapes(6, "val")
    true = clip.encode_image(torch.stack([data.image(i, clip.image_size) for i in range(6)]))
    torch.testing.assert_close(given[0], true, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(given[1], true, atol=1e-2)


def test_held_out_captions_name_pairs_that_training_never_shows():
    data = Shapes(200, "held_out")
    for i in range(len(data)):
        full = parse_caption(data.captions(i)[2])
        assert any((t.colour, t.shape) in HELD_OUT for t in data.scene(i).things)
        assert full.things


class FakeClip:
    """Knows each scene's true captions; `sees` says what it makes of a wrong one."""

    image_size, mean = 64, torch.zeros(1)

    def __init__(self, sees):
        self.sees, self.true = sees, {wrong_captions(Shapes(60, "val").scene(i))[0] for i in TWO}

    def to(self, device):
        return self

    def encode_image(self, images):
        return torch.tensor([[1.0, 0.0]])

    def encode_text(self, captions):
        assert captions[0] in self.true and 3 <= len(captions) <= 4
        return torch.tensor([[1.0, 0.0]] + [self.sees] * (len(captions) - 1)), None, None


TWO = [i for i in range(60) if len(Shapes(60, "val").scene(i).things) == 2]


@pytest.mark.parametrize("sees, share", [([0.0, 1.0], 1.0), ([1.0, 0.0], 0.5), ([2.0, 0.0], 0.0)])
def test_clip_is_right_blind_or_misled(sees, share, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "load_clip", lambda folder: FakeClip(sees))
    file = tmp_path / "clip.json"
    assert evaluate.main(["clip", "--weights", ".", "-n", "60", "--json", str(file)]) == 0
    table = json.loads(file.read_text())
    assert set(table) == {"binding", "shape", "relation"} and table["relation"]["n"] == len(TWO)
    assert all(row["right"] == share and row["n"] > 0 for row in table.values())


def test_wrong_captions_are_wrong_in_one_thing_only():
    for i in TWO:
        scene = Shapes(60, "val").scene(i)
        true, wrong = wrong_captions(scene)
        claim = parse_caption(true)
        for said, there in zip(claim.things, scene.things, strict=True):
            assert (said.colour, said.shape) == (there.colour, there.shape)
        assert claim.relation == scene.relation
        seen = evaluate.Seen(scene.background, scene.things)
        assert evaluate.score(seen, claim)["all"]
        for name, caption in wrong.items():
            score = evaluate.score(seen, parse_caption(caption))
            assert score["colours"] and score["objects"]
            failed = "shapes" if name == "shape" else name
            assert score[failed] is False
            assert score["shapes"] is (name != "shape")


@pytest.mark.parametrize("n", ["0", "-3", "x"])
def test_n_must_be_positive(n, capsys):
    assert evaluate.main(["captions", "-n", n]) == 2
    assert capsys.readouterr().err.startswith("error: ")
