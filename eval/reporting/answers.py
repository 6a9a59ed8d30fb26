"""What each question asks, and its answer as a sentence made from its JSON line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Result = Mapping[str, Any]


class Question(NamedTuple):
    """A question as a report presents it."""

    title: str
    asks: str
    says: Callable[[Result], str]
    """The answer, from the question's JSON line."""


def _schedule(found: Result) -> str:
    gap = max(0.0, found["gap_mean"])  # rounding can give less than nothing
    return (
        f"Our plans take {_percent(gap, 4)} longer than the best possible ones on "
        f"average and {_percent(found['gap_max'], 1)} at worst. Planning takes "
        f"{found['plan_us_decode_p50']:.1f} µs for a token of decode and "
        f"{found['plan_us_prefill_p50']:.0f} µs for a prompt."
    )


def _cache(found: Result) -> str:
    return (
        f"Our cache goes {_percent(found['lru_to_belady_closed'])} of the way from LRU to Belady's "
        f"optimum; with prefetch {_percent(found['with_prefetch_closed'])}, as prefetch hides "
        f"first uses too."
    )


def _prefetch(found: Result) -> str:
    return (
        f"{_percent(found['used_share'])} of the prefetched experts are used before they are "
        f"evicted. In the worst cell, decode is {found['worst_speedup_over_off']:.4f}x as fast as "
        f"without prefetch."
    )


def _replay(found: Result) -> str:
    return (
        f"On the paper's machine and models, decode is {found['decode_speedup_geomean']:.2f}x and "
        f"prefill {found['prefill_speedup_geomean']:.2f}x as fast as with a fixed placement. That "
        f"is {_percent(found['oracle_share_decode'])} of the decode speed of an oracle."
    )


def _rows(found: Result) -> str:
    return (
        f"Calls of 8 rows are {found['speedup_over_static_8_rows']:.2f}x as fast as with a fixed "
        f"placement, {_percent(found['oracle_share_8_rows'])} of the speed of an oracle. In the "
        f"worst cell of any row count, ours is {found['worst_cell_vs_any_baseline']:.4f}x as fast "
        f"as the best baseline."
    )


def _throughput(found: Result) -> str:
    text = (
        f"The {found['model']} model decodes {found['decode_tok_s']:.1f} tokens/s and reads "
        f"prompts at {found['prefill_tok_s']:.0f} tokens/s with {found['threads']} threads"
    )
    measured = []
    for key, name in (("llama_cpp", "llama.cpp"), ("ik_llama_cpp", "ik_llama.cpp")):
        decode, prefill = found[f"decode_vs_{key}"], found[f"prefill_vs_{key}"]
        if decode is not None and prefill is not None:
            measured.append(f"{decode:.2f}x and {prefill:.2f}x the speed of {name}")
    if not measured:
        return f"{text}; no other program was measured beside it."
    return f"{text}: {', '.join(measured)}."


def _batches(found: Result) -> str:
    speeds = found["conversations_tok_s"]
    first, *_, last = speeds
    text = (
        f"The {found['model']} model decodes {speeds[first]:.1f} tokens/s in calls of {first} row "
        f"and {speeds[last]:.1f} in calls of {last} rows, with {found['threads']} threads"
    )
    slower = found["slower_with_more_rows"]
    if not found["quiet"]:
        return f"{text}. The machine was not quiet, so no number of rows is called slower."
    if not slower:
        return f"{text}. No number of rows is slower than a smaller one beyond the spread."
    return f"{text}. Slower than fewer rows: {', '.join(slower)}."


def _serving(found: Result) -> str:
    speeds = found["tok_s"]
    first, *_, last = speeds
    text = (
        f"The server of the {found['model']} model gives {_clients(first)} {speeds[first]:.1f} "
        f"tokens/s and {_clients(last)} {speeds[last]:.1f} together, with {found['threads']} "
        f"threads. A second turn's first token takes {_percent(found['second_turn_share'])} of "
        f"the first turn's."
    )
    ratios = found["vs_llama_cpp"]
    if ratios is None:
        text = f"{text} llama.cpp's server was not measured beside it."
    else:
        text = (
            f"{text} With {_clients(last)} it has {ratios[last]:.2f}x the speed of llama.cpp's "
            f"server, which takes {_percent(found['llama_cpp_second_turn_share'])} for a second "
            f"turn."
        )
    return text if found["quiet"] else f"{text} The machine was not quiet."


def _clients(count: Any) -> str:
    return "1 client" if str(count) == "1" else f"{count} clients"


def _fidelity(found: Result) -> str:
    return (
        f"Our operators choose the plain model's token in "
        f"{_percent(found['token_agreement'], 1)} of positions, and perplexity differs by "
        f"{_percent(found['perplexity_difference'], 1)}."
    )


def _lever(found: Result) -> str:
    plain, other = found["speedup_vs_flash_ar"], found["speedup_vs_best_tree"]
    if plain is None:
        return "Too few cells were run for a comparison; the table has what there is."
    text = f"The dense target decodes {plain:.2f}x as fast as plain decoding from flash"
    return f"{text}." if other is None else f"{text}, and {other:.2f}x as fast as the next tree."


def _flips(found: Result) -> str:
    flips = sum(count for name, count in found.items() if name.endswith("_flips"))
    tokens = sum(count for name, count in found.items() if name.endswith("_tokens"))
    return f"{flips} of {tokens} tokens differ; the margins below show how close they were."


def _host_path(found: Result) -> str:
    return (
        f"A MoE layer of a decoded token takes {found['layer_us_p50']:.0f} µs of host time in the "
        f"worst case. The first launch comes {found['decide_us_p50']:.0f} µs after the routing "
        f"decision, {found['decide_us_miss_p50']:.0f} µs with a demand load. A token that hits in "
        f"every layer waits for the device {found['host_round_trips_per_hit_token']} times."
    )


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


QUESTIONS = {
    "schedule": Question(
        "Are the plans good?",
        "For one layer, which experts should the CPU compute and which should be copied to the "
        "GPU? Plans are compared with the best possible ones, found by trying all.",
        _schedule,
    ),
    "cache": Question(
        "Are the right experts cached?",
        "How often is an expert on the GPU when it is needed, by cache policy and size? Belady's "
        "optimum, which knows the future, is the limit.",
        _cache,
    ),
    "prefetch": Question(
        "Is prefetching worth it?",
        "What becomes of experts that are copied ahead of their use, with predictions of any "
        "quality?",
        _prefetch,
    ),
    "replay": Question(
        "How fast is a whole model?",
        "How long do prompts and tokens take under each system's policies, on the same machine "
        "model and with the same routing?",
        _replay,
    ),
    "rows": Question(
        "How fast are calls of a few rows?",
        "How long do layer calls take that have rows of several conversations, or of a draft's "
        "token tree, under each system's policies?",
        _rows,
    ),
    "host_path": Question(
        "What does a GPU's decoding cost the host?",
        "How long do Python and torch take for each part of a layer call, on a device that takes "
        "no time itself?",
        _host_path,
    ),
    "throughput": Question(
        "How fast is this machine's CPU alone?",
        "How many tokens per second does the CPU manage without any accelerator, beside llama.cpp "
        "and ik_llama.cpp on the same file?",
        _throughput,
    ),
    "batches": Question(
        "Do more conversations at once give more tokens?",
        "How many tokens per second does the CPU compute in calls of 1 to 32 rows, as a server of "
        "several conversations makes them, or a draft's verification?",
        _batches,
    ),
    "serving": Question(
        "How many clients can a server answer at once?",
        "How many tokens per second do 1 to 8 clients get together over HTTP, how long do they "
        "wait for a first token, and does a second turn wait again, beside llama.cpp's server?",
        _serving,
    ),
    "fidelity": Question(
        "Are the answers right?",
        "How often do our operators choose the token that the plain model in float32 chooses?",
        _fidelity,
    ),
    "lever": Question(
        "How fast is a model that lies on an SSD?",
        "How much does speculation gain where the weights are streamed, and which token tree "
        "gains most?",
        _lever,
    ),
    "flips": Question(
        "Does speculation change the text?",
        "How many greedy tokens differ between tree verification and plain decoding, which round "
        "differently in 16 bits?",
        _flips,
    ),
}
"""By name, as in `python -m eval.NAME`."""
