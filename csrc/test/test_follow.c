/* Records as a follower's messages (pv_dat_follow). What it gives for any file: fuzz/fuzz_dat.c. */
#include "t.h"

#define CAP ((size_t)1 << 20)
#define MAX 64

typedef struct file {
    int fd;
    uint64_t end;
    uint8_t version;
} file;

static file new_file(uint8_t version) {
    const file f = {.fd = t_file(), .end = 8, .version = version};
    const uint8_t block[8] = {version};
    CHECK(pwrite(f.fd, block, 8, 0) == 8);
    return f;
}

/* A record of so many data bytes, all of them `fill`. Returns its offset. */
static uint64_t add(file *f, uint64_t id, uint64_t when, uint32_t data_size, uint8_t fill) {
    uint8_t *data = malloc(data_size + 1U);
    CHECK(data != NULL);
    memset(data, fill, data_size);
    pv_needle n = {.id = id, .cookie = 7, .append_at_ns = when, .data_size = data_size, .data = data};
    n.checksum = pv_crc32c(0, n.data, n.data_size);
    uint8_t head[20];
    size_t head_len;
    size_t tail_len;
    static uint8_t tail[PV_NEEDLE_TAIL_MAX];
    int32_t size;
    CHECK_EQ(pv_needle_frame(&n, f->version, head, &head_len, tail, sizeof tail, &tail_len, &size, NULL), 0);
    uint64_t at = f->end;
    CHECK(pwrite(f->fd, head, head_len, (off_t)at) == (ssize_t)head_len);
    CHECK(pwrite(f->fd, data, data_size, (off_t)(at + head_len)) == (ssize_t)data_size);
    CHECK(pwrite(f->fd, tail, tail_len, (off_t)(at + head_len + data_size)) == (ssize_t)tail_len);
    f->end = at + head_len + data_size + tail_len;
    free(data);
    return at;
}

typedef struct got {
    uint8_t out[CAP];
    uint32_t ends[MAX];
    uint64_t offset;
    uint64_t latest;
} got;

static int follow(const file *f, got *g, size_t cap, size_t max) {
    pv_errinfo err;
    return pv_dat_follow(f->fd, f->version, &g->offset, f->end, g->out, cap, g->ends, max, &g->latest, &err);
}

/* The bytes are upstream's: made by its library for the same record. */
static void test_a_message_is_the_one_of_the_library(void) {
    static got g;
    file f = new_file(3);
    g = (got){.offset = add(&f, 0x0102, 77, 3, 'x')};
    CHECK_EQ(follow(&f, &g, CAP, MAX), 1);
    const uint8_t expected[] = {0x0A, 16, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 8, 0x12, 24, 0, 0, 0, 3};
    CHECK_MEM(g.out, expected, sizeof expected);
    CHECK_MEM(g.out + sizeof expected, "xxx\0", 4); /* data and flags */
    CHECK_EQ(g.ends[0], 18 + 2 + 24 + 4);
    const uint8_t last[] = {0x18, 1, 0x20, 3};
    CHECK_MEM(g.out + g.ends[0] - 4, last, 4);
    CHECK_EQ(g.offset, f.end);
    CHECK_EQ(g.latest, 77);
    CHECK_EQ(follow(&f, &g, CAP, MAX), 0);
    close(f.fd);
}

static void test_every_version_and_many_sizes(void) {
    static got g;
    for (uint8_t version = 1; version <= 3; version++) {
        file f = new_file(version);
        const uint32_t sizes[] = {1, 100, 111, 112, 113, 120, 16000, 16360, 16384, 70000, 200000};
        enum { N = sizeof sizes / sizeof *sizes };
        for (uint32_t i = 0; i < N; i++) {
            (void)add(&f, i + 1, 1000 + i, sizes[i], (uint8_t)i);
        }
        g = (got){.offset = 8};
        CHECK_EQ(follow(&f, &g, CAP, MAX), N);
        uint32_t start = 0;
        for (uint32_t i = 0; i < N; i++) {
            const uint8_t id[8] = {[7] = (uint8_t)(i + 1)};
            CHECK_MEM(g.out + start + 6, id, sizeof id);
            CHECK(g.ends[i] > start + sizes[i]);
            CHECK_EQ(g.out[g.ends[i] - 1], version);
            start = g.ends[i];
        }
        CHECK_EQ(g.latest, version == 3 ? 1000 + N - 1 : 0);
        close(f.fd);
    }
}

/* Batches as small as can be give the same bytes as one. */
static void test_batches_join(void) {
    static got one, some;
    uint64_t seed = 5;
    file f = new_file(3);
    for (uint64_t id = 1; id <= 60; id++) {
        (void)add(&f, id, id, (uint32_t)t_rand_below(&seed, 300), (uint8_t)id);
    }
    one = (got){.offset = 8};
    CHECK_EQ(follow(&f, &one, CAP, MAX), 60);
    for (size_t max = 1; max < 8; max++) {
        some = (got){.offset = 8};
        size_t made = 0;
        int count = 0;
        while (some.offset < f.end) {
            int rc = follow(&f, &some, 400 + max * PV_FOLLOW_GROWTH, max);
            CHECK(rc > 0);
            CHECK_MEM(some.out, one.out + made, some.ends[rc - 1]);
            made += some.ends[rc - 1];
            count += rc;
        }
        CHECK_EQ(count, 60);
        CHECK_EQ(some.latest, 60);
    }
    close(f.fd);
}

static void test_stops_before_what_it_does_not_take(void) {
    static got g;
    file f = new_file(3);
    (void)add(&f, 1, 10, 5, 1);
    uint64_t long_one = add(&f, 2, 20, PV_FOLLOW_RECORD_MAX, 2);
    uint64_t third = add(&f, 3, 30, 5, 3);
    g = (got){.offset = 8};
    CHECK_EQ(follow(&f, &g, CAP, MAX), 1);
    CHECK_EQ(g.offset, long_one);
    CHECK_EQ(g.latest, 10);
    CHECK_EQ(follow(&f, &g, CAP, MAX), 0);
    CHECK_EQ(g.offset, long_one);
    const uint8_t negative[4] = {0xFF, 0xFF, 0xFF, 0xFF};
    CHECK(pwrite(f.fd, negative, 4, (off_t)(third + 12)) == 4);
    g.offset = third;
    CHECK_EQ(follow(&f, &g, CAP, MAX), 0);
    CHECK_EQ(g.offset, third);
    close(f.fd);
}

static void test_zero_filled_regions_are_no_records(void) {
    static got g;
    file f = new_file(3);
    (void)add(&f, 1, 10, 5, 1);
    f.end += (uint64_t)1 << 16; /* of 32 bytes each, more than fit one call */
    uint64_t behind = add(&f, 2, 20, 5, 2);
    g = (got){.offset = 8};
    CHECK_EQ(follow(&f, &g, (size_t)4 << 10, MAX), 1);
    int calls = 1;
    while (g.offset < behind) {
        uint64_t before = g.offset;
        int rc = follow(&f, &g, (size_t)4 << 10, MAX);
        CHECK(g.offset > before);
        CHECK(rc == 0 || g.offset >= behind);
        calls++;
    }
    CHECK(calls > 8);
    CHECK_EQ(g.latest > 10, g.offset > behind);
    close(f.fd);
}

static void test_a_last_record_without_its_padding(void) {
    static got g;
    file f = new_file(3);
    uint64_t at = add(&f, 1, 10, 6, 1);
    const uint64_t padded = f.end;
    const uint64_t whole = at + 16 + 4 + 6 + 1 + 4 + 8;
    CHECK(whole < padded);
    CHECK_EQ(ftruncate(f.fd, (off_t)whole), 0);
    f.end = whole;
    g = (got){.offset = 8};
    CHECK_EQ(follow(&f, &g, CAP, MAX), 1);
    CHECK_EQ(g.offset, padded);
    CHECK_EQ(g.ends[0], 18 + 2 + (whole - at - 16) + 4);
    CHECK_EQ(follow(&f, &g, CAP, MAX), 0);
    f.end = whole - 1; /* now its append time is cut */
    g = (got){.offset = 8};
    CHECK_EQ(follow(&f, &g, CAP, MAX), 0);
    CHECK_EQ(g.offset, 8);
    f.end = padded; /* said to be longer than the file is */
    CHECK_EQ(follow(&f, &g, CAP, MAX), 0);
    close(f.fd);
}

static void test_refusals(void) {
    static got g;
    file f = new_file(3);
    (void)add(&f, 1, 10, 5, 1);
    g = (got){.offset = 8};
    CHECK_EQ(follow(&f, &g, CAP, 0), PV_EINVAL);
    CHECK_EQ(follow(&f, &g, 5, 1), PV_EINVAL);
    CHECK_EQ(follow(&f, &g, CAP, SIZE_MAX), PV_EINVAL);
    CHECK_EQ(follow(&f, &g, SIZE_MAX, 1), PV_EINVAL);
    f.version = 4;
    CHECK_EQ(follow(&f, &g, CAP, 1), PV_EVERSION);
    f.version = 3;
    const int good = f.fd;
    f.fd = -1; /* who reads record by record tells why */
    CHECK_EQ(follow(&f, &g, CAP, 1), 0);
    CHECK_EQ(g.offset, 8);
    close(good);
}

int main(void) {
    RUN(test_a_message_is_the_one_of_the_library);
    RUN(test_every_version_and_many_sizes);
    RUN(test_batches_join);
    RUN(test_stops_before_what_it_does_not_take);
    RUN(test_zero_filled_regions_are_no_records);
    RUN(test_a_last_record_without_its_padding);
    RUN(test_refusals);
    return T_END();
}
