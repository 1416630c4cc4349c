"""A trained model on disk: what `load_pretrained` reads, and what a run or a conversion leaves.

A folder of ours holds `config.json` ({"model": …, "tokenizer_sha256": …, "respect_documents": …}),
`tokenizer/` and `checkpoints/<step>/`. A converted model is such a folder with only parameters, at
step 0.
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from perceiver_ar_jax import publishing, text_generation
from perceiver_ar_jax._version import __version__
from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model import PerceiverAR, init_params, prepare_for_decoding
from perceiver_ar_jax.model.decoding_params import DecodingKernel, check_weights
from perceiver_ar_jax.tokenizers import Tokenizer

CONFIG_FILE, TOKENIZER_FOLDER, CHECKPOINTS_FOLDER = "config.json", "tokenizer", "checkpoints"


@dataclasses.dataclass(frozen=True, repr=False)
class Pretrained:
    """A model and its parameters, ready for `model.apply`, `generate` and `generate_text`."""

    model: PerceiverAR
    params: Any
    config: PerceiverARConfig
    tokenizer: Any  # None if the checkpoint has none
    step: int  # steps trained; 0 for a converted model
    respect_documents: bool = False  # trained with attention that stays inside a document

    def __repr__(self) -> str:
        """On one line; the dataclass's own would print every parameter."""
        config, tokenizer = self.config, self.tokenizer
        size = sum(x.size for x in jax.tree.leaves(self.params))
        return (
            f"Pretrained({size:,} parameters, max_seq_len={config.max_seq_len}, "
            f"max_latents={config.max_latents}, vocab_size={config.vocab_size}, "
            f"tokenizer={tokenizer and type(tokenizer).__name__}, step={self.step})"
        )

    def generate_text(self, prompts: Sequence[str], **options) -> list[str]:
        """What follows each prompt, up to the end of text; prompt + continuation is the whole.

        Args:
          prompts: texts, none of them empty; they are one batch.
          **options: as in `generate`. By default num_latents is chosen for good text, and
            eos_token_id, pad_token_id and vocab_size are the tokenizer's.

        Raises:
          ValueError: if there is no tokenizer, a prompt is empty or too long, or an option is out
            of range.
          TypeError: naming an option that does not exist.
        """
        return [x.text for x in self.continue_texts(prompts, **options)]

    def stream_text(self, prompt: str, **options) -> Iterator[str]:
        """What follows a prompt, one piece per token as it is computed; as in `generate_text`.

        A piece is empty where a token completes no character. Closing the iterator ends the work.
        """
        return text_generation.stream_text(
            self.model, self.params, self.tokenizer, prompt, **options
        )

    def continue_texts(
        self,
        prompts: Sequence[str],
        *,
        on_first_token: Callable[[], None] | None = None,
        **options,
    ) -> list[text_generation.Continuation]:
        """`generate_text`, with the new tokens and their log-probabilities.

        `on_first_token` is called when everything is compiled and the first tokens are there.
        """
        return text_generation.continue_texts(
            self.model,
            self.params,
            self.tokenizer,
            prompts,
            on_first_token=on_first_token,
            **options,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that `load_pretrained` and every command with --model reads, at step 0.

        Raises:
          ValueError: the weights were prepared for decoding, or the folder has a model already.
        """
        self._check_weights_as_trained("saved")
        folder = Path(folder)
        if (folder / CONFIG_FILE).exists():
            raise ValueError(f"{folder} has a {CONFIG_FILE} already: name another folder")
        save_pretrained(
            folder,
            self.config,
            self.params,
            tokenizer=self.tokenizer,
            respect_documents=self.respect_documents,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        evaluation: Mapping[str, float] | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Uploads model, tokenizer and a model card to the Hugging Face hub; needs [hub].

        The files are perceiver-io's format, which `load_pretrained(repo_id)` and perceiver-io read.
        A repository that does not exist is made; a card that it has already is kept.

        Args:
          repo_id: owner/name.
          license: an identifier such as "apache-2.0" for the card; None states none.
          evaluation: figures for the card, such as {"bits per byte, WikiText-2 test": 1.53}.
          private: whether a repository that is made is private.
          token: one that may write; None takes that of `hf auth login`.

        Returns:
          The address of the repository.

        Raises:
          ValueError: huggingface_hub is not installed, the weights were prepared for decoding, or
            the hub refuses.
        """
        self._check_weights_as_trained("pushed")
        model = {"params": self.params, "config": self.config, "tokenizer": self.tokenizer}
        card = publishing.model_card(
            repo_id,
            **model,
            step=self.step,
            respect_documents=self.respect_documents,
            license=license,
            evaluation=evaluation,
        )
        return publishing.push_to_hub(repo_id, **model, card=card, private=private, token=token)

    def _check_weights_as_trained(self, done: str) -> None:
        if isinstance(self.params["token_embedding"]["embedding"], DecodingKernel):
            raise ValueError(
                f"weights prepared for decoding cannot be {done}: load_pretrained without `weights`"
            )


def load_pretrained(
    path: str | Path,
    *,
    step: int | None = None,
    weights: str | None = None,
    cache_dtype: str | None = None,
) -> Pretrained:
    """Loads a checkpoint of ours, or one of perceiver-io, which is converted on the way.

    Of a run that averages its weights these are the averaged ones.

    Args:
      path: a workdir or converted folder of ours, local or gs://; or a Hugging Face directory of
        perceiver-io, one of its .safetensors, .bin or .ckpt files, or a hub id.
      step: of a workdir; None takes the newest intact one.
      weights: "float32", "bfloat16" or "int8" prepares the parameters for decoding, see
        `prepare_for_decoding`, and computes in bfloat16 or else in float32, whatever the model is
        configured in. None leaves both as they are, for training too.
      cache_dtype: "int8" keeps the keys and values of decoding so: a quarter of float32's memory,
        half of bfloat16's. None leaves them in what the model computes in.

    Warns:
      UserWarning: newer steps that are damaged were skipped, or the tokenizer of a perceiver-io
        checkpoint is of a kind that is not read, so that `tokenizer` is None.

    Raises:
      ValueError: nothing usable is there; says what was looked for. Or `weights` or `cache_dtype`
        of another kind.
      CheckpointError: a folder of ours without an intact step.
    """
    if weights is not None:
        check_weights(weights)
    PerceiverARConfig(cache_dtype=cache_dtype)  # before anything is read
    folder = epath.Path(path)
    description = _description(folder)
    if description is not None:
        pretrained = _load_ours(folder, description, step)
    elif step is not None:
        raise ValueError(f"step={step}, but {path} is not a workdir and has no steps")
    else:
        pretrained = _load_reference(path)
    if cache_dtype is not None:
        pretrained = _reconfigured(pretrained, cache_dtype=cache_dtype)
    return pretrained if weights is None else _prepared(pretrained, weights)


def model_of(path: str | Path) -> tuple[PerceiverARConfig, str | None]:
    """The model of a workdir or converted folder of ours and its tokenizer's folder, if it has one.

    Raises:
      ValueError: the folder is not one of ours.
    """
    folder = epath.Path(path)
    description = _description(folder)
    if description is None:
        raise ValueError(
            f"{path} is not a workdir or a converted model; perceiver-ar convert makes one of a "
            "perceiver-io checkpoint"
        )
    tokenizer = folder / TOKENIZER_FOLDER
    config = PerceiverARConfig.from_dict(description["model"])
    return config, str(tokenizer) if tokenizer.is_dir() else None


def save_pretrained(
    folder: str | Path,
    config: PerceiverARConfig,
    params: Any,
    *,
    tokenizer: Tokenizer | None = None,
    respect_documents: bool = False,
) -> None:
    """Writes a folder that `load_pretrained` reads.

    Args:
      folder: created if it does not exist.
      config: of the model.
      params: nested dicts of arrays.
      tokenizer: as `load_tokenizer` gives it, whatever its file was called.
      respect_documents: whether the model was trained with attention inside documents only.

    Raises:
      ValueError: the tokenizer has more ids than the model.
    """
    from perceiver_ar_jax.training.checkpoint import Checkpointer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = None
    if tokenizer is not None:
        (folder / TOKENIZER_FOLDER).mkdir(exist_ok=True)
        tokenizer.save(folder / TOKENIZER_FOLDER)
        sha256 = _load_tokenizer(folder / TOKENIZER_FOLDER, config).sha256
    checkpointer = Checkpointer(folder / CHECKPOINTS_FOLDER)
    checkpointer.save_params(jax.tree.map(jax.device_put, params))
    checkpointer.close()
    write_description(folder, config, tokenizer_sha256=sha256, respect_documents=respect_documents)


def write_description(
    folder: Path,
    config: PerceiverARConfig,
    *,
    tokenizer_sha256: str | None,
    respect_documents: bool = False,
    **more: Any,
) -> None:
    """Writes the `config.json` that says what model a folder holds and how it reads documents."""
    description = {
        "perceiver_ar_jax": __version__,
        "model": config.to_dict(),
        "tokenizer_sha256": tokenizer_sha256,
        "respect_documents": respect_documents,
        **more,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")


def _description(folder: Path) -> Mapping[str, Any] | None:
    """The `config.json` of a folder of ours; None for any other folder."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        if folder.is_dir() and (folder / CHECKPOINTS_FOLDER).is_dir():
            raise ValueError(f"{folder} has {CHECKPOINTS_FOLDER}/ but no {CONFIG_FILE}")
        return None
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return description if "model" in description else None


def _prepared(pretrained, weights):
    params = prepare_for_decoding(pretrained.params, weights)
    pretrained = dataclasses.replace(pretrained, params=params)
    return _reconfigured(pretrained, dtype="bfloat16" if weights == "bfloat16" else "float32")


def _reconfigured(pretrained, **changes):
    config = pretrained.config.replace(**changes)
    return dataclasses.replace(pretrained, model=PerceiverAR(config), config=config)


def _load_ours(folder, description, step):
    from perceiver_ar_jax.training.checkpoint import Checkpointer

    config = PerceiverARConfig.from_dict(description["model"])
    model = PerceiverAR(config)
    abstract = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    checkpointer = Checkpointer(folder / CHECKPOINTS_FOLDER)
    steps = checkpointer.steps()
    if step is not None and step not in steps:
        found = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"{folder} has no checkpoint of step {step}; its steps: {found}")
    params, step, skipped = checkpointer.restore_params(abstract, step=step)
    checkpointer.close()
    for line in skipped:
        warnings.warn(line, stacklevel=3)
    tokenizer = None
    if (folder / TOKENIZER_FOLDER).is_dir():
        tokenizer = _load_tokenizer(folder / TOKENIZER_FOLDER, config)
        if tokenizer.sha256 != description["tokenizer_sha256"]:
            raise ValueError(
                f"{folder / TOKENIZER_FOLDER} is not the tokenizer this model was trained with: "
                f"sha256 {tokenizer.sha256[:12]}…, {description['tokenizer_sha256'][:12]}… expected"
            )
    respect_documents = description.get("respect_documents", False)
    return Pretrained(model, params, config, tokenizer, step, respect_documents)


def _load_reference(source):
    from perceiver_ar_jax.conversion import read_reference

    reference = read_reference(source)
    params = reference.rules.to_flax(reference.tensors, reference.config)
    params = jax.tree.map(jax.device_put, params)
    tokenizer = None
    if reference.tokenizer_files:
        try:
            tokenizer = _load_tokenizer(reference.tokenizer_files[0].parent, reference.config)
        except ValueError as error:
            warnings.warn(f"loaded {source} without its tokenizer: {error}", stacklevel=3)
    return Pretrained(PerceiverAR(reference.config), params, reference.config, tokenizer, 0)


def _load_tokenizer(folder: Path, config: PerceiverARConfig):
    from perceiver_ar_jax.tokenizers import load_tokenizer

    return load_tokenizer(folder, vocab_size=config.vocab_size)
