import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

REMAT_POLICIES = ("none", "full", "names", "auto")
ATTENTION_IMPLEMENTATIONS = ("auto", "plain", "recompute", "pallas", "cudnn")
DTYPES = ("float32", "bfloat16")

# What a field says of a model. The architecture makes its function, and belongs to its weights; the
# computation may change from one start of a run to the next; training may differ from one run to
# the next that begins with the same weights.
ARCHITECTURE, COMPUTATION, TRAINING = ROLES = ("architecture", "computation", "training")


def _field(role: str, default: Any, **checks) -> Any:
    """A field with its role and its checks.

    `at_least` bounds a whole number, `at_most` a number from 0, `choices` lists what is allowed; a
    boolean needs no check. `optional` allows None, and `ours` says that perceiver-io has no such
    field.
    """
    return dataclasses.field(default=default, metadata={"role": role, **checks})


_architecture = functools.partial(_field, ARCHITECTURE)
_computation = functools.partial(_field, COMPUTATION)
_training = functools.partial(_field, TRAINING)


@dataclasses.dataclass(frozen=True)
class PerceiverARConfig:
    """Describes one Perceiver AR model; frozen, hashable and validated.

    Field names and defaults are those of perceiver-io's `CausalSequenceModelConfig`; its
    `activation_checkpointing=True` is `remat="full"` here. The fields after `init_scale` are ours.

    >>> config = PerceiverARConfig(max_seq_len=1024, max_latents=256)
    >>> config.max_prefix_len, config.replace(num_heads=4).head_dim
    (768, 128)

    Raises:
      ValueError: at construction, naming every problem at once.
    """

    vocab_size: int = _architecture(262, at_least=1)
    max_seq_len: int = _architecture(4096, at_least=1)
    max_latents: int = _architecture(512, at_least=1)
    num_channels: int = _architecture(512, at_least=1)
    num_heads: int = _architecture(8, at_least=1)
    max_heads_parallel: int | None = _computation(
        None, at_least=1, optional=True
    )  # heads of the cross-attention computed at a time; None: all
    num_self_attention_layers: int = _architecture(8, at_least=0)
    num_self_attention_rotary_layers: int = _architecture(1, at_least=-1)  # -1: all of them
    self_attention_widening_factor: int = _architecture(4, at_least=1)
    cross_attention_widening_factor: int = _architecture(4, at_least=1)
    cross_attention_dropout: float = _training(0.5, at_most=1.0)  # share of the prefix dropped
    post_attention_dropout: float = _training(0.0, at_most=1.0)  # on attention weights
    residual_dropout: float = _training(0.0, at_most=1.0)  # on each branch, before it is added
    output_norm: bool = _architecture(False)
    output_bias: bool = _architecture(True)
    abs_pos_emb: bool = _architecture(True)
    init_scale: float = _training(0.02, at_most=sys.float_info.max)

    # Softmax, norms, residuals and loss stay float32 whatever the computation is in.
    dtype: str = _computation("float32", choices=DTYPES, ours=True)  # of the computation
    param_dtype: str = _training("float32", choices=DTYPES, ours=True)
    gradient_dtype: str = _computation(
        "float32", choices=DTYPES, ours=True
    )  # of weight gradients as they are summed over tokens and devices
    remat: str = _computation(
        "none", choices=REMAT_POLICIES, ours=True
    )  # what the backward pass recomputes: nothing, everything, everything but named parts; "auto":
    # as suits the chip, see parallel/chips.py
    scan_layers: bool = _computation(False, ours=True)  # one compiled body for all layers (TPU)
    attention: str = _computation(
        "auto", choices=ATTENTION_IMPLEMENTATIONS, ours=True
    )  # the implementation; "auto" chooses, see model/attention/dispatch.py
    prefix_chunk: int = _computation(
        0, at_least=0, ours=True
    )  # positions of a prefix that are read at a time; 0: all of them
    cache_dtype: str | None = _computation(
        None, choices=("int8",), optional=True, ours=True
    )  # of keys and values while decoding; None: dtype
    rotary_inv_freq: tuple[float, ...] | None = _architecture(
        None, optional=True, ours=True
    )  # None: the formula; otherwise as a checkpoint has them

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.metadata.get("choices") is DTYPES:
                self._make_plain(field.name, lambda dtype: jnp.dtype(dtype).name)
        if self.rotary_inv_freq is not None:
            self._make_plain("rotary_inv_freq", lambda values: tuple(map(float, values)))
        problems = list(self._problems())
        if problems:
            raise ValueError("PerceiverARConfig: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.num_channels // self.num_heads

    @property
    def max_prefix_len(self) -> int:
        """The longest prefix: what the latents leave of `max_seq_len`."""
        return self.max_seq_len - self.max_latents

    @property
    def rotary_dim(self) -> int:
        """`dim` in the formula of the rotary frequencies, 1 / 10000^(2i / dim)."""
        return self.head_dim // 2 if self.abs_pos_emb else self.head_dim

    @property
    def num_rotated_channels(self) -> int:
        """Channels of a head that rotate: a pair per frequency."""
        return 2 * math.ceil(self.rotary_dim / 2)

    @property
    def num_rotary_layers(self) -> int:
        """How many of the self-attention layers, from the first, rotate."""
        k = self.num_self_attention_rotary_layers
        layers = self.num_self_attention_layers
        return layers if k == -1 else min(k, layers)

    def replace(self, **changes) -> "PerceiverARConfig":
        """A copy with some fields changed; validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        fields = dataclasses.asdict(self)
        if self.rotary_inv_freq is not None:
            fields["rotary_inv_freq"] = list(self.rotary_inv_freq)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "PerceiverARConfig":
        """Builds the config from a mapping; unknown names raise ValueError."""
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"PerceiverARConfig has no field {', '.join(unknown)}")
        return cls(**fields)

    @classmethod
    def clm_base(cls, **changes) -> "PerceiverARConfig":
        """The 455M model of perceiver-io's C4 run (krasserm/perceiver-ar-clm-base)."""
        return cls(
            vocab_size=32000,
            max_seq_len=1024,
            max_latents=512,
            num_channels=1280,
            num_heads=10,
            num_self_attention_layers=20,
            cross_attention_dropout=0.0,
            abs_pos_emb=False,
            output_norm=True,
            output_bias=False,
        ).replace(**changes)

    @classmethod
    def bytes_small(cls, **changes) -> "PerceiverARConfig":
        """The 30.6M model on UTF-8 bytes of perceiver-io's WikiText run."""
        return cls().replace(**changes)

    def _make_plain(self, name: str, convert: Callable[[Any], Any]) -> None:
        # What cannot be converted stays as it is, for `_problems` to name it.
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            object.__setattr__(self, name, convert(getattr(self, name)))

    def _problems(self):
        wrong_size = False
        for field in dataclasses.fields(self):
            problem = _problem_of(field, getattr(self, field.name))
            if problem:
                wrong_size |= "at_least" in field.metadata
                yield problem
        if self.rotary_inv_freq is not None and not _are_finite(self.rotary_inv_freq):
            yield f"rotary_inv_freq must be finite numbers, not {self.rotary_inv_freq!r:.80}"
        if wrong_size:
            return  # what follows divides by these sizes
        if self.max_latents > self.max_seq_len:
            yield f"max_latents {self.max_latents} exceeds max_seq_len {self.max_seq_len}"
        if self.num_channels % self.num_heads:
            channels, heads = self.num_channels, self.num_heads
            yield f"num_channels {channels} is not a multiple of num_heads {heads}"
        elif self.num_rotated_channels > self.head_dim:
            yield f"rotary positions need an even head width, not {self.head_dim}"
        elif isinstance(self.rotary_inv_freq, tuple):
            frequencies = self.num_rotated_channels // 2
            if len(self.rotary_inv_freq) != frequencies:
                yield (
                    f"rotary_inv_freq has {len(self.rotary_inv_freq)} entries where the head "
                    f"width asks for {frequencies}"
                )


def fields_with_role(*roles: str) -> tuple[str, ...]:
    """The names of the fields that have one of these roles, in order."""
    fields = dataclasses.fields(PerceiverARConfig)
    return tuple(field.name for field in fields if field.metadata["role"] in roles)


def reference_fields() -> tuple[str, ...]:
    """The names of the fields that perceiver-io has too, in its order."""
    fields = dataclasses.fields(PerceiverARConfig)
    return tuple(field.name for field in fields if not field.metadata.get("ours"))


def _problem_of(field: dataclasses.Field, value: Any) -> str | None:
    """What is wrong with the value of one field alone."""
    name, checks = field.name, field.metadata
    if value is None and checks.get("optional"):
        return None
    if "at_least" in checks:
        low = checks["at_least"]
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            return f"{name} must be a whole number of at least {low}, not {value!r}"
    elif "at_most" in checks:
        high = checks["at_most"]
        if not _is_number(value, high=high):
            most = "between 0 and 1" if high == 1.0 else "of at least 0"
            kind = "number" if high == 1.0 else "finite number"
            return f"{name} must be a {kind} {most}, not {value!r}"
    elif "choices" in checks:
        choices = checks["choices"]
        if value not in choices:
            listed = " or ".join(choices) if len(choices) < 3 else f"one of {', '.join(choices)}"
            return f"{name} must be {listed}, not {value!r}"
    elif isinstance(field.default, bool) and not isinstance(value, bool):
        return f"{name} must be True or False, not {value!r}"
    return None


def _is_number(value: Any, *, high: float) -> bool:
    """Whether it is a number, and neither negative nor above `high`; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= high


def _are_finite(values: Any) -> bool:
    return isinstance(values, tuple) and all(
        isinstance(value, float) and math.isfinite(value) for value in values
    )
