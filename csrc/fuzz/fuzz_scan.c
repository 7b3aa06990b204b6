/* fuzz_scan.c - walking any data file, and the check of its end. Input: one byte (bit 0 width 5, bits 1..2 version - 1, bit 3
 * bodies are checked), 1 byte length of the index in units of 2, then the index, then the data.
 *
 * Scanning by one record and by many gives the same; walking goes as far as the records are right; both end.
 */
#include "../pv_int.h"

#include <sys/mman.h>

#define RECORDS_MAX 4096 /* an input that is larger is left alone */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static void must(int holds) {
    if (!holds) {
        abort();
    }
}

static int file_with(int *fd, const uint8_t *data, size_t len) {
    if (*fd < 0) {
        *fd = memfd_create("fuzz_scan", MFD_CLOEXEC);
        must(*fd >= 0);
    }
    must(pv__io_truncate(*fd, 0, NULL) == 0);
    must(pv__io_pwrite(*fd, data, len, 0, NULL) == 0);
    return *fd;
}

static int is_end(int rc) {
    return rc == 0 || rc == PV_EEOF || rc == PV_ECORRUPT;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    static int dat_fd = -1;
    static int idx_fd = -1;
    static pv_scan_rec recs[RECORDS_MAX];
    if (len < 2 || len / PV_NEEDLE_HEADER >= RECORDS_MAX) {
        return 0;
    }
    const uint8_t width = (uint8_t)(4 + (data[0] & 1));
    const uint8_t version = (uint8_t)(1 + (data[0] >> 1) % 3);
    const int check_body = (data[0] >> 3) & 1;
    size_t idx_len = 2U * data[1] < len - 2 ? 2U * data[1] : len - 2;
    int idx = file_with(&idx_fd, data + 2, idx_len);
    const size_t dat_len = len - 2 - idx_len;
    int dat = file_with(&dat_fd, data + 2 + idx_len, dat_len);

    uint64_t at = 0;
    pv_errinfo err;
    int count = pv_dat_scan(dat, version, &at, UINT64_MAX, check_body, recs, RECORDS_MAX, &err);
    must(count >= 0 || is_end(count));
    uint64_t one_at = 0;
    pv_scan_rec one;
    int good = 0;
    for (int i = 0; i < count; i++) {
        must(recs[i].offset == one_at && recs[i].record_len >= PV_NEEDLE_HEADER);
        must(pv_dat_scan(dat, version, &one_at, UINT64_MAX, check_body, &one, 1, &err) == 1);
        must(memcmp(&one, &recs[i], sizeof one) == 0);
        must(one_at == one.offset + (uint64_t)one.record_len);
        good += good == i && one.status == 0;
    }
    must(one_at == at || count < 0);
    int end = pv_dat_scan(dat, version, &one_at, UINT64_MAX, check_body, &one, 1, &err);
    must(is_end(end));

    uint64_t walk_at = 0;
    int walked = 0;
    int rc;
    while ((rc = pv_dat_walk(dat, version, &walk_at, UINT64_MAX, check_body, 3, &err)) > 0) {
        walked += rc;
    }
    must(walked <= good && good - walked < 3); /* those before an error in one call are not told of */
    must(rc == (count > good ? recs[good].status : end));
    must(walk_at == (count > good ? recs[good].offset : one_at));

    uint64_t when;
    rc = pv_vol_check_tail(dat, idx, width, version, &when, &err);
    must(rc >= PV_TAIL_OK && rc <= PV_TAIL_BAD_RECORD);
    return 0;
}
