/* pv_idx.c - rows of .idx files: one row, batches of rows, and a summary of a whole file. Nothing is written here.
 *
 * Row: key 8 | offset/8, 4 bytes, or 5 with the extra HIGH byte last | size 4, signed
 */
#include "pv_int.h"

/* Rows per read of a walk: 64 KiB of 16-byte rows. */
#define WALK_ROWS 4096U
#define ROW_MAX 17U

static int width_ok(uint8_t width) {
    return width == 4 || width == 5;
}

static size_t row_bytes(uint8_t width) {
    return 12U + width;
}

/* For loops over rows. */
static inline void row_parse(const uint8_t *buf, uint8_t width, pv_idx_row *out) {
    uint64_t units8 = pv__get_be32(buf + 8);
    if (width == 5) {
        units8 |= (uint64_t)buf[12] << 32;
    }
    out->key = pv__get_be64(buf);
    out->offset = units8 * 8;
    out->size = pv__i32(pv__get_be32(buf + 8 + width));
    out->reserved = 0;
}

void pv_idx_row_parse(const uint8_t *buf, uint8_t width, pv_idx_row *out) {
    row_parse(buf, width, out);
}

void pv_idx_row_put(const pv_idx_row *row, uint8_t width, uint8_t *buf) {
    uint64_t units8 = row->offset / 8;
    pv__put_be64(buf, row->key);
    pv__put_be32(buf + 8, (uint32_t)units8);
    if (width == 5) {
        buf[12] = (uint8_t)(units8 >> 32);
    }
    pv__put_be32(buf + 8 + width, (uint32_t)row->size);
}

int pv_idx_read(int fd, uint8_t width, uint64_t first_row, pv_idx_row *rows, size_t max_rows, pv_errinfo *err) {
    if (!width_ok(width)) {
        return pv__fail(err, PV_EINVAL, width, 0, 0, 0);
    }
    const size_t row_len = row_bytes(width);
    if (first_row > PV__OFF_MAX / row_len) {
        return 0;
    }
    if (max_rows > INT32_MAX) {
        max_rows = INT32_MAX;
    }
    uint8_t buf[ROW_MAX * 512];
    const size_t rows_per_read = sizeof buf / row_len;
    size_t count = 0;
    while (count < max_rows) {
        size_t want = max_rows - count < rows_per_read ? max_rows - count : rows_per_read;
        uint64_t offset = (first_row + count) * row_len;
        if (offset > PV__OFF_MAX - sizeof buf) {
            break;
        }
        size_t got;
        int rc = pv__io_pread(fd, buf, want * row_len, offset, &got, err);
        if (rc < 0) {
            return rc;
        }
        size_t whole = got / row_len;
        for (size_t i = 0; i < whole; i++) {
            row_parse(buf + i * row_len, width, &rows[count + i]);
        }
        count += whole;
        if (whole < want) {
            break;
        }
    }
    return (int)count;
}

/* Where the record of a row ends; a tombstone's record has size 0. The caller has seen that offset is not 0. */
static uint64_t row_end(const pv_idx_row *row, uint8_t version) {
    /* The record length of a size >= 0 is positive, and offsets stay below 2^43: no overflow. */
    return row->offset + (uint64_t)pv_needle_record_len(row->size < 0 ? 0 : row->size, version);
}

static void summarize_row(const pv_idx_row *row, uint8_t version, uint64_t dat_size, pv_idx_summary *out) {
    if (row->offset == 0 && row->size == -1 && out->leading_zero_rows == out->rows) {
        out->leading_zero_rows++;
    }
    out->rows++;
    if (row->key > out->max_key) {
        out->max_key = row->key;
    }
    if (row->offset == 0) {
        /* A key alone is what a write that broke off leaves; before version 3 it was a delete. */
        if ((row->key == 0 || version == 3) && row->size == 0 && out->blank_rows++ == 0) {
            out->first_blank_row = out->rows - 1;
        }
        return;
    }
    uint64_t end = row_end(row, version);
    if (end > out->max_end) {
        out->max_end = end;
        out->furthest = *row;
    }
    if (row->size < 0) {
        return;
    }
    if (end > out->max_valid_end) {
        out->max_valid_end = end;
    }
    if (end > dat_size) {
        if (out->past_end == 0) {
            out->first_past_end_key = row->key;
        }
        out->past_end++;
    }
}

int pv_idx_summarize(int fd, uint8_t width, uint8_t version, uint64_t dat_size, pv_idx_summary *out, pv_errinfo *err) {
    memset(out, 0, sizeof *out);
    if (!width_ok(width)) {
        return pv__fail(err, PV_EINVAL, width, 0, 0, 0);
    }
    if (version < 1 || version > 3) {
        return pv__fail(err, PV_EVERSION, version, 0, 0, 0);
    }
    const size_t row_len = row_bytes(width);
    uint8_t *buf = pv__malloc(WALK_ROWS * ROW_MAX);
    if (buf == NULL) {
        return pv__fail(err, PV_ENOMEM, WALK_ROWS * ROW_MAX, 0, 0, 0);
    }
    int rc;
    for (;;) {
        size_t got;
        rc = pv__io_pread(fd, buf, WALK_ROWS * row_len, out->rows * row_len, &got, err);
        if (rc < 0) {
            break;
        }
        size_t whole = got / row_len;
        for (size_t i = 0; i < whole; i++) {
            pv_idx_row row;
            row_parse(buf + i * row_len, width, &row);
            summarize_row(&row, version, dat_size, out);
        }
        if (whole > 0) {
            row_parse(buf + (whole - 1) * row_len, width, &out->last);
        }
        if (whole < WALK_ROWS) {
            out->ragged_bytes = got % row_len;
            out->file_bytes = out->rows * row_len + out->ragged_bytes;
            break;
        }
    }
    pv__free(buf);
    return rc;
}
