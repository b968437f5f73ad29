/* Sums over examples of squared products,  score += sum_n (left_n^T right_n)^2,  in float32.

   A tile of ROWS x COLUMNS entries of one example's product lives in registers until all its rows are through; then it
   is squared and added to the tile's sums, in the first cache. So no product reaches memory, and the score is touched
   once. Both factors are packed tile by tile: the innermost loop reads them one number after the other.

   compiled.py builds this for the machine it runs on. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) /* of 32 registers 24 hold the tile */
enum { LANES = 16, VECTORS = 2, ROWS = 12 };
#elif defined(__AVX2__) && defined(__FMA__) /* of 16 registers 12 */
enum { LANES = 8, VECTORS = 2, ROWS = 6 };
#else
#error "without wide vectors this is no faster than the matrix products of torch"
#endif

enum { COLUMNS = LANES * VECTORS, CACHE = 1 << 18, MOST_ROWS = 2048 };
typedef float vector __attribute__((vector_size(4 * LANES)));

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }
static float *room(int64_t numbers) { return aligned_alloc(64, tiles(numbers * sizeof(float), 64) * 64); }

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

/* Some examples; 0, or 1 if there is no memory to pack their rows in. */
static int add_examples(const problem *p, const int64_t *offsets, int64_t examples, int threads) {
    int64_t rows = offsets[examples] - offsets[0], across = tiles(p->inputs, COLUMNS), down = tiles(p->outputs, ROWS);
    int64_t height = most(CACHE / (rows * ROWS * (int64_t)sizeof(float)), 1);
    height = least(height, tiles(down, 4 * threads)); /* so that the last thread is not far behind */
    float *rights = room(across * COLUMNS * rows);
    int failed = 0;
    if (!rights) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *lefts = room(height * ROWS * rows);
        failed = !lefts;
#pragma omp for
        for (int64_t j = 0; j < across; j++) {
            const float *from = p->right + offsets[0] * p->right_stride + j * COLUMNS;
            pack(rights + j * COLUMNS * rows, from, rows, p->right_stride, p->inputs - j * COLUMNS, COLUMNS);
        }
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < down; first += height) {
            int64_t last = failed ? first : least(first + height, down);
            for (int64_t i = first; i < last; i++) {
                const float *from = p->left + offsets[0] * p->left_stride + i * ROWS;
                pack(lefts + (i - first) * ROWS * rows, from, rows, p->left_stride, p->outputs - i * ROWS, ROWS);
            }
            add_tiles(p, lefts, rights, offsets, examples, first, last);
        }
        free(lefts);
    }
    free(rights);
    return failed;
}

int add_squared_products(float *score, int64_t score_stride, int64_t outputs, int64_t inputs, const float *left,
                         int64_t left_stride, const float *right, int64_t right_stride, const int64_t *offsets,
                         int64_t examples, int threads) {
    problem p = {score, score_stride, outputs, inputs, left, right, left_stride, right_stride};
    for (int64_t end, start = 0; start < examples; start = end) {
        for (end = start + 1; end < examples && offsets[end + 1] - offsets[start] <= MOST_ROWS;) end++;
        if (add_examples(&p, offsets + start, end - start, threads)) return 1;
    }
    return 0;
}
