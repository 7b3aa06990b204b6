/* The sorted-file map of read-only volumes: against the memory map, made anew when it does not fit, deletes in place. */
#include "t.h"

#include <sys/stat.h>

#define ROWS 5000

static void put_rows(int fd, uint8_t width, uint64_t *seed, int rows, uint64_t keys) {
    uint8_t buf[17];
    for (int i = 0; i < rows; i++) {
        pv_idx_row r = {.key = t_rand_below(seed, keys) * 3, .offset = 8 * (1 + t_rand_below(seed, 1U << 28))};
        r.size = t_rand_below(seed, 4) == 0 ? -1 : (int32_t)t_rand_below(seed, 100000);
        pv_idx_row_put(&r, width, buf);
        CHECK(pwrite(fd, buf, 12U + width, (off_t)(12U + width) * i) == (ssize_t)(12U + width));
    }
}

static void same_as_memory(uint8_t width, int rows, uint64_t keys) {
    char path[300];
    uint64_t seed = (uint64_t)rows + keys + width;
    uint64_t loaded;
    pv_errinfo err;
    pv_map *memory;
    pv_map *sorted;
    const char *tmp = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/pv-sorted-%d.sdx", tmp != NULL ? tmp : "/tmp", (int)getpid());
    int fd = t_file();
    put_rows(fd, width, &seed, rows, keys);
    CHECK_EQ(pv_map_new(width, &memory), 0);
    CHECK_EQ(pv_map_load(memory, fd, 0, &loaded, &err), 0);
    for (int again = 0; again < 3; again++) { /* made, used, and made anew because it was spoilt */
        CHECK_EQ(pv_map_open_sorted(width, path, fd, &sorted, &err), 0);
        for (uint64_t k = 0; k < keys * 3 + 5; k++) {
            uint64_t offset = 0;
            uint64_t want_offset = 0;
            int32_t size = 0;
            int32_t want_size = 0;
            int want = pv_map_get(memory, k, &want_offset, &want_size);
            int got = pv_map_get(sorted, k, &offset, &size);
            if (want == 0 && want_size >= 0) {
                CHECK_EQ(got, 0);
                CHECK_EQ(offset, want_offset);
                CHECK_EQ(size, want_size);
            } else {
                CHECK_EQ(got, PV_ENOTFOUND);
            }
        }
        uint64_t old;
        int32_t old_size;
        CHECK_EQ(pv_map_put(sorted, 1, 8, 1, &old, &old_size), PV_EINVAL);
        pv_map_free(sorted);
        if (again == 1) {
            int sdx = open(path, O_RDWR | O_CLOEXEC);
            CHECK(sdx >= 0);
            uint8_t x = 0x7f;
            if (lseek(sdx, 0, SEEK_END) > 0) {
                CHECK(pwrite(sdx, &x, 1, 9) == 1);
            }
            CHECK(close(sdx) == 0);
        }
    }
    pv_map_free(memory);
    CHECK(close(fd) == 0);
    CHECK(unlink(path) == 0);
}

static void it_answers_as_the_memory_map_does(void) {
    same_as_memory(4, 0, 1);
    same_as_memory(4, 1, 1);
    same_as_memory(4, 63, 1000);
    same_as_memory(4, ROWS, 700);
    same_as_memory(5, ROWS, 100000);
    same_as_memory(4, 20000, 1000000);
}

static void a_delete_marks_the_row_and_lasts(void) {
    char path[300];
    pv_errinfo err;
    const char *tmp = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/pv-sorted-%d.sdx", tmp != NULL ? tmp : "/tmp", (int)getpid());
    int fd = t_file();
    uint8_t buf[16];
    for (int i = 0; i < 200; i++) {
        const pv_idx_row r = {.key = (uint64_t)i, .offset = 8U * (unsigned)(i + 1), .size = i + 1};
        pv_idx_row_put(&r, 4, buf);
        CHECK(pwrite(fd, buf, 16, 16 * i) == 16);
    }
    pv_map *m;
    CHECK_EQ(pv_map_open_sorted(4, path, fd, &m, &err), 0);
    int32_t old_size;
    uint64_t offset;
    int32_t size;
    const pv_idx_row gone = {.key = 77, .offset = 9000, .size = -1};
    pv_idx_row_put(&gone, 4, buf);
    CHECK(pwrite(fd, buf, 16, 16 * 200) == 16); /* the index first, as the engine does */
    const struct timespec earlier[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
    CHECK(futimens(fd, earlier) == 0); /* clocks of file systems are coarse: both could be changed in one tick */
    CHECK_EQ(pv_map_delete(m, 77, &old_size), 0);
    CHECK_EQ(old_size, 78);
    CHECK_EQ(pv_map_delete(m, 1000, &old_size), PV_ENOTFOUND);
    CHECK_EQ(pv_map_get(m, 77, &offset, &size), 0);
    CHECK_EQ(size, -1);
    pv_map_stats before;
    pv_map_stat(m, &before);
    CHECK_EQ(before.file_count, 200);
    CHECK_EQ(before.deleted_count, 0);
    pv_map_free(m);
    struct stat st;
    CHECK(stat(path, &st) == 0);
    uint64_t inode = st.st_ino;
    CHECK_EQ(pv_map_open_sorted(4, path, fd, &m, &err), 0);
    CHECK(stat(path, &st) == 0);
    CHECK_EQ(st.st_ino, inode); /* still fits: the file is used as it is */
    CHECK_EQ(pv_map_get(m, 77, &offset, &size), 0);
    CHECK_EQ(size, -1);
    pv_map_stats after;
    pv_map_stat(m, &after);
    CHECK_EQ(after.file_count, 201);
    CHECK_EQ(after.deleted_count, 22); /* two, and twenty that upstream takes for deleted */
    CHECK_EQ(after.deleted_bytes, 854);
    pv_map_free(m);
    CHECK(close(fd) == 0);
    CHECK(unlink(path) == 0);
}

/* count rows with keys first, first + 3, ..., each of (key % 1000 + 1) bytes, none deleted */
static void check_estimate(uint64_t first, uint64_t count, uint64_t deleted, uint64_t deleted_bytes) {
    pv_errinfo err;
    char sdx[300];
    const char *tmp = getenv("TMPDIR");
    snprintf(sdx, sizeof sdx, "%s/pv-sorted-%d.sdx", tmp != NULL ? tmp : "/tmp", (int)getpid());
    int fd = t_file();
    uint8_t *rows = malloc(count * 16);
    CHECK(rows != NULL);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t key = first + 3 * i;
        const pv_idx_row r = {.key = key, .offset = 8 + 1032 * i, .size = (int32_t)(key % 1000 + 1)};
        pv_idx_row_put(&r, 4, rows + 16 * i);
    }
    CHECK(pwrite(fd, rows, count * 16, 0) == (ssize_t)(count * 16));
    free(rows);
    pv_map *m;
    CHECK_EQ(pv_map_open_sorted(4, sdx, fd, &m, &err), 0);
    pv_map_stats s;
    pv_map_stat(m, &s);
    CHECK_EQ(s.file_count, count);
    CHECK_EQ(s.entries, count);
    CHECK_EQ(s.deleted_count, deleted);
    CHECK_EQ(s.deleted_bytes, deleted_bytes);
    CHECK_EQ(s.max_key, first + 3 * (count - 1));
    pv_map_free(m);
    CHECK(close(fd) == 0);
    CHECK(unlink(sdx) == 0);
}

/* The figures are upstream's, which takes some live rows for deleted. */
static void deleted_rows_are_estimated_as_upstream_does(void) {
    check_estimate(7, 1, 0, 0);
    check_estimate(7, 2, 0, 0);
    check_estimate(301, 2, 1, 302);
    check_estimate(2590, 3, 1, 591);
    check_estimate(49, 5, 1, 50);
    check_estimate(259, 8, 2, 523);
    check_estimate(7, 50, 0, 0);
    check_estimate(133, 50, 1, 257);
    check_estimate(7, 1000, 0, 0);
    check_estimate(7, 100000, 13, 4800);
    check_estimate(14, 100000, 9, 4643);
}

int main(void) {
    RUN(it_answers_as_the_memory_map_does);
    RUN(a_delete_marks_the_row_and_lasts);
    RUN(deleted_rows_are_estimated_as_upstream_does);
    return T_END();
}
