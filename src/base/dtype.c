#include "base/dtype.h"

static const struct {
  size_t bytes;
  const char *name;
} rows[] = {
#define X(name, bytes, text) {bytes, text},
    MT_DTYPE_LIST(X)
#undef X
};

size_t mt_dtype_bytes(enum mt_dtype dtype) {
  return (unsigned)dtype < MT_DTYPE_COUNT ? rows[dtype].bytes : 0;
}

const char *mt_dtype_name(enum mt_dtype dtype) {
  return (unsigned)dtype < MT_DTYPE_COUNT ? rows[dtype].name : "?";
}

enum mt_dtype mt_dtype_parse(const char *safetensors_name) {
  int i = 0;
  while (i < MT_DTYPE_COUNT && strcmp(rows[i].name, safetensors_name) != 0) i++;
  return (enum mt_dtype)i;
}

float mt_f16_to_f32(uint16_t x) {
  uint32_t sign = (uint32_t)(x & 0x8000) << 16, exp = (x >> 10) & 31, man = x & 0x3ff, u;
  if (exp == 31) {
    u = sign | 0x7f800000u | man << 13;
  } else if (exp) {
    u = sign | (exp + 112) << 23 | man << 13;
  } else {
    float f = (float)man * 0x1p-24f; /* subnormal: exact */
    memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}

uint16_t mt_f32_to_f16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint16_t sign = (uint16_t)((u >> 16) & 0x8000);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* rounds past 65504 */
  if (u < 0x38800000u) {
    /* Subnormal: adding 0.5 puts the value's unit at 2^-24, so that the FPU rounds for us. */
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;
    memcpy(&u, &a, 4);
    return (uint16_t)(sign | (u - 0x3f000000u));
  }
  u += 0xfffu + ((u >> 13) & 1);
  return (uint16_t)(sign | ((u - 0x38000000u) >> 13));
}

static double load(const char *p, enum mt_dtype dtype) {
  uint16_t h;
  float f;
  double d;
  switch (dtype) {
  case MT_F32:
    memcpy(&f, p, 4);
    return (double)f;
  case MT_F64:
    memcpy(&d, p, 8);
    return d;
  case MT_BF16:
    memcpy(&h, p, 2);
    return (double)mt_bf16_to_f32(h);
  default:
    memcpy(&h, p, 2);
    return (double)mt_f16_to_f32(h);
  }
}

static void store(char *p, enum mt_dtype dtype, double d) {
  float f = (float)d;
  uint16_t h;
  switch (dtype) {
  case MT_F32:
    memcpy(p, &f, 4);
    break;
  case MT_F64:
    memcpy(p, &d, 8);
    break;
  case MT_BF16:
    h = mt_f32_to_bf16(f);
    memcpy(p, &h, 2);
    break;
  default:
    h = mt_f32_to_f16(f);
    memcpy(p, &h, 2);
    break;
  }
}

int mt_dtype_convert(void *dst, enum mt_dtype dst_dtype, const void *src, enum mt_dtype src_dtype,
                     size_t count) {
  if (dst_dtype > MT_F64 || src_dtype > MT_F64) return -1;
  size_t from = mt_dtype_bytes(src_dtype), to = mt_dtype_bytes(dst_dtype);
  const char *s = src;
  char *d = dst;
  if (dst_dtype == src_dtype) {
    memcpy(d, s, count * from);
  } else if (src_dtype == MT_BF16 && dst_dtype == MT_F32) { /* the two that loading a model needs */
    for (size_t i = 0; i < count; i++) {
      uint16_t h;
      memcpy(&h, s + i * 2, 2);
      float f = mt_bf16_to_f32(h);
      memcpy(d + i * 4, &f, 4);
    }
  } else if (src_dtype == MT_F32 && dst_dtype == MT_BF16) {
    for (size_t i = 0; i < count; i++) {
      float f;
      memcpy(&f, s + i * 4, 4);
      uint16_t h = mt_f32_to_bf16(f);
      memcpy(d + i * 2, &h, 2);
    }
  } else {
    for (size_t i = 0; i < count; i++) store(d + i * to, dst_dtype, load(s + i * from, src_dtype));
  }
  return 0;
}
