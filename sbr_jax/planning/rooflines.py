"""Bounds a program's time by three limits: products, memory and links.

Each is the least time that one part of a chip needs for its own work. The program takes
at least the longest of the three, as if all ran at once.
"""

import dataclasses

from sbr_jax.planning.chips import REACHED, Topology

LIMITS = ("products", "memory", "links")


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Least seconds by each limit, at a chip's full figures.

    Attributes:
        products: for the matrix products.
        memory: for reading and writing main memory.
        links: for receiving from other chips.
    """

    products: float
    memory: float
    links: float

    @property
    def bound(self) -> str:
        """The limit that decides."""
        return max(LIMITS, key=lambda name: getattr(self, name) / REACHED[name])

    @property
    def peak(self) -> float:
        """The longest at full figures: no program is faster."""
        return max(self.products, self.memory, self.links)

    @property
    def expected(self) -> float:
        """The longest at the share of those figures that programs reach.

        >>> seconds = Seconds(products=4.0, memory=3.0, links=6.0)
        >>> seconds.bound, seconds.peak, seconds.expected
        ('products', 6.0, 10.0)
        """
        return max(getattr(self, name) / REACHED[name] for name in LIMITS)


def seconds(
    flops: float, memory_bytes: float, link_bytes: float, topology: Topology
) -> Seconds:
    """The three limits of a program, from counts of one chip.

    >>> from sbr_jax.planning.chips import parse_topology
    >>> seconds(197e12, 819e9, 4.5e10, parse_topology("v5e:4x4"))
    Seconds(products=1.0, memory=1.0, links=1.0)
    """
    chip = topology.chip
    return Seconds(
        flops / chip.flops,
        memory_bytes / chip.bandwidth,
        link_bytes / topology.link_bandwidth,
    )
