/* pv_int.h - what the engine's own sources share: byte order, branch hints, locks, errors, I/O. Include it first.
 *
 * Not for users of the engine: those include pv.h alone. Names with two underscores (pv__) are internal to the engine.
 */
#ifndef PV_INT_H
#define PV_INT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "pv.h"

#define PV__LIKELY(x) __builtin_expect(!!(x), 1)
#define PV__UNLIKELY(x) __builtin_expect(!!(x), 0)
#define PV__ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

/* Largest offset the system's off_t takes; offsets from files are checked against it before a seek. */
#define PV__OFF_MAX ((uint64_t)INT64_MAX)

/* ------------------------------------------------------------------ byte order: .dat and .idx are big-endian */

static inline uint16_t pv__get_be16(const uint8_t *p) {
    return (uint16_t)(((unsigned)p[0] << 8) | p[1]);
}

static inline uint32_t pv__get_be32(const uint8_t *p) {
    return ((uint32_t)p[0] << 24) | ((uint32_t)p[1] << 16) | ((uint32_t)p[2] << 8) | p[3];
}

static inline uint64_t pv__get_be40(const uint8_t *p) {
    return ((uint64_t)p[0] << 32) | pv__get_be32(p + 1);
}

static inline uint64_t pv__get_be64(const uint8_t *p) {
    return ((uint64_t)pv__get_be32(p) << 32) | pv__get_be32(p + 4);
}

static inline void pv__put_be16(uint8_t *p, uint16_t v) {
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static inline void pv__put_be32(uint8_t *p, uint32_t v) {
    p[0] = (uint8_t)(v >> 24);
    p[1] = (uint8_t)(v >> 16);
    p[2] = (uint8_t)(v >> 8);
    p[3] = (uint8_t)v;
}

/* The low 40 bits. */
static inline void pv__put_be40(uint8_t *p, uint64_t v) {
    p[0] = (uint8_t)(v >> 32);
    pv__put_be32(p + 1, (uint32_t)v);
}

static inline void pv__put_be64(uint8_t *p, uint64_t v) {
    pv__put_be32(p, (uint32_t)(v >> 32));
    pv__put_be32(p + 4, (uint32_t)v);
}

/* Two's complement without relying on implementation-defined narrowing. */
static inline int32_t pv__i32(uint32_t v) {
    int32_t r;
    memcpy(&r, &v, sizeof r);
    return r;
}

/* ------------------------------------------------------------------ errors */

/* Fills *err (which may be NULL) and returns code, so that it can stand in a return statement. */
static inline int pv__fail(pv_errinfo *err, int code, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    if (err != NULL) {
        err->code = code;
        err->sys_errno = 0;
        err->a = a;
        err->b = b;
        err->c = c;
        err->d = d;
    }
    return code;
}

/* The same for a failed system call; errno is given, because it must be read before anything else runs. */
static inline int pv__fail_sys(pv_errinfo *err, int sys_errno, uint64_t offset, uint64_t wanted, uint64_t done) {
    (void)pv__fail(err, PV_ESYS, offset, wanted, done, 0);
    if (err != NULL) {
        err->sys_errno = sys_errno;
    }
    return PV_ESYS;
}

/* Clears *err; the functions that take one do this on entry only where they promise a clean one on success. */
static inline void pv__err_clear(pv_errinfo *err) {
    if (err != NULL) {
        memset(err, 0, sizeof *err);
    }
}

/* ------------------------------------------------------------------ locks
 * A lock call that fails (never initialised, owned already) is a programming error: going on would corrupt a volume. */

static inline void pv__must(int rc) {
    if (PV__UNLIKELY(rc != 0)) {
        abort();
    }
}

static inline void pv__mutex_lock(pthread_mutex_t *m) {
    pv__must(pthread_mutex_lock(m));
}
/* Waits no longer than until a time of CLOCK_REALTIME. 0: the lock is not held. */
static inline int pv__mutex_lock_until(pthread_mutex_t *m, const struct timespec *until) {
    int rc = pthread_mutex_timedlock(m, until);
    if (rc != ETIMEDOUT) {
        pv__must(rc);
    }
    return rc == 0;
}

static inline void pv__mutex_unlock(pthread_mutex_t *m) {
    pv__must(pthread_mutex_unlock(m));
}

static inline void pv__rdlock(pthread_rwlock_t *l) {
    pv__must(pthread_rwlock_rdlock(l));
}

static inline void pv__wrlock(pthread_rwlock_t *l) {
    pv__must(pthread_rwlock_wrlock(l));
}

static inline void pv__rwunlock(pthread_rwlock_t *l) {
    pv__must(pthread_rwlock_unlock(l));
}

static inline void pv__cond_wait(pthread_cond_t *c, pthread_mutex_t *m) {
    pv__must(pthread_cond_wait(c, m));
}

static inline void pv__cond_broadcast(pthread_cond_t *c) {
    pv__must(pthread_cond_broadcast(c));
}

/* 0 or PV_ENOMEM. The rwlock lets waiting writers go first; a thread must not take it shared twice. */
int pv__mutex_init(pthread_mutex_t *m) PV_WUR;
int pv__rwlock_init(pthread_rwlock_t *l) PV_WUR;
int pv__cond_init(pthread_cond_t *c) PV_WUR; /* timed waits go by CLOCK_MONOTONIC */

/* ------------------------------------------------------------------ memory (pv_int.c) */

/* malloc/calloc/realloc/free, with n * size checked. A test build can make the Nth of them fail. */
void *pv__malloc(size_t len) PV_WUR;
void *pv__calloc(size_t n, size_t size) PV_WUR;
void *pv__realloc(void *p, size_t n, size_t size) PV_WUR; /* p stays valid on NULL */
void pv__free(void *p);
/* Whole zeroed pages straight from the system, and back. Pages never touched take no memory. */
void *pv__pages(size_t len) PV_WUR;
void pv__pages_free(void *p, size_t len);

/* ------------------------------------------------------------------ needle map (pv_map.c) */

/* pv_map_get without waiting for a disk: PV_EMORE where it would. */
int pv__map_get_cached(pv_map *m, uint64_t key, uint64_t *offset, int32_t *size) PV_WUR;
/* Replays rows that were read; *done goes up by those that are in. */
int pv__map_apply(pv_map *m, const pv_idx_row *rows, size_t count, uint64_t *done) PV_WUR;
/* pv_shuffled.c: replays [first_row, first_row + rows) of an index in the order of keys; all of these rows are there. Takes
 * 8 bytes a row until it returns. d = 1: PV_ESYS, PV_EEOF, PV_ECORRUPT (the file changed meanwhile); else PV_ENOMEM,
 * PV_ERANGE. */
#define PV__SHUFFLED_ROWS_MAX ((uint64_t)1 << 31)
int pv__map_load_shuffled(pv_map *m, int fd, uint8_t width, uint64_t first_row, uint64_t rows, pv_errinfo *err) PV_WUR;
/* pv_map_load of at most max_rows rows. */
int pv__map_load_rows(pv_map *m, int fd, uint64_t first_row, uint64_t max_rows, uint64_t *rows_done,
                      pv_errinfo *err) PV_WUR;
/* Adds to file_count what upstream counts besides puts. */
void pv__map_count_files(pv_map *m, uint64_t more);
/* Upstream's counters of a map that was made from the first max_rows rows of an index (storage.md 15, "after reload" but for
 * the memory kind), exactly where upstream estimates. live: the map of just those rows. Fills all of stats but entries and memory_bytes. */
int pv__index_count(int idx_fd, uint8_t width, uint64_t max_rows, pv_map *live, pv_map_stats *stats,
                    pv_errinfo *err) PV_WUR;

/* A map that lives in a sorted file (pv_sorted.c). path: the .sdx, used or made anew. Gives *out and the counters. Not
 * locked: the pv_map around it is. get, delete, visit answer as the functions of pv_map do, or with an I/O error. */
typedef struct pv__sorted pv__sorted;
int pv__sorted_open(const char *path, int idx_fd, uint8_t width, pv__sorted **out, pv_map_stats *stats,
                    pv_errinfo *err) PV_WUR;
void pv__sorted_close(pv__sorted *s);
size_t pv__sorted_memory(const pv__sorted *s);
/* cached: from the page cache alone, PV_EMORE if that does not have what is needed. */
int pv__sorted_get(const pv__sorted *s, uint64_t key, bool cached, uint64_t *offset, int32_t *size) PV_WUR;
int pv__sorted_delete(pv__sorted *s, uint64_t key, int32_t *old_size) PV_WUR;
int pv__sorted_visit(const pv__sorted *s, uint64_t from, pv_idx_row *rows, size_t max) PV_WUR;

/* ------------------------------------------------------------------ shards (pv_ec.c) */

/* How records are read out of shards. */
typedef struct pv__ec_how {
    uint32_t make;   /* bits of shards whose bytes may be made of others: PV_ERANGE for the rest */
    bool cached;     /* from the page cache alone: PV_ESYS with EAGAIN, as pv__io_pread_cached */
    size_t make_max; /* more bytes in one stretch are not made: PV_ESYS with EAGAIN */
} pv__ec_how;

/* pv_ec_read and pv_ecx_find for whoever may not wait. */
int pv__ec_read(const int32_t *fds, const pv_ec_layout *layout, uint64_t from, size_t len, uint8_t *out,
                const pv__ec_how *how, pv_errinfo *err) PV_WUR;
int pv__ecx_find(int fd, uint8_t width, uint64_t rows, uint64_t key, bool cached, pv_idx_row *out, uint64_t *index,
                 pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ files (pv_io.c)
 * Every system call of the engine that touches a file is made here. All are positional, go on after EINTR and short
 * transfers, and are bounded by the length asked for. They return 0 or a code; with PV_ESYS: a = offset, b = wanted
 * bytes, c = bytes done. Safe on any thread; no locks. */

/* open(2) with O_CLOEXEC added. a = flags. */
int pv__io_open(const char *path, int flags, unsigned mode, int *fd, pv_errinfo *err) PV_WUR;
/* Closes; the fd is gone also on error. fd < 0 is a no-op. */
int pv__io_close(int fd, pv_errinfo *err);
/* Reads up to len bytes; *got < len only at the end of the file. */
int pv__io_pread(int fd, void *buf, size_t len, uint64_t offset, size_t *got, pv_errinfo *err) PV_WUR;
/* Reads exactly len bytes, else PV_EEOF (a = offset, b = len, c = got). */
int pv__io_pread_full(int fd, void *buf, size_t len, uint64_t offset, pv_errinfo *err) PV_WUR;
/* The same from the page cache alone: PV_ESYS with EAGAIN when not all of it is there, with EOPNOTSUPP where the file system
 * cannot tell. */
int pv__io_pread_cached(int fd, void *buf, size_t len, uint64_t offset, pv_errinfo *err) PV_WUR;
/* Writes all of it. On error part of it may be in the file: the caller truncates. */
int pv__io_pwrite(int fd, const void *buf, size_t len, uint64_t offset, pv_errinfo *err) PV_WUR;
/* The same gathered from up to PV__IOV_MAX pieces, which are not changed. One system call if the kernel takes it all. */
#define PV__IOV_MAX 8
int pv__io_pwritev(int fd, const struct iovec *iov, int iov_count, uint64_t offset, pv_errinfo *err) PV_WUR;
/* As pv__io_pread, without filling the page cache with what is not in it. `buf` is page-aligned, with room up to the next
 * page; direct_fd (< 0: none) is the same file opened with O_DIRECT. */
int pv__io_pread_aside(int fd, int direct_fd, void *buf, size_t len, uint64_t offset, size_t *got,
                       pv_errinfo *err) PV_WUR;
/* As pv__io_pwrite, past the page cache where direct_fd and the alignment allow it; else the disk begins at once. */
int pv__io_pwrite_aside(int fd, int direct_fd, const void *buf, size_t len, uint64_t offset, pv_errinfo *err) PV_WUR;
/* The disk begins to write a stretch; nobody waits for it. Where that cannot be said to it, nothing happens. */
void pv__io_begin_writing(int fd, uint64_t offset, uint64_t len);
int pv__io_datasync(int fd, pv_errinfo *err) PV_WUR; /* fdatasync */
int pv__io_sync(int fd, pv_errinfo *err) PV_WUR;     /* fsync */
int pv__io_truncate(int fd, uint64_t size, pv_errinfo *err) PV_WUR;
/* Reserves [0, len) without changing the file's length. A file system that cannot is no error. */
int pv__io_allocate(int fd, uint64_t len, pv_errinfo *err) PV_WUR;
int pv__io_size(int fd, uint64_t *size, pv_errinfo *err) PV_WUR;
struct stat;
int pv__io_stat(int fd, struct stat *st, pv_errinfo *err) PV_WUR;
int pv__io_rename(const char *from, const char *to, pv_errinfo *err) PV_WUR;
int pv__io_unlink(const char *path, pv_errinfo *err) PV_WUR;
/* fsync of a directory, so that names in it are durable. */
int pv__io_sync_dir(const char *path, pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ hooks of test builds
 * With PV_TEST_HOOKS each call above asks a hook first. It may log the event, make it fail (returns an errno), or shorten
 * a transfer (lowers *len to what shall be done; the rest then follows in a further call, as after a short write). */
#ifdef PV_TEST_HOOKS
enum pv__io_op {
    PV__IO_OPEN = 0,
    PV__IO_CLOSE,
    PV__IO_PREAD,
    PV__IO_PWRITE,
    PV__IO_DATASYNC,
    PV__IO_SYNC,
    PV__IO_TRUNCATE,
    PV__IO_ALLOCATE,
    PV__IO_STAT,
    PV__IO_RENAME,
    PV__IO_UNLINK,
    PV__IO_SYNC_DIR,
    PV__IO_OP_COUNT
};

typedef struct pv__io_event {
    enum pv__io_op op;
    int fd;        /* -1 where there is none */
    int iov_count; /* PWRITE: pieces still to be written */
    const struct iovec *iov;
    const char *path;  /* OPEN, RENAME (from), UNLINK, SYNC_DIR */
    const char *path2; /* RENAME (to) */
    uint64_t offset;   /* PREAD, PWRITE; the new size with TRUNCATE */
} pv__io_event;

typedef int (*pv__io_hook)(void *ctx, const pv__io_event *ev, size_t *len);
/* Installs a hook (NULL: none) for the whole process. Call it while no other thread is in the engine. */
void pv__io_set_hook(pv__io_hook hook, void *ctx);
/* The Nth allocation from now (1 = the next) fails, once; 0 switches it off. Returns what was left of the old count. */
long pv__alloc_fail_at(long n);
#endif

#endif
