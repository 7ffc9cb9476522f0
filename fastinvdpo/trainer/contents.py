"""What a run is made of, by content: digests of its pairs and of its base model, whatever their paths."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastinvdpo.data.content import content_at_hand, content_of
from fastinvdpo.io import DIGEST, Digests, key_hash
from fastinvdpo.trainer.cache import PairCache

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config import TrainConfig
    from fastinvdpo.models import DiffusionModel

# Settings of a VAE that its latents depend on besides its weights.
_SETTINGS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
# Keys of the configuration that say where something is, and what is there; they count where that is not known.
_PLACES = {
    "data ": ("path", "format", "columns", "split", "revision", "subset", "image_root", "rank_pairs"),
    "model ": ("path", "family", "unet_init", "vae", "revision", "variant"),
}


def contents_of(
    config: TrainConfig, model: DiffusionModel, pairs: Any, accelerator: Accelerator, remembered: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Digests of pairs and model, made by the first process for all; and what need not be read again the next time.

    ``remembered``: what this gave the last time. Images are left out without ``output.data_hash``.
    """
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        digests, source = Digests(remembered), getattr(pairs, "source", None)
        if isinstance(pairs, PairCache):
            of_pairs = pairs.contents
        elif source is None:
            of_pairs = content_at_hand(pairs)
        else:
            of_pairs = content_of(source, digests, images=config.output.data_hash)
        found = [{**of_pairs, **_of_model(model)}, digests.remembered]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    return found[0], found[1]


def attempts(meta: Mapping[str, Any], config: TrainConfig, contents: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each part of a run saw, as the checkpoint tells and for the steps ``after`` it.

    Args:
        meta: of the checkpoint that the run continues from; empty for a new run.
    """
    before: list[dict[str, Any]] = meta.get("attempts", [{"after": 0}] if meta else [])
    now = {"data.path": config.data.path, "model.path": config.model.path, **contents}
    same = bool(before) and {**before[-1], "after": 0} == {**now, "after": 0}
    return before if same else [*before, {"after": meta.get("step", 0), **now}]


def _of_model(model: DiffusionModel) -> dict[str, Any]:
    """Digests of the network as it is now, of the noise schedule, and of the frozen parts that are loaded."""
    schedule = model.schedule
    levels = {"alphas": schedule.alphas_cumprod, "sigmas": schedule.sigmas}
    kinds = [schedule.prediction_type, schedule.steps_offset, schedule.set_alpha_to_one]
    found = {"model family": model.family, "model network": _of_tensors(model.network.state_dict())}
    found["model schedule"] = _of_tensors(levels, kinds)
    return found | frozen_contents(model)


def frozen_contents(model: DiffusionModel) -> dict[str, Any]:
    """Digests of text encoders, tokenizers and VAE, by their classes."""
    found: dict[str, Any] = {}
    seen: Counter[str] = Counter()
    components: Mapping[str, Any] = getattr(getattr(model, "pipeline", None), "components", {})
    tokenizers = [part for part in components.values() if hasattr(part, "get_vocab")]
    for part in (*model.frozen_modules(), *tokenizers):
        name = type(part).__name__
        seen[name] += 1
        if isinstance(part, nn.Module):
            config: Any = getattr(part, "config", None) or {}
            digest = _of_tensors(part.state_dict(), [getattr(config, key, None) for key in _SETTINGS])
        else:
            digest = DIGEST + key_hash(part.get_vocab())
        found[f"model {name}{'' if seen[name] == 1 else f' {seen[name]}'}"] = digest
    return found


def compared(
    stored: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str], list[str]]:
    """What of two contents can be compared.

    Returns:
        both sides' comparable entries; what cannot be compared; the keys of the configuration that need not agree,
        since what they lead to has been compared.
    """
    names = dict.fromkeys([*stored, *now])
    unknown = [name for name in names if any(str(side.get(name)).startswith("not hashed") for side in (stored, now))]
    free = []
    for kind, keys in _PLACES.items():
        own = [name for name in names if name.startswith(kind)]
        if own and all(stored.get(name) == now.get(name) and name not in unknown for name in own):
            free += [f"{kind.strip()}.{key}" for key in keys]
    kept = [{name: value for name, value in side.items() if name not in unknown} for side in (stored, now)]
    return kept[0], kept[1], unknown, free


def _of_tensors(tensors: Mapping[str, Any], settings: Sequence[Any] = ()) -> str:
    """Of names, types, shapes and values."""

    def one(name: str) -> str:
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            return f"{name} {tensor!r}"
        plain = tensor.detach().to("cpu").contiguous()
        digest = hashlib.sha256(plain.flatten().view(torch.uint8).numpy().data).hexdigest()
        return f"{name} {plain.dtype} {tuple(plain.shape)} {digest}"

    with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter lock
        told = [*threads.map(one, tensors), repr(list(settings))]
    return DIGEST + hashlib.sha256("\n".join(told).encode()).hexdigest()
