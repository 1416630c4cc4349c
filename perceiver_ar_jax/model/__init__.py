from perceiver_ar_jax.model.cache import Cache
from perceiver_ar_jax.model.decoding_params import prepare_for_decoding
from perceiver_ar_jax.model.perceiver_ar import PerceiverAR, init_params

__all__ = ["Cache", "PerceiverAR", "init_params", "prepare_for_decoding"]
