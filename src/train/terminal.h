/* Text for a terminal that came from a file: nothing in it speaks to the terminal. */
#ifndef MT_TRAIN_TERMINAL_H
#define MT_TRAIN_TERMINAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

enum mt_color { MT_COLOR_AUTO, MT_COLOR_ALWAYS, MT_COLOR_NEVER };

/* auto: out is a terminal, TERM is not "dumb" and NO_COLOR (https://no-color.org) is not set. */
bool mt_color_wanted(enum mt_color choice, FILE *out);

/* Bytes at text that can be printed as they are: 0 when what begins there is a control character
 * (C0, DEL, C1), one that changes the direction of text or hides, or no UTF-8; *skip (=) is then
 * how many bytes that is. New lines and tabs are control characters too. */
size_t mt_printable(const char *text, size_t size, size_t *skip);

/* Prints text; what is not printable as \xNN, byte by byte. */
void mt_print_safe(FILE *out, const char *text, size_t size);

/* Bars for a terminal: `share` of width columns, at least one where share is above 0. */
void mt_print_bar(FILE *out, double share, int width);

#endif
