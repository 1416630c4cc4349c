"""One continuation on its way from the model to a client: tokens in, pieces of text out."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from perceiver_ar_jax.text_generation import NewText
from perceiver_ar_jax.tokenizers import TextStream, Tokenizer

LEAST_LOG_PROB = -9999.0  # JSON has no infinity
CONTEXT = 8  # tokens that decide how the next one is written
MAX_PARTS = 256  # of what a token reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What continuations of one batch have in common."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    policy: str = "slide"
    num_latents: int | None = None  # None: by the longest prompt of the batch
    least_latents: int = 1  # that the prompt needs where the batch chooses
    attention: bool = False


class Token(NamedTuple):
    """A token, as a client sees it; nothing predicts the first one of a prompt."""

    text: str
    log_prob: float | None
    alternatives: dict[str, float] | None


class Piece(NamedTuple):
    """Some text that no later token changes, the token that gave it, or the end."""

    text: str
    token: Token | None = None
    attention: list[float] | None = None
    finish_reason: str | None = None
    error: str | None = None


class Row:
    """A prompt and its continuation so far. Pieces go to `emit` as soon as they are final."""

    def __init__(
        self,
        prompt: list[int],
        settings: Settings,
        *,
        key: jax.Array,
        max_tokens: int,
        tokenizer: Tokenizer,
        emit: Callable[[Piece], None],
        stop: Sequence[str] = (),
        with_log_probs: bool = False,
        scores_prompt: bool = False,
    ):
        self.prompt, self.settings, self.key, self.max_tokens = prompt, settings, key, max_tokens
        self.num_tokens = 0
        self.arrived = time.monotonic()
        self.done = False  # nothing more is wanted: it has ended, or its client has left
        self._tokenizer, self._emit, self._stop = tokenizer, emit, stop
        self._with_log_probs = with_log_probs
        self.scores_prompt = scores_prompt  # until its tokens have been pushed
        self._prompt_text, self._num_pushed = TextStream(tokenizer), 0
        self._text = NewText(tokenizer, prompt)
        self._last = prompt[-CONTEXT:]
        self._held: list[Piece] = []  # may be the beginning of a stop

    def cancel(self) -> None:
        """Ends it without a word."""
        self.done = True

    def fail(self, error: str) -> None:
        """Ends it with an error."""
        if not self.done:
            self.done = True
            self._emit(Piece("", error=error))

    def push_prompt(
        self, log_prob: float | None = None, alternatives: Sequence[tuple[int, float]] | None = None
    ) -> None:
        """The score of the next token of the prompt; the first has none."""
        if self.done:
            return
        place, self._num_pushed = self._num_pushed, self._num_pushed + 1
        self.scores_prompt = self._num_pushed < len(self.prompt)
        token, before = self.prompt[place], self.prompt[max(place - CONTEXT, 0) : place]
        text = self._prompt_text.push(token)
        if not self.scores_prompt:
            text += self._prompt_text.flush()
        self._emit(Piece(text, self._token(before, token, log_prob, alternatives)))
        if not self.scores_prompt and not self.max_tokens:
            self._end("length")

    def push(
        self,
        token: int,
        log_prob: float,
        alternatives: Sequence[tuple[int, float]] = (),
        attention: np.ndarray | None = None,
    ) -> None:
        """One more token; `attention` is (K,), oldest first."""
        if self.done:
            return
        self.num_tokens += 1
        shown = None
        if self._with_log_probs:
            shown = self._token(self._last, token, log_prob, alternatives)
        parts = None if attention is None else self._parts(attention)
        if token == self._tokenizer.eos_id:
            self._finish("stop", shown, parts)
            return
        self._held.append(Piece(self._text.push(token), shown, parts))
        self._last = [*self._last, token][-CONTEXT:]
        if not self._release() and self.num_tokens == self.max_tokens:
            self._finish("length")

    def _finish(self, reason, *of_end):
        self._held.append(Piece(self._text.flush(), *of_end))
        if not self._release(last=True):
            self._end(reason)

    def _end(self, reason):
        self.done = True
        self._emit(Piece("", finish_reason=reason))

    def _release(self, last=False):
        """Emits what cannot be the beginning of a stop; whether there was one."""
        text = "".join(piece.text for piece in self._held)
        found = [i for stop in self._stop if (i := text.find(stop)) >= 0]
        if found:
            length = min(found)
            for piece in self._held:
                if length <= 0:
                    break
                self._emit(piece._replace(text=piece.text[:length]))
                length -= len(piece.text)
            self._end("stop")
            return True
        kept = 0 if last else _longest_beginning(text, self._stop)
        left = len(text)
        while self._held and left - len(self._held[0].text) >= kept:
            piece = self._held.pop(0)
            left -= len(piece.text)
            if piece.text or piece.token or piece.attention:
                self._emit(piece)
        return False

    def _token(self, before, token, log_prob, alternatives):
        if log_prob is None:
            return Token(self._token_text(before, token), None, None)
        likeliest: dict[str, float] = {}
        for other, of_other in alternatives:
            likeliest.setdefault(self._token_text(before, other), _finite(of_other))
        return Token(self._token_text(before, token), _finite(log_prob), likeliest)

    def _token_text(self, before, token):
        """What a token adds to the text of those before; its number if it prints nothing."""
        shown = self._tokenizer.decode_raw(before).rstrip("\ufffd")
        return self._tokenizer.decode_raw([*before, token])[len(shown) :] or f"<{token}>"

    def _parts(self, weights_K):
        """Shares of what was read, of at most MAX_PARTS equal stretches of the text."""
        length = min(len(self.prompt) + self.num_tokens - 1, len(weights_K))
        parts = np.array_split(weights_K[-length:], min(length, MAX_PARTS))
        return [round(float(part.sum()), 5) for part in parts]


def _longest_beginning(text, stops):
    """How many of the last characters of a text begin one of the stops."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def _finite(log_prob):
    log_prob = float(log_prob)
    return max(log_prob, LEAST_LOG_PROB) if not math.isnan(log_prob) else LEAST_LOG_PROB
