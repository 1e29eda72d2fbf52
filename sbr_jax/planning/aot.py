"""Lowers a job's programs from shapes alone; the devices need not exist.

The step, the passes of a Fisher estimate and the writing of answers are the functions
that a run calls. Only their arguments are shapes, each with its place on the mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sbr_jax import _mesh
from sbr_jax.data.by_length import by_length
from sbr_jax.fisher import gradients
from sbr_jax.methods.base import LAYER_AXES
from sbr_jax.methods.likelihood import answer_loss
from sbr_jax.models import init_params, is_lora_pair
from sbr_jax.models.buckets import bucket
from sbr_jax.models.generate import read_prompts, write_answers
from sbr_jax.models.sharding import fit_spec
from sbr_jax.planning.case import Case
from sbr_jax.planning.layouts import Layout
from sbr_jax.subspace import Subspace, sketch, spectrum, units
from sbr_jax.subspace.factors import unit_eigenpairs
from sbr_jax.training import sharding
from sbr_jax.training.program import Program, init_adapter, make_program
from sbr_jax.typing import PyTree, UserError

UNTOLD = (TypeError, jax.errors.JAXIndexError, AttributeError)
"""Errors that JAX raises if a traced hook asks for a number, or for its location."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lowered:
    """A program that is ready to compile.

    Attributes:
        name: of the part of the job.
        lowered: the object that JAX compiles.
        held: bytes of its arguments on one device, by kind.
        rounds: the most rounds of a loop whose number of rounds depends on data.
        beside: bytes that are in memory without being arguments.
    """

    name: str
    lowered: Any
    held: Mapping[str, float]
    rounds: int = 1
    beside: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, float]:
        """Bytes of the arguments and of other data in memory."""
        names = dict.fromkeys([*self.held, *self.beside])
        parts = (self.held, self.beside)
        return {name: sum(x.get(name, 0.0) for x in parts) for name in names}


@dataclasses.dataclass(frozen=True, eq=False)
class Shapes:
    """Arguments of a job's programs, as shapes with places.

    Attributes:
        case: the job.
        mesh: the mesh of devices.
        program: the variant's program.
        base: frozen weights.
        adapter: the adapter as trained.
        state: the method's state.
    """

    case: Case
    mesh: Mesh
    program: Program
    base: PyTree
    adapter: PyTree
    state: PyTree

    def whole(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array that every device holds."""
        place = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def cache(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Keys or values ``[L, B, S, K, H]``, as ``models.generate`` keeps them."""
        spec = PartitionSpec(None, _mesh.ROWS, None, "tp", None)
        place = NamedSharding(self.mesh, fit_spec(spec, shape, self.mesh))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array whose first axis counts examples."""
        found = {"tokens": jax.ShapeDtypeStruct(shape, dtype)}
        places = sharding.batch_shardings(self.mesh, found)
        return sharding.shapes(found, places)["tokens"]

    @functools.cached_property
    def key(self) -> jax.ShapeDtypeStruct:
        """A random key."""
        shape = jax.eval_shape(lambda: jax.random.key(0))
        return self.whole(shape.shape, shape.dtype)


def shapes_of(case: Case, layout: Layout, devices: Sequence[Any]) -> Shapes:
    """The arguments of a job on a mesh of given devices.

    Raises:
        UserError: for a method whose state cannot be derived from shapes.
    """
    mesh = sharding.make_mesh(str(layout), devices)
    study, config = case.study(), case.config(layout)
    program = make_program(case.method, study, config, mesh)
    base = jax.eval_shape(
        lambda: init_params(jax.random.key(0), study.model.config, case.dtype)
    )
    base = sharding.shapes(
        base, sharding.base_shardings(mesh, base, study.model.config)
    )
    adapter = _placed(mesh, jax.eval_shape(lambda: init_adapter(study, config, 0)))
    try:
        problem = dataclasses.replace(program.problem, unaligned=base)
        state = program.method.state_shapes(problem, base, adapter)
    except UNTOLD as error:
        raise UserError(
            f"--method {case.method}: expected a state that shapes tell, got one that "
            "is computed from the weights: plan a method near it"
        ) from error
    return Shapes(case, mesh, program, base, adapter, _placed(mesh, state))


def _placed(mesh: Mesh, tree: PyTree) -> PyTree:
    """The shapes of a state with their places."""
    return sharding.shapes(tree, sharding.state_shardings(mesh, tree))


def step(given: Shapes) -> Lowered:
    """The optimizer step."""
    train = jax.eval_shape(given.program.start, given.adapter, given.state)
    train = _placed(given.mesh, train)
    batch = given.case.batch(given.program.method, given.program.problem)
    places = sharding.batch_shardings(given.mesh, batch)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name])
        for name, x in batch.items()
    }
    lowered = given.program.step.lower(given.base, train, given.state, batch, given.key)
    bases, moments = _apart(train)
    held = {
        "weights": held_bytes(given.base),
        "adapter, moments": moments,
        "basis": bases + _apart(given.state)[0],
        "method": _apart(given.state)[1],
        "batch": held_bytes(batch),
    }
    return Lowered("step", lowered, held)


def _apart(tree: PyTree) -> tuple[float, float]:
    """Bytes on one device of the bases in a state, and of everything else."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Subspace))
    bases = sum(held_bytes(x.basis) for x in nodes if isinstance(x, Subspace))
    return bases, held_bytes(tree) - bases


def held_bytes(tree: PyTree) -> float:
    """Bytes on one device of shapes with places.

    >>> held_bytes([jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)])
    12.0
    """
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        place, shape = leaf.sharding, leaf.shape
        own = shape if place is None else place.shard_shape(shape)
        width = leaf.dtype.itemsize
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            width = 8
        total += math.prod(own) * width
    return total


# --- Fisher ---------------------------------------------------------------------------


def fisher_gradients(given: Shapes) -> Lowered:
    """Differentiates a batch example by example and adds it to the buffer."""
    case, mesh, study = given.case, given.mesh, given.case.study()
    mark, held = rows(given)
    loss_fn = answer_loss(study.model.apply_fn, "sum")
    batch = next(iter(by_length(study.calibration, case.fisher, least=case.fisher)))
    batch = {name: given.whole(x.shape, x.dtype) for name, x in batch.items()}
    number = given.whole((), jnp.int32)
    devices = _mesh.parts(_mesh.ROWS, mesh)
    size = math.ceil(case.fisher / devices) * devices

    def one(held: Any, params: PyTree, batch: PyTree, base: PyTree, *numbers: Any):
        first, count, seen, place = numbers
        parts, norms = gradients.microbatch_gradients(
            params, batch, first, count, seen, (base,), None,
            loss_fn=loss_fn, mark=mark, size=size,
        )  # fmt: skip
        new = count - first
        return sketch.write(held, parts, place, new, mark=mark, mesh=mesh), norms

    with _mesh.using(mesh):
        lowered = jax.jit(one, donate_argnums=0).lower(
            held, given.adapter, batch, given.base, *[number] * 4
        )
    own = {"rows": held_bytes(held)}
    return Lowered("Fisher gradients", lowered, _held(given, own), case.fisher)


def fisher_basis(given: Shapes) -> Lowered:
    """The leading eigenvectors of the largest unit, from its rows."""
    held = rows(given)[1]
    largest = max(held, key=lambda x: x.shape[-1])
    number: Any = given.whole(largest.shape[:1], jnp.float32)
    split = _mesh.splitting(largest.shape[-1], given.mesh)
    with _mesh.using(given.mesh):
        lowered = unit_eigenpairs.lower(
            largest,
            spectrum.Scaled(number, number),
            given.whole((), jnp.float32),
            columns=given.program.method.cost.columns,
            energy=ENERGY,
            split=split,
        )
    own = held_bytes(largest)
    others = _held(given, {"rows": held_bytes(held) - own})
    return Lowered("Fisher basis", lowered, {"rows": own}, SWEEPS, others)


ENERGY = 0.8
"""Energy of an estimate; it decides how many columns stay, not the time."""
SWEEPS = 15
"""Rounds of an eigenvalue solver that stops when it has converged."""


def rows(given: Shapes) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The adapter's fingerprint, and the rows of a Fisher's buffer."""
    case, training = given.case, given.case.training
    columns = given.program.method.cost.columns
    mark = units.fingerprint(given.adapter, unit=is_lora_pair, layer_axes=LAYER_AXES)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(given.adapter))
    sizes = sketch.plan(
        count,
        columns,
        case.fisher,
        max(training.fisher_buffer, columns),
        training.memory_bytes,
    )
    count = min(case.calibration, sizes.rows)
    shapes = jax.eval_shape(lambda: sketch.reserve(mark, count))

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(None, None, _mesh.dividing(x.shape[-1], given.mesh))
        place = NamedSharding(given.mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return mark, [placed(x) for x in shapes]


# --- answers --------------------------------------------------------------------------


def read(given: Shapes) -> Lowered:
    """Reads some prompts before answers are written."""
    case, model = given.case, given.case.study().model
    width = bucket(case.prompt)
    with _mesh.using(given.mesh):
        lowered = read_prompts.lower(
            model.config,
            model.hardware,
            given.base,
            given.adapter,
            given.whole((case.read_rows, width), jnp.int32),
            given.whole((case.read_rows,), jnp.int32),
        )
    return Lowered("read", lowered, _held(given, {}))


def write(given: Shapes) -> Lowered:
    """Writes answers, one token of all rows at a time."""
    case, model = given.case, given.case.study().model
    config, width, slots = model.config, bucket(case.prompt), bucket(case.new)
    entries = (config.layers, case.rows, width, config.kv_heads, config.head_dim)
    cache = tuple(given.cache(entries, case.dtype) for _ in range(2))
    with _mesh.using(given.mesh):
        lowered = write_answers.lower(
            config,
            model.hardware,
            slots,
            given.base,
            given.adapter,
            given.whole((case.rows, config.vocab_size), jnp.float32),
            cache,
            given.whole((case.rows,), jnp.int32),
            given.whole((), jnp.int32),
            None,
            given.whole((), jnp.float32),
        )
    held = _held(given, {"cache": held_bytes(cache)})
    return Lowered("write", lowered, held, case.new)


def _held(given: Shapes, more: Mapping[str, float]) -> dict[str, float]:
    """Bytes on one device of weights, adapter and the given entries."""
    adapter = held_bytes(given.adapter)
    return {"weights": held_bytes(given.base), "adapter, moments": adapter, **more}


PARTS: dict[str, Callable[[Shapes], Lowered]] = {
    "step": step,
    "Fisher gradients": fisher_gradients,
    "Fisher basis": fisher_basis,
    "read": read,
    "write": write,
}
"""Parts of a job by name."""
