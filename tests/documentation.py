"""The commands that the documentation shows, read from its pages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from tests.data.test_pairs import row, store
from tests.evaluation import tiny_clip
from tests.layout import ROOT
from tests.models import tiny

# Links are pages of the site that have their place elsewhere, such as CHANGELOG.md.
PAGES = [
    "README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if not path.is_symlink()),
]
SHELL = "bash"
_FENCED = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, *languages: str) -> list[str]:
    """What stands in a page's fenced blocks, of some languages or of all."""
    found = _FENCED.findall((ROOT / page).read_text("utf-8"))
    return [text for language, text in found if not languages or language in languages]


def languages(page: str) -> set[str]:
    """The languages that a page's fenced blocks name, ``""`` for one that names none."""
    return {language for language, _ in _FENCED.findall((ROOT / page).read_text("utf-8"))}


def commands(page: str) -> list[str]:
    """Every command of a page's shell blocks, in order: lines that a backslash continues joined, comments left out."""
    lines = [line for text in blocks(page, SHELL) for line in text.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [shlex.join(command) for command in words if command]


def write_place(root: Path, **sections: Any) -> Path:
    """A directory with the files that the pages name: a tiny Stable Diffusion checkpoint, scorers, prompts, pairs and a
    configuration of two steps.
    """
    tiny.sd_pipeline().save_pretrained(root / "base", safe_serialization=True)
    (root / "scorers").mkdir()
    tiny_clip.write_clip(root / "pickscore")
    (root / "scorers" / "clip").symlink_to(root / "pickscore")
    (root / "own.py").write_text("from tests.evaluation.tiny import brightness\n")
    (root / "prompts.txt").write_text("a cat\na red cube\n")
    store(root / "pairs.parquet", [row(i) for i in range(4)])
    run = {
        "model": {"path": "base", "lora": {"rank": 2}},
        "data": {"path": "pairs.parquet", "resolution": 16},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
        "training": {"steps": 2},
        "output": {"directory": "run", "tensorboard": False},
        **sections,
    }
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    return root
