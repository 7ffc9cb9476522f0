"""The command ``fastinvdpo``.

The commands need the ``train`` extra; ``doctor`` works with torch alone.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from fastinvdpo._extras import require
from fastinvdpo.errors import InvalidInput, MissingExtra, NonFiniteLoss

_FOREIGN = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "transformers.utils.import_utils": "ImageProcessor` requires torchvision (not installed); falling back to",
}
"""What other packages log when diffusers imports them, about parts that nothing here uses: logger and words."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0; 2 for a mistake of the user's; 1 when training met a loss that is not finite.

    Args:
        argv: arguments without the program's name; those of the process when None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["doctor"]:
        from fastinvdpo import doctor

        return doctor.main(arguments[1:])
    for name, words in _FOREIGN.items():
        logging.getLogger(name).addFilter(_Without(words))
    try:
        require("typer", extra="train", purpose="the command line")
        from fastinvdpo.cli.app import app

        with warnings.catch_warnings():
            # Without the place in the source that raised it, which says nothing to a user of the command.
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            app(arguments, prog_name="fastinvdpo")
        return 0
    except SystemExit as end:  # typer ends so, after --help and usage errors as well
        return end.code if isinstance(end.code, int) else 0
    except (InvalidInput, MissingExtra) as error:
        return _fail(str(error), 2)
    except OSError as error:
        place, reason = f"{error.filename}: " if error.filename else "", error.strerror or str(error)
        return _fail(f"{place}{reason}. Remedy: make it possible to read and write there, and start again.", 2)
    except NonFiniteLoss as error:
        return _fail(str(error), 1)


@dataclass(frozen=True)  # equal ones are added to a logger once
class _Without:
    """A filter of log records that hold certain words."""

    words: str

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
