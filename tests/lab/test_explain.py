"""Claims about the page: it shows what sample.py draws, and its numbers add up."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F

from lab import explain
from networks import Attention
from sample import Pipeline
from support.checkpoint import load_checkpoint, save_checkpoint

CAPTION, OTHER, SEED = "a red circle", "</script><b>a star & {}", 3
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def watched(untrained_run):
    pipeline = explain.Watched(untrained_run, "cpu", 64)
    return pipeline, pipeline.explain(CAPTION, SEED, 64)


def make_page(folder, out, *more):
    assert explain.main([CAPTION, "--seed", str(SEED), "--device", "cpu", "--weights", str(folder),
                         "--out", str(out), *more]) == 0
    text = out.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'id="data">(.*)</script>', text)[1])


@pytest.fixture(scope="module")
def made(untrained_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "new" / "it.html"
    return out, *make_page(untrained_run, out, "--other", OTHER)


def test_the_page_shows_to_the_bit_what_sample_py_draws(watched, made, untrained_run):
    now, column = watched[1], made[2]["columns"][0]
    drawn = Pipeline(untrained_run, "cpu", 64).draw(CAPTION, [SEED], 64, stages=True)
    assert [p.tobytes() for p in now.pictures] == [p.tobytes() for p in drawn]
    shown = [column["head"][0]["images"][0]["src"], column["decoder"][0]["images"][1]["src"][-1],
             *(it["src"] for it in column["result"][0]["images"] if "kept" in it["label"])]
    assert shown == [explain.uri(drawn[k]) for k in (-1, 0, 0)]  # PNGs


def test_the_pieces_of_a_step_give_the_next_x(watched):
    for picture, steps, _, scale in watched[1].attempts:
        for s, x in zip(steps, [s.x_t for s in steps[1:]] + [picture], strict=True):
            close(s.c1 * s.pred_x_0 + s.c2 * s.x_t + s.sigma * s.noise, x)
            cond, uncond = s.branches
            close(s.pred_x_0, (uncond + scale * (cond - uncond)).clamp(-1, 1), atol=1e-4, rtol=0)


def test_attention_rows_sum_to_one_and_give_the_layers_output(watched):
    pipeline, now = watched
    layer = next(m for m in pipeline.decoder.unet.modules() if isinstance(m, Attention))
    x, context = torch.randn(2, layer.out.in_features, 4, 4), torch.randn(2, 6, 32)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    weights = explain.attention_weights(layer, x, context, mask)  # (2, heads, 16, 6 + 16)
    pixels = layer.norm(x).flatten(2).transpose(1, 2)
    v = torch.cat([layer.context_kv(context).chunk(2, -1)[1], layer.qkv(pixels).chunk(3, -1)[2]], 1)
    y = (weights @ v.unflatten(2, (layer.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
    close(x + layer.out(y).transpose(1, 2).view_as(x), layer(x, context, mask))
    (_, maps), = now.attempts[0][2].items()  # (steps, 4 + text_len + 1, side, side)
    close(maps.sum(1), torch.ones_like(maps[:, 0]))
    assert maps[:, :4 + len(now.words)].all() and not maps[:, 4 + len(now.words):-1].any()


def test_prior_and_upsamplers_are_shown_as_they_drew(watched):
    pipeline, now = watched
    for scale, steps in now.ways.items():
        ends = F.normalize(steps[-1].pred_x_0, dim=-1)
        kept = ends[(ends @ now.text[0][0]).argmax()]
        close(Pipeline.embed(pipeline, now.text, [SEED], scale)[0], kept)
    assert list(now.ways) == [pipeline.prior.usual_scale, 1]
    low = [now.attempts[now.best][0], now.enlarged[0][2]]
    for (_, before, after), drawn in zip(now.enlarged, now.pictures[1:], strict=True):
        close(before, F.interpolate(low.pop(0), scale_factor=2, mode="bicubic"))
        assert explain.to_pil(after[0]).tobytes() == drawn.tobytes()


def test_a_page_is_one_sound_file_with_both_drawings(made):
    (_, text, data), tags, parser = made, [], HTMLParser()
    parser.handle_starttag = lambda tag, attributes: (
        tags.append(tag), pytest.fail("fetches") if {"src", "href"} & {*dict(attributes)} else 0)
    parser.handle_endtag = lambda tag: tags.remove(tag)
    parser.feed(text)
    assert {*tags} == {"meta", "input"} and text.startswith("<!DOCTYPE html>")
    assert [c["head"][0]["images"][0]["label"] for c in data["columns"]] == [CAPTION, OTHER]


def test_real_pictures_make_a_page_and_mistakes_a_line(untrained_run, tmp_path, capsys):
    for stage in ("clip", "prior", "decoder"):  # no upsamplers, and the pictures are not there
        checkpoint = load_checkpoint(untrained_run / f"{stage}.pt")
        save_checkpoint(tmp_path / f"{stage}.pt", checkpoint | {"run": {"data": "folder"}})
    column, = make_page(tmp_path, tmp_path / "page.html")[1]["columns"]
    assert "not enlarged" in str(column["upsampler"]) and "judge" not in str(column["result"])
    for arguments, says in (([" "], "caption is empty"), (["a", "--out", "a.png"], "ends in .html"),
                            (["a", "--root", "nowhere"], "nowhere: not a folder")):
        assert explain.main([*arguments, "--weights", str(tmp_path)]) == 2
        assert says in capsys.readouterr().err
