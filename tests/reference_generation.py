"""perceiver-io's `generate(use_cache=True)` and ours, on small models whose text is varied."""

import functools
import random

import numpy as np
from reference import hugging_face_model, our_model, random_config, reference_model, torch


@functools.cache
def both_models(seed: int):
    """The reference as a Hugging Face model, and our model and parameters.

    The weights are large, so that greedy text does not repeat one token. The reference fails at
    max_latents=1, where it keeps the newest 0 entries of a cache as `[-0:]`, all of them.
    """
    draw = random.Random(seed)
    max_latents = draw.choice([2, 4, 7])
    config = random_config(
        seed,
        max_latents=max_latents,
        max_seq_len=max_latents + draw.choice([0, 3, 9, 17]),
        vocab_size=draw.choice([50, 262]),
    )
    reference = reference_model(config, seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return hugging_face_model(reference), *our_model(reference, config)


def random_prompts(config, num_latents: int, seed: int, batch: int = 4):
    """Prompts and pad mask: without pads for even seeds, with pads inside the prefix for odd ones.

    A pad is a token that the row has anyway, because the reference's repetition penalty counts
    pads as tokens that were there.
    """
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, config.max_prefix_len + num_latents + 1))
    tokens = rng.integers(0, config.vocab_size, (batch, length))
    pads = rng.integers(0, max(length - num_latents, 0) + 1, batch) * (seed % 2)
    pad_mask = np.arange(length) < pads[:, None]
    return np.where(pad_mask, tokens[:, -1:], tokens), pad_mask


def reference_generate(hugging_face, tokens, pad_mask, **options):
    """The reference's result, (B, S + T) also where every row ended early."""
    options = {"pad_token_id": 0, "use_cache": True} | options
    result = hugging_face.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(~pad_mask).long(), **options
    ).numpy()
    missing = tokens.shape[1] + options["max_new_tokens"] - result.shape[1]
    return np.pad(result, ((0, 0), (0, missing)), constant_values=options["pad_token_id"])
