/* What is live in an index, and upstream's counters of it (pv_live), against a plain count. */
#include "t.h"

#include "../pv_int.h"

#define KEYS 3000U

static void put_row(int fd, uint8_t width, uint64_t at, uint64_t key, uint64_t offset, int32_t size) {
    uint8_t buf[17];
    const pv_idx_row row = {.key = key, .offset = offset, .size = size};
    pv_idx_row_put(&row, width, buf);
    CHECK(pwrite(fd, buf, 12U + width, (off_t)(at * (12U + width))) == (ssize_t)(12U + width));
}

static pv_live *open_live(int fd, uint8_t width, uint64_t rows, pv_map_stats *stats) {
    pv_live *l = NULL;
    pv_errinfo err;
    CHECK_EQ(pv_live_open(fd, width, rows, &l, stats, &err), 0);
    return l;
}

static void test_nothing(void) {
    int fd = t_file();
    uint8_t buf[PV_LIVE_ENTRY];
    pv_map_stats stats;
    pv_errinfo err;
    pv_live *l = open_live(fd, 4, UINT64_MAX, &stats);
    CHECK_EQ(stats.file_count + stats.entries + stats.deleted_count + stats.max_key, 0);
    CHECK_EQ(pv_live_next(l, buf, 1), 0);
    CHECK_EQ(pv_live_next(l, buf, 0), PV_EINVAL);
    CHECK_EQ(pv_live_next(l, buf, (size_t)INT32_MAX + 1), PV_EINVAL);
    pv_live_free(l);
    pv_live_free(NULL);
    CHECK_EQ(pv_live_open(fd, 3, 0, &l, &stats, &err), PV_EINVAL);
    CHECK_EQ(pv_live_open(-1, 4, 5, &l, &stats, &err), PV_ESYS);
    CHECK(l == NULL);
    close(fd);
}

/* One live, one overwritten, one deleted, one empty, one empty and deleted, one at the last key; then rows that are left out. */
static void check_counters(uint8_t width) {
    int fd = t_file();
    const pv_idx_row rows[] = {
        {5, 8, 100, 0}, {UINT64_MAX, 48, 7, 0}, {3, 96, 20, 0},  {3, 200, 30, 0}, {4, 300, 40, 0}, {4, 400, -1, 0},
        {6, 480, 0, 0}, {7, 560, 0, 0},         {7, 640, -1, 0}, {8, 0, -1, 0},   {5, 720, -1, 0},
    };
    for (uint64_t i = 0; i < PV__ARRAY_LEN(rows); i++) {
        put_row(fd, width, i, rows[i].key, rows[i].offset / 8 * 8, rows[i].size);
    }
    pv_map_stats stats;
    uint8_t buf[8 * PV_LIVE_ENTRY];
    pv_live *l = open_live(fd, width, PV__ARRAY_LEN(rows) - 1, &stats);
    CHECK_EQ(stats.file_count, 10);
    CHECK_EQ(stats.deleted_count, 7); /* all but keys 3, 5 and the last: an empty file counts as deleted */
    CHECK_EQ(stats.file_bytes, 100 + 7 + 20 + 30 + 40);
    CHECK_EQ(stats.deleted_bytes, 20 + 40);
    CHECK_EQ(stats.max_key, UINT64_MAX);
    CHECK_EQ(stats.entries, 4);
    CHECK_EQ(pv_live_next(l, buf, 3), 3);
    CHECK_EQ(pv__get_be64(buf), 3);
    CHECK_EQ(pv__get_be64(buf + 8), 200);
    CHECK_EQ(pv__get_be32(buf + 16), 30);
    CHECK_EQ(pv__get_be64(buf + PV_LIVE_ENTRY), 5);
    CHECK_EQ(pv__get_be64(buf + 2 * PV_LIVE_ENTRY), 6);
    CHECK_EQ(pv__get_be32(buf + 2 * PV_LIVE_ENTRY + 16), 0);
    CHECK_EQ(pv_live_next(l, buf, 8), 1);
    CHECK_EQ(pv__get_be64(buf), UINT64_MAX);
    CHECK_EQ(pv_live_next(l, buf, 8), 0);
    pv_live_free(l);
    l = open_live(fd, width, UINT64_MAX, &stats);
    CHECK_EQ(stats.file_count, 11);
    CHECK_EQ(stats.entries, 3);
    CHECK_EQ(stats.deleted_bytes, 160);
    pv_live_free(l);
    close(fd);
}

/* Many rows in random order, taken out in batches of odd sizes. */
static void check_many(uint8_t width) {
    static int32_t last[KEYS];
    static uint64_t offsets[KEYS];
    int fd = t_file();
    uint64_t seed = 7;
    memset(last, -1, sizeof last);
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < 4 * KEYS; i++) {
        seed = seed * 6364136223846793005U + 1442695040888963407U;
        uint64_t key = (seed >> 33) % KEYS;
        int32_t size = (seed >> 20) % 5 == 0 ? -1 : (int32_t)((seed >> 23) % 1000);
        put_row(fd, width, i, key, 8 * (i + 1), size);
        last[key] = size;
        offsets[key] = 8 * (i + 1);
        bytes += size > 0 ? (uint64_t)size : 0;
    }
    pv_map_stats stats;
    pv_live *l = open_live(fd, width, UINT64_MAX, &stats);
    CHECK_EQ(stats.file_count, 4 * KEYS);
    CHECK_EQ(stats.file_bytes, bytes);
    uint8_t buf[17 * PV_LIVE_ENTRY];
    uint64_t key = 0;
    uint64_t seen = 0;
    uint64_t kept = 0;
    int n;
    while ((n = pv_live_next(l, buf, 17)) > 0) {
        for (int i = 0; i < n; i++) {
            const uint8_t *e = buf + (size_t)i * PV_LIVE_ENTRY;
            while (key < KEYS && last[key] < 0) {
                key++;
            }
            CHECK(key < KEYS);
            CHECK_EQ(pv__get_be64(e), key);
            CHECK_EQ(pv__get_be64(e + 8), offsets[key]);
            CHECK_EQ((int32_t)pv__get_be32(e + 16), last[key]);
            kept += last[key] > 0;
            key++;
            seen++;
        }
    }
    CHECK_EQ(seen, stats.entries);
    CHECK_EQ(stats.deleted_count, 4 * KEYS - kept);
    while (key < KEYS) {
        CHECK(last[key++] < 0);
    }
    pv_live_free(l);
    close(fd);
}

static void test_counters_of_both_widths(void) {
    check_counters(4);
    check_counters(5);
}

static void test_many_rows(void) {
    check_many(4);
    check_many(5);
}

static int same(int a, int b, uint8_t width_a, uint8_t width_b) {
    pv_map_stats stats;
    pv_live *x = open_live(a, width_a, UINT64_MAX, &stats);
    pv_live *y = open_live(b, width_b, UINT64_MAX, &stats);
    int rc = pv_live_same(x, y);
    pv_live_free(x);
    pv_live_free(y);
    return rc;
}

/* The same keys and sizes, whatever the order, the places and what was deleted. */
static void test_same(void) {
    int a = t_file();
    int b = t_file();
    CHECK_EQ(same(a, b, 4, 5), 1);
    for (uint64_t i = 0; i < KEYS; i++) {
        put_row(a, 4, i, i, 8 * i + 8, (int32_t)(i % 50));
        put_row(b, 5, KEYS - 1 - i, i, 16 * i + 16, (int32_t)(i % 50));
    }
    CHECK_EQ(same(a, b, 4, 5), 1);
    put_row(a, 4, KEYS, KEYS - 1, 8, -1);
    CHECK_EQ(same(a, b, 4, 5), 0);
    CHECK_EQ(same(b, a, 5, 4), 0);
    put_row(b, 5, KEYS, KEYS - 1, 800, -1);
    CHECK_EQ(same(a, b, 4, 5), 1);
    put_row(b, 5, KEYS + 1, 7, 800, 8); /* it has size 7 in the other */
    CHECK_EQ(same(a, b, 4, 5), 0);
    close(a);
    close(b);
}

static void test_no_memory(void) {
    int fd = t_file();
    for (uint64_t i = 0; i < 10; i++) {
        put_row(fd, 4, i, i, 8 * i + 8, 5);
    }
    bool done = false;
    for (int nth = 1; !done; nth++) {
        pv_live *l = NULL;
        pv_map_stats stats;
        pv_errinfo err;
        pv__alloc_fail_at(nth);
        int rc = pv_live_open(fd, 4, UINT64_MAX, &l, &stats, &err);
        (void)pv__alloc_fail_at(0);
        done = rc == 0;
        CHECK(done ? nth > 4 : rc == PV_ENOMEM && l == NULL);
        pv_live_free(l);
    }
    close(fd);
}

int main(void) {
    RUN(test_nothing);
    RUN(test_counters_of_both_widths);
    RUN(test_many_rows);
    RUN(test_same);
    RUN(test_no_memory);
    return T_END();
}
