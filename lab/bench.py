"""How fast is training here? And which of two designs gets further in the same time?

    python -m lab.bench [--preset base] [--batch-size 64] [--compile] [--only decoder]
    python -m lab.bench --race "predict=v" "predict=x_0" --minutes 20 --seeds 3

Run it alone on the machine.

PyTorch counts the FLOPs of a whole step (a multiply-add is two), and its profiler says where the
time goes. The peak is measured as well, as the speed of a square matrix product in the precision
that training uses.
"""

import ast
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import replace
from itertools import count, product
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read by torch's import: a silent profiler

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lab.classifier import labelled, load_classifier
from lab.judge import scores, shares
from lab.measures import frechet, in_batches, scenes_of
from sample import noise_for
from stages import PRESETS, STAGES, fresh_model, load_clip, recipe
from support.cache import embed
from support.drawing import SHIPPED, slugs
from support.muon import make_optimizers
from support.pictures import load_data
from support.sheets import draw_grid, save_picture
from support.tools import (
    Parser, UserError, autocast, choose_device, peak_memory, positive, positive_number,
    usable_cores, user_errors,
)
from train import MAX_GRADIENT, Batches, Ema, Loss, take_step, to_device, validate

PARTS = ("prior", "decoder", "upsampler1", "upsampler2")


def seconds(work, device, repeats=5):
    """The fastest of some runs of work(), after two that compile it and fill the caches."""
    times = []
    for _ in range(2 + repeats):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times[2:])


# Operations whose names match are a kind; what is left is the last one's.
KINDS = {"convolutions": "conv", "matrix products": "mm|attention", "group norms": "group_norm",
         "copies": "copy|cat", "the rest": ""}


def where_time_goes(work, device):
    """ "convolutions 52%, ...": the kinds' shares of one run of work(), by PyTorch's profiler."""
    with torch.profiler.profile() as seen:
        work()
    spent, own = dict.fromkeys(KINDS, 0), "device" if device.type == "cuda" else "cpu"
    for event in seen.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a GPU's kernel, whose time its operation has as well
        kind = next(kind for kind, name in KINDS.items() if re.search(name, event.key))
        spent[kind] += getattr(event, f"self_{own}_time_total")
    return ", ".join(f"{kind} {x / sum(spent.values()):.0%}" for kind, x in spent.items())


def matmul_peak(device, kind):
    """FLOP/s of a square matrix product in a precision."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in "ab")
    return 2 * n**3 / seconds(lambda: a @ b, device)


def made_up_batch(config, B, device, tokens):
    """A random batch of the right shapes for a prior, a decoder or an upsampler."""
    if hasattr(config, "crop"):  # an upsampler
        image = 2 * torch.rand(B, 3, config.crop, config.crop, device=device) - 1
        return {"image": image, "low": F.avg_pool2d(image, config.factor)}
    side = getattr(config, "size", 1)  # a prior takes no pictures, and leaves them alone
    return {"image": 2 * torch.rand(B, 3, side, side, device=device) - 1,
            "image_emb": F.normalize(torch.randn(B, config.dim, device=device), dim=-1),
            "text_emb": F.normalize(torch.randn(B, config.dim, device=device), dim=-1),
            "text_enc": torch.randn(B, tokens, config.text_width, device=device),
            "text_mask": torch.ones(B, tokens, dtype=torch.bool, device=device)}


def training_step(model, muon, rate, device, compiled=False):
    """A function (batch, rate) -> loss that takes one step of training, as train.py does."""
    optimizers, loss_of = make_optimizers(model, muon), Loss(model)
    if compiled:
        loss_of.compile(options={"fallback_random": True})

    def step(batch, rate=rate):
        with autocast(device):
            loss = loss_of(batch)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT)
        take_step(optimizers, rate, device)
        return loss.detach()

    return step


def bench_widths(args, peak):
    """What does a step of prior and decoder cost at 1, 2, 4 and 8 times the width? (On a CPU the
    memory is the most so far.)"""
    for stage, name in (("prior", "width"), ("decoder", "channels")):
        usual = getattr(STAGES[stage][1](0, 0, 0), name)  # the sizes of embeddings do not matter
        width = recipe(args.preset, stage)[0].get(name, usual)
        for times in (1, 2, 4, 8):
            bench_training(stage, args, peak, {name: times * width}, f"{name} {times * width}")


def bench_data(args):
    """How long until the first step, and how fast are batches made, with more and more pictures?"""
    clip = load_clip(args.weights or SHIPPED, device=args.device)
    for n in (1000, 10_000, 60_000):
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, autocast(args.device):
            data = load_data(args.data, args.root, "train", n)
            embeddings = embed(clip, data, folder)
            took = time.perf_counter() - begun
            model, step = fresh_model("decoder", args.preset, data, clip, embeddings), count()
            batches = Batches(model, data, embeddings, 32, seed=0)
            each = seconds(lambda: batches[next(step)], torch.device("cpu"))
        print(f"{len(data)} pictures: {took:.0f} s until they are found and embedded, then "
              f"{32 / each:.0f} pictures/s in batches, on one core", flush=True)


def bench_training(stage, args, peak, changed=None, label=""):
    """Time one training step of a stage, count its FLOPs, and print both."""
    (make, make_config), (fields, training) = STAGES[stage], recipe(args.preset, stage)
    fields = fields | (changed or {})
    B, device = args.batch_size or training["batch_size"], args.device
    # The sizes of ViT-L-14, or of the small CLIP and a caption of shapes.
    dim, text_len, tokens = (768, 77, 77) if args.preset == "large" else (128, 32, 20)
    if stage in ("prior", "decoder"):
        fields = fields | {"dim": dim, "text_width": dim, "text_len": text_len}
    model = make(make_config(**fields)).to(device).train()
    batch = made_up_batch(model.config, B, device, tokens)
    how = model, training.get("muon"), training["lr"], device
    with FlopCounterMode(display=False) as counter:  # sees single operations: before compiling
        training_step(*how)(batch)
    step, flops = training_step(*how, compiled=args.compile), counter.get_total_flops()
    took = seconds(lambda: step(batch), device)
    print(f"{label or stage:14} batch {B:4}: {took * 1000:8.0f} ms a step {B / took:8.0f} "
          f"examples/s {flops / B / 1e9:8.2f} GFLOP an example {flops / took / 1e9:9.0f} GFLOP/s "
          f"{flops / took / peak:6.1%} of the peak, {peak_memory(device):.1f} GB\n"
          f"{'':14} {where_time_goes(lambda: step(batch), device)}")


def read_arm(text):
    """ "predict=x_0 muon=5.0" -> {"predict": "x_0", "muon": 5.0}."""
    def value(said):
        try:
            return ast.literal_eval(said)
        except (ValueError, SyntaxError):
            return said

    try:
        return {name: value(said) for name, said in (x.split("=") for x in text.split())}
    except ValueError:
        raise UserError(f"--race {text!r}: give fields of the stage as 'NAME=VALUE NAME=VALUE'")


def race(args):
    """Train a decoder (or, by --only prior, a prior) in several ways for the same time each, and
    see what it draws from the captions and true embeddings of validation pictures.

    closed=LAYER is no field: all that a linear layer says is silenced, as if it were not there."""
    arms = {arm: read_arm(arm) for arm in args.race}
    stage = "prior" if args.only == ["prior"] else "decoder"
    clip = load_clip(args.weights or SHIPPED, device=args.device)
    make, make_config = STAGES[stage]
    plain = make(make_config(clip.dim, clip.text_width, clip.text_len,
                             **recipe(args.preset, stage)[0]))
    for arm in arms:  # a slip is told before the work
        changed(plain, arm, arms[arm])
    limit = min(20_000, PRESETS[args.preset]["data"]) if args.data == "shapes" else None
    data = [load_data(args.data, args.root, split, n)
            for split, n in (("train", limit), ("val", args.n))]
    right_in = judge_of(data[1], args) if stage == "decoder" else None
    with tempfile.TemporaryDirectory() as folder:
        with autocast(args.device):
            embeddings = [embed(clip, d, folder) for d in data]
        for arm, seed in product(arms, range(args.seeds)):
            training = recipe(args.preset, stage)[1]
            training = training | {k: x for k, x in arms[arm].items() if k in TRAINING}
            torch.manual_seed(seed)
            model = fresh_model(stage, args.preset, data[0], clip, embeddings[0])
            model = changed(model, arm, arms[arm]).to(args.device)
            batches, val = (Batches(model, d, e, training["batch_size"], seed, args.device)
                            for d, e in zip(data, embeddings))
            ema, steps = train_for(model, batches, training, args)
            drawn, true = draw(ema, val)
            figures = {"frechet": frechet(drawn, true)} if stage == "prior" else right_in(drawn)
            figures |= validate(ema, val, args.device)
            print(f"{arm or 'preset'}, seed {seed}: {steps * training['batch_size']} pictures; "
                  + ", ".join(f"{name} {x:.4g}" for name, x in figures.items()), flush=True)
            if args.out and stage == "decoder":
                some = drawn[:: -(-len(drawn) // 64)]  # at most 64 from all classes, often sorted
                save_picture(draw_grid(some, columns=8),
                             Path(args.out) / f"{slugs([arm or 'preset'])[0]}_{seed}.png")


def changed(model, arm, fields):
    """A new model like this one, but for an arm's fields; what `closed` names is silent."""
    fields = {k: x for k, x in fields.items() if k not in TRAINING}
    closed = fields.pop("closed", None)
    try:
        model = type(model)(replace(model.config, **fields))
        silent = getattr(model, closed).parameters() if closed else ()
    except (TypeError, AttributeError, AssertionError):
        raise UserError(f"--race {arm!r}: there is no such field, value or layer")
    for p in silent:  # zero, and as no gradient reaches it, it stays so
        p.requires_grad_(False).zero_()
    return model


def train_for(model, batches, training, args):
    """Train for args.minutes: (the averaged model, steps). The learning rate falls with the time.
    On a CPU it is this process's own time, so that other programs do not matter."""
    gpu = args.device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    step = training_step(model, training.get("muon"), 0.0, args.device, args.compile)
    step(to_device(batches[0], args.device))  # compiles, and changes nothing at a rate of 0
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(10**9),
                                         num_workers=usable_cores() if gpu else 0)
    ema, begun = Ema(model), clock()
    for done, batch in enumerate(loader):
        share = (clock() - begun) / (60 * args.minutes)
        if share >= 1:
            return ema.model, done
        rate = training["lr"] * min(1, 20 * share) * 0.5 * (1 + math.cos(math.pi * share))
        step(to_device(batch, args.device), rate).item()  # waits for a GPU
        ema.update(model)


def draw(model, val):
    """What is drawn of the n validation pictures: by a decoder from captions (if it was trained
    with any) and embeddings, by a prior from captions; and their embeddings (n, D)."""
    drawn, true, n = [], [], len(val.data)
    for part in in_batches(n, 50):
        some = to_device(val.of(range(n)[part], np.random.default_rng(0)), val.device)
        emb = some["image_emb" if "image" in some else "text_emb"]
        text = some["text_enc"], some["text_mask"]
        if getattr(model.config, "drop_caption", 0.0) == 1:
            text = None, None
        with autocast(val.device):
            drawn.append(model.sample(emb, *text, 2.0 if "image" in some else 1.0,
                                      noise=noise_for(range(n)[part], "decoder")).cpu())
        true.append(some["image_emb"].cpu())
    return torch.cat(drawn), torch.cat(true)


def judge_of(data, args):
    """A function pictures -> figures: the share that shows what it should, by the geometric judge
    or by a classifier, in whose features there is a Frechet distance too."""
    if args.data == "shapes":
        return lambda drawn: {k: x for k, x in shares(scores(drawn, scenes_of(data))).items()
                              if k in ("colours", "shapes", "binding")}
    classifier = load_classifier(args.classifier, args.device)
    pictures, labels, _ = labelled(data, classifier.classes)
    _, true = classifier.look(pictures.float() / 127.5 - 1)

    def right_in(drawn):
        seen, features = classifier.look(drawn)
        return {"right": (seen == labels).float().mean().item(), "frechet": frechet(features, true)}

    return right_in


TRAINING = ("batch_size", "lr", "muon")  # fields that are the training's, not the model's


@user_errors
def main(argv=None):
    parser = Parser("python -m lab.bench", description="How fast is training here?")
    add = parser.add_argument
    add("--preset", default="base", choices=PRESETS, help="sizes of the models")
    add("--only", nargs="+", choices=(*PARTS, "widths", "data"), default=PARTS, help="what to "
        "measure; widths: prior and decoder up to 8 times as wide; data: more and more pictures")
    add("--batch-size", type=positive, help="examples a step (default: the preset's)")
    add("--compile", action="store_true", help="torch.compile the loss")
    add("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
    add("--race", nargs="+", metavar="ARM", help="train decoders (with --only prior: priors) that "
        "differ from the preset's in fields, 'NAME=VALUE NAME=VALUE' an arm; '' is the preset's")
    add("--minutes", type=positive_number, default=20.0, help="of training for each arm of a race")
    add("--seeds", type=positive, default=1, help="trainings of each arm")
    add("-n", type=positive, default=500, help="pictures drawn to judge each training")
    add("--weights", help="folder with the CLIP of a race or data (default: as sample.py)")
    add("--data", default="shapes", help="of a race or data: shapes, or a data set with classes")
    add("--root", help="folder of the data (not for shapes)")
    add("--classifier", default="weights/cifar10/classifier.pt", help="judges pictures of classes")
    add("--out", help="folder for sheets of what was drawn")
    args = parser.parse_args(argv)
    if args.race:
        return race(args)
    peaks = {kind: matmul_peak(args.device, kind) for kind in (torch.float32, torch.bfloat16)}
    used = torch.bfloat16 if autocast(args.device)._enabled else torch.float32
    said = ", ".join(f"{p / 1e9:.0f} GFLOP/s in {str(k)[6:]}" for k, p in peaks.items())
    print(f"{args.device}, {torch.get_num_threads()} threads; peak of matrix products: {said}; "
          f"training uses {str(used)[6:]}")
    for part in args.only:
        if part == "widths":
            bench_widths(args, peaks[used])
        elif part == "data":
            bench_data(args)
        else:
            bench_training(part, args, peaks[used])


if __name__ == "__main__":
    sys.exit(main())
