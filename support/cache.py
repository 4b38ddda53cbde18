"""CLIP's embeddings of a data set: computed once, kept on disk, read as they are needed.

They lie in files of at most 4,096 pictures or different captions each, called shards:

    pictures-00000.pt   image_emb (n, D)
    captions-00000.pt   starts (n + 1,), text_emb (n, D), text_enc (starts[n], W)
    index.pt            starts (N + 1,), caption_ids (starts[N],): the captions of each picture

Token features are kept without padding: caption k of a shard owns rows starts[k] to starts[k + 1]
of text_enc. Picture i owns such a part of caption_ids, whose numbers run through all shards.

A file is written under a temporary name and then renamed, so it is there as a whole or not at all.
An interrupted pass continues with the first file that is missing. Two passes at once do no harm:
at worst both compute the same shard, and one replaces the other's by an equal one.
"""

import functools
import hashlib
import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from support.tools import UserError, usable_cores

SHARD = 4096  # pictures or captions
read = functools.partial(torch.load, mmap=True, weights_only=True)


class Embeddings:
    """CLIP's view of a whole data set, memory-mapped: it can be larger than the memory."""

    def __init__(self, folder):
        self.folder, index = folder, read(folder / "index.pt")
        self.starts, self.caption_ids = index["starts"].numpy(), index["caption_ids"].numpy()
        self.pictures = [read(path) for path in sorted(folder.glob("pictures-*.pt"))]
        self.captions = [read(path) for path in sorted(folder.glob("captions-*.pt"))]

    def __reduce__(self):
        """In a worker process the files are opened again, instead of their contents being sent."""
        return Embeddings, (self.folder,)

    def __len__(self):
        return len(self.starts) - 1

    def which_captions(self, indices, rng):
        """For each picture of `indices`, which of its own captions rng draws: 0 is the first."""
        first, last = (self.starts[np.asarray(indices) + k] for k in (0, 1))
        return (rng.random(len(indices)) * (last - first)).astype(int)

    def draw_captions(self, indices, rng):
        """The same captions, by their numbers in caption_ids."""
        first = self.starts[np.asarray(indices)]
        return self.caption_ids[first + self.which_captions(indices, rng)]

    def pairs(self, indices, rng):
        """Embeddings (n, D) of pictures, and of one caption each; no token features."""
        captions = self.draw_captions(indices, rng)
        return rows(self.pictures, "image_emb", indices), rows(self.captions, "text_emb", captions)

    def batch(self, indices, rng):
        """Pictures `indices`, each with one of its captions drawn by rng, as float32 tensors."""
        captions, tokens = self.draw_captions(indices, rng), []
        for shard, k in zip(*divmod(captions, SHARD), strict=True):
            start, stop = self.captions[shard]["starts"][k : k + 2].tolist()
            tokens.append(self.captions[shard]["text_enc"][start:stop].float())
        lengths = torch.tensor([len(x) for x in tokens])
        # Padded to the longest caption here, not to CLIP's text_len: attention over padding costs
        # as much as over words, and is masked out in the end.
        return {
            "image_emb": rows(self.pictures, "image_emb", indices),
            "text_emb": rows(self.captions, "text_emb", captions),
            "text_enc": pad_sequence(tokens, batch_first=True),  # (B, longest, W)
            "text_mask": torch.arange(int(lengths.max())) < lengths[:, None],
        }


def rows(shards, name, numbers):
    """Rows `numbers`, counted through all shards, of the arrays `name`, as one float32 tensor."""
    return torch.stack([shards[u // SHARD][name][u % SHARD].float() for u in map(int, numbers)])


class Pictures(torch.utils.data.Dataset):
    """A data set's pictures alone, as a CLIP wants them, for a DataLoader."""

    def __init__(self, data, clip):  # without the CLIP itself: worker processes don't need it
        self.data, self.size, self.interpolation = data, clip.image_size, clip.interpolation

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data.image(i, self.size, interpolation=self.interpolation)


def embed(clip, data, folder, batch_size=128):
    """Embeddings of `data` under `clip`: what `folder` lacks is computed.

    A sub-folder each for another CLIP or changed data: they are never served old embeddings.
    """
    key = f"{clip.identity}|{data.name}|{data.fingerprint()}|{len(data)}"
    folder = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    listed = functools.cache(lambda: list_captions(data))  # only where something is missing
    index = keep(folder / "index.pt", clip, len(data), lambda: listed()[0])
    different = int(index["caption_ids"].max()) + 1
    for kind, n, compute, source in (("pictures", len(data), embed_pictures, data),
                                     ("captions", different, embed_captions, listed)):
        for k, start in enumerate(range(0, n, SHARD)):
            part = range(start, min(start + SHARD, n))
            keep(folder / f"{kind}-{k:05}.pt", clip, len(part),
                 functools.partial(compute, clip, source, part, batch_size))
    return Embeddings(folder)


def keep(path, clip, n, compute):
    """What is in the file at `path`; where that is missing or damaged, compute() and write it."""
    if path.exists():
        try:
            return check(read(path), clip, n)
        except Exception as e:  # a damaged file can raise nearly anything
            print(f"note: {path} is damaged ({e}) and computed again")
    arrays, buffer = check(compute(), clip, n), io.BytesIO()
    torch.save(arrays, buffer)  # by way of memory: on a full disk torch would raise no OSError
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_bytes(buffer.getbuffer())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return arrays


def check(arrays, clip, n):
    """The arrays of n pictures or captions, if they are what they should be; else a UserError."""
    owned = int(arrays["starts"][-1]) if "starts" in arrays else 0
    shapes = {"image_emb": (n, clip.dim), "text_emb": (n, clip.dim), "starts": (n + 1,),
              "text_enc": (owned, clip.text_width), "caption_ids": (owned,)}
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise UserError(f"{name} is of shape {tuple(array.shape)}, not {shapes[name]}")
        # Token features can take gigabytes: a look at every 50th is enough.
        every, low, high = (50, 0, math.inf) if name == "text_enc" else (1, 0.98, 1.02)
        if array.is_floating_point():
            norms = array[::every].float().norm(dim=1)
            if not ((low < norms) & (norms < high)).all():
                raise UserError(f"{name} has zeros, NaNs or wrong norms: are CLIP's weights fine?")
    return arrays


def list_captions(data):
    """(what index.pt holds, the list of all different captions)"""
    captions = [data.captions(i) for i in range(len(data))]
    number = {c: u for u, c in enumerate(dict.fromkeys(c for cs in captions for c in cs))}
    starts = torch.tensor([0] + [len(cs) for cs in captions]).cumsum(0)
    ids = torch.tensor([number[c] for cs in captions for c in cs])
    return {"starts": starts, "caption_ids": ids}, list(number)


def embed_captions(clip, listed, part, batch_size):
    """A shard of captions: numbers `part` of list_captions, which listed() gives."""
    ids = clip.tokenizer(listed()[1][part.start : part.stop])
    text_emb, text_enc = [], []
    for some in tqdm(ids.split(batch_size), f"CLIP: captions from {part.start}", disable=None):
        emb, enc, mask = clip.encode_ids(some.to(clip.mean.device))
        text_emb.append(emb.cpu())
        text_enc.append(enc[mask].cpu())
    starts = pad((ids.argmax(dim=1) + 1).cumsum(0), (1, 0))  # end of text has the largest id
    text_emb, text_enc = torch.cat(text_emb).half(), torch.cat(text_enc).half()
    return {"starts": starts, "text_emb": text_emb, "text_enc": text_enc}


def embed_pictures(clip, data, part, batch_size):
    """A shard of pictures, which worker processes decode."""
    pictures = torch.utils.data.Subset(Pictures(data, clip), part)
    loader = torch.utils.data.DataLoader(pictures, batch_size, num_workers=min(usable_cores(), 8))
    loader = tqdm(loader, f"CLIP: pictures from {part.start}", disable=None)
    image_emb = [clip.encode_image(images.to(clip.mean.device)).cpu() for images in loader]
    return {"image_emb": torch.cat(image_emb).half()}
