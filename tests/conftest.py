"""Strict settings for every test; set before jax is imported anywhere."""

import gc
import os
import pathlib
import resource
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests are mostly compilation of tiny programs: most of it is spent on optimising what
# then runs for a millisecond. The older emitters of fusions compile three times faster.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    # A program cut into parts for many threads costs a quarter more, and other workers
    # of pytest are using the cores.
    "--xla_cpu_parallel_codegen_split_count=1",
)
_GIVEN = os.environ.get("XLA_FLAGS", "").split()
_NAMES = {flag.split("=")[0] for flag in _GIVEN}
os.environ["XLA_FLAGS"] = " ".join(
    _GIVEN + [flag for flag in _FLAGS if flag.split("=")[0] not in _NAMES]
)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A second run finds the compilation done.
jax.config.update(
    "jax_compilation_cache_dir",
    str(pathlib.Path(__file__).parent.parent / ".jax_cache"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Tracing makes millions of small objects that die by themselves: looking for cycles
# among them, and among all that the libraries hold, was a tenth of the time.
gc.set_threshold(200_000, 50, 100)


# Minutes alone: a worker that begins one of these last has the others wait for it.
LONG = (
    *("methods/test_methods", "training/test_sharding", "programs/test_tune"),
    *("distributed/test_distributed_runs", "training/test_pipeline"),
    *("programs/test_analyse_program", "core/test_misuse", "methods/test_adaptive"),
    *("core/test_subspace", "programs/test_chat_runs", "programs/test_rehearsal"),
    *("methods/test_lean", "methods/test_guard_judge", "core/test_subspace_geometry"),
    *("models/test_generate", "core/test_containers", "training/test_run_folders"),
    *("training/test_loop", "attacks/test_attack_studies", "core/test_metric"),
)


def pytest_collection_modifyitems(items):
    """Long files go first; xdist hands them to its workers in this order."""
    here = pathlib.Path(__file__).parent
    place = {here / f"{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_collection_finish():
    """Leaves what was imported out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def uncached():
    """Compiles everything anew: what the cache has, the compiler warns of no more."""
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def small_files():
    """A limit on the size of a file, which is told as a full disk is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 3_000


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    """Frees what files compiled, before it is too much; until then they share it.

    A program holds three memory maps, of which Linux allows a process 65,530, and more
    than a megabyte: the whole suite compiles thousands.
    """
    yield
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
