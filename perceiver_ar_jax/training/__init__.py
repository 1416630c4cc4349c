from perceiver_ar_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_at,
    learning_rate_schedule,
    make_optimizer,
)
from perceiver_ar_jax.training.state import Batch, TrainState
from perceiver_ar_jax.training.step import eval_step, token_log_probs, train_step

__all__ = [
    "Batch",
    "OptimizerConfig",
    "TrainState",
    "eval_step",
    "learning_rate_at",
    "learning_rate_schedule",
    "make_optimizer",
    "token_log_probs",
    "train_step",
]
