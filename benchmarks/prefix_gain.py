"""What a longer prefix is worth: the loss on the same targets after prefixes of several lengths.

    python benchmarks/prefix_gain.py --text 'books/*.txt' --output prefix_gain.json

Trains a small model without a prefix, and from its state one model per prefix length, all on the
same targets in the same order: only what the latents read differs. Then every model predicts the
same held-out targets, after its own prefix and after each shorter one. Of the text, every twentieth
stretch of 16 windows is held out: none of its tokens is a target in training. Differences are
taken window by window, so their standard errors are those of paired samples.
tools/draw_prefix_gain.py draws the result.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import numpy as np
from processor import processor

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.data.sources import open_source
from perceiver_ar_jax.data.text_documents import tokenize
from perceiver_ar_jax.model import init_params
from perceiver_ar_jax.tokenizers import load_tokenizer
from perceiver_ar_jax.training import (
    Batch,
    OptimizerConfig,
    TrainState,
    make_optimizer,
    token_log_probs,
    train_step,
)

WINDOWS_PER_STRETCH, HELD_OUT_EVERY = 16, 20
NUM_PARTS = 8  # of the latents, whose losses are also reported apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="a file or glob of text, or a TFDS directory")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[0, 512, 3584, 7680])
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--shared_steps", type=int, default=300, help="without a prefix")
    parser.add_argument("--steps", type=int, default=200, help="after these, of each model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON, rewritten per model")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.tokenizer)
    tokens_T, num_bytes = read_text(args.text, tokenizer)
    longest = max(args.prefixes)
    held_out_W, is_held_out_T = hold_out(len(tokens_T), args.latents, longest)
    result = {
        "arguments": vars(args) | {"output": str(args.output)},
        "processor": processor(),
        "jax": jax.__version__,
        "tokens": len(tokens_T),
        "bytes_per_token": num_bytes / len(tokens_T),
        "held_out_targets": len(held_out_W) * args.latents,
        "models": [],
    }
    config = model_config(args, tokenizer.vocab_size)
    optimizer = OptimizerConfig(
        learning_rate=args.learning_rate,
        warmup_steps=min(50, args.shared_steps),
        total_steps=args.shared_steps + args.steps,
        min_fraction=0.0,
        b2=0.98,
    )
    params = init_params(PerceiverAR(config), jax.random.key(args.seed))
    state = TrainState.create(params=params, tx=make_optimizer(optimizer))
    starts_IB = draw_starts(args, is_held_out_T, longest)
    shared_IB, own_IB = np.split(starts_IB, [args.shared_steps])
    shared, result["shared_training"] = train(config, state, tokens_T, shared_IB, prefix=0)
    for prefix in sorted(args.prefixes):
        longer = config.replace(max_seq_len=prefix + args.latents)
        state, training = train(longer, shared, tokens_T, own_IB, prefix)
        model, params = PerceiverAR(longer), state.params
        read = [p for p in sorted(args.prefixes) if p <= prefix]
        nats = {p: nats_after(model, params, tokens_T, held_out_W, p, args) for p in read}
        result["models"].append({"prefix": prefix} | training | {"read": losses(nats)})
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["models"][-1]), flush=True)


def read_text(source: str, tokenizer) -> tuple[np.ndarray, int]:
    """All documents as one stream of tokens, and how many bytes of text they were."""
    texts = open_source(source, "train")
    documents = [tokenize(texts[i], tokenizer) for i in range(len(texts))]
    tokens_T = np.concatenate([document.tokens for document in documents])
    return tokens_T, sum(document.num_bytes for document in documents)


def hold_out(length: int, latents: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """First latent of each held-out window, and which tokens are never targets in training."""
    stretch = WINDOWS_PER_STRETCH * latents
    is_held_out_T = np.zeros(length, bool)
    starts = []
    for begin in range(longest, length - stretch, HELD_OUT_EVERY * stretch):
        is_held_out_T[begin + 1 : begin + stretch + 1] = True
        starts += range(begin, begin + stretch, latents)
    if not starts:
        raise SystemExit(f"a text of {length:,} tokens is too short for a prefix of {longest:,}")
    return np.array(starts), is_held_out_T


def draw_starts(args, is_held_out_T: np.ndarray, longest: int) -> np.ndarray:
    """The first latent of each window of each training step, (steps, batch)."""
    before_T = np.concatenate([[0], np.cumsum(is_held_out_T)])
    starts = np.arange(longest, len(is_held_out_T) - args.latents)
    is_clean = before_T[starts + args.latents + 1] == before_T[starts + 1]
    rng = np.random.default_rng(args.seed)
    return rng.choice(starts[is_clean], (args.shared_steps + args.steps, args.batch))


def window_batch(tokens_T: np.ndarray, starts_B: np.ndarray, prefix: int, latents: int) -> Batch:
    """Windows of `prefix` tokens and then `latents`, of which the first is at `starts_B`."""
    places_BS = starts_B[:, None] + np.arange(-prefix, latents)
    pad_mask_BS = np.zeros(places_BS.shape, bool)
    return Batch(tokens=tokens_T[places_BS], targets=tokens_T[places_BS + 1], pad_mask=pad_mask_BS)


def model_config(args, vocab_size: int) -> PerceiverARConfig:
    """The model without a prefix; with rotary positions alone, its parameters fit any length."""
    return PerceiverARConfig(
        vocab_size=vocab_size,
        max_seq_len=args.latents,
        max_latents=args.latents,
        num_channels=args.channels,
        num_heads=max(1, args.channels // 64),
        num_self_attention_layers=args.layers,
        num_self_attention_rotary_layers=-1,
        cross_attention_dropout=0.0,
        abs_pos_emb=False,
        output_norm=True,
    )


def train(config: PerceiverARConfig, state: TrainState, tokens_T, starts_IB, prefix: int):
    """The state after a step for each of `starts_IB`, and what training says of itself."""
    step = functools.partial(
        train_step, model=PerceiverAR(config), prefix_len=prefix, key=jax.random.key(0)
    )
    batch_of = lambda starts_B: window_batch(tokens_T, starts_B, prefix, config.max_latents)
    step = jax.jit(step).lower(state, batch_of(starts_IB[0])).compile()
    begin, losses = time.process_time(), []
    for starts_B in starts_IB:
        state, metrics = step(state, batch_of(starts_B))
        losses.append(float(metrics["loss"]))
    return state, {
        "loss_of_last_50_steps": round(float(np.mean(losses[-50:])), 4),
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


def nats_after(model, params, tokens_T, starts_W, prefix: int, args) -> np.ndarray:
    """-log p of each held-out target after `prefix` tokens, (W, L)."""
    log_probs = jax.jit(functools.partial(token_log_probs, model=model, prefix_len=prefix))
    batches = (
        starts_W.reshape(-1, args.batch) if len(starts_W) % args.batch == 0 else starts_W[:, None]
    )
    return -np.concatenate(
        [log_probs(params, window_batch(tokens_T, x, prefix, args.latents)) for x in batches]
    )


def losses(nats: dict[int, np.ndarray]) -> list[dict]:
    """For each prefix that was read: nats per token, in all and by part of the latents."""
    shortest = nats[min(nats)].mean(1)
    return [
        {
            "prefix": prefix,
            "loss": round(float(nats_WL.mean()), 4),
            "gain": mean_and_error(shortest - nats_WL.mean(1)),
            "by_part": [
                round(float(part.mean()), 4) for part in np.array_split(nats_WL, NUM_PARTS, axis=1)
            ],
        }
        for prefix, nats_WL in nats.items()
    ]


def mean_and_error(x: np.ndarray) -> list[float]:
    return [round(float(x.mean()), 4), round(float(x.std(ddof=1) / len(x) ** 0.5), 4)]


if __name__ == "__main__":
    main()
