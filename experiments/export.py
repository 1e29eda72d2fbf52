"""Same as `sbr-jax export`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
