import jax
import jax.numpy as jnp
from flax import linen as nn

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model import latent_windows, streamed_prefix
from perceiver_ar_jax.model.cache import Cache, LayerCache
from perceiver_ar_jax.model.inputs import Inputs
from perceiver_ar_jax.model.layers import (
    CrossAttentionLayer,
    Embedding,
    LayerNorm,
    SelfAttentionLayer,
    embed,
)
from perceiver_ar_jax.model.positions import rotation
from perceiver_ar_jax.model.streamed_prefix import PrefixParams
from perceiver_ar_jax.parallel import has_context, remat_in_use

# What each kind of remat keeps for the backward pass. "names": results of matmuls, but no attention
# weights. Attention to a streamed prefix is never computed twice: it costs a pass over the prefix.
KEPT_NAMES = {
    "full": ("streamed_prefix",),
    "names": (
        "statistics",
        "qkv",
        "attention_out",
        "attention_residual",
        "mlp_up",
        "streamed_prefix",
    ),
}


class PerceiverAR(nn.Module):
    """Perceiver AR: the last n tokens of a sequence, as latents, read all m + n of them.

    The first layer attends from the latents to prefix and latents, the others to the latents only;
    both causally. `model.apply({"params": params}, tokens_BS, prefix_len=m)` gives the logits of
    the latents. Training mode is `deterministic=False` with `rngs={"dropout": key}`.

    Source: Hawthorne et al. 2022 (arXiv 2202.07765); `CausalSequenceModel` of perceiver-io 0.11,
    whose results these are, but for padding that reaches the latents: it leaks there, not here.
    """

    config: PerceiverARConfig

    def setup(self):
        config = self.config
        self.token_embedding = Embedding(config.vocab_size, config)
        if config.abs_pos_emb:
            self.position_embedding = Embedding(config.max_seq_len, config)
        self.cross_attention = CrossAttentionLayer(config)
        self.self_attention = [
            SelfAttentionLayer(config) for _ in range(config.num_self_attention_layers)
        ]
        if config.output_norm:
            self.out_norm = LayerNorm(config)
        if config.output_bias:
            zeros = nn.initializers.zeros_init()
            shape, dtype = (config.vocab_size,), jnp.dtype(config.param_dtype)
            self.output_bias = self.param("output_bias", zeros, shape, dtype)

    def __call__(
        self,
        tokens_BS: jax.Array,
        prefix_len: int,
        pad_mask: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits of the latents, (B, L, V) float32 with L = S - prefix_len.

        Args:
          tokens_BS: token ids, (B, S) with S at most max_seq_len, padded on the left.
          prefix_len: how many of the S positions are prefix, a Python int.
          pad_mask: (B, S), True at pads; None where nothing is padded.
          segment_ids: (B, S), which document each token belongs to. Attention then stays inside a
            document, and its positions begin at 0: each gives what it would give alone.
          deterministic: False drops prefix positions, attention weights and branches as configured.

        Raises:
          ValueError: if a length is out of range, in the reference's words.
        """
        hidden_BLD = self.hidden(
            tokens_BS,
            prefix_len,
            pad_mask,
            segment_ids=segment_ids,
            deterministic=deterministic,
        )
        return self.logits(hidden_BLD)

    def hidden(
        self,
        tokens_BS: jax.Array,
        prefix_len: int,
        pad_mask: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        num_windows: int = 1,
    ) -> jax.Array:
        """What the head reads, (B, S - prefix_len, D); arguments as in `__call__`.

        With `num_windows` the S - prefix_len latents are so many windows of max_latents, each of
        which gives what it gives as the latents of a sequence that ends with it.
        """
        inputs = Inputs.of(tokens_BS, pad_mask, segment_ids)
        x_BLD, *inner = self._first_layer(inputs, prefix_len, num_windows, deterministic)
        x_BLD = self._layers(x_BLD, *inner, deterministic)
        return latent_windows.as_sequences(self._normed(x_BLD), num_windows)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head, tied to the token embedding: (..., D) to (..., V) float32."""
        logits = self.token_embedding.products(hidden)
        return logits + self.output_bias if self.config.output_bias else logits

    def hidden_states(
        self,
        tokens_BS: jax.Array,
        prefix_len: int,
        pad_mask: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """The latents as embedded and after each layer, (B, L, D) float32; args as in `__call__`.

        The hybrid layer's output is the second. The last one has not been through the final norm
        that `output_norm` adds; `hidden` gives what the head reads.
        """
        inputs = Inputs.of(tokens_BS, pad_mask, segment_ids)
        x_BLD, rotation_BL, visible = self._first_layer(inputs, prefix_len, 1, True)
        states = [self._embed(inputs.split(prefix_len)[1]), x_BLD]
        for index, layer in enumerate(self.self_attention):
            x_BLD, _ = layer(x_BLD, self._rotation_of(index, rotation_BL), visible)
            states.append(x_BLD)
        return tuple(states)

    def attention_maps(
        self,
        tokens_BS: jax.Array,
        prefix_len: int,
        pad_mask: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """What each latent reads, layer by layer: (B, N, L, K) float32; args as in `__call__`.

        In the hybrid layer K is S, prefix and latents; in all others it is L. The weights of a head
        sum to 1 over K; a latent that is a pad may see nothing and then has 0. The first map takes
        4·B·N·L·S bytes, and the keys of a prefix are made at once even where `prefix_chunk` is set.
        """
        latents_BLD, *states = self.hidden_states(
            tokens_BS, prefix_len, pad_mask, segment_ids=segment_ids
        )
        prefix, latents = Inputs.of(tokens_BS, pad_mask, segment_ids).split(prefix_len)
        rotation_BL = rotation(latents.positions_BS, self.config)
        visible = latents.visible_from(latents, causal=True)
        layer, before = self.cross_attention, []
        if prefix_len:
            kv_prefix = self._prefix_keys_values(prefix)
            before = [(kv_prefix.k, prefix.visible_from(latents, causal=False))]
        normed_BLD = layer.q_norm(latents_BLD)
        maps = [layer.attention.weights(normed_BLD, rotation_BL, visible, before)]
        for index, layer in enumerate(self.self_attention):
            normed_BLD = layer.norm(states[index])
            rotation_of_layer = self._rotation_of(index, rotation_BL)
            maps.append(layer.attention.weights(normed_BLD, rotation_of_layer, visible))
        return tuple(maps)

    def prefill(
        self, tokens_BS: jax.Array, prefix_len: int, pad_mask: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads a prompt: hidden states (B, L, D), and a cache that holds just the prompt.

        Keys and values of a streamed prefix exist in the cache alone.
        """
        config, layer = self.config, self.cross_attention
        inputs = Inputs.of(tokens_BS, pad_mask)
        _check_lengths(inputs.length, prefix_len, config)
        prefix, latents = inputs.split(prefix_len)
        rotation_BL = rotation(latents.positions_BS, config)
        visible = latents.visible_from(latents, causal=True)
        attend_prefix = None
        if streamed_prefix.is_streamed(prefix_len, config):
            params = PrefixParams.of(self._tables(), layer)
            cross = streamed_prefix.fill_cache(params, prefix, config, capacity=inputs.length)
            attend_prefix = lambda q_BLNH: streamed_prefix.attend_to_cache(
                q_BLNH, cross, prefix, config
            )
        elif prefix_len:
            kv_prefix = self._prefix_keys_values(prefix)
            cross = LayerCache.of(kv_prefix, config.cache_dtype).padded_to(inputs.length)
            visible_prefix = prefix.visible_from(latents, causal=False)
            attend_prefix = lambda q_BLNH: layer.attention.attend(
                q_BLNH, kv_prefix, visible_prefix, deterministic=True
            )
        x_BLD, kv = layer(self._embed(latents), rotation_BL, visible, attend_prefix)
        cross = cross.write(kv, prefix_len) if prefix_len else LayerCache.of(kv, config.cache_dtype)
        layers = []
        for index, layer in enumerate(self.self_attention):
            x_BLD, kv = layer(x_BLD, self._rotation_of(index, rotation_BL), visible)
            layers.append(LayerCache.of(kv, config.cache_dtype))
        pads_B = jnp.zeros(len(tokens_BS), jnp.int32) if pad_mask is None else pad_mask.sum(1)
        return self._normed(x_BLD), Cache.of_prompt(cross, tuple(layers), pads_B, prefix_len)

    def decode_step(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads one more token per row: its hidden state (B, D), and the cache with it inside.

        A latent that has become prefix keeps the keys and values it was given as a latent.
        Source: `generate(use_cache=True)` of perceiver-io 0.11.
        """
        hidden_B1D, cache = self.decode_steps(tokens_B[:, None], cache)
        return hidden_B1D[:, 0], cache

    def decode_steps(self, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads T tokens per row, 1 to cache.ahead + 1, in one pass: (B, T, D), and the cache.

        Each gives what T calls of `decode_step` give.
        """
        num_tokens = tokens_BT.shape[1]
        positions_BT = cache.length + jnp.arange(num_tokens) - cache.pads_B[:, None]
        x_BTD = embed(self._tables(), tokens_BT, positions_BT)
        rotation_BT = rotation(positions_BT, self.config)
        x_BTD, cross = self.cross_attention.decode_step(
            x_BTD, rotation_BT, cache.cross, *cache.cross_slots_and_mask(num_tokens)
        )
        slots_T, mask_BTK = cache.layer_slots_and_mask(num_tokens)
        layers = []
        for index, layer in enumerate(self.self_attention):
            x_BTD, layer_cache = layer.decode_step(
                x_BTD, self._rotation_of(index, rotation_BT), cache.layers[index], slots_T, mask_BTK
            )
            layers.append(layer_cache)
        cache = cache.replace(cross=cross, layers=tuple(layers), length=cache.length + num_tokens)
        return self._normed(x_BTD), cache

    def newest_attention(self, tokens_B: jax.Array, cache: Cache) -> jax.Array:
        """What the newest token in a cache has read in the hybrid layer: (B, N, K) float32.

        Args:
          tokens_B: that token of each row, whose keys and values the cache holds already.
          cache: as `prefill` and `decode_step` return it.

        Returns:
          The attention weights of each head, which sum to 1 over the columns that the token sees:
          the newest K, oldest first, its own the last. Columns that are empty or pads have 0.
        """
        before = cache.replace(length=cache.length - 1)
        positions_B1 = before.length - cache.pads_B[:, None]
        x_B1D = embed(self._tables(), tokens_B[:, None], positions_B1)
        layer, rotation_B1 = self.cross_attention, rotation(positions_B1, self.config)
        q_B1NH = layer.attention.queries(layer.q_norm(x_B1D), rotation_B1)
        _, mask_B1K = before.cross_slots_and_mask(1)
        weights_BNK = cache.cross.attention_weights(q_B1NH[:, 0], mask_B1K[:, 0])
        return jnp.roll(weights_BNK, -(cache.length % cache.cross.capacity), axis=-1)

    def _prefix_keys_values(self, prefix):
        """What the latents read of a prefix, of all its positions at once."""
        rotation_BP = rotation(prefix.positions_BS, self.config)
        return self.cross_attention.prefix_keys_values(self._embed(prefix), rotation_BP)

    def _first_layer(self, inputs, prefix_len, num_windows, deterministic):
        """The hybrid layer over embedded inputs, each window of latents a row.

        Returns latents (B·W, L, D), and what the layers after it take: their rotation and
        visibility.
        """
        config = self.config
        _check_lengths(inputs.length, prefix_len, config, num_windows)
        if not deterministic and num_windows > 1 and config.cross_attention_dropout:
            raise ValueError(
                f"{num_windows} windows of latents have as many prefixes, and "
                "cross_attention_dropout draws for one: set it to 0"
            )
        if not deterministic and prefix_len and config.cross_attention_dropout:
            kept_BK = _kept_columns(self.make_rng("dropout"), inputs, prefix_len, config)
            prefix_len -= inputs.length - kept_BK.shape[1]
            inputs = inputs.gather(kept_BK)
        prefix, latents = inputs.split(prefix_len)
        windows = latents.in_windows(num_windows)
        rotation_BL = rotation(windows.positions_BS, config)
        visible = windows.visible_from(windows, causal=True)
        streamed = streamed_prefix.is_streamed(prefix_len, config)

        def hybrid(layer, tables, prefix_BPD, latents_BLD):
            def attend_to(q_BLNH, queries, kv, keys):
                visible = keys.visible_from(queries, causal=False)
                return layer.attention.attend(q_BLNH, kv, visible, deterministic=deterministic)

            def keys_values(x_BKD, inputs):
                return layer.prefix_keys_values(x_BKD, rotation(inputs.positions_BS, config))

            before = []
            if streamed:
                before.append(
                    lambda q_BLNH: streamed_prefix.attend(
                        q_BLNH,
                        PrefixParams.of(tables, layer),
                        prefix,
                        latents.segment_ids_BS,
                        config,
                        layer.attention.weights_dropout(deterministic),
                    )
                )
            elif prefix_len:
                kv_prefix = keys_values(prefix_BPD, prefix)
                before.append(lambda q_BLNH: attend_to(q_BLNH, latents, kv_prefix, prefix))
            elif self.is_initializing():
                keys_values(prefix_BPD, prefix)  # makes kv_norm's parameters
            if num_windows > 1:
                kv_earlier = keys_values(latents_BLD, latents)

                def attend_to_earlier(q_BLNH, window):
                    seen = window * windows.length
                    kv = jax.tree.map(lambda x_BKNH: x_BKNH[:, :seen], kv_earlier)
                    queries = latents.columns(seen, windows.length)
                    return attend_to(q_BLNH, queries, kv, latents.columns(0, seen))

                before.append(latent_windows.attend_to_earlier(attend_to_earlier, num_windows))
            return layer(
                latent_windows.as_rows(latents_BLD, num_windows),
                rotation_BL,
                visible,
                latent_windows.attend_before(before, num_windows) if before else None,
                deterministic=deterministic,
            )[0]

        parts = (None, self._embed(latents)) if streamed else self._embed_parts(inputs, prefix_len)
        x_BLD = _remat(nn.remat, hybrid, config)(self.cross_attention, self._tables(), *parts)
        return x_BLD, rotation_BL, visible

    def _layers(self, x_BLD, rotation_BL, visible, deterministic):
        """The self-attention layers without their keys and values: remat, scan, dropout."""

        def decoder(layer, x_BLD, rotation_BL):
            return layer(x_BLD, rotation_BL, visible, deterministic=deterministic)[0]

        split = self.config.num_rotary_layers
        groups = (self.self_attention[:split], rotation_BL), (self.self_attention[split:], None)
        for layers, rotation_of_group in groups:
            if self.config.scan_layers and not self.is_initializing() and len(layers) > 1:
                key = self.make_rng("dropout") if self.has_rng("dropout") else None
                x_BLD = _scan(decoder, layers, x_BLD, rotation_of_group, key, self.config)
                continue
            for layer in layers:
                x_BLD = _remat(nn.remat, decoder, self.config)(layer, x_BLD, rotation_of_group)
        return x_BLD

    def _rotation_of(self, index, rotation_BL):
        return rotation_BL if index < self.config.num_rotary_layers else None

    def _embed_parts(self, inputs, prefix_len):
        """Prefix (B, P, D) and latents (B, L, D)."""
        if has_context(prefix_len):  # each device embeds its own part of the prefix
            return [self._embed(part) for part in inputs.split(prefix_len)]
        # One gather: the gradient of each costs a pass over the whole table.
        x_BSD = self._embed(inputs)
        return x_BSD[:, :prefix_len], x_BSD[:, prefix_len:]

    def _embed(self, inputs):
        return embed(self._tables(), inputs.tokens_BS, inputs.positions_BS)

    def _tables(self):
        """The embeddings of tokens, and of positions if there are any."""
        modules = [self.token_embedding]
        if self.config.abs_pos_emb:
            modules.append(self.position_embedding)
        return tuple(module.embedding for module in modules)

    def _normed(self, x_BLD):
        return self.out_norm(x_BLD) if self.config.output_norm else x_BLD.astype(self.config.dtype)


def init_params(model: PerceiverAR, key: jax.Array) -> dict:
    """Fresh parameters; under `jax.eval_shape`, their shapes alone."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32), prefix_len=0)["params"]


def _check_lengths(length, prefix_len, config, num_windows=1):
    if not 0 < length <= config.max_seq_len:
        raise ValueError(
            f"Input sequence length out of valid range [1..{config.max_seq_len}]: it is {length}"
        )
    if not 0 <= prefix_len < length:
        raise ValueError(f"prefix_len ({prefix_len}) out of valid range [0..{length})")
    if prefix_len > config.max_prefix_len:
        raise ValueError(
            f"prefix_len ({prefix_len}) exceeds max_prefix_len ({config.max_prefix_len})"
        )
    num_latents = length - prefix_len
    if num_windows > 1 and num_latents != num_windows * config.max_latents:
        raise ValueError(
            f"{length} positions with prefix_len {prefix_len} leave {num_latents} latents, "
            f"not {num_windows} windows of max_latents {config.max_latents}"
        )
    if num_windows == 1 and num_latents > config.max_latents:
        raise ValueError(
            f"{length} positions with prefix_len {prefix_len} leave {num_latents} latents; "
            f"the model has at most {config.max_latents} (max_latents)"
        )


def _kept_columns(key, inputs, prefix_len, config):
    """Columns that prefix dropout leaves, in order, (B, K): some of the prefix, all latents.

    Each row keeps exactly P - int(P * rate) prefix columns, drawn without replacement.
    Source: paper, appendix E.2; `PerceiverAR.forward` of perceiver-io.
    """
    batch, num_latents = len(inputs.tokens_BS), inputs.length - prefix_len
    num_kept = prefix_len - int(prefix_len * config.cross_attention_dropout)
    order_BP = jnp.argsort(jax.random.uniform(key, (batch, prefix_len)), axis=1)
    prefix_BK = jnp.sort(order_BP[:, :num_kept], axis=1)
    latents_BL = jnp.broadcast_to(prefix_len + jnp.arange(num_latents), (batch, num_latents))
    return jnp.concatenate([prefix_BK, latents_BL], axis=1)


def _scan(decoder, layers, x_BLD, rotation_BL, key, config):
    """Runs the layers as one scanned body over their parameters, stacked here."""
    unbound = layers[0].clone(parent=None)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(x.variables for x in layers))

    def body(x_BLD, layer_inputs):
        variables, key = layer_inputs
        rngs = {} if key is None else {"dropout": key}
        run = nn.apply(lambda layer, x: decoder(layer, x, rotation_BL), unbound)
        return run(variables, x_BLD, rngs=rngs), None

    keys = None if key is None else jax.random.split(key, len(layers))
    return jax.lax.scan(_remat(jax.checkpoint, body, config), x_BLD, (params, keys))[0]


def _remat(transform, function, config):
    remat = remat_in_use(config.remat)
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT_NAMES[remat])
    return transform(function, policy=policy, prevent_cse=not config.scan_layers)
