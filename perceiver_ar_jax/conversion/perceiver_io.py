"""The rules of perceiver-io's causal language model."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.conversion.reference_config import (
    config_from_reference,
    config_to_reference,
    unknown_fields,
)
from perceiver_ar_jax.conversion.rules import SAME, TRANSPOSED, Rule, Rules, Transform

FREQUENCIES = "input_adapter.frq_pos_encoding.inv_freq"
TOKEN_EMBEDDING = "input_adapter.txt_embedding.weight"
MODEL_TYPE = "perceiver-ar-causal-language-model"


def rotary_channel_order(config: PerceiverARConfig) -> np.ndarray:
    """For each output channel of our q_proj and k_proj, the channel of perceiver-io it holds, (D,).

    perceiver-io rotates neighbouring channels, our model two contiguous halves. Queries and keys
    are reordered alike, so attention scores stay the same, also in layers without rotation.
    """
    rotated = np.arange(config.num_rotated_channels)
    rest = np.arange(config.num_rotated_channels, config.head_dim)
    head = np.concatenate([rotated[0::2], rotated[1::2], rest])
    starts = np.arange(config.num_heads) * config.head_dim
    return (starts[:, None] + head).reshape(-1)


ROTARY = Transform(
    lambda x, config: x[rotary_channel_order(config)].T,
    lambda x, config: x.T[np.argsort(rotary_channel_order(config))],
)


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/scale", f"{theirs}.weight", "D", SAME),
        Rule(f"{ours}/bias", f"{theirs}.bias", "D", SAME),
    )


def _attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/q_proj/kernel", f"{theirs}.q_proj.weight", "DD", ROTARY),
        Rule(f"{ours}/k_proj/kernel", f"{theirs}.k_proj.weight", "DD", ROTARY),
        Rule(f"{ours}/v_proj/kernel", f"{theirs}.v_proj.weight", "DD", TRANSPOSED),
        Rule(f"{ours}/o_proj/kernel", f"{theirs}.o_proj.weight", "DD", TRANSPOSED),
    )


def _mlp(ours: str, theirs: str, width: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{ours}/norm", f"{theirs}.0"),
        Rule(f"{ours}/up/kernel", f"{theirs}.1.weight", f"{width}D", TRANSPOSED),
        Rule(f"{ours}/down/kernel", f"{theirs}.3.weight", f"D{width}", TRANSPOSED),
    )


TABLE = (
    Rule("token_embedding/embedding", TOKEN_EMBEDDING, "VD", SAME),
    Rule("position_embedding/embedding", "input_adapter.pos_embedding.weight", "SD", SAME),
    *_norm("cross_attention/q_norm", "cross_attention.0.module.q_norm"),
    *_norm("cross_attention/kv_norm", "cross_attention.0.module.kv_norm"),
    *_attention("cross_attention/attention", "cross_attention.0.module.attention"),
    Rule(
        "cross_attention/attention/o_proj/bias",
        "cross_attention.0.module.attention.o_proj.bias",
        "D",
        SAME,
    ),
    *_mlp("cross_attention/mlp", "cross_attention.1.module", "C"),
    *_norm("self_attention_{i}/norm", "self_attention.{i}.0.module.norm"),
    *_attention("self_attention_{i}/attention", "self_attention.{i}.0.module.attention"),
    *_mlp("self_attention_{i}/mlp", "self_attention.{i}.1.module", "F"),
    *_norm("out_norm", "out_norm"),
    Rule("output_bias", "output_adapter.bias", "V", SAME),
)


def _read_config(content: Mapping[str, Any], path: Path) -> PerceiverARConfig:
    if content.get("model_type") != MODEL_TYPE:  # Lightning's, which have other settings too
        return config_from_reference(content)
    fields = content.get("model_config")
    if not isinstance(fields, Mapping):
        raise ValueError(f"{path} has no model_config")
    unknown = unknown_fields(fields)
    if unknown:
        warnings.warn(f"{path} has fields unknown here, ignored: {unknown}", stacklevel=2)
    return config_from_reference(fields)


def _write_config(config: PerceiverARConfig) -> dict[str, Any]:
    return {
        "architectures": ["PerceiverCausalLanguageModel"],
        "is_decoder": True,
        "model_config": config_to_reference(config),
        "model_type": MODEL_TYPE,
        "torch_dtype": config.param_dtype,
    }


def _logits(tensors, config, tokens_BS, prefix_len, pad_mask_BS) -> np.ndarray:
    """perceiver-io's logits, (B, L, V) float32, with weights rounded to `config.param_dtype`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, about each other
            import torch
            from perceiver.model.text.clm import CausalLanguageModel, CausalLanguageModelConfig
    except Exception as error:  # transformers of the wrong version raise nearly anything
        raise ImportError(f"torch and perceiver-io do not import: {error}") from None
    fields = config_to_reference(config) | {"activation_checkpointing": False}
    with torch.device("meta"):  # it takes over the weights below rather than making its own
        model = CausalLanguageModel(CausalLanguageModelConfig.create(**fields)).eval()
    dtypes = dict.fromkeys(tensors, config.param_dtype) | {FREQUENCIES: "float32"}
    state = {
        name: torch.from_numpy(np.asarray(np.asarray(tensor, dtypes[name]), np.float32))
        for name, tensor in tensors.items()
    }
    model.load_state_dict(state, assign=True)
    tokens, pad_mask = torch.as_tensor(tokens_BS), torch.as_tensor(pad_mask_BS)
    with torch.inference_mode():
        return model(tokens, prefix_len=prefix_len, pad_mask=pad_mask).logits.numpy()


PERCEIVER_IO = Rules(
    name="perceiver-io",
    model_type=MODEL_TYPE,
    anchor=TOKEN_EMBEDDING,
    frequencies=FREQUENCIES,
    table=TABLE,
    optional={
        "position_embedding": "abs_pos_emb",
        "out_norm": "output_norm",
        "output_bias": "output_bias",
    },
    read_config=_read_config,
    write_config=_write_config,
    written_prefix="backend_model.",
    logits=_logits,
)
