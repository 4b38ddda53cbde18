"""Training: one loop, every stage.

    python train.py all --preset tiny          # every stage, minutes on a laptop's CPU
    python train.py decoder --preset base --resume
    python train.py export --preset base --to FOLDER   # small copies, to give away
    torchrun --nproc-per-node 4 train.py prior --data folder --root PICTURES

The one idea of this file: batch number k and the noise of step k are functions of the run's
settings and k, and of nothing that came before. No random state has to be saved, so a training that
was killed and resumed arrives at the same weights as one that was not: on a CPU bit for bit, on a
GPU up to the order in which its sums are done.

What differs between stages is above the loop: how large the model is and how long it trains
(presets.py), what a batch is (Batches), what to look at (preview). The loop itself knows no stage.
The prior, the decoder and the upsamplers never see each other: each needs only CLIP and the data
(paper sec. 2), so they can be trained in any order.
Read next: sample.py, which puts the trained stages together.
"""

import copy
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from ar_prior import (
    AutoregressivePrior, AutoregressivePriorConfig,
    fewest_components, principal_components, quantisation_errors,
)
from lab.plots import plot_runs
from stages import (
    BASELINES, ORDER, PRESETS, STAGES, build,
    check_clip, config_dict, load_clip, needs_clip, recipe,
)
from support.cache import embed
from support.checkpoint import examples_seen, export_checkpoint, load_checkpoint, save_checkpoint
from support.muon import make_optimizers
from support.pictures import load_data
from support.sheets import draw_grid, save_picture
from support.tokenizer import Tokenizer, make_vocab
from support.tools import (
    Interrupt, Parser, UserError, autocast, choose_device, exit_code, first_alone, natural,
    note, peak_memory, positive, positive_number, rank, seed_number, usable_cores, world_size,
)
from upsampler import training_pair

EMA_DECAY = 0.9995  # Paper: .9999 (AR prior .999), for 600K steps and more. We: shorter runs.
MAX_GRADIENT = 1.0  # largest norm of all gradients together


def make_model(stage, preset, data, clip, embeddings=None):
    """A fresh model of the preset's size, fitted to the CLIP and the data it is trained with.

    clip: of the priors and decoders; embeddings: of the training data, for the AR prior alone.
    """
    fields = dict(recipe(preset, stage)[0])
    if stage == "clip":
        fields["vocab"] = make_vocab(c for i in range(len(data)) for c in data.captions(i))
    if needs_clip(stage):
        fields |= {"dim": clip.dim, "text_width": clip.text_width, "text_len": clip.text_len}
    make, make_config = STAGES[stage]
    if stage == "ar_prior":
        return make_ar_prior(fields, embeddings)
    return make(make_config(**fields))


def make_ar_prior(fields, embeddings):
    """Its codes are those of the training data: how many components, and where the buckets are."""
    some = range(min(len(embeddings), 100_000))
    image_emb, text_emb = embeddings.pairs(some, np.random.default_rng(0))
    _, _, variances = principal_components(image_emb)
    components = fewest_components(variances)
    model = AutoregressivePrior(AutoregressivePriorConfig(components=components, **fields))
    model.fit(image_emb, text_emb)
    left_out = 1 - variances[:components].sum() / variances.sum()
    errors = quantisation_errors(model.project(image_emb).T.contiguous(), model.config.buckets)
    note(f"ar_prior: {components} of {model.config.dim} principal components leave out "
         f"{left_out:.2%} of the variance; quantising them into {model.config.buckets} buckets "
         f"of equal mass costs {errors['equal mass']:.3%}, "
         f"of equal width {errors['equal width']:.3%}")
    return model





# --- what a batch is -------------------------------------------------------------------------


class Batches(torch.utils.data.Dataset):
    """batches[step] is the training batch of that step, made from (seed, step) alone.

    Over several processes, each makes its own slice of the same global batch.
    """

    def __init__(self, stage, config, data, embeddings, settings, rank=0, world=1):
        self.stage, self.config, self.data, self.embeddings = stage, config, data, embeddings
        self.settings, self.rank, self.world = settings, rank, world
        if stage == "clip":
            self.tokenizer = Tokenizer(config.context_length, config.vocab)

    def __getitem__(self, step):
        """The batch of a step: a dictionary of tensors, as this stage's loss() wants them."""
        size, n = self.settings["batch_size"], len(self.data)
        # No epochs: each batch is a fresh draw without repetition, so a step needs no memory of
        # which pictures came before it.
        rng = np.random.default_rng([self.settings["seed"], step])
        indices = rng.choice(n, size, replace=n < size)[self.rank :: self.world]
        rng = np.random.default_rng([self.settings["seed"], step, self.rank])
        return self.make(step, [int(i) for i in indices], rng)

    def make(self, step, indices, rng):
        """Pictures `indices` as a batch; rng draws which caption, which crop, which degradation."""
        config, data = self.config, self.data
        if self.stage == "clip":
            captions = [c[rng.integers(len(c))] for c in map(data.captions, indices)]
            # A square from anywhere along the picture; elsewhere the centre, as in the cache.
            size = config.image_size
            images = torch.stack([data.image(i, size, place=rng.random()) for i in indices])
            return {"image": images, "tokens": self.tokenizer(captions)}
        if self.stage in ("prior", "ar_prior"):
            return self.embeddings.batch(indices, rng)  # no pixels: embeddings in, embeddings out
        if self.stage.startswith("decoder"):
            # Most steps may run at half the side: the U-Net is convolutional, the same weights
            # serve both sizes, and a picture of a quarter of the pixels costs a quarter.
            half = step < self.settings["half_size_until"] * self.settings["steps"]
            size = config.size // 2 if half else config.size
            images = torch.stack([data.image(i, size) for i in indices])
            return {"image": images} | self.embeddings.batch(indices, rng)
        pairs = [training_pair(data, i, config, rng) for i in indices]
        image, low = zip(*pairs, strict=True)
        return {"image": torch.stack(image), "low": torch.stack(low)}


def ignore_ctrl_c(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides when to stop


def loader(batches, start, stop, workers, device):
    """The batches start..stop-1 in order, made ahead of time by worker processes.

    batch_size=None: our data set's items are whole batches already.
    """
    return torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(start, stop), num_workers=workers,
        worker_init_fn=ignore_ctrl_c, pin_memory=device.type == "cuda",
    )


# --- what to look at -------------------------------------------------------------------------


@torch.no_grad()
def validate(stage, model, batches, step, device, count=256):
    """Mean loss of the averaged model on `count` validation pictures, the noise always the same.

    Of a diffusion model also by noise level: val_q1 is the loss over the cleanest quarter of the
    levels, val_q4 over the noisiest. One total hides that a model learns them one after another.
    The pictures and their noise do not depend on the training's batch size. CLIP is the exception:
    its loss tells each picture from the others of its batch, so it looks at one such batch.
    Where there are fewer pictures than `count`, the other stages see them again, with other noise.
    """
    size = 32
    if stage == "clip":
        count = size = min(batches.settings["batch_size"], len(batches.data))
    diffusion, figures = getattr(model, "diffusion", None), defaultdict(float)
    names = ["val_q1", "val_q2", "val_q3", "val_q4"] if diffusion else ["val_loss"]
    for start in range(0, count, size):
        indices = [i % len(batches.data) for i in range(start, min(start + size, count))]
        batch = batches.make(step, indices, np.random.default_rng(start))
        batch = {k: v.to(device) for k, v in batch.items()}
        for q, name in enumerate(names):
            if diffusion:
                diffusion.levels = (q * diffusion.T // 4, (q + 1) * diffusion.T // 4)
            torch.manual_seed(start)  # the training seeds its own noise at every step
            with autocast(device):
                loss = model.loss(batch).item()
            figures[name] += loss * len(indices) / count
    figures = dict(figures)
    if diffusion:
        diffusion.levels = (0, diffusion.T)
        figures["val_loss"] = sum(figures.values()) / 4
    return figures


@torch.no_grad()
def preview(stage, model, batches, step, device):
    """Figures of the averaged model on 16 pictures of the validation set, and what it draws.

    Returns (figures: dict of floats, pictures: (n, 3, H, W) or None, captions or None).
    """
    indices = range(min(16, len(batches.data)))
    # Always the same pictures with the same noise: what changes from grid to grid is the model. The
    # batch is made outside of autocast: corrupting and resizing pictures is float32 work.
    batch = batches.make(step, indices, np.random.default_rng(0))
    batch = {k: v.to(device) for k, v in batch.items()}
    generators = [torch.Generator().manual_seed(i) for i in indices]
    if stage == "clip":  # can it tell which of 16 captions belongs to a picture? Chance: 0.06
        with autocast(device):
            image_emb, text_emb, _ = model.model(batch["image"], batch["tokens"])
        right = (image_emb @ text_emb.T).argmax(dim=1).cpu() == torch.tensor(indices)
        return {"match_of_16": right.float().mean().item()}, None, None
    if stage in ("prior", "ar_prior"):  # closer to the truth than to anything else?
        text_emb, true = batch["text_emb"], batch["image_emb"]
        text = text_emb, batch["text_enc"], batch["text_mask"]
        with autocast(device):
            drawn = model.sample(*text, generators=generators)
        others = {"cos_true": true, "cos_text": text_emb, "cos_unrelated": true.roll(1, 0)}
        return {k: (drawn * x).sum(dim=1).mean().item() for k, x in others.items()}, None, None
    if stage.startswith("decoder"):
        size = batch["image"].shape[-1]  # half the side in the first part of some trainings
        text = batch["text_enc"], batch["text_mask"]
        with autocast(device):
            drawn = model.sample(model.embedding_of(batch), *text, scale=2.0,
                                 generators=generators, size=size)
        # The captions that were read: of each picture's, the one that the batch drew by this rng.
        which = batches.embeddings.which_captions(indices, np.random.default_rng(0))
        captions = [batches.data.captions(i)[k] for i, k in zip(indices, which, strict=True)]
        return {}, drawn, captions
    with autocast(device):
        drawn = model.sample(batch["low"], generators=generators)
    # Pixels span a range of 2, so PSNR = 10 log10(2^2 / mse).
    mse = (drawn - batch["image"]).square().mean().item()
    low = nn.functional.interpolate(batch["low"], drawn.shape[-2:], mode="nearest")
    rows = torch.stack([low, drawn, batch["image"]], dim=1).flatten(0, 1)
    return {"psnr": 10 * math.log10(4 / mse)}, rows, ["input", "drawn", "target"] * len(indices)


# --- the loop --------------------------------------------------------------------------------


class Ema:
    """A copy of a model whose weights are a running average of it; sampling from that is smoother
    (paper table 3).

        decay_n = min(decay, (1 + n) / (10 + n)),  e <- decay_n e + (1 - decay_n) p

    The first steps average over little, or the random start would linger for thousands of steps
    (the paper does not say; TensorFlow's ExponentialMovingAverage counts its num_updates so).
    Buffers (counters, running statistics) are copied: an average of them would mean nothing.
    """

    def __init__(self, model, decay=EMA_DECAY):
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for mine, its in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(its)


class Loss(nn.Module):
    """model.loss as forward(), which is where DistributedDataParallel hooks in."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)


def learning_rate(step, settings):
    """Constant, or half a cosine from lr to 0; over the first 5% (at most 500 steps) times a linear
    warm-up."""
    warm_up = min(500, max(1, settings["steps"] // 20))
    rate = settings["lr"] * min(1.0, (step + 1) / warm_up)
    if settings["decay"] == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings["steps"]))
    return rate


class Run:
    """What a training leaves behind in its folder; of several processes only the first writes.

    STAGE.pt the checkpoint, STAGE.json its settings to read, metrics.jsonl a line of figures now
    and then, samples/ the pictures.
    """

    def __init__(self, stage, path, config, settings, clip, first_process):
        self.stage, self.path, self.settings, self.clip = stage, path, settings, clip
        self.writes, self.figures = first_process, {}  # figures: the last of each kind reported
        self.about = {"stage": stage, "config": config, "run": settings, "clip": clip}

    def begin(self):
        """Make the folder and write the settings: once nothing stands in the training's way."""
        (self.path.parent / "samples").mkdir(parents=True, exist_ok=True)
        if self.writes:
            self.path.with_suffix(".json").write_text(json.dumps(self.about, indent=2) + "\n")

    def save(self, step, model, ema, optimizers):
        """Everything that resuming needs; the random numbers need no state (see the top)."""
        if self.writes:
            save_checkpoint(self.path, {
                "stage": self.stage, "config": config_dict(model), "step": step,
                "ema": ema.model.state_dict(), "clip": self.clip, "run": self.settings,
                "figures": self.figures,
                "model": model.state_dict(), "optimizer": [o.state_dict() for o in optimizers],
            })

    def report(self, step, figures):
        """A line of JSON: easy to read by eye, by grep and by json.loads."""
        self.figures |= figures
        if self.writes:
            with open(self.path.parent / "metrics.jsonl", "a") as f:
                f.write(json.dumps({"stage": self.stage, "step": step} | figures) + "\n")

    def look(self, step, averaged, val_batches, device):
        """Draw and measure with the averaged model, for the folder and the screen."""
        if not self.writes:
            return
        figures, pictures, captions = preview(self.stage, averaged, val_batches, step, device)
        figures |= validate(self.stage, averaged, val_batches, step, device)
        if pictures is not None:
            grid = draw_grid(pictures, captions, columns=6 if len(pictures) > 16 else 4)
            save_picture(grid, self.path.parent / "samples" / f"{self.stage}_{step:06d}.png")
        self.report(step, figures)
        said = ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
        tqdm.write(f"{self.stage} {step}: {said}")


def training_step(model, loss_of, batch, optimizers, rate, device):
    """One step of every optimizer: (loss, norm of the gradient before it was cut), on the device.

    loss_of: Loss(model), as it is, compiled, or over several processes. rate: the learning rate.
    """
    with autocast(device):
        loss = loss_of(batch)  # the one line that depends on the stage
    model.zero_grad(set_to_none=True)
    loss.backward()
    # A rare huge gradient, at a very clean or very noisy level, is cut to this length.
    norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        with autocast(device):  # for Muon's matrix products
            optimizer.step()
    if hasattr(model, "clamp"):
        model.clamp()  # CLIP's temperature
    return loss.detach(), norm


def compile_loss(loss_of):
    """torch.compile a Loss in place: the weights keep their names."""
    # All stages' losses are one piece of code to the compiler: what it learnt of another stage's
    # sizes, and how often it has compiled, must not count here.
    torch._dynamo.reset()
    # Random numbers stay PyTorch's own: the noise of step k is the same compiled or not.
    loss_of.compile(options={"fallback_random": True})


def make_compilable(batch, model):
    """Say which sizes of a batch change from step to step, and look at its pixels (once), which
    compiled code cannot.

    Captions are as long as their batch's longest: one graph serves all lengths. A decoder that
    trains at half the side first gets a second graph after that, made for the full side alone: in a
    graph for any side the compiler cannot choose the convolutions' layout.
    """
    for name, x in batch.items():
        if name in ("text_enc", "text_mask"):
            torch._dynamo.maybe_mark_dynamic(x, 1)
        else:
            torch._dynamo.mark_static(x)
    if "image" in batch and hasattr(model, "diffusion"):
        model.diffusion.check_range(batch["image"])


def train(run, model, batches, val_batches, device, resume=None):
    """Train one stage to run.settings["steps"]; resume: the checkpoint to continue from, or None.

    Raises UserError where the loss or a weight is not finite, KeyboardInterrupt (after saving) on
    Ctrl-C.
    """
    settings, steps = run.settings, run.settings["steps"]
    first = resume["step"] if resume else 0
    model.to(device).train()
    ema, optimizers = Ema(model), make_optimizers(model, settings["muon"])
    examples = 0  # seen before this training began; another batch size may have been in force
    if resume:
        restore(resume, model, ema, optimizers)
        examples = examples_seen(resume)
    run.begin()
    loss_of = Loss(model)
    if settings["compile"]:
        compile_loss(loss_of)
    if batches.world > 1:
        loss_of = nn.parallel.DistributedDataParallel(loss_of)

    # Losses stay on the device until they are logged: reading one makes the CPU wait for the GPU.
    every_log = max(1, min(50, steps // 20))
    losses, waited, waited_in_all = [], 0.0, 0.0
    begun = started = time.time()
    bar = tqdm(total=steps, initial=first, desc=run.stage, disable=None if run.writes else True)
    with Interrupt() as pause, bar:
        ready = iter(loader(batches, first, steps, settings["workers"], device))
        for step in range(first, steps):
            asked_for = time.time()
            batch = next(ready)
            waited += time.time() - asked_for
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            if settings["compile"]:
                make_compilable(batch, model)
            # One number of three; Python's hash of whole numbers is the same in every process.
            torch.manual_seed(hash((settings["seed"], step, batches.rank)) % 2**62)  # the noise
            rate = learning_rate(step, settings)
            loss, norm = training_step(model, loss_of, batch, optimizers, rate, device)
            ema.update(model)
            # A gradient that is not finite spoils the weights: it counts as such a loss.
            losses.append(torch.where(norm.isfinite(), loss, norm))
            bar.update()

            done = step + 1
            if world_size() == 1 or device.type == "cpu" or done % min(10, every_log) == 0:
                pause.agree(device)
            saving = done % settings["save_every"] == 0 or done == steps or pause.agreed
            looking = done % settings["sample_every"] == 0 or done == steps
            if done == steps and hasattr(model, "finish"):  # it measures what it needs of itself
                with autocast(device):
                    ema.model.finish(batch)
            if done % every_log == 0 or saving or looking:
                # Where one process waits for its device: figures are read here, not every step.
                smooth = torch.stack(losses).mean().item()
                check_finite(f"{run.stage}, step {done}", smooth, model)
                elapsed = time.time() - started
                speed, wait = settings["batch_size"] * len(losses) / elapsed, waited / elapsed
                bar.set_postfix(loss=f"{smooth:.4f}", images_per_s=f"{speed:.0f}")
                seen = examples + (done - first) * settings["batch_size"]
                run.report(done, {"examples": seen, "loss": smooth, "lr": rate,
                                  "images_per_s": speed, "data_wait": wait})
                try:
                    if looking:
                        run.look(done, ema.model, val_batches, device)
                finally:  # also where there is no room for a picture
                    if saving:
                        run.save(done, model, ema, optimizers)
                waited_in_all += waited
                losses, started, waited = [], time.time(), 0.0
            if pause.agreed:
                raise KeyboardInterrupt(f"{run.path} is saved at step {done}: --resume goes on")
    if dist.is_initialized():
        dist.barrier()  # nobody reads the checkpoint before it is written
    if run.writes:
        elapsed = time.time() - begun
        print(f"{run.stage}: steps {first} to {steps}, {elapsed / 60:.1f} minutes, loss "
              f"{smooth:.4f}, {(steps - first) * settings['batch_size'] / elapsed:.0f} images/s, "
              f"waiting for data {waited_in_all / elapsed:.1%}, {peak_memory(device):.1f} GB")


def check_finite(where, loss, model):
    """Raise UserError rather than save spoilt weights. The loss of a step is of the weights before
    it, so it may be finite where they no longer are."""
    wrong = f"the loss is {loss}"
    if math.isfinite(loss):
        if torch.stack([p.isfinite().all() for p in model.parameters()]).all():
            return
        wrong = "a weight is no longer finite"
    raise UserError(f"{where}: {wrong}. The last checkpoint is kept: try a smaller --lr, with "
                    "--resume")


def restore(resume, model, ema, optimizers):
    """Put a checkpoint's state back into all of them, to go on where it was written.

    `model`, and its copy in `ema`, have the averaged weights already (checkpoint.build).
    """
    ema.updates = resume["step"]
    if "optimizer" in resume:  # else an exported copy, and the averaged weights are all there is
        states = resume["optimizer"]
        if not isinstance(states, list) or len(states) != len(optimizers):
            raise UserError("--resume: the checkpoint was trained by another optimizer: give its "
                            "--preset, set \"muon\" in presets.py as it was, or go on from an "
                            "exported copy")
        try:
            model.load_state_dict(resume["model"])
            for optimizer, state in zip(optimizers, states, strict=True):
                scale = optimizer.param_groups[0]["scale"]
                optimizer.load_state_dict(state)
                optimizer.param_groups[0]["scale"] = scale  # as this training has it, like its lr
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(f"--resume: the checkpoint's weights and optimizer do not fit ({reason}"
                            "): train this stage again, or go on from an exported copy") from e


# --- the command line ------------------------------------------------------------------------


def prepare(stage, args, clip):
    """Everything `train` needs for one stage: (model, batches, val_batches, settings, resume).

    The settings are the preset's, then what the command line says. resume: the checkpoint of an
    earlier training in --out, or None. Raises UserError rather than write over one.
    """
    training = recipe(args.preset, stage)[1]
    settings = {"decay": args.decay, "half_size_until": 0.0, "muon": None, "focus": None} | training
    given = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr}
    settings |= {k: v for k, v in given.items() if v is not None}
    kept = ("seed", "data", "workers", "preset", "command", "compile")
    settings |= {k: getattr(args, k) for k in kept}
    settings["save_every"] = args.save_every or max(1, min(500, settings["steps"] // 10))
    settings["sample_every"] = args.sample_every or max(1, settings["steps"] // 5)
    if settings["batch_size"] % world_size():
        raise UserError(f"--batch-size {settings['batch_size']}: not a multiple of the "
                        f"{world_size()} processes")
    if stage == "clip" and settings["batch_size"] < 2 * world_size():
        raise UserError(f"--batch-size {settings['batch_size']}: CLIP tells pictures from each "
                        "other, so each process needs two or more")

    limit = args.limit or (PRESETS[args.preset]["data"] if args.data == "shapes" else None)
    val_limit = 512 if args.data == "shapes" else args.limit
    # The first process downloads and unpacks, the others find the files there.
    data = first_alone(lambda: load_data(args.data, args.root, "train", limit))
    val = first_alone(lambda: load_data(args.data, args.root, "val", val_limit))
    settings |= {"fingerprint": data.fingerprint(), "world": world_size()}

    path, resume = Path(args.out) / f"{stage}.pt", None
    if path.exists() and args.resume:
        resume = load_checkpoint(path, stage)
        if "optimizer" not in resume and resume["step"] < settings["steps"]:
            note(f"note: {path} has only averaged weights: the optimizer starts anew from them")
        model = build(resume, path)
        model.clip = resume.get("clip")
        if clip is not None:
            check_clip(model, clip, path)
        before = resume.get("run") or {}
        if "half_size_until" in before:
            # At the same step as before: a longer training does not go back to small pictures.
            share = before["half_size_until"]
            settings["half_size_until"] = share * (before["steps"] / settings["steps"])
        for key in ("preset", "batch_size", "lr", "muon", "focus", "seed", "steps", "decay",
                    "fingerprint", "world"):
            if before.get(key) != settings[key]:
                note(f"note: {path}: {key} was {before.get(key)}, is {settings[key]} now")
    elif args.resume:
        note(f"note: no {path} to resume: {stage} starts afresh")
    elif path.exists():
        raise UserError(f"{path} is there: --resume continues it, another --out starts afresh")
    embeddings = [None, None]
    if needs_clip(stage) and not (resume and resume["step"] >= settings["steps"]):
        embeddings = embed_both(clip, data, val, Path(args.out) / "cache")
    if not resume:
        torch.manual_seed(args.seed)
        model = make_model(stage, args.preset, data, clip, embeddings[0])
    if settings["focus"]:
        model.diffusion.focus_on(settings["focus"])
    batches, val_batches = (
        Batches(stage, model.config, d, e, settings, rank(), world_size())
        for d, e in zip((data, val), embeddings, strict=True)
    )
    return model, batches, val_batches, settings, resume


def embed_both(clip, data, val, folder):
    """Embeddings of the training and of the validation pictures."""
    with autocast(clip.mean.device):
        return first_alone(lambda: [embed(clip, d, folder) for d in (data, val)])


def run_stage(stage, args, device):
    """Prepare and train one stage, unless --resume finds it finished."""
    clip = None
    if needs_clip(stage):
        clip = load_clip(args.out, args.clip, device)
    model, batches, val_batches, settings, resume = prepare(stage, args, clip)
    path = Path(args.out) / f"{stage}.pt"
    if resume and resume["step"] >= settings["steps"]:
        note(f"{stage}: already trained to step {resume['step']} in {path}")
        return
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    note(f"{stage}: {millions:.1f}M parameters, {settings['steps']} steps of "
         f"{settings['batch_size']} on {device}, to {path}")
    clip = clip and {"spec": args.clip, "identity": clip.identity}
    config = config_dict(model)
    run = Run(stage, path, config, settings, clip, rank() == 0)
    train(run, model, batches, val_batches, device, resume)


def export(run, folder):
    """Small copies of every stage in `run` (checkpoint.export_checkpoint)."""
    paths = [Path(run) / f"{stage}.pt" for stage in ORDER + BASELINES]
    paths = [path for path in paths if path.exists()]
    if Path(run).resolve() == Path(folder).resolve():
        raise UserError(f"--to {folder} is the run itself: its checkpoints would lose what "
                        "--resume needs; give another folder")
    if not paths:
        raise UserError(f"{run} has no trained stage to export: give --out the folder of a run")
    for path in paths:
        there = Path(folder) / path.name
        if there.is_file() and "optimizer" in load_checkpoint(there):
            raise UserError(f"--to {folder}: {there} is a training's own checkpoint, which a copy "
                            "would replace; give another folder")
    for path in paths:
        copy = export_checkpoint(path, folder)
        print(f"{copy}: {copy.stat().st_size / 2**20:.1f} MiB")


@exit_code
def main(argv=None):
    parser = Parser("train.py", description="Train one stage, or all of them in turn.")
    add = parser.add_argument
    add("stage", help=", ".join((*ORDER, "all", "ar_prior")) + "; or, training nothing, export "
        "(small copies of what is in --out) and plot (loss curves of the RUNs)")
    add("runs", nargs="*", metavar="RUN", help="folders of runs, for plot")
    add("--condition", default="image_emb", choices=("image_emb", "text_emb", "caption"),
        help="what the decoder is trained on; the last two are the paper's baselines")
    add("--data", default="shapes", help="shapes, cifar10, cifar100, coco or folder")
    add("--root", help="folder of the data (not for shapes)")
    add("--limit", type=positive, help="train on so many images at the most (default: all; of "
        "shapes, which are drawn as needed, just so many: the preset's 20,000 to 100,000)")
    add("--clip", default="small", help="small, trained here; or open_clip's MODEL:TAG_OR_FILE")
    add("--preset", default="tiny", help="sizes and steps: " + ", ".join(PRESETS))
    add("--out", help="folder of the run (default: runs/DATA-PRESET)")
    add("--to", help="what export or plot writes (plot's default: RUN/loss.png)")
    add("--steps", type=positive, help="training steps (default: the preset's)")
    add("--batch-size", type=positive, help="pictures a step, over all processes (default: the "
        "preset's)")
    add("--lr", type=positive_number, help="highest learning rate (default: the preset's)")
    add("--decay", default="cosine", choices=("cosine", "constant"), help="of the learning rate")
    add("--resume", action="store_true", help="continue from the checkpoints in --out")
    add("--save-every", type=positive, help="steps between checkpoints (default: a tenth of the "
        "training, at most 500)")
    add("--sample-every", type=positive, help="steps between sample grids (default: a fifth of "
        "the training)")
    add("--workers", type=natural, default=min(8, usable_cores()),
        help="processes that prepare batches")
    add("--compile", action="store_true", help="torch.compile the loss: faster steps on a GPU, "
        "after a few minutes")
    add("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
    add("--seed", type=seed_number, default=0, help="of weights, batches and noise")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    if args.stage not in (*ORDER, "ar_prior", "all", "export", "plot"):
        raise UserError(f"unknown stage '{args.stage}': use {', '.join(ORDER)}, ar_prior, all, "
                        "export or plot")
    if args.stage == "plot":
        if not args.runs:
            raise UserError("plot: give the folder of one run or more, as runs/shapes-tiny")
        path = Path(args.to or Path(args.runs[0]) / "loss.png")
        save_picture(plot_runs(args.runs), path)
        return print(path)
    if args.runs:
        raise UserError(f"{args.runs[0]}: only plot takes folders; did you mean --out?")
    if args.condition != "image_emb":
        if args.stage != "decoder":
            raise UserError(f"--condition {args.condition} is for the stage decoder alone")
        args.stage = f"decoder_{args.condition}"
    if args.preset not in PRESETS:
        raise UserError(f"unknown preset '{args.preset}': use {' or '.join(PRESETS)}")
    args.out = args.out or f"runs/{args.data}-{args.preset}"
    if args.stage == "export":
        if not args.to:
            raise UserError("export: give --to, the folder for the copies")
        return export(args.out, args.to)

    device = args.device
    if dist.is_torchelastic_launched():  # by torchrun
        if device.type == "cuda":
            device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        # The others wait while the first process computes embeddings, which can take hours.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    try:
        for stage in ORDER if args.stage == "all" else [args.stage]:
            if stage == "clip" and args.clip != "small":
                note(f"clip: nothing to train, {args.clip} is a pretrained one")
                continue
            run_stage(stage, args, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
