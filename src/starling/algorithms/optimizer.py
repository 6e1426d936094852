"""The rule of gradient descent."""

from __future__ import annotations

import optax


def make_optimizer(
    optimizer: str, adam_eps: float, max_grad_norm: float | None
) -> optax.GradientTransformation:
    """Clip by global norm, then Adam or RMSProp; the learning rate is applied by the update."""
    if optimizer == "adam":
        scale = optax.scale_by_adam(eps=adam_eps)
    else:
        scale = optax.scale_by_rms(decay=0.99, eps=adam_eps, initial_scale=1.0)
    if max_grad_norm is None:
        return scale
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), scale)
