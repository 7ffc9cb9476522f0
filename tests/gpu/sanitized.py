"""A few small launches of every kernel of one backend, for compute-sanitizer: a plain script, since the tool slows down
every kernel. Inputs come from the host and results are checked there, so that hardly any kernel but ours runs.

    compute-sanitizer --tool=memcheck python -m tests.gpu.sanitized cuda       (native cpu, instead: without a GPU)
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastinvdpo
from fastinvdpo.ops import dispatch
from fastinvdpo.ops.affine_step import reference as step_reference
from tests.kernels.cases import at_offset, check_gradient, check_loss, check_step, problem

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPS = torch.ops.fastinvdpo


def loss(device: str, n: int, steps: int | None, dtypes: tuple[torch.dtype, ...], target: bool, offset: int) -> None:
    p = problem(n, steps=steps, dtypes=dtypes, with_target=target)
    tensors = [None if tensor is None else at_offset(tensor, offset, device) for tensor in p[:3]]
    weights = [None if weight is None else weight.to(device) for weight in (p.pair_weight, p.timestep_weight)]
    settings = (p.beta, p.utility, p.label_smoothing)
    results = OPS.preference_loss(*tensors, *weights, *settings)
    gradients = (torch.tensor(0.7), torch.rand(2), torch.rand(p.rows))
    given = (*(gradient.to(device) for gradient in gradients), tensors[0], tensors[2 if target else 1], results[1])
    gradient = OPS.preference_loss_backward(*given, *weights, *settings)
    on_host = [result.cpu() for result in results]
    check_loss(p, on_host)
    check_gradient(p, gradients, on_host[1], gradient.cpu())


def step(device: str, n: int, count: int, noise: bool, dtype: torch.dtype) -> None:
    """A new result, one in place with a trajectory between others, and the backward, which is one exact product."""
    sample, *outputs = (torch.randn(3, n).to(dtype) for _ in range(1 + count))
    extra = (torch.rand(3), torch.tensor([5, 2**40 + 3, 0])) if noise else (None, None)
    settings = (torch.randn(3, 1 + count), torch.tensor([True, False, True]), *extra)

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    moved = sample.to(device), [output.to(device) for output in outputs], *map(there, settings)
    found = OPS.affine_step(*moved, 2**61 + 3, 7).cpu()
    given, room = sample.clone().to(device), torch.full((3, 2, n), torch.nan, dtype=BF16).to(device)
    OPS.affine_step_out(given, *moved[1:], 2**61 + 3, 7, given, room[:, 1])
    check_step(sample, outputs, (*settings, 2**61 + 3, 7), found)
    assert torch.equal(given.cpu(), found) and torch.equal(room[:, 1].cpu(), found.to(BF16))
    assert room[:, 0].isnan().all()
    columns, kinds = list(range(1 + count)), [dtype] * (1 + count)
    names = [str(kind).removeprefix("torch.") for kind in kinds]
    gradients = OPS.affine_step_backward(moved[0], moved[2], moved[3], columns, names)
    expected = step_reference.backward(sample, settings[0], settings[1], columns, kinds)
    assert all(torch.equal(one.cpu(), two) for one, two in zip(gradients, expected, strict=True))


def launches(backend: str) -> Iterator[tuple[Callable[..., None], tuple[object, ...]]]:
    """Rows of one element, of a tail, of one cluster of blocks and of several; off the boundaries of 16 bytes too."""
    few = backend == "triton"  # which compiles every kind of call first
    dtypes = [(F32,) * 3, (BF16,) * 3, (F32, F16, BF16)][: 2 if few else 3]
    for case in itertools.product((7, 2053, 20000) if few else (1, 7, 2053, 16000, 20000), (None, 3), dtypes):
        yield from ((loss, (*case, target, 0)) for target in (True, False))
    yield from ((loss, (20001, None, dtype, True, 1)) for dtype in dtypes)
    sizes, counts = ((7, 4096), (0, 2)) if few else ((1, 7, 2053, 4096, 20000), (0, 1, 2, 4))
    for case in itertools.product(sizes, counts, (False, True), (F32, BF16)):
        yield step, case


def main() -> int:
    """Exit status 0 when every result is right."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitized")
    parser.add_argument("backend", choices=dispatch.BACKENDS)
    parser.add_argument("device", nargs="?", default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    done, wrong = 0, []
    with fastinvdpo.use_backend(options.backend):
        for call, case in launches(options.backend):
            done += 1
            try:
                call(options.device, *case)
            except AssertionError as error:
                wrong.append(f"{call.__name__} {case}: {error}")
    print("\n".join(wrong) or f"{options.backend}: all {done} results are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
