import dataclasses
import math

import optax

from perceiver_ar_jax.training.spikes import skip_spikes


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; the defaults are those of perceiver-io's C4 run.

    The learning rate rises linearly from 0 at step 0 to `learning_rate` at step `warmup_steps`,
    then decays along a cosine to `min_fraction` of it at step `total_steps`, and stays constant.

    Raises:
      ValueError: at construction; one message lists all problems.
    """

    learning_rate: float = 3e-4
    warmup_steps: int = 1000
    total_steps: int = 50_000
    min_fraction: float = 0.1
    weight_decay: float = 0.01  # on every parameter, as in the reference
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0  # global norm of all gradients; 0: no clipping
    skip_spikes: bool = False  # skip updates whose loss or gradient norm is an outlier
    spike_window: int = 100  # recent steps that define what is normal
    spike_threshold: float = 6.0  # standard deviations above their mean

    def __post_init__(self):
        problems = []
        if self.learning_rate <= 0:
            problems.append(f"learning_rate must be positive, not {self.learning_rate}")
        if not 0 <= self.warmup_steps <= self.total_steps or self.total_steps < 1:
            problems.append(
                f"warmup_steps {self.warmup_steps} must be between 0 and total_steps "
                f"{self.total_steps}"
            )
        for name in ("weight_decay", "clip_norm", "eps"):
            if getattr(self, name) < 0:
                problems.append(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("min_fraction", "b1", "b2"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if self.spike_window < 2 or self.spike_threshold <= 0:
            problems.append("spike_window must be at least 2 and spike_threshold positive")
        if problems:
            raise ValueError("OptimizerConfig: " + "; ".join(problems))


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of each step. Source: `CosineWithWarmupLR` of perceiver-io."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.total_steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.min_fraction,
    )


def learning_rate_at(config: OptimizerConfig, step: int) -> float:
    """`learning_rate_schedule` on the host, so that a log line never waits for a device."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    decay_steps = max(config.total_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / decay_steps, 1.0)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.min_fraction + (1 - config.min_fraction) * cosine)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; with `skip_spikes`, no update at a spike."""
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate_schedule(config),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )
    if not config.skip_spikes:
        return tx
    return skip_spikes(tx, window=config.spike_window, threshold=config.spike_threshold)
