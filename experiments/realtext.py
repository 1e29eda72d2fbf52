"""Same as `sbr-jax realtext`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["realtext", *sys.argv[1:]]))
