"""What a run says while it goes: losses and speeds per window of steps, evaluations, samples."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from etils import epath

from perceiver_ar_jax.training.goodput import Goodput
from perceiver_ar_jax.training.metrics import MetricsWriter, Progress, Silent


class NonFiniteError(Exception):
    """The loss or the gradient is no number any more; the message names metric and step."""


class Report:
    """Collects the metrics of steps and writes them every `log_every` steps.

    Metrics are read when the step after theirs is under way, so that reading never keeps the
    device waiting.

    Args:
      workdir: where files are written.
      step: the step that the run goes on from.
      total_steps: the step at which it ends.
      log_every: steps of a window.
      learning_rate: the schedule.
      goodput: takes in the time of each window.
      flops_per_step: of each device, by formula.
      peak_flops: of each device per second; None where it is not known.
      is_silent: whether nothing is written or printed, as in all processes but the first.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        step: int,
        total_steps: int,
        log_every: int,
        learning_rate: optax.Schedule,
        goodput: Goodput,
        flops_per_step: float,
        peak_flops: float | None,
        is_silent: bool = False,
    ):
        self._workdir, self._log_every = workdir, log_every
        self._learning_rate = jax.jit(learning_rate)
        self.goodput = goodput
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._is_silent = is_silent
        self._writer = Silent() if is_silent else MetricsWriter(workdir)
        self._progress = Silent() if is_silent else Progress(step, total_steps)
        self._eval_text = ""
        self._compiled = False
        self._start_window()

    def timed_wait(self, function: Callable[[], Any]) -> Any:
        """Calls the function and counts its time as waiting for data."""
        start = time.monotonic()
        result = function()
        self._waited += time.monotonic() - start
        return result

    def read(self, step: int, metrics: dict[str, Any], read_tokens: int) -> None:
        """Takes in the metrics of a finished step.

        Raises:
          NonFiniteError: if the loss or the gradient norm is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        if self._compiled:  # the first step's time is the compiler's
            self.goodput.productive += now - self._mark
        self._mark = now
        self._losses.append(values["loss"])
        self._read_tokens += read_tokens
        self._trained_tokens += values["tokens"]
        finite = all(map(math.isfinite, values.values()))
        if step % self._log_every == 0 or not finite:
            self._write_window(step, values)
        if not finite:
            name = next(name for name, value in values.items() if not math.isfinite(value))
            raise NonFiniteError(f"{name} is {values[name]} at step {step}")
        if not self._compiled:
            self._compiled = True
            self._start_window()

    def evaluation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Writes the result of an evaluation."""
        self._writer.write(step, {"eval/loss": loss, "eval/bits_per_byte": bits_per_byte})
        self._eval_text = f"  eval {loss:.3f} nats, {bits_per_byte:.3f} bits/byte"
        self._progress.update(step, self._eval_text.strip())
        self._start_window()

    def sample(self, step: int, text: str) -> None:
        """Writes a text that the model made."""
        if not self._is_silent:
            folder = self._workdir / "samples"
            folder.mkdir(exist_ok=True)
            (folder / f"{step:08d}.txt").write_text(text + "\n", encoding="utf-8")
        self._writer.write_text(step, "sample", text)
        self._progress.print(f"sample at step {step}: {text!r}")
        self._start_window()

    def print(self, text: str) -> None:
        """A line of its own."""
        self._progress.print(text)

    def close(self) -> None:
        """Closes files and the live line."""
        self._progress.close()
        self._writer.close()

    def _write_window(self, step, values):
        seconds, steps = time.monotonic() - self._start, len(self._losses)
        trained_per_second = self._trained_tokens / seconds
        flops_per_second = self._flops_per_step * steps / seconds
        line = {
            "train/loss": sum(self._losses) / steps,
            "optim/learning_rate": self._learning_rate_of(step, values),
            "optim/grad_norm": values["grad_norm"],
            "perf/step_ms": 1000 * seconds / steps,
            "perf/tokens_per_sec": self._read_tokens / seconds,
            "perf/trained_tokens_per_sec": trained_per_second,
            "perf/model_tflops_per_device": flops_per_second / 1e12,
            "data/wait_share": self._waited / seconds,
        }
        if self._peak_flops is not None:
            line["perf/mfu"] = flops_per_second / self._peak_flops
        if "skipped" in values:
            line["optim/skipped_steps"] = values["skipped"]
        self._writer.write(step, line | self.goodput.metrics(step))
        loss = f"loss {line['train/loss']:.3f}"
        text = f"{loss}  {trained_per_second:,.0f} trained tokens/s{self._eval_text}"
        self._progress.update(step, text)
        self._start_window()

    def _learning_rate_of(self, step, values):
        taken = step - 1 - int(values.get("skipped", 0))  # the schedule counts what was not skipped
        return float(jax.device_get(self._learning_rate(jax.device_put(taken))))

    def _start_window(self):
        self._start = self._mark = time.monotonic()
        self._waited = 0.0
        self._losses = []
        self._read_tokens = self._trained_tokens = 0
