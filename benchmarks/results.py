"""Results as files: what they say about where they come from, and two of them compared."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastinvdpo
from fastinvdpo.errors import invalid
from fastinvdpo.ops import native

SCHEMA = 1
KEY = ("op", "model", "pairs", "timesteps", "dtype", "mode", "provider")
"""What identifies a row."""

Result = dict[str, Any]


def origin(device: torch.device) -> Result:
    """Device, versions, commit and date of a run that begins now."""
    commit, changed = _commit()
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": changed,
        "device": _device(device),
        "versions": {
            "fastinvdpo": fastinvdpo.__version__,
            "torch": torch.__version__,
            "triton": _triton(),
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "native": native.build_info(),
    }


def write(result: Result, directory: Path, prefix: str = "") -> Path:
    """The result as ``directory/<device>/<prefix><date>-<commit>.json``; returns that path. A reader, and whoever stops
    the process, finds the whole of what was written last.
    """
    folder = directory / slug(result["device"]["name"])
    folder.mkdir(parents=True, exist_ok=True)
    date = re.sub(r"\D", "", result["date"][:19])
    path = folder / f"{prefix}{date}-{(result['commit'] or 'unknown')[:9]}.json"
    begun = path.with_suffix(".part")
    begun.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    begun.replace(path)
    return path


def read(path: Path) -> Result:
    """A result that was written before.

    Raises:
        InvalidInput: the file cannot be read or holds no result of this schema.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise invalid("results", str(path), f"cannot be read ({error})", "name a JSON file of this command") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise invalid("results", str(path), f"holds no results of schema {SCHEMA}", "measure again with this version")
    return result


def compare(new: Result, old: Result) -> list[Result]:
    """Rows that both hold: ``{**key, "old", "new", "ratio"}``, medians in milliseconds; a ratio above 1 is faster now.

    A ratio is None where either result is wrong.
    """
    known = {_key(row): row for row in old["results"]}
    compared = []
    for row in new["results"]:
        before = known.get(_key(row))
        if before is not None and "milliseconds" in before and "milliseconds" in row:  # not: out of memory
            medians = [each["milliseconds"]["median"] for each in (before, row)]
            right = before["correct"] and row["correct"]
            ratio = medians[0] / medians[1] if right else None
            compared.append(
                {**dict(zip(KEY, _key(row), strict=True)), "old": medians[0], "new": medians[1], "ratio": ratio}
            )
    return compared


def summary(compared: Sequence[Result]) -> dict[str, float]:
    """The geometric mean of the ratios of every provider."""
    ratios: dict[str, list[float]] = {}
    for row in compared:
        if row["ratio"] is not None:
            ratios.setdefault(row["provider"], []).append(math.log(row["ratio"]))
    return {provider: math.exp(sum(logs) / len(logs)) for provider, logs in ratios.items()}


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _device(device: torch.device) -> Result:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": found.name,
            "compute_capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
        }
    threads = torch.get_num_threads()
    return {
        "type": "cpu",
        "name": f"{_processor()}, {threads} thread{'s' * (threads > 1)}",
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout that this file is in, and whether files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a repository that merely holds an installation
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None
