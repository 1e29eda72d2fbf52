"""Counts over the text of compiled programs, against what is known by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sbr_jax.planning.counting import count
from sbr_jax.planning.hlo import parse
from sbr_jax.typing import UserError

N = 16
X = jax.ShapeDtypeStruct((N, N), jnp.float32)
STACK = jax.ShapeDtypeStruct((5, N, N), jnp.float32)
PRODUCT = 2 * N**3


def scanned(ws, x, step=jnp.matmul, **options):
    return jax.lax.scan(lambda y, w: (step(y, w), None), x, ws, **options)[0]


def nested(ws, x):
    def inner(y, w):
        return jax.lax.fori_loop(2, 9, lambda i, z: jnp.tanh(z @ w), y)

    return scanned(ws, x, inner)


def remat(ws, x):
    def layer(y, w):
        return jnp.tanh(jnp.tanh(y @ w) @ w)

    return jnp.sum(scanned(ws, x, jax.checkpoint(layer)))


def waits(ws, x):
    def going(state):
        return (state[0] < 40) & (jnp.max(state[1]) < 1e9)

    return jax.lax.while_loop(going, lambda s: (s[0] + 1, s[1] @ x), (0, ws[0]))[1]


def batched(ws, x):
    return jnp.einsum("bij,bjk->bik", ws, ws) + jnp.einsum("bij,kj->bik", ws, x)


def once(ws, x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)


# A recomputed layer runs forwards twice, and each product is two backwards.
PRODUCTS = {
    "a scan": (scanned, 5),
    "a scan from its end": (functools.partial(scanned, reverse=True), 5),
    "a scan in twos and a rest": (functools.partial(scanned, unroll=2), 5),
    "loops in a scan": (nested, 35),
    "a gradient of recomputed layers": (jax.grad(remat, argnums=(0, 1)), 40),
    "a loop that waits for data": (waits, 6),
    "batches": (batched, 10),
    "the longer branch": (once, 2),
}


@functools.cache
def text(name):
    return jax.jit(PRODUCTS[name][0]).lower(STACK, X).compile().as_text()


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_counted_as_often_as_loops_go_round(name):
    found = count(text(name), rounds=6)
    assert found.flops == PRODUCTS[name][1] * PRODUCT
    assert bool(found.unknown) == (name == "a loop that waits for data")
    assert not found.links


def test_the_compilers_own_count_is_that_of_an_unrolled_loop():
    whole = jax.jit(functools.partial(scanned, unroll=5)).lower(STACK, X).compile()
    ours = count(whole.as_text()).flops
    assert ours == count(text("a scan")).flops
    assert whole.cost_analysis()["flops"] == pytest.approx(ours, rel=0.01)


def test_of_a_stack_that_is_sliced_each_layer_is_read_once():
    twice = jax.ShapeDtypeStruct((10, N, N), jnp.float32)
    more = count(jax.jit(scanned).lower(twice, X).compile().as_text()).bytes
    # Were the whole stack read for each of its layers, it would be four times as much.
    assert 1.8 < more / count(text("a scan")).bytes < 2.0


# --- communication --------------------------------------------------------------------

LOCAL = 4 * N * N
COLLECTIVES = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "b"), 4, 3 * LOCAL),
    "all-reduce": (lambda x: jax.lax.psum(x, "b"), 4, 2 * 3 / 4 * LOCAL),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, "b", tiled=True),
        4,
        3 / 4 * LOCAL,
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True),
        2,
        LOCAL / 2,
    ),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]),
        2,
        LOCAL,
    ),
}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_links_are_counted_by_kind_and_group(kind, mesh):
    talk, devices, size = COLLECTIVES[kind]

    def program(x):
        def step(total, _):
            return total + jnp.sum(talk(jnp.sin(x + total))), None

        return jax.lax.scan(step, jnp.float32(0), None, length=3)[0][None]

    whole = jax.ShapeDtypeStruct((8 * N, N), jnp.float32)
    mapped = jax.shard_map(
        program,
        mesh=mesh,
        in_specs=P(("a", "b")),
        out_specs=P(("a", "b")),
        check_vma=False,
    )
    found = count(jax.jit(mapped).lower(whole).compile().as_text())
    assert found.links == {(kind, devices): 3 * size}
    assert found.link_bytes == 3 * size


def test_a_partitioned_product_is_shared_and_pays_for_it(mesh):
    def spec(*axes):
        return NamedSharding(mesh, P(*axes))

    x = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=spec("a", "b"))
    w = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=spec("b", None))
    product = jax.jit(jnp.matmul, out_shardings=spec("a", None))
    found = count(product.lower(x, w).compile().as_text())
    assert found.flops == PRODUCT / 8
    # Half of the rows of the result, whole columns: what four devices add up.
    assert found.links == {("all-reduce", 4): 2 * 3 / 4 * LOCAL / 2}


# --- what a TPU's compiler writes -----------------------------------------------------

TPU = """HloModule jit_f, is_scheduled=true, num_partitions=16

%slicing (p0: bf16[8,64,32], p1: s32[]) -> bf16[64,32] {
  %p0 = bf16[8,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %cut = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero)
  ROOT %flat = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} bitcast(%cut)
}

%multiply (q0: bf16[4,128,64], q1: bf16[64,32]) -> bf16[4,128,32] {
  %q0 = bf16[4,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q1 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %k = bf16[64,32,1]{1,0,2} bitcast(%q1)
  ROOT %c = bf16[4,128,32]{2,1,0:T(8,128)(2,1)} convolution(%q0, %k), \
window={size=1}, dim_labels=0bf_io0->0bf
}

%scores (r0: bf16[4,128,64], r1: bf16[4,96,64]) -> bf16[4,128,96] {
  %r0 = bf16[4,128,64]{2,1,0} parameter(0)
  %r1 = bf16[4,96,64]{2,1,0} parameter(1)
  ROOT %d = bf16[4,128,96]{2,1,0} convolution(%r0, %r1), \
window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
}

%body (b: (s32[], bf16[8,64,32], bf16[4,128,64])) -> (s32[], bf16[8,64,32], \
bf16[4,128,64]) {
  %b = (s32[]{:T(128)}, bf16[8,64,32]{2,1,0}, /*index=2*/bf16[4,128,64]{2,1,0}) \
parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %w = bf16[8,64,32]{2,1,0} get-tuple-element(%b), index=1
  %x = bf16[4,128,64]{2,1,0} get-tuple-element(%b), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %s = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%slicing
  %y = bf16[4,128,32]{2,1,0} fusion(%x, %s), kind=kOutput, calls=%multiply
  %sum = bf16[4,128,32]{2,1,0} all-reduce(%y), replica_groups=[4,4]<=[4,4]T(1,0), \
to_apply=%add
  ROOT %out = (s32[]{:T(128)}, bf16[8,64,32]{2,1,0}, bf16[4,128,64]{2,1,0}) \
tuple(%next, %w, %x)
}

%condition (d: (s32[], bf16[8,64,32], bf16[4,128,64])) -> pred[] {
  %d = (s32[]{:T(128)}, bf16[8,64,32]{2,1,0}, bf16[4,128,64]{2,1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%d), index=0
  %last = s32[]{:T(128)} constant(8)
  ROOT %lt = pred[]{:T(512)} compare(%j, %last), direction=LT
}

ENTRY %main (w: bf16[8,64,32], x: bf16[4,128,64]) -> bf16[4,128,96] {
  %w = bf16[8,64,32]{2,1,0} parameter(0)
  %x = bf16[4,128,64]{2,1,0} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %t = (s32[]{:T(128)}, bf16[8,64,32]{2,1,0}, bf16[4,128,64]{2,1,0}) \
tuple(%start, %w, %x)
  %loop = (s32[]{:T(128)}, bf16[8,64,32]{2,1,0}, bf16[4,128,64]{2,1,0}) while(%t), \
condition=%condition, body=%body
  %kept = bf16[4,128,64]{2,1,0} get-tuple-element(%loop), index=2
  %g = bf16[4,96,64]{2,1,0} all-gather(%slice), \
replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1':(2)4}, dimensions={1}
  %slice = bf16[4,24,64]{2,1,0} slice(%kept), slice={[0:4], [0:24], [0:64]}
  ROOT %r = bf16[4,128,96]{2,1,0} fusion(%kept, %g), kind=kOutput, calls=%scores
}
"""


def test_a_tpus_text_is_counted_like_any_other():
    found = count(TPU)
    layer, scores = 2 * 4 * 128 * 64 * 32, 2 * 4 * 128 * 96 * 64
    assert found.flops == 8 * layer + scores
    y, gathered = 2 * 4 * 128 * 32, 2 * 4 * 96 * 64
    assert found.links == {
        ("all-reduce", 4): 8 * 1.5 * y,
        ("all-gather", 4): gathered * 3 / 4,
    }
    # Of the stack one layer at a time, of what lies near nothing; and the integers that
    # are added, sliced with and compared.
    x, shard = 2 * 4 * 128 * 64, gathered / 4
    layers = 8 * (2 * 64 * 32 + x + y + 2 * y)
    rest = 2 * shard + (shard + gathered) + (x + gathered + 2 * 4 * 128 * 96)
    assert found.bytes == layers + rest + 8 * 4 * 4 + 9 * (4 + 4 + 1)


GATHER = """\
HloModule gather, entry_computation_layout={(f32[2,8]{1,0})->f32[8,8]{1,0}}, \
num_partitions=64

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  ROOT %g = f32[8,8]{1,0} all-gather(%x), GROUPS dimensions={0}
}
"""


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}},", 4),
        ("replica_groups=[16,4]<=[16,4]T(1,0),", 4),
        ("replica_groups=mesh['a'=16,'b'=4] {'b'},", 4),
        ("replica_groups=mesh['a'=16,'b'=4] {'a'},", 16),
        ("replica_groups=mesh['a'=4,'b'=4,'c'=4] {'a','c'},", 16),
        ("replica_groups=mesh['a'=4,'b'=16], device_ids=([16,4]T(1,0)) {'a'},", 4),
        ("replica_groups=mesh['a'=4,'b'=16], device_ids=([64]) {'b'},", 16),
        ("replica_groups={},", 64),
        ("", 64),
    ],
)
def test_every_way_to_name_the_devices_of_a_communication(groups, devices):
    found = count(GATHER.replace("GROUPS", groups))
    assert found.links == {("all-gather", devices): (devices - 1) * 2 * 8 * 4}


SPREAD = """\
HloModule spread, entry_computation_layout={(f32[2,8]{1,0})->f32[8,8]{1,0}}, \
num_partitions=4

%first (p: f32[2,8]) -> (f32[2,8], f32[8,8], u32[]) {
  %p = f32[2,8]{1,0} parameter(0)
  %begin = f32[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %s = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]) custom-call(%begin), \
custom_call_target="AsyncCollectiveStart"
}

%meanwhile (q: f32[2,8]) -> (f32[2,8], f32[8,8]) {
  %q = f32[2,8]{1,0} parameter(0)
  %go = f32[8,8]{1,0} all-gather(%q), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %t = (f32[2,8]{1,0}, f32[8,8]{1,0}) tuple(%q, %go)
}

%last (r: f32[2,8]) -> f32[8,8] {
  %r = f32[2,8]{1,0} parameter(0)
  %end = f32[8,8]{1,0} all-gather(%r), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %d = f32[8,8]{1,0} custom-call(%r, %end), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %a = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%first
  %y = f32[2,8]{1,0} get-tuple-element(%a), index=0
  %b = (f32[2,8]{1,0}, f32[8,8]{1,0}) fusion(%y), kind=kCustom, calls=%meanwhile
  %z = f32[2,8]{1,0} get-tuple-element(%b), index=0
  %c = f32[8,8]{1,0} fusion(%z), kind=kCustom, calls=%last
  %again = f32[2,8]{1,0} slice(%c), slice={[0:2], [0:8]}
  ROOT %g = f32[8,8]{1,0} all-gather(%again), channel_id=8, replica_groups=[1,4]<=[4]
}
"""


def test_a_gather_that_is_spread_over_products_moves_its_bytes_once():
    assert count(SPREAD).links == {("all-gather", 4): 2 * 3 * 2 * 8 * 4}


def test_making_room_for_an_array_is_no_traffic():
    text = GATHER.replace("GROUPS", "").replace(
        "%g = f32[8,8]{1,0} all-gather(%x),",
        '%g = f32[8,8]{1,0} custom-call(%x), custom_call_target="AllocateBuffer",',
    )
    assert count(text).bytes == 0
    assert count(text.replace("AllocateBuffer", "Sort")).bytes == 4 * (2 * 8 + 8 * 8)


def test_groups_in_a_form_that_nobody_knows_are_not_taken_for_all_devices():
    with pytest.raises(ValueError, match="known form, got replica_groups=spiral"):
        count(GATHER.replace("GROUPS", "replica_groups=spiral[4],"))


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(UserError, match="without ENTRY"):
        parse("HloModule jit_f\n")
