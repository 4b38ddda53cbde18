"""findings.py and probing.py: verdicts, instruments, and a report from end to end."""

import argparse
import copy
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab import evaluate, findings, measures, probing
from lab.findings import FINDINGS, attributes, diversity, explained, guesses, open_parts, spread
from lab.judge import S, judge
from lab.measures import Lab, Result, single_objects
from lab.probing import kept, read_word, sign_scene, survival
from prior import DiffusionPrior, embedding_scale
from support.checkpoint import examples_seen
from support.shapes import (
    BACKGROUNDS, COLOURS, SIZES, TRAIN_PAIRS, WORDS, Scene, Shapes, Thing, render,
)
from support.sheets import to_tensor


@pytest.mark.parametrize("intervals, verdict", [
    ([(1, 0.5, 2)], "reproduced"),
    ([(1, 0.5, 2), (1, -0.1, 2)], "can't be decided at this scale"),
    ([(1, 0.5, 2), (-1, -2, -0.1)], "not reproduced"),
    ([(0, 0, 0)], "can't be decided at this scale"),
    ([(1, 1, 1)], "can't be decided at this scale"),  # no width: nothing differed from anything
    ([], "not measured here"),
])
def test_the_verdict_follows_from_the_intervals(intervals, verdict):
    result = Result([], claims=[(f"claim {k}", interval) for k, interval in enumerate(intervals)])
    assert result.verdict == verdict
    result.lacks = "with a stand-in for GLIDE"
    assert result.verdict == f"{verdict}, with a stand-in for GLIDE"


def test_what_differs_from_training_to_training_is_not_decided():
    for other, verdict in ((0.3, "reproduced"), (-0.3, "can't be decided at this scale")):
        result = Result([], claims=[("a", (1, 0.5, 2))], others=[[("a", (0.1, -1, 1))],
                                                                  [("a", (other, -1, 1))]])
        assert result.verdict == verdict


def test_every_finding_says_its_question_its_setup_and_the_papers_figure():
    assert list(FINDINGS) == [f"F{k}" for k in range(1, 13) if k not in (6, 11)]
    for finding in FINDINGS.values():
        question, setup, paper = explained(finding)
        assert question.endswith("?") and len(setup) > 20 and len(paper) > 10


@pytest.mark.parametrize("dx, dy", [(0, 0), (2, 0), (-2, 2), (0, -2)])
def test_every_word_is_read_off_any_true_sign_even_if_seen_two_pixels_off(dx, dy, monkeypatch):
    def misplaced(picture):
        seen = judge(picture)
        sign = replace(seen.things[0], x=seen.things[0].x + dx / S, y=seen.things[0].y + dy / S)
        return replace(seen, things=(sign,))

    monkeypatch.setattr(probing, "judge", misplaced)
    rng = np.random.default_rng(0)
    for word in WORDS if dx == dy == 0 else WORDS[::4]:
        r = rng.choice((0.34, 0.37, 0.40))
        x, y = rng.uniform(r, 1 - r), rng.uniform(r / 2, 1 - r / 2)
        if (dx, dy) != (0, 0):  # with its window inside the picture
            x = y = 0.5
        assert read_word(to_tensor(render(sign_scene(word, x, y, r), S))) == word
    monkeypatch.undo()
    assert read_word(to_tensor(render(one_object(1)[0], S))) is None


def one_object(n):
    return [scene for _, scene in single_objects(Shapes(6 * n, "val"))][:n]


def test_true_scenes_are_as_diverse_as_the_data():
    # Circles come in all 6 colours and red things in all 5 shapes; 2 sizes and 3 backgrounds.
    assert open_parts("a circle") == {0: 6, 2: 2, 3: 3}
    assert open_parts("a red shape") == {1: 5, 2: 2, 3: 3}
    assert open_parts("a purple shape") == {1: 4, 2: 2, 3: 3}  # no star in training
    circles = [s for s in one_object(900) if s.things[0].shape == "circle"]
    rows = attributes([to_tensor(render(s, S)) for s in circles])
    assert None not in rows.ravel().tolist()
    assert diversity(rows, np.repeat("a circle", len(rows))) == pytest.approx(1, abs=0.03)


def test_a_model_that_draws_one_picture_a_caption_has_no_diversity():
    """Over both captions it draws two colours: that is the captions' diversity, not the model's."""
    one, other = (to_tensor(render(s, S)) for s in one_object(2))
    rows, captions = attributes([one] * 5 + [other] * 5), np.repeat(["a circle", "a square"], 5)
    assert (rows[0] != rows[5]).any()
    assert diversity(rows, captions) == 0
    assert spread(np.eye(2)[(rows[:, 2] == "small").astype(int)], captions) == 0
    emb, captions = [[1, 0], [0, 1], [1, 0], [1, 0], [0.6, 0.8]], ["a", "a", "b", "b", "b"]
    distances = [0, 1, 1, 0, *[0] * 5, *[0.4] * 4]  # each pair twice, and each picture with itself
    assert spread(np.array(emb), np.array(captions)) == pytest.approx(np.mean(distances))


def test_a_bootstrapped_distance_is_that_of_two_different_pictures():
    emb = np.random.default_rng(0).standard_normal((16, 8))
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    true = (1 - emb @ emb.T)[np.triu_indices(16, 1)].mean()
    found, low, high = measures.bootstrap(spread, emb, np.array(["a"] * 16), biased=True)
    assert found == pytest.approx(true, rel=0.02) and low < true < high


def test_the_judge_sees_rotation_and_shade():
    for scene in one_object(60):
        thing, seen = scene.things[0], judge(to_tensor(render(scene, S))).things[0]
        if thing.shape != "circle":
            assert abs(math.degrees(thing.angle - seen.angle)) < 6
        assert np.abs(np.subtract(thing.rgb, seen.rgb)).max() < 12


def test_everything_survives_in_the_scene_itself_and_nothing_in_another():
    true = [s.things[0] for s in one_object(120)]
    same = kept(true, true)
    assert all(survival(k, np.nanmean(v)) == pytest.approx(1) for k, v in same.items())
    assert np.isnan(same["rotation"]).sum() == sum(t.shape == "circle" for t in true)
    other = kept(true[1:] + true[:1], true)
    assert all(abs(survival(k, np.nanmean(v))) < 0.45 for k, v in other.items())
    misshapen = kept([replace(t, shape="sign") for t in true], true)
    assert all(np.isnan(misshapen[k]).all() for k in ("rotation", "shade", "place, down"))
    assert (misshapen["colour"] == 1).all() and (misshapen["shape"] == 0).all()
    assert survival("shape", [0.2, 0.6, 1.0]) == pytest.approx([0, 0.5, 1])
    nothing = kept([Thing()] * len(true), true)
    assert survival("colour", nothing["colour"].mean()) < 0 and np.isnan(nothing["shade"]).all()


@pytest.fixture(scope="module")
def loaded(micro_run):
    return Lab(argparse.Namespace(device="cpu", n=6, seed=0), micro_run)


@pytest.fixture
def lab(loaded):
    """A lab that has drawn nothing; its stages are loaded once for all tests."""
    fresh = copy.copy(loaded)
    fresh.drawn = {}
    return fresh


def test_each_picture_is_drawn_once_and_other_conditions_are_kept_apart(lab, monkeypatch):
    ways = ({}, {"given": "text_emb"}, {"given": "caption"}, {"say": False}, {"scale": 1.0},
            {"prior": "ar_prior"}, {"given": lab.true_emb(lab.scenes)}, {"candidates": 2},
            {"given": "caption", "decoder": "decoder_caption"})
    drawn = [lab.draw(lab.captions, **way) for way in ways]
    monkeypatch.setattr(lab, "pipeline", None)  # a second drawing would fail
    for i, (way, a) in enumerate(zip(ways, drawn, strict=True)):
        assert a.shape == (6, 3, S, S) and lab.draw(lab.captions, **way) is a
        assert not any(a is b for b in drawn[:i])


def test_f7_trains_all_priors_on_the_same_batches(lab, monkeypatch):
    seen, loss = [], DiffusionPrior.loss
    monkeypatch.setattr(DiffusionPrior, "loss", lambda self, batch, t=None: (
        seen.append((self.config.predict, batch["image_emb"])) or loss(self, batch)))
    result = findings.f7(lab, scenes=64, budgets=(1, 2))
    again = ["x_0"] * 2 + ["noise"] * 2  # two other seeds, the longest training alone
    assert [p for p, _ in seen] == ["x_0"] * 3 + ["v"] * 3 + ["noise"] * 3 + again * 2
    assert len(result.others) == 2 and result.others[0][0][1] != result.others[1][0][1]
    for k in range(3):
        for other in (3, 6):
            torch.testing.assert_close(seen[k][1], seen[k + other][1], rtol=0, atol=0)
    assert [row[:2] for row in result.table] == [
        (predict, steps) for predict in ("x_0", "v", "noise") for steps in "12"]
    assert "after 2 steps" in result.claims[0][0] and len(result.claims) == 1


def test_one_look_sees_the_embedding_where_a_prior_knows_it(lab, monkeypatch):
    """Oracles of both kinds: the one that answers x_0, and the one that answers the noise."""
    true = lab.true_emb(lab.scenes)
    text = lab.pipeline().clip.encode_text(lab.captions)
    for predict in ("x_0", "noise"):
        prior = findings.short_prior(lab, predict, None, 0, seed=0)

        def oracle(x_t, t, prior=prior, predict=predict, **caption):
            x_0 = true * embedding_scale(true.shape[1])
            signal, sigma = prior.diffusion.signal_sigma(t, x_t)
            return x_0 if predict == "x_0" else (x_t - signal * x_0) / sigma

        monkeypatch.setattr(prior, "forward", oracle)
        for cosine in guesses(prior, true, text, 0).values():
            torch.testing.assert_close(cosine, torch.ones(6), atol=1e-4, rtol=0)


def test_the_report_holds_every_finding_asked_for(micro_run, tmp_path, monkeypatch):
    for name in ("invert", "redraw"):
        monkeypatch.setattr(measures, name, partial(getattr(measures, name), steps=5))
    file = tmp_path / "table.json"
    code = evaluate.main(["findings", "f2", "F3", "F10", "-n", "8", "--weights", str(micro_run),
                          "--out", str(tmp_path), "--json", str(file)])
    assert code == 0
    text = (tmp_path / "F2_F3_F10.md").read_text()
    assert "Other trainings**: none." in text and "after other" not in text
    assert not (tmp_path / "FINDINGS.md").exists()  # a report of some is not that of all
    table = json.loads(file.read_text())
    assert list(table) == ["F2", "F3", "F10"]
    for name, found in table.items():
        assert f"## {name}: {explained(FINDINGS[name])[0]}" in text
        assert found["verdict"] in text and found["claims"]
        assert (tmp_path / f"pictures/finding_{name}.png").exists()


def test_claims_that_compare_trainings_are_asked_of_other_runs_and_measured_by_their_clip(
        micro_run, untrained_run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(findings.FINDINGS, "F1", lambda lab: (seen.append(lab), Result(
        ["run"], claims=[("a difference", (7.0 if lab.folder == micro_run else -2.0, 1, 9))]))[1])
    assert evaluate.main(["findings", "F1", "-n", "8", "--weights", str(micro_run), "--out",
                          str(tmp_path), "--others", str(untrained_run)]) == 0
    text = (tmp_path / "F1.md").read_text()
    assert "- a difference: 7.0 (1.0 to 9.0); after other trainings -2.0" in text
    assert OPEN in text and untrained_run.name in text
    copied = shutil.copytree(untrained_run, tmp_path / "less")
    (copied / "ar_prior.pt").unlink()
    assert evaluate.main(["findings", "F1", "-n", "8", "--weights", str(micro_run), "--out",
                          str(tmp_path), "--others", str(copied)]) == 2
    for lab, other in (seen, seen[::-1]):
        assert lab.witness.identity == other.clip.identity != lab.clip.identity
        torch.testing.assert_close(lab.goal, other.true_emb(lab.scenes))


def test_systems_not_trained_equally_long_or_missing_are_not_compared_in_silence(lab, monkeypatch):
    assert list(lab.systems()) == ["unCLIP", "GLIDE"] and lab.caveat("decoder_caption") == {}
    assert lab.examples("decoder") == 3 * 8  # steps, batch size
    uncounted = {"step": 5, "run": {"batch_size": 8}, "figures": {}}  # an old checkpoint
    assert examples_seen(uncounted) == 40
    monkeypatch.setattr(lab, "examples", {"decoder": 2000, "decoder_caption": 1000}.get)
    assert lab.caveat("decoder_caption") == {
        "note": "The decoder was trained on 2,000 pictures, decoder_caption on 1,000.",
        "lacks": "after unequal trainings"}
    monkeypatch.setattr("lab.measures.load_checkpoint", lambda *_: {"config": {}})  # an older GLIDE
    assert "1,000. GLIDE reads this CLIP's" in lab.caveat("decoder_caption")["note"]
    monkeypatch.setattr(lab, "has", lambda stage: stage != "decoder_caption")
    assert lab.systems()["unCLIP without embedding"] == {"given": "caption"}
    assert lab.caveat("decoder_caption")["lacks"] == "without decoder_caption"


def test_a_pasted_sign_leaves_the_object_and_exchanged_colours_occur_in_training(lab):
    for scene in one_object(60):
        attacked = probing.with_sign(scene, "cat")
        colours = [t.colour for t in judge(to_tensor(render(attacked, S))).things]
        assert scene.things[0].colour in colours
    for scene in probing.pairs_of(lab):
        a, b = scene.things
        assert a.colour != b.colour and a.shape != b.shape
        assert {(a.colour, b.shape), (b.colour, a.shape)} <= set(TRAIN_PAIRS)


def fakes(n, good):
    """draw_ways of a world in which the systems named in `good` draw well and the others badly."""
    rng = np.random.default_rng(0)
    right = (rng.random((2, n)) < [[0.95], [0.3]]).astype(float)

    def draw_ways(result, ways, **settings):
        true = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(2 * n, 16))), dim=1)
        emb = true[:n].float(), (true[n:] + 1).float()  # the second about another middle
        return {name: (right[k], emb[k]) for name in ways for k in [int(name not in good)]}

    return draw_ways


@pytest.mark.parametrize("finding, claimed, opposite", [
    ("f1", {"prior"}, {"text embedding put in", "trained on text embeddings"}),
    ("f2", {"both", "embedding alone"}, {"both", "caption alone"}),
    ("f3", {"prior"}, {"ar_prior"}),
    ("f5", {"GLIDE"}, {"unCLIP"}),
])
def test_a_verdict_is_reproduced_refused_or_open_as_the_pictures_are(
        lab, monkeypatch, quick, finding, claimed, opposite):
    n, everywhere = 40, {*claimed, *opposite}
    spread_out = torch.nn.functional.normalize(torch.randn(4 * n, 16), dim=1)
    monkeypatch.setattr(lab, "true_emb", lambda scenes: spread_out[:len(scenes)])
    monkeypatch.setattr(lab, "prior_emb", lambda captions, prior: spread_out[:len(captions)])
    rows = attributes([to_tensor(render(s, S)) for s in one_object(20)])
    same = np.resize(rows[:1], rows.shape)
    for good, verdict in ((claimed, "reproduced"), (opposite, "not reproduced"),
                          (everywhere, "can't be decided at this scale")):
        monkeypatch.setattr(lab, "draw_ways", fakes(n, good))
        # F5 also asks for diversity: unCLIP's is the data's where the claim is true.
        drawn = iter([rows, same] if good is claimed else [same, rows] if good is opposite
                     else [same, same])
        monkeypatch.setattr(lab, "draw", lambda captions, **way: None)
        monkeypatch.setattr(findings, "attributes", lambda pictures: next(drawn))
        monkeypatch.setattr(findings, "OPEN", ["a circle"] * 20)
        lab.scenes = one_object(n)
        monkeypatch.setattr(lab, "n", 40)
        result = getattr(findings, finding)(lab)
        assert result.verdict == verdict, (good, result.claims)


OPEN = "can't be decided at this scale"
VERDICTS = [("claimed", "reproduced"), ("opposite", "not reproduced"), ("neither", OPEN)]


@pytest.fixture
def quick(monkeypatch):
    for module in (measures, findings):
        monkeypatch.setattr(module, "bootstrap", partial(measures.bootstrap, times=100))
    monkeypatch.setattr(findings, "frechet_cell", lambda drawn, true: "")  # slow, and no claim


class TellsAllApart:
    """A CLIP in which every caption has an axis of its own."""

    def __init__(self):
        self.known = {}

    def encode_text(self, captions):
        axes = [self.known.setdefault(caption, len(self.known)) for caption in captions]
        return torch.eye(128)[axes], None, None


@pytest.mark.parametrize("world, verdict", VERDICTS)
def test_guidance_costs_diversity_as_the_pictures_of_both_systems_say(
        lab, monkeypatch, quick, world, verdict):
    rng, n = np.random.default_rng(0), 120
    losing = {"claimed": ["caption"], "opposite": ["prior"], "neither": ["caption", "prior"]}[world]
    choices = [list(COLOURS), ["circle"], list(SIZES), list(BACKGROUNDS)]
    rows = np.array([[rng.choice(c) for c in choices] for _ in range(n)], object)
    angles = rng.uniform(0, 1.5, n)

    def draw(captions, scale, given="prior", **way):  # a loser's pictures become all alike
        alike = (scale - 1) / 5 * (given in losing)
        angle = angles * (1 - alike) + 0.1 * rng.random(n)
        turned = np.where(rng.random((n, 1)) < alike, rows[:1], rng.permutation(rows))
        return turned, torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], axis=1))

    monkeypatch.setattr(findings, "OPEN", ["a circle"])
    monkeypatch.setattr(findings, "chart", lambda *curves: None)
    monkeypatch.setattr(findings, "scores", lambda pictures, captions: {"all": np.ones(n)})
    monkeypatch.setattr(findings, "attributes", lambda pictures: pictures[0])
    for name, value in (("n", 2 * n), ("draw", draw), ("seen", lambda pictures: pictures[1])):
        monkeypatch.setattr(lab, name, value)
    assert findings.f4(lab).verdict == verdict


@pytest.mark.parametrize("world, verdict", [*VERDICTS, ("by seed", OPEN)])
def test_what_a_prior_should_predict_follows_from_its_guesses(
        lab, monkeypatch, quick, world, verdict):
    def train(lab, predict, embeddings, steps, seed):
        better = {"claimed": "x_0", "opposite": "noise", "neither": "both",
                  "by seed": "x_0" if seed < 2 else "noise"}[world]
        return SimpleNamespace(good=predict == better, sample=lambda *text, **_: torch.ones(12, 16))

    rng = np.random.default_rng(0)
    monkeypatch.setattr(findings, "short_prior", train)
    monkeypatch.setattr(findings, "guesses", lambda prior, *_: {
        level: rng.normal(0.5 + 0.3 * prior.good, 0.05, 12) for level in findings.LEVELS})
    assert findings.f7(lab, scenes=16, budgets=(1,)).verdict == verdict


@pytest.mark.parametrize("world, verdict", VERDICTS)
def test_unclip_cannot_write_if_clip_can_name_the_words_that_it_does_not_draw(
        lab, monkeypatch, quick, world, verdict):
    named, read = {"claimed": (1.0, 0.1), "opposite": (0.1, 0.9), "neither": (0.5, 0.5)}[world]
    n, calls = 40, iter(range(10**6))
    rng = np.random.default_rng(0)
    knows, legible = rng.permutation(n) < n * named, rng.permutation(n) < n * read
    words = [WORDS[k % len(WORDS)] for k in range(n)]

    def true_emb(scenes):
        says = [s.word if right else WORDS[WORDS.index(s.word) - 1]
                for s, right in zip(scenes, knows)]
        return lab.clip.encode_text([f"a sign that says {word}" for word in says])[0]

    def reading(picture):
        k = next(calls) % n
        return words[k] if legible[k] else None

    monkeypatch.setattr(probing, "pair_study", lambda lab, mistake: ([], {}, {"unCLIP": None}, {}))
    monkeypatch.setattr(probing, "shape_kept", lambda lab, size: np.ones(3))
    monkeypatch.setattr(probing, "sheet", lambda *drawn: None)
    monkeypatch.setattr(probing, "read_word", reading)
    monkeypatch.setattr(probing, "judge", lambda picture: sign_scene("cat"))
    for name, value in (("n", n), ("true_emb", true_emb), ("clip", TellsAllApart()),
                        ("draw", lambda captions, **way: torch.zeros(len(captions), 3, S, S))):
        monkeypatch.setattr(lab, name, value)
    assert probing.f9(lab).verdict == verdict


@pytest.mark.parametrize("world, verdict", VERDICTS)
def test_semantics_survive_or_details_as_the_judge_sees_them(
        lab, monkeypatch, quick, world, verdict):
    keeps = {"claimed": (0.95, 0.5), "opposite": (0.3, 0.95), "neither": (0.95, 0.95)}[world]
    rng = np.random.default_rng(0)
    parts = {part: (rng.random(60) < keeps[part not in probing.MENTIONED]).astype(float)
             for part in probing.CHANCE}
    monkeypatch.setattr(probing, "redrawn", lambda pipeline, pictures, *_: [pictures, pictures])
    monkeypatch.setattr(probing, "kept", lambda seen, true: parts)
    monkeypatch.setattr(probing, "typographic_attack", lambda lab, *_: (None, None))
    monkeypatch.setattr(probing, "sheet", lambda *drawn: None)
    monkeypatch.setattr(lab, "draw", lambda captions, *_, **way: torch.zeros(2, 3, S, S))
    monkeypatch.setattr(lab.pipeline(), "upsample", lambda pictures, seeds, size: pictures)
    assert probing.f10(lab).verdict == verdict


@pytest.mark.parametrize("world, verdict", VERDICTS)
def test_the_attack_is_judged_where_clip_is_fooled(lab, monkeypatch, quick, world, verdict):
    """Half of the pictures fool CLIP. Elsewhere the decoder always draws the right colour."""
    right = {"claimed": 0.9, "opposite": 0.0, "neither": 0.5}[world]
    scenes = [s for s in one_object(120)]
    colours, rng = [s.things[0].colour for s in scenes], np.random.default_rng(0)
    others = [b if b != a else None for a, b in zip(colours, colours[1:] + colours[:1])]
    fooled = np.arange(120) % 2 == 0
    drawn = [a if not f or rng.random() < right else b for f, a, b in zip(fooled, colours, others)]
    seen = iter(drawn)
    monkeypatch.setattr(lab, "clip", TellsAllApart())
    monkeypatch.setattr(lab, "true_emb", lambda scenes: lab.clip.encode_text(
        ["a sign that says cat" if f else f"a {c} circle" for f, c in zip(fooled, colours)])[0])
    monkeypatch.setattr(lab, "draw", lambda captions, *_, **way: captions)
    monkeypatch.setattr(probing, "judge",
                        lambda picture: Scene((Thing(colour=next(seen)),), "gray", (0, 0, 0)))
    result = Result([])
    probing.typographic_attack(lab, scenes, result)
    assert result.verdict == verdict, result.claims


@pytest.mark.parametrize("world, verdict", VERDICTS)
def test_binding_is_weak_or_not_as_the_pictures_of_both_systems_are(
        lab, monkeypatch, world, verdict):
    unclip, glide = {"claimed": (0.5, 0.9), "opposite": (0.9, 0.5), "neither": (0.7, 0.7)}[world]

    def seen(share):
        bound = (np.arange(60) % 10 < 10 * share).astype(float)
        return {"binding": bound, "colours": np.ones(60), "shapes": np.ones(60)}

    found = {"unCLIP": seen(unclip), "GLIDE": seen(glide)}
    monkeypatch.setattr(probing, "pair_study", lambda lab, mistake: ([], {}, {}, found))
    monkeypatch.setattr(probing, "sheet", lambda *drawn: None)
    assert probing.f8(lab).verdict == verdict
