import numpy as np

from perceiver_ar_jax.model.masks import causal


def as_bits(mask):
    return ["".join(map(str, row)) for row in np.asarray(mask).astype(int)]


def test_the_last_query_sees_all_keys_and_each_before_it_one_less():
    mask_1LK = causal(3, 5)
    assert mask_1LK.shape == (1, 3, 5)
    assert as_bits(mask_1LK[0]) == ["11100", "11110", "11111"]


def test_as_many_queries_as_keys_give_a_triangle():
    assert as_bits(causal(3, 3)[0]) == ["100", "110", "111"]


def test_padded_keys_are_hidden_from_every_query():
    pad_mask_BK = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]], bool)
    mask_BLK = causal(2, 4, pad_mask_BK)
    assert [as_bits(mask) for mask in mask_BLK] == [
        ["1110", "1111"],
        ["0110", "0111"],
        ["0000", "0001"],  # the first query is a pad itself
    ]
