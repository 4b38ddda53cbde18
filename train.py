"""Training: one loop for every stage.

    python train.py all --preset tiny                  # every stage, minutes on a CPU
    python train.py decoder --preset base --resume     # continue a run that was stopped
    torchrun --nproc-per-node 4 train.py prior --data folder --root PICTURES
    python train.py export --out RUN --to FOLDER       # small copies, to give away

CLIP is trained first. The prior, the decoder and the upsamplers then need CLIP and the data but
never each other (paper sec. 2), so they can be trained in any order.

A stage tells this file three things: what a batch is (model.batch), what its loss is (model.loss),
and what to look at while it trains (model.preview). Nothing below knows which stage it is training.

The one idea: the batch of step k and the noise of step k depend on the run's seed and on k, and on
nothing else, so no random state has to be saved. A resumed run ends with the weights of an
uninterrupted one (on a CPU with the same number of threads, to the last bit).
"""

import copy
import functools
import math
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from stages import BASELINES, KEPT, ORDER, PRESETS, STAGES, begun, build, check_clip, fresh_model
from stages import load_clip, needs_clip, recipe
from support.cache import embed
from support.captions import LATER
from support.checkpoint import export_checkpoints, restore
from support.muon import make_optimizers
from support.pictures import DATA, load_data
from support.processes import in_workers, joined_processes, stop_signals
from support.run import Run
from support.sheets import draw_grid, save_picture
from support.tools import (
    Parser, UserError, autocast, choose_device, natural, place, positive, positive_number,
    seed_number, some, usable_cores, user_errors,
)

EMA_DECAY = 0.9995  # Paper: .9999 (AR prior .999), over 600K steps and more; our runs are shorter
MAX_GRADIENT = 1.0  # largest norm of all gradients together: a rare huge one is cut to this length


class Batches(torch.utils.data.Dataset):
    """batches[k] is the batch of training step k: always the same one for the same seed.

    There are no epochs: each batch is a fresh draw from the data, without repetition. Under
    torchrun, process number `rank` of `world` makes its own share of the same batch.
    """

    def __init__(self, model, data, embeddings, size, seed, device="cpu", rank=0, world=1):
        self.make = functools.partial(type(model).batch, model.config)  # without the weights
        self.data, self.embeddings, self.size, self.seed = data, embeddings, size, seed
        self.device, self.rank, self.world = device, rank, world

    def __getitem__(self, step):
        n, rng = len(self.data), np.random.default_rng([self.seed, step])
        indices = rng.choice(n, self.size, replace=n < self.size)[self.rank :: self.world]
        # Alike in all processes: where CLIP gathers their rows, all captions must be of one kind
        # (see SmallClip.batch). NumPy ignores the 0, so the draws above are repeated here; another
        # number would change what the shipped weights were trained on.
        return self.of(indices, np.random.default_rng([self.seed, step, 0]))

    def of(self, indices, rng):
        """The batch of these pictures; rng chooses captions, crops and corruptions."""
        with torch.autocast("cpu", enabled=False):  # resizing and corrupting is float32 work
            return self.make(self.data, self.embeddings, [int(i) for i in indices], rng)

    def look(self):
        """(batch on the device, its captions or None): always the same 16 pictures, from anywhere
        in the data, which may be sorted."""
        indices = np.random.default_rng(0).permutation(len(self.data))[:16]
        batch, captions = self.of(indices, np.random.default_rng(0)), None
        if self.embeddings is not None:
            which, _ = self.embeddings.draw_captions(indices, np.random.default_rng(0))
            captions = [self.data.captions(int(i))[k] for i, k in zip(indices, which)]
        return to_device(batch, self.device), captions


class Ema:
    """An exponential moving average of a model's weights, which sampling uses (paper table 3).

    Each gradient comes from one batch only, so each step goes a little astray and the weights
    wander around a good place. Their average lies closer to it and draws visibly better pictures.
    The decay grows from 0.1; otherwise the random start would linger for thousands of steps.
    """

    def __init__(self, model, updates=0):
        self.model, self.updates = copy.deepcopy(model).eval().requires_grad_(False), updates

    @torch.no_grad()
    def update(self, model):
        decay = min(EMA_DECAY, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for mine, its in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(its)  # counters and running statistics: an average would mean nothing


class Loss(nn.Module):
    """model.loss as forward(), where DistributedDataParallel hooks in."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)


def learning_rate(step, settings):
    """A linear warm-up over the first 5% (at most 500 steps) times half a cosine from lr to 0."""
    warm_up = min(500, max(1, settings["steps"] // 20))
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings["steps"]))
    return settings["lr"] * min(1.0, (step + 1) / warm_up) * cosine


def to_device(batch, device):
    fast = "cuda" in str(device)  # pinned memory is copied to it while the program goes on
    return {name: torch.as_tensor(x).to(device, non_blocking=fast) for name, x in batch.items()}


@torch.no_grad()
def validate(model, batches, device, count=256):
    """Mean loss on `count` validation pictures, with the same noise each time.

    For diffusion models also by quarter of the noise levels: val_q1 is the cleanest, val_q4 the
    noisiest. The total hides that a model learns them one after another.
    """
    n, size, bands = len(batches.data), 32, {"val_loss": None}
    if hasattr(model, "diffusion"):
        T = model.diffusion.T
        bands = {f"val_q{q + 1}": (q * T // 4, (q + 1) * T // 4) for q in range(4)}
    else:  # such a loss may compare the pictures of a batch, as CLIP's does: all different, in one
        size = count = min(count, n)
    order = np.resize(np.random.default_rng(0).permutation(n), count)  # repeats them if n < count
    losses = {name: [] for name in bands}
    for start in tqdm(range(0, count, size), "validation", **LATER):
        indices = order[start : start + size]
        batch = to_device(batches.of(indices, np.random.default_rng(start)), device)
        for name, band in bands.items():
            torch.manual_seed(start)
            t = band and torch.randint(*band, (len(indices),), device=device)
            with autocast(device):
                losses[name].append(model.loss(batch, t).item())
    figures = {name: sum(x) / len(x) for name, x in losses.items()}
    return figures | {"val_loss": sum(figures.values()) / len(figures)}


def look(run, step, averaged, val_batches):
    """Draw and measure with the averaged model, for the folder and the screen."""
    with autocast(val_batches.device):
        figures, pictures, captions = averaged.preview(val_batches)
    figures |= validate(averaged, val_batches, val_batches.device)
    where = ""
    if pictures is not None:
        grid = draw_grid(pictures, captions, columns=6 if len(pictures) > 16 else 4)
        path = run.folder / "samples" / f"{run.stage}_{step:06d}.png"
        where = f"; see {save_picture(grid, path)}"
    run.report(step, figures)
    shown = ", ".join(f"{k} {x:.4g}" for k, x in figures.items())
    tqdm.write(f"{run.stage} {step}: {shown}{where}")


def take_step(optimizers, rate, device):
    """One step of every optimizer at this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        with autocast(device):  # for Muon's matrix products
            optimizer.step()


def train(run, model, batches, val_batches, checkpoint):
    """Train a stage from the checkpoint's step on. Raises UserError where the loss or a weight is
    not finite, and KeyboardInterrupt after saving when a signal asks to stop (see stop_signals)."""
    settings, device, rank = run.settings, batches.device, batches.rank
    steps, first = settings["steps"], checkpoint["step"]
    place(model, device).train()
    ema, optimizers = Ema(model, first), make_optimizers(model, settings["muon"])
    if "ema" in checkpoint:  # its averaged weights are in `model` and `ema` already
        restore(checkpoint, model, optimizers)
    if rank == 0:
        run.begin()
    loss_of = Loss(model)
    if settings["compile"]:
        torch._dynamo.reset()  # forget what was compiled for another stage
        loss_of.compile(options={"fallback_random": True})  # the same noise as without
    if batches.world > 1:
        loss_of = nn.parallel.DistributedDataParallel(loss_of)
    loading = in_workers(batches.__getitem__, range(first, steps), settings["workers"], device)
    with stop_signals(listen=rank == 0) as asked, loading as loaded:
        bar = tqdm(run.timed(loaded), run.stage, steps, initial=first, disable=rank > 0 or None)
        for step, batch in enumerate(bar, first):
            batch = to_device(batch, device)
            torch.manual_seed(hash((settings["seed"], step, rank)) % 2**62)  # the step's own noise
            with autocast(device):
                loss = loss_of(batch)
            model.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT)
            take_step(optimizers, learning_rate(step, settings), device)
            ema.update(model)

            run.add(loss, norm)
            done, stop = step + 1, bool(asked)
            if rank > 0:
                continue  # the first process writes
            if done == steps and hasattr(model, "finish"):
                with autocast(device):
                    ema.model.finish(batch)  # the prior measures its analytic variance
            saving = stop or done == steps or done % settings["save_every"] == 0
            looking = done == steps or done % settings["sample_every"] == 0
            if saving or looking or done % settings["log_every"] == 0:
                bar.set_postfix(run.write(done, model, learning_rate(step, settings)))
            if saving:
                run.save(done, model, ema, optimizers)
            if looking:
                look(run, done, ema.model, val_batches)
            if done == steps:
                run.save(done, model, ema, optimizers)  # again, with the figures of this look
            if stop:
                raise KeyboardInterrupt(f"{run.path} is saved at step {done}: --resume continues")
    if rank == 0:
        run.summary(device)
    if batches.world > 1:
        torch.distributed.barrier()  # nobody reads the checkpoint before it is written


# --- the command line ----------------------------------------------------------------------------

def settle(stage, args, before):
    """The settings of a training: from the command line, else as its run began, else the preset's.
    Refuses other data and, with --resume, another preset or seed; notes other changes."""
    given = {name: x for name, x in vars(args).items() if name in KEPT and x is not None}
    fixed = ("data", "preset", "seed") if "steps" in before else ("data",)
    before = {name: x for name, x in before.items() if name in KEPT}
    for name in given:
        if name in before and before[name] != given[name]:
            changed = f"{stage}: {name} was {before[name]}, is {given[name]} now"
            if name in fixed:
                raise UserError(f"{changed}; leave it out, or give another --out")
            print(f"note: {changed}")
    said = {"data": "shapes", "preset": "tiny", "seed": 0} | before | given
    settings = dict.fromkeys(KEPT) | recipe(said["preset"], stage)[1] | said
    return settings | {
        "log_every": max(1, min(50, settings["steps"] // 20)),
        "save_every": args.save_every or max(1, min(500, settings["steps"] // 10)),
        "sample_every": args.sample_every or max(1, settings["steps"] // 5),
        "workers": args.workers, "compile": args.compile, "command": args.command}


def run_stage(stage, args, device, rank, world):
    """Prepare and train one stage, unless it is trained already."""
    path = Path(args.out) / f"{stage}.pt"
    checkpoint, before, spec = begun(path)
    spec = args.clip or spec
    if stage == "clip" and spec != "small":
        print(f"clip: nothing to train, {spec} is a pretrained one")
        return
    if path.exists() and not args.resume:
        raise UserError(f"{path} is there: --resume continues it, another --out starts afresh")
    if args.stage == "all" and stage not in PRESETS[args.preset or before.get("preset", "tiny")]:
        print(f"{stage}: this preset has none")
        return
    settings = settle(stage, args, before)
    steps, size = settings["steps"], settings["batch_size"]
    if checkpoint["step"] >= steps:
        if needs_clip(stage):
            check_clip(checkpoint["clip"], load_clip(path.parent, spec, device), path)
        print(f"{stage}: already trained to step {checkpoint['step']} in {path}")
        return
    if size % world or stage == "clip" and size < 2 * world:
        raise UserError(f"--batch-size {size}: choose a multiple of the {world} processes; CLIP, "
                        "which tells pictures apart, needs 2 or more in each")
    limits = {"train": settings["limit"], "val": settings["limit"]}
    if settings["data"] == "shapes":  # drawn here, so there are as many as we like
        limits = {"train": settings["limit"] or PRESETS[settings["preset"]]["data"], "val": 512}
    data, val = (load_data(settings["data"], settings["root"], *x) for x in limits.items())
    settings |= {"fingerprint": data.fingerprint(), "world": world}
    if before.get("fingerprint", data.fingerprint()) != data.fingerprint():
        print(f"note: {stage}: the data is not the same as when this run began")
    clip, trained_for, embeddings = None, None, (None, None)
    if needs_clip(stage):
        clip = load_clip(path.parent, spec, device)
        check_clip(checkpoint["clip"], clip, path)
        trained_for = {"spec": spec, "identity": clip.identity}
        with autocast(device):
            embeddings = [embed(clip, d, path.parent / "cache", args.workers) for d in (data, val)]
    torch.manual_seed(settings["seed"])
    model = (build(checkpoint, path) if "ema" in checkpoint
             else fresh_model(stage, settings["preset"], data, clip, embeddings[0]))
    print(f"{stage}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {steps} "
          f"steps of {size} on {device}, to {path}")
    batches, val_batches = (Batches(model, d, e, size, settings["seed"], device, rank, world)
                            for d, e in zip((data, val), embeddings))
    run = Run(stage, path.parent, model, settings, trained_for, checkpoint)
    train(run, model, batches, val_batches, checkpoint)


@user_errors
def main(argv=None):
    parser = Parser("train.py", description="Train one stage, or all of them in turn.")
    add = parser.add_argument
    add("stage", choices=("all", *STAGES, "export"), metavar="STAGE",
        help=f"all ({', '.join(ORDER)}), one of them, one of {', '.join(BASELINES)}, or export")
    add("--preset", choices=PRESETS, help="sizes and training budget (default: tiny)")
    add("--data", choices=DATA, help="captioned pictures (default: shapes)")
    add("--root", type=os.path.abspath, help="folder of the data (not for shapes)")
    add("--limit", type=positive, help="pictures to train on (default: all; shapes: the preset's)")
    add("--clip", help="small, trained here (default), or open_clip's MODEL:TAG_OR_FILE")
    add("--out", help="folder of the run (default: runs/DATA-PRESET)")
    add("--to", help="folder for export, for small copies of the stages in --out")
    add("--resume", action="store_true", help="continue the training in --out, with its settings")
    add("--steps", type=positive, help="training steps (default: the preset's)")
    add("--batch-size", type=some, help="pictures a step, in all (default: the preset's)")
    add("--lr", type=positive_number, help="highest learning rate (default: the preset's)")
    add("--save-every", type=positive, help="steps between checkpoints (default: a tenth or 500)")
    add("--sample-every", type=positive, help="steps between sample grids (default: a fifth)")
    add("--workers", type=natural, default=min(8, usable_cores()), help="to prepare batches")
    add("--compile", action="store_true", help="torch.compile the loss: faster steps on a GPU")
    add("--device", type=choose_device, default="auto", help="auto, cpu, cuda or mps")
    add("--seed", type=seed_number, help="of weights, batches and noise (default: 0)")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    args.out = args.out or f"runs/{args.data or 'shapes'}-{args.preset or 'tiny'}"
    if args.stage == "export":
        return export_checkpoints(args.out, args.to, STAGES)
    with joined_processes(args.device) as (rank, world, device):
        for stage in ORDER if args.stage == "all" else [args.stage]:
            run_stage(stage, args, device, rank, world)


if __name__ == "__main__":
    sys.exit(main())
