"""Files of any content: what is in them or a ValueError; nothing executed, no time, no memory."""

import codecs
import contextlib
import json
import pickle
import pickletools
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from reference_tensors import (
    SMALL,
    assert_same_bits,
    random_tensors,
    write_config,
    write_hub_folder,
    write_tensors,
)
from torch_zip import STORAGES, mapping, number, tensor, text, write_archive, write_state_dict

from perceiver_ar_jax.conversion import read_reference, to_flax
from perceiver_ar_jax.conversion.perceiver_io import PERCEIVER_IO
from perceiver_ar_jax.conversion.pickles import read_pickle
from perceiver_ar_jax.conversion.reference_config import config_to_reference
from perceiver_ar_jax.conversion.safetensors_files import read_safetensors
from perceiver_ar_jax.conversion.torch_files import read_torch_file

WEIGHTS = {
    "w": np.arange(6, dtype=np.float32),
    "v": np.ones((2, 2), np.float32).astype(ml_dtypes.bfloat16),
    "step": np.array(7),
}
# Codecs that zip archives, JSON and pickles may ask for: the first time, they are imported.
UNICODE = [
    "utf-8-sig",
    *(f"utf-{bits}{order}" for bits in (16, 32) for order in ("", "-be", "-le")),
]
for codec in ("cp437", "raw-unicode-escape", *UNICODE):
    codecs.lookup(codec)
FORBIDDEN = ("code.", "compile", "ctypes.", "exec", "import", "marshal.", "os.", "pickle.")
FORBIDDEN += ("shutil.", "socket.", "subprocess.")
events = None  # a list while the interpreter is watched


def _note(event, arguments):
    if events is not None:
        is_write = event == "open" and not str(arguments[1] or "r").startswith("r")
        if is_write or event.startswith(FORBIDDEN):
            events.append((event, *map(str, arguments)))


sys.addaudithook(_note)


@contextlib.contextmanager
def harmless(size: int, memory_per_byte: int = 20):
    """Asserts that the block executes nothing, and is quick and small like an input of `size`."""
    global events
    tracemalloc.start()
    start = time.thread_time()
    events = []
    try:
        yield
    finally:
        seen, events = events, None
        seconds = time.thread_time() - start
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert not seen
    assert peak < 2**19 + memory_per_byte * size
    assert seconds < 1 + 2e-5 * size


def arrays_or_value_error(read, path) -> dict[str, np.ndarray] | None:
    """The arrays that a file turns out to hold, in no more memory than it; None if refused."""
    size = path.stat().st_size
    with harmless(size):
        try:
            content = read(path)
            if not isinstance(content, dict):
                return None
            arrays = {name: np.asarray(item) for name, item in content.items()}
        except ValueError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            return None
    for array in arrays.values():  # expanded ones have more elements than memory
        start, end = np.lib.array_utils.byte_bounds(array)
        assert end - start <= size or array.dtype == object
    return arrays


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Where the bad file of an example goes."""
    return tmp_path_factory.mktemp("fuzzing") / "file"


INTERESTING = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1])


@st.composite
def damaged(draw, good: bytes) -> bytes:
    """Bits flipped; bytes overwritten, by odd integers too, deleted, inserted, repeated; cuts."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        end = place + draw(st.integers(0, 40))
        match draw(st.sampled_from(["flip", "bytes", "integer", "delete", "repeat", "cut"])):
            case "flip":
                data[place : place + 1] = bytes(
                    byte ^ 1 << draw(st.integers(0, 7)) for byte in data[place : place + 1]
                )
            case "bytes":
                data[place:end] = draw(st.binary(max_size=12))
            case "integer":
                width = draw(st.sampled_from([1, 2, 4, 8]))
                value = draw(INTERESTING | st.integers(0, 2 * len(good))) % 2 ** (8 * width)
                data[place : place + width] = value.to_bytes(width, "little")
            case "delete":
                del data[place:end]
            case "repeat":
                data[end:end] = data[place:end] * draw(st.integers(1, 9))
            case "cut":
                del data[place:]
    return bytes(data)


def good_file(write) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "good"), WEIGHTS)
        return Path(folder, "good").read_bytes()


GOOD_ZIP, GOOD_SAFETENSORS = good_file(write_state_dict), good_file(write_tensors)

dtypes = st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int8, np.bool_])
arrays = dtypes.flatmap(
    lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, min_side=0))
)


@given(st.dictionaries(st.text(max_size=9).filter(lambda name: name != "__metadata__"), arrays))
def test_any_arrays_in_a_safetensors_file_come_back(path, tensors):
    write_tensors(path, tensors)
    assert_same_bits(read_safetensors(path), tensors)


@given(damaged(GOOD_SAFETENSORS))
def test_a_damaged_safetensors_file_is_refused_or_gives_the_bytes_that_are_there(path, data):
    path.write_bytes(data)
    found = arrays_or_value_error(read_safetensors, path) or {}
    start = 8 + int.from_bytes(data[:8], "little")
    for name, array in found.items():
        first, last = json.loads(data[8:start])[name]["data_offsets"]
        assert array.tobytes() == data[start + first : start + last]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=5)
    | INTERESTING
    | st.integers(-9, 99),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "F64"]) | json_values,
        "shape": st.lists(st.integers(-1, 9) | INTERESTING, max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 99) | INTERESTING, max_size=3) | json_values,
        "more": json_values,
    },
)


@given(st.dictionaries(st.text(max_size=3), entries | json_values) | json_values, st.binary())
def test_a_safetensors_header_may_claim_anything(path, header, data):
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    arrays_or_value_error(read_safetensors, path)


@given(damaged(GOOD_ZIP))
def test_a_damaged_zip_gives_arrays_or_a_value_error(path, data):
    path.write_bytes(data)
    arrays_or_value_error(read_torch_file, path)


@given(st.integers(0, 8 * len(GOOD_ZIP) - 1))
def test_a_zip_with_one_bit_flipped_is_refused_or_unchanged(path, place):
    data = bytearray(GOOD_ZIP)
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    found = arrays_or_value_error(read_torch_file, path)
    if found is not None:
        assert_same_bits(found, WEIGHTS)


@given(st.integers(0, len(GOOD_ZIP) - 1))
def test_a_zip_that_is_cut_off_is_refused(path, length):
    path.write_bytes(GOOD_ZIP[:length])
    with pytest.raises(ValueError, match=str(path)):
        read_torch_file(path)


odd = st.integers(0, 9) | INTERESTING | st.integers(-3, -1)
claimed_tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["float32", "bfloat16", "int64"]),
        "key": st.sampled_from(["0", "1", "2", "../data.pkl"]),
        "start": odd,
    }
).flatmap(
    lambda fields: st.lists(st.tuples(odd, odd), max_size=4).map(
        lambda sizes: fields | {"shape": [n for n, _ in sizes], "strides": [m for _, m in sizes]}
    )
)


@given(st.lists(claimed_tensors, max_size=4), st.binary(max_size=200))
def test_a_pickled_tensor_is_a_view_of_its_storage_or_refused(path, tensors, data):
    storages = {"0": data, "1": bytes(range(40))}
    items = {str(i): pickled_tensor(**fields) for i, fields in enumerate(tensors)}
    write_archive(path, mapping(items), storages)
    for name, array in (arrays_or_value_error(read_torch_file, path) or {}).items():
        fields = tensors[int(name)]
        raw = storages[fields["key"]]
        stored = np.frombuffer(raw[: len(raw) // array.itemsize * array.itemsize], array.dtype)
        assert array.shape == tuple(fields["shape"])
        for index in np.ndindex(array.shape):
            steps = zip(index, fields["strides"], strict=True)
            place = fields["start"] + sum(i * step for i, step in steps)
            assert array[index].tobytes() == stored[place].tobytes()


def pickled_tensor(*, dtype, key, start, shape, strides) -> bytes:
    """As `torch_zip.tensor` makes it, with integers of any size."""
    integer = lambda value: b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)
    storage = b"(" + text("storage") + f"ctorch\n{STORAGES[dtype]}\n".encode()
    storage += text(key) + text("cpu") + number(0) + b"tQ"
    sizes = [b"(" + b"".join(map(integer, values)) + b"t" for values in (shape, strides)]
    place = integer(start) + b"".join(sizes)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + b"\x89}tR"


STATE_DICT = mapping({"weight": tensor("0", "float32", (2, 3), (3, 1)), "step": b"K\x05"}) + b"."
opcodes = st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])
calls = st.sampled_from(
    [b"cbuiltins\neval\n", b"cantigravity\nfly\n", b"ios\nsystem\n", b"X\2\0\0\0os", b"(tR"]
)
opcode_soup = st.lists(opcodes | st.binary(max_size=3) | calls, max_size=60).map(b"".join)


@given(st.binary(max_size=200) | damaged(STATE_DICT) | opcode_soup)
def test_any_bytes_are_a_pickle_of_inert_objects_or_a_value_error(data):
    constructors = {"collections.OrderedDict": dict, "torch._utils._rebuild_tensor_v2": tuple}
    with harmless(len(data), memory_per_byte=150), contextlib.suppress(ValueError):
        read_pickle(data, constructors=constructors, persistent_load=lambda pid: None)


MODEL = SMALL.replace(num_self_attention_layers=1, vocab_size=5, max_seq_len=6)
FIELDS = config_to_reference(MODEL)
PARAMETERS = {rule.flax for rule in PERCEIVER_IO.of_model(MODEL)}
changed_fields = st.dictionaries(st.sampled_from(sorted(FIELDS)), json_values, max_size=3)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_hub_folder(folder, MODEL, random_tensors(MODEL))
    return folder


def convert_or_value_error(source, size: int):
    """Reads and converts, as `load_pretrained` does; None if refused."""
    with harmless(size, memory_per_byte=40), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read_reference(source)
            return found.config, to_flax(found.tensors, found.config)
        except ValueError as error:
            assert str(source) in str(error)
            assert "\n" not in str(error)
            return None


@given(damaged((json.dumps({"model_type": "", "model_config": FIELDS})).encode()))
def test_a_damaged_config_gives_a_model_or_a_value_error(model_folder, data):
    (model_folder / "config.json").write_bytes(data)
    convert_or_value_error(model_folder, 20_000)


@given(changed_fields)
def test_config_fields_of_any_type_give_a_model_of_the_same_shapes_or_a_value_error(
    model_folder, changes
):
    write_config(model_folder, MODEL, **changes)
    converted = convert_or_value_error(model_folder, 20_000)
    if converted is not None:
        kept = {name: getattr(converted[0], name) for name in ("vocab_size", "num_channels")}
        assert kept == {"vocab_size": 5, "num_channels": 16}
        assert converted[1]["token_embedding"]["embedding"].shape == (5, 16)


@given(changed_fields)
def test_lightning_settings_of_any_type_give_a_model_or_a_value_error(path, changes):
    values = {name: pickle.dumps(value, 2)[2:-1] for name, value in (FIELDS | changes).items()}
    tensors, storages = {}, {}
    for key, (name, array) in enumerate(random_tensors(MODEL).items()):
        steps = [step // array.itemsize for step in array.strides]
        tensors[f"model.{name}"] = tensor(str(key), array.dtype.name, array.shape, steps)
        storages[str(key)] = array.tobytes()
    content = {"state_dict": mapping(tensors), "hyper_parameters": mapping(values)}
    write_archive(path, mapping(content), storages)
    convert_or_value_error(path, path.stat().st_size)


@given(st.data())
def test_a_damaged_model_file_gives_a_whole_model_or_a_value_error(model_folder, data):
    write_hub_folder(model_folder, MODEL, random_tensors(MODEL))
    weights = model_folder / "model.safetensors"
    good = weights.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    weights.write_bytes(data.draw(damaged(good[:header])) + good[header:])
    converted = convert_or_value_error(model_folder, len(good))
    if converted is not None:
        assert set(PERCEIVER_IO.checked_leaves(converted[1], converted[0])) == PARAMETERS
