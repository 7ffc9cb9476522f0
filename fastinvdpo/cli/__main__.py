import sys

from fastinvdpo.cli import main

sys.exit(main())
