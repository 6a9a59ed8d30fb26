"""Write docs/models.md by trying every model type: `python -m scripts.models_doc [--check]`.

For each mixture-of-experts type that transformers has, a tiny random model is saved as a
checkpoint directory, loaded with operators beside an emulated accelerator, and compared with the
plain forward: a prompt, decode steps, and a padded batch. The page says what came of it. `--check`
writes nothing and exits with 1 where the page is stale.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from eval.models.agreement import check_agreement
from eval.models.shrunk import moe_types, shrunk_model
from hybrimoe_plugin import load_model
from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.families.registry import find_family

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
EXACT = "exact"

HEAD = """\
# Which models work

<!-- Written by scripts/models_doc.py from a test run. Change the code, then run that script. -->

Every mixture-of-experts type of transformers {version} was tried. For each one a tiny random model
was saved as a checkpoint directory, loaded with `cache_ratio=0.25` beside an emulated accelerator,
and compared in float32 with the plain transformers forward: a prompt of 21 tokens, 4 decode steps,
and a batch of two prompts of which one is padded.

- **GGUF alone**: the GGUF architecture whose files need no config.json beside them. Tests load a
  tiny file of each, with every scheduler and cache.
- **directory**: `exact` means logits within the defaults of `torch.testing.assert_close`. A type
  that is refused says why in the words of its error message.

| model type | GGUF alone | directory |
|---|---|---|
"""


class Stand(NamedTuple):
    """Where one model type stands."""

    model_type: str
    architectures: Sequence[str]
    """GGUF architectures of the family of this name; empty for types that nobody named."""
    directory: str
    """`EXACT`, or why it is refused."""


def stand(model_type: str) -> Stand:
    """Try one type.

    Raises:
        AssertionError: the model answers, and wrongly.
    """
    family = find_family(model_type)
    architectures = () if family is None else family.architectures
    try:
        model = shrunk_model(model_type)
    except Exception as error:  # transformers' own, of many kinds
        return Stand(model_type, architectures, f"transformers cannot build it: {_line(error)}")
    return Stand(model_type, architectures, try_directory(model))


def try_directory(right: Any) -> str:
    """`EXACT`, or the message with which the checkpoint is refused."""
    with tempfile.TemporaryDirectory() as folder:
        right.save_pretrained(folder)
        try:
            model, _ = load_model(
                folder,
                dtype="float32",
                progress=False,
                accelerator="emulated",
                cache_ratio=0.25,
                cpu_backend="torch",
            )
        except HybriMoEError as error:
            return f"refused: {_reason(_line(error)).replace(folder, 'DIR')}"
        try:
            check_agreement(model, right)
        finally:
            model.hybrimoe.close()
    return EXACT


def page(stands: Sequence[Stand]) -> str:
    """The page's text."""
    import transformers

    lines = [HEAD.format(version=transformers.__version__).rstrip("\n")]
    return "\n".join([*lines, *map(row, stands)]) + "\n"


def row(item: Stand) -> str:
    """One type's line of the table."""
    alone = ", ".join(f"`{name}`" for name in item.architectures) or "-"
    return f"| `{item.model_type}` | {alone} | {item.directory} |"


def _reason(message: str) -> str:
    """A message without the rule and the module that it begins with."""
    at = message.find("experts of ")
    return message[max(at, 0) :]


def _line(error: BaseException) -> str:
    """An error in one line of a table."""
    text = " ".join(str(error).split())
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only tell whether the page is stale")
    check = parser.parse_args().check
    text = page([stand(kind) for kind in tqdm(moe_types(), disable=None)])
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is stale: run python -m scripts.models_doc", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
