/* Scanning data files (pv_dat_scan) and the check of their last record (pv_vol_check_tail). */
#include "t.h"

#define COOKIE 0x01020304U

/* ------------------------------------------------------------------ files made by hand */

typedef struct files {
    int dat;
    int idx;
    uint64_t end;
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

static uint64_t len_of(int fd) {
    return (uint64_t)lseek(fd, 0, SEEK_END);
}

/* Appends one record; returns its offset. */
static uint64_t add(files *f, const pv_needle *given, int32_t *size) {
    uint8_t head[20];
    size_t head_len;
    size_t tail_len;
    uint8_t *tail = malloc(PV_NEEDLE_TAIL_MAX);
    CHECK(tail != NULL);
    pv_needle n = *given;
    n.checksum = n.data_size > 0 ? pv_crc32c(0, n.data, n.data_size) : n.checksum;
    CHECK_EQ(pv_needle_frame(&n, f->version, head, &head_len, tail, PV_NEEDLE_TAIL_MAX, &tail_len, size, NULL), 0);
    uint64_t at = f->end;
    CHECK(pwrite(f->dat, head, head_len, (off_t)at) == (ssize_t)head_len);
    if (n.data_size > 0) {
        CHECK(pwrite(f->dat, n.data, n.data_size, (off_t)(at + head_len)) == (ssize_t)n.data_size);
    }
    CHECK(pwrite(f->dat, tail, tail_len, (off_t)(at + head_len + n.data_size)) == (ssize_t)tail_len);
    free(tail);
    f->end += head_len + n.data_size + tail_len;
    return at;
}

static void add_row(files *f, uint64_t key, uint64_t offset, int32_t size) {
    uint8_t buf[17];
    const pv_idx_row row = {.key = key, .offset = offset, .size = size};
    pv_idx_row_put(&row, f->width, buf);
    size_t len = 12U + f->width;
    CHECK(pwrite(f->idx, buf, len, (off_t)len_of(f->idx)) == (ssize_t)len);
}

static pv_needle text_needle(uint64_t id, const char *text) {
    pv_needle n = {.id = id, .cookie = COOKIE, .append_at_ns = 1000 + id, .data = (const uint8_t *)text};
    n.data_size = (uint32_t)strlen(text);
    return n;
}

/* Record and row. */
static uint64_t put(files *f, uint64_t id, const char *text) {
    pv_needle n = text_needle(id, text);
    int32_t size;
    uint64_t at = add(f, &n, &size);
    add_row(f, id, at, size);
    return at;
}

static int scan_all(int fd, uint8_t version, uint64_t *at, uint64_t end, int body, pv_scan_rec *recs, size_t max,
                    size_t step, pv_errinfo *err) {
    size_t count = 0;
    int rc = 0;
    while (count < max && (rc = pv_dat_scan(fd, version, at, end, body, recs + count, step, err)) > 0) {
        count += (size_t)rc;
    }
    return rc < 0 ? rc : (int)count;
}

/* ------------------------------------------------------------------ scan */

static void test_scan_versions(void) {
    for (uint8_t version = 1; version <= 3; version++) {
        files f = new_files(version, 4);
        pv_needle n = text_needle(1, "some text");
        int32_t size;
        n.flags = PV_F_MTIME | PV_F_TTL;
        n.last_modified_s = 1234;
        n.ttl_count = 3;
        n.ttl_unit = 2;
        uint64_t first = add(&f, &n, &size);
        pv_needle empty = {.id = 2, .cookie = 5, .append_at_ns = 77, .checksum = 9};
        uint64_t second = add(&f, &empty, &size);
        for (size_t step = 1; step <= 4; step++) {
            uint64_t at = 8;
            pv_scan_rec recs[8];
            CHECK_EQ(scan_all(f.dat, version, &at, UINT64_MAX, 1, recs, 8, step, NULL), 2);
            CHECK_EQ(at, f.end);
            CHECK_EQ(recs[0].offset, first);
            CHECK_EQ(recs[0].id, 1);
            CHECK_EQ(recs[0].cookie, COOKIE);
            CHECK_EQ(recs[0].status, 0);
            CHECK_EQ(recs[0].data_size, 9);
            CHECK_EQ(recs[0].checksum, pv_crc32c(0, "some text", 9));
            CHECK_EQ(recs[0].append_at_ns, version == 3 ? 1001 : 0);
            CHECK_EQ(recs[0].last_modified_s, version == 1 ? 0 : 1234);
            CHECK_EQ(recs[0].ttl_count, version == 1 ? 0 : 3);
            CHECK_EQ(recs[0].ttl_unit, version == 1 ? 0 : 2);
            CHECK_EQ(recs[0].flags, version == 1 ? 0 : n.flags);
            CHECK_EQ(recs[1].offset, second);
            CHECK_EQ(recs[1].size, 0);
            CHECK_EQ(recs[1].checksum, 9);
            CHECK_EQ(recs[1].record_len, version == 3 ? 32 : 24);
            at = 8;
            CHECK_EQ(scan_all(f.dat, version, &at, UINT64_MAX, 0, recs, 8, step, NULL), 2);
            CHECK_EQ(recs[0].data_size, 0); /* headers only */
            CHECK_EQ(recs[0].append_at_ns, 0);
            CHECK_EQ(recs[0].id, 1);
            CHECK_EQ(at, f.end);
            at = 8;
            CHECK_EQ(scan_all(f.dat, version, &at, second, 1, recs, 8, step, NULL), 1); /* an end that is given */
            CHECK_EQ(at, second);
        }
        drop_files(&f);
    }
    files f = new_files(3, 4);
    uint64_t at = 8;
    pv_scan_rec rec;
    CHECK_EQ(pv_dat_scan(f.dat, 4, &at, UINT64_MAX, 1, &rec, 1, NULL), PV_EVERSION);
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, &rec, 0, NULL), PV_EINVAL);
    CHECK_EQ(pv_dat_scan(-1, 3, &at, UINT64_MAX, 1, &rec, 1, NULL), PV_ESYS);
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, &rec, 1, NULL), 0);
    drop_files(&f);
}

/* Cut at every length: whole records come, then a clean end or the cut is told, wherever it is. */
static void test_scan_cut(void) {
    for (uint8_t version = 1; version <= 3; version++) {
        files f = new_files(version, 4);
        put(&f, 1, "first");
        uint64_t last = put(&f, 2, "the second one");
        uint64_t end = f.end;
        uint64_t needed = last + 16 + (version == 1 ? 14U : 19U) + (version == 3 ? 12U : 4U);
        for (uint64_t len = end; len > last; len--) {
            CHECK(ftruncate(f.dat, (off_t)len) == 0);
            for (int body = 0; body < 2; body++) {
                uint64_t at = 8;
                pv_scan_rec recs[4];
                pv_errinfo err;
                int first = pv_dat_scan(f.dat, version, &at, UINT64_MAX, body, recs, 4, &err);
                if (len >= needed) { /* only padding is missing */
                    CHECK_EQ(first, 2);
                    CHECK_EQ(recs[1].status, 0);
                    CHECK_EQ(at, end);
                    CHECK_EQ(pv_dat_scan(f.dat, version, &at, UINT64_MAX, body, recs, 4, &err), 0);
                    continue;
                }
                CHECK_EQ(first, 1);
                CHECK_EQ(err.code, 0);
                CHECK_EQ(at, last);
                int second = pv_dat_scan(f.dat, version, &at, UINT64_MAX, body, recs, 4, &err);
                CHECK_EQ(at, last);
                if (len - last < 16) { /* inside a header: clean, as upstream */
                    CHECK_EQ(second, 0);
                } else {
                    CHECK_EQ(second, PV_EEOF);
                    CHECK_EQ(err.a, last);
                    CHECK_EQ(err.b, end - last);
                    CHECK_EQ(err.c, len - last);
                }
            }
        }
        drop_files(&f);
    }
}

static void test_scan_damage(void) {
    files f = new_files(3, 4);
    uint64_t a = put(&f, 1, "first");
    uint64_t b = put(&f, 2, "second");
    uint64_t c = put(&f, 3, "third");
    pv_scan_rec recs[8];
    uint64_t at = 8;
    CHECK(pwrite(f.dat, "X", 1, (off_t)(a + 21)) == 1);                /* data */
    CHECK(pwrite(f.dat, "\x7f\xff\xff\xff", 4, (off_t)(b + 16)) == 4); /* data size */
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, recs, 8, NULL), 3);
    CHECK_EQ(recs[0].status, PV_ECRC);
    CHECK_EQ(recs[1].status, PV_ECORRUPT);
    CHECK_EQ(recs[2].status, 0);
    CHECK_EQ(recs[2].offset, c);
    at = 8;
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 0, recs, 8, NULL), 3);
    CHECK_EQ(recs[0].status, 0);

    /* a legacy checksum is right, and the recomputed one is given */
    uint8_t sum[4];
    uint32_t crc = pv_crc32c(0, "third", 5);
    pv__put_be32(sum, pv_crc_legacy(crc));
    CHECK(pwrite(f.dat, sum, 4, (off_t)(c + 16 + 10)) == 4);
    at = c;
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, recs, 8, NULL), 1);
    CHECK_EQ(recs[0].status, 0);
    CHECK_EQ(recs[0].checksum, crc);

    /* negative sizes: stepped over as upstream does while that leads on, and the end where it does not */
    pv_errinfo err;
    pv__put_be32(sum, 0xffffffffU); /* -1: 32 bytes */
    CHECK(pwrite(f.dat, sum, 4, (off_t)(c + 12)) == 4);
    at = c;
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, recs, 1, NULL), 1);
    CHECK_EQ(recs[0].status, PV_ECORRUPT);
    CHECK_EQ(recs[0].record_len, 32);
    CHECK_EQ(at, c + 32);
    pv__put_be32(sum, (uint32_t)-100);
    CHECK(pwrite(f.dat, sum, 4, (off_t)(c + 12)) == 4);
    at = 8;
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, recs, 8, &err), 2);
    CHECK_EQ(at, c);
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, recs, 8, &err), PV_ECORRUPT);
    CHECK_EQ(err.a, 0);
    CHECK_EQ(err.b, c);
    CHECK_EQ((int64_t)err.c, -100);
    CHECK_EQ(at, c);

    /* a size far behind the end asks for no memory */
    pv__put_be32(sum, INT32_MAX);
    CHECK(pwrite(f.dat, sum, 4, (off_t)(c + 12)) == 4);
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, recs, 8, &err), PV_EEOF);

    /* zeros are records of id 0 */
    CHECK(ftruncate(f.dat, (off_t)c) == 0);
    CHECK(ftruncate(f.dat, (off_t)c + 100) == 0);
    at = c;
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, recs, 8, &err), 3);
    CHECK_EQ(recs[2].id | recs[2].cookie | (uint32_t)recs[2].size, 0);
    CHECK_EQ(recs[2].status, 0);
    CHECK_EQ(at, c + 96);
    drop_files(&f);
}

/* Records larger than the window, with every field, are checked piece by piece and give what a parser gives. */
static void test_scan_long(void) {
    for (uint8_t version = 1; version <= 3; version++) {
        files f = new_files(version, 4);
        size_t len = (3U << 20) + 17;
        uint64_t seed = version;
        uint8_t *data = malloc(len + 8);
        uint8_t *pairs = malloc(65535);
        CHECK(data != NULL && pairs != NULL);
        for (size_t i = 0; i < len; i += 8) {
            uint64_t r = t_rand(&seed);
            memcpy(data + i, &r, 8);
        }
        memset(pairs, 'p', 65535);
        pv_needle n = {.id = 6, .cookie = COOKIE, .append_at_ns = 99, .data = data, .data_size = (uint32_t)len};
        n.flags = PV_F_NAME | PV_F_MIME | PV_F_MTIME | PV_F_TTL | PV_F_PAIRS;
        n.name = n.mime = pairs;
        n.name_size = n.mime_size = 255;
        n.pairs = pairs;
        n.pairs_size = 65535;
        n.last_modified_s = 1700000000;
        n.ttl_count = 7;
        n.ttl_unit = 3;
        put(&f, 5, "before");
        int32_t size;
        uint64_t at_long = add(&f, &n, &size);
        put(&f, 7, "behind");
        pv_scan_rec recs[4];
        uint64_t at = 8;
        CHECK_EQ(pv_dat_scan(f.dat, version, &at, UINT64_MAX, 1, recs, 4, NULL), 3);
        CHECK_EQ(recs[1].status, 0);
        CHECK_EQ(recs[1].size, size);
        CHECK_EQ(recs[1].data_size, len);
        CHECK_EQ(recs[1].checksum, pv_crc32c(0, data, len));
        CHECK_EQ(recs[1].append_at_ns, version == 3 ? 99 : 0);
        CHECK_EQ(recs[1].last_modified_s, version == 1 ? 0 : 1700000000);
        CHECK_EQ(recs[1].ttl_count, version == 1 ? 0 : 7);
        CHECK_EQ(recs[2].status, 0);
        CHECK_EQ(recs[2].id, 7);

        uint8_t byte = (uint8_t)(data[len - 1] ^ 1);
        CHECK(pwrite(f.dat, &byte, 1, (off_t)(at_long + 20 + len - 1 - (version == 1 ? 4 : 0))) == 1);
        at = 8;
        CHECK_EQ(pv_dat_scan(f.dat, version, &at, UINT64_MAX, 1, recs, 4, NULL), 3);
        CHECK_EQ(recs[1].status, PV_ECRC);
        CHECK_EQ(recs[2].status, 0);
        if (version > 1) {
            uint8_t data_size[4];
            pv__put_be32(data_size, (uint32_t)size);
            CHECK(pwrite(f.dat, data_size, 4, (off_t)(at_long + 16)) == 4);
            at = at_long;
            CHECK_EQ(pv_dat_scan(f.dat, version, &at, UINT64_MAX, 1, recs, 1, NULL), 1);
            CHECK_EQ(recs[0].status, PV_ECORRUPT);
            pv__put_be32(data_size, 5); /* megabytes of "fields": those that can be meant are parsed */
            CHECK(pwrite(f.dat, data_size, 4, (off_t)(at_long + 16)) == 4);
            at = at_long;
            CHECK_EQ(pv_dat_scan(f.dat, version, &at, UINT64_MAX, 1, recs, 1, NULL), 1);
            CHECK(recs[0].status == PV_ECRC || recs[0].status == PV_ECORRUPT);
        }
        at = 8;
        CHECK_EQ(pv_dat_scan(f.dat, version, &at, UINT64_MAX, 0, recs, 4, NULL), 3); /* hops over it */
        CHECK_EQ(at, f.end);
        free(data);
        free(pairs);
        drop_files(&f);
    }
}

static int bad_sector(void *ctx, const pv__io_event *ev, size_t *len) {
    const uint64_t *bad = ctx; /* [bad[0], bad[1]) */
    if (ev->op != PV__IO_PREAD || ev->offset >= bad[1] || ev->offset + *len <= bad[0]) {
        return 0;
    }
    if (ev->offset < bad[0]) {
        *len = (size_t)(bad[0] - ev->offset);
        return 0;
    }
    return EIO;
}

/* A bad sector in a body costs that record; in a header it ends the scan. */
static void test_scan_bad_sector(void) {
    files f = new_files(3, 4);
    uint64_t a = put(&f, 1, "first");
    uint64_t b = put(&f, 2, "a rather long second record, long enough to be cut in its middle");
    put(&f, 3, "third");
    uint64_t bad[2] = {b + 30, b + 40};
    pv_scan_rec recs[8];
    pv_errinfo err;
    uint64_t at = 8;
    pv__io_set_hook(bad_sector, bad);
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, recs, 8, &err), 3);
    CHECK_EQ(recs[0].status, 0);
    CHECK_EQ(recs[1].status, PV_ESYS);
    CHECK_EQ(recs[1].id, 2);
    CHECK_EQ(recs[2].status, 0);
    bad[0] = b + 3;
    at = a;
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, recs, 8, &err), 1);
    CHECK_EQ(at, b);
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, recs, 8, &err), PV_ESYS);
    CHECK_EQ(err.sys_errno, EIO);
    pv__io_set_hook(NULL, NULL);
    pv__alloc_fail_at(1);
    CHECK_EQ(pv_dat_scan(f.dat, 3, &at, UINT64_MAX, 1, recs, 8, &err), PV_ENOMEM);
    drop_files(&f);
}

/* Any bytes: the scan ends, moves on with every record, and never reads behind the end. */
static void test_scan_noise(void) {
    uint64_t seed = 9;
    for (unsigned round = 0; round < 3000; round++) {
        files f = new_files(3, 4);
        uint8_t buf[600];
        for (size_t i = 0; i < sizeof buf; i++) {
            buf[i] = (uint8_t)(t_rand_below(&seed, 3) ? 0 : t_rand(&seed));
        }
        CHECK(pwrite(f.dat, buf, sizeof buf, 8) == (ssize_t)sizeof buf);
        for (int body = 0; body < 2; body++) {
            uint64_t at = 8;
            pv_scan_rec rec;
            int rc;
            unsigned count = 0;
            uint8_t version = (uint8_t)(1 + round % 3);
            uint64_t before = at;
            while ((rc = pv_dat_scan(f.dat, version, &at, UINT64_MAX, body, &rec, 1, NULL)) > 0) {
                CHECK(at >= before + 16);
                before = at;
                CHECK(++count <= 40);
            }
            CHECK(rc == 0 || rc == PV_EEOF || rc == PV_ECORRUPT);
        }
        drop_files(&f);
    }
}

/* Walking is scanning without the records, up to the first that is not right. */
static void test_walk(void) {
    for (uint8_t version = 1; version <= 3; version++) {
        files f = new_files(version, 4);
        put(&f, 1, "first");
        uint64_t second = put(&f, 2, "second");
        put(&f, 3, "third");
        uint64_t at = 8;
        pv_errinfo err;
        CHECK_EQ(pv_dat_walk(f.dat, version, &at, UINT64_MAX, 1, 2, &err), 2);
        CHECK_EQ(pv_dat_walk(f.dat, version, &at, UINT64_MAX, 1, 2, &err), 1);
        CHECK_EQ(at, f.end);
        CHECK_EQ(pv_dat_walk(f.dat, version, &at, UINT64_MAX, 1, 2, &err), 0);
        at = 8;
        CHECK_EQ(pv_dat_walk(f.dat, version, &at, second, 0, 9, &err), 1);
        CHECK_EQ(at, second);
        at = 8;
        CHECK_EQ(pv_dat_walk(f.dat, version, &at, f.end - 16, 0, 9, &err), PV_EEOF); /* within the third */
        CHECK_EQ(err.a, at);
        CHECK(at > second);
        const uint64_t text_at = second + PV_NEEDLE_HEADER + (version == 1 ? 0 : 4);
        CHECK(pwrite(f.dat, "S", 1, (off_t)text_at) == 1);
        at = 8;
        CHECK_EQ(pv_dat_walk(f.dat, version, &at, UINT64_MAX, 1, 9, &err), PV_ECRC);
        CHECK_EQ(at, second);
        CHECK_EQ(err.a, second);
        CHECK_EQ(err.b, 2);
        at = 8;
        CHECK_EQ(pv_dat_walk(f.dat, version, &at, UINT64_MAX, 0, 9, &err), 3);
        uint64_t bad[2] = {second + 4, second + 5};
        at = 8;
        pv__io_set_hook(bad_sector, bad);
        CHECK_EQ(pv_dat_walk(f.dat, version, &at, UINT64_MAX, 1, 9, &err), PV_ESYS);
        pv__io_set_hook(NULL, NULL);
        CHECK_EQ(at, second);
        CHECK_EQ(pv_dat_walk(f.dat, version, &at, UINT64_MAX, 1, 0, &err), PV_EINVAL);
        CHECK_EQ(pv_dat_walk(f.dat, 4, &at, UINT64_MAX, 1, 1, &err), PV_EVERSION);
        CHECK_EQ(pv_dat_walk(-1, version, &at, UINT64_MAX, 1, 1, &err), PV_ESYS);
        pv__alloc_fail_at(1);
        CHECK_EQ(pv_dat_walk(f.dat, version, &at, UINT64_MAX, 1, 1, &err), PV_ENOMEM);
        drop_files(&f);
    }
}

/* ------------------------------------------------------------------ the last record */

static int tail(const files *f, uint64_t *when, pv_errinfo *err) {
    return pv_vol_check_tail(f->dat, f->idx, f->width, f->version, when, err);
}

static void test_tail_good(void) {
    for (uint8_t version = 1; version <= 3; version++) {
        for (uint8_t width = 4; width <= 5; width++) {
            files f = new_files(version, width);
            uint64_t when;
            pv_errinfo err;
            CHECK_EQ(tail(&f, &when, &err), PV_TAIL_OK); /* nothing at all */
            pv_needle n = text_needle(9, "not indexed");
            int32_t size;
            uint64_t stray = add(&f, &n, &size);
            CHECK_EQ(tail(&f, &when, &err), PV_TAIL_OK); /* upstream notices only in a scrub */
            add_row(&f, 9, 0, -1);
            CHECK_EQ(tail(&f, &when, &err), PV_TAIL_OK); /* no row points into .dat */
            add_row(&f, 9, stray, size);
            CHECK_EQ(tail(&f, &when, &err), PV_TAIL_OK);
            CHECK_EQ(when, version == 3 ? 1009 : 0);

            put(&f, 1, "one");
            CHECK_EQ(tail(&f, &when, &err), PV_TAIL_OK);
            CHECK_EQ(when, version == 3 ? 1001 : 0);
            const pv_needle gone = {.id = 1, .cookie = COOKIE, .append_at_ns = 5000};
            uint64_t at = add(&f, &gone, &size);
            add_row(&f, 1, at, -1);
            CHECK_EQ(tail(&f, &when, &err), PV_TAIL_OK);
            CHECK_EQ(when, version == 3 ? 5000 : 0);

            /* rows sorted by key: the furthest record counts, not the last row */
            add_row(&f, 12, stray, -1);
            add_row(&f, 13, 0, -1);
            CHECK_EQ(tail(&f, &when, &err), PV_TAIL_OK);
            CHECK_EQ(when, version == 3 ? 5000 : 0);

            CHECK(pwrite(f.idx, "x", 1, (off_t)len_of(f.idx)) == 1);
            CHECK_EQ(tail(&f, &when, &err), PV_TAIL_IDX_RAGGED);
            CHECK_EQ(err.a, len_of(f.idx));
            drop_files(&f);
        }
    }
    files f = new_files(3, 4);
    uint64_t when;
    CHECK_EQ(pv_vol_check_tail(f.dat, f.idx, 3, 3, &when, NULL), PV_EINVAL);
    CHECK_EQ(pv_vol_check_tail(f.dat, f.idx, 4, 0, &when, NULL), PV_EVERSION);
    CHECK_EQ(pv_vol_check_tail(-1, f.idx, 4, 3, &when, NULL), PV_ESYS);
    CHECK_EQ(pv_vol_check_tail(f.dat, -1, 4, 3, &when, NULL), PV_ESYS);
    drop_files(&f);
}

static void test_tail_longer_and_shorter(void) {
    for (uint8_t version = 2; version <= 3; version++) {
        files f = new_files(version, 4);
        uint64_t when;
        pv_errinfo err;
        put(&f, 1, "one");
        uint64_t last = put(&f, 2, "two");
        uint64_t end = f.end;
        CHECK(ftruncate(f.dat, (off_t)end + 1) == 0);
        if (version == 3) {
            CHECK_EQ(tail(&f, &when, &err), PV_TAIL_DAT_LONGER);
            CHECK_EQ(err.a, end + 8); /* as upstream counts */
            CHECK_EQ(err.b, end);
            CHECK_EQ(when, 1002);
        } else {
            CHECK_EQ(tail(&f, &when, &err), PV_TAIL_OK); /* old versions do not notice */
        }
        for (uint64_t len = end - 1; len >= last - 3; len--) {
            CHECK(ftruncate(f.dat, (off_t)len) == 0);
            int rc = tail(&f, &when, &err);
            if (version == 3 && end - len < 8 && len >= last + 16 + 8 + 4 + 8) {
                CHECK_EQ(rc, PV_TAIL_OK); /* within the last 8 bytes: rounds up */
                continue;
            }
            CHECK_EQ(rc, PV_TAIL_DAT_SHORTER);
            CHECK_EQ(err.a, end);
            CHECK_EQ(err.b, len);
        }
        drop_files(&f);
    }
    uint64_t when;
    pv_errinfo err;
    int32_t size;
    /* all of 8 bytes of padding missing: the time is there, but the length does not round up to the end */
    files f = new_files(3, 4);
    put(&f, 1, "1234567");
    CHECK(ftruncate(f.dat, (off_t)f.end - 8) == 0);
    CHECK_EQ(tail(&f, &when, &err), PV_TAIL_DAT_SHORTER);
    CHECK_EQ(when, 1001);
    CHECK_EQ(err.a, f.end);
    drop_files(&f);

    /* a tombstone is read whole, padding included */
    f = new_files(3, 4);
    put(&f, 1, "one");
    const pv_needle gone = {.id = 1, .cookie = COOKIE, .append_at_ns = 5000};
    uint64_t at = add(&f, &gone, &size);
    add_row(&f, 1, at, -1);
    CHECK(ftruncate(f.dat, (off_t)f.end - 3) == 0);
    CHECK_EQ(tail(&f, &when, &err), PV_TAIL_DAT_SHORTER);
    CHECK_EQ(err.b, f.end - 3);
    CHECK(ftruncate(f.dat, (off_t)f.end + 64) == 0);
    CHECK_EQ(tail(&f, &when, &err), PV_TAIL_DAT_LONGER);
    CHECK_EQ(err.a, f.end + 64);
    CHECK_EQ(err.b, f.end);
    drop_files(&f);
}

static void test_tail_bad_record(void) {
    uint64_t when;
    pv_errinfo err;
    for (uint8_t version = 1; version <= 3; version++) {
        files f = new_files(version, 4);
        uint64_t at = put(&f, 2, "data");
        CHECK(pwrite(f.dat, "D", 1, (off_t)(at + (version == 1 ? 16 : 20))) == 1);
        int rc = tail(&f, &when, &err);
        CHECK_EQ(rc, version == 3 ? PV_TAIL_OK : PV_TAIL_BAD_RECORD); /* version 3: no checksum test */
        if (version != 3) {
            CHECK_EQ(err.code, PV_ECRC);
        }
        CHECK(pwrite(f.dat, "d", 1, (off_t)(at + (version == 1 ? 16 : 20))) == 1);
        CHECK(pwrite(f.dat, "\x05", 1, (off_t)(at + 11)) == 1); /* id */
        rc = tail(&f, &when, &err);
        CHECK_EQ(rc, version == 3 ? PV_TAIL_OK : PV_TAIL_BAD_RECORD);
        if (version != 3) {
            CHECK_EQ(err.code, PV_EID);
            CHECK_EQ(err.a, 5);
            CHECK_EQ(err.b, 2);
        }
        CHECK(pwrite(f.dat, "\x77", 1, (off_t)(at + 15)) == 1); /* size */
        CHECK_EQ(tail(&f, &when, &err), PV_TAIL_BAD_RECORD);
        CHECK_EQ(err.code, PV_ESIZE);
        CHECK_EQ(err.c, 0x77);

        /* a tombstone whose record is another's, or none */
        const pv_needle gone = {.id = 3, .cookie = COOKIE};
        int32_t size;
        at = add(&f, &gone, &size);
        add_row(&f, 4, at, -1);
        CHECK_EQ(tail(&f, &when, &err), PV_TAIL_BAD_RECORD);
        CHECK_EQ(err.code, PV_EID);
        CHECK(pwrite(f.dat, "\x01", 1, (off_t)(at + 15)) == 1);
        CHECK_EQ(tail(&f, &when, &err), PV_TAIL_BAD_RECORD);
        CHECK_EQ(err.code, PV_ESIZE);
        drop_files(&f);
    }
}

/* A 4-byte volume beyond 32 GiB: the row's offset has wrapped. */
static void test_tail_wrapped(void) {
    files f = new_files(3, 4);
    f.end = ((uint64_t)1 << 35) + 64;
    pv_needle n = text_needle(2, "far");
    int32_t size;
    uint64_t at = add(&f, &n, &size);
    add_row(&f, 2, at, size); /* the row drops the high bits */
    uint64_t when;
    pv_errinfo err;
    CHECK_EQ(tail(&f, &when, &err), PV_TAIL_OK);
    CHECK_EQ(when, 1002);
    CHECK(ftruncate(f.dat, (off_t)f.end + 8) == 0);
    CHECK_EQ(tail(&f, &when, &err), PV_TAIL_DAT_LONGER);
    drop_files(&f);
}

int main(void) {
    RUN(test_scan_versions);
    RUN(test_scan_cut);
    RUN(test_scan_damage);
    RUN(test_scan_long);
    RUN(test_scan_bad_sector);
    RUN(test_scan_noise);
    RUN(test_walk);
    RUN(test_tail_good);
    RUN(test_tail_longer_and_shorter);
    RUN(test_tail_bad_record);
    RUN(test_tail_wrapped);
    return T_END();
}
