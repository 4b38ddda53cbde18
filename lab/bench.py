"""How fast is it here? Training steps, sampling with and without the cache. Run it by hand, alone.

    python -m lab.bench [--preset base] [--batch-size 64] [--compile] [--only decoder]
    python -m lab.bench --race optimizers --minutes 5     # which way of training gets further?

FLOPs are counted by PyTorch's own counter (multiply-adds as two), of the whole step. The peak is
measured too: the fastest of some square matrix products, in the precision that training uses.
"""

import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from prior import DiffusionPrior, PriorConfig
from sample import default_weights
from stages import PRESETS, STAGES, load_clip, recipe
from support.cache import embed
from support.muon import make_optimizers
from support.shapes import Shapes
from support.tools import (
    Parser, autocast, choose_device, exit_code, peak_memory, positive, positive_number,
)
from train import Batches, Loss, compile_loss, make_compilable, make_model, training_step

PARTS = ("prior", "decoder", "upsampler1", "upsampler2", "sampling")

# CLIP's embedding and token features; a caption's tokens, and the most there may be. The latter are
# ViT-L-14's, with the preset `large`, and captions of the greatest length.
SMALL, PRETRAINED = (128, 128, 20, 32), (768, 768, 77, 77)


def seconds(work, device, repeats=5):
    """The fastest of some runs of work(); none begins once 10 seconds are over. Two others come
    first and do not count: they compile, and fill the caches."""
    times = []
    for k in range(-2, repeats):
        if sum(times) > 10:
            break
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if k >= 0:
            times.append(time.perf_counter() - begun)
    return min(times)


def matmul_peak(device, kind):
    """FLOP/s of the best square matrix product in a precision."""
    best = 0
    for n in (1024, 2048, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(n, n, device=device).to(kind) for _ in "ab")
        best = max(best, 2 * n**3 / seconds(lambda: a @ b, device))
    return best


def caption(B, device, dim, width, length):
    return (F.normalize(torch.randn(B, dim, device=device), dim=-1),
            torch.randn(B, length, width, device=device),
            torch.ones(B, length, dtype=torch.bool, device=device))


def batch_of(stage, config, B, device, sizes):
    """A made-up batch of the right shapes."""
    if "upsampler" in stage:
        image = 2 * torch.rand(B, 3, config.crop, config.crop, device=device) - 1
        return {"image": image, "low": F.avg_pool2d(image, config.factor)}
    text_emb, text_enc, text_mask = caption(B, device, *sizes[:3])
    batch = {"image_emb": text_emb.roll(1, 0), "text_emb": text_emb, "text_enc": text_enc,
             "text_mask": text_mask}
    if stage == "decoder":
        batch["image"] = 2 * torch.rand(B, 3, config.size, config.size, device=device) - 1
    return batch


def bench_training(stage, args, device, peak):
    make, make_config = STAGES[stage]
    fields, training = recipe(args.preset, stage)
    sizes = PRETRAINED if args.preset == "large" else SMALL
    if stage in ("prior", "decoder"):
        fields = fields | {"dim": sizes[0], "text_width": sizes[1], "text_len": sizes[3]}
    model = make(make_config(**fields)).to(device).train()
    optimizers = make_optimizers(model, training.get("muon"))
    B, loss_of = args.batch_size or training["batch_size"], Loss(model)

    def step(batch):
        training_step(model, loss_of, batch, optimizers, training["lr"], device)

    # Before it is compiled, as the counter sees single operations only; and not of a whole batch,
    # which may fit into memory only when compiled. The optimizer's share does not grow with B.
    counts = []
    for n in (1, 2):
        with FlopCounterMode(display=False) as counter:
            step(batch_of(stage, model.config, n, device, sizes))
        counts.append(counter.get_total_flops())
    flops = counts[0] + (B - 1) * (counts[1] - counts[0])
    batch = batch_of(stage, model.config, B, device, sizes)
    if args.compile:
        compile_loss(loss_of)
        make_compilable(batch, model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took = seconds(lambda: step(batch), device)
    memory = f"  {peak_memory(device):.1f} GB" if device.type == "cuda" else ""
    print(f"{stage:11} batch {B:4}: {took * 1000:8.0f} ms a step {B / took:8.0f} examples/s "
          f"{flops / B / 1e9:8.2f} GFLOP an example {flops / took / 1e9:9.0f} GFLOP/s "
          f"{flops / took / peak:6.1%} of the peak{memory}")


def bench_prior_cache(device):
    """Sampling as it is, against a network that runs the whole sequence at every step."""
    config = PriorConfig(dim=512, text_width=512, text_len=77, width=512, depth=6, heads=8)
    prior, B = DiffusionPrior(config).to(device).eval(), 8
    text = caption(B, device, 512, 512, 77)

    class Uncached(DiffusionPrior):
        def encode_caption(self, text_emb, text_enc, text_mask, keep=None):
            keep = text_mask[:, 0] if keep is None else keep
            return {"text_emb": text_emb, "text_enc": text_enc, "text_mask": text_mask,
                    "keep": keep}

        def cached_network(self, x_t, t, **text):
            return self(x_t, t, **text)

    uncached = Uncached(config).to(device).eval()
    uncached.load_state_dict(prior.state_dict())
    times, drawn = [], []
    for model in (prior, uncached):
        def draw(model=model):
            seeds = [torch.Generator().manual_seed(k) for k in range(B)]
            with torch.no_grad(), autocast(device):
                drawn.append(model.sample(*text, scale=2.0, steps=64, generators=seeds,
                                          candidates=1))
        times.append(seconds(draw, device, repeats=1))
    same = F.cosine_similarity(drawn[0], drawn[-1]).min()
    print(f"prior, width 512, depth 6, 77 tokens, 64 guided steps, batch 8: {times[0]:.2f} s; "
          f"without the cache {times[1]:.2f} s, {times[1] / times[0]:.1f} times as long "
          f"(least cosine between the two results {same:.4f})")


def race(stage, arms, args, device):
    """Validation loss against time of some ways to train a stage on 5,000 scenes.

    arms: name -> (fields of the model's config, Muon's rate in multiples of Adam's, or None).
    """
    clip = load_clip(default_weights(), device=device)
    training = recipe(args.preset, stage)[1]
    settings = training | {"seed": 0, "half_size_until": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        data = [Shapes(n, split) for n, split in ((5000, "train"), (512, "val"))]
        embeddings = [embed(clip, d, folder) for d in data]
        for name, (fields, muon) in arms.items():
            torch.manual_seed(0)
            model = make_model(stage, args.preset, data[0], clip).to(device)
            model = type(model)(replace(model.config, **fields)).to(device)
            batches, val = (Batches(stage, model.config, d, e, settings)
                            for d, e in zip(data, embeddings, strict=True))
            optimizers, loss_of, timer = make_optimizers(model, muon), Loss(model), Stopwatch()
            step, check = 0, val.make(0, range(512), np.random.default_rng(0))
            check = {k: v.to(device) for k, v in check.items()}
            for quarter in (1, 2, 3, 4):
                while timer.seconds() < quarter / 4 * args.minutes * 60:
                    batch = {k: v.to(device) for k, v in batches[step].items()}
                    loss, _ = training_step(model, loss_of, batch, optimizers, training["lr"],
                                            device)
                    loss.item()  # the clock waits for a GPU
                    step += 1
                with timer.paused(), torch.no_grad(), autocast(device):
                    torch.manual_seed(1)
                    value = model.eval().loss(check).item()
                    model.train()
                print(f"{stage}, {name}: after {quarter / 4 * args.minutes * 60:.0f} s, "
                      f"{step * training['batch_size']} examples: validation loss {value:.4f}")


class Stopwatch:
    """Seconds since it was made, without those in its pauses."""

    def __init__(self):
        self.begun = time.perf_counter()

    def seconds(self):
        return time.perf_counter() - self.begun

    @contextmanager
    def paused(self):
        stopped = time.perf_counter()
        yield
        self.begun += time.perf_counter() - stopped


@exit_code
def main(argv=None):
    parser = Parser("python -m lab.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="base", choices=PRESETS, help="sizes of the models")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--batch-size", type=positive, help="examples a step (default: preset's)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
    parser.add_argument("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--race", choices=("copies", "optimizers"),
                        help="only train: priors with 1 and 4 noised copies of each embedding, or "
                        "decoders by Adam alone and with Muon")
    parser.add_argument("--minutes", type=positive_number, default=1.0, help="of each in a race")
    args = parser.parse_args(argv)
    device = args.device
    if args.race == "copies":
        return race("prior", {f"K = {k}": ({"copies": k}, None) for k in (1, 4)}, args, device)
    if args.race == "optimizers":
        muon = recipe(args.preset, "decoder")[1].get("muon", 5.0)
        arms = {"Adam": ({}, None), "Adam and Muon": ({}, muon)}
        return race("decoder", arms, args, device)
    peaks = {kind: matmul_peak(device, kind) for kind in (torch.float32, torch.bfloat16)}
    used = torch.bfloat16 if autocast(device)._enabled else torch.float32
    said = ", ".join(f"{p / 1e9:.0f} GFLOP/s in {str(k)[6:]}" for k, p in peaks.items())
    print(f"{device}, {torch.get_num_threads()} threads; peak of matrix products: {said}; "
          f"training uses {str(used)[6:]}")
    peak = peaks[used]
    for stage in args.only:
        if stage == "sampling":
            bench_prior_cache(device)
        else:
            bench_training(stage, args, device, peak)


if __name__ == "__main__":
    sys.exit(main())
