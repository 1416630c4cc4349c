"""Random-access text: a split of a prepared TFDS directory, JSONL or plain text files."""

import bisect
import glob
import itertools
import json
import os
import resource
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from perceiver_ar_jax.data import record_blocks, record_files, splits, storage
from perceiver_ar_jax.data.prepared import INFO_FILE, find_prepared, is_dataset_name
from perceiver_ar_jax.data.tf_example import bytes_feature


class Text(NamedTuple):
    """A document, or a piece of one, as read from a file."""

    text: str
    ends_document: bool = True
    is_valid_utf8: bool = True
    is_malformed: bool = False  # a line that is not a JSON object with a "text"; its text is empty
    begins_document: bool = True


class Shard(NamedTuple):
    """Records `[first, first + count)` of a file that is expected to hold `num_records`."""

    path: str
    first: int
    count: int
    num_records: int


class TextSource:
    """Random access to texts: `source[i]` reads one. Pickles without its open files.

    Attributes:
      shards: what is read of which files.
      files: name and size of each.
      split: its name, as it was given.
      parse: makes a text of a record; is told whether it is the file's first, the file's last.
      read_records: reads a span of a file without its index; None if that is not possible.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        open_file: Callable[[str], Any],
        parse: Callable[[bytes, bool, bool], Text],
        split: str,
        read_records: Callable[[record_blocks.Span], list[bytes]] | None = None,
    ):
        self.shards = [shard for shard in shards if shard.count]
        self.parse = parse
        self.split = split
        self.read_records = read_records
        self.files = _names_and_sizes([shard.path for shard in self.shards])
        self._ends = list(itertools.accumulate(shard.count for shard in self.shards))
        self._open_file = open_file
        self._files = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Text:
        number = bisect.bisect_right(self._ends, index)
        shard = self.shards[number]
        record = shard.first + index - (self._ends[number] - shard.count)
        data = self._file(number).read(record)
        try:
            return self.parse(data, record == 0, record + 1 == shard.num_records)
        except ValueError as error:
            raise ValueError(f"{shard.path}, record {record}: {error}") from error

    def _file(self, number: int):
        if number not in self._files:
            _allow_open_files(len(self.shards))
            shard = self.shards[number]
            file = self._open_file(shard.path)
            if len(file) != shard.num_records:
                raise ValueError(
                    f"{shard.path} has {len(file)} records, {shard.num_records} were expected: "
                    "the file changed or belongs to another version"
                )
            self._files[number] = file
        return self._files[number]

    def __getstate__(self):
        return {**self.__dict__, "_files": {}}

    def __repr__(self) -> str:
        return f"TextSource({len(self)} records in {len(self.shards)} files)"


def open_source(source: str, split: str) -> TextSource:
    """Opens what `DataConfig.source` and `DataConfig.split` name.

    Raises:
      ValueError: nothing readable is there; the message says what was found.
    """
    found = _locate(source)
    if isinstance(found, epath.Path):
        return _open_tfds(found, split)
    kinds = {epath.Path(name).suffix for name in found}
    if kinds <= {".jsonl", ".json"}:
        return _open_files(found, split, record_files.LineFile, _parse_jsonl)
    if {".gz", ".zst", ".zip", ".parquet", ".jsonl", ".json"} & kinds:
        raise ValueError(f"cannot read {source}: {' and '.join(sorted(kinds))} files as one corpus")
    return _open_files(found, split, record_files.PieceFile, _parse_text)


def training_split(source: str, train_split: str, eval_split: str) -> str:
    """The split to train on: of files, `train` without what an evaluation reads as `validation`.

    Raises:
      ValueError: nothing readable is there; the message says what was found.
    """
    if isinstance(_locate(source), epath.Path):
        return train_split
    return splits.without_validation(train_split, eval_split)


def _locate(source: str) -> epath.Path | list[str]:
    """The prepared TFDS directory, or the files, that `source` names."""
    source = os.path.expanduser(source)
    path = epath.Path(source)
    if path.is_dir():
        is_prepared = (path / INFO_FILE).exists()
        texts = () if is_prepared else (str(file) for file in path.iterdir() if _is_text(file))
        return sorted(texts) or path
    paths = [str(path)] if path.exists() else _matching(source)
    if paths:
        return paths
    if is_dataset_name(source):
        return find_prepared(source)
    raise ValueError(f"no data at {source}: it is not a folder or a file, and no glob that matches")


def _is_text(file: epath.Path) -> bool:
    return file.suffix in (".jsonl", ".txt")


def _matching(pattern: str) -> list[str]:
    if not storage.is_remote(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    *bucket, inside = pattern.split("/", 3)  # gs:, nothing, the bucket's name, what is in it
    return sorted(map(str, epath.Path("/".join(bucket)).glob(inside)))


def _open_tfds(path: epath.Path, split: str) -> TextSource:
    if not (path / INFO_FILE).exists():
        below = (path.glob("*/" * depth + INFO_FILE) for depth in (1, 2, 3))
        inner = [str(info.parent) for level in below for info in level][:3]
        hint = f"; did you mean {' or '.join(inner)}?" if inner else ""
        raise ValueError(
            f"{path} is not a prepared TFDS directory (.../c4/en/3.0.1) and holds no .jsonl or "
            f".txt files: no {INFO_FILE} there{hint}"
        )
    import tensorflow_datasets as tfds  # takes half a second

    builder = tfds.builder_from_directory(path)
    readers = {
        "array_record": (record_files.ArrayRecordFile, record_blocks.read_array_records),
        "tfrecord": (record_files.TFRecordFile, record_blocks.read_tfrecords),
    }
    file_format = builder.info.file_format.value
    if file_format not in readers:
        raise ValueError(f"{path} holds {file_format} files; {' or '.join(readers)} can be read")
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"{path} has no split {split!r}: it has {known}") from error
    shards = [
        Shard(
            i.filename, i.skip, i.examples_in_shard if i.take == -1 else i.take, i.examples_in_shard
        )
        for i in instructions
    ]
    open_file, read_records = readers[file_format]
    return TextSource(shards, open_file, _parse_example, split, read_records)


def _open_files(paths: list[str], split: str, open_file, parse) -> TextSource:
    lengths = [len(open_file(path)) for path in paths]
    start, stop = splits.slice_of_files(split, sum(lengths))
    shards = []
    begin = 0
    for path, length in zip(paths, lengths, strict=True):
        first = min(max(start - begin, 0), length)
        last = min(max(stop - begin, 0), length)
        shards.append(Shard(path, first, last - first, length))
        begin += length
    return TextSource(shards, open_file, parse, split)


def _parse_example(record: bytes, is_first: bool, is_last: bool) -> Text:
    return _decoded(bytes_feature(record, "text"))


def _parse_jsonl(line: bytes, is_first: bool, is_last: bool) -> Text:
    if not line.strip():
        return Text("")
    whole = _decoded(line)
    try:
        text = json.loads(whole.text)["text"]
    except (ValueError, TypeError, KeyError, RecursionError):
        text = None
    if not isinstance(text, str):
        return Text("", is_malformed=True)
    return whole._replace(text=text)


def _parse_text(piece: bytes, is_first: bool, is_last: bool) -> Text:
    return _decoded(piece)._replace(begins_document=is_first, ends_document=is_last)


def _decoded(data: bytes) -> Text:
    try:
        return Text(data.decode("utf-8"))
    except UnicodeDecodeError:
        return Text(data.decode("utf-8", errors="replace"), is_valid_utf8=False)


def _names_and_sizes(paths: list[str]) -> list[tuple[str, int]]:
    """Checks that all files are there before anything is read."""
    sizes = storage.file_sizes(paths)
    missing = [path for path, size in zip(paths, sizes, strict=True) if not size]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} files are missing or empty, the first: {missing[0]}"
        )
    return [(path.rpartition("/")[2], size) for path, size in zip(paths, sizes, strict=True)]


def _allow_open_files(count: int) -> None:
    """Every shard stays open, and C4 has as many as the usual limit of open files, 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + 512 <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + 512, hard))
