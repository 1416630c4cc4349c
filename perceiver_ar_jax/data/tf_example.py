"""tf.train.Example without TensorFlow: a walk over the protocol buffer's wire format.

message Example   { Features features = 1; }
message Features  { map<string, Feature> feature = 1; }     # entries: key = 1, value = 2
message Feature   { oneof { BytesList bytes_list = 1; ... } }
message BytesList { repeated bytes value = 1; }
"""

from collections.abc import Iterator

_FIELD_1, _FIELD_2 = 0x0A, 0x12  # tags of length-delimited fields


def bytes_feature(example: bytes, name: str) -> bytes:
    """The first value of a bytes feature.

    Raises:
      ValueError: no such feature.
    """
    wanted = name.encode()
    for _, start, end in _fields(example, 0, len(example)):
        for _, entry_start, entry_end in _fields(example, start, end):
            spans = {tag: (s, e) for tag, s, e in _fields(example, entry_start, entry_end)}
            key_start, key_end = spans[_FIELD_1]
            if example[key_start:key_end] == wanted:
                for _, list_start, list_end in _fields(example, *spans[_FIELD_2]):
                    for _, value_start, value_end in _fields(example, list_start, list_end):
                        return example[value_start:value_end]
                return b""
    raise ValueError(f"an example has no feature {name!r}")


def _fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(tag, start, end) of each length-delimited field."""
    while position < end:
        tag = data[position]
        position += 1
        length = shift = 0
        while True:
            byte = data[position]
            position += 1
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        yield tag, position, position + length
        position += length
