"""One training step, one evaluation step, and the log-probabilities under both.

All weigh tokens by `Batch.latent_weights`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.parallel import on_own_rows
from perceiver_ar_jax.training.losses import (
    cross_entropy,
    token_nats,
    token_nats_and_likeliest,
    token_nats_and_ranks,
)
from perceiver_ar_jax.training.state import Batch, TrainState


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: PerceiverAR,
    prefix_len: int,
    key: jax.Array,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on the weighted mean loss of the latents.

    Pure; jit it with `static_argnames=("model", "prefix_len", "microbatches")` and donate the
    state.

    Args:
      state: parameters, moments and step.
      batch: rows of S positions; the first `prefix_len` are prefix. If the others are a multiple
        W of max_latents, they are W windows of latents, each of which reads everything before it:
        the loss is the mean over all of them, and the prefix is read once.
      model: static under jit.
      prefix_len: static under jit.
      key: of the whole run; the step is folded in.
      microbatches: steps of gradient accumulation, to reduce activation memory. Gradients are
        still reduced over devices once per step, so each device holds all parameters and their
        gradient meanwhile, 8 bytes per parameter. Dropout masks then depend on the number of
        devices.

    Returns:
      The next state, and metrics: "loss" in nats per token, "grad_norm" before clipping, and
      "tokens", the sum of the weights; with `skip_spikes` also "skipped", the number of skipped
      steps so far.
    """
    weights_BL = batch.latent_weights(prefix_len)
    num_targets = weights_BL.sum()
    weights_BL = weights_BL / jnp.maximum(num_targets, 1.0)
    step_key = jax.random.fold_in(key, state.step)
    differentiate = jax.value_and_grad(
        functools.partial(loss_sum, model=model, prefix_len=prefix_len)
    )
    if microbatches > 1:
        differentiate = _accumulated(differentiate, microbatches)
    loss, gradients = differentiate(state.params, batch, weights_BL, step_key)
    tx = optax.with_extra_args_support(state.tx)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params, value=loss)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1 - state.ema_decay)
    state = state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params
    )
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), "tokens": num_targets}
    skipped = optax.tree.get(opt_state, "skipped")
    return state, metrics if skipped is None else metrics | {"skipped": skipped}


def eval_step(
    params: Any, batch: Batch, *, model: PerceiverAR, prefix_len: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log p(target) in nats over the latents, and the sum of the weights."""
    weights_BL = batch.latent_weights(prefix_len)
    log_probs_BL = token_log_probs(params, batch, model=model, prefix_len=prefix_len)
    return -(log_probs_BL * weights_BL).sum(), weights_BL.sum()


def token_log_probs(params: Any, batch: Batch, *, model: PerceiverAR, prefix_len: int) -> jax.Array:
    """Log-probability of the target of each latent, (B, L) float32, in nats; unweighted."""
    return -token_nats(*_head_inputs(params, batch, model=model, prefix_len=prefix_len))


def token_log_probs_and_ranks(
    params: Any, batch: Batch, *, model: PerceiverAR, prefix_len: int
) -> tuple[jax.Array, jax.Array]:
    """`token_log_probs`, and how many tokens are likelier than each target, (B, L) int32."""
    inputs = _head_inputs(params, batch, model=model, prefix_len=prefix_len)
    nats_BL, ranks_BL = token_nats_and_ranks(*inputs)
    return -nats_BL, ranks_BL


def token_log_probs_and_likeliest(
    params: Any, batch: Batch, *, model: PerceiverAR, prefix_len: int, count: int, num_ids: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`token_log_probs`; ids and log-probabilities of the likeliest tokens, (B, L, A) each.

    Those are the `count` likeliest of the first `num_ids` ids, likeliest first.
    """
    inputs = _head_inputs(params, batch, model=model, prefix_len=prefix_len)
    nats_BL, ids_BLA, nats_BLA = token_nats_and_likeliest(*inputs, count=count, num_ids=num_ids)
    return -nats_BL, ids_BLA, -nats_BLA


def loss_sum(
    params: Any,
    batch: Batch,
    weights_BL: jax.Array,
    dropout_key: jax.Array | None = None,
    *,
    model: PerceiverAR,
    prefix_len: int,
) -> jax.Array:
    """Weighted sum of -log p(target) in nats, to differentiate; with a key, under dropout."""
    inputs = _head_inputs(params, batch, dropout_key, model=model, prefix_len=prefix_len)
    return cross_entropy(*inputs, weights_BL)


def _accumulated(loss_and_gradients, microbatches):
    """The same function of the whole batch; each device accumulates over parts of its rows."""

    def own_rows(params, *rows):
        cut = lambda x: x.reshape(microbatches, len(x) // microbatches, *x.shape[1:])

        def add(sums, part):
            batch, weights_BL, keys_B = part
            terms = loss_and_gradients(params, batch, weights_BL, keys_B[0])
            return jax.tree.map(jnp.add, sums, terms), None

        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, jax.tree.map(cut, rows))[0]

    def whole_batch(params, batch, weights_BL, key):
        keys_B = jax.random.split(key, len(weights_BL))
        summed = on_own_rows(own_rows, in_rows=(False, True, True, True), out_rows=(False, False))
        return summed(params, batch, weights_BL, keys_B)

    return whole_batch


def _head_inputs(params, batch, dropout_key=None, *, model, prefix_len):
    """What the head reads, its parameters, and the targets of the latents."""
    hidden_BLD = model.apply(
        {"params": params},
        batch.tokens,
        prefix_len,
        batch.pad_mask,
        segment_ids=batch.segment_ids,
        deterministic=dropout_key is None,
        num_windows=_num_windows(batch.tokens.shape[1] - prefix_len, model.config.max_latents),
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="hidden",
    )
    embedding_VD = params["token_embedding"]["embedding"]
    return hidden_BLD, embedding_VD, params.get("output_bias"), batch.targets[:, prefix_len:]


def _num_windows(num_latents, max_latents):
    return num_latents // max_latents if num_latents and num_latents % max_latents == 0 else 1
