/* The sizes at which every operation of a backend is held against the reference. */
#ifndef TESTS_KERNELS_SIZES_H
#define TESTS_KERNELS_SIZES_H

/* Sizes of one round. */
struct size {
  int t, valid, h, f, e, k, v, g, r, d;
  int sequences;
  int window;
};

/* The last two are widths that chips with 8-bit products of their own take in all three directions
 * (Hopper's FP8: multiples of 16, Blackwell's MXFP8: of 32; tests/unit/test_cuda_paths.c), others
 * are brought back to bf16 there in one direction or all. */
static const struct size sizes[] = {
    /*  t  valid  h   f  e  k   v  g  r   d  seq win */
    {1, 1, 8, 7, 1, 1, 5, 1, 1, 8, 1, 0},
    {7, 5, 33, 24, 3, 2, 17, 1, 3, 16, 2, 0},
    {33, 33, 64, 65, 5, 3, 130, 2, 2, 64, 3, 4},
    {130, 121, 96, 130, 9, 2, 64, 2, 4, 80, 2, 0},
    {200, 200, 48, 40, 4, 1, 300, 1, 7, 128, 1, 100},
    {150, 141, 48, 80, 6, 2, 40, 2, 2, 16, 2, 0},
    {140, 140, 96, 160, 3, 2, 33, 1, 2, 32, 1, 0},
};
enum { SIZES = sizeof sizes / sizeof *sizes };

/* Where an operation is only held against itself: enough rows and columns that many blocks of a
 * kernel meet in every sum. */
static const struct size large_size = {520, 509, 256, 192, 6, 2, 500, 2, 4, 64, 3, 0};

#endif
