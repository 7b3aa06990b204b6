/* fuzz_dat.c - walks through any data file, and the searches that start from its index. Input: one byte (bit 0 width 5, bits
 * 1..2 version - 1, bit 3 bodies are checked), 2 bytes length of the index, 8 bytes a time, 2 bytes an offset, all
 * little-endian, then the index, then the data.
 *
 * What a walk finds must not depend on how many records are asked for at a time, every record must lie in the file, and a
 * follower gets each of them but the zero-filled, the long and those of negative size. */
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

typedef struct file {
    int fd;
    uint8_t version;
    const uint8_t *bytes;
    size_t len;
} file;

/* The next record that is not zero-filled; its end goes to *at. */
static pv_scan_rec next_record(const file *f, uint64_t *at) {
    pv_scan_rec rec;
    do {
        CHECK_EQ(pv_dat_scan(f->fd, f->version, at, UINT64_MAX, 0, &rec, 1, NULL), 1);
    } while (rec.id == 0 && rec.cookie == 0 && rec.size == 0);
    return rec;
}

/* Holds a message against the record it was made of. */
static void check_message(const file *f, const pv_scan_rec *rec, const uint8_t *message, size_t len) {
    size_t end = (size_t)(rec->offset + (uint64_t)rec->record_len);
    size_t body = (end < f->len ? end : f->len) - (size_t)rec->offset - PV_NEEDLE_HEADER;
    const uint8_t *p = message;
    CHECK(*p++ == 0x0A && *p++ == PV_NEEDLE_HEADER);
    CHECK_MEM(p, f->bytes + rec->offset, PV_NEEDLE_HEADER);
    p += PV_NEEDLE_HEADER;
    CHECK(*p++ == 0x12);
    size_t said = 0;
    for (unsigned shift = 0;; shift += 7) {
        said |= (size_t)(*p & 0x7F) << shift;
        if (*p++ < 0x80) {
            break;
        }
    }
    CHECK_EQ(said, body);
    CHECK_MEM(p, f->bytes + rec->offset + PV_NEEDLE_HEADER, body);
    p += body;
    CHECK(p[0] == 0x18 && p[1] == 1 && p[2] == 0x20 && p[3] == f->version);
    CHECK_EQ(p + 4 - message, len);
}

/* A follower's walk with batches of so many messages: what it is given, and where it stops. */
static void follow(const file *f, uint64_t from, size_t cap, size_t max) {
    static uint8_t out[32 << 10];
    uint32_t ends[64];
    uint64_t at = from;
    uint64_t walked = from;
    uint64_t latest = 0;
    pv_errinfo err;
    for (;;) {
        uint64_t before = at;
        int count = pv_dat_follow(f->fd, f->version, &at, f->len, out, cap, ends, max, &latest, &err);
        if (count < 0) {
            CHECK_EQ(count, PV_EVERSION);
            return;
        }
        size_t start = 0;
        for (int i = 0; i < count; i++) {
            const pv_scan_rec rec = next_record(f, &walked);
            CHECK(rec.size >= 0 && ends[i] <= cap);
            check_message(f, &rec, out + start, ends[i] - start);
            start = ends[i];
        }
        pv_scan_rec rec;
        while (walked < at) { /* zero-filled ones behind the last message */
            CHECK_EQ(pv_dat_scan(f->fd, f->version, &walked, UINT64_MAX, 0, &rec, 1, NULL), 1);
            CHECK(rec.id == 0 && rec.cookie == 0 && rec.size == 0);
        }
        CHECK_EQ(walked, at);
        if (at == before && pv_dat_scan(f->fd, f->version, &at, UINT64_MAX, 0, &rec, 1, NULL) <= 0) {
            return; /* nothing more to be had */
        }
        CHECK(at != before);
        walked = at;
    }
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

    const file f = {.fd = dat_fd, .version = version, .bytes = data + idx_len, .len = dat_len};
    follow(&f, from, 16 << 10, 64);
    follow(&f, from, 600, 3);

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
