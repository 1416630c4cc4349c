"""Every setting of a run, its default, and what the parts below the training loop are made from.

A config file changes a `ConfigDict` of these settings, `--config.x=y` changes it once more, and
`RunConfig.from_config` turns it into the typed, checked value that everything below reads.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.data import DataConfig
from perceiver_ar_jax.parallel import MeshConfig
from perceiver_ar_jax.training import OptimizerConfig
from perceiver_ar_jax.training.trackers import tracker_names

AT_LEAST = {
    "seed": 0,
    "steps": 1,
    "batch_size": 1,
    "latent_windows": 1,
    "microbatches": 1,
    "log_every": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "keep_every": 0,
}


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where the text comes from."""

    source: str = ""  # c4/en:3.0.1, a directory, file, folder or glob; mirror:128; a:0.9,b:0.1
    tokenizer: str = "bytes"  # or a SentencePiece .model file, a tokenizer.json, a hub id
    train_split: str = "train"  # of files: all that eval_split does not take
    eval_split: str = "validation"  # of files: the last 2 %
    min_seq_len: int | None = None  # of the shortest training window; None: model.max_latents
    num_workers: int = 1  # processes that read and tokenize
    respect_documents: bool = False  # attention stays inside a document
    allow_change: bool = False  # continue although data or tokenizer are not the checkpoint's


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """The text that is sampled after each evaluation.

    Raises:
      ValueError: at construction, naming every problem at once.
    """

    prompt: str = "The"
    max_new_tokens: int = 64
    num_latents: int = 1  # of the prompt; more where the model's shape asks for more
    temperature: float = 0.8
    top_k: int = 40  # 0: all tokens

    def __post_init__(self):
        problems = []
        if not self.prompt:
            problems.append("sample.prompt must not be empty")
        for name, low in (("max_new_tokens", 1), ("num_latents", 1), ("top_k", 0)):
            if not _is_whole(getattr(self, name), low):
                problems.append(
                    f"sample.{name} must be a whole number of at least {low}, "
                    f"not {getattr(self, name)!r}"
                )
        if not 0 < self.temperature < math.inf:
            problems.append(f"sample.temperature must be above 0, not {self.temperature}")
        if problems:
            raise ValueError("; ".join(problems))


@dataclasses.dataclass(frozen=True)
class ProfileSettings:
    """Which steps the profiler watches."""

    first_step: int = 10
    num_steps: int = 0  # 0: none


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run; frozen and validated.

    Raises:
      ValueError: at construction, with all problems of all parts, before any device is touched.
    """

    seed: int = 0
    steps: int = 50_000
    batch_size: int = 64  # windows per step, over all devices
    latent_windows: int = 1  # windows of max_latents that a step trains in each sequence
    microbatches: int = 1  # gradient accumulation: each device holds the activations of one
    log_every: int = 50
    eval_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2  # the newest
    keep_every: int = 0  # and the steps that are multiples of this; 0: none
    keep_best: bool = False  # and the one of the lowest evaluation loss
    ema_decay: float = 0.0  # above 0: evaluate a moving average of the weights
    init_from: str = ""  # weights to begin with: a workdir, a converted or a PyTorch checkpoint
    resume_from: str = ""  # another run's workdir, to continue in this one
    trackers: str = ""  # wandb, trackio or both, with a comma: they get what metrics.jsonl gets
    project: str = "perceiver-ar-jax"  # under which trackers file the run
    compilation_cache: str = ""  # a folder that lets the next start skip the compiler
    lost_after: float = 60.0  # seconds without a sign of life of a host; the others then exit
    model: PerceiverARConfig = dataclasses.field(default_factory=PerceiverARConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    sample: SampleSettings = dataclasses.field(default_factory=SampleSettings)
    profile: ProfileSettings = dataclasses.field(default_factory=ProfileSettings)

    def __post_init__(self):
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))

    @classmethod
    def from_config(cls, config: ConfigDict) -> "RunConfig":
        """The run that a config file and its overrides describe.

        A warm-up that is longer than the run ends with it.
        """
        values = config.to_dict()
        optimizer = values["optimizer"]
        if 1 <= optimizer["total_steps"] < optimizer["warmup_steps"]:
            optimizer["warmup_steps"] = optimizer["total_steps"]
        problems = []

        def make(section, fields):
            unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(section)})
            problems.extend(f"{section.__name__} does not have the setting {x}" for x in unknown)
            fields = {name: value for name, value in fields.items() if name not in unknown}
            try:
                return section(**fields)
            except ValueError as error:
                problems.append(str(error))

        made = {name: make(section, values.pop(name)) for name, section in SECTIONS.items()}
        intact = {name: section for name, section in made.items() if section is not None}
        run = make(cls, values | intact)
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))
        return run

    @property
    def prefix_len(self) -> int:
        """Of a training sequence: what its windows of latents leave."""
        return self.model.max_seq_len - self.latent_windows * self.model.max_latents

    @property
    def train_data(self) -> DataConfig:
        """The whole batch's; each process reads its share."""
        return self._data_config(
            self.data.train_split,
            eval_split=self.data.eval_split,
            num_workers=self.data.num_workers,
        )

    @property
    def eval_data(self) -> DataConfig:
        """The whole batch's; each process reads its share."""
        return self._data_config(self.data.eval_split)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, nested as in the config file."""
        return dataclasses.asdict(self) | {"model": self.model.to_dict()}

    def replace(self, **changes) -> "RunConfig":
        """A copy with some fields changed; validated again."""
        return dataclasses.replace(self, **changes)

    def _data_config(self, split: str, **more) -> DataConfig:
        shortest = self.data.min_seq_len
        shortest = self.model.max_latents if shortest is None else shortest
        return DataConfig(
            source=self.data.source,
            split=split,
            min_seq_len=min(shortest, self.model.max_seq_len),
            max_seq_len=self.model.max_seq_len,
            batch_size=self.batch_size,
            seed=self.seed,
            respect_documents=self.data.respect_documents,
            **more,
        )

    def _problems(self) -> Iterator[str]:
        whole = True
        for name, low in AT_LEAST.items():
            if not _is_whole(getattr(self, name), low):
                whole = False
                yield f"{name} must be at least {low}, not {getattr(self, name)!r}"
        if not 0 <= self.ema_decay < 1:
            yield f"ema_decay must be from 0 to below 1, not {self.ema_decay}"
        if not 1 <= self.lost_after < 100:  # then JAX aborts by itself
            yield f"lost_after must be from 1 to below 100 seconds, not {self.lost_after}"
        try:
            tracker_names(self.trackers)
        except ValueError as error:
            yield str(error)
        if self.init_from and self.resume_from:
            yield "init_from and resume_from exclude each other"
        if self.sample.num_latents > self.model.max_latents:
            yield (
                f"sample.num_latents {self.sample.num_latents} exceeds model.max_latents "
                f"{self.model.max_latents}"
            )
        if whole and self.prefix_len < 0:
            yield (
                f"latent_windows {self.latent_windows} of {self.model.max_latents} latents do not "
                f"fit into max_seq_len {self.model.max_seq_len}"
            )
        if self.latent_windows != 1 and self.model.cross_attention_dropout:
            yield (
                "latent_windows above 1 needs model.cross_attention_dropout=0: it is drawn for one "
                "prefix"
            )
        if not self.data.source:
            yield (
                "data.source must be given: a file, folder or glob of text, a prepared TFDS "
                "directory, or a name such as c4/en:3.0.1"
            )
        elif whole:
            try:
                self.train_data, self.eval_data  # noqa: B018  they check themselves
            except ValueError as error:
                yield str(error)


SECTIONS = {
    "model": PerceiverARConfig,
    "optimizer": OptimizerConfig,
    "mesh": MeshConfig,
    "data": DataSettings,
    "sample": SampleSettings,
    "profile": ProfileSettings,
}


def default_config() -> ConfigDict:
    """Every setting of a run with its default, for a config file to change."""
    config = ConfigDict(
        {
            field.name: field.default
            for field in dataclasses.fields(RunConfig)
            if field.name not in SECTIONS
        }
    )
    config.model = ConfigDict(model_settings(PerceiverARConfig()))
    for name in SECTIONS.keys() - {"model"}:
        config[name] = ConfigDict(dataclasses.asdict(SECTIONS[name]()))
    config.model.max_heads_parallel = config_dict.placeholder(int)
    config.data.min_seq_len = config_dict.placeholder(int)
    config.optimizer.total_steps = config.get_oneway_ref("steps")
    return config


def model_settings(model: PerceiverARConfig) -> dict[str, Any]:
    """What a config file says of a model: `config.model.update(model_settings(…))`."""
    return {name: value for name, value in model.to_dict().items() if value is not None}


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
