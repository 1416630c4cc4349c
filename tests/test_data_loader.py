import itertools
import json

import grain
import numpy as np
import pytest
from grain.python import experimental

from perceiver_ar_jax.data import (
    DataConfig,
    EvaluationBatches,
    Loader,
    TokenDocument,
    make_loader,
    merge_states,
)
from perceiver_ar_jax.data.sources import open_source
from perceiver_ar_jax.data.text_documents import TextDocuments
from perceiver_ar_jax.data.windows import OrderedBlocks, WindowDataset, window_lengths
from perceiver_ar_jax.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
TEXTS = [f"{i}:" + "abcdefghij"[i % 10] * (7 * i % 90) for i in range(50)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def config(corpus, **changes) -> DataConfig:
    defaults = {"min_seq_len": 12, "max_seq_len": 24, "batch_size": 4, "seed": 3}
    return DataConfig(source=str(corpus), **(defaults | changes))


def take(loader, count: int) -> list[dict]:
    return list(itertools.islice(loader, count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], name)


def streams_of(batches, rows: int) -> list[list[int]]:
    """The tokens of each row, window after window, without pads."""
    streams = [[] for _ in range(rows)]
    for batch in batches:
        for row in range(rows):
            real = ~batch["pad_mask"][row]
            if real.any():
                streams[row] += batch["tokens"][row][real].tolist()
                streams[row].append(int(batch["targets"][row][-1]))
    return streams


def texts_of(streams) -> list[str]:
    texts = []
    for stream in streams:
        if stream[-1] != BYTES.eos_id:  # the last token of all, by itself, makes no window
            stream.append(BYTES.eos_id)
        splits = [i for i, token in enumerate(stream) if token == BYTES.eos_id]
        starts = [0] + [i + 1 for i in splits[:-1]]
        texts += [BYTES.decode(stream[a:b]) for a, b in zip(starts, splits, strict=True)]
    return texts


def test_a_batch_holds_left_padded_windows_and_the_next_token_at_each_position(corpus):
    lengths = set()
    for batch in take(make_loader(config(corpus), BYTES), 40):
        assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
            "tokens": ((4, 24), "int32"),
            "targets": ((4, 24), "int32"),
            "pad_mask": ((4, 24), "bool"),
            "weights": ((4, 24), "float32"),
        }
        pads = batch["pad_mask"].sum(1)
        np.testing.assert_array_equal(batch["pad_mask"], np.arange(24) < pads[:, None])
        assert (batch["tokens"][batch["pad_mask"]] == BYTES.pad_id).all()
        real = ~batch["pad_mask"][:, :-1]
        next_tokens = batch["tokens"][:, 1:]
        np.testing.assert_array_equal(batch["targets"][:, :-1][real], next_tokens[real])
        lengths |= set((24 - pads).tolist())
    assert lengths == set(range(12, 25))


def test_window_lengths_are_uniform_and_depend_on_seed_and_step_only():
    drawn = np.concatenate([window_lengths(7, step, 64, 10, 19) for step in range(200)])
    counts = np.bincount(drawn, minlength=20)[10:]
    assert counts.min() > 0.85 * counts.mean()
    np.testing.assert_array_equal(window_lengths(7, 5, 64, 10, 19), drawn[5 * 64 : 6 * 64])
    assert (window_lengths(8, 5, 64, 10, 19) != drawn[5 * 64 : 6 * 64]).any()


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_together_read_every_document_once_per_epoch(corpus, process_count):
    texts = []
    for process in range(process_count):
        loader = make_loader(
            config(corpus, repeat=False, batch_size=8 // process_count),
            BYTES,
            process_index=process,
            process_count=process_count,
        )
        texts += texts_of(streams_of(loader, 8 // process_count))
    assert sorted(texts) == sorted(TEXTS)


def test_each_epoch_has_its_own_order_and_all_documents(corpus):
    batches = take(make_loader(config(corpus, batch_size=1), BYTES), 400)
    (stream,) = streams_of(batches, 1)
    texts = BYTES.decode([ord("\n") + 6 if t == BYTES.eos_id else t for t in stream]).split("\n")
    epochs = [texts[:50], texts[50:100], texts[100:150]]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_another_seed_gives_other_batches_and_the_same_seed_the_same(corpus):
    first, again, other = (
        take(make_loader(config(corpus, seed=seed), BYTES), 5) for seed in (1, 1, 2)
    )
    assert_same(first, again)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


def test_without_shuffling_documents_keep_their_order(corpus):
    loader = make_loader(config(corpus, shuffle=False, repeat=False, batch_size=1), BYTES)
    assert texts_of(streams_of(loader, 1)) == TEXTS


@pytest.mark.parametrize("repeat", [True, False])
def test_a_loader_resumes_from_any_batch(corpus, repeat):
    loader = make_loader(config(corpus, repeat=repeat), BYTES)
    states, batches = [loader.get_state()], []
    for batch in itertools.islice(loader, 25):
        batches.append(batch)
        states.append(loader.get_state())
    for cut, state in enumerate(states):
        resumed = make_loader(config(corpus, repeat=repeat), BYTES)
        resumed.set_state(json.loads(json.dumps(state)))
        assert resumed.get_state() == state
        assert_same(take(resumed, 25 - cut), batches[cut:])


def test_a_cut_at_the_end_of_a_document_loses_none(tmp_path):
    """Grain's own ConcatThenSplit drops the next document there when restored through JSON."""
    path = tmp_path / "fits.jsonl"
    texts = [f"{i:02}" + "x" * 22 for i in range(12)]  # 24 bytes and eos: one window each
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = config(path, min_seq_len=24, batch_size=1, shuffle=False, repeat=False)
    found = []
    state = make_loader(settings, BYTES).get_state()
    for _ in texts:
        loader = make_loader(settings, BYTES)
        loader.set_state(json.loads(json.dumps(state)))
        found += texts_of(streams_of([next(loader)], 1))
        state = loader.get_state()
    assert found == texts


def test_grain_restores_the_window_dataset_at_every_state(corpus):
    documents = TextDocuments(open_source(str(corpus), "train"), BYTES)
    windows = WindowDataset(
        [OrderedBlocks(documents, num_streams=3, seed=0, shuffle=True, repeat=False)],
        weights=[1.0],
        rows=range(3),
        positions=[(0, 0, 0)] * 3,
        step=0,
        num_rows=3,
        min_seq_len=12,
        max_seq_len=24,
        pad_id=0,
        seed=0,
        with_segment_ids=True,
    )
    experimental.assert_equal_output_after_checkpoint(windows)
    assert isinstance(windows, grain.IterDataset)


@pytest.mark.parametrize("process_counts", [(1, 2), (2, 4), (4, 1), (2, 2)])
def test_a_run_resumes_on_another_number_of_processes(corpus, process_counts):
    before, after = process_counts

    def loaders(count):
        settings = config(corpus, batch_size=8 // count)
        return [
            make_loader(settings, BYTES, process_index=i, process_count=count) for i in range(count)
        ]

    def global_batches(loaders, count):
        rows = [take(loader, count) for loader in loaders]
        return [
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for parts in zip(*rows, strict=True)
        ]

    unbroken = global_batches(loaders(1), 20)
    first = loaders(before)
    assert_same(global_batches(first, 9), unbroken[:9])
    state = json.loads(json.dumps(merge_states([loader.get_state() for loader in first])))
    second = loaders(after)
    for loader in second:
        loader.set_state(state)
    assert_same(global_batches(second, 11), unbroken[9:])


def test_a_state_that_lacks_a_processs_rows_is_refused(corpus):
    first, second = (
        make_loader(config(corpus), BYTES, process_index=i, process_count=2) for i in (0, 1)
    )
    with pytest.raises(ValueError, match="merge the states of all processes"):
        second.set_state(first.get_state())
    with pytest.raises(ValueError, match="no loader state covers row 0"):
        merge_states([second.get_state()])
    next(second)
    with pytest.raises(ValueError, match="steps 0 and 1"):
        merge_states([first.get_state(), second.get_state()])


@pytest.mark.parametrize(
    "change, name",
    [
        ({"seed": 9}, "seed: 3 -> 9"),
        ({"max_seq_len": 32}, "max_seq_len: 24 -> 32"),
        ({"min_seq_len": 11}, "min_seq_len: 12 -> 11"),
        ({"split": "train[:50%]"}, "records: 50 -> 25"),
        ({"batch_size": 8}, "global_batch_size: 4 -> 8"),
        ({"shuffle": False}, "shuffle: True -> False"),
    ],
)
def test_a_state_of_other_data_is_refused_with_the_difference(corpus, change, name):
    state = make_loader(config(corpus), BYTES).get_state()
    with pytest.raises(ValueError, match="differs from the checkpoint's") as caught:
        make_loader(config(corpus, **change), BYTES).set_state(state)
    assert name in str(caught.value)


def test_other_data_may_be_allowed(corpus):
    state = make_loader(config(corpus), BYTES).get_state()
    loader = make_loader(config(corpus, min_seq_len=20), BYTES)
    loader.set_state(state, allow_other_data=True)
    assert (next(loader)["pad_mask"].sum(1) <= 4).all()


def test_documents_that_became_shorter_end_where_they_end_now(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 100}) + "\n" for _ in range(8)))
    settings = config(path, batch_size=2, shuffle=False, repeat=False)
    loader = make_loader(settings, BYTES)
    take(loader, 3)
    state = loader.get_state()
    assert min(used for *_, used in state["positions"]) > 20
    path.write_text("".join(json.dumps({"text": f"short {i}"}) + "\n" for i in range(8)))
    loader = make_loader(settings, BYTES)
    loader.set_state(state, allow_other_data=True)
    assert sorted(texts_of(streams_of(loader, 2))) == [f"short {i}" for i in range(2, 8)]


@pytest.mark.parametrize(
    "splits, training",
    [
        (("train", "validation"), (0, 49)),
        (("train", "validation[:50%]"), (0, 49)),
        (("train[:90%]", "train[90%:]"), (0, 45)),
        (("train[:20]", "validation"), (0, 20)),
        (("train", ""), (0, 50)),
    ],
)
def test_training_on_files_leaves_out_what_is_kept_for_validation(corpus, splits, training):
    split, eval_split = splits
    settings = config(
        corpus, split=split, eval_split=eval_split, repeat=False, shuffle=False, batch_size=1
    )
    texts = texts_of(streams_of(make_loader(settings, BYTES), 1))
    assert texts == TEXTS[slice(*training)]


def test_segment_ids_count_the_documents_of_a_window(corpus):
    loader = make_loader(config(corpus, respect_documents=True), BYTES)
    for batch in take(loader, 20):
        np.testing.assert_array_equal(batch["segment_ids"] == 0, batch["pad_mask"])
        for row in range(4):
            tokens, segments, pads = (
                batch[name][row] for name in ("tokens", "segment_ids", "pad_mask")
            )
            begins = np.concatenate([[True], tokens[~pads][:-1] == BYTES.eos_id])
            np.testing.assert_array_equal(segments[~pads], np.cumsum(begins))
    plain = take(make_loader(config(corpus), BYTES), 1)[0]
    with_ids = take(make_loader(config(corpus, respect_documents=True), BYTES), 1)[0]
    np.testing.assert_array_equal(plain["tokens"], with_ids["tokens"])


def test_oddities_are_skipped_and_counted(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": ""}\nno json\n{"other": 1}\n\n{"text": "caf\xe9"}\n'
        + json.dumps({"text": "nul \0 and \ud800"}).encode()
        + b"\n"
        + json.dumps({"text": "long" * 20_000}).encode()
        + b"\n"
    )
    settings = config(path, shuffle=False, repeat=False, batch_size=2)
    loader = make_loader(settings, BYTES)
    texts = texts_of(streams_of(loader, 2))
    assert sorted(texts) == sorted(["good", "caf\ufffd", "nul \0 and ?", "long" * 20_000])
    assert loader.oddities == {"bad UTF-8": 1, "malformed line": 2, "empty document": 2}


def test_lines_without_any_text_are_an_error_not_an_endless_search(tmp_path):
    path = tmp_path / "other_key.jsonl"
    path.write_text('{"content": "words"}\n' * 20)
    with pytest.raises(ValueError, match=r'1000 documents in a row hold no text .*"text"'):
        next(make_loader(config(path), BYTES))


def test_a_batch_is_delivered_before_the_next_one_is_read(tmp_path):
    """A damaged record stops a run at the batch that needs it, not one before."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 24}) + "\n" for _ in range(8)))
    settings = config(path, min_seq_len=24, batch_size=4, shuffle=False, repeat=False)
    reads = []

    class Recording(ByteTokenizer):
        def encode(self, text):
            reads.append(text)
            return super().encode(text)

    next(make_loader(settings, Recording()))
    assert len(reads) == 4


def test_an_empty_split_is_an_error(corpus):
    with pytest.raises(ValueError, match="no documents"):
        make_loader(config(corpus, split="train[:0]"), BYTES)


def test_all_problems_of_a_config_are_named_at_once():
    expected = (
        r"batch_size must be .* least 1, not 0; seed must be .*, not '1'; min_seq_len 9 > .*8"
    )
    with pytest.raises(ValueError, match=expected):
        DataConfig(source="x", batch_size=0, seed="1", min_seq_len=9, max_seq_len=8)


class Melodies:
    """Token documents that were never text: melody i is i + 5 notes."""

    eos_id, pad_id = 1, 0
    oddities = ("out of tune",)
    documents_are_windows = False
    fingerprint = {"melodies": 20}  # noqa: RUF012

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> TokenDocument:
        notes = np.full(index + 5, index + 2, np.int32)
        notes[-1] = self.eos_id
        return TokenDocument(notes, True, 0, oddities=self.oddities[: index % 2])


def test_documents_of_another_modality_are_read_by_the_same_loader_and_evaluation(tmp_path):
    settings = config("melodies", repeat=False)
    loader = Loader(settings, Melodies(), process_index=0, process_count=1)
    tokens = np.concatenate([[*stream, 1] for stream in streams_of(loader, 4)])
    assert set(tokens) == {1, *range(2, 22)}
    assert loader.oddities == {"out of tune": 10}
    assert loader.fingerprint["melodies"] == 20
    batches = EvaluationBatches(settings, Melodies(), num_latents=8, process_index=0, rows=4)
    assert batches.num_tokens == sum(batch["weights"].sum() for batch in batches)
    assert batches.num_tokens == sum(i + 5 for i in range(20))
