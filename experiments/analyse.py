"""Same as `sbr-jax analyse`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["analyse", *sys.argv[1:]]))
