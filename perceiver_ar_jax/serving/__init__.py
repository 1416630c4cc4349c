"""A server on this machine: a page that streams text, and completions in OpenAI's shape."""

from perceiver_ar_jax.serving.engine import Limits
from perceiver_ar_jax.serving.server import serve

__all__ = ["Limits", "serve"]
