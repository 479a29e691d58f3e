/* Packed weights, as `native.py` lays them out, and their products with a few rows of x. */
#ifndef COMPRESSOR_LINEAR_H
#define COMPRESSOR_LINEAR_H

#include "simd.h"

#define SERIAL (1 << 16) /* fewer products are not worth waking threads */

typedef struct {
    const uint8_t *stream;
    const void *scale;
    const uint8_t *zeros; /* NULL: symmetric */
    const float *bias;    /* NULL: none */
    int64_t rows, columns, blocks, group_blocks;
    int32_t bits, scale_kind; /* 0 float32, 1 bfloat16, 2 float16 */
} Weight;

/* y[i] [M, N of i] = x [M, K] W_i^T + bias_i for `many` weights of the same K. */
void linears(const Weight *w, int many, const float *x, int64_t m, float *const *y, void *work,
             int rounds);

#endif
