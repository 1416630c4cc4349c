"""One call of `generate` or `stream`: a prompt, and how far it has been continued."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from perceiver_ar_jax.generation.context import mesh_of
from perceiver_ar_jax.generation.loop import Decoder, continue_until
from perceiver_ar_jax.generation.options import Options
from perceiver_ar_jax.generation.policies import ReadsAhead
from perceiver_ar_jax.generation.prefilled import Prefilled, check_model, prefill
from perceiver_ar_jax.generation.prompt import bucket_size
from perceiver_ar_jax.model import Cache, PerceiverAR


class Generated(NamedTuple):
    """Prompt and new tokens, (B, S + T), and the log-probability of each new token, (B, T)."""

    tokens: np.ndarray
    log_probs: np.ndarray


class Step(NamedTuple):
    """One new token of each row, and what the model thought of it and of others."""

    tokens_B: np.ndarray
    log_probs_B: np.ndarray
    alternative_ids_BA: np.ndarray | None = None  # likeliest first; with num_alternatives
    alternative_log_probs_BA: np.ndarray | None = None


class Generation:
    """A prompt, read at construction, and its continuation so far; arguments as in `generate`."""

    def __init__(
        self,
        model: PerceiverAR,
        params: Any,
        prompt: np.ndarray | Sequence[Sequence[int]] | Prefilled,
        options: Options,
        *,
        num_latents: int = 1,
        pad_mask: np.ndarray | None = None,
    ):
        check_model(model, params)
        if isinstance(prompt, Prefilled):
            prompt.check(model.config, params)
        else:
            prompt = prefill(model, params, prompt, num_latents=num_latents, pad_mask=pad_mask)
        options.check_against(model.config, num_prompts=len(prompt.tokens_BS))
        num_ids = np.int32(options.vocab_size or model.config.vocab_size)
        self._options, self._prompt, self._params = options, prompt, params
        self._inputs = (params, num_ids, options.method, options.ending)
        self._static = {"model": model, "policy": options.decoding_policy}
        self._progress = None

    def advance_to(self, count: int) -> int:
        """Adds tokens until there are `count` or more, or all rows have ended; their number."""
        with mesh_of(self._params):
            if self._progress is None:
                size = bucket_size(self._options.max_new_tokens)
                self._progress = begin(
                    *self._inputs, self._prompt.context, max_new_tokens=size, **self._static
                )
            self._progress = continue_to(
                *self._inputs, self._progress, np.int32(count), **self._static
            )
        return int(self._progress.texts.count)

    def new_tokens(self) -> Iterator[np.ndarray]:
        """The new tokens, (B,) at a time, each computed when it is asked for."""
        for place in self._places():
            yield _on_host(self._progress.texts.tokens_RT)[:, place]

    def steps(self) -> Iterator[Step]:
        """As `new_tokens`, with log-probabilities and `num_alternatives` alternatives."""
        for place in self._places():
            yield Step(*map(_on_host, _at(self._progress, np.int32(place))))

    def newest_attention(self) -> np.ndarray:
        """What the prediction of the newest token read: (B, K), the mean over heads.

        The weights of the hybrid layer, as `PerceiverAR.newest_attention` describes them: of the
        newest K columns, oldest first; the last is the token before the newest. Greedy choice and
        sampling only, after the first token.
        """
        progress, tokens_BS = self._progress, self._prompt.context.tokens_BS
        with mesh_of(self._params):
            return _on_host(
                _newest_attention(self._params, tokens_BS, progress, model=self._static["model"])
            )

    def _places(self):
        """The place of each new token, once it is there."""
        for count in range(1, self._options.max_new_tokens + 1):
            if self.advance_to(count) < count:
                return
            yield count - 1

    def result(self) -> Generated:
        """Prompt and all new tokens, after what is missing was added."""
        options, prompt = self._options, self._prompt
        self.advance_to(options.max_new_tokens)
        prompt_BS = np.where(prompt.pad_mask_BS, options.pad_token_id, prompt.tokens_BS)
        prompt_BS = np.repeat(prompt_BS.astype(np.int32), options.num_return_sequences, axis=0)
        tokens_BT, log_probs_BT = (
            _on_host(x)[:, : options.max_new_tokens] for x in options.method.finish(self._progress)
        )
        return Generated(np.concatenate([prompt_BS, tokens_BT], axis=1), log_probs_BT)


def _on_host(x):
    """The whole array, also where other processes hold parts of it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "model", "policy"))
def begin(params, num_ids, method, ending, context, *, max_new_tokens, model, policy):
    """The progress before the first token, with room for `max_new_tokens`."""
    rows_R = jnp.repeat(jnp.arange(len(context.tokens_BS)), method.rows_per_prompt)
    context = context.take(rows_R)
    ahead = {"ahead": method.tokens_ahead} if method.tokens_ahead else {}
    return method.begin(
        _decoder(params, num_ids, model, policy),
        context,
        policy.start(context, max_new_tokens, model.config, **ahead),
        ending=ending,
        max_new_tokens=max_new_tokens,
    )


@functools.partial(jax.jit, static_argnames=("model", "policy"), donate_argnames="progress")
def continue_to(params, num_ids, method, ending, progress, count, *, model, policy):
    """The progress with `count` tokens or more, or where all rows have ended."""
    decoder = _decoder(params, num_ids, model, policy)
    return continue_until(decoder, method, progress, ending, count)


@jax.jit
def _at(progress, place):
    texts = progress.texts
    arrays = [texts.tokens_RT, texts.log_probs_RT]
    if getattr(progress, "alternatives", None) is not None:
        arrays += [progress.alternatives.ids_RTA, progress.alternatives.log_probs_RTA]
    return [jax.lax.dynamic_index_in_dim(x, place, 1, keepdims=False) for x in arrays]


@functools.partial(jax.jit, static_argnames="model")
def _newest_attention(params, tokens_BS, progress, *, model):
    texts, state = progress.texts, progress.state
    rows_R = jnp.repeat(jnp.arange(len(tokens_BS)), len(texts.tokens_RT) // len(tokens_BS))
    before_R = jnp.where(
        texts.count > 1, texts.tokens_RT[:, texts.count - 2], tokens_BS[rows_R, -1]
    )
    cache = state if isinstance(state, Cache) else state.cache
    weights_RNK = model.apply({"params": params}, before_R, cache, method="newest_attention")
    return weights_RNK.mean(axis=1)


def _decoder(params, num_ids, model, policy):
    def head(hidden):
        logits = model.apply({"params": params}, hidden, method="logits")
        return jnp.where(jnp.arange(logits.shape[-1]) < num_ids, logits, -jnp.inf)

    decoder = Decoder(functools.partial(policy.step, model, params), head)
    if not isinstance(policy, ReadsAhead):
        return decoder
    read_ahead = functools.partial(policy.read_ahead, model, params)
    return decoder._replace(read_ahead=read_ahead, keep=policy.keep)
