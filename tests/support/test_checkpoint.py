"""Claims about checkpoints: rebuilt alone, written whole or not at all, read without running."""

import errno
import math
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import stages
from clip_model import SmallClip, SmallClipConfig, freeze_small_clip
from decoder import Decoder, DecoderConfig
from prior import DiffusionPrior, PriorConfig
from stages import check_clip, load_clip, load_stage
from support.checkpoint import load_checkpoint, save_checkpoint
from support.tokenizer import make_vocab
from support.tools import UserError
from upsampler import Upsampler, UpsamplerConfig
from conftest import ROOT

SIZES = dict(dim=16, text_width=12, text_len=8)
MODELS = {
    "clip": lambda: SmallClip(SmallClipConfig(
        make_vocab(["a red star"]), dim=16, image_size=32, vision_width=8, text_width=32,
        text_layers=1, text_heads=2, context_length=8,
    )),
    "prior": lambda: DiffusionPrior(PriorConfig(**SIZES, width=32, depth=1, heads=2, copies=3)),
    "decoder": lambda: Decoder(DecoderConfig(
        **SIZES, size=16, channels=8, multiples=(1, 2), attention_levels=(1,), context_width=32,
        text_depth=1,
    )),
    "upsampler1": lambda: Upsampler(UpsamplerConfig(
        low_size=16, size=64, crop=16, channels=8, multiples=(1, 2),
    )),
}


pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def describe(stage, model, **changes):
    clip = {"spec": "small", "identity": "small:0123"}
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    return dict(stage=stage, config=asdict(model.config), ema=ema, step=7, clip=clip) | changes


@pytest.fixture
def prior_file(tmp_path):
    """A good checkpoint of a prior, its path and its dictionary."""
    path = tmp_path / "prior.pt"
    saved = describe("prior", MODELS["prior"]())
    save_checkpoint(path, saved)
    return path, saved


def fails_with(path, *words):
    """A UserError of one line that names the file and says these words."""
    return pytest.raises(
        UserError, match=r"(?s)^(?!.*\n)" + "".join(f"(?=.*{w})" for w in (path, *words))
    )


def answer(model):
    """The prior's answer to a fixed question."""
    torch.manual_seed(5)
    text = torch.randn(2, 16), torch.randn(2, 8, 12), torch.ones(2, 8, dtype=torch.bool)
    with torch.no_grad():
        cond = model.encode_caption(*text)
        return model(torch.randn(2, 16), torch.tensor([3, 500]), **cond)


# --- round trips ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", MODELS)
def test_a_checkpoint_alone_rebuilds_its_model(tmp_path, stage):
    model = MODELS[stage]()
    saved = describe(stage, model)
    saved["config"] = {k: list(v) if isinstance(v, tuple) else v
                       for k, v in saved["config"].items()}
    raw = {name: torch.zeros_like(value) for name, value in saved["ema"].items()}
    save_checkpoint(tmp_path / "new" / f"{stage}.pt", saved | {"model": raw})
    rebuilt = load_stage(tmp_path / "new", stage)
    assert rebuilt.config == model.config  # all of it: tuples are tuples again
    assert type(rebuilt) is type(model) and not rebuilt.training
    assert rebuilt.clip == {"spec": "small", "identity": "small:0123"}
    wanted = model.state_dict()  # the averaged weights, not the raw ones
    assert rebuilt.state_dict().keys() == wanted.keys()
    for name, value in rebuilt.state_dict().items():
        assert_close(value, wanted[name], rtol=0, atol=0)


def test_a_rebuilt_model_gives_the_same_answer_also_from_half_precision(prior_file):
    path, saved = prior_file
    model = MODELS["prior"]()
    model.load_state_dict(saved["ema"])
    wanted = answer(model.eval())
    assert_close(answer(load_stage(path.parent, "prior")), wanted, rtol=0, atol=0)
    half = {name: value.half() for name, value in saved["ema"].items()}
    save_checkpoint(path, saved | {"ema": half})
    model = load_stage(path.parent, "prior")
    assert {v.dtype for v in model.state_dict().values()} <= {torch.float32, torch.float64}
    assert_close(answer(model), wanted, rtol=0, atol=1e-2)


# --- writing --------------------------------------------------------------------------------


def failing_save(error):
    def save(checkpoint, file):
        file.write(b"half of a checkpoint")
        raise error

    return save


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("PytorchStreamWriter failed writing file data/3"),
])
def test_a_failed_write_leaves_the_previous_checkpoint_as_it_was(monkeypatch, prior_file, error):
    path, saved = prior_file
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", failing_save(error))
    with fails_with("prior.pt", "previous checkpoint is untouched"):
        save_checkpoint(path, saved | {"step": 8})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["prior.pt"]  # no .tmp stays behind


def test_the_new_checkpoint_is_on_the_disk_before_it_replaces_the_old(monkeypatch, prior_file):
    path, saved = prior_file
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append("fsync"), fsync(f)))

    def watched(source, target):
        order.append("replace")
        assert Path(target) == path and load_checkpoint(path)["step"] == 7  # still the old one
        assert torch.load(source, weights_only=True)["step"] == 8  # and the new one is complete
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    save_checkpoint(path, saved | {"step": 8})
    assert order == ["fsync", "replace"] and load_checkpoint(path)["step"] == 8


def test_a_folder_that_is_a_file_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with fails_with("file/prior.pt"):
        save_checkpoint(tmp_path / "file" / "prior.pt", {})


# --- reading --------------------------------------------------------------------------------


class Code:
    """Unpickled by a careless reader, it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    path, trap = tmp_path / "prior.pt", tmp_path / "created"
    torch.save(describe("prior", MODELS["prior"](), run=Code(trap)), path)
    with fails_with("prior.pt", "may hold code"):
        load_checkpoint(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap works


def test_a_file_that_is_no_checkpoint_is_reported(prior_file):
    path, _ = prior_file
    whole = path.read_bytes()
    for content in (*(whole[: int(part * len(whole))] for part in (0, 0.1, 0.5, 0.999)),
                    b"<html>404: no such weights</html>"):
        path.write_bytes(content)
        with fails_with("prior.pt", "again"):
            load_checkpoint(path)
    for something in (torch.ones(3), 7, ["stage", "config", "ema", "step"]):
        torch.save(something, path)
        with fails_with("prior.pt", "not a checkpoint"):
            load_checkpoint(path)


def test_a_missing_file_is_reported(tmp_path):
    with fails_with("nowhere/prior.pt", "no weights"):
        load_stage(tmp_path / "nowhere", "prior")
    with fails_with(str(tmp_path), "no weights"):
        load_checkpoint(tmp_path)  # a folder


def test_another_stages_file_is_reported(prior_file):
    path, _ = prior_file
    assert load_checkpoint(path, "prior")["step"] == 7
    with fails_with("prior.pt", "'prior'", "'decoder'"):
        load_checkpoint(path, "decoder")


@pytest.mark.parametrize("key", ["stage", "config", "ema", "step"])
def test_a_missing_part_is_reported(prior_file, key):
    path, saved = prior_file
    torch.save({k: v for k, v in saved.items() if k != key}, path)
    with fails_with("prior.pt", key):
        load_checkpoint(path)


@pytest.mark.parametrize("broken", [
    {"config": {"unheard_of": 1}}, {"config": {"width": 64}}, {"config": {"text_len": 9}},
    {"stage": "autoregressive"}, {"config": {}},
    {"config": None}, {"ema": None}, {"ema": {}},
], ids=str)
def test_a_config_or_weights_that_do_not_fit_are_reported(prior_file, broken):
    path, saved = prior_file
    if broken.get("config"):
        broken = {"config": saved["config"] | broken["config"]}
    save_checkpoint(path, saved | broken)
    with fails_with("prior.pt", "train"):
        stages.build(load_checkpoint(path), path)


# --- which CLIP -----------------------------------------------------------------------------


def test_a_stage_meets_only_the_clip_it_was_trained_for(tmp_path, prior_file):
    save_checkpoint(tmp_path / "clip.pt", describe("clip", MODELS["clip"]()))
    clip, path = load_clip(tmp_path), prior_file[0]
    with fails_with("prior.pt", "small:0123", clip.identity):
        check_clip(load_stage(tmp_path, "prior").clip, clip, path)
    check_clip({"spec": "small", "identity": clip.identity}, clip, path)


def test_the_small_clip_comes_back_frozen_and_itself(tmp_path):
    small = MODELS["clip"]().eval()
    half = {name: value.half() for name, value in small.state_dict().items()}
    save_checkpoint(tmp_path / "clip.pt", describe("clip", small, ema=half))
    clip, wanted = load_clip(tmp_path), freeze_small_clip(small)
    assert clip.identity == wanted.identity  # also from half precision
    for ours, theirs in zip(
        clip.encode_text(["a red star", "star"]), wanted.encode_text(["a red star", "star"])
    ):
        assert_close(ours, theirs, rtol=0, atol=2e-2)


@pytest.mark.parametrize("stage", sorted(stages.STAGES))
def test_the_shipped_weights_fit_the_code_as_it_is(stage):
    model = stages.load_stage(ROOT / "weights/shapes", stage)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("broken", [
    {"step": "1"}, {"step": -1}, {"step": 1.5}, {"config": []}, {"ema": {"x": 1}}, {"run": [1]},
    {"run": {"steps": "2"}}, {"figures": {"examples": "many"}}, {"clip": "small"},
    {"clip": {"spec": "small"}}, {"clip": {"spec": 5, "identity": "x"}},
], ids=str)
def test_parts_of_the_wrong_kind_are_one_line(broken, prior_file):
    path, saved = prior_file
    save_checkpoint(path, saved | broken)
    with fails_with("prior.pt", "parts are not those of a checkpoint"):
        load_checkpoint(path)


def test_weights_that_are_not_finite_are_refused(prior_file):
    path, saved = prior_file
    name = next(iter(saved["ema"]))
    save_checkpoint(path, saved | {"ema": saved["ema"] | {name: saved["ema"][name] * math.nan}})
    with fails_with("prior.pt", name):
        load_checkpoint(path)


def test_a_flipped_bit_in_the_weights_is_noticed(prior_file):
    path, saved = prior_file
    data, weight = bytearray(path.read_bytes()), saved["ema"]["query"].numpy().tobytes()
    assert data.count(weight) >= 1
    data[data.index(weight)] ^= 1
    path.write_bytes(data)
    with fails_with("prior.pt", "damaged"):
        load_checkpoint(path)
