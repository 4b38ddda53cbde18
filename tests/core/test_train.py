"""train.py: one loop for every stage, resumable to the bit, and safe against mistakes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sample
import stages
import train
from lab import evaluate
from support import checkpoint, tools
from decoder import DecoderConfig
from diffusion import GaussianDiffusion
from sample import Pipeline
from support.cache import embed
from support.muon import make_optimizers
from support.shapes import Shapes
from support.tools import UserError
from train import Batches, Ema, learning_rate, make_model
from conftest import MICRO, ROOT

stages.PRESETS["micro"] = MICRO
UPSAMPLER = ["upsampler1", "--preset", "micro", "--batch-size", "4", "--limit", "16",
             "--sample-every", "1000"]  # once, at the end: looking takes longer than training
# For a process of its own: the micro preset does not exist there, so it is put in first.
PREFIX = "import sys; sys.path[:0] = ['tests']; import conftest, stages, train; "
PREFIX += "stages.PRESETS['micro'] = conftest.MICRO; "


def command(*arguments):
    return [sys.executable, "-c", PREFIX + "sys.exit(train.main())", *map(str, arguments)]


def weights(folder, stage="upsampler1", key="model"):
    return torch.load(folder / f"{stage}.pt", weights_only=True)[key]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- the schedule, the average, the batches --------------------------------------------------


def test_rate_warms_up_linearly_then_follows_half_a_cosine():
    settings = {"steps": 1000, "lr": 0.2, "decay": "cosine"}
    warm_up = [0.2 * (s + 1) / 50 * 0.5 * (1 + math.cos(math.pi * s / 1000)) for s in range(50)]
    np.testing.assert_allclose([learning_rate(s, settings) for s in range(50)], warm_up)
    assert learning_rate(500, settings) == pytest.approx(0.1)
    assert learning_rate(1000, settings) == pytest.approx(0, abs=1e-12)
    assert learning_rate(700, settings | {"decay": "constant"}) == 0.2


def test_ema_of_constant_weights_is_p_plus_d_to_the_k_times_the_start():
    model = torch.nn.Linear(3, 2)
    ema = Ema(model, decay=0.5)
    ema.updates = 1000  # past the warm-up
    start = {k: v.clone() for k, v in ema.model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.5)
    for _ in range(3):
        ema.update(model)
    averaged = ema.model.state_dict()
    for name, p in model.named_parameters():
        torch.testing.assert_close(averaged[name], p + 0.5**3 * (start[name] - p))


def test_ema_warm_up_follows_one_plus_n_over_ten_plus_n():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = Ema(model, decay=0.9)
    torch.nn.init.ones_(model.weight)
    expected = 0.0
    for n in range(200):
        ema.update(model)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d)
        assert ema.model.weight.item() == pytest.approx(expected, abs=1e-5)


def test_ema_copies_buffers_and_never_averages_them():
    model = torch.nn.BatchNorm1d(2)
    ema = Ema(model)
    model.running_mean.fill_(7)
    model.num_batches_tracked.fill_(5)
    ema.update(model)
    assert ema.model.running_mean.tolist() == [7, 7] and ema.model.num_batches_tracked == 5


def upsampler_batches(rank=0, world=1, batch_size=8):
    config = make_model("upsampler1", "micro", None, None).config
    return Batches(
        "upsampler1", config, Shapes(50), None, {"batch_size": batch_size, "seed": 3}, rank, world
    )


def test_a_batch_is_a_function_of_seed_and_step():
    first, again = upsampler_batches()[7], upsampler_batches()[7]
    assert_same(first, again)
    assert not torch.equal(first["image"], upsampler_batches()[8]["image"])


def test_processes_share_one_global_batch():
    seen = {}

    class Recorder(Batches):
        def make(self, step, indices, rng):
            seen[self.rank, self.world] = indices

    for r, w in ((0, 1), (0, 2), (1, 2)):
        Recorder("prior", None, Shapes(50), None, {"batch_size": 8, "seed": 3}, r, w)[5]
    whole = seen[0, 1]
    assert len(set(whole)) == 8
    assert seen[0, 2] == whole[0::2] and seen[1, 2] == whole[1::2]


# --- a run, and what it leaves ---------------------------------------------------------------


def test_all_trains_every_stage_and_leaves_checkpoints_metrics_and_pictures(micro_run):
    for stage in stages.ORDER:
        saved = checkpoint.load_checkpoint(micro_run / f"{stage}.pt", stage)
        assert saved["step"] == 3
        losses = [m["loss"] for m in metrics(micro_run) if m["stage"] == stage and "loss" in m]
        assert losses and all(math.isfinite(x) for x in losses)
    for stage, rows in (("decoder", 4), ("upsampler1", 8), ("upsampler2", 8)):
        grid = Image.open(micro_run / "samples" / f"{stage}_000003.png")
        assert grid.height >= rows * 128
    assert {"cos_true", "cos_text", "cos_unrelated"} < {k for m in metrics(micro_run) for k in m}


def test_stages_are_trained_for_the_clip_beside_them(micro_run):
    identity = stages.load_clip(micro_run).identity
    for stage in ("prior", "decoder"):
        assert (
            checkpoint.load_checkpoint(micro_run / f"{stage}.pt")["clip"]["identity"] == identity
        )


def test_decoder_runs_its_first_steps_at_half_the_side():
    config = DecoderConfig(dim=4, text_width=4, text_len=4, size=16)

    class NoText:
        def batch(self, indices, rng):
            return {}

    settings = {"batch_size": 2, "seed": 0, "steps": 10, "half_size_until": 0.4}
    batches = Batches("decoder", config, Shapes(4), NoText(), settings)
    assert [batches[s]["image"].shape[-1] for s in (0, 3, 4, 9)] == [8, 8, 16, 16]


def test_a_training_made_longer_does_not_go_back_to_half_the_size(micro_run, tmp_path):
    shutil.copy(micro_run / "clip.pt", tmp_path)
    run = ["decoder", "--preset", "micro", "--out", str(tmp_path), "--workers", "0"]
    assert train.main([*run, "--steps", "5"]) == 0  # at half size until 0.4 of them: 2 steps
    for steps in ("10", "20"):
        assert train.main([*run, "--resume", "--steps", steps]) == 0
        settings = checkpoint.load_checkpoint(tmp_path / "decoder.pt")["run"]
        assert settings["half_size_until"] * settings["steps"] == pytest.approx(2)


def test_weights_that_are_no_numbers_do_not_replace_a_checkpoint(tmp_path, capsys, monkeypatch):
    """The loss of a step is of the weights before it: a step that spoils them has a finite one."""
    run = [*UPSAMPLER, "--out", str(tmp_path)]
    assert train.main([*run, "--steps", "2"]) == 0
    before = (tmp_path / "upsampler1.pt").read_bytes()
    monkeypatch.setattr(train, "learning_rate", lambda step, settings: math.inf)
    assert train.main([*run, "--resume", "--steps", "4", "--save-every", "1"]) == 2
    assert "a weight is no longer finite. The last checkpoint is kept" in capsys.readouterr().err
    assert (tmp_path / "upsampler1.pt").read_bytes() == before


def test_a_refused_training_leaves_the_settings_as_they_were(tmp_path, capsys):
    run = [*UPSAMPLER, "--out", str(tmp_path)]
    assert train.main([*run, "--steps", "2"]) == 0
    before = (tmp_path / "upsampler1.json").read_text()
    saved = checkpoint.load_checkpoint(tmp_path / "upsampler1.pt")
    for broken in ({"optimizer": {}}, {"model": {}}, {"optimizer": [{}, {}]}):
        checkpoint.save_checkpoint(tmp_path / "upsampler1.pt", saved | broken)
        assert train.main([*run, "--resume", "--steps", "4"]) == 2
        assert "--resume: the checkpoint" in capsys.readouterr().err
        assert (tmp_path / "upsampler1.json").read_text() == before


def test_a_checkpoint_is_saved_though_its_pictures_cannot_be(tmp_path, monkeypatch):
    def full(image, path, **options):
        raise UserError("cannot write: no room")

    monkeypatch.setattr(train, "save_picture", full)
    assert train.main([*UPSAMPLER, "--out", str(tmp_path), "--steps", "2"]) == 2
    assert checkpoint.load_checkpoint(tmp_path / "upsampler1.pt")["step"] == 2


def test_an_export_does_not_replace_the_checkpoints_of_another_training(micro_run, tmp_path):
    shutil.copy(micro_run / "upsampler2.pt", tmp_path)
    before = (tmp_path / "upsampler2.pt").read_bytes()
    assert train.main(["export", "--out", str(micro_run), "--to", str(tmp_path)]) == 2
    assert (tmp_path / "upsampler2.pt").read_bytes() == before
    assert not (tmp_path / "clip.pt").exists()  # nothing is written at all
    for _ in range(2):  # but an earlier copy may be replaced
        assert train.main(["export", "--out", str(micro_run), "--to", str(tmp_path / "x")]) == 0


def test_an_exported_run_draws_the_same_and_is_much_smaller(micro_run, tmp_path, capsys):
    assert train.main(["export", "--out", str(micro_run), "--to", str(tmp_path / "small")]) == 0
    for stage in stages.ORDER:
        whole, small = micro_run / f"{stage}.pt", tmp_path / "small" / f"{stage}.pt"
        assert small.stat().st_size < whole.stat().st_size / 3  # of tiny models, much is names
        weights_there = stages.load_stage(tmp_path / "small", stage).state_dict()
        for name, value in stages.load_stage(micro_run, stage).state_dict().items():
            torch.testing.assert_close(weights_there[name], value, rtol=1e-3, atol=1e-4)
    one, other = (Pipeline(folder, size=64) for folder in (micro_run, tmp_path / "small"))
    assert one.clip.identity == other.clip.identity and one.sizes == other.sizes
    # It can be built upon: left alone when finished, else trained on with a new optimizer.
    run, path = [*UPSAMPLER, "--resume", "--out", str(tmp_path / "small")], "upsampler1.pt"
    before = (tmp_path / "small" / path).read_bytes()
    assert train.main([*run, "--steps", "3"]) == 0
    assert (tmp_path / "small" / path).read_bytes() == before
    assert train.main([*run, "--steps", "9"]) == 0
    assert "the optimizer starts anew" in capsys.readouterr().out
    on = checkpoint.load_checkpoint(tmp_path / "small" / path)
    assert on["step"] == 9 and all(v.dtype == torch.float32 for v in on["ema"].values())


def test_a_resumed_run_has_the_optimizers_of_its_checkpoint(tmp_path, capsys, monkeypatch):
    run = [*UPSAMPLER, "--out", str(tmp_path), "--workers", "0"]
    path, (model, training) = tmp_path / "upsampler1.pt", MICRO["upsampler1"]
    assert train.main([*run, "--steps", "2"]) == 0
    before = path.read_bytes()
    without = (model, {k: v for k, v in training.items() if k != "muon"})
    monkeypatch.setitem(stages.PRESETS, "micro", MICRO | {"upsampler1": without})
    assert train.main([*run, "--resume", "--steps", "4"]) == 2  # Adam alone cannot go on from it
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "another optimizer" in error and "muon" in error and path.read_bytes() == before
    # Another rate is one of the things that may change, and then is the rate; so is the focus.
    bands, focus_on = [], GaussianDiffusion.focus_on
    monkeypatch.setattr(GaussianDiffusion, "focus_on",
                        lambda self, band: bands.append(band) or focus_on(self, band))
    changed = training | {"muon": 7.0, "focus": (0, 40)}
    monkeypatch.setitem(stages.PRESETS, "micro", MICRO | {"upsampler1": (model, changed)})
    assert train.main([*run, "--resume", "--steps", "4"]) == 0
    said = capsys.readouterr().out
    assert "muon was 2.0, is 7.0 now" in said and "focus was None, is (0, 40) now" in said
    assert bands == [(0, 40)]
    groups = [s["param_groups"][0] for s in checkpoint.load_checkpoint(path)["optimizer"]]
    assert [g["scale"] for g in groups] == [1.0, 7.0]


def test_a_runs_settings_can_be_read(micro_run):
    about = json.loads((micro_run / "decoder.json").read_text())
    saved = checkpoint.load_checkpoint(micro_run / "decoder.pt")
    assert about["stage"] == "decoder" and about["clip"] == saved["clip"]
    assert about["config"] == json.loads(json.dumps(saved["config"]))
    assert about["run"]["fingerprint"] == saved["run"]["fingerprint"]
    assert about["run"]["command"].startswith("python train.py all")


def test_a_run_is_not_exported_onto_itself(micro_run, capsys):
    before = (micro_run / "decoder.pt").read_bytes()
    assert train.main(["export", "--out", str(micro_run), "--to", f"{micro_run}/../micro"]) == 2
    assert "the run itself" in capsys.readouterr().err
    assert (micro_run / "decoder.pt").read_bytes() == before


def test_baselines_have_the_decoders_size_and_budget():
    for preset in ("tiny", "base"):
        model, training = stages.recipe(preset, "decoder")
        for condition in ("text_emb", "caption"):
            other, budget = stages.recipe(preset, f"decoder_{condition}")
            assert budget == training and other["condition"] == condition
            assert {k: v for k, v in other.items() if k in model} == model
        assert stages.recipe(preset, "ar_prior")[1] == stages.recipe(preset, "prior")[1]


def test_the_ar_prior_is_fitted_to_the_training_embeddings(micro_run):
    prior = stages.load_stage(micro_run, "ar_prior")
    assert 1 <= prior.config.components <= prior.config.dim
    identity = prior.basis @ prior.basis.T
    torch.testing.assert_close(identity, torch.eye(len(identity)), rtol=0, atol=1e-4)
    assert (prior.edges.diff(dim=1) >= 0).all() and prior.values.abs().sum() > 0


def test_the_finished_priors_checkpoint_holds_its_analytic_variance(micro_run):
    table = stages.load_stage(micro_run, "prior").diffusion.x_0_variance
    assert (table > 0).all() and table[-1] > table[0]


def test_validation_loss_is_reported_by_quarter_of_the_noise_levels(micro_run):
    last = {}
    for line in metrics(micro_run):
        if "val_loss" in line:
            last[line["stage"]] = line
    assert set(last) == set(stages.STAGES)
    for stage in ("prior", "decoder", "upsampler1", "upsampler2"):
        quarters = [last[stage][f"val_q{q}"] for q in (1, 2, 3, 4)]
        assert last[stage]["val_loss"] == pytest.approx(sum(quarters) / 4)


def test_a_quarter_draws_its_own_levels_and_leaves_training_all_of_them(monkeypatch, micro_run):
    model = stages.load_stage(micro_run, "upsampler1")
    T, seen = model.diffusion.T, []
    q_sample = model.diffusion.q_sample
    monkeypatch.setattr(model.diffusion, "q_sample",
                        lambda x, t, noise: seen.append(t) or q_sample(x, t, noise))
    data = Shapes(40, "val")
    batches = Batches("upsampler1", model.config, data, None, {"batch_size": 200, "seed": 0})
    one = train.validate("upsampler1", model, batches, 0, torch.device("cpu"))
    assert sum(map(len, seen)) == 4 * 256
    for q in range(4):
        t = torch.cat(seen[q::4])
        assert q * T // 4 <= t.min() and t.max() < (q + 1) * T // 4
        assert t.max() - t.min() > T // 5 and len(t) == 256
    assert not torch.equal(seen[0], seen[4])  # two batches, two noises
    assert model.diffusion.levels == (0, T)
    torch.manual_seed(99)  # and with another batch size: the same pictures, the same noise
    batches = Batches("upsampler1", model.config, data, None, {"batch_size": 4, "seed": 0})
    assert train.validate("upsampler1", model, batches, 0, torch.device("cpu")) == one


def test_clip_is_validated_on_one_batch_without_a_picture_twice(micro_run, monkeypatch):
    """The same picture twice would be two right answers, of which one counts as wrong."""
    model = stages.load_stage(micro_run, "clip")
    batches = Batches("clip", model.config, Shapes(5, "val"), None, {"batch_size": 8})
    asked, make = [], batches.make
    monkeypatch.setattr(batches, "make", lambda step, indices, rng: asked.append(list(indices)) or
                        make(step, indices, rng))
    train.validate("clip", model, batches, 0, torch.device("cpu"))
    train.preview("clip", model, batches, 0, torch.device("cpu"))
    assert asked == [list(range(5))] * 2


def test_the_validation_loss_is_the_mean_over_all_its_pictures(micro_run, monkeypatch):
    model = stages.load_stage(micro_run, "upsampler1")
    batches = Batches("upsampler1", model.config, Shapes(100, "val"), None, {"batch_size": 4})
    shown = []
    monkeypatch.setattr(batches, "make",
                        lambda step, indices, rng: shown.extend(indices) or
                        {"value": torch.tensor(indices, dtype=torch.float)})
    monkeypatch.setattr(model, "loss", lambda batch: batch["value"].mean())
    figures = train.validate("upsampler1", model, batches, 0, torch.device("cpu"))
    assert shown == [i % 100 for i in range(256)]
    assert figures == dict.fromkeys(("val_q1", "val_q2", "val_q3", "val_q4", "val_loss"),
                                    pytest.approx(sum(shown) / 256))
    figures = train.validate("upsampler1", model, batches, 0, torch.device("cpu"), count=67)
    assert figures["val_loss"] == pytest.approx(33)  # 32, 32 and 3 pictures, each counted once


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_compiled_loss_is_one_graph_and_the_same_number(stage, micro_run, tmp_path):
    """What --compile hands to the compiler, but not its code generator, which takes minutes for
    most stages.

    fullgraph: an error where the graph would break, as at a look at a number in a tensor."""
    model = stages.load_stage(micro_run, stage)
    model.train()
    if hasattr(model, "diffusion"):
        model.diffusion.range_checked = False  # as before a training's first step
    data, embeddings = Shapes(24), None
    if stages.needs_clip(stage):
        embeddings = embed(stages.load_clip(micro_run, "small"), data, tmp_path)
    batch = Batches(stage, model.config, data, embeddings,
                    {"batch_size": 8, "seed": 0, "steps": 3, "half_size_until": 0.0})[0]
    compiled = torch.compile(train.Loss(model), backend="eager", fullgraph=True)
    numbers = []
    for loss in (compiled, model.loss):
        torch.manual_seed(0)
        numbers.append(loss(batch).item())
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


def test_the_compiler_makes_one_graph_a_picture_size_and_none_a_caption_length(
        micro_run, tmp_path, monkeypatch):
    """And after another stage it starts afresh: the limit of its graphs is not the run's."""
    graphs = []

    def count(graph, inputs):
        examples = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        shapes = [x.shape for x in examples if torch.is_tensor(x)]
        graphs.append([s for s in shapes if all(type(n) is int for n in s)])  # no size left open
        return graph

    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, options: whole(self, backend=count))
    data = Shapes(24)
    embeddings = embed(stages.load_clip(micro_run, "small"), data, tmp_path)
    for _ in range(2):
        model = stages.load_stage(micro_run, "decoder").train()
        loss_of, lengths = train.Loss(model), set()
        batches = Batches("decoder", model.config, data, embeddings, {
            "batch_size": 3, "seed": 0, "steps": 8, "half_size_until": 0.5})
        train.compile_loss(loss_of)
        graphs.clear()
        for step in range(8):
            batch = batches[step]
            lengths.add(batch["text_enc"].shape[1])
            train.make_compilable(batch, model)
            loss_of(batch)
        assert len(lengths) > 2 and len(graphs) == 2
        for shapes, side in zip(graphs, (8, 16), strict=True):
            assert (3, 3, side, side) in shapes


def test_a_compiled_training_looks_at_the_first_pixels_too(micro_run):
    model = stages.load_stage(micro_run, "decoder")
    model.diffusion.range_checked = False
    with pytest.raises(UserError, match="must be in"):
        train.make_compilable({"image": torch.full((2, 3, 16, 16), 3.0)}, model)


@pytest.mark.skipif(not shutil.which("c++"), reason="generated code needs a C++ compiler")
def test_a_compiled_training_ends_where_an_uncompiled_one_does(micro_run, tmp_path):
    """Code is generated here, for this processor, and run: of the smallest stage, as it takes long.
    The seeds are the same and so is the noise; only the rounding of sums differs."""
    trained = {}
    for name, extra in (("plain", []), ("compiled", ["--compile"])):
        out = tmp_path / name
        out.mkdir()
        shutil.copy(micro_run / "clip.pt", out)
        assert train.main(["prior", "--preset", "micro", "--out", str(out), "--workers", "0",
                           "--steps", "2", *extra]) == 0
        trained[name] = checkpoint.load_checkpoint(out / "prior.pt")
    plain, compiled = trained["plain"], trained["compiled"]
    assert compiled["run"]["compile"] and not plain["run"]["compile"]
    assert compiled["figures"]["loss"] == pytest.approx(plain["figures"]["loss"], rel=1e-3)
    assert compiled["figures"]["val_loss"] == pytest.approx(plain["figures"]["val_loss"], rel=1e-3)


def test_a_finished_checkpoint_says_how_it_was_made(micro_run):
    for stage in stages.STAGES:
        made = checkpoint.load_checkpoint(micro_run / f"{stage}.pt")
        assert made["run"]["command"].startswith("python train.py ")
        assert {"seed", "fingerprint", "preset"} <= set(made["run"]) and made["step"] == 3
        assert {"loss", "images_per_s", "data_wait", "val_loss"} <= set(made["figures"])
        assert 0 <= made["figures"]["data_wait"] < 1


# --- interruptions ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = [*UPSAMPLER, "--steps", 30, "--save-every", 5, "--out", folder]
    assert train.main([str(a) for a in run]) == 0
    return folder


def start_and_wait(tmp_path, steps_before):
    run = command(
        *UPSAMPLER, "--steps", 30, "--save-every", 5, "--out", tmp_path
    )
    process = subprocess.Popen(
        run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 100
    while time.time() < deadline and process.poll() is None:
        log = tmp_path / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= steps_before:
            return process
        time.sleep(0.002)
    raise AssertionError(process.communicate())


def test_kill_9_then_resume_ends_with_the_same_bits(tmp_path, uninterrupted):
    process = start_and_wait(tmp_path, 9)
    process.kill()
    process.wait()
    saved = checkpoint.load_checkpoint(tmp_path / "upsampler1.pt")["step"]
    assert 5 <= saved < 30 and saved % 5 == 0  # lost no more than the steps since then
    subprocess.run(
        command(*UPSAMPLER, "--steps", 30, "--save-every", 5,
                "--out", tmp_path, "--resume"), cwd=ROOT, check=True, capture_output=True,
    )
    for key in ("model", "ema"):
        assert_same(weights(tmp_path, key=key), weights(uninterrupted, key=key))


def test_ctrl_c_saves_the_step_it_is_in_and_resume_goes_on(tmp_path, uninterrupted):
    process = start_and_wait(tmp_path, 7)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    step = checkpoint.load_checkpoint(tmp_path / "upsampler1.pt")["step"]
    assert 7 <= step < 30 and f"step {step}" in errors
    run = [
        *UPSAMPLER,
        "--steps",
        30,
        "--save-every",
        5,
        "--out",
        tmp_path,
        "--resume",
    ]
    assert train.main([str(a) for a in run]) == 0
    assert_same(weights(tmp_path), weights(uninterrupted))


def test_the_grid_shows_the_captions_that_the_decoder_read(micro_run, tmp_path, monkeypatch):
    clip, data, seen = stages.load_clip(micro_run), Shapes(24, "val"), {}
    path = micro_run / "decoder_caption.pt"
    model = stages.build(checkpoint.load_checkpoint(path), path)
    batches = Batches("decoder_caption", model.config, data, embed(clip, data, tmp_path),
                      {"batch_size": 16, "half_size_until": 0, "steps": 1})

    def draw(image_emb, text_enc, text_mask, **settings):
        seen.update(text_enc=text_enc, text_mask=text_mask)
        return torch.zeros(len(text_enc), 3, 16, 16)

    monkeypatch.setattr(model, "sample", draw)
    _, _, captions = train.preview("decoder_caption", model, batches, 1, torch.device("cpu"))
    _, text_enc, text_mask = clip.encode_text(captions)
    assert len(set(map(len, captions))) > 1
    torch.testing.assert_close(seen["text_enc"][seen["text_mask"]], text_enc[text_mask],
                               rtol=1e-2, atol=1e-2)


def test_export_does_not_write_over_the_shipped_weights(micro_run, capsys):
    assert train.main(["export", "--out", str(micro_run)]) == 2
    assert "--to" in capsys.readouterr().err


def test_a_finished_stage_needs_no_embeddings(micro_run, monkeypatch, capsys):
    monkeypatch.setattr(train, "embed", None)  # computing them would fail
    run = ["prior", "--preset", "micro", "--out", str(micro_run), "--resume", "--workers", "0"]
    assert train.main(run) == 0
    assert "already trained" in capsys.readouterr().out


def test_a_finished_stage_is_left_alone(tmp_path, capsys):
    run = [*UPSAMPLER, "--steps", "2", "--out", str(tmp_path)]
    assert train.main(run) == 0
    before = (tmp_path / "upsampler1.pt").read_bytes()
    assert train.main(run) == 2  # without --resume nothing is overwritten
    assert "--resume" in capsys.readouterr().err
    assert train.main([*run, "--resume"]) == 0
    assert "already trained" in capsys.readouterr().out
    assert (tmp_path / "upsampler1.pt").read_bytes() == before


def test_examples_are_counted_through_another_batch_size(tmp_path):
    run = [*UPSAMPLER, "--out", str(tmp_path), "--workers", "0", "--resume"]
    assert train.main([*run, "--steps", "3"]) == 0
    path = tmp_path / "upsampler1.pt"
    saved = checkpoint.load_checkpoint(path)
    assert saved["figures"]["examples"] == 3 * 4
    del saved["figures"]["examples"]  # an older checkpoint: counted by its own batch size
    checkpoint.save_checkpoint(path, saved)
    for steps, size, count in ((5, "8", 3 * 4 + 2 * 8), (6, "4", 3 * 4 + 2 * 8 + 4)):
        assert train.main([*run, "--steps", str(steps), "--batch-size", size]) == 0
        assert checkpoint.load_checkpoint(path)["figures"]["examples"] == count
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["examples"] for line in lines if "examples" in line][-1] == count


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    run = [*UPSAMPLER, "--out", str(tmp_path), "--save-every", "2", "--workers", "0"]
    loss, calls = stages.Upsampler.loss, []

    def breaks_at_step_5(self, batch):
        calls.extend([1] * self.training)  # not those of the validation
        return loss(self, batch) * (math.nan if self.training and len(calls) == 5 else 1)

    monkeypatch.setattr(stages.Upsampler, "loss", breaks_at_step_5)
    assert train.main([*run, "--steps", "8"]) == 2
    errors = capsys.readouterr().err
    assert "step 5" in errors and "nan" in errors and "--lr" in errors
    assert checkpoint.load_checkpoint(tmp_path / "upsampler1.pt")["step"] == 4
    assert all(p.isfinite().all() for p in weights(tmp_path).values())


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, capsys):
    run = [*UPSAMPLER, "--out", str(tmp_path), "--save-every", "2", "--workers", "0"]
    save, calls = torch.save, []

    def second_time_full(what, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(what, file)

    monkeypatch.setattr(torch, "save", second_time_full)
    assert train.main([*run, "--steps", "8"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert checkpoint.load_checkpoint(tmp_path / "upsampler1.pt")["step"] == 2


# --- bfloat16 --------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_every_stage_trains_and_draws_with_autocast_on_and_off(monkeypatch, tmp_path, fast):
    """Whatever this CPU multiplies fast: on another one the other path runs."""
    monkeypatch.setattr(tools, "cpu_is_fast_in_bf16", lambda: fast)
    run = ["--preset", "micro", "--out", str(tmp_path), "--workers", "0", "--sample-every", "1"]
    for stage in ["all"], ["ar_prior"], ["decoder", "--condition", "caption"]:
        assert train.main([*stage, *run, "--steps", "2"]) == 0
    options = ["--weights", str(tmp_path), "--size", "64", "--out", str(tmp_path)]
    assert sample.main(["text", "a red circle", "-n", "1", *options]) == 0
    picture = str(tmp_path / "a-red-circle_0.png")
    mask, inversion = str(ROOT / "docs/pictures/mask.png"), ["--steps", "3", *options]
    assert sample.main(["vary", picture, "-n", "1", *inversion]) == 0
    assert sample.main(["edit", picture, "--to", "a blue star", "--frames", "2", *inversion]) == 0
    assert sample.main(["inpaint", picture, mask, "a red circle", "--steps", "3", *options]) == 0
    assert evaluate.main(["losses", "-n", "8", "--weights", str(tmp_path)]) == 0


# --- several processes -----------------------------------------------------------------------


def torchrun(tmp_path, *arguments):
    script = tmp_path / "run.py"
    here = PREFIX.replace("'tests'", f"'{ROOT}', '{ROOT / 'tests'}'")
    script.write_text(here + "\nif __name__ == '__main__': sys.exit(train.main())")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), *map(str, arguments)],
        cwd=ROOT, check=True, capture_output=True, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_two_processes_train_all_stages_in_turn(tmp_path):
    """CLIP's loss over both processes' rows too; and nobody reads a CLIP that is half trained."""
    torchrun(tmp_path, "all", "--preset", "micro", "--workers", 0, "--sample-every", 3,
             "--out", tmp_path / "two")
    identity = stages.load_clip(tmp_path / "two").identity
    for stage in stages.ORDER:
        saved = checkpoint.load_checkpoint(tmp_path / "two" / f"{stage}.pt", stage)
        assert saved["step"] == 3
        assert saved["clip"] is None or saved["clip"]["identity"] == identity


def test_two_processes_take_the_step_of_the_averaged_gradient(tmp_path):
    """torchrun with gloo on this machine, against both halves computed here by hand."""
    run = [*UPSAMPLER, "--steps", 2, "--workers", 0, "--decay", "constant"]
    torchrun(tmp_path, *run, "--out", tmp_path / "two")

    torch.manual_seed(0)
    model = make_model("upsampler1", "micro", None, None).train()
    optimizers = make_optimizers(model, 2.0)
    settings = {"batch_size": 4, "seed": 0}
    for step in range(2):
        for rank in range(2):
            batch = Batches("upsampler1", model.config, Shapes(16), None, settings, rank, 2)[step]
            torch.manual_seed(hash((0, step, rank)) % 2**62)
            with tools.autocast("cpu"):
                loss = model.loss(batch) / 2
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.MAX_GRADIENT)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-3 * optimizer.param_groups[0]["scale"]
            with tools.autocast("cpu"):
                optimizer.step()
            optimizer.zero_grad()
    expected = model.state_dict()
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_one_process_and_two_follow_the_same_loss_curve(micro_run, tmp_path):
    """The same global batches; each process draws its own noise, so curves agree in the mean."""
    run = ["decoder", "--preset", "micro", "--steps", 80, "--workers", 0, "--batch-size", 16,
           "--lr", 5e-3, "--sample-every", 80]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(micro_run / "clip.pt", tmp_path / name)
    torchrun(tmp_path, *run, "--out", tmp_path / "two")
    assert train.main([*map(str, run), "--out", str(tmp_path / "one")]) == 0
    curves = []
    for name in ("one", "two"):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses = [x["loss"] for x in lines if "loss" in x]
        curves.append([sum(losses[k : k + 5]) / 5 for k in range(0, 20, 5)])
    one, two = map(torch.tensor, curves)
    torch.testing.assert_close(one, two, rtol=0.15, atol=0)
    assert one[-1] < 0.75 * one[0]  # there is a curve to agree on


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["painter"], "unknown stage 'painter'"),
        (["clip", "--preset", "huge"], "unknown preset 'huge'"),
        (["clip", "--batch-size", "0"], "must be 1 or more"),
        (["clip", "--steps", "0"], "must be 1 or more"),
        (["clip", "--steps", "many"], "--steps"),
        (["clip", "--data", "folder"], "--root"),
        (["clip", "--data", "folder", "--root", "/no/such/folder"], "/no/such/folder"),
        (["clip", "--data", "imagenet"], "imagenet"),
        (["prior", "--preset", "micro"], "clip.pt"),
        (["clip", "--device", "abacus"], "abacus"),
        (["clip", "--lr", "-1"], "--lr"),
        (["clip", "--seed", "-1"], "--seed"),
        (["clip", "--batch-size", "1"], "two or more"),
        (["clip", "--lr", "1e300"], "below 1e30"),
        (["clip", "--seed", str(2**29)], "below 2^29"),
        (["clip", "--workers", "-1"], "--workers"),
        (["clip", "--wat"], "--wat"),
        (["prior", "--condition", "caption"], "decoder alone"),
        (["decoder", "--condition", "smell"], "smell"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, says, capsys, tmp_path):
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: ") and says in errors and "\n" not in errors


def test_an_out_that_is_a_file_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(["clip", "--preset", "micro", "--out", str(tmp_path / "file")]) == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: ") and str(tmp_path / "file") in errors and "\n" not in errors


def test_resume_refuses_another_clip(micro_run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(micro_run, copy)
    saved = torch.load(copy / "clip.pt", weights_only=True)
    saved["ema"]["model.text_projection"] += 1
    torch.save(saved, copy / "clip.pt")
    run = ["prior", "--preset", "micro", "--steps", "9", "--resume", "--out", str(copy)]
    assert train.main(run) == 2 and "do not mix" in capsys.readouterr().err


def test_a_picture_that_breaks_in_training_is_named_in_one_line(tmp_path, capsys):
    for k in range(6):
        Image.new("RGB", (40, 30), (40 * k, 0, 0)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(f"number {k}")
    data = train.load_data("folder", str(tmp_path))  # all fine now, and remembered as fine
    whole = data.items[0][0].read_bytes()
    data.items[0][0].write_bytes(whole[: len(whole) // 2])
    run = ["clip", "--data", "folder", "--root", str(tmp_path), "--preset", "micro"]
    run += ["--workers", "1"]
    assert train.main([*run, "--out", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: image") and data.items[0][0].name in errors[-1]
    assert not any("Traceback" in line for line in errors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_says_so(capsys, tmp_path):
    assert train.main(["clip", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device cpu" in capsys.readouterr().err
