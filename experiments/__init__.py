"""Command-line programs of sbr_jax, to start from a clone."""
