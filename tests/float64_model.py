"""Perceiver AR in NumPy and float64: a reference that no XLA compiler has touched."""

import math

import numpy as np

from perceiver_ar_jax import PerceiverARConfig
from perceiver_ar_jax.model.positions import inverse_frequencies

_erf = np.vectorize(math.erf, otypes=[np.float64])


def float64_logits(params, config: PerceiverARConfig, tokens_BS, prefix_len: int, pads_BS):
    """Logits of the latents, (B, L, V); `params` are nested dicts of float64 arrays."""
    positions_BS = np.maximum(np.arange(tokens_BS.shape[1]) - pads_BS.sum(1, keepdims=True), 0)
    x_BSD = params["token_embedding"]["embedding"][tokens_BS]
    if config.abs_pos_emb:
        x_BSD = x_BSD + params["position_embedding"]["embedding"][positions_BS]
    angles_BSR = positions_BS[..., None] * inverse_frequencies(config).astype(np.float64)

    layer, x_BLD = params["cross_attention"], x_BSD[:, prefix_len:]
    normed_BLD = _norm(x_BLD, layer["q_norm"])
    keys_BKD = np.concatenate([_norm(x_BSD[:, :prefix_len], layer["kv_norm"]), normed_BLD], 1)
    x_BLD = x_BLD + _attention(
        normed_BLD, keys_BKD, layer["attention"], config, angles_BSR, pads_BS
    )
    x_BLD = x_BLD + _mlp(x_BLD, layer["mlp"])

    for index in range(config.num_self_attention_layers):
        layer = params[f"self_attention_{index}"]
        angles_BLR = angles_BSR[:, prefix_len:] * (index < config.num_rotary_layers)
        normed_BLD = _norm(x_BLD, layer["norm"])
        pads_BL = pads_BS[:, prefix_len:]
        attended = _attention(
            normed_BLD, normed_BLD, layer["attention"], config, angles_BLR, pads_BL
        )
        x_BLD = x_BLD + attended
        x_BLD = x_BLD + _mlp(x_BLD, layer["mlp"])

    if config.output_norm:
        x_BLD = _norm(x_BLD, params["out_norm"])
    logits_BLV = x_BLD @ params["token_embedding"]["embedding"].T
    return logits_BLV + params["output_bias"] if config.output_bias else logits_BLV


def _attention(x_BLD, keys_BKD, params, config, angles_BKR, pads_BK):
    latents, keys = x_BLD.shape[1], keys_BKD.shape[1]
    heads = lambda x: x.reshape(*x.shape[:2], config.num_heads, config.head_dim)
    q_BLNH = heads(x_BLD @ params["q_proj"]["kernel"]) * config.head_dim**-0.5
    q_BLNH = _rotate(q_BLNH, angles_BKR[:, keys - latents :])
    k_BKNH = _rotate(heads(keys_BKD @ params["k_proj"]["kernel"]), angles_BKR)
    v_BKNH = heads(keys_BKD @ params["v_proj"]["kernel"])
    scores_BNLK = np.einsum("BLNH,BKNH->BNLK", q_BLNH, k_BKNH)
    causal_LK = np.arange(keys) <= np.arange(keys - latents, keys)[:, None]
    visible_BNLK = (causal_LK & ~pads_BK[:, None])[:, None]
    scores_BNLK = np.where(visible_BNLK, scores_BNLK, -np.inf)
    weights_BNLK = np.exp(scores_BNLK - scores_BNLK.max(-1, keepdims=True))
    weights_BNLK /= weights_BNLK.sum(-1, keepdims=True)
    out_BLD = np.einsum("BNLK,BKNH->BLNH", weights_BNLK, v_BKNH).reshape(x_BLD.shape)
    return out_BLD @ params["o_proj"]["kernel"] + params["o_proj"].get("bias", 0.0)


def _rotate(x_BSNH, angles_BSR):
    half = angles_BSR.shape[-1]
    cos, sin = np.cos(angles_BSR)[:, :, None], np.sin(angles_BSR)[:, :, None]
    first, second, rest = np.split(x_BSNH, [half, 2 * half], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    variance = np.square(centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]


def _mlp(x_BLD, params):
    hidden_BLF = _norm(x_BLD, params["norm"]) @ params["up"]["kernel"]
    return 0.5 * hidden_BLF * (1 + _erf(hidden_BLF * 0.5**0.5)) @ params["down"]["kernel"]
