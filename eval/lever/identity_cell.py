"""Whether tree decoding gives exactly the tokens of the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from eval.lever.cell import BLANK, Row
from eval.lever.lab import PROMPTS, Lab
from eval.lever.trees import TREES
from hybrimoe_plugin.demo import source_path
from lever_ext.decoding import LeverDecoding
from lever_ext.early_exit.gate import ExitGate
from lever_ext.early_exit.predictor import ExitPredictor
from lever_ext.early_exit.prune import PruneSettings

DRAFT = "low-bit 65 %"
TARGET = "narrow-fp32"


@dataclass(frozen=True)
class IdentityCell:
    """In float32, every tree's tokens against plain `generate` of the model in memory.

    Each tree is tried with and without pruning.
    """

    name: str
    tokens: int = 20
    trees: tuple[str, ...] = ("lever", "chain 8", "specinfer", "opt_tree 16")

    def run(self, lab: Lab) -> Iterator[Row]:
        """One row for each prompt and tree, pruned and not; its value is 1 for the same tokens."""
        from hybrimoe_plugin.hosts.transformers import load_plain_model

        plain, _ = load_plain_model(None, source_path(), dtype=torch.float32, progress=False)
        target = lab.target(TARGET, "300MiB")
        head = plain.get_output_embeddings().weight.detach()
        gate = ExitGate(ExitPredictor(head * 0.05, 15, 0.0, ""), PruneSettings())
        settings = {
            "max_new_tokens": self.tokens,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        for prompt in PROMPTS:
            inputs = lab.prompt(prompt)
            want = plain.generate(**inputs, **settings)
            for tree in self.trees:
                for pruned in (False, True):
                    target.set_gate(gate if pruned else None)
                    draft = lab.draft(DRAFT)
                    decoder = LeverDecoding(draft, TREES[tree](), target, prune="always")
                    found = target.model.generate(**inputs, custom_generate=decoder, **settings)
                    decoder.close()
                    yield _row(prompt, tree, pruned, torch.equal(found, want))
        target.set_gate(None)


def _row(prompt: str, tree: str, pruned: bool, same: bool) -> Row:
    name = f"{tree}, pruned" if pruned else tree
    return {
        **BLANK,
        "target": TARGET,
        "prompt": prompt,
        "tree": f"{name}: identical",
        "value": int(same),
    }
