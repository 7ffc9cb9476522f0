"""Methods whose loss is a function of a few sums: against their formulas in float64, and what their options add."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastinvdpo import InvalidInput, build_objective
from fastinvdpo.methods import METHODS, AlphaDPO, DiffusionDPO, ObjectiveOutput, PairBatch, SmPO
from fastinvdpo.methods.single_timestep import SingleTimestepMethod
from fastinvdpo.trainer import TrainConfig, train
from tests.cases import predictions, sd_schedule
from tests.methods.problems import PAIRED, REFERENCE, Policy, pairs, select
from tests.trainer import tiny

Sides = tuple[Tensor, Tensor]
Formula = Callable[[Tensor, Sides, Sides, Sides], Tensor]
"""``loss(z, L, D, Q)`` of B pairs, from the margin, and by side the errors L, ``L − L_ref`` and ``m((p − r)²)``."""


def _alpha(z: Tensor, alpha: float) -> Tensor:
    p = torch.sigmoid(z)
    return (p**alpha - (1 - alpha) - alpha * p) / (alpha * (alpha - 1))


def _mapo(z: Tensor, error: Sides, gap: Sides, shift: Sides) -> Tensor:
    phi = [0.5 * side / torch.expm1(0.5 * side) for side in error]
    return error[0] - 0.1 * logsigmoid(1000 * (phi[0] - phi[1]))


def _dspo(z: Tensor, error: Sides, gap: Sides, shift: Sides) -> Tensor:
    c, cross = 50 * torch.sigmoid(-z), (gap[0] + shift[0]) / 2
    return error[0] - 2 * c * cross + c**2 * shift[0]


def _dmpo(z: Tensor, error: Sides, gap: Sides, shift: Sides) -> Tensor:
    p = torch.sigmoid(z)
    return p * (p / 0.99).log() + (1 - p) * ((1 - p) / 0.01).log()


CASES: dict[str, tuple[str, dict[str, Any], Formula]] = {
    "dmpo": ("dmpo", {}, _dmpo),
    "dspo": ("dspo", {}, _dspo),
    "dspo of SDXL": ("dspo", {"variant": "sdxl"}, lambda z, *_: torch.sigmoid(-z) ** 2),
    "linear-dpo": ("linear-dpo", {}, lambda z, *_: 2 / 50 * (0.2 * z**2 - z / 2)),
    "linear-dpo as released": (
        "linear-dpo",
        {"compat": "released"},
        lambda z, error, *_: (0.5 - 0.4 * z).clamp(1e-3, 0.999).detach() * (error[0] - error[1]),
    ),
    "alpha-dpo": ("alpha-dpo", {"alpha": 0.7}, lambda z, *_: _alpha(z, 0.7)),
    "dynamic alpha-dpo": (
        "alpha-dpo",
        {"alpha": 0.9, "dynamic": True},
        lambda z, *_: _alpha(z, 0.9 * float(torch.sigmoid(z.detach()).mean())),
    ),
    "poly-dpo": ("poly-dpo", {}, lambda z, *_: -logsigmoid(z) + 8 * torch.sigmoid(-z)),
    "snpo": (
        "snpo",
        {"swap_probability": 0.0},
        lambda z, error, gap, *_: -logsigmoid(-50 * (gap[0] + (0.9 * torch.exp(-gap[1]) + 0.1).log())),
    ),
    "mapo": ("mapo", {"beta": 0.1}, _mapo),
    "anchored": ("diffusion-dpo", {"anchor": 3.0}, lambda z, error, gap, q: -logsigmoid(z) + 1.5 * (q[0] + q[1])),
    "fine-tuned": ("inpo", {"sft_weight": 2.0}, lambda z, error, *_: -logsigmoid(z) + 2 * error[0]),
}
WON = torch.linspace(1, 0, 8, dtype=torch.float64)  # all winners have the higher scores
SMALL = {"inpo": {"num_inference_steps": 4}, "smpo": {"num_inference_steps": 3}}


def run(name: str, batch: PairBatch | None = None, **options: Any) -> ObjectiveOutput:
    objective = build_objective(name, sd_schedule(), **{"beta": 50.0, **SMALL.get(name, {}), **options})
    return objective(Policy(), REFERENCE, batch or pairs(), seed=0)


def gradient(output: ObjectiveOutput) -> Tensor:
    return torch.autograd.grad(output.loss, output.policy_pred, retain_graph=True)[0]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_formula(case: str) -> None:
    name, options, formula = CASES[case]
    output = run(name, **options)
    assert output.target is not None
    p, r, target = output.policy_pred.detach().requires_grad_(), output.reference_pred, output.target

    def sides(value: Tensor) -> Sides:
        winner, loser = value.flatten(1).mean(1).chunk(2)
        return winner, loser

    error, gap = sides((p - target) ** 2), sides((p - target) ** 2 - (r - target) ** 2)
    expected = formula(-25 * (gap[0] - gap[1]), error, gap, sides((p - r) ** 2)).mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(output), torch.autograd.grad(expected, p)[0], rtol=1e-8, atol=1e-13)
    errors = torch.cat(sides((r - target) ** 2)).detach()
    torch.testing.assert_close(output.reference_mse, errors, atol=1e-12, rtol=1e-9)


def _lambda(output: ObjectiveOutput, mu: float) -> Tensor:
    assert output.target is not None
    winner, loser = (output.policy_pred.detach() - output.target).flatten(1).chunk(2)
    inner = (winner * loser).sum(1)
    return torch.where(inner > 0, ((1 - mu) * winner.square().sum(1) / inner).clamp(0, 1), 1.0)


@pytest.mark.parametrize("name", [name for name in PAIRED if issubclass(METHODS[name], SingleTimestepMethod)])
def test_a_safeguard_scales_the_gradients_of_losers_pair_by_pair_and_nothing_else(name: str) -> None:
    options = {"swap_probability": 0.0} if name == "snpo" else {}
    batch = dataclasses.replace(pairs(), scores=WON)
    plain, guarded = (run(name, batch, safeguard=mu, sft_weight=0.1, **options) for mu in (None, 0.6))
    assert torch.equal(guarded.loss, plain.loss)
    scale = _lambda(plain, 0.6)
    assert (scale < 1).any() or name in SMALL
    expected = gradient(plain) * torch.cat([torch.ones(4), scale]).view(-1, 1, 1, 1)
    torch.testing.assert_close(gradient(guarded), expected, rtol=1e-9, atol=1e-15)


def test_a_safeguard_as_released_has_one_scale_for_the_micro_batch() -> None:
    plain, guarded = (run("diffusion-dpo", compat="released", safeguard=mu) for mu in (None, 0.6))
    scale = (gradient(guarded)[4:] / gradient(plain)[4:]).flatten(1)
    torch.testing.assert_close(scale, scale[:1, :1].expand_as(scale))
    assert 0 < float(scale[0, 0]) < 1


def test_the_loser_of_a_pair_with_a_negative_weight_is_its_winner() -> None:
    policy, reference, target = predictions(4, gap=0.1)
    weight = torch.tensor([1.0, -1.0, 2.0, -3.0], dtype=torch.float64)
    reversed_ = (weight < 0).repeat(2).view(-1, 1, 1, 1)
    method = DiffusionDPO(beta=5.0, safeguard=0.9)
    gradients = []
    for swap in (False, True):
        p, r, t = (torch.where(reversed_ & swap, x.roll(4, 0), x) for x in (policy, reference, target))
        leaf = p.requires_grad_()
        method.loss(leaf, r, t, weight.abs() if swap else weight).loss.backward()
        assert leaf.grad is not None
        gradients.append(torch.where(reversed_ & swap, leaf.grad.roll(4, 0), leaf.grad))
    torch.testing.assert_close(*gradients)


def test_an_anchor_is_not_scaled_by_the_safeguard() -> None:
    plain, anchored = (run("sdpo", safeguard=1.0, anchor=anchor) for anchor in (0.0, 2.0))
    shift = anchored.policy_pred.detach() - anchored.reference_pred
    torch.testing.assert_close(gradient(anchored) - gradient(plain), 2 * 2.0 * shift / shift.numel())


def test_mapo_makes_no_forward_pass_of_a_reference() -> None:
    def refuse(*arguments: Any) -> Tensor:
        raise AssertionError("the reference made a forward pass")

    assert not build_objective("mapo", sd_schedule())(Policy(), refuse, pairs(), seed=0).reference_mse.any()


@pytest.mark.parametrize("name", ["diffusion-dpo", "smpo", "snpo"])
def test_an_automatic_beta_follows_the_average_gap_and_keeps_its_state(name: str) -> None:
    options = {"swap_probability": 0.0} if name == "snpo" else {}
    batch = dataclasses.replace(pairs(), scores=WON)
    constant = run(name, batch, beta=1e5, **options).margin
    method = METHODS[name](beta=1e5, auto_beta=0.2, **SMALL.get(name, {}), **options)
    objective = method.objective(sd_schedule())
    found = [objective(Policy(), REFERENCE, batch, seed=0) for _ in range(2)]
    assert objective.auto_beta is not None
    for output in found:  # the same gap each time, so its average stays: β = 2·logit/mean |Δ_w − Δ_l|
        torch.testing.assert_close(output.margin, constant * (2 * math.log(4) / (2 * constant.abs().mean())))
    objective(Policy(2e-2), REFERENCE, batch, seed=0)
    other = method.objective(sd_schedule())
    assert other.auto_beta is not None
    first = other(Policy(), REFERENCE, batch, seed=0)
    other.auto_beta.load_state_dict(objective.auto_beta.state_dict())
    again, once_more = (which(Policy(), REFERENCE, batch, seed=0) for which in (objective, other))
    assert torch.equal(again.loss, once_more.loss)
    assert not torch.equal(again.loss, first.loss)
    assert 1e2 < float(objective.auto_beta.beta) < 1e5
    assert isinstance(method, SingleTimestepMethod)
    with pytest.raises(InvalidInput, match=r"^auto_beta = 0.2: asks for an average over steps"):
        method.loss(*predictions(4, gap=0.1))


def test_means_over_the_batch_are_over_the_pairs_of_all_processes() -> None:
    whole, other = predictions(4, gap=0.1), torch.tensor([-2.0, 3.0, 0.5, 1.0])
    for method in (AlphaDPO(beta=5.0, alpha=0.7, dynamic=True), DiffusionDPO(beta=500.0, auto_beta=0.3)):
        auto = [method.new_auto_beta() for _ in range(2)]
        alone, both = (
            method.loss(*whole, gather=gather, auto_beta=own)
            for gather, own in zip((None, lambda margin: torch.cat([margin, other.to(margin)])), auto, strict=True)
        )
        assert both.margin.shape == (4,) and not torch.equal(alone.loss, both.loss)
        if isinstance(method, AlphaDPO):
            alpha = 0.7 * float(torch.cat([both.margin.detach(), other.double()]).sigmoid().mean())
            torch.testing.assert_close(both.loss, _alpha(both.margin, alpha).mean())


def test_reversed_pairs_change_sides_and_lose_their_prompt() -> None:
    batch = pairs(64)
    method = METHODS["snpo"](swap_probability=0.25)  # type: ignore[call-arg]
    assert isinstance(method, SingleTimestepMethod) and method.guided
    seen = method.prepare(batch, seed=3)
    swapped = (seen.latents[:64] != batch.latents[:64]).flatten(1).any(1)
    assert 8 <= int(swapped.sum()) <= 24
    assert torch.equal(seen.latents[64:][swapped], batch.latents[:64][swapped])
    assert torch.equal(seen.latents[64:][~swapped], batch.latents[64:][~swapped])
    assert not seen.conditioning["prompt"].view(2, 64)[:, swapped].any()
    assert torch.equal(
        seen.conditioning["prompt"].view(2, 64)[:, ~swapped], batch.conditioning["prompt"].view(2, 64)[:, ~swapped]
    )
    alone = method.prepare(select(batch, [5]), seed=3)
    assert torch.equal(alone.latents[0], seen.latents[5])  # drawn by the pair's number
    with pytest.raises(InvalidInput, match=r"^batch.unconditional = None: is what reversed pairs"):
        method.prepare(dataclasses.replace(batch, unconditional=None), seed=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dmpo", {"utility": "hinge"}, r"^utility = 'hinge': is not used by dmpo, which has a loss of its own"),
        ("mapo", {"label_smoothing": 0.1}, r"^label_smoothing = 0.1: is not used by mapo"),
        ("diffusion-dpo", {"utility": "dmpo"}, r"^utility = 'dmpo': is not known"),
        ("sdpo", {"safeguard": True}, r"^safeguard = True: out of range"),
        ("inpo", {"safeguard": -0.1}, r"^safeguard = -0.1: out of range"),
        ("mapo", {"anchor": 1.0}, r"^anchor = 1.0: needs a reference, which mapo has not"),
        ("smpo", {"sft_weight": -1.0}, r"^sft_weight = -1.0: must be finite and not negative"),
        ("linear-dpo", {"reference": "moving"}, r"^reference = 'moving': is not known"),
        ("linear-dpo", {"reference_decay": 1.0}, r"^reference_decay = 1.0: out of range"),
        ("linear-dpo", {"reference_decay": 0.9}, r"^reference_decay = 0.9: means nothing for a frozen reference"),
        ("linear-dpo", {"reference_every": 5}, r"^reference_every = 5: means nothing for a frozen reference"),
        ("linear-dpo", {"reference": "ema", "reference_every": 0}, r"^reference_every = 0: must be a whole number"),
        ("inpo", {"auto_beta": 0.5}, r"^auto_beta = 0.5: out of range"),
        ("mapo", {"auto_beta": 0.2}, r"^auto_beta = 0.2: chooses the scale of a margin, and β of mapo is more"),
        ("sdpo", {"auto_beta": 0.2, "utility": "ipo"}, r"^auto_beta = 0.2: .*β of ipo is more"),
        ("snpo", {"swap_probability": 1.5}, r"^swap_probability = 1.5"),
        ("snpo", {"error_scale": 0.0}, r"^error_scale = 0.0"),
        ("mapo", {"train_timesteps": 0}, r"^train_timesteps = 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        METHODS[name](**options)


def test_utilities_and_pair_weights_pass_through_the_sums() -> None:
    """What one fused op computes, and the same from the sums, because an additional term is asked for."""
    inputs, weight = predictions(4, gap=0.1), torch.tensor([1.0, -2.0, 0.0, 3.0])
    for options in ({}, {"utility": "ipo"}, {"utility": "cdpo", "label_smoothing": 0.1}):
        fused, summed = (DiffusionDPO(beta=50.0, anchor=a, **options) for a in (0.0, 1e-30))  # type: ignore[arg-type]
        one, other = fused.loss(*inputs, weight), summed.loss(*inputs, weight)
        for name in ("loss", "margin", "policy_mse", "reference_mse"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)
    assert SmPO(safeguard=0.5).needs_scores


@pytest.mark.parametrize("name", ["sdpo", "alpha-dpo", "mapo"])
def test_a_loss_compiles_without_a_break(name: str) -> None:
    method, inputs = METHODS[name](), predictions(4, gap=0.1, dtype=torch.float32)  # type: ignore[call-arg]
    assert isinstance(method, SingleTimestepMethod)
    given = (inputs[0], inputs[1] if method.needs_reference else None, inputs[2])
    compiled = torch.compile(method.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given).loss, method.loss(*given).loss)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("further")
    (root / "model").mkdir()
    tiny.write_model(root / "model")
    tiny.write_data(root / "pairs.parquet")
    return root


@pytest.mark.parametrize("name", [name for name in PAIRED if name not in tiny.METHODS])
def test_it_trains(name: str, workspace: Path) -> None:
    values = tiny.mapping(
        workspace, training={"steps": 3, "batch_size": 2}, output={"directory": str(workspace / name)}
    )
    values["method"] = {"name": name, "sft_weight": 0.01}
    result = train(TrainConfig.from_mapping(values), progress=False)
    assert result.steps == 3
    start, end = tiny.unet().state_dict(), tiny.weights(result)
    assert max(float((end[key] - start[key]).abs().max()) for key in end) > 1e-5
