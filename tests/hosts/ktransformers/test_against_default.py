"""The same GGUF files in both hosts: classic kTransformers under our rules gives current
transformers' plain logits.
"""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
HOST = ROOT / ".venv-ktransformers" / "bin" / "python"
STEPS = 3
PAIRS = {
    "Mixtral": "mixtral",
    "Qwen2-57B-A14B": "qwen2_moe",
    "DeepSeek-V2": "deepseek_v2",
    "DeepSeek-V2-Lite": "deepseek_v2_lite",
    "DeepSeek-V3": "deepseek_v3",
}
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches
folder, tests, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.path.insert(0, tests)
import classic
with apply_patches():
    for name in sys.argv[4:]:
        made = classic.config(name, num_hidden_layers=2, rope_theta=10000.0)
        built = classic.load(made, classic.rules(name, folder / name), folder / name)
        np.save(folder / name / "logits.npy", classic.host_logits(built, classic.tokens(11), steps).numpy())
        built.hybrimoe.close()
"""  # noqa: E501


@pytest.mark.skipif(
    find_spec("ktransformers") is not None,
    reason="for the default environment, which makes the files",
)
@pytest.mark.skipif(
    not HOST.exists(), reason="no environment with ktransformers: make setup-ktransformers"
)
def test_both_hosts_agree(tmp_path: Path) -> None:
    import classic
    import tiny  # needs a current transformers

    prompt, wanted = classic.tokens(11), {}
    for name, family in PAIRS.items():
        (tmp_path / name).mkdir()
        tiny.write(tmp_path / name, family)
        with torch.no_grad():
            wanted[name] = tiny.model(family)(prompt).logits[0, -STEPS - 1 :]
    command = [
        str(HOST),
        "-c",
        PROGRAM,
        str(tmp_path),
        str(Path(__file__).parent),
        str(STEPS),
        *PAIRS,
    ]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in PAIRS:
        found = torch.from_numpy(np.load(tmp_path / name / "logits.npy"))
        torch.testing.assert_close(
            found, wanted[name], msg=lambda text, name=name: f"{name}: {text}"
        )
