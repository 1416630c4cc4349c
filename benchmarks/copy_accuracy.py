"""How exactly a model copies, and over which distances; JSON.

    python benchmarks/copy_accuracy.py --model runs/copy_128 [--task repeat:128]

Of each target that counts in the validation documents: whether the most likely token is the right
one, given everything before it. Distances are those from the token that is predicted back to the
one that is copied; the eos after the copy is reported apart. `exact_documents` are those without
any error.
"""

import argparse
import functools
import itertools
import json

import jax
import numpy as np

from perceiver_ar_jax import load_pretrained
from perceiver_ar_jax.data import DataConfig, EvaluationBatches
from perceiver_ar_jax.data.opening import open_documents
from perceiver_ar_jax.training import Batch

NUM_RANGES = 8  # of distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="what load_pretrained reads")
    parser.add_argument("--task", help="such as mirror:128; default: mirror:max_seq_len")
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    args = parser.parse_args()
    pretrained = load_pretrained(args.model)
    task = args.task or f"mirror:{pretrained.config.max_seq_len}"
    is_right = predictions(pretrained, task, args.batch)
    result = {"model": args.model, "step": pretrained.step, "task": task}
    print(json.dumps(result | report(is_right, task.startswith("mirror"))))


def predictions(pretrained, task: str, batch: int) -> np.ndarray:
    """Whether each target that counts is predicted, (documents, targets), in their order."""
    config = pretrained.config
    settings = DataConfig(
        task, split="validation", min_seq_len=1, max_seq_len=config.max_seq_len, batch_size=batch
    )
    documents = open_documents(settings, pretrained.tokenizer)
    batches = EvaluationBatches(
        settings, documents, num_latents=config.max_latents, process_index=0, rows=batch
    )
    compare = functools.partial(is_predicted, model=pretrained.model, prefix_len=batches.prefix_len)
    compare = jax.jit(compare)
    rows = [
        row[weights > 0]
        for arrays in batches
        for row, weights in zip(
            np.asarray(compare(pretrained.params, Batch(**arrays))),
            arrays["weights"][:, batches.prefix_len :],
            strict=True,
        )
    ]
    # The windows of a document come from its end.
    rows = [row for row in rows if len(row)]
    per_document = len(rows) // len(documents)
    cut = range(0, len(rows), per_document)
    return np.stack([np.concatenate(rows[first : first + per_document][::-1]) for first in cut])


def is_predicted(params, batch: Batch, *, model, prefix_len: int) -> jax.Array:
    """Whether the target of each latent is the most likely token, (B, L)."""
    logits_BLV = model.apply({"params": params}, batch.tokens, prefix_len, batch.pad_mask)
    return logits_BLV.argmax(-1) == batch.targets[:, prefix_len:]


def report(is_right: np.ndarray, is_mirrored: bool) -> dict:
    """Accuracy in all, of eos, and by distance."""
    half = is_right.shape[1]
    copied = is_right[:, :-1]
    distances = np.arange(3, 2 * half, 2) if is_mirrored else np.full(half - 1, half)
    edges = np.unique(np.linspace(distances.min(), distances.max() + 1, NUM_RANGES + 1).astype(int))
    ranges = {}
    for low, high in itertools.pairwise(edges):
        inside = (low <= distances) & (distances < high)
        if inside.any():
            ranges[f"{low}..{high - 1}"] = round(float(copied[:, inside].mean()), 5)
    return {
        "documents": len(is_right),
        "accuracy": round(float(is_right.mean()), 5),
        "eos_accuracy": round(float(is_right[:, -1].mean()), 5),
        "exact_documents": round(float(is_right.all(1).mean()), 5),
        "accuracy_by_distance": ranges,
    }


if __name__ == "__main__":
    main()
