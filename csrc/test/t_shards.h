/* t_shards.h - an erasure coded volume of known needles, for tests of what reads it. */
#ifndef PV_T_SHARDS_H
#define PV_T_SHARDS_H

#include "t.h"

#define T_SHARDS_DATA 4U
#define T_SHARDS_PARITY 2U
#define T_SHARDS_ALL (T_SHARDS_DATA + T_SHARDS_PARITY)
#define T_SHARDS_NEEDLES 80U
#define T_SHARDS_COOKIE 0x12345678U
#define T_SHARDS_LEN_MAX 30000U

typedef struct t_coded {
    pv_file *ecx;
    int ecx_fd; /* the same */
    pv_file *files[PV_EC_MAX_SHARDS];
    pv_ids *deleted;
    pv_ec_layout layout;
    uint64_t rows;
} t_coded;

/* Needle i (from 1 on) has this many bytes, all of the value i. The first is longer than anything is made inline. */
static inline size_t t_coded_len(uint64_t i) {
    return i == 1 ? T_SHARDS_LEN_MAX : 1 + (size_t)(i * 977 % 4001);
}

static inline t_coded t_coded_new(void) {
    static _Alignas(4096) uint8_t scratch[(size_t)(T_SHARDS_ALL + 1) * PV_EC_CHUNK];
    static uint8_t dat[400000];
    static uint8_t body[T_SHARDS_LEN_MAX];
    t_coded c = {.layout = {T_SHARDS_DATA, T_SHARDS_PARITY, 32768, 1024, 1}, .rows = T_SHARDS_NEEDLES};
    uint8_t ecx[T_SHARDS_NEEDLES * 16];
    size_t end = 8;
    for (uint64_t i = 1; i <= T_SHARDS_NEEDLES; i++) {
        memset(body, (int)i, t_coded_len(i));
        pv_needle n = {.id = i, .cookie = T_SHARDS_COOKIE, .data = body, .data_size = (uint32_t)t_coded_len(i)};
        n.checksum = pv_crc32c(0, body, t_coded_len(i));
        uint8_t head[20], tail[PV_NEEDLE_TAIL_MAX];
        size_t head_len, tail_len;
        int32_t size;
        CHECK_EQ(pv_needle_frame(&n, 3, head, &head_len, tail, sizeof tail, &tail_len, &size, NULL), 0);
        CHECK(end + head_len + n.data_size + tail_len <= sizeof dat);
        const pv_idx_row row = {.key = i, .offset = end, .size = size};
        pv_idx_row_put(&row, 4, ecx + (i - 1) * 16);
        memcpy(dat + end, head, head_len);
        memcpy(dat + end + head_len, body, n.data_size);
        memcpy(dat + end + head_len + n.data_size, tail, tail_len);
        end += head_len + n.data_size + tail_len;
    }
    c.ecx_fd = t_file();
    CHECK_EQ(pv__io_pwrite(c.ecx_fd, ecx, sizeof ecx, 0, NULL), 0);
    CHECK_EQ(pv_file_new(c.ecx_fd, &c.ecx), 0);
    CHECK_EQ(pv_ids_new(&c.deleted), 0);
    const uint64_t large = c.layout.large_block * T_SHARDS_DATA;
    CHECK(end > large);
    const uint64_t row_bytes = c.layout.small_block * T_SHARDS_DATA;
    const uint64_t shard_bytes = c.layout.large_block + (end - large + row_bytes - 1) / row_bytes * 1024;
    pv_ec_file out[T_SHARDS_ALL];
    for (uint32_t i = 0; i < T_SHARDS_ALL; i++) {
        out[i] = (pv_ec_file){t_file(), -1};
        CHECK_EQ(pv_file_new(out[i].fd, &c.files[i]), 0);
    }
    int fd = t_file();
    CHECK_EQ(pv__io_pwrite(fd, dat, end, 0, NULL), 0);
    const pv_ec_file in = {fd, -1};
    CHECK_EQ(pv_ec_encode(&in, end, &c.layout, 0, shard_bytes, out, NULL, scratch, sizeof scratch, NULL), 0);
    CHECK(close(fd) == 0);
    return c;
}

static inline void t_coded_free(t_coded *c) {
    for (uint32_t i = 0; i < T_SHARDS_ALL; i++) {
        pv_file_unref(c->files[i]);
    }
    pv_file_unref(c->ecx);
    pv_ids_unref(c->deleted);
}

/* What a server with the shards of these bits has. */
static inline pv_shards *t_coded_view(const t_coded *c, uint32_t bits) {
    pv_shards_opts o = {
        .ecx = c->ecx, .deleted = c->deleted, .layout = c->layout, .rows = c->rows, .width = 4, .version = 3};
    for (uint32_t i = 0; i < T_SHARDS_ALL; i++) {
        o.files[i] = (bits >> i & 1) != 0 ? c->files[i] : NULL;
    }
    pv_shards *s;
    CHECK_EQ(pv_shards_new(&o, &s), 0);
    return s;
}

#endif
