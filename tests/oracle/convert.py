"""Run llama.cpp's converter over several model directories, in a process with its own gguf package.

    python tests/oracle/convert.py LLAMA_CPP FOLDER...

Each folder holds config.json and weights, and gets `model.gguf` in float32. The models are random
and have no vocabulary, so the file says that it has none.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main() -> None:
    source, *folders = sys.argv[1:]
    sys.path[:0] = [source, str(Path(source) / "gguf-py")]
    for folder in folders:
        _convert(Path(folder))


def _convert(folder: Path) -> None:
    import convert_hf_to_gguf as converter

    hparams = converter.ModelBase.load_hparams(folder, False)
    architecture = converter.get_model_architecture(hparams, converter.ModelType.TEXT)
    known = converter.get_model_class(architecture, mmproj=False)

    def without_vocabulary(self: Any) -> None:
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    changes = {"set_vocab": without_vocabulary, "model_arch": known.model_arch}
    # Layers that predict further tokens are not part of the tiny models.
    changes["no_mtp"] = known.supports_mtp_export
    model = type(known.__name__, (known,), changes)(
        folder, converter.gguf.LlamaFileType.ALL_F32, folder / "model.gguf"
    )
    model.write()


if __name__ == "__main__":
    main()
