"""Random checkpoints in perceiver-io's format, made without PyTorch."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from perceiver_ar_jax import PerceiverARConfig
from perceiver_ar_jax.conversion.perceiver_io import (
    FREQUENCIES,
    PERCEIVER_IO,
)
from perceiver_ar_jax.conversion.reference_config import config_to_reference
from perceiver_ar_jax.conversion.rules import torch_shape
from perceiver_ar_jax.conversion.safetensors_files import write_safetensors
from perceiver_ar_jax.model.positions import inverse_frequencies

SMALL = PerceiverARConfig(
    vocab_size=20,
    max_seq_len=12,
    max_latents=4,
    num_channels=16,
    num_heads=2,
    cross_attention_widening_factor=2,
    num_self_attention_layers=2,
)
CONFIGS = {
    "absolute positions": SMALL,
    "rotary only": SMALL.replace(abs_pos_emb=False, output_norm=True, output_bias=False),
    "odd rotary width": SMALL.replace(num_channels=20),
    "no layers": SMALL.replace(num_self_attention_layers=0),
    "one wide head": SMALL.replace(num_heads=1, remat="full"),
}


def random_tensors(
    config: PerceiverARConfig, dtype=np.float32, seed: int = 0
) -> dict[str, np.ndarray]:
    """All tensors of a model, every one different from all others; frequencies rounded to bf16."""
    rng = np.random.default_rng(seed)
    frequencies = inverse_frequencies(config).astype(ml_dtypes.bfloat16).astype(dtype)
    tensors = {FREQUENCIES: frequencies}
    for rule in PERCEIVER_IO.of_model(config):
        shape = torch_shape(rule, config)
        tensors[rule.torch] = rng.normal(0, 0.3, shape).astype(np.float32).astype(dtype)
    return tensors


def write_config(folder: Path, config: PerceiverARConfig, **changes):
    """A config.json of perceiver-io; `changes` go into its model_config."""
    content = {
        "model_type": "perceiver-ar-causal-language-model",
        "model_config": config_to_reference(config) | changes,
    }
    (folder / "config.json").write_text(json.dumps(content))


def write_tensors(path: Path, tensors: dict[str, np.ndarray]):
    """A safetensors file."""
    specs = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    write_safetensors(path, specs, tensors.items())


def prefixed(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The same tensors under longer names."""
    return {prefix + name: array for name, array in tensors.items()}


def write_hub_folder(folder: Path, config: PerceiverARConfig, tensors: dict[str, np.ndarray]):
    """What perceiver-io's save_pretrained writes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    write_tensors(folder / "model.safetensors", prefixed(tensors, "backend_model."))


def assert_same_bits(actual, expected):
    """Same names, dtypes, shapes and bytes; names what differs."""
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        found = np.asarray(actual[name])
        assert (found.dtype, found.shape) == (array.dtype, array.shape), name
        assert found.tobytes() == array.tobytes(), name
