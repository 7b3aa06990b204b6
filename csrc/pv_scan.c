/* pv_scan.c - walking a data file record by record, and the check of its end before a volume is opened.
 *
 * Works on descriptors that are not (or not yet) part of a volume handle. No locks: a caller that scans a file that is
 * being appended to gives the end it knows to be whole. Memory is one window, whatever the sizes in the file say.
 */
#include "pv_int.h"

#include <stdbool.h>

#define GIB32 ((uint64_t)1 << 35)
#define CHECKSUM_BYTES 4U
#define TIME_BYTES 8U
#define DATA_SIZE_BYTES 4U
#define HEAD_MAX (PV_NEEDLE_HEADER + DATA_SIZE_BYTES)

#define WINDOW_BODIES ((size_t)1 << 20)
#define WINDOW_HEADERS ((size_t)64 << 10)
#define WINDOW_SPARSE ((size_t)4 << 10) /* for headers that lie further apart than a window */

/* Longest run of fields that can be meant: flags, name, mime, times, ttl, pairs. */
#define FIELDS_MAX ((size_t)1 + 256 + 256 + 5 + 2 + 2 + 65535)
_Static_assert(FIELDS_MAX + CHECKSUM_BYTES + TIME_BYTES <= PV_NEEDLE_TAIL_MAX, "a tail fits its buffer");

#define TAIL_CHECK_ROWS 1024

typedef struct scanner {
    int fd;
    uint8_t version;
    uint64_t end; /* nothing is read behind it */
    uint8_t *buf; /* cap bytes, then PV_NEEDLE_TAIL_MAX for putting a long record's tail together */
    size_t cap;
    uint64_t at; /* what buf holds: [at, at + got) */
    size_t got;
} scanner;

/* Bytes behind the body without the padding. */
static uint64_t tail_bytes(uint8_t version) {
    return CHECKSUM_BYTES + (version == 3 ? TIME_BYTES : 0);
}

/* Gives want bytes at offset; the caller has seen that they lie before end, and want <= cap. PV_EEOF if the file has
 * become shorter. */
static int window(scanner *s, uint64_t offset, size_t want, const uint8_t **out, pv_errinfo *err) {
    if (offset < s->at || offset - s->at > s->got || s->got - (size_t)(offset - s->at) < want) {
        uint64_t known_end = s->at + s->got;
        bool near = s->got == 0 || (offset >= s->at && offset < known_end + s->cap);
        size_t fill = near || want > WINDOW_SPARSE ? s->cap : WINDOW_SPARSE;
        if (fill > s->end - offset) {
            fill = (size_t)(s->end - offset);
        }
        s->at = offset;
        s->got = 0;
        int rc = pv__io_pread(s->fd, s->buf, fill, offset, &s->got, err);
        /* A bad sector further on does not take away what was read before it. */
        if (rc < 0 && s->got < want) {
            return rc;
        }
        if (s->got < want) {
            return pv__fail(err, PV_EEOF, offset, want, s->got, 0);
        }
    }
    *out = s->buf + (offset - s->at);
    return 0;
}

/* Checks the body of a record that does not fit the window, piece by piece. */
static int check_long_body(scanner *s, uint64_t offset, pv_needle *n, pv_errinfo *err) {
    const uint8_t *p;
    uint64_t size = (uint64_t)n->size;
    uint64_t data_at = offset + PV_NEEDLE_HEADER;
    n->data_size = (uint32_t)size;
    if (s->version != 1) {
        int rc = window(s, data_at, DATA_SIZE_BYTES, &p, err);
        if (rc < 0) {
            return rc;
        }
        n->data_size = pv__get_be32(p);
        data_at += DATA_SIZE_BYTES;
        if (n->data_size > size - DATA_SIZE_BYTES) {
            return pv__fail(err, PV_ECORRUPT, 1, 0, n->id, 0);
        }
    }
    uint32_t computed = 0;
    for (uint64_t done = 0; done < n->data_size;) {
        uint64_t left = n->data_size - done;
        size_t piece = left < s->cap ? (size_t)left : s->cap;
        int rc = window(s, data_at + done, piece, &p, err);
        if (rc < 0) {
            return rc;
        }
        computed = pv_crc32c(computed, p, piece);
        done += piece;
    }
    size_t sum_len = (size_t)tail_bytes(s->version);
    uint64_t sum_at = offset + PV_NEEDLE_HEADER + size;
    uint8_t *tail = s->buf + s->cap;
    if (s->version == 1) {
        int rc = window(s, sum_at, sum_len, &p, err);
        if (rc < 0) {
            return rc;
        }
        n->checksum = pv__get_be32(p);
    } else {
        /* Behind the longest fields that can be meant, a hostile size may claim more: nobody reads that. */
        uint64_t claimed = size - DATA_SIZE_BYTES - n->data_size;
        size_t fields = claimed < FIELDS_MAX ? (size_t)claimed : FIELDS_MAX;
        int rc = window(s, data_at + n->data_size, fields, &p, err);
        if (rc < 0) {
            return rc;
        }
        memcpy(tail, p, fields);
        rc = window(s, sum_at, sum_len, &p, err);
        if (rc < 0) {
            return rc;
        }
        memcpy(tail + fields, p, sum_len);
        int32_t whole_size = n->size;
        n->size = (int32_t)(DATA_SIZE_BYTES + n->data_size + fields);
        rc = pv_needle_parse_tail(tail, fields + sum_len, s->version, n, err);
        n->size = whole_size;
        if (rc < 0) {
            return rc;
        }
    }
    if (n->data_size > 0) {
        uint32_t stored = n->checksum;
        n->checksum = computed;
        if (stored != computed && stored != pv_crc_legacy(computed)) {
            return pv__fail(err, PV_ECRC, computed, stored, n->id, 0);
        }
    }
    return 0;
}

static int check_body(scanner *s, uint64_t offset, pv_needle *n, pv_errinfo *err) {
    if (n->size < 0) {
        return pv__fail(err, PV_ECORRUPT, 1, 0, n->id, 0);
    }
    uint64_t len = PV_NEEDLE_HEADER + (uint64_t)n->size + tail_bytes(s->version);
    if (len > s->cap) {
        return check_long_body(s, offset, n, err);
    }
    const uint8_t *p;
    int rc = window(s, offset, (size_t)len, &p, err);
    return rc < 0 ? rc : pv_needle_parse(p, (size_t)len, s->version, 0, offset, PV_PARSE_ANY_SIZE, n, err);
}

/* Reads one record. 1: *rec is set; 0: clean end; negative: nothing more can be had. */
static int scan_one(scanner *s, uint64_t offset, int with_body, pv_scan_rec *rec, pv_errinfo *err) {
    const uint8_t *p;
    if (offset >= s->end || s->end - offset < PV_NEEDLE_HEADER) {
        return 0;
    }
    int rc = window(s, offset, PV_NEEDLE_HEADER, &p, err);
    if (rc < 0) {
        return rc == PV_EEOF ? 0 : rc;
    }
    pv_needle n = {.version = s->version};
    pv_needle_header(p, &n.cookie, &n.id, &n.size);
    int64_t len = pv_needle_record_len(n.size, s->version);
    if (len < PV_NEEDLE_HEADER) {
        return pv__fail(err, PV_ECORRUPT, 0, offset, (uint64_t)(int64_t)n.size, 0);
    }
    /* Padding carries nothing: a record that lacks only that is whole. */
    uint64_t needed = n.size < 0 ? (uint64_t)len : PV_NEEDLE_HEADER + (uint64_t)n.size + tail_bytes(s->version);
    if (needed > s->end - offset) {
        return pv__fail(err, PV_EEOF, offset, (uint64_t)len, s->end - offset, 0);
    }
    memset(rec, 0, sizeof *rec);
    rec->offset = offset;
    rec->record_len = len;
    rec->cookie = n.cookie;
    rec->id = n.id;
    rec->size = n.size;
    if (with_body) {
        pv_errinfo body_err;
        rec->status = check_body(s, offset, &n, &body_err);
        rec->append_at_ns = n.append_at_ns;
        rec->last_modified_s = n.last_modified_s;
        rec->data_size = n.data_size;
        rec->checksum = n.checksum;
        rec->flags = n.flags;
        rec->ttl_count = n.ttl_count;
        rec->ttl_unit = n.ttl_unit;
    }
    return 1;
}

static int scanner_init(scanner *s, int fd, uint8_t version, uint64_t end_offset, size_t cap, pv_errinfo *err) {
    if (version < 1 || version > 3) {
        return pv__fail(err, PV_EVERSION, version, 0, 0, 0);
    }
    *s = (scanner){.fd = fd, .version = version, .cap = cap};
    int rc = pv__io_size(fd, &s->end, err);
    if (rc < 0) {
        return rc;
    }
    if (end_offset < s->end) {
        s->end = end_offset;
    }
    s->buf = pv__malloc(s->cap + PV_NEEDLE_TAIL_MAX);
    return s->buf != NULL ? 0 : pv__fail(err, PV_ENOMEM, s->cap + PV_NEEDLE_TAIL_MAX, 0, 0, 0);
}

int pv_dat_scan(int fd, uint8_t version, uint64_t *offset, uint64_t end_offset, int check_body_too, pv_scan_rec *recs,
                size_t max, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    if (max == 0 || max > INT32_MAX) {
        return pv__fail(err, PV_EINVAL, max, 0, 0, 0);
    }
    scanner s;
    int rc = scanner_init(&s, fd, version, end_offset, check_body_too ? WINDOW_BODIES : WINDOW_HEADERS, err);
    if (rc < 0) {
        return rc;
    }
    size_t count = 0;
    while (count < max) {
        rc = scan_one(&s, *offset, check_body_too, &recs[count], err);
        if (rc <= 0) {
            break;
        }
        *offset += (uint64_t)recs[count].record_len;
        count++;
    }
    pv__free(s.buf);
    if (count == 0) {
        return rc;
    }
    pv__err_clear(err); /* the next call meets it again, with nothing before it */
    return (int)count;
}

int pv_dat_walk(int fd, uint8_t version, uint64_t *offset, uint64_t end_offset, int check_body_too, uint32_t max,
                pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    if (max == 0 || max > INT32_MAX) {
        return pv__fail(err, PV_EINVAL, max, 0, 0, 0);
    }
    scanner s;
    int rc = scanner_init(&s, fd, version, end_offset, check_body_too ? WINDOW_BODIES : WINDOW_HEADERS, err);
    if (rc < 0) {
        return rc;
    }
    uint32_t count = 0;
    while (count < max) {
        pv_scan_rec rec;
        rc = scan_one(&s, *offset, check_body_too, &rec, err);
        if (rc > 0 && rec.status < 0) {
            rc = pv__fail(err, rec.status, rec.offset, rec.id, 0, 0);
        }
        if (rc <= 0) {
            break;
        }
        *offset += (uint64_t)rec.record_len;
        count++;
    }
    pv__free(s.buf);
    return rc < 0 ? rc : (int)count;
}

/* ------------------------------------------------------------------ the end of a data file */

typedef struct tail_check {
    int dat_fd;
    uint8_t width;
    uint8_t version;
    uint64_t dat_size; /* as it is; upstream goes by it rounded up to 8, so a cut within the last padding passes */
    uint64_t dat_rounded;
} tail_check;

static uint64_t row_end(const pv_idx_row *row, uint8_t version) {
    return row->offset + (uint64_t)pv_needle_record_len(row->size < 0 ? 0 : row->size, version);
}

/* Finds the row of the record at the end of .dat: the last one if it ends there, else the one with the largest offset.
 * 1: found, 0: no row points into .dat. */
static int find_tail_row(const tail_check *t, int idx_fd, uint64_t rows, pv_idx_row *out, pv_errinfo *err) {
    int rc = pv_idx_read(idx_fd, t->width, rows - 1, out, 1, err);
    if (rc < 0) {
        return rc;
    }
    if (rc == 1 && t->dat_rounded > 0 && out->offset != 0 && row_end(out, t->version) == t->dat_rounded) {
        return 1;
    }
    pv_idx_row *batch = pv__calloc(TAIL_CHECK_ROWS, sizeof *batch);
    if (batch == NULL) {
        return pv__fail(err, PV_ENOMEM, TAIL_CHECK_ROWS * sizeof *batch, 0, 0, 0);
    }
    memset(out, 0, sizeof *out);
    for (uint64_t first = 0;;) {
        rc = pv_idx_read(idx_fd, t->width, first, batch, TAIL_CHECK_ROWS, err);
        if (rc <= 0) {
            break;
        }
        for (int i = 0; i < rc; i++) {
            if (batch[i].offset > out->offset) {
                *out = batch[i];
            }
        }
        first += (uint64_t)rc;
    }
    pv__free(batch);
    return rc < 0 ? rc : out->offset != 0;
}

/* A negative code of a read becomes a verdict if it tells of the file, not of the disk. */
static int tail_verdict(const tail_check *t, int rc, uint64_t end, pv_errinfo *err) {
    switch (rc) {
    case PV_EEOF:
        (void)pv__fail(err, PV_EEOF, end, t->dat_size, 0, 0);
        return PV_TAIL_DAT_SHORTER;
    case PV_ESIZE:
    case PV_EID:
    case PV_ECRC:
    case PV_ECORRUPT:
        return PV_TAIL_BAD_RECORD;
    default:
        return rc;
    }
}

static int longer(const tail_check *t, uint64_t end, pv_errinfo *err) {
    (void)pv__fail(err, 0, t->dat_rounded, end, 0, 0);
    return PV_TAIL_DAT_LONGER;
}

/* Reads the record whole and holds it against its row. */
static int read_whole(const tail_check *t, const pv_idx_row *row, int32_t size, uint64_t *append_at_ns,
                      pv_errinfo *err) {
    uint64_t len = (uint64_t)pv_needle_record_len(size, t->version);
    if (row->offset > t->dat_size || len > t->dat_size - row->offset) {
        return pv__fail(err, PV_EEOF, row->offset, len, 0, 0);
    }
    uint8_t *buf = pv__malloc((size_t)len);
    if (buf == NULL) {
        return pv__fail(err, PV_ENOMEM, len, 0, 0, 0);
    }
    pv_needle n;
    int rc = pv__io_pread_full(t->dat_fd, buf, (size_t)len, row->offset, err);
    if (rc == 0) {
        rc = pv_needle_parse(buf, (size_t)len, t->version, size, row->offset, 0, &n, err);
    }
    pv__free(buf);
    if (rc < 0) {
        return rc;
    }
    *append_at_ns = n.append_at_ns;
    return n.id == row->key ? 0 : pv__fail(err, PV_EID, n.id, row->key, row->offset, 0);
}

static int check_tombstone(const tail_check *t, const pv_idx_row *row, uint64_t *append_at_ns, pv_errinfo *err) {
    uint64_t end = row_end(row, t->version);
    int rc = read_whole(t, row, 0, append_at_ns, err);
    if (rc < 0) {
        return tail_verdict(t, rc, end, err);
    }
    return t->dat_rounded > end ? longer(t, end, err) : PV_TAIL_OK;
}

static int header_matches(const tail_check *t, const pv_idx_row *row, pv_errinfo *err) {
    uint8_t head[PV_NEEDLE_HEADER];
    uint32_t cookie;
    uint64_t id;
    int32_t size;
    int rc = pv__io_pread_full(t->dat_fd, head, sizeof head, row->offset, err);
    if (rc < 0) {
        return rc;
    }
    pv_needle_header(head, &cookie, &id, &size);
    return size == row->size ? 0
                             : pv__fail(err, PV_ESIZE, row->offset, id, (uint32_t)size, (uint64_t)(int64_t)row->size);
}

static int check_live(const tail_check *t, pv_idx_row row, uint64_t *append_at_ns, pv_errinfo *err) {
    int rc = header_matches(t, &row, err);
    if (rc == PV_ESIZE && t->width == 4) {
        /* an old volume that outgrew 32 GiB: its offsets had wrapped */
        pv_idx_row wrapped = row;
        wrapped.offset += GIB32;
        if (header_matches(t, &wrapped, NULL) == 0) {
            row = wrapped;
            rc = 0;
        }
    }
    uint64_t end = row_end(&row, t->version);
    if (rc == 0 && t->version != 3) {
        uint64_t none;
        rc = read_whole(t, &row, row.size, &none, err);
    } else if (rc == 0) {
        /* Upstream looks at neither checksum nor id here. */
        uint8_t when[TIME_BYTES];
        uint64_t at = row.offset + PV_NEEDLE_HEADER + (uint64_t)row.size + CHECKSUM_BYTES;
        rc = pv__io_pread_full(t->dat_fd, when, sizeof when, at, err);
        if (rc == 0) {
            *append_at_ns = pv__get_be64(when);
            if (t->dat_rounded > end) {
                return longer(t, end, err);
            }
            rc = t->dat_rounded < end ? PV_EEOF : 0;
        }
    }
    return rc < 0 ? tail_verdict(t, rc, end, err) : PV_TAIL_OK;
}

int pv_vol_check_tail(int dat_fd, int idx_fd, uint8_t width, uint8_t version, uint64_t *last_append_at_ns,
                      pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    *last_append_at_ns = 0;
    if (width != 4 && width != 5) {
        return pv__fail(err, PV_EINVAL, width, 0, 0, 0);
    }
    if (version < 1 || version > 3) {
        return pv__fail(err, PV_EVERSION, version, 0, 0, 0);
    }
    tail_check t = {.dat_fd = dat_fd, .width = width, .version = version};
    uint64_t idx_size;
    int rc = pv__io_size(dat_fd, &t.dat_size, err);
    if (rc == 0) {
        rc = pv__io_size(idx_fd, &idx_size, err);
    }
    if (rc < 0) {
        return rc;
    }
    t.dat_rounded = (t.dat_size + 7) & ~(uint64_t)7;
    uint64_t row_len = 12U + width;
    if (idx_size % row_len != 0) {
        (void)pv__fail(err, PV_EALIGN, idx_size, 0, 0, 0);
        return PV_TAIL_IDX_RAGGED;
    }
    if (idx_size == 0) {
        return PV_TAIL_OK;
    }
    pv_idx_row row;
    rc = find_tail_row(&t, idx_fd, idx_size / row_len, &row, err);
    if (rc <= 0) {
        return rc;
    }
    return row.size < 0 ? check_tombstone(&t, &row, last_append_at_ns, err)
                        : check_live(&t, row, last_append_at_ns, err);
}
