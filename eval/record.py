"""Record routing of the demo model with another number of experts.

For shapes that no public record fits. The model is the demo model in Qwen2-MoE form (SmolLM2-135M,
upcycled) with as many experts as are asked for; its routers really route a text and the answer to
it. `eval/data/README.md` says which traces were made so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.reporting import report
from hybrimoe_plugin.demo.upcycle import write_model
from hybrimoe_plugin.engine import CallRecord
from hybrimoe_plugin.replay.trace import Call, TraceHeader, TraceWriter

FORM = "qwen2moe"
PROMPT = """The old lighthouse stands where the river meets the sea. Every evening its keeper climbs one hundred and
twelve steps, cleans the lenses and lights the lamp. He writes down the wind, the height of the waves and
every ship that passes. In winter the storms can last for a week, and then the boat with bread and
letters does not come. He reads the same four books again, mends his nets and talks to the gulls. Once a
ship lost its way in the fog, and he rang the bell for eleven hours until the last man was ashore.
Describe a day in the life of the keeper, and explain why a lamp with lenses can be seen from so far
away."""  # noqa: E501


def record(path: Path, experts: int, top_k: int, tokens: int) -> dict[str, Any]:
    """Build, run and record; the model is thrown away. Gives the contents of the JSON line."""
    from hybrimoe_plugin import load_model

    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        write_model(FORM, gguf, experts, top_k)
        model, tokenizer = load_model(
            None, gguf, accelerator="emulated", cache_ratio=0.05, cpu_backend="torch"
        )
        (engine,) = model.hybrimoe.engines
        spec = engine.layers[0].spec
        source = f"recorded by eval.record: SmolLM2-135M upcycled to {experts} experts, top {top_k}"
        header = TraceHeader(
            f"demo {experts}x{top_k}",
            len(engine.layers),
            experts,
            top_k,
            spec.expert_bytes,
            source,
            "recorded",
        )
        writer = TraceWriter(
            path, header, score_top=0
        )  # a third of the size; shapes need no scores

        def write(call: CallRecord) -> None:
            writer.write(
                Call(call.layer, call.topk_ids, call.topk_weights, call.scores, call.predicted)
            )

        model.hybrimoe.record(write)
        messages = [{"role": "user", "content": PROMPT}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            torch.manual_seed(
                0
            )  # drawn, for the likeliest answer soon repeats itself, and so would its routing
            answer = model.generate(
                ids, max_new_tokens=tokens, do_sample=True, temperature=0.8, top_p=0.95
            )
        model.hybrimoe.record(None)
        writer.close()
        model.hybrimoe.close()
    said = answer[0, ids.shape[1] :]
    print(tokenizer.decode(said, skip_special_tokens=True))
    return {"prompt_tokens": ids.shape[1], "answer_tokens": len(said), "bytes": path.stat().st_size}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; gives the contents of the JSON line."""
    parser = report.parser(__doc__ or "")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top_k", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=161, help="longest answer")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"smollm2-{args.experts}x{args.top_k}.trace"
    result = record(path, args.experts, args.top_k, args.tokens)
    report.finish(result)
    return result


if __name__ == "__main__":
    main()
