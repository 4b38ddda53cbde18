"""Real open_clip models at their real sizes, with random weights from a local file: every stage."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import sample
import train
from lab import evaluate
from clip_model import load_open_clip
from support.pictures import fit
from support.sheets import to_tensor

CAPTIONS = ("a photo of a cat", "two dogs on a beach")


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """weights_file(NAME) -> a state dict of that model on disk, as open_clip's own are."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp("clip") / f"{name}.pt"
            torch.save(open_clip.create_model(name).state_dict(), made[name])
        return made[name]

    return make


def photo(side, seed=0):
    """A smooth coloured picture that is not square, as photos are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8))
    return small.resize((side * 3 // 2, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name, dim, width", [
    ("ViT-B-32-quickgelu", 512, 512), ("RN50", 1024, 512), ("convnext_base", 512, 512),
])
def test_pictures_and_captions_are_encoded_as_by_open_clip_itself(name, dim, width, weights_file):
    """Its own transform of the same PIL picture, its own tokenizer, its own encode_*."""
    clip = load_open_clip(f"{name}:{weights_file(name)}")
    assert (clip.dim, clip.text_width, clip.text_len) == (dim, width, 77)
    model, _, transform = open_clip.create_model_and_transforms(
        name, pretrained=str(weights_file(name)), weights_only=True
    )
    model.eval()
    picture = photo(256)
    seen, encode = [], clip.model.encode_image
    clip.model.encode_image = lambda x: seen.append(x) or encode(x)
    ours = clip.encode_image(to_tensor(fit(picture, clip.image_size))[None])
    off = (seen[0][0] - transform(picture)) * clip.std  # in units of pixels from 0 to 1
    assert off.abs().max() < 1e-2
    with torch.no_grad():
        theirs = model.encode_image(transform(picture)[None])
        text = model.encode_text(open_clip.get_tokenizer(name)(list(CAPTIONS)))
    assert torch.nn.functional.cosine_similarity(ours, theirs).item() > 0.999
    text_emb, _, mask = clip.encode_text(CAPTIONS)
    assert_close(text_emb, torch.nn.functional.normalize(text, dim=-1), rtol=1e-4, atol=1e-5)
    assert mask.sum(1).tolist() == [7, 7]


@pytest.mark.parametrize("tag", ["openai", "laion2b_s34b_b79k"])
def test_a_tag_is_the_same_clip_downloaded_and_from_its_file(tag, weights_file, monkeypatch):
    """So that a run that was trained by tag can be drawn from where there is no network."""
    path = str(weights_file("ViT-B-32"))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: path)
    downloaded, filed = load_open_clip(f"ViT-B-32:{tag}"), load_open_clip(f"ViT-B-32:{tag}={path}")
    assert downloaded.identity == filed.identity
    quick = [any(isinstance(m, open_clip.transformer.QuickGELU) for m in clip.model.modules())
             for clip in (downloaded, filed)]
    assert quick == [tag == "openai"] * 2


def test_the_whole_path_runs_with_a_vit_b_32(weights_file, micro_run, tmp_path, capsys):
    """Train a prior and a decoder for it, draw from a caption; another CLIP is refused."""
    root, run = tmp_path / "pictures", tmp_path / "run"
    root.mkdir()
    lines = []
    for i in range(24):
        photo(48, i).save(root / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i % 2]}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    clip = f"ViT-B-32:{weights_file('ViT-B-32')}"
    common = ["--data", "folder", "--root", str(root), "--preset", "micro", "--out", str(run),
              "--workers", "0", "--steps", "2"]
    for stage in ("prior", "decoder"):
        assert train.main([stage, *common, "--clip", clip]) == 0
    command = ["text", "a photo of a cat", "-n", "1", "--size", "16", "--weights", str(run)]
    assert sample.main([*command, "--out", str(tmp_path / "out")]) == 0
    # The CLIP's file may lie elsewhere now, but another CLIP's does not do.
    moved = tmp_path / "moved.pt"
    moved.write_bytes(weights_file("ViT-B-32").read_bytes())
    command += ["--out", str(tmp_path / "again"), "--clip"]
    assert sample.main([*command, f"ViT-B-32:{moved}"]) == 0
    assert sample.main([*command, f"ViT-B-32-quickgelu:{moved}"]) == 2
    assert Image.open(tmp_path / "out" / "a-photo-of-a-cat_0.png").size == (16, 16)
    # What CLIP itself can tell apart is asked of that CLIP, which the stages name.
    assert evaluate.main(["clip", "--weights", str(run), "-n", "1"]) == 0
    assert evaluate.main(["clip", "--weights", str(root), "-n", "1"]) == 2  # nothing trained there
    # A CLIP of another embedding size beside these checkpoints is one line, not a traceback.
    capsys.readouterr()
    other = f"RN50:{weights_file('RN50')}"
    resume = ["prior", *common[:-1], "3", "--clip", other, "--resume"]
    assert train.main(resume) == 2
    assert "embeddings of two CLIPs do not mix" in capsys.readouterr().err
