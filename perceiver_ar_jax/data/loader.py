import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence

import grain
import numpy as np
from absl import flags

from perceiver_ar_jax.data.config import DataConfig
from perceiver_ar_jax.data.documents import DocumentSource, oddities_of
from perceiver_ar_jax.data.opening import open_weighted_documents
from perceiver_ar_jax.data.rows import pad_rows
from perceiver_ar_jax.data.windows import OrderedBlocks, WindowDataset
from perceiver_ar_jax.tokenizers import Tokenizer


class Loader:
    """Iterates over the batches of one process; its state is small JSON, exact after any batch.

    Batches are dicts of the arrays of `pad_rows`, which `training.Batch` takes as keywords; with
    `segment_ids` under `respect_documents`. S is `max_seq_len`, B `batch_size`; process p has rows
    p * B to (p + 1) * B - 1 of the global batch, which is the same for any number of processes and
    workers.

    Attributes:
      fingerprint: what determines the stream of batches: documents, lengths, seed.
      oddities: documents read since the loader was made, counted by what was wrong with them.
      retries: requests to a bucket that had to be repeated since the loader was made.

    Args:
      documents: what is read, or several sources as (documents, weight): each window comes from one
        of them, and the weights are the shares of windows, up to a factor.
    """

    def __init__(
        self,
        config: DataConfig,
        documents: DocumentSource | Sequence[tuple[DocumentSource, float]],
        *,
        process_index: int,
        process_count: int,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}")
        self._config = config
        self._global_batch = config.batch_size * process_count
        self._first_row = config.batch_size * process_index
        weighted = documents if isinstance(documents, Sequence) else [(documents, 1.0)]
        sources, self._weights = zip(*weighted, strict=True)
        self._pad_id = sources[0].pad_id
        self._sources = [
            OrderedBlocks(
                source,
                num_streams=self._global_batch,
                seed=config.seed,
                shuffle=config.shuffle,
                repeat=config.repeat,
            )
            for source in sources
        ]
        self.fingerprint = _fingerprint(config, weighted, self._sources, self._global_batch)
        self.oddities = dict.fromkeys(oddities_of(sources), 0)
        self.retries = 0
        self._iterator = self._part = None
        self._step = 0
        self._positions = np.zeros((config.batch_size, 3 * len(sources)), np.int64)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = iter(self._parts())
        parts = []
        while sum(len(part["rows"]) for part in parts) < self._config.batch_size:
            part, self._part = self._part or next(self._iterator, None), None
            if part is None:
                break
            if parts and part["step"] != parts[0]["step"]:  # some worker's streams have ended
                self._part = part
                break
            parts.append(part)
        if not parts:
            raise StopIteration
        return self._assemble(parts)

    def get_state(self) -> dict:
        """Where the next batch begins; see `merge_states` for several processes."""
        return {
            "step": self._step,
            "first_row": self._first_row,
            "positions": self._positions.tolist(),
            "fingerprint": self.fingerprint,
        }

    def set_state(self, state: dict, *, allow_other_data: bool = False) -> None:
        """Continues from a state of this process, or from a merged one that covers its rows.

        Raises:
          ValueError: the state does not fit, or belongs to other data or another tokenizer;
            `allow_other_data` permits the latter.
        """
        differences = differing_entries(state["fingerprint"], self.fingerprint)
        if differences and not allow_other_data:
            raise ValueError("the data differs from the checkpoint's: " + "; ".join(differences))
        first = self._first_row - state["first_row"]
        rows = state["positions"][max(first, 0) : first + self._config.batch_size]
        if first < 0 or len(rows) != self._config.batch_size:
            raise ValueError(
                f"the loader's state covers {len(state['positions'])} rows from "
                f"{state['first_row']}, this process needs {self._config.batch_size} from "
                f"{self._first_row}: merge the states of all processes"
            )
        positions = np.array(rows, np.int64)
        if positions.shape != self._positions.shape:
            raise ValueError(
                f"the loader's state has {positions.shape[1]} numbers per row, not "
                f"{self._positions.shape[1]}: other sources, or an older version"
            )
        self.close()
        self._step, self._positions = state["step"], positions

    def close(self) -> None:
        """Stops the worker processes; the next batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = self._part = None

    def _parts(self) -> grain.IterDataset:
        config = self._config
        windows = WindowDataset(
            self._sources,
            weights=self._weights,
            rows=range(self._first_row, self._first_row + config.batch_size),
            positions=self._positions.tolist(),
            step=self._step,
            num_rows=self._global_batch,
            min_seq_len=config.min_seq_len,
            max_seq_len=config.max_seq_len,
            pad_id=self._pad_id,
            seed=config.seed,
            with_segment_ids=config.respect_documents,
        )
        num_workers = min(config.num_workers, config.batch_size)
        if not num_workers:
            return windows
        if not flags.FLAGS.is_parsed():  # Grain reads its flags even without absl's app.run
            flags.FLAGS.mark_as_parsed()
        # Use pipes: blocks of shared memory would leak when a run is killed.
        options = grain.experimental.DatasetOptions(min_shm_size=1 << 62)
        windows = grain.experimental.WithOptionsIterDataset(windows, options)
        return windows.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=_start_worker,
        )

    def _assemble(self, parts: Sequence[dict]) -> dict[str, np.ndarray]:
        config = self._config
        batch = pad_rows(
            config.batch_size,
            config.max_seq_len,
            pad_id=self._pad_id,
            with_segment_ids=config.respect_documents,
        )
        for part in parts:
            rows = part["rows"] - self._first_row
            for name, array in batch.items():
                array[rows] = part[name]
            self._positions[rows] = part["positions"]
            for name, count in zip(self.oddities, part["oddities"], strict=True):
                self.oddities[name] += int(count)
            self.retries += int(part["retries"])
        self._step = int(parts[0]["step"])
        return batch


def make_loader(
    config: DataConfig, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
) -> Loader:
    """Opens the source and returns the training batches of one process.

    Without `repeat`, iteration ends when all streams of this process have ended; the rows of those
    that end earlier are pads.

    Raises:
      ValueError: the data is missing or unreadable; the message says what was found.
    """
    documents = open_weighted_documents(config, tokenizer)
    return Loader(config, documents, process_index=process_index, process_count=process_count)


def merge_states(states: Sequence[dict]) -> dict:
    """Merges the states of all processes at one step into one for any number of processes.

    Raises:
      ValueError: the states belong to different steps or data, or rows are missing.
    """
    states = sorted(states, key=lambda state: state["first_row"])
    merged = {**states[0], "positions": []}
    for state in states:
        if state["first_row"] != len(merged["positions"]):
            raise ValueError(f"no loader state covers row {len(merged['positions'])}")
        if state["step"] != merged["step"]:
            raise ValueError(f"loader states of steps {merged['step']} and {state['step']}")
        differences = differing_entries(merged["fingerprint"], state["fingerprint"])
        if differences:
            raise ValueError("processes read different data: " + "; ".join(differences))
        merged["positions"] += state["positions"]
    return merged


def differing_entries(old: dict, new: dict) -> list[str]:
    """`name: old -> new` for every entry that differs."""
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Leaves signals to the main process, and exits with it, even if it is killed."""
    del worker_index, worker_count
    for number in (signal.SIGINT, signal.SIGTERM):  # both are sent to the whole process group
        signal.signal(number, signal.SIG_IGN)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _fingerprint(config: DataConfig, weighted, ordered, global_batch: int) -> dict:
    sources = [
        {**source.fingerprint, **blocks.fingerprint}
        for (source, _), blocks in zip(weighted, ordered, strict=True)
    ]
    if len(sources) > 1:
        weights = [float(weight) for _, weight in weighted]
        documents = {"sources": sources, "weights": weights}
    else:
        (documents,) = sources
    return {
        **documents,
        "min_seq_len": config.min_seq_len,
        "max_seq_len": config.max_seq_len,
        "seed": config.seed,
        "shuffle": config.shuffle,
        "repeat": config.repeat,
        "respect_documents": config.respect_documents,
        "global_batch_size": global_batch,
    }
