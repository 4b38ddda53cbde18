"""Checkpoints: a trained stage on disk, written so that nothing is lost, read so that nothing runs.

A checkpoint is a plain dictionary that torch.load(weights_only=True) accepts:

    stage     its name in STAGES
    config    the fields of the frozen dataclass that built the model
    ema       the averaged weights, which sampling uses
    step      training steps done
    model, optimizer     the rest of what --resume needs (left out of exported copies)
    clip      which CLIP the stage was trained for: {"spec", "identity"}
    run       the settings of the training: command, seed, the data's fingerprint, ...
    figures   the last loss and other figures that the training reported

A stage is rebuilt from its checkpoint alone, never from flags that must be repeated by hand.
Writing goes to a second file that replaces the first in one step, so a crash or a full disk in the
middle leaves the previous checkpoint as it was.
"""

import dataclasses
import os
import pickle
import zipfile
from pathlib import Path

import torch

from support.tools import UserError


def save_checkpoint(path, checkpoint):
    """Write all of it or none: to PATH.tmp, flushed to the disk, then renamed over PATH."""
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        if temporary.is_file():  # unlink itself fails where the folder is a file
            temporary.unlink()
        kept = "; the previous checkpoint is untouched" if path.exists() else ""
        raise UserError(
            f"cannot write {path} ({e}): make room or choose another --out{kept}"
        ) from e


def export_checkpoints(run, folder, stages):
    """Small copies of every stage of a run: averaged weights in half precision, enough to draw and
    to continue training from with a new optimizer.

    A sixth (Muon) to an eighth (Adam) of the size: no raw weights, no optimizer, two bytes a
    number. CLIP's identity is a hash of weights rounded to half precision, so it stays what the
    other stages expect.
    """
    paths = [p for p in (Path(run) / f"{stage}.pt" for stage in stages) if p.exists()]
    if not folder or Path(run).resolve() == Path(folder).resolve():
        raise UserError("export: give --to, another folder than the run's, for the copies")
    if not paths:
        raise UserError(f"{run} has no trained stage to export: give --out the folder of a run")
    for path in paths:
        there = Path(folder) / path.name
        if there.is_file() and "optimizer" in load_checkpoint(there):
            raise UserError(f"--to {folder}: {there} is a training's own checkpoint, which a copy "
                            "would replace; give another folder")
    for path in paths:
        kept = load_checkpoint(path, path.stem)
        kept = {k: v for k, v in kept.items() if k not in ("model", "optimizer")}
        kept["ema"] = {k: v.half() if v.is_floating_point() else v for k, v in kept["ema"].items()}
        copy = Path(folder) / path.name
        save_checkpoint(copy, kept)
        print(f"{copy}: {copy.stat().st_size / 2**20:.1f} MiB")


def load_checkpoint(path, stage=None):
    """The dictionary at `path`. UserError where it is missing, broken, unsafe or another's."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no weights at {path}: train this stage with train.py, or give another folder"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # checksums, which torch does not look at
                    raise ValueError("a checksum is wrong")
    except PermissionError:
        raise  # one line already: see tools.user_errors
    except pickle.UnpicklingError as e:
        raise UserError(f"{path} is not a file of plain weights (it may hold code, which is never "
                        "run): delete it and train or copy it again") from e
    except Exception as e:  # torch has many ways to say that a file is cut short
        raise UserError(
            f"{path} is damaged ({type(e).__name__}): delete it and train or copy it again"
        ) from e
    there = set(checkpoint) if isinstance(checkpoint, dict) else set()
    lacks = {"stage", "config", "ema", "step"} - there
    if lacks:
        raise UserError(
            f"{path} is not a checkpoint of this project: it lacks {', '.join(sorted(lacks))}"
        )
    check_parts(checkpoint, path)
    if stage is not None and checkpoint["stage"] != stage:
        raise UserError(
            f"{path} holds the stage '{checkpoint['stage']}', not '{stage}': check the file's name"
        )
    return checkpoint


def check_parts(checkpoint, path):
    """UserError unless each part of a checkpoint is what it should be."""
    ema = checkpoint["ema"]
    run, figures, clip = (checkpoint.get(name) or {} for name in ("run", "figures", "clip"))
    fine = all(isinstance(x, dict) for x in (checkpoint["config"], ema, run, figures, clip))
    if fine:
        counts = [checkpoint["step"], run.get("steps", 0), run.get("batch_size", 0),
                  figures.get("examples", 0)]
        names = [clip.get("spec"), clip.get("identity")] if clip else []
        fine = (all(type(x) is int and x >= 0 for x in counts)
                and all(isinstance(x, str) for x in names)
                and all(torch.is_tensor(x) for x in ema.values()))
    if not fine:
        raise UserError(f"{path}: its parts are not those of a checkpoint; train this stage again")
    for name, x in ema.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise UserError(f"{path}: its weights are not all numbers (in {name}): they are of a "
                            "training that went wrong; train this stage again")


def examples_seen(checkpoint):
    """How many examples, repeats counted, the training of a checkpoint has seen."""
    # Old checkpoints have no count; their batch size did not change.
    count = checkpoint["step"] * (checkpoint.get("run") or {}).get("batch_size", 0)
    return (checkpoint.get("figures") or {}).get("examples", count)


def config_dict(model):
    """The model's frozen dataclass as a plain dictionary, for a checkpoint."""
    return dataclasses.asdict(model.config)


def restore(checkpoint, model, optimizers):
    """Put a checkpoint's raw weights and optimizer states back, to continue where it was written.

    An exported copy has neither: its averaged weights, which `model` has already, start afresh.
    """
    if "optimizer" not in checkpoint:
        print("note: the checkpoint has only averaged weights: the optimizer starts anew from them")
        return
    try:
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
            optimizer.load_state_dict(state)
            for p, values in optimizer.state.items():  # fused steps trust these shapes blindly
                if any(v.numel() > 1 and v.shape != p.shape for v in values.values()):
                    raise ValueError("its optimizer belongs to another model")
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"--resume: the checkpoint's weights and optimizer do not fit ({reason}): "
                        "train this stage again, or continue from an exported copy") from e
