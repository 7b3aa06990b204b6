/* pv_compact.c - vacuum: copies the live records of a volume to new files, catches up, and swaps the generation.
 *
 * Upstream's order (storage.md 17) and ours are the same where files can be compared: records ascend by key, each is
 * parsed, checked and serialised anew; then come the changes made meanwhile, raw.
 *
 * begin     flushes both files, notes how long the index is, loads the map of just that
 * step      copies some MiB; nothing of the volume is locked. Reads are merged into runs of the file, in file order
 * finish    new files on disk
 * commit    catches up in rounds without a lock while much is missing, then takes append_lock for the rest, makes the
 *           commit marker and the renames durable, and gives the handle its new generation. Readers never wait: those
 *           that run keep the old generation. Anything that fails before the marker leaves the old files in charge.
 *
 * The commit marker (.cpc) is left for the caller to remove, once what belonged to the old files is gone. From the marker
 * on the swap is decided: a crash is finished by the loader, a failing rename too, and the handle goes on with the new
 * files, which it holds open whatever their names are.
 */
#include "pv_vol_int.h"

#include <fcntl.h>
#include <time.h>

#define BATCH_ROWS 4096U
#define BATCH_BYTES ((size_t)8 << 20) /* of records in memory at a time; one record may be larger */
/* One read, one write: small enough to stay in the cache of a CPU between the two copies by the kernel. */
#define RUN_BYTES ((size_t)512 << 10)
#define RUN_GAP ((size_t)64 << 10) /* skipping less than this costs more than reading it */
#define OUT_BYTES ((size_t)512 << 10)
#define BEGIN_BYTES ((uint64_t)4 << 20)
#define PAGE 4096U
#define ROWS_OUT 4096U
#define LOCKED_ROWS_MAX 2048U                 /* what is left to catch up under append_lock: at most so many rows */
#define LOCKED_BYTES_MAX ((uint64_t)16 << 20) /* and about so many bytes, unless writers outrun the copy */
#define CATCH_UP_ROUNDS 16
#define TOMBSTONE_COOKIE 0x12345678U /* upstream's, of tombstones that a vacuum makes */

/* One live entry of a batch. */
typedef struct item {
    uint64_t key;
    uint64_t offset;
    int32_t size;
    size_t len; /* of the record */
    size_t at;  /* in the batch's memory */
    int rc;
} item;

struct pv_compact {
    pv_vol *v;
    gen *g; /* the generation it started from; a reference without a running call */
    pv_map *snapshot;
    pv_map *map; /* of the new files; NULL where the volume's is elsewhere */
    int dat_fd;
    int idx_fd;
    pv_superblock sb;
    uint32_t volume_ttl_minutes;
    uint64_t now_s;
    uint64_t rows_seen; /* rows of the old index that are in the new files */
    uint64_t next_key;
    bool keys_done;
    bool finished;
    bool committed;
    uint64_t dat_end;
    uint64_t idx_rows;

    uint8_t *in;
    size_t in_cap;
    uint8_t *run;
    uint8_t *out;
    size_t out_len;
    uint64_t begun; /* bytes of the new .dat that the disk was told to write */
    uint8_t *rows_out;
    size_t rows_out_len;
    uint64_t rows_out_at;
    pv_idx_row *rows;
    item *items;
    item **by_offset;
    pv_compact_stats stats;
};

/* ------------------------------------------------------------------ writing the new files */

/* Writes what stands in c->out. The disk begins with it while the copy goes on, so that the flush at the end is short. */
static int write_out(pv_compact *c, pv_errinfo *err) {
    int rc = pv__io_pwrite(c->dat_fd, c->out, c->out_len, c->dat_end - c->out_len, err);
    c->out_len = 0;
    uint64_t whole = c->dat_end / PAGE * PAGE; /* a page that is on its way to the disk may hold up who writes to it */
    if (rc == 0 && whole - c->begun >= BEGIN_BYTES) {
        pv__io_begin_writing(c->dat_fd, c->begun, whole - c->begun);
        c->begun = whole;
    }
    return rc;
}

static int flush_out(pv_compact *c, pv_errinfo *err) {
    int rc = 0;
    if (c->out_len > 0) {
        rc = write_out(c, err);
    }
    if (rc == 0 && c->rows_out_len > 0) {
        rc = pv__io_pwrite(c->idx_fd, c->rows_out, c->rows_out_len, c->rows_out_at, err);
        c->rows_out_at += c->rows_out_len;
        c->rows_out_len = 0;
    }
    return rc;
}

static int put_bytes(pv_compact *c, const void *data, size_t len, pv_errinfo *err) {
    const uint8_t *p = data;
    while (len > 0) {
        if (c->out_len == OUT_BYTES) {
            int rc = write_out(c, err);
            if (rc < 0) {
                return rc;
            }
        }
        size_t n = OUT_BYTES - c->out_len < len ? OUT_BYTES - c->out_len : len;
        memcpy(c->out + c->out_len, p, n);
        c->out_len += n;
        c->dat_end += n;
        p += n;
        len -= n;
    }
    return 0;
}

static int put_row(pv_compact *c, uint64_t key, uint64_t offset, int32_t size, pv_errinfo *err) {
    const pv_idx_row row = {.key = key, .offset = offset, .size = size};
    size_t row_len = c->v->row_len;
    if (c->rows_out_len + row_len > ROWS_OUT * PV__ROW_MAX) {
        int rc = pv__io_pwrite(c->idx_fd, c->rows_out, c->rows_out_len, c->rows_out_at, err);
        if (rc < 0) {
            return rc;
        }
        c->rows_out_at += c->rows_out_len;
        c->rows_out_len = 0;
    }
    pv_idx_row_put(&row, c->v->width, c->rows_out + c->rows_out_len);
    c->rows_out_len += row_len;
    c->idx_rows++;
    return 0;
}

static int put_entry(pv_compact *c, uint64_t key, uint64_t offset, int32_t size, pv_errinfo *err) {
    uint64_t old_offset;
    int32_t old_size;
    if (offset >= c->v->max_bytes) {
        return pv__fail(err, PV_EFULL, offset, c->v->max_bytes, key, 0);
    }
    int rc = put_row(c, key, offset, size, err);
    if (rc == 0 && c->map != NULL) {
        rc = pv_map_put(c->map, key, offset, size, &old_offset, &old_size);
        if (rc < 0) {
            rc = pv__fail(err, rc, 0, 0, key, 0);
        }
    }
    return rc;
}

static int put_needle(pv_compact *c, const pv_needle *n, uint8_t version, int32_t *size, pv_errinfo *err) {
    uint8_t head[PV_NEEDLE_HEADER + 4];
    uint8_t tail[PV_NEEDLE_TAIL_MAX];
    size_t head_len;
    size_t tail_len;
    int rc = pv_needle_frame(n, version, head, &head_len, tail, sizeof tail, &tail_len, size, err);
    if (rc == 0) {
        rc = put_bytes(c, head, head_len, err);
    }
    if (rc == 0) {
        rc = put_bytes(c, n->data, n->data_size, err);
    }
    if (rc == 0) {
        rc = put_bytes(c, tail, tail_len, err);
    }
    return rc;
}

/* ------------------------------------------------------------------ copying */

/* What a loader or reader could not read either is left behind; anything else may be read tomorrow. */
static bool is_damage(int rc) {
    return rc == PV_EEOF || rc == PV_ESIZE || rc == PV_ECRC || rc == PV_ECORRUPT || rc == PV_EMETA;
}

static void note_dropped(pv_compact *c, uint64_t key, uint64_t offset, int32_t size, int rc) {
    if (c->stats.dropped_needles++ == 0) {
        c->stats.first_dropped_key = key;
        c->stats.first_dropped_offset = offset;
        c->stats.first_dropped_code = rc;
    }
    c->stats.dropped_bytes += size > 0 ? (uint64_t)size : 0;
}

/* A volume with a ttl drops by its own and the time of last modification, as upstream does. Elsewhere a needle with a ttl
 * goes when it could not be read any more: by its own ttl and the time it was appended. */
static bool is_expired(const pv_compact *c, const pv_needle *n) {
    static const uint32_t unit_minutes[] = {0, 1, 60, 1440, 10080, 43200, 525600};
    if (!(n->flags & PV_F_TTL)) {
        return false;
    }
    if (c->volume_ttl_minutes > 0) {
        return c->now_s >= n->last_modified_s + (uint64_t)c->volume_ttl_minutes * 60U;
    }
    if (!(n->flags & PV_F_MTIME) || n->ttl_unit >= PV__ARRAY_LEN(unit_minutes)) {
        return false;
    }
    uint64_t ttl_s = (uint64_t)n->ttl_count * unit_minutes[n->ttl_unit] * 60U;
    return ttl_s > 0 && c->now_s >= n->append_at_ns / 1000000000U + ttl_s;
}

static int copy_item(pv_compact *c, const item *it, pv_errinfo *err) {
    pv_needle n;
    pv_read other = {0};
    pv_errinfo found = {0};
    int rc = it->rc;
    if (rc == 0) {
        rc = pv_needle_parse(c->in + it->at, it->len, c->v->version, it->size, it->offset, 0, &n, &found);
    }
    if (rc == PV_ESIZE && c->v->width == 4) { /* a wrapped offset of an old volume */
        rc = pv__read_record(c->v, c->g, it->offset, it->size, &other, &found);
        n = other.n;
    }
    if (rc < 0) {
        if (!is_damage(rc)) {
            if (err != NULL) {
                *err = found;
            }
            return rc;
        }
        note_dropped(c, it->key, it->offset, it->size, rc);
        return 0;
    }
    if (is_expired(c, &n)) {
        c->stats.expired_needles++;
        c->stats.expired_bytes += it->size > 0 ? (uint64_t)it->size : 0;
        pv_read_free(&other);
        return 0;
    }
    n.id = it->key; /* a blob may stand under another key than its own: then the record gets the key it is found by */
    uint64_t offset = c->dat_end;
    int32_t size = 0;
    rc = put_needle(c, &n, c->v->version, &size, err);
    pv_read_free(&other);
    if (rc == 0) {
        rc = put_entry(c, it->key, offset, size, err);
    }
    c->stats.copied_needles += rc == 0;
    return rc;
}

static int by_offset(const void *a, const void *b) {
    uint64_t x = (*(item *const *)a)->offset;
    uint64_t y = (*(item *const *)b)->offset;
    return (x > y) - (x < y);
}

/* Reads the records of items[0..count), given in file order, into the batch's memory. */
static int read_items(pv_compact *c, item **items, size_t count, pv_errinfo *err) {
    uint64_t file_end = pv__load_u64(&c->g->dat_end);
    for (size_t i = 0; i < count;) {
        uint64_t begin = items[i]->offset;
        uint64_t end = begin + items[i]->len;
        size_t j = i + 1;
        while (j < count && items[j]->offset <= end + RUN_GAP &&
               items[j]->offset + items[j]->len - begin <= RUN_BYTES) {
            end = items[j]->offset + items[j]->len > end ? items[j]->offset + items[j]->len : end;
            j++;
        }
        bool alone = j == i + 1;
        uint8_t *to = alone ? c->in + items[i]->at : c->run;
        size_t want = (size_t)(end - begin);
        size_t got = 0;
        if (begin < file_end) {
            int rc = pv__io_pread(c->g->dat_fd, to, want, begin, &got, err);
            if (rc < 0) {
                return rc;
            }
        }
        for (size_t k = i; k < j; k++) {
            size_t at = (size_t)(items[k]->offset - begin);
            if (at + items[k]->len > got) {
                items[k]->rc = PV_EEOF;
            } else if (!alone) {
                memcpy(c->in + items[k]->at, c->run + at, items[k]->len);
            }
        }
        c->stats.read_bytes += got;
        i = j;
    }
    return 0;
}

static int reserve_in(pv_compact *c, size_t need, pv_errinfo *err) {
    if (need <= c->in_cap) {
        return 0;
    }
    uint8_t *p = pv__realloc(c->in, need, 1);
    if (p == NULL) {
        return pv__fail(err, PV_ENOMEM, need, 0, 0, 0);
    }
    c->in = p;
    c->in_cap = need;
    return 0;
}

/* Takes live rows, ascending by key, into items until the batch is full. Returns how many rows were used. */
static size_t take_items(pv_compact *c, size_t rows, size_t *count, size_t *bytes) {
    uint64_t file_end = pv__load_u64(&c->g->dat_end);
    size_t used = 0;
    *count = 0;
    *bytes = 0;
    for (; used < rows; used++) {
        const pv_idx_row *r = &c->rows[used];
        if (r->offset == 0 || r->size < 0) {
            continue;
        }
        int64_t len = pv_needle_record_len(r->size, c->v->version);
        if (len <= 0 || r->offset >= file_end || (uint64_t)len > file_end - r->offset) {
            note_dropped(c, r->key, r->offset, r->size, PV_EEOF);
            continue;
        }
        if (*count > 0 && *bytes + (size_t)len > BATCH_BYTES) {
            break;
        }
        item *it = &c->items[*count];
        *it = (item){.key = r->key, .offset = r->offset, .size = r->size, .len = (size_t)len, .at = *bytes};
        c->by_offset[*count] = it;
        *bytes += (size_t)len;
        (*count)++;
    }
    return used;
}

static int copy_batch(pv_compact *c, pv_errinfo *err) {
    int rows = pv_map_visit(c->snapshot, c->next_key, c->rows, BATCH_ROWS);
    if (rows < 0) {
        return pv__fail(err, rows, 0, 0, 0, 0);
    }
    size_t count;
    size_t bytes;
    size_t used = take_items(c, (size_t)rows, &count, &bytes);
    int rc = reserve_in(c, bytes, err);
    if (rc < 0) {
        return rc;
    }
    bool sorted = true;
    for (size_t i = 1; i < count && sorted; i++) {
        sorted = c->items[i - 1].offset < c->items[i].offset;
    }
    if (!sorted) {
        qsort(c->by_offset, count, sizeof *c->by_offset, by_offset);
    }
    rc = read_items(c, c->by_offset, count, err);
    for (size_t i = 0; i < count && rc == 0; i++) {
        rc = copy_item(c, &c->items[i], err);
        if (c->items[i].offset > c->stats.source_offset) {
            c->stats.source_offset = c->items[i].offset;
        }
    }
    if (rc < 0) {
        return rc;
    }
    if (used == 0 || (used == (size_t)rows && (size_t)rows < BATCH_ROWS)) {
        c->keys_done = true;
    } else if (c->rows[used - 1].key == UINT64_MAX) {
        c->keys_done = true;
    } else {
        c->next_key = c->rows[used - 1].key + 1;
    }
    return 0;
}

/* ------------------------------------------------------------------ begin, step, finish */

static int open_new(pv_compact *c, const pv_compact_opts *o, pv_errinfo *err) {
    uint8_t block[PV_SUPERBLOCK];
    int rc = pv__io_open(o->cpd_path, O_RDWR | O_CREAT | O_TRUNC, 0644, &c->dat_fd, err);
    if (rc == 0) {
        rc = pv__io_open(o->cpx_path, O_RDWR | O_CREAT | O_TRUNC, 0644, &c->idx_fd, err);
    }
    if (rc == 0) {
        rc = pv__io_allocate(c->dat_fd, o->preallocate_bytes, err);
    }
    if (rc == 0) {
        pv_superblock_put(&o->superblock, block);
        rc = put_bytes(c, block, sizeof block, err);
    }
    return rc;
}

/* The extra area of a super block is carried through unread. */
static int copy_extra(pv_compact *c, pv_errinfo *err) {
    size_t len = c->sb.version == 1 ? 0 : c->sb.extra_size;
    static const uint8_t zeros[8];
    if (len == 0) {
        return 0;
    }
    int rc = reserve_in(c, len, err);
    if (rc == 0) {
        rc = pv__io_pread_full(c->g->dat_fd, c->in, len, PV_SUPERBLOCK, err);
    }
    if (rc == 0) {
        rc = put_bytes(c, c->in, len, err);
    }
    if (rc == 0 && len % 8 != 0) {
        rc = put_bytes(c, zeros, 8 - len % 8, err);
    }
    return rc;
}

int pv_compact_begin(pv_vol *v, const pv_compact_opts *o, pv_compact **out, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    *out = NULL;
    if (o->cpd_path == NULL || o->cpx_path == NULL || (v->flags & PV_VOL_REMOTE)) {
        return pv__fail(err, PV_EINVAL, 0, 0, 0, 0);
    }
    int rc = pv_vol_sync(v, err);
    if (rc < 0) {
        return rc;
    }
    pv_compact *c = pv__calloc(1, sizeof *c);
    if (c == NULL) {
        return pv__fail(err, PV_ENOMEM, sizeof *c, 0, 0, 0);
    }
    c->dat_fd = -1;
    c->idx_fd = -1;
    c->sb = o->superblock;
    c->volume_ttl_minutes = o->volume_ttl_minutes;
    c->now_s = o->now_s;
    c->run = pv__malloc(RUN_BYTES);
    c->out = pv__malloc(OUT_BYTES);
    c->rows_out = pv__malloc(ROWS_OUT * PV__ROW_MAX);
    c->rows = pv__malloc(BATCH_ROWS * sizeof *c->rows);
    c->items = pv__malloc(BATCH_ROWS * sizeof *c->items);
    c->by_offset = pv__malloc(BATCH_ROWS * sizeof(item *));
    if (c->run == NULL || c->out == NULL || c->rows_out == NULL || c->rows == NULL || c->items == NULL ||
        c->by_offset == NULL) {
        pv_compact_free(c);
        return pv__fail(err, PV_ENOMEM, RUN_BYTES, 0, 0, 0);
    }
    /* A reference on the generation that outlives the call: close() frees the handle's own, not this one. */
    gen *g = pv__gen_acquire(v);
    if (g == NULL) {
        pv_compact_free(c);
        return pv__fail(err, PV_ECLOSED, v->vid, 0, 0, 0);
    }
    pv__mutex_lock(&v->state_lock);
    g->refs++;
    pv__mutex_unlock(&v->state_lock);
    c->v = pv_vol_ref(v);
    c->g = g;
    pv__mutex_lock(&v->append_lock);
    while (v->flushing) { /* rows of a batch whose flush fails are taken back */
        pv__cond_wait(&v->flush_cond, &v->append_lock);
    }
    c->rows_seen = pv__load_u64(&g->idx_end) / v->row_len;
    c->stats.caught_up_to = pv__load_u64(&g->dat_end);
    pv__mutex_unlock(&v->append_lock);
    pv__gen_release(v, g);

    uint64_t loaded = 0;
    rc = pv_map_new(v->width, &c->snapshot);
    if (rc == 0 && !(v->flags & PV_VOL_NO_MAP)) {
        rc = pv_map_new(v->width, &c->map);
    }
    if (rc < 0) {
        rc = pv__fail(err, rc, 0, 0, 0, 0);
    } else {
        rc = pv__map_load_rows(c->snapshot, g->idx_fd, 0, c->rows_seen, &loaded, err);
    }
    if (rc == 0) {
        pv_map_stats counted;
        pv_map_stat(c->snapshot, &counted);
        c->stats.live_bytes = counted.file_bytes - counted.deleted_bytes;
        rc = open_new(c, o, err);
    }
    if (rc == 0) {
        rc = copy_extra(c, err);
    }
    if (rc < 0) {
        pv_compact_free(c);
        return rc;
    }
    *out = c;
    return 0;
}

void pv_compact_free(pv_compact *c) {
    if (c == NULL) {
        return;
    }
    if (!c->committed) {
        (void)pv__io_close(c->dat_fd, NULL);
        (void)pv__io_close(c->idx_fd, NULL);
        pv_map_free(c->map);
    }
    pv_map_free(c->snapshot);
    if (c->g != NULL) {
        pv__gen_unref(c->v, c->g);
    }
    pv__free(c->in);
    pv__free(c->run);
    pv__free(c->out);
    pv__free(c->rows_out);
    pv__free(c->rows);
    pv__free(c->items);
    pv__free(c->by_offset);
    pv_vol_unref(c->v);
    pv__free(c);
}

void pv_compact_stat(const pv_compact *c, pv_compact_stats *out) {
    *out = c->stats;
    out->new_dat_bytes = c->dat_end;
    out->new_idx_rows = c->idx_rows;
}

int pv_compact_step(pv_compact *c, uint64_t max_bytes, pv_errinfo *err) {
    pv__err_clear(err);
    if (c->finished) {
        return pv__fail(err, PV_EINVAL, 0, 0, 0, 0);
    }
    uint64_t goal = c->dat_end + max_bytes;
    do {
        if (c->keys_done) {
            return 0;
        }
        int rc = copy_batch(c, err);
        if (rc < 0) {
            return rc;
        }
    } while (c->dat_end < goal);
    return c->keys_done ? 0 : 1;
}

int pv_compact_finish(pv_compact *c, pv_errinfo *err) {
    pv__err_clear(err);
    if (!c->keys_done || c->finished) {
        return pv__fail(err, PV_EINVAL, 0, 0, 0, 0);
    }
    int rc = flush_out(c, err);
    if (rc == 0) {
        rc = pv__io_sync(c->dat_fd, err);
    }
    if (rc == 0) {
        rc = pv__io_sync(c->idx_fd, err);
    }
    if (rc == 0) {
        pv_map_free(c->snapshot);
        c->snapshot = NULL;
        c->finished = true;
    }
    return rc;
}

/* ------------------------------------------------------------------ catching up */

static int by_key_then_row(const void *a, const void *b) {
    const pv_idx_row *x = a;
    const pv_idx_row *y = b;
    if (x->key != y->key) {
        return x->key > y->key ? 1 : -1;
    }
    return (x->reserved > y->reserved) - (x->reserved < y->reserved);
}

static int by_row_offset(const void *a, const void *b) {
    uint64_t x = ((const pv_idx_row *)a)->offset;
    uint64_t y = ((const pv_idx_row *)b)->offset;
    return (x > y) - (x < y);
}

static int copy_raw(pv_compact *c, const pv_idx_row *r, pv_errinfo *err) {
    int64_t len = pv_needle_record_len(r->size, c->v->version);
    uint64_t offset = c->dat_end;
    int rc = reserve_in(c, (size_t)len, err);
    if (rc == 0) {
        rc = pv__io_pread_full(c->g->dat_fd, c->in, (size_t)len, r->offset, err);
    }
    if (rc == 0) {
        rc = put_bytes(c, c->in, (size_t)len, err);
    }
    return rc < 0 ? rc : put_row(c, r->key, offset, r->size, err);
}

static int put_tombstone(pv_compact *c, const pv_idx_row *r, pv_errinfo *err) {
    struct timespec ts = {0};
    if (clock_gettime(CLOCK_REALTIME, &ts) != 0) {
        ts.tv_sec = 0;
    }
    const pv_needle n = {.id = r->key,
                         .cookie = TOMBSTONE_COOKIE,
                         .append_at_ns = (uint64_t)ts.tv_sec * 1000000000U + (uint64_t)ts.tv_nsec};
    uint64_t offset = c->dat_end;
    int32_t size;
    int rc = put_needle(c, &n, c->v->version, &size, err);
    return rc < 0 ? rc : put_row(c, r->key, offset, r->size, err);
}

/* Brings the rows [rows_seen, rows) of the old index into the new files: the newest of each key. */
static int catch_up(pv_compact *c, uint64_t rows, pv_errinfo *err) {
    if (rows <= c->rows_seen) {
        return 0;
    }
    size_t count = (size_t)(rows - c->rows_seen);
    pv_idx_row *all = rows - c->rows_seen > SIZE_MAX / sizeof *all ? NULL : pv__malloc(count * sizeof *all);
    if (all == NULL) {
        return pv__fail(err, PV_ENOMEM, count, 0, 0, 0);
    }
    int rc = 0;
    size_t have = 0;
    while (have < count) {
        rc = pv_idx_read(c->g->idx_fd, c->v->width, c->rows_seen + have, all + have, count - have, err);
        if (rc <= 0) {
            rc = rc < 0 ? rc : pv__fail(err, PV_EEOF, (c->rows_seen + have) * c->v->row_len, count, have, 0);
            goto out;
        }
        have += (size_t)rc;
    }
    for (size_t i = 0; i < count; i++) {
        all[i].reserved = (int32_t)(i & INT32_MAX);
    }
    qsort(all, count, sizeof *all, by_key_then_row);
    size_t newest = 0;
    for (size_t i = 0; i < count; i++) {
        if (i + 1 == count || all[i + 1].key != all[i].key) {
            all[newest++] = all[i];
        }
    }
    qsort(all, newest, sizeof *all, by_row_offset);
    uint64_t first_row = c->idx_rows;
    uint64_t tombstones = 0;
    for (size_t i = 0; i < newest; i++) {
        bool live = all[i].offset != 0 && all[i].size > 0;
        rc = live ? copy_raw(c, &all[i], err) : put_tombstone(c, &all[i], err);
        if (rc < 0) {
            goto out;
        }
        tombstones += all[i].size < 0;
    }
    rc = flush_out(c, err);
    if (rc == 0 && c->map != NULL) {
        uint64_t loaded;
        rc = pv_map_load(c->map, c->idx_fd, first_row, &loaded, err);
        pv__map_count_files(c->map, tombstones); /* upstream counts every row of the catch-up as a file */
    }
    if (rc == 0) {
        c->stats.caught_up_rows += newest;
        c->rows_seen = rows;
    }
out:
    pv__free(all);
    return rc;
}

/* Rounds without a lock, until little is left or writers outrun us. */
static int catch_up_unlocked(pv_compact *c, pv_errinfo *err) {
    pv_vol *v = c->v;
    for (int round = 0; round < CATCH_UP_ROUNDS; round++) {
        pv__mutex_lock(&v->append_lock);
        while (v->flushing) {
            pv__cond_wait(&v->flush_cond, &v->append_lock);
        }
        uint64_t rows = v->gen == c->g ? pv__load_u64(&c->g->idx_end) / v->row_len : c->rows_seen;
        uint64_t bytes = pv__load_u64(&c->g->dat_end) - c->stats.caught_up_to;
        uint64_t dat_end = pv__load_u64(&c->g->dat_end);
        pv__mutex_unlock(&v->append_lock);
        if (rows - c->rows_seen <= LOCKED_ROWS_MAX && bytes <= LOCKED_BYTES_MAX) {
            return 0;
        }
        int rc = catch_up(c, rows, err);
        if (rc < 0) {
            return rc;
        }
        c->stats.caught_up_to = dat_end;
        /* What is on its way to the disk already need not be waited for under the lock. */
        rc = pv__io_datasync(c->dat_fd, err);
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ commit */

static int make_marker(const pv_compact_names *n, pv_errinfo *err) {
    int fd;
    int rc = pv__io_open(n->cpc_path, O_RDWR | O_CREAT, 0644, &fd, err);
    if (rc < 0) {
        return rc;
    }
    rc = pv__io_sync(fd, err);
    int closed = pv__io_close(fd, rc == 0 ? err : NULL);
    rc = rc < 0 ? rc : closed;
    return rc < 0 ? rc : pv__io_sync_dir(n->dat_dir, err);
}

/* After a marker that could not be made. False: it may be on disk. */
static bool take_marker_back(const pv_compact_names *n) {
    pv_errinfo err = {0};
    int rc = pv__io_unlink(n->cpc_path, &err);
    return (rc == 0 || (rc == PV_ESYS && err.sys_errno == ENOENT)) && pv__io_sync_dir(n->dat_dir, NULL) == 0;
}

static int swap_names(const pv_compact_names *n, pv_errinfo *err) {
    int rc = pv__io_rename(n->cpd_path, n->dat_path, err);
    if (rc == 0) {
        rc = pv__io_rename(n->cpx_path, n->idx_path, err);
    }
    if (rc == 0) {
        rc = pv__io_sync_dir(n->dat_dir, err);
    }
    if (rc == 0 && strcmp(n->dat_dir, n->idx_dir) != 0) {
        rc = pv__io_sync_dir(n->idx_dir, err);
    }
    return rc;
}

/* append_lock held, no flush under way. Gives the handle the new files. */
static void install(pv_compact *c, gen *fresh) {
    pv_vol *v = c->v;
    fresh->refs = 1;
    fresh->dat_fd = c->dat_fd;
    fresh->idx_fd = c->idx_fd;
    fresh->map = c->map;
    fresh->sb = c->sb;
    pv__store_u64(&fresh->dat_end, c->dat_end);
    pv__store_u64(&fresh->idx_end, c->idx_rows * v->row_len);
    v->max_row_end = c->dat_end;
    v->flush_failed = false;
    pv__mutex_lock(&v->state_lock);
    gen *old = v->gen;
    fresh->figures = old->figures; /* of a map kept outside: its owner brings them up to date */
    v->gen = fresh;
    pv__mutex_unlock(&v->state_lock);
    c->committed = true;
    pv__gen_unref(v, old);
}

static int commit_locked(pv_compact *c, const pv_compact_names *n, pv_errinfo *err) {
    pv_vol *v = c->v;
    if (v->gen != c->g) { /* another vacuum came first */
        return pv__fail(err, PV_ESTALE, c->sb.compaction_revision, v->gen->sb.compaction_revision, 0, 0);
    }
    gen *fresh = pv__calloc(1, sizeof *fresh);
    if (fresh == NULL) {
        return pv__fail(err, PV_ENOMEM, sizeof *fresh, 0, 0, 0);
    }
    int rc = catch_up(c, pv__load_u64(&c->g->idx_end) / v->row_len, err);
    if (rc == 0) {
        rc = pv__io_sync(c->dat_fd, err);
    }
    if (rc == 0) {
        rc = pv__io_sync(c->idx_fd, err);
    }
    if (rc == 0 && strcmp(n->dat_dir, n->idx_dir) != 0) {
        rc = pv__io_sync_dir(n->idx_dir, err); /* the marker must not outlive the name of the new index */
    }
    if (rc == 0) {
        rc = make_marker(n, err);
        if (rc < 0 && !take_marker_back(n)) {
            /* A marker that may or may not be on disk: with complete new files either is a consistent state, until the
             * next change, so there is none before the caller has removed the new files, then the marker. */
            c->stats.marker_left = 1;
            atomic_store(&v->no_write, true);
            atomic_store(&v->no_delete, true);
        }
    }
    if (rc < 0) {
        pv__free(fresh);
        return rc;
    }
    rc = swap_names(n, err);
    install(c, fresh);
    return rc < 0 ? 1 : 0;
}

int pv_compact_commit(pv_compact *c, const pv_compact_names *names, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    pv_vol *v = c->v;
    if (!c->finished || c->committed) {
        return pv__fail(err, PV_EINVAL, 0, 0, 0, 0);
    }
    int rc = pv__vol_enter(v);
    if (rc < 0) {
        return pv__fail(err, rc, v->vid, 0, 0, 0);
    }
    rc = catch_up_unlocked(c, err);
    if (rc == 0) {
        pv__mutex_lock(&v->append_lock);
        v->swapping = true; /* nobody joins the flush any more, so that it comes to an end */
        while (v->pend_head != NULL || v->flushing) {
            pv__cond_wait(&v->flush_cond, &v->append_lock);
        }
        rc = commit_locked(c, names, err);
        v->swapping = false;
        pv__cond_broadcast(&v->flush_cond);
        pv__mutex_unlock(&v->append_lock);
    }
    pv__vol_leave(v);
    return rc;
}
