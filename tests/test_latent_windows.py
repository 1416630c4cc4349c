"""Several windows of latents in one step: the mean of what the windows give alone."""

import functools

import jax
import numpy as np
import pytest
from float64_model import float64_logits
from sharded_training import mesh_of
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.model.flops import forward_flops
from perceiver_ar_jax.parallel import replicated, use_mesh
from perceiver_ar_jax.training import Batch
from perceiver_ar_jax.training.step import loss_sum, token_log_probs

L, W = 4, 3
CONFIG = small_config(max_seq_len=17, max_latents=L, abs_pos_emb=True)
PADS = {
    "no pads": None,
    "pads in the prefix": left_pads([0, 3], 17),
    "pads fill a window": left_pads([2, 10], 17),
}
DOCUMENTS = np.array([[1] * 7 + [2] * 6 + [3] * 4, [0] * 3 + [1] * 5 + [2] * 9])


def batch_of(length, pads, segment_ids):
    tokens = random_tokens(CONFIG, 18)
    cut = lambda x: None if x is None else x[:, -length:]
    pads = np.zeros((2, 17), bool) if pads is None else pads
    return Batch(
        tokens=cut(tokens[:, :-1]),
        targets=cut(tokens[:, 1:]),
        pad_mask=cut(pads),
        segment_ids=cut(segment_ids),
    )


def loss_and_gradients(config, prefix_len, batch, weights_BL, sharding=None):
    run = functools.partial(loss_sum, model=PerceiverAR(config), prefix_len=prefix_len)
    inputs = jax.device_put((random_params(config), batch, weights_BL), sharding)
    return quick_jit(jax.value_and_grad(run))(*inputs)


def one_by_one(config, prefix_len, batch):
    """The sum over windows, each the latents of a shorter sequence of its own."""
    total = None
    for window in range(W):
        end = prefix_len + (window + 1) * L
        part = jax.tree.map(lambda x, end=end: x[:, :end], batch)
        weights_BL = part.latent_weights(end - L)
        terms = loss_and_gradients(config, end - L, part, weights_BL)
        total = terms if total is None else jax.tree.map(np.add, total, terms)
    return total


def assert_close(actual, expected):
    def compare(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-6 * np.abs(y).max())

    jax.tree.map(compare, actual, expected)


@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize(
    ("changes", "prefix_len", "segment_ids"),
    [
        ({}, 5, None),
        ({"abs_pos_emb": False}, 0, None),
        ({"attention": "recompute", "remat": "names", "scan_layers": True}, 5, DOCUMENTS),
        ({"prefix_chunk": 2, "remat": "full"}, 5, DOCUMENTS),
    ],
    ids=["plain", "without a prefix", "documents and remat", "streamed"],
)
def test_windows_sum_to_what_each_gives_alone(changes, prefix_len, segment_ids, pads):
    config = CONFIG.replace(**changes)
    batch = batch_of(prefix_len + W * L, PADS[pads], segment_ids)
    weights_BL = batch.latent_weights(prefix_len)
    actual = loss_and_gradients(config, prefix_len, batch, weights_BL)
    assert_close(actual, one_by_one(config, prefix_len, batch))


@pytest.mark.parametrize("pads", list(PADS)[:2])
def test_loss_and_gradients_are_those_of_separate_windows_in_float64(pads):
    batch, params = batch_of(17, PADS[pads], None), jax.device_get(random_params(CONFIG))
    weights_BL = batch.latent_weights(5)
    loss, gradients = loss_and_gradients(CONFIG, 5, batch, weights_BL)
    params = jax.tree.map(np.float64, params)
    np.testing.assert_allclose(loss, float64_loss(params, batch, weights_BL), rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(params)
    for index, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = rng.standard_normal(gradient.shape) / gradient.size**0.5
        along = [
            float64_loss(
                jax.tree.unflatten(tree, [*leaves[:index], leaf, *leaves[index + 1 :]]),
                batch,
                weights_BL,
            )
            for leaf in (leaves[index] + 1e-5 * direction, leaves[index] - 1e-5 * direction)
        ]
        expected = (along[0] - along[1]) / 2e-5
        np.testing.assert_allclose(
            np.vdot(gradient, direction), expected, rtol=1e-5, atol=1e-5 * largest
        )


def float64_loss(params, batch, weights_BL):
    """The sum of the windows' losses, each window's logits from NumPy's own model."""
    total = 0.0
    for window in range(W):
        end = 5 + (window + 1) * L
        logits_BLV = float64_logits(
            params, CONFIG, batch.tokens[:, :end], end - L, batch.pad_mask[:, :end]
        )
        log_probs_BLV = logits_BLV - np.logaddexp.reduce(logits_BLV, -1, keepdims=True)
        targets_BL = batch.targets[:, end - L : end]
        nats_BL = -np.take_along_axis(log_probs_BLV, targets_BL[..., None], -1)[..., 0]
        total += (weights_BL[:, window * L : (window + 1) * L] * nats_BL).sum()
    return total


def test_windows_on_a_mesh_give_the_same():
    batch = batch_of(17, PADS["pads in the prefix"], DOCUMENTS)
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    weights_BL = batch.latent_weights(5)
    expected = loss_and_gradients(CONFIG, 5, batch, weights_BL)
    for config in (CONFIG, CONFIG.replace(prefix_chunk=2, remat="names")):
        mesh = mesh_of(data=2, fsdp=2, tensor=2)
        with use_mesh(mesh):
            actual = loss_and_gradients(config, 5, batch, weights_BL, replicated(mesh))
        assert_close(jax.device_get(actual), expected)


def test_log_probs_of_windows_are_those_of_every_token():
    batch, params = batch_of(17, None, None), random_params(CONFIG)
    run = functools.partial(token_log_probs, model=PerceiverAR(CONFIG), prefix_len=5)
    log_probs_BL = quick_jit(run)(params, batch)
    assert log_probs_BL.shape == (2, W * L)
    last = functools.partial(token_log_probs, model=PerceiverAR(CONFIG), prefix_len=13)
    np.testing.assert_allclose(log_probs_BL[:, -L:], quick_jit(last)(params, batch), atol=1e-5)


def test_latents_that_are_not_whole_windows_are_refused():
    with pytest.raises(ValueError, match="leave 11 latents; the model has at most 4"):
        batch = batch_of(17, None, None)
        loss_and_gradients(CONFIG, 6, batch, batch.latent_weights(6))


def test_prefix_dropout_with_several_windows_is_refused():
    config = CONFIG.replace(cross_attention_dropout=0.5)
    batch = batch_of(17, None, None)
    with pytest.raises(ValueError, match="cross_attention_dropout draws for one: set it to 0"):
        loss_sum(
            random_params(config),
            batch,
            batch.latent_weights(5),
            jax.random.key(0),
            model=PerceiverAR(config),
            prefix_len=5,
        )


def test_windows_take_less_work_than_each_alone():
    alone = sum(forward_flops(CONFIG, 5 + window * L, L) for window in range(W))
    assert forward_flops(CONFIG, 5, L) < forward_flops(CONFIG, 5, L, W) < alone
