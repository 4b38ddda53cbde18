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
    """What --clip says, MODEL:TAG or MODEL:FILE or MODEL:TAG=FILE -> (model, tokenizer, name).

    MODEL:TAG, such as ViT-B-32:laion2b_s34b_b79k, is downloaded. MODEL:TAG=FILE reads the same
    weights from a local file; the tag tells the activation, mean and std they were trained with,
    which a file alone does not. MODEL:FILE takes open_clip's defaults for the model.
    """
    name, tag, file = read_spec(spec)
    trained = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    # Some tags' weights were trained with QuickGELU, sigmoid(1.702 x) x, where the model has GELU.
    quick = bool(trained.get("quick_gelu"))
    # Without "resize_mode", which is about pictures that are not square: here all are, since CLIP
    # must see the very square that the decoder learns to draw.
    wanted = {k: trained[k] for k in ("mean", "std", "interpolation") if k in trained}
    logging.disable(logging.ERROR)  # open_clip logs each error before raising it
    try:
        model = open_clip.create_model(name, pretrained=file or tag, weights_only=True,
                                       force_preprocess_cfg=wanted, force_quick_gelu=quick)
    except Exception as e:
        # The first sentence alone: torch's next one advises to turn weights_only off.
        reason = (str(e) or type(e).__name__).splitlines()[0].split(". ")[0]
        raise UserError(f"--clip {spec}: cannot load these weights ({reason}); where the model hub "
                        f"cannot be reached, give a local file: --clip {name}:{tag and tag + '='}"
                        "FILE") from e
    finally:
        logging.disable(logging.NOTSET)
    # The same weights with another activation or another mean and std are another CLIP.
    settings = dict(model.visual.preprocess_cfg) | {"quick_gelu": quick}
    variant = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return model, Tokenizer(model.context_length), f"{name}-{variant}"


def read_spec(spec):
    """(model, tag, file) of such a spec; "" for a tag or file that it does not give."""
    name, _, weights = spec.partition(":")
    tag, _, file = ("", "", weights) if Path(weights).is_file() else weights.partition("=")
    if name not in open_clip.list_models():
        near = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), cutoff=0.4))
        raise UserError(f"--clip: open_clip has no model '{name}'; close: {near or '-'}; all: "
                        "python -c 'import open_clip; print(open_clip.list_models())'")
    if not tag and not file:
        raise UserError(f"--clip {name}: say which weights, as {name}:TAG or {name}:FILE")
    text = open_clip.get_model_config(name)["text_cfg"]
    if "hf_tokenizer_name" in text or "embed_cls" in text:  # SigLIP, CLIPA, CoCa, ...
        raise UserError(f"--clip {name}: it has another tokenizer than CLIP's, or takes its text "
                        "embedding from another token; choose a plain CLIP, such as ViT-B-32")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        raise UserError(f"--clip {spec}: '{tag}' is neither a file nor a tag of {name}; "
                        f"its tags: {', '.join(tags) or 'none'}")
    return name, tag, file


def weights_hash(model):
    """Short hash of all weights, rounded to half precision: a copy stored in half is the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().half().numpy().tobytes())
    return digest.hexdigest()[:16]
