/* MX's scales in Blackwell's order. */
#ifndef MT_KERNELS_CUDA_MXSCALE_CUH
#define MT_KERNELS_CUDA_MXSCALE_CUH

#include "kernels/cuda/cuda.h"
#include "kernels/mxscale.h"

#ifdef __cplusplus
extern "C" {
#endif

/* to (=) [mt_mx_scales_bytes(s)], aligned to 4: padding within an operand's tiles is zero; with
 * groups, tiles past the last are left as they are. On the backend's stream, any GPU. Errors:
 * MT_EDEVICE. */
mt_err mt_cuda_mx_scales(struct mt_backend *be, const struct mt_mx_scales *s, uint8_t *to);

#ifdef __cplusplus
}
#endif

#endif
