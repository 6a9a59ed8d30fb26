"""What is around the items of an answer: its state, its usage, and what was asked."""

from __future__ import annotations

import time
import uuid
from typing import Any

from hybrimoe_plugin.serve.api.conversations.counts import Counts
from hybrimoe_plugin.serve.requests import Sampling


def envelope(name: str, body: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
    """A response that has just begun, as OpenAI writes it.

    Args:
        name: the model's.
        body: of the request, which is told again where it was followed.
    """
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": body.get("metadata") or {},
        "model": name,
        "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": body.get("reasoning") or {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_logprobs": sampling.logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.get("user"),
    }


def usage_of(counts: Counts) -> dict[str, Any]:
    """Tokens, as OpenAI counts them: the prompt's include those that were cached."""
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
        "output_tokens": counts.answer,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt + counts.answer,
    }
