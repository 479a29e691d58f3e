/* A decoder block around its attention, float32, M tokens at a time:
 *
 *   x' = norm(x) * g_in,  q, k, v = W x',  [q, k normed head by head],  q, k turned by position
 *   h  = x + W_o a,       h' = norm(h) * g_out,   y = h + W_down (silu(W_gate h') * W_up h')
 *
 * with norm(x) = x / sqrt(mean x^2 + eps), and the attention of one new token over the slots of its
 * sequence in the paged pool [slots][G kv heads][E]. */
#include "linear.h"

#include <math.h>

/* Positions whose values are used together, and how many are fetched ahead. Their rows lie a power of
 * two apart, so that few of them fit into the first cache. */
#define CHUNK 8
#define AHEAD 8

typedef struct {
    Weight qkv[3], out, gate_up[2], down;
    const float *norm_in, *norm_out, *norm_q, *norm_k; /* the last two may be NULL */
    int64_t heads, kv_heads, size;                     /* size E of a head */
    float eps;
} Block;

typedef struct {
    int64_t count, longest, heads, kv_heads, size, wide, window;
} Sizes;

typedef struct {
    const Block *block;
    float *keys, *values; /* the layer's pool */
    int64_t window;       /* 0: all positions */
    float scale;
} Layer;

INLINE float dot_f(const float *a, const float *b, int64_t n) {
    vf sums[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) sums[j] += load_f(a + i + j * LANES) * load_f(b + i + j * LANES);
    float total = sum_f(sums[0] + sums[1] + sums[2] + sums[3]);
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

INLINE void norm_row(const float *x, const float *gain, float eps, int64_t n, float *out) {
    float scale = 1.0f / sqrtf(dot_f(x, x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * gain[i];
}

INLINE void silu_times(float *gate, const float *up, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf g = load_f(gate + i);
        store_f(gate + i, g / (exp_f(-g) + 1.0f) * load_f(up + i));
    }
    for (; i < n; i++) gate[i] = gate[i] / (expf(-gate[i]) + 1.0f) * up[i];
}

/* Rotary position embedding of one head: halves (a, b) -> (a cos - b sin, b cos + a sin). */
INLINE void turn(float *head, const float *cosine, const float *sine, int64_t size) {
    for (int64_t i = 0, half = size / 2; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

INLINE void place_heads(const Block *b, float *row, int64_t heads, const float *gain,
                        const float *cosine, const float *sine) {
    for (int64_t h = 0; h < heads; h++, row += b->size) {
        if (gain) norm_row(row, gain, b->eps, b->size, row);
        turn(row, cosine, sine, b->size);
    }
}

/* x [M, D], cosine and sine [M, E] -> q [M, H, E], k and v [M, G, E]. */
void block_in(const Block *b, const float *x, int64_t m, const float *cosine, const float *sine,
              float *q, float *k, float *v, float *work, int32_t rounds) {
    const int64_t width = b->qkv[0].columns;
    float *const y[3] = {q, k, v};
    for (int64_t t = 0; t < m; t++)
        norm_row(x + t * width, b->norm_in, b->eps, width, work + t * width);
    linears(b->qkv, 3, work, m, y, work + m * width, rounds);
    for (int64_t t = 0; t < m; t++) {
        const float *c = cosine + t * b->size, *s = sine + t * b->size;
        place_heads(b, q + t * b->qkv[0].rows, b->heads, b->norm_q, c, s);
        place_heads(b, k + t * b->qkv[1].rows, b->kv_heads, b->norm_k, c, s);
    }
}

/* x [M, D] and the attention's result a [M, H * E] -> y [M, D]. */
void block_out(const Block *b, const float *x, const float *a, int64_t m, float *y, float *work,
               int32_t rounds) {
    const int64_t width = b->out.rows, inner = b->down.columns;
    float *gate = work + m * width, *up = gate + m * inner, *rest = up + m * inner;
    float *const both[2] = {gate, up}, *const first[1] = {y}, *const last[1] = {work};
    linears(&b->out, 1, a, m, first, rest, rounds);
    for (int64_t t = 0; t < m; t++) {
        float *row = y + t * width;
        for (int64_t i = 0; i < width; i++) row[i] += x[t * width + i];
        norm_row(row, b->norm_out, b->eps, width, work + t * width);
    }
    linears(b->gate_up, 2, work, m, both, rest, rounds);
#pragma omp parallel for schedule(static) if (m > 1)
    for (int64_t t = 0; t < m; t++) silu_times(gate + t * inner, up + t * inner, inner);
    linears(&b->down, 1, gate, m, last, rest, rounds);
    for (int64_t i = 0; i < m * width; i++) y[i] += work[i];
}

/* The softmax over positions first .. length - 1 of one head's scores, in place. */
INLINE void softmax(float *row, int64_t first, int64_t length) {
    float most = row[first], total = 0;
    int64_t l = first;
    vf above = {0}, sums = {0};
    above += most;
    for (; l + LANES <= length; l += LANES) above = larger_f(above, load_f(row + l));
    most = max_f(above);
    for (; l < length; l++) most = row[l] > most ? row[l] : most;
    for (l = first; l + LANES <= length; l += LANES) {
        vf part = exp_f(load_f(row + l) - most);
        store_f(row + l, part);
        sums += part;
    }
    for (; l < length; l++) total += row[l] = expf(row[l] - most);
    total = 1.0f / (total + sum_f(sums));
    for (l = first; l < length; l++) row[l] *= total;
}

/* The key or value of a position soon to be read, if there is one. */
INLINE void fetch(const float *pool, const int64_t *place, int64_t l, int64_t length,
                  int64_t stride, int64_t size) {
    if (l >= length) return;
    for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(pool + place[l] * stride + i);
}

/* score[h][l] = scale * q_h k_l for the heads of a group and positions first .. length - 1, LANES of
 * them at a time. Position l lies at `place[l] * stride`. */
static void score_keys(const float *query, const float *keys, const int64_t *place, int64_t first,
                       int64_t length, const Sizes *s, float scale, float *score) {
    const int64_t group = s->heads / s->kv_heads, size = s->size, stride = s->kv_heads * size;
    for (int64_t l = first; l < length; l += LANES) {
        const int64_t left = length - l < LANES ? length - l : LANES;
        const float *key[LANES];
        for (int64_t j = 0; j < LANES; j++) {
            key[j] = keys + place[l + (j < left ? j : left - 1)] * stride;
            fetch(keys, place, l + AHEAD + j, length, stride, size);
        }
        for (int64_t h = 0; h < group; h++) {
            const float *q = query + h * size;
            vf sums[LANES] = {{0}};
            int64_t i = 0;
            for (; i + LANES <= size; i += LANES) {
                const vf part = load_f(q + i);
                UNROLL for (int j = 0; j < LANES; j++) sums[j] += part * load_f(key[j] + i);
            }
            vf total = sums_f(sums) * scale;
            for (; i < size; i++)
                for (int j = 0; j < LANES; j++) total[j] += scale * q[i] * key[j][i];
            memcpy(score + h * s->longest + l, &total, (size_t)left * sizeof *score);
        }
    }
}

/* out[0 .. vectors * LANES - 1] += sum_l score[l] v_l for positions from .. to - 1. */
INLINE void weigh(const float *score, const float *values, const int64_t *place, int64_t from,
                  int64_t to, int64_t stride, float *out, int vectors) {
    vf sums[8];
    UNROLL for (int i = 0; i < vectors; i++) sums[i] = load_f(out + i * LANES);
    for (int64_t l = from; l < to; l++) {
        const float *value = values + place[l] * stride;
        UNROLL for (int i = 0; i < vectors; i++) sums[i] += score[l] * load_f(value + i * LANES);
    }
    UNROLL for (int i = 0; i < vectors; i++) store_f(out + i * LANES, sums[i]);
}

/* out[h] = sum_l score[h][l] v_l; the values of `CHUNK` positions stay in the first cache for all
 * heads of the group. */
static void sum_values(const float *score, const float *values, const int64_t *place,
                       int64_t first, int64_t length, const Sizes *s, float *out) {
    const int64_t group = s->heads / s->kv_heads, wide = s->wide, stride = s->kv_heads * wide;
    memset(out, 0, (size_t)(group * wide) * sizeof *out);
    for (int64_t from = first; from < length; from += CHUNK) {
        const int64_t to = from + CHUNK < length ? from + CHUNK : length;
        for (int64_t l = to; l < to + CHUNK; l++) fetch(values, place, l, length, stride, wide);
        for (int64_t h = 0; h < group; h++) {
            const float *weight = score + h * s->longest;
            float *row = out + h * wide;
            int64_t i = 0;
            for (; i + 8 * LANES <= wide; i += 8 * LANES)
                weigh(weight, values + i, place, from, to, stride, row + i, 8);
            for (; i + LANES <= wide; i += LANES)
                weigh(weight, values + i, place, from, to, stride, row + i, 1);
            for (; i < wide; i++)
                for (int64_t l = from; l < to; l++) row[i] += weight[l] * values[place[l] * stride + i];
        }
    }
}

/* One query token each of `count` sequences. q [count][H][E]; keys [slots][G][E], values
 * [slots][G][F]; slots [count][longest], lengths [count]; window 0 = all; out [count][H][F];
 * scores [count][H][longest] is scratch. */
void attend(const float *q, const float *keys, const float *values, const int64_t *slots,
            const int64_t *lengths, float *out, float *scores, const Sizes *s, float scale) {
    const int64_t group = s->heads / s->kv_heads, window = s->window;
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < s->count * s->kv_heads; task++) {
        const int64_t t = task / s->kv_heads, g = task % s->kv_heads, length = lengths[t];
        const int64_t first = window && length > window ? length - window : 0;
        const int64_t *place = slots + t * s->longest, head = t * s->heads + g * group;
        float *score = scores + head * s->longest;
        score_keys(q + head * s->size, keys + g * s->size, place, first, length, s, scale, score);
        for (int64_t h = 0; h < group; h++) softmax(score + h * s->longest, first, length);
        sum_values(score, values + g * s->wide, place, first, length, s, out + head * s->wide);
    }
}

/* All blocks for one new token each of `m` sequences: x [M, D] in place, keys and values stored.
 * `work` holds M * (2 H E + 2 G E + H longest + D) floats and then what the blocks need. */
void decode(const Layer *layers, int64_t count, float *x, int64_t m, const float *cosine,
            const float *sine, const int64_t *slots, const int64_t *lengths, int64_t longest,
            float *work, int32_t rounds) {
    for (const Layer *layer = layers; layer < layers + count; layer++) {
        const Block *b = layer->block;
        const int64_t query = b->qkv[0].rows, kv = b->qkv[1].rows, width = b->out.rows;
        float *q = work, *a = q + m * query, *k = a + m * query, *v = k + m * kv, *y = v + m * kv;
        float *scores = y + m * width, *rest = scores + m * b->heads * longest;
        block_in(b, x, m, cosine, sine, q, k, v, rest, rounds);
        for (int64_t t = 0; t < m; t++) {
            int64_t slot = slots[t * longest + lengths[t] - 1];
            memcpy(layer->keys + slot * kv, k + t * kv, (size_t)kv * sizeof *k);
            memcpy(layer->values + slot * kv, v + t * kv, (size_t)kv * sizeof *v);
        }
        const Sizes s = {m, longest, b->heads, b->kv_heads, b->size, b->size, layer->window};
        attend(q, layer->keys, layer->values, slots, lengths, a, scores, &s, layer->scale);
        block_out(b, x, a, m, y, rest, rounds);
        memcpy(x, y, (size_t)(m * width) * sizeof *x);
    }
}
