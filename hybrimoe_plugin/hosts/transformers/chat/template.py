"""Chat templates, which are programs that come with a model, rendered under limits."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.hosts.transformers.chat import template_worker

SECONDS = 5
MAX_BYTES = 512 * 2**20


class ChatTemplate:
    """A tokenizer's chat template.

    It is rendered in a process of its own, started when it is first needed and kept for the next
    message: a template may loop for ever or build gigabytes in a single operation, and nothing
    inside Python ends that.

    Args:
        tokenizer: with `chat_template`; its special tokens are the template's variables.
        seconds: longest time for one rendering.
        nbytes: most memory of the process.
    """

    def __init__(self, tokenizer: Any, seconds: int = SECONDS, nbytes: int = MAX_BYTES) -> None:
        self._tokenizer = tokenizer
        self._seconds, self._nbytes = seconds, nbytes
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # one request and its answer at a time

    @property
    def exists(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    @property
    def source(self) -> str:
        """The template's own text, for conversations with tools; "" without one.

        Raises:
            ConfigError: there are several and none is the default.
        """
        return self._source(with_tools=True) if self.exists else ""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The text of a conversation, with the beginning of the next answer.

        Args:
            tools: functions that the model may call, each as JSON schema.
            variables: more that the template may ask for, such as `enable_thinking`.
            continue_final_message: the text ends where the last message's content does, and the
                answer continues it.

        Raises:
            ConfigError: the template refuses the conversation, is damaged, exceeds its limits, or
                does not show the message that is to be continued.
        """
        special = getattr(self._tokenizer, "special_tokens_map", {})
        # Unguessable: no message can hold it.
        end = secrets.token_hex(16) if continue_final_message else ""
        if end:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": f"{last.get('content') or ''}{end}"}]
        values = {
            **{name: str(value) for name, value in special.items() if not isinstance(value, list)},
            **(variables or {}),
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not end,
        }
        with self._lock:
            found = self._ask({"template": self._source(bool(tools)), "variables": values})
        if "text" not in found:
            raise ConfigError(self._reason(found))
        return _before(found["text"], end) if end else found["text"]

    def close(self) -> None:
        """End the process. A later rendering starts another."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _source(self, with_tools: bool) -> str:
        template = self._tokenizer.chat_template
        if isinstance(template, Mapping):
            named = template.get("tool_use") if with_tools else None
            template = template.get("default") if named is None else named
        if not isinstance(template, str):
            raise ConfigError(
                "the tokenizer has several chat templates and none of them is called default"
            )
        return template

    def _ask(self, request: dict[str, Any]) -> dict[str, str]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            found: dict[str, str] = json.loads(line)
        except (OSError, ValueError):
            # Ended by the system: by its alarm clock, or for memory.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            late = process.returncode == -signal.SIGALRM
            self.close()
            return {"kind": "late" if late else "memory", "error": ""}
        except BaseException:
            # Ctrl-C: what it is still writing would be taken for the next answer.
            self.close()
            raise
        return found

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            limits = str(self._seconds), str(self._nbytes)
            self._process = subprocess.Popen(
                # Isolated: neither the working directory nor the environment adds modules.
                [sys.executable, "-I", str(Path(template_worker.__file__)), *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",
                start_new_session=True,  # Ctrl-C is for the conversation
            )
            weakref.finalize(self, _end, self._process)
        return self._process

    def _reason(self, found: Mapping[str, str]) -> str:
        error = " ".join(found["error"].split())[:500]
        return {
            "refused": f"the model's chat template refuses the conversation: {error}",
            "syntax": f"the model's chat template is damaged: {error}",
            "failed": f"the model's chat template failed: {error}",
            "long": f"the model's chat template makes {error} characters of the conversation, and "
            f"at most {template_worker.MAX_CHARACTERS} are allowed",
            "late": f"the model's chat template takes more than the {self._seconds} seconds that "
            "it may take: it may loop for ever",
            "memory": "the model's chat template takes more than the "
            f"{self._nbytes >> 20} MiB of memory that it may take",
        }[found["kind"]]


def _before(text: str, end: str) -> str:
    place = text.rfind(end)
    if place < 0:
        raise ConfigError(
            "the model's chat template does not show the last message as it is: it cannot be "
            "continued"
        )
    return text[:place]


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
