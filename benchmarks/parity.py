"""How far our model is from perceiver-io 0.11, both run live with the same weights; prints JSON.

    python benchmarks/parity.py [--configs 60]

Float32 on the CPU; needs what requirements-parity.txt says. Errors of logits are relative to
max(1, largest logit), errors of gradients to the largest entry of their tensor, losses in nats.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "")  # not those of the tests, which compile quickly
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import jax
import numpy as np
import reference
from reference_generation import both_models, random_prompts, reference_generate

from perceiver_ar_jax import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=int, default=60, help="random models for the logits")
    configs = parser.parse_args().configs
    warnings.simplefilter("ignore")  # of the reference's libraries
    reference.quick_jit = jax.jit  # the code that users run, which the tests find slow to compile
    result = {
        "logits": logits(configs),
        "gradients": gradients(max(1, configs // 5)),
        "cached_decoding": cached_decoding(max(1, configs // 5)),
        "adamw": adamw(),
        "greedy_tokens": greedy_tokens(max(1, configs // 5)),
    }
    print(json.dumps(result, indent=2))


def logits(configs: int) -> dict:
    errors = [error for seed in range(configs) for error in reference.logit_errors(seed)]
    return {"configs": configs, "inputs": len(errors), "max_relative_error": float(np.max(errors))}


def gradients(configs: int) -> dict:
    errors = [
        error for seed in range(configs) for error in reference.gradient_errors(seed).values()
    ]
    return {"configs": configs, "tensors": len(errors), "max_relative_error": float(np.max(errors))}


def cached_decoding(configs: int) -> dict:
    errors = [error for seed in range(configs) for error in reference.cached_logit_errors(seed)]
    return {"configs": configs, "steps": len(errors), "max_relative_error": float(np.max(errors))}


def adamw() -> dict:
    losses = [reference.adamw_losses(abs_pos_emb=abs_pos_emb) for abs_pos_emb in (True, False)]
    return {
        "runs": len(losses),
        "steps": sum(len(ours) for ours, _ in losses),
        "max_loss_difference": float(np.max([np.abs(ours - theirs) for ours, theirs in losses])),
    }


def greedy_tokens(configs: int, new_tokens: int = 30) -> dict:
    """Four prompts of four rows a model, past max_latents and past max_seq_len."""
    equal = []
    for seed in range(configs):
        theirs, model, params = both_models(seed)
        num_latents = min(1 + seed % 4, model.config.max_latents)
        options = {"num_latents": num_latents, "max_new_tokens": new_tokens}
        for prompt_seed in range(4):
            tokens, pads = random_prompts(model.config, num_latents, prompt_seed)
            expected = reference_generate(theirs, tokens, pads, **options)
            actual = generate(model, params, tokens, pad_mask=pads, **options)
            equal.append((np.asarray(actual) == expected)[:, -new_tokens:])
    return {
        "configs": configs,
        "rows": sum(len(rows) for rows in equal),
        "tokens": sum(rows.size for rows in equal),
        "equal_tokens": int(sum(rows.sum() for rows in equal)),
    }


if __name__ == "__main__":
    main()
