// SPDX-License-Identifier: Apache-2.0
//
// The two micro-kernels and the loops around them. R rows times N vectors of
// the result stay in registers; R and N are constants after inlining.

#define SWITCH_R(rows, CALL) \
  switch (rows) {            \
    case 6:                  \
      CALL(6);               \
      break;                 \
    case 4:                  \
      CALL(4);               \
      break;                 \
    case 2:                  \
      CALL(2);               \
      break;                 \
    default:                 \
      CALL(1);               \
  }

// The number of rows to do next: 6 while there are so many, then 4, 2, 1.
INLINE int64_t next_rows(int64_t left) {
  return left >= 6 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// c[R][16 * n, ld TILE] = a[R, depth] * b, where vector j of row k of b stands
// at b[j] + 16 * k: panels of 16 columns that may lie anywhere. a is read at i
// + 6 * k.
INLINE void score_tile(const int R, const int N, const float* a,
                       const float* const* b, float* c, int64_t depth) {
  vf acc[6][NV];
  const float* column[NV];
  for (int j = 0; j < N; j++) column[j] = b[j];
  for (int i = 0; i < R; i++)
    for (int j = 0; j < N; j++) acc[i][j] = v_set(0.0f);
  for (int64_t k = 0; k < depth; k++) {
    vf row[NV];
    for (int j = 0; j < N; j++) row[j] = v_load(column[j] + KP_PANEL * k);
    for (int i = 0; i < R; i++) {
      vf x = v_set(a[6 * k + i]);
      for (int j = 0; j < N; j++) acc[i][j] = v_fma(x, row[j], acc[i][j]);
    }
  }
  for (int i = 0; i < R; i++)
    for (int j = 0; j < N; j++) v_store(c + i * TILE + W * j, acc[i][j]);
}

// c[R][W * N] += a[R, depth] * b[depth][W * N], for `count` pieces of b after
// each other. a is read at row * i + column * k.
INLINE void sum_tile(const int R, const int N, const float* a, int64_t row,
                     int64_t column, const float* const* b, int64_t at,
                     int64_t count, int64_t depth, int64_t ldb, float* c,
                     int64_t ldc, int add) {
  vf acc[6][NV];
  for (int i = 0; i < R; i++)
    for (int j = 0; j < N; j++)
      acc[i][j] = add ? v_load(c + i * ldc + W * j) : v_set(0.0f);
  for (int64_t piece = 0; piece < count; piece++) {
    const float* p = b[piece] + at;
    for (int64_t k = 0; k < depth; k++, p += ldb, a += column) {
      vf line[NV];
      for (int j = 0; j < N; j++) line[j] = v_load(p + W * j);
      for (int i = 0; i < R; i++) {
        vf x = v_set(a[i * row]);
        for (int j = 0; j < N; j++) acc[i][j] = v_fma(x, line[j], acc[i][j]);
      }
    }
  }
  for (int i = 0; i < R; i++)
    for (int j = 0; j < N; j++) v_store(c + i * ldc + W * j, acc[i][j]);
}

// All columns of c for R rows: blocks of NV vectors, then what is left.
INLINE void sum_rows(const int R, const float* a, int64_t row, int64_t column,
                     const float* const* b, int64_t count, int64_t depth,
                     int64_t ldb, float* c, int64_t ldc, int64_t columns,
                     int add) {
#define PART(N) \
  sum_tile(R, N, a, row, column, b, j, count, depth, ldb, c + j, ldc, add)
  int64_t j = 0;
  for (; j + NV * W <= columns; j += NV * W) PART(NV);
  switch ((columns - j) / W) {
#if NV > 3
    case 3:
      PART(3);
      break;
    case 2:
      PART(2);
      break;
#endif
    case 1:
      PART(1);
      break;
    default:
      break;
  }
#undef PART
}

// c[rows][columns] (+)= a * b with a read at TILE * i + k (a tile as it lies),
// ...
static void KP(gemm_tile)(int64_t rows, const float* a, const float* const* b,
                          int64_t count, int64_t depth, int64_t ldb, float* c,
                          int64_t ldc, int64_t columns) {
  for (int64_t i = 0, r; i < rows; i += r) {
    r = next_rows(rows - i);
#define CALL(R)                                                              \
  sum_rows(R, a + i * TILE, TILE, 1, b, count, depth, ldb, c + i * ldc, ldc, \
           columns, 1)
    SWITCH_R(r, CALL)
#undef CALL
  }
}

// ... at i + TILE * k (a tile transposed), ...
static void KP(gemm_turned)(int64_t rows, const float* a, const float* b,
                            int64_t depth, int64_t ldb, float* c, int64_t ldc,
                            int64_t columns) {
  for (int64_t i = 0, r; i < rows; i += r) {
    r = next_rows(rows - i);
#define CALL(R) \
  sum_rows(R, a + i, 1, TILE, &b, 1, depth, ldb, c + i * ldc, ldc, columns, 1)
    SWITCH_R(r, CALL)
#undef CALL
  }
}

// ... and at lda * i + k, where c is overwritten and both b and c have rows of
// TILE.
static void KP(gemm_score)(int64_t rows, const float* a, int64_t lda,
                           const float* b, int64_t depth, float* c,
                           int64_t columns) {
  for (int64_t i = 0, r; i < rows; i += r) {
    r = next_rows(rows - i);
#define CALL(R)                                                            \
  sum_rows(R, a + i * lda, lda, 1, &b, 1, depth, TILE, c + i * TILE, TILE, \
           columns, 0)
    SWITCH_R(r, CALL)
#undef CALL
  }
}

// Like `sum_rows` with add, but a zero in a takes nothing from b: 0 times a NaN
// that the mask hides must stay 0. Slow, and used only where b has a NaN or
// infinity.
static void KP(gemm_careful)(int64_t rows, const float* a, int64_t row,
                             int64_t column, const float* const* b,
                             int64_t count, int64_t depth, int64_t ldb,
                             float* c, int64_t ldc, int64_t columns) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = 0; k < count * depth; k++) {
      float x = a[i * row + k * column];
      const float* line = b[k / depth] + (k % depth) * ldb;
      if (x != 0.0f)
        for (int64_t j = 0; j < columns; j++) c[i * ldc + j] += x * line[j];
    }
}

// 2^x, 0 below SMALLEST; relative error 1.5e-7. Minimax polynomial of degree 5
// on [-1/2, 1/2].
INLINE vf v_exp2(vf x) {
  x = v_clamp(x);
  vf r = v_round(x), f = x - r;
  vf p = v_set(1.3276472454890609e-3f);
  p = v_fma(p, f, v_set(9.675540961325169e-3f));
  p = v_fma(p, f, v_set(5.550713092088699e-2f));
  p = v_fma(p, f, v_set(2.4022120237350464e-1f));
  p = v_fma(p, f, v_set(6.931469440460205e-1f));
  p = v_fma(p, f, v_set(1.0000001192092896f));
  return v_scale(p, r, x);
}
