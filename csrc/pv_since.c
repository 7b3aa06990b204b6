/* pv_since.c - finding where the records appended after a moment begin, by the append times in the records.
 *
 * Rows of an index stand in the order of their appends, so the first record behind a moment is found by halves. Works on
 * descriptors of its own; no locks: a caller whose files grow gives the number of rows it knows to be whole.
 */
#include "pv_int.h"

#define CHECKSUM_BYTES 4U
#define TIME_BYTES 8U
#define SKIP_ROWS 512U

int pv_dat_append_time(int dat_fd, uint8_t version, uint64_t offset, uint64_t *append_at_ns, pv_errinfo *err) {
    *append_at_ns = 0;
    if (version < 1 || version > 3) {
        return pv__fail(err, PV_EVERSION, version, 0, 0, 0);
    }
    uint8_t head[PV_NEEDLE_HEADER];
    if (offset > PV__OFF_MAX - sizeof head) {
        return pv__fail(err, PV_EEOF, offset, sizeof head, 0, 0);
    }
    int rc = pv__io_pread_full(dat_fd, head, sizeof head, offset, err);
    if (rc < 0) {
        return rc;
    }
    uint32_t cookie;
    uint64_t id;
    int32_t size;
    pv_needle_header(head, &cookie, &id, &size);
    if (size < 0) {
        return pv__fail(err, PV_ECORRUPT, 0, offset, (uint64_t)(int64_t)size, 0);
    }
    if (version != 3) {
        return 0;
    }
    uint64_t at = PV_NEEDLE_HEADER + (uint64_t)size + CHECKSUM_BYTES;
    if (offset > PV__OFF_MAX - at - TIME_BYTES) {
        return pv__fail(err, PV_EEOF, offset, at + TIME_BYTES, 0, 0);
    }
    uint8_t when[TIME_BYTES];
    rc = pv__io_pread_full(dat_fd, when, sizeof when, offset + at, err);
    if (rc == 0) {
        *append_at_ns = pv__get_be64(when);
    }
    return rc;
}

/* The first row in [*row, end) that has a record: 1 with *row and *offset set, 0: there is none, or an error. */
static int next_with_record(int idx_fd, uint8_t width, uint64_t *row, uint64_t end, uint64_t *offset, pv_errinfo *err) {
    pv_idx_row rows[SKIP_ROWS];
    size_t want = 1; /* rows without a record are rare */
    for (uint64_t at = *row; at < end;) {
        if (want > end - at) {
            want = (size_t)(end - at);
        }
        int got = pv_idx_read(idx_fd, width, at, rows, want, err);
        if (got < 0) {
            return got;
        }
        if (got == 0) {
            return pv__fail(err, PV_EEOF, at, 1, 0, 1);
        }
        for (int i = 0; i < got; i++) {
            if (rows[i].offset != 0) {
                *row = at + (uint64_t)i;
                *offset = rows[i].offset;
                return 1;
            }
        }
        at += (uint64_t)got;
        want = SKIP_ROWS;
    }
    return 0;
}

int pv_dat_find_since(int dat_fd, int idx_fd, uint8_t width, uint8_t version, uint64_t rows, uint64_t since_ns,
                      uint64_t *offset, uint64_t *row, pv_errinfo *err) {
    *offset = 0;
    *row = rows;
    if (width != 4 && width != 5) {
        return pv__fail(err, PV_EINVAL, width, 0, 0, 0);
    }
    uint64_t low = 0;
    uint64_t high = rows;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        uint64_t probe = middle;
        uint64_t at;
        int rc = next_with_record(idx_fd, width, &probe, high, &at, err);
        if (rc < 0) {
            *row = probe;
            return rc;
        }
        if (rc == 0) {
            high = middle;
            continue;
        }
        uint64_t when;
        rc = pv_dat_append_time(dat_fd, version, at, &when, err);
        if (rc < 0) {
            *row = probe;
            *offset = at;
            return rc;
        }
        if (when <= since_ns) {
            low = probe + 1;
        } else {
            /* rows between the middle and the probe have no record, so they are no better */
            high = middle;
            *row = probe;
            *offset = at;
        }
    }
    return *offset != 0;
}
