"""The training step of a run, traced for a mesh: what the loop runs and compile_ahead measures."""

import functools

import jax
from jax.sharding import Mesh

from perceiver_ar_jax.model import PerceiverAR, init_params
from perceiver_ar_jax.parallel import batch_sharding, use_mesh
from perceiver_ar_jax.run_config import RunConfig
from perceiver_ar_jax.training import Batch, TrainState, make_optimizer, state_shardings, train_step

_optimizer = functools.cache(make_optimizer)  # states are equal only if they share the object


def fresh_state(run: RunConfig, params=None) -> TrainState:
    """The state before the first step, with the given parameters or newly drawn ones."""
    if params is None:
        params = init_params(PerceiverAR(run.model), jax.random.key(run.seed))
    return TrainState.create(params=params, tx=_optimizer(run.optimizer), ema_decay=run.ema_decay)


def abstract_state(run: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; the devices of the mesh need not exist.

    Raises:
      ValueError: a dimension does not divide among the devices of its axis.
    """
    shapes = _shapes(run)
    return jax.tree.map(_placed, shapes, state_shardings(shapes, mesh))


def lower_train_step(run: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The step as `step(state, batch) -> (state, metrics)`; it donates the state.

    Raises:
      ValueError: a dimension does not divide among the devices of its axis.
    """
    state = abstract_state(run, mesh)
    step = functools.partial(
        train_step,
        model=PerceiverAR(run.model),
        prefix_len=run.prefix_len,
        key=jax.random.key(run.seed),
        microbatches=run.microbatches,
    )
    # The state leaves as it came in, whatever the compiler would prefer.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    with use_mesh(mesh):
        return jitted.lower(state, _abstract_batch(run, mesh))


@functools.cache
def _shapes(run):
    return jax.eval_shape(functools.partial(fresh_state, run))


def _abstract_batch(run, mesh):
    with_segment_ids = run.data.respect_documents
    batch = Batch.abstract(run.batch_size, run.model.max_seq_len, with_segment_ids=with_segment_ids)
    return jax.tree.map(lambda leaf: _placed(leaf, batch_sharding(mesh)), batch)


def _placed(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
