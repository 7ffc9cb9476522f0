"""``fastinvdpo doctor``: what is installed, which devices and backends there are, and whether the ops compute right.

Needs torch alone, so that it can say what else is missing.
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

_REQUIREMENT = re.compile(r"([\w.-]+)(?:>=([\w.]+))?.*?(?:extra == ['\"](\w+)['\"])?")
_ROUNDING = 2.0**-24  # the unit roundoff of float32
_PAIRS, _SIZE = 3, 64  # of the tensors of a check


def report() -> dict[str, Any]:
    """Everything the doctor finds, as JSON can hold it.

    Versions are None where a package is absent. ``too_old``: package -> the oldest version that was tried, where an
    older one is installed. ``backends``: op -> device type -> the one chosen, why each of the others is not available,
    and why ``auto`` skips those that it does although they can run. ``native``: how the extension was built; None
    without one. ``warnings``: what keeps kernels from running that should. ``checks``: each op, device, dtype and
    backend that can run, against float64. Looking for devices initializes CUDA where there is any.
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
    requested_by, requested = dispatch.requested()
    requirements = _requirements()
    extras = sorted({extra for _, _, extra in requirements} - {"", "dev", "docs"})
    return {
        "fastinvdpo": fastinvdpo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "extras": {
            name: {package: _version(package) for package, _, of in requirements if of == name} for name in extras
        },
        "too_old": {
            package: bound
            for package, bound, extra in requirements
            if extra not in ("dev", "docs") and bound and (found := _version(package)) and TorchVersion(found) < bound
        },
        "devices": devices,
        "cuda": cuda,
        "native": native.build_info(),
        "warnings": _warnings(),
        "backend_request": {"backend": requested, "by": requested_by},
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
    lines += ["", "Extras" if report["extras"] else "Extras: not known, since fastinvdpo itself is not installed"]
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


def _requirements() -> list[tuple[str, str, str]]:
    """``(package, oldest version that was tried or "", extra or "")``, as the installed fastinvdpo declares them."""
    try:
        declared = importlib.metadata.requires("fastinvdpo") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that nobody installed
        return []
    found = map(_REQUIREMENT.fullmatch, declared)
    return [(match[1], match[2] or "", match[3] or "") for match in found if match]


def _devices() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    devices, reason = [{"name": "cpu", "type": "cpu", "description": cpu}], None
    if torch.version.cuda is None and torch.version.hip is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    elif not torch.cuda.is_available():
        reason = f"torch was built for CUDA {torch.version.cuda}, but finds no usable GPU or driver"
    for index in range(0 if reason else torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        description = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
        devices.append({"name": f"cuda:{index}", "type": "cuda", "description": description})
    return devices, {"available": reason is None, "reason": reason}


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
    unavailable, skipped = dict[str, str](), dict[str, str]()
    for backend in dispatch.BACKENDS:
        if reason := dispatch.unavailable(op, backend, device_type):
            unavailable[backend] = reason
        elif reason := dispatch.skipped(backend, device_type):
            skipped[backend] = reason
    chosen = error = None
    try:
        chosen = dispatch.choose(op, device_type)
    except InvalidInput as refusal:
        error = str(refusal)
    return {"chosen": chosen, "error": error, "skipped": skipped, "unavailable": unavailable}


def _to_check(op: str, device_type: str) -> list[str]:
    """The backend that was requested, or every one that can run, those that ``auto`` skips too."""
    requested = dispatch.requested()[1]
    if requested != "auto":
        return [requested]
    return [name for name in dispatch.BACKENDS if dispatch.unavailable(op, name, device_type) is None]


def _dtypes(backend: str, device_type: str) -> tuple[torch.dtype, ...]:
    # Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest.
    interpreted = backend == "triton" and device_type == "cpu"
    return (torch.float32,) if interpreted else (torch.float32, torch.bfloat16)


def _run_check(op: str, device: str, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """The error, beside the same call in float64, that comes closest to the one allowed; both relative."""
    result: dict[str, Any] = {"op": op, "device": device, "backend": backend, "passed": False, "error": None}
    result |= {"dtype": str(dtype).removeprefix("torch."), "deviation": None, "allowed": None}
    call, summed = _CHECKS[op]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2 * _PAIRS, _SIZE, generator=generator).to(dtype) for _ in range(3)]
    with dispatch.use_backend("reference"):
        exact = call(*(tensor.double() for tensor in inputs))
    try:
        with nullcontext() if dispatch.requested()[1] == backend else dispatch.use_backend(backend):
            found = [tensor.cpu() for tensor in call(*(tensor.to(device) for tensor in inputs))]
    except Exception as error:  # whatever the op, its backend or the driver raises is the finding
        return {**result, "error": f"{type(error).__name__}: {error}"}
    for one, other in zip(found, exact, strict=True):
        deviation = float((one.double() - other).norm() / other.norm())
        if not math.isfinite(deviation):  # JSON has no NaN or infinity
            return {**result, "error": f"the result holds {deviation}"}
        # At most each term of a sum, and the terms of a margin a few times more, rounds in float32; and the storage.
        stored = 0.0 if one.dtype == torch.float32 else torch.finfo(one.dtype).eps / 2
        allowed = 4 * summed * _ROUNDING + stored
        if result["deviation"] is None or deviation / allowed > result["deviation"] / result["allowed"]:
            result |= {"deviation": deviation, "allowed": allowed}
    return {**result, "passed": result["deviation"] <= result["allowed"]}


def _affine_step(sample: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
    table = torch.randn(2 * _PAIRS, 3, generator=torch.Generator().manual_seed(1)).to(sample.device)
    return [fastinvdpo.affine_step(sample, [first, second], table)]


def _pair_statistics(policy: Tensor, reference: Tensor, target: Tensor) -> list[Tensor]:
    leaf = policy.requires_grad_()
    with torch.enable_grad():
        sums = fastinvdpo.pair_statistics(leaf, reference, target)
        found = [sums.policy_mse, sums.cross, sums.shift_mse, sums.pair_cross]
        values = torch.cat([value for value in found if value is not None])
        return [values.detach(), *torch.autograd.grad(values.sum(), leaf)]


def _preference_loss(policy: Tensor, reference: Tensor, target: Tensor) -> list[Tensor]:
    leaf, found = policy.requires_grad_(), list[Tensor]()
    with torch.enable_grad():
        for utility in ("sigmoid", "hinge"):
            loss = fastinvdpo.preference_loss(leaf, reference, target, beta=2.0, utility=utility).loss
            found += [loss.detach(), *torch.autograd.grad(loss, leaf)]
    return found


def _token_log_probs(hidden: Tensor, weight: Tensor, _: Tensor) -> list[Tensor]:
    leaf = hidden.requires_grad_()
    with torch.enable_grad():
        values = fastinvdpo.token_log_probs(leaf, weight, torch.arange(len(leaf), device=leaf.device))
        return [values.detach(), *torch.autograd.grad(values.sum(), leaf)]


# For each op: from three tensors to its results and gradients, and how many terms their sums have.
_CHECKS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], list[Tensor]], int]] = {
    "affine_step": (_affine_step, 1),
    "pair_statistics": (_pair_statistics, _SIZE),
    "preference_loss": (_preference_loss, _SIZE),
    "token_log_probs": (_token_log_probs, _SIZE),
}

if __name__ == "__main__":
    sys.exit(main())
