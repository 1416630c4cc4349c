"""Tokenizers of the Hugging Face hub, through huggingface_hub and its cache; the [hub] extra."""

import re
from collections.abc import Sequence
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def is_hub_id(source: str) -> bool:
    """Whether `xlnet-base-cased` or `owner/name` could be meant, and not a file."""
    return _HUB_ID.fullmatch(source) is not None and not source.endswith((".model", ".json"))


def download(hub_id: str, files: Sequence[str]) -> Path:
    """The folder of the cache with those of the files that the hub has, fetched if need be.

    Raises:
      ValueError: nothing can be had; one line that says why, and which file to pass.
    """
    otherwise = f"or pass the path of its {' or '.join(files[:2])}"
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"no tokenizer at {hub_id}; if it is a hub id, install the [hub] extra: "
            f"pip install 'perceiver-ar-jax[hub]', {otherwise}"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # among them all that huggingface_hub and requests raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"no tokenizer at {hub_id}: it is not a file, and the Hugging Face hub cannot give it "
            f"({reason}); check the name and the network, {otherwise}"
        ) from None
