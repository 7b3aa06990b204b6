/* pv_ec.c - erasure coding: the code matrix, coding and rebuilding stretches of shards, the sorted index.
 *
 * The code is that of klauspost/reedsolomon: a Vandermonde matrix times the inverse of its top square, over the field that
 * ISA-L uses too. ISA-L's own generators give other codes and are not used. Everything works on a stretch of all shards at
 * a time and keeps nothing between calls, so that several threads may code one volume, each with a buffer of its own.
 * What is read and written goes past the page cache where it can: a job over gigabytes must not drive out what is served.
 */
#include "pv_int.h"

#include <isa-l/erasure_code.h>

#define COLUMN_BYTES ((size_t)32 << 10) /* coded and summed at a time, while the bytes are in the processor's cache */
#define TABLE_BYTES 32U
#define MAX_COEFFICIENTS (PV_EC_MAX_SHARDS * PV_EC_MAX_SHARDS)
#define ROW_MAX 17U
#define IO_ROWS 4096U

static int ratio_ok(uint32_t data, uint32_t parity) {
    return data > 0 && parity > 0 && data <= PV_EC_MAX_SHARDS && parity <= PV_EC_MAX_SHARDS - data;
}

static uint8_t power(uint8_t base, uint32_t exponent) {
    uint8_t value = 1;
    for (uint32_t i = 0; i < exponent; i++) {
        value = gf_mul(value, base);
    }
    return value;
}

/* out[rows x inner] = a[rows x inner] * b[inner x inner] */
static void multiply(const uint8_t *a, const uint8_t *b, uint32_t rows, uint32_t inner, uint8_t *out) {
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t c = 0; c < inner; c++) {
            uint8_t sum = 0;
            for (uint32_t i = 0; i < inner; i++) {
                sum ^= gf_mul(a[r * inner + i], b[i * inner + c]);
            }
            out[r * inner + c] = sum;
        }
    }
}

int pv_ec_matrix(uint32_t data, uint32_t parity, uint8_t *matrix, pv_errinfo *err) {
    if (!ratio_ok(data, parity)) {
        return pv__fail(err, PV_EINVAL, data, parity, 0, 0);
    }
    uint8_t vandermonde[MAX_COEFFICIENTS];
    uint8_t top[MAX_COEFFICIENTS];
    uint8_t inverse[MAX_COEFFICIENTS];
    for (uint32_t r = 0; r < data + parity; r++) {
        for (uint32_t c = 0; c < data; c++) {
            vandermonde[r * data + c] = power((uint8_t)r, c);
        }
    }
    memcpy(top, vandermonde, (size_t)data * data);
    if (gf_invert_matrix(top, inverse, (int)data) != 0) {
        return pv__fail(err, PV_EINVAL, data, parity, 1, 0);
    }
    multiply(vandermonde, inverse, data + parity, data, matrix);
    return 0;
}

/* The rows that make the wanted shards of the present ones (`data` ids, ascending). */
static int decode_rows(uint32_t data, uint32_t parity, const uint8_t *present, const uint8_t *wanted, uint32_t count,
                       uint8_t *rows, pv_errinfo *err) {
    uint8_t matrix[MAX_COEFFICIENTS];
    uint8_t square[MAX_COEFFICIENTS];
    uint8_t inverse[MAX_COEFFICIENTS];
    int rc = pv_ec_matrix(data, parity, matrix, err);
    if (rc < 0) {
        return rc;
    }
    for (uint32_t i = 0; i < data; i++) {
        memcpy(square + i * data, matrix + (size_t)present[i] * data, data);
    }
    if (gf_invert_matrix(square, inverse, (int)data) != 0) {
        return pv__fail(err, PV_EINVAL, data, parity, 2, 0);
    }
    for (uint32_t i = 0; i < count; i++) {
        multiply(matrix + (size_t)wanted[i] * data, inverse, 1, data, rows + i * data);
    }
    return 0;
}

/* One buffer of PV_EC_CHUNK for each of so many files, within the caller's memory. */
static int split_scratch(uint8_t **at, uint32_t count, void *scratch, size_t len, pv_errinfo *err) {
    if (scratch == NULL || (uintptr_t)scratch % 4096 != 0 || len / PV_EC_CHUNK < count) {
        return pv__fail(err, PV_EINVAL, len, count, 3, 0);
    }
    for (uint32_t i = 0; i < count; i++) {
        at[i] = (uint8_t *)scratch + (size_t)i * PV_EC_CHUNK;
    }
    return 0;
}

/* Makes `lost` buffers of `have` others, and the checksums of all, column by column. sums[i] belongs to at[i]. */
static void code(uint8_t *const *at, uint32_t have, uint32_t lost, uint8_t *tables, size_t len, uint32_t *const *sums) {
    for (size_t from = 0; from < len; from += COLUMN_BYTES) {
        size_t n = len - from < COLUMN_BYTES ? len - from : COLUMN_BYTES;
        uint8_t *column[PV_EC_MAX_SHARDS];
        for (uint32_t i = 0; i < have + lost; i++) {
            column[i] = at[i] + from;
        }
        if (lost > 0) {
            ec_encode_data((int)n, (int)have, (int)lost, tables, column, column + have);
        }
        for (uint32_t i = 0; i < have + lost; i++) {
            if (sums[i] != NULL) {
                *sums[i] = pv_crc32c(*sums[i], column[i], n);
            }
        }
    }
}

static int read_full(const pv_ec_file *file, uint8_t *buf, size_t len, uint64_t at, uint32_t shard, pv_errinfo *err) {
    size_t got;
    int rc = pv__io_pread_aside(file->fd, file->direct_fd, buf, len, at, &got, err);
    if (rc == 0 && got < len) {
        rc = pv__fail(err, PV_EEOF, at, len, got, 0);
    }
    if (rc < 0 && err != NULL) {
        err->d = shard;
    }
    return rc;
}

static int write_out(const pv_ec_file *file, const uint8_t *buf, size_t len, uint64_t at, pv_errinfo *err) {
    return file->fd < 0 ? 0 : pv__io_pwrite_aside(file->fd, file->direct_fd, buf, len, at, err);
}

int pv_ec_reserve(int fd, uint64_t bytes, pv_errinfo *err) {
    int rc = pv__io_allocate(fd, bytes, err);
    return rc < 0 ? rc : pv__io_truncate(fd, bytes, err);
}

/* Where byte `at` of data shard `shard` comes from in the .dat, and how many bytes of one block follow. */
static uint64_t dat_place(const pv_ec_layout *l, uint32_t shard, uint64_t at, uint64_t *run) {
    uint64_t large = l->large_rows * l->large_block;
    uint64_t block = at < large ? l->large_block : l->small_block;
    uint64_t inside = at < large ? at : at - large;
    uint64_t base = at < large ? 0 : large * l->data_shards;
    *run = block - inside % block;
    return base + (inside / block * l->data_shards + shard) * block + inside % block;
}

static int layout_ok(const pv_ec_layout *l, uint64_t from, uint64_t to) {
    /* no product below overflows: 32 shards of 2^57 bytes are 2^62 */
    const uint64_t most = (uint64_t)1 << 57;
    return ratio_ok(l->data_shards, l->parity_shards) && l->small_block > 0 && l->large_block >= l->small_block &&
           l->large_block <= most && l->large_rows <= most / l->large_block && from <= to && to <= most;
}

int pv_ec_encode(const pv_ec_file *dat, uint64_t dat_bytes, const pv_ec_layout *l, uint64_t from, uint64_t to,
                 const pv_ec_file *out, uint32_t *crcs, void *scratch, size_t scratch_len, pv_errinfo *err) {
    if (!layout_ok(l, from, to)) {
        return pv__fail(err, PV_EINVAL, from, to, 0, 0);
    }
    const uint32_t data = l->data_shards;
    const uint32_t total = data + l->parity_shards;
    uint8_t matrix[MAX_COEFFICIENTS];
    uint8_t tables[MAX_COEFFICIENTS * TABLE_BYTES];
    uint8_t *bufs[PV_EC_MAX_SHARDS];
    uint32_t *sums[PV_EC_MAX_SHARDS];
    int rc = pv_ec_matrix(data, l->parity_shards, matrix, err);
    if (rc < 0 || (rc = split_scratch(bufs, total, scratch, scratch_len, err)) < 0) {
        return rc;
    }
    ec_init_tables((int)data, (int)l->parity_shards, matrix + (size_t)data * data, tables);
    for (uint32_t i = 0; i < total; i++) {
        sums[i] = crcs == NULL ? NULL : crcs + i;
    }
    for (uint64_t at = from; rc == 0 && at < to;) {
        uint64_t run;
        (void)dat_place(l, 0, at, &run);
        size_t len = PV_EC_CHUNK;
        len = run < len ? (size_t)run : len;
        len = to - at < len ? (size_t)(to - at) : len;
        for (uint32_t i = 0; rc == 0 && i < data; i++) {
            uint64_t place = dat_place(l, i, at, &run);
            size_t got = 0;
            if (place < dat_bytes) {
                size_t want = dat_bytes - place < len ? (size_t)(dat_bytes - place) : len;
                rc = pv__io_pread_aside(dat->fd, dat->direct_fd, bufs[i], want, place, &got, err);
                if (rc == 0 && got < want) {
                    rc = pv__fail(err, PV_EEOF, place, want, got, 0);
                }
            }
            memset(bufs[i] + got, 0, len - got);
        }
        if (rc == 0) {
            code(bufs, data, l->parity_shards, tables, len, sums);
        }
        for (uint32_t i = 0; rc == 0 && i < total; i++) {
            rc = write_out(&out[i], bufs[i], len, at, err);
        }
        at += len;
    }
    return rc;
}

int pv_ec_rebuild(uint32_t data, uint32_t parity, const pv_ec_file *in, const pv_ec_file *out, uint64_t from,
                  uint64_t to, uint32_t *crcs, void *scratch, size_t scratch_len, pv_errinfo *err) {
    if (!ratio_ok(data, parity) || from > to || to > PV__OFF_MAX) {
        return pv__fail(err, PV_EINVAL, from, to, data, parity);
    }
    uint8_t ids[PV_EC_MAX_SHARDS] = {0}; /* of the shards read, then of those made */
    uint8_t *wanted = ids + data;
    uint32_t have = 0;
    uint32_t lost = 0;
    for (uint32_t i = 0; i < data + parity; i++) {
        if (out[i].fd < 0 && in[i].fd >= 0 && have < data) {
            ids[have++] = (uint8_t)i;
        }
    }
    if (have < data) {
        return pv__fail(err, PV_ERANGE, have, data, 0, 0);
    }
    for (uint32_t i = 0; i < data + parity; i++) {
        if (out[i].fd >= 0) {
            wanted[lost++] = (uint8_t)i; /* of data + parity ids `data` are taken: at most `parity` are left */
        }
    }
    uint8_t rows[MAX_COEFFICIENTS];
    uint8_t tables[MAX_COEFFICIENTS * TABLE_BYTES];
    uint8_t *bufs[PV_EC_MAX_SHARDS];
    uint32_t *sums[PV_EC_MAX_SHARDS];
    int rc = decode_rows(data, parity, ids, wanted, lost, rows, err);
    if (rc < 0 || (rc = split_scratch(bufs, data + lost, scratch, scratch_len, err)) < 0) {
        return rc;
    }
    if (lost > 0) {
        ec_init_tables((int)data, (int)lost, rows, tables);
    }
    for (uint32_t i = 0; i < data + lost; i++) {
        sums[i] = crcs == NULL ? NULL : crcs + ids[i];
    }
    for (uint64_t at = from; rc == 0 && at < to;) {
        size_t len = to - at < PV_EC_CHUNK ? (size_t)(to - at) : PV_EC_CHUNK;
        for (uint32_t i = 0; rc == 0 && i < data; i++) {
            rc = read_full(&in[ids[i]], bufs[i], len, at, ids[i], err);
        }
        if (rc == 0) {
            code(bufs, data, lost, tables, len, sums);
        }
        for (uint32_t i = 0; rc == 0 && i < lost; i++) {
            rc = write_out(&out[wanted[i]], bufs[data + i], len, at, err);
            if (rc < 0 && err != NULL) {
                err->d = PV_EC_MAX_SHARDS;
            }
        }
        at += len;
    }
    return rc;
}

/* The shard with a byte of the .dat, its place there, and how many bytes the block has from it on. */
static uint32_t shard_at(const pv_ec_layout *l, uint64_t at, uint64_t *place, uint64_t *left) {
    const uint64_t large_bytes = l->large_rows * l->large_block * l->data_shards;
    int is_large = at < large_bytes;
    uint64_t block = is_large ? l->large_block : l->small_block;
    uint64_t within = is_large ? at : at - large_bytes;
    uint64_t inner = within % block;
    *place = (is_large ? 0 : l->large_rows * l->large_block) + within / block / l->data_shards * block + inner;
    *left = block - inner;
    return (uint32_t)(within / block % l->data_shards);
}

int pv_ec_decode(const pv_ec_file *in, const pv_ec_layout *l, const pv_ec_file *out, uint64_t from, uint64_t to,
                 void *scratch, size_t scratch_len, pv_errinfo *err) {
    uint8_t *buf;
    if (!layout_ok(l, from, to)) {
        return pv__fail(err, PV_EINVAL, from, to, 0, 0);
    }
    int rc = split_scratch(&buf, 1, scratch, scratch_len, err);
    for (uint64_t at = from; rc == 0 && at < to;) {
        uint64_t place;
        uint64_t left;
        uint32_t shard = shard_at(l, at, &place, &left);
        size_t len = left < PV_EC_CHUNK ? (size_t)left : PV_EC_CHUNK;
        len = to - at < len ? (size_t)(to - at) : len;
        rc = read_full(&in[shard], buf, len, place, shard, err);
        if (rc == 0) {
            rc = write_out(out, buf, len, at, err);
        }
        at += len;
    }
    return rc;
}

int pv_ec_sum(const pv_ec_file *file, uint64_t from, uint64_t to, uint32_t *crc, void *scratch, size_t scratch_len,
              pv_errinfo *err) {
    uint8_t *buf;
    if (from > to || to > PV__OFF_MAX) {
        return pv__fail(err, PV_EINVAL, from, to, 0, 0);
    }
    int rc = split_scratch(&buf, 1, scratch, scratch_len, err);
    for (uint64_t at = from; rc == 0 && at < to;) {
        size_t len = to - at < PV_EC_CHUNK ? (size_t)(to - at) : PV_EC_CHUNK;
        rc = read_full(file, buf, len, at, 0, err);
        if (rc == 0) {
            *crc = pv_crc32c(*crc, buf, len);
        }
        at += len;
    }
    return rc;
}

/* decode_rows for one shard, which thousands of reads in a row ask of the same others. */
static int decode_row(uint32_t data, uint32_t parity, const uint8_t *present, uint8_t wanted, uint8_t *row,
                      pv_errinfo *err) {
    static _Thread_local struct {
        uint32_t data, parity; /* data 0: nothing yet */
        uint8_t wanted;
        uint8_t present[PV_EC_MAX_SHARDS];
        uint8_t row[PV_EC_MAX_SHARDS];
    } last;
    if (last.data != data || last.parity != parity || last.wanted != wanted ||
        memcmp(last.present, present, data) != 0) {
        last.data = 0;
        int rc = decode_rows(data, parity, present, &wanted, 1, last.row, err);
        if (rc < 0) {
            return rc;
        }
        memcpy(last.present, present, data);
        last.data = data;
        last.parity = parity;
        last.wanted = wanted;
    }
    memcpy(row, last.row, data);
    return 0;
}

int pv_ec_recover(uint32_t data, uint32_t parity, const uint8_t *present, const uint8_t *const *pieces, size_t len,
                  uint8_t wanted, uint8_t *out, pv_errinfo *err) {
    if (!ratio_ok(data, parity) || wanted >= data + parity || len > INT32_MAX) {
        return pv__fail(err, PV_EINVAL, data, parity, wanted, len);
    }
    for (uint32_t i = 0; i < data; i++) {
        if (present[i] >= data + parity || (i > 0 && present[i] <= present[i - 1])) {
            return pv__fail(err, PV_EINVAL, data, parity, present[i], i);
        }
    }
    uint8_t row[PV_EC_MAX_SHARDS];
    uint8_t tables[PV_EC_MAX_SHARDS * TABLE_BYTES];
    int rc = decode_row(data, parity, present, wanted, row, err);
    if (rc < 0) {
        return rc;
    }
    uint8_t *sources[PV_EC_MAX_SHARDS];
    for (uint32_t i = 0; i < data; i++) {
        memcpy(&sources[i], &pieces[i], sizeof sources[i]); /* ISA-L does not write to them, but does not say so */
    }
    ec_init_tables((int)data, 1, row, tables);
    ec_encode_data((int)len, (int)data, 1, tables, sources, &out);
    return 0;
}

/* What clients ask for may stay in the page cache. */
static int read_served(int fd, uint8_t *buf, size_t len, uint64_t at, uint32_t shard, bool cached, pv_errinfo *err) {
    int rc = cached ? pv__io_pread_cached(fd, buf, len, at, err) : pv__io_pread_full(fd, buf, len, at, err);
    if (rc < 0 && err != NULL) {
        err->d = shard;
    }
    return rc;
}

/* Bytes [at, at + len) of a shard that is not there, of those of `present`. */
static int read_lost(const int32_t *fds, uint32_t data, uint32_t parity, const uint8_t *present, uint8_t wanted,
                     uint64_t at, size_t len, uint8_t *out, bool cached, pv_errinfo *err) {
    uint8_t row[PV_EC_MAX_SHARDS];
    uint8_t tables[PV_EC_MAX_SHARDS * TABLE_BYTES];
    int rc = decode_row(data, parity, present, wanted, row, err);
    if (rc < 0) {
        return rc;
    }
    ec_init_tables((int)data, 1, row, tables);
    const size_t column = len < COLUMN_BYTES ? len : COLUMN_BYTES;
    uint8_t *bufs = pv__malloc(data * column);
    if (bufs == NULL) {
        return pv__fail(err, PV_ENOMEM, 0, 0, 0, 0);
    }
    uint8_t *sources[PV_EC_MAX_SHARDS];
    for (uint32_t i = 0; i < data; i++) {
        sources[i] = bufs + i * column;
    }
    for (size_t done = 0; rc == 0 && done < len; done += column) {
        size_t n = len - done < column ? len - done : column;
        for (uint32_t i = 0; rc == 0 && i < data; i++) {
            rc = read_served(fds[present[i]], sources[i], n, at + done, present[i], cached, err);
        }
        if (rc == 0) {
            uint8_t *target = out + done;
            ec_encode_data((int)n, (int)data, 1, tables, sources, &target);
        }
    }
    pv__free(bufs);
    return rc;
}

int pv_ec_read(const int32_t *fds, const pv_ec_layout *l, uint64_t from, size_t len, uint8_t *out, pv_errinfo *err) {
    const pv__ec_how how = {.make = UINT32_MAX, .make_max = SIZE_MAX};
    return pv__ec_read(fds, l, from, len, out, &how, err);
}

int pv__ec_read(const int32_t *fds, const pv_ec_layout *l, uint64_t from, size_t len, uint8_t *out,
                const pv__ec_how *how, pv_errinfo *err) {
    if (len > INT32_MAX || from > UINT64_MAX - len || !layout_ok(l, from, from + len)) {
        return pv__fail(err, PV_EINVAL, from, len, 0, 0);
    }
    const uint32_t data = l->data_shards;
    uint8_t present[PV_EC_MAX_SHARDS];
    uint32_t have = 0;
    for (uint32_t i = 0; i < data + l->parity_shards && have < data; i++) {
        if (fds[i] >= 0) {
            present[have++] = (uint8_t)i;
        }
    }
    int rc = 0;
    for (size_t done = 0; rc == 0 && done < len;) {
        uint64_t place;
        uint64_t left;
        uint32_t shard = shard_at(l, from + done, &place, &left);
        size_t n = len - done < left ? len - done : (size_t)left;
        if (fds[shard] >= 0) {
            rc = read_served(fds[shard], out + done, n, place, shard, how->cached, err);
        } else if (have < data || (how->make >> shard & 1) == 0) {
            rc = pv__fail(err, PV_ERANGE, have, data, 0, shard);
        } else if (n > how->make_max) {
            rc = pv__fail_sys(err, EAGAIN, place, n, 0);
        } else {
            rc =
                read_lost(fds, data, l->parity_shards, present, (uint8_t)shard, place, n, out + done, how->cached, err);
        }
        done += n;
    }
    return rc;
}

/* ------------------------------------------------------------------ the sorted index */

/* Stable, by key: rows of one key stay in the order of the index. Gives the array that holds the result. */
static pv_idx_row *sort_rows(pv_idx_row *rows, pv_idx_row *spare, size_t count) {
    for (size_t run = 1; run < count; run *= 2) {
        for (size_t from = 0; from < count; from += 2 * run) {
            size_t a = from;
            size_t a_end = from + run < count ? from + run : count;
            size_t b = a_end;
            size_t b_end = a_end + run < count ? a_end + run : count;
            for (size_t to = from; to < b_end; to++) {
                int take_a = a < a_end && (b >= b_end || rows[a].key <= rows[b].key);
                spare[to] = take_a ? rows[a++] : rows[b++];
            }
        }
        pv_idx_row *swap = rows;
        rows = spare;
        spare = swap;
    }
    return rows;
}

static int write_live(const pv_idx_row *rows, size_t count, uint8_t width, int out_fd, uint64_t *live,
                      pv_errinfo *err) {
    uint8_t *buf = pv__malloc((size_t)IO_ROWS * ROW_MAX);
    if (buf == NULL) {
        return pv__fail(err, PV_ENOMEM, 0, 0, 0, 0);
    }
    const size_t row_len = 12U + width;
    size_t filled = 0;
    uint64_t at = 0;
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < count; i++) {
        if ((i + 1 < count && rows[i + 1].key == rows[i].key) || rows[i].offset == 0 || rows[i].size < 0) {
            continue;
        }
        pv_idx_row_put(&rows[i], width, buf + filled * row_len);
        (*live)++;
        if (++filled == IO_ROWS) {
            rc = pv__io_pwrite(out_fd, buf, filled * row_len, at, err);
            at += filled * row_len;
            filled = 0;
        }
    }
    if (rc == 0 && filled > 0) {
        rc = pv__io_pwrite(out_fd, buf, filled * row_len, at, err);
    }
    pv__free(buf);
    return rc;
}

int pv_ecx_from_idx(int idx_fd, uint8_t width, uint64_t rows, int out_fd, uint64_t *live, pv_errinfo *err) {
    *live = 0;
    if ((width != 4 && width != 5) || rows > SIZE_MAX / (4 * sizeof(pv_idx_row))) {
        return pv__fail(err, PV_EINVAL, width, rows, 0, 0);
    }
    if (rows == 0) {
        return 0;
    }
    const size_t count = (size_t)rows;
    pv_idx_row *all = pv__malloc(count * sizeof *all);
    if (all == NULL) {
        return pv__fail(err, PV_ENOMEM, rows, 0, 0, 0);
    }
    size_t done = 0;
    int is_sorted = 1;
    int rc = 0;
    while (rc == 0 && done < count) {
        int got = pv_idx_read(idx_fd, width, done, all + done, count - done, err);
        if (got <= 0) {
            rc = got < 0 ? got : pv__fail(err, PV_EEOF, done, rows, 0, 0);
            break;
        }
        for (size_t i = done ? done : 1; i < done + (size_t)got; i++) {
            is_sorted &= all[i - 1].key <= all[i].key;
        }
        done += (size_t)got;
    }
    pv_idx_row *spare = NULL;
    if (rc == 0 && !is_sorted) {
        spare = pv__malloc(count * sizeof *spare);
        rc = spare == NULL ? pv__fail(err, PV_ENOMEM, rows, 0, 0, 0) : 0;
    }
    if (rc == 0) {
        const pv_idx_row *sorted = is_sorted ? all : sort_rows(all, spare, count);
        rc = write_live(sorted, count, width, out_fd, live, err);
    }
    pv__free(spare);
    pv__free(all);
    return rc;
}

int pv_ecx_find(int fd, uint8_t width, uint64_t rows, uint64_t key, pv_idx_row *out, uint64_t *index, pv_errinfo *err) {
    return pv__ecx_find(fd, width, rows, key, false, out, index, err);
}

int pv__ecx_find(int fd, uint8_t width, uint64_t rows, uint64_t key, bool cached, pv_idx_row *out, uint64_t *index,
                 pv_errinfo *err) {
    if ((width != 4 && width != 5) || rows > PV__OFF_MAX / ROW_MAX) {
        return pv__fail(err, PV_EINVAL, width, rows, 0, 0);
    }
    const size_t row_len = 12U + width;
    uint64_t low = 0;
    uint64_t high = rows;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        uint8_t buf[ROW_MAX];
        int rc = read_served(fd, buf, row_len, middle * row_len, 0, cached, err);
        if (rc < 0) {
            return rc;
        }
        pv_idx_row_parse(buf, width, out);
        if (out->key == key) {
            *index = middle;
            return 1;
        }
        if (out->key < key) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return 0;
}
