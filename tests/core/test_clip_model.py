"""Claims about the small CLIP, its loss, and what any frozen CLIP hands to the other stages."""

import math
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip import image_transform
from PIL import Image
from torch.testing import assert_close

from clip_model import FrozenClip, SmallClip, SmallClipConfig, clip_loss, freeze_small_clip
from support.openclip import weights_hash
from support.sheets import to_tensor
from support.tokenizer import Tokenizer, make_vocab

L, D, W = 12, 16, 32
CAPTIONS = ["a red circle", "a blue square above a green cross", "a star", "!", "one red star"]
SIZES = dict(dim=D, image_size=32, vision_width=8, text_width=W, text_layers=2, text_heads=2,
             context_length=L)
pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def make_small():
    torch.manual_seed(0)
    return SmallClip(SmallClipConfig(make_vocab(CAPTIONS), **SIZES))


def text_tower(model):
    return model if hasattr(model, "ln_final") else model.text


def make_clip(kind):
    """A frozen CLIP whose answers differ from one input to the next, as a fresh one's hardly do."""
    torch.manual_seed(0)
    if kind == "small":
        clip = freeze_small_clip(make_small())
    else:  # a vision transformer and the full vocabulary, in open_clip's two layouts
        vision = open_clip.CLIPVisionCfg(1, 32, head_width=16, patch_size=8, image_size=32)
        text = open_clip.CLIPTextCfg(context_length=L, width=W, heads=2, layers=2)
        clip = FrozenClip(getattr(open_clip, kind)(D, vision, text), Tokenizer(L), kind)
    tower = text_tower(clip.model)
    tower.token_embedding.weight.data.normal_()
    tower.ln_final.bias.data.normal_(std=0.2)
    for name, p in clip.model.visual.named_parameters():
        p.data.mul_(0 if "attnpool.positional" in name else 2)
    return clip


@pytest.fixture(scope="module", params=["small", "CLIP", "CustomTextCLIP"])
def clip(request):
    return make_clip(request.param)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def pictures(B):
    return torch.rand(B, 3, 32, 32) * 2 - 1


def batch_of(small, B=4):
    return {"image": pictures(B), "tokens": Tokenizer(L, small.config.vocab)(CAPTIONS[:B])}


@pytest.mark.parametrize("N, scale", [(4, 1.0), (8, 3.0), (8, 100.0)])
def test_loss_of_orthonormal_pairs_and_of_collapsed_ones(N, scale):
    rows, one = torch.eye(N, D, dtype=torch.float64), unit(D).double().expand(N, D)
    apart = torch.tensor(math.log(1 + (N - 1) * math.exp(-scale)), dtype=torch.float64)
    assert_close(clip_loss(rows, rows, scale), apart)
    assert_close(clip_loss(one, one, scale).item(), math.log(N))


def plain_loss(image_emb, text_emb, scale):
    """CLIP fig. 3, written out."""
    logits = scale * image_emb @ text_emb.T
    return (logits.logsumexp(dim=1) + logits.logsumexp(dim=0) - 2 * logits.diag()).mean() / 2


def test_small_clip_normalises_and_exponentiates_its_scale_once():
    small = make_small().eval()
    small.model.logit_scale.data.fill_(math.log(20))
    batch = batch_of(small)
    with torch.no_grad():  # exponentiated twice, it gives a loss of 1.5e5
        embs = small.model.encode_image(batch["image"]), small.model.encode_text(batch["tokens"])
        wanted = plain_loss(*(F.normalize(emb, dim=1) for emb in embs), 20.0)
        assert_close(small.loss(batch), wanted, rtol=1e-4, atol=1e-5)


def test_loss_is_its_formula_both_ways_and_in_float32_under_autocast(monkeypatch):
    """In bfloat16 the loss of this batch would be off by about a hundredth."""
    small, a, b = make_small(), unit(6, D), unit(6, D)
    for rows in ((a, b), (b, a)):
        monkeypatch.setattr(small.model, "forward", lambda *_, rows=rows: (*rows, 100.0))
        with torch.autocast("cpu", torch.bfloat16):
            loss = small.loss({"image": None, "tokens": None})
        assert_close(loss, plain_loss(a, b, 100.0))


def test_scale_is_clamped_at_100():
    small = make_small()
    for value, wanted in ((10.0, 100.0), (2.0, math.exp(2.0))):
        small.model.logit_scale.data.fill_(value)
        small.loss(SmallClip.batch(small.config, Data(), None, range(2), np.random.default_rng(0)))
        assert_close(small.model.logit_scale.data.exp(), torch.tensor(wanted))


def gradients(small, batch):
    """The training loss, and its gradients averaged over processes, as torch's DDP does it."""
    small.train()
    small.model.eval()  # without batch norm's statistics, which stay each process's own
    loss = small.loss(batch)
    loss.backward()
    if dist.is_initialized():
        for p in small.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
    return loss.detach(), [p.grad for p in small.parameters()]


def one_process(rank, world, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    small, batch = make_small(), torch.load(folder / "batch.pt")
    share = {name: x.chunk(world)[rank] for name, x in batch.items()}
    loss, grads = gradients(small, share)
    alone = small.eval().loss(batch).detach()  # validation takes no other process's rows
    torch.save((loss, grads, alone), folder / f"{rank}.pt")


@pytest.mark.parametrize("world", [1, 2])
def test_processes_together_have_the_loss_and_gradients_of_one(world, tmp_path):
    small = make_small()
    torch.save(batch := batch_of(small), tmp_path / "batch.pt")
    wanted = gradients(small, batch)
    together = torch.multiprocessing.start_processes
    together(one_process, (world, tmp_path), world, start_method="fork")
    for rank in range(world):
        *found, alone = torch.load(tmp_path / f"{rank}.pt")
        assert_close(found, list(wanted), rtol=1e-3, atol=1e-6)
        assert_close(alone, wanted[0])


class Data:
    """Pictures of one grey, which says which picture it is and where its square was taken."""

    def __len__(self):
        return 5

    def captions(self, i):
        return [CAPTIONS[i], CAPTIONS[i - 1], CAPTIONS[i - 2]]

    def image(self, i, size, place):
        return torch.full((3, size, size), i + place)


def test_a_batch_draws_all_captions_and_then_all_places():
    small, indices, rng = make_small(), [3, 0, 4], np.random.default_rng(7)
    batch = SmallClip.batch(small.config, Data(), None, indices, np.random.default_rng(7))
    captions = [Data().captions(i)[rng.integers(3)] for i in indices]
    assert_close(batch["tokens"], Tokenizer(L, small.config.vocab)(captions))
    for i, image in zip(indices, batch["image"], strict=True):
        assert_close(image, torch.full((3, 32, 32), i + rng.random()))


def test_a_fresh_clip_knows_the_words_of_its_data_and_is_later_shown_the_same_pixels():
    assert SmallClip.fresh(SIZES, Data(), None, None).config == make_small().config
    clip, x = make_clip("small"), pictures(2)
    assert_close(((x + 1) / 2 - clip.mean) / clip.std, x, rtol=0, atol=1e-6)


def test_preview_counts_how_often_the_right_caption_is_nearest(monkeypatch):
    small, emb = make_small(), torch.eye(5, D)
    batch = SmallClip.batch(small.config, Data(), None, range(5), np.random.default_rng(0))
    batches = SimpleNamespace(look=lambda: (batch, None))
    for text_emb, right in ((emb, 1.0), (emb[[0, 1, 2, 4, 3]], 0.6)):
        monkeypatch.setattr(small.model, "forward", lambda *_, t=text_emb: (emb, t, None))
        assert small.preview(batches) == ({"match_of_16": pytest.approx(right)}, None, None)


def test_embeddings_are_those_of_the_model_at_unit_norm(clip):
    x, ids = pictures(4), clip.tokenizer(CAPTIONS)
    with torch.no_grad():
        wanted = (clip.model.encode_image(((x + 1) / 2 - clip.mean) / clip.std, normalize=True),
                  clip.model.encode_text(ids, normalize=True))
    for emb, theirs in zip((clip.encode_image(x), clip.encode_text(CAPTIONS)[0]), wanted):
        assert_close(emb, theirs, rtol=0, atol=1e-5)
        assert_close(emb.norm(dim=1), torch.ones(len(emb)))
        assert emb.shape[1] == clip.dim


def test_text_mask_ends_at_the_token_that_the_pooled_embedding_is_made_of(clip):
    captions = [*CAPTIONS, "red star " * 20]
    text_emb, text_enc, text_mask = clip.encode_text(captions)
    ends = [min(len(clip.tokenizer.bpe.encode(c)) + 2, L) - 1 for c in captions]
    for row, end in zip(text_mask, ends, strict=True):
        assert row.tolist() == [True] * (end + 1) + [False] * (L - end - 1)
    assert text_enc.shape == (len(captions), clip.text_len, clip.text_width)
    pooled = text_enc[range(len(captions)), ends] @ text_tower(clip.model).text_projection
    assert_close(F.normalize(pooled, dim=-1), text_emb, rtol=0, atol=1e-5)


def test_what_follows_the_end_is_masked_and_changes_nothing_before_it(clip):
    ids = clip.tokenizer(CAPTIONS)
    text_emb, text_enc, text_mask = clip.encode_ids(ids)
    junk_emb, junk_enc, junk_mask = clip.encode_ids(
        torch.where(text_mask, ids, torch.randint(2, 8, ids.shape)))
    assert_close(junk_emb, text_emb, rtol=0, atol=1e-5)
    assert_close(junk_mask, text_mask)
    assert_close(junk_enc[text_mask], text_enc[text_mask], rtol=0, atol=1e-5)
    # The features behind it do change, which is why the mask must hide them.
    assert (junk_enc - text_enc)[~text_mask].abs().amax(1).min() > 1e-3


def test_the_clip_is_frozen_and_no_hook_stays_behind(clip):
    torch.nn.Sequential(clip).train()
    assert not any(module.training for module in clip.modules())
    assert not any(p.requires_grad for p in clip.parameters())
    outputs = clip.encode_image(pictures(2).requires_grad_()), *clip.encode_text(CAPTIONS)
    assert not any(x.requires_grad for x in outputs)
    assert not text_tower(clip.model).ln_final._forward_hooks


@pytest.mark.parametrize("side", [32, 100, 20])
@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
def test_preprocessing_is_that_of_open_clip(monkeypatch, side, kind):
    model = make_clip("CLIP").model
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": kind}
    model.visual.preprocess_cfg = settings | {"size": 32}
    clip, seen = FrozenClip(model, Tokenizer(L), "tiny"), []
    monkeypatch.setattr(model, "encode_image", lambda x: seen.append(x) or torch.ones(len(x), D))
    noise = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
    theirs = image_transform(32, is_train=False, resize_mode="shortest", **settings)
    clip.encode_image(to_tensor(picture)[None])
    # Theirs is rounded to 8 bits after resizing; compared in [0, 1].
    assert_close(seen[0][0] * clip.std, theirs(picture) * clip.std, rtol=0, atol=0.01)


def test_identity_is_that_of_the_weights_even_stored_in_half():
    small, before = make_small(), weights_hash(make_small())
    for p in small.parameters():
        p.data = p.data.half().float()
    assert weights_hash(small) == before == weights_hash(small.half())
    small.float().model.positional_embedding.data[3, 3] += 0.1
    assert weights_hash(small) != before
