/* test_needle.c - records and super blocks: the contract's example, files made by Go, every kind of damage. */
#include "t.h"

#include <dirent.h>
#include <sys/stat.h>

#define RECORD_MAX (200U * 1024U)

/* The record of the contract's worked example (storage.md 3.3), super block first. */
static const uint8_t example[] = {
    0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,                                                 /* super block */
    0xfc, 0x00, 0x44, 0xa0, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x36, /* header */
    0x00, 0x00, 0x00, 0x05, 'h',  'e',  'l',  'l',  'o',  0x2e,                                     /* data, flags */
    0x09, 'h',  'e',  'l',  'l',  'o',  '.',  'b',  'i',  'n',                                      /* name */
    0x0b, 't',  'e',  'x',  't',  '/',  'x',  '-',  'd',  'e',  'm',  'o',                          /* mime */
    0x00, 0x65, 0x53, 0xf1, 0x00,                                                                   /* last modified */
    0x00, 0x0f, '{',  '"',  'C',  'o',  'l',  'o',  'r',  '"',  ':',  '"',  'r',  'e',  'd',  '"',
    '}',  0x9a, 0x71, 0xbb, 0x4c, 0x18, 0xea, 0xa0, 0x96, 0x26, 0x21, 0xe2, 0x8d, /* checksum, time */
    0x00, 0x00, 0x00, 0x36, 0x00, 0x00,                                           /* padding */
};
static const uint8_t example_tombstone[] = {
    0x11, 0x11, 0x22, 0x22, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x0a, 0x00, 0x00, 0x00, 0x00,
    0x34, 0xcf, 0xdc, 0x25, 0x18, 0xea, 0xa0, 0x9b, 0x49, 0x88, 0xc1, 0x3f, 0x00, 0x00, 0x00, 0x00,
};

/* Puts the pieces of a frame together. Returns the record's length. */
static size_t frame(const pv_needle *n, uint8_t version, uint8_t *out) {
    static uint8_t tail[PV_NEEDLE_TAIL_MAX];
    uint8_t head[20];
    size_t head_len;
    size_t tail_len;
    int32_t size;
    pv_errinfo err;
    CHECK_EQ(pv_needle_frame(n, version, head, &head_len, tail, sizeof tail, &tail_len, &size, &err), 0);
    CHECK_EQ(head_len, version == 1 || n->data_size == 0 ? 16 : 20);
    memcpy(out, head, head_len);
    if (n->data_size > 0) {
        memcpy(out + head_len, n->data, n->data_size);
    }
    memcpy(out + head_len + n->data_size, tail, tail_len);
    size_t len = head_len + n->data_size + tail_len;
    CHECK_EQ(len, (uint64_t)pv_needle_record_len(size, version));
    CHECK_EQ(len % 8, 0);
    return len;
}

static void worked_example(void) {
    pv_superblock sb;
    pv_superblock_parse(example, &sb);
    CHECK_EQ(sb.version, 3);
    const uint8_t *rec = example + 8;
    const size_t len = sizeof example - 8;
    pv_needle n;
    pv_errinfo err;
    CHECK_EQ(pv_needle_parse(rec, len, 3, 54, 8, 0, &n, &err), 0);
    CHECK_EQ(n.cookie, 0xfc0044a0);
    CHECK_EQ(n.id, 1);
    CHECK_EQ(n.size, 54);
    CHECK_EQ(n.data_size, 5);
    CHECK_MEM(n.data, "hello", 5);
    CHECK_EQ(n.flags, PV_F_NAME | PV_F_MIME | PV_F_MTIME | PV_F_PAIRS);
    CHECK_EQ(n.name_size, 9);
    CHECK_MEM(n.name, "hello.bin", 9);
    CHECK_EQ(n.mime_size, 11);
    CHECK_MEM(n.mime, "text/x-demo", 11);
    CHECK_EQ(n.last_modified_s, 1700000000);
    CHECK_EQ(n.pairs_size, 15);
    CHECK_MEM(n.pairs, "{\"Color\":\"red\"}", 15);
    CHECK_EQ(n.checksum, 0x9a71bb4c);
    CHECK_EQ(n.append_at_ns, 1795423968205857421U);
    CHECK_EQ(n.version, 3);
    uint8_t out[128];
    CHECK_EQ(frame(&n, 3, out), len);
    CHECK_MEM(out, rec, len);

    CHECK_EQ(pv_needle_parse(example_tombstone, 32, 3, 0, 0, 0, &n, &err), 0);
    CHECK_EQ(n.id, 10);
    CHECK_EQ(n.data_size, 0);
    CHECK(n.data != NULL);
    CHECK_EQ(n.checksum, 0x34cfdc25);
    CHECK_EQ(frame(&n, 3, out), 32);
    CHECK_MEM(out, example_tombstone, 32);
}

static void record_lengths(void) {
    static const int pad3[8] = {4, 3, 2, 1, 8, 7, 6, 5};
    for (int32_t size = 0; size < 64; size++) {
        CHECK_EQ(pv_needle_record_len(size, 3), 16 + size + 12 + pad3[size % 8]);
        CHECK_EQ(pv_needle_record_len(size, 2), 16 + size + 4 + pad3[size % 8]);
        CHECK_EQ(pv_needle_record_len(size, 1), pv_needle_record_len(size, 2));
    }
    CHECK_EQ(pv_needle_record_len(-1, 3), 32);
    CHECK_EQ(pv_needle_record_len(-1, 2), 24);
    CHECK_EQ(pv_needle_record_len(-1, 1), 24);
    CHECK_EQ(pv_needle_record_len(-5, 3), 24);
    CHECK_EQ(pv_needle_record_len(-17, 3), 16);
    CHECK_EQ(pv_needle_record_len(-100, 3), -64);
    /* 16 + size + 12 wraps to a negative number here, as in 32-bit arithmetic elsewhere: padding 8 - (-5 % 8) = 13. */
    CHECK_EQ(pv_needle_record_len(INT32_MAX, 3), (int64_t)INT32_MAX + 28 + 8 - pv__i32((uint32_t)INT32_MAX + 28) % 8);
    CHECK(pv_needle_record_len(INT32_MIN, 3) < 0);
}

/* ------------------------------------------------------------------ files made by Go */

static uint8_t *read_whole(const char *path, size_t *len) {
    int fd;
    pv_errinfo err;
    uint64_t size;
    CHECK_EQ(pv__io_open(path, O_RDONLY, 0, &fd, &err), 0);
    CHECK_EQ(pv__io_size(fd, &size, &err), 0);
    *len = (size_t)size;
    uint8_t *data = malloc(*len + 1);
    CHECK(data != NULL);
    CHECK_EQ(pv__io_pread_full(fd, data, *len, 0, &err), 0);
    CHECK_EQ(pv__io_close(fd, &err), 0);
    return data;
}

/* Parses every record and frames it again. Padding is compared where Go wrote the file. Returns the records seen. */
static unsigned check_dat(const char *path, uint8_t version, bool go_made, bool torn) {
    size_t len;
    uint8_t *dat = read_whole(path, &len);
    uint8_t *out = malloc(len + 64);
    CHECK(out != NULL);
    t_guard g = t_guard_new(len);
    unsigned records = 0;
    size_t at = PV_SUPERBLOCK;
    while (at + PV_NEEDLE_HEADER <= len) {
        uint32_t cookie;
        uint64_t id;
        int32_t size;
        pv_needle_header(dat + at, &cookie, &id, &size);
        size_t rec_len = (size_t)pv_needle_record_len(size, version);
        if (rec_len > len - at) {
            CHECK(torn);
            break;
        }
        const uint8_t *rec = t_guard_put(&g, dat + at, rec_len);
        pv_needle n;
        pv_errinfo err;
        CHECK_EQ(pv_needle_parse(rec, rec_len, version, size, at, 0, &n, &err), 0);
        CHECK_EQ(n.cookie, cookie);
        CHECK_EQ(n.id, id);
        CHECK_EQ(frame(&n, version, out), rec_len);
        size_t used = PV_NEEDLE_HEADER + (size_t)size + (version == 3 ? 12 : 4);
        CHECK_MEM(out, rec, go_made ? rec_len : used);
        records++;
        at += rec_len;
    }
    CHECK(torn || at == len);
    t_guard_free(&g);
    free(out);
    free(dat);
    return records;
}

static bool ends_with(const char *s, const char *end) {
    size_t a = strlen(s);
    size_t b = strlen(end);
    return a >= b && strcmp(s + a - b, end) == 0;
}

static void golden_files(void) {
    unsigned go_records = 0;
    unsigned own_records = 0;
    DIR *d = opendir(PV_T_GOLDEN);
    CHECK(d != NULL);
    const struct dirent *e;
    while ((e = readdir(d)) != NULL) {
        char dir[600];
        snprintf(dir, sizeof dir, "%s/%s/data", PV_T_GOLDEN, e->d_name);
        DIR *sub = e->d_name[0] == '.' ? NULL : opendir(dir);
        if (sub == NULL) {
            continue;
        }
        const bool go_made = strncmp(e->d_name, "own-", 4) != 0;
        const bool torn = strncmp(e->d_name, "torn-", 5) == 0;
        const uint8_t version = strcmp(e->d_name, "own-v1") == 0 ? 1 : strcmp(e->d_name, "own-v2") == 0 ? 2 : 3;
        const struct dirent *f;
        while ((f = readdir(sub)) != NULL) {
            char path[1200];
            if (ends_with(f->d_name, ".dat")) {
                snprintf(path, sizeof path, "%s/%s", dir, f->d_name);
                *(go_made ? &go_records : &own_records) += check_dat(path, version, go_made, torn);
            }
        }
        closedir(sub);
    }
    closedir(d);
    printf("  %u records of Go, %u of our own writer\n", go_records, own_records);
    CHECK(go_records > 100);
    CHECK(own_records > 20);
}

/* ------------------------------------------------------------------ made-up needles */

static uint8_t bytes[70000]; /* what data, names, ... of random needles point at */

static void fill_bytes(void) {
    uint64_t seed = 5;
    for (size_t i = 0; i < sizeof bytes; i++) {
        bytes[i] = (uint8_t)t_rand(&seed);
    }
}

static pv_needle random_needle(uint64_t *seed) {
    pv_needle n = {0};
    n.id = t_rand(seed);
    n.cookie = (uint32_t)t_rand(seed);
    n.append_at_ns = t_rand(seed);
    n.last_modified_s = t_rand(seed) & 0xffffffffff;
    n.data_size = (uint32_t)(t_rand_below(seed, 8) == 0 ? 0 : t_rand_below(seed, 300));
    n.flags = (uint8_t)t_rand(seed);
    n.name_size = (uint8_t)(t_rand_below(seed, 4) == 0 ? 255 : t_rand_below(seed, 20));
    n.mime_size = (uint8_t)(t_rand_below(seed, 4) == 0 ? 255 : t_rand_below(seed, 20));
    n.pairs_size = (uint16_t)(t_rand_below(seed, 64) == 0 ? 65535 : t_rand_below(seed, 50));
    n.ttl_count = (uint8_t)t_rand(seed);
    n.ttl_unit = (uint8_t)t_rand(seed);
    n.data = bytes + t_rand_below(seed, 1000);
    n.name = bytes + t_rand_below(seed, 1000);
    n.mime = bytes + t_rand_below(seed, 1000);
    n.pairs = bytes + t_rand_below(seed, 1000);
    n.checksum = pv_crc32c(0, n.data, n.data_size);
    return n;
}

static void same_needle(const pv_needle *a, const pv_needle *b, uint8_t version) {
    CHECK_EQ(a->id, b->id);
    CHECK_EQ(a->cookie, b->cookie);
    CHECK_EQ(a->data_size, b->data_size);
    CHECK_MEM(a->data, b->data, a->data_size);
    CHECK_EQ(a->checksum, b->checksum);
    CHECK_EQ(b->append_at_ns, version == 3 ? a->append_at_ns : 0);
    if (version == 1 || a->data_size == 0) {
        CHECK_EQ(b->flags, 0);
        CHECK(b->name == NULL && b->mime == NULL && b->pairs == NULL);
        return;
    }
    CHECK_EQ(a->flags, b->flags);
    if (a->flags & PV_F_NAME) {
        CHECK_EQ(a->name_size, b->name_size);
        CHECK_MEM(a->name, b->name, a->name_size);
    }
    if (a->flags & PV_F_MIME) {
        CHECK_EQ(a->mime_size, b->mime_size);
        CHECK_MEM(a->mime, b->mime, a->mime_size);
    }
    CHECK_EQ(b->last_modified_s, (a->flags & PV_F_MTIME) ? a->last_modified_s : 0);
    CHECK_EQ(b->ttl_count, (a->flags & PV_F_TTL) ? a->ttl_count : 0);
    CHECK_EQ(b->ttl_unit, (a->flags & PV_F_TTL) ? a->ttl_unit : 0);
    if (a->flags & PV_F_PAIRS) {
        CHECK_EQ(a->pairs_size, b->pairs_size);
        CHECK_MEM(a->pairs, b->pairs, a->pairs_size);
    }
}

/* The tail parser on its own must see what the whole parser sees. */
static void check_tail(const uint8_t *rec, size_t len, uint8_t version, const pv_needle *whole, t_guard *g) {
    if (version == 1 || whole->data_size == 0) {
        return;
    }
    size_t skip = PV_NEEDLE_HEADER + 4 + whole->data_size;
    size_t need = (size_t)whole->size - 4 - whole->data_size + (version == 3 ? 12 : 4);
    CHECK(skip + need <= len);
    pv_errinfo err;
    for (size_t cut = 0; cut <= need; cut = cut < 600 || cut == need ? cut + 1 : need) {
        pv_needle n = {.id = whole->id, .cookie = whole->cookie, .size = whole->size, .data_size = whole->data_size};
        const uint8_t *tail = t_guard_put(g, rec + skip, cut);
        int rc = pv_needle_parse_tail(tail, cut, version, &n, &err);
        CHECK_EQ(rc, cut == need ? 0 : PV_EEOF);
        if (rc == 0) {
            n.data = whole->data;
            same_needle(whole, &n, version);
        }
    }
}

static void round_trips(void) {
    static uint8_t rec[RECORD_MAX];
    t_guard g = t_guard_new(RECORD_MAX);
    t_guard g2 = t_guard_new(RECORD_MAX);
    uint64_t seed = 11;
    for (int i = 0; i < 3000; i++) {
        const uint8_t version = (uint8_t)(1 + i % 3);
        pv_needle n = random_needle(&seed);
        size_t len = frame(&n, version, rec);
        pv_needle got;
        pv_errinfo err;
        int32_t size;
        CHECK_EQ(pv_needle_body_size(&n, version, &size), 0);
        const uint8_t *p = t_guard_put(&g, rec, len);
        CHECK_EQ(pv_needle_parse(p, len, version, size, 0, 0, &got, &err), 0);
        same_needle(&n, &got, version);
        CHECK_EQ(pv_needle_parse(p, len, version, size + 1, 0, PV_PARSE_ANY_SIZE, &got, &err), 0);
        check_tail(rec, len, version, &got, &g2);
    }
    t_guard_free(&g);
    t_guard_free(&g2);
}

/* Every truncation: PV_EEOF until the last byte in use is there, and not a byte read too far. */
static void truncations(void) {
    static uint8_t rec[RECORD_MAX];
    t_guard g = t_guard_new(RECORD_MAX);
    uint64_t seed = 12;
    for (int i = 0; i < 150; i++) {
        const uint8_t version = (uint8_t)(1 + i % 3);
        pv_needle n = random_needle(&seed);
        n.pairs_size = (uint16_t)(n.pairs_size % 50);
        size_t len = frame(&n, version, rec);
        int32_t size;
        CHECK_EQ(pv_needle_body_size(&n, version, &size), 0);
        size_t used = PV_NEEDLE_HEADER + (size_t)size + (version == 3 ? 12 : 4);
        for (size_t cut = 0; cut <= len; cut++) {
            pv_needle got;
            pv_errinfo err = {0};
            int rc = pv_needle_parse(t_guard_put(&g, rec, cut), cut, version, size, 77, 0, &got, &err);
            CHECK_EQ(rc, cut < used ? PV_EEOF : 0);
            if (rc < 0) {
                CHECK_EQ(err.code, PV_EEOF);
                CHECK_EQ(err.a, 77);
                CHECK_EQ(err.b, cut < 16 ? 16 : used);
                CHECK_EQ(err.c, cut);
            }
        }
    }
    t_guard_free(&g);
}

/* Every bit flipped: no crash, damage in the data is always found, damage in the header where a size was expected too. */
static void flips(void) {
    static uint8_t rec[RECORD_MAX];
    t_guard g = t_guard_new(RECORD_MAX);
    uint64_t seed = 13;
    for (int i = 0; i < 60; i++) {
        const uint8_t version = (uint8_t)(1 + i % 3);
        pv_needle n = random_needle(&seed);
        n.pairs_size = (uint16_t)(n.pairs_size % 50);
        size_t len = frame(&n, version, rec);
        int32_t size;
        CHECK_EQ(pv_needle_body_size(&n, version, &size), 0);
        const size_t data_at = PV_NEEDLE_HEADER + (version > 1 && n.data_size > 0 ? 4U : 0U);
        for (size_t bit = 0; bit < len * 8; bit++) {
            uint8_t *p = t_guard_put(&g, rec, len);
            p[bit / 8] ^= (uint8_t)(1U << (bit % 8));
            pv_needle got;
            pv_errinfo err;
            int rc = pv_needle_parse(p, len, version, size, 0, 0, &got, &err);
            if (bit / 8 >= 12 && bit / 8 < 16) {
                CHECK_EQ(rc, PV_ESIZE);
            } else if (bit / 8 >= data_at && bit / 8 < data_at + n.data_size) {
                CHECK_EQ(rc, PV_ECRC);
                CHECK_EQ(err.b, n.checksum);
                CHECK_EQ(err.a, got.checksum);
                CHECK_EQ(err.c, n.id);
                CHECK_EQ(got.data_size, n.data_size);
                CHECK_EQ(got.append_at_ns, version == 3 ? n.append_at_ns : 0);
            } else if (rc < 0) {
                CHECK(rc == PV_ECORRUPT || rc == PV_ECRC);
            }
            rc = pv_needle_parse(p, len, version, 0, 0, PV_PARSE_ANY_SIZE, &got, &err);
            CHECK(rc == 0 || rc == PV_ECORRUPT || rc == PV_ECRC || rc == PV_EEOF);
            rc = pv_needle_parse(p, len, version, size, 0, PV_PARSE_NO_CRC, &got, &err);
            CHECK(rc == 0 || rc == PV_ECORRUPT || rc == PV_ESIZE);
        }
    }
    t_guard_free(&g);
}

/* ------------------------------------------------------------------ errors by name */

/* A version 3 record around a body given as bytes; the CRC is right for data_len bytes behind the data size. */
static size_t raw_record(uint8_t *rec, const uint8_t *body, size_t len, size_t data_len) {
    memset(rec, 0, 16);
    pv__put_be64(rec + 4, 0x1234);
    pv__put_be32(rec + 12, (uint32_t)len);
    memcpy(rec + 16, body, len);
    pv__put_be32(rec + 16 + len, pv_crc32c(0, body + 4, data_len));
    pv__put_be64(rec + 20 + len, 99);
    return 28 + len;
}

static void field_errors(void) {
    /* Behind data "x": flags and what follows; the field number that must be blamed, 0 for none. */
    static const struct {
        uint8_t bytes[12];
        uint8_t len;
        uint8_t field;
    } cases[] = {
        {{0}, 0, 0},                         /* no flags */
        {{0x00}, 1, 0},                      /* flags only */
        {{0x3e}, 1, 0},                      /* everything promised, nothing there: tolerated */
        {{PV_F_NAME, 1}, 2, 2},              /* name cut */
        {{PV_F_NAME, 0}, 2, 0},              /* empty name */
        {{PV_F_NAME | PV_F_MIME, 0}, 2, 0},  /* mime absent: tolerated */
        {{PV_F_MIME, 2, 'a'}, 3, 3},         /* mime cut */
        {{PV_F_MTIME, 1, 2, 3, 4}, 5, 4},    /* last modified cut */
        {{PV_F_MTIME, 1, 2, 3, 4, 5}, 6, 0}, /* whole */
        {{PV_F_TTL, 1}, 2, 5},               /* ttl cut */
        {{PV_F_TTL, 1, 2}, 3, 0},            /* whole */
        {{PV_F_PAIRS, 0}, 2, 6},             /* pairs length cut */
        {{PV_F_PAIRS, 0, 1}, 3, 7},          /* pairs cut */
        {{PV_F_PAIRS, 0, 1, '{'}, 4, 0},     /* whole */
        {{0x00, 1, 2, 3, 4, 5}, 6, 0},       /* bytes behind the last field: tolerated */
    };
    t_guard g = t_guard_new(256);
    for (size_t i = 0; i < PV__ARRAY_LEN(cases); i++) {
        uint8_t body[32] = {0, 0, 0, 1, 'x'};
        uint8_t rec[128];
        memcpy(body + 5, cases[i].bytes, cases[i].len);
        size_t len = raw_record(rec, body, 5U + cases[i].len, 1);
        pv_needle n;
        pv_errinfo err = {0};
        int rc = pv_needle_parse(t_guard_put(&g, rec, len), len, 3, 5 + cases[i].len, 0, 0, &n, &err);
        CHECK_EQ(rc, cases[i].field == 0 ? 0 : PV_ECORRUPT);
        if (rc < 0) {
            CHECK_EQ(err.a, cases[i].field);
        }
        pv_needle tail = {.id = 0x1234, .size = 5 + cases[i].len, .data_size = 1};
        rc = pv_needle_parse_tail(t_guard_put(&g, rec + 21, len - 21), len - 21, 3, &tail, &err);
        CHECK_EQ(rc, cases[i].field == 0 ? 0 : PV_ECORRUPT);
    }
    t_guard_free(&g);
}

static void size_errors(void) {
    uint8_t rec[64];
    pv_needle n;
    pv_errinfo err;
    /* Bodies of 1 to 3 bytes cannot hold the data size; 4 bytes saying 0 are an odd but readable empty needle. */
    const uint8_t zeros[8] = {0};
    for (size_t size = 1; size <= 4; size++) {
        size_t len = raw_record(rec, zeros, size, 0);
        CHECK_EQ(pv_needle_parse(rec, len, 3, (int32_t)size, 0, 0, &n, &err), size < 4 ? PV_ECORRUPT : 0);
        if (size < 4) {
            CHECK_EQ(err.a, 1);
        }
    }
    /* Data size one more than there is, and so large that adding to it would overflow. */
    static const uint32_t too_large[] = {2, 0x7fffffff, 0xfffffffb, 0xffffffff};
    for (size_t i = 0; i < PV__ARRAY_LEN(too_large); i++) {
        uint8_t body[5];
        pv__put_be32(body, too_large[i]);
        body[4] = 'x';
        size_t len = raw_record(rec, body, sizeof body, 1);
        CHECK_EQ(pv_needle_parse(rec, len, 3, 5, 0, 0, &n, &err), PV_ECORRUPT);
        CHECK_EQ(err.a, 1);
        pv_needle tail = {.size = 5, .data_size = too_large[i]};
        CHECK_EQ(pv_needle_parse_tail(rec, sizeof rec, 3, &tail, &err), PV_ECORRUPT);
    }
    /* Negative header sizes. */
    static const int32_t negative[] = {-1, -5, -17, INT32_MIN};
    for (size_t i = 0; i < PV__ARRAY_LEN(negative); i++) {
        pv__put_be32(rec + 12, (uint32_t)negative[i]);
        CHECK_EQ(pv_needle_parse(rec, sizeof rec, 3, negative[i], 0, 0, &n, &err), PV_ECORRUPT);
        CHECK_EQ(pv_needle_parse(rec, sizeof rec, 3, 0, 0, PV_PARSE_ANY_SIZE, &n, &err), PV_ECORRUPT);
        CHECK_EQ(pv_needle_parse(rec, sizeof rec, 3, 7, 4096, 0, &n, &err), PV_ESIZE);
        CHECK_EQ(err.a, 4096);
        CHECK_EQ(err.b, 0x1234);
        CHECK_EQ(err.c, (uint32_t)negative[i]);
        CHECK_EQ(err.d, 7);
    }
    for (unsigned version = 0; version < 256; version++) {
        int rc = pv_needle_parse(rec, sizeof rec, (uint8_t)version, 0, 0, 0, &n, &err);
        CHECK_EQ(rc == PV_EVERSION, version < 1 || version > 3);
        int32_t size;
        CHECK_EQ(pv_needle_body_size(&n, (uint8_t)version, &size) == PV_EVERSION, version < 1 || version > 3);
        pv_needle tail = {0};
        CHECK_EQ(pv_needle_parse_tail(rec, sizeof rec, (uint8_t)version, &tail, &err) == PV_EVERSION,
                 version != 2 && version != 3);
    }
}

static void legacy_checksum(void) {
    uint8_t rec[128];
    memcpy(rec, example + 8, sizeof example - 8);
    pv__put_be32(rec + 16 + 54, 0x191c1fbb);
    pv_needle n;
    pv_errinfo err;
    CHECK_EQ(pv_needle_parse(rec, sizeof example - 8, 3, 54, 0, 0, &n, &err), 0);
    CHECK_EQ(n.checksum, 0x9a71bb4c);
    CHECK_EQ(pv_needle_parse(rec, sizeof example - 8, 3, 54, 0, PV_PARSE_NO_CRC, &n, &err), 0);
    CHECK_EQ(n.checksum, 0x191c1fbb);
    pv__put_be32(rec + 16 + 54, 0x191c1fbc);
    CHECK_EQ(pv_needle_parse(rec, sizeof example - 8, 3, 54, 0, 0, &n, &err), PV_ECRC);
    CHECK_EQ(err.a, 0x9a71bb4c);
    CHECK_EQ(err.b, 0x191c1fbc);
    CHECK_EQ(err.c, 1);
}

static void padding_content(void) {
    uint8_t rec[128];
    pv_needle n = {.id = 0x1122334455667788, .data = (const uint8_t *)"abcd", .data_size = 4, .cookie = 1};
    n.last_modified_s = 0x0a0b0c0d0e;
    CHECK_EQ(frame(&n, 1, rec), 32); /* 16 + 4 + 4 is whole: 8 more */
    CHECK_MEM(rec + 24, "\x11\x22\x33\x44\x55\x66\x77\x88", 8);
    CHECK_EQ(frame(&n, 2, rec), 32); /* 16 + 9 + 4 = 29 */
    CHECK_MEM(rec + 29, "\x11\x22\x33", 3);
    n.flags = PV_F_MTIME;
    CHECK_EQ(frame(&n, 2, rec), 40); /* 16 + 14 + 4 = 34 */
    CHECK_MEM(rec + 34, "\x0b\x0c\x0d\x0e\x55\x66", 6);
    n.data_size = 2;
    CHECK_EQ(frame(&n, 2, rec), 40); /* 16 + 12 + 4 is whole */
    CHECK_MEM(rec + 32, "\x0b\x0c\x0d\x0e\x55\x66\x77\x88", 8);
    CHECK_EQ(frame(&n, 3, rec), 48); /* 16 + 12 + 12 is whole */
    CHECK_MEM(rec + 40, "\0\0\0\x0c\0\0\0\0", 8);
    n.data_size = 0; /* nothing is stored of the time then, so the padding does not hold it either */
    CHECK_EQ(frame(&n, 2, rec), 24);
    CHECK_MEM(rec + 20, "\x11\x22\x33\x44", 4);
}

static void frame_errors(void) {
    uint8_t head[20];
    uint8_t tail[64];
    size_t head_len;
    size_t tail_len;
    int32_t size;
    pv_errinfo err;
    pv_needle n = {.data_size = 5, .data = (const uint8_t *)"hello", .name = (const uint8_t *)"name", .name_size = 4};
    n.flags = PV_F_NAME;
    /* 1 flags, 5 name, 4 checksum, 8 time, padding 16+4+5+6+12=43 -> 5 */
    CHECK_EQ(pv_needle_frame(&n, 3, head, &head_len, tail, 22, &tail_len, &size, &err), PV_EBUFFER);
    CHECK_EQ(err.a, 23);
    CHECK_EQ(pv_needle_frame(&n, 3, head, &head_len, tail, 23, &tail_len, &size, &err), 0);
    CHECK_EQ(tail_len, 23);
    CHECK_EQ(pv_needle_frame(&n, 0, head, &head_len, tail, 64, &tail_len, &size, &err), PV_EVERSION);
    CHECK_EQ(pv_needle_frame(&n, 4, head, &head_len, tail, 64, &tail_len, &size, &err), PV_EVERSION);
    CHECK_EQ(err.a, 4);
    /* The data itself is not touched, so its size may be any. */
    static const uint32_t huge[] = {INT32_MAX, 0x80000000, UINT32_MAX, INT32_MAX - 36};
    for (size_t i = 0; i < PV__ARRAY_LEN(huge); i++) {
        n.data_size = huge[i];
        CHECK_EQ(pv_needle_frame(&n, 3, head, &head_len, tail, 64, &tail_len, &size, &err), PV_ERANGE);
        CHECK_EQ(pv_needle_body_size(&n, 3, &size), PV_ERANGE);
    }
    n.data_size = INT32_MAX - 36 - 10;
    CHECK_EQ(pv_needle_body_size(&n, 3, &size), 0);
    CHECK(pv_needle_record_len(size, 3) <= INT32_MAX);
    /* The longest tail there is fits the documented bound. */
    static uint8_t big[PV_NEEDLE_TAIL_MAX];
    pv_needle all = {.flags = 0xff, .name_size = 255, .mime_size = 255, .pairs_size = 65535, .name = bytes};
    all.mime = bytes;
    all.pairs = bytes;
    all.data = bytes;
    for (all.data_size = 1; all.data_size <= 8; all.data_size++) {
        CHECK_EQ(pv_needle_frame(&all, 3, head, &head_len, big, sizeof big, &tail_len, &size, &err), 0);
    }
}

static void super_blocks(void) {
    uint64_t seed = 3;
    for (int i = 0; i < 1000; i++) {
        uint8_t in[8];
        uint8_t out[8];
        pv__put_be64(in, t_rand(&seed));
        pv_superblock sb;
        pv_superblock_parse(in, &sb);
        pv_superblock_put(&sb, out);
        CHECK_MEM(in, out, 8);
    }
    const pv_superblock sb = {
        .version = 3, .ttl_count = 3, .ttl_unit = 2, .compaction_revision = 0x1234, .extra_size = 5};
    uint8_t out[8];
    pv_superblock_put(&sb, out);
    CHECK_MEM(out, "\x03\x00\x03\x02\x12\x34\x00\x05", 8);
}

int main(void) {
    fill_bytes();
    RUN(worked_example);
    RUN(record_lengths);
    RUN(golden_files);
    RUN(round_trips);
    RUN(truncations);
    RUN(flips);
    RUN(field_errors);
    RUN(size_errors);
    RUN(legacy_checksum);
    RUN(padding_content);
    RUN(frame_errors);
    RUN(super_blocks);
    return T_END();
}
