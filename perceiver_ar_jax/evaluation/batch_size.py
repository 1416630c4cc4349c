"""How many windows to score at once."""

import jax

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.training.losses import MAX_LOGITS_PER_ROW

ON_CPU = 4  # more windows at once are slower there, as they leave the caches
AT_MOST = 512


def default_batch_size(
    config: PerceiverARConfig, length: int | None = None, device: jax.Device | None = None
) -> int:
    """The windows that fit into half of a device's free memory; 4 on a CPU.

    Args:
      config: of the model.
      length: positions of a window; max_seq_len by default.
      device: JAX's first by default.
    """
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        return ON_CPU
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    fitting = free // 2 // bytes_per_window(config, length or config.max_seq_len)
    return min(max(fitting, 1), AT_MOST)


def bytes_per_window(config: PerceiverARConfig, length: int) -> int:
    """Temporary memory of scoring one window, from above: its largest arrays, in float32."""
    latents, channels = min(length, config.max_latents), config.num_channels
    widening = max(config.cross_attention_widening_factor, config.self_attention_widening_factor)
    logits = max(min(latents * config.vocab_size, MAX_LOGITS_PER_ROW), config.vocab_size)
    scores = config.num_heads * latents * length
    return 4 * (2 * logits + 2 * scores + 6 * length * channels + 2 * widening * latents * channels)
