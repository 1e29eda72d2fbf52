"""Same as `sbr-jax smollm2`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["smollm2", *sys.argv[1:]]))
