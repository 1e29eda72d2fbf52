"""TPU chips, and the slices that they come in.

Figures are the maker's, for one chip: https://cloud.google.com/tpu/docs/v4 (and v5e,
v5p, v6e). For links see https://jax-ml.github.io/scaling-book/tpus, whose 4.5e10 and
9e10 bytes a second one way are what remains of a stated 50 and 100 GB/s.
"""

import dataclasses
import math

from sbr_jax import errors
from sbr_jax.typing import UserError

GIB = 2**30
REACHED = {"products": 0.4, "memory": 0.6, "links": 0.6}
"""Share of a chip's figures that programs reach, as in `sbr_jax.costs.devices`."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peak figures of one chip.

    Attributes:
        flops: bfloat16 FLOPs a second, of products.
        memory: bytes that a program may use; the runtime keeps a little for itself.
        bandwidth: memory bytes a second.
        link: bytes a second of one link, one way.
        ring: a side of a slice closes into a ring if it is a multiple of this.
        sides: shapes of slices, the smallest first.
        options: of the compiler's description of a slice.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    ring: int
    sides: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

CHIPS = {
    # 16 GB, 819 GB/s, 400 GB/s both ways over 4 links; of the memory the compiler can
    # use 15.75 GiB.
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 4.5e10, 16, _FLAT),
    # 32 GB, 1638 GB/s, 800 GB/s both ways over 4 links.
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 9e10, 16, _FLAT),
    # 95 GiB, 2765 GB/s, 1200 GB/s both ways over 6 links.
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 9e10, 4, _CUBES),
    # 32 GiB, 1200 GB/s, 6 links; both cores of a chip are one device.
    "v4": Chip(
        275e12,
        31.75 * GIB,
        1200e9,
        4.5e10,
        4,
        _CUBES,
        (("chip_config_name", "megacore"),),
    ),
}
"""Chips by the name at the start of a topology."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: a kind of chip, and the sides of the block that the chips form.

    >>> parse_topology("v5e:4x4").chips, parse_topology("v5p:2x2x4").chips
    (16, 16)
    """

    kind: str
    sides: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The figures of each chip."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.sides)

    @property
    def link_bandwidth(self) -> float:
        """Bytes a second that a chip receives along one side of the slice.

        Both ways if the slice closes into a ring, else one way: the chips at the ends
        of a line have one neighbour, and the others wait for them.
        """
        closed = all(side % self.chip.ring == 0 for side in self.sides)
        return self.chip.link * (2 if closed else 1)

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.sides))}"


def parse_topology(text: str) -> Topology:
    """Reads ``"v5e:4x4"``.

    Raises:
        UserError: for an unknown kind of chip or a slice that it does not have; lists
            those that there are.
    """
    kind, colon, sides = text.partition(":")
    if kind not in CHIPS:
        known = [f"{name}:{chip.sides[2]}" for name, chip in CHIPS.items()]
        raise errors.unknown("topology", text, known)
    if sides not in CHIPS[kind].sides:
        valid = ", ".join(f"{kind}:{x}" for x in CHIPS[kind].sides)
        got = sides if colon else "none"
        raise UserError(
            f"--topology {text}: expected a slice of {kind}, one of {valid}; got {got}"
        )
    return Topology(kind, tuple(map(int, sides.split("x"))))


def slices(kind: str) -> list[Topology]:
    """All slices of a kind, the smallest first."""
    return [parse_topology(f"{kind}:{sides}") for sides in CHIPS[kind].sides]
