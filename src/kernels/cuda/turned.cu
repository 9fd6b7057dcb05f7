#include "kernels/cuda/turned.cuh"

#include "kernels/cuda/quantize_tile.cuh"

/* More experts than this holds are turned one after another. */
enum { TURNED_MOST = 128 << 20 };

struct mt_cuda_turned mt_cuda_turned_of(int64_t matrices, int64_t n, int64_t k) {
  struct mt_cuda_turned t = {.at_once = 1, .matrix_bytes = (size_t)(n * k)};
  size_t scales = (size_t)(div_up(n, TILE) * div_up(k, TILE)) * sizeof(float);
  if (t.matrix_bytes > 0 && (int64_t)(TURNED_MOST / t.matrix_bytes) > 1)
    t.at_once = (int64_t)(TURNED_MOST / t.matrix_bytes);
  if (t.at_once > matrices) t.at_once = matrices;
  t.scales_at = ((size_t)t.at_once * t.matrix_bytes + 255) / 256 * 256;
  t.bytes = t.scales_at + (size_t)t.at_once * scales;
  return t;
}

/* A tile of 128 x 128 bytes of matrix blockIdx.z and its scale. Widths are multiples of 16, so that
 * four neighbours are all there or none. */
__global__ void __launch_bounds__(THREADS)
    turn_tiles(const uint8_t *from, const float *scale, int64_t n, int64_t k, uint8_t *to,
               float *to_scale) {
  extern __shared__ __align__(16) uint32_t turned_tile[];
  int64_t row0 = (int64_t)blockIdx.y * TILE, col0 = (int64_t)blockIdx.x * TILE, g = blockIdx.z;
  int64_t tall = gridDim.y, broad = gridDim.x;
  int lane = threadIdx.x % 32, begin = threadIdx.x / 32 * WARP_ROWS;
  int rows = (int)min((int64_t)TILE, n - row0), cols = (int)min((int64_t)TILE, k - col0);
  uint32_t word[4][4];
  from += (g * n + row0 + begin) * k + col0 + lane * 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t in[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      bool there = begin + 4 * i + r < rows && lane * 4 < cols;
      in[r] = there ? *(const uint32_t *)(from + (4 * i + r) * k) : 0;
    }
    uint32_t low[2] = {__byte_perm(in[0], in[1], 0x5140), __byte_perm(in[2], in[3], 0x5140)};
    uint32_t high[2] = {__byte_perm(in[0], in[1], 0x7362), __byte_perm(in[2], in[3], 0x7362)};
    word[i][0] = __byte_perm(low[0], low[1], 0x5410);
    word[i][1] = __byte_perm(low[0], low[1], 0x7632);
    word[i][2] = __byte_perm(high[0], high[1], 0x5410);
    word[i][3] = __byte_perm(high[0], high[1], 0x7632);
  }
  if (threadIdx.x == 0)
    to_scale[(g * broad + blockIdx.x) * tall + blockIdx.y] =
        scale[(g * tall + blockIdx.y) * broad + blockIdx.x];
  write_turned(turned_tile, word, to + (g * k + col0) * n + row0, n, rows, cols);
}

mt_err mt_cuda_turn(struct mt_backend *be, const struct mt_qtensor *w, int64_t first,
                    const struct mt_qtensor *to) {
  int last = w->rank - 1;
  int64_t n = w->dim[last - 1], k = w->dim[last], count = to->rank == 3 ? to->dim[0] : 1;
  int64_t tall = div_up(n, TILE), broad = div_up(k, TILE);
  if (count == 0) return MT_OK;
  turn_tiles<<<dim3((unsigned)broad, (unsigned)tall, (unsigned)count), THREADS,
               TILE * TURNED_WORDS * sizeof(uint32_t), mt_cuda_of(be)->stream>>>(
      w->row + first * n * k, (const float *)w->row_scale + first * tall * broad, n, k, to->col,
      (float *)to->col_scale);
  return mt_cuda_launched("turn");
}
