"""Every setting of a run, and what the parts below the training loop are made from."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict, config_dict

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.data import DataConfig
from perceiver_ar_jax.parallel import MeshConfig
from perceiver_ar_jax.training import OptimizerConfig

AT_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "microbatches": 1,
    "log_every": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "keep_every": 0,
}


def default_config() -> ConfigDict:
    """Every setting of a run, with its default; a config file changes some."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 50_000
    config.batch_size = 64  # sequences a step, over all devices
    config.microbatches = 1  # parts of a batch whose activations are held one at a time
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 1000
    config.keep_checkpoints = 2  # the newest
    config.keep_every = 0  # and the steps that this divides
    config.keep_best = False  # and the one of the lowest evaluation loss
    config.ema_decay = 0.0  # above 0, a running average of the weights is what is evaluated
    config.init_from = ""  # weights to begin with: a workdir, a converted or a PyTorch checkpoint
    config.resume_from = ""  # another run's workdir, to go on from in this one
    config.compilation_cache = ""  # a folder that lets the next start skip the compiler

    model = PerceiverARConfig().to_dict()
    config.model = ConfigDict({name: x for name, x in model.items() if x is not None})
    config.model.max_heads_parallel = config_dict.placeholder(int)
    config.optimizer = ConfigDict(dataclasses.asdict(OptimizerConfig()))
    config.optimizer.total_steps = config.get_oneway_ref("steps")
    config.mesh = ConfigDict(dataclasses.asdict(MeshConfig()))

    config.data = ConfigDict()
    config.data.source = ""  # a prepared TFDS directory, or a name such as c4/en:3.0.1
    config.data.text = ""  # or a file or glob of UTF-8 text or JSONL, in place of it
    config.data.tokenizer = "bytes"  # or a SentencePiece .model file, or a hub id
    config.data.train_split = "train"  # of files: all that eval_split does not take
    config.data.eval_split = "validation"  # of files: the last 2 %
    config.data.min_seq_len = 512
    config.data.num_workers = 1
    config.data.respect_documents = False  # attention stays inside a document
    config.data.allow_change = False  # go on although the data is not the checkpoint's

    config.sample = ConfigDict()
    config.sample.prompt = "The"
    config.sample.max_new_tokens = 64
    config.sample.num_latents = 1
    config.sample.temperature = 0.8
    config.sample.top_k = 40

    config.profile = ConfigDict()
    config.profile.first_step = 10  # the first of the steps that the profiler watches
    config.profile.num_steps = 0  # how many; 0: none
    return config


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run's config, checked.

    `batch_size` of the data is that of the whole batch; each process reads its share.
    """

    model: PerceiverARConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    train_data: DataConfig
    eval_data: DataConfig

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Settings":
        """Raises ValueError with all problems of all parts, before any device is touched."""
        sections = config.to_dict()
        problems = []

        def make(factory, **fields):
            try:
                return factory(**fields)
            except ValueError as error:
                problems.append(str(error))

        data = {
            "source": config.data.text or config.data.source,
            "min_seq_len": min(config.data.min_seq_len, config.model.max_seq_len),
            "max_seq_len": config.model.max_seq_len,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "respect_documents": config.data.respect_documents,
        }
        problems += _problems(sections)
        settings = cls(
            model=make(PerceiverARConfig, **sections["model"]),
            optimizer=make(OptimizerConfig, **sections["optimizer"]),
            mesh=make(MeshConfig, **sections["mesh"]),
            train_data=make(
                DataConfig,
                split=config.data.train_split,
                eval_split=config.data.eval_split,
                num_workers=config.data.num_workers,
                **data,
            ),
            eval_data=make(DataConfig, split=config.data.eval_split, **data),
        )
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))
        return settings


def _problems(sections: dict[str, Any]):
    for name, low in AT_LEAST.items():
        if sections[name] < low:
            yield f"{name} must be at least {low}, not {sections[name]}"
    if not 0 <= sections["ema_decay"] < 1:
        yield f"ema_decay must be from 0 to below 1, not {sections['ema_decay']}"
    if bool(sections["data"]["text"]) == bool(sections["data"]["source"]):
        yield "one of data.source and data.text must be given"
    if sections["init_from"] and sections["resume_from"]:
        yield "init_from and resume_from exclude each other"
