/* Threads against one volume: writes, overwrites, deletes, flushed and not, reads, visits, figures, flushes, switches,
 * failing operations, and closing under all of them. Contents are checked on every read, the final state after a reload.
 * Meant for ThreadSanitizer; STRESS_S=seconds (default 2), STRESS_SEED=n. */
#include "t.h"

#include <stdatomic.h>
#include <time.h>

#define OWNERS 4 /* threads that write keys of their own, and know what must be there */
#define OWN_KEYS 40U
#define SHARED_KEYS 10U /* keys that all writers write */
#define SHARED_BASE 100000U
#define COOKIE 77U
#define LEN_MAX 5000U
#define BIG_LEN (PV_META_ONLY_ABOVE + 100U)
#define HEAD 24U /* key, sequence number, length: the rest of the data follows from them */

typedef struct own {
    uint64_t seq; /* 0: never written */
    size_t len;
    bool live;
} own;

typedef struct shared {
    pv_vol *v;
    pv_reg *reg;
    _Atomic bool stop;
    bool with_faults;     /* the disk of this run fails for some time */
    _Atomic bool failing; /* operations fail now and then: errors are expected */
    _Atomic uint64_t reads;
    _Atomic uint64_t writes;
    _Atomic uint64_t refused;
} shared;

typedef struct worker {
    pthread_t thread;
    shared *s;
    uint64_t seed;
    uint64_t first_key;
    own keys[OWN_KEYS];
} worker;

static void fill(uint8_t *p, uint64_t key, uint64_t seq, size_t len) {
    uint64_t state = key * 31 + seq;
    pv__put_be64(p, key);
    pv__put_be64(p + 8, seq);
    pv__put_be64(p + 16, len);
    for (size_t i = HEAD; i < len; i++) {
        if (i % 8 == 0) {
            (void)t_rand(&state);
        }
        p[i] = (uint8_t)(state >> (i % 8 * 8));
    }
}

static void check_data(const uint8_t *p, size_t len, uint64_t key) {
    CHECK(len >= HEAD);
    CHECK_EQ(pv__get_be64(p), key);
    CHECK_EQ(pv__get_be64(p + 16), len);
    uint8_t *want = malloc(len);
    CHECK(want != NULL);
    fill(want, key, pv__get_be64(p + 8), len);
    CHECK_MEM(p, want, len);
    free(want);
}

static void expected_error(shared *s, int rc) {
    /* an operation that failed may come here after the disk has been mended */
    CHECK(rc == PV_ECLOSED || rc == PV_EREADONLY || (s->with_faults && (rc == PV_ESYS || rc == PV_ENOMEM)));
    atomic_fetch_add(&s->refused, 1);
}

/* 0, or what the write said. */
static int write_key(shared *s, uint64_t *seed, uint64_t key, uint64_t seq, size_t len) {
    uint8_t *data = malloc(len);
    CHECK(data != NULL);
    fill(data, key, seq, len);
    pv_needle n = {.id = key, .cookie = COOKIE, .data = data, .data_size = (uint32_t)len};
    pv_write_res res;
    pv_errinfo err;
    uint32_t flags = t_rand_below(seed, 8) == 0 ? PV_WRITE_FSYNC : 0;
    int rc = pv_vol_write(s->v, &n, flags | PV_WRITE_CHECK_COOKIE, NULL, &res, &err);
    free(data);
    return rc;
}

static int blob_key(shared *s, uint64_t key, uint64_t seq, size_t len) {
    uint8_t head[20];
    uint8_t tail[64];
    size_t head_len;
    size_t tail_len;
    int32_t size;
    pv_errinfo err;
    uint8_t *blob = malloc(len + 100);
    CHECK(blob != NULL);
    fill(blob + 20, key, seq, len);
    pv_needle n = {.id = key, .cookie = COOKIE, .data = blob + 20, .data_size = (uint32_t)len};
    n.checksum = pv_crc32c(0, n.data, len);
    CHECK_EQ(pv_needle_frame(&n, 3, head, &head_len, tail, sizeof tail, &tail_len, &size, &err), 0);
    memcpy(blob, head, 20);
    memcpy(blob + 20 + len, tail, tail_len);
    pv_write_res res;
    int rc = pv_vol_write_blob(s->v, key, size, blob, 20 + len + tail_len, 0, NULL, &res, &err);
    free(blob);
    return rc;
}

/* What the owner knows must be what the volume has. */
static int check_own(pv_vol *v, uint64_t key, const own *k) {
    pv_read r;
    pv_errinfo err;
    int rc = pv_vol_read(v, key, 0, NULL, &r, &err);
    if (rc == 0) {
        CHECK(k->live);
        CHECK_EQ(r.n.data_size, k->len);
        CHECK_EQ(pv__get_be64(r.n.data + 8), k->seq);
        check_data(r.n.data, r.n.data_size, key);
        pv_read_free(&r);
    } else if (rc == PV_ENOTFOUND || rc == PV_EDELETED) {
        CHECK(!k->live);
        rc = 0;
    }
    return rc;
}

/* Deletes some of the owner's keys and some that everyone writes, as a batch. What the last of it said. */
static int delete_keys(worker *w) {
    pv_delete items[16];
    pv_errinfo err;
    memset(items, 0, sizeof items);
    uint32_t flags = t_rand_below(&w->seed, 2) ? PV_DELETE_ANY_COOKIE : 0;
    for (unsigned i = 0; i < 16; i++) {
        uint64_t key = i % 5 == 0 ? SHARED_BASE + t_rand_below(&w->seed, SHARED_KEYS)
                                  : w->first_key + t_rand_below(&w->seed, OWN_KEYS);
        items[i] = (pv_delete){.id = key, .cookie = COOKIE, .vid = 1, .ok = 1};
    }
    for (size_t at = 0; at < 16;) {
        int rc = pv_vol_delete_many(w->s->v, items + at, 16 - at, flags, &err);
        if (rc < 0) {
            return rc;
        }
        for (int i = 0; i < rc; i++) {
            const pv_delete *item = &items[at + (size_t)i];
            if (item->id < SHARED_BASE) {
                own *k = &w->keys[item->id - w->first_key];
                CHECK_EQ(item->size > 0, k->live);
                k->live = false;
            }
        }
        at += rc > 0 ? (size_t)rc : 1;
    }
    return 0;
}

static void *owner_main(void *arg) {
    worker *w = arg;
    shared *s = w->s;
    for (uint64_t seq = 1; !atomic_load(&s->stop); seq++) {
        uint64_t i = t_rand_below(&w->seed, OWN_KEYS);
        uint64_t key = w->first_key + i;
        own *k = &w->keys[i];
        uint64_t what = t_rand_below(&w->seed, 20);
        size_t len = HEAD + t_rand_below(&w->seed, LEN_MAX);
        int rc;
        if (what < 10) {
            rc = write_key(s, &w->seed, key, seq, len);
        } else if (what < 12) {
            rc = blob_key(s, key, seq, len);
        } else if (what == 14) {
            rc = delete_keys(w);
        } else if (what < 14) {
            int32_t size;
            pv_write_res res;
            pv_errinfo err;
            rc = pv_vol_delete(s->v, key, COOKIE, 0, what == 12 ? PV_WRITE_FSYNC : 0, NULL, &size, &res, &err);
            if (rc == 0) {
                CHECK_EQ(size >= 0, k->live);
                k->live = false;
            }
        } else if (what < 17) { /* the key that everyone writes */
            rc = write_key(s, &w->seed, SHARED_BASE + i % SHARED_KEYS, seq, len);
        } else if (what == 17 && seq % 40 == 0) {
            len = BIG_LEN;
            rc = write_key(s, &w->seed, key, seq, len);
            what = 0;
        } else {
            rc = check_own(s->v, key, k);
        }
        if (rc < 0) {
            expected_error(s, rc);
            continue;
        }
        if (what < 12) {
            *k = (own){.seq = seq, .len = len, .live = true};
        }
        atomic_fetch_add(&s->writes, what < 17);
    }
    return NULL;
}

/* Any key, in any state: what is read is whole. */
static void read_any(shared *s, uint64_t *seed) {
    uint64_t key = t_rand_below(seed, OWNERS + 1);
    key = key == OWNERS ? SHARED_BASE + t_rand_below(seed, SHARED_KEYS) : key * 1000 + t_rand_below(seed, OWN_KEYS);
    pv_read r;
    pv_errinfo err;
    uint32_t flags = (t_rand_below(seed, 2) ? PV_READ_META_OK : 0U) | (t_rand_below(seed, 4) ? 0U : PV_READ_DELETED);
    int rc = pv_vol_read(s->v, key, flags, NULL, &r, &err);
    if (rc == 0 && r.meta_only) {
        uint8_t *data = malloc(r.n.data_size);
        CHECK(data != NULL);
        rc = pv_vol_pread(s->v, r.data_offset, data, r.n.data_size, r.entry.revision, &err);
        if (rc == 0) {
            check_data(data, r.n.data_size, key);
        } else {
            expected_error(s, rc);
        }
        free(data);
        pv_read_free(&r);
    } else if (rc == 0) {
        check_data(r.n.data, r.n.data_size, key);
        pv_read_free(&r);
    } else if (rc != PV_ENOTFOUND && rc != PV_EDELETED) {
        expected_error(s, rc);
    }
    atomic_fetch_add(&s->reads, 1);
}

static void *reader_main(void *arg) {
    worker *w = arg;
    shared *s = w->s;
    pv_vol_stats before = {0};
    while (!atomic_load(&s->stop)) {
        uint64_t what = t_rand_below(&w->seed, 50);
        pv_errinfo err;
        if (what == 0) {
            pv_vol_stats now;
            CHECK_EQ(pv_vol_stat(s->v, &now), 0);
            CHECK(now.file_count >= before.file_count || now.closed);
            CHECK(now.last_append_at_ns >= before.last_append_at_ns);
            before = now;
        } else if (what == 1) {
            pv_idx_row rows[64];
            int rc = pv_vol_visit(s->v, t_rand_below(&w->seed, 4000), rows, 64);
            for (int i = 1; i < rc; i++) {
                CHECK(rows[i].key > rows[i - 1].key);
            }
            if (rc < 0) {
                expected_error(s, rc);
            }
        } else if (what == 2 && t_rand_below(&w->seed, 10) == 0) {
            int rc = pv_vol_sync(s->v, &err);
            if (rc < 0) {
                expected_error(s, rc);
            }
        } else if (what == 3 && t_rand_below(&w->seed, 20) == 0) {
            uint8_t no_write = (uint8_t)t_rand_below(&w->seed, 2);
            int rc = pv_vol_set_readonly(s->v, no_write, 0);
            rc = rc == 0 ? pv_vol_set_readonly(s->v, 0, 0) : rc;
            if (rc < 0) {
                expected_error(s, rc);
            }
        } else if (what == 4) {
            pv_vol *v = pv_reg_acquire(s->reg, 1);
            if (v != NULL) {
                pv_superblock sb;
                pv_vol_superblock(v, &sb);
                CHECK_EQ(sb.version, 3);
                pv_vol_unref(v);
            }
        } else {
            read_any(s, &w->seed);
        }
    }
    return NULL;
}

/* Now and then an operation on a file fails, or a write comes out short. Truncations work: a handle that cannot cut off
 * a torn record refuses writes, which would end the game. */
static int weather(void *ctx, const pv__io_event *ev, size_t *len) {
    static _Thread_local uint64_t seed;
    shared *s = ctx;
    if (!atomic_load(&s->failing)) {
        return 0;
    }
    if (seed == 0) {
        seed = (uint64_t)(uintptr_t)&seed;
    }
    uint64_t dice = t_rand_below(&seed, 300);
    if (ev->op == PV__IO_PWRITE && dice < 4) {
        *len = dice % 2 == 0 ? (*len + 1) / 2 : *len;
        return dice % 2 == 0 ? 0 : ENOSPC;
    }
    if (ev->op == PV__IO_DATASYNC && dice < 30) {
        return EIO;
    }
    return (ev->op == PV__IO_PREAD && dice == 0) ? EIO : 0;
}

static void sleep_ms(long ms) {
    const struct timespec ts = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&ts, NULL);
}

static void run(bool with_faults, double seconds, uint64_t seed) {
    char dir[] = "/dev/shm/pv-stress-XXXXXX";
    char dat[64];
    char idx[64];
    CHECK(mkdtemp(access("/dev/shm", W_OK) == 0 ? dir : memcpy(dir, "/tmp/pv-stress-000-XXXXXX", sizeof dir)) != NULL);
    snprintf(dat, sizeof dat, "%s/1.dat", dir);
    snprintf(idx, sizeof idx, "%s/1.idx", dir);
    pv_vol_opts o = {.dat_path = dat, .idx_path = idx, .vid = 1, .flags = PV_VOL_CREATE, .offset_width = 5};
    o.superblock.version = 3;
    shared s = {0};
    CHECK_EQ(pv_vol_open(&o, &s.v, NULL), 0);
    CHECK_EQ(pv_reg_new(&s.reg), 0);
    CHECK_EQ(pv_reg_publish(s.reg, 1, s.v), 0);
    pv__io_set_hook(weather, &s);
    s.with_faults = with_faults;
    atomic_store(&s.failing, with_faults);

    worker *w = calloc(OWNERS + 3, sizeof *w);
    CHECK(w != NULL);
    for (unsigned i = 0; i < OWNERS + 3; i++) {
        w[i].s = &s;
        w[i].seed = seed * 100 + i;
        w[i].first_key = i * 1000;
        CHECK(pthread_create(&w[i].thread, NULL, i < OWNERS ? owner_main : reader_main, &w[i]) == 0);
    }
    sleep_ms((long)(seconds * 1000));
    CHECK_EQ(pv_reg_withdraw(s.reg, 1), 0);
    atomic_store(&s.failing, false);
    pv_errinfo err;
    CHECK_EQ(pv_vol_close(s.v, &err), 0); /* under all of them */
    sleep_ms(20);
    atomic_store(&s.stop, true);
    for (unsigned i = 0; i < OWNERS + 3; i++) {
        CHECK(pthread_join(w[i].thread, NULL) == 0);
    }
    pv__io_set_hook(NULL, NULL);
    pv_vol_stats end;
    CHECK_EQ(pv_vol_stat(s.v, &end), 0);
    pv_vol_unref(s.v);
    pv_reg_free(s.reg);

    /* acknowledged is acknowledged, refused is refused */
    o.flags = 0;
    CHECK_EQ(pv_vol_open(&o, &s.v, NULL), 0);
    for (unsigned i = 0; i < OWNERS; i++) {
        for (unsigned k = 0; k < OWN_KEYS; k++) {
            CHECK_EQ(check_own(s.v, w[i].first_key + k, &w[i].keys[k]), 0);
        }
    }
    pv_vol_stats again;
    CHECK_EQ(pv_vol_stat(s.v, &again), 0);
    CHECK_EQ(again.dat_bytes, end.dat_bytes);
    CHECK_EQ(again.idx_bytes, end.idx_bytes);
    CHECK_EQ(again.max_key, end.max_key);
    pv_vol_unref(s.v);

    /* the file is records from end to end */
    int fd = open(dat, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    uint64_t at = 8;
    uint64_t records = 0;
    pv_scan_rec recs[256];
    int rc;
    while ((rc = pv_dat_scan(fd, 3, &at, UINT64_MAX, 1, recs, 256, &err)) > 0) {
        for (int i = 0; i < rc; i++) {
            /* an orphan: its cookie and id are zero, too, unless that write failed as well */
            CHECK(recs[i].status == 0 || (with_faults && recs[i].status == PV_ECRC));
        }
        records += (uint64_t)rc;
    }
    CHECK_EQ(rc, 0);
    CHECK_EQ(at, end.dat_bytes);
    close(fd);
    printf("  %s: %" PRIu64 " changes, %" PRIu64 " reads, %" PRIu64 " refused, %" PRIu64 " records\n",
           with_faults ? "failing disk" : "sound disk", atomic_load(&s.writes), atomic_load(&s.reads),
           atomic_load(&s.refused), records);
    CHECK(atomic_load(&s.writes) > 0 && atomic_load(&s.reads) > 0);
    free(w);
    unlink(dat);
    unlink(idx);
    CHECK(rmdir(dir) == 0);
}

int main(void) {
    const char *text = getenv("STRESS_S");
    double seconds = text != NULL ? strtod(text, NULL) : 2.0;
    text = getenv("STRESS_SEED");
    uint64_t seed = text != NULL ? strtoull(text, NULL, 10) : 1;
    run(false, seconds / 2, seed);
    run(true, seconds / 2, seed + 1);
    return T_END();
}
