from perceiver_ar_jax.generation.generate import (
    Generated,
    Prefilled,
    generate,
    generate_with_log_probs,
    prefill,
    stream,
)
from perceiver_ar_jax.generation.options import Options

__all__ = [
    "Generated",
    "Options",
    "Prefilled",
    "generate",
    "generate_with_log_probs",
    "prefill",
    "stream",
]
