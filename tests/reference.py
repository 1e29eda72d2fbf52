"""Dense, slow definitions that the fast code must equal, in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np


def f64(x):
    return np.asarray(x, np.float64)


def columns(basis):
    """The used columns of one basis [P, K]."""
    v = f64(basis)
    return v[:, np.any(v != 0, axis=0)]


def projector(basis):
    """Π = V Vᵀ, dense [P, P]."""
    v = columns(basis)
    return v @ v.T


def dense_fisher(loss_fn, vector, examples):
    """(1/N) Σ g gᵀ for a flat parameter vector, gradients by jacrev of all losses."""

    def losses(p):
        return jnp.stack([loss_fn(p, x) for x in examples])

    jacobian = f64(jax.jit(jax.jacrev(losses))(vector))
    return jacobian.T @ jacobian / len(examples)


def eigen(matrix):
    """Eigenvalues (descending, clamped at 0) and eigenvectors of a symmetric matrix."""
    w, v = np.linalg.eigh(f64(matrix))
    return np.maximum(w[::-1], 0.0), v[:, ::-1]


def published_rank(values, energy):
    """Number of cumulative fractions strictly below ρ, plus one."""
    fractions = np.cumsum(values) / np.sum(values)
    return int(np.sum(fractions < energy - 1e-6)) + 1


def uniform_merge(basis_a, basis_b, energy):
    """Left singular vectors of [V_a, V_b] until σ² reach ρ of their sum; and all σ²."""
    u, sigma, _ = np.linalg.svd(
        np.concatenate([columns(basis_a), columns(basis_b)], axis=1),
        full_matrices=False,
    )
    k = published_rank(sigma**2, energy)
    return u[:, :k], sigma**2


def nearest_outside(update, projector, scale):
    """The s with Π s = 0 nearest to u in the metric diag(1/c), no longer than u.

    By coordinates on the complement: s = N (Nᵀ D N)⁻¹ Nᵀ D u with D = diag(1/c).
    """
    values, vectors = np.linalg.eigh(np.eye(len(update)) - projector)
    n = vectors[:, values > 0.5]
    weighted = n / f64(scale)[:, None]
    out = n @ np.linalg.solve(n.T @ weighted, weighted.T @ update)
    return out * min(1.0, np.linalg.norm(update) / np.linalg.norm(out))


def update_projection(
    steps, projector, alpha, params, rate, *, decay, metric, eps=1e-8
):
    """The steps of `update_projection` on one vector, from pairs (g, b), no clipping.

    α is one number; a zero projector stands for a unit of rank 0.
    """
    b1, b2 = 0.9, 0.999
    together = alpha if projector.any() else 1.0
    theta, out = f64(params), []
    first_g = first_b = whole = parts = np.zeros_like(theta)
    for t, (g, b) in enumerate(steps, start=1):
        g, b = f64(g), f64(b)
        first_g = b1 * first_g + (1 - b1) * g
        first_b = b1 * first_b + (1 - b1) * b
        whole = b2 * whole + (1 - b2) * (g + b) ** 2
        parts = b2 * parts + (1 - b2) * (g**2 + b**2)
        second = together * whole + (1 - together) * parts
        if metric == "adam":
            second = np.maximum(second, (1 - together) * 1e-6 * second.mean())
        scale = np.sqrt(second / (1 - b2**t)) + eps
        task, bypass = (m / (1 - b1**t) for m in (first_g, first_b))
        if metric == "euclidean":
            step = -rate * (task / scale + decay * theta)
            step = step - (1 - alpha) * projector @ step - rate * bypass / scale
        else:
            step = -rate * ((task + bypass) / scale + decay * theta)
            outside = nearest_outside(step, projector, 1 / scale)
            length = np.linalg.norm(bypass)
            kappa = np.linalg.norm(bypass / scale) / length if length else 0.0
            inside = -rate * kappa * projector @ bypass
            step = alpha * step + (1 - alpha) * (outside + inside)
        out.append(step)
        theta = theta + out[-1]
    return out


def ellipsoid_factors(c, values, epsilon):
    """1 / (1 + μ λ) with the smallest μ ≥ 0 for which ½ Σ λ c² ≤ ε, by bisection."""
    c, values = f64(c), f64(values)

    def over(mu):
        return 0.5 * np.sum(values * (c / (1 + mu * values)) ** 2) > epsilon

    if not over(0.0):
        return np.ones_like(c)
    low, high = 1e-60, 1e60
    for _ in range(200):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if over(middle) else (low, middle)
    return 1 / (1 + high * values)


def angles(basis_a, basis_b):
    """Principal angles, ascending: arcsin below 45°, arccos above."""
    a, b = columns(basis_a), columns(basis_b)
    count = min(a.shape[1], b.shape[1])
    cos = np.linalg.svd(a.T @ b, compute_uv=False)[:count]
    sin = np.sort(np.linalg.svd(b - a @ (a.T @ b), compute_uv=False))[:count]
    return np.where(
        cos**2 > 0.5, np.arcsin(np.clip(sin, 0, 1)), np.arccos(np.clip(cos, 0, 1))
    )
