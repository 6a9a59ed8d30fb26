"""Rules files that are accepted."""

GOOD = r"""
- match:
    name: "^model\\.layers\\.\\d+\\.mlp\\.experts$"
    class: torch.nn.Module
  replace:
    class: hybrimoe_plugin.operators.experts.HybriMoEExperts
    kwargs:
      generate_device: "cuda:0"
      cache_ratio: 0.25
      transfer_map:
        30: "cuda:1"
  recursive: False
- match:
    name: "^model.embed_tokens"
  replace:
    class: default
    kwargs: {generate_device: cpu, prefill_device: cpu}
"""

RULE = "- match: {name: a}\n  replace: {class: default}\n"
