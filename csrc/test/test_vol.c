/* The volume handle: appends, reads, rollbacks, flushed writes, life and end of a handle; the registry. */
#include "t.h"

#include <stdatomic.h>

#define PATH_LEN 512
#define COOKIE 0xfc0044a0U
#define BIG (PV_META_ONLY_ABOVE + 5000)

/* ------------------------------------------------------------------ places */

typedef struct place {
    char dir[PATH_LEN];
    char dat[PATH_LEN + 16];
    char idx[PATH_LEN + 16];
} place;

static place new_place(void) {
    place p;
    /* Thousands of flushes: in memory, where there is a place for that. */
    const char *tmp = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : getenv("TMPDIR");
    snprintf(p.dir, sizeof p.dir, "%s/pv-vol-XXXXXX", tmp != NULL ? tmp : "/tmp");
    CHECK(mkdtemp(p.dir) != NULL);
    snprintf(p.dat, sizeof p.dat, "%s/7.dat", p.dir);
    snprintf(p.idx, sizeof p.idx, "%s/7.idx", p.dir);
    return p;
}

static void drop_place(const place *p) {
    unlink(p->dat);
    unlink(p->idx);
    CHECK(rmdir(p->dir) == 0);
}

static uint64_t file_len(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    off_t end = lseek(fd, 0, SEEK_END);
    close(fd);
    return (uint64_t)end;
}

static void file_read(const char *path, uint64_t at, void *buf, size_t len) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK(pread(fd, buf, len, (off_t)at) == (ssize_t)len);
    close(fd);
}

static void file_write(const char *path, uint64_t at, const void *buf, size_t len) {
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    CHECK(pwrite(fd, buf, len, (off_t)at) == (ssize_t)len);
    close(fd);
}

static pv_vol_opts opts_for(const place *p) {
    pv_vol_opts o = {.dat_path = p->dat, .idx_path = p->idx, .vid = 7, .offset_width = 4};
    o.superblock.version = 3;
    return o;
}

static pv_vol *open_with(const pv_vol_opts *o) {
    pv_vol *v;
    pv_errinfo err;
    CHECK_EQ(pv_vol_open(o, &v, &err), 0);
    return v;
}

static pv_vol *create(const place *p) {
    pv_vol_opts o = opts_for(p);
    o.flags = PV_VOL_CREATE;
    return open_with(&o);
}

static pv_vol *reopen(const place *p) {
    pv_vol_opts o = opts_for(p);
    return open_with(&o);
}

static void close_and_drop(pv_vol *v) {
    pv_errinfo err;
    CHECK_EQ(pv_vol_close(v, &err), 0);
    pv_vol_unref(v);
}

static pv_vol_stats stat_of(pv_vol *v) {
    pv_vol_stats s;
    CHECK_EQ(pv_vol_stat(v, &s), 0);
    return s;
}

/* ------------------------------------------------------------------ needles */

static pv_needle needle(uint64_t id, const void *data, size_t len) {
    pv_needle n = {.id = id, .cookie = COOKIE, .data = data, .data_size = (uint32_t)len};
    return n;
}

static int write_flags(pv_vol *v, uint64_t id, const void *data, size_t len, uint32_t flags, pv_errinfo *err) {
    pv_needle n = needle(id, data, len);
    pv_write_res res;
    return pv_vol_write(v, &n, flags, NULL, &res, err);
}

static pv_write_res put(pv_vol *v, uint64_t id, const char *text) {
    pv_needle n = needle(id, text, strlen(text));
    pv_write_res res;
    pv_errinfo err;
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_CHECK_COOKIE, NULL, &res, &err), 0);
    return res;
}

static int32_t del(pv_vol *v, uint64_t id) {
    int32_t size;
    pv_write_res res;
    pv_errinfo err;
    CHECK_EQ(pv_vol_delete(v, id, COOKIE, 0, 0, NULL, &size, &res, &err), 0);
    return size;
}

static int read_code(pv_vol *v, uint64_t id, uint32_t flags) {
    pv_read r;
    pv_errinfo err;
    int rc = pv_vol_read(v, id, flags, NULL, &r, &err);
    if (rc == 0) {
        pv_read_free(&r);
    } else {
        CHECK(r.buf == NULL);
        CHECK_EQ(err.code, rc);
    }
    return rc;
}

static void expect(pv_vol *v, uint64_t id, const void *data, size_t len) {
    pv_read r;
    pv_errinfo err;
    CHECK_EQ(pv_vol_read(v, id, 0, NULL, &r, &err), 0);
    if (len == 0) {
        CHECK_EQ(r.empty, 1);
    } else {
        CHECK_EQ(r.n.id, id);
        CHECK_EQ(r.n.data_size, len);
        CHECK_MEM(r.n.data, data, len);
    }
    pv_read_free(&r);
}

static void expect_text(pv_vol *v, uint64_t id, const char *text) {
    expect(v, id, text, strlen(text));
}

static uint8_t *noise(uint64_t seed, size_t len) {
    uint8_t *p = malloc(len + 8);
    CHECK(p != NULL);
    for (size_t i = 0; i < len; i += 8) {
        uint64_t r = t_rand(&seed);
        memcpy(p + i, &r, 8);
    }
    return p;
}

/* ------------------------------------------------------------------ faults */

/* Fails operations of some kinds: the nth of them (and all that follow, with for_ever). */
typedef struct fault {
    unsigned ops; /* bits 1 << PV__IO_... */
    long nth;     /* counts down; 1 = the next */
    bool for_ever;
    int error;         /* errno; 0: only shorten */
    size_t shorten_to; /* > 0: the nth write takes only so many bytes, the one after it fails */
    bool shortened;
    unsigned hit;
} fault;

static int fault_hook(void *ctx, const pv__io_event *ev, size_t *len) {
    fault *f = ctx;
    if (!(f->ops & (1U << ev->op))) {
        return 0;
    }
    if (f->shortened) {
        f->shortened = false;
        return f->error;
    }
    if (f->nth > 0 && --f->nth > 0) {
        return 0;
    }
    if (f->nth == 0) {
        f->nth = f->for_ever ? 0 : -1;
        f->hit++;
        if (ev->op == PV__IO_PWRITE && f->shorten_to > 0 && *len > f->shorten_to) {
            *len = f->shorten_to;
            f->shortened = f->error != 0;
            return 0;
        }
        return f->error;
    }
    return 0;
}

static void fail_next(fault *f, unsigned op, int error) {
    *f = (fault){.ops = 1U << op, .nth = 1, .error = error};
    pv__io_set_hook(fault_hook, f);
}

static void no_faults(void) {
    pv__io_set_hook(NULL, NULL);
}

/* ------------------------------------------------------------------ tests: files as they should be */

static void test_layout(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    uint8_t block[8];
    file_read(p.dat, 0, block, sizeof block);
    CHECK_MEM(block, "\3\0\0\0\0\0\0\0", 8);
    CHECK_EQ(stat_of(v).dat_bytes, 8);
    CHECK_EQ(stat_of(v).idx_bytes, 0);

    pv_needle n = needle(1, "hello", 5);
    n.flags = PV_F_NAME | PV_F_MIME | PV_F_MTIME | PV_F_PAIRS;
    n.name = (const uint8_t *)"hello.bin";
    n.name_size = 9;
    n.mime = (const uint8_t *)"text/x-demo";
    n.mime_size = 11;
    n.pairs = (const uint8_t *)"{\"Color\":\"red\"}";
    n.pairs_size = 15;
    n.last_modified_s = 1700000000;
    pv_write_res res;
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_CHECK_COOKIE, NULL, &res, NULL), 0);
    CHECK_EQ(res.offset, 8);
    CHECK_EQ(res.size, 54);
    CHECK_EQ(res.checksum, 0x9a71bb4c);
    CHECK_EQ(res.cookie, COOKIE);
    CHECK_EQ(res.unchanged, 0);
    CHECK_EQ(file_len(p.dat), 96);
    uint8_t rec[88];
    file_read(p.dat, 8, rec, sizeof rec);
    CHECK_MEM(rec, "\xfc\x00\x44\xa0\0\0\0\0\0\0\0\1\0\0\0\x36\0\0\0\5hello\x2e\x09hello.bin", 35);
    CHECK_EQ(pv__get_be64(rec + 0x52 - 8), res.append_at_ns);
    CHECK_MEM(rec + 0x5a - 8, "\0\0\0\x36\0\0", 6);
    uint8_t row[16];
    file_read(p.idx, 0, row, sizeof row);
    CHECK_MEM(row, "\0\0\0\0\0\0\0\1\0\0\0\1\0\0\0\x36", 16);
    CHECK_EQ(stat_of(v).last_modified_s, 1700000000);
    CHECK(stat_of(v).last_write_wall_s > 1700000000);

    int32_t size;
    CHECK_EQ(pv_vol_delete(v, 1, 0x11112222, 0x34cfdc25, 0, NULL, &size, &res, NULL), 0);
    CHECK_EQ(size, 54);
    CHECK_EQ(file_len(p.dat), 128);
    file_read(p.dat, 96, rec, 32);
    CHECK_MEM(rec, "\x11\x11\x22\x22\0\0\0\0\0\0\0\1\0\0\0\0\x34\xcf\xdc\x25", 20);
    CHECK_EQ(pv__get_be64(rec + 20), res.append_at_ns);
    CHECK_MEM(rec + 28, "\0\0\0\0", 4);
    file_read(p.idx, 16, row, sizeof row);
    CHECK_MEM(row, "\0\0\0\0\0\0\0\1\0\0\0\x0c\xff\xff\xff\xff", 16);
    close_and_drop(v);

    /* the figures after a reload: contract storage.md 15 */
    v = reopen(&p);
    pv_vol_stats s = stat_of(v);
    CHECK_EQ(s.file_count, 1);
    CHECK_EQ(s.deleted_count, 1);
    CHECK_EQ(s.deleted_bytes, 54);
    CHECK_EQ(s.file_bytes, 54);
    CHECK_EQ(s.last_append_at_ns, res.append_at_ns);
    CHECK_EQ(read_code(v, 1, 0), PV_EDELETED);
    CHECK_EQ(read_code(v, 1, PV_READ_DELETED), 0);
    close_and_drop(v);
    drop_place(&p);
}

static void test_versions(void) {
    for (uint8_t version = 1; version <= 3; version++) {
        place p = new_place();
        pv_vol_opts o = opts_for(&p);
        o.flags = PV_VOL_CREATE;
        o.superblock.version = version;
        pv_vol *v = open_with(&o);
        put(v, 5, "some data");
        put(v, 6, "");
        put(v, 7, "more data, to be deleted");
        CHECK(del(v, 7) > 0);
        CHECK_EQ(del(v, 7), -1);
        CHECK_EQ(del(v, 99), -1);
        uint64_t tombstone = version == 3 ? 32 : 24;
        CHECK_EQ(file_len(p.dat) % 8, 0);
        uint64_t before = stat_of(v).dat_bytes;
        CHECK_EQ(del(v, 6), 0);
        CHECK_EQ(stat_of(v).dat_bytes - before, tombstone);
        close_and_drop(v);
        o.flags = 0;
        v = open_with(&o);
        CHECK_EQ(stat_of(v).version, version);
        expect_text(v, 5, "some data");
        CHECK_EQ(read_code(v, 6, 0), PV_EDELETED);
        CHECK_EQ(read_code(v, 6, PV_READ_DELETED), PV_EDELETED); /* size -1: nothing to serve */
        CHECK_EQ(read_code(v, 7, PV_READ_DELETED), 0);
        close_and_drop(v);
        drop_place(&p);
    }
}

/* No .dat here: look-ups, and deletes that add a row with offset 0. */
static void test_remote(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    put(v, 1, "one");
    put(v, 2, "two");
    put(v, 3, "three");
    uint64_t length = stat_of(v).dat_bytes;
    close_and_drop(v);
    unlink(p.dat);

    pv_vol_opts o = opts_for(&p);
    pv_errinfo err;
    pv_write_res res;
    int32_t size;
    o.flags = PV_VOL_REMOTE;
    o.remote_bytes = length;
    o.superblock.compaction_revision = 5;
    o.superblock.version = 9;
    CHECK_EQ(pv_vol_open(&o, &v, &err), PV_EVERSION);
    o.superblock.version = 3;
    o.flags = PV_VOL_REMOTE | PV_VOL_CREATE;
    CHECK_EQ(pv_vol_open(&o, &v, &err), PV_EINVAL);
    o.flags = PV_VOL_REMOTE;
    v = open_with(&o);
    CHECK_EQ(stat_of(v).dat_bytes, length);
    CHECK_EQ(stat_of(v).no_write, 1);
    CHECK_EQ(stat_of(v).no_delete, 0);
    pv_entry e;
    CHECK_EQ(pv_vol_lookup(v, 2, &e), 0);
    CHECK_EQ(e.revision, 5);
    CHECK_EQ(read_code(v, 2, 0), PV_EINVAL);
    uint8_t buf[8];
    CHECK_EQ(pv_vol_pread(v, 0, buf, sizeof buf, 5, &err), PV_EINVAL);
    CHECK_EQ(write_flags(v, 9, "x", 1, 0, &err), PV_EREADONLY);
    CHECK_EQ(pv_vol_set_readonly(v, 0, 0), PV_EREADONLY);
    CHECK(del(v, 2) > 0);
    CHECK_EQ(del(v, 2), -1);
    CHECK_EQ(del(v, 99), -1);
    CHECK_EQ(pv_vol_delete(v, 3, COOKIE, 0, PV_WRITE_FSYNC, NULL, &size, &res, &err), 0);
    CHECK(size > 0 && res.offset == 0);
    CHECK_EQ(pv_vol_sync(v, &err), 0);
    CHECK_EQ(file_len(p.idx), 5 * 16);
    static const uint8_t row[16] = {0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff};
    uint8_t found[16];
    file_read(p.idx, 3 * sizeof row, found, sizeof found);
    CHECK(memcmp(row, found, sizeof row) == 0);
    CHECK_EQ(pv_vol_set_readonly(v, 1, 1), 0);
    CHECK_EQ(pv_vol_delete(v, 1, COOKIE, 0, 0, NULL, &size, &res, &err), PV_EREADONLY);
    CHECK_EQ(pv_vol_set_readonly(v, 1, 0), 0);
    pv_compact *c;
    pv_compact_opts how = {.cpd_path = p.dat, .cpx_path = p.dat};
    CHECK_EQ(pv_compact_begin(v, &how, &c, &err), PV_EINVAL);
    close_and_drop(v);
    v = open_with(&o);
    CHECK_EQ(pv_vol_lookup(v, 1, &e), 0);
    CHECK_EQ(del(v, 2), -1);
    close_and_drop(v);
    CHECK(access(p.dat, F_OK) != 0);
    drop_place(&p);
}

static void test_open_errors(void) {
    place p = new_place();
    pv_vol_opts o = opts_for(&p);
    pv_vol *v;
    pv_errinfo err;
    CHECK_EQ(pv_vol_open(&o, &v, &err), PV_ESYS);
    CHECK_EQ(err.sys_errno, ENOENT);
    CHECK_EQ(err.d, 0);
    CHECK(v == NULL);
    file_write(p.dat, 0, "\3\0\0", 3);
    CHECK_EQ(pv_vol_open(&o, &v, &err), PV_EEOF);
    file_write(p.dat, 0, "\4\0\0\0\0\0\0\0", 8);
    CHECK_EQ(pv_vol_open(&o, &v, &err), PV_EVERSION);
    CHECK_EQ(err.a, 4);
    file_write(p.dat, 0, "\3", 1);
    file_write(p.idx, 0, "ragged", 6);
    CHECK_EQ(pv_vol_open(&o, &v, &err), PV_EALIGN);
    CHECK_EQ(err.a, 6);
    unlink(p.idx);
    o.flags = PV_VOL_IDX_READONLY;
    CHECK_EQ(pv_vol_open(&o, &v, &err), PV_ESYS);
    CHECK_EQ(err.d, 1);
    o.flags = 0;
    o.offset_width = 6;
    CHECK_EQ(pv_vol_open(&o, &v, &err), PV_EINVAL);
    o = opts_for(&p);
    o.flags = PV_VOL_CREATE;
    o.superblock.version = 0;
    CHECK_EQ(pv_vol_open(&o, &v, &err), PV_EVERSION);
    o.superblock.version = 3;
    o.superblock.extra_size = 8;
    CHECK_EQ(pv_vol_open(&o, &v, &err), PV_EINVAL);

    /* an extra area of the super block is stepped over */
    file_write(p.dat, 0, "\3\0\0\0\0\0\0\x13", 8);
    o = opts_for(&p);
    v = open_with(&o);
    CHECK_EQ(put(v, 1, "x").offset, 32);
    pv_superblock sb;
    pv_vol_superblock(v, &sb);
    CHECK_EQ(sb.extra_size, 0x13);
    close_and_drop(v);
    drop_place(&p);
}

/* An odd length is rounded up, so that what follows is addressable. */
static void test_odd_length(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    put(v, 1, "one");
    close_and_drop(v);
    uint64_t len = file_len(p.dat);
    CHECK(truncate(p.dat, (off_t)len - 3) == 0);
    v = reopen(&p);
    CHECK_EQ(stat_of(v).dat_bytes, len);
    CHECK_EQ(read_code(v, 1, 0), PV_EEOF); /* upstream, too, misses the padding */
    CHECK_EQ(put(v, 2, "two").offset, len);
    expect_text(v, 1, "one"); /* the hole is padding now */
    expect_text(v, 2, "two");
    close_and_drop(v);
    drop_place(&p);
}

/* ------------------------------------------------------------------ tests: reading */

static void test_read_damage(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    pv_errinfo err;
    pv_read r;
    pv_write_res a = put(v, 1, "intact data");
    pv_write_res b = put(v, 2, "other data");

    /* legacy checksum: fine, and the recomputed one is given */
    uint8_t sum[4];
    pv__put_be32(sum, pv_crc_legacy(a.checksum));
    file_write(p.dat, a.offset + 16 + (uint64_t)a.size, sum, 4);
    CHECK_EQ(pv_vol_read(v, 1, 0, NULL, &r, &err), 0);
    CHECK_EQ(r.n.checksum, a.checksum);
    CHECK_EQ(r.data_offset, a.offset + 20);
    pv_read_free(&r);

    file_write(p.dat, a.offset + 22, "X", 1);
    CHECK_EQ(pv_vol_read(v, 1, 0, NULL, &r, &err), PV_ECRC);
    CHECK_EQ(err.c, 1);

    uint8_t size[4];
    pv__put_be32(size, (uint32_t)b.size + 1);
    file_write(p.dat, b.offset + 12, size, 4);
    /* 4-byte offsets: tried again 32 GiB further on, where there is nothing */
    CHECK_EQ(pv_vol_read(v, 2, 0, NULL, &r, &err), PV_EEOF);
    CHECK_EQ(err.a, b.offset + ((uint64_t)1 << 35));
    pv__put_be32(size, (uint32_t)b.size);
    file_write(p.dat, b.offset + 12, size, 4);
    pv__put_be32(size, 0x7fffffff); /* data size */
    file_write(p.dat, b.offset + 16, size, 4);
    CHECK_EQ(pv_vol_read(v, 2, 0, NULL, &r, &err), PV_ECORRUPT);
    CHECK_EQ(err.a, 1);
    close_and_drop(v);

    /* a hostile row: nothing is allocated for it */
    const pv_idx_row hostile[] = {{.key = 3, .offset = 8, .size = INT32_MAX},
                                  {.key = 4, .offset = 1 << 30, .size = 9},
                                  {.key = 5, .offset = 8, .size = -INT32_MAX}};
    for (size_t i = 0; i < PV__ARRAY_LEN(hostile); i++) {
        uint8_t row[16];
        pv_idx_row_put(&hostile[i], 4, row);
        file_write(p.idx, file_len(p.idx), row, sizeof row);
    }
    v = reopen(&p);
    pv__alloc_fail_at(1);
    CHECK_EQ(read_code(v, 3, 0), PV_EEOF);
    CHECK_EQ(read_code(v, 4, 0), PV_EEOF);
    CHECK_EQ(read_code(v, 4, PV_READ_META_OK), PV_EEOF);
    CHECK_EQ(read_code(v, 3, PV_READ_META_OK), PV_EEOF);
    CHECK_EQ(pv__alloc_fail_at(0), 1);
    CHECK_EQ(read_code(v, 77, 0), PV_ENOTFOUND);
    close_and_drop(v);

    pv_vol_opts o = opts_for(&p);
    o.flags = PV_VOL_NO_MAP;
    v = open_with(&o);
    const pv_entry worst = {.offset = 8, .size = INT32_MIN};
    CHECK_EQ(pv_vol_read(v, 1, PV_READ_ENTRY | PV_READ_DELETED, &worst, &r, &err), PV_EDELETED);
    close_and_drop(v);
    drop_place(&p);
}

/* Widths differ in what a header of another size means. */
static void test_size_mismatch_width5(void) {
    place p = new_place();
    pv_vol_opts o = opts_for(&p);
    o.flags = PV_VOL_CREATE;
    o.offset_width = 5;
    pv_vol *v = open_with(&o);
    pv_write_res a = put(v, 1, "data");
    CHECK_EQ(file_len(p.idx), 17);
    uint8_t size[4];
    pv__put_be32(size, 1);
    file_write(p.dat, a.offset + 12, size, 4);
    CHECK_EQ(read_code(v, 1, 0), PV_ESIZE);
    close_and_drop(v);
    drop_place(&p);
}

/* A 4-byte volume that outgrew 32 GiB: offsets wrapped, the record is found one round further on. Sparse file. */
static void test_wrapped(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    pv_errinfo err;
    pv_read r;
    uint8_t *big = noise(3, BIG);
    put(v, 1, "below");
    CHECK_EQ(write_flags(v, 2, big, BIG, 0, &err), 0);
    pv_entry small_at;
    pv_entry big_at;
    CHECK_EQ(pv_vol_lookup(v, 1, &small_at), 0);
    CHECK_EQ(pv_vol_lookup(v, 2, &big_at), 0);
    close_and_drop(v);
    uint64_t len = file_len(p.dat);
    uint8_t *all = malloc(len);
    CHECK(all != NULL);
    file_read(p.dat, 0, all, len);
    file_write(p.dat, (uint64_t)1 << 35, all, len);
    uint8_t none[20] = {0};
    file_write(p.dat, small_at.offset, none, sizeof none);
    file_write(p.dat, big_at.offset, none, sizeof none);
    v = reopen(&p);
    expect_text(v, 1, "below");
    expect(v, 2, big, BIG);
    CHECK_EQ(pv_vol_read(v, 2, PV_READ_META_OK, NULL, &r, &err), 0);
    CHECK_EQ(r.meta_only, 1);
    CHECK_EQ(r.data_offset, big_at.offset + ((uint64_t)1 << 35) + 20);
    pv_read_free(&r);
    CHECK_EQ(write_flags(v, 9, "x", 1, 0, &err), PV_EFULL);
    CHECK_EQ(err.b, (uint64_t)1 << 35);
    CHECK(del(v, 1) > 0); /* a delete still fits */
    close_and_drop(v);
    free(all);
    free(big);
    drop_place(&p);
}

static void test_meta_only(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    pv_errinfo err;
    pv_read r;
    uint8_t *big = noise(1, BIG);
    pv_needle n = needle(1, big, BIG);
    n.flags = PV_F_NAME | PV_F_MTIME;
    n.name = (const uint8_t *)"big";
    n.name_size = 3;
    n.last_modified_s = 99;
    pv_write_res res;
    CHECK_EQ(pv_vol_write(v, &n, 0, NULL, &res, &err), 0);

    CHECK_EQ(pv_vol_read(v, 1, PV_READ_META_OK, NULL, &r, &err), 0);
    CHECK_EQ(r.meta_only, 1);
    CHECK(r.n.data == NULL);
    CHECK_EQ(r.n.data_size, BIG);
    CHECK_EQ(r.n.name_size, 3);
    CHECK_MEM(r.n.name, "big", 3);
    CHECK_EQ(r.n.last_modified_s, 99);
    CHECK_EQ(r.n.append_at_ns, res.append_at_ns);
    CHECK_EQ(r.n.checksum, res.checksum);
    CHECK_EQ(r.n.cookie, COOKIE);
    uint8_t *piece = malloc(BIG);
    CHECK(piece != NULL);
    CHECK_EQ(pv_vol_pread(v, r.data_offset, piece, BIG, r.entry.revision, &err), 0);
    CHECK_MEM(piece, big, BIG);
    CHECK_EQ(pv_vol_pread(v, r.data_offset, piece, BIG, r.entry.revision + 1, &err), PV_ESTALE);
    CHECK_EQ(pv_vol_pread(v, stat_of(v).dat_bytes - 4, piece, 8, 0, &err), PV_EEOF);
    pv_read_free(&r);
    free(piece);

    expect(v, 1, big, BIG); /* without the flag: whole */

    for (unsigned i = 0; i < 2; i++) { /* those are wanted whole */
        n.id = 2 + i;
        n.flags = i == 0 ? PV_F_COMPRESSED : PV_F_MANIFEST;
        CHECK_EQ(pv_vol_write(v, &n, 0, NULL, &res, &err), 0);
        CHECK_EQ(pv_vol_read(v, n.id, PV_READ_META_OK, NULL, &r, &err), 0);
        CHECK_EQ(r.meta_only, 0);
        CHECK_MEM(r.n.data, big, BIG);
        pv_read_free(&r);
    }

    /* exactly at the bound: whole (the bound is on Size) */
    n.flags = 0;
    n.id = 5;
    n.data_size = PV_META_ONLY_ABOVE - 5;
    CHECK_EQ(pv_vol_write(v, &n, 0, NULL, &res, &err), 0);
    CHECK_EQ(res.size, PV_META_ONLY_ABOVE);
    CHECK_EQ(pv_vol_read(v, 5, PV_READ_META_OK, NULL, &r, &err), 0);
    CHECK_EQ(r.meta_only, 0);
    pv_read_free(&r);

    /* deleted and remembered */
    CHECK(del(v, 1) > 0);
    CHECK_EQ(read_code(v, 1, PV_READ_META_OK), PV_EDELETED);
    CHECK_EQ(pv_vol_read(v, 1, PV_READ_META_OK | PV_READ_DELETED, NULL, &r, &err), 0);
    CHECK_EQ(r.meta_only, 1);
    CHECK(r.entry.size < 0);
    pv_read_free(&r);

    /* hostile data sizes: span out of bounds */
    pv_entry e;
    CHECK_EQ(pv_vol_lookup(v, 2, &e), 0);
    uint8_t size[4];
    pv__put_be32(size, 7);
    file_write(p.dat, e.offset + 16, size, 4);
    CHECK_EQ(pv_vol_read(v, 2, PV_READ_META_OK, NULL, &r, &err), PV_EMETA);
    CHECK_EQ(err.b, 7);
    CHECK_EQ(err.d, e.offset);
    pv__put_be32(size, 0xffffffff);
    file_write(p.dat, e.offset + 16, size, 4);
    CHECK_EQ(pv_vol_read(v, 2, PV_READ_META_OK, NULL, &r, &err), PV_EMETA);
    CHECK((int64_t)err.a < 0);
    close_and_drop(v);
    free(big);
    drop_place(&p);

    /* version 1 has no metadata apart */
    p = new_place();
    pv_vol_opts o = opts_for(&p);
    o.flags = PV_VOL_CREATE;
    o.superblock.version = 1;
    v = open_with(&o);
    big = noise(2, BIG);
    CHECK_EQ(write_flags(v, 1, big, BIG, 0, &err), 0);
    CHECK_EQ(pv_vol_read(v, 1, PV_READ_META_OK, NULL, &r, &err), 0);
    CHECK_EQ(r.meta_only, 0);
    CHECK_MEM(r.n.data, big, BIG);
    pv_read_free(&r);
    close_and_drop(v);
    free(big);
    drop_place(&p);
}

static void test_eio_count(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    put(v, 1, "data");
    fault f;
    for (unsigned i = 1; i <= 3; i++) {
        fail_next(&f, PV__IO_PREAD, EIO);
        CHECK_EQ(read_code(v, 1, 0), PV_ESYS);
        CHECK_EQ(stat_of(v).eio_count, i);
    }
    fail_next(&f, PV__IO_PREAD, ENOMEM); /* another error breaks the row */
    CHECK_EQ(read_code(v, 1, 0), PV_ESYS);
    CHECK_EQ(stat_of(v).eio_count, 0);
    fail_next(&f, PV__IO_PREAD, EIO);
    CHECK_EQ(read_code(v, 1, 0), PV_ESYS);
    no_faults();
    CHECK_EQ(read_code(v, 99, 0), PV_ENOTFOUND); /* no input or output: says nothing of the disk */
    CHECK_EQ(stat_of(v).eio_count, 1);
    fail_next(&f, PV__IO_PREAD, EAGAIN); /* nor does a miss of the page cache */
    CHECK_EQ(read_code(v, 1, PV_READ_CACHED), PV_ESYS);
    no_faults();
    CHECK_EQ(stat_of(v).eio_count, 1);
    CHECK_EQ(read_code(v, 1, 0), 0);
    CHECK_EQ(stat_of(v).eio_count, 0);
    close_and_drop(v);
    drop_place(&p);
}

/* ------------------------------------------------------------------ tests: writing */

static void test_unchanged_and_cookies(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    pv_errinfo err;
    pv_write_res res;
    pv_write_res first = put(v, 1, "same");
    uint64_t len = stat_of(v).dat_bytes;
    pv_needle n = needle(1, "same", 4);
    n.flags = PV_F_NAME; /* not compared */
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_CHECK_COOKIE, NULL, &res, &err), 0);
    CHECK_EQ(res.unchanged, 1);
    CHECK_EQ(res.checksum, first.checksum);
    CHECK_EQ(stat_of(v).dat_bytes, len);
    CHECK_EQ(put(v, 1, "sAme").unchanged, 0);
    CHECK_EQ(put(v, 1, "sAm").unchanged, 0);

    n.cookie = 0x12345678;
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_CHECK_COOKIE, NULL, &res, &err), PV_ECOOKIE);
    CHECK_EQ(err.a, 0x12345678);
    CHECK_EQ(err.b, COOKIE);
    CHECK_EQ(pv_vol_write(v, &n, 0, NULL, &res, &err), PV_ECOOKIE); /* not checked only for cookie 0 */
    n.cookie = 0;
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_CHECK_COOKIE, NULL, &res, &err), PV_ECOOKIE);
    CHECK_EQ(pv_vol_write(v, &n, 0, NULL, &res, &err), 0);
    CHECK_EQ(res.cookie, COOKIE);
    pv_read r;
    CHECK_EQ(pv_vol_read(v, 1, 0, NULL, &r, &err), 0);
    CHECK_EQ(r.n.cookie, COOKIE);
    pv_read_free(&r);

    /* a deleted key keeps its cookie; its bytes being the same is no reason not to write */
    CHECK(del(v, 1) > 0);
    n.cookie = 0x12345678;
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_CHECK_COOKIE, NULL, &res, &err), PV_ECOOKIE);
    n.cookie = COOKIE;
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_CHECK_COOKIE, NULL, &res, &err), 0);
    CHECK_EQ(res.unchanged, 0);

    /* so does an empty one */
    put(v, 2, "");
    CHECK_EQ(put(v, 2, "").unchanged, 0);
    n = needle(2, "x", 1);
    n.cookie = 1;
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_CHECK_COOKIE, NULL, &res, &err), PV_ECOOKIE);

    /* damaged data is not "the same"; a legacy checksum is */
    pv_write_res c = put(v, 3, "checked");
    uint8_t sum[4];
    pv__put_be32(sum, pv_crc_legacy(c.checksum));
    file_write(p.dat, c.offset + 16 + (uint64_t)c.size, sum, 4);
    CHECK_EQ(put(v, 3, "checked").unchanged, 1);
    file_write(p.dat, c.offset + 20, "C", 1);
    CHECK_EQ(put(v, 3, "checked").unchanged, 0);

    /* the existing header cannot be read: refused, and said where the trouble is */
    fault f;
    fail_next(&f, PV__IO_PREAD, EIO);
    CHECK_EQ(write_flags(v, 3, "y", 1, 0, &err), PV_ESYS);
    CHECK_EQ(err.sys_errno, EIO);
    CHECK_EQ(err.d, 1);
    no_faults();
    close_and_drop(v);

    /* a row that points behind the end of .dat */
    const pv_idx_row row = {.key = 9, .offset = 1 << 20, .size = 5};
    uint8_t raw[16];
    pv_idx_row_put(&row, 4, raw);
    file_write(p.idx, file_len(p.idx), raw, sizeof raw);
    pv_vol_opts o = opts_for(&p);
    o.has_ttl = 1;
    v = open_with(&o);
    CHECK_EQ(write_flags(v, 9, "y", 1, 0, &err), PV_EEOF);
    CHECK_EQ(err.d, 1);
    put(v, 4, "ttl");
    CHECK_EQ(put(v, 4, "ttl").unchanged, 0); /* a volume with a ttl writes again */
    close_and_drop(v);
    drop_place(&p);
}

static void test_append_time(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    uint64_t last = 0;
    for (uint64_t i = 1; i <= 200; i++) {
        pv_write_res r = put(v, i, "t");
        CHECK(r.append_at_ns > last);
        last = r.append_at_ns;
    }
    close_and_drop(v);
    pv_vol_opts o = opts_for(&p);
    o.last_append_at_ns = last + 5000000000000U; /* the clock went back */
    v = open_with(&o);
    CHECK_EQ(put(v, 500, "t").append_at_ns, o.last_append_at_ns + 1);
    CHECK_EQ(put(v, 501, "t").append_at_ns, o.last_append_at_ns + 2);
    close_and_drop(v);
    o.last_append_at_ns = 0;
    v = open_with(&o); /* taken from the record of the last row */
    CHECK_EQ(put(v, 502, "t").append_at_ns, last + 5000000000003U);
    close_and_drop(v);
    o.last_append_at_ns = UINT64_MAX;
    v = open_with(&o);
    CHECK(put(v, 503, "t").append_at_ns < last + 5000000000003U);
    close_and_drop(v);
    drop_place(&p);
}

static void test_limit(void) {
    place p = new_place();
    pv_vol_opts o = opts_for(&p);
    o.flags = PV_VOL_CREATE;
    o.max_volume_bytes = 200;
    pv_vol *v = open_with(&o);
    pv_errinfo err;
    uint64_t id = 1;
    while (stat_of(v).dat_bytes < 200) {
        put(v, id++, "0123456789");
    }
    uint64_t end = stat_of(v).dat_bytes;
    CHECK_EQ(write_flags(v, id, "x", 1, 0, &err), PV_EFULL);
    CHECK_EQ(err.a, end);
    CHECK_EQ(err.b, 200);
    CHECK_EQ(err.d, 0);
    CHECK_EQ(write_flags(v, id, "x", 1, PV_WRITE_FSYNC, &err), PV_EFULL);
    CHECK_EQ(stat_of(v).dat_bytes, end);
    CHECK(del(v, 1) > 0);
    CHECK_EQ(write_flags(v, id, NULL, 0, 0, &err), 0); /* no data: fits */
    CHECK(stat_of(v).dat_bytes > end);
    close_and_drop(v);

    /* flushed writes and blobs go by the sum of sizes */
    o.max_volume_bytes = 1000;
    unlink(p.dat);
    unlink(p.idx);
    v = open_with(&o);
    uint8_t *data = noise(4, 1000);
    CHECK_EQ(write_flags(v, 1, data, 900, 0, &err), 0);
    CHECK_EQ(write_flags(v, 2, data, 100, PV_WRITE_FSYNC, &err), PV_EFULL);
    CHECK_EQ(err.d, 1);
    CHECK_EQ(err.a, 905);
    CHECK_EQ(err.b, 1000);
    CHECK_EQ(write_flags(v, 2, data, 10, PV_WRITE_FSYNC, &err), 0);
    free(data);
    close_and_drop(v);
    drop_place(&p);
}

static void test_bad_arguments(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    pv_errinfo err;
    pv_write_res res;
    pv_needle n = needle(1, NULL, 5);
    CHECK_EQ(pv_vol_write(v, &n, 0, NULL, &res, &err), PV_EINVAL);
    n = needle(1, "x", 1);
    n.name_size = 3;
    CHECK_EQ(pv_vol_write(v, &n, 0, NULL, &res, &err), PV_EINVAL);
    n = needle(1, "x", 1);
    n.pairs_size = 3;
    CHECK_EQ(pv_vol_write(v, &n, 0, NULL, &res, &err), PV_EINVAL);
    CHECK_EQ(stat_of(v).dat_bytes, 8);
    close_and_drop(v);
    drop_place(&p);
}

/* ------------------------------------------------------------------ tests: blobs */

static void test_blob(void) {
    place p = new_place();
    place q = new_place();
    pv_vol *from = create(&p);
    pv_vol *to = create(&q);
    pv_errinfo err;
    pv_write_res res;
    pv_write_res src = put(from, 5, "twelve bytes");
    int64_t len = pv_needle_record_len(src.size, 3);
    uint8_t blob[200] = {0};
    uint8_t copy[200];
    file_read(p.dat, src.offset, blob, (size_t)len);
    memcpy(copy, blob, sizeof blob);

    CHECK_EQ(pv_vol_write_blob(to, 5, src.size, blob, (size_t)len, 0, NULL, &res, &err), 0);
    CHECK_EQ(res.unchanged, 0);
    CHECK_EQ(res.cookie, COOKIE);
    CHECK_EQ(res.checksum, src.checksum);
    CHECK(res.append_at_ns > src.append_at_ns);
    CHECK_MEM(blob, copy, sizeof blob); /* only borrowed */
    uint8_t back[200];
    file_read(q.dat, res.offset, back, (size_t)len);
    size_t time_at = 16 + (size_t)src.size + 4;
    CHECK_EQ(pv__get_be64(back + time_at), res.append_at_ns);
    memcpy(back + time_at, copy + time_at, 8);
    CHECK_MEM(back, copy, (size_t)len);
    CHECK_EQ(pv_vol_write_blob(to, 5, src.size, blob, (size_t)len, 0, NULL, &res, &err), 0);
    CHECK_EQ(res.unchanged, 1);

    /* under another id; it is the map's key that counts */
    CHECK_EQ(pv_vol_write_blob(to, 6, src.size, blob, (size_t)len, 0, NULL, &res, &err), 0);
    pv_read r;
    CHECK_EQ(pv_vol_read(to, 6, 0, NULL, &r, &err), 0);
    CHECK_EQ(r.n.id, 5);
    pv_read_free(&r);

    /* cut and overlong blobs leave whole records behind */
    uint64_t end = stat_of(to).dat_bytes;
    CHECK_EQ(pv_vol_write_blob(to, 7, src.size, blob, time_at + 8, 0, NULL, &res, &err), 0);
    CHECK_EQ(stat_of(to).dat_bytes, end + (uint64_t)len);
    CHECK_EQ(file_len(q.dat), end + (uint64_t)len);
    CHECK_EQ(pv_vol_write_blob(to, 8, src.size, blob, (size_t)len + 11, 0, NULL, &res, &err), 0);
    CHECK_EQ(stat_of(to).dat_bytes, end + 2 * (uint64_t)len);
    expect_text(to, 7 - 2, "twelve bytes");
    CHECK_EQ(read_code(to, 7, 0), 0);
    CHECK_EQ(read_code(to, 8, 0), 0);

    end = stat_of(to).dat_bytes;
    CHECK_EQ(pv_vol_write_blob(to, 9, src.size, blob, 15, 0, NULL, &res, &err), PV_ESIZE);
    CHECK_EQ(err.a, 0);
    CHECK_EQ(err.b, 15);
    CHECK_EQ(pv_vol_write_blob(to, 9, src.size - 5, blob, (size_t)len, 0, NULL, &res, &err), PV_ESIZE);
    CHECK_EQ(err.a, 1);
    CHECK_EQ(err.c, src.size);
    CHECK_EQ(pv_vol_write_blob(to, 9, src.size, blob, time_at + 7, 0, NULL, &res, &err), PV_EBUFFER);
    CHECK_EQ(err.a, time_at + 8);
    CHECK_EQ(err.b, time_at + 7);
    pv__put_be32(blob + 12, 0xffffffff);
    CHECK_EQ(pv_vol_write_blob(to, 9, -1, blob, (size_t)len, 0, NULL, &res, &err), PV_ESIZE);
    CHECK_EQ(err.a, 2);
    pv__put_be32(blob + 12, INT32_MAX);
    CHECK_EQ(pv_vol_write_blob(to, 9, INT32_MAX, blob, (size_t)len, 0, NULL, &res, &err), PV_EBUFFER);
    CHECK_EQ(stat_of(to).dat_bytes, end);

    /* the checksum is not looked at */
    memcpy(blob, copy, sizeof blob);
    blob[20] ^= 1;
    CHECK_EQ(pv_vol_write_blob(to, 10, src.size, blob, (size_t)len, 0, NULL, &res, &err), 0);
    CHECK_EQ(read_code(to, 10, 0), PV_ECRC);
    close_and_drop(from);
    close_and_drop(to);

    to = reopen(&q);
    put(to, 11, "aligned");
    expect_text(to, 11, "aligned");
    close_and_drop(to);
    drop_place(&p);
    drop_place(&q);
}

/* A version 3 blob in a version 2 volume is cut to a version 2 record, and the other way round there is no room. */
static void test_blob_versions(void) {
    place p = new_place();
    place q = new_place();
    pv_errinfo err;
    pv_write_res res;
    uint8_t blob[100];
    pv_vol *v3 = create(&p);
    pv_write_res src = put(v3, 1, "abc");
    file_read(p.dat, src.offset, blob, (size_t)pv_needle_record_len(src.size, 3));
    pv_vol_opts o = opts_for(&q);
    o.flags = PV_VOL_CREATE;
    o.superblock.version = 2;
    pv_vol *v2 = open_with(&o);
    CHECK_EQ(pv_vol_write_blob(v2, 1, src.size, blob, (size_t)pv_needle_record_len(src.size, 3), 0, NULL, &res, &err),
             0);
    CHECK_EQ(stat_of(v2).dat_bytes, 8 + (uint64_t)pv_needle_record_len(src.size, 2));
    expect_text(v2, 1, "abc");
    file_read(q.dat, res.offset, blob, (size_t)pv_needle_record_len(src.size, 2));
    CHECK_EQ(pv_vol_write_blob(v3, 2, src.size, blob, 16 + (size_t)src.size + 4, 0, NULL, &res, &err), PV_EBUFFER);
    close_and_drop(v2);
    close_and_drop(v3);
    drop_place(&p);
    drop_place(&q);
}

/* ------------------------------------------------------------------ tests: failing appends */

static void test_append_rollback(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    pv_errinfo err;
    fault f;
    put(v, 1, "first");
    uint64_t dat = file_len(p.dat);
    uint64_t idx = file_len(p.idx);

    for (unsigned i = 0; i < 3; i++) {
        fail_next(&f, PV__IO_PWRITE, ENOSPC);
        f.shorten_to = i == 0 ? 0 : i == 1 ? 1 : 21; /* nothing, part of the head, part of the data got out */
        CHECK_EQ(write_flags(v, 2, "second", 6, 0, &err), PV_ESYS);
        no_faults();
        CHECK_EQ(f.hit, 1);
        CHECK_EQ(err.sys_errno, ENOSPC);
        CHECK_EQ(err.a, dat);
        CHECK_EQ(err.d, 0);
        CHECK_EQ(file_len(p.dat), dat);
        CHECK_EQ(file_len(p.idx), idx);
        CHECK_EQ(read_code(v, 2, 0), PV_ENOTFOUND);
        CHECK_EQ(stat_of(v).no_write, 0);
    }
    /* a short write without an error is gone on with */
    fail_next(&f, PV__IO_PWRITE, 0);
    f.shorten_to = 5;
    CHECK_EQ(write_flags(v, 2, "second", 6, 0, &err), 0);
    no_faults();
    CHECK_EQ(f.hit, 1);
    expect_text(v, 2, "second");

    /* the index row fails: neither file keeps anything */
    dat = file_len(p.dat);
    idx = file_len(p.idx);
    for (unsigned i = 0; i < 2; i++) {
        fail_next(&f, PV__IO_PWRITE, EDQUOT);
        f.nth = 2;
        f.shorten_to = i == 0 ? 0 : 7;
        CHECK_EQ(write_flags(v, 3, "third", 5, 0, &err), PV_ESYS);
        no_faults();
        CHECK_EQ(err.sys_errno, EDQUOT);
        CHECK_EQ(err.d, 2);
        CHECK_EQ(file_len(p.dat), dat);
        CHECK_EQ(file_len(p.idx), idx);
        CHECK_EQ(read_code(v, 3, 0), PV_ENOTFOUND);
    }
    /* a delete that fails leaves the needle */
    int32_t size;
    pv_write_res res;
    fail_next(&f, PV__IO_PWRITE, EIO);
    CHECK_EQ(pv_vol_delete(v, 1, COOKIE, 0, 0, NULL, &size, &res, &err), PV_ESYS);
    no_faults();
    CHECK_EQ(size, -1);
    expect_text(v, 1, "first");
    CHECK_EQ(file_len(p.dat), dat);
    put(v, 3, "third");
    close_and_drop(v);
    v = reopen(&p);
    expect_text(v, 1, "first");
    expect_text(v, 2, "second");
    expect_text(v, 3, "third");
    close_and_drop(v);
    drop_place(&p);
}

/* What cannot be cut off turns the handle read-only, until it can. */
static void test_rollback_fails(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    pv_errinfo err;
    put(v, 1, "first");
    uint64_t dat = file_len(p.dat);
    fault f = {.ops = 1U << PV__IO_PWRITE | 1U << PV__IO_TRUNCATE, .nth = 1, .error = EIO, .for_ever = true};
    f.shorten_to = 9;
    pv__io_set_hook(fault_hook, &f);
    CHECK_EQ(write_flags(v, 2, "second", 6, 0, &err), PV_ESYS);
    CHECK_EQ(err.d, 8);
    CHECK_EQ(stat_of(v).no_write, 1);
    CHECK_EQ(stat_of(v).no_delete, 1);
    CHECK_EQ(stat_of(v).dat_bytes, dat);
    CHECK_EQ(write_flags(v, 2, "second", 6, 0, &err), PV_EREADONLY);
    CHECK_EQ(pv_vol_set_readonly(v, 0, 0), PV_ESYS);
    CHECK_EQ(stat_of(v).no_write, 1);
    CHECK_EQ(pv_vol_set_readonly(v, 1, 1), 0); /* refusing is always possible */
    no_faults();
    CHECK(file_len(p.dat) > dat);
    CHECK_EQ(pv_vol_set_readonly(v, 1, 1), 0); /* whoever opens the files next finds no half of an append */
    CHECK_EQ(file_len(p.dat), dat);
    CHECK_EQ(pv_vol_set_readonly(v, 0, 0), 0);
    put(v, 2, "second");
    expect_text(v, 1, "first");
    close_and_drop(v);
    drop_place(&p);
}

/* Space reserved behind the end survives a failed append that wrote nothing. */
static void test_preallocation(void) {
    place p = new_place();
    pv_vol_opts o = opts_for(&p);
    o.flags = PV_VOL_CREATE;
    o.preallocate_bytes = 1 << 20;
    pv_vol *v = open_with(&o);
    CHECK_EQ(file_len(p.dat), 8);
    pv_errinfo err;
    fault f;
    fail_next(&f, PV__IO_PWRITE, ENOSPC);
    f.ops |= 1U << PV__IO_TRUNCATE; /* a cut would be seen as a second hit */
    f.for_ever = true;
    CHECK_EQ(write_flags(v, 1, "x", 1, 0, &err), PV_ESYS);
    no_faults();
    CHECK_EQ(f.hit, 1);
    CHECK_EQ(err.d, 0);
    put(v, 1, "x");
    close_and_drop(v);
    drop_place(&p);
}

/* ------------------------------------------------------------------ tests: fail the nth call of a script */

#define KEYS 12

typedef struct model {
    bool live[KEYS];
    bool known[KEYS];
    char text[KEYS][64];
} model;

/* Deletes keys as a batch, with one by itself where the batch says so. True if any was dealt with. */
static bool script_delete_many(pv_vol *v, model *m, uint64_t *seed) {
    pv_delete items[8];
    pv_errinfo err;
    memset(items, 0, sizeof items);
    for (unsigned i = 0; i < 8; i++) {
        items[i] = (pv_delete){.id = t_rand_below(seed, KEYS), .cookie = COOKIE, .vid = 7, .ok = 1};
    }
    uint32_t flags = t_rand_below(seed, 2) ? PV_DELETE_ANY_COOKIE : 0;
    size_t at = 0;
    while (at < 8) {
        int rc = pv_vol_delete_many(v, items + at, 8 - at, flags, &err);
        CHECK(rc >= 0 || rc == PV_ESYS || rc == PV_ENOMEM || rc == PV_EREADONLY);
        CHECK(rc <= (int)(8 - at));
        for (int i = 0; i < rc; i++) {
            CHECK_EQ(items[at + (size_t)i].size > 0, m->live[items[at + (size_t)i].id]);
            m->live[items[at + (size_t)i].id] = false;
        }
        if (rc <= 0) {
            int32_t size;
            pv_write_res res;
            if (pv_vol_delete(v, items[at].id, COOKIE, 0, 0, NULL, &size, &res, &err) < 0) {
                break;
            }
            CHECK_EQ(size >= 0, m->live[items[at].id]);
            m->live[items[at].id] = false;
            rc = 1;
        }
        at += (size_t)rc;
    }
    return at > 0;
}

/* One step; true if it was acknowledged. The same step number always does the same. */
static bool script_step(pv_vol *v, model *m, unsigned step, uint64_t *seed) {
    pv_errinfo err;
    pv_write_res res;
    unsigned key = (unsigned)t_rand_below(seed, KEYS);
    unsigned what = (unsigned)t_rand_below(seed, 10);
    if (what == 9) {
        return script_delete_many(v, m, seed);
    }
    if (what < 2) {
        int32_t size;
        if (pv_vol_delete(v, key, COOKIE, 0, what == 0 ? PV_WRITE_FSYNC : 0, NULL, &size, &res, &err) < 0) {
            return false;
        }
        CHECK_EQ(size >= 0, m->live[key]);
        m->live[key] = false;
        return true;
    }
    char text[64];
    snprintf(text, sizeof text, "step %u key %u %.*s", step, key, (int)t_rand_below(seed, 30),
             "..............................");
    int rc;
    if (what == 2) {
        uint8_t head[20], tail[400], blob[500];
        size_t head_len, tail_len;
        int32_t size;
        pv_needle n = needle(key, text, strlen(text));
        n.checksum = pv_crc32c(0, text, strlen(text));
        CHECK_EQ(pv_needle_frame(&n, 3, head, &head_len, tail, sizeof tail, &tail_len, &size, &err), 0);
        memcpy(blob, head, head_len);
        memcpy(blob + head_len, text, strlen(text));
        memcpy(blob + head_len + strlen(text), tail, tail_len);
        rc = pv_vol_write_blob(v, key, size, blob, head_len + strlen(text) + tail_len, 0, NULL, &res, &err);
    } else {
        rc = write_flags(v, key, text, strlen(text), what < 5 ? PV_WRITE_FSYNC : 0, &err);
    }
    if (rc < 0) {
        CHECK(rc == PV_ESYS || rc == PV_ENOMEM || rc == PV_EREADONLY);
        return false;
    }
    m->live[key] = m->known[key] = true;
    snprintf(m->text[key], sizeof m->text[key], "%s", text);
    return true;
}

static void check_model(pv_vol *v, const model *m) {
    for (unsigned k = 0; k < KEYS; k++) {
        if (m->live[k]) {
            expect_text(v, k, m->text[k]);
        } else {
            CHECK_EQ(read_code(v, k, 0), m->known[k] ? PV_EDELETED : PV_ENOTFOUND);
        }
    }
}

/* Every record of .dat parses, but for spoiled ones (id and cookie 0), and the files end where the handle says. */
static void check_files(const place *p, pv_vol *v) {
    int fd = open(p->dat, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    uint64_t at = 8;
    pv_scan_rec rec;
    pv_errinfo err;
    int rc;
    while ((rc = pv_dat_scan(fd, 3, &at, UINT64_MAX, 1, &rec, 1, &err)) > 0) {
        CHECK(rec.status == 0 || (rec.status == PV_ECRC && rec.cookie == 0 && rec.id == 0));
    }
    CHECK_EQ(rc, 0);
    CHECK_EQ(at, stat_of(v).dat_bytes);
    CHECK_EQ(file_len(p->dat), at);
    CHECK_EQ(file_len(p->idx), stat_of(v).idx_bytes);
    /* every row leads to its key's record */
    int idx_fd = open(p->idx, O_RDONLY | O_CLOEXEC);
    CHECK(idx_fd >= 0);
    pv_idx_row row;
    for (uint64_t i = 0; pv_idx_read(idx_fd, 4, i, &row, 1, NULL) == 1; i++) {
        uint8_t head[16];
        uint32_t cookie;
        uint64_t id;
        int32_t size;
        if (row.offset == 0) {
            CHECK_EQ(row.size, -1);
            continue;
        }
        CHECK(pread(fd, head, 16, (off_t)row.offset) == 16);
        pv_needle_header(head, &cookie, &id, &size);
        CHECK_EQ(id, row.key);
        CHECK_EQ(size, row.size < 0 ? 0 : row.size);
    }
    close(idx_fd);
    close(fd);
}

/* Runs the script with the nth operation failing; returns whether one failed at all. */
static bool run_script(unsigned ops, long nth, int error, size_t shorten_to, bool for_ever, bool alloc) {
    place p = new_place();
    pv_vol *v = create(&p);
    model m = {0};
    uint64_t seed = 42;
    fault f = {.ops = ops, .nth = nth, .error = error, .shorten_to = shorten_to, .for_ever = for_ever};
    if (alloc) {
        pv__alloc_fail_at(nth);
    } else {
        pv__io_set_hook(fault_hook, &f);
    }
    for (unsigned step = 0; step < 60; step++) {
        model before = m;
        if (!script_step(v, &m, step, &seed)) {
            CHECK_MEM(&before, &m, sizeof m);
        }
    }
    no_faults();
    bool hit = alloc ? pv__alloc_fail_at(0) == 0 : f.hit > 0;
    check_model(v, &m);
    if (stat_of(v).no_write) {
        CHECK_EQ(pv_vol_set_readonly(v, 0, 0), 0);
    }
    check_files(&p, v);
    model after = m;
    for (unsigned k = 0; k < KEYS; k++) { /* writable again */
        char text[64];
        snprintf(text, sizeof text, "afterwards %u", k);
        put(v, k, text);
        after.live[k] = after.known[k] = true;
        snprintf(after.text[k], sizeof after.text[k], "%s", text);
    }
    check_model(v, &after);
    close_and_drop(v);
    v = reopen(&p);
    check_model(v, &after);
    close_and_drop(v);
    drop_place(&p);
    return hit;
}

/* The same, but what is on disk after the failure is loaded anew at once. */
static bool run_script_reload(unsigned ops, long nth, int error, size_t shorten_to) {
    place p = new_place();
    pv_vol *v = create(&p);
    model m = {0};
    uint64_t seed = 43;
    fault f = {.ops = ops, .nth = nth, .error = error, .shorten_to = shorten_to};
    pv__io_set_hook(fault_hook, &f);
    for (unsigned step = 0; step < 60 && f.hit == 0; step++) {
        (void)script_step(v, &m, step, &seed);
    }
    no_faults();
    check_files(&p, v);
    close_and_drop(v);
    v = reopen(&p);
    for (unsigned k = 0; k < KEYS; k++) {
        /* a compensated row leaves an unknown key behind as a deleted one */
        if (m.live[k]) {
            expect_text(v, k, m.text[k]);
        } else {
            int rc = read_code(v, k, 0);
            CHECK(rc == PV_EDELETED || rc == PV_ENOTFOUND);
        }
    }
    close_and_drop(v);
    drop_place(&p);
    return f.hit > 0;
}

static void test_fail_nth(void) {
    const unsigned writes = 1U << PV__IO_PWRITE;
    const unsigned syncs = 1U << PV__IO_DATASYNC;
    const unsigned everything = writes | syncs | 1U << PV__IO_PREAD | 1U << PV__IO_TRUNCATE | 1U << PV__IO_STAT;
    long n;
    for (n = 1; run_script(writes, n, ENOSPC, 0, false, false); n++) {
    }
    CHECK(n > 80);
    for (n = 1; run_script(writes, n, ENOSPC, 10, false, false); n++) {
    }
    for (n = 1; run_script(syncs, n, EIO, 0, false, false); n++) {
    }
    CHECK(n > 15);
    for (n = 1; run_script(everything, n, EIO, 0, false, false); n++) {
    }
    for (n = 1; run_script(writes, n, ENOSPC, 3, true, false); n += 3) { /* full from then on */
    }
    for (n = 1; run_script(writes | syncs | 1U << PV__IO_TRUNCATE, n, EIO, 0, true, false); n += 3) { /* dead disk */
    }
    for (n = 1; run_script(0, n, 0, 0, false, true); n++) { /* memory */
    }
    for (n = 1; run_script_reload(writes | syncs, n, EIO, 0); n++) {
    }
    for (n = 1; run_script_reload(writes, n, EIO, 11); n++) {
    }
}

/* ------------------------------------------------------------------ tests: deleting many */

#define MANY 1300U

static pv_vol *volume_for_many(const place *p, uint8_t version, uint8_t width) {
    pv_vol_opts o = opts_for(p);
    o.flags = PV_VOL_CREATE;
    o.offset_width = width;
    o.superblock.version = version;
    pv_vol *v = open_with(&o);
    for (unsigned i = 1; i <= MANY; i++) {
        char text[32];
        pv_errinfo err;
        snprintf(text, sizeof text, "needle %u", i);
        CHECK_EQ(write_flags(v, i, text, i % 50 == 0 ? 0 : strlen(text), 0, &err), 0); /* some are empty */
    }
    return v;
}

/* A new buffer with .dat, the append times of version 3 made 0 (they must rise), or .idx. */
static uint8_t *content_of(const char *path, uint8_t version, size_t *len) {
    *len = file_len(path);
    uint8_t *all = malloc(*len);
    CHECK(all != NULL);
    file_read(path, 0, all, *len);
    uint64_t last = 0;
    for (size_t at = 8; version == 3 && at < *len;) {
        uint32_t cookie;
        uint64_t id;
        int32_t size;
        pv_needle_header(all + at, &cookie, &id, &size);
        uint8_t *when = all + at + PV_NEEDLE_HEADER + size + 4;
        CHECK(pv__get_be64(when) > last);
        last = pv__get_be64(when);
        memset(when, 0, 8);
        at += (size_t)pv_needle_record_len(size, version);
    }
    return all;
}

/* One by one as a caller would: the read, then the tombstone with the record's checksum. */
static int32_t read_and_delete(pv_vol *v, const pv_delete *item, bool any_cookie) {
    int32_t size;
    pv_write_res res;
    pv_read r = {0};
    pv_errinfo err;
    if (!any_cookie) {
        if (pv_vol_read(v, item->id, 0, NULL, &r, &err) < 0) {
            return 0;
        }
        bool same = r.empty || r.n.cookie == item->cookie;
        pv_read_free(&r);
        if (!same) {
            return 0;
        }
    }
    uint32_t cookie = any_cookie ? 0 : item->cookie;
    CHECK_EQ(pv_vol_delete(v, item->id, cookie, r.n.checksum, 0, NULL, &size, &res, &err), 0);
    return size > 0 ? size : 0;
}

static void check_many_is_as_single(uint8_t version, uint8_t width, bool any_cookie) {
    place one = new_place();
    place two = new_place();
    pv_vol *single = volume_for_many(&one, version, width);
    pv_vol *many = volume_for_many(&two, version, width);
    static pv_delete items[MANY + 100];
    uint64_t seed = version;
    size_t n = MANY + 100; /* some are not there, some come twice, some have another cookie */
    for (size_t i = 0; i < n; i++) {
        items[i] = (pv_delete){.id = i % 97 == 5 ? t_rand_below(&seed, MANY) + 1 : i + 1,
                               .cookie = i % 211 == 7 ? COOKIE + 1 : COOKIE,
                               .vid = 7,
                               .size = 99,
                               .ok = 1};
    }
    size_t by_batch = 0;
    for (size_t at = 0; at < n;) {
        int rc = pv_vol_delete_many(many, items + at, n - at, any_cookie ? PV_DELETE_ANY_COOKIE : 0, NULL);
        CHECK(rc >= 0 && rc <= 512);
        by_batch += (size_t)rc;
        if (rc == 0) {
            items[at].size = read_and_delete(many, &items[at], any_cookie);
            rc = 1;
        }
        at += (size_t)rc;
    }
    CHECK(by_batch > MANY - 100);
    for (size_t i = 0; i < n; i++) {
        CHECK_EQ(items[i].size, read_and_delete(single, &items[i], any_cookie));
    }
    pv_vol_stats a = stat_of(single);
    pv_vol_stats b = stat_of(many);
    CHECK_EQ(a.deleted_count, b.deleted_count);
    CHECK_EQ(a.deleted_bytes, b.deleted_bytes);
    CHECK_EQ(a.dat_bytes, b.dat_bytes);
    CHECK_EQ(a.idx_bytes, b.idx_bytes);
    CHECK(b.deleted_count > 1000);
    close_and_drop(single);
    close_and_drop(many);
    size_t len, other_len;
    uint8_t *dat = content_of(one.dat, version, &len);
    uint8_t *other = content_of(two.dat, version, &other_len);
    CHECK_EQ(len, other_len);
    CHECK_MEM(dat, other, len);
    free(dat);
    free(other);
    dat = content_of(one.idx, 0, &len);
    other = content_of(two.idx, 0, &other_len);
    CHECK_EQ(len, other_len);
    CHECK_MEM(dat, other, len);
    free(dat);
    free(other);
    drop_place(&one);
    drop_place(&two);
}

static void test_many_is_as_single(void) {
    for (uint8_t version = 1; version <= 3; version++) {
        check_many_is_as_single(version, 4, false);
        check_many_is_as_single(version, 5, true);
    }
}

static void test_many_leaves_to_the_caller(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    pv_errinfo err;
    for (unsigned i = 1; i <= 4; i++) {
        put(v, i, "text");
    }
    pv_needle n = needle(5, "{}", 2);
    pv_write_res res;
    n.flags = PV_F_MANIFEST;
    CHECK_EQ(pv_vol_write(v, &n, 0, NULL, &res, &err), 0);
    n = needle(6, "mortal", 6);
    n.flags = PV_F_TTL | PV_F_MTIME;
    n.ttl_count = 1;
    n.ttl_unit = 1;
    CHECK_EQ(pv_vol_write(v, &n, 0, NULL, &res, &err), 0);
    pv_delete bad[] = {
        {.id = 1, .cookie = COOKIE + 1, .vid = 7, .ok = 1},
        {.id = 5, .cookie = COOKIE, .vid = 7, .ok = 1},
        {.id = 6, .cookie = COOKIE, .vid = 7, .ok = 1},
        {.id = 9, .cookie = COOKIE, .vid = 7, .ok = 1},
        {.id = 1, .cookie = COOKIE, .vid = 7},
    };
    uint64_t end = file_len(p.dat);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_EQ(pv_vol_delete_many(v, &bad[i], 1, 0, &err), 0);
    }
    CHECK_EQ(pv_vol_delete_many(v, bad, 0, 0, &err), 0);
    CHECK_EQ(file_len(p.dat), end);
    pv_delete twice[] = {
        {.id = 1, .cookie = COOKIE, .vid = 7, .ok = 1},
        {.id = 2, .cookie = COOKIE, .vid = 7, .ok = 1},
        {.id = 1, .cookie = COOKIE, .vid = 7, .ok = 1},
    };
    CHECK_EQ(pv_vol_delete_many(v, twice, 3, 0, &err), 2);
    CHECK_EQ(pv_vol_delete_many(v, twice + 2, 1, 0, &err), 0);
    pv_delete other[] = {{.id = 3, .cookie = COOKIE, .vid = 7, .ok = 1},
                         {.id = 4, .cookie = COOKIE, .vid = 8, .ok = 1}};
    CHECK_EQ(pv_vol_delete_many(v, other, 2, 0, &err), 1);
    pv_delete last = {.id = 4, .cookie = COOKIE, .vid = 7, .ok = 1};
    CHECK_EQ(pv_vol_set_readonly(v, 1, 1), 0);
    CHECK_EQ(pv_vol_delete_many(v, &last, 1, 0, &err), PV_EREADONLY);
    CHECK_EQ(pv_vol_set_readonly(v, 1, 0), 0);
    fault f;
    fail_next(&f, PV__IO_PWRITE, EIO);
    CHECK_EQ(pv_vol_delete_many(v, &last, 1, 0, &err), PV_ESYS);
    no_faults();
    CHECK_EQ(stat_of(v).eio_count, 0); /* counted when the caller tries it */
    expect_text(v, 4, "text");
    CHECK_EQ(pv_vol_delete_many(v, &last, 1, 0, &err), 1);
    CHECK(last.size > 0);
    CHECK_EQ(pv_vol_close(v, &err), 0);
    CHECK_EQ(pv_vol_delete_many(v, &last, 1, 0, &err), PV_ECLOSED);
    pv_vol_unref(v);
    drop_place(&p);
}

static void test_delete_texts(void) {
    static const char text[] =
        "7,01aabbccdd\n7,01aabbccdd_2\n\nx,01aabbccdd\n4294967296,01aabbccdd\n,7\n7,\n8,zz00000001\n007,1000000ff";
    pv_delete items[9];
    CHECK_EQ(pv_delete_parse(text, sizeof text - 1, 0, items, 9), 9);
    CHECK_EQ(pv_delete_parse(text, sizeof text - 1, 0, items, 8), PV_EINVAL);
    CHECK_EQ(pv_delete_parse(text, 12, 0, items, 2), PV_EINVAL);
    CHECK_EQ(pv_delete_parse(text, sizeof text - 1, PV_DELETE_ANY_COOKIE, items, 9), 9);
    CHECK_EQ(items[1].ok, 0);
    CHECK_EQ(pv_delete_parse(text, sizeof text - 1, 0, items, 9), 9);
    for (unsigned i = 2; i < 8; i++) {
        CHECK_EQ(items[i].ok, 0);
    }
    CHECK(items[0].ok && items[0].id == 1 && items[0].cookie == 0xaabbccdd && items[0].vid == 7);
    CHECK(items[1].ok && items[1].id == 3 && items[1].at == 13 && items[1].len == 14);
    CHECK(items[8].ok && items[8].id == 1 && items[8].cookie == 0xff && items[8].vid == 7);
    items[0].size = 300;
    uint8_t buf[128];
    static const uint8_t want[] = "\x0a\x14\x0a\x0c"
                                  "7,01aabbccdd\x10\xca\x01\x20\xac\x02"
                                  "\x0a\x13\x0a\x0e"
                                  "7,01aabbccdd_2\x10\xb0\x02";
    CHECK_EQ(pv_delete_answer(text, items, 2, buf, 90), sizeof want - 1);
    CHECK_MEM(buf, want, sizeof want - 1);
    CHECK_EQ(pv_delete_answer(text, items, 2, buf, 40), PV_EBUFFER);
}

static void test_open_fails_nth(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    put(v, 1, "x");
    close_and_drop(v);
    const unsigned all = (1U << PV__IO_OP_COUNT) - 1;
    for (unsigned creating = 0; creating < 2; creating++) {
        pv_vol_opts o = opts_for(&p);
        o.flags = creating ? PV_VOL_CREATE : 0;
        o.preallocate_bytes = creating ? 4096 : 0;
        bool hit = true;
        for (long n = 1; hit; n++) {
            fault f = {.ops = all, .nth = n, .error = EIO};
            pv_errinfo err = {0};
            pv__io_set_hook(fault_hook, &f);
            int rc = pv_vol_open(&o, &v, &err);
            no_faults();
            hit = f.hit > 0;
            if (rc == 0) {
                pv_vol_unref(v);
            } else {
                CHECK_EQ(rc, PV_ESYS);
                CHECK_EQ(err.sys_errno, EIO);
                CHECK(hit && v == NULL);
            }
        }
        hit = true;
        for (long n = 1; hit; n++) {
            pv__alloc_fail_at(n);
            int rc = pv_vol_open(&o, &v, NULL);
            hit = pv__alloc_fail_at(0) == 0;
            CHECK(rc == PV_ENOMEM ? hit : rc == 0);
            if (rc == 0) {
                pv_vol_unref(v);
            }
        }
    }
    drop_place(&p);
}

/* ------------------------------------------------------------------ tests: flushed writes with threads */

/* A hook that holds fdatasync of one file until the test lets it go. */
typedef struct gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int hold_fd_calls; /* how many fdatasync calls are still to be held */
    unsigned waiting;
    unsigned let_go;
    int error;         /* what held calls answer */
    unsigned syncs;    /* all fdatasync calls */
    unsigned fail_nth; /* this call (of all) fails with error, held or not */
    unsigned pwrites;
    unsigned fail_pwrite; /* this write (of all) fails with error */
} gate;

static int gate_hook(void *ctx, const pv__io_event *ev, size_t *len) {
    gate *g = ctx;
    (void)len;
    if (ev->op == PV__IO_PWRITE) {
        pv__mutex_lock(&g->lock);
        g->pwrites++;
        int error = g->pwrites == g->fail_pwrite ? g->error : 0;
        pv__mutex_unlock(&g->lock);
        return error;
    }
    if (ev->op != PV__IO_DATASYNC) {
        return 0;
    }
    pv__mutex_lock(&g->lock);
    g->syncs++;
    int rc = g->fail_nth != 0 && g->syncs == g->fail_nth ? g->error : 0;
    if (g->hold_fd_calls > 0) {
        g->hold_fd_calls--;
        g->waiting++;
        pv__cond_broadcast(&g->changed);
        while (g->let_go == 0) {
            pv__cond_wait(&g->changed, &g->lock);
        }
        g->let_go--;
        g->waiting--;
    }
    pv__mutex_unlock(&g->lock);
    return rc;
}

static void gate_init(gate *g, int hold) {
    memset(g, 0, sizeof *g);
    CHECK_EQ(pv__mutex_init(&g->lock), 0);
    CHECK_EQ(pv__cond_init(&g->changed), 0);
    g->hold_fd_calls = hold;
    pv__io_set_hook(gate_hook, g);
}

static void gate_wait_held(gate *g) {
    pv__mutex_lock(&g->lock);
    while (g->waiting == 0) {
        pv__cond_wait(&g->changed, &g->lock);
    }
    pv__mutex_unlock(&g->lock);
}

static void gate_let_go(gate *g) {
    pv__mutex_lock(&g->lock);
    g->let_go++;
    pv__cond_broadcast(&g->changed);
    pv__mutex_unlock(&g->lock);
}

static void gate_done(gate *g) {
    no_faults();
    pv__must(pthread_cond_destroy(&g->changed));
    pv__must(pthread_mutex_destroy(&g->lock));
}

typedef struct writer {
    pthread_t thread;
    pv_vol *v;
    uint64_t id;
    const char *text;
    uint32_t flags;
    bool deletes;
    _Atomic bool done;
    int rc;
    pv_errinfo err;
} writer;

static void *writer_main(void *arg) {
    writer *w = arg;
    if (w->deletes) {
        int32_t size;
        pv_write_res res;
        w->rc = pv_vol_delete(w->v, w->id, COOKIE, 0, w->flags, NULL, &size, &res, &w->err);
    } else {
        w->rc = write_flags(w->v, w->id, w->text, strlen(w->text), w->flags, &w->err);
    }
    atomic_store(&w->done, true);
    return NULL;
}

static void writer_start(writer *w, pv_vol *v, uint64_t id, const char *text, uint32_t flags) {
    w->v = v;
    w->id = id;
    w->text = text;
    w->flags = flags;
    atomic_store(&w->done, false);
    CHECK(pthread_create(&w->thread, NULL, writer_main, w) == 0);
}

static void writer_join(writer *w) {
    CHECK(pthread_join(w->thread, NULL) == 0);
}

/* Waits until .dat holds so many bytes: the writers' records are in. */
static void wait_dat(pv_vol *v, uint64_t bytes) {
    while (stat_of(v).dat_bytes < bytes) {
        usleep(200);
    }
}

#define REC5 ((uint64_t)pv_needle_record_len(4 + 5 + 1, 3)) /* a record with 5 bytes of data */

static void test_group_commit(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    gate g;
    writer w[9] = {0};
    gate_init(&g, 1);
    writer_start(&w[0], v, 100, "aaaaa", PV_WRITE_FSYNC);
    gate_wait_held(&g);
    for (unsigned i = 1; i < 9; i++) {
        writer_start(&w[i], v, 100 + i, "bbbbb", PV_WRITE_FSYNC);
    }
    wait_dat(v, 8 + 9 * REC5);
    /* nothing is seen, and nothing returns, before it is on disk */
    for (unsigned i = 0; i < 9; i++) {
        CHECK(!atomic_load(&w[i].done));
        CHECK_EQ(read_code(v, 100 + i, 0), PV_ENOTFOUND);
    }
    CHECK_EQ(stat_of(v).idx_bytes, 0);
    gate_let_go(&g);
    for (unsigned i = 0; i < 9; i++) {
        writer_join(&w[i]);
        CHECK_EQ(w[i].rc, 0);
        CHECK_EQ(read_code(v, 100 + i, 0), 0);
    }
    CHECK_EQ(g.syncs, 2); /* one for the first, one for the eight */
    gate_done(&g);
    check_files(&p, v);
    close_and_drop(v);
    drop_place(&p);
}

/* A failed flush fails everyone who was pending, also those who came during it, and leaves nothing. */
static void test_flush_fails(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    gate g;
    writer w[5] = {0};
    put(v, 100, "older");
    uint64_t dat = file_len(p.dat);
    gate_init(&g, 1);
    g.fail_nth = 1;
    g.error = EIO;
    writer_start(&w[0], v, 100, "aaaaa", PV_WRITE_FSYNC);
    gate_wait_held(&g);
    for (unsigned i = 1; i < 5; i++) {
        writer_start(&w[i], v, 100 + i, "bbbbb", PV_WRITE_FSYNC);
    }
    wait_dat(v, dat + 5 * REC5);
    gate_let_go(&g);
    for (unsigned i = 0; i < 5; i++) {
        writer_join(&w[i]);
        CHECK_EQ(w[i].rc, PV_ESYS);
        CHECK_EQ(w[i].err.sys_errno, EIO);
        CHECK_EQ(w[i].err.d, 4);
    }
    CHECK_EQ(g.syncs, 1);
    gate_done(&g);
    expect_text(v, 100, "older");
    CHECK_EQ(read_code(v, 101, 0), PV_ENOTFOUND);
    CHECK_EQ(file_len(p.dat), dat);
    CHECK_EQ(file_len(p.idx), 16);
    CHECK_EQ(stat_of(v).no_write, 0);
    pv_errinfo err;
    CHECK_EQ(write_flags(v, 101, "ccccc", 5, PV_WRITE_FSYNC, &err), 0);
    check_files(&p, v);
    close_and_drop(v);
    drop_place(&p);
}

/* An unflushed write behind a pending one goes on at once; if the flush then fails it stays, and the orphan before it
 * is no needle to anybody. */
static void test_orphan(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    gate g;
    writer w[3] = {0};
    put(v, 100, "older");
    uint64_t dat = file_len(p.dat);
    gate_init(&g, 1);
    g.fail_nth = 1;
    g.error = ENOSPC;
    writer_start(&w[0], v, 100, "aaaaa", PV_WRITE_FSYNC);
    gate_wait_held(&g);
    writer_start(&w[1], v, 101, "", PV_WRITE_FSYNC);
    wait_dat(v, dat + REC5 + 32);
    put(v, 102, "plain"); /* not held up */
    expect_text(v, 102, "plain");
    writer_start(&w[2], v, 103, "ccccc", PV_WRITE_FSYNC);
    wait_dat(v, dat + 3 * REC5 + 32);
    gate_let_go(&g);
    for (unsigned i = 0; i < 3; i++) {
        writer_join(&w[i]);
        CHECK_EQ(w[i].rc, PV_ESYS);
    }
    gate_done(&g);
    CHECK_EQ(file_len(p.dat), dat + 2 * REC5 + 32); /* only the last one was at the end */
    expect_text(v, 100, "older");
    CHECK_EQ(read_code(v, 101, 0), PV_ENOTFOUND);
    expect_text(v, 102, "plain");
    check_files(&p, v);

    /* what a scan makes of the two orphans */
    int fd = open(p.dat, O_RDONLY | O_CLOEXEC);
    uint64_t at = dat;
    pv_scan_rec rec[4];
    CHECK_EQ(pv_dat_scan(fd, 3, &at, UINT64_MAX, 1, rec, 4, NULL), 3);
    CHECK_EQ(rec[0].id, 0);
    CHECK_EQ(rec[0].cookie, 0);
    CHECK_EQ(rec[0].status, PV_ECRC);
    CHECK_EQ(rec[1].id, 0);
    CHECK_EQ(rec[1].cookie, 0);
    CHECK_EQ(rec[1].size, 0);
    CHECK_EQ(rec[1].append_at_ns, 0);
    CHECK_EQ(rec[1].record_len, 32);
    CHECK_EQ(rec[2].id, 102);
    CHECK_EQ(rec[2].status, 0);
    close(fd);

    /* after a failed flush the index is flushed, too: .dat may have a gap that stops a scan */
    gate_init(&g, 0);
    pv_errinfo err;
    CHECK_EQ(write_flags(v, 104, "ddddd", 5, PV_WRITE_FSYNC, &err), 0);
    CHECK_EQ(g.syncs, 2);
    gate_done(&g);
    close_and_drop(v);
    v = reopen(&p);
    expect_text(v, 100, "older");
    expect_text(v, 102, "plain");
    expect_text(v, 104, "ddddd");
    CHECK_EQ(read_code(v, 103, 0), PV_ENOTFOUND);
    close_and_drop(v);
    drop_place(&p);
}

/* A row that comes behind rows of later records is flushed before it is published. */
static void test_unordered_rows(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    gate g;
    writer w = {0};
    gate_init(&g, 1);
    writer_start(&w, v, 1, "aaaaa", PV_WRITE_FSYNC);
    gate_wait_held(&g);
    put(v, 2, "plain");
    gate_let_go(&g);
    writer_join(&w);
    CHECK_EQ(w.rc, 0);
    CHECK_EQ(g.syncs, 2); /* .dat and .idx */
    gate_done(&g);
    gate_init(&g, 0);
    pv_errinfo err;
    CHECK_EQ(write_flags(v, 3, "ccccc", 5, PV_WRITE_FSYNC, &err), 0);
    CHECK_EQ(g.syncs, 1); /* in order again */
    gate_done(&g);
    close_and_drop(v);
    v = reopen(&p);
    expect_text(v, 1, "aaaaa");
    expect_text(v, 2, "plain");
    expect_text(v, 3, "ccccc");
    close_and_drop(v);
    drop_place(&p);
}

/* The flush of .idx fails: rows at its end are cut off, others outvoted, for a reload as for the handle. */
static void test_index_flush_fails(void) {
    for (unsigned behind = 0; behind < 2; behind++) {
        place p = new_place();
        pv_vol *v = create(&p);
        gate g;
        writer w[3] = {0};
        put(v, 1, "older");
        put(v, 4, "gone!");
        CHECK(del(v, 4) > 0);
        uint64_t dat = file_len(p.dat);
        gate_init(&g, 3);
        g.fail_nth = 2; /* .dat, then .idx of the first writer; .dat of the others */
        g.error = EIO;
        writer_start(&w[0], v, 1, "aaaaa", PV_WRITE_FSYNC);
        gate_wait_held(&g);
        put(v, 9, "plain"); /* makes the rows unordered */
        writer_start(&w[1], v, 2, "bbbbb", PV_WRITE_FSYNC);
        wait_dat(v, dat + 3 * REC5);
        writer_start(&w[2], v, 4, "ddddd", PV_WRITE_FSYNC);
        wait_dat(v, dat + 4 * REC5);
        gate_let_go(&g);
        while (stat_of(v).idx_bytes < 5 * 16) { /* its row is written */
            usleep(200);
        }
        if (behind) {
            put(v, 8, "later");
        }
        gate_let_go(&g);
        gate_let_go(&g);
        for (unsigned i = 0; i < 3; i++) {
            writer_join(&w[i]);
        }
        CHECK_EQ(w[0].rc, PV_ESYS);
        CHECK_EQ(w[0].err.d, 4 | 2);
        gate_done(&g);
        expect_text(v, 1, "older");
        expect_text(v, 9, "plain");
        CHECK_EQ(w[1].rc, 0);
        CHECK_EQ(w[2].rc, 0);
        expect_text(v, 2, "bbbbb");
        expect_text(v, 4, "ddddd");
        check_files(&p, v);
        close_and_drop(v);
        v = reopen(&p);
        expect_text(v, 1, "older");
        expect_text(v, 2, "bbbbb");
        expect_text(v, 4, "ddddd");
        expect_text(v, 9, "plain");
        if (behind) {
            expect_text(v, 8, "later");
        }
        close_and_drop(v);
        drop_place(&p);
    }
}

/* A row in the middle of a batch cannot be written: the whole batch fails, its rows and records are gone. */
static void test_batch_row_fails(void) {
    for (unsigned behind = 0; behind < 2; behind++) {
        place p = new_place();
        pv_vol *v = create(&p);
        gate g;
        writer w[5] = {0};
        gate_init(&g, 2);
        g.error = ENOSPC;
        writer_start(&w[0], v, 1, "aaaaa", PV_WRITE_FSYNC);
        gate_wait_held(&g);
        for (unsigned i = 1; i < 5; i++) {
            writer_start(&w[i], v, 1 + i, "bbbbb", PV_WRITE_FSYNC);
        }
        wait_dat(v, 8 + 5 * REC5);
        gate_let_go(&g);
        writer_join(&w[0]);
        CHECK_EQ(w[0].rc, 0);
        gate_wait_held(&g);
        if (behind) {
            put(v, 9, "plain");
        }
        pv__mutex_lock(&g.lock);
        g.fail_pwrite = g.pwrites + 3;
        pv__mutex_unlock(&g.lock);
        gate_let_go(&g);
        for (unsigned i = 1; i < 5; i++) {
            writer_join(&w[i]);
            CHECK_EQ(w[i].rc, PV_ESYS);
            CHECK_EQ(w[i].err.sys_errno, ENOSPC);
            CHECK_EQ(w[i].err.d, 2);
            CHECK_EQ(read_code(v, 1 + i, 0), PV_ENOTFOUND);
        }
        gate_done(&g);
        CHECK_EQ(file_len(p.idx), behind ? 32 : 16);
        check_files(&p, v);
        put(v, 2, "again");
        close_and_drop(v);
        v = reopen(&p);
        expect_text(v, 1, "aaaaa");
        expect_text(v, 2, "again");
        CHECK_EQ(read_code(v, 3, 0), PV_ENOTFOUND);
        if (behind) {
            expect_text(v, 9, "plain");
        }
        close_and_drop(v);
        drop_place(&p);
    }
}

/* No memory for the map entry of a flushed write: refused now and after a reload. */
static void test_flushed_map_fails(void) {
    unsigned refused = 0;
    int rc = PV_ENOMEM;
    for (long n = 1; rc < 0; n++) {
        place p = new_place();
        pv_vol *v = create(&p);
        pv_errinfo err;
        pv__alloc_fail_at(n);
        rc = write_flags(v, 1, "aaaaa", 5, PV_WRITE_FSYNC, &err);
        pv__alloc_fail_at(0);
        CHECK(rc == 0 || rc == PV_ENOMEM);
        refused += rc < 0;
        CHECK_EQ(read_code(v, 1, 0), rc == 0 ? 0 : PV_ENOTFOUND);
        check_files(&p, v);
        close_and_drop(v);
        v = reopen(&p);
        CHECK_EQ(read_code(v, 1, 0) == 0, rc == 0);
        close_and_drop(v);
        drop_place(&p);
    }
    CHECK(refused > 0);
}

/* A key with a pending record is taken: what comes after it in time comes after it in both files. */
static void test_key_order(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    gate g;
    writer w[4] = {0};
    gate_init(&g, 1);
    writer_start(&w[0], v, 1, "aaaaa", PV_WRITE_FSYNC);
    gate_wait_held(&g);
    uint64_t dat = stat_of(v).dat_bytes;
    writer_start(&w[1], v, 1, "plain", 0);
    w[2].deletes = true;
    w[3].deletes = false;
    put(v, 2, "other"); /* another key is not held up */
    usleep(2000);
    CHECK(!atomic_load(&w[1].done));
    CHECK_EQ(stat_of(v).dat_bytes, dat + REC5);
    CHECK_EQ(read_code(v, 1, 0), PV_ENOTFOUND);
    gate_let_go(&g);
    writer_join(&w[0]);
    writer_join(&w[1]);
    CHECK_EQ(w[1].rc, 0);
    expect_text(v, 1, "plain");

    pv__mutex_lock(&g.lock);
    g.hold_fd_calls = 1;
    pv__mutex_unlock(&g.lock);
    writer_start(&w[3], v, 1, "ccccc", PV_WRITE_FSYNC);
    gate_wait_held(&g);
    writer_start(&w[2], v, 1, "", 0); /* the delete */
    usleep(2000);
    CHECK(!atomic_load(&w[2].done));
    expect_text(v, 1, "plain");
    gate_let_go(&g);
    writer_join(&w[3]);
    writer_join(&w[2]);
    CHECK_EQ(read_code(v, 1, 0), PV_EDELETED);
    gate_done(&g);
    close_and_drop(v);
    v = reopen(&p);
    CHECK_EQ(read_code(v, 1, 0), PV_EDELETED);
    close_and_drop(v);
    drop_place(&p);
}

/* A flushed write of what is there already still waits for a flush; a sync takes pending writes along. */
static void test_flush_unchanged_and_sync(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    pv_errinfo err;
    put(v, 1, "aaaaa");
    gate g;
    gate_init(&g, 0);
    CHECK_EQ(write_flags(v, 1, "aaaaa", 5, PV_WRITE_FSYNC, &err), 0);
    CHECK_EQ(g.syncs, 1);
    g.fail_nth = 2;
    g.error = EIO;
    CHECK_EQ(write_flags(v, 1, "aaaaa", 5, PV_WRITE_FSYNC, &err), PV_ESYS);
    expect_text(v, 1, "aaaaa");
    CHECK_EQ(pv_vol_sync(v, &err), 0);
    CHECK_EQ(g.syncs, 4); /* .dat and .idx */
    g.fail_nth = 5;
    CHECK_EQ(pv_vol_sync(v, &err), PV_ESYS);
    CHECK_EQ(err.d, 0);
    g.fail_nth = 7;
    CHECK_EQ(pv_vol_sync(v, &err), PV_ESYS);
    CHECK_EQ(err.d, 1);
    gate_done(&g);
    CHECK_EQ(stat_of(v).flush_failed, 1);
    close_and_drop(v);

    /* A handle that is told of it trusts the page cache no more than the one before. */
    for (uint32_t flags = 0; flags <= PV_VOL_FLUSH_FAILED; flags += PV_VOL_FLUSH_FAILED) {
        pv_vol_opts o = opts_for(&p);
        o.flags = flags;
        v = open_with(&o);
        CHECK_EQ(stat_of(v).flush_failed, flags != 0);
        uint64_t before = stat_of(v).dat_bytes;
        CHECK_EQ(write_flags(v, 1, "aaaaa", 5, PV_WRITE_FSYNC, &err), 0);
        CHECK_EQ(stat_of(v).dat_bytes - before, flags != 0 ? REC5 : 0);
        CHECK_EQ(write_flags(v, 1, "aaaaa", 5, 0, &err), 0);
        CHECK_EQ(stat_of(v).dat_bytes - before, flags != 0 ? REC5 : 0);
        close_and_drop(v);
    }
    drop_place(&p);
}

/* ------------------------------------------------------------------ tests: states of a handle */

static void test_readonly(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    pv_errinfo err;
    int32_t size;
    pv_write_res res;
    put(v, 1, "data");
    CHECK_EQ(pv_vol_set_readonly(v, 1, 0), 0);
    CHECK_EQ(write_flags(v, 2, "x", 1, 0, &err), PV_EREADONLY);
    uint8_t blob[40] = {0};
    CHECK_EQ(pv_vol_write_blob(v, 2, 0, blob, 3, 0, NULL, &res, &err), PV_EREADONLY);
    CHECK(del(v, 1) > 0);
    CHECK_EQ(pv_vol_set_readonly(v, 1, 1), 0);
    CHECK_EQ(pv_vol_delete(v, 1, 0, 0, 0, NULL, &size, &res, &err), PV_EREADONLY);
    CHECK_EQ(pv_vol_set_readonly(v, 0, 0), 0);
    put(v, 1, "data again");
    close_and_drop(v);

    const uint32_t flags[] = {PV_VOL_DAT_READONLY, PV_VOL_IDX_READONLY, PV_VOL_NO_DELETE};
    for (size_t i = 0; i < PV__ARRAY_LEN(flags); i++) {
        pv_vol_opts o = opts_for(&p);
        o.flags = flags[i];
        v = open_with(&o);
        CHECK_EQ(stat_of(v).no_write, 1);
        CHECK_EQ(stat_of(v).no_delete, 1);
        CHECK_EQ(write_flags(v, 2, "x", 1, 0, &err), PV_EREADONLY);
        CHECK_EQ(pv_vol_delete(v, 1, 0, 0, 0, NULL, &size, &res, &err), PV_EREADONLY);
        expect_text(v, 1, "data again");
        CHECK_EQ(pv_vol_sync(v, &err), 0);
        CHECK_EQ(pv_vol_set_readonly(v, 0, 0), i < 2 ? PV_EREADONLY : 0);
        close_and_drop(v);
    }
    pv_vol_opts o = opts_for(&p);
    o.flags = PV_VOL_NO_WRITE;
    v = open_with(&o);
    CHECK_EQ(write_flags(v, 2, "x", 1, 0, &err), PV_EREADONLY);
    CHECK(del(v, 1) > 0);
    close_and_drop(v);
    drop_place(&p);
}

static void test_no_map(void) {
    place p = new_place();
    pv_vol_opts o = opts_for(&p);
    o.flags = PV_VOL_CREATE | PV_VOL_NO_MAP;
    pv_vol *v = open_with(&o);
    pv_errinfo err;
    pv_write_res res;
    pv_read r;
    pv_entry e;
    pv_needle n = needle(1, "first", 5);
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_CHECK_COOKIE, NULL, &res, &err), 0); /* no entry: absent */
    pv_entry known = {.offset = res.offset, .size = res.size};
    CHECK_EQ(pv_vol_lookup(v, 1, &e), PV_EINVAL);
    CHECK_EQ(pv_vol_visit(v, 0, NULL, 0), PV_EINVAL);
    CHECK_EQ(pv_vol_read(v, 1, 0, NULL, &r, &err), PV_EINVAL);
    CHECK_EQ(pv_vol_read(v, 1, PV_READ_ENTRY, &known, &r, &err), 0);
    CHECK_MEM(r.n.data, "first", 5);
    pv_read_free(&r);
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_CHECK_COOKIE | PV_WRITE_ENTRY, &known, &res, &err), 0);
    CHECK_EQ(res.unchanged, 1);
    n.cookie = 5;
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_CHECK_COOKIE | PV_WRITE_ENTRY, &known, &res, &err), PV_ECOOKIE);
    n.cookie = COOKIE;
    n.data = (const uint8_t *)"again";
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_ENTRY | PV_WRITE_FSYNC, &known, &res, &err), 0);
    known = (pv_entry){.offset = res.offset, .size = res.size};
    known.revision = 1;
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_ENTRY, &known, &res, &err), PV_ESTALE);
    CHECK_EQ(pv_vol_read(v, 1, PV_READ_ENTRY, &known, &r, &err), PV_ESTALE);
    known.revision = 0;
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_ENTRY, NULL, &res, &err), PV_EINVAL);
    int32_t size;
    CHECK_EQ(pv_vol_delete(v, 1, COOKIE, 0, PV_WRITE_ENTRY, &known, &size, &res, &err), 0);
    CHECK_EQ(size, known.size);
    known.size = -known.size;
    CHECK_EQ(pv_vol_delete(v, 1, COOKIE, 0, PV_WRITE_ENTRY, &known, &size, &res, &err), 0);
    CHECK_EQ(size, -1);
    CHECK_EQ(stat_of(v).file_count, 2); /* counted from the entries given, also without a map */
    CHECK_EQ(stat_of(v).deleted_count, 2);
    CHECK_EQ(stat_of(v).deleted_bytes, stat_of(v).file_bytes);
    CHECK_EQ(stat_of(v).max_key, 1);
    known = (pv_entry){.revision = 1};
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_ENTRY, &known, &res, &err), PV_ESTALE); /* absent, of another revision */
    CHECK_EQ(pv_vol_delete(v, 7, COOKIE, 0, PV_WRITE_ENTRY, &known, &size, &res, &err), PV_ESTALE);
    uint64_t rows = 0;
    uint32_t revision = 9;
    CHECK_EQ(pv_vol_settled_rows(v, &rows, &revision), 0);
    CHECK_EQ(rows, 3);
    CHECK_EQ(revision, 0);
    const pv_map_stats figures = {.file_count = 10, .file_bytes = 1000, .deleted_count = 3, .max_key = 77};
    CHECK_EQ(pv_vol_set_figures(v, &figures), 0);
    n.id = 5;
    known.revision = 0;
    CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_ENTRY, &known, &res, &err), 0);
    CHECK_EQ(stat_of(v).file_count, 11);
    CHECK_EQ(stat_of(v).file_bytes, 1000 + (uint64_t)res.size);
    CHECK_EQ(stat_of(v).deleted_count, 3);
    CHECK_EQ(stat_of(v).max_key, 77);
    known = (pv_entry){.offset = res.offset, .size = 0}; /* an empty one is a file, but nothing is deleted with it */
    CHECK_EQ(pv_vol_delete(v, 5, COOKIE, 0, PV_WRITE_ENTRY, &known, &size, &res, &err), 0);
    CHECK_EQ(size, 0);
    CHECK_EQ(stat_of(v).deleted_count, 3);
    CHECK_EQ(pv_vol_close(v, &err), 0);
    CHECK_EQ(stat_of(v).file_count, 11);
    CHECK_EQ(pv_vol_set_figures(v, &figures), PV_ECLOSED);
    CHECK_EQ(pv_vol_settled_rows(v, &rows, &revision), PV_ECLOSED);
    close_and_drop(v);
    v = reopen(&p); /* the rows are there all the same */
    CHECK_EQ(pv_vol_set_figures(v, &figures), PV_EINVAL);
    CHECK_EQ(stat_of(v).file_count, 3);
    CHECK_EQ(read_code(v, 1, 0), PV_EDELETED);
    close_and_drop(v);
    drop_place(&p);
}

static void test_visit(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    for (uint64_t id = 10; id > 0; id--) {
        put(v, id, "x");
    }
    CHECK(del(v, 4) > 0);
    pv_idx_row rows[20];
    CHECK_EQ(pv_vol_visit(v, 3, rows, 20), 8);
    for (unsigned i = 0; i < 8; i++) {
        CHECK_EQ(rows[i].key, 3 + i);
        CHECK_EQ(rows[i].size < 0, rows[i].key == 4);
    }
    CHECK_EQ(pv_vol_visit(v, 3, rows, 2), 2);
    CHECK_EQ(pv_vol_visit(v, 11, rows, 2), 0);
    close_and_drop(v);
    drop_place(&p);
}

static void *close_main(void *arg) {
    writer *w = arg;
    w->rc = pv_vol_close(w->v, &w->err);
    atomic_store(&w->done, true);
    return NULL;
}

static void test_close(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    put(v, 1, "data");
    uint64_t dat = stat_of(v).dat_bytes;
    gate g;
    writer w = {.id = 2, .text = "aaaaa", .flags = PV_WRITE_FSYNC};
    writer c[2] = {{.v = v}, {.v = v}};
    gate_init(&g, 1);
    writer_start(&w, v, 2, "aaaaa", PV_WRITE_FSYNC);
    gate_wait_held(&g);
    CHECK(pthread_create(&c[0].thread, NULL, close_main, &c[0]) == 0);
    pv_errinfo err;
    while (read_code(v, 1, 0) != PV_ECLOSED) {
        usleep(100);
    }
    CHECK(!atomic_load(&c[0].done)); /* waits for the write */
    CHECK(pthread_create(&c[1].thread, NULL, close_main, &c[1]) == 0);
    CHECK_EQ(write_flags(v, 3, "x", 1, 0, &err), PV_ECLOSED);
    gate_let_go(&g);
    writer_join(&w);
    CHECK_EQ(w.rc, 0);
    writer_join(&c[0]);
    writer_join(&c[1]);
    CHECK_EQ(c[0].rc, 0);
    CHECK_EQ(c[1].rc, 0);
    gate_done(&g);

    pv_entry e;
    pv_idx_row row;
    uint8_t byte;
    int32_t size;
    pv_write_res res;
    CHECK_EQ(pv_vol_close(v, &err), 0);
    CHECK_EQ(read_code(v, 1, 0), PV_ECLOSED);
    CHECK_EQ(pv_vol_lookup(v, 1, &e), PV_ECLOSED);
    CHECK_EQ(pv_vol_visit(v, 1, &row, 1), PV_ECLOSED);
    CHECK_EQ(pv_vol_pread(v, 0, &byte, 1, 0, &err), PV_ECLOSED);
    CHECK_EQ(pv_vol_sync(v, &err), PV_ECLOSED);
    CHECK_EQ(pv_vol_set_readonly(v, 0, 0), PV_ECLOSED);
    CHECK_EQ(pv_vol_delete(v, 1, 0, 0, 0, NULL, &size, &res, &err), PV_ECLOSED);
    CHECK_EQ(pv_vol_write_blob(v, 1, 0, &byte, 1, 0, NULL, &res, &err), PV_ECLOSED);
    pv_vol_stats s = stat_of(v);
    CHECK_EQ(s.closed, 1);
    CHECK_EQ(s.file_count, 2);
    CHECK_EQ(s.dat_bytes, dat + REC5);
    CHECK_EQ(s.vid, 7);
    pv_superblock sb;
    pv_vol_superblock(v, &sb);
    CHECK_EQ(sb.version, 3);
    pv_vol_unref(v);

    /* a sync that fails at the end is told, and the handle is closed all the same */
    v = reopen(&p);
    fault f;
    fail_next(&f, PV__IO_DATASYNC, EIO);
    CHECK_EQ(pv_vol_close(v, &err), PV_ESYS);
    CHECK_EQ(err.d, 1);
    no_faults();
    CHECK_EQ(read_code(v, 1, 0), PV_ECLOSED);
    pv_vol_unref(v);
    drop_place(&p);
}

/* ------------------------------------------------------------------ tests: registry */

static void test_registry(void) {
    place p = new_place();
    pv_vol *v = create(&p);
    put(v, 1, "data");
    pv_reg *r;
    CHECK_EQ(pv_reg_new(&r), 0);
    CHECK(pv_reg_acquire(r, 1) == NULL);
    CHECK_EQ(pv_reg_withdraw(r, 1), PV_ENOTFOUND);
    CHECK_EQ(pv_reg_publish(r, 1, NULL), PV_EINVAL);
    CHECK_EQ(pv_reg_publish(r, 1, v), 0);
    CHECK_EQ(pv_reg_publish(r, 1, v), PV_EEXISTS);
    pv_vol *again = pv_reg_acquire(r, 1);
    CHECK(again == v);

    /* against a plain list, through growth and removal */
    bool held[3000] = {false};
    held[1] = true;
    uint64_t seed = 5;
    int count = 1;
    for (unsigned i = 0; i < 20000; i++) {
        uint32_t vid = (uint32_t)t_rand_below(&seed, 3000);
        uint32_t key = vid < 1500 ? vid : 0xffffffffU - vid * 64U; /* rising ones, and ones that collide */
        if (vid == 1) {
            continue;
        }
        if (t_rand_below(&seed, 3) == 0) {
            CHECK_EQ(pv_reg_withdraw(r, key), held[vid] ? 0 : PV_ENOTFOUND);
            count -= held[vid];
            held[vid] = false;
        } else {
            CHECK_EQ(pv_reg_publish(r, key, v), held[vid] ? PV_EEXISTS : 0);
            count += !held[vid];
            held[vid] = true;
        }
        CHECK_EQ(pv_reg_count(r), count);
    }
    for (uint32_t vid = 0; vid < 3000; vid++) {
        pv_vol *got = pv_reg_acquire(r, vid < 1500 ? vid : 0xffffffffU - vid * 64U);
        CHECK_EQ(got != NULL, held[vid]);
        pv_vol_unref(got);
    }
    pv__alloc_fail_at(1); /* no room to grow: nothing is lost */
    for (uint32_t vid = 10000; pv__alloc_fail_at(1) == 1; vid++) {
        int rc = pv_reg_publish(r, vid, v);
        CHECK(rc == 0 || rc == PV_ENOMEM);
        if (rc == PV_ENOMEM) {
            break;
        }
    }
    pv__alloc_fail_at(0);
    CHECK(held[2] == (pv_reg_withdraw(r, 2) == 0));

    pv_vol_unref(v); /* the registry's and our second reference keep it open */
    expect_text(again, 1, "data");
    pv_reg_free(r);
    expect_text(again, 1, "data");
    pv_vol_unref(again);
    pv_reg_free(NULL);
    drop_place(&p);
}

int main(void) {
    RUN(test_layout);
    RUN(test_versions);
    RUN(test_open_errors);
    RUN(test_remote);
    RUN(test_odd_length);
    RUN(test_read_damage);
    RUN(test_size_mismatch_width5);
    RUN(test_wrapped);
    RUN(test_meta_only);
    RUN(test_eio_count);
    RUN(test_unchanged_and_cookies);
    RUN(test_append_time);
    RUN(test_limit);
    RUN(test_bad_arguments);
    RUN(test_blob);
    RUN(test_blob_versions);
    RUN(test_append_rollback);
    RUN(test_rollback_fails);
    RUN(test_preallocation);
    RUN(test_fail_nth);
    RUN(test_many_is_as_single);
    RUN(test_many_leaves_to_the_caller);
    RUN(test_delete_texts);
    RUN(test_open_fails_nth);
    RUN(test_group_commit);
    RUN(test_flush_fails);
    RUN(test_orphan);
    RUN(test_unordered_rows);
    RUN(test_index_flush_fails);
    RUN(test_batch_row_fails);
    RUN(test_flushed_map_fails);
    RUN(test_key_order);
    RUN(test_flush_unchanged_and_sync);
    RUN(test_readonly);
    RUN(test_no_map);
    RUN(test_visit);
    RUN(test_close);
    RUN(test_registry);
    return T_END();
}
