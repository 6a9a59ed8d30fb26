/* Operations on float32 activations and quantised weights, and the team of threads that runs them.
 *
 * A graph is an array of operations. Each is done chunk by chunk, by whichever thread is free, and
 * the next one begins when all chunks are done. Python builds the array and owns all memory: see
 * structures.py, which declares the same structures.
 */
#ifndef HYBRIMOE_NATIVE_H
#define HYBRIMOE_NATIVE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* Whoever changes a structure or a function that Python calls gives this the next number, here and in
 * kernels.py: a checkout may still hold what was compiled from older sources, which is then not used.
 */
#define LAYOUT 1

typedef struct {
    void (*run)(const void *data, int64_t chunk);
    int64_t chunks;
    const void *data; /* what `run` takes */
} Operation;

typedef struct {
    const Operation *operations;
    int64_t count;
} Graph;

/* team.c: one after the other; gives 0, or -1 if one of them is too large. */
int run_graphs(const Graph *graphs, int64_t count, int64_t threads);

/* ggml's own arithmetic for a type of weights, which is used as it is. */
typedef struct {
    void (*dot)(int count, float *out, size_t out_stride, const void *weights,
                size_t weights_stride, const void *x, size_t x_stride, int rows); /* or NULL */
    void (*dequantise)(const void *from, float *to, int64_t count); /* NULL for float weights */
    /* Our own for many rows of weights; NULL where there is none. */
    void (*dots)(int64_t rows, int64_t count, float *out, const char *weights, int64_t stride,
                 const char *x);
    /* Our own for a row of weights in bfloat16; NULL where there is none. */
    void (*panel)(const char *row, int64_t count, uint16_t *out);
    int64_t block, block_bytes; /* values and bytes of a block */
} Kind;

static inline int64_t row_bytes(const Kind *kind, int64_t columns)
{
    return columns / kind->block * kind->block_bytes;
}

/* One matrix times some rows: out [T, N] = x [T, M] times weights [N, M]. */
typedef struct {
    const Kind *kind;
    const char *weights;
    int64_t weights_stride; /* bytes from one row to the next */
    const char *x;          /* rows as the type's dot takes them, or tiles */
    int64_t x_stride;       /* bytes from one row of x, or block of 16 rows, to the next */
    float *out;
    int64_t out_stride;  /* values */
    int64_t rows;        /* T */
    int64_t count;       /* N */
    int64_t columns;     /* M */
    int64_t first_chunk; /* of those of all products of the operation */
    int64_t chunk_rows;  /* rows of weights of a chunk */
} Product;

typedef struct {
    const Product *products;
    int64_t count;
} Products;

static inline int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The product that a chunk belongs to. */
static inline const Product *product_of(const Products *all, int64_t chunk)
{
    int64_t low = 0, high = all->count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (all->products[middle].first_chunk <= chunk)
            low = middle;
        else
            high = middle;
    }
    return all->products + low;
}

/* Plain loops, compiled for several processors; the loader picks one. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PORTABLE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PORTABLE
#endif
/* Into each of them. */
#define INLINE static inline __attribute__((always_inline))

/* exp(x) for x <= 0, to 2 units in the last place: 2^n times a polynomial in what is left. */
INLINE float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x;
    const float shift = 12582912.0f; /* adding it rounds to a whole number */
    const float whole = (x * 1.44269504f + shift) - shift;
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    union {
        int32_t bits;
        float value;
    } two = {((int32_t)whole + 127) << 23};
    return power * two.value;
}

/* rows.c */
void convert(const void *data, int64_t chunk);
void row_products(const void *data, int64_t chunk);
void point(const void *data, int64_t chunk);

/* tiles.c */
int tiles_kind(void);
void to_tiles(const void *data, int64_t chunk);
void tile_products(const void *data, int64_t chunk);

/* simple.c */
void rms_norm(const void *data, int64_t chunk);
void add(const void *data, int64_t chunk);
void multiply(const void *data, int64_t chunk);
void silu(const void *data, int64_t chunk);
void silu_multiply(const void *data, int64_t chunk);
void look_up(const void *data, int64_t chunk);
void weighted_sum(const void *data, int64_t chunk);
void choose(const void *data, int64_t chunk);
void note_time(const void *data, int64_t chunk);

/* attention.c */
void append(const void *data, int64_t chunk);
void attend_block(const void *data, int64_t chunk);
void merge_blocks(const void *data, int64_t head);
void rotate(const void *data, int64_t head);

/* dots.c: rows of weights, apart by the stride, with a row of x */
#define AHEAD 3072 /* bytes; see rows.c */
int has_vnni(void);
void dots_q8_0(int64_t rows, int64_t count, float *out, const char *weights, int64_t stride,
               const char *x);
void dots_q5_0(int64_t rows, int64_t count, float *out, const char *weights, int64_t stride,
               const char *x);
void dots_q4_k(int64_t rows, int64_t count, float *out, const char *weights, int64_t stride,
               const char *x);
void dots_q6_k(int64_t rows, int64_t count, float *out, const char *weights, int64_t stride,
               const char *x);

/* panels.c: for processors with tiles */
void panel_q8_0(const char *row, int64_t count, uint16_t *out);
void panel_q5_0(const char *row, int64_t count, uint16_t *out);
void panel_q4_k(const char *row, int64_t count, uint16_t *out);
void panel_q5_k(const char *row, int64_t count, uint16_t *out);
void panel_q6_k(const char *row, int64_t count, uint16_t *out);

#endif
