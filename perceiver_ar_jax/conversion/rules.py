"""The table that maps every parameter of perceiver-io to one of ours, and back."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model.positions import inverse_frequencies

# perceiver-io saves the rotary frequencies as a tensor; here they are `config.rotary_inv_freq`.
FREQUENCIES = "input_adapter.frq_pos_encoding.inv_freq"
TOKEN_EMBEDDING = "input_adapter.txt_embedding.weight"


class Transform(NamedTuple):
    """How an array of perceiver-io becomes ours, and the inverse."""

    to_flax: Callable[[np.ndarray, PerceiverARConfig], np.ndarray]
    to_torch: Callable[[np.ndarray, PerceiverARConfig], np.ndarray]


class Rule(NamedTuple):
    """One parameter: our path, perceiver-io's name and shape, and the way between them."""

    flax: str
    torch: str
    torch_shape: str  # a letter of `_sizes` per dimension
    transform: Transform


def rotary_channel_order(config: PerceiverARConfig) -> np.ndarray:
    """For each output channel of our q_proj and k_proj the channel of perceiver-io it holds, (D,).

    perceiver-io rotates neighbouring channels, our model two contiguous halves. Queries and keys
    move alike, so attention scores stay the same, in layers without rotation too.
    """
    rotated = np.arange(config.num_rotated_channels)
    rest = np.arange(config.num_rotated_channels, config.head_dim)
    head = np.concatenate([rotated[0::2], rotated[1::2], rest])
    starts = np.arange(config.num_heads) * config.head_dim
    return (starts[:, None] + head).reshape(-1)


SAME = Transform(lambda x, config: x, lambda x, config: x)
TRANSPOSED = Transform(lambda x, config: x.T, lambda x, config: x.T)
ROTARY = Transform(
    lambda x, config: x[rotary_channel_order(config)].T,
    lambda x, config: x.T[np.argsort(rotary_channel_order(config))],
)


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/scale", f"{theirs}.weight", "D", SAME),
        Rule(f"{ours}/bias", f"{theirs}.bias", "D", SAME),
    )


def _attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/q_proj/kernel", f"{theirs}.q_proj.weight", "DD", ROTARY),
        Rule(f"{ours}/k_proj/kernel", f"{theirs}.k_proj.weight", "DD", ROTARY),
        Rule(f"{ours}/v_proj/kernel", f"{theirs}.v_proj.weight", "DD", TRANSPOSED),
        Rule(f"{ours}/o_proj/kernel", f"{theirs}.o_proj.weight", "DD", TRANSPOSED),
    )


def _mlp(ours: str, theirs: str, width: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{ours}/norm", f"{theirs}.0"),
        Rule(f"{ours}/up/kernel", f"{theirs}.1.weight", f"{width}D", TRANSPOSED),
        Rule(f"{ours}/down/kernel", f"{theirs}.3.weight", f"D{width}", TRANSPOSED),
    )


TABLE = (
    Rule("token_embedding/embedding", TOKEN_EMBEDDING, "VD", SAME),
    Rule("position_embedding/embedding", "input_adapter.pos_embedding.weight", "SD", SAME),
    *_norm("cross_attention/q_norm", "cross_attention.0.module.q_norm"),
    *_norm("cross_attention/kv_norm", "cross_attention.0.module.kv_norm"),
    *_attention("cross_attention/attention", "cross_attention.0.module.attention"),
    Rule(
        "cross_attention/attention/o_proj/bias",
        "cross_attention.0.module.attention.o_proj.bias",
        "D",
        SAME,
    ),
    *_mlp("cross_attention/mlp", "cross_attention.1.module", "C"),
    *_norm("self_attention_{i}/norm", "self_attention.{i}.0.module.norm"),
    *_attention("self_attention_{i}/attention", "self_attention.{i}.0.module.attention"),
    *_mlp("self_attention_{i}/mlp", "self_attention.{i}.1.module", "F"),
    *_norm("out_norm", "out_norm"),
    Rule("output_bias", "output_adapter.bias", "V", SAME),
)

# Parameters that a model has only if this field of its config is true.
OPTIONAL = {
    "position_embedding": "abs_pos_emb",
    "out_norm": "output_norm",
    "output_bias": "output_bias",
}


def rules(config: PerceiverARConfig) -> list[Rule]:
    """The rows of `TABLE` that a model with this config has, one per parameter."""
    result = []
    for rule in TABLE:
        switch = OPTIONAL.get(rule.flax.split("/")[0])
        if switch is not None and not getattr(config, switch):
            continue
        layers = range(config.num_self_attention_layers) if "{i}" in rule.torch else range(1)
        result += [
            rule._replace(flax=rule.flax.format(i=i), torch=rule.torch.format(i=i)) for i in layers
        ]
    return result


def torch_shape(rule: Rule, config: PerceiverARConfig) -> tuple[int, ...]:
    """Shape of a parameter in perceiver-io."""
    return _shape(rule.torch_shape, config)


def to_flax(tensors: Mapping[str, Any], config: PerceiverARConfig) -> dict[str, Any]:
    """Our parameters, nested dicts of `config.param_dtype`, from perceiver-io's tensors.

    `tensors` has perceiver-io's names without a prefix; its values are arrays, or have a shape
    and become an array by `np.asarray`, one at a time.

    Raises:
      ValueError: names every tensor that is missing, left over or of another shape, and
        frequencies that are not `config.rotary_inv_freq`.
    """
    check_tensors(tensors, config)
    frequencies = np.asarray(tensors[FREQUENCIES]).astype(np.float32)
    if not np.array_equal(frequencies, inverse_frequencies(config)):
        raise ValueError(f"config.rotary_inv_freq differs from the tensor {FREQUENCIES}")
    dtype = np.dtype(config.param_dtype)
    params: dict[str, Any] = {}
    for rule in rules(config):
        array = rule.transform.to_flax(np.asarray(tensors[rule.torch]), config)
        *parents, leaf = rule.flax.split("/")
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = _aligned_copy(array, dtype)
    return params


def to_torch(params: Mapping[str, Any], config: PerceiverARConfig) -> dict[str, np.ndarray]:
    """perceiver-io's tensors, by name without a prefix, from our parameters; dtypes stay.

    Raises:
      ValueError: names every parameter that is missing, left over or of another shape.
    """
    return dict(iterate_torch(params, config))


def iterate_torch(
    params: Mapping[str, Any], config: PerceiverARConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """The items of `to_torch`, made one at a time so that a large model need not exist twice."""
    leaves = checked_leaves(params, config)
    yield FREQUENCIES, _frequencies_to_store(config)
    for rule in rules(config):
        array = np.asarray(leaves[rule.flax])
        yield rule.torch, np.ascontiguousarray(rule.transform.to_torch(array, config))


def torch_specs(
    params: Mapping[str, Any], config: PerceiverARConfig
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and shape of the items of `iterate_torch`, in its order."""
    leaves = checked_leaves(params, config)
    frequencies = _frequencies_to_store(config)
    return {FREQUENCIES: (frequencies.dtype, frequencies.shape)} | {
        rule.torch: (np.dtype(leaves[rule.flax].dtype), torch_shape(rule, config))
        for rule in rules(config)
    }


def checked_leaves(params: Mapping[str, Any], config: PerceiverARConfig) -> dict[str, Any]:
    """Our parameters by path; raises ValueError unless they are those of a model of `config`."""
    leaves = _flatten(params)
    wanted = {
        rule.flax: rule.torch_shape if rule.transform is SAME else rule.torch_shape[::-1]
        for rule in rules(config)
    }
    _check(leaves, wanted, config, "parameter")
    return leaves


def check_tensors(tensors: Mapping[str, Any], config: PerceiverARConfig) -> None:
    """Raises ValueError unless names and shapes are those of a perceiver-io model of `config`."""
    if config.num_self_attention_layers > len(tensors):
        raise ValueError(
            f"the config asks for {config.num_self_attention_layers} self-attention layers, "
            f"the checkpoint has {len(tensors)} tensors in all"
        )
    wanted = {rule.torch: rule.torch_shape for rule in rules(config)} | {FREQUENCIES: "R"}
    _check(tensors, wanted, config, "tensor")


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
    leaves = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            leaves |= _flatten(value, f"{path}{name}/")
        else:
            leaves[path + name] = value
    return leaves


def _aligned_copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A C-contiguous copy in memory that `jax.device_put` takes over on the CPU, uncopied."""
    alignment = 64
    buffer = np.empty(array.size * dtype.itemsize + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    end = start + array.size * dtype.itemsize
    copy = buffer[start:end].view(dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _frequencies_to_store(config: PerceiverARConfig) -> np.ndarray:
    """In `param_dtype` where that loses nothing, as a bf16 model of perceiver-io has them."""
    frequencies = inverse_frequencies(config)
    rounded = frequencies.astype(ml_dtypes.bfloat16)
    if config.param_dtype == "bfloat16" and np.array_equal(rounded, frequencies):
        return rounded
    return frequencies
