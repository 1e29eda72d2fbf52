"""Same as `sbr-jax tune`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
