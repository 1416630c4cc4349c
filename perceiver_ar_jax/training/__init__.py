from perceiver_ar_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_at,
    learning_rate_schedule,
    make_optimizer,
)
from perceiver_ar_jax.training.state import Batch, TrainState, state_shardings
from perceiver_ar_jax.training.step import (
    eval_step,
    token_log_probs,
    token_log_probs_and_likeliest,
    token_log_probs_and_ranks,
    train_step,
)

__all__ = [
    "Batch",
    "OptimizerConfig",
    "TrainState",
    "eval_step",
    "learning_rate_at",
    "learning_rate_schedule",
    "make_optimizer",
    "state_shardings",
    "token_log_probs",
    "token_log_probs_and_likeliest",
    "token_log_probs_and_ranks",
    "train_step",
]
