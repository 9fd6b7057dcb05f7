/* Number formats. Conversions round to nearest even and keep NaN a NaN. */
#ifndef MT_BASE_DTYPE_H
#define MT_BASE_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* X(name, bytes, name in safetensors) */
#define MT_DTYPE_LIST(X)                                                                           \
  X(F32, 4, "F32")                                                                                 \
  X(BF16, 2, "BF16")                                                                               \
  X(F16, 2, "F16")                                                                                 \
  X(F64, 8, "F64")                                                                                 \
  X(I32, 4, "I32")                                                                                 \
  X(I64, 8, "I64")                                                                                 \
  X(U8, 1, "U8")

enum mt_dtype {
#define X(name, bytes, text) MT_##name,
  MT_DTYPE_LIST(X)
#undef X
      MT_DTYPE_COUNT
};

size_t mt_dtype_bytes(enum mt_dtype dtype);
const char *mt_dtype_name(enum mt_dtype dtype); /* as safetensors writes it */
/* MT_DTYPE_COUNT when unknown. */
enum mt_dtype mt_dtype_parse(const char *safetensors_name);

static inline float mt_bf16_to_f32(uint16_t x) {
  uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline uint16_t mt_f32_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  /* A NaN must not round up into infinity. */
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

float mt_f16_to_f32(uint16_t x);
uint16_t mt_f32_to_f16(float f);

/* count elements from src to dst (=), through float32 unless the dtypes are equal (then bytes are
 * copied) or one of them is F64 (then through double). Either pointer may be unaligned. Floating
 * formats only: anything else leaves dst alone and returns -1; 0 is success. */
int mt_dtype_convert(void *dst, enum mt_dtype dst_dtype, const void *src, enum mt_dtype src_dtype,
                     size_t count);

#endif
