"""Tokens per second of our data pipeline and of perceiver-io's, on the same JSONL; prints JSON.

    python benchmarks/data.py 'pages/*.jsonl' --tokenizer spiece.model [--workers 2]

Theirs is perceiver-io's own C4DataModule with Hugging Face's XLNet tokenizer; only its source is
replaced, by the local file (needs requirements-parity.txt and `datasets`, or it is left out).
Both make batches of 32 windows of 512 to 1024 tokens. Every pipeline runs in a process of its
own, round after round in turn; rates are medians, per second and per CPU second of all its
processes (which other work on the machine hardly changes).
"""

import argparse
import glob
import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from processor import conditions
from timing import ratios, spread

BATCH_SIZE, MIN_SEQ_LEN, MAX_SEQ_LEN = 32, 512, 1024
NUM_DOCUMENTS = 30_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jsonl", help='a file or a glob; documents under the key "text"')
    parser.add_argument("--tokenizer", required=True, help="XLNet's spiece.model")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pipelines = {"ours": our_batches}
    if all(map(importlib.util.find_spec, ("datasets", "perceiver"))):
        pipelines["perceiver_io"] = their_batches
    with tempfile.TemporaryDirectory() as folder:
        path = repeat_documents(args.jsonl, folder)
        rates = {name: [] for name in pipelines}
        for _ in range(args.rounds):
            for name, batches in pipelines.items():
                rates[name].append(
                    in_own_process(batches, path, args.tokenizer, args.workers, args.seconds)
                )
    result = conditions() | {"workers": args.workers} | {name: {} for name in rates}
    for unit in ("second", "cpu_second"):
        per_unit = {name: [rate[unit] for rate in measured] for name, measured in rates.items()}
        for name, values in per_unit.items():
            result[name][f"tokens_per_{unit}"] = round(statistics.median(values))
            result[name][f"spread_per_{unit}"] = round(spread(values), 3)
        if "perceiver_io" in rates:
            ratio = statistics.median(ratios(per_unit["ours"], per_unit["perceiver_io"]))
            result[f"ratio_tokens_per_{unit}"] = round(ratio, 2)
    print(json.dumps(result, indent=2))


def repeat_documents(pattern: str, folder: str) -> str:
    """Writes NUM_DOCUMENTS documents with C4's columns; returns the glob for them.

    Eight files, as a worker of theirs reads whole files.
    """
    contents = [Path(name).read_text(encoding="utf-8") for name in sorted(glob.glob(pattern))]
    texts = [json.loads(line)["text"] for line in "".join(contents).strip().split("\n")]
    for part in range(8):
        with open(os.path.join(folder, f"{part}.jsonl"), "w") as file:
            for i in range(part, NUM_DOCUMENTS, 8):
                row = {"text": texts[i % len(texts)], "timestamp": "", "url": ""}
                file.write(json.dumps(row) + "\n")
    return os.path.join(folder, "*.jsonl")


def our_batches(path: str, tokenizer: str, num_workers: int):
    """(tokens, is a pad) of batch after batch."""
    from perceiver_ar_jax.data import DataConfig, make_loader
    from perceiver_ar_jax.tokenizers import load_tokenizer

    config = DataConfig(
        path,
        min_seq_len=MIN_SEQ_LEN,
        max_seq_len=MAX_SEQ_LEN,
        batch_size=BATCH_SIZE,
        num_workers=num_workers,
    )
    for batch in make_loader(config, load_tokenizer(tokenizer)):
        yield batch["tokens"], batch["pad_mask"]


def their_batches(path: str, tokenizer: str, num_workers: int):
    from datasets import load_dataset
    from perceiver.data.text.c4 import C4DataModule
    from transformers import XLNetTokenizerFast

    class LocalDataModule(C4DataModule):
        def _create_dataset(self, split):
            rows = load_dataset("json", data_files=path, split="train", streaming=True)
            return rows.shuffle(seed=0, buffer_size=self.hparams.shuffle_window_size)

    multiprocessing.set_start_method("fork", force=True)  # its workers cannot be pickled
    folder = Path(path).parent / "tokenizer"
    if not folder.is_dir():
        XLNetTokenizerFast(tokenizer, clean_up_tokenization_spaces=True).save_pretrained(folder)
    module = LocalDataModule(
        str(folder),
        MAX_SEQ_LEN,
        min_seq_len=MIN_SEQ_LEN,
        batch_size=BATCH_SIZE,
        num_train_workers=num_workers,
        padding_side="left",
        pin_memory=False,
    )
    module.setup()
    while True:  # a file may be shorter than a measurement
        for _, input_ids, pad_mask in module.train_dataloader():
            yield input_ids.numpy(), pad_mask.numpy()


def in_own_process(batches, *args) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sender, batches, *args))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def measure(sender, batches, path: str, tokenizer: str, num_workers: int, seconds: float) -> None:
    iterator = batches(path, tokenizer, num_workers)
    for _ in range(20):  # workers start, buffers fill
        next(iterator)
    tokens, start, cpu_start = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - start < seconds:
        ids, is_pad = next(iterator)
        tokens += ids.size - int(is_pad.sum())
    elapsed, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    sender.send({"second": tokens / elapsed, "cpu_second": tokens / cpu})
    iterator.close()


def cpu_seconds() -> float:
    """Of this process and its children so far."""
    this = psutil.Process()
    times = [process.cpu_times() for process in [this, *this.children(recursive=True)]]
    return sum(time.user + time.system for time in times)


if __name__ == "__main__":
    main()
