"""A model and pairs in ``workspace``, written once and copied for each test; and a server that forks processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fastinvdpo.trainer import cache_writing
from tests.trainer import forked, tiny


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    tiny.write_model(root / "model")
    tiny.write_data(root / "pairs.parquet")
    return root


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "workspace"))


@pytest.fixture(scope="session")
def forks() -> Iterator[forked.Server]:
    with closing(forked.Server()) as server:
        yield server


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four shards of a cache: three, three, three pairs and one."""
    monkeypatch.setattr(cache_writing, "PAIRS_PER_SHARD", 3)
