"""Same as `sbr-jax sweep`."""

import sys

from sbr_jax.programs.sweep import main

if __name__ == "__main__":
    sys.exit(main())
