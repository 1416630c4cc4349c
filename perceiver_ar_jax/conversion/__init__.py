"""Checkpoints of perceiver-io to ours and back."""

from perceiver_ar_jax.conversion.readers import ReferenceCheckpoint, read_reference
from perceiver_ar_jax.conversion.rules import to_flax, to_torch
from perceiver_ar_jax.conversion.writers import write_reference

__all__ = ["ReferenceCheckpoint", "read_reference", "to_flax", "to_torch", "write_reference"]
