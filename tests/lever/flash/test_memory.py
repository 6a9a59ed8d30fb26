"""A target larger than its budget: measured from outside, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama
from lever_ext.flash.writer import write_pack
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model_of
from lever_ext.target import load_target

CONFIG = {"model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 2816,
          "num_hidden_layers": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}

class Source:
    identity = "random"
    def get(self, name):
        shape = dict((n, p.shape) for n, p in self.model.named_parameters())[name]
        return torch.randn(shape) * 0.02

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
Source.model = meta_model_of(CONFIG, torch.float32)
pack = write_pack(Source(), Source.model, CONFIG, Path(sys.argv[1]), "float32")
tiny = {**CONFIG, "num_hidden_layers": 1}  # code paths and their libraries, before the count begins
small = Source(); Source.model = meta_model_of(tiny, torch.float32)
warm = load_target(write_pack(small, Source.model, tiny, Path(sys.argv[1]) / "tiny", "float32"), dram_budget="64MiB")
with torch.no_grad():
    warm.model(torch.arange(40)[None]); warm.close()
before, budget = peak(), 48 << 20
target = load_target(pack, dram_budget=budget)
with torch.no_grad():
    for _ in range(3):
        target.model(torch.arange(40)[None])
print(json.dumps({"pack": pack.stat().st_size, "budget": budget, "grown": peak() - before,
                  "planned": target.residency.nbytes, "layers": target.residency.layers}))
"""  # noqa: E501


@pytest.mark.slow
def test_peak_memory_stays_within_the_budget(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert (
        found["pack"] > 4 * found["budget"]
        and found["planned"] <= found["budget"]
        and found["layers"] > 0
    )
    # Activations and the allocator's own slack come on top of the weights' budget.
    assert found["grown"] <= found["budget"] + (8 << 20), found
