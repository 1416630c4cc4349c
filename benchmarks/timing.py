"""Clocks, and what times of several rounds say, for all benchmarks."""

import functools
import operator
import os
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

CORES = len(os.sched_getaffinity(0))
# CPU time on one core (taskset), which other work on the machine hardly changes.
CLOCK = time.process_time if CORES == 1 else time.perf_counter


def timed(function: Callable, *arguments) -> float:
    """Seconds until all results of a call are there."""
    begin = CLOCK()
    jax.block_until_ready(function(*arguments))
    return CLOCK() - begin


def spread(values: Sequence[float]) -> float:
    """Half the interquartile range, relative to the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / statistics.median(values)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Of each round."""
    return list(map(operator.truediv, numerators, denominators))


def matmul_flops_per_second(size: int = 2048) -> float:
    """Of a square float32 product, the faster of two."""
    run, x = _product(size)
    return 2 * size**3 / min(timed(run, x, x) for _ in range(2))


@functools.cache
def _product(size):
    x = jnp.ones((size, size), jnp.float32)
    return jax.jit(jnp.matmul).lower(x, x).compile(), x
