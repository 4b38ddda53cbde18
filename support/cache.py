"""CLIP's embeddings of a data set: computed once, kept on disk, read as they are needed.

They are in files of at most 4,096 pictures or different captions each, called shards:

    pictures-00000.pt   image_emb (n, D)
    captions-00000.pt   starts (n + 1,), text_emb (n, D); of all tokens text_ids and text_enc (., W)
    index.pt            starts (N + 1,), caption_ids (starts[N],): the captions of each picture

Tokens are stored without padding: caption k of a shard owns rows starts[k] to starts[k + 1] of
text_ids and text_enc. Picture i owns such a part of caption_ids, whose numbers run through all
shards. An interrupted pass continues with the first missing file; two passes at once write equal
files.
"""

import functools
import hashlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from support.captions import LATER
from support.checkpoint import save_checkpoint
from support.processes import in_workers
from support.tools import usable_cores

SHARD = 4096  # pictures or captions
read = functools.partial(torch.load, mmap=True, weights_only=True)


class Embeddings:
    """CLIP's view of a whole data set, memory-mapped: it can be larger than the memory."""

    def __init__(self, folder):
        self.folder, index = folder, read(folder / "index.pt")
        self.starts, self.caption_ids = index["starts"].numpy(), index["caption_ids"].numpy()
        self.pictures = [read(path) for path in sorted(folder.glob("pictures-*.pt"))]
        self.captions = [read(path) for path in sorted(folder.glob("captions-*.pt"))]

    def __reduce__(self):  # a worker process opens the files again: their contents are not sent
        return Embeddings, (self.folder,)

    def __len__(self):
        return len(self.starts) - 1

    def draw_captions(self, indices, rng):
        """One caption of each picture: its number among the picture's own, and among all."""
        first, last = (self.starts[np.add(indices, k)] for k in (0, 1))
        which = (rng.random(len(indices)) * (last - first)).astype(int)
        return which, self.caption_ids[first + which]

    def pairs(self, indices, rng):
        """Embeddings (n, D) of pictures, and of one caption each; no token features."""
        _, captions = self.draw_captions(indices, rng)
        return rows(self.pictures, "image_emb", indices), rows(self.captions, "text_emb", captions)

    def batch(self, indices, rng):
        """Pictures `indices`, each with one of its captions drawn by rng, as float32 tensors."""
        (_, captions), ids, tokens = self.draw_captions(indices, rng), [], []
        for shard, k in zip(*divmod(captions, SHARD)):
            start, stop = self.captions[shard]["starts"][k : k + 2].tolist()
            ids.append(self.captions[shard]["text_ids"][start:stop])
            tokens.append(self.captions[shard]["text_enc"][start:stop].float())
        lengths = torch.tensor([len(x) for x in tokens])
        # Padded to the longest caption here, not to CLIP's text_len: attention over padding costs
        # as much as over words, only to be masked out.
        return {
            "image_emb": rows(self.pictures, "image_emb", indices),
            "text_emb": rows(self.captions, "text_emb", captions),
            "text_ids": pad_sequence(ids, batch_first=True),  # (B, longest), zeros behind the end
            "text_enc": pad_sequence(tokens, batch_first=True),  # (B, longest, W)
            "text_mask": torch.arange(int(lengths.max())) < lengths[:, None],
        }


def rows(shards, name, numbers):
    """Rows `numbers`, counted through all shards, of the arrays `name`, as one float32 tensor."""
    return torch.stack([shards[u // SHARD][name][u % SHARD].float() for u in map(int, numbers)])


def embed(clip, data, folder, workers=None, batch_size=128):
    """Embeddings of `data` under `clip`: computes what `folder` lacks. Each CLIP and version of the
    data has its own sub-folder, so no embeddings are out of date."""
    workers = min(usable_cores(), 8) if workers is None else workers
    # "text_ids": what an older layout of these files lacks.
    key = f"text_ids|{clip.identity}|{data.name}|{data.fingerprint()}|{len(data)}"
    folder = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    listed = functools.cache(lambda: list_captions(data))  # only where something is missing

    index = keep(folder / "index.pt", lambda: listed()[0])
    for start in range(0, len(data), SHARD):
        keep(folder / f"pictures-{start // SHARD:05}.pt",
             lambda: embed_pictures(clip, data, start, batch_size, workers))
    for start in range(0, int(index["caption_ids"].max()) + 1, SHARD):
        keep(folder / f"captions-{start // SHARD:05}.pt",
             lambda: embed_captions(clip, listed()[1], start, batch_size))
    return Embeddings(folder)


def keep(path, compute):
    """The arrays in the file at `path`, which compute() provides if it is missing or damaged."""
    with suppress(Exception):  # a damaged file can raise nearly anything
        return read(path)
    save_checkpoint(path, compute())
    return read(path)


def list_captions(data):
    """(what index.pt holds, the list of all different captions)"""
    captions = [data.captions(i) for i in tqdm(range(len(data)), "captions", **LATER)]
    starts, number = torch.tensor([0] + [len(cs) for cs in captions]).cumsum(0), {}
    ids = torch.tensor([number.setdefault(c, len(number)) for cs in captions for c in cs])
    return {"starts": starts, "caption_ids": ids}, list(number)


def embed_captions(clip, captions, start, batch_size):
    """The shard of captions that begins with number `start`."""
    ids = clip.tokenizer(captions[start : start + SHARD])
    text_emb, text_ids, text_enc = [], [], []
    for some in tqdm(ids.split(batch_size), f"CLIP: captions from {start}", disable=None):
        emb, enc, mask = clip.encode_ids(some.to(clip.mean.device))
        text_emb.append(emb.cpu())
        text_ids.append(some[mask.cpu()].int())
        text_enc.append(enc[mask].cpu())
    starts = pad((ids.argmax(dim=1) + 1).cumsum(0), (1, 0))  # end of text has the largest id
    return {"starts": starts, "text_emb": torch.cat(text_emb).half(),
            "text_ids": torch.cat(text_ids), "text_enc": torch.cat(text_enc).half()}


def embed_pictures(clip, data, start, batch_size, workers):
    """The shard of pictures that begins with number `start`. Worker processes decode them."""
    work = functools.partial(decode, data, clip.image_size, clip.interpolation)
    jobs = torch.arange(start, min(start + SHARD, len(data))).split(batch_size)
    with in_workers(work, jobs, workers, clip.mean.device) as made:
        image_emb = [clip.encode_image(x.to(clip.mean.device)).cpu()
                     for x in tqdm(made, f"CLIP: pictures from {start}", len(jobs), disable=None)]
    return {"image_emb": torch.cat(image_emb).half()}


def decode(data, size, interpolation, indices):
    """Pictures `indices` as a CLIP wants them."""
    return torch.stack([data.image(i, size, interpolation=interpolation)
                        for i in map(int, indices)])
