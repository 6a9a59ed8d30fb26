/* Products of a row, or of a few.
 *
 * One row's product is bound by memory. The processor's own prefetching stops at every page of
 * 4 KiB and hardly gets going, as ggml's loop takes less than 100 ns for a row of weights. So each
 * row's bytes are asked for AHEAD bytes before they are used, across the ends of rows:
 *
 *     weights   | row r | row r+1 | row r+2 | row r+3 | ...
 *                 used now            ^ asked for now
 */
#include <string.h>

#include "native.h"

#define LINE 64

typedef struct {
    void (*convert)(const float *from, void *to, int64_t count);
    const float *x;
    int64_t x_stride; /* values */
    char *out;
    int64_t out_stride; /* bytes */
    int64_t rows, columns;
} Conversion;

PORTABLE static int is_finite(const float *x, int64_t count)
{
    int32_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        found |= (bits & 0x7f800000) == 0x7f800000;
    }
    return !found;
}

/* A chunk is a row. What holds NaN or infinity gets a block with the scale NaN, whether that is a
 * float or a half: rounding to integers would make ordinary numbers of it.
 */
void convert(const void *data, int64_t row)
{
    const Conversion *c = data;
    const float *x = c->x + row * c->x_stride;
    char *out = c->out + row * c->out_stride;
    const uint32_t nan = 0x7fc07e00;
    c->convert(x, out, c->columns);
    if (!is_finite(x, c->columns))
        memcpy(out, &nan, sizeof nan);
}

#define MOST_VALUES 4096 /* at a time; a multiple of every type's block */

/* Without ggml's dot for the type, where that computes wrongly: x is left as it is. */
PORTABLE static float plain_dot(const Kind *kind, int64_t columns, const char *weights,
                                const float *x)
{
    float values[MOST_VALUES];
    double sum = 0;
    for (int64_t from = 0; from < columns; from += MOST_VALUES) {
        const int64_t count = least(columns - from, MOST_VALUES);
        const char *part = weights + row_bytes(kind, from);
        if (kind->dequantise != NULL)
            kind->dequantise(part, values, count);
        else
            memcpy(values, part, count * sizeof *values);
        for (int64_t i = 0; i < count; i++)
            sum += (double)values[i] * x[from + i];
    }
    return (float)sum;
}

void row_products(const void *data, int64_t chunk)
{
    const Product *p = product_of(data, chunk);
    const int64_t from = (chunk - p->first_chunk) * p->chunk_rows;
    const int64_t to = least(from + p->chunk_rows, p->count);
    const int64_t bytes = row_bytes(p->kind, p->columns);
    const char *first = p->weights + from * p->weights_stride;
    for (int64_t at = 0; at < AHEAD; at += LINE)
        __builtin_prefetch(first + at);
    if (p->kind->dots != NULL && p->rows == 1) {
        p->kind->dots(to - from, p->columns, p->out + from, first, p->weights_stride, p->x);
        return;
    }
    for (int64_t row = from; row < to; row++) {
        const char *weights = p->weights + row * p->weights_stride;
        /* Beyond the matrix nothing happens: it is only a hint. */
        for (int64_t at = 0; at < bytes; at += LINE)
            __builtin_prefetch(weights + AHEAD + at);
        for (int64_t t = 0; t < p->rows; t++) {
            const char *x = p->x + t * p->x_stride;
            float *out = p->out + t * p->out_stride + row;
            if (p->kind->dot != NULL)
                p->kind->dot((int)p->columns, out, 0, weights, 0, x, 0, 1);
            else
                *out = plain_dot(p->kind, p->columns, weights, (const float *)x);
        }
    }
}

typedef struct {
    const int32_t *ids;        /* [K]; in range */
    const uint64_t *addresses; /* [E]: of the experts' matrices */
    Product *products;         /* [K] */
    int64_t count;
} Pointing;

/* Let each of K products read the matrix of its expert. */
void point(const void *data, int64_t chunk)
{
    const Pointing *p = data;
    (void)chunk;
    for (int64_t k = 0; k < p->count; k++)
        p->products[k].weights = (const char *)(uintptr_t)p->addresses[p->ids[k]];
}
