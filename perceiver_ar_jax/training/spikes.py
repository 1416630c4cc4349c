"""Skips the update of steps whose loss or gradient norm is far above that of recent steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

SPIKE_RULES = ((r"recent_W2$", (None, None)),)  # how its state lies on a mesh


class SkipSpikesState(NamedTuple):
    """State of `skip_spikes`, part of the optimizer's and so of every checkpoint."""

    inner: optax.OptState
    recent_W2: jax.Array  # loss and gradient norm of recent steps, spikes clipped to the limit
    seen: jax.Array  # int32, steps so far
    skipped: jax.Array  # int32, how many of them were skipped


def skip_spikes(
    inner: optax.GradientTransformation, *, window: int, threshold: float
) -> optax.GradientTransformationExtraArgs:
    """Leaves parameters and the state of `inner` untouched at a spike.

    A step is a spike if its loss or its gradient norm is more than `threshold` standard deviations
    above the mean of the last `window` steps. No step is one before the window is full, or where
    all values in the window are equal and so say nothing about variation. A spike enters the window
    as the limit that it exceeded, so that a persistently higher level soon counts as normal.

    `update` takes the loss as the keyword `value`.
    """

    def init(params: Any) -> SkipSpikesState:
        zero = jnp.int32(0)
        return SkipSpikesState(inner.init(params), jnp.zeros((window, 2)), zero, zero)

    def update(gradients, state, params=None, *, value, **_):
        step_2 = jnp.stack([value, optax.tree.norm(gradients)])
        mean_2, std_2 = state.recent_W2.mean(axis=0), state.recent_W2.std(axis=0)
        is_unknown_2 = (state.seen < window) | (jnp.ptp(state.recent_W2, axis=0) == 0)
        limit_2 = jnp.where(is_unknown_2, jnp.inf, mean_2 + threshold * std_2)
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
