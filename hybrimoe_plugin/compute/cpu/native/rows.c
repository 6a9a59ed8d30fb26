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

#define AHEAD 3072
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

void row_products(const void *data, int64_t chunk)
{
    const Product *p = product_of(data, chunk);
    const int64_t from = (chunk - p->first_chunk) * p->chunk_rows;
    const int64_t to = least(from + p->chunk_rows, p->count);
    const int64_t bytes = row_bytes(p->kind, p->columns);
    for (int64_t row = from; row < to; row++) {
        const char *weights = p->weights + row * p->weights_stride;
        /* Beyond the matrix nothing happens: it is only a hint. */
        for (int64_t at = 0; at < bytes; at += LINE)
            __builtin_prefetch(weights + AHEAD + at);
        for (int64_t t = 0; t < p->rows; t++)
            p->kind->dot((int)p->columns, p->out + t * p->out_stride + row, 0, weights, 0,
                         p->x + t * p->x_stride, 0, 1);
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
