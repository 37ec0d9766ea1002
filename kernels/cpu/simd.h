/* Float vectors for the CPU ops.
 *
 * Every op promises that the bits of a row depend on nothing but that row. So the order of each sum is written out here
 * and in the ops, never left to the compiler: the build passes -ffp-contract=off, a fused multiply-add is always an explicit
 * call, and sums run in LANES fixed lanes that are added as one fixed tree.
 */
#ifndef TANDEM_SIMD_H
#define TANDEM_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include <immintrin.h>
#define VL 16
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
#define vf_set1(x) ((vf)_mm512_set1_ps(x))
#define vf_fma(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define vf_max(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define VL 8
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
#define vf_set1(x) ((vf)_mm256_set1_ps(x))
#define vf_fma(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define vf_max(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#else
#define VL 8
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
INLINE vf vf_set1(float x) { return (vf){x, x, x, x, x, x, x, x}; }
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vf_max(vf a, vf b) { vi first = a > b; return (vf)((first & (vi)a) | (~first & (vi)b)); }
#endif

/* VL bfloat16 as float32. */
INLINE vf vf_widen(const uint16_t *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    vf wide;
    for (int i = 0; i < VL; i++) {
        uint32_t bits = (uint32_t)p[i] << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        wide[i] = value;
    }
    return wide;
#endif
}

/* VL int8 as float32. */
INLINE vf vf_widen8(const int8_t *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vf wide;
    for (int i = 0; i < VL; i++) wide[i] = (float)p[i];
    return wide;
#endif
}

#define LANES 16 /* partial sums of a reduction, on every instruction set */

/* Memory is reached in groups of 8 elements: every head_dim is a multiple of 8. */
typedef float v8 __attribute__((vector_size(32)));
typedef uint32_t u8x32 __attribute__((vector_size(32)));
typedef uint16_t u8x16 __attribute__((vector_size(16)));

/* What numbers are kept as: rows as kernels/dtypes.py says, and linears' weights and caches as fewer bits, INT4 and below. */
enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3, FLOAT16 = 4, FP8 = 5, FP6 = 6 };

INLINE v8 v8_load(const float *p) { v8 x; memcpy(&x, p, sizeof x); return x; }
INLINE void v8_store(float *p, v8 x) { memcpy(p, &x, sizeof x); }
INLINE vf vf_load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
INLINE vi vi_load(const void *p) { vi x; memcpy(&x, p, sizeof x); return x; }
INLINE void vf_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf vf_choose(vi first, vf a, vf b) { return (vf)((first & (vi)a) | (~first & (vi)b)); }
INLINE v8 v8_set1(float x) { return (v8){x, x, x, x, x, x, x, x}; }

#if defined(__AVX2__) /* gcc 12 splits these two conversions into halves */
INLINE u8x32 widen_u16(u8x16 half) { return (u8x32)_mm256_cvtepu16_epi32((__m128i)half); }
INLINE u8x16 narrow_u32(u8x32 x) {
    __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
    return (u8x16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
INLINE u8x32 widen_u16(u8x16 half) { return __builtin_convertvector(half, u8x32); }
INLINE u8x16 narrow_u32(u8x32 x) { return __builtin_convertvector(x, u8x16); }
#endif

INLINE v8 bf16_widen(u8x16 half) { return (v8)(widen_u16(half) << 16); }

/* Round to nearest even; a NaN stays a NaN. */
INLINE u8x16 bf16_round(v8 x) {
    u8x32 bits = (u8x32)x, is_nan = (u8x32)(x != x);
    u8x32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return narrow_u32((rounded & ~is_nan) | (0x7fc0u & is_nan));
}

/* 8 float16 as float32. Without instructions for it: a number without an exponent is read with that of the least that has one,
 * whose leading 1 is then taken away again. */
INLINE v8 f16_widen(u8x16 half) {
#if defined(__F16C__)
    return (v8)_mm256_cvtph_ps((__m128i)half);
#else
    u8x32 bits = widen_u16(half), magnitude = (bits & 0x7fffu) << 13;
    u8x32 tiny = (u8x32)(magnitude < (0x400u << 13)), endless = (u8x32)(magnitude >= (0x7c00u << 13));
    u8x32 is_nan = (u8x32)(magnitude > (0x7c00u << 13));
    v8 value = (v8)(magnitude + (112u << 23) + (tiny & (1u << 23)) + (endless & (112u << 23))) - (v8)(tiny & 0x38800000u);
    return (v8)((u8x32)value | (is_nan & 0x400000u) | ((bits & 0x8000u) << 16));
#endif
}

/* Round to nearest even, to infinity from 65520 on; a NaN stays a NaN, with its first bits, made quiet. */
INLINE u8x16 f16_round(v8 x) {
#if defined(__F16C__)
    return (u8x16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    u8x32 bits = (u8x32)x, magnitude = bits & 0x7fffffffu;
    u8x32 rounded = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
    u8x32 fixed = (u8x32)((v8)magnitude + 0.5f) - 0x3f000000u; /* adding 2^-1 rounds to multiples of 2^-24 */
    u8x32 tiny = (u8x32)(magnitude < 0x38800000u), endless = (u8x32)(magnitude >= 0x47800000u);
    u8x32 is_nan = (u8x32)(magnitude > 0x7f800000u);
    u8x32 code = (tiny & fixed) | (~tiny & ((endless & 0x7c00u) | (~endless & rounded)));
    return narrow_u32(code | (is_nan & (0x200u | ((magnitude >> 13) & 0x3ffu))) | ((bits >> 16) & 0x8000u));
#endif
}

INLINE int64_t bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE const void *at(const void *base, int64_t element, int dtype) {
    return (const char *)base + element * bytes_of(dtype);
}

/* n (1 to 8) elements at base[element] as float32, zeros beyond n. */
INLINE v8 read8(const void *base, int64_t element, int64_t n, int dtype) {
    const void *p = at(base, element, dtype);
    if (dtype != FLOAT32) {
        u8x16 half = {0};
        if (n >= 8) memcpy(&half, p, sizeof half);
        else memcpy(&half, p, (size_t)n * 2);
        return dtype == FLOAT16 ? f16_widen(half) : bf16_widen(half);
    }
    v8 x = {0};
    if (n >= 8) memcpy(&x, p, sizeof x);
    else memcpy(&x, p, (size_t)n * 4);
    return x;
}

INLINE void write8(void *base, int64_t element, int64_t n, int dtype, v8 x) {
    void *p = (void *)at(base, element, dtype);
    if (dtype != FLOAT32) {
        u8x16 half = dtype == FLOAT16 ? f16_round(x) : bf16_round(x);
        if (n >= 8) memcpy(p, &half, sizeof half);
        else memcpy(p, &half, (size_t)n * 2);
    } else {
        if (n >= 8) memcpy(p, &x, sizeof x);
        else memcpy(p, &x, (size_t)n * 4);
    }
}

/* VL elements as float32. */
INLINE vf vf_load_as(const void *p, int dtype) {
    if (dtype == BFLOAT16) return vf_widen(p);
    if (dtype == FLOAT32) return vf_load(p);
#if VL == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    u8x16 half;
    memcpy(&half, p, sizeof half);
    return (vf)f16_widen(half);
#endif
}

/* n (1 to VL) elements at base[element] as float32, zeros beyond n; and back. */
INLINE vf vf_read(const void *base, int64_t element, int64_t n, int dtype) {
    if (n >= VL) return vf_load_as(at(base, element, dtype), dtype);
    vf x = {0};
    for (int64_t i = 0; i < n; i += 8) {
        v8 part = read8(base, element + i, n - i < 8 ? n - i : 8, dtype);
        memcpy((float *)&x + i, &part, sizeof part);
    }
    return x;
}

INLINE void vf_write(void *base, int64_t element, int64_t n, int dtype, vf x) {
    void *p = (void *)at(base, element, dtype);
#if VL == 16
    if (n >= VL && dtype == BFLOAT16) {
        vu bits = (vu)x, is_nan = (vu)(x != x);
        vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        rounded = (rounded & ~is_nan) | (0x7fc0u & is_nan);
        _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)rounded));
        return;
    }
    if (n >= VL && dtype == FLOAT16) {
        _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
        return;
    }
#endif
    if (n >= VL && dtype == FLOAT32) {
        vf_store(p, x);
        return;
    }
    for (int64_t i = 0; i < n; i += 8) {
        v8 part;
        memcpy(&part, (const float *)&x + i, sizeof part);
        write8(base, element + i, n - i < 8 ? n - i : 8, dtype, part);
    }
}

INLINE float vf_highest(vf x) {
#if VL == 16
    return _mm512_reduce_max_ps((__m512)x);
#else
    float highest = x[0];
    for (int i = 1; i < VL; i++) highest = x[i] > highest ? x[i] : highest;
    return highest;
#endif
}

/* The fixed tree over LANES partial sums. */
INLINE float sum_lanes(const float lanes[LANES]) {
    typedef float v4 __attribute__((vector_size(16)));
    typedef int32_t vi4 __attribute__((vector_size(16)));
    v8 eight = v8_load(lanes) + v8_load(lanes + 8);
    v4 half[2];
    memcpy(half, &eight, sizeof eight);
    v4 four = half[0] + half[1], two = four + __builtin_shuffle(four, (vi4){2, 3, 0, 1});
    return two[0] + two[1];
}

/* e^x for x up to 87 (clamped), exactly 1 at 0, exactly 0 below -87, NaN for NaN; neither it nor its inverse is denormal.
 * Cephes expf: n = round(x / ln 2), a degree 7 polynomial in x - n ln 2, times 2^n; within 2 ulp. */
INLINE vf vf_exp(vf x) {
    const vf magic = vf_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits */
    vi underflow = x < vf_set1(-87.0f);
    vi overflow = x > vf_set1(87.0f);
    x = (vf)(((vi)x & ~overflow) | ((vi)vf_set1(87.0f) & overflow));
    vf shifted = vf_fma(x, vf_set1(1.44269504088896341f), magic);
    vf n = shifted - magic;
    vf r = vf_fma(n, vf_set1(-0.693359375f), x);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf y = vf_set1(1.9875691500e-4f);
    y = vf_fma(y, r, vf_set1(1.3981999507e-3f));
    y = vf_fma(y, r, vf_set1(8.3334519073e-3f));
    y = vf_fma(y, r, vf_set1(4.1665795894e-2f));
    y = vf_fma(y, r, vf_set1(1.6666665459e-1f));
    y = vf_fma(y, r, vf_set1(5.0000001201e-1f));
    y = vf_fma(y, r * r, r) + vf_set1(1.0f);
    vf power = (vf)(((vi)shifted - (vi)magic + 127) << 23);
    return (vf)((vi)(y * power) & ~underflow);
}

/* tanh x, odd, NaN for NaN, within 2 ulp. Cephes tanhf: a polynomial of degree 9 below 0.625, where 1 - 2 / (e^(2x) + 1) would
 * cancel. */
INLINE vf vf_tanh(vf x) {
    vf size = (vf)((vi)x & 0x7fffffff), square = x * x;
    vf y = vf_set1(-5.70498872745e-3f);
    y = vf_fma(y, square, vf_set1(2.06390887954e-2f));
    y = vf_fma(y, square, vf_set1(-5.37397155531e-2f));
    y = vf_fma(y, square, vf_set1(1.33314422036e-1f));
    y = vf_fma(y, square, vf_set1(-3.33332819422e-1f));
    y = vf_fma(y * square, x, x);
    vf far = 1.0f - 2.0f / (vf_exp(size + size) + 1.0f);
    vi near = size < vf_set1(0.625f);
    return (vf)((near & (vi)y) | (~near & ((vi)far | ((vi)x & (vi)vf_set1(-0.0f)))));
}

INLINE vf vf_sigmoid(vf x) { return 1.0f / (1.0f + vf_exp(-x)); }

#endif
