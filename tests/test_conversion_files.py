import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from reference_tensors import (
    CONFIGS,
    SMALL,
    assert_same_bits,
    prefixed,
    random_tensors,
    write_config,
    write_hub_folder,
    write_tensors,
)
from torch_zip import mapping, tensor, text, write_archive, write_state_dict

from perceiver_ar_jax.conversion import checkpoint_files, read_reference, to_flax, write_reference
from perceiver_ar_jax.conversion.safetensors_files import read_safetensors
from perceiver_ar_jax.conversion.torch_files import OLD_MAGIC, read_torch_file
from perceiver_ar_jax.conversion.writers import new_folder

TENSORS = random_tensors(SMALL)
NAMED = prefixed(TENSORS, "backend_model.")
ROOT = Path(__file__).resolve().parent.parent


def write_shards(folder, suffix, write):
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(NAMED)
    places = {name: f"{stem}-{i % 3 + 1:05d}-of-00003.{suffix}" for i, name in enumerate(names)}
    for place in set(places.values()):
        write(folder / place, {name: NAMED[name] for name in names if places[name] == place})
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_lightning(path, tensors, config):
    """A .ckpt with hyper_parameters, some of them of classes that are not there to be imported."""
    fields = {
        "vocab_size": b"J" + config.vocab_size.to_bytes(4, "little"),
        "max_seq_len": b"K" + bytes([config.max_seq_len]),
        "max_latents": b"K" + bytes([config.max_latents]),
        "num_channels": b"K" + bytes([config.num_channels]),
        "num_heads": b"K" + bytes([config.num_heads]),
        "max_heads_parallel": b"N",
        "num_self_attention_layers": b"K" + bytes([config.num_self_attention_layers]),
        "num_self_attention_rotary_layers": b"K\x01",
        "self_attention_widening_factor": b"K\x04",
        "cross_attention_widening_factor": b"K\x02",
        "cross_attention_dropout": b"G\x3f\xe0\0\0\0\0\0\0",
        "post_attention_dropout": b"G\0\0\0\0\0\0\0\0",
        "residual_dropout": b"G\0\0\0\0\0\0\0\0",
        "output_norm": b"\x89",
        "output_bias": b"\x88",
        "abs_pos_emb": b"\x88",
        "init_scale": b"G\x3f\x94z\xe1G\xae\x14{",
        "activation_checkpointing": b"\x88",
        "activation_offloading": b"\x89",
        "params": b"N",
        "validation_sample_prompt": text("Once upon a time"),
        "folder": b"cpathlib\nPosixPath\n(" + text("data") + b"tR",
    }
    attribute_dict = b"clightning_fabric.utilities.data\nAttributeDict\n)\x81"
    hyper_parameters = attribute_dict + mapping(fields)[1:]
    state, storages = {}, {}
    for index, (name, array) in enumerate(tensors.items()):
        strides = [step // array.itemsize for step in array.strides]
        state["model." + name] = tensor(str(index), array.dtype.name, array.shape, strides)
        storages[str(index)] = array.tobytes()
    content = {
        "epoch": b"K\x03",
        "callbacks": mapping({"a": b"csome.plugin\nState\n)\x81}(" + text("x") + b"K\x01ub"}),
        "state_dict": b"ccollections\nOrderedDict\n)R" + mapping(state)[1:],
        "hyper_parameters": hyper_parameters,
    }
    write_archive(path, mapping(content), storages)


def make_safetensors(folder):
    write_hub_folder(folder, SMALL, TENSORS)
    return folder


def make_bin(folder):
    write_config(folder, SMALL)
    write_state_dict(folder / "pytorch_model.bin", NAMED)
    return folder


def make_safetensors_shards(folder):
    write_config(folder, SMALL)
    write_shards(folder, "safetensors", write_tensors)
    return folder


def make_bin_shards(folder):
    write_config(folder, SMALL)
    write_shards(folder, "bin", write_state_dict)
    return folder


def make_single_safetensors(folder):
    write_config(folder, SMALL)
    write_tensors(folder / "weights.safetensors", TENSORS)
    return folder / "weights.safetensors"


def make_single_bin(folder):
    write_config(folder, SMALL)
    write_state_dict(folder / "weights.bin", prefixed(TENSORS, "model._orig_mod."))
    return folder / "weights.bin"


def make_ckpt(folder):
    write_lightning(folder / "last.ckpt", TENSORS, SMALL)
    return folder / "last.ckpt"


SOURCES = [
    make_safetensors,
    make_bin,
    make_safetensors_shards,
    make_bin_shards,
    make_single_safetensors,
    make_single_bin,
    make_ckpt,
]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_every_form_of_a_checkpoint_reads_the_same(make, tmp_path):
    checkpoint = read_reference(make(tmp_path))
    assert_same_bits(checkpoint.tensors, TENSORS)
    frequencies = tuple(TENSORS["input_adapter.frq_pos_encoding.inv_freq"].tolist())
    remat = "full" if make is make_ckpt else "none"
    assert checkpoint.config == SMALL.replace(rotary_inv_freq=frequencies, remat=remat)


def test_zip_and_safetensors_are_read_without_torch(tmp_path):
    program = (
        "import sys; sys.modules['torch'] = sys.modules['perceiver'] = None\n"
        "from perceiver_ar_jax.conversion import read_reference, to_flax, write_reference\n"
        "for source in sys.argv[1:]:\n"
        "    found = read_reference(source)\n"
        "    params = to_flax(found.tensors, found.config)\n"
        "    write_reference(source + '_out', params, found.config)\n"
    )
    sources = []
    for make in (make_bin, make_ckpt, make_safetensors):
        folder = tmp_path / make.__name__
        folder.mkdir()
        sources.append(str(make(folder)))
    subprocess.run([sys.executable, "-c", program, *sources], check=True, cwd=ROOT)
    for source in sources:
        assert_same_bits(read_reference(source + "_out").tensors, TENSORS)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_written_folders_read_back_bit_for_bit(name, dtype, tmp_path):
    tensors = random_tensors(CONFIGS[name], dtype)
    write_hub_folder(tmp_path / "a", CONFIGS[name], tensors)
    first = read_reference(tmp_path / "a")
    assert first.config.param_dtype == np.dtype(dtype).name
    write_reference(tmp_path / "b", to_flax(first.tensors, first.config), first.config)
    second = read_reference(tmp_path / "b")
    assert_same_bits(second.tensors, tensors)
    assert second.config == first.config


def test_our_safetensors_and_the_packages_read_each_other(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    arrays = {
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "bf16": np.arange(5).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float16),
        "flags": np.array([True, False]),
    }
    write_tensors(tmp_path / "ours", arrays)
    assert_same_bits(package.load_file(tmp_path / "ours"), arrays)
    package.save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    assert_same_bits(read_safetensors(tmp_path / "theirs"), arrays)


def test_views_of_shared_storage_come_out_as_arrays(tmp_path):
    data = np.arange(24, dtype=np.float32)
    items = {
        "transposed": tensor("0", "float32", (6, 4), (1, 6)),
        "slice": tensor("0", "float32", (2, 3), (6, 2), start=7),
        "repeated": tensor("0", "float32", (2, 2), (0, 1)),
        "scalar": tensor("0", "float32", (), (), start=5),
        "empty": tensor("0", "float32", (0, 9), (9, 1)),
    }
    write_archive(tmp_path / "x.bin", mapping(items), {"0": data.tobytes()})
    expected = {
        "transposed": data.reshape(4, 6).T,
        "slice": data[[[7, 9, 11], [13, 15, 17]]],
        "repeated": np.array([[0, 1], [0, 1]], np.float32),
        "scalar": data[5].reshape(()),
        "empty": np.zeros((0, 9), np.float32),
    }
    assert_same_bits(read_torch_file(tmp_path / "x.bin"), expected)


@pytest.fixture
def expanded(tmp_path):
    """A checkpoint whose tensors all are one stored element, as after `expand`."""
    write_config(tmp_path, SMALL)
    zeros = {name: (0,) * array.ndim for name, array in TENSORS.items()}
    items = {name: tensor("0", "float32", TENSORS[name].shape, zeros[name]) for name in TENSORS}
    write_archive(tmp_path / "x.bin", mapping(items), {"0": np.float32(0.25).tobytes()})
    return tmp_path / "x.bin"


def test_tensors_that_are_one_stored_element_convert(expanded, tmp_path):
    found = read_reference(expanded)
    expected = {name: np.full_like(array, 0.25) for name, array in TENSORS.items()}
    assert_same_bits(found.tensors, expected)
    params = to_flax(found.tensors, found.config)
    write_reference(tmp_path / "back", params, found.config)
    assert_same_bits(read_reference(tmp_path / "back").tensors, expected)


def test_a_small_file_that_would_fill_the_memory_is_refused(expanded, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_memory_bytes", lambda: 40_000)
    message = r"x.bin: its tensors share storage: .* more than half of this machine's memory"
    with pytest.raises(ValueError, match=message):
        read_reference(expanded)


def test_tied_tensors_convert_although_they_are_larger_than_their_file(tmp_path):
    write_config(tmp_path, SMALL)
    data = np.random.default_rng(0).normal(size=max(x.size for x in TENSORS.values()))
    data = data.astype(np.float32)
    items = {}
    for name, array in TENSORS.items():
        strides = [step // array.itemsize for step in array.strides]
        items[name] = tensor("0", "float32", array.shape, strides)
    write_archive(tmp_path / "x.bin", mapping(items), {"0": data.tobytes()})
    found = read_reference(tmp_path / "x.bin")
    assert sum(x.nbytes for x in found.tensors.values()) > (tmp_path / "x.bin").stat().st_size
    expected = {name: data[: x.size].reshape(x.shape) for name, x in TENSORS.items()}
    assert_same_bits(found.tensors, expected)
    to_flax(found.tensors, found.config)


def test_an_expanded_tensor_of_its_storages_size_is_not_called_damaged(tmp_path):
    data = np.arange(6, dtype=np.float32)
    item = tensor("0", "float32", (2, 3), (0, 2))
    write_archive(tmp_path / "x.bin", mapping({"w": item}), {"0": data.tobytes()})
    assert_same_bits(read_torch_file(tmp_path / "x.bin"), {"w": data[[[0, 2, 4]] * 2]})


def test_a_hub_id_is_found_in_the_local_cache(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the [hub] extra")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--small-ar"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    make_bin(snapshot)
    (snapshot / "tokenizer.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    checkpoint = read_reference("someone/small-ar")
    assert_same_bits(checkpoint.tensors, TENSORS)
    assert checkpoint.tokenizer_files == (snapshot / "tokenizer.json",)
    with pytest.raises(ValueError, match="nothing at someone/other, nor on the Hugging Face hub"):
        read_reference("someone/other")


def test_fields_unknown_to_us_are_warned_of(tmp_path):
    make_safetensors(tmp_path)
    write_config(tmp_path, SMALL, num_experts=8)
    with pytest.warns(UserWarning, match=r"config.json has fields unknown here.*num_experts"):
        read_reference(tmp_path)


BROKEN = []  # the message, and what turns a good folder of safetensors into such a source


def broken(message):
    return lambda spoil: BROKEN.append((message, spoil))


@broken("nothing at .*nowhere; looked for a Hugging Face directory")
def _(folder):
    return folder / "nowhere"


@broken("config.json is missing; a Hugging Face directory has")
def _(folder):
    (folder / "config.json").unlink()
    return folder


@broken("has no weights; looked for model.safetensors, pytorch_model.bin")
def _(folder):
    (folder / "model.safetensors").unlink()
    return folder


@broken("config.json is not JSON")
def _(folder):
    (folder / "config.json").write_text('{"model_config": {')
    return folder


@broken("config.json is not JSON")
def _(folder):
    (folder / "config.json").write_text("[" * 100_000)
    return folder


@broken("config.json has model_type 'gpt2', not perceiver-ar-causal-language-model")
def _(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


@broken("is a checkpoint of ours; --to_torch exports it")
def _(folder):
    (folder / "config.json").write_text('{"model": {"vocab_size": 20}}')
    return folder


@broken(r"txt_embedding.weight \(20, 16\), not \(vocab_size 21, num_channels 16\)")
def _(folder):
    write_config(folder, SMALL, vocab_size=21)
    return folder


@broken("num_heads in the config is a str, not a number")
def _(folder):
    write_config(folder, SMALL, num_heads="2")
    return folder


@broken("neither a safetensors nor a PyTorch file: .* the first are b'version https")
def _(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1820\n"
    (folder / "model.safetensors").write_text(pointer)
    return folder


@broken("neither a safetensors nor a PyTorch file: .* the first are b'<!doctype")
def _(folder):
    (folder / "model.safetensors").write_text("<!doctype html><html></html>")
    return folder


@broken("neither a safetensors nor a PyTorch file: 0 bytes")
def _(folder):
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@broken("model.safetensors: its header claims .* bytes, the file has")
def _(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    return folder


@broken("a tensor lies beyond the end of the file: it is cut off")
def _(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return folder


@broken("names 'model-00001-of-00003.safetensors', which is not in its folder")
def _(folder):
    (folder / "model.safetensors").unlink()
    make_safetensors_shards(folder)
    (folder / "model-00001-of-00003.safetensors").unlink()
    return folder


@broken(r"names '\.\./secret', which is not in its folder")
def _(folder):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../secret"}}')
    return folder


@broken("is in two of its files")
def _(folder):
    (folder / "model.safetensors").unlink()
    make_safetensors_shards(folder)
    write_tensors(folder / "model-00002-of-00003.safetensors", NAMED)
    return folder


@broken("some tensors are there with and without the prefix backend_model.")
def _(folder):
    extra = {"output_adapter.bias": TENSORS["output_adapter.bias"]}
    write_tensors(folder / "model.safetensors", NAMED | extra)
    return folder


@broken("has no hyper_parameters .*, and there is no .*config.json")
def _(folder):
    (folder / "config.json").unlink()
    return folder / "model.safetensors"


@broken("not a Perceiver AR: 0 of its 1 tensors end in input_adapter.txt_embedding.weight")
def _(folder):
    write_tensors(folder / "model.safetensors", {"lm_head.weight": np.zeros(3)})
    return folder


@broken("the zip archive is cut off or damaged")
def _(folder):
    path = make_single_bin(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


@broken("an entry lies outside the file")
def _(folder):
    path = make_single_bin(folder)
    data = path.read_bytes()
    place = data.index(b"PK\x01\x02") + 42  # where the directory says that the first entry is
    path.write_bytes(data[:place] + b"\xf0\xff\xff\xff" + data[place + 4 :])
    return path


@broken("its entries are compressed")
def _(folder):
    write_archive(folder / "x.bin", b"N", compression=zipfile.ZIP_DEFLATED)
    return folder / "x.bin"


@broken("a zip archive, but not one of torch.save: no data.pkl")
def _(folder):
    with zipfile.ZipFile(folder / "x.bin", "w") as archive:
        archive.writestr("hello.txt", "hello")
    return folder / "x.bin"


@broken(r"needs more than its 4 stored elements")
def _(folder):
    item = tensor("0", "float32", (100_000, 100_000), (0, 1))
    write_archive(folder / "x.bin", mapping({"w": item}), {"0": bytes(16)})
    return folder / "x.bin"


@broken(r"needs more than its 4 stored elements")
def _(folder):
    item = tensor("0", "float32", (2**30, 2**30), (0, 0))
    write_archive(folder / "x.bin", mapping({"w": item}), {"0": bytes(16)})
    return folder / "x.bin"


@broken("its entries overlap")
def _(folder):
    path = make_single_bin(folder)
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 20 : directory + 28] = 2 * (directory - 100).to_bytes(4, "little")  # its sizes
    path.write_bytes(data)
    return path


@broken("it is damaged: a checksum differs")
def _(folder):
    path = make_single_bin(folder)
    path.write_bytes(path.read_bytes().replace(b"kv_norm", b"kv_n0rm", 1))
    return path


@broken("x.bin: refused: its pickle names posix.system")
def _(folder):
    write_archive(folder / "x.bin", b"cposix\nsystem\n(" + text("exit 1") + b"tR")
    return folder / "x.bin"


@pytest.mark.parametrize(("message", "spoil"), BROKEN)
def test_bad_sources_get_one_clear_line(message, spoil, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    make_safetensors(folder)
    with pytest.raises(ValueError, match=message) as error:
        read_reference(spoil(folder))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_in_a_zip_is_found_when_the_tensor_is_read(tmp_path):
    path = make_single_bin(tmp_path)
    data = bytearray(path.read_bytes())
    values = TENSORS["cross_attention.1.module.1.weight"].tobytes()
    data[data.index(values) + 17] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged: the checksum of the .* bytes at .* differs"):
        found = read_reference(path)
        to_flax(found.tensors, found.config)


def test_the_old_format_without_torch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "old.bin").write_bytes(OLD_MAGIC + b"\x80\x02M\xe9\x03.")
    with pytest.raises(ValueError, match=r"install the \[torch\] extra"):
        read_reference(tmp_path / "old.bin")


def test_a_new_folder_appears_only_when_it_is_whole(tmp_path):
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("x")
        raise OSError("disk full")
    assert os.listdir(tmp_path) == []
    with new_folder(tmp_path / "out") as partial:
        (partial / "whole").write_text("x")
        assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_in_use_is_replaced_only_on_request(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ValueError, match="not empty"), new_folder(tmp_path / "out"):
        pass
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "out", overwrite=True):
        raise OSError("disk full")
    assert os.listdir(tmp_path / "out") == ["precious"]
    with new_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "new").write_text("x")
    assert os.listdir(tmp_path / "out") == ["new"]
    assert os.listdir(tmp_path) == ["out"]
