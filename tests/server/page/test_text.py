"""What a model says is text, wherever its pieces end, and nothing else."""

import json

import chromium
import pytest

from tests.server.page.fake_openai import CODE, HTML
from tests.server.page.steps import LAST, ask

pytestmark = pytest.mark.browser


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
