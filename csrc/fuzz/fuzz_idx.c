/* fuzz_idx.c - summary, reading and needle map of any index file. Input: one byte (bit 0 width 5, bits 1..2 version - 1),
 * 8 bytes size of the .dat, then the file.
 *
 * The summary is checked for what it can be told apart by, the map against a replay of the rows for each key.
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

static int file_with(const uint8_t *data, size_t len) {
    static int fd = -1;
    if (fd < 0) {
        fd = memfd_create("fuzz_idx", MFD_CLOEXEC);
        must(fd >= 0);
    }
    must(pv__io_truncate(fd, 0, NULL) == 0);
    must(pv__io_pwrite(fd, data, len, 0, NULL) == 0);
    return fd;
}

/* What a key is after the whole log, by the rules of storage.md 5. */
static int replay(const pv_idx_row *rows, size_t count, uint64_t key, uint64_t *offset, int32_t *size) {
    int known = 0;
    for (size_t i = 0; i < count; i++) {
        if (rows[i].key != key) {
            continue;
        }
        if (rows[i].offset != 0 && rows[i].size >= 0) {
            known = 1;
            *offset = rows[i].offset;
            *size = rows[i].size;
        } else if (known && *size >= 0) {
            *size = *size == 0 ? -1 : -*size;
        }
    }
    return known;
}

static void check_map(int fd, uint8_t width, const pv_idx_row *rows, size_t count, int by_key) {
    pv_map *m;
    uint64_t done;
    pv_map_stats st;
    pv_errinfo err;
    must(pv_map_new(width, &m) == 0);
    if (by_key) {
        must(pv__map_load_shuffled(m, fd, width, 0, count, &err) == 0);
    } else {
        must(pv_map_load(m, fd, 0, &done, NULL) == 0);
        must(done == count);
    }
    uint64_t live = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t offset = 0;
        uint64_t want_offset = 0;
        int32_t size = 0;
        int32_t want_size = 0;
        int known = replay(rows, count, rows[i].key, &want_offset, &want_size);
        int rc = pv_map_get(m, rows[i].key, &offset, &size);
        must(rc == (known ? 0 : PV_ENOTFOUND) && offset == want_offset && size == want_size);
        live += rows[i].offset != 0 && rows[i].size >= 0;
    }
    pv_map_stat(m, &st);
    must(st.file_count == live && st.deleted_count >= count - live && st.entries <= live);
    pv_idx_row seen[ROWS_MAX];
    int n = pv_map_visit(m, 0, seen, ROWS_MAX);
    must((uint64_t)n == st.entries);
    for (int i = 1; i < n; i++) {
        must(seen[i].key > seen[i - 1].key);
    }
    pv_map_free(m);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    if (len < 9) {
        return 0;
    }
    const uint8_t width = (data[0] & 1) ? 5 : 4;
    const uint8_t version = (uint8_t)(1 + ((data[0] >> 1) & 3));
    const uint64_t dat_size = pv__get_be64(data + 1);
    const size_t row_len = 12U + width;
    data += 9;
    len -= 9;
    if (len > ROWS_MAX * row_len) {
        len = ROWS_MAX * row_len;
    }
    int fd = file_with(data, len);
    pv_idx_row rows[ROWS_MAX + 1];
    int count = pv_idx_read(fd, width, 0, rows, ROWS_MAX + 1, NULL);
    must(count == (int)(len / row_len));
    for (int i = 0; i < count; i++) {
        uint8_t back[17];
        pv_idx_row_put(&rows[i], width, back);
        must(memcmp(back, data + (size_t)i * row_len, row_len) == 0);
    }
    pv_idx_summary s;
    int rc = pv_idx_summarize(fd, width, version, dat_size, &s, NULL);
    if (version > 3) {
        must(rc == PV_EVERSION);
        return 0;
    }
    must(rc == 0 && s.rows == (uint64_t)count && s.ragged_bytes == len % row_len && s.file_bytes == len);
    must(s.max_valid_end <= s.max_end && (s.past_end == 0) == (s.max_valid_end <= dat_size));
    must(s.leading_zero_rows <= s.rows && (count == 0 || s.last.key == rows[count - 1].key));
    check_map(fd, width, rows, (size_t)count, 0);
    if (count > 0) {
        check_map(fd, width, rows, (size_t)count, 1);
    }
    return 0;
}
