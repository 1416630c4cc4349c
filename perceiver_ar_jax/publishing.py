"""A trained model on the Hugging Face hub: its files, and the card that describes it.

The files are perceiver-io's format, config.json and model.safetensors, so that `load_pretrained`
and perceiver-io's `from_pretrained` both read them.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.conversion import write_reference
from perceiver_ar_jax.tokenizers import Tokenizer

CARD = "README.md"


def push_to_hub(
    repo_id: str,
    *,
    params: Mapping[str, Any],
    config: PerceiverARConfig,
    tokenizer: Tokenizer | None,
    card: str,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Uploads a model as one commit; see `Pretrained.push_to_hub`. Returns the address."""
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError("push_to_hub needs pip install 'perceiver-ar-jax[hub]'") from None
    hub = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write_reference(folder, params, config)
        if tokenizer is not None:
            tokenizer.save(folder)
        try:
            address = hub.create_repo(repo_id, private=private, exist_ok=True)
            if not hub.file_exists(repo_id, CARD):  # otherwise somebody may have edited it
                Path(folder, CARD).write_text(card, encoding="utf-8")
            hub.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload from perceiver-ar-jax"
            )
        except (OSError, ValueError) as error:  # among them all that huggingface_hub raises
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ValueError(
                f"cannot push to {repo_id}: {reason}; the id is owner/name, and you need to be "
                "logged in (hf auth login) or to pass a token that may write"
            ) from error
    return str(address)


def model_card(
    repo_id: str,
    *,
    params: Mapping[str, Any],
    config: PerceiverARConfig,
    tokenizer: Tokenizer | None,
    step: int = 0,
    respect_documents: bool = False,
    license: str | None = None,
    evaluation: Mapping[str, float] | None = None,
) -> str:
    """The card: what the model is, how to load it, and what was measured."""
    name = repo_id.rpartition("/")[2]
    front = {
        "library_name": "perceiver-ar-jax",
        "pipeline_tag": "text-generation",
        "tags": ["perceiver-ar", "jax", "flax"],
        **({"license": license} if license else {}),
    }
    size = sum(x.size for x in jax.tree.leaves(params))
    rows = {
        "parameters": f"{size:,}",
        "positions it reads": f"{config.max_seq_len:,}, the last {config.max_latents:,} as latents",
        "channels": f"{config.num_channels:,}, {config.num_heads} heads",
        "layers": f"1 hybrid and {config.num_self_attention_layers} of self-attention",
        "positions": "absolute and rotary" if config.abs_pos_emb else "rotary",
        "vocabulary": f"{config.vocab_size:,}",
        "tokenizer": type(tokenizer).__name__ if tokenizer else "none in this repository",
        "weights": config.param_dtype,
        **({"steps trained": f"{step:,}"} if step else {}),
        **({"documents": "attention stays inside a document"} if respect_documents else {}),
        "licence": license or "not stated",
    }
    generates = 'print(pretrained.generate_text(["Once upon a time"], max_new_tokens=64)[0])\n'
    sections = [
        # Values of YAML are JSON here, so that no character of them means something else.
        "---\n" + "".join(f"{key}: {json.dumps(x)}\n" for key, x in front.items()) + "---",
        f"# {name}",
        "A [Perceiver AR](https://arxiv.org/abs/2202.07765) causal language model in the format of "
        "[perceiver-io](https://github.com/krasserm/perceiver-io), saved by perceiver-ar-jax.",
        _table("model", "", rows),
        "## Load it",
        "In JAX, with perceiver-ar-jax:",
        "```python\nfrom perceiver_ar_jax import load_pretrained\n\n"
        f'pretrained = load_pretrained("{repo_id}")\n{generates if tokenizer else ""}```',
        "In PyTorch, with perceiver-io:",
        "```python\nfrom perceiver.model.text import clm  # registers the classes\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")\n```',
    ]
    if evaluation:
        figures = {name: f"{value:.4g}" for name, value in evaluation.items()}
        sections += ["## Evaluation", _table("measured", "value", figures)]
    return "\n\n".join(sections) + "\n"


def _table(left, right, rows):
    return "\n".join(
        [f"| {left} | {right} |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]
    )
