"""What the ops cannot compute with or differentiate is refused for every argument of both, by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastinvdpo
from fastinvdpo import InvalidInput
from tests.places import CPU, Place

X, PAIRS = torch.linspace(-1, 1, 48).view(4, 3, 4), 2
STEP: dict[str, Tensor] = {
    "sample": X,
    "outputs[0]": X.flip(0),
    "coefficients": torch.tensor([[0.5, 2.0]] * 4),
    "active": torch.tensor([True, False, True, True]),
    "noise_scale": torch.ones(4),
    "noise_index": torch.arange(4),
}
INTO = {"out": X.clone(), "trajectory": X.clone()}
LOSS = {
    "policy_pred": X,
    "reference_pred": X.flip(0),
    "target": X.flip(1),
    "pair_weight": torch.ones(PAIRS),
    "timestep_weight": torch.ones(PAIRS, 3),
}
MASKED = {**LOSS, "mask": torch.linspace(0, 1, 12).view(4, 3, 1)}
SCRIPT = {"model_pred": X, "ref_pred": X.flip(0), "target": X.flip(1)}


def step(**arguments: Tensor) -> Tensor:
    first, output, table = (arguments.pop(name) for name in ("sample", "outputs[0]", "coefficients"))
    return fastinvdpo.affine_step(first, [output], table, **arguments)


def loss(**arguments: Tensor) -> Tensor:
    policy, reference = arguments.pop("policy_pred"), arguments.pop("reference_pred")
    return fastinvdpo.preference_loss(policy, reference, arguments.pop("target"), beta=3.0, **arguments).loss


def masked_loss(**arguments: Tensor) -> Tensor:
    return loss(**arguments)


def script_loss(**arguments: Tensor) -> Tensor:
    return fastinvdpo.diffusion_dpo_loss(**arguments, beta_dpo=3.0).loss


CALLS: list[tuple[Callable[..., Tensor], dict[str, Tensor]]] = [
    (step, STEP), (loss, LOSS), (masked_loss, MASKED), (script_loss, SCRIPT)]  # fmt: skip
ARGUMENTS = [
    pytest.param(call, {**arguments, name: value}, name, id=f"{call.__name__} {name}")
    for call, arguments in CALLS
    for name, value in (arguments | (INTO if call is step else {})).items()
    if call is not masked_loss or name == "mask"
]
arguments = pytest.mark.parametrize(("call", "given", "name"), ARGUMENTS)
real = [each for each in ARGUMENTS if (each.values[1][each.values[2]]).is_floating_point()]


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "float8": lambda x: x.float().to(torch.float8_e4m3fn),
    "complex": lambda x: x.to(torch.complex64),
    "int32": lambda x: x.int(),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "meta": lambda x: x.to("meta"),
    "of one sample less": lambda x: x[:-1],
    "zero-size": lambda x: x[:0],
    "a list": lambda x: x.tolist(),
    "a number": lambda x: 1.0,
}


@arguments
def test_what_is_no_dense_tensor_of_real_numbers_is_refused(
    call: Callable[..., Tensor], given: dict[str, Tensor], name: str
) -> None:
    for kind, change in KINDS.items():
        if kind in ("of one sample less", "zero-size") and name == "sample":
            continue  # then every other argument has another length
        with pytest.raises(InvalidInput, match="Remedy: ") as caught:
            call(**{**given, name: change(given[name])})
        if kind not in ("of one sample less", "zero-size"):  # others may be the ones that do not fit
            assert str(caught.value).startswith((f"{name} ", f"{name}.")), kind


@pytest.mark.parametrize(("call", "given", "name"), real)
def test_no_gradient_is_dropped(call: Callable[..., Tensor], given: dict[str, Tensor], name: str) -> None:
    """In reverse mode it flows, or is refused; forward mode is refused."""
    leaf = given[name].clone().requires_grad_()
    if name in ("sample", "outputs[0]", "policy_pred", "model_pred"):
        (gradient,) = torch.autograd.grad(call(**{**given, name: leaf}).sum(), leaf)
        assert gradient.abs().max() > 0
    else:
        with pytest.raises(InvalidInput, match=r"requires_grad = True"):
            call(**{**given, name: leaf})
        with torch.no_grad():
            call(**{**given, name: leaf})
    with forward_ad.dual_level(), pytest.raises(InvalidInput, match="forward-mode"):
        call(**{**given, name: forward_ad.make_dual(given[name], torch.ones_like(given[name]))})
    for transform in (torch.func.jvp, torch.func.linearize):
        primals = (given[name],) if transform is torch.func.linearize else ((given[name],), (given[name],))
        with pytest.raises(InvalidInput, match="forward-mode"):
            transform(lambda x: call(**{**given, name: x}), *primals)
    mapped = torch.vmap(lambda x: call(**{**given, name: x}))
    with pytest.raises(InvalidInput, match="forward-mode"):
        torch.func.jvp(mapped, (given[name][None],), (given[name][None],))


@pytest.mark.parametrize("place", CPU)
@pytest.mark.parametrize("call", [step, loss, masked_loss, script_loss])
def test_transforms_of_functions(call: Callable[..., Tensor], place: Place) -> None:
    """``torch.func`` and batched gradients against derivatives of the op itself, one by one."""
    given = dict(CALLS)[call]
    name = next(iter(given))

    def function(x: Tensor) -> Tensor:
        return call(**{**given, name: x}).square().sum()

    def gradient(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    def second(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    def each(apply: Callable[[Tensor], Tensor], many: Tensor) -> Tensor:
        return torch.stack([apply(x) for x in many])

    x, many, near = given[name], torch.stack([given[name], 2 * given[name]]), {"rtol": 1e-4, "atol": 1e-5}
    func = torch.func
    with fastinvdpo.use_backend(place.backend):
        torch.testing.assert_close(func.grad(function)(x), gradient(x), **near)
        torch.testing.assert_close(func.vjp(function, x)[1](torch.ones(()))[0], gradient(x), **near)
        torch.testing.assert_close(func.grad(lambda y: func.grad(function)(y).square().sum())(x), second(x), **near)
        torch.testing.assert_close(func.vmap(function)(many), each(function, many), **near)
        torch.testing.assert_close(func.vmap(func.grad(function))(many), each(gradient, many), **near)
        for layout in (torch.contiguous_format, torch.channels_last):
            leaf = x.unsqueeze(-1).contiguous(memory_format=layout).squeeze(-1).requires_grad_()
            output = call(**{**given, name: leaf})
            grads = torch.stack([torch.ones_like(output), -2 * torch.ones_like(output)])
            (batched,) = torch.autograd.grad(output, leaf, grads, is_grads_batched=True, retain_graph=True)
            alone = [torch.autograd.grad(output, leaf, grad, retain_graph=True)[0] for grad in grads]
            torch.testing.assert_close(batched, torch.stack(alone), **near)
        with pytest.raises(InvalidInput, match=r"out = .*torch\.func"):
            func.vmap(lambda y: step(**{**STEP, "sample": y}, out=torch.empty_like(y)))(many)


class Renamed(Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("call", [step, loss, masked_loss, script_loss])
@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda x: x.as_subclass(Renamed)], ids=["Parameter", "subclass"])
def test_subclasses_are_tensors(call: Callable[..., Tensor], kind: Callable[[Tensor], Tensor]) -> None:
    given = dict(CALLS)[call]
    name = next(iter(given))
    assert torch.equal(call(**{**given, name: kind(given[name])}).detach().as_subclass(Tensor), call(**given))
