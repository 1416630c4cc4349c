"""A few training steps of a small model on any mesh, for tests that compare meshes."""

import functools

import jax
import numpy as np
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.data import DataConfig, EvaluationBatches, TokenDocument
from perceiver_ar_jax.parallel import MeshConfig, make_mesh, to_global, use_mesh
from perceiver_ar_jax.training import (
    Batch,
    OptimizerConfig,
    TrainState,
    make_optimizer,
    state_shardings,
    train_step,
)

BATCH_SIZE, STEPS = 8, 3
CONFIG = small_config(
    num_self_attention_layers=3,
    scan_layers=True,
    remat="names",
    cross_attention_dropout=0.5,
    residual_dropout=0.1,
    output_bias=True,
)


def mesh_of(num_devices: int = 8, **axes: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(**{"data": 1} | axes), jax.devices()[:num_devices])


def batches(config=CONFIG) -> list[Batch]:
    """All rows of each step's batch, the same in every process."""
    length = config.max_seq_len
    tokens = [random_tokens(config, length + 1, BATCH_SIZE, seed) for seed in range(STEPS)]
    pads = left_pads(np.arange(BATCH_SIZE) % 5, length)
    return [Batch(x[:, :-1].astype(np.int32), x[:, 1:].astype(np.int32), pads) for x in tokens]


class RandomDocument:
    """A `data.DocumentSource` of one random document."""

    eos_id, pad_id, oddities, fingerprint = 2, 0, (), {}
    documents_are_windows = False

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> TokenDocument:
        tokens = random_tokens(CONFIG, 100 * BATCH_SIZE * CONFIG.max_latents, 1, seed=index)
        return TokenDocument(tokens[0].astype(np.int32), ends_document=True, num_bytes=1)


def evaluation_batches(process_index: int = 0, process_count: int = 1) -> EvaluationBatches:
    """A hundred batches, more than may be in flight at once."""
    return EvaluationBatches(
        DataConfig(
            source="random",
            min_seq_len=1,
            max_seq_len=CONFIG.max_seq_len,
            batch_size=BATCH_SIZE // process_count,
        ),
        RandomDocument(),
        num_latents=CONFIG.max_latents,
        process_index=process_index,
        rows=BATCH_SIZE,
    )


def initial_state(mesh, config=CONFIG) -> TrainState:
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, total_steps=STEPS))
    state = TrainState.create(params=random_params(config), tx=tx)
    state = jax.tree.map(np.asarray, state)
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda at: x[at]),
        state,
        state_shardings(state, mesh),
    )


def train(mesh, config=CONFIG, rows=slice(None), **options) -> tuple[np.ndarray, TrainState]:
    """Losses and gradient norms, (STEPS, 2), and the last state; `rows` are this process's."""
    state = initial_state(mesh, config)
    step = quick_jit(
        functools.partial(
            train_step,
            model=PerceiverAR(config),
            prefix_len=config.max_prefix_len,
            key=jax.random.key(0),
            **options,
        ),
        donate_argnums=0,
        out_shardings=(state_shardings(state, mesh), None),
    )
    metrics = []
    with use_mesh(mesh):
        for batch in batches(config):
            state, last = step(state, to_global(jax.tree.map(lambda x: x[rows], batch), mesh))
            metrics.append((float(last["loss"]), float(last["grad_norm"])))
    return np.array(metrics), state
