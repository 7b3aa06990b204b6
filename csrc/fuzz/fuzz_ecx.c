/* fuzz_ecx.c - making and searching sorted indexes. Input: one byte (bit 0 width 5), then rows of an index.
 *
 * What is made must be sorted, and each key is found in it exactly if its last row says so. The same bytes, taken as a
 * sorted index although they are none, must be searched without harm.
 */
#include "../pv_int.h"

#include <sys/mman.h>

#define ROWS_MAX 96U

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static void must(int holds) {
    if (!holds) {
        abort();
    }
}

static int file_with(int *fd, const uint8_t *data, size_t len) {
    if (*fd < 0) {
        *fd = memfd_create("fuzz_ecx", MFD_CLOEXEC);
        must(*fd >= 0);
    }
    must(pv__io_truncate(*fd, 0, NULL) == 0);
    must(pv__io_pwrite(*fd, data, len, 0, NULL) == 0);
    return *fd;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    static int in = -1;
    static int out = -1;
    if (len == 0) {
        return 0;
    }
    const uint8_t width = (data[0] & 1) ? 5 : 4;
    pv_idx_row rows[ROWS_MAX];
    int idx = file_with(&in, data + 1, len - 1);
    int ecx = file_with(&out, NULL, 0);
    int count = pv_idx_read(idx, width, 0, rows, ROWS_MAX, NULL);
    must(count >= 0);
    uint64_t live;
    must(pv_ecx_from_idx(idx, width, (uint64_t)count, ecx, &live, NULL) == 0);
    pv_idx_row made[ROWS_MAX];
    must(pv_idx_read(ecx, width, 0, made, ROWS_MAX, NULL) == (int)live);
    for (uint64_t i = 1; i < live; i++) {
        must(made[i - 1].key < made[i].key);
    }
    for (int i = 0; i < count; i++) {
        const pv_idx_row *last = &rows[i];
        for (int k = i + 1; k < count; k++) {
            last = rows[k].key == rows[i].key ? &rows[k] : last;
        }
        pv_idx_row found;
        uint64_t index;
        int wanted = last->offset != 0 && last->size >= 0;
        must(pv_ecx_find(ecx, width, live, last->key, &found, &index, NULL) == wanted);
        must(!wanted || (found.offset == last->offset && found.size == last->size));
        int rc = pv_ecx_find(idx, width, (uint64_t)count, last->key, &found, &index, NULL);
        must(rc == 0 || (rc == 1 && found.key == last->key && index < (uint64_t)count));
    }
    return 0;
}
