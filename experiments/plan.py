"""Same as `sbr-jax plan`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
