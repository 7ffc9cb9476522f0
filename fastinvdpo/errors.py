"""The errors a user can cause, each naming the argument, the value and the remedy."""

from __future__ import annotations

from typing import Any


class InvalidInput(ValueError):
    """An argument, a configuration key or a data row that cannot be used."""


class MissingExtra(ImportError):
    """An optional dependency that is needed now and not installed."""


class NonFiniteLoss(RuntimeError):
    """Training met a loss that is not a finite number."""


def invalid(argument: str, value: Any, problem: str, remedy: str) -> InvalidInput:
    """Build the error for one bad value: ``raise invalid("beta", beta, "must be positive", "pass 500 to 5000")``."""
    shown = repr(value)
    if len(shown) > 200:
        shown = shown[:197] + "..."
    return InvalidInput(f"{argument} = {shown}: {problem}. Remedy: {remedy}.")
