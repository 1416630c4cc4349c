"""The app: a page, and completions in OpenAI's shape."""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, Response, StreamingResponse

from perceiver_ar_jax._version import __version__
from perceiver_ar_jax.generation import prompt as prompts
from perceiver_ar_jax.generation.options import GREEDY_BELOW
from perceiver_ar_jax.serving import schema
from perceiver_ar_jax.serving.engine import Engine, QueueFull, Stopped, row_keys
from perceiver_ar_jax.serving.errors import BadRequest, add_error_handlers, error_response
from perceiver_ar_jax.serving.guard import Guard
from perceiver_ar_jax.serving.rows import Piece, Row, Settings
from perceiver_ar_jax.tokenizers.protocol import valid_unicode

PAGE = (Path(__file__).parent / "page.html").read_text("utf-8")
PAGE_HEADERS = {
    # Nothing from elsewhere, and in no other page's frame.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
ERRORS = {
    status: {"model": schema.Error, "description": description}
    for status, description in {
        400: "the request cannot be answered as it is",
        403: "a foreign Host or Origin",
        404: "no such model",
        413: "the body is too large",
        429: "too many requests wait; Retry-After says when to try again",
        500: "generation failed",
        503: "the server is shutting down",
    }.items()
}


def make_app(engine: Engine, *, name: str) -> FastAPI:
    """The app that serves one model.

    Args:
      engine: what runs it; closed with the app.
      name: of the model, for clients.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        engine.close()

    app = FastAPI(
        title="perceiver_ar_jax",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard)
    add_error_handlers(app)
    config, tokenizer = engine.pretrained.config, engine.pretrained.tokenizer
    model = schema.Model(
        id=name,
        created=int(time.time()),
        max_seq_len=config.max_seq_len,
        max_latents=config.max_latents,
        max_tokens=engine.limits.max_tokens,
    )

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    @app.get("/health", responses={status: ERRORS[status] for status in (403, 503)})
    async def health() -> schema.Health:
        if not engine.alive:
            return error_response(503, "the engine has stopped")
        return schema.Health(
            running=engine.running, waiting=engine.waiting, tokens=engine.num_tokens
        )

    @app.get("/v1/models", responses={403: ERRORS[403]})
    async def models() -> schema.Models:
        return schema.Models(data=[model])

    @app.get("/v1/models/{name:path}", responses={status: ERRORS[status] for status in (403, 404)})
    async def model_named(name: str) -> schema.Model:
        _check_name(name, model.id)
        return model

    # As in vLLM, where lm-evaluation-harness looks for them.
    @app.get("/tokenizer_info", responses={403: ERRORS[403]})
    async def tokenizer_info() -> schema.TokenizerInfo:
        return schema.TokenizerInfo(
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
        )

    @app.post("/tokenize", responses={status: ERRORS[status] for status in (400, 403, 413)})
    def tokenize(body: schema.Text) -> schema.Tokens:
        return schema.Tokens(tokens=tokenizer.encode(valid_unicode(body.prompt)))

    @app.post("/detokenize", responses={status: ERRORS[status] for status in (400, 403, 413)})
    def detokenize(body: schema.Tokens) -> schema.Text:
        return schema.Text(prompt=_decoded(tokenizer, body.tokens, "tokens"))

    @app.post("/v1/completions", responses=ERRORS)
    async def completions(body: schema.CompletionRequest, request: Request) -> schema.Completion:
        _check_name(body.model, model.id)
        answer = await run_in_threadpool(
            _Answer, engine, model.id, body, asyncio.get_running_loop()
        )
        try:
            engine.submit(answer.rows)
        except QueueFull:
            return error_response(429, "too many requests wait", code="queue_full")
        except Stopped:
            return error_response(503, "the server is shutting down")
        if body.stream:
            return _Stream(answer)
        return await _unless_client_leaves(request, answer)

    return app


class _Answer:
    """The rows of one request, and what has come of them."""

    def __init__(self, engine, name, body, loop):
        tokenizer = engine.pretrained.tokenizer
        self._body, self._pieces = body, asyncio.Queue()
        texts_and_ids = _prompts(body.prompt, tokenizer)
        n = body.n or 1
        if len(texts_and_ids) * n > engine.limits.max_batch:
            raise BadRequest(
                f"{len(texts_and_ids)} prompts with n={n} are more than {engine.limits.max_batch} "
                "continuations, the most that one request may ask for",
                param="n",
            )
        seed = secrets.randbelow(schema.MAX_SEED) if body.seed is None else body.seed
        keys = row_keys(seed, len(texts_and_ids) * n)
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        if max_tokens > engine.limits.max_tokens:
            raise BadRequest(
                f"max_tokens={max_tokens} is more than {engine.limits.max_tokens}, the most that "
                "one request may ask for",
                param="max_tokens",
            )
        with_log_probs = body.logprobs is not None
        scores_prompt = bool(body.echo) and with_log_probs
        if not max_tokens and not scores_prompt:
            raise BadRequest("max_tokens=0 needs echo and logprobs", param="max_tokens")
        if body.attention and not body.stream:
            raise BadRequest("attention needs stream=true", param="attention")
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self.rows, self._echoes = [], []
        for text, ids in texts_and_ids:
            settings = _settings(body, ids, engine.pretrained) if max_tokens else Settings()
            for _ in range(n):
                index = len(self.rows)

                def emit(piece: Piece, index: int = index) -> None:
                    with contextlib.suppress(RuntimeError):  # the loop has ended
                        loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

                self.rows.append(
                    Row(
                        ids,
                        settings,
                        key=keys[index],
                        max_tokens=max_tokens,
                        tokenizer=tokenizer,
                        emit=emit,
                        stop=stop,
                        with_log_probs=with_log_probs,
                        scores_prompt=scores_prompt,
                    )
                )
                self._echoes.append(text if body.echo and not scores_prompt else "")
        self._offsets = [len(echo) for echo in self._echoes]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }

    def cancel(self):
        for row in self.rows:
            row.cancel()

    async def completion(self):
        """The whole answer; an error response if generation failed."""
        choices = [
            schema.Choice(index=index, text=echo, logprobs=self._log_probs([]))
            for index, echo in enumerate(self._echoes)
        ]
        async for index, piece in self._all_pieces():
            if piece.error:
                return error_response(500, piece.error)
            choice, more = choices[index], self._choice(index, piece)
            choice.text += more.text
            choice.finish_reason = more.finish_reason
            if choice.logprobs:
                for name, values in choice.logprobs:
                    if values is not None:
                        values.extend(getattr(more.logprobs, name))
        return schema.Completion(**self._head, choices=choices, usage=self._usage())

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        for index, echo in enumerate(self._echoes):
            if echo:
                yield self._event([schema.Choice(index=index, text=echo)])
        async for index, piece in self._all_pieces():
            if piece.error:
                yield f"data: {error_response(500, piece.error).body.decode()}\n\n"
                return
            yield self._event([self._choice(index, piece)])
        if self._body.stream_options and self._body.stream_options.include_usage:
            yield self._event([], usage=self._usage())
        yield "data: [DONE]\n\n"

    async def _all_pieces(self):
        left = len(self.rows)
        while left:
            index, piece = await self._pieces.get()
            left -= bool(piece.finish_reason)
            yield index, piece

    def _event(self, choices, **more):
        event = schema.Completion(**self._head, choices=choices, **more)
        return f"data: {event.model_dump_json()}\n\n"

    def _choice(self, index, piece):
        tokens = [] if piece.token is None else [(piece.token, self._offsets[index])]
        self._offsets[index] += len(piece.text)
        return schema.Choice(
            index=index,
            text=piece.text,
            logprobs=self._log_probs(tokens),
            finish_reason=piece.finish_reason,
            attention=piece.attention,
        )

    def _log_probs(self, tokens):
        wanted = self._body.logprobs
        if wanted is None:
            return None
        return schema.LogProbs(
            tokens=[token.text for token, _ in tokens],
            token_logprobs=[token.log_prob for token, _ in tokens],
            top_logprobs=[
                token.alternatives and dict(itertools.islice(token.alternatives.items(), wanted))
                for token, _ in tokens
            ]
            if wanted
            else None,
            text_offset=[offset for _, offset in tokens],
        )

    def _usage(self):
        read = sum(len(row.prompt) for row in self.rows[:: self._body.n or 1])
        added = sum(row.num_tokens for row in self.rows)
        return schema.Usage(prompt_tokens=read, completion_tokens=added, total_tokens=read + added)


class _Stream(StreamingResponse):
    def __init__(self, answer):
        super().__init__(answer.events(), media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:  # also when the client leaves
            self._answer.cancel()


async def _unless_client_leaves(request, answer):
    """The whole answer; generation stops when the client is gone."""
    completion = asyncio.ensure_future(answer.completion())
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({completion, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if completion.done():
            return completion.result()
        return Response(status_code=499)  # nobody reads it
    finally:
        answer.cancel()
        completion.cancel()
        leaving.cancel()


async def _left(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_name(asked, name):
    if asked is not None and asked != name:
        raise BadRequest(
            f"the model is {name!r}, not the one asked for",
            param="model",
            code="model_not_found",
        )


def _prompts(prompt, tokenizer):
    """Text and ids of each prompt."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt:
        raise BadRequest("prompt is empty", param="prompt")
    if isinstance(prompt[0], str):
        found = [(valid_unicode(text), tokenizer.encode(text)) for text in prompt]
    else:
        found = [(_decoded(tokenizer, ids, "prompt"), ids) for ids in prompt]
    if not all(ids for _, ids in found):
        raise BadRequest("the prompt is empty", param="prompt")
    return found


def _decoded(tokenizer, ids, param):
    try:
        return tokenizer.decode(ids)
    except ValueError as error:
        raise BadRequest(str(error), param=param) from None


def _settings(body, ids, pretrained):
    """What a continuation shares with its batch; BadRequest where the model cannot read it."""
    config = pretrained.config
    if len(ids) > config.max_seq_len:
        raise BadRequest(
            f"the prompt has {len(ids)} tokens, and the model reads at most {config.max_seq_len}; "
            "shorten it",
            param="prompt",
            code="context_length_exceeded",
        )
    num_latents = body.num_latents
    least = max(len(ids) - config.max_prefix_len, prompts.latents_with_room(config.max_latents))
    try:
        prompts.check(*prompts.as_rows([ids], None), num_latents or least, config)
    except ValueError as error:
        raise BadRequest(str(error), param="num_latents") from None
    temperature = 1.0 if body.temperature is None else body.temperature
    samples = temperature >= GREEDY_BELOW
    return Settings(
        temperature=temperature if samples else 0.0,
        top_k=body.top_k if samples else None,
        top_p=body.top_p if samples else None,
        policy=body.policy or "slide",
        num_latents=num_latents,
        least_latents=1 if num_latents else least,
        attention=bool(body.attention),
    )
