"""Units: the parts of a parameter tree that share one subspace.

A unit becomes vectors ``[*L, P]``: its leaves, flattened and joined in pytree order.
The leading layer axes ``*L`` stay in front.

Trees match if the paths and shapes of their leaves do. So the same parameters may come
as dicts, as attributes of a module or wrapped in Flax variables, because libraries pass
them to optimizers in different containers.

Symbols: L layers, P parameters of a unit in one layer, K columns.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sbr_jax import checks
from sbr_jax.typing import PyTree, UserError

Names = tuple[str, ...]
"""A path in a tree, whatever the container types on the way."""

_ADVICE = (
    "compute the subspace on the parameters it is used with "
    "(same tree, same unit predicate, same layer_axes)"
)


@dataclasses.dataclass(frozen=True)
class UnitSpec:
    """Description of a unit: its path, and the names and shapes of its leaves."""

    path: str
    key: Names
    treedef: Any
    names: tuple[Names, ...]
    shapes: tuple[tuple[int, ...], ...]

    def layers(self, layer_axes: int) -> tuple[int, ...]:
        """The leading axes ``*L`` that all leaves of the unit share."""
        return self.shapes[0][:layer_axes]

    def size(self, layer_axes: int) -> int:
        """P, the number of parameters of the unit in one layer."""
        return sum(math.prod(shape[layer_axes:]) for shape in self.shapes)

    def fits(self, part: PyTree) -> bool:
        """Whether a subtree has this unit's structure, or no leaves at all."""
        return not jax.tree.leaves(part) or jax.tree.structure(part) == self.treedef


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The parametrisation a subspace belongs to; static and hashable.

    ``treedef`` is the parameters' structure with every unit as a leaf. It tells where
    the units are, so projecting needs no predicate.
    """

    treedef: Any
    units: tuple[UnitSpec, ...]
    layer_axes: int

    def match(
        self, tree: PyTree, *, what: str = "tree"
    ) -> tuple[list[PyTree], Callable[[Sequence[PyTree]], PyTree]]:
        """The units of ``tree``, and a function that puts units back into such a tree.

        Nodes without leaves (``optax.MaskedNode``, ``None``) pass unchecked, also in
        places that the subspace does not cover.

        Raises:
            UserError: if names or shapes differ from the fingerprint, or a leaf is not
                a floating-point array.
        """
        try:
            parts, back = self.treedef.flatten_up_to(tree), self.join
        except ValueError:
            parts = None
        if parts is None or not all(map(UnitSpec.fits, self.units, parts)):
            parts, back = self._match_names(tree, what)
        for spec, part in zip(self.units, parts, strict=True):
            leaves = jax.tree.leaves(part)
            for leaf in leaves:
                checks.floating(what, spec.path, leaf)
            shapes = tuple(tuple(leaf.shape) for leaf in leaves)
            if leaves and shapes != spec.shapes:
                raise UserError(
                    f"expected {what} with shapes {spec.shapes} at {spec.path or '/'}, "
                    f"got {shapes}; {_ADVICE}"
                )
        return parts, back

    def holds(self, tree: PyTree) -> bool:
        """Whether a tree comes in the fingerprint's own containers."""
        try:
            return all(map(UnitSpec.fits, self.units, self.treedef.flatten_up_to(tree)))
        except ValueError:
            return False

    def split(self, tree: PyTree, *, what: str = "tree") -> list[PyTree]:
        """The units of ``tree``; see `match`."""
        return self.match(tree, what=what)[0]

    def entries(self, tree: PyTree) -> list[Any]:
        """The per-unit entries of a basis, eigenvalue or trace tree.

        Raises:
            ValueError: if the tree does not have one entry for each unit.
        """
        try:
            found = self.treedef.flatten_up_to(tree)
        except ValueError:
            flat = jax.tree_util.tree_leaves_with_path(
                tree, is_leaf=lambda x: x is None or is_box(x)
            )
            by_name = {names(path): entry for path, entry in flat}
            if set(by_name) != {spec.key for spec in self.units}:
                raise
            found = [by_name[spec.key] for spec in self.units]
        return [jax.tree.leaves(x)[0] if is_box(x) else x for x in found]

    def join(self, entries: Sequence[Any]) -> PyTree:
        """The inverse of ``entries``, and of ``split`` for the fingerprint's tree."""
        return self.treedef.unflatten(entries)

    def _match_names(
        self, tree: PyTree, what: str
    ) -> tuple[list[PyTree], Callable[[Sequence[PyTree]], PyTree]]:
        """Like `match`, for any containers; units come in the fingerprint's own."""
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)
        place = {names(path): i for i, (path, _) in enumerate(flat)}
        empty = {names(path) for path, leaf in flat if path and _is_empty(leaf)}
        parts: list[Any] = []
        places: list[list[int]] = []
        lost, used = [], set(empty)
        for spec in self.units:
            used.update(spec.names)
            here = [name for name in spec.names if name in place and name not in empty]
            masked = [name for name in spec.names if _is_below(name, empty)]
            if len(here) == len(spec.names):
                places.append([place[name] for name in here])
                parts.append(spec.treedef.unflatten([flat[i][1] for i in places[-1]]))
            elif len(masked) == len(spec.names):
                places.append([])
                parts.append(None)
            else:
                lost.append(spec)
        more = [path for path, _ in flat if names(path) not in used]
        if lost or more:
            raise UserError(
                f"expected {what} with the units {_listed(self.units)}; missing: "
                f"{[spec.path for spec in lost] or 'none'}, unexpected: "
                f"{[jax.tree_util.keystr(p) for p in more] or 'none'}; {_ADVICE}, or "
                "leave what is not covered to another transformation with "
                "optax.partition"
            )

        def back(units: Sequence[PyTree]) -> PyTree:
            leaves = [leaf for _, leaf in flat]
            for where, unit in zip(places, units, strict=True):
                for i, leaf in zip(where, jax.tree.leaves(unit), strict=True):
                    leaves[i] = leaf
            return treedef.unflatten(leaves)

        return parts, back


def names(path: Sequence[Any]) -> Names:
    """A path without its container types and without the box around its array.

    A dict key, an attribute and a list index of the same name count as equal.
    """
    path = list(path)
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path.pop()
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def is_box(node: Any) -> bool:
    """Whether a node only wraps one array as ``node.value``, as Flax variables do."""
    if isinstance(node, dict | list | tuple | None):
        return False
    flat = jax.tree_util.tree_leaves_with_path(node)
    return [path for path, _ in flat] == [(jax.tree_util.GetAttrKey("value"),)]


def _is_empty(node: Any) -> bool:
    """Whether a node has no leaves, like ``None`` or a masked node of Optax."""
    return not jax.tree.leaves(node)


def _is_below(name: Names, roots: set[Names]) -> bool:
    return any(name[:n] in roots for n in range(len(name) + 1))


def _listed(units: Sequence[UnitSpec], most: int = 8) -> str:
    """Paths and shapes of the first few units."""
    shown = [
        f"{unit.path or '/'} {', '.join(map(str, unit.shapes))}"
        for unit in units[:most]
    ]
    more = len(units) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def fingerprint(
    params: PyTree,
    *,
    unit: Callable[[Any], bool] | None = None,
    layer_axes: int | None = None,
) -> Fingerprint:
    """Describe how ``params`` divides into units.

    Args:
        params: any pytree of arrays (or of shapes).
        unit: predicate like ``is_leaf`` of ``jax.tree``; ``None`` makes each leaf one.
        layer_axes: how many leading axes of every leaf count layers; ``None`` is 0.

    Returns:
        The static description that ``Subspace`` carries.

    Raises:
        UserError: if a unit is empty, or its leaves disagree on the layer axes.
    """
    if unit is not None:
        checks.function("unit", unit)
    axes = 0 if layer_axes is None else checks.whole("layer_axes", layer_axes, least=0)

    def is_unit(node: Any) -> bool:
        return (unit is not None and unit(node)) or is_box(node)

    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_unit)
    if not flat:
        raise UserError(
            "expected parameters with at least one array, got a tree without leaves"
        )
    specs = []
    for path, subtree in flat:
        inner, structure = jax.tree_util.tree_flatten_with_path(subtree)
        where = jax.tree_util.keystr(path)
        for _, leaf in inner:
            checks.floating("parameters", where, leaf)
        shapes = tuple(tuple(leaf.shape) for _, leaf in inner)
        if not inner:
            raise UserError(
                f"expected a unit with at least one array, got none at {where or '/'}; "
                "narrow the unit predicate"
            )
        if any(len(s) < axes or s[:axes] != shapes[0][:axes] for s in shapes):
            raise UserError(
                f"expected leaves that share {axes} leading layer axes, got shapes "
                f"{shapes} at {where or '/'}; stack the layers or lower layer_axes"
            )
        if 0 in map(math.prod, shapes):
            raise UserError(
                f"expected parameters without empty arrays, got shapes {shapes} at "
                f"{where or '/'}; leave the empty ones out"
            )
        leaves = tuple(names((*path, *below)) for below, _ in inner)
        specs.append(UnitSpec(where, names(path), structure, leaves, shapes))
    return Fingerprint(treedef, tuple(specs), axes)


def examples(tree: PyTree, *, what: str) -> int:
    """Number of examples along the leading axis that a tree's arrays share.

    Raises:
        UserError: if they share no such axis, or it is empty.
    """
    shapes = [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(tree)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        raise UserError(
            f"expected {what} to be arrays that share one leading example axis of at "
            f"least one example, got shapes {shapes}"
        )
    return next(iter(sizes.pop()))


def to_vector(unit: PyTree, layer_axes: int, batch_axes: int = 0) -> jax.Array:
    """Join a unit's leaves: ``[*N, *L, P]`` in float32, ``*N`` batch axes in front."""
    lead = layer_axes + batch_axes
    flat = [
        leaf.astype(jnp.float32).reshape(*leaf.shape[:lead], -1)
        for leaf in map(jnp.asarray, jax.tree.leaves(unit))
    ]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)


def from_vector(vector: jax.Array, like: PyTree, layer_axes: int) -> PyTree:
    """Cut ``[*L, P]`` into leaves with the shapes and dtypes of the unit ``like``."""
    leaves, treedef = jax.tree.flatten(like)
    sizes = [math.prod(jnp.shape(leaf)[layer_axes:]) for leaf in leaves]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [
        vector[..., end - size : end].reshape(jnp.shape(leaf)).astype(leaf.dtype)
        for leaf, size, end in zip(leaves, sizes, ends, strict=True)
    ]
    return treedef.unflatten(parts)


def over_layers(function: Callable, layer_axes: int) -> Callable:
    """Lift a function of one layer to arrays with leading layer axes."""
    for _ in range(layer_axes):
        function = jax.vmap(function)
    return function
