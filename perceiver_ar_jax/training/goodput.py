"""How much of a run's time went into steps that count, over all its starts."""

import json

from etils import epath

from perceiver_ar_jax.training.timeline import Timeline


class Goodput:
    """Adds up the time of steps, and the time that the run's processes were alive.

    Steps done after the checkpoint that a run continues from are lost: their time counts as alive,
    but as productive only when they are done again.

    Args:
      file: where it is kept from one start to the next; None keeps nothing.
      timeline: of this start.
      step: the step that the run continues from.
      productive: seconds of productive steps until then, as the checkpoint says.
    """

    def __init__(
        self, file: epath.Path | None, timeline: Timeline, *, step: int, productive: float
    ):
        before = {"step": step, "alive_seconds": 0.0, "lost_steps": 0, "starts": 0}
        if file is not None and file.is_file():
            before |= json.loads(file.read_text())
        self._file, self._timeline = file, timeline
        self._alive_before = before["alive_seconds"]
        self.productive = productive
        self.lost_steps = before["lost_steps"] + max(0, before["step"] - step)
        self.starts = before["starts"] + 1

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics at a step; keeps them for the next start."""
        alive = self._alive_before + self._timeline.total
        if self._file is not None:
            state = {
                "step": step,
                "alive_seconds": alive,
                "lost_steps": self.lost_steps,
                "starts": self.starts,
                "seconds_of_this_start": self._timeline.seconds,
            }
            new = self._file.with_suffix(".new")  # so that a kill leaves the old or the new
            new.write_text(json.dumps(state) + "\n")
            new.replace(self._file)
        return {"perf/goodput": self.productive / alive, "perf/lost_steps": self.lost_steps}
