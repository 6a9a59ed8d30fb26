"""Every flag of `local_chat` with a value, and the kinds of chat in which it has an effect."""

from __future__ import annotations

from typing import NamedTuple

CHATS = {
    "model": ("--gguf_path", "g"),
    "demo": ("--demo",),
    "flash": ("--flash_pack", "p"),
}


class Flag(NamedTuple):
    """A flag with a value.

    Args:
        value: as it is typed.
        chats: the kinds of chat in which it has an effect, by their first letters.
        beside: flags that it needs for that.
    """

    value: str
    chats: str
    beside: str = ""


ENGINE = "md"
ALL = "mdf"
FLAGS = {
    "gguf_path": Flag("other", "m"),
    "model_path": Flag("directory", "m"),
    "rules": Flag("r.yaml", ALL),
    "optimize_config_path": Flag("r.yaml", ALL),
    "trust_rules": Flag("True", ALL, "--rules r.yaml"),
    "demo": Flag("qwen2moe", "d"),
    "device": Flag("cuda:0", ALL),
    "dtype": Flag("float32", ENGINE),
    "prompt": Flag("hi", ALL),
    "prompt_file": Flag(__file__, ALL),
    "system": Flag("text", ALL),
    "repetition_penalty": Flag("1.5", ALL),
    "stop": Flag("text", ALL),
    "quiet": Flag("True", ALL),
    "max_new_tokens": Flag("7", ALL),
    "do_sample": Flag("True", ALL),
    "greedy": Flag("True", ALL),
    "temperature": Flag("0.5", ALL),
    "top_p": Flag("0.5", ALL),
    "top_k": Flag("5", ALL),
    "min_p": Flag("0.5", ALL),
    "sampler": Flag("transformers", ENGINE),
    "seed": Flag("5", ALL),
    "force_think": Flag("True", ALL),
    "chunk_prefill_size": Flag("5", ENGINE),
    "prefix_cache_bytes": Flag("2GiB", ALL),
    "timeline": Flag("t.json", ENGINE),
    "record_trace": Flag("t.bin", ENGINE),
    "cpu_infer": Flag("3", ENGINE),
    "use_cuda_graph": Flag("False", ENGINE),
    "scheduler": Flag("static", ENGINE),
    "cache": Flag("lru", ENGINE),
    "budget": Flag("layer", ENGINE),
    "prefetch": Flag("off", ENGINE),
    "cache_ratio": Flag("0.5", ENGINE),
    "cache_bytes": Flag("1GiB", ENGINE),
    "look_ahead": Flag("2", ENGINE),
    "mrs_alpha": Flag("0.2", ENGINE, "--cache mrs"),
    "mrs_p": Flag("2", ENGINE, "--cache mrs"),
    "cpu_backend": Flag("torch", ENGINE),
    "cpu_threads": Flag("3", ENGINE),
    "accelerator": Flag("emulated", ENGINE),
    "kernels": Flag("torch", ENGINE),
    "activations": Flag("float", ENGINE),
    "context": Flag("128", ENGINE),
    "dense": Flag("plain", ENGINE),
    "graphs": Flag("off", ENGINE),
    "attention": Flag("torch", ENGINE),
    "host_path": Flag("wait", ENGINE),
    "weights": Flag("mapped", ENGINE),
    "verify": Flag("slots", ENGINE),
    "profile": Flag("name", ENGINE),
    "linears": Flag("plain", ENGINE),
    "cuda_graphs": Flag("off", ENGINE),
    "cpu_graphs": Flag("off", ENGINE),
    "flash_pack": Flag("q", "f"),
    "draft": Flag("ngram", "f"),
    "draft_bits": Flag("2", "f"),
    "dram_budget": Flag("1GiB", "f"),
    "vram_budget": Flag("1GiB", "f", "--device cuda"),
    "tree": Flag("fixed", "f"),
    "tree_size": Flag("3", "f", "--tree chain"),
    "early_exit": Flag(__file__, "f"),
    "throttle": Flag("nvme", "f"),
    "overlap": Flag("False", "f"),
}
"""Every flag but `--mode`, of which no value changes anything."""
