"""Hostile answers do nothing but look odd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

Open = Callable[..., Page]

ELEMENTS = "script, img, iframe, svg, object, embed, form, input, style, link, base, video"

HOSTILE = {
    "script": "<script>document.title = 'owned'; alert(1)</script>",
    "image": '<img src=x onerror="alert(1)"> ![x](https://example.org/track.png)',
    "links": "[a](javascript:alert(1)) [b](data:text/html,x) [c](JaVaScRiPt:alert(1)) "
    "[d](vbscript:x) <javascript:alert(1)> [e](//example.org) [f](\x01javascript:alert(1))",
    "in code": "```html\n<script>alert(1)</script>\n```\n`<img src=x onerror=alert(1)>`",
    "in a table": "| <script>alert(1)</script> | b |\n|---|---|\n"
    "| <iframe src=/> | [x](javascript:1) |",
    "language": "```<img src=x onerror=alert(1)>\nx\n```",
    "attribute": '[x](https://example.org/"onmouseover="alert(1)) '
    '<a href="javascript:alert(1)">y</a>',
    "style": "<style>body{display:none}</style><link rel=stylesheet href=//example.org/x.css>",
}


def answered(site: Any, page: Page, text: str) -> Any:
    site.scheduler.say(text)
    page.get_by_label("Message").fill("Go")
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".assistant .facts")).to_contain_text("tokens", timeout=60_000)
    return page.locator(".assistant .body")


@pytest.mark.parametrize("name", HOSTILE)
def test_markup_of_an_answer_is_text(site: Any, opened: Open, name: str) -> None:
    page = opened(site.url)
    outside: list[str] = []
    page.on("request", lambda sent: sent.url.startswith(site.url) or outside.append(sent.url))
    body = answered(site, page, HOSTILE[name])
    assert body.locator(ELEMENTS).count() == 0
    for link in body.locator("a").all():
        assert (link.get_attribute("href") or "").startswith("https://example.org/")
        assert link.get_attribute("onmouseover") is None
    assert page.title() == "tiny-moe"
    assert outside == []


def test_characters_that_reorder_text_are_named(site: Any, opened: Open) -> None:
    page = opened(site.url)
    body = answered(
        site, page, "safe \u202egnp.exe\u202c and \u2066more\u2069\n\n```\n\u202ex\n```"
    )
    shown = body.inner_text()
    assert "U+202E" in shown and "U+2066" in shown
    assert not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069") & set(shown)


HUGE = {
    "a line": "x" * 30_000,
    "emphasis": "*a _b " * 3_000,
    "ticks": "`" * 5_000 + "a`" * 4_000,
    "quotes": "> " * 3_000 + "deep",
    "brackets": "[" * 15_000,
    "lists": "- " * 4_000 + "x",
    "cells": "|" * 4_000 + "\n" + "|-" * 2_000,
    "empty lines": "- x" + "\n" * 5_000 + "  y",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_answer_is_shown_and_the_page_stays_usable(
    site: Any, opened: Open, name: str
) -> None:
    page = opened(site.url)
    answered(site, page, HUGE[name])
    assert page.evaluate(WIDTH) <= page.evaluate("innerWidth")
    page.get_by_label("Message").fill("still here")
    expect(page.get_by_label("Message")).to_have_value("still here")


WIDTH = "document.scrollingElement.scrollWidth"


def test_the_policy_forbids_what_the_page_does_not_need(site: Any, opened: Open) -> None:
    page = opened("about:blank")
    answer = page.goto(site.url)
    assert answer is not None
    policy = answer.headers["content-security-policy"]
    for rule in ("default-src 'none'", "script-src 'self'", "style-src 'self'"):
        assert rule in policy
    assert "unsafe" not in policy
