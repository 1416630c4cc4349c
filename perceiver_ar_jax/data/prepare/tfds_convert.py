"""Converts a prepared TFDS directory to another file format, record by record."""

import functools
import json
import os
from collections.abc import Callable, Iterable
from concurrent import futures
from multiprocessing import get_context
from pathlib import Path

from array_record.python import array_record_module

from perceiver_ar_jax.data.crc32c import masked_crc32c
from perceiver_ar_jax.data.record_files import ArrayRecordFile, tfrecords


def to_array_record(source: str | Path, target: str | Path, **options) -> list[str]:
    """Copies a prepared TFRecord directory as ArrayRecord; see `convert` for the options."""
    return convert(
        source, target, ("tfrecord", "array_record"), tfrecords, _write_array_record, **options
    )


def to_tfrecord(source: str | Path, target: str | Path, **options) -> list[str]:
    """Copies a prepared ArrayRecord directory as TFRecord; see `convert` for the options."""
    return convert(
        source, target, ("array_record", "tfrecord"), _array_records, _write_tfrecord, **options
    )


def convert(
    source: str | Path,
    target: str | Path,
    formats: tuple[str, str],
    read: Callable[[str], Iterable[bytes]],
    write: Callable[[str, Iterable[bytes]], None],
    *,
    splits: Iterable[str] | None = None,
    num_processes: int = 1,
) -> list[str]:
    """Rewrites every shard of some splits (None: of all); each appears complete or not at all.

    Existing shards are kept, so an interrupted conversion continues when it is started again. The
    metadata is written last.

    Returns:
      The names of the shards that this call wrote.

    Raises:
      ValueError: the source is not prepared, has another format, or lacks a split.
    """
    source, target = Path(source), Path(target)
    if not (source / "dataset_info.json").is_file():
        raise ValueError(f"{source} is not a prepared TFDS directory: no dataset_info.json")
    info = json.loads((source / "dataset_info.json").read_text())
    old, new = formats
    if info["fileFormat"] != old:
        raise ValueError(f"{source} holds {info['fileFormat']} files, not {old}")
    known = {split["name"]: split for split in info["splits"]}
    splits = list(known if splits is None else splits)
    if set(splits) - set(known):
        raise ValueError(f"{source} has no split {set(splits) - set(known)}: it has {set(known)}")
    target.mkdir(parents=True, exist_ok=True)
    num_records = {
        f"{info['name']}-{split}.{{}}-{i:05}-of-{len(known[split]['shardLengths']):05}": int(count)
        for split in splits
        for i, count in enumerate(known[split]["shardLengths"])
    }
    todo = [name for name in num_records if not (target / name.format(new)).is_file()]
    work = functools.partial(_convert_shard, read, write)
    arguments = (
        [str(source / name.format(old)) for name in todo],
        [str(target / name.format(new)) for name in todo],
        [num_records[name] for name in todo],
    )
    if num_processes == 1:
        list(map(work, *arguments))
    else:
        with futures.ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
            list(pool.map(work, *arguments))
    info |= {"fileFormat": new, "splits": [known[split] for split in splits]}
    (target / "features.json").write_bytes((source / "features.json").read_bytes())
    (target / "dataset_info.json").write_text(json.dumps(info, indent=2))
    return [name.format(new) for name in todo]


def _convert_shard(read, write, source: str, target: str, num_records: int) -> None:
    write(f"{target}.incomplete", _whole(source, read(source), num_records))
    os.replace(f"{target}.incomplete", target)


def _whole(path: str, records: Iterable[bytes], expected: int) -> Iterable[bytes]:
    """The records; raises at the end if the file was cut off between two of them."""
    count = 0
    for record in records:
        yield record
        count += 1
    if count != expected:
        raise ValueError(f"{path} has {count} records, {expected} were expected")


def _array_records(path: str) -> Iterable[bytes]:
    file = ArrayRecordFile(path)
    return (file.read(i) for i in range(len(file)))


def _write_array_record(path: str, records: Iterable[bytes]) -> None:
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")  # as TFDS writes it
    for record in records:
        writer.write(record)
    writer.close()


def _write_tfrecord(path: str, records: Iterable[bytes]) -> None:
    with open(path, "wb") as file:
        for record in records:
            length = len(record).to_bytes(8, "little")
            for part in (length, record):
                file.write(part + masked_crc32c(part).to_bytes(4, "little"))
