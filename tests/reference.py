"""perceiver-io beside our model: the same weights in both, all of them off their defaults."""

import random
import warnings

import numpy as np
import pytest

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.conversion.rules import FREQUENCIES, to_flax

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="parity needs requirements-parity.txt")
    clm = pytest.importorskip(
        "perceiver.model.text.clm", reason="parity needs requirements-parity.txt"
    )


def random_config(seed: int, **changes) -> PerceiverARConfig:
    """A small config in which every option of the reference is drawn at random."""
    draw = random.Random(seed)
    layers = draw.choice([0, 1, 2, 3])
    heads = draw.choice([1, 2, 4])
    max_latents = draw.choice([1, 4, 7, 12])
    fields = dict(
        vocab_size=draw.choice([11, 50, 262]),
        max_latents=max_latents,
        max_seq_len=max_latents + draw.choice([0, 1, 9, 20]),
        num_heads=heads,
        num_channels=heads * draw.choice([2, 6, 8, 16]),
        max_heads_parallel=draw.choice([None, 1, 2, 3]),
        num_self_attention_layers=layers,
        num_self_attention_rotary_layers=draw.choice([-1, 0, 1, 2]),
        self_attention_widening_factor=draw.choice([1, 2, 4]),
        cross_attention_widening_factor=draw.choice([1, 2, 4]),
        output_norm=draw.random() < 0.5,
        output_bias=draw.random() < 0.5,
        abs_pos_emb=draw.random() < 0.5,
        init_scale=draw.choice([0.02, 0.1]),
    )
    return PerceiverARConfig(**fields | changes)


def reference_model(config: PerceiverARConfig, seed: int):
    """perceiver-io's model of this config in evaluation mode, every parameter moved at random."""
    names = clm.CausalLanguageModelConfig.__dataclass_fields__
    shared = {name: value for name, value in config.to_dict().items() if name in names}
    torch.manual_seed(seed)
    model = clm.CausalLanguageModel(clm.CausalLanguageModelConfig(**shared)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def our_model(reference, config: PerceiverARConfig):
    """Our model and parameters, converted from a model of perceiver-io."""
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    config = config.replace(rotary_inv_freq=tuple(tensors[FREQUENCIES]))
    return PerceiverAR(config), to_flax(tensors, config)


def random_input(config: PerceiverARConfig, seed: int, batch: int = 3):
    """Token ids, prefix length and a left pad mask that stays in the prefix (numpy, int, numpy)."""
    rng = np.random.default_rng(seed)
    prefix_len = int(rng.integers(0, config.max_prefix_len + 1))
    latents = int(rng.integers(1, config.max_latents + 1))
    tokens = rng.integers(0, config.vocab_size, (batch, prefix_len + latents))
    pads = rng.integers(0, prefix_len + 1, batch)
    return tokens, prefix_len, np.arange(tokens.shape[1]) < pads[:, None]


def assert_close_to_reference(actual, expected, tolerance: float):
    """|actual - expected| stays within tolerance × max(1, max|expected|)."""
    expected = np.asarray(expected)
    bound = tolerance * max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=bound)
