"""Checkpoints of a run: parameters, optimizer, step and data iterator, written by Orbax.

A step's directory holds the items `params` (separate, so that inference never reads the rest),
`ema` if the run averages its weights, `train` (step and optimizer state), `data` (the iterator's
state) and `contents`: shape and checksum of every leaf. Orbax makes a step's directory appear
completely or not at all, but restores flipped bits silently; so restored leaves are compared with
their checksums.
"""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from perceiver_ar_jax.parallel import is_first, on_first
from perceiver_ar_jax.training.checksums import checksums
from perceiver_ar_jax.training.state import TrainState


class CheckpointError(Exception):
    """There is no intact checkpoint; the message says where and why."""

    exit_code = 4  # of a script that it ends


class SaveError(OSError):
    """A checkpoint could not be written; earlier ones are intact."""


class OtherContentsError(ValueError):
    """An intact checkpoint of another model or optimizer."""


class Checkpointer:
    """Saves and restores the steps below one directory; saves run in the background.

    Nothing is written before the first save: reading leaves no trace.

    Args:
      directory: created by the first save; local or, where the process has access, gs://.
      keep_last: how many of the newest steps to keep.
      keep_every: also keep the steps that this divides; 0: none.
      keep_best: also keep the step of the lowest evaluation loss.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        keep_best: bool = False,
    ):
        self.directory = epath.Path(directory)
        if "://" not in str(directory):  # a bucket's name would become a local path
            self.directory = self.directory.resolve()
        self._kept = [checkpoint_managers.LatestN(keep_last)]
        if keep_every:
            self._kept.append(checkpoint_managers.EveryNSteps(keep_every))
        if keep_best:
            best = checkpoint_managers.BestN(get_metric_fn=_eval_loss, reverse=True, n=1)
            self._kept.append(best)
        self._manager = None
        self._read_only()

    def save(
        self, state: TrainState, data_state: dict[str, Any], *, eval_loss: float = math.inf
    ) -> None:
        """Starts a save, which goes on in the background once the one before it is on disk.

        Raises:
          SaveError: this save, or the one before it, failed.
        """
        self._save(int(state.step), _arrays_of(state), data_state, eval_loss)

    def save_params(self, params: Any) -> None:
        """Saves only parameters, as step 0: the form of a converted checkpoint.

        Raises:
          SaveError: the save could not start.
        """
        self._save(0, {"params": params}, {}, math.inf)

    def steps(self) -> list[int]:
        """Committed steps, and one that is being saved; oldest first."""
        return sorted(self._manager.all_steps())

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any], list[str]]:
        """The newest intact step, with the shapes and shardings of `like`.

        Returns:
          The state, the data iterator's state, and a line for each newer step that is damaged.

        Raises:
          CheckpointError: no step is intact.
          OtherContentsError: the newest intact step is of another model or optimizer.
        """

        def read(step, contents):
            items = _arrays_of(like)
            if "ema" not in contents:  # averaging starts now
                items.pop("ema", None)
            restored = self._restore_arrays(step, contents, items)
            data = self._restore_text(step, "data")
            if _crc(data) != contents["data"]:
                raise CheckpointError("checksum mismatch in data")
            return restored, data

        _, (restored, data), skipped = self._newest_intact(read)
        state = like.replace(params=restored["params"], **restored["train"])
        if like.ema_params is not None:
            # A copy: an array that occurs twice in a state cannot be donated.
            ema_params = restored.get("ema") or jax.tree.map(jnp.copy, restored["params"])
            state = state.replace(ema_params=ema_params)
        return state, data, skipped

    def restore_params(self, like: Any, *, step: int | None = None) -> tuple[Any, int, list[str]]:
        """Parameters for inference: the averaged ones, if the run averages them.

        Args:
          like: parameters, or their shapes.
          step: None takes the newest intact step.

        Returns:
          The parameters, their step, and a line for each newer step that is damaged.

        Raises:
          CheckpointError: no step is intact, or not this one.
          OtherContentsError: it is of another model.
        """

        def read(step, contents):
            name = "ema" if "ema" in contents else "params"
            return self._restore_arrays(step, contents, {name: like})[name]

        found, params, skipped = self._newest_intact(read, step)
        return params, found, skipped

    def put_aside_after(self, step: int) -> None:
        """Renames newer steps to `<step>.damaged`, so that a run can save those steps again."""

        def rename():
            for newer in (newer for newer in self.steps() if newer > step):
                folder = self.directory / str(newer)
                folder.rename(self.directory / f"{newer}.damaged")

        on_first(rename)
        self._read_only()

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          SaveError: it failed.
        """
        try:
            self._or_save_error(self._manager.wait_until_finished)
            self._or_save_error(self._manager.check_for_errors)
        except SaveError:  # Orbax's list of steps is no longer what is on disk
            self._or_save_error(self._read_only)
            raise

    def close(self) -> None:
        """Waits, then ends Orbax's threads."""
        self.wait()
        self._manager.close()

    def _save(self, step, arrays, data, eval_loss):
        # Orbax counts a step as saved before it is committed, and skips later saves at or below it.
        self.wait()
        if not self._writes:
            self._or_save_error(self._begin_to_write)
        self._or_save_error(self._check_writable)
        contents = {name: _contents(item) for name, item in arrays.items()}
        contents["data"] = _crc(data)
        items = {name: ocp.args.PyTreeSave(item) for name, item in arrays.items()}
        items["data"] = ocp.args.JsonSave(data)
        items["contents"] = ocp.args.JsonSave({**contents, "crc": _crc(contents)})
        has_begun = self._or_save_error(
            self._manager.save,
            step,
            args=ocp.args.Composite(**items),
            metrics={"eval/loss": eval_loss},
        )
        if not has_begun:
            raise SaveError(
                f"step {step} was not saved in {self.directory}, which has step "
                f"{max(self.steps())} already"
            )

    def _read_only(self):
        """Until the first save: metrics are not read, since a damaged file would stop Orbax."""
        self._open_manager(lightweight_initialize=True)
        self._writes = False

    def _begin_to_write(self):
        def prepare():
            self.directory.mkdir(parents=True, exist_ok=True)
            _drop_unreadable_metrics(self.directory)

        on_first(prepare)
        self._open_manager(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(self._kept),
            best_fn=_eval_loss,
            best_mode="min",
        )
        self._writes = True

    def _open_manager(self, **options):
        if self._manager is not None:
            self._manager.close()
        # Compression would halve the speed, hold copies of the model in memory, and save 8 %.
        arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
        text = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(create=False, **options),
            item_handlers={
                "params": arrays,
                "ema": arrays,
                "train": arrays,
                "data": text,
                "contents": text,
            },
        )

    def _check_writable(self):
        """Orbax would wait for minutes for a directory that cannot be made."""
        if is_first():
            probe = self.directory / "writable"
            probe.write_bytes(b"")
            probe.unlink()

    def _or_save_error(self, function, *args, **options):
        try:
            return function(*args, **options)
        except Exception as error:  # Orbax and TensorStore raise anything
            reason = _first_line(error)
            raise SaveError(f"cannot save a checkpoint in {self.directory}: {reason}") from error

    def _newest_intact(self, read: Callable[[int, dict], Any], step: int | None = None):
        skipped = []
        for candidate in [step] if step is not None else reversed(self.steps()):
            try:
                return candidate, read(candidate, self._restore_contents(candidate)), skipped
            except OtherContentsError:
                raise
            except Exception as error:  # Orbax and TensorStore raise anything
                skipped.append(f"step {candidate} in {self.directory}: {_first_line(error)}")
        missing = "no committed step" if self.directory.is_dir() else "no such directory"
        reasons = "; ".join(skipped) or missing
        raise CheckpointError(f"no intact checkpoint in {self.directory}: {reasons}")

    def _restore_contents(self, step):
        contents = self._restore_text(step, "contents")
        if contents.pop("crc") != _crc(contents):
            raise CheckpointError("checksum mismatch in contents")
        return contents

    def _restore_text(self, step, name):
        arguments = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
        return self._manager.restore(step, args=arguments)[name]

    def _restore_arrays(self, step, contents, items):
        shapes = {(name, *leaf[:2]) for name in items for leaf in contents[name]}
        expected = {(name, *leaf) for name, item in items.items() for leaf in _shapes(item)}
        if shapes != expected:
            differing = sorted(shapes ^ expected)
            lines = (
                f"{name}/{path} {shape} {'here' if (name, path, shape) in expected else 'there'}"
                for name, path, shape in differing[:6]
            )
            raise OtherContentsError(
                f"step {step} in {self.directory} is of another model or optimizer; "
                f"{len(differing)} leaves differ: {', '.join(lines)}"
            )
        restored = {name: self._restore_item(step, name, item) for name, item in items.items()}
        for name, item in restored.items():
            actual = checksums(item)
            wrong = [path for path, _, expected in contents[name] if actual[path] != expected]
            if wrong:
                raise CheckpointError(f"checksum mismatch in {name}: {', '.join(wrong[:3])}")
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


def _arrays_of(state: TrainState) -> dict[str, Any]:
    arrays = {"params": state.params, "train": {"step": state.step, "opt_state": state.opt_state}}
    return arrays if state.ema_params is None else arrays | {"ema": state.ema_params}


def _contents(tree) -> list[list]:
    """Path, shape and checksum of each leaf."""
    values = checksums(tree)
    return [[path, shape, values[path]] for path, shape in _shapes(tree)]


def _shapes(tree) -> list[tuple[str, str]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]",
        )
        for path, leaf in leaves
    ]


def _drop_unreadable_metrics(directory: epath.Path) -> None:
    """Deletes damaged metrics of committed steps.

    Orbax reads the metrics of all steps when it starts to write, and one damaged file would stop
    it. Without them a step counts as none of the best, and is restored all the same.
    """
    for file in directory.glob("*/metrics/metrics"):
        if not file.parent.parent.name.isdigit():  # a save in progress, or one put aside
            continue
        try:
            float(_eval_loss(json.loads(file.read_bytes())))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            file.unlink()


def _eval_loss(metrics) -> float:
    return metrics["eval/loss"]


def _crc(value) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
