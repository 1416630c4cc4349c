from perceiver_ar_jax.tokenizers.byte_tokenizer import ByteTokenizer
from perceiver_ar_jax.tokenizers.hugging_face import HFTokenizer
from perceiver_ar_jax.tokenizers.loading import load_tokenizer
from perceiver_ar_jax.tokenizers.protocol import Tokenizer
from perceiver_ar_jax.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from perceiver_ar_jax.tokenizers.streaming import TextStream
from perceiver_ar_jax.tokenizers.training import train_sentencepiece
from perceiver_ar_jax.tokenizers.xlnet import XLNetTokenizer

__all__ = [
    "ByteTokenizer",
    "HFTokenizer",
    "SentencePieceTokenizer",
    "TextStream",
    "Tokenizer",
    "XLNetTokenizer",
    "load_tokenizer",
    "train_sentencepiece",
]
