"""Claims about open_clip's models, tiny and real ones, with random weights from a local file."""

import json
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import sample
import train
from clip_model import load_open_clip
from lab import evaluate
from support.cache import Pictures
from support.openclip import weights_hash
from support.pictures import fit, picture_files
from support.sheets import to_tensor
from support.tools import UserError

CAPTIONS = ("a photo of a cat", "two dogs on a beach")
TINY = "unclip-test-tiny"  # a CLIP with a vision transformer and the full vocabulary, 3 MB


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """weights_file(NAME) -> a state dict of that model on disk, as open_clip's own are."""
    folder, vision = tmp_path_factory.mktemp("clip"), {"layers": 1, "width": 32, "head_width": 16}
    config = {"embed_dim": 16, "vision_cfg": vision | {"image_size": 32, "patch_size": 8},
              "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 2}}
    (folder / f"{TINY}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{TINY}.json")

    def make(name):
        path = folder / f"{name}.pt"
        if not path.exists():
            torch.manual_seed(0)
            torch.save(open_clip.create_model(name).state_dict(), path)
        return path

    return make


def photo(side, seed=0):
    """A smooth coloured picture that is not square, as photos are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8))
    return small.resize((side * 3 // 2, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("spec, same, dim", [
    ("ViT-B-32:openai=", "ViT-B-32-quickgelu", 512), ("RN50:", "RN50", 1024),
    ("convnext_base:", "convnext_base", 512),
])
def test_pictures_and_captions_are_encoded_as_by_open_clip_itself(spec, same, dim, weights_file):
    """Its own transform of the same PIL picture, its own tokenizer, its own encode_*."""
    path = weights_file(spec.partition(":")[0])
    clip = load_open_clip(f"{spec}{path}")
    assert (clip.dim, clip.text_width, clip.text_len) == (dim, 512, 77)
    model, _, transform = open_clip.create_model_and_transforms(
        same, pretrained=str(path), weights_only=True)
    model.eval()
    picture, seen, encode = photo(256), [], clip.model.encode_image
    clip.model.encode_image = lambda x: seen.append(x) or encode(x)
    ours = clip.encode_image(to_tensor(fit(picture, clip.image_size))[None])
    off = (seen[0][0] - transform(picture)) * clip.std  # in units of pixels from 0 to 1
    assert off.abs().max() < 1e-2
    with torch.no_grad():
        theirs = model.encode_image(transform(picture)[None])
        text = model.encode_text(open_clip.get_tokenizer(same)(list(CAPTIONS)))
    assert torch.nn.functional.cosine_similarity(ours, theirs).item() > 0.999
    text_emb, _, mask = clip.encode_text(CAPTIONS)
    assert_close(text_emb, torch.nn.functional.normalize(text, dim=-1), rtol=1e-4, atol=1e-5)
    assert mask.sum(1).tolist() == [7, 7]


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
def test_a_data_sets_pictures_are_shrunk_as_open_clip_shrinks_them(kind, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 90, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.png")
    data = picture_files("folder", {tmp_path / "a.png": ["noise"]}, "train")
    half = (0.5, 0.5, 0.5)
    theirs = open_clip.image_transform(32, False, mean=half, std=half, interpolation=kind)(noise)
    looked_at = Pictures(data, SimpleNamespace(image_size=32, interpolation=kind))[0]
    assert_close(looked_at, theirs, rtol=0, atol=0.01)


def test_a_tag_is_the_same_clip_downloaded_and_from_a_file(weights_file, monkeypatch, tmp_path):
    """With its activation and colours; so a run trained by tag can be drawn from offline."""
    trained = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "quick_gelu": True}
    file, moved, tags = weights_file(TINY), tmp_path / "moved.pt", {"mine": trained}
    moved.write_bytes(file.read_bytes())
    for module in (open_clip, open_clip.factory):
        monkeypatch.setattr(module, "list_pretrained_tags_by_model", lambda name: [*tags])
        monkeypatch.setattr(module, "get_pretrained_cfg", lambda _, tag: tags.get(tag, {}))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: str(file))
    specs = (file, f"mine={moved}", "mine")
    plain, clip, downloaded = (load_open_clip(f"{TINY}:{x}") for x in specs)
    for name, value in torch.load(file).items():
        assert_close(plain.model.state_dict()[name], value, rtol=0, atol=0)
    for key in ("mean", "std"):
        assert_close(getattr(clip, key).flatten(), torch.tensor(trained[key]))
    quick = [any(isinstance(m, open_clip.transformer.QuickGELU) for m in c.model.modules())
             for c in (plain, clip, downloaded)]
    assert quick == [False, True, True]
    assert weights_hash(plain.model) == weights_hash(clip.model)
    assert plain.identity != clip.identity == downloaded.identity  # embeddings of two do not mix


@pytest.mark.parametrize("spec, words", [
    ("ViT-B-33:openai", "no model 'ViT-B-33'; close: ViT-B-32"), ("", "no model ''"),
    ("ViT-B-32", "which weights"),
    ("ViT-B-32:laion2b_s34b", "its tags: laion2b_s34b_b79k"), ("ViT-B-32:zzz", "tags: openai"),
    ("ViT-B-32:/no/such/file.pt", "'/no/such/file.pt' is neither a file nor a tag"),
    ("ViT-B-32:openai=/no/such/file.pt", "no file /no/such"),
    ("ViT-B-16-SigLIP:webli", "tokenizer"), ("ViT-L-14-CLIPA:datacomp1b", "tokenizer"),
    ("coca_ViT-B-32:laion2b_s13b_b90k", "takes its text embedding from another token"),
    ("RN50:openai", "Network is unreachable); where the model hub cannot be reached, give a local "
     "file: --clip RN50:openai=FILE"),
])
def test_an_unusable_clip_is_a_users_mistake(monkeypatch, spec, words):
    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    with pytest.raises(UserError) as info:
        load_open_clip(spec)
    assert words in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("content", [b"", b"not weights", {"logit_scale": torch.tensor(1.0)}])
def test_a_broken_weights_file_is_a_users_mistake(content, tmp_path):
    path = tmp_path / "broken.pt"
    torch.save(content, path) if isinstance(content, dict) else path.write_bytes(content)
    with pytest.raises(UserError, match="broken.pt"):
        load_open_clip(f"RN50:{path}")


def test_the_whole_path_runs_with_a_vit_b_32(weights_file, micro_run, tmp_path, capsys):
    """Train a prior and a decoder for it, draw from a caption; another CLIP is refused."""
    root, run = tmp_path / "pictures", tmp_path / "run"
    root.mkdir()
    for i in range(24):
        photo(48, i).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(CAPTIONS[i % 2])
    clip = f"ViT-B-32:{weights_file('ViT-B-32')}"
    common = ["--data", "folder", "--root", str(root), "--preset", "micro", "--out", str(run),
              "--workers", "0", "--steps", "2"]
    for stage in ("prior", "decoder"):
        assert train.main([stage, *common, "--clip", clip]) == 0
    command = ["text", "a photo of a cat", "-n", "1", "--size", "16", "--weights", str(run)]
    assert sample.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "a-photo-of-a-cat_0.png").size == (16, 16)
    assert evaluate.main(["clip", "--weights", str(run), "-n", "1"]) == 0  # of the stages' CLIP
    capsys.readouterr()
    other = f"{TINY}:{weights_file(TINY)}"
    for refused in ((sample.main, [*command, "--clip", clip.replace("-32:", "-32-quickgelu:")]),
                    (train.main, ["prior", *common[:-1], "3", "--resume", "--clip", other])):
        assert refused[0](refused[1]) == 2
        assert "embeddings of two CLIPs do not mix" in capsys.readouterr().err
