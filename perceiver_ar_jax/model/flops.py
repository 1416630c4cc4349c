"""Floating-point operations of the model's matmuls, by formula."""

from perceiver_ar_jax.config import PerceiverARConfig


def forward_flops(config: PerceiverARConfig, prefix_len: int, num_latents: int) -> int:
    """Of one sequence: two per multiplication and addition of every matmul.

    Attention counts all pairs of queries and keys, also those that the causal mask hides. The
    prefix is what prefix dropout leaves of it in training.
    """
    D, L, P = config.num_channels, num_latents, prefix_len
    square = D * D

    def layer(keys, widening_factor):
        query_and_out = 2 * L * square
        keys_and_values = 2 * keys * square
        attention = 2 * L * keys * D
        mlp = 2 * L * widening_factor * square
        return 2 * (query_and_out + keys_and_values + attention + mlp)

    hybrid = layer(P + L, config.cross_attention_widening_factor)
    latent = layer(L, config.self_attention_widening_factor)
    head = 2 * L * D * config.vocab_size
    return hybrid + config.num_self_attention_layers * latent + head


def training_flops(config: PerceiverARConfig, prefix_len: int, num_latents: int) -> int:
    """Of one sequence, forward and backward; what is computed again for memory does not count."""
    kept = prefix_len - int(prefix_len * config.cross_attention_dropout)
    return 3 * forward_flops(config, kept, num_latents)
