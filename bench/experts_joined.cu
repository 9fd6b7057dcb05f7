/* The experts' products joined with SwiGLU beside the two operations that each stands for: median
 * ms of CUDA events, TFLOP/s of the product; random normal data, rows shared evenly. experts_joined
 * [repetitions, default 20] */
#include "bench/common.cuh"

extern "C" {
#include "backend/experts.h"
}

__global__ void fill_ones(float *p, size_t n) {
  for (size_t i = threadIdx.x; i < n; i += blockDim.x) p[i] = 1;
}

static void *memory(struct mt_backend *be, size_t bytes) {
  void *p;
  OK(be->mem_alloc(be, bytes, &p));
  return p;
}
static struct mt_tensor normal(struct mt_backend *be, struct mt_tensor t, uint32_t seed,
                               float scale) {
  t.data = memory(be, mt_bytes(&t));
  fill_normal<<<1024, 256, 0, mt_cuda_of(be)->stream>>>((bf16 *)t.data, (size_t)mt_count(&t), seed,
                                                        scale);
  return t;
}

struct calls {
  struct mt_experts_up_fwd_args up;
  struct mt_experts_down_dgrad_args down;
};
enum way { UP, UP_APART, DOWN, DOWN_APART, WAYS };

static void run(struct mt_backend *be, const struct calls *c, int way) {
  struct mt_linear_fwd_args fwd = mt_experts_up_product(&c->up);
  struct mt_swiglu_fwd_args swiglu = mt_experts_up_swiglu(&c->up);
  struct mt_linear_dgrad_args dgrad = mt_experts_down_product(&c->down);
  struct mt_swiglu_bwd_args swiglu_bwd = mt_experts_down_swiglu(&c->down);
  if (way == UP) OK(be->ops.experts_up_fwd(be, &c->up));
  if (way == UP_APART) OK(be->ops.linear_fwd(be, &fwd));
  if (way == UP_APART) OK(be->ops.swiglu_fwd(be, &swiglu));
  if (way == DOWN) OK(be->ops.experts_down_dgrad(be, &c->down));
  if (way == DOWN_APART) OK(be->ops.linear_dgrad(be, &dgrad));
  if (way == DOWN_APART) OK(be->ops.swiglu_bwd(be, &swiglu_bwd));
}

static double median_ms(struct mt_backend *be, const struct calls *c, int way, int reps) {
  double s[100];
  for (int i = 0; i < reps / 2 + 1; i++) run(be, c, way); /* to the clock that lasts, too */
  for (int i = 0; i < reps; i++) {
    OK(be->stamp(be, 0));
    run(be, c, way);
    OK(be->stamp(be, 1));
    OK(be->stamp_read(be, 0, 1, &s[i]));
  }
  return 1e3 * median(s, reps);
}

static void one(int64_t rows, int64_t h, int64_t f, int experts, int reps) {
  struct mt_backend be;
  OK(mt_backend_create(&be, "cuda", 1));
  struct mt_limits l = {};
  l.tokens = rows, l.rows = rows, l.hidden = h, l.ffn = f, l.experts = experts, l.top_k = 1;
  l.vocab = 64, l.heads = 1, l.kv_heads = 1, l.head_dim = 64, l.act = MT_BF16;
  be.workspace_size_bytes = be.workspace_bytes(&be, &l);
  be.workspace = memory(&be, be.workspace_size_bytes);
  int32_t at[129], *offsets = (int32_t *)memory(&be, sizeof at);
  for (int g = 0; g <= experts; g++) at[g] = (int32_t)(rows * g / experts);
  OK(be.upload(&be, offsets, at, sizeof at));
  struct mt_tensor x = normal(&be, mt_mat(NULL, MT_BF16, rows, h), 1, 1);
  struct mt_tensor up = normal(&be, mt_cube(NULL, MT_BF16, experts, 2 * f, h), 2, 0.02f);
  struct mt_tensor down = normal(&be, mt_cube(NULL, MT_BF16, experts, h, f), 3, 0.02f);
  struct mt_tensor gu = normal(&be, mt_mat(NULL, MT_BF16, rows, 2 * f), 4, 1);
  struct mt_tensor dgu = normal(&be, mt_mat(NULL, MT_BF16, rows, 2 * f), 5, 1);
  struct mt_tensor hid = normal(&be, mt_mat(NULL, MT_BF16, rows, f), 6, 1);
  struct mt_tensor prob = mt_vec(memory(&be, (size_t)rows * 4), MT_F32, rows);
  struct mt_tensor dprob = mt_vec(memory(&be, (size_t)rows * 4), MT_F32, rows);
  fill_ones<<<1, 1024, 0, mt_cuda_of(&be)->stream>>>((float *)prob.data, (size_t)rows);
  struct calls c = {{x, up, offsets, prob, gu, hid}, {x, down, offsets, gu, prob, dgu, hid, dprob}};
  double ms[WAYS], tera = 2e-9 * (double)rows * (double)h * (double)f;
  for (int way = 0; way < WAYS; way++) ms[way] = median_ms(&be, &c, way, reps);
  printf("%3d x %5lld -> %5lld, %6lld rows | up %7.3f ms (%4.0f) apart %7.3f | down dgrad %7.3f ms "
         "(%4.0f) apart %7.3f\n",
         experts, (long long)h, (long long)f, (long long)rows, ms[UP], 2 * tera / ms[UP],
         ms[UP_APART], ms[DOWN], tera / ms[DOWN], ms[DOWN_APART]);
  fflush(stdout);
  struct mt_tensor all[] = {x, up, down, gu, dgu, hid, prob, dprob};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    be.mem_free(&be, all[i].data, mt_bytes(&all[i]));
  be.mem_free(&be, offsets, sizeof at);
  be.mem_free(&be, be.workspace, be.workspace_size_bytes);
  be.workspace = NULL;
  mt_backend_destroy(&be);
}

int main(int argc, char **argv) {
  int reps = argc > 1 ? atoi(argv[1]) : 20;
  if (reps < 1 || reps > 100) die("repetitions", "1 to 100");
  one(4096, 4096, 14336, 8, reps);
  one(16384, 4096, 14336, 8, reps);
  one(32768, 4096, 14336, 8, reps);
  one(65536, 2048, 768, 128, reps);
  return 0;
}
