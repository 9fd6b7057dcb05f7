/* A directory's checksums: moetune-checksums.json lists the XXH3-128 and the size of every file
 * that lay in it when it was written, and of the list itself. */
#ifndef MT_IO_CHECKSUMS_H
#define MT_IO_CHECKSUMS_H

#include <stdbool.h>

#include "base/error.h"

/* Lists the plain files of dir. Errors: MT_EIO, MT_ENOMEM. */
mt_err mt_checksums_write(const char *dir);

/* The same for a directory that has a list and has got more files: those that are listed are not
 * read again. For who has just written it. Errors: those of mt_checksums_verify too. */
mt_err mt_checksums_extend(const char *dir);

/* Reads every listed file and compares. Files that are not listed are nobody's business. *listed
 * (=) is false where dir has no list (checkpoints of earlier versions): nothing is then checked.
 * Errors: MT_EFORMAT naming the first file that is missing, of another size or damaged; MT_EIO. */
mt_err mt_checksums_verify(const char *dir, bool *listed);

/* The same, and a directory without a list is an error: MT_ENOENT. */
mt_err mt_checksums_demand(const char *dir);

#endif
