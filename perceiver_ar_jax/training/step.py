import functools

import jax
import jax.numpy as jnp
import optax

from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.parallel import on_own_rows
from perceiver_ar_jax.training.losses import cross_entropy
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
    """One optimizer step on the mean loss of the latents that are no padding.

    Pure; jit it with `static_argnames=("model", "prefix_len", "microbatches")` and donate the
    state.

    Args:
      state: parameters, moments and step.
      batch: windows of S positions; the first `prefix_len` are prefix.
      model: static under jit.
      prefix_len: static under jit.
      key: of the whole run; the step is folded in.
      microbatches: into how many parts each device cuts its rows, to hold the activations of one
        at a time. Gradients are exchanged once a step all the same, so each device holds the
        whole weights and their gradient meanwhile: 8 bytes a parameter. Dropout then draws
        differently on each number of devices.

    Returns:
      The next state, and metrics: "loss" in nats per token, "grad_norm" before clipping, and
      "tokens", how many targets counted; with `skip_spikes` also "skipped", how many steps of the
      run so far were left out.
    """
    counted_BL = (~batch.pad_mask[:, prefix_len:]).astype(jnp.float32)
    num_targets = counted_BL.sum()
    weights_BL = counted_BL / jnp.maximum(num_targets, 1.0)
    step_key = jax.random.fold_in(key, state.step)
    take = jax.value_and_grad(functools.partial(_loss_sum, model=model, prefix_len=prefix_len))
    if microbatches > 1:
        take = _in_parts(take, microbatches)
    loss, gradients = take(state.params, batch, weights_BL, step_key)
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
    params, batch: Batch, weights_BS: jax.Array, *, model: PerceiverAR, prefix_len: int
) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(target) in nats over the latents, weighted, and the sum of the weights."""
    weights_BL = weights_BS[:, prefix_len:]
    loss_sum = _loss_sum(params, batch, weights_BL, model=model, prefix_len=prefix_len)
    return loss_sum, weights_BL.sum()


def _in_parts(loss_and_gradients, microbatches):
    """The same function of the whole batch, each device taking its rows part by part."""

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


def _loss_sum(params, batch, weights_BL, dropout_key=None, *, model, prefix_len):
    hidden_BLD = model.apply(
        {"params": params},
        batch.tokens,
        prefix_len,
        batch.pad_mask,
        segment_ids=batch.segment_ids,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="hidden",
    )
    return cross_entropy(
        hidden_BLD,
        params["token_embedding"]["embedding"],
        params.get("output_bias"),
        batch.targets[:, prefix_len:],
        weights_BL,
    )
