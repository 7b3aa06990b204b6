/* pv_int.c - the primitives of pv_int.h that are not one-liners: making locks, allocating memory. */
#include "pv_int.h"

#include <sys/mman.h>
#include <time.h>

int pv__mutex_init(pthread_mutex_t *m) {
    return pthread_mutex_init(m, NULL) == 0 ? 0 : PV_ENOMEM;
}

/* Without the preference a steady stream of readers would hold up a write for ever. */
int pv__rwlock_init(pthread_rwlock_t *l) {
    pthread_rwlockattr_t attr;
    if (pthread_rwlockattr_init(&attr) != 0) {
        return PV_ENOMEM;
    }
    pv__must(pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP));
    int rc = pthread_rwlock_init(l, &attr);
    pv__must(pthread_rwlockattr_destroy(&attr));
    return rc == 0 ? 0 : PV_ENOMEM;
}

int pv__cond_init(pthread_cond_t *c) {
    pthread_condattr_t attr;
    if (pthread_condattr_init(&attr) != 0) {
        return PV_ENOMEM;
    }
    pv__must(pthread_condattr_setclock(&attr, CLOCK_MONOTONIC));
    int rc = pthread_cond_init(c, &attr);
    pv__must(pthread_condattr_destroy(&attr));
    return rc == 0 ? 0 : PV_ENOMEM;
}

#ifdef PV_TEST_HOOKS
static long alloc_countdown; /* 0: off */

long pv__alloc_fail_at(long n) {
    return __atomic_exchange_n(&alloc_countdown, n, __ATOMIC_SEQ_CST);
}

static int alloc_must_fail(void) {
    long left = __atomic_load_n(&alloc_countdown, __ATOMIC_SEQ_CST);
    while (left > 0) {
        if (__atomic_compare_exchange_n(&alloc_countdown, &left, left - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
            return left == 1;
        }
    }
    return 0;
}
#else
static inline int alloc_must_fail(void) {
    return 0;
}
#endif

void *pv__malloc(size_t len) {
    return alloc_must_fail() ? NULL : malloc(len);
}

void *pv__calloc(size_t n, size_t size) {
    return alloc_must_fail() ? NULL : calloc(n, size);
}

void *pv__realloc(void *p, size_t n, size_t size) {
    size_t len;
    if (alloc_must_fail() || __builtin_mul_overflow(n, size, &len) || len == 0) {
        return NULL;
    }
    return realloc(p, len);
}

void pv__free(void *p) {
    free(p);
}

void *pv__pages(size_t len) {
    if (alloc_must_fail()) {
        return NULL;
    }
    void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

void pv__pages_free(void *p, size_t len) {
    pv__must(munmap(p, len));
}
