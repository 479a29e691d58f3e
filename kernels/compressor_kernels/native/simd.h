/* Vectors of LANES weights' rows, and the one operation that every processor names differently: the
 * product of unsigned weight bytes with signed activation bytes, four columns to a 32-bit lane.
 * Everything else is written with the vector extensions of gcc and clang. */
#ifndef COMPRESSOR_SIMD_H
#define COMPRESSOR_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define ISA "AVX-512 VNNI"
#define LANES 16
#include <immintrin.h>
#elif defined(__AVX2__)
#define ISA "AVX2"
#define LANES 8
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#define ISA "NEON dotprod"
#define LANES 4
#include <arm_neon.h>
#else
#define ISA "plain C"
#define LANES 8
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define VECTOR_BYTES (4 * LANES)
#define STEPS 8 /* a block is 32 columns: eight steps of four */
#define BLOCK 32

typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint8_t vb __attribute__((vector_size(LANES)));
typedef int8_t vc __attribute__((vector_size(LANES)));

#define CONVERT(value, type) __builtin_convertvector(value, type)

INLINE vu load_u(const void *p) { vu v; memcpy(&v, p, sizeof v); return v; }
INLINE vf load_f(const void *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE vh load_h(const void *p) { vh v; memcpy(&v, p, sizeof v); return v; }
INLINE vb load_b(const void *p) { vb v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_f(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE float sum_f(vf v) {
    float part[LANES];
    memcpy(part, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

/* Lane i: the sum of v[i], for LANES vectors. */
INLINE vf sums_f(const vf *v) {
#if defined(__AVX2__) && LANES == 8
    __m256 low = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]),
                                _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
    __m256 high = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[4], (__m256)v[5]),
                                 _mm256_hadd_ps((__m256)v[6], (__m256)v[7]));
    return (vf)_mm256_permute2f128_ps(low, high, 0x20) +
           (vf)_mm256_permute2f128_ps(low, high, 0x31);
#else
    float sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = sum_f(v[i]);
    return load_f(sums);
#endif
}

INLINE vf larger_f(vf a, vf b) {
    vu above = (vu)(a > b);
    return (vf)(((vu)a & above) | ((vu)b & ~above));
}

INLINE float max_f(vf v) {
    float part[LANES];
    memcpy(part, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}

/* exp by 2^n * p(r), |r| <= ln 2 / 2, p of degree 6 (Cephes); relative error below 2e-7. */
INLINE vf exp_f(vf x) {
    vu low = (vu)(x < -87.0f), high = (vu)(x > 88.0f);
    vf bounded = (vf)(((vu)x & ~low & ~high) | (high & (vu)(x - x + 88.0f)) |
                      (low & (vu)(x - x - 87.0f)));
    vf shifted = bounded * 0x1.715476p0f + 0x1.8p23f, n = shifted - 0x1.8p23f;
    vf r = bounded - n * 0x1.62e400p-1f - n * 0x1.7f7d1cp-20f;
    vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vf)(((vi)shifted - 0x4b400000 + 127) << 23);
}

/* float16 to float32, exactly. */
#if defined(__F16C__) && LANES == 8
INLINE vf from_half(const void *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128(p)); }
#elif LANES == 16
INLINE vf from_half(const void *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(p)); }
#else
INLINE vf from_half(const void *p) {
    vu half = CONVERT(load_h(p), vu);
    vf wide = (vf)((half & 0x7fff) << 13) * 0x1p112f; /* moves the exponent to float32's bias */
    return (vf)((vu)wide | (half & 0x8000) << 16);
}
#endif

/* Codes of 8 bits enter the product minus this number where it wants signed weights. */
#if (defined(__AVX2__) && LANES == 8) || defined(__ARM_FEATURE_DOTPROD)
#define BIAS(bits) ((bits) == 8 ? 128 : 0)
#else
#define BIAS(bits) 0
#endif

/* Sum over a block: lane r gets sum_k w[r][k] * x[k], k = 0 .. 31. */
INLINE vi dot_block(const vu *w, const int8_t *x, int bits);

#if LANES == 16
INLINE vi dot_block(const vu *w, const int8_t *x, int bits) {
    (void)bits;
    __m512i total = _mm512_setzero_si512();
    UNROLL for (int i = 0; i < STEPS; i++) {
        int32_t four;
        memcpy(&four, x + 4 * i, 4);
        total = _mm512_dpbusd_epi32(total, (__m512i)w[i], _mm512_set1_epi32(four));
    }
    return (vi)total;
}
#elif defined(__AVX2__)
/* maddubs adds pairs in 16 bits; so many steps fit there before they are widened:
 * steps * 2 * 127 * (2^bits - 1) < 2^15. With 8 bits the sign moves over to x: 2 * 127 * 128. */
#define NARROW_STEPS(bits) ((bits) <= 4 ? 8 : (bits) == 5 ? 4 : (bits) == 6 ? 2 : 1)
INLINE vi dot_block(const vu *w, const int8_t *x, int bits) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i total = _mm256_setzero_si256(), narrow = total;
    UNROLL for (int i = 0; i < STEPS; i++) {
        int32_t four;
        memcpy(&four, x + 4 * i, 4);
        __m256i row = (__m256i)w[i], column = _mm256_set1_epi32(four);
        if (bits == 8) column = _mm256_sign_epi8(column, row), row = _mm256_abs_epi8(row);
        __m256i product = _mm256_maddubs_epi16(row, column);
        narrow = i % NARROW_STEPS(bits) ? _mm256_add_epi16(narrow, product) : product;
        if ((i + 1) % NARROW_STEPS(bits) == 0)
            total = _mm256_add_epi32(total, _mm256_madd_epi16(narrow, ones));
    }
    return (vi)total;
}
#elif LANES == 4
INLINE vi dot_block(const vu *w, const int8_t *x, int bits) {
    (void)bits;
    int32x4_t total = vdupq_n_s32(0);
    UNROLL for (int i = 0; i < STEPS; i++) {
        int32_t four;
        memcpy(&four, x + 4 * i, 4);
        total = vdotq_s32(total, (int8x16_t)w[i], vreinterpretq_s8_s32(vdupq_n_s32(four)));
    }
    return (vi)total;
}
#else
INLINE vi dot_block(const vu *w, const int8_t *x, int bits) {
    (void)bits;
    vi total = {0};
    for (int i = 0; i < STEPS; i++)
        for (int j = 0; j < 4; j++)
            total += (vi)((w[i] >> (8 * j)) & 255) * (int32_t)x[4 * i + j];
    return total;
}
#endif
#endif
