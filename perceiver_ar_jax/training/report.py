"""What a run reports: losses and speeds per window of steps, evaluations, samples."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from perceiver_ar_jax.training.goodput import Goodput
from perceiver_ar_jax.training.metrics import MetricsWriter, Progress, Silent
from perceiver_ar_jax.training.optimizer import OptimizerConfig, learning_rate_at
from perceiver_ar_jax.training.timeline import EVALUATION, SAVE, START, STEPS, Timeline
from perceiver_ar_jax.training.trackers import Tracker


class NonFiniteError(Exception):
    """The loss or the gradient is not finite; the message names metric and step."""


class Report:
    """Collects the metrics of steps and writes them every `log_every` steps.

    Metrics are read when the next step is already running, so that reading never keeps the
    device waiting; for the same reason nothing here computes on a device. The time from one
    reading to the next belongs to the step that was read, except for evaluations and saves.

    Args:
      workdir: where files are written.
      timeline: of this start of the run.
      step: the step that the run continues from.
      total_steps: the step at which it ends.
      log_every: steps of a window.
      optimizer: whose learning rate is written.
      goodput: adds up the time of steps.
      flops_per_step: of each device, by formula.
      peak_flops: of each device per second; None where it is not known.
      trackers: that are given what metrics.jsonl is given.
      is_silent: whether nothing is written or printed, as in all processes but the first.
    """

    def __init__(
        self,
        workdir: epath.Path,
        timeline: Timeline,
        *,
        step: int,
        total_steps: int,
        log_every: int,
        optimizer: OptimizerConfig,
        goodput: Goodput,
        flops_per_step: float,
        peak_flops: float | None,
        trackers: Sequence[Tracker] = (),
        is_silent: bool = False,
    ):
        self._workdir, self._log_every, self._total_steps = workdir, log_every, total_steps
        self._timeline, self.goodput = timeline, goodput
        self._optimizer = optimizer
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._is_silent = is_silent
        self._writers = [] if is_silent else [MetricsWriter(workdir), *trackers]
        self._progress = Silent() if is_silent else Progress(step, total_steps)
        self._step, self._last = step, None
        self._start_window()

    def started(self) -> None:
        """What came before, such as opening the data and compiling, was the start."""
        self._timeline.spend(START)

    def timed_wait(self, function: Callable[[], Any]) -> Any:
        """Calls the function and counts its time as waiting for data."""
        start = self._timeline.clock()
        result = function()
        self._waited += self._timeline.clock() - start
        return result

    def read(self, step: int, metrics: dict[str, Any], read_tokens: int, data_retries: int) -> None:
        """Reads the metrics of a finished step.

        `data_retries` counts the repeated requests for data since the start.

        Raises:
          NonFiniteError: if the loss or the gradient norm is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds = self._timeline.spend(STEPS)
        self.goodput.productive += seconds
        self._step = step
        self._seconds += seconds
        self._losses.append(values["loss"])
        self._read_tokens += read_tokens
        self._data_retries = data_retries
        self._trained_tokens += values["tokens"]
        finite = all(map(math.isfinite, values.values()))
        self._last = values
        if step % self._log_every == 0 or step == self._total_steps or not finite:
            self.write_window()
        if not finite:
            name = next(name for name, value in values.items() if not math.isfinite(value))
            raise NonFiniteError(f"{name} is {values[name]} at step {step}")

    def write_window(self) -> None:
        """Writes the steps since the last window, if there are any."""
        step, values, seconds, steps = self._step, self._last, self._seconds, len(self._losses)
        if not steps:
            return
        trained_per_second = self._trained_tokens / seconds
        flops_per_second = self._flops_per_step * steps / seconds
        taken = step - 1 - int(values.get("skipped", 0))  # the schedule counts what was not skipped
        line = {
            "train/loss": sum(self._losses) / steps,
            "optim/learning_rate": learning_rate_at(self._optimizer, taken),
            "optim/grad_norm": values["grad_norm"],
            "perf/step_ms": 1000 * seconds / steps,
            "perf/tokens_per_sec": self._read_tokens / seconds,
            "perf/trained_tokens_per_sec": trained_per_second,
            "perf/model_tflops_per_device": flops_per_second / 1e12,
            "data/wait_share": self._waited / seconds,
            "data/retries": self._data_retries,
        }
        if self._peak_flops is not None:
            line["perf/mfu"] = flops_per_second / self._peak_flops
        if "skipped" in values:
            line["optim/skipped_steps"] = values["skipped"]
        self._write(step, line | self.goodput.metrics(step))
        self._progress.took(steps, seconds)
        loss = f"loss {line['train/loss']:.3f}"
        self._progress.update(step, f"{loss}  {trained_per_second:,.0f} trained tokens/s")
        self._start_window()

    def evaluation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Writes the result of an evaluation, which began with the last step read."""
        seconds = self._timeline.spend(EVALUATION)
        line = {"eval/loss": loss, "eval/bits_per_byte": bits_per_byte}
        self._write(step, line | {"perf/eval_seconds": seconds})
        self._progress.update(step, f"eval {loss:.3f} nats, {bits_per_byte:.3f} bits/byte")

    def sample(self, step: int, text: str) -> None:
        """Writes a text that the model made; its time counts as evaluation."""
        if not self._is_silent:
            folder = self._workdir / "samples"
            folder.mkdir(exist_ok=True)
            (folder / f"{step:08d}.txt").write_text(text + "\n", encoding="utf-8")
        for writer in self._writers:
            writer.write_text(step, "sample", text)
        self._progress.print(f"sample at step {step}:\n{text}")
        self._timeline.spend(EVALUATION)

    def saved(self) -> None:
        """A save has begun, or the run has waited for one to end."""
        self._timeline.spend(SAVE)

    def print(self, text: str) -> None:
        """A line of its own."""
        self._progress.print(text)

    def close(self) -> None:
        """Closes files and the live line."""
        self._progress.close()
        for writer in self._writers:
            writer.close()
        self._timeline.spend(SAVE)
        self.goodput.metrics(self._step)

    def _write(self, step, line):
        for writer in self._writers:
            writer.write(step, line)

    def _start_window(self):
        self._seconds = self._waited = 0.0
        self._losses = []
        self._read_tokens = self._trained_tokens = 0
