"""Speculative decoding with a target on flash.

Packs a model, loads it within a memory budget, and asks it something. Without arguments this packs
SmolLM2 (0.3 GB). For a model of your own: `lever.py path/to/model.gguf`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from lever_ext import (
    LeverDecoding,
    load_target,
    make_draft,
    make_policy,
    pack_model,
    pack_tokenizer,
)


def main(
    pack: str | Path, dram_budget: str = "150MiB", draft: str = "low-bit", tokens: int = 40
) -> str:
    target, tokenizer = load_target(pack, dram_budget=dram_budget), pack_tokenizer(pack)
    target.stop_as(tokenizer)
    # "low-bit" is a 3-bit copy made from the pack; "ngram" looks the text up; or the path of a
    # small model's GGUF.
    decoder = LeverDecoding(make_draft(draft, target, tokenizer), make_policy("lever"), target)

    # From here on it is an ordinary transformers model, and its text is what it would be without
    # speculation.
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = target.model.generate(
        **inputs, custom_generate=decoder, max_new_tokens=tokens, do_sample=False
    )
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer, *decoder.stats.lines(), sep="\n")
    decoder.close()
    target.close()
    return str(answer)


if __name__ == "__main__":
    from hybrimoe_plugin.demo import source_path

    with tempfile.TemporaryDirectory(dir=".") as directory:
        main(pack_model(directory, gguf_path=sys.argv[1] if len(sys.argv) > 1 else source_path()))
