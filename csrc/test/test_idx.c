/* test_idx.c - index rows, reading them from files, and the summary of a file; also the I/O layer below. */
#include "t.h"

static const uint8_t widths[] = {4, 5};

static size_t row_len(uint8_t width) {
    return 12U + width;
}

static void one_row(void) {
    uint8_t buf[17];
    pv_idx_row row = {.key = 0x0102030405060708, .offset = (uint64_t)0xb3b2b1b0 * 8, .size = 0x11223344};
    pv_idx_row_put(&row, 4, buf);
    CHECK_MEM(buf, "\x01\x02\x03\x04\x05\x06\x07\x08\xb3\xb2\xb1\xb0\x11\x22\x33\x44", 16);
    row.offset = (uint64_t)0xb4b3b2b1b0 * 8;
    row.size = -1;
    pv_idx_row_put(&row, 5, buf);
    CHECK_MEM(buf, "\x01\x02\x03\x04\x05\x06\x07\x08\xb3\xb2\xb1\xb0\xb4\xff\xff\xff\xff", 17);
    /* The contract's verified examples of the 5-byte offset. */
    row.offset = 0x123456789a8;
    pv_idx_row_put(&row, 5, buf);
    CHECK_MEM(buf + 8, "\x68\xac\xf1\x35\x24", 5);
    row.offset = 0x800000010;
    pv_idx_row_put(&row, 5, buf);
    CHECK_MEM(buf + 8, "\x00\x00\x00\x02\x01", 5);
    /* Four bytes drop the high bits without a word; division by 8 drops the low ones. */
    row.offset = ((uint64_t)1 << 35) + 8 + 7;
    pv_idx_row_put(&row, 4, buf);
    CHECK_MEM(buf + 8, "\x00\x00\x00\x01", 4);
}

static void round_trips(void) {
    t_guard g = t_guard_new(17);
    uint64_t seed = 1;
    for (int i = 0; i < 20000; i++) {
        const uint8_t width = widths[i & 1];
        uint8_t in[17];
        for (size_t k = 0; k < sizeof in; k++) {
            in[k] = (uint8_t)t_rand(&seed);
        }
        pv_idx_row row;
        pv_idx_row_parse(t_guard_put(&g, in, row_len(width)), width, &row);
        CHECK(row.offset % 8 == 0 && row.offset >> (width == 4 ? 35 : 43) == 0);
        CHECK_EQ(row.reserved, 0);
        uint8_t out[17];
        uint8_t *p = t_guard_put(&g, out, row_len(width));
        pv_idx_row_put(&row, width, p);
        CHECK_MEM(in, p, row_len(width));
    }
    t_guard_free(&g);
}

/* ------------------------------------------------------------------ files of rows */

static pv_idx_row made_row(uint64_t i) {
    uint64_t seed = i * 31 + 7;
    pv_idx_row row = {.key = t_rand(&seed), .offset = t_rand_below(&seed, (uint64_t)1 << 32) * 8};
    row.size = (int32_t)t_rand_below(&seed, 1 << 20) - 1000;
    return row;
}

static int made_file(uint8_t width, uint64_t rows, size_t ragged) {
    int fd = t_file();
    for (uint64_t i = 0; i < rows; i++) {
        uint8_t buf[17];
        pv_idx_row row = made_row(i);
        pv_idx_row_put(&row, width, buf);
        CHECK_EQ(pv__io_pwrite(fd, buf, row_len(width), i * row_len(width), NULL), 0);
    }
    CHECK_EQ(pv__io_pwrite(fd, "ragged bytes beyond", ragged, rows * row_len(width), NULL), 0);
    return fd;
}

static void same_row(const pv_idx_row *a, const pv_idx_row *b) {
    CHECK_EQ(a->key, b->key);
    CHECK_EQ(a->offset, b->offset);
    CHECK_EQ(a->size, b->size);
}

static void reading(void) {
    enum { ROWS = 5000 };
    static pv_idx_row rows[ROWS + 10];
    for (size_t w = 0; w < 2; w++) {
        const uint8_t width = widths[w];
        int fd = made_file(width, ROWS, width + 11U);
        pv_errinfo err;
        static const uint64_t firsts[] = {0,         1, 511, 512, 513, 4990, ROWS - 1, ROWS, ROWS + 1, UINT64_MAX / 17,
                                          UINT64_MAX};
        static const size_t maxes[] = {0, 1, 511, 512, 513, 1024, ROWS, ROWS + 10};
        for (size_t f = 0; f < PV__ARRAY_LEN(firsts); f++) {
            for (size_t m = 0; m < PV__ARRAY_LEN(maxes); m++) {
                memset(rows, 0x55, sizeof rows);
                uint64_t left = firsts[f] < ROWS ? ROWS - firsts[f] : 0;
                uint64_t want = left < maxes[m] ? left : maxes[m];
                CHECK_EQ(pv_idx_read(fd, width, firsts[f], rows, maxes[m], &err), want);
                for (uint64_t i = 0; i < want; i++) {
                    pv_idx_row row = made_row(firsts[f] + i);
                    same_row(&rows[i], &row);
                }
                CHECK_EQ(rows[want].key, 0x5555555555555555);
            }
        }
        close(fd);
        CHECK_EQ(pv_idx_read(fd, width, 0, rows, 1, &err), PV_ESYS);
        CHECK_EQ(err.sys_errno, EBADF);
        CHECK_EQ(pv_idx_read(fd, (uint8_t)(width + 2), 0, rows, 1, &err), PV_EINVAL);
    }
}

static void summary_of_made_rows(void) {
    for (size_t w = 0; w < 2; w++) {
        const uint8_t width = widths[w];
        for (uint64_t rows = 0; rows < 9000; rows = rows * 2 + 1) {
            const size_t ragged = (size_t)(rows % row_len(width));
            const uint64_t dat_size = (uint64_t)1 << 33;
            int fd = made_file(width, rows, ragged);
            pv_idx_summary want = {.file_bytes = rows * row_len(width) + ragged, .rows = rows, .ragged_bytes = ragged};
            for (uint64_t i = 0; i < rows; i++) {
                pv_idx_row row = made_row(i);
                uint64_t end = row.offset + (uint64_t)pv_needle_record_len(row.size < 0 ? 0 : row.size, 3);
                want.last = row;
                want.max_key = row.key > want.max_key ? row.key : want.max_key;
                if (end > want.max_end) {
                    want.max_end = end;
                    want.furthest = row;
                }
                if (row.size >= 0 && end > want.max_valid_end) {
                    want.max_valid_end = end;
                }
                if (row.size >= 0 && end > dat_size && want.past_end++ == 0) {
                    want.first_past_end_key = row.key;
                }
            }
            pv_idx_summary got;
            pv_errinfo err;
            CHECK_EQ(pv_idx_summarize(fd, width, 3, dat_size, &got, &err), 0);
            CHECK_MEM(&got, &want, sizeof got);
            close(fd);
        }
    }
}

/* A file of exactly the rows given. */
static int file_of(const pv_idx_row *rows, size_t count, uint8_t width) {
    int fd = t_file();
    for (size_t i = 0; i < count; i++) {
        uint8_t buf[17];
        pv_idx_row_put(&rows[i], width, buf);
        CHECK_EQ(pv__io_pwrite(fd, buf, row_len(width), i * row_len(width), NULL), 0);
    }
    return fd;
}

static void summary_by_hand(void) {
    /* Two rows of offset 0 lead; a later one does not count to them; a tombstone takes 32 bytes; an offset 0 row is never
     * the furthest; a size of -2 with offset 0 ends the leading ones. */
    static const pv_idx_row rows[] = {
        {.key = 9, .offset = 0, .size = -1},   {.key = 3, .offset = 0, .size = -1},
        {.key = 4, .offset = 8, .size = 20},   {.key = 5, .offset = 0, .size = -1},
        {.key = 7, .offset = 64, .size = 0},   {.key = 6, .offset = 96, .size = -1},
        {.key = 1, .offset = 0, .size = 1000},
    };
    pv_errinfo err;
    for (size_t w = 0; w < 2; w++) {
        int fd = file_of(rows, PV__ARRAY_LEN(rows), widths[w]);
        pv_idx_summary s;
        CHECK_EQ(pv_idx_summarize(fd, widths[w], 3, 128, &s, &err), 0);
        CHECK_EQ(s.rows, 7);
        CHECK_EQ(s.leading_zero_rows, 2);
        CHECK_EQ(s.max_key, 9);
        CHECK_EQ(s.max_end, 128);
        CHECK_EQ(s.furthest.key, 6);
        CHECK_EQ(s.max_valid_end, 96);
        CHECK_EQ(s.last.key, 1);
        CHECK_EQ(s.past_end, 0);
        CHECK_EQ(pv_idx_summarize(fd, widths[w], 3, 63, &s, &err), 0);
        CHECK_EQ(s.past_end, 2);
        CHECK_EQ(s.first_past_end_key, 4);
        /* Version 2 records are 8 bytes shorter: 8 + 16 + 20 + 4 + 8, 64 + 24, 96 + 24. */
        CHECK_EQ(pv_idx_summarize(fd, widths[w], 2, 56, &s, &err), 0);
        CHECK_EQ(s.past_end, 1);
        CHECK_EQ(s.first_past_end_key, 7);
        CHECK_EQ(s.max_end, 120);
        CHECK_EQ(s.blank_rows, 0);
        close(fd);
        static const pv_idx_row holed[] = {
            {.key = 9, .offset = 8, .size = 20}, {.key = 0}, {.key = 0}, {.key = 3, .offset = 64}, {.key = 0}};
        fd = file_of(holed, PV__ARRAY_LEN(holed), widths[w]);
        CHECK_EQ(pv_idx_summarize(fd, widths[w], 3, 128, &s, &err), 0);
        CHECK_EQ(s.blank_rows, 3);
        CHECK_EQ(s.first_blank_row, 1);
        CHECK_EQ(s.furthest.key, 3);
        close(fd);
        /* A key alone was a delete before version 3. */
        static const pv_idx_row halved[] = {
            {.key = 9, .offset = 8, .size = 20}, {.key = 9, .size = -1}, {.key = 9}, {.key = 3, .offset = 64}};
        fd = file_of(halved, PV__ARRAY_LEN(halved), widths[w]);
        CHECK_EQ(pv_idx_summarize(fd, widths[w], 3, 128, &s, &err), 0);
        CHECK_EQ(s.blank_rows, 1);
        CHECK_EQ(s.first_blank_row, 2);
        CHECK_EQ(pv_idx_summarize(fd, widths[w], 2, 128, &s, &err), 0);
        CHECK_EQ(s.blank_rows, 0);
        close(fd);
    }
    /* Sizes and offsets at their ends. */
    static const pv_idx_row extremes[] = {
        {.key = UINT64_MAX, .offset = (((uint64_t)1 << 40) - 1) * 8, .size = INT32_MAX},
        {.key = 0, .offset = 8, .size = INT32_MIN},
    };
    int fd = file_of(extremes, 2, 5);
    pv_idx_summary s;
    CHECK_EQ(pv_idx_summarize(fd, 5, 3, UINT64_MAX, &s, &err), 0);
    CHECK_EQ(s.max_end, extremes[0].offset + (uint64_t)pv_needle_record_len(INT32_MAX, 3));
    CHECK_EQ(s.max_key, UINT64_MAX);
    CHECK_EQ(s.past_end, 0);
    CHECK_EQ(s.leading_zero_rows, 0);
    close(fd);
    CHECK_EQ(pv_idx_summarize(fd, 5, 3, 0, &s, &err), PV_ESYS);
    CHECK_EQ(pv_idx_summarize(fd, 6, 3, 0, &s, &err), PV_EINVAL);
    CHECK_EQ(pv_idx_summarize(fd, 5, 0, 0, &s, &err), PV_EVERSION);
    CHECK_EQ(pv_idx_summarize(fd, 5, 4, 0, &s, &err), PV_EVERSION);
    (void)pv__alloc_fail_at(1);
    CHECK_EQ(pv_idx_summarize(fd, 5, 3, 0, &s, &err), PV_ENOMEM);
}

/* ------------------------------------------------------------------ the I/O layer */

/* Cuts every transfer to at most 3 bytes, interrupts every second call, and counts. */
typedef struct nasty {
    unsigned calls;
    int fail_op;      /* operation that fails ... */
    unsigned fail_at; /* ... from its nth call on (0: never) */
    int fail_errno;
    unsigned seen[PV__IO_OP_COUNT];
} nasty;

static int nasty_hook(void *ctx, const pv__io_event *ev, size_t *len) {
    nasty *n = ctx;
    n->calls++;
    if (n->calls % 2 == 1 && ev->op != PV__IO_CLOSE) {
        return EINTR;
    }
    n->seen[ev->op]++;
    if (n->fail_at > 0 && (int)ev->op == n->fail_op && n->seen[ev->op] >= n->fail_at) {
        return n->fail_errno;
    }
    if (ev->op == PV__IO_PREAD || ev->op == PV__IO_PWRITE) {
        *len = *len > 3 ? 3 : *len;
    }
    return 0;
}

static void short_transfers(void) {
    uint8_t data[100];
    uint8_t back[120];
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = (uint8_t)i;
    }
    int fd = t_file();
    pv_errinfo err = {0};
    nasty n = {0};
    pv__io_set_hook(nasty_hook, &n);
    struct iovec iov[] = {{data, 10}, {NULL, 0}, {data + 10, 1}, {data + 11, 0}, {data + 11, 89}};
    CHECK_EQ(pv__io_pwritev(fd, iov, 5, 7, &err), 0);
    CHECK_EQ(n.seen[PV__IO_PWRITE], 34);
    size_t got;
    CHECK_EQ(pv__io_pread(fd, back, sizeof back, 7, &got, &err), 0);
    CHECK_EQ(got, 100);
    CHECK_MEM(back, data, 100);
    CHECK_EQ(pv__io_pread_full(fd, back, 101, 7, &err), PV_EEOF);
    CHECK_EQ(err.a, 7);
    CHECK_EQ(err.b, 101);
    CHECK_EQ(err.c, 100);
    CHECK_EQ(pv__io_pread_full(fd, back, 100, 7, &err), 0);
    /* The rest of the calls, interrupted too. */
    uint64_t size;
    CHECK_EQ(pv__io_size(fd, &size, &err), 0);
    CHECK_EQ(size, 107);
    CHECK_EQ(pv__io_truncate(fd, 50, &err), 0);
    CHECK_EQ(pv__io_allocate(fd, 4096, &err), 0);
    CHECK_EQ(pv__io_size(fd, &size, &err), 0);
    CHECK_EQ(size, 50);
    CHECK_EQ(pv__io_datasync(fd, &err), 0);
    CHECK_EQ(pv__io_sync(fd, &err), 0);
    pv__io_set_hook(NULL, NULL);
    close(fd);
}

static void failures_carry_errno(void) {
    int fd = t_file();
    pv_errinfo err;
    uint8_t data[30] = {0};
    size_t got;
    uint64_t size;
    CHECK_EQ(pv__io_pwrite(fd, data, sizeof data, 0, NULL), 0);
    nasty n = {.fail_op = PV__IO_PWRITE, .fail_at = 4, .fail_errno = ENOSPC};
    pv__io_set_hook(nasty_hook, &n);
    CHECK_EQ(pv__io_pwrite(fd, data, sizeof data, 1000, &err), PV_ESYS);
    CHECK_EQ(err.sys_errno, ENOSPC);
    CHECK_EQ(err.a, 1000);
    CHECK_EQ(err.b, 30);
    CHECK_EQ(err.c, 9);
    n = (nasty){.fail_op = PV__IO_PREAD, .fail_at = 2, .fail_errno = EIO};
    CHECK_EQ(pv__io_pread(fd, data, sizeof data, 0, &got, &err), PV_ESYS);
    CHECK_EQ(err.sys_errno, EIO);
    CHECK_EQ(got, 3);
    CHECK_EQ(err.c, 3);
    static const int ops[] = {PV__IO_DATASYNC, PV__IO_SYNC, PV__IO_TRUNCATE, PV__IO_ALLOCATE, PV__IO_STAT};
    for (size_t i = 0; i < PV__ARRAY_LEN(ops); i++) {
        n = (nasty){.fail_op = ops[i], .fail_at = 1, .fail_errno = EROFS};
        int rc = ops[i] == PV__IO_DATASYNC   ? pv__io_datasync(fd, &err)
                 : ops[i] == PV__IO_SYNC     ? pv__io_sync(fd, &err)
                 : ops[i] == PV__IO_TRUNCATE ? pv__io_truncate(fd, 1, &err)
                 : ops[i] == PV__IO_ALLOCATE ? pv__io_allocate(fd, 1, &err)
                                             : pv__io_size(fd, &size, &err);
        CHECK_EQ(rc, PV_ESYS);
        CHECK_EQ(err.sys_errno, EROFS);
    }
    n = (nasty){.fail_op = PV__IO_ALLOCATE, .fail_at = 1, .fail_errno = EOPNOTSUPP};
    CHECK_EQ(pv__io_allocate(fd, 1, &err), 0);
    n = (nasty){.fail_op = PV__IO_CLOSE, .fail_at = 1, .fail_errno = EIO};
    CHECK_EQ(pv__io_close(fd, &err), PV_ESYS);
    CHECK_EQ(err.sys_errno, EIO);
    pv__io_set_hook(NULL, NULL);
    CHECK_EQ(pv__io_close(-1, &err), 0);
    /* Offsets that off_t cannot hold never reach the system. */
    CHECK_EQ(pv__io_pread(0, data, 2, UINT64_MAX, &got, &err), PV_EINVAL);
    CHECK_EQ(pv__io_pread(0, data, 2, INT64_MAX, &got, &err), PV_EINVAL);
    CHECK_EQ(pv__io_pwrite(0, data, 2, INT64_MAX, &err), PV_EINVAL);
    CHECK_EQ(pv__io_truncate(0, (uint64_t)INT64_MAX + 1, &err), PV_EINVAL);
    CHECK_EQ(pv__io_allocate(0, UINT64_MAX, &err), PV_EINVAL);
    struct iovec two[] = {{data, SIZE_MAX}, {data, 2}};
    CHECK_EQ(pv__io_pwritev(0, two, 2, 0, &err), PV_EINVAL);
    CHECK_EQ(pv__io_pwritev(0, two, PV__IOV_MAX + 1, 0, &err), PV_EINVAL);
}

static void names_in_directories(void) {
    char dir[] = "/tmp/pv-test-XXXXXX";
    char a[64];
    char b[64];
    pv_errinfo err;
    int fd;
    CHECK(mkdtemp(dir) != NULL);
    snprintf(a, sizeof a, "%s/a", dir);
    snprintf(b, sizeof b, "%s/b", dir);
    CHECK_EQ(pv__io_open(a, O_RDONLY, 0, &fd, &err), PV_ESYS);
    CHECK_EQ(err.sys_errno, ENOENT);
    CHECK_EQ(fd, -1);
    CHECK_EQ(pv__io_open(a, O_RDWR | O_CREAT, 0644, &fd, &err), 0);
    CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    CHECK_EQ(pv__io_close(fd, &err), 0);
    CHECK_EQ(pv__io_rename(a, b, &err), 0);
    CHECK_EQ(pv__io_sync_dir(dir, &err), 0);
    CHECK_EQ(pv__io_rename(a, b, &err), PV_ESYS);
    CHECK_EQ(pv__io_unlink(b, &err), 0);
    CHECK_EQ(pv__io_unlink(b, &err), PV_ESYS);
    CHECK_EQ(err.sys_errno, ENOENT);
    nasty n = {.fail_op = PV__IO_SYNC_DIR, .fail_at = 1, .fail_errno = EIO};
    pv__io_set_hook(nasty_hook, &n);
    CHECK_EQ(pv__io_sync_dir(dir, &err), PV_ESYS);
    CHECK_EQ(err.sys_errno, EIO);
    pv__io_set_hook(NULL, NULL);
    CHECK(rmdir(dir) == 0);
    CHECK_EQ(pv__io_sync_dir(dir, &err), PV_ESYS);
}

int main(void) {
    RUN(one_row);
    RUN(round_trips);
    RUN(reading);
    RUN(summary_of_made_rows);
    RUN(summary_by_hand);
    RUN(short_transfers);
    RUN(failures_carry_errno);
    RUN(names_in_directories);
    return T_END();
}
