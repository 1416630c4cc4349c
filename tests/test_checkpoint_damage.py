"""Whatever happens to the files of a checkpoint, only saved bits are restored."""

import functools
import gc
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from failing_commits import fail_commits
from small_models import random_params, small_config

from perceiver_ar_jax.training import OptimizerConfig, TrainState, make_optimizer
from perceiver_ar_jax.training.checkpoint import Checkpointer, CheckpointError, SaveError

# Where one array of a checkpoint is damaged, TensorStore drops the reads of the others.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = (1, 2)
OPTIMIZER = make_optimizer(OptimizerConfig(warmup_steps=0, total_steps=10))
# What Orbax writes for a step, by kind.
KINDS = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "*/commit_success.txt",
    "contents/metadata",
    "data/metadata",
    "metrics/metrics",
    "*/_METADATA",
    "*/_sharding",
    "*/array_metadatas/*",
    "*/manifest.ocdbt",
    "*/d/*",
    "*/ocdbt.process_0/manifest.ocdbt",
    "*/ocdbt.process_0/d/*",
)


def flip_a_bit(file: Path):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut_in_half(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path):
    file.write_bytes(b"")


DAMAGES = (flip_a_bit, cut_in_half, empty, Path.unlink)


@functools.cache
def saved_state(step: int) -> TrainState:
    """A state whose leaves all differ, from each other and from those of other steps."""
    config = small_config(num_self_attention_layers=0, output_bias=False)
    state = TrainState.create(params=random_params(config), tx=OPTIMIZER)
    rng = np.random.default_rng(step)

    def draw(leaf):
        if leaf.dtype == np.float32:
            return rng.standard_normal(leaf.shape).astype(np.float32)
        return np.int32(rng.integers(2**31))

    drawn = jax.tree.map(draw, state).replace(step=np.int32(step))
    return jax.tree.map(jax.numpy.asarray, drawn)


def saved_data(step: int) -> dict:
    return {"step": step, "positions": [[step, 7], [3, step]], "fingerprint": {"seed": 0}}


@pytest.fixture(scope="module", autouse=True)
def dropped_reads():
    """Collects dropped reads here, where their warnings are ignored."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(folder)
    for step in STEPS:
        checkpointer.save(saved_state(step), saved_data(step))
    checkpointer.close()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def restore(folder: Path):
    """Restores as a run does and as inference does."""
    like = jax.eval_shape(lambda: saved_state(STEPS[-1]))
    checkpointer = Checkpointer(folder)
    try:
        return checkpointer.restore(like), checkpointer.restore_params(like.params)
    finally:
        checkpointer.close()


def check_nothing_wrong_is_restored(folder: Path) -> bool:
    """Returns whether the newest step was skipped as damaged; what was restored must be right."""
    (state, data, skipped), (params, params_step, params_skipped) = restore(folder)
    step = int(state.step)
    jax.tree.map(np.testing.assert_array_equal, state, saved_state(step))
    jax.tree.map(np.testing.assert_array_equal, params, saved_state(params_step).params)
    assert data == saved_data(step)
    for found, lines in ((step, skipped), (params_step, params_skipped)):
        assert len(lines) == STEPS[-1] - found
        assert all("step 2 in " in line for line in lines), lines
    return step != STEPS[-1]


def test_every_file_of_a_step_is_of_a_kind_that_is_damaged_below(saved):
    step = saved / "2"
    kinds = [{path for path in step.glob(kind) if path.is_file()} for kind in KINDS]
    assert all(kinds)
    assert set.union(*kinds) == {path for path in step.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_gives_the_saved_bits_or_the_step_before(kind, damage, saved, tmp_path):
    for i, file in enumerate(sorted(path for path in (saved / "2").glob(kind) if path.is_file())):
        folder = shutil.copytree(saved, tmp_path / str(i))
        damage(folder / file.relative_to(saved))
        check_nothing_wrong_is_restored(folder)


@pytest.mark.slow
def test_no_single_flipped_bit_is_restored_silently(saved, tmp_path):
    rng = np.random.default_rng(0)
    files = sorted(path for path in (saved / "2").rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    caught = 0
    for i in range(1000):
        folder = shutil.copytree(saved, tmp_path / str(i))
        file = folder / rng.choice(files, p=sizes / sizes.sum()).relative_to(saved)
        data = bytearray(file.read_bytes())
        place, bit = int(rng.integers(len(data))), int(rng.integers(8))
        data[place] ^= 1 << bit
        file.write_bytes(data)
        caught += check_nothing_wrong_is_restored(folder)
        shutil.rmtree(folder)
    print(f"1,000 flipped bits: {caught} fell back, {1000 - caught} changed nothing restored")


def test_with_every_step_damaged_the_error_names_each(copy):
    for step in STEPS:
        cut_in_half(copy / str(step) / "contents/metadata")
    with pytest.raises(CheckpointError, match=r"step 2 in .* step 1 in "):
        restore(copy)


def test_an_empty_step_directory_is_skipped_and_named(copy):
    (copy / "3").mkdir()
    (state, _, skipped), _ = restore(copy)
    assert int(state.step) == 2
    assert len(skipped) == 1 and "step 3 " in skipped[0]


def test_a_save_that_was_killed_leaves_the_step_before(copy):
    shutil.copytree(copy / "2", copy / "3.orbax-checkpoint-tmp")
    (copy / "3.orbax-checkpoint-tmp/params/d").rename(copy / "3.orbax-checkpoint-tmp/params/e")
    (state, data, skipped), _ = restore(copy)
    assert (int(state.step), data, skipped) == (2, saved_data(2), [])


def test_a_run_saves_on_beside_a_step_whose_metrics_are_damaged(copy):
    file = copy / "2" / "metrics" / "metrics"
    file.write_bytes(file.read_bytes().replace(b"loss", b"lost"))
    checkpointer = Checkpointer(copy, keep_best=True)
    for step in (3, 4):
        checkpointer.save(saved_state(step), saved_data(step), eval_loss=1.0 / step)
    checkpointer.close()
    assert checkpointer.steps()[-2:] == [3, 4]


def files_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """Sizes and modification times of everything in a folder."""
    found = ((path, path.stat()) for path in folder.rglob("*"))
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found}


def test_reading_changes_nothing_not_even_what_is_damaged_or_being_saved(copy):
    (copy / "2/metrics/metrics").write_bytes(b"")
    shutil.copytree(copy / "2", copy / "3.orbax-checkpoint-tmp")
    before = files_of(copy)
    (state, _, skipped), _ = restore(copy)
    assert (int(state.step), skipped) == (2, [])
    assert files_of(copy) == before


def test_reading_where_nothing_is_leaves_nothing_behind(tmp_path):
    checkpointer = Checkpointer(tmp_path / "mistyped" / "checkpoints")
    assert checkpointer.steps() == []
    with pytest.raises(CheckpointError, match="mistyped/checkpoints: no such directory"):
        checkpointer.restore_params(saved_state(1).params)
    checkpointer.close()
    assert not (tmp_path / "mistyped").exists()


def test_a_run_leaves_the_metrics_of_another_save_in_progress(copy):
    file = copy / "9.orbax-checkpoint-tmp/metrics/metrics"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    checkpointer = Checkpointer(copy)
    checkpointer.save(saved_state(3), saved_data(3))
    checkpointer.close()
    assert file.exists()


def test_after_a_failed_commit_the_next_save_says_so_and_steps_are_saved_again(copy, monkeypatch):
    failing = fail_commits(monkeypatch)
    checkpointer = Checkpointer(copy)
    failing.add("3")
    checkpointer.save(saved_state(3), saved_data(3))
    with pytest.raises(SaveError, match="the disk is gone"):
        checkpointer.save(saved_state(3), saved_data(3))
    assert checkpointer.steps() == [1, 2]
    assert (copy / "1").exists()  # goes only once a newer step is on disk
    for step in (3, 4):
        checkpointer.save(saved_state(step), saved_data(step))
    checkpointer.close()
    assert {path.name for path in copy.iterdir()} == {"3", "4"}
    (state, data, _), _ = restore(copy)
    jax.tree.map(np.testing.assert_array_equal, state, saved_state(4))
    assert data == saved_data(4)


def test_a_step_at_or_below_the_newest_is_not_skipped_silently(copy):
    checkpointer = Checkpointer(copy)
    with pytest.raises(SaveError, match=r"step 2 was not saved in .*, which has step 2 already"):
        checkpointer.save(saved_state(2), saved_data(2))
    checkpointer.close()


def test_a_file_named_like_a_step_does_not_hide_the_steps(copy):
    (copy / "3").write_text("not a checkpoint")
    (state, _, _), _ = restore(copy)
    assert int(state.step) == 2
