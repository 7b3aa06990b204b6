/* fuzz_scrub.c - a scrub of any two files. Input: one byte (bit 0 width 5, bits 1..2 version - 1, bit 3 check ids, bit 4 only
 * the index), 2 bytes length of the index (little-endian), then the index, then the data.
 *
 * What is found must not depend on the size of the steps, and each record must be judged as reading it alone does.
 */
#include "../pv_int.h"

#include <sys/mman.h>

#define FOUND_MAX 512

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static void must(int holds) {
    if (!holds) {
        abort();
    }
}

static void refill(int *fd, const uint8_t *data, size_t len) {
    if (*fd < 0) {
        *fd = memfd_create("fuzz_scrub", MFD_CLOEXEC);
        must(*fd >= 0);
    }
    must(pv__io_truncate(*fd, 0, NULL) == 0);
    must(pv__io_pwrite(*fd, data, len, 0, NULL) == 0);
}

static size_t scrub(const pv_scrub_opts *o, uint64_t step_bytes, pv_scrub_finding *found, pv_scrub_stats *stats) {
    pv_scrub *s;
    must(pv_scrub_begin(o, &s, NULL) == 0);
    size_t count = 0;
    int rc;
    do {
        rc = pv_scrub_step(s, step_bytes, NULL);
        must(rc == 0 || rc == 1);
        int got = pv_scrub_findings(s, found + count, FOUND_MAX - count);
        must(got >= 0);
        count += (size_t)got;
    } while (rc == 1 && count < FOUND_MAX);
    must(count < FOUND_MAX); /* at most two for each row */
    pv_scrub_stat(s, stats);
    must(stats->done_rows == stats->total_rows);
    pv_scrub_free(s);
    return count;
}

/* What reading this row's record by itself gives. */
static int alone(const pv_scrub_opts *o, const uint8_t *dat, size_t dat_len, const pv_idx_row *row, uint64_t offset) {
    int64_t record_len = pv_needle_record_len(row->size, o->version);
    if (offset > dat_len || (uint64_t)record_len > dat_len - offset) {
        return PV_EEOF;
    }
    pv_needle n;
    int rc = pv_needle_parse(dat + offset, (size_t)record_len, o->version, row->size, offset, 0, &n, NULL);
    if (rc == PV_ESIZE && o->width == 4 && offset == row->offset) {
        return alone(o, dat, dat_len, row, offset + ((uint64_t)1 << 35));
    }
    return rc == 0 && (o->flags & PV_SCRUB_CHECK_ID) && n.id != row->key ? PV_EID : rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    static int dat_fd = -1;
    static int idx_fd = -1;
    if (len < 3 || len > 4096) {
        return 0;
    }
    size_t idx_len = data[1] | (size_t)data[2] << 8;
    idx_len = idx_len < len - 3 ? idx_len : len - 3;
    const uint8_t *dat = data + 3 + idx_len;
    size_t dat_len = len - 3 - idx_len;
    refill(&idx_fd, data + 3, idx_len);
    refill(&dat_fd, dat, dat_len);
    const pv_scrub_opts o = {
        .dat_fd = dat_fd,
        .idx_fd = idx_fd,
        .width = data[0] & 1 ? 5 : 4,
        .version = (uint8_t)((data[0] >> 1 & 3) % 3 + 1),
        .flags = (data[0] & 8 ? (uint32_t)PV_SCRUB_CHECK_ID : 0) | (data[0] & 16 ? (uint32_t)PV_SCRUB_INDEX_ONLY : 0),
    };
    static pv_scrub_finding found[FOUND_MAX];
    static pv_scrub_finding again[FOUND_MAX];
    pv_scrub_stats stats;
    pv_scrub_stats stats_again;
    size_t count = scrub(&o, UINT64_MAX, found, &stats);
    must(scrub(&o, 1, again, &stats_again) == count);
    must(memcmp(found, again, count * sizeof *found) == 0);
    must(stats.expected_bytes == stats_again.expected_bytes && stats.bad_records == stats_again.bad_records);

    static pv_idx_row rows[512];
    int n = pv_idx_read(idx_fd, o.width, 0, rows, sizeof rows / sizeof *rows, NULL);
    must(n >= 0 && (uint64_t)n == stats.rows);
    uint64_t bad = 0;
    for (int i = 0; i < n && !(o.flags & PV_SCRUB_INDEX_ONLY); i++) {
        if (rows[i].size < 0) {
            continue;
        }
        int rc = alone(&o, dat, dat_len, &rows[i], rows[i].offset);
        bad += rc != 0;
        for (size_t k = 0; k < count; k++) {
            must(found[k].kind != PV_SCRUB_RECORD || found[k].row != (uint64_t)i || found[k].error.code == rc);
        }
    }
    must(bad == stats.bad_records);
    return 0;
}
