import pytest

from perceiver_ar_jax import processor


@pytest.mark.parametrize(
    "flags, platforms, expected",
    [
        ("avx512f avx512_bf16", "cpu", "bfloat16"),
        ("avx2 amx_bf16 amx_tile", "cpu", "bfloat16"),
        ("avx2 avx512f", "cpu", "float32"),
        ("avx2 avx512f", "tpu,cpu", "bfloat16"),
    ],
)
def test_bfloat16_is_for_machines_with_instructions_for_it(
    monkeypatch, tmp_path, flags, platforms, expected
):
    info = tmp_path / "cpuinfo"
    info.write_text(f"model name\t: some processor\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(processor, "CPU_INFO", info)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert processor.fastest_dtype() == expected


def test_without_a_description_of_the_processor_it_is_float32(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "none")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert processor.fastest_dtype() == "float32"
    assert processor.processor_id() >= 0
