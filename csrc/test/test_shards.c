/* Shards to read from (pv_shards.c): counted descriptors, sets of ids, reads with and without lost shards, the registry. */
#include "t_shards.h"

#include <stdatomic.h>
#include <time.h>

#define ALL 0x3fU

static void test_the_last_user_closes_a_file(void) {
    pv_file *f;
    CHECK_EQ(pv_file_new(-1, &f), PV_EINVAL);
    CHECK(f == NULL);
    int fd = t_file();
    CHECK_EQ(pv_file_new(fd, &f), 0);
    CHECK(pv_file_ref(f) == f);
    pv_file_unref(f);
    CHECK(fcntl(fd, F_GETFD) >= 0);
    pv_file_unref(f);
    CHECK(fcntl(fd, F_GETFD) < 0);
    pv_file_unref(NULL);
    CHECK(pv_file_ref(NULL) == NULL);
}

static void test_ids(void) {
    pv_ids *s;
    CHECK_EQ(pv_ids_new(&s), 0);
    CHECK_EQ(pv_ids_count(s), 0);
    CHECK_EQ(pv_ids_has(s, 0), 0);
    CHECK_EQ(pv_ids_add(s, 0), 1);
    CHECK_EQ(pv_ids_add(s, 0), 0);
    CHECK_EQ(pv_ids_add(s, UINT64_MAX), 1);
    uint64_t seed = 5;
    for (uint64_t i = 0; i < 5000; i++) { /* runs of neighbours and ids far apart */
        uint64_t id = i % 2 == 0 ? i + 1 : t_rand(&seed) | 1;
        CHECK_EQ(pv_ids_has(s, id), 0);
        CHECK_EQ(pv_ids_add(s, id), 1);
        CHECK_EQ(pv_ids_add(s, id), 0);
        CHECK_EQ(pv_ids_has(s, id), 1);
    }
    CHECK_EQ(pv_ids_count(s), 5002);
    CHECK_EQ(pv_ids_has(s, 0), 1);
    CHECK_EQ(pv_ids_has(s, 2), 0);
    static uint64_t out[6000];
    CHECK_EQ(pv_ids_list(s, out, 10), 10);
    CHECK_EQ(pv_ids_list(s, out, 6000), 5002);
    for (size_t i = 0; i < 5002; i++) {
        CHECK_EQ(pv_ids_has(s, out[i]), 1);
    }
    CHECK(pv_ids_ref(s) == s);
    pv_ids_unref(s);
    CHECK_EQ(pv_ids_has(s, 1), 1);
    pv_ids_unref(s);
    pv_ids_unref(NULL);
}

static void test_many_ids_at_once(void) {
    static const uint8_t journal[] = {0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3}; /* 5, 0, half of one */
    pv_ids *a, *b;
    CHECK_EQ(pv_ids_new(&a), 0);
    CHECK_EQ(pv_ids_new(&b), 0);
    CHECK_EQ(pv_ids_covers(a, b), 1);
    CHECK_EQ(pv_ids_covers(a, a), 1);
    CHECK_EQ(pv_ids_add_bytes(a, journal, sizeof journal), 0);
    CHECK_EQ(pv_ids_add_bytes(a, journal, 0), 0);
    CHECK_EQ(pv_ids_count(a), 2);
    CHECK(pv_ids_has(a, 5) == 1 && pv_ids_has(a, 0) == 1);
    CHECK_EQ(pv_ids_covers(a, b), 1);
    CHECK_EQ(pv_ids_covers(b, a), 0);
    CHECK_EQ(pv_ids_add(b, 5), 1);
    CHECK_EQ(pv_ids_covers(b, a), 0); /* not 0 */
    CHECK_EQ(pv_ids_add(b, 0), 1);
    CHECK_EQ(pv_ids_covers(b, a), 1);
    CHECK_EQ(pv_ids_add(b, 6), 1);
    CHECK_EQ(pv_ids_covers(b, a), 1);
    CHECK_EQ(pv_ids_covers(a, b), 0);
    pv_ids_unref(a);
    pv_ids_unref(b);
}

static void test_what_is_buried_in_an_index(void) {
    t_coded c = t_coded_new();
    pv_ids *found;
    pv_errinfo err;
    CHECK_EQ(pv_ids_new(&found), 0);
    CHECK_EQ(pv_ecx_buried(c.ecx_fd, 4, c.rows, found, &err), 0);
    CHECK_EQ(pv_ids_count(found), 0);
    static const uint8_t gone[4] = {0xff, 0xff, 0xff, 0xff};
    CHECK_EQ(pv__io_pwrite(c.ecx_fd, gone, 4, 4 * 16 + 12, &err), 0);
    CHECK_EQ(pv__io_pwrite(c.ecx_fd, gone, 4, (c.rows - 1) * 16 + 12, &err), 0);
    CHECK_EQ(pv_ecx_buried(c.ecx_fd, 4, c.rows, found, &err), 0);
    CHECK_EQ(pv_ids_count(found), 2);
    CHECK(pv_ids_has(found, 5) == 1 && pv_ids_has(found, c.rows) == 1);
    CHECK_EQ(pv_ecx_buried(c.ecx_fd, 4, c.rows + 100, found, &err), 0); /* a file that has become shorter */
    CHECK_EQ(pv_ecx_buried(c.ecx_fd, 6, c.rows, found, &err), PV_EINVAL);
    pv__alloc_fail_at(1);
    CHECK_EQ(pv_ecx_buried(c.ecx_fd, 4, c.rows, found, &err), PV_ENOMEM);
    pv__alloc_fail_at(0);
    pv_ids_unref(found);
    t_coded_free(&c);
}

static void test_ids_without_memory(void) {
    pv_ids *s;
    for (long n = 1; n <= 2; n++) {
        pv__alloc_fail_at(n);
        CHECK_EQ(pv_ids_new(&s), PV_ENOMEM);
    }
    pv__alloc_fail_at(0);
    CHECK_EQ(pv_ids_new(&s), 0);
    uint64_t id = 1;
    pv__alloc_fail_at(1);
    while (pv_ids_add(s, id) == 1) {
        id++;
    }
    CHECK_EQ(pv__alloc_fail_at(0), 0);
    CHECK_EQ(pv_ids_has(s, id), 0);
    CHECK_EQ(pv_ids_count(s), id - 1);
    CHECK_EQ(pv_ids_has(s, id - 1), 1);
    CHECK_EQ(pv_ids_add(s, id), 1);
    pv_ids_unref(s);
}

static int read_one(pv_shards *s, uint64_t id, uint32_t flags, pv_errinfo *err) {
    pv_idx_row row;
    int rc = pv_shards_find(s, id, flags, &row, err);
    if (rc < 0) {
        return rc;
    }
    pv_read r;
    rc = pv_shards_read(s, &row, flags, &r, err);
    if (rc == 0) {
        CHECK_EQ(r.n.id, id);
        CHECK_EQ(r.n.cookie, T_SHARDS_COOKIE);
        CHECK_EQ(r.n.data_size, t_coded_len(id));
        CHECK(r.n.data[0] == (uint8_t)id && r.n.data[r.n.data_size - 1] == (uint8_t)id);
        pv_read_free(&r);
    } else {
        CHECK(r.buf == NULL);
    }
    return rc;
}

static void test_what_is_here_is_read(void) {
    t_coded c = t_coded_new();
    pv_shards *s = t_coded_view(&c, ALL);
    pv_errinfo err;
    for (uint64_t id = 1; id <= T_SHARDS_NEEDLES; id++) {
        CHECK_EQ(read_one(s, id, 0, &err), 0);
        CHECK_EQ(read_one(s, id, PV_READ_CACHED, &err), 0);
    }
    CHECK_EQ(read_one(s, T_SHARDS_NEEDLES + 1, 0, &err), PV_ENOTFOUND);
    CHECK_EQ(pv_ids_add(c.deleted, 3), 1);
    CHECK_EQ(read_one(s, 3, 0, &err), PV_EDELETED);
    uint8_t gone[4] = {0xff, 0xff, 0xff, 0xff};
    CHECK_EQ(pv__io_pwrite(c.ecx_fd, gone, 4, 4 * 16 + 12, &err), 0);
    CHECK_EQ(read_one(s, 5, 0, &err), PV_EDELETED);
    const pv_idx_row none = {.key = 1, .offset = 8, .size = 0};
    pv_read r;
    CHECK_EQ(pv_shards_read(s, &none, 0, &r, &err), PV_EINVAL);
    const pv_idx_row behind = {.key = 1, .offset = (uint64_t)1 << 34, .size = 100};
    CHECK(pv_shards_read(s, &behind, 0, &r, &err) < 0);
    const pv_idx_row other = {.key = 9, .offset = 8, .size = (int32_t)T_SHARDS_LEN_MAX + 5};
    CHECK_EQ(pv_shards_read(s, &other, 0, &r, &err), PV_ECORRUPT); /* the record there is that of 1 */
    pv_shards_unref(s);
    t_coded_free(&c);
}

static void test_lost_shards_are_made_when_nobody_has_them(void) {
    t_coded c = t_coded_new();
    const uint32_t here = ALL & ~3U;
    pv_shards *s = t_coded_view(&c, here);
    pv_errinfo err;
    unsigned whole = 0;
    for (uint64_t id = 1; id <= T_SHARDS_NEEDLES; id++) {
        int rc = read_one(s, id, 0, &err); /* nothing is known yet */
        CHECK(rc == 0 || rc == PV_ERANGE);
        whole += rc == 0;
    }
    CHECK(whole > 0 && whole < T_SHARDS_NEEDLES);
    pv_shards_elsewhere(s, 1, 60000); /* somebody has shard 0, nobody shard 1 */
    unsigned more = 0;
    for (uint64_t id = 1; id <= T_SHARDS_NEEDLES; id++) {
        more += read_one(s, id, 0, &err) == 0;
    }
    CHECK(more > whole && more < T_SHARDS_NEEDLES);
    pv_shards_elsewhere(s, here, 60000);
    unsigned later = 0;
    for (uint64_t id = 1; id <= T_SHARDS_NEEDLES; id++) {
        CHECK_EQ(read_one(s, id, 0, &err), 0);
        int rc = read_one(s, id, PV_READ_CACHED, &err);
        later += rc == PV_ESYS && err.sys_errno == EAGAIN;
        CHECK(rc == 0 || (rc == PV_ESYS && err.sys_errno == EAGAIN));
    }
    CHECK_EQ(later, 1); /* the long one */
    pv_shards_elsewhere(s, here, 1);
    const struct timespec moment = {0, 3000000};
    CHECK(nanosleep(&moment, NULL) == 0);
    CHECK_EQ(read_one(s, 1, 0, &err), PV_ERANGE); /* it is known no more */
    pv_shards_elsewhere(s, here, 60000);
    pv_shards *few = t_coded_view(&c, 7U << 3); /* three of four */
    pv_shards_elsewhere(few, 0, 60000);
    CHECK_EQ(read_one(few, 1, 0, &err), PV_ERANGE);
    CHECK_EQ(err.a, 3);
    pv_shards_unref(few);
    for (long n = 1; n <= 2; n++) { /* the record, then the others' bytes */
        pv__alloc_fail_at(n);
        CHECK_EQ(read_one(s, 1, 0, &err), PV_ENOMEM);
    }
    pv__alloc_fail_at(0);
    pv_shards_unref(s);
    t_coded_free(&c);
}

static void test_wrong_options(void) {
    t_coded c = t_coded_new();
    const pv_shards_opts good = {
        .ecx = c.ecx, .deleted = c.deleted, .layout = c.layout, .rows = c.rows, .width = 4, .version = 3};
    pv_shards *s;
    for (int i = 0; i < 8; i++) {
        pv_shards_opts o = good;
        o.ecx = i == 0 ? NULL : o.ecx;
        o.deleted = i == 1 ? NULL : o.deleted;
        o.layout.data_shards = i == 2 ? 0 : i == 3 ? 31 : o.layout.data_shards;
        o.layout.parity_shards = i == 4 ? UINT32_MAX : o.layout.parity_shards;
        o.width = i == 5 ? 6 : o.width;
        o.version = i == 6 ? 0 : i == 7 ? 4 : o.version;
        CHECK_EQ(pv_shards_new(&o, &s), PV_EINVAL);
        CHECK(s == NULL);
    }
    pv__alloc_fail_at(1);
    CHECK_EQ(pv_shards_new(&good, &s), PV_ENOMEM);
    pv__alloc_fail_at(0);
    pv_shards_unref(NULL);
    t_coded_free(&c);
}

typedef struct race {
    pv_reg *reg;
    _Atomic bool stop;
    _Atomic uint64_t reads;
    _Atomic uint64_t misses;
} race;

static void *reader_main(void *arg) {
    race *r = arg;
    uint64_t seed = (uint64_t)(uintptr_t)&seed;
    while (!atomic_load(&r->stop)) {
        pv_shards *s = pv_reg_acquire_shards(r->reg, 7);
        pv_errinfo err;
        if (s == NULL) {
            atomic_fetch_add(&r->misses, 1);
            continue;
        }
        uint64_t id = 1 + t_rand_below(&seed, T_SHARDS_NEEDLES);
        int rc = read_one(s, id, id % 2 ? PV_READ_CACHED : 0, &err);
        CHECK(rc == 0 || rc == PV_ERANGE || rc == PV_EDELETED || (rc == PV_ESYS && err.sys_errno == EAGAIN));
        pv_shards_unref(s);
        atomic_fetch_add(&r->reads, 1);
    }
    return NULL;
}

/* Shards come and go, needles are deleted, under threads that read. */
static void test_views_are_exchanged_under_readers(void) {
    t_coded c = t_coded_new();
    race r = {0};
    pthread_t threads[3];
    CHECK_EQ(pv_reg_new(&r.reg), 0);
    for (size_t i = 0; i < 3; i++) {
        CHECK(pthread_create(&threads[i], NULL, reader_main, &r) == 0);
    }
    for (uint64_t round = 0; round < 400 || atomic_load(&r.reads) < 1000; round++) {
        pv_shards *s = t_coded_view(&c, round % 3 == 0 ? ALL : ALL & ~(1U << round % 6));
        CHECK_EQ(pv_reg_publish_shards(r.reg, 7, s), 0);
        pv_shards_elsewhere(s, 0, round % 2 ? 60000 : 0);
        pv_shards_unref(s);
        CHECK(pv_ids_add(c.deleted, 1000000 + round) >= 0);
        if (round % 8 == 0) {
            const struct timespec moment = {0, 200000};
            (void)nanosleep(&moment, NULL);
        }
        CHECK_EQ(pv_reg_withdraw(r.reg, 7), 0);
    }
    atomic_store(&r.stop, true);
    for (size_t i = 0; i < 3; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    pv_reg_free(r.reg);
    t_coded_free(&c);
}

static void test_registry_of_shards(void) {
    t_coded c = t_coded_new();
    pv_reg *reg;
    CHECK_EQ(pv_reg_new(&reg), 0);
    CHECK_EQ(pv_reg_publish_shards(reg, 7, NULL), PV_EINVAL);
    pv_shards *s = t_coded_view(&c, ALL);
    CHECK_EQ(pv_reg_publish_shards(reg, 7, s), 0);
    CHECK_EQ(pv_reg_publish_shards(reg, 7, s), PV_EEXISTS);
    CHECK_EQ(pv_reg_count(reg), 1);
    CHECK(pv_reg_acquire(reg, 7) == NULL); /* no plain volume */
    CHECK(pv_reg_acquire_shards(reg, 8) == NULL);
    for (uint32_t vid = 100; vid < 400; vid++) { /* the table grows around it */
        CHECK_EQ(pv_reg_publish_shards(reg, vid, s), 0);
    }
    pv_shards *again = pv_reg_acquire_shards(reg, 7);
    CHECK(again == s);
    pv_shards_unref(again);
    CHECK_EQ(pv_reg_withdraw(reg, 7), 0);
    CHECK_EQ(pv_reg_withdraw(reg, 7), PV_ENOTFOUND);
    CHECK(pv_reg_acquire_shards(reg, 7) == NULL);
    pv_shards_unref(s);
    pv_reg_free(reg); /* drops the others */
    t_coded_free(&c);
}

int main(void) {
    RUN(test_the_last_user_closes_a_file);
    RUN(test_ids);
    RUN(test_many_ids_at_once);
    RUN(test_what_is_buried_in_an_index);
    RUN(test_ids_without_memory);
    RUN(test_what_is_here_is_read);
    RUN(test_lost_shards_are_made_when_nobody_has_them);
    RUN(test_wrong_options);
    RUN(test_registry_of_shards);
    RUN(test_views_are_exchanged_under_readers);
    return T_END();
}
