"""What llama.cpp ships: `make oracle` fetches it, other test runs leave these tests out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from converted_models import CHANGES, CONFIGS

from eval.models.shrunk import shrunk_model


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder with llama.cpp's converter, vocabularies and templates."""
    folder = os.environ.get("HYBRIMOE_LLAMA_CPP")
    if folder is None:
        pytest.skip("`make oracle` fetches llama.cpp's converter and runs this")
    return Path(folder)


@pytest.fixture(scope="session")
def converted(llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, with its model, `model.gguf` and config.json."""
    folder = tmp_path_factory.mktemp("converted")
    for model_type, changes in CHANGES.items():
        place = folder / model_type
        shrunk_model(model_type, **changes).save_pretrained(place)
        config = place / "config.json"
        kept = config.read_text(encoding="utf-8")
        (place / "kept.json").write_text(kept, encoding="utf-8")
        values = json.loads(kept) | CONFIGS.get(model_type, {})
        config.write_text(json.dumps(values), encoding="utf-8")
        # The converter counts Gemma's tokens here, to cut the embedding.
        tokens = {str(token): token for token in range(values["vocab_size"])}
        counted = {"model": {"vocab": tokens}, "added_tokens": []}
        (place / "tokenizer.json").write_text(json.dumps(counted), encoding="utf-8")
    program = Path(__file__).with_name("convert.py")
    places = sorted(map(str, folder.iterdir()))
    done = subprocess.run(
        [sys.executable, str(program), str(llama_cpp), *places],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
