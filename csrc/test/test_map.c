/* test_map.c - the needle map against a plain reference: all orders of keys, both widths, counters, loading, want of
 * memory, threads. */
#include "t.h"

#include <sched.h>

/* ------------------------------------------------------------------ reference: an open hash table, counters by the book */

typedef struct ref_slot {
    uint64_t key;
    uint64_t offset;
    int32_t size;
    bool used;
} ref_slot;

typedef struct ref {
    ref_slot *slots;
    size_t mask;
    size_t used;
    pv_map_stats stats;
} ref;

static ref ref_new(size_t max_entries) {
    ref r = {.mask = 64};
    while (r.mask < max_entries * 2) {
        r.mask *= 2;
    }
    r.slots = calloc(r.mask, sizeof *r.slots);
    CHECK(r.slots != NULL);
    r.mask--;
    return r;
}

static ref_slot *ref_find(const ref *r, uint64_t key) {
    uint64_t h = key;
    size_t i = (size_t)t_rand(&h) & r->mask;
    while (r->slots[i].used && r->slots[i].key != key) {
        i = (i + 1) & r->mask;
    }
    return &r->slots[i];
}

static void ref_put(ref *r, uint64_t key, uint64_t offset, int32_t size, bool loading) {
    ref_slot *s = ref_find(r, key);
    r->stats.file_count++;
    r->stats.file_bytes += (uint64_t)size;
    if (s->used && (loading ? s->offset != 0 && s->size >= 0 : s->size > 0)) {
        r->stats.deleted_count++;
        r->stats.deleted_bytes += (uint64_t)s->size;
    }
    if (!s->used) {
        r->used++;
        CHECK(r->used * 2 <= r->mask + 1);
    }
    *s = (ref_slot){.key = key, .offset = offset, .size = size, .used = true};
    r->stats.entries = r->used;
    r->stats.max_key = key > r->stats.max_key ? key : r->stats.max_key;
}

/* A tombstone row counts always, a running delete only if it freed bytes. */
static void ref_delete(ref *r, uint64_t key, bool loading) {
    ref_slot *s = ref_find(r, key);
    int32_t freed = s->used && s->size > 0 ? s->size : 0;
    if (s->used && s->size >= 0) {
        s->size = s->size == 0 ? -1 : -s->size;
    }
    r->stats.deleted_count += loading || freed > 0;
    r->stats.deleted_bytes += (uint64_t)freed;
    if (loading && key > r->stats.max_key) {
        r->stats.max_key = key;
    }
}

static void same_stats(pv_map *m, const ref *r) {
    pv_map_stats got;
    pv_map_stat(m, &got);
    CHECK_EQ(got.entries, r->stats.entries);
    CHECK_EQ(got.file_count, r->stats.file_count);
    CHECK_EQ(got.file_bytes, r->stats.file_bytes);
    CHECK_EQ(got.deleted_count, r->stats.deleted_count);
    CHECK_EQ(got.deleted_bytes, r->stats.deleted_bytes);
    CHECK_EQ(got.max_key, r->stats.max_key);
    CHECK(got.memory_bytes > 0);
}

static void same_entry(pv_map *m, const ref *r, uint64_t key) {
    const ref_slot *s = ref_find(r, key);
    uint64_t offset = 1;
    int32_t size = 1;
    CHECK_EQ(pv_map_get(m, key, &offset, &size), s->used ? 0 : PV_ENOTFOUND);
    if (s->used) {
        CHECK_EQ(offset, s->offset);
        CHECK_EQ(size, s->size);
    }
}

/* All of the map, both ways: every visited entry is in the reference, ascending, and there are as many. */
static void same_everything(pv_map *m, const ref *r) {
    pv_idx_row rows[333];
    uint64_t from = 0;
    uint64_t seen = 0;
    for (;;) {
        int n = pv_map_visit(m, from, rows, PV__ARRAY_LEN(rows));
        for (int i = 0; i < n; i++) {
            const ref_slot *s = ref_find(r, rows[i].key);
            CHECK(i == 0 ? rows[i].key >= from : rows[i].key > rows[i - 1].key);
            CHECK(s->used);
            CHECK_EQ(rows[i].offset, s->offset);
            CHECK_EQ(rows[i].size, s->size);
            CHECK_EQ(rows[i].reserved, 0);
        }
        seen += (uint64_t)n;
        if (n < (int)PV__ARRAY_LEN(rows) || rows[n - 1].key == UINT64_MAX) {
            break;
        }
        from = rows[n - 1].key + 1;
    }
    CHECK_EQ(seen, r->used);
    for (size_t i = 0; i <= r->mask; i++) {
        if (r->slots[i].used) {
            same_entry(m, r, r->slots[i].key);
            same_entry(m, r, r->slots[i].key + 1);
            same_entry(m, r, r->slots[i].key - 1);
        }
    }
    same_stats(m, r);
}

/* ------------------------------------------------------------------ random operations */

enum key_shape { RISING, FALLING, JITTER, SHUFFLED, GAPS, STREAMS, CLUSTERS, SPARSE, EXTREMES, FEW, KEY_SHAPES };

static uint64_t made_key(enum key_shape shape, uint64_t i, uint64_t *seed) {
    switch (shape) {
    case RISING:
        return 1000 + i;
    case FALLING:
        return 1000000 - i;
    case JITTER:
        return 1000 + i + t_rand_below(seed, 40);
    case SHUFFLED:
        return t_rand_below(seed, 60000);
    case GAPS:
        return t_rand_below(seed, 60000) * 1009;
    case STREAMS: /* several rising sequences at once */
        return (t_rand_below(seed, 7) << 40) + i;
    case CLUSTERS: /* dense runs far apart: neighbouring leaves of very different width */
        return (t_rand_below(seed, 200) * 0x0123456789abcd) + t_rand_below(seed, 300);
    case SPARSE:
        return t_rand(seed);
    case EXTREMES: { /* near both ends and near powers of two, where widths change */
        uint64_t at = t_rand_below(seed, 65);
        uint64_t base = at == 64 ? 0 : (uint64_t)1 << at;
        return base + t_rand_below(seed, 200) - 100;
    }
    default:
        return t_rand_below(seed, 90);
    }
}

static uint64_t made_offset(uint8_t width, uint64_t i, uint64_t *seed) {
    const unsigned bits = width == 4 ? 32 : 40;
    switch (t_rand_below(seed, 8)) {
    case 0: /* anywhere */
        return (t_rand(seed) >> (64 - bits)) * 8;
    case 1: /* around a change of width */
        return ((((uint64_t)1 << (8 * (1 + t_rand_below(seed, bits / 8)))) - 1 - t_rand_below(seed, 3)) &
                (((uint64_t)1 << bits) - 1)) *
               8;
    default: /* as a file grows */
        return 8 + i * 800;
    }
}

static int32_t made_size(uint64_t *seed) {
    switch (t_rand_below(seed, 12)) {
    case 0:
        return 0;
    case 1:
        return (int32_t)t_rand_below(seed, 130);
    case 2:
        return (int32_t)(t_rand(seed) & INT32_MAX);
    case 3:
        return INT32_MAX;
    case 4: /* around a change of width */
        return (1 << (8 * (1 + (int)t_rand_below(seed, 3)) - 1)) - (int32_t)t_rand_below(seed, 2);
    default:
        return (int32_t)t_rand_below(seed, 5000);
    }
}

static void random_operations(enum key_shape shape, uint8_t width, uint64_t ops, uint64_t seed) {
    ref r = ref_new(ops);
    pv_map *m;
    CHECK_EQ(pv_map_new(width, &m), 0);
    for (uint64_t i = 0; i < ops; i++) {
        uint64_t key = made_key(shape, i, &seed);
        const ref_slot before = *ref_find(&r, key);
        if (t_rand_below(&seed, 6) == 0) {
            int32_t old_size = 12345;
            if (i > 0 && t_rand_below(&seed, 2) == 0) {
                key = made_key(shape, t_rand_below(&seed, i), &seed);
            }
            const ref_slot was = *ref_find(&r, key);
            CHECK_EQ(pv_map_delete(m, key, &old_size), was.used ? 0 : PV_ENOTFOUND);
            CHECK_EQ(old_size, was.used ? was.size : 0);
            ref_delete(&r, key, false);
        } else {
            uint64_t offset = made_offset(width, i, &seed);
            int32_t size = made_size(&seed);
            uint64_t old_offset;
            int32_t old_size;
            CHECK_EQ(pv_map_put(m, key, offset, size, &old_offset, &old_size), 0);
            CHECK_EQ(old_offset, before.used ? before.offset : 0);
            CHECK_EQ(old_size, before.used ? before.size : 0);
            ref_put(&r, key, offset, size, false);
        }
        same_entry(m, &r, key);
        if (i == 50 || i == 1000) {
            same_everything(m, &r);
        }
    }
    same_everything(m, &r);
    pv_map_free(m);
    free(r.slots);
}

static void all_key_shapes(void) {
    for (int shape = 0; shape < KEY_SHAPES; shape++) {
        for (uint64_t seed = 0; seed < 2; seed++) {
            random_operations((enum key_shape)shape, 4, T_REPEAT(30000), seed * 100 + (uint64_t)shape);
            random_operations((enum key_shape)shape, 5, T_REPEAT(30000), seed * 100 + 50 + (uint64_t)shape);
        }
    }
}

static void empty_and_refused(void) {
    pv_map *m = NULL;
    uint64_t offset;
    int32_t size;
    pv_idx_row row;
    CHECK_EQ(pv_map_new(3, &m), PV_EINVAL);
    CHECK(m == NULL);
    CHECK_EQ(pv_map_new(6, &m), PV_EINVAL);
    pv_map_free(NULL);
    CHECK_EQ(pv_map_new(4, &m), 0);
    CHECK_EQ(pv_map_get(m, 0, &offset, &size), PV_ENOTFOUND);
    CHECK_EQ(pv_map_delete(m, 0, &size), PV_ENOTFOUND);
    CHECK_EQ(size, 0);
    CHECK_EQ(pv_map_visit(m, 0, &row, 1), 0);
    CHECK_EQ(pv_map_put(m, 1, 8, -1, &offset, &size), PV_EINVAL);
    CHECK_EQ(pv_map_put(m, 1, (uint64_t)1 << 35, 1, &offset, &size), PV_ERANGE);
    ref r = ref_new(10);
    same_stats(m, &r);
    CHECK_EQ(pv_map_put(m, 0, ((uint64_t)1 << 35) - 8, 7, &offset, &size), 0);
    CHECK_EQ(pv_map_visit(m, 0, &row, 0), 0);
    CHECK_EQ(pv_map_visit(m, 1, &row, 1), 0);
    CHECK_EQ(pv_map_visit(m, 0, &row, SIZE_MAX), 1);
    CHECK_EQ(row.offset, ((uint64_t)1 << 35) - 8);
    pv_map_free(m);
    CHECK_EQ(pv_map_new(5, &m), 0);
    CHECK_EQ(pv_map_put(m, 1, (uint64_t)1 << 43, 1, &offset, &size), PV_ERANGE);
    CHECK_EQ(pv_map_put(m, 1, ((uint64_t)1 << 43) - 8, 1, &offset, &size), 0);
    CHECK_EQ(pv_map_get(m, 1, &offset, &size), 0);
    CHECK_EQ(offset, ((uint64_t)1 << 43) - 8);
    pv_map_free(m);
    free(r.slots);
}

/* The contract's table (storage.md 15): four puts, one of them empty, two deletes, one of the empty one. */
static void counters_by_the_book(void) {
    pv_map *m;
    uint64_t offset;
    int32_t size;
    CHECK_EQ(pv_map_new(4, &m), 0);
    CHECK_EQ(pv_map_put(m, 1, 8, 20, &offset, &size), 0);
    CHECK_EQ(pv_map_put(m, 2, 72, 40, &offset, &size), 0);
    CHECK_EQ(pv_map_put(m, 3, 152, 52, &offset, &size), 0);
    CHECK_EQ(pv_map_put(m, 4, 240, 0, &offset, &size), 0);
    CHECK_EQ(pv_map_delete(m, 1, &size), 0);
    CHECK_EQ(size, 20);
    CHECK_EQ(pv_map_delete(m, 4, &size), 0);
    CHECK_EQ(size, 0);
    pv_map_stats s;
    pv_map_stat(m, &s);
    CHECK_EQ(s.file_count, 4);
    CHECK_EQ(s.file_bytes, 112);
    CHECK_EQ(s.deleted_count, 1);
    CHECK_EQ(s.deleted_bytes, 20);
    CHECK_EQ(s.entries, 4);
    CHECK_EQ(pv_map_get(m, 1, &offset, &size), 0);
    CHECK_EQ(size, -20);
    CHECK_EQ(pv_map_get(m, 4, &offset, &size), 0);
    CHECK_EQ(size, -1);
    /* Deleting again changes nothing; writing over a deleted key frees nothing. */
    CHECK_EQ(pv_map_delete(m, 1, &size), 0);
    CHECK_EQ(size, -20);
    CHECK_EQ(pv_map_put(m, 1, 400, 7, &offset, &size), 0);
    CHECK_EQ(offset, 8);
    CHECK_EQ(size, -20);
    pv_map_stat(m, &s);
    CHECK_EQ(s.deleted_count, 1);
    CHECK_EQ(s.file_count, 5);
    pv_map_free(m);

    int fd = t_file();
    static const pv_idx_row rows[] = {
        {.key = 1, .offset = 8, .size = 20},   {.key = 2, .offset = 72, .size = 40},
        {.key = 3, .offset = 152, .size = 52}, {.key = 4, .offset = 240, .size = 0},
        {.key = 1, .offset = 272, .size = -1}, {.key = 4, .offset = 304, .size = -1},
    };
    for (size_t i = 0; i < PV__ARRAY_LEN(rows); i++) {
        uint8_t buf[16];
        pv_idx_row_put(&rows[i], 4, buf);
        CHECK_EQ(pv__io_pwrite(fd, buf, 16, i * 16, NULL), 0);
    }
    uint64_t done;
    CHECK_EQ(pv_map_new(4, &m), 0);
    CHECK_EQ(pv_map_load(m, fd, 0, &done, NULL), 0);
    CHECK_EQ(done, 6);
    pv_map_stat(m, &s);
    CHECK_EQ(s.file_count, 4);
    CHECK_EQ(s.file_bytes, 112);
    CHECK_EQ(s.deleted_count, 2);
    CHECK_EQ(s.deleted_bytes, 20);
    pv_map_free(m);
    close(fd);
}

/* ------------------------------------------------------------------ loading */

/* What keys of a shuffled index may look like. */
enum spread { KEYS_DENSE, KEYS_GAPS, KEYS_ALL_64_BITS, KEYS_CROWDED, KEYS_ONE_KEY, KEYS_COUNT };

static uint64_t spread_key(enum spread spread, uint64_t *seed) {
    switch (spread) {
    case KEYS_DENSE:
        return t_rand_below(seed, 9000);
    case KEYS_GAPS:
        return 1000000 + t_rand_below(seed, 9000) * 77777;
    case KEYS_ALL_64_BITS:
        return t_rand_below(seed, 9000) * (UINT64_MAX / 8999);
    case KEYS_CROWDED: /* nearly all in one bucket, one far away */
        return t_rand_below(seed, 9000) == 0 ? UINT64_MAX : 7 + t_rand_below(seed, 9000);
    default:
        return 5;
    }
}

/* An index in the order of its keys, in its own order, and the reference: all the same. */
static void shuffled_as_in_order(uint8_t width, enum spread spread, bool far, uint64_t rows, uint64_t *seed) {
    const size_t row_len = 12U + width;
    const uint64_t units8_max = !far ? 100000 : width == 4 ? UINT32_MAX : ((uint64_t)1 << 40) - 1;
    uint8_t *buf = malloc((size_t)rows * row_len);
    CHECK(buf != NULL);
    ref r = ref_new(9001);
    for (uint64_t i = 0; i < rows; i++) {
        pv_idx_row row = {.key = spread_key(spread, seed),
                          .offset = (1 + t_rand_below(seed, units8_max)) * 8,
                          .size = (int32_t)t_rand_below(seed, far ? (uint64_t)INT32_MAX + 1 : 5000)};
        uint64_t odd = t_rand_below(seed, 16);
        row.size = odd == 0 ? -1 : odd == 1 ? INT32_MIN : odd == 2 ? 0 : row.size;
        row.offset = odd == 3 ? 0 : row.offset;
        pv_idx_row_put(&row, width, buf + (size_t)i * row_len);
        if (row.offset != 0 && row.size >= 0) {
            ref_put(&r, row.key, row.offset, row.size, true);
        } else {
            ref_delete(&r, row.key, true);
        }
    }
    int fd = t_file();
    CHECK_EQ(pv__io_pwrite(fd, buf, (size_t)rows * row_len, 0, NULL), 0);
    for (int via_load = 0; via_load < 2; via_load++) {
        pv_map *m;
        pv_errinfo err;
        uint64_t done;
        CHECK_EQ(pv_map_new(width, &m), 0);
        CHECK_EQ(via_load ? pv_map_load(m, fd, 0, &done, &err) : pv__map_load_shuffled(m, fd, width, 0, rows, &err), 0);
        CHECK(!via_load || done == rows);
        same_stats(m, &r);
        same_everything(m, &r);
        pv_map_free(m);
    }
    close(fd);
    free(buf);
    free(r.slots);
}

static void shuffled(void) {
    uint64_t seed = 4;
    for (int spread = 0; spread < KEYS_COUNT; spread++) {
        for (uint8_t width = 4; width <= 5; width++) {
            for (int far = 0; far < 2; far++) {
                shuffled_as_in_order(width, (enum spread)spread, far, 1, &seed);
                shuffled_as_in_order(width, (enum spread)spread, far, 70000, &seed);
            }
        }
    }
    shuffled_as_in_order(4, KEYS_DENSE, false, 300000, &seed); /* long enough for a load to do it by itself */
    shuffled_as_in_order(5, KEYS_ALL_64_BITS, true, 300000, &seed);
}

/* A file that is cut or changed while it is loaded is an error, whichever pass meets it. */
typedef struct meddler {
    int fd;
    unsigned at_read; /* which read is preceded by the change */
    unsigned seen;
    bool cuts;
} meddler;

static int meddle(void *arg, const pv__io_event *ev, size_t *len) {
    (void)len;
    meddler *d = arg;
    if (ev->op == PV__IO_PREAD && ++d->seen == d->at_read) {
        uint8_t row[16] = {0xff};
        memset(row, 0xff, 12);
        row[12] = 0x7f;
        if (d->cuts) {
            CHECK(ftruncate(d->fd, 16 * 1000) == 0);
        } else {
            for (unsigned i = 0; i < 20000; i++) {
                CHECK(pwrite(d->fd, row, sizeof row, i * 16) == 16);
            }
        }
    }
    return 0;
}

static void shuffled_index_that_changes(void) {
    for (unsigned at_read = 1, failures = 1; failures > 0; at_read += 7) {
        failures = 0;
        for (int cuts = 0; cuts < 2; cuts++) {
            int fd = t_file();
            uint64_t seed = 9;
            for (uint64_t i = 0; i < 20000; i++) {
                uint8_t buf[16];
                const pv_idx_row row = {.key = t_rand_below(&seed, 9000), .offset = 8 * i + 8, .size = 100};
                pv_idx_row_put(&row, 4, buf);
                CHECK(pwrite(fd, buf, 16, (off_t)i * 16) == 16);
            }
            meddler d = {.fd = fd, .at_read = at_read, .cuts = cuts};
            pv_map *m;
            pv_errinfo err;
            CHECK_EQ(pv_map_new(4, &m), 0);
            pv__io_set_hook(meddle, &d);
            int rc = pv__map_load_shuffled(m, fd, 4, 0, 20000, &err);
            pv__io_set_hook(NULL, NULL);
            CHECK(rc == 0 || rc == PV_EEOF || rc == PV_ECORRUPT);
            CHECK(!cuts || at_read > 80 || rc == PV_EEOF); /* there are three passes of 40 reads */
            failures += rc != 0 || d.seen >= at_read;
            pv_map_free(m);
            close(fd);
        }
        CHECK(at_read > 7 || failures > 0);
    }
}

static void shuffled_without_memory(void) {
    int fd = t_file();
    uint64_t seed = 9;
    for (uint64_t i = 0; i < 5000; i++) {
        uint8_t buf[16];
        const pv_idx_row row = {.key = t_rand_below(&seed, 9000), .offset = 8 * i + 8, .size = 100};
        pv_idx_row_put(&row, 4, buf);
        CHECK(pwrite(fd, buf, 16, (off_t)i * 16) == 16);
    }
    bool done = false;
    for (long nth = 1; !done; nth++) {
        pv_map *m;
        pv_errinfo err;
        CHECK_EQ(pv_map_new(4, &m), 0);
        pv__alloc_fail_at(nth);
        int rc = pv__map_load_shuffled(m, fd, 4, 0, 5000, &err);
        (void)pv__alloc_fail_at(0);
        done = rc == 0;
        CHECK(done ? nth > 8 : rc == PV_ENOMEM && err.code == PV_ENOMEM);
        pv_map_free(m);
    }
    close(fd);
}

static pv_idx_row log_row(uint8_t width, uint64_t i, uint64_t *seed) {
    pv_idx_row row = {
        .key = t_rand_below(seed, 5000) * 3, .offset = made_offset(width, i, seed), .size = made_size(seed)};
    switch (t_rand_below(seed, 8)) {
    case 0:
        row.size = -1;
        break;
    case 1: /* odd rows count as deletes too */
        row.size = (int32_t)(t_rand(seed) | 0x80000000U);
        break;
    case 2:
        row.offset = 0;
        break;
    default:
        break;
    }
    return row;
}

static void loading(void) {
    enum { ROWS = 20000 };
    for (uint8_t width = 4; width <= 5; width++) {
        const size_t row_len = 12U + width;
        ref r = ref_new(ROWS);
        uint64_t seed = width;
        int fd = t_file();
        uint8_t *buf = malloc(ROWS * row_len);
        CHECK(buf != NULL);
        for (uint64_t i = 0; i < ROWS; i++) {
            pv_idx_row row = log_row(width, i, &seed);
            pv_idx_row_put(&row, width, buf + i * row_len);
            if (row.offset != 0 && row.size >= 0) {
                ref_put(&r, row.key, row.offset, row.size, true);
            } else {
                ref_delete(&r, row.key, true);
            }
        }
        CHECK_EQ(pv__io_pwrite(fd, buf, ROWS * row_len - 1, 0, NULL), 0);
        /* A ragged tail is no row; when it is completed, the rest of the log goes on from there. */
        pv_map *m;
        uint64_t done;
        pv_errinfo err;
        CHECK_EQ(pv_map_new(width, &m), 0);
        CHECK_EQ(pv_map_load(m, fd, 0, &done, &err), 0);
        CHECK_EQ(done, ROWS - 1);
        CHECK_EQ(pv__io_pwrite(fd, buf, ROWS * row_len, 0, NULL), 0);
        CHECK_EQ(pv_map_load(m, fd, ROWS - 1, &done, &err), 0);
        CHECK_EQ(done, 1);
        same_everything(m, &r);
        CHECK_EQ(pv_map_load(m, fd, ROWS, &done, &err), 0);
        CHECK_EQ(done, 0);
        CHECK_EQ(pv_map_load(m, fd, UINT64_MAX, &done, &err), 0);
        CHECK_EQ(done, 0);
        close(fd);
        CHECK_EQ(pv_map_load(m, fd, 0, &done, &err), PV_ESYS);
        CHECK_EQ(err.sys_errno, EBADF);
        same_everything(m, &r);
        pv_map_free(m);
        free(buf);
        free(r.slots);
    }
}

static void golden_index(void) {
    int fd;
    uint64_t done;
    pv_map *m;
    pv_errinfo err;
    CHECK_EQ(pv__io_open(PV_T_GOLDEN "/index-100k/data/121.idx", O_RDONLY, 0, &fd, &err), 0);
    CHECK_EQ(pv_map_new(4, &m), 0);
    CHECK_EQ(pv_map_load(m, fd, 0, &done, &err), 0);
    CHECK_EQ(done, 100000);
    ref r = ref_new(100000);
    for (uint64_t i = 0; i < 100000; i++) {
        uint8_t buf[16];
        pv_idx_row row;
        CHECK_EQ(pv__io_pread_full(fd, buf, 16, i * 16, &err), 0);
        pv_idx_row_parse(buf, 4, &row);
        if (row.offset != 0 && row.size >= 0) {
            ref_put(&r, row.key, row.offset, row.size, true);
        } else {
            ref_delete(&r, row.key, true);
        }
    }
    same_everything(m, &r);
    pv_map_free(m);
    free(r.slots);
    CHECK_EQ(pv__io_close(fd, &err), 0);
}

/* ------------------------------------------------------------------ memory */

/* Lets the first, second, third ... allocation from each point on fail: the map refuses the put, is otherwise as it was,
 * and takes the same put when memory is back. */
static void want_of_memory(enum key_shape shape) {
    enum { OPS = T_REPEAT(40000) };
    ref r = ref_new(OPS);
    pv_map *m;
    uint64_t seed = 77;
    unsigned refused = 0;
    (void)pv__alloc_fail_at(1);
    CHECK_EQ(pv_map_new(4, &m), PV_ENOMEM);
    CHECK(m == NULL);
    CHECK_EQ(pv_map_new(4, &m), 0);
    for (uint64_t i = 0; i < OPS; i++) {
        uint64_t key = made_key(shape, i, &seed);
        uint64_t offset = made_offset(4, i, &seed);
        int32_t size = made_size(&seed);
        uint64_t old_offset;
        int32_t old_size;
        int rc = PV_ENOMEM;
        for (long nth = 1; rc == PV_ENOMEM; nth++) {
            CHECK(nth < 100);
            (void)pv__alloc_fail_at(nth);
            rc = pv_map_put(m, key, offset, size, &old_offset, &old_size);
            (void)pv__alloc_fail_at(0);
            if (rc == PV_ENOMEM) {
                CHECK_EQ(old_offset, 0);
                CHECK_EQ(old_size, 0);
                same_entry(m, &r, key);
                same_stats(m, &r);
                refused++;
                if (refused % 64 == 0) {
                    same_everything(m, &r);
                }
            }
        }
        CHECK_EQ(rc, 0);
        ref_put(&r, key, offset, size, false);
    }
    same_everything(m, &r);
    CHECK(refused > T_REPEAT(20));
    int fd = t_file();
    uint64_t done;
    pv_errinfo err;
    (void)pv__alloc_fail_at(1);
    CHECK_EQ(pv_map_load(m, fd, 0, &done, &err), PV_ENOMEM);
    close(fd);
    pv_map_free(m);
    free(r.slots);
}

static void want_of_memory_all(void) {
    want_of_memory(RISING);
    want_of_memory(JITTER);
    want_of_memory(SHUFFLED);
    want_of_memory(CLUSTERS);
    want_of_memory(SPARSE);
}

/* A load that fails half way has counted exactly the rows it says. */
static void load_without_memory(void) {
    enum { ROWS = 9000 };
    int fd = t_file();
    uint64_t seed = 5;
    for (uint64_t i = 0; i < ROWS; i++) {
        uint8_t buf[16];
        pv_idx_row row = {.key = t_rand(&seed), .offset = 8 + i * 64, .size = 10};
        pv_idx_row_put(&row, 4, buf);
        CHECK_EQ(pv__io_pwrite(fd, buf, 16, i * 16, NULL), 0);
    }
    for (long nth = 2; nth < 200; nth += 7) {
        pv_map *m;
        uint64_t done;
        uint64_t rest = 0;
        pv_errinfo err;
        pv_map_stats s;
        CHECK_EQ(pv_map_new(4, &m), 0);
        (void)pv__alloc_fail_at(nth);
        int rc = pv_map_load(m, fd, 0, &done, &err);
        (void)pv__alloc_fail_at(0);
        CHECK_EQ(rc, PV_ENOMEM);
        CHECK_EQ(err.code, PV_ENOMEM);
        pv_map_stat(m, &s);
        CHECK_EQ(s.file_count, done);
        CHECK_EQ(pv_map_load(m, fd, done, &rest, &err), 0);
        CHECK_EQ(done + rest, ROWS);
        pv_map_stat(m, &s);
        CHECK_EQ(s.file_count, ROWS);
        pv_map_free(m);
    }
    close(fd);
}

/* Bytes per needle for the shapes that real volumes have. Checked small here; bench_map shows the large figures. */
static void compactness(void) {
    enum { N = T_REPEAT(300000) };
    static const struct {
        const char *name;
        uint64_t step;
        uint64_t jitter;
        bool shuffled;
        double limit;
    } cases[] = {
        {"rising", 1, 0, false, 7.0},
        {"rising with gaps", 50, 50, false, 7.5},
        {"rising, late arrivals", 1, 30, false, 8.0},
        {"shuffled", 1, 0, true, 9.0},
        {"shuffled with gaps", 50, 0, true, 10.5},
    };
    for (uint8_t width = 4; width <= 5; width++) {
        for (size_t c = 0; c < PV__ARRAY_LEN(cases); c++) {
            pv_map *m;
            uint64_t seed = c;
            uint64_t offset = width == 4 ? 8 : (uint64_t)1 << 36;
            CHECK_EQ(pv_map_new(width, &m), 0);
            for (uint64_t i = 0; i < N; i++) {
                uint64_t at = cases[c].shuffled ? (i * 104729) % N : i;
                uint64_t key = 1 + at * cases[c].step + (cases[c].jitter ? t_rand_below(&seed, cases[c].jitter) : 0);
                int32_t size = (int32_t)(20 + t_rand_below(&seed, 6000));
                uint64_t old_offset;
                int32_t old_size;
                CHECK_EQ(pv_map_put(m, key, offset, size, &old_offset, &old_size), 0);
                offset += (uint64_t)pv_needle_record_len(size, 3);
            }
            pv_map_stats s;
            pv_map_stat(m, &s);
            double per_needle = (double)s.memory_bytes / (double)s.entries;
            printf("  width %u, %-22s %7" PRIu64 " needles, %5.2f bytes each\n", width, cases[c].name, s.entries,
                   per_needle);
            CHECK(per_needle <= cases[c].limit + (width - 4));
            pv_map_free(m);
        }
    }
}

/* ------------------------------------------------------------------ threads */

enum { WRITERS = 2, READERS = 2, KEYS = 4000, ROUNDS = 12 };

typedef struct shared {
    pv_map *m;
    uint64_t next_id; /* hands out thread numbers */
    uint64_t done_writers;
} shared;

/* A writer owns every second key and gives key k in round n the offset (k * ROUNDS + n) * 8 and the size n: whoever sees
 * an offset can tell which size belongs to it. */
static void *writer(void *arg) {
    shared *s = arg;
    uint64_t id = __atomic_fetch_add(&s->next_id, 1, __ATOMIC_SEQ_CST);
    uint64_t seed = id;
    for (int32_t round = 1; round <= ROUNDS; round++) {
        for (uint64_t i = 0; i < KEYS; i++) {
            uint64_t key = ((i * 2654435761U) % KEYS) * WRITERS + id;
            uint64_t old_offset;
            int32_t old_size;
            CHECK_EQ(pv_map_put(s->m, key, (key * (ROUNDS + 1) + (uint64_t)round) * 8, round, &old_offset, &old_size),
                     0);
            CHECK(old_size == (round - 1) || old_size == -(round - 1));
            if (t_rand_below(&seed, 4) == 0) {
                CHECK_EQ(pv_map_delete(s->m, key, &old_size), 0);
                CHECK_EQ(old_size, round);
            }
        }
    }
    __atomic_fetch_add(&s->done_writers, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void check_pair(uint64_t key, uint64_t offset, int32_t size) {
    uint64_t round = (uint64_t)(size < 0 ? -size : size);
    CHECK(round >= 1 && round <= ROUNDS);
    CHECK_EQ(offset, (key * (ROUNDS + 1) + round) * 8);
}

static void *reader(void *arg) {
    shared *s = arg;
    uint64_t seed = 1000 + __atomic_fetch_add(&s->next_id, 1, __ATOMIC_SEQ_CST);
    pv_idx_row rows[50];
    while (__atomic_load_n(&s->done_writers, __ATOMIC_SEQ_CST) < WRITERS) {
        for (int i = 0; i < 200; i++) {
            uint64_t key = t_rand_below(&seed, KEYS * WRITERS);
            uint64_t offset;
            int32_t size;
            if (pv_map_get(s->m, key, &offset, &size) == 0) {
                check_pair(key, offset, size);
            }
        }
        int n = pv_map_visit(s->m, t_rand_below(&seed, KEYS * WRITERS), rows, PV__ARRAY_LEN(rows));
        for (int i = 0; i < n; i++) {
            CHECK(i == 0 || rows[i].key > rows[i - 1].key);
            check_pair(rows[i].key, rows[i].offset, rows[i].size);
        }
        pv_map_stats st;
        pv_map_stat(s->m, &st);
        CHECK(st.entries <= KEYS * WRITERS && st.entries <= st.file_count);
    }
    return NULL;
}

static void threads(void) {
    shared s = {0};
    pthread_t t[WRITERS + READERS];
    CHECK_EQ(pv_map_new(5, &s.m), 0);
    for (int i = 0; i < WRITERS; i++) {
        CHECK(pthread_create(&t[i], NULL, writer, &s) == 0);
    }
    /* Writers took the numbers 0 and 1 only if they began before the readers. */
    while (__atomic_load_n(&s.next_id, __ATOMIC_SEQ_CST) < WRITERS) {
        sched_yield();
    }
    for (int i = WRITERS; i < WRITERS + READERS; i++) {
        CHECK(pthread_create(&t[i], NULL, reader, &s) == 0);
    }
    for (int i = 0; i < WRITERS + READERS; i++) {
        CHECK(pthread_join(t[i], NULL) == 0);
    }
    pv_map_stats st;
    pv_map_stat(s.m, &st);
    CHECK_EQ(st.entries, KEYS * WRITERS);
    CHECK_EQ(st.file_count, (uint64_t)KEYS * WRITERS * ROUNDS);
    pv_map_free(s.m);
}

int main(void) {
    RUN(empty_and_refused);
    RUN(counters_by_the_book);
    RUN(all_key_shapes);
    RUN(loading);
    RUN(shuffled);
    RUN(shuffled_index_that_changes);
    RUN(shuffled_without_memory);
    RUN(golden_index);
    RUN(want_of_memory_all);
    RUN(load_without_memory);
    RUN(compactness);
    RUN(threads);
    return T_END();
}
