"""/v1/embeddings, /v1/score, /v1/rerank: what the engine itself says, in OpenAI's and vLLM's forms."""

import base64

import httpx
import numpy as np
import openai
import pytest

TEXTS = ["def add(a, b):", "import os", "def sub(a, b):\n    return a - b"]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def post(server):
    with httpx.Client(base_url=server.url) as http:
        yield lambda path, **body: http.post(path, json=body)


@pytest.fixture(scope="module")
def vectors(run, engine):
    return run(engine.embed(TEXTS))


def test_texts_and_tokens_and_both_encodings_are_the_engines_own_vectors(client, engine, vectors):
    ids = [engine.tokenizer.encode(text) for text in TEXTS]
    for given in (TEXTS, ids):
        for form in ("float", "base64", openai.omit):  # without a form the client asks for base64
            found = client.embeddings.create(model="tiny", input=given, encoding_format=form)
            got = [each.embedding for each in found.data]
            if form == "base64":
                got = [np.frombuffer(base64.b64decode(each), "<f4") for each in got]
            np.testing.assert_allclose(np.array(got), vectors, atol=1e-5)
            assert [each.index for each in found.data] == [0, 1, 2]
            assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))
    for one in (TEXTS[0], ids[0]):
        (found,) = client.embeddings.create(model="tiny", input=one).data
        np.testing.assert_allclose(found.embedding, vectors[0], atol=1e-5)


def test_vectors_have_their_own_length_if_that_is_wanted(client, run, engine):
    (found,) = client.embeddings.create(model="tiny", input=TEXTS[0], extra_body={"normalize": False}).data
    np.testing.assert_allclose(found.embedding, run(engine.embed(TEXTS[:1], normalize=False))[0], rtol=1e-4, atol=1e-4)


def test_more_inputs_than_the_engine_takes_at_once_are_no_error(client, engine, vectors):
    many = [TEXTS[number % 3] for number in range(3 * engine.max_requests)]
    found = client.embeddings.create(model="tiny", input=many)
    np.testing.assert_allclose([each.embedding for each in found.data], vectors[np.arange(len(many)) % 3], atol=1e-5)


def test_a_prompt_is_cut_at_its_beginning(client, engine, run):
    ids = engine.tokenizer.encode(TEXTS[2])
    expected = run(engine.embed([ids[-4:]]))[0]
    found = client.embeddings.create(model="tiny", input=TEXTS[2], extra_body={"truncate_prompt_tokens": 4})
    np.testing.assert_allclose(found.data[0].embedding, expected, atol=1e-5)
    assert found.usage.prompt_tokens == 4
    long = [5] * 5000
    assert (
        client.embeddings.create(
            model="tiny", input=long, extra_body={"truncate_prompt_tokens": -1}
        ).usage.prompt_tokens
        == engine.max_model_len
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": "x", "dimensions": 7}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": [[1], [100000]]}, None),
        ({"input": [5] * 5000}, None),
        ({"input": "", "add_special_tokens": False}, None),
    ],
)
def test_what_cannot_be_embedded_is_refused(post, body, param):
    answer = post("/v1/embeddings", **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_as_many_dimensions_as_there_are_may_be_asked_for(client, engine):
    (found,) = client.embeddings.create(model="tiny", input="x", dimensions=engine.embedding_size).data
    assert len(found.embedding) == engine.embedding_size


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs_are_compared_by_the_cosine_of_their_embeddings(post, path, vectors):
    one = post(path, model="tiny", text_1=TEXTS[0], text_2=TEXTS).json()
    np.testing.assert_allclose([each["score"] for each in one["data"]], vectors @ vectors[0], atol=1e-5)
    pairs = post(path, text_1=TEXTS[:2], text_2=TEXTS[1:]).json()
    expected = [vectors[0] @ vectors[1], vectors[1] @ vectors[2]]
    np.testing.assert_allclose([each["score"] for each in pairs["data"]], expected, atol=1e-5)
    assert one["object"] == "list"
    assert [each["object"] for each in one["data"]] == ["score"] * 3


def test_continuations_have_the_log_probabilities_of_llm_score(post, run, engine):
    prompt, continuations = "for i in ", ["range(10):\n", "banana(10):\n"]
    expected = run(engine.score(prompt, continuations))
    found = post("/v1/score", prompt=prompt, continuations=continuations).json()["data"]
    for got, score in zip(found, expected, strict=True):
        assert got["logprob"] == got["score"] == pytest.approx(score.logprob, abs=1e-4)
        np.testing.assert_allclose(got["token_logprobs"], score.token_logprobs, atol=1e-4)
        assert got["token_ids"] == list(score.token_ids)
        assert got["is_greedy"] == score.is_greedy
    assert found[0]["logprob"] > found[1]["logprob"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text_1": "x"},
        {"text_1": ["x", "y"], "text_2": ["x", "y", "z"]},
        {"text_1": [], "text_2": "x"},
        {"prompt": "x", "continuations": []},
        {"prompt": "x", "continuations": ["y"], "text_1": "x", "text_2": "y"},
        {"prompt": "x", "continuations": [""]},
        {"prompt": "x", "continuations": ["y"], "truncate_prompt_tokens": 3},
    ],
)
def test_what_cannot_be_scored_is_refused(post, body):
    answer = post("/v1/score", **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_documents_are_ordered_by_their_likeness_to_a_query(post, path, vectors):
    found = post(path, query=TEXTS[0], documents=TEXTS, top_n=2).json()["results"]
    cosines = vectors @ vectors[0]
    order = sorted(range(3), key=lambda index: -cosines[index])[:2]
    assert [each["index"] for each in found] == order
    assert [each["document"]["text"] for each in found] == [TEXTS[index] for index in order]
    np.testing.assert_allclose([each["relevance_score"] for each in found], cosines[order], atol=1e-5)
