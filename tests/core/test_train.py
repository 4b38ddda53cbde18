"""train.py: the schedule, the average, the batches and the settings (whole runs: tests/support)."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import stages
import train
from decoder import Decoder, DecoderConfig
from support.shapes import Shapes
from support.tools import UserError, autocast, choose_device, place
from train import Batches, Ema, learning_rate, settle, validate
from upsampler import Upsampler, UpsamplerConfig

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def upsampler():
    return Upsampler(UpsamplerConfig(
        low_size=16, size=32, crop=16, channels=8, multiples=(1, 2), sample_steps=2))


def test_rate_warms_up_linearly_then_follows_half_a_cosine():
    settings = {"steps": 1000, "lr": 0.2}
    warm_up = [0.2 * (s + 1) / 50 * 0.5 * (1 + math.cos(math.pi * s / 1000)) for s in range(50)]
    np.testing.assert_allclose([learning_rate(s, settings) for s in range(50)], warm_up)
    assert learning_rate(500, settings) == pytest.approx(0.1)
    assert learning_rate(1000, settings) == pytest.approx(0, abs=1e-12)


def test_ema_warms_up_by_one_plus_n_over_ten_plus_n_to_its_decay(monkeypatch):
    monkeypatch.setattr(train, "EMA_DECAY", 0.9)  # at n = 80
    model = torch.nn.Linear(1, 1, bias=False)
    ema, expected = Ema(model), model.weight.item()
    for n in range(200):
        torch.nn.init.constant_(model.weight, n)
        ema.update(model)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * n
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_ema_copies_buffers_and_never_averages_them():
    model = torch.nn.BatchNorm1d(2)
    ema = Ema(model)
    model.running_mean.fill_(7)
    model.num_batches_tracked.fill_(5)
    ema.update(model)
    assert ema.model.running_mean.tolist() == [7, 7] and ema.model.num_batches_tracked == 5


# --- batches -------------------------------------------------------------------------------------


class Numbers:
    """A stage whose batch is the numbers of its pictures, and whose loss is their mean."""

    config = None

    @staticmethod
    def batch(config, data, embeddings, indices, rng):
        return {"value": torch.tensor(indices, dtype=torch.float)}

    def loss(self, batch, t=None):
        return batch["value"].mean()


def test_a_batch_is_a_function_of_seed_and_step():
    batches, again = (Batches(upsampler(), Shapes(50), None, 8, 3) for _ in range(2))
    for name, x in batches[7].items():
        assert torch.equal(x, again[7][name])
        assert not torch.equal(x, batches[8][name])


def test_processes_share_one_global_batch_without_repetition():
    whole, *halves = (Batches(Numbers(), range(50), None, 8, 3, "cpu", rank, world)[5]["value"]
                      for rank, world in ((0, 1), (0, 2), (1, 2)))
    assert len(set(whole.tolist())) == 8
    assert torch.equal(halves[0], whole[0::2]) and torch.equal(halves[1], whole[1::2])


def test_processes_draw_alike_so_that_clip_meets_captions_of_one_kind():
    class Draw(Numbers):
        @staticmethod
        def batch(config, data, embeddings, indices, rng):
            return {"drawn": rng.random(), "indices": indices}

    one, other = (Batches(Draw(), range(50), None, 8, 3, "cpu", rank, 2)[5] for rank in (0, 1))
    assert one["drawn"] == other["drawn"] and not set(one["indices"]) & set(other["indices"])


def test_batches_are_made_in_float32_even_inside_autocast():
    """Resizing in bfloat16 is an error of PyTorch's on CPUs, and would be inexact elsewhere."""
    bsr = Upsampler(dataclasses.replace(upsampler().config, degradation="bsr"))
    batches = Batches(bsr, Shapes(4), None, 2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        batch = batches[0]
    assert {x.dtype for x in batch.values()} == {torch.float32}
    assert all(torch.equal(x, batches[0][name]) for name, x in batch.items())


def test_a_look_is_at_pictures_from_everywhere_in_the_data_and_always_the_same():
    seen, captions = Batches(Numbers(), range(1000), None, 8, seed=5).look()
    assert captions is None and len(set(seen["value"].tolist())) == 16
    assert seen["value"].max() > 500 and not torch.equal(seen["value"].sort().values, seen["value"])
    again, _ = Batches(Numbers(), range(1000), None, 4, seed=9).look()
    assert torch.equal(seen["value"], again["value"])


# --- validation ----------------------------------------------------------------------------------


def test_a_quarter_of_validation_draws_its_own_levels(monkeypatch):
    model, seen = upsampler().eval(), []
    T, q_sample = model.diffusion.T, model.diffusion.q_sample
    monkeypatch.setattr(model.diffusion, "q_sample",
                        lambda x, t, noise: seen.append(t) or q_sample(x, t, noise))
    one = validate(model, Batches(model, Shapes(40, "val"), None, 200, 0), torch.device("cpu"), 96)
    for q in range(4):
        t = torch.cat(seen[q::4])
        assert q * T // 4 <= t.min() and t.max() < (q + 1) * T // 4
        assert t.max() - t.min() > T // 5 and len(t) == 96
    assert not torch.equal(seen[0], seen[4])  # two batches, two noises
    quarters = [one[f"val_q{q}"] for q in (1, 2, 3, 4)]
    assert one["val_loss"] == pytest.approx(sum(quarters) / 4)
    torch.manual_seed(99)  # and with another batch size: the same pictures, the same noise
    again = Batches(model, Shapes(40, "val"), None, 4, 1)
    assert validate(model, again, torch.device("cpu"), 96) == one


def test_without_noise_levels_validation_is_one_batch_that_shows_no_picture_twice():
    """To CLIP, the same picture twice would be two right answers, and one would count as wrong."""
    batches, shown = Batches(Numbers(), range(5), None, 8, 0), []
    make = batches.make
    batches.make = lambda data, embeddings, indices, rng: shown.append(indices) or make(
        data, embeddings, indices, rng)
    assert validate(Numbers(), batches, torch.device("cpu")) == {"val_loss": 2.0}
    assert len(shown) == 1 and sorted(shown[0]) == [0, 1, 2, 3, 4]


# --- stages and settings -------------------------------------------------------------------------


def test_baselines_have_the_decoders_size_and_budget():
    model, training = stages.recipe("base", "decoder")
    for condition in ("text_emb", "caption"):
        other, budget = stages.recipe("base", f"decoder_{condition}")
        assert budget == training and other["condition"] == condition
        assert {k: v for k, v in other.items() if k in model} == model
    assert stages.recipe("base", "ar_prior")[1] == stages.recipe("base", "prior")[1]


@pytest.mark.parametrize("preset", ["tiny", "base", "large"])
def test_every_preset_gives_models_that_fit_each_other(preset):
    sizes = {"dim": 16, "text_width": 16, "text_len": 8}
    decoder = DecoderConfig(**sizes, **stages.recipe(preset, "decoder")[0])
    first, second = (UpsamplerConfig(**stages.recipe(preset, s)[0])
                     for s in ("upsampler1", "upsampler2"))
    assert (decoder.size, first.size) == (first.low_size, second.low_size)
    if preset != "large":
        Decoder(decoder), Upsampler(first), Upsampler(second)


def arguments(**given):
    names = (*train.KEPT, "save_every", "sample_every", "workers", "compile", "command")
    return SimpleNamespace(**dict.fromkeys(names) | given)


def test_settings_are_the_command_lines_else_the_runs_else_the_presets(capsys):
    fresh = settle("prior", arguments(), {})
    assert fresh["steps"] == stages.recipe("tiny", "prior")[1]["steps"]
    assert (fresh["data"], fresh["preset"], fresh["seed"]) == ("shapes", "tiny", 0)
    before = {"data": "folder", "root": "pictures", "limit": 40, "preset": "base", "steps": 9,
              "batch_size": 3, "lr": 0.5, "seed": 7}
    assert before.items() <= settle("prior", arguments(), before).items()
    given = {"steps": 20, "lr": 0.1, "root": "moved"}
    assert (before | given).items() <= settle("prior", arguments(**given), before).items()
    notes = capsys.readouterr().out
    for name, x in given.items():
        assert f"note: prior: {name} was {before[name]}, is {x} now" in notes
    for name, value in (("data", "shapes"), ("preset", "tiny"), ("seed", 1)):
        with pytest.raises(UserError, match=f"{name} was {before[name]}, .*leave it out"):
            settle("prior", arguments(**{name: value}), before)


def test_an_apple_gpu_is_taken_where_there_is_one(monkeypatch):
    """As far as a machine without one can tell: chosen by name, in float32, without float64."""
    with pytest.raises(UserError, match="--device mps"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert not autocast(choose_device("mps"))._enabled and choose_device("auto").type == "cpu"

    to, mps = torch.nn.Module.to, torch.device("mps")
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *where, **how: to(
        self, *("meta" if x == mps else x for x in where), **how))
    moved = place(upsampler(), mps)
    tensors = [*moved.parameters(), *moved.buffers()]
    assert all(x.is_meta and x.dtype != torch.float64 for x in tensors)
