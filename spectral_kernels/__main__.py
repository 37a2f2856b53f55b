"""`python -m spectral_kernels` is the command `spectral-kernels`."""

import sys

from .cli import main

sys.exit(main())
