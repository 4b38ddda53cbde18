"""evaluate.py captions: what is drawn for which row, and the figures that come out."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lab import evaluate
from lab.evaluate import changed_and_kept, single_edits
from lab.judge import Seen, score
from lab.measures import frechet_distance, pairs_shown, precision_recall, wrong_captions
from support.shapes import HELD_OUT, Shapes, parse_caption

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

    def renderings(pipeline, captions, args, condition, image_emb=None):
        data = Shapes(args.n, next(rows), args.seed)
        pictures = torch.stack([data.image(i, 64) for i in range(len(captions))])
        yield slice(0, 20), pictures[:20]
        yield slice(20, 60), pictures[20:]

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
    run(micro_run, tmp_path, "--candidates", "1")
    clip, data = Pipeline(micro_run).clip, Shapes(6, "val")
    true = clip.encode_image(torch.stack([data.image(i, clip.image_size) for i in range(6)]))
    torch.testing.assert_close(given[0], true, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(given[1], true, atol=1e-2)


def test_guidance_and_candidates_reach_the_pipeline(micro_run, tmp_path, monkeypatch):
    from sample import Pipeline

    asked, embed, decode_best = [], Pipeline.embed, Pipeline.decode_best
    monkeypatch.setattr(
        Pipeline,
        "embed",
        lambda self, text, seeds, scale, *a: asked.append(scale)
        or embed(self, text, seeds, scale, *a),
    )
    monkeypatch.setattr(
        Pipeline,
        "decode_best",
        lambda self, n, *a, scale, **k: asked.append((n, scale))
        or decode_best(self, n, *a, scale=scale, **k),
    )
    run(micro_run, tmp_path)
    run(micro_run, tmp_path, "--prior-scale", "2", "--scale", "1", "--candidates", "3")
    # Rows: true embedding (no prior), text, held out.
    assert asked == [(2, 2), None, (2, 2), None, (2, 2)] + [(3, 1), 2, (3, 1), 2, (3, 1)]


def test_held_out_captions_name_pairs_that_training_never_shows():
    data = Shapes(200, "held_out")
    for i in range(len(data)):
        full = parse_caption(data.captions(i)[2])
        assert any((t.colour, t.shape) in HELD_OUT for t in data.scene(i).things)
        assert full.things


class FakeClip:
    """Knows each scene's true captions; `sees` says what it makes of a wrong one."""

    image_size, interpolation, mean = 64, "bicubic", torch.zeros(1)

    def __init__(self, sees):
        self.sees, self.asked = sees, 0
        self.true = {wrong_captions(Shapes(60, "val").scene(i))[0] for i in TWO}

    def to(self, device):
        return self

    def encode_image(self, images):
        return torch.tensor([[1.0, 0.0]]).expand(len(images), -1)

    def encode_text(self, captions):
        self.asked += 1
        if self.asked % 2:  # first the true one, then the wrong one
            assert captions[0] in self.true
            return torch.tensor([[1.0, 0.0]]), None, None
        return torch.tensor([self.sees] * len(captions)), None, None


TWO = [i for i in range(60) if len(Shapes(60, "val").scene(i).things) == 2]


@pytest.mark.parametrize("sees, share", [([0.0, 1.0], 1.0), ([1.0, 0.0], 0.5), ([2.0, 0.0], 0.0)])
def test_clip_is_right_blind_or_misled(sees, share, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "load_clip", lambda *where: FakeClip(sees))
    file = tmp_path / "clip.json"
    assert evaluate.main(["clip", "--weights", ".", "-n", "60", "--json", str(file)]) == 0
    table = json.loads(file.read_text())
    assert table.pop("linear probe") == {"right": 0, "n": len(TWO)}  # it sees nothing
    assert set(table) == {"binding", "shape", "relation"} and table["relation"]["n"] == len(TWO)
    assert all(row["right"] == share and row["n"] > 0 for row in table.values())


def test_a_linear_probe_reads_an_embedding_that_says_what_is_shown(monkeypatch, tmp_path):
    """In training all is said as it is; of the 60 that it is asked about, a third is mixed up."""
    monkeypatch.setattr(evaluate, "load_clip", lambda *where: FakeClip([1.0, 0.0]))

    def look(clip, data):
        emb = pairs_shown(data)
        mixed_up = (torch.arange(len(data))[:, None] % 3 == 0) & (len(data) == 60)
        return torch.where(mixed_up, emb.roll(1, 0), emb)

    monkeypatch.setattr(evaluate, "look", look)
    file = tmp_path / "clip.json"
    assert evaluate.main(["clip", "--weights", ".", "-n", "60", "--json", str(file)]) == 0
    shown = pairs_shown(Shapes(60, "val"))
    right = [i % 3 > 0 or bool((shown[i] == shown[i - 1]).all()) for i in TWO]
    assert json.loads(file.read_text())["linear probe"]["right"] == sum(right) / len(right)


def test_wrong_captions_are_wrong_in_one_thing_only():
    for i in TWO:
        scene = Shapes(60, "val").scene(i)
        true, wrong = wrong_captions(scene)
        claim = parse_caption(true)
        for said, there in zip(claim.things, scene.things, strict=True):
            assert (said.colour, said.shape) == (there.colour, there.shape)
        assert claim.relation == scene.relation
        seen = Seen(scene.background, scene.things)
        assert score(seen, claim)["all"]
        for name, caption in wrong.items():
            result = score(seen, parse_caption(caption))
            assert result["colours"] and result["objects"]
            failed = "shapes" if name == "shape" else name
            assert result[failed] is False
            assert result["shapes"] is (name != "shape")


@pytest.mark.parametrize("n", ["0", "-3", "x"])
def test_n_must_be_positive(n, capsys):
    assert evaluate.main(["captions", "-n", n]) == 2
    assert capsys.readouterr().err.startswith("error: ")


# --- priors, upsamplers, manipulations


def test_every_row_of_captions_can_be_drawn(micro_run, tmp_path):
    table = run(micro_run, tmp_path, "-n", "2", "--rows", *evaluate.ROWS)
    assert list(table) == list(evaluate.ROWS)


def test_frechet_distance_of_two_known_gaussians():
    # Diagonal covariances commute: |m - n|^2 + sum (s - r)^2 of their standard deviations.
    torch.manual_seed(0)
    z = torch.randn(4000, 3, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T, correction=0))).T
    s, r, shift = torch.tensor([[1, 2, 3], [2, 2, 1], [1, 0, 2]], dtype=torch.float64)
    assert frechet_distance(z * s, z * r + shift) == pytest.approx(5 + 5, abs=1e-6)
    assert frechet_distance(z * s, z * s) == pytest.approx(0, abs=1e-6)
    turned = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    assert frechet_distance(z * s @ turned, (z * r + shift) @ turned) == pytest.approx(10, abs=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute():
    # The trace of (C_a C_b)^1/2 by numpy: the roots of the product's own eigenvalues.
    torch.manual_seed(0)
    a, b = (torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 4).double() for _ in "ab")
    cov_a, cov_b = (np.cov(x.numpy().T, bias=True) for x in (a, b))
    mixed = np.sqrt(np.linalg.eigvals(cov_a @ cov_b)).real.sum()
    wanted = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(cov_a + cov_b) - 2 * mixed
    assert frechet_distance(a, b) == pytest.approx(wanted)


def test_priors_compares_variances_steps_and_both_priors(micro_run, tmp_path, capsys):
    file = tmp_path / "priors.json"
    command = ["priors", "--weights", str(micro_run), "-n", "40", "--json", str(file)]
    assert evaluate.main(command) == 0
    table = json.loads(file.read_text())
    assert table["fixed_small, 8 steps"]["evaluations"] == 8 and "autoregressive" in table
    assert table["analytic, 16 steps"]["frechet"] != table["fixed_small, 16 steps"]["frechet"]
    assert all(row["n"] == 40 and row["ms"] > 0 for row in table.values())


def test_priors_needs_no_decoder_and_counts_both_branches_of_guidance(micro_run, tmp_path):
    for stage in ("clip", "prior"):
        shutil.copy(micro_run / f"{stage}.pt", tmp_path)
    file = tmp_path / "priors.json"
    assert evaluate.main(["priors", "--weights", str(tmp_path), "-n", "4", "--prior-scale", "2",
                          "--json", str(file)]) == 0
    table = json.loads(file.read_text())
    assert table["fixed_small, 8 steps"]["evaluations"] == 16 and "autoregressive" not in table


def test_upsamplers_are_compared_with_bicubic_and_the_truth(micro_run, tmp_path):
    file = tmp_path / "up.json"
    assert evaluate.main(["upsamplers", "--weights", str(micro_run), "-n", "3", "--size", "64",
                          "--json", str(file)]) == 0
    table = json.loads(file.read_text())
    assert list(table)[:3] == ["upsamplers 32", "bicubic 32", "truth 32"]
    assert table["truth 64"]["all"] == 1 and table["bicubic 64"]["psnr"] > 10


def test_an_edit_changes_one_word_and_keeps_the_rest_of_the_scene():
    data = Shapes(200, "val")
    edits = single_edits(data, 12)
    assert [part for _, part, *_ in edits] == ["colour", "shape", "background"] * 4
    for i, part, before, after, claim in edits:
        said, wanted = before.split(), after.split()
        changed = [(a, b) for a, b in zip(said, wanted, strict=True) if a != b]
        assert len([c for c in changed if c[0] not in ("a", "an")]) == 1
        scene = data.scene(i)
        seen = Seen(scene.background, scene.things)
        assert changed_and_kept(seen, claim, part) == (False, True)
        assert changed_and_kept(Seen(claim.background, claim.things), claim, part) == (True, True)


def test_nothing_seen_is_neither_changed_nor_kept():
    _, part, _, _, claim = single_edits(Shapes(200, "val"), 1)[0]
    assert changed_and_kept(Seen(None, ()), claim, part) == (False, False)


def test_manipulations_reports_reconstruction_variation_and_edits(micro_run, tmp_path):
    file = tmp_path / "m.json"
    assert evaluate.main(["manipulations", "--weights", str(micro_run), "-n", "4", "--edits", "2",
                          "--json", str(file)]) == 0
    table = json.loads(file.read_text())
    assert table["reconstruction_psnr"] > table["variation_psnr"]
    assert [row["theta"] for row in table["edits"]] == [0.0, 0.125, 0.25, 0.375, 0.5]


# --- any data set


def test_precision_and_recall_of_clouds_that_share_half():
    """Tight clusters far apart: drawn has 2 of which 1 is true; true has 3 of which 1 is drawn."""
    torch.manual_seed(0)
    clusters = 100 * torch.eye(4)
    cloud = lambda k: clusters[k] + 0.1 * torch.randn(30, 4)
    drawn = torch.cat([cloud(0), cloud(1)])
    true = torch.cat([cloud(1), cloud(2), cloud(3)])
    precision, recall = precision_recall(drawn, true)
    assert precision == pytest.approx(1 / 2, abs=0.1) and recall == pytest.approx(1 / 3, abs=0.1)
    assert precision_recall(true, true) == (1, 1)


def folder_of_pictures(path, n):
    path.mkdir()
    lines = []
    for i in range(n):
        Image.new("RGB", (20, 20), (10 * i, 0, 90)).save(path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a red circle"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return str(path)


def test_real_data_is_measured_in_clips_space(micro_run, tmp_path):
    root, file = folder_of_pictures(tmp_path / "pictures", 120), tmp_path / "real.json"
    command = ["real", "--data", "folder", "--root", root, "--weights", str(micro_run), "-n", "20",
               "--steps", "2", "--prior-steps", "2", "--json", str(file)]
    assert evaluate.main(command) == 0
    table = json.loads(file.read_text())
    assert table["frechet"] > 0 and -1 <= table["clip_score"] <= 1
    assert 0 <= table["precision"] <= 1 and 0 <= table["recall"] <= 1


def test_a_table_that_cannot_be_written_is_noticed_first(tmp_path, capsys):
    assert evaluate.main(["judge", "-n", "1", "--json", str(tmp_path / "no" / "x.json")]) == 2
    said = capsys.readouterr()
    assert "no such folder" in said.err and said.out == ""


def test_without_upsamplers_there_is_nothing_to_compare(micro_run, capsys):
    assert evaluate.main(["upsamplers", "--weights", str(micro_run), "--size", "16"]) == 2
    assert "no upsampler" in capsys.readouterr().err


def test_export_writes_as_many_references_as_samples(micro_run, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", "-n", "3", "--weights", str(micro_run), "--steps", "2", "--prior-steps",
               "2", "--size", "32", "--out", str(out)]
    assert evaluate.main(command) == 0
    for kind in ("samples", "references"):
        files = sorted((out / kind).iterdir())
        assert [f.name for f in files] == ["000000.png", "000001.png", "000002.png"]
        assert all(Image.open(f).size == (32, 32) for f in files)
    before = (out / "samples" / "000002.png").read_bytes()
    assert evaluate.main(command) == 2  # two exports would be mixed
    assert "pictures already" in capsys.readouterr().err
    assert (out / "samples" / "000002.png").read_bytes() == before
    assert evaluate.main(command[:-2]) == 2  # no --out


def test_losses_are_what_training_logged_last(micro_run, tmp_path, capsys):
    file, logged = tmp_path / "table.json", {}
    command = ["losses", "--weights", str(micro_run), "--json", str(file)]
    assert evaluate.main(command) == 0
    for line in map(json.loads, (micro_run / "metrics.jsonl").read_text().splitlines()):
        if "val_loss" in line:
            logged[line["stage"]] = line
    table = json.loads(file.read_text())
    assert set(table) == set(logged) - {"clip"}
    for stage, figures in table.items():
        for name, value in figures.items():
            assert value == pytest.approx(logged[stage][name], rel=1e-4), (stage, name)
    assert "decoder_caption" in capsys.readouterr().out
    assert evaluate.main(["losses", "--weights", str(tmp_path)]) == 2
    assert "no trained stage" in capsys.readouterr().err
