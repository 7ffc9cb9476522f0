"""A training step around the ops on every backend: eager, compiled, under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastinvdpo
from tests.ops.steps import assert_near, in_float64, step_on
from tests.places import EVERYWHERE, Place

everywhere = pytest.mark.parametrize("place", EVERYWHERE)


class Recorded:
    """A compiler's backend that keeps the graphs of forward and backward."""

    def __init__(self) -> None:
        self.graphs: list[set[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(part: torch.fx.GraphModule, _: list[Tensor]) -> Any:
            self.graphs.append({str(node.target) for node in part.graph.nodes if node.op == "call_function"})
            return make_boxed_func(part.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)


@everywhere
def test_a_training_step_eager_and_compiled_to_one_graph(place: Place) -> None:
    step, recorded = step_on(place.device), Recorded()
    torch._dynamo.reset()
    compiled = torch.compile(step.loss, fullgraph=True, backend=recorded)
    with fastinvdpo.use_backend(place.backend):
        eager = step.loss(step.latents, step.table)
        eager.backward()
        expected, (loss, gradients) = [eager.detach(), *step.gradients()], in_float64(step)
        assert_near(expected, [loss, *gradients])
        step.network.zero_grad()
        loss = compiled(step.latents, step.table)
        loss.backward()
    assert all(torch.equal(one, other) for one, other in zip([loss.detach(), *step.gradients()], expected, strict=True))
    forward, backward = recorded.graphs
    assert {"fastinvdpo.preference_loss.default", "fastinvdpo.affine_step.default"} <= forward
    assert {"fastinvdpo.preference_loss_backward.default", "fastinvdpo.affine_step_backward.default"} <= backward
    # No part of the reference was traced into the graphs.
    assert not {target for target in forward | backward if "softplus" in target or "philox" in target}


@everywhere
def test_a_step_compiled_for_any_batch(place: Place) -> None:
    step, recorded = step_on(place.device, pairs=8), Recorded()
    torch._dynamo.reset()
    compiled = torch.compile(step.loss, fullgraph=True, backend=recorded, dynamic=True)
    for pairs in (4, 5, 7):  # no size that another dimension has too
        latents, table = step.latents[: 2 * pairs], step.table[: 2 * pairs]
        with fastinvdpo.use_backend(place.backend):
            loss, expected = compiled(latents, table), step.loss(latents, table)
        torch.testing.assert_close(loss, expected)
    assert len(recorded.graphs) == 2  # a forward and its backward, compiled once


@everywhere
def test_under_autocast(place: Place) -> None:
    """Predictions become bfloat16, the loss stays float32, and float32 parameters get float32 gradients."""
    step, seen = step_on(place.device), []

    def predict(latents: Tensor) -> Tensor:
        prediction = step.network(latents)
        prediction.retain_grad()
        seen.append(prediction)
        return prediction

    with fastinvdpo.use_backend(place.backend):
        with torch.autocast(place.device, torch.bfloat16):
            loss = step.loss(step.latents, step.table, predict)
        loss.backward()
        assert loss.dtype == torch.float32 and {prediction.dtype for prediction in seen} == {torch.bfloat16}
        assert all(gradient.dtype == torch.float32 for gradient in step.gradients())
        # The ops do as they do outside autocast on the same tensors.
        again = [prediction.detach().requires_grad_() for prediction in seen]
        replayed = iter(again)
        outside = step.loss(step.latents, step.table, lambda latents: next(replayed))
        gradients = torch.autograd.grad(outside, again)
    assert torch.equal(loss, outside)
    assert all(torch.equal(found.grad, expected) for found, expected in zip(seen, gradients, strict=True))
