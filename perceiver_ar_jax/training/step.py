import jax
import jax.numpy as jnp
import optax

from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.training.losses import cross_entropy
from perceiver_ar_jax.training.state import Batch, TrainState


def train_step(
    state: TrainState, batch: Batch, *, model: PerceiverAR, prefix_len: int, key: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on the mean loss of the latents that are no padding.

    Pure; jit it with `static_argnames=("model", "prefix_len")` and donate the state.

    Args:
      state: parameters, moments and step.
      batch: windows of S positions; the first `prefix_len` are prefix.
      model: static under jit.
      prefix_len: static under jit.
      key: of the whole run; the step is folded in.

    Returns:
      The next state, and metrics: "loss" in nats per token, "grad_norm" before clipping, and
      "tokens", how many targets counted.
    """
    weights_BL = (~batch.pad_mask[:, prefix_len:]).astype(jnp.float32)
    num_targets = weights_BL.sum()

    def mean_loss(params):
        loss_sum = _loss_sum(
            params, batch, weights_BL, model=model, prefix_len=prefix_len, dropout_key=step_key
        )
        return loss_sum / jnp.maximum(num_targets, 1.0)

    step_key = jax.random.fold_in(key, state.step)
    loss, gradients = jax.value_and_grad(mean_loss)(state.params)
    updates, opt_state = state.tx.update(gradients, state.opt_state, state.params)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
    )
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), "tokens": num_targets}
    return state, metrics


def eval_step(
    params, batch: Batch, weights_BS: jax.Array, *, model: PerceiverAR, prefix_len: int
) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(target) in nats over the latents, weighted, and the sum of the weights."""
    weights_BL = weights_BS[:, prefix_len:]
    loss_sum = _loss_sum(params, batch, weights_BL, model=model, prefix_len=prefix_len)
    return loss_sum, weights_BL.sum()


def _loss_sum(params, batch, weights_BL, *, model, prefix_len, dropout_key=None):
    hidden_BLD = model.apply(
        {"params": params},
        batch.tokens,
        prefix_len,
        batch.pad_mask,
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
