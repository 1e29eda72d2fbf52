"""Same as `sbr-jax export`."""

import sys

from sbr_jax.programs.export import main

if __name__ == "__main__":
    sys.exit(main())
