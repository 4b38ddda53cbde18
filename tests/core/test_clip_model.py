"""Claims about the small CLIP, its loss, and what any frozen CLIP hands to the other stages."""

import math

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip import image_transform
from PIL import Image
from torch.testing import assert_close

from clip_model import (
    FrozenClip, SmallClip, SmallClipConfig, clip_loss, freeze_small_clip, varied,
)
from helpers import FakeBatches, pictures, unit
from support.openclip import weights_hash
from support.pictures import Pictures
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


def batch_of(small, which=(0, 1, 2, 3, 4)):
    """Five pictures, or as many as `which` has captions of theirs."""
    which = torch.tensor(which)
    return {"image": pictures(5, 32)[:len(which)], "which": which, "number": 7 * which,
            "tokens": Tokenizer(L, small.config.vocab)(CAPTIONS)}


@pytest.mark.parametrize("N, scale", [(4, 1.0), (8, 3.0), (8, 100.0)])
def test_loss_of_orthonormal_pairs_and_of_collapsed_ones(N, scale):
    rows, one = torch.eye(N, D, dtype=torch.float64), unit(D).double().expand(N, D)
    apart = torch.tensor(math.log(1 + (N - 1) * math.exp(-scale)), dtype=torch.float64)
    assert_close(clip_loss(rows, rows, scale), apart)
    assert_close(clip_loss(one, one, scale).item(), math.log(N))


def plain_loss(image_emb, text_emb, scale):
    """CLIP fig. 3, written out."""
    logits = scale * image_emb @ text_emb.T
    both = logits.logsumexp(dim=1) + logits.logsumexp(dim=0) - 2 * logits.diag()
    return both.mean() / 2


def test_small_clip_normalises_exponentiates_its_scale_once_and_clamps_it_at_100():
    small, batch = make_small().eval(), batch_of(make_small())
    with torch.no_grad():  # exponentiated twice, it gives a loss of 1.5e5
        embs = small.model.encode_image(batch["image"]), small.model.encode_text(batch["tokens"])
        for value, scale in ((math.log(20), 20.0), (10.0, 100.0)):
            small.model.logit_scale.data.fill_(value)
            wanted = plain_loss(*(F.normalize(emb, dim=1) for emb in embs), scale)
            assert_close(small.loss(batch), wanted, rtol=1e-4, atol=1e-4)
    assert_close(small.model.logit_scale.exp().item(), 100.0)


def test_loss_is_its_formula_both_ways_and_in_float32_under_autocast(monkeypatch):
    small, a, b = make_small(), unit(6, D), unit(6, D)
    for rows in ((a, b), (b, a)):
        monkeypatch.setattr(small, "embed", lambda *_, rows=rows: (*rows, 100.0))
        with torch.autocast("cpu", torch.bfloat16):
            loss = small.loss({"number": torch.arange(6)})
        assert_close(loss, plain_loss(a, b, 100.0))


def test_equal_captions_are_not_each_others_negatives():
    """Against the same sums, each over the row itself and the rows with other captions."""
    a, b, which = unit(5, D), unit(5, D), torch.tensor([0, 1, 0, 2, 1])
    allowed = (which[:, None] != which) | torch.eye(5, dtype=torch.bool)
    weights = torch.where(allowed, (9.0 * a @ b.T).exp(), 0)
    wanted = (weights.sum(0).log() + weights.sum(1).log() - 2 * weights.diag().log()).mean() / 2
    assert_close(clip_loss(a, b, 9.0, which), wanted)
    assert clip_loss(a, b, 9.0, torch.zeros(5)) == 0  # nothing to tell apart


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
    share = {k: x if k == "tokens" else x.chunk(world)[rank] for k, x in batch.items()}
    loss, grads = gradients(small, share)
    alone = small.eval().loss(batch).detach()  # validation takes no other process's rows
    torch.save((loss, grads, alone), folder / f"{rank}.pt")


@pytest.mark.parametrize("world", [1, 2])
def test_processes_together_have_the_loss_and_gradients_of_one(world, tmp_path):
    small, batch = make_small(), batch_of(make_small(), (0, 1, 2, 0))  # equal in two processes
    torch.save(batch, tmp_path / "batch.pt")
    wanted = gradients(small, batch)
    start = torch.multiprocessing.start_processes
    start(one_process, (world, tmp_path), world, start_method="fork")
    for rank in range(world):
        *found, alone = torch.load(tmp_path / f"{rank}.pt")
        assert_close(found, list(wanted), rtol=1e-3, atol=1e-6)
        assert_close(alone, wanted[0])


class Data(list):
    """Pictures of one grey, which says which picture it is."""

    photographs = False

    def captions(self, i):
        return [CAPTIONS[i], CAPTIONS[i - 1], CAPTIONS[i - 2]]

    def image(self, i, size):
        return torch.full((3, size, size), float(i))


def test_a_batch_takes_the_same_of_each_pictures_captions_and_every_one_in_turn():
    small, data, indices, taken = make_small(), Data(range(5)), [3, 0, 4], set()
    tokens = [Tokenizer(L, small.config.vocab)([data.captions(i)[k] for i in indices])
              for k in range(3)]
    for seed in range(20):
        batch = SmallClip.batch(small.config, data, None, indices, np.random.default_rng(seed))
        found = batch["tokens"][batch["which"]]
        taken |= {k for k in range(3) if torch.equal(found, tokens[k])}
        assert any(torch.equal(found, t) for t in tokens)
    assert taken == {0, 1, 2}
    for i, image in zip(indices, batch["image"], strict=True):
        assert_close(image, torch.full((3, 32, 32), float(i)))
    # A fresh CLIP knows the words of its data.
    assert SmallClip.fresh(SIZES, data, None, None).config == small.config


def test_preview_counts_how_often_the_right_caption_is_nearest(monkeypatch):
    small, emb, batches = make_small(), torch.eye(5, D), FakeBatches(batch_of(make_small()))
    for text_emb, right in ((emb, 1.0), (emb[[0, 1, 2, 4, 3]], 0.6)):
        monkeypatch.setattr(small.model, "forward", lambda *_, t=text_emb: (emb, t, None))
        assert small.preview(batches) == ({"match_of_16": pytest.approx(right)}, None, None)
    twins = FakeBatches(batch_of(small, (0, 1, 2, 3, 3)))  # the last two have the same caption
    monkeypatch.setattr(small.model, "forward", lambda *_: (emb[[0, 1, 2, 3, 3]], emb, None))
    assert small.preview(twins)[0] == {"match_of_16": 1.0}


def test_embeddings_are_those_of_the_model_at_unit_norm(clip):
    x, ids = pictures(4, 32), clip.tokenizer(CAPTIONS)
    with torch.no_grad():
        wanted = (clip.model.encode_image(((x + 1) / 2 - clip.mean) / clip.std, normalize=True),
                  clip.model.encode_text(ids, normalize=True))
    for emb, theirs in zip((clip.encode_image(x), clip.encode_text(CAPTIONS)[0]), wanted):
        assert_close(emb, theirs, rtol=0, atol=1e-5)
        assert emb.shape[1] == clip.dim


def test_mask_goes_to_the_end_of_text_whose_features_make_the_pooled_embedding(clip):
    captions = [*CAPTIONS, "red star " * 20]
    text_emb, text_enc, text_mask = clip.encode_text(captions)
    for row, caption in zip(text_mask, captions, strict=True):
        n = min(len(clip.tokenizer.bpe.encode(caption)) + 2, L)
        assert row.tolist() == [True] * n + [False] * (L - n)
    assert text_enc.shape == (len(captions), clip.text_len, clip.text_width)
    end = text_enc[torch.arange(len(captions)), text_mask.sum(dim=1) - 1]
    pooled = F.normalize(end @ text_tower(clip.model).text_projection, dim=-1)
    assert_close(pooled, text_emb, rtol=0, atol=1e-5)


def test_what_follows_the_end_is_masked_and_changes_nothing_before_it(clip):
    ids = clip.tokenizer(CAPTIONS)
    text_emb, text_enc, text_mask = clip.encode_ids(ids)
    junk = torch.where(text_mask, ids, torch.randint(2, 8, ids.shape))
    junk_emb, junk_enc, junk_mask = clip.encode_ids(junk)
    assert_close((junk_emb, junk_mask), (text_emb, text_mask), rtol=0, atol=1e-5)
    assert_close(junk_enc[text_mask], text_enc[text_mask], rtol=0, atol=1e-5)
    # The features behind it do change, which is why the mask must hide them.
    assert (junk_enc - text_enc)[~text_mask].abs().amax(1).min() > 1e-3


def test_the_clip_is_frozen_and_no_hook_stays_behind(clip):
    torch.nn.Sequential(clip).train()
    assert not any(module.training for module in clip.modules())
    assert not any(p.requires_grad for p in clip.parameters())
    outputs = clip.encode_image(pictures(2, 32).requires_grad_()), *clip.encode_text(CAPTIONS)
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
    # Without settings the range stays [-1, 1], on which the small CLIP is trained.
    small, x = make_clip("small"), pictures(2, 32)
    assert_close(((x + 1) / 2 - small.mean) / small.std, x, rtol=0, atol=1e-6)


def test_identity_is_that_of_the_weights_even_stored_in_half():
    small, before = make_small(), weights_hash(make_small())
    assert before == weights_hash(small.half()) == weights_hash(small.float())
    small.model.positional_embedding.data[3, 3] += 0.1
    assert weights_hash(small) != before


def test_photographs_vary_in_place_and_scale_and_side_unless_the_caption_says_left():
    """A ramp from left to right: its ends and its slope say which window was taken."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    data = Pictures("ramp", [(np.dstack([ramp] * 3), ["a ramp"])], [])
    seen = {}
    for caption in ("a ramp", "dark on the left"):
        rng = np.random.default_rng(0)
        rows = [varied(data, 0, 56, caption, rng)[0, 28] for _ in range(100)]
        widths = torch.stack([(row[-1] - row[0]) / 2 * 256 / 255 * 56 / 55 for row in rows])
        seen[caption] = (widths < 0).sum().item()
        assert 3 / 4 - 0.01 < widths.abs().min() < 0.79 and 0.97 < widths.abs().max() < 1.01
    assert 30 < seen["a ramp"] < 70 and seen["dark on the left"] == 0
