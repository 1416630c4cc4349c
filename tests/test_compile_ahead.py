"""Compiling for TPUs that are not there; a change that breaks TPU lowering fails here."""

import json
import subprocess
import sys

import jax
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))

from compile_decoding import compile_step as compile_decoding
from compiled_step import (
    QUICK_OPTIONS,
    WITHOUT_A_TPU,
    CompiledStep,
    DoesNotFitError,
    compile_step,
    topology_devices,
)
from xla_dump import Collective, Kernel, Program

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.lowering import lower_train_step
from perceiver_ar_jax.model import init_params
from perceiver_ar_jax.model.attention import Visibility, pallas
from perceiver_ar_jax.model.flops import training_flops
from perceiver_ar_jax.parallel import MeshConfig, make_mesh, replicated, use_mesh
from perceiver_ar_jax.parallel.chips import chip_of
from perceiver_ar_jax.run_config import DataSettings, RunConfig

SMALL = PerceiverARConfig.clm_base(
    vocab_size=512,
    max_seq_len=256,
    max_latents=128,
    num_channels=256,
    num_heads=2,
    num_self_attention_layers=2,
    num_self_attention_rotary_layers=0,
    dtype="bfloat16",
    remat="names",
    scan_layers=True,
)


@pytest.fixture(scope="module", autouse=True)
def without_a_tpu():
    with pytest.MonkeyPatch.context() as environment:
        for name, value in WITHOUT_A_TPU.items():
            environment.setenv(name, value)
        # jaxlib has read its flags; libtpu aborts the process at one that it does not know.
        jax.devices()
        environment.delenv("XLA_FLAGS", raising=False)
        yield


def compiled(
    topology: str, config=SMALL, batch_size=64, ema_decay=0.0, respect_documents=False, **mesh
) -> CompiledStep:
    pytest.importorskip("libtpu", reason="compiling for TPUs needs `pip install libtpu`")
    run = RunConfig(
        model=config,
        mesh=MeshConfig(**{"data": 1} | mesh),
        batch_size=batch_size,
        data=DataSettings(source="none", respect_documents=respect_documents),
        ema_decay=ema_decay,
    )
    return compile_step(run, topology_devices(topology), compiler_options=QUICK_OPTIONS)


def bytes_of(config, copies: int) -> int:
    """Parameters, in float32, and what there is of their size."""
    shapes = jax.eval_shape(lambda: init_params(PerceiverAR(config), jax.random.key(0)))
    return 4 * copies * sum(leaf.size for leaf in jax.tree.leaves(shapes))


SUM, GATHER, SCATTER = "all-reduce", "all-gather", "reduce-scatter"


@pytest.mark.parametrize(
    ("topology", "mesh", "shards", "exchanges"),
    [
        ("v5e:4x4", {"data": 16}, 1, {SUM}),
        ("v5e:4x4", {"fsdp": 16}, 16, {SUM, GATHER}),
        ("v5e:4x4", {"data": 4, "fsdp": 2, "tensor": 2}, 4, {SUM, GATHER, SCATTER}),
        ("v5e:4x4", {"data": 4, "context": 4}, 1, {SUM, GATHER}),
        ("v5p:2x2x2", {"fsdp": 8}, 8, {SUM, GATHER}),
    ],
    ids=["data", "fsdp", "data-fsdp-tensor", "context", "fsdp-of-v5p"],
)
def test_a_small_model_compiles_with_its_state_in_equal_parts(topology, mesh, shards, exchanges):
    step = compiled(topology, **mesh)
    state = bytes_of(SMALL, copies=3)  # with both moments
    assert 1 <= step.argument_bytes * shards / state < 1.04  # norms are whole
    kinds = {collective.kind for collective in step.collectives}
    assert exchanges <= kinds
    assert mesh != {"data": 16} or kinds == {SUM}
    assert 0 < step.mfu_ceiling < 1


def test_slices_exchange_gradients_only_and_each_device_its_own_part():
    step = compiled("2xv5e:2x2", data=-1, fsdp=2)
    assert step.mesh_shape["data"] == 4
    network = [x for x in step.collectives if x.kind.endswith("between slices")]
    assert {x.kind for x in network} == {"all-reduce between slices"}
    gradient = bytes_of(SMALL, copies=1) / 4  # of the devices of a slice
    assert 1 <= sum(x.total_bytes for x in network) / gradient < 1.3


def test_only_data_spans_slices():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs `pip install libtpu`")
    devices = topology_devices("2xv5e:2x2")
    mesh = make_mesh(MeshConfig(data=-1, fsdp=-1, max_fsdp=8), devices, num_channels=64)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (2, 4)
    slices = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert slices == [{0}, {1}]
    with pytest.raises(ValueError, match="data=1 does not divide among 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)


def test_averages_and_documents_of_a_run_are_compiled_too():
    options = {"ema_decay": 0.99, "respect_documents": True}
    step = compiled("v5e:2x2", fsdp=4, batch_size=4, **options)
    state = bytes_of(SMALL, copies=4) / 4
    batch = SMALL.max_seq_len * (3 * 4 + 1)  # tokens, targets, segment ids; the mask of pads
    assert step.argument_bytes - state > batch
    assert step.argument_bytes < 1.04 * (state + batch)


@pytest.mark.parametrize(
    ("topology", "length", "heads"),
    [
        ("v4:2x2x1", 4096, 1),
        ("v5e:2x2", 4096, 1),
        ("v5p:2x2x1", 4096, 1),
        ("v6e:2x2", 4096, 1),
        ("v5e:2x2", 512, 2),
    ],
)
def test_the_kernels_with_the_most_queries_they_take_fit_into_vmem(topology, length, heads):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs `pip install libtpu`")
    mesh = make_mesh(MeshConfig(data=1), topology_devices(topology)[:1])
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))
    x_BLNH, pads_BL = place((1, length, heads, 128), "float32"), place((1, length), "bool")
    ids_BL = place((1, length), "int32")
    config = SMALL.replace(num_channels=256)  # heads of 128
    assert pallas.takes(config, num_queries=length, has_segments=True)

    def loss(q, k, v, pads, ids):
        return pallas.attend(q, k, v, Visibility(pads, ids, ids, causal=True))[0].sum()

    with use_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x_BLNH, x_BLNH, x_BLNH, pads_BL, ids_BL)
    assert "tpu_custom_call" in lowered.compile().as_text()


@pytest.mark.slow
def test_what_context_devices_exchange_hardly_grows_with_the_prefix():
    def exchanged(prefix_len):
        config = SMALL.replace(max_seq_len=prefix_len + SMALL.max_latents)
        step = compiled("v5e:4x4", config, batch_size=16, data=4, context=4)
        return sum(collective.total_bytes for collective in step.collectives)

    one_sequence = 16 // 4 * 8192 * SMALL.num_channels * 2  # bytes in bf16, on one device
    assert exchanged(8192) - exchanged(128) < one_sequence


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_decoding_compiles_and_copies_no_cache(weights):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs `pip install libtpu`")
    config = SMALL.replace(max_seq_len=16_384)
    compiled, program = compile_decoding(
        config, topology_devices("v5e:2x2")[0], weights=weights, batch=1
    )
    assert program.cycles_of_a_turn() > 0
    cache = 2 * config.max_seq_len * config.num_channels * 2  # keys and values in bf16, bytes
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 4


def test_remat_auto_is_what_suits_the_chip():
    pytest.importorskip("libtpu", reason="compiling for TPUs needs `pip install libtpu`")

    def lowered(devices, remat):
        run = RunConfig(
            model=SMALL.replace(remat=remat, scan_layers=False),
            batch_size=4,
            data=DataSettings(source="none"),
        )
        return lower_train_step(run, make_mesh(MeshConfig(), devices[:1])).as_text()

    for devices, suits in ((topology_devices("v5e:2x2"), "none"), (jax.devices("cpu"), "names")):
        texts = {remat: lowered(devices, remat) for remat in ("auto", "none", "names")}
        assert texts["none"] != texts["names"]
        assert texts["auto"] == texts[suits]


@pytest.mark.slow
def test_c4_base_without_remat_is_refused_for_lack_of_memory():
    config = PerceiverARConfig.clm_base(dtype="bfloat16", scan_layers=True, attention="plain")
    with pytest.raises(DoesNotFitError, match="RESOURCE_EXHAUSTED"):
        compiled("v5e:8x16", config, batch_size=2048, data=8, fsdp=16)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--topology=v5e:2x2", "--mesh=fsdp"], "--mesh=fsdp is not of the form data=16,fsdp=16"),
        (["--topology=gpu:1x1x8"], "a GPU topology needs --gpu"),
    ],
    ids=str,
)
def test_bad_usage_is_one_line_and_exit_code_2(options, complaint):
    command = [sys.executable, "tools/compile_ahead.py", "--config=configs/tiny.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"compile_ahead.py: {complaint}")
    assert done.stderr.count("\n") == 1


def test_bundles_of_kernels_are_counted_on_each_core_of_a_chip(tmp_path):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs `pip install libtpu`")
    command = [sys.executable, "tools/compile_kernels.py", "--config=configs/tiny.py"]
    command += ["--topology=v5p:2x2x1", "--config.batch_size=32"]
    command += [f"--json={tmp_path / 'figures.json'}"]
    # A process of its own: libtpu reads where to dump when it is loaded.
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    kernels = json.loads((tmp_path / "figures.json").read_text())
    executions = {x["kernel"]["name"]: x["kernel"]["executions"] for x in kernels}
    latents, prefix = 3, 1  # the hybrid layer and two of self-attention; the former's prefix
    assert executions == {
        "forward, latents": latents,
        "backward, latents": latents,
        "forward, prefix": prefix,
        "backward, prefix": prefix,
    }
    for kernel in kernels:
        assert kernel["turns"] == 32 // 4 // 2  # rows of a device, both heads at once; two cores
        assert 0 < kernel["matmul_share"] < 1
        assert kernel["bundles_per_turn"] > kernel["bundles_outside"] > 0


DUMP = """HloModule step

%inside (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce(%p), channel_id=3, to_apply=%add
}

%all-reduce-scatter (p: f32[8]) -> f32[2] {
  %whole = f32[8]{0} all-reduce(%p), channel_id=4, to_apply=%add
  ROOT %part = f32[2]{0} dynamic-slice(%whole, %i), dynamic_slice_sizes={2}
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = bf16[4,8]{1,0} all-gather(%x), dimensions={0}
  %f = f32[8]{0} fusion(%gathered), calls=%inside, metadata={op_name="jit(f)/layer/mlp/up"}, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %kernel.3 = f32[8]{0} custom-call(%f), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/layer/shard_map/attention_forward/pallas_call"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"50","bytes_accessed":"8"}}}
  %still_going_on = f32[8]{0} fusion(%f), calls=%inside
  %scattered = f32[2]{0} fusion(%f), calls=%all-reduce-scatter
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %count = s32[] constant(19)
  ROOT %less = pred[] compare(%i, %count), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %both = (f32[2]{0}, bf16[2]{0}) all-reduce(%c, %d), to_apply=%add
  ROOT %update = f32[8]{0} fusion(%g), calls=%other, metadata={op_name="jit(f)/add"}, \
backend_config={"window_config":{"estimated_cycles":"7"}}
}

%other (p: f32[8]) -> f32[8] {
  ROOT %p.1 = f32[8]{0} parameter(0)
}
"""


def test_a_dump_is_read_with_loops_multiplied_out():
    program = Program(DUMP)
    assert program.cycles_by_part() == {"mlp": 1900, "optimizer and other": 7}
    assert program.cycles_of_a_turn() == 100
    assert program.collectives() == [
        Collective("all-gather", "bf16", 19, 19 * 64),
        Collective("all-reduce", "f32", 20, 19 * 32 + 8),
        Collective("reduce-scatter", "f32", 19, 19 * 8),
        Collective("all-reduce", "bf16", 1, 4),
    ]
    assert program.kernels() == [Kernel("attention_forward", 19, 19 * 50, 19 * 8)]


def test_a_kernel_takes_the_longer_of_its_flops_and_its_bytes():
    v5e = chip_of("TPU v5 lite")
    seconds = lambda flops, size: Kernel("attention", 1, flops, size).seconds(v5e)
    assert seconds(v5e.peak_flops, 8) == 1
    assert seconds(8, v5e.memory_bandwidth) == 1


def test_the_formula_of_flops_is_that_of_xla_for_an_unrolled_model():
    config = SMALL.replace(scan_layers=False, remat="none", dtype="float32")
    batch = jax.ShapeDtypeStruct((1, 256), "int32")
    params = jax.eval_shape(lambda: init_params(PerceiverAR(config), jax.random.key(0)))

    def loss(params, tokens):
        return PerceiverAR(config).apply({"params": params}, tokens, 128).mean()

    counted = jax.jit(jax.grad(loss)).lower(params, batch).cost_analysis()["flops"]
    assert training_flops(config, 128, 128) == pytest.approx(counted, rel=0.03)


def test_chips_are_known_by_what_they_call_themselves():
    assert chip_of("TPU v5 lite").name == "v5e"
    assert chip_of("cpu") is None
