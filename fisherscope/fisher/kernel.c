/* Sums over examples of squared products,  score += sum_n (left_n^T right_n)^2,  in float32.

   A tile of ROWS x COLUMNS entries of one example's product lives in registers until all its rows are through; then it
   is squared and added to the tile's sums, in the first cache. So no product reaches memory, and the score is touched
   once. Both factors are packed tile by tile: the innermost loop reads them one number after the other.

   compiled.py builds this for the machine it runs on. */

#include <omp.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) /* of 32 registers 24 hold the tile */
enum { LANES = 16, VECTORS = 2, ROWS = 12 };
#elif defined(__AVX2__) && defined(__FMA__) /* of 16 registers 12 */
enum { LANES = 8, VECTORS = 2, ROWS = 6 };
#else
#error "without wide vectors this is no faster than the matrix products of torch"
#endif

enum { COLUMNS = LANES * VECTORS, CACHE = 1 << 18, MOST_ROWS = 2048, MOST_PACKED = 1 << 22 };
typedef float vector __attribute__((vector_size(4 * LANES)));

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

/* One tile's columns of a matrix, row after row; columns that it does not have are 0. */
static inline void pack(float *packed, const float *from, int64_t rows, int64_t stride, int64_t columns,
                        const int64_t tile) {
    if (columns >= tile) /* a size that the compiler knows: one or two instructions a row */
        for (int64_t t = 0; t < rows; t++) memcpy(packed + t * tile, from + t * stride, tile * sizeof(float));
    else
        for (int64_t t = 0; t < rows; t++) {
            memcpy(packed + t * tile, from + t * stride, columns * sizeof(float));
            memset(packed + t * tile + columns, 0, (tile - columns) * sizeof(float));
        }
}

/* Example n has the rows offsets[n]..offsets[n + 1], at least one, counted from the first example's.
   Not inlined: the sums would be moved to registers, of which there are none left. */
__attribute__((noinline)) static void add_tile(vector *sums, const float *left, const vector *right,
                                               const int64_t *offsets, int64_t examples) {
    for (int64_t n = 0; n < examples; n++) {
        vector product[ROWS][VECTORS] = {};
        int64_t t = offsets[n] - offsets[0];
        do {
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++) product[r][v] += left[t * ROWS + r] * right[t * VECTORS + v];
        } while (++t < offsets[n + 1] - offsets[0]);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sums[r * VECTORS + v] += product[r][v] * product[r][v];
    }
}

typedef struct {
    float *score; /* [outputs, inputs] */
    int64_t score_stride, outputs, inputs;
    const float *left, *right; /* [rows, outputs], [rows, inputs] */
    int64_t left_stride, right_stride;
} problem;

/* The tiles first..last of the rows of the score, from rows packed as tiles of left and of right. */
static void add_tiles(const problem *p, const float *lefts, const float *rights, const int64_t *offsets,
                      int64_t examples, int64_t first, int64_t last) {
    int64_t rows = offsets[examples] - offsets[0];
    for (int64_t j = 0; j * COLUMNS < p->inputs; j++)
        for (int64_t i = first; i < last; i++) {
            vector sums[ROWS * VECTORS] = {};
            const float *left = lefts + (i - first) * ROWS * rows, *right = rights + j * COLUMNS * rows;
            add_tile(sums, left, (const vector *)right, offsets, examples);
            float *corner = p->score + i * ROWS * p->score_stride + j * COLUMNS;
            for (int64_t r = 0; r < least(p->outputs - i * ROWS, ROWS); r++)
                for (int64_t c = 0; c < least(p->inputs - j * COLUMNS, COLUMNS); c++)
                    corner[r * p->score_stride + c] += ((const float *)sums)[r * COLUMNS + c];
        }
}

/* How many of the examples are done at once, from the first: so many rows that right's stay in the cache, or one. */
static int64_t group(const int64_t *offsets, int64_t examples, int64_t inputs) {
    int64_t count = 1, rows = least(MOST_ROWS, MOST_PACKED / inputs);
    while (count < examples && offsets[count + 1] - offsets[0] <= rows) count++;
    return count;
}

/* Tiles of left that are packed at once: few enough for the cache, and that the last thread is not far behind. */
static int64_t height_of(int64_t rows, int64_t outputs, int threads) {
    int64_t height = CACHE / (rows * ROWS * (int64_t)sizeof(float));
    return most(least(height, tiles(outputs, ROWS) / (4 * threads)), 1);
}

static int64_t right_size(int64_t rows, int64_t inputs) { return tiles(inputs, COLUMNS) * COLUMNS * rows; }
static int64_t left_size(int64_t rows, int64_t outputs, int threads) {
    return tiles(height_of(rows, outputs, threads) * ROWS * rows, LANES) * LANES;
}

static void add_examples(const problem *p, const int64_t *offsets, int64_t examples, float *scratch, int threads) {
    int64_t rows = offsets[examples] - offsets[0], across = tiles(p->inputs, COLUMNS), down = tiles(p->outputs, ROWS);
    int64_t height = height_of(rows, p->outputs, threads), own = left_size(rows, p->outputs, threads);
    float *rights = scratch, *lefts_of_all = scratch + right_size(rows, p->inputs);
#pragma omp parallel num_threads(threads)
    {
        float *lefts = lefts_of_all + omp_get_thread_num() * own;
#pragma omp for
        for (int64_t j = 0; j < across; j++) {
            const float *from = p->right + offsets[0] * p->right_stride + j * COLUMNS;
            pack(rights + j * COLUMNS * rows, from, rows, p->right_stride, p->inputs - j * COLUMNS, COLUMNS);
        }
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < down; first += height) {
            int64_t last = least(first + height, down);
            for (int64_t i = first; i < last; i++) {
                const float *from = p->left + offsets[0] * p->left_stride + i * ROWS;
                pack(lefts + (i - first) * ROWS * rows, from, rows, p->left_stride, p->outputs - i * ROWS, ROWS);
            }
            add_tiles(p, lefts, rights, offsets, examples, first, last);
        }
    }
}

/* The numbers that add_squared_products needs as scratch, which begins on a cache line. */
int64_t scratch_size(int64_t outputs, int64_t inputs, const int64_t *offsets, int64_t examples, int threads) {
    int64_t size = 0;
    for (int64_t count, start = 0; start < examples; start += count) {
        count = group(offsets + start, examples - start, inputs);
        int64_t rows = offsets[start + count] - offsets[start];
        size = most(size, right_size(rows, inputs) + threads * left_size(rows, outputs, threads));
    }
    return size;
}

void add_squared_products(float *score, int64_t score_stride, int64_t outputs, int64_t inputs, const float *left,
                          int64_t left_stride, const float *right, int64_t right_stride, const int64_t *offsets,
                          int64_t examples, float *scratch, int threads) {
    problem p = {score, score_stride, outputs, inputs, left, right, left_stride, right_stride};
    for (int64_t count, start = 0; start < examples; start += count) {
        count = group(offsets + start, examples - start, inputs);
        add_examples(&p, offsets + start, count, scratch, threads);
    }
}
