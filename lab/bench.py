"""How fast is training here, and what does the prior's cache gain? Run it alone on the machine.

    python -m lab.bench [--preset base] [--batch-size 64] [--compile] [--only decoder]
    python -m lab.bench --race optimizers --minutes 5     # which way of training gets further?
"""

import sys
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from prior import DiffusionPrior, PriorConfig
from sample import default_weights, generators
from stages import PRESETS, STAGES, load_clip, recipe
from support.cache import embed
from support.muon import make_optimizers
from support.shapes import Shapes
from support.tools import Parser, autocast, choose_device, exit_code, positive, positive_number
from train import Batches, Loss, compile_loss, make_compilable, make_model, training_step

PARTS = ("prior", "decoder", "upsampler1", "upsampler2", "sampling")


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


def matmul_peak(device, kind):
    """FLOP/s of a square matrix product in a precision (a multiply-add is two)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in "ab")
    return 2 * n**3 / seconds(lambda: a @ b, device)


def made_up_batch(config, B, device, tokens=20):
    """A random batch of the right shapes for an upsampler, or for a prior or a decoder."""
    side = getattr(config, "crop", None) or getattr(config, "size", 1)  # a prior has no pictures
    image = 2 * torch.rand(B, 3, side, side, device=device) - 1
    if hasattr(config, "crop"):
        return {"image": image, "low": F.avg_pool2d(image, config.factor)}
    emb = F.normalize(torch.randn(B, config.dim, device=device), dim=-1)
    return {"image": image, "image_emb": emb.roll(1, 0), "text_emb": emb,
            "text_enc": torch.randn(B, tokens, config.text_width, device=device),
            "text_mask": torch.ones(B, tokens, dtype=torch.bool, device=device)}


def bench_training(stage, args, peak):
    """Time one training step of a stage, count its FLOPs, and print both."""
    (make, make_config), (fields, training) = STAGES[stage], recipe(args.preset, stage)
    device, tokens = args.device, 20  # a caption of shapes
    if stage in ("prior", "decoder"):
        dim, text_len = (768, 77) if args.preset == "large" else (128, 32)  # ViT-L-14 or small CLIP
        fields = fields | {"dim": dim, "text_width": dim, "text_len": text_len}
    model = make(make_config(**fields)).to(device).train()
    optimizers, loss_of = make_optimizers(model, training.get("muon")), Loss(model)
    batch = made_up_batch(model.config, args.batch_size or training["batch_size"], device, tokens)

    def step():
        training_step(model, loss_of, batch, optimizers, training["lr"], device)

    with FlopCounterMode(display=False) as counter:  # sees single operations: before compiling
        step()
    if args.compile:
        compile_loss(loss_of)
        make_compilable(batch, model)
    B, took, flops = len(batch["image"]), seconds(step, device), counter.get_total_flops()
    print(f"{stage:11} batch {B:4}: {took * 1000:8.0f} ms a step {B / took:8.0f} examples/s "
          f"{flops / B / 1e9:8.2f} GFLOP an example {flops / took / 1e9:9.0f} GFLOP/s "
          f"{flops / took / peak:6.1%} of the peak")


def bench_prior_cache(device):
    """Time the prior's sampling with the caption's cache, and with the caption run at each step."""
    config = PriorConfig(dim=512, text_width=512, text_len=77, width=512, depth=6, heads=8)
    text = list(made_up_batch(config, 8, device, tokens=77).values())[2:]
    prior, drawn = DiffusionPrior(config).to(device).eval(), []
    encode, network = prior.encode_caption, prior.cached_network

    def draw():
        with autocast(device):
            drawn.append(prior.sample(*text, scale=2.0, steps=64, candidates=1,
                                      generators=generators(range(8), "prior")))

    cached = seconds(draw, device, repeats=1)
    prior.encode_caption = lambda emb, enc, mask, keep=None: {
        "text_emb": emb, "text_enc": enc, "text_mask": mask,
        "keep": mask[:, 0] if keep is None else keep}
    prior.cached_network = lambda x_t, t, **caption: network(x_t, t, **encode(**caption))
    uncached = seconds(draw, device, repeats=1)
    same = F.cosine_similarity(drawn[0], drawn[-1]).min()
    print(f"prior, width 512, depth 6, 77 tokens, 64 guided steps, batch 8: {cached:.2f} s; "
          f"without the cache {uncached:.2f} s, {uncached / cached:.1f} times as long "
          f"(least cosine between the two results {same:.4f})")


def race(stage, arms, args):
    """Train a stage on 5,000 scenes in several ways, for the same time each, and print the
    validation loss at every quarter. arms: {name: (fields of the model's config, Muon's rate)}."""
    clip, training = load_clip(default_weights(), device=args.device), recipe(args.preset, stage)[1]
    settings = training | {"seed": 0, "half_size_until": 0.0}
    data, folder = [Shapes(5000, "train"), Shapes(512, "val")], tempfile.TemporaryDirectory()
    embeddings = [embed(clip, d, folder.name) for d in data]
    for name, (fields, muon) in arms.items():
        torch.manual_seed(0)
        model = make_model(stage, args.preset, data[0], clip)
        model = type(model)(replace(model.config, **fields)).to(args.device)
        batches, val = (Batches(stage, model.config, d, e, settings)
                        for d, e in zip(data, embeddings, strict=True))
        optimizers, loss_of, step, spent = make_optimizers(model, muon), Loss(model), 0, 0.0
        check = val.make(0, range(512), np.random.default_rng(0))
        for limit in (args.minutes * 15 * quarter for quarter in (1, 2, 3, 4)):  # seconds
            while spent < limit:
                begun = time.perf_counter()
                batch = {k: v.to(args.device) for k, v in batches[step].items()}
                loss, _ = training_step(model, loss_of, batch, optimizers, training["lr"],
                                        args.device)
                loss.item()  # the clock waits for a GPU
                spent, step = spent + time.perf_counter() - begun, step + 1
            torch.manual_seed(1)
            with torch.no_grad(), autocast(args.device):
                loss = model.eval().loss({k: v.to(args.device) for k, v in check.items()})
            model.train()
            examples = step * training["batch_size"]
            print(f"{stage}, {name}: after {limit:.0f} s, {examples} examples: validation loss "
                  f"{loss:.4f}")


RACES = {"copies": ("prior", {"K = 1": ({"copies": 1}, None), "K = 4": ({"copies": 4}, None)}),
         "optimizers": ("decoder", {"Adam": ({}, None), "Adam and Muon": ({}, 5.0)})}


@exit_code
def main(argv=None):
    parser = Parser("python -m lab.bench", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", default="base", choices=PRESETS, help="sizes of the models")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    add("--batch-size", type=positive, help="examples a step (default: the preset's)")
    add("--compile", action="store_true", help="torch.compile the loss")
    add("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
    add("--race", choices=RACES, help="only train: priors with 1 and 4 noised copies of each "
        "embedding, or decoders by Adam alone and with Muon")
    add("--minutes", type=positive_number, default=1.0, help="time for each way in a race")
    args = parser.parse_args(argv)
    if args.race:
        return race(*RACES[args.race], args)
    peaks = {kind: matmul_peak(args.device, kind) for kind in (torch.float32, torch.bfloat16)}
    used = torch.bfloat16 if autocast(args.device)._enabled else torch.float32
    said = ", ".join(f"{p / 1e9:.0f} GFLOP/s in {str(k)[6:]}" for k, p in peaks.items())
    print(f"{args.device}, {torch.get_num_threads()} threads; peak of matrix products: {said}; "
          f"training uses {str(used)[6:]}")
    for part in args.only:
        if part == "sampling":
            bench_prior_cache(args.device)
        else:
            bench_training(part, args, peaks[used])


if __name__ == "__main__":
    sys.exit(main())
