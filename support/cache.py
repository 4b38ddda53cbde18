"""CLIP's embeddings of a data set: computed once, kept on disk."""

import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support.tools import UserError, usable_cores

class Embeddings:
    """CLIP's view of a whole data set, read from disk as it is needed.

    image_emb (N, D) and, for the U different captions, text_emb (U, D) are half-precision arrays.
    Token features are kept without padding, one caption after another in text_enc (tokens, W):
    caption u owns the rows starts[u] to starts[u + 1]. Likewise picture i owns the entries
    caption_starts[i] to caption_starts[i + 1] of caption_ids, the numbers u of its captions.
    """

    ARRAYS = ("image_emb", "text_emb", "text_enc", "starts", "caption_ids", "caption_starts")

    def __init__(self, folder, text_width):
        self.folder, self.text_width = folder, text_width
        for name in self.ARRAYS:
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r"))
        self.check()

    def check(self):
        """Raise ValueError where the arrays do not fit together or hold rows that are no units."""
        counts = self.starts, self.caption_ids, self.caption_starts
        fits = (
            all(array.ndim == 1 and array.dtype.kind == "i" for array in counts)
            and self.image_emb.shape[1:] == self.text_emb.shape[1:]
            and self.text_enc.shape[1:] == (self.text_width,)
            and len(self.caption_starts) == len(self.image_emb) + 1
            and self.caption_starts[-1] == len(self.caption_ids)
            and len(self.starts) == len(self.text_emb) + 1
            and self.starts[-1] == len(self.text_enc)
            and 0 <= self.caption_ids.min() <= self.caption_ids.max() < len(self.text_emb)
            and np.all(np.diff(self.starts) > 0) and np.all(np.diff(self.caption_starts) >= 0)
        )
        if not fits:
            raise ValueError("its arrays do not fit together")

        def lengths(array):  # of about a thousand rows: enough to see zeros, NaNs and noise
            some = array[:: max(1, len(array) // 1000)].astype(np.float32)
            return np.linalg.norm(some, axis=1)

        for array in (self.image_emb, self.text_emb):
            if not np.all(np.abs(lengths(array) - 1) < 0.02):
                raise ValueError("its embeddings are not of unit norm")
        of_tokens = lengths(self.text_enc)
        if not np.all((of_tokens > 0) & np.isfinite(of_tokens)):
            raise ValueError("its token features are not all there")

    def __reduce__(self):
        """Sent to another process, the arrays are opened there again instead of being copied."""
        return Embeddings, (self.folder, self.text_width)

    def __len__(self):
        return len(self.image_emb)

    def which_captions(self, indices, rng):
        """Which of its captions, 0 for its first, each picture of `indices` gets, drawn by rng."""
        first, last = (self.caption_starts[np.asarray(indices) + k] for k in (0, 1))
        return (rng.random(len(indices)) * (last - first)).astype(int)

    def draw_captions(self, indices, rng):
        """The number of one caption for each picture of `indices`, drawn by rng."""
        first = self.caption_starts[np.asarray(indices)]
        return self.caption_ids[first + self.which_captions(indices, rng)]

    def pairs(self, indices, rng):
        """Embeddings (n, D) of pictures and of a caption each, float32: no token features."""
        text_emb = self.text_emb[self.draw_captions(indices, rng)]
        arrays = self.image_emb[np.asarray(indices)], text_emb
        return tuple(torch.from_numpy(array.astype(np.float32)) for array in arrays)

    def batch(self, indices, rng):
        """Pictures `indices`, each with one of its captions drawn by rng, as float32 tensors.

        The captions are padded to the longest of them, not to CLIP's text_len: attention over
        padding costs as much as over words and is masked out in the end.
        """
        captions = self.draw_captions(indices, rng)
        longest = int((self.starts[captions + 1] - self.starts[captions]).max())
        text_enc = np.zeros((len(indices), longest, self.text_width), np.float32)
        text_mask = np.zeros((len(indices), longest), bool)
        for row, u in enumerate(captions):
            tokens = self.text_enc[self.starts[u] : self.starts[u + 1]]
            text_enc[row, : len(tokens)], text_mask[row, : len(tokens)] = tokens, True
        image_emb, text_emb = self.image_emb[np.asarray(indices)], self.text_emb[captions]
        batch = {"image_emb": image_emb.astype(np.float32), "text_emb": text_emb.astype(np.float32)}
        batch |= {"text_enc": text_enc, "text_mask": text_mask}
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def embed(clip, data, folder, batch_size=128):
    """Embeddings of `data` under `clip`: from `folder` if they are there, else computed and kept.

    The sub-folder's name holds CLIP's identity and the data's fingerprint, so another CLIP or
    changed data can never be served old embeddings. It is written as FOLDER.part and renamed when
    whole; an interrupted pass goes on where it last wrote its progress. Results go straight to
    memory-mapped files: 118,000 COCO pictures with 5 captions each never have to fit in memory.
    Of two trainings that want the same, one computes and the other waits for it.
    """
    key = f"{clip.identity}|{data.name}|{data.fingerprint()}|{len(data)}"
    folder = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        return embed_alone(clip, data, folder, batch_size)


@contextmanager
def locked(path):
    """Only one process at a time gets in; the others wait."""
    try:
        import fcntl
    except ImportError:  # Windows: start the second training when the first has its embeddings
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a crash
        yield


def embed_alone(clip, data, folder, batch_size):
    """embed(), by the one process that is in here."""
    if folder.exists():
        try:
            return Embeddings(folder, clip.text_width)
        except (OSError, ValueError, EOFError) as e:
            print(f"note: {folder} is damaged ({e}): its embeddings are computed again")
            shutil.rmtree(folder)
    making = folder.with_name(f"{folder.name}.part")
    making.mkdir(parents=True, exist_ok=True)
    captions = [data.captions(i) for i in range(len(data))]
    unique = {c: u for u, c in enumerate(dict.fromkeys(c for cs in captions for c in cs))}
    np.save(making / "caption_ids.npy", np.array([unique[c] for cs in captions for c in cs]))
    np.save(making / "caption_starts.npy", np.cumsum([0] + [len(cs) for cs in captions]))
    embed_captions(clip, list(unique), making, batch_size)
    embed_images(clip, data, making, batch_size)
    making.rename(folder)
    try:
        return Embeddings(folder, clip.text_width)
    except ValueError as e:
        raise UserError(f"{folder}: {e}; is the CLIP broken? Its weights may hold NaNs") from e


class Progress:
    """A half-precision array that is filled row by row on disk, and how far: FILE and FILE.done.

    array: to write to. done: so many rows are written for good, by this pass or an earlier one.
    """

    def __init__(self, path, shape):
        self.path, self.count, fresh = path, path.with_suffix(".done"), True
        if path.exists() and self.count.exists():
            try:
                np.load(path, mmap_mode="r")  # "r+" would make a file longer that is cut short
                self.array, self.done = np.load(path, mmap_mode="r+"), int(self.count.read_text())
                fresh = self.array.shape != shape
            except (OSError, ValueError, EOFError):
                pass  # damaged: begin anew
        if fresh:
            self.count.unlink(missing_ok=True)
            self.array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk says so now, not by a crash later
                with open(path, "r+b") as f:
                    os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
            self.done = 0

    def save(self, done):
        """All before `done` is written: first the data, then, in one step, the number."""
        self.array.flush()
        temporary = self.count.with_suffix(".tmp")
        temporary.write_text(str(done))
        os.replace(temporary, self.count)


SAVE_EVERY = 50  # batches between two notes of an embedding pass's progress


def embed_captions(clip, captions, folder, batch_size):
    """text_emb.npy, text_enc.npy and starts.npy of a list of different captions."""
    some = (captions[k : k + 10_000] for k in range(0, len(captions), 10_000))
    ids = torch.cat([clip.tokenizer(c).int() for c in some])  # a million of 77 tokens: 0.3 GB
    starts = np.cumsum([0] + (ids.argmax(dim=1) + 1).tolist())  # end of text has the largest id
    np.save(folder / "starts.npy", starts)
    text_enc = Progress(folder / "text_enc.npy", (int(starts[-1]), clip.text_width))
    text_emb = Progress(folder / "text_emb.npy", (len(captions), clip.dim))
    # Both are filled together; text_emb's count is written last and is the one that is believed,
    # unless text_enc had to begin anew.
    done = text_emb.done if text_enc.done >= starts[text_emb.done] else 0
    first = range(done, len(captions), batch_size)
    for n, k in enumerate(tqdm(first, "CLIP: captions", disable=None)):
        emb, enc, mask = clip.encode_ids(ids[k : k + batch_size].long().to(clip.mean.device))
        text_emb.array[k : k + len(emb)] = emb.cpu().half().numpy()
        text_enc.array[starts[k] : starts[k + len(emb)]] = enc[mask].cpu().half().numpy()
        if n % SAVE_EVERY == SAVE_EVERY - 1 or k == first[-1]:
            text_enc.save(int(starts[k + len(emb)]))
            text_emb.save(k + len(emb))


def embed_images(clip, data, folder, batch_size):
    """image_emb.npy of all pictures, decoded by worker processes."""
    image_emb = Progress(folder / "image_emb.npy", (len(data), clip.dim))
    rest = range(image_emb.done, len(data))
    rest = torch.utils.data.Subset(Pictures(data, clip), rest)
    workers = min(len(rest), usable_cores(), 8)
    loader = torch.utils.data.DataLoader(rest, batch_size, num_workers=workers)
    k = image_emb.done
    for n, images in enumerate(tqdm(loader, "CLIP: images", disable=None)):
        emb = clip.encode_image(images.to(clip.mean.device)).cpu().half().numpy()
        image_emb.array[k : k + len(emb)] = emb
        k += len(emb)
        if n % SAVE_EVERY == SAVE_EVERY - 1 or k == len(data):
            image_emb.save(k)


class Pictures(torch.utils.data.Dataset):
    """A data set's pictures alone, as a CLIP wants them, for a DataLoader."""

    def __init__(self, data, clip):  # keeps no CLIP: workers need none
        self.data, self.size, self.interpolation = data, clip.image_size, clip.interpolation

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data.image(i, self.size, interpolation=self.interpolation)
