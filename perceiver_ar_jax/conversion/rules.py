"""How a source's tensors become our parameters and back: a table of rules, and what reads it.

A source is one architecture in one library. All that is known of it is a value of `Rules` in a file
of its own (perceiver_io.py); nothing here or in the readers of files names a tensor.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model.positions import inverse_frequencies


class Transform(NamedTuple):
    """How an array of the source becomes ours, and the inverse."""

    to_flax: Callable[[np.ndarray, PerceiverARConfig], np.ndarray]
    to_torch: Callable[[np.ndarray, PerceiverARConfig], np.ndarray]


SAME = Transform(lambda x, config: x, lambda x, config: x)
TRANSPOSED = Transform(lambda x, config: x.T, lambda x, config: x.T)


class Rule(NamedTuple):
    """One parameter: our path, the source's name and shape, and the way between them.

    `{i}` in both names stands for the index of a self-attention layer.
    """

    flax: str
    torch: str
    torch_shape: str  # a letter of `_sizes` per dimension
    transform: Transform


@dataclasses.dataclass(frozen=True)
class Rules:
    """All that is known of a source.

    Attributes:
      name: what messages call it.
      model_type: `model_type` in its config.json.
      anchor: a tensor that every checkpoint has. What wrappers put before its name is dropped.
      frequencies: the tensor of the rotary frequencies; here they are `config.rotary_inv_freq`.
      table: a rule per parameter.
      optional: first part of our path → the boolean field of the config that asks for it.
      read_config: our config from the content of a config.json or a Lightning file's
        hyper_parameters; the path is for warnings. Raises ValueError.
      write_config: the content of config.json.
      written_prefix: what stands before the names of tensors in a file that we write.
      logits: the source's own model applied to its tensors, for verification; imports what it
        needs lazily, and raises ImportError without it.
    """

    name: str
    model_type: str
    anchor: str
    frequencies: str
    table: tuple[Rule, ...]
    optional: Mapping[str, str]
    read_config: Callable[[Mapping[str, Any], Path], PerceiverARConfig]
    write_config: Callable[[PerceiverARConfig], dict[str, Any]]
    written_prefix: str
    logits: Callable[..., np.ndarray]

    def of_model(self, config: PerceiverARConfig) -> list[Rule]:
        """The rules of a model with this config, one per parameter."""
        result = []
        for rule in self.table:
            switch = self.optional.get(rule.flax.split("/")[0])
            if switch is not None and not getattr(config, switch):
                continue
            layers = range(config.num_self_attention_layers) if "{i}" in rule.torch else range(1)
            result += [
                rule._replace(flax=rule.flax.format(i=i), torch=rule.torch.format(i=i))
                for i in layers
            ]
        return result

    def to_flax(self, tensors: Mapping[str, Any], config: PerceiverARConfig) -> dict[str, Any]:
        """Our parameters, nested dicts of `config.param_dtype`, from the source's tensors.

        `tensors` has the source's names without a prefix; its values are arrays, or have a shape
        and become an array by `np.asarray`, one at a time.

        Raises:
          ValueError: names every tensor that is missing, left over or of another shape, and
            frequencies that are not `config.rotary_inv_freq`.
        """
        self.check_tensors(tensors, config)
        frequencies = np.asarray(tensors[self.frequencies]).astype(np.float32)
        if not np.array_equal(frequencies, inverse_frequencies(config)):
            raise ValueError(f"config.rotary_inv_freq differs from the tensor {self.frequencies}")
        dtype = np.dtype(config.param_dtype)
        params: dict[str, Any] = {}
        for rule in self.of_model(config):
            array = rule.transform.to_flax(np.asarray(tensors[rule.torch]), config)
            *parents, leaf = rule.flax.split("/")
            node = params
            for name in parents:
                node = node.setdefault(name, {})
            node[leaf] = _aligned_copy(array, dtype)
        return params

    def to_torch(self, params: Mapping[str, Any], config: PerceiverARConfig) -> dict[str, Any]:
        """The source's tensors, by name without a prefix, from our parameters; dtypes stay.

        Raises:
          ValueError: names every parameter that is missing, left over or of another shape.
        """
        return dict(self.iterate_torch(params, config))

    def iterate_torch(
        self, params: Mapping[str, Any], config: PerceiverARConfig
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The items of `to_torch`, made one at a time so that a large model exists only once."""
        leaves = self.checked_leaves(params, config)
        yield self.frequencies, _frequencies_to_store(config)
        for rule in self.of_model(config):
            array = np.asarray(leaves[rule.flax])
            yield rule.torch, np.ascontiguousarray(rule.transform.to_torch(array, config))

    def torch_specs(
        self, params: Mapping[str, Any], config: PerceiverARConfig
    ) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Dtype and shape of the items of `iterate_torch`, in its order."""
        leaves = self.checked_leaves(params, config)
        frequencies = _frequencies_to_store(config)
        return {self.frequencies: (frequencies.dtype, frequencies.shape)} | {
            rule.torch: (np.dtype(leaves[rule.flax].dtype), torch_shape(rule, config))
            for rule in self.of_model(config)
        }

    def checked_leaves(
        self, params: Mapping[str, Any], config: PerceiverARConfig
    ) -> dict[str, Any]:
        """Our parameters by path; raises ValueError unless a model of `config` has just these."""
        leaves = _flatten(params)
        wanted = {
            rule.flax: rule.torch_shape if rule.transform is SAME else rule.torch_shape[::-1]
            for rule in self.of_model(config)
        }
        _check(leaves, wanted, config, "parameter")
        return leaves

    def check_tensors(self, tensors: Mapping[str, Any], config: PerceiverARConfig) -> None:
        """Raises ValueError unless names and shapes are those of a model of `config`."""
        if config.num_self_attention_layers > len(tensors):
            raise ValueError(
                f"the config asks for {config.num_self_attention_layers} self-attention layers, "
                f"the checkpoint has {len(tensors)} tensors in all"
            )
        wanted = {rule.torch: rule.torch_shape for rule in self.of_model(config)}
        _check(tensors, wanted | {self.frequencies: "R"}, config, "tensor")


def torch_shape(rule: Rule, config: PerceiverARConfig) -> tuple[int, ...]:
    """Shape of a parameter in the source."""
    return _shape(rule.torch_shape, config)


def _sizes(config: PerceiverARConfig) -> dict[str, tuple[str, int]]:
    """What a letter of a shape stands for, and how much it is."""
    D = config.num_channels
    cross, self_ = config.cross_attention_widening_factor, config.self_attention_widening_factor
    return {
        "V": ("vocab_size", config.vocab_size),
        "S": ("max_seq_len", config.max_seq_len),
        "D": ("num_channels", D),
        "C": ("cross_attention_widening_factor x num_channels", cross * D),
        "F": ("self_attention_widening_factor x num_channels", self_ * D),
        "R": ("rotary frequencies", config.num_rotated_channels // 2),
    }


def _shape(letters: str, config: PerceiverARConfig) -> tuple[int, ...]:
    return tuple(_sizes(config)[letter][1] for letter in letters)


def _check(
    found: Mapping[str, Any], wanted: Mapping[str, str], config: PerceiverARConfig, noun: str
) -> None:
    """Compares arrays by name with the shapes, in letters, that the config asks for."""

    def asked(name):
        sizes = [_sizes(config)[letter] for letter in wanted[name]]
        return "(" + ", ".join(f"{field} {size}" for field, size in sizes) + ")"

    shapes = {name: tuple(array.shape) for name, array in found.items()}
    differing = [n for n in wanted if n in found and shapes[n] != _shape(wanted[n], config)]
    kinds = {
        "missing": [f"{name} {asked(name)}" for name in wanted if name not in found],
        "left over": [f"{name} {shapes[name]}" for name in found if name not in wanted],
        "of another shape": [f"{name} {shapes[name]}, not {asked(name)}" for name in differing],
    }
    problems = [
        f"{len(names)} {kind}: " + ", ".join(names[:8]) + ", …" * (len(names) > 8)
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        raise ValueError(f"the {noun}s are not those of the config: " + "; ".join(problems))


def _flatten(params: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            leaves |= _flatten(value, f"{path}{name}/")
        else:
            leaves[path + name] = value
    return leaves


def _aligned_copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A C-contiguous copy, aligned so that `jax.device_put` on CPU takes it over uncopied."""
    alignment = 64
    buffer = np.empty(array.size * dtype.itemsize + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    end = start + array.size * dtype.itemsize
    copy = buffer[start:end].view(dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _frequencies_to_store(config: PerceiverARConfig) -> np.ndarray:
    """In `param_dtype` where that loses nothing, as a bf16 model of the source has them."""
    frequencies = inverse_frequencies(config)
    rounded = frequencies.astype(ml_dtypes.bfloat16)
    if config.param_dtype == "bfloat16" and np.array_equal(rounded, frequencies):
        return rounded
    return frequencies
