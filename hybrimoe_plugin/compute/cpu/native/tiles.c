/* Products of many rows, in bfloat16 with float sums: by AMX, or by AVX-512's products of pairs.
 *
 * Weights stay quantised in memory. A panel of 32 of their rows at a time is written out in
 * bfloat16, into the second-level cache, and multiplied by all rows of x:
 *
 *      panel [32, M]         x^T [M, T]            sums [32, T]
 *      | 16 x 32 | ...   x   | 32 x 16 | ...   =   | 16 x 16 | ...     of which out [T, N] has the
 *      | 16 x 32 |                                 | 16 x 16 |         transposed
 *
 * x is brought into the order that tiles want once, by `to_tiles`: blocks of 16 rows, in each block
 * a tile for every 32 columns, and in a tile 16 pairs of columns with one pair for each of the
 * rows.
 */
#define _GNU_SOURCE
#include "native.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16          /* rows of a tile */
#define DEPTH 32         /* columns of a tile */
#define PANEL 32         /* rows of weights at a time */
#define MOST_COLUMNS 4096 /* of a panel, so that it stays in the cache */
#define ROWS_AHEAD 4      /* of weights, that are asked for before they are needed */
#define MOST_ROWS 512     /* of x at a time */

#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define WITH_AMX \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

typedef uint16_t BFloat;

enum { NONE, PAIRS, AMX };

/* Which of the two this processor has, and this process may use. */
int tiles_kind(void)
{
    static int found = -1;
    if (found >= 0)
        return found;
    __builtin_cpu_init();
    int kind = NONE;
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        kind = PAIRS;
    if (kind == PAIRS && __builtin_cpu_supports("amx-bf16")) {
        const long request = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM */
        if (syscall(SYS_arch_prctl, request, tile_data) == 0)
            kind = AMX;
    }
    return found = kind;
}

/* 16 x 16 values of 4 bytes. */
WITH_AVX512 static inline void transpose(__m512i r[16])
{
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* 32 values as bfloat16, of which `_mm512_cvtne2ps_pbh` takes the upper half first. */
WITH_AVX512 static inline __m512i rounded(const float *x)
{
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
}

typedef struct {
    const float *x;
    int64_t x_stride;      /* values */
    const int64_t *places; /* of the rows in x; NULL where they lie there in their order */
    const int64_t *firsts; /* of each block, its first row; NULL for blocks of 16 one by one */
    const int64_t *counts; /* and how many it has */
    char *out;
    int64_t rows, columns;
} Tiling;

/* A chunk is a block of 16 rows of x [T, M], which become M / 32 tiles. Missing rows are 0. */
WITH_AVX512 void to_tiles(const void *data, int64_t block)
{
    const Tiling *t = data;
    const int64_t first = t->firsts ? t->firsts[block] : block * TILE;
    const int64_t count = t->counts ? t->counts[block] : least(t->rows - first, TILE);
    const float *rows[TILE];
    for (int64_t i = 0; i < count; i++)
        rows[i] = t->x + (t->places ? t->places[first + i] : first + i) * t->x_stride;
    char *tile = t->out + block * TILE * t->columns * sizeof(BFloat);
    for (int64_t column = 0; column < t->columns; column += DEPTH) {
        __m512i r[TILE];
        for (int i = 0; i < TILE; i++)
            r[i] = i < count ? rounded(rows[i] + column) : _mm512_setzero_si512();
        transpose(r);
        for (int i = 0; i < TILE; i++, tile += 64)
            _mm512_storeu_si512(tile, r[i]);
    }
}

/* A row of weights as bfloat16. */
WITH_AVX512 static void write_out(const Kind *kind, const char *row, int64_t count, BFloat *out)
{
    float values[MOST_COLUMNS] __attribute__((aligned(64)));
    const float *from = (const float *)row;
    if (kind->panel != NULL) {
        kind->panel(row, count, out);
        return;
    }
    if (kind->dequantise != NULL) {
        kind->dequantise(row, values, count);
        from = values;
    }
    for (int64_t i = 0; i < count; i += DEPTH)
        _mm512_storeu_si512(out + i, rounded(from + i));
}

/* sums [32, T] (+)= panel [32, M] x^T, for one or two blocks of 16 rows of x.
 *
 * first: whether the sums begin here. stride: values from one row of the panel to the next.
 */
WITH_AMX static void multiply_amx(const BFloat *panel, int64_t stride, const char *x,
                                  int64_t x_block, int64_t blocks, int64_t depths, int first,
                                  float *sums)
{
    const int64_t line = MOST_ROWS * sizeof(float), half = TILE * MOST_ROWS;
    const int64_t row = stride * sizeof(BFloat);
    const int two = blocks > 1;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, line);
        _tile_loadd(1, sums + half, line);
        if (two) {
            _tile_loadd(2, sums + TILE, line);
            _tile_loadd(3, sums + half + TILE, line);
        }
    }
    for (int64_t depth = 0; depth < depths; depth++) {
        _tile_loadd(4, panel + depth * DEPTH, row);
        _tile_loadd(5, panel + TILE * stride + depth * DEPTH, row);
        _tile_loadd(6, x + depth * 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (two) {
            _tile_loadd(7, x + x_block + depth * 1024, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, line);
    _tile_stored(1, sums + half, line);
    if (two) {
        _tile_stored(2, sums + TILE, line);
        _tile_stored(3, sums + half + TILE, line);
    }
}

/* The same without AMX. */
WITH_AVX512 static void multiply_pairs(const BFloat *panel, int64_t stride, const char *x,
                                       int64_t x_block, int64_t blocks, int64_t depths, int first,
                                       float *sums)
{
    const int group = 8;
    for (int64_t n = 0; n < PANEL; n += group) {
        __m512 sum[2][8];
        for (int i = 0; i < group; i++)
            for (int64_t m = 0; m < 2; m++)
                sum[m][i] = first || m >= blocks
                                ? _mm512_setzero_ps()
                                : _mm512_loadu_ps(sums + (n + i) * MOST_ROWS + m * TILE);
        for (int64_t pair = 0; pair < depths * TILE; pair++) {
            const __m512bh x0 = (__m512bh)_mm512_loadu_si512(x + pair * 64);
            const __m512bh x1 =
                (__m512bh)_mm512_loadu_si512(x + (blocks > 1 ? x_block : 0) + pair * 64);
            for (int i = 0; i < group; i++) {
                int32_t two;
                memcpy(&two, panel + (n + i) * stride + 2 * pair, sizeof two);
                const __m512bh w = (__m512bh)_mm512_set1_epi32(two);
                sum[0][i] = _mm512_dpbf16_ps(sum[0][i], w, x0);
                sum[1][i] = _mm512_dpbf16_ps(sum[1][i], w, x1);
            }
        }
        for (int i = 0; i < group; i++)
            for (int64_t m = 0; m < blocks; m++)
                _mm512_storeu_ps(sums + (n + i) * MOST_ROWS + m * TILE, sum[m][i]);
    }
}

/* out [T, N] = the transposed of sums [N, T], N <= 32. */
WITH_AVX512 static void give(const float *sums, int64_t rows, float *out, int64_t stride,
                             int64_t columns)
{
    for (int64_t n = 0; n < columns; n += TILE) {
        const __mmask16 mask = columns - n >= TILE ? 0xffff : (1u << (columns - n)) - 1;
        for (int64_t m = 0; m < rows; m += TILE) {
            __m512i r[TILE];
            for (int i = 0; i < TILE; i++)
                r[i] = _mm512_loadu_si512(sums + (n + i) * MOST_ROWS + m);
            transpose(r);
            for (int64_t i = 0; i < least(TILE, rows - m); i++)
                _mm512_mask_storeu_ps(out + (m + i) * stride + n, mask, (__m512)r[i]);
        }
    }
}

static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TILES = {
    .palette = 1,
    .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE},
};

WITH_AMX static void configure(void)
{
    _tile_loadconfig(&TILES);
}

WITH_AMX static void release(void)
{
    _tile_release();
}

/* Ask for a row that is needed soon; see rows.c. */
static inline void ask_for(const char *row, int64_t bytes)
{
    for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch(row + at);
}

/* A chunk is a panel of 32 rows of weights, by all rows of x. */
void tile_products(const void *data, int64_t chunk)
{
    const Product *p = product_of(data, chunk);
    BFloat panel[PANEL * (MOST_COLUMNS + DEPTH)] __attribute__((aligned(64)));
    float sums[PANEL * MOST_ROWS] __attribute__((aligned(64)));
    const int64_t first = (chunk - p->first_chunk) * PANEL;
    const int64_t count = least(p->count - first, PANEL);
    const int64_t most = least(p->columns, MOST_COLUMNS);
    const int64_t stride = most + DEPTH; /* a power of 2 would use few of the cache's sets */
    const char *weights = p->weights + first * p->weights_stride;
    const int64_t bytes = row_bytes(p->kind, p->columns);
    const int amx = tiles_kind() == AMX;
    if (amx)
        configure();
    if (count < PANEL)
        memset(panel, 0, sizeof panel);
    for (int64_t top = 0; top < p->rows; top += MOST_ROWS) {
        const int64_t rows = least(p->rows - top, MOST_ROWS);
        for (int64_t from = 0; from < p->columns; from += most) {
            const int64_t depth = least(p->columns - from, most);
            if (top == 0 || p->columns > most)
                for (int64_t n = 0; n < count; n++) {
                    ask_for(weights + (n + ROWS_AHEAD) * p->weights_stride, bytes);
                    write_out(p->kind, weights + n * p->weights_stride + row_bytes(p->kind, from),
                              depth, panel + n * stride);
                }
            for (int64_t m = 0; m < rows; m += 2 * TILE) {
                const char *x = p->x + (top + m) / TILE * p->x_stride + from / DEPTH * 1024;
                (amx ? multiply_amx : multiply_pairs)(panel, stride, x, p->x_stride,
                                                      rows - m > TILE ? 2 : 1, depth / DEPTH,
                                                      from == 0, sums + m);
            }
        }
        give(sums, rows, p->out + top * p->out_stride + first, p->out_stride, count);
    }
    if (amx)
        release();
}

#else

int tiles_kind(void)
{
    return 0;
}

void to_tiles(const void *data, int64_t block)
{
    (void)data, (void)block;
}

void tile_products(const void *data, int64_t chunk)
{
    (void)data, (void)chunk;
}

#endif
