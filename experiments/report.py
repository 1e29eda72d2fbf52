"""Same as `sbr-jax report`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
