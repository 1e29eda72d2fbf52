"""What cannot work is refused, by every public function and for every argument.

A table of kinds says which values an argument takes and which it does not. Every
wrong value is tried once, beside right ones for all other arguments.
"""

import collections
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sbr_jax
from sbr_jax import (
    UserError,
    fisher_subspace,
    from_factors,
    losses,
    multi_steps,
    update_projection,
)

NAN, INF = float("nan"), float("inf")
# What float32, or arithmetic in it, makes 0 or infinite.
ZERO, SUBNORMAL, HUGE = 1e-50, 1e-40, 1e40
PARAMS = {"v": jnp.ones((2, 3)), "w": jnp.ones((2, 3))}
FACTORS = {"v": jnp.ones((3, 2, 3)), "w": jnp.ones((3, 2, 3))}
S = from_factors(FACTORS, max_rank=2, layer_axes=1)
STATE = update_projection(S, 0.1).init(PARAMS)
KEY = jax.random.key(0)
X, Y = jnp.ones((2, 2, 3)), jnp.ones(2)
Pair = collections.namedtuple("Pair", "x y")
LOGITS, TOKENS, MASK = jnp.zeros((2, 3, 4)), jnp.ones((2, 3), int), jnp.ones((2, 3))


def loss(params, x):
    return jnp.vdot(params["v"], x)


def sampled(params, x, key):
    return jnp.vdot(params["v"], x + jax.random.normal(key, x.shape))


def cast(dtype):
    return jax.tree.map(lambda x: x.astype(dtype), PARAMS)


NO_NUMBER = ["1", True, 1j, [1], jnp.ones(2), {}]
NO_TREE = [
    *({}, 3, "v", cast("int32"), cast("complex64"), cast("bool"), [object()]),
    *({"v": 1.0, "w": 2.0}, {"v": "a", "w": "b"}, {"v": KEY, "w": KEY}),
]
NO_PARAMS = [
    *NO_TREE,
    None,
    {"v": PARAMS["v"]},
    PARAMS | {"u": jnp.ones(2)},
    PARAMS | {"w": jnp.ones((4, 2))},
    {"v": {"x": PARAMS["v"]}, "w": PARAMS["w"]},
]
KINDS = {  # right, wrong
    "cap": ([3, np.int64(2)], [0, -1, 2.5, NAN, None, 10**9, *NO_NUMBER]),
    "count": ([None, 1, 2, np.int32(3)], [0, -1, 2.5, NAN, *NO_NUMBER]),
    "steps": ([1, 2, lambda step: 2], [0, -1, 2.5, NAN, None, "1", True, [1], {}, int]),
    "budget": ([None, 1e9, 10**6], [0, -1.0, 1, NAN, INF, "1e9", []]),
    "buffer": ([512, 1000, 3], [0, -3, 2.5, None, *NO_NUMBER]),
    "axes": ([1, 0, None], [-1, 1.0, 3, *NO_NUMBER]),
    "energy": (
        [0.5, 1, np.float32(0.9)],
        [0.0, -0.1, 1.1, 1 + 1e-12, ZERO, NAN, INF, None, *NO_NUMBER],
    ),
    "rate": (
        [0.0, 1e-3, 1, jnp.float32(0.1), optax.constant_schedule(0.1)],
        [
            *(-1e-3, -1e-50, NAN, INF, -INF, jnp.float32(NAN), 10**400, None),
            *(HUGE, 10**39, np.float64(HUGE), dict, float, *NO_NUMBER),
            *map(optax.constant_schedule, (-1e-3, NAN, INF, HUGE, None, *NO_NUMBER)),
        ],
    ),
    "norm": (
        [1.0, 2, None, jnp.float32(1.0)],
        [0.0, -1.0, ZERO, 1e-46, SUBNORMAL, HUGE, NAN, INF, *NO_NUMBER],
    ),
    "beta": (
        [0.0, 0.9, jnp.float32(0.9), 1 - 1e-7],
        [1.0, 1, -0.1, 1 - 1e-12, NAN, INF, None, *NO_NUMBER],
    ),
    "eps": (
        [1e-8, 1.0, 1e-37],
        [0.0, -1e-8, ZERO, SUBNORMAL, HUGE, NAN, INF, None, *NO_NUMBER],
    ),
    "weight": ([0.0, 0.01, 3], [-0.01, HUGE, NAN, INF, None, *NO_NUMBER]),
    "alpha": (
        [None, 0, 0.5, 1.0, {"v": 0.5, "w": jnp.array([0.0, 1.0])}],
        [
            *(-0.1, 1.5, NAN, INF, "1", True, 1j, {"v": 0.5}, {"v": 0.0, "w": NAN}),
            *(jnp.ones(3), {"v": jnp.ones(3), "w": 0.0}, {"v": "a", "w": 0.0}),
        ],
    ),
    "any-alpha": ([0, 0.5, None], [-0.1, 1.5, NAN, INF, "1", True, 1j, jnp.array(2)]),
    "subspace": ([S], [None, {}, PARAMS, 0.5, "s", STATE, S.basis]),
    "no-subspace": ([S, None], [{}, PARAMS, 0.5, "s", STATE]),
    "tree": ([PARAMS, cast("bfloat16")], NO_PARAMS),
    "no-tree": ([None, PARAMS], [x for x in NO_PARAMS if x is not None]),
    "new-parameters": (
        [PARAMS, {"v": jnp.ones((2, 5))}],
        [x for x in NO_TREE if x != {}],
    ),
    "own-parameters": ([PARAMS], [None, *NO_TREE, {"v": jnp.ones((2, 0))}]),
    "state": ([STATE, (1, STATE)], [None, {}, 3, optax.adam(0.1).init(PARAMS), PARAMS]),
    "factors": (
        [FACTORS],
        [
            None,
            *NO_TREE,
            {"v": jnp.ones((0, 2, 3))},
            {"v": jnp.full((2, 2, 3), NAN)},
            {"v": jnp.ones((3, 2, 3)), "w": jnp.ones((2, 2, 3))},
            {"v": jnp.full((2, 2, 3), 1e30)},
            {"v": jnp.float32(1.0)},
        ],
    ),
    "key": (
        [KEY, jax.random.PRNGKey(0)],
        [None, 0, "a", jnp.zeros(2), np.random, jax.random.split(KEY)],
    ),
    "no-key": ([KEY, None], [0, "a", jnp.zeros(2), jax.random.split(KEY)]),
    "weighting": (
        ["eigenvalue", "uniform"],
        ["median", "", None, 1, True, ["uniform"]],
    ),
    "scale": (
        ["none", "mean", "kind", "parameter"],
        ["max", "", None, 1, False, ["mean"]],
    ),
    "switch": ([True, False], ["yes", None, 2, 0.5, NAN, [], {}, S]),
    "metric": (["adam", "euclidean"], ["sgd", "", None, 1, True, ["adam"]]),
    "fisher": (["empirical"], ["true", "", None, 1, ["empirical"]]),
    "direction": (["forward", "reverse"], ["both", "", None, 1, True]),
    "reduction": (["mean", "sum"], ["max", "", None, 1, True]),
    "unit": ([None, lambda x: False], [3, "v", True, PARAMS, dict]),
    "progress": ([None, lambda seen: None], [3, "v", True, dict]),
    "loss": (
        [loss],
        [
            None,
            3,
            "loss",
            dict,
            lambda p, x: p["v"] * 1.0,
            lambda p, x: 1,
            lambda p, x: None,
            lambda p, x: jnp.sum(x > 0),
            lambda p, x: (loss(p, x), 0),
        ],
    ),
    "optimizer": (
        [optax.sgd(0.1), optax.identity()],
        [None, 3, "adam", optax.adam, optax.MultiSteps, {}, STATE],
    ),
    "batch": (
        [X, X[:1]],
        [None, {}, 3, "x", X[:0], jnp.float32(1.0), {"x": X, "y": X[:1]}, [1, 2]],
    ),
    "batches": (
        [[X], [X, X[:1]], (X,)],
        [
            *(None, 3, "x", b"x", X, np.ones((2, 2, 3)), {"x": X}, [], [X[:0]]),
            *([X, X[:0]], [3], [None], ["x"], Pair(X, X)),
            *((X, Y), [X, Y], (X, X > 0), (X[:, 0], X)),
        ],
    ),
    "args": ([(), []], [None, 3, X, "x", {}]),
    "logits": (
        [LOGITS],
        [None, 3, "x", TOKENS, LOGITS[0, 0], LOGITS[:1], LOGITS[..., 0]],
    ),
    "tokens": ([TOKENS], [None, 3, "x", MASK, TOKENS[:1], TOKENS[:, :2], LOGITS]),
    "mask": ([MASK, TOKENS, MASK > 0], [None, 3, "x", MASK[:1], MASK[:, :2], LOGITS]),
    "states": ([LOGITS], [None, 3, "x", TOKENS, LOGITS[:1], LOGITS[..., :1]]),
}


def from_init(name, **given):
    """A transformation is made, and initialised on parameters."""
    params = given.pop("params")
    return getattr(sbr_jax, name)(**given).init(params)


def from_update(name, **given):
    trees = {k: given.pop(k) for k in ("updates", "params", "bypass") if k in given}
    tx = getattr(sbr_jax, name)(**given)
    state = tx.init(PARAMS)
    return tx.update(
        trees["updates"], state, trees.get("params", PARAMS), bypass=trees.get("bypass")
    )


CALLS = {}
"""Name and how it is called, to the kinds of its arguments."""
for line in """
empty_subspace params=own-parameters max_rank=cap unit=unit layer_axes=axes
from_factors factors=factors max_rank=cap energy=energy unit=unit layer_axes=axes
merge a=subspace b=subspace max_rank=cap energy=energy weighting=weighting
merge protected=no-subspace
contrast a=subspace b=subspace max_rank=cap energy=energy regulariser=eps
project_onto tree=tree subspace=subspace
project_out tree=tree subspace=subspace preconditioner=no-tree
principal_angles a=subspace b=subspace
overlap a=subspace b=subspace
discarded_energy old=subspace new=subspace
effective_rank subspace=subspace
random_subspace key=key like=subspace
shuffled_subspace key=key subspace=subspace
per_example_gradients loss_fn=loss params=own-parameters batch=batch microbatch=count
fisher_subspace loss_fn=loss params=own-parameters batches=batches max_rank=cap
fisher_subspace energy=energy fisher=fisher unit=unit layer_axes=axes args=args
fisher_subspace key=no-key microbatch=count buffer_rank=buffer memory_budget=budget
fisher_subspace progress=progress
energy_share loss_fn=loss params=own-parameters batches=batches subspace=subspace
energy_share args=args microbatch=count
fisher_relaxation subspace=subspace strictness=weight normalisation=scale
read_subspace opt_state=state
replace_subspace opt_state=state subspace=subspace coefficients=alpha
project_onto_complement:init subspace=subspace params=tree
relaxed:init inner=optimizer coefficients=any-alpha params=new-parameters
add_bypass:init params=new-parameters
multi_steps:init inner=optimizer every_k_schedule=steps params=new-parameters
gradient_projection:init subspace=subspace coefficients=alpha max_norm=norm
gradient_projection:init optimizer=optimizer params=tree
update_projection:init subspace=subspace coefficients=alpha max_norm=norm
update_projection:init learning_rate=rate b1=beta b2=beta eps=eps weight_decay=weight
update_projection:init metric=metric task_share=switch params=tree
trust_region:init subspace=subspace epsilon=eps params=tree
trust_region:update subspace=subspace epsilon=eps updates=tree params=tree
project_onto_complement:update subspace=subspace updates=tree
gradient_projection:update subspace=subspace optimizer=optimizer updates=tree
update_projection:update subspace=subspace learning_rate=rate updates=tree params=tree
losses.token_log_likelihood logits=logits tokens=tokens
losses.token_cross_entropy logits=logits tokens=tokens mask=mask
losses.kl_to_reference ref_logits=logits logits=logits mask=mask direction=direction
losses.hidden_state_anchor hidden=states reference=states reduction=reduction
""".strip().splitlines():
    called, *arguments = line.split()
    for argument in arguments:
        name, _, kind = argument.partition("=")
        CALLS.setdefault(called, {})[name] = kind


def call(called, given):
    name, _, how = called.partition(":")
    if how:
        return {"init": from_init, "update": from_update}[how](name, **given)
    owner, _, own = name.rpartition(".")
    function = getattr(losses if owner else sbr_jax, own)
    if name == "per_example_gradients":
        args = [given.pop(k) for k in ("loss_fn", "params", "batch")]
        return function(*args, **given)
    return function(**given)


def with_right(kinds, argument, value):
    """One argument beside the first right value of every other."""
    first = {other: KINDS[kind][0][0] for other, kind in kinds.items()}
    return first | {argument: value}


@pytest.mark.parametrize("called", CALLS)
def test_every_wrong_value_of_every_argument_is_refused_in_one_line(called):
    faults = []
    for argument, kind in CALLS[called].items():
        for value in KINDS[kind][1]:
            where = f"{called}({argument}={' '.join(repr(value).split()):.60})"
            try:
                call(called, with_right(CALLS[called], argument, value))
            except UserError as error:
                if len(str(error).splitlines()) != 1:
                    faults.append(f"{where}: more than one line")
            except Exception as error:  # the fault looked for
                faults.append(f"{where}: {type(error).__name__}: {error!s:.80}")
            else:
                faults.append(f"{where}: accepted")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("called", CALLS)
def test_every_right_value_is_accepted(called):
    for argument, kind in CALLS[called].items():
        for value in KINDS[kind][0]:
            call(called, with_right(CALLS[called], argument, value))


@pytest.mark.parametrize("batches", [(X, X), (X, X[..., :1])], ids=["same", "other"])
@pytest.mark.parametrize(
    "parts",
    [
        lambda p, xy: (lambda x, y: jnp.vdot(p["v"], x) * y)(*xy),  # TypeError
        lambda p, xy: next(jnp.vdot(p["v"], x) for x, *_, z, u in [xy]),  # ValueError
        lambda p, xy: jnp.vdot(p["v"], xy["x"]),  # indexing by a name
        lambda p, xy: jnp.vdot(p["v"], xy.x),  # AttributeError
    ],
)
def test_parts_of_a_batch_that_a_loss_does_not_take_are_refused(parts, batches):
    with pytest.raises(UserError, match=r"list of batches.*pass \[batch\]") as caught:
        fisher_subspace(parts, PARAMS, batches, max_rank=2)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(type(caught.value.__cause__)) as own:  # of the loss itself
        fisher_subspace(parts, PARAMS, [X], max_rank=2)
    assert not isinstance(own.value, UserError)


def test_a_batch_of_parts_is_taken_in_a_list():
    def both(params, pair):
        x, y = pair
        return jnp.vdot(params["v"], x) * y

    assert fisher_subspace(both, PARAMS, [(X, Y)], max_rank=2).trace["v"] > 0


@pytest.mark.parametrize("option", ["foo", "opt", "use_grad_means"])
def test_an_unknown_option_is_named(option):
    with pytest.raises(UserError, match=rf"use_grad_mean.*got '{option}'"):
        multi_steps(optax.sgd(0.1), 2, **{option: 1})
    multi_steps(optax.sgd(0.1), 2, use_grad_mean=False)


def test_the_table_is_whole():
    wrong = [len(KINDS[k][1]) for kinds in CALLS.values() for k in kinds.values()]
    assert sum(wrong) > 150
    tried = {}
    for called, kinds in CALLS.items():
        tried.setdefault(called.partition(":")[0], set()).update(kinds)
    functions = {n: getattr(sbr_jax, n) for n in sbr_jax.__all__}
    functions |= {f"losses.{n}": f for n, f in vars(losses).items() if n[0] != "_"}
    functions = {n: f for n, f in functions.items() if inspect.isfunction(f)}
    assert set(tried) == set(functions)
    for name, function in functions.items():
        parameters = inspect.signature(function).parameters.values()
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        own = {p.name for p in parameters if p.kind not in several}
        assert own <= tried[name], name
