"""Claims about open_clip's models, with random weights from a local file: one of its real widths
but a single layer, others registered with open_clip at a small size."""

from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import sample
import train
from clip_model import load_open_clip
from lab import evaluate
from support.cache import decode
from support.openclip import weights_hash
from support.pictures import Pictures, fit
from support.sheets import to_tensor
from support.tools import UserError

CAPTIONS = ("a photo of a cat", "two dogs on a beach")
SMALL = {  # name: its picture tower. Both have the full vocabulary.
    "tiny-ViT": {"layers": 1, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 8},
    "tiny-RN": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "image_size": 64},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: a state dict of that model on disk, as open_clip's own are}"""
    folder, text = tmp_path_factory.mktemp("clip"), {"context_length": 12, "width": 16, "layers": 2}
    known = {name: {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text | {"heads": 2}}
             for name, vision in SMALL.items()}
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        known[name] = open_clip.get_model_config(name)
        known[name]["vision_cfg"]["layers"] = known[name]["text_cfg"]["layers"] = 1
    with pytest.MonkeyPatch.context() as m:
        m.setattr(open_clip.factory, "_MODEL_CONFIGS", open_clip.factory._MODEL_CONFIGS | known)
        for name in (*SMALL, "ViT-B-32"):
            torch.manual_seed(0)
            torch.save(open_clip.create_model(name).state_dict(), folder / f"{name}.pt")
        yield {path.stem: path for path in folder.glob("*.pt")}


def photo(side, seed=0):
    """A smooth coloured picture that is not square, as photos are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8))
    return small.resize((side * 3 // 2, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("spec, same, sizes", [
    ("ViT-B-32:openai=", "ViT-B-32-quickgelu", (512, 512, 77)),
    ("tiny-RN:", "tiny-RN", (16, 16, 12)),
])
def test_pictures_and_captions_are_encoded_as_by_open_clip_itself(spec, same, sizes, files):
    """Its own transform of the same PIL picture, its own tokenizer, its own encode_*."""
    file, picture, seen = files[spec.partition(":")[0]], photo(256), []
    clip = load_open_clip(f"{spec}{file}")
    assert (clip.dim, clip.text_width, clip.text_len) == sizes
    model, _, transform = open_clip.create_model_and_transforms(
        same, pretrained=str(file), weights_only=True)
    with torch.no_grad():
        theirs = model.eval().encode_image(transform(picture)[None])
        text = model.encode_text(open_clip.get_tokenizer(same)(list(CAPTIONS)))
    clip.model.visual.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    ours = clip.encode_image(to_tensor(fit(picture, clip.image_size))[None])
    off = (seen[0] - transform(picture)) * clip.std  # in units of pixels from 0 to 1
    assert off.abs().max() < 1e-2
    assert F.cosine_similarity(ours, theirs).item() > 0.999
    text_emb, _, mask = clip.encode_text(CAPTIONS)
    assert_close(text_emb, F.normalize(text, dim=-1), rtol=1e-4, atol=1e-5)
    assert mask.sum(1).tolist() == [7, 7]


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
def test_a_data_sets_pictures_are_shrunk_as_open_clip_shrinks_them(kind):
    noise = np.random.default_rng(0).integers(0, 256, (72, 90, 3), dtype=np.uint8)
    data, half = Pictures("noise", [(noise, ["noise"])], []), (0.5, 0.5, 0.5)
    transform = open_clip.image_transform(32, False, mean=half, std=half, interpolation=kind)
    theirs = transform(Image.fromarray(noise))
    assert_close(decode(data, 32, kind, [0])[0], theirs, rtol=0, atol=0.01)


def test_a_tag_is_the_same_clip_downloaded_and_from_a_file(files, monkeypatch, tmp_path):
    """With its activation and colours; so a run trained by tag can be drawn from offline."""
    trained = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "quick_gelu": True}
    file = files["tiny-ViT"]
    for module in (open_clip, open_clip.factory):
        monkeypatch.setattr(module, "list_pretrained_tags_by_model", lambda name: ["mine"])
        monkeypatch.setattr(module, "get_pretrained_cfg", lambda _, tag: tag and trained)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: str(file))
    specs = (file, f"mine={file}", "mine")
    plain, clip, downloaded = (load_open_clip(f"tiny-ViT:{x}") for x in specs)
    for name, value in torch.load(file).items():
        assert_close(plain.model.state_dict()[name], value, rtol=0, atol=0)
    assert_close(clip.mean.flatten(), torch.tensor(trained["mean"]))
    assert_close(clip.std.flatten(), torch.tensor(trained["std"]))
    quick = [any(isinstance(m, open_clip.transformer.QuickGELU) for m in c.model.modules())
             for c in (plain, clip, downloaded)]
    assert quick == [False, True, True]
    assert weights_hash(plain.model) == weights_hash(clip.model)
    assert plain.identity != clip.identity == downloaded.identity  # embeddings of two do not mix


@pytest.mark.parametrize("spec, words", [
    ("ViT-B-33:openai", "no model 'ViT-B-33'; close: ViT-B-32"),
    ("ViT-B-32", "which weights"),
    ("ViT-B-32:=", "which weights"),
    ("ViT-B-32:/no/such/file.pt", "'/no/such/file.pt' is neither a file nor a tag of ViT-B-32; its "
     "tags: openai, "),
    ("ViT-B-32:openai=/no/such/file.pt", "/no/such/file.pt' is not"),
    ("ViT-B-16-SigLIP:webli", "tokenizer"),
    ("coca_ViT-B-32:laion2b_s13b_b90k", "tokenizer"),
    ("RN50:openai", "Network is unreachable); where the model hub cannot be reached, give a local "
     "file: --clip RN50:openai=FILE"),
])
def test_an_unusable_clip_is_a_users_mistake(monkeypatch, spec, words):
    no_network = Mock(side_effect=OSError("Network is unreachable"))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    with pytest.raises(UserError) as info:
        load_open_clip(spec)
    assert words in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("content", [b"", b"not weights", {"logit_scale": torch.tensor(1.0)}])
def test_a_broken_weights_file_is_a_users_mistake(content, tmp_path, files):
    path = tmp_path / "broken.pt"
    torch.save(content, path) if isinstance(content, dict) else path.write_bytes(content)
    with pytest.raises(UserError, match="broken.pt"):
        load_open_clip(f"tiny-RN:{path}")


def test_the_whole_path_runs_with_a_clip_of_open_clips(files, tmp_path, capsys):
    """Train a prior and a decoder for it, draw from a caption; another CLIP is refused."""
    run = tmp_path / "run"
    for i in range(24):
        photo(48, i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(CAPTIONS[i % 2])
    common = ["--data", "folder", "--root", str(tmp_path), "--preset", "micro", "--out", str(run),
              "--workers", "0", "--steps", "2"]
    clip, other = (f"{name}:{files[name]}" for name in SMALL)
    for stage in ("prior", "decoder"):
        assert train.main([stage, *common, "--clip", clip]) == 0
    command = ["a photo of a cat", "-n", "1", "--size", "16", "--weights", str(run)]
    assert sample.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "a-photo-of-a-cat_0.png").size == (16, 16)
    assert evaluate.main(["clip", "--weights", str(run), "-n", "1"]) == 0  # of the stages' CLIP
    assert evaluate.main(["priors", "--weights", str(run), "-n", "1"]) == 2
    assert "was trained on folder, and priors asks about shapes" in capsys.readouterr().err
    capsys.readouterr()
    longer = ["prior", *common[:-1], "3", "--resume"]
    done = ["prior", *common, "--resume"]
    for main, arguments in ((sample.main, command), (train.main, longer), (train.main, done)):
        assert main([*arguments, "--clip", other]) == 2
        assert "embeddings of two CLIPs do not mix" in capsys.readouterr().err
