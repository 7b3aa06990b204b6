/* t.h - what the C tests share: checks, a guard page, scratch files, random numbers.
 *
 * A test program is a main() that calls RUN(fn) for each of its functions and returns T_END(). A failed check prints
 * where and what, and ends the program with status 1: the first failure is the one to look at.
 */
#ifndef PV_T_H
#define PV_T_H

#include "../pv_int.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(cond)                                                                                                    \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            t_fail(__FILE__, __LINE__, #cond);                                                                         \
        }                                                                                                              \
    } while (0)

/* Both sides as signed and hexadecimal numbers in the message. */
#define CHECK_EQ(a, b)                                                                                                 \
    do {                                                                                                               \
        uint64_t t_a = (uint64_t)(a), t_b = (uint64_t)(b);                                                             \
        if (t_a != t_b) {                                                                                              \
            fprintf(stderr, "%" PRId64 " (%" PRIx64 ") != %" PRId64 " (%" PRIx64 ")\n", (int64_t)t_a, t_a,             \
                    (int64_t)t_b, t_b);                                                                                \
            t_fail(__FILE__, __LINE__, #a " == " #b);                                                                  \
        }                                                                                                              \
    } while (0)

#define CHECK_MEM(a, b, len)                                                                                           \
    do {                                                                                                               \
        if (memcmp((a), (b), (len)) != 0) {                                                                            \
            t_fail(__FILE__, __LINE__, #a " and " #b " hold the same " #len " bytes");                                 \
        }                                                                                                              \
    } while (0)

#define RUN(fn)                                                                                                        \
    do {                                                                                                               \
        fn();                                                                                                          \
        printf("  ok %s\n", #fn);                                                                                      \
    } while (0)

#define T_END() (printf("%s: passed\n", __FILE__), 0)

/* Fewer repetitions where ThreadSanitizer makes each slow; what it looks for does not depend on their number. */
#ifdef __SANITIZE_THREAD__
#define T_REPEAT(n) ((n) / 8)
#else
#define T_REPEAT(n) (n)
#endif

static inline _Noreturn void t_fail(const char *file, int line, const char *what) {
    fflush(stdout);
    fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
    exit(1);
}

/* ------------------------------------------------------------------ guard page */

typedef struct t_guard {
    uint8_t *map;
    size_t mapped;
    size_t room; /* bytes before the guard page */
} t_guard;

static inline t_guard t_guard_new(size_t room) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    t_guard g = {.room = (room + page - 1) / page * page};
    g.mapped = g.room + page;
    g.map = mmap(NULL, g.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(g.map != MAP_FAILED);
    CHECK(mprotect(g.map + g.room, page, PROT_NONE) == 0);
    return g;
}

/* Copies len bytes so that the byte behind the last one cannot be read. */
static inline uint8_t *t_guard_put(t_guard *g, const void *data, size_t len) {
    CHECK(len <= g->room);
    uint8_t *p = g->map + g->room - len;
    if (len > 0) {
        memcpy(p, data, len);
    }
    return p;
}

static inline void t_guard_free(t_guard *g) {
    CHECK(munmap(g->map, g->mapped) == 0);
}

/* ------------------------------------------------------------------ files */

/* An empty file without a name, gone when closed. */
static inline int t_file(void) {
    const char *dir = getenv("TMPDIR");
    char path[512];
    snprintf(path, sizeof path, "%s/pv-test-XXXXXX", dir != NULL ? dir : "/tmp");
    int fd = mkostemp(path, O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK(unlink(path) == 0);
    return fd;
}

/* ------------------------------------------------------------------ random numbers (splitmix64) */

static inline uint64_t t_rand(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15U);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
}

static inline uint64_t t_rand_below(uint64_t *state, uint64_t bound) {
    return t_rand(state) % bound;
}

#endif
