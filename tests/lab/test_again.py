"""lab/again.py: a training's command gives the losses again that its checkpoint holds."""

import pytest

import train
from lab import again
from lab.again import main
from support.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import ROOT


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = "--preset tiny --steps 3 --batch-size 8 --limit 32 --workers 0 --device cpu".split()
    assert train.main(["clip", *said, "--out", str(tmp_path)]) == 0
    return tmp_path


def test_a_command_gives_its_first_losses_again_and_other_losses_are_told(
        trained, capfd, monkeypatch):
    path = trained / "clip.pt"
    checkpoint = load_checkpoint(path)
    assert list(checkpoint["first_losses"]) == [1, 2, 3]
    checkpoint["run"]["command"] = checkpoint["run"]["command"].replace(" clip ", " all ")
    checkpoint["first_losses"].pop(1)  # as if it had been interrupted
    save_checkpoint(path, checkpoint)
    commands, popen = [], again.subprocess.Popen
    monkeypatch.setattr(again.subprocess, "Popen", lambda c: commands.append(c) or popen(c))
    assert main(["--weights", str(trained)]) == 0
    assert commands[0][1:3] == ["train.py", "clip"]  # not all stages
    told = [line.split(": ")[1] for line in capfd.readouterr().out.splitlines() if "again" in line]
    assert len(told) == 2 and all(len(set(x.split(", again "))) == 1 for x in told)
    losses = checkpoint["first_losses"] | {2: 1.05 * checkpoint["first_losses"][2]}
    monkeypatch.setattr(again, "losses_again", lambda *_: losses)
    assert main(["--weights", str(trained / "typo")]) == 2
    assert "has no trained stage" in capfd.readouterr().err
    assert main(["--weights", str(trained)]) == 2
    assert "other losses than in the training: clip" in capfd.readouterr().err
