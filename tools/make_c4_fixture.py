"""Makes a small prepared dataset with the features and layout of C4 from JSONL.

    python tools/make_c4_fixture.py 'pages/*.jsonl' --output DIR

Writes DIR/array_record/c4/en/3.0.1 and DIR/tfrecord/c4/en/3.0.1, which
everything that reads C4 can read. Each line holds "text", and may hold "url" and "timestamp".
"""

import argparse
import glob
import json
import sys
from pathlib import Path

from perceiver_ar_jax.data.prepare.tfds_convert import to_tfrecord
from perceiver_ar_jax.data.prepare.tfds_writer import Document, prepared_directory, write_dataset

NAME, CONFIG, VERSION = "c4", "en", "3.0.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jsonl", help="a file or a glob")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--validation_every", type=int, default=20, metavar="N")
    args = parser.parse_args()
    documents = read_documents(args.jsonl)
    every = args.validation_every
    if len(documents) < max(2, every):
        raise ValueError(f"{args.jsonl} has {len(documents)} documents, {every} are needed")
    splits = {
        "train": [document for i, document in enumerate(documents) if i % every],
        "validation": documents[::every],
    }
    array_record = write_dataset(
        splits,
        name=NAME,
        config=CONFIG,
        version=VERSION,
        data_dir=args.output / "array_record",
        num_shards=args.shards,
    )
    tfrecord = prepared_directory(args.output / "tfrecord", NAME, CONFIG, VERSION)
    to_tfrecord(array_record, tfrecord)
    print(array_record)
    print(tfrecord)


def read_documents(pattern: str) -> list[Document]:
    documents = []
    for path in sorted(glob.glob(pattern)):
        with open(path, encoding="utf-8") as file:
            for line in file:
                fields = json.loads(line)
                known = {key: fields[key] for key in ("text", "url", "timestamp") if key in fields}
                documents.append(Document(**known))
    return documents


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
