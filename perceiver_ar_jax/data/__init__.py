from perceiver_ar_jax.data.config import DataConfig
from perceiver_ar_jax.data.documents import DocumentSource, TokenDocument
from perceiver_ar_jax.data.evaluation_batches import EvaluationBatches, evaluation_batches
from perceiver_ar_jax.data.loader import Loader, make_loader, merge_states

__all__ = [
    "DataConfig",
    "DocumentSource",
    "EvaluationBatches",
    "Loader",
    "TokenDocument",
    "evaluation_batches",
    "make_loader",
    "merge_states",
]
