"""Continues prompts: `generate`, token by token with `stream`, from a prompt read once."""

import contextlib
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from perceiver_ar_jax.generation import prompt as prompts
from perceiver_ar_jax.generation.loop import Decoder, continue_until
from perceiver_ar_jax.generation.options import Options
from perceiver_ar_jax.generation.policies import Context
from perceiver_ar_jax.generation.prefilled import Prefilled, fingerprint
from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.parallel import use_mesh


class Generated(NamedTuple):
    """Prompt and new tokens, (B, S + T), and the log-probability of each new token, (B, T)."""

    tokens: np.ndarray
    log_probs: np.ndarray


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

    Where the prompt has pads and where a row has ended there is pad_token_id. One jitted prefill,
    then one jitted loop; prompts of similar lengths share their compilation.

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
        early_stopping, num_return_sequences, eos_token_id, pad_token_id, vocab_size, policy, rng.

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
    run = _Run(model, params, prompt, num_latents, pad_mask, Options.of(**options))
    progress = run.continue_until(run.begin(), run.options.max_new_tokens)
    return run.result(progress)


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
        raise ValueError("beam search knows no token before its end: stream needs num_beams=1")
    return _Run(model, params, prompt, num_latents, pad_mask, options).new_tokens()


def prefill(
    model: PerceiverAR,
    params: Any,
    prompt: np.ndarray | Sequence[Sequence[int]],
    *,
    num_latents: int = 1,
    pad_mask: np.ndarray | None = None,
) -> Prefilled:
    """Reads a prompt once, to be continued many times; arguments as in `generate`."""
    _check_model(model, params)
    try:
        num_latents = operator.index(num_latents)
    except TypeError:
        raise ValueError(f"num_latents must be a whole number, not {num_latents!r}") from None
    tokens_BS, pad_mask_BS = prompts.as_rows(prompt, pad_mask)
    prompts.check(tokens_BS, pad_mask_BS, num_latents, model.config)
    *padded, prefix_len = prompts.in_bucket(tokens_BS, pad_mask_BS, num_latents, model.config)
    with _mesh_of(params):
        context, weights = _read(params, *padded, prefix_len=prefix_len, model=model)
    return Prefilled(tokens_BS, pad_mask_BS, context, weights)


class _Run:
    """One call of `generate` or `stream`, between prefill and result."""

    def __init__(self, model, params, prompt, num_latents, pad_mask, options):
        if isinstance(prompt, Prefilled):
            _check_model(model, params)
            prompt.check(model.config, params)
        else:
            prompt = prefill(model, params, prompt, num_latents=num_latents, pad_mask=pad_mask)
        options.check_against(model.config, num_prompts=len(prompt.tokens_BS))
        self.options = options
        self.prefilled = prompt
        self.embedding_DV = _transposed_embedding(params, model=model)
        num_ids = np.int32(options.vocab_size or model.config.vocab_size)
        self.inputs = (params, self.embedding_DV, num_ids, options.method, options.ending)
        self.static = {"model": model, "policy": options.decoding_policy}

    def begin(self):
        size = prompts.bucket_size(self.options.max_new_tokens)
        with _mesh_of(self.inputs[0]):
            return _begin(*self.inputs, self.prefilled.context, max_new_tokens=size, **self.static)

    def continue_until(self, progress, count):
        with _mesh_of(self.inputs[0]):
            return _continue_until(*self.inputs, progress, np.int32(count), **self.static)

    def new_tokens(self):
        progress = self.begin()
        for count in range(1, self.options.max_new_tokens + 1):
            progress = self.continue_until(progress, count)
            if progress.count < count:
                return
            yield _on_host(progress.tokens_BT)[:, count - 1]

    def result(self, progress):
        method = self.options.method
        prompt_BS = np.where(
            self.prefilled.pad_mask_BS, self.options.pad_token_id, self.prefilled.tokens_BS
        ).astype(np.int32)
        prompt_BS = np.repeat(prompt_BS, self.options.num_return_sequences, axis=0)
        tokens_BT, log_probs_BT = (
            _on_host(x)[:, : self.options.max_new_tokens] for x in method.finish(progress)
        )
        return Generated(np.concatenate([prompt_BS, tokens_BT], axis=1), log_probs_BT)


def _check_model(model, params):
    if isinstance(params, PerceiverAR):
        raise ValueError("model and params are swapped: generate(model, params, prompt)")
    if not isinstance(model, PerceiverAR):
        raise ValueError(
            f"model must be a PerceiverAR, not {type(model).__name__}: "
            "generate(model, params, prompt)"
        )
    if "token_embedding" not in params:
        raise ValueError(
            f"params must be the parameters of a PerceiverAR, such as "
            f'model.init(...)["params"]; these have {", ".join(map(str, params))}'
        )


def _on_host(x):
    """The whole array, also where other processes hold parts of it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def _mesh_of(params):
    """Inside, activations lie on the mesh that the parameters lie on, if on any."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        return use_mesh(sharding.mesh)
    return contextlib.nullcontext()


@functools.partial(jax.jit, static_argnames=("prefix_len", "model"))
def _read(params, tokens_BS, pad_mask_BS, *, prefix_len, model):
    hidden_BLD, cache = model.apply(
        {"params": params}, tokens_BS, prefix_len, pad_mask_BS, method="prefill"
    )
    return Context(tokens_BS, hidden_BLD, cache), fingerprint(params)


@functools.partial(jax.jit, static_argnames="model")
def _transposed_embedding(params, *, model):
    # XLA's matrix × vector on CPU is eight times slower with the rows the other way round.
    return model.apply({"params": params}, method="transposed_embedding")


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "model", "policy"))
def _begin(
    params, embedding_DV, num_ids, method, ending, context, *, max_new_tokens, model, policy
):
    rows_R = jnp.repeat(jnp.arange(len(context.tokens_BS)), method.rows_per_prompt)
    context = context.take(rows_R)
    return method.begin(
        _decoder(params, embedding_DV, num_ids, model, policy),
        context,
        policy.start(context, max_new_tokens, model.config),
        ending=ending,
        max_new_tokens=max_new_tokens,
    )


@functools.partial(jax.jit, static_argnames=("model", "policy"), donate_argnames="progress")
def _continue_until(
    params, embedding_DV, num_ids, method, ending, progress, count, *, model, policy
):
    decoder = _decoder(params, embedding_DV, num_ids, model, policy)
    return continue_until(decoder, method, progress, ending, count)


def _decoder(params, embedding_DV, num_ids, model, policy):
    def head(hidden_BD):
        logits_B1V = model.apply(
            {"params": params}, hidden_BD[:, None], embedding_DV, method="logits"
        )
        is_usable_V = jnp.arange(logits_B1V.shape[-1]) < num_ids
        return jnp.where(is_usable_V, logits_B1V[:, 0], -jnp.inf)

    return Decoder(functools.partial(policy.step, model, params), head)
