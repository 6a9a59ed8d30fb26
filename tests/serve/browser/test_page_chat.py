"""The chat of the page, in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from playwright.sync_api import Page, expect
from waiting import until

Open = Callable[..., Page]

SLOW = 0.02
ANSWER = "The capital is **Paris**."


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def test_an_answer_streams_in(site: Any, opened: Open) -> None:
    site.scheduler.say("one two three four five six seven eight nine ten", SLOW)
    page = opened(site.url)
    ask(page, "Count")
    body = page.locator(".assistant .body")
    expect(body).to_contain_text("one two")
    assert "ten" not in body.inner_text()
    expect(body).to_contain_text("nine ten")
    expect(page.locator(".assistant .facts")).to_contain_text("tokens")


def test_markdown_becomes_elements(site: Any, opened: Open) -> None:
    site.scheduler.say(
        "# Head\n\nSome **bold**, *italic*, `code` and [a link](https://example.org/x).\n\n"
        "- one\n- two\n  - nested\n\n1. first\n2. second\n\n> said\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('<b>')\n```\n"
    )
    page = opened(site.url)
    ask(page, "Show")
    body = page.locator(".assistant .body")
    expect(body.locator("pre code")).to_have_text("print('<b>')")
    for selector, text in (
        ("h3", "Head"),
        ("strong", "bold"),
        ("em", "italic"),
        ("p code", "code"),
        ("ul ul li", "nested"),
        ("ol li >> nth=1", "second"),
        ("blockquote", "said"),
        ("td >> nth=1", "2"),
        (".code-head span", "python"),
    ):
        expect(body.locator(selector)).to_have_text(text)
    link = body.locator("a")
    assert link.get_attribute("href") == "https://example.org/x"
    assert link.get_attribute("rel") == "noopener noreferrer"


def test_stop_ends_the_request_and_keeps_what_there_is(site: Any, opened: Open) -> None:
    site.scheduler.say("word " * 400, SLOW)
    page = opened(site.url)
    ask(page, "Go on for ever")
    expect(page.locator(".assistant .body")).to_contain_text("word word")
    page.get_by_role("button", name="Stop").click()
    until(site.scheduler.tickets[0].cancelled.is_set)
    expect(page.locator(".assistant .facts")).to_contain_text("stopped")
    expect(page.locator(".assistant .body")).to_contain_text("word word")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_regenerate_asks_the_same_again(site: Any, opened: Open) -> None:
    site.scheduler.say("first answer")
    page = opened(site.url)
    ask(page, "Again?")
    expect(page.locator(".assistant .body")).to_have_text("first answer")
    before = site.scheduler.asked()
    site.scheduler.say("second answer")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".assistant .body")).to_have_text("second answer")
    assert page.locator(".message").count() == 2
    assert site.scheduler.asked() == before


def test_an_edited_question_drops_what_came_after_it(site: Any, opened: Open) -> None:
    site.scheduler.say(ANSWER)
    page = opened(site.url)
    ask(page, "Old question")
    expect(page.locator(".assistant .body")).to_have_text("The capital is Paris.")
    page.locator(".user").hover()
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("New question")
    page.get_by_label("Edit the message").press("Enter")
    until(lambda: len(site.scheduler.requests) == 2)
    expect(page.locator(".user .body")).to_have_text("New question")
    assert page.locator(".message").count() == 2
    assert "Old question" not in site.scheduler.asked()


def test_settings_are_sent(site: Any, opened: Open) -> None:
    site.scheduler.say(ANSWER)
    page = opened(site.url)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.2")
    page.get_by_label("Most tokens").fill("3")
    page.get_by_role("button", name="Done").click()
    ask(page, "Hello")
    expect(page.locator(".assistant .facts")).to_contain_text("limit of tokens")
    (request,) = site.scheduler.requests
    assert (request.sampling.temperature, request.max_tokens) == (0.2, 3)
    assert "Be brief." in site.scheduler.asked()


def test_the_conversation_outlives_a_reload_and_ends_with_new(site: Any, opened: Open) -> None:
    site.scheduler.say(ANSWER)
    page = opened(site.url)
    ask(page, "Hello")
    expect(page.locator(".assistant .facts")).to_contain_text("tokens")
    page.reload()
    expect(page.locator(".assistant .body")).to_have_text("The capital is Paris.")
    page.get_by_role("button", name="New").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


def test_an_error_is_shown_and_the_page_goes_on(site: Any, opened: Open) -> None:
    site.scheduler.say(ANSWER)
    site.scheduler.error = RuntimeError("out of memory")
    page = opened(site.url)
    ask(page, "Hello")
    expect(page.locator(".problem")).to_contain_text("could not be computed")
    site.scheduler.error = None
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".assistant .body")).to_have_text("The capital is Paris.")
    expect(page.locator(".problem")).to_be_hidden()


def test_thinking_is_folded_away(site: Any, opened: Open) -> None:
    site.scheduler.say("<think>\nLet me see.\n</think>\n\nParis.")
    page = opened(site.url)
    ask(page, "Capital?")
    expect(page.locator(".assistant .body")).to_have_text("Paris.")
    expect(page.get_by_text("Let me see.")).to_be_hidden()
    page.get_by_text("Thinking").click()
    expect(page.get_by_text("Let me see.")).to_be_visible()


def test_a_server_with_a_key_asks_for_it(locked_site: Any, opened: Open) -> None:
    locked_site.scheduler.say(ANSWER)
    page = opened(locked_site.url, forgiven="401")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#greeting")).to_have_text("Ask tiny-moe")
    expect(page.locator("#legend li").first).to_be_visible()
    ask(page, "Hello")
    expect(page.locator(".assistant .body")).to_have_text("The capital is Paris.")


def test_a_wrong_key_is_asked_for_again(locked_site: Any, opened: Open) -> None:
    page = opened(locked_site.url, forgiven="401")
    page.get_by_label("API key").fill("wrong")
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_label("API key")).to_be_focused()
    assert page.locator("dialog[open]").count() == 1
