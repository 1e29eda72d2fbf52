"""What a compiled program holds, nothing as wide as logits, and when one is made."""

import contextlib

import jax


def sizes(jaxpr):
    """Sizes of all arrays of a program, those inside its loops included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def widest(function, *arguments):
    """Size of the largest array that a function makes of its arguments."""
    return max(sizes(jax.make_jaxpr(function)(*arguments).jaxpr))


@contextlib.contextmanager
def compiled():
    """Seconds of each compilation meanwhile, as JAX tells its listeners."""
    events = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)
