"""What `eval.lever` measures with: targets, drafts, prompts, and how calm the machine was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch

from hybrimoe_plugin.cache_folder import cache_dir
from hybrimoe_plugin.demo import build_demo_model, source_path
from lever_ext.demo import demo_draft, widened_pack
from lever_ext.drafts.base import Draft
from lever_ext.drafts.ngram import NGramDraft
from lever_ext.flash.reader import Throttle
from lever_ext.packing import pack_model, pack_tokenizer
from lever_ext.target import FlashTarget, load_target

PROMPTS = {
    "code": (
        "Write a Python function that checks whether a number is prime, and explain it.",
        "Write a SQL query that lists customers with more than five orders.",
        "Write a JavaScript function that reverses a string.",
    ),
    "arithmetic": (
        "A shop sells pens at 3 dollars and books at 12 dollars. How much do 7 pens and 4 books "
        "cost? Show each step.",
        "What is 17 times 23? Show your work.",
        "A train travels 60 miles in 1.5 hours. How far does it travel in 4 hours? Explain.",
    ),
    "dialogue": (
        "I feel nervous about my first day at a new job. What should I do?",
        "Tell me a short story about a dragon.",
        "How do I cook rice?",
    ),
}


class OthersLoad:
    """Share of the machine's processors that other programs use, from its making on."""

    def __init__(self) -> None:
        self._before = self._read()

    @staticmethod
    def _read() -> tuple[float, float]:
        """(processor seconds of everybody else, processor seconds that there were)."""
        times = psutil.cpu_times()
        whole = sum(times[:8])
        idle = times.idle + getattr(times, "iowait", 0.0)
        mine = psutil.Process().cpu_times()
        return whole - idle - mine.user - mine.system, whole

    def share(self) -> float:
        """The share from 0 to 1, since this was made."""
        others_before, whole_before = self._before
        others, whole = self._read()
        passed = whole - whole_before
        if passed <= 0:
            return 0.0
        return max(0.0, (others - others_before) / passed)


class Lab:
    """Targets and drafts, made once for all cells."""

    def __init__(self) -> None:
        torch.set_num_threads(max(1, torch.get_num_threads()))
        self._drafts: dict[str, Draft] = {"n-gram": NGramDraft()}
        self._targets: dict[tuple[Any, ...], FlashTarget] = {}
        self._tokenizer: Any = None

    def pack(self, name: str) -> Path:
        """A target's flash pack, which is written if it is not there yet."""
        directory = cache_dir() / "lever" / name
        if not (directory / "target.lever").exists():
            if name == "dense":
                widened_pack(source_path(), directory)
            elif name == "narrow-fp32":
                pack_model(directory, None, source_path(), "float32")
            else:
                pack_model(directory, None, build_demo_model(name))
        return directory / "target.lever"

    def target(
        self, name: str, budget: str | int, throttle: str = "", direct: bool = True
    ) -> FlashTarget:
        """One target is open at a time."""
        key = (name, budget, throttle, direct)
        if key not in self._targets:
            self.close()
            slowed = Throttle.parse(throttle) if throttle else None
            self._targets[key] = load_target(
                self.pack(name), dram_budget=budget, throttle=slowed, direct=direct
            )
        return self._targets[key]

    def draft(self, name: str) -> Draft:
        """The draft of a name, `n-gram` or `low-bit 65 %`."""
        if name not in self._drafts:
            self._drafts[name] = demo_draft(source_path(), int(name.split()[1]))
        return self._drafts[name]

    def prompt(self, kind: str, which: int = 0) -> Any:
        """The model's inputs for a prompt of one kind."""
        if self._tokenizer is None:
            self._tokenizer = pack_tokenizer(self.pack("dense"))
        prompts = PROMPTS[kind]
        chat = [{"role": "user", "content": prompts[which % len(prompts)]}]
        return self._tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def close(self) -> None:
        """Close the target that is open."""
        for target in self._targets.values():
            target.close()
        self._targets.clear()
