"""LAION's aesthetic predictors: small heads on CLIP's image embedding, from their state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.io import Digests

# christophschuhmann/improved-aesthetic-predictor: five linear layers in an nn.Sequential, of widths 1024, 128, 64, 16
# and 1, with dropout after the first three and no activation between them.
_LAYERS = (0, 2, 4, 6, 7)
_REMEDY = "give the published head, or a linear one (weight, bias), as .safetensors"


def load_head(path: str, width: int) -> tuple[nn.Module, str]:
    """The head ``(n, width) -> (n, 1)`` for inference, in float32, and the SHA-256 of its file.

    Either ``layers.0``, ``2``, ``4``, ``6``, ``7`` (the published predictor, without its dropouts, which do nothing
    at inference) or one linear layer (``weight``, ``bias``). The heads are published as PyTorch files only; these are
    read with ``weights_only=True``, which executes nothing.

    Raises:
        InvalidInput: not such a file, or made for embeddings of another width.
    """
    file = Path(path)
    if not file.is_file():
        raise invalid("scorer", path, "is no file", "name the file of the aesthetic head")
    state = _read(file)
    names = [f"layers.{number}" for number in _LAYERS] if "layers.0.weight" in state else [""]
    wanted = {f"{name}.{kind}".lstrip(".") for name in names for kind in ("weight", "bias")}
    if set(state) != wanted:
        problem = f"has the tensors {sorted(state)}, which are no known aesthetic head"
        raise invalid("scorer", path, problem, _REMEDY)
    layers, inputs = [], width
    for name in names:
        weight, bias = (state[f"{name}.{kind}".lstrip(".")].float() for kind in ("weight", "bias"))
        if weight.ndim != 2 or weight.shape[1] != inputs or bias.shape != weight.shape[:1]:
            problem = f"its layer {name or 'weight'} is {tuple(weight.shape)}, and gets {inputs} numbers"
            raise invalid("scorer", path, problem, "name the CLIP that the head was made for with the option clip")
        inputs = weight.shape[0]
        layer = nn.Linear(weight.shape[1], inputs)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if inputs != 1:
        raise invalid("scorer", path, f"gives {inputs} numbers for an image", _REMEDY)
    return nn.Sequential(*layers).eval().requires_grad_(False), Digests().of([file])


def _read(file: Path) -> Mapping[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            safetensors = require("safetensors.torch", extra="train", purpose="reading an aesthetic head")
            state = safetensors.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch.load raise many kinds for a damaged file
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise invalid("scorer", str(file), problem, _REMEDY) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise invalid("scorer", str(file), "is no state dict of tensors", _REMEDY)
    return state
