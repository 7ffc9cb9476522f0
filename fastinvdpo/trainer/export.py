"""The result of a run: the trained model in its family's own format, and with LoRA the adapter beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fastinvdpo.models.adapters import merged_copy, merged_into, save_adapter
from fastinvdpo.trainer.ema import EMA
from fastinvdpo.trainer.networks import Networks

if TYPE_CHECKING:
    from fastinvdpo.models import DiffusionModel

Place: TypeAlias = Callable[[str], AbstractContextManager[Path]]


def export_model(
    model: DiffusionModel,
    networks: Networks,
    ema: EMA | None,
    place: Place | None,
    *,
    pipeline: bool = True,
    card: str | None = None,
    suffix: str = "",
) -> None:
    """Write the directory ``model``, which ``load_model`` reads.

    With EMA the averaged weights are written. With LoRA the model has the adapter merged into its weights, and
    ``adapter`` holds it in peft's format and diffusers'.
    Where the network is quantized, the weights are those from before (``model.unquantized``).
    With FSDP2 all processes must call it, and the one that has a ``place`` gets the whole weights.

    Args:
        place: opens a directory of a name to write into; None writes nothing.
        pipeline: False writes the trained network alone, which ``unet_init`` and diffusers read.
        card: the text of README.md in both. suffix: to the names of both.
    """
    with nullcontext() if ema is None else ema.applied():
        shards = networks.shards
        network = networks.policy_module if shards is None else shards.whole_module(here=place is not None)
        if network is None or place is None:
            return
        if networks.lora:
            with place(f"adapter{suffix}") as temporary:
                save_adapter(network, temporary, model.origin)
                model.save_lora(temporary, network)
                _write_card(temporary, card)
            network = merged_copy(network) if model.unquantized is None else merged_into(model.unquantized(), network)
        with place(f"model{suffix}") as temporary:
            if pipeline:
                model.save(temporary, network=network)
            else:
                model.save_network(temporary, network)
            _write_card(temporary, card)


def _write_card(directory: Path, card: str | None) -> None:
    if card is not None:
        (directory / "README.md").write_text(card, encoding="utf-8")
