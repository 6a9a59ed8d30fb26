"""The engine on the page, while a model computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from playwright.sync_api import Page, expect
from waiting import until

Open = Callable[..., Page]

LABEL = re.compile(r"^Map of \d+ layers by \d+ experts: .*accelerator")
PIXELS = "() => document.getElementById('map').toDataURL()"


def decode(model: Any, tokens: int = 12) -> None:
    prompt = torch.randint(1, 60, (1, 4))
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def test_the_map_changes_while_the_model_computes(site: Any, opened: Open) -> None:
    page = opened(site.url)
    expect(page.locator("#map")).to_have_attribute("aria-label", LABEL)
    before = page.evaluate(PIXELS)
    decode(site.service.model)
    page.wait_for_function(f"before => ({PIXELS})() !== before", arg=before)


def test_emulated_times_are_called_so(site: Any, opened: Open) -> None:
    page = opened(site.url)
    expect(page.locator("#lanes-note")).to_contain_text("emulated")
    assert page.locator("#lanes canvas").count() == 3


def test_lanes_and_figures_show_work(site: Any, opened: Open) -> None:
    page = opened(site.url)
    expect(page.locator("#lanes canvas").first).to_be_visible()
    decode(site.service.model)
    page.wait_for_function(
        "() => [...document.querySelectorAll('#lanes .share')]"
        ".some(share => parseInt(share.textContent) > 0)"
    )
    expect(page.locator("#figures .value").nth(1)).to_contain_text("%")


def test_nobody_is_told_once_the_page_is_closed_or_paused(site: Any, opened: Open) -> None:
    (engine,) = site.service.model.hybrimoe.engines
    page = opened(site.url)
    until(lambda: engine.watcher is not None)
    page.get_by_role("button", name="Pause").click()
    until(lambda: engine.watcher is None)
    page.get_by_role("button", name="Resume").click()
    until(lambda: engine.watcher is not None)
    page.close()
    until(lambda: engine.watcher is None)


def test_arrow_keys_name_experts(site: Any, opened: Open) -> None:
    page = opened(site.url)
    expect(page.locator("#legend li").first).to_be_visible()
    page.locator("#map").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#map-cell")).to_contain_text("Layer 0, expert 0:")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#map-cell")).to_contain_text("Layer 0, expert 1:")


def test_a_model_without_experts_has_the_chat_alone(plain_site: Any, opened: Open) -> None:
    page = opened(plain_site.url)
    expect(page.locator("#greeting")).to_have_text("Ask tiny-moe")
    expect(page.locator("#engine")).to_be_hidden()
    expect(page.locator("#tabs")).to_be_hidden()


@pytest.mark.parametrize("name", ["Chat", "Engine"])
def test_on_a_phone_one_part_is_shown_at_a_time(site: Any, opened: Open, name: str) -> None:
    page = opened(site.url, viewport={"width": 360, "height": 740})
    page.get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#chat")).to_be_visible(visible=name == "Chat")
    expect(page.locator("#engine")).to_be_visible(visible=name == "Engine")
