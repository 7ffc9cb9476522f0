"""The loss blocks for people's own loops, against what the released lines gave on recorded predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastinvdpo import InvalidInput, losses
from fastinvdpo.losses import AutoBeta
from fastinvdpo.methods.alpha_dpo import alpha_divergence
from tests.cases import GOLDEN, load_golden, predictions

Recorded = dict[str, Tensor]
Block = Callable[[Recorded, dict[str, Any], Tensor, torch.dtype], dict[str, Tensor]]


def _inputs(record: Recorded, policy: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return policy, record["in.ref_pred"].to(dtype), record["in.target"].to(dtype)


def _logged(block: Any) -> dict[str, Tensor]:
    return {"out.loss": block.loss, "mean_model_loss": block.raw_model_loss, "mean_ref_loss": block.raw_ref_loss,
            "out.implicit_acc": block.implicit_acc}  # fmt: skip


def sdpo(record: Recorded, settings: dict[str, Any], policy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    options = {"beta": settings["beta"], "mu": settings["mu"], "compat": "released"}
    if settings["method"] != "diffusion-dpo":
        options["mu"] = settings["mu"] if settings["safeguard"] else None
    if settings["method"] == "dmpo":
        options["alpha"] = settings["dmpo_alpha"]
    block = getattr(losses, settings["method"].replace("diffusion-dpo", "sdpo"))
    result = block(*_inputs(record, policy, dtype), **options)
    return _logged(result) | {"mid.loser_scale": result.avg_lose_l_scale}


def dspo(record: Recorded, settings: dict[str, Any], policy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    variant = "sdxl" if settings["sdxl"] else "sd15"
    return _logged(losses.dspo(*_inputs(record, policy, dtype), beta=settings["beta"], variant=variant))


def linear(record: Recorded, settings: dict[str, Any], policy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    result = losses.linear_dpo(*_inputs(record, policy, dtype), **settings)
    return _logged(result) | {"mid.ratio": result.ratio, "mid.clip_ratio": result.clip_ratio}


def alphadpo(record: Recorded, settings: dict[str, Any], policy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    result = losses.alpha_dpo(*_inputs(record, policy, dtype), **settings, gather=lambda tensor: tensor)
    return _logged(result) | {"mid.alpha": result.alpha}


def mapo(record: Recorded, settings: dict[str, Any], policy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    result = losses.mapo(policy, record["in.target"].to(dtype), **settings)
    errors = torch.cat([result.model_losses_w, result.model_losses_l])
    return {"out.loss": result.loss, "mid.model_losses": errors, "mid.ratio_losses": result.ratio_losses}


def kto(record: Recorded, settings: dict[str, Any], policy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    assert settings["offset"] in ("none", "original")
    kappa = None
    if settings["offset"] == "original":
        rolled = (record[f"in.{name}_pred_rolled"].to(dtype) for name in ("policy", "ref"))
        kappa = losses.mean_reward(*rolled, record["in.target"].to(dtype))
    weights = {"like_weight": settings["lam_d"], "dislike_weight": settings["lam_u"]}
    inputs = _inputs(record, policy, dtype)
    options = {"beta": settings["beta"], "halo": settings["halo"], "kappa": kappa}
    result = losses.kto(*inputs, record["in.labels"], **options, **weights)
    return _logged(result) | {"mid.kl": result.kl, "mid.signed_logit": result.logit}


def flowdpo(record: Recorded, settings: dict[str, Any], policy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    _, reference, target = _inputs(record, policy, dtype)
    options = {"norm": settings["norm_type"], "anchor": settings["anchor_alpha"], "sft_weight": 0.0, "mask": None}
    options["loss_weight"], mask = settings["loss_weight"], {}
    if settings["mask_type"]:
        options["mask"] = losses.latent_mask(record["in.mask_image"].to(dtype), (8, 8), dilate=settings["mask_dilate"])
        mask["mid.mask"] = options["mask"]
    beta: float | AutoBeta = settings["beta"]
    if settings["auto_beta"]:
        names = ("target_gf", "decay", "min", "max")
        beta = AutoBeta(*(settings[f"auto_beta_{name}"] for name in names))
        for step in (2.0, 1.5):  # an uninterrupted run, and one that went on from a checkpoint
            losses.flow_dpo(reference + step * (policy.detach() - reference), reference, target, beta=beta, **options)
            stored, beta = beta.state_dict(), AutoBeta(*(settings[f"auto_beta_{name}"] for name in names))
            beta.load_state_dict(stored)
    result = losses.flow_dpo(policy, reference, target, beta=beta, **options)
    accuracy = (result.inside_term.detach() > 0).double().mean()
    found = {"out.loss": result.loss, "mid.beta": result.beta, "out.inside_term": result.inside_term}
    return found | mask | {"out.implicit_acc": accuracy} | {f"logs.flow_dpo_{name}": getattr(result, name) for name in (
        "margin", "win_adv", "lose_adv", "policy_win_err", "policy_lose_err", "ref_win_err", "ref_lose_err",
        "negative_margin_pct", "gradient_factor")}  # fmt: skip


BLOCKS: dict[str, Block] = {
    "sdpo": sdpo, "dspo": dspo, "linear": linear, "alphadpo": alphadpo, "mapo": mapo, "kto": kto, "flowdpo": flowdpo,
}  # fmt: skip
RECORDS = [f"{name}/{path.stem}" for name in BLOCKS for path in sorted((GOLDEN / name).glob("*.json"))]
RECORDS.remove("linear/ema_decay099")
# Where the released lines lose digits in float64 as well, or take a logarithm in float32.
COARSE = {"mapo/b2_default", "mapo/b4_beta1_snr2", "flowdpo/b4_auto_beta"}


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().flatten(), expected.double().flatten()
    return float((found - expected).norm()) / (float(expected.norm()) or 1.0)


def differences(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of everything that the record has, and of the gradient."""
    (record, run), block = load_golden(name), BLOCKS[name.partition("/")[0]]
    policy = record["in.policy_pred"].to(dtype).requires_grad_()
    found = block(record, run["settings"], policy, dtype)  # type: ignore[arg-type]
    means = {
        f"mean_{side}_loss": record[f"mid.{side}_losses"].mean()
        for side in ("model", "ref")
        if f"mid.{side}_losses" in record
    }
    known: dict[str, Any] = record | run | {f"logs.{key}": value for key, value in run.get("logs", {}).items()} | means  # type: ignore[attr-defined]
    expected = {key: torch.as_tensor(known[key]).detach() for key in found}
    (gradient,) = torch.autograd.grad(found["out.loss"], policy)
    errors = {key: relative(value, expected[key]) for key, value in found.items()}
    return errors | {"grad.policy_pred": relative(gradient, record["grad.policy_pred"])}


@pytest.mark.parametrize("name", RECORDS)
def test_a_recorded_run(name: str) -> None:
    """In float32 the released lines are off by up to 2e-4 in the gradient, and MaPO's by more."""
    errors, single = differences(name, torch.float64), differences(name, torch.float32)
    bound = 1e-7 if name in COARSE else 1e-9
    # What was logged went through float32.
    assert {key: error for key, error in errors.items() if not error < (1e-7 if "logs" in key else bound)} == {}
    # What is logged beside are means over pairs, which cancel.
    assert {key: error for key, error in single.items() if not (error < 3e-6 or "logs" in key)} == {}


def test_the_recorded_reference_follows_the_policy() -> None:
    record, run = load_golden("linear/ema_decay099")
    weights, averages = record["in.policy_weight"].double(), record["out.ema_weight"]

    def module(weight: Tensor, buffer: Tensor, dtype: torch.dtype) -> torch.nn.Module:
        result = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=dtype)
        result.weight.data.copy_(weight)
        result.register_buffer("statistic", buffer.to(dtype, copy=True))
        return result

    reference = module(averages[0], torch.zeros(record["out.ema_buffer"].shape[1]), torch.float64)
    for step, weight in enumerate(weights[-len(averages) + 1 :], start=1):
        buffer = record["out.ema_buffer"][step]
        losses.update_reference(reference, module(weight, buffer, torch.float64), run["settings"]["decay"])  # type: ignore[index]
        assert relative(reference.weight, averages[step]) < 1e-9
        assert torch.equal(reference.statistic, buffer.double())
    with pytest.raises(InvalidInput, match=r"^reference = torch.float16: cannot be averaged in"):
        losses.update_reference(module(averages[0], buffer, torch.float16), reference, 0.99)


# What the released expressions lose


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("compat", [None, "released"])
@pytest.mark.parametrize("side", [64, 128])
def test_the_safeguard_works_in_half_precision(dtype: torch.dtype, bound: float, compat: Any, side: int) -> None:
    """The released expression, whose sums underflow in half precision, finds 1 there."""
    noise = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target, error = noise[:1].repeat(2, 1, 1, 1), 0.1 * noise[1:]
    policy = (target + error[0] * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1).double()).to(dtype)
    wide = policy.double() - target.to(dtype).double()
    guard = 1e-9 * 4 * side**4 if compat else 0.0  # 1e-9 beside 4/n² times the sum
    exact = 0.1 * float(wide[0].square().sum() / ((wide[0] * wide[1]).sum() + guard))
    assert exact == pytest.approx(0.2, rel=0.01)
    result = losses.sdpo(policy, target.to(dtype), target.to(dtype), mu=0.9, compat=compat)
    assert float(result.avg_lose_l_scale) == pytest.approx(exact, rel=bound)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.99, 0.9999, 1.0, 1.0001, 2.0])
def test_the_divergence_has_no_nan_and_keeps_its_digits(alpha: float) -> None:
    """The released expression is NaN below z = −90, and off by 1e-3 … 2e-2 near α = 1."""
    points = [-200.0, -90.0, -5.0, 0.0, 2.0, 5.0, 90.0, 200.0]
    values, slopes = [], []
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor(points, dtype=dtype, requires_grad=True)
        value = alpha_divergence(z, torch.tensor(alpha, dtype=torch.float32).to(dtype))
        values.append(value.detach().double())
        slopes.append(torch.autograd.grad(value.sum(), z)[0].double())
    torch.testing.assert_close(values[0], values[1], rtol=3e-5, atol=1e-8)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=3e-5, atol=1e-37)
    if alpha != 1:
        z = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
        p = torch.sigmoid(z)
        formula = (p**alpha - (1 - alpha) - alpha * p) / (alpha * (alpha - 1))
        torch.testing.assert_close(alpha_divergence(z, torch.tensor(alpha).double()), formula, rtol=1e-6, atol=1e-11)


def test_mapo_keeps_its_digits_at_small_errors() -> None:
    """The released float32 expression has a relative gradient error of 0.24 at an error of 1e-3."""
    generator = torch.Generator().manual_seed(0)
    target, error = torch.randn(2, 8, 4, 8, 8, generator=generator, dtype=torch.float64)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        policy = (target + 1e-3**0.5 * error).float().to(dtype).requires_grad_()
        gradients.extend(torch.autograd.grad(losses.mapo(policy, target.float().to(dtype), beta=1.0).loss, policy))
    assert relative(gradients[0], gradients[1]) < 1e-5


def test_mapo_is_the_same_function_on_both_sides_of_its_series() -> None:
    for size in (1e-4, 0.1, 0.98, 1.0, 1.02, 30.0):
        target = torch.zeros(2, 4, dtype=torch.float64)
        policy = torch.full((2, 4), size**0.5, dtype=torch.float64)
        policy[1] *= 1.1
        x = 0.5 * policy[:, 0].square()
        phi = x / torch.expm1(x)
        expected = torch.nn.functional.logsigmoid(1000 * (phi[0] - phi[1])) * 0.1
        found = losses.mapo(policy, target).ratio_losses[0].detach()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


# Methods without a record


def test_poly_dpo_is_its_formula() -> None:
    inputs = predictions(4, gap=0.1)
    for alpha in (8.0, 0.0, -1.0):
        result = losses.poly_dpo(*inputs, beta=50.0, alpha=alpha)
        z = result.margin
        torch.testing.assert_close(result.loss, (-torch.sigmoid(z).log() + alpha * torch.sigmoid(-z)).mean())


def test_snpo_is_its_formula_and_bounds_what_a_worse_loser_earns() -> None:
    policy, reference, target = predictions(4, gap=0.1)
    for scale in (1.0, 100.0):
        leaf = policy.clone().requires_grad_()
        result = losses.snpo(leaf, reference, target, beta=3.0, error_scale=scale)
        other = policy.clone().requires_grad_()
        gap = scale * ((other - target).square() - (reference - target).square()).flatten(1).mean(1)
        winner, loser = gap.chunk(2)
        z = -3.0 * (winner + torch.log(0.9 * torch.exp(-loser) + 0.1))
        expected = torch.nn.functional.softplus(-z).mean()
        torch.testing.assert_close(result.margin, z)
        torch.testing.assert_close(torch.autograd.grad(result.loss, leaf), torch.autograd.grad(expected, other))
    spoilt = torch.cat([reference[:4], reference[4:] + 100.0])
    result = losses.snpo(spoilt, reference, target, beta=1.0)
    assert float(result.margin.max()) == pytest.approx(-torch.log(torch.tensor(0.1)).item())
    # At the reference the loser counts λ, whichever branch it is on.
    leaf = reference.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.snpo(leaf, reference, target, beta=2.0).loss, leaf)
    (plain,) = torch.autograd.grad(losses.snpo(leaf, reference, target, beta=2.0, loser_share=1.0).loss, leaf)
    torch.testing.assert_close(gradient[4:], 0.9 * plain[4:])
    torch.testing.assert_close(gradient[:4], plain[:4])


def test_pnapo_takes_a_target_for_each_side_and_weighs_by_the_reward() -> None:
    inputs, gap = predictions(3, gap=0.1), torch.tensor([0.0, 1.0, -2.0])
    result = losses.pnapo(*inputs, beta=20.0, reward_gap=gap, schedule_weight=0.5)
    plain = losses.pnapo(*inputs, beta=20.0, reward_gap=torch.full((3,), 1e9)).margin
    torch.testing.assert_close(result.margin, 0.5 * torch.tanh(gap / 2).double() * plain, rtol=1e-6, atol=1e-12)


def test_a_balanced_baseline_does_not_follow_the_mix_of_labels() -> None:
    policy, reference, target = predictions(3, gap=0.1)
    liked = torch.tensor([True, True, True, True, True, False])
    result = losses.kto(policy, reference, target, liked, baseline="balanced")
    assert float(result.diff_pos) == pytest.approx(-float(result.diff_neg))
    everywhere = losses.kto(policy[:5], reference[:5], target[:5], liked[:5], gather=lambda tensor: tensor.repeat(2))
    assert float(everywhere.kl) == float(losses.kto(policy[:5], reference[:5], target[:5], liked[:5]).kl)


@pytest.mark.parametrize("halo", losses.HALOS)
def test_every_halo_prefers_liked_images(halo: str) -> None:
    """The gradient pulls errors of liked images down and those of disliked ones up."""
    policy, reference, target = predictions(4, gap=1e-3)
    leaf, liked = policy.requires_grad_(), torch.arange(8) < 4
    result = losses.kto(leaf, reference, target, liked, beta=10.0, halo=halo)
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    along = (gradient * (policy - target)).flatten(1).sum(1)
    assert (along[:4] > 0).all() and (along[4:] < 0).all()


def test_masks_weigh_elements_and_their_norms_agree() -> None:
    policy, reference, target = predictions(2, gap=0.1)
    mask = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    count = 4 * mask.sum((1, 2, 3))
    by_norm = {
        norm: losses.flow_dpo(policy, reference, target, beta=1.0, mask=mask, norm=norm).inside_term
        for norm in ("sum", "mean", "masked_mean")
    }
    torch.testing.assert_close(by_norm["sum"], 256 * by_norm["mean"])
    torch.testing.assert_close(by_norm["sum"], count * by_norm["masked_mean"])
    hidden = torch.where(mask.bool(), policy.unflatten(0, (2, 2)), 7.0).flatten(0, 1)
    seen = losses.flow_dpo(hidden, reference, target, beta=1.0, mask=mask).inside_term
    torch.testing.assert_close(seen, by_norm["sum"])


def test_a_segmentation_is_one_where_anything_is_shown_and_grows_when_dilated() -> None:
    image = torch.full((1, 3, 16, 16), -1.0)
    image[0, 1, 4, 4] = 1.0
    mask = losses.latent_mask(image, (8, 8), kind="segmentation")
    assert mask.sum() == 1 and mask[0, 0, 2, 2] == 1
    assert losses.latent_mask(image, (8, 8), kind="segmentation", dilate=1).sum() == 9


X, LIKED = torch.ones(4, 3), torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.sdpo(X, X, X, mu=1.5), "safeguard = 1.5"),
        (lambda: losses.dmpo(X, X, X, alpha=1.0), "alpha = 1.0"),
        (lambda: losses.dspo(X, X, X, variant="sd2"), "variant = 'sd2'"),
        (lambda: losses.dspo(X, X, X, variant="sdxl"), "beta = 0.001: leaves the margin of sdxl at 0"),
        (lambda: losses.latent_mask(X, (8, 8)), "image = '(4, 3), torch.float32'"),
        (lambda: losses.pnapo(X, X, X, beta=1.0, reward_gap=0.1), "reward_gap = 0.1"),
        (lambda: losses.linear_dpo(X, X, X, eta=0.5), "eta = 0.5"),
        (lambda: losses.alpha_dpo(X, X, X, alpha=0.0), "alpha = 0.0"),
        (lambda: losses.poly_dpo(X, X, X, alpha=-1.1), "alpha = -1.1"),
        (lambda: losses.snpo(X, X, X, loser_share=0.0), "loser_share = 0.0"),
        (lambda: losses.mapo(X, X, snr=-1.0), "snr = -1.0"),
        (lambda: losses.kto(X, X, X, LIKED, halo="logistic"), "halo = 'logistic'"),
        (lambda: losses.kto(X, X, X, LIKED.float()), "liked = '(4,), torch.float32'"),
        (lambda: losses.kto(X, X, X, LIKED, baseline="none"), "baseline = 'none'"),
        (lambda: losses.flow_dpo(X, X, X, norm="median"), "norm = 'median'"),
        (lambda: losses.flow_dpo(X, X, X, beta=0.0), "beta = 0.0"),
        (lambda: losses.AutoBeta(target=0.5), "target = 0.5"),
        (lambda: losses.update_reference(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), 1.0), "decay = 1.0"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        call()
    assert str(caught.value).startswith(message) and "Remedy: " in str(caught.value)
