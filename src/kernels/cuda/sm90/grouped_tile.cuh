/* Which tile a cluster works at: found on the device from the offsets, by every warp for itself.
 *
 * A unit is what a cluster of two blocks makes at one time: two tiles that share an operand, so
 * that each block loads half of it for both. Two tiles of one column share b; the last row of
 * tiles of an odd number goes in pairs along n, which share a. A group's units run fastest along m
 * through panels of PANEL pairs, all columns, then the next panel: an expert of up to 2048 rows
 * reads its weights once. */
#ifndef MT_KERNELS_CUDA_SM90_GROUPED_TILE_CUH
#define MT_KERNELS_CUDA_SM90_GROUPED_TILE_CUH

enum { TILE_M = 128, PANEL_PAIRS = 8 };

struct place {
  int g, m, n;           /* group, tile row, tile column */
  int begin, end;        /* the group's rows */
  bool shares_b, inside; /* inside: not past the last column, where pairs along n end */
};

/* Where a warp is in the list of groups. */
struct walk {
  int g, before; /* units of the groups before g */
};

__device__ __forceinline__ int units_of(int mt, int nt) {
  return (mt >> 1) * nt + (mt & 1) * ((nt + 1) >> 1);
}

__device__ __forceinline__ void place_unit(int unit, int mt, int nt, int rank, struct place *p) {
  int pairs = mt >> 1;
  int last =
      pairs > 0 ? (pairs - 1) / PANEL_PAIRS : 0; /* the panel that has an odd row beside it */
  int panel = min(unit / (PANEL_PAIRS * nt), last);
  int first = panel * PANEL_PAIRS, high = min(PANEL_PAIRS, pairs - first);
  int left = unit - first * nt, odd = panel == last ? mt & 1 : 0;
  int two = left / (2 * high + odd), columns = min(2, nt - 2 * two); /* two columns at a time */
  left -= two * (2 * high + odd);
  p->shares_b = left < high * columns;
  if (p->shares_b) {
    p->m = 2 * (first + left % high) + rank;
    p->n = 2 * two + left / high;
  } else {
    p->m = mt - 1;
    p->n = 2 * two + rank;
  }
  p->inside = p->n < nt;
}

/* Groups of rows (forward, dgrad). False past the last unit; units must come in rising order. */
__device__ __forceinline__ bool find_rows(struct walk *at, const int *offsets, int groups, int nt,
                                          int unit, int rank, struct place *p) {
  for (; at->g < groups; at->g++) {
    int mt = (offsets[at->g + 1] - offsets[at->g] + TILE_M - 1) / TILE_M;
    int units = units_of(mt, nt);
    if (unit < at->before + units) {
      p->g = at->g;
      p->begin = offsets[at->g], p->end = offsets[at->g + 1];
      place_unit(unit - at->before, mt, nt, rank, p);
      return true;
    }
    at->before += units;
  }
  return false;
}

/* Groups of equal matrices (wgrad). */
__device__ __forceinline__ bool find_matrix(const int *offsets, int groups, int mt, int nt,
                                            int unit, int rank, struct place *p) {
  int each = units_of(mt, nt);
  p->g = unit / each;
  if (p->g >= groups) return false;
  p->begin = offsets[p->g], p->end = offsets[p->g + 1];
  place_unit(unit - p->g * each, mt, nt, rank, p);
  return true;
}

#endif
