"""Same as `sbr-jax attack`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["attack", *sys.argv[1:]]))
