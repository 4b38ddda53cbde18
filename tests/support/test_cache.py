"""Claims about embeddings that are computed once and kept in shards, with a CLIP of no weights."""

import multiprocessing
import os
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from support import cache
from support.cache import embed
from support.tokenizer import Tokenizer

D, W, L = 4, 6, 12
CAPTIONS = ["a red circle", "a blue square above a green cross", "a star", "!", "one red star"]
OWN = [[0], [1, 2, 3], [2], [0, 4], [4], [3, 1]]  # the captions of each picture, some are shared


class Clip:
    """Embeds a picture by its first pixels and a caption by its tokens, and counts both."""

    dim, text_width, image_size, interpolation, mean = D, W, 8, "bicubic", torch.zeros(1)
    tokenizer = Tokenizer(L)

    def __init__(self, identity="fake"):
        self.identity, self.asked, self.left = identity, [0, 0], 99  # pictures, captions; calls

    def count(self, kind, n):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked[kind] += n

    def encode_image(self, images):
        self.count(0, len(images))
        return F.normalize(images[:, 0, 0, :D] + 2, dim=1)

    def encode_ids(self, ids):
        self.count(1, len(ids))
        text_enc = ids[:, :, None] / 5e4 + torch.arange(1, W + 1)
        text_mask = torch.arange(L) <= ids.argmax(dim=1, keepdim=True)
        return F.normalize(text_enc[:, 1, :D] + ids[:, 2:3] / 1e3, dim=1), text_enc, text_mask


@dataclass
class Data:
    """Six pictures or less, with one to three captions each."""

    name: str = "toy"
    seed: int = 0
    n: int = 6

    def __len__(self):
        return self.n

    def image(self, i, size, interpolation="bicubic"):
        noise = torch.Generator().manual_seed(100 * self.seed + i)
        return torch.rand(3, size, size, generator=noise)

    def captions(self, i):
        return [CAPTIONS[k] for k in OWN[i]]

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
    for data, asked in ((Data(), [6, 5]), (Data(seed=1), [12, 10]), (Data("toy 2"), [18, 15]),
                        (Data(n=5), [23, 20]), (Data(), [23, 20])):
        assert len(embed(clip, data, tmp_path)) == len(data) and clip.asked == asked
    embed(another := Clip("another"), Data(), tmp_path)
    assert another.asked == [6, 5]
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
        which = (again.random(6) * [len(OWN[i]) for i in indices]).astype(int)
        drawn.add(which[1])
        captions = [data.captions(i)[k] for i, k in zip(indices, which)]
        ids = clip.tokenizer(captions)
        text_emb, text_enc, text_mask = clip.encode_ids(ids)
        longest = text_mask.sum(dim=1).max()  # no padding beyond the longest caption's
        assert_close(batch, {
            "image_emb": clip.encode_image(torch.stack([data.image(i, 8) for i in indices])),
            "text_emb": text_emb, "text_mask": text_mask[:, :longest],
            "text_ids": ids[:, :longest].int(),
            "text_enc": (text_enc * text_mask[..., None])[:, :longest],
        }, rtol=1e-3, atol=1e-3)
    assert drawn == {0, 1, 2}
    pairs, batch = stored.pairs(indices, rng), stored.batch(indices, again)
    assert_close(pairs, (batch["image_emb"], batch["text_emb"]), rtol=0, atol=0)


@pytest.mark.parametrize("calls", range(6))  # three shards of pictures, three of captions
def test_an_interrupted_pass_continues_with_the_first_missing_shard(calls, tmp_path):
    clip = Clip()
    clip.left = calls
    with pytest.raises(KeyboardInterrupt):
        embed(clip, Data(), tmp_path / "cut")
    clip.left = 99
    assert_same(embed(clip, Data(), tmp_path / "cut"), embed(Clip(), Data(), tmp_path / "whole"))
    assert clip.asked == [6, 5]  # both passes together: nothing was computed twice


@pytest.mark.parametrize("name, asked", [  # that shard alone is computed again
    ("pictures-00001", [8, 5]), ("captions-00002", [6, 6]), ("index", [6, 5])])
def test_a_file_that_is_cut_short_is_computed_again(name, asked, tmp_path):
    clip, wanted = Clip(), embed(Clip(), Data(), tmp_path / "whole")
    embed(clip, Data(), tmp_path)
    (path,) = tmp_path.glob(f"*/{name}.pt")
    path.write_bytes(path.read_bytes()[:-20])
    assert_same(embed(clip, Data(), tmp_path), wanted)
    assert clip.asked == asked


def test_two_passes_at_once_do_no_harm(tmp_path, monkeypatch):
    """Neither renames a file before both have written it."""
    both, replace = multiprocessing.get_context("fork").Barrier(2), os.replace
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda *args: (both.wait(60), replace(*args)))
        torch.multiprocessing.start_processes(
            lambda rank: embed(Clip(), Data(), tmp_path), nprocs=2, start_method="fork")
    kept = embed(clip := Clip(), Data(), tmp_path)
    assert_same(kept, embed(Clip(), Data(), tmp_path / "alone"))
    assert clip.asked == [0, 0] and len(list(kept.folder.iterdir())) == 7  # no other file


def test_worker_processes_decode_and_reopen(tmp_path, monkeypatch):
    """Decoded by workers the pictures are the same; sent to a worker, Embeddings are a path."""
    here, decode = [], cache.decode
    monkeypatch.setattr(cache, "decode", lambda *args: here.append(1) or decode(*args))
    alone = embed(Clip(), Data(), tmp_path / "alone", workers=0)
    assert here.pop() and len(here) == 2  # a job a shard
    sent = pickle.dumps(embed(Clip(), Data(), tmp_path, workers=2))
    assert len(sent) < 1000 and len(here) == 2
    assert_same(pickle.loads(sent), alone)
