"""Checkpoints of a run: parameters, optimizer, step and data iterator, written by Orbax.

A step's directory holds the items `params` (alone, so that inference never reads the rest),
`train` (step and optimizer state), `data` (the iterator's state) and `checksums`. Orbax makes a
step's directory appear whole or not at all, but restores flipped bits without a word; so every
leaf's CRC-32 is stored and compared.
"""

import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from perceiver_ar_jax.training.state import TrainState


class CheckpointError(Exception):
    """No checkpoint that can be trusted; the message says where and why."""


class Checkpointer:
    """Saves and restores the steps below one directory; saves run in the background."""

    def __init__(self, directory: str | Path, *, keep_last: int = 2):
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, create=False)
        # Compression would halve the speed, hold copies of the model in memory, and save 8 %.
        arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
        json = ocp.JsonCheckpointHandler()
        handlers = {"params": arrays, "train": arrays, "data": json, "checksums": json}
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def save(self, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts to save; an error of the save before it is raised here."""
        self._manager.check_for_errors()
        train = {"step": state.step, "opt_state": state.opt_state}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(state.params),
                train=ocp.args.PyTreeSave(train),
                data=ocp.args.JsonSave(data_state),
                checksums=ocp.args.JsonSave(
                    {"params": checksums(state.params), "train": checksums(train)}
                ),
            ),
        )

    def save_params(self, params: Any) -> None:
        """Saves parameters alone, as step 0: what a converted checkpoint has."""
        self._manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params),
                checksums=ocp.args.JsonSave({"params": checksums(params)}),
            ),
        )

    def steps(self) -> list[int]:
        """Steps that are there, oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any], list[str]]:
        """The newest intact step, as `like` is shaped and sharded.

        Newer steps that are damaged are put aside as `<step>.damaged`, so that the run can save
        those steps again.

        Returns:
          The state, the data iterator's state, and a line for each newer step that was skipped.

        Raises:
          CheckpointError: if no step is intact.
        """
        train = {"step": like.step, "opt_state": like.opt_state}
        step, restored, skipped = self._newest_intact({"params": like.params, "train": train})
        for damaged in (newer for newer in self.steps() if newer > step):
            (self.directory / str(damaged)).rename(self.directory / f"{damaged}.damaged")
        self._manager.reload()
        data = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
        state = like.replace(params=restored["params"], **restored["train"])
        return state, data["data"], skipped

    def restore_params(self, like: Any) -> tuple[Any, int, list[str]]:
        """Parameters of the newest intact step, that step, and a line for each one skipped.

        Raises:
          CheckpointError: if no step is intact.
        """
        step, restored, skipped = self._newest_intact({"params": like})
        return restored["params"], step, skipped

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises what went wrong."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, then lets go of threads."""
        self.wait()
        self._manager.close()

    def _newest_intact(self, like):
        skipped = []
        for step in reversed(self.steps()):
            try:
                return step, self._restore_step(step, like), skipped
            except Exception as error:  # Orbax and TensorStore raise what they like
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                skipped.append(f"step {step} in {self.directory} is damaged: {reason}")
        reasons = "; ".join(skipped) or "there is no committed step"
        raise CheckpointError(f"no intact checkpoint in {self.directory}: {reasons}")

    def _restore_step(self, step, like):
        stored = self._manager.restore(
            step, args=ocp.args.Composite(checksums=ocp.args.JsonRestore())
        )["checksums"]
        restored = {name: self._restore_item(step, name, item) for name, item in like.items()}
        for name in like:
            expected, actual = stored[name], checksums(restored[name])
            differing = sorted(path for path in actual if expected.get(path) != actual[path])
            if differing:
                raise CheckpointError(f"checksum mismatch in {name}: {', '.join(differing[:3])}")
        return restored

    def _restore_item(self, step, name, like):
        """Restores one top-level part after the other: Orbax holds twice what it restores."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        restored = {}
        for key, part in like.items():
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here
                ),
                {key: part},
            )
            arguments = ocp.args.PyTreeRestore(
                abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,
            )
            item = self._manager.restore(step, args=ocp.args.Composite(**{name: arguments}))
            restored[key] = item[name][key]
        return restored


def checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of each leaf's bytes, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _crc(leaf) for path, leaf in leaves
    }


def _crc(leaf) -> int:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        # Spread over processes: each gets the whole of it, one leaf at a time.
        replicated = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
        leaf = jax.jit(lambda x: x, out_shardings=replicated)(leaf)
    return zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).view(np.uint8).reshape(-1))
