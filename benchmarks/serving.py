"""What it costs a server that its clients do not arrive together; JSON.

    taskset -c 1 python benchmarks/serving.py --model DIR bytes_small

Clients ask for as many tokens each, greedily, at once or a pause apart. `tokens_per_second` is all
tokens by the time from the first request to the last token, on one core (taskset -c 1) by the CPU
time that was spent meanwhile; `first_token_s` is the median wait for a first token. In interleaved
rounds, of which `ratio` is the median; everything is compiled before. Weights are random unless
--model is a folder.
"""

import argparse
import json
import statistics
import threading
import time

import jax
from processor import conditions
from timing import CLOCK, spread

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig, Pretrained, load_pretrained
from perceiver_ar_jax.model import init_params
from perceiver_ar_jax.serving.engine import Engine, Limits
from perceiver_ar_jax.serving.rows import Row, Settings
from perceiver_ar_jax.tokenizers import ByteTokenizer


class Endless(ByteTokenizer):
    """No text ends before it has as many tokens as were asked for."""

    eos_id = -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["bytes_small"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between two clients")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens of each client")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for name in args.model:
        print(json.dumps(measure(name, args)), flush=True)


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    pretrained = model_named(name)
    engine = Engine(pretrained, Limits())
    for count in (1, 2, 4, 8):  # compile for every size of a batch
        run(engine, args, count, pause=0)
    rounds = [
        {pause: run(engine, args, args.clients, pause) for pause in (0, args.pause)}
        for _ in range(args.rounds)
    ]
    engine.close()
    found = {
        kind: {
            "tokens_per_second": round(max(speed for speed, _ in results), 1),
            "first_token_s": round(statistics.median(first for _, first in results), 3),
        }
        for kind, results in {
            "together": [x[0] for x in rounds],
            "apart": [x[args.pause] for x in rounds],
        }.items()
    }
    ratio = [x[args.pause][0] / x[0][0] for x in rounds]
    found |= {"ratio": round(statistics.median(ratio), 2), "ratio_spread": round(spread(ratio), 3)}
    return conditions() | {"clock": CLOCK.__name__} | vars(args) | {"model": name} | found


def model_named(name: str) -> Pretrained:
    if name != "bytes_small":
        return load_pretrained(name)
    config = PerceiverARConfig.bytes_small()
    params = init_params(PerceiverAR(config), jax.random.key(0))
    return Pretrained(PerceiverAR(config), params, config, Endless(), step=0)


def run(engine: Engine, args: argparse.Namespace, count: int, pause: float) -> tuple[float, float]:
    """Tokens per second, and the median wait for a first token."""
    waits, ended = [], threading.Semaphore(0)

    def client() -> Row:
        start = time.perf_counter()
        seen = []

        def emit(piece):
            if not seen:
                seen.append(piece)
                waits.append(time.perf_counter() - start)
            if piece.error:
                raise SystemExit(piece.error)
            if piece.finish_reason:
                ended.release()

        key = jax.random.key(0)
        prompt = [6 + i % 256 for i in range(args.prompt)]
        options = {"max_tokens": args.new, "tokenizer": engine.pretrained.tokenizer}
        return Row(prompt, Settings(temperature=0.0), key=key, emit=emit, **options)

    start = CLOCK()
    if pause:
        for _ in range(count):
            engine.submit([client()])
            time.sleep(pause)
    else:
        engine.submit([client() for _ in range(count)])
    for _ in range(count):
        ended.acquire()
    return args.new * count / (CLOCK() - start), statistics.median(waits)


if __name__ == "__main__":
    main()
