import contextlib
import io
import warnings

import numpy as np
import pytest
from reference import (
    assert_close_to_reference,
    clm,
    hugging_face_model,
    random_config,
    random_input,
    reference_model,
    torch,
)
from reference_tensors import CONFIGS, SMALL, assert_same_bits, random_tensors

from perceiver_ar_jax import PerceiverARConfig
from perceiver_ar_jax.conversion import read_reference, to_flax, to_torch, write_reference
from perceiver_ar_jax.conversion.certificate import describe_frequencies
from perceiver_ar_jax.conversion.reference_config import config_to_reference
from perceiver_ar_jax.conversion.torch_files import read_torch_file
from perceiver_ar_jax.conversion.verification import Inputs, our_logits
from perceiver_ar_jax.model import PerceiverAR


def as_arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def arrays(tensors):
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def hub_model(config, seed):
    """A model of perceiver-io as `from_pretrained` gives it, all parameters moved."""
    return hugging_face_model(reference_model(config, seed))


def assert_same_logits(backend, config, params):
    tokens, prefix_len, pads = random_input(config, 0)
    with torch.no_grad():
        expected = backend(
            torch.tensor(tokens), prefix_len=prefix_len, pad_mask=torch.tensor(pads)
        ).logits
    actual = our_logits(params, config, Inputs(tokens, prefix_len, pads))
    assert_close_to_reference(actual, expected, 2e-5)


def test_config_fields_are_those_of_the_reference():
    fields = config_to_reference(SMALL)
    assert set(fields) == set(clm.CausalLanguageModelConfig.__dataclass_fields__)
    defaults = vars(clm.CausalLanguageModelConfig())
    assert defaults == config_to_reference(PerceiverARConfig())


@pytest.mark.parametrize("seed", range(6))
def test_save_pretrained_folders_convert_and_go_back(seed, tmp_path):
    config = random_config(seed)
    model = hub_model(config, seed)
    model.save_pretrained(tmp_path / "theirs")
    found = read_reference(tmp_path / "theirs")
    assert_same_bits(found.tensors, as_arrays(model.backend_model))
    params = to_flax(found.tensors, found.config)
    assert_same_logits(model.backend_model, found.config, params)
    write_reference(tmp_path / "ours", params, found.config)
    back = clm.PerceiverCausalLanguageModel.from_pretrained(tmp_path / "ours").eval()
    assert back.config.model_config == model.config.model_config
    assert_same_bits(as_arrays(back), as_arrays(model))


def test_pytorch_model_bin_of_save_pretrained_converts_whole_and_in_shards(tmp_path):
    model = hub_model(CONFIGS["rotary only"], 0)
    for name, options in {"whole": {}, "shards": {"max_shard_size": "4KB"}}.items():
        for safe in (False, True):
            folder = tmp_path / f"{name}{safe}"
            model.save_pretrained(folder, safe_serialization=safe, **options)
            assert (len(list(folder.iterdir())) > 5) == (name == "shards")
            assert_same_bits(read_reference(folder).tensors, as_arrays(model.backend_model))


def test_a_model_in_bfloat16_goes_both_ways_bit_for_bit(tmp_path):
    model = hub_model(SMALL, 0).bfloat16()
    model.save_pretrained(tmp_path / "theirs")
    found = read_reference(tmp_path / "theirs")
    assert found.config.param_dtype == "bfloat16"
    write_reference(tmp_path / "ours", to_flax(found.tensors, found.config), found.config)
    assert_same_bits(read_reference(tmp_path / "ours").tensors, arrays(found.tensors))
    back = clm.PerceiverCausalLanguageModel.from_pretrained(
        tmp_path / "ours", torch_dtype=torch.bfloat16
    )
    tensors = model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize("name", ["absolute positions", "rotary only"])
def test_bf16_rounded_frequencies_give_the_logits_of_the_reference(name, tmp_path):
    config = CONFIGS[name].replace(max_seq_len=300, num_channels=64)
    model = hub_model(config, 0)
    frequencies = model.backend_model.input_adapter.frq_pos_encoding.inv_freq
    exact = frequencies.clone()
    frequencies.copy_(frequencies.bfloat16())
    model.save_pretrained(tmp_path)
    found = read_reference(tmp_path)
    params = to_flax(found.tensors, found.config)
    assert_same_logits(model.backend_model, found.config, params)

    described = describe_frequencies(found.config)
    expected = float((frequencies - exact).abs().max())
    assert described["max_abs_stored_minus_formula"] == pytest.approx(expected, rel=1e-4)
    assert described["max_abs_stored_minus_bf16_formula"] == 0
    with pytest.raises(AssertionError):  # the formula would have given others
        assert_same_logits(model.backend_model, found.config.replace(rotary_inv_freq=None), params)


def test_a_checkpoint_that_lightning_saved_converts(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pytorch_lightning
        from pytorch_lightning.utilities.parsing import AttributeDict
    fields = clm.CausalLanguageModelConfig(
        **{k: v for k, v in SMALL.to_dict().items() if k in vars(reference_model(SMALL, 0).config)}
    )
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        module = clm.LitCausalLanguageModel.create(fields, validation_sample_prompt="Once")
        trainer = pytorch_lightning.Trainer(
            logger=False, enable_checkpointing=False, accelerator="cpu"
        )
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        content = torch.load(tmp_path / "last.ckpt", weights_only=False)
    content["hyper_parameters"] = AttributeDict(content["hyper_parameters"])
    content["optimizer_states"] = [{"state": {0: {"exp_avg": torch.zeros(3)}}}]
    content["callbacks"] = {"mine": fields}  # an object of a class
    torch.save(content, tmp_path / "dict.ckpt")
    old_format = tmp_path / "old.ckpt"
    content["callbacks"] = {}
    torch.save(content, old_format, _use_new_zipfile_serialization=False)
    for name in ("last.ckpt", "dict.ckpt", "old.ckpt"):
        found = read_reference(tmp_path / name)
        assert found.config.replace(rotary_inv_freq=None) == SMALL
        assert_same_bits(found.tensors, as_arrays(module.model))


def test_the_old_format_is_read_by_torch_and_refuses_the_same(tmp_path):
    expected = random_tensors(SMALL)
    tensors = {name: torch.from_numpy(array) for name, array in expected.items()}
    tensors["half"] = torch.arange(4).bfloat16()
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    found = read_torch_file(tmp_path / "old.bin")
    assert found.pop("half").tolist() == [0, 1, 2, 3]
    assert_same_bits(found, expected)

    class Harmful:
        def __reduce__(self):
            import os

            return (os.system, ("exit 1",))

    torch.save({"x": Harmful()}, tmp_path / "bad.bin", _use_new_zipfile_serialization=False)
    torch.save({"x": Harmful()}, tmp_path / "bad.ckpt")
    for name in ("bad.bin", "bad.ckpt"):
        with pytest.raises(ValueError, match=f"{name}: refused: its pickle names posix.system"):
            read_torch_file(tmp_path / name)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "old.bin").read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"cut\.bin: damaged"):
        read_torch_file(tmp_path / "cut.bin")


def test_what_torch_save_writes_reads_back(tmp_path):
    base = torch.randn(6, 8)
    tensors = {
        "transposed": base.T,
        "slice": base[1:4, ::2],
        "expanded": base[0].expand(3, 8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
        **{
            str(dtype): torch.arange(5).to(dtype)
            for dtype in (
                torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
                torch.uint8, torch.bool, torch.bfloat16,
            )
        },
    }  # fmt: skip
    torch.save(tensors, tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        expected = tensor.detach()
        assert found[name].dtype.name == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(
            np.asarray(found[name]).astype(np.float64), expected.double().numpy()
        )


def test_files_saved_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(5.0)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert np.asarray(read_torch_file(tmp_path / "x.pt")["w"]).tolist() == [0, 1, 2, 3, 4]


def test_parameters_made_here_export_to_the_reference(tmp_path):
    import jax

    config = CONFIGS["rotary only"]
    tokens = np.zeros((1, config.max_seq_len), np.int32)
    init = jax.jit(PerceiverAR(config).init, static_argnames="prefix_len")
    params = init(jax.random.key(0), tokens, prefix_len=config.max_prefix_len)["params"]
    write_reference(tmp_path / "out", params, config)
    model = clm.PerceiverCausalLanguageModel.from_pretrained(tmp_path / "out").eval()
    assert_same_logits(model.backend_model, config, params)
    assert set(to_torch(params, config)) == set(model.backend_model.state_dict())
