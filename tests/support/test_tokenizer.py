"""Claims about captions as numbers: CLIP's byte pairs, all of them or a small vocabulary."""

import open_clip
import pytest
from torch.testing import assert_close

from support import tokenizer
from support.tokenizer import Tokenizer, make_vocab
from support.tools import UserError

L = 12
CAPTIONS = ["a red circle", "a blue square above a green cross", "a star", "!"]


@pytest.fixture(autouse=True)
def warnings_are_counted_afresh(monkeypatch):
    monkeypatch.setattr(tokenizer.warn, "count", 0, raising=False)
    tokenizer.warn.cache_clear()


def test_tokens_are_those_of_open_clip():
    assert_close(Tokenizer(77)(CAPTIONS), open_clip.get_tokenizer("ViT-B-32")(CAPTIONS))


def test_a_small_vocabulary_renumbers_in_order(capsys):
    vocab, full = make_vocab(CAPTIONS), Tokenizer(L)(CAPTIONS)
    assert list(vocab) == sorted(set(vocab)) and vocab[-1] == 49407
    for small, big in zip(Tokenizer(L, vocab)(CAPTIONS), full, strict=True):
        n = int(big.argmax()) + 1  # end of text has the largest id in both
        assert small[:n].tolist() == [vocab.index(k) + 2 for k in big[:n].tolist()]
        assert small[n:].tolist() == [0] * (L - n)  # not the id of "!", which is 0 in the full one
    assert capsys.readouterr().err == ""


def test_an_unknown_word_becomes_1_with_a_warning(capsys):
    known, unknown = Tokenizer(L, make_vocab(CAPTIONS))(["a red star", "a red zebra"])
    assert_close(unknown[:3], known[:3])
    assert unknown[3] == 1 and unknown[4] == known[4] == known.max()
    message = capsys.readouterr().err
    assert "'zebra' (in 'a red zebra')" in message and message.count("warning") == 1


@pytest.mark.parametrize("vocab", [None, make_vocab(CAPTIONS)])
def test_a_caption_too_long_is_cut_with_a_warning_and_keeps_its_end(capsys, vocab):
    words = "red star " * 5 + "blue cross"
    ids = Tokenizer(L, vocab)([words])[0]
    assert_close(ids[:-1], Tokenizer(20, vocab)([words])[0, : L - 1])
    assert ids[-1] == ids.max() == (49407 if vocab is None else len(vocab) + 1)
    assert "dropped: 'blue cross'" in capsys.readouterr().err
    Tokenizer(L, vocab)(["red star " * 5])  # just fits
    assert capsys.readouterr().err == ""


def test_only_the_first_warnings_are_shown_and_each_once(capsys):
    Tokenizer(L, make_vocab(CAPTIONS))([f"zebra {k // 2}" for k in range(50)])
    message = capsys.readouterr().err
    assert message.count("warning: ") == 5 and message.count("further warnings") == 1


@pytest.mark.parametrize("caption", ["", " \n\t"])
def test_an_empty_caption_is_a_users_mistake(caption):
    with pytest.raises(UserError, match="empty"):
        Tokenizer(L)(["a star", caption])
