"""`python -m derta` is `derta`."""

import sys

from derta.cli import main

sys.exit(main())
