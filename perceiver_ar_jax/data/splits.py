"""Splits of files: all of a text is `train`, its last 2 % are `validation` too."""

import re

_SPLIT = re.compile(r"(\w*)(?:\[(-?\d+|)(%?):(-?\d+|)(%?)\])?")
_TRAINING_PERCENT = 98


def slice_of_files(split: str, length: int) -> tuple[int, int]:
    """Start and stop of `train`, `train[10:]`, `validation[:50%]` (rounded down) among `length`.

    Raises:
      ValueError: files have no such split.
    """
    match = _SPLIT.fullmatch(split)
    if not match:
        raise ValueError(f"cannot read the split {split!r}: use a form like train[:95%]")
    name, *bounds = match.groups()
    if name not in ("train", "validation"):
        raise ValueError(
            f"no split {split!r}: files have train, which is all of them, and validation, the last "
            f"{100 - _TRAINING_PERCENT} %"
        )
    first = _TRAINING_PERCENT * length // 100 if name == "validation" else 0
    start, stop = _slice(*bounds, length - first)
    return first + start, first + stop


def _slice(start: str, start_percent: str, stop: str, stop_percent: str, length: int):
    start = int(start or 0) * length // 100 if start_percent else int(start or 0)
    stop = int(stop or 100) * length // 100 if stop_percent else int(stop or length)
    start, stop, _ = slice(start, stop).indices(length)
    return start, max(start, stop)


def without_validation(train_split: str, eval_split: str) -> str:
    """What of files is for training; not what an evaluation on `validation` takes."""
    if train_split == "train" and eval_split.partition("[")[0] == "validation":
        return f"train[:{_TRAINING_PERCENT}%]"
    return train_split
