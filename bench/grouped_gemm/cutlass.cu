/* CUTLASS 4's grouped products for Hopper (ptr-array, TMA, wgmma): each product by the fastest of
 * its designs and ways of walking the tiles, which prepare finds by the clock. The arrays of shapes
 * and pointers are made by the host beforehand, which a model would have to make on the device.
 * bench/get_cutlass.sh fetches the headers. */
#include "bench/common.cuh"
#include "bench/grouped_gemm/contender.h"

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_64;
using element = cutlass::bfloat16_t;
using problem = cute::Shape<int, int, int>;
using by_rows = cutlass::layout::RowMajor;
using by_columns = cutlass::layout::ColumnMajor;

struct cooperative {
  using main = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  using out = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};
struct pingpong {
  using main = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
  using out = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
};

/* The arrays that describe the groups with rows, on the device. */
struct arrays {
  int count;
  problem *shapes;
  const element **a, **b;
  void **c;
};

/* One launch that is ready, its design hidden. */
struct job {
  virtual cutlass::Status launch(cudaStream_t stream) = 0;
  virtual ~job() {}
  const char *name;
  char raster;
  int swizzle;
};

template <class T> static T *upload(const T *host, int n) {
  T *p = (T *)device_memory((size_t)n * sizeof *p);
  CHECK(cudaMemcpy(p, host, (size_t)n * sizeof *p, cudaMemcpyHostToDevice));
  return p;
}

template <class A, class B, class D, class Tile, class Schedule> struct design : job {
  using Cluster = cute::Shape<_2, _1, _1>;
  static constexpr int ALIGN_D = 16 / (int)sizeof(D);
  using Out = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, by_rows *, ALIGN_D, D,
      by_rows *, ALIGN_D, typename Schedule::out>::CollectiveOp;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, element, A *, 8, element, B *, 8, float,
      Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<(int)sizeof(typename Out::SharedStorage)>,
      typename Schedule::main>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<problem>, Main, Out>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using StrideA = typename Kernel::InternalStrideA;
  using StrideB = typename Kernel::InternalStrideB;
  using StrideD = typename Kernel::InternalStrideD;

  Gemm gemm;
  StrideA *stride_a;
  StrideB *stride_b;
  StrideD *stride_d;
  void *workspace;
  cutlass::Status made;

  design(const struct arrays &x, const problem *host, const char *name_, char raster_, int swizzle_,
         int sms) {
    StrideA sa[GROUPS_MOST];
    StrideB sb[GROUPS_MOST];
    StrideD sd[GROUPS_MOST];
    name = name_, raster = raster_, swizzle = swizzle_;
    for (int i = 0; i < x.count; i++) {
      auto [m, n, k] = host[i];
      sa[i] = cutlass::make_cute_packed_stride(StrideA{}, {m, k, 1});
      sb[i] = cutlass::make_cute_packed_stride(StrideB{}, {n, k, 1});
      sd[i] = cutlass::make_cute_packed_stride(StrideD{}, {m, n, 1});
    }
    stride_a = upload(sa, x.count), stride_b = upload(sb, x.count), stride_d = upload(sd, x.count);
    typename Gemm::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    args.problem_shape = {x.count, x.shapes, host};
    args.mainloop.ptr_A = x.a, args.mainloop.dA = stride_a;
    args.mainloop.ptr_B = x.b, args.mainloop.dB = stride_b;
    args.epilogue.thread.alpha = 1, args.epilogue.thread.beta = 0;
    args.epilogue.ptr_D = (D **)x.c, args.epilogue.dD = stride_d;
    args.hw_info.sm_count = sms;
    using order = cutlass::gemm::kernel::detail::RasterOrderOptions;
    args.scheduler.raster_order = raster == 'm' ? order::AlongM : order::AlongN;
    args.scheduler.max_swizzle_size = swizzle;
    workspace = device_memory(Gemm::get_workspace_size(args));
    made = gemm.can_implement(args);
    if (made == cutlass::Status::kSuccess) made = gemm.initialize(args, workspace);
  }
  cutlass::Status launch(cudaStream_t stream) override {
    return made == cutlass::Status::kSuccess ? gemm.run(stream) : made;
  }
  ~design() override {
    CHECK(cudaFree(stride_a));
    CHECK(cudaFree(stride_b));
    CHECK(cudaFree(stride_d));
    CHECK(cudaFree(workspace));
  }
};

enum { DESIGNS = 3, WALKS = 4 };
static const struct walk {
  char raster;
  int swizzle;
} walks[WALKS] = {{'m', 1}, {'m', 8}, {'n', 1}, {'n', 8}};

template <class A, class B, class D>
static struct job *make(const struct arrays &x, const problem *host, int which, struct walk w,
                        int sms) {
  using wide = cute::Shape<_128, _256, _64>;
  using high = cute::Shape<_256, _128, _64>;
  using small = cute::Shape<_128, _128, _64>;
  if (which == 0)
    return new design<A, B, D, wide, cooperative>(x, host, "coop 128x256", w.raster, w.swizzle,
                                                  sms);
  if (which == 1)
    return new design<A, B, D, high, cooperative>(x, host, "coop 256x128", w.raster, w.swizzle,
                                                  sms);
  return new design<A, B, D, small, pingpong>(x, host, "ping 128x128", w.raster, w.swizzle, sms);
}

struct state {
  struct arrays x;
  problem host[GROUPS_MOST];
  struct job *best;
  char text[32];
};

static struct job *job_of(const struct test *t, const struct state *s, int which, struct walk w,
                          int sms) {
  const struct arrays &x = s->x;
  if (t->p.kind == GROUPED_FWD)
    return make<by_rows, by_columns, element>(x, s->host, which, w, sms);
  if (t->p.kind == GROUPED_DGRAD) return make<by_rows, by_rows, element>(x, s->host, which, w, sms);
  if (t->p.c_dtype == MT_F32) return make<by_columns, by_rows, float>(x, s->host, which, w, sms);
  return make<by_columns, by_rows, element>(x, s->host, which, w, sms);
}

static void release(void *p) {
  struct state *s = (struct state *)p;
  delete s->best;
  CHECK(cudaFree(s->x.shapes));
  CHECK(cudaFree(s->x.a));
  CHECK(cudaFree(s->x.b));
  CHECK(cudaFree(s->x.c));
  delete s;
}

/* The less of two runs; infinite where it cannot run. */
static float time_of(struct job *j, cudaStream_t stream) {
  cudaEvent_t at[3];
  float least = INFINITY;
  for (int i = 0; i < 3; i++) CHECK(cudaEventCreate(&at[i]));
  CHECK(cudaEventRecord(at[0], stream));
  bool runs = true;
  for (int i = 0; i < 2 && runs; i++) {
    runs = j->launch(stream) == cutlass::Status::kSuccess;
    CHECK(cudaEventRecord(at[i + 1], stream));
  }
  CHECK(cudaStreamSynchronize(stream));
  for (int i = 0; i < 2 && runs; i++) {
    float ms;
    CHECK(cudaEventElapsedTime(&ms, at[i], at[i + 1]));
    least = fminf(least, ms);
  }
  for (int i = 0; i < 3; i++) CHECK(cudaEventDestroy(at[i]));
  return least;
}

static mt_err prepare(struct mt_backend *be, const struct test *t, void **result) {
  const struct mt_cuda *c = mt_cuda_of(be);
  *result = NULL;
  bool packed = t->p.ldc == t->p.n && t->p.ldb == (t->p.kind == GROUPED_FWD ? t->p.k : t->p.n);
  if (c->capability != 90 || t->p.accumulate || !packed) return MT_OK;
  struct state *s = new struct state();
  const element *a[GROUPS_MOST], *b[GROUPS_MOST];
  void *out[GROUPS_MOST];
  for (int g = 0; g < t->p.groups; g++) {
    struct mt_cuda_product d = bench_product_of(t, g);
    int i = s->x.count;
    if (d.m == 0 || d.k == 0) continue;
    s->host[i] = problem((int)d.m, (int)d.n, (int)d.k);
    a[i] = (const element *)d.a, b[i] = (const element *)d.b, out[i] = d.c;
    s->x.count++;
  }
  s->x.shapes = upload(s->host, s->x.count);
  s->x.a = upload(a, s->x.count), s->x.b = upload(b, s->x.count), s->x.c = upload(out, s->x.count);
  float least = INFINITY;
  for (int i = 0; i < DESIGNS * WALKS; i++) {
    struct job *j = job_of(t, s, i / WALKS, walks[i % WALKS], c->sm_count);
    float ms = time_of(j, c->stream);
    if (ms < least) {
      delete s->best;
      s->best = j, least = ms;
    } else {
      delete j;
    }
  }
  if (!s->best) {
    release(s);
    return MT_OK;
  }
  snprintf(s->text, sizeof s->text, "%s %c%d", s->best->name, s->best->raster, s->best->swizzle);
  *result = s;
  return MT_OK;
}

static mt_err run(struct mt_backend *be, const struct test *t, void *p) {
  struct state *s = (struct state *)p;
  cutlass::Status status = s->best->launch(mt_cuda_of(be)->stream);
  if (status != cutlass::Status::kSuccess)
    return mt_fail(MT_EDEVICE, "cutlass: %s", cutlassGetStatusString(status));
  return bench_zero_empty(be, t);
}

static const char *describe(const void *p) {
  return ((const struct state *)p)->text;
}

extern const struct contender bench_cutlass = {'x', "CUTLASS", prepare, run, release, describe};
