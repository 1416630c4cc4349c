"""What a model knows, as JSON: how well it predicts a text, does at tasks, or uses its context.

Examples:
  perceiver-ar evaluate --model=runs/tiny --text=README.md --stride=16 --output=result.json
  python tools/plot_evaluation.py result.json
  perceiver-ar evaluate --model=runs/tiny --tasks=lambada_openai,piqa --limit=100
  perceiver-ar evaluate --model=runs/tiny --probe=passkey --text=README.md --output=passkey.json

Of a text (--text): nats per token, bits per byte, perplexity of words. Every token is predicted
once, with at least max_seq_len - stride tokens before it as far as there are. Attention stays
inside a document if the model was trained so. The file of --output has the loss by place in the
document and by how much the model read, too.

Tasks (--tasks) are those of lm-evaluation-harness, `pip install perceiver-ar-jax[eval]`.

Probes (--probe): "prefix", the loss of the same tokens after prefixes of several lengths;
"passkey", whether a number is recalled, by how long ago it was said; "repetition", how much better
random tokens are predicted when they come again; "generation", how varied generated texts are, and
the loss of the text's own continuation, under each decoding policy. All but "repetition" take
--text.

Exit codes: 0 done, 2 bad input, 4 no intact checkpoint, 130 interrupted.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from perceiver_ar_jax.command_line import Parser

PROBES = ("prefix", "passkey", "repetition", "generation")


def main(argv: list[str]) -> int:
    """Prints the result; returns the exit code."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    return _run(arguments)


def _parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add
    add("--model", "what load_pretrained reads: a workdir, a folder, a hub id", required=True)
    add("--text", "a file or glob of UTF-8 text or JSONL, or a TFDS name or directory")
    add("--split", "a split of a TFDS dataset, or a slice such as train[:1%%]", default="train")
    add(
        "--stride",
        "targets of a window; fewer give each more context and take longer (default: max_latents)",
        type=int,
    )
    add(
        "--batch_size",
        "windows per step (default: what fits into half of the accelerator's memory; 4 on a CPU, "
        "where more are slower)",
        type=int,
    )
    add("--probe", ", ".join(PROBES))
    add("--tasks", "names of tasks or groups of lm-evaluation-harness, separated by commas")
    add("--task_folder", "a folder with tasks of your own, as YAML")
    add("--num_fewshot", "examples before each question (default: as the task says)", type=int)
    add("--limit", "documents of each task (default: all)", type=int)
    add("--output", "a file for the result with its tables, which tools/plot_evaluation.py draws")
    add("--weights", "float32, bfloat16 or int8, as sample.py has them (default: as configured)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from absl import logging

    from perceiver_ar_jax.pretrained import load_pretrained

    logging.set_verbosity(logging.WARNING)
    pretrained = load_pretrained(arguments.model, weights=arguments.weights)
    if pretrained.tokenizer is None:
        raise ValueError(f"{arguments.model} has no tokenizer")
    result = {"model": arguments.model, "step": pretrained.step, "weights": arguments.weights}
    measure = _probe if arguments.probe else _on_tasks if arguments.tasks else _on_text
    result |= measure(pretrained, arguments)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: x for name, x in result.items() if not name.startswith("by_")}))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    probe, text = arguments.probe, arguments.text
    if probe and probe not in PROBES:
        raise ValueError(f"--probe={probe} is not one of {', '.join(PROBES)}")
    if (probe or text) if arguments.tasks else not (probe or text):
        raise ValueError("pass --text, --probe or --tasks")
    if arguments.output and not Path(arguments.output).resolve().parent.is_dir():
        raise ValueError(f"--output={arguments.output}: there is no such folder")
    if probe and (probe == "repetition") == bool(text):
        raise ValueError(f"--probe={probe} takes {'no' if text else 'a'} --text")


def _on_text(pretrained, arguments) -> dict[str, Any]:
    from perceiver_ar_jax.evaluation import evaluate_in_detail
    from perceiver_ar_jax.evaluation.progress import tracked

    batches = _read(pretrained, arguments)
    result = evaluate_in_detail(
        pretrained.params,
        batches,
        model=pretrained.model,
        track=lambda items: tracked(items, len(batches), "batches"),
    )
    perplexity = result.word_perplexity
    return {
        "text": arguments.text,
        "respect_documents": pretrained.respect_documents,
        "stride": batches.stride,
        "nats_per_token": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "word_perplexity": perplexity if math.isfinite(perplexity) else None,
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
        "words": result.num_words,
        **result.tables,
    }


def _probe(pretrained, arguments) -> dict[str, Any]:
    from perceiver_ar_jax.evaluation import generation_quality, probes

    if arguments.probe == "repetition":
        return {"repetition": probes.repetition(pretrained, batch_size=arguments.batch_size)}
    stream = _read(pretrained, arguments).stream
    if arguments.probe == "generation":
        table = generation_quality.generation_quality(pretrained, stream)
    else:
        measure = {"prefix": probes.loss_by_prefix, "passkey": probes.passkey}[arguments.probe]
        table = measure(pretrained, stream, batch_size=arguments.batch_size)
    return {"text": arguments.text, arguments.probe: table}


def _read(pretrained, arguments):
    from perceiver_ar_jax.data import DataConfig, evaluation_batches
    from perceiver_ar_jax.evaluation.batch_size import default_batch_size

    config, batch_size = pretrained.config, arguments.batch_size
    if batch_size is None:
        batch_size = default_batch_size(config)
    return evaluation_batches(
        DataConfig(
            source=arguments.text,
            split=arguments.split,
            min_seq_len=1,
            max_seq_len=config.max_seq_len,
            batch_size=batch_size,
            respect_documents=pretrained.respect_documents,
        ),
        pretrained.tokenizer,
        num_latents=config.max_latents,
        stride=arguments.stride,
    )


def _on_tasks(pretrained, arguments) -> dict[str, Any]:
    # The harness imports a package that is called as the script in a clone.
    sys.path = [folder for folder in sys.path if not (Path(folder) / "evaluate.py").is_file()]
    from perceiver_ar_jax.evaluation import HarnessLM, evaluate_tasks

    results = evaluate_tasks(
        HarnessLM(pretrained, batch_size=arguments.batch_size),
        arguments.tasks.split(","),
        folder=arguments.task_folder,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
    )
    return {"tasks": results}
