"""Processes that start at once: a server that has imported everything forks one for each call.

Importing torch, diffusers and transformers takes longer than the work of a tiny run. What is forked is a process all
the same: SIGKILL ends it wherever it is, and what it had in memory is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
PATIENCE = 1500.0  # seconds for one call
IMPORTED = (
    *("peft", "datasets", "diffusers", "transformers", "accelerate.utils", "pyarrow.dataset", "pyarrow.parquet"),
    *("fastinvdpo.cli.app", "fastinvdpo.evaluation.scoring", "fastinvdpo.config.files"),
    *("fastinvdpo.models.stable_diffusion", "fastinvdpo.evaluation.scorers", "fastinvdpo.evaluation.in_training"),
    *("tests.evaluation.tiny", "tests.trainer.tiny"),
)


@dataclass(frozen=True)
class Ended:
    """A call that is over.

    Attributes:
        status: 0, 1 after an exception, or minus the number of the signal that ended the process.
        result: what the function returned; None where it did not.
        said: what it wrote to standard output and standard error.
        seconds: from the fork to the end.
    """

    status: int
    result: Any
    said: str
    seconds: float


class Server:
    """Calls functions of modules, each in a process of its own. Arguments and results are what JSON can carry."""

    def __init__(self) -> None:
        code = "from tests.trainer import forked; forked.serve()"
        # One thread: what is forked has that one alone.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipe)
        self._calls = 0

    def call(
        self, function: Callable[..., Any], *arguments: Any, directory: Path = ROOT, kill_after: float | None = None
    ) -> Ended:
        """Call ``function`` in ``directory``; ``kill_after``: seconds until SIGKILL, where the process still runs."""
        (ended,) = self._ended([self._request(function, arguments, directory, {})], kill_after)
        return ended

    def together(self, function: Callable[..., Any], *arguments: Any, processes: int = 2) -> list[Ended]:
        """Call ``function`` in each of several processes of one gloo group, on the CPU; raise if one fails."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(processes))]
        ended = self._ended([self._request(function, arguments, ROOT, rank) for rank in ranks])
        for rank, one in enumerate(ended):
            assert one.status == 0, f"process {rank} ended with {one.status}: {one.said}"
        return ended

    def close(self) -> None:
        """No call is on its way; the server has nothing to finish."""
        self._process.kill()
        self._process.communicate()  # its pipes are closed, and it is waited for
        self._folder.cleanup()

    def _request(
        self, function: Callable[..., Any], arguments: Sequence[Any], directory: Path, environment: dict[str, str]
    ) -> dict[str, Any]:
        self._calls += 1
        return {
            "function": [function.__module__, function.__name__],
            "arguments": arguments,
            "directory": str(directory),
            "environment": environment,
            "said": f"{self._folder.name}/{self._calls}.txt",
            "result": f"{self._folder.name}/{self._calls}.json",
        }

    def _ended(self, requests: list[dict[str, Any]], kill_after: float | None = None) -> list[Ended]:
        """Have the requests carried out at the same time."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(requests).encode() + b"\n")
        children = json.loads(self._line())
        began = time.perf_counter()
        if kill_after is not None and not self._heard(kill_after):
            for child in children:
                with contextlib.suppress(ProcessLookupError):  # it ended at this very moment
                    os.kill(child, signal.SIGKILL)
        statuses = json.loads(self._line())
        seconds = time.perf_counter() - began
        ended = []
        for request, status in zip(requests, statuses, strict=True):
            said, result = Path(request["said"]), Path(request["result"])
            found = json.loads(result.read_text()) if status == 0 else None
            ended.append(Ended(status, found, said.read_text() if said.is_file() else "", seconds))
        return ended

    def _heard(self, seconds: float) -> bool:
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        line: bytes = self._process.stdout.readline() if self._heard(PATIENCE) else b""
        if not line:
            self._process.kill()
            raise RuntimeError("the server of processes does not answer")
        return line


def serve() -> None:
    """What the server does: for every line of standard input, fork, tell the process, and then how it ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    import torch
    from diffusers import UNet2DConditionModel  # noqa: F401 - both packages import a class when it is asked for
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        children = {}
        for number, request in enumerate(json.loads(line)):
            child = os.fork()
            if child == 0:
                _run(**request)
            children[child] = number
        print(json.dumps(list(children)), flush=True)
        print(json.dumps(_statuses(children)), flush=True)


def _statuses(children: dict[int, int]) -> list[int]:
    """How the processes ended, in their order. One that fails would leave the others waiting for it."""
    statuses, left = [0] * len(children), dict(children)
    while left:
        child, status = os.wait()
        statuses[left.pop(child)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in left:
                os.kill(other, signal.SIGKILL)
    return statuses


def _run(
    function: list[str], arguments: list[Any], directory: str, environment: dict[str, str], said: str, result: str
) -> NoReturn:
    """The forked process, from its start to its end."""
    status = 1
    try:
        own = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, own), (2, own)):
            os.dup2(target, stream)  # those of the server are not for what it forks
        os.chdir(directory)
        os.environ.update(environment)
        returned = getattr(importlib.import_module(function[0]), function[1])(*arguments)
        Path(result).write_text(json.dumps(returned))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the server's is cleaned up here
