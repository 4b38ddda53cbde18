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

A stage is rebuilt from its checkpoint alone, never from flags that must be repeated by hand. A new
checkpoint is written beside the old one and replaces it in one step, so a crash or a full disk in
the middle leaves the old one as it was.
"""

import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from support.tools import UserError


def save_checkpoint(path, checkpoint):
    """Write all of it or nothing: to a file of this process's own, flushed to the disk, which then
    replaces PATH."""
    path = Path(path)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        kept = "; the previous checkpoint is untouched" if path.exists() else ""
        raise UserError(f"cannot write {path} ({e}): make room or choose another --out"
                        f"{kept}") from e
    finally:  # after a second Ctrl-C as well
        with suppress(OSError):  # it has been renamed, or the folder is a file
            temporary.unlink()


def export_checkpoints(run, folder, stages):
    """Small copies of a run's stages: averaged weights in half precision, without raw weights and
    optimizer. They are a sixth (Muon) to an eighth (Adam) of the size, enough to draw with or to
    continue training from. CLIP's identity, a hash of half-precision weights, stays the same."""
    paths = [p for p in (Path(run) / f"{stage}.pt" for stage in stages) if p.exists()]
    if not folder or Path(run).resolve() == Path(folder).resolve():
        raise UserError("export: give --to, another folder than the run's, for the copies")
    if not paths:
        raise UserError(f"{run} has no trained stage to export: give --out the folder of a run")
    copies = [Path(folder) / path.name for path in paths]
    for path, copy in zip(paths, copies):
        settings = shared_settings(load_checkpoint(path))
        there = load_checkpoint(copy) if copy.exists() else {"run": settings}
        if "optimizer" in there or shared_settings(there) != settings:
            raise UserError(f"--to {folder}: {copy} is not a copy of this training, whose copy "
                            "would replace it; give another folder, or delete it")
    for path, copy in zip(paths, copies):
        whole = load_checkpoint(path, path.stem)
        ema = {k: v.half() if v.is_floating_point() else v for k, v in whole["ema"].items()}
        kept = {k: v for k, v in whole.items() if k not in ("model", "optimizer")}
        save_checkpoint(copy, kept | {"ema": ema, "run": shared_settings(whole)})
        print(f"{copy}: {copy.stat().st_size / 2**20:.1f} MiB")


def shared_settings(checkpoint):
    """A training's settings without what is of no use to others: its folder of pictures."""
    return {k: v for k, v in checkpoint["run"].items() if k != "root"}


def load_checkpoint(path, stage=None):
    """The dictionary at `path`. UserError if it is missing, broken, unsafe or another stage's."""
    if not Path(path).is_file():
        raise UserError(f"no weights at {path}: train this stage, or give another folder")
    with open(path, "rb") as file:
        start, size = file.read(100), os.path.getsize(path)
    if not start.startswith(b"PK"):  # torch.save writes ZIP archives
        kind = "an empty" if not size else "a strange" if b"\0" in start else "a text"
        raise UserError(f"{path} is not weights: {kind} file of {size} bytes; did git-lfs run? "
                        "Copy it or train it again")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # checksums, which torch does not look at
                raise ValueError("a checksum is wrong")
    except pickle.UnpicklingError as e:
        raise UserError(f"{path} is not a file of plain weights (it may hold code, which is never "
                        "run): delete it and train or copy it again") from e
    except Exception as e:  # torch has many ways to say that a file is cut short
        raise UserError(f"{path} is damaged ({type(e).__name__}): delete it and train or copy it "
                        "again") from e
    there = checkpoint if isinstance(checkpoint, dict) else ()
    if lacks := {"stage", "config", "ema", "step"}.difference(there):
        raise UserError(f"{path} is not a checkpoint of this project: it lacks "
                        f"{', '.join(sorted(lacks))}")
    checkpoint = {"clip": None, "run": {}, "figures": {}} | checkpoint
    check_parts(checkpoint, path)
    if stage not in (None, checkpoint["stage"]):
        raise UserError(f"{path} holds the stage '{checkpoint['stage']}', not '{stage}': check the "
                        "file's name")
    return checkpoint


def check_parts(checkpoint, path):
    """UserError unless each part of a checkpoint is what it should be."""
    config, ema, run, figures = (checkpoint[x] for x in ("config", "ema", "run", "figures"))
    clip = checkpoint["clip"] or {"spec": "", "identity": ""}
    if not (all(isinstance(x, dict) for x in (config, ema, run, figures, clip))
            and all(type(x) is int and x >= 0 for x in (
                checkpoint["step"], run.get("steps", 0), run.get("batch_size", 0),
                figures.get("examples", 0)))
            and all(isinstance(clip.get(x), str) for x in ("spec", "identity"))
            and all(torch.is_tensor(x) for x in ema.values())):
        raise UserError(f"{path}: its parts are not those of a checkpoint; train this stage again")
    for name, x in ema.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise UserError(f"{path}: its weights are not all finite (see {name}): the training "
                            "went wrong; train this stage again")


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
    try:
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
            optimizer.load_state_dict(state)
            for p, values in optimizer.state.items():  # fused steps trust these shapes blindly
                if any(v.numel() > 1 and v.shape != p.shape for v in values.values()):
                    raise ValueError("its optimizer belongs to another model")
    except Exception as e:  # what is in another model's state can raise nearly anything
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"--resume: the checkpoint's weights and optimizer do not fit ({reason}): "
                        "train this stage again, or continue from an exported copy") from e
