"""How fast is training here, and what does the prior's cache gain? Run it alone on the machine.

    python -m lab.bench [--preset base] [--batch-size 64] [--compile] [--only decoder]
    python -m lab.bench --race optimizers --minutes 5     # which way of training gets further?

PyTorch counts the FLOPs of a whole step (a multiply-add is two). The peak is measured as well, as
the speed of a square matrix product in the precision that training uses.
"""

import sys
import tempfile
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from prior import DiffusionPrior, PriorConfig
from sample import default_weights, noise_for
from stages import PRESETS, STAGES, fresh_model, load_clip, recipe
from support.cache import embed
from support.muon import make_optimizers
from support.shapes import Shapes
from support.tools import (
    Parser, autocast, choose_device, peak_memory, positive, positive_number, user_errors,
)
from train import MAX_GRADIENT, Batches, Loss, take_step, to_device, validate

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
    """A function batch -> loss that takes one step of training, as train.py does."""
    optimizers, loss_of = make_optimizers(model, muon), Loss(model)
    if compiled:
        loss_of.compile(options={"fallback_random": True})

    def step(batch):
        with autocast(device):
            loss = loss_of(batch)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT)
        take_step(optimizers, rate, device)
        return loss.detach()

    return step


def bench_training(stage, args, peak):
    """Time one training step of a stage, count its FLOPs, and print both."""
    (make, make_config), (fields, training) = STAGES[stage], recipe(args.preset, stage)
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
    print(f"{stage:11} batch {B:4}: {took * 1000:8.0f} ms a step {B / took:8.0f} examples/s "
          f"{flops / B / 1e9:8.2f} GFLOP an example {flops / took / 1e9:9.0f} GFLOP/s "
          f"{flops / took / peak:6.1%} of the peak, {peak_memory(device):.1f} GB")


class Uncached(DiffusionPrior):
    """A prior that runs the caption's tokens again at every step."""

    def encode_caption(self, text_emb, text_enc, text_mask, keep=None):
        keep = text_mask[:, 0] if keep is None else keep
        return {"text_emb": text_emb, "text_enc": text_enc, "text_mask": text_mask, "keep": keep}

    def forward(self, x_t, t, **caption):
        return super().forward(x_t, t, **super().encode_caption(**caption))


def bench_prior_cache(device):
    """Time the prior's sampling with and without the caption's cache."""
    config = PriorConfig(dim=512, text_width=512, text_len=77, width=512, depth=6, heads=8)
    text = list(made_up_batch(config, 8, device, 77).values())[2:]
    times, drawn = [], []
    for make in (DiffusionPrior, Uncached):
        torch.manual_seed(0)  # the same weights
        model = make(config).to(device).eval()

        def draw(model=model):
            with autocast(device):
                drawn.append(model.sample(*text, scale=2.0, steps=64, candidates=1,
                                          noise=noise_for(range(8), "prior")))

        times.append(seconds(draw, device, repeats=1))
    same = F.cosine_similarity(drawn[0], drawn[-1]).min()
    print(f"prior, width 512, depth 6, 77 tokens, 64 guided steps, batch 8: {times[0]:.2f} s; "
          f"without the cache {times[1]:.2f} s, {times[1] / times[0]:.1f} times as long "
          f"(least cosine between the two results {same:.4f})")


def race(stage, arms, args):
    """Train a stage on 5,000 scenes in several ways, for the same time each, and print the
    validation loss at every quarter. arms: {name: (fields of the model's config, Muon's rate)}."""
    clip, training = load_clip(default_weights(), device=args.device), recipe(args.preset, stage)[1]
    data, B = (Shapes(5000, "train"), Shapes(512, "val")), training["batch_size"]
    with tempfile.TemporaryDirectory() as folder:
        embeddings = [embed(clip, d, folder) for d in data]
        for name, (fields, muon) in arms.items():
            torch.manual_seed(0)
            model = fresh_model(stage, args.preset, data[0], clip, embeddings[0])
            model = type(model)(replace(model.config, **fields)).to(args.device)
            batches, val = (Batches(model, d, e, B, 0) for d, e in zip(data, embeddings))
            step, done, spent = training_step(model, muon, training["lr"], args.device), 0, 0.0
            for quarter in (0.25, 0.5, 0.75, 1.0):
                while spent < quarter * args.minutes * 60:
                    begun = time.perf_counter()
                    step(to_device(batches[done], args.device)).item()  # the clock waits for a GPU
                    spent, done = spent + time.perf_counter() - begun, done + 1
                loss = validate(model.eval(), val, args.device, 512)["val_loss"]
                model.train()
                print(f"{stage}, {name}: after {quarter * args.minutes * 60:.0f} s, {done * B} "
                      f"examples: validation loss {loss:.4f}")


RACES = {"copies": ("prior", {"K = 1": ({"copies": 1}, None), "K = 4": ({"copies": 4}, None)}),
         "optimizers": ("decoder", {"Adam": ({}, None), "Adam and Muon": ({}, 5.0)})}


@user_errors
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
