"""Converts adapters between fused modules and single projections.

Phi-3 has one matrix for queries, keys and values, and one for gate and up. PEFT adapts
such a module as a whole, with one A for all members. When we read it, each member gets
that A and its own columns of B. An adapter made here has a separate A for each member.
It is written with m times the rank, its members side by side::

    A = [A_q A_k A_v] [in, 3 r],   B = diag(B_q, B_k, B_v) [3 r, out]

Legend: m members of a module, r rank, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from sbr_jax.models.config import ModelConfig
from sbr_jax.models.lora import LoraPair
from sbr_jax.typing import UserError


def join(
    config: ModelConfig, members: Sequence[str], adapter: Mapping[str, LoraPair]
) -> LoraPair:
    """One pair for the module that holds several projections.

    Args:
      config: the model's settings.
      members: the projections of the module, in order.
      adapter: pairs of at least one member, all of one rank r and scale.

    Returns:
      A pair of rank r if all members share their A, as PEFT's do; else of rank m · r,
      with zeros for a member without an adapter. The update is the same.
    """
    pairs = {name: adapter[name] for name in members if name in adapter}
    first = next(iter(pairs.values()))
    ups = {name: np.asarray(pair.lora_a) for name, pair in pairs.items()}
    shared = all(np.array_equal(up, first.lora_a) for up in ups.values())
    if len(pairs) == len(members) and shared:
        parts = [np.asarray(pairs[name].lora_b) for name in members]
        lora_b = jnp.asarray(np.concatenate(parts, -1))
        return LoraPair(lora_b, first.lora_a, first.scale)
    layers, fan_in, rank = first.lora_a.shape
    width = sum(config.projection(name)[1] for name in members)
    dtype = first.lora_a.dtype
    lora_a = np.zeros((layers, fan_in, len(members) * rank), dtype)
    lora_b = np.zeros((layers, len(members) * rank, width), first.lora_b.dtype)
    for name, inner, outer in _blocks(config, members, rank):
        if name in pairs:
            lora_a[..., inner] = ups[name]
            lora_b[:, inner, outer] = pairs[name].lora_b
    return LoraPair(jnp.asarray(lora_b), jnp.asarray(lora_a), first.scale)


def split(
    config: ModelConfig, members: Sequence[str], pair: LoraPair, rank: int, where: str
) -> dict[str, LoraPair]:
    """Splits a fused module's pair into its members' pairs.

    **Guarantee**: returns what ``join`` was given, bit for bit.

    Args:
      config: the model's settings.
      members: the projections of the module, in order.
      pair: the module's pair, of rank ``rank`` or m · ``rank``.
      rank: r of the adapter.
      where: the module's name for messages.

    Returns:
      A pair for each member; at rank m · r only for members whose A is not zero.

    Raises:
      UserError: if a pair of rank m · r mixes its members.
    """
    apart = pair.lora_a.shape[-1] != rank
    found, seen = {}, 0
    for name, inner, outer in _blocks(config, members, rank):
        inner = inner if apart else slice(None)
        lora_b, lora_a = pair.lora_b[:, inner, outer], pair.lora_a[..., inner]
        seen += np.count_nonzero(lora_b)
        if not apart or np.any(lora_a):
            found[name] = LoraPair(lora_b, lora_a, pair.scale)
    if seen != np.count_nonzero(pair.lora_b):
        raise UserError(
            f"unsupported rank_pattern for {where}: its {len(members)} parts are not "
            "side by side; merge the adapter into its base with peft"
        )
    return found


def _blocks(
    config: ModelConfig, members: Sequence[str], rank: int
) -> Iterator[tuple[str, slice, slice]]:
    """Each member's slices of the rank and of the output."""
    ends = itertools.accumulate(config.projection(name)[1] for name in members)
    for i, (name, (start, end)) in enumerate(
        zip(members, itertools.pairwise([0, *ends]), strict=True)
    ):
        yield name, slice(i * rank, (i + 1) * rank), slice(start, end)
