"""Utilities ``u(z)`` of the pair objective and their derivatives, by the names of
``fastinvdpo/ops/preference_loss/utilities.py``. ``UTILITY`` is a form, which is compiled in; ``flip`` and ``per_beta``
(1/β) are its parameters.
"""

from __future__ import annotations

import triton
import triton.language as tl


def utility_form(utility: str, label_smoothing: float) -> tuple[str, float]:
    """``(form, flip)``: cdpo and robust are both ``−log σ(z) − flip·z``, form ``smoothed``."""
    if utility == "cdpo":
        return "smoothed", -label_smoothing
    if utility == "robust":
        return "smoothed", label_smoothing / (1 - 2 * label_smoothing)
    return utility, 0.0


@triton.jit
def _softplus(x):
    """``log(1 + eˣ)``, float64."""
    e = tl.exp(-tl.abs(x))
    # 1 + e would lose a tiny e; its series ends where float64 does.
    return tl.maximum(x, 0.0) + tl.where(e < 1e-5, e * (1.0 - e * (0.5 - e * 0.3333333333333333)), tl.log(1.0 + e))


@triton.jit
def utility_value(z, flip, per_beta, UTILITY: tl.constexpr):
    """``u(z)``, float64; the conditions are such that a margin that is not a number gives a loss that is not one."""
    if UTILITY == "sigmoid":
        return _softplus(-z)
    elif UTILITY == "smoothed":
        return _softplus(-z) - flip * z
    elif UTILITY == "hinge":
        return tl.where(z >= 1.0, 0.0, 1.0 - z)
    elif UTILITY == "ipo":
        gap = (z - 0.5) * per_beta
        return gap * gap
    else:
        tl.static_assert(UTILITY == "linear")
        edge = (0.5 - 0.01) / 0.4
        above = edge * (0.2 * edge - 0.5) - (z - edge) * 0.01
        below = edge * (0.2 * edge + 0.5) - (z + edge) * 0.99
        return tl.where(z > edge, above, tl.where(z < -edge, below, z * (0.2 * z - 0.5)))


@triton.jit
def _exp_of_negative(x):
    """``eˣ`` for x ≤ 0, float32. The built-in one multiplies by log₂e first, whose rounding error grows with x."""
    x = tl.where(x < -110.0, -110.0, x)
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(k, 1.9046542121259336e-09, tl.fma(k, -0.6931471824645996, x))  # log 2, in two parts
    tail = 0.1666650521114506 + r * (0.041666464944505696 + r * (0.00836915395971191 + r * 0.0013933647862928863))
    return (1.0 + r * (1.0 + r * (0.5 + r * tail))) * tl.exp2(k)


@triton.jit
def _sigmoid(x):
    e = _exp_of_negative(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0.0, 1.0, e), 1.0 + e)


@triton.jit
def utility_slope(z, flip, per_beta, UTILITY: tl.constexpr):
    """``u'(z)``; its exponential is a float32 one, because here every program takes one."""
    if UTILITY == "sigmoid":
        return -_sigmoid(-z)
    elif UTILITY == "smoothed":
        return -flip - _sigmoid(-z).to(tl.float64)
    elif UTILITY == "hinge":
        return tl.where(z < 1.0, -1.0, 0.0)
    elif UTILITY == "ipo":
        return 2.0 * (z.to(tl.float64) - 0.5) * per_beta * per_beta
    else:
        tl.static_assert(UTILITY == "linear")
        slope = 0.5 - 0.4 * z
        return -tl.where(slope < 0.01, 0.01, tl.where(slope > 0.99, 0.99, slope))
