/* Rows of a table, by number: the embedding of tokens, and the rows whose logits are wanted. */
#include <string.h>

#include "team.h"

/* table, numbers, y; count, rows of the table, bytes of a row. Returns 0, or 1 + the first index whose number is out of range
 * (nothing is written then). */
int64_t tandem_gather(const Arg *a) {
    const char *table = a[0].p;
    const int64_t *numbers = a[1].p;
    char *y = a[2].p;
    int64_t count = a[3].i, bytes = a[5].i;
    for (int64_t i = 0; i < count; i++)
        if (numbers[i] < 0 || numbers[i] >= a[4].i) return i + 1;
    for (int64_t i = 0; i < count; i++) memcpy(y + i * bytes, table + numbers[i] * bytes, (size_t)bytes);
    return 0;
}
