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

    jacobian = f64(jax.jacrev(losses)(vector))
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


def update_projection(steps, projector, alpha, params, rate, *, decay, eps=1e-8):
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
        scale = np.sqrt(second / (1 - b2**t)) + eps
        task = -rate * (first_g / (1 - b1**t) / scale + decay * theta)
        task = task - (1 - alpha) * projector @ task
        out.append(task - rate * first_b / (1 - b1**t) / scale)
        theta = theta + out[-1]
    return out


def angles(basis_a, basis_b):
    """Principal angles, ascending: arcsin below 45°, arccos above."""
    a, b = columns(basis_a), columns(basis_b)
    count = min(a.shape[1], b.shape[1])
    cos = np.linalg.svd(a.T @ b, compute_uv=False)[:count]
    sin = np.sort(np.linalg.svd(b - a @ (a.T @ b), compute_uv=False))[:count]
    return np.where(
        cos**2 > 0.5, np.arcsin(np.clip(sin, 0, 1)), np.arccos(np.clip(cos, 0, 1))
    )
