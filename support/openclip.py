"""Any pretrained CLIP of open_clip: by its tag, or from a local file."""

import difflib
import hashlib
import json
import logging
from pathlib import Path

import open_clip

from support.tokenizer import Tokenizer
from support.tools import UserError

def open_pretrained(spec):
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
    return model, tokenizer, f"{name}-{variant}"
