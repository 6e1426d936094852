"""The rule of gradient descent."""

from __future__ import annotations

import optax

from starling.algorithms.ppo_parameters import PPOParameters


def make_optimizer(options: PPOParameters) -> optax.GradientTransformation:
    """Clip by global norm, then Adam or RMSProp; the learning rate is applied by the update."""
    if options.optimizer == "adam":
        scale = optax.scale_by_adam(eps=options.adam_eps)
    else:
        scale = optax.scale_by_rms(decay=0.99, eps=options.adam_eps, initial_scale=1.0)
    if options.max_grad_norm is None:
        return scale
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), scale)
