/* Dense products through cuBLASLt: what products.cu and tuning.cu share. */
#ifndef MT_KERNELS_CUDA_PRODUCTS_CUH
#define MT_KERNELS_CUDA_PRODUCTS_CUH

#include "kernels/cuda/device.cuh"

/* What a choice of algorithm depends on. Compared as bytes: make it with key_of alone. */
struct plan_key {
  int64_t m, n, k, lda, ldb, ldc;
  int32_t a_align, b_align, c_align;
  int32_t a_columns, b_columns, ab, c_dtype, workspace_bytes;
};
struct plan {
  struct plan_key key;
  bool filled, usable; /* not usable: cuBLASLt has nothing for it */
  bool settled;        /* algo is not looked for again */
  int tries;           /* to settle it */
  cublasLtMatmulDescOpaque_t op;
  cublasLtMatrixLayoutOpaque_t a, b, c;
  cublasLtMatmulAlgo_t algo;
};
/* A power of two of slots; a full neighbourhood loses its first entry, so that batches of ever new
 * lengths need no more memory. */
enum { PLAN_SLOTS = 1024, PLAN_PROBES = 8 };
/* What was found the fastest, for shapes that differ in little but the number of tokens. */
struct family {
  struct plan_key key; /* tokens: their bit length */
  bool filled;
  cublasLtMatmulAlgo_t algo;
};
enum { FAMILIES = 256 };
struct mt_cuda_plans {
  struct plan slot[PLAN_SLOTS];
  struct family family[FAMILIES];
  int family_count;
  unsigned long long *digest; /* device [2] */
};

/* Fills op, a, b, c from the key. */
cublasStatus_t lt_describe(struct plan *s);
/* The library's choices for a described plan, the likeliest first; how many there are. */
int lt_candidates(struct mt_cuda *c, struct plan *s, cublasLtMatmulHeuristicResult_t *found,
                  int most);
/* One product by an algorithm, on the backend's stream. */
cublasStatus_t lt_run(struct mt_backend *be, struct plan *s, const struct mt_cuda_product *p,
                      const cublasLtMatmulAlgo_t *algo);

/* Whether the fastest algorithm has been found before, for about as many tokens: then the plan is
 * described, usable and settled with it. Spares asking the library, which takes longer. */
bool lt_known(struct mt_cuda *c, struct plan *s);

/* Where a product is large enough to be worth it, sets s->algo to the fastest of the library's
 * choices that give the same bits as its first, measured on this product (p->c is written). Waits
 * for the stream when it measures; while a graph is made it does not, and tries again the next
 * time. Errors: MT_EDEVICE. */
mt_err lt_settle(struct mt_backend *be, struct plan *s, const struct mt_cuda_product *p);

#endif
