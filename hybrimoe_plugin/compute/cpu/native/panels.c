/* Rows of weights written out in bfloat16, for the types that most files have. Others are
 * dequantised by ggml and then rounded. The blocks are drawn in dots.c, but for
 *
 *     Q5_K   256 values: as Q4_K, with 32 bytes of high bits before the low ones
 */
#include <string.h>

#include "native.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c")))
#define INSIDE WITH_AVX512 __attribute__((always_inline)) static inline

INSIDE float half(const uint8_t *at)
{
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return _cvtsh_ss(bits);
}

/* 32 values times a scale, less something. */
INSIDE void put(uint16_t *out, __m256i values, __m512 scale, __m512 less)
{
    const __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(values));
    const __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(values, 1));
    const __m512 first = _mm512_fmsub_ps(_mm512_cvtepi32_ps(low), scale, less);
    const __m512 second = _mm512_fmsub_ps(_mm512_cvtepi32_ps(high), scale, less);
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

INSIDE __m256i load(const uint8_t *at)
{
    return _mm256_loadu_si256((const __m256i *)at);
}

WITH_AVX512 void panel_q8_0(const char *row, int64_t count, uint16_t *out)
{
    const uint8_t *w = (const uint8_t *)row;
    for (int64_t i = 0; i < count; i += 32, w += 34)
        put(out + i, load(w + 2), _mm512_set1_ps(half(w)), _mm512_setzero_ps());
}

WITH_AVX512 void panel_q5_0(const char *row, int64_t count, uint16_t *out)
{
    const uint8_t *w = (const uint8_t *)row;
    const __m256i nibbles = _mm256_set1_epi8(15), sixteen = _mm256_set1_epi8(16);
    const __m256i shifts = _mm256_set_epi64x(4, 4, 0, 0);
    for (int64_t i = 0; i < count; i += 32, w += 22) {
        uint32_t high;
        memcpy(&high, w + 2, sizeof high);
        const __m128i packed = _mm_loadu_si128((const __m128i *)(w + 6));
        const __m256i both = _mm256_srlv_epi64(_mm256_broadcastsi128_si256(packed), shifts);
        const __m256i low = _mm256_sub_epi8(_mm256_and_si256(both, nibbles), sixteen);
        const __m256i values = _mm256_mask_add_epi8(low, high, low, sixteen);
        put(out + i, values, _mm512_set1_ps(half(w)), _mm512_setzero_ps());
    }
}

/* Scale and minimum of the 32 values number `group` of a block of 6-bit ones. */
INSIDE void scale_of(const uint8_t *packed, int group, int *scale, int *least_value)
{
    if (group < 4) {
        *scale = packed[group] & 63;
        *least_value = packed[group + 4] & 63;
    } else {
        *scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4;
        *least_value = packed[group + 4] >> 4 | (packed[group] >> 6) << 4;
    }
}

/* Blocks of Q4_K, or with high bits of Q5_K. */
INSIDE void put_k(const uint8_t *w, int bytes, int has_high, int64_t count, uint16_t *out)
{
    const __m256i nibbles = _mm256_set1_epi8(15), sixteen = _mm256_set1_epi8(16);
    for (int64_t i = 0; i < count; i += 256, w += bytes) {
        const float d = half(w), least_d = half(w + 2);
        const uint8_t *low = w + 16 + (has_high ? 32 : 0);
        for (int group = 0; group < 8; group++) {
            int scale, least_value;
            scale_of(w + 4, group, &scale, &least_value);
            const __m256i packed = load(low + group / 2 * 32);
            __m256i values =
                _mm256_and_si256(group % 2 ? _mm256_srli_epi16(packed, 4) : packed, nibbles);
            if (has_high) {
                const __m256i bit = _mm256_set1_epi8((char)(1 << group));
                const __mmask32 set = _mm256_test_epi8_mask(load(w + 16), bit);
                values = _mm256_mask_add_epi8(values, set, values, sixteen);
            }
            put(out + i + 32 * group, values, _mm512_set1_ps(d * (float)scale),
                _mm512_set1_ps(least_d * (float)least_value));
        }
    }
}

WITH_AVX512 void panel_q4_k(const char *row, int64_t count, uint16_t *out)
{
    put_k((const uint8_t *)row, 144, 0, count, out);
}

WITH_AVX512 void panel_q5_k(const char *row, int64_t count, uint16_t *out)
{
    put_k((const uint8_t *)row, 176, 1, count, out);
}

WITH_AVX512 void panel_q6_k(const char *row, int64_t count, uint16_t *out)
{
    const uint8_t *w = (const uint8_t *)row;
    const __m256i nibbles = _mm256_set1_epi8(15), highs = _mm256_set1_epi8(48);
    const __m256i offset = _mm256_set1_epi8(32);
    for (int64_t i = 0; i < count; i += 256, w += 210) {
        const float d = half(w + 208);
        const int8_t *scales = (const int8_t *)(w + 192);
        for (int group = 0; group < 8; group++) {
            const int part = group / 4, which = group % 4;
            const __m256i low = load(w + 64 * part + 32 * (which % 2));
            const __m256i high = load(w + 128 + 32 * part);
            const __m256i four = which < 2 ? low : _mm256_srli_epi16(low, 4);
            const __m256i two = which == 0   ? _mm256_slli_epi16(high, 4)
                                : which == 1 ? _mm256_slli_epi16(high, 2)
                                : which == 2 ? high
                                             : _mm256_srli_epi16(high, 2);
            const __m256i stored = _mm256_or_si256(_mm256_and_si256(four, nibbles),
                                                   _mm256_and_si256(two, highs));
            const __m256i values = _mm256_sub_epi8(stored, offset);
            const __m512i first = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(values));
            const __m512i second = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(values, 1));
            const __m512 by_first = _mm512_set1_ps(d * (float)scales[2 * group]);
            const __m512 by_second = _mm512_set1_ps(d * (float)scales[2 * group + 1]);
            const __m512bh both =
                _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_cvtepi32_ps(second), by_second),
                                    _mm512_mul_ps(_mm512_cvtepi32_ps(first), by_first));
            _mm512_storeu_si512(out + i + 32 * group, (__m512i)both);
        }
    }
}

#else

#define MISSING(name)                                                                             \
    void name(const char *row, int64_t count, uint16_t *out)                                      \
    {                                                                                             \
        (void)row, (void)count, (void)out;                                                        \
    }

MISSING(panel_q8_0)
MISSING(panel_q5_0)
MISSING(panel_q4_k)
MISSING(panel_q5_k)
MISSING(panel_q6_k)

#endif
