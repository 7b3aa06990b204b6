/* Search by append time (pv_dat_find_since, pv_dat_append_time), against a linear search. */
#include "t.h"

typedef struct files {
    int dat;
    int idx;
    uint64_t end;
    uint64_t rows;
    uint8_t version;
    uint8_t width;
} files;

static files new_files(uint8_t version, uint8_t width) {
    files f = {.dat = t_file(), .idx = t_file(), .end = 8, .version = version, .width = width};
    const uint8_t block[8] = {version};
    CHECK(pwrite(f.dat, block, 8, 0) == 8);
    return f;
}

static void drop_files(files *f) {
    close(f->dat);
    close(f->idx);
}

static void add_row(files *f, uint64_t offset, int32_t size) {
    uint8_t buf[17];
    const pv_idx_row row = {.key = f->rows + 1, .offset = offset, .size = size};
    pv_idx_row_put(&row, f->width, buf);
    size_t len = 12U + f->width;
    CHECK(pwrite(f->idx, buf, len, (off_t)(f->rows * len)) == (ssize_t)len);
    f->rows++;
}

/* A record of so many data bytes and its row. Returns its offset. */
static uint64_t add(files *f, uint64_t when, uint32_t data_size) {
    static const uint8_t zeros[512];
    pv_needle n = {.id = f->rows + 1, .cookie = 7, .append_at_ns = when, .data_size = data_size, .data = zeros};
    n.checksum = pv_crc32c(0, n.data, n.data_size);
    uint8_t head[20];
    size_t head_len;
    size_t tail_len;
    static uint8_t tail[PV_NEEDLE_TAIL_MAX];
    int32_t size;
    CHECK_EQ(pv_needle_frame(&n, f->version, head, &head_len, tail, sizeof tail, &tail_len, &size, NULL), 0);
    uint64_t at = f->end;
    CHECK(pwrite(f->dat, head, head_len, (off_t)at) == (ssize_t)head_len);
    CHECK(pwrite(f->dat, zeros, data_size, (off_t)(at + head_len)) == (ssize_t)data_size);
    CHECK(pwrite(f->dat, tail, tail_len, (off_t)(at + head_len + data_size)) == (ssize_t)tail_len);
    f->end = at + head_len + data_size + tail_len;
    add_row(f, at, data_size == 0 ? -1 : size);
    return at;
}

static int find(const files *f, uint64_t since, uint64_t *offset) {
    uint64_t row;
    pv_errinfo err;
    int rc = pv_dat_find_since(f->dat, f->idx, f->width, f->version, f->rows, since, offset, &row, &err);
    CHECK_EQ(rc == 1, *offset != 0);
    return rc;
}

static void test_append_time(void) {
    files f = new_files(3, 4);
    uint64_t when;
    pv_errinfo err;
    uint64_t first = add(&f, 12345, 100);
    uint64_t tombstone = add(&f, 12346, 0);
    CHECK_EQ(pv_dat_append_time(f.dat, 3, first, &when, NULL), 0);
    CHECK_EQ(when, 12345);
    CHECK_EQ(pv_dat_append_time(f.dat, 3, tombstone, &when, NULL), 0);
    CHECK_EQ(when, 12346);
    CHECK_EQ(pv_dat_append_time(f.dat, 2, first, &when, NULL), 0);
    CHECK_EQ(when, 0);
    CHECK_EQ(pv_dat_append_time(f.dat, 3, f.end, &when, &err), PV_EEOF);
    CHECK_EQ(pv_dat_append_time(f.dat, 3, UINT64_MAX, &when, &err), PV_EEOF);
    CHECK_EQ(pv_dat_append_time(f.dat, 3, INT64_MAX - 8, &when, &err), PV_EEOF);
    CHECK_EQ(pv_dat_append_time(f.dat, 4, first, &when, &err), PV_EVERSION);
    CHECK_EQ(pv_dat_append_time(-1, 3, first, &when, &err), PV_ESYS);
    const uint8_t negative[4] = {0x80, 0, 0, 1};
    CHECK(pwrite(f.dat, negative, 4, (off_t)(first + 12)) == 4);
    CHECK_EQ(pv_dat_append_time(f.dat, 3, first, &when, &err), PV_ECORRUPT);
    CHECK_EQ(err.b, first);
    CHECK_EQ(ftruncate(f.dat, (off_t)(tombstone + 16 + 4 + 7)), 0);
    CHECK_EQ(pv_dat_append_time(f.dat, 3, tombstone, &when, &err), PV_EEOF);
    drop_files(&f);
}

static void test_no_rows(void) {
    files f = new_files(3, 5);
    uint64_t offset;
    CHECK_EQ(find(&f, 0, &offset), 0);
    add_row(&f, 0, -1);
    add_row(&f, 0, -1);
    CHECK_EQ(find(&f, 0, &offset), 0);
    drop_files(&f);
}

/* Random files, rows without a record anywhere, every moment of interest. */
static void test_against_linear(void) {
    uint64_t seed = 11;
    for (int round = 0; round < T_REPEAT(200); round++) {
        files f = new_files(3, (uint8_t)(4 + round % 2));
        uint64_t when[64];
        uint64_t at[64];
        size_t records = 0;
        uint64_t now = 100;
        uint64_t rows = t_rand_below(&seed, 60);
        for (uint64_t i = 0; i < rows; i++) {
            if (t_rand_below(&seed, 3) == 0) {
                add_row(&f, 0, -1);
                continue;
            }
            now += 1 + t_rand_below(&seed, 3);
            when[records] = now;
            at[records++] = add(&f, now, (uint32_t)t_rand_below(&seed, 40));
        }
        for (uint64_t since = 95; since < now + 3; since++) {
            size_t i = 0;
            while (i < records && when[i] <= since) {
                i++;
            }
            uint64_t offset;
            CHECK_EQ(find(&f, since, &offset), i < records);
            CHECK_EQ(offset, i < records ? at[i] : 0);
        }
        uint64_t offset;
        CHECK_EQ(find(&f, UINT64_MAX, &offset), 0);
        drop_files(&f);
    }
}

/* Many rows without a record in a row, more than are read at once. */
static void test_long_gaps(void) {
    files f = new_files(3, 4);
    uint64_t offset;
    uint64_t first = add(&f, 10, 5);
    for (int i = 0; i < 3000; i++) {
        add_row(&f, 0, -1);
    }
    uint64_t second = add(&f, 20, 5);
    for (int i = 0; i < 3000; i++) {
        add_row(&f, 0, -1);
    }
    CHECK_EQ(find(&f, 0, &offset), 1);
    CHECK_EQ(offset, first);
    CHECK_EQ(find(&f, 10, &offset), 1);
    CHECK_EQ(offset, second);
    CHECK_EQ(find(&f, 20, &offset), 0);
    drop_files(&f);
}

static void test_old_versions_have_no_times(void) {
    for (uint8_t version = 1; version <= 2; version++) {
        files f = new_files(version, 4);
        uint64_t offset;
        (void)add(&f, 10, 5);
        (void)add(&f, 20, 5);
        CHECK_EQ(find(&f, 0, &offset), 0);
        drop_files(&f);
    }
}

static void test_damage_tells_where(void) {
    files f = new_files(3, 4);
    uint64_t offset;
    uint64_t row;
    pv_errinfo err;
    (void)add(&f, 10, 5);
    add_row(&f, 1 << 20, 5);
    (void)add(&f, 20, 5);
    CHECK_EQ(pv_dat_find_since(f.dat, f.idx, 4, 3, 3, 0, &offset, &row, &err), PV_EEOF);
    CHECK_EQ(row, 1);
    CHECK_EQ(offset, 1 << 20);
    CHECK_EQ(err.d, 0);
    CHECK_EQ(pv_dat_find_since(f.dat, f.idx, 4, 3, 100, 0, &offset, &row, &err), PV_EEOF);
    CHECK_EQ(err.d, 1);
    CHECK_EQ(pv_dat_find_since(f.dat, f.idx, 3, 3, 3, 0, &offset, &row, &err), PV_EINVAL);
    CHECK_EQ(pv_dat_find_since(f.dat, -1, 4, 3, 3, 0, &offset, &row, &err), PV_ESYS);
    drop_files(&f);
}

int main(void) {
    RUN(test_append_time);
    RUN(test_no_rows);
    RUN(test_against_linear);
    RUN(test_long_gaps);
    RUN(test_old_versions_have_no_times);
    RUN(test_damage_tells_where);
    return T_END();
}
