"""How good generated texts are, and what each decoding policy costs on text of people."""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from perceiver_ar_jax.evaluation.progress import tracked
from perceiver_ar_jax.evaluation.text import Table
from perceiver_ar_jax.generation import generate
from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.policies import POLICIES
from perceiver_ar_jax.generation.prompt import latents_with_room
from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.model.cache import Cache
from perceiver_ar_jax.pretrained import Pretrained

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "top_p": {"do_sample": True, "top_p": 0.9},
}
REPEATED = 4  # tokens of an n-gram that counts as repeated


def generation_quality(
    pretrained: Pretrained,
    stream: np.ndarray,
    *,
    num_prompts: int = 16,
    num_new: int | None = None,
    seed: int = 0,
) -> Table:
    """Diversity of what follows prompts from a text, and the loss of what did follow, by policy.

    A row for each policy and each way to choose tokens: "distinct_1" to "distinct_3" (see
    `distinct`), "repetition" (see `repeated_share`), and "held_out_nats_per_token", the loss of the
    text's own continuation when it is read token by token under the policy. The first row,
    "text", is that continuation. Greedy, sampled at temperature 1, and the same with top_p 0.9.

    Args:
      pretrained: the model, with a tokenizer.
      stream: (T,) tokens of the text.
      num_prompts: from equally distant places of it, half a window each.
      num_new: tokens after each prompt; None: max_latents, so that every policy has to act.
      seed: of the samples.

    Raises:
      ValueError: the text is too short.
    """
    config, tokenizer = pretrained.config, pretrained.tokenizer
    num_latents = min(latents_with_room(config.max_latents), max(config.max_seq_len // 2, 1))
    prompt_len = min(max(config.max_seq_len // 2, 1), config.max_prefix_len + num_latents)
    num_new = num_new or config.max_latents
    if len(stream) < num_prompts * (prompt_len + num_new):
        raise ValueError(
            f"the text has {len(stream)} tokens, fewer than {num_prompts} prompts of {prompt_len} "
            f"with {num_new} after each"
        )
    starts = np.linspace(0, len(stream) - prompt_len - num_new, num_prompts, dtype=int)
    rows_RS = np.array([stream[start : start + prompt_len + num_new] for start in starts])
    rows = [{"policy": "text", "search": "text", **_diversity(rows_RS[:, prompt_len:])}]
    held_out: dict[str, float] = {}
    measures = [(name, search) for name in POLICIES for search in SEARCHES]
    for name, search in tracked(measures, len(measures), "policies and searches"):
        if name not in held_out:
            measure = functools.partial(
                nats_of_new_tokens,
                model=pretrained.model,
                policy=POLICIES[name],
                prompt_len=prompt_len,
                num_latents=num_latents,
            )
            held_out[name] = float(jax.jit(measure)(pretrained.params, rows_RS).mean())
        options = SEARCHES[search]
        tokens = generate(
            pretrained.model,
            pretrained.params,
            rows_RS[:, :prompt_len],
            num_latents=num_latents,
            max_new_tokens=num_new,
            vocab_size=tokenizer.vocab_size,
            policy=name,
            rng=jax.random.key(seed) if options else None,
            **options,
        )
        diversity = _diversity(tokens[:, prompt_len:])
        rows.append({"policy": name, "search": search, **diversity})
        rows[-1]["held_out_nats_per_token"] = held_out[name]
    return rows


def nats_of_new_tokens(
    params: Any,
    tokens_BS: jax.Array,
    *,
    model: PerceiverAR,
    policy: Any,
    prompt_len: int,
    num_latents: int,
) -> jax.Array:
    """-log p of each token after the prompt, (B, S - prompt_len), read one at a time.

    Each is scored by what the policy's caches predict, as in `generate` for the tokens it chose.

    Args:
      params: parameters of the model.
      tokens_BS: prompts and what follows them.
      model: the model.
      policy: a value of `generation.policies.POLICIES`.
      prompt_len: tokens that are read at once.
      num_latents: how many of them are latents.
    """
    variables = {"params": params}
    prompt_BS, new_BT = tokens_BS[:, :prompt_len], tokens_BS[:, prompt_len:]
    hidden_BLD, cache = model.apply(
        variables, prompt_BS, prompt_len - num_latents, method="prefill"
    )
    context = Context(prompt_BS, hidden_BLD, cast(Cache, cache))
    state = policy.start(context, new_BT.shape[1], model.config)

    def read(carry, token_B):
        hidden_BD, state = carry
        logits_BV = model.apply(variables, hidden_BD, method="logits")
        log_probs_BV = jax.nn.log_softmax(logits_BV)
        nats_B = -jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=1)[:, 0]
        return policy.step(model, params, token_B, state), nats_B

    _, nats_TB = jax.lax.scan(read, (hidden_BLD[:, -1], state), new_BT.T)
    return nats_TB.T


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all texts, divided by their number; smaller for more text.

    Source: Li et al. 2016 (arXiv 1510.03055).
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def repeated_share(text: Sequence[int], n: int = REPEATED) -> float:
    """The share of a text's n-grams that occurred in it before.

    Source: "seq-rep-n" of Welleck et al. 2019 (arXiv 1908.04319).
    """
    ngrams = _ngrams(text, n)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _diversity(tokens_RT: np.ndarray) -> dict[str, float]:
    texts = tokens_RT.tolist()
    result = {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)}
    return result | {"repetition": float(np.mean([repeated_share(text) for text in texts]))}


def _ngrams(text, n):
    return list(zip(*(text[i:] for i in range(n)), strict=False))
