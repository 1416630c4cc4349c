"""Whether this host can feed a pod: how fast it reads a source, with how many workers and memory.

    python tools/check_data.py --source=gs://BUCKET/c4/en/3.0.1 --tokenizer=spiece.model \\
      --tokens_per_sec=245000

Reads training batches with 1, 2, 4, ... workers until the rate is reached or the cores are used up.
Exit code 0: this host can feed it; 1: it cannot; 2: the source cannot be read.
"""

from perceiver_ar_jax.command_line import Parser, run_script, start_script

start_script()

import argparse  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import psutil  # noqa: E402

from perceiver_ar_jax.data import DataConfig, make_loader  # noqa: E402
from perceiver_ar_jax.tokenizers import Tokenizer, load_tokenizer  # noqa: E402

CAN, CANNOT = 0, 1
HEADROOM = 1.2  # other work of a training host takes time too


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--source", required=True, help="as in config.data.source")
    parser.add_argument("--tokens_per_sec", type=float, required=True, help="that this host needs")
    parser.add_argument("--tokenizer", default="bytes", help="as in config.data.tokenizer")
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of this host")
    parser.add_argument("--hosts", type=int, default=1, help="of which this is one")
    parser.add_argument("--max_seq_len", type=int, default=1024)
    parser.add_argument("--min_seq_len", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--max_workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    workers = 1
    while True:
        rate = measure(args, tokenizer, workers)
        if rate >= HEADROOM * args.tokens_per_sec:
            print(f"yes: config.data.num_workers={workers}")
            return CAN
        if 2 * workers > min(args.max_workers, args.batch_size):
            print(
                f"no: {args.tokens_per_sec:,.0f} tokens/s with {HEADROOM - 1:.0%} to spare need "
                "more cores, a nearer bucket, or a cheaper tokenizer"
            )
            return CANNOT
        workers *= 2


def measure(args: argparse.Namespace, tokenizer: Tokenizer, workers: int) -> float:
    """Prints and returns tokens per second."""
    config = DataConfig(
        args.source,
        split=args.split,
        min_seq_len=args.min_seq_len,
        max_seq_len=args.max_seq_len,
        batch_size=args.batch_size,
        num_workers=workers,
    )
    start = time.perf_counter()
    loader = make_loader(config, tokenizer, process_count=args.hosts)
    next(loader)
    first_batch = time.perf_counter() - start
    for _ in range(10):  # buffers fill
        next(loader)
    tokens, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < args.seconds:
        tokens += int((~next(loader)["pad_mask"]).sum())
    memory = sum(child.memory_full_info().pss for child in psutil.Process().children(True))
    retries = loader.retries
    loader.close()
    rate = tokens / elapsed
    print(
        f"{workers} worker{'s' if workers > 1 else ''}: {rate:,.0f} tokens/s, "
        f"{memory / 1e6:,.0f} MB in workers, first batch after {first_batch:.1f} s, "
        f"{retries} repeated requests; a loop that needs {args.tokens_per_sec:,.0f} tokens/s "
        f"waits for data {max(0.0, 1 - rate / args.tokens_per_sec):.0%} of the time",
        flush=True,
    )
    return rate


if __name__ == "__main__":
    run_script(os.path.basename(sys.argv[0]), main)
