"""The arguments of `generate`, checked, and the search method they describe."""

import dataclasses
import difflib
from collections.abc import Sequence

import jax
import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.generation.beam_search import BeamSearch
from perceiver_ar_jax.generation.contrastive_search import ContrastiveSearch
from perceiver_ar_jax.generation.loop import Ending, Method, TokenByToken
from perceiver_ar_jax.generation.policies import POLICIES, Policy
from perceiver_ar_jax.generation.sampling import (
    Greedy,
    MinP,
    RepetitionPenalty,
    Sample,
    Temperature,
    TopK,
    TopP,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to continue a prompt: Hugging Face's names and meanings.

    Raises:
      ValueError: at construction, naming every problem at once.
    """

    max_new_tokens: int = 16
    do_sample: bool = False  # False: the most likely token
    temperature: float = 1.0
    top_k: int | None = None  # of sampling; of contrastive search: how many candidates
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    penalty_alpha: float | None = None  # above 0: contrastive search among top_k candidates
    num_beams: int = 1  # above 1: beam search
    length_penalty: float = 1.0  # of beam search: above 0 favours longer texts
    early_stopping: bool | str = False  # of beam search: True, False or "never"
    num_return_sequences: int = 1  # a prompt, from sampling or beam search
    eos_token_id: int | Sequence[int] | None = None  # one of these ends a row
    pad_token_id: int = 0  # fills ended rows
    vocab_size: int | None = None  # the tokenizer's; ids from there up are never chosen
    policy: str | Policy = "slide"  # or "recompute", "reset", or a policy of your own making
    rng: jax.Array | None = None  # a jax.random.key; sampling needs one

    def __post_init__(self):
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def of(cls, **options) -> "Options":
        """The options of these names; TypeError names one that does not exist."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"generation has no argument {name!r}{hint}")
        return cls(**options)

    @property
    def decoding_policy(self) -> Policy:
        """The policy, by name or as given."""
        return POLICIES[self.policy] if isinstance(self.policy, str) else self.policy

    @property
    def ending(self) -> Ending:
        """What ends a row; -1, which no token is, where nothing does."""
        eos = -1 if self.eos_token_id is None else self.eos_token_id
        return Ending(np.atleast_1d(np.asarray(eos, np.int32)), np.int32(self.pad_token_id))

    @property
    def method(self) -> Method:
        """The search method."""
        penalty = RepetitionPenalty(float(self.repetition_penalty))
        if self.num_beams > 1:
            return BeamSearch(
                num_beams=self.num_beams,
                num_return_sequences=self.num_return_sequences,
                early_stopping=self.early_stopping,
                length_penalty=float(self.length_penalty),
                max_new_tokens=self.max_new_tokens,
                penalty=penalty,
            )
        if self.penalty_alpha:
            return ContrastiveSearch(self.top_k, float(self.penalty_alpha), penalty)
        choose = Sample(self.filters, self.rng) if self.do_sample else Greedy()
        return TokenByToken(choose, penalty, rows_per_prompt=self.num_return_sequences)

    @property
    def filters(self) -> tuple[Temperature | TopK | TopP | MinP, ...]:
        """The filters of sampling, in the order in which Hugging Face applies them."""
        filters = []
        if self.temperature != 1.0:
            filters.append(Temperature(float(self.temperature)))
        if self.top_k:
            filters.append(TopK(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            filters.append(TopP(float(self.top_p)))
        if self.min_p is not None:
            filters.append(MinP(float(self.min_p)))
        return tuple(filters)

    def check_against(self, config: PerceiverARConfig) -> None:
        """Raises ValueError where the options do not fit the model."""
        num_ids = config.vocab_size if self.vocab_size is None else self.vocab_size
        if num_ids > config.vocab_size:
            raise ValueError(
                f"vocab_size={num_ids} exceeds the {config.vocab_size} ids of the model; "
                "pass the tokenizer that the model was trained with"
            )
        if self.penalty_alpha and self.top_k > num_ids:
            raise ValueError(
                f"contrastive search cannot choose among top_k={self.top_k} candidates: "
                f"there are only {num_ids} token ids"
            )
        num_eos = len(self.ending.eos_E)
        if self.num_beams > 1 and num_eos >= num_ids:
            raise ValueError(
                f"beam search needs a token to go on with, but {num_eos} of {num_ids} ids end a row"
            )

    def _problems(self):
        if self.vocab_size is not None and self.vocab_size < 1:
            yield f"vocab_size must be at least 1, not {self.vocab_size}"
        if self.max_new_tokens < 1:
            yield f"max_new_tokens must be at least 1, not {self.max_new_tokens}"
        if not self.temperature > 0.0:
            yield f"temperature must be above 0, not {self.temperature}"
        if self.top_k is not None and self.top_k < 0:
            yield f"top_k must not be negative, but is {self.top_k}"
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                yield f"{name} must be between 0 and 1, not {value}"
        if not self.repetition_penalty > 0.0:
            yield f"repetition_penalty must be above 0, not {self.repetition_penalty}"
        if self.num_return_sequences < 1:
            yield f"num_return_sequences must be at least 1, not {self.num_return_sequences}"
        if isinstance(self.policy, str) and self.policy not in POLICIES:
            yield f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}"
        if self.do_sample and self.rng is None:
            yield "do_sample=True needs rng, a jax.random.key"
        if self.num_beams < 1:
            yield f"num_beams must be at least 1, not {self.num_beams}"
        if self.early_stopping not in (True, False, "never"):
            yield f"early_stopping must be True, False or 'never', not {self.early_stopping!r}"
        yield from self._conflicts()

    def _conflicts(self):
        if self.num_beams > 1 and self.do_sample:
            yield "beam search does not sample: do_sample=True needs num_beams=1"
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            yield (
                f"num_return_sequences={self.num_return_sequences} exceeds "
                f"num_beams={self.num_beams}"
            )
        if self.num_beams == 1 and not self.do_sample and self.num_return_sequences > 1:
            yield "several num_return_sequences need do_sample=True or beam search"
        if self.penalty_alpha:
            if not 0.0 < self.penalty_alpha <= 1.0:
                yield f"penalty_alpha must be between 0 and 1, not {self.penalty_alpha}"
            if self.top_k is None or self.top_k < 2:
                yield "penalty_alpha needs top_k, the number of candidates, to be at least 2"
            if self.do_sample or self.num_beams > 1:
                yield "contrastive search (penalty_alpha) goes with neither do_sample nor num_beams"
