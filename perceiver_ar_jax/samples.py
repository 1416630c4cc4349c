"""The text that a run samples from its model after each evaluation."""

from typing import Any

import jax

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.run_config import SampleSettings
from perceiver_ar_jax.text_generation import continue_texts
from perceiver_ar_jax.tokenizers import Tokenizer


class Sampler:
    """Continues the prompt of a run's settings.

    Raises:
      ValueError: at construction, if the model cannot read the prompt.
    """

    def __init__(self, settings: SampleSettings, config: PerceiverARConfig, tokenizer: Tokenizer):
        self._settings, self._tokenizer = settings, tokenizer
        self._model = PerceiverAR(config)
        length = len(tokenizer.encode(settings.prompt))
        if not 1 <= length <= config.max_seq_len:
            raise ValueError(
                f"sample.prompt has {length} tokens; the model reads 1 to {config.max_seq_len} "
                "(model.max_seq_len)"
            )
        # At most max_prefix_len tokens can be prefix, and no more than there are can be latents.
        least = max(1, length - config.max_prefix_len)
        self._num_latents = min(max(settings.num_latents, least), length)

    def __call__(self, params: Any) -> str:
        """Prompt and continuation; the same parameters give the same text."""
        settings = self._settings
        (continuation,) = continue_texts(
            self._model,
            params,
            self._tokenizer,
            [settings.prompt],
            num_latents=self._num_latents,
            max_new_tokens=settings.max_new_tokens,
            do_sample=True,
            temperature=settings.temperature,
            top_k=min(settings.top_k, self._tokenizer.vocab_size),
            rng=jax.random.key(0),
        )
        return settings.prompt + continuation.text
