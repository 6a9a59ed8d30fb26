/* Attention of one token over the cache, and its rotary embedding.
 *
 * The cache is cut into blocks of tokens, so that threads have even shares. For each block and each
 * key head, a chunk computes for all query heads of its group
 *
 *     largest score m,   sum of exp(score - m),   sum of exp(score - m) value
 *
 * and `merge_blocks` adds the blocks up, each weighed by exp(m - largest m).
 */
#include <string.h>

#include "native.h"

#define MOST_BLOCK 256 /* tokens */
#define MOST_ASKED 256 /* values of an entry; longer ones the processor finds by itself */

typedef struct {
    const float *query; /* [key heads, group, D] */
    const float *key;   /* [key heads, D], the new token's */
    const float *value; /* [key heads, W] */
    float *keys;        /* the cache: key head, token and values apart by the strides */
    float *values;
    int64_t key_head_stride, key_stride, value_head_stride, value_stride; /* values */
    int64_t held;                /* tokens, without the new one */
    int64_t key_heads, group;    /* query heads of a key head */
    int64_t width, value_width;  /* D, W */
    int64_t block;               /* tokens of a block */
    float *parts;                /* [blocks, key heads, group, W + 2] */
    float *out;                  /* [key heads, group, W] */
    float scaling;
} Attention;

/* Write the new token's entry behind those that are held. */
void append(const void *data, int64_t chunk)
{
    const Attention *a = data;
    (void)chunk;
    for (int64_t head = 0; head < a->key_heads; head++) {
        memcpy(a->keys + head * a->key_head_stride + a->held * a->key_stride,
               a->key + head * a->width, a->width * sizeof(float));
        if (a->value != NULL)
            memcpy(a->values + head * a->value_head_stride + a->held * a->value_stride,
                   a->value + head * a->value_width, a->value_width * sizeof(float));
    }
}

typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
#define LANES 16

#define AT(x) (*(const Lanes *)(x))

typedef int32_t Places __attribute__((vector_size(64)));

/* Lanes of two vectors, each of which is halved by adding neighbours: x's first, then y's. */
INLINE void add_neighbours(const Lanes *x, const Lanes *y, Lanes *out)
{
    const Places even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const Places odd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    *out = __builtin_shuffle(*x, *y, even) + __builtin_shuffle(*x, *y, odd);
}

/* The sums of 16 vectors, in one: vectors are added up in pairs, 16 to 8 to 4 to 2 to 1. */
INLINE void sums_of(Lanes x[LANES], Lanes *out)
{
    for (int left = LANES / 2; left > 0; left /= 2)
        for (int i = 0; i < left; i++)
            add_neighbours(&x[2 * i], &x[2 * i + 1], &x[i]);
    *out = x[0];
}

#define HEADS 4 /* at a time, for which a key or value is read once */

/* scores [16]: the products of a query and the keys of so many tokens; those behind are made up. */
INLINE void score(const Attention *a, const float *query, const float *keys, int64_t tokens,
                  float *scores)
{
    Lanes sums[LANES] = {0}, found;
    const float *rows[LANES];
    int64_t i = 0;
    for (int t = 0; t < LANES; t++)
        rows[t] = keys + least(t, tokens - 1) * a->key_stride;
    for (; i + LANES <= a->width; i += LANES) {
        const Lanes q = AT(query + i);
        for (int t = 0; t < LANES; t++)
            sums[t] += q * AT(rows[t] + i);
    }
    sums_of(sums, &found);
    memcpy(scores, &found, sizeof found);
    for (; i < a->width; i++)
        for (int t = 0; t < LANES; t++)
            scores[t] += query[i] * rows[t][i];
    for (int t = 0; t < LANES; t++)
        scores[t] *= a->scaling;
}

/* Ask for the entries of 16 tokens, one after the other; see rows.c. */
INLINE void ask_for(const float *entries, int64_t stride)
{
    for (int64_t at = 0; at < LANES * stride; at += LANES)
        __builtin_prefetch(entries + at);
}

/* out [HEADS, W], which lie apart by the stride: the sum of the tokens' values by their weights. */
INLINE void add_up(const Attention *a, const float *weights, int64_t heads, int64_t tokens,
                          const float *values, float *out, int64_t stride)
{
    int64_t i = 0;
    for (; i + LANES <= a->value_width; i += LANES) {
        Lanes sums[HEADS] = {0};
        for (int64_t t = 0; t < tokens; t++) {
            const Lanes v = AT(values + t * a->value_stride + i);
            for (int h = 0; h < HEADS; h++)
                sums[h] += weights[h * MOST_BLOCK + t] * v;
        }
        for (int64_t h = 0; h < heads; h++)
            memcpy(out + h * stride + i, &sums[h], sizeof sums[h]);
    }
    for (; i < a->value_width; i++)
        for (int64_t h = 0; h < heads; h++) {
            float sum = 0;
            for (int64_t t = 0; t < tokens; t++)
                sum += weights[h * MOST_BLOCK + t] * values[t * a->value_stride + i];
            out[h * stride + i] = sum;
        }
}

/* A chunk is a block of tokens of a key head. */
PORTABLE void attend_block(const void *data, int64_t chunk)
{
    const Attention *a = data;
    const int64_t head = chunk % a->key_heads, block = chunk / a->key_heads;
    const int64_t from = block * a->block;
    const int64_t count = least(a->block, a->held + 1 - from);
    const float *keys = a->keys + head * a->key_head_stride + from * a->key_stride;
    const float *values = a->values + head * a->value_head_stride + from * a->value_stride;
    const float *query = a->query + head * a->group * a->width;
    const int64_t size = a->value_width + 2;
    float *part = a->parts + (block * a->key_heads + head) * a->group * size;
    float scores[HEADS * MOST_BLOCK];
    memset(scores, 0, sizeof scores); /* heads that a group lacks have weights of 0 */
    for (int64_t first = 0; first < a->group; first += HEADS) {
        const int64_t heads = least(HEADS, a->group - first);
        for (int64_t t = 0; t < count; t += LANES) {
            const float *key = keys + t * a->key_stride;
            if (first == 0 && a->key_stride <= MOST_ASKED) {
                ask_for(key + 2 * LANES * a->key_stride, a->key_stride);
                ask_for(values + t * a->value_stride, a->value_stride);
            }
            for (int64_t h = 0; h < heads; h++)
                score(a, query + (first + h) * a->width, key, count - t,
                      scores + h * MOST_BLOCK + t);
        }
        for (int64_t h = 0; h < heads; h++) {
            float *s = scores + h * MOST_BLOCK, *out = part + (first + h) * size;
            float largest = -INFINITY, sum = 0;
            for (int64_t t = 0; t < count; t++)
                largest = s[t] > largest ? s[t] : largest;
            for (int64_t t = 0; t < count; t++)
                s[t] = exponential(s[t] - largest);
            for (int64_t t = 0; t < count; t++)
                sum += s[t];
            out[0] = largest;
            out[1] = sum;
        }
        add_up(a, scores, heads, count, values, part + first * size + 2, size);
    }
}

/* A chunk is a query head. */
PORTABLE void merge_blocks(const void *data, int64_t head)
{
    const Attention *a = data;
    const int64_t heads = a->key_heads * a->group, size = a->value_width + 2;
    const int64_t blocks = (a->held + a->block) / a->block;
    float *out = a->out + head * a->value_width;
    float largest = -INFINITY, sum = 0;
    for (int64_t b = 0; b < blocks; b++) {
        const float found = a->parts[(b * heads + head) * size];
        largest = found > largest || found != found ? found : largest;
    }
    memset(out, 0, a->value_width * sizeof(float));
    for (int64_t b = 0; b < blocks; b++) {
        const float *part = a->parts + (b * heads + head) * size;
        const float weight = exponential(part[0] - largest);
        sum += weight * part[1];
        for (int64_t i = 0; i < a->value_width; i++)
            out[i] += weight * part[2 + i];
    }
    for (int64_t i = 0; i < a->value_width; i++)
        out[i] /= sum;
}

typedef struct {
    const float *x;
    float *out;
    int64_t x_stride, out_stride; /* values, from one head to the next */
    const int64_t *first, *second; /* [D]: which values of a head make each value of the result */
    const float *by_first, *by_second; /* [D]: and their factors */
    int64_t width;                     /* D */
} Rotation;

/* A chunk is a head. */
PORTABLE void rotate(const void *data, int64_t head)
{
    const Rotation *r = data;
    const float *x = r->x + head * r->x_stride;
    float *out = r->out + head * r->out_stride;
    for (int64_t i = 0; i < r->width; i++)
        out[i] = x[r->first[i]] * r->by_first[i] + x[r->second[i]] * r->by_second[i];
}
