"""The demo model as a model directory that classic kTransformers reads, in the old formats."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from hybrimoe_plugin.cache_folder import folders, found, place_for
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.ktransformers.release import default_command
from hybrimoe_plugin.weights.gguf_store import GGUFStore

_NBYTES = 16 << 20
"""Room for the files of the directory, the link aside."""
_CONTROL = 3
"""GGUF's token type of special tokens."""


def classic_folder(form: str) -> Path:
    """The directory, made on first use; it holds a link to the demo model's GGUF.

    Run this where classic kTransformers is installed: a tokenizer file is of the version that wrote
    it.

    Raises:
        WeightsError: the demo model is not built yet.
        ConfigError: there is no place for the directory.
    """
    weights = _weights(form)
    tokenizers = metadata.version("tokenizers").rpartition(".")[0]
    name = f"demo/classic-{weights.stem}-tokenizers-{tokenizers}"
    link = found(f"{name}/{weights.name}")
    if link is not None and link.resolve() == weights.resolve():
        return link.parent
    folder = place_for(name, _NBYTES)
    store = GGUFStore.open(weights)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-"))
    try:
        for name, values in _files(store, form).items():
            (fresh / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
        tokenizer(store).save(str(fresh / "tokenizer.json"))
        (fresh / weights.name).symlink_to(weights.resolve())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return folder


def _weights(form: str) -> Path:
    """The newest demo model of this form; it is the default environment that builds it."""
    built = [
        path
        for folder in folders()
        for path in (folder / "demo").glob(f"SmolLM2-135M-{form}-v*-Q8_0.gguf")
    ]
    if not built:
        raise WeightsError(
            "the demo model is not there, and only the default host's environment can build it: "
            f"{default_command()} demo_model --form {form}"
        )
    return max(built, key=lambda path: int(path.name.split("-v")[1].split("-")[0]))


def _files(store: GGUFStore, form: str) -> dict[str, dict[str, Any]]:
    """File name -> content: config, tokenizer's and generation's settings."""
    tokens = store.metadata["tokenizer.ggml.tokens"]
    ids = {
        name: store.metadata.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos", "padding")
    }
    special = {name: tokens[index] for name, index in ids.items() if index is not None}
    ends = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    return {
        "config.json": {**_config(store, form), **ends},
        "generation_config.json": {"_from_model_config": True, **ends},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": store.metadata["tokenizer.chat_template"],
            "bos_token": special.get("bos"),
            "eos_token": special.get("eos"),
            "pad_token": special.get("padding"),
            "clean_up_tokenization_spaces": False,
        },
    }


def _config(store: GGUFStore, form: str) -> dict[str, Any]:
    arch = store.architecture
    facts = {
        key.removeprefix(f"{arch}."): value
        for key, value in store.metadata.items()
        if key.startswith(f"{arch}.")
    }
    values = {
        "hidden_size": facts["embedding_length"],
        "num_hidden_layers": facts["block_count"],
        "num_attention_heads": facts["attention.head_count"],
        "num_key_value_heads": facts["attention.head_count_kv"],
        "intermediate_size": facts["feed_forward_length"],
        "vocab_size": store.info("token_embd.weight").shape[0],
        "max_position_embeddings": facts["context_length"],
        "rms_norm_eps": facts["attention.layer_norm_rms_epsilon"],
        "rope_theta": facts["rope.freq_base"],
        "num_experts_per_tok": facts["expert_used_count"],
        "tie_word_embeddings": "output.weight" not in store.tensors,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    if form == "mixtral":
        own = {"num_local_experts": facts["expert_count"], "sliding_window": None}
        return {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **values, **own}
    own = {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts["expert_feed_forward_length"],
        "shared_expert_intermediate_size": facts["expert_shared_feed_forward_length"],
        "norm_topk_prob": facts["expert_weights_norm"],
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
    }
    return {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], **values, **own}


def tokenizer(store: GGUFStore) -> Any:
    """The demo model's `tokenizers.Tokenizer`: byte-level BPE that splits numbers into digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = store.metadata["tokenizer.ggml.tokens"]
    kinds = store.metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in store.metadata["tokenizer.ggml.merges"]]
    built = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    built.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return built
