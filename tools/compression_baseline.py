"""Prints, as JSON, the bits per byte that gzip -9 and xz -9e need for the text of a split.

    python tools/compression_baseline.py SOURCE [--split=validation]

The compressors read what an evaluation reads: the documents in their order, one separator (here a
NUL byte, there eos) after each; the bytes of the text alone are counted.
"""

import argparse
import json
import lzma
import sys
import zlib

from perceiver_ar_jax.data.sources import open_source

GZIP_WINDOW = 16 + zlib.MAX_WBITS  # 16: with gzip's header and trailer


def compression_baselines(source: str, split: str) -> dict:
    """Sizes of a split, and bits per byte of each compressor.

    Raises:
      ValueError: the data is missing or without text.
    """
    compressors = {
        "gzip -9": zlib.compressobj(9, wbits=GZIP_WINDOW),
        "xz -9e": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
    }
    compressed = dict.fromkeys(compressors, 0)
    num_bytes = num_documents = 0
    texts = open_source(source, split)
    for text in map(texts.__getitem__, range(len(texts))):
        data = text.text.encode("utf-8", errors="replace")
        num_bytes += len(data)
        num_documents += text.ends_document
        for name, compressor in compressors.items():
            compressed[name] += len(compressor.compress(data + b"\0" * text.ends_document))
    if not num_bytes:
        raise ValueError(f"{source} has no text in {split}")
    for name, compressor in compressors.items():
        compressed[name] += len(compressor.flush())
    return {
        "source": source,
        "split": split,
        "documents": num_documents,
        "bytes": num_bytes,
        "bits_per_byte": {name: round(8 * n / num_bytes, 4) for name, n in compressed.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a prepared TFDS directory, a file or a glob")
    parser.add_argument("--split", default="validation")
    arguments = parser.parse_args()
    try:
        print(json.dumps(compression_baselines(arguments.source, arguments.split), indent=2))
    except (ValueError, OSError) as error:
        print(f"compression_baseline.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
