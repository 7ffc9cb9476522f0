"""Scorers: how well an image fits its caption, or looks. Anything that follows the protocol :class:`Scorer` is one."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import InvalidInput, MissingExtra, invalid
from fastinvdpo.io import Digests, expand_path
from fastinvdpo.models.checkpoints import check_loaded

PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
AESTHETIC_CLIP = "openai/clip-vit-large-patch14"
_OPTIONS = {
    **dict.fromkeys(("pickscore", "hps", "clip"), ("processor", "revision", "name")),
    "aesthetic": ("clip", "processor", "revision", "name"),
}
_OWN = re.compile(r"([\w.]+):(\w+)")
_PROCESSOR_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("preprocessor_config.json", "processor_config.json"),
)
# christophschuhmann/improved-aesthetic-predictor: five linear layers in an nn.Sequential, of widths 1024, 128, 64, 16
# and 1, with dropout after the first three and no activation between them.
_HEAD_LAYERS = (0, 2, 4, 6, 7)
_REMEDY = "write KIND=PATH, as in pickscore=yuvalkirstain/PickScore_v1, or MODULE:NAME of a scorer of your own"
_CLIP_REMEDY = "give a directory in transformers' format or the id of a hub repository that holds safetensors files"
_HEAD_REMEDY = "give the published head, or a linear one (weight, bias), as .safetensors"


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
    """Scores that follow from the embeddings of a ``CLIPModel`` of transformers, in float32, the same in any batch.

    - ``pickscore``: ``exp(logit_scale)·cos`` of image and caption (Pick-a-Pic, arXiv 2305.01569); the published scale
      is 100. SmPO's code takes the bare cosine, so that its κ of 0.16658 is 16.658 here.
    - ``hps``: ``100·cos`` (HPSv2, arXiv 2306.09341).
    - ``clip``: ``max(100·cos, 0)`` (CLIPScore, arXiv 2104.08718, with 100 in the place of 2.5).
    - ``aesthetic``: LAION's predictor, a head on the image's embedding, whatever the caption.

    Args:
        path: directory in transformers' format, or hub id; weights as safetensors only.
        head: file of the aesthetic head.
        processor: where tokenizer and image processor lie; beside the weights when None, and if they are not there, for
            ``pickscore`` at :data:`PICKSCORE_PROCESSOR`.

    Attributes:
        key: SHA-256 of the files of weights, processor and head.
    """

    def __init__(
        self,
        kind: str,
        path: str,
        *,
        name: str,
        batch_size: int = 32,
        head: str | None = None,
        processor: str | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        transformers = require("transformers", extra="train", purpose="scoring images")
        self.name, self.batch_size, self._kind, self._device = name, batch_size, kind, torch.device(device)
        folder = _folder(path, "config.json", revision)
        found = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if found != "clip":
            raise invalid(
                "scorer", path, f"holds a model of type {found!r}", "name a CLIP model, such as CLIP-ViT-H-14"
            )
        try:
            model, info = transformers.CLIPModel.from_pretrained(
                path, revision=revision, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise invalid("scorer", path, f"cannot be loaded ({error})", _CLIP_REMEDY) from error
        check_loaded("scorer", folder, info)
        self._model = model.eval().requires_grad_(False).to(self._device)
        where, of = (path, revision) if processor is None else (processor, None)
        try:
            place = _folder(where, "preprocessor_config.json", of)
        except InvalidInput:
            if kind != "pickscore" or processor is not None:
                raise
            where, of = PICKSCORE_PROCESSOR, None
            place = _folder(where, "preprocessor_config.json", of)
        # The processor that works with PIL alone: with torchvision there, transformers would choose another one, whose
        # resizing differs in the last bits.
        reader = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(where, revision=of, trust_remote_code=False)
            self._processor = reader.from_pretrained(where, revision=of)
        except (OSError, ValueError) as error:
            problem = f"its tokenizer or image processor cannot be loaded ({error})"
            raise invalid("scorer", where, problem, "name another place with the option processor") from error
        self._scale = float(model.logit_scale.exp()) if kind == "pickscore" else 100.0
        self._max_length = min(self._tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        self._head = None if head is None else load_head(head, model.config.projection_dim).to(self._device)
        files = {
            "weights": [folder / "config.json", *sorted(folder.glob("*.safetensors"))],
            "processor": [place / name for name in _PROCESSOR_FILES if (place / name).is_file()],
            **({} if head is None else {"head": [Path(head)]}),
        }
        self.key: dict[str, Any] = {"kind": kind, **{part: Digests().of(found) for part, found in files.items()}}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
        """Gray, palette and transparent images become RGB first. Captions beyond the model's length are cut off."""
        pixels = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        hidden = self._model.vision_model(pixel_values=pixels.to(self._device)).pooler_output
        embedded = nn.functional.normalize(self._model.visual_projection(hidden), dim=-1)
        if self._head is not None:
            values: Tensor = self._head(embedded)
            return values.squeeze(-1).cpu()
        distinct = list(dict.fromkeys(captions))
        # Padded to the full length, so that an embedding does not follow from the longest caption beside it.
        tokens = self._tokenizer(
            distinct, padding="max_length", truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self._device)
        hidden = self._model.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        texts = nn.functional.normalize(self._model.text_projection(hidden), dim=-1)
        texts = texts[[distinct.index(caption) for caption in captions]]
        scores: Tensor = self._scale * (embedded * texts).sum(-1)
        return (scores.clamp(min=0) if self._kind == "clip" else scores).cpu()


def load_head(path: str, width: int) -> nn.Module:
    """LAION's aesthetic head ``(n, width) -> (n, 1)`` for inference, in float32.

    Either ``layers.0``, ``2``, ``4``, ``6``, ``7`` (the published predictor, without its dropouts, which do nothing
    at inference) or one linear layer (``weight``, ``bias``). The heads are published as PyTorch files only; these are
    read with ``weights_only=True``, which executes nothing.

    Raises:
        InvalidInput: not such a file, or made for embeddings of another width.
    """
    file = Path(path)
    if not file.is_file():
        raise invalid("scorer", path, "is no file", "name the file of the aesthetic head")
    try:
        own = file.suffix == ".safetensors"
        state: Any = load_file(file) if own else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch.load raise many kinds for a damaged file
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise invalid("scorer", path, problem, _HEAD_REMEDY) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise invalid("scorer", path, "is no state dict of tensors", _HEAD_REMEDY)
    prefixes = [f"layers.{number}." for number in _HEAD_LAYERS] if "layers.0.weight" in state else [""]
    if set(state) != {f"{prefix}{kind}" for prefix in prefixes for kind in ("weight", "bias")}:
        problem = f"has the tensors {sorted(state)}, which are no known aesthetic head"
        raise invalid("scorer", path, problem, _HEAD_REMEDY)
    layers, inputs = nn.Sequential(), width
    for prefix in prefixes:
        weight, bias = (state[f"{prefix}{kind}"].float() for kind in ("weight", "bias"))
        if weight.ndim != 2 or weight.shape[1] != inputs or bias.shape != weight.shape[:1]:
            problem = f"its layer {prefix or 'weight'} is {tuple(weight.shape)}, and gets {inputs} numbers"
            raise invalid("scorer", path, problem, "name the CLIP that the head was made for with the option clip")
        layer = nn.Linear(inputs, inputs := len(weight))
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if inputs != 1:
        raise invalid("scorer", path, f"gives {inputs} numbers for an image", _HEAD_REMEDY)
    return layers.eval().requires_grad_(False)


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
    (kind, _, path), *given = (entry.partition("=") for entry in spec.split(","))
    if kind not in _OPTIONS or not path:
        remedy = f"write KIND=PATH, KIND one of {', '.join(_OPTIONS)}, as in pickscore=yuvalkirstain/PickScore_v1"
        raise invalid("scorer", spec, "describes no scorer", remedy)
    options: dict[str, Any] = {"name": kind, "batch_size": batch_size, "device": device}
    for option, _, value in given:
        if option not in _OPTIONS[kind] or not value:
            remedy = f"write option=value with one of {', '.join(_OPTIONS[kind])}"
            raise invalid("scorer", spec, f"{option!r} is no option of {kind}", remedy)
        options[option] = value if option in ("name", "revision") else expand_path(value, "scorer")
    path = expand_path(path, "scorer")
    if kind == "aesthetic":
        path, options["head"] = options.pop("clip", AESTHETIC_CLIP), path
    return ClipScorer(kind, path, **options)


def open_scorers(specs: Sequence[str], *, batch_size: int = 32, device: str = "auto", own: bool = True) -> list[Scorer]:
    """The scorers that ``specs`` describe, in their order.

    A spec is one of :func:`open_scorer` (``KIND=PATH``), or with ``own`` also ``MODULE:NAME``: a :class:`Scorer`, or a
    function of images and captions, in a module that Python can import from here. The module is imported, so name only
    what you trust. ``device``: with ``auto`` a GPU where there is one.

    Raises:
        InvalidInput: no spec, one that describes nothing, two scorers of one name, or a device that cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        shown = str(error).splitlines()[0]
        raise invalid("device", device, f"cannot be used ({shown})", "use auto, cpu, cuda or cuda:1") from error
    scorers = [
        _own_scorer(spec) if own and _OWN.fullmatch(spec) else open_scorer(spec, batch_size=batch_size, device=device)
        for spec in specs
    ]
    return check_scorers(scorers)


def check_scorers(scorers: Sequence[Scorer]) -> list[Scorer]:
    """The scorers as a list. Raises ``InvalidInput`` for none, or two of one name, whose results would be one."""
    names = [scorer.name for scorer in scorers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names:
        raise invalid("scorer", names, "names no scorer", _REMEDY)
    if twice:
        raise invalid("scorer", names, f"names {', '.join(twice)} twice", "give each a name, as in clip=PATH,name=NAME")
    return list(scorers)


def mean_of_frames(scores: Sequence[float], frames: int) -> list[float]:
    """The score of every video, from those of its frames."""
    return [fmean(scores[start : start + frames]) for start in range(0, len(scores), frames)]


def in_batches(scorer: Scorer, images: Sequence[Image], captions: Sequence[str]) -> Tensor:
    """Scores of any number of images, float32 ``(n,)``, in calls of the scorer's batch size.

    Raises:
        InvalidInput: the scorer fails, gives another number of scores than it got images, or one that is not finite.
    """
    found = [torch.empty(0)]
    for start in range(0, len(images), scorer.batch_size):
        batch = slice(start, start + scorer.batch_size)
        part = images[batch]
        try:
            scores = torch.as_tensor(scorer(part, captions[batch]), dtype=torch.float32).cpu()
        except (InvalidInput, MissingExtra):
            raise
        except Exception as error:  # anybody's code
            frame = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"fails on a batch of {len(part)} images ({type(error).__name__}: {error})"
            remedy = f"look at {frame.filename}, line {frame.lineno}; what is finished is kept"
            raise invalid("scorer", scorer.name, problem, remedy) from error
        if scores.shape != (len(part),):
            problem = f"gives scores of shape {tuple(scores.shape)} for {len(part)} images"
            raise invalid("scorer", scorer.name, problem, "return one number for each image")
        if not scores.isfinite().all():
            remedy = "look at its weights, and at the device's number format"
            raise invalid("scorer", scorer.name, "gives scores that are not finite", remedy)
        found.append(scores)
    return torch.cat(found)


def _own_scorer(spec: str) -> Scorer:
    module, _, name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # a program installed elsewhere does not look where it is called
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise invalid("scorer", spec, f"cannot be imported ({error})", _REMEDY) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise invalid("scorer", spec, "cannot be called", "name a function of images and captions")
    own: Scorer = found if hasattr(found, "name") and hasattr(found, "batch_size") else FunctionScorer(found, name)
    return own


def _folder(path: str, file: str, revision: str | None) -> Path:
    """The local directory of a repository, by one of its files."""
    transformers = require("transformers", extra="train", purpose="scoring images")
    try:
        found = transformers.utils.cached_file(path, file, revision=revision)
    except (OSError, ValueError) as error:
        raise invalid("scorer", path, f"cannot be loaded ({error})", _CLIP_REMEDY) from error
    if found is None:
        raise invalid("scorer", path, f"holds no {file}", _CLIP_REMEDY)
    return Path(found).parent
