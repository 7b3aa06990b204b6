/* test_crc.c - CRC-32C: known values, any split, lengths beyond ISA-L's, the legacy form; and the error names. */
#include "t.h"

static void known_values(void) {
    CHECK_EQ(pv_crc32c(0, "123456789", 9), 0xe3069283);
    CHECK_EQ(pv_crc32c(0, "hello", 5), 0x9a71bb4c);
    CHECK_EQ(pv_crc32c(0, "", 0), 0);
    CHECK_EQ(pv_crc32c(0, NULL, 0), 0);
    CHECK_EQ(pv_crc32c(0x12345678, NULL, 0), 0x12345678);
    CHECK_EQ(pv_crc_legacy(0x9a71bb4c), 0x191c1fbb);
    CHECK_EQ(pv_crc_legacy(0x297bd0aa), 0x43d73dcf);
}

/* Bit by bit, from the polynomial. */
static uint32_t slow_crc(uint32_t prev, const uint8_t *p, size_t len) {
    uint32_t crc = ~prev;
    for (size_t i = 0; i < len; i++) {
        crc ^= p[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78U : 0U);
        }
    }
    return ~crc;
}

static void every_length_and_split(void) {
    enum { LEN = 1500 };
    uint8_t data[LEN];
    uint64_t seed = 1;
    for (size_t i = 0; i < LEN; i++) {
        data[i] = (uint8_t)t_rand(&seed);
    }
    t_guard g = t_guard_new(LEN);
    for (size_t len = 0; len <= LEN; len++) {
        const uint8_t *p = t_guard_put(&g, data, len);
        uint32_t want = slow_crc(0, data, len);
        CHECK_EQ(pv_crc32c(0, p, len), want);
        size_t at = (size_t)t_rand_below(&seed, len + 1);
        CHECK_EQ(pv_crc32c(pv_crc32c(0, p, at), p + at, len - at), want);
    }
    t_guard_free(&g);
}

/* More bytes than an int counts, without having that much memory: one small file's pages many times over. */
static void beyond_int(void) {
    const size_t piece = (size_t)16 << 20;
    const size_t total = ((size_t)2 << 30) + piece;
    int fd = t_file();
    CHECK_EQ(ftruncate(fd, (off_t)piece), 0);
    uint8_t *map = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(map != MAP_FAILED);
    for (size_t at = 0; at < total; at += piece) {
        CHECK(mmap(map + at, piece, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == map + at);
    }
    memset(map, 0x5a, piece);
    uint32_t want = 0;
    for (size_t at = 0; at < total; at += piece) {
        want = pv_crc32c(want, map, piece);
    }
    CHECK_EQ(pv_crc32c(0, map, total), want);
    CHECK(munmap(map, total) == 0);
    close(fd);
}

static void error_names(void) {
    CHECK(strcmp(pv_err_name(0), "PV_OK") == 0);
    CHECK(strcmp(pv_err_name(PV_ESYS), "PV_ESYS") == 0);
    CHECK(strcmp(pv_err_name(PV_EMORE), "PV_EMORE") == 0);
    CHECK(strcmp(pv_err_name(1), "PV_E?") == 0);
    /* Every code of the range has its own name. */
    for (int code = PV_ESYS; code >= PV_EMORE; code--) {
        CHECK(strcmp(pv_err_name(code), "PV_E?") != 0);
        CHECK(strcmp(pv_err_name(code), pv_err_name(code - 1)) != 0);
    }
    CHECK(strcmp(pv_err_name(PV_EMORE - 1), "PV_E?") == 0);
}

int main(void) {
    RUN(known_values);
    RUN(every_length_and_split);
    RUN(beyond_int);
    RUN(error_names);
    return T_END();
}
