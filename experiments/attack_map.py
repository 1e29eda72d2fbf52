"""Same as `sbr-jax attack-map`."""

import sys

from sbr_jax.programs.attack_map import main

if __name__ == "__main__":
    sys.exit(main())
