/* pv_scrub.c - looking through a volume: do the rows of its index make sense, can each record be read.
 *
 * Stages, each cut into steps:
 *   ROWS     counts, adds the records' lengths up, finds out whether rows stand in the order of their records
 *   LOAD     only if they do not: takes all rows into memory and sorts them
 *   OVERLAP  compares each row with its neighbour
 *   RECORDS  reads and checks each record (not with PV_SCRUB_INDEX_ONLY)
 * Whatever upstream counts in an odd way is counted that way here: the length of a tombstone in OVERLAP comes from size -1.
 *
 * Works on duplicates of the volume's descriptors and on lengths taken under its append lock, so nothing that happens to
 * the volume later can disturb it: appends go behind the end, a vacuum leaves the old files readable.
 */
#include "pv_vol_int.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define BATCH_ROWS 8192U
#define WINDOW_BYTES ((size_t)16 << 20) /* holds the chunks of a filer (4 or 8 MiB) whole */
#define MIN_FILL ((size_t)256 << 10)
#define FINDINGS_MAX 4096U

enum stage { STAGE_ROWS, STAGE_LOAD, STAGE_OVERLAP, STAGE_RECORDS, STAGE_DONE };

typedef struct entry {
    uint64_t offset;
    uint64_t key;
    int32_t size;
    uint32_t row;
} entry;

struct pv_scrub {
    int dat_fd;
    int idx_fd;
    uint8_t width;
    uint8_t version;
    uint32_t flags;
    uint64_t resume_offset;
    enum stage stage;
    uint64_t next; /* row of the index, or place in sorted, that comes next in this stage */
    bool have_last;
    entry last;
    entry *sorted;
    size_t sorted_count;
    pv_idx_row *batch;
    uint64_t batch_first;
    size_t batch_count;
    uint8_t *window; /* window_cap bytes; no larger than the data file of a small volume needs */
    size_t window_cap;
    uint64_t window_at;
    size_t window_got;
    uint64_t budget; /* bytes this step may still read */
    pv_scrub_finding *found;
    size_t found_count;
    size_t found_taken;
    pv_scrub_stats stats;
};

static bool is_nowhere(uint64_t offset, int32_t size) {
    return offset == 0 && size < 0; /* a delete in a remote tier: no record */
}

/* ------------------------------------------------------------------ begin and end */

/* Duplicates the volume's data file and takes the lengths at a moment without an append. */
static int snapshot(pv_scrub *s, const pv_scrub_opts *o, pv_errinfo *err) {
    pv_vol *v = o->vol;
    if (v->flags & PV_VOL_REMOTE) {
        return pv__fail(err, PV_EINVAL, v->vid, 0, 0, 0);
    }
    gen *g = pv__gen_acquire(v);
    if (g == NULL) {
        return pv__fail(err, PV_ECLOSED, v->vid, 0, 0, 0);
    }
    struct stat ours;
    struct stat given;
    uint64_t pending = 0;
    pv__mutex_lock(&v->append_lock);
    while (v->flushing) {
        pv__cond_wait(&v->flush_cond, &v->append_lock);
    }
    /* Records whose rows wait for a flush: there is no row to hold them against yet. */
    for (const pend *p = v->pend_head; p != NULL; p = p->next) {
        if (!p->row_written && !p->resolved) {
            pending += p->len;
        }
    }
    s->dat_fd = fcntl(g->dat_fd, F_DUPFD_CLOEXEC, 0);
    int rc = s->dat_fd < 0 ? pv__fail_sys(err, errno, 0, 0, 0) : pv__io_stat(o->idx_fd, &given, err);
    if (rc == 0) {
        rc = pv__io_stat(g->idx_fd, &ours, err);
    }
    if (rc == 0 && !(s->flags & PV_SCRUB_ANY_INDEX) && (ours.st_dev != given.st_dev || ours.st_ino != given.st_ino)) {
        rc = pv__fail(err, PV_ESTALE, g->sb.compaction_revision, 0, 0, 0);
    }
    if (rc == 0) {
        s->stats.dat_bytes = pv__load_u64(&g->dat_end) - pending;
        s->stats.idx_bytes = (uint64_t)given.st_size;
        s->stats.revision = g->sb.compaction_revision;
    }
    pv__mutex_unlock(&v->append_lock);
    pv__gen_release(v, g);
    return rc;
}

static int take_files(pv_scrub *s, const pv_scrub_opts *o, pv_errinfo *err) {
    s->dat_fd = fcntl(o->dat_fd, F_DUPFD_CLOEXEC, 0);
    if (s->dat_fd < 0) {
        return pv__fail_sys(err, errno, 0, 0, 0);
    }
    int rc = pv__io_size(s->dat_fd, &s->stats.dat_bytes, err);
    return rc < 0 ? rc : pv__io_size(o->idx_fd, &s->stats.idx_bytes, err);
}

int pv_scrub_begin(const pv_scrub_opts *o, pv_scrub **out, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    *out = NULL;
    uint8_t width = o->vol != NULL ? o->vol->width : o->width;
    uint8_t version = o->vol != NULL ? o->vol->version : o->version;
    if (width != 4 && width != 5) {
        return pv__fail(err, PV_EINVAL, width, 0, 0, 0);
    }
    if (version < 1 || version > 3) {
        return pv__fail(err, PV_EVERSION, version, 0, 0, 0);
    }
    pv_scrub *s = pv__calloc(1, sizeof *s);
    if (s == NULL) {
        return pv__fail(err, PV_ENOMEM, sizeof *s, 0, 0, 0);
    }
    s->dat_fd = -1;
    s->idx_fd = -1;
    s->width = width;
    s->version = version;
    s->flags = o->flags;
    s->resume_offset = o->resume_offset;
    int rc = o->vol != NULL ? snapshot(s, o, err) : take_files(s, o, err);
    if (rc == 0) {
        s->idx_fd = fcntl(o->idx_fd, F_DUPFD_CLOEXEC, 0);
        rc = s->idx_fd < 0 ? pv__fail_sys(err, errno, 0, 0, 0) : 0;
    }
    if (rc == 0) {
        bool with_window = !(o->flags & PV_SCRUB_INDEX_ONLY);
        s->window_cap = s->stats.dat_bytes < MIN_FILL       ? MIN_FILL
                        : s->stats.dat_bytes < WINDOW_BYTES ? (size_t)s->stats.dat_bytes
                                                            : WINDOW_BYTES;
        s->batch = pv__malloc(BATCH_ROWS * sizeof *s->batch);
        s->found = pv__malloc(FINDINGS_MAX * sizeof *s->found);
        s->window = with_window ? pv__malloc(s->window_cap) : NULL;
        if (s->batch == NULL || s->found == NULL || (s->window == NULL && with_window)) {
            rc = pv__fail(err, PV_ENOMEM, s->window_cap, 0, 0, 0);
        }
    }
    s->stats.rows = s->stats.idx_bytes / (12U + width);
    if (rc == 0 && s->stats.rows > UINT32_MAX) {
        rc = pv__fail(err, PV_ERANGE, s->stats.rows, 0, 0, 0);
    }
    if (rc < 0) {
        pv_scrub_free(s);
        return rc;
    }
    s->stats.in_order = 1;
    s->stats.expected_bytes = PV_SUPERBLOCK;
    s->stats.total_rows = s->stats.rows * (o->flags & PV_SCRUB_INDEX_ONLY ? 2 : 3);
    *out = s;
    return 0;
}

void pv_scrub_free(pv_scrub *s) {
    if (s == NULL) {
        return;
    }
    (void)pv__io_close(s->dat_fd, NULL);
    (void)pv__io_close(s->idx_fd, NULL);
    pv__free(s->sorted);
    pv__free(s->batch);
    pv__free(s->window);
    pv__free(s->found);
    pv__free(s);
}

void pv_scrub_stat(const pv_scrub *s, pv_scrub_stats *out) {
    *out = s->stats;
}

int pv_scrub_findings(pv_scrub *s, pv_scrub_finding *out, size_t max) {
    size_t count = s->found_count - s->found_taken;
    count = count < max ? count : max;
    memcpy(out, s->found + s->found_taken, count * sizeof *out);
    s->found_taken += count;
    if (s->found_taken == s->found_count) {
        s->found_taken = 0;
        s->found_count = 0;
    }
    return (int)count;
}

/* The caller has seen that there is room: steps end before the last place is taken. */
static pv_scrub_finding *add_finding(pv_scrub *s, int32_t kind, const entry *e) {
    pv_scrub_finding *f = &s->found[s->found_count++];
    memset(f, 0, sizeof *f);
    f->kind = kind;
    f->row = e->row;
    f->key = e->key;
    f->offset = e->offset;
    f->size = e->size;
    return f;
}

static void spend(pv_scrub *s, uint64_t bytes) {
    s->stats.read_bytes += bytes;
    s->budget -= bytes < s->budget ? bytes : s->budget;
}

/* ------------------------------------------------------------------ rows */

/* The row with this number: 1, or 0 at the end (also if the index has become shorter). */
static int row_at(pv_scrub *s, uint64_t number, entry *out, pv_errinfo *err) {
    if (number >= s->stats.rows) {
        return 0;
    }
    if (number < s->batch_first || number - s->batch_first >= s->batch_count) {
        uint64_t left = s->stats.rows - number;
        size_t want = left < BATCH_ROWS ? (size_t)left : BATCH_ROWS;
        int got = pv_idx_read(s->idx_fd, s->width, number, s->batch, want, err);
        s->batch_count = 0;
        if (got <= 0) {
            return got;
        }
        s->batch_first = number;
        s->batch_count = (size_t)got;
        spend(s, (uint64_t)got * (12U + s->width));
    }
    const pv_idx_row *row = &s->batch[number - s->batch_first];
    *out = (entry){.offset = row->offset, .key = row->key, .size = row->size, .row = (uint32_t)number};
    return 1;
}

/* By offset, then size, as upstream; then by row, so that the order is always the same. */
static int compare(const entry *a, const entry *b) {
    if (a->offset != b->offset) {
        return a->offset < b->offset ? -1 : 1;
    }
    if (a->size != b->size) {
        return a->size < b->size ? -1 : 1;
    }
    return (a->row > b->row) - (a->row < b->row);
}

static int compare_for_sort(const void *a, const void *b) {
    return compare(a, b);
}

/* The next row in the order of records that has a record: 1, 0 at the end. */
static int next_entry(pv_scrub *s, entry *out, pv_errinfo *err) {
    if (!s->stats.in_order) {
        if (s->next >= s->sorted_count) {
            return 0;
        }
        *out = s->sorted[s->next++];
        return 1;
    }
    int rc;
    while ((rc = row_at(s, s->next, out, err)) == 1) {
        s->next++;
        if (!is_nowhere(out->offset, out->size)) {
            break;
        }
        s->stats.done_rows++;
    }
    return rc;
}

static void begin_stage(pv_scrub *s, enum stage stage, uint64_t done_rows) {
    s->stage = stage;
    s->next = 0;
    s->have_last = false;
    s->stats.done_rows = done_rows;
}

static int step_rows(pv_scrub *s, pv_errinfo *err) {
    entry e;
    int rc = row_at(s, s->next, &e, err);
    if (rc < 0) {
        return rc;
    }
    if (rc == 0) {
        begin_stage(s, s->stats.in_order ? STAGE_OVERLAP : STAGE_LOAD, s->stats.rows);
        return 1;
    }
    s->next++;
    s->stats.done_rows++;
    if (!is_nowhere(e.offset, e.size)) {
        s->stats.expected_bytes += (uint64_t)pv_needle_record_len(e.size, s->version);
        if (s->have_last && compare(&s->last, &e) > 0) {
            s->stats.in_order = 0;
        }
        s->last = e;
        s->have_last = true;
    }
    return 1;
}

static int step_load(pv_scrub *s, pv_errinfo *err) {
    if (s->sorted == NULL) {
        s->sorted = pv__malloc((size_t)s->stats.rows * sizeof *s->sorted);
        if (s->sorted == NULL) {
            return pv__fail(err, PV_ENOMEM, s->stats.rows * sizeof *s->sorted, 0, 0, 0);
        }
    }
    entry e;
    int rc = row_at(s, s->next, &e, err);
    if (rc < 0) {
        return rc;
    }
    if (rc == 0) {
        qsort(s->sorted, s->sorted_count, sizeof *s->sorted, compare_for_sort);
        begin_stage(s, STAGE_OVERLAP, s->stats.rows);
        return 1;
    }
    s->next++;
    if (!is_nowhere(e.offset, e.size)) {
        s->sorted[s->sorted_count++] = e;
    }
    return 1;
}

/* Last byte as upstream counts it: a length of 0, which hostile sizes give, counts as one byte. */
static uint64_t last_byte(const pv_scrub *s, const entry *e) {
    int64_t len = pv_needle_record_len(e->size, s->version);
    return len == 0 ? e->offset : e->offset + (uint64_t)len - 1;
}

static int step_overlap(pv_scrub *s, pv_errinfo *err) {
    entry e;
    int rc = next_entry(s, &e, err);
    if (rc < 0) {
        return rc;
    }
    if (rc == 0) {
        bool more = !(s->flags & PV_SCRUB_INDEX_ONLY);
        begin_stage(s, more ? STAGE_RECORDS : STAGE_DONE, s->stats.rows * 2);
        return more;
    }
    s->stats.done_rows++;
    if (s->have_last && (int64_t)e.offset <= (int64_t)last_byte(s, &s->last)) {
        pv_scrub_finding *f = add_finding(s, PV_SCRUB_OVERLAP, &e);
        f->end = last_byte(s, &e);
        f->other_key = s->last.key;
        f->other_offset = s->last.offset;
        f->other_end = last_byte(s, &s->last);
    }
    s->last = e;
    s->have_last = true;
    return 1;
}

/* ------------------------------------------------------------------ records */

static int parse(const pv_scrub *s, const uint8_t *p, size_t len, const entry *e, uint64_t offset, pv_errinfo *err) {
    pv_needle n;
    int rc = pv_needle_parse(p, len, s->version, e->size, offset, 0, &n, err);
    if (rc == 0 && (s->flags & PV_SCRUB_CHECK_ID) && n.id != e->key) {
        return pv__fail(err, PV_EID, n.id, e->key, offset, 0);
    }
    return rc;
}

/* Reads the record into memory of its own: for what does not fit the window, and to learn what exactly is wrong. */
static int read_alone(pv_scrub *s, const entry *e, uint64_t offset, pv_errinfo *err) {
    size_t len = (size_t)pv_needle_record_len(e->size, s->version);
    uint64_t file_bytes;
    int rc = pv__io_size(s->dat_fd, &file_bytes, err);
    if (rc < 0) {
        return rc;
    }
    if (offset > file_bytes || len > file_bytes - offset) {
        return pv__fail(err, PV_EEOF, offset, len, offset < file_bytes ? file_bytes - offset : 0, 0);
    }
    uint8_t *buf = pv__malloc(len);
    if (buf == NULL) {
        return pv__fail(err, PV_ENOMEM, len, 0, 0, 0);
    }
    rc = pv__io_pread_full(s->dat_fd, buf, len, offset, err);
    spend(s, len);
    if (rc == 0) {
        rc = parse(s, buf, len, e, offset, err);
    }
    pv__free(buf);
    return rc;
}

/* A record too long for the window, in pieces. 0 only if it is good; the reason of anything else is found by read_alone. */
static int stream_long(pv_scrub *s, const entry *e) {
    pv_scan_rec rec;
    uint64_t at = e->offset;
    uint64_t len = (uint64_t)pv_needle_record_len(e->size, s->version);
    uint64_t file_bytes;
    /* upstream reads the padding, too; a scan does without */
    if (pv__io_size(s->dat_fd, &file_bytes, NULL) < 0 || at > file_bytes || len > file_bytes - at) {
        return PV_EEOF;
    }
    if (pv_dat_scan(s->dat_fd, s->version, &at, UINT64_MAX, 1, &rec, 1, NULL) != 1) {
        return PV_EEOF;
    }
    spend(s, (uint64_t)rec.record_len);
    bool good = rec.status == 0 && rec.size == e->size && at == e->offset + len;
    if (s->flags & PV_SCRUB_CHECK_ID) {
        good = good && rec.id == e->key;
    }
    return good ? 0 : PV_ECORRUPT;
}

/* Checks the record in the window, reading on if need be. Negative: not good, or not to be had this way. */
static int check_in_window(pv_scrub *s, const entry *e) {
    size_t len = (size_t)pv_needle_record_len(e->size, s->version);
    if (len > s->window_cap) {
        return stream_long(s, e);
    }
    bool inside = e->offset >= s->window_at && e->offset - s->window_at <= s->window_got &&
                  s->window_got - (size_t)(e->offset - s->window_at) >= len;
    if (!inside) {
        size_t fill = s->budget < s->window_cap ? (size_t)s->budget : s->window_cap;
        fill = fill < MIN_FILL ? MIN_FILL : fill;
        fill = fill < len ? len : fill;
        s->window_at = e->offset;
        s->window_got = 0;
        int rc = pv__io_pread(s->dat_fd, s->window, fill, e->offset, &s->window_got, NULL);
        spend(s, s->window_got);
        if (s->window_got < len) {
            return rc < 0 ? rc : PV_EEOF;
        }
    }
    return parse(s, s->window + (e->offset - s->window_at), len, e, e->offset, NULL);
}

static int check_record(pv_scrub *s, const entry *e, pv_errinfo *err) {
    if (check_in_window(s, e) == 0) {
        return 0;
    }
    int rc = read_alone(s, e, e->offset, err);
    if (rc == PV_ESIZE && s->width == 4) {
        /* an old volume that outgrew 32 GiB: its offsets had wrapped */
        rc = read_alone(s, e, e->offset + PV__GIB32, err);
    }
    return rc;
}

static int step_records(pv_scrub *s, pv_errinfo *err) {
    entry e;
    int rc = next_entry(s, &e, err);
    if (rc < 0) {
        return rc;
    }
    if (rc == 0) {
        s->stats.position = s->stats.dat_bytes;
        begin_stage(s, STAGE_DONE, s->stats.rows * 3);
        return 0;
    }
    s->stats.done_rows++;
    s->stats.position = e.offset;
    if (e.size < 0 || e.offset < s->resume_offset) {
        return 1;
    }
    pv_errinfo record_err;
    rc = check_record(s, &e, &record_err);
    if (rc == PV_ENOMEM) {
        *err = record_err;
        return rc;
    }
    s->stats.checked_records++;
    if (rc < 0) {
        s->stats.bad_records++;
        pv_scrub_finding *f = add_finding(s, PV_SCRUB_RECORD, &e);
        f->end = last_byte(s, &e);
        f->error = record_err;
    }
    return 1;
}

int pv_scrub_step(pv_scrub *s, uint64_t max_bytes, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    s->budget = max_bytes > 0 ? max_bytes : 1;
    int rc = s->stage != STAGE_DONE;
    while (rc == 1 && s->budget > 0 && s->found_count < FINDINGS_MAX) {
        switch (s->stage) {
        case STAGE_ROWS:
            rc = step_rows(s, err);
            break;
        case STAGE_LOAD:
            rc = step_load(s, err);
            break;
        case STAGE_OVERLAP:
            rc = step_overlap(s, err);
            break;
        case STAGE_RECORDS:
            rc = step_records(s, err);
            break;
        default:
            rc = 0;
            break;
        }
    }
    return rc;
}
