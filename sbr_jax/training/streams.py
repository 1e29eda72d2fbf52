"""Streams of random numbers: an independent one for each purpose of a seed."""

import enum

import jax


class Stream(enum.IntEnum):
    """Purpose of a key; its number is folded into the key and decides every result."""

    ADAPTER = 0
    INIT = 1
    STEPS = 2
    END_DOMAIN = 3
    REFRESH = 4
    REPAIR = 5
    PREPARE = 6
    BEGIN_DOMAIN = 7


def key_of(seed: int, stream: Stream) -> jax.Array:
    """The key of a seed for one stream."""
    return jax.random.fold_in(jax.random.key(seed), int(stream))
