/* Erasure coding (pv_ec.c): known coefficients, encode against a byte by byte model, rebuild, recover, sorted index. */
#include "t.h"

#define MAX_TOTAL 32

typedef struct shards {
    int fd[MAX_TOTAL];
    uint32_t crc[MAX_TOTAL];
    uint64_t bytes;
} shards;

static void open_shards(shards *s, uint32_t total) {
    memset(s->crc, 0, sizeof s->crc);
    for (uint32_t i = 0; i < MAX_TOTAL; i++) {
        s->fd[i] = i < total ? t_file() : -1;
    }
}

static void close_shards(shards *s) {
    for (uint32_t i = 0; i < MAX_TOTAL; i++) {
        if (s->fd[i] >= 0) {
            close(s->fd[i]);
        }
    }
}

/* Working memory, and the descriptors of shards as the engine takes them. */
static _Alignas(4096) uint8_t scratch[(size_t)MAX_TOTAL * PV_EC_CHUNK];

typedef struct files {
    pv_ec_file at[MAX_TOTAL];
} files;

static files plain(const int *fds) {
    files f;
    for (uint32_t i = 0; i < MAX_TOTAL; i++) {
        f.at[i] = (pv_ec_file){fds[i], -1};
    }
    return f;
}

static int encode(int dat, uint64_t len, const pv_ec_layout *l, uint64_t from, uint64_t to, const int *out,
                  uint32_t *crcs, pv_errinfo *err) {
    const pv_ec_file file = {dat, -1};
    return pv_ec_encode(&file, len, l, from, to, plain(out).at, crcs, scratch, sizeof scratch, err);
}

static int rebuild(uint32_t data, uint32_t parity, const int *in, const int *out, uint64_t to, uint32_t *crcs,
                   pv_errinfo *err) {
    return pv_ec_rebuild(data, parity, plain(in).at, plain(out).at, 0, to, crcs, scratch, sizeof scratch, err);
}

static void test_known_coefficients(void) {
    static const uint8_t ten_four[4][10] = {
        {0x81, 0x96, 0xaf, 0xb8, 0xd2, 0xc4, 0xfe, 0xe8, 0x03, 0x02},
        {0x96, 0x81, 0xb8, 0xaf, 0xc4, 0xd2, 0xe8, 0xfe, 0x02, 0x03},
        {0xbf, 0xd6, 0x62, 0x0a, 0x06, 0x6f, 0xdf, 0xb7, 0x05, 0x04},
        {0xd6, 0xbf, 0x0a, 0x62, 0x6f, 0x06, 0xb7, 0xdf, 0x04, 0x05},
    };
    static const uint8_t six_three[3][6] = {
        {7, 6, 5, 4, 3, 2}, {6, 7, 4, 5, 2, 3}, {0xa0, 0xdf, 0xdf, 0xb7, 0xfe, 0xe8}};
    uint8_t matrix[MAX_TOTAL * MAX_TOTAL];
    CHECK_EQ(pv_ec_matrix(10, 4, matrix, NULL), 0);
    CHECK_MEM(matrix + 100, ten_four, sizeof ten_four);
    for (uint32_t i = 0; i < 100; i++) {
        CHECK_EQ(matrix[i], i / 10 == i % 10);
    }
    CHECK_EQ(pv_ec_matrix(6, 3, matrix, NULL), 0);
    CHECK_MEM(matrix + 36, six_three, sizeof six_three);
    CHECK_EQ(pv_ec_matrix(0, 4, matrix, NULL), PV_EINVAL);
    CHECK_EQ(pv_ec_matrix(10, 0, matrix, NULL), PV_EINVAL);
    CHECK_EQ(pv_ec_matrix(30, 3, matrix, NULL), PV_EINVAL);
    CHECK_EQ(pv_ec_matrix(UINT32_MAX, 2, matrix, NULL), PV_EINVAL);
    CHECK_EQ(pv_ec_matrix(31, 1, matrix, NULL), 0);
}

/* Two rows of large blocks of 48 bytes, the rest in small ones of 16, in uneven stretches. */
static void encode_one(uint64_t *seed, uint32_t data, uint32_t parity) {
    enum { LARGE = 48, SMALL = 16 };
    uint8_t dat[LARGE * MAX_TOTAL * 4];
    uint64_t len = 1 + t_rand_below(seed, sizeof dat);
    for (size_t i = 0; i < len; i++) {
        dat[i] = (uint8_t)t_rand(seed);
    }
    int fd = t_file();
    CHECK(pwrite(fd, dat, len, 0) == (ssize_t)len);
    pv_ec_layout layout = {data, parity, LARGE, SMALL, len / (LARGE * data)};
    uint64_t rest = len % (LARGE * data);
    shards s;
    open_shards(&s, data + parity);
    s.bytes = layout.large_rows * LARGE + (rest + SMALL * data - 1) / (SMALL * data) * SMALL;
    for (uint64_t at = 0; at < s.bytes;) {
        uint64_t to = at + 1 + t_rand_below(seed, 70);
        to = to < s.bytes ? to : s.bytes;
        CHECK_EQ(encode(fd, len, &layout, at, to, s.fd, s.crc, NULL), 0);
        at = to;
    }
    uint64_t place = 0;
    uint8_t shard[LARGE * MAX_TOTAL * 4 + SMALL];
    for (uint64_t row = 0; place < len; row++) {
        uint64_t block = row < layout.large_rows ? LARGE : SMALL;
        uint64_t large = row < layout.large_rows ? row : layout.large_rows;
        uint64_t at = large * LARGE + (row - large) * SMALL;
        for (uint32_t i = 0; i < data; i++) {
            CHECK(pread(s.fd[i], shard, block, (off_t)at) == (ssize_t)block);
            for (uint64_t k = 0; k < block; k++, place++) {
                CHECK_EQ(shard[k], place < len ? dat[place] : 0);
            }
        }
    }
    uint8_t whole[MAX_TOTAL][sizeof shard];
    const uint8_t *pieces[MAX_TOTAL];
    uint8_t ids[MAX_TOTAL];
    for (uint32_t i = 0; i < data + parity; i++) {
        CHECK(s.bytes <= sizeof shard);
        CHECK(pread(s.fd[i], whole[i], s.bytes, 0) == (ssize_t)s.bytes);
        CHECK_EQ(pv_crc32c(0, whole[i], s.bytes), s.crc[i]);
    }
    int back = t_file();
    const pv_ec_file target = {back, -1};
    uint64_t half = t_rand_below(seed, len);
    CHECK_EQ(pv_ec_decode(plain(s.fd).at, &layout, &target, half, len, scratch, sizeof scratch, NULL), 0);
    CHECK_EQ(pv_ec_decode(plain(s.fd).at, &layout, &target, 0, half, scratch, sizeof scratch, NULL), 0);
    uint8_t again_dat[sizeof dat];
    CHECK(pread(back, again_dat, sizeof again_dat, 0) == (ssize_t)len);
    CHECK_MEM(again_dat, dat, len);
    close(back);
    /* loses as many as it may, makes them again, from disk and in memory */
    shards again;
    open_shards(&again, 0);
    int in[MAX_TOTAL];
    memcpy(in, s.fd, sizeof in);
    for (uint32_t lost = 0; lost < parity; lost++) {
        uint32_t victim = (uint32_t)t_rand_below(seed, data + parity);
        if (in[victim] >= 0) {
            in[victim] = -1;
            again.fd[victim] = t_file();
        }
    }
    for (uint32_t i = 0; i < 8; i++) { /* what stands in the .dat, whichever shards are lost */
        uint64_t from = t_rand_below(seed, len);
        size_t part = i == 0 ? (size_t)(len - from) : (size_t)t_rand_below(seed, len - from + 1);
        CHECK_EQ(pv_ec_read(in, &layout, from, part, again_dat, NULL), 0);
        CHECK_MEM(again_dat, dat + from, part);
    }
    CHECK_EQ(rebuild(data, parity, in, again.fd, s.bytes, again.crc, NULL), 0);
    uint32_t have = 0;
    for (uint32_t i = 0; i < data + parity && have < data; i++) {
        if (in[i] >= 0) {
            ids[have] = (uint8_t)i;
            pieces[have++] = whole[i];
        }
    }
    for (uint32_t i = 0; i < data + parity; i++) {
        if (again.fd[i] >= 0) {
            CHECK(pread(again.fd[i], shard, s.bytes, 0) == (ssize_t)s.bytes);
            CHECK_MEM(shard, whole[i], s.bytes);
            CHECK_EQ(again.crc[i], s.crc[i]);
            uint32_t sum = 0;
            const pv_ec_file file = {again.fd[i], -1};
            CHECK_EQ(pv_ec_sum(&file, 0, s.bytes, &sum, scratch, sizeof scratch, NULL), 0);
            CHECK_EQ(sum, s.crc[i]);
        }
        CHECK_EQ(pv_ec_recover(data, parity, ids, pieces, s.bytes, (uint8_t)i, shard, NULL), 0);
        CHECK_MEM(shard, whole[i], s.bytes);
    }
    close_shards(&again);
    close_shards(&s);
    close(fd);
}

static void test_against_model(void) {
    uint64_t seed = 5;
    for (uint32_t i = 0; i < T_REPEAT(400); i++) {
        uint32_t data = 1 + (uint32_t)t_rand_below(&seed, 14);
        encode_one(&seed, data, 1 + (uint32_t)t_rand_below(&seed, 6));
    }
    encode_one(&seed, 10, 4);
    encode_one(&seed, 31, 1);
    encode_one(&seed, 1, 31);
}

static void test_failures_name_what_is_wrong(void) {
    pv_errinfo err;
    shards s;
    open_shards(&s, 3);
    int none[MAX_TOTAL];
    memset(none, -1, sizeof none);
    int in[MAX_TOTAL];
    memcpy(in, s.fd, sizeof in);
    in[1] = in[2] = -1;
    none[1] = s.fd[1];
    CHECK_EQ(rebuild(2, 1, in, none, 10, NULL, &err), PV_ERANGE);
    CHECK_EQ(err.a, 1);
    CHECK_EQ(err.b, 2);
    in[2] = s.fd[2];
    CHECK(pwrite(s.fd[0], "0123456789", 10, 0) == 10);
    CHECK_EQ(rebuild(2, 1, in, none, 10, NULL, &err), PV_EEOF);
    CHECK_EQ(err.d, 2);
    const pv_ec_layout layout = {2, 1, 32, 16, 0};
    CHECK_EQ(encode(s.fd[0], 11, &layout, 0, 16, none, NULL, &err), PV_EEOF);
    CHECK_EQ(encode(s.fd[0], 10, &layout, 16, 0, none, NULL, &err), PV_EINVAL);
    const pv_ec_file file = {s.fd[0], -1};
    uint32_t crc = 0;
    CHECK_EQ(pv_ec_sum(&file, 0, 11, &crc, scratch, sizeof scratch, &err), PV_EEOF);
    CHECK_EQ(pv_ec_sum(&file, 0, 10, &crc, scratch + 1, PV_EC_CHUNK, &err), PV_EINVAL);
    CHECK_EQ(pv_ec_sum(&file, 0, 10, &crc, scratch, PV_EC_CHUNK - 1, &err), PV_EINVAL);
    CHECK_EQ(pv_ec_decode(plain(s.fd).at, &layout, &file, 0, 17, scratch, sizeof scratch, &err), PV_EEOF);
    uint8_t out[48];
    CHECK(pwrite(s.fd[1], "0123456789abcdef", 16, 0) == 16);
    int some[MAX_TOTAL];
    memcpy(some, s.fd, sizeof some);
    CHECK_EQ(pv_ec_read(some, &layout, 10, 1, out, &err), PV_EEOF); /* shard 0 has 10 bytes */
    CHECK_EQ(err.d, 0);
    CHECK_EQ(pv_ec_read(some, &layout, 16, 16, out, &err), 0);
    CHECK_MEM(out, "0123456789abcdef", 16);
    some[0] = -1; /* it is made of 1 and 2, and 2 is empty */
    CHECK_EQ(pv_ec_read(some, &layout, 0, 4, out, &err), PV_EEOF);
    CHECK_EQ(err.d, 2);
    some[2] = -1;
    CHECK_EQ(pv_ec_read(some, &layout, 0, 4, out, &err), PV_ERANGE);
    CHECK_EQ(err.a, 1);
    CHECK_EQ(err.b, 2);
    CHECK_EQ(pv_ec_read(some, &layout, 16, 4, out, &err), 0); /* shard 1 is there */
    CHECK_EQ(pv_ec_read(some, &layout, 0, (size_t)INT32_MAX + 1, out, &err), PV_EINVAL);
    CHECK_EQ(pv_ec_read(some, &layout, UINT64_MAX, 1, out, &err), PV_EINVAL);
    const pv_ec_layout no_blocks = {2, 1, 32, 0, 0};
    CHECK_EQ(pv_ec_read(some, &no_blocks, 0, 1, out, &err), PV_EINVAL);
    CHECK_EQ(encode(s.fd[0], 10, &no_blocks, 0, 16, none, NULL, &err), PV_EINVAL);
    close_shards(&s);
}

/* By O_DIRECT, where the file system has it: the same bytes, ends that are no page included. */
static void test_direct_files(void) {
    char path[64] = "test-ec-direct-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    int direct = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
    CHECK_EQ(unlink(path), 0);
    enum { LEN = 3 * PV_EC_CHUNK + 1234 };
    uint64_t seed = 3;
    uint8_t *bytes = malloc(LEN);
    CHECK(bytes != NULL);
    for (size_t i = 0; i < LEN; i++) {
        bytes[i] = (uint8_t)t_rand(&seed);
    }
    CHECK(pwrite(fd, bytes, LEN, 0) == LEN);
    CHECK_EQ(fsync(fd), 0);
    CHECK_EQ(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    uint32_t crc = 0;
    const pv_ec_file file = {fd, direct};
    CHECK_EQ(pv_ec_sum(&file, 0, LEN, &crc, scratch, sizeof scratch, NULL), 0);
    CHECK_EQ(crc, pv_crc32c(0, bytes, LEN));
    CHECK_EQ(pv_ec_sum(&file, 0, LEN + 1, &crc, scratch, sizeof scratch, NULL), PV_EEOF);
    const pv_ec_layout one = {1, 1, PV_EC_CHUNK, PV_EC_CHUNK, 0};
    strcpy(path, "test-ec-direct-XXXXXX");
    int copy = mkstemp(path);
    CHECK(copy >= 0);
    const pv_ec_file target = {copy, open(path, O_RDWR | O_DIRECT | O_CLOEXEC)};
    CHECK_EQ(unlink(path), 0);
    CHECK_EQ(pv_ec_reserve(copy, LEN, NULL), 0);
    CHECK_EQ(pv_ec_decode(&file, &one, &target, 0, LEN, scratch, sizeof scratch, NULL), 0);
    uint8_t *again = malloc(LEN + 1);
    CHECK(again != NULL);
    CHECK(pread(copy, again, LEN + 1, 0) == LEN);
    CHECK_MEM(again, bytes, LEN);
    free(bytes);
    free(again);
    close(fd);
    close(copy);
    if (direct >= 0) {
        close(direct);
    }
    if (target.direct_fd >= 0) {
        close(target.direct_fd);
    }
}

static void test_sorted_index(void) {
    uint64_t seed = 9;
    for (uint8_t width = 4; width <= 5; width++) {
        const size_t len = 12U + width;
        int idx = t_file();
        int ecx = t_file();
        pv_idx_row last[64] = {{0}};
        const uint64_t count = 9000;
        uint8_t buf[17];
        for (uint64_t i = 0; i < count; i++) {
            uint64_t key = t_rand_below(&seed, 64);
            pv_idx_row row = {.key = key, .offset = 8 * t_rand_below(&seed, 50)};
            row.size = (int32_t)t_rand_below(&seed, 4) - 1;
            last[key] = row;
            pv_idx_row_put(&row, width, buf);
            CHECK(pwrite(idx, buf, len, (off_t)(i * len)) == (ssize_t)len);
        }
        uint64_t live;
        CHECK_EQ(pv_ecx_from_idx(idx, width, count, ecx, &live, NULL), 0);
        uint64_t expected = 0;
        for (uint64_t key = 0; key < 64; key++) {
            pv_idx_row row;
            uint64_t index;
            int wanted = last[key].offset != 0 && last[key].size >= 0;
            CHECK_EQ(pv_ecx_find(ecx, width, live, key, &row, &index, NULL), wanted);
            if (wanted) {
                CHECK_EQ(index, expected);
                CHECK_EQ(row.offset, last[key].offset);
                CHECK_EQ(row.size, last[key].size);
                expected++;
            }
        }
        CHECK_EQ(live, expected);
        pv_idx_row row;
        uint64_t index;
        CHECK_EQ(pv_ecx_find(ecx, width, live + 64, UINT64_MAX, &row, &index, NULL), PV_EEOF);
        CHECK_EQ(pv_ecx_from_idx(idx, width, count + 1, ecx, &live, NULL), PV_EEOF);
        CHECK_EQ(pv_ecx_from_idx(idx, 6, count, ecx, &live, NULL), PV_EINVAL);
        close(idx);
        close(ecx);
    }
}

int main(void) {
    RUN(test_known_coefficients);
    RUN(test_against_model);
    RUN(test_failures_name_what_is_wrong);
    RUN(test_direct_files);
    RUN(test_sorted_index);
    return T_END();
}
