import dataclasses


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text is read, and how it is cut into batches; frozen and validated.

    `source` is a prepared TFDS directory (`.../c4/en/3.0.1`), a dataset's name (`c4/en:3.0.1`,
    looked up in $TFDS_DATA_DIR, otherwise in ~/tensorflow_datasets), or a file, a folder or a glob
    of `.jsonl` (documents under the key "text") or plain text (one document per file, read in
    pieces).
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
        if problems:
            raise ValueError("DataConfig: " + "; ".join(problems))


def _is_at_least(low: int, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
