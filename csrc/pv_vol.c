/* pv_vol.c - the volume handle: two files, a map, and the one place where records are appended.
 *
 * Generations
 *   The files and the map of a handle form a generation. Readers take a reference on it under state_lock (a few
 *   instructions), then look up and read without any lock of the handle: an overwrite, a delete or a change of
 *   generation never disturbs them, because a data file only grows and an old generation lives until its last reader
 *   lets go. A change of generation needs append_lock, no waiting flush (pend_head == NULL, !flushing), and state_lock
 *   for the pointer itself; so a holder of append_lock, and the leader of a flush, may use v->gen as it stands.
 *
 * Order of an append (append_lock held throughout, except for flushes)
 *   1 record into .dat at dat_end   2 row into .idx at idx_end   3 map entry.
 *   Each step undoes the ones before it if it fails. What cannot be undone (ftruncate fails) turns the handle read-only.
 *
 * Flushed writes (PV_WRITE_FSYNC)
 *   The record is appended and the writer joins the list of pending records; whoever finds no flush under way becomes
 *   the leader, drops append_lock, calls fdatasync(.dat) once for all, and publishes rows and map entries. Unflushed
 *   writers go on meanwhile, so rows of different keys may stand in .idx in another order than their records in .dat.
 *   Three rules keep that harmless:
 *   - A key with a pending record is taken: another write or delete of it waits. So for one key the order of records,
 *     rows and map entries is the same, and replaying .idx, or scanning .dat, gives the same newest state.
 *   - A loader that finds .idx behind .dat takes up the records behind the last indexed one. Rows that reached the disk
 *     are a prefix of .idx (the loader drops those behind a hole), so that finds every acknowledged record as long as
 *     rows stand in the order of records. If one behind ours got its row before us (max_row_end), or an earlier flush
 *     failed (a gap in .dat could stop the loader's scan), the leader also flushes .idx before it publishes.
 *   - The kernel reports a failed write-back once, and may count pages as clean after it. So all flushes of one handle
 *     go through flush_pending, and a failure fails every pending record, also those that joined during the flush.
 *   Failed records at the end of .dat are cut off. A failed record with others behind it stays as an orphan and is made
 *   harmless: cookie and id are zeroed and its checksum is broken; one without data is zeroed altogether. So a scan
 *   steps over it and sees a damaged record or a zero-filled region, not a needle. (Zeroing needs another write to a
 *   disk that just failed one; if that is lost too, a loader that also lost the rows behind it can bring the
 *   unacknowledged record back. A later acknowledged write of the key still wins: it stands further on.)
 *
 * Lock order: append_lock, then state_lock or the map's lock, which are both taken last.
 */
#include "pv_vol_int.h"

#include <fcntl.h>
#include <time.h>

#define TIB8 ((uint64_t)1 << 43)
#define FILE_MODE 0644U
#define ALIGN 8U
#define DATA_SIZE_BYTES 4U
#define CHECKSUM_BYTES 4U
#define TIME_BYTES 8U
#define NOWAIT_NS 500000     /* what PV_WRITE_NOWAIT waits nevertheless */
#define META_SPAN_MAX 131072 /* upstream's bound on what follows the data of a needle read without its data */

/* pv_errinfo.d of a failed write */
#define AT_EXISTING 1U
#define AT_INDEX 2U
#define AT_FLUSH 4U
#define AT_ROLLBACK 8U

static uint64_t now_ns(void) {
    struct timespec ts;
    if (clock_gettime(CLOCK_REALTIME, &ts) != 0 || ts.tv_sec < 0) {
        return 0;
    }
    return (uint64_t)ts.tv_sec * 1000000000U + (uint64_t)ts.tv_nsec;
}

static uint64_t round_up(uint64_t n) {
    return (n + (ALIGN - 1)) & ~(uint64_t)(ALIGN - 1);
}

/* Only errno 5 counts, and only without a break: upstream gives up a volume after three in a row. */
static void note_io(pv_vol *v, int rc, const pv_errinfo *err) {
    if (PV__UNLIKELY(rc == PV_ESYS && err->sys_errno == EIO)) {
        atomic_fetch_add(&v->eio_count, 1);
    } else if (PV__UNLIKELY(atomic_load_explicit(&v->eio_count, memory_order_relaxed) != 0)) {
        pv__store_u64(&v->eio_count, 0);
    }
}

/* ------------------------------------------------------------------ running calls and generations */

static void gen_free(gen *g) {
    if (g == NULL) {
        return;
    }
    (void)pv__io_close(g->dat_fd, NULL);
    (void)pv__io_close(g->idx_fd, NULL);
    pv_map_free(g->map);
    pv__free(g);
}

int pv__vol_enter(pv_vol *v) {
    int rc = PV_ECLOSED;
    pv__mutex_lock(&v->state_lock);
    if (!v->closing) {
        v->ops++;
        rc = 0;
    }
    pv__mutex_unlock(&v->state_lock);
    return rc;
}

/* state_lock held. */
static void op_end(pv_vol *v) {
    v->ops--;
    if (v->ops == 0 && v->closing) {
        pv__cond_broadcast(&v->state_cond);
    }
}

void pv__vol_leave(pv_vol *v) {
    pv__mutex_lock(&v->state_lock);
    op_end(v);
    pv__mutex_unlock(&v->state_lock);
}

/* For readers: a running call with a reference on the generation. NULL once the handle is closed. */
gen *pv__gen_acquire(pv_vol *v) {
    gen *g = NULL;
    pv__mutex_lock(&v->state_lock);
    if (!v->closing) {
        v->ops++;
        g = v->gen;
        g->refs++;
    }
    pv__mutex_unlock(&v->state_lock);
    return g;
}

void pv__gen_release(pv_vol *v, gen *g) {
    pv__mutex_lock(&v->state_lock);
    bool last = --g->refs == 0;
    op_end(v);
    pv__mutex_unlock(&v->state_lock);
    if (last) {
        gen_free(g);
    }
}

void pv__gen_unref(pv_vol *v, gen *g) {
    pv__mutex_lock(&v->state_lock);
    bool last = --g->refs == 0;
    pv__mutex_unlock(&v->state_lock);
    if (last) {
        gen_free(g);
    }
}

/* ------------------------------------------------------------------ open */

static int open_files(const pv_vol_opts *o, gen *g, pv_errinfo *err) {
    int rc = 0;
    if (!(o->flags & PV_VOL_REMOTE)) {
        int dat_flags = (o->flags & PV_VOL_DAT_READONLY) ? O_RDONLY : O_RDWR;
        if (o->flags & PV_VOL_CREATE) {
            dat_flags |= O_CREAT | O_TRUNC;
        }
        rc = pv__io_open(o->dat_path, dat_flags, FILE_MODE, &g->dat_fd, err);
        if (rc < 0) {
            return rc;
        }
    }
    int idx_flags = (o->flags & PV_VOL_IDX_READONLY) ? O_RDONLY : O_RDWR | O_CREAT;
    rc = pv__io_open(o->idx_path, idx_flags, FILE_MODE, &g->idx_fd, err);
    if (rc < 0) {
        err->d = 1;
    }
    return rc;
}

/* Makes the name of a new file durable. A directory that may not be opened or synced is no error, a broken disk is. */
static int sync_parent(const char *path, pv_errinfo *err) {
    const char *slash = strrchr(path, '/');
    size_t len = slash == NULL ? 1 : slash == path ? 1 : (size_t)(slash - path);
    char *dir = pv__malloc(len + 1);
    if (dir == NULL) {
        return pv__fail(err, PV_ENOMEM, len + 1, 0, 0, 0);
    }
    memcpy(dir, slash == NULL ? "." : path, len);
    dir[len] = '\0';
    int rc = pv__io_sync_dir(dir, err);
    pv__free(dir);
    if (rc == PV_ESYS && err->sys_errno != EIO) {
        pv__err_clear(err);
        rc = 0;
    }
    return rc;
}

static int create_content(const pv_vol_opts *o, gen *g, pv_errinfo *err) {
    uint8_t block[PV_SUPERBLOCK];
    int rc = pv__io_allocate(g->dat_fd, o->preallocate_bytes, NULL);
    if (rc < 0) {
        /* As upstream: a volume without its reservation is better than none. */
    }
    pv_superblock_put(&o->superblock, block);
    rc = pv__io_pwrite(g->dat_fd, block, sizeof block, 0, err);
    if (rc < 0) {
        return rc;
    }
    rc = sync_parent(o->dat_path, err);
    if (rc < 0) {
        return rc;
    }
    rc = sync_parent(o->idx_path, err);
    if (rc < 0) {
        err->d = 1;
    }
    return rc;
}

static bool version_ok(uint8_t version) {
    return version >= 1 && version <= 3;
}

/* The append time of the record that the last index row points to, 0 if it cannot be read. */
static uint64_t last_row_time(pv_vol *v, gen *g, uint64_t idx_size) {
    pv_idx_row row;
    uint8_t buf[TIME_BYTES];
    uint64_t rows = idx_size / v->row_len;
    if (v->version != 3 || rows == 0 || pv_idx_read(g->idx_fd, v->width, rows - 1, &row, 1, NULL) != 1 ||
        row.offset == 0) {
        return 0;
    }
    uint64_t at = row.offset + PV_NEEDLE_HEADER + (row.size > 0 ? (uint64_t)row.size : 0) + CHECKSUM_BYTES;
    return pv__io_pread_full(g->dat_fd, buf, sizeof buf, at, NULL) < 0 ? 0 : pv__get_be64(buf);
}

/* The super block and the length of the data. */
static int load_data(const pv_vol_opts *o, gen *g, uint64_t *dat_size, pv_errinfo *err) {
    if (o->flags & PV_VOL_REMOTE) {
        g->sb = o->superblock;
        *dat_size = o->remote_bytes;
        return 0;
    }
    uint8_t block[PV_SUPERBLOCK];
    int rc = pv__io_pread_full(g->dat_fd, block, sizeof block, 0, err);
    if (rc < 0) {
        return rc;
    }
    pv_superblock_parse(block, &g->sb);
    return pv__io_size(g->dat_fd, dat_size, err);
}

static int load(pv_vol *v, const pv_vol_opts *o, gen *g, pv_errinfo *err) {
    uint64_t dat_size;
    uint64_t idx_size;
    int rc = load_data(o, g, &dat_size, err);
    if (rc < 0) {
        return rc;
    }
    if (!version_ok(g->sb.version)) {
        return pv__fail(err, PV_EVERSION, g->sb.version, 0, 0, 0);
    }
    v->version = o->version != 0 ? o->version : g->sb.version;
    rc = pv__io_size(g->idx_fd, &idx_size, err);
    if (rc < 0) {
        err->d = 1;
        return rc;
    }
    if (idx_size % v->row_len != 0) {
        return pv__fail(err, PV_EALIGN, idx_size, 0, 0, 1);
    }
    uint64_t first = round_up(PV_SUPERBLOCK + (uint64_t)(g->sb.version == 1 ? 0 : g->sb.extra_size));
    if (!(o->flags & PV_VOL_REMOTE)) {
        dat_size = round_up(dat_size);
        dat_size = dat_size > first ? dat_size : first;
    }
    pv__store_u64(&g->dat_end, dat_size);
    pv__store_u64(&g->idx_end, idx_size);
    uint64_t found_ns = (o->flags & PV_VOL_REMOTE) ? 0 : last_row_time(v, g, idx_size);
    pv__store_u64(&v->last_append_at_ns, found_ns > o->last_append_at_ns ? found_ns : o->last_append_at_ns);
    if (o->flags & PV_VOL_NO_MAP) {
        return 0;
    }
    if (o->flags & PV_VOL_SORTED_MAP) {
        rc = pv_map_open_sorted(v->width, o->sdx_path, g->idx_fd, &g->map, err);
        if (rc < 0) {
            err->d = 2;
        }
        return rc;
    }
    rc = pv_map_new(v->width, &g->map);
    if (rc < 0) {
        return pv__fail(err, rc, 0, 0, 0, 0);
    }
    uint64_t rows;
    rc = pv_map_load(g->map, g->idx_fd, 0, &rows, err);
    if (rc < 0 && err->code == PV_ESYS) {
        err->d = 1;
    }
    return rc;
}

static int locks_init(pv_vol *v) {
    if (pv__mutex_init(&v->state_lock) < 0) {
        return PV_ENOMEM;
    }
    if (pv__cond_init(&v->state_cond) < 0) {
        goto no_state_cond;
    }
    if (pv__mutex_init(&v->append_lock) < 0) {
        goto no_append_lock;
    }
    if (pv__cond_init(&v->flush_cond) == 0) {
        return 0;
    }
    pv__must(pthread_mutex_destroy(&v->append_lock));
no_append_lock:
    pv__must(pthread_cond_destroy(&v->state_cond));
no_state_cond:
    pv__must(pthread_mutex_destroy(&v->state_lock));
    return PV_ENOMEM;
}

static void vol_free(pv_vol *v) {
    pv__must(pthread_cond_destroy(&v->flush_cond));
    pv__must(pthread_mutex_destroy(&v->append_lock));
    pv__must(pthread_cond_destroy(&v->state_cond));
    pv__must(pthread_mutex_destroy(&v->state_lock));
    pv__free(v);
}

static bool opts_ok(const pv_vol_opts *o) {
    if (o->dat_path == NULL || o->idx_path == NULL || (o->offset_width != 4 && o->offset_width != 5)) {
        return false;
    }
    if ((o->version != 0 && !version_ok(o->version)) || ((o->flags & PV_VOL_SORTED_MAP) && o->sdx_path == NULL)) {
        return false;
    }
    if ((o->flags & PV_VOL_REMOTE) && (o->flags & (PV_VOL_CREATE | PV_VOL_NO_MAP | PV_VOL_DAT_READONLY))) {
        return false;
    }
    if (o->flags & PV_VOL_CREATE) {
        /* What stands in the extra area is not known here, so a new volume has none. */
        return (o->flags & (PV_VOL_DAT_READONLY | PV_VOL_IDX_READONLY)) == 0 && o->superblock.extra_size == 0;
    }
    return true;
}

int pv_vol_open(const pv_vol_opts *opts, pv_vol **out, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    *out = NULL;
    if (!opts_ok(opts)) {
        return pv__fail(err, PV_EINVAL, opts->offset_width, opts->version, opts->flags, 0);
    }
    if ((opts->flags & PV_VOL_CREATE) && !version_ok(opts->superblock.version)) {
        return pv__fail(err, PV_EVERSION, opts->superblock.version, 0, 0, 0);
    }
    pv_vol *v = pv__calloc(1, sizeof *v);
    gen *g = pv__calloc(1, sizeof *g);
    if (v == NULL || g == NULL || locks_init(v) < 0) {
        pv__free(v);
        pv__free(g);
        return pv__fail(err, PV_ENOMEM, sizeof *v, 0, 0, 0);
    }
    atomic_init(&v->refs, 1);
    v->vid = opts->vid;
    v->flags = opts->flags;
    v->width = opts->offset_width;
    v->row_len = 12U + opts->offset_width;
    v->has_ttl = opts->has_ttl != 0;
    v->max_bytes = opts->max_volume_bytes != 0 ? opts->max_volume_bytes : opts->offset_width == 4 ? PV__GIB32 : TIB8;
    bool files_ro = (opts->flags & (PV_VOL_DAT_READONLY | PV_VOL_IDX_READONLY)) != 0;
    atomic_init(&v->no_write, files_ro || (opts->flags & (PV_VOL_SORTED_MAP | PV_VOL_REMOTE | PV_VOL_NO_WRITE |
                                                          PV_VOL_NO_DELETE)) != 0);
    atomic_init(&v->no_delete, files_ro || (opts->flags & PV_VOL_NO_DELETE) != 0);
    atomic_init(&v->flush_failed, (opts->flags & PV_VOL_FLUSH_FAILED) != 0);
    g->refs = 1;
    g->dat_fd = -1;
    g->idx_fd = -1;
    v->gen = g;

    int rc = open_files(opts, g, err);
    if (rc == 0 && (opts->flags & PV_VOL_CREATE)) {
        rc = create_content(opts, g, err);
    }
    if (rc == 0) {
        rc = load(v, opts, g, err);
    }
    if (rc < 0) {
        gen_free(g);
        vol_free(v);
        return rc;
    }
    *out = v;
    return 0;
}

pv_vol *pv_vol_ref(pv_vol *v) {
    (void)atomic_fetch_add_explicit(&v->refs, 1, memory_order_relaxed);
    return v;
}

void pv_vol_unref(pv_vol *v) {
    if (v == NULL || atomic_fetch_sub_explicit(&v->refs, 1, memory_order_acq_rel) != 1) {
        return;
    }
    if (pv_vol_close(v, NULL) < 0) {
        /* Nobody is left to be told: who wants to know closes first. */
    }
    vol_free(v);
}

static int sync_for_close(const pv_vol *v, gen *g, pv_errinfo *err) {
    int rc = 0;
    if (!(v->flags & PV_VOL_IDX_READONLY)) {
        rc = pv__io_datasync(g->idx_fd, err);
        if (rc < 0) {
            err->d = 1;
        }
    }
    if (!(v->flags & (PV_VOL_DAT_READONLY | PV_VOL_REMOTE))) {
        pv_errinfo dat_err = {0};
        int dat_rc = pv__io_datasync(g->dat_fd, &dat_err);
        if (dat_rc < 0) { /* the worse of the two */
            *err = dat_err;
            rc = dat_rc;
        }
    }
    return rc;
}

int pv_vol_close(pv_vol *v, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    pv__mutex_lock(&v->state_lock);
    if (v->closing) {
        while (!v->closed) {
            pv__cond_wait(&v->state_cond, &v->state_lock);
        }
        pv__mutex_unlock(&v->state_lock);
        return 0;
    }
    v->closing = true;
    while (v->ops > 0) {
        pv__cond_wait(&v->state_cond, &v->state_lock);
    }
    gen *g = v->gen; /* no call runs and none can begin: it is ours */
    pv__mutex_unlock(&v->state_lock);

    int rc = sync_for_close(v, g, err);
    pv_map_stats map_stats = g->figures;
    if (g->map != NULL) {
        pv_map_stat(g->map, &map_stats);
    }
    map_stats.memory_bytes = 0;
    pv__mutex_lock(&v->state_lock);
    v->last_sb = g->sb;
    v->last_map = map_stats;
    v->last_dat_end = pv__load_u64(&g->dat_end);
    v->last_idx_end = pv__load_u64(&g->idx_end);
    v->gen = NULL;
    v->closed = true;
    bool last = --g->refs == 0; /* a vacuum that was given up may still look at it */
    pv__cond_broadcast(&v->state_cond);
    pv__mutex_unlock(&v->state_lock);
    if (last) {
        gen_free(g);
    }
    return rc;
}

/* ------------------------------------------------------------------ looking at the handle */

int pv_vol_stat(pv_vol *v, pv_vol_stats *out) {
    memset(out, 0, sizeof *out);
    pv_map_stats map_stats = {0};
    gen *g = pv__gen_acquire(v);
    if (g != NULL) {
        if (g->map != NULL) {
            pv_map_stat(g->map, &map_stats);
        } else {
            pv__mutex_lock(&v->state_lock);
            map_stats = g->figures;
            pv__mutex_unlock(&v->state_lock);
        }
        out->dat_bytes = pv__load_u64(&g->dat_end);
        out->idx_bytes = pv__load_u64(&g->idx_end);
        out->compaction_revision = g->sb.compaction_revision;
        pv__gen_release(v, g);
    } else {
        pv__mutex_lock(&v->state_lock);
        while (!v->closed) {
            pv__cond_wait(&v->state_cond, &v->state_lock);
        }
        map_stats = v->last_map;
        out->dat_bytes = v->last_dat_end;
        out->idx_bytes = v->last_idx_end;
        out->compaction_revision = v->last_sb.compaction_revision;
        out->closed = 1;
        pv__mutex_unlock(&v->state_lock);
    }
    out->file_count = map_stats.file_count;
    out->file_bytes = map_stats.file_bytes;
    out->deleted_count = map_stats.deleted_count;
    out->deleted_bytes = map_stats.deleted_bytes;
    out->max_key = map_stats.max_key;
    out->map_entries = map_stats.entries;
    out->map_bytes = map_stats.memory_bytes;
    out->last_append_at_ns = pv__load_u64(&v->last_append_at_ns);
    out->last_modified_s = pv__load_u64(&v->last_modified_s);
    out->last_write_wall_s = pv__load_u64(&v->last_write_wall_s);
    out->eio_count = pv__load_u64(&v->eio_count);
    out->flush_count = pv__load_u64(&v->flush_count);
    out->flushed_records = pv__load_u64(&v->flushed_records);
    out->vid = v->vid;
    out->version = v->version;
    out->offset_width = v->width;
    out->no_write = atomic_load(&v->no_write);
    out->no_delete = atomic_load(&v->no_delete);
    out->flush_failed = atomic_load(&v->flush_failed);
    return 0;
}

void pv_vol_superblock(pv_vol *v, pv_superblock *out) {
    pv__mutex_lock(&v->state_lock);
    *out = v->gen != NULL ? v->gen->sb : v->last_sb;
    pv__mutex_unlock(&v->state_lock);
}

static int found_in(const gen *g, int rc, pv_entry *out) {
    out->revision = g->sb.compaction_revision;
    return rc == 0 && out->offset == 0 ? PV_ENOTFOUND : rc;
}

static int gen_lookup(const gen *g, uint64_t id, pv_entry *out) {
    return found_in(g, pv_map_get(g->map, id, &out->offset, &out->size), out);
}

static int lookup(pv_vol *v, uint64_t id, bool cached, pv_entry *out) {
    memset(out, 0, sizeof *out);
    gen *g = pv__gen_acquire(v);
    if (g == NULL) {
        return PV_ECLOSED;
    }
    int rc = PV_EINVAL;
    if (g->map != NULL) {
        rc = cached ? found_in(g, pv__map_get_cached(g->map, id, &out->offset, &out->size), out)
                    : gen_lookup(g, id, out);
    }
    pv__gen_release(v, g);
    return rc;
}

int pv_vol_lookup(pv_vol *v, uint64_t id, pv_entry *out) {
    return lookup(v, id, false, out);
}

int pv_vol_lookup_cached(pv_vol *v, uint64_t id, pv_entry *out) {
    return lookup(v, id, true, out);
}

int pv_vol_visit(pv_vol *v, uint64_t from, pv_idx_row *rows, size_t max) {
    gen *g = pv__gen_acquire(v);
    if (g == NULL) {
        return PV_ECLOSED;
    }
    int rc = g->map == NULL || max > INT32_MAX ? PV_EINVAL : pv_map_visit(g->map, from, rows, max);
    pv__gen_release(v, g);
    return rc;
}

/* ------------------------------------------------------------------ reading */

/* Every length from a file is held against the file's own before memory is asked for. */
static int check_span(gen *g, uint64_t offset, uint64_t len, pv_errinfo *err) {
    uint64_t end = pv__load_u64(&g->dat_end);
    if (offset > end || len > end - offset) {
        return pv__fail(err, PV_EEOF, offset, len, offset < end ? end - offset : 0, 0);
    }
    return 0;
}

/* Reads and parses one whole record, at exactly this offset. On error nothing is given. */
static int read_record_at(const pv_vol *v, gen *g, uint64_t offset, int32_t size, bool cached, pv_read *out,
                          pv_errinfo *err) {
    size_t len = (size_t)pv_needle_record_len(size, v->version); /* size >= 0, so it is positive */
    int rc = check_span(g, offset, len, err);
    if (rc < 0) {
        return rc;
    }
    uint8_t *buf = pv__malloc(len);
    if (buf == NULL) {
        return pv__fail(err, PV_ENOMEM, len, 0, 0, 0);
    }
    /* Padding that is cut off counts as missing data, as upstream has it. */
    rc = cached ? pv__io_pread_cached(g->dat_fd, buf, len, offset, err)
                : pv__io_pread_full(g->dat_fd, buf, len, offset, err);
    if (rc == 0) {
        rc = pv_needle_parse(buf, len, v->version, size, offset, 0, &out->n, err);
    }
    if (rc < 0) {
        pv__free(buf);
        return rc;
    }
    out->buf = buf;
    out->buf_len = len;
    out->data_offset = offset + PV_NEEDLE_HEADER + (v->version == 1 ? 0 : DATA_SIZE_BYTES);
    return 0;
}

/* The same, with the second try of 4-byte volumes: offsets of volumes that outgrew 32 GiB had wrapped. */
static int read_record(const pv_vol *v, gen *g, uint64_t offset, int32_t size, bool cached, pv_read *out,
                       pv_errinfo *err) {
    int rc = read_record_at(v, g, offset, size, cached, out, err);
    if (PV__UNLIKELY(rc == PV_ESIZE) && v->width == 4) {
        rc = read_record_at(v, g, offset + PV__GIB32, size, cached, out, err);
    }
    return rc;
}

int pv__read_record(const pv_vol *v, gen *g, uint64_t offset, int32_t size, pv_read *out, pv_errinfo *err) {
    return read_record(v, g, offset, size, false, out, err);
}

static int read_meta_at(const pv_vol *v, gen *g, uint64_t offset, int32_t size, pv_read *out, pv_errinfo *err) {
    uint8_t head[PV_NEEDLE_HEADER + DATA_SIZE_BYTES];
    uint64_t len = (uint64_t)pv_needle_record_len(size, v->version);
    pv_needle *n = &out->n;
    int rc = check_span(g, offset, len, err);
    if (rc == 0) {
        rc = pv__io_pread_full(g->dat_fd, head, sizeof head, offset, err);
    }
    if (rc < 0) {
        return rc;
    }
    memset(n, 0, sizeof *n);
    pv_needle_header(head, &n->cookie, &n->id, &n->size);
    if (n->size != size) {
        return pv__fail(err, PV_ESIZE, offset, n->id, (uint32_t)n->size, (uint64_t)(int64_t)size);
    }
    n->data_size = pv__get_be32(head + PV_NEEDLE_HEADER);
    int64_t span = (int64_t)len - (int64_t)sizeof head - (int64_t)n->data_size;
    if (span < 0 || span > META_SPAN_MAX) {
        return pv__fail(err, PV_EMETA, (uint64_t)span, n->data_size, (uint32_t)size, offset);
    }
    uint8_t *buf = pv__malloc((size_t)span + 1); /* never 0 bytes */
    if (buf == NULL) {
        return pv__fail(err, PV_ENOMEM, (uint64_t)span + 1, 0, 0, 0);
    }
    rc = pv__io_pread_full(g->dat_fd, buf, (size_t)span, offset + sizeof head + n->data_size, err);
    if (rc == 0) {
        rc = pv_needle_parse_tail(buf, (size_t)span, v->version, n, err);
    }
    if (rc < 0) {
        pv__free(buf);
        return rc;
    }
    out->buf = buf;
    out->buf_len = (size_t)span;
    out->data_offset = offset + sizeof head;
    out->meta_only = 1;
    return 0;
}

static int read_meta(const pv_vol *v, gen *g, uint64_t offset, int32_t size, pv_read *out, pv_errinfo *err) {
    int rc = read_meta_at(v, g, offset, size, out, err);
    if (PV__UNLIKELY(rc == PV_ESIZE) && v->width == 4) {
        rc = read_meta_at(v, g, offset + PV__GIB32, size, out, err);
    }
    return rc;
}

static int read_entry(pv_vol *v, gen *g, uint64_t id, uint32_t flags, pv_read *out, pv_errinfo *err) {
    int32_t size = out->entry.size;
    if (out->entry.offset == 0) {
        return pv__fail(err, PV_ENOTFOUND, 0, 0, id, 0);
    }
    if (size < 0) {
        uint64_t old = size == -1 ? 0 : (uint64_t)-(int64_t)size;
        if (!(flags & PV_READ_DELETED) || old == 0 || old > INT32_MAX) {
            return pv__fail(err, PV_EDELETED, old, 0, id, 0);
        }
        size = (int32_t)old;
    }
    if (size == 0) {
        out->n.id = id;
        out->n.version = v->version;
        out->empty = 1;
        return 0;
    }
    int rc = 0;
    bool whole = true;
    if ((flags & PV_READ_META_OK) && size > PV_META_ONLY_ABOVE && v->version != 1) {
        rc = read_meta(v, g, out->entry.offset, size, out, err);
        whole = rc == 0 && (out->n.flags & (PV_F_COMPRESSED | PV_F_MANIFEST)) != 0;
        if (whole) { /* those are needed whole: start again */
            pv_read_free(out);
            out->meta_only = 0;
        }
    }
    if (rc == 0 && whole) {
        rc = read_record(v, g, out->entry.offset, size, (flags & PV_READ_CACHED) != 0, out, err);
    }
    if (!(flags & PV_READ_CACHED) || rc == 0) { /* a miss of the page cache says nothing of the disk */
        note_io(v, rc, err);
    }
    return rc;
}

int pv_vol_read(pv_vol *v, uint64_t id, uint32_t flags, const pv_entry *entry, pv_read *out, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    memset(out, 0, sizeof *out);
    gen *g = pv__gen_acquire(v);
    if (g == NULL) {
        return pv__fail(err, PV_ECLOSED, v->vid, 0, id, 0);
    }
    int rc = 0;
    if (v->flags & PV_VOL_REMOTE) {
        rc = pv__fail(err, PV_EINVAL, flags, 0, id, 0);
    } else if (flags & PV_READ_ENTRY) {
        out->entry = *entry;
        if (entry->revision != g->sb.compaction_revision) {
            rc = pv__fail(err, PV_ESTALE, entry->revision, g->sb.compaction_revision, id, 0);
        }
    } else if (g->map == NULL) {
        rc = pv__fail(err, PV_EINVAL, flags, 0, id, 0);
    } else {
        rc = gen_lookup(g, id, &out->entry);
        if (rc < 0) {
            rc = pv__fail(err, rc, 0, 0, id, 0);
        }
    }
    if (rc == 0) {
        rc = read_entry(v, g, id, flags, out, err);
    }
    pv__gen_release(v, g);
    if (rc < 0) {
        memset(out, 0, sizeof *out);
    }
    return rc;
}

void pv_read_free(pv_read *r) {
    pv__free(r->buf);
    r->buf = NULL;
    r->buf_len = 0;
}

void pv_buf_free(uint8_t *buf) {
    pv__free(buf);
}

int pv_vol_pread(pv_vol *v, uint64_t offset, uint8_t *buf, size_t len, uint32_t revision, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    gen *g = pv__gen_acquire(v);
    if (g == NULL) {
        return pv__fail(err, PV_ECLOSED, v->vid, 0, 0, 0);
    }
    int rc;
    if (v->flags & PV_VOL_REMOTE) {
        rc = pv__fail(err, PV_EINVAL, offset, len, 0, 0);
    } else if (revision != g->sb.compaction_revision) {
        rc = pv__fail(err, PV_ESTALE, revision, g->sb.compaction_revision, 0, 0);
    } else {
        rc = pv__io_pread_full(g->dat_fd, buf, len, offset, err);
        note_io(v, rc, err);
    }
    pv__gen_release(v, g);
    return rc;
}

/* ------------------------------------------------------------------ appending: the two files
 * All of these need append_lock. */

/* Cuts a file back to end, if it is longer. A file that is not keeps what is reserved behind its end. */
static int cut_back(int fd, uint64_t end) {
    uint64_t size;
    int rc = pv__io_size(fd, &size, NULL);
    return rc < 0 ? rc : size > end ? pv__io_truncate(fd, end, NULL) : 0;
}

/* Takes back what stands behind end. If that fails the handle stops writing: what follows could not be told from it. */
static void roll_back(pv_vol *v, int fd, uint64_t end, pv_errinfo *err) {
    if (cut_back(fd, end) < 0) {
        v->torn = true;
        atomic_store(&v->no_write, true);
        atomic_store(&v->no_delete, true);
        err->d |= AT_ROLLBACK;
    }
}

/* Writes a record at dat_end, which the caller moves. On failure nothing is left of it. */
static int append_record(pv_vol *v, gen *g, const struct iovec *iov, int iov_count, pv_errinfo *err) {
    uint64_t end = pv__load_u64(&g->dat_end);
    int rc = pv__io_pwritev(g->dat_fd, iov, iov_count, end, err);
    note_io(v, rc, err);
    if (rc < 0) {
        roll_back(v, g->dat_fd, end, err);
        return rc;
    }
    pv__store_u64(&v->last_write_wall_s, now_ns() / 1000000000U);
    return 0;
}

/* Writes one row at idx_end and moves it. On failure nothing is left of it. */
static int append_row(pv_vol *v, gen *g, const pv_idx_row *row, uint64_t record_len, pv_errinfo *err) {
    uint8_t buf[PV__ROW_MAX];
    uint64_t end = pv__load_u64(&g->idx_end);
    pv_idx_row_put(row, v->width, buf);
    int rc = pv__io_pwrite(g->idx_fd, buf, v->row_len, end, err);
    if (rc < 0) {
        err->d |= AT_INDEX;
        roll_back(v, g->idx_fd, end, err);
        return rc;
    }
    pv__store_u64(&g->idx_end, end + v->row_len);
    if (row->offset + record_len > v->max_row_end) {
        v->max_row_end = row->offset + record_len;
    }
    return 0;
}

/* Counts a change of a map that is kept outside, as upstream's leveldb map counts. */
static void count_change(pv_vol *v, gen *g, const pend *p) {
    pv_map_stats *f = &g->figures;
    pv__mutex_lock(&v->state_lock);
    if (p->row.size >= 0) {
        f->file_count++;
        f->file_bytes += (uint64_t)p->row.size;
        f->max_key = p->row.key > f->max_key ? p->row.key : f->max_key;
    }
    if (p->has_prior && p->prior.size > 0) {
        f->deleted_count++;
        f->deleted_bytes += (uint64_t)p->prior.size;
    }
    pv__mutex_unlock(&v->state_lock);
}

static int map_apply(pv_vol *v, gen *g, const pend *p, pv_errinfo *err) {
    const pv_idx_row *row = &p->row;
    uint64_t old_offset;
    int32_t old_size;
    int rc = 0;
    if (row->size < 0 && p->prior.size < 0) {
        return 0; /* a second tombstone: the map says so already */
    }
    if (g->map == NULL) {
        count_change(v, g, p);
    } else {
        rc = row->size < 0 ? pv_map_delete(g->map, row->key, &old_size)
                           : pv_map_put(g->map, row->key, row->offset, row->size, &old_offset, &old_size);
    }
    return rc < 0 ? pv__fail(err, rc, 0, 0, row->key, 0) : 0;
}

/* The time for a record behind one of time last: rising, whatever the clock does. */
static uint64_t append_ns_after(uint64_t last) {
    uint64_t now = now_ns();
    /* A record that claims the end of time came from a damaged file: begin anew. */
    return now > last || last == UINT64_MAX ? now : last + 1;
}

static uint64_t next_append_ns(pv_vol *v) {
    return append_ns_after(pv__load_u64(&v->last_append_at_ns));
}

/* ------------------------------------------------------------------ appending: flushes
 * All of these need append_lock. */

static bool key_is_pending(const pv_vol *v, uint64_t key) {
    for (const pend *p = v->pend_head; p != NULL; p = p->next) {
        if (p->row.key == key) {
            return true;
        }
    }
    return false;
}

/* Brings an index row to nothing that could not be cut off: a later row that says what holds without it. If this one
 * cannot be written either, a reload finds the record that its writer was told had failed. */
static void append_counter_row(pv_vol *v, gen *g, const pend *p) {
    pv_idx_row row = {.key = p->row.key, .offset = 0, .size = -1};
    if (p->has_prior && p->prior.size >= 0) {
        row.offset = p->prior.offset;
        row.size = p->prior.size;
    }
    pv_errinfo ignored = {0};
    (void)append_row(v, g, &row, 0, &ignored);
}

/* Makes a failed record that others stand behind unfit to be taken up by a scan; best effort. */
static void spoil_record(const gen *g, const pend *p) {
    static const uint8_t zeros[32]; /* the longest record without data */
    uint8_t head[PV_NEEDLE_HEADER];
    uint8_t sum[CHECKSUM_BYTES];
    uint32_t cookie;
    uint64_t id;
    int32_t size;
    if (pv__io_pread_full(g->dat_fd, head, sizeof head, p->row.offset, NULL) < 0) {
        return;
    }
    pv_needle_header(head, &cookie, &id, &size);
    uint64_t sum_at = p->row.offset + PV_NEEDLE_HEADER + (size > 0 ? (uint64_t)size : 0);
    if (size > 0 && pv__io_pread_full(g->dat_fd, sum, sizeof sum, sum_at, NULL) == 0) {
        uint32_t good = pv__get_be32(sum);
        uint32_t bad = ~good == pv_crc_legacy(good) ? good ^ 1U : ~good;
        pv__put_be32(sum, bad);
        if (pv__io_pwrite(g->dat_fd, sum, sizeof sum, sum_at, NULL) < 0) {
            return;
        }
    }
    /* Cookie and id; of a record without data all of it, time included, as it has no checksum to break. */
    size_t len = size > 0 ? 12 : p->len < sizeof zeros ? (size_t)p->len : sizeof zeros;
    if (pv__io_pwrite(g->dat_fd, zeros, len, p->row.offset, NULL) < 0) {
        return; /* best effort, see above */
    }
}

/* Takes the head of the list, up to and including last, off it. */
static void resolve_through(pv_vol *v, pend *last) {
    pend *p = v->pend_head;
    v->pend_head = last->next;
    if (v->pend_head == NULL) {
        v->pend_tail = NULL;
    }
    for (pend *next; p != NULL; p = next) {
        next = p == last ? NULL : p->next;
        p->resolved = true; /* its writer may return as soon as append_lock is dropped */
    }
}

/* Fails the pending records from the head of the list through last: off the end of .dat as far as they stand there, the
 * rest spoiled. A record whose row could not be taken back stays as it is, outvoted by its counter row. */
static void fail_through(pv_vol *v, gen *g, pend *last, int rc, const pv_errinfo *err) {
    pv_errinfo e = *err;
    uint64_t old_end = pv__load_u64(&g->dat_end);
    uint64_t end = old_end;
    for (bool more = true; more;) {
        more = false;
        for (pend *p = v->pend_head; p != last->next; p = p->next) {
            if (!p->cut && !p->row_written && p->len > 0 && p->row.offset + p->len == end) {
                p->cut = true;
                end = p->row.offset;
                more = true;
            }
        }
    }
    if (end < old_end) {
        pv__store_u64(&g->dat_end, end);
        roll_back(v, g->dat_fd, end, &e);
    }
    for (pend *p = v->pend_head; p != last->next; p = p->next) {
        if (p->len > 0 && !p->cut && !p->row_written) {
            spoil_record(g, p);
        }
        p->rc = rc;
        p->err = e;
    }
    resolve_through(v, last);
}

/* Writes the rows of the batch. On failure none is left and 0 rows count as written. */
static int write_batch_rows(pv_vol *v, gen *g, const pend *last, uint64_t *begin, pv_errinfo *err) {
    *begin = pv__load_u64(&g->idx_end);
    for (const pend *p = v->pend_head; p != last->next; p = p->next) {
        int rc = p->len == 0 ? 0 : append_row(v, g, &p->row, p->len, err);
        if (rc < 0) {
            pv__store_u64(&g->idx_end, *begin);
            roll_back(v, g->idx_fd, *begin, err);
            return rc;
        }
    }
    return 0;
}

/* Takes the batch's rows back after a failed flush of .idx: cuts them off, or outvotes them if others came behind. */
static void unwrite_batch_rows(pv_vol *v, gen *g, const pend *last, uint64_t begin, uint64_t end, pv_errinfo *err) {
    if (pv__load_u64(&g->idx_end) == end) {
        pv__store_u64(&g->idx_end, begin);
        roll_back(v, g->idx_fd, begin, err);
        return;
    }
    for (pend *p = v->pend_head; p != last->next; p = p->next) {
        if (p->len > 0) {
            append_counter_row(v, g, p);
            p->row_written = true;
        }
    }
}

/* Publishes the flushed batch: rows, .idx on disk where the order of rows calls for it, map entries. */
static int publish_batch(pv_vol *v, gen *g, pend *last, bool sync_idx, pv_errinfo *err) {
    uint64_t first = UINT64_MAX;
    for (const pend *p = v->pend_head; p != last->next && first == UINT64_MAX; p = p->next) {
        first = p->len > 0 ? p->row.offset : first;
    }
    bool unordered = first != UINT64_MAX && (v->max_row_end > first || v->flush_failed);
    uint64_t begin;
    int rc = write_batch_rows(v, g, last, &begin, err);
    if (rc == 0 && (sync_idx || unordered)) {
        uint64_t end = pv__load_u64(&g->idx_end);
        v->doubtful = true;
        pv__mutex_unlock(&v->append_lock);
        rc = pv__io_datasync(g->idx_fd, err);
        pv__mutex_lock(&v->append_lock);
        v->doubtful = false;
        if (rc < 0) {
            err->d |= AT_FLUSH | AT_INDEX;
            unwrite_batch_rows(v, g, last, begin, end, err);
        }
    }
    if (rc < 0) {
        fail_through(v, g, last, rc, err);
        return rc;
    }
    for (pend *p = v->pend_head; p != last->next; p = p->next) {
        p->rc = p->len == 0 ? 0 : map_apply(v, g, p, &p->err);
        if (p->rc < 0) {
            append_counter_row(v, g, p);
        }
    }
    resolve_through(v, last);
    return 0;
}

/* One flush for all records that are pending when it begins. append_lock is dropped while the disk works; nobody else
 * flushes then. The result is the flush's own: each pending record holds its own result. */
static int flush_pending(pv_vol *v, gen *g, bool sync_idx, pv_errinfo *err) {
    pend *last = v->pend_tail;
    if (last != NULL) {
        uint64_t records = 1;
        for (const pend *p = v->pend_head; p != last; p = p->next) {
            records++;
        }
        atomic_fetch_add(&v->flush_count, 1);
        atomic_fetch_add(&v->flushed_records, records);
    }
    v->flushing = true;
    pv__mutex_unlock(&v->append_lock);
    int rc = pv__io_datasync(g->dat_fd, err);
    pv__mutex_lock(&v->append_lock);
    note_io(v, rc, err);
    if (rc < 0) {
        err->d |= AT_FLUSH;
        v->flush_failed = true;
        if (v->pend_tail != NULL) {
            fail_through(v, g, v->pend_tail, rc, err);
        }
    } else if (last != NULL) {
        rc = publish_batch(v, g, last, sync_idx, err);
    } else if (sync_idx) {
        pv__mutex_unlock(&v->append_lock);
        rc = pv__io_datasync(g->idx_fd, err);
        pv__mutex_lock(&v->append_lock);
        if (rc < 0) {
            err->d |= AT_FLUSH | AT_INDEX;
        }
    }
    v->flushing = false;
    pv__cond_broadcast(&v->flush_cond);
    return rc;
}

/* Joins the pending records and returns when this one is resolved. */
static int wait_for_flush(pv_vol *v, gen *g, pend *p, pv_errinfo *err) {
    p->next = NULL;
    if (v->pend_tail != NULL) {
        v->pend_tail->next = p;
    } else {
        v->pend_head = p;
    }
    v->pend_tail = p;
    while (!p->resolved) {
        if (v->flushing) {
            pv__cond_wait(&v->flush_cond, &v->append_lock);
        } else {
            pv_errinfo ignored = {0};
            (void)flush_pending(v, g, false, &ignored);
        }
    }
    if (p->rc < 0) {
        *err = p->err;
    }
    return p->rc;
}

/* ------------------------------------------------------------------ appending: one change */

/* What a change needs from its beginning to its end; append_lock is held in between. */
typedef struct change {
    gen *g;
    pend p;
    bool fsync;
    uint64_t append_at_ns;
} change;

/* The lock, if it comes within a moment: that of a few appends, not that of a disk. */
static bool lock_soon(pthread_mutex_t *lock) {
    if (pthread_mutex_trylock(lock) == 0) {
        return true;
    }
    struct timespec until;
    pv__must(clock_gettime(CLOCK_REALTIME, &until));
    until.tv_nsec += NOWAIT_NS;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    return pv__mutex_lock_until(lock, &until) != 0;
}

static int would_wait(pv_errinfo *err, uint64_t id) {
    int rc = pv__fail(err, PV_ESYS, 0, 0, id, 0);
    err->sys_errno = EAGAIN;
    return rc;
}

/* Enters the handle, takes append_lock, waits until the key is free, and finds what is known of it. On failure nothing
 * is held. */
static int change_begin(pv_vol *v, change *c, uint64_t id, bool is_delete, uint32_t flags, const pv_entry *known,
                        pv_errinfo *err) {
    memset(c, 0, sizeof *c);
    int rc = pv__vol_enter(v);
    if (rc < 0) {
        return pv__fail(err, rc, v->vid, 0, id, 0);
    }
    bool may_wait = (flags & PV_WRITE_NOWAIT) == 0;
    if (may_wait) {
        pv__mutex_lock(&v->append_lock);
    } else if (!lock_soon(&v->append_lock)) {
        pv__vol_leave(v);
        return would_wait(err, id);
    }
    while (PV__UNLIKELY(v->swapping) || (PV__UNLIKELY(v->pend_head != NULL) && key_is_pending(v, id))) {
        if (!may_wait) {
            pv__mutex_unlock(&v->append_lock);
            pv__vol_leave(v);
            return would_wait(err, id);
        }
        pv__cond_wait(&v->flush_cond, &v->append_lock);
    }
    c->g = v->gen;
    c->fsync = (flags & PV_WRITE_FSYNC) != 0;
    c->p.row.key = id;
    if (atomic_load(is_delete ? &v->no_delete : &v->no_write)) {
        rc = pv__fail(err, PV_EREADONLY, v->vid, 0, id, 0);
    } else if (c->g->map != NULL) {
        c->p.has_prior = gen_lookup(c->g, id, &c->p.prior) == 0;
    } else if (flags & PV_WRITE_ENTRY) {
        c->p.prior = *known;
        c->p.has_prior = known->offset != 0;
        if (known->revision != c->g->sb.compaction_revision) {
            rc = pv__fail(err, PV_ESTALE, known->revision, c->g->sb.compaction_revision, id, 0);
        }
    }
    if (rc < 0) {
        pv__mutex_unlock(&v->append_lock);
        pv__vol_leave(v);
    }
    return rc;
}

static void change_end(pv_vol *v) {
    pv__mutex_unlock(&v->append_lock);
    pv__vol_leave(v);
}

/* Appends the record and publishes it, now or after a flush. size is what the row says: -1 for a tombstone. */
static int change_append(pv_vol *v, change *c, const struct iovec *iov, int iov_count, int32_t size, pv_errinfo *err) {
    gen *g = c->g;
    uint64_t begin = pv__load_u64(&g->dat_end);
    c->p.row.offset = begin;
    c->p.row.size = size;
    for (int i = 0; i < iov_count; i++) {
        c->p.len += iov[i].iov_len;
    }
    int rc = append_record(v, g, iov, iov_count, err);
    if (rc < 0) {
        return rc;
    }
    pv__store_u64(&v->last_append_at_ns, c->append_at_ns);
    pv__store_u64(&g->dat_end, begin + c->p.len); /* before anyone can find the record */
    if (c->fsync) {
        return wait_for_flush(v, g, &c->p, err);
    }
    uint64_t idx_end = pv__load_u64(&g->idx_end);
    rc = append_row(v, g, &c->p.row, c->p.len, err);
    if (rc == 0) {
        rc = map_apply(v, g, &c->p, err);
        if (rc < 0) {
            pv__store_u64(&g->idx_end, idx_end);
            roll_back(v, g->idx_fd, idx_end, err);
        }
    }
    if (rc < 0) {
        pv__store_u64(&g->dat_end, begin);
        roll_back(v, g->dat_fd, begin, err);
    }
    return rc;
}

/* A delete in a remote tier: a row without a record, if the key is live, and a flush of the index if one is wanted. */
static int change_row_only(pv_vol *v, change *c, bool live, pv_errinfo *err) {
    gen *g = c->g;
    uint64_t idx_end = pv__load_u64(&g->idx_end);
    int rc = 0;
    if (live) {
        c->p.row.offset = 0;
        c->p.row.size = -1;
        rc = append_row(v, g, &c->p.row, 0, err);
        if (rc == 0) {
            rc = map_apply(v, g, &c->p, err);
            if (rc < 0) {
                pv__store_u64(&g->idx_end, idx_end);
                roll_back(v, g->idx_fd, idx_end, err);
            }
        }
    }
    if (rc == 0 && c->fsync) {
        rc = pv__io_datasync(g->idx_fd, err);
        if (rc < 0) {
            err->d |= AT_FLUSH | AT_INDEX;
        }
    }
    return rc;
}

/* Nothing to append, but a flushed write promises that what is there is on disk. */
static int change_nothing(pv_vol *v, change *c, pv_errinfo *err) {
    return c->fsync ? wait_for_flush(v, c->g, &c->p, err) : 0;
}

/* Upstream holds flushed writes and blobs against the sum of all sizes written, pending ones included. */
static int check_content_limit(const pv_vol *v, const gen *g, uint64_t more, pv_errinfo *err) {
    uint64_t content = g->figures.file_bytes;
    uint64_t pending = 0;
    if (g->map != NULL) {
        pv_map_stats stats;
        pv_map_stat(g->map, &stats);
        content = stats.file_bytes;
    }
    for (const pend *p = v->pend_head; p != NULL; p = p->next) {
        pending += p->len;
    }
    if (content > v->max_bytes || more > v->max_bytes - content || pending > v->max_bytes - content - more) {
        return pv__fail(err, PV_EFULL, content, v->max_bytes, 0, 1);
    }
    return 0;
}

/* ------------------------------------------------------------------ writing */

/* Whether the needle that head (20 bytes, if there are so many) begins holds just this cookie, checksum and data. Any
 * trouble in finding out means no, as upstream has it. The cheap tests come first: append_lock is held. */
static bool is_unchanged(pv_vol *v, gen *g, const pv_entry *prior, const pv_needle *n, uint32_t checksum,
                         const uint8_t *head, size_t head_len) {
    uint32_t cookie;
    uint64_t id;
    int32_t size;
    pv_needle_header(head, &cookie, &id, &size);
    if (size == prior->size) {
        uint32_t data_size = (uint32_t)size;
        uint8_t sum[CHECKSUM_BYTES];
        if (v->version != 1) {
            if (head_len < PV_NEEDLE_HEADER + DATA_SIZE_BYTES) {
                return false;
            }
            data_size = pv__get_be32(head + PV_NEEDLE_HEADER);
        }
        if (cookie != n->cookie || data_size != n->data_size ||
            pv__io_pread_full(g->dat_fd, sum, sizeof sum, prior->offset + PV_NEEDLE_HEADER + (uint64_t)size, NULL) <
                0) {
            return false;
        }
        uint32_t stored = pv__get_be32(sum);
        if (stored != checksum && stored != pv_crc_legacy(checksum)) {
            return false;
        }
    } /* else it may be a wrapped volume: pv__read_record knows */
    pv_read old = {0};
    pv_errinfo ignored;
    if (pv__read_record(v, g, prior->offset, prior->size, &old, &ignored) < 0) {
        return false;
    }
    bool same = old.n.cookie == n->cookie && old.n.checksum == checksum && old.n.data_size == n->data_size &&
                (n->data_size == 0 || memcmp(old.n.data, n->data, n->data_size) == 0);
    pv_read_free(&old);
    return same;
}

/* The unchanged test, then the cookie test: a key that is in the map, deleted or empty ones included, keeps its cookie. */
static int check_existing(pv_vol *v, const change *c, const pv_needle *n, uint32_t checksum, uint32_t flags,
                          uint32_t *cookie, bool *unchanged, pv_errinfo *err) {
    const pv_entry *prior = &c->p.prior;
    uint8_t head[PV_NEEDLE_HEADER + DATA_SIZE_BYTES];
    size_t got;
    int rc = pv__io_pread(c->g->dat_fd, head, sizeof head, prior->offset, &got, err);
    note_io(v, rc, err);
    if (rc < 0) {
        err->d |= AT_EXISTING;
        return rc;
    }
    if (got < PV_NEEDLE_HEADER) {
        return pv__fail(err, PV_EEOF, prior->offset, PV_NEEDLE_HEADER, got, AT_EXISTING);
    }
    /* A failed flush may have lost what the page cache still shows: then "the same" is no promise of being on disk. */
    if (!v->has_ttl && prior->size > 0 && !(c->fsync && v->flush_failed) &&
        is_unchanged(v, c->g, prior, n, checksum, head, got)) {
        *unchanged = true;
        return 0;
    }
    uint32_t old_cookie = pv__get_be32(head);
    if (*cookie == 0 && !(flags & PV_WRITE_CHECK_COOKIE)) {
        *cookie = old_cookie;
    }
    return *cookie == old_cookie ? 0 : pv__fail(err, PV_ECOOKIE, *cookie, old_cookie, n->id, 0);
}

static bool needle_ok(const pv_needle *n) {
    return (n->data != NULL || n->data_size == 0) && (n->name != NULL || n->name_size == 0) &&
           (n->mime != NULL || n->mime_size == 0) && (n->pairs != NULL || n->pairs_size == 0);
}

/* append_lock held, between change_begin and change_end. */
static int write_locked(pv_vol *v, change *c, const pv_needle *n, uint32_t checksum, uint32_t flags, pv_write_res *out,
                        pv_errinfo *err) {
    gen *g = c->g;
    pv_needle own = *n; /* the copy gets cookie, checksum and time; the caller's is only borrowed */
    int32_t size;
    int rc = pv_needle_body_size(n, v->version, &size);
    if (rc < 0) {
        return pv__fail(err, PV_EINVAL, n->data_size, 0, n->id, 0);
    }
    out->size = size;
    out->offset = pv__load_u64(&g->dat_end);
    out->cookie = n->cookie;
    out->checksum = checksum;
    if (c->fsync) {
        /* Upstream counts the record as if the data were its whole body. */
        int32_t as_body = n->data_size <= INT32_MAX - 64 ? (int32_t)n->data_size : INT32_MAX - 64;
        rc = check_content_limit(v, g, (uint64_t)pv_needle_record_len(as_body, v->version), err);
        if (rc < 0) {
            return rc;
        }
    }
    bool unchanged = false;
    if (c->p.has_prior) {
        rc = check_existing(v, c, n, checksum, flags, &own.cookie, &unchanged, err);
        if (rc < 0) {
            return rc;
        }
    }
    out->cookie = own.cookie;
    if (unchanged) {
        out->unchanged = 1;
        out->offset = c->p.prior.offset;
        out->size = c->p.prior.size;
        return change_nothing(v, c, err);
    }
    if (out->offset >= v->max_bytes && n->data_size != 0) {
        return pv__fail(err, PV_EFULL, out->offset, v->max_bytes, 0, 0);
    }
    uint8_t head[PV_NEEDLE_HEADER + DATA_SIZE_BYTES];
    uint8_t tail[PV_NEEDLE_TAIL_MAX];
    size_t head_len;
    size_t tail_len;
    own.checksum = checksum;
    own.append_at_ns = c->append_at_ns = next_append_ns(v);
    rc = pv_needle_frame(&own, v->version, head, &head_len, tail, sizeof tail, &tail_len, &size, err);
    if (rc < 0) {
        return rc;
    }
    struct iovec iov[3] = {{head, head_len}, {(void *)(uintptr_t)n->data, n->data_size}, {tail, tail_len}};
    rc = change_append(v, c, iov, 3, size, err);
    if (rc < 0) {
        return rc;
    }
    out->append_at_ns = own.append_at_ns;
    if (n->last_modified_s > pv__load_u64(&v->last_modified_s)) {
        pv__store_u64(&v->last_modified_s, n->last_modified_s);
    }
    return 0;
}

int pv_vol_write(pv_vol *v, const pv_needle *n, uint32_t flags, const pv_entry *known, pv_write_res *out,
                 pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    memset(out, 0, sizeof *out);
    if (!needle_ok(n) || ((flags & PV_WRITE_ENTRY) && known == NULL)) {
        return pv__fail(err, PV_EINVAL, n->data_size, flags, n->id, 0);
    }
    uint32_t checksum = n->data_size > 0 ? pv_crc32c(0, n->data, n->data_size) : 0;
    change c;
    int rc = change_begin(v, &c, n->id, false, flags, known, err);
    if (rc < 0) {
        return rc;
    }
    rc = write_locked(v, &c, n, checksum, flags, out, err);
    change_end(v);
    return rc;
}

int pv_vol_delete(pv_vol *v, uint64_t id, uint32_t cookie, uint32_t checksum, uint32_t flags, const pv_entry *known,
                  int32_t *deleted_size, pv_write_res *out, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    memset(out, 0, sizeof *out);
    *deleted_size = -1;
    if ((flags & PV_WRITE_ENTRY) && known == NULL) {
        return pv__fail(err, PV_EINVAL, 0, flags, id, 0);
    }
    change c;
    int rc = change_begin(v, &c, id, true, flags, known, err);
    if (rc < 0) {
        return rc;
    }
    /* A failed flush may have lost the tombstone of a key that was deleted before: a flushed delete needs another. */
    bool live = c.p.has_prior && c.p.prior.size >= 0;
    if (v->flags & PV_VOL_REMOTE) {
        out->cookie = cookie;
        out->checksum = checksum;
        rc = change_row_only(v, &c, live, err);
        *deleted_size = rc == 0 && live ? c.p.prior.size : -1;
        change_end(v);
        return rc;
    }
    if (!live && !(c.p.has_prior && c.fsync && v->flush_failed)) {
        rc = change_nothing(v, &c, err);
        change_end(v);
        return rc;
    }
    c.append_at_ns = next_append_ns(v);
    const pv_needle n = {.id = id, .cookie = cookie, .checksum = checksum, .append_at_ns = c.append_at_ns};
    uint8_t head[PV_NEEDLE_HEADER + DATA_SIZE_BYTES];
    uint8_t tail[CHECKSUM_BYTES + TIME_BYTES + ALIGN];
    size_t head_len;
    size_t tail_len;
    out->offset = pv__load_u64(&c.g->dat_end);
    out->cookie = cookie;
    out->checksum = checksum;
    rc = pv_needle_frame(&n, v->version, head, &head_len, tail, sizeof tail, &tail_len, &out->size, err);
    if (rc == 0) {
        struct iovec iov[2] = {{head, head_len}, {tail, tail_len}};
        rc = change_append(v, &c, iov, 2, -1, err);
    }
    if (rc == 0) {
        out->append_at_ns = c.append_at_ns;
        *deleted_size = live ? c.p.prior.size : -1;
    }
    change_end(v);
    return rc;
}

/* ------------------------------------------------------------------ deleting many */

#define MANY_MAX 512U
#define MANY_SLOTS (2 * MANY_MAX) /* a power of 2 */
#define MANY_READ_BYTES ((uint64_t)4 << 20)
#define TOMBSTONE_MAX 32U

typedef struct many {
    uint32_t checksums[MANY_MAX]; /* of the items */
    uint16_t slots[MANY_SLOTS];   /* keys of the items: index + 1 */
    uint16_t which[MANY_MAX];     /* item of each record */
    uint8_t records[MANY_MAX * TOMBSTONE_MAX];
    uint8_t rows[MANY_MAX * PV__ROW_MAX];
} many;

/* Whether the key of item i is new among those before it; then it is noted. */
static bool many_is_new(many *m, const pv_delete *items, size_t i) {
    size_t at = (size_t)((items[i].id * 0x9e3779b97f4a7c15U) >> 32) & (MANY_SLOTS - 1);
    for (; m->slots[at] != 0; at = (at + 1) & (MANY_SLOTS - 1)) {
        if (items[m->slots[at] - 1].id == items[i].id) {
            return false;
        }
    }
    m->slots[at] = (uint16_t)(i + 1);
    return true;
}

/* Reads a needle before its deletion. False: it is the caller's. */
static bool many_check(pv_vol *v, gen *g, const pv_delete *item, uint32_t *checksum, uint64_t *read_bytes) {
    pv_entry entry;
    if (gen_lookup(g, item->id, &entry) < 0 || entry.size < 0) {
        return false;
    }
    if (entry.size == 0) { /* nothing of it is read, so there is no cookie to compare with */
        return true;
    }
    pv_read r = {0};
    pv_errinfo err = {0};
    if (pv__read_record(v, g, entry.offset, entry.size, &r, &err) < 0) {
        return false; /* counted when the caller reads it */
    }
    note_io(v, 0, &err);
    const uint8_t mortal = PV_F_TTL | PV_F_MTIME;
    bool ok = r.n.cookie == item->cookie && !(r.n.flags & PV_F_MANIFEST) && (r.n.flags & mortal) != mortal;
    *checksum = r.n.checksum;
    *read_bytes += r.buf_len;
    pv_read_free(&r);
    return ok;
}

/* How many of the items can go together, read as they must be. Without append_lock: a needle that is written anew
 * meanwhile is deleted as it stands then, as by pv_vol_read and pv_vol_delete. */
static int many_begin(pv_vol *v, many *m, const pv_delete *items, size_t n, uint32_t flags, pv_errinfo *err) {
    gen *g = pv__gen_acquire(v);
    if (g == NULL) {
        return pv__fail(err, PV_ECLOSED, v->vid, 0, 0, 0);
    }
    size_t i = 0;
    uint64_t read_bytes = 0;
    for (; i < n && i < MANY_MAX && read_bytes < MANY_READ_BYTES; i++) {
        if (!items[i].ok || items[i].vid != items[0].vid || !many_is_new(m, items, i)) {
            break;
        }
        m->checksums[i] = 0;
        if (!(flags & PV_DELETE_ANY_COOKIE) && !many_check(v, g, &items[i], &m->checksums[i], &read_bytes)) {
            break;
        }
    }
    pv__gen_release(v, g);
    return (int)i;
}

/* Writes count records and their rows, and publishes none. On failure nothing is left of them. append_lock held. */
static int many_write(pv_vol *v, gen *g, const many *m, size_t count, size_t record_len, uint64_t last_ns,
                      pv_errinfo *err) {
    uint64_t begin = pv__load_u64(&g->dat_end);
    uint64_t idx_begin = pv__load_u64(&g->idx_end);
    uint64_t end = begin + count * record_len;
    int rc = pv__io_pwrite(g->dat_fd, m->records, count * record_len, begin, err);
    if (rc < 0) { /* not counted: the first of them will be tried alone */
        roll_back(v, g->dat_fd, begin, err);
        return rc;
    }
    note_io(v, 0, err);
    pv__store_u64(&v->last_write_wall_s, now_ns() / 1000000000U);
    pv__store_u64(&v->last_append_at_ns, last_ns);
    pv__store_u64(&g->dat_end, end); /* before anyone can find the records */
    rc = pv__io_pwrite(g->idx_fd, m->rows, count * v->row_len, idx_begin, err);
    if (rc < 0) {
        err->d |= AT_INDEX;
        roll_back(v, g->idx_fd, idx_begin, err);
        pv__store_u64(&g->dat_end, begin);
        roll_back(v, g->dat_fd, begin, err);
        return rc;
    }
    pv__store_u64(&g->idx_end, idx_begin + count * v->row_len);
    v->max_row_end = end > v->max_row_end ? end : v->max_row_end;
    return 0;
}

/* append_lock held. */
static int many_locked(pv_vol *v, many *m, pv_delete *items, size_t n, uint32_t flags, pv_errinfo *err) {
    while (PV__UNLIKELY(v->swapping) || (PV__UNLIKELY(v->pend_head != NULL) && key_is_pending(v, items[0].id))) {
        pv__cond_wait(&v->flush_cond, &v->append_lock);
    }
    if (atomic_load(&v->no_delete)) {
        return pv__fail(err, PV_EREADONLY, v->vid, 0, items[0].id, 0);
    }
    gen *g = v->gen;
    uint64_t begin = pv__load_u64(&g->dat_end);
    uint64_t idx_begin = pv__load_u64(&g->idx_end);
    uint64_t last_ns = pv__load_u64(&v->last_append_at_ns);
    size_t record_len = (size_t)pv_needle_record_len(0, v->version);
    size_t count = 0;
    size_t done = 0;
    for (; done < n; done++) {
        pv_delete *item = &items[done];
        pv_entry prior;
        if (PV__UNLIKELY(v->pend_head != NULL) && key_is_pending(v, item->id)) {
            break;
        }
        item->size = 0;
        if (gen_lookup(g, item->id, &prior) != 0 || prior.size < 0) {
            continue;
        }
        uint8_t head[PV_NEEDLE_HEADER + DATA_SIZE_BYTES];
        uint8_t tail[CHECKSUM_BYTES + TIME_BYTES + ALIGN];
        size_t head_len;
        size_t tail_len;
        int32_t size;
        last_ns = append_ns_after(last_ns);
        const pv_needle tombstone = {.id = item->id,
                                     .cookie = (flags & PV_DELETE_ANY_COOKIE) ? 0 : item->cookie,
                                     .checksum = m->checksums[done],
                                     .append_at_ns = last_ns};
        int rc = pv_needle_frame(&tombstone, v->version, head, &head_len, tail, sizeof tail, &tail_len, &size, err);
        if (rc < 0) {
            return rc;
        }
        uint8_t *record = m->records + count * record_len;
        memcpy(record, head, head_len);
        memcpy(record + head_len, tail, tail_len);
        const pv_idx_row row = {.key = item->id, .offset = begin + count * record_len, .size = -1};
        pv_idx_row_put(&row, v->width, m->rows + count * v->row_len);
        item->size = prior.size;
        m->which[count++] = (uint16_t)done;
    }
    if (count == 0) {
        return (int)done;
    }
    int rc = many_write(v, g, m, count, record_len, last_ns, err);
    if (rc < 0) {
        return rc;
    }
    for (size_t i = 0; i < count; i++) {
        int32_t old_size;
        rc = pv_map_delete(g->map, items[m->which[i]].id, &old_size);
        if (rc < 0) { /* those before it stay */
            pv__store_u64(&g->idx_end, idx_begin + i * v->row_len);
            roll_back(v, g->idx_fd, idx_begin + i * v->row_len, err);
            pv__store_u64(&g->dat_end, begin + i * record_len);
            roll_back(v, g->dat_fd, begin + i * record_len, err);
            return m->which[i];
        }
    }
    return (int)done;
}

int pv_vol_delete_many(pv_vol *v, pv_delete *items, size_t n, uint32_t flags, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    if (n == 0) {
        return 0;
    }
    if (v->flags & (PV_VOL_REMOTE | PV_VOL_NO_MAP | PV_VOL_SORTED_MAP)) {
        return pv__fail(err, PV_EINVAL, v->flags, 0, 0, 0);
    }
    many *m = pv__malloc(sizeof *m);
    if (m == NULL) {
        return pv__fail(err, PV_ENOMEM, sizeof *m, 0, 0, 0);
    }
    memset(m->slots, 0, sizeof m->slots);
    int rc = many_begin(v, m, items, n, flags, err);
    if (rc > 0) {
        size_t ready = (size_t)rc;
        rc = pv__vol_enter(v);
        if (rc < 0) {
            rc = pv__fail(err, rc, v->vid, 0, items[0].id, 0);
        } else {
            pv__mutex_lock(&v->append_lock);
            rc = many_locked(v, m, items, ready, flags, err);
            change_end(v);
        }
    }
    pv__free(m);
    return rc;
}

/* Whether the key holds the blob's cookie, checksum and data already. */
static bool is_same_blob(pv_vol *v, const change *c, int32_t size, const uint8_t *blob, size_t len) {
    uint8_t old_cookie[4];
    pv_needle n;
    pv_read old = {0};
    pv_errinfo ignored;
    if (!c->p.has_prior || c->p.prior.size != size ||
        pv__io_pread_full(c->g->dat_fd, old_cookie, sizeof old_cookie, c->p.prior.offset, NULL) < 0 ||
        (memcmp(old_cookie, blob, sizeof old_cookie) != 0 && v->width != 4) ||
        pv_needle_parse(blob, len, v->version, size, 0, 0, &n, NULL) < 0 ||
        pv__read_record(v, c->g, c->p.prior.offset, size, &old, &ignored) < 0) {
        return false;
    }
    bool same = old.n.cookie == n.cookie && old.n.checksum == n.checksum && old.n.data_size == n.data_size &&
                (n.data_size == 0 || memcmp(old.n.data, n.data, n.data_size) == 0);
    pv_read_free(&old);
    return same;
}

/* append_lock held, between change_begin and change_end. */
static int write_blob_locked(pv_vol *v, change *c, int32_t size, const uint8_t *blob, size_t len, pv_write_res *out,
                             pv_errinfo *err) {
    static const uint8_t zeros[TIME_BYTES + 2 * ALIGN];
    int rc = check_content_limit(v, c->g, len, err);
    if (rc < 0) {
        return rc;
    }
    out->size = size;
    out->offset = pv__load_u64(&c->g->dat_end);
    if (!(c->fsync && v->flush_failed) && is_same_blob(v, c, size, blob, len)) {
        out->unchanged = 1;
        out->offset = c->p.prior.offset;
        return change_nothing(v, c, err);
    }
    size_t record_len = (size_t)pv_needle_record_len(size, v->version);
    size_t time_at = PV_NEEDLE_HEADER + (size_t)size + CHECKSUM_BYTES;
    size_t needed = time_at + (v->version == 3 ? TIME_BYTES : 0);
    if (len < needed) {
        return pv__fail(err, PV_EBUFFER, needed, len, 0, 0);
    }
    /* Beyond the limit a 4-byte offset would wrap, and the index point at another record. */
    if (out->offset >= v->max_bytes) {
        return pv__fail(err, PV_EFULL, out->offset, v->max_bytes, 0, 1);
    }
    uint8_t when[TIME_BYTES];
    c->append_at_ns = next_append_ns(v);
    pv__put_be64(when, c->append_at_ns);
    size_t used = len < record_len ? len : record_len;
    struct iovec iov[4] = {
        {(void *)(uintptr_t)blob, time_at},
        {when, needed - time_at},
        {(void *)(uintptr_t)(blob + needed), used - needed},
        {(void *)(uintptr_t)zeros, record_len - used},
    };
    rc = change_append(v, c, iov, 4, size, err);
    if (rc == 0) {
        out->append_at_ns = c->append_at_ns;
    }
    return rc;
}

int pv_vol_write_blob(pv_vol *v, uint64_t id, int32_t size, const uint8_t *blob, size_t len, uint32_t flags,
                      const pv_entry *known, pv_write_res *out, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    memset(out, 0, sizeof *out);
    if ((flags & PV_WRITE_ENTRY) && known == NULL) {
        return pv__fail(err, PV_EINVAL, 0, flags, id, 0);
    }
    change c;
    int rc = change_begin(v, &c, id, false, flags, known, err);
    if (rc < 0) {
        return rc;
    }
    uint64_t blob_id;
    int32_t blob_size;
    if (len < PV_NEEDLE_HEADER) {
        rc = pv__fail(err, PV_ESIZE, 0, len, 0, 0);
    } else {
        pv_needle_header(blob, &out->cookie, &blob_id, &blob_size);
        if (blob_size != size) {
            rc = pv__fail(err, PV_ESIZE, 1, blob_id, (uint64_t)(int64_t)blob_size, (uint64_t)(int64_t)size);
        } else if (size < 0) {
            rc = pv__fail(err, PV_ESIZE, 2, blob_id, 0, (uint64_t)(int64_t)size);
        } else {
            if (len - PV_NEEDLE_HEADER >= (size_t)size && len - PV_NEEDLE_HEADER - (size_t)size >= CHECKSUM_BYTES) {
                out->checksum = pv__get_be32(blob + PV_NEEDLE_HEADER + size);
            }
            rc = write_blob_locked(v, &c, size, blob, len, out, err);
        }
    }
    change_end(v);
    return rc;
}

/* ------------------------------------------------------------------ switching and flushing */

int pv_vol_set_readonly(pv_vol *v, uint8_t no_write, uint8_t no_delete) {
    int rc = pv__vol_enter(v);
    if (rc < 0) {
        return rc;
    }
    bool may_append = no_write == 0 || no_delete == 0;
    pv__mutex_lock(&v->append_lock);
    if ((may_append && (v->flags & (PV_VOL_DAT_READONLY | PV_VOL_IDX_READONLY))) ||
        (no_write == 0 && (v->flags & (PV_VOL_SORTED_MAP | PV_VOL_REMOTE)))) {
        rc = PV_EREADONLY;
    } else if (v->torn) {
        if ((!(v->flags & PV_VOL_REMOTE) && cut_back(v->gen->dat_fd, pv__load_u64(&v->gen->dat_end)) < 0) ||
            cut_back(v->gen->idx_fd, pv__load_u64(&v->gen->idx_end)) < 0) {
            rc = may_append ? PV_ESYS : 0;
        } else {
            v->torn = false;
        }
    }
    if (rc == 0) {
        atomic_store(&v->no_write, no_write != 0);
        atomic_store(&v->no_delete, no_delete != 0);
        while (v->pend_head != NULL) {
            pv__cond_wait(&v->flush_cond, &v->append_lock);
        }
    }
    pv__mutex_unlock(&v->append_lock);
    pv__vol_leave(v);
    return rc;
}

int pv_vol_sync(pv_vol *v, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    int rc = pv__vol_enter(v);
    if (rc < 0) {
        return pv__fail(err, rc, v->vid, 0, 0, 0);
    }
    pv__mutex_lock(&v->append_lock);
    if (v->flags & PV_VOL_REMOTE) {
        rc = (v->flags & PV_VOL_IDX_READONLY) ? 0 : pv__io_datasync(v->gen->idx_fd, err);
        err->d = rc < 0;
    } else if (!(v->flags & (PV_VOL_DAT_READONLY | PV_VOL_IDX_READONLY))) {
        while (v->flushing || v->swapping) {
            pv__cond_wait(&v->flush_cond, &v->append_lock);
        }
        rc = flush_pending(v, v->gen, true, err);
        if (rc < 0) {
            err->d = (err->d & AT_INDEX) != 0;
        }
    }
    pv__mutex_unlock(&v->append_lock);
    pv__vol_leave(v);
    return rc;
}

/* ------------------------------------------------------------------ for a map that is kept outside */

int pv_vol_set_figures(pv_vol *v, const pv_map_stats *figures) {
    int rc = pv__vol_enter(v);
    if (rc < 0) {
        return rc;
    }
    pv__mutex_lock(&v->append_lock);
    if (v->gen->map != NULL) {
        rc = PV_EINVAL;
    } else {
        pv__mutex_lock(&v->state_lock);
        v->gen->figures = *figures;
        pv__mutex_unlock(&v->state_lock);
    }
    pv__mutex_unlock(&v->append_lock);
    pv__vol_leave(v);
    return rc;
}

int pv_vol_settled_rows(pv_vol *v, uint64_t *rows, uint32_t *revision) {
    int rc = pv__vol_enter(v);
    if (rc < 0) {
        return rc;
    }
    pv__mutex_lock(&v->append_lock);
    while (v->doubtful) {
        pv__cond_wait(&v->flush_cond, &v->append_lock);
    }
    *rows = pv__load_u64(&v->gen->idx_end) / v->row_len;
    *revision = v->gen->sb.compaction_revision;
    pv__mutex_unlock(&v->append_lock);
    pv__vol_leave(v);
    return rc;
}
