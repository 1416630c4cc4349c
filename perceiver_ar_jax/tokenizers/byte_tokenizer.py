"""Text as its UTF-8 bytes."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from etils import epath

from perceiver_ar_jax.tokenizers.protocol import Tokenizer, ids_with_pieces

BYTES_FILE = "tokenizer_config.json"
BYTES_CLASS = "PerceiverTokenizer"


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes after six special ids; 262 ids, those of deepmind/language-perceiver."""

    vocab_size = model_vocab_size = 262
    pad_id = 0
    eos_id = 2
    num_special = 6  # [PAD] [BOS] [EOS] [MASK] [CLS] [SEP]
    sha256 = hashlib.sha256(b"utf-8 bytes + 6: PAD BOS EOS MASK CLS SEP").hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no special ones added."""
        data = np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)
        return (data.astype(np.int32) + self.num_special).tolist()

    def decode_raw(self, ids: Iterable[int]) -> str:
        """Special ids print nothing; a broken character becomes U+FFFD."""
        ids = ids_with_pieces(ids, self)
        data = bytes(i - self.num_special for i in ids if i >= self.num_special)
        return data.decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> Path:
        """Writes what transformers' AutoTokenizer reads as well; returns the file's path."""
        path = epath.Path(folder) / BYTES_FILE
        description = {
            "tokenizer_class": BYTES_CLASS,
            "model_max_length": 2048,
            "clean_up_tokenization_spaces": False,
        }
        path.write_text(json.dumps(description))
        return path


def names_byte_tokenizer(path: Path) -> bool:
    """Whether a file is what `ByteTokenizer.save` writes."""
    if not path.is_file():
        return False
    try:
        description = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(description, dict) and description.get("tokenizer_class") == BYTES_CLASS
