"""Attention weights to look at; training and decoding do not make them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from perceiver_ar_jax.model.attention.visibility import LEAST_SUM, Visibility, largest_visible


def attention_weights(
    q_BLNH: jax.Array, parts: Sequence[tuple[jax.Array, Visibility]]
) -> jax.Array:
    """Softmax weights over the keys of all parts in their order, (B, N, L, K) float32.

    Args:
      q_BLNH: queries, scaled and rotated.
      parts: rotated keys (B, K, N, H) each, and which of them a query sees. A query that sees none
        gives 0.
    """
    scores_BNLK = jnp.concatenate(
        [
            visibility.hide(
                jnp.einsum("BLNH,BKNH->BNLK", q_BLNH, k_BKNH, preferred_element_type=jnp.float32)
            )
            for k_BKNH, visibility in parts
        ],
        axis=-1,
    )
    exp_BNLK = jnp.exp(scores_BNLK - largest_visible(scores_BNLK))
    return exp_BNLK / jnp.maximum(exp_BNLK.sum(axis=-1, keepdims=True), LEAST_SUM)
