"""Converts a prepared TFRecord dataset (C4 as most sites have it) to ArrayRecord.

    python tools/to_array_record.py /tfrecord/c4/en/3.0.1 /array_record/c4/en/3.0.1 --processes 16

Records keep their bytes; checksums are verified. An interrupted conversion continues when it is
started again.
"""

import argparse
import os
import sys

from perceiver_ar_jax.data.prepare.tfds_convert import to_array_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="directory with dataset_info.json and .tfrecord files")
    parser.add_argument("target", help="directory that receives the .array_record files")
    parser.add_argument("--split", action="append", help="only this split (may be repeated)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    written = to_array_record(
        args.source, args.target, splits=args.split, num_processes=args.processes
    )
    print(f"{args.target}: {len(written)} shards written")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
