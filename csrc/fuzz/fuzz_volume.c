/* fuzz_volume.c - a volume of any two files: opened, read, written, deleted from, vacuumed. Input: one byte (bit 0 width 5,
 * bits 1..2 version that overrides the super block's, 0 for none, bit 3 read-only), 2 bytes length of the index
 * (little-endian), then the index, then the data.
 *
 * What is written reads back; what a vacuum copies reads as before. */
#include "../test/t.h"

#define ROWS_MAX 512U

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

enum { DAT, IDX, CPD, CPX, FILES };

static int fds[FILES] = {-1, -1, -1, -1};
static char paths[FILES][40];

static void refill(int which, const uint8_t *data, size_t len) {
    if (fds[which] < 0) {
        fds[which] = memfd_create("fuzz_volume", MFD_CLOEXEC);
        CHECK(fds[which] >= 0);
        snprintf(paths[which], sizeof paths[which], "/proc/self/fd/%d", fds[which]);
    }
    CHECK_EQ(pv__io_truncate(fds[which], 0, NULL), 0);
    if (len > 0) {
        CHECK_EQ(pv__io_pwrite(fds[which], data, len, 0, NULL), 0);
    }
}

static int open_volume(const uint8_t *data, pv_vol **v, int dat, int idx) {
    pv_errinfo err;
    const pv_vol_opts o = {.dat_path = paths[dat],
                           .idx_path = paths[idx],
                           .vid = 1,
                           .flags = data[0] & 8 ? PV_VOL_DAT_READONLY | PV_VOL_IDX_READONLY : 0,
                           .offset_width = data[0] & 1 ? 5 : 4,
                           .version = data[0] >> 1 & 3};
    return pv_vol_open(&o, v, &err);
}

/* Reads a needle in both ways; the code of the first, 1 for one without data. */
static int read_one(pv_vol *v, uint64_t id, uint32_t flags, uint32_t *checksum) {
    pv_read r, again;
    pv_errinfo err;
    int rc = pv_vol_read(v, id, flags, NULL, &r, &err);
    CHECK(rc == 0 || rc == PV_ENOTFOUND || rc == PV_EDELETED || rc == PV_ESIZE || rc == PV_ECORRUPT || rc == PV_ECRC ||
          rc == PV_EEOF || rc == PV_EMETA);
    if (rc != 0) {
        return rc;
    }
    *checksum = r.n.data == NULL ? 0 : pv_crc32c(0, r.n.data, r.n.data_size);
    rc = r.n.data_size == 0; /* a vacuum leaves nothing else of such a record */
    if (!r.empty && r.n.data != NULL) {
        uint8_t *copy = malloc((size_t)r.n.data_size + 1);
        CHECK(copy != NULL);
        CHECK_EQ(pv_vol_pread(v, r.data_offset, copy, r.n.data_size, r.entry.revision, &err), 0);
        CHECK_MEM(copy, r.n.data, r.n.data_size);
        free(copy);
        CHECK_EQ(pv_vol_read(v, id, flags | PV_READ_ENTRY, &r.entry, &again, &err), 0);
        CHECK_EQ(again.n.data_size, r.n.data_size);
        pv_read_free(&again);
    }
    pv_read_free(&r);
    return rc;
}

static void vacuum(pv_vol *v, const uint8_t *data, const pv_idx_row *rows, int count) {
    pv_superblock sb;
    pv_vol_superblock(v, &sb);
    sb.compaction_revision++;
    refill(CPD, NULL, 0);
    refill(CPX, NULL, 0);
    const pv_compact_opts o = {
        .cpd_path = paths[CPD], .cpx_path = paths[CPX], .superblock = sb, .now_s = 1700000000, .volume_ttl_minutes = 0};
    pv_compact *c;
    pv_errinfo err;
    int rc = pv_compact_begin(v, &o, &c, &err);
    CHECK(rc == 0 || rc == PV_EVERSION || rc == PV_EEOF); /* PV_EEOF: the super block's extra area is cut off */
    if (rc != 0) {
        return;
    }
    while ((rc = pv_compact_step(c, 4096, &err)) == 1) {
    }
    pv_compact_stats stats;
    pv_compact_stat(c, &stats);
    if (rc == 0) {
        CHECK_EQ(pv_compact_finish(c, &err), 0);
    }
    pv_compact_free(c);
    if (rc != 0) {
        return;
    }
    pv_vol *made;
    CHECK_EQ(open_volume(data, &made, CPD, CPX), 0);
    for (int i = 0; i < count && stats.expired_needles == 0; i++) {
        uint32_t before = 0, after = 0;
        if (read_one(v, rows[i].key, 0, &before) == 0) {
            CHECK_EQ(read_one(made, rows[i].key, 0, &after), 0);
            CHECK_EQ(before, after);
        }
    }
    pv_vol_unref(made);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    if (len < 3 || len > 8192) {
        return 0;
    }
    size_t idx_len = data[1] | (size_t)data[2] << 8;
    idx_len = idx_len < len - 3 ? idx_len : len - 3;
    refill(IDX, data + 3, idx_len);
    refill(DAT, data + 3 + idx_len, len - 3 - idx_len);
    pv_vol *v;
    pv_errinfo err;
    int rc = open_volume(data, &v, DAT, IDX);
    CHECK(rc == 0 || rc == PV_EEOF || rc == PV_EVERSION || rc == PV_EALIGN);
    if (rc != 0) {
        return 0;
    }
    static pv_idx_row rows[ROWS_MAX];
    int count = pv_vol_visit(v, 0, rows, ROWS_MAX);
    CHECK(count >= 0 && (size_t)count <= idx_len / 16);
    uint32_t checksum = 0;
    for (int i = 0; i < count; i++) {
        (void)read_one(v, rows[i].key, 0, &checksum);
        (void)read_one(v, rows[i].key, PV_READ_DELETED | PV_READ_META_OK, &checksum);
    }
    vacuum(v, data, rows, count);

    const uint8_t *tail = data + len - (len < 20 ? len : 20);
    const pv_needle n = {.id = count > 0 ? rows[0].key : 77,
                         .cookie = 5,
                         .data = tail,
                         .data_size = (uint32_t)(data + len - tail),
                         .checksum = pv_crc32c(0, tail, (size_t)(data + len - tail))};
    pv_write_res written;
    rc = pv_vol_write(v, &n, 0, NULL, &written, &err);
    if (rc == 0) {
        CHECK_EQ(read_one(v, n.id, 0, &checksum), 0);
        CHECK_EQ(checksum, n.checksum);
        int32_t size;
        CHECK_EQ(pv_vol_delete(v, n.id, 5, 0, 0, NULL, &size, &written, &err), 0);
        CHECK(read_one(v, n.id, 0, &checksum) < 0);
    } else {
        CHECK(rc == PV_EREADONLY || rc == PV_EFULL || rc == PV_ESIZE || rc == PV_ECORRUPT || rc == PV_EEOF ||
              rc == PV_EVERSION || rc == PV_ECOOKIE);
    }
    rc = pv_vol_write_blob(v, 78, (int32_t)(len - 16), data, len, 0, NULL, &written, &err);
    CHECK(rc <= 0 || rc == 1);
    pv_vol_unref(v);
    return 0;
}
