"""The versions that `make` installs, .ci/constraints.txt, are of what pyproject.toml asks for, on every Python."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.layout import ROOT, pyproject

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Each build of PyTorch brings its own.
FREE = {"torch", "triton"}


def constraints() -> list[Requirement]:
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def holds(requirement: Requirement, python: str) -> bool:
    """Whether it counts for that Python on Linux."""
    there = {"python_version": python, "python_full_version": f"{python}.4", "sys_platform": "linux", "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(there)


def needed(python: str) -> Iterator[Requirement]:
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["train"], *extras["dev"]]:
        requirement = Requirement(text)
        if holds(requirement, python):
            yield requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_one_version_of_every_package_is_pinned(python: str) -> None:
    pinned: dict[str, str] = {}
    for constraint in constraints():
        assert re.fullmatch(r"==[\w.]+", str(constraint.specifier)), constraint
        if holds(constraint, python):
            assert constraint.name not in pinned, constraint
            pinned[canonicalize_name(constraint.name)] = str(constraint.specifier).removeprefix("==")
    assert not FREE & pinned.keys()
    assert [name for name in pinned if name.startswith(("nvidia-", "cuda-"))] == []
    for requirement in needed(python):
        if requirement.name not in FREE:
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}: make constraints"


def test_every_requirement_has_a_lower_bound_that_can_be_tried() -> None:
    """`make test-oldest` installs exactly these."""
    bounded = {
        requirement.name: {clause.operator for clause in requirement.specifier} for requirement in needed("3.10")
    }
    assert [name for name, operators in bounded.items() if not operators & {">=", "=="}] == []
