"""What only a GPU can show, through the public ops: graph capture, streams, the same bits on every run, no
synchronization, the number of launches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastinvdpo
from benchmarks.measure import Task, footprint
from tests.cases import predictions
from tests.kernels.cases import check_loss, problem
from tests.places import GPU, Place, on_gpu

everyone = pytest.mark.parametrize("place", GPU)
fused = pytest.mark.parametrize("place", on_gpu("triton", "cuda"))
PAIRS = 4
SHAPE = (4, 100, 101)  # several chunks a row, the last of them short


class Inputs(NamedTuple):
    """Of both ops; the first three are leaves."""

    policy: Tensor
    sample: Tensor
    output: Tensor
    scale: Tensor
    reference: Tensor
    target: Tensor
    rho: Tensor
    table: Tensor
    active: Tensor
    index: Tensor

    def copy_(self, other: Inputs) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self, other, strict=True):
                mine.copy_(theirs)


def inputs(place: Place, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    policy, reference, target = predictions(PAIRS, SHAPE, gap=0.1, seed=seed, dtype=torch.float32)
    sample, output = torch.randn(2, 2 * PAIRS, *SHAPE, generator=generator).unbind()
    scale, rho = torch.rand(2 * PAIRS, generator=generator), torch.rand(PAIRS, generator=generator)
    table, active = torch.randn(2 * PAIRS, 3, generator=generator), torch.rand(2 * PAIRS, generator=generator) > 0.3
    tensors = (policy, sample, output, scale, reference, target, rho, table, active, torch.arange(2 * PAIRS) % PAIRS)
    on_device = [tensor.to(place.device) for tensor in tensors]
    return Inputs(*(tensor.requires_grad_() for tensor in on_device[:3]), *on_device[3:])


def run(i: Inputs) -> tuple[Tensor, ...]:
    """Both ops, forward and backward: all that they compute."""
    result = fastinvdpo.preference_loss(i.policy, i.reference, i.target, beta=20.0, pair_weight=i.rho)
    (gradient,) = torch.autograd.grad(result.loss + result.policy_mse.mean(), i.policy)
    noise = {"noise_scale": i.scale, "noise_index": i.index, "seed": 2**40 + 3, "offset": 7}
    step = fastinvdpo.affine_step(i.sample, [i.output, gradient], i.table, active=i.active, **noise)
    gradients = torch.autograd.grad(step, (i.sample, i.output), i.reference)
    given, stored = torch.empty_like(i.reference), torch.empty_like(i.reference, dtype=torch.bfloat16)
    fastinvdpo.affine_step(i.reference, [gradient], i.table[:, :2], out=given, trajectory=stored)
    values = (result.loss, result.margin, result.policy_mse, result.reference_mse, gradient, step, *gradients)
    return tuple(value.detach() for value in (*values, given, stored))


def captured(call: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of the call, and the tensors that replaying it fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # kernels are loaded at their first launch, which a capture does not allow
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


def same_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@everyone
def test_graph_replay_reads_new_inputs(place: Place) -> None:
    with fastinvdpo.use_backend(place.backend):
        static = inputs(place)
        graph, outputs = captured(partial(run, static))
        for seed in (1, 2, 3):
            fresh = inputs(place, seed)
            expected = run(fresh)
            static.copy_(fresh)
            for tensor in outputs:
                tensor.fill_(torch.nan)
            graph.replay()
            assert same_bits(outputs, expected)


@fused
def test_graphs_replayed_side_by_side(place: Place) -> None:
    """Captured one after the other on one stream, they must share no memory for the kernels' own use."""
    with fastinvdpo.use_backend(place.backend):
        both = [inputs(place, seed) for seed in (1, 2)]
        expected = [run(each) for each in both]
        graphs = [captured(partial(run, each)) for each in both]
        streams = [torch.cuda.Stream() for _ in both]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        for _ in range(30):
            for stream, (graph, _) in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        assert all(same_bits(outputs, wanted) for (_, outputs), wanted in zip(graphs, expected, strict=True))


@everyone
def test_work_waits_for_its_stream(place: Place) -> None:
    with fastinvdpo.use_backend(place.backend):
        static, fresh = inputs(place), inputs(place, 1)
        expected, stream = run(fresh), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            static.copy_(fresh)  # whoever launches elsewhere reads what was there before
            results = run(static)
        torch.cuda.current_stream().wait_stream(stream)
        assert same_bits(results, expected)


@fused
def test_many_streams_at_once(place: Place) -> None:
    with fastinvdpo.use_backend(place.backend):
        each = [inputs(place, seed) for seed in range(4)]
        expected, found = [run(one) for one in each], []
        streams = [torch.cuda.Stream() for _ in each]
        torch.cuda.synchronize()
        for _ in range(10):
            for one, stream in zip(each, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(run(one))
        torch.cuda.synchronize()
        assert all(same_bits(results, expected[number % 4]) for number, results in enumerate(found))


@everyone
def test_the_same_bits_on_every_run(place: Place) -> None:
    with fastinvdpo.use_backend(place.backend):
        one = inputs(place)
        first = run(one)
        assert all(same_bits(run(one), first) for _ in range(30))


@everyone
def test_no_synchronization(place: Place) -> None:
    with fastinvdpo.use_backend(place.backend):
        one = inputs(place)
        run(one)  # loads the kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(one)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@fused
def test_launches(place: Place) -> None:
    """One kernel each; the forward sets what it counts arrivals with to zero besides."""
    one = inputs(place)
    policy = one.policy.detach()
    grad, margin = torch.ones((), device=place.device), torch.zeros(PAIRS, device=place.device)
    backward = torch.ops.fastinvdpo.preference_loss_backward
    step_backward = torch.ops.fastinvdpo.affine_step_backward
    table, settings = one.table[:, :2].contiguous(), (one.rho, None, 20.0, "sigmoid", 0.0)
    rows, weight = (policy, one.reference, one.target), torch.rand(SHAPE[0], device=place.device)  # for all pairs
    shared = (weight.expand(PAIRS, -1), 20.0, "sigmoid", 0.0)
    calls = {
        "forward": lambda: torch.ops.fastinvdpo.preference_loss(policy, one.reference, one.target, *settings),
        "backward": lambda: backward(grad, None, None, policy, one.target, margin, *settings),
        "forward of timesteps": lambda: fastinvdpo.preference_loss(*rows, beta=20.0, timestep_weight=weight),
        "backward of timesteps": lambda: backward(grad, None, None, *rows[::2], margin, None, *shared),
        "step": lambda: fastinvdpo.affine_step(one.reference, [one.target], table),
        "step backward": lambda: step_backward(one.reference, table, one.active, [0, 1], ["float32"] * 2),
    }
    found = {}
    for name, call in calls.items():
        task = Task(call, partial(fastinvdpo.use_backend, place.backend))
        with task.context():
            call()
        found[name] = footprint(task, torch.device(place.device)).launches
    forwards = {name: 2 for name in calls if name.startswith("forward")}
    assert found == dict.fromkeys(calls, 1) | forwards


@everyone
def test_on_a_device_that_is_not_the_current_one(place: Place) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    p = problem(40001, pairs=PAIRS, device="cuda:1")
    with fastinvdpo.use_backend(place.backend):
        result = fastinvdpo.preference_loss(p.policy, p.reference, p.target, beta=p.beta, pair_weight=p.pair_weight)
    check_loss(p, (result.loss, result.margin, result.policy_mse, result.reference_mse))
    assert torch.cuda.current_device() == 0
