"""The model as lm-evaluation-harness sees it; imports lm_eval, which [eval] installs.

Source: https://github.com/EleutherAI/lm-evaluation-harness, `lm_eval.api.model.LM`.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from perceiver_ar_jax.evaluation.progress import tracked
from perceiver_ar_jax.evaluation.scores import score_sequences
from perceiver_ar_jax.generation import stream
from perceiver_ar_jax.generation.prompt import default_num_latents, latents_with_room
from perceiver_ar_jax.pretrained import Pretrained
from perceiver_ar_jax.text_generation import NewText

MAX_NEW_TOKENS = 256  # where a task does not say; the harness's own default
ROWS = 16  # prompts that are continued at once
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class HarnessLM(LM):
    """A pretrained model for `lm_eval.simple_evaluate(model=HarnessLM(pretrained), tasks=…)`.

    Scores are those of `training.token_log_probs`, with as many latents as in training.

    Args:
      pretrained: with a tokenizer.
      batch_size: windows of max_seq_len to score at once; shorter ones are more. None: what fits.
      policy: of generation once the latents are used up, as in `generate`.

    Raises:
      ValueError: the model has no tokenizer.
    """

    def __init__(
        self, pretrained: Pretrained, *, batch_size: int | None = None, policy: Any = "slide"
    ):
        super().__init__()
        if pretrained.tokenizer is None:
            raise ValueError("the harness has texts, and this model has no tokenizer")
        self._pretrained, self._tokenizer = pretrained, pretrained.tokenizer
        self._batch_size, self._policy = batch_size, policy

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it.

        Where the context has no tokens it is eos, which precedes a document in training.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        sequences = [(context + continuation, len(continuation)) for context, continuation in pairs]
        return [
            (float(scores.log_probs.sum(dtype=np.float64)), not scores.ranks.any())
            for scores in self._score(sequences)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-probability of each whole text, which follows eos."""
        texts = [self._tokenizer.encode(request.args[0]) for request in requests]
        scored = self._score([([self._tokenizer.eos_id, *text], len(text)) for text in texts])
        return [float(scores.log_probs.sum(dtype=np.float64)) for scores in scored]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """What follows each context, up to the first of the strings in "until", or end of text.

        A context is cut on the left so that it leaves latents for new tokens, 128 of them where
        there are twice as many.
        """
        config, eos = self._pretrained.config, self._tokenizer.eos_id
        longest = config.max_prefix_len + latents_with_room(config.max_latents)
        prompts = []
        for index, request in enumerate(requests):
            context, settings = request.args
            tokens = (self._tokenizer.encode(context) or [eos])[-longest:]
            num_latents = default_num_latents(len(tokens), config)
            prompts.append((json.dumps(settings, sort_keys=True), num_latents, tokens, index))
        prompts.sort(key=lambda prompt: (*prompt[:2], len(prompt[2])))
        batches = [
            (settings, num_latents, rows[i : i + ROWS])
            for (settings, num_latents), group in itertools.groupby(prompts, lambda x: x[:2])
            for rows in [list(group)]
            for i in range(0, len(rows), ROWS)
        ]
        texts = [""] * len(requests)
        for settings, num_latents, batch in tracked(batches, len(batches), "batches of prompts"):
            *_, rows, indices = zip(*batch, strict=True)
            stops, options = _options(json.loads(settings))
            if options["do_sample"]:  # each prompt draws what it would draw alone
                options["rng"] = jax.vmap(jax.random.key)(np.array(indices))
            for index, text in zip(
                indices, self._continue(rows, num_latents, stops, options), strict=True
            ):
                texts[index] = text
        return texts

    def _score(self, sequences):
        return score_sequences(self._pretrained, sequences, batch_size=self._batch_size)

    def _encode_pair(self, context, continuation):
        """White space between the two belongs to the continuation, as tokens begin with it."""
        before = self._tokenizer.encode(context.rstrip() or context)
        if not before:
            return [self._tokenizer.eos_id], self._tokenizer.encode(context + continuation)
        whole = self._tokenizer.encode(context + continuation)
        return whole[: len(before)], whole[len(before) :]

    def _continue(self, rows, num_latents, stops, options):
        tokenizer = self._tokenizer
        new_texts = [NewText(tokenizer, row) for row in rows]
        texts, is_done = [""] * len(rows), [False] * len(rows)

        def add(row, piece, *, is_last=False):
            texts[row] += piece
            found = [place for stop in stops if (place := texts[row].find(stop)) >= 0]
            if found:
                texts[row] = texts[row][: min(found)]
            is_done[row] = is_last or bool(found)

        for tokens_B in stream(
            self._pretrained.model,
            self._pretrained.params,
            rows,
            num_latents=num_latents,
            policy=self._policy,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
            **options,
        ):
            for row, token in enumerate(tokens_B.tolist()):
                if is_done[row]:
                    continue
                if token == tokenizer.eos_id:
                    add(row, new_texts[row].flush(), is_last=True)
                else:
                    add(row, new_texts[row].push(token))
            if all(is_done):
                break
        for row, new_text in enumerate(new_texts):
            if not is_done[row]:
                add(row, new_text.flush())
        return texts


def evaluate_tasks(
    model: HarnessLM,
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The metrics of each task, named as the harness names them.

    Args:
      model: what is evaluated.
      tasks: names of tasks or groups.
      folder: with tasks of your own, as YAML.
      num_fewshot: examples before each question; None: as the task says.
      limit: documents of each task; None: all.

    Raises:
      ValueError: there is no such task.
    """
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=_task_manager(tasks, folder),
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
    )
    return found["results"]


def _task_manager(tasks: Sequence[str], folder: str | None) -> TaskManager:
    """Knows the tasks; reading the thousands that come with the harness takes it seconds."""
    own_alone: list[dict[str, Any]] = (
        [{"include_path": folder, "include_defaults": False}] if folder else []
    )
    for options in [*own_alone, {"include_path": folder}]:
        manager = TaskManager(**options)
        missing = [name for name in tasks if not manager.match_tasks([name])]
        if not missing:
            return manager
    raise ValueError(f"lm-eval has no task {', '.join(missing)} (`lm-eval ls tasks` lists all)")


def _options(settings: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The strings that end a text, and options of `generate`."""
    settings = dict(settings)
    stops = settings.pop("until", None) or []
    stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
    lengths = [settings.pop(name, None) for name in ("max_gen_toks", "max_new_tokens")]
    options = {"max_new_tokens": next((x for x in lengths if x is not None), MAX_NEW_TOKENS)}
    temperature = settings.get("temperature", 0.0)
    options["do_sample"] = settings.pop("do_sample", temperature > 0)
    if not options["do_sample"]:
        settings = {name: x for name, x in settings.items() if name not in OF_SAMPLING}
    return stops, options | settings
