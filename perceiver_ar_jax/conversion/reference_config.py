"""The fields of perceiver-io's model config, to ours and back."""

import warnings
from collections.abc import Mapping
from typing import Any

from perceiver_ar_jax.config import PerceiverARConfig, reference_fields

SHARED = reference_fields()
# What perceiver-io added after its first checkpoints were published; their defaults are those of
# PerceiverARConfig, so no warning is needed for such files.
ADDED_LATER = {
    "residual_dropout",
    "num_self_attention_rotary_layers",
    "activation_checkpointing",
    "activation_offloading",
}


def config_from_reference(fields: Mapping[str, Any]) -> PerceiverARConfig:
    """Our config from perceiver-io's fields; a missing one gets perceiver-io's default.

    Warns of missing fields that also old files have, and of activation offloading, which has no
    counterpart. Names that perceiver-io does not know are ignored.

    Raises:
      ValueError: a value of the wrong type or an impossible size.
    """
    known = {name: fields[name] for name in [*SHARED, *sorted(ADDED_LATER)] if name in fields}
    for name, value in known.items():
        optional = name == "max_heads_parallel" and value is None
        if not (isinstance(value, int | float) or optional):
            raise ValueError(f"{name} in the config is a {type(value).__name__}, not a number")
    missing = [name for name in SHARED if name not in known and name not in ADDED_LATER]
    if missing:
        warnings.warn(
            f"the config lacks {', '.join(missing)}: taking perceiver-io's defaults", stacklevel=2
        )
    if known.pop("activation_offloading", False):
        warnings.warn("activation_offloading has no counterpart here: dropped", stacklevel=2)
    remat = "full" if known.pop("activation_checkpointing", False) else "none"
    return PerceiverARConfig(**known, remat=remat)


def unknown_fields(fields: Mapping[str, Any]) -> list[str]:
    """The names that perceiver-io's model config does not have, sorted."""
    return sorted(set(fields) - {*SHARED, *ADDED_LATER})


def config_to_reference(config: PerceiverARConfig) -> dict[str, Any]:
    """perceiver-io's fields, as it stores them under `model_config`."""
    return {
        **{name: getattr(config, name) for name in SHARED},
        "activation_checkpointing": config.remat == "full",
        "activation_offloading": False,
    }
