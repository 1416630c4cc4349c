"""tf.train.Example without TensorFlow: a walk over the protocol buffer's wire format.

message Example   { Features features = 1; }
message Features  { map<string, Feature> feature = 1; }     # entries: key = 1, value = 2
message Feature   { oneof { BytesList bytes_list = 1; ... } }
message BytesList { repeated bytes value = 1; }
"""

from collections.abc import Iterator

_FIELD_1, _FIELD_2 = 0x0A, 0x12  # tags of length-delimited fields
_LENGTH_DELIMITED = 2  # in a tag's lowest three bits


def bytes_feature(example: bytes, name: str) -> bytes:
    """The first value of a bytes feature; empty if it has none.

    Raises:
      ValueError: the feature is missing or does not hold bytes, or the example is damaged.
    """
    wanted = name.encode()
    for _, start, end in _fields(example, 0, len(example)):
        for _, entry_start, entry_end in _fields(example, start, end):
            spans = {tag: (s, e) for tag, s, e in _fields(example, entry_start, entry_end)}
            key_start, key_end = spans.get(_FIELD_1, (0, 0))
            if example[key_start:key_end] == wanted:
                return _first_bytes(example, *spans.get(_FIELD_2, (0, 0)), name)
    raise ValueError(f"an example has no feature {name!r}")


def _first_bytes(example: bytes, start: int, end: int, name: str) -> bytes:
    for tag, list_start, list_end in _fields(example, start, end):
        if tag != _FIELD_1:
            raise ValueError(f"the feature {name!r} of an example holds numbers")
        for _, value_start, value_end in _fields(example, list_start, list_end):
            return example[value_start:value_end]
    return b""


def _fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(tag, start, end) of each length-delimited field; all fields of an example are."""
    while position < end:
        tag = data[position]
        position += 1
        length = shift = 0
        while position < end and shift < 64:
            byte = data[position]
            position += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        start, position = position, position + length
        if not shift or byte >= 0x80 or position > end or tag & 0x87 != _LENGTH_DELIMITED:
            raise ValueError(f"an example is damaged before byte {start}")
        yield tag, start, position
