"""Grammars are compiled outside the event loop: large ones take seconds."""

from __future__ import annotations

from typing import Any

import anyio.to_thread


async def compiled(kind: str, spec: Any, tokenizer: Any) -> Any:
    """What `Sampling.grammar` takes.

    Args:
        kind, spec: as of `serve.sampling.grammar.compile_grammar`.

    Raises:
        HybriMoEError: the grammar cannot be compiled.
    """
    return await anyio.to_thread.run_sync(_compile, kind, spec, tokenizer)


def _compile(kind: str, spec: Any, tokenizer: Any) -> Any:
    from hybrimoe_plugin.serve.sampling.grammar import compile_grammar

    return compile_grammar(kind, spec, tokenizer)
