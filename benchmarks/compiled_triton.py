"""What the Triton kernels compile to, without a GPU: registers, stack and the width of memory accesses.

    python benchmarks/compiled_triton.py            prints the table
    python benchmarks/compiled_triton.py --write    and keeps it in benchmarks/results/compiled_triton.md

The launchers run on CPU tensors of real shapes; every launch is compiled as it would be on a GPU, for sm_80, sm_90 and
sm_100, and not carried out. A register that spills goes to the stack: stack 0 means no spills.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastinvdpo.ops import triton_kernels
from fastinvdpo.ops.preference_loss.utilities import UTILITIES

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks/results/compiled_triton.md"
ARCHITECTURES = (80, 90, 100)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Case(NamedTuple):
    """One launch. ``reads`` and ``writes``: the large tensors, which a block of the kernel covers once each."""

    name: str
    launch: Callable[[], object]
    reads: list[Tensor]
    writes: list[Tensor]
    contiguous: bool  # rows start at multiples of 16 bytes: every access to a large tensor is to have 128 bits


class Report(NamedTuple):
    case: str
    arch: int
    registers: int
    stack: int
    wide_reads: int
    expected_reads: int
    wide_writes: int
    expected_writes: int
    contiguous: bool


class NoDevice:
    """Stands in for Triton's driver: there is a device of the given architecture, and nothing can be launched on it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def cases() -> Iterator[Case]:
    ops = ("preference_loss", "affine_step", "pair_statistics", "token_log_probs")
    loss, affine, statistics, tokens = map(triton_kernels.load, ops)
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    small, odd, huge = (4, 128, 128), (3, 33, 35), (16, 21, 90, 160)
    utilities = [(name, 0.1 if utility.smoothed else 0.0) for name, utility in UTILITIES.items()]
    for dtypes in ((f32, f32, f32), (bf16, bf16, bf16), (f16, f16, f16), (bf16, f32, bf16), (f32, bf16, f16)):
        yield forward_case(loss, dtypes, small)
        yield backward_case(loss, dtypes[::2], small)
    for dtype in (f32, bf16):
        yield forward_case(loss, (dtype, dtype), small)
        yield forward_case(loss, (dtype,) * 3, odd)
        yield forward_case(loss, (dtype,) * 3, small, shifted=True)
        yield backward_case(loss, (dtype,) * 2, small, shifted=True)
        yield forward_case(loss, (dtype,) * 3, (10, 4, 64, 64), timesteps=10)
        yield forward_case(loss, (dtype,) * 3, (4, 2, 3), timesteps=4)
        yield backward_case(loss, (dtype,) * 2, (10, 4, 64, 64), timesteps=10)
        yield backward_case(loss, (dtype,) * 2, odd)
        yield backward_case(loss, (dtype,) * 2, huge)
        for count in range(5):
            for noisy in (False, True):
                yield step_case(affine, (dtype,) * (count + 1), small, noisy)
        yield step_case(affine, (dtype,) * 2, odd, True)
        yield step_case(affine, (dtype,) * 5, huge, True)
        yield step_into_case(affine, (dtype,) * 3, small, torch.float32 if dtype == bf16 else bf16)
        yield step_backward_case(affine, dtype, (dtype,) * 5, small)
        yield step_backward_case(affine, dtype, (dtype,) * 2, odd)
        yield step_backward_case(affine, dtype, (dtype,) * 3, huge)
        yield step_backward_case(affine, dtype, (dtype,) * 3, small, constant=True)
    yield step_case(affine, (bf16, f32, bf16), small, False)
    yield step_backward_case(affine, bf16, (bf16, f32), small)
    for utility, smoothing in utilities[1:]:
        yield forward_case(loss, (bf16,) * 3, small, utility=utility, smoothing=smoothing)
        yield backward_case(loss, (bf16,) * 2, small, utility=utility, smoothing=smoothing)
    for dtypes in ((f32,) * 3, (bf16,) * 3, (f16,) * 3, (bf16, f32, bf16)):
        for mask in (None, (4, 128, 128), (1, 128, 128)):
            yield statistics_case(statistics, dtypes, small, mask)
            yield statistics_backward_case(statistics, dtypes, small, mask)
    for dtype in (f32, bf16):
        yield statistics_case(statistics, (dtype,) * 3, huge, None)
        yield statistics_case(statistics, (dtype,) * 3, small, None, paired=False)
        yield statistics_case(statistics, (dtype,) * 2, small, None)
        yield statistics_case(statistics, (dtype,) * 3, odd, odd)
        yield statistics_backward_case(statistics, (dtype,) * 3, small, None, paired=False)
        yield statistics_backward_case(statistics, (dtype,) * 3, odd, odd)
    for dtype in (f32, bf16):
        yield from token_cases(tokens, dtype)


def forward_case(
    module: ModuleType,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    timesteps: int | None = None,
    utility: str = "sigmoid",
    smoothing: float = 0.0,
    shifted: bool = False,
) -> Case:
    tensors = [large(shape, dtype, shifted) for dtype in dtypes]
    target = tensors[2] if len(tensors) > 2 else None
    weight = None if timesteps is None else torch.empty(2, timesteps)
    arguments = (*tensors[:2], target, torch.empty(2), weight, 2000.0, utility, smoothing)
    name = describe(f"preference_loss {utility}", dtypes, shape, timesteps, shifted)
    return Case(name, lambda: module.forward(*arguments), tensors, [], aligned(shape, timesteps) and not shifted)


def backward_case(
    module: ModuleType,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    timesteps: int | None = None,
    utility: str = "sigmoid",
    smoothing: float = 0.0,
    shifted: bool = False,
) -> Case:
    policy, target = (large(shape, dtype, shifted) for dtype in dtypes)
    weight = None if timesteps is None else torch.empty(2, timesteps)
    errors = torch.empty(4) if timesteps is None else torch.empty(4, timesteps)
    settings = (torch.empty(2), torch.empty(2), weight, 2000.0, utility, smoothing)
    name = describe(f"preference_loss_backward {utility}", dtypes, shape, timesteps, shifted)
    return Case(
        name,
        lambda: module.backward(torch.empty(()), torch.empty(2), errors, policy, target, *settings),
        [policy, target],
        [policy],
        aligned(shape, timesteps) and not shifted,
    )


def step_case(module: ModuleType, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], noisy: bool) -> Case:
    tensors = [torch.empty(4, *shape, dtype=dtype) for dtype in dtypes]
    table, active = torch.empty(4, len(dtypes)), torch.ones(4, dtype=torch.bool)
    noise = (torch.empty(4), torch.zeros(4, dtype=torch.int64)) if noisy else (None, None)
    name = describe(f"affine_step {'with' if noisy else 'without'} noise", dtypes, shape, None)
    return Case(
        name,
        lambda: module.forward(tensors[0], tensors[1:], table, active, *noise, 2**40, 1),
        tensors,
        tensors[:1],
        aligned(shape, None),
    )


def step_into_case(
    module: ModuleType, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], stored: torch.dtype
) -> Case:
    """In place, the samples apart, with a trajectory of another dtype."""
    tensors = [torch.empty(4, 2, *shape, dtype=dtype)[:, 1] for dtype in dtypes]
    trajectory = torch.empty(4, 80, *shape, dtype=stored)[:, 7]
    settings = (torch.empty(4, len(dtypes)), torch.ones(4, dtype=torch.bool), None, None, 0, 0)
    name = describe(f"affine_step in place, {NAMES[stored]} trajectory", dtypes, shape, None)
    return Case(
        name,
        lambda: module.forward(tensors[0], tensors[1:], *settings, tensors[0], trajectory),
        tensors,
        [tensors[0], trajectory],
        aligned(shape, None),
    )


def step_backward_case(
    module: ModuleType,
    dtype: torch.dtype,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    constant: bool = False,
) -> Case:
    """``dtypes``: of the gradients."""
    grad = torch.empty(4, dtype=dtype) if constant else torch.empty(4, *shape, dtype=dtype)
    gradients = [torch.empty(4, *shape, dtype=kind) for kind in dtypes]
    table, active = torch.empty(4, len(dtypes)), torch.ones(4, dtype=torch.bool)
    name = describe(f"affine_step_backward{' of one number a sample' if constant else ''}", dtypes, shape, None)
    return Case(
        name,
        lambda: module.backward(grad, table, active, list(range(len(dtypes))), gradients),
        [] if constant else [grad],
        gradients,
        aligned(shape, None),
    )


def statistics_case(
    module: ModuleType,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    mask: tuple[int, ...] | None,
    paired: bool = True,
) -> Case:
    """``dtypes``: of policy, target and reference, or of the first two."""
    policy, target, *references = (large(shape, dtype, False) for dtype in dtypes)
    reference, masks = references[0] if references else None, statistics_masks(mask, paired)
    name = f"pair_statistics{statistics_words(mask, paired)}"
    return Case(
        describe(name, dtypes, shape, None),
        lambda: module.forward(policy, reference, target, *masks, paired),
        [tensor for tensor in (policy, target, *references, masks[0]) if tensor is not None] * (1 + paired)
        + [tensor for tensor in masks[1:] if tensor is not None],
        [],
        aligned(shape, None),
    )


def statistics_backward_case(
    module: ModuleType,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    mask: tuple[int, ...] | None,
    paired: bool = True,
) -> Case:
    policy, target, reference = (large(shape, dtype, False) for dtype in dtypes)
    masks, grads = statistics_masks(mask, paired), [torch.empty(4)] * 3
    return Case(
        describe(f"pair_statistics_backward{statistics_words(mask, paired)}", dtypes, shape, None),
        lambda: module.backward(*grads, torch.empty(2) if paired else None, policy, reference, target, *masks),
        [policy, target, reference] + [policy, target] * paired + [k for k in masks if k is not None],
        [policy],
        aligned(shape, None),
    )


def statistics_masks(mask: tuple[int, ...] | None, paired: bool) -> tuple[Tensor | None, Tensor | None]:
    """Masks of four samples and of two pairs."""
    if mask is None:
        return None, None
    return torch.empty(4, *mask), torch.empty(2, *mask) if paired else None


def statistics_words(mask: tuple[int, ...] | None, paired: bool) -> str:
    return ("" if mask is None else f" masked {'×'.join(map(str, mask))}") + ("" if paired else " unpaired")


def token_cases(module: ModuleType, dtype: torch.dtype) -> Iterator[Case]:
    """The launches of 512 tokens, 1024 wide, and 8192 columns; their loads go past the registers."""
    hidden, weight, found = (torch.empty(shape, dtype=dtype) for shape in ((512, 1024), (8192, 1024), (512, 8192)))
    targets, rows = torch.zeros(512, dtype=torch.int64), torch.empty(3, 512)
    launches: dict[str, Callable[[], object]] = {
        "sums": lambda: module.sums(hidden, weight, targets, 0),
        "slopes": lambda: module.slopes(rows[0], rows[1], hidden, weight, targets, rows[2], 0, found),
        "hidden": lambda: module.product(found, weight, torch.empty(512, 1024), True),
        "weight": lambda: module.product(found.T, hidden, weight, False),
    }
    for name, launch in launches.items():
        yield Case(describe(f"token_log_probs {name}", (dtype,) * 2, (512, 1024), None), launch, [], [], False)


def large(shape: tuple[int, ...], dtype: torch.dtype, shifted: bool) -> Tensor:
    """Four samples; ``shifted``: in memory that does not start at 16 bytes."""
    size = 4 * torch.Size(shape).numel()
    return torch.empty(size + 1, dtype=dtype)[int(shifted) : size + int(shifted)].view(4, *shape)


def describe(
    kernel: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], timesteps: int | None, shifted: bool = False
) -> str:
    kinds = NAMES[dtypes[0]] if len(set(dtypes)) == 1 else "/".join(NAMES[dtype] for dtype in dtypes)
    form = "×".join(map(str, shape)) + ("" if timesteps is None else f" (K = {timesteps})")
    form += " unaligned" if shifted else ""
    return f"{kernel}, {len(dtypes)} × {kinds}, {form}"


def aligned(shape: tuple[int, ...], timesteps: int | None) -> bool:
    return torch.Size(shape if timesteps is None else shape[1:]).numel() % 8 == 0


def compiled(case: Case, arch: int) -> Any:
    """The one kernel that the case launches."""
    kernels = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append((run(self, *arguments, grid=grid, warmup=True, **options), options.get("BLOCK", 0)))

    JITFunction.run = compile_only
    driver.set_active(NoDevice(arch))
    try:
        case.launch()
    finally:
        JITFunction.run = run
    (kernel,) = kernels
    return kernel


def report(case: Case, arch: int) -> Report:
    kernel, block = compiled(case, arch)
    accesses = Counter(re.findall(r"\b(ld|st)\.global[.\w]*?\.(v\d)\.b(\d+)", kernel.asm["ptx"]))
    wide: Counter[str] = Counter()
    for (kind, vector, bits), count in accesses.items():
        if int(vector[1:]) * int(bits) == 128:
            wide[kind] += count
    per_thread = block // (32 * kernel.metadata.num_warps)
    reads, writes = (
        sum(per_thread * tensor.element_size() for tensor in tensors) // 16 for tensors in (case.reads, case.writes)
    )
    registers, stack = resources(kernel.asm["cubin"])
    return Report(case.name, arch, registers, stack, wide["ld"], reads, wide["st"], writes, case.contiguous)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", text)[1])  # type: ignore[index]
        for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def reports() -> list[Report]:
    return [report(case, arch) for case in cases() for arch in ARCHITECTURES]


def render(rows: list[Report]) -> str:
    head = f"""# Triton kernels as compiled

Triton {triton.__version__}; written by `python benchmarks/compiled_triton.py --write`.
Wide: 128-bit accesses that a thread makes to the large tensors in one block, of those that would cover the block. Rows
whose length is not a multiple of 8, and memory that does not start at 16 bytes, are accessed more narrowly.

| launch | sm | registers | stack | wide reads | wide writes |
|---|---|---|---|---|---|
"""
    lines = [
        f"| {row.case} | {row.arch} | {row.registers} | {row.stack} "
        f"| {row.wide_reads}/{row.expected_reads} | {row.wide_writes}/{row.expected_writes} |"
        for row in rows
    ]
    return head + "\n".join(lines) + "\n"


def faults(rows: list[Report]) -> list[Report]:
    """Those that spill, or make a narrow access where a wide one is possible."""
    return [
        row
        for row in rows
        if row.stack
        or (row.contiguous and (row.wide_reads, row.wide_writes) != (row.expected_reads, row.expected_writes))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help=f"keep the table in {TABLE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    rows = reports()
    table = render(rows)
    print(table)
    if arguments.write:
        TABLE.write_text(table)
    wrong = faults(rows)
    for row in wrong:
        print("spills or narrow accesses:", row, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
