"""What a trained model knows: its loss on text, probes, and lm-evaluation-harness."""

from typing import Any

from perceiver_ar_jax.evaluation.text import Evaluation, evaluate, evaluate_in_detail

OF_HARNESS = ("HarnessLM", "evaluate_tasks")

__all__ = ["Evaluation", "HarnessLM", "evaluate", "evaluate_in_detail", "evaluate_tasks"]


def __getattr__(name: str) -> Any:
    """What imports lm_eval, when it is asked for."""
    if name not in OF_HARNESS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from perceiver_ar_jax.evaluation import harness
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ValueError(f"{name} needs lm-eval: pip install 'perceiver-ar-jax[eval]'") from None
    return getattr(harness, name)
