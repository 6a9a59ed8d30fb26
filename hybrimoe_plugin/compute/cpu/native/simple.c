/* Operations without weights, and the look-up. */
#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <time.h>

#include "native.h"

#define LANES 8 /* partial sums that a processor adds at once */

typedef struct {
    float *out;
    const float *x, *y;
    int64_t rows, width;
    int64_t x_stride, y_stride, out_stride; /* values; y's is 0 for one row that all take */
    float number;
} Rows;

static inline const Rows *row_of(const void *data, int64_t row, float **out, const float **x,
                                 const float **y)
{
    const Rows *r = data;
    *out = r->out + row * r->out_stride;
    *x = r->x + row * r->x_stride;
    *y = r->y + row * r->y_stride;
    return r;
}

/* out = x / rms(x) * y */
PORTABLE void rms_norm(const void *data, int64_t row)
{
    float *out;
    const float *x, *y;
    const Rows *r = row_of(data, row, &out, &x, &y);
    double parts[LANES] = {0}, sum = 0;
    int64_t at = 0;
    for (; at + LANES <= r->width; at += LANES)
        for (int lane = 0; lane < LANES; lane++)
            parts[lane] += (double)x[at + lane] * x[at + lane];
    for (; at < r->width; at++)
        sum += (double)x[at] * x[at];
    for (int lane = 0; lane < LANES; lane++)
        sum += parts[lane];
    const float scale = 1.0f / sqrtf((float)(sum / r->width) + r->number);
    for (int64_t i = 0; i < r->width; i++)
        out[i] = x[i] * scale * y[i];
}

PORTABLE void add(const void *data, int64_t row)
{
    float *out;
    const float *x, *y;
    const Rows *r = row_of(data, row, &out, &x, &y);
    for (int64_t i = 0; i < r->width; i++)
        out[i] = x[i] + y[i];
}

PORTABLE void multiply(const void *data, int64_t row)
{
    float *out;
    const float *x, *y;
    const Rows *r = row_of(data, row, &out, &x, &y);
    for (int64_t i = 0; i < r->width; i++)
        out[i] = x[i] * y[i];
}

INLINE float silu_of(float x)
{
    const float power = exponential(x < 0 ? x : -x);
    return x * ((x < 0 ? power : 1.0f) / (1.0f + power));
}

PORTABLE void silu(const void *data, int64_t row)
{
    float *out;
    const float *x, *y;
    const Rows *r = row_of(data, row, &out, &x, &y);
    for (int64_t i = 0; i < r->width; i++)
        out[i] = silu_of(x[i]);
}

/* out = silu(x) * y */
PORTABLE void silu_multiply(const void *data, int64_t row)
{
    float *out;
    const float *x, *y;
    const Rows *r = row_of(data, row, &out, &x, &y);
    for (int64_t i = 0; i < r->width; i++)
        out[i] = silu_of(x[i]) * y[i];
}

typedef struct {
    const Kind *kind;
    const char *weights;
    int64_t weights_stride, columns;
    const int32_t *ids;
    float *out;
} LookUp;

/* A chunk is an id. */
void look_up(const void *data, int64_t id)
{
    const LookUp *l = data;
    const char *row = l->weights + l->ids[id] * l->weights_stride;
    float *out = l->out + id * l->columns;
    if (l->kind->dequantise != NULL) {
        l->kind->dequantise(row, out, l->columns);
        return;
    }
    for (int64_t i = 0; i < l->columns; i++)
        out[i] = ((const float *)row)[i];
}

typedef struct {
    const float *weights; /* [T, K] */
    const float *values;  /* rows of W values */
    const int64_t *places; /* [T, K]: rows of `values` */
    float *out;           /* [T, W] */
    int64_t top_k, width;
} WeightedSum;

/* A chunk is a token. */
PORTABLE void weighted_sum(const void *data, int64_t token)
{
    const WeightedSum *w = data;
    float *out = w->out + token * w->width;
    for (int64_t i = 0; i < w->width; i++)
        out[i] = 0;
    for (int64_t k = 0; k < w->top_k; k++) {
        const int64_t place = w->places[token * w->top_k + k];
        const float *values = w->values + place * w->width;
        const float factor = w->weights[token * w->top_k + k];
        for (int64_t i = 0; i < w->width; i++)
            out[i] += factor * values[i];
    }
}

typedef struct {
    const float *logits;    /* [E] */
    const float *correction; /* [E], added for the choice alone; NULL without */
    float *scores;          /* [E], for work */
    int32_t *ids;           /* [K] */
    float *weights;         /* [K] */
    int64_t experts, top_k;
    int64_t is_sigmoid, is_normalised;
    float scale;
} Choice;

/* A router's choice of K experts. Those whose scores are no numbers come first. */
PORTABLE void choose(const void *data, int64_t chunk)
{
    const Choice *c = data;
    float largest = -INFINITY, sum = 0;
    (void)chunk;
    for (int64_t e = 0; e < c->experts; e++)
        largest = c->logits[e] > largest ? c->logits[e] : largest;
    for (int64_t e = 0; e < c->experts; e++) {
        const float x = c->logits[e];
        const float power = exponential(c->is_sigmoid ? (x < 0 ? x : -x) : x - largest);
        c->scores[e] = c->is_sigmoid ? (x < 0 ? power : 1.0f) / (1.0f + power) : power;
    }
    for (int64_t e = 0; e < c->experts && !c->is_sigmoid; e++)
        sum += c->scores[e];
    for (int64_t e = 0; e < c->experts && !c->is_sigmoid; e++)
        c->scores[e] /= sum;
    sum = 0;
    for (int64_t k = 0; k < c->top_k; k++) {
        int64_t best = -1;
        float highest = 0;
        for (int64_t e = 0; e < c->experts; e++) {
            const float found = c->scores[e] + (c->correction ? c->correction[e] : 0);
            int taken = 0;
            if (best >= 0 && !(found > highest || (found != found && highest == highest)))
                continue;
            for (int64_t other = 0; other < k; other++)
                taken |= c->ids[other] == e;
            if (!taken) {
                best = e;
                highest = found;
            }
        }
        c->ids[k] = (int32_t)best;
        c->weights[k] = c->scores[best];
        sum += c->scores[best];
    }
    for (int64_t k = 0; k < c->top_k; k++)
        c->weights[k] *= c->is_normalised ? c->scale / sum : c->scale;
}

/* The time, in nanoseconds of the monotonic clock. */
void note_time(const void *data, int64_t chunk)
{
    struct timespec now;
    (void)chunk;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *(int64_t *)(uintptr_t)data = now.tv_sec * 1000000000LL + now.tv_nsec;
}
