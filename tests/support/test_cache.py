"""Claims about embeddings that are computed once and kept in shards, with a CLIP of no weights."""

import multiprocessing
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from support import cache
from support.cache import embed
from support.tokenizer import Tokenizer
from support.tools import UserError

D, W, L = 4, 6, 12
CAPTIONS = ["a red circle", "a blue square above a green cross", "a star", "!", "one red star"]


class Clip:
    """Embeds a picture by its first pixels and a caption by its tokens; `asked` counts both."""

    dim, text_width, image_size, interpolation, mean = D, W, 8, "bicubic", torch.zeros(1)
    tokenizer = Tokenizer(L)

    def __init__(self, identity="fake"):
        self.identity, self.asked = identity, {"pictures": 0, "captions": 0}

    def encode_image(self, images):
        self.asked["pictures"] += len(images)
        return F.normalize(images[:, 0, 0, :D] + 2, dim=1)

    def encode_ids(self, ids):
        self.asked["captions"] += len(ids)
        text_enc = ids[:, :, None] / 5e4 + torch.arange(1, W + 1)
        text_mask = torch.arange(L) <= ids.argmax(dim=1, keepdim=True)
        return F.normalize(text_enc[:, 1, :D] + ids[:, 2:3] / 1e3, dim=1), text_enc, text_mask

    def counts(self):
        return tuple(self.asked.values())


class Data:
    """Six pictures with one to three captions each, some of them shared."""

    def __init__(self, name="toy", seed=0):
        self.name, self.seed, c = name, seed, CAPTIONS
        self.all = [[c[0]], [c[1], c[2], c[3]], [c[2]], [c[0], c[4]], [c[4]], [c[3], c[1]]]

    def __len__(self):
        return len(self.all)

    def image(self, i, size, interpolation="bicubic"):
        noise = torch.Generator().manual_seed(100 * self.seed + i)
        return torch.rand(3, size, size, generator=noise)

    def captions(self, i):
        return self.all[i]

    def fingerprint(self):
        return f"{self.seed}"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """6 pictures and 5 different captions: three shards each. Loaded in this process: faster."""
    monkeypatch.setattr(cache, "SHARD", 2)
    monkeypatch.setattr(cache, "usable_cores", lambda: 0)


def assert_same(a, b):
    """All pictures and captions, to the bit."""
    a, b = (x.batch([0, 1, 2, 3, 4, 5] * 8, np.random.default_rng(0)) for x in (a, b))
    assert len(a["text_emb"].unique(dim=0)) == len(CAPTIONS)
    assert_close(a, b, rtol=0, atol=0)


def test_embeddings_are_computed_once_for_each_clip_and_data(tmp_path):
    clip = Clip()
    first = embed(clip, Data(), tmp_path)
    fewer = Data()
    fewer.all = fewer.all[:5]
    for data, counts in ((Data(), (6, 5)), (Data(seed=1), (12, 10)), (Data("toy 2"), (18, 15)),
                         (fewer, (23, 20)), (Data(), (23, 20))):
        assert len(embed(clip, data, tmp_path)) == len(data) and clip.counts() == counts
    embed(another := Clip("another"), Data(), tmp_path)
    assert another.counts() == (6, 5)
    assert_same(embed(clip, Data(), tmp_path), first)  # all of them are kept, side by side


@pytest.mark.parametrize("shard", [2, 4096])
def test_a_batch_is_the_clips_own_answer_to_captions_drawn_by_rng(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD", shard)
    clip, data, indices, drawn = Clip(), Data(), [4, 1, 3, 0, 1, 5], set()
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        stored = embed(clip, data, tmp_path, batch_size=4)
    rng, again = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(20):
        batch = stored.batch(indices, rng)
        which = (again.random(6) * [len(data.all[i]) for i in indices]).astype(int)
        drawn.add(which[1])
        captions = [data.all[i][k] for i, k in zip(indices, which, strict=True)]
        text_emb, text_enc, text_mask = clip.encode_ids(clip.tokenizer(captions))
        longest = text_mask.sum(dim=1).max()  # no padding beyond the longest caption's
        wanted = {
            "image_emb": clip.encode_image(torch.stack([data.image(i, 8) for i in indices])),
            "text_emb": text_emb, "text_mask": text_mask[:, :longest],
            "text_enc": (text_enc * text_mask[..., None])[:, :longest],
        }
        assert batch.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_close(batch[name], value, rtol=1e-3, atol=1e-3)
    assert drawn == {0, 1, 2}
    pairs = stored.pairs(indices, np.random.default_rng(5))
    batch = stored.batch(indices, np.random.default_rng(5))
    assert_close(pairs, (batch["image_emb"], batch["text_emb"]), rtol=0, atol=0)


@pytest.mark.parametrize("calls", range(6))
def test_an_interrupted_pass_continues_with_the_first_missing_shard(calls, tmp_path):
    clip, left = Clip(), iter(range(calls))

    def breaks(encode, x):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encode(x)

    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        for name in ("encode_image", "encode_ids"):
            m.setattr(clip, name, partial(breaks, getattr(clip, name)))
        embed(clip, Data(), tmp_path / "cut")
    assert_same(embed(clip, Data(), tmp_path / "cut"), embed(Clip(), Data(), tmp_path / "whole"))
    assert clip.counts() == (6, 5)  # both passes together: nothing was computed twice


def cut(length):
    return lambda path: path.write_bytes(path.read_bytes()[:length])


def changed(name, change):
    def damage(path):
        arrays = torch.load(path)
        torch.save(arrays | {name: change(arrays[name]) + 0}, path)
    return damage


@pytest.mark.parametrize("name, damage", [
    ("pictures-00001", cut(-20)), ("captions-00002", cut(0)), ("index", cut(-20)),
    ("pictures-00001", changed("image_emb", lambda x: x[:-1])),
    ("pictures-00001", changed("image_emb", lambda x: x / 0)),
    ("captions-00002", changed("text_emb", lambda x: 0.9 * x)),
    ("captions-00002", changed("text_enc", lambda x: 0 * x)),
    ("captions-00002", changed("starts", lambda x: x[1:])),
    ("index", changed("caption_ids", lambda x: x[1:])),
])
def test_a_damaged_shard_is_noticed_and_computed_again(name, damage, tmp_path, capsys):
    clip = Clip()
    wanted = embed(clip, Data(), tmp_path / "whole")
    embed(clip, Data(), tmp_path)
    (path,) = tmp_path.glob(f"*/{name}.pt")
    damage(path)
    before = sum(clip.counts())
    assert_same(embed(clip, Data(), tmp_path), wanted)
    assert sum(clip.counts()) - before == {"p": 2, "c": 1, "i": 0}[name[0]]  # that shard alone
    assert f"{path} is damaged" in capsys.readouterr().out


def test_a_clip_that_gives_no_numbers_is_refused_and_nothing_is_kept(tmp_path):
    clip = Clip()
    clip.encode_image = lambda images: torch.full((len(images), D), torch.nan)
    with pytest.raises(UserError, match="image_emb .* are CLIP's weights fine"):
        embed(clip, Data(), tmp_path)
    assert not list(tmp_path.glob("*/pictures-*"))


def test_a_full_disk_is_an_os_error_and_leaves_no_file(tmp_path, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        embed(Clip(), Data(), tmp_path)
    assert not list(tmp_path.glob("*/*"))


def test_two_passes_at_once_do_no_harm(tmp_path, monkeypatch):
    """Neither renames a shard before both have written it."""
    both, write = multiprocessing.get_context("fork").Barrier(2), Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda *args: (write(*args), both.wait(60)))
    torch.multiprocessing.start_processes(
        lambda rank: embed(Clip(), Data(), tmp_path), nprocs=2, start_method="fork")
    monkeypatch.undo()
    clip = Clip()
    assert_same(embed(clip, Data(), tmp_path, 2), embed(Clip(), Data(), tmp_path / "alone"))
    assert not list(tmp_path.glob("*/*.part"))


def test_worker_processes_decode_and_reopen(tmp_path, monkeypatch):
    """Decoded by workers the pictures are the same; sent to a worker, Embeddings are a path."""
    alone = embed(Clip(), Data(), tmp_path / "alone")
    monkeypatch.setattr(cache, "usable_cores", lambda: 2)
    stored = embed(Clip(), Data(), tmp_path)
    assert_same(stored, alone)
    sent = pickle.dumps(stored)
    assert len(sent) < 1000
    assert_same(pickle.loads(sent), stored)
