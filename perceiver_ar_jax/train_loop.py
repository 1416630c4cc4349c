"""The training loop: the only place where model, data, training and evaluation meet."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from perceiver_ar_jax import data
from perceiver_ar_jax._version import __version__
from perceiver_ar_jax.data.loader import differing_entries
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.generation import generate
from perceiver_ar_jax.model import PerceiverAR, init_params
from perceiver_ar_jax.model.flops import training_flops
from perceiver_ar_jax.parallel import (
    batch_share,
    check_agreement,
    check_batch_size,
    gather,
    is_first,
    join_processes,
    make_mesh,
    on_first,
    state_shardings,
    to_global,
    use_mesh,
)
from perceiver_ar_jax.parallel.chips import chip_of
from perceiver_ar_jax.preemption import Preemption
from perceiver_ar_jax.pretrained import CHECKPOINTS_FOLDER, load_pretrained
from perceiver_ar_jax.run_config import Settings
from perceiver_ar_jax.tokenizers import load_tokenizer
from perceiver_ar_jax.training import (
    Batch,
    TrainState,
    learning_rate_schedule,
    make_optimizer,
    train_step,
)
from perceiver_ar_jax.training.checkpoint import Checkpointer
from perceiver_ar_jax.training.goodput import Goodput
from perceiver_ar_jax.training.report import NonFiniteError, Report
from perceiver_ar_jax.workdir import check_same_model, claimed, describe, stored_frequencies

DONE, NON_FINITE = 0, 3


def run(config: ConfigDict, workdir: str | Path) -> int:
    """Trains until `config.steps`, from where the workdir stands; returns the exit code.

    Every process of a run on several hosts calls it; the first one writes the files.

    Raises:
      ValueError: the config, the data or the tokenizer is unusable, or processes disagree.
      CheckpointError: the workdir has checkpoints, but none is intact.
      SaveError: a checkpoint cannot be written.
    """
    settings = Settings.from_config(config)
    tokenizer = load_tokenizer(config.data.tokenizer, vocab_size=settings.model.vocab_size)
    join_processes()
    facts = {"config": _sha256(_plain(config)), "tokenizer": tokenizer.sha256}
    check_agreement({"version": __version__, **facts})
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    mesh = make_mesh(settings.mesh)
    check_batch_size(config.batch_size, mesh, config.microbatches)
    workdir = epath.Path(workdir)
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(claimed(workdir)))
        stack.enter_context(use_mesh(mesh))
        return _Run(config, settings, tokenizer, mesh, workdir).train()


class _Run:
    """What changes while a run goes on: its state, step and checkpoints."""

    def __init__(self, config, settings, tokenizer, mesh, workdir):
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh

        # 1. The weights to begin with, and the folder, say what model this is.
        initial_params = None
        frequencies = on_first(lambda: stored_frequencies(workdir))
        if config.init_from:
            initial = load_pretrained(config.init_from)
            check_same_model(config.init_from, initial.config, settings.model)
            frequencies = frequencies or initial.config.rotary_inv_freq
            initial_params = initial.params
        model_config = settings.model
        if frequencies and model_config.rotary_inv_freq is None:
            model_config = model_config.replace(rotary_inv_freq=frequencies)
        self.model = PerceiverAR(model_config)
        changed = on_first(lambda: describe(workdir, model_config, tokenizer, _plain(config)))
        for line in changed:
            _say(f"changed since the last start: {line}")

        # 2. Data: each process reads its share of the rows.
        index, count = batch_share(mesh)
        share = {"process_index": index, "process_count": count}
        of_process = functools.partial(dataclasses.replace, batch_size=config.batch_size // count)
        self.loader = data.make_loader(of_process(settings.train_data), tokenizer, **share)
        self.eval_batches = data.evaluation_batches(
            of_process(settings.eval_data), tokenizer, num_latents=model_config.max_latents, **share
        )

        # 3. The state, born sharded.
        tx = make_optimizer(settings.optimizer)
        create = functools.partial(TrainState.create, tx=tx, ema_decay=config.ema_decay)
        fresh = lambda: create(params=init_params(self.model, jax.random.key(config.seed)))
        abstract = jax.eval_shape(fresh)
        self.shardings = state_shardings(abstract, mesh)

        # 4. Where the run stands: its newest intact checkpoint, another run's, or the beginning.
        self.checkpointer = Checkpointer(
            workdir / CHECKPOINTS_FOLDER,
            keep_last=config.keep_checkpoints,
            keep_every=config.keep_every,
            keep_best=config.keep_best,
        )
        productive, self.saved = 0.0, 0
        if self.checkpointer.steps():
            productive = self._restore(self.checkpointer, abstract)
            self.saved = int(self.state.step)
            self.checkpointer.put_aside_after(self.saved)
        elif config.resume_from:
            other = epath.Path(config.resume_from) / CHECKPOINTS_FOLDER
            self._restore(Checkpointer(other), abstract)
        elif initial_params is not None:
            placed = _placed(initial_params, self.shardings.params)
            self.state = jax.jit(
                lambda params: create(params=params), out_shardings=self.shardings
            )(placed)
        else:
            self.state = jax.jit(fresh, out_shardings=self.shardings)()
        self.step = int(self.state.step)

        # 5. Every process is to do the same.
        fingerprint = _sha256(self.loader.fingerprint)
        check_agreement({"step to go on from": self.step, "data": fingerprint})

        # 6. What a step is, and who tells of it.
        self.to_device = functools.partial(to_global, mesh=mesh)
        self.compiled_step = None  # compiled for the first batch
        chip = chip_of(jax.devices()[0].device_kind)
        flops = training_flops(model_config, model_config.max_prefix_len, model_config.max_latents)
        self.report = Report(
            workdir,
            step=self.step,
            total_steps=config.steps,
            log_every=config.log_every,
            learning_rate=learning_rate_schedule(settings.optimizer),
            goodput=Goodput(
                workdir / "goodput.json" if is_first() else None,
                step=self.step,
                productive=productive,
            ),
            flops_per_step=config.batch_size * flops / mesh.size,
            peak_flops=chip and chip.peak_flops,
            is_silent=not is_first(),
        )
        self.in_flight = None  # what `report` reads once the next step is under way
        self.profile_dir = workdir / "profile"

    def train(self) -> int:
        """Steps, and what happens between them; returns the exit code."""
        config = self.config
        preemption = Preemption()
        try:
            if self.step == 0:
                self._evaluate()
            while self.step < config.steps and not preemption.reached(self.step):
                self._take_step()
                last = self.step == config.steps
                eval_loss = math.inf
                if (last or self.step % config.eval_every == 0) and not preemption.is_noted:
                    eval_loss = self._evaluate()
                if last or self.step % config.checkpoint_every == 0:
                    self._save(eval_loss)
            if self.saved < self.step:  # preempted
                self._save()
            self.checkpointer.close()
        except NonFiniteError as error:
            self.checkpointer.close()
            good = max(self.checkpointer.steps(), default="none")
            _say(f"train.py: {error}; last good checkpoint: {good}", file=sys.stderr)
            return NON_FINITE
        finally:
            self.report.close()
            self.loader.close()
            preemption.close()
        return preemption.exit_code or DONE

    def _take_step(self) -> None:
        profile = self.config.profile
        if profile.num_steps and self.step == profile.first_step:
            jax.profiler.start_trace(str(self.profile_dir))
        arrays = self.report.timed_wait(lambda: next(self.loader))
        batch = self.to_device(
            Batch(
                arrays["tokens"],
                arrays["targets"],
                arrays["pad_mask"],
                arrays.get("segment_ids"),
            )
        )
        if self.compiled_step is None:
            self.compiled_step = self._compile(batch)
        with jax.transfer_guard("disallow"):  # nothing keeps a step waiting unseen
            self.state, metrics = self.compiled_step(self.state, batch)
            self._read_metrics()
        self.step += 1
        read_tokens = int((~arrays["pad_mask"]).sum()) * batch_share(self.mesh)[1]
        self.in_flight = self.step, metrics, read_tokens
        if profile.num_steps and self.step == profile.first_step + profile.num_steps:
            self._read_metrics()
            jax.profiler.stop_trace()

    def _compile(self, batch):
        step = functools.partial(
            train_step,
            model=self.model,
            prefix_len=self.model.config.max_prefix_len,
            key=jax.random.key(self.config.seed),
            microbatches=self.config.microbatches,
        )
        # The state leaves as it came in, whatever the compiler would prefer.
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))
        compiled = jitted.lower(self.state, batch).compile()
        if memory := compiled.memory_analysis():
            self.report.print(
                f"a step on each device: {memory.argument_size_in_bytes / 2**30:.2f} GiB of state "
                f"and batch, {memory.temp_size_in_bytes / 2**30:.2f} GiB beside them"
            )
        return compiled

    def _read_metrics(self) -> None:
        if self.in_flight:
            self.report.read(*self.in_flight)
            self.in_flight = None

    def _evaluate(self) -> float:
        self._read_metrics()
        params = self.state.inference_params
        evaluation = evaluate(
            params,
            self.eval_batches,
            model=self.model,
            prefix_len=self.model.config.max_prefix_len,
            num_bytes=self.eval_batches.num_bytes,
            to_device=self.to_device,
        )
        self.report.evaluation(self.step, evaluation.loss, evaluation.bits_per_byte)
        text = _sample(self.config.sample, self.model, params, self.tokenizer)
        self.report.sample(self.step, text)
        return evaluation.loss

    def _save(self, eval_loss: float = math.inf) -> None:
        self._read_metrics()  # a state that is not finite is never saved
        run_state = {
            "loader": data.merge_states(_distinct(gather(self.loader.get_state()))),
            "productive_seconds": self.report.goodput.productive,
        }
        self.checkpointer.save(self.state, run_state, eval_loss=eval_loss)
        self.saved = self.step

    def _restore(self, checkpointer: Checkpointer, abstract: TrainState) -> float:
        """Takes over state and place in the data; returns the seconds that they took."""
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            abstract,
            self.shardings,
        )
        self.state, run_state, skipped = checkpointer.restore(like)
        for line in skipped:
            _say(f"skipped: {line}", file=sys.stderr)
        self._place_loader(run_state["loader"])
        _say(f"resumed from step {int(self.state.step)} in {checkpointer.directory}")
        return run_state["productive_seconds"]

    def _place_loader(self, state: dict[str, Any]) -> None:
        if self.config.data.allow_change:
            for line in differing_entries(state["fingerprint"], self.loader.fingerprint):
                _say(f"the data changed, as allowed: {line}")
            if len(state["positions"]) != self.config.batch_size:
                _say("the data begins anew: the batch has another size")
                return
        self.loader.set_state(state, allow_other_data=self.config.data.allow_change)


def _placed(params, shardings):
    """Parameters that each process holds whole, spread over the mesh."""

    def spread(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda at: np.asarray(x[at]))

    return jax.tree.map(spread, params, shardings)


def _distinct(states):
    """Processes that feed the same rows have the same state."""
    return list({state["first_row"]: state for state in states}.values())


def _plain(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _say(text: str, file=None) -> None:
    if is_first():
        print(text, file=file or sys.stdout, flush=True)


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
        vocab_size=tokenizer.vocab_size,
        rng=jax.random.key(0),
    )
    return tokenizer.decode(np.asarray(tokens)[0])
