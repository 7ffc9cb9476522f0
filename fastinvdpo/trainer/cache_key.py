"""What a cache depends on, as readable entries: a cache serves a run exactly when all of them agree.

The pairs enter with digests of what they hold, files of the model with the SHA-256 of their content. For caches of a
method that does not invert with the reference, neither UNet nor noise schedule enters: they change nothing that is
stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastinvdpo.config import TrainConfig
from fastinvdpo.config.sections import ModelSection
from fastinvdpo.data.content import content_of
from fastinvdpo.data.rows import IMAGES
from fastinvdpo.io import Digests, plain, read_object
from fastinvdpo.trainer.opening import open_data_source

FORMAT = 3  # 1: images as they are stored, not as a viewer shows them; 2: without checksums
_ENCODING, _INVERTING = "latents, embeddings", "latents, embeddings, trajectories, reference predictions"
_DATA = ("ties", "resolution", "relabel_by_score", "max_broken", "latents")


def cache_key(config: TrainConfig, digests: Digests) -> dict[str, Any]:
    """Everything that changes what is stored for ``config``, as plain types by the name of the configuration's key.

    ``data.path`` and ``model.path`` are not part of it, the content found there is.

    Raises:
        InvalidInput: data or model are not there.
    """
    from fastinvdpo.models import checkpoint_files, resolve_family

    model, data, chain = config.model, config.data, config.method.reference_chain
    source = open_data_source(data)
    source.resolve((*IMAGES, "caption"))
    if source.remote:
        source.files()  # raises
    family = resolve_family(model.family, model.path, model.revision)
    files = checkpoint_files(
        family, model.path, unet_init=model.unet_init, vae=model.vae, revision=model.revision, variant=model.variant
    )
    network = "unet" if "unet" in files else "transformer"
    key: dict[str, Any] = {
        "format": FORMAT,
        "contents": _ENCODING if chain is None else _INVERTING,
        "cache.dtype": config.cache.dtype,
        **content_of(source, digests),
        **{f"data.{name}": getattr(data, name) for name in _DATA},
        "model.family": family,
        "model.variant": model.variant,
        **{f"model {part}": digests.of(paths) for part, paths in files.items() if part not in (network, "scheduler")},
        **_given(model, ("max_sequence_length",)),
    }
    if chain is not None:
        (schedule,) = [file for file in files["scheduler"] if file.name == "scheduler_config.json"]
        settings = read_object(schedule, "model.path")
        key |= {
            f"model {network}": digests.of(files[network]),
            **_given(model, ("zero_terminal_snr", "guidance_embedding")),
            **{f"scheduler {name}": value for name, value in settings.items() if not name.startswith("_")},
            **{f"method.{name}": value for name, value in chain.items()},
            "training.mixed_precision": config.training.mixed_precision,
            "model.reference_dtype": config.model.reference_dtype,
        }
        key |= _given(model, ("quantization", "reference_quantization"))
    return plain(key)


def _given(model: ModelSection, names: Iterable[str]) -> dict[str, Any]:
    """Settings that are not null, so that caches from before there were these settings still serve."""
    return {f"model.{name}": value for name in names if (value := getattr(model, name)) is not None}
