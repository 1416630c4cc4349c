import numpy as np

from perceiver_ar_jax.model.attention import MASK_VALUE, Visibility

PADS = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]], bool)


def as_bits(mask):
    return ["".join(map(str, row)) for row in np.asarray(mask).astype(int)]


def test_as_many_queries_as_keys_give_a_triangle():
    mask_1LK = Visibility(causal=True).mask(3, 3)
    assert mask_1LK.shape == (1, 3, 3)
    assert as_bits(mask_1LK[0]) == ["100", "110", "111"]


def test_fewer_queries_than_keys_are_the_last_ones():
    (mask_LK,) = Visibility(causal=True).mask(2, 4)
    assert as_bits(mask_LK) == ["1110", "1111"]


def test_some_of_the_queries_see_what_they_see_among_all():
    segments = np.array([[1, 1, 2, 2], [0, 0, 0, 0], [0, 0, 1, 1]])
    visible = Visibility(PADS, segments, segments, causal=True)
    whole_BLK = visible.mask(4, 4)
    np.testing.assert_array_equal(visible.of_queries(0, 2).mask(2, 2), whole_BLK[:, :2, :2])
    np.testing.assert_array_equal(visible.of_queries(2, 4).mask(2, 4), whole_BLK[:, 2:])
    assert Visibility(causal=True).of_queries(0, 2) == Visibility(causal=True)


def test_a_whole_prefix_needs_no_mask():
    assert Visibility().mask(3, 5) is None


def test_padding_alone_takes_a_mask_of_keys_without_a_dimension_of_queries():
    mask_B1K = Visibility(PADS).mask(2, 4)
    assert mask_B1K.shape == (3, 1, 4)
    assert [as_bits(mask) for mask in mask_B1K] == [["1111"], ["0111"], ["0001"]]


def test_padded_keys_are_hidden_from_every_query():
    mask_BLK = Visibility(PADS, causal=True).mask(4, 4)
    assert [as_bits(mask) for mask in mask_BLK] == [
        ["1000", "1100", "1110", "1111"],
        ["0000", "0100", "0110", "0111"],
        ["0000", "0000", "0000", "0001"],  # the first queries are pads themselves
    ]


def test_keys_of_other_documents_are_hidden():
    visible = Visibility(
        segment_ids_BL=np.array([[2, 2, 3], [0, 1, 1]]),
        segment_ids_BK=np.array([[1, 1, 2, 2, 3], [0, 0, 0, 1, 1]]),
    )
    masks_BLK = visible.mask(3, 5)
    assert [as_bits(mask) for mask in masks_BLK] == [
        ["00110", "00110", "00001"],
        ["11100", "00011", "00011"],
    ]


def test_hidden_keys_get_the_mask_value():
    scores_BNLK = np.ones((3, 2, 4, 4), np.float32)
    hidden = np.asarray(Visibility(PADS).hide(scores_BNLK))
    assert (hidden[2, :, :, :3] == MASK_VALUE).all()
    assert (hidden[2, :, :, 3] == 1).all()
    assert Visibility().hide(scores_BNLK) is scores_BNLK
