"""Same as `sbr-jax sweep`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
