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

INLINE float sum_of(const Lanes *x)
{
    float parts[LANES];
    memcpy(parts, x, sizeof parts);
    for (int i = 0; i < 8; i++)
        parts[i] += parts[i + 8];
    for (int i = 0; i < 4; i++)
        parts[i] += parts[i + 4];
    return (parts[0] + parts[2]) + (parts[1] + parts[3]);
}

#define HEADS 4 /* at a time, for which a key or value is read once */

/* scores [HEADS, MOST_BLOCK], at one token: the products of queries [HEADS, D] and its key. */
INLINE void score(const Attention *a, const float *query, int64_t heads, const float *key,
                         float *scores)
{
    Lanes sums[HEADS] = {0};
    int64_t i = 0;
    for (; i + LANES <= a->width; i += LANES) {
        const Lanes k = AT(key + i);
        for (int h = 0; h < HEADS; h++)
            sums[h] += AT(query + (h < heads ? h : 0) * a->width + i) * k;
    }
    for (int64_t h = 0; h < heads; h++) {
        float sum = sum_of(&sums[h]);
        for (int64_t rest = i; rest < a->width; rest++)
            sum += query[h * a->width + rest] * key[rest];
        scores[h * MOST_BLOCK] = sum * a->scaling;
    }
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
        for (int64_t t = 0; t < count; t++)
            score(a, query + first * a->width, heads, keys + t * a->key_stride, scores + t);
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
