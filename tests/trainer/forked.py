"""Processes that start at once: multiprocessing's server, which has imported everything, forks one for each call.

Importing torch, diffusers and transformers takes longer than the work of a tiny run. What is forked is a process all
the same: SIGKILL ends it wherever it is, and what it had in memory is gone.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import tempfile
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
    *("tests.evaluation.tiny", "tests.evaluation.tiny_clip", "tests.trainer.tiny", "pytest"),
)


@dataclass(frozen=True)
class Ended:
    """A call that is over.

    Attributes:
        status: 0, 1 after an exception, or minus the number of the signal that ended the process.
        result: what the function returned; None where it did not.
        said: what it wrote to standard output and standard error.
    """

    status: int
    result: Any
    said: str


class Server:
    """Calls functions, each in a process of its own, on the CPU. Arguments can be pickled, and results are JSON's."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(IMPORTED))
        self._folder = tempfile.TemporaryDirectory()
        self.close = self._folder.cleanup

    def call(self, function: Callable[..., Any], *arguments: Any, directory: Path = ROOT) -> Ended:
        """Call ``function`` in ``directory``."""
        (ended,) = self._ended(function, arguments, directory, [{}])
        return ended

    def together(self, function: Callable[..., Any], *arguments: Any, processes: int = 2) -> list[Ended]:
        """Call ``function`` in each of several processes of one gloo group; raise if one fails."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(processes))]
        ended = self._ended(function, arguments, ROOT, ranks)
        assert not any(one.status for one in ended), ended
        return ended

    def _ended(
        self, function: Callable[..., Any], arguments: Sequence[Any], directory: Path, ranks: list[dict[str, str]]
    ) -> list[Ended]:
        """Call the function at the same time with each environment."""
        places = [Path(tempfile.mkdtemp(dir=self._folder.name)) for _ in ranks]
        processes = [
            self._context.Process(target=_run, args=(function, arguments, directory, environment, place))
            for environment, place in zip(ranks, places, strict=True)
        ]
        for process in processes:
            process.start()
        left = {process.sentinel: process for process in processes}
        while left:
            over = multiprocessing.connection.wait(list(left), PATIENCE)
            for process in [left.pop(sentinel) for sentinel in over]:  # type: ignore[call-overload]
                process.join()
            if not over or any(process.exitcode for process in processes):
                for process in left.values():  # which would wait for the one that failed
                    process.kill()
            assert over, f"{function.__name__} has not ended after {PATIENCE:.0f} seconds"
        found = []
        for process, place in zip(processes, places, strict=True):
            status, said, result = int(process.exitcode or 0), place / "said", place / "result"
            returned = json.loads(result.read_text()) if status == 0 else None
            found.append(Ended(status, returned, said.read_text() if said.is_file() else ""))
        return found


def _run(
    function: Callable[..., Any], arguments: Sequence[Any], directory: Path, environment: dict[str, str], place: Path
) -> NoReturn:
    """The forked process, from its start to its end."""
    import torch

    status = 1
    try:
        own = os.open(place / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):  # those of the server are not for what it forks
            os.dup2(own, stream)
        os.chdir(directory)
        os.environ.update({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment)
        torch.set_num_threads(1)  # what is forked has no others
        returned = function(*arguments)
        (place / "result").write_text(json.dumps(returned))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the server's is cleaned up here
