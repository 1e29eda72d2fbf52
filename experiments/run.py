"""Same as `sbr-jax run`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
