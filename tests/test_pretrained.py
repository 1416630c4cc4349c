"""What `load_pretrained` gives, and what it refuses."""

import json

import numpy as np
import pytest
from small_models import random_params, small_config

from perceiver_ar_jax import load_pretrained
from perceiver_ar_jax.conversion import write_reference
from perceiver_ar_jax.pretrained import save_pretrained

CONFIG = small_config()


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def test_a_tokenizer_of_an_unknown_kind_is_left_out_with_a_warning(params, tmp_path):
    write_reference(tmp_path, params, CONFIG)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer"})
    )
    with pytest.warns(UserWarning, match=r"without its tokenizer: no tokenizer in .* spiece.model"):
        pretrained = load_pretrained(tmp_path)
    assert pretrained.tokenizer is None
    np.testing.assert_array_equal(
        pretrained.params["token_embedding"]["embedding"], params["token_embedding"]["embedding"]
    )


def test_a_step_that_is_not_there_is_answered_with_those_that_are(params, tmp_path):
    save_pretrained(tmp_path, CONFIG, params)
    with pytest.raises(ValueError, match="has no checkpoint of step 3; its steps: 0"):
        load_pretrained(tmp_path, step=3)
    assert load_pretrained(tmp_path, step=0).step == 0
