"""What clients send and get: OpenAI's completions, and a few fields of ours."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from perceiver_ar_jax.generation.policies import POLICIES
from perceiver_ar_jax.serving.engine import MAX_ALTERNATIVES

MAX_SEED = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class CompletionRequest(BaseModel):
    """A prompt, and how to continue it."""

    # A name that does not exist is an error, and "5" is not a number.
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = Field(
        description="One text or several, or their token ids; none of them empty."
    )
    model: str | None = Field(None, description="Of /v1/models; null takes the one there is.")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="How many tokens to add at most; null is 16. 0, with echo and logprobs, only "
        "scores the prompt, which may then be longer than max_seq_len.",
    )
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = Field(
        None, description="Below 1e-6 the most likely token; null is 1."
    )
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="Sample among the fewest tokens with this probability."
    )
    n: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Continuations of each prompt; null is 1."
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = Field(
        None, description="Texts before which a continuation ends."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        None, description="The same seed gives the same text; null draws one."
    )
    echo: bool | None = Field(
        None,
        description="Begin the text with the prompt; with logprobs, as its tokens spell it, and "
        "with their log-probabilities.",
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = Field(
        None,
        description="Give the log-probability of each new token in nats, the model's own before "
        "temperature and filters, and those of so many likeliest tokens. An end of text counts.",
    )
    stream: bool | None = Field(None, description="Send each token as a server-sent event.")
    stream_options: "StreamOptions | None" = None
    user: str | None = Field(None, description="Ignored.")

    # Ours; from the openai package pass them as `extra_body`.
    top_k: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Sample among so many likeliest tokens."
    )
    num_latents: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None,
        description="How many of the prompt's last tokens are latents at the start; null chooses.",
    )
    policy: Literal[tuple(POLICIES)] | None = Field(
        None, description="What a token reads once the latents are used up; null is slide."
    )
    attention: bool | None = Field(
        None,
        description="With stream: give with each token what its prediction read in the hybrid "
        "layer, the mean over heads, oldest position first, in at most 256 equal parts.",
    )

    # OpenAI's, which this server does not have; their neutral values are taken.
    best_of: int | None = Field(None, description="Not supported, except 1.")
    frequency_penalty: float | None = Field(None, description="Not supported, except 0.")
    logit_bias: dict[str, float] | None = Field(None, description="Not supported, except {}.")
    presence_penalty: float | None = Field(None, description="Not supported, except 0.")
    suffix: str | None = Field(None, description="Not supported, except the empty text.")

    @field_validator("best_of", "frequency_penalty", "logit_bias", "presence_penalty", "suffix")
    @classmethod
    def _is_neutral(cls, value: Any, field: Any) -> Any:
        if value and not (field.field_name == "best_of" and value == 1):
            raise ValueError("this server does not support it; leave it out")
        return value


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = Field(None, description="End with an event that has `usage`.")


class LogProbs(BaseModel):
    """Of each token, in nats; -9999 stands for minus infinity, null for the first of a prompt."""

    tokens: list[str]  # a token that completes no character is or ends with U+FFFD
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]  # where each token begins in the text


class Choice(BaseModel):
    """One continuation, or a piece of it."""

    index: int
    text: str
    logprobs: LogProbs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    attention: list[float] | None = None


class Usage(BaseModel):
    """Tokens read and added."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The answer, or one event of a stream, which has pieces of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Model(BaseModel):
    """The model, and what it takes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["perceiver_ar_jax"] = "perceiver_ar_jax"
    max_seq_len: int
    max_latents: int
    max_tokens: int  # that a request may ask for


class Models(BaseModel):
    """The models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class TokenizerInfo(BaseModel):
    """The tokenizer; its special tokens have ids, and no text."""

    eos_token: None = None
    eos_token_id: int
    pad_token_id: int
    vocab_size: int


class Text(BaseModel):
    """A text to tokenize; special tokens are never added."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    add_special_tokens: bool | None = Field(None, description="Ignored.")


class Tokens(BaseModel):
    """Ids of a text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    tokens: list[TokenId]


class Health(BaseModel):
    """Whether the server answers requests, and how many continuations it has."""

    status: Literal["ok"] = "ok"
    running: int
    waiting: int
    tokens: int  # computed since the start


class ErrorDetail(BaseModel):
    """What is wrong, and where."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorDetail
