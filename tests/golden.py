"""Do drawings and trainings still give the same bits? A net under a rewrite, not for pytest.

    python tests/golden.py           # compare with golden.json; --draw or --train: only that half
    python tests/golden.py --write   # record it: run this on the code as it was, on this machine

Float32 with one thread and autocast off, so that the bits are this machine's own.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import manipulate
import sample
import stages
import train
from support import tools

torch.set_num_threads(1)
tools.cpu_is_fast_in_bf16 = lambda: False
CAPTIONS = ["a red circle", "a blue star above a yellow square on black", "a sign that says cat"]
MICRO = {
    "data": 24,
    "clip": (
        {"dim": 16, "image_size": 32, "vision_width": 8,
         "text_width": 16, "text_layers": 1, "text_heads": 2},
        {"steps": 3, "batch_size": 8, "lr": 1e-3},
    ),
    "prior": ({"width": 32, "depth": 1, "heads": 2}, {"steps": 3, "batch_size": 8, "lr": 1e-3}),
    "decoder": (
        {"size": 16, "channels": 8, "multiples": (1, 2), "attention_levels": (1,),
         "head_channels": 8, "context_width": 32, "text_depth": 1, "sample_steps": 4},
        {"steps": 3, "batch_size": 8, "lr": 1e-3},
    ),
    "upsampler1": (
        {"low_size": 16, "size": 32, "crop": 16, "channels": 8, "multiples": (1, 2),
         "sample_steps": 3},
        {"steps": 3, "batch_size": 4, "lr": 1e-3, "muon": 2.0},
    ),
    "upsampler2": (
        {"low_size": 32, "size": 64, "crop": 16, "channels": 8, "multiples": (1, 2), "stem": 2,
         "degradation": "bsr", "schedule": "linear", "sample_steps": 3},
        {"steps": 3, "batch_size": 4, "lr": 1e-3},
    ),
}


def pixels(path):
    return hashlib.sha256(np.asarray(Image.open(path)).tobytes()).hexdigest()[:16]


def weights(state):
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(name.encode() + x.numpy().tobytes())
    return digest.hexdigest()[:16]


def draw(hashes, folder):
    def text(name, *options):
        out = folder / name
        assert sample.main([*CAPTIONS, "-n", "1", "--out", str(out), *options]) == 0
        hashes[name] = {p.name: pixels(p) for p in sorted(out.glob("*_0.png"))
                        if not p.name.startswith("grid")}

    def change(name, *arguments):
        out = folder / name
        assert manipulate.main([*arguments, "--out", str(out)]) == 0
        hashes[name] = {p.name: pixels(p) for p in sorted(out.glob("*.png"))}

    for size in ("64", "256", "1024"):
        text(size, "--size", size)
    text("ar_prior", "--prior", "ar_prior")
    text("caption", "--prior", "none")
    text("glide", "--decoder", "decoder_caption")
    a, b, mask = (str(ROOT / f"docs/pictures/{x}.png") for x in ("a", "b", "mask"))
    change("vary", "vary", a, "-n", "1", "--steps", "10")
    change("blend", "blend", a, b, "--frames", "3", "--steps", "10")
    change("edit", "edit", a, "--from", "a red circle", "--to", "a blue circle", "--frames", "3",
           "--steps", "10")
    change("probe", "probe", a)
    change("inpaint", "inpaint", a, mask, "a green square left of a purple triangle on black",
           "--resamples", "2", "--steps", "8")


def micro_training(hashes, folder):
    stages.PRESETS["micro"] = MICRO
    options = ["--preset", "micro", "--out", str(folder), "--workers", "0"]
    for stage in ("all", "ar_prior", "decoder_text_emb", "decoder_caption"):
        assert train.main([stage, *options]) == 0
    for path in sorted(folder.glob("*.pt")):
        saved = torch.load(path, weights_only=True)
        hashes[f"train {path.stem}"] = {key: weights(saved[key]) for key in ("model", "ema")}


def main():
    hashes, folder = {}, Path(tempfile.mkdtemp())
    if "--draw" not in sys.argv:
        micro_training(hashes, folder / "run")
    if "--train" not in sys.argv:
        draw(hashes, folder)
    shutil.rmtree(folder)
    path = Path(__file__).with_suffix(".json")
    if "--write" in sys.argv:
        path.write_text(json.dumps(hashes, indent=1) + "\n")
        return
    before = json.loads(path.read_text())
    for name in before:
        if name not in hashes and {"--draw", "--train"} & {*sys.argv}:
            continue
        print(f"{name:24}", "same" if hashes.get(name) == before[name] else
              f"CHANGED\n  {before[name]}\n  {hashes.get(name)}")


if __name__ == "__main__":
    main()
