"""Addresses of C functions, see native.h."""

run_graphs: int
convert: int
row_products: int
point: int
to_tiles: int
tile_products: int
rms_norm: int
add: int
multiply: int
silu: int
silu_multiply: int
look_up: int
weighted_sum: int
append: int
attend_block: int
merge_blocks: int
rotate: int
choose: int
note_time: int
dots_q8_0: int
dots_q5_0: int
dots_q4_k: int
dots_q6_k: int
panel_q8_0: int
panel_q5_0: int
panel_q4_k: int
panel_q5_k: int
panel_q6_k: int

layout: int
"""A number that is that of `kernels.LAYOUT` if both were made for each other."""

tiles: int
"""How this processor multiplies many rows: 0 not at all, 1 by AVX-512's bfloat16, 2 by AMX."""

vnni: int
"""Whether it has AVX-512's products of bytes, which `dots_q8_0` and its like need."""
