"""What a model does with its context, asked on purpose: prefix, pass keys, repetition.

Every probe returns a table, a list of rows of plain numbers.
"""

from collections.abc import Sequence

import numpy as np

from perceiver_ar_jax.evaluation.scores import score_sequences
from perceiver_ar_jax.evaluation.text import Table
from perceiver_ar_jax.pretrained import Pretrained

PASS_KEY = "The pass key is"
KEY_DIGITS = 5


def loss_by_prefix(
    pretrained: Pretrained,
    stream: np.ndarray,
    *,
    num_windows: int = 64,
    batch_size: int | None = None,
) -> Table:
    """The loss of the same max_latents tokens after prefixes of 0, 16, 32, … tokens.

    "gain" is by how many nats per token a prefix lowers the loss; "standard_error" is the gain's,
    over windows.

    Args:
      pretrained: the model.
      stream: (T,) tokens of a text; windows are taken from it at equal distances.
      num_windows: how many.
      batch_size: as in `score_sequences`.

    Raises:
      ValueError: the text is shorter than a window.
    """
    config = pretrained.config
    firsts = _places(stream, config.max_seq_len + 1, num_windows) + config.max_prefix_len
    lengths = _powers_up_to(config.max_prefix_len)
    scores = score_sequences(
        pretrained,
        [
            (stream[first - length : first + config.max_latents + 1], config.max_latents)
            for length in lengths
            for first in firsts
        ],
        batch_size=batch_size,
    )
    nats = -np.array([x.log_probs.mean() for x in scores]).reshape(len(lengths), len(firsts))
    gains = nats[0] - nats
    errors = gains.std(axis=1, ddof=1) / len(firsts) ** 0.5 if len(firsts) > 1 else gains[:, 0] * 0
    return [
        {
            "prefix": length,
            "nats_per_token": float(nats[row].mean()),
            "gain": float(gains[row].mean()),
            "standard_error": float(errors[row]),
        }
        for row, length in enumerate(lengths)
    ]


def passkey(
    pretrained: Pretrained,
    stream: np.ndarray,
    *,
    num_keys: int = 32,
    seed: int = 0,
    batch_size: int | None = None,
) -> Table:
    """Whether a number of five digits is recalled, by how many tokens ago it was said.

    The model reads max_seq_len tokens: text, "The pass key is 71943.", `distance` tokens of text,
    and "The pass key is". Scored is the number: "nats_per_token", and the share "recalled" by
    greedy decoding. "other_key_nats_per_token" is the loss of the same number after another one was
    said: what the form of the sentence alone is worth.

    Args:
      pretrained: the model, with a tokenizer.
      stream: (T,) tokens of the text.
      num_keys: numbers tried at each distance, each in another place of the text.
      seed: of the numbers.
      batch_size: as in `score_sequences`.

    Raises:
      ValueError: the text is shorter than a window, or a window too short for the sentences.
    """
    length = pretrained.config.max_seq_len + 1
    keys = np.random.default_rng(seed).integers(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS, num_keys)
    encode = pretrained.tokenizer.encode
    hints = [encode(f" {PASS_KEY} {key}.") for key in keys]
    questions = [encode(f" {PASS_KEY} {key}") for key in keys]
    num_asked = len(encode(f" {PASS_KEY}"))  # tokens of a question before its answer
    longest = length - max(map(len, hints)) - max(map(len, questions))
    if longest < 0:
        raise ValueError(f"the {length - 1} tokens of a window are too few for a pass key")
    starts = np.resize(_places(stream, length, num_keys), num_keys)
    distances = _powers_up_to(longest)
    sequences = []
    for distance in distances:
        for number, (start, question) in enumerate(zip(starts, questions, strict=True)):
            for hint in (hints[number], hints[number - 1]):
                before = length - len(hint) - distance - len(question)
                text = stream[start : start + before + distance]
                sequence = np.concatenate([text[:before], hint, text[before:], question])
                sequences.append((sequence, len(question) - num_asked))
    scores = iter(score_sequences(pretrained, sequences, batch_size=batch_size))
    rows = []
    for distance in distances:
        right, other = zip(*((next(scores), next(scores)) for _ in keys), strict=True)
        rows.append(
            {
                "distance": distance,
                "nats_per_token": _mean_nats(right),
                "other_key_nats_per_token": _mean_nats(other),
                "recalled": float(np.mean([not x.ranks.any() for x in right])),
            }
        )
    return rows


def repetition(
    pretrained: Pretrained,
    *,
    num_sequences: int = 32,
    seed: int = 0,
    batch_size: int | None = None,
) -> Table:
    """The loss of random tokens when they come the first and the second time, by their number.

    "in_context_score" is the difference in nats per token, 0 for a model that does not look back;
    "recalled" is the share of the second ones that are the model's first choice. Random tokens
    have no other use of context than to be copied.

    Args:
      pretrained: the model, with a tokenizer.
      num_sequences: for each length.
      seed: of the tokens, drawn uniformly from the tokenizer's.
      batch_size: as in `score_sequences`.
    """
    tokenizer = pretrained.tokenizer
    rng = np.random.default_rng(seed)
    ids = np.setdiff1d(np.arange(tokenizer.vocab_size), [tokenizer.eos_id, tokenizer.pad_id])
    lengths = [n for n in _powers_up_to(pretrained.config.max_seq_len // 2, least=4) if n]
    sequences = []
    for length in lengths:
        for tokens in rng.choice(ids, (num_sequences, length)):
            sequences.append(([tokenizer.eos_id, *tokens, *tokens], 2 * length))
    scores = score_sequences(pretrained, sequences, batch_size=batch_size)
    rows = []
    for place, length in enumerate(lengths):
        chosen = scores[place * num_sequences : (place + 1) * num_sequences]
        first, second = -np.mean([x.log_probs.reshape(2, length) for x in chosen], axis=(0, 2))
        rows.append(
            {
                "length": length,
                "first_nats_per_token": float(first),
                "second_nats_per_token": float(second),
                "in_context_score": float(first - second),
                "recalled": float(np.mean([x.ranks[length:] == 0 for x in chosen])),
            }
        )
    return rows


def _places(stream: np.ndarray, length: int, count: int) -> np.ndarray:
    """Where windows begin, at equal distances; fewer than `count` if the text has fewer tokens."""
    room = len(stream) - length
    if room < 0:
        raise ValueError(f"the text has {len(stream)} tokens, fewer than the {length} of a window")
    return np.linspace(0, room, min(count, room + 1), dtype=int)


def _powers_up_to(last: int, least: int = 16) -> Sequence[int]:
    """0, powers of two from `least`, and `last`."""
    powers = [least << i for i in range(32) if least << i < last]
    return sorted({0, *powers, last})


def _mean_nats(scores) -> float:
    return float(-np.mean(np.concatenate([x.log_probs for x in scores])))
