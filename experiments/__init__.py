"""The command-line programs of sbr_jax, to be started from a clone."""
