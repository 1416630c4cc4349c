"""Checkpoints of other libraries to ours and back; today those of perceiver-io."""

from perceiver_ar_jax.conversion.perceiver_io import PERCEIVER_IO
from perceiver_ar_jax.conversion.readers import ReferenceCheckpoint, read_reference
from perceiver_ar_jax.conversion.writers import write_reference

to_flax, to_torch = PERCEIVER_IO.to_flax, PERCEIVER_IO.to_torch

__all__ = ["ReferenceCheckpoint", "read_reference", "to_flax", "to_torch", "write_reference"]
