"""Speculative decoding with a target on flash: pack a model, load it within a memory budget, ask.

Without arguments this packs SmolLM2 (0.3 GB). For a model of your own:

    python examples/lever.py path/to/model.gguf
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
    pack: str | Path,
    dram_budget: str = "150MiB",
    draft: str = "low-bit",
    tokens: int = 40,
) -> str:
    """Ask a packed model one question; its answer.

    Args:
        pack: the pack, or its directory.
        dram_budget: memory for the model's weights.
        draft: "low-bit" is a 3-bit copy made from the pack, "ngram" looks the text up; or the path
            of a small model's GGUF.
        tokens: longest answer.
    """
    target = load_target(pack, dram_budget=dram_budget)
    tokenizer = pack_tokenizer(pack)
    target.stop_as(tokenizer)
    proposals = make_draft(draft, target, tokenizer)
    decoder = LeverDecoding(proposals, make_policy("lever"), target)

    # From here on it is an ordinary transformers model. Its text is the same as without
    # speculation.
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = target.model.generate(
        **inputs, custom_generate=decoder, max_new_tokens=tokens, do_sample=False
    )
    prompt_tokens = inputs["input_ids"].shape[1]
    answer = tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)
    print(answer, *decoder.stats.lines(), sep="\n")
    decoder.close()
    target.close()
    return str(answer)


if __name__ == "__main__":
    from hybrimoe_plugin.demo import source_path

    gguf_path = sys.argv[1] if len(sys.argv) > 1 else source_path()
    with tempfile.TemporaryDirectory(dir=".") as directory:
        main(pack_model(directory, gguf_path=gguf_path))
