"""What a compiled program holds: for tests that nothing in it is as wide as logits."""

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
