/* Softmax attention of rows of tokens, float32. Each query sees one range of keys; keys that no query
 * of a small group sees cost nothing. A group's scores stay in the cache. */
#include "simd.h"

#define QUERIES (LANES == 16 ? 8 : 4) /* times two vectors: what the registers hold; at most 8 */
#define WIDE (2 * LANES)
#define HIDDEN -1e30f
#define MOST 512 /* of E */

typedef struct {
    const float *q, *k, *v;          /* [B][H][M][E], [B][G][L][E], [B][G][L][E], by strides */
    const int32_t *begin, *end;      /* [B][M]; begin < end */
    float *out, *work;               /* [B][M][H][E]; B * G * (E + QUERIES) * padded floats */
    /* size: E, a multiple of LANES; padded: L up to a multiple of WIDE */
    int64_t batch, heads, kv_heads, queries, keys, size, padded;
    int64_t q_strides[3], k_strides[3], v_strides[3];            /* of B, H or G, token */
    float scale;
} Rows;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void turn_keys(const Rows *s, const float *k, float *turned) {
    for (int64_t e = 0; e < s->size; e++) {
        float *row = turned + e * s->padded;
        for (int64_t l = 0; l < s->keys; l++) row[l] = k[l * s->k_strides[2] + e];
        for (int64_t l = s->keys; l < s->padded; l++) row[l] = 0;
    }
}

/* scores[r][l] = scale q_r k_l, l = first .. last - 1 in steps of WIDE; q is [E][QUERIES]. Products
 * are scaled as sums: they overflow where those of other kernels do. */
INLINE void score_range(const float *q, const float *turned, const Rows *s, int64_t first,
                        int64_t last, float *scores) {
    for (int64_t l = first; l < last; l += WIDE) {
        vf total[QUERIES][2] = {{{0}}};
        for (int64_t e = 0; e < s->size; e++) {
            const float *row = turned + e * s->padded + l;
            const vf low = load_f(row), high = load_f(row + LANES);
            UNROLL for (int r = 0; r < QUERIES; r++) {
                total[r][0] += low * q[e * QUERIES + r];
                total[r][1] += high * q[e * QUERIES + r];
            }
        }
        UNROLL for (int r = 0; r < QUERIES; r++) {
            store_f(scores + r * s->padded + l, total[r][0] * s->scale);
            store_f(scores + r * s->padded + l + LANES, total[r][1] * s->scale);
        }
    }
}

/* exp(score - largest) within [begin, end), about 0 elsewhere in [first, last); one over their sum. */
INLINE float weigh(float *row, int64_t first, int64_t begin, int64_t end, int64_t last) {
    for (int64_t l = first; l < begin; l++) row[l] = HIDDEN;
    for (int64_t l = end; l < last; l++) row[l] = HIDDEN;
    vf most = load_f(row + first), sums = {0};
    for (int64_t l = first; l < last; l += LANES) most = larger_f(most, load_f(row + l));
    const float largest = max_f(most);
    for (int64_t l = first; l < last; l += LANES) {
        const vf part = exp_f(load_f(row + l) - largest);
        store_f(row + l, part);
        sums += part;
    }
    return 1.0f / sum_f(sums);
}

/* out[r] = shares[r] * sum_l scores[r][l] v_l for `count` queries and one or two vectors of v. */
INLINE void mix_part(const float *scores, const float *v, const Rows *s, int64_t first, int64_t last,
                     const float *shares, int64_t count, float *out, const int vectors) {
    vf total[QUERIES][2] = {{{0}}};
    for (int64_t l = first; l < last; l++) {
        const float *row = v + l * s->v_strides[2];
        UNROLL for (int i = 0; i < vectors; i++) {
            const vf part = load_f(row + i * LANES);
            UNROLL for (int r = 0; r < QUERIES; r++) total[r][i] += part * scores[r * s->padded + l];
        }
    }
    for (int64_t r = 0; r < count; r++)
        for (int i = 0; i < vectors; i++)
            store_f(out + r * s->heads * s->size + i * LANES, total[r][i] * shares[r]);
}

INLINE void mix_values(const float *scores, const float *v, const Rows *s, int64_t first,
                       int64_t last, const float *shares, int64_t count, float *out) {
    int64_t e = 0;
    for (; e + WIDE <= s->size; e += WIDE)
        mix_part(scores, v + e, s, first, last, shares, count, out + e, 2);
    if (e < s->size) mix_part(scores, v + e, s, first, last, shares, count, out + e, 1);
}

/* Queries i .. i + QUERIES - 1 of one head. */
INLINE void attend_group(const Rows *s, int64_t b, int64_t h, int64_t i, const float *turned,
                         const float *v, float *scores) {
    const int64_t count = least(QUERIES, s->queries - i);
    const int32_t *begin = s->begin + b * s->queries + i, *end = s->end + b * s->queries + i;
    const float *q = s->q + b * s->q_strides[0] + h * s->q_strides[1];
    float packed[MOST * QUERIES], shares[QUERIES];
    int64_t first = s->keys, last = 0;
    for (int64_t r = 0; r < QUERIES; r++) {
        const int64_t there = least(r, count - 1); /* the last one again where there are fewer */
        const float *row = q + (i + there) * s->q_strides[2];
        for (int64_t e = 0; e < s->size; e++) packed[e * QUERIES + r] = row[e];
        first = least(first, begin[there]);
        last = end[there] > last ? end[there] : last;
    }
    first -= first % WIDE;
    const int64_t padded = last + (WIDE - last % WIDE) % WIDE;
    score_range(packed, turned, s, first, padded, scores);
    for (int64_t r = 0; r < QUERIES; r++) {
        const int64_t there = least(r, count - 1);
        shares[r] = weigh(scores + r * s->padded, first, begin[there], end[there], padded);
    }
    float *out = s->out + ((b * s->queries + i) * s->heads + h) * s->size;
    mix_values(scores, v, s, first, last, shares, count, out);
}

void attend_rows(const Rows *s) {
    const int64_t group = s->heads / s->kv_heads;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < s->batch * s->kv_heads; task++) {
        const int64_t b = task / s->kv_heads, g = task % s->kv_heads;
        float *turned = s->work + task * (s->size + QUERIES) * s->padded;
        const float *v = s->v + b * s->v_strides[0] + g * s->v_strides[1];
        turn_keys(s, s->k + b * s->k_strides[0] + g * s->k_strides[1], turned);
        for (int64_t h = g * group; h < (g + 1) * group; h++)
            for (int64_t i = 0; i < s->queries; i += QUERIES)
                attend_group(s, b, h, i, turned, v, turned + s->size * s->padded);
    }
}
