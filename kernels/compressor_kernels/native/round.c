/* Columns of a weight rounded one after another, each with the errors of those before it (GPTQ).
 *
 *     c_j = w_j + before_j + sum_{i<j} e_i R_ij,    w^_j = s (round(c_j / s) kept in 0..top),
 *     e_j = w_j - w^_j
 *
 * Rows are independent: a thread takes `PART` of them through all columns of a block, so that the
 * errors stay in the first cache. Matrices lie transposed, [columns, rows].
 *
 * Letters: O rows of the weight, B columns of the block. */
#include <math.h>
#include <stdint.h>

#define PART 64
#define MOST 128 /* columns of a block */

typedef struct {
    float *weights;      /* [B, O] w, replaced by e */
    const float *before; /* [B, O] */
    const float *root;   /* [B, B], R_ij above the diagonal */
    const float *scale;  /* [groups, O] */
    const float *zero;   /* [groups, O] */
    const int64_t *group; /* [B] group of each column */
    const uint8_t *keep; /* [B, O], 0: the weight stays 0; may be null */
    float *misses;       /* [B, O] c - w^ */
    uint8_t *codes;      /* [B, O] */
    int32_t *clipped;    /* [O] counts codes that wanted to lie outside, added to */
    int64_t rows, columns;
    float top;
} Rounding;

/* One column of a part: `wanted` to codes, errors and misses. */
static inline void round_column(
    const Rounding *r, int64_t at, int64_t grid, int count, const float *restrict wanted,
    float *restrict errors, int32_t *restrict clipped
) {
    const float *restrict scale = r->scale + grid, *restrict zero = r->zero + grid;
    float *restrict weights = r->weights + at, *restrict misses = r->misses + at;
    uint8_t *restrict codes = r->codes + at;
    const uint8_t *restrict keep = r->keep ? r->keep + at : 0;
    const float top = r->top;
    float kept[PART];
    for (int n = 0; n < count; n++) kept[n] = wanted[n];
    if (keep)
        for (int n = 0; n < count; n++) kept[n] *= keep[n];
    for (int n = 0; n < count; n++) {
        const float asked = rintf(kept[n] / scale[n]) + zero[n];
        const float low = asked > 0.0f ? asked : 0.0f;
        const float code = low < top ? low : top;
        const float rounded = (code - zero[n]) * scale[n];
        errors[n] = weights[n] - rounded;
        weights[n] = errors[n];
        misses[n] = wanted[n] - rounded;
        codes[n] = (uint8_t)code;
        clipped[n] += code != asked;
    }
}

static void round_part(const Rounding *r, int64_t first, int count) {
    float errors[MOST][PART], wanted[PART];
    for (int64_t j = 0; j < r->columns; j++) {
        const int64_t at = j * r->rows + first;
        const float *restrict weights = r->weights + at, *restrict before = r->before + at;
        for (int n = 0; n < count; n++) wanted[n] = weights[n] + before[n];
        for (int64_t i = 0; i < j; i++) {
            const float share = r->root[i * r->columns + j];
            const float *restrict error = errors[i];
            for (int n = 0; n < count; n++) wanted[n] += share * error[n];
        }
        const int64_t grid = r->group[j] * r->rows + first;
        round_column(r, at, grid, count, wanted, errors[j], r->clipped + first);
    }
}

void round_columns(const Rounding *r) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < r->rows; first += PART)
        round_part(r, first, (int)(r->rows - first < PART ? r->rows - first : PART));
}

/* Groups of weights on their grids; of group n the weight is `weight[n % period]`. */
typedef struct {
    const float *groups; /* [N, K] */
    const float *scale;  /* [N] */
    const float *zero;   /* [N] */
    const float *weight; /* [period, K]; may be null */
    float *found;        /* [N] */
    int64_t count, size, period;
    float top;
} Groups;

/* The code of a weight less the zero point, kept in low..high. */
static inline float level_of(float weight, float scale, float low, float high) {
    const float asked = rintf(weight / scale);
    const float above = asked > low ? asked : low;
    return above < high ? above : high;
}

/* sum_i weight_i (s level_i - w_i)^2 */
static inline float group_error(const Groups *g, int64_t n, int weighted) {
    const float *restrict w = g->groups + n * g->size;
    const float *restrict weight = weighted ? g->weight + n % g->period * g->size : w;
    const float scale = g->scale[n], low = -g->zero[n], high = g->top - g->zero[n];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < g->size; i++) {
        const float miss = level_of(w[i], scale, low, high) * scale - w[i];
        sum += weighted ? weight[i] * miss * miss : miss * miss;
    }
    return sum;
}

/* The scale with the smallest error for the present levels; the old one if that has no answer. */
static inline float group_scale(const Groups *g, int64_t n, int weighted) {
    const float *restrict w = g->groups + n * g->size;
    const float *restrict weight = weighted ? g->weight + n % g->period * g->size : w;
    const float scale = g->scale[n], low = -g->zero[n], high = g->top - g->zero[n];
    float product = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : product, square)
    for (int64_t i = 0; i < g->size; i++) {
        const float level = level_of(w[i], scale, low, high);
        const float share = weighted ? weight[i] * level : level;
        product += share * w[i];
        square += share * level;
    }
    const float fit = product / square;
    return square > 0.0f && fit * scale > 0.0f ? fit : scale;
}

void group_errors(const Groups *g) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < g->count; n++)
        g->found[n] = g->weight ? group_error(g, n, 1) : group_error(g, n, 0);
}

void group_scales(const Groups *g) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < g->count; n++)
        g->found[n] = g->weight ? group_scale(g, n, 1) : group_scale(g, n, 0);
}

/* Weights on their way to a rounding that is learned: x = w / s + v, w^ = s level(x). */
typedef struct {
    const float *weights;  /* [N, K] w */
    const float *offset;   /* [N, K] v */
    const float *scale;    /* [N] */
    const float *zero;     /* [N] */
    const float *gradient; /* [N, K] of w^; only for gradients */
    float *found;          /* [N, K] w^, or the gradient of v */
    float *step;           /* [N] the gradient of s; only for gradients */
    int64_t count, size;
    float top;
} Learned;

/* Not a number stays what it is. */
static inline float kept_in(float asked, float low, float high) {
    const float above = asked < low ? low : asked;
    return above > high ? high : above;
}

void learned_values(const Learned *g) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < g->count; n++) {
        const float *restrict w = g->weights + n * g->size, *restrict v = g->offset + n * g->size;
        float *restrict found = g->found + n * g->size;
        const float scale = g->scale[n], low = -g->zero[n], high = g->top - g->zero[n];
        for (int64_t i = 0; i < g->size; i++)
            found[i] = scale * kept_in(rintf(w[i] / scale + v[i]), low, high);
    }
}

/* Straight through: dv = s g where x was not clipped, ds = sum g level - dv w / s^2. */
void learned_gradients(const Learned *g) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < g->count; n++) {
        const float *restrict w = g->weights + n * g->size, *restrict v = g->offset + n * g->size;
        const float *restrict gradient = g->gradient + n * g->size;
        float *restrict found = g->found + n * g->size;
        const float scale = g->scale[n], low = -g->zero[n], high = g->top - g->zero[n];
        float levels = 0.0f, moved = 0.0f;
#pragma omp simd reduction(+ : levels, moved)
        for (int64_t i = 0; i < g->size; i++) {
            const float asked = rintf(w[i] / scale + v[i]), level = kept_in(asked, low, high);
            const float step = level == asked ? scale * gradient[i] : 0.0f;
            levels += gradient[i] * level;
            moved += step * w[i];
            found[i] = step;
        }
        g->step[n] = levels - moved / (scale * scale);
    }
}
