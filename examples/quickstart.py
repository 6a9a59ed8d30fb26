"""Load a model whose experts HybriMoE schedules, ask it something, read what the engine did.

Without arguments this takes the demo model. For a model of your own: `quickstart.py
path/to/model.gguf`.
"""

from __future__ import annotations

import sys

from hybrimoe_plugin import load_model
from hybrimoe_plugin.demo import build_demo_model


def main(question: str = "What is the capital of France?") -> str:
    gguf_path = sys.argv[1] if len(sys.argv) > 1 else build_demo_model()
    # The model comes from the file's metadata, the rules from its family; settings override what
    # the rules say. `emulated` runs the whole pipeline without a GPU; leave it out and a GPU is
    # used where there is one.
    model, tokenizer = load_model(gguf_path=gguf_path, accelerator="emulated", cache_ratio=0.25)

    # From here on it is an ordinary transformers model.
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer)

    counts = model.hybrimoe.stats()
    print(
        f"cache hits {counts.hit_rate:.0%}, {counts.prefetches_used} of {counts.prefetches} "
        f"prefetches used"
    )
    print(
        f"experts: {counts.experts_cpu} on the CPU, {counts.experts_accelerator} on the "
        f"(emulated) accelerator"
    )
    model.hybrimoe.restore()  # the original modules are back, threads and memory given back
    return str(answer)


if __name__ == "__main__":
    main()
