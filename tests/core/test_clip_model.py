"""Claims about the frozen CLIP: its loss, tokens, features, preprocessing, weights and caches."""

import json
import math
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip import image_transform
from PIL import Image
from torch.testing import assert_close

import clip_model
from support import cache, tokenizer
from clip_model import (
    FrozenClip, SmallClip, SmallClipConfig, clip_loss,
    freeze_small_clip, load_open_clip, weights_hash,
)
from support.cache import Embeddings, Pictures, embed
from support.pictures import load_data
from support.sheets import to_tensor
from support.tokenizer import Tokenizer, make_vocab
from support.tools import UserError

L, D, W = 12, 16, 32
CAPTIONS = [
    "a red circle",
    "a blue square above a green cross",
    "a star",
    "!",
    "one red star on gray",
]
TINY = "unclip-test-tiny"  # a CLIP with a vision transformer and the full vocabulary, 3 MB


@pytest.fixture(autouse=True)
def warnings_are_counted_afresh(same_numbers_on_one_thread, monkeypatch):
    monkeypatch.setattr(tokenizer.warn, "count", 0, raising=False)


def make_small(**changes):
    sizes = dict(dim=D, image_size=32, vision_width=8, text_width=W, text_layers=2, text_heads=2)
    return SmallClip(SmallClipConfig(make_vocab(CAPTIONS), **sizes, context_length=L, **changes))


def jitter(clip):
    """Fresh towers answer nearly the same whatever they are shown: make the answers different."""
    model = clip.model
    model.token_embedding.weight.data.normal_()
    model.ln_final.bias.data.normal_(std=0.2)
    for name, p in model.visual.named_parameters():
        p.data.mul_(0 if "attnpool.positional" in name else 2)
    return clip


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return jitter(freeze_small_clip(make_small()))


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """Registers the tiny open_clip model, and writes random weights of it to a file."""
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": D,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": L,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 2,
        },
    }
    (folder / f"{TINY}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{TINY}.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model(TINY).state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


@pytest.fixture(scope="module", params=["small", "open_clip"])
def clip(request, small, tiny_file):
    """Both kinds of CLIP, behind one interface."""
    return small if request.param == "small" else jitter(load_open_clip(f"{TINY}:{tiny_file}"))


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def pictures(B, size=32):
    return torch.rand(B, 3, size, size) * 2 - 1


# --- the contrastive loss -------------------------------------------------------------------


@pytest.mark.parametrize("N, scale", [(4, 1.0), (8, 3.0), (8, 100.0)])
def test_clip_loss_of_orthonormal_matched_pairs(N, scale):
    rows = torch.eye(N, D, dtype=torch.float64)
    wanted = torch.tensor(math.log(1 + (N - 1) * math.exp(-scale)), dtype=torch.float64)
    assert_close(clip_loss(rows, rows, scale), wanted)


def test_clip_loss_of_collapsed_embeddings_is_log_N():
    one = unit(D).expand(6, D)
    assert_close(clip_loss(one, one, 7.0), torch.tensor(math.log(6)))


def test_clip_loss_is_the_same_with_pictures_and_captions_swapped():
    image_emb, text_emb = unit(6, D), unit(6, D)
    assert_close(clip_loss(image_emb, text_emb, 5.0), clip_loss(text_emb, image_emb, 5.0))


def plain_clip_loss(image_emb, text_emb, scale):
    """CLIP fig. 3, written out."""
    logits = scale * image_emb @ text_emb.T
    right = logits.diag()
    by_image, by_text = (logits.logsumexp(dim=1) - right), (logits.logsumexp(dim=0) - right)
    return (by_image.mean() + by_text.mean()) / 2


def test_clip_loss_equals_its_formula():
    image_emb, text_emb = unit(6, D), unit(6, D)
    assert_close(clip_loss(image_emb, text_emb, 5.0), plain_clip_loss(image_emb, text_emb, 5.0))


def test_clip_loss_over_processes_is_that_of_everybodys_rows(monkeypatch):
    """So is its gradient, W times: the average over W processes makes it the sum."""
    image_emb, text_emb = unit(6, D).requires_grad_(), unit(6, D).requires_grad_()
    mine = image_emb[2:4], text_emb[2:4]  # the second of three processes
    others = iter((image_emb, text_emb))

    def all_gather(rows, sent):
        everybodys = next(others).detach().split(2)
        assert_close(sent, everybodys[1])
        for row, value in zip(rows, everybodys, strict=True):
            row.copy_(value)

    for name, answer in (("is_initialized", True), ("get_world_size", 3), ("get_rank", 1)):
        monkeypatch.setattr(clip_model.dist, name, lambda answer=answer: answer)
    monkeypatch.setattr(clip_model.dist, "all_gather", all_gather)
    model = make_small()
    monkeypatch.setattr(model.model, "forward", lambda image, tokens: (*mine, 5.0))
    batch, whole = {"image": None, "tokens": None}, plain_clip_loss(image_emb, text_emb, 5.0)
    loss = model.train().loss(batch)
    assert_close(loss, whole)
    for drawn, wanted in zip(torch.autograd.grad(loss, (image_emb, text_emb)),
                             torch.autograd.grad(whole, (image_emb, text_emb)), strict=True):
        assert_close(drawn[2:4], 3 * wanted[2:4])
    # Validation runs in one process alone: it must not wait for answers of the others.
    assert_close(model.eval().loss(batch), plain_clip_loss(*mine, 5.0))


def test_small_clip_normalises_and_exponentiates_its_scale_once():
    small = make_small().eval()
    small.model.logit_scale.data.fill_(math.log(20))
    batch = {"image": pictures(5), "tokens": Tokenizer(L, small.config.vocab)(CAPTIONS)}
    with torch.no_grad():  # seen elsewhere: exp(exp(...)) gave a loss of 1.5e5
        image_emb = small.model.encode_image(batch["image"])
        text_emb = small.model.encode_text(batch["tokens"])
        image_emb, text_emb = (x / x.norm(dim=1, keepdim=True) for x in (image_emb, text_emb))
        assert_close(
            small.loss(batch), plain_clip_loss(image_emb, text_emb, 20.0), rtol=1e-4, atol=1e-5
        )


def test_logit_scale_is_clamped_at_100():
    small = make_small()
    for value, wanted in ((10.0, 100.0), (2.0, math.exp(2.0))):
        small.model.logit_scale.data.fill_(value)
        small.clamp()
        assert_close(small.model.logit_scale.data.exp(), torch.tensor(wanted))


# --- words to numbers -----------------------------------------------------------------------


def test_tokens_are_start_pieces_end_and_zeros():
    ids = Tokenizer(77)(CAPTIONS)
    assert_close(ids, open_clip.get_tokenizer("ViT-B-32")(CAPTIONS))


def test_a_small_vocabulary_renumbers_in_order():
    vocab, full = make_vocab(CAPTIONS), Tokenizer(L)(CAPTIONS)
    ids = Tokenizer(L, vocab)(CAPTIONS)
    assert list(vocab) == sorted(set(vocab)) and vocab[-1] == 49407
    for row, (small, big) in enumerate(zip(ids, full)):
        n = len(Tokenizer(L).bpe.encode(CAPTIONS[row])) + 2
        assert small[:n].tolist() == [vocab.index(k) + 2 for k in big[:n].tolist()]
        assert small[n:].tolist() == [0] * (L - n)  # not the id of "!", which is 0 in the full one
        assert small.argmax() == n - 1 and small[n - 1] == len(vocab) + 1  # end of text


def test_an_unknown_word_becomes_1_with_a_warning(capsys):
    known, unknown = Tokenizer(L, make_vocab(CAPTIONS))(["a red star", "a red zebra"])
    assert_close(unknown[:3], known[:3])
    assert unknown[3] == 1 and unknown[4] == known[4] == known.max()
    message = capsys.readouterr().err
    assert "'zebra'" in message and "a red zebra" in message and message.count("warning") == 1


def test_known_words_give_no_warning(capsys):
    Tokenizer(L, make_vocab(CAPTIONS))(CAPTIONS)
    german = make_vocab(["zwei Hunde"])  # not even "a"
    config = replace(make_small().config, vocab=german)
    freeze_small_clip(SmallClip(config))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("vocab", [None, make_vocab(CAPTIONS)])
def test_a_caption_too_long_is_cut_with_a_warning_and_keeps_its_end(capsys, vocab):
    words = "red star " * 5 + "blue cross"
    ids = Tokenizer(L, vocab)([words])[0]
    assert_close(ids[:-1], Tokenizer(20, vocab)([words])[0, : L - 1])
    assert ids[-1] == ids.max() == (49407 if vocab is None else len(vocab) + 1)
    assert "dropped: 'blue cross'" in capsys.readouterr().err
    Tokenizer(L, vocab)(["red star " * 5])  # just fits
    assert capsys.readouterr().err == ""


def test_only_the_first_warnings_are_shown(capsys):
    Tokenizer(L, make_vocab(CAPTIONS))(["zebra"] * 50)
    message = capsys.readouterr().err
    assert message.count("zebra'") == 2 * 5 and message.count("further warnings") == 1


@pytest.mark.parametrize("caption", ["", "  ", "\n\t"])
def test_an_empty_caption_is_a_users_mistake(caption):
    with pytest.raises(UserError, match="empty"):
        Tokenizer(L)(["a star", caption])


# --- what leaves the frozen CLIP ------------------------------------------------------------


def test_embeddings_have_unit_norm(clip):
    assert_close(clip.encode_image(pictures(4)).norm(dim=1), torch.ones(4))
    assert_close(clip.encode_text(CAPTIONS)[0].norm(dim=1), torch.ones(len(CAPTIONS)))


def test_embeddings_are_those_of_the_model(clip):
    ids = clip.tokenizer(CAPTIONS)
    with torch.no_grad():
        assert_close(clip.encode_text(CAPTIONS)[0], clip.model.encode_text(ids, normalize=True))
        x = pictures(4)
        wanted = clip.model.encode_image(((x + 1) / 2 - clip.mean) / clip.std, normalize=True)
        assert_close(clip.encode_image(x), wanted, rtol=0, atol=1e-5)


def test_sizes_are_those_of_what_leaves_it(clip):
    text_emb, text_enc, text_mask = clip.encode_text(CAPTIONS)
    assert clip.encode_image(pictures(2)).shape == (2, clip.dim)
    assert text_emb.shape == (len(CAPTIONS), clip.dim)
    assert text_enc.shape == (len(CAPTIONS), clip.text_len, clip.text_width)
    assert text_mask.shape == (len(CAPTIONS), clip.text_len)


def test_text_mask_is_true_up_to_and_including_the_end(clip):
    captions = [*CAPTIONS, "red star " * 20]
    _, _, text_mask = clip.encode_text(captions)
    bpe = Tokenizer(L).bpe
    for row, caption in zip(text_mask, captions):
        n = min(len(bpe.encode(caption)) + 2, L)
        assert row.tolist() == [True] * n + [False] * (L - n)


def test_text_enc_is_what_the_pooled_embedding_is_made_of(clip):
    text_emb, text_enc, text_mask = clip.encode_text(CAPTIONS)
    end = text_enc[torch.arange(len(CAPTIONS)), text_mask.sum(dim=1) - 1]  # after the last norm
    assert_close(F.normalize(end @ clip.model.text_projection, dim=-1), text_emb, rtol=0, atol=1e-5)


def test_what_follows_the_end_is_masked_and_changes_nothing_before_it(clip):
    ids = clip.tokenizer(CAPTIONS)
    text_emb, text_enc, text_mask = clip.encode_ids(ids)
    junk = torch.where(text_mask, ids, torch.randint(2, 8, ids.shape))
    junk_emb, junk_enc, junk_mask = clip.encode_ids(junk)
    assert_close(junk_emb, text_emb, rtol=0, atol=1e-5)
    assert_close(junk_mask, text_mask)
    assert_close(junk_enc[text_mask], text_enc[text_mask], rtol=0, atol=1e-5)
    # Seen elsewhere: the features behind it do change, so the mask must hide them.
    assert (junk_enc - text_enc)[~text_mask].abs().amax(1).min() > 1e-3


def test_features_do_not_depend_on_the_batch(clip):
    together = clip.encode_text(CAPTIONS)
    for k, caption in enumerate(CAPTIONS):
        for batch, alone in zip(together, clip.encode_text([caption])):
            assert_close(batch[k], alone[0], rtol=0, atol=1e-5)


def test_no_hook_stays_behind(clip):
    clip.encode_text(CAPTIONS)
    with pytest.raises(UserError):
        clip.encode_text([""])
    assert not clip.model.ln_final._forward_hooks


def test_the_clip_is_frozen(clip):
    torch.nn.Sequential(clip).train()
    clip.train()
    assert not any(module.training for module in clip.modules())
    assert not any(p.requires_grad for p in clip.parameters())
    x = pictures(2).requires_grad_()
    assert not clip.encode_image(x).requires_grad
    assert not any(y.requires_grad for y in clip.encode_text(CAPTIONS))


# --- preprocessing --------------------------------------------------------------------------


def smooth_picture(side):
    """A picture with edges, and with soft parts."""
    noise = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("side", [32, 100, 20])
@pytest.mark.parametrize(
    "changes", [{}, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear"}]
)
def test_preprocessing_is_that_of_open_clip(monkeypatch, tiny_file, side, changes):
    model = open_clip.create_model(TINY, pretrained=str(tiny_file))
    model.visual.preprocess_cfg = settings = model.visual.preprocess_cfg | changes
    clip, seen = FrozenClip(model, Tokenizer(L), TINY), []
    monkeypatch.setattr(model, "encode_image", lambda x: seen.append(x) or torch.ones(len(x), D))
    names = ("mean", "std", "interpolation", "resize_mode")
    theirs = image_transform(settings["size"], is_train=False, **{k: settings[k] for k in names})
    picture = smooth_picture(side)
    clip.encode_image(to_tensor(picture)[None])
    # Theirs is rounded to 8 bits after resizing; compared in [0, 1].
    std = torch.tensor(settings["std"]).view(3, 1, 1)
    assert_close(seen[0][0] * std, theirs(picture) * std, rtol=0, atol=0.01)


@pytest.mark.parametrize("wanted", ["bicubic", "bilinear", "random"])
def test_pictures_of_a_data_set_are_shrunk_as_open_clip_shrinks_them(tmp_path, tiny_file, wanted):
    """From the file to the network: bilinear where the model says so, otherwise bicubic."""
    noise = np.random.default_rng(0).integers(0, 256, (72, 90, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    for k in range(2):  # of which one is for validation
        picture.save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text("noise")
    model = open_clip.create_model(TINY, pretrained=str(tiny_file))
    model.visual.preprocess_cfg = model.visual.preprocess_cfg | {"interpolation": wanted}
    clip, size = FrozenClip(model, Tokenizer(L), TINY), model.visual.preprocess_cfg["size"]
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    theirs = {kind: 2 * image_transform(size, is_train=False, interpolation=kind, **plain)(picture)
              - 1 for kind in ("bicubic", "bilinear")}
    right, wrong = ("bilinear", "bicubic")[:: 1 if wanted == "bilinear" else -1]
    data = load_data("folder", tmp_path, "train")
    looked_at = Pictures(data, clip)[0]
    assert_close(looked_at, theirs[right], rtol=0, atol=0.01)
    assert (looked_at - theirs[wrong]).abs().max() > 0.1
    emb = embed(clip, data, tmp_path / "cache").image_emb[0]
    assert_close(torch.from_numpy(emb.astype(np.float32)), clip.encode_image(looked_at[None])[0],
                 rtol=0, atol=1e-3)


def test_the_small_clip_is_shown_the_pictures_it_was_trained_on(monkeypatch, small):
    seen, x = [], pictures(2)
    monkeypatch.setattr(
        small.model, "encode_image", lambda x: seen.append(x) or torch.ones(len(x), D)
    )
    small.encode_image(x)
    assert_close(seen[0], x, rtol=0, atol=1e-6)  # SmallClip.loss is given [-1, 1]


# --- weights --------------------------------------------------------------------------------


def test_open_clip_weights_come_from_a_file(tiny_file):
    clip = load_open_clip(f"{TINY}:{tiny_file}")
    assert clip.identity.startswith(f"{TINY}-")
    for name, value in torch.load(tiny_file).items():
        assert_close(clip.model.state_dict()[name], value, rtol=0, atol=0)


def test_a_tags_activation_and_colours_go_with_its_weights_from_a_file(tiny_file, monkeypatch):
    """Else OpenAI's QuickGELU weights would run through GELU, with a warning at most."""
    trained = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "quick_gelu": True}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["mine"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"mine": trained}[tag])
    plain, clip = (load_open_clip(f"{TINY}:{tag}{tiny_file}") for tag in ("", "mine="))
    for key in ("mean", "std"):
        assert_close(getattr(clip, key).flatten(), torch.tensor(trained[key]))
    quick = [any(isinstance(m, open_clip.transformer.QuickGELU) for m in c.model.modules())
             for c in (plain, clip)]
    assert quick == [False, True]
    assert weights_hash(plain.model) == weights_hash(clip.model)
    assert plain.identity != clip.identity  # their embeddings do not mix
    with pytest.raises(UserError, match="no file /no/such"):
        load_open_clip(f"{TINY}:mine=/no/such/file.pt")
    with pytest.raises(UserError, match="'other' is neither a file nor a tag"):
        load_open_clip(f"{TINY}:other={tiny_file}")


def test_open_clip_still_says_which_tags_are_of_quick_gelu():
    assert open_clip.get_pretrained_cfg("ViT-B-32", "openai")["quick_gelu"] is True
    assert not open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k").get("quick_gelu")


@pytest.mark.parametrize("spec, words", [
    ("ViT-B-33:openai", "no model 'ViT-B-33'; close: ViT-B-32"),
    ("", "no model ''"),
    ("ViT-B-32", "which weights"),
    ("ViT-B-32:", "which weights"),
    ("ViT-B-32:laion2b_s34b", "its tags: laion2b_s34b_b79k"),
    ("ViT-B-32:zzz", "its tags: openai"),
    ("ViT-B-32:/no/such/file.pt", "/no/such/file.pt"),
    ("ViT-B-16-SigLIP:webli", "tokenizer"),
    ("ViT-L-14-CLIPA:datacomp1b", "tokenizer"),
    ("roberta-ViT-B-32:laion2b_s12b_b32k", "tokenizer"),
    ("coca_ViT-B-32:laion2b_s13b_b90k", "tokenizer"),
])
def test_an_unusable_clip_is_a_users_mistake(monkeypatch, spec, words):
    monkeypatch.setattr(
        open_clip.factory, "download_pretrained", lambda *a, **k: pytest.fail("downloads")
    )
    with pytest.raises(UserError) as info:
        load_open_clip(spec)
    assert words in str(info.value) and "\n" not in str(info.value)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    with pytest.raises(UserError, match="Network is unreachable.*RN50:openai=FILE"):
        load_open_clip("RN50:openai")


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_a_broken_weights_file_is_a_users_mistake(tiny_file, tmp_path, content):
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(UserError, match="broken.pt"):
        load_open_clip(f"{TINY}:{tmp_path / 'broken.pt'}")
    torch.save({"logit_scale": torch.tensor(1.0)}, tmp_path / "broken.pt")
    with pytest.raises(UserError, match="broken.pt"):
        load_open_clip(f"{TINY}:{tmp_path / 'broken.pt'}")


def test_weights_hash_is_that_of_the_weights():
    small = make_small()
    before = weights_hash(small)
    assert weights_hash(make_small()) != before
    for p in small.parameters():
        p.data = p.data.half().float()
    assert weights_hash(small) == before == weights_hash(small.half())
    small.float().model.positional_embedding.data[3, 3] += 0.1
    assert weights_hash(small) != before


# --- embeddings, computed once --------------------------------------------------------------


class Data:
    """Six pictures with one to three captions each, some of them shared."""

    name = "toy"

    def __init__(self, seed=0):
        self.seed, c = seed, CAPTIONS
        self.all = [[c[0]], [c[1], c[2], c[3]], [c[2]], [c[0], c[4]], [c[4]], [c[3], c[1]]]

    def __len__(self):
        return len(self.all)

    def image(self, i, size, crop=None, interpolation="bicubic"):
        torch.manual_seed(100 * self.seed + i)
        return (torch.rand(3, 1, 1) * 2 - 1).expand(3, size, size) * torch.rand(1, size, size)

    def captions(self, i):
        return self.all[i]

    def fingerprint(self):
        return f"{self.seed}"


@pytest.fixture
def passes(monkeypatch):
    """Counts the CLIP's passes over pictures and captions; loads in this process: faster here."""
    counts = {"encode_image": 0, "encode_ids": 0}
    for name in counts:
        original = getattr(FrozenClip, name)

        def counted(self, x, name=name, original=original):
            counts[name] += bool(x.any())  # not the zeros by which a new CLIP measures itself
            return original(self, x)

        monkeypatch.setattr(FrozenClip, name, counted)
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(
        torch.utils.data, "DataLoader", lambda data, batch, num_workers: loader(data, batch)
    )
    return lambda: (counts["encode_image"], counts["encode_ids"])


def test_embeddings_are_computed_once_and_kept(small, tmp_path, passes):
    first = embed(small, Data(), tmp_path, batch_size=4)
    assert passes() == (2, 2)  # 6 pictures and 5 different captions, in batches of 4
    second = embed(small, Data(), tmp_path, batch_size=4)
    assert passes() == (2, 2)
    for name in ("image_emb", "text_emb", "text_enc", "starts", "caption_ids", "caption_starts"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


def test_a_caption_too_long_is_warned_of_once(small, tmp_path, passes, capsys):
    data = Data()
    data.all = [[" ".join(["red circle"] * 40)]] * len(data)
    embed(small, data, tmp_path)
    assert capsys.readouterr().err.count("warning") == 1


def test_other_data_and_other_clips_are_computed_again(small, tmp_path, passes):
    data = Data()
    image_emb = embed(small, data, tmp_path).image_emb.copy()
    other = Data(seed=1)
    assert not np.allclose(embed(small, other, tmp_path).image_emb, image_emb, atol=1e-3)
    assert passes() == (2, 2)
    another = jitter(freeze_small_clip(make_small()))
    assert another.identity != small.identity
    assert not np.allclose(embed(another, data, tmp_path).image_emb, image_emb, atol=1e-3)
    assert passes() == (3, 3)
    data.name = "toy 2"
    embed(small, data, tmp_path)
    assert passes() == (4, 4)
    data.all.pop()
    assert len(embed(small, data, tmp_path)) == 5 and passes() == (5, 5)
    assert np.array_equal(embed(small, Data(), tmp_path).image_emb, image_emb)
    assert passes() == (5, 5)  # all of them are kept, side by side


def test_a_second_training_waits_while_the_first_computes(small, tmp_path, passes):
    embed(small, Data(), tmp_path / "other")  # to know the lock's name
    (name,) = (p.name for p in (tmp_path / "other").iterdir() if p.suffix == ".lock")
    (tmp_path / "both").mkdir()
    second = threading.Thread(target=embed, args=(small, Data(), tmp_path / "both"))
    with cache.locked(tmp_path / "both" / name):
        second.start()
        second.join(0.5)
        assert second.is_alive() and passes() == (1, 1)
    second.join(60)
    assert not second.is_alive() and passes() == (2, 2)


@pytest.mark.parametrize("broken_call", [2, 3, 4, 5])
def test_an_interrupted_pass_goes_on_where_it_was(broken_call, small, tmp_path, monkeypatch):
    """Killed at any batch: what was noted as written is not computed again, the rest is."""
    monkeypatch.setattr(cache, "SAVE_EVERY", 1)
    wanted, calls = embed(small, Data(), tmp_path / "whole", batch_size=2), []

    def breaks(self, x, original):
        calls.append(len(x))
        if len(calls) == broken_call:
            raise KeyboardInterrupt
        return original(self, x)

    with monkeypatch.context() as m:
        for name in ("encode_image", "encode_ids"):
            original = getattr(FrozenClip, name)
            m.setattr(FrozenClip, name, lambda self, x, o=original: breaks(self, x, o))
        with pytest.raises(KeyboardInterrupt):
            embed(small, Data(), tmp_path / "cut", batch_size=2)
        assert {p.suffix for p in (tmp_path / "cut").iterdir()} == {".part", ".lock"}
        done = sum(calls[:-1])
        calls[:] = [None] * 100  # never breaks again
        again = embed(small, Data(), tmp_path / "cut", batch_size=2)
    assert sum(calls[100:]) == 6 + 5 - done
    for name in Embeddings.ARRAYS:
        assert np.array_equal(getattr(again, name), getattr(wanted, name))


def cut_in_half(part):
    path = part / "text_enc.npy"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_features(part):
    (part / "text_enc.npy").unlink()


def garbage_count(part):
    (part / "text_emb.done").write_text("many")


@pytest.mark.parametrize("damage", [cut_in_half, without_features, garbage_count])
def test_an_interrupted_pass_that_was_damaged_too_is_begun_again(
    damage, small, tmp_path, monkeypatch
):
    """A memory-mapped file that is cut short would be made longer, with zeros, and believed."""
    monkeypatch.setattr(cache, "SAVE_EVERY", 1)
    wanted = embed(small, Data(), tmp_path / "whole", batch_size=2)

    def breaks(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(FrozenClip, "encode_image", breaks)
        embed(small, Data(), tmp_path / "cut", batch_size=2)
    damage(next(p for p in (tmp_path / "cut").iterdir() if p.suffix == ".part"))
    again = embed(small, Data(), tmp_path / "cut", batch_size=2)
    for name in Embeddings.ARRAYS:
        assert np.array_equal(getattr(again, name), getattr(wanted, name))


def test_a_full_disk_leaves_nothing_that_looks_finished(small, tmp_path, passes, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError):
            embed(small, Data(), tmp_path)
    assert all(p.suffix in (".part", ".lock") for p in tmp_path.iterdir())
    embed(small, Data(), tmp_path)
    assert passes() == (1, 1)


def cut_short(folder):
    path = folder / "text_enc.npy"
    path.write_bytes(path.read_bytes()[:-20])


def fewer_rows(folder):
    np.save(folder / "image_emb.npy", np.load(folder / "image_emb.npy")[:-1])


def zeros(folder):
    np.save(folder / "text_emb.npy", np.zeros_like(np.load(folder / "text_emb.npy")))


def zero_features(folder):
    np.save(folder / "text_enc.npy", np.zeros_like(np.load(folder / "text_enc.npy")))


def missing(folder):
    (folder / "starts.npy").unlink()


def empty(folder):
    (folder / "image_emb.npy").write_bytes(b"")


def changed(name, change):
    def damage(folder):
        np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))
    return damage


@pytest.mark.parametrize("damage", [
    cut_short, fewer_rows, zeros, zero_features, missing, empty,
    changed("caption_ids", lambda x: x - 1), changed("starts", lambda x: x.astype(float)),
    changed("starts", lambda x: x[[0, *range(len(x) - 2, 0, -1), -1]]),
    changed("starts", lambda x: x[0]), changed("text_emb", lambda x: np.eye(len(x), 2 * D)),
])
def test_damaged_embeddings_are_noticed_and_computed_again(damage, small, tmp_path, passes, capsys):
    wanted = embed(small, Data(), tmp_path)
    wanted = {name: np.array(getattr(wanted, name)) for name in Embeddings.ARRAYS}
    damage(next(tmp_path.iterdir()))
    again = embed(small, Data(), tmp_path)
    assert passes() == (2, 2) and "damaged" in capsys.readouterr().out
    for name, value in wanted.items():
        assert np.array_equal(getattr(again, name), value)


def test_a_batch_is_the_clips_own_answer(clip, tmp_path, passes):
    """Ragged captions come back in their rows, with zeros and False behind their end."""
    data, rng = Data(), np.random.default_rng(0)
    stored, drawn = embed(clip, data, tmp_path, batch_size=4), {i: set() for i in range(6)}
    indices = [4, 1, 3, 0, 1, 5]
    for _ in range(20):
        batch = stored.batch(indices, rng)
        assert {x.dtype for k, x in batch.items() if k != "text_mask"} == {torch.float32}
        pictures = torch.stack([data.image(i, clip.image_size) for i in indices])
        assert_close(batch["image_emb"], clip.encode_image(pictures), rtol=0, atol=1e-3)
        for row, i in enumerate(indices):
            text_emb, text_enc, text_mask = clip.encode_text(
                data.captions(i)
            )  # of all its captions
            k = (text_emb - batch["text_emb"][row]).abs().amax(dim=1).argmin().item()
            drawn[i].add(k)
            wanted = text_enc[k] * text_mask[k, :, None]
            assert_close(batch["text_emb"][row], text_emb[k], rtol=0, atol=1e-3)
            longest = batch["text_mask"].shape[1]  # padded no further than the longest caption
            assert_close(batch["text_enc"][row], wanted[:longest], rtol=0, atol=4e-3)
            assert_close(batch["text_mask"][row], text_mask[k, :longest])
            assert not text_mask[k, longest:].any()
        assert batch["text_mask"][:, -1].any()
    assert drawn == {0: {0}, 1: {0, 1, 2}, 2: set(), 3: {0, 1}, 4: {0}, 5: {0, 1}}


def test_a_batch_depends_on_its_generator_alone(small, tmp_path, passes):
    stored = embed(small, Data(), tmp_path)
    one, same, other = (
        stored.batch([1] * 20, np.random.default_rng(seed))["text_emb"] for seed in (3, 3, 4)
    )
    assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one, other)


def test_embeddings_can_be_moved_to_another_folder(small, tmp_path, passes):
    stored = embed(small, Data(), tmp_path / "here")
    (folder,) = (p for p in (tmp_path / "here").iterdir() if p.is_dir())
    shutil.copytree(folder, tmp_path / "there")
    again = Embeddings(tmp_path / "there", small.text_width)
    for name, value in again.batch([0, 1], np.random.default_rng(0)).items():
        assert_close(value, stored.batch([0, 1], np.random.default_rng(0))[name])


def test_pictures_are_loaded_at_the_clips_size_by_worker_processes(small, tmp_path):
    data = Data()
    wanted = small.encode_image(torch.stack([data.image(i, small.image_size) for i in range(6)]))
    stored = torch.from_numpy(
        embed(small, data, tmp_path, batch_size=4).image_emb.astype(np.float32)
    )
    assert_close(stored, wanted, rtol=0, atol=1e-3)
