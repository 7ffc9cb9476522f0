"""Scorers: how well an image fits its caption, or looks. Anything that follows the protocol :class:`Scorer` is one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.evaluation.clip import Clip
from fastinvdpo.evaluation.heads import load_head
from fastinvdpo.io import expand_path

if TYPE_CHECKING:
    from PIL.Image import Image

_REMEDY = "write KIND=PATH, as in pickscore=yuvalkirstain/PickScore_v1, or MODULE:NAME of a scorer of your own"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
AESTHETIC_CLIP = "openai/clip-vit-large-patch14"
_OPTIONS = {
    "pickscore": ("processor", "revision", "name"),
    "hps": ("processor", "revision", "name"),
    "clip": ("processor", "revision", "name"),
    "aesthetic": ("clip", "processor", "revision", "name"),
}


class Scorer(Protocol):
    """``scores = scorer(images, captions)``: float32 ``(n,)`` on the host, higher is better.

    Attributes:
        name: of the columns, letters, digits, ``_`` and ``-``. batch_size: images that are handed over at once.
        key: what the scores depend on, as plain types: scores with another key are not continued.
    """

    @property
    def name(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def key(self) -> Mapping[str, Any]: ...
    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class FunctionScorer:
    """Any function of images and captions as a :class:`Scorer`."""

    function: Callable[[Sequence[Image], Sequence[str]], Tensor | Sequence[float]]
    name: str
    batch_size: int = 32
    key: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
        return torch.as_tensor(self.function(images, captions), dtype=torch.float32)


class ClipScorer:
    """Scores that are a function of the cosine between CLIP's embeddings of image and caption.

    - ``pickscore``: ``exp(logit_scale)·cos`` (Pick-a-Pic, arXiv 2305.01569); the published scale is 100. SmPO's code
      takes the bare cosine, so that its κ of 0.16658 is 16.658 here.
    - ``hps``: ``100·cos`` (HPSv2, arXiv 2306.09341).
    - ``clip``: ``max(100·cos, 0)`` (CLIPScore, arXiv 2104.08718, with 100 in the place of 2.5).
    """

    def __init__(self, kind: str, clip: Clip, name: str, batch_size: int) -> None:
        self.name, self.batch_size = name, batch_size
        self._kind, self._clip = kind, clip
        self._scale = float(clip.logit_scale.exp()) if kind == "pickscore" else 100.0
        self.key: dict[str, Any] = {"kind": kind, **clip.key}

    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
        distinct = list(dict.fromkeys(captions))
        texts = self._clip.embed_captions(distinct)[[distinct.index(caption) for caption in captions]]
        scores = self._scale * (self._clip.embed_images(images) * texts).sum(-1)
        return (scores.clamp(min=0) if self._kind == "clip" else scores).cpu()


class AestheticScorer:
    """A head on CLIP's normalized image embedding, which does not look at the caption: LAION's aesthetic predictor."""

    def __init__(self, clip: Clip, head: str, name: str, batch_size: int) -> None:
        self.name, self.batch_size = name, batch_size
        self._clip = clip
        self._head, digest = load_head(head, clip.width)
        self._head.to(clip.device)
        self.key: dict[str, Any] = {"kind": "aesthetic", "head": digest, **clip.key}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
        scores: Tensor = self._head(self._clip.embed_images(images)).squeeze(-1)
        return scores.cpu()


def open_scorer(spec: str, *, batch_size: int = 32, device: str | torch.device = "cpu") -> Scorer:
    """The scorer that ``KIND=PATH[,option=value]...`` describes.

    ``KIND`` is ``pickscore``, ``hps``, ``clip`` or ``aesthetic``; ``PATH`` is a CLIP in transformers' format
    (directory or hub id, safetensors), for ``aesthetic`` the file of the head. HPSv2's published file is an open_clip
    state dict; it must be converted to transformers' format first.

    Options: ``name``, of the columns; ``processor``, where tokenizer and image processor lie if not beside the weights
    (for ``pickscore`` those of CLIP-H then); ``revision``, of the hub; ``clip``, the one below an ``aesthetic`` head
    (CLIP-L/14 when not given).

    Raises:
        InvalidInput: not such a description, or what it names cannot be loaded.
    """
    kind, path, options = parse_spec(spec)
    name = options.get("name", kind)
    processor, revision = options.get("processor"), options.get("revision")
    if kind == "aesthetic":
        clip = Clip(options.get("clip", AESTHETIC_CLIP), processor=processor, revision=revision, device=device)
        return AestheticScorer(clip, path, name, batch_size)
    fallback = PICKSCORE_PROCESSOR if kind == "pickscore" else None
    clip = Clip(path, processor=processor, fallback=fallback, revision=revision, device=device)
    return ClipScorer(kind, clip, name, batch_size)


def parse_spec(spec: str) -> tuple[str, str, dict[str, str]]:
    """``(kind, path, options)`` of a description for :func:`open_scorer`."""
    first, *rest = spec.split(",")
    kind, _, path = first.partition("=")
    if kind not in _OPTIONS or not path:
        remedy = f"write KIND=PATH, KIND one of {', '.join(_OPTIONS)}, as in pickscore=yuvalkirstain/PickScore_v1"
        raise invalid("scorer", spec, "describes no scorer", remedy)
    options = {}
    for entry in rest:
        option, _, value = entry.partition("=")
        if option not in _OPTIONS[kind] or not value:
            remedy = f"write option=value with one of {', '.join(_OPTIONS[kind])}"
            raise invalid("scorer", spec, f"{entry!r} is no option of {kind}", remedy)
        options[option] = value if option in ("name", "revision") else expand_path(value, "scorer")
    return kind, expand_path(path, "scorer"), options


def in_batches(scorer: Scorer, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
    """Scores of any number of images, float32 ``(n,)``, in calls of the scorer's batch size.

    Raises:
        InvalidInput: the scorer gives another number of scores than it got images, or one that is not finite.
    """
    found = [torch.empty(0)]
    for start in range(0, len(images), scorer.batch_size):
        part = images[start : start + scorer.batch_size]
        scores = scorer(part, captions[start : start + scorer.batch_size]).float().cpu()
        if scores.shape != (len(part),):
            problem = f"gives scores of shape {tuple(scores.shape)} for {len(part)} images"
            raise invalid("scorer", scorer.name, problem, "return one number for each image")
        if not scores.isfinite().all():
            remedy = "look at its weights, and at the device's number format"
            raise invalid("scorer", scorer.name, "gives scores that are not finite", remedy)
        found.append(scores)
    return torch.cat(found)


def open_scorers(
    specs: Sequence[str], *, batch_size: int = 32, device: str | torch.device | None = None
) -> list[Scorer]:
    """The scorers that ``specs`` describe, in their order.

    A spec is one of :func:`open_scorer` (``KIND=PATH``), or ``MODULE:NAME``: a
    :class:`Scorer`, or a function of images and captions, in a module that Python can import
    from here. The module is imported, so name only what you trust. ``device``: a GPU where there is one when None.

    Raises:
        InvalidInput: no spec, one that describes nothing, or two scorers of one name.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not specs:
        raise invalid("scorer", list(specs), "names no scorer", _REMEDY)
    scorers = [
        _own(spec) if _is_own(spec) else open_scorer(spec, batch_size=batch_size, device=device) for spec in specs
    ]
    return check_scorers(scorers)


def check_scorers(scorers: Sequence[Scorer]) -> list[Scorer]:
    """The scorers as a list. Raises ``InvalidInput`` for none, or two of one name, whose results would be one."""
    names = [scorer.name for scorer in scorers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        problem = f"names {', '.join(twice)} twice" if twice else "names no scorer"
        raise invalid("scorer", names, problem, "give each a name, as in clip=PATH,name=NAME")
    return list(scorers)


def _is_own(spec: str) -> bool:
    module, colon, name = spec.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _own(spec: str) -> Scorer:
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # a program installed elsewhere does not look where it is called
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise invalid("scorer", spec, f"cannot be imported ({error})", _REMEDY) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise invalid("scorer", spec, "cannot be called", "name a function of images and captions")
    own: Scorer = found if hasattr(found, "name") and hasattr(found, "batch_size") else FunctionScorer(found, name)
    return own
