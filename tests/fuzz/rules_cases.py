"""Damaged and hostile rules files, explained and, where they are accepted, used for an answer."""

from __future__ import annotations

import importlib.resources
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from hybrimoe_plugin.cli.main import main
from tests.fuzz.models import Chat

_EXPERTS = r"^model\.layers\.\d+\.mlp\.experts$"
_PATTERNS = (
    _EXPERTS,
    r"mlp\.experts$",
    ".*",
    ".",
    "",
    "(",
    "^lm_head$",
    "embed_tokens$",
    r"layers\.0\.",
    r"layers\.\d$",
    "self_attn$",
    "mlp$",
    "norm$",
    "(a+)+$",
    r"^([a-z.0-9_]+)+X$",
    "(.*)*(.*)*(.*)*!$",
    "^(([a-z]|[a-z.])+)+!$",
    "(?<=a+)b",
    "(?i)EXPERTS",
    "a{99999999999}",
    "(?i)" + r"[\x01-\U0010ffff]" * 50,
    "(" * 90 + "a{1,60000}" + "){1,60000}" * 90,
    "(" * 3000 + ")" * 3000,
    "a|" * 30_000,
    "\\",
)
_OPERATORS = tuple(
    f"hybrimoe_plugin.operators.{name}"
    for name in (
        "experts.HybriMoEExperts",
        "linear.QuantizedLinear",
        "linear.GgmlLinear",
        "embedding.QuantizedEmbedding",
        "norm.FusedRMSNorm",
        "attention.FusedAttention",
        "mla.FusedMLA",
        "mlp.FusedMLP",
        "graphs.GraphedLayer",
        "device_linear.DeviceLinear",
    )
)
_CLASSES = (
    *_OPERATORS,
    "default",
    "torch.nn.Identity",
    "torch.nn.Linear",
    "torch.nn.ModuleDict",
    "torch.nn.LazyLinear",
    "torch.nn.modules.module.os.system",
    "torch.load",
    "torch.nn..Linear",
    "torch.nn.",
    "os.system",
    "builtins.eval",
    "transformers.pipeline",
    "transformers.PreTrainedModel",
    "transformers.models.mixtral.modeling_mixtral.MixtralExperts",
    "lever_ext.operators.experts.FlashExperts",
    "hybrimoe_plugin.cli.main.main",
    "antigravity.x",
    "a" * 70_000 + ".b",
    "hybrimoe_plugin . x",
)
_KWARGS = (
    "cache_ratio",
    "cache_bytes",
    "cpu_threads",
    "look_ahead",
    "mrs_p",
    "context",
    "profile",
    "scheduler",
    "cpu_backend",
    "weights",
    "dense",
    "linears",
    "accelerator",
    "kernels",
    "activations",
    "prefill_device",
    "generate_device",
    "no_such",
    "key",
    "self",
    "__class__",
)
_VALUES = (
    *(
        "0",
        "1",
        "-1",
        "2",
        "0.5",
        ".nan",
        ".inf",
        "1e-320",
        "1e999",
        "true",
        "~",
        "''",
        "[]",
        "{}",
        "'a'",
        "auto",
    ),
    *(
        "cpu",
        "meta",
        "'cuda:99'",
        "emulated",
        "none",
        "mapped",
        "memory",
        "torch",
        "kt",
        "ggml",
        "plain",
        "static",
    ),
    *(
        "'1XB'",
        "99999999999999999999999",
        "'/etc/passwd'",
        "/dev/zero",
        "2001-01-01",
        "0o17",
        "190:20:30",
        "1_000",
    ),
    *(
        "!!int x",
        "!!float abc",
        "!!binary aGk=",
        "!!python/name:os.system",
        "!x 1",
        "'\\ud800'",
        '"\\ud800"',
        '"\\0"',
    ),
    *(
        "1" + ":1" * 50_000,
        "9" * 50_000,
        "0x" + "f" * 50_000,
        "&a [*a]",
        "*undefined",
        "[" * 3000 + "]" * 3000,
    ),
)
_FITTING = (
    (r"^model\.layers\.\d+\.mlp\.experts$", _OPERATORS[0]),
    (r"^model\.layers\.0\.mlp\.experts$", _OPERATORS[0]),
    ("^lm_head$", "hybrimoe_plugin.operators.linear.QuantizedLinear"),
    (r"embed_tokens$", "hybrimoe_plugin.operators.embedding.QuantizedEmbedding"),
    (r"norm$", "hybrimoe_plugin.operators.norm.FusedRMSNorm"),
    (r"self_attn$", "hybrimoe_plugin.operators.attention.FusedAttention"),
    (r"layers\.\d+$", "hybrimoe_plugin.decode.graphed_layer.GraphedLayer"),
    (".", "default"),
)
_SETTINGS = (
    *(("cache_ratio", value) for value in ("0", "0.5", "1")),
    *(("accelerator", value) for value in ("none", "emulated")),
    *(("cpu_backend", value) for value in ("torch", "ggml", "kt")),
    *(("weights", value) for value in ("mapped", "memory")),
    *(("cpu_threads", value) for value in ("1", "99")),
    *(("dense", value) for value in ("plain", "quantised", "dequantised")),
    *(("linears", value) for value in ("plain", "quantised")),
    *(("generate_device", value) for value in ("cpu", "'cuda:0'", "auto")),
    ("profile", "/dev/zero"),
)
_BOMB = "&a0 [x,x,x,x,x,x,x,x,x], " + ", ".join(
    f"&a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 8)
)
_WHOLE = (
    "",
    "~",
    "[]",
    "a: 1",
    "- a",
    "- *x",
    ": : :",
    "- a\0b",
    "-\tmatch:",
    "%YAML 9.9\n---\n- a",
    "- " * 20_000 + "a",
    "? " * 10_000 + "a",
    "#" + "x" * 300_000,
    "[" + "1," * 100_000 + "1]",
    f"[{_BOMB}]",
    "&a [*a]",
    "- &r\n  match: *r\n  replace: *r",
    "- !!python/object/apply:os.system ['true']",
)


def cases(
    rng: random.Random, folder: Path, models: dict[str, Path]
) -> Iterator[tuple[str, Callable[[], int | None]]]:
    """(what was done, a call that tries it), without end."""
    packaged = (
        importlib.resources.files("optimize_rules").joinpath("Mixtral.yaml").read_text("utf-8")
    )
    path, weights = folder / "rules.yaml", str(models["mixtral"])
    makers = (
        _made,
        _made,
        _made,
        _whole,
        lambda rng: _hurt(rng, packaged),
        lambda rng: _mixed(rng, packaged),
    )
    while True:
        text = rng.choice(makers)(rng)
        raw = text.encode("utf-16" if rng.random() < 0.01 else "utf-8", "surrogatepass")
        path.write_bytes(raw)

        def use() -> int:
            code = main(["explain", str(path), "--gguf_path", weights])
            return code or Chat("--gguf_path", weights, "--optimize_config_path", str(path))()

        yield raw[:300].decode("utf-8", "replace").replace("\n", "\\n"), use


def _sound(rng: random.Random) -> str:
    """A rule that fits the model, with settings that may not."""
    pattern, operator = rng.choice(_FITTING)
    name, value = rng.choice(_SETTINGS)
    given = f"    kwargs: {{{name}: {value}}}\n" if rng.random() < 0.6 else ""
    return f"- match:\n    name: '{pattern}'\n  replace:\n    class: {operator}\n{given}"


def _rule(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return _sound(rng)
    lines = ["- match:"]
    if rng.random() < 0.85:
        lines.append("    name: '" + rng.choice(_PATTERNS).replace("'", "''") + "'")
    if rng.random() < 0.3:
        lines.append(f"    class: {rng.choice(_CLASSES)}")
    lines += [
        "  replace:",
        f"    class: {rng.choice(_CLASSES if rng.random() < 0.5 else _OPERATORS)}",
    ]
    if rng.random() < 0.6:
        given = ", ".join(
            f"{rng.choice(_KWARGS)}: {rng.choice(_VALUES)}" for _ in range(rng.randrange(3))
        )
        lines.append(f"    kwargs: {{{given}}}")
    if rng.random() < 0.2:
        lines.append(f"  recursive: {rng.choice(('True', 'False', 'no', '0', '[]'))}")
    return "\n".join(lines) + "\n"


def _made(rng: random.Random) -> str:
    return "".join(_rule(rng) for _ in range(rng.choice((1, 1, 2, 4))))


def _mixed(rng: random.Random, packaged: str) -> str:
    parts = [packaged, _rule(rng)]
    rng.shuffle(parts)
    return "\n".join(parts)


def _whole(rng: random.Random) -> str:
    return rng.choice(_WHOLE)


def _hurt(rng: random.Random, packaged: str) -> str:
    """Lines of a sound file left out, doubled or moved, or characters changed."""
    lines = packaged.splitlines()
    for _ in range(rng.choice((1, 1, 3))):
        place, action = rng.randrange(len(lines)), rng.randrange(4)
        if action == 0 and len(lines) > 1:
            del lines[place]
        elif action == 1:
            lines.insert(place, rng.choice(lines))
        elif action == 2:
            lines[place] = " " * rng.randrange(4) + lines[place]
        elif lines[place]:
            at = rng.randrange(len(lines[place]))
            lines[place] = (
                lines[place][:at]
                + rng.choice("'\"{}[]:,&*!|>%@`\\\t#-?x\0é")
                + lines[place][at + 1 :]
            )
    return "\n".join(lines)
