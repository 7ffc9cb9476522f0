"""``fastinvdpo doctor``: what is installed, which devices and backends there are, and whether the ops compute right.

Needs torch alone, so that it can tell what else is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

import fastinvdpo
from fastinvdpo.errors import InvalidInput
from fastinvdpo.ops import dispatch, native

# The packages of each extra in pyproject.toml.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "accelerate",
        "datasets",
        "diffusers",
        "fsspec",
        "huggingface-hub",
        "matplotlib",
        "numpy",
        "peft",
        "pillow",
        "pyarrow",
        "pydantic",
        "pyyaml",
        "rich",
        "safetensors",
        "scikit-learn",
        "scipy",
        "tensorboard",
        "tqdm",
        "transformers",
        "typer",
    ),
    "xformers": ("xformers",),
    "bnb": ("bitsandbytes",),
}
_ROUNDING = 2.0**-24  # the unit roundoff of float32


def report() -> dict[str, Any]:
    """Everything the doctor finds, made of what JSON can hold.

    Keys: ``fastinvdpo``, ``python``, ``platform``, ``torch`` and ``triton`` (versions; None when absent), ``extras``
    (extra -> package -> version or None), ``too_old`` (package -> the oldest version that was tried, where an older one
    is installed), ``devices``, ``cuda`` (available, and the reason when not),
    ``backend_request``, ``backends`` (op -> device type -> the one chosen, why each of the others is not available, and
    why ``auto`` skips those that it does although they can run), ``native`` (how the extension was built; None without
    one), ``warnings`` (what keeps kernels from running that should), ``checks`` (each op, device, dtype and backend
    that can run against float64) and ``healthy``. Looking for devices initializes CUDA where there is any.
    """
    devices, cuda = _devices()
    device_types = sorted({device["type"] for device in devices})
    checks = [
        _run_check(op, device["name"], dtype, backend)
        for device in devices
        for backend in reversed(dispatch.BACKENDS)  # a kernel that breaks the device must not hide who else was right
        for op in sorted(_CHECKS)
        if backend in _to_check(op, device["type"])
        for dtype in _dtypes(backend, device["type"])
    ]
    asked_by, asked_for = dispatch.requested()
    return {
        "fastinvdpo": fastinvdpo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "too_old": _too_old(),
        "devices": devices,
        "cuda": cuda,
        "native": native.build_info(),
        "warnings": _warnings(),
        "backend_request": {"backend": asked_for, "by": asked_by},
        "backends": {op: {kind: _backends(op, kind) for kind in device_types} for op in sorted(dispatch.IMPLEMENTED)},
        "checks": checks,
        "healthy": all(check["passed"] for check in checks),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [
        f"fastinvdpo {report['fastinvdpo']}, Python {report['python']}, torch {report['torch']}, "
        f"triton {report['triton'] or 'not installed'}",
        report["platform"],
        "",
        "Devices",
    ]
    lines += [f"  {device['name']}: {device['description']}" for device in report["devices"]]
    if not report["cuda"]["available"]:
        lines.append(f"  no CUDA device: {report['cuda']['reason']}")
    lines += ["", "Extras"]
    for extra, packages in report["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        remedy = f"missing {', '.join(missing)}: pip install 'fastinvdpo[{extra}]'" if missing else "complete"
        lines.append(f"  {extra}: {remedy}")
        found = [f"{name} {version}" for name, version in packages.items() if version is not None]
        if found:
            lines.append(f"    {', '.join(found)}")
    lines += [
        f"  {name} is older than {bound}: pip install '{name}>={bound}'" for name, bound in report["too_old"].items()
    ]
    native = report["native"]
    built = "not built" if native is None else ", ".join(f"{name} {value}" for name, value in native.items())
    lines += ["", "Native extension", f"  {built}"]
    request = report["backend_request"]
    lines += ["", f"Backends ({request['backend']}, by {request['by']})"]
    for op, kinds in report["backends"].items():
        for kind, found in kinds.items():
            lines.append(f"  {op} on {kind}: {found['chosen'] or 'none: ' + found['error']}")
            lines += [f"    auto skips {backend}: {reason}" for backend, reason in found["skipped"].items()]
            lines += [f"    cannot run {backend}: {reason}" for backend, reason in found["unavailable"].items()]
    lines += ["", "Checks against float64"]
    for check in report["checks"]:
        what = f"{check['op']} on {check['device']}, {check['backend']}, {check['dtype']}"
        outcome = check["error"] or f"error {check['deviation']:.1e}, allowed {check['allowed']:.1e}"
        lines.append(f"  {'ok' if check['passed'] else 'FAILED'}  {what}: {outcome}")
    lines += ["", *(f"WARNING: {warning}" for warning in report["warnings"])]
    lines += ["Healthy." if report["healthy"] else "Not healthy: a check failed."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command: prints the report; exit status 1 when a check failed, 2 for bad usage."""
    parser = argparse.ArgumentParser(prog="fastinvdpo doctor", description="What is installed and what works.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    found = report()
    print(json.dumps(found, indent=2, allow_nan=False) if arguments.json else render(found))
    return 0 if found["healthy"] else 1


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _too_old() -> dict[str, str]:
    """The lower bounds that installed packages miss, as the metadata of the installed fastinvdpo has them."""
    try:
        requirements = importlib.metadata.requires("fastinvdpo") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that nobody installed
        return {}
    found = map(re.compile(r"([\w.-]+)>=([\w.]+)").match, requirements)
    bounds = {str(match[1]): str(match[2]) for match in found if match}
    known = {"torch", *(name for names in EXTRAS.values() for name in names)}
    installed = {name: _version(name) for name in sorted(known & set(bounds))}
    return {name: bounds[name] for name, found in installed.items() if found and TorchVersion(found) < bounds[name]}


def _devices() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    devices = [{"name": "cpu", "type": "cpu", "description": cpu}]
    if torch.version.cuda is None and torch.version.hip is None:
        return devices, {"available": False, "reason": f"torch {torch.__version__} was built without CUDA"}
    if not torch.cuda.is_available():
        reason = f"torch was built for CUDA {torch.version.cuda}, but finds no usable GPU or driver"
        return devices, {"available": False, "reason": reason}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        description = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
        devices.append({"name": f"cuda:{index}", "type": "cuda", "description": description})
    return devices, {"available": True, "reason": None}


def _warnings() -> list[str]:
    fault, info, cuda = native.fault(), native.build_info(), torch.version.cuda
    found = [] if fault is None else [f"{fault}. The ops run in plain PyTorch on the CPU."]
    if info is not None and info["cuda"] and cuda is not None:
        built, runs = (int(version.partition(".")[0]) for version in (str(info["nvcc"]), cuda))
        if built > runs:
            driver = f"a driver for CUDA {built}, which this PyTorch, built for CUDA {cuda}, does not"
            found.append(f"the extension's CUDA kernels were built by nvcc {info['nvcc']} and need {driver}")
    return found


def _backends(op: str, device_type: str) -> dict[str, Any]:
    reasons = {backend: dispatch.unavailable(op, backend, device_type) for backend in dispatch.BACKENDS}
    unavailable = {backend: reason for backend, reason in reasons.items() if reason is not None}
    able = {backend: dispatch.skipped(backend, device_type) for backend, reason in reasons.items() if reason is None}
    skipped = {backend: reason for backend, reason in able.items() if reason is not None}
    found: dict[str, Any] = {"chosen": None, "error": None, "skipped": skipped, "unavailable": unavailable}
    try:
        return {**found, "chosen": dispatch.choose(op, device_type)}
    except InvalidInput as error:
        return {**found, "error": str(error)}


def _to_check(op: str, device_type: str) -> list[str]:
    """The backend that was asked for, or every one that can run, those that ``auto`` skips too."""
    asked_for = dispatch.requested()[1]
    if asked_for != "auto":
        return [asked_for]
    return [name for name in dispatch.BACKENDS if dispatch.unavailable(op, name, device_type) is None]


def _dtypes(backend: str, device_type: str) -> tuple[torch.dtype, ...]:
    # Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest.
    interpreted = backend == "triton" and device_type == "cpu"
    return (torch.float32,) if interpreted else (torch.float32, torch.bfloat16)


def _run_check(op: str, device: str, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    result: dict[str, Any] = {"op": op, "device": device, "backend": backend, "passed": False, "error": None}
    result["dtype"] = str(dtype).removeprefix("torch.")
    try:
        with nullcontext() if dispatch.requested()[1] == backend else dispatch.use_backend(backend):
            deviation, allowed = _CHECKS[op](torch.device(device), dtype)
    except Exception as error:  # whatever the op, its backend or the driver raises is the finding
        return {**result, "deviation": None, "allowed": None, "error": f"{type(error).__name__}: {error}"}
    passed = math.isfinite(deviation) and deviation <= allowed
    # JSON has no NaN or infinity.
    shown = deviation if math.isfinite(deviation) else None
    failure = None if math.isfinite(deviation) else f"the result holds {deviation}"
    return {**result, "passed": passed, "deviation": shown, "allowed": allowed, "error": failure}


def _numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rounding_to(dtype: torch.dtype) -> float:
    """What storing a float32 result in ``dtype`` adds to its relative error."""
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


def _check_affine_step(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Largest error of ``a·x + b·o + c·p``, relative to ``|a·x| + |b·o| + |c·p|``, and the one allowed."""
    tensors = [_numbers(3, 4, 8, 8, seed=seed).to(dtype) for seed in range(3)]
    coefficients = _numbers(3, 3, seed=3)
    sample, *outputs = (tensor.to(device) for tensor in tensors)
    result = fastinvdpo.affine_step(sample, outputs, coefficients.to(device)).cpu().double()
    terms = [coefficients[:, j].double().view(3, 1, 1, 1) * tensor.double() for j, tensor in enumerate(tensors)]
    deviation = (result - sum(terms)).abs() / sum(term.abs() for term in terms)
    # Three products and two sums: at most three roundings touch a term.
    return deviation.max().item(), 4 * _ROUNDING + _rounding_to(dtype)


def _check_preference_loss(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The error of the loss or its gradient that comes closest to the one allowed, relative, and that one."""
    return _closest([finding for utility in ("sigmoid", "hinge") for finding in _loss_errors(device, dtype, utility)])


def _closest(findings: list[tuple[float, float]]) -> tuple[float, float]:
    return max(findings, key=lambda finding: math.inf if math.isnan(finding[0]) else finding[0] / finding[1])


def _check_pair_statistics(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The error of the sums, relative to the magnitudes of their terms, or of their gradient, and the one allowed."""
    pairs, size = 3, 64
    policy, *others = (_numbers(2 * pairs, size, seed=seed).to(dtype) for seed in range(3))
    leaf = policy.to(device).requires_grad_()
    with torch.enable_grad():
        sums = fastinvdpo.pair_statistics(leaf, *(other.to(device) for other in others))
        found = torch.cat(
            [value for value in (sums.policy_mse, sums.cross, sums.shift_mse, sums.pair_cross) if value is not None]
        )
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
    error, shift = (policy.double() - other.double() for other in reversed(others))
    terms = torch.cat([error * error, error * shift, shift * shift, error[:pairs] * error[pairs:]])
    deviation = (found.detach().cpu().double() - terms.mean(1)).abs() / terms.abs().mean(1)
    expected = (3 * error + 3 * shift + error.roll(pairs, 0)) / size
    gradient_deviation = (gradient.cpu().double() - expected).norm() / expected.norm()
    allowed = 4 * size * _ROUNDING
    return _closest([(deviation.max().item(), allowed), (gradient_deviation.item(), allowed + _rounding_to(dtype))])


def _loss_errors(device: torch.device, dtype: torch.dtype, utility: str) -> list[tuple[float, float]]:
    pairs, size, beta = 3, 64, 2.0
    policy, reference, target = (_numbers(2 * pairs, size, seed=seed).to(dtype) for seed in range(3))
    leaf = policy.to(device).requires_grad_()
    with torch.enable_grad():
        others = (reference.to(device), target.to(device))
        loss = fastinvdpo.preference_loss(leaf, *others, beta=beta, utility=utility).loss
        (gradient,) = torch.autograd.grad(loss, leaf)

    p, r, t = policy.double(), reference.double(), target.double()
    difference = (p - t).square().mean(1) - (r - t).square().mean(1)
    margin = -beta / 2 * (difference[:pairs] - difference[pairs:])
    if utility == "sigmoid":
        value, slope = torch.nn.functional.softplus(-margin), -torch.sigmoid(-margin)
    else:
        value, slope = (1 - margin).clamp(min=0), -(margin < 1).double()
    sign = torch.tensor([1.0] * pairs + [-1.0] * pairs, dtype=torch.float64)
    expected = (slope / pairs * (-beta / 2)).repeat(2)[:, None] * sign[:, None] * 2 * (p - t) / size
    loss_deviation = (loss.detach().cpu().double() - value.mean()).abs() / value.mean()
    gradient_deviation = (gradient.cpu().double() - expected).norm() / expected.norm()
    # A sum over a sample may round once for each of its elements; the terms of a margin add up to a few units here.
    allowed = 4 * size * _ROUNDING
    return [(loss_deviation.item(), allowed), (gradient_deviation.item(), allowed + _rounding_to(dtype))]


_CHECKS: dict[str, Callable[[torch.device, torch.dtype], tuple[float, float]]] = {
    "affine_step": _check_affine_step,
    "pair_statistics": _check_pair_statistics,
    "preference_loss": _check_preference_loss,
}

if __name__ == "__main__":
    sys.exit(main())
