"""What a run says before it begins, of sizes, devices and data, and at its end, of what is next."""

import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from perceiver_ar_jax.command_line import program
from perceiver_ar_jax.data import Loader
from perceiver_ar_jax.lowering import abstract_state
from perceiver_ar_jax.run_config import RunConfig

GIB = 2**30
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def header(
    run: RunConfig, mesh: jax.sharding.Mesh, loader: Loader, tokenizer: Any, workdir: epath.Path
) -> Iterator[str]:
    """The lines that a run begins with."""
    model, optimizer = run.model, run.optimizer
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_state(run, mesh).params))
    yield f"model      {count:,} parameters in {model.param_dtype}, computed in {model.dtype}"
    sizes = (f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    axes = " ".join(sizes) or "one device"
    fitted = " (as many as fit these devices)" if run.mesh.is_fitted else ""
    kind = mesh.devices.flat[0].device_kind
    processes = _count(jax.process_count(), "process", "es")
    yield f"devices    {mesh.size} × {kind} in {processes}, mesh {axes}{fitted}"
    sources = loader.fingerprint.get("sources", [loader.fingerprint])
    splits = " and ".join(dict.fromkeys(source["split"] for source in sources))
    records = sum(source["records"] for source in sources)
    in_files = ""
    if files := sum(source.get("files", 0) for source in sources):
        size = sum(source.get("bytes", 0) for source in sources)
        in_files = f" in {_count(files, 'file')}, {size / 1e6:,.1f} MB"
    yield (
        f"data       {run.train_data.source}, {splits}: "
        f"{_count(records, 'record')}{in_files}; evaluation on "
        f"{run.eval_data.split}; tokenizer {run.data.tokenizer}, {tokenizer.vocab_size:,} ids"
    )
    shortest, longest = run.train_data.min_seq_len, run.train_data.max_seq_len
    trained = run.batch_size * (longest - run.prefix_len)
    yield (
        f"step       {run.batch_size:,} windows of {shortest:,} to {longest:,} tokens, at most "
        f"{run.batch_size * longest:,} read and {trained:,} trained on"
    )
    yield (
        f"schedule   {_count(run.steps, 'step')}, learning rate {optimizer.learning_rate:g} after "
        f"{_count(optimizer.warmup_steps, 'step')} of warm-up"
    )
    yield f"workdir    {workdir}"


def memory_lines(compiled: jax.stages.Compiled, num_local_devices: int) -> Iterator[str]:
    """What a compiled step takes on each device, and whether that is more than there is."""
    memory = compiled.memory_analysis()
    if not memory:
        return
    kept = memory.argument_size_in_bytes
    needed = kept + memory.temp_size_in_bytes
    available, where = available_memory(num_local_devices)
    yield (
        f"memory     a step takes {kept / GIB:.2f} GiB of state and batch and "
        f"{memory.temp_size_in_bytes / GIB:.2f} GiB of temporaries per device"
    )
    if available is not None and needed > available:
        yield (
            f"WARNING    {needed / GIB:.1f} GiB per device will not fit: {where} has "
            f"{available / GIB:.1f} GiB for each. Lower batch_size, raise microbatches, set "
            "model.remat=full, or use more devices with an fsdp axis"
        )


def next_commands(run: RunConfig, workdir: epath.Path) -> Iterator[str]:
    """Commands that sample from a finished run and evaluate it, to paste where it was started."""
    settings, model = run.sample, f"--model={shlex.quote(str(workdir))}"
    prompt = shlex.quote(" ".join(settings.prompt.split()) or "The")
    filters = f" --top_k={settings.top_k}" if settings.top_k else ""
    yield (
        f"sample     {_command('sample')} {model} --prompt={prompt} "
        f"--temperature={settings.temperature:g}{filters}"
    )
    text = shlex.quote(run.eval_data.source)
    yield (
        f"evaluate   {_command('evaluate')} {model} --text={text} "
        f"--split={shlex.quote(run.eval_data.split)}"
    )


def _command(name: str) -> str:
    """As the run itself was started: with the script beside its own, or `perceiver-ar`."""
    if not program().endswith(".py"):
        return f"perceiver-ar {name}"
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    return f"{python} {os.path.join(os.path.dirname(sys.argv[0]), f'{name}.py')}"


def available_memory(num_local_devices: int) -> tuple[float | None, str]:
    """Bytes for each device of this process, and whose they are; None where nobody knows."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _host_memory() / num_local_devices, "this host"
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit, device.device_kind


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _host_memory():
    """Bytes of RAM that this process may use."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, CGROUP_LIMITS):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)
