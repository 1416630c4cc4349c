"""Tokens per second from a bucket and from the local disk, the same files; prints one JSON object.

    python benchmarks/remote_data.py --latency_ms=50 --source=DIR --tokenizer=spiece.model

DIR is a prepared TFDS directory, `.../c4/en/3.0.1`. A server of our own imitates the bucket
(tools/storage_server.py); gcsfs reads from it. Both loaders run in processes of their own, in turn,
round after round; rates are medians. `peak_memory_bytes` is what a loader and its workers add
together (proportional set size), and `seconds_to_first_batch` begins with the start of the process.
`--shards=1024` pretends by symbolic links that the dataset has so many shards.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from processor import processor

ROOT = Path(__file__).resolve().parent.parent
MIN_SEQ_LEN, MAX_SEQ_LEN = 512, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="a prepared TFDS directory")
    parser.add_argument("--latency_ms", type=float, default=50.0)
    parser.add_argument("--megabytes_per_sec", type=float, default=100.0)
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32, help="rows of this host")
    parser.add_argument("--hosts", type=int, default=1, help="of which this is one")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "bucket" / "c4" / "3.0.1"
        link_dataset(Path(args.source), local, args.shards)
        server = subprocess.Popen(
            [
                sys.executable,
                ROOT / "tools" / "storage_server.py",
                folder,
                f"--latency_ms={args.latency_ms}",
                f"--megabytes_per_sec={args.megabytes_per_sec}",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            os.environ["STORAGE_EMULATOR_HOST"] = server.stdout.readline().strip()
            os.environ["FSSPEC_GCS_TOKEN"] = "anon"
            # Otherwise gcsfs asks a gRPC service, which the server does not imitate, for minutes.
            os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
            remote = "gs://bucket/c4/3.0.1"
            rounds = [
                [in_own_process(source, args) for source in (str(local), remote)]
                for _ in range(args.rounds)
            ]
        finally:
            server.kill()
            server.wait()
            server.stdout.close()
    medians = {
        name: [statistics.median(pair[i][name] for pair in rounds) for i in (0, 1)]
        for name in rounds[0][0]
    }
    ratios = [away["tokens_per_sec"] / here["tokens_per_sec"] for here, away in rounds]
    result = {
        "tokens_per_sec": round(medians["tokens_per_sec"][1]),
        "local_tokens_per_sec": round(medians["tokens_per_sec"][0]),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "tokens_per_cpu_sec": round(medians["tokens_per_cpu_sec"][1]),
        "local_tokens_per_cpu_sec": round(medians["tokens_per_cpu_sec"][0]),
        "peak_memory_bytes": round(max(pair[1]["peak_memory_bytes"] for pair in rounds)),
        "seconds_to_first_batch": round(medians["seconds_to_first_batch"][1], 2),
        "local_seconds_to_first_batch": round(medians["seconds_to_first_batch"][0], 2),
        "retries": sum(pair[1]["retries"] for pair in rounds),
        "load_average": os.getloadavg()[0],
        "processor": processor(),
    }
    print(json.dumps(vars(args) | result, indent=2))


def link_dataset(source: Path, target: Path, num_shards: int) -> None:
    """Links to the files of a prepared dataset, those of `train` up to `num_shards` times."""
    target.mkdir(parents=True)
    info = json.loads((source / "dataset_info.json").read_text())
    (train,) = (split for split in info["splits"] if split["name"] == "train")
    lengths = train["shardLengths"]
    shards = sorted(source.glob("*-train.*"))
    for path in source.iterdir():
        if path.name != "dataset_info.json" and (path not in shards or not num_shards):
            (target / path.name).symlink_to(path.resolve())
    if num_shards:
        prefix = shards[0].name.partition("-of-")[0][:-5]
        for i in range(num_shards):
            name = f"{prefix}{i:05}-of-{num_shards:05}"
            (target / name).symlink_to(shards[i % len(shards)].resolve())
        train["shardLengths"] = [lengths[i % len(lengths)] for i in range(num_shards)]
    (target / "dataset_info.json").write_text(json.dumps(info))


def in_own_process(source: str, args: argparse.Namespace) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sender, source, args, time.time()))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def measure(sender, source: str, args: argparse.Namespace, started: float) -> None:
    from perceiver_ar_jax.data import DataConfig, make_loader
    from perceiver_ar_jax.tokenizers import load_tokenizer

    memory = PeakMemory()
    config = DataConfig(
        source,
        min_seq_len=MIN_SEQ_LEN,
        max_seq_len=MAX_SEQ_LEN,
        batch_size=args.batch_size,
        num_workers=args.workers,
    )
    loader = make_loader(config, load_tokenizer(args.tokenizer), process_count=args.hosts)
    next(loader)
    first_batch = time.time() - started
    for _ in range(20):  # buffers fill
        next(loader)
    tokens, start, cpu_start = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - start < args.seconds:
        tokens += int((~next(loader)["pad_mask"]).sum())
    elapsed, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    loader.close()
    sender.send(
        {
            "tokens_per_sec": tokens / elapsed,
            "tokens_per_cpu_sec": tokens / cpu,
            "peak_memory_bytes": memory.stop(),
            "seconds_to_first_batch": first_batch,
            "retries": loader.retries,
        }
    )


class PeakMemory:
    """Watches the memory of this process and its children."""

    def __init__(self):
        self._peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The largest sum in bytes."""
        self._stopped.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            total = 0
            for process in processes():
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self._peak = max(self._peak, total)


def processes() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def cpu_seconds() -> float:
    times = [process.cpu_times() for process in processes()]
    return sum(time.user + time.system for time in times)


if __name__ == "__main__":
    main()
