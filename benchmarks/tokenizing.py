"""XLNet ids per CPU second on one core: ours, and Hugging Face's fast tokenizer; prints JSON.

    taskset -c 1 python benchmarks/tokenizing.py 'pages/*.jsonl' --tokenizer spiece.model

Both encode the same documents, pass after pass in turn. `first` is the first pass, in which no word
is known yet; `later` the median of the others; `ratio` that of their rates, ours to theirs.
"""

import argparse
import glob
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from processor import conditions
from timing import ratios, spread
from transformers import XLNetTokenizerFast

from perceiver_ar_jax.tokenizers import load_tokenizer
from perceiver_ar_jax.tokenizers.xlnet import SPECIAL_PIECES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jsonl", help='a file or a glob; documents under the key "text"')
    parser.add_argument("--tokenizer", required=True, help="XLNet's spiece.model")
    parser.add_argument("--passes", type=int, default=5)
    args = parser.parse_args()
    lines = [
        line
        for name in sorted(glob.glob(args.jsonl))
        for line in Path(name).read_text(encoding="utf-8").splitlines()
    ]
    texts = [json.loads(line)["text"] for line in lines]
    theirs = hugging_face_tokenizer(args.tokenizer)
    encoders = {
        "ours": load_tokenizer(args.tokenizer).encode_batch,
        "hugging_face": lambda texts: theirs(texts, add_special_tokens=False)["input_ids"],
    }
    ids, rates = {}, {name: [] for name in encoders}
    for _ in range(args.passes):
        for name, encode in encoders.items():
            begin = time.process_time()
            ids[name] = encode(texts)
            elapsed = time.process_time() - begin
            rates[name].append(round(sum(map(len, ids[name])) / elapsed))
    result = conditions() | {"documents": len(texts)}
    for name, (first, *later) in rates.items():
        result[name] = {
            "tokens": sum(map(len, ids[name])),
            "first": first,
            "later": round(statistics.median(later)),
            "spread": round(spread(later), 3),
            "rates": [first, *later],
        }
    first, *later = ratios(rates["ours"], rates["hugging_face"])
    result["ratio"] = {"first": round(first, 2), "later": round(statistics.median(later), 2)}
    same = sum(a == b for a, b in zip(ids["ours"], ids["hugging_face"], strict=True))
    print(json.dumps(result | {"documents_with_the_same_ids": same}, indent=1))


def hugging_face_tokenizer(path: str) -> XLNetTokenizerFast:
    """As the hub has it: newer versions of transformers cut the text at more symbols."""
    converted = json.loads(XLNetTokenizerFast(path).backend_tokenizer.to_str())
    converted["added_tokens"] = converted["added_tokens"][: len(SPECIAL_PIECES)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(json.dumps(converted))
        return XLNetTokenizerFast(tokenizer_file=str(file))


if __name__ == "__main__":
    main()
