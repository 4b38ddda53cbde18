"""The frozen CLIP: pictures and captions as points on one sphere (CLIP, 2103.00020; paper sec. 2).

Everything in this repository is written in CLIP's terms, and CLIP itself is never trained along.
Two kinds of CLIP stand behind one interface, `FrozenClip`:

    pretrained  any open_clip model and tag, or a local weights file, with its own preprocessing
    small       open_clip's own CLIP class, some 40 times smaller than ViT-B-32, trained here

The one idea of this file: what leaves it is always the same four things, whatever the CLIP:

    image_emb  (B, D)     unit norm: the picture's point on the sphere
    text_emb   (B, D)     unit norm: the caption's point
    text_enc   (B, L, W)  CLIP's features of each caption token, after the text tower's last norm
    text_mask  (B, L)     True up to and including the end-of-text token

CLIP's text tower is causal and was trained through the end-of-text token alone, so the features
behind that token are junk: whoever reads text_enc must read text_mask too.

Letters: B batch, D embedding, L context length, W text width.
Read next: diffusion.py; how embeddings are computed once and kept is at the end of this file.
"""

import difflib
import hashlib
import json
import logging
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import usable_cores
from data import UserError
from diffusion import at_least_float32

# --- words to numbers ------------------------------------------------------------------------


class Tokenizer:
    """CLIP's byte-pair encoding: captions -> (B, L) ids, with warnings instead of silence.

    vocab: the ids a small CLIP was trained with, ascending. Paper: all 49408. We: those seen in
    training, renumbered 2, 3, ... (0 is padding, 1 any other piece). Because: at our sizes the
    other 49 thousand embeddings would be most of the model, and none of them trained.
    """

    def __init__(self, context_length, vocab=None):
        self.bpe = open_clip.tokenizer.SimpleTokenizer(context_length=context_length)
        self.context_length = context_length
        self.vocab = None if vocab is None else np.array(vocab)

    def __call__(self, captions):
        """captions: list of B strings -> (B, L) int64: start, pieces, end, then zeros.

        Raises UserError for an empty caption. Warns where one is cut or has unknown words.
        """
        ids = torch.zeros(len(captions), self.context_length, dtype=torch.long)
        for row, caption in zip(ids, captions, strict=True):
            if not caption.strip():
                raise UserError("the caption is empty: write what the picture should show")
            pieces = self.bpe.encode(caption)
            room = self.context_length - 2  # for the start and end tokens
            if len(pieces) > room:
                dropped = self.bpe.decode(pieces[room:]).strip()
                warn(
                    f"the caption is longer than CLIP's {self.context_length} tokens; "
                    f"dropped: '{dropped}'"
                )
            pieces = [self.bpe.sot_token_id, *pieces[:room], self.bpe.eot_token_id]
            row[: len(pieces)] = torch.tensor(self.renumber(pieces, caption))
        return ids

    def renumber(self, pieces, caption):
        """49408 BPE ids -> the small CLIP's own. Ascending, so end-of-text stays the largest."""
        if self.vocab is None:
            return pieces
        places = np.searchsorted(self.vocab, pieces).clip(max=len(self.vocab) - 1)
        known = self.vocab[places] == pieces
        if not known.all():
            unknown = self.bpe.decode(np.array(pieces)[~known].tolist()).strip()
            warn(
                f"this CLIP has never seen '{unknown}' (in '{caption}'): it cannot know its meaning"
            )
        return np.where(known, places + 2, 1)


def make_vocab(captions):
    """The BPE ids of all captions with start and end of text, ascending: a small CLIP's vocab."""
    bpe = open_clip.tokenizer.SimpleTokenizer()
    ids = {bpe.sot_token_id, bpe.eot_token_id}
    for caption in set(captions):
        ids.update(bpe.encode(caption))
    return tuple(sorted(ids))


def warn(message, limit=5):
    """To stderr, and only the first few times: a data set can have thousands of long captions."""
    warn.count = getattr(warn, "count", 0) + 1
    if warn.count <= limit:
        last = " (further warnings are not shown)" if warn.count == limit else ""
        print(f"warning: {message}{last}", file=sys.stderr)


# --- a small CLIP, trained here --------------------------------------------------------------


@dataclass(frozen=True)
class SmallClipConfig:
    vocab: tuple  # BPE ids seen in training, ascending
    dim: int = 128  # D
    image_size: int = 64  # pixels
    vision_layers: tuple = (1, 1, 1, 1)  # bottleneck blocks of the four stages of CLIP's ResNet
    vision_width: int = 32
    text_width: int = 128  # W
    text_layers: int = 3
    text_heads: int = 4
    context_length: int = 32  # L. Paper: 256. We: 32. Because: our captions are short.


class SmallClip(nn.Module):
    """open_clip's CLIP at a size for a laptop: a narrow ResNet and a text transformer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        vision = open_clip.CLIPVisionCfg(
            layers=config.vision_layers, width=config.vision_width, head_width=32,
            image_size=config.image_size,
        )
        text = open_clip.CLIPTextCfg(
            context_length=config.context_length, vocab_size=len(config.vocab) + 2,
            width=config.text_width, heads=config.text_heads, layers=config.text_layers,
        )
        self.model = open_clip.CLIP(config.dim, vision, text)

    def loss(self, batch):
        """batch: image (B, 3, H, W) in [-1, 1] at CLIP's size, tokens (B, L). Returns a scalar.

        Over several processes everybody's rows are gathered first, so that to find the right
        caption is as hard as on one machine.
        """
        # open_clip's scale has been exponentiated already.
        image_emb, text_emb, scale = self.model(batch["image"], batch["tokens"])
        # Validation is one process's business: the others would not answer.
        if self.training and dist.is_initialized():
            image_emb, text_emb = all_rows(image_emb), all_rows(text_emb)
        return clip_loss(image_emb, text_emb, scale)

    def clamp(self):
        """Call after each step: CLIP keeps its temperature from running away (CLIP sec. 2.5)."""
        self.model.logit_scale.data.clamp_(max=np.log(100))


def all_rows(mine):
    """Everybody's rows (W B, D), of which mine (B, D) alone carry a gradient, W times.

    All W processes have the same loss, and each knows how its own rows move it. The gradients of
    the weights are averaged over the processes, where they should be added up: so times W.
    """
    W = dist.get_world_size()
    rows = [torch.empty_like(mine) for _ in range(W)]
    dist.all_gather(rows, mine.detach().contiguous())
    rows[dist.get_rank()] = mine.detach() + W * (mine - mine.detach())
    return torch.cat(rows)


def clip_loss(image_emb, text_emb, scale):
    """Symmetric contrastive loss (CLIP fig. 3): which caption goes with which picture, and back.

    image_emb, text_emb: (B, D) unit norm, row i of one belongs to row i of the other.
    scale: the inverse temperature itself, not its logarithm.
    """
    # Not in bfloat16: with 8 bits, a scale of 100 would leave logits right to about half a unit.
    with torch.autocast(image_emb.device.type, enabled=False):
        logits = scale * at_least_float32(image_emb) @ at_least_float32(text_emb).T  # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# --- the frozen interface --------------------------------------------------------------------


class FrozenClip(nn.Module):
    """One interface over every CLIP. Never trained, always in eval mode.

    dim D, text_width W, text_len L, image_size: sizes. identity: a string that is different for
    different weights; caches and checkpoints are keyed by it.
    """

    def __init__(self, model, tokenizer, name):
        super().__init__()
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        # Where open_clip keeps how this model wants its pictures: mean, std, size, interpolation.
        settings = model.visual.preprocess_cfg if hasattr(model.visual, "preprocess_cfg") else {}
        size = settings.get("size", model.visual.image_size)
        self.image_size = size if isinstance(size, int) else size[0]
        # Whatever is not bilinear is bicubic, as in open_clip.
        bilinear = settings.get("interpolation") == "bilinear"
        self.interpolation = "bilinear" if bilinear else "bicubic"
        for key in ("mean", "std"):
            value = torch.tensor(settings.get(key, (0.5, 0.5, 0.5))).view(3, 1, 1)
            self.register_buffer(key, value, persistent=False)
        ids = torch.zeros(1, tokenizer.context_length, dtype=torch.long)
        text_emb, text_enc, _ = self.encode_ids(ids)
        self.dim, self.text_len, self.text_width = text_emb.shape[1], *text_enc.shape[1:]
        self.identity = f"{name}:{weights_hash(model)}"

    def train(self, mode=True):
        """Frozen is frozen: stays in eval mode whatever the code around it does."""
        return super().train(False)

    @torch.no_grad()
    def encode_image(self, images):
        """images (B, 3, H, W) in [-1, 1], any size -> image_emb (B, D), unit norm."""
        images = (images + 1) / 2
        if images.shape[-1] != self.image_size or images.shape[-2] != self.image_size:
            images = F.interpolate(
                images, (self.image_size, self.image_size), mode=self.interpolation, antialias=True
            ).clamp(0, 1)
        return F.normalize(self.model.encode_image((images - self.mean) / self.std).float(), dim=-1)

    def encode_text(self, captions):
        """B captions -> text_emb (B, D) unit norm, text_enc (B, L, W), text_mask (B, L) bool."""
        return self.encode_ids(self.tokenizer(captions).to(self.mean.device))

    @torch.no_grad()
    def encode_ids(self, ids):
        """The same from token ids (B, L)."""
        # The features of every token pass through ln_final on their way to the pooled embedding;
        # a hook reads them there, in both of open_clip's layouts of a text tower.
        seen = []
        tower = self.model if hasattr(self.model, "ln_final") else self.model.text
        hook = tower.ln_final.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            text_emb = F.normalize(self.model.encode_text(ids).float(), dim=-1)
        finally:
            hook.remove()
        # End of text has the largest id, so argmax finds it.
        end = ids.argmax(dim=1, keepdim=True)
        text_mask = torch.arange(ids.shape[1], device=ids.device) <= end
        return text_emb, seen[0].float(), text_mask


def weights_hash(model):
    """Short hash of all weights: two CLIPs with the same one are the same CLIP.

    Of the weights rounded to half precision, so that a copy stored in half is still itself.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().half().numpy().tobytes())
    return digest.hexdigest()[:16]


def freeze_small_clip(small):
    """A trained SmallClip behind the frozen interface."""
    config = small.config
    return FrozenClip(small.model, Tokenizer(config.context_length, config.vocab), "small")


def load_open_clip(spec):
    """MODEL:TAG_OR_FILE, such as ViT-B-32:laion2b_s34b_b79k, or MODEL:TAG=FILE.

    The last reads a tag's weights from a local file: the file alone does not say which activation,
    mean and std they were trained with. Without a tag, open_clip takes the model's usual ones.
    """
    name, _, weights = spec.partition(":")
    if Path(weights).is_file():
        tag, file = "", weights  # MODEL:FILE
    else:
        tag, _, file = weights.partition("=")  # MODEL:TAG or MODEL:TAG=FILE
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), cutoff=0.4)
        near = ", ".join(near) or "-"
        raise UserError(f"--clip: open_clip has no model '{name}'; close: {near}; all: python -c "
                        "'import open_clip; print(open_clip.list_models())'")
    if not weights:
        raise UserError(f"--clip {name}: say which weights, as {name}:TAG or {name}:FILE")
    text = open_clip.get_model_config(name)["text_cfg"]
    if "hf_tokenizer_name" in text or "embed_cls" in text:  # SigLIP, CLIPA, CoCa, ...
        raise UserError(f"--clip {name}: its captions are not read as CLIP's are (another "
                        "tokenizer or place of the embedding); choose a plain CLIP, as ViT-B-32")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        near = difflib.get_close_matches(tag, tags, cutoff=0.4) or tags
        raise UserError(f"--clip {spec}: '{tag}' is neither a file nor a tag of {name}; "
                        f"its tags: {', '.join(near) or 'none'}")
    if file and not Path(file).is_file():
        raise UserError(f"--clip {spec}: no file {file}; check the path")
    trained = open_clip.get_pretrained_cfg(name, tag) if tag else {}  # how these weights were
    # Some tags' weights are of QuickGELU, sigmoid(1.702 x) x, though the model has GELU.
    quick = bool(trained.get("quick_gelu"))
    # Not "resize_mode", what becomes of a picture that is not square: all pictures here are, as
    # the embedding must be of the square that the decoder learns to draw.
    wanted = {k: trained[k] for k in ("mean", "std", "interpolation") if k in trained}
    logging.disable(logging.ERROR)  # open_clip logs an error of its own before it raises it
    try:
        model = open_clip.create_model(
            name, pretrained=file or tag, weights_only=True, force_preprocess_cfg=wanted,
            force_quick_gelu=quick,
        )
    except Exception as e:
        # Its first sentence: torch goes on to advise against weights_only, which stays.
        reason = (str(e) or type(e).__name__).splitlines()[0].split(". ")[0]
        raise UserError(f"--clip {spec}: cannot load these weights ({reason}); where the model hub "
                        "cannot be reached, give a local file: --clip "
                        f"{name}:{tag + '=' if tag else ''}FILE") from e
    finally:
        logging.disable(logging.NOTSET)
    # The same weights with another activation or other colours are another CLIP.
    settings = dict(model.visual.preprocess_cfg) | {"quick_gelu": quick}
    variant = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    tokenizer = Tokenizer(open_clip.get_tokenizer(name).context_length)
    return FrozenClip(model, tokenizer, f"{name}-{variant}")


# --- embeddings, computed once ---------------------------------------------------------------


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
