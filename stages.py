"""The table of stages: what each one is, how large, and how long it trains.

    tiny    minutes on two CPU cores: draws at 32 pixels, enlarges to 64 and 256
    base    half an hour a stage on one or two cores, the decoder two hours: 64, 256, 1024 pixels
    cifar   CIFAR-10's photos, drawn at their 32 pixels
    large   for one GPU, real pictures and a pretrained CLIP

A preset lists only what differs from the dataclasses' own defaults: the numbers that a student
changes first. `--steps`, `--batch-size` and `--lr` of train.py override it.
"""

from pathlib import Path

import torch

from ar_prior import AutoregressivePrior, AutoregressivePriorConfig
from clip_model import SmallClip, SmallClipConfig, freeze_small_clip, load_open_clip
from decoder import Decoder, DecoderConfig
from prior import DiffusionPrior, PriorConfig
from support.checkpoint import load_checkpoint
from support.tools import UserError, place
from upsampler import Upsampler, UpsamplerConfig

ORDER = ("clip", "prior", "decoder", "upsampler1", "upsampler2")
# What the paper compares them with. `all` leaves them out, as drawing a picture needs none of them.
BASELINES = ("ar_prior", "decoder_text_emb", "decoder_caption")
STAGES = {
    "clip": (SmallClip, SmallClipConfig),
    "prior": (DiffusionPrior, PriorConfig),
    "decoder": (Decoder, DecoderConfig),
    "upsampler1": (Upsampler, UpsamplerConfig),
    "upsampler2": (Upsampler, UpsamplerConfig),
    "ar_prior": (AutoregressivePrior, AutoregressivePriorConfig),
    "decoder_text_emb": (Decoder, DecoderConfig),
    "decoder_caption": (Decoder, DecoderConfig),
}
SHARED = ("data", "root", "limit", "preset", "seed")  # settings that a run's stages share
KEPT = (*SHARED, "steps", "batch_size", "lr", "muon")  # and that a resumed stage keeps

# For each stage: fields of the model's config that differ from its defaults, then the training.
# "muon": Muon's learning rate, as a multiple of "lr" (support/muon.py); without it, Adam alone.
# Paper (table 3): 0.8 million steps of 2048 pictures for the decoder alone. Here what one machine
# can do in minutes (tiny) or hours (base): the findings show long before the beauty does.
PRESETS = {
    "tiny": {
        "data": 20_000,  # scenes of the shapes data
        "clip": ({"image_size": 32, "vision_width": 24},
                 {"steps": 350, "batch_size": 256, "lr": 1e-3, "muon": 20.0}),
        "prior": ({"width": 192, "depth": 3}, {"steps": 700, "batch_size": 128, "lr": 1e-3}),
        "decoder": ({"size": 32, "multiples": (1, 2, 3), "attention_levels": (2,)},
                    {"steps": 2250, "batch_size": 32, "lr": 1e-3, "muon": 5.0}),
        # Paper: crops of a quarter of the side, blur. Here half of these small pictures, and BSR:
        # a barely trained decoder leaves grain, and with blur alone the upsampler would trust it.
        "upsampler1": ({"low_size": 32, "size": 64, "crop": 32, "channels": 24,
                        "multiples": (1, 2), "degradation": "bsr"},
                       {"steps": 600, "batch_size": 32, "lr": 1e-3, "muon": 5.0}),
        "upsampler2": ({"low_size": 64, "size": 256, "crop": 64, "channels": 32,
                        "multiples": (1, 2), "stem": 2, "degradation": "bsr", "schedule": "linear",
                        "sample_steps": 15},
                       {"steps": 300, "batch_size": 16, "lr": 1e-3, "muon": 5.0}),
    },
    "base": {
        "data": 60_000,
        "clip": ({"vision_width": 24}, {"steps": 2400, "batch_size": 256, "lr": 2e-3}),
        "prior": ({"width": 192, "depth": 4}, {"steps": 2500, "batch_size": 128, "lr": 1e-3}),
        # The U-Net works on patches of 2 x 2 pixels, most of its channels at 16 x 16 and 8 x 8.
        "decoder": ({"channels": 32, "multiples": (1, 3, 3), "attention_levels": (2,), "stem": 2,
                     "emb_width": 384, "image_hidden": 256},
                    {"steps": 19_200, "batch_size": 32, "lr": 1.5e-3, "muon": 5.0}),
        "upsampler1": ({"channels": 32, "multiples": (1, 2), "stem": 2, "degradation": "some_blur"},
                       {"steps": 1500, "batch_size": 32, "lr": 1e-3, "muon": 5.0}),
        "upsampler2": ({"low_size": 256, "size": 1024, "crop": 256, "channels": 32,
                        "multiples": (1, 2), "stem": 4, "degradation": "bsr", "schedule": "linear",
                        "sample_steps": 15},
                       {"steps": 3000, "batch_size": 8, "lr": 1e-3, "muon": 5.0}),
    },
    # CIFAR-10, or other photos of 32 pixels. No upsampler: there is nothing larger to learn from.
    "cifar": {
        "data": 60_000,
        # CLIP's ResNet shrinks a picture to a quarter before its first block. 32 pixels become 8:
        # enough for tiny's shapes, too few for photos.
        "clip": ({"image_size": 64, "vision_width": 16},
                 {"steps": 6000, "batch_size": 256, "lr": 1e-3, "muon": 20.0}),
        "prior": ({"width": 192, "depth": 4}, {"steps": 2500, "batch_size": 128, "lr": 1e-3}),
        "decoder": ({"size": 32, "channels": 40, "multiples": (1, 2, 3),
                     "attention_levels": (1, 2)},
                    {"steps": 4000, "batch_size": 64, "lr": 1e-3, "muon": 5.0}),
    },
    # The paper's picture sizes and its decoder's attention, at a thirtieth of the size; never run.
    "large": {
        "data": 100_000,
        "clip": ({}, {"steps": 20_000, "batch_size": 512, "lr": 1e-3, "muon": 20.0}),
        "prior": ({"width": 512, "depth": 12, "heads": 8},
                  {"steps": 100_000, "batch_size": 512, "lr": 3e-4}),
        "decoder": ({"channels": 128, "blocks": 2, "attention_levels": (1, 2, 3),
                     "head_channels": 64, "context_width": 512, "text_depth": 4, "dropout": 0.1,
                     "sample_steps": 50},
                    {"steps": 150_000, "batch_size": 128, "lr": 2e-4, "muon": 5.0}),
        "upsampler1": ({"channels": 96, "multiples": (1, 2, 3), "blocks": 2, "dropout": 0.1},
                       {"steps": 100_000, "batch_size": 64, "lr": 2e-4, "muon": 5.0}),
        "upsampler2": ({"low_size": 256, "size": 1024, "crop": 256, "channels": 64,
                        "multiples": (1, 2, 4), "stem": 2, "degradation": "bsr",
                        "schedule": "linear", "sample_steps": 15},
                       {"steps": 50_000, "batch_size": 16, "lr": 2e-4, "muon": 5.0}),
    },
}


def recipe(preset, stage):
    """(fields of the model's config, settings of the training) of a stage, from PRESETS.

    The baselines' decoders have the decoder's network and budget; only what they see differs. The
    autoregressive prior has the diffusion prior's sizes and budget.
    """
    row = {"ar_prior": "prior"}.get(stage, "decoder" if stage in BASELINES else stage)
    if row not in PRESETS[preset]:
        raise UserError(f"--preset {preset} has no {stage}: its pictures are not enlarged")
    model, training = PRESETS[preset][row]
    if stage == "ar_prior":
        return {k: v for k, v in model.items() if k in ("width", "depth", "heads")}, training
    if stage in BASELINES:
        model = model | {"condition": stage.removeprefix("decoder_")}
    if stage == "decoder_caption":
        model = model | {"drop_caption": 0.2}  # to be guided by captions, as in GLIDE (sec. 4.2)
    return model, training


def needs_clip(stage):
    """Priors and decoders work on CLIP's embeddings; CLIP and the upsamplers see only pixels."""
    return "prior" in stage or stage.startswith("decoder")


def fresh_model(stage, preset, data, clip, embeddings):
    """A new model of the preset's size, fitted to the CLIP and the data it will be trained with."""
    fields = dict(recipe(preset, stage)[0])
    if needs_clip(stage):
        fields |= {"dim": clip.dim, "text_width": clip.text_width, "text_len": clip.text_len}
    if stage == "decoder_caption":
        fields["vocab_size"] = clip.tokenizer.vocab_size
    make, make_config = STAGES[stage]
    if hasattr(make, "fresh"):
        return make.fresh(fields, data, clip, embeddings)
    return make(make_config(**fields))


def build(checkpoint, path="the checkpoint"):
    """The model that `checkpoint` describes, with its averaged weights, in eval mode."""
    try:
        make, make_config = STAGES[checkpoint["stage"]]
        fields = {k: tuple(v) if isinstance(v, list) else v
                  for k, v in checkpoint["config"].items()}
        model = make(make_config(**fields))
        # Shipped weights are stored in half precision; load_state_dict turns them into float32.
        model.load_state_dict(checkpoint["ema"])
    except Exception as e:  # a wrong configuration can raise nearly anything
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{path}: weights and configuration do not fit this version ({reason}): "
                        "train this stage again") from e
    return model.eval()


def load_stage(folder, stage, device="cpu"):
    """The trained stage in `folder`/`stage`.pt; model.clip says which CLIP it was trained for."""
    path = Path(folder) / f"{stage}.pt"
    checkpoint = load_checkpoint(path, stage)
    model = place(build(checkpoint, path), torch.device(device))
    model.clip = checkpoint["clip"]
    return model


def begun(path):
    """(the checkpoint to continue or an empty one, the settings known so far, their CLIP's spec).
    A new stage takes them from the first other one in its folder: a run has one data set."""
    paths = [p for p in (path, *(path.with_name(f"{s}.pt") for s in STAGES)) if p.exists()]
    fresh = {"step": 0, "clip": None, "run": {}, "figures": {}}
    told = load_checkpoint(paths[0], paths[0].stem) if paths else fresh
    spec = (told["clip"] or {"spec": "small"})["spec"]
    if path.exists():
        return told, told["run"], spec
    return fresh, {k: told["run"][k] for k in (*SHARED, "fingerprint") if k in told["run"]}, spec


def load_clip(folder, spec="small", device="cpu"):
    """The frozen CLIP: `folder`/clip.pt if spec is "small", else open_clip's MODEL:TAG_OR_FILE."""
    if spec == "small":
        return freeze_small_clip(load_stage(folder, "clip")).to(device)
    return load_open_clip(spec).to(device)


def clip_of(model, folder, stage, device="cpu", spec=None):
    """The CLIP that a trained stage of `folder` needs, as its checkpoint says. spec: where it is
    now, if it has moved since the training."""
    clip = load_clip(folder, spec or (model.clip or {"spec": "small"})["spec"], device)
    check_clip(model.clip, clip, Path(folder) / f"{stage}.pt")
    return clip


def check_clip(trained_for, clip, path):
    """UserError if a stage meets another CLIP than the one it was trained for (if any)."""
    if trained_for and trained_for["identity"] != clip.identity:
        raise UserError(f"{path} was trained for the CLIP {trained_for['identity']}, not "
                        f"{clip.identity}: embeddings of two CLIPs do not mix; train it again")
