"""Floating-point operations of the model's matmuls, by formula."""

from perceiver_ar_jax.config import PerceiverARConfig


def forward_flops(
    config: PerceiverARConfig, prefix_len: int, num_latents: int, num_windows: int = 1
) -> int:
    """Of one sequence: two per multiplication and addition of every matmul.

    Attention counts all pairs of queries and keys, also those that the causal mask hides. The
    prefix is what prefix dropout leaves of it in training. `num_latents` are those of one window;
    a window reads all windows before it as prefix.
    """
    D, L, P, W = config.num_channels, num_latents, prefix_len, num_windows
    square = D * D

    def layer(keys, pairs, widening_factor):
        query_and_out = 2 * W * L * square
        keys_and_values = 2 * keys * square
        attention = 2 * pairs * D
        mlp = 2 * W * L * widening_factor * square
        return 2 * (query_and_out + keys_and_values + attention + mlp)

    own_pairs = W * L * L
    earlier_pairs = W * L * P + L * L * (W * (W - 1) // 2)
    keys_of_prefix = P + (W - 1) * L
    hybrid = layer(
        keys_of_prefix + W * L,
        earlier_pairs + own_pairs,
        config.cross_attention_widening_factor,
    )
    latent = layer(W * L, own_pairs, config.self_attention_widening_factor)
    head = 2 * W * L * D * config.vocab_size
    return hybrid + config.num_self_attention_layers * latent + head


def training_flops(
    config: PerceiverARConfig, prefix_len: int, num_latents: int, num_windows: int = 1
) -> int:
    """Of one sequence, forward and backward; what is computed again for memory does not count."""
    kept = prefix_len - int(prefix_len * config.cross_attention_dropout)
    return 3 * forward_flops(config, kept, num_latents, num_windows)
