from perceiver_ar_jax.model.cache import Cache
from perceiver_ar_jax.model.perceiver_ar import PerceiverAR

__all__ = ["Cache", "PerceiverAR"]
