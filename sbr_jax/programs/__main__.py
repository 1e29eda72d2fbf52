"""``python -m sbr_jax.programs NAME ...`` is ``sbr-jax NAME ...``."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main())
