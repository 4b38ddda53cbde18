"""evaluate.py captions: what is drawn for which row, and the figures that come out."""

import json

import pytest
import torch

import evaluate
from data import HELD_OUT, Shapes, parse_caption

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


@pytest.mark.parametrize("n", ["0", "-3", "x"])
def test_n_must_be_positive(n, capsys):
    assert evaluate.main(["captions", "-n", n]) == 2
    assert capsys.readouterr().err.startswith("error: ")
