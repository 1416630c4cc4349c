"""Which tokenizer a file, a folder or a name means, and so which ids a text has."""

from pathlib import Path

from etils import epath

from perceiver_ar_jax.tokenizers import hub
from perceiver_ar_jax.tokenizers.byte_tokenizer import (
    BYTES_CLASS,
    BYTES_FILE,
    ByteTokenizer,
    names_byte_tokenizer,
)
from perceiver_ar_jax.tokenizers.hugging_face import (
    HUGGING_FACE_FILE,
    SPECIAL_TOKENS_FILE,
    HFTokenizer,
)
from perceiver_ar_jax.tokenizers.protocol import Tokenizer
from perceiver_ar_jax.tokenizers.sentencepiece_tokenizer import (
    SENTENCEPIECE_FILE,
    SentencePieceTokenizer,
)
from perceiver_ar_jax.tokenizers.xlnet import XLNetTokenizer, is_xlnet

TOKENIZER_FILES = (SENTENCEPIECE_FILE, HUGGING_FACE_FILE, BYTES_FILE, SPECIAL_TOKENS_FILE)


def load_tokenizer(source: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Finds the tokenizer that `source` names, and decides which ids it gives.

    XLNet's SentencePiece model always gives the ids of Hugging Face's tokenizer.

    >>> tokenizer = load_tokenizer("bytes")
    >>> tokenizer.encode("ab"), tokenizer.decode([103, 104])
    ([103, 104], 'ab')

    Args:
      source: "bytes", a SentencePiece `.model` file, a `tokenizer.json`, a folder with one of them,
        or a hub id such as "xlnet-base-cased".
      vocab_size: the model's; a tokenizer with more ids is refused, one with fewer decodes the
        model's further ids as nothing.

    Raises:
      ValueError: nothing usable is there; says what is.
    """
    tokenizer = _load(source)
    if vocab_size is None:
        return tokenizer
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {source} has {tokenizer.vocab_size} ids, the model's vocabulary only "
            f"{vocab_size}"
        )
    tokenizer.model_vocab_size = vocab_size
    return tokenizer


def _load(source: str | Path) -> Tokenizer:
    if str(source) == "bytes":
        return ByteTokenizer()
    path = epath.Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path)
    if not path.exists() and hub.is_hub_id(str(source)):
        return _load_folder(epath.Path(hub.download(str(source), TOKENIZER_FILES)))
    return _load_file(path)


def _load_folder(folder: Path) -> Tokenizer:
    """Where there are two files, the one whose ids are exactly Hugging Face's."""
    sentencepiece, hugging_face = folder / SENTENCEPIECE_FILE, folder / HUGGING_FACE_FILE
    if sentencepiece.is_file():
        tokenizer = _load_file(sentencepiece)
        is_exact = type(tokenizer) is not SentencePieceTokenizer
        if is_exact or not hugging_face.is_file():
            return tokenizer
    if hugging_face.is_file():
        return _load_file(hugging_face)
    if names_byte_tokenizer(folder / BYTES_FILE):
        return ByteTokenizer()
    raise ValueError(
        f"no tokenizer in {folder}: looked for {SENTENCEPIECE_FILE}, {HUGGING_FACE_FILE} "
        f"and a {BYTES_FILE} that names {BYTES_CLASS}"
    )


def _load_file(path: Path) -> Tokenizer:
    if path.name.endswith(".json"):
        return HFTokenizer(path)
    tokenizer = SentencePieceTokenizer(path)
    return XLNetTokenizer(path) if is_xlnet(tokenizer) else tokenizer
