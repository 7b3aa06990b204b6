/* fuzz_sorted.c - a map from any index and any sorted file beside it. Input: one byte (bit 0 width 5), 2 bytes length of
 * the index (little-endian), then the index, then the sorted file.
 *
 * Whatever stands in the sorted file, a look-up gives what the index says; the walk over live entries says the same. */
#include "../test/t.h"

#include <sys/stat.h>

#define ROWS_MAX 256U

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static void scratch(char *path, size_t cap) {
    static char dir[128];
    if (dir[0] == 0) {
        snprintf(dir, sizeof dir, "%s/pv-fuzz-XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
        CHECK(mkdtemp(dir) != NULL);
    }
    snprintf(path, cap, "%s/1.sdx", dir);
}

static void clean_up(void) {
    char path[192];
    scratch(path, sizeof path);
    (void)unlink(path);
    *strrchr(path, '/') = 0;
    (void)rmdir(path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    static int idx_fd = -1;
    static bool once;
    if (len < 3 || len > 8192) {
        return 0;
    }
    const uint8_t width = data[0] & 1 ? 5 : 4;
    const size_t row_len = 12U + width;
    size_t idx_len = data[1] | (size_t)data[2] << 8;
    idx_len = idx_len < len - 3 ? idx_len : len - 3;
    idx_len = idx_len < ROWS_MAX * row_len ? idx_len : ROWS_MAX * row_len;
    idx_len -= idx_len % row_len;
    char path[192];
    scratch(path, sizeof path);
    if (!once) {
        once = true;
        CHECK_EQ(atexit(clean_up), 0);
        idx_fd = memfd_create("fuzz_sorted", MFD_CLOEXEC);
    }
    CHECK_EQ(pv__io_truncate(idx_fd, 0, NULL), 0);
    CHECK_EQ(pv__io_pwrite(idx_fd, data + 3, idx_len, 0, NULL), 0);
    const struct timespec long_ago[2] = {{.tv_sec = 1}, {.tv_sec = 1}};
    CHECK_EQ(futimens(idx_fd, long_ago), 0); /* so that the sorted file is newer, and looked at */
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    CHECK_EQ(pv__io_pwrite(fd, data + 3 + idx_len, len - 3 - idx_len, 0, NULL), 0);
    CHECK_EQ(close(fd), 0);

    pv_map *sorted, *plain;
    pv_map_stats stats;
    uint64_t done;
    CHECK_EQ(pv_map_open_sorted(width, path, idx_fd, &sorted, NULL), 0);
    CHECK_EQ(pv_map_new(width, &plain), 0);
    CHECK_EQ(pv_map_load(plain, idx_fd, 0, &done, NULL), 0);
    static pv_idx_row rows[ROWS_MAX], seen[ROWS_MAX];
    int count = pv_idx_read(idx_fd, width, 0, rows, ROWS_MAX, NULL);
    CHECK_EQ(count, idx_len / row_len);
    uint64_t live = 0;
    for (int i = 0; i < count; i++) {
        uint64_t offset = 0, want_offset = 0;
        int32_t size = 0, want_size = 0;
        int rc = pv_map_get(sorted, rows[i].key, &offset, &size);
        int want = pv_map_get(plain, rows[i].key, &want_offset, &want_size);
        if (want == 0 && want_size >= 0 && want_offset != 0) {
            CHECK_EQ(rc, 0);
            CHECK_EQ(offset, want_offset);
            CHECK_EQ(size, want_size);
        } else {
            CHECK(rc == PV_ENOTFOUND || (rc == 0 && size < 0));
        }
    }
    pv_map_stat(sorted, &stats);
    int n = pv_map_visit(sorted, 0, seen, ROWS_MAX);
    CHECK_EQ(n, stats.entries);
    for (int i = 0; i < n; i++) {
        CHECK(i == 0 || seen[i].key > seen[i - 1].key);
        live += seen[i].size >= 0;
    }

    pv_live *l;
    uint8_t buf[16 * PV_LIVE_ENTRY];
    CHECK_EQ(pv_live_open(idx_fd, width, UINT64_MAX, &l, &stats, NULL), 0);
    uint64_t given = 0, last = 0;
    for (int got; (got = pv_live_next(l, buf, 16)) != 0; given += (uint64_t)got) {
        CHECK(got > 0 && got <= 16);
        for (int i = 0; i < got; i++) {
            uint64_t key = pv__get_be64(buf + i * PV_LIVE_ENTRY);
            CHECK(given + (uint64_t)i == 0 || key > last);
            last = key;
        }
    }
    CHECK_EQ(given, stats.entries);
    CHECK_EQ(given, live);
    pv_live_free(l);
    if (count > 0) {
        int32_t old;
        int rc = pv_map_delete(sorted, rows[0].key, &old);
        CHECK(rc == 0 || rc == PV_ENOTFOUND);
    }
    pv_map_free(plain);
    pv_map_free(sorted);
    return 0;
}
