"""The arguments of `generate`, checked, and the search method they describe."""

import dataclasses
import difflib
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.generation.beam_search import BeamSearch
from perceiver_ar_jax.generation.contrastive_search import ContrastiveSearch
from perceiver_ar_jax.generation.loop import Method
from perceiver_ar_jax.generation.policies import POLICIES, Policy, ReadsAhead
from perceiver_ar_jax.generation.prompt_lookup import PromptLookup
from perceiver_ar_jax.generation.sampling import (
    Greedy,
    MinP,
    RepetitionPenalty,
    Sample,
    Temperature,
    TopK,
    TopP,
)
from perceiver_ar_jax.generation.texts import Ending
from perceiver_ar_jax.generation.token_by_token import TokenByToken

GREEDY_BELOW = 1e-6  # temperatures that sample the most likely token anyway, or divide by zero
WHOLE_NUMBERS = (
    "max_new_tokens",
    "top_k",
    "num_beams",
    "num_return_sequences",
    "num_alternatives",
    "prompt_lookup_num_tokens",
    "pad_token_id",
    "vocab_size",
)
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "penalty_alpha", "length_penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to continue a prompt: Hugging Face's names and meanings.

    Numbers of NumPy and JAX become Python's, `eos_token_id` a tuple, and `rng` a typed key.

    Raises:
      ValueError: at construction, naming every problem at once.
    """

    max_new_tokens: int = 16
    do_sample: bool = False  # False: the most likely token
    temperature: float = 1.0  # of sampling; below 1e-6 it is greedy
    top_k: int | None = None  # of sampling; of contrastive search: how many candidates
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    penalty_alpha: float | None = None  # above 0: contrastive search among top_k candidates
    num_beams: int = 1  # above 1: beam search
    length_penalty: float = 1.0  # of beam search: above 0 favours longer texts
    prompt_lookup_num_tokens: int | None = None  # tokens guessed from the text so far, per pass
    early_stopping: bool | str = False  # of beam search: True, False or "never"
    num_return_sequences: int = 1  # per prompt, from sampling or beam search
    num_alternatives: int = 0  # likeliest tokens to keep of each place, for `Generation.steps`
    eos_token_id: int | Sequence[int] | None = None  # one of these ends a row
    pad_token_id: int = 0  # fills ended rows
    vocab_size: int | None = None  # the tokenizer's; ids from there up are never chosen
    policy: str | Policy = "slide"  # or "recompute", "reset", or a policy of your own
    rng: jax.Array | None = None  # of sampling: a jax.random.key, or one per row of the result

    def __post_init__(self):
        problems = list(self._normalise()) or [*self._problems(), *self._conflicts()]
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
        """What ends a row; the id -1, which no token has, where nothing does."""
        eos = (-1,) if self.eos_token_id is None else self.eos_token_id
        return Ending(np.array(eos, np.int32), np.int32(self.pad_token_id))

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
        samples = self.do_sample and self.temperature >= GREEDY_BELOW
        choose = Sample(self.filters, self.rng) if samples else Greedy()
        method = TokenByToken(
            choose,
            penalty,
            rows_per_prompt=self.num_return_sequences,
            num_alternatives=self.num_alternatives,
        )
        if self.prompt_lookup_num_tokens is None:
            return method
        return PromptLookup(method, self.prompt_lookup_num_tokens)

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

    def check_against(self, config: PerceiverARConfig, num_prompts: int) -> None:
        """Raises ValueError where the options do not fit the model or the number of prompts."""
        num_ids = config.vocab_size if self.vocab_size is None else self.vocab_size
        if num_ids > config.vocab_size:
            raise ValueError(
                f"vocab_size={num_ids} exceeds the {config.vocab_size} ids of the model; "
                "pass the tokenizer that the model was trained with"
            )
        if self.num_alternatives > num_ids:
            raise ValueError(
                f"num_alternatives={self.num_alternatives}: there are only {num_ids} token ids"
            )
        if self.penalty_alpha and self.top_k > num_ids:
            raise ValueError(
                f"contrastive search cannot choose among top_k={self.top_k} candidates: "
                f"there are only {num_ids} token ids"
            )
        num_rows = num_prompts * self.num_return_sequences
        if self.rng is not None and self.rng.shape not in ((), (num_rows,)):
            raise ValueError(
                f"rng is one key or one per row of the result ({num_rows}), "
                f"not of shape {self.rng.shape}"
            )
        num_eos = len(self.ending.eos_E)
        if self.num_beams > 1 and num_eos >= num_ids:
            raise ValueError(
                f"beam search needs a token to go on with, but {num_eos} of {num_ids} ids end a row"
            )

    def _normalise(self):
        """Converts values to the documented types; yields a line for each that cannot be."""

        def convert(name, to, expected):
            value = getattr(self, name)
            if value is not None:
                try:
                    object.__setattr__(self, name, to(value))
                except (TypeError, ValueError):
                    yield f"{name} must be {expected}, not {value!r}"

        for name in WHOLE_NUMBERS:
            yield from convert(name, operator.index, "a whole number")
        for name in NUMBERS:
            yield from convert(name, _number, "a number")
        yield from convert("eos_token_id", _token_ids, "a token id or several (None: no end)")
        yield from convert("early_stopping", _early_stopping, "True, False or 'never'")
        yield from convert("rng", _typed_key, "a key such as jax.random.key(0)")

    def _problems(self):
        for name in (
            "max_new_tokens",
            "num_return_sequences",
            "num_beams",
            "vocab_size",
            "prompt_lookup_num_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name} must be at least 1, not {value}"
        if not self.temperature >= 0.0:
            yield f"temperature must not be negative, but is {self.temperature}"
        if self.num_alternatives < 0:
            yield f"num_alternatives must not be negative, but is {self.num_alternatives}"
        if self.top_k is not None and self.top_k < 0:
            yield f"top_k must not be negative, but is {self.top_k}"
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                yield f"{name} must be between 0 and 1, not {value}"
        if not self.repetition_penalty > 0.0:
            yield f"repetition_penalty must be above 0, not {self.repetition_penalty}"
        if isinstance(self.policy, str) and self.policy not in POLICIES:
            yield f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}"

    def _conflicts(self):
        if self.do_sample and self.rng is None:
            yield "do_sample=True needs rng, a jax.random.key"
        if not self.do_sample:
            yield from self._without_sampling()
        if self.num_beams > 1 and self.do_sample:
            yield "beam search does not sample: do_sample=True needs num_beams=1"
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            yield (
                f"num_return_sequences={self.num_return_sequences} exceeds "
                f"num_beams={self.num_beams}"
            )
        token_by_token = self.num_beams == 1 and not self.penalty_alpha
        if self.num_alternatives and (not token_by_token or self.prompt_lookup_num_tokens):
            yield (
                "num_alternatives goes with greedy choice and sampling, not with num_beams, "
                "penalty_alpha or prompt_lookup_num_tokens"
            )
        if self.prompt_lookup_num_tokens is not None:
            if self.num_beams > 1 or self.penalty_alpha:
                yield (
                    "prompt_lookup_num_tokens goes with greedy choice and sampling, not with "
                    "num_beams or penalty_alpha"
                )
            if not isinstance(self.decoding_policy, ReadsAhead):
                yield (
                    f"prompt_lookup_num_tokens needs a policy with read_ahead and keep, such as "
                    f"{', '.join(POLICIES)}; {type(self.policy).__name__} has none"
                )
        if self.penalty_alpha:
            if not 0.0 < self.penalty_alpha <= 1.0:
                yield f"penalty_alpha must be between 0 and 1, not {self.penalty_alpha}"
            if self.top_k is None or self.top_k < 2:
                yield "penalty_alpha needs top_k, the number of candidates, to be at least 2"
            if self.do_sample or self.num_beams > 1:
                yield "contrastive search (penalty_alpha) goes with neither do_sample nor num_beams"

    def _without_sampling(self):
        if self.num_beams == 1 and self.num_return_sequences > 1:
            yield "several num_return_sequences need do_sample=True or beam search"
        unused = {name: getattr(self, name) for name in ("top_k", "top_p", "min_p")}
        if self.penalty_alpha:
            del unused["top_k"]
        given = [f"{name}={value}" for name, value in unused.items() if value is not None]
        if self.temperature != 1.0:
            given.append(f"temperature={self.temperature}")
        if given:
            yield f"{', '.join(given)} changes nothing without do_sample=True"


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):  # float("0.5") would take it
        raise TypeError
    return float(value)


def _token_ids(value: Any) -> tuple[int, ...]:
    several = value if np.ndim(value) else (value,)
    ids = tuple(dict.fromkeys(map(operator.index, several)))
    if not ids:
        raise ValueError
    return ids


def _early_stopping(value: Any) -> bool | str:
    # 1 and True are one key of the jit cache: both must mean the same.
    if value not in (True, False, "never"):
        raise ValueError
    return "never" if isinstance(value, str) else bool(value)


def _typed_key(rng: Any) -> jax.Array:
    if not isinstance(rng, jax.Array | np.ndarray):
        raise TypeError
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        return rng
    return jax.random.wrap_key_data(jnp.asarray(rng))  # of jax.random.PRNGKey
