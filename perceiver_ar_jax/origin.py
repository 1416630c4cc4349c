"""Where the first state of a run comes from: a checkpoint, given weights, or a random seed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from perceiver_ar_jax.lowering import abstract_state, fresh_state
from perceiver_ar_jax.parallel import on_first
from perceiver_ar_jax.pretrained import load_pretrained
from perceiver_ar_jax.run_config import RunConfig
from perceiver_ar_jax.tokenizers import Tokenizer
from perceiver_ar_jax.training import TrainState
from perceiver_ar_jax.training.checkpoint import Checkpointer
from perceiver_ar_jax.workdir import check_same_model, check_same_run


class Origin(NamedTuple):
    """What a run starts from: the newest step of a workdir, `params`, or neither."""

    workdir: epath.Path | None = None
    params: Any = None
    rotary_inv_freq: tuple[float, ...] | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the first weights were trained, rather than drawn at random."""
        return self.workdir is not None or self.params is not None


def find_origin(
    run: RunConfig,
    workdir: epath.Path,
    own_steps: Sequence[int],
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> Origin:
    """The workdir if it has steps, otherwise `resume_from` or `init_from`; reads only.

    All processes must call it. `say` prints a line.

    Raises:
      ValueError: what is there belongs to another model or tokenizer; says how they differ.
    """
    other = epath.Path(run.resume_from) if run.resume_from else None
    if own_steps:
        other = workdir
    if other is not None:
        frequencies = on_first(lambda: check_same_run(other, run.model, tokenizer))
        return Origin(workdir=other, rotary_inv_freq=frequencies and tuple(frequencies))
    if run.init_from:
        return _given_weights(run, tokenizer, say)
    return Origin()


def first_state(
    run: RunConfig, mesh: jax.sharding.Mesh, origin: Origin, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state, born sharded, and what the checkpoint says of the run, if there is one.

    Raises:
      CheckpointError: the workdir has checkpoints, but none is intact.
      ValueError: the checkpoint is of another model or optimizer.
    """
    like = abstract_state(run, mesh)
    if origin.workdir is not None:
        state, run_state, skipped = checkpointer.restore(like)
        return state, run_state | {"skipped": skipped}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    if origin.params is None:
        return jax.jit(lambda: fresh_state(run), out_shardings=shardings)(), None
    params = jax.tree.map(_spread, origin.params, shardings.params)
    create = jax.jit(lambda params: fresh_state(run, params), out_shardings=shardings)
    return create(params), None


def _given_weights(run, tokenizer, say):
    given = load_pretrained(run.init_from)
    check_same_model(run.init_from, given.config, run.model)
    theirs = given.tokenizer
    if theirs is not None and theirs.sha256 != tokenizer.sha256 and not run.data.allow_change:
        raise ValueError(
            f"the tokenizer of {run.init_from} (sha256 {theirs.sha256[:12]}…) is not "
            f"data.tokenizer {run.data.tokenizer} (sha256 {tokenizer.sha256[:12]}…): its ids mean "
            "other text. Name the same one, or pass --config.data.allow_change=true"
        )
    dtype = np.dtype(run.model.param_dtype)
    other = {x.dtype.name for x in jax.tree.leaves(given.params) if x.dtype != dtype}
    if other:
        say(f"weights of {run.init_from} are cast from {' and '.join(sorted(other))} to {dtype}")
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), given.params)
    return Origin(params=params, rotary_inv_freq=given.config.rotary_inv_freq)


def _spread(x, sharding):
    """An array that each process holds whole, spread over the mesh."""
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])
