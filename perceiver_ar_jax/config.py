import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

REMAT_POLICIES = ("none", "full", "names")
ATTENTION_IMPLEMENTATIONS = ("auto", "plain", "recompute")
LEAST_SIZES = {
    "vocab_size": 1,
    "max_seq_len": 1,
    "max_latents": 1,
    "num_channels": 1,
    "num_heads": 1,
    "max_heads_parallel": 1,
    "num_self_attention_layers": 0,
    "num_self_attention_rotary_layers": -1,
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
}
DROPOUT_FIELDS = ("cross_attention_dropout", "post_attention_dropout", "residual_dropout")
SWITCHES = ("output_norm", "output_bias", "abs_pos_emb", "scan_layers")
DTYPE_FIELDS = ("dtype", "param_dtype", "gradient_dtype")


@dataclasses.dataclass(frozen=True)
class PerceiverARConfig:
    """Describes one Perceiver AR model; frozen, hashable and validated.

    Field names and defaults are those of perceiver-io's `CausalSequenceModelConfig`; its
    `activation_checkpointing=True` is `remat="full"` here. The fields after `init_scale` are ours.

    Raises:
      ValueError: at construction, naming every problem at once.
    """

    vocab_size: int = 262
    max_seq_len: int = 4096
    max_latents: int = 512
    num_channels: int = 512
    num_heads: int = 8
    max_heads_parallel: int | None = None  # heads of the cross-attention computed at a time
    num_self_attention_layers: int = 8
    num_self_attention_rotary_layers: int = 1  # -1: all of them
    self_attention_widening_factor: int = 4
    cross_attention_widening_factor: int = 4
    cross_attention_dropout: float = 0.5  # share of the prefix dropped in training
    post_attention_dropout: float = 0.0  # on attention weights
    residual_dropout: float = 0.0  # on each branch, before it joins the residual stream
    output_norm: bool = False
    output_bias: bool = True
    abs_pos_emb: bool = True
    init_scale: float = 0.02

    dtype: str = "float32"  # of the computation; softmax, norms, residuals and loss stay float32
    param_dtype: str = "float32"
    gradient_dtype: str = "float32"  # of weight gradients as they are summed over tokens, devices
    remat: str = "none"  # what the backward pass computes again: nothing, all, all but named parts
    scan_layers: bool = False  # one compiled body for all self-attention layers (TPU: yes, CPU: no)
    attention: str = "auto"  # the implementation; "auto" chooses, see model/attention/dispatch.py
    rotary_inv_freq: tuple[float, ...] | None = None  # None: the formula; else as a checkpoint has

    def __post_init__(self):
        for name in DTYPE_FIELDS:
            self._make_plain(name, lambda dtype: jnp.dtype(dtype).name)
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
        for name, low in LEAST_SIZES.items():
            value = getattr(self, name)
            if value is None and name == "max_heads_parallel":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                wrong_size = True
                yield f"{name} must be a whole number of at least {low}, not {value!r}"
        for name in DROPOUT_FIELDS:
            if not _is_number(getattr(self, name), high=1.0):
                yield f"{name} must be a number between 0 and 1, not {getattr(self, name)!r}"
        if not _is_number(self.init_scale, high=sys.float_info.max):
            yield f"init_scale must be a finite number of at least 0, not {self.init_scale!r}"
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                yield f"{name} must be True or False, not {getattr(self, name)!r}"
        for name in DTYPE_FIELDS:
            if getattr(self, name) not in ("float32", "bfloat16"):
                yield f"{name} must be float32 or bfloat16, not {getattr(self, name)!r}"
        for name, choices in (("remat", REMAT_POLICIES), ("attention", ATTENTION_IMPLEMENTATIONS)):
            if getattr(self, name) not in choices:
                yield f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}"
        if self.rotary_inv_freq is not None and not _are_finite(self.rotary_inv_freq):
            yield f"rotary_inv_freq must be finite numbers, not {self.rotary_inv_freq!r:.80}"
        if wrong_size:
            return  # what follows divides by these sizes
        if self.max_latents > self.max_seq_len:
            yield f"max_latents {self.max_latents} exceeds max_seq_len {self.max_seq_len}"
        if self.num_channels % self.num_heads:
            yield f"num_channels {self.num_channels} is no multiple of num_heads {self.num_heads}"
        elif self.num_rotated_channels > self.head_dim:
            yield f"rotary positions need an even head width, not {self.head_dim}"
        elif isinstance(self.rotary_inv_freq, tuple):
            frequencies = self.num_rotated_channels // 2
            if len(self.rotary_inv_freq) != frequencies:
                yield (
                    f"rotary_inv_freq has {len(self.rotary_inv_freq)} entries where the head "
                    f"width asks for {frequencies}"
                )


def _is_number(value: Any, *, high: float) -> bool:
    """Whether it is a number, and neither negative nor above `high`; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= high


def _are_finite(values: Any) -> bool:
    return isinstance(values, tuple) and all(
        isinstance(value, float) and math.isfinite(value) for value in values
    )
