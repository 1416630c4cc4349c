"""The training loop: the only place where model, data, training and evaluation meet."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from perceiver_ar_jax import data
from perceiver_ar_jax._version import __version__
from perceiver_ar_jax.command_line import program
from perceiver_ar_jax.data.loader import differing_entries
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.lowering import lower_train_step
from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.model.flops import training_flops
from perceiver_ar_jax.origin import Origin, find_origin, first_state
from perceiver_ar_jax.parallel import (
    batch_share,
    check_agreement,
    check_batch_size,
    connect_devices,
    gather,
    is_first,
    join_processes,
    make_mesh,
    on_first,
    to_global,
    use_mesh,
    wait_for_verdict,
)
from perceiver_ar_jax.parallel.chips import chip_of
from perceiver_ar_jax.preemption import Preemption
from perceiver_ar_jax.pretrained import CHECKPOINTS_FOLDER
from perceiver_ar_jax.run_config import RunConfig
from perceiver_ar_jax.run_header import header, memory_lines, next_commands
from perceiver_ar_jax.samples import Sampler
from perceiver_ar_jax.self_check import check_device
from perceiver_ar_jax.tokenizers import Tokenizer, load_tokenizer
from perceiver_ar_jax.training import Batch, TrainState
from perceiver_ar_jax.training.checkpoint import Checkpointer
from perceiver_ar_jax.training.goodput import Goodput
from perceiver_ar_jax.training.report import NonFiniteError, Report
from perceiver_ar_jax.training.timeline import Timeline
from perceiver_ar_jax.training.trackers import Tracker, check_installed, tracker_names
from perceiver_ar_jax.workdir import changed_settings, claimed, write_run

DONE, NON_FINITE = 0, 3


def run(run: RunConfig, workdir: str | Path, *, dry_run: bool = False) -> int:
    """Trains until `run.steps`, from where the workdir stands; returns the exit code.

    Every process of a run on several hosts calls it; the first one writes the files. Nothing is
    written before everything has been checked.

    Args:
      run: the settings.
      workdir: where the run lives; made if it is not there.
      dry_run: check, say what would be done, and write nothing.

    Raises:
      ValueError: the settings, the data or the tokenizer are unusable, or processes disagree.
      CheckpointError: the workdir has checkpoints, but none is intact.
      SaveError: a checkpoint cannot be written.
    """
    try:
        return _run(run, epath.Path(workdir), dry_run=dry_run)
    except Exception as error:
        if not isinstance(error, ValueError):  # a lost process may have caused it
            wait_for_verdict()
        raise


def _run(run: RunConfig, workdir: epath.Path, *, dry_run: bool) -> int:
    timeline = Timeline()
    tokenizer = load_tokenizer(run.data.tokenizer, vocab_size=run.model.vocab_size)
    join_processes(lost_after=run.lost_after)
    facts = {"config": _sha256(run.to_dict()), "tokenizer": tokenizer.sha256}
    check_agreement({"version": __version__, **facts})
    on_first(lambda: check_installed(tracker_names(run.trackers)))
    if run.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", run.compilation_cache)
    mesh = make_mesh(run.mesh, num_channels=run.model.num_channels)
    check_batch_size(run.batch_size, mesh, run.microbatches)
    connect_devices(mesh)
    if jax.default_backend() != "cpu":
        check_device(run.model)
    with contextlib.ExitStack() as stack:
        if not dry_run:
            on_first(lambda: stack.enter_context(claimed(workdir)))
        stack.enter_context(use_mesh(mesh))
        checkpointer = _checkpointer(run, workdir)
        origin = find_origin(run, workdir, checkpointer.steps(), tokenizer, _say)
        run = _with_frequencies(run, origin)
        sampler = Sampler(run.sample, run.model, tokenizer)
        loader = _open_data(run, tokenizer, mesh)
        for line in header(run, mesh, loader, tokenizer, workdir):
            _say(line)
        if dry_run:
            _say(json.dumps(run.to_dict(), indent=2))
            return DONE
        is_resumed = origin.workdir == workdir
        state, productive = _begin(run, mesh, origin, checkpointer, loader, is_resumed=is_resumed)
        step = int(state.step)
        if is_resumed and step >= run.steps:
            _say(f"already at step {step} of {run.steps}; raise config.steps to go on")
            checkpointer.close()
            return DONE
        eval_batches = _open_eval_data(run, tokenizer, mesh)
        check_agreement({"step to continue from": step, "data": _sha256(loader.fingerprint)})
        for line in on_first(lambda: changed_settings(workdir, run.to_dict())):
            _say(f"changed since the last start: {line}")
        if is_resumed:
            checkpointer.put_aside_after(step)
        on_first(lambda: write_run(workdir, run.model, tokenizer, run.to_dict()))
        trackers: list[Tracker] = []
        on_first(lambda: trackers.extend(_trackers(run, workdir)))
        loop = _Loop(
            run=run,
            mesh=mesh,
            state=state,
            loader=loader,
            eval_batches=eval_batches,
            sampler=sampler,
            checkpointer=checkpointer,
            report=_report(run, mesh, workdir, timeline, step, productive, trackers),
            saved=step if is_resumed else 0,
            profile_dir=workdir / "profile",
        )
        code = loop.train(sample_first=origin.is_trained)
        for line in next_commands(run, workdir) if code == DONE else ():
            _say(line)
        return code


@dataclasses.dataclass
class _Loop:
    """The state of a run while it trains, and what happens at each step."""

    run: RunConfig
    mesh: jax.sharding.Mesh
    state: TrainState
    loader: data.Loader
    eval_batches: data.EvaluationBatches
    sampler: Sampler
    checkpointer: Checkpointer
    report: Report
    saved: int  # the newest step that is in a checkpoint
    profile_dir: epath.Path

    def __post_init__(self):
        self.model = PerceiverAR(self.run.model)
        self.step = int(self.state.step)
        self.to_device = functools.partial(to_global, mesh=self.mesh)
        self.in_flight = None  # what `report` reads once the next step is running

    def train(self, *, sample_first: bool) -> int:
        """Steps, and what happens between them; returns the exit code."""
        run = self.run
        preemption = Preemption()
        try:
            self.compiled_step = self._compile()
            self.report.started()
            if self.step == 0 and not preemption.is_noted:
                self._evaluate(with_sample=sample_first)
            while self.step < run.steps and not preemption.reached(self.step):
                self._take_step()
                last = self.step == run.steps
                eval_loss = math.inf
                if (last or self.step % run.eval_every == 0) and not preemption.is_noted:
                    eval_loss = self._evaluate()
                if last or self.step % run.checkpoint_every == 0:
                    self._save(eval_loss)
            if self.saved < self.step:  # preempted
                self._save()
            self.report.write_window()
            self.checkpointer.close()
        except NonFiniteError as error:
            self.checkpointer.close()
            good = max(self.checkpointer.steps(), default="none")
            _say(f"{program()}: {error}; last good checkpoint: {good}", file=sys.stderr)
            return NON_FINITE
        finally:
            self.report.close()
            self.loader.close()
            preemption.close()
        return preemption.exit_code or DONE

    def _compile(self) -> jax.stages.Compiled:
        try:
            compiled = lower_train_step(self.run, self.mesh).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            first_line = next(line for line in str(error).splitlines() if line.strip())
            raise ValueError(
                f"the step does not fit into the memory of a device: {first_line.strip()}"
            ) from None
        for line in memory_lines(compiled, jax.local_device_count()):
            self.report.print(line)
        return compiled

    def _take_step(self) -> None:
        profile = self.run.profile
        if profile.num_steps and self.step == profile.first_step:
            jax.profiler.start_trace(str(self.profile_dir))
        arrays = self.report.timed_wait(lambda: next(self.loader))
        batch = self.to_device(Batch(**arrays))
        with jax.transfer_guard("disallow"):  # no hidden transfer delays a step
            self.state, metrics = self.compiled_step(self.state, batch)
            self._read_metrics()
        self.step += 1
        read_tokens = int((~arrays["pad_mask"]).sum()) * batch_share(self.mesh)[1]
        self.in_flight = self.step, metrics, read_tokens, self.loader.retries
        if profile.num_steps and self.step == profile.first_step + profile.num_steps:
            self._read_metrics()
            jax.profiler.stop_trace()

    def _read_metrics(self) -> None:
        if self.in_flight:
            self.report.read(*self.in_flight)
            self.in_flight = None

    def _evaluate(self, *, with_sample: bool = True) -> float:
        self._read_metrics()
        params = self.state.inference_params
        evaluation = evaluate(
            params,
            self.eval_batches,
            model=self.model,
            to_device=self.to_device,
        )
        self.report.evaluation(self.step, evaluation.loss, evaluation.bits_per_byte)
        if with_sample:
            self.report.sample(self.step, self.sampler(params))
        return evaluation.loss

    def _save(self, eval_loss: float = math.inf) -> None:
        self._read_metrics()  # a state that is not finite is never saved
        run_state = {
            "loader": data.merge_states(_distinct(gather(self.loader.get_state()))),
            "productive_seconds": self.report.goodput.productive,
        }
        self.checkpointer.save(self.state, run_state, eval_loss=eval_loss)
        self.saved = self.step
        self.report.saved()


def _with_frequencies(run: RunConfig, origin: Origin) -> RunConfig:
    """The run with the rotary frequencies that its first weights were trained with."""
    if not origin.rotary_inv_freq or run.model.rotary_inv_freq is not None:
        return run
    return run.replace(model=run.model.replace(rotary_inv_freq=origin.rotary_inv_freq))


def _open_data(run: RunConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> data.Loader:
    """The batches of this process's rows."""
    index, count = batch_share(mesh)
    config = dataclasses.replace(run.train_data, batch_size=run.batch_size // count)
    return data.make_loader(config, tokenizer, process_index=index, process_count=count)


def _open_eval_data(
    run: RunConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> data.EvaluationBatches:
    index, count = batch_share(mesh)
    return data.evaluation_batches(
        dataclasses.replace(run.eval_data, batch_size=run.batch_size // count),
        tokenizer,
        num_latents=run.model.max_latents,
        process_index=index,
        process_count=count,
    )


def _checkpointer(run: RunConfig, workdir: epath.Path) -> Checkpointer:
    return Checkpointer(
        workdir / CHECKPOINTS_FOLDER,
        keep_last=run.keep_checkpoints,
        keep_every=run.keep_every,
        keep_best=run.keep_best,
    )


def _begin(
    run: RunConfig,
    mesh: jax.sharding.Mesh,
    origin: Origin,
    checkpointer: Checkpointer,
    loader: data.Loader,
    *,
    is_resumed: bool,
) -> tuple[TrainState, float]:
    """The first state, with the loader at its place in the data, and the productive seconds."""
    if origin.workdir is not None and not is_resumed:
        checkpointer = Checkpointer(origin.workdir / CHECKPOINTS_FOLDER)
    state, run_state = first_state(run, mesh, origin, checkpointer)
    if run_state is None:
        return state, 0.0
    for line in run_state["skipped"]:
        _say(f"skipped: {line}", file=sys.stderr)
    _place_loader(run, loader, run_state["loader"])
    _say(f"resumed from step {int(state.step)} in {checkpointer.directory}")
    return state, run_state["productive_seconds"] if is_resumed else 0.0


def _place_loader(run: RunConfig, loader: data.Loader, state: dict[str, Any]) -> None:
    if run.data.allow_change:
        for line in differing_entries(state["fingerprint"], loader.fingerprint):
            _say(f"the data changed, as allowed: {line}")
        if len(state["positions"]) != run.batch_size:
            _say("the data starts over: the batch has another size")
            return
    loader.set_state(state, allow_other_data=run.data.allow_change)


def _trackers(run: RunConfig, workdir: epath.Path) -> Iterator[Tracker]:
    settings = run.to_dict()
    for name in tracker_names(run.trackers):
        yield Tracker(name, workdir, project=run.project, settings=settings)


def _report(
    run: RunConfig,
    mesh: jax.sharding.Mesh,
    workdir: epath.Path,
    timeline: Timeline,
    step: int,
    productive: float,
    trackers: Sequence[Tracker],
) -> Report:
    chip = chip_of(jax.devices()[0].device_kind)
    flops = training_flops(run.model, run.prefix_len, run.model.max_latents, run.latent_windows)
    goodput_file = workdir / "goodput.json" if is_first() else None
    return Report(
        workdir,
        timeline,
        step=step,
        total_steps=run.steps,
        log_every=run.log_every,
        optimizer=run.optimizer,
        goodput=Goodput(goodput_file, timeline, step=step, productive=productive),
        flops_per_step=run.batch_size * flops / mesh.size,
        peak_flops=chip and chip.peak_flops,
        trackers=trackers,
        is_silent=not is_first(),
    )


def _distinct(states):
    """One state for each group of rows; processes that feed the same rows have the same."""
    return list({state["first_row"]: state for state in states}.values())


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _say(text: str, file=None) -> None:
    if is_first():
        print(text, file=file or sys.stdout, flush=True)
