"""Captions as numbers: CLIP's byte-pair encoding."""

import functools
import sys

import numpy as np
import open_clip
import torch

from support.tools import UserError

byte_pairs = functools.cache(open_clip.tokenizer.SimpleTokenizer)  # once: it reads a large table


class Tokenizer:
    """CLIP's byte-pair encoding: captions -> (B, L) ids, with a warning where words are lost.

    vocab: the ids a small CLIP was trained with, ascending, renumbered here as 2, 3, ... (0 is
    padding, 1 any other piece). The paper's CLIP has all 49408; in a small one, the embeddings of
    pieces that its captions never use would be most of the weights, all untrained.
    """

    def __init__(self, context_length, vocab=None):
        self.bpe, self.context_length = byte_pairs(), context_length
        self.vocab = None if vocab is None else np.array(vocab)
        self.vocab_size = self.bpe.vocab_size if vocab is None else len(vocab) + 2

    def __call__(self, captions):
        """captions: list of B strings -> (B, L) int64: start, pieces, end, then zeros."""
        ids = torch.zeros(len(captions), self.context_length, dtype=torch.long)
        for row, caption in zip(ids, captions, strict=True):
            if not isinstance(caption, str) or not caption.strip():
                raise UserError("the caption is empty or no text: write what the picture should "
                                f"show, not {caption!r}")
            pieces = self.bpe.encode(caption)
            room = self.context_length - 2  # for the start and end tokens
            if dropped := pieces[room:]:
                warn(f"the caption is longer than CLIP's {self.context_length} tokens; "
                     f"dropped: '{self.bpe.decode(dropped).strip():.60}'")
            pieces = [self.bpe.sot_token_id, *pieces[:room], self.bpe.eot_token_id]
            if self.vocab is not None:  # renumber, ascending: end of text stays the largest
                known = np.isin(pieces, self.vocab)
                if unknown := self.bpe.decode(np.array(pieces)[~known].tolist()).strip():
                    warn(f"this CLIP never saw '{unknown:.60}' (in '{caption:.60}') and can't know "
                         "what it means")
                pieces = np.where(known, np.searchsorted(self.vocab, pieces) + 2, 1)
            row[: len(pieces)] = torch.as_tensor(pieces)
        return ids


def make_vocab(captions):
    """The BPE ids that `captions` use, with start and end of text, ascending."""
    bpe = byte_pairs()
    used = {piece for caption in set(captions) for piece in bpe.encode(caption)}
    return tuple(sorted(used | {bpe.sot_token_id, bpe.eot_token_id}))


@functools.lru_cache  # a caption that is read twice warns once
def warn(message):
    """Print the first five warnings only: a data set can have thousands of long captions."""
    warn.count = getattr(warn, "count", 0) + 1
    if warn.count <= 5:
        last = " (further warnings are not shown)" if warn.count == 5 else ""
        print(f"warning: {message}{last}", file=sys.stderr)
