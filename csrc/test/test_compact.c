/* Vacuum: what is kept, what is dropped, writers meanwhile, the swap, and every I/O call failing once. */
#include "t.h"

#include <stdatomic.h>

#define PATH_LEN 256
#define KEYS 600
#define THREADS 3

typedef struct place {
    char dir[PATH_LEN];
    char dat[PATH_LEN + 8];
    char idx[PATH_LEN + 8];
    char cpd[PATH_LEN + 8];
    char cpx[PATH_LEN + 8];
    char cpc[PATH_LEN + 8];
} place;

static place new_place(void) {
    place p;
    const char *tmp = getenv("TMPDIR");
    snprintf(p.dir, sizeof p.dir, "%s/pv-compact-XXXXXX", tmp != NULL ? tmp : "/tmp");
    CHECK(mkdtemp(p.dir) != NULL);
    snprintf(p.dat, sizeof p.dat, "%s/7.dat", p.dir);
    snprintf(p.idx, sizeof p.idx, "%s/7.idx", p.dir);
    snprintf(p.cpd, sizeof p.cpd, "%s/7.cpd", p.dir);
    snprintf(p.cpx, sizeof p.cpx, "%s/7.cpx", p.dir);
    snprintf(p.cpc, sizeof p.cpc, "%s/7.cpc", p.dir);
    return p;
}

static void drop_place(const place *p) {
    unlink(p->dat);
    unlink(p->idx);
    unlink(p->cpd);
    unlink(p->cpx);
    unlink(p->cpc);
    CHECK(rmdir(p->dir) == 0);
}

static pv_vol *open_vol(const place *p, uint32_t flags, uint8_t width) {
    pv_vol_opts o = {.dat_path = p->dat, .idx_path = p->idx, .vid = 7, .offset_width = width, .flags = flags};
    o.superblock.version = 3;
    pv_vol *v;
    pv_errinfo err;
    CHECK_EQ(pv_vol_open(&o, &v, &err), 0);
    return v;
}

/* What a key holds in a version: a length and bytes that follow from both. Version 0: nothing. */
static size_t fill(uint8_t *buf, uint64_t key, uint32_t version) {
    size_t len = 1 + (size_t)((key * 37 + version * 101) % 900);
    for (size_t i = 0; i < len; i++) {
        buf[i] = (uint8_t)(key + version * 7 + i);
    }
    return len;
}

static void put(pv_vol *v, uint64_t key, uint32_t version, uint32_t flags) {
    uint8_t buf[1024];
    pv_needle n = {.id = key, .cookie = 0x1234, .data = buf, .flags = PV_F_MTIME, .last_modified_s = 1700000000};
    n.data_size = (uint32_t)fill(buf, key, version);
    pv_write_res res;
    pv_errinfo err;
    CHECK_EQ(pv_vol_write(v, &n, flags, NULL, &res, &err), 0);
}

static void del(pv_vol *v, uint64_t key) {
    int32_t size;
    pv_write_res res;
    pv_errinfo err;
    CHECK_EQ(pv_vol_delete(v, key, 0x1234, 0, 0, NULL, &size, &res, &err), 0);
}

static void check_key(pv_vol *v, uint64_t key, uint32_t version) {
    uint8_t want[1024];
    pv_read r;
    pv_errinfo err;
    int rc = pv_vol_read(v, key, 0, NULL, &r, &err);
    if (version == 0) {
        CHECK(rc == PV_ENOTFOUND || rc == PV_EDELETED);
        return;
    }
    CHECK_EQ(rc, 0);
    size_t len = fill(want, key, version);
    CHECK_EQ(r.n.data_size, len);
    CHECK_MEM(r.n.data, want, len);
    CHECK_EQ(r.n.cookie, 0x1234);
    pv_read_free(&r);
}

static void check_all(pv_vol *v, const uint32_t *versions) {
    for (uint64_t k = 1; k <= KEYS; k++) {
        check_key(v, k, versions[k]);
    }
}

/* Writes in a shuffled order, with overwrites and deletes. */
static void populate(pv_vol *v, uint32_t *versions, uint64_t seed) {
    memset(versions, 0, (KEYS + 1) * sizeof *versions);
    for (int i = 0; i < KEYS * 3; i++) {
        uint64_t k = 1 + t_rand_below(&seed, KEYS);
        if (versions[k] != 0 && t_rand_below(&seed, 3) == 0) {
            del(v, k);
            versions[k] = 0;
        } else {
            versions[k] = (uint32_t)i + 1;
            put(v, k, versions[k], 0);
        }
    }
}

static pv_compact_opts opts_for(const place *p, pv_vol *v) {
    pv_compact_opts o = {.cpd_path = p->cpd, .cpx_path = p->cpx, .now_s = 1800000000};
    pv_vol_superblock(v, &o.superblock);
    o.superblock.compaction_revision++;
    return o;
}

static int run_compact(const place *p, pv_vol *v, pv_compact **out, pv_errinfo *err) {
    pv_compact_opts o = opts_for(p, v);
    int rc = pv_compact_begin(v, &o, out, err);
    while (rc == 0 || rc == 1) {
        rc = pv_compact_step(*out, 10000, err);
        if (rc == 0) {
            return pv_compact_finish(*out, err);
        }
    }
    return rc;
}

static int commit(const place *p, pv_compact *c, pv_errinfo *err) {
    const pv_compact_names n = {.cpd_path = p->cpd,
                                .dat_path = p->dat,
                                .cpx_path = p->cpx,
                                .idx_path = p->idx,
                                .cpc_path = p->cpc,
                                .dat_dir = p->dir,
                                .idx_dir = p->dir};
    return pv_compact_commit(c, &n, err);
}

static void compact_keeps_just_what_is_live_of_width(uint8_t width) {
    place p = new_place();
    uint32_t versions[KEYS + 1];
    pv_errinfo err;
    pv_vol *v = open_vol(&p, PV_VOL_CREATE, width);
    populate(v, versions, 11);
    pv_vol_stats before;
    CHECK_EQ(pv_vol_stat(v, &before), 0);
    pv_compact *c;
    CHECK_EQ(run_compact(&p, v, &c, &err), 0);
    /* between copy and commit: a new version, a delete, a new key, an empty file */
    put(v, 5, 9001, 0);
    versions[5] = 9001;
    del(v, 6);
    versions[6] = 0;
    put(v, KEYS, 9002, PV_WRITE_FSYNC);
    versions[KEYS] = 9002;
    CHECK_EQ(commit(&p, c, &err), 0);
    pv_compact_stats cs;
    pv_compact_stat(c, &cs);
    CHECK_EQ(cs.caught_up_rows, 3);
    CHECK_EQ(cs.dropped_needles, 0);
    pv_compact_free(c);
    CHECK(access(p.cpc, F_OK) == 0);
    CHECK(access(p.cpd, F_OK) != 0);
    CHECK(access(p.cpx, F_OK) != 0);
    check_all(v, versions);
    pv_vol_stats after;
    CHECK_EQ(pv_vol_stat(v, &after), 0);
    CHECK(after.dat_bytes < before.dat_bytes);
    CHECK_EQ(after.compaction_revision, 1);
    /* writes go on in the new files */
    put(v, 7, 9003, 0);
    versions[7] = 9003;
    check_all(v, versions);
    CHECK_EQ(pv_vol_close(v, &err), 0);
    pv_vol_unref(v);
    v = open_vol(&p, 0, width);
    check_all(v, versions);
    /* rows ascend by key up to the catch-up */
    int fd = open(p.idx, O_RDONLY | O_CLOEXEC);
    pv_idx_row rows[KEYS];
    int n = pv_idx_read(fd, width, 0, rows, KEYS, &err);
    CHECK(n > 10);
    for (int i = 1; i < n && (uint64_t)i < cs.new_idx_rows - 3; i++) {
        CHECK(rows[i - 1].key < rows[i].key);
    }
    close(fd);
    pv_vol_unref(v);
    drop_place(&p);
}

static void compact_keeps_just_what_is_live(void) {
    compact_keeps_just_what_is_live_of_width(4);
    compact_keeps_just_what_is_live_of_width(5);
}

static void an_empty_volume_and_one_without_changes_can_be_compacted(void) {
    place p = new_place();
    pv_errinfo err;
    pv_compact *c;
    pv_vol *v = open_vol(&p, PV_VOL_CREATE, 4);
    for (int i = 1; i <= 2; i++) {
        CHECK_EQ(run_compact(&p, v, &c, &err), 0);
        CHECK_EQ(commit(&p, c, &err), 0);
        pv_compact_free(c);
        pv_vol_stats s;
        CHECK_EQ(pv_vol_stat(v, &s), 0);
        CHECK_EQ(s.compaction_revision, i);
        CHECK_EQ(s.dat_bytes, PV_SUPERBLOCK);
    }
    put(v, 1, 1, 0);
    check_key(v, 1, 1);
    pv_vol_unref(v);
    drop_place(&p);
}

static void a_damaged_record_is_left_behind_and_told(void) {
    place p = new_place();
    pv_errinfo err;
    pv_compact *c;
    pv_vol *v = open_vol(&p, PV_VOL_CREATE, 4);
    put(v, 1, 1, 0);
    put(v, 2, 1, 0);
    put(v, 3, 1, 0);
    pv_entry e;
    CHECK_EQ(pv_vol_lookup(v, 2, &e), 0);
    int fd = open(p.dat, O_RDWR | O_CLOEXEC);
    uint8_t x = 0xff;
    CHECK(pwrite(fd, &x, 1, (off_t)(e.offset + PV_NEEDLE_HEADER + 4)) == 1);
    close(fd);
    CHECK_EQ(run_compact(&p, v, &c, &err), 0);
    pv_compact_stats s;
    pv_compact_stat(c, &s);
    CHECK_EQ(s.dropped_needles, 1);
    CHECK_EQ(s.first_dropped_key, 2);
    CHECK_EQ(s.first_dropped_code, PV_ECRC);
    CHECK_EQ(commit(&p, c, &err), 0);
    pv_compact_free(c);
    check_key(v, 1, 1);
    check_key(v, 2, 0);
    check_key(v, 3, 1);
    pv_vol_unref(v);
    drop_place(&p);
}

static void a_ttl_needle_stays_until_it_expires(void) {
    place p = new_place();
    pv_errinfo err;
    pv_vol *v = open_vol(&p, PV_VOL_CREATE, 4);
    uint8_t data[4] = {1, 2, 3, 4};
    uint64_t appended_s = 0;
    for (uint64_t k = 1; k <= 2; k++) { /* one minute, one year */
        pv_needle n = {.id = k, .cookie = 1, .data = data, .data_size = 4, .flags = PV_F_MTIME | PV_F_TTL};
        n.ttl_count = 1;
        n.ttl_unit = k == 1 ? 1 : 6;
        n.last_modified_s = 1;
        pv_write_res res;
        CHECK_EQ(pv_vol_write(v, &n, 0, NULL, &res, &err), 0);
        appended_s = res.append_at_ns / 1000000000U;
    }
    pv_compact *c;
    pv_compact_opts o = opts_for(&p, v);
    o.now_s = appended_s + 61;
    CHECK_EQ(pv_compact_begin(v, &o, &c, &err), 0);
    CHECK_EQ(pv_compact_step(c, 1 << 20, &err), 0);
    CHECK_EQ(pv_compact_finish(c, &err), 0);
    pv_compact_stats s;
    pv_compact_stat(c, &s);
    CHECK_EQ(s.expired_needles, 1);
    CHECK_EQ(s.copied_needles, 1);
    CHECK_EQ(commit(&p, c, &err), 0);
    pv_compact_free(c);
    pv_entry e;
    CHECK_EQ(pv_vol_lookup(v, 1, &e), PV_ENOTFOUND);
    CHECK_EQ(pv_vol_lookup(v, 2, &e), 0);
    pv_vol_unref(v);
    drop_place(&p);
}

static void only_the_first_of_two_vacuums_commits(void) {
    place p = new_place();
    place q = new_place();
    pv_errinfo err;
    pv_compact *first;
    pv_compact *second;
    pv_vol *v = open_vol(&p, PV_VOL_CREATE, 4);
    put(v, 1, 1, 0);
    CHECK_EQ(run_compact(&p, v, &first, &err), 0);
    place r = p;
    memcpy(r.cpd, q.cpd, sizeof r.cpd);
    memcpy(r.cpx, q.cpx, sizeof r.cpx);
    CHECK_EQ(run_compact(&r, v, &second, &err), 0);
    CHECK_EQ(commit(&p, first, &err), 0);
    CHECK_EQ(commit(&r, second, &err), PV_ESTALE);
    pv_compact_free(first);
    pv_compact_free(second);
    check_key(v, 1, 1);
    pv_vol_unref(v);
    drop_place(&p);
    drop_place(&q);
}

/* ------------------------------------------------------------------ writers and readers meanwhile */

typedef struct worker {
    pv_vol *v;
    uint64_t first_key;
    uint32_t versions[KEYS];
    atomic_bool *stop;
    uint64_t seed;
    unsigned long ops;
} worker;

/* Deletes a run of keys from the ith on as a batch; what is gone already is left out by it. */
static void delete_run(worker *w, uint64_t i) {
    pv_delete items[24];
    size_t n = 0;
    memset(items, 0, sizeof items);
    for (; n < sizeof items / sizeof items[0] && i + n < KEYS; n++) {
        items[n] = (pv_delete){.id = w->first_key + i + n, .cookie = 0x1234, .ok = 1};
    }
    for (size_t at = 0; at < n;) {
        int rc = pv_vol_delete_many(w->v, items + at, n - at, 0, NULL);
        CHECK(rc >= 0);
        CHECK_EQ(rc > 0, w->versions[i + at] != 0);
        for (int k = 0; k < rc; k++, at++) {
            CHECK(items[at].size > 0 && w->versions[i + at] != 0);
            w->versions[i + at] = 0;
        }
        at += rc == 0;
    }
}

static void *work(void *arg) {
    worker *w = arg;
    while (!atomic_load(w->stop)) {
        uint64_t i = t_rand_below(&w->seed, KEYS);
        uint64_t key = w->first_key + i;
        if (t_rand_below(&w->seed, 40) == 0) {
            delete_run(w, i);
            continue;
        }
        switch (t_rand_below(&w->seed, 5)) {
        case 0:
            if (w->versions[i] != 0) {
                del(w->v, key);
                w->versions[i] = 0;
                break;
            }
            /* fall through */
        case 1:
        case 2:
            w->versions[i] = (uint32_t)++w->ops;
            put(w->v, key, w->versions[i], t_rand_below(&w->seed, 50) == 0 ? PV_WRITE_FSYNC : 0);
            break;
        default:
            check_key(w->v, key, w->versions[i]);
        }
    }
    return NULL;
}

static void writers_and_readers_run_through_vacuums(void) {
    place p = new_place();
    pv_errinfo err;
    pv_vol *v = open_vol(&p, PV_VOL_CREATE, 4);
    static worker w[THREADS];
    pthread_t threads[THREADS];
    atomic_bool stop = false;
    for (int i = 0; i < THREADS; i++) {
        w[i] = (worker){.v = v, .first_key = 1 + (uint64_t)i * KEYS, .stop = &stop, .seed = (uint64_t)i + 1};
        CHECK(pthread_create(&threads[i], NULL, work, &w[i]) == 0);
    }
    for (int round = 0; round < 12; round++) {
        pv_compact *c;
        CHECK_EQ(run_compact(&p, v, &c, &err), 0);
        CHECK_EQ(commit(&p, c, &err), 0);
        pv_compact_free(c);
        CHECK(unlink(p.cpc) == 0);
    }
    atomic_store(&stop, true);
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    for (int again = 0; again < 2; again++) {
        for (int i = 0; i < THREADS; i++) {
            for (uint64_t k = 0; k < KEYS; k++) {
                check_key(v, w[i].first_key + k, w[i].versions[k]);
            }
        }
        pv_vol_unref(v);
        v = again == 0 ? open_vol(&p, 0, 4) : NULL;
    }
    drop_place(&p);
}

/* ------------------------------------------------------------------ faults */

typedef struct fault {
    long countdown;
    bool fired;
} fault;

static int fail_once(void *ctx, const pv__io_event *ev, size_t *len) {
    fault *f = ctx;
    (void)len;
    if (ev->op == PV__IO_CLOSE || f->countdown <= 0) {
        return 0;
    }
    if (--f->countdown == 0) {
        f->fired = true;
        return ev->op == PV__IO_PWRITE ? ENOSPC : EIO;
    }
    return 0;
}

/* What a loader does with what it finds (storage.md 17). */
static void recover(const place *p) {
    if (access(p->cpc, F_OK) == 0) {
        if (access(p->cpd, F_OK) == 0) {
            CHECK(rename(p->cpd, p->dat) == 0);
        }
        if (access(p->cpx, F_OK) == 0) {
            CHECK(rename(p->cpx, p->idx) == 0);
        }
        CHECK(unlink(p->cpc) == 0);
    }
    unlink(p->cpd);
    unlink(p->cpx);
}

static void every_failing_call_leaves_a_whole_volume(void) {
    for (long nth = 1;; nth++) {
        place p = new_place();
        uint32_t versions[KEYS + 1];
        pv_errinfo err;
        pv_vol *v = open_vol(&p, PV_VOL_CREATE, 4);
        memset(versions, 0, sizeof versions);
        for (uint64_t k = 1; k <= 40; k++) {
            versions[k] = (uint32_t)k;
            put(v, k, versions[k], 0);
        }
        del(v, 3);
        versions[3] = 0;
        fault f = {.countdown = nth};
        pv_compact *c = NULL;
        pv__io_set_hook(fail_once, &f);
        int rc = run_compact(&p, v, &c, &err);
        if (rc == 0) {
            pv__io_set_hook(NULL, NULL);
            put(v, 4, 77, 0);
            versions[4] = 77;
            del(v, 5);
            versions[5] = 0;
            pv__io_set_hook(fail_once, &f);
            rc = commit(&p, c, &err);
        }
        pv__io_set_hook(NULL, NULL);
        CHECK(f.fired || rc == 0);
        CHECK(rc == 0 || err.code == PV_ESYS || err.code == PV_EEOF);
        pv_compact_free(c);
        check_all(v, versions);
        put(v, 8, 88, 0); /* still writable */
        versions[8] = 88;
        check_all(v, versions);
        CHECK_EQ(pv_vol_close(v, &err), 0);
        pv_vol_unref(v);
        recover(&p);
        v = open_vol(&p, 0, 4);
        check_all(v, versions);
        pv_vol_unref(v);
        drop_place(&p);
        if (!f.fired) {
            printf("     %ld calls\n", nth - 1);
            CHECK(nth > 15);
            return;
        }
    }
}

/* The marker is made, but not surely: its flush fails, and so does the way back. */
typedef struct marker_fault {
    enum pv__io_op way_back;
    bool is_made;
    bool flush_failed;
} marker_fault;

static int fail_marker(void *ctx, const pv__io_event *ev, size_t *len) {
    marker_fault *f = ctx;
    (void)len;
    if (ev->op == PV__IO_OPEN && strstr(ev->path, ".cpc") != NULL) {
        f->is_made = true;
        return f->way_back == PV__IO_OPEN ? ENOSPC : 0;
    }
    if (f->is_made && !f->flush_failed && ev->op == PV__IO_SYNC) {
        f->flush_failed = true;
        return EIO;
    }
    return f->flush_failed && ev->op == f->way_back ? EIO : 0;
}

static void no_change_behind_a_marker_that_may_be_on_the_disk(void) {
    const enum pv__io_op ways[] = {PV__IO_UNLINK, PV__IO_SYNC_DIR, PV__IO_OPEN};
    for (size_t i = 0; i < PV__ARRAY_LEN(ways); i++) {
        bool left = ways[i] != PV__IO_OPEN; /* else there is none, and its absence is no trouble */
        place p = new_place();
        pv_errinfo err;
        pv_vol *v = open_vol(&p, PV_VOL_CREATE, 4);
        put(v, 1, 1, 0);
        put(v, 2, 2, 0);
        pv_compact *c;
        CHECK_EQ(run_compact(&p, v, &c, &err), 0);
        marker_fault f = {.way_back = ways[i]};
        pv__io_set_hook(fail_marker, &f);
        CHECK_EQ(commit(&p, c, &err), PV_ESYS);
        pv__io_set_hook(NULL, NULL);
        pv_compact_stats stats;
        pv_compact_stat(c, &stats);
        CHECK_EQ(stats.marker_left, left);
        pv_compact_free(c);
        const pv_needle n = {.id = 3, .cookie = 1, .data = (const uint8_t *)"late", .data_size = 4};
        pv_write_res res;
        CHECK_EQ(pv_vol_write(v, &n, PV_WRITE_FSYNC, NULL, &res, &err), left ? PV_EREADONLY : 0);
        int32_t size;
        CHECK_EQ(pv_vol_delete(v, 1, 0x1234, 0, 0, NULL, &size, &res, &err), left ? PV_EREADONLY : 0);
        check_key(v, 2, 2);
        unlink(p.cpd);
        unlink(p.cpx);
        unlink(p.cpc);
        CHECK_EQ(pv_vol_set_readonly(v, 0, 0), 0);
        put(v, 4, 4, PV_WRITE_FSYNC);
        pv_vol_unref(v);
        drop_place(&p);
    }
}

int main(void) {
    RUN(compact_keeps_just_what_is_live);
    RUN(an_empty_volume_and_one_without_changes_can_be_compacted);
    RUN(a_damaged_record_is_left_behind_and_told);
    RUN(a_ttl_needle_stays_until_it_expires);
    RUN(only_the_first_of_two_vacuums_commits);
    RUN(writers_and_readers_run_through_vacuums);
    RUN(every_failing_call_leaves_a_whole_volume);
    RUN(no_change_behind_a_marker_that_may_be_on_the_disk);
    return T_END();
}
