"""What a trained model knows: its loss on text, probes, and lm-evaluation-harness."""

from perceiver_ar_jax.evaluation.text import Evaluation, evaluate, evaluate_in_detail

__all__ = ["Evaluation", "evaluate", "evaluate_in_detail"]
