"""The head and the loss in one, so that the logits of a whole batch never exist at once."""

import jax
import jax.numpy as jnp

from perceiver_ar_jax.model.decoding_params import DecodingKernel
from perceiver_ar_jax.model.products import product
from perceiver_ar_jax.parallel import constrain, on_own_rows

# Latents × vocabulary of one chunk, per row of the batch. Each chunk costs a pass over the gradient
# of the embedding.
MAX_LOGITS_PER_ROW = 2**24


def cross_entropy(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array,
    bias_V: jax.Array | None,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
) -> jax.Array:
    """Weighted sum of -log p(target), in nats; a float32 scalar.

    Head and loss in one, over chunks of latents: only one chunk's logits exist at a time. The
    gradients are computed in the same pass, so no logits are computed twice.

    Args:
      hidden_BLD: what the head reads.
      embedding_VD: the token embedding, to which the head is tied.
      bias_V: the head's bias, or None.
      targets_BL: token ids.
      weights_BL: the weight of each position, 0 at padding; float32.
    """
    bias_V = _bias(bias_V, embedding_VD)
    return _cross_entropy(hidden_BLD, embedding_VD, bias_V, targets_BL, weights_BL)


def token_nats(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array | DecodingKernel,
    bias_V: jax.Array | None,
    targets_BL: jax.Array,
) -> jax.Array:
    """-log p(target) of each token in nats, (B, L) float32; arguments as in `cross_entropy`.

    The embedding may be one that was prepared for decoding.
    """
    return _over_chunks(_nats, hidden_BLD, embedding_VD, bias_V, targets_BL)


def token_nats_and_ranks(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array,
    bias_V: jax.Array | None,
    targets_BL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`token_nats`, and how many tokens are likelier than each target, (B, L) int32."""

    def nats_and_ranks(logits_BCV, targets_BC):
        is_likelier_BCV = logits_BCV > _at(logits_BCV, targets_BC)[..., None]
        return _nats(logits_BCV, targets_BC), is_likelier_BCV.sum(-1)

    return _over_chunks(nats_and_ranks, hidden_BLD, embedding_VD, bias_V, targets_BL)


def token_nats_and_likeliest(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array | DecodingKernel,
    bias_V: jax.Array | None,
    targets_BL: jax.Array,
    *,
    count: int,
    num_ids: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`token_nats`, and the `count` likeliest of the first `num_ids` ids with their nats.

    Both are (B, L, A), likeliest first; a target among them has the same nats in both places.
    """

    def nats_and_likeliest(logits_BCV, targets_BC):
        top_BCA, ids_BCA = jax.lax.top_k(logits_BCV[..., :num_ids], count)
        log_sum_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        nats_BC = log_sum_BC - _at(logits_BCV, targets_BC)
        return nats_BC, ids_BCA, log_sum_BC[..., None] - top_BCA

    return _over_chunks(nats_and_likeliest, hidden_BLD, embedding_VD, bias_V, targets_BL)


def _nats(logits_BCV, targets_BC):
    return jax.nn.logsumexp(logits_BCV, axis=-1) - _at(logits_BCV, targets_BC)


def _over_chunks(function, hidden_BLD, embedding_VD, bias_V, targets_BL):
    """A function of logits and targets, (B, L, …); only one chunk's logits exist at a time."""
    bias_V = _bias(bias_V, embedding_VD)

    def of_chunk(_, chunk):
        hidden_BCD, targets_BC = chunk
        return None, function(_logits(hidden_BCD, embedding_VD, bias_V), targets_BC)

    chunks = _chunks(len(bias_V), hidden_BLD, targets_BL)
    _, results = jax.lax.scan(of_chunk, None, chunks)
    joined = lambda x: jnp.swapaxes(x, 0, 1).reshape(*targets_BL.shape, *x.shape[3:])
    return jax.tree.map(joined, results)


@jax.custom_vjp
def _cross_entropy(hidden_BLD, embedding_VD, bias_V, targets_BL, weights_BL):
    return (token_nats(hidden_BLD, embedding_VD, bias_V, targets_BL) * weights_BL).sum()


def _forward(hidden_BLD, embedding_VD, bias_V, targets_BL, weights_BL):
    take = on_own_rows(
        _loss_and_gradients,
        in_rows=(True, False, False, True, True),
        out_rows=(False, True, False, False),
    )
    embedding = embedding_VD.astype(hidden_BLD.dtype)
    total, dhidden_BLD, dembedding_VD, dbias_V = take(
        hidden_BLD, embedding, bias_V, targets_BL, weights_BL
    )
    dembedding_VD = constrain(dembedding_VD, "vocab", "embed").astype(embedding_VD.dtype)
    return total, (dhidden_BLD, dembedding_VD, dbias_V.astype(bias_V.dtype))


def _loss_and_gradients(hidden_BLD, embedding_VD, bias_V, targets_BL, weights_BL):
    dtype = hidden_BLD.dtype

    def chunk_loss(sums, chunk):
        total, dembedding_VD, dbias_V = sums
        hidden_BCD, targets_BC, weights_BC = chunk
        logits_BCV = _logits(hidden_BCD, embedding_VD, bias_V)
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        loss_BC = log_z_BC - _at(logits_BCV, targets_BC)
        classes_V = jnp.arange(logits_BCV.shape[-1])
        one_hot_BCV = targets_BC[..., None] == classes_V
        dlogits_BCV = jnp.exp(logits_BCV - log_z_BC[..., None]) - one_hot_BCV
        dlogits_BCV *= weights_BC[..., None]
        dbias_V += dlogits_BCV.sum((0, 1))
        dlogits_BCV = dlogits_BCV.astype(dtype)
        dhidden_BCD = product("BCV,VD->BCD", dlogits_BCV, embedding_VD)
        dembedding_VD += product("BCV,BCD->VD", dlogits_BCV, hidden_BCD, jnp.float32)
        return (total + (loss_BC * weights_BC).sum(), dembedding_VD, dbias_V), dhidden_BCD

    zeros = jnp.float32(0), jnp.zeros(embedding_VD.shape), jnp.zeros(bias_V.shape)
    chunks = _chunks(embedding_VD.shape[0], hidden_BLD, targets_BL, weights_BL)
    (total, dembedding_VD, dbias_V), dhidden = jax.lax.scan(chunk_loss, zeros, chunks)
    dhidden_BLD = jnp.swapaxes(dhidden, 0, 1).reshape(hidden_BLD.shape)
    return total, dhidden_BLD, dembedding_VD, dbias_V


def _backward(gradients, dtotal):
    return *((dtotal * x).astype(x.dtype) for x in gradients), None, None


_cross_entropy.defvjp(_forward, _backward)


def _bias(bias_V, embedding_VD):
    return jnp.zeros(len(embedding_VD), jnp.float32) if bias_V is None else bias_V


def _logits(hidden_BCD, embedding_VD, bias_V):
    if isinstance(embedding_VD, DecodingKernel):
        return embedding_VD(hidden_BCD) + bias_V
    return product("BCD,VD->BCV", hidden_BCD, embedding_VD, jnp.float32) + bias_V


def _at(logits_BCV, targets_BC):
    return jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]


def _chunks(vocab_size, *arrays):
    """Cuts (B, L, …) into (L / C, B, C, …), along latents: a sharded batch stays sharded."""
    batch, length = arrays[0].shape[:2]
    fitting = (c for c in range(length, 0, -1) if length % c == 0)
    size = next((c for c in fitting if c * vocab_size <= MAX_LOGITS_PER_ROW), 1)
    cut = lambda x: jnp.swapaxes(x.reshape(batch, length // size, size, *x.shape[2:]), 0, 1)
    return jax.tree.map(cut, arrays)
