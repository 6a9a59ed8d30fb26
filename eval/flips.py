"""How many greedy tokens differ, in 16 bits, between tree verification and plain decoding?

Measured on the flash targets. Every token of the tree-decoded text is compared with what one-row
decoding of the same text chooses, so that one flip does not count all the tokens after it. Weights
lie in DRAM: where they lie changes no bit.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from eval.lever.lab import PROMPTS, Lab
from eval.reporting import plots, report
from eval.reporting.rows import column
from lever_ext.decoding import LeverDecoding
from lever_ext.flips import FlipCount, count_flips
from lever_ext.packing import pack_tokenizer
from lever_ext.tree.policies import make_policy

TARGETS = ("dense", "mixtral")
TREES = ("lever",)
FURTHER = (
    "Explain photosynthesis to a child.",
    "List five European capitals with one sentence about each.",
    "Translate 'good morning, my friend' into French and Spanish.",
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives the contents of the JSON line."""
    parser = report.parser(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=32, help="generated for each prompt")
    parser.add_argument("--only", default="", choices=("", *TARGETS), help="one target")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {}
    rows = []
    lab = Lab()
    prompts = _prompts(lab)
    if args.quick:
        prompts = prompts[::4]
    targets = (args.only,) if args.only else TARGETS
    for name in targets:
        target = lab.target(name, "4GiB")
        for tree in TREES:
            draft = lab.draft("low-bit 65 %")
            decoder = LeverDecoding(draft, make_policy(tree), target, overlap=False)
            found = count_flips(target.model, decoder, prompts, args.tokens)
            decoder.close()
            rows.append(
                {
                    "target": name,
                    "dtype": target.pack.index.dtype,
                    "tree": tree,
                    **_row(found, len(prompts)),
                }
            )
            result[f"{name}_{tree}_flips"] = len(found.flips)
            result[f"{name}_{tree}_tokens"] = found.tokens
    lab.close()
    title = "Greedy tokens that differ from plain decoding (measured)"
    report.publish(title, rows, args.out / "flips", draw, height=2.4)
    report.finish(result)
    return result


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """The share of tokens that plain decoding would have chosen too, a bar for each target."""
    names = ["dense target" if row["target"] == "dense" else "MoE target" for row in rows]
    same = [100 * (1 - row["flips"] / row["tokens"]) for row in rows]
    plots.bars(axes, names, same, "{:.2f} %", [plots.OURS] * len(rows))
    axes.set_xlim(0, 115)
    flips, tokens = sum(column(rows, "flips")), sum(column(rows, "tokens"))
    axes.set_title(f"Trees change {flips} of {tokens} tokens of plain decoding")
    axes.set_xlabel("same token as plain decoding, % (measured)")


def _prompts(lab: Lab) -> list[torch.Tensor]:
    """Ids [1, T] of every prompt."""
    tokenizer = pack_tokenizer(lab.pack("dense"))
    texts = [text for kind in PROMPTS.values() for text in kind]
    found = []
    for text in (*texts, *FURTHER):
        chat = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        found.append(encoded.input_ids)
    return found


def _row(found: FlipCount, prompts: int) -> dict[str, Any]:
    """One row of the table."""
    margins = [flip.margin for flip in found.flips]
    first = found.first()
    places = [f"{flip.prompt}:{flip.position}:{flip.margin:.3f}" for flip in first]
    return {
        "prompts": prompts,
        "tokens": found.tokens,
        "flips": len(found.flips),
        "prompts_with_a_flip": len(first),
        "largest_margin": round(max(margins, default=0.0), 4),
        "median_margin": round(statistics.median(margins), 4) if margins else 0.0,
        "first_flips": " ".join(places),
    }


if __name__ == "__main__":
    main()
