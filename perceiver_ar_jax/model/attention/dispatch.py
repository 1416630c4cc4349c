import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model.attention import cudnn, pallas, plain, recompute
from perceiver_ar_jax.model.attention.dropout import Dropout
from perceiver_ar_jax.model.attention.fused import backward_on_parts, forward_on_parts
from perceiver_ar_jax.model.attention.visibility import Visibility
from perceiver_ar_jax.parallel import CONTEXT, has_context, platform_in_use, remat_in_use

IMPLEMENTATIONS = {
    "plain": plain.attend,
    "recompute": recompute.attend,
    "pallas": pallas.attend,
    "cudnn": cudnn.attend,
}
FUSED = {"pallas": pallas, "cudnn": cudnn}  # kernels
ON_PLATFORM = {"tpu": "pallas"}  # what "auto" takes where a kernel is made for the platform


def implementation_for(
    config: PerceiverARConfig,
    *,
    num_queries: int,
    platform: str,
    has_dropout: bool = False,
    has_segments: bool = False,
    spread_over_context: bool = False,
) -> str:
    """The implementation that `config.attention` names; where it says "auto", this rule.

    The kernel for the platform, if there is one. Otherwise `recompute` where the backward pass is
    to compute activations again anyway (`remat`), and where the keys are spread over devices, which
    `plain` would gather; otherwise `plain`. Where a kernel, named or not, cannot do it (dropout of
    attention weights; what its `takes` refuses), `recompute` takes its place. "auto" leaves `cudnn`
    alone, which has never run.
    """
    name = config.attention
    if name == "auto":
        recomputes = spread_over_context or remat_in_use(config.remat) != "none"
        name = ON_PLATFORM.get(platform, "recompute" if recomputes else "plain")
    if name not in FUSED:
        return name
    can = FUSED[name].takes(config, num_queries=num_queries, has_segments=has_segments)
    return name if can and not has_dropout else "recompute"


def attend(
    q_BLNH: jax.Array,
    k_BKNH: jax.Array,
    v_BKNH: jax.Array,
    visibility: Visibility,
    *,
    config: PerceiverARConfig,
    dropout: Dropout | None = None,
    max_heads: int | None = None,
    over_context: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention: output (B, L, N, H) and log-sum-exp (B, N, L).

    Args:
      q_BLNH: queries, scaled and rotated.
      k_BKNH: keys, rotated.
      v_BKNH: values.
      visibility: which keys a query sees.
      config: chooses the implementation.
      dropout: of the attention weights.
      max_heads: how many heads are computed at a time; None: all.
      over_context: whether the keys are to be spread over the context axis of the mesh in use, if
        it has one that divides them.
    """
    spread = over_context and has_context(k_BKNH.shape[1])
    name = implementation_for(
        config,
        num_queries=q_BLNH.shape[1],
        platform=platform_in_use(),
        has_dropout=dropout is not None,
        has_segments=visibility.segment_ids_BK is not None,
        spread_over_context=spread,
    )
    run = IMPLEMENTATIONS[name]
    if spread and name != "plain":
        run = functools.partial(run, axis=CONTEXT)
    # A kernel holds a block of one head, however many there are.
    if name in FUSED or max_heads is None or max_heads >= q_BLNH.shape[2]:
        return run(q_BLNH, k_BKNH, v_BKNH, visibility, dropout)
    return _by_heads(run, q_BLNH, k_BKNH, v_BKNH, visibility, dropout, max_heads)


class Passes(NamedTuple):
    """Attention and its gradients apart, for who puts several parts of the keys together.

    `forward(q, k, v, visibility, dropout)` gives output and log-sum-exp; `backward` takes these
    five, the output and log-sum-exp over all keys, and the gradients of both, and gives those of q,
    k and v.
    """

    forward: Callable
    backward: Callable


def passes(
    config: PerceiverARConfig, *, num_queries: int, has_dropout: bool, has_segments: bool
) -> Passes:
    """Those of a kernel where `implementation_for` takes one, otherwise of `recompute`."""
    name = implementation_for(
        config,
        num_queries=num_queries,
        platform=platform_in_use(),
        has_dropout=has_dropout,
        has_segments=has_segments,
    )
    if name not in FUSED:
        return Passes(recompute.forward, recompute.backward)
    kernel = FUSED[name]

    def forward(q_BLNH, k_BKNH, v_BKNH, visibility, dropout=None):
        del dropout
        return forward_on_parts(kernel.forward, q_BLNH, k_BKNH, v_BKNH, visibility)

    def backward(q_BLNH, k_BKNH, v_BKNH, visibility, dropout, *results_and_gradients):
        del dropout
        arguments = q_BLNH, k_BKNH, v_BKNH, visibility, *results_and_gradients
        return backward_on_parts(kernel.backward, *arguments)

    return Passes(forward, backward)


def _by_heads(run, q_BLNH, k_BKNH, v_BKNH, visibility, dropout, max_heads):
    """The same result, `max_heads` heads at a time, in less memory.

    The backward pass computes each group again, so that there too the weights of one group are
    alive at a time.
    """
    ends = list(range(max_heads, q_BLNH.shape[2], max_heads))
    groups = zip(*(jnp.split(x, ends, axis=2) for x in (q_BLNH, k_BKNH, v_BKNH)), strict=True)
    results = [
        jax.checkpoint(run)(*group, visibility, dropout and dropout.fold_in(index))
        for index, group in enumerate(groups)
    ]
    outs, lses = zip(*results, strict=True)
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=1)
