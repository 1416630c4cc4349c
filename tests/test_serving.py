"""The server as its clients see it: one process, the real openai package, hostile requests."""

import concurrent.futures
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from quick_compilation import xla_flags
from small_models import random_params, small_config

from perceiver_ar_jax import PerceiverAR, Pretrained
from perceiver_ar_jax.evaluation.scores import score_sequences
from perceiver_ar_jax.tokenizers import ByteTokenizer

openai = pytest.importorskip("openai", reason="the client that these tests use")

ROOT = Path(__file__).resolve().parent.parent
CONFIG = small_config(vocab_size=262, max_seq_len=40, max_latents=16)
JSON = {"Content-Type": "application/json"}
MAX_TOKENS = 60_000  # so many that a test can tell whether generation stopped before
LIMITS = ["--max_batch=4", "--max_queue=4", f"--max_tokens={MAX_TOKENS}"]


@pytest.fixture(scope="module")
def pretrained():
    params = random_params(CONFIG)
    return Pretrained(PerceiverAR(CONFIG), params, CONFIG, ByteTokenizer(), step=0)


@pytest.fixture(scope="module")
def server(pretrained, tmp_path_factory):
    """The process; `port` is where it listens."""
    folder = tmp_path_factory.mktemp("served")
    pretrained.save_pretrained(folder / "small")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(num_devices=1),
        "XDG_CACHE_HOME": str(folder),
    }
    process = subprocess.Popen(
        [sys.executable, "serve.py", f"--model={folder / 'small'}", "--port=0", *LIMITS],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()  # empty if the process has ended
        assert line.startswith("small at http://127.0.0.1:"), process.stderr.read()
        process.port = int(line.rsplit(":", 1)[1])
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0, timeout=120
    ) as client:
        yield client


def complete(client, prompt="a river", **options):
    return client.completions.create(**{"model": "small", "prompt": prompt} | options)


def send(server, body=b"", *, method="POST", path="/v1/completions", **headers):
    """Status, headers and body of the answer to a request as it stands."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request(method, path, body, JSON | headers)
    answer = connection.getresponse()
    result = answer.status, answer.headers, answer.read()
    connection.close()
    return result


def health(server):
    status, _, body = send(server, method="GET", path="/health")
    assert status == 200
    return json.loads(body)


def wait_until_idle(server):
    deadline = time.monotonic() + 60
    while health(server)["running"] or health(server)["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_one_model_is_listed_with_what_it_reads(client):
    (model,) = client.models.list().data
    assert (model.id, model.max_seq_len, model.max_latents) == ("small", 40, 16)
    assert client.models.retrieve("small") == model


def test_a_completion_is_what_generate_text_gives(client, pretrained):
    answer = complete(client, temperature=0.5, seed=3, max_tokens=12)
    (continuation,) = pretrained.continue_texts(
        ["a river"], do_sample=True, temperature=0.5, rng=jax.random.key(3), max_new_tokens=12
    )
    assert answer.choices[0].text == continuation.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == 7
    assert answer.usage.completion_tokens == 12


def test_a_stream_has_the_pieces_of_a_completion_and_their_log_probabilities(client):
    options = {"temperature": 0.5, "seed": 3, "max_tokens": 12, "logprobs": 2}
    (whole,) = complete(client, **options).choices
    *events, last = complete(
        client,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"attention": True},
        **options,
    )
    pieces = [event.choices[0] for event in events]
    assert "".join(piece.text for piece in pieces) == whole.text
    tokens = [token for piece in pieces for token in piece.logprobs.tokens]
    assert tokens == whole.logprobs.tokens
    assert len(whole.logprobs.tokens) == 12
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]
    assert last.usage.completion_tokens == 12
    likeliest = [max(top.values()) for top in whole.logprobs.top_logprobs]
    assert all(p <= most for p, most in zip(whole.logprobs.token_logprobs, likeliest, strict=True))
    attention = [piece.attention for piece in pieces if piece.attention]
    assert [len(parts) for parts in attention] == list(range(7, 19))
    np.testing.assert_allclose([sum(parts) for parts in attention], 1, atol=1e-3)


def test_continuations_of_several_prompts_are_those_of_each(client):
    options = {"temperature": 0, "max_tokens": 12}
    prompts = ["a", "a river and a house"]
    answer = complete(client, prompts, echo=True, **options)
    alone = [complete(client, prompt, **options).choices[0].text for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [
        prompt + text for prompt, text in zip(prompts, alone, strict=True)
    ]
    ids = ByteTokenizer().encode("a")
    assert complete(client, [ids], **options).choices[0].text == alone[0]
    twice = complete(client, "a", n=2, temperature=0.5, seed=0, max_tokens=12)
    assert [choice.index for choice in twice.choices] == [0, 1]
    assert twice.choices[0].text != twice.choices[1].text
    assert twice.usage.prompt_tokens == 1


def test_the_tokens_of_a_prompt_have_the_scores_of_the_evaluation(client, pretrained):
    prompt = "The river sees the house, é, and often the house sees it."  # three windows
    options = {"echo": True, "logprobs": 3, "temperature": 0}
    answer = complete(client, prompt, max_tokens=0, **options)
    (choice,), ids = answer.choices, ByteTokenizer().encode(prompt)
    assert (choice.text, choice.finish_reason) == (prompt, "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens == len(ids)
    ends = [*range(len(ids), 1, -16)][::-1]
    scores = score_sequences(pretrained, [(ids[:end], min(16, end - 1)) for end in ends])
    expected, ranks = (np.concatenate(x) for x in zip(*scores, strict=True))
    none, *log_probs = choice.logprobs.token_logprobs
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5)
    no_top, *top = choice.logprobs.top_logprobs
    assert none is no_top is None
    # Greedy decoding chooses a token if its log-probability is, to the bit, that of the likeliest.
    is_likeliest = [max(x.values()) == y for x, y in zip(top, log_probs, strict=True)]
    assert is_likeliest == (ranks == 0).tolist()
    at = choice.logprobs.text_offset.index(prompt.index("often"))  # after a character of two bytes
    assert "".join(choice.logprobs.tokens[at : at + 5]) == "often"

    short = prompt[:20]
    alone = complete(client, short, max_tokens=3, logprobs=3, temperature=0).choices[0]
    (whole,) = complete(client, short, max_tokens=3, **options).choices
    assert whole.text == short + alone.text
    assert whole.logprobs.token_logprobs[20:] == alone.logprobs.token_logprobs
    pieces = list(complete(client, short, max_tokens=3, stream=True, **options))
    pieces = [piece.choices[0] for piece in pieces]
    assert "".join(piece.text for piece in pieces) == whole.text
    offsets = [offset for piece in pieces for offset in piece.logprobs.text_offset]
    assert offsets == whole.logprobs.text_offset
    assert offsets[:21] == list(range(21))
    assert complete(client, "a", max_tokens=0, **options).choices[0].logprobs.tokens == ["a"]


def test_the_harness_gets_the_same_from_the_server(server, pretrained):
    for name in ("lm_eval", "aiohttp", "tenacity"):
        pytest.importorskip(name, reason="the harness's client needs it")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from perceiver_ar_jax import evaluation

    remote = LocalCompletionsAPI(
        model="small",
        base_url=f"http://127.0.0.1:{server.port}/v1/completions",
        custom_prefix_token_id=ByteTokenizer.eos_id,
        max_length=40,
        batch_size=2,
    )
    pairs = [("a river", " runs"), ("the house", " sees the river"), ("it", " "), ("", "and")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    expected = evaluation.HarnessLM(pretrained).loglikelihood(requests)
    np.testing.assert_allclose(remote.loglikelihood(requests), expected, rtol=1e-5)
    assert remote.decode_batch([ByteTokenizer().encode("é")]) == ["é"]
    assert json.loads(send(server, b'{"tokens": [300]}', path="/detokenize")[2])["error"]


def test_a_text_ends_before_a_stop(client):
    options = {"temperature": 0, "max_tokens": 12}
    text = complete(client, **options).choices[0].text
    stop = text[5:7]
    (choice,) = complete(client, stop=["never there", stop], **options).choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_concurrent_clients_get_what_each_gets_alone(client):
    requests = [
        {"prompt": "river " * i, "seed": i, "max_tokens": 8 + i, "temperature": 0.5}
        for i in range(1, 5)
    ]
    alone = [complete(client, **request).choices[0].text for request in requests]
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: complete(client, **request), requests))
    assert [answer.choices[0].text for answer in together] == alone


REFUSED = {
    "no number": ({"temperature": "hot"}, "temperature: Input should be a valid number"),
    "not finite": (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    "unknown field": ({"temprature": 1}, "temprature: Extra inputs are not permitted"),
    "no support": ({"suffix": "end"}, "suffix: Value error, this server does not support it"),
    "empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "no prompt": ({"prompt": []}, "prompt is empty"),
    "long prompt": ({"prompt": "a" * 41}, "41 tokens, and the model reads at most 40; shorten it"),
    "wrong id": ({"prompt": [5, 262]}, "token id 262 at position 1 is outside 0..261"),
    "too many tokens": ({"max_tokens": 60_001}, "max_tokens=60001 is more than 60000"),
    "too many texts": ({"n": 5}, "1 prompts with n=5 are more than 4"),
    "too many latents": ({"num_latents": 17}, "num_latents=17 out of valid range [1..16]"),
    "policy": ({"policy": "forget"}, "policy: Input should be 'slide', 'recompute' or 'reset'"),
    "nothing to do": ({"max_tokens": 0, "echo": True}, "max_tokens=0 needs echo and logprobs"),
    "no JSON": (b"{", "body: JSON decode error"),
    "no text": (b'{"prompt": "\xff"}', "error parsing the body"),
}


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_request_is_refused_with_a_reason(server, body, message):
    if isinstance(body, dict):
        body = json.dumps({"prompt": "a", "max_tokens": 1} | body).encode()
    status, _, answer = send(server, body)
    error = json.loads(answer)["error"]
    assert status == 400
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_half_a_character_in_a_prompt_is_a_question_mark(server):
    status, _, answer = send(server, b'{"prompt": "\\ud800", "echo": true, "temperature": 0}')
    assert status == 200
    assert json.loads(answer)["choices"][0]["text"].startswith("?")


def test_what_is_too_large_or_not_there_is_refused(server, client):
    assert send(server, b" " * (2**20 + 1))[0] == 413
    assert send(server, method="GET")[0] == 405
    assert send(server, method="GET", path="/v1/chat")[0] == 404
    with pytest.raises(openai.NotFoundError, match="the model is 'small'"):
        complete(client, model="large")


def test_foreign_hosts_and_origins_are_refused(server):
    own = f"127.0.0.1:{server.port}"
    body = b'{"prompt": "a", "max_tokens": 1}'
    foreign = [
        {"Host": "evil.example"},
        {"Host": f"127.0.0.1.evil.example:{server.port}"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
    ]
    assert [send(server, body, **headers)[0] for headers in foreign] == [403] * len(foreign)
    assert send(server, method="GET", path="/", Host="evil.example")[0] == 403
    assert send(server, body, Origin=f"http://{own}")[0] == 200
    assert send(server, body, Host=f"localhost:{server.port}")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_generation_stops_when_the_client_leaves(server, stream):
    wait_until_idle(server)
    before = health(server)["tokens"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    body = {"prompt": "a", "temperature": 0, "max_tokens": MAX_TOKENS, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    while health(server)["tokens"] == before:
        time.sleep(0.01)
    connection.close()
    wait_until_idle(server)
    assert health(server)["tokens"] - before < MAX_TOKENS


def test_a_full_queue_is_said_with_when_to_try_again(server, client):
    # As many batches as take turns, each with a temperature of its own, and then the queue.
    streams = [
        complete(client, temperature=t, max_tokens=MAX_TOKENS, stream=True)
        for t in (0.5, 0.6, 0.7, 0.8)
    ]
    for stream in streams:
        next(iter(stream))
    streams.append(complete(client, n=4, temperature=0.5, max_tokens=MAX_TOKENS, stream=True))
    with pytest.raises(openai.RateLimitError) as refused:
        complete(client, max_tokens=1)
    assert refused.value.response.headers["Retry-After"] == "1"
    assert health(server)["waiting"] == 4
    for stream in streams:
        stream.close()
    wait_until_idle(server)


def test_the_page_needs_nothing_from_elsewhere(server):
    status, headers, page = send(server, method="GET", path="/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"https://" not in page and b"http://" not in page


@pytest.fixture(scope="module")
def page(server):
    """The server's page in Debian's Chromium; what it complains about is in `page.problems`."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="drives Chromium")
    with sync_api.sync_playwright() as playwright:
        # As root, in CI, Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda line: page.problems.append(line.text))
        page.goto(f"http://127.0.0.1:{server.port}/")
        yield page
        browser.close()


@pytest.mark.slow  # a browser
def test_the_page_streams_text_that_the_keyboard_can_walk(page):
    page.fill("#prompt", "a river")
    page.fill("#max_tokens", "12")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#go:enabled")
    assert page.inner_text("#text").startswith("a river")
    assert "12 tokens" in page.inner_text("#speed")
    shades = page.eval_on_selector_all(".token", "all => all.map(x => x.style.background)")
    assert len(set(shades)) > 1
    assert page.is_hidden("#details")
    page.focus("#text")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("chosen") == 10
    assert page.locator("#details .taken").count() == 1
    drawn = "strip.getContext('2d').getImageData(0, 0, strip.width, strip.height).data.some(x => x)"
    assert page.evaluate(drawn)
    page.keyboard.press("Escape")
    assert page.is_hidden("#details")
    assert page.problems == []


@pytest.mark.slow  # a browser
def test_the_page_stops_and_says_what_is_wrong(server, page):
    page.fill("#max_tokens", str(MAX_TOKENS))
    page.click("#go")
    page.wait_for_selector(".token", state="attached")
    page.keyboard.press("Escape")
    page.wait_for_selector("#go:enabled")
    assert "stopped" in page.inner_text("#speed")
    wait_until_idle(server)
    page.fill("#prompt", "a" * 41)
    page.click("#go")
    page.wait_for_selector("#error:not(:empty)")
    assert "the model reads at most 40" in page.inner_text("#error")


def test_sigterm_ends_streams_and_then_the_server(server, client):
    stream = iter(complete(client, temperature=0, max_tokens=MAX_TOKENS, stream=True))
    next(stream)
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=60) == 143
    with pytest.raises(openai.OpenAIError):
        list(stream)
