/* Scrub (pv_scrub): what it finds, in which order, in steps of any size, and on a volume that is written to. */
#include "t.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

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

static void put_row(files *f, uint64_t number, uint64_t key, uint64_t offset, int32_t size) {
    uint8_t buf[17];
    const pv_idx_row row = {.key = key, .offset = offset, .size = size};
    pv_idx_row_put(&row, f->width, buf);
    size_t len = 12U + f->width;
    CHECK(pwrite(f->idx, buf, len, (off_t)(number * len)) == (ssize_t)len);
    if (number >= f->rows) {
        f->rows = number + 1;
    }
}

/* A record of so many data bytes; gives its offset and Size. No row. */
static uint64_t put_record(files *f, uint64_t key, uint32_t data_size, int32_t *size) {
    uint8_t *data = calloc(1, data_size + 1U);
    CHECK(data != NULL);
    memset(data, (int)(key & 0xff), data_size);
    pv_needle n = {.id = key, .cookie = 7, .append_at_ns = key, .data_size = data_size, .data = data};
    n.checksum = pv_crc32c(0, n.data, n.data_size);
    uint8_t head[20];
    size_t head_len;
    size_t tail_len;
    static uint8_t tail[PV_NEEDLE_TAIL_MAX];
    CHECK_EQ(pv_needle_frame(&n, f->version, head, &head_len, tail, sizeof tail, &tail_len, size, NULL), 0);
    uint64_t at = f->end;
    CHECK(pwrite(f->dat, head, head_len, (off_t)at) == (ssize_t)head_len);
    CHECK(pwrite(f->dat, data, data_size, (off_t)(at + head_len)) == (ssize_t)data_size);
    CHECK(pwrite(f->dat, tail, tail_len, (off_t)(at + head_len + data_size)) == (ssize_t)tail_len);
    f->end = at + head_len + data_size + tail_len;
    free(data);
    return at;
}

static uint64_t add(files *f, uint64_t key, uint32_t data_size) {
    int32_t size;
    uint64_t at = put_record(f, key, data_size, &size);
    put_row(f, f->rows, key, at, size);
    return at;
}

typedef struct result {
    pv_scrub_finding found[64];
    size_t count;
    pv_scrub_stats stats;
    int steps;
    int rc;
} result;

static result scrub_opts(const pv_scrub_opts *o, uint64_t step_bytes) {
    static result r;
    memset(&r, 0, sizeof r);
    pv_scrub *s;
    pv_errinfo err;
    r.rc = pv_scrub_begin(o, &s, &err);
    CHECK_EQ(r.rc, 0);
    do {
        r.rc = pv_scrub_step(s, step_bytes, &err);
        int got = pv_scrub_findings(s, r.found + r.count, 64 - r.count);
        CHECK(got >= 0);
        r.count += (size_t)got;
        r.steps++;
    } while (r.rc == 1);
    pv_scrub_stat(s, &r.stats);
    pv_scrub_free(s);
    return r;
}

static result scrub(const files *f, uint32_t flags, uint64_t step_bytes) {
    const pv_scrub_opts o = {
        .dat_fd = f->dat, .idx_fd = f->idx, .width = f->width, .version = f->version, .flags = flags};
    return scrub_opts(&o, step_bytes);
}

static void test_good_volumes(void) {
    static const uint64_t steps[] = {1, 100, 100000, UINT64_MAX};
    for (uint8_t version = 1; version <= 3; version++) {
        for (uint8_t width = 4; width <= 5; width++) {
            files f = new_files(version, width);
            for (uint64_t key = 1; key <= 300; key++) {
                add(&f, key, (uint32_t)(key * 97 % 4000));
            }
            int32_t size;
            uint64_t at = put_record(&f, 5, 0, &size);
            put_row(&f, f.rows, 5, at, -1);
            put_row(&f, f.rows, 6, 0, -1); /* a delete of a tier: nowhere */
            for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
                result r = scrub(&f, PV_SCRUB_CHECK_ID, steps[i]);
                CHECK_EQ(r.rc, 0);
                CHECK_EQ(r.count, 0);
                CHECK_EQ(r.stats.rows, 302);
                CHECK_EQ(r.stats.checked_records, 300);
                CHECK_EQ(r.stats.in_order, 1);
                CHECK_EQ(r.stats.done_rows, r.stats.total_rows);
                CHECK_EQ(r.stats.position, f.end);
                CHECK_EQ(r.stats.dat_bytes, f.end);
                /* a tombstone's row counts with the length of size -1, which is that of an empty record */
                CHECK_EQ(r.stats.expected_bytes, f.end);
                CHECK(i == 3 ? r.steps == 1 : r.steps > 2);
            }
            result r = scrub(&f, PV_SCRUB_INDEX_ONLY, 1000);
            CHECK_EQ(r.count, 0);
            CHECK_EQ(r.stats.checked_records, 0);
            drop_files(&f);
        }
    }
}

/* Rows in another order than their records: the same result, found through memory. */
static void test_rows_in_any_order(void) {
    files f = new_files(3, 5);
    uint64_t at[200];
    int32_t size[200];
    for (uint64_t i = 0; i < 200; i++) {
        at[i] = put_record(&f, i + 1, (uint32_t)(i * 31 % 999 + 1), &size[i]);
    }
    for (uint64_t i = 0; i < 200; i++) {
        uint64_t from = (i * 77 + 5) % 200;
        put_row(&f, i, from + 1, at[from], size[from]);
    }
    uint8_t byte = 0xee;
    CHECK(pwrite(f.dat, &byte, 1, (off_t)at[50] + 25) == 1);
    for (uint64_t step = 1; step < 100000; step *= 11) {
        result r = scrub(&f, PV_SCRUB_CHECK_ID, step);
        CHECK_EQ(r.stats.in_order, 0);
        CHECK_EQ(r.stats.expected_bytes, f.end);
        CHECK_EQ(r.stats.checked_records, 200);
        CHECK_EQ(r.count, 1);
        CHECK_EQ(r.found[0].kind, PV_SCRUB_RECORD);
        CHECK_EQ(r.found[0].key, 51);
        CHECK_EQ(r.found[0].error.code, PV_ECRC);
        CHECK_EQ((r.found[0].row * 77 + 5) % 200, 50);
    }
    drop_files(&f);
}

static void test_overlaps(void) {
    files f = new_files(3, 4);
    uint64_t first = add(&f, 1, 100);
    add(&f, 2, 100);
    add(&f, 3, 100);
    put_row(&f, 3, 9, first + 8, 4); /* out of order, too */
    result r = scrub(&f, PV_SCRUB_INDEX_ONLY, 1);
    CHECK_EQ(r.count, 1);
    const pv_scrub_finding *o = &r.found[0];
    CHECK_EQ(o->kind, PV_SCRUB_OVERLAP);
    CHECK_EQ(o->key, 9);
    CHECK_EQ(o->row, 3);
    CHECK_EQ(o->offset, first + 8);
    CHECK_EQ(o->end, first + 8 + (uint64_t)pv_needle_record_len(4, 3) - 1);
    CHECK_EQ(o->other_key, 1);
    CHECK_EQ(o->other_offset, first);
    CHECK_EQ(o->other_end, first + (uint64_t)pv_needle_record_len(105, 3) - 1);
    drop_files(&f);
}

/* Every kind of damage to a record, with the reason upstream would give. */
static void test_damage(void) {
    for (int large = 0; large < 2; large++) {
        uint32_t data_size = large ? (17U << 20) + 3 : 1000;
        files f = new_files(3, 4);
        uint64_t at[6];
        for (uint64_t i = 0; i < 6; i++) {
            at[i] = add(&f, i + 1, data_size);
        }
        uint8_t byte = 0x5a;
        CHECK(pwrite(f.dat, &byte, 1, (off_t)(at[1] + 500)) == 1);             /* data */
        CHECK(pwrite(f.dat, &byte, 1, (off_t)(at[2] + 12)) == 1);              /* Size */
        CHECK(pwrite(f.dat, "\x7f\xff\xff\xff", 4, (off_t)(at[3] + 16)) == 4); /* DataSize */
        CHECK(pwrite(f.dat, &byte, 1, (off_t)(at[4] + 11)) == 1);              /* id */
        CHECK_EQ(ftruncate(f.dat, (off_t)(f.end - 1)), 0);                     /* padding of the last one */
        result r = scrub(&f, 0, large ? 1 << 20 : 64);
        CHECK_EQ(r.count, 4);
        CHECK_EQ(r.stats.bad_records, 4);
        CHECK_EQ(r.found[0].error.code, PV_ECRC);
        CHECK_EQ(r.found[0].key, 2);
        /* the second try, 32 GiB further on, is what counts */
        CHECK_EQ(r.found[1].error.code, PV_EEOF);
        CHECK_EQ(r.found[1].key, 3);
        CHECK_EQ(r.found[2].error.code, PV_ECORRUPT);
        CHECK_EQ(r.found[2].error.a, 1);
        CHECK_EQ(r.found[3].error.code, PV_EEOF);
        CHECK_EQ(r.found[3].row, 5);
        r = scrub(&f, PV_SCRUB_CHECK_ID, UINT64_MAX);
        CHECK_EQ(r.count, 5);
        CHECK_EQ(r.found[3].error.code, PV_EID);
        CHECK_EQ(r.found[3].error.b, 5);
        /* resumed behind the first two damaged ones */
        const pv_scrub_opts o = {.dat_fd = f.dat, .idx_fd = f.idx, .width = 4, .version = 3, .resume_offset = at[3]};
        r = scrub_opts(&o, UINT64_MAX);
        CHECK_EQ(r.count, 2);
        CHECK_EQ(r.stats.checked_records, 3);
        drop_files(&f);
    }
}

static void test_hostile_rows(void) {
    files f = new_files(3, 5);
    add(&f, 1, 10);
    put_row(&f, 1, 2, 8, INT32_MAX);
    put_row(&f, 2, 3, ((uint64_t)1 << 43) - 8, 5);
    put_row(&f, 3, 4, 16, INT32_MIN);
    put_row(&f, 4, 5, 0, 0);
    CHECK(pwrite(f.idx, "ragged", 6, (off_t)(f.rows * 17)) == 6);
    result r = scrub(&f, PV_SCRUB_CHECK_ID, 10);
    CHECK_EQ(r.rc, 0);
    CHECK_EQ(r.stats.rows, 5);
    CHECK_EQ(r.stats.idx_bytes, 5 * 17 + 6);
    CHECK_EQ(r.stats.bad_records, 3);
    drop_files(&f);

    pv_scrub *s;
    pv_scrub_opts bad = {.dat_fd = f.dat, .idx_fd = f.idx, .width = 6, .version = 3};
    CHECK_EQ(pv_scrub_begin(&bad, &s, NULL), PV_EINVAL);
    bad.width = 4;
    bad.version = 4;
    CHECK_EQ(pv_scrub_begin(&bad, &s, NULL), PV_EVERSION);
    bad.version = 3;
    bad.dat_fd = -1;
    CHECK_EQ(pv_scrub_begin(&bad, &s, NULL), PV_ESYS);
}

static int fail_reads_at(void *ctx, const pv__io_event *ev, size_t *len) {
    const uint64_t *bad = ctx;
    return ev->op == PV__IO_PREAD && ev->fd > 2 && ev->offset <= *bad && ev->offset + *len > *bad ? EIO : 0;
}

/* A bad sector costs the record on it, not the scrub; every allocation may fail. */
static void test_faults(void) {
    files f = new_files(3, 4);
    uint64_t at[50];
    for (uint64_t i = 0; i < 50; i++) {
        at[i] = add(&f, i + 1, 5000);
    }
    uint64_t bad = at[20] + 100;
    pv__io_set_hook(fail_reads_at, &bad);
    result r = scrub(&f, 0, UINT64_MAX);
    pv__io_set_hook(NULL, NULL);
    CHECK_EQ(r.rc, 0);
    CHECK_EQ(r.count, 1);
    CHECK_EQ(r.found[0].key, 21);
    CHECK_EQ(r.found[0].error.code, PV_ESYS);
    CHECK_EQ(r.found[0].error.sys_errno, EIO);

    const pv_scrub_opts o = {.dat_fd = f.dat, .idx_fd = f.idx, .width = 4, .version = 3};
    for (long nth = 1;; nth++) {
        pv_scrub *s;
        pv_errinfo err;
        (void)pv__alloc_fail_at(nth);
        int rc = pv_scrub_begin(&o, &s, &err);
        bool reached = pv__alloc_fail_at(0) == 0;
        if (rc == 0) {
            pv_scrub_free(s);
        }
        if (!reached) {
            CHECK_EQ(rc, 0);
            break;
        }
        CHECK_EQ(rc, PV_ENOMEM);
    }
    drop_files(&f);
}

/* ------------------------------------------------------------------ a volume in use */

typedef struct writer {
    pthread_t thread;
    pv_vol *v;
    uint64_t first_key;
    uint32_t flags;
    _Atomic bool *stop;
} writer;

static void *write_on(void *arg) {
    writer *w = arg;
    static const uint8_t data[3000];
    for (uint64_t i = 0; !atomic_load(w->stop); i++) {
        pv_needle n = {.id = w->first_key + i % 50, .cookie = 1, .data = data, .data_size = (uint32_t)(i * 37 % 3000)};
        pv_write_res res;
        pv_errinfo err;
        CHECK_EQ(pv_vol_write(w->v, &n, w->flags, NULL, &res, &err), 0);
        if (i % 7 == 6) {
            int32_t size;
            CHECK_EQ(pv_vol_delete(w->v, n.id, 1, 0, w->flags, NULL, &size, &res, &err), 0);
        }
    }
    return NULL;
}

/* While records are appended, flushed or not, every scrub sees rows and data that fit. */
static void test_volume_in_use(void) {
    char dir[] = "/tmp/pv-scrub-XXXXXX";
    char dat[64];
    char idx[64];
    CHECK(mkdtemp(dir) != NULL);
    snprintf(dat, sizeof dat, "%s/1.dat", dir);
    snprintf(idx, sizeof idx, "%s/1.idx", dir);
    pv_vol_opts o = {.dat_path = dat, .idx_path = idx, .vid = 1, .flags = PV_VOL_CREATE, .offset_width = 4};
    o.superblock.version = 3;
    pv_vol *v;
    CHECK_EQ(pv_vol_open(&o, &v, NULL), 0);
    _Atomic bool stop = false;
    writer w[4];
    for (size_t i = 0; i < 4; i++) {
        w[i] = (writer){.v = v, .first_key = i * 100 + 1, .flags = i < 2 ? PV_WRITE_FSYNC : 0, .stop = &stop};
        CHECK(pthread_create(&w[i].thread, NULL, write_on, &w[i]) == 0);
    }
    int idx_fd = open(idx, O_RDONLY | O_CLOEXEC);
    CHECK(idx_fd >= 0);
    pv_scrub_opts so = {.vol = v, .idx_fd = idx_fd, .flags = PV_SCRUB_CHECK_ID};
    for (int i = 0; i < T_REPEAT(40); i++) {
        result r = scrub_opts(&so, 1 << 20);
        CHECK_EQ(r.rc, 0);
        CHECK_EQ(r.count, 0);
        CHECK_EQ(r.stats.expected_bytes, r.stats.dat_bytes);
    }
    atomic_store(&stop, true);
    for (size_t i = 0; i < 4; i++) {
        CHECK(pthread_join(w[i].thread, NULL) == 0);
    }
    /* a scrub outlives the volume; a closed volume cannot be begun with, nor one whose index is another file */
    pv_scrub *s;
    pv_errinfo err;
    CHECK_EQ(pv_scrub_begin(&so, &s, &err), 0);
    int other = t_file();
    so.idx_fd = other;
    pv_scrub *none;
    CHECK_EQ(pv_scrub_begin(&so, &none, &err), PV_ESTALE);
    so.flags |= PV_SCRUB_ANY_INDEX;
    CHECK_EQ(pv_scrub_begin(&so, &none, &err), 0);
    pv_scrub_free(none);
    close(other);
    CHECK_EQ(pv_vol_close(v, NULL), 0);
    while (pv_scrub_step(s, 1 << 20, &err) == 1) {
    }
    pv_scrub_finding f;
    CHECK_EQ(pv_scrub_findings(s, &f, 1), 0);
    pv_scrub_stats stats;
    pv_scrub_stat(s, &stats);
    CHECK_EQ(stats.done_rows, stats.total_rows);
    pv_scrub_free(s);
    CHECK_EQ(pv_scrub_begin(&so, &s, &err), PV_ECLOSED);
    pv_vol_unref(v);
    close(idx_fd);
    unlink(dat);
    unlink(idx);
    rmdir(dir);
}

int main(void) {
    RUN(test_good_volumes);
    RUN(test_rows_in_any_order);
    RUN(test_overlaps);
    RUN(test_damage);
    RUN(test_hostile_rows);
    RUN(test_faults);
    RUN(test_volume_in_use);
    return T_END();
}
