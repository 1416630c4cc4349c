import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text is read, and how it is cut into batches; frozen and validated.

    `source` is a prepared TFDS directory (`.../c4/en/3.0.1`), a dataset's name (`c4/en:3.0.1`,
    looked up in $TFDS_DATA_DIR, otherwise in ~/tensorflow_datasets), or a file, a folder or a glob
    of `.jsonl` (documents under the key "text") or plain text (one document per file, read in
    pieces).
    Several sources with weights are one string, `c4/en:3.0.1:0.9,mine/*.jsonl:0.1`: each training
    window comes from one of them, drawn by weight; evaluation reads one after the other.
    `split` may be a slice, `train[:1%]`. Of files `train` is everything and `validation` the last
    2 %.

    Raises:
      ValueError: at construction, naming every problem at once.
    """

    source: str
    split: str = "train"
    min_seq_len: int = 512
    max_seq_len: int = 1024
    batch_size: int = 8  # rows of this process
    seed: int = 0
    shuffle: bool = True
    repeat: bool = True  # endless epochs, each in another order
    num_workers: int = 0  # processes that read and tokenise; 0 reads in this one
    eval_split: str = ""  # for files: `train` leaves out what an evaluation on it reads
    respect_documents: bool = False  # batches say which document a token belongs to

    def __post_init__(self):
        problems = [
            f"{name} must be a whole number of at least {low}, not {getattr(self, name)!r}"
            for name, low in (
                ("min_seq_len", 1),
                ("max_seq_len", 1),
                ("batch_size", 1),
                ("seed", 0),
                ("num_workers", 0),
            )
            if not _is_at_least(low, getattr(self, name))
        ]
        lengths = self.min_seq_len, self.max_seq_len
        if all(_is_at_least(1, length) for length in lengths) and lengths[0] > lengths[1]:
            problems.append(f"min_seq_len {self.min_seq_len} > max_seq_len {self.max_seq_len}")
        if not self.source:
            problems.append("source is empty")
        else:
            try:
                split_sources(self.source)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("DataConfig: " + "; ".join(problems))


def _is_at_least(low: int, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def split_sources(source: str) -> list[tuple[str, float]]:
    """(source, weight) of each of `a:0.9,b:0.1`; anything else is one source with weight 1.

    Raises:
      ValueError: some parts have a weight and others do not, or a weight is not above 0.
    """
    parts = [part.strip().rpartition(":") for part in source.split(",")]
    numbers = [_number(weight) for _, _, weight in parts]
    if len(parts) == 1 or all(number is None for number in numbers):
        return [(source, 1.0)]
    for (name, _, _), number, text in zip(parts, numbers, source.split(","), strict=True):
        if not name or number is None or not 0 < number < math.inf:
            raise ValueError(
                f"source {text.strip()!r} needs a weight above 0: name:weight, such as "
                "c4/en:3.0.1:0.9"
            )
    return [(name, number) for (name, _, _), number in zip(parts, numbers, strict=True)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
