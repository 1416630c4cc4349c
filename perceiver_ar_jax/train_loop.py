"""The training loop: the only place where model, data, training and evaluation meet."""

import dataclasses
import functools
import json
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, config_dict

from perceiver_ar_jax import data
from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.data.tokenizer import load_tokenizer
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.generation import generate
from perceiver_ar_jax.model import PerceiverAR, init_params
from perceiver_ar_jax.parallel import MeshConfig, make_mesh, state_shardings, to_global
from perceiver_ar_jax.pretrained import CHECKPOINTS_FOLDER
from perceiver_ar_jax.training import (
    Batch,
    OptimizerConfig,
    TrainState,
    learning_rate_schedule,
    make_optimizer,
    train_step,
)
from perceiver_ar_jax.training.checkpoint import Checkpointer
from perceiver_ar_jax.training.report import NonFiniteError, Report
from perceiver_ar_jax.workdir import claimed, describe

DONE, NON_FINITE = 0, 3
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}  # and the exit codes after them


def default_config() -> ConfigDict:
    """Every setting of a run, with its default; a config file changes some."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 50_000
    config.batch_size = 64  # sequences a step, over all devices
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 1000
    config.keep_checkpoints = 2

    model = PerceiverARConfig().to_dict()
    config.model = ConfigDict({name: x for name, x in model.items() if x is not None})
    config.model.max_heads_parallel = config_dict.placeholder(int)
    config.optimizer = ConfigDict(dataclasses.asdict(OptimizerConfig()))
    config.optimizer.total_steps = config.get_oneway_ref("steps")
    config.mesh = ConfigDict(dataclasses.asdict(MeshConfig()))

    config.data = ConfigDict()
    config.data.source = ""  # a prepared TFDS directory, such as …/c4/en/3.0.1
    config.data.text = ""  # or a file or glob of UTF-8 text or JSONL, in place of it
    config.data.tokenizer = "bytes"  # or a SentencePiece .model file
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.min_seq_len = 512
    config.data.num_workers = 1

    config.sample = ConfigDict()
    config.sample.prompt = "The"
    config.sample.max_new_tokens = 64
    config.sample.num_latents = 1
    config.sample.temperature = 0.8
    config.sample.top_k = 40
    return config


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run's config, checked: what the parts below the loop are made from."""

    model: PerceiverARConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    train_data: data.DataConfig
    eval_data: data.DataConfig

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

        for name in ("steps", "batch_size", "log_every", "eval_every", "checkpoint_every"):
            if sections[name] < 1:
                problems.append(f"{name} must be at least 1, not {sections[name]}")
        if sections["batch_size"] % jax.process_count():
            problems.append(f"batch_size {config.batch_size} over {jax.process_count()} processes")
        text, source = config.data.text, config.data.source
        if bool(text) == bool(source):
            problems.append("one of data.source and data.text must be given")
        # Files have no splits of their own: the last 2 % are for evaluation.
        train_split = "train[:98%]" if text else config.data.train_split
        eval_split = "train[98%:]" if text else config.data.eval_split
        shared = {
            "source": text or source,
            "min_seq_len": min(config.data.min_seq_len, config.model.max_seq_len),
            "max_seq_len": config.model.max_seq_len,
            "batch_size": max(1, config.batch_size // jax.process_count()),
            "seed": config.seed,
        }
        settings = cls(
            model=make(PerceiverARConfig, **sections["model"]),
            optimizer=make(OptimizerConfig, **sections["optimizer"]),
            mesh=make(MeshConfig, **sections["mesh"]),
            train_data=make(
                data.DataConfig, split=train_split, num_workers=config.data.num_workers, **shared
            ),
            eval_data=make(data.DataConfig, split=eval_split, **shared),
        )
        if problems:
            raise ValueError("; ".join(problems))
        return settings


def run(config: ConfigDict, workdir: str | Path) -> int:
    """Trains until `config.steps`, from where the workdir stands; returns the exit code.

    Raises:
      ValueError: the config, the data or the tokenizer is unusable.
      CheckpointError: the workdir has checkpoints, but none is intact.
    """
    settings = Settings.from_config(config)
    tokenizer = load_tokenizer(config.data.tokenizer, vocab_size=settings.model.vocab_size)
    with claimed(Path(workdir)):
        return _train(config, settings, tokenizer, Path(workdir))


def _train(config: ConfigDict, settings: Settings, tokenizer: Any, workdir: Path) -> int:
    # 1. The folder says what run this is.
    run_config = json.loads(config.to_json_best_effort())
    for line in describe(workdir, settings.model, tokenizer, run_config):
        print(f"changed since the last start: {line}", flush=True)

    # 2. Data.
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    loader = data.make_loader(settings.train_data, tokenizer, **processes)
    eval_batches = data.evaluation_batches(
        settings.eval_data, tokenizer, num_latents=settings.model.max_latents, **processes
    )

    # 3. The state, born sharded.
    model = PerceiverAR(settings.model)
    mesh = make_mesh(settings.mesh)
    tx = make_optimizer(settings.optimizer)

    def create_state():
        return TrainState.create(params=init_params(model, jax.random.key(config.seed)), tx=tx)

    shardings = state_shardings(jax.eval_shape(create_state), mesh)

    # 4. Where the run stands: the newest intact checkpoint, or its beginning.
    checkpointer = Checkpointer(workdir / CHECKPOINTS_FOLDER, keep_last=config.keep_checkpoints)
    if checkpointer.steps():
        state, data_state, skipped = checkpointer.restore(_abstract(create_state, shardings))
        loader.set_state(data_state)
        for line in skipped:
            print(f"skipped: {line}", file=sys.stderr)
        print(f"resumed from step {int(state.step)}", flush=True)
    else:
        state = jax.jit(create_state, out_shardings=shardings)()
    step = saved = int(state.step)

    # 5. Steps, and what happens between them.
    step_fn = jax.jit(
        functools.partial(
            train_step,
            model=model,
            prefix_len=settings.model.max_prefix_len,
            key=jax.random.key(config.seed),
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),  # as it came in, whatever the compiler would prefer
    )
    to_device = functools.partial(to_global, mesh=mesh)
    report = Report(
        workdir,
        step=step,
        total_steps=config.steps,
        log_every=config.log_every,
        learning_rate=learning_rate_schedule(settings.optimizer),
    )
    preemption = _Preemption()
    in_flight = None  # what `report` reads once the next step is under way

    def evaluate_and_sample():
        evaluation = evaluate(
            state.params,
            eval_batches,
            model=model,
            prefix_len=settings.model.max_prefix_len,
            num_bytes=eval_batches.num_bytes,
            to_device=to_device,
        )
        report.evaluation(step, evaluation.loss, evaluation.bits_per_byte)
        report.sample(step, _sample(config.sample, model, state.params, tokenizer))

    try:
        if step == 0:
            evaluate_and_sample()
        while step < config.steps and not preemption.exit_code:
            arrays = report.timed_wait(lambda: next(loader))
            batch = Batch(arrays["tokens"], arrays["targets"], arrays["pad_mask"])
            state, metrics = step_fn(state, to_device(batch))
            if in_flight:
                report.read(*in_flight)
            step += 1
            read_tokens = int((~arrays["pad_mask"]).sum()) * jax.process_count()
            in_flight = step, metrics, read_tokens

            last = step == config.steps
            saves = last or step % config.checkpoint_every == 0
            evaluates = last or step % config.eval_every == 0
            if saves or evaluates:
                report.read(*in_flight)  # a state that is not finite is never saved
                in_flight = None
            if saves:
                checkpointer.save(state, loader.get_state())
                saved = step
            if evaluates and not preemption.exit_code:
                evaluate_and_sample()
        if saved < step:  # preempted, at whatever point of the step
            if in_flight:
                report.read(*in_flight)
            checkpointer.save(state, loader.get_state())
        checkpointer.close()
    except NonFiniteError as error:
        steps = checkpointer.steps()
        good = f"the last good checkpoint is step {steps[-1]}" if steps else "none was saved yet"
        print(f"train.py: {error}; {good}", file=sys.stderr)
        return NON_FINITE
    finally:
        report.close()
        loader.close()
        preemption.close()
    return preemption.exit_code or DONE


def _abstract(create_state, shardings):
    """Shapes and layouts of a state that is not made."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(create_state),
        shardings,
    )


class _Preemption:
    """Notes SIGTERM or Ctrl-C, so that the run can save and leave; a second one ends it at once."""

    def __init__(self):
        self.exit_code = None
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def close(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.exit_code = SIGNALS[number]
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)


def _sample(settings, model, params, tokenizer):
    """The prompt and what the model makes of it."""
    prompt = np.asarray([tokenizer.encode(settings.prompt)])
    tokens = generate(
        model,
        params,
        prompt,
        max_new_tokens=settings.max_new_tokens,
        num_latents=min(settings.num_latents, prompt.shape[1]),
        do_sample=True,
        temperature=settings.temperature,
        top_k=settings.top_k,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        rng=jax.random.key(0),
    )
    return tokenizer.decode(np.asarray(tokens)[0])
