import itertools
import json

import numpy as np
import pytest

from perceiver_ar_jax.data import DataConfig, evaluation_batches, make_loader, merge_states
from perceiver_ar_jax.data.opening import open_documents
from perceiver_ar_jax.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
EOS = BYTES.eos_id


def config(source="mirror:12", **changes) -> DataConfig:
    defaults = {"min_seq_len": 12, "max_seq_len": 12, "batch_size": 4, "seed": 3}
    return DataConfig(source, **(defaults | changes))


def real(batch, row, name="tokens") -> list[int]:
    return batch[name][row][~batch["pad_mask"][row]].tolist()


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], name)


@pytest.mark.parametrize("order", ["mirror", "repeat"])
def test_a_document_is_bytes_their_copy_and_eos_and_the_copys_targets_count(order):
    documents = open_documents(config(f"{order}:12"), BYTES)
    for index in (0, 1, len(documents) - 1):
        document = documents[index]
        source, copy, end = np.split(document.tokens, [6, 12])
        np.testing.assert_array_equal(copy, source[::-1] if order == "mirror" else source)
        assert end == [EOS]
        assert document.counted.tolist() == [False] * 7 + [True] * 6
        assert document.num_bytes == 5  # the counted tokens without eos
    tokens = np.concatenate([documents[index].tokens[:6] for index in range(2000)])
    assert sorted(set(tokens.tolist())) == list(range(BYTES.num_special, BYTES.vocab_size))


def test_documents_are_the_same_on_every_machine():
    """Published accuracies belong to these documents: change them only with a new name."""
    documents = open_documents(config("mirror:8"), BYTES)
    assert documents[5].tokens.tolist() == [123, 86, 225, 142, 142, 225, 86, 123, EOS]


def test_training_and_validation_differ_and_no_two_documents_are_alike():
    train, validation = (
        open_documents(config("mirror:64", max_seq_len=64, split=split), BYTES)
        for split in ("train", "validation")
    )
    first = {tuple(split[i].tokens) for split in (train, validation) for i in range(500)}
    assert len(first) == 1000


def test_every_window_is_a_document_or_its_beginning():
    ends = set()
    for batch in itertools.islice(make_loader(config(min_seq_len=8), BYTES), 50):
        for row in range(4):
            tokens, targets = real(batch, row), real(batch, row, "targets")
            ends.add(len(tokens))
            assert tokens[1:] == targets[:-1]
            whole = tokens[:6] + tokens[5::-1] + [EOS]
            assert [tokens[0], *targets] == whole[: len(tokens) + 1]
            weights = real(batch, row, "weights")
            assert weights == [float(place >= 6) for place in range(len(tokens))]
    assert ends == {8, 9, 10, 11, 12}


def test_with_half_as_many_latents_the_prefix_is_what_is_copied():
    batch = next(make_loader(config(), BYTES))
    assert not batch["pad_mask"].any()
    np.testing.assert_array_equal(batch["tokens"][:, 6:], batch["tokens"][:, 5::-1])
    np.testing.assert_array_equal(batch["weights"], np.tile(np.arange(12) >= 6, (4, 1)))


@pytest.mark.parametrize("cut", [0, 3])
def test_a_run_resumes_on_another_number_of_processes(cut):
    settings = config(min_seq_len=7)
    unbroken = list(itertools.islice(make_loader(settings, BYTES), 8))
    loader = make_loader(settings, BYTES)
    for _ in range(cut):
        next(loader)
    state = json.loads(json.dumps(merge_states([loader.get_state()])))
    halves = []
    for process in (0, 1):
        half = config(min_seq_len=7, batch_size=2)
        loader = make_loader(half, BYTES, process_index=process, process_count=2)
        loader.set_state(state)
        halves.append(list(itertools.islice(loader, 8 - cut)))
    joined = [
        {name: np.concatenate([one[name], other[name]]) for name in one}
        for one, other in zip(*halves, strict=True)
    ]
    assert_same(joined, unbroken[cut:])


def test_a_state_of_another_task_is_refused():
    state = make_loader(config(), BYTES).get_state()
    with pytest.raises(ValueError, match="task: 'mirror' -> 'repeat'"):
        make_loader(config("repeat:12"), BYTES).set_state(state)


@pytest.mark.parametrize("num_latents", [6, 4, 5, 12])
def test_evaluation_counts_every_target_of_the_copy_once(num_latents):
    settings = config("mirror:12", split="validation", batch_size=100)
    documents = open_documents(settings, BYTES)
    batches = evaluation_batches(settings, BYTES, num_latents=num_latents)
    assert batches.num_tokens == 6 * len(documents)
    assert batches.num_bytes == 5 * len(documents)
    found = []
    for batch in batches:
        counted = batch["weights"] > 0
        assert not counted[:, : batches.prefix_len].any()
        for row in np.flatnonzero(counted.any(1)):
            length = 12 - int(batch["pad_mask"][row].sum())
            window = [*real(batch, row), batch["targets"][row, -1]]
            places = np.flatnonzero(counted[row]) - 12 + length + 1
            found += [(tuple(window[:6]), place, window[place]) for place in places]
    expected = [
        (tuple(documents[i].tokens[:6]), place, documents[i].tokens[place])
        for i in range(len(documents))
        for place in range(7, 13)
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "mirror:7"}, "mirror:7: the positions .* even number of at least 4"),
        ({"source": "repeat:2"}, "even number of at least 4, such as repeat:128"),
        ({"source": "repeat:many"}, "even number of at least 4"),
        ({"source": "mirror:14"}, "windows of 14 positions; the model reads at most 12"),
        ({"split": "train[:1%]"}, r"the splits train and validation, not train\[:1%\]"),
        ({"source": "mirrors:12"}, "no data at mirrors:12"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_loader(config(**changes), BYTES)


def test_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="mirror:12 is made of bytes"):
        make_loader(config(), object())
