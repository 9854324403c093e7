"""The optimiser of `tiny`: momentum made orthogonal for the matrices, Adam for embedding and norms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def schedule(peak: float, steps: int, warmup: int, decay: int) -> optax.Schedule:
    """Linear warm-up, a plateau, then linearly to 2 % of the peak over the last `decay` steps."""
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.02 * peak, decay),
        ],
        [warmup, steps - decay],
    )


def orthogonalise(m: jax.Array, iterations: int = 5) -> jax.Array:
    """Push all singular values of m [rows, columns] to about one, by a quintic polynomial in m (Newton-Schulz)."""
    flip = m.shape[0] > m.shape[1]
    x = m.T if flip else m
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if flip else x


def orthogonal_momentum(beta: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum whose update is made orthogonal, scaled to an Adam-like size (0.2 root mean square)."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(grads, momentum, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: beta * m + g, momentum, grads)
        out = jax.tree.map(lambda m, g: 0.2 * max(g.shape) ** 0.5 * orthogonalise(beta * m + g), momentum, grads)
        return out, momentum

    return optax.GradientTransformation(init, update)


def make_optimizer(
    name: str, peak: float, steps: int, warmup: int, decay: int, weight_decay: float = 0.05
) -> optax.GradientTransformation:
    """name: 'adam' (AdamW for everything) or 'muon' (orthogonal momentum for the matrices of the layers)."""
    rate = schedule(peak, steps, warmup, decay)
    adam = optax.adamw(rate, b1=0.9, b2=0.98, eps=1e-9, weight_decay=0.0)
    if name == "adam":
        matrix = optax.adamw(rate, b1=0.9, b2=0.98, eps=1e-9, weight_decay=weight_decay)
    else:
        matrix = optax.chain(
            orthogonal_momentum(), optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(rate)
        )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"matrix": matrix, "other": adam},
            lambda params: {k: "matrix" if k.endswith("_proj.weight") else "other" for k in params},
        ),
    )
