"""Updates whose result is not finite are skipped, and counted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def if_finite(after: Any, before: Any) -> Any:
    """The state after an update, or the one before if anything in it would be NaN or infinite.

    Such an update never happened: its random key is drawn from again, so that the next one learns
    as if it had come in place of this one. Only the counters tell.

    Args:
        after: A state with the counters `skipped` and `skipped_in_a_row`.
        before: The same before the update.
    """
    numbers = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
    state = jax.tree.map(lambda after, before: jnp.where(finite, after, before), after, before)
    return state._replace(
        skipped=before.skipped + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, before.skipped_in_a_row + 1),
    )
