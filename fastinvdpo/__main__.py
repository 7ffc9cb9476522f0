"""``python -m fastinvdpo``, the command line, for ``accelerate launch -m`` and ``torchrun -m`` too."""

import sys

from fastinvdpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
