"""Attention: implementations behind one dispatch, and the merge of what they give.

Every latent sees the whole prefix, and the latents see each other causally. So the hybrid layer is
attention to the prefix without a causal mask, and square causal attention, joined by `merge`. An
implementation is a file with a function

    attend(q_BLNH, k_BKNH, v_BKNH, visibility, dropout) -> out_BLNH, lse_BNL

of scaled and rotated queries, rotated keys, and values. The softmax is taken in float32; `lse` is
the log-sum-exp of the scores of each query. A query that sees no key at all (padding) gives 0 and
has no gradient; its log-sum-exp is MASK_VALUE / 2, to which `merge` gives no weight.
"""

from perceiver_ar_jax.model.attention.dispatch import attend, implementation_for, passes
from perceiver_ar_jax.model.attention.dropout import Dropout
from perceiver_ar_jax.model.attention.merge import Attention, attend_to_nothing, merge
from perceiver_ar_jax.model.attention.visibility import MASK_VALUE, Visibility
from perceiver_ar_jax.model.attention.weights import attention_weights

__all__ = [
    "MASK_VALUE",
    "Attention",
    "Dropout",
    "Visibility",
    "attend",
    "attend_to_nothing",
    "attention_weights",
    "implementation_for",
    "merge",
    "passes",
]
