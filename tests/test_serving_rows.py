"""What the server does without a model: text that may become a stop, requests of any kind."""

import json

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_config
from starlette.testclient import TestClient

from perceiver_ar_jax import PerceiverAR, Pretrained
from perceiver_ar_jax.serving import schema
from perceiver_ar_jax.serving.app import make_app
from perceiver_ar_jax.serving.engine import Limits
from perceiver_ar_jax.serving.rows import Row, Settings
from perceiver_ar_jax.tokenizers import ByteTokenizer

TEXTS = st.text("ab \n", min_size=1, max_size=30)
STOPS = st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=3)


def row(emit, **options):
    options = {"key": jax.random.key(0), "max_tokens": 100, "tokenizer": ByteTokenizer()} | options
    return Row([70], Settings(), emit=emit, **options)


def up_to_a_stop(text, stops):
    """The text before the first of the stops that is complete; all of it without any."""
    for length in range(len(text)):
        found = [i for stop in stops if (i := text[: length + 1].find(stop)) >= 0]
        if found:
            return text[: min(found)]
    return text


@given(TEXTS, STOPS)
def test_a_text_ends_before_the_first_stop_whatever_its_pieces(text, stops):
    pieces = []
    continuation = row(pieces.append, stop=stops, with_log_probs=True)
    for token in ByteTokenizer().encode(text):
        continuation.push(token, -1.0)
        shown = "".join(piece.text for piece in pieces)
        assert not any(stop in shown for stop in stops)
    continuation.push(ByteTokenizer.eos_id, -1.0)
    expected = up_to_a_stop(text, stops)
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish_reason == "stop"
    num_tokens = len(expected) + (expected == text)  # its end is one
    assert sum(piece.token is not None for piece in pieces) == num_tokens


class Repeater:
    """In place of an engine: each continuation is its prompt's last token again and again."""

    limits = Limits(max_tokens=40)

    def __init__(self, pretrained):
        self.pretrained = pretrained

    def submit(self, rows):
        for row in rows:
            likeliest = [(row.prompt[-1], -1.0)]
            if row.scores_prompt:
                row.push_prompt()
            while row.scores_prompt:
                row.push_prompt(-1.0, likeliest)
            while not row.done:
                row.push(row.prompt[-1], -1.0, likeliest)

    def close(self):
        pass


@pytest.fixture(scope="module")
def app():
    config = small_config(vocab_size=262, max_seq_len=40)
    pretrained = Pretrained(PerceiverAR(config), {}, config, ByteTokenizer(), step=0)
    return make_app(Repeater(pretrained), name="small")


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def from_schema(node, definitions):
    """Values of a JSON schema, as far as ours go."""
    if "$ref" in node:
        return from_schema(definitions[node["$ref"].rsplit("/", 1)[1]], definitions)
    if "anyOf" in node:
        return st.one_of([from_schema(option, definitions) for option in node["anyOf"]])
    if "enum" in node:
        return st.sampled_from(node["enum"])
    low, high = node.get("minimum"), node.get("maximum")
    match node["type"]:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(low, high)
        case "number":
            return st.floats(low, high, allow_nan=False, allow_infinity=False)
        case "string":
            return st.text(min_size=node.get("minLength", 0))
        case "array":
            items = from_schema(node["items"], definitions)
            return st.lists(items, max_size=min(node.get("maxItems", 9), 9))
        case "object" if "properties" in node:
            fields = {k: from_schema(x, definitions) for k, x in node["properties"].items()}
            required = {k: fields.pop(k) for k in node.get("required", ())}
            return st.fixed_dictionaries(required, optional=fields)
        case "object":
            values = from_schema(node["additionalProperties"], definitions)
            return st.dictionaries(st.text(), values, max_size=3)


@pytest.fixture(scope="module")
def requests(app):
    """Bodies of completions, by the app's own OpenAPI document."""
    definitions = app.openapi()["components"]["schemas"]
    return from_schema(definitions["CompletionRequest"], definitions)


def check_answer(answer):
    """It is of a shape that the document promises; returns its status."""
    if answer.status_code != 200:
        assert answer.status_code in (400, 404)
        error = schema.Error.model_validate_json(answer.content).error
        assert error.message
    elif answer.headers["Content-Type"].startswith("text/event-stream"):
        *events, done = answer.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        for event in events:
            schema.Completion.model_validate_json(event.removeprefix("data: "))
    else:
        completion = schema.Completion.model_validate_json(answer.content)
        assert all(choice.finish_reason == "length" for choice in completion.choices)
    return answer.status_code


@given(data=st.data())
def test_any_request_of_the_schema_gets_an_answer_of_the_schema(client, requests, data):
    body = data.draw(requests)
    check_answer(client.post("/v1/completions", json=body))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(field=st.sampled_from(sorted(schema.CompletionRequest.model_fields)) | st.text(), value=JSON)
def test_any_value_of_a_field_is_taken_or_refused(client, field, value):
    body = json.dumps({"prompt": "a", field: value})
    status = check_answer(
        client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    )
    if field not in schema.CompletionRequest.model_fields:
        assert status == 400


@settings(max_examples=50)
@given(st.binary(max_size=40))
def test_any_bytes_are_refused(client, body):
    answer = client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert check_answer(answer) == 400
