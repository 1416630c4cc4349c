import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.model import perceiver_ar
from perceiver_ar_jax.model.inputs import Inputs

PREFIX_LEN, LENGTH = 7, 12


def logits(config, pad_mask=None):
    """In evaluation mode, of fixed tokens and parameters."""
    run = quick_jit(lambda: apply(config, pad_mask))
    return np.asarray(run())


def training_logits(config, pad_mask=None, seeds=(1,)):
    """In training mode, (number of seeds, B, L, V)."""
    run = quick_jit(lambda key: apply(config, pad_mask, deterministic=False, rngs={"dropout": key}))
    return np.stack([run(jax.random.key(seed)) for seed in seeds])


def apply(config, pad_mask, **mode):
    tokens = random_tokens(config, LENGTH, batch=3)
    variables = {"params": random_params(config)}
    return PerceiverAR(config).apply(variables, tokens, PREFIX_LEN, pad_mask, **mode)


def kept_columns(rate, prefix_len, seed=0, batch=4000, latents=3):
    config = small_config(cross_attention_dropout=rate)
    inputs = Inputs.of(np.zeros((batch, prefix_len + latents), np.int32))
    key = jax.random.key(seed)
    return np.asarray(perceiver_ar._kept_columns(key, inputs, prefix_len, config))


@pytest.mark.parametrize(
    "rate", ["cross_attention_dropout", "post_attention_dropout", "residual_dropout"]
)
def test_dropout_acts_in_training_only_and_differently_for_each_key(rate):
    config = small_config(**{rate: 0.5})
    exact = logits(config)
    np.testing.assert_array_equal(exact, logits(small_config()))
    first, again, other = training_logits(config, seeds=(1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - exact).max() > 1e-3
    assert np.abs(first - other).max() > 1e-3


def test_training_mode_without_dropout_needs_no_key_and_changes_nothing():
    config = small_config()
    trained = quick_jit(lambda: apply(config, None, deterministic=False))()
    np.testing.assert_array_equal(trained, logits(config))


@pytest.mark.parametrize(
    "rate, prefix_len", [(0.5, 1), (1.0, 1), (0.3, 7), (0.1, 10), (0.99, 10), (1.0, 10)]
)
def test_prefix_dropout_keeps_an_exact_count_in_order_and_all_latents(rate, prefix_len):
    columns_BK = kept_columns(rate, prefix_len, batch=50)
    num_kept = prefix_len - int(prefix_len * rate)
    assert columns_BK.shape == (50, num_kept + 3)
    assert (np.diff(columns_BK, axis=1) > 0).all()
    assert (columns_BK[:, :num_kept] < prefix_len).all()
    assert (columns_BK[:, num_kept:] == prefix_len + np.arange(3)).all()


def test_prefix_dropout_keeps_every_column_equally_often():
    columns_BK = kept_columns(0.5, prefix_len=8)[:, :4]
    share = np.bincount(columns_BK.reshape(-1), minlength=8) / len(columns_BK)
    np.testing.assert_allclose(share, 0.5, atol=0.04)
    pairs = {tuple(row) for row in columns_BK}
    assert len(pairs) == 70  # every choice of 4 out of 8


@pytest.mark.parametrize("pad_mask", [None, left_pads([0, 3, 6], LENGTH)], ids=["full", "padded"])
def test_prefix_dropout_gives_the_logits_of_the_columns_it_kept(monkeypatch, pad_mask):
    config = small_config(cross_attention_dropout=0.4)
    columns_BK = kept_columns(0.4, PREFIX_LEN, seed=5, batch=3, latents=LENGTH - PREFIX_LEN)
    monkeypatch.setattr(perceiver_ar, "_kept_columns", lambda *_: jnp.asarray(columns_BK))
    dropped = training_logits(config, pad_mask)[0]

    kept_BP = (columns_BK[:, :, None] == np.arange(PREFIX_LEN)).any(1)
    visible_from = Inputs.visible_from

    def hide(inputs, latents, *, causal):
        visible = visible_from(inputs, latents, causal=causal)
        if causal:
            return visible
        pads_BP = False if visible.pad_mask_BK is None else visible.pad_mask_BK
        return visible.replace(pad_mask_BK=pads_BP | ~kept_BP)

    monkeypatch.setattr(Inputs, "visible_from", hide)
    np.testing.assert_allclose(dropped, logits(config, pad_mask), rtol=0, atol=2e-6)


def test_residual_dropout_of_everything_leaves_the_embeddings():
    config = small_config(residual_dropout=1.0, output_norm=False, output_bias=False)
    tokens, params = random_tokens(config, LENGTH, batch=3), random_params(config)
    table_VD = params["token_embedding"]["embedding"]
    embedded = table_VD[tokens] + params["position_embedding"]["embedding"][:LENGTH]
    expected = embedded[:, PREFIX_LEN:] @ table_VD.T
    np.testing.assert_allclose(training_logits(config)[0], expected, rtol=0, atol=1e-5)


def test_attention_dropout_of_everything_leaves_each_latent_its_own_token():
    config = small_config(post_attention_dropout=1.0)
    tokens = random_tokens(config, LENGTH)
    others = np.concatenate([(tokens[:, :-1] + 1) % config.vocab_size, tokens[:, -1:]], axis=1)
    run = functools.partial(PerceiverAR(config).apply, {"params": random_params(config)})
    rngs = {"dropout": jax.random.key(0)}
    first, second = quick_jit(
        lambda: [run(t, PREFIX_LEN, deterministic=False, rngs=rngs) for t in (tokens, others)]
    )()
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first[:, -1], second[:, -1])
    assert (first[:, :-1] != second[:, :-1]).any(-1).all()


def test_what_is_computed_again_drops_the_same():
    config = small_config(
        num_self_attention_layers=1,
        cross_attention_dropout=0.3,
        post_attention_dropout=0.2,
        residual_dropout=0.2,
    )
    tokens, params = random_tokens(config, LENGTH), random_params(config)

    def gradients(remat):
        model = PerceiverAR(config.replace(remat=remat))

        def loss(params):
            rngs = {"dropout": jax.random.key(3)}
            logits = model.apply(
                {"params": params}, tokens, PREFIX_LEN, deterministic=False, rngs=rngs
            )
            return (logits**2).mean()

        return quick_jit(jax.grad(loss))(params)

    expected = gradients("none")
    for remat in ("full", "names"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients(remat), expected
        )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_layers_drop_differently_from_each_other(scan_layers):
    config = small_config(
        num_self_attention_layers=3,
        num_self_attention_rotary_layers=0,
        residual_dropout=0.5,
        scan_layers=scan_layers,
        output_norm=False,
    )
    params = jax.tree.map(np.zeros_like, random_params(config))
    for layer in range(3):  # attention adds 1 to every channel, the MLP nothing
        parts = params[f"self_attention_{layer}"]
        parts["norm"]["bias"][:] = 1
        for projection in ("v_proj", "o_proj"):
            parts["attention"][projection]["kernel"][:] = np.eye(config.num_channels)
    run = functools.partial(PerceiverAR(config).apply, deterministic=False, method="hidden")
    hidden_BLD = quick_jit(run, static_argnums=2)(
        {"params": params},
        random_tokens(config, LENGTH, batch=16),
        PREFIX_LEN,
        rngs={"dropout": jax.random.key(0)},
    )
    added, counts = np.unique(hidden_BLD, return_counts=True)
    assert added.tolist() == [0, 2, 4, 6]  # 1 / 0.5 for each of three layers, or 0
    np.testing.assert_allclose(counts / hidden_BLD.size, [1 / 8, 3 / 8, 3 / 8, 1 / 8], atol=0.06)
