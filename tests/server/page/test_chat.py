"""The conversation on the page: streaming, stopping, options, errors, models without a chat template."""

import re
import time

import openai
import pytest

from tests.server.page.fake_openai import FAILURE, REFUSAL
from tests.server.page.steps import IDLE, LAST, ask, fill, forgive, say

pytestmark = pytest.mark.browser


def test_an_answer_streams_in_and_tells_how_fast_it_was(page, fake):
    say(page, "slow")
    page.until(f"{LAST}?.textContent.includes('word')")
    first = len(page.text(".answer .blocks"))
    page.until(f"{LAST}.querySelector('.blocks').textContent.length > {first + 20}")
    assert page.run(f"{LAST}.getAttribute('aria-busy')") == "true"
    page.press("Escape")
    page.until(IDLE)
    assert re.fullmatch(r"about \d+ tokens · [\d.]+ tokens/s · first after [\d.]+ m?s · stopped", page.text(".facts"))
    assert ask(page, "hello") == "You said: hello"
    facts = page.text(".answer:last-of-type .facts")
    for part in ("4 tokens", "first after", "32 of 40 prompt tokens cached"):
        assert part in facts


def test_stop_ends_the_answer_here_and_on_the_server(page, fake):
    say(page, "slow")
    page.until(f"{LAST}?.textContent.includes('word word')")
    page.click("#stop-answer")
    page.until(IDLE)
    kept = page.text(".answer .blocks")
    assert kept.startswith("word word")
    assert "stopped" in page.text(".answer .facts")
    end_s = time.monotonic() + 10
    while fake.num_left == 0 and time.monotonic() < end_s:
        time.sleep(0.02)
    assert fake.num_left == 1
    time.sleep(0.2)
    assert page.text(".answer .blocks") == kept


def test_options_and_the_conversation_so_far_go_along(page, fake):
    fill(page, "system", "Be brief.")
    fill(page, "temperature", "0.2")
    fill(page, "max_tokens", "7")
    fill(page, "seed", "11")
    fill(page, "stop", "END\n###")
    ask(page, "one")
    page.run("document.getElementById('prompt').focus()")
    page.type("two")
    page.press("Enter", modifiers=8)  # Shift: a new line, not sent
    page.type("lines")
    assert page.run("document.getElementById('prompt').value") == "two\nlines"
    page.press("Enter")
    page.until(f"{IDLE} && document.querySelectorAll('.answer').length === 2")
    body = fake.bodies[-1]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "You said: one"},
        {"role": "user", "content": "two\nlines"},
    ]
    chosen = {name: body[name] for name in ("model", "temperature", "top_p", "max_tokens", "seed", "stop")}
    assert chosen == {
        "model": "toy", "temperature": 0.2, "top_p": 1, "max_tokens": 7, "seed": 11, "stop": ["END", "###"],
    }  # fmt: skip
    page.click("#fresh")
    ask(page, "three")
    assert [message["content"] for message in fake.bodies[-1]["messages"]] == ["Be brief.", "three"]


def test_an_option_that_cannot_be_is_not_sent(page, fake):
    fill(page, "max_tokens", "0")
    say(page, "hello")
    assert page.run("document.activeElement.id") == "max_tokens"
    assert not fake.bodies
    fill(page, "seed", "")
    fill(page, "max_tokens", "")
    ask(page, "")
    assert not {"seed", "max_tokens", "stop"} & set(fake.bodies[-1])


@pytest.mark.parametrize(
    ("said", "sentence", "kept"),
    [
        ("refused", REFUSAL, ""),
        ("broken", FAILURE, "Half of"),
        ("cut", "The connection ended in the middle of the answer.", "Half of"),
    ],
)
def test_an_error_is_the_servers_sentence_and_can_be_tried_again(page, fake, said, sentence, kept):
    assert ask(page, said) == kept
    assert page.text(".error p") == sentence
    page.click(".error button")
    page.until(f"{IDLE} && document.querySelectorAll('.error').length === 1")
    assert len(fake.bodies) == 2
    if said == "refused":
        forgive(page, 400)
        ask(page, "hello")
        assert [message["content"] for message in fake.bodies[-1]["messages"]] == ["hello"]


def test_the_end_of_an_answer_is_followed_unless_the_reader_scrolls_up(page):
    page.resize(800, 400)
    say(page, "slow")
    page.until(f"{LAST}?.textContent.length > 1500")
    log = "document.getElementById('log')"
    rest = f"{log}.scrollHeight - {log}.scrollTop - {log}.clientHeight"
    page.until(f"{log}.scrollHeight > {log}.clientHeight + 200 && {rest} < 40")
    page.run(  # as in a slow browser: text comes between our own move down and the event that tells of it
        f"""document.querySelector(".answer .text").append("\\n".repeat(20));
        {log}.dispatchEvent(new Event("scroll"))"""
    )
    page.until(f"{rest} < 40")
    page.run(f"{log}.scrollTop = 50")
    size = len(page.text(".answer .blocks"))
    page.until(f"{LAST}.textContent.length > {size + 100}")
    assert page.run(f"{log}.scrollTop") == 50
    page.press("Escape")
    page.until(IDLE)


def test_a_model_without_chat_template_continues_the_text_and_says_so(page, fake):
    fill(page, "model", "base")
    assert ask(page, "Once upon") == "You said: Once upon"
    assert "no chat template" in page.text("#note")
    assert fake.bodies[-1]["prompt"] == "Once upon"
    forgive(page, 400)
    ask(page, " and then")
    assert fake.bodies[-1]["prompt"] == "Once uponYou said: Once upon and then"
    assert len(fake.bodies) == 3  # chat was tried once only
    fill(page, "model", "toy")
    assert page.run("document.getElementById('note').hidden")


def test_a_real_answer_is_the_models_and_its_request_is_listed(real, server):
    fill(real, "temperature", "0")
    text = ask(real, "Hello")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    asked = [{"role": "user", "content": "Hello"}]
    with client:
        answer = client.chat.completions.create(model="tiny", messages=asked, temperature=0, max_tokens=256)
    assert text == answer.choices[0].message.content
    real.until("document.querySelector('#requests li:nth-child(2) .finish')?.textContent === 'stop'")
    assert real.text("#requests li:nth-child(2) .words").startswith(f"{answer.usage.prompt_tokens} ")
    assert real.text("#requests li:nth-child(2) .what") == "chat"
    tokens = f"{answer.usage.completion_tokens} tokens"
    assert tokens in real.text("#requests li:nth-child(2) .words")
    assert real.text(".answer .facts").startswith(tokens)
    real.until("Number(document.getElementById('rate').textContent) > 0")


def test_a_real_answer_that_is_stopped_is_aborted_in_the_engine(real, server):
    for field, value in (("temperature", "2"), ("seed", "1"), ("max_tokens", "1900")):  # nonsense, and much of it
        fill(real, field, value)
    real.run(  # in the browser, because on a busy machine the answer could be whole before we have looked
        """new MutationObserver(() => {
          const text = document.querySelector(".answer .blocks")?.textContent ?? "";
          if (text.length > 20) document.getElementById("stop-answer").click();
        }).observe(document.getElementById("log"), { subtree: true, characterData: true }), 0"""
    )
    say(real, "Hello")
    real.until(f"{IDLE} && {LAST}")
    assert "stopped" in real.text(".answer .facts")
    real.until("document.querySelector('#requests .finish').textContent === 'abort'")
