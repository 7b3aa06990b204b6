/* pv_sorted.c - the sorted-file needle map of read-only volumes: key -> (offset, size), in a file beside the index.
 *
 * The file (.sdx) has the rows of the index's live keys, ascending, in the index's own row format; a delete sets the size of
 * a row to -1 in place. In memory is one key of each PAGE rows, so that a look-up costs one read of PAGE rows.
 *
 * A file is used if it is newer than the index and holds just what the index says; otherwise it is made anew under a
 * temporary name. The index is the truth: all of it is read at open, for the counters and for that comparison.
 *
 * Counters are upstream's for this kind (storage.md 15): every row of the index counts as a file, and all but the last live
 * row of each key count as deleted; deletes at run time change none of them. Upstream asks a Bloom filter which rows are the
 * last of their keys, so that now and then a live row counts as deleted. Masters and shells see the figures and vacuum by
 * them, so the filter is the same one here.
 */
#include "pv_int.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/stat.h>

#define PAGE 64U
#define ROW_MAX 17U
#define VISIT_ROWS 1024U
#define TOMBSTONE (-1)
#define FILTER_HASHES 10U

struct pv__sorted {
    int fd;
    uint8_t width;
    size_t row_len;
    uint64_t rows;
    uint64_t *first_keys; /* of each page */
};

static int build(const char *path, pv_map *live, uint8_t width, pv_errinfo *err) {
    size_t len = strlen(path) + sizeof ".tmp";
    char *tmp = pv__malloc(len);
    pv_idx_row *rows = pv__malloc(VISIT_ROWS * sizeof *rows);
    uint8_t *out = pv__malloc(VISIT_ROWS * ROW_MAX);
    int fd = -1;
    int rc;
    if (tmp == NULL || rows == NULL || out == NULL) {
        rc = pv__fail(err, PV_ENOMEM, len, 0, 0, 0);
        goto done;
    }
    snprintf(tmp, len, "%s.tmp", path);
    rc = pv__io_open(tmp, O_RDWR | O_CREAT | O_TRUNC, 0644, &fd, err);
    uint64_t at = 0;
    uint64_t from = 0;
    for (bool more = rc == 0; more;) {
        int count = pv_map_visit(live, from, rows, VISIT_ROWS);
        size_t fill = 0;
        for (int i = 0; i < count; i++) {
            if (rows[i].offset != 0 && rows[i].size >= 0) {
                pv_idx_row_put(&rows[i], width, out + fill);
                fill += 12U + width;
            }
        }
        if (fill > 0) {
            rc = pv__io_pwrite(fd, out, fill, at, err);
        }
        at += fill;
        more = rc == 0 && count == (int)VISIT_ROWS && rows[count - 1].key != UINT64_MAX;
        from = more ? rows[count - 1].key + 1 : 0;
    }
    if (rc == 0) {
        rc = pv__io_datasync(fd, err);
    }
    if (rc == 0) {
        rc = pv__io_rename(tmp, path, err);
    }
    if (rc < 0 && fd >= 0 && pv__io_unlink(tmp, NULL) < 0) {
        /* Nobody reads it; the next attempt truncates it. */
    }
done:
    (void)pv__io_close(fd, NULL);
    pv__free(tmp);
    pv__free(rows);
    pv__free(out);
    return rc;
}

static bool is_newer(int fd, int than_fd) {
    struct stat a;
    struct stat b;
    if (pv__io_stat(fd, &a, NULL) < 0 || pv__io_stat(than_fd, &b, NULL) < 0) {
        return false;
    }
    return a.st_mtim.tv_sec != b.st_mtim.tv_sec ? a.st_mtim.tv_sec > b.st_mtim.tv_sec
                                                : a.st_mtim.tv_nsec > b.st_mtim.tv_nsec;
}

/* Reads the whole file once: takes the first key of each page, and says whether it holds just what live does. */
static int take_in(pv__sorted *s, pv_map *live, bool *same, pv_errinfo *err) {
    uint64_t size;
    int rc = pv__io_size(s->fd, &size, err);
    if (rc < 0) {
        return rc;
    }
    *same = size % s->row_len == 0;
    s->rows = size / s->row_len;
    uint64_t pages = (s->rows + PAGE - 1) / PAGE;
    pv__free(s->first_keys);
    s->first_keys = pages > SIZE_MAX / 8 ? NULL : pv__malloc((size_t)pages * 8 + 8);
    pv_idx_row *rows = pv__malloc(VISIT_ROWS * sizeof *rows);
    pv_idx_row *want = pv__malloc(VISIT_ROWS * sizeof *want);
    if (s->first_keys == NULL || rows == NULL || want == NULL) {
        rc = pv__fail(err, PV_ENOMEM, pages, 0, 0, 0);
        goto done;
    }
    uint64_t from = 0;
    int have = 0;
    int used = 0;
    bool ended = false;
    for (uint64_t at = 0; *same && at < s->rows;) {
        int count = pv_idx_read(s->fd, s->width, at, rows, VISIT_ROWS, err);
        if (count <= 0) {
            rc = count;
            *same = false;
            break;
        }
        for (int i = 0; i < count && *same; i++) {
            if ((at + (uint64_t)i) % PAGE == 0) {
                s->first_keys[(at + (uint64_t)i) / PAGE] = rows[i].key;
            }
            /* the next entry of the index that is live, or was when the file was made */
            for (;;) {
                if (used == have) {
                    have = ended ? 0 : pv_map_visit(live, from, want, VISIT_ROWS);
                    used = 0;
                    ended = have < (int)VISIT_ROWS || want[have - 1].key == UINT64_MAX;
                    from = have > 0 && !ended ? want[have - 1].key + 1 : 0;
                    if (have == 0) {
                        *same = false;
                        break;
                    }
                }
                if (want[used].key >= rows[i].key) {
                    break;
                }
                *same = want[used].offset == 0 || want[used].size < 0; /* deleted: need not be in the file */
                used++;
                if (!*same) {
                    break;
                }
            }
            if (*same) {
                bool deleted = want[used].size < 0;
                *same = want[used].key == rows[i].key && (deleted ? rows[i].size == TOMBSTONE : true) &&
                        (deleted || (want[used].offset == rows[i].offset && want[used].size == rows[i].size));
                used++;
            }
        }
        at += (uint64_t)count;
    }
    /* nothing live may be left over */
    while (*same) {
        if (used == have) {
            have = ended ? 0 : pv_map_visit(live, from, want, VISIT_ROWS);
            used = 0;
            ended = have < (int)VISIT_ROWS || want[have - 1].key == UINT64_MAX;
            from = have > 0 && !ended ? want[have - 1].key + 1 : 0;
            if (have == 0) {
                break;
            }
        }
        *same = want[used].offset == 0 || want[used].size < 0;
        used++;
    }
done:
    pv__free(rows);
    pv__free(want);
    return rc;
}

static int open_file(pv__sorted *s, const char *path, int idx_fd, pv_map *live, pv_errinfo *err) {
    bool same = false;
    int rc = pv__io_open(path, O_RDWR, 0, &s->fd, NULL);
    if (rc == 0 && is_newer(s->fd, idx_fd)) {
        rc = take_in(s, live, &same, err);
        if (rc < 0) {
            return rc;
        }
    }
    if (same) {
        return 0;
    }
    (void)pv__io_close(s->fd, NULL);
    s->fd = -1;
    rc = build(path, live, s->width, err);
    if (rc == 0) {
        rc = pv__io_open(path, O_RDWR, 0, &s->fd, err);
    }
    if (rc == 0) {
        rc = take_in(s, live, &same, err);
    }
    return rc < 0 || same ? rc : pv__fail(err, PV_ECORRUPT, 0, 0, 0, 0);
}

/* Upstream walks the index backwards: the last row of a key decides whether an earlier one is superseded. */
int pv__index_count(int idx_fd, uint8_t width, uint64_t max_rows, pv_map *live, pv_map_stats *stats, pv_errinfo *err) {
    pv_idx_row *rows = pv__malloc(VISIT_ROWS * sizeof *rows);
    if (rows == NULL) {
        return pv__fail(err, PV_ENOMEM, 0, 0, 0, 0);
    }
    int n = 0;
    while (stats->file_count < max_rows) {
        uint64_t left = max_rows - stats->file_count;
        n = pv_idx_read(idx_fd, width, stats->file_count, rows, left < VISIT_ROWS ? (size_t)left : VISIT_ROWS, err);
        if (n <= 0) {
            break;
        }
        for (int i = 0; i < n; i++) {
            stats->file_bytes += rows[i].size > 0 ? (uint64_t)rows[i].size : 0;
            stats->max_key = rows[i].key > stats->max_key ? rows[i].key : stats->max_key;
        }
        stats->file_count += (uint64_t)n;
    }
    n = n < 0 ? n : 0;
    uint64_t kept = 0;
    uint64_t kept_bytes = 0;
    uint64_t from = 0;
    int got;
    while (n == 0 && (got = pv_map_visit(live, from, rows, VISIT_ROWS)) > 0) {
        for (int i = 0; i < got; i++) {
            kept += rows[i].size > 0;
            kept_bytes += rows[i].size > 0 ? (uint64_t)rows[i].size : 0;
        }
        if (rows[got - 1].key == UINT64_MAX) {
            break;
        }
        from = rows[got - 1].key + 1;
    }
    pv__free(rows);
    stats->deleted_count = stats->file_count - kept;
    stats->deleted_bytes = stats->file_bytes - kept_bytes;
    return n;
}

/* Number of bits of a filter for so many keys with one false answer in a thousand: ceil(keys * |ln 0.001| / ln(2)^2). */
static uint64_t filter_bits(uint64_t keys) {
    double bits = (double)keys / ((0.6931471805599453 * 0.6931471805599453) / 6.907755278982137);
    uint64_t whole = (uint64_t)bits;
    return whole + ((double)whole < bits);
}

/* Adds a key; whether all of its bits were set before. */
static bool filter_add(uint8_t *filter, uint64_t bits, uint64_t key) {
    uint64_t hash = 14695981039346656037U; /* FNV-1, 64 bits, over the key in big-endian order */
    for (int shift = 56; shift >= 0; shift -= 8) {
        hash = hash * 1099511628211U ^ (key >> shift & 0xff);
    }
    uint64_t step = hash >> 32;
    uint64_t place = hash & 0xffffffff;
    bool known = true;
    for (uint32_t i = 0; i < FILTER_HASHES; i++, place += step) {
        uint64_t bit = place % bits;
        known = known && ((unsigned)filter[bit / 8] >> bit % 8 & 1U) != 0;
        filter[bit / 8] |= (uint8_t)(1U << bit % 8);
    }
    return known;
}

/* Upstream's estimate: a row counts as deleted if the filter knows its key from a later row, or if it holds nothing. */
static int estimate(int idx_fd, uint8_t width, uint64_t count, pv_map_stats *stats, pv_errinfo *err) {
    uint64_t bits = filter_bits(count);
    pv_idx_row *rows = pv__malloc(VISIT_ROWS * sizeof *rows);
    uint8_t *filter = bits / 8 >= SIZE_MAX ? NULL : pv__calloc((size_t)(bits / 8 + 1), 1);
    int rc = 0;
    if (rows == NULL || filter == NULL) {
        rc = pv__fail(err, PV_ENOMEM, bits / 8, 0, 0, 0);
        count = 0;
    }
    while (count > 0) {
        size_t want = count < VISIT_ROWS ? (size_t)count : VISIT_ROWS;
        int got = pv_idx_read(idx_fd, width, count - want, rows, want, err);
        if (got != (int)want) {
            rc = got < 0 ? got : pv__fail(err, PV_EEOF, count, 0, 0, 0);
            break;
        }
        for (size_t i = want; i-- > 0;) {
            bool holds = rows[i].size > 0;
            bool known = filter_add(filter, bits, rows[i].key);
            stats->file_count++;
            stats->file_bytes += holds ? (uint64_t)rows[i].size : 0;
            stats->max_key = rows[i].key > stats->max_key ? rows[i].key : stats->max_key;
            stats->deleted_count += known || !holds;
            stats->deleted_bytes += known && holds ? (uint64_t)rows[i].size : 0;
        }
        count -= want;
    }
    pv__free(rows);
    pv__free(filter);
    return rc;
}

int pv__sorted_open(const char *path, int idx_fd, uint8_t width, pv__sorted **out, pv_map_stats *stats,
                    pv_errinfo *err) {
    pv_map *live = NULL;
    uint64_t loaded;
    memset(stats, 0, sizeof *stats);
    pv__sorted *s = pv__calloc(1, sizeof *s);
    int rc = s == NULL ? PV_ENOMEM : pv_map_new(width, &live);
    if (rc < 0) {
        pv__free(s);
        return pv__fail(err, rc, 0, 0, 0, 0);
    }
    s->fd = -1;
    s->width = width;
    s->row_len = 12U + width;
    rc = pv_map_load(live, idx_fd, 0, &loaded, err);
    if (rc == 0) {
        rc = estimate(idx_fd, width, loaded, stats, err);
    }
    if (rc == 0) {
        rc = open_file(s, path, idx_fd, live, err);
    }
    pv_map_free(live);
    if (rc < 0) {
        pv__sorted_close(s);
        return rc;
    }
    stats->entries = s->rows;
    *out = s;
    return 0;
}

void pv__sorted_close(pv__sorted *s) {
    if (s != NULL) {
        (void)pv__io_close(s->fd, NULL);
        pv__free(s->first_keys);
        pv__free(s);
    }
}

size_t pv__sorted_memory(const pv__sorted *s) {
    return sizeof *s + (size_t)((s->rows + PAGE - 1) / PAGE) * 8;
}

/* A page of rows from the page cache alone; PV_EMORE if it is not there. */
static int read_page_cached(const pv__sorted *s, uint64_t first, pv_idx_row *rows) {
    uint8_t buf[PAGE * ROW_MAX];
    size_t n = s->rows - first < PAGE ? (size_t)(s->rows - first) : PAGE;
    if (pv__io_pread_cached(s->fd, buf, n * s->row_len, first * s->row_len, NULL) < 0) {
        return PV_EMORE;
    }
    for (size_t i = 0; i < n; i++) {
        pv_idx_row_parse(buf + i * s->row_len, s->width, &rows[i]);
    }
    return (int)n;
}

/* Row number of the first row whose key is not below this one; the page it is in is left in rows. */
static int search(const pv__sorted *s, uint64_t key, bool cached, pv_idx_row *rows, uint64_t *at, bool *found) {
    *found = false;
    *at = 0;
    if (s->rows == 0) {
        return 0;
    }
    uint64_t low = 0;
    uint64_t high = (s->rows + PAGE - 1) / PAGE; /* the last page that begins at or below the key */
    while (high - low > 1) {
        uint64_t mid = low + (high - low) / 2;
        if (s->first_keys[mid] <= key) {
            low = mid;
        } else {
            high = mid;
        }
    }
    int n = cached ? read_page_cached(s, low * PAGE, rows) : pv_idx_read(s->fd, s->width, low * PAGE, rows, PAGE, NULL);
    if (n < 0) {
        return n;
    }
    int i = 0;
    while (i < n && rows[i].key < key) {
        i++;
    }
    *at = low * PAGE + (uint64_t)i;
    *found = i < n && rows[i].key == key;
    if (*found) {
        rows[0] = rows[i];
    }
    return 0;
}

int pv__sorted_get(const pv__sorted *s, uint64_t key, bool cached, uint64_t *offset, int32_t *size) {
    pv_idx_row rows[PAGE];
    uint64_t at;
    bool found;
    int rc = search(s, key, cached, rows, &at, &found);
    if (rc < 0 || !found) {
        return rc < 0 ? rc : PV_ENOTFOUND;
    }
    *offset = rows[0].offset;
    *size = rows[0].size;
    return 0;
}

int pv__sorted_delete(pv__sorted *s, uint64_t key, int32_t *old_size) {
    pv_idx_row rows[PAGE];
    uint8_t buf[ROW_MAX];
    uint64_t at;
    bool found;
    int rc = search(s, key, false, rows, &at, &found);
    if (rc < 0 || !found) {
        return rc < 0 ? rc : PV_ENOTFOUND;
    }
    *old_size = rows[0].size;
    rows[0].size = TOMBSTONE;
    pv_idx_row_put(&rows[0], s->width, buf);
    return pv__io_pwrite(s->fd, buf, s->row_len, at * s->row_len, NULL);
}

int pv__sorted_visit(const pv__sorted *s, uint64_t from, pv_idx_row *rows, size_t max) {
    pv_idx_row page[PAGE];
    uint64_t at;
    bool found;
    int rc = search(s, from, false, page, &at, &found);
    return rc < 0 ? rc : pv_idx_read(s->fd, s->width, at, rows, max, NULL);
}
