"""A classifier of real pictures, and with it the measures of drawings that no geometry can judge.

    python -m lab.classifier --root cifar10/train --test cifar10/test       # trains it
    python -m lab.evaluate classes --weights RUN --root cifar10/test --train cifar10/train

No stage is trained with it or chosen by it, so it is a fair witness: does a picture drawn from "a
photo of a horse" show a horse? Pictures with the same captions are a class. The network is a small
residual one (1512.03385) that looks at 32 x 32 pixels; its last features, F of them, are the space
in which Frechet distances are measured, as Inception's are for FID.

Letters: n pictures, F features, K classes.
"""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lab.measures import THETAS, draw_batches, frechet, look, precision_recall, redrawn
from manipulate import edit, psnr, text_diff
from sample import Pipeline
from stages import load_clip
from support.checkpoint import load_checkpoint, save_checkpoint
from support.muon import make_optimizers
from support.pictures import load_data
from support.sheets import draw_grid, file_ending, save_picture
from support.tools import (
    Parser, UserError, autocast, choose_device, positive, seed_number, user_errors,
)
from train import take_step

GUIDANCE = (1.0, 2.0, 4.0)
SIDE, WIDTHS = 32, (64, 128, 192)  # pixels; channels at 16, 8 and 4 pixels, the last ones F


def layer(c_in, c_out, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out),
                         nn.GELU())


class Classifier(nn.Module):
    """Pictures (n, 3, H, W) in [-1, 1] -> log-odds of their classes (n, K)."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes  # of each class, its captions
        self.stem = layer(3, 32)
        steps = zip((32, *WIDTHS), WIDTHS)
        self.layers = nn.ModuleList(nn.ModuleList([
            layer(c_in, c_out, stride=2), nn.Sequential(layer(c_out, c_out), layer(c_out, c_out))])
            for c_in, c_out in steps)
        self.head = nn.Linear(WIDTHS[-1], len(classes))

    def features(self, pictures):
        """(n, F)"""
        if pictures.shape[-1] != SIDE:
            pictures = F.interpolate(pictures, (SIDE, SIDE), mode="bicubic", antialias=True)
        x = self.stem(pictures.contiguous(memory_format=torch.channels_last))
        for down, block in self.layers:
            x = down(x)
            x = x + block(x)
        return x.mean(dim=(2, 3))

    def forward(self, pictures):
        return self.head(self.features(pictures))

    @torch.no_grad()
    def look(self, pictures):
        """Each picture and its mirror image, averaged: classes (n,), features (n, F)."""
        found = []
        for some in pictures.split(250):
            some = some.to(self.head.weight.device)
            with autocast(some.device):
                found.append((self.features(some) + self.features(some.flip(-1))).float() / 2)
        found = torch.cat(found)
        return self.head(found).argmax(dim=1).cpu(), found.cpu()


def whole(name, root, split):
    """All pictures of a folder; CIFAR in its own format has both splits in one: that one."""
    if name not in ("folder", "cifar10", "cifar100"):
        raise UserError(f"--data {name}: pictures with classes are folder, cifar10 or cifar100")
    return load_data(name, root, split if name.startswith("cifar") else None)


def labelled(data, classes=None):
    """(pictures (n, 3, SIDE, SIDE) uint8, classes (n,), the captions of each class) of a data set
    in which many pictures have the same captions."""
    captions = [tuple(data.captions(i)) for i in range(len(data))]
    found = sorted(set(captions))
    if classes is None and len(found) > len(data) / 20:
        raise UserError(f"{data.name}: {len(found)} different captions for {len(data)} pictures: "
                        "a classifier needs classes, 20 pictures or more with the same captions")
    classes = classes or found
    if not set(found) <= set(classes):
        raise UserError(f"{data.name}: the classifier knows no class of captions like "
                        f"{str(min(set(found) - set(classes)))[:60]}; train one on such pictures")
    pictures = torch.stack([((data.image(i, SIDE) + 1) * 127.5).round().byte()
                            for i in tqdm(range(len(data)), "pictures", disable=None)])
    return pictures, torch.tensor([classes.index(c) for c in captions]), classes


def varied(pictures, rng):
    """A batch of uint8 pictures in [-1, 1], each moved by up to 4 pixels and mirrored or not."""
    wide = F.pad(pictures.float() / 127.5 - 1, (4, 4, 4, 4), mode="reflect")
    moved = torch.stack([x[:, top:top + SIDE, left:left + SIDE]
                         for x, (top, left) in zip(wide, rng.integers(0, 9, (len(wide), 2)))])
    mirrored = torch.from_numpy(rng.random(len(moved)) < 0.5)[:, None, None, None]
    return torch.where(mirrored, moved.flip(-1), moved)


def train(data, test, epochs, device, seed):
    """A trained classifier, and its accuracy on the test pictures."""
    pictures, labels, classes = labelled(data)
    batch_size = min(250, len(labels) // 8)
    torch.manual_seed(seed)
    model = Classifier(classes).to(device, memory_format=torch.channels_last)
    optimizers, rng = make_optimizers(model, 5.0), np.random.default_rng(seed)
    steps = epochs * len(labels) // batch_size
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])
    for step in (bar := tqdm(range(steps), "training", disable=None)):
        some = order[step * batch_size:(step + 1) * batch_size]
        x, y = varied(pictures[some], rng).to(device), labels[some].to(device)
        with autocast(device):
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
        model.zero_grad()
        loss.backward()
        # The rate rises for a fifth of the steps and then falls to 0.
        rate = 2e-3 * min(5 * (step + 1) / steps, 1.25 * (1 - step / steps))
        take_step(optimizers, rate, device)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    pictures, labels, _ = labelled(test, classes)
    seen, _ = model.eval().look(pictures.float() / 127.5 - 1)
    return model, (seen == labels).float().mean().item()


def load_classifier(path, device="cpu"):
    """The classifier that `train` wrote."""
    checkpoint = load_checkpoint(path, "classifier")
    model = Classifier([tuple(c) for c in checkpoint["config"]["classes"]])
    model.load_state_dict(checkpoint["ema"])
    return model.to(device, memory_format=torch.channels_last).eval()


# --- what is measured with it ----------------------------------------------------------------


def judge_classes(args):
    """Pictures drawn from captions of a data set with classes, judged by a classifier.

    CLIP alone, if no decoder is trained yet."""
    data = whole(args.data, args.root, "val")
    if not (args.weights / "decoder.pt").exists():
        return zero_shot(load_clip(args.weights, device=args.device), data, *labelled(data)[1:])
    model = load_classifier(args.classifier, args.device)
    pipeline, seen = Pipeline(args.weights, args.device, 1), whole(args.data, args.train, "train")
    pictures, labels, classes = labelled(data, model.classes)
    table = zero_shot(pipeline.clip, data, labels, classes)

    named, true = model.look(pictures.float() / 127.5 - 1)
    rng = np.random.default_rng(args.seed)
    some, old = rng.permutation(len(data))[:args.n], rng.permutation(len(seen))[:args.n]
    captions = [str(rng.choice(classes[labels[i]])) for i in some]
    others = labelled(part_of(seen, old), classes)

    def row(name, drawn, labels):
        named, features = model.look(drawn)
        precision, recall = precision_recall(features, true[some])
        table[name] = {"right": (named == labels).float().mean().item(),
                       "frechet": frechet(features, true), "precision": precision,
                       "recall": recall, "n": len(drawn)}

    row("training pictures", others[0].float() / 127.5 - 1, others[1])
    given = {"text": "prior", "true_embedding": look(pipeline.clip, part_of(data, some))}
    for (name, emb), args.scale in product(given.items(), GUIDANCE):
        drawn = torch.cat([p for _, p in draw_batches(pipeline, captions, args, emb,
                                                      size=pipeline.sizes[0])])
        row(f"{name}, guidance {args.scale:g}", drawn, labels[some])
        if args.out:
            save_picture(draw_grid(drawn[:64], captions[:64], columns=8),
                         Path(args.out) / f"classes_{name}_{args.scale:g}.png")
            if (name, args.scale) == ("text", GUIDANCE[1]):
                save_picture(nearest(model, drawn[:12], seen), Path(args.out) / "nearest.png")
    return table


def judge_class_edits(args):
    """What a classifier sees in real pictures redrawn, varied, and turned to another class."""
    data = whole(args.data, args.root, "val")
    model = load_classifier(args.classifier, args.device)
    pipeline = Pipeline(args.weights, args.device, 1, prior=None)
    some = np.random.default_rng(args.seed).permutation(len(data))[:args.n]
    n = len(some)
    _, labels, classes = labelled(part_of(data, some), model.classes)
    side, embs = pipeline.sizes[0], look(pipeline.clip, part_of(data, some))
    pictures = torch.stack([data.image(i, side) for i in some]).to(args.device)
    seeds, table = range(args.seed, args.seed + n), {}

    def right(drawn, wanted):
        return (model.look(drawn)[0] == wanted).float().mean().item()

    again, varied = redrawn(pipeline, pictures, embs, seeds)
    for name, drawn in (("true", pictures), ("reconstruction", again), ("variation", varied)):
        table[name] = {"psnr": None if drawn is pictures else psnr(drawn, pictures).mean().item(),
                       "right": right(drawn, labels), "n": n}
    edited, after = [], (labels + 1 + torch.arange(n) % (len(classes) - 1)) % len(classes)
    for k in tqdm(range(min(args.edits, n)), "edits", disable=None):
        direction = text_diff(pipeline, *(classes[c[k]][0] for c in (after, labels)))
        edited.append(edit(pipeline, pictures[k:k + 1], embs[k:k + 1], direction, THETAS, seeds[k]))
    for k, theta in enumerate(THETAS):
        drawn = torch.stack([frames[k] for frames in edited])
        table[f"theta {theta:.3f}"] = {"new": right(drawn, after[:len(drawn)]),
                                       "old": right(drawn, labels[:len(drawn)]), "n": len(drawn)}
    if args.out:
        rows = torch.cat([torch.stack([p, *frames]) for p, frames in zip(pictures, edited)][:12])
        save_picture(draw_grid(rows, columns=1 + len(THETAS), cell=64),
                     Path(args.out) / "class_edits.png")
    return table


def part_of(data, numbers):
    """A data set's pictures of these numbers, in this order."""
    return replace(data, items=[data.items[i] for i in numbers])


def zero_shot(clip, data, labels, classes):
    """How often does CLIP find a picture's class by its captions, and how much of the variance of
    its embeddings lies within a class (which is what variations vary)?"""
    emb = look(clip, data).cpu()
    names = torch.stack([clip.encode_text(list(c))[0].mean(0) for c in classes]).cpu()
    right = (emb @ F.normalize(names, dim=1).T).argmax(1) == labels
    middles = torch.stack([emb[labels == k].mean(0) for k in range(len(classes))])
    within = (emb - middles[labels]).square().sum() / (emb - emb.mean(0)).square().sum()
    return {"CLIP": {"right": right.float().mean().item(), "within a class": within.item(),
                     "n": len(data)}}


def nearest(model, drawn, seen):
    """A sheet: drawn pictures, and below each the two training pictures nearest in features."""
    pictures, _, _ = labelled(seen, model.classes)
    _, features = model.look(pictures.float() / 127.5 - 1)
    closest = torch.cdist(model.look(drawn)[1], features).topk(2, largest=False).indices.T
    rows = [F.interpolate(drawn, (SIDE, SIDE)), *(pictures[k].float() / 127.5 - 1 for k in closest)]
    return draw_grid(torch.cat(rows), columns=len(drawn), cell=64)


@user_errors
def main(argv=None):
    parser = Parser("python -m lab.classifier", description="Train the classifier of real pictures")
    add = parser.add_argument
    add("--data", default="folder", help="cifar10, cifar100 or folder")
    add("--root", required=True, help="folder of the pictures to train on")
    add("--test", required=True, help="folder of the pictures to test on")
    add("--out", type=file_ending(".pt"), default="weights/cifar10/classifier.pt", help="the file")
    add("--epochs", type=positive, default=12, help="times that each picture is seen")
    add("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
    add("--seed", type=seed_number, default=0, help="of weights, batches and variations")
    args = parser.parse_args(argv)
    data, test = whole(args.data, args.root, "train"), whole(args.data, args.test, "val")
    model, accuracy = train(data, test, args.epochs, args.device, args.seed)
    save_checkpoint(args.out, {
        "stage": "classifier", "config": {"classes": [list(c) for c in model.classes]}, "step": 0,
        "ema": {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()},
        "figures": {"accuracy": accuracy}})
    print(f"{args.out}: {accuracy:.1%} of {len(test)} test pictures right")


if __name__ == "__main__":
    sys.exit(main())
