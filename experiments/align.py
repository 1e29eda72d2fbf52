"""Same as `sbr-jax align`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["align", *sys.argv[1:]]))
