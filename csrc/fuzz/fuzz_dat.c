/* fuzz_dat.c - walks through any data file, and the searches that start from its index. Input: one byte (bit 0 width 5, bits
 * 1..2 version - 1, bit 3 bodies are checked), 2 bytes length of the index, 8 bytes a time, 2 bytes an offset, all
 * little-endian, then the index, then the data.
 *
 * What a walk finds must not depend on how many records are asked for at a time, and every record must lie in the file. */
#include "../test/t.h"

#define RECORDS_MAX 600U

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static void refill(int *fd, const uint8_t *data, size_t len) {
    if (*fd < 0) {
        *fd = memfd_create("fuzz_dat", MFD_CLOEXEC);
        CHECK(*fd >= 0);
    }
    CHECK_EQ(pv__io_truncate(*fd, 0, NULL), 0);
    CHECK_EQ(pv__io_pwrite(*fd, data, len, 0, NULL), 0);
}

typedef struct walk {
    pv_scan_rec recs[RECORDS_MAX];
    size_t count;
    uint64_t offset;
    int rc;
} walk;

static void go(walk *w, int fd, uint8_t version, uint64_t from, uint64_t end, int check_body, size_t step) {
    w->count = 0;
    w->offset = from;
    pv_errinfo err;
    do {
        size_t room = RECORDS_MAX - w->count;
        w->rc =
            pv_dat_scan(fd, version, &w->offset, end, check_body, w->recs + w->count, step < room ? step : room, &err);
        w->count += w->rc > 0 ? (size_t)w->rc : 0;
        CHECK(w->count < RECORDS_MAX); /* a record has 16 bytes at least */
    } while (w->rc > 0);
    CHECK(w->rc == 0 || w->rc == PV_EEOF || w->rc == PV_ECORRUPT || w->rc == PV_EVERSION);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    static int dat_fd = -1, idx_fd = -1;
    static walk whole, single;
    if (len < 13 || len > 8192) {
        return 0;
    }
    const uint8_t width = data[0] & 1 ? 5 : 4;
    const uint8_t version = (uint8_t)((data[0] >> 1 & 3) + 1);
    const int check_body = data[0] >> 3 & 1;
    size_t idx_len = data[1] | (size_t)data[2] << 8;
    uint64_t since = pv__get_be64(data + 3);
    uint64_t from = (data[11] | (uint64_t)data[12] << 8) * 8;
    data += 13;
    len -= 13;
    idx_len = idx_len < len ? idx_len : len;
    size_t dat_len = len - idx_len;
    refill(&idx_fd, data, idx_len);
    refill(&dat_fd, data + idx_len, dat_len);

    go(&whole, dat_fd, version, from, UINT64_MAX, check_body, RECORDS_MAX);
    go(&single, dat_fd, version, from, UINT64_MAX, check_body, 1);
    CHECK_EQ(whole.rc, single.rc);
    CHECK_EQ(whole.count, single.count);
    CHECK_EQ(whole.offset, single.offset);
    CHECK_MEM(whole.recs, single.recs, whole.count * sizeof *whole.recs);
    uint64_t at = from;
    for (size_t i = 0; i < whole.count; i++) {
        const pv_scan_rec *r = &whole.recs[i];
        CHECK(r->offset >= at && r->offset + 16 <= dat_len && r->record_len >= 16);
        CHECK(r->offset + (uint64_t)r->record_len <= dat_len + 8); /* padding may be missing at the end */
        at = r->offset + (uint64_t)r->record_len;
    }

    pv_errinfo err;
    uint64_t ns = 0;
    int rc = pv_vol_check_tail(dat_fd, idx_fd, width, version, &ns, &err);
    CHECK((rc >= PV_TAIL_OK && rc <= PV_TAIL_BAD_RECORD) || rc == PV_EVERSION);
    rc = pv_dat_append_time(dat_fd, version, from, &ns, &err);
    CHECK(rc == 0 || rc == PV_EEOF || rc == PV_ECORRUPT || rc == PV_EVERSION);
    uint64_t offset = 0, row = 0;
    uint64_t rows = idx_len / (12U + width);
    rc = pv_dat_find_since(dat_fd, idx_fd, width, version, rows, since, &offset, &row, &err);
    CHECK(rc == 0 || rc == 1 || rc == PV_EEOF || rc == PV_ECORRUPT || rc == PV_EVERSION);
    if (rc == 1) {
        CHECK(row < rows && offset != 0);
        CHECK_EQ(pv_dat_append_time(dat_fd, version, offset, &ns, &err), 0);
        CHECK(ns > since);
    }
    CHECK_EQ(pv_dat_find_since(dat_fd, idx_fd, width, 3, rows + 1, UINT64_MAX, &offset, &row, &err) == 1, 0);
    return 0;
}
