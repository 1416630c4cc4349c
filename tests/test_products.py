import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from small_models import quick_jit

from perceiver_ar_jax.model import products
from perceiver_ar_jax.model.products import product
from perceiver_ar_jax.parallel import use_mesh

SIZES = {"B": 2, "L": 6, "D": 8, "F": 12, "N": 3, "H": 4, "K": 5}
FORMS = (
    "LD,DF->LF",
    "BLF,DF->BLD",
    "BLD,BLF->DF",
    "BNLH,BNKH->BNLK",
    "BNLK,BNKH->BNLH",
    "BNLH,BNLK->BNHK",
)


def operands(form, dtype):
    rng = np.random.default_rng(0)
    shapes = ([SIZES[letter] for letter in names] for names in form.split("->")[0].split(","))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_the_sum_over_what_the_result_lacks(dtype):
    for form in FORMS:
        a, b = operands(form, dtype)
        exact = np.einsum(form, *(np.asarray(x, np.float64) for x in (a, b)))
        whole = quick_jit(lambda a, b, form=form: product(form, a, b, jnp.float32))(a, b)
        assert whole.dtype == jnp.float32
        np.testing.assert_allclose(whole, exact, atol=1e-5)
        own = quick_jit(lambda a, b, form=form: product(form, a, b))(a, b)
        assert own.dtype == dtype
        np.testing.assert_allclose(own.astype(float), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_on_cpu_bfloat16_is_summed_in_float32_and_the_left_operand_contracts_at_its_end(form):
    text = jax.jit(lambda a, b: product(form, a, b)).lower(*operands(form, "bfloat16")).as_text()
    (dot,) = re.findall(r"dot_general.*", text)
    assert dot.endswith("xf32>")
    rank = re.search(r": \(tensor<([\dx]+)xbf16>", dot)[1].count("x") + 1
    contracted = [
        int(axis) for axis in re.search(r"contracting_dims = \[(.*?)\]", dot)[1].split(",")
    ]
    assert contracted == list(range(rank - len(contracted), rank))
    assert text.count("LayoutConstraint") == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_platforms_get_the_plain_einsum(monkeypatch, dtype):
    monkeypatch.setattr(products, "platform_in_use", lambda: "tpu")
    for form in FORMS:
        ours, plain = (
            jax.jit(function).lower(*operands(form, dtype)).as_text()
            for function in (
                lambda a, b, form=form: product(form, a, b),
                lambda a, b, form=form: jnp.einsum(form, a, b),
            )
        )
        assert ours.splitlines()[1:] == plain.splitlines()[1:]


def test_operands_that_are_spread_over_devices_are_not_gathered():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    x, dy = operands("BLD,BLF->DF", "bfloat16")
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with use_mesh(mesh):
        gradient = jax.jit(lambda x, dy: product("BLD,BLF->DF", x, dy), in_shardings=(rows, rows))
        assert "all-gather" not in gradient.lower(x, dy).compile().as_text()
