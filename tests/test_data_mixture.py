"""Several sources with weights: shares, resume, elasticity, each document once per epoch."""

import collections
import itertools
import json

import numpy as np
import pytest

from perceiver_ar_jax.data import DataConfig, evaluation_batches, make_loader, merge_states
from perceiver_ar_jax.data.config import split_sources
from perceiver_ar_jax.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
LETTERS = {"a": 40, "b": 25}  # documents of each source
WEIGHTS = {"a": 3, "b": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for letter, count in LETTERS.items():
        texts = [f"{i}" + letter * (17 * i % 90 + 1) for i in range(count)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{letter}.jsonl").write_text("\n".join(lines) + "\n")
    return ",".join(f"{folder}/{letter}.jsonl:{weight}" for letter, weight in WEIGHTS.items())


def loader_of(source, index=0, count=1, **changes):
    defaults = {"min_seq_len": 12, "max_seq_len": 24, "batch_size": 8 // count, "seed": 3}
    config = DataConfig(source=source, **(defaults | changes))
    return make_loader(config, BYTES, process_index=index, process_count=count)


def letter_of(tokens) -> str:
    (letter,) = set(BYTES.decode(tokens)) & LETTERS.keys()
    return letter


def test_each_window_is_of_one_source_and_weights_are_their_shares(source):
    found = collections.Counter()
    for batch in itertools.islice(loader_of(source), 60):
        for tokens, is_pad in zip(batch["tokens"], batch["pad_mask"], strict=True):
            found[letter_of(tokens[~is_pad])] += 1
    assert found["a"] / found.total() == pytest.approx(0.75, abs=0.06)


def test_every_document_of_all_sources_is_read_once(source):
    ends = sum(
        int((batch["targets"][~batch["pad_mask"]] == BYTES.eos_id).sum())
        for batch in loader_of(source, repeat=False)
    )
    assert abs(ends - sum(LETTERS.values())) <= 2 * 8  # a single last token makes no window


@pytest.mark.parametrize("cut", [0, 1, 7, 19])
def test_a_mixture_resumes_on_another_number_of_processes(source, cut):
    whole = [batch["tokens"] for batch in itertools.islice(loader_of(source), 20)]
    before = [loader_of(source, i, 2) for i in range(2)]
    for loader in before:
        for _ in range(cut):
            next(loader)
    state = json.loads(json.dumps(merge_states([loader.get_state() for loader in before])))
    after = [loader_of(source, i, 4) for i in range(4)]
    for loader in after:
        loader.set_state(state)
    for expected in whole[cut:]:
        found = np.concatenate([next(loader)["tokens"] for loader in after])
        np.testing.assert_array_equal(found, expected)


def test_other_weights_or_sources_are_another_run(source):
    state = loader_of(source).get_state()
    with pytest.raises(ValueError, match=r"weights: \[3.0, 1.0\] -> \[2.0, 1.0\]"):
        loader_of(source.replace(":3", ":2")).set_state(state)
    single = source.partition(":3")[0]
    with pytest.raises(ValueError, match="data differs"):
        loader_of(single).set_state(state)
    with pytest.raises(ValueError, match="has 6 numbers per row, not 3"):
        loader_of(single).set_state(state, allow_other_data=True)


def test_evaluation_reads_one_source_after_the_other(source):
    config = DataConfig(source=source, split="train", min_seq_len=12, max_seq_len=24)
    batches = evaluation_batches(config, BYTES, num_latents=24)
    counted = [token for batch in batches for token in batch["targets"][batch["weights"] > 0]]
    assert counted.count(BYTES.eos_id) == sum(LETTERS.values())
    text = BYTES.decode(counted)
    assert "a" not in text[text.index("b") :]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("c4/en:3.0.1", [("c4/en:3.0.1", 1)]),
        ("gs://b/x.jsonl", [("gs://b/x.jsonl", 1)]),
        ("one,file.txt", [("one,file.txt", 1)]),
        ("mirror:8", [("mirror:8", 1)]),
        ("c4/en:3.0.1:0.9, mine/*.jsonl:.1", [("c4/en:3.0.1", 0.9), ("mine/*.jsonl", 0.1)]),
    ],
)
def test_the_string_of_a_source(source, expected):
    assert split_sources(source) == expected


@pytest.mark.parametrize("source", ["a.txt:1,b.txt", "a.txt:0,b.txt:1", "a:nan,b:1", ":1,b:2"])
def test_a_source_without_a_weight_is_named(source):
    with pytest.raises(ValueError, match=r"source '.*' needs a weight above 0: name:weight"):
        DataConfig(source=source)
