"""Same as `sbr-jax attack-map`."""

import sys

from sbr_jax.programs import main

if __name__ == "__main__":
    sys.exit(main(["attack-map", *sys.argv[1:]]))
