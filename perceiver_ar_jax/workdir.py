"""The folder of a run: one run at a time, always the same model, and what it says of itself."""

import contextlib
import fcntl
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from perceiver_ar_jax._version import __version__
from perceiver_ar_jax.config import COMPUTATION, TRAINING, PerceiverARConfig, fields_with_role
from perceiver_ar_jax.data.loader import differing_entries
from perceiver_ar_jax.lease import leased
from perceiver_ar_jax.pretrained import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    write_description,
)
from perceiver_ar_jax.training.metrics import is_remote


@contextlib.contextmanager
def claimed(workdir: epath.Path) -> Iterator[None]:
    """Makes the folder and holds it for this run.

    Raises:
      ValueError: another run holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if str(workdir).startswith("gs://"):
        with leased(f"{workdir}/lease"):
            yield
        return
    if is_remote(workdir):  # other storage is not locked
        yield
        return
    with (workdir / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {workdir}") from None
        yield


def check_same_run(
    workdir: epath.Path, model: PerceiverARConfig, tokenizer: Any
) -> tuple[float, ...] | None:
    """Compares a run's model and tokenizer with those that are to continue it; reads only.

    Returns:
      The rotary frequencies that the run took over with its first weights, if it did.

    Raises:
      ValueError: the workdir holds another model or tokenizer; says how they differ.
    """
    stored = _stored(workdir)
    theirs = stored["model"]
    frequencies = theirs.get("rotary_inv_freq")
    taken_over = ("rotary_inv_freq",) if model.rotary_inv_freq is None else ()
    fields = _without(model, fields_with_role(COMPUTATION) + taken_over)
    different = differing_entries({name: theirs.get(name) for name in fields}, fields)
    if stored["tokenizer_sha256"] != tokenizer.sha256:
        different.append("the tokenizer's sha256")
    if different:
        raise ValueError(f"{workdir} belongs to another model: {'; '.join(different)}")
    return frequencies and tuple(frequencies)


def check_same_model(source: str, theirs: PerceiverARConfig, ours: PerceiverARConfig) -> None:
    """Raises ValueError if a run of config `ours` cannot begin with the weights of `source`."""
    free = (*fields_with_role(COMPUTATION, TRAINING), "rotary_inv_freq")  # which are taken over
    if not ours.abs_pos_emb:  # without a table of positions, the window is free
        free += ("max_seq_len", "max_latents")
    different = differing_entries(_without(theirs, free), _without(ours, free))
    if different:
        raise ValueError(f"{source} is another model: {'; '.join(different)}")


def changed_settings(workdir: epath.Path, run: Mapping[str, Any]) -> list[str]:
    """A line for each setting that differs from the run's last start; reads only."""
    if not (workdir / CONFIG_FILE).exists():
        return []
    return differing_entries(_flat(_stored(workdir).get("run", {})), _flat(run))


def write_run(
    workdir: epath.Path, model: PerceiverARConfig, tokenizer: Any, run: Mapping[str, Any]
) -> None:
    """Writes config, tokenizer and machine to a claimed folder, once all checks have passed."""
    (workdir / TOKENIZER_FOLDER).mkdir(exist_ok=True)
    tokenizer.save(workdir / TOKENIZER_FOLDER)
    write_description(
        workdir,
        model,
        tokenizer_sha256=tokenizer.sha256,
        respect_documents=run["data"]["respect_documents"],
        run=run,
    )
    environment = {
        "command": sys.argv,
        "perceiver_ar_jax": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
        "host": platform.node(),
    }
    (workdir / "env.json").write_text(json.dumps(environment, indent=2) + "\n")


def _without(config: PerceiverARConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: x for name, x in config.to_dict().items() if name not in names}


def _stored(workdir: epath.Path) -> dict[str, Any]:
    path = workdir / CONFIG_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{workdir} is not the workdir of a run: no {CONFIG_FILE}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
