/* How fast the C kernels read a weight at one row, against loops that only read the same bytes.
 *
 *   gcc -std=gnu11 -O3 -march=native -Wno-psabi -fopenmp -I kernels/compressor_kernels/native \
 *       kernels/bench/read_bandwidth.c -o read_bandwidth
 *   OMP_NUM_THREADS=2 ./read_bandwidth 2048 2048 4      # rows, columns, bits; groups of 32
 *
 * Copies of the weight (160 MB) are rotated, so that no cache holds them. Everything takes turns;
 * medians of 200. `product` is the whole call: rounding x, forking, joining, storing y. */
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "linear.c"

#define TURNS 200
#define LARGE (512LL << 20)
enum { READ_1, READ_2, READ_4, PRODUCT, LARGE_4, WAYS };

static const char *const NAMES[] = {"read, 1 stream a thread", "read, 2 streams a thread",
                                    "read, 4 streams a thread", "product",
                                    "read half a GB, 4 streams"};
static volatile uint64_t sink; /* or the compiler would leave the reading out */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Sum n bytes; each thread reads `streams` places of its part by turns, two cache lines each. */
static void read_all(const uint8_t *data, int64_t n, int streams) {
#pragma omp parallel
    {
        const int64_t each = n / omp_get_num_threads() / streams / 128 * 128;
        const uint8_t *mine = data + omp_get_thread_num() * each * streams;
        vu sum = {0};
        for (int64_t i = 0; i < each; i += 128)
            for (int s = 0; s < streams; s++) {
                const uint8_t *at = mine + s * each + i;
                __builtin_prefetch(at + PREFETCH);
                __builtin_prefetch(at + PREFETCH + 64);
                UNROLL for (int v = 0; v < 128 / VECTOR_BYTES; v++)
                    sum += load_u(at + v * VECTOR_BYTES);
            }
        if (sum[0] == 123456789) sink++;
    }
}

int main(int count, char **arguments) {
    if (count != 4) return fprintf(stderr, "usage: read_bandwidth ROWS COLUMNS BITS\n"), 2;
    const int64_t rows = atoll(arguments[1]), columns = atoll(arguments[2]);
    const int bits = atoi(arguments[3]);
    const int64_t blocks = columns / BLOCK, bands = rows / LANES;
    const int64_t codes = bands * blocks * bits * VECTOR_BYTES, scales = bands * blocks * LANES * 2;
    const int64_t copies = 160000000 / (codes + scales) + 4;
    if (rows % LANES || columns % BLOCK || bits < 2 || bits > 8)
        return fprintf(stderr, "whole bands and blocks, 2 to 8 bits, please\n"), 2;
    uint8_t **stream = malloc((size_t)copies * sizeof *stream), *large = malloc(LARGE);
    uint16_t **scale = malloc((size_t)copies * sizeof *scale);
    float *x = malloc((size_t)columns * sizeof *x), *y = malloc((size_t)rows * sizeof *y);
    for (int64_t i = 0; i < copies; i++) {
        stream[i] = memset(malloc((size_t)codes), (int)i + 17, (size_t)codes);
        scale[i] = malloc((size_t)scales);
        for (int64_t j = 0; j < scales / 2; j++) scale[i][j] = 0x2000; /* 2^-7 */
    }
    memset(large, 1, LARGE);
    for (int64_t i = 0; i < columns; i++) x[i] = (float)(i * 37 % 101 - 50) * 0.01f;
    static double seconds[WAYS][TURNS];
    for (int turn = 0; turn < TURNS; turn++)
        for (int way = 0; way < WAYS; way++) {
            int64_t i = (turn + way * copies / WAYS) % copies; /* what no way has just read */
            Weight w = {stream[i], scale[i], NULL, NULL, rows, columns, blocks, 1, bits, FLOAT16};
            double start = now();
            if (way == PRODUCT) linear(&w, x, 1, y, NULL, 1);
            else if (way < PRODUCT) read_all(stream[i], codes, 1 << way);
            else if (turn % 10 == 0) read_all(large, LARGE, 4);
            else continue;
            seconds[way][way == LARGE_4 ? turn / 10 : turn] = now() - start;
        }
    for (int way = 0; way < WAYS; way++) {
        const int turns = way == LARGE_4 ? TURNS / 10 : TURNS;
        qsort(seconds[way], (size_t)turns, sizeof(double), by_size);
        const int64_t bytes = way == PRODUCT ? codes + scales : way == LARGE_4 ? LARGE : codes;
        const double middle = seconds[way][turns / 2];
        printf("%-26s %8.1f us %6.1f GB/s\n", NAMES[way], middle * 1e6, (double)bytes / middle / 1e9);
    }
    return 0;
}
