"""Numbers that results and folders hang on: of random streams, and of stages."""

import jax
import pytest

from sbr_jax.training.stages import NAMES, last_of, name_of, number_of
from sbr_jax.training.streams import Stream, key_of

STREAMS = {
    "ADAPTER": 0,
    "INIT": 1,
    "STEPS": 2,
    "END_DOMAIN": 3,
    "REFRESH": 4,
    "REPAIR": 5,
    "PREPARE": 6,
    "BEGIN_DOMAIN": 7,
}


def test_streams_have_the_numbers_of_all_runs_so_far():
    assert {stream.name: stream.value for stream in Stream} == STREAMS


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_key_of_a_stream_folds_its_number_in(seed):
    for stream in (Stream.ADAPTER, Stream.BEGIN_DOMAIN):
        found = jax.random.key_data(key_of(seed, stream))
        wanted = jax.random.fold_in(jax.random.key(seed), STREAMS[stream.name])
        assert (found == jax.random.key_data(wanted)).all()


def test_stages_are_numbered_as_their_folders_are():
    numbers = [number_of(i, kind) for i in range(3) for kind in NAMES]
    assert numbers == list(range(1, 13))
    assert [name_of(n) for n in numbers] == [*NAMES.values()] * 3
    assert name_of(0) == "subspace"
    assert [last_of(n) for n in (0, 1, 3)] == [0, 4, 12]
