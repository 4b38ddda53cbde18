"""Checkpoints: a trained stage on disk, never half written; reading one never runs code in it.

A checkpoint is a plain dictionary that torch.load(weights_only=True) accepts:

    stage     its name in STAGES
    config    the fields of the frozen dataclass that built the model
    ema       the averaged weights, which sampling uses
    step      training steps done
    model, optimizer     what else --resume needs (exported copies lack it)
    clip      which CLIP the stage was trained for: {"spec", "identity"}
    run       the settings of the training: command, seed, the data's fingerprint, ...
    figures   the last loss and other figures that the training reported
    first_losses         {step: loss} of the first 200 steps (lab/again.py compares them)

A stage is rebuilt from its checkpoint alone, never from flags that must be repeated by hand.
"""

import os
import zipfile
from pathlib import Path

import torch

from support.tools import UserError


def save_checkpoint(path, checkpoint):
    """Write all of it or nothing: to a file beside it, which then replaces it, so a crash or a full
    disk in the middle leaves the old checkpoint as it was."""
    path = Path(path)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as f:  # torch would write the name of a path into it
            torch.save(checkpoint, f)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path} ({e}): make room or choose another --out; what was "
                        "there is untouched") from e
    finally:  # after a second Ctrl-C as well
        temporary.unlink(missing_ok=True)


def export_checkpoints(run, folder, stages):
    """Small copies of a run's stages: averaged weights in half precision, without raw weights and
    optimizer. They are a sixth (Muon) to an eighth (Adam) of the size, enough to draw with or to
    continue training from. CLIP's identity, a hash of half-precision weights, stays the same."""
    paths = [Path(run) / f"{stage}.pt" for stage in stages]
    copies = {path: Path(folder or ".") / path.name for path in paths if path.exists()}
    if not folder or not copies:
        raise UserError("export: give --out, the folder of a trained run, and --to, another one")
    if there := [copy for copy in copies.values() if copy.exists()]:
        raise UserError(f"--to {folder}: {there[0]} is there; delete it, or give another folder")
    for path, copy in copies.items():
        whole = load_checkpoint(path)
        ema = {k: v.half() if v.is_floating_point() else v for k, v in whole["ema"].items()}
        kept = {k: v for k, v in whole.items() if k not in ("model", "optimizer")}
        # The folder of pictures is of no use to others.
        run = {k: v for k, v in whole["run"].items() if k != "root"}
        save_checkpoint(copy, kept | {"ema": ema, "run": run})
        print(f"{copy}: {copy.stat().st_size / 2**20:.1f} MiB")


def load_checkpoint(path, stage=None):
    """The dictionary at `path`. UserError if it is missing, broken, unsafe or another stage's."""
    if not Path(path).is_file():
        raise UserError(f"no weights at {path}: train them, or give another path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # checksums, which torch does not look at
                raise ValueError
        checkpoint = {"clip": None, "run": {}, "figures": {}} | checkpoint
        if missing := {"stage", "config", "ema", "step"} - checkpoint.keys():
            raise KeyError(*missing)
    except Exception as e:  # a file that is cut short, of something else, or of code: never run
        raise UserError(f"{path} is damaged or no checkpoint of this project ({type(e).__name__}): "
                        "copy it or train this stage again") from e
    if stage not in (None, checkpoint["stage"]):
        raise UserError(f"{path} holds the stage '{checkpoint['stage']}', not '{stage}': check the "
                        "file's name")
    return checkpoint


def examples_seen(checkpoint):
    """How many examples the training of a checkpoint has seen, repeats included."""
    # Old checkpoints have no count; their batch size did not change.
    count = checkpoint["step"] * checkpoint["run"].get("batch_size", 0)
    return checkpoint["figures"].get("examples", count)


def restore(checkpoint, model, optimizers):
    """Put a checkpoint's raw weights and optimizer states back. An exported copy has neither: the
    training continues from its averaged weights, which `model` has already."""
    if "optimizer" not in checkpoint:
        print("note: the checkpoint has only averaged weights: the optimizer starts anew from them")
        return
    model.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
        optimizer.load_state_dict(state)
