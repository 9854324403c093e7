"""The page at `/` in a real browser, against a pretend server for odd cases and a real one for the plain one."""

import json
import re
import time

import chromium
import openai
import pytest

from tests.server.conftest import serving
from tests.server.fake_openai import CODE, FAILURE, HTML, REFUSAL, FakeOpenAI

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed"),
]

IDLE = "!document.getElementById('send').hidden && !document.getElementById('send').disabled"
LAST = "document.querySelector('.answer:last-of-type')"


@pytest.fixture(scope="module")
def browser():
    try:
        started = chromium.Chromium().__enter__()
    except chromium.PageError as error:
        pytest.skip(f"Chromium does not start here: {error}")
    yield started
    started.__exit__()


@pytest.fixture(scope="module")
def fake():
    made = FakeOpenAI()
    with serving(made.app) as running:
        made.url = running.url
        yield made


def visit(browser, url: str) -> None:
    """Open the page anew, on a desktop, and wait until messages can be sent."""
    browser.open("about:blank")  # so that the page before asks for nothing more
    browser.complaints.clear()
    browser.hosts.clear()
    browser.resize(1280, 800)
    browser.open(f"{url}/")
    browser.until(IDLE)


@pytest.fixture
def page(browser, fake):
    """The page, fresh and ready. Afterwards: the console is clean, and nobody else was asked for anything."""
    fake.key, fake.rows, fake.num_left = "", [], 0
    fake.bodies.clear()
    visit(browser, fake.url)
    browser.run("sessionStorage.clear()")
    yield browser
    browser.run("0")  # what the console has said until now is here
    assert browser.complaints == []
    assert browser.hosts == {fake.url}


def forgive(page, status: int) -> None:
    """Chromium writes every refused request to the console, whatever the page makes of it."""
    page.run("0")
    expected = [text for text in page.complaints if f"status of {status}" in text]
    assert expected, page.complaints
    for text in expected:
        page.complaints.remove(text)


def say(page, text: str) -> None:
    page.run("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")


def ask(page, text: str) -> str:
    """Send a message and wait for the end of its answer."""
    say(page, text)
    page.until(f"{IDLE} && {LAST}")
    return page.text(".answer:last-of-type .blocks")


def fill(page, field: str, value: str) -> None:
    page.run(
        f"""(() => {{
          const field = document.getElementById({json.dumps(field)});
          field.value = {json.dumps(value)};
          for (const name of ["input", "change"]) field.dispatchEvent(new Event(name, {{ bubbles: true }}));
        }})()"""
    )


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


def test_mark_up_in_an_answer_is_text(page):
    assert ask(page, "html") == HTML
    assert page.run(f"{LAST}.querySelectorAll('img, script, b').length") == 0
    assert page.run("document.title") == "jaxserve"
    ask(page, "think")
    page.click(".thoughts summary")
    assert page.text(".thoughts .text") == "Hm, <b>well</b>."


def test_strings_cannot_become_elements_even_by_a_mistake_of_ours(page):
    """Trusted types: the browser itself refuses."""
    with pytest.raises(chromium.PageError, match="TrustedHTML"):
        page.run("document.body.innerHTML = '<b>x</b>'")
    page.run("0")
    assert any("TrustedHTML" in text for text in page.complaints)
    page.complaints.clear()


def test_code_between_fences_is_a_block_and_is_copied_as_it_came(page):
    ask(page, "code")
    assert page.text(".answer pre") == "if a < b:\n    print(`a`)\n"
    assert page.run(f"[...{LAST}.querySelectorAll('p.text')].map(p => p.textContent)") == ["Two lines:", "That is all."]
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.click(".answer footer button")
    page.until("document.querySelector('.answer footer button').textContent === 'Copied'")
    assert page.run("navigator.clipboard.readText()") == CODE


def test_text_is_the_same_wherever_its_pieces_end(page):
    """Fences, half fences and backticks, cut at every place: the text of all blocks, and the blocks."""
    whole = "a\n``b\n```py\nx = `1`\n``` no\n```\nc `d`\n```"
    blocks = page.run(
        f"""(async () => {{
          const {{ Text }} = await import("/page/text.js");
          const whole = {json.dumps(whole)}, found = new Set();
          for (let i = 0; i <= whole.length; i++) for (let j = i; j <= whole.length; j++) {{
            const text = new Text();
            for (const piece of [whole.slice(0, i), whole.slice(i, j), whole.slice(j)]) text.push(piece);
            text.end();
            found.add(JSON.stringify([text.raw, ...[...text.element.children].map((e) => [e.tagName, e.textContent])]));
          }}
          return [...found].map((one) => JSON.parse(one));
        }})()"""
    )
    assert blocks == [[whole, ["P", "a\n``b"], ["PRE", "x = `1`\n``` no\n"], ["P", "c `d`\n```"]]]


def test_events_are_read_wherever_bytes_are_cut(page):
    """Three kinds of line ends, comments, several data lines, characters of four bytes; cut at every byte."""
    raw = ': hi\ndata: {"a": "é😀"}\n\ndata:two\r\ndata: lines\r\n\r\nevent: x\rdata: last\r\rdata: half'
    found = page.run(
        f"""(async () => {{
          const {{ events }} = await import("/page/stream.js");
          const bytes = new TextEncoder().encode({json.dumps(raw)}), found = new Set();
          for (let cut = 0; cut <= bytes.length; cut++) {{
            const parts = [bytes.slice(0, cut), bytes.slice(cut)];
            const body = new ReadableStream({{ pull: (to) => (parts.length ? to.enqueue(parts.shift()) : to.close()) }});
            const list = [];
            for await (const data of events(body)) list.push(data);
            found.add(JSON.stringify(list));
          }}
          return [...found].map((one) => JSON.parse(one));
        }})()"""
    )
    assert found == [['{"a": "é😀"}', "two\nlines", "last"]]


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


def test_gauges_move_and_the_line_grows(page, fake):
    page.until("document.getElementById('rate').textContent !== '–'")
    seen = {page.text("#rate")}
    points = "document.querySelector('#spark .line').getAttribute('d').split(/[ML]/).length"
    before = page.run(points)
    end_s = time.monotonic() + 20
    while len(seen) < 3 and time.monotonic() < end_s:
        time.sleep(0.2)
        seen.add(page.text("#rate"))
    assert len(seen) >= 3
    assert page.run(points) > before
    assert page.text("#hits") == "38 %"
    assert page.run("document.getElementById('hits-bar').getAttribute('aria-valuenow')") == "38"


def test_nothing_is_read_while_nobody_looks(page, fake):
    hide = """(isHidden) => {
      Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.run(f"({hide})(true)")
    page.run("fetch('stats').then((answer) => answer.text())")  # a reading under way has ended by then
    before = fake.num_stats
    time.sleep(1.5)
    assert fake.num_stats == before
    page.run(f"({hide})(false)")
    end_s = time.monotonic() + 10
    while fake.num_stats == before and time.monotonic() < end_s:
        time.sleep(0.02)
    assert fake.num_stats > before


def row(number: int, now_s: float, **changes):
    """A request of three seconds: one queued, one of prefill, one of decode."""
    base = {
        "id": f"chatcmpl-{number}", "kind": "chat", "model": "toy", "client": "ada", "arrival_s": now_s - 3,
        "started_s": now_s - 2, "first_token_s": now_s - 1, "finished_s": now_s, "prompt_tokens": 100, "cached_tokens": 64,
        "output_tokens": 20, "finish_reason": "stop", "preemptions": 0,
    }  # fmt: skip
    return base | changes


def test_requests_are_listed_with_their_times(page, fake):
    now_s = time.perf_counter()
    fake.rows = [row(2, now_s, finish_reason=None, finished_s=None, client="<b>eve</b>"), row(1, now_s, preemptions=2)]
    page.until("document.querySelectorAll('#requests li').length === 2")
    bars = "[...document.querySelectorAll('#requests li:last-child .timeline i')]"
    queued, prefill, decode = page.run(f"{bars}.map((bar) => bar.getBoundingClientRect().width)")
    assert queued == pytest.approx(prefill, rel=0.02) == pytest.approx(decode, rel=0.02)
    assert queued > 5
    words = page.text("#requests li:last-child .words")
    for part in ("100 (64 cached) → 20 tokens", "3.00 s", "first 2.00 s", "preempted 2×"):
        assert part in words
    assert page.text("#requests li:first-child .finish") == "running"
    assert page.text("#requests li:first-child .what") == "chat · <b>eve</b>"
    fake.rows = [row(2, now_s, finish_reason="abort")]
    page.until("document.querySelectorAll('#requests li').length === 1")
    assert page.text("#requests .finish") == "abort"


def test_a_key_is_asked_for_and_kept_for_this_tab_only(page, browser, fake):
    fake.key = "secret"
    page.open(f"{fake.url}/")
    page.until("document.getElementById('health').textContent.includes('API key')")
    assert page.run("document.getElementById('send').disabled")
    forgive(page, 401)
    fill(page, "key", "secret")
    page.until(IDLE)
    assert ask(page, "hello") == "You said: hello"
    assert page.run("JSON.stringify(localStorage) + document.cookie") == "{}"
    assert page.run("Object.values(sessionStorage)") == ["secret"]
    fill(page, "key", "wrong")
    page.until("document.getElementById('health').textContent.includes('unknown')")
    forgive(page, 401)


@pytest.mark.parametrize(("width", "height"), [(360, 740), (740, 600), (1000, 700), (1600, 900)])
def test_nothing_is_wider_or_higher_than_the_window(page, fake, width, height):
    fake.rows = [row(number, time.perf_counter(), client="a-client-with-a-long-name" * 3) for number in range(64)]
    page.resize(width, height, is_phone=width < 500)
    assert "a_very_long_name" in ask(page, "wide")
    for view in ("options", "live", "chat"):
        page.run(f"document.querySelector('[data-show={view}]').click()")
        window = (
            "[document.documentElement.scrollWidth - innerWidth, document.documentElement.scrollHeight - innerHeight]"
        )
        assert page.run(window) == [0, 0]
        parts = '["log", "options", "live"].map((id) => document.getElementById(id))'
        assert page.run(f"{parts}.map((part) => part.scrollWidth - part.clientWidth)") == [0, 0, 0]
        assert page.run(f"document.getElementById({json.dumps(view)}).getBoundingClientRect().width") > 250


def test_on_a_phone_every_view_can_be_reached_by_touch_and_by_keys(page):
    page.resize(360, 740, is_phone=True)
    visible = "['chat', 'options', 'live'].filter((id) => document.getElementById(id).offsetWidth)"
    assert page.run(visible) == ["chat"]
    for view in ("options", "live", "chat"):
        page.click(f"[data-show={view}]")
        assert page.run(visible) == [view]
        assert page.run("[...document.querySelectorAll('[aria-pressed=true]')].map(b => b.dataset.show)") == [view]
    page.run("document.querySelector('[data-show=options]').focus()")
    page.press("Enter")
    assert page.run(visible) == ["options"]


def test_everything_that_can_be_used_has_a_name(page, fake):
    """By the browser's own accessibility tree."""
    fake.rows = [row(1, time.perf_counter())]
    ask(page, "code")
    page.until("document.querySelectorAll('#requests li').length === 1")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    used = ("button", "textbox", "combobox", "slider", "spinbutton", "meter", "log", "status", "list")
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    nameless = [role for role, name in roles if role in used and not name and role not in ("status", "list")]
    assert nameless == []
    assert {"button", "textbox", "combobox", "slider", "spinbutton", "meter", "log"} <= {role for role, _ in roles}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page, fake, scheme):
    """WCAG AA: 4.5 to 1 for every text, whatever its size."""
    now_s = time.perf_counter()
    fake.rows = [row(1, now_s), row(2, now_s, finish_reason=None), row(3, now_s, finish_reason="error")]
    page.prefer(scheme)
    try:
        ask(page, "code")
        ask(page, "refused")
        forgive(page, 400)
        page.until("document.querySelectorAll('#requests li').length === 3")
        assert page.run(_CONTRAST) == []
    finally:
        page.prefer("light")


_CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const bad = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !element.offsetWidth || element.closest(":disabled, .unseen, .skip")) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push([element.className || element.tagName, walk.currentNode.data.trim(), ratio]);
  }
  return bad;
})()"""


@pytest.fixture
def real(browser, server):
    """The page of a real server, with the bundled model. Afterwards its engine is idle."""
    visit(browser, server.url)
    yield browser
    browser.until("document.getElementById('running').textContent === '0'")
    assert browser.complaints == []
    assert browser.hosts == {server.url}


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
