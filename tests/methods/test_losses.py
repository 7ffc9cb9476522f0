"""The drop-in for the loss block of Diffusion-DPO scripts, against each script's formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastinvdpo
from fastinvdpo import DiffusionDPOLoss, InvalidInput, diffusion_dpo_loss
from tests.cases import predictions

PAIRS, SHAPE = 8, (4, 8, 8)
ELEMENTS = math.prod(SHAPE)
ROUNDING = 2.0**-24
Block = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor, Tensor]]


def _errors(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared error of every winner and of every loser: the first half of the batch won."""
    half = prediction.shape[0] // 2
    per_sample = torch.stack([(sample - goal).pow(2).mean() for sample, goal in zip(prediction, target, strict=True)])
    return per_sample[:half], per_sample[half:]


def script(scale: float, tie: float, utility: Callable[[Tensor, float], Tensor] | None = None) -> Block:
    """``mean −log σ(z)``, or ``mean utility(logits, β)``, both errors and the accuracy, ``z = scale·β·logits``."""

    def block(model: Tensor, reference: Tensor, target: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (model_w, model_l), (ref_w, ref_l) = _errors(model, target), _errors(reference, target)
        logits = (ref_w - ref_l) - (model_w - model_l)
        z = scale * beta * logits
        won = torch.tensor(sum((value > 0) + tie * (value == 0) for value in z.tolist()) / len(z))
        loss = -torch.sigmoid(z).log() if utility is None else utility(logits, beta)
        return loss.mean(), (model_w.mean() + model_l.mean()) / 2, (ref_w.mean() + ref_l.mean()) / 2, won

    return block


SCRIPTS = {"research": script(0.5, 0.0), "diffusers-sd15": script(1.0, 0.5), "diffusers-sdxl": script(0.5, 0.5)}
every_script = pytest.mark.parametrize("convention", SCRIPTS)


def _with_gradient(block: Callable[..., Any], inputs: tuple[Tensor, ...], beta: float, **options: Any) -> list[Tensor]:
    model = inputs[0].detach().requires_grad_()
    results = list(block(model, *inputs[1:], beta, **options))
    return [*(result.detach() for result in results), *torch.autograd.grad(results[0], model)]


@every_script
@pytest.mark.parametrize("beta", [0.5, 20, 500.0])
def test_a_script_in_float64(convention: str, beta: float) -> None:
    inputs = predictions(PAIRS, SHAPE, gap=0.1)
    found = _with_gradient(diffusion_dpo_loss, inputs, beta, convention=convention)
    expected = _with_gradient(SCRIPTS[convention], inputs, beta)
    assert 0 < float(expected[3]) < 1  # some pairs are won, some are lost
    for value, exact in zip(found, expected, strict=True):
        assert value.shape == exact.shape
        torch.testing.assert_close(value, exact.double(), rtol=1e-11, atol=1e-15)


@every_script
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_script_in_training_precision_keeps_float32(convention: str, dtype: torch.dtype) -> None:
    inputs, beta = predictions(PAIRS, SHAPE, gap=0.1, dtype=dtype), 50.0
    wide = tuple(tensor.double() for tensor in inputs)
    found = _with_gradient(diffusion_dpo_loss, inputs, beta, convention=convention)
    expected = _with_gradient(SCRIPTS[convention], wide, beta)
    assert [value.dtype for value in found] == [torch.float32] * 4 + [dtype]
    # z is a sum of products in float32: one rounding an element added, and a few in each product, of the terms' sizes.
    model, reference, target = wide
    terms = ((model - reference) * (model + reference - 2 * target)).abs().flatten(1).mean(1)
    z_error = beta * float((terms[:PAIRS] + terms[PAIRS:]).max()) * (ELEMENTS + 8) * ROUNDING
    assert z_error < 0.02  # or the bounds below say nothing
    assert abs(float(found[0]) - float(expected[0])) <= z_error + 4 * ROUNDING * float(expected[0])  # |u'| ≤ 1
    for value, exact in zip(found[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=(ELEMENTS + 8) * ROUNDING, atol=0)
    assert float(found[3]) == float(expected[3])  # no z is nearer to 0 than that, which the next line checks
    assert z_error < float(torch.log(torch.expm1(_each_loss(convention, wide, beta))).abs().min())
    # u' changes by at most z_error relative, and the gradient is rounded to its type.
    torch.testing.assert_close(found[4].double(), expected[4], rtol=torch.finfo(dtype).eps + 2 * z_error, atol=2.0**-24)


def _each_loss(convention: str, inputs: tuple[Tensor, ...], beta: float) -> Tensor:
    """The loss of every pair by itself, ``log(1 + exp(−z))``."""
    pairs = ([tensor[[i, PAIRS + i]] for tensor in inputs] for i in range(PAIRS))
    return torch.stack([SCRIPTS[convention](*pair, beta)[0] for pair in pairs])


def test_conventions_differ_by_two() -> None:
    inputs = predictions(PAIRS, SHAPE, gap=0.1)
    strong = diffusion_dpo_loss(*inputs, 2500, convention="diffusers-sd15")
    for same in ("research", "diffusers-sdxl"):
        assert torch.equal(strong.loss, diffusion_dpo_loss(*inputs, 5000, convention=same).loss)
    assert torch.equal(strong.loss, fastinvdpo.preference_loss(*inputs, beta=5000).loss)
    assert diffusion_dpo_loss(*inputs, 5000).loss == diffusion_dpo_loss(*inputs, 5000, convention="research").loss


LOSS_TYPES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": lambda logits, beta: -torch.sigmoid(beta * logits).log(),
    "hinge": lambda logits, beta: torch.relu(1 - beta * logits),
    "ipo": lambda logits, beta: (logits - 1 / (2 * beta)) ** 2,
}


@pytest.mark.parametrize("beta", [0.5, 20.0])
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_the_loss_types_of_diffusers(name: str, beta: float) -> None:
    inputs = predictions(PAIRS, SHAPE, gap=0.1)
    found = _with_gradient(diffusion_dpo_loss, inputs, beta, convention="diffusers-sd15", loss_type=name)
    expected = _with_gradient(script(1.0, 0.5, LOSS_TYPES[name]), inputs, beta)
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact.double(), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(("convention", "ties"), [("research", 0.0), ("diffusers-sd15", 0.5), ("diffusers-sdxl", 0.5)])
def test_the_first_step(convention: str, ties: float) -> None:
    """Policy and reference agree: ln 2, equal errors, and what each script logs as accuracy."""
    _, reference, target = predictions(PAIRS, SHAPE, dtype=torch.bfloat16)
    result = diffusion_dpo_loss(reference, reference, target, 5000, convention=convention)
    assert float(result.loss) == pytest.approx(math.log(2), abs=ROUNDING)
    assert float(result.raw_model_loss) == float(result.raw_ref_loss) > 0
    assert float(result.implicit_acc) == ties


def test_the_result_unpacks_in_the_order_of_the_scripts_and_carries_their_gradients() -> None:
    model, reference, target = predictions(PAIRS, SHAPE)
    model.requires_grad_()
    loss, raw_model_loss, raw_ref_loss, implicit_acc = result = diffusion_dpo_loss(model, reference, target, 10)
    assert result == DiffusionDPOLoss(loss, raw_model_loss, raw_ref_loss, implicit_acc)
    assert [value.requires_grad for value in result] == [True, True, False, False]
    (gradient,) = torch.autograd.grad(raw_model_loss, model, retain_graph=True)
    torch.testing.assert_close(gradient, 2 * (model - target).detach() / model.numel())
    loss.backward()


def test_it_compiles_without_a_break() -> None:
    inputs = predictions(PAIRS, SHAPE, gap=0.1, dtype=torch.float32)
    compiled = torch.compile(diffusion_dpo_loss, backend="aot_eager", fullgraph=True)
    expected = _with_gradient(diffusion_dpo_loss, inputs, 20.0)
    for value, other in zip(_with_gradient(compiled, inputs, 20.0), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=2 * ROUNDING, atol=0)


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, X, X, 0), {}, r"^beta_dpo = 0: "),
        ((X, X, X, torch.tensor(5.0)), {}, r"^beta_dpo = tensor\(5.\)"),
        ((X, X, None, 5.0), {}, r"^target = None"),
        ((X, X[:2], X, 5.0), {}, r"^ref_pred.shape = \(2, 3\)"),
        ((X[:3], X[:3], X[:3], 5.0), {}, r"^model_pred.shape = \(3, 3\)"),
        (
            (X, X, X, 5.0),
            {"convention": "diffusers"},
            "^convention = 'diffusers'.*research, diffusers-sd15, diffusers-sdxl",
        ),
        ((X, X, X, 5.0), {"loss_type": "hinge"}, "^loss_type = 'hinge': is not a loss of the script .*utility='hinge'"),
        ((X, X, X, 5.0), {"loss_type": "ipo", "convention": "diffusers-sdxl"}, "^loss_type = 'ipo': is not a loss of"),
    ],
)
def test_bad_inputs_are_named_as_the_caller_knows_them(
    arguments: tuple[Any, ...], options: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        diffusion_dpo_loss(*arguments, **options)
    assert "Remedy: " in str(caught.value) and "policy_pred" not in str(caught.value)
