"""Continues prompts: `generate`, and token by token `stream`."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from perceiver_ar_jax.generation.generation import Generated, Generation
from perceiver_ar_jax.generation.options import Options
from perceiver_ar_jax.generation.prefilled import Prefilled
from perceiver_ar_jax.model import PerceiverAR


def generate(
    model: PerceiverAR,
    params: Any,
    prompt: np.ndarray | Sequence[Sequence[int]] | Prefilled,
    *,
    num_latents: int = 1,
    pad_mask: np.ndarray | None = None,
    **options,
) -> np.ndarray:
    """Prompt and continuation, (B, S + max_new_tokens) int32.

    Pads of the prompt, and whatever follows the end of a row, become pad_token_id. One jitted
    prefill, then one jitted loop; prompts of similar lengths share compiled programs.

    What follows a prompt does not depend on the other rows, on padding or on max_new_tokens (up to
    rounding of the logits, and to `Reset`, whose schedule counts the columns of the batch). When
    sampling, row i draws from fold_in(rng, i): it is what its prompt gives alone with
    rng=fold_in(rng, i)[None]. With rng an array of keys, row i draws from rng[i].

    Args:
      model: the model.
      params: its parameters.
      prompt: token ids, (B, S); or lists of token ids of any lengths, which are padded on the
        left; or what `prefill` returned.
      num_latents: how many of the prompt's last positions are latents at the start.
      pad_mask: (B, S), True at the pads of a left-padded array.
      **options: how to continue, see `Options`: max_new_tokens, do_sample, temperature, top_k,
        top_p, min_p, repetition_penalty, penalty_alpha, num_beams, length_penalty,
        early_stopping, num_return_sequences, prompt_lookup_num_tokens, eos_token_id, pad_token_id,
        vocab_size, policy, rng.

    Raises:
      ValueError: if a length, a token id or an option is out of range.
      TypeError: naming an option that does not exist.

    Source: `PerceiverCausalSequenceModel.generate` of perceiver-io 0.11.
    """
    return generate_with_log_probs(
        model, params, prompt, num_latents=num_latents, pad_mask=pad_mask, **options
    ).tokens


def generate_with_log_probs(
    model: PerceiverAR,
    params: Any,
    prompt: np.ndarray | Sequence[Sequence[int]] | Prefilled,
    *,
    num_latents: int = 1,
    pad_mask: np.ndarray | None = None,
    **options,
) -> Generated:
    """`generate`, and the log-probability of each new token; 0 after a row's end.

    It is the model's own, before penalty and filters, among the ids that may be chosen.
    """
    options = Options.of(**options)
    return Generation(
        model, params, prompt, options, num_latents=num_latents, pad_mask=pad_mask
    ).result()


def stream(
    model: PerceiverAR,
    params: Any,
    prompt: np.ndarray | Sequence[Sequence[int]] | Prefilled,
    *,
    num_latents: int = 1,
    pad_mask: np.ndarray | None = None,
    **options,
) -> Iterator[np.ndarray]:
    """An iterator over the tokens of `generate`, (B,) int32 each, until all rows have ended.

    Arguments as in `generate`. No token is computed before it is asked for: closing the iterator
    ends the work and frees its memory.
    """
    options = Options.of(**options)
    if options.num_beams > 1:
        raise ValueError("beam search settles no token before its end: stream needs num_beams=1")
    return Generation(
        model, params, prompt, options, num_latents=num_latents, pad_mask=pad_mask
    ).new_tokens()
