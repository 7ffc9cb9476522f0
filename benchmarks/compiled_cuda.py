"""What nvcc makes of the CUDA kernels: registers, spills and the width of global loads and stores.

``python -m benchmarks.compiled_cuda`` prints the table and writes it to ``results/compiled_cuda.json``. Needs nvcc and
cuobjdump (the CUDA toolkit's or Triton's), but no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "compiled_cuda.json"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

_COMPILING = re.compile(r"Compiling entry function '(?P<name>\w+)' for")
_STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<shared>\d+) bytes smem")
_ACCESS = re.compile(r"\b(?P<kind>LDG|STG)(?P<modifiers>(?:\.\w+)*)")
# The meaning of each kernel's template arguments, in order. {0}: the storage type, {1}: the first of the others.
_ARGUMENTS = {
    "preference_loss_forward": ("{0}", "target", "cluster"),
    "preference_loss_backward": ("{0}",),
    "affine_step_kernel": ("{0}", "outputs <= {1}", "noise"),
    "affine_step_backward_kernel": ("{0}",),
    "pair_statistics_forward": ("{0}", "paired", "mask"),
    "pair_statistics_backward": ("{0}", "mask"),
}


def obstacle() -> str | None:
    """Why the kernels cannot be compiled and read here; None when they can."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc on PATH"
    if cuobjdump() is None:
        return "there is no cuobjdump on PATH, beside nvcc or in Triton"
    return None


def cuobjdump() -> str | None:
    """The disassembler, of the CUDA toolkit or of Triton."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(shutil.which("nvcc") or ".").resolve().parent]
    folders += [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    return shutil.which("cuobjdump") or next(
        filter(None, (shutil.which("cuobjdump", path=str(f)) for f in folders)), None
    )


def table(architectures: Sequence[str] = ARCHITECTURES) -> list[dict[str, Any]]:
    """One row for every kernel and architecture that has it: ``file``, ``kernel``, ``architecture``, ``registers``,
    ``shared_bytes``, ``stack_bytes``, ``spill_store_bytes``, ``spill_load_bytes``, and ``loads`` and ``stores`` of
    global memory (bits -> instructions).

    Raises:
        RuntimeError: nvcc or cuobjdump is missing or fails.
    """
    reason = obstacle()
    if reason is not None:
        raise RuntimeError(reason)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            for source in sorted((ROOT / "csrc").glob("*.cu")):
                rows += _compiled(source, architecture, Path(folder) / "kernels.cubin")
    return sorted(rows, key=lambda row: (row["file"], row["kernel"], row["architecture"]))


def toolchain() -> dict[str, str]:
    release = re.search(r"release [\d.]+, V([\d.]+)", _run(["nvcc", "--version"]))
    return {"nvcc": release.group(1) if release else "unknown"}


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The table as text for a terminal."""
    width = max(len(row["kernel"]) for row in rows)
    lines = [f"{'kernel':{width}}  {'arch':7} registers  spilled bytes  widest load  widest store"]
    for row in rows:
        load, store = (f"{widest(row[kind])} bit" for kind in ("loads", "stores"))
        spilled = row["spill_store_bytes"] + row["spill_load_bytes"]
        name = f"{row['kernel']:{width}}  {row['architecture']:7}"
        lines.append(f"{name} {row['registers']:9}  {spilled:13}  {load:>11}  {store:>12}")
    return "\n".join(lines)


def widest(accesses: dict[str, int]) -> int:
    """The most bits that one instruction of a thread loads or stores; 0 when there is none."""
    return max(map(int, accesses), default=0)


def _compiled(source: Path, architecture: str, cubin: Path) -> list[dict[str, Any]]:
    from torch.utils.cpp_extension import include_paths

    include = [f"-I{path}" for path in (*include_paths(), source.parent)]
    options = ["-O3", "-std=c++17", "-lineinfo", f"-arch={architecture}", "-Xptxas=-v"]
    report = _run(["nvcc", *options, *include, "-cubin", str(source), "-o", str(cubin)])
    accesses = _accesses(_run([cuobjdump() or "cuobjdump", "-sass", str(cubin)]))
    return [
        {
            "file": source.name,
            "kernel": _readable(name),
            "architecture": architecture,
            **numbers,
            "loads": accesses[name]["LDG"],
            "stores": accesses[name]["STG"],
        }
        for name, numbers in _resources(report).items()
        if accesses[name]["LDG"]  # kernels for clusters are empty where there are none
    ]


def _resources(report: str) -> dict[str, dict[str, int]]:
    """What ptxas says of every kernel."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in report.splitlines():
        if match := _COMPILING.search(line):
            name = match["name"]
            found[name] = {"shared_bytes": 0}
        if match := _STACK.search(line):
            numbers = {"stack_bytes": "stack", "spill_store_bytes": "stores", "spill_load_bytes": "loads"}
            found[name].update({key: int(match[group]) for key, group in numbers.items()})
        if match := _REGISTERS.search(line):
            found[name]["registers"] = int(match["registers"])
        if match := _SHARED.search(line):
            found[name]["shared_bytes"] = int(match["shared"])
    return found


def _accesses(sass: str) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> LDG or STG -> bits -> number of instructions."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    name = ""
    for line in sass.splitlines():
        if "Function :" in line:
            name = line.rpartition(":")[2].strip()
            found[name] = {"LDG": {}, "STG": {}}
        elif name and (match := _ACCESS.search(line)):
            bits = next((bits for bits in re.findall(r"\d+", match["modifiers"]) if bits in _WIDTHS), "32")
            counts = found[name][match["kind"]]
            counts[bits] = counts.get(bits, 0) + 1
    return found


_WIDTHS = {"8", "16", "64", "128", "256"}


def _readable(mangled: str) -> str:
    """``preference_loss_forward<BFloat16, target, cluster>``: the template arguments by their meaning."""
    parts = re.fullmatch(
        r"_ZN10fastinvdpo\d+(?P<name>[a-z_]+)I(?P<type>f|NS_\d+(?P<tag>\w+?)E|NS_\w+?E)(?P<rest>.*?)EE?v.*", mangled
    )
    if parts is None or parts["name"] not in _ARGUMENTS:
        return mangled
    kind = "float" if parts["type"] == "f" else parts["tag"]
    values = re.findall(r"L[ib](\d+)E", mangled)
    words = []
    for number, word in enumerate(_ARGUMENTS[parts["name"]]):
        value = kind if number == 0 else values[number - 1]
        if "{" in word:
            words.append(word.format(kind, value))
        else:
            words.append(word if value == "1" else f"no {word}")
    return f"{parts['name']}<{', '.join(words)}>"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compiled_cuda", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), help="such as sm_80 sm_90a")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    reason = obstacle()
    if reason is not None:
        print(f"The CUDA kernels cannot be compiled: {reason}.", file=sys.stderr)
        return 1
    rows = table(arguments.architectures)
    print(render(rows))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({**toolchain(), "kernels": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
