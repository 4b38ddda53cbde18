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

The one idea of this file: a stage is rebuilt from its checkpoint alone, never from flags that
must be repeated by hand; and writing goes to a second file that replaces the first in one step,
so a crash or a full disk in the middle leaves the previous checkpoint as it was.
Read next: train.py, which writes them, and sample.py, which reads them.
"""

import dataclasses
import os
import pickle
import zipfile
from pathlib import Path

import torch

from clip_model import SmallClip, SmallClipConfig, freeze_small_clip, load_open_clip
from data import UserError
from decoder import Decoder, DecoderConfig
from prior import AutoregressivePrior, AutoregressivePriorConfig, DiffusionPrior, PriorConfig
from upsampler import Upsampler, UpsamplerConfig

STAGES = {
    "clip": (SmallClip, SmallClipConfig),
    "prior": (DiffusionPrior, PriorConfig),
    "decoder": (Decoder, DecoderConfig),
    "upsampler1": (Upsampler, UpsamplerConfig),
    "upsampler2": (Upsampler, UpsamplerConfig),
    # What the paper compares with: another prior, and the decoder trained on something else.
    "ar_prior": (AutoregressivePrior, AutoregressivePriorConfig),
    "decoder_text_emb": (Decoder, DecoderConfig),
    "decoder_caption": (Decoder, DecoderConfig),
}


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


def export_checkpoint(path, folder):
    """Copy a checkpoint to `folder`: averaged weights in half precision, enough to draw, and to
    train on from with a new optimizer.

    A sixth (Muon) to an eighth (Adam) of the size: no raw weights, no optimizer, two bytes a
    number. CLIP's identity is a hash of weights rounded to half precision, so it stays what the
    other stages expect.
    Returns the new file's path.
    """
    checkpoint = load_checkpoint(path, Path(path).stem)
    kept = {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}
    kept["ema"] = {k: v.half() if v.is_floating_point() else v for k, v in kept["ema"].items()}
    save_checkpoint(Path(folder) / Path(path).name, kept)
    return Path(folder) / Path(path).name


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
        raise  # one line already: see common.exit_code
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


def build(checkpoint, path="the checkpoint"):
    """The model that `checkpoint` describes, with its averaged weights, in eval mode."""
    try:
        make_model, make_config = STAGES[checkpoint["stage"]]
        config = make_config(**{k: as_tuple(v) for k, v in checkpoint["config"].items()})
        model = make_model(config)
        # Shipped weights are stored in half precision; load_state_dict turns them into float32.
        model.load_state_dict(checkpoint["ema"])
    except (TypeError, LookupError, ValueError, ArithmeticError, AttributeError, RuntimeError,
            UserError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{path}: weights and configuration do not fit this version ({reason}): "
                        "train this stage again") from e
    return model.eval()


def examples_seen(checkpoint):
    """How many examples, counted again each time, the training of a checkpoint has seen."""
    # Where the count was not kept yet, the batch size had better be the same all along.
    count = checkpoint["step"] * (checkpoint.get("run") or {}).get("batch_size", 0)
    return (checkpoint.get("figures") or {}).get("examples", count)


def as_tuple(value):
    return tuple(value) if isinstance(value, list) else value


def config_dict(model):
    """The model's frozen dataclass as a plain dictionary, for a checkpoint."""
    return dataclasses.asdict(model.config)


def load_stage(folder, stage, device="cpu"):
    """The trained stage from `folder`/`stage`.pt; remembers which CLIP it was trained for."""
    path = Path(folder) / f"{stage}.pt"
    checkpoint = load_checkpoint(path, stage)
    model = build(checkpoint, path).to(device)
    model.clip = checkpoint.get("clip")
    return model


def load_clip(folder, spec="small", device="cpu"):
    """The frozen CLIP: `folder`/clip.pt if spec is "small", else open_clip's MODEL:TAG_OR_FILE."""
    if spec == "small":
        clip = freeze_small_clip(load_stage(folder, "clip"))
    else:
        clip = load_open_clip(spec)
    return clip.to(device)


def clip_of(model, folder, stage, device="cpu", spec=None):
    """The CLIP that a trained stage of `folder` needs: its checkpoint says which. spec: where it
    is, if not where it was in training (load_open_clip)."""
    spec = spec or (model.clip["spec"] if model.clip else "small")
    clip = load_clip(folder, spec, device)
    check_clip(model, clip, Path(folder) / f"{stage}.pt")
    return clip


def check_clip(model, clip, path):
    """Raise UserError where a stage meets another CLIP than the one it was trained for."""
    if model.clip and model.clip["identity"] != clip.identity:
        raise UserError(f"{path} was trained for the CLIP {model.clip['identity']}, not "
                        f"{clip.identity}: embeddings of two CLIPs do not mix; train it again")
