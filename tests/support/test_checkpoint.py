"""Claims about checkpoints: rebuilt alone, written whole or not at all, read without running."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import stages
from conftest import ROOT
from stages import load_stage
from support.checkpoint import load_checkpoint, save_checkpoint
from support.tools import UserError

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


@pytest.fixture
def prior_file(untrained_run, tmp_path):
    """A good checkpoint of a prior, its path and its dictionary."""
    path = Path(shutil.copy(untrained_run / "prior.pt", tmp_path))
    return path, load_checkpoint(path)


def fails_with(path, *words):
    """A UserError of one line that names the file and says these words."""
    return pytest.raises(
        UserError, match=r"(?s)^(?!.*\n)" + "".join(f"(?=.*{w})" for w in (path, *words))
    )


# --- round trips ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_checkpoint_alone_rebuilds_its_model(untrained_run, tmp_path, stage):
    saved = load_checkpoint(untrained_run / f"{stage}.pt")
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in saved["config"].items()}
    raw = {name: torch.zeros_like(value) for name, value in saved["ema"].items()}
    save_checkpoint(tmp_path / "new" / f"{stage}.pt", saved | {"model": raw, "config": config})
    rebuilt = load_stage(tmp_path / "new", stage)
    assert asdict(rebuilt.config) == saved["config"]  # all of it: tuples are tuples again
    assert not rebuilt.training and rebuilt.clip == saved["clip"]
    # The averaged weights, not the raw ones.
    assert_close(dict(rebuilt.state_dict()), saved["ema"], rtol=0, atol=0)


# --- writing --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("failed writing data/3")])
def test_a_failed_write_leaves_the_previous_checkpoint_as_it_was(monkeypatch, prior_file, error):
    path, saved = prior_file
    before = path.read_bytes()

    def save(checkpoint, file):
        file.write(b"half of a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", save)
    with fails_with("prior.pt", "what was there is untouched"):
        save_checkpoint(path, saved)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["prior.pt"]  # no .tmp stays behind


# --- reading --------------------------------------------------------------------------------


class Code:
    """Unpickled by a careless reader, it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    path, trap = tmp_path / "prior.pt", tmp_path / "created"
    torch.save({"stage": "prior", "run": Code(trap)}, path)
    with fails_with("prior.pt", "UnpicklingError"):
        load_checkpoint(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap works


def test_a_file_that_is_no_checkpoint_is_reported(prior_file):
    path, saved = prior_file
    whole = path.read_bytes()
    for content in (*(whole[: int(part * len(whole))] for part in (0, 0.1, 0.5, 0.999)),
                    b"\x80\x02}q\0.", b"<html>404</html>"):
        path.write_bytes(content)
        with fails_with("prior.pt", "damaged or no checkpoint .*again"):
            load_checkpoint(path)
    data, weight = bytearray(whole), saved["ema"]["query"].numpy().tobytes()
    assert data.count(weight) >= 1
    data[data.index(weight)] ^= 1  # a flipped bit
    path.write_bytes(data)
    with fails_with("prior.pt", "damaged or no checkpoint"):
        load_checkpoint(path)
    keys = ("stage", "config", "ema", "step")
    for something in (torch.ones(3), 7, [*keys],
                      *({k: v for k, v in saved.items() if k != key} for key in keys)):
        torch.save(something, path)
        with fails_with("prior.pt", "no checkpoint"):
            load_checkpoint(path)


def test_a_missing_file_and_another_stages_are_reported(prior_file):
    path, _ = prior_file
    for there, stage, words in ((path.parent / "nowhere/prior.pt", None, ["no weights"]),
                                (path.parent, None, ["no weights"]),  # a folder
                                (path, "decoder", ["'prior'", "'decoder'"])):
        with fails_with(str(there), *words):
            load_checkpoint(there, stage)


@pytest.mark.parametrize("broken", [
    {"config": {"unheard_of": 1}}, {"config": {"width": 64}}, {"config": {"text_len": 9}},
    {"config": {"predict": ["x_0"]}}, {"stage": "autoregressive"}, {"config": {}},
    {"config": None}, {"ema": None}, {"ema": {}},
], ids=str)
def test_parts_that_do_not_fit_are_reported(prior_file, broken):
    path, saved = prior_file
    if broken.get("config"):
        broken = {"config": saved["config"] | broken["config"]}
    save_checkpoint(path, saved | broken)
    with fails_with("prior.pt", "do not fit", "train"):
        stages.build(load_checkpoint(path), path)


@pytest.mark.parametrize("stage", sorted(stages.STAGES))
def test_the_shipped_weights_fit_the_code_as_it_is(stage):
    model = stages.load_stage(ROOT / "weights/shapes", stage)
    assert all(torch.isfinite(p).all() for p in model.parameters())
