"""Windows of all widths, names for those who do not see, contrast for those who see little."""

import json
import time

import pytest

from tests.server.page.steps import ask, forgive, row

pytestmark = pytest.mark.browser


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
