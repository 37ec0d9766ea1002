/* Rows of int8 and fp8, as kernels/kv_format.py says: elements of a byte, and a float32 scale for each row. */
#ifndef TANDEM_KV_FORMAT_H
#define TANDEM_KV_FORMAT_H

#include "simd.h"

INLINE int quantized(int64_t kept) { return kept == INT8 || kept == FP8; }
INLINE int64_t element_bytes(int64_t kept) { return quantized(kept) ? 1 : bytes_of((int)kept); }

#if VL == 16
INLINE vu vu_max(vu a, vu b) { return (vu)_mm512_max_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
INLINE vu vu_max(vu a, vu b) { return (vu)_mm256_max_epu32((__m256i)a, (__m256i)b); }
#else
INLINE vu vu_max(vu a, vu b) { vu first = (vu)(a > b); return (first & a) | (~first & b); }
#endif

INLINE uint32_t vu_highest(vu x) {
#if VL == 16
    return _mm512_reduce_max_epu32((__m512i)x);
#else
    uint32_t highest = x[0];
    for (int i = 1; i < VL; i++) highest = x[i] > highest ? x[i] : highest;
    return highest;
#endif
}

/* VL bytes as the low bytes of so many lanes, zeros above; and back, where what is above does not matter. gcc 12 makes single
 * bytes of the portable two. */
INLINE vu read_bytes(const char *p) {
#if VL == 16
    return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    vu lanes;
    for (int i = 0; i < VL; i++) lanes[i] = (uint8_t)p[i];
    return lanes;
#endif
}

INLINE void write_bytes(char *p, vu lanes) {
#if VL == 16
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)lanes));
#elif defined(__AVX2__)
    __m256i low = _mm256_shuffle_epi8((__m256i)lanes, _mm256_set1_epi32(0x0c080400)); /* of 4 lanes, 4 times */
    _mm_storel_epi64((__m128i *)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#else
    for (int i = 0; i < VL; i++) p[i] = (char)lanes[i];
#endif
}

INLINE vu choose(vu mask, vu a, vu b) { return (mask & a) | (~mask & b); }

/* e4m3 in the low byte of each lane -> float32. A number without an exponent is read with that of the least one that has
 * one, whose leading 1 is then taken away again: no denormal float is computed with, which many a CPU does slowly. */
INLINE vf e4m3_widen(vu codes) {
    const uint32_t least = 0x3c800000u; /* 2^-6 */
    vu magnitude = (codes & 0x7fu) << 20;
    vu tiny = (vu)(magnitude < (1u << 23)), is_nan = (vu)(magnitude == (0x7fu << 20));
    vf value = (vf)(magnitude + (120u << 23) + (tiny & (1u << 23))) - (vf)(tiny & least);
    return (vf)((vu)value | (is_nan & 0x7fc00000u) | ((codes & 0x80u) << 24));
}

/* float32 up to 448 (and a little more, which is 448 too) -> e4m3, to nearest, ties to even. */
INLINE vu e4m3_round(vf x) {
    vu bits = (vu)x, magnitude = bits & 0x7fffffffu;
    vu rounded = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
    vu fixed = (vu)((vf)magnitude + vf_set1(16384.0f)) - 0x46800000u; /* 2^14: adding it rounds to multiples of 2^-9 */
    vu code = choose((vu)(magnitude < 0x3c800000u), fixed, rounded);
    return choose((vu)(magnitude > 0x7f800000u), code * 0 + 0x7fu, code) | ((bits >> 24) & 0x80u);
}

/* n elements of a quantized row, VL of them at most, as float32 without their scale; zeros beyond n. */
INLINE vf widen_elements(const char *p, int64_t n, int kept) {
    char last[VL] = {0};
    if (n < VL) p = memcpy(last, p, (size_t)n);
    return kept == INT8 ? vf_widen8((const int8_t *)p) : e4m3_widen(read_bytes(p));
}

/* A row of head_dim numbers of a dtype -> its elements. Returns their scale. */
INLINE float quantize_row(const void *row, int64_t head_dim, int dtype, char *elements, int kept) {
    /* the bits of numbers without a sign are in the order of the numbers, NaNs above all */
    vu highest = {0};
    for (int64_t i = 0; i < head_dim; i += VL) highest = vu_max(highest, (vu)vf_read(row, i, head_dim - i, dtype) & 0x7fffffffu);
    uint32_t bits = vu_highest(highest);
    float most, greatest = kept == INT8 ? 127.0f : 448.0f;
    memcpy(&most, &bits, sizeof most);
    if (most < 0x1p-100f) most = 0.0f;
    float inverse = most > 0.0f ? 1.0f / most * greatest : 0.0f;
    for (int64_t i = 0; i < head_dim; i += VL) {
        vf scaled = vf_read(row, i, head_dim - i, dtype) * inverse;
        /* 1.5 * 2^23: adding it rounds to an integer in the low bits, which are 0 for a NaN */
        vu codes = kept == INT8 ? (vu)(scaled + vf_set1(12582912.0f)) : e4m3_round(scaled);
        char last[VL];
        write_bytes(head_dim - i < VL ? last : elements + i, codes);
        if (head_dim - i < VL) memcpy(elements + i, last, (size_t)(head_dim - i));
    }
    return most / greatest;
}

#endif
