"""One table of utilities: what Triton and C++ compute follows ``fastinvdpo/ops/preference_loss/utilities.py``.

Their values are compared where the kernels run (``interpreted.py``, ``test_native.py``); here are names, order and
constants, which need no compiler.
"""

from __future__ import annotations

import re

from fastinvdpo.ops.preference_loss.utilities import LINEAR_ETA, LINEAR_KAPPA, UTILITIES
from tests.layout import ROOT

HEADER = (ROOT / "csrc" / "utilities.h").read_text("utf-8")
TRITON = (ROOT / "kernels" / "triton" / "_utilities.py").read_text("utf-8")


def test_the_enumeration_of_the_header_has_the_names_in_their_order() -> None:
    (entries,) = re.findall(r"enum class Utility : int \{ (.*) \};", HEADER)
    names = [entry.partition(" = ")[0] for entry in entries.split(", ")]
    assert names == [*(f"k{name.title()}" for name in UTILITIES), "kCount"]
    assert entries.count("=") == 1 and "kSigmoid = 0" in entries


def test_the_constants_of_the_header_are_the_table_s() -> None:
    found = {name: float(value) for name, value in re.findall(r"constexpr double kLinear(\w+) = ([\d.]+);", HEADER)}
    assert found == {"Kappa": LINEAR_KAPPA, "Eta": LINEAR_ETA}


def test_triton_has_every_name_in_value_and_slope() -> None:
    """cdpo and robust, the two with a smoothing, are one form there."""
    (smoothed,) = re.findall(r"def utility_form.*?return utility, 0\.0", TRITON, re.DOTALL)
    named = re.findall(r'utility == "(\w+)"', smoothed)
    assert named == [name for name, utility in UTILITIES.items() if utility.smoothed]
    forms = {"smoothed", *(set(UTILITIES) - set(named))}
    for function in ("utility_value", "utility_slope"):
        (body,) = re.findall(rf"def {function}\(.*?(?=\n\n\n|\Z)", TRITON, re.DOTALL)
        assert set(re.findall(r'UTILITY == "(\w+)"', body)) == forms, function
