import json

import numpy as np
import pytest

from perceiver_ar_jax.data import DataConfig, evaluation_batches
from perceiver_ar_jax.data.record_files import MAX_PIECE_BYTES
from perceiver_ar_jax.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def counted(batches, num_latents: int):
    """(target, the tokens before it in its window) of each target that counts, in order."""
    found = []
    for batch in batches:
        for tokens, targets, pads, weights in zip(
            *(batch[name] for name in ("tokens", "targets", "pad_mask", "weights")), strict=True
        ):
            assert not weights[:-num_latents].any()
            assert not weights[pads].any()
            for place in np.flatnonzero(weights):
                found.append((int(targets[place]), tokens[: place + 1][~pads[: place + 1]]))
    return found


def places(batches):
    """`batches.places` of all steps, joined."""
    return np.concatenate([batches.places(step) for step in range(len(batches))], axis=1)


@pytest.mark.parametrize("respect_documents", [False, True])
@pytest.mark.parametrize(
    ("num_latents", "stride"), [(1, 1), (3, None), (5, 2), (5, None), (8, 3), (8, 8)]
)
@pytest.mark.parametrize("lengths", [(30, 0, 7, 12), (4,), (8,), (15, 0)])
def test_every_token_counts_once_with_all_available_context(
    tmp_path, num_latents, stride, lengths, respect_documents
):
    texts = [chr(ord("a") + i) * length for i, length in enumerate(lengths)]
    config = DataConfig(
        write_jsonl(tmp_path / "x.jsonl", texts),
        min_seq_len=8,
        max_seq_len=8,
        batch_size=3,
        respect_documents=respect_documents,
    )
    batches = evaluation_batches(config, BYTES, num_latents=num_latents, stride=stride)
    stream, positions, starts = [2], [], [0]
    for text in texts:
        document = [ord(char) + 6 for char in text] + ([2] if text else [])
        positions += range(len(document))
        starts += [len(stream)] * len(document)
        stream += document
    found = counted(batches, num_latents)
    assert [target for target, _ in found] == stream[1:]
    for i, (_, context) in enumerate(found):
        np.testing.assert_array_equal(context, stream[i + 1 - len(context) : i + 1])
        assert len(context) >= min(i + 1, 8 - (stride or num_latents) + 1)
    assert batches.num_tokens == len(stream) - 1
    assert batches.num_bytes == sum(lengths)
    assert batches.num_words == sum(length > 0 for length in lengths)

    context_K = np.array([len(context) for _, context in found])
    if respect_documents:  # the source of target i is token i
        context_K = np.minimum(context_K, [i + 1 - starts[i] for i in range(len(found))])
    got_positions, got_contexts, _ = places(batches)
    np.testing.assert_array_equal(got_positions, positions)
    np.testing.assert_array_equal(got_contexts, context_K)


def test_of_what_a_target_reads_the_positions_before_the_latents_are_prefix(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", ["x" * 29])
    config = DataConfig(source, min_seq_len=8, max_seq_len=8)
    batches = evaluation_batches(config, BYTES, num_latents=6, stride=3)
    _, contexts, prefixes = places(batches)
    # Windows end at 3, 6, 9, ...; the first two are shorter than the latents or just fit them.
    np.testing.assert_array_equal(prefixes, [0] * 6 + [2] * 24)
    np.testing.assert_array_equal(contexts, [1, 2, 3, 4, 5, 6] + [6, 7, 8] * 8)


@pytest.mark.parametrize("stride", [0, 5])
def test_a_stride_beyond_the_latents_is_refused(tmp_path, stride):
    config = DataConfig(write_jsonl(tmp_path / "x.jsonl", ["x"]), min_seq_len=1, max_seq_len=8)
    with pytest.raises(ValueError, match=rf"stride={stride} out of valid range \[1\.\.4\]"):
        evaluation_batches(config, BYTES, num_latents=4, stride=stride)


def test_batches_have_one_shape_and_end_with_rows_of_pads(tmp_path):
    config = DataConfig(
        write_jsonl(tmp_path / "x.jsonl", ["x" * 29]), min_seq_len=8, max_seq_len=8, batch_size=4
    )
    batches = evaluation_batches(config, BYTES, num_latents=4)
    first, second, third = list(batches), list(batches), next(iter(batches))
    assert len(batches) == len(first) == 2  # 30 targets in 8 windows
    assert third["weights"].dtype == np.float32
    for one, other in zip(first, second, strict=True):
        for name in one:
            assert one[name].shape == (4, 8)
            np.testing.assert_array_equal(one[name], other[name])
    config = DataConfig(config.source, min_seq_len=8, max_seq_len=8, batch_size=5)
    *_, last = evaluation_batches(config, BYTES, num_latents=4)
    assert last["pad_mask"][3:].all()
    assert not last["weights"][3:].any()
    assert (last["tokens"][3:] == 0).all()


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_share_the_windows_and_have_equally_many_batches(tmp_path, process_count):
    source = write_jsonl(tmp_path / "x.jsonl", ["hello world, " * 9, "and more"])
    alone = DataConfig(source, min_seq_len=8, max_seq_len=8, batch_size=2 * process_count)
    config = DataConfig(source, min_seq_len=8, max_seq_len=8, batch_size=2)
    expected = list(evaluation_batches(alone, BYTES, num_latents=3))
    parts = [
        evaluation_batches(
            config, BYTES, num_latents=3, process_index=i, process_count=process_count
        )
        for i in range(process_count)
    ]
    assert {part.num_tokens for part in parts} == {9 * 13 + 8 + 2}
    for whole, *rows in zip(expected, *parts, strict=True):
        for name in whole:
            np.testing.assert_array_equal(whole[name], np.concatenate([r[name] for r in rows]))


def test_bytes_are_those_of_the_text_not_of_the_tokens(tmp_path):
    texts = ["Größe €5", "日本語\n\n  end"]
    config = DataConfig(write_jsonl(tmp_path / "x.jsonl", texts), min_seq_len=1, max_seq_len=8)
    batches = evaluation_batches(config, BYTES, num_latents=4)
    assert batches.num_bytes == sum(len(text.encode()) for text in texts)
    assert batches.num_tokens == batches.num_bytes + 2


def test_a_plain_text_is_one_document_whatever_pieces_it_is_read_in(tmp_path):
    text = "\n\n".join("A paragraph — of some length. " * (i % 40 + 1) for i in range(60))
    assert len(text.encode()) > 2 * MAX_PIECE_BYTES
    (tmp_path / "book.txt").write_text(text)
    config = DataConfig(
        str(tmp_path / "*.txt"), min_seq_len=64, max_seq_len=64, respect_documents=True
    )
    batches = evaluation_batches(config, BYTES, num_latents=64)
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    assert BYTES.decode(targets[:-1]) == text
    assert targets[-1] == BYTES.eos_id
    segments = np.concatenate([b["segment_ids"][b["weights"] > 0] for b in batches])
    assert segments[0] == 1  # the eos before the text
    assert set(segments[1:64]) == {2}
    assert set(segments[64:]) == {1}


def test_a_split_without_text_is_an_error(tmp_path):
    config = DataConfig(write_jsonl(tmp_path / "x.jsonl", [""]), min_seq_len=1, max_seq_len=8)
    with pytest.raises(ValueError, match="no text in train"):
        evaluation_batches(config, BYTES, num_latents=4)


def test_num_latents_beyond_the_window_is_refused(tmp_path):
    config = DataConfig(write_jsonl(tmp_path / "x.jsonl", ["x"]), min_seq_len=1, max_seq_len=8)
    with pytest.raises(ValueError, match=r"num_latents=9 out of valid range \[1..8\]"):
        evaluation_batches(config, BYTES, num_latents=9)
