"""The result of a run: the trained model in its family's own format, and with LoRA the adapter beside it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from fastinvdpo.io import atomic_directory
from fastinvdpo.models.adapter_files import save_adapter
from fastinvdpo.models.adapters import merged_copy, merged_into
from fastinvdpo.trainer.ema import EMA
from fastinvdpo.trainer.networks import Networks

if TYPE_CHECKING:
    from fastinvdpo.models import DiffusionModel


def export_model(
    model: DiffusionModel,
    networks: Networks,
    ema: EMA | None,
    directory: Path,
    *,
    write: bool = True,
    pipeline: bool = True,
    card: str | None = None,
    suffix: str = "",
) -> Path:
    """Write ``directory/model``, which ``load_model`` reads, and return it.

    With EMA the averaged weights are written. With LoRA the model has the adapter merged into its weights, and
    ``directory/adapter`` holds it in peft's format and diffusers'. Both directories appear complete or not at all.
    Where the network is quantized, the weights are those from before (``model.unquantized``).
    With FSDP2 all processes must call it, and the one that ``write``s gets the whole weights.

    Args:
        pipeline: False writes the trained network alone, which ``unet_init`` and diffusers read.
        card: the text of README.md in both. suffix: to the names of both.
    """
    with nullcontext() if ema is None else ema.applied():
        shards = networks.shards
        network = networks.policy_module if shards is None else shards.whole_module(here=write)
        if network is None or not write:
            return directory / f"model{suffix}"
        if networks.lora:
            with atomic_directory(directory / f"adapter{suffix}") as temporary:
                save_adapter(network, temporary, model.origin)
                model.save_lora(temporary, network)
                _write_card(temporary, card)
            network = merged_copy(network) if model.unquantized is None else merged_into(model.unquantized(), network)
        with atomic_directory(directory / f"model{suffix}") as temporary:
            if pipeline:
                model.save(temporary, network=network)
            else:
                model.save_network(temporary, network)
            _write_card(temporary, card)
    return directory / f"model{suffix}"


def _write_card(directory: Path, card: str | None) -> None:
    if card is not None:
        (directory / "README.md").write_text(card, encoding="utf-8")
