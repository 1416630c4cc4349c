"""The thread that runs the model: continuations that wait become batches, which take turns.

A prompt whose scores are wanted takes its turns first, a window each, and then waits for a batch.
"""

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from absl import logging

from perceiver_ar_jax.evaluation.scores import Predictions, predictions_by_window
from perceiver_ar_jax.generation import Generation, Options
from perceiver_ar_jax.generation.options import GREEDY_BELOW
from perceiver_ar_jax.generation.prompt import default_num_latents
from perceiver_ar_jax.pretrained import Pretrained
from perceiver_ar_jax.serving.rows import Row

MAX_JOBS = 4  # that take turns: batches, each with a cache of its own, and prompts to score
# While others run, a row waits so many seconds for more to share its batch: a turn costs little
# more for several rows than for one.
GATHER = 0.2
# Likeliest tokens to keep of each place: always, so that there is one program for all requests.
MAX_ALTERNATIVES = 5


class QueueFull(Exception):
    """No room for more continuations now."""


class Stopped(Exception):
    """The engine works no more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes on."""

    max_batch: int = 8  # continuations that run together, and that one request may ask for
    max_queue: int = 64  # continuations that may wait
    max_tokens: int = 2048  # that a request may ask for

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.max_queue < self.max_batch:
            raise ValueError(f"max_queue={self.max_queue} is less than max_batch={self.max_batch}")


class Engine:
    """Continues rows, in batches of those with the same settings, on a thread of its own.

    Between two turns it looks for new rows and drops jobs that nobody wants.
    """

    def __init__(self, pretrained: Pretrained, limits: Limits):
        self.pretrained, self.limits = pretrained, limits
        self._waiting: collections.deque[Row] = collections.deque()
        self._jobs: collections.deque[_Batch | _Scoring] = collections.deque()
        self.num_tokens = 0  # computed for clients since the start
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Continuations in a batch, and those whose prompt is scored."""
        return sum(not row.done for job in tuple(self._jobs) for row in job.rows)

    @property
    def waiting(self) -> int:
        """Continuations in the queue."""
        return sum(not row.done for row in tuple(self._waiting))

    @property
    def alive(self) -> bool:
        """Whether the thread still works."""
        return self._thread.is_alive()

    def submit(self, rows: Sequence[Row]) -> None:
        """Puts rows into the queue.

        Raises:
          QueueFull: there is no room for all of them.
          Stopped: the server is shutting down.
        """
        with self._changed:
            if self._closed or not self.alive:
                raise Stopped
            if self.waiting + len(rows) > self.limits.max_queue:
                raise QueueFull
            self._waiting.extend(rows)
            self._changed.notify()

    def close(self) -> None:
        """Ends all rows with an error, and the thread after the token it is computing."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)  # it may be compiling

    def _run(self):
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._jobs):
                    self._changed.wait()
                if self._closed:
                    break
                job = self._next_job() if len(self._jobs) < MAX_JOBS else None
            if job:
                self._jobs.append(job)
            if self._jobs:
                self._advance(self._jobs[0])
                self._jobs.rotate(-1)
                while self._jobs and self._jobs[-1].done:
                    job = self._jobs.pop()
                    with self._changed:  # a prompt that was scored
                        self._waiting.extend(row for row in job.rows if not row.done)
        for row in (*self._waiting, *(row for job in self._jobs for row in job.rows)):
            row.fail("the server is shutting down")

    def _advance(self, job):
        try:
            self.num_tokens += job.advance(self.pretrained)
        except Exception as error:  # such as a lack of memory; other jobs may go on
            logging.exception("a job of %d rows failed", len(job.rows))
            for row in job.rows:
                row.fail(f"generation failed: {type(error).__name__}")

    def _next_job(self):
        """For the first row that waits: scoring, or a batch with others of its settings."""
        waiting = [row for row in self._waiting if not row.done]
        rows = waiting[:1]
        if rows and not rows[0].scores_prompt:
            kind = lambda row: (row.settings, row.scores_prompt)
            rows = [row for row in waiting if kind(row) == kind(rows[0])][: self.limits.max_batch]
            waited = time.monotonic() - rows[0].arrived
            if self._jobs and len(rows) < self.limits.max_batch and waited < GATHER:
                rows = []
        self._waiting = collections.deque(row for row in waiting if row not in rows)
        if not rows:
            return None
        return _Scoring(*rows) if rows[0].scores_prompt else _Batch(rows)


class _Scoring:
    """A row whose client wants the scores of its prompt."""

    def __init__(self, row: Row):
        self.rows = [row]
        self._windows: Iterator[Predictions] | None = None

    @property
    def done(self) -> bool:
        (row,) = self.rows
        return row.done or not row.scores_prompt

    def advance(self, pretrained: Pretrained) -> int:
        """One more window of the prompt; no new tokens."""
        (row,) = self.rows
        if self._windows is None:
            self._windows = predictions_by_window(
                pretrained, row.prompt, num_likeliest=MAX_ALTERNATIVES
            )
            row.push_prompt()
        for window in () if self.done else itertools.islice(self._windows, 1):
            for log_prob, *likeliest in zip(*window, strict=True):
                row.push_prompt(log_prob, _pairs(*likeliest))
        return 0


class _Batch:
    def __init__(self, rows: list[Row]):
        self.rows = rows
        self._generation, self._steps = None, None

    @property
    def done(self) -> bool:
        return all(row.done for row in self.rows)

    def advance(self, pretrained: Pretrained) -> int:
        """One more token for each row that wants one; their number."""
        wanted = sum(not row.done for row in self.rows)
        if not wanted:
            return 0
        if self._steps is None:
            self._generation = _generation(pretrained, self.rows)
            self._steps = self._generation.steps()
        step = next(self._steps)
        attention_BK = None
        if self.rows[0].settings.attention:
            attention_BK = self._generation.newest_attention()
        for b, row in enumerate(self.rows):
            row.push(
                int(step.tokens_B[b]),
                step.log_probs_B[b],
                _pairs(step.alternative_ids_BA[b], step.alternative_log_probs_BA[b]),
                None if attention_BK is None else attention_BK[b],
            )
        return wanted


def _pairs(ids_A, log_probs_A):
    return list(zip(ids_A.tolist(), log_probs_A.tolist(), strict=True))


def _generation(pretrained, rows):
    settings, tokenizer = rows[0].settings, pretrained.tokenizer
    # Batches of 1, 2, 4, … rows share compiled programs; the last row fills them.
    size = 1 << (len(rows) - 1).bit_length()
    rows = rows + rows[-1:] * (size - len(rows))
    sampling = {}
    if settings.temperature >= GREEDY_BELOW:
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "rng": jnp.stack([row.key for row in rows]),
        }
    options = Options.of(
        max_new_tokens=max(row.max_tokens for row in rows),
        num_alternatives=min(MAX_ALTERNATIVES, tokenizer.vocab_size),
        policy=settings.policy,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
        **sampling,
    )
    prompts = [row.prompt for row in rows]
    num_latents = settings.num_latents
    if num_latents is None:
        num_latents = default_num_latents(max(map(len, prompts)), pretrained.config)
    return Generation(
        pretrained.model, pretrained.params, prompts, options, num_latents=num_latents
    )


def row_keys(seed: int, count: int) -> list[jax.Array]:
    """The keys with which `generate(..., rng=jax.random.key(seed))` draws so many rows."""
    key = jax.random.key(seed)
    return [jax.random.fold_in(key, i) for i in range(count)]
