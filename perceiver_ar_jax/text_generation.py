"""Text in, text out: prompts become token ids, and new ids become text."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from perceiver_ar_jax.generation import Generation, Options
from perceiver_ar_jax.generation.prompt import default_num_latents
from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.tokenizers import TextStream, Tokenizer


class Continuation(NamedTuple):
    """What follows a prompt, up to and without the id that ends it."""

    text: str
    tokens: list[int]
    log_probs: list[float]  # the model's own, in nats


def continue_texts(
    model: PerceiverAR,
    params: Any,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str],
    *,
    num_latents: int | None = None,
    on_first_token: Callable[[], None] | None = None,
    **options,
) -> list[Continuation]:
    """The continuations of texts, `num_return_sequences` for each in a row, as one batch.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: that of the model; gives eos_token_id, pad_token_id and vocab_size.
      prompts: texts, none of them empty.
      num_latents: how many of a prompt's last tokens are latents at the start; None chooses.
      on_first_token: called when everything is compiled and the first tokens are there.
      **options: as in `generate`.

    Raises:
      ValueError: if a prompt is empty or too long, or an option is out of range.
      TypeError: naming an option that does not exist.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is a list of texts; for a single one pass [prompt]")
    if not prompts:
        return []
    options = _options(tokenizer, options)
    rows = _encode(tokenizer, prompts)
    generation = _generation(model, params, rows, num_latents, options)
    if on_first_token:
        generation.advance_to(1)
        on_first_token()
    generated = generation.result()
    prompts_of_result = [row for row in rows for _ in range(options.num_return_sequences)]
    new_tokens = generated.tokens[:, -options.max_new_tokens :].tolist()
    continuations = []
    for prompt, tokens, log_probs in zip(
        prompts_of_result, new_tokens, generated.log_probs.tolist(), strict=True
    ):
        ends = (i for i, token in enumerate(tokens) if token in (options.eos_token_id or ()))
        length = next(ends, len(tokens))
        text = NewText(tokenizer, prompt)
        pieces = [text.push(token) for token in tokens[:length]]
        continuations.append(
            Continuation("".join(pieces) + text.flush(), tokens[:length], log_probs[:length])
        )
    return continuations


def stream_text(
    model: PerceiverAR,
    params: Any,
    tokenizer: Tokenizer | None,
    prompt: str,
    *,
    num_latents: int | None = None,
    **options,
) -> Iterator[str]:
    """The continuation of a text, one piece per token as it is computed; joined, the whole.

    A piece is empty where a token completes no character. Arguments and errors as in
    `continue_texts`; beam search does not stream.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"stream_text continues one text, not {type(prompt).__name__}")
    options = _options(tokenizer, options)
    if options.num_beams > 1 or options.num_return_sequences > 1:
        raise ValueError("stream_text needs num_beams=1 and num_return_sequences=1")
    rows = _encode(tokenizer, [prompt])
    generation = _generation(model, params, rows, num_latents, options)
    return _pieces(generation, NewText(tokenizer, rows[0]), options)


def _pieces(generation, text, options):
    for count, (token,) in enumerate(generation.new_tokens(), start=1):
        if token in (options.eos_token_id or ()):
            yield text.flush()
            return
        piece = text.push(int(token))
        yield piece + text.flush() if count == options.max_new_tokens else piece


def _options(tokenizer, options):
    if tokenizer is None:
        raise ValueError("without a tokenizer there is no text: pass token ids to `generate`")
    of_tokenizer = {
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "vocab_size": tokenizer.vocab_size,
    }
    return Options.of(**of_tokenizer | options)


def _encode(tokenizer, prompts):
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ValueError(f"the prompt {prompt!r} is empty")
    return rows


def _generation(model, params, rows, num_latents, options):
    if num_latents is None:
        num_latents = default_num_latents(max(map(len, rows)), model.config)
    return Generation(model, params, rows, options, num_latents=num_latents)


class NewText:
    """The text that new tokens add to that of a prompt."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self._stream = TextStream(tokenizer)
        shown = "".join(map(self._stream.push, prompt))
        # What the stream still holds back of the prompt, as the next token may change it.
        self._held = tokenizer.decode(prompt)[len(shown) :]

    def push(self, token: int) -> str:
        """The text that a new token completes, often none."""
        return self._without_prompt(self._stream.push(token))

    def flush(self) -> str:
        """The rest of the text."""
        return self._without_prompt(self._stream.flush())

    def _without_prompt(self, text):
        equal = (new == held for new, held in zip(text, self._held, strict=False))
        same = sum(itertools.takewhile(bool, equal))
        self._held = self._held[same:] if same == len(text) else ""
        return text[same:]
