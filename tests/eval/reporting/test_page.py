"""The HTML report, read by a parser: contents, and a paragraph and a figure for every question."""

from __future__ import annotations

import importlib.util
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval import figures
from eval.reporting.answers import QUESTIONS
from eval.reporting.page import Answer, page

RESULTS = {
    "schedule": {
        "gap_mean": 2e-6,
        "gap_max": 0.012,
        "plan_us_decode_p50": 5.8,
        "plan_us_prefill_p50": 159.0,
    },
    "cache": {"lru_to_belady_closed": 0.182, "with_prefetch_closed": 1.14},
    "prefetch": {"used_share": 0.71, "worst_speedup_over_off": 0.9997},
    "replay": {
        "decode_speedup_geomean": 1.8,
        "prefill_speedup_geomean": 2.78,
        "oracle_share_decode": 0.93,
    },
    "rows": {
        "speedup_over_static_8_rows": 1.74,
        "oracle_share_8_rows": 0.91,
        "worst_cell_vs_any_baseline": 1.0021,
    },
    "host_path": {
        "layer_us_p50": 84.2,
        "decide_us_p50": 31.6,
        "decide_us_miss_p50": 71.3,
        "host_round_trips_per_hit_token": 0,
    },
    "throughput": {
        "model": "demo",
        "threads": 2,
        "decode_tok_s": 60.9,
        "prefill_tok_s": 236.0,
        "decode_vs_llama_cpp": None,
        "prefill_vs_llama_cpp": None,
        "decode_vs_ik_llama_cpp": 0.9,
        "prefill_vs_ik_llama_cpp": 1.25,
    },
    "batches": {
        "model": "demo",
        "threads": 2,
        "conversations_tok_s": {1: 33.0, 2: 31.0, 4: 60.0},
        "slower_with_more_rows": ["conversations 2"],
        "quiet": True,
    },
    "serving": {
        "model": "demo",
        "threads": 2,
        "tok_s": {1: 31.0, 8: 66.0},
        "vs_llama_cpp": {1: 0.9, 8: 1.1},
        "second_turn_share": 0.08,
        "llama_cpp_second_turn_share": 0.13,
        "quiet": True,
    },
    "fidelity": {"token_agreement": 0.968, "perplexity_difference": 0.0059},
    "lever": {"speedup_vs_flash_ar": 3.016, "speedup_vs_best_tree": 1.18},
    "flips": {"dense_lever_flips": 4, "dense_lever_tokens": 384},
}
SAID = {
    "schedule": "0.0002 % longer",
    "cache": "18 % of the way",
    "prefetch": "71 % of the prefetched",
    "replay": "1.80x",
    "rows": "1.74x as fast as with a fixed placement",
    "host_path": "takes 84 µs of host time",
    "throughput": "threads: 0.90x and 1.25x the speed of ik_llama.cpp.",
    "batches": "33.0 tokens/s in calls of 1 row",
    "serving": "takes 8 % of the first turn",
    "fidelity": "96.8 % of positions",
    "lever": "3.02x",
    "flips": "4 of 384 tokens",
}


class Page(HTMLParser):
    """What the report is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inside: dict[str, list[str]] = {}
        """Section -> the tags inside."""
        self.sources: list[str] = []
        self.boxed = True
        """Whether every table lies in a box that scrolls."""
        self._section = ""
        self._last = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a":
            self.links.append(str(values["href"]))
        if tag == "section":
            self._section = str(values["id"])
            self.inside[self._section] = []
        elif self._section:
            self.inside[self._section].append(tag)
        if tag == "table":
            self.boxed = self.boxed and self._last == "scroll"
        self._last = str(values.get("class"))
        self.sources += [str(values[name]) for name in ("src", "srcset") if name in values]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    figure = tmp_path_factory.mktemp("figures") / "one.png"
    figure.write_bytes(b"png")
    table = figures.RESULTS / "schedule_gap.csv"
    return page([Answer(name, 1, RESULTS[name], "", (figure, table)) for name in QUESTIONS], True)


def test_contents_lead_to_sections_with_a_paragraph_and_a_figure(text: str) -> None:
    found = Page(text)
    assert found.links == [f"#{name}" for name in QUESTIONS]
    assert list(found.inside) == list(QUESTIONS)
    for tags in found.inside.values():
        assert "p" in tags and "figure" in tags and "img" in tags
    assert found.boxed


def test_it_needs_no_network_and_fits_any_screen(text: str) -> None:
    assert all(source.startswith("data:") for source in Page(text).sources)
    assert "http" not in text and "@import" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_has_its_answer_in_a_sentence(name: str, text: str) -> None:
    section = text.partition(f'id="{name}"')[2].partition("</section>")[0]
    assert SAID[name] in section and QUESTIONS[name].asks.split("?")[0].split("'")[0] in section


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_draws_a_figure_at_any_size(name: str) -> None:
    found = importlib.util.find_spec(f"eval.{name}")
    assert found is not None and found.origin is not None
    source = Path(found.origin)
    if source.name == "__init__.py":
        source = source.with_name("question.py")
    code = source.read_text(encoding="utf-8")
    drawn = "\n    report.save_figure(" in code or "\n    report.publish(" in code
    assert drawn or name == "lever"


def test_the_committed_figures_are_those_that_are_drawn() -> None:
    found = {path.stem for path in (figures.report.ROOT / "docs" / "figures").glob("*.png")}
    committed = {name for name in found if not name.startswith("page-")}  # the browser test's
    assert committed == set(figures.FIGURES)
