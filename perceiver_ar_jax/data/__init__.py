from perceiver_ar_jax.data.config import DataConfig
from perceiver_ar_jax.data.evaluation_batches import EvaluationBatches, evaluation_batches
from perceiver_ar_jax.data.loader import Loader, make_loader, merge_states
from perceiver_ar_jax.data.tokenizer import load_tokenizer, train_sentencepiece

__all__ = [
    "DataConfig",
    "EvaluationBatches",
    "Loader",
    "evaluation_batches",
    "load_tokenizer",
    "make_loader",
    "merge_states",
    "train_sentencepiece",
]
