"""Whether this device computes a small training step as the plain implementation does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model import PerceiverAR, init_params
from perceiver_ar_jax.training import Batch
from perceiver_ar_jax.training.step import loss_sum

# In bfloat16 gradients of a tensor differ by up to 2.5 %; a wrong program is far beyond this.
LARGEST_DEVIATION = 0.1

KNOWN_MISCOMPILATIONS = {
    "0.10.2": "on CPU, sums over products with more than 32,768 rows can be wrong (jax issue 39103)"
}


def check_device(config: PerceiverARConfig) -> float:
    """Runs `deviation` on the first device of this process; gives it if it is small.

    Raises:
      ValueError: if it is not, with the version of jax and what to try.
    """
    distance = deviation(config)
    if distance <= LARGEST_DEVIATION:
        return distance
    known = KNOWN_MISCOMPILATIONS.get(jax.__version__)
    raise ValueError(
        f"jax {jax.__version__} on {jax.local_devices()[0].device_kind} computes a small training "
        f"step wrongly: its gradients are {distance:.0%} away from those of plain attention in "
        f"float32, where {LARGEST_DEVIATION:.0%} are allowed. "
        + (f"Known of this version: {known}. " if known else "")
        + "Use another version of jax, or model.attention=plain"
    )


def deviation(config: PerceiverARConfig) -> float:
    """How far gradients with these settings are from those of plain attention in float32.

    Of a model of two narrow layers with this one's heads, and of two rows, one of them padded: the
    norm of the difference by the norm of the gradient, for the tensor where it is largest; infinite
    if gradients are not finite.
    """
    small = config.replace(
        vocab_size=256,
        max_seq_len=448,
        max_latents=192,
        num_heads=2,
        num_channels=2 * config.head_dim,
        num_self_attention_layers=2,
        cross_attention_dropout=0.0,
        post_attention_dropout=0.0,
        residual_dropout=0.0,
        init_scale=(2 * config.head_dim) ** -0.5,  # so large that attention matters
    )
    exact = small.replace(attention="plain", dtype="float32", gradient_dtype="float32")
    params = jax.jit(init_params, static_argnums=0)(PerceiverAR(small), jax.random.key(0))
    with jax.default_matmul_precision("highest"):
        expected = _gradients(exact.replace(remat="none"), params)
    actual = _gradients(small, params)
    norms = [np.linalg.norm(y) for y in expected]
    distance = max(
        np.linalg.norm(x - y) / max(norm, 0.01 * max(norms))  # rounding of tiny ones does not count
        for x, y, norm in zip(actual, expected, norms, strict=True)
    )
    return float(distance) if np.isfinite(distance) else float("inf")


def _gradients(config, params):
    rng = np.random.default_rng(0)
    shape = 2, config.max_seq_len
    tokens, targets = (jnp.asarray(rng.integers(0, config.vocab_size, shape)) for _ in range(2))
    pads = jnp.arange(config.max_seq_len) < jnp.array([0, 100])[:, None]
    batch = Batch(tokens=tokens, targets=targets, pad_mask=pads)
    model = PerceiverAR(config)
    prefix_len = config.max_prefix_len
    weights_BL = batch.latent_weights(prefix_len)

    differentiate = jax.jit(
        jax.grad(functools.partial(loss_sum, model=model, prefix_len=prefix_len))
    )
    leaves = jax.tree.leaves(differentiate(params, batch, weights_BL))
    return [np.asarray(leaf, np.float64) for leaf in leaves]
