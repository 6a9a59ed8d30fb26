/* Products of rows of weights and a row of activations by AVX-512's products of bytes (VNNI), for
 * the types that most files have. ggml's own functions stay for all other types and processors.
 * Four rows go side by side: four streams from memory are read faster than one, and x is read once.
 *
 *     Q8_0   32 values: half scale, 32 signed bytes                                  by Q8_0
 *     Q5_0   32 values: half scale, 32 high bits, 32 x 4 low bits                    by Q8_0
 *     Q4_K   256 values: half scale and minimum, 8 x 6 bits of each, 256 x 4 bits    by Q8_K
 *     Q6_K   256 values: 128 bytes of low bits, 64 of high ones, 16 scales, half     by Q8_K
 *     Q8_K   256 values: float scale, 256 signed bytes, 16 sums of 16 of them
 */
#include <string.h>

#include "native.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define WITH_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))
#define INSIDE WITH_VNNI __attribute__((always_inline)) static inline

#define BYTES_8_0 34
#define BYTES_5_0 22
#define BYTES_8_K (4 + 256 + 32)
#define BYTES_4_K 144
#define BYTES_6_K 210
#define GROUP 4

INSIDE float half(const uint8_t *at)
{
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return _cvtsh_ss(bits);
}

INSIDE __m512 two_scales(float first, float second)
{
    const __m512 low = _mm512_castps256_ps512(_mm256_set1_ps(first));
    return _mm512_insertf32x8(low, _mm256_set1_ps(second), 1);
}

INSIDE __m512i two_halves(const uint8_t *first, const uint8_t *second)
{
    const __m256i low = _mm256_loadu_si256((const __m256i *)first);
    const __m256i high = _mm256_loadu_si256((const __m256i *)second);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* Keeps a loop from being made one of vectors, which gcc 12 gets wrong here with -fwrapv. */
#define ONE_BY_ONE(value) __asm__ volatile("" : "+r"(value))

typedef __m512i (*PairValues)(const uint8_t *row);
typedef int (*Value)(const uint8_t *block, int at);

/* Rows of blocks of 32 values, two blocks at a time. */
INSIDE void by_pairs(int rows, int bytes, PairValues values, int above, Value value, int count,
                     float *out, const uint8_t *w, int64_t stride, const uint8_t *x, int64_t ahead)
{
    const __m512i above_all = _mm512_set1_epi8((char)above);
    __m512 sums[GROUP];
    int block = 0;
    for (int r = 0; r < rows; r++)
        sums[r] = _mm512_setzero_ps();
    for (; block + 1 < count / 32; block += 2, w += 2 * bytes, x += 2 * BYTES_8_0) {
        const __m512i by = two_halves(x + 2, x + BYTES_8_0 + 2);
        const __m512i less = _mm512_dpbusd_epi32(_mm512_setzero_si512(), above_all, by);
        const float first = half(x), second = half(x + BYTES_8_0);
        for (int r = 0; r < rows; r++) {
            const uint8_t *row = w + r * stride;
            _mm_prefetch((const char *)row + ahead, _MM_HINT_T0);
            const __m512i found = _mm512_dpbusd_epi32(_mm512_setzero_si512(), values(row), by);
            const __m512 scale = two_scales(half(row) * first, half(row + bytes) * second);
            const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(found, less));
            sums[r] = _mm512_fmadd_ps(whole, scale, sums[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        const uint8_t *row = w + r * stride;
        out[r] = _mm512_reduce_add_ps(sums[r]);
        if (block < count / 32) {
            int32_t last = 0;
            for (int i = 0; i < 32; i++) {
                last += (value(row, i) - above) * (int8_t)x[2 + i];
                ONE_BY_ONE(last);
            }
            out[r] += (float)last * half(row) * half(x);
        }
    }
}

/* 128 more than the stored values, since one factor must be unsigned. */
INSIDE __m512i pair_8_0(const uint8_t *row)
{
    const __m512i stored = two_halves(row + 2, row + BYTES_8_0 + 2);
    return _mm512_xor_si512(stored, _mm512_set1_epi8((char)128));
}

INSIDE int value_8_0(const uint8_t *block, int at)
{
    return block[2 + at] ^ 128;
}

/* 16 more than the values. */
INSIDE __m512i pair_5_0(const uint8_t *row)
{
    const __m512i shifts = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    uint32_t high[2];
    memcpy(high, row + 2, 4);
    memcpy(high + 1, row + BYTES_5_0 + 2, 4);
    const __m128i first = _mm_loadu_si128((const __m128i *)(row + 6));
    const __m128i second = _mm_loadu_si128((const __m128i *)(row + BYTES_5_0 + 6));
    const __m256i halves[2] = {_mm256_broadcastsi128_si256(first),
                               _mm256_broadcastsi128_si256(second)};
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
    const __m512i shifted = _mm512_srlv_epi64(both, shifts);
    const __m512i low = _mm512_and_si512(shifted, _mm512_set1_epi8(15));
    const __mmask64 bits = (uint64_t)high[1] << 32 | high[0];
    return _mm512_mask_add_epi8(low, bits, low, _mm512_set1_epi8(16));
}

INSIDE int value_5_0(const uint8_t *block, int at)
{
    uint32_t high;
    memcpy(&high, block + 2, sizeof high);
    const int low = at < 16 ? block[6 + at] & 15 : block[6 + at - 16] >> 4;
    return low | ((high >> at) & 1) << 4;
}

/* The 8 scales and 8 minima of a block, of 6 bits each, as bytes: scales first. */
static inline void unpack_scales(const uint8_t *at, uint32_t out[4])
{
    const uint32_t low = 0x3f3f3f3f, nibble = 0x0f0f0f0f, high = 0x03030303;
    uint32_t packed[3];
    memcpy(packed, at, sizeof packed);
    out[0] = packed[0] & low;
    out[1] = (packed[2] & nibble) | ((packed[0] >> 6) & high) << 4;
    out[2] = packed[1] & low;
    out[3] = ((packed[2] >> 4) & nibble) | ((packed[1] >> 6) & high) << 4;
}

/* For products of 64 values in 16 bits, two values each: which of the scales each one takes. */
#define EIGHT(n) n, n, n, n, n, n, n, n
#define EACH_16(a, b, c, d) _mm512_set_epi16(EIGHT(d), EIGHT(c), EIGHT(b), EIGHT(a))
#define EACH_32(a, b) EACH_16(a, a, b, b)

INSIDE void rows_4_K(int rows, int count, float *out, const uint8_t *w, int64_t stride,
                     const uint8_t *x, int64_t ahead)
{
    const __m512i shifts = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
    const __m512i nibbles = _mm512_set1_epi8(15);
    const __m512i places[4] = {EACH_32(0, 1), EACH_32(2, 3), EACH_32(4, 5), EACH_32(6, 7)};
    __m512 sums[GROUP];
    __m128 minima[GROUP];
    for (int r = 0; r < rows; r++) {
        sums[r] = _mm512_setzero_ps();
        minima[r] = _mm_setzero_ps();
    }
    for (int block = 0; block < count / 256; block++, w += BYTES_4_K, x += BYTES_8_K) {
        float by;
        memcpy(&by, x, sizeof by);
        const __m128i x_sums = _mm_hadd_epi16(_mm_loadu_si128((const __m128i *)(x + 260)),
                                              _mm_loadu_si128((const __m128i *)(x + 276)));
        for (int r = 0; r < rows; r++) {
            const uint8_t *row = w + r * stride;
            for (int line = 0; line < BYTES_4_K; line += 64)
                _mm_prefetch((const char *)row + ahead + line, _MM_HINT_T0);
            uint32_t unpacked[4];
            unpack_scales(row + 4, unpacked);
            const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)unpacked));
            const __m512i scales = _mm512_castsi256_si512(both);
            __m512i whole = _mm512_setzero_si512();
            for (int part = 0; part < 4; part++) {
                const __m256i packed = _mm256_loadu_si256((const __m256i *)(row + 16 + 32 * part));
                const __m512i shifted = _mm512_srlv_epi64(_mm512_broadcast_i64x4(packed), shifts);
                const __m512i products =
                    _mm512_maddubs_epi16(_mm512_and_si512(shifted, nibbles),
                                         _mm512_loadu_si512(x + 4 + 64 * part));
                const __m512i scale = _mm512_permutexvar_epi16(places[part], scales);
                whole = _mm512_dpwssd_epi32(whole, products, scale);
            }
            const __m512 factor = _mm512_set1_ps(half(row) * by);
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), factor, sums[r]);
            const __m128i less = _mm_madd_epi16(_mm256_extracti128_si256(both, 1), x_sums);
            const __m128 less_by = _mm_set1_ps(half(row + 2) * by);
            minima[r] = _mm_fmadd_ps(_mm_cvtepi32_ps(less), less_by, minima[r]);
        }
    }
    for (int r = 0; r < rows; r++)
        out[r] = _mm512_reduce_add_ps(_mm512_sub_ps(sums[r], _mm512_zextps128_ps512(minima[r])));
}

INSIDE void rows_6_K(int rows, int count, float *out, const uint8_t *w, int64_t stride,
                     const uint8_t *x, int64_t ahead)
{
    const __m512i up = _mm512_set_epi64(2, 2, 2, 2, 4, 4, 4, 4);
    const __m512i down = _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0);
    const __m512i nibbles = _mm512_set1_epi8(15), highs = _mm512_set1_epi8(48);
    const __m512i places[4] = {EACH_16(0, 1, 2, 3), EACH_16(4, 5, 6, 7), EACH_16(8, 9, 10, 11),
                               EACH_16(12, 13, 14, 15)};
    __m512 sums[GROUP];
    for (int r = 0; r < rows; r++)
        sums[r] = _mm512_setzero_ps();
    for (int block = 0; block < count / 256; block++, w += BYTES_6_K, x += BYTES_8_K) {
        float by;
        memcpy(&by, x, sizeof by);
        const __m256i x_sums = _mm256_loadu_si256((const __m256i *)(x + 260));
        for (int r = 0; r < rows; r++) {
            const uint8_t *row = w + r * stride;
            for (int line = 0; line < BYTES_6_K; line += 64)
                _mm_prefetch((const char *)row + ahead + line, _MM_HINT_T0);
            const __m256i each =
                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(row + 192)));
            const __m512i scales = _mm512_castsi256_si512(each);
            /* values are 32 less than what is stored */
            const __m256i less = _mm256_slli_epi32(_mm256_madd_epi16(each, x_sums), 5);
            __m512i whole = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_zextsi256_si512(less));
            for (int part = 0; part < 2; part++) {
                const uint8_t *values = x + 4 + 128 * part;
                const __m512i low = _mm512_loadu_si512(row + 64 * part);
                const __m512i high = _mm512_broadcast_i64x4(
                    _mm256_loadu_si256((const __m256i *)(row + 128 + 32 * part)));
                const __m512i first =
                    _mm512_or_si512(_mm512_and_si512(low, nibbles),
                                    _mm512_and_si512(_mm512_sllv_epi64(high, up), highs));
                const __m512i second =
                    _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi64(low, 4), nibbles),
                                    _mm512_and_si512(_mm512_srlv_epi64(high, down), highs));
                whole = _mm512_dpwssd_epi32(
                    whole, _mm512_maddubs_epi16(first, _mm512_loadu_si512(values)),
                    _mm512_permutexvar_epi16(places[2 * part], scales));
                whole = _mm512_dpwssd_epi32(
                    whole, _mm512_maddubs_epi16(second, _mm512_loadu_si512(values + 64)),
                    _mm512_permutexvar_epi16(places[2 * part + 1], scales));
            }
            const __m512 factor = _mm512_set1_ps(half(row + 208) * by);
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), factor, sums[r]);
        }
    }
    for (int r = 0; r < rows; r++)
        out[r] = _mm512_reduce_add_ps(sums[r]);
}

INSIDE void rows_8_0(int rows, int count, float *out, const uint8_t *w, int64_t stride,
                     const uint8_t *x, int64_t ahead)
{
    by_pairs(rows, BYTES_8_0, pair_8_0, 128, value_8_0, count, out, w, stride, x, ahead);
}

INSIDE void rows_5_0(int rows, int count, float *out, const uint8_t *w, int64_t stride,
                     const uint8_t *x, int64_t ahead)
{
    by_pairs(rows, BYTES_5_0, pair_5_0, 16, value_5_0, count, out, w, stride, x, ahead);
}

typedef void (*SomeRows)(int rows, int count, float *out, const uint8_t *w, int64_t stride,
                         const uint8_t *x, int64_t ahead);

/* Rows in groups, and those that are left one by one. The next group is asked for meanwhile. */
INSIDE void all_rows(SomeRows some, int64_t rows, int64_t count, float *out, const char *weights,
                     int64_t stride, const char *x)
{
    const uint8_t *w = (const uint8_t *)weights;
    const int64_t next = GROUP * stride, ahead = next > AHEAD ? next : AHEAD;
    int64_t row = 0;
    for (; row + GROUP <= rows; row += GROUP)
        some(GROUP, (int)count, out + row, w + row * stride, stride, (const uint8_t *)x, ahead);
    for (; row < rows; row++)
        some(1, (int)count, out + row, w + row * stride, stride, (const uint8_t *)x, ahead);
}

WITH_VNNI void dots_q8_0(int64_t rows, int64_t count, float *out, const char *weights,
                         int64_t stride, const char *x)
{
    all_rows(rows_8_0, rows, count, out, weights, stride, x);
}

WITH_VNNI void dots_q5_0(int64_t rows, int64_t count, float *out, const char *weights,
                         int64_t stride, const char *x)
{
    all_rows(rows_5_0, rows, count, out, weights, stride, x);
}

WITH_VNNI void dots_q4_k(int64_t rows, int64_t count, float *out, const char *weights,
                         int64_t stride, const char *x)
{
    all_rows(rows_4_K, rows, count, out, weights, stride, x);
}

WITH_VNNI void dots_q6_k(int64_t rows, int64_t count, float *out, const char *weights,
                         int64_t stride, const char *x)
{
    all_rows(rows_6_K, rows, count, out, weights, stride, x);
}

int has_vnni(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

#else

#define MISSING(name)                                                                             \
    void name(int64_t rows, int64_t count, float *out, const char *weights, int64_t stride,       \
              const char *x)                                                                      \
    {                                                                                             \
        (void)rows, (void)count, (void)out, (void)weights, (void)stride, (void)x;                 \
    }

MISSING(dots_q8_0)
MISSING(dots_q5_0)
MISSING(dots_q4_k)
MISSING(dots_q6_k)

int has_vnni(void)
{
    return 0;
}

#endif
