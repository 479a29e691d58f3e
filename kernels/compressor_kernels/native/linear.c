/* y = x W^T with the weight packed, W[n][k] = s[n][g] * (q[n][k] - z[n][g]).
 *
 * Layout: LANES rows make a band, 32 columns a block. A band's blocks follow each other; a block of
 * b bits is b vectors, and lane r of a vector holds row r. The binary digits of b name the planes
 * (3 = 2 + 1), the most significant first; a plane of width p is p vectors of 8 / p fields, and
 * field f of vector v, in each of the four bytes of a lane, belongs to columns 4 i .. 4 i + 3 of
 * step i = v * (8 / p) + f. Scales and zero points are [band][group][LANES]. So a band is read
 * once, front to back, and unpacking is shifts and masks.
 *
 * Two ways: `exact` multiplies codes with float32 activations; `int8` rounds the activations of
 * each block to eight bits, x ~ d * t with d = max |x| / 127, and sums codes in integers. Both
 * take sum_k q x - z sum_k x for each block and scale it.
 *
 * Letters: N rows of the weight, K columns, M rows of x. */
#include "linear.h"

#define TILE 64      /* rows of x that share one unpacked block in the int8 way */
#define TILE_BYTES (160 << 10) /* and how much of the second level cache their blocks may take */
#define PREFETCH 1024          /* bytes ahead */
#define SPARE (64 << 10)
#define TOGETHER 4 /* bands that are made dense side by side */
enum { ANY = -1, FLOAT32, BFLOAT16, FLOAT16 }; /* how scales are stored */

typedef struct {
    float scale, sum; /* sum = scale * sum of codes */
    int8_t codes[BLOCK];
} Rounded;

INLINE vf load_scale(const Weight *w, int64_t index, int kind) {
    const uint16_t *half = (const uint16_t *)w->scale + index * LANES;
    if (kind == FLOAT16) return from_half(half);
    if (kind == BFLOAT16) return (vf)(CONVERT(load_h(half), vu) << 16);
    return load_f((const float *)w->scale + index * LANES);
}

INLINE vf load_zeros(const Weight *w, int64_t index, int bias) {
    vf none = {0};
    if (!w->zeros) return none + (float)((1 << (w->bits - 1)) - bias);
    return CONVERT(CONVERT(load_b(w->zeros + index * LANES), vi), vf) - (float)bias;
}

INLINE void unpack(const uint8_t *stream, vu *q, int bits, int bias) {
    int low = bits;
    UNROLL for (int i = 0; i < STEPS; i++) q[i] = (vu){0};
    UNROLL for (int width = 8; width; width >>= 1) {
        if (!(bits & width)) continue;
        const int fields = 8 / width;
        const uint32_t mask = width == 8 ? ~0u : ((1u << width) - 1) * 0x01010101u;
        low -= width;
        UNROLL for (int i = 0; i < STEPS; i++) {
            vu v = load_u(stream + (i / fields) * VECTOR_BYTES);
            q[i] |= ((v >> (width * (i % fields))) & mask) << low;
        }
        stream += width * VECTOR_BYTES;
    }
    if (bias) UNROLL for (int i = 0; i < STEPS; i++) q[i] ^= 0x80808080u;
}

/* Every line of the block `PREFETCH` bytes ahead: the processor's own prefetch is not enough. */
INLINE void prefetch(const uint8_t *stream, int bits) {
    for (int line = 0; line < bits * VECTOR_BYTES; line += 64)
        __builtin_prefetch(stream + PREFETCH + line);
}

INLINE void store_band(const Weight *w, int64_t band, float *y, vf value) {
    int64_t row = band * LANES;
    if (w->bias) {
        float bias[LANES] = {0};
        for (int64_t i = 0; i < LANES && row + i < w->rows; i++) bias[i] = w->bias[row + i];
        value += load_f(bias);
    }
    if (row + LANES <= w->rows) store_f(y + row, value);
    else for (int64_t i = 0; row + i < w->rows; i++) y[row + i] = value[i];
}

/* ---------------------------------------------------------------- activations in eight bits */

static void round_block(const float *x, int64_t count, Rounded *out) {
    float padded[BLOCK] = {0};
    int32_t codes[BLOCK];
    vf v[BLOCK / LANES], most = {0}, bad = {0};
    if (count < BLOCK) x = memcpy(padded, x, (size_t)count * sizeof *x);
    UNROLL for (int i = 0; i < BLOCK / LANES; i++) {
        v[i] = load_f(x + i * LANES);
        vf size = (vf)((vu)v[i] & 0x7fffffffu);
        most = larger_f(size, most);
        bad += v[i] * 0.0f; /* NaN where x is NaN or infinite: the scale carries it on */
    }
    float largest = max_f(most), inverse = largest > 0 ? 127.0f / largest : 0.0f;
    vi total = {0};
    UNROLL for (int i = 0; i < BLOCK / LANES; i++) {
        vi code = (vi)(v[i] * inverse + 0x1.8p23f) - 0x4b400000; /* rounds to nearest */
        memcpy(codes + i * LANES, &code, sizeof code);
        total += code;
    }
    for (int i = 0; i < BLOCK; i++) out->codes[i] = (int8_t)codes[i];
    out->scale = largest / 127.0f + sum_f(bad);
    out->sum = out->scale * sum_f(CONVERT(total, vf));
}

/* Bands `band` and, of two streams, `band + apart`: one stream alone leaves the memory waiting.
 * x: the blocks of `count` rows, [blocks][count]. `kind`: that of all scales of a symmetric weight, a
 * constant that keeps questions out of the loop, or ANY. */
INLINE void int8_tile(const Weight *w, const Rounded *x, float *y, int64_t band, int64_t apart,
                      int count, int bits, int kind) {
    const int streams = apart ? 2 : 1;
    const int bias = BIAS(bits);
    const int64_t groups = (w->blocks + w->group_blocks - 1) / w->group_blocks;
    const uint8_t *stream[2];
    int64_t group = band * groups, left = 0;
    vf sum[TILE], scale[2], zero[2];
    for (int m = 0; m < streams * count; m++) sum[m] = (vf){0};
    for (int s = 0; s < streams; s++)
        zero[s] = (vf){0} + (float)((1 << (bits - 1)) - bias),
        stream[s] = w->stream + (band + s * apart) * w->blocks * bits * VECTOR_BYTES;
    for (int64_t k = 0; k < w->blocks; k++, x += count, left--) {
        if (left == 0) {
            UNROLL for (int s = 0; s < streams; s++) {
                int64_t at = group + s * apart * groups;
                scale[s] = load_scale(w, at, kind == ANY ? w->scale_kind : kind);
                if (kind == ANY) zero[s] = load_zeros(w, at, bias);
            }
            group++;
            left = w->group_blocks;
        }
        UNROLL for (int s = 0; s < streams; s++) {
            vu q[STEPS];
            unpack(stream[s], q, bits, bias);
            stream[s] += bits * VECTOR_BYTES;
            prefetch(stream[s], bits);
            for (int m = 0; m < count; m++) {
                vf dot = CONVERT(dot_block(q, x[m].codes, bits), vf);
                sum[s * count + m] += scale[s] * (dot * x[m].scale - zero[s] * x[m].sum);
            }
        }
    }
    for (int s = 0; s < streams; s++)
        for (int m = 0; m < count; m++)
            store_band(w, band + s * apart, y + m * w->rows, sum[s * count + m]);
}

/* ---------------------------------------------------------------- activations in float32 */

/* x of `count` rows side by side: [K][count], and the sums of the blocks behind, [blocks][count].
 * Byte j of a lane is multiplied in its place, 256^j too large, so x is made as much smaller. */
static void spread(const Weight *w, const float *x, int count, float *out) {
    static const float place[4] = {1.0f, 0x1p-8f, 0x1p-16f, 1.0f};
    float *sums = out + w->blocks * BLOCK * count;
    for (int m = 0; m < count; m++, x += w->columns)
        for (int64_t k = 0; k < w->blocks; k++) {
            float total = 0;
            for (int i = 0; i < BLOCK; i++) {
                int64_t at = k * BLOCK + i;
                float value = at < w->columns ? x[at] : 0;
                out[at * count + m] = value * place[i % 4];
                total += value;
            }
            sums[k * count + m] = total;
        }
}

INLINE void exact_tile(const Weight *w, const float *x, float *y, int64_t band, int count,
                       int bits) {
    const uint8_t *stream = w->stream + band * w->blocks * bits * VECTOR_BYTES;
    const float *sums = x + w->blocks * BLOCK * count;
    const int64_t groups = (w->blocks + w->group_blocks - 1) / w->group_blocks;
    int64_t group = band * groups, left = 0;
    vf sum[8], scale = {0}, zero = {0};
    UNROLL for (int m = 0; m < count; m++) sum[m] = (vf){0};
    for (int64_t k = 0; k < w->blocks; k++, left--) {
        vu q[STEPS];
        vf part[8]; /* a row of x has several sums, or each would wait for the one before */
        unpack(stream, q, bits, 0);
        stream += bits * VECTOR_BYTES;
        prefetch(stream, bits);
        UNROLL for (int i = 0; i < 8; i++) part[i] = (vf){0};
        UNROLL for (int i = 0; i < STEPS; i++)
            UNROLL for (int j = 0; j < 4; j++, x += count) {
                vu field = j == 3 ? q[i] >> 24 : q[i] & (255u << (8 * j));
                vf value = CONVERT((vi)field, vf);
                UNROLL for (int m = 0; m < count; m++)
                    part[(m + (4 * i + j) * count) % 8] += value * x[m];
            }
        if (left == 0) {
            scale = load_scale(w, group, w->scale_kind);
            zero = load_zeros(w, group++, 0);
            left = w->group_blocks;
        }
        UNROLL for (int i = 7; i >= count; i--) part[i % count] += part[i];
        UNROLL for (int m = 0; m < count; m++) sum[m] += scale * (part[m] - zero * sums[m]);
        sums += count;
    }
    UNROLL for (int m = 0; m < count; m++) store_band(w, band, y + m * w->rows, sum[m]);
}

/* Bands `from` .. `to` - 1 of those that begin at `first`, side by side so that whole lines of `out`
 * are written at a time. */
INLINE void expand_bands(const Weight *w, int64_t first, int64_t from, int64_t to, int64_t width,
                         float *out, int bits) {
    const int64_t groups = (w->blocks + w->group_blocks - 1) / w->group_blocks;
    for (int64_t k = 0; k < w->blocks; k++)
        for (int64_t band = from; band < to; band++) {
            vu q[STEPS];
            unpack(w->stream + ((first + band) * w->blocks + k) * bits * VECTOR_BYTES, q, bits, 0);
            const int64_t group = (first + band) * groups + k / w->group_blocks;
            vf scale = load_scale(w, group, w->scale_kind), zero = load_zeros(w, group, 0);
            float *to_block = out + k * BLOCK * width + band * LANES;
            const int64_t left = w->columns - k * BLOCK, count = left < BLOCK ? left : BLOCK;
            UNROLL for (int i = 0; i < STEPS; i++)
                UNROLL for (int j = 0; j < 4; j++) {
                    if (4 * i + j >= count) break;
                    vf code = CONVERT((vi)((q[i] >> (8 * j)) & 255), vf);
                    store_f(to_block + (4 * i + j) * width, scale * (code - zero));
                }
        }
}

/* ---------------------------------------------------------------- one function for each width */

#define WIDTH(b)                                                                               \
    static void int8_##b(const Weight *w, const Rounded *x, float *y, int64_t band,            \
                         int64_t apart, int count) {                                           \
        int kind = w->zeros ? ANY : w->scale_kind;                                             \
        if (!apart) int8_tile(w, x, y, band, 0, count, b, ANY);                                \
        else if (kind == FLOAT16) int8_tile(w, x, y, band, apart, 1, b, FLOAT16);              \
        else if (kind == BFLOAT16) int8_tile(w, x, y, band, apart, 1, b, BFLOAT16);            \
        else int8_tile(w, x, y, band, apart, 1, b, ANY);                                       \
    }                                                                                          \
    static void exact_##b(const Weight *w, const float *x, float *y, int64_t band, int count) { \
        if (count == 1) exact_tile(w, x, y, band, 1, b);                                       \
        else if (count == 2) exact_tile(w, x, y, band, 2, b);                                  \
        else if (count == 4) exact_tile(w, x, y, band, 4, b);                                  \
        else exact_tile(w, x, y, band, 8, b);                                                  \
    }                                                                                          \
    static void expand_##b(const Weight *w, int64_t first, int64_t from, int64_t to,           \
                           int64_t width, float *out) {                                        \
        expand_bands(w, first, from, to, width, out, b);                                       \
    }
WIDTH(2) WIDTH(3) WIDTH(4) WIDTH(5) WIDTH(6) WIDTH(7) WIDTH(8)

typedef void Int8(const Weight *, const Rounded *, float *, int64_t, int64_t, int);
typedef void Expand(const Weight *, int64_t, int64_t, int64_t, int64_t, float *);
typedef void Exact(const Weight *, const float *, float *, int64_t, int);
static Int8 *const INT8[] = {int8_2, int8_3, int8_4, int8_5, int8_6, int8_7, int8_8};
static Exact *const EXACT[] = {exact_2, exact_3, exact_4, exact_5, exact_6, exact_7, exact_8};
static Expand *const EXPAND[] = {expand_2, expand_3, expand_4, expand_5,
                                 expand_6, expand_7, expand_8};

static void int8_linears(const Weight *w, int many, const float *x, int64_t m, float *const *y,
                         Rounded *rounded) {
    const int64_t blocks = w->blocks, columns = w->columns;
    int64_t tile = TILE_BYTES / (blocks * (int64_t)sizeof *rounded);
    tile = tile > TILE ? TILE : tile < 8 ? 8 : tile;
#pragma omp parallel if (m * w->rows * columns > SERIAL)
    {
#pragma omp for schedule(static)
        for (int64_t at = 0; at < m * blocks; at++) {
            int64_t row = at / blocks, k = at % blocks, left = columns - k * BLOCK;
            int64_t first = row / tile * tile, count = m - first < tile ? m - first : tile;
            round_block(x + row * columns + k * BLOCK, left < BLOCK ? left : BLOCK,
                        rounded + first * blocks + k * count + row - first);
        }
        for (int64_t row = 0; row < m; row += tile)
            for (int i = 0; i < many; i++) {
                int64_t bands = (w[i].rows + LANES - 1) / LANES;
                int count = (int)(m - row < tile ? m - row : tile);
                int64_t tasks = count == 1 ? (bands + 1) / 2 : bands;
#pragma omp for schedule(static) nowait
                for (int64_t band = 0; band < tasks; band++)
                    INT8[w[i].bits - 2](w + i, rounded + row * blocks, y[i] + row * w[i].rows,
                                        band, band + tasks < bands ? tasks : 0, count);
            }
    }
}

/* Rows of the tile that starts at `row`: eights, then at most one each of 4, 2 and 1. */
INLINE int rows_at(int64_t m, int64_t row) {
    return m - row >= 8 ? 8 : m - row >= 4 ? 4 : m - row >= 2 ? 2 : 1;
}

static void exact_linears(const Weight *w, int many, const float *x, int64_t m, float *const *y,
                          float *work) {
    const int64_t each = w->blocks * (BLOCK + 1);
    const int64_t tiles = m / 8 + __builtin_popcountll((uint64_t)m % 8);
    int64_t fit = 2 * TILE_BYTES / (each * (int64_t)sizeof *work) / 8 * 8;
    fit = fit < 8 ? 8 : fit;
#pragma omp parallel if (m * w->rows * w->columns > SERIAL)
    {
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t row = 0;
            for (int64_t t = 0; t < tile; t++) row += rows_at(m, row);
            spread(w, x + row * w->columns, rows_at(m, row), work + row * each);
        }
        for (int64_t first = 0; first < m; first += fit)
            for (int i = 0; i < many; i++) {
                int64_t bands = (w[i].rows + LANES - 1) / LANES;
                int64_t end = first + fit < m ? first + fit : m;
#pragma omp for schedule(static) nowait
                for (int64_t band = 0; band < bands; band++)
                    for (int64_t row = first; row < end; row += rows_at(m, row))
                        EXACT[w[i].bits - 2](w + i, work + row * each, y[i] + row * w[i].rows,
                                             band, rows_at(m, row));
            }
    }
}

void linears(const Weight *w, int many, const float *x, int64_t m, float *const *y, void *work,
             int rounds) {
    if (rounds) int8_linears(w, many, x, m, y, work);
    else exact_linears(w, many, x, m, y, work);
}

/* ---------------------------------------------------------------- what Python calls */

const char *isa(void) { return ISA; }
int lanes(void) { return LANES; }
int spare_bytes(void) { return SPARE; }

/* y [M, N] = x [M, K] W^T + bias. `work` holds M * blocks * 40 bytes (int8) or 132 (exact); it may be
 * NULL for `SPARE` bytes: few rows need no allocation, which would take a tenth of their time. */
void linear(const Weight *w, const float *x, int64_t m, float *y, void *work, int32_t rounds) {
    _Alignas(64) uint8_t spare[SPARE];
    linears(w, 1, x, m, &y, work ? work : spare, rounds);
}

/* W of `bands` bands from `first` on, dense and transposed: out [K][width], width >= bands * LANES. */
void expand(const Weight *w, int64_t first, int64_t bands, int64_t width, float *out) {
#pragma omp parallel for schedule(static) if (bands * LANES * w->columns > SERIAL)
    for (int64_t from = 0; from < bands; from += TOGETHER) {
        int64_t to = from + TOGETHER < bands ? from + TOGETHER : bands;
        EXPAND[w->bits - 2](w, first, from, to, width, out);
    }
}

/* From a checkpoint's packed words [N][words], rows of b-bit codes with the first in the lowest
 * bits, to the layout above: [bands][blocks][bits][LANES * 4]. Padding has code 0. */
void pack(const uint32_t *packed, uint8_t *stream, int64_t words, int64_t rows, int64_t columns,
          int32_t bits) {
    const int64_t bands = (rows + LANES - 1) / LANES, blocks = (columns + BLOCK - 1) / BLOCK;
    memset(stream, 0, (size_t)(bands * blocks * bits * VECTOR_BYTES));
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *band = stream + row / LANES * blocks * bits * VECTOR_BYTES + row % LANES * 4;
        for (int64_t k = 0; k < columns; k++) {
            int64_t bit = k * bits, word = bit / 32;
            uint64_t pair = packed[row * words + word];
            if (bit % 32 + bits > 32) pair |= (uint64_t)packed[row * words + word + 1] << 32;
            uint32_t code = (uint32_t)(pair >> (bit % 32)) & ((1u << bits) - 1);
            uint8_t *vector = band + k / BLOCK * bits * VECTOR_BYTES + k % 4;
            int step = (int)(k % BLOCK / 4), low = bits;
            for (int width = 8; width; width >>= 1) {
                if (!(bits & width)) continue;
                low -= width;
                uint32_t field = (code >> low) & ((1u << width) - 1);
                vector[step / (8 / width) * VECTOR_BYTES] |= field << (width * (step % (8 / width)));
                vector += width * VECTOR_BYTES;
            }
        }
    }
}
