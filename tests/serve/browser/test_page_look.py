"""Keyboard, darkness, narrow screens; the pictures of the documentation are made here.

HYBRIMOE_SCREENSHOTS=1 writes them to docs/figures.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Page, expect
from waiting import until

from hybrimoe_plugin.serve.requests import Load

Open = Callable[..., Page]

FIGURES = Path(__file__).parents[3] / "docs" / "figures"
MOST_BYTES = 150 << 10
ANSWER = """A **mixture-of-experts** model has many small networks, *experts*, in each layer.
For every token a router picks a few of them:

1. The router scores all experts.
2. The best few compute the token.
3. Their results are added up by weight.

| | dense | experts |
|---|---|---|
| weights read for a token | all | a few percent |
| memory | small | large |

```python
scores = router(hidden)
weights, chosen = scores.topk(8)
```

So most weights rest at any moment, and need not lie on the accelerator."""


@pytest.fixture
def computing(site: Any) -> Iterator[None]:
    """The model decodes as long as the test runs."""
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            prompt = torch.randint(1, 60, (1, 4))
            site.service.model.generate(prompt, max_new_tokens=16, do_sample=True)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}),
        ("dark", {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"}),
        ("phone", {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"}),
    ],
)
@pytest.mark.usefixtures("computing")
def test_it_fits_and_is_pictured(
    site: Any, opened: Open, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    site.scheduler.load = lambda: Load(1, 0, 0, 0, 0, 0)
    site.scheduler.say(ANSWER, 0.01)
    page = opened(site.url, **options)
    page.get_by_label("Message").fill("What is a mixture-of-experts model?")
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".assistant .facts")).to_contain_text("tokens")
    assert fits(page)
    if name == "phone":
        page.get_by_role("button", name="Engine", exact=True).click()
    expect(page.locator("#figures .value").first).not_to_have_text("–")
    page.wait_for_timeout(40_000 if os.environ.get("HYBRIMOE_SCREENSHOTS") else 300)
    assert fits(page)
    where = FIGURES if os.environ.get("HYBRIMOE_SCREENSHOTS") else tmp_path
    picture = where / f"page-{name}.png"
    page.screenshot(path=picture)
    assert 0 < picture.stat().st_size < MOST_BYTES
    assert (FIGURES / picture.name).exists()


def fits(page: Page) -> bool:
    """Whether nothing is cut off at the right, so that nobody has to scroll sideways."""
    wide = "() => document.scrollingElement.scrollWidth <= innerWidth"
    return bool(page.evaluate(wide))


def test_the_dark_page_is_dark(site: Any, opened: Open) -> None:
    page = opened(site.url, color_scheme="dark")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert all(int(part) < 64 for part in colour[4:-1].split(","))


def test_it_can_be_used_by_keyboard_alone(site: Any, opened: Open) -> None:
    site.scheduler.say("word " * 400, 0.02)
    page = opened(site.url)
    expect(page.locator("#greeting")).to_have_text("Ask tiny-moe")
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    assert not site.scheduler.requests
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .body")).to_contain_text("word")
    assert "first line\nsecond line" in site.scheduler.asked()
    page.keyboard.press("Escape")
    until(site.scheduler.tickets[0].cancelled.is_set)
    expect(page.get_by_role("status")).to_have_text("stopped")
    expect(page.get_by_label("Message")).to_be_focused()


def test_the_focus_goes_round_in_the_order_of_the_page(site: Any, opened: Open) -> None:
    page = opened(site.url)
    expect(page.locator("#engine")).to_be_visible()
    page.locator(".skip").focus()
    order = []
    for _ in range(9):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
        assert page.evaluate("document.activeElement.matches(':focus-visible')")
    suggestions = ["", "", ""]
    assert order == ["new", "open-settings", *suggestions, "question", "send", "pause", "map"]


def test_an_answer_is_announced_when_it_is_complete(site: Any, opened: Open) -> None:
    site.scheduler.say("one two three", 0.1)
    page = opened(site.url)
    expect(page.locator("#greeting")).to_have_text("Ask tiny-moe")
    page.keyboard.type("Go")
    page.keyboard.press("Enter")
    item = page.locator(".assistant")
    expect(item).to_have_attribute("aria-busy", "true")
    expect(item).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("log")).to_have_attribute("aria-live", "polite")
    expect(page.get_by_role("status")).to_have_text("The answer is complete.")
