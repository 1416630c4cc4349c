"""Steps whose loss or gradient stands out are left out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SkipSpikesState(NamedTuple):
    """State of `skip_spikes`, part of the optimizer's and so of every checkpoint."""

    inner: optax.OptState
    recent_W2: jax.Array  # loss and gradient norm of the last steps, spikes cut to the limit
    seen: jax.Array  # int32, steps so far
    skipped: jax.Array  # int32, how many of them were left out


def skip_spikes(
    inner: optax.GradientTransformation, *, window: int, threshold: float
) -> optax.GradientTransformationExtraArgs:
    """Leaves parameters and the state of `inner` untouched where a step is a spike.

    A step is one if its loss or its gradient norm lies more than `threshold` standard deviations
    above the mean of the last `window` steps. Until there are so many, none is. A spike counts
    among the recent steps as the limit it exceeded, so that a level that stays is soon the usual.

    `update` takes the loss as the keyword `value`.
    """

    def init(params: Any) -> SkipSpikesState:
        zero = jnp.int32(0)
        return SkipSpikesState(inner.init(params), jnp.zeros((window, 2)), zero, zero)

    def update(gradients, state, params=None, *, value, **_):
        step_2 = jnp.stack([value, optax.tree.norm(gradients)])
        mean_2, std_2 = state.recent_W2.mean(axis=0), state.recent_W2.std(axis=0)
        limit_2 = jnp.where(state.seen < window, jnp.inf, mean_2 + threshold * std_2)
        is_spike = (step_2 > limit_2).any()
        updates, inner_state = inner.update(gradients, state.inner, params)
        keep = lambda old, new: jax.tree.map(lambda x, y: jnp.where(is_spike, x, y), old, new)
        updates = keep(optax.tree.zeros_like(updates), updates)
        return updates, SkipSpikesState(
            keep(state.inner, inner_state),
            state.recent_W2.at[state.seen % window].set(jnp.minimum(step_2, limit_2)),
            state.seen + 1,
            state.skipped + is_spike,
        )

    return optax.GradientTransformationExtraArgs(init, update)
