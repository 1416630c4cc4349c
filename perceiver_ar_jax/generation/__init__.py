from perceiver_ar_jax.generation.generate import generate, generate_with_log_probs, stream
from perceiver_ar_jax.generation.generation import Generated, Generation
from perceiver_ar_jax.generation.options import Options
from perceiver_ar_jax.generation.policies import Recompute, Reset, Slide
from perceiver_ar_jax.generation.prefilled import (
    Prefilled,
    load_prefilled,
    prefill,
    save_prefilled,
)

__all__ = [
    "Generated",
    "Generation",
    "Options",
    "Prefilled",
    "Recompute",
    "Reset",
    "Slide",
    "generate",
    "generate_with_log_probs",
    "load_prefilled",
    "prefill",
    "save_prefilled",
    "stream",
]
