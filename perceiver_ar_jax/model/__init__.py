"""The model, its caches, and the layout of its parameters on a mesh.

Arrays carry their dimensions as a suffix, one letter each, and einsum specs use the same letters:

    B  batch               N  heads                     V  vocabulary
    S  input positions     H  head width                T  new tokens
    P  prefix positions    R  rotated pairs of a head   W  latent windows
    L  latents             D  channels                  C  positions of one chunk
    K  keys, or cache slots   F  MLP width              M  beams, candidates of a prompt
    E  ids that end a text    1  a dimension of size 1
"""

from perceiver_ar_jax.model.cache import Cache
from perceiver_ar_jax.model.decoding_params import prepare_for_decoding
from perceiver_ar_jax.model.parameter_rules import PARAMETER_RULES, parameter_shardings
from perceiver_ar_jax.model.perceiver_ar import PerceiverAR, init_params

__all__ = [
    "PARAMETER_RULES",
    "Cache",
    "PerceiverAR",
    "init_params",
    "parameter_shardings",
    "prepare_for_decoding",
]
