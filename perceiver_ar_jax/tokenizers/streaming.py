"""Text as its tokens arrive."""

from perceiver_ar_jax.tokenizers.clean_up import REPLACEMENTS
from perceiver_ar_jax.tokenizers.protocol import Tokenizer

FORGET_AT = 64  # tokens kept before the oldest are dropped,
KEPT = 8  # down to so many: enough to tell a piece's place in the text


class TextStream:
    """Turns ids, one at a time, into text that later ids cannot change.

    What `push` returned and what `flush` returns, joined, are `tokenizer.decode` of all ids. A
    character is never cut, whichever tokens share it. The cost of a token does not grow with the
    text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._returned = 0  # characters of decode(self._ids), before the clean-up
        self._start()

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often none."""
        self._ids.append(int(token_id))
        if self._ids[-1] in self._tokenizer.byte_ids:
            return ""
        text = self._tokenizer.decode_raw(self._ids)
        settled = text.rstrip("\ufffd")  # stands for the beginning of a character
        new = settled[self._returned :]
        self._returned = len(settled)
        if len(self._ids) >= FORGET_AT and settled == text:
            self._forget()
        return self._replace(new)

    def flush(self) -> str:
        """The rest of the text; the next `push` begins another."""
        new = self._tokenizer.decode_raw(self._ids)[self._returned :]
        text = self._replace(new, last=True)
        self._start()
        return text

    def _start(self) -> None:
        self._ids = []
        self._returned = 0
        replacements = REPLACEMENTS if self._tokenizer.cleans_up else ()
        self._replacements = [_StreamedReplacement(old, new) for old, new in replacements]

    def _forget(self) -> None:
        """Drops the oldest ids; with no text left the next piece would be taken for the first."""
        kept = self._ids[-KEPT:]
        if text := self._tokenizer.decode_raw(kept):
            self._ids = kept
            self._returned = len(text)

    def _replace(self, text: str, last: bool = False) -> str:
        for replacement in self._replacements:
            text = replacement.push(text)
            if last:
                text += replacement.flush()
        return text


class _StreamedReplacement:
    """`str.replace` on a text that comes in parts."""

    def __init__(self, old: str, new: str):
        self._old = old
        self._new = new
        self._held = ""  # the end of the text so far, where `old` may have begun

    def push(self, text: str) -> str:
        *before, rest = (self._held + text).split(self._old)
        begun = [n for n in range(1, len(self._old)) if rest.endswith(self._old[:n])]
        split = len(rest) - max(begun, default=0)
        self._held = rest[split:]
        return self._new.join([*before, rest[:split]])

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held
